"""Problem sets: records of a file, or of a dataset on the Hugging Face hub, as `Problem`s.

    load_problems("gsm8k/train.jsonl", Fields(remove=r"<<[^>]*>>"))
    load_problems("openai/gsm8k:main", split="test", limit=100)

Files are .jsonl, .json, .csv, .tsv (each also .gz) and .parquet. The usual field names of
public sets are known: GSM8K (Cobbe et al., arXiv 2110.14168), MATH-500 (2305.20050), SVAMP
(2103.07191), MGSM (2210.03057, no header) and BIG-Bench Hard (2210.09261) load without a
mapping, in small letters or capitals. A record without a question or a gold answer is an error
and never skipped: a missing gold answer must not turn into a reward later on. Nor must one
that no completion can match: a worked solution in which no final answer is marked.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from nanomath.data.files import from_hub, parse_json, read_json, read_text, unique
from nanomath.data.problem import Problem

Record = tuple[str, Any]  # where it stands, for errors, and what stands there

# The fields that play a role, in the order in which they are looked for; + joins several.
USUAL_NAMES = {
    role: [tuple(names.split("+")) for names in usual.split()]
    for role, usual in {
        "question": "question problem prompt Body+Question Question input 0",
        "answer": "answer_number answer Answer target 1",
        "solution": "solution",
        "id": "id ID unique_id",
    }.items()
}
REQUIRED = ("question", "answer")
ABSENT = object()

_SUFFIX = r"\.(jsonl?|csv|tsv|parquet)(\.gz)?"
_MARKED = re.compile(
    r"\\(boxed|fbox)|####|\banswers?\b[^.\n]*?(\bis\b|\bare\b|\bequals\b|[:=])"
    r"|答え?[はがを:： \n]|解答|正解",
    re.IGNORECASE,
)
_WORD = re.compile(
    r"[\u3040-\u30ff\u4e00-\u9fff]{2}|[^\W\d_\u3040-\u30ff\u4e00-\u9fff]{2,}"
)
_SENTENCE_END = re.compile(r"[.!?]\s+[A-Z\d$(\\]|。.|\n")
_ARITHMETIC = re.compile(r"=|\d\s*[-+*/×÷]\s*\d")


@dataclass(frozen=True)
class Fields:
    """Names the fields of a record that make a problem.

    An empty name means the first usual one that the record has. A path such as
    `reward_model.ground_truth` or `prompt.0.content` leads to a field of a field, or to an
    entry of a list.

    question      one or more fields, joined with a space
    answer        the field that holds the gold answer
    solution      the field of the worked solution; without one, what stands before the marker
                  in the answer field
    id            without one, the name of the set and the number of the row, from 0
    answer_after  the marker that the gold answer follows: None means `####` where there is one,
                  "" the whole field, anything else must be there
    remove        a regular expression, deleted from solutions (`<<[^>]*>>` stands for GSM8K's
                  calculator notes)

    All other fields of the record become metadata.
    """

    question: tuple[str, ...] = ()
    answer: str = ""
    solution: str = ""
    id: str = ""
    answer_after: str | None = None
    remove: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.remove)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"remove={self.remove!r:.60} is not a regular expression: {error}"
            ) from None


def load_problems(
    source: str | Path,
    fields: Fields | None = None,
    *,
    split: str = "train",
    header: bool = True,
    skip: int = 0,
    limit: int = 0,
) -> list[Problem]:
    """Load the problems of a file, or of `split` of a hub dataset `org/name` or
    `org/name:config`.

    The first `skip` rows are left out and at most `limit` are read, 0 meaning all. `header`
    says whether the first line of a .tsv or .csv names its columns; without it they are
    called "0", "1", ... FileNotFoundError if there is no such file or dataset; ValueError,
    with the file and line, for a record that makes no Problem and for an id used twice;
    ModuleNotFoundError if parquet is to be read without pyarrow.
    """
    if skip < 0 or limit < 0:
        raise ValueError(f"skip and limit must be at least 0, got {skip} and {limit}")
    problems = []
    places = {}
    records = find_records(source, split, header)
    for row_id, place, record in islice(records, skip, skip + limit if limit else None):
        problem = _problem(record, place, row_id, fields or Fields())
        if problem.id in places:
            taken = f"the id {problem.id!r:.60} is taken by {places[problem.id]}"
            raise ValueError(f"{place}: {taken}; ids must differ")
        places[problem.id] = place
        problems.append(problem)
    if not problems:
        raise ValueError(
            f"{source}: no problems" + (f" after the first {skip}" if skip else "")
        )
    return problems


def within_pass_rates(
    problems: Sequence[Problem], path: str | Path, least: float, greatest: float
) -> list[Problem]:
    """Keep the problems whose share of right answers, by the eval.json at `path`, lies in a range.

    ValueError for a file that is none, a problem that it does not have or that asks something
    else there, and where none is left.
    """
    measured = read_measured(path)
    kept = []
    for problem in problems:
        found = measured.get(problem.id)
        if found is None or found["question"] != problem.question:
            what = "is not in it" if found is None else "asks something else in it"
            raise ValueError(
                f"{path}: it measures other problems: {problem.id!r:.60} {what}; measure these "
                "very problems with eval and out=DIRECTORY"
            )
        if least <= sum(found["right"]) / len(found["right"]) <= greatest:
            kept.append(problem)
    if not kept:
        raise ValueError(
            f"{path}: none of {len(problems)} problems has a pass rate from {least:g} to "
            f"{greatest:g}"
        )
    return kept


def read_measured(path: str | Path) -> dict[str, Any]:
    """Return the problems of an eval.json by id: question, cluster, and of each sample whether it
    is right and its tokens. ValueError for another file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file; eval with out=DIRECTORY writes it"
        )
    problems = read_json(Path(path)).get("problems")
    if not isinstance(problems, dict) or not all(map(_is_measured, problems.values())):
        raise ValueError(
            f"{path}: no eval.json, which eval writes with out=DIRECTORY: "
            "its problems have question, cluster, right and tokens"
        )
    return problems


def _is_measured(problem: Any) -> bool:
    return (
        isinstance(problem, dict)
        and isinstance(problem.get("question"), str)
        and isinstance(problem.get("cluster"), str)
        and isinstance(problem.get("right"), list)
        and isinstance(problem.get("tokens"), list)
        and len(problem["right"]) == len(problem["tokens"]) > 0
        and all(n in (0, 1) for n in problem["right"])
        and all(type(n) is int and 0 <= n < 2**31 for n in problem["tokens"])
    )


def find_records(
    source: str | Path, split: str, header: bool = True
) -> Iterator[tuple[str, str, Any]]:
    """Yield (id, place, record) of every row of a file, or of a split of a hub dataset; the
    id is the name of the set and the number of the row. Errors are those of `load_problems`.
    """
    name, paths = _find(source, split)
    records = (record for path in paths for record in read_records(path, header))
    for row, (place, record) in enumerate(records):
        yield f"{name}-{row}", place, record


def _find(source: str | Path, split: str) -> tuple[str, list[Path]]:
    """Return the name of a set, from which its ids are made, and its files."""
    if (path := Path(source)).is_file():
        return path.name.partition(".")[0], [path]
    match = re.fullmatch(r"([\w-][\w.-]*/([\w.-]+))(?::([\w.-]+))?", str(source))
    if not match or re.search(f"{_SUFFIX}$", str(source)):
        raise FileNotFoundError(
            f"problem set not found: {source} (expected a file, or org/name of a hub dataset)"
        )
    repository, name, config = match.groups(default="")
    return f"{name}-{split}", _hub_files(repository, config, split)


def _hub_files(repository: str, config: str, split: str) -> list[Path]:
    """Return the files of one split of a hub dataset, downloaded or from the cache."""
    patterns = [f"{config}/{split}*"] if config else [f"{split}*", f"*/{split}*"]
    root = from_hub(repository, "dataset", patterns)
    file_name = re.compile(rf"{re.escape(split)}(-\d+-of-\d+[^.]*)?{_SUFFIX}")
    paths = sorted(
        path
        for path in (root / config).rglob(f"{split}*")
        if file_name.fullmatch(path.name)
    )
    if not paths:
        config = f" of the config {config!r}" if config else ""
        raise FileNotFoundError(
            f"{repository}: no file of the split {split!r}{config} in the hub dataset"
        )
    folders = sorted({str(path.parent.relative_to(root)) for path in paths})
    if len(folders) > 1:
        choice = f"choose one, as {repository}:{folders[0]}, of {', '.join(folders)}"
        raise ValueError(f"{repository}: several configs; {choice}")
    return paths


# --- records to problems ---------------------------------------------------------------------


def _problem(record: Any, place: str, row_id: str, fields: Fields) -> Problem:
    """Return the problem that a record states. ValueError, with the place, when it states
    none.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: expected an object with named fields, got {type(record).__name__}"
        )
    question = _names(record, place, "question", fields.question)
    (answer,) = _names(record, place, "answer", (fields.answer,))
    solution = _names(record, place, "solution", (fields.solution,))
    identity = _names(record, place, "id", (fields.id,))
    text = {
        name: _text(_value(record, name), place, name, several=name == answer)
        for name in (*question, answer, *solution, *identity)
    }

    worked, gold = _split_answer(text[answer], place, fields.answer_after)
    worked = "".join(text[name] for name in solution) or worked
    asked = " ".join(filter(None, (text[name] for name in question)))
    if not asked or not gold:
        raise ValueError(f"{place}: the {'answer' if asked else 'question'} is empty")
    if _cannot_be_matched(gold):
        raise ValueError(
            f"{place}: field {answer!r} is a worked solution without a marked answer "
            "(\\boxed{}, ####, ...): name the field of the final answer, or in answer_after what "
            "stands before it"
        )
    return Problem(
        id="".join(text[name] for name in identity) or row_id,
        question=asked,
        answer=gold,
        solution=re.sub(fields.remove, "", worked).strip() or None,
        metadata={
            name: None if value != value else value  # NaN, which is no JSON
            for name, value in record.items()
            if name not in text
        },
    )


def _names(
    record: dict[str, Any], place: str, role: str, given: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names of the fields for a role: those given, all of which must be there,
    or usual ones.

    The usual name is the first that the record has. Names that differ from a usual one in
    capitals count where the record has none as it is usually written; then Body + Question
    goes before question alone.
    """
    given = tuple(filter(None, given))
    expected = [given] if given else USUAL_NAMES[role]
    for names in expected if given else (*expected, *_in_any_case(record, expected)):
        if all(_value(record, name) is not ABSENT for name in names):
            return names
    if not given and role not in REQUIRED:
        return ()
    shown = [" + ".join(names) for names in expected if given or not names[0].isdigit()]
    present = ", ".join(map(_shown, record)) or "none"
    raise ValueError(
        f"{place}: no {role} field (expected {', '.join(shown)}); the fields are: {present:.300}"
    )


def _in_any_case(
    record: dict[str, Any], usual: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """Return the usual names as the record writes them, in small letters or capitals."""
    written = {name.lower(): name for name in record}
    options = [
        tuple(written.get(name.lower(), name) for name in names) for names in usual
    ]
    return sorted(options, key=len, reverse=True)


def _shown(name: str) -> str:
    """Return the name of a field on one line, cut if it is a text."""
    return " ".join(name.split())[:60]


def _value(record: dict[str, Any], name: str) -> Any:
    """Return the field of that name, or what a path of names and numbers leads to, or
    ABSENT.
    """
    value: Any = record
    for part in [name] if name in record else name.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return ABSENT
    return value


def _text(value: Any, place: str, name: str, several: bool = False) -> str:
    """Return a field as text.

    Whole numbers lose their `.0`, as 51.0 in SVAMP. A list gives its only entry, or with
    `several` all entries with commas between.
    """
    if value is None or value != value:  # NaN is how tables say that there is nothing
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and math.isfinite(value):
        written = getattr(value, "written", repr(value))
        exact = Decimal(written)
        return str(int(exact)) if exact == int(exact) else written
    if type(value) is int:
        return str(value)
    if isinstance(value, list) and (several or len(value) < 2):
        return ", ".join(filter(None, (_text(entry, place, name) for entry in value)))
    hint = ""
    if isinstance(value, dict | list) and value:
        inside = next(iter(value)) if isinstance(value, dict) else 0
        hint = f"; what is in it has a name such as {_shown(f'{name}.{inside}')}"
    raise ValueError(
        f"{place}: field {name!r:.60}: expected text or a finite number, got {value!r:.60}{hint}"
    )


def _cannot_be_matched(gold: str) -> bool:
    """Return whether an answer is a worked solution (many words with sentences or
    arithmetic) that marks no final answer.
    """
    words = len(_WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", gold)))
    if words < 8 or _MARKED.search(gold):
        return False
    sentences = _SENTENCE_END.search(gold)
    arithmetic = _ARITHMETIC.search(gold)
    return bool(sentences and arithmetic) or (
        words >= 20 and bool(sentences or re.search(r"\d", gold))
    )


def _split_answer(text: str, place: str, marker: str | None) -> tuple[str, str]:
    """Split an answer field at its last marker into worked solution and gold answer."""
    if marker == "":
        return "", text
    worked, found, gold = text.rpartition(marker or "####")
    if marker and not found:
        raise ValueError(f"{place}: no {marker!r} in the answer field")
    return worked.strip(), gold.strip()


# --- files to records ------------------------------------------------------------------------


def read_records(path: Path, header: bool = True) -> Iterator[Record]:
    """Return (place, record) of every row of a file, one after the other."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(path)
    if not name.endswith((".jsonl", ".json", ".csv", ".tsv")):
        expected = ".jsonl, .json, .csv, .tsv (each also .gz) or .parquet"
        raise ValueError(f"{path}: unknown format; expected {expected}")
    text = read_text(path).removeprefix("\ufeff")
    if name.endswith((".csv", ".tsv")):
        return _table(text, path, name.endswith(".tsv"), header)
    # lines of JSON may be found in a .json as well: an object on one line, and another on the next
    if name.endswith(".jsonl") or re.match(r"\s*\{.*\}[^\S\n]*\n\s*\{", text):
        return _jsonl(text, path)
    return _json(text, path)


class _Number(float):
    """A number with a point or an exponent, which remembers how it was written."""

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = str(written)
        return number


def _jsonl(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield (
                f"{path}:{number}",
                parse_json(line, path, number, parse_float=_Number),
            )


def _json(text: str, path: Path) -> Iterator[Record]:
    """Return the rows of a list, of the list `examples` of an object, or of its only list."""
    content = parse_json(text, path, parse_float=_Number)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = content.get("examples", lists[0] if len(lists) == 1 else None)
    if not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of records, "
            "or an object with one list or a list called examples"
        )
    return ((f"{path}: row {row}", record) for row, record in enumerate(content))


def _table(text: str, path: Path, tabs: bool, header: bool) -> Iterator[Record]:
    """Yield the rows of a .csv, or of a .tsv, in which a quote is a character like any
    other.
    """
    csv.field_size_limit(2**31 - 1)  # of all readers: there is no limit of one
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    names: list[str] = []
    try:
        for cells in reader:
            if len(cells) < 2 and not "".join(cells).strip():
                continue
            if header and not names:
                names = [name.strip() for name in cells]
                unique((name, None) for name in names if name)
                continue
            columns = names or [str(column) for column in range(len(cells))]
            if len(cells) != len(columns):
                raise ValueError(f"expected {len(columns)} columns, got {len(cells)}")
            yield f"{path}:{reader.line_num}", dict(zip(columns, cells, strict=True))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow"
        ) from None
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        records: Iterable[dict[str, Any]] = (
            record for batch in batches for record in batch.to_pylist()
        )
        for row, record in enumerate(records):
            yield f"{path}: row {row}", record
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None

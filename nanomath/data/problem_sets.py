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
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from nanomath.data.problem import Problem

Record = tuple[str, Any]  # where it stands, for errors, and what stands there

QUESTION = (
    ("question",),
    ("problem",),
    ("prompt",),
    ("Body", "Question"),
    ("Question",),
    ("input",),
    ("0",),
)
ANSWER = (("answer",), ("Answer",), ("target",), ("1",))
SOLUTION = (("solution",),)
ID = (("id",), ("ID",), ("unique_id",))
ABSENT = object()
DEEPEST = 100  # lists and objects in one another

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_MARKED = re.compile(
    r"\\(boxed|fbox)|####|\banswers?\b[^.\n]*?(\bis\b|\bare\b|\bequals\b|[:=])|答え?[はがを:： \n]|解答|正解",
    re.IGNORECASE,
)
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]{2}|[^\W\d_\u3040-\u30ff\u4e00-\u9fff]{2,}")
_SENTENCE_END = re.compile(r"[.!?]\s+[A-Z\d$(\\]|。.|\n")
_ARITHMETIC = re.compile(r"=|\d\s*[-+*/×÷]\s*\d")


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are what. An empty name means the first usual one that the
    record has; a path such as `reward_model.ground_truth` or `prompt.0.content` leads to a
    field of a field, or to an entry of a list.

    question      one or more fields, joined with a space
    answer        the field that holds the gold answer
    solution      the field of the worked solution; without one, what stands before the marker in the answer field
    id            without one, the name of the set and the number of the row, from 0
    answer_after  the marker that the gold answer follows: None means `####` where there is one, "" the whole field,
                  anything else must be there
    remove        a regular expression, deleted from solutions (GSM8K's calculator notes: `<<[^>]*>>`)

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
    """The problems of a file, or of `split` of a hub dataset `org/name` or `org/name:config`.

    The first `skip` rows are left out and at most `limit` read, 0 meaning all. `header` says
    whether the first line of a .tsv or .csv names its columns; without it they are called "0",
    "1", ... FileNotFoundError if there is no such file or dataset; ValueError, with the file
    and line, for a record that makes no Problem and for an id used twice; ModuleNotFoundError
    if parquet is to be read without pyarrow.
    """
    if skip < 0 or limit < 0:
        raise ValueError(f"skip and limit must be at least 0, got {skip} and {limit}")
    name, paths = _find(source, split)
    problems = []
    places = {}
    records = enumerate(record for path in paths for record in read_records(path, header))
    for row, (place, record) in islice(records, skip, skip + limit if limit else None):
        problem = _problem(record, place, f"{name}-{row}", fields or Fields())
        if problem.id in places:
            raise ValueError(
                f"{place}: the id {problem.id!r:.60} is taken by {places[problem.id]}; ids must differ"
            )
        places[problem.id] = place
        problems.append(problem)
    if not problems:
        raise ValueError(
            f"{source}: no problems" + (f" after the first {skip}" if skip else "")
        )
    return problems


def _find(source: str | Path, split: str) -> tuple[str, list[Path]]:
    """The name of a set, from which its ids are made, and its files."""
    if (path := Path(source)).is_file():
        return path.name.partition(".")[0], [path]
    match = re.fullmatch(r"([\w-][\w.-]*)/([\w.-]+)(?::([\w.-]+))?", str(source))
    if not match or re.search(r"\.(jsonl?|csv|tsv|parquet)(\.gz)?$", str(source)):
        raise FileNotFoundError(
            f"problem set not found: {source} (expected a file, or org/name of a hub dataset)"
        )
    organisation, name, config = match.groups(default="")
    return f"{name}-{split}", _download(f"{organisation}/{name}", config, split)


def _download(name: str, config: str, split: str) -> list[Path]:
    """The files of one split of a hub dataset, downloaded or from the cache; HF_HUB_OFFLINE=1
    asks the cache only.
    """
    from huggingface_hub import snapshot_download  # slow to import, and most sets are files

    patterns = [f"{config}/{split}*"] if config else [f"{split}*", f"*/{split}*"]
    try:
        root = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"problem set not found: {name} is no file, and from the hub: {reason}"
        ) from None
    file_name = re.compile(
        rf"{re.escape(split)}(-\d+-of-\d+[^.]*)?\.(jsonl|json|csv|tsv|parquet)(\.gz)?"
    )
    paths = sorted(
        path for path in (root / config).rglob(f"{split}*") if file_name.fullmatch(path.name)
    )
    folders = sorted({str(path.parent.relative_to(root)) for path in paths})
    if not paths:
        config = f" of the config {config!r}" if config else ""
        raise FileNotFoundError(
            f"{name}: no file of the split {split!r}{config} in the hub dataset"
        )
    if len(folders) > 1:
        raise ValueError(
            f"{name}: several configs; choose one, as {name}:{folders[0]}, of {', '.join(folders)}"
        )
    return paths


# --- records to problems ---------------------------------------------------------------------


def _problem(record: Any, place: str, row_id: str, fields: Fields) -> Problem:
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: expected an object with named fields, got {type(record).__name__}"
        )
    question = _names(record, place, "question", fields.question, QUESTION)
    (answer,) = _names(record, place, "answer", (fields.answer,), ANSWER)
    solution = _names(record, place, "solution", (fields.solution,), SOLUTION, required=False)
    identity = _names(record, place, "id", (fields.id,), ID, required=False)
    named = (*question, answer, *solution, *identity)
    text = {
        name: _text(_value(record, name), place, name, several=name == answer)
        for name in named
    }

    worked, gold = _split_answer(text[answer], place, fields.answer_after)
    worked = re.sub(
        fields.remove, "", " ".join(text[name] for name in solution) or worked
    ).strip()
    asked = " ".join(filter(None, (text[name] for name in question)))
    if not asked or not gold:
        raise ValueError(f"{place}: the {'answer' if asked else 'question'} is empty")
    if _cannot_be_matched(gold):
        raise ValueError(
            f"{place}: field {answer!r} is a worked solution without a marked answer (\\boxed{{}}, ####, ...): "
            "name the field of the final answer, or in answer_after what stands before it"
        )
    identifier = "".join(text[name] for name in identity) or row_id
    metadata = {
        name: None if value != value else value
        for name, value in record.items()
        if name not in text
    }
    return Problem(
        id=identifier, question=asked, answer=gold, solution=worked or None, metadata=metadata
    )


def _names(
    record: dict[str, Any],
    place: str,
    role: str,
    given: tuple[str, ...],
    usual: tuple[tuple[str, ...], ...],
    required: bool = True,
) -> tuple[str, ...]:
    """The fields that play a role: those given, all of which must be there, or the first usual
    ones that are, in any case where none is written as usual.
    """
    if given := tuple(filter(None, given)):
        found = given if all(_value(record, name) is not ABSENT for name in given) else None
    else:
        found = _first(record, usual) or _first_in_any_case(record, usual)
    if found:
        return found
    if not given and not required:
        return ()
    expected = " + ".join(given) or ", ".join(
        " + ".join(names) for names in usual if not names[0].isdigit()
    )
    present = ", ".join(map(_shown, record)) or "none"
    raise ValueError(
        f"{place}: no {role} field (expected {expected}); the fields are: {present:.300}"
    )


def _first(
    record: dict[str, Any], options: Iterable[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The first of which the record has all names."""
    return next((names for names in options if all(name in record for name in names)), None)


def _first_in_any_case(
    record: dict[str, Any], usual: Iterable[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """The same, in capitals or not; of Body + Question and question the one of more names."""
    written = {name.lower(): name for name in record}
    options = [tuple(written.get(name.lower(), name) for name in names) for names in usual]
    return _first(record, sorted(options, key=len, reverse=True))


def _shown(name: str) -> str:
    """The name of a field on one line, cut if it is a text."""
    return " ".join(name.split())[:60]


def _value(record: dict[str, Any], name: str) -> Any:
    """The field of that name, or what a path of names and numbers leads to, or ABSENT."""
    value: Any = record
    for part in [name] if name in record else name.split("."):
        try:
            value = value[int(part) if isinstance(value, list) else part]
        except (KeyError, IndexError, TypeError, ValueError):
            return ABSENT
    return value


def _text(value: Any, place: str, name: str, several: bool = False) -> str:
    """A field as text. Whole numbers lose their `.0`, as 51.0 in SVAMP; a list is what its
    only entry is, or `several` with commas between them.
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
    inside = (
        next(iter(value), "")
        if isinstance(value, dict)
        else 0
        if isinstance(value, list)
        else None
    )
    hint = (
        ""
        if inside is None
        else f"; what is in it has a name such as {_shown(f'{name}.{inside}')}"
    )
    raise ValueError(
        f"{place}: field {name!r:.60}: expected text or a finite number, got {value!r:.60}{hint}"
    )


def _cannot_be_matched(gold: str) -> bool:
    """Whether an answer is a worked solution, many words with sentences or arithmetic, that
    marks no final answer.
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
    """(worked solution, gold answer) of an answer field, at the last marker."""
    if marker == "":
        return "", text
    worked, found, gold = text.rpartition(marker or "####")
    if marker and not found:
        raise ValueError(f"{place}: no {marker!r} in the answer field")
    return worked.strip(), gold.strip()


# --- files to records ------------------------------------------------------------------------


def read_records(path: Path, header: bool = True) -> Iterator[Record]:
    """(where it stands, record) of every row of a file."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _jsonl(path)
    if name.endswith(".json"):
        return _json(path)
    if name.endswith((".csv", ".tsv")):
        return _table(path, "\t" if name.endswith(".tsv") else ",", header)
    if name.endswith(".parquet"):
        return _parquet(path)
    raise ValueError(
        f"{path}: unknown format; expected .jsonl, .json, .csv, .tsv (each also .gz) or .parquet"
    )


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None


class _Number(float):
    """A number with a point or an exponent, which remembers how it was written."""

    def __new__(cls, written: str) -> _Number:
        number = super().__new__(cls, written)
        number.written = str(written)
        return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """ValueError where one of two fields of the same name would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(
            f"the field {_repeated([name for name, _ in pairs])!r:.60} is there twice"
        )
    return found


def _repeated(names: Sequence[str]) -> str | None:
    """The first name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _parse(text: str, path: Path, line: int = 0) -> Any:
    """What a JSON text says, of a whole file or of one line of it."""
    try:
        return json.loads(text, parse_float=_Number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if (
            not line and error.msg == "Extra data" and text.lstrip().startswith("{")
        ):  # lines of JSON after all
            return [record for _, record in _jsonl(path)]
        raise ValueError(
            f"{path}:{line or error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        place = f"{path}:{line}" if line else path
        reason = (
            "JSON that is nested too deeply" if isinstance(error, RecursionError) else error
        )
        raise ValueError(f"{place}: {reason}") from None


def _checked(record: Any, place: str) -> Any:
    """The record itself. ValueError, with the field, for half a surrogate pair, which JSON can
    write and no text can be made of, and for more levels than any of its readers would go
    down.
    """
    for name, field in record.items() if isinstance(record, dict) else [("", record)]:
        left = [(0, name), (0, field)]
        while left:
            depth, value = left.pop()
            if isinstance(value, str) and _HALF_PAIR.search(value):
                raise ValueError(
                    f"{place}: field {name!r:.60}: half a surrogate pair, which is no character: {value!r:.60}"
                )
            if isinstance(value, dict | list):
                left += [(depth + 1, entry) for entry in value]
            if isinstance(value, dict):
                left += [(depth + 1, entry) for entry in value.values()]
            if depth > DEEPEST:
                raise ValueError(
                    f"{place}: field {name!r:.60}: lists or objects in one another, more than {DEEPEST}"
                )
    return record


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            record = _parse(line, path, number)
            suspect = "\\ud" in line.lower() or line.count("[") + line.count("{") > DEEPEST
            yield place, _checked(record, place) if suspect else record


def _json(path: Path) -> Iterator[Record]:
    """The rows of a list, of the list `examples` of an object, or of its only list."""
    content = _parse(_decode(path), path)
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = content.get("examples", lists[0] if len(lists) == 1 else None)
    if not isinstance(content, list):
        raise ValueError(
            f"{path}: expected a list of records, or an object with one list or a list called examples"
        )
    return (
        (place := f"{path}: row {row}", _checked(record, place))
        for row, record in enumerate(content)
    )


def _table(path: Path, delimiter: str, header: bool) -> Iterator[Record]:
    """Rows of a .csv, where quotes may enclose a cell, or of a .tsv, where a quote is a
    character as any other.
    """
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(2**31 - 1)  # of all readers: there is no limit of one
    reader = csv.reader(
        io.StringIO(_decode(path), newline=""),
        delimiter=delimiter,
        quoting=quoting,
        strict=True,
    )
    try:
        rows = (
            (reader.line_num, cells)
            for cells in reader
            if len(cells) > 1 or "".join(cells).strip()
        )
        line, names = next(rows, (0, [])) if header else (0, None)
        names = names and [name.strip() for name in names]
        if (name := _repeated(list(filter(None, names or ())))) is not None:
            raise ValueError(f"{path}:{line}: two columns are called {name!r:.60}")
        for line, cells in rows:
            columns = names or [str(column) for column in range(len(cells))]
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}:{line}: expected {len(columns)} columns, got {len(cells)}"
                )
            yield f"{path}:{line}", dict(zip(columns, cells, strict=True))
    except csv.Error as error:
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

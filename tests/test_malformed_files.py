"""Whatever stands in a file of problems, of labelled steps or of a config: it is read as what
it says, or one line says which file cannot be read and why. Any other end of a loader is a
fault of its own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomath import settings as sections
from nanomath.config import load, to_toml
from nanomath.data.problem_sets import Fields, load_problems
from nanomath.process.labelled import load_labelled

T = TypeVar("T")
quickly = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

SPECIAL = [
    "",
    " ",
    "1",
    "####",
    "#### 2",
    "\ud800",
    "\udc00x",
    "\0",
    "a\nb",
    "\r",
    "\u2028",
    '"',
    ",",
    "\t",
    "\ufeff",
]
SPECIAL += [
    "nan",
    "inf",
    "+",
    "-",
    "true",
    "ки",
    "Step 1:",
    "q Step 1: a ки",
    "q Step 1: a +",
    "{question}",
    "\\boxed{1}",
]
SPECIAL += ["He has 3 pens and 2 more. 3 + 2 = 5. That makes five of them in all."]
texts = st.sampled_from(SPECIAL) | st.text(max_size=6)
numbers = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1.0, 1e300, 10**30, -0.0, float("nan"), float("inf"), 5e-324]
)
scalars = st.none() | st.booleans() | numbers | texts
NAMES = [
    "question",
    "answer",
    "solution",
    "id",
    "Problem",
    "ANSWER",
    "prompt",
    "completions",
    "labels",
    "label",
    "input",
]
NAMES += [
    "problem",
    "steps",
    "text",
    "rating",
    "chosen_completion",
    "human_completion",
    "content",
    "role",
    "a\nb",
    "0",
    "",
]
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=3)
    ),
    max_leaves=8,
)


def changed(row: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The row with some of its fields, at any depth, replaced, left out, or joined by others."""
    kept = {name: st.just(value) | below(value) | values for name, value in row.items()}
    return st.fixed_dictionaries({}, optional=kept) | st.fixed_dictionaries(
        kept, optional={"more": values}
    )


def below(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, dict):
        return changed(value)
    if isinstance(value, list) and value:
        return st.lists(st.sampled_from(value) | below(value[0]) | values, max_size=4)
    return scalars


def broken(text: str) -> st.SearchStrategy[bytes]:
    """The text with some of its bytes cut out, and others put in their place."""
    data = text.encode(errors="surrogatepass")
    pieces = [
        b"",
        b"\xff",
        b"\0",
        b"\n",
        b"\r\n",
        b'"',
        b"{",
        b"]",
        b",",
        b"\t",
        b"\xef\xbb\xbf",
        b"NaN",
        b"1" * 5000,
    ]
    pieces += [b"\\ud800", b"[" * 3000, b"'''", b"= ="]
    places = st.integers(0, len(data))
    cut = st.tuples(
        places,
        st.integers(0, 4) | places,
        st.sampled_from(pieces) | st.binary(max_size=4),
    )
    return cut.map(lambda c: data[: c[0]] + c[2] + data[c[0] + c[1] :]) | st.just(data)


def result(read: Callable[[], T], name: str) -> T | None:
    """What is read; None where one line that names the file, or the command line, says why it
    is not.
    """
    try:
        return read()
    except ValueError as error:
        assert type(error) is ValueError
        message = str(error)
        assert (
            name in message and len(message.splitlines()) == 1 and len(message) < 1000
        )
        message.encode()  # it can be printed
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


# --- problems --------------------------------------------------------------------------------

PROBLEM = {
    "question": "q",
    "answer": "1",
    "solution": "s",
    "id": "i",
    "prompt": [{"role": "user", "content": "q"}],
}
ASKED = [
    Fields(),
    Fields(answer_after=""),
    Fields(remove="s*"),
    Fields(("prompt.0.content",), "answer", id="more.0"),
]
ASKED += [Fields(("question", "id"), "more.text"), Fields(("0",), "1", "2")]
rows = st.lists(changed(PROBLEM) | values, min_size=1, max_size=3)


def table(rows: list[list[str]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, escapechar="\\").writerows(rows)
    return text.getvalue()


def contents(suffix: str) -> st.SearchStrategy[bytes]:
    """Files of that format, whole and broken."""
    if suffix == ".jsonl":
        written = rows.map(lambda rows: "\n".join(map(json.dumps, rows)))
    elif suffix == ".json":
        written = (rows | values | st.dictionaries(texts, rows, max_size=2)).map(
            json.dumps
        )
    else:
        cells = st.lists(st.sampled_from(NAMES) | texts, min_size=1, max_size=4)
        lists = st.lists(cells, max_size=3).map(
            lambda cells: [["question", "answer"], *cells]
        )
        written = (lists | st.lists(cells, max_size=4)).map(
            lambda rows: table(rows, "\t" if suffix == ".tsv" else ",")
        )
    return written.flatmap(broken) | st.binary(max_size=20)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@quickly
@given(data=st.data(), fields=st.sampled_from(ASKED), header=st.booleans())
def test_problem_files(
    folder: Path, suffix: str, data: st.DataObject, fields: Fields, header: bool
) -> None:
    path = folder / f"set{suffix}"
    path.write_bytes(data.draw(contents(suffix)))
    problems = result(lambda: load_problems(path, fields, header=header), path.name)
    for problem in problems or ():
        for text in (problem.question, problem.answer):
            assert text.strip() == text != ""
        assert problem.solution is None or problem.solution.strip()
        record = [
            problem.id,
            problem.question,
            problem.answer,
            problem.solution,
            problem.metadata,
        ]
        # It can be written, and goes into a tokenizer
        json.dumps(record, ensure_ascii=False).encode()
    assert len({problem.id for problem in problems or ()}) == len(problems or ())


# --- labelled steps --------------------------------------------------------------------------

STAGE = {
    "completions": [{"text": "a", "rating": 1}],
    "chosen_completion": 0,
    "human_completion": {"text": "b"},
}
SOLUTIONS = [
    {"prompt": "q", "completions": ["a", "b"], "labels": [True, 0.5]},
    {"input": "q Step 1: a ки\nStep 2: b ки", "label": "q Step 1: a +\nStep 2: b -"},
    {"question": {"problem": "q"}, "label": {"steps": [STAGE, STAGE]}},
    {"problem": "q", "steps": ["a", "b"], "label": 1},
]
solutions = st.sampled_from(SOLUTIONS).flatmap(changed)


@quickly
@given(rows=st.lists(solutions | values, min_size=1, max_size=3), data=st.data())
def test_label_files(folder: Path, rows: list[Any], data: st.DataObject) -> None:
    path = folder / "labels.jsonl"
    path.write_bytes(data.draw(broken("\n".join(map(json.dumps, rows)))))
    for s in result(lambda: load_labelled(path), path.name) or ():
        assert (
            s.question.strip()
            and all(step.strip() for step in s.steps)
            and len(s.steps) == len(s.labels) > 0
        )
        assert {type(label) for label in s.labels} <= {
            float,
            type(None),
        } and s.labels != (None,) * len(s.labels)
        assert all(label is None or 0 <= label <= 1 for label in s.labels)
        json.dumps([s.question, *s.steps], ensure_ascii=False).encode()


# --- configs ---------------------------------------------------------------------------------

KEYS = [
    "run.name",
    "run.seed",
    "run.steps",
    "optim.lr",
    "train.limit",
    "train.world.difficulty",
    "train.file.answer_after",
    "prompt",
]
KEYS += [
    "sampling.stop",
    "prompt.few_shot",
    "reward.weights",
    "reward.weights.format",
    "reward.params",
    "run",
    "optm.lr",
]
KEYS += [
    "reward.params.cosine",
    "algorithm.method",
    "algorithm.PRESET",
    "run.name.x",
    "",
    ".",
    "a b",
    "run.",
    "__class__",
]
WRITTEN = [
    "1",
    "-1",
    "0.5",
    "nan",
    "-inf",
    "1e400",
    "true",
    '"x"',
    '""',
    "none",
    '"none"',
    "[]",
    "[1, 2]",
    '["a"]',
    "[[1]]",
]
WRITTEN += [
    "{}",
    "{accuracy = 1}",
    "{a = {b = 1.5}}",
    "{x = 'y'}",
    "[{question = '?'}]",
    "1979-05-27",
    "07:32:00",
    "0x1F",
]
WRITTEN += [
    "9" * 30,
    "9" * 5000,
    "1_000",
    '"dapo"',
    "[" * 3000,
    "{a=" * 500,
    "'''a\nb'''",
    '"\\ud800"',
    "1 2",
    "=",
    "#",
]
keys = st.sampled_from(KEYS) | st.sampled_from(KEYS) | texts
written = st.sampled_from(WRITTEN) | texts
lines = (
    st.tuples(keys, written).map(" = ".join)
    | keys.map("[{}]".format)
    | keys.map("[[{}]]".format)
    | texts
)
CONFIGS = [sections.SFTConfig, sections.GRPOConfig]


@quickly
@given(lines=st.lists(lines, max_size=4), data=st.data(), kind=st.sampled_from(CONFIGS))
def test_config_files(
    folder: Path, lines: list[str], data: st.DataObject, kind: type
) -> None:
    path = folder / "run.toml"
    path.write_bytes(data.draw(broken("\n".join(lines))))
    check_config(folder, kind, path, [], path.name)


@quickly
@given(
    words=st.lists(st.tuples(keys, written).map("=".join) | texts, max_size=3),
    kind=st.sampled_from(CONFIGS),
)
def test_words_of_the_command_line(folder: Path, words: list[str], kind: type) -> None:
    check_config(folder, kind, None, words, "command line")


def check_config(
    folder: Path, kind: type, path: Path | None, words: list[str], name: str
) -> None:
    """What is read comes back from what is written of it."""
    config = result(lambda: load(kind, path, words), name)
    if config is not None:
        again = folder / "again.toml"
        again.write_text(to_toml(config), encoding="utf-8", newline="\n")
        assert load(kind, again) == config

"""Problem sets: every format, the public sets, the hub's cache, and every error message."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.data.problem import Problem
from nanomath.data.problem_sets import Fields, load_problems

ROW = {"question": "2 + 3?", "answer": "5"}
SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the folder of public data sets is not here"
)


def write(folder: Path, name: str, *lines: object) -> Path:
    """A file of these lines, those that are no text as JSON."""
    path = folder / name
    text = "".join(
        (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines
    )
    path.write_bytes(
        gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    )
    return path


def error_of(path: Path | str, fields: Fields | None = None, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_problems(path, fields, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), Path(path).name)


# --- formats ---------------------------------------------------------------------------------

ROWS = [
    {"question": "2 + 3?", "answer": "5", "level": "1"},
    {"question": 'a, "b"?', "answer": "c", "level": "2"},
]
CONTENTS = {
    "set.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "set.json": json.dumps(ROWS, indent=4),
    "set.csv": 'question,answer,level\n2 + 3?,5,1\n"a, ""b""?",c,2\n',
    "set.tsv": 'question\tanswer\tlevel\n2 + 3?\t5\t1\na, "b"?\tc\t2\n',
}
EXPECTED = [
    Problem("set-0", "2 + 3?", "5", None, {"level": "1"}),
    Problem("set-1", 'a, "b"?', "c", None, {"level": "2"}),
]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n\n"], ids=["", "blank last lines"])
def test_formats(
    tmp_path: Path, name: str, suffix: str, start: str, newline: str, end: str
) -> None:
    data = (start + CONTENTS[name] + end).replace("\n", newline).encode()
    path = tmp_path / (name + suffix)
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert load_problems(path) == load_problems(str(path)) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "set.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [{"question": "2 + 3?", "answer": 5.0, "tags": ["a"]}]
        ),
        path,
    )
    assert load_problems(path) == [
        Problem("set-0", "2 + 3?", "5", None, {"tags": ["a"]})
    ]
    assert error_of(path, Fields(answer="gold")).startswith(
        "set.parquet: row 0: no answer field (expected gold)"
    )
    path.write_bytes(b"PAR1 and nothing else")
    assert error_of(path).startswith("set.parquet: not a parquet file: ")


def test_parquet_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(
        ModuleNotFoundError,
        match=r"set\.parquet: reading parquet needs pyarrow: pip install pyarrow",
    ):
        load_problems(write(tmp_path, "set.parquet"))


@pytest.mark.parametrize(
    "content",
    [
        {"canary": "x", "examples": [ROW], "more": [1]},
        {"version": 1, "data": [ROW]},
        [ROW],
    ],
)
def test_shapes_of_json(tmp_path: Path, content: object) -> None:
    assert load_problems(write(tmp_path, "set.json", content)) == [
        Problem("set-0", "2 + 3?", "5")
    ]


def test_a_table_without_a_header_has_numbered_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "set.tsv", "2 + 3?\t5\teasy", "6?\t6\thard")
    assert load_problems(path, header=False) == [
        Problem("set-0", "2 + 3?", "5", None, {"2": "easy"}),
        Problem("set-1", "6?", "6", None, {"2": "hard"}),
    ]
    assert load_problems(path, Fields(answer="2"), header=False)[0].answer == "easy"


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(
        st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text),
        min_size=1,
        max_size=4,
    )
)
def test_texts_survive_jsonl_and_csv(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    expected = [(f"set-{row}", text.strip()) for row, text in enumerate(texts)]
    rows = "".join(
        json.dumps({"question": text, "answer": "1"}, ensure_ascii=False) + "\n"
        for text in texts
    )
    (folder / "set.jsonl").write_bytes(rows.encode())
    table = io.StringIO(newline="")
    csv.writer(table, quoting=csv.QUOTE_ALL).writerows(
        [["question", "answer"], *([text, "1"] for text in texts)]
    )
    (folder / "set.csv").write_bytes(table.getvalue().encode())
    for name in ("set.jsonl", "set.csv"):
        assert [
            (problem.id, problem.question) for problem in load_problems(folder / name)
        ] == expected


# --- fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"problem": "q", "answer": "1", "solution": "s", "unique_id": "u"},
            Problem("u", "q", "1", "s"),
        ),
        ({"prompt": "q", "answer": "1", "id": 7}, Problem("7", "q", "1")),
        (
            {"Body": "b.", "Question": "q", "Answer": 51.0, "ID": "c"},
            Problem("c", "b. q", "51"),
        ),
        ({"Question": "q", "Answer": 0.5}, Problem("set-0", "q", "0.5")),
        ({"input": "q", "target": "t"}, Problem("set-0", "q", "t")),
        (
            {"question": " q ", "answer": " 1 ", "n": None},
            Problem("set-0", "q", "1", None, {"n": None}),
        ),
        (
            {"question": "q", "answer": -3, "solution": None},
            Problem("set-0", "q", "-3"),
        ),
        (
            {"question": "q", "answer": "1", "solution": "", "id": ""},
            Problem("set-0", "q", "1"),
        ),
        (
            {"question": "q", "problem": "p", "answer": "1"},
            Problem("set-0", "q", "1", None, {"problem": "p"}),
        ),
        ({"question": "q", "answer": "so\n#### 4\n"}, Problem("set-0", "q", "4", "so")),
        (
            {"question": "q", "answer": "a #### b #### 4"},
            Problem("set-0", "q", "4", "a #### b"),
        ),
        (
            {"question": "q", "answer": "so #### 4", "solution": "s"},
            Problem("set-0", "q", "4", "s"),
        ),
    ],
)
def test_usual_names_need_no_mapping(
    tmp_path: Path, row: dict, expected: Problem
) -> None:
    assert load_problems(write(tmp_path, "set.jsonl", row)) == [expected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"Problem": "q", "Answer": "1", "Solution": "s", "Id": "u"},
            Problem("u", "q", "1", "s"),
        ),
        ({"QUESTION": "q", "ANSWER": "1"}, Problem("set-0", "q", "1")),
        ({"BODY": "b.", "QUESTION": "q", "Target": "1"}, Problem("set-0", "b. q", "1")),
        (
            {"Question": "no", "question": "q", "Answer": "0", "answer": "1"},
            {"Question": "no", "Answer": "0"},
        ),
        ({"Question": "no", "problem": "q", "answer": "1"}, {"Question": "no"}),
    ],
)
def test_usual_names_in_capitals(
    tmp_path: Path, row: dict, expected: Problem | dict
) -> None:
    """They stand in where none is written in the usual way."""
    expected = (
        Problem("set-0", "q", "1", None, expected)
        if isinstance(expected, dict)
        else expected
    )
    assert load_problems(write(tmp_path, "set.jsonl", row)) == [expected]


NESTED = {
    "prompt": [
        {"role": "system", "content": "no"},
        {"role": "user", "content": "2 + 3?"},
    ],
    "reward_model": {"ground_truth": "5", "style": "rule"},
    "extra_info": {"index": 7, "a.b": "c"},
    "a.b": {"c": "whole name"},
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            Fields(("prompt.1.content",), "reward_model.ground_truth"),
            ("set-0", "2 + 3?", "5"),
        ),
        (
            Fields(
                ("prompt.-1.content",),
                "reward_model.ground_truth",
                id="extra_info.index",
            ),
            ("7", "2 + 3?", "5"),
        ),
        (
            Fields(("reward_model.style", "prompt.0.role"), "prompt.1.role"),
            ("set-0", "rule system", "user"),
        ),
    ],
)
@pytest.mark.parametrize("name", ["set.jsonl", "set.json"])
def test_names_of_fields_in_fields(
    tmp_path: Path, name: str, fields: Fields, expected: tuple[str, ...]
) -> None:
    (problem,) = load_problems(
        write(tmp_path, name, NESTED if name == "set.jsonl" else [NESTED]), fields
    )
    assert (problem.id, problem.question, problem.answer, problem.metadata) == (
        *expected,
        NESTED,
    )


@pytest.mark.parametrize(
    "path",
    [
        "prompt.2.content",
        "prompt.user",
        "prompt.0.0",
        "reward_model",
        "reward_model.",
        "x.y",
    ],
)
def test_paths_that_lead_to_no_text(tmp_path: Path, path: str) -> None:
    error = error_of(
        write(tmp_path, "set.jsonl", NESTED), Fields(("prompt.1.content",), path)
    )
    if path == "reward_model":
        assert error.endswith(
            "; what is in it has a name such as reward_model.ground_truth"
        )
    else:
        assert error.startswith(
            f"set.jsonl:1: no answer field (expected {path}); the fields are: prompt, "
            f"reward_model, "
        )


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ('["2"]', "2"),
        ("[2, 3]", "2, 3"),
        ('["x = 1", 0.50, null]', "x = 1, 0.50"),
        ("[51.0]", "51"),
        ("0.10", "0.10"),
        ("1.50", "1.50"),
        ("51.0", "51"),
        ("-0.0", "0"),
        ("1e3", "1000"),
        ("1E23", "100000000000000000000000"),
        ("12345678901234567890.0", "12345678901234567890"),
        ("0.12345678901234567890", "0.12345678901234567890"),
        ("1e-7", "1e-7"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_answers_that_are_no_text(tmp_path: Path, written: str, answer: str) -> None:
    path = write(tmp_path, "set.jsonl", f'{{"question": "q", "answer": {written}}}')
    assert load_problems(path)[0].answer == answer
    path = write(tmp_path, "set.json", f'[{{"question": "q", "answer": {written}}}]')
    assert load_problems(path)[0].answer == answer


def test_numbers_remain_numbers_in_metadata(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "set.jsonl",
        '{"question": "q", "answer": "1", "a": 0.50, "b": [1.0], "c": NaN, "d": null}',
    )
    metadata = load_problems(path)[0].metadata
    assert metadata == {"a": 0.5, "b": [1.0], "c": None, "d": None}
    assert (
        json.dumps(pickle.loads(pickle.dumps(metadata)))
        == '{"a": 0.5, "b": [1.0], "c": null, "d": null}'
    )


def test_a_list_of_one_text_is_that_text(tmp_path: Path) -> None:
    path = write(
        tmp_path, "set.jsonl", {"question": ["q"], "answer": ["1"], "solution": ["s"]}
    )
    assert load_problems(path) == [Problem("set-0", "q", "1", "s")]


WORKED = [
    "Tom has 3 boxes with 4 pens in each of them. 3 * 4 = 12. He gives 2 away. So 10 pens remain.",
    "First she buys 5 apples for 2 coins each.\nThen she spends 5 * 2 = 10 coins in all.",
    "As each of the three boxes holds four pens and as two of these pens are given to a "
    "friend, 10 are left to him",
    "太郎はりんごを三つ持っています。花子から二つもらいました。合わせると 3 + 2 = 5 になります。",
]
ANSWERS = [
    *(
        "Paris",
        "the empty set",
        "no solution",
        "18",
        "x = 1 and y = 2",
        "all real numbers except 2 and 3",
    ),
    *(
        "every prime number that leaves the remainder 1 when it is divided by 4",
        "Mr. Smith",
        "3 p.m. on Monday",
    ),
    *(
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"f(x) = \begin{cases} 2x & \text{if } x > 0 \\ 0 & \text{else}",
    ),
    " ".join(["fig", "pear"] * 20),
    f"{WORKED[0]} The answer is 10.",
    rf"{WORKED[0]} \boxed{{10}}",
    f"{WORKED[3]}答えは5です。",
]


@pytest.mark.parametrize("gold", WORKED)
def test_a_gold_answer_that_nothing_can_match_is_refused(
    tmp_path: Path, gold: str
) -> None:
    path = write(tmp_path, "set.jsonl", ROW, {"question": "q", "answer": gold})
    assert error_of(path) == (
        "set.jsonl:2: field 'answer' is a worked solution without a marked answer "
        "(\\boxed{}, ####, ...): name the "
        "field of the final answer, or in answer_after what stands before it"
    )
    path = write(tmp_path, "set.jsonl", {"question": "q", "answer": f"{gold}\n#### 4"})
    assert load_problems(path) == [Problem("set-0", "q", "4", gold)]


@pytest.mark.parametrize("gold", ANSWERS)
def test_answers_in_words_are_answers(tmp_path: Path, gold: str) -> None:
    assert (
        load_problems(write(tmp_path, "set.jsonl", {"question": "q", "answer": gold}))[
            0
        ].answer
        == gold
    )


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_cells_of_any_length_and_odd_rows(tmp_path: Path, delimiter: str) -> None:
    long = "many words " * 20_000 + "end"
    lines = ["question, answer ,,", f"{long},1,,", "  ", "", "q\0q,2,a,b", ""]
    path = tmp_path / ("set.csv" if delimiter == "," else "set.tsv")
    path.write_bytes("\r\n".join(lines).replace(",", delimiter).encode())
    assert load_problems(path) == [
        Problem("set-0", long, "1", None, {"": ""}),
        Problem("set-1", "q\0q", "2", None, {"": "b"}),
    ]


def test_lines_of_json_in_a_json_file(tmp_path: Path) -> None:
    path = write(tmp_path, "set.json", ROW, "", {**ROW, "level": 2})
    assert load_problems(path) == [
        Problem("set-0", "2 + 3?", "5"),
        Problem("set-1", "2 + 3?", "5", None, {"level": 2}),
    ]
    assert error_of(write(tmp_path, "set.json", ROW, "{")).startswith(
        "set.json:2: not valid JSON: Expecting property"
    )


def test_a_mapping(tmp_path: Path) -> None:
    row = {
        "task": "Add.",
        "text": "2 + 3",
        "gold": "so <<2+3=5>>5. A: 5",
        "why": "<<x>>why",
        "key": "k",
        "question": "no",
    }
    path = write(tmp_path, "set.jsonl", row)
    fields = Fields(
        question=("task", "text"),
        answer="gold",
        id="key",
        answer_after="A:",
        remove=r"<<[^>]*>>",
    )
    assert load_problems(path, fields) == [
        Problem("k", "Add. 2 + 3", "5", "so 5.", {"why": "<<x>>why", "question": "no"}),
    ]
    fields = Fields(
        question=("text",), answer="gold", solution="why", id="key", answer_after=""
    )
    problem = load_problems(path, fields)[0]
    assert (problem.answer, problem.solution) == ("so <<2+3=5>>5. A: 5", "<<x>>why")


def test_an_empty_marker_keeps_the_answer_field_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "set.jsonl", {"question": "q", "answer": "#### 4"})
    assert load_problems(path, Fields(answer_after=""))[0].answer == "#### 4"


def test_skip_and_limit_count_rows_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "set.jsonl",
        *({"question": f"q{row}", "answer": row} for row in range(5)),
    )
    ids = [problem.id for problem in load_problems(path)]
    assert ids == [f"set-{row}" for row in range(5)]
    assert [problem.id for problem in load_problems(path, skip=1, limit=2)] == ids[1:3]
    assert [problem.id for problem in load_problems(path, skip=3)] == ids[3:]
    assert [problem.id for problem in load_problems(path, limit=9)] == ids


# --- errors ----------------------------------------------------------------------------------


ANY_ANSWER = (
    "set.jsonl:1: no answer field (expected answer_number, answer, Answer, target); "
    "the fields are: "
)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [ROW, "", "{'a': 1}"],
            "set.jsonl:3: not valid JSON: Expecting property name enclosed in double quotes "
            "(column 2)",
        ),
        (
            [ROW, '{"question": "q", "ans'],
            "set.jsonl:2: not valid JSON: Unterminated string starting at (column 19)",
        ),
        ([ROW, [1]], "set.jsonl:2: expected an object with named fields, got list"),
        (
            [{"text": "q", "answer": "1"}],
            "set.jsonl:1: no question field (expected question, problem, prompt, Body + "
            "Question, Question, input); "
            "the fields are: text, answer",
        ),
        (
            [{"question": "q"}],
            f"{ANY_ANSWER}question",
        ),
        (
            [{}],
            "set.jsonl:1: no question field (expected question, problem, prompt, Body + "
            "Question, Question, input); "
            "the fields are: none",
        ),
        ([ROW, {"question": "q", "answer": " "}], "set.jsonl:2: the answer is empty"),
        ([{"question": "q", "answer": None}], "set.jsonl:1: the answer is empty"),
        ([{"question": "q", "answer": "so ####"}], "set.jsonl:1: the answer is empty"),
        ([{"question": "", "answer": "1"}], "set.jsonl:1: the question is empty"),
        (
            [{"question": ["q", "r"], "answer": 1}],
            "set.jsonl:1: field 'question': expected text or a finite number, got ['q', "
            "'r']; what is in it has a name "
            "such as question.0",
        ),
        (
            [{"question": "q", "answer": {"value": 1}}],
            "set.jsonl:1: field 'answer': expected text or a finite number, got {'value': "
            "1}; what is in it has a name "
            "such as answer.value",
        ),
        (
            [{"question": "q", "answer": [[1, 2], 3]}],
            "set.jsonl:1: field 'answer': expected text or a finite number, got [1, 2]; "
            "what is in it has a name such "
            "as answer.0",
        ),
        ([{"question": "q", "answer": []}], "set.jsonl:1: the answer is empty"),
        ([{"question": "q", "answer": [None]}], "set.jsonl:1: the answer is empty"),
        (
            [{"question": "q", "answer": True}],
            "set.jsonl:1: field 'answer': expected text or a finite number, got True",
        ),
        (
            [{"question": "q", "answer": float("inf")}],
            "set.jsonl:1: field 'answer': expected text or a finite number, got inf",
        ),
        (
            [{"question": "q", "answer": float("nan")}],
            "set.jsonl:1: the answer is empty",
        ),
        (
            ['{"question": "q", "answer": 1e400}'],
            "set.jsonl:1: field 'answer': expected text or a finite number, got inf",
        ),
        (
            [ROW, '{"question": "q", "answer": 1, "answer": 2}'],
            "set.jsonl:2: the field 'answer' is there twice",
        ),
        (
            [ROW, '{"question": "a \\ud83d b", "answer": 1}'],
            "set.jsonl:2: half a surrogate pair, which is no character: 'a \\ud83d b'",
        ),
        (
            ['{"question": "q", "answer": 1, "more": {"list": ["\\uDC00"]}}'],
            "set.jsonl:1: half a surrogate pair, which is no character: '\\udc00'",
        ),
        (
            ['{"question": "q", "answer": 1, "\\ud800": 1}'],
            "set.jsonl:1: half a surrogate pair, which is no character: '\\ud800'",
        ),
        (
            ['{"question": "q", "answer": 1, "x": ' + "[" * 10**5],
            "set.jsonl:1: JSON that is nested too deeply",
        ),
        (
            [{**ROW, "x": json.loads("[" * 120 + "]" * 120)}],
            "set.jsonl:1: lists or objects in one another, more than 100",
        ),
        ([{"te\nxt": "q", "question": "q"}], ANY_ANSWER + "te xt, question"),
        (
            [{**ROW, "id": "a"}, {**ROW, "id": "b"}, {**ROW, "id": "a"}],
            "set.jsonl:3: the id 'a' is taken by set.jsonl:1; ids must differ",
        ),
        ([], "set.jsonl: no problems"),
        (["", " "], "set.jsonl: no problems"),
    ],
)
def test_errors_name_the_file_and_the_line(
    tmp_path: Path, lines: list[object], message: str
) -> None:
    assert error_of(write(tmp_path, "set.jsonl", *lines)) == message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "set.json",
            "[1,\n2",
            "set.json:2: not valid JSON: Expecting ',' delimiter (column 2)",
        ),
        (
            "set.json",
            '[{"question": "q", "answer": ""}]',
            "set.json: row 0: the answer is empty",
        ),
        (
            "set.json",
            '{"a": [], "b": []}',
            "set.json: expected a list of records, or an object with one list or",
        ),
        (
            "set.json",
            '{"examples": 3}',
            "set.json: expected a list of records, or an object with one list or",
        ),
        (
            "set.json",
            "3",
            "set.json: expected a list of records, or an object with one list or a list "
            "called examples",
        ),
        ("set.json", "[]", "set.json: no problems"),
        ("set.csv", "question,answer\na,b,c\n", "set.csv:2: expected 2 columns, got 3"),
        ("set.csv", 'question,answer\n\n"a\nb",\n', "set.csv:4: the answer is empty"),
        ("set.csv", 'question,answer\n"a"b,c\n', "set.csv:2: ',' expected after '\"'"),
        ("set.csv", "question,answer\n", "set.csv: no problems"),
        (
            "set.csv",
            "\nquestion, answer,answer\na,b,c\n",
            "set.csv:2: the field 'answer' is there twice",
        ),
        (
            "set.tsv",
            "question\tanswer\tquestion\na\tb\tc\n",
            "set.tsv:1: the field 'question' is there twice",
        ),
        (
            "set.csv",
            '"ques\ntion",answer\na,b\n',
            "set.csv:3: no question field (expected question, ",
        ),
        (
            "set.json",
            '[{"question": "\\udc00", "answer": 1}]',
            "set.json: half a surrogate pair, which is no character: '\\udc00'",
        ),
        (
            "set.json",
            '[{"question": "q", "answer": 1, "question": 2}]',
            "set.json: the field 'question' is there twice",
        ),
        ("set.json", "[" * 10**5, "set.json: JSON that is nested too deeply"),
        (
            "set.json",
            "[" + "1" * 5000 + "]",
            "set.json: Exceeds the limit (4300 digits)",
        ),
        (
            "set.jsonl",
            "\n" + "1" * 5000,
            "set.jsonl:2: Exceeds the limit (4300 digits)",
        ),
        (
            "set.tsv",
            "question,answer\na,b\n",
            "set.tsv:2: no question field (expected question, ",
        ),
        ("set.tsv.gz", "question\tanswer", "set.tsv.gz: not a whole gzip file: "),
        (
            "set.txt",
            "question",
            "set.txt: unknown format; expected .jsonl, .json, .csv, .tsv (each also .gz) or "
            ".parquet",
        ),
    ],
)
def test_errors_of_the_other_formats(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert error_of(path).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            Fields(question=("question", "body")),
            "no question field (expected question + body); the fields are: question,",
        ),
        (
            Fields(answer="gold"),
            "no answer field (expected gold); the fields are: question, answer",
        ),
        (
            Fields(solution="why"),
            "no solution field (expected why); the fields are: question, answer",
        ),
        (
            Fields(id="key"),
            "no id field (expected key); the fields are: question, answer",
        ),
        (Fields(answer_after="A:"), "no 'A:' in the answer field"),
    ],
)
def test_a_field_that_is_named_must_be_there(
    tmp_path: Path, fields: Fields, message: str
) -> None:
    assert error_of(write(tmp_path, "set.jsonl", ROW), fields).startswith(
        f"set.jsonl:1: {message}"
    )


def test_other_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "set.jsonl", ROW)
    assert error_of(path, skip=1) == "set.jsonl: no problems after the first 1"
    assert error_of(path, limit=-1) == "skip and limit must be at least 0, got 0 and -1"
    path.write_bytes(b'{"question": "\xff"}')
    assert error_of(path) == "set.jsonl: not UTF-8 text (byte 14)"
    whole = gzip.compress(json.dumps(ROW).encode())
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole[:-9])
    assert error_of(cut).startswith("cut.jsonl.gz: not a whole gzip file: ")
    with pytest.raises(ValueError, match=r"remove='\(' is not a regular expression: "):
        Fields(remove="(")


@pytest.mark.parametrize(
    "source",
    ["none.jsonl", "data/none.jsonl.gz", "none", "a/b/c", "org/name:", "./org/name"],
)
def test_a_file_that_is_not_there(source: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_problems(source)
    message = f"problem set not found: {source} (expected a file, or org/name of a hub dataset)"
    assert str(caught.value) == message


# --- the hub, from its cache -----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot folder of the dataset org/maths in a hub cache, with the network off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "datasets--org--maths"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in ("main", "socratic"):
        (snapshot / folder).mkdir(parents=True)
        write(snapshot / folder, "test.jsonl", {"question": folder, "answer": "1"})
    write(
        snapshot / "main",
        "train-00000-of-00002.jsonl",
        {"question": "first", "answer": "1"},
    )
    write(
        snapshot / "main",
        "train-00001-of-00002-0a1b.jsonl",
        {"question": "second", "answer": "2"},
    )
    write(snapshot / "main", "train_extra.jsonl", {"question": "no", "answer": "0"})
    write(snapshot, "validation.jsonl", {"question": "top", "answer": "1"})
    return snapshot


def test_a_hub_dataset_in_parts(cache: Path) -> None:
    expected = [
        Problem("maths-train-0", "first", "1"),
        Problem("maths-train-1", "second", "2"),
    ]
    assert (
        load_problems("org/maths:main")
        == load_problems("org/maths", split="train")
        == expected
    )
    assert load_problems("org/maths:main", skip=1) == expected[1:]


def test_the_split_and_the_config_of_a_hub_dataset(cache: Path) -> None:
    assert load_problems("org/maths:socratic", split="test") == [
        Problem("maths-test-0", "socratic", "1")
    ]
    assert load_problems("org/maths", split="validation") == [
        Problem("maths-validation-0", "top", "1")
    ]
    with pytest.raises(ValueError) as caught:
        load_problems("org/maths", split="test")
    assert (
        str(caught.value)
        == "org/maths: several configs; choose one, as org/maths:main, of main, socratic"
    )


def test_a_split_or_dataset_that_the_hub_does_not_have(cache: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_problems("org/maths:socratic", split="train")
    assert (
        str(caught.value)
        == "org/maths: no file of the split 'train' of the config 'socratic' in the hub dataset"
    )
    with pytest.raises(
        FileNotFoundError,
        match="no org/other here, nor can the hub give it ",
    ) as caught:
        load_problems("org/other")
    assert "\n" not in str(caught.value)


# --- public sets -----------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "options", "count", "identifier", "answer"),
    [
        ("gsm8k/train.jsonl", {}, 7473, "train-0", "72"),
        ("gsm8k/test.jsonl", {}, 1319, "test-0", "18"),
        ("svamp/SVAMP.json", {}, 1000, "chal-1", "51"),
        ("svamp/test.jsonl", {}, 1000, "chal-777", "145"),
        (
            "math/math500.jsonl",
            {},
            500,
            "test/precalculus/807.json",
            r"\left( 3, \frac{\pi}{2} \right)",
        ),
        ("mgsm/mgsm_en.tsv", {"header": False}, 250, "mgsm_en-0", "18"),
        ("mgsm/mgsm_ja.tsv", {"header": False}, 250, "mgsm_ja-0", "18"),
        ("general/bbh/object_counting.json", {}, 250, "object_counting-0", "8"),
    ],
)
def test_public_sets_load_without_a_mapping(
    name: str, options: dict, count: int, identifier: str, answer: str
) -> None:
    problems = load_problems(SHARED / name, **options)
    assert len(problems) == count
    assert (problems[0].id, problems[0].answer) == (identifier, answer)


@needs_shared
def test_gsm8k_without_its_calculator_notes() -> None:
    first = load_problems(SHARED / "gsm8k" / "test.jsonl", Fields(remove=r"<<[^>]*>>"))[
        0
    ]
    # The exact text, without a copy of it here
    digest = hashlib.sha256(first.solution.encode()).hexdigest()
    assert digest == "0b7b7ad64b22910315ee67483c16ffe1e33e5715fb1358f2b1f9301054c3a334"
    assert first.metadata == {}
    assert all(
        p.solution and p.answer for p in load_problems(SHARED / "gsm8k" / "train.jsonl")
    )


def test_labels_sort_problems_into_kinds():
    metadata = {
        "level": 3,
        "subject": "Algebra",
        "start": 7,
        "proof": "x" * 99,
        "ops": [1],
    }
    assert Problem("p", "q", "a", metadata=metadata).labels == {
        "level": 3,
        "subject": "Algebra",
    }

"""The config engine: every source, every error message, and the round trip through TOML."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomath.algorithms import PRESETS
from nanomath.config import (
    describe,
    load,
    option,
    parse_arguments,
    section,
    to_toml,
)
from nanomath.settings import GRPOConfig


@dataclass
class Schedule:
    """How the learning rate moves."""

    warmup: int = option(0, "steps of linear warm-up", minimum=0)
    shape: str = option(
        "cosine", "decay after the warm-up", choices=("constant", "cosine", "linear")
    )


@dataclass
class Optim:
    """AdamW and its learning-rate schedule.

    More that no list of keys needs to show.
    """

    lr: float = option(1e-5, "peak learning rate", above=0, maximum=1)
    betas: list[float] = option([0.9, 0.95], "moments' decay", minimum=0, below=1)
    clip: float = option(1.0, "gradient norm to clip to | inf to leave it", above=0)
    schedule: Schedule = section(Schedule, warmup=3)

    def __post_init__(self) -> None:
        if self.clip < self.lr:
            raise ValueError(f"clip {self.clip} is below lr {self.lr}")


METHODS = {
    "plain": {},
    "fast": {"rate": 2.0, "terms": ["a", "b"]},
    "odd": {"rate": 7.0, "shape": "square"},
}
SHAPES = {"round": None, "square": None}


@dataclass
class Method:
    """A section that starts from a row of a table."""

    PRESET = ("method", METHODS)

    method: str = option("plain", "the row that the others start from", choices=METHODS)
    rate: float = option(1.0, "a number", above=0)
    shape: str = option(
        "round", "a choice that may grow", choices=lambda: (*SHAPES, "off")
    )
    terms: list[str] = option([], "a list")

    def __post_init__(self) -> None:
        if self.shape == "square" and self.rate < 5:
            raise ValueError(f"a square needs a rate of 5, not {self.rate:g}")


@dataclass
class WithMethod:
    """A config with such a section, beside one without."""

    method: Method = section(Method)
    optim: Optim = section(Optim)


@dataclass
class Config:
    """Fine-tune a model on worked solutions."""

    name: str = option("run", "name of the run")
    seed: int = option(0, "seed of every random draw")
    exact: bool = option(False, "bit-exact sampling")
    judge: str = option("", "model that judges, if any")
    languages: list[str] = option(["en"], "languages of the questions")
    weights: dict[str, float] = option(
        {"accuracy": 1.0}, "weight of each reward", minimum=-1
    )
    examples: list[dict[str, str]] = option([], "worked examples")
    optim: Optim = section(Optim)


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding=encoding)
    return path


def error_of(path: Path | None, *words: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(Config, path, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- sources ---------------------------------------------------------------------------------


def test_defaults_are_fresh_copies() -> None:
    first, second = load(Config, None), load(Config, None)
    assert first == second == Config()
    first.languages.append("ja")
    first.weights["format"] = 1.0
    assert second == Config() == load(Config, None)


def test_section_defaults_can_be_replaced_where_the_section_stands() -> None:
    assert Schedule().warmup == 0
    assert load(Config, None).optim.schedule.warmup == 3


def test_command_line_wins_over_file_wins_over_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'name = "file"\n[optim]\nlr = 0.5\n[optim.schedule]\nwarmup = 7\n'
    )
    config = load(Config, path, ["name=words", "optim.schedule.warmup=8"])
    assert (config.name, config.optim.lr, config.optim.schedule.warmup) == (
        "words",
        0.5,
        8,
    )
    assert config.optim.betas == [0.9, 0.95]


@pytest.mark.parametrize(
    "text",
    [
        "optim = {lr = 0.5}",
        "optim.lr = 0.5",
        "[optim]\r\nlr = 0.5\r\n",
        "\ufeff[optim]\nlr=0.5",
    ],
)
def test_every_way_of_writing_a_section(tmp_path: Path, text: str) -> None:
    assert load(Config, str(write(tmp_path, text))).optim.lr == 0.5


def test_an_integer_in_the_file_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    value = load(Config, write(tmp_path, "optim.lr = 1")).optim.lr
    assert value == 1.0 and type(value) is float


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("name=abc", "name", "abc"),
        ("name=123", "name", "123"),
        ("name=true", "name", "true"),
        ("name=", "name", ""),
        ("name=none", "name", "none"),
        ("name=a=b c", "name", "a=b c"),
        ('name="quoted"', "name", '"quoted"'),
        ("seed=-3", "seed", -3),
        ("seed=1_000", "seed", 1000),
        ("exact=true", "exact", True),
        ("exact=false", "exact", False),
        ("judge=gpt2", "judge", "gpt2"),
        ("judge=", "judge", ""),
        ("languages=[en,ja]", "languages", ["en", "ja"]),
        ("languages=en, ja", "languages", ["en", "ja"]),
        ("languages=en", "languages", ["en"]),
        ("languages=[1,2]", "languages", ["1", "2"]),
        ('languages=["a,b", "c"]', "languages", ["a,b", "c"]),
        ("languages=", "languages", []),
        ("languages=[]", "languages", []),
        ("weights={format = 2}", "weights", {"format": 2.0}),
        ("weights.format=2", "weights", {"accuracy": 1.0, "format": 2.0}),
        ("weights.a.b=2", "weights", {"accuracy": 1.0, "a.b": 2.0}),
        (
            'examples=[{question = "1+1", solution = "2"}]',
            "examples",
            [{"question": "1+1", "solution": "2"}],
        ),
    ],
)
def test_words_of_the_command_line(word: str, name: str, value: object) -> None:
    result = getattr(load(Config, None, [word]), name)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("optim.lr=1e-4", "lr", 1e-4),
        ("optim.lr=.5", "lr", 0.5),
        ("optim.lr=1", "lr", 1.0),
        ("optim.betas=0.5,.25", "betas", [0.5, 0.25]),
        ("optim.betas=[0, 0.5]", "betas", [0.0, 0.5]),
        ("optim.betas=0.5", "betas", [0.5]),
        ("optim.clip=inf", "clip", float("inf")),
    ],
)
def test_numbers_of_the_command_line(word: str, name: str, value: object) -> None:
    result = getattr(load(Config, None, [word]).optim, name)
    assert result == value and type(result) is type(value)


def test_entries_of_a_dict_add_up_on_what_the_file_set(tmp_path: Path) -> None:
    path = write(tmp_path, "[weights]\nformat = 0.5\n")
    assert load(Config, path).weights == {"format": 0.5}
    config = load(Config, path, ["weights.length=0.1", "weights.format=0.2"])
    assert config.weights == {"format": 0.2, "length": 0.1}


def test_post_init_sees_the_resolved_section_once(tmp_path: Path) -> None:
    path = write(tmp_path, "optim.clip = 1e-7")
    assert load(Config, path, ["optim.lr=1e-8"]).optim.clip == 1e-7
    assert error_of(path) == f"{path}: [optim] clip 1e-07 is below lr 1e-05"
    assert error_of(path, "seed=1").startswith(f"{path} and command line: [optim] clip")
    assert error_of(None, "optim.clip=1e-7").startswith("command line: [optim] clip")


# --- presets ---------------------------------------------------------------------------------


def method_of(path: Path | None, *words: str) -> Method:
    return load(WithMethod, path, words).method


def test_command_line_wins_over_file_wins_over_row_wins_over_default(
    tmp_path: Path,
) -> None:
    assert method_of(None) == Method("plain", 1.0, "round", [])
    assert method_of(None, "method.method=fast") == Method(
        "fast", 2.0, "round", ["a", "b"]
    )
    path = write(tmp_path, '[method]\nmethod = "fast"\nrate = 3\n')
    assert method_of(path) == Method("fast", 3.0, "round", ["a", "b"])
    assert method_of(path, "method.rate=4", "method.terms=[]") == Method(
        "fast", 4.0, "round", []
    )
    assert method_of(path, "method.method=odd", "method.rate=9") == Method(
        "odd", 9.0, "square", []
    )
    assert method_of(path, "method.method=plain") == Method("plain", 3.0, "round", [])


def test_a_key_that_is_set_to_its_default_wins_over_the_row() -> None:
    assert method_of(None, "method.rate=1", "method.method=fast").rate == 1.0


def test_a_resolved_config_needs_the_row_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.toml holds every key: what the row says another day changes nothing."""
    config = load(WithMethod, None, ["method.method=fast", "method.rate=6"])
    path = write(tmp_path, to_toml(config))
    monkeypatch.setitem(METHODS, "fast", {"rate": 100.0, "shape": "square"})
    assert load(WithMethod, path) == config


def test_a_row_is_checked_together_with_what_is_set(tmp_path: Path) -> None:
    assert method_of(None, "method.method=odd").rate == 7.0
    with pytest.raises(
        ValueError,
        match=r"^command line: \[method\] a square needs a rate of 5, not 2$",
    ):
        method_of(None, "method.method=odd", "method.rate=2")
    with pytest.raises(
        ValueError,
        match=r"method.toml:2: method.method: expected one of plain, fast, odd, got 'slow'$",
    ):
        (tmp_path / "method.toml").write_text(
            '[method]\nmethod = "slow"\n', encoding="utf-8"
        )
        method_of(tmp_path / "method.toml")


def test_choices_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="method.shape: expected one of round, square, off, got 'oval'"
    ):
        method_of(None, "method.shape=oval")
    monkeypatch.setitem(SHAPES, "oval", None)
    monkeypatch.setitem(METHODS, "egg", {"shape": "oval"})
    assert method_of(None, "method.method=egg") == Method("egg", 1.0, "oval", [])
    assert "one of round, square, oval, off" in describe(WithMethod, width=200)


def test_other_sections_know_no_rows() -> None:
    assert load(WithMethod, None, ["method.method=fast"]).optim == Optim(
        schedule=Schedule(warmup=3)
    )


def test_every_method_of_the_algorithms_resolves_and_comes_back(tmp_path: Path) -> None:
    for method, row in PRESETS.items():
        words = [f"algorithm.method={method}", "process.prm=oracle"]
        words += ["teacher.path=start"] * (row.get("advantage") == "teacher")
        config = load(GRPOConfig, None, words)
        defaults = {field.name: field.default for field in fields(config.algorithm)}
        assert vars(config.algorithm) == {**defaults, **row, "method": method}
        assert load(GRPOConfig, write(tmp_path, to_toml(config))) == config


def test_a_method_with_overrides_comes_back(tmp_path: Path) -> None:
    words = [
        "algorithm.clip_high=0.4",
        "algorithm.refills=1",
        "algorithm.aggregation=sequence",
    ]
    config = load(
        GRPOConfig,
        write(tmp_path, '[algorithm]\nmethod = "dapo"\nrefills = 9\n'),
        words,
    )
    a = config.algorithm
    assert (a.method, a.clip_high, a.refills, a.aggregation, a.minibatches) == (
        "dapo",
        0.4,
        1,
        "sequence",
        4,
    )
    assert load(GRPOConfig, write(tmp_path, to_toml(config))) == config


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sed=1", "sed: unknown key; did you mean seed?"),
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("lr=1", "lr: unknown key; did you mean optim.lr?"),
        ("warmpu=1", "warmpu: unknown key; did you mean optim.schedule.warmup?"),
        ("optm.lr=1", "optm.lr: unknown key; did you mean optim.lr?"),
        (
            "optim.qqq=1",
            "optim.qqq: unknown key; expected one of lr, betas, clip, schedule",
        ),
        ("seed.x=1", "seed.x: unknown key; seed is not a section"),
        (
            "optm.schedule.shape=1",
            "optm.schedule.shape: unknown key; did you mean optim.schedule.shape?",
        ),
        ("seed.=1", "seed.: unknown key; seed is not a section"),
        (
            "optim=3",
            "optim: this is a section, not a key; set its keys, for example optim.lr",
        ),
        (
            "optim={lr = 1}",
            "optim: this is a section, not a key; set its keys, for example optim.lr",
        ),
        ("seed=1.5", "seed: expected an integer, got 1.5"),
        ("seed=true", "seed: expected an integer, got True"),
        ("seed=", "seed: expected an integer, got ''"),
        ("seed=none", "seed: expected an integer, got 'none'"),
        ("exact=1", "exact: expected true or false, got 1"),
        ("exact=yes", "exact: expected true or false, got 'yes'"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("optim.clip=x", "optim.clip: expected a number, got 'x'"),
        ("optim.lr=0", "optim.lr: expected a number above 0 and at most 1, got 0.0"),
        ("optim.lr=nan", "optim.lr: expected a number above 0 and at most 1, got nan"),
        ("optim.lr=1.1", "optim.lr: expected a number above 0 and at most 1, got 1.1"),
        (
            "optim.betas=0.9,1",
            "optim.betas: expected a number at least 0 and below 1, got 1.0",
        ),
        ("optim.betas=0.9,x", "optim.betas: expected a number, got 'x'"),
        ("weights=3", "weights: expected a table, got 3"),
        ("weights.a=b", "weights.a: expected a number, got 'b'"),
        ("weights.a=-2", "weights.a: expected a number at least -1, got -2.0"),
        ("examples=a,b", "examples: expected a table, got 'a'"),
        (
            "optim.schedule.shape=cosin",
            "optim.schedule.shape: expected one of constant, cosine, linear, got 'cosin'",
        ),
        ("weights.a=nan", "weights.a: expected a number at least -1, got nan"),
        ("name=caf\udce9", "'name=caf\\udce9': not UTF-8 text"),
        ("seed", "'seed': expected key=value"),
        ("=1", "'=1': expected key=value"),
    ],
)
def test_errors_of_the_command_line(word: str, message: str) -> None:
    assert error_of(None, word) == f"command line: {message}"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=" + "[" * 5000, f"seed: expected an integer, got '{'[' * 99}"),
        ("seed=" + "1" * 5000, f"seed: expected an integer, got '{'1' * 99}"),
        (
            "optim.betas=" + "[" * 5000,
            f"optim.betas: expected a number, got '{'[' * 99}",
        ),
        (
            "optim.schedule.shape=" + "x" * 5000,
            f"one of constant, cosine, linear, got '{'x' * 99}",
        ),
        (
            "a\nb=1",
            "'a\\nb': unknown key; expected one of name, seed, exact, judge, languages, weights, "
            "examples, optim",
        ),
        ("seed.a\nb.c=1", "'seed.a\\nb.c': unknown key; 'seed.a\\nb' is not a section"),
        (
            "x" * 5000 + "=1",
            f"'{'x' * 99}: unknown key; expected one of name, seed, exact, judge, languages, ",
        ),
        ("x\n" * 5000, "'x\\nx\\nx"),
    ],
    ids=range(8),
)
def test_errors_are_one_short_line_whatever_is_said(word: str, message: str) -> None:
    error = error_of(None, word)
    assert error.startswith("command line: ") and message in error
    assert len(error) < 300 and error.isprintable()


def test_nan_is_no_number_for_any_key() -> None:
    with pytest.raises(
        ValueError,
        match=r"^command line: reward\.weights\.accuracy: expected a number, got nan$",
    ):
        load(GRPOConfig, None, ["reward.weights.accuracy=nan"])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("# note\n\nsed = 1", 3, "sed: unknown key; did you mean seed?"),
        ("seed = 1\n[optm]\nlr = 1", 2, "optm: unknown key; did you mean optim?"),
        (
            "seed = 1\n[optim]\n\nlrr = 1",
            4,
            "optim.lrr: unknown key; did you mean optim.lr?",
        ),
        ("optim.lrr = 1", 1, "optim.lrr: unknown key; did you mean optim.lr?"),
        (
            "[ optim . 'schedule' ]\nwarmup = -1",
            2,
            "optim.schedule.warmup: expected a number at least 0, got -1",
        ),
        (
            "[optim.schedule]\nwarmup = 1\n[optim]\nwarmup = 1",
            4,
            "optim.warmup: unknown key; did you mean",
        ),
        (
            "optim = 3",
            1,
            "optim: this is a section, not a key; set its keys, for example optim.lr",
        ),
        ("seed = 'one'", 1, "seed: expected an integer, got 'one'"),
        ("seed = true", 1, "seed: expected an integer, got True"),
        (
            "seed = 2020-01-01",
            1,
            "seed: expected an integer, got datetime.date(2020, 1, 1)",
        ),
        ("[seed]\nx = 1", 1, "seed: expected an integer, got {'x': 1}"),
        ("exact = 1", 1, "exact: expected true or false, got 1"),
        ("name = 5", 1, "name: expected a string, got 5"),
        ("judge = 5", 1, "judge: expected a string, got 5"),
        ("languages = 'en'", 1, "languages: expected a list, got 'en'"),
        ("languages = ['en', 3]", 1, "languages: expected a string, got 3"),
        ("optim.lr = false", 1, "optim.lr: expected a number, got False"),
        ("optim.lr = 1" + 400 * "0", 1, "optim.lr: int too large to convert to float"),
        ("weights = {a = 'b'}", 1, "weights: expected a number, got 'b'"),
    ],
)
def test_errors_of_a_file_name_the_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    assert error_of(path).startswith(f"{path}:{line}: {message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config file not found: .*none.toml"):
        load(Config, tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match="config file not found"):
        load(Config, tmp_path)
    path = write(tmp_path, "seed = 1\nname = = 2")
    assert error_of(path).startswith(
        f"{path}: not valid TOML: "
    ) and "line 2" in error_of(path)
    path = write(tmp_path, "seed = " + "[" * 5000)
    assert (
        error_of(path)
        == f"{path}: not valid TOML: tables or lists in one another, too deep"
    )
    path = write(tmp_path, "seed = " + "1" * 5000)
    assert error_of(path).startswith(
        f"{path}: not valid TOML: Exceeds the limit (4300 digits)"
    )
    path = write(tmp_path, '"a\\nb" = 1')
    assert error_of(path).startswith(
        f"{path}: 'a\\nb': unknown key; expected one of name, "
    )
    path = write(tmp_path, "name = 'é'", encoding="latin-1")
    assert error_of(path) == f"{path}: not UTF-8 text (byte 8)"


def test_a_default_out_of_range_is_refused_where_it_stands() -> None:
    with pytest.raises(ValueError, match="expected a number above 0, got 0"):
        option(0, "a number", above=0)
    with pytest.raises(ValueError, match="expected one of a, b, got 'c'"):
        option("c", "a letter", choices="ab")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.hidden_size", "model.new.hidden_size"),
        ("train.difficulty", "train.world.difficulty"),
        ("heldout.direct", "heldout.world.direct"),
        ("heldout.answer_after", "heldout.file.answer_after"),
        ("train.skip", "train.file.skip"),
    ],
)
def test_a_key_where_it_once_stood_names_its_place(
    tmp_path: Path, old: str, new: str
) -> None:
    section, _, name = old.partition(".")
    path = write(tmp_path, f"[{section}]\n{name} = 1\n")
    with pytest.raises(ValueError) as caught:
        load(GRPOConfig, path)
    assert str(caught.value) == f"{path}:2: {old}: unknown key; did you mean {new}?"


def test_a_section_may_hold_nothing_but_sections(tmp_path: Path) -> None:
    @dataclass
    class Outer:
        """A section without keys of its own."""

        schedule: Schedule = section(Schedule)

    @dataclass
    class Whole:
        """A config of such a section."""

        outer: Outer = section(Outer)

    Whole.__annotations__["outer"] = Outer
    Outer.__annotations__["schedule"] = Schedule
    path = write(tmp_path, "[outer.schedule]\nwarmup = 2\n")
    assert load(Whole, path).outer.schedule.warmup == 2
    assert load(Whole, None, ["outer.schedule.warmup=3"]).outer.schedule.warmup == 3


# --- round trip ------------------------------------------------------------------------------

words = st.text(max_size=20)
configs = st.builds(
    Config,
    name=words,
    seed=st.integers(),
    exact=st.booleans(),
    judge=words,
    languages=st.lists(words, max_size=3),
    weights=st.dictionaries(words, st.floats(min_value=-1), max_size=3),
    examples=st.lists(st.dictionaries(words, words, max_size=2), max_size=2),
    optim=st.builds(
        Optim,
        lr=st.floats(min_value=0, max_value=1, exclude_min=True),
        betas=st.lists(
            st.floats(min_value=0, max_value=1, exclude_max=True), max_size=3
        ),
        clip=st.floats(min_value=1),
        schedule=st.builds(
            Schedule,
            st.integers(min_value=0),
            st.sampled_from(["constant", "cosine", "linear"]),
        ),
    ),
)


@settings(deadline=None, max_examples=100)
@given(config=configs)
def test_toml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: Config
) -> None:
    path = tmp_path_factory.mktemp("round") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="\n")
    assert load(Config, path) == config


@settings(deadline=None, max_examples=50)
@given(config=configs)
def test_scalars_round_trip_through_words(config: Config) -> None:
    values = [
        f"name={config.name}",
        f"seed={config.seed}",
        f"optim.lr={config.optim.lr!r}",
        f"optim.clip={config.optim.clip!r}",
    ]
    result = load(Config, None, values)
    assert (result.name, result.seed) == (config.name, config.seed)
    assert (result.optim.lr, result.optim.clip) == (config.optim.lr, config.optim.clip)


def test_toml_is_readable() -> None:
    config = load(Config, None, ["judge=a", "optim.clip=inf"])
    assert to_toml(config) == (
        'name = "run"\nseed = 0\nexact = false\njudge = "a"\nlanguages = ["en"]\n'
        'weights = {"accuracy" = 1.0}\n'
        "examples = []\n\n[optim]\nlr = 1e-05\nbetas = [0.9, 0.95]\nclip = inf\n\n"
        '[optim.schedule]\nwarmup = 3\nshape = "cosine"\n'
    )


def test_toml_refuses_what_no_config_holds() -> None:
    @dataclass
    class Odd:
        pair: tuple[int, int] = field(default=(1, 2))

    with pytest.raises(TypeError, match=r"a config holds no tuple: \(1, 2\)"):
        to_toml(Odd())


# --- documentation ---------------------------------------------------------------------------


def test_describe_lists_every_key_within_the_width() -> None:
    text = describe(Config, width=70)
    lines = text.splitlines()
    assert lines[0] == "Fine-tune a model on worked solutions."
    assert "[optim] AdamW and its learning-rate schedule." in lines
    assert "[optim.schedule] How the learning rate moves." in lines
    assert "  seed=0                          seed of every random draw (int)" in lines
    assert (
        '  optim.schedule.shape="cosine"' in text
        and "one of constant, cosine, linear" in " ".join(text.split())
    )
    assert max(map(len, lines)) <= 70
    for key in (
        "name",
        'judge=""',
        "weights",
        "optim.betas",
        "optim.clip",
        "optim.schedule.warmup=3",
    ):
        assert f"  {key}" in text


def test_describe_puts_the_meaning_below_a_long_default() -> None:
    @dataclass
    class Long:
        """One key."""

        template: str = option(
            "a template that is rather long", "the text around a question"
        )

    lines = describe(Long, width=80).splitlines()
    assert lines[1:] == [
        '  template="a template that is rather long"',
        " " * 34 + "the text around a question (str)",
    ]


# --- the command line ------------------------------------------------------------------------

FLAGS = {"--resume": "continue from the last checkpoint"}


def test_arguments_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 4")
    config, flags = parse_arguments(
        Config, ["optim.lr=0.5", "--resume", str(path), "name=a"], "", FLAGS
    )
    assert (config.seed, config.optim.lr, config.name, flags) == (
        4,
        0.5,
        "a",
        {"--resume"},
    )
    assert parse_arguments(Config, [], "") == (Config(), set())


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_usage_flags_and_keys_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(
            Config,
            ["nonsense=1", flag],
            "\nusage: train.py [run.toml] [key=value ...]\n",
            FLAGS,
        )
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: train.py")
    assert (
        "  --resume                        continue from the last checkpoint\n" in text
    )
    assert describe(Config) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resum"], "unknown flag '--resum'; did you mean --resume?"),
        (["-q"], "unknown flag '-q'; expected one of --resume, --help"),
        (
            ["--optim.lr=1"],
            "unknown flag '--optim.lr=1'; a key is set without dashes: optim.lr=1",
        ),
        (
            ["a.toml", "b.toml"],
            "'b.toml': expected key=value; the config file is a.toml already",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_arguments(Config, arguments, "", FLAGS)
    assert str(caught.value) == f"command line: {message}"


@pytest.mark.parametrize("word", ["-1", "1.5", "Auto", "true", "", "[1]"])
def test_a_word_beside_a_number_is_the_only_one(word):
    found = load(GRPOConfig, None, ["grpo.token_budget=auto"])
    assert found.grpo.token_budget == "auto"
    said = r"grpo\.token_budget: expected a.* or auto, got"
    with pytest.raises(ValueError, match=said) as error:
        load(GRPOConfig, None, [f"grpo.token_budget={word}"])
    assert "\n" not in str(error.value)


def test_a_word_survives_the_file(tmp_path):
    config = load(GRPOConfig, None, ["grpo.token_budget=auto"])
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    assert load(GRPOConfig, file) == config


def test_an_entry_of_a_table_in_a_table() -> None:
    words = [
        "reward.params.cosine.max_length=400",
        "reward.params.cosine.right_long=0.2",
    ]
    weighed = ["reward.weights.cosine=0.5", *words]
    reward = load(GRPOConfig, None, weighed).reward
    assert reward.params == {"cosine": {"max_length": 400.0, "right_long": 0.2}}
    assert reward.weights == {"accuracy": 1.0, "cosine": 0.5}
    with pytest.raises(ValueError, match="max_length: expected a number, got 'x'"):
        load(GRPOConfig, None, ["reward.params.cosine.max_length=x"])

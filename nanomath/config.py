"""Configuration: dataclasses <- TOML file <- `key=value` words of the command line.

A config is a dataclass whose fields are made by `option` (one key) and `section` (a nested
dataclass):

    @dataclass
    class Optim:
        '''AdamW and its learning-rate schedule.'''
        lr: float = option(1e-5, "peak learning rate", above=0)

    @dataclass
    class Config:
        '''Fine-tune a model on worked solutions.'''
        seed: int = option(0, "seed of every random draw")
        optim: Optim = section(Optim)

    flags = {"--resume": "continue from the last checkpoint"}
    config, chosen = parse_arguments(Config, sys.argv[1:], __doc__, flags)

Then `train.py run.toml optim.lr=3e-6` works, `--help` lists every key, and `to_toml` writes
what was resolved. A section whose class has `PRESET = ("method", TABLE)` starts from the row
of TABLE that its key `method` names in place of its defaults; keys that are set win over the
row. Types: bool, int, float, str, list[T], dict[str, T] and nested dataclasses. Every mistake
is one line that names the file and its line (or "command line"), the key with its section,
what was expected and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

# --- declaring -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The values that a key may have; for a list or a dict, those of each entry.

    `minimum` and `maximum` are inclusive, `above` and `below` are not. Choices that may still
    grow (a table of functions and a word more) are given as a function. `word` may stand in
    place of a number.
    """

    choices: Collection[Any] | Callable[[], Collection[Any]] | None = None
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    word: str | None = None

    def __str__(self) -> str:
        """`above 0 and at most 1`, `at least 0 or auto`, `one of a, b`, or nothing."""
        if self.choices is not None:
            return "one of " + ", ".join(
                str(choice) or "nothing" for choice in self._choices()
            )
        bounds = {
            "at least": self.minimum,
            "above": self.above,
            "at most": self.maximum,
            "below": self.below,
        }
        said = " and ".join(f"{how} {n}" for how, n in bounds.items() if n is not None)
        return said + (f" or {self.word}" if self.word else "")

    def check(self, value: Any) -> None:
        """Raise ValueError if the value, or an entry of it, is not allowed."""
        if isinstance(value, list | dict):
            for entry in value.values() if isinstance(value, dict) else value:
                self.check(entry)
        elif self.choices is None and not self._in_range(value):
            raise ValueError(
                f"expected {f'a number {self}'.strip()}, got {value!r:.100}"
            )
        elif self.choices is not None and value not in self._choices():
            raise ValueError(f"expected {self}, got {value!r:.100}")

    def _in_range(self, value: Any) -> bool:
        return (
            value == value  # nan is not itself, and no number
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def _choices(self) -> Collection[Any]:
        return self.choices() if callable(self.choices) else self.choices


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare a key with its meaning; the default must keep to the `Limits` as well."""
    metadata = {"help": help, "limits": Limits(**limits)}
    metadata["limits"].check(default)
    if isinstance(default, list | dict):  # each config gets its own copy
        return field(default_factory=partial(copy.deepcopy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type[T], **defaults: Any) -> T:
    """Declare a nested dataclass; `defaults` replace some of its own where it stands."""
    return field(default_factory=partial(cls, **defaults))


class Key(NamedTuple):
    """A key as it is in some config: its type and value, and what `option` says of it."""

    kind: Any
    value: Any
    help: str = ""
    limits: Limits = Limits()


_kinds = cache(get_type_hints)  # evaluates every annotation anew


def sections(config: Any, name: str = "") -> Iterator[tuple[str, Any, dict[str, Key]]]:
    """Yield the config and every section in it, outermost first.

    Each comes with its dotted name (the config's is empty) and its own keys by theirs.
    """
    kinds = _kinds(type(config))
    keys = {}
    inner = {}
    for each in fields(config):
        value = getattr(config, each.name)
        path = f"{name}.{each.name}" if name else each.name
        if is_dataclass(value):
            inner[path] = value
        else:
            keys[path] = Key(kinds[each.name], value, **each.metadata)
    yield name, config, keys
    for path, part in inner.items():
        yield from sections(part, path)


# --- loading ---------------------------------------------------------------------------------


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Return a `cls` with its defaults, then the TOML file, then the `key=value` words.

    Later ones win. A file's value replaces a default as a whole; the word
    `weights.format=0.1` sets one entry of the dict `weights`. FileNotFoundError if there is no
    such file; ValueError of one line for anything in it or in the words that does not fit.
    """
    config = cls()
    known = {name: key for _, _, keys in sections(config) for name, key in keys.items()}
    from_file = _read(Path(path), known) if path is not None else ()
    values: dict[str, Any] = {}
    for place, name, value in [*from_file, *map(_split, overrides)]:
        try:
            _assign(name, value, known, values)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{place}: {_shown(name)}: {error}") from None
    sources = [str(path)] * (path is not None) + ["command line"] * bool(overrides)
    return _build(config, values, "", " and ".join(sources))


class _Text(str):
    """A value of the command line, not parsed yet."""


def _split(word: str) -> tuple[str, str, _Text]:
    """Return where a `key=value` word stands, the name of its key and its value."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"command line: {word!r:.100}: expected key=value")
    # What Python makes of bytes that are no text
    if re.search("[\ud800-\udfff]", word):
        raise ValueError(f"command line: {word!r:.100}: not UTF-8 text")
    return "command line", name.strip(), _Text(text)


def _read(path: Path, known: Collection[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield where each key of a TOML file stands, its name and its value."""
    if not path.is_file():
        raise FileNotFoundError(f"config file not found: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        reason = "tables or lists in one another, too deep"
        raise ValueError(f"{path}: not valid TOML: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    for name, value in _flat(table, known):
        yield f"{path}{_line_number(text, name)}", name, value


def _flat(
    table: Mapping[str, Any], known: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a TOML table and of the tables in it that are sections."""
    for name, value in table.items():
        inside = f"{prefix}{name}."
        if isinstance(value, dict) and any(key.startswith(inside) for key in known):
            yield from _flat(value, known, inside)
        else:
            yield prefix + name, value


def _line_number(text: str, name: str) -> str:
    """Return `:LINE` of the first line of a TOML text that sets `name` or opens it as a table.

    This reads the lines, not the TOML: it is only a hint, and may be empty.
    """
    table = ""
    for number, line in enumerate(text.split("\n"), start=1):
        line = re.sub(r"[\s\"']", "", line)
        if header := re.match(r"\[+([^\[\]]+)\]", line):
            here = header[1]
            table = f"{here}."
        elif key := re.match(r"([^=#\[\]]+)=", line):
            here = table + key[1]
        else:
            continue
        if f"{here}.".startswith(f"{name}."):
            return f":{number}"
    return ""


def _assign(
    name: str, value: Any, known: Mapping[str, Key], values: dict[str, Any]
) -> None:
    """Check one value against the key of that name, and put it into `values`."""
    table = name  # the key itself, or the dict that it is an entry of
    while table and table not in known:
        table = _parent(table)
    is_entry = table != name
    if not table or (is_entry and get_origin(known[table].kind) is not dict):
        raise ValueError(_no_key(name, known))
    key = known[table]
    if is_entry:
        before = values.get(table, key.value)
        value = _with_entry(
            before, name.removeprefix(f"{table}."), value, key, key.kind
        )
    else:
        value = _checked(value, key, key.kind)
    values[table] = value


def _with_entry(
    table: Mapping[str, Any], name: str, value: Any, key: Key, kind: Any
) -> dict[str, Any]:
    """Return a dict of that kind with one more entry, or with one more in a dict in it."""
    first, dot, rest = name.partition(".")
    inner = get_args(kind)[1]
    if dot and get_origin(inner) is dict:
        return {
            **table,
            first: _with_entry(table.get(first, {}), rest, value, key, inner),
        }
    return {**table, name: _checked(value, key, inner)}


def _checked(value: Any, key: Key, kind: Any) -> Any:
    """Return a value of a TOML file, or of a word, as that kind."""
    value = _parse(str(value), kind) if isinstance(value, _Text) else value
    word = key.limits.word
    if value != word:
        value = convert(value, kind, f" or {word}" if word else "")
        key.limits.check(value)
    return value


def _no_key(name: str, known: Collection[str]) -> str:
    """Say why a name that is no key cannot be set, and what may have been meant."""
    if inside := [key for key in known if key.startswith(f"{name}.")]:
        return f"this is a section, not a key; set its keys, for example {inside[0]}"
    everything = [*known, *filter(None, dict.fromkeys(map(_parent, known)))]
    parent = _parent(name)
    siblings = [_last(key) for key in everything if _parent(key) == parent]
    if near := did_you_mean(name, everything):
        return f"unknown key; {near}"
    if siblings:
        return f"unknown key; expected one of {', '.join(siblings)}"
    return f"unknown key; {_shown(parent)} is not a section"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean NAME?` for the known name nearest to `word`, or nothing.

    Of dotted names the last part counts first, so that `lr` may mean `optim.lr`.
    """

    def likeness(name: str) -> tuple[float, float]:
        last_parts = SequenceMatcher(None, _last(word), _last(name))
        return last_parts.ratio(), SequenceMatcher(None, word, name).ratio()

    nearest = max(known, key=likeness)
    return f"did you mean {nearest}?" if likeness(nearest)[0] >= 0.6 else ""


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shown(name: str) -> str:
    """Return a name as it is, or as a Python string where one line cannot show it."""
    return name if name.isprintable() and len(name) <= 100 else f"{name!r:.100}"


def _build(default: T, values: Mapping[str, Any], prefix: str, source: str) -> T:
    """Return `default` with its preset's row and then the `values` put in.

    Everything is set at once, so that a __post_init__ sees the resolved section.
    """
    method, table = getattr(type(default), "PRESET", ("", {}))
    changes = copy.deepcopy(table.get(values.get(prefix + method), {}))
    for each in fields(default):
        value = getattr(default, each.name)
        name = prefix + each.name
        if is_dataclass(value):
            changes[each.name] = _build(value, values, f"{name}.", source)
        elif name in values:
            changes[each.name] = values[name]
    try:
        return replace(default, **changes)
    except ValueError as error:  # keys that do not go together
        where = f"[{prefix[:-1]}] " if prefix else ""
        raise ValueError(f"{source}: {where}{error}") from None


# --- values ----------------------------------------------------------------------------------

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def convert(value: Any, kind: Any, also: str = "") -> Any:
    """Return a TOML value as the type `kind`, or raise ValueError that says what is `also` right.

    An int will do for a float, a bool never for a number.
    """
    base = get_origin(kind) or kind
    if base is float and type(value) is int:
        return float(value)
    if type(value) is not base:
        raise ValueError(f"expected {KINDS[base]}{also}, got {value!r:.100}")
    *_, inner = get_args(kind) or [None]  # a bare list or dict holds anything
    if base is list and inner:
        return [convert(entry, inner) for entry in value]
    if base is dict and inner:
        return {name: convert(entry, inner) for name, entry in value.items()}
    return value


def _parse(text: str, kind: Any) -> Any:
    """Return a word of the command line as a TOML value for `kind`.

    What does not parse stays text, for `convert` to refuse. A list may be written without
    brackets and quotes: `[en,ja]`, `en,ja`.
    """
    if kind is str:
        return text  # verbatim: the shell has already taken the quotes away
    is_list = get_origin(kind) is list
    try:
        if kind is float:
            return float(text)
        value = tomllib.loads(f"value = {text}")["value"]
        return convert(value, kind) if is_list else value
    except (ValueError, RecursionError):
        if not is_list:
            return text
        words = text.strip().removeprefix("[").removesuffix("]").split(",")
        return [
            _parse(word.strip(), get_args(kind)[0]) for word in words if word.strip()
        ]


# --- writing ---------------------------------------------------------------------------------


def to_toml(config: Any) -> str:
    """Return the config as TOML text that `load` reads back to an equal config."""
    blocks = []
    for name, _, keys in sections(config):
        lines = [f"[{name}]"] if name else []
        lines += [f"{_last(key)} = {to_toml_value(keys[key].value)}" for key in keys]
        blocks.append("\n".join(lines))
    return "\n\n".join(filter(None, blocks)) + "\n"


def to_toml_value(value: Any) -> str:
    """Return one value as TOML text."""
    if isinstance(value, dict):
        entries = [
            f"{to_toml_value(name)} = {to_toml_value(value[name])}" for name in value
        ]
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    # JSON is TOML, but for the delete character
    if isinstance(value, bool | int | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"a config holds no {type(value).__name__}: {value!r}")


# --- documenting -----------------------------------------------------------------------------


def title(part: Any) -> str:
    """Return the first line of what a section's class says of itself."""
    return inspect.getdoc(type(part)).partition("\n")[0]


def explain(key: Key) -> tuple[str, str]:
    """Return the meaning of a key with its limits, and its type."""
    kind = str(key.kind) if get_origin(key.kind) else key.kind.__name__
    return "; ".join(filter(None, (key.help, str(key.limits)))), kind


def describe(cls: type, width: int | None = None) -> str:
    """Return every key of a config with its default, meaning and type.

    The text is wrapped to `width` columns, by default those of the terminal.
    """
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = []
    for section_name, part, keys in sections(cls()):
        lines += (
            ["", f"[{section_name}] {title(part)}"] if section_name else [title(part)]
        )
        for name, key in keys.items():
            left = f"  {name}={to_toml_value(key.value)}"
            if len(left) > 32:
                lines.append(left)
                left = ""
            text = "{:34}{} ({})".format(left, *explain(key))
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 34)
    return "\n".join(lines)


# --- the command line ------------------------------------------------------------------------


def positional(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that are neither flags nor `key=value`."""
    return [word for word in argv if not word.startswith("-") and "=" not in word]


def parse_arguments(
    cls: type[T],
    argv: Sequence[str],
    usage: str,
    flags: Mapping[str, str] | None = None,
) -> tuple[T, set[str]]:
    """Return the config and the set of flags that a command line asks for.

    A command line has at most one TOML file, `key=value` words, and `flags`, which map each
    known flag (`--resume`) to its help. `--help` prints `usage`, the flags and all keys, and
    exits with 0.
    """
    flags = {**(flags or {}), "--help": "print this and exit"}
    if {"-h", "--help"} & set(argv):
        lines = [f"  {flag:32}{text}" for flag, text in flags.items()]
        print(usage.strip(), "", *lines, "", describe(cls), sep="\n")
        raise SystemExit(0)
    path = None
    overrides = []
    chosen = set()
    for word in argv:
        if word in flags:
            chosen.add(word)
        elif word.startswith("-"):
            hint = did_you_mean(word, flags) or f"expected one of {', '.join(flags)}"
            if "=" in word:
                hint = f"a key is set without dashes: {word.lstrip('-')}"
            raise ValueError(f"command line: unknown flag {word!r}; {hint}")
        elif "=" in word:
            overrides.append(word)
        elif path is None:
            path = word
        else:
            raise ValueError(
                f"command line: {word!r}: expected key=value; the config file is {path} already"
            )
    return load(cls, path, overrides), chosen

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

    config, flags = parse_arguments(Config, sys.argv[1:], __doc__, {"--resume": "continue from the last checkpoint"})

so that `train.py run.toml optim.lr=3e-6` works, `--help` lists every key, and `to_toml` writes
what was resolved. A section whose class has `PRESET = ("method", TABLE)` starts from the row
of TABLE that its key `method` names in place of its defaults; keys that are set win over the
row. Types: bool, int, float, str, list[T], dict[str, T], T | None and nested dataclasses. TOML
has no null: the word `none` stands for None wherever a key may be None. Every mistake is one
line naming the file and line (or "command line"), the key with its section, what was expected
and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import json
import operator
import re
import shutil
import textwrap
import tomllib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
KeyPath = tuple[str, ...]  # ("optim", "lr") is the key optim.lr

# --- declaring -------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[Any] | Callable[[], Collection[Any]] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A documented config key. Bounds and choices hold for the value, or for each entry of a
    list or a dict.

    `minimum` and `maximum` are inclusive, `above` and `below` are not. The default must keep
    to them as well. Choices that may still grow (a table of functions) are given as a
    function.
    """
    limits = {
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
    }
    metadata = {
        "help": help,
        **{name: limit for name, limit in limits.items() if limit is not None},
    }
    _check(default, metadata)
    if isinstance(default, list | dict):  # each config gets its own copy
        return dataclasses.field(
            default_factory=functools.partial(copy.deepcopy, default), metadata=metadata
        )
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type[T], **defaults: Any) -> T:
    """A nested dataclass as a section; `defaults` replace some of its defaults where it
    stands.
    """
    return dataclasses.field(default_factory=functools.partial(cls, **defaults))


# --- loading ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where values come from, to say so in errors: a TOML file with its text, or the command
    line.
    """

    name: str = "command line"
    text: str = ""

    def error(self, path: KeyPath, message: str) -> ValueError:
        line = _line_number(self.text, path)
        place = self.name if line is None else f"{self.name}:{line}"
        return ValueError(f"{place}: {_key(path)}: {message}")


def _key(path: KeyPath) -> str:
    """The key as it is written, or a Python string where that could not be read on one line."""
    name = ".".join(path)
    return name if name.isprintable() and len(name) <= 100 else f"{name!r:.100}"


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """A `cls` with the defaults, then the TOML file at `path`, then the `key=value` words,
    later ones winning.

    FileNotFoundError if there is no such file; ValueError of one line for anything in it or in
    the words that does not fit. A file's value replaces a default as a whole; the word
    `weights.format=0.1` sets one entry of the dict `weights`.
    """
    values: dict[KeyPath, Any] = {}
    if path is not None:
        source, table = _read_toml(Path(path))
        for key, value in _leaves(cls, table):
            _assign(cls, key, value, source, values)
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ValueError(f"command line: {word!r:.100}: expected key=value")
        if re.search("[\ud800-\udfff]", word):  # what Python makes of bytes that are no text
            raise ValueError(f"command line: {word!r:.100}: not UTF-8 text")
        key = tuple(name.strip().split("."))
        _assign(cls, key, _Text(text), _Source(), values)
    sources = [str(path)] * (path is not None) + ["command line"] * bool(overrides)
    return _build(cls(), values, (), " and ".join(sources))


def _read_toml(path: Path) -> tuple[_Source, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"config file not found: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return _Source(str(path), text), tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        reason = (
            "tables or lists in one another, too deep"
            if isinstance(error, RecursionError)
            else error
        )
        raise ValueError(f"{path}: not valid TOML: {reason}") from None


class _Text(str):
    """A value of the command line, not parsed yet."""


def _leaves(
    cls: type, table: Mapping[str, Any], path: KeyPath = ()
) -> Iterator[tuple[KeyPath, Any]]:
    """The keys of a TOML table with their values; tables that are sections of `cls` are
    entered.
    """
    kinds = _kinds(cls)
    for name, value in table.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(kinds.get(name)):
            yield from _leaves(kinds[name], value, (*path, name))
        else:
            yield (*path, name), value


def _assign(
    cls: type, path: KeyPath, value: Any, source: _Source, values: dict[KeyPath, Any]
) -> None:
    """Check one value against the option that `path` names and put it into `values`."""
    depth, kind, metadata = _resolve(cls, path)
    key = path[:depth]
    rest = path[depth:]
    if rest and get_origin(kind) is not dict:
        raise source.error(path, _unknown(cls, path, kind))
    if dataclasses.is_dataclass(kind):
        example = ".".join((*path, dataclasses.fields(kind)[0].name))
        raise source.error(
            path, f"this is a section, not a key; set its keys, for example {example}"
        )
    kind = get_args(kind)[1] if rest else kind
    try:
        value = _convert(_parse(str(value), kind) if isinstance(value, _Text) else value, kind)
        _check(value, metadata)
    except (ValueError, OverflowError) as error:
        raise source.error(path, str(error)) from None
    if rest:  # one entry of a dict
        value = {
            **values.get(key, functools.reduce(getattr, key, cls())),
            ".".join(rest): value,
        }
    values[key] = value


def _resolve(cls: type, path: KeyPath) -> tuple[int, Any, Mapping[str, Any]]:
    """How many names of `path` are known, the type they lead to, and the metadata of the last
    one.
    """
    kind = cls
    metadata = {}
    for depth, name in enumerate(path):
        known = (
            {field.name: field for field in dataclasses.fields(kind)}
            if dataclasses.is_dataclass(kind)
            else {}
        )
        if name not in known:
            return depth, kind, metadata
        kind = _kinds(kind)[name]
        metadata = known[name].metadata
    return len(path), kind, metadata


def _build(default: T, values: Mapping[KeyPath, Any], path: KeyPath, name: str) -> T:
    """`default` with `values` put in. Everything is set at once: a __post_init__ sees the
    resolved section.
    """
    changes = _preset(default, values, path)
    for field in dataclasses.fields(default):
        here = (*path, field.name)
        value = getattr(default, field.name)
        changes[field.name] = (
            _build(value, values, here, name)
            if dataclasses.is_dataclass(value)
            else values.get(here, changes.get(field.name, value))
        )
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:  # keys that do not go together
        where = f"[{'.'.join(path)}] " if path else ""
        raise ValueError(f"{name}: {where}{error}") from None


def _preset(default: Any, values: Mapping[KeyPath, Any], path: KeyPath) -> dict[str, Any]:
    """What a section's preset puts in place of its defaults: its class may name a key and a
    table of them as PRESET.
    """
    key, table = getattr(type(default), "PRESET", (None, {}))
    chosen = values.get((*path, key)) if key else None
    return copy.deepcopy(table[chosen]) if chosen is not None else {}


def _kinds(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


# --- values ----------------------------------------------------------------------------------

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}
_LIMITS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _convert(value: Any, kind: Any) -> Any:
    """A TOML value as the type `kind`, or ValueError: an int will do for a float, a bool never
    for a number.
    """
    inner = _without_none(kind)
    if inner is not kind and value in (None, "none"):
        return None
    if inner is float and type(value) is int:
        return float(value)
    if get_origin(inner) is list and isinstance(value, list):
        return [_convert(entry, get_args(inner)[0]) for entry in value]
    if get_origin(inner) is dict and isinstance(value, dict):
        return {name: _convert(entry, get_args(inner)[1]) for name, entry in value.items()}
    if type(value) is inner:
        return value
    expected = _WORDS[get_origin(inner) or inner] + (" or none" if inner is not kind else "")
    raise ValueError(f"expected {expected}, got {value!r:.100}")


def _without_none(kind: Any) -> Any:
    """T of `T | None`; any other type as it is."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(member for member in get_args(kind) if member is not type(None))
    return kind


def _parse(text: str, kind: Any) -> Any:
    """A word of the command line as a value for `kind`; what does not parse stays text, for
    `_convert` to refuse.
    """
    inner = _without_none(kind)
    if inner is not kind and text in ("", "none"):
        return None
    if inner is str:
        return text  # verbatim: the shell has already taken the quotes away
    if get_origin(inner) is list:
        return _parse_list(text, get_args(inner)[0])
    try:
        return float(text) if inner is float else tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _parse_list(text: str, kind: Any) -> list[Any]:
    """A TOML list, or words separated by commas with or without brackets: `[en,ja]`, `en,ja`."""
    try:
        return _convert(tomllib.loads(f"value = {text}")["value"], list[kind])
    except (ValueError, RecursionError):
        words = text.strip().removeprefix("[").removesuffix("]").split(",")
        return [_parse(word.strip(), kind) for word in words if word.strip()]


def _check(value: Any, metadata: Mapping[str, Any]) -> None:
    """ValueError if the value, or an entry of a list or a dict, is out of range or not among
    the choices.
    """
    entries = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else [value]
    )
    for entry in entries:
        if entry is None:
            continue
        limits = (
            holds(entry, metadata[name])
            for name, (_, holds) in _LIMITS.items()
            if name in metadata
        )
        in_range = entry == entry and all(limits)  # nan is not itself
        if not in_range or entry not in _choices(metadata, [entry]):
            what = "" if "choices" in metadata else "a number "
            raise ValueError(
                f"expected {(what + _range(metadata)).strip()}, got {entry!r:.100}"
            )


def _choices(metadata: Mapping[str, Any], default: Collection[Any] = ()) -> Collection[Any]:
    choices = metadata.get("choices", default)
    return choices() if callable(choices) else choices


def _range(metadata: Mapping[str, Any]) -> str:
    """`above 0 and at most 1`, `one of a, b`, or nothing."""
    if "choices" in metadata:
        return f"one of {', '.join(str(choice) or 'nothing' for choice in _choices(metadata))}"
    return " and ".join(
        f"{words} {metadata[name]}" for name, (words, _) in _LIMITS.items() if name in metadata
    )


def _unknown(cls: type, path: KeyPath, parent: Any) -> str:
    """What to say of a key that `parent`, the type of the last known part of the path, does
    not have.
    """
    known = [
        (*key, field.name)
        for key, part in _sections(cls())
        for field in dataclasses.fields(part)
    ]
    if near := difflib.get_close_matches(path[-1], {key[-1] for key in known}, n=1):
        same_name = [".".join(key) for key in known if key[-1] == near[0]]
        return f"unknown key; did you mean {difflib.get_close_matches('.'.join(path), same_name, n=1, cutoff=0)[0]}?"
    if dataclasses.is_dataclass(parent):
        return f"unknown key; expected one of {', '.join(field.name for field in dataclasses.fields(parent))}"
    return f"unknown key; {_key(path[:-1])} is not a section"


def _line_number(text: str, path: KeyPath) -> int | None:
    """The line of a TOML text that sets `path` or opens it as a table; found by reading the
    lines, so only a hint.
    """
    table: KeyPath = ()
    for number, line in enumerate(text.split("\n"), start=1):
        if header := re.match(r"\s*\[+([^\[\]]+)\]", line):
            here = table = tuple(name.strip(" \"'") for name in header[1].split("."))
        elif key := re.match(r"\s*([^=#\[\]]+?)\s*=", line):
            here = (*table, *(name.strip(" \"'") for name in key[1].split(".")))
        else:
            continue
        if here[: len(path)] == path:
            return number
    return None


# --- writing ---------------------------------------------------------------------------------


def to_toml(config: Any) -> str:
    """The config as TOML text that `load` reads back to an equal config."""
    blocks = []
    for path, part in _sections(config):
        lines = [f"[{'.'.join(path)}]"] if path else []
        lines += [
            f"{field.name} = {to_toml_value(getattr(part, field.name))}"
            for field in _options(part)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_toml_value(value: Any) -> str:
    """One value as TOML text."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):  # a JSON string is a TOML string, but for the delete character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_toml_value(name)} = {to_toml_value(entry)}' for name, entry in value.items())}}}"
    raise TypeError(f"a config holds no {type(value).__name__}: {value!r}")


def _sections(config: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The config itself and every section in it, outermost first."""
    yield path, config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _sections(value, (*path, field.name))


def _options(part: Any) -> list[dataclasses.Field]:
    """The fields of a section that are keys and not sections."""
    return [
        field
        for field in dataclasses.fields(part)
        if not dataclasses.is_dataclass(getattr(part, field.name))
    ]


# --- documenting -----------------------------------------------------------------------------


def _rows(part: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each key of a section."""
    kinds = _kinds(type(part))
    for field in _options(part):
        kind = kinds[field.name]
        value = getattr(part, field.name)
        meaning = "; ".join(filter(None, (field.metadata["help"], _range(field.metadata))))
        type_name = str(kind) if get_origin(kind) else kind.__name__
        yield field.name, type_name, "none" if value is None else to_toml_value(value), meaning


def _title(part: Any) -> str:
    return inspect.getdoc(type(part)).partition("\n")[0]


def describe(cls: type, width: int | None = None) -> str:
    """Every key of a config with its default, meaning and type, as text wrapped to `width`
    columns (the terminal's).
    """
    width = width or min(shutil.get_terminal_size().columns, 120)
    lines = []
    for path, part in _sections(cls()):
        lines += ["", f"[{'.'.join(path)}] {_title(part)}"] if path else [_title(part)]
        for name, kind, default, meaning in _rows(part):
            left = f"  {'.'.join((*path, name))}={default}"
            if len(left) > 32:
                lines.append(left)
                left = ""
            text = f"{meaning} ({kind})"
            lines += textwrap.wrap(
                text, width, initial_indent=left.ljust(34), subsequent_indent=" " * 34
            )
    return "\n".join(lines)


def reference(classes: Mapping[str, type]) -> str:
    """A Markdown page: for each heading and its config class, one table of keys per section."""
    lines = []
    for heading, cls in classes.items():
        lines += [f"## {heading}", ""]
        for path, part in _sections(cls()):
            lines += [f"### `[{'.'.join(path)}]`", ""] if path else []
            lines += [_title(part), ""]
            lines += (
                ["| key | type | default | meaning |", "|---|---|---|---|"]
                if _options(part)
                else []
            )
            for name, kind, default, meaning in _rows(part):
                key = ".".join((*path, name))
                cells = f"`{key}`", f"`{kind}`", f"`{default}`", meaning
                lines.append(
                    f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
                )
            lines.append("")
    return "\n".join(lines)


# --- the command line ------------------------------------------------------------------------


def parse_arguments(
    cls: type[T], argv: Sequence[str], usage: str, flags: Mapping[str, str] | None = None
) -> tuple[T, set[str]]:
    """The config and the flags that a command line asks for: at most one TOML file,
    `key=value` words, and `flags`.

    `flags` maps each known flag (`--resume`) to its help. `--help` prints `usage`, the flags
    and all keys, and exits 0.
    """
    flags = {**(flags or {}), "--help": "print this and exit"}
    if not {"-h", "--help"}.isdisjoint(argv):
        print(
            usage.strip(),
            "",
            *(f"  {flag:32}{text}" for flag, text in flags.items()),
            "",
            describe(cls),
            sep="\n",
        )
        raise SystemExit(0)
    path = None
    overrides = []
    chosen = set()
    for word in argv:
        if word.startswith("-"):
            chosen.add(_known_flag(word, flags))
        elif "=" in word:
            overrides.append(word)
        elif path is None:
            path = word
        else:
            raise ValueError(
                f"command line: {word!r}: expected key=value; the config file is {path} already"
            )
    return load(cls, path, overrides), chosen


def _known_flag(word: str, flags: Mapping[str, str]) -> str:
    if word in flags:
        return word
    if "=" in word:
        raise ValueError(
            f"command line: unknown flag {word!r}; a key is set without dashes: {word.lstrip('-')}"
        )
    near = difflib.get_close_matches(word, flags, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(flags)}"
    raise ValueError(f"command line: unknown flag {word!r}; {hint}")

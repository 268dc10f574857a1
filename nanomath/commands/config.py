"""Print what every config key means, as a Markdown page.

python -m nanomath config > docs/config.md
"""

from __future__ import annotations

from nanomath import settings
from nanomath.algorithms import PRESETS
from nanomath.config import explain, sections, title, to_toml_value

PAGE = """# Every config key

Made by `python -m nanomath config`. A config is a TOML file; any key can be set on the command
line, after the file, as `section.key=value`. `--help` of a script or a command lists its own
keys in the terminal.
"""


METHODS = """## The methods

What `algorithm.method` sets otherwise than GRPO;
[nanomath/algorithms/README.md](../nanomath/algorithms/README.md) explains the axes.

| method | keys of `[algorithm]` |
|---|---|"""

SETTINGS = {  # what each command reads
    "train_sft.py": settings.SFTConfig,
    "train_grpo.py": settings.GRPOConfig,
    "python -m nanomath eval": settings.EvalConfig,
    "python -m nanomath eval general": settings.GeneralConfig,
    "python -m nanomath transfer": settings.TransferConfig,
    "python -m nanomath sample": settings.SampleConfig,
    "python -m nanomath merge": settings.MergeConfig,
    "python -m nanomath drift": settings.DriftConfig,
    "python -m nanomath prm label": settings.LabelConfig,
    "python -m nanomath prm train": settings.PRMConfig,
    "python -m nanomath prm eval": settings.PRMEvalConfig,
}


def methods() -> str:
    """Return PRESETS as a Markdown table."""
    rows = [METHODS]
    for name, changes in PRESETS.items():
        keys = ", ".join(
            f"`{key} = {to_toml_value(value)}`" for key, value in changes.items()
        )
        rows.append(f"| `{name}` | {keys or 'the defaults below'} |")
    return "\n".join(rows) + "\n"


# A command, the name of a section in its config, the section.
Place = tuple[str, str, object]


def reference() -> str:
    """Return a Markdown table of the keys of each kind of section, with who reads it."""
    found: dict[type, list[Place]] = {}
    for command, config in SETTINGS.items():
        for name, part, keys in sections(config()):
            if keys:
                place = (command.removeprefix("python -m "), name, part)
                found.setdefault(type(part), []).append(place)
    return "\n".join(table(kind(), places) for kind, places in found.items())


def table(part: object, places: list[Place]) -> str:
    """Return the keys of a section with their defaults, and those of its places that differ."""
    names = dict.fromkeys(f"`[{name}]`" for _, name, _ in places if name)
    readers = ", ".join(dict.fromkeys(f"`{command}`" for command, _, _ in places))
    lines = [f"## {', '.join(names) or f'{readers}: keys without a section'}", ""]
    lines += [title(part), "", f"Read by {readers}.", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    _, _, keys = next(sections(part))
    for name, key in keys.items():
        default = to_toml_value(key.value)
        others: dict[str, list[str]] = {}
        for command, section, there in places:
            value = to_toml_value(getattr(there, name))
            if value != default:
                others.setdefault(value, []).append(f"`[{section}]` of `{command}`")
        different = [
            f"; `{value}` in {', '.join(where)}" for value, where in others.items()
        ]
        meaning, kind = explain(key)
        cells = [f"`{name}`", f"`{kind}`", f"`{default}`" + "".join(different), meaning]
        lines.append(
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        )
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    if argv:
        raise ValueError(f"config takes no arguments, got {argv[0]!r}")
    print(PAGE)
    print(methods())
    print(reference())
    return 0

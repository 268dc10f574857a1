"""Print what every config key means, as a Markdown page.

python -m nanomath config > docs/config.md
"""

from __future__ import annotations

from nanomath import settings
from nanomath.algorithms import PRESETS
from nanomath.config import reference, to_toml_value

PAGE = """# Every config key

Made by `python -m nanomath config`. A config is a TOML file; any key can be set on the command line, after the file, as
`section.key=value`. `--help` of a script or a command lists its own keys in the terminal.
"""


METHODS = """## The methods

What `algorithm.method` sets otherwise than GRPO; [nanomath/algorithms/README.md](../nanomath/algorithms/README.md)
explains the axes.

| method | keys of `[algorithm]` |
|---|---|"""

SETTINGS = {  # what each command reads
    "train_sft.py": settings.SFTConfig,
    "train_grpo.py": settings.GRPOConfig,
    "python -m nanomath eval": settings.EvalConfig,
    "python -m nanomath sample": settings.SampleConfig,
    "python -m nanomath prm label": settings.LabelConfig,
    "python -m nanomath prm train": settings.PRMConfig,
    "python -m nanomath prm eval": settings.PRMEvalConfig,
}


def methods() -> str:
    """PRESETS as a Markdown table."""
    rows = [METHODS]
    for name, changes in PRESETS.items():
        keys = ", ".join(f"`{key} = {to_toml_value(value)}`" for key, value in changes.items())
        rows.append(f"| `{name}` | {keys or 'the defaults below'} |")
    return "\n".join(rows) + "\n"


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    if argv:
        raise ValueError(f"config takes no arguments, got {argv[0]!r}")
    print(PAGE)
    print(methods())
    print(reference(SETTINGS))
    return 0

"""How much must be read to follow one GRPO step from its script to the loss, and to a token?

    python tests/reading_way.py

One step of train_grpo.py is made with a small model, and every function of nanomath that runs
is noted: from the call of the update to the first return of the objective, and from the call
for samples to the completions. A way is the script and the files of these functions. Printed
are its files, its lines, its code tokens (comments, docstrings and line ends are none), and the
tokens of the functions that ran alone. Kernels are not counted: a way ends at their names.
"""

from __future__ import annotations

import ast
import io
import sys
import tempfile
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_grpo.py"
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
# By the name of a way: the function that the script calls, and the one that ends it.
WAYS = {
    "the loss": ("PolicyStep.step", "policy_objective"),
    "a token": ("sample_episodes", "Sampler.generate"),
}


def code_tokens(path: Path) -> dict[int, int]:
    """Code tokens of a file by the line they begin on."""
    source = path.read_text(encoding="utf-8")
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    counts: dict[int, int] = {}
    # Depth in f-strings: from Python 3.12 on each has tokens inside, before it is one
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        name = tokenize.tok_name[token.type]
        inside -= name == "FSTRING_END"
        if token.type not in NO_CODE and line not in prose and not inside:
            counts[line] = counts.get(line, 0) + (name != "FSTRING_END")
        inside += name == "FSTRING_START"
    return counts


@dataclass
class Way:
    """The functions that ran, and the files they are in."""

    functions: set[CodeType] = field(default_factory=set)

    @property
    def files(self) -> list[Path]:
        return sorted({SCRIPT, *(Path(code.co_filename) for code in self.functions)})

    def table(self) -> list[tuple[str, int, int, int]]:
        """Name, lines, code tokens, and tokens of the functions that ran, of every file."""
        rows = []
        for path in self.files:
            counts = code_tokens(path)
            lines = len(path.read_text(encoding="utf-8").splitlines())
            ran = {line for code in self.functions for line in lines_of(code, path)}
            of_these = sum(counts.get(line, 0) for line in ran)
            name = path.relative_to(ROOT).as_posix()
            rows.append((name, lines, sum(counts.values()), of_these))
        return rows


def lines_of(code: CodeType, path: Path) -> set[int]:
    if code.co_filename != str(path):
        return set()
    numbers = [number for _, _, number in code.co_lines() if number]
    return set(range(code.co_firstlineno, max(numbers) + 1))


def trace(argv: list[str]) -> dict[str, Way]:
    """Run train_grpo.py with the arguments; return what ran on each of the WAYS."""
    sys.path.insert(0, str(ROOT))
    import train_grpo

    ways = {name: Way({train_grpo.main.__code__}) for name in WAYS}
    inside: dict[str, FrameType] = {}
    ended: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> Callable | None:
        """What Python calls at the call of every function (`sys.settrace`)."""
        code = frame.f_code
        for name, (start, _) in WAYS.items():
            if code.co_qualname == start and name not in ended:
                inside[name] = frame
        if inside and code.co_filename.startswith(str(ROOT / "nanomath")):
            for name in inside:
                ways[name].functions.add(code)
        return at_end if code.co_qualname in ends else None

    def at_end(frame: FrameType, event: str, argument: Any) -> Callable:
        """What it calls at every line of a function that ends a way, and at its return."""
        if event == "return":
            for name, (_, end) in WAYS.items():
                if frame.f_code.co_qualname == end and inside.pop(name, None):
                    ended.add(name)
            if len(ended) == len(WAYS):
                sys.settrace(None)
        return at_end

    ends = {end for _, end in WAYS.values()}
    sys.settrace(note)
    try:
        train_grpo.main(argv)
    finally:
        sys.settrace(None)
    return ways


def small_run(directory: Path) -> list[str]:
    """Arguments of train_grpo.py for one step of the tiny config, from a model with no training."""
    import nanomath
    from nanomath import settings
    from nanomath.training.build import build_model

    model, tokenizer = build_model(settings.Model(device="cpu"), seed=0)
    nanomath.save_model(model, tokenizer, directory / "model")
    return [
        str(ROOT / "configs" / "tiny" / "grpo.toml"),
        f"model.path={directory / 'model'}",
        f"run.directory={directory}",
        "run.steps=1",
        "train.limit=32",
        "grpo.prompts=2",
        "heldout.limit=2",
        "sampling.max_new_tokens=8",
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        ways = trace(small_run(Path(directory)))
    for name, way in ways.items():
        rows = way.table()
        print(f"from {SCRIPT.name} to {name}: {len(rows)} files")
        rows.append(
            ("together", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
        )
        print(f"  {'lines':>6}{'tokens':>8}{'that ran':>10}")
        for path, lines, tokens, ran in rows:
            print(f"  {lines:>6}{tokens:>8}{ran:>10}  {path}")


if __name__ == "__main__":
    main()

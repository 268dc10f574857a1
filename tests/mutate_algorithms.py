"""Do the tests of the algorithms notice a wrong sign, a lost detach, a boundary off by one?
Change each and see.

    python tests/mutate_algorithms.py                                 all of nanomath/algorithms
    python tests/mutate_algorithms.py nanomath/algorithms/losses.py   some of its files

A mutant is a file with one change. Each is put in place of the original in a forked process,
no file on disk is changed, and tests/algorithms runs until the first failure; for objective.py
the tests of the policy step, and for what it hands a whole rollout to, both. Printed are the
mutants that no test noticed: holes in the tests, or changes that change nothing. All that remain
are of the second kind: the number that fills places of weight 0, which element all are compared
with, < or <= where both branches are 0, and guards of what is masked out further on.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch must not start threads before the fork

import hypothesis
import pytest
import torch  # noqa: F401  (imported once, here, and not by every fork)

ROOT = Path(__file__).parents[1]
SECONDS = 60
OPERATORS = {
    **{
        ast.Add: [ast.Sub],
        ast.Sub: [ast.Add],
        ast.Mult: [ast.Div],
        ast.Div: [ast.Mult],
    },
    **{
        ast.BitAnd: [ast.BitOr],
        ast.BitOr: [ast.BitAnd],
        ast.And: [ast.Or],
        ast.Or: [ast.And],
    },
    **{
        ast.Lt: [ast.LtE, ast.GtE],
        ast.LtE: [ast.Lt, ast.Gt],
        ast.Gt: [ast.GtE, ast.LtE],
        ast.GtE: [ast.Gt, ast.Lt],
    },
    **{
        ast.Eq: [ast.NotEq],
        ast.NotEq: [ast.Eq],
        ast.In: [ast.NotIn],
        ast.NotIn: [ast.In],
    },
}
RENAMED = {
    "minimum": "maximum",
    "maximum": "minimum",
    "all": "any",
    "any": "all",
    "min": "max",
    "max": "min",
}
DROPPED = ("detach", "square", "exp", "sqrt", "expand_as")


def variants(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What the node may become, each with the words for it."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op):
            yield from (
                (f"-> {new.__name__}", changed(node, op=new()))
                for new in OPERATORS.get(type(op), [])
            )
            if isinstance(node, ast.BinOp) and getattr(node.right, "id", "") == "eps":
                yield "drop eps", node.left
        case ast.Compare(ops=ops):
            for k, op in enumerate(ops):
                for new in OPERATORS.get(type(op), []):
                    yield (
                        f"-> {new.__name__}",
                        changed(node, ops=[*ops[:k], new(), *ops[k + 1 :]]),
                    )
        case ast.UnaryOp(op=op, operand=operand):
            yield f"drop {type(op).__name__}", operand
        case ast.Call(func=ast.Attribute(value=value, attr="where"), args=args):
            yield from (
                ("where -> its first", args[1]),
                ("where -> its second", args[2]),
            )
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in DROPPED:
            yield f"drop .{attr}()", value
        case ast.Attribute(attr=attr) if attr in RENAMED:
            yield f"{attr} -> {RENAMED[attr]}", changed(node, attr=RENAMED[attr])
        case ast.keyword(arg="min" | "max" as arg):
            yield f"{arg}= -> {RENAMED[arg]}=", changed(node, arg=RENAMED[arg])
        case ast.Raise():
            yield "drop raise", ast.Pass()
        case ast.Constant(value=value):
            yield from (
                (f"{value!r} -> {new!r}", ast.Constant(new))
                for new in other_constants(value, parent)
            )


def changed(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def other_constants(value: object, parent: ast.AST) -> list[object]:
    """Strings only where they name something: neither docstrings nor messages."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        # Of a matrix, 1 and -1 are one
        same_axis = value == 1 and isinstance(parent, ast.keyword | ast.Subscript)
        return [
            value + 1,
            *([0] if value else []),
            *([-value] if value and not same_axis else []),
        ]
    named = (
        isinstance(value, str)
        and re.fullmatch(r"[\w+]+", value)
        and not isinstance(parent, ast.JoinedStr)
    )
    return [f"{value}?"] if named else []


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, words for the change, and the changed module."""

    def places(tree: ast.Module) -> list[tuple[ast.AST, str, ast.AST]]:
        typed = [
            getattr(node, key, None)
            for node in ast.walk(tree)
            for key in ("annotation", "returns")
        ]
        skip = {
            id(node)
            for annotation in typed
            if annotation
            for node in ast.walk(annotation)
        }
        pairs = [
            (node, parent)
            for parent in ast.walk(tree)
            for node in ast.iter_child_nodes(parent)
        ]
        return [
            (node, *new)
            for node, parent in pairs
            if id(node) not in skip
            for new in variants(node, parent)
        ]

    for index in range(len(places(ast.parse(source)))):
        tree = ast.parse(source)
        old, words, new = places(tree)[index]
        swap = ast.NodeTransformer()
        swap.visit = lambda node: new if node is old else swap.generic_visit(node)  # noqa: B023
        yield old.lineno, words, ast.fix_missing_locations(swap.visit(tree))


class Substitute(MetaPathFinder, SourceFileLoader):
    """Import this tree in place of the file."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
            ".__init__"
        )
        SourceFileLoader.__init__(self, module, str(path))
        self.tree = tree

    def find_spec(self, fullname: str, path: object, target: object = None):
        return (
            spec_from_file_location(fullname, self.path, loader=self)
            if fullname == self.name
            else None
        )

    def get_code(self, fullname: str):
        return compile(self.tree, self.path, "exec")


def survives(path: Path, tree: ast.Module) -> bool:
    """Whether all tests pass; a test that hangs has noticed."""
    child = os.fork()
    if child == 0:
        # Of CPU: a busy machine is no hang
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.meta_path.insert(0, Substitute(path, tree))
        own_first = sorted(
            (ROOT / "tests/algorithms").glob("test_*.py"),
            key=lambda test: path.stem not in test.stem,
        )
        tests = ["--noconftest", *own_first]
        of_the_step = [
            ROOT / "tests/training/test_process_step.py",
            ROOT / "tests/training/test_policy_step.py",
        ]
        if path.name == "objective.py":
            tests = of_the_step
        elif path.name in ("credit.py", "lessons.py", "value.py"):
            tests = [*own_first, *of_the_step]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *map(str, tests)]))
    return os.waitpid(child, 0)[1] == 0


def main(paths: list[Path]) -> None:
    quiet = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutants", database=None, derandomize=True, phases=quiet
    )
    hypothesis.settings.load_profile("mutants")
    unnoticed = 0
    for path in paths:
        source, before, count = path.read_text(encoding="utf-8"), unnoticed, 0
        if not survives(path, ast.parse(source)):
            raise RuntimeError(
                f"unchanged, the tests fail or take {SECONDS} s: it can teach nothing"
            )
        for count, (line, words, tree) in enumerate(mutants(source), start=1):  # noqa: B007
            if survives(path, tree):
                unnoticed += 1
                print(
                    f"{path.name}:{line}: {words}    {source.splitlines()[line - 1].strip()}",
                    flush=True,
                )
        print(
            f"{path.name}: {count} mutants, {unnoticed - before} not noticed",
            flush=True,
        )


if __name__ == "__main__":
    os.chdir(ROOT)
    chosen = [Path(argument).resolve() for argument in sys.argv[1:]]
    main(chosen or sorted((ROOT / "nanomath/algorithms").glob("*.py")))

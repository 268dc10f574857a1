"""What entry points share: words that are no config, and how it ends when something goes wrong.

A mistake of the user ends in one line and exit code 2, a failed run in exit code 1.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nanomath.config import positional
from nanomath.training.runlog import RunFailed


def parse_words(
    argv: Sequence[str], option: str, usage: str
) -> tuple[list[str], str | None]:
    """Return the words of a command line but OPTION=VALUE, and its last value (None: it is not
    there). `--help` prints `usage` and exits with 0.
    """
    if {"-h", "--help"} & set(argv):
        print(usage)
        raise SystemExit(0)
    names = [word for word in argv if not word.startswith(f"{option}=")]
    values = [word.split("=", 1)[1] for word in argv if word not in names]
    return names, values[-1] if values else None


def operands(argv: Sequence[str], needed: str) -> tuple[list[str], list[str]]:
    """Return the first two words that are neither flags nor `key=value`, and all other words.
    ValueError(needed) where there are no two, unless `--help` is asked for.
    """
    two = positional(argv)[:2]
    if len(two) < 2 or "" in two:
        if not {"-h", "--help"} & set(argv):
            raise ValueError(needed)
        two = ["", ""]
    return two, [word for word in argv if word not in two]


def run_main(
    main: Callable[[list[str]], int | None], argv: list[str] | None = None
) -> None:
    """Call main(argv) and exit with its code.

    The codes are 0: done, 1: a run failed or was stopped, 2: bad usage, config or files.
    NANOMATH_TRACEBACK=1 shows where an error comes from.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        if "RANK" in os.environ:  # one of torchrun's processes
            from nanomath.training import ranks

            ranks.finish()
            _leave(code)
    except (RunFailed, FloatingPointError) as error:
        code = _complain(error, 1)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = None
        code = 0
    except (ValueError, OSError, ImportError) as error:
        code = _complain(error, 2)
    except (MemoryError, RuntimeError) as error:
        from nanomath.training import failure, ranks  # not above: --help needs no torch

        lost = ranks.lost(error)
        if not (lost or failure.out_of_memory(error)):
            raise
        code = _complain(lost or error, 1)
    except KeyboardInterrupt:
        code = _complain("interrupted", 1)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End one of torchrun's processes without the interpreter's own end.

    The groups of a sharded model have threads that outlive them, and one that still gives a
    tensor back would then abort the process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _complain(error: BaseException | str, code: int) -> int:
    if isinstance(error, BaseException) and os.environ.get("NANOMATH_TRACEBACK"):
        raise error
    message = str(error)
    if not isinstance(error, RunFailed):  # whose lines were meant as such
        message = message.replace("\n", " ")
    print(f"error: {message}", file=sys.stderr)
    return code

"""What every entry point shares: mistakes of the user end in one line and exit code 2, failed runs in 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run_main(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Call main(argv) and exit with its code; NANOMATH_TRACEBACK=1 shows where an error comes from.

    0 done, 1 a run failed or was stopped, 2 bad usage, config or files.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
    except FloatingPointError as error:
        code = _complain(error, 1)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = None
        code = 0
    except (ValueError, OSError, ImportError) as error:
        code = _complain(error, 2)
    except KeyboardInterrupt:
        code = _complain("interrupted", 1)
    sys.exit(code)


def _complain(error: BaseException | str, code: int) -> int:
    if isinstance(error, BaseException) and os.environ.get("NANOMATH_TRACEBACK"):
        raise error
    print("error:", *str(error).split("\n"), file=sys.stderr)
    return code

"""The ``tidegate`` command: runs a verb, and makes a line and an exit code of what ends it.

Exit codes: 0 done; 1 refused, or ``doctor`` found a failure; 2 wrong usage, wrong settings, or no
Tidegate to ask; 70 a fault of Tidegate's own; 130 interrupted. Errors are one line each, on
standard error.

Nothing is imported at the top that takes time: Ctrl-C must be no traceback from the first moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.cli.base import Effects

FAULT = 70
INTERRUPTED = 130
DEBUG_VARIABLE = "TIDEGATE_DEBUG"


def main(arguments: Sequence[str] | None = None, effects: Effects | None = None) -> int:
    """Run the command line and return its exit code; no exception and no traceback leaves it."""
    if arguments is None and sys.argv[1:2] == ["up"]:
        # A reload during the start must not end it. ``take_signals`` takes it when all is there.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    given = None if arguments is None else list(arguments)

    def run() -> int:
        from gateway.cli.import_check import assert_ours

        assert_ours()
        from gateway.cli.base import Effects
        from gateway.cli.verbs import make_command

        result = make_command().main(
            args=given, prog_name="tidegate", standalone_mode=False, obj=effects or Effects()
        )
        return result if isinstance(result, int) else 0

    return guard(run)


def guard(run: Callable[[], int]) -> int:
    """Run it; what it raises becomes its line on standard error and its exit code."""
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader had enough (`| head`). What is left in the buffer must not complain at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: a line instead of a traceback
        return INTERRUPTED if _is_interrupt(error) else _ended(error)


def _is_interrupt(error: BaseException) -> bool:
    """Whether this was raised because Ctrl-C came in the middle of something: a ``finally`` that
    fails then replaces the ``KeyboardInterrupt``."""
    context = error.__context__
    return context is not None and (
        isinstance(context, KeyboardInterrupt) or _is_interrupt(context)
    )


def _ended(error: Exception) -> int:
    """The line and the exit code of what a verb raised."""
    import typer

    from gateway.cli.client import RequestRefused, SettingsRefused, Unreachable
    from gateway.cli.import_check import NotOursError
    from gateway.terminal import complain
    from modelcache.types import CacheError

    # typer brings its own copy of click in some versions; this is its usage errors' class there.
    usage_problem = typer.BadParameter.__mro__[2]
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if isinstance(error, RequestRefused | CacheError):
        complain(" ".join(str(error).split()))
        return 1
    if isinstance(error, SettingsRefused):
        for line in str(error).splitlines():
            complain(line)
        return 2
    if isinstance(error, Unreachable | NotOursError):
        complain(str(error))
        return 2
    if isinstance(error, usage_problem):
        return _usage(error)
    return _failed(error)


def _usage(error: Exception) -> int:
    """What is wrong with a command line, and where to read about it."""
    from gateway.terminal import complain, out

    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        out(message if message.endswith("\n") else f"{message}\n")
        return 2
    path = context.command_path if context is not None else "tidegate"
    complain(f"{' '.join(message.split())} (try `{path} --help`)")
    return 2


def _failed(error: Exception) -> int:
    """Wrong settings, a line each; anything else is a fault of ours, in one line."""
    import traceback

    from gateway.settings.load import ConfigError
    from gateway.terminal import complain

    if isinstance(error, ConfigError):
        for problem in error.problems:
            complain(str(problem))
        return 2
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    at = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(at[-1].filename)}:{at[-1].lineno}" if at else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    complain(f"internal error{where}: {text} ({DEBUG_VARIABLE}=1 shows the traceback)")
    return FAULT


if __name__ == "__main__":
    sys.exit(main())

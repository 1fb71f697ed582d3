"""The ``tidegate`` command: runs a verb, and makes a line and an exit code of what ends it.

Exit codes: 0 done; 1 refused, or ``doctor`` found a failure; 2 wrong usage, wrong settings, or no
Tidegate to ask; 70 a fault of Tidegate's own; 130 interrupted. Errors are one line each, on
standard error.

Nothing is imported at the top but what Python has at its start: Ctrl-C must be no traceback from
our first line on. What comes before that, the interpreter's own start, is not ours to guard.

The packages' names are plain words (``router``, ``gateway``), so another distribution in the same
environment, or a folder on ``PYTHONPATH``, could stand before or over them. ``assert_ours`` looks
at that before anything is imported, because what it causes otherwise is hard to recognise.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gateway.cli.base import Effects

FAULT = 70
INTERRUPTED = 130
DEBUG_VARIABLE = "TIDEGATE_DEBUG"
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
"""The signals that would end a process that does not take them."""

LEAVES = {
    "gateway": "datapath/worker",
    "autoscaler": "policy/decide",
    "loaders": "weights/plan",
    "forecaster": "types",
    "modelcache": "refs",
    "router": "pick",
}
"""Each package with a module that it has and another package of the same name would not."""


def main(arguments: Sequence[str] | None = None, effects: Effects | None = None) -> int:
    """Run the command line and return its exit code; no exception and no traceback leaves it."""
    serves = arguments is None and sys.argv[1:2] in (["up"], ["agent"], ["adapter"])
    given = None if arguments is None else list(arguments)

    def run() -> int:
        if serves:
            # A reload during the start must not end it. ``take_signals`` takes it when all is
            # there, and the others too: before that there is nothing to put in order.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            leave_on({signal.SIGINT}, INTERRUPTED)
            leave_on({signal.SIGTERM, signal.SIGQUIT}, 0)
            if os.getpid() == 1:
                be_init()
        assert_ours()
        from gateway.cli.base import Effects
        from gateway.cli.verbs import make_command

        result = make_command().main(
            args=given, prog_name="tidegate", standalone_mode=False, obj=effects or Effects()
        )
        return result if isinstance(result, int) else 0

    code = guard(run)
    if serves:
        # One more signal cuts what Python still waits for (threads), and keeps the exit code; after
        # that, where the interpreter gives up its handlers, it must do nothing.
        import atexit

        leave_on(ENDING, code)
        for number in ENDING:
            atexit.register(signal.signal, number, signal.SIG_IGN)
    return code


def leave_on(numbers: set[signal.Signals], code: int) -> None:
    """Have each of these signals end this process at once with this exit code.

    Not by an exception: one that is raised at any odd moment is lost in a destructor, or replaced.
    """
    for number in numbers:
        signal.signal(number, lambda *_: os._exit(code))


def be_init() -> None:
    """Be process 1 of a container, and run the command in a child; returns in the child only.

    The kernel makes process 1 the parent of every orphan, and it has to reap each that ends.
    Signals are passed on, and this ends as the child does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:
        number = signal.sigwait({*ENDING, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        pid, status = os.waitpid(-1, os.WNOHANG)
        while pid:
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)
            pid, status = os.waitpid(-1, os.WNOHANG)


def guard(run: Callable[[], int]) -> int:
    """Run it; what it raises becomes its line on standard error and its exit code."""
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader had enough (`| head`). What is left in the buffer must not complain at exit.
        import contextlib

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

    from gateway.cli.client import RequestRefused, SettingsRefused, Unreachable, ValueRefused
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
    if isinstance(error, ValueRefused | Unreachable | NotOursError):
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
    complain(f"{' '.join(message.split())}{_not_given(error, message)} (try `{path} --help`)")
    return 2


def _not_given(error: Exception, message: str) -> str:
    """The value that was refused, where typer does not say it."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return ""
    given = str(error.__cause__.errors()[0]["input"])
    return "" if given in message else f", not {given}"


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


# ── Whose packages they are ───────────────────────────────────────────────────────────────────────


class NotOursError(ImportError):
    """Another distribution has a package of that name; the message says where it lies."""


def assert_ours(
    root: Path | None = None, locate: Callable[[str], Path | None] | None = None
) -> None:
    """Raise ``NotOursError`` unless every package lies where this one does, and has our modules.

    ``root`` is the directory that holds the packages, by default that of this very file; ``locate``
    finds where a package would be imported from. Nothing is imported.
    """
    from pathlib import Path

    root = (root or Path(__file__).resolve().parents[2]).resolve()
    for package, leaf in LEAVES.items():
        found = (locate or _locate)(package)
        if found is None:
            raise NotOursError(
                f"the package {package!r} of Tidegate cannot be found; install Tidegate again"
            )
        if found == root / package and not (found / f"{leaf}.py").is_file():
            raise NotOursError(
                f"{found} is not Tidegate's package {package!r}, or incomplete ({leaf}.py is not "
                "there): another package of that name was installed over it; install Tidegate "
                "again, in an environment of its own"
            )
        if found != root / package:
            raise NotOursError(
                f"the package {package!r} would be imported from {found}, which is not Tidegate's "
                f"({root / package}): give Tidegate an environment of its own, and no PYTHONPATH"
            )


def _locate(package: str) -> Path | None:
    """The directory a package would be imported from."""
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve().parent
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None


if __name__ == "__main__":
    sys.exit(main())

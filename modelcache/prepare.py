"""Makes of a model what its pool wants: steps run one after another, each result kept.

A result's key is a digest of what it is made of, how, and with which tools; where the key is known
nothing is run. Steps run in the engine's environment, as processes that end with this one. What an
interrupted step left is gone on with if the step can, and one step at a time makes each result,
over all processes of the node.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelcache.prepare_run import Run, run_step
from modelcache.prepare_types import (
    INPUT,
    OUTPUT,
    PYTHON,
    TOOLS,
    Outputs,
    Prepared,
    Step,
    StepFailed,
    StepRun,
    step_key,
)
from modelcache.types import Cancelled, NoSpace, Progress

LEFTOVER_S = 7 * 86_400.0
"""Seconds after which what an interrupted step left is no longer kept for it."""

PROGRAM_MOST_BYTES = 64 * 1024 * 1024
"""Largest file among a command's arguments whose content is part of the step's key."""

WAIT_S = 0.1
GROWTH: Mapping[str, float] = {"gguf_to_safetensors": 5.0, "cast": 2.0, "tp_shard": 1.5}
"""Room that must be free before a step begins, as a multiple of its input."""

FOREIGN = frozenset({"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP"})

VERSIONS = """\
import importlib.metadata as m, json, sys
def v(n):
    try: return m.version(n)
    except m.PackageNotFoundError: return ""
print(json.dumps({n: v(n) for n in sys.argv[1:]}))
"""

AskVersions = Callable[[Path, Sequence[str]], Mapping[str, str]]


class FolderOutputs:
    """Results as folders below one folder, for whoever has no model cache."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, key: str) -> Path | None:
        """The folder with this result; ``None`` if there is none."""
        path = self._directory / key
        return path if path.is_dir() else None

    def publish(self, key: str, directory: Path) -> Path:
        """Move a folder, synced, to where it is found from now on."""
        for path in sorted(directory.rglob("*")):
            _sync(path)
        _sync(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        directory.rename(self._directory / key)
        _sync(self._directory)
        return self._directory / key


@dataclass(slots=True, kw_only=True)
class Preparation:
    """Runs steps. ``directory`` is for work, logs and locks; ``python`` the engine's interpreter;
    ``environ`` what commands see of the environment."""

    directory: Path
    python: Path
    outputs: Outputs
    environ: Mapping[str, str]
    ask_versions: AskVersions | None = None

    def prepare(
        self,
        source: Path,
        digest: str,
        steps: Sequence[Step],
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prepared:
        """The model in ``source``, whose ``input_digest`` is ``digest``, after all steps.

        Blocks as long as it takes; ``source`` must stay meanwhile. Raises ``StepFailed``,
        ``NoSpace``, or ``Cancelled`` soon after ``cancelled()`` turns true.
        """
        self._sweep()
        runs: list[StepRun] = []
        path = source
        for step, key in zip(steps, self.keys(digest, steps), strict=True):
            began_s = time.monotonic()
            found = self.outputs.find(key)
            log = None
            if found is None:
                with self._alone(key, on_progress, cancelled) as lock:
                    found = self.outputs.find(key)
                    if found is None:
                        log = self.directory / "logs" / f"{key}.log"
                        found = self._make(step, key, path, log, lock, on_progress, cancelled)
            elapsed_s = time.monotonic() - began_s
            runs.append(
                StepRun(kind=step.kind, key=key, cached=log is None, elapsed_s=elapsed_s, log=log)
            )
            path = found
        return Prepared(path=path, key=runs[-1].key if runs else digest, runs=tuple(runs))

    def find(self, digest: str, steps: Sequence[Step]) -> Path | None:
        """Where the model is after all steps, if that was made already."""
        keys = self.keys(digest, steps)
        return self.outputs.find(keys[-1]) if keys else None

    def keys(self, digest: str, steps: Sequence[Step]) -> list[str]:
        """The key of each step's result. Raises ``StepFailed`` where the engine's interpreter
        cannot be asked for its versions."""
        names = sorted({name for step in steps for name in TOOLS[step.kind]})
        ask = self.ask_versions or _ask_versions
        tools = ask(self.python, names) if names else {}
        found = []
        for step in steps:
            programs = _programs(step)
            digest = step_key(digest, step, tools=tools, programs=programs)
            found.append(digest)
        return found

    def _make(
        self,
        step: Step,
        key: str,
        source: Path,
        log: Path,
        lock: int,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        work = self.directory / "work" / key
        output = work / "output"
        if work.exists() and not step.resumes:
            shutil.rmtree(work)
        output.mkdir(parents=True, exist_ok=True)
        os.utime(work)
        _check_room(step, source, work)
        run_step(
            Run(
                name=step.kind,
                argv=self._argv(step, source, output),
                env=self._env(step, source, output),
                log=log,
                output=output,
                timeout_s=step.timeout_s,
                hold=(lock,),
            ),
            on_progress=on_progress,
            cancelled=cancelled,
        )
        for partial in output.rglob(".*.partial"):
            partial.unlink()
        if not any(path.is_file() for path in output.rglob("*")):
            raise StepFailed(f"{step.kind} made no file; its log is {log}")
        path = self.outputs.publish(key, output)
        shutil.rmtree(work, ignore_errors=True)
        return path

    def _argv(self, step: Step, source: Path, output: Path) -> tuple[str, ...]:
        if step.kind == "command":
            places = {INPUT: str(source), OUTPUT: str(output), PYTHON: str(self.python)}
            return tuple(_fill(argument, places) for argument in step.argv)
        argv = [str(self.python), "-I", "-m", "modelcache.prepare_child", step.kind]
        argv += [str(source), str(output)]
        for name, value in (
            ("--dtype", step.dtype), ("--world-size", step.world_size), ("--file", step.file),
        ):  # fmt: skip
            if value is not None:
                argv += [name, str(value)]
        return tuple(argv)

    def _env(self, step: Step, source: Path, output: Path) -> dict[str, str]:
        env = {name: value for name, value in self.environ.items() if name not in FOREIGN}
        env |= {"TIDEGATE_INPUT": str(source), "TIDEGATE_OUTPUT": str(output)}
        if step.kind != "command":
            env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return env | dict(step.env)

    @contextlib.contextmanager
    def _alone(
        self,
        key: str,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Iterator[int]:
        """One maker of a result at a time. The lock goes when both its process and the step that
        it started are gone."""
        folder = self.directory / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / key).open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    on_progress(Progress(phase="preparing", detail="another process does it"))
                if cancelled():
                    raise Cancelled("preparing was called off")
                time.sleep(WAIT_S)
            yield lock.fileno()

    def _sweep(self) -> None:
        """Remove what interrupted steps left long ago. One that works has its folder's time set
        when it begins, and is locked."""
        for work in (self.directory / "work").glob("*"):
            with contextlib.suppress(OSError):
                if time.time() - work.stat().st_mtime < LEFTOVER_S:
                    continue
                with (self.directory / "locks" / work.name).open("w") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(work)


def _check_room(step: Step, source: Path, work: Path) -> None:
    """Raise ``NoSpace`` where the result would not fit; a command's size is not known."""
    growth = GROWTH.get(step.kind)
    if growth is None:
        return
    size = _size(source)
    needed = int(size * (4.0 if step.dtype == "float32" and step.kind == "cast" else growth))
    needed -= _size(work)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise NoSpace(
            f"{step.kind} needs some {needed:,} bytes on the disk of {work}; {free:,} are free"
        )


def _fill(argument: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        argument = argument.replace(name, value)
    return argument


def _programs(step: Step) -> dict[str, str]:
    """Digests of the scripts and programs that a command names by their path."""
    found = {}
    for argument in step.argv if step.kind == "command" else ():
        path = Path(argument)
        if path.is_absolute() and path.is_file() and path.stat().st_size <= PROGRAM_MOST_BYTES:
            found[argument] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _ask_versions(python: Path, names: Sequence[str]) -> Mapping[str, str]:
    try:
        asked = subprocess.run(
            [str(python), "-I", "-c", VERSIONS, *names],
            capture_output=True, text=True, timeout=60, check=True, env={},
        )  # fmt: skip
        found: dict[str, str] = json.loads(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise StepFailed(f"{python} cannot say which packages it has: {error}") from error
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise StepFailed(f"{', '.join(missing)} is not installed for {python}")
    return found


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def _sync(path: Path) -> None:
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

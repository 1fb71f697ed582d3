"""Preparation steps as processes: cached by what they are made of, resumed, logged, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folder_store import Rig
from pydantic import ValidationError

from modelcache.prepare.run import (
    LeasedModel,
    Preparation,
    PrepareRequest,
    input_digest,
    step_key,
)
from modelcache.prepare.step_process import StepFailed, StepLimits
from modelcache.settings import ModelCacheSettings, PreparationStep
from modelcache.store.layout import result_url
from modelcache.types import Cancelled, FileEntry, Progress

PYTHON = sys.executable
TOOLS = {"gguf": "1", "torch": "2", "transformers": "3"}


def versions(python: Path, names: Sequence[str]) -> Mapping[str, str]:
    return {name: TOOLS[name] for name in names}


def script(text: str, *arguments: str, seen: Path | None = None) -> PreparationStep:
    """A command. What it writes to beside its output is no argument: files among those are part of
    the step's key."""
    env = {} if seen is None else {"SEEN": str(seen)}
    return PreparationStep(kind="command", argv=(PYTHON, "-c", text, *arguments), env=env)


COUNT = """
import os, pathlib, sys
with open(os.environ["SEEN"], "a") as seen:
    seen.write("x")
source = pathlib.Path(sys.argv[1], "weights").read_text()
pathlib.Path(sys.argv[2], "weights").write_text(source + "+")
pathlib.Path(sys.argv[2], "env").write_text(os.environ.get("EXTRA", ""))
print("counted")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("w")
    return folder


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    return Preparation(
        cache=Rig(root=tmp_path).cache(),
        python=Path(PYTHON),
        environ=dict(os.environ),
        ask_versions=versions,
    )


def make(
    preparation: Preparation, source: Path, steps: Sequence[PreparationStep], **asked: Any
) -> LeasedModel:
    """Prepared, and let go of at once."""
    made = preparation.prepare(source, "d", steps, model="s3://m", revision="r", **asked)
    made.lease.release()
    return made


def steps_run(preparation: Preparation, steps: Sequence[PreparationStep]) -> list[int]:
    """How often each step was run, by its log."""
    layout = preparation.cache.store.layout
    logs = [layout.step_log(key) for key in preparation.keys("d", steps)]
    return [log.read_text().count("\n$ ") for log in logs]


def nobody() -> PrepareRequest:
    return PrepareRequest(
        holder="nobody", on_progress=lambda progress: None, cancelled=lambda: False
    )


def count(tmp_path: Path) -> PreparationStep:
    return script(COUNT, "{input}", "{output}", seen=tmp_path / "runs")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def until(check: Callable[[], bool], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.01)


def test_steps_follow_each_other_and_are_done_once(
    tmp_path: Path, source: Path, preparation: Preparation
) -> None:
    first = count(tmp_path)
    steps = [first, first.model_copy(update={"env": {"EXTRA": "e", **first.env}})]
    made = make(preparation, source, steps)
    assert (made.model.path / "weights").read_text() == "w++"
    assert (made.model.path / "env").read_text() == "e"
    key = preparation.keys("d", steps)[0]
    assert "counted" in preparation.cache.store.layout.step_log(key).read_text()
    again = make(preparation, source, steps)
    assert steps_run(preparation, steps) == [1, 1]
    assert again.model.path == made.model.path
    # Another second step: the first one's result is used.
    others = [steps[0], steps[1].model_copy(update={"version": "2"})]
    make(preparation, source, others)
    assert steps_run(preparation, others) == [1, 1]
    assert (tmp_path / "runs").read_text() == "xxx"
    assert not list((tmp_path / "cache/prepared/work").iterdir())


STEP = PreparationStep(kind="cast", dtype="float16")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("input", step_key("e", STEP, tools=TOOLS, programs={})),
        (
            "step",
            step_key("d", STEP.model_copy(update={"dtype": "bfloat16"}), tools=TOOLS, programs={}),
        ),
        ("tool", step_key("d", STEP, tools={**TOOLS, "torch": "3"}, programs={})),
        ("program", step_key("d", STEP, tools=TOOLS, programs={"/p": "1"})),
    ],
)
def test_another_key_for_another(name: str, other: str) -> None:
    assert step_key("d", STEP, tools=TOOLS, programs={}) != other


def test_the_same_key_for_the_same_result() -> None:
    key = step_key("d", STEP, tools=TOOLS, programs={})
    same = STEP.model_copy(update={"timeout_s": 1, "resumable": True})
    assert key == step_key("d", same, tools=TOOLS, programs={})
    assert key == step_key("d", STEP, tools={**TOOLS, "gguf": "9"}, programs={})
    one = FileEntry(path="a", size_bytes=1, digest="x")
    two = FileEntry(path="b", size_bytes=1, digest="y", version="v")
    assert input_digest([one, two]) == input_digest([two, one])
    assert input_digest([one]) != input_digest([replace(one, digest="z")])
    assert input_digest([one]) != input_digest([replace(one, path="c")])


def test_a_script_that_changed_is_another_step(tmp_path: Path, preparation: Preparation) -> None:
    program = tmp_path / "quantize.py"
    program.write_text("1")
    step = PreparationStep(kind="command", argv=(PYTHON, str(program)))
    before = preparation.keys("d", [step])
    assert preparation.keys("d", [step]) == before
    program.write_text("2")
    assert preparation.keys("d", [step]) != before


def test_a_failure_shows_its_last_lines_and_leaves_no_result(
    source: Path, preparation: Preparation
) -> None:
    step = script("print('first'); print('a bar\\rthe reason'); raise SystemExit(3)", "{output}")
    with pytest.raises(StepFailed, match=r"(?s)exit code 3.*the reason.*log: /") as failed:
        make(preparation, source, [step])
    assert "a bar" not in str(failed.value)
    assert preparation.cache.find(result_url(preparation.keys("d", [step])[0])) is None
    with pytest.raises(StepFailed, match="signal 9"):
        make(preparation, source, [script("import os; os.kill(os.getpid(), 9)")])
    with pytest.raises(StepFailed, match="made no file"):
        make(preparation, source, [script("pass")])
    with pytest.raises(StepFailed, match="cannot start /no/such: No such file"):
        make(preparation, source, [PreparationStep(kind="command", argv=("/no/such",))])


SLOW = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(os.environ["SEEN"]).write_text(f"{os.getpid()} {child.pid}")
with open("parts", "a") as parts:
    parts.write("p")
print("working", flush=True)
if pathlib.Path("parts").read_text() != "pp":
    time.sleep(300)
"""


def test_a_step_called_off_ends_with_all_it_started(
    tmp_path: Path, source: Path, preparation: Preparation
) -> None:
    seen: list[Progress] = []
    step = script(SLOW, seen=tmp_path / "pids")

    def cancelled() -> bool:
        return any("working" in progress.detail for progress in seen)

    with pytest.raises(Cancelled):
        make(preparation, source, [step], on_progress=seen.append, cancelled=cancelled)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert seen[-1].phase == "preparing"


def test_a_step_that_takes_too_long_is_ended(
    tmp_path: Path, source: Path, preparation: Preparation
) -> None:
    step = script(SLOW, seen=tmp_path / "pids").model_copy(update={"timeout_s": 1.0})
    with pytest.raises(StepFailed, match="longer than 1 s"):
        make(preparation, source, [step])
    if not (tmp_path / "pids").exists():
        return  # on a busy machine it may be ended before it began
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert not any(alive(pid) for pid in pids)


WHOLE = """
import os, sys
from pathlib import Path
from modelcache.cache import ModelCache
from modelcache.prepare.run import Preparation
from modelcache.settings import PreparationStep
from modelcache.settings import ModelCacheSettings
base, resumable, seen, *argv = sys.argv[1:]
cache = ModelCache(ModelCacheSettings(reserve_bytes=0), dir=Path(base, "cache"),
                   open_source=None, transfer=None)
Preparation(cache=cache, python=Path(sys.executable), environ=dict(os.environ)).prepare(
    Path(base, "model"), "d",
    [PreparationStep(kind="command", argv=tuple(argv), resumable=resumable == "1",
                     env={"SEEN": seen})],
    model="s3://m", revision="r",
)
"""


@pytest.mark.parametrize("resumable", [True, False])
def test_a_killed_process_takes_its_step_along_and_the_next_goes_on(
    tmp_path: Path, source: Path, preparation: Preparation, resumable: bool
) -> None:
    step = script(SLOW, seen=tmp_path / "pids").model_copy(update={"resumable": resumable})
    killed = subprocess.Popen(
        [
            PYTHON,
            "-c",
            WHOLE,
            str(tmp_path),
            str(int(resumable)),
            str(tmp_path / "pids"),
            *step.argv,
        ]
    )
    until(lambda: len((tmp_path / "pids").read_text().split()) == 2
          if (tmp_path / "pids").exists() else False)  # fmt: skip
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    key = preparation.keys("d", [step])[0]
    parts = tmp_path / "cache/prepared/work" / key / "output/parts"
    until(lambda: parts.exists() and parts.read_text() == "p")
    killed.kill()
    killed.wait()
    if resumable:
        made = make(preparation, source, [step])
        assert (made.model.path / "parts").read_text() == "pp"
        assert not any(alive(pid) for pid in pids), "it must not go on writing beside us"
    else:
        seen: list[Progress] = []
        with pytest.raises(Cancelled):
            make(
                preparation, source, [step], on_progress=seen.append,
                cancelled=lambda: any("working" in one.detail for one in seen)
                and parts.exists() and parts.read_text() == "p"
                and (tmp_path / "pids").read_text().split()[0] != str(pids[0]),
            )  # fmt: skip
        assert not parts.exists(), "nobody could go on with it"


def test_two_at_once_make_one_result(
    tmp_path: Path, source: Path, preparation: Preparation
) -> None:
    step = count(tmp_path)
    paths: list[Path] = []

    def work() -> None:
        paths.append(make(preparation, source, [step]).model.path)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 4
    assert (tmp_path / "runs").read_text() == "x"


def test_what_waits_for_another_process_can_be_called_off(
    tmp_path: Path, source: Path, preparation: Preparation
) -> None:
    step = count(tmp_path)
    key = preparation.keys("d", [step])[0]
    seen: list[Progress] = []
    with preparation.exclusive(key, nobody()), pytest.raises(Cancelled):
        make(preparation, source, [step], on_progress=seen.append, cancelled=lambda: len(seen) > 1)
    assert seen[0].detail == "another process does it"


def test_a_log_is_bounded(tmp_path: Path, source: Path, preparation: Preparation) -> None:
    preparation.limits = StepLimits(measure_s=0.0, log_bytes=100_000, log_tail_bytes=10_000)
    written, seen = tmp_path / "written", tmp_path / "seen"
    text = """
import os, pathlib, time
pathlib.Path("made").write_text("x")
for n in range(30):
    print("line " * 2000, n, flush=True)
pathlib.Path(os.environ["WRITTEN"]).touch()
while not os.path.exists(os.environ["SEEN"]):
    time.sleep(0.01)
print("the end", flush=True)
"""
    step = PreparationStep(
        kind="command", argv=(PYTHON, "-c", text),
        env={"WRITTEN": str(written), "SEEN": str(seen)},
    )  # fmt: skip
    log = preparation.cache.store.layout.step_log(preparation.keys("d", [step])[0])

    def look(progress: Progress) -> None:
        if written.exists() and log.stat().st_size <= 100_000:
            seen.touch()

    make(preparation, source, [step], on_progress=look)
    lines = log.read_text().splitlines()
    assert "[the beginning was cut off]" in lines
    assert lines[-1] == "the end"


def test_commands_do_not_see_our_python(source: Path, preparation: Preparation) -> None:
    preparation.environ = {**os.environ, "PYTHONPATH": "/ours", "KEPT": "1"}
    text = "import os, json; json.dump(dict(os.environ), open('env', 'w'))"
    made = make(preparation, source, [script(text)])
    env = json.loads((made.model.path / "env").read_text())
    assert "PYTHONPATH" not in env
    assert env["KEPT"] == "1"
    assert env["TIDEGATE_INPUT"] == str(source)


def test_an_engine_without_its_packages_is_said_so(source: Path, preparation: Preparation) -> None:
    preparation.ask_versions = None
    with pytest.raises(StepFailed, match=r"gguf.* is not installed for"):
        make(preparation, source, [PreparationStep(kind="gguf_to_safetensors")])
    preparation.python = Path("/no/such/python")
    with pytest.raises(StepFailed, match="cannot say which packages"):
        make(preparation, source, [PreparationStep(kind="gguf_to_safetensors")])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "cast"}, "needs dtype"),
        ({"kind": "command"}, "needs argv"),
        ({"kind": "cast", "dtype": "int4"}, "bfloat16"),
        ({"kind": "cast", "dtype": "float16", "argv": ["x"]}, "a cast step has no argv"),
        ({"kind": "gguf_to_safetensors", "version": "2"}, "has no version"),
        ({"kind": "gguf_to_safetensors", "file": "/etc/x"}, "pattern"),
        ({"kind": "nonsense"}, "command"),
    ],
)
def test_steps_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PreparationStep.model_validate(fields)


def test_steps_belong_to_a_model_however_it_is_written() -> None:
    settings = ModelCacheSettings.model_validate(
        {
            "steps": {
                "hf://org/name": [
                    {"kind": "gguf_to_safetensors", "file": "a.gguf"},
                    {"kind": "command", "argv": ["q", "{input}"], "env": {"B": "2", "A": "1"}},
                ]
            }
        }
    )
    steps = settings.steps_for("org/name")
    assert [step.kind for step in steps] == ["gguf_to_safetensors", "command"]
    assert (steps[0].file, steps[1].env) == ("a.gguf", {"A": "1", "B": "2"})
    assert settings.steps_for("org/other") == ()


def test_files_are_wanted_of_a_model_however_it_is_written() -> None:
    settings = ModelCacheSettings.model_validate(
        {"files": {"hf://org/name": ["*Q4*.gguf", "!sub/*", "*.json"], "s3://models/m": ["!x*"]}}
    )
    assert settings.files_for("org/name") == (("*Q4*.gguf", "*.json"), ("sub/*",))
    assert settings.files_for("s3://models/m/") == ((), ("x*",))
    assert settings.files_for("org/other") == ((), ())
    for wrong in ({"not a model!!": ["*"]}, {"org/name": [""]}, {"org/name": ["!"]}):
        with pytest.raises(ValueError, match=r"not a model|pattern"):
            ModelCacheSettings.model_validate({"files": wrong})


def test_a_step_s_model_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/her")
    steps = {"~/models/x": [{"kind": "cast", "dtype": "bfloat16"}]}
    settings = ModelCacheSettings.model_validate({"steps": steps})
    assert len(settings.steps_for("/home/her/models/x")) == 1


def test_what_is_no_model_is_found_when_settings_are_read() -> None:
    """Not when some other pool starts."""
    steps = {"not a model!!": [{"kind": "cast", "dtype": "bfloat16"}]}
    with pytest.raises(ValueError, match="not a model"):
        ModelCacheSettings.model_validate({"steps": steps})


def test_the_guard_ends_the_command_with_its_parent(tmp_path: Path) -> None:
    """Also one that ignores being told."""
    stubborn = (
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
    )
    guard = [PYTHON, "-I", "-m", "modelcache.prepare.step_process"]
    hold = "import os, subprocess, sys; a = sys.argv; a[a.index('ME')] = str(os.getpid())"
    holder = subprocess.Popen(
        [PYTHON, "-c", f"{hold}; subprocess.run(a[1:])", *guard, "ME", "0.2",
         PYTHON, "-c", stubborn, str(tmp_path / "pid")],
    )  # fmt: skip
    until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    until(lambda: not alive(pid))


def test_no_command_is_started_for_a_parent_that_has_gone(tmp_path: Path) -> None:
    """Killed before the guard could ask to be told of it."""
    guard = [PYTHON, "-I", "-m", "modelcache.prepare.step_process"]
    done = subprocess.run([*guard, "1", "0.2", "touch", str(tmp_path / "made")], check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "made").exists()

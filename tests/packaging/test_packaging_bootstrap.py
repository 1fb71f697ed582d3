"""What `make` does before anything is installed: steps that are repeated, cut short, refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

# ── environments ──────────────────────────────────────────────────────────────────────────────────


def test_a_good_environment_is_kept_and_a_half_made_one_is_not(
    made: Path, environments: ModuleType
) -> None:
    environment = environments.Environment(environments.Workshop(made), ".venv")
    before = environment.python.lstat().st_ino
    environment.make("again")
    assert environment.works()
    assert environment.python.lstat().st_ino == before  # it is not made again
    (made / ".tidegate" / "making.venv").touch()
    assert not environment.works()
    (made / ".tidegate" / "making.venv").unlink()


def test_a_vanished_interpreter_is_noticed(
    made: Path, environments: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    environment = environments.Environment(environments.Workshop(tmp_path / "copy"), ".venv")
    assert environment.works()
    environment.python.unlink()
    environment.python.symlink_to("/nowhere/python3")
    assert not environment.works()
    environment.python.unlink()
    assert not environment.works()


def test_an_environment_whose_python_changed_is_noticed(
    made: Path, environments: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    environment = environments.Environment(environments.Workshop(tmp_path / "copy"), ".venv")
    version = "python{}.{}".format(*sys.version_info)
    (environment.path / "lib" / version).rename(environment.path / "lib" / "python3.10")
    assert not environment.works()


def test_stamps_hold_for_the_same_inputs_in_the_same_place(
    environments: ModuleType, tmp_path: Path
) -> None:
    environment = environments.Environment(environments.Workshop(tmp_path / "a"), ".venv")
    environment.path.mkdir(parents=True)
    assert not environment.has("packages", "k1")
    environment.set("packages", "k1")
    assert environment.has("packages", "k1")
    assert not environment.has("packages", "k2")
    assert not environment.has("other", "k1")
    assert not environment.was_moved()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = environments.Environment(environments.Workshop(tmp_path / "b"), ".venv")
    assert moved.was_moved()
    assert not moved.has("packages", "k1")
    (moved.stamps / "packages").write_text("{half")
    assert not moved.has("packages", "k1")


def test_a_digest_follows_content_and_not_dates(environments: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("a")
    first = environments.digest("x", file)
    os.utime(file, (1, 1))
    assert environments.digest("x", file) == first
    file.write_text("b")
    assert environments.digest("x", file) != first
    assert environments.digest("ab", "c") != environments.digest("a", "bc")


def test_half_installed_packages_are_dropped_before_pip_is_asked(
    environments: ModuleType, tmp_path: Path
) -> None:
    environment = environments.Environment(environments.Workshop(tmp_path), ".venv")
    site = environment.path / "lib" / "python3.12" / "site-packages"
    for entry, whole in (("good-1.dist-info", True), ("half-1.dist-info", False), ("~alf", False)):
        (site / entry).mkdir(parents=True)
        (site / entry / "METADATA").touch()
        if whole:
            (site / entry / "RECORD").touch()
    environment.drop_half_installed()
    assert [path.name for path in site.iterdir()] == ["good-1.dist-info"]


def test_a_package_with_a_lost_or_short_file_is_found(
    made: Path, environments: ModuleType, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    environment = environments.Environment(environments.Workshop(tmp_path / "copy"), ".venv")
    assert environment.damaged() == []
    site = next(environment.path.glob("lib/python3*/site-packages"))
    victim = site / "pip" / "_internal" / "main.py"
    victim.write_text("short")
    assert [name.split("==")[0] for name in environment.damaged()] == ["pip"]
    victim.unlink()
    assert [name.split("==")[0] for name in environment.damaged()] == ["pip"]


def test_pip_is_not_led_elsewhere(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_TARGET", "PIP_USER", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example.org")
    env = environments.Workshop(tmp_path).environ()
    assert "/elsewhere" not in env.values()
    assert env["PIP_INDEX_URL"] == "https://index.example.org"
    assert Path(env["TMPDIR"]).is_relative_to(tmp_path)


# ── long commands ─────────────────────────────────────────────────────────────────────────────────

PIP_LINES = [
    ("Processing /tmp/x/wheels/numpy-2-cp311.whl", "preparing: numpy-2-cp311.whl"),
    ("Collecting torch==2.13.0", "looking for torch==2.13.0"),
    ("  Downloading https://x.org/a/torch-2.whl (180.5 MB)", "downloading torch-2.whl (180.5 MB)"),
    ("  Using cached numpy-2-cp311.whl (16 MB)", "from the cache: numpy-2-cp311.whl"),
    ("Requirement already satisfied: idna in /x (3.1)", "there already: idna"),
    ("Installing collected packages: a, b, c", "installing 3 packages"),
    ("  Preparing metadata (x): started", "preparing: metadata (x): started"),
    ("      Successfully uninstalled a-1", "replacing a package by the one that is wanted"),
    ("Successfully installed a-1 b-2", "checking every file"),
    ("something else", "something else"),
    ("WARNING: noise", None),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), PIP_LINES)
def test_pips_lines_are_told_in_a_few_words(
    line: str, told: str | None, progress: ModuleType
) -> None:
    assert progress.describe_pip(line) == told


def run_shown(progress: ModuleType, tmp_path: Path, code: str) -> None:
    progress.run_shown(
        "work",
        [sys.executable, "-c", code],
        log=tmp_path / "logs" / "log",
        env=os.environ,
        grows=[tmp_path],
    )


def test_a_failure_quotes_the_end_of_its_log(
    progress: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('\\n'.join(map(str, range(100)))); sys.exit('no route to index')"
    with pytest.raises(progress.StepFailed) as failure:
        run_shown(progress, tmp_path, code)
    assert "exit code 1" in str(failure.value)
    assert "no route to index" in str(failure.value)
    assert str(tmp_path / "logs" / "log") in str(failure.value)
    assert len(str(failure.value).splitlines()) < 20
    assert "failed after" in capsys.readouterr().out
    run_shown(progress, tmp_path, "print('fine')")
    assert "done in 0:0" in capsys.readouterr().out


def test_sizes_count_what_is_on_disk(progress: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(os.urandom(100_000))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    size = progress.bytes_under([tmp_path, tmp_path / "nowhere"])
    assert 100_000 <= size < 120_000
    assert progress.size_text(3_400_000_000) == "3.4 GB"
    assert progress.size_text(12_300_000) == "12 MB"


SLOW = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "print('on', flush=True); time.sleep(600)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_step_stops_its_command_and_says_one_line(
    number: signal.Signals, deploy: Path, tmp_path: Path
) -> None:
    """The real ``main``, interrupted in a command that will not listen to Ctrl-C."""
    script = (
        f"import sys; sys.path.insert(0, {str(deploy)!r})\n"
        "import os, signal, pathlib, prepare, environments\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"workshop = environments.Workshop(pathlib.Path({str(tmp_path)!r}))\n"
        f"argv = [sys.executable, '-c', {SLOW!r}, {str(tmp_path)!r}]\n"
        "prepare.prepare = lambda *a, **k: workshop.run('slow', argv, log='l', grows=[])\n"
        "sys.exit(prepare.main(['engine']))\n"
    )
    log = tmp_path / ".tidegate" / "logs" / "setup" / "l.log"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline_s = time.monotonic() + 60
        while not (log.exists() and "\non" in log.read_text()) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err == "\ninterrupted: the same command carries on from here\n"
    assert "Traceback" not in out
    deadline_s = time.monotonic() + 60
    while still_running(str(tmp_path).encode()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def still_running(word: bytes) -> list[bytes]:
    """Command lines with this word: another run of this suite on this machine has others."""
    lines = [command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    return [line for line in lines if word in line.split(b"\0")]


def command_line(path: Path) -> bytes:
    """What a process was started with; nothing of one that has ended meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_default_model_is_checked_before_anything_is_installed(
    prepare: ModuleType, tmp_path: Path
) -> None:
    steps = prepare.model_steps(prepare.Workshop(tmp_path))
    assert [step.title for step in steps] == ["default model: converting to safetensors"]

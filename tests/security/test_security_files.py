"""What Tidegate writes is for its own user: directories, locks, logs, copies of weights, whatever
the umask and however wide a directory was before."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_store import PIECE, Rig, bytes_of

from autoscaler.backends.process.logs import ReplicaLog
from gateway.compose.listeners import Running, claim_for_agent, leave_record
from gateway.compose.process import check_writable
from gateway.settings.load import ConfigError, load
from modelcache.store import files
from modelcache.store.files import make_private
from modelcache.types import CacheError

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root to be made")
NOBODY = 65_534


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The widest there is."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(root: Path) -> list[str]:
    """What another user could read, write or enter, were it not for the directories above."""
    return [
        f"{stat.S_IMODE(path.lstat().st_mode):o} {path.relative_to(root)}"
        for path in root.rglob("*")
        if not path.is_symlink() and path.lstat().st_mode & 0o077
    ]


def test_a_cache_and_all_in_it_is_for_our_user_alone(tmp_path: Path) -> None:
    rig = Rig(root=tmp_path)
    url = rig.put(
        "models/a", {"config.json": b"{}", "sub/model.safetensors": bytes_of(3 * PIECE, 1)}
    )
    cache = rig.cache("deep/down/cache")
    model = cache.preload(url, expected_use_at_s=1.0)
    cache.pin(url)
    with cache.lease(model, "an engine"):
        assert open_to_others(tmp_path / "deep") == []
        assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700
    # A blob stays read-only, also for us.
    assert not (model.path / "config.json").stat().st_mode & 0o222


def test_a_cache_that_others_could_enter_is_narrowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(root=tmp_path)
    (tmp_path / "cache").mkdir(mode=0o777)
    rig.cache().preload(rig.put("models/a", {"config.json": b"{}"}))
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert f"{tmp_path / 'cache'} was open to other users (mode 777)" in caplog.text


@pytest.mark.parametrize("links", [True, False])
def test_what_only_its_owner_could_read_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:  # another file system
        monkeypatch.setattr(files, "link", lambda source, target: False)
    rig = Rig(root=tmp_path)
    rig.put("models/a", {"config.json": b"{}", "shadow": b"secret"})
    source = rig.models / "models/a/shadow"
    source.chmod(0o600)
    copy = rig.cache().preload(f"file://{source.parent}").path / "shadow"
    assert copy.read_bytes() == b"secret"
    assert not copy.stat().st_mode & 0o077
    assert stat.S_IMODE(source.stat().st_mode) == 0o600


@AS_ROOT
def test_a_file_that_its_owner_can_change_later_is_copied(tmp_path: Path) -> None:
    rig = Rig(root=tmp_path)
    rig.put("models/a", {"config.json": b"{}"})
    source = rig.models / "models/a/config.json"
    os.chown(source, NOBODY, NOBODY)
    source.chmod(0o644)
    copy = rig.cache().preload(f"file://{source.parent}").path / "config.json"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o400
    assert (copy.stat().st_uid, copy.stat().st_nlink) == (os.geteuid(), 2)


def test_state_is_for_our_user_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    check_writable(load(None, {}), "state_dir", state)
    leave_record(state, Running(pid=os.getpid(), url="http://h", admin_url="http://h"))
    log = ReplicaLog(state / "logs/pool/one.log", max_bytes=1, files=3)
    fd = log.open()
    os.write(fd, b"a prompt\n")
    assert log.rotate()
    os.close(fd)
    with claim_for_agent(state):
        assert open_to_others(tmp_path) == []


@AS_ROOT
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_directory_of_another_user_is_refused(tmp_path: Path, mode: int) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=mode)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(CacheError, match=f"belongs to user {NOBODY}"):
        make_private(theirs)
    with pytest.raises(ConfigError, match=f"state_dir.*belongs to user {NOBODY}"):
        check_writable(load(None, {}), "state_dir", theirs)
    rig = Rig(root=tmp_path)
    with pytest.raises(CacheError, match=f"belongs to user {NOBODY}"):
        rig.cache("theirs").preload(rig.put("models/a", {"config.json": b"{}"}))
    assert stat.S_IMODE(theirs.stat().st_mode) == mode
    assert list(theirs.iterdir()) == []


@AS_ROOT
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir(mode=0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "ours")
    assert make_private(link)
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(CacheError):
        make_private(link)

"""A file on its way: whatever is lost or damaged of it costs pieces, and never gives wrong ones."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from folder_store import PIECE, bytes_of, flip_bit, read_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.store import files
from modelcache.store.digest import digest_piece, read_pieces
from modelcache.store.layout import Layout
from modelcache.store.partial_files import (
    DATA,
    HEADER,
    JOURNAL,
    RECORD,
    TREE,
    Partial,
    decode_journal,
    is_open,
    read_progress,
)
from modelcache.store.store import hash_file
from modelcache.types import CacheError, Damaged, InUse

KEY = "k" * 40
CONTENT = bytes_of(4 * PIECE + 100)
COUNT = 5


def begin(layout: Layout, content: bytes = CONTENT, key: str = KEY) -> Partial:
    return Partial.open(layout, key, len(content), piece_bytes=PIECE)


def bring(partial: Partial, indices: Iterable[int] = range(COUNT), data: bytes = CONTENT) -> None:
    for index in indices:
        start, end = partial.span(index)
        os.pwrite(partial.fd, data[start:end], start)
        partial.commit(index)


def name_of(tmp_path: Path, content: bytes = CONTENT) -> str:
    path = tmp_path / "plain"
    path.write_bytes(content)
    return hash_file(path, piece_bytes=PIECE).digest


def fetch_rest(layout: Layout, directory: Path) -> None:
    """Go on as whoever comes next would, and see that the result is right."""
    with begin(layout) as partial:
        bring(partial, partial.missing())
        digest = partial.finish({})
    assert digest == name_of(directory)
    assert layout.blob(digest).read_bytes() == CONTENT
    assert not layout.partial(KEY).exists()


def test_pieces_may_come_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        assert partial.missing() == [0, 1, 2, 3, 4]
        bring(partial, [4, 2])
        assert partial.missing() == [0, 1, 3]
        assert partial.bytes_done == PIECE + 100
        assert partial.piece(2) == digest_piece(CONTENT[2 * PIECE : 3 * PIECE])
        assert partial.piece(0) is None
        os.pwrite(partial.fd, b"wrong", 0)
        partial.commit(0)
        bring(partial, [0, 3, 1])
        digest = partial.finish({"sha256": hashlib.sha256(CONTENT).hexdigest().upper()})
    blob = layout.blob(digest)
    assert blob.read_bytes() == CONTENT
    assert stat.S_IMODE(blob.stat().st_mode) == 0o400
    assert read_pieces(layout.pieces(digest), digest, len(CONTENT), piece_bytes=PIECE) == hash_file(
        blob, piece_bytes=PIECE
    )
    # Equal times are what says that nobody has written to the blob since.
    assert layout.pieces(digest).stat().st_mtime_ns == blob.stat().st_mtime_ns
    assert layout.known(KEY).read_text() == digest


@given(st.permutations(range(COUNT)))
@settings(max_examples=20, deadline=None)
def test_the_order_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("order")
    with begin(Layout(directory / "cache")) as partial:
        bring(partial, order)
        # Digests of kinds that nobody here knows are not checked.
        assert partial.finish({"crc64": "1", "etag": "x"}) == name_of(directory)


def test_an_empty_file_is_whole_from_the_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with begin(layout, b"") as partial:
        assert partial.missing() == []
        digest = partial.finish({"sha256": hashlib.sha256(b"").hexdigest()})
    assert layout.blob(digest).read_bytes() == b""
    assert layout.pieces(digest).read_bytes() == b""


def test_whoever_commits_the_last_piece_is_told_and_nobody_else(tmp_path: Path) -> None:
    told: list[str] = []
    partial = Partial.open(
        Layout(tmp_path),
        KEY,
        len(CONTENT),
        piece_bytes=PIECE,
        on_whole=lambda whole: told.append(threading.current_thread().name),
    )
    with partial:
        threads = [threading.Thread(target=bring, args=(partial, [index])) for index in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 1
        assert told[0] in {thread.name for thread in threads}
        bring(partial, [0])
        assert len(told) == 1


def test_what_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        bring(partial, [1, 3])
    assert read_progress(layout.partial(KEY)) == 2 * PIECE
    with begin(layout) as partial:
        assert partial.missing() == [0, 2, 4]
        assert repr(partial) == f"Partial({KEY} {2 * PIECE}/{len(CONTENT)} bytes)"
    fetch_rest(layout, tmp_path)


def test_the_beginning_of_a_piece_is_there_the_next_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        bring(partial, [1])
        for index, size_bytes in ((0, 100), (0, 900), (2, 70), (4, 100)):
            start, _ = partial.span(index)
            os.pwrite(partial.fd, CONTENT[start : start + size_bytes], start)
            partial.keep(index, size_bytes)
        partial.keep(1, 10)
        partial.keep(2, 3)
    assert read_progress(layout.partial(KEY)) == PIECE + 900 + 70 + 100
    # What the disk has lost of them does not count.
    flip_bit(layout.partial(KEY) / DATA, 8 * (2 * PIECE + 69))
    with begin(layout) as partial:
        assert [partial.beginning(index) for index in range(COUNT)] == [900, 0, 0, 0, 100]
        assert (partial.bytes_done, partial.bytes_begun) == (PIECE, 1_000)
        assert partial.missing() == [0, 2, 3, 4]
        bring(partial, [0])
        assert (partial.bytes_done, partial.bytes_begun) == (2 * PIECE, 100)
    with begin(layout) as partial:
        assert (partial.bytes_done, partial.bytes_begun) == (2 * PIECE, 100)
    fetch_rest(layout, tmp_path)


def test_a_journal_cut_anywhere_costs_the_pieces_behind_the_cut(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    order = [2, 0, 4, 1]
    directory = tmp_path_factory.mktemp("cut")
    layout = Layout(directory)
    with begin(layout) as partial:
        bring(partial, order)
    journal = layout.partial(KEY) / JOURNAL
    whole = journal.read_bytes()
    for length in range(len(whole) + 1):
        journal.write_bytes(whole[:length])
        kept = order[: max(length - HEADER.size, 0) // RECORD.size]
        with begin(layout) as partial:
            assert partial.missing() == [index for index in range(COUNT) if index not in kept]
            # The torn record is gone, so that the next one is not written behind half of one.
            bring(partial, [3])
        with begin(layout) as partial:
            assert 3 not in partial.missing()


@given(
    bit=st.integers(0, (HEADER.size + 4 * RECORD.size) * 8 - 1),
    order=st.permutations(range(4)),
)
@settings(max_examples=30, deadline=None)
def test_a_bit_of_the_journal_costs_pieces_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, bit: int, order: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("bit")
    layout = Layout(directory / "cache")
    with begin(layout) as partial:
        bring(partial, order)
    flip_bit(layout.partial(KEY) / JOURNAL, bit)
    assert 0 <= read_progress(layout.partial(KEY)) <= len(CONTENT)
    with begin(layout) as partial:
        if bit // 8 < HEADER.size:
            assert len(partial.missing()) == COUNT
        else:
            hurt = order[(bit // 8 - HEADER.size) // RECORD.size]
            assert partial.missing() == sorted({hurt, 4})
    fetch_rest(layout, directory)


def test_progress_survives_any_bit_of_a_journals_header(tmp_path: Path) -> None:
    # One bit less and the pieces have no size: whoever asks how far it is must not fall over it.
    layout = Layout(tmp_path)
    with begin(layout) as partial:
        bring(partial, [0])
    journal = layout.partial(KEY) / JOURNAL
    for bit in range(HEADER.size * 8):
        flip_bit(journal, bit)
        assert 0 <= read_progress(layout.partial(KEY)) <= len(CONTENT)
        flip_bit(journal, bit)
    assert read_progress(layout.partial(KEY)) == PIECE
    assert read_progress(tmp_path / "none") == 0


@given(st.integers(0, len(CONTENT) * 8 - 1))
@settings(max_examples=20, deadline=None)
def test_a_bit_of_the_data_costs_its_piece(
    tmp_path_factory: pytest.TempPathFactory, bit: int
) -> None:
    directory = tmp_path_factory.mktemp("data")
    layout = Layout(directory / "cache")
    with begin(layout) as partial:
        bring(partial)
    flip_bit(layout.partial(KEY) / DATA, bit)
    with begin(layout) as partial:
        assert partial.missing() == [bit // 8 // PIECE]
    fetch_rest(layout, directory)


@given(st.integers(0, len(CONTENT)), st.booleans())
@settings(max_examples=20, deadline=None)
def test_data_cut_anywhere_begins_anew(
    tmp_path_factory: pytest.TempPathFactory, length: int, longer: bool
) -> None:
    directory = tmp_path_factory.mktemp("short")
    layout = Layout(directory / "cache")
    with begin(layout) as partial:
        bring(partial, [0, 1, 2])
    os.truncate(layout.partial(KEY) / DATA, len(CONTENT) + 1 + length if longer else length)
    with begin(layout) as partial:
        kept = not longer and length == len(CONTENT)
        assert partial.missing() == ([3, 4] if kept else list(range(COUNT)))
    fetch_rest(layout, directory)


@pytest.mark.parametrize("lost", [DATA, JOURNAL])
def test_data_without_a_journal_is_nothing_and_so_is_the_reverse(tmp_path: Path, lost: str) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        bring(partial, [0, 1])
    (layout.partial(KEY) / lost).unlink()
    with begin(layout) as partial:
        assert len(partial.missing()) == COUNT
    fetch_rest(layout, tmp_path)


def test_another_size_or_piece_size_begins_anew(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with begin(layout) as partial:
        bring(partial, [0, 1, 2, 3])
    with Partial.open(layout, KEY, len(CONTENT), piece_bytes=2 * PIECE) as partial:
        assert partial.missing() == [0, 1, 2]
    with begin(layout, CONTENT[:-1]) as partial:
        assert len(partial.missing()) == COUNT
        assert os.fstat(partial.fd).st_size == len(CONTENT) - 1


def test_a_journal_claims_only_what_its_checksums_vouch_for() -> None:
    assert decode_journal(b"", len(CONTENT), PIECE) == ({}, {})
    nothing = b"x" * (HEADER.size + RECORD.size + 3)
    assert decode_journal(nothing, len(CONTENT), PIECE) == ({}, {})


def published(content: bytes) -> dict[str, str]:
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "md5": hashlib.md5(content).hexdigest(),
        "git-sha1": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "git-sha1", TREE])
@pytest.mark.parametrize("right", [True, False])
def test_the_whole_is_checked_by_what_its_store_published(
    tmp_path: Path, algorithm: str, right: bool
) -> None:
    layout = Layout(tmp_path / "cache")
    content = CONTENT if right else bytes(len(CONTENT))
    wanted: Mapping[str, str] = {**published(content), TREE: name_of(tmp_path, content)}
    with begin(layout) as partial:
        bring(partial)
        if right:
            assert partial.finish({algorithm: wanted[algorithm]}) == name_of(tmp_path)
            return
        with pytest.raises(Damaged, match=wanted[algorithm]):
            partial.finish({algorithm: wanted[algorithm]})
    left = read_tree(layout.root)
    assert set(left) == {"locks/store"}, "nothing of it is kept"
    with begin(layout) as partial:
        assert len(partial.missing()) == COUNT


def test_it_cannot_be_finished_before_it_is_whole(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        bring(partial, [0, 1])
        with pytest.raises(CacheError, match="3 of 5 pieces"):
            partial.finish({})
    fetch_rest(layout, tmp_path)


def test_one_has_it_open_at_a_time(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert not is_open(layout.partial(KEY))
    with begin(layout) as partial:
        bring(partial, [0])
        assert is_open(layout.partial(KEY))
        with pytest.raises(InUse, match="by another process"):
            begin(layout)
        with begin(layout, key="another"):
            pass
        assert is_open(layout.partial(KEY)), "who was refused has not taken the lock along"
        bring(partial, [1])
    assert not is_open(layout.partial(KEY))
    with begin(layout) as partial:
        assert partial.missing() == [2, 3, 4]


HOLD = """
import sys
from pathlib import Path
from modelcache.store.layout import Layout
from modelcache.store.partial_files import Partial
partial = Partial.open(Layout(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), piece_bytes=4096)
print(len(partial.missing()), flush=True)
sys.stdin.read()
"""


def test_another_process_has_it_until_it_is_killed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cache")
    with begin(layout) as partial:
        bring(partial, [0])
    command = [sys.executable, "-c", HOLD, str(layout.root), KEY, str(len(CONTENT))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"4\n"
        with pytest.raises(InUse):
            begin(layout)
        process.kill()
    fetch_rest(layout, tmp_path)


def test_space_is_reserved_ahead(tmp_path: Path) -> None:
    layout, size_bytes = Layout(tmp_path), len(CONTENT)
    assert not Partial.is_reserved(layout, KEY, size_bytes)
    Partial.reserve(layout, KEY, size_bytes)
    assert Partial.is_reserved(layout, KEY, size_bytes)
    assert not Partial.is_reserved(layout, KEY, size_bytes + 1)
    data = layout.partial(KEY) / DATA
    assert data.stat().st_size == size_bytes
    assert data.stat().st_blocks * 512 >= size_bytes
    with begin(layout) as partial:
        assert len(partial.missing()) == COUNT, "reserved is not fetched"


def test_what_is_reserved_again_keeps_its_bytes(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with begin(layout) as partial:
        bring(partial, [0, 1])
    Partial.reserve(layout, KEY, len(CONTENT))
    with begin(layout) as partial:
        assert partial.missing() == [2, 3, 4]


@pytest.mark.parametrize("replace", [False, True])
def test_a_blob_that_is_there_stays_unless_it_is_to_be_replaced(
    tmp_path: Path, replace: bool
) -> None:
    layout = Layout(tmp_path)
    inodes = []
    for key in ("one", "other"):
        with begin(layout, key=key) as partial:
            bring(partial)
            digest = partial.finish({}, replace=replace)
        blob, pieces = layout.blob(digest).stat(), layout.pieces(digest).stat()
        assert blob.st_mtime_ns == pieces.st_mtime_ns
        assert not layout.partial(key).exists()
        assert layout.known(key).read_text() == digest
        inodes.append(blob.st_ino)
    assert (inodes[0] != inodes[1]) == replace


def test_a_blob_that_was_written_to_does_not_stay(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with begin(layout, key="one") as partial:
        bring(partial)
        blob = layout.blob(partial.finish({}))
    blob.chmod(0o644)
    blob.write_bytes(bytes(len(CONTENT)))
    os.utime(blob, (1, 1))  # a file's clock may tick no finer than some milliseconds
    with begin(layout, key="other") as partial:
        bring(partial)
        partial.finish({})
    assert blob.read_bytes() == CONTENT


def test_where_blocks_cannot_be_reserved_a_file_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    Partial.reserve(Layout(tmp_path), KEY, len(CONTENT))
    assert Partial.is_reserved(Layout(tmp_path), KEY, len(CONTENT))

"""Digests: what they are, and that no damage to a record of them goes unnoticed."""

from __future__ import annotations

import struct
from pathlib import Path

import blake3
import pytest
import xxhash
from folder_store import bytes_of
from hypothesis import given
from hypothesis import strategies as st

from modelcache.store.digest import (
    RECORD,
    PieceDigests,
    count_pieces,
    digest_piece,
    piece_span,
    read_pieces,
    tree_digest,
)
from modelcache.types import Damaged

SMALL = 16


def cut(data: bytes) -> list[bytes]:
    return [data[at : at + SMALL] for at in range(0, len(data), SMALL)]


def digest(data: bytes) -> PieceDigests:
    return PieceDigests(
        size_bytes=len(data), pieces=tuple(map(digest_piece, cut(data))), piece_bytes=SMALL
    )


def test_a_piece_has_its_blake3_and_its_xxh3() -> None:
    assert digest_piece(b"abc") == (
        blake3.blake3(b"abc").digest(),
        xxhash.xxh3_64_intdigest(b"abc"),
    )
    assert digest_piece(memoryview(b"abc")) == digest_piece(bytearray(b"abc"))


def test_a_tree_digest_is_of_the_size_and_of_the_pieces_in_order() -> None:
    # Other nodes compute it too, so its definition is pinned down here and not only its use.
    parts = [blake3.blake3(part).digest() for part in (b"one", b"two")]
    wanted = blake3.blake3(b"tidegate-tree-1\0" + struct.pack("<Q", 6) + b"".join(parts))
    assert tree_digest(6, parts) == wanted.hexdigest()
    assert tree_digest(6, parts[::-1]) != wanted.hexdigest()
    assert tree_digest(7, parts) != wanted.hexdigest()


@pytest.mark.parametrize(
    ("size_bytes", "count"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_the_last_piece_may_be_short_and_an_empty_file_has_none(
    size_bytes: int, count: int
) -> None:
    assert count_pieces(size_bytes, SMALL) == count


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_spans_cover_a_file_once(size_bytes: int, piece_bytes: int) -> None:
    at = 0
    for index in range(count_pieces(size_bytes, piece_bytes)):
        start, end = piece_span(index, size_bytes, piece_bytes)
        assert start == at
        assert 0 < end - start <= piece_bytes
        at = end
    assert at == size_bytes


@pytest.mark.parametrize("index", [-1, 3, 100])
def test_there_is_no_piece_beyond_the_last(index: int) -> None:
    with pytest.raises(IndexError, match="of a file of 33 bytes"):
        piece_span(index, 33, SMALL)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_different_contents_have_different_names(one: bytes, other: bytes) -> None:
    assert (digest(one).digest == digest(other).digest) == (one == other)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_no_changed_piece_matches(data: bytes, chance: st.DataObject) -> None:
    digests = digest(data)
    bit = chance.draw(st.integers(0, len(data) * 8 - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    hurt = bit // 8 // SMALL
    for index, (was, now) in enumerate(zip(cut(data), cut(bytes(changed)), strict=True)):
        assert digest_piece(was) == digests.pieces[index]
        assert (digest_piece(now) == digests.pieces[index]) == (index != hurt)


@given(st.binary(max_size=100))
def test_a_record_of_pieces_is_read_as_it_was_written(data: bytes) -> None:
    written = digest(data)
    assert len(written.encode()) == RECORD.size * len(cut(data))
    assert tuple(RECORD.iter_unpack(written.encode())) == written.pieces


def test_every_flipped_bit_of_a_record_is_refused_or_matches_no_data(tmp_path: Path) -> None:
    data = bytes_of(4 * SMALL + 5)
    right = digest(data)
    path = tmp_path / "blob.pieces"
    encoded = right.encode()
    refused = 0
    for bit in range(len(encoded) * 8):
        flipped = bytearray(encoded)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_pieces(path, right.digest, len(data), piece_bytes=SMALL)
        except Damaged:
            refused += 1
            continue
        # Only the fast digests are not in the name: whoever checks with one refuses good data,
        # and never takes bad.
        hurt = bit // 8 // RECORD.size
        assert [blake for blake, _ in found.pieces] == [blake for blake, _ in right.pieces]
        for index, part in enumerate(cut(data)):
            assert (digest_piece(part) == found.pieces[index]) == (index != hurt)
    assert refused == len(right.pieces) * 32 * 8


def test_a_record_of_any_other_length_is_refused(tmp_path: Path) -> None:
    right = digest(bytes_of(3 * SMALL))
    path = tmp_path / "blob.pieces"
    encoded = right.encode()
    for length in range(len(encoded)):
        path.write_bytes(encoded[:length])
        with pytest.raises(Damaged, match="bytes instead of 120"):
            read_pieces(path, right.digest, 3 * SMALL, piece_bytes=SMALL)
    path.write_bytes(encoded + b"\0")
    with pytest.raises(Damaged, match="121 bytes"):
        read_pieces(path, right.digest, 3 * SMALL, piece_bytes=SMALL)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_record_that_cannot_be_read_is_damage(tmp_path: Path, make: object) -> None:
    path = tmp_path / "blob.pieces"
    make(path)  # type: ignore[operator]
    with pytest.raises(Damaged, match="cannot be read"):
        read_pieces(path, digest(b"").digest, 0, piece_bytes=SMALL)


def test_pieces_in_another_order_or_of_another_size_are_another_blob(tmp_path: Path) -> None:
    right = digest(bytes_of(2 * SMALL))
    path = tmp_path / "blob.pieces"
    path.write_bytes(PieceDigests(size_bytes=right.size_bytes, pieces=right.pieces[::-1]).encode())
    with pytest.raises(Damaged, match="does not amount to"):
        read_pieces(path, right.digest, right.size_bytes, piece_bytes=SMALL)
    path.write_bytes(right.encode())
    with pytest.raises(Damaged, match="does not amount to"):
        read_pieces(path, right.digest, right.size_bytes - 1, piece_bytes=SMALL)

"""Read plans: every wanted byte once, in order, on the grid, and nobody else's."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.weights.plan import FileWant, Portion, ReadPlan, cut, make_plan, plan_check, usual_cut
from modelcache.safetensors_index import TensorEntry

GRID = 64


def entry(name: str, shape: tuple[int, ...], start: int = 0, dtype: str = "BF16") -> TensorEntry:
    size = 2
    for one in shape:
        size *= one
    return TensorEntry(name=name, dtype=dtype, shape=shape, start=start, end=start + size)


def portion(start: int, end: int, *, narrow: bool = False) -> Portion:
    return Portion(
        name=f"{start}", dtype="U8", shape=(end - start,), start=start, end=end,
        narrow=(0, 0, 1) if narrow else None,
    )  # fmt: skip


@st.composite
def wants(draw: st.DrawFn) -> list[FileWant]:
    files = []
    for _ in range(draw(st.integers(1, 3))):
        at, portions = draw(st.integers(0, 100)), []
        for size, wanted in draw(st.lists(st.tuples(st.integers(0, 200), st.booleans()))):
            if wanted:
                portions.append(portion(at, at + size))
            at += size
        files.append(
            FileWant(size_bytes=at, portions=tuple(portions), verified=draw(st.booleans()))
        )
    return files


def plan_of(files: list[FileWant], gap_bytes: int = 16) -> ReadPlan:
    return make_plan(files, batch_bytes=150, read_bytes=GRID, gap_bytes=gap_bytes)


@given(wants())
def test_every_wanted_byte_is_read_once_into_its_batch(files: list[FileWant]) -> None:
    plan = plan_of(files)
    for number, batch in enumerate(plan.batches):
        segments = [s for read in plan.reads for s in read.segments if s.batch == number]
        assert all(read.file == batch.file for read in plan.reads
                   if any(s.batch == number for s in read.segments))  # fmt: skip
        at = batch.start
        for segment in segments:
            assert segment.start == at
            at = segment.end
        assert at == batch.end
    for number, file in enumerate(files):
        batches = [b for b in plan.batches if b.file == number]
        assert [p for b in batches for p in b.portions] == list(file.portions)


@given(wants())
def test_reads_keep_to_the_grid_and_verified_ones_are_whole_pieces(files: list[FileWant]) -> None:
    plan = plan_of(files)
    for read in plan.reads:
        file = files[read.file]
        assert read.start // GRID == (read.end - 1) // GRID
        assert all(one.end == two.start for one, two in pairwise(read.segments))
        assert all(segment.end > segment.start for segment in read.segments)
        if file.verified:
            assert read.piece == read.start // GRID
            assert read.start == read.piece * GRID
            assert read.end == min(read.start + GRID, file.size_bytes)
        else:
            assert read.piece is None
    order = [(read.file, read.start) for read in plan.reads]
    assert order == sorted(order)


@given(wants())
def test_unverified_files_read_little_that_is_not_wanted(files: list[FileWant]) -> None:
    bare = [FileWant(size_bytes=f.size_bytes, portions=f.portions) for f in files]
    plan = plan_of(bare, gap_bytes=0)
    assert plan.read_bytes == plan.tensor_bytes


@given(wants())
def test_batches_are_no_larger_than_asked_unless_one_tensor_is(files: list[FileWant]) -> None:
    for batch in plan_of(files).batches:
        assert batch.size_bytes <= 150 or len(batch.portions) == 1


def test_neighbours_across_a_small_gap_share_a_batch() -> None:
    near = FileWant(size_bytes=100, portions=(portion(0, 10), portion(20, 30)))
    far = FileWant(size_bytes=100, portions=(portion(0, 10), portion(40, 50)))
    assert [len(plan_of([f]).batches) for f in (near, far)] == [1, 2]
    assert [plan_of([f]).read_bytes for f in (near, far)] == [30, 20]


def test_what_is_narrowed_has_a_batch_of_its_own() -> None:
    file = FileWant(
        size_bytes=30, portions=(portion(0, 10), portion(10, 20, narrow=True), portion(20, 30))
    )
    assert [len(batch.portions) for batch in plan_of([file]).batches] == [1, 1, 1]


def test_checking_reads_everything() -> None:
    plan = plan_check([FileWant(size_bytes=130, portions=(), verified=True),
                       FileWant(size_bytes=0, portions=())], read_bytes=GRID)  # fmt: skip
    assert [(r.file, r.piece, r.start, r.end) for r in plan.reads] == [
        (0, 0, 0, 64), (0, 1, 64, 128), (0, 2, 128, 130),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (8, 4), 0),
        ("model.layers.3.self_attn.q_proj.bias", (8,), 0),
        ("model.layers.3.self_attn.o_proj.weight", (4, 8), 1),
        ("model.layers.3.self_attn.o_proj.bias", (4,), None),
        ("model.layers.3.mlp.down_proj.weight", (4, 8), 1),
        ("model.layers.3.mlp.gate_proj.weight", (8, 4), 0),
        ("model.layers.3.block_sparse_moe.experts.1.w2.weight", (4, 8), 1),
        ("model.embed_tokens.weight", (8, 4), 0),
        ("lm_head.weight", (8, 4), 0),
        ("model.norm.weight", (4,), None),
        ("model.layers.3.mlp.gate.weight", (8, 4), None),
        ("model.layers.3.self_attn.q_proj.qweight", (8, 4), None),
    ],
)
def test_how_llama_like_models_are_cut(name: str, shape: tuple[int, ...], dim: int | None) -> None:
    assert usual_cut(name, shape) == dim


def test_rows_are_read_in_part_and_columns_whole() -> None:
    tensor = entry("w", (8, 6), start=1000)
    rows = [cut(tensor, 0, rank, 4) for rank in range(4)]
    assert [(p.start, p.end, p.shape, p.narrow) for p in rows] == [
        (1000 + 24 * r, 1024 + 24 * r, (2, 6), None) for r in range(4)
    ]
    columns = cut(tensor, 1, 2, 3)
    assert (columns.start, columns.end, columns.shape) == (1000, 1096, (8, 6))
    assert columns.narrow == (1, 4, 2)
    assert cut(entry("w", (1, 6)), 1, 1, 2).narrow is None
    assert cut(tensor, None, 3, 4) == cut(tensor, 0, 0, 1)


@pytest.mark.parametrize(("shape", "dim", "world"), [((7, 2), 0, 2), ((4, 5), 1, 2), ((4,), 1, 2)])
def test_what_cannot_be_cut_evenly_is_refused(shape: tuple[int, ...], dim: int, world: int) -> None:
    with pytest.raises(ValueError, match="'w'"):
        cut(entry("w", shape), dim, 0, world)


def test_half_a_byte_cannot_be_cut() -> None:
    tensor = TensorEntry(name="w", dtype="F4", shape=(2, 1), start=0, end=1)
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(tensor, 0, 0, 2)

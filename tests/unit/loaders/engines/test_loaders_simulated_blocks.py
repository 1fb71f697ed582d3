from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaders.engines.simulated.scheduler import BlockPool, BlockTable

CAPACITY = 12


class BlockPoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, publish and go; a plain count of what each holds is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.held: list[tuple[BlockTable, list[int], int]] = []

    @rule(start=st.integers(0, 2), length=st.integers(1, 6))
    def come(self, start: int, length: int) -> None:
        hashes = [start * 100 + n for n in range(length)]
        hits = self.pool.match(hashes, length)
        assert hits <= length
        available = self.pool.available
        holding = BlockTable()
        took = self.pool.take(holding, hashes[:hits], length - hits)
        if took:
            assert len(holding) == length
            self.held.append((holding, hashes, hits))
        else:
            assert len(holding) == 0
            assert self.pool.available == available

    @rule(which=st.integers(0, 100))
    def publish_all(self, which: int) -> None:
        if self.held:
            holding, hashes, published = self.held[which % len(self.held)]
            before = len(holding)
            for value in hashes[published:]:
                self.pool.publish(holding, value)
            assert len(holding) == before
            self.held[which % len(self.held)] = (holding, hashes, len(hashes))

    @rule(which=st.integers(0, 100))
    def go(self, which: int) -> None:
        if self.held:
            holding, _, _ = self.held.pop(which % len(self.held))
            self.pool.release(holding)
            assert len(holding) == 0

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.cached_idle == 0

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        shared = {value for holding, _, _ in self.held for value in holding.hashes}
        own = sum(holding.anonymous for holding, _, _ in self.held)
        assert self.pool.used == len(shared) + own
        assert self.pool.available == CAPACITY - self.pool.used
        if not self.held:
            assert self.pool.usage_fraction == 0


BlockPoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase


def _filled(pool: BlockPool, hashes: list[int]) -> BlockTable:
    holding = BlockTable()
    assert pool.take(holding, (), len(hashes))
    for value in hashes:
        pool.publish(holding, value)
    return holding


def test_released_blocks_are_found_again_until_they_are_evicted() -> None:
    pool = BlockPool(4)
    pool.release(_filled(pool, [1, 2]))
    assert pool.match([1, 2, 3], 3) == 2
    assert pool.cached_idle == 2
    hog = BlockTable()
    assert pool.take(hog, (), 3)
    assert pool.match([1, 2, 3], 3) == 1  # of one sequence, the last block goes first


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(4)
    pool.release(_filled(pool, [1, 2]))
    pool.release(_filled(pool, [5, 6]))
    again = BlockTable()
    assert pool.take(again, [1, 2], 0)
    pool.release(again)
    hog = BlockTable()
    assert pool.take(hog, (), 2)
    assert (pool.match([1, 2], 2), pool.match([5, 6], 2)) == (2, 0)


def test_shared_blocks_are_counted_once_and_kept_while_anyone_uses_them() -> None:
    pool = BlockPool(4)
    first = _filled(pool, [1, 2])
    second = BlockTable()
    assert pool.take(second, [1, 2], 1)
    assert pool.used == 3
    pool.release(first)
    assert pool.used == 3
    pool.release(second)
    assert pool.used == 0


def test_without_caching_nothing_is_ever_found() -> None:
    pool = BlockPool(4, caching=False)
    pool.release(_filled(pool, [1, 2]))
    assert pool.match([1, 2], 2) == 0
    assert pool.cached_idle == 0

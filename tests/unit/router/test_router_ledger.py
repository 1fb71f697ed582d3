"""The ledger against a plain dict, with several workers on shared rows."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from gateway.datapath.shared import Shared
from router.ledger import Ledger, LedgerError

WORKERS = 3
SLOTS = 4


class Books(RuleBasedStateMachine):
    """Workers reserve and settle; each sees its own at once and the others' after a refresh."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared.create(workers=WORKERS, max_replicas=SLOTS, max_pools=1)
        self.ledgers = [self.new(worker) for worker in range(WORKERS)]
        self.model: dict[int, dict[int, list[int]]] = {worker: {} for worker in range(WORKERS)}
        self.seen: dict[int, dict[int, tuple[int, int]]] = {w: {} for w in range(WORKERS)}
        self.lives = [0] * WORKERS
        self.opened = [[0] * SLOTS for _ in range(WORKERS)]
        self.seen_opened = [[0] * SLOTS for _ in range(WORKERS)]

    def new(self, worker: int) -> Ledger:
        rows = self.shared.replica_rows(worker)
        return Ledger(*rows, lambda: self.shared.other_rows(worker, SLOTS))

    def totals(self, slot: int, workers: list[int]) -> tuple[int, int]:
        entries = [tokens for worker in workers for tokens in self.model[worker].get(slot, [])]
        return len(entries), sum(entries)

    @rule(
        target=running,
        worker=st.integers(0, WORKERS - 1),
        slot=st.integers(0, SLOTS - 1),
        tokens=st.integers(1, 10**12),
    )
    def reserve(self, worker: int, slot: int, tokens: int) -> tuple[int, int, int, int]:
        self.ledgers[worker].reserve(slot, tokens)
        self.model[worker].setdefault(slot, []).append(tokens)
        return worker, slot, tokens, self.lives[worker]

    @rule(what=consumes(running))
    def settle(self, what: tuple[int, int, int, int]) -> None:
        worker, slot, tokens, life = what
        if life != self.lives[worker]:
            return  # it went with its worker
        self.ledgers[worker].settle(slot, tokens)
        self.model[worker][slot].remove(tokens)

    @rule(worker=st.integers(0, WORKERS - 1))
    def refresh(self, worker: int) -> None:
        self.ledgers[worker].refresh()
        others = [other for other in range(WORKERS) if other != worker]
        self.seen[worker] = {slot: self.totals(slot, others) for slot in range(SLOTS)}
        for slot in range(SLOTS):
            self.seen_opened[worker][slot] = sum(self.opened[other][slot] for other in others)

    @rule(worker=st.integers(0, WORKERS - 1), slot=st.integers(0, SLOTS - 1), opens=st.booleans())
    def change_window(self, worker: int, slot: int, opens: bool) -> None:
        if opens:
            self.ledgers[worker].open_window(slot)
            self.opened[worker][slot] += 1
        else:
            self.ledgers[worker].close_window(slot)
            self.opened[worker][slot] = 0

    @rule(worker=st.integers(0, WORKERS - 1))
    def die_and_start_again(self, worker: int) -> None:
        self.shared.clear_worker(worker)
        self.ledgers[worker] = self.new(worker)
        self.model[worker] = {}
        self.opened[worker] = [0] * SLOTS
        self.lives[worker] += 1
        self.refresh(worker)

    @invariant()
    def each_worker_sees_its_own_exactly_and_the_others_as_last_read(self) -> None:
        for worker, ledger in enumerate(self.ledgers):
            ledger.check_integrity()
            for slot in range(SLOTS):
                mine = self.totals(slot, [worker])
                others = self.seen[worker].get(slot, (0, 0))
                assert ledger.requests[slot] == mine[0] + others[0]
                assert ledger.tokens[slot] == mine[1] + others[1]
                opened = self.opened[worker][slot] + self.seen_opened[worker][slot]
                assert ledger.opened[slot] == opened

    @invariant()
    def the_shared_rows_are_what_the_control_process_reads(self) -> None:
        for slot in range(SLOTS):
            assert self.shared.replica_total(slot) == self.totals(slot, list(range(WORKERS)))


Books.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_ledger_against_a_plain_dict = Books.TestCase


@pytest.mark.parametrize(
    ("requests", "tokens"),
    [([-1], [0]), ([0], [-1]), ([0], [5]), ([1], [-3])],
)
def test_books_that_cannot_be_true_are_refused(requests: list[int], tokens: list[int]) -> None:
    with pytest.raises(LedgerError):
        Ledger(requests, tokens, [0]).check_integrity()


def test_rows_that_somebody_else_wrote_to_are_noticed() -> None:
    requests, tokens = [0, 0], [0, 0]
    ledger = Ledger(requests, tokens, [0, 0])
    ledger.reserve(1, 7)
    ledger.check_integrity()
    tokens[1] = 8
    with pytest.raises(LedgerError, match="slot 1"):
        ledger.check_integrity()

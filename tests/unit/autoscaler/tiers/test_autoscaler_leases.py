"""Who holds models and what preparation steps have made of them: leases of ``NodePreparer``."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_node import URL, Model, Node, pool, run, until

from autoscaler.tiers.leases import Leases
from modelcache.ports import IsCancelled, OnProgress
from modelcache.store.leases import Lease
from modelcache.types import Cancelled, Tier


class Gate:
    """Blocks those that come to lease something until the test lets them go on."""

    def __init__(self) -> None:
        self.begun, self.go, self.left = threading.Event(), threading.Event(), threading.Event()
        self._kept: list[Any] = []

    def before(
        self, lease: Callable[..., contextlib.AbstractContextManager[Any]]
    ) -> Callable[..., contextlib.AbstractContextManager[Any]]:
        @contextlib.contextmanager
        def slow(*asked: Any) -> Iterator[Any]:
            self.begun.set()
            assert self.go.wait(60)
            try:
                with lease(*asked) as held:
                    yield held
            finally:
                self.left.set()

        def keep(*asked: Any) -> Any:
            self._kept.append(slow(*asked))  # or who forgets it would let go of it
            return self._kept[-1]

        return keep

    async def cancel(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin this, and call it off once it waits here."""
        task = asyncio.create_task(work)
        assert await asyncio.to_thread(self.begun.wait, 60)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def let_on(self) -> None:
        """Those that wait here go on, and release their lease."""
        self.go.set()
        assert await asyncio.to_thread(self.left.wait, 10), "what was cancelled is held for good"


def transforming(
    root: Path, made: list[tuple[str, Any]], held: list[str] | None = None
) -> Callable[..., contextlib.AbstractContextManager[Model]]:
    """Preparation steps whose result is noted in ``made``, and who holds it in ``held``."""

    @contextlib.contextmanager
    def transform(
        model: str, source: Any, holder: str, tell: OnProgress, cancelled: IsCancelled
    ) -> Iterator[Model]:
        made.append((model, source))
        result = root / "made"
        result.mkdir(exist_ok=True)
        (result / "a.safetensors").write_bytes(b"made")
        names = [] if held is None else held
        names.append(holder)
        try:
            yield Model("prepared://key", "made", result)
        finally:
            names.remove(holder)

    return transform


def test_preparation_steps_are_run_once_and_their_result_is_what_starts(tmp_path: Path) -> None:
    remote = pool()
    made: list[tuple[str, Any]] = []

    node = Node(tmp_path, transform=transforming(tmp_path, made))

    async def story() -> None:
        spec = await node.prepare(remote)
        await node.prepare(remote, "m-2")
        assert spec.pool.model == str(tmp_path / "made")
        assert made == [(URL, node.cache.model())]
        await node.preparer.move_to(remote, Tier.FORKED)
        assert node.standbys.there["m"].pool.model == str(tmp_path / "made")

    run(node, story)


def test_what_steps_have_made_is_leased_by_each_who_uses_it(tmp_path: Path) -> None:
    """A running, starting or standing-by replica reads the result, so the result must stay."""
    remote = pool()
    held: list[str] = []
    node = Node(tmp_path, transform=transforming(tmp_path, [], held))

    async def story() -> None:
        await node.prepare(remote)
        assert (held, node.cache.results) == (["m-1"], [])
        await node.prepare(remote, "m-2")
        assert (held, node.cache.results) == (["m-1"], ["m-2"])
        await node.preparer.move_to(remote, Tier.PAGED)
        assert node.cache.results == ["m-2", "m, at zero"]
        await node.preparer.move_to(remote, Tier.FORKED)
        assert node.cache.results == ["m-2", "m, at zero"], "once, however often it is settled"
        await node.preparer.release("m-1")
        await node.preparer.release("m-2")
        assert (held, node.cache.results) == ([], ["m, at zero"])
        await node.preparer.move_to(remote, Tier.ON_DISK)
        assert (held, node.cache.results) == ([], [])

    run(node, story)


def test_a_directory_s_results_are_leased_too(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    held: list[str] = []
    node = Node(tmp_path, transform=transforming(tmp_path, [], held))

    async def story() -> None:
        await node.preparer.refresh(local)
        await node.preparer.move_to(local, Tier.PAGED)
        assert held == ["m, at zero"]
        await node.preparer.move_to(local, Tier.PAGED)
        assert held + node.cache.results == ["m, at zero"]
        await node.prepare(local)
        assert sorted(held + node.cache.results) == ["m, at zero", "m-1"]

    run(node, story)


def test_a_result_that_was_evicted_is_made_again(tmp_path: Path) -> None:
    remote = pool()
    made: list[tuple[str, Any]] = []
    held: list[str] = []
    node = Node(tmp_path, transform=transforming(tmp_path, made, held))

    async def story() -> None:
        await node.prepare(remote)
        await node.preparer.release("m-1")
        node.cache.results_evicted = True
        spec = await node.prepare(remote, "m-2")
        assert len(made) == 2
        assert held == ["m-2"]
        assert spec.pool.model == str(tmp_path / "made")

    run(node, story)


@pytest.mark.parametrize("at", ["the model", "what is made", "what was made"])
@pytest.mark.parametrize("end", ["released", "closed"])
def test_a_start_that_is_cancelled_holds_nothing_however_late_its_lease_comes(
    tmp_path: Path, at: str, end: str
) -> None:
    remote = pool()
    held: list[str] = []
    gate = Gate()
    transform = transforming(tmp_path, [], held)
    slow = gate.before(transform) if at == "what is made" else transform
    node = Node(tmp_path, transform=slow)
    node.cache.here = True

    async def story() -> None:
        if at == "what was made":
            await node.prepare(remote, "m-0")
            await node.preparer.release("m-0")
        lease = node.cache.lease
        if at == "the model":
            node.cache.lease = gate.before(lease)  # type: ignore[method-assign]
        elif at == "what was made":
            node.cache.lease = lambda model, holder: (  # type: ignore[method-assign]
                lease if model.url == URL else gate.before(lease)
            )(model, holder)
        await gate.cancel(node.prepare(remote))
        if end == "released":
            await node.preparer.release("m-1")
            assert node.cache.leases == []
        else:
            await node.preparer.close()
        await gate.let_on()
        assert (held, node.cache.leases, node.cache.results) == ([], [], [])
        if end == "released":
            await node.preparer.close()

    asyncio.run(story())


def test_a_pool_at_zero_that_is_cancelled_holds_nothing_once_it_is_colder(tmp_path: Path) -> None:
    remote = pool()
    held: list[str] = []
    gate = Gate()
    node = Node(tmp_path, transform=gate.before(transforming(tmp_path, [], held)))
    node.cache.here = True

    async def story() -> None:
        await gate.cancel(node.preparer.move_to(remote, Tier.PAGED))
        await node.preparer.move_to(remote, Tier.ON_DISK)
        await gate.let_on()
        assert (held, node.cache.leases) == ([], [])
        await node.preparer.move_to(remote, Tier.PAGED)
        assert (held, node.cache.leases) == (["m, at zero"], ["m, at zero"])

    run(node, story)


def test_letting_go_is_not_cancelled(tmp_path: Path) -> None:
    remote = pool()
    threads = ThreadPoolExecutor(1)
    node = Node(tmp_path, threads=threads)
    node.cache.here = True
    busy = threading.Event()

    async def story() -> None:
        await node.prepare(remote)
        threads.submit(busy.wait, 60)
        release = asyncio.create_task(node.preparer.release("m-1"))
        await asyncio.sleep(0)
        release.cancel()
        await asyncio.gather(release, return_exceptions=True)
        busy.set()
        await until(lambda: node.cache.leases == [])

    run(node, story)


class CountingThreads(ThreadPoolExecutor):
    """Counts what it is given."""

    submitted = 0

    def submit(self, *asked: Any, **named: Any) -> Any:
        self.submitted += 1
        return super().submit(*asked, **named)


def test_a_pool_without_steps_leases_its_model_once(tmp_path: Path) -> None:
    """Steps of another pool cost it nothing: neither a lease nor a thread."""
    remote = pool()

    @contextlib.contextmanager
    def same(*asked: Any) -> Iterator[Model]:
        yield node.cache.model()

    threads = CountingThreads(4)
    node = Node(tmp_path, transform=same, threads=threads)
    node.cache.here = True

    async def story() -> None:
        await node.prepare(remote)
        await node.paged()
        threads.submitted = 0
        spec = await node.prepare(remote, "m-2")
        assert spec.pool.model == str(tmp_path / "view")
        assert threads.submitted == 2, "a look-up and a lease"
        assert (node.cache.leases, node.cache.results) == (["m-1", "m-2"], [])
        await node.preparer.move_to(remote, Tier.PAGED)
        assert node.cache.leases == ["m-1", "m-2", "m, at zero"]

    run(node, story)


def test_a_directory_is_given_to_its_steps_as_what_it_is(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    given: list[tuple[str, Any]] = []
    node = Node(tmp_path, transform=transforming(tmp_path, given))

    async def story() -> None:
        await node.prepare(local)
        ((name, source),) = given
        assert (name, source.url) == (str(tmp_path), str(tmp_path))
        assert (source.revision, source.path, source.manifest) == ("in place", tmp_path, None)

    run(node, story)


def taken(holders: list[str], holder: str) -> Lease:
    """A lease that is there before it is entered, as the cache's are."""
    holders.append(holder)
    return Lease(holder, lambda: holders.remove(holder))


def test_leases_hold_until_they_are_closed_and_nothing_after_that() -> None:
    held: list[str] = []
    leases = Leases()
    part = leases.part()
    assert part.enter(taken(held, "a")).holder == "a"
    leases.enter(taken(held, "b"))
    assert leases.refuse()
    with pytest.raises(Cancelled):
        part.enter(taken(held, "c"))
    assert held == ["a", "b"], "refusing lets go of nothing"
    leases.close()
    assert held == []
    assert not leases.refuse()
    for closed in (leases, part, leases.part()):
        with pytest.raises(Cancelled):
            closed.enter(taken(held, "d"))
    assert held == []
    leases.close()


def test_a_part_that_is_closed_is_held_no_longer_and_the_rest_is() -> None:
    held: list[str] = []
    leases = Leases()
    one, other = leases.part(), leases.part()
    one.enter(taken(held, "a"))
    other.enter(taken(held, "b"))
    one.close()
    assert held == ["b"]
    assert leases.refuse()
    other.close()
    assert not leases.refuse()


def test_a_lease_that_cannot_be_released_does_not_keep_the_others() -> None:
    held: list[str] = []
    leases = Leases()
    leases.part().enter(taken(held, "a"))
    leases.enter(taken(held, "b"))

    def fail() -> None:
        raise OSError("the disk is away")

    leases.enter(Lease("c", fail))
    with pytest.raises(OSError, match="away"):
        leases.close()
    assert held == []


def test_leases_are_closed_under_threads_that_enter() -> None:
    def enter(leases: Leases, held: list[str], start: threading.Barrier, name: int) -> None:
        start.wait()
        for number in range(20):
            with contextlib.suppress(Cancelled):
                leases.part().enter(taken(held, f"{name}-{number}"))

    for _ in range(20):
        held: list[str] = []
        leases = Leases()
        start = threading.Barrier(9)
        threads = [
            threading.Thread(target=enter, args=(leases, held, start, name)) for name in range(8)
        ]
        for thread in threads:
            thread.start()
        start.wait()
        leases.close()
        for thread in threads:
            thread.join()
        assert held == []

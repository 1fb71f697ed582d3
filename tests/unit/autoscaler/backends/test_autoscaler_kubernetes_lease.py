"""Who leads, by a Lease: what is done about it, and when."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autoscaler.backends.kubernetes.lease import Election, LeaseStep, SeenLease, decide_step, see


def lease(holder: str, renewed: str = "t0", lasts_s: int = 15) -> dict[str, Any]:
    return {
        "spec": {
            "holderIdentity": holder,
            "renewTime": renewed,
            "leaseDurationSeconds": lasts_s,
        }
    }


def test_its_age_counts_from_when_it_was_seen_to_change() -> None:
    first = see(lease("a"), None, 10.0)
    assert first is not None
    assert first.at_s == 10.0
    again = see(lease("a"), first, 20.0)
    assert again is first
    renewed = see(lease("a", "t1"), first, 20.0)
    assert renewed is not None
    assert renewed.at_s == 20.0
    other = see(lease("b"), first, 21.0)
    assert other is not None
    assert other.at_s == 21.0
    assert see(None, first, 30.0) is None


@pytest.mark.parametrize(
    ("seen", "now_s", "step"),
    [
        (None, 0.0, LeaseStep.CREATE),
        (SeenLease(holder="me", renewed="t", lasts_s=15.0, at_s=0.0), 100.0, LeaseStep.RENEW),
        (SeenLease(holder="other", renewed="t", lasts_s=15.0, at_s=0.0), 14.9, LeaseStep.WAIT),
        (SeenLease(holder="other", renewed="t", lasts_s=15.0, at_s=0.0), 15.0, LeaseStep.TAKE),
        (SeenLease(holder="", renewed="t", lasts_s=1.0, at_s=0.0), 0.0, LeaseStep.TAKE),
    ],
)
def test_what_is_done_about_it(seen: SeenLease | None, now_s: float, step: LeaseStep) -> None:
    assert decide_step(seen, "me", now_s) is step


class NoLease:
    """A client of an API server that has no lease yet: the first one that is made is ``made``."""

    def __init__(self) -> None:
        self.made: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def get(self, kind: Any, name: str, namespace: str | None) -> None:
        return None

    async def create(self, kind: Any, lease: dict[str, Any], namespace: str | None) -> None:
        if not self.made.done():
            self.made.set_result(lease)


@pytest.mark.parametrize(("lasts_s", "written"), [(1.0, 1), (1.4, 2), (1.6, 2), (15.0, 15)])
def test_others_wait_no_shorter_than_the_holder_leads(lasts_s: float, written: int) -> None:
    async def elect() -> dict[str, Any]:
        client: Any = NoLease()
        election = Election(
            lambda: client,
            name="l",
            namespace=None,
            identity="me",
            lasts_s=lasts_s,
            clock=lambda: 0.0,
        )
        running = asyncio.create_task(election.run())
        try:
            return await asyncio.wait_for(client.made, 10)
        finally:
            running.cancel()

    assert asyncio.run(elect())["spec"]["leaseDurationSeconds"] == written

"""Many models on few devices: which replicas are loaded, and which make room for which.

A device is a GPU, or the host memory of a machine. While all replicas that pools want fit, nothing
happens here. Where one does not, its pool waits for its turn, the one that waits longest first, and
others are taken down for it: those without a request before all others, of these the one that is
worth least for the memory it holds; then those that have been loaded for a turn. A swap is never
under a running request: a replica that is to go gets no new ones, and goes when it has none left.

Why no pool starves, and none blocks another. Waiting pools keep their order from the moment they
began to wait. What the first one needs is reserved for it, on all of its devices in one step; no
later pool takes it. So the first waits at most for what is loaded there: ``min_loaded_s`` where
that is idle, ``turn_s`` where it is busy, then the end of the requests it has; and each pool is the
first once those before it have had as much. What cannot fit, because it is larger than the device
or because pools keep a minimum there, waits without holding up the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from autoscaler.types import GpuCapacity

HOST = "host"
"""The device that is the memory of a machine."""
WHOLE = None
"""In place of bytes: the device alone, for the memory of the replica is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What replicas share. ``memory_bytes`` is ``None`` where unknown: then it is for one."""

    name: str
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one replica takes: so many bytes (or ``WHOLE``) of each of ``count`` of the devices.
    ``asleep_bytes`` is what it keeps while it sleeps, ``None`` where it does not."""

    devices: tuple[str, ...]
    count: int = 1
    memory_bytes: int | None = WHOLE
    asleep_bytes: int | None = None


def gpu_name(index: int) -> str:
    """The name of a GPU as a device."""
    return f"gpu{index}"


def gpu_devices(gpus: Sequence[GpuCapacity]) -> list[Device]:
    """These GPUs as devices."""
    return [Device(name=gpu_name(one.index), memory_bytes=one.memory_bytes) for one in gpus]


def gpus_of(devices: Sequence[str]) -> tuple[int, ...] | None:
    """The GPUs among these devices by their indices; ``None`` without any."""
    return tuple(sorted(int(name[3:]) for name in devices if name != HOST)) or None


class Phase(StrEnum):
    """Where a replica is, as far as its memory goes."""

    LOADING = "loading"
    LOADED = "loaded"
    LEAVING = "leaving"
    """It gets no more requests; its memory is free when it has gone, or sleeps."""
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A replica that holds memory. ``since_s`` is when its phase began. ``busy``: it has requests,
    or whether it has is unknown. ``to_sleep``: it leaves to sleep. ``recallable``: it leaves, but
    may go on."""

    id: str
    devices: tuple[str, ...]
    phase: Phase
    since_s: float
    busy: bool = False
    to_sleep: bool = False
    recallable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOnDevices:
    """A pool as packing sees it.

    ``desired`` is what it would have if there were room for all, ``kept`` how many of its replicas
    no other pool may take. ``pressing``: a request waits for it, or it has fewer than ``kept``.
    ``worth`` is the price of a second without it: by its requests, and how long each would wait.
    """

    name: str
    desired: int
    pressing: bool
    need: Need
    residents: tuple[Resident, ...] = ()
    kept: int = 0
    worth: float = 0.0

    @property
    def loaded(self) -> int:
        """Replicas that are loaded, or load."""
        return sum(one.phase in {Phase.LOADING, Phase.LOADED} for one in self.residents)


class Eviction(StrEnum):
    """How a replica makes room."""

    SLEEP = "sleep"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackState:
    """``waiting``: since when each pool has been waiting for its turn."""

    waiting: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """``limits``: how many loaded replicas a pool may have now, for pools that do not get all they
    want. ``starts``: the devices of each replica that may start now, by pool. ``evict``: replicas
    that are to make room. ``waits``: what each waiting pool waits for, in words."""

    limits: Mapping[str, int] = field(default_factory=dict)
    starts: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    evict: Mapping[str, Eviction] = field(default_factory=dict)
    waits: Mapping[str, str] = field(default_factory=dict)


class DeviceMemory:
    """What is taken of each device."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._size = {one.name: one.memory_bytes for one in devices}
        self._used = dict.fromkeys(self._size, 0)
        self._users = dict.fromkeys(self._size, 0)
        self._alone = dict.fromkeys(self._size, 0)

    def take(self, devices: Sequence[str], memory_bytes: int | None, sign: int = 1) -> None:
        """Count what a replica takes of these devices; with ``sign`` -1 what it gives back."""
        for name in devices:
            if name in self._size and memory_bytes != 0:
                self._users[name] += sign
                self._used[name] += sign * (memory_bytes or 0)
                self._alone[name] += sign * (memory_bytes is WHOLE)

    def fits(self, name: str, memory_bytes: int | None) -> bool:
        """Whether so much of a device is free."""
        size = self._size.get(name, 0)
        if memory_bytes is WHOLE or size is None or self._alone[name]:
            return not self._users[name]
        return self._used[name] + memory_bytes <= size

    def all_fit(self, devices: Sequence[str], memory_bytes: int | None) -> bool:
        """Whether so much of each of these is free."""
        return all(name in self._size and self.fits(name, memory_bytes) for name in devices)

    def copy(self) -> DeviceMemory:
        """The same, to try something with."""
        other = DeviceMemory(())
        other._size = self._size
        other._used, other._users = dict(self._used), dict(self._users)
        other._alone = dict(self._alone)
        return other

    def choose(self, need: Need) -> tuple[str, ...] | None:
        """Devices on which a replica fits, the fullest first so that whole ones stay free; ``None``
        where they are too few."""
        fitting = [
            name
            for name in need.devices
            if name in self._size and self.fits(name, need.memory_bytes)
        ]
        fitting.sort(key=lambda name: -self._used[name])
        return tuple(fitting[: need.count]) if len(fitting) >= need.count else None


class Packing:
    """One look at all pools and devices, while a plan is made of it. ``free`` is what is taken now,
    ``soon`` what will be when all that leaves has left; what is reserved counts in both."""

    def __init__(
        self, devices: Sequence[Device], pools: Sequence[PoolOnDevices], now_s: float
    ) -> None:
        self._now_s = now_s
        self._pools = pools
        self._free, self._soon = DeviceMemory(devices), DeviceMemory(devices)
        self.evicted: dict[str, Eviction] = {}
        self.loaded = {pool.name: pool.loaded for pool in pools}
        self.granted: Counter[str] = Counter()
        self.starts: dict[str, list[tuple[str, ...]]] = {pool.name: [] for pool in pools}
        self._used: set[str] = set()
        for pool in pools:
            for one in pool.residents:
                self._free.take(one.devices, held_bytes(pool.need, one))
                self._soon.take(one.devices, left_bytes(pool.need, one))

    def grant(self, pool: PoolOnDevices) -> bool:
        """Give one more replica its memory, if it is there: one that can be called back, else one
        that sleeps, else a new one. ``False``: it is not there yet."""
        for one in pool.residents:
            if one.id in self._used:
                continue
            if one.phase is Phase.LEAVING and one.recallable:
                left = left_bytes(pool.need, one)
                self._soon.take(one.devices, left, -1)
                if self._soon.all_fit(one.devices, pool.need.memory_bytes):
                    self._soon.take(one.devices, pool.need.memory_bytes)
                    return self._note_grant(pool, one.devices, one.id)
                self._soon.take(one.devices, left)
        sleeper = self._find_sleeper(pool)
        if sleeper is not None:
            awake = sleeper.phase is not Phase.ASLEEP  # it falls asleep, and is woken after that
            self._wake_up(pool, sleeper)
            fits = not awake and self._free.all_fit(sleeper.devices, pool.need.memory_bytes)
            chosen = sleeper.devices if fits else None
            if chosen is None:
                self._wake_up(pool, sleeper, -1)
        else:
            chosen = self._free.choose(pool.need)
        if chosen is None:
            return False
        self._reserve(chosen, pool.need.memory_bytes)
        return self._note_grant(pool, chosen, sleeper.id if sleeper is not None else "")

    def _note_grant(self, pool: PoolOnDevices, devices: tuple[str, ...], replica_id: str) -> bool:
        self.granted[pool.name] += 1
        if replica_id:
            self._used.add(replica_id)
        else:
            self.starts[pool.name].append(devices)
        return True

    def _find_sleeper(self, pool: PoolOnDevices) -> Resident | None:
        """A replica that sleeps, or is about to, is woken before another is started."""
        for one in pool.residents:
            leaves = one.phase is Phase.LEAVING and one.to_sleep and not one.recallable
            if (leaves or one.phase is Phase.ASLEEP) and one.id not in self._used:
                return one if one.id not in self.evicted else None
        return None

    def _wake_up(self, pool: PoolOnDevices, sleeper: Resident, sign: int = 1) -> None:
        """What it keeps asleep becomes part of what it takes awake."""
        if sleeper.phase is Phase.ASLEEP:
            self._free.take(sleeper.devices, pool.need.asleep_bytes or 0, -sign)
        self._soon.take(sleeper.devices, pool.need.asleep_bytes or 0, -sign)

    def _reserve(self, devices: Sequence[str], memory_bytes: int | None) -> None:
        self._free.take(devices, memory_bytes)
        self._soon.take(devices, memory_bytes)

    def make_room(
        self, pool: PoolOnDevices, min_loaded_s: float, turn_s: float, *, behind: bool
    ) -> str:
        """Have others leave for a pool as far as they may, and reserve what it needs; what it waits
        for, in words. ``behind``: others have waited for longer."""
        need = pool.need
        sleeper = self._find_sleeper(pool)
        if sleeper is not None:
            need = replace(need, devices=sleeper.devices, count=len(sleeper.devices))
            self._wake_up(pool, sleeper)
        if (chosen := self._soon.choose(need)) is not None:
            self._reserve(chosen, need.memory_bytes)
            return "waits until what leaves has left"
        others = [one for one in self._candidates(pool) if set(one[1].devices) & set(need.devices)]
        may_go = [
            (other, one)
            for other, one in others
            if one.phase is Phase.ASLEEP
            or (
                one.phase is Phase.LOADED
                and self._now_s - one.since_s >= (turn_s if one.busy else min_loaded_s)
            )
        ]
        for may_sleep in (True, False):
            before = set(self.evicted)
            chosen = self._evict(need, may_go, may_sleep=may_sleep)
            if chosen is not None:
                self._reserve(chosen, need.memory_bytes)
                gone = ", ".join(sorted(set(self.evicted) - before))
                return f"{gone} makes room" if gone else "waits until what leaves has left"
        later = self._soon.copy()
        kept = {other.name: other.kept for other, _ in others}
        for other, one in reversed(others):  # what is kept is what is worth most
            if one.phase is not Phase.ASLEEP and kept[other.name] > 0:
                kept[other.name] -= 1
            else:
                later.take(one.devices, held_bytes(other.need, one), -1)
        if (chosen := later.choose(need)) is not None:
            self._reserve(chosen, need.memory_bytes)
            return "waits for its turn"
        if sleeper is not None:
            self._wake_up(pool, sleeper, -1)
        return "waits behind others" if behind else "does not fit beside what is kept"

    def _candidates(self, pool: PoolOnDevices) -> list[tuple[PoolOnDevices, Resident]]:
        """What may have to leave for a pool, now or later, the first first."""
        found = [
            (other, one)
            for other in self._pools
            if other.name != pool.name
            for one in other.residents
            if one.phase is not Phase.LEAVING
            and one.id not in self.evicted
            and one.id not in self._used
        ]
        return sorted(
            found,
            key=lambda one: (
                one[1].busy,
                one[0].worth / (held_bytes(one[0].need, one[1]) or 1),
                one[1].since_s,
            ),
        )

    def _evict(
        self,
        need: Need,
        among: Sequence[tuple[PoolOnDevices, Resident]],
        *,
        may_sleep: bool,
    ) -> tuple[str, ...] | None:
        """Evict the first of these that make room for a replica, and no more than that takes; the
        devices it gets. ``None``, with nothing evicted, where all together do not."""
        gone: list[tuple[PoolOnDevices, Resident]] = []
        for pool, one in among:
            if self._soon.choose(need) is not None:
                break
            if one.phase is Phase.ASLEEP or self.loaded[pool.name] > pool.kept:
                self._let_go(pool, one, may_sleep=may_sleep)
                gone.append((pool, one))
        enough = self._soon.choose(need) is not None
        for pool, one in gone:
            self._let_go(pool, one, may_sleep=may_sleep, sign=-1)
            if enough and self._soon.choose(need) is None:
                self._let_go(pool, one, may_sleep=may_sleep)
        return self._soon.choose(need) if enough else None

    def _let_go(
        self, pool: PoolOnDevices, one: Resident, *, may_sleep: bool, sign: int = 1
    ) -> None:
        """Have a replica leave, or with ``sign`` -1 not."""
        awake = one.phase is Phase.LOADED
        sleeps = awake and may_sleep and pool.need.asleep_bytes is not None
        self._soon.take(one.devices, held_bytes(pool.need, one), -sign)
        self._soon.take(one.devices, pool.need.asleep_bytes or 0 if sleeps else 0, sign)
        self.loaded[pool.name] -= sign * awake
        if sign > 0:
            self.evicted[one.id] = Eviction.SLEEP if sleeps else Eviction.STOP
        else:
            del self.evicted[one.id]


def held_bytes(need: Need, one: Resident) -> int | None:
    """What a replica holds of each of its devices now."""
    return (need.asleep_bytes or 0) if one.phase is Phase.ASLEEP else need.memory_bytes


def left_bytes(need: Need, one: Resident) -> int | None:
    """What it will hold when it has left, if it leaves."""
    if one.phase is not Phase.LEAVING:
        return held_bytes(need, one)
    return (need.asleep_bytes or 0) if one.to_sleep else 0


def pack(
    devices: Sequence[Device],
    pools: Sequence[PoolOnDevices],
    state: PackState,
    now_s: float,
    *,
    min_loaded_s: float,
    turn_s: float,
) -> tuple[PackPlan, PackState]:
    """What each pool may have now, and what leaves to make room. See above."""
    packing = Packing(devices, pools, now_s)
    first = [one for one in pools if one.pressing and one.desired > 0 and one.loaded == 0]
    first.sort(key=lambda one: state.waiting.get(one.name, now_s))
    waits: dict[str, str] = {}
    for pool in first:
        if not packing.grant(pool):
            waits[pool.name] = packing.make_room(pool, min_loaded_s, turn_s, behind=bool(waits))
    for pool in pools:
        if pool.name not in waits:
            while pool.desired > packing.loaded[pool.name] + packing.granted[pool.name]:
                if not packing.grant(pool):
                    break
    limits = {}
    for pool in pools:
        most = packing.loaded[pool.name] + packing.granted[pool.name]
        if most < pool.desired or packing.loaded[pool.name] < pool.loaded:
            limits[pool.name] = most
    plan = PackPlan(
        limits=limits,
        starts={name: tuple(found) for name, found in packing.starts.items() if found},
        evict=dict(packing.evicted),
        waits=waits,
    )
    return plan, PackState(waiting={name: state.waiting.get(name, now_s) for name in waits})

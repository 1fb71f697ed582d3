import pytest

from loaders.engines.simulated.faults import KINDS, FaultPlan, parse


def plan(*texts: str, seed: int = 0) -> FaultPlan:
    made = FaultPlan(seed)
    made.arm(texts, 100.0)
    return made


def hits(made: FaultPlan, count: int, now: float = 100.0, strikes: str = "request") -> list[int]:
    """Which of the next ``count`` requests are hit, from 1."""
    return [n for n in range(1, count + 1) if made.hit(strikes, now) is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_alone(kind: str) -> None:
    assert parse(kind).kind == kind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("explode", "one of crash, hang"),
        ("crash:after_request=3", "not one of"),
        ("crash:after_requests", "not one of"),
        ("crash:after_requests=many", "must be a number"),
        ("slow:factor=0", "between"),
        ("error500:every=0", "between"),
        ("error500:status=200", "between"),
        ("error500:probability=1.5", "between"),
        ("hang:scope=all", "must be one of process, engine, requests"),
        ("crash:during=lunch", "must be one of startup"),
        ("cut:factor=2", "not one of"),
    ],
)
def test_what_is_wrong_is_said_with_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("error500", [1, 2, 3, 4, 5, 6]),
        ("error500:every=3", [3, 6]),
        ("error500:after_requests=4", [5, 6]),
        ("error500:times=2", [1, 2]),
        ("error500:after_requests=1,every=2,times=2", [3, 5]),
        ("reset:every=2", [2, 4, 6]),
        ("crash:after_requests=5", [6]),
        ("hang:scope=requests,times=1", [1]),
        ("slow", []),
        ("hang:scope=engine", []),
        ("accept_close", []),
        ("reset:on=connect", []),
        ("crash:at_s=1", []),
        ("crash:during=startup", []),
    ],
)
def test_which_requests_are_hit(text: str, expected: list[int]) -> None:
    assert hits(plan(text), 6) == expected


def test_connections_are_hit_apart_from_requests() -> None:
    made = plan("accept_close:every=2", "reset:on=connect,after_requests=3")
    assert hits(made, 5, strikes="connection") == [2, 4, 5]


def test_a_window_of_time_begins_and_ends() -> None:
    made = plan("error500:at_s=10,for_s=5")
    assert hits(made, 1, now=105.0) == []
    assert hits(made, 1, now=110.0) == [1]
    assert hits(made, 1, now=114.9) == [1]
    assert hits(made, 1, now=115.0) == []


def test_what_holds_begins_after_so_many_requests_and_ends_with_its_time() -> None:
    made = plan("slow:factor=3,after_requests=2,for_s=10")
    for _ in range(2):
        assert made.standing("slow", 100.0) is None
        made.count()
    fault = made.standing("slow", 101.0)
    assert fault is not None
    assert fault.factor == 3
    assert made.next_s(101.0) == 111.0
    assert made.standing("slow", 111.0) is None


def test_the_clock_alone_brings_about_what_has_a_time_once() -> None:
    made = plan("crash:at_s=3")
    assert made.next_s(100.0) == 103.0
    assert made.due(102.9) is None
    fault = made.due(103.0)
    assert fault is not None
    assert fault.kind == "crash"
    assert made.due(104.0) is None


def test_startup_faults_strike_in_their_phase_only() -> None:
    made = plan("crash:during=startup,phase=loading")
    assert made.during_startup("importing") is None
    assert made.during_startup("loading") is not None
    assert plan("hang:during=startup").during_startup("importing") is not None


def test_chance_comes_from_the_seed() -> None:
    first = hits(plan("error500:probability=0.3", seed=4), 200)
    assert first == hits(plan("error500:probability=0.3", seed=4), 200)
    assert first != hits(plan("error500:probability=0.3", seed=5), 200)
    assert 30 <= len(first) <= 90


def test_a_wrong_list_changes_nothing_and_a_new_one_replaces_all() -> None:
    made = plan("error500:times=1")
    with pytest.raises(ValueError, match="unknown"):
        made.arm(["slow", "explode"], 100.0)
    assert [entry["fault"] for entry in made.describe()] == ["error500:times=1"]
    made.arm([], 100.0)
    assert not made

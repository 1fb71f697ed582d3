"""Two models on a machine with memory for one, as a user of a model swapper meets it: a request for
either is answered by that one, whichever is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import ask_now, chat, text_of
from tidegate_process import Tidegate, simulated, up

BUDGET = 10 * 2**30
ONE = {"process": {"memory_bytes": 6 * 2**30}, "idle_to_zero_s": 3_600}


@pytest.fixture(scope="module")
def tidegate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [simulated("one", **ONE), simulated("two", **ONE)]
    autoscaler = {
        "host_memory_bytes": BUDGET,
        "min_loaded_s": 0.5,
        "stable_window_s": 1,
        "panic_window_s": 0.5,
        "scale_down_delay_s": 0,
    }
    with up(tmp_path_factory.mktemp("turns"), pools=pools, autoscaler=autoscaler) as running:
        yield running


def ready(tidegate: Tidegate) -> dict[str, int]:
    return {name: tidegate.pool(name)["ready"] for name in ("one", "two")}


def test_the_model_that_is_asked_for_is_loaded_in_place_of_the_other(tidegate: Tidegate) -> None:
    for turn, name in enumerate(["one", "two", "one", "two"]):
        other = "two" if name == "one" else "one"
        answer = ask_now(tidegate, chat(name))
        assert text_of(answer)
        assert answer.json()["model"] == name
        assert ready(tidegate) == {name: 1, other: 0}
        assert tidegate.starts(name) == turn // 2 + 1
    told = [
        one
        for one in tidegate.admin("/pools/one/explain")["decisions"]
        if one["reason"] == "no_capacity"
    ]
    assert told[-1]["bound"] == "no_capacity"
    assert "makes room" in told[-1]["detail"]

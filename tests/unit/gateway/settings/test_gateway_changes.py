"""What a reload changes, as a table; and that every setting either applies or needs a restart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gateway.settings.changes import (
    NEEDS_RESTART,
    PoolChange,
    SettingsChanges,
    describe,
    find_changes,
    needs_restart,
)
from gateway.settings.fields import find
from gateway.settings.load import leaves
from gateway.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[4]

APPLIES = {
    "gateway": (
        "worker_timeout_s max_connections max_head_bytes max_headers max_body_bytes "
        "max_buffered_bytes picker.max_endpoints peek_bytes proxied_paths body_timeout_s "
        "min_body_bytes_per_s idle_timeout_s request_timeout_s upstream_connect_timeout_s "
        "upstream_idle_timeout_s upstream_max_idle_connections upstream_keepalive_s max_retries "
        "drain_s tls_reload_s cors_allow_origins log_level count_stream_usage"
    ),
    "gateway.holding": "max_requests max_bytes deadline_s keepalive_s release_initial",
    "router": (
        "default_bytes_per_token default_output_tokens learning_rate max_inflight_requests "
        "max_inflight_tokens max_ejected_fraction ejection_s ejection_max_s retry_fraction"
    ),
    "autoscaler": (
        "mode tick_s stable_window_s panic_window_s panic_threshold scale_down_delay_s "
        "idle_to_zero_s max_scale_up_per_tick max_scale_down_per_tick target_utilization_fraction "
        "backlog_s demand_stale_s start_timeout_s prepare_timeout_s start_poll_s "
        "health_interval_s metrics_interval_s health_failures unhealthy_restart_s "
        "backoff_initial_s backoff_max_s "
        "backoff_reset_s drain_s drain_settle_s failed_kept min_loaded_s turn_s"
    ),
    "autoscaler.forecast": "history_least_s slow_models",
    "autoscaler.history": "max_age_s max_bytes",
    "autoscaler.prices": "replica_hour waited_second violated_second memory_gib_hour",
}
"""Fields that a reload applies: what uses them reads them from the settings in force each time, or
takes them in the ``configure`` or ``set_pools`` that the reload calls. Look at that before a field
is added here; one that is read only at the start belongs in ``NEEDS_RESTART``."""


def pool(name: str, **given: Any) -> dict[str, Any]:
    return {"name": name, "engine": "simulated", "model": name, **given}


def make(*pools: dict[str, Any], **sections: Any) -> Settings:
    return Settings.model_validate({"pools": pools, **sections})


def digests(settings: Settings) -> dict[str, str]:
    """As if the engine's arguments were all that a replica is started with."""
    return {pool.name: repr(pool.engine_args) for pool in settings.pools}


def changes(old: Settings, new: Settings) -> SettingsChanges:
    return find_changes(old, new, digests(old), digests(new))


CASES: list[tuple[str, Settings, Settings, dict[str, Any]]] = [
    ("nothing", make(pool("a")), make(pool("a")), {}),
    ("a pool more", make(pool("a")), make(pool("a"), pool("b")), {"added": ("b",)}),
    ("a pool less", make(pool("a"), pool("b")), make(pool("b")), {"removed": ("a",)}),
    ("the first pool", make(), make(pool("a")), {"added": ("a",)}),
    ("the last pool", make(pool("a")), make(), {"removed": ("a",)}),
    ("another order is no change", make(pool("a"), pool("b")), make(pool("b"), pool("a")), {}),
    (
        "another name is another pool",
        make(pool("a")),
        make(pool("b")),
        {"added": ("b",), "removed": ("a",)},
    ),
    (
        "bounds need no new replicas",
        make(pool("a")),
        make(pool("a", min_replicas=1, max_replicas=3)),
        {
            "changed": (
                PoolChange(name="a", fields=("min_replicas", "max_replicas"), replaces=False),
            )
        },
    ),
    (
        "start-up arguments do",
        make(pool("a")),
        make(pool("a", engine_args=["--seed", "1"])),
        {"changed": (PoolChange(name="a", fields=("engine_args",), replaces=True),)},
    ),
    (
        "a field of a section is named",
        make(pool("a")),
        make(pool("a", tiers={"paged_s": 5.0})),
        {"changed": (PoolChange(name="a", fields=("tiers.paged_s",), replaces=False),)},
    ),
    (
        "an alias moves",
        make(pool("a", aliases=["x"]), pool("b")),
        make(pool("a"), pool("b", aliases=["x"])),
        {
            "changed": (
                PoolChange(name="a", fields=("aliases",), replaces=False),
                PoolChange(name="b", fields=("aliases",), replaces=False),
            )
        },
    ),
    (
        "what applies and what does not",
        make(),
        make(
            gateway={"port": 9000, "max_retries": 1, "holding": {"deadline_s": 9.0}},
            autoscaler={"idle_to_zero_s": 7.0, "log_files": 9},
            state_dir="elsewhere",
            modelcache={"page_touch_s": 77.0},
        ),
        {
            "applied": (
                "gateway.max_retries",
                "gateway.holding.deadline_s",
                "autoscaler.idle_to_zero_s",
            ),
            "needs_restart": (
                "state_dir",
                "gateway.port",
                "autoscaler.log_files",
                "modelcache.page_touch_s",
            ),
        },
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_changes(old: Settings, new: Settings, expected: dict[str, Any]) -> None:
    found = changes(old, new)
    names = ("added", "changed", "removed", "applied", "needs_restart")
    assert {name: getattr(found, name) for name in names if getattr(found, name)} == expected
    again = changes(found.settings, new)  # what did not apply is named each time
    assert (again.added, again.changed, again.removed, again.applied) == ((), (), (), ())
    assert again.needs_restart == found.needs_restart
    assert found.settings.pools == new.pools


def test_what_needs_a_restart_keeps_its_value_until_then() -> None:
    old = make(gateway={"port": 1111}, autoscaler={"tick_s": 2.0})
    new = make(gateway={"port": 2222, "drain_s": 3.0}, autoscaler={"tick_s": 4.0, "log_files": 8})
    settings = changes(old, new).settings
    assert (settings.gateway.port, settings.gateway.drain_s) == (1111, 3.0)
    assert (settings.autoscaler.tick_s, settings.autoscaler.log_files) == (4.0, 3)
    assert changes(settings, old).needs_restart == ()  # back to what runs


def test_another_engine_behind_the_same_settings_is_a_change() -> None:
    same = make(pool("a"))
    (change,) = find_changes(same, same, {"a": "version 1"}, {"a": "version 2"}).changed
    assert change == PoolChange(name="a", fields=(), replaces=True)


def test_the_docs_name_what_needs_a_restart() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    listed = text.partition("<!-- needs-restart -->")[2].partition("<!-- /needs-restart -->")[0]
    assert re.findall("`(.*?)`", listed) == list(NEEDS_RESTART)


def test_every_setting_either_applies_or_needs_a_restart() -> None:
    applies = {f"{section}.{name}" for section, names in APPLIES.items() for name in names.split()}
    names = {".".join(parts) for parts, _ in leaves(Settings())} - {"pools"}
    assert applies <= names
    assert {name for name in names if not needs_restart(name)} == applies


def test_the_words_for_no_change() -> None:
    assert describe(added=(), changed=(), removed=(), applied=(), needs_restart=()) == [
        "nothing is different"
    ]


def test_every_name_that_needs_a_restart_is_a_setting() -> None:
    for name in NEEDS_RESTART:
        assert find(name.split(".")) is not None, name
    assert needs_restart("modelcache.dir")
    assert not needs_restart("gateway.portal")

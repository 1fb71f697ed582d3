"""Settings: what is allowed, what contradicts itself, and that each field explains itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from autoscaler.settings import (
    AutoscalerSettings,
    ForecastSettings,
    KubernetesSettings,
    PoolSettings,
    hints_of,
    make_policy,
    make_slug,
)
from autoscaler.signals.rates import MINUTES_MOST
from autoscaler.signals.series import MINUTE_S

PROCESS: dict[str, Any] = {"name": "m", "engine": "vllm", "model": "/models/m"}
URLS = {"urls": ("http://10.0.0.1:8000",)}
STATIC: dict[str, Any] = {"name": "m", "backend": "static", "static": URLS}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "m"}, "engine is missing"),
        ({"name": "m", "engine": "vllm"}, "model is missing"),
        ({**PROCESS, "name": ""}, "at least 1 character"),
        ({**PROCESS, "name": "a b"}, "pattern"),
        ({**PROCESS, "name": "a\n"}, "pattern"),
        ({**PROCESS, "aliases": ("",)}, "at least 1 character"),
        ({**PROCESS, "aliases": ("m",)}, "aliases or adapters repeat a name"),
        ({**PROCESS, "aliases": ("x", "x")}, "aliases or adapters repeat a name"),
        ({**PROCESS, "engine": "llama"}, "'vllm' or 'simulated'"),
        ({**PROCESS, "min_replicas": 2}, "min_replicas (2) > max_replicas (1)"),
        ({**PROCESS, "max_replicas": 0}, "greater than or equal to 1"),
        ({**PROCESS, "static": URLS}, 'static is only for backend = "static"'),
        ({**PROCESS, "process": {"gpus": (0,)}}, "gpus_per_replica is 0"),
        ({**PROCESS, "process": {"gpus": (0,), "gpus_per_replica": 2}}, "(2) > the 1 gpus given"),
        ({**PROCESS, "process": {"gpus": (0, 0), "gpus_per_replica": 1}}, "gpus repeat an index"),
        ({**PROCESS, "process": {"gpu_memory_bytes": 1}}, "gpus_per_replica is 0"),
        ({**PROCESS, "engine_args": ("a\0b",)}, "NUL"),
        ({**PROCESS, "env": {"A=B": "1"}}, "not the name of an environment variable"),
        ({**PROCESS, "env": {"A": "\0"}}, "NUL"),
        ({**PROCESS, "colour": "red"}, "Extra inputs"),
        ({"name": "m", "backend": "static"}, "urls is missing"),
        ({**STATIC, "engine": "vllm"}, 'engine is not for backend = "static"'),
        ({**STATIC, "min_replicas": 1}, 'min_replicas is not for backend = "static"'),
        ({**STATIC, "static": {"urls": ("http://h:1", "http://h:1/v1/")}}, "urls repeat a server"),
        ({**STATIC, "static": {"urls": ("10.0.0.1:8000",)}}, "must be http://"),
        ({**STATIC, "static": {"urls": ("ftp://h",)}}, "must be http://"),
        ({**STATIC, "static": {"urls": ("http://u:p@h",)}}, "must not carry a password"),
        ({**STATIC, "static": {"urls": ("http://h/x?y=1",)}}, "query"),
        ({**STATIC, "static": {"urls": ("http://h/a b",)}}, "has a path"),
        ({**PROCESS, "aliases": ("x",), "adapters": ("x",)}, "aliases or adapters repeat a name"),
        ({**STATIC, "static": {"urls": ("http://h:99999",)}}, "port"),
        ({**STATIC, "static": {**URLS, "headers": {"Host": "x"}}}, "set by Tidegate itself"),
        ({**STATIC, "static": {**URLS, "headers": {"X": "a\r\nY: b"}}}, "cannot carry"),
        ({**STATIC, "static": {**URLS, "headers": {"X Y": "a"}}}, "not the name of a header"),
        ({**STATIC, "static": {**URLS, "api_key_env": "1A"}}, "pattern"),
        (
            {**STATIC, "static": {**URLS, "api_key_env": "K", "headers": {"authorization": "x"}}},
            "both set",
        ),
        ({**STATIC, "static": {**URLS, "health_path": "health"}}, "pattern"),
    ],
)
def test_pool_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        PoolSettings.model_validate(fields)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("https://api.example.org/v1/", "https://api.example.org"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_urls_as_people_write_them(url: str, kept: str) -> None:
    assert PoolSettings.model_validate({**STATIC, "static": {"urls": (url,)}}).static.urls == (
        kept,
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"panic_window_s": 61.0}, "panic_window_s (61) is longer than stable_window_s (60)"),
        ({"backoff_initial_s": 61.0}, "backoff_max_s (60) is shorter than backoff_initial_s (61)"),
        ({"tick_s": 0}, "greater than or equal to 0.05"),
        ({"start_timeout_s": float("nan")}, "less than"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        AutoscalerSettings.model_validate(fields)
    assert said in str(raised.value)


def test_a_pools_own_values_come_first() -> None:
    settings = AutoscalerSettings()
    plain = make_policy(PoolSettings.model_validate(PROCESS), settings)
    assert (plain.idle_to_zero_s, plain.scale_down_delay_s) == (300.0, None)
    assert plain.violated_second == settings.prices.violated_second
    own = {**PROCESS, "idle_to_zero_s": 0, "scale_down_delay_s": 5, "violated_second_price": 60}
    policy = make_policy(PoolSettings.model_validate(own), settings)
    assert (policy.idle_to_zero_s, policy.scale_down_delay_s) == (0.0, 5.0)
    assert policy.violated_second == 60.0


def test_ahpas_are_pools_only_beside_model_pools() -> None:
    assert KubernetesSettings(model_pools=True, ahpa_pools=True).ahpa_pools
    with pytest.raises(ValidationError, match="model_pools is not"):
        KubernetesSettings(ahpa_pools=True)


def test_slugs_are_fit_for_paths_and_differ() -> None:
    slugs: list[str] = []
    for name in ["Qwen/Qwen3-8B", "Qwen-Qwen3-8B", "..", "é", "x" * 300, "a:b", "a b"]:
        slugs.append(make_slug(name, slugs))
    assert slugs[:2] == ["Qwen-Qwen3-8B", "Qwen-Qwen3-8B.2"]
    assert len(set(slugs)) == len(slugs)
    assert all(0 < len(slug) <= 110 and "/" not in slug for slug in slugs)
    assert all(slug[0] not in ".-" for slug in slugs)


def test_as_much_history_as_may_be_asked_for_is_looked_at() -> None:
    most_s = 7 * 86_400.0
    assert ForecastSettings(history_least_s=most_s).history_least_s < MINUTES_MOST * MINUTE_S
    with pytest.raises(ValidationError, match="604800"):
        ForecastSettings(history_least_s=most_s + 1)


def test_windows_of_expected_demand() -> None:
    job = {"name": "job", "cron": "0 6 * * mon", "duration_s": 600}
    open_hours = {"name": "open", "cron": "0 8 * * *", "duration_s": 600, "min_replicas": 1}
    pool = PoolSettings(**PROCESS, schedules=({**job, "expect_demand": True}, open_hours))
    (window,) = hints_of([pool])["m"]
    assert (window.cron.text, window.duration_s) == ("0 6 * * mon", 600)
    with pytest.raises(ValidationError, match="nor expect_demand is set"):
        PoolSettings(**PROCESS, schedules=(job,))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"label_leader": True}, "lease is missing"),
        ({"label_leader": True, "lease": "a" * 64}, "longer than 63"),
        ({"label_leader": True, "lease": "a" * 63}, ""),
        ({"lease": "a" * 64}, ""),
    ],
)
def test_a_leader_is_labelled_with_its_lease(given: dict[str, Any], word: str) -> None:
    if not word:
        assert KubernetesSettings.model_validate(given).lease == given["lease"]
        return
    with pytest.raises(ValidationError, match=word):
        KubernetesSettings.model_validate(given)

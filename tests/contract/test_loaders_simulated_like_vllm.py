"""The simulated engine beside a running vLLM: the same requests, answers of the same shape.

What the simulation answers must be there in vLLM's answer too, with the same type; vLLM may say
more. Where the two differ on purpose, the difference is listed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loaders.engines.base import EngineOptions, Placement, engine_of
from loaders.settings import LoaderSettings

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "How high is the tide?"}]
ON_PURPOSE = {
    "simulated",  # in /version
    "root",  # the path of a model that is not there
    "system_fingerprint",  # in every chunk, so that none is taken for real
    "tool_calls",  # an empty list, as older servers send it
    "stop_sequence",
    "prompt_tokens_details",  # vLLM fills these in with a flag of its own
    "metadata",
    "error",
    "permission",
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SHORT = {"max_tokens": 3, "min_tokens": 3}

REQUESTS: list[tuple[str, Any]] = [
    ("/health", None),
    ("/version", None),
    ("/load", None),
    ("/v1/models", None),
    ("/is_sleeping", None),
    ("/v1/chat/completions", {"messages": MESSAGES, **SHORT}),
    ("/v1/chat/completions", {"messages": MESSAGES, **SHORT, **STREAM}),
    ("/v1/completions", {"prompt": "the tide", **SHORT}),
    ("/v1/completions", {"prompt": "the tide", **SHORT, **STREAM}),
    ("/v1/completions", {"prompt": ["the", "tide"], **SHORT, "n": 2}),
    ("/v1/responses", {"input": "the tide", "max_output_tokens": 3}),
    ("/v1/responses", {"input": "the tide", "max_output_tokens": 3, "stream": True}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("/tokenize", {"prompt": "the tide"}),
    ("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    ("/detokenize", {"tokens": [40, 41]}),
    ("/v1/chat/completions", {"model": "other", "messages": MESSAGES}),
    ("/v1/messages", {"model": "other", "messages": MESSAGES, "max_tokens": 3}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 9000}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2047}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 0}),
    ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": "a b c d " * 4000}),
    ("/v1/nothing", {}),
    ("/v1/completions", {"prompt": "the tide", "max_tokens": 2048, "stop": [" ", "\n"]}),
]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def _running(argv: tuple[str, ...], env: dict[str, str], url: str) -> Iterator[str]:
    """A process in a group of its own that is ready, and gone afterwards."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            argv, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + 400
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + "/health").status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    pytest.fail(f"{argv[0]} is not ready: {log.read().decode()[-3000:]}")
                time.sleep(0.25)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture(scope="module")
def urls(engine_python: Path, model_dir: Path, root: Path) -> Iterator[tuple[str, str]]:
    """The real engine's base URL and the simulated one's."""
    real_port, simulated_port = _free_port(), _free_port()
    options = EngineOptions(model=str(model_dir), served_model="demo", max_model_len_tokens=2048)
    settings = LoaderSettings(engine_python=engine_python)
    real, simulated = (
        engine_of(name).command(options, Placement(host="127.0.0.1", port=port), settings)
        for name, port in (("vllm", real_port), ("simulated", simulated_port))
    )
    dev = {"VLLM_SERVER_DEV_MODE": "1"}
    with (
        _running(simulated.argv, simulated.env, f"http://127.0.0.1:{simulated_port}") as one,
        _running(real.argv, {**real.env, **dev}, f"http://127.0.0.1:{real_port}") as other,
    ):
        yield other, one


def _ask(url: str, path: str, body: Any) -> httpx.Response:
    if body is None:
        return httpx.get(url + path, timeout=60)
    if isinstance(body, dict) and path.startswith(("/v1", "/tok", "/detok")):
        body = {"model": "demo", **body}
    return httpx.post(url + path, json=body, timeout=60)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def _differences(real: Any, ours: Any, where: str) -> list[str]:
    """Where ``ours`` has what ``real`` lacks, or has as something else."""
    if real is None or ours is None:
        return []
    if _kind(real) != _kind(ours):
        return [f"{where}: {_kind(ours)}, of vLLM {_kind(real)}"]
    found = []
    if isinstance(ours, dict):
        for key in ours.keys() - ON_PURPOSE:
            if key in real:
                found += _differences(real[key], ours[key], f"{where}.{key}")
            else:
                found.append(f"{where}.{key} is not vLLM's")
    elif isinstance(ours, list) and ours and real:
        found += _differences(real[0], ours[0], f"{where}[0]")
        found += _differences(real[-1], ours[-1], f"{where}[-1]")
    return found


def _events(text: str) -> list[tuple[str, Any]]:
    events = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        data = fields["data"]
        events.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events


def _name(event: tuple[str, Any]) -> str:
    return event[0]


def _sample(event: tuple[str, Any]) -> tuple[str, Any]:
    """An event under a name that tells apart what has to look alike."""
    name, data = event
    if isinstance(data, dict) and "choices" in data:
        choice = (data["choices"] or [{}])[0]
        name += f" {sorted(choice.get('delta', {}))} {choice.get('finish_reason')}"
    return name, data


@pytest.mark.parametrize(
    ("path", "body"), REQUESTS, ids=[f"{n}:{path}" for n, (path, _) in enumerate(REQUESTS)]
)
def test_an_answer_has_the_shape_of_vllms(urls: tuple[str, str], path: str, body: Any) -> None:
    real, ours = (_ask(url, path, body) for url in urls)
    assert ours.status_code == real.status_code, (real.text, ours.text)
    kinds = [reply.headers.get("content-type") for reply in (real, ours)]
    assert kinds[0] == kinds[1]
    if not ours.content:
        assert not real.content
    elif "event-stream" not in (kinds[1] or ""):
        assert _differences(real.json(), ours.json(), "") == []
        if "error" in real.json() and real.json()["error"]:
            types = [reply.json()["error"]["type"] for reply in (real, ours)]
            assert types[0] == types[1]
    else:
        theirs, mine = _events(real.text), _events(ours.text)
        # vLLM joins tokens that are ready at the same time: how many events there are may differ.
        assert [kind for kind, _ in groupby(mine, _name)] == [k for k, _ in groupby(theirs, _name)]
        samples = dict(map(_sample, theirs))
        for name, given in map(_sample, mine):
            assert _differences(samples[name], given, name) == []


def test_every_metric_is_one_of_vllms_with_its_labels(urls: tuple[str, str]) -> None:
    real, ours = (
        {
            family.name: family
            for family in text_string_to_metric_families(_ask(u, "/metrics", None).text)
        }
        for u in urls
    )
    assert "tidegate_simulated_engine" in ours
    del ours["tidegate_simulated_engine"]
    assert ours.keys() <= real.keys()
    for name, family in ours.items():
        assert family.type == real[name].type, name
        if name == "vllm:cache_config_info":
            continue  # its labels are its content
        for kind in {sample.name for sample in family.samples}:
            labels = [
                {label for s in f.samples if s.name == kind for label in s.labels}
                for f in (real[name], family)
            ]
            assert labels[0] == labels[1], kind
        buckets = [
            [s.labels["le"] for s in f.samples if s.name.endswith("_bucket")]
            for f in (real[name], family)
        ]
        if name.endswith("_seconds"):
            assert buckets[0] == buckets[1], name


def test_sleep_and_wake_are_answered_alike(urls: tuple[str, str]) -> None:
    for path in ("/sleep?level=1", "/wake_up"):
        real, ours = (httpx.post(url + path, timeout=60) for url in urls)
        assert (ours.status_code, ours.json()) == (real.status_code, real.json())

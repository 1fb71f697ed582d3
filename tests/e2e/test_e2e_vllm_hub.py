"""The real vLLM with a model that is named as a hub names it: through our cache, and forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from asking import ask_now
from object_server import ObjectServer, serving
from store_servers import HubServer
from tidegate_process import Tidegate, up

NAME = "org/tiny"
BODY = {
    "model": NAME,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 24,
    "temperature": 0,
}

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(320)]


@pytest.fixture(scope="module")
def hub(model_dir: Path) -> Iterator[HubServer]:
    with serving(elsewhere := ObjectServer()), serving(hub := HubServer(elsewhere, NAME)):
        for path in model_dir.iterdir():
            if path.is_file():
                hub.put(path.name, path.read_bytes())
        yield hub


@pytest.fixture(scope="module")
def tidegate(
    hub: HubServer, engine_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    directory = tmp_path_factory.mktemp("hub")
    pool = {
        "name": "named",
        "aliases": [NAME],
        "engine": "vllm",
        "model": NAME,
        "max_model_len_tokens": 1024,
        "idle_to_zero_s": 3600,
    }
    with up(
        directory,
        pools=[pool],
        loaders={"engine_python": engine_python, "cpu_bind": "nobind"},
        modelcache={"hub_dirs": [str(directory / "no-hub")]},
        environ={"HF_ENDPOINT": hub.url},
    ) as running:
        yield running


def test_the_first_request_brings_a_hubs_model_into_the_cache(
    tidegate: Tidegate, hub: HubServer
) -> None:
    assert tidegate.pool("named")["tier"] == "remote"
    told = ask_now(tidegate, BODY)
    assert told.status_code == 200, told.text
    assert "Paris" in told.json()["choices"][0]["message"]["content"]
    (replica,) = tidegate.pool("named")["replicas"]
    assert replica["woken_from"] == "remote"
    command = " ".join(psutil.Process(replica["pid"]).cmdline())
    assert "forkserver" in command
    assert hub.redirected >= 1
    (model,) = tidegate.admin("/models")["models"]
    assert (model["url"], model["revision"]) == (f"hf://{NAME}", hub.commits["main"])


def test_it_comes_back_without_the_hub(tidegate: Tidegate, hub: HubServer) -> None:
    tidegate.admin("/pools/named/scale", {"replicas": 0})
    tidegate.wait("no replica", lambda: not tidegate.pool("named")["replicas"], 60)
    hub.commits.clear()  # from now on the hub has no such model
    tidegate.admin("/pools/named/scale", {"replicas": None})
    told = ask_now(tidegate, BODY)
    assert told.status_code == 200, told.text
    assert "Paris" in told.json()["choices"][0]["message"]["content"]

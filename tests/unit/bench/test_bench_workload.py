"""Bodies and request files."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from bench import native, workload


@pytest.mark.parametrize(
    ("order", "first"), [("messages-first", "messages"), ("model-first", "model")]
)
def test_key_order(order: workload.Order, first: str) -> None:
    shape = workload.Shape(name="s", prompt_bytes=100, order=order)
    document = json.loads(workload.body(shape, 0))
    assert next(iter(document)) == first
    assert document["model"] == workload.MODEL


@pytest.mark.parametrize("size_bytes", [10, 300, 32_000])
def test_prompts_have_their_size_and_repeat_for_a_seed(size_bytes: int) -> None:
    assert len(workload.prompt(size_bytes, 1)) == size_bytes
    assert workload.prompt(size_bytes, 1) == workload.prompt(size_bytes, 1)
    assert workload.prompt(size_bytes, 1) != workload.prompt(size_bytes, 2)


def test_streams_ask_for_usage() -> None:
    shape = workload.Shape(name="s", prompt_bytes=10, stream=True, tokens=7, interval_ms=20)
    document = json.loads(workload.body(shape, 0))
    assert document["stream"] is True
    assert document["stream_options"] == {"include_usage": True}
    assert (document["max_tokens"], document["seed"]) == (7, 20)


def test_request_file_layout(tmp_path: Path) -> None:
    shape = workload.Shape(name="s", prompt_bytes=50, variants=3, stream=True, tokens=9)
    mean = workload.write_requests(shape, tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    assert data[:4] == b"TGB1"
    assert struct.unpack_from("<I", data, 4) == (3,)
    length, kind, tokens, prompt = struct.unpack_from("<4I", data, 8)
    assert (kind, tokens, prompt) == (1, 9, 128)
    request = data[24 : 24 + length]
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert abs(len(body) - mean) < 20


def test_size_classes_are_those_of_the_replica() -> None:
    source = (native.SOURCES / "wire.h").read_text()
    classes = re.findall(r"if \(body_bytes < (\d+)\) return (\d+);", source)
    assert len(classes) == 3
    for limit, tokens in classes:
        assert workload.prompt_tokens(int(limit) - 1) == int(tokens)
        assert workload.prompt_tokens(int(limit)) != int(tokens)

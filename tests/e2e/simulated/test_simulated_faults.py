"""Scripted faults of the simulated engine, as a client meets them."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx
import pytest

FAST = ("--prefill-tokens-per-s", "inf", "--decode-tokens-per-s", "inf")


def test_crash_after_so_many_requests(start: Any) -> None:
    engine = start(*FAST, "--fault", "crash:after_requests=2,code=9")
    assert [engine.chat().status_code for _ in range(2)] == [200, 200]
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        engine.chat()
    assert engine.ended() == 9


def test_crash_by_the_clock(start: Any) -> None:
    engine = start(*FAST)
    assert engine.chat().status_code == 200
    engine.post("/simulated/faults", {"faults": ["crash:at_s=1"]})  # from now on
    assert engine.ended() == 1


def test_crash_while_starting(start: Any) -> None:
    engine = start("--startup-s", "0.2", "--fault", "crash:during=startup", ready=False)
    assert engine.ended() == 1
    assert engine.port is None


def test_a_start_up_that_never_ends(start: Any) -> None:
    flags = ("--loading-s", "0.2", "--fault", "hang:during=startup,phase=loading,scope=engine")
    engine = start(*flags, ready=False)
    end = time.monotonic() + 60
    while not any("loading" in line for line in engine.lines):  # it has begun, and heeds SIGTERM
        assert time.monotonic() < end, engine.lines
        time.sleep(0.02)
    time.sleep(1)
    assert engine.port is None
    engine.process.terminate()
    assert engine.ended() == 0


def test_a_hung_process_answers_nothing_and_ignores_sigterm(start: Any) -> None:
    engine = start(*FAST, "--fault", "hang:after_requests=1")
    assert engine.chat().status_code == 200
    for path in ("/v1/completions", "/health"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                engine.url + path,
                json={"model": "demo", "prompt": "x"},
                timeout=httpx.Timeout(60, read=0.5),
            )
    engine.process.terminate()
    time.sleep(0.5)
    assert engine.process.poll() is None


def test_a_hung_engine_is_healthy_and_gives_no_token(start: Any) -> None:
    engine = start(*FAST, "--fault", "hang:scope=engine,after_requests=1,for_s=1.5")
    begun = time.monotonic()
    assert engine.chat().status_code == 200
    with httpx.Client(timeout=60) as client:
        assert client.get(engine.url + "/health").status_code == 200
    assert engine.chat().status_code == 200  # when the 1.5 s are over
    assert time.monotonic() - begun > 1.4


def test_requests_that_are_never_answered(start: Any) -> None:
    engine = start(*FAST, "--fault", "hang:scope=requests,every=2")
    assert engine.chat().status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            engine.url + "/v1/completions",
            json={"model": "demo", "prompt": "x"},
            timeout=httpx.Timeout(60, read=0.3),
        )
    assert engine.chat().status_code == 200


def test_slow(start: Any) -> None:
    """In virtual time, which no busy machine stretches."""
    engine = start("--virtual-time", "--decode-tokens-per-s", "100")
    sum_s = "vllm:e2e_request_latency_seconds_sum"

    def took() -> float:
        before = engine.metric(sum_s)
        engine.chat(max_tokens=11, ignore_eos=True)
        return engine.metric(sum_s) - before

    plain_s = took()
    assert plain_s > 0.09
    engine.post("/simulated/faults", {"faults": ["slow:factor=50"]})
    assert took() == pytest.approx(50 * plain_s, rel=0.05)
    engine.post("/simulated/faults", {"faults": []})
    assert took() == pytest.approx(plain_s, rel=0.05)


def test_every_third_answer_is_a_500_and_health_does_not_count(start: Any) -> None:
    engine = start(*FAST, "--fault", "error500:every=3")
    statuses = []
    for _ in range(6):
        statuses.append(engine.chat().status_code)
        assert engine.get("/health").status_code == 200
    assert statuses == [200, 200, 500, 200, 200, 500]
    assert engine.get("/simulated/faults").json()["faults"] == [
        {"fault": "error500:every=3", "seen": 6, "hits": 2}
    ]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_stream_is_cut(start: Any, how: str) -> None:
    engine = start("--fault", f"cut:after_chunks=4,how={how}")
    lines: list[str] = []

    def read() -> None:
        body = {"model": "demo", "prompt": "x", "max_tokens": 50, "stream": True}
        url = engine.url + "/v1/completions"
        with engine.http.stream("POST", url, json=body) as reply:
            lines.extend(line for line in reply.iter_lines() if line)

    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        read()
    assert len(lines) == 4
    assert "[DONE]" not in "".join(lines)
    engine.wait_for_metric("vllm:num_requests_running", 0)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        engine.chat(max_tokens=2)


def test_connections_are_closed_without_a_byte(start: Any) -> None:
    engine = start(*FAST, "--fault", "accept_close:every=2")
    for expected in (200, None, 200, None):
        with httpx.Client() as client:
            if expected is not None:
                assert client.get(engine.url + "/health").status_code == expected
            else:
                with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                    client.get(engine.url + "/health")


@pytest.mark.parametrize("on", ["request", "connect"])
def test_connections_are_reset(start: Any, on: str) -> None:
    engine = start(*FAST, "--fault", f"reset:on={on}")

    def ask() -> None:
        # The reset may be there before `create_connection` has returned.
        with socket.create_connection(("127.0.0.1", engine.port), 60) as sock:
            if on == "request":
                sock.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")
            sock.recv(100)

    with pytest.raises(ConnectionResetError):
        ask()


def test_unhealthy_for_a_while(start: Any) -> None:
    engine = start(*FAST, "--fault", "unhealthy:for_s=3")  # from the first look on
    assert engine.get("/health").status_code == 503
    assert engine.chat().status_code == 200
    end = time.monotonic() + 60
    while engine.get("/health").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)

"""Several workers on one port, workers that die, draining, and certificates that change."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import ssl
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from datapath_rig import (
    STREAM,
    WAIT_S,
    Asked,
    Gateway,
    Raw,
    ScriptedReplica,
    answers,
    chunks,
    eventually,
    gateway,
    get,
    make_certificate,
    post,
)

from gateway.compose.listeners import listen
from gateway.datapath import metrics
from gateway.settings.load import ConfigError

SMALL = post({"model": "m", "prompt": "hello"})
STREAMED = post({"model": "m", "stream": True})
EVENT = b"data: {}\n\n"


def worker_of(client: Raw) -> int:
    """Which worker has this connection: its request ids say so."""
    client.send(get(b"/health"))
    request_id = client.answer().headers["x-request-id"]
    return int(request_id.removeprefix("req-")[16:18], 16)


def one_of_each(served: Gateway, workers: int) -> list[Raw]:
    """A connection to every worker; the kernel spreads them by chance."""
    found: dict[int, Raw] = {}
    for _ in range(200):
        client = served.connect()
        found.setdefault(worker_of(client), client)
        if len(found) == workers:
            return [found[index] for index in range(workers)]
    raise AssertionError(f"only {sorted(found)} were reached")


def test_each_worker_sees_the_others_inflight_tokens() -> None:
    """Three long requests through one worker; the other must avoid the replica they are on."""
    go = threading.Event()

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            go.wait(WAIT_S)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with (
        ScriptedReplica(script) as busy,
        ScriptedReplica(answers()) as other,
        gateway(workers=2) as served,
    ):
        first, second = one_of_each(served, 2)
        (published,) = served.publish(busy)
        first.send(post({"model": "m", "prompt": "x" * 20_000}))
        eventually(lambda: len(busy.requests) == 1)
        assert served.inflight(published.slot)[1] > 5000
        served.publish(published, served.replica(other.url))
        for _ in range(20):
            second.send(SMALL)
            assert second.answer().status == 200
        assert (len(busy.requests), len(other.requests)) == (1, 20)
        go.set()
        assert first.answer().status == 200


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_clients_of_all_workers_are_answered_alike(workers: int) -> None:
    """More clients than a replica takes at once: whichever worker the kernel gives them to, each
    gets its turn. The window must open for all of them, too."""
    answered: Counter[int] = Counter()
    stop = threading.Event()
    most_at_once = 8

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            time.sleep(0.03)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    def ask(number: int, client: Raw) -> None:
        while not stop.is_set():
            client.send(SMALL)
            assert client.answer().status == 200
            answered[number] += 1

    with (
        ScriptedReplica(script) as replica,
        gateway(workers=workers, release_initial=2) as served,
    ):
        clients = one_of_each(served, workers)[:1]
        # All but a few of the clients are one worker's: chance would do less, and as well.
        while len(clients) < 24:
            client = served.connect()
            if len(clients) % 6 == 0 or worker_of(client) == 0:
                clients.append(client)
        served.publish(served.replica(replica.url, max_inflight_requests=most_at_once))
        threads = [
            threading.Thread(target=ask, args=(number, client))
            for number, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.0)  # the window is open then
        answered.clear()
        eventually(lambda: answered.total() > 24 * 20)
        counts = dict(answered)
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert len(counts) == 24
    assert max(counts.values()) < 1.5 * min(counts.values()), sorted(counts.values())


def test_a_worker_that_hangs_while_requests_wait_in_it_holds_up_no_other() -> None:
    go = threading.Event()

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            go.wait(WAIT_S)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with (
        ScriptedReplica(script) as replica,
        gateway(workers=2, worker_timeout_s=60.0) as served,
    ):
        first, second = one_of_each(served, 2)
        served.publish(served.replica(replica.url, max_inflight_requests=1))
        _, running = one_of_each(served, 2)
        running.send(SMALL)
        eventually(lambda: len(replica.requests) == 1)
        first.send(SMALL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        pid = served.pids()[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            second.send(SMALL)
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 2)
            go.set()
            assert second.answer().status == 200
        finally:
            os.kill(pid, signal.SIGCONT)
        assert first.answer().status == 200
        assert running.answer().status == 200


def test_a_killed_worker_is_started_again_and_its_ledger_is_cleared() -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.cancelled()

    with ScriptedReplica(script) as replica, gateway(workers=2) as served:
        first, second = one_of_each(served, 2)
        (published,) = served.publish(replica)
        for client in (first, second):
            client.send(STREAMED)
        eventually(lambda: served.inflight(published.slot)[0] == 2)
        before = served.pids()
        os.kill(before[0], signal.SIGKILL)
        assert first.rest() == b""
        eventually(lambda: served.inflight(published.slot)[0] == 1)
        eventually(lambda: replica.cancels == 1)  # the kernel closed its connections
        # Connections made now wait for the successor or are taken by the other worker.
        waiting = [served.connect() for _ in range(20)]
        for client in waiting:
            client.send(get(b"/v1/models"))
        for client in waiting:
            assert client.answer().status == 200
        eventually(lambda: served.workers.all_listening)
        assert served.pids()[1] == before[1]
        assert served.workers.status()[0]["restarts"] == 1
        second.close()
        eventually(lambda: served.inflight(published.slot) == (0, 0))
        with ScriptedReplica(answers()) as good:
            served.publish(good)  # and the new one hears of the fleet
            for client in one_of_each(served, 2):
                client.send(SMALL)
                assert client.answer().status == 200


def test_a_worker_that_dies_while_it_holds_leaves_no_queue_behind() -> None:
    with gateway() as served:
        client = served.connect()
        client.send(SMALL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        os.kill(served.pids()[0], signal.SIGKILL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 0)
        assert client.rest() == b""


def test_the_bounds_of_holding_are_over_all_workers() -> None:
    with gateway(workers=2, max_requests=2) as served:
        first, second = one_of_each(served, 2)
        for number, client in enumerate((first, second)):
            client.send(SMALL)
            eventually(lambda n=number: served.pool_count(metrics.QUEUED_REQUESTS) == n + 1)
        for refused in one_of_each(served, 2):
            refused.send(SMALL)
            answer = refused.answer()
            assert (answer.status, answer.reason) == (429, "hold_queue_full")
        with ScriptedReplica(answers()) as replica:
            served.publish(replica)
            for client in (first, second):
                assert client.answer().status == 200


def test_a_worker_may_open_as_many_files_as_the_machine_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 100  # this process has those of earlier tests too
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        served_by = gateway()
        served = served_by.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with contextlib.ExitStack() as stack:
        stack.push(served_by)
        clients = [stack.enter_context(served.connect()) for _ in range(few + 100)]
        for client in clients:
            client.send(get(b"/health"))
        for client in clients:
            assert client.answer().status == 200


def test_a_signal_to_the_group_does_not_stop_a_worker() -> None:
    r"""A terminal sends Ctrl-C and Ctrl-\ to all that runs in it."""
    with gateway() as served:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            os.kill(served.pids()[0], number)
        time.sleep(0.1)
        assert served.ask(get(b"/health")).status == 200
        assert served.workers.status()[0]["restarts"] == 0


def test_drain_finishes_streams_answers_who_is_held_and_closes_the_rest() -> None:
    go = threading.Event()

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(STREAM + chunks(EVENT))
            go.wait(WAIT_S)
            asked.send(chunks(EVENT) + b"0\r\n\r\n")

    def slow(asked: Asked) -> None:
        asked.request()
        go.wait(WAIT_S)
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with (
        ScriptedReplica(script) as replica,
        ScriptedReplica(slow) as late,
        ScriptedReplica(answers()) as third,
        gateway(drain_s=60.0) as served,
    ):
        pids = served.pids()
        idle, stream, running, held = (served.connect() for _ in range(4))
        idle.send(get(b"/health"))
        assert idle.answer().status == 200
        served.publish(replica)
        stream.send(STREAMED)
        stream.until(EVENT)
        served.publish(late)
        running.send(SMALL)
        eventually(lambda: len(late.requests) == 1)
        served.publish()
        held.send(SMALL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        drained = served.drain_soon()
        assert idle.ended()
        with pytest.raises(ConnectionRefusedError):
            eventually(lambda: served.connect().close())
        # A replica that becomes ready only now still gets the request that waits for it.
        served.publish(third)
        answer = held.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert held.ended()
        assert not drained.done()
        go.set()
        assert stream.until(b"0\r\n\r\n").endswith(chunks(EVENT) + b"0\r\n\r\n")
        assert stream.ended()
        answer = running.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        drained.result(40)
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists()


def test_what_a_drain_cannot_finish_is_told_so_and_cut() -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(EVENT))
        asked.cancelled()

    with ScriptedReplica(script) as replica, gateway(drain_s=0.5) as served:
        stream, held = served.connect(), served.connect()
        served.publish(replica)
        stream.send(STREAMED)
        stream.until(EVENT)
        served.publish()
        held.send(SMALL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        drained = served.drain_soon()
        answer = held.answer()
        assert (answer.status, answer.reason) == (503, "draining")
        assert answer.headers["retry-after"]
        assert not stream.rest().endswith(b"0\r\n\r\n")
        drained.result(40)
        assert not any(served.books().values())


def test_a_worker_that_hangs_is_noticed_and_replaced() -> None:
    with ScriptedReplica(answers()) as replica, gateway(worker_timeout_s=4.0) as served:
        served.publish(replica)
        hung = served.pids()[0]
        os.kill(hung, signal.SIGSTOP)
        waiting = served.connect()  # the kernel takes it for the worker, which does not see it
        waiting.send(SMALL)
        eventually(lambda: not served.workers.all_listening)
        assert served.workers.status()[0]["state"] == "unresponsive"
        eventually(lambda: served.pids() not in ([], [hung]))
        eventually(lambda: served.workers.all_listening)
        assert served.workers.status()[0]["restarts"] == 1
        assert waiting.answer().status == 200
        assert served.ask(SMALL).status == 200


def test_a_worker_that_cannot_be_killed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs in the kernel, say."""
    monkeypatch.setattr("gateway.compose.workers.KILLED_S", 0.1)
    with ScriptedReplica(answers()) as replica, gateway(worker_timeout_s=4.0) as served:
        served.publish(replica)
        hung = served.workers.processes[0].process
        assert hung is not None
        kills: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(hung, "kill", lambda: kills.append(1))
            os.kill(hung.pid, signal.SIGSTOP)
            eventually(lambda: served.pids() not in ([], [hung.pid]))
            eventually(lambda: served.workers.all_listening)
        assert served.ask(SMALL).status == 200
        assert hung.poll() is None
        assert len(kills) == 2
        hung.kill()
        hung.wait(WAIT_S)


def test_a_worker_that_was_stopped_for_a_moment_goes_on() -> None:
    with ScriptedReplica(answers()) as replica, gateway(worker_timeout_s=60.0) as served:
        served.publish(replica)
        (pid,) = served.pids()
        os.kill(pid, signal.SIGSTOP)
        eventually(lambda: not served.workers.all_listening)
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: served.workers.all_listening)
        assert served.ask(SMALL).status == 200
        assert served.pids() == [pid]


def test_a_worker_that_was_stopped_lays_its_own_pause_to_no_replica() -> None:
    resumed = threading.Event()

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(EVENT))
        while not resumed.wait(0.1):
            asked.send(chunks(EVENT))
        asked.send(b"0\r\n\r\n")

    with ScriptedReplica(script) as replica, gateway(upstream_idle_timeout_s=4.0) as served:
        served.publish(replica)
        clients = [served.connect() for _ in range(60)]
        for client in clients:
            client.send(STREAMED)
        for client in clients:
            client.until(EVENT)
        (pid,) = served.pids()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5.0)  # no shorter: it is the time-out that this is about
        os.kill(pid, signal.SIGCONT)
        time.sleep(1.5)
        resumed.set()
        for client in clients:
            client.until(b"\r\n0\r\n\r\n")


def test_a_worker_with_unread_messages_survives_the_end_of_its_control_process() -> None:
    """What the control process has not read resets the channel instead of ending it."""
    with gateway() as served:
        (entry,) = served.workers.processes
        process, writer = entry.process, entry.writer
        assert process is not None
        assert writer is not None
        served.loop.call_soon_threadsafe(writer.transport.pause_reading)
        held = served.connect()
        held.send(SMALL)  # its wake signal stays unread
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        served.loop.call_soon_threadsafe(writer.transport.abort)
        answer = held.answer()
        assert (answer.status, answer.reason) == (503, "draining")
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 0


def test_a_worker_whose_control_process_is_gone_drains_and_exits() -> None:
    with gateway() as served:
        pid = served.pids()[0]
        process = served.workers.processes[0].process
        writer = served.workers.processes[0].writer
        assert process is not None
        assert writer is not None
        served.loop.call_soon_threadsafe(writer.transport.abort)
        eventually(lambda: process.poll() is not None)
        assert process.returncode == 0
        eventually(lambda: served.pids() not in ([], [pid]))


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    (listener,) = listen("127.0.0.1", 0, field="gateway.port", shared_by=1)
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=str(port)):
        listen("127.0.0.1", port, field="gateway.port", shared_by=2)
    listener.close()


def presented(served: Gateway) -> bytes:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with served.connect_tls(context) as client:
        client.send(get(b"/health"))
        assert client.answer().status == 200
        certificate: bytes | None = client.sock.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate


def test_tls_takes_a_new_certificate_without_a_restart(tmp_path: Path) -> None:
    make_certificate(tmp_path, "first")
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    body = b'{"model":"m","prompt":"' + b"x" * 300_000 + b'"}'
    answer = b'{"text":"' + b"y" * 2_000_000 + b'"}'
    with (
        ScriptedReplica(answers(answer)) as replica,
        gateway(
            tls_certificate=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem")
        ) as served,
    ):
        served.publish(replica)
        with served.connect_tls(context) as client:  # verified, both directions large
            for _ in range(3):
                client.send(post(body))
                assert client.answer().body == answer
            assert replica.requests[-1].body == body
            assert client.sock.version() in ("TLSv1.2", "TLSv1.3")
            old = presented(served)
            make_certificate(tmp_path, "second")
            eventually(lambda: presented(served) != old)
            client.send(post({"model": "m"}))  # what is open goes on
            assert client.answer().status == 200
        new = presented(served)
        expires_s = served.worker_count(metrics.TLS_NOT_AFTER)
        assert 86_400 < expires_s - time.time() < 2 * 86_400 + 60
        # Half a certificate: the last one that was whole stays in force.
        (tmp_path / "cert.pem").write_text("-----BEGIN CERTIFICATE-----\nMIIB")
        eventually(lambda: "was not reloaded" in served.log())
        assert presented(served) == new
        make_certificate(tmp_path, "third")
        eventually(lambda: presented(served) != new)
        # Plain HTTP on the TLS port does no harm.
        with served.connect() as plain:
            plain.send(get(b"/health"))
            assert not plain.rest().startswith(b"HTTP/1.1 200")
        assert presented(served)


@pytest.mark.parametrize("changed", ["key.pem", "cert.pem"])
def test_a_key_that_does_not_belong_to_the_certificate_changes_nothing(
    tmp_path: Path, changed: str
) -> None:
    make_certificate(tmp_path, "first")
    other = tmp_path / "other"
    other.mkdir()
    make_certificate(other, "other")
    with gateway(
        tls_certificate=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem")
    ) as served:
        old = presented(served)
        os.replace(other / changed, tmp_path / changed)
        eventually(lambda: "was not reloaded" in served.log())
        assert presented(served) == old

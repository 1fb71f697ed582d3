"""The simulated engine's HTTP, byte by byte, over a real socket and with a handler of the test."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from loaders.engines.simulated.http1 import HttpExchange, HttpLimits, HttpServer

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def talk(
    conversation: Talk,
    handle: Callable[[HttpExchange], None],
    limits: HttpLimits | None = None,
    refuse: Callable[[], str | None] = lambda: None,
) -> HttpServer:
    """Hold ``conversation`` with a server; the server afterwards, its connections gone."""

    async def main() -> HttpServer:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        http = HttpServer(
            handle, limits or HttpLimits(), fixed_headers=((b"x-a", b"b"),), refuse=refuse
        )
        await http.listen(sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        try:
            async with asyncio.timeout(20):
                await conversation(reader, writer)
        finally:
            writer.close()
        assert await http.drain(5)
        return http

    return uvloop.run(main())


def echo(exchange: HttpExchange) -> None:
    exchange.respond(200, exchange.method.encode() + b" " + exchange.path.encode() + exchange.body)


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """One answer with a content-length: head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    return head, await reader.readexactly(length)


def test_an_answer_is_labelled_and_the_connection_kept() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for path in (b"/a", b"/b"):
            writer.write(b"GET %s?q=1 HTTP/1.1\r\nhost: x\r\n\r\n" % path)
            head, body = await answer(reader)
            assert body == b"GET " + path
            assert head.startswith(b"HTTP/1.1 200 OK\r\ndate: ")
            assert b"\r\nx-a: b\r\n" in head
            assert b"connection: close" not in head

    talk(conversation, echo)


def test_a_body_may_come_in_pieces_or_chunks() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in (b"POST /p HTT", b"P/1.1\r\ncontent-le", b"ngth: 4\r\n\r\nab", b"cd"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        assert (await answer(reader))[1] == b"POST /pabcd"
        writer.write(
            b"POST /c HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
        )
        assert (await answer(reader))[1] == b"POST /cabcde"

    talk(conversation, echo)


def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(3)))
        for n in range(3):
            exchange = await waiting.get()
            assert (exchange.path, waiting.empty()) == (f"/{n}", True)
            exchange.respond(200, b"%d" % n)
            assert (await answer(reader))[1] == b"%d" % n

    talk(conversation, waiting.put_nowait)


def test_a_stream_has_one_chunk_per_event() -> None:
    def handle(exchange: HttpExchange) -> None:
        exchange.stream()
        exchange.send([b"data: 1\n\n", b"data: 22\n\n"])
        exchange.end()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-type: text/event-stream; charset=utf-8\r\n" in head
        assert b"transfer-encoding: chunked\r\n" in head
        wire = await reader.readuntil(b"0\r\n\r\n")
        assert wire == b"9\r\ndata: 1\n\n\r\na\r\ndata: 22\n\n\r\n0\r\n\r\n"

    talk(conversation, handle)


def test_http_1_0_gets_no_chunks_and_is_closed() -> None:
    def handle(exchange: HttpExchange) -> None:
        exchange.stream()
        exchange.send([b"data: 1\n\n"])
        exchange.end()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body == b"data: 1\n\n"

    talk(conversation, handle)


def test_head_gets_the_length_and_no_body() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HEAD /h HTTP/1.1\r\nconnection: close\r\n\r\n")
        wire = await reader.read()
        assert b"content-length: 7\r\n" in wire
        assert wire.endswith(b"\r\n\r\n")

    talk(conversation, echo)


def test_a_client_that_waits_to_be_asked_for_its_body_is_asked() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await answer(reader))[1] == b"POST /hi"

    talk(conversation, echo)


def test_an_offer_to_upgrade_is_not_taken_up() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /u HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        wire = await reader.read()
        assert wire.startswith(b"HTTP/1.1 200 OK\r\n")
        assert wire.endswith(b"\r\n\r\nGET /u")

    talk(conversation, echo, HttpLimits(keepalive_s=0.1))


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 3000, 431),
        (b"POST / HTTP/1.1\r\ncontent-length: 5000\r\n\r\n" + b"z" * 5000, 413),
        (b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\n", 408),
        (b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab", 408),
    ],
    ids=["nonsense", "head", "open-head", "body", "lengths", "slow-head", "slow-body"],
)
def test_what_is_too_much_or_not_http_is_refused_and_closed(wire: bytes, status: int) -> None:
    timeout_s = 0.5 if status == 408 else 15.0
    limits = HttpLimits(max_head_bytes=2000, max_body_bytes=4000, request_timeout_s=timeout_s)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire)
        reply = await reader.read()
        assert reply.startswith(b"HTTP/1.1 %d " % status)
        assert reply.count(b"HTTP/1.1") == 1
        assert b"connection: close\r\n" in reply

    talk(conversation, echo, limits)


def test_a_refusal_comes_after_the_answers_under_way() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\nnonsense\r\n\r\n")
        (await waiting.get()).respond(200, b"ok")
        wire = await reader.read()
        assert wire.startswith(b"HTTP/1.1 200")

    talk(conversation, waiting.put_nowait)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.9)
        (await waiting.get()).respond(200, b"ok")
        assert (await answer(reader))[1] == b"ok"
        assert await reader.read() == b""

    talk(conversation, waiting.put_nowait, HttpLimits(keepalive_s=0.3, request_timeout_s=0.6))


def test_the_handler_learns_that_the_client_left() -> None:
    gone: asyncio.Queue[str] = asyncio.Queue()

    asked = asyncio.Event()

    def handle(exchange: HttpExchange) -> None:
        exchange.on_gone = lambda: gone.put_nowait(exchange.path)
        asked.set()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        await asked.wait()
        writer.close()
        assert await gone.get() == "/a"

    talk(conversation, handle)
    assert gone.empty()


def test_a_slow_reader_is_noticed_and_told_of_when_it_caught_up() -> None:
    states: list[bool] = []

    def handle(exchange: HttpExchange) -> None:
        exchange.stream()
        while exchange.writable:
            exchange.send([b"x" * 65536])
        states.append(exchange.writable)
        exchange.on_drained = exchange.end

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        wire = b""
        while not wire.endswith(b"\r\n0\r\n\r\n"):
            wire += await reader.read(1 << 20)

    talk(conversation, handle)
    assert states == [False]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_connection_can_be_refused_without_a_byte(how: str) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if how == "reset":
            with pytest.raises(ConnectionResetError):
                await reader.read()
        else:
            assert await reader.read() == b""

    talk(conversation, echo, refuse=lambda: how)


def test_connections_past_the_limit_are_closed() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("peername")
        second, other = await asyncio.open_connection(*address)
        assert await second.read() == b""
        other.close()
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[1] == b"GET /a"

    talk(conversation, echo, HttpLimits(max_connections=1))


def test_draining_finishes_what_runs_and_closes_what_idles() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        http = HttpServer(waiting.put_nowait, HttpLimits())
        await http.listen(sock)
        address = sock.getsockname()
        idle, idle_writer = await asyncio.open_connection(*address)
        busy, busy_writer = await asyncio.open_connection(*address)
        busy_writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        exchange = await waiting.get()
        drained = asyncio.ensure_future(http.drain(10))
        assert await idle.read() == b""
        with pytest.raises(OSError):
            await asyncio.open_connection(*address)
        assert not drained.done()
        exchange.respond(200, b"done")
        head, body = await answer(busy)
        assert (b"connection: close" in head, body) == (True, b"done")
        assert await drained
        idle_writer.close()
        busy_writer.close()

    uvloop.run(main())


def test_draining_closes_after_a_stream_that_had_begun_before() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        http = HttpServer(waiting.put_nowait, HttpLimits(keepalive_s=60))
        await http.listen(sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        exchange = await waiting.get()
        exchange.stream()
        drained = asyncio.ensure_future(http.drain(10))
        await asyncio.sleep(0.05)
        exchange.send([b"data: 1\n\n"])
        exchange.end()
        assert (await reader.read()).endswith(b"0\r\n\r\n")
        assert await drained
        writer.close()

    uvloop.run(main())


def test_draining_ends_at_its_limit() -> None:
    waiting: asyncio.Queue[HttpExchange] = asyncio.Queue()

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        http = HttpServer(waiting.put_nowait, HttpLimits())
        await http.listen(sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        await waiting.get()
        assert not await http.drain(0.2)
        assert await reader.read() == b""
        writer.close()

    uvloop.run(main())

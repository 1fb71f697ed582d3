"""Chunked bodies, strictly: taken apart where they are read, followed where they pass by.

Neither is ever laxer than llhttp, on the same bytes however they are cut; tests hold both to it.
"""

from __future__ import annotations

import re
from typing import Final

from gateway.datapath.protocol.http1 import bad_request, has_bare_line_end

_CHUNK_SIZE: Final = re.compile(
    rb"([0-9A-Fa-f]{1,15})(?:;[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}"
    rb"(?:=(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}|\"[\t !#-\[\]-~\x80-\xff]{0,128}\"))?){0,4}\r\n"
)
# Blocks with thousands of chunks in them: small ones are taken apart all at once, as a Python step
# for each would hold up the loop for a tenth of a second; of others no block may have more.
_CROWDED_BYTES: Final = 8192
_MAX_STEPS: Final = 4096
_SMALL_CHUNK: Final = re.compile(
    b"|".join(b"%x\r\n([\\s\\S]{%d})\r\n" % (size, size) for size in range(1, 64))
)
_SMALL_CHUNKS: Final = re.compile(b"(?:%b)++" % _SMALL_CHUNK.pattern.translate(None, b"()"))
_MAX_CHUNK_LINE_BYTES: Final = 300
_MAX_TRAILER_BYTES: Final = 4096
_TRAILER_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*\Z")

# What a chunked body's decoder expects next.
_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3


def are_trailers(section: bytes) -> bool:
    """Whether what stands between the last chunk and the blank line is header lines, in bounds."""
    return not section or (
        len(section) <= _MAX_TRAILER_BYTES
        and all(_TRAILER_LINE.match(line) for line in section.removesuffix(b"\r\n").split(b"\r\n"))
    )


# The size lines engines write for all but very large chunks.
_SIZES: Final = {b"%x" % size: size for size in range(1, 4096)}


def _small_chunks(data: bytes, position: int) -> tuple[list[bytes], int]:
    """The payloads of the small chunks from ``position`` on, and where they end."""
    match = _SMALL_CHUNKS.match(data, position)
    if match is None:
        return [], position
    parts = match[0].split(b"\r\n")
    payloads = parts[1::2]
    if list(map(_SIZES.get, parts[:-1:2])) != list(map(len, payloads)):
        # There are line ends in the payload too: a quarter as fast.
        if len(parts) > 2 * _MAX_STEPS:
            raise bad_request("There are too many small chunks.")
        payloads = [one[one.lastindex or 0] for one in _SMALL_CHUNK.finditer(match[0])]
    return payloads, match.end()


class ChunkDecoder:
    """A strict decoder of a chunked body, fed in pieces of any size.

    ``feed`` returns the payload found and what is left over after the body's end (``None`` while
    it has not ended). Extensions and trailers are checked, bounded and dropped.
    """

    __slots__ = ("_buffer", "_left", "_state", "done")

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._state = _SIZE
        self.done = False

    def feed(self, data: bytes) -> tuple[list[bytes], bytes | None]:
        """Raises ``ApiError`` 400 on any framing that is not exactly RFC 9112 7.1."""
        payload: list[bytes] = []
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        position, size, steps = 0, len(data), 0
        while position < size:
            if self._state == _SIZE and size - position > _CROWDED_BYTES:
                payloads, position = _small_chunks(data, position)
                payload += payloads
                steps += 1
                if steps > _MAX_STEPS:
                    raise bad_request("There are too many small chunks.")
                if position == size:
                    break
            if self._state == _DATA:
                take = min(self._left, size - position)
                payload.append(data[position : position + take])
                position += take
                self._left -= take
                if self._left == 0:
                    self._state = _DATA_END
                continue
            if self._state == _TRAILER:
                rest = self._trailer(data[position:])
                return payload, rest
            step = self._line(data, position)
            if step == 0:
                self._buffer = data[position:]
                break
            position += step
        return payload, None

    def _line(self, data: bytes, position: int) -> int:
        """Bytes consumed by a size line or by the CRLF after a chunk; 0 when more are needed."""
        if self._state == _DATA_END:
            if len(data) - position < 2:
                if data[position : position + 1] != b"\r":
                    raise bad_request("A chunk is not followed by CRLF.")
                return 0
            if data[position : position + 2] != b"\r\n":
                raise bad_request("A chunk is not followed by CRLF.")
            self._state = _SIZE
            return 2
        match = _CHUNK_SIZE.match(data, position)
        if match is None:
            pending = data[position : position + _MAX_CHUNK_LINE_BYTES]
            if (
                b"\n" in pending
                or len(pending) >= _MAX_CHUNK_LINE_BYTES
                or not pending[:1].isalnum()
                or not re.match(rb"[0-9A-Fa-f]{1,15}(?:;[^\r\n]*)?\r?\Z", pending)
            ):
                raise bad_request("A chunk size is not a hexadecimal number followed by CRLF.")
            return 0
        self._left = int(match[1], 16)
        self._state = _DATA if self._left else _TRAILER
        return match.end() - position

    def _trailer(self, data: bytes) -> bytes | None:
        if data.startswith(b"\r\n"):
            end, rest = 0, data[2:]
        else:
            end = data.find(b"\r\n\r\n")
            rest = data[end + 4 :]
            if end < 0:
                if len(data) > _MAX_TRAILER_BYTES or has_bare_line_end(data):
                    raise bad_request("The trailer section is too long or not well formed.")
                self._buffer = data
                return None
        trailer = data[:end]
        if not are_trailers(trailer):
            raise bad_request("The trailer section is too long, or a line of it is not a header.")
        self.done = True
        return rest


class ChunkTracker:
    """Follows the framing of a chunked body that passes by, without copying any of it.

    ``done`` once the body has ended; ``chunks`` counts those with payload. Every block of a stream
    goes through here, most of them exactly one chunk: that is a dozen machine-level steps where
    llhttp, byte by byte, takes hundreds.
    """

    __slots__ = ("_left", "_partial", "_state", "chunks", "done")

    def __init__(self) -> None:
        self._left = 0
        self._partial = b""
        self._state = _SIZE
        self.chunks = 0
        self.done = False

    @property
    def between_chunks(self) -> bool:
        """Whether the last block ended where a chunk, or the body, does."""
        return self.done or (self._state == _SIZE and not self._partial)

    def feed(self, data: bytes) -> None:
        """The next block. Raises ``ValueError`` on framing that is not exactly RFC 9112 7.1, and
        on bytes after the end."""
        if self.done:
            raise ValueError("bytes after the end of the answer")
        size = len(data)
        if self._state == _SIZE:
            end = data.find(b"\r\n")
            known = _SIZES.get(data[:end]) if end > 0 else None
            if known is not None and end + known + 4 == size and not self._partial:
                if not data.endswith(b"\r\n"):
                    raise ValueError("a chunk is not followed by CRLF")
                self.chunks += 1  # exactly one chunk, as nearly always
                return
        position = steps = 0
        while position < size:
            if self._state == _SIZE and size - position > _CROWDED_BYTES and not self._partial:
                small = _SMALL_CHUNKS.match(data, position)
                if small is not None:  # as line ends in the payload are rare, a good estimate
                    self.chunks += data.count(b"\r\n", position, small.end()) // 2
                    position = small.end()
                steps += 1
                if steps > _MAX_STEPS:
                    raise ValueError("too many small chunks")
                if position == size:
                    return
            if self._state == _DATA:
                left = self._left
                if position + left + 2 <= size:
                    position += left + 2
                    if data[position - 2 : position] != b"\r\n":
                        raise ValueError("a chunk is not followed by CRLF")
                    self._state = _SIZE
                elif position + left >= size:
                    self._left = left - (size - position)
                    if self._left == 0:
                        self._state = _DATA_END
                    return
                else:
                    position += left
                    self._state = _DATA_END
            elif self._state == _SIZE and not self._partial:
                end = data.find(b"\r\n", position)
                if end < 0:
                    position = self._keep(data, position, 2)
                else:
                    self._take_size(data[position:end])
                    position = end + 2
            else:
                position = self._resume(data, position)

    def _take_size(self, text: bytes) -> None:
        if not text.isalnum():
            match = _CHUNK_SIZE.match(text + b"\r\n")  # with extensions, which no engine sends
            text = b"" if match is None else match[1]
        if not 0 < len(text) <= 15 or not text.isalnum() or b"x" in text or b"X" in text:
            raise ValueError(f"chunk size {text[:40]!r}")
        self._left = left = int(text, 16)
        if left:
            self.chunks += 1
            self._state = _DATA
        else:
            self._state = _TRAILER

    def _keep(self, data: bytes, position: int, crlf: int) -> int:
        """Put the rest of a block aside: a line that is not whole. Returns the block's end."""
        self._partial += data[position:]
        limit = _MAX_CHUNK_LINE_BYTES if crlf == 2 else _MAX_TRAILER_BYTES
        if len(self._partial) > limit:
            raise ValueError("a line of the chunk framing is too long")
        if has_bare_line_end(self._partial):
            raise ValueError("a line of the chunk framing does not end in CRLF")
        return len(data)

    def _resume(self, data: bytes, position: int) -> int:
        """A line that began in an earlier block, the CRLF after a chunk, or the trailers. Returns
        the position after it, in ``data``."""
        known = len(self._partial)
        text = self._partial + data[position:]
        if self._state == _DATA_END:
            if not b"\r\n".startswith(text[:2]):
                raise ValueError("a chunk is not followed by CRLF")
            if len(text) < 2:
                return self._keep(data, position, 2)
            used, self._state = 2, _SIZE
        elif self._state == _SIZE:
            end = text.find(b"\r\n")
            if end < 0:
                return self._keep(data, position, 2)
            self._take_size(text[:end])
            used = end + 2
        else:
            end = 0 if text.startswith(b"\r\n") else text.find(b"\r\n\r\n") + 2
            if end == 1:
                return self._keep(data, position, 4)
            if len(text) > end + 2:
                raise ValueError("bytes after the end of the answer")
            if not are_trailers(text[:end]):
                raise ValueError("a trailer line is not a header")
            used, self.done = end + 2, True
        self._partial = b""
        return position + used - known

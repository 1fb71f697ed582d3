"""Request bodies read as they arrive: the few members that route one, and where the model stands.

Every byte is read once, in the block that brings it, so that no body can stop the event loop and
what is found does not depend on how it was cut into packets. What an engine's own parser (Python's
``json``, python-multipart) accepts is read as that parser reads it; what it refuses is passed on
for it to refuse, as far as a model was found.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from typing import Any, Final

from gateway.datapath.protocol.errors import ApiError, Reason

# A longer name than any that a pool can have, and a longer number than any that means something.
_MAX_VALUE_BYTES: Final = 4096
# Stands for a name that is too long: it is none of those that there are.
_NO_NAME: Final = "\N{REPLACEMENT CHARACTER}" * 300
_MAX_PART_HEAD_BYTES: Final = 16_384
_TRUE_WORDS: Final = frozenset({"1", "true", "t", "yes", "y", "on"})


class BodyReader:
    """See the module. ``model`` is the name as the client wrote it, ``None`` while it is not known;
    ``start`` and ``end`` are where it stands in the body. ``broken`` says that the engine will not
    be able to read the body, so that nothing more is looked for in it. ``parts`` counts what it was
    taken apart into, and so what the reading cost."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.start = 0
        self.end = 0
        self.broken = False
        self.parts = 0
        self._has_model = False
        self._values: dict[str, Any] = {}
        self._rest = b""  # what the last block ended in the middle of
        self._position = 0  # where in the body the rest begins

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """The next block. Raises ``ApiError`` 400 where the model is named twice."""

    @abstractmethod
    def quote(self, model: str) -> bytes:
        """A name as it is written in this kind of body, between ``start`` and ``end``."""

    @property
    def stream(self) -> bool:
        """Whether a streamed answer is asked for."""
        return read_bool(self._values.get("stream"))

    @property
    def has_stream_options(self) -> bool:
        """Whether it says what the stream is to report."""
        return "stream_options" in self._values

    def output_bound(self) -> int | None:
        """The smallest positive bound the request gives on its output, in tokens."""
        return smallest_bound(*(self._values.get(name) for name in BOUNDS))

    def check(self) -> None:
        """The body is whole. Raises ``ApiError`` 400 where it names no model."""
        if self.model:
            return
        if self.broken:
            raise ApiError(400, Reason.BAD_JSON, "The request body cannot be read.")
        raise model_missing()

    def _take_model(self, value: object, start: int, end: int) -> None:
        """A ``model`` was found: two engines may read two in two ways, so there may be one."""
        if self._has_model:
            raise ApiError(
                400,
                Reason.BAD_REQUEST,
                "The request body names 'model' more than once.",
                param="model",
            )
        self._has_model = True
        if isinstance(value, str):
            # A lone surrogate is in no pool's name and could not be written into an answer.
            self.model = value.encode("utf-8", "replace").decode()
            self.start, self.end = start, end


def model_missing() -> ApiError:
    """400 for a body that names no model."""
    return ApiError(
        400,
        Reason.MODEL_MISSING,
        "The request body must name a model: set 'model' to one that GET /v1/models lists.",
        param="model",
    )


def read_bool(value: object) -> bool:
    """A boolean as the engines (pydantic) read it: ``"true"`` and ``1`` are true as well."""
    return value.lower() in _TRUE_WORDS if isinstance(value, str) else value == 1


def smallest_bound(*values: Any) -> int | None:
    """The smallest positive number of tokens among members of a body, which may be anything;
    ``"5"`` and ``5.0`` are 5, as the engines (pydantic) read them."""
    bounds = []
    for value in values:
        number = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                continue
        if isinstance(number, int | float) and 0 < number < float("inf"):
            bounds.append(int(number))
    return min((bound for bound in bounds if bound), default=None)


def splice(parts: list[bytes], start: int, end: int, new: bytes) -> list[bytes]:
    """The parts of a body with its bytes from ``start`` to ``end`` replaced; no other is copied
    but those of the parts that are cut."""
    result: list[bytes] = []
    position = 0
    for part in parts:
        after = position + len(part)
        if after <= start or position >= end:
            result.append(part)
        else:
            if position <= start:
                result.append(part[: start - position] + new)
            if after > end:
                result.append(part[end - position :])
        position = after
    return result


# JSON

BOUNDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_FIELDS: Final = {
    b'"%b"' % name.encode(): name for name in ("model", "stream", "stream_options", *BOUNDS)
}
_SPACE: Final = re.compile(rb"[ \t\n\r]*+")
_BOM: Final = b"\xef\xbb\xbf"
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR: Final = re.compile(rb'[^ \t\n\r,\]}\[{":]*+')
# Short members of nested values, many at a time, and plain members of the top object.
_IN_NESTED: Final = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]{0,32}+")*+', re.DOTALL)
_MEMBERS: Final = re.compile(
    rb'(?:[ \t\n\r]*+"(?!(?:model|stream|stream_options|max_(?:completion_|output_)?tokens)")'
    rb'[^"\\]*+"[ \t\n\r]*+:'
    rb'[ \t\n\r]*+(?:"[^"\\]*+"|[-+.0-9A-Za-z]++)[ \t\n\r]*+,)*+'
)

# What comes next.
_BEFORE: Final = 0
_MEMBER: Final = 1
_COLON: Final = 2
_VALUE: Final = 3
_AFTER: Final = 4
_SKIP_STRING: Final = 5
_SKIP_SCALAR: Final = 6
_SKIP_NESTED: Final = 7
_DONE: Final = 8
# Instead of a position: the engine will not read it.
_BROKEN: Final = -2


class JsonReader(BodyReader):
    """A JSON object. Only the members of the top object are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self._state = _BEFORE
        self._after_string = _AFTER
        self._escaped = False
        self._depth = 0
        self._field: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the object has ended, and nothing but white space follows it."""
        return self._state == _DONE and not self.broken

    def quote(self, model: str) -> bytes:
        """See ``BodyReader``."""
        return json.dumps(model).encode()

    def feed(self, data: bytes) -> None:
        """See ``BodyReader``."""
        if self.broken:
            return
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position, size = 0, len(data)
        while position < size:
            self.parts += 1
            state = self._state
            if state == _SKIP_NESTED:
                position = self._nested(data, position)
            elif state == _SKIP_STRING:
                position = self._string(data, position)
            elif state == _SKIP_SCALAR:
                position = _SCALAR.match(data, position).end()  # type: ignore[union-attr]
                if position < size:
                    self._state = _AFTER
            else:
                before = position
                position = _SPACE.match(data, position).end()  # type: ignore[union-attr]
                if position == size:
                    break
                position = self._token(data, position)
                if position == _BROKEN:
                    self.broken = True
                    return
                if position < 0:
                    position = _SPACE.match(data, before).end()  # type: ignore[union-attr]
                    self._rest = data[position:]
                    break
        self._position += size - len(self._rest)

    def _token(self, data: bytes, position: int) -> int:
        """The position after the next thing in the top object; -1 where it is not whole yet,
        ``_BROKEN`` where it is none."""
        state = self._state
        if state == _MEMBER:
            return self._member(data, position)
        if state == _VALUE:
            return self._value(data, position)
        byte = data[position]
        if state == _AFTER:
            if byte == 0x2C:  # a comma
                self._state = _MEMBER
                return position + 1
            if byte == 0x7D:  # the end of the object
                self._state = _DONE
                return position + 1
        elif state == _COLON and byte == 0x3A:
            self._state = _VALUE
            return position + 1
        elif state == _BEFORE:
            if byte == 0x7B:
                self._state = _MEMBER
                return position + 1
            if self._position == position == 0 and _BOM.startswith(data[:3]):
                return 3 if len(data) >= 3 else -1
        return _BROKEN

    def _member(self, data: bytes, position: int) -> int:
        skipped = _MEMBERS.match(data, position).end()  # type: ignore[union-attr]
        if skipped > position:
            return skipped
        match = _STRING.match(data, position)
        if match is not None:
            self._field = _find_field(match[0])
            self._state = _COLON
            return match.end()
        if data[position] == 0x22:
            return self._unfinished(data, position, _COLON)
        if data[position] == 0x7D:
            self._state = _DONE
            return position + 1
        return _BROKEN

    def _value(self, data: bytes, position: int) -> int:
        byte = data[position]
        if byte == 0x22:
            if self._field is None:
                return self._skip_string(position, _AFTER)
            return self._text(data, position)
        if byte in (0x5B, 0x7B):
            self._take(None, 0, 0)
            self._depth = 1
            self._state = _SKIP_NESTED
            return position + 1
        if self._field is None:
            self._state = _SKIP_SCALAR
            return position
        end = _SCALAR.match(data, position).end()  # type: ignore[union-attr]
        if end == len(data) and end - position <= _MAX_VALUE_BYTES:
            return -1
        value = data[position:end] if end - position <= _MAX_VALUE_BYTES else b"null"
        self._take(_read_value(value), 0, 0)
        self._state = _SKIP_SCALAR if end == len(data) else _AFTER
        return end

    def _text(self, data: bytes, position: int) -> int:
        """The text of a member that is looked for."""
        match = _STRING.match(data, position)
        if match is None:
            return self._unfinished(data, position, _AFTER)
        value = _read_value(match[0])
        if value is None:  # not UTF-8, or an escape that there is not
            return _BROKEN
        end = match.end()
        self._take(value, self._position + position, self._position + end)
        self._state = _AFTER
        return end

    def _unfinished(self, data: bytes, position: int, state: int) -> int:
        """A string that is not whole yet: wait for the rest, unless it is longer than any that
        is looked for."""
        if len(data) - position <= _MAX_VALUE_BYTES:
            return -1
        if state == _AFTER:
            self._take(_NO_NAME, 0, 0)
        self._field = None
        return self._skip_string(position, state)

    def _skip_string(self, position: int, state: int) -> int:
        self._after_string = state
        self._state = _SKIP_STRING
        return position + 1

    def _take(self, value: object, start: int, end: int) -> None:
        field = self._field
        if field == "model":
            self._take_model(value, start, end)
        elif field is not None:
            self._values[field] = value

    def _string(self, data: bytes, position: int) -> int:
        if self._escaped:
            self._escaped = False
            position += 1
        position = self._in_string(data, position)
        if position < len(data):
            if data[position] == 0x22:
                self._state = self._after_string
            else:  # a backslash, and what it escapes is not here yet
                self._escaped = True
            position += 1
        return position

    def _in_string(self, data: bytes, position: int) -> int:
        """The position of the quote that ends a string, of a backslash whose other half is not here
        yet, or the end. A byte is found many times sooner than an expression passes over others."""
        while True:
            quote = data.find(b'"', position)
            end = len(data) if quote < 0 else quote
            if end > position and data[end - 1] == 0x5C:
                self.parts += 1
                escapes = 1
                if end - position > 1 and data[end - 2] == 0x5C:
                    escapes = end - position - len(data[position:end].rstrip(b"\\"))
                if escapes % 2:  # the last of them escapes what follows
                    if quote < 0:
                        return end - 1
                    position = quote + 1
                    continue
            return end

    def _nested(self, data: bytes, position: int) -> int:
        skip, size, depth = _IN_NESTED.match, len(data), self._depth
        while depth > 0:
            position = skip(data, position).end()  # type: ignore[union-attr]
            if position == size:
                break
            byte = data[position]
            self.parts += 1
            if byte == 0x22:
                end = self._in_string(data, position + 1)
                if end == size or data[end] != 0x22:
                    break  # it is not whole yet
                position = end
            else:
                depth += 1 if byte in (0x5B, 0x7B) else -1
            position += 1
        self._depth = depth
        if depth == 0:
            self._state = _AFTER
        elif position < size:
            return self._skip_string(position, _SKIP_NESTED)
        return position


def _find_field(key: bytes) -> str | None:
    name = _FIELDS.get(key)
    if name is None and b"\\" in key:
        read = _read_value(key)
        if isinstance(read, str) and read in _FIELDS.values():
            return read
    return name


def _read_value(text: bytes) -> Any:
    """A scalar; ``None`` where it is ``null``, or none that Python's ``json`` reads."""
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except ValueError:
        return None


def read_json(body: bytes) -> tuple[JsonReader, bytes]:
    """A small JSON body that is out of the ordinary, read as an engine does: with a byte order
    mark, in UTF-16 or UTF-32, with half a surrogate pair. Returns its reader, and the body in
    UTF-8. Raises ``ApiError`` 400 on what the engine would refuse as well."""
    encoding = json.detect_encoding(body)
    try:
        text = body.decode(encoding, "surrogatepass")
        whole = json.loads(text)
    except RecursionError:
        whole = {}  # how deep is too deep is the engine's to say
    except ValueError as error:
        raise ApiError(
            400, Reason.BAD_JSON, f"The request body is not valid JSON: {error}."
        ) from None
    if not isinstance(whole, dict):
        raise ApiError(400, Reason.BAD_REQUEST, "The request body is not a JSON object.")
    if not encoding.startswith("utf-8"):
        body = text.encode("utf-8", "surrogatepass")
    reader = JsonReader()
    reader.feed(body)
    if not reader.is_whole:
        raise ApiError(400, Reason.BAD_JSON, "The request body is not valid JSON.")
    reader.check()
    return reader, body


# Forms

_FORM: Final = re.compile(
    rb"\r\ncontent-type:[ \t]*multipart/form-data[ \t]*;([^\r]*)", re.IGNORECASE
)
_PARAMETER: Final = re.compile(rb';?[ \t]*([^=; \t]+)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*"|[^;]*)')
_DISPOSITION: Final = re.compile(rb"(?:\A|\r\n)content-disposition:[^\r;]*([^\r]*)", re.IGNORECASE)
_FORM_FIELDS: Final = frozenset({"model", "stream", *BOUNDS})

_FIRST: Final = 0
_DELIMITED: Final = 1
_PART_HEAD: Final = 2
_PART: Final = 3
_LAST: Final = 4


def form_boundary(lines: bytes) -> bytes | None:
    """The boundary of a ``multipart/form-data`` body, from a request's header lines, each led by
    CRLF; ``None`` where they say that it is another kind of body, or say it in an odd way."""
    match = _FORM.search(lines)
    parameters = {} if match is None else _read_parameters(match[1])
    if parameters.get("charset", "utf-8").lower() not in ("utf-8", "us-ascii"):
        return None  # the names of the parts would be in it
    boundary = parameters.get("boundary", "").encode("latin-1")
    return boundary if 0 < len(boundary) <= 200 else None


def _read_parameters(text: bytes) -> dict[str, str]:
    found = {}
    for name, value in _PARAMETER.findall(text):
        if value.startswith(b'"'):
            value = value[1:-1].replace(b"\\\\", b"\\").replace(b'\\"', b'"')
        found[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
    return found


class FormReader(BodyReader):
    """A form in parts (``multipart/form-data``), as audio and pictures are sent."""

    def __init__(self, boundary: bytes) -> None:
        super().__init__()
        self._delimiter = b"\r\n--" + boundary
        self._state = _FIRST
        self._field = ""

    def quote(self, model: str) -> bytes:
        """See ``BodyReader``."""
        return model.encode()

    def feed(self, data: bytes) -> None:
        """See ``BodyReader``."""
        if self.broken:
            return
        if self._rest:
            data = self._rest + data
            self._rest = b""
        position, size = 0, len(data)
        while position < size and not self.broken:
            self.parts += 1
            after = self._step(data, position)
            if after < 0:
                break
            position = after
        self._rest = data[position:]
        self._position += position

    def _step(self, data: bytes, position: int) -> int:
        """The position after the next thing in the form; -1 where it is not whole yet."""
        state, delimiter = self._state, self._delimiter
        if state == _PART:
            return self._part(data, position)
        if state == _PART_HEAD:
            return self._part_head(data, position)
        if state == _DELIMITED:
            if len(data) - position < 2:
                return -1
            mark = data[position : position + 2]
            self._state = _PART_HEAD if mark == b"\r\n" else _LAST if mark == b"--" else _PART
            return position if self._state == _PART else position + 2
        if state == _FIRST:
            if data[position] in b"\r\n":
                return position + 1
            if len(data) - position < len(delimiter) - 2:
                return -1
            if data.startswith(delimiter[2:], position):
                self._state = _DELIMITED
                self._field = ""
                return position + len(delimiter) - 2
            self.broken = True
        return len(data)  # what follows the last delimiter

    def _part_head(self, data: bytes, position: int) -> int:
        if data.startswith(b"\r\n", position):
            start = end = position
        else:
            start, end = position, data.find(b"\r\n\r\n", position) + 2
            if end == 1:
                self.broken = len(data) - position > _MAX_PART_HEAD_BYTES
                return -1
        self._field = ""
        for match in _DISPOSITION.finditer(data[start:end]):
            self._field = _read_parameters(match[1]).get("name", "")
        self._state = _PART
        return end + 2

    def _part(self, data: bytes, position: int) -> int:
        end = data.find(self._delimiter, position)
        is_field = self._field in _FORM_FIELDS
        if end < 0:
            if is_field and len(data) - position <= _MAX_VALUE_BYTES:
                return -1
            if is_field:
                self._take(_NO_NAME, 0, 0)
                self._field = ""
            kept = len(data) - len(self._delimiter) + 1
            return kept if kept > position else -1
        if is_field:
            value = data[position:end].decode("utf-8", "replace")
            self._take(value, self._position + position, self._position + end)
            self._field = ""
        self._state = _DELIMITED
        return end + len(self._delimiter)

    def _take(self, value: str, start: int, end: int) -> None:
        if self._field == "model":
            self._take_model(value, start, end)
        else:
            self._values[self._field] = value

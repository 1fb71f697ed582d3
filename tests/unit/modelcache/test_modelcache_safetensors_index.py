"""Safetensors headers: correct ones are read, and no other is believed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors_files import header, layout

from modelcache.safetensors_index import (
    DTYPE_BITS,
    HEADER_LIMIT_BYTES,
    SIZE_LIMIT,
    BadFile,
    Index,
    assign,
    find_header_end,
    parse_header,
    parse_weight_map,
)

GOOD = layout([("a", "F32", [2, 3], 24), ("b", "BF16", [5], 10), ("s", "I64", [], 8)])


def parse(document: Any, data_bytes: int) -> Index:
    data = header(document)
    return parse_header(data, len(data) + data_bytes)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}}


def test_a_correct_header_is_read() -> None:
    index = parse({"__metadata__": {"format": "pt"}, **GOOD}, 42)
    assert [(t.name, t.dtype, t.shape) for t in index.tensors] == [
        ("a", "F32", (2, 3)), ("b", "BF16", (5,)), ("s", "I64", ()),
    ]  # fmt: skip
    first, second, last = index.tensors
    assert first.start == index.header_end
    assert first.end == second.start == index.header_end + 24
    assert last.end == index.size_bytes
    assert index.metadata == {"format": "pt"}


def test_tensors_come_in_the_order_of_their_bytes_whatever_the_header_s() -> None:
    turned = dict(reversed(GOOD.items()))
    assert [t.name for t in parse(turned, 42).tensors] == ["a", "b", "s"]


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_type_has_its_size(dtype: str) -> None:
    size = DTYPE_BITS[dtype]  # of eight elements, in bytes
    assert parse(layout([("x", dtype, [2, 4], size)]), size).tensors[0].dtype == dtype
    with pytest.raises(BadFile, match="its shape needs"):
        parse(layout([("x", dtype, [2, 4], size + 1)]), size + 1)


def test_empty_tensors_may_be_anywhere() -> None:
    rows = [("e", "F32", [0, 4], 0), ("a", "U8", [3], 3), ("z", "I8", [7, 0], 0)]
    assert {t.name for t in parse(layout(rows), 3).tensors} == {"e", "a", "z"}
    assert parse({}, 0).tensors == ()


BAD: dict[str, tuple[Any, int, str]] = {
    "a name twice": (
        '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        '"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4, "twice",
    ),
    "a field twice": (
        '{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', 4, "twice",
    ),
    "overlap": ({**entry(), "b": entry()["a"]}, 4, "overlaps"),
    "overlap in part": (
        {**entry(), "b": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}}, 7, "overlaps",
    ),
    "an empty tensor inside another": (
        {**entry(), "b": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]}}, 4, "overlaps",
    ),
    "a hole": (
        {**entry(), "b": {"dtype": "U8", "shape": [4], "data_offsets": [5, 9]}}, 9, "1 unused",
    ),
    "a hole at the beginning": (entry(data_offsets=[1, 5]), 5, "1 unused"),
    "bytes behind the last": (entry(), 5, "the file at"),
    "nothing but bytes": ({}, 1, "the file at"),
    "cut short": (entry(), 3, "there are 3"),
    "beyond the file": (entry(shape=[9], data_offsets=[0, 9]), 4, "there are 4"),
    "backwards": (entry(data_offsets=[4, 0]), 4, "bytes 4 to 0"),
    "negative": (entry(data_offsets=[-4, 0]), 4, "data_offsets"),
    "three offsets": (entry(data_offsets=[0, 4, 4]), 4, "data_offsets"),
    "offsets that are fractions": (entry(data_offsets=[0, 4.0]), 4, "data_offsets"),
    "offsets that are truths": (entry(shape=[1], data_offsets=[False, True]), 1, "data_offsets"),
    "a negative size": (entry(shape=[-4]), 4, "shape"),
    "a shape with a fraction": (entry(shape=[4.0]), 4, "shape"),
    "a shape that is a number": (entry(shape=4), 4, "shape"),
    "a shape of many dimensions": (entry(shape=[4] + [1] * 40), 4, "shape"),
    "a shape that overflows": (entry(shape=[2**32, 2**32]), 4, "addressed"),
    "a shape that overflows around a zero": (
        entry(shape=[2**62, 0, 2**62], data_offsets=[0, 0]), 0, "addressed",
    ),
    "a size beyond all": (entry(shape=[2**63]), 4, "shape"),
    "a size of many digits": (
        '{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', 4, "JSON|shape",
    ),
    "an unknown type": (entry(dtype="F31"), 4, "unknown type"),
    "a type that is a number": (entry(dtype=1), 4, "unknown type"),
    "a type that is a list": (entry(dtype=[]), 4, "unknown type"),
    "half a byte": (entry(dtype="F4", shape=[7]), 4, "whole byte"),
    "a field too many": (entry(scale=2.0), 4, "exactly"),
    "a field too few": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "exactly"),
    "a tensor that is a list": ({"a": [1]}, 4, "exactly"),
    "metadata that is no text": ({"__metadata__": {"a": 1}, **entry()}, 4, "__metadata__"),
    "metadata that is no map": ({"__metadata__": "a", **entry()}, 4, "__metadata__"),
    "not a number": (
        '{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', 4, "not a number",
    ),
    "a list": ("[1, 2]", 4, "not a JSON object"),
    "a space before it": (" {}", 0, "not a JSON object"),
    "something behind it": ("{}{}", 0, "JSON"),
    "depth": ("{" + '"a":{' * 100_000, 4, "JSON|deep"),
    "half a character": ('{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4, "text"),
    "a control character": ('{"a\n":1}', 4, "JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("document", "data_bytes", "says"), BAD.values(), ids=BAD.keys())
def test_whatever_is_off_is_an_error_that_says_so(
    document: Any, data_bytes: int, says: str
) -> None:
    with pytest.raises(BadFile, match=says):
        parse(document, data_bytes)


def test_bytes_that_are_no_text_are_an_error() -> None:
    data = (4).to_bytes(8, "little") + b'{"\xff"'
    with pytest.raises(BadFile, match="JSON"):
        parse_header(data, len(data))


@pytest.mark.parametrize(
    ("first", "size_bytes"),
    [
        (b"", 0),
        (b"\2\0\0\0\0\0\0", 7),
        ((0).to_bytes(8, "little"), 100),
        ((1).to_bytes(8, "little"), 100),
        ((93).to_bytes(8, "little"), 100),
        ((HEADER_LIMIT_BYTES + 1).to_bytes(8, "little"), SIZE_LIMIT),
        (b"\xff" * 8, SIZE_LIMIT),
    ],
)
def test_the_header_s_length_is_checked_before_anything_is_read(
    first: bytes, size_bytes: int
) -> None:
    with pytest.raises(BadFile):
        find_header_end(first, size_bytes)
    assert find_header_end((92).to_bytes(8, "little"), 100) == 100


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["U8", "F32", "F4", "dtype", "shape", "data_offsets", 0, 4, 2**63]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 5)) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    },
)


@given(st.dictionaries(st.text(max_size=4), TENSOR | JSON, max_size=4), st.integers(0, 64))
def test_any_document_gives_an_index_that_holds_or_an_error(
    document: dict[str, Any], data_bytes: int
) -> None:
    try:
        index = parse(document, data_bytes)
    except BadFile:
        return
    check_index(index)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_give_an_index_that_holds_or_an_error(data: bytes, more: int) -> None:
    try:
        index = parse_header(data, len(data) + more)
    except BadFile:
        return
    check_index(index)


@given(st.data())
def test_a_changed_byte_gives_an_index_that_holds_or_an_error(data: st.DataObject) -> None:
    whole = bytearray(header(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        index = parse_header(bytes(whole), len(whole) + 42)
    except BadFile:
        return
    check_index(index)


def check_index(index: Index) -> None:
    """Tensors cover the file from the header to its end, each with the bytes its shape needs."""
    at = index.header_end
    for tensor in index.tensors:
        assert tensor.start == at
        elements = 1
        for size in tensor.shape:
            elements *= size
        assert (tensor.end - tensor.start) * 8 == elements * DTYPE_BITS[tensor.dtype]
        at = tensor.end
    assert at == index.size_bytes
    assert len({tensor.name for tensor in index.tensors}) == len(index.tensors)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x",
        "",
        ".",
        "a//b",
        "./a",
        "a\\b",
        "a\0b",
        3,
    ],
)
def test_an_index_cannot_lead_out_of_the_model(file: Any) -> None:
    with pytest.raises(BadFile, match="outside"):
        parse_weight_map(json.dumps({"weight_map": {"w": file}}).encode())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":"b"'],
)
def test_an_index_without_a_map_is_an_error(text: str) -> None:
    with pytest.raises(BadFile):
        parse_weight_map(text.encode())


def test_an_index_says_which_file_has_a_tensor() -> None:
    assert parse_weight_map(b'{"metadata":{"total_size":1},"weight_map":{"w":"d/x"}}') == {
        "w": "d/x"
    }
    one, two = parse(entry(), 4), parse({**entry(), "b": GOOD["s"] | {"data_offsets": [4, 12]}}, 12)
    with pytest.raises(BadFile, match=r"is in 'x' and 'y'"):
        assign({"x": one, "y": two})
    chosen = assign({"x": one, "y": two}, {"a": "y", "b": "y"})
    assert [[t.name for t in chosen[file]] for file in ("x", "y")] == [[], ["a", "b"]]
    with pytest.raises(BadFile, match="not there"):
        assign({"x": one}, {"a": "z"})
    with pytest.raises(BadFile, match="it has not"):
        assign({"x": one, "y": two}, {"a": "y", "b": "x"})
    with pytest.raises(BadFile, match="it has not"):
        assign({"x": one}, {"c": "x"})

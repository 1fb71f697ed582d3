"""Messages of protobuf from a table of their fields: protobuf makes the classes at run time, so
nothing is generated and nothing is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

STRINGS = "map<string, string>"

Fields = Mapping[str, Mapping[str, tuple[str, int]]]
"""Type and number of each field, by message; a message comes after those that it has. A type is
that of a value, ``STRINGS``, or a message, and may have ``repeated`` before it."""

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _FIELD.TYPE_STRING,
    "bool": _FIELD.TYPE_BOOL,
    "int64": _FIELD.TYPE_INT64,
    "double": _FIELD.TYPE_DOUBLE,
}


def make_messages(package: str, fields: Fields) -> dict[str, Any]:
    """The classes of a proto3 package, by name; in a pool of their own, so that another copy of the
    protocol in this process does not matter."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto3"
    )
    for name, its in fields.items():
        message = file.message_type.add(name=name)
        for field, (kind, number) in its.items():
            _add_field(package, message, field, kind, number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in fields
    }


def _add_field(package: str, message: Any, name: str, kind: str, number: int) -> None:
    label = _FIELD.LABEL_OPTIONAL
    if kind == STRINGS:  # a map is a repeated message of its key and its value
        entry = message.nested_type.add(name=f"{name[0].upper()}{name[1:]}Entry")
        entry.options.map_entry = True
        _add_field(package, entry, "key", "string", 1)
        _add_field(package, entry, "value", "string", 2)
        kind = f"repeated {message.name}.{entry.name}"
    if kind.startswith("repeated "):
        label, kind = _FIELD.LABEL_REPEATED, kind.removeprefix("repeated ")
    field = message.field.add(name=name, json_name=name, number=number, label=label)
    if kind in _TYPES:
        field.type = _TYPES[kind]
    else:
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{package}.{kind}"

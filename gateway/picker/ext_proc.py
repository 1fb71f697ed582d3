"""The messages of Envoy's external processing, as far as an endpoint picker reads and writes them.

They are made from the table below with protobuf's descriptor pool: of each message the fields that
are used, with the numbers and types of Envoy's published API (``envoy/service/ext_proc/v3`` and
what it refers to). Fields that are not in the table are skipped when read, as protobuf does with
unknown ones. An enum is an integer here, which is the same on the wire. The tests compare the table
with the published protos, field by field.
"""

from __future__ import annotations

import re
from typing import Any, Final

from google.protobuf import duration_pb2, struct_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = "Process"

# Enums: ``ProcessingMode.BodySendMode`` and ``HeaderValueOption.HeaderAppendAction``.
NONE: Final = 0
STREAMED: Final = 1
BUFFERED: Final = 2
BUFFERED_PARTIAL: Final = 3
FULL_DUPLEX_STREAMED: Final = 4
OVERWRITE_IF_EXISTS_OR_ADD: Final = 2

MESSAGES: Final = """
envoy.config.core.v3
  HeaderValue: key=1 string, value=2 string, raw_value=3 bytes
  HeaderValueOption: header=1 HeaderValue, append_action=3 enum
  HeaderMap: headers=1 repeated HeaderValue
  Metadata: filter_metadata=1 map google.protobuf.Struct
envoy.type.v3
  HttpStatus: code=1 enum
envoy.service.ext_proc.v3
  ProtocolConfiguration: request_body_mode=1 enum, response_body_mode=2 enum
  HttpHeaders: headers=1 envoy.config.core.v3.HeaderMap, end_of_stream=3 bool
  HttpBody: body=1 bytes, end_of_stream=2 bool
  HttpTrailers: trailers=1 envoy.config.core.v3.HeaderMap
  ProcessingRequest: request_headers=2 HttpHeaders in request,
    response_headers=3 HttpHeaders in request, request_body=4 HttpBody in request,
    response_body=5 HttpBody in request, request_trailers=6 HttpTrailers in request,
    response_trailers=7 HttpTrailers in request,
    metadata_context=8 envoy.config.core.v3.Metadata, attributes=9 map google.protobuf.Struct,
    protocol_config=11 ProtocolConfiguration
  HeaderMutation: set_headers=1 repeated envoy.config.core.v3.HeaderValueOption,
    remove_headers=2 repeated string
  StreamedBodyResponse: body=1 bytes, end_of_stream=2 bool
  BodyMutation: body=1 bytes in mutation, streamed_response=3 StreamedBodyResponse in mutation
  CommonResponse: header_mutation=2 HeaderMutation, body_mutation=3 BodyMutation,
    clear_route_cache=5 bool
  HeadersResponse: response=1 CommonResponse
  BodyResponse: response=1 CommonResponse
  TrailersResponse: header_mutation=1 HeaderMutation
  ImmediateResponse: status=1 envoy.type.v3.HttpStatus, headers=2 HeaderMutation, body=3 bytes,
    details=5 string
  ProcessingResponse: request_headers=1 HeadersResponse in response,
    response_headers=2 HeadersResponse in response, request_body=3 BodyResponse in response,
    response_body=4 BodyResponse in response, request_trailers=5 TrailersResponse in response,
    response_trailers=6 TrailersResponse in response,
    immediate_response=7 ImmediateResponse in response,
    dynamic_metadata=8 google.protobuf.Struct,
    override_message_timeout=10 google.protobuf.Duration
"""
"""Packages with their messages, and of each field its name, number and type; ``in`` is before the
``oneof`` that it is a member of."""

_SCALARS: Final = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "enum": FieldDescriptorProto.TYPE_INT32,
}
_OPTIONAL: Final = FieldDescriptorProto.LABEL_OPTIONAL
_REPEATED: Final = FieldDescriptorProto.LABEL_REPEATED
_FIELD: Final = re.compile(r"(\w+)=(\d+) (repeated |map )?([\w.]+)(?: in (\w+))?")


def _make_pool() -> DescriptorPool:
    """A pool of its own, so that the published protos may be loaded in the same process."""
    pool = DescriptorPool()
    names = []
    for module in (struct_pb2, duration_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        names.append(module.DESCRIPTOR.name)
    # A line that is indented twice goes on with the one before; one that is not begins a package.
    lines = MESSAGES.replace(",\n    ", ", ").strip()
    for text in re.split(r"\n(?! )", lines):
        package, *messages = text.splitlines()
        file = FileDescriptorProto(name=package, package=package, syntax="proto3", dependency=names)
        for message in messages:
            name, _, fields = message.strip().partition(": ")
            _add_message(file, name, fields)
        pool.AddSerializedFile(file.SerializeToString())
        names.append(package)
    return pool


def _add_message(file: FileDescriptorProto, name: str, fields: str) -> None:
    message = file.message_type.add(name=name)
    for field in fields.split(", "):
        found = _FIELD.fullmatch(field)
        assert found is not None, field
        label, kind, member_of = found[3], found[4], found[5]
        added = message.field.add(
            name=found[1],
            number=int(found[2]),
            label=_REPEATED if label else _OPTIONAL,
        )
        if kind in _SCALARS:
            added.type = _SCALARS[kind]
        else:
            added.type = FieldDescriptorProto.TYPE_MESSAGE
            added.type_name = f".{kind}" if "." in kind else f".{file.package}.{kind}"
        if label == "map ":
            entry = message.nested_type.add(name=_entry_name(found[1]))
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=_OPTIONAL, type=_SCALARS["string"])
            value = entry.field.add(name="value", number=2, label=_OPTIONAL, type=added.type)
            value.type_name = added.type_name
            added.type_name = f".{file.package}.{name}.{entry.name}"
        if member_of:
            names = [one.name for one in message.oneof_decl]
            if member_of not in names:
                message.oneof_decl.add(name=member_of)
                names.append(member_of)
            added.oneof_index = names.index(member_of)


def _entry_name(field: str) -> str:
    """How protoc calls the message of a map's entries."""
    return "".join(part.capitalize() for part in field.split("_")) + "Entry"


POOL: Final = _make_pool()


def _message(name: str) -> Any:
    return GetMessageClass(POOL.FindMessageTypeByName(f"envoy.service.ext_proc.v3.{name}"))


ProcessingRequest: Final = _message("ProcessingRequest")
ProcessingResponse: Final = _message("ProcessingResponse")

"""The table of ext_proc's messages says what Envoy's published protos say."""

from __future__ import annotations

import pytest
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pool import Default

from gateway.picker import ext_proc


def messages() -> list[str]:
    names, package = [], ""
    for line in ext_proc.MESSAGES.strip().splitlines():
        if not line.startswith(" "):
            package = line
        elif not line.startswith("    "):
            names.append(f"{package}.{line.strip().partition(':')[0]}")
    return names


def shape(field: FieldDescriptor) -> tuple[object, ...]:
    """What a field is on the wire, and how it is read."""
    is_enum = field.type == FieldDescriptor.TYPE_ENUM
    kind = FieldDescriptor.TYPE_INT32 if is_enum else field.type
    of = field.message_type
    value = None
    if of is not None and of.GetOptions().map_entry:
        value = of.fields_by_name["value"].message_type.full_name
    oneof = None if field.containing_oneof is None else field.containing_oneof.name
    name = None if of is None else of.full_name
    return field.number, kind, field.is_repeated, name, value, oneof


@pytest.mark.parametrize("name", messages())
def test_each_field_is_the_published_one(name: str) -> None:
    ours: Descriptor = ext_proc.POOL.FindMessageTypeByName(name)
    theirs: Descriptor = Default().FindMessageTypeByName(name)
    assert len(ours.fields) > 0
    for field in ours.fields:
        assert shape(field) == shape(theirs.fields_by_name[field.name]), field.full_name


def test_the_service_and_its_enums_are_the_published_ones() -> None:
    service = external_processor_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"]
    assert service.full_name == ext_proc.SERVICE
    assert [method.name for method in service.methods] == [ext_proc.METHOD]
    for name in ("NONE", "STREAMED", "BUFFERED", "BUFFERED_PARTIAL", "FULL_DUPLEX_STREAMED"):
        assert getattr(ext_proc, name) == getattr(ProcessingMode, name)
    assert ext_proc.OVERWRITE_IF_EXISTS_OR_ADD == HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def test_what_is_not_in_the_table_is_passed_over() -> None:
    message = external_processor_pb2.ProcessingRequest()
    message.request_body.body = b"text"
    message.request_body.grpc_message_compressed = True
    message.observability_mode = True
    read = ext_proc.ProcessingRequest.FromString(message.SerializeToString())
    assert read.WhichOneof("request") == "request_body"
    assert read.request_body.body == b"text"

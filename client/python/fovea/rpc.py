"""rpc.py - the methods of attention.proto as callables of one gRPC channel.

Built from the descriptors, so that no second generated file (and no match of its version with the
installed grpcio) is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf import message_factory

from fovea._pb import attention_pb2 as pb

# Requests that carry tensors are serialized by attend.encode() already.
_PRESERIALIZED = {"Attend", "AttendOnce"}


def _identity(payload: bytes) -> bytes:
    return payload


class Rpc:
    """One attribute per method: rpc.OpenSession(request, timeout=...), rpc.Attend(iterator), ..."""

    def __init__(self, channel: grpc.Channel, token: str | None = None) -> None:
        metadata = (("authorization", f"Bearer {token}"),) if token else None
        for service in pb.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                call = _callable(channel, service.full_name, method)
                setattr(self, method.name, partial(call, metadata=metadata) if metadata else call)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"attention.proto has no method {name}")


def _callable(channel: grpc.Channel, service: str, method: Any) -> Any:
    shape = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    serialize: Callable[[Any], bytes] = _identity
    if method.name not in _PRESERIALIZED:
        serialize = message_factory.GetMessageClass(method.input_type).SerializeToString
    return getattr(channel, shape)(
        f"/{service}/{method.name}",
        request_serializer=serialize,
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )

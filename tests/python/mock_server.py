"""mock_server.py - mock_service.py behind gRPC, with health and reflection.

python tests/python/mock_server.py ADDRESS [KV_BYTES]
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import message_factory
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fovea._pb import attention_pb2 as pb
from mock_service import Refused, Service


class Door(grpc.GenericRpcHandler):
    """gRPC in front of a Service."""

    def __init__(self, service: Service) -> None:
        self.backend = service
        self.methods = {
            f"/{s.full_name}/{m.name}": m for s in pb.DESCRIPTOR.services_by_name.values() for m in s.methods
        }

    def call(self, name: str, request: object, context: grpc.ServicerContext) -> object:
        try:
            with self.backend.lock:
                return getattr(self.backend, name)(request)
        except Refused as refusal:
            context.abort(refusal.code, refusal.message)
            raise AssertionError("abort raises") from refusal

    def attend(self, requests: object, context: grpc.ServicerContext) -> object:
        for request in requests:
            try:
                with self.backend.lock:
                    reply = self.backend.AttendOnce(request)
            except Refused as refusal:
                status = pb.Status(code=refusal.code.value[0], message=refusal.message)
                reply = pb.AttendResponse(request_id=request.request_id, status=status)
            yield reply

    def watch(self, request: pb.WatchStatusRequest, context: grpc.ServicerContext) -> object:
        while context.is_active():
            with self.backend.lock:
                status = self.backend.GetStatus(pb.GetStatusRequest())
            yield status
            time.sleep(max(request.interval_ms or 1000, 50) / 1000)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        method = self.methods.get(details.method)
        if method is None:
            return None
        codec = {
            "request_deserializer": message_factory.GetMessageClass(method.input_type).FromString,
            "response_serializer": message_factory.GetMessageClass(method.output_type).SerializeToString,
        }
        if method.name == "Attend":
            return grpc.stream_stream_rpc_method_handler(self.attend, **codec)
        if method.name == "WatchStatus":
            return grpc.unary_stream_rpc_method_handler(self.watch, **codec)
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self.call(method.name, request, context), **codec
        )


def start(address: str, kv_bytes: int = 1 << 30) -> grpc.Server:
    """A started server on "host:port" or "unix:/path"."""
    server = grpc.server(
        ThreadPoolExecutor(32),
        options=[("grpc.max_receive_message_length", 1 << 26), ("grpc.max_send_message_length", -1)],
    )
    server.add_generic_rpc_handlers([Door(Service(kv_bytes))])
    checker = health.HealthServicer()
    names = [s.full_name for s in pb.DESCRIPTOR.services_by_name.values()]
    for name in ["", *names]:
        checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    if server.add_insecure_port(address) == 0 and not address.startswith("unix:"):
        raise OSError(f"cannot bind {address}")
    server.start()
    return server


if __name__ == "__main__":
    start(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 30).wait_for_termination()

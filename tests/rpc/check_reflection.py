#!/usr/bin/env python3
"""Checks a running fovead with gRPC's own Python tools: health, and server reflection.

Usage: check_reflection.py ADDRESS      (e.g. 127.0.0.1:7411 or unix:/run/fovea.sock)
Needs: grpcio, grpcio-health-checking, grpcio-reflection.
Exit status 0 when everything is as expected; else the first difference is printed.
"""
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICES = {
    "fovea.v1.Attention": {
        "RegisterModel", "OpenSession", "ForkSession", "TruncateSession", "CloseSession",
        "GetSession", "ListSessions", "Attend", "AttendOnce",
    },
    "fovea.v1.Cluster": {"GetStatus", "GetPlacement", "WatchStatus", "Drain"},
    "grpc.health.v1.Health": {"Check", "Watch"},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo"},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo"},
}


def check(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"check_reflection: {what}")


def check_reflection(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    listed = set(database.get_services())
    check(listed == set(SERVICES), f"services: given {sorted(listed)}, expected {sorted(SERVICES)}")
    pool = DescriptorPool(database)
    for name, methods in SERVICES.items():
        found = {m.name for m in pool.FindServiceByName(name).methods}
        check(found == methods, f"{name}: given {sorted(found)}, expected {sorted(methods)}")
    request = pool.FindMessageTypeByName("fovea.v1.AttendRequest")
    check({"request_id", "layer", "items", "q", "k", "v"} <= set(request.fields_by_name),
          f"AttendRequest lacks fields: {sorted(request.fields_by_name)}")
    attend = pool.FindServiceByName("fovea.v1.Attention").methods_by_name["Attend"]
    check(attend.input_type.full_name == "fovea.v1.AttendRequest", "Attend's input type")
    check(attend.client_streaming and attend.server_streaming, "Attend is not a bidi stream")
    try:
        pool.FindMessageTypeByName("fovea.v1.NoSuchMessage")
        check(False, "an unknown symbol was found")
    except KeyError:
        pass


def check_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "fovea.v1.Attention", "fovea.v1.Cluster"):
        status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
        check(status == serving, f"health of \"{service}\": given {status}, expected SERVING")
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="none"), timeout=10)
        check(False, "health of an unknown service was answered")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.NOT_FOUND, f"unknown service: given {error.code()}")
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=10)
    check(next(watch).status == serving, "the first watched status is not SERVING")
    watch.cancel()


def check_unknown_method(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/fovea.v1.Attention/NoSuchMethod")
    try:
        call(b"", timeout=10)
        check(False, "an unknown method was answered")
    except grpc.RpcError as error:
        check(error.code() == grpc.StatusCode.UNIMPLEMENTED, f"unknown method: {error.code()}")


def main() -> None:
    check(len(sys.argv) == 2, "expected one argument, the address")
    with grpc.insecure_channel(sys.argv[1]) as channel:
        check_reflection(channel)
        check_health(channel)
        check_unknown_method(channel)
    print(f"reflection and health at {sys.argv[1]}: as expected, {len(SERVICES)} services")


if __name__ == "__main__":
    main()

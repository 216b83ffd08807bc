"""test_cluster.py - status, placement, health, reflection, drain."""

from __future__ import annotations

import os
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import fovea
from helpers import Known, attend, small_spec

N_RANKS = int(os.environ.get("FV_TEST_RANKS", "1"))
BACKEND = "cuda" if "--backend=cuda" in os.environ.get("FOVEAD_ARGS", "").split() else "cpu"


def test_status_counts(client, rng):
    before = client.status()
    assert before.state == "serving"
    assert before.version
    s = Known(client, small_spec(), rng)
    attend([s], [30])
    with pytest.raises(fovea.OutOfRange):
        q, k, v = s.fresh(1)
        client.attend(0, [(s.session, 99, 1)], q, k, v)
    after = client.status()
    assert after.n_sessions == before.n_sessions + 1
    assert after.n_requests_done >= before.n_requests_done + 1
    assert after.n_requests_failed == before.n_requests_failed + 1
    assert after.n_tokens_appended == before.n_tokens_appended + 30
    assert 0 < after.kv_bytes_free < after.kv_bytes_total


@pytest.mark.fovead
def test_status_of_ranks(client):
    status = client.status()
    assert [rank.rank for rank in status.ranks] == list(range(N_RANKS))
    for rank in status.ranks:
        assert (rank.backend, rank.state) == (BACKEND, "ready")
        assert rank.host and rank.device and (rank.threads >= 1 or BACKEND == "cuda")
        assert rank.kv_bytes_total > 0
    assert sum(rank.kv_bytes_total for rank in status.ranks) == status.kv_bytes_total
    assert status.exchange in (("mpi", "nccl") if N_RANKS > 1 else ("none",))


def test_watch(client, rng):
    seen = []
    for status in client.watch(0.05):
        seen.append(status.uptime_ms)
        if len(seen) == 4:
            break
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] >= 100


def test_placement(client, rng):
    """Shares cover every head and token exactly once."""
    for mode in ("auto", "heads", "context"):
        spec = small_spec(n_q_heads=6, n_kv_heads=3, sharding=fovea.Sharding(mode, shard_tokens=64))
        s = Known(client, spec, rng)
        attend([s], [300])
        placement = s.session.placement()
        assert placement.session_id == s.session.id
        assert placement.n_tokens == 300
        assert placement.reason
        covered = [
            (head, token)
            for share in placement.shares
            for head in range(share.kv_head_begin, share.kv_head_end)
            for tokens in share.ranges
            for token in range(tokens.begin, tokens.end)
        ]
        assert sorted(covered) == [(head, token) for head in range(3) for token in range(300)]
        for share in placement.shares:
            assert share.q_head_begin == share.kv_head_begin * 2
            assert share.q_head_end == share.kv_head_end * 2
            assert share.rank < N_RANKS
        text = fovea.format_placement(placement)
        assert placement.mode in text
        assert all(f"rank {share.rank} " in text for share in placement.shares)
        if mode == "context" and N_RANKS > 1:
            assert placement.n_ctx_parts == N_RANKS
        if mode == "heads" and N_RANKS > 1:
            assert placement.n_head_parts == min(N_RANKS, 3)


def test_health(service, client):
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "fovea.v1.Attention", "fovea.v1.Cluster"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_reflection(service, client):
    """Standard tools can list the services and learn every message without the .proto file."""
    with grpc.insecure_channel(service.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert {"fovea.v1.Attention", "fovea.v1.Cluster"} <= names
        file = database.FindFileContainingSymbol("fovea.v1.Attention")
        assert file.package == "fovea.v1"
        methods = {m.name for s in file.service for m in s.method}
        assert {"Attend", "AttendOnce", "OpenSession", "WatchStatus"} <= methods
        fields = {f.name: f.number for m in file.message_type if m.name == "AttendRequest" for f in m.field}
        assert fields["q"] == 14 and fields["v"] == 16


def test_drain(own_service, rng):
    """New work is refused, health says so or the service is gone, and it stops with code 0."""
    service = own_service()
    client = service.connect()
    s = Known(client, small_spec(), rng)
    attend([s], [10])
    reply = client.drain(2.0)
    assert reply.n_sessions == 1
    with pytest.raises(fovea.Unavailable):
        client.open_session(client.register_model(small_spec()))
    client.close()
    if "FOVEAD" in os.environ:
        assert service.process.wait(20) == 0, service.output()


@pytest.mark.fovead
def test_a_signal_stops_it_cleanly(own_service, rng):
    service = own_service()
    with service.connect() as client:
        s = Known(client, small_spec(), rng)
        attend([s], [10])
        began = time.monotonic()
        assert service.stop() == 0, service.output()
        assert time.monotonic() - began < 15
        with pytest.raises(fovea.Unavailable):
            client.status()


def test_nobody_there(tmp_path):
    with pytest.raises(fovea.Unavailable, match="no service"):
        fovea.connect(f"unix:{tmp_path}/nothing", timeout=0.3)

"""test_limits.py - what is too large is refused by name, before it costs anything, and the service goes on."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import grpc
import numpy as np
import pytest

import fovea
from access import decode_step
from fovea._pb import attention_pb2 as pb
from helpers import small_spec
from test_access import eventually, outcome

# An answer many times larger than its question: 16 wide keys, 256 wide values, one KV head.
WIDE = small_spec(
    name="wide", n_layers=1, n_q_heads=32, n_kv_heads=1, head_dim_qk=16, head_dim_v=256, kv_dtype="f16"
)


def ask(client: fovea.Client, session: fovea.Session, n_tokens: int) -> fovea.AttendResult:
    q = np.zeros((n_tokens, 32, 16), np.float16)
    return client.attend(0, [(session, 0, n_tokens)], q, None, None, append=False)


@pytest.mark.fovead
def test_an_answer_over_the_message_limit_is_refused(own_service):
    with own_service("64m", ["--request-memory", "8g"]).connect() as client:
        with client.open_session(client.register_model(WIDE)) as session:
            with pytest.raises(fovea.InvalidArgument, match=r"q: given 143360 tokens.*2348810240 bytes"):
                ask(client, session, 143360)
            assert ask(client, session, 100).out.shape == (100, 32, 256)


@pytest.mark.fovead
def test_answers_count_in_request_memory(own_service):
    with own_service("64m", ["--request-memory", "64m"]).connect() as client:
        with client.open_session(client.register_model(WIDE)) as session:
            with pytest.raises(fovea.ResourceExhausted, match=r"134217728 bytes needed.*request_memory"):
                ask(client, session, 8192)  # 8 MiB of q, 128 MiB of out
            assert ask(client, session, 1024).out.shape == (1024, 32, 256)


@pytest.mark.fovead
@pytest.mark.parametrize("token", ["-1", "1" * 23, "abc", " 1"])
def test_page_tokens_that_are_none(client, token):
    with pytest.raises(fovea.InvalidArgument, match="page_token"):
        client._call("ListSessions", pb.ListSessionsRequest(page_token=token))


SPEC = small_spec(name="limits", n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim_qk=16)


@pytest.mark.fovead
def test_tokens_of_a_session(own_service):
    with own_service("64m", ["--session-tokens-max", "100"]).connect() as client:
        session = client.open_session(client.register_model(SPEC))
        client.attend(0, [(session, 0, 99)], *decode_step(SPEC, 99))
        with pytest.raises(fovea.ResourceExhausted, match=r"101 tokens.*at most 100 \(session_tokens_max\)"):
            client.attend(0, [(session, 99, 2)], *decode_step(SPEC, 2))
        client.attend(0, [(session, 99, 1)], *decode_step(SPEC))
        client.attend(0, [(session, 99, 1)], *decode_step(SPEC))  # a retry of the last is no new token


@pytest.mark.fovead
def test_sessions_of_a_request(own_service):
    with own_service("64m", ["--batch-max", "3"]).connect() as client:
        model = client.register_model(SPEC)
        sessions = [client.open_session(model) for _ in range(4)]
        with pytest.raises(
            fovea.ResourceExhausted, match=r"items: given 4.*at most 3 a request \(batch_max\)"
        ):
            client.attend(0, [(s, 0, 1) for s in sessions], *decode_step(SPEC, 4))
        client.attend(0, [(s, 0, 1) for s in sessions[:3]], *decode_step(SPEC, 3))


@pytest.mark.fovead
def test_calls_open_at_once(own_service):
    service = own_service("64m", ["--calls-max", "4"])
    with service.connect() as client, service.connect() as other:
        watches = [client._rpc.WatchStatus(pb.WatchStatusRequest()) for _ in range(4)]
        for watch in watches:
            next(watch)
        with pytest.raises(fovea.ResourceExhausted, match=r"4 are open.*calls_max"):
            other.status()
        health = other._channel.unary_unary("/grpc.health.v1.Health/Check")
        assert health(b"") == b"\x08\x01"  # probes are not kept out by a crowd
        watches[0].cancel()
        assert eventually(lambda: outcome(other.status)[0] is grpc.StatusCode.OK)


@pytest.mark.fovead
def test_headers_of_a_call(own_service):
    with own_service("64m", ["--metadata-max", "4k"]).connect() as client:
        status = client._channel.unary_unary("/fovea.v1.Cluster/GetStatus")
        assert status(b"", metadata=[("x", "y" * 3000)])
        code, _ = outcome(lambda: status(b"", metadata=[("x", "y" * 8000)]))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.fovead
def test_a_message(own_service):
    with own_service("64m", ["--message-max", "64k"]).connect() as client:
        session = client.open_session(client.register_model(SPEC))
        with pytest.raises(fovea.ResourceExhausted, match=r"larger than max \(\d+ vs. 65536\)"):
            client.attend(0, [(session, 0, 1000)], *decode_step(SPEC, 1000))
        assert client.attend(0, [(session, 0, 100)], *decode_step(SPEC, 100))


def stranger(address: str) -> socket.socket | None:
    """A connection that says HTTP/2's hello; None when the service closes it instead of answering."""
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(10)
    s.connect(address.removeprefix("unix:"))
    try:
        s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
        if s.recv(1 << 16):
            return s
    except ConnectionError:
        pass
    s.close()
    return None


@pytest.mark.fovead
def test_connections_open_at_once(own_service):
    service = own_service("64m", ["--connections-max", "5"])
    for _ in range(3):  # what is gone is not counted
        crowd: list[socket.socket] = []

        def enter(crowd: list[socket.socket] = crowd) -> bool:
            s = stranger(service.address)
            if s is not None:
                crowd.append(s)
            return s is not None

        for _ in range(5):
            assert eventually(enter)
        assert stranger(service.address) is None
        for s in crowd:
            s.close()
    assert eventually(lambda: "the most allowed (connections_max)" in service.output())
    assert eventually(lambda: outcome(lambda: service.connect(1).close())[0] is grpc.StatusCode.OK)


@pytest.mark.fovead
def test_the_mode_of_a_unix_socket(own_service):
    for mode in ("600", "660", "666"):
        service = own_service("64m", ["--unix-mode", mode])
        path = Path(service.address.removeprefix("unix:"))
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
        service.stop()
        assert not path.exists()


def enters(address: str, user: int, group: int, groups: tuple[int, ...] = ()) -> bool:
    """Whether a process of another user gets in."""
    child = os.fork()
    if child == 0:  # nothing but sockets until it is over
        try:
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(user)
            os._exit(0 if stranger(address) is not None else 1)
        finally:
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 0


@pytest.mark.fovead
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_whose_processes_may_connect(own_service):
    nobody, other_group = 65534, 54321

    for peers, may in {
        "any": (True, True, True),
        "user": (False, False, False),
        "group": (False, True, True),
    }.items():
        service = own_service("64m", ["--unix-mode", "666", "--unix-peers", peers])
        folder = Path(service.address.removeprefix("unix:")).parent
        for place in (folder, folder.parent):
            place.chmod(0o755)
        given = (
            enters(service.address, nobody, other_group),
            enters(service.address, nobody, os.getegid()),
            enters(service.address, nobody, other_group, (os.getegid(),)),
        )
        assert given == may, peers
        assert service.connect().status()
        if peers != "any":
            assert "are not allowed in (unix_peers)" in service.output()

"""test_limits.py - what is too large is refused by name, before it costs anything, and the service goes on."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
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


@pytest.mark.fovead
def test_requests_of_a_stream(own_service):
    """What is over stream_inflight waits, unread, and is answered in its turn."""
    service = own_service("64m", ["--stream-inflight", "2", "--threads", "1"])
    with service.connect() as client, service.connect() as other:
        session = client.open_session(client.register_model(SPEC))
        q, k, v = decode_step(SPEC, 200)
        most = 0
        with client.stream() as stream:
            futures = [stream.submit(0, [(session, i * 200, 200)], q, k, v) for i in range(40)]
            while not futures[-1].done():
                status = other.status()
                most = max(most, status.n_requests_queued + status.n_requests_running)
            assert all(f.result(20).out.shape for f in futures)
        assert most <= 2


@pytest.mark.fovead
def test_calls_of_a_connection(own_service):
    """What is over connection_streams waits in the client; other connections do not."""
    service = own_service("64m", ["--connection-streams", "3"])
    with service.connect() as client, service.connect() as other:
        watches = [client._rpc.WatchStatus(pb.WatchStatusRequest()) for _ in range(3)]
        for watch in watches:
            next(watch)
        code, _ = outcome(lambda: client._rpc.GetStatus(pb.GetStatusRequest(), timeout=1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert other.status()
        watches[0].cancel()
        assert eventually(lambda: outcome(client.status)[0] is grpc.StatusCode.OK)


class Pusher:
    """A connection that sends a message of 8 MiB but for its last byte, as quickly as HTTP/2's windows let it."""

    def __init__(self, address: str) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": "/fovea.v1.Attention/AttendOnce",
                  ":authority": "x", "te": "trailers", "content-type": "application/grpc"}  # fmt: skip
        block = b"".join(
            b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in fields.items()
        )
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address.removeprefix("unix:"))
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(4, b"") + self._frame(1, block, 4, 1))
        self.socket.settimeout(0.05)
        self.initial, self.is_stuck = 65535, False
        self.windows = {0: 65535, 1: 65535}
        self.left, self.heard = (8 << 20) + 4, b""
        self._data(b"\0" + (8 << 20).to_bytes(4, "big"))

    @staticmethod
    def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    def _data(self, payload: bytes) -> None:
        self.socket.sendall(self._frame(0, payload, 0, 1))
        self.left -= len(payload)
        for stream in self.windows:
            self.windows[stream] -= len(payload)

    def _listen(self) -> None:
        heard = self.socket.recv(1 << 16)
        if not heard:
            raise ConnectionResetError
        self.heard += heard
        while len(self.heard) >= 9 and len(self.heard) >= 9 + int.from_bytes(self.heard[:3], "big"):
            n = int.from_bytes(self.heard[:3], "big")
            kind, flags, stream = self.heard[3], self.heard[4], int.from_bytes(self.heard[5:9], "big")
            body, self.heard = self.heard[9 : 9 + n], self.heard[9 + n :]
            if kind == 8 and stream in self.windows:
                self.windows[stream] += int.from_bytes(body, "big")
            elif kind == 4 and not flags & 1:
                for at in range(0, n, 6):
                    if body[at : at + 2] == b"\0\4":
                        value = int.from_bytes(body[at + 2 : at + 6], "big")
                        self.windows[1] += value - self.initial
                        self.initial = value
                self.socket.sendall(self._frame(4, b"", 1))
            elif kind == 6 and not flags & 1:
                self.socket.sendall(self._frame(6, body, 1))

    def push(self) -> bool:
        """False when it may not send now."""
        n = min(self.left, 16000, *self.windows.values())
        try:
            if n > 0 and not self.is_stuck:
                self._data(bytes(n))
                return True
            self._listen()
        except TimeoutError:
            self.is_stuck = self.is_stuck or n > 0  # half a frame is on its way: it does not read from us
            return False
        except ConnectionError:  # or it has closed the connection: gRPC takes its memory back
            self.is_stuck = True
            return False
        return True


@pytest.mark.fovead
def test_memory_for_messages_that_are_on_their_way(own_service):
    """Of 20 messages of 8 MiB that never become whole gRPC keeps about as much as grpc_memory allows, not all."""
    service = own_service("64m", ["--grpc-memory", "16m", "--message-max", "9m"])

    def resident() -> int:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) >> 10

    with service.connect() as client:
        before = resident()
        crowd = [Pusher(service.address) for _ in range(20)]
        for _ in range(2):
            for pusher in crowd:
                while pusher.push():
                    pass
        grown = resident() - before
        assert sum((8 << 20) + 4 - p.left for p in crowd) > 32 << 20  # as much would have come
        assert client.status()
        if b"__asan_init" not in Path(os.environ["FOVEAD"]).read_bytes():
            assert grown < 64
        for pusher in crowd:
            pusher.socket.close()
        assert client.status()


# Each option of the group Limits, and the test that meets it.
TESTS = {
    "message_max": "test_limits.test_a_message",
    "stream_inflight": "test_limits.test_requests_of_a_stream",
    "connection_streams": "test_limits.test_calls_of_a_connection",
    "request_memory": "test_limits.test_answers_count_in_request_memory",
    "grpc_memory": "test_limits.test_memory_for_messages_that_are_on_their_way",
    "sessions_max": "test_sessions.test_one_session_too_many",
    "session_tokens_max": "test_limits.test_tokens_of_a_session",
    "session_idle_s": "test_hygiene.test_an_idle_session_is_closed",
    "batch_max": "test_limits.test_sessions_of_a_request",
    "calls_max": "test_limits.test_calls_open_at_once",
    "health_calls_max": "../rpc/test_rpc_builtin.test_health_has_its_own_limit",
    "first_message_ms": "../rpc/test_rpc_builtin.test_a_call_without_its_message_ends",
    "connections_max": "test_limits.test_connections_open_at_once",
    "metadata_max": "test_limits.test_headers_of_a_call",
}


@pytest.mark.fovead
def test_each_limit_has_a_test():
    printed = subprocess.run([os.environ["FOVEAD"], "--print-config"], capture_output=True, text=True, check=True)
    group = printed.stdout.split("# ---- Limits")[1].split("# ----")[0]
    assert set(re.findall(r"^([a-z_]+) = .", group, re.M)) == set(TESTS)
    for key, name in TESTS.items():
        module, _, function = name.rpartition(".")
        here = Path(__file__).parent
        files = [f for f in (here / f"{module}.py", here / f"{module}.c") if f.exists()]
        assert files and re.search(rf"\b{function}\(", files[0].read_text()), f"{key}: {name} is not there"

"""test_access.py - each RPC for each kind of caller; tokens; quotas; nothing secret in the log."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import fovea
from access import RPCS, Tokens, all_methods, decode_step
from conftest import Service
from fovea._pb import attention_pb2 as pb
from helpers import small_spec

pytestmark = pytest.mark.fovead

SPEC = small_spec(name="access", n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim_qk=16)
NO_SESSION = "0" * 32
CALLERS = ["none", "wrong", "expired", "other", "owner", "admin"]


class Guarded:
    """A service with a token file, and its clients by name."""

    def __init__(self, start: Callable[..., Service], folder: Path) -> None:
        self.tokens = Tokens(folder / "tokens")
        for name in ("owner", "other"):
            self.tokens.add(name)
        self.tokens.add("admin", "admin")
        self.tokens.add("expired", expires="2020-01-01")
        self.tokens.of["wrong"] = self.tokens.of["owner"][:-1] + "x"
        self._start, self._clients = start, []
        self.service: Service | None = None

    def start(self, *options: str, memory: str = "64m") -> Guarded:
        level = ["--log-level", "trace"]
        self.service = self._start(memory, ["--tokens", str(self.tokens.path), *level, *options])
        return self

    def client(self, name: str) -> fovea.Client:
        assert self.service is not None
        token = self.tokens.of.get(name)
        client = fovea.connect(self.service.address, token=token)
        client.test_token = token  # type: ignore[attr-defined]
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()


@pytest.fixture
def guarded(own_service, tmp_path) -> Iterator[Guarded]:
    guarded = Guarded(own_service, tmp_path)
    yield guarded
    guarded.close()


def expected(rpc: str, is_of_session: bool, caller: str) -> grpc.StatusCode:
    code = grpc.StatusCode
    if rpc in ("Check", "Watch"):
        return code.OK
    if caller in ("none", "wrong", "expired"):
        return code.UNAUTHENTICATED
    if rpc == "Drain":
        return code.OK if caller == "admin" else code.PERMISSION_DENIED
    return code.NOT_FOUND if is_of_session and caller == "other" else code.OK


def outcome(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    try:
        call()
    except fovea.FoveaError as error:
        return error.code, error.message
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def test_each_rpc_for_each_caller(guarded):
    guarded.start()
    assert all_methods() <= set(RPCS), "an RPC is missing in the table"
    clients = {caller: guarded.client(caller) for caller in CALLERS}
    model = clients["owner"].register_model(SPEC)
    wrong = []
    for rpc, (call, is_of_session) in RPCS.items():
        for caller in CALLERS:
            session = clients["owner"].open_session(model).id
            want = expected(rpc, is_of_session, caller)
            code, text = outcome(lambda c=caller, f=call, s=session: f(clients[c], SPEC, model, s))
            if code is not want:
                wrong.append(f"{rpc} by {caller}: {code} {text!r}, expected {want}")
            if code is grpc.StatusCode.NOT_FOUND:  # as for one that does not exist
                _, of_none = outcome(lambda c=caller, f=call: f(clients[c], SPEC, model, NO_SESSION))
                assert text == of_none.replace(NO_SESSION, session)
            if rpc != "Drain" or caller != "admin":
                outcome(lambda s=session: clients["owner"].close_session(s))
    assert not wrong, "\n".join(wrong)
    assert guarded.service.process.wait(20) == 0
    log = guarded.service.output()
    assert "refused" in log
    for name, token in guarded.tokens.of.items():
        assert token not in log and token[3:19] not in log, f"the token of {name} is in the log"
    for line in guarded.tokens.path.read_text().splitlines():
        assert line.split("sha256=")[1][:16] not in log, "a hash is in the log"


def test_sessions_are_listed_to_their_owner_alone(guarded):
    guarded.start()
    owner, other, admin = (guarded.client(name) for name in ("owner", "other", "admin"))
    model = owner.register_model(SPEC)
    mine = {owner.open_session(model).id for _ in range(3)}
    theirs = {other.open_session(model).id}
    forked = {admin.fork_session(next(iter(mine))).id}  # belongs to its parent's owner
    assert {s.session_id for s in owner.list_sessions(page_size=1)} == mine | forked
    assert {s.session_id for s in other.list_sessions()} == theirs
    assert {s.session_id for s in admin.list_sessions(page_size=2)} == mine | theirs | forked
    one, another = sorted(mine)[0], next(iter(theirs))
    q, k, v = decode_step(SPEC, 2)
    with pytest.raises(fovea.InvalidArgument, match="owner"):
        admin.attend(0, [(one, 0, 1), (another, 0, 1)], q, k, v)
    with pytest.raises(fovea.NotFound, match=r"items\[1\]"):
        owner.attend(0, [(one, 0, 1), (another, 0, 1)], q, k, v)


def test_a_call_is_refused_before_anything_of_it_is_sent(guarded):
    guarded.start()
    channel, is_over = guarded.client("none")._channel, threading.Event()

    def nothing() -> Iterator[bytes]:
        is_over.wait(20)  # the client has sent its headers, and sends no more
        yield from ()

    for method in ("AttendOnce", "OpenSession", "Attend"):
        call = channel.stream_stream(f"/fovea.v1.Attention/{method}")(nothing(), timeout=10)
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    is_over.set()


def test_headers_that_are_none(guarded):
    guarded.start()
    token, channel = guarded.tokens.of["owner"], guarded.client("none")._channel
    status = channel.unary_unary("/fovea.v1.Cluster/GetStatus")
    good = ("authorization", f"Bearer {token}")
    assert status(b"", metadata=[good])
    assert status(b"", metadata=[("authorization", f"bearer {token}")])  # schemes have no case
    for headers in (
        [("authorization", token)],
        [("authorization", f"Basic {token}")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer")],
        [("authorization", "")],
        [("authorization", f"Bearer {token} ")],
        [("authorization", f"Bearer  {token}")],
        [("authorization", "Bearer " + "x" * 5000)],
        [good, good],
    ):
        code, text = outcome(lambda h=headers: status(b"", metadata=h, timeout=10))
        assert code is grpc.StatusCode.UNAUTHENTICATED, headers
        assert token not in text


def eventually(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 15
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_tokens_come_and_go(guarded):
    guarded.start()
    owner = guarded.client("owner")
    model = owner.register_model(SPEC)
    session = owner.open_session(model)
    q, k, v = decode_step(SPEC)
    with owner.stream() as stream:
        assert stream.submit(0, [(session, 0, 1)], q, k, v).result(20)
        guarded.tokens.add("late")
        late = guarded.client("late")
        assert eventually(lambda: outcome(late.status)[0] is grpc.StatusCode.OK)
        assert stream.submit(0, [(session, 1, 1)], q, k, v).result(20)  # untouched by the reload

        guarded.tokens.write("owner user sha256=nonsense\n")
        if "FV_TEST_RANKS" in os.environ:  # mpirun would take the signal for itself
            assert eventually(lambda: late.status() and "last good file stays" in guarded.service.output())
        else:
            guarded.service.process.send_signal(signal.SIGHUP)
            assert eventually(lambda: "last good file stays" in guarded.service.output())
        assert "nonsense" not in guarded.service.output()
        assert stream.submit(0, [(session, 2, 1)], q, k, v).result(20)

        guarded.tokens.remove("owner")  # its stream ends with the next message
        assert eventually(lambda: outcome(owner.status)[0] is grpc.StatusCode.UNAUTHENTICATED)
        with pytest.raises(fovea.Unauthenticated):
            stream.submit(0, [(session, 3, 1)], q, k, v).result(20)
    assert guarded.client("admin").session_info(session.id).layer_tokens == [3]


def test_a_token_that_is_removed_while_calls_are_open(guarded):
    """Calls with good headers whose message comes when the token is gone; and one that only listens."""
    guarded.start()
    owner, late = guarded.client("owner"), threading.Event()
    model = owner.register_model(SPEC)
    header = [("authorization", f"Bearer {guarded.tokens.of['owner']}")]
    opens = pb.OpenSessionRequest(model_id=model).SerializeToString()

    def message() -> Iterator[bytes]:
        late.wait(30)
        yield opens

    before = [
        owner._channel.stream_stream("/fovea.v1.Attention/OpenSession")(
            message(), metadata=header, timeout=30
        )
        for _ in range(3)
    ]
    watch = iter(owner.watch(0.1))
    assert next(watch)
    guarded.tokens.remove("owner")
    code = grpc.StatusCode.UNAUTHENTICATED
    assert eventually(lambda: outcome(owner.status)[0] is code)
    late.set()
    for call in before:
        assert call.code() is code and "not valid any more" in call.details()
    assert outcome(lambda: [None for _ in watch])[0] is code
    assert list(guarded.client("admin").list_sessions()) == []  # nothing of it was done


def test_a_token_expires(guarded):
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 4))
    guarded.tokens.add("soon", expires=soon)
    guarded.start()
    client = guarded.client("soon")
    assert client.status()
    assert eventually(lambda: outcome(client.status)[0] is grpc.StatusCode.UNAUTHENTICATED)
    assert "expired" in outcome(client.status)[1]


# ---------------------------------------------------------------------- quotas


def test_quota_of_sessions(guarded):
    guarded.tokens.add("small", sessions=2)
    guarded.start()
    small, owner = guarded.client("small"), guarded.client("owner")
    model = owner.register_model(SPEC)
    first, second = (small.open_session(model) for _ in range(2))
    for refused in (lambda: small.open_session(model), first.fork):
        with pytest.raises(fovea.ResourceExhausted, match=r"quota of small: 2 sessions open of 2 allowed"):
            refused()
    assert owner.open_session(model)
    second.close()
    assert first.fork()


def test_quota_of_kv_bytes(guarded):
    page = 64 * 2 * 16 * 4  # tokens, K and V, head_dim, fp32
    guarded.tokens.add("small", kv_bytes=3 * page)
    guarded.start()
    small = guarded.client("small")
    session = small.open_session(small.register_model(SPEC))
    small.attend(0, [(session, 0, 128)], *decode_step(SPEC, 128))
    numbers = f"{2 * page} bytes of KV needed, {2 * page} used of {3 * page} allowed"
    with pytest.raises(fovea.ResourceExhausted, match=numbers):
        small.attend(0, [(session, 128, 65)], *decode_step(SPEC, 65))
    with pytest.raises(fovea.ResourceExhausted, match="quota of small"):
        session.fork()  # counts in full
    assert session.info().layer_tokens == [128]  # a refused request changes nothing
    small.attend(0, [(session, 128, 64)], *decode_step(SPEC, 64))
    session.truncate(64)
    fork = session.fork()
    fork.close()
    session.close()
    again = small.open_session(small.register_model(SPEC))
    small.attend(0, [(again, 0, 192)], *decode_step(SPEC, 192))


def test_quota_of_kv_bytes_holds_within_a_step(guarded):
    page = 64 * 2 * 16 * 4
    guarded.tokens.add("small", kv_bytes=4 * page)
    guarded.start()
    small = guarded.client("small")
    model = small.register_model(SPEC)
    sessions = [small.open_session(model) for _ in range(32)]
    q, k, v = decode_step(SPEC)
    with small.stream() as stream:  # they share steps
        futures = [stream.submit(0, [(s, 0, 1)], q, k, v) for s in sessions]
        failed = [f.exception(20) for f in futures]
    assert sum(f is None for f in failed) == 4
    assert all(isinstance(f, fovea.ResourceExhausted) for f in failed if f is not None)


def test_quota_of_requests_in_flight(guarded):
    guarded.tokens.add("small", requests=2)
    guarded.start("--threads", "1")
    small = guarded.client("small")
    spec = small_spec(name="slow", n_layers=1, n_q_heads=8, n_kv_heads=8, head_dim_qk=64)
    session = small.open_session(small.register_model(spec))
    q, k, v = decode_step(spec, 2048)
    with small.stream() as stream:
        futures = [stream.submit(0, [(session, i * 2048, 2048)], q, k, v) for i in range(16)]
        failed = [f.exception(60) for f in futures]
    refused = [f for f in failed if isinstance(f, fovea.ResourceExhausted)]
    assert failed[0] is None and refused
    assert "requests in flight of 2 allowed" in refused[0].message
    assert small.attend(0, [(session, 0, 1)], q[:1], append=False).out.shape  # all are given back


def test_quota_of_bytes_a_second(guarded):
    guarded.tokens.add("small", bytes_per_second="1m")
    guarded.start()
    small = guarded.client("small")
    model = small.register_model(SPEC)
    session = small.open_session(model)
    q = np.zeros((16384, 2, 16), np.float32)  # 2 MiB
    refused = []
    for _ in range(8):
        code, text = outcome(lambda: small.attend(0, [(session, 0, 16384)], q, append=False, causal=False))
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            refused.append(text)
    assert refused and "1048576 bytes a second" in refused[0] and "try again in" in refused[0]
    assert small.status()  # costs nothing
    wait_ms = int(refused[-1].split("try again in ")[1].split(" ")[0])
    assert 0 < wait_ms < 20000
    assert guarded.client("owner").open_session(model)


def test_a_flood_of_refused_requests_is_bounded_by_bytes_a_second(guarded):
    floods = {
        "tiny": ("OpenSession", b"", grpc.StatusCode.INVALID_ARGUMENT, 8),
        "nonsense": ("AttendOnce", b"\xff" * 1024, grpc.StatusCode.INVALID_ARGUMENT, 2),
        "other": ("ForkSession", pb.ForkSessionRequest(session_id=NO_SESSION).SerializeToString(),
                  grpc.StatusCode.NOT_FOUND, 8),
    }  # fmt: skip
    for name in floods:
        guarded.tokens.add(name, bytes_per_second=1024)
    guarded.start()
    for name, (method, message, code, n_let_in) in floods.items():
        call = guarded.client("none")._channel.unary_unary(f"/fovea.v1.Attention/{method}")
        header = [("authorization", f"Bearer {guarded.tokens.of[name]}")]
        answers = [
            outcome(lambda c=call, m=message, h=header: c(m, metadata=h, timeout=10)) for _ in range(40)
        ]
        n = [given for given, _ in answers].index(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert n_let_in <= n < 40 and all(given is code for given, _ in answers[:n]), name
        assert "bytes_per_second" in answers[n][1], name


def test_one_request_after_the_other_is_never_two_in_flight(guarded):
    """An answer that has come is sent: the next request finds its place free."""
    guarded.tokens.add("small", requests=1)
    guarded.start()
    small = guarded.client("small")
    session = small.open_session(small.register_model(SPEC))
    q, k, v = decode_step(SPEC)
    for i in range(300):
        small.attend(0, [(session, i, 1)], q, k, v)
    with small.stream() as stream:
        for i in range(300, 600):
            stream.submit(0, [(session, i, 1)], q, k, v).result(20)


def test_quota_of_models(guarded):
    guarded.tokens.add("small", models=2)
    guarded.start()
    small, owner, admin = (guarded.client(name) for name in ("small", "owner", "admin"))

    def spec(name: str) -> fovea.ModelSpec:
        return small_spec(name=name, n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim_qk=16)

    def refused(client: fovea.Client, name: str, numbers: str) -> None:
        with pytest.raises(fovea.ResourceExhausted, match=numbers + r" allowed \(models\)"):
            client.register_model(spec(name))

    assert small.register_model(spec("a")) != small.register_model(spec("b"))
    refused(small, "c", "quota of small: 2 models registered of 2")
    assert owner.register_model(spec("c"))
    assert small.open_session(small.register_model(spec("c")))  # it is there, whoever brought it
    assert small.register_model(spec("a"))
    for i in range(15):
        owner.register_model(spec(f"owner {i}"))
    refused(owner, "one more", "quota of owner: 16 models registered of 16")
    guarded.tokens.remove("small")
    guarded.tokens.write(guarded.tokens.path.read_text().replace("owner user", "owner user models=17"))
    assert eventually(
        lambda: outcome(lambda: owner.register_model(spec("one more")))[0] is grpc.StatusCode.OK
    )
    assert admin.register_model(spec("d"))

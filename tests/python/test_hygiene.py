"""test_hygiene.py - sessions that end by themselves, and nothing left behind by those that came and went."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

import fovea
from access import decode_step
from helpers import small_spec
from test_access import eventually

pytestmark = pytest.mark.fovead

SPEC = small_spec(name="hygiene", n_layers=1, n_q_heads=2, n_kv_heads=1, head_dim_qk=16)


def is_there(client: fovea.Client, session: fovea.Session) -> bool:
    return any(info.session_id == session.id for info in client.list_sessions())  # looks, and does not touch


def test_an_idle_session_is_closed(own_service):
    with own_service("64m", ["--session-idle-s", "2"]).connect() as client:
        model = client.register_model(SPEC)
        idle, attended, asked = (client.open_session(model) for _ in range(3))
        client.attend(0, [(idle, 0, 1)], *decode_step(SPEC))
        n = 0
        deadline = time.monotonic() + 15
        while is_there(client, idle) and time.monotonic() < deadline:
            client.attend(0, [(attended, n, 1)], *decode_step(SPEC))
            assert asked.info().layer_tokens == [0]
            n += 1
            time.sleep(0.2)
        assert not is_there(client, idle)
        with pytest.raises(fovea.NotFound):
            client.attend(0, [(idle, 1, 1)], *decode_step(SPEC))
        assert attended.info().layer_tokens == [n] and n > 5
        attended.truncate(0)
        asked.close()
        assert eventually(lambda: client.status().n_sessions == 0)
        status = client.status()
        assert status.kv_bytes_free == status.kv_bytes_total


def test_a_session_stays_by_default(own_service):
    with own_service("64m").connect() as client:
        session = client.open_session(client.register_model(SPEC))
        time.sleep(3)
        assert is_there(client, session)


def test_a_session_ends_with_its_stream(own_service):
    service = own_service("64m")
    with service.connect() as client:
        model = client.register_model(SPEC)
        q, k, v = decode_step(SPEC)
        bound = client.open_session(model, close_with_stream=True)
        kept = client.open_session(model)
        client.attend(0, [(bound, 0, 1)], q, k, v)  # a unary call is no stream
        with client.stream() as first:
            for session, position in ((bound, 1), (kept, 0)):
                first.submit(0, [(session, position, 1)], q, k, v).result(20)
            with client.stream() as second:  # only the first that used it counts
                second.submit(0, [(bound, 2, 1)], q, k, v).result(20)
            fork = bound.fork()  # bound to whatever stream uses it first: none
            time.sleep(0.5)
            assert is_there(client, bound)
        assert eventually(lambda: not is_there(client, bound))
        assert is_there(client, kept) and is_there(client, fork)
        fork.close()

        again = [client.open_session(model, close_with_stream=True) for _ in range(5)]
        with service.connect() as other:
            stream = other.stream()
            for session in again:
                stream.submit(0, [(session, 0, 1)], q, k, v).result(20)
            again[2].close()  # by hand, before its stream is over
        assert eventually(lambda: client.status().n_sessions == 1)  # the connection is gone: all are closed
        kept.close()
        status = client.status()
        assert status.kv_bytes_free == status.kv_bytes_total


def test_many_streams_end_at_once(own_service):
    service = own_service("64m")
    q, k, v = decode_step(SPEC)
    with service.connect() as client:
        model = client.register_model(SPEC)
        for _ in range(5):
            clients = [service.connect() for _ in range(8)]
            streams = [c.stream() for c in clients]
            for stream in streams:
                for _ in range(4):
                    session = client.open_session(model, close_with_stream=True)
                    stream.submit(0, [(session, 0, 1)], q, k, v)  # the answer may come too late
            for c in clients:
                c.close()
        left = [s for s in client.list_sessions() if s.layer_tokens[0] > 0]
        assert eventually(lambda: not [s for s in client.list_sessions() if s.layer_tokens[0] > 0]), left


def resources(pid: int) -> tuple[int, int]:
    """Resident KiB and open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return rss, len(os.listdir(f"/proc/{pid}/fd"))


def test_opened_and_closed_many_times(own_service):
    service = own_service("64m", ["--threads", "1"])
    pid = service.process.pid
    n = int(os.environ.get("FV_SESSIONS", "3000"))

    def some(client: fovea.Client, model: str, n: int) -> None:
        for i in range(n):
            session = client.open_session(model, close_with_stream=i % 3 == 0)
            client.attend(0, [(session, 0, 1)], *decode_step(SPEC))
            fork = session.fork() if i % 5 == 0 else None
            session.close()
            if fork is not None:
                fork.close()

    with service.connect() as client:
        model = client.register_model(SPEC)
        some(client, model, n // 3)
        before = resources(pid)
        some(client, model, n)
        for _ in range(20):
            service.connect().close()
        rss, n_fds = resources(pid)
        assert n_fds <= before[1] + 4
        is_sanitized = b"__asan_init" in Path(os.environ["FOVEAD"]).read_bytes()  # it keeps what is freed
        assert is_sanitized or rss <= before[0] + 4096, f"{rss - before[0]} KiB more after {n} sessions"
        status = client.status()
        assert status.n_sessions == 0 and status.kv_bytes_free == status.kv_bytes_total


def test_a_chain_of_a_thousand_forks(own_service, rng):
    with own_service("256m").connect() as client:
        model = client.register_model(SPEC)
        chain = [client.open_session(model)]
        k, v = (rng.standard_normal((1, 1, 16), np.float32) for _ in "kv")
        q = rng.standard_normal((1, 2, 16), np.float32)
        for depth in range(1000):
            client.attend(0, [(chain[-1], depth, 1)], q, k, v)
            chain.append(chain[-1].fork())
        deepest = client.attend(0, [(chain[-1], 999, 1)], q, append=False)
        assert chain[-1].info().layer_tokens == [1000]
        assert chain[500].info().layer_tokens == [501]
        alone = client.open_session(model)
        for position in range(0, 1000, 100):  # the same tokens in one session
            kk, vv = np.repeat(k, 100, 0), np.repeat(v, 100, 0)
            client.attend(0, [(alone, position, 100)], np.repeat(q, 100, 0), kk, vv)
        same = client.attend(0, [(alone, 999, 1)], q, append=False)
        np.testing.assert_allclose(deepest.out, same.out, atol=1e-5)
        for i in rng.permutation(len(chain)):
            chain[i].close()
        alone.close()
        status = client.status()
        assert status.n_sessions == 0 and status.kv_bytes_free == status.kv_bytes_total

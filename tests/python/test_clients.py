"""test_clients.py - several clients at once, pipelining, cancellation, deadlines, clients that vanish."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fovea
import helpers
from helpers import Known, attend, small_spec


def test_pipelined_decode(client, rng):
    """Tokens of one session sent without waiting are applied in order; many sessions interleave."""
    spec = small_spec()
    known = [Known(client, spec, rng) for _ in range(4)]
    inputs = [s.fresh(25) for s in known]
    with client.stream() as stream:
        futures = [
            [stream.submit(0, [(s.session, i, 1)], q[i : i + 1], k[i : i + 1], v[i : i + 1])]
            for i in range(25)
            for s, (q, k, v) in zip(known, inputs, strict=True)
        ]
        outs = np.concatenate([future.result(30).out for (future,) in futures])
    for n, (s, (q, k, v)) in enumerate(zip(known, inputs, strict=True)):
        s.remember(0, k, v)
        helpers.close(outs[n :: len(known)], s.expect(0, q, 0)[0])


def test_layers_in_flight(client, rng):
    """Several layers of the same token at once."""
    spec = small_spec(n_layers=8)
    s = Known(client, spec, rng)
    q, k, v = s.fresh(5)
    with client.stream() as stream:
        futures = [stream.submit(layer, [(s.session, 0, 5)], q, k, v) for layer in range(8)]
        for layer, future in enumerate(futures):
            s.remember(layer, k, v)
            helpers.close(future.result(30).out, s.expect(layer, q, 0)[0])


def test_two_clients_at_once(service, client, rng):
    """Each has its own connection, model and sessions; none sees the other."""

    def user(i: int) -> None:
        with service.connect() as own:
            mine = np.random.default_rng(i)
            s = Known(own, small_spec(name=f"user {i}", head_dim_qk=32 + 8 * i), mine)
            for n in (65, *[1] * 15, 33):
                attend([s], [n])
            with own.stream() as stream:

                def send(*args: object, **kwargs: object) -> fovea.AttendResult:
                    return stream.submit(*args, **kwargs).result(30)

                for _ in range(10):
                    attend([s], [1], send=send)
            s.session.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(user, range(4)))


def test_two_clients_share_a_session(service, client, rng):
    s = Known(client, small_spec(), rng)
    with service.connect() as second:
        for i in range(10):
            s.client = second if i % 2 else client
            attend([s], [7])


def test_full_stream_waits(client, rng):
    """submit() blocks at inflight_max instead of piling up memory."""
    s = Known(client, small_spec(), rng)
    attend([s], [64])
    q, _, _ = s.fresh(1)
    with client.stream(inflight_max=2) as stream:
        futures = [stream.submit(0, [(s.session, 63, 1)], q, append=False) for _ in range(50)]
        outs = [future.result(30).out for future in futures]
    assert all(np.array_equal(out, outs[0]) for out in outs)


def test_closed_stream_refuses(client, rng):
    s = Known(client, small_spec(), rng)
    stream = client.stream()
    stream.close()
    q, k, v = s.fresh(1)
    with pytest.raises(fovea.Cancelled):
        stream.submit(0, [(s.session, 0, 1)], q, k, v)


def test_closed_client_refuses(service, client, rng):
    """Closing the client ends its streams; sessions stay."""
    first = service.connect()
    s = Known(first, small_spec(), rng)
    attend([s], [5])
    stream = first.stream()
    first.close()
    q, k, v = s.fresh(1)
    with pytest.raises(fovea.Cancelled):
        first.attend(0, [(s.session, 5, 1)], q, k, v)
    with pytest.raises(fovea.Cancelled):
        first.stream()
    stream.close(10)
    with pytest.raises(fovea.Cancelled):
        stream.submit(0, [(s.session, 5, 1)], q, k, v)
    assert client.session_info(s.session).max_tokens == 5


def test_a_service_that_dies_under_a_stream(own_service, rng):
    """Futures under way fail as Unavailable: a retry is safe."""
    service = own_service()
    client = service.connect()
    s = Known(client, small_spec(), rng)
    attend([s], [5])
    stream = client.stream()
    service.stop()
    q, k, v = s.fresh(1)
    with pytest.raises(fovea.Unavailable):
        stream.submit(0, [(s.session, 5, 1)], q, k, v).result(20)
    with pytest.raises(fovea.Unavailable):
        client.status()


def test_many_streams(client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [30])
    q, _, _ = s.fresh(1)
    streams = [client.stream() for _ in range(20)]
    futures = [stream.submit(0, [(s.session, 29, 1)], q, append=False) for stream in streams]
    outs = {future.result(30).out.tobytes() for future in futures}
    assert len(outs) == 1
    for stream in streams:
        stream.close(10)


def test_deadline(client, rng):
    """Three milliseconds for a request of 16 MB: the call fails, the session works on."""
    s = Known(client, small_spec(n_q_heads=32, n_kv_heads=2, head_dim_qk=128), rng)
    attend([s], [1024])
    q, _, _ = s.fresh(1024)
    with pytest.raises(fovea.DeadlineExceeded):
        client.attend(0, [(s.session, 0, 1024)], q, append=False, timeout=0.003)
    attend([s], [1])


def test_cancelled_streams_leave_nothing(service, client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [64])
    q, _, _ = s.fresh(1)
    for _ in range(20):
        stream = client.stream()
        futures = [stream.submit(0, [(s.session, 63, 1)], q, append=False) for _ in range(8)]
        stream.cancel()
        stream.close(10)
        assert all(future.done() for future in futures)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        status = client.status()
        if status.n_requests_queued == 0 and status.n_requests_running == 0:
            break
        time.sleep(0.05)
    assert (status.n_requests_queued, status.n_requests_running) == (0, 0)
    attend([s], [1])


VANISH = """
    import os, sys
    import numpy as np
    import fovea

    client = fovea.connect(sys.argv[1])
    model = client.register_model(fovea.ModelSpec("vanishes", 1, 4, 2, 32, kv_dtype="f32"))
    session = client.open_session(model)
    print(session.id, flush=True)
    q = np.ones((1, 4, 32), np.float32)
    k = np.ones((1, 2, 32), np.float32)
    stream = client.stream(1000)
    for i in range(200):
        stream.submit(0, [(session, i, 1)], q, k, k)
        if i == 20:
            future = stream.submit(0, [(session, i + 1, 1)], q, k, k)
            future.result()
            os._exit(1)
"""


def test_a_client_that_vanishes_mid_stream(service, client, rng):
    """Its sessions stay, with every token up to some point; the service and other clients go on."""
    s = Known(client, small_spec(), rng)
    attend([s], [20])
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(VANISH), service.address],
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        info = client.session_info(done.stdout.strip())
        assert 21 <= info.max_tokens <= 200
        attend([s], [1])
        client.close_session(info.session_id)


def test_a_reader_that_stops_reading(service, client, rng):
    """Thousands of answers nobody reads: its own sending stops, others are served meanwhile."""
    import grpc

    from fovea import attend as message

    s = Known(client, small_spec(n_q_heads=32, n_kv_heads=2, head_dim_qk=128), rng)
    attend([s], [16])
    q, _, _ = s.fresh(16)
    call = message.encode(
        1, 0, [fovea.Item(s.session.id, 0, 16)], q, None, None,
        causal=True, want_lse=False, append=False, dtype=None,
    )  # fmt: skip
    sent = 0
    enough = threading.Event()

    def requests():
        nonlocal sent
        while not enough.is_set() and sent < 3000:  # 3000 * 256 KiB
            sent += 1
            yield call.payload

    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(service.address, options) as channel:
        replies = channel.stream_stream("/fovea.v1.Attention/Attend")(requests())
        time.sleep(1.5)
        stuck_at = sent
        other = Known(client, small_spec(), rng)
        attend([other], [30])
        attend([other], [1])
        assert next(iter(replies))  # it wakes up: answers are there
        enough.set()
        replies.cancel()
    assert stuck_at < 3000, "the service took in everything from a client that reads nothing"
    attend([s], [1])

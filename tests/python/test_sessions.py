"""test_sessions.py - models and sessions: their life, forks, lists."""

from __future__ import annotations

import time

import pytest

import fovea
from helpers import Known, attend, small_spec


def test_register_is_idempotent(client):
    spec = small_spec(n_layers=3)
    assert client.register_model(spec) == client.register_model(spec)
    assert client.register_model(spec) != client.register_model(small_spec(n_layers=4))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 0},
        {"n_layers": 5000},
        {"n_q_heads": 0},
        {"n_kv_heads": 0},
        {"n_q_heads": 3},
        {"n_q_heads": 1 << 31, "n_kv_heads": 1 << 31},
        {"n_q_heads": 1024, "n_kv_heads": 1},
        {"head_dim_qk": 8},
        {"head_dim_qk": 20},
        {"head_dim_qk": 264},
        {"head_dim_v": 12},
        {"name": ""},
        {"name": "n" * 64},
        {"policies": [fovea.LayerPolicy(fovea.Window(0))]},
        {"policies": [fovea.LayerPolicy(fovea.Window(4), layers=[2])]},
        {"softmax_scale": float("nan")},
        {"softmax_scale": -1.0},
        {"logit_softcap": float("inf")},
    ],
    ids=str,
)
@pytest.mark.fovead
def test_bad_models_are_refused(client, changes):
    with pytest.raises(fovea.InvalidArgument, match="given"):
        client.register_model(small_spec(**changes))


@pytest.mark.fovead
def test_hints_beyond_any_session_are_refused(client):
    """Bytes of so many tokens would wrap, and the rank's load with them."""
    model = client.register_model(small_spec())
    client.open_session(model, max_tokens_hint=1 << 36).close()
    for hint in [(1 << 36) + 1, 1 << 63, (1 << 64) - 1]:
        with pytest.raises(fovea.InvalidArgument, match="max_tokens_hint"):
            client.open_session(model, max_tokens_hint=hint)


def test_life(client, rng):
    model = client.register_model(small_spec())
    before = client.status().n_sessions
    with client.open_session(model, max_tokens_hint=100) as session:
        info = session.info()
        assert (info.session_id, info.model_id) == (session.id, model)
        assert len(session.id) == 32
        assert info.layer_tokens == [0, 0]
        assert info.kv_bytes == 0
        assert abs(info.created_unix_ms / 1000 - time.time()) < 60
        assert client.status().n_sessions == before + 1
    assert client.status().n_sessions == before
    with pytest.raises(fovea.NotFound, match=session.id):
        session.info()


def test_closed_sessions_are_unknown(client, rng):
    s = Known(client, small_spec(), rng)
    s.session.close()
    for call in (s.session.close, s.session.fork, s.session.placement, lambda: s.session.truncate(0)):
        with pytest.raises(fovea.NotFound):
            call()
    with pytest.raises(fovea.NotFound):
        attend([s], [1])


@pytest.mark.parametrize("session_id", ["", "xyz", "0" * 31, "0" * 33, "g" * 32, "\N{SNOWMAN}"])
def test_malformed_session_ids(client, session_id):
    with pytest.raises((fovea.InvalidArgument, fovea.NotFound)):
        client.session(session_id).info()


def test_unknown_model(client):
    with pytest.raises(fovea.NotFound, match="model_id"):
        client.open_session("no-such-model")


def test_kv_memory_comes_back(client, rng):
    free = client.status().kv_bytes_free
    s = Known(client, small_spec(), rng)
    attend([s], [200])
    info = s.session.info()
    assert info.kv_bytes >= 200 * 2 * 2 * 32 * 4
    assert client.status().kv_bytes_free < free
    s.session.close()
    deadline = time.monotonic() + 5
    while client.status().kv_bytes_free != free and time.monotonic() < deadline:
        time.sleep(0.02)
    assert client.status().kv_bytes_free == free


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 100, None])
def test_fork(client, rng, at):
    """Parent and child go different ways from the fork on, and never see each other's tokens."""
    parent = Known(client, small_spec(), rng)
    attend([parent], [100], layer=0)
    attend([parent], [100], layer=1)
    child = parent.fork(at)
    assert child.session.info().parent_session_id == parent.session.id
    assert list(child.session.info().layer_tokens) == [child.length()] * 2
    for n in (1, 3, 64):
        attend([child], [n])
        attend([parent], [n])
        attend([parent, child], [1, 1])
    parent.session.close()
    attend([child], [2])
    attend([child], [2], layer=1)


def test_fork_of_a_fork(client, rng):
    family = [Known(client, small_spec(), rng)]
    attend(family, [70])
    for _ in range(5):
        family.append(family[-1].fork())
        attend([family[-1]], [1])
    for s in family:
        attend([s], [3])
    for s in family[::2]:
        s.session.close()
    attend(family[1::2], [1, 1, 1])


def test_fork_and_truncate_out_of_range(client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [10])
    with pytest.raises(fovea.OutOfRange, match="10"):
        s.session.fork(11)
    with pytest.raises(fovea.OutOfRange, match="10"):
        s.session.truncate(11)
    attend([s], [1])


def test_list_pages(client):
    model = client.register_model(small_spec(name="listed"))
    opened = {client.open_session(model).id for _ in range(25)}
    other = client.open_session(client.register_model(small_spec(name="not listed")))
    assert {info.session_id for info in client.list_sessions(model, page_size=10)} == opened
    assert other.id in {info.session_id for info in client.list_sessions(page_size=7)}


def test_a_thousand_sessions(client, rng):
    """Opened and never closed (by their owner): the service goes on."""
    spec = small_spec()
    model = client.register_model(spec)
    ids = [client.open_session(model).id for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert client.status().n_sessions >= 1000
    s = Known(client, spec, rng)
    attend([s], [65])
    assert sum(1 for _ in client.list_sessions(model, page_size=1000)) == 1001
    for session_id in ids:
        client.close_session(session_id)


@pytest.mark.fovead
def test_one_session_too_many(own_service, rng):
    """At --sessions-max one more is refused, by open and by fork; the others go on, and a close makes room."""
    with own_service(options=["--sessions-max", "10"]).connect() as client:
        spec = small_spec()
        model = client.register_model(spec)
        sessions = [Known(client, spec, rng) for _ in range(10)]
        for refused in (lambda: client.open_session(model), sessions[0].session.fork):
            with pytest.raises(fovea.ResourceExhausted, match="10.*sessions_max"):
                refused()
        attend(sessions, [5] * 10)
        sessions[3].session.close()
        sessions[3] = Known(client, spec, rng)
        attend(sessions, [2] * 10)
        with pytest.raises(fovea.ResourceExhausted, match="10.*sessions_max"):
            client.open_session(model)
        assert client.status().n_sessions == 10


def test_sessions_outlive_their_client(service, client, rng):
    with service.connect() as first:
        s = Known(first, small_spec(), rng)
        attend([s], [20])
    s.client = client
    s.session = client.session(s.session.id)
    attend([s], [1])

"""test_attend.py - what Attend answers, against the fp64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

import fovea
import helpers
from helpers import WIRES, Known, attend, small_spec


@pytest.mark.parametrize(
    ("n_q_heads", "n_kv_heads", "dk", "dv"),
    [(4, 4, 16, 16), (8, 2, 64, 64), (6, 1, 40, 40), (4, 2, 192, 128), (2, 2, 24, 256), (9, 3, 64, 64)],
)
def test_head_shapes(client, rng, n_q_heads, n_kv_heads, dk, dv):
    """MHA, GQA, MQA; head_dim_v different from head_dim_qk; prefill, then decode."""
    spec = small_spec(n_q_heads=n_q_heads, n_kv_heads=n_kv_heads, head_dim_qk=dk, head_dim_v=dv)
    s = Known(client, spec, rng)
    attend([s], [70])
    for _ in range(3):
        attend([s], [1])
    assert s.session.info().layer_tokens == [73, 0]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kv_dtype", WIRES)
def test_dtypes(client, rng, wire, kv_dtype):
    """Every wire dtype with every cache dtype."""
    s = Known(client, small_spec(kv_dtype=kv_dtype), rng)
    for n in (65, 1, 1):
        result = attend([s], [n], wire=wire)
        assert result.out.shape == (n, 4, 32)
        assert result.lse.dtype == np.float32


def test_ml_dtypes_bfloat16(client, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    s = Known(client, small_spec(), rng)
    q, k, v = (a.astype(ml_dtypes.bfloat16) for a in s.fresh(3))
    out = client.attend(0, [(s.session, 0, 3)], q, k, v).out
    assert out.dtype == ml_dtypes.bfloat16
    s.remember(0, k.astype(np.float32), v.astype(np.float32))
    expected, _ = s.expect(0, q.astype(np.float32), 0)
    helpers.close(out.astype(np.float32), expected, "bf16")


@pytest.mark.parametrize("chunks", [[200], [64, 64, 72], [1] * 20, [63, 1, 1, 65, 70], [3, 128, 7]])
def test_chunked_prefill(client, rng, chunks):
    s = Known(client, small_spec(), rng)
    for n in chunks:
        attend([s], [n])


def test_split_does_not_matter(client, rng):
    """The last token's answer is the same however the context was appended."""
    spec = small_spec()
    whole, pieces = Known(client, spec, rng), Known(client, spec, rng)
    q, k, v = whole.fresh(130)
    all_at_once = client.attend(0, [(whole.session, 0, 130)], q, k, v)
    for begin, end in ((0, 1), (1, 64), (64, 129), (129, 130)):
        part = client.attend(
            0, [(pieces.session, begin, end - begin)], q[begin:end], k[begin:end], v[begin:end]
        )
        helpers.close(part.out, all_at_once.out[begin:end])


@pytest.mark.parametrize("causal", [True, False])
def test_query_only(client, rng, causal):
    """append=False reads what is stored, at any position, and changes nothing."""
    s = Known(client, small_spec(), rng)
    attend([s], [80])
    before = s.session.info().layer_tokens
    for n in (1, 5):
        attend([s], [n], append=False, causal=causal)
    q, _, _ = s.fresh(1)
    middle = client.attend(0, [(s.session, 40, 1)], q, append=False)
    expected, _ = s.expect(0, q, 40)
    helpers.close(middle.out, expected)
    assert s.session.info().layer_tokens == before


def test_not_causal_prefill(client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [70], causal=False)
    attend([s], [4], causal=False)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_softmax_scale(client, rng, scale):
    s = Known(client, small_spec(softmax_scale=scale), rng)
    attend([s], [66])


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_logit_softcap(client, rng, cap):
    s = Known(client, small_spec(logit_softcap=cap, softmax_scale=1.0), rng)
    attend([s], [66])
    attend([s], [1])


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (16, 0), (64, 4), (100, 1), (7, 70)])
def test_window_and_sinks(client, rng, window, sink):
    """Layer 0 has a window, layer 1 is dense."""
    policy = fovea.LayerPolicy(fovea.Window(window, sink), layers=[0])
    s = Known(client, small_spec(policies=[policy]), rng)
    for n in (150, 1, 3, 1):
        attend([s], [n], layer=0)
        attend([s], [n], layer=1)
    attend([s], [1], layer=0, append=False, causal=False)


def test_later_policy_wins(client, rng):
    policies = [
        fovea.LayerPolicy(fovea.Window(8)),
        fovea.LayerPolicy(fovea.Dense(), layers=[1]),
    ]
    s = Known(client, small_spec(policies=policies), rng)
    attend([s], [40], layer=0)
    attend([s], [40], layer=1)


def test_ragged_batch(client, rng):
    """Decode and prefill of sessions of very different length in one request."""
    spec = small_spec()
    known = [Known(client, spec, rng) for _ in range(6)]
    attend(known, [1, 64, 200, 3, 65, 127])
    attend(known, [1, 1, 1, 1, 1, 1])
    attend(known, [70, 1, 1, 2, 1, 33], wire="f16")
    attend(known[::-1], [1] * 6)


def test_batch_does_not_matter(client, rng):
    """A row's answer is the same alone and in company."""
    spec = small_spec()
    a, b = Known(client, spec, rng), Known(client, spec, rng)
    attend([a, b], [90, 40])
    q, _, _ = a.fresh(1)
    other, _, _ = b.fresh(1)
    alone = client.attend(0, [(a.session, 89, 1)], q, append=False)
    both = client.attend(
        0, [(a.session, 89, 1), (b.session, 39, 1)], np.concatenate([q, other]), append=False
    )
    helpers.close(both.out[:1], alone.out)


@pytest.mark.parametrize("mode", ["auto", "heads", "context"])
def test_sharding(client, rng, mode):
    """Every sharding gives the oracle's answers, contexts that leave ranks empty included."""
    sharding = fovea.Sharding(mode, shard_tokens=64)
    s = Known(client, small_spec(n_q_heads=6, n_kv_heads=3, sharding=sharding), rng)
    for n in (1, 62, 1, 1, 200, 5, 1):
        attend([s], [n])
    placement = s.session.placement()
    assert sum(share.n_tokens * (share.kv_head_end - share.kv_head_begin) for share in placement.shares) == (
        3 * s.length()
    )


def test_sharding_of_one_session(client, rng):
    """A session's own sharding overrides the model's; sessions of several placements share a request."""
    spec = small_spec(sharding=fovea.Sharding("heads"))
    known = [
        Known(client, spec, rng, sharding=fovea.Sharding(mode, shard_tokens=64))
        for mode in ("auto", "heads", "context")
    ]
    attend(known, [150, 150, 150])
    attend(known, [1, 1, 1])


def test_long_values_do_not_overflow(client, rng):
    """Logits of +-1e4: softmax is one token, lse is finite."""
    s = Known(client, small_spec(softmax_scale=1.0), rng)
    q, k, v = s.fresh(10)
    result = client.attend(0, [(s.session, 0, 10)], q * 100, k * 100, v, want_lse=True)
    s.remember(0, k * 100, v)
    expected, lse = s.expect(0, q * 100, 0)
    helpers.close(result.out, expected)
    np.testing.assert_allclose(result.lse, lse, rtol=1e-5)


def test_timings(client, rng):
    s = Known(client, small_spec(), rng)
    timings = attend([s], [64]).timings
    assert timings.total_us >= timings.compute_us > 0 or timings.total_us > 0


def test_random_traffic(client, rng):
    """A few hundred random requests over a few sessions: appends, queries, forks, truncations."""
    spec = small_spec(n_layers=3, kv_dtype="bf16")
    known = [Known(client, spec, rng) for _ in range(4)]
    for _ in range(150):
        action = rng.integers(10)
        one = known[rng.integers(len(known))]
        layer = int(rng.integers(3))
        if action == 0 and len(known) < 8:
            known.append(one.fork(int(rng.integers(one.length() + 1)) if one.length() else None))
        elif action == 1:
            one.truncate(int(rng.integers(max(one.length(i) for i in range(3)) + 1)))
        elif action == 2 and one.length(layer):
            attend([one], [1], layer, append=False)
        else:
            n = int(rng.integers(1, len(known) + 1))
            some = [known[i] for i in rng.permutation(len(known))[:n]]
            attend(some, [int(rng.choice([1, 1, 1, 2, 17, 64])) for _ in some], layer)

"""test_s2.py - S2 layers through the service: outputs, what is freed, what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import fovea

# the mock knows no S2; small models leave blocks that no head reads
pytestmark = [pytest.mark.fovead, pytest.mark.filterwarnings("ignore:S2 in")]

DK = 16


def mask(s2: fovea.S2, heads: tuple[int, int], n: int) -> np.ndarray:
    """[Hq, n, n]: does row p of a query head see token j? Straight from proto/attention.proto."""
    n_q, n_kv = heads
    out = np.zeros((n_q, n, n), bool)
    t = np.arange(n)[:, None] // s2.block_tokens
    b = np.arange(n)[None, :] // s2.block_tokens
    step = s2.head_sliding_step or max(1, s2.vert_stride // (1 if s2.homo_head else n_q))
    per_q = s2.pattern_per == "q_head"
    for q in range(n_q):
        h = 0 if s2.homo_head else (q if per_q else q * n_kv // n_q)
        strided = (b + h * step + s2.head_sliding_offset) % s2.vert_stride == 0
        dense = h >= (n_q if per_q else n_kv) - s2.num_dense_heads
        out[q] = (t - b < s2.local_blocks) | strided | dense
    return out & (np.arange(n)[None, :] <= np.arange(n)[:, None])


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    group = q.shape[1] // k.shape[1]
    out = np.empty(q.shape)
    for h in range(q.shape[1]):
        scores = q[:, h].astype(float) @ k[:, h // group].T.astype(float) / np.sqrt(DK)
        weights = np.exp(np.where(seen[h], scores, -np.inf))
        out[:, h] = weights @ v[:, h // group] / weights.sum(axis=1, keepdims=True)
    return out


def spec(policies: list[fovea.LayerPolicy], n_q: int = 4, n_kv: int = 2) -> fovea.ModelSpec:
    return fovea.ModelSpec("s2", 2, n_q, n_kv, DK, kv_dtype="f32", policies=policies)


def tensors(rng: np.random.Generator, n: int, n_q: int = 4, n_kv: int = 2) -> list[np.ndarray]:
    return [rng.standard_normal((n, h, DK), dtype=np.float32) for h in (n_q, n_kv, n_kv)]


def feed(client, session, layer: int, qkv: list[np.ndarray], sizes: list[int]) -> np.ndarray:
    out = []
    at = 0
    for n in sizes:
        part = [x[at : at + n] for x in qkv]
        out.append(client.attend(layer, [(session, at, n)], *part).out)
        at += n
    return np.concatenate(out)


PATTERNS = [
    fovea.S2(64, 2, 4),
    fovea.S2(16, 5, 3, head_sliding_offset=-2),
    fovea.S2(32, 1, 9, pattern_per="q_head", num_dense_heads=1),
    fovea.S2(128, 1, 5, head_sliding_step=3),
    fovea.S2(256, 1, 2, homo_head=True),
]


@pytest.mark.parametrize("s2", PATTERNS, ids=lambda s: f"{s.block_tokens}-{s.local_blocks}-{s.vert_stride}")
def test_equals_the_definition(client, rng, s2):
    """Layer 0 is S2, layer 1 dense; one chunk, odd chunks and single tokens give the same."""
    n = 1028
    model = client.register_model(spec([fovea.LayerPolicy(s2, layers=[0])]))
    qkv = tensors(rng, n)
    sparse = expected(*qkv, mask(s2, (4, 2), n))
    dense = expected(*qkv, np.tril(np.ones((4, n, n), bool)))
    for sizes in ([n], [300, 1, 1, 63, 64, 65, 500, 34], [1000] + [1] * 28):
        with client.open_session(model) as session:
            np.testing.assert_allclose(feed(client, session, 0, qkv, sizes), sparse, atol=2e-5)
            np.testing.assert_allclose(feed(client, session, 1, qkv, sizes), dense, atol=2e-5)


@pytest.mark.parametrize(("preset", "blocks"), [("phi3-small", 72), ("s2-8", 23)])
def test_what_is_kept(client, rng, preset, blocks):
    """At 8192 tokens, of 128 blocks: exactly what the definition keeps, for each KV head of each sparse layer.

    s2-8 has 8 local blocks and 15 of the 120 before them.
    """
    policy = fovea.LayerPolicy(fovea.S2(preset=preset), layers=[0])
    model = client.register_model(spec([policy], 32, 8))
    page = 64 * 2 * DK * 4
    with client.open_session(model) as session:
        qkv = tensors(rng, 8192, 32, 8)
        feed(client, session, 0, qkv, [2048] * 3 + [2047, 1])
        placement = client.placement(session)
        pattern = placement.patterns[0]
        assert pattern.kv_bytes == blocks * 8 * page
        assert pattern.freed_bytes == (128 - blocks) * 8 * page
        assert sum(s.kv_bytes for s in placement.shares) == pattern.kv_bytes
        assert sum(s.freed_bytes for s in placement.shares) == pattern.freed_bytes
        assert pattern.floor == 8191


def test_the_past_is_refused(client, rng):
    model = client.register_model(spec([fovea.LayerPolicy(fovea.S2(64, 1, 32), layers=[0])]))
    with client.open_session(model) as session:
        qkv = tensors(rng, 641)
        first = feed(client, session, 0, qkv, [128] * 5 + [1])
        again = client.attend(0, [(session, 640, 1)], *[x[640:] for x in qkv])  # a lost answer
        assert np.array_equal(again.out, first[640:])
        with pytest.raises(fovea.FailedPrecondition, match="position: given 500, expected 640"):
            client.truncate_session(session, 500)
        with pytest.raises(fovea.FailedPrecondition, match="at_position: given 500"):
            client.fork_session(session, 500)
        with pytest.raises(fovea.FailedPrecondition, match="from 640 on"):
            client.attend(0, [(session, 512, 128)], *[x[512:640] for x in qkv])
        with pytest.raises(fovea.InvalidArgument, match="causal: given false"):
            client.attend(0, [(session, 641, 1)], *[x[640:] for x in qkv], causal=False)
        client.truncate_session(session, 0)
        np.testing.assert_array_equal(feed(client, session, 0, qkv, [128] * 5 + [1]), first)


def test_warnings_and_presets(client):
    def register(s2: fovea.S2) -> str:
        return client.register_model(spec([fovea.LayerPolicy(s2, layers=[0])], 8, 8))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_numbers = register(fovea.S2(64, 8, 8))
        assert by_numbers == register(fovea.S2(preset="s2-8"))
    with pytest.warns(UserWarning, match="no head reads 8 of every 16 blocks"):
        register(fovea.S2(preset="s2-16"))
    with pytest.raises(fovea.InvalidArgument, match="expected phi3-small"):
        register(fovea.S2(preset="phi"))
    with pytest.raises(fovea.InvalidArgument, match="with other fields"):
        register(fovea.S2(64, preset="s2-8"))
    with pytest.raises(fovea.InvalidArgument, match="block_tokens: given 48"):
        register(fovea.S2(48, 1, 8))

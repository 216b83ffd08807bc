"""test_latent.py - LATENT models through the service, against MLA as defined and a softmax for each slice."""

from __future__ import annotations

import numpy as np
import pytest

import fovea
import helpers
import oracle
from fovea import mla

pytestmark = pytest.mark.fovead

LATENT, ROPE, HEADS = 128, 16, 8
SCALE = 0.11


def latent_spec(**changes) -> fovea.ModelSpec:
    fields = {
        "name": "latent",
        "n_layers": 2,
        "n_q_heads": HEADS,
        "kind": "latent",
        "latent_dim": LATENT,
        "rope_dim": ROPE,
        "kv_dtype": "f32",
        "softmax_scale": SCALE,
    }
    return fovea.ModelSpec(**{**fields, **changes})


def by_latent(groups: int, **sharding) -> fovea.Sharding:
    return fovea.Sharding("latent", groups=groups, **sharding)


class Latents:
    """A session of latents and a copy of what it holds."""

    def __init__(self, client, rng, spec: fovea.ModelSpec, session: fovea.Session | None = None) -> None:
        self.client, self.rng, self.spec = client, rng, spec
        self.session = session or client.open_session(client.register_model(spec))
        self.k = np.zeros((0, LATENT + ROPE), np.float32)

    def fresh(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        q = self.rng.standard_normal((n, self.spec.n_q_heads, LATENT + ROPE), np.float32)
        return q, self.rng.standard_normal((n, LATENT + ROPE), np.float32)

    def remember(self, k: np.ndarray, wire: str) -> None:
        stored = oracle.rounded(k, wire)
        norm = self.spec.latent_norm
        if norm is not None:
            groups = max(len(norm.alpha), 1)
            slices = stored[:, :LATENT].reshape(len(k), groups, -1)
            alpha = np.array(norm.alpha or [1.0])
            mean = (slices.astype(np.float64) ** 2).mean(axis=2)
            slices = slices / np.sqrt(alpha / groups * mean + norm.eps)[:, :, None]
            stored = np.concatenate([slices.reshape(len(k), -1), stored[:, LATENT:]], axis=1)
        self.k = np.concatenate([self.k, oracle.rounded(stored.astype(np.float32), self.spec.kv_dtype)])

    def expect(self, q: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Each slice for itself; one slice is MLA, and so are slices whose scores are added up."""
        sharding = self.spec.sharding or fovea.Sharding()
        groups = 1 if sharding.exact else (sharding.groups or 1)
        mu = sharding.mu or [1.0] * groups
        geometry = oracle.Geometry(self.spec.n_q_heads, 1, SCALE)
        out, lse = [], np.zeros(0)
        for g, part in enumerate(np.split(np.arange(LATENT), groups)):
            dims = np.concatenate([part, np.arange(LATENT, LATENT + ROPE)])
            q_slice = q[:, :, dims].astype(np.float64)
            q_slice[:, :, : len(part)] *= mu[g]
            k_slice = self.k[:, None, dims].astype(np.float64)
            o, lse = oracle.attention(q_slice, k_slice, k_slice[..., : len(part)], position, geometry)
            out.append(o)
        return np.concatenate(out, axis=2), lse

    def attend(self, n: int, wire: str = "f32", want_lse: bool = False) -> np.ndarray:
        q, k = self.fresh(n)
        position = len(self.k)
        result = self.client.attend(
            0,
            [(self.session, position, n)],
            helpers.to_dtype(q, wire),
            helpers.to_dtype(k, wire),
            want_lse=want_lse,
            dtype=wire,
        )
        self.remember(k, wire)
        out, lse = self.expect(oracle.rounded(q, wire), position)
        helpers.close(result.out, out, wire)
        if want_lse:
            np.testing.assert_allclose(result.lse, lse, rtol=1e-5, atol=2e-5)
        return result.out


def need_ranks(client, n: int) -> None:
    if len(client.status().ranks) < n:
        pytest.skip(f"needs {n} ranks")


@pytest.mark.parametrize("mode", ["auto", "context", "heads"])
@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_exact_shardings_are_mla(client, rng, mode, wire):
    s = Latents(client, rng, latent_spec(sharding=fovea.Sharding(mode, shard_tokens=64), kv_dtype=wire))
    for n in (1, 62, 1, 1, 200, 5, 1, 1):
        s.attend(n, wire, want_lse=True)
    placement = s.session.placement()
    assert not placement.approximate and placement.n_latent_parts == 1
    assert all((share.latent_begin, share.latent_end) == (0, LATENT) for share in placement.shares)
    n_ranks = len(client.status().ranks)
    if mode == "heads":  # the latent again on every rank
        assert [share.n_tokens for share in placement.shares] == [len(s.k)] * min(n_ranks, HEADS)
    else:
        assert sum(share.n_tokens for share in placement.shares) == len(s.k)


def test_real_dims(client, rng):
    """DeepSeek-V2-Lite's: 16 heads, 512 + 64, absorbed, against its expanded form in fp64."""
    layer = mla.fold_gamma(
        mla.from_deepseek(
            {
                "kv_a_proj_with_mqa.weight": rng.standard_normal((576, 64)) / 8,
                "kv_a_layernorm.weight": rng.uniform(0.5, 2, 512),
                "kv_b_proj.weight": rng.standard_normal((16 * 256, 512)) / 16,
            },
            16,
            128,
            128,
            512,
        )
    )
    scale = 192**-0.5
    spec = latent_spec(n_q_heads=16, latent_dim=512, rope_dim=64, softmax_scale=scale)
    session = client.open_session(client.register_model(spec))
    c = mla.rms_norm(rng.standard_normal((100, 64)) @ layer.w_dkv.T, 1e-6).astype(np.float32)
    k_pe = rng.standard_normal((100, 64), np.float32)
    q_nope = rng.standard_normal((100, 16, 128), np.float32)
    q_pe = rng.standard_normal((100, 16, 64), np.float32)
    q = mla.absorb_query(q_nope, q_pe, layer).astype(np.float32)
    result = client.attend(0, [(session, 0, 100)], q, mla.latent_key(c, k_pe))
    keys = np.concatenate(
        [np.einsum("nl,hdl->nhd", c, layer.w_uk), np.broadcast_to(k_pe[:, None], (100, 16, 64))], axis=2
    )
    values = np.einsum("nl,hdl->nhd", c, layer.w_uv)
    expected, _ = oracle.attention(
        np.concatenate([q_nope, q_pe], axis=2), keys, values, 0, oracle.Geometry(16, 16, scale)
    )
    helpers.close(mla.expand_output(result.out, layer), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_slices_are_a_softmax_each(client, rng, groups, wire):
    need_ranks(client, groups)
    spec = latent_spec(sharding=by_latent(groups, mu=[1.0, 1.25][:groups]), kv_dtype=wire)
    s = Latents(client, rng, spec)
    for n in (70, 1, 1, 9, 1):
        s.attend(n, wire)
    placement = s.session.placement()
    assert placement.approximate == (groups > 1) and placement.n_latent_parts == groups
    if groups == 2:
        assert placement.mode == "latent" and "approximation" in placement.reason
        assert "approximation" in fovea.format_placement(placement)
        assert [(p.latent_begin, p.latent_end) for p in placement.shares] == [(0, 64), (64, 128)]
        e = {"f32": 4, "bf16": 2}[wire]
        assert all(p.kv_bytes == 2 * 64 * (64 + ROPE) * e for p in placement.shares)


@pytest.mark.parametrize("exact", [False, True])
def test_tensor_parallel_client_asks_for_its_slice(client, rng, exact):
    """Each of two client ranks sends the same tokens and asks for a slice: appended once, joined they are the whole."""
    need_ranks(client, 2)
    spec = latent_spec(sharding=by_latent(2, exact=exact))
    s = Latents(client, rng, spec)
    for n in (70, 1, 3):
        q, k = s.fresh(n)
        position = len(s.k)
        parts = [
            client.attend(0, [(s.session, position, n)], q, k, only_slice=i, want_lse=True) for i in (2, 1)
        ][::-1]
        s.remember(k, "f32")
        whole = client.attend(0, [(s.session, position, n)], q, k)
        assert parts[0].out.shape == (n, HEADS, LATENT // 2)
        assert np.array_equal(np.concatenate([p.out for p in parts], axis=2), whole.out)
        expected, lse = s.expect(q, position)
        helpers.close(whole.out, expected, "f32")
        np.testing.assert_allclose(parts[1].lse, lse, rtol=1e-5, atol=2e-5)
    assert len(s.k) == s.session.info().layer_tokens[0]
    with pytest.raises(fovea.InvalidArgument, match="only_slice: given 3, expected 0..2"):
        client.attend(0, [(s.session, len(s.k), 1)], q[:1], k[:1], only_slice=3)


def test_fp8_cache_holds_656_bytes(client, rng):
    """M9: near MLA, as near as 3 bits of mantissa are; the cache's dtype is no wire dtype."""
    spec = latent_spec(latent_dim=512, rope_dim=64, kv_dtype="fp8_latent", softmax_scale=0.05)
    session = client.open_session(client.register_model(spec))
    q = rng.standard_normal((128, HEADS, 576), np.float32)
    k = rng.standard_normal((128, 576), np.float32)
    out = client.attend(0, [(session, 0, 128)], q, k).out
    expected, _ = oracle.attention(q, k[:, None], k[:, None, :512], 0, oracle.Geometry(HEADS, 1, 0.05))
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-3 < error < 0.05
    assert sum(share.kv_bytes for share in session.placement().shares) == 128 * 656
    with pytest.raises(ValueError, match="expected f32, f16 or bf16"):
        client.attend(0, [(session, 128, 1)], q[:1], k[:1], dtype="fp8_latent")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("wire", ["f32", "bf16"])
def test_exact_slices_are_mla(client, rng, groups, wire):
    """T11: scores are added up over the slices; one softmax, one lse."""
    need_ranks(client, groups)
    s = Latents(client, rng, latent_spec(sharding=by_latent(groups, exact=True), kv_dtype=wire))
    for n in (70, 1, 1, 9, 1):
        s.attend(n, wire, want_lse=True)
    placement = s.session.placement()
    assert not placement.approximate and placement.n_latent_parts == groups
    if groups > 1:
        assert placement.mode == "latent exact" and "scores added up" in placement.reason
        assert "approximation" not in fovea.format_placement(placement)


@pytest.mark.parametrize("exact", [False, True])
def test_context_is_cut_inside_a_slice(client, rng, exact):
    """T10 with context parts: 4 ranks in 2 groups equal 2 ranks in 2 groups."""
    need_ranks(client, 4)
    spec = latent_spec(sharding=by_latent(2, exact=exact))
    wide = fovea.Sharding("latent", groups=2, exact=exact, shard_tokens=64)
    model = client.register_model(spec)
    s = Latents(client, rng, spec, client.open_session(model, max_tokens_hint=4_000_000, sharding=wide))
    for n in (70, 1, 1, 100, 1):
        s.attend(n)
    placement = s.session.placement()
    assert placement.mode == f"latent {'exact ' if exact else ''}x context" and placement.n_ctx_parts == 2
    assert [p.latent_begin for p in placement.shares] == [0, 0, 64, 64]
    assert sum(p.n_tokens for p in placement.shares) == 2 * len(s.k)


def test_heads_split_inside_a_slice(client, rng):
    need_ranks(client, 4)
    s = Latents(client, rng, latent_spec(sharding=by_latent(2, max_ranks=4)))
    for n in (70, 1, 1):
        s.attend(n)
    assert [(p.latent_begin, p.q_head_begin) for p in s.session.placement().shares] == [
        (0, 0),
        (0, 4),
        (64, 0),
        (64, 4),
    ]


def test_slices_are_not_mla(client, rng):
    """Adversarial: the first slice's scores alone rank the tokens the other way round."""
    need_ranks(client, 2)
    shardings = fovea.Sharding("context"), by_latent(2), by_latent(2, exact=True)
    sessions = [Latents(client, rng, latent_spec(sharding=s)) for s in shardings]
    k = np.zeros((2, LATENT + ROPE), np.float32)
    k[0, 0], k[1, 64] = 8.0, 16.0  # token 0 wins slice 0, token 1 wins in all
    q = np.zeros((2, HEADS, LATENT + ROPE), np.float32)
    q[..., 0] = q[..., 64] = 10.0
    outs = []
    for s in sessions:
        outs.append(s.client.attend(0, [(s.session, 0, 2)], q, k).out)
        s.remember(k, "f32")
        helpers.close(outs[-1], s.expect(q, 0)[0])
    assert outs[0][1, 0, 0] < 0.01 and outs[1][1, 0, 0] > 7.9
    assert np.abs(outs[0] - outs[1]).max() > 7
    helpers.close(outs[2], outs[0])  # T4: slices whose scores are added up agree


def test_the_sum_over_slices_is_linear(client, rng):
    """W_O W_UV of the concatenated slices is the paper's all-reduced sum of each slice's own product."""
    need_ranks(client, 2)
    s = Latents(client, rng, latent_spec(sharding=by_latent(2)))
    out = s.attend(20)
    w_uv, w_o = rng.standard_normal((HEADS, 24, LATENT)), rng.standard_normal((40, HEADS * 24))
    layer = mla.MlaLayer(np.zeros((LATENT, 1)), np.ones(LATENT), w_uv, w_uv)
    whole = mla.expand_output(out, layer).reshape(20, -1) @ w_o.T
    parts = np.zeros_like(whole)
    for dims in (slice(0, 64), slice(64, 128)):
        o = np.einsum("thl,hdl->thd", out[:, :, dims], w_uv[:, :, dims])
        parts += o.reshape(20, -1) @ w_o.T
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_latents_normalised_by_slices(client, rng, groups):
    need_ranks(client, groups)
    alpha = [] if groups == 1 else [1 / 0.7, 1 / 0.3]
    sharding = fovea.Sharding() if groups == 1 else by_latent(2)
    s = Latents(client, rng, latent_spec(sharding=sharding, latent_norm=fovea.SliceRms(1e-6, alpha)))
    for n in (70, 1, 3, 1):
        s.attend(n)


def test_prefill_exact_then_decode_by_slices(client, rng):
    """D3: the prompt's outputs are MLA's; its latents, normalised whole, are what the slices then hold."""
    need_ranks(client, 2)
    exact, sliced = (
        Latents(client, rng, latent_spec(sharding=s)) for s in (fovea.Sharding("context"), by_latent(2))
    )
    q, k = exact.fresh(90)
    prompt = client.attend(0, [(exact.session, 0, 90)], q, k).out
    exact.remember(k, "f32")
    helpers.close(prompt, exact.expect(q, 0)[0])
    client.attend(0, [(sliced.session, 0, 90)], q, k)
    sliced.remember(k, "f32")
    for n in (1, 1, 1):
        sliced.attend(n)


def test_forks_truncation_and_retries(client, rng):
    s = Latents(client, rng, latent_spec(sharding=fovea.Sharding("context", shard_tokens=64)))
    s.attend(100)
    fork = Latents(client, rng, s.spec, s.session.fork(70))
    fork.k = s.k[:70]
    fork.attend(3)
    s.attend(2)
    s.session.truncate(40)
    s.k = s.k[:40]
    s.attend(1)
    q, k = s.fresh(1)
    items = [(s.session, 41, 1)]
    first = client.attend(0, items, q, k).out
    np.testing.assert_array_equal(client.attend(0, items, q, k).out, first)
    with pytest.raises(fovea.FailedPrecondition, match="differ"):
        client.attend(0, items, q, k + 1)
    assert s.session.info().layer_tokens == [42, 0]


def test_what_is_refused(client, rng):
    s = Latents(client, rng, latent_spec())
    q, k = s.fresh(2)
    with pytest.raises(fovea.InvalidArgument, match=r"v: given .* expected 0"):
        client.attend(0, [(s.session, 0, 2)], q, k[:, None], k[:, None, :LATENT])
    with pytest.raises(fovea.InvalidArgument, match="k: given"):
        client.attend(0, [(s.session, 0, 2)], q, k[:, :LATENT])
    for changes, text in (
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"latent_dim": 100}, "latent_dim: given 100"),
        ({"n_kv_heads": 2}, "n_kv_heads: given 2"),
        ({"sharding": by_latent(3)}, "groups: given 3"),
        ({"sharding": by_latent(2), "latent_norm": fovea.SliceRms(1e-6, [0.7, 0.3])}, "1 / "),
        ({"kind": "kv", "n_kv_heads": 1, "head_dim_qk": 64}, "latent_dim"),
    ):
        with pytest.raises(fovea.InvalidArgument, match=text):
            client.register_model(latent_spec(**changes))
    with pytest.raises(fovea.InvalidArgument, match="register a model of its own"):
        client.open_session(client.register_model(s.spec), sharding=by_latent(2))


def test_slices_need_ranks_and_have_no_lse(client, rng):
    model = client.register_model(latent_spec(latent_dim=256, sharding=by_latent(8)))
    if len(client.status().ranks) < 8:
        with pytest.raises(fovea.FailedPrecondition, match="groups: 8 given"):
            client.open_session(model)
    need_ranks(client, 2)
    s = Latents(client, rng, latent_spec(sharding=by_latent(2)))
    q, k = s.fresh(1)
    with pytest.raises(fovea.InvalidArgument, match="want_lse"):
        client.attend(0, [(s.session, 0, 1)], q, k, want_lse=True)
    s.attend(1)

"""test_mla.py - absorbing and re-parameterising change nothing: against attention by its plain definition."""

from __future__ import annotations

import numpy as np
import pytest

from fovea import mla

EPS = 1e-6


def random_layer(rng: np.random.Generator, hidden=48, latent=64, heads=4, nope=24, v=16) -> mla.MlaLayer:
    weights = {
        "kv_a_proj_with_mqa.weight": rng.standard_normal((latent + 16, hidden)) / np.sqrt(hidden),
        "kv_a_layernorm.weight": rng.uniform(0.5, 2.0, latent),
        "kv_b_proj.weight": rng.standard_normal((heads * (nope + v), latent)) / np.sqrt(latent),
    }
    return mla.from_deepseek(weights, heads, nope, v, latent)


def softmax(s: np.ndarray) -> np.ndarray:
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def expanded(layer: mla.MlaLayer, x, q_nope, q_pe, k_pe, scale) -> np.ndarray:
    """Every head's own keys and values, as MLA is defined."""
    c = mla.rms_norm(x @ layer.w_dkv.T, EPS) * layer.gamma
    keys = np.einsum("nl,hdl->nhd", c, layer.w_uk)
    values = np.einsum("nl,hdl->nhd", c, layer.w_uv)
    s = scale * (np.einsum("thd,nhd->thn", q_nope, keys) + np.einsum("thr,nr->thn", q_pe, k_pe))
    return np.einsum("thn,nhd->thd", softmax(s), values)


def absorbed(layer: mla.MlaLayer, x, q_nope, q_pe, k_pe, scale) -> np.ndarray:
    """As Fovea and its client do it."""
    k = mla.latent_key(mla.rms_norm(x @ layer.w_dkv.T, EPS) * layer.gamma, k_pe)
    q = mla.absorb_query(q_nope, q_pe, layer)
    p = softmax(scale * np.einsum("thd,nd->thn", q, k))
    return mla.expand_output(np.einsum("thn,nl->thl", p, k[:, : layer.w_uk.shape[2]]), layer)


@pytest.fixture
def problem(rng):
    layer = random_layer(rng)
    x = rng.standard_normal((30, layer.w_dkv.shape[1]))
    q_nope, q_pe = rng.standard_normal((3, 4, 24)), rng.standard_normal((3, 4, 16))
    return layer, x, q_nope, q_pe, rng.standard_normal((30, 16)), 0.2


def test_absorbed_equals_expanded(problem):
    np.testing.assert_allclose(absorbed(*problem), expanded(*problem), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hadamard", "pca", "random"])
def test_the_folded_model_is_the_same_model(rng, problem, kind):
    layer, *rest = problem
    n = layer.w_dkv.shape[0]
    u = {
        "hadamard": lambda: mla.hadamard(n, rng),
        "pca": lambda: mla.pca(rest[0] @ layer.w_dkv.T),
        "random": lambda: np.linalg.qr(rng.standard_normal((n, n)))[0],
    }[kind]()
    turned = mla.rotate(mla.fold_gamma(layer), u)
    assert np.abs(turned.w_dkv - layer.w_dkv).max() > 0.01
    np.testing.assert_allclose(absorbed(turned, *rest), expanded(layer, *rest), rtol=0, atol=1e-11)
    c = rest[0] @ layer.w_dkv.T
    np.testing.assert_allclose(mla.rms_norm(c, 0), mla.rms_norm(c @ u, 0) @ u.T, rtol=0, atol=1e-12)


def test_rotation_needs_gamma_folded_and_an_orthogonal_matrix(rng, problem):
    with pytest.raises(ValueError, match="gamma"):
        mla.rotate(problem[0], np.eye(64))
    with pytest.raises(ValueError, match="orthogonal"):
        mla.rotate(mla.fold_gamma(problem[0]), rng.standard_normal((64, 64)))


def test_hadamard_spreads_a_latent_evenly(rng):
    np.testing.assert_allclose(np.array([100.0, 0, 0, 0]) @ mla.hadamard(4), [50, 50, 50, 50])
    u = mla.hadamard(512, rng)
    np.testing.assert_allclose(u @ u.T, np.eye(512), atol=1e-12)
    np.testing.assert_allclose(mla.alpha_of(rng.standard_normal((400, 512)) @ u, 2), [2, 2], rtol=0.05)
    with pytest.raises(ValueError, match="power of two"):
        mla.hadamard(320)


def test_pca_puts_the_share_in_front(rng):
    c = (
        rng.standard_normal((500, 64))
        * np.arange(1, 65) ** -1.0
        @ np.linalg.qr(rng.standard_normal((64, 64)))[0]
    )
    alpha = mla.alpha_of(c @ mla.pca(c), 2)
    assert alpha[0] < 1.1 < 10 < alpha[1]
    assert sum(1 / a for a in alpha) == pytest.approx(1)


def test_alpha_restores_the_rms(rng):
    """Condition 1: sqrt(alpha / g) RMS(slice) is RMS(c), exactly where each latent has the shares of all."""
    c = np.repeat(rng.standard_normal((1, 64)), 8, axis=0) * np.arange(1, 9)[:, None]
    for groups in (2, 4):
        alpha = mla.alpha_of(c, groups)
        slices = c.reshape(8, groups, -1)
        local = np.sqrt((slices**2).mean(axis=2)) * np.sqrt(np.array(alpha) / groups)
        np.testing.assert_allclose(local, np.sqrt((c**2).mean(axis=1))[:, None] * np.ones(groups), rtol=1e-12)


def test_shapes_are_checked(rng):
    with pytest.raises(ValueError, match="kv_b_proj"):
        mla.from_deepseek(
            {"kv_a_proj_with_mqa.weight": np.zeros((80, 8)), "kv_b_proj.weight": np.zeros((10, 64))},
            4,
            24,
            16,
            64,
        )
    with pytest.raises(ValueError, match="divisor"):
        mla.alpha_of(np.ones((3, 64)), 3)
    with pytest.raises(ValueError, match="empty slice"):
        mla.alpha_of(np.pad(np.ones((3, 32)), ((0, 0), (0, 32))), 2)

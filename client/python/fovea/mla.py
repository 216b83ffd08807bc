"""mla.py - what a client of a LATENT model does with its weights: absorbing, and re-parameterising offline.

Multi-head latent attention keeps one latent c [L] and one RoPE key k_pe [R] a token for all heads. Head h's
key is W_UK[h] c (and k_pe), its value W_UV[h] c. Fovea attends in the latent space, so

    q  [T, H, L + R]   = absorb_query(q_nope, q_pe, layer)       q_nope W_UK, and q_pe
    k  [T, L + R]      = latent_key(c, k_pe)                     c normalised
    out [T, H, L]      from the service
    o  [T, H, dv]      = expand_output(out, layer)               W_UV out, then the model's W_O

Both maps are linear: of a model sharded by latent, the sum over slices of W_O W_UV[slice] out[slice] is the
same number.

Re-parameterisation (TPLA), exact: with gamma folded into W_UK and W_UV, RMSNorm(c) = RMSNorm(c U) U^T for any
orthogonal U, so U goes into the down projection and U^T into the up projections. A Hadamard U spreads every
latent's norm over the slices evenly, a PCA's gathers it in the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class MlaLayer:
    """The weights of one layer that the latent meets. Rows are outputs, as in checkpoints.

    w_dkv [L, hidden]: the latent's rows of the down projection; gamma [L]: of its RMSNorm;
    w_uk [H, dn, L], w_uv [H, dv, L]: the up projections, by head.
    """

    w_dkv: Floats
    gamma: Floats
    w_uk: Floats
    w_uv: Floats


def from_deepseek(
    weights: Mapping[str, Floats], n_heads: int, nope_dim: int, v_dim: int, latent_dim: int
) -> MlaLayer:
    """Of a layer's self_attn weights by the names that DeepSeek-V2/V3 checkpoints (and their kin) use."""
    w_kv_a = weights["kv_a_proj_with_mqa.weight"]
    w_kv_b = weights["kv_b_proj.weight"]
    expected = (n_heads * (nope_dim + v_dim), latent_dim)
    if w_kv_b.shape != expected:
        raise ValueError(f"kv_b_proj.weight: given shape {w_kv_b.shape}, expected {expected}")
    if w_kv_a.shape[0] < latent_dim:
        raise ValueError(
            f"kv_a_proj_with_mqa.weight: given {w_kv_a.shape[0]} rows, expected at least {latent_dim}"
        )
    by_head = w_kv_b.reshape(n_heads, nope_dim + v_dim, latent_dim)
    return MlaLayer(
        w_dkv=w_kv_a[:latent_dim],
        gamma=weights["kv_a_layernorm.weight"],
        w_uk=by_head[:, :nope_dim],
        w_uv=by_head[:, nope_dim:],
    )


def rms_norm(c: Floats, eps: float) -> Floats:
    """RMSNorm with gamma 1, of the last axis."""
    mean: Floats = np.mean(np.square(c, dtype=np.float64), axis=-1, keepdims=True)
    return np.asarray(c / np.sqrt(mean + eps), c.dtype)


def absorb_query(q_nope: Floats, q_pe: Floats, layer: MlaLayer) -> Floats:
    """q_nope [T, H, dn], q_pe [T, H, R] -> q [T, H, L + R]. gamma must be folded, or be in the latents."""
    return np.concatenate([np.einsum("thd,hdl->thl", q_nope, layer.w_uk), q_pe], axis=-1)


def latent_key(c: Floats, k_pe: Floats) -> Floats:
    """c [T, L] normalised, k_pe [T, R] with RoPE applied -> k [T, L + R]."""
    return np.concatenate([c, k_pe], axis=-1)


def expand_output(out: Floats, layer: MlaLayer) -> Floats:
    """out [T, H, L] -> o [T, H, dv]."""
    return np.asarray(np.einsum("thl,hdl->thd", out, layer.w_uv))


# ---------------------------------------------------------------------------- re-parameterisation


def fold_gamma(layer: MlaLayer) -> MlaLayer:
    """The same layer with gamma = 1: what c is multiplied by goes into the up projections."""
    return replace(
        layer,
        gamma=np.ones_like(layer.gamma),
        w_uk=layer.w_uk * layer.gamma,
        w_uv=layer.w_uv * layer.gamma,
    )


def rotate(layer: MlaLayer, u: Floats) -> MlaLayer:
    """The same layer whose latents are c U. U [L, L] orthogonal; only with gamma folded."""
    if not np.all(layer.gamma == 1):
        raise ValueError("gamma: given other values than 1, expected fold_gamma() first")
    n = layer.w_dkv.shape[0]
    if u.shape != (n, n) or not np.allclose(u @ u.T, np.eye(n), atol=1e-4):
        raise ValueError(f"u: given shape {u.shape}, expected an orthogonal [{n}, {n}]")
    return replace(layer, w_dkv=u.T @ layer.w_dkv, w_uk=layer.w_uk @ u, w_uv=layer.w_uv @ u)


def hadamard(n: int, rng: np.random.Generator | None = None) -> Floats:
    """An orthogonal [n, n] of +-1/sqrt(n), n a power of two; with `rng`, a random sign for each row."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"n: given {n}, expected a power of two")
    h: Floats = np.ones((1, 1))
    while h.shape[0] < n:
        h = np.block([[h, h], [h, -h]])
    if rng is not None:
        h = rng.choice([-1.0, 1.0], (n, 1)) * h
    return np.asarray(h / np.sqrt(n))


def pca(latents: Floats) -> Floats:
    """Of calibration latents [N, L]: the eigenvectors of their second moment, largest first, as columns."""
    c = latents.astype(np.float64)
    values, vectors = np.linalg.eigh(c.T @ c / len(c))
    return np.asarray(vectors[:, np.argsort(values)[::-1]])


def alpha_of(latents: Floats, groups: int) -> list[float]:
    """SliceRms.alpha of latents [N, L], rotated: the reciprocal of each slice's share of the squared norm."""
    if latents.shape[1] % groups:
        raise ValueError(f"groups: given {groups}, expected a divisor of {latents.shape[1]}")
    power = np.square(latents, dtype=np.float64).sum(axis=0).reshape(groups, -1).sum(axis=1)
    if not np.all(power > 0):
        raise ValueError("latents: given some with an empty slice, expected each slice to hold something")
    return [float(a) for a in power.sum() / power]

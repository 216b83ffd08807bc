"""oracle.py - attention in fp64, the plainest way: what every answer is compared with.

Inputs are the values as stored (rounded to the cache dtype) and q as received. The loops are over heads;
the visibility rule is proto/attention.proto's, written as a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import fovea

# of an answer, by wire dtype, relative to the largest |out|: rounding of the output, and fp32 accumulation
TOLERANCE = {"f32": 2e-5, "f16": 1e-3, "bf16": 8e-3}


@dataclass(frozen=True)
class Geometry:
    n_q_heads: int
    n_kv_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0  # 0 = dense
    sink: int = 0


def visible(positions: np.ndarray, kv_end: int, g: Geometry, causal: bool) -> np.ndarray:
    """[T, kv_end] bool: which token each query row sees."""
    p = positions[:, None]
    j = np.arange(kv_end)[None, :]
    mask = np.ones((len(positions), kv_end), bool)
    if causal:
        mask &= j <= p
    if g.window:
        mask &= (np.abs(p - j) < g.window) | (j < g.sink)
    return mask


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, g: Geometry, causal: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """q [T, Hq, dk] at positions position.., k [N, Hkv, dk], v [N, Hkv, dv] -> out [T, Hq, dv], lse [T, Hq].

    A row that sees nothing: out 0, lse -inf. A NaN spoils its own row only.
    """
    n_tokens, n_q_heads = q.shape[:2]
    group = n_q_heads // k.shape[1]
    out = np.zeros((n_tokens, n_q_heads, v.shape[2]))
    lse = np.full((n_tokens, n_q_heads), -np.inf)
    mask = visible(position + np.arange(n_tokens), k.shape[0], g, causal)
    seen = mask.any(axis=1)
    if k.shape[0] == 0:
        return out, lse
    for h in range(n_q_heads):
        keys, values = k[:, h // group].astype(np.float64), v[:, h // group].astype(np.float64)
        with np.errstate(invalid="ignore"):
            scores = q[:, h].astype(np.float64) @ keys.T * g.scale
            if g.softcap:
                scores = g.softcap * np.tanh(scores / g.softcap)
            scores = np.where(mask, scores, -np.inf)
            top = np.where(seen, scores.max(axis=1, initial=-np.inf), 0.0)
            weights = np.where(mask, np.exp(scores - top[:, None]), 0.0)
            total = weights.sum(axis=1)
            if np.isfinite(values).all():
                rows = weights @ values
            else:  # only tokens that are seen may contribute: a NaN times zero is NaN
                rows = np.stack([weights[t, mask[t]] @ values[mask[t]] for t in range(n_tokens)])
            out[seen, h] = rows[seen] / total[seen, None]
            lse[seen, h] = top[seen] + np.log(total[seen])
    return out, lse


def geometry(spec: fovea.ModelSpec, layer: int = 0) -> Geometry:
    """The oracle's view of one layer of a ModelSpec."""
    window = sink = 0
    for entry in spec.policies:
        if not entry.layers or layer in entry.layers:
            is_window = isinstance(entry.policy, fovea.Window)
            window = entry.policy.window_tokens if is_window else 0
            sink = entry.policy.sink_tokens if is_window else 0
    return Geometry(
        spec.n_q_heads,
        spec.n_kv_heads,
        spec.softmax_scale or 1.0 / math.sqrt(spec.head_dim_qk),
        spec.logit_softcap,
        window,
        sink,
    )


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as the cache (or the wire) of `dtype` holds them."""
    if dtype == "bf16":
        return fovea.from_bf16(fovea.to_bf16(array))
    return array.astype(np.float16).astype(np.float32) if dtype == "f16" else array

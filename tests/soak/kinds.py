"""kinds.py - the kinds of models that the soak uses, each with what a right answer of it is, in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import fovea
import numpy as np

DIM = 32


@dataclass(frozen=True)
class Kind:
    spec: fovea.ModelSpec
    shardings: tuple[fovea.Sharding | None, ...]
    is_shared: bool = True  # truncations and forks anywhere: nothing is freed

    @property
    def n_kv_heads(self) -> int:
        return 1 if self.spec.kind == "latent" else self.spec.n_kv_heads

    @property
    def dim_qk(self) -> int:
        return (
            self.spec.latent_dim + self.spec.rope_dim if self.spec.kind == "latent" else self.spec.head_dim_qk
        )

    @property
    def scale(self) -> float:
        return self.spec.softmax_scale or 1.0 / math.sqrt(self.dim_qk)

    @property
    def tolerance(self) -> float:
        return 2e-5  # requests are fp32, whatever the cache holds: the reference reads what is stored


BY_CONTEXT = fovea.Sharding("context", shard_tokens=64)
ANY = (None, BY_CONTEXT, fovea.Sharding("heads"))
WINDOW = fovea.Window(window_tokens=100, sink_tokens=4)
S2 = fovea.S2(block_tokens=16, local_blocks=2, vert_stride=4, head_sliding_step=1)

KINDS = (
    Kind(fovea.ModelSpec("soak-dense", 2, 6, 3, DIM, kv_dtype="f32"), ANY),
    Kind(fovea.ModelSpec("soak-bf16", 2, 4, 1, DIM, kv_dtype="bf16"), ANY),
    Kind(
        fovea.ModelSpec("soak-window", 2, 4, 2, DIM, kv_dtype="f32", policies=[fovea.LayerPolicy(WINDOW)]),
        ANY, is_shared=False,
    ),
    Kind(
        fovea.ModelSpec("soak-s2", 2, 4, 4, DIM, kv_dtype="f32", policies=[fovea.LayerPolicy(S2)]),
        ANY, is_shared=False,
    ),
    Kind(
        fovea.ModelSpec("soak-latent", 2, 4, kind="latent", latent_dim=64, rope_dim=16, kv_dtype="f32",
                        softmax_scale=0.1),
        (None, BY_CONTEXT),
    ),
)  # fmt: skip


def stored(kind: Kind, array: np.ndarray) -> np.ndarray:
    """float32 values as the cache holds them."""
    return fovea.from_bf16(fovea.to_bf16(array)) if kind.spec.kv_dtype == "bf16" else array


def visible(kind: Kind, head: int, positions: np.ndarray, n: int) -> np.ndarray:
    """[T, n] bool: which of n tokens a query head sees from these positions (proto/attention.proto)."""
    p, j = positions[:, None], np.arange(n)[None, :]
    mask = j <= p
    policy = kind.spec.policies[0].policy if kind.spec.policies else None
    if isinstance(policy, fovea.Window):
        mask &= (p - j < policy.window_tokens) | (j < policy.sink_tokens)
    elif isinstance(policy, fovea.S2):
        t, b = p // policy.block_tokens, j // policy.block_tokens
        kv_head = head * kind.n_kv_heads // kind.spec.n_q_heads
        strided = (b + kv_head * policy.head_sliding_step) % policy.vert_stride == 0
        mask &= (t - b < policy.local_blocks) | strided
    return mask


def answer(kind: Kind, q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int) -> np.ndarray:
    """q [T, Hq, dk] from `position` on; k [n, Hkv, dk], v [n, Hkv, dv] as stored -> out [T, Hq, dv]."""
    out = np.empty((*q.shape[:2], v.shape[2]))
    positions = position + np.arange(len(q))
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        scores = q[:, head].astype(float) @ k[:, kv_head].T.astype(float) * kind.scale
        scores[~visible(kind, head, positions, len(k))] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ v[:, kv_head] / weights.sum(axis=1, keepdims=True)
    return out

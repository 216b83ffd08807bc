"""llama.py - the Llama architecture in numpy, all of it but the attention.

Shapes: T tokens of a step, D d_model, Hq/Hkv query/KV heads, d head_dim.
"""

from __future__ import annotations

import numpy as np

from fovea.demo.attention import Attention
from fovea.demo.weights import F32, Weights


class Llama:
    """Stateless: the state of a sequence is the attention's. Thread: any, at once."""

    def __init__(self, weights: Weights) -> None:
        self._w = weights
        c = weights.config
        self._frequencies = c.rope_base ** (-np.arange(0, c.head_dim, 2) / c.head_dim)

    def logits(self, tokens: list[int], position: int, attention: Attention) -> F32:
        """Runs T tokens that stand at `position`..; the logits [n_vocab] after the last."""
        c = self._w.config
        x = self._w.embedding[tokens]
        rope = self._rope(position, len(tokens))
        for i, layer in enumerate(self._w.layers):
            h = _rms_norm(x, layer.attn_norm, c.rms_eps)
            heads = _linear(h, layer.qkv).reshape(len(tokens), -1, c.head_dim)
            n_rotated = c.n_q_heads + c.n_kv_heads
            rotated = _rotate(heads[:, :n_rotated], rope)
            out = attention.attend(
                i, position, rotated[:, : c.n_q_heads], rotated[:, c.n_q_heads :], heads[:, n_rotated:]
            )
            x = x + _linear(out.reshape(len(tokens), -1), layer.attn_out)
            h = _rms_norm(x, layer.ffn_norm, c.rms_eps)
            gate, up = np.split(_linear(h, layer.gate_up), 2, axis=1)
            x = x + _linear(_silu(gate) * up, layer.down)
        last = _rms_norm(x[-1:], self._w.output_norm, c.rms_eps)
        logits: F32 = _linear(last, self._w.output)[0]
        return logits

    def _rope(self, position: int, n: int) -> tuple[F32, F32]:
        """cos and sin [T, 1, d/2], computed in fp64."""
        angles = (position + np.arange(n))[:, None, None] * self._frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _linear(x: F32, w: F32) -> F32:
    """x [T, I] with w [O, I] -> [T, O]. A single row takes the matrix-vector path, twice as quick here."""
    y: F32 = (w @ x[0])[None] if len(x) == 1 else x @ w.T
    return y


def _rms_norm(x: F32, weight: F32, eps: float) -> F32:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: F32 = x * (weight / np.sqrt(mean_square + np.float32(eps)))
    return y


def _rotate(x: F32, rope: tuple[F32, F32]) -> F32:
    """RoPE. GGUF files of this architecture have their rows permuted so that pairs are neighbours."""
    cos, sin = rope
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def _silu(x: F32) -> F32:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        y: F32 = x / (1 + np.exp(-x))
    return y

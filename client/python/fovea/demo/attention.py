"""attention.py - who keeps the KV cache and computes the attention: Fovea, or numpy right here.

Both have the same three methods, so that the model does not know which it has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

import fovea
from fovea.demo.weights import F32, Config


@dataclass
class AttentionTimes:
    """Sums over calls. `client_s` is what the model waited; the rest is what the service measured."""

    n_calls: int = 0
    client_s: float = 0.0
    server_us: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("queue", "compute", "exchange", "total"), 0)
    )


class Attention(Protocol):
    times: AttentionTimes

    def attend(self, layer: int, position: int, q: F32, k: F32, v: F32) -> F32:
        """Appends k, v [T, Hkv, d] at `position` and returns the attention [T, Hq, d] of q [T, Hq, d]."""

    def close(self) -> None: ...


class FoveaAttention:
    """One session of the service is the whole KV cache; one request per layer and step, on one stream."""

    def __init__(self, client: fovea.Client, model_id: str, max_tokens_hint: int) -> None:
        self.times = AttentionTimes()
        self.session = client.open_session(model_id, max_tokens_hint)
        self._stream = client.stream()

    def attend(self, layer: int, position: int, q: F32, k: F32, v: F32) -> F32:
        began = time.perf_counter()
        result = self._stream.submit(layer, [(self.session, position, len(q))], q, k, v).result()
        self.times.client_s += time.perf_counter() - began
        self.times.n_calls += 1
        for part in self.times.server_us:
            self.times.server_us[part] += getattr(result.timings, f"{part}_us")
        return result.out

    def close(self) -> None:
        self._stream.close()
        self.session.close()


class LocalAttention:
    """The same in numpy, float32: what --check compares with."""

    def __init__(self, config: Config, max_tokens: int) -> None:
        shape = config.n_layers, config.n_kv_heads, max_tokens, config.head_dim
        self.times = AttentionTimes()
        self._k = np.zeros(shape, np.float32)
        self._v = np.zeros(shape, np.float32)

    def attend(self, layer: int, position: int, q: F32, k: F32, v: F32) -> F32:
        began = time.perf_counter()
        n, end = len(q), position + len(q)
        self._k[layer, :, position:end] = k.swapaxes(0, 1)
        self._v[layer, :, position:end] = v.swapaxes(0, 1)
        keys, values = self._k[layer, :, :end], self._v[layer, :, :end]
        n_kv_heads, head_dim = keys.shape[0], keys.shape[2]
        # query heads of one KV head are neighbours: [Hkv, G * T, d]
        rows = q.reshape(n, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3).reshape(n_kv_heads, -1, head_dim)
        scores = rows @ keys.swapaxes(1, 2) * np.float32(head_dim**-0.5)
        if n > 1:
            future = np.arange(end)[None, :] > position + np.arange(n)[:, None]
            scores.reshape(n_kv_heads, -1, n, end)[:, :, future] = -np.inf
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        out: F32 = (scores @ values) / scores.sum(axis=2, keepdims=True)
        out = out.reshape(n_kv_heads, -1, n, head_dim).transpose(2, 0, 1, 3).reshape(q.shape)
        self.times.client_s += time.perf_counter() - began
        self.times.n_calls += 1
        return out

    def close(self) -> None:
        pass

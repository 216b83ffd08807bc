"""helpers.py - sessions whose contents the test knows: every answer can be compared with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fovea
import oracle

WIRES = ("f32", "f16", "bf16")


def small_spec(**changes: Any) -> fovea.ModelSpec:
    fields = {
        "name": "small",
        "n_layers": 2,
        "n_q_heads": 4,
        "n_kv_heads": 2,
        "head_dim_qk": 32,
        "kv_dtype": "f32",
    }
    return fovea.ModelSpec(**{**fields, **changes})


def to_dtype(array: np.ndarray, wire: str) -> np.ndarray:
    """float32 as an array that is sent as `wire`."""
    if wire == "bf16":
        return fovea.to_bf16(array)
    return array.astype({"f32": np.float32, "f16": np.float16}[wire])


def from_dtype(array: np.ndarray) -> np.ndarray:
    return fovea.from_bf16(array) if array.dtype == np.uint16 else array.astype(np.float32)


class Known:
    """A session and a copy of what it holds."""

    def __init__(
        self, client: fovea.Client, spec: fovea.ModelSpec, rng: np.random.Generator, **open_args: Any
    ) -> None:
        self.client, self.spec, self.rng = client, spec, rng
        self.session = client.open_session(client.register_model(spec), **open_args)
        dv = spec.head_dim_v or spec.head_dim_qk
        self.k = [np.zeros((0, spec.n_kv_heads, spec.head_dim_qk), np.float32)] * spec.n_layers
        self.v = [np.zeros((0, spec.n_kv_heads, dv), np.float32)] * spec.n_layers

    def length(self, layer: int = 0) -> int:
        return len(self.k[layer])

    def fresh(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random q, k, v of n tokens, float32."""
        s = self.spec
        dv = s.head_dim_v or s.head_dim_qk
        shapes = (s.n_q_heads, s.head_dim_qk), (s.n_kv_heads, s.head_dim_qk), (s.n_kv_heads, dv)
        q, k, v = (self.rng.standard_normal((n, *shape), np.float32) for shape in shapes)
        return q, k, v

    def remember(self, layer: int, k: np.ndarray, v: np.ndarray, wire: str = "f32") -> None:
        """k and v (as sent, in float32) are in the session now, as the cache rounds them."""
        for store, new in ((self.k, k), (self.v, v)):
            stored = oracle.rounded(oracle.rounded(new, wire), self.spec.kv_dtype)
            store[layer] = np.concatenate([store[layer], stored])

    def truncate(self, position: int) -> None:
        self.session.truncate(position)
        self.k = [k[:position] for k in self.k]
        self.v = [v[:position] for v in self.v]

    def fork(self, at: int | None = None) -> Known:
        other = object.__new__(Known)
        other.client, other.spec, other.rng = self.client, self.spec, self.rng
        other.session = self.session.fork(at)
        other.k, other.v = [k[:at] for k in self.k], [v[:at] for v in self.v]
        return other

    def expect(
        self, layer: int, q: np.ndarray, position: int, kv_end: int | None = None, causal: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        return oracle.attention(
            q,
            self.k[layer][:kv_end],
            self.v[layer][:kv_end],
            position,
            oracle.geometry(self.spec, layer),
            causal,
        )


Send = Callable[..., fovea.AttendResult]


def attend(
    known: Sequence[Known],
    counts: Sequence[int],
    layer: int = 0,
    *,
    wire: str = "f32",
    causal: bool = True,
    append: bool = True,
    want_lse: bool = True,
    send: Send | None = None,
) -> fovea.AttendResult:
    """One request with counts[i] new tokens of known[i]; its answer is compared with the oracle's."""
    positions = [s.length(layer) for s in known]
    if not append:
        positions = [p - min(p, n) for p, n in zip(positions, counts, strict=True)]
    parts = [s.fresh(n) for s, n in zip(known, counts, strict=True)]
    items = [fovea.Item(s.session.id, p, n) for s, p, n in zip(known, positions, counts, strict=True)]
    q, k, v = (to_dtype(np.concatenate(each), wire) for each in zip(*parts, strict=True))
    result = (send or known[0].client.attend)(
        layer,
        items,
        q,
        k if append else None,
        v if append else None,
        causal=causal,
        append=append,
        want_lse=want_lse,
        dtype=wire,
    )
    if append:
        for s, (_, new_k, new_v) in zip(known, parts, strict=True):
            s.remember(layer, new_k, new_v, wire)
    begin = 0
    for s, position, n, (new_q, _, _) in zip(known, positions, counts, parts, strict=True):
        out, lse = s.expect(layer, oracle.rounded(new_q, wire), position, None, causal)
        rows = slice(begin, begin + n)
        close(result.out[rows], out, wire)
        if want_lse:
            np.testing.assert_allclose(result.lse[rows], lse, rtol=1e-5, atol=2e-5)
        begin += n
    return result


def close(given: np.ndarray, expected: np.ndarray, wire: str = "f32") -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(from_dtype(given), expected, rtol=0, atol=oracle.TOLERANCE[wire] * scale)

"""attend.py - one Attend request and its reply: numpy <-> messages.

The tensors are the last fields of both messages, so a request is a small protobuf head and then the
arrays' own bytes: they are copied once, into the message that goes to gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fovea._pb import attention_pb2 as pb
from fovea.dtypes import Array, from_wire, little_endian, to_wire, wire_dtype_of
from fovea.errors import Internal, from_status

_WIRETYPE_BYTES = 2
_TAG_Q = bytes([14 << 3 | _WIRETYPE_BYTES])
_TAG_K = bytes([15 << 3 | _WIRETYPE_BYTES])
_TAG_V = bytes([0x82, 0x01])  # (16 << 3 | 2) as a varint


class Item(NamedTuple):
    """The query (and new K/V) tokens of one session inside a request."""

    session_id: str
    position: int  # of the first token
    n_tokens: int  # 1 = decode; more = prefill or multi-token verification


@dataclass(frozen=True)
class Timings:
    """Microseconds, measured by the service."""

    queue_us: int
    compute_us: int
    exchange_us: int
    total_us: int


@dataclass(frozen=True)
class AttendResult:
    """out [T, Hq, dv] in the request's dtype; lse [T, Hq] float32 natural log, or None. Read-only."""

    out: Array
    lse: Array | None
    timings: Timings


@dataclass(frozen=True)
class AttendCall:
    """A request ready to be sent, and what is needed to read its reply."""

    payload: bytes
    request_id: int
    n_tokens: int
    n_q_heads: int
    dtype: np.dtype[Any]


def encode(
    request_id: int,
    layer: int,
    items: Sequence[Item],
    q: Array,
    k: Array | None,
    v: Array | None,
    *,
    causal: bool,
    want_lse: bool,
    append: bool,
    dtype: str | None,
    only_slice: int = 0,
) -> AttendCall:
    """Checks the arrays' form (what only the service knows, it checks itself) and serializes."""
    tensors = {"q": q, "k": k, "v": v}
    if append and (k is None or (v is None and not _is_latent(k))):
        raise ValueError("k, v: needed unless append=False (latents: k alone)")
    if k is not None and v is None and k.ndim == 2:
        k = tensors["k"] = k[:, None]
    if not append and not (k is None and v is None):
        raise ValueError("k, v: must be None with append=False")
    n_tokens = sum(item.n_tokens for item in items)
    for name, array in tensors.items():
        if array is None:
            continue
        if array.ndim != 3 or array.shape[0] != n_tokens:
            raise ValueError(
                f"{name}: given shape {array.shape}, expected [{n_tokens}, heads, head_dim] "
                f"for {n_tokens} tokens in items"
            )
        if array.dtype != q.dtype:
            raise TypeError(f"{name}: given {array.dtype}, expected {q.dtype} like q")
    head = pb.AttendRequest(
        request_id=request_id,
        layer=layer,
        items=[pb.AttendItem(session_id=i[0], position=i[1], n_tokens=i[2]) for i in items],
        dtype=wire_dtype_of(q, dtype),
        want_lse=want_lse,
        only_slice=only_slice,
    )
    if not causal:  # absent = true, for both
        head.causal = False
    if not append:
        head.append = False
    pieces: list[bytes | memoryview] = [head.SerializeToString()]
    for tag, array in ((_TAG_Q, q), (_TAG_K, k), (_TAG_V, v)):
        if array is not None:
            view = to_wire(array)
            pieces += [tag, _varint(view.nbytes), view]
    return AttendCall(b"".join(pieces), request_id, n_tokens, q.shape[1], little_endian(q.dtype))


def _is_latent(k: Array) -> bool:
    """k [T, latent_dim + rope_dim], for all heads: its first dims are v."""
    return k.ndim == 2 or (k.ndim == 3 and k.shape[1] == 1)


def decode(call: AttendCall, reply: pb.AttendResponse) -> AttendResult:
    """Raises the exception of a failed request."""
    if reply.HasField("status") and reply.status.code != 0:
        raise from_status(reply.status.code, reply.status.message)
    rows = call.n_tokens, call.n_q_heads
    try:
        out = from_wire(reply.out, call.dtype, *rows, -1)
        lse_bytes = reply.lse
        lse = from_wire(lse_bytes, np.dtype("<f4"), *rows) if lse_bytes else None
    except ValueError as error:
        raise Internal(f"the reply's size does not fit {rows} rows: {error}") from None
    t = reply.timings
    return AttendResult(out, lse, Timings(t.queue_us, t.compute_us, t.exchange_us, t.total_us))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

"""test_client_unit.py - the client's own parts, without a service."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

import fovea
from fovea import attend, dtypes, errors
from fovea._pb import attention_pb2 as pb

ITEMS = [fovea.Item("ab" * 16, 5, 2), fovea.Item("cd" * 16, 0, 1)]


def arrays(dtype=np.float32):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((3, heads, 16)).astype(dtype) for heads in (4, 2, 2)]


def encode(q, k, v, **options):
    defaults = {"causal": True, "want_lse": False, "append": True, "dtype": None}
    return attend.encode(9, 1, ITEMS, q, k, v, **{**defaults, **options})


def test_hand_written_tags_are_protobuf():
    """The tensors appended by hand are what protobuf itself would have written."""
    q, k, v = arrays()
    read = pb.AttendRequest.FromString(encode(q, k, v, want_lse=True, causal=False).payload)
    assert (read.request_id, read.layer, read.dtype) == (9, 1, pb.DTYPE_F32)
    assert [(i.session_id, i.position, i.n_tokens) for i in read.items] == [tuple(i) for i in ITEMS]
    assert (read.q, read.k, read.v) == (q.tobytes(), k.tobytes(), v.tobytes())
    assert read.HasField("causal") and not read.causal
    assert not read.HasField("append")
    assert read.want_lse


def test_arrays_of_any_layout():
    """Not contiguous, or big-endian: the same bytes."""
    q, k, v = arrays()
    plain = encode(q, k, v).payload
    assert encode(*(np.asfortranarray(a) for a in (q, k, v))).payload == plain
    assert encode(*(a.astype(">f4") for a in (q, k, v))).payload == plain
    wide = [np.repeat(a, 2, axis=2)[:, :, ::2] for a in (q, k, v)]
    assert encode(*wide).payload == plain


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda q, k, v: (q[:2], k, v), "q"),
        (lambda q, k, v: (q, k[:, 0], v), "k"),
        (lambda q, k, v: (q, k, v.astype(np.float16)), "v"),
        (lambda q, k, v: (q, None, v), "k, v"),
        (lambda q, k, v: (q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)), "dtype"),
        (lambda q, k, v: tuple(a.astype(np.uint16) for a in (q, k, v)), "bf16"),
    ],
)
def test_arrays_that_can_not_be_sent(change, error):
    with pytest.raises((ValueError, TypeError), match=error):
        encode(*change(*arrays()))


def test_latents_are_k_alone():
    """[T, dim] or [T, 1, dim], the same bytes; K of several heads is no latent."""
    q, k, _ = arrays()
    assert encode(q, k[:, 0], None).payload == encode(q, k[:, :1], None).payload
    with pytest.raises(ValueError, match="k, v"):
        encode(q, k, None)


def test_query_only_takes_no_kv():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="append=False"):
        encode(q, k, v, append=False)
    read = pb.AttendRequest.FromString(encode(q, None, None, append=False).payload)
    assert read.HasField("append") and not read.append
    assert not read.k and not read.v


def test_bf16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, 3e38, np.inf, -np.inf, 1e-40], np.float32)
    back = fovea.from_bf16(fovea.to_bf16(values))
    # 1 + 1/256 lies half way: to even, down to 1; 1 + 3/256: up to 1 + 4/256
    np.testing.assert_array_equal(back[:3], np.array([1.0, 1.0, 1.015625], np.float32))
    assert np.signbit(back[3]) and back[3] == 0
    assert np.isinf(back[5]) and np.isinf(back[6])
    assert np.isnan(fovea.from_bf16(fovea.to_bf16(np.array([np.nan], np.float32))))[0]


def test_bf16_like_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(2).integers(0, 1 << 32, 20000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(fovea.to_bf16(values), expected)


@pytest.mark.parametrize(
    ("name", "wire"), [("f32", pb.DTYPE_F32), ("float16", pb.DTYPE_F16), ("bfloat16", pb.DTYPE_BF16)]
)
def test_dtype_names(name, wire):
    assert dtypes.wire_dtype(name) == wire


def test_unknown_dtype():
    with pytest.raises(ValueError, match="f64"):
        dtypes.wire_dtype("f64")


def test_reply_of_the_wrong_size():
    call = encode(*arrays())
    reply = pb.AttendResponse(request_id=9, out=b"\0" * 47)
    with pytest.raises(fovea.Internal, match="size"):
        attend.decode(call, reply)


def test_reply_with_a_status():
    call = encode(*arrays())
    reply = pb.AttendResponse(status=pb.Status(code=8, message="needed 5 bytes, free 3"))
    with pytest.raises(fovea.ResourceExhausted, match="needed 5") as error:
        attend.decode(call, reply)
    assert error.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.message == "needed 5 bytes, free 3"


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_every_code_is_an_exception(code):
    error = errors.from_status(code.value[0], "text")
    assert isinstance(error, fovea.FoveaError)
    assert error.code == code


def test_spec_to_message():
    spec = fovea.ModelSpec(
        "m", 4, 8, 2, 64, 32, "f16", 0.5, 30.0,
        [fovea.LayerPolicy(fovea.Window(100, 4), [1, 3]), fovea.LayerPolicy(fovea.Dense(), [3])],
        fovea.Sharding("context", 128, 2),
    ).to_pb()  # fmt: skip
    assert (spec.n_layers, spec.n_q_heads, spec.n_kv_heads) == (4, 8, 2)
    assert (spec.head_dim_qk, spec.head_dim_v, spec.kv_dtype) == (64, 32, pb.DTYPE_F16)
    assert list(spec.policies[0].layers) == [1, 3]
    assert spec.policies[0].window.window_tokens == 100
    assert spec.policies[1].WhichOneof("policy") == "dense"
    assert (spec.sharding.mode, spec.sharding.shard_tokens) == (pb.Sharding.CONTEXT, 128)
    assert not fovea.ModelSpec("m", 1, 1, 1, 16).to_pb().HasField("sharding")


def test_unknown_sharding():
    with pytest.raises(ValueError, match="diagonal"):
        fovea.Sharding("diagonal").to_pb()


def test_placement_as_text():
    placement = pb.Placement(session_id="s", mode="context", n_tokens=128, reason="because")
    for rank in range(2):
        tokens = [pb.TokenRange(begin=64 * rank, end=64 * (rank + 1))]
        placement.shares.add(
            rank=rank, kv_head_end=2, q_head_end=8, ranges=tokens, n_tokens=64, kv_bytes=3 << 20
        )
    text = fovea.format_placement(placement)
    assert "because" in text and "3 MiB" in text
    first, second = (line for line in text.splitlines() if "rank" in line)
    assert "|" + "#" * 16 + "." * 16 + "|" in first
    assert "|" + "." * 16 + "#" * 16 + "|" in second

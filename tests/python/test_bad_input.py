"""test_bad_input.py - what must be refused is refused by name; the service goes on; nothing changes."""

from __future__ import annotations

import os
import random

import grpc
import numpy as np
import pytest

import conftest
import fovea
import helpers
from fovea._pb import attention_pb2 as pb
from helpers import Known, attend, small_spec

# the service says INVALID_ARGUMENT; grpcio's server, in front of the mock, says INTERNAL by itself
UNREADABLE = {grpc.StatusCode.INVALID_ARGUMENT}
if "FOVEAD" not in os.environ:
    UNREADABLE.add(grpc.StatusCode.INTERNAL)


@pytest.fixture
def raw(service):
    """call(method, bytes) -> bytes, past the client's own checks."""
    with grpc.insecure_channel(service.address) as channel:

        def call(method: str, payload: bytes, timeout: float = 20) -> bytes:
            name = "Cluster" if method in ("GetStatus", "GetPlacement", "Drain") else "Attention"
            return channel.unary_unary(f"/fovea.v1.{name}/{method}")(payload, timeout=timeout)

        yield call


@pytest.fixture
def known(client, rng):
    """A session with 10 tokens; afterwards it must still hold just these, and work."""
    s = Known(client, small_spec(), rng)
    attend([s], [10])
    yield s
    assert list(s.session.info().layer_tokens) == [10, 0]
    attend([s], [2])


def good_request(s: Known, n: int = 2) -> pb.AttendRequest:
    q, k, v = s.fresh(n)
    return pb.AttendRequest(
        request_id=7,
        layer=0,
        items=[pb.AttendItem(session_id=s.session.id, position=10, n_tokens=n)],
        dtype=pb.DTYPE_F32,
        q=q.tobytes(),
        k=k.tobytes(),
        v=v.tobytes(),
    )


def refused(raw, request: pb.AttendRequest | bytes, *texts: str) -> grpc.StatusCode:
    payload = request if isinstance(request, bytes) else request.SerializeToString()
    with pytest.raises(grpc.RpcError) as error:
        raw("AttendOnce", payload)
    for text in texts:
        assert text in error.value.details()
    return error.value.code()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("change", ["empty", "short", "long", "half"])
def test_sizes_that_do_not_match(raw, known, name, change):
    request = good_request(known)
    data = getattr(request, name)
    changed = {"empty": b"", "short": data[:-1], "long": data + b"\0", "half": data[: len(data) // 2]}
    setattr(request, name, changed[change])
    code = refused(raw, request, name, str(len(changed[change])), str(len(data)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layer": 2}, "layer"),
        ({"layer": 0xFFFFFFFF}, "layer"),
        ({"dtype": 0}, "dtype"),
        ({"dtype": 77}, "dtype"),
        ({"dtype": pb.DTYPE_F16}, "q"),
        ({"append": False}, "k"),
    ],
)
def test_fields(raw, known, changes, text):
    request = good_request(known)
    for name, value in changes.items():
        setattr(request, name, value)
    assert refused(raw, request, text) == grpc.StatusCode.INVALID_ARGUMENT


def test_no_items(raw, known):
    request = good_request(known)
    del request.items[:]
    assert refused(raw, request, "items") == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("n_tokens", [0, 1, 3, 0xFFFFFFFF])
def test_token_counts(raw, known, n_tokens):
    request = good_request(known)
    request.items[0].n_tokens = n_tokens
    assert refused(raw, request) == grpc.StatusCode.INVALID_ARGUMENT


def test_token_counts_that_add_up_past_32_bits(raw, known):
    request = good_request(known)
    for i in range(3):
        request.items.add(session_id=f"{i:032x}", position=0, n_tokens=0xFFFFFFFF)
    assert refused(raw, request) in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("position", [11, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_positions_out_of_order(raw, known, position):
    request = good_request(known)
    request.items[0].position = position
    assert refused(raw, request) in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT)


def test_duplicate_items(raw, known):
    request = good_request(known, 1)
    request.items.add().CopyFrom(request.items[0])
    for name in ("q", "k", "v"):
        setattr(request, name, getattr(request, name) * 2)
    assert refused(raw, request, "items") == grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_session(raw, known):
    request = good_request(known)
    request.items[0].session_id = "0123456789abcdef" * 2
    assert refused(raw, request, "0123456789abcdef") == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("session_id", ["", "short", "z" * 32, "0" * 1000])
def test_malformed_session(raw, known, session_id):
    request = good_request(known)
    request.items[0].session_id = session_id
    assert refused(raw, request, "session_id") == grpc.StatusCode.INVALID_ARGUMENT


def test_sessions_of_two_models(raw, client, rng, known):
    other = Known(client, small_spec(name="other", head_dim_qk=64), rng)
    request = good_request(known, 1)
    request.items.add(session_id=other.session.id, position=0, n_tokens=1)
    assert refused(raw, request) == grpc.StatusCode.INVALID_ARGUMENT


def test_too_many_items(raw, known):
    request = good_request(known)
    for i in range(5000):
        request.items.add(session_id=f"{i:032x}", n_tokens=1)
    assert refused(raw, request) in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_truncated_protobuf(raw, known):
    """Every prefix of a good message, except the few that are themselves good messages, is refused."""
    payload = good_request(known, 1).SerializeToString()
    for end in {*range(0, 80), *range(80, len(payload), 97)}:
        assert refused(raw, payload[:end]) in UNREADABLE


def test_random_bytes(raw, known):
    source = random.Random(conftest.SEED)
    methods = ("AttendOnce", "RegisterModel", "OpenSession", "ForkSession", "CloseSession", "GetPlacement")
    for method in methods:
        for size in (1, 2, 7, 100, 5000):
            for _ in range(5):
                with pytest.raises(grpc.RpcError) as error:
                    raw(method, source.randbytes(size))
                assert error.value.code() in UNREADABLE | {grpc.StatusCode.NOT_FOUND}


def test_mutated_messages(raw, known):
    """A good message with bytes changed, added, removed: refused, or (by luck) still a good one."""
    source = random.Random(conftest.SEED)
    request = good_request(known, 1)
    request.append = False
    request.k = request.v = b""
    good = bytearray(request.SerializeToString())
    answered = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(min(len(bad), 90))
            kind = source.randrange(3)
            if kind == 0:
                bad[at] = source.randrange(256)
            elif kind == 1:
                bad.insert(at, source.randrange(256))
            else:
                del bad[at]
        try:
            raw("AttendOnce", bytes(bad))
            answered += 1
        except grpc.RpcError as error:
            assert error.code() != grpc.StatusCode.UNAVAILABLE, error.details()
    assert answered < 300


def test_unknown_fields_are_skipped(raw, known):
    """A newer client's fields do not hurt, wherever they stand."""
    request = good_request(known, 1)
    request.append = False
    request.k = request.v = b""
    payload = request.SerializeToString()
    extra = bytes([0xA2, 0x06, 3]) + b"abc"  # field 100, three bytes
    number = bytes([0xA8, 0x06, 0xFF, 0x01])  # field 101, varint
    plain = pb.AttendResponse.FromString(raw("AttendOnce", payload))
    for changed in (extra + payload, payload + extra + number):
        reply = pb.AttendResponse.FromString(raw("AttendOnce", changed))
        assert reply.out == plain.out


@pytest.mark.fovead
def test_message_over_the_limit(raw, known):
    """Too big to be received at all: RESOURCE_EXHAUSTED, and the connection is still good."""
    request = good_request(known)
    request.q = bytes(300 << 20)
    code = refused(raw, request)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_unknown_method(service):
    with grpc.insecure_channel(service.address) as channel:
        for path in ("/fovea.v1.Attention/Nothing", "/nobody.Here/Call"):
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(path)(b"", timeout=10)
            assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_inf_spoil_their_own_rows_only(client, rng, poison, where):
    """Served, with IEEE's result for the rows that read the poisoned value; every other row is exact."""
    a, b = Known(client, small_spec(), rng), Known(client, small_spec(), rng)
    attend([a, b], [70, 70])
    q, k, v = (np.concatenate(each) for each in zip(a.fresh(3), b.fresh(3), strict=True))
    tensors = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
    tensors[where][1, 0, 5] = poison  # the second of a's three tokens, its first head
    result = client.attend(0, [(a.session, 70, 3), (b.session, 70, 3)], **tensors)
    a.remember(0, k[:3], v[:3])
    b.remember(0, k[3:], v[3:])
    clean = np.concatenate([a.expect(0, q[:3], 70)[0], b.expect(0, q[3:], 70)[0]])
    spoiled = np.zeros(clean.shape[:2], bool)
    if where == "q":
        spoiled[1, 0] = True
    else:
        spoiled[1:3, :2] = True  # KV head 0 serves query heads 0 and 1, from its position on
    helpers.close(result.out[~spoiled], clean[~spoiled])
    if where == "v":
        assert not np.isfinite(result.out[spoiled][:, 5]).any()
    elif np.isnan(poison):
        assert np.isnan(result.out[spoiled]).all()


def test_poisoned_tokens_can_be_truncated_away(client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [70])
    q, k, v = s.fresh(1)
    k[:] = np.nan
    assert np.isnan(client.attend(0, [(s.session, 70, 1)], q, k, v).out).all()
    s.session.truncate(70)
    attend([s], [1])


def test_the_stream_goes_on_after_a_refusal(client, rng):
    s = Known(client, small_spec(), rng)
    with client.stream() as stream:
        q, k, v = s.fresh(2)
        good = stream.submit(0, [(s.session, 0, 1)], q[:1], k[:1], v[:1])
        bad = [
            stream.submit(9, [(s.session, 0, 1)], q[:1], k[:1], v[:1]),
            stream.submit(0, [("0" * 32, 0, 1)], q[:1], k[:1], v[:1]),
            stream.submit(0, [(s.session, 50, 1)], q[:1], k[:1], v[:1]),
        ]
        after = stream.submit(0, [(s.session, 1, 1)], q[1:], k[1:], v[1:])
        assert isinstance(bad[0].exception(20), fovea.InvalidArgument)
        assert isinstance(bad[1].exception(20), fovea.NotFound)
        assert isinstance(bad[2].exception(20), fovea.OutOfRange)
        outs = np.concatenate([good.result(20).out, after.result(20).out])
    s.remember(0, k, v)
    helpers.close(outs, s.expect(0, q, 0)[0])


def test_random_bytes_on_a_stream(service, client, known):
    """They may cost the stream, never the service."""
    source = random.Random(conftest.SEED)
    with grpc.insecure_channel(service.address) as channel:
        for _ in range(10):
            junk = [source.randbytes(source.randint(1, 300)) for _ in range(5)]
            replies = channel.stream_stream("/fovea.v1.Attention/Attend")(iter(junk), timeout=20)
            try:
                for reply in replies:
                    assert pb.AttendResponse.FromString(reply).status.code != 0
            except grpc.RpcError as error:
                assert error.code() != grpc.StatusCode.DEADLINE_EXCEEDED

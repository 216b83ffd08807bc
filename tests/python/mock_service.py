"""mock_service.py - the semantics of proto/attention.proto in numpy.

A model of the service for tests of the client, and the shortest full description of what the service does:
sessions, exactly-once append, refusals that change nothing, a bounded KV pool. It is slow and has no
ranks; numerics are the oracle's. mock_server.py puts gRPC in front of it.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from dataclasses import dataclass, field

import grpc
import numpy as np

import fovea
import oracle
from fovea._pb import attention_pb2 as pb

PAGE_TOKENS = 64
CODE = grpc.StatusCode
DTYPE_NAMES = {pb.DTYPE_F32: "f32", pb.DTYPE_F16: "f16", pb.DTYPE_BF16: "bf16"}
DTYPE_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def invalid(field_name: str, given: object, expected: object) -> Refused:
    return Refused(CODE.INVALID_ARGUMENT, f"{field_name}: given {given}, expected {expected}")


def decode_tensor(data: bytes, dtype: str, *shape: int) -> np.ndarray:
    """Wire bytes as float32."""
    raw = np.frombuffer(data, {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[dtype]).reshape(shape)
    return fovea.from_bf16(raw) if dtype == "bf16" else raw.astype(np.float32)


def encode_tensor(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bf16":
        return fovea.to_bf16(values).tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"f32": "<f4", "f16": "<f2"}[dtype]).tobytes()


@dataclass
class Append:
    n_tokens: int
    digest: bytes  # of the K and V bytes as received


@dataclass
class Layer:
    k: np.ndarray  # [N, Hkv, dk] as stored, in float32
    v: np.ndarray  # [N, Hkv, dv]
    appends: dict[int, Append] = field(default_factory=dict)  # by position

    def cut(self, position: int) -> Layer:
        kept = {p: a for p, a in self.appends.items() if p + a.n_tokens <= position}
        return Layer(self.k[:position].copy(), self.v[:position].copy(), kept)


@dataclass
class Model:
    id: str
    spec: pb.ModelSpec

    @property
    def dk(self) -> int:
        return self.spec.head_dim_qk

    @property
    def dv(self) -> int:
        return self.spec.head_dim_v or self.spec.head_dim_qk

    def geometry(self, layer: int) -> oracle.Geometry:
        s = self.spec
        window = sink = 0
        for entry in s.policies:  # a later entry wins
            if not entry.layers or layer in entry.layers:
                is_window = entry.WhichOneof("policy") == "window"
                window = entry.window.window_tokens if is_window else 0
                sink = entry.window.sink_tokens if is_window else 0
        scale = s.softmax_scale or self.dk**-0.5
        return oracle.Geometry(s.n_q_heads, s.n_kv_heads, scale, s.logit_softcap, window, sink)

    def bytes_of(self, n_tokens: int) -> int:
        """KV bytes of one layer with n_tokens, in whole pages."""
        pages = -(-n_tokens // PAGE_TOKENS)
        token = (self.dk + self.dv) * DTYPE_BYTES[DTYPE_NAMES[self.spec.kv_dtype]]
        return pages * PAGE_TOKENS * token * self.spec.n_kv_heads


@dataclass
class Session:
    id: str
    model: Model
    layers: list[Layer]
    created_unix_ms: int
    parent: str = ""

    def info(self) -> pb.SessionInfo:
        lengths = [len(layer.k) for layer in self.layers]
        return pb.SessionInfo(
            session_id=self.id,
            model_id=self.model.id,
            layer_tokens=lengths,
            max_tokens=max(lengths),
            kv_bytes=sum(self.model.bytes_of(n) for n in lengths),
            created_unix_ms=self.created_unix_ms,
            parent_session_id=self.parent,
        )


class Service:
    """One method per RPC. A refused request raises Refused and has changed nothing."""

    def __init__(self, kv_bytes: int = 1 << 30) -> None:
        self.kv_bytes_total = kv_bytes
        self.models: dict[str, Model] = {}
        self.sessions: dict[str, Session] = {}
        self.lock = threading.Lock()
        self.started = time.monotonic()
        self.n_done = self.n_failed = self.n_appended = 0
        self.draining = False

    # ---------------------------------------------------------------- models, sessions

    def RegisterModel(self, request: pb.RegisterModelRequest) -> pb.RegisterModelResponse:
        spec = request.spec
        for name, value, low, high in (
            ("n_layers", spec.n_layers, 1, 1024),
            ("n_q_heads", spec.n_q_heads, 1, 1024),
            ("n_kv_heads", spec.n_kv_heads, 1, 1024),
            ("head_dim_qk", spec.head_dim_qk, 16, 256),
            ("head_dim_v", spec.head_dim_v or spec.head_dim_qk, 16, 256),
        ):
            if not low <= value <= high:
                raise invalid(name, value, f"{low}..{high}")
            if name.startswith("head_dim") and value % 8:
                raise invalid(name, value, "a multiple of 8")
        if not 1 <= len(spec.name.encode()) <= 63:
            raise invalid("name", f"{len(spec.name)} bytes", "1..63 bytes")
        if spec.n_q_heads % spec.n_kv_heads or spec.n_q_heads // spec.n_kv_heads > 128:
            raise invalid("n_q_heads", spec.n_q_heads, f"a multiple of n_kv_heads {spec.n_kv_heads}")
        if spec.kv_dtype not in DTYPE_NAMES:
            raise invalid("kv_dtype", spec.kv_dtype, "F32, F16 or BF16")
        digest = hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()[:16]
        model_id = f"{spec.name}-{digest}"
        self.models[model_id] = Model(model_id, spec)
        return pb.RegisterModelResponse(model_id=model_id)

    def OpenSession(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        if self.draining:
            raise Refused(CODE.UNAVAILABLE, "the service is draining")
        model = self.models.get(request.model_id)
        if model is None:
            raise Refused(CODE.NOT_FOUND, f'model_id: no model "{request.model_id}"')
        heads = model.spec.n_kv_heads
        empty = [
            Layer(np.empty((0, heads, model.dk), np.float32), np.empty((0, heads, model.dv), np.float32))
            for _ in range(model.spec.n_layers)
        ]
        return pb.OpenSessionResponse(session_id=self._add(model, empty).id)

    def ForkSession(self, request: pb.ForkSessionRequest) -> pb.ForkSessionResponse:
        parent = self._find(request.session_id)
        length = parent.info().max_tokens
        at = request.at_position if request.HasField("at_position") else length
        if at > length:
            raise Refused(CODE.OUT_OF_RANGE, f"at_position: given {at}, the session has {length} tokens")
        child = self._add(parent.model, [layer.cut(at) for layer in parent.layers], parent.id)
        return pb.ForkSessionResponse(session_id=child.id)

    def TruncateSession(self, request: pb.TruncateSessionRequest) -> pb.TruncateSessionResponse:
        session = self._find(request.session_id)
        length = session.info().max_tokens
        if request.position > length:
            raise Refused(
                CODE.OUT_OF_RANGE, f"position: given {request.position}, the session has {length} tokens"
            )
        session.layers = [layer.cut(request.position) for layer in session.layers]
        return pb.TruncateSessionResponse()

    def CloseSession(self, request: pb.CloseSessionRequest) -> pb.CloseSessionResponse:
        del self.sessions[self._find(request.session_id).id]
        return pb.CloseSessionResponse()

    def GetSession(self, request: pb.GetSessionRequest) -> pb.SessionInfo:
        return self._find(request.session_id).info()

    def ListSessions(self, request: pb.ListSessionsRequest) -> pb.ListSessionsResponse:
        rows = [s for s in self.sessions.values() if request.model_id in ("", s.model.id)]
        begin = int(request.page_token or 0)
        end = begin + min(request.page_size or 100, 1000)
        return pb.ListSessionsResponse(
            sessions=[s.info() for s in rows[begin:end]],
            next_page_token=str(end) if end < len(rows) else "",
            n_total=len(rows),
        )

    # ---------------------------------------------------------------- attention

    def AttendOnce(self, request: pb.AttendRequest) -> pb.AttendResponse:
        began = time.monotonic()
        try:
            reply = self._attend(request)
        except Refused:
            self.n_failed += 1
            raise
        self.n_done += 1
        spent = int((time.monotonic() - began) * 1e6)
        reply.timings.CopyFrom(pb.Timings(compute_us=spent, total_us=spent))
        return reply

    def _attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        """Every check first, then every append, then the answers."""
        append = request.append if request.HasField("append") else True
        causal = request.causal if request.HasField("causal") else True
        dtype = DTYPE_NAMES.get(request.dtype)
        if dtype is None:
            raise invalid("dtype", request.dtype, "F32, F16 or BF16")
        sessions = self._check_items(request)
        model = sessions[0].model
        counts = [item.n_tokens for item in request.items]
        tensors = self._check_tensors(request, model, sum(counts), append, dtype)
        bounds = np.cumsum([0, *counts])
        spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        parts = list(zip(request.items, sessions, spans, strict=True))
        if append:
            fresh = [part for part in parts if self._is_new(request, *part, tensors)]
            self._check_room(request.layer, fresh)
            for item, session, span in fresh:
                self._append(request, item, session, span, tensors)
        outs, lses = [], []
        for item, session, span in parts:
            layer = session.layers[request.layer]
            kv_end = item.position + item.n_tokens if append else len(layer.k)
            out, lse = oracle.attention(
                tensors[0][span],
                layer.k[:kv_end],
                layer.v[:kv_end],
                item.position,
                model.geometry(request.layer),
                causal,
            )
            outs.append(out)
            lses.append(lse)
        reply = pb.AttendResponse(
            request_id=request.request_id, out=encode_tensor(np.concatenate(outs), dtype)
        )
        if request.want_lse:
            reply.lse = np.concatenate(lses).astype("<f4").tobytes()
        return reply

    def _check_items(self, request: pb.AttendRequest) -> list[Session]:
        if not request.items:
            raise invalid("items", 0, "at least 1")
        for i, item in enumerate(request.items):
            if item.n_tokens == 0:
                raise invalid(f"items[{i}].n_tokens", 0, "at least 1")
        sessions = [self._find(item.session_id) for item in request.items]
        if len({s.id for s in sessions}) < len(sessions):
            raise invalid("items", f"session {_repeated(request)} twice", "each session once")
        if len({s.model.id for s in sessions}) > 1:
            raise invalid("items", "sessions of several models", "sessions of one model")
        n_layers = sessions[0].model.spec.n_layers
        if request.layer >= n_layers:
            raise invalid("layer", request.layer, f"0..{n_layers - 1}")
        for item, session in zip(request.items, sessions, strict=True):
            length = len(session.layers[request.layer].k)
            if item.position > length:
                raise Refused(
                    CODE.OUT_OF_RANGE,
                    f"items.position: given {item.position}, committed length {length}",
                )
        return sessions

    def _check_tensors(
        self, request: pb.AttendRequest, model: Model, n_tokens: int, append: bool, dtype: str
    ) -> list[np.ndarray]:
        s = model.spec
        shapes = {
            "q": (n_tokens, s.n_q_heads, model.dk),
            "k": (n_tokens if append else 0, s.n_kv_heads, model.dk),
            "v": (n_tokens if append else 0, s.n_kv_heads, model.dv),
        }
        for name, shape in shapes.items():
            expected = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
            given = len(getattr(request, name))
            if given != expected:
                raise invalid(name, f"{given} bytes", f"{expected} bytes, [{shape}] {dtype}")
        return [decode_tensor(getattr(request, n), dtype, *shape) for n, shape in shapes.items()]

    @staticmethod
    def _digest(request: pb.AttendRequest, span: slice, n_total: int) -> bytes:
        k_token, v_token = len(request.k) // n_total, len(request.v) // n_total
        k = request.k[span.start * k_token : span.stop * k_token]
        v = request.v[span.start * v_token : span.stop * v_token]
        return hashlib.sha256(k + v).digest()

    def _is_new(
        self,
        request: pb.AttendRequest,
        item: pb.AttendItem,
        session: Session,
        span: slice,
        tensors: list[np.ndarray],
    ) -> bool:
        """False: this append was acknowledged before, nothing is to be done."""
        layer = session.layers[request.layer]
        if item.position == len(layer.k):
            return True
        known = layer.appends.get(item.position)
        digest = self._digest(request, span, len(tensors[0]))
        if known is None or known.n_tokens != item.n_tokens or known.digest != digest:
            raise Refused(
                CODE.FAILED_PRECONDITION,
                f"items.position: given {item.position} with other K or V than were appended there; "
                f"committed length {len(layer.k)}: truncate first",
            )
        return False

    def _check_room(self, layer: int, fresh: list[tuple[pb.AttendItem, Session, slice]]) -> None:
        needed = 0
        for item, session, _ in fresh:
            length = len(session.layers[layer].k)
            needed += session.model.bytes_of(length + item.n_tokens) - session.model.bytes_of(length)
        free = self.kv_bytes_total - self._used()
        if needed > free:
            raise Refused(CODE.RESOURCE_EXHAUSTED, f"KV memory: needed {needed} bytes, free {free} bytes")

    def _append(
        self,
        request: pb.AttendRequest,
        item: pb.AttendItem,
        session: Session,
        span: slice,
        tensors: list[np.ndarray],
    ) -> None:
        layer = session.layers[request.layer]
        kv_dtype = DTYPE_NAMES[session.model.spec.kv_dtype]
        with np.errstate(over="ignore"):
            layer.k = np.concatenate([layer.k, oracle.rounded(tensors[1][span], kv_dtype)])
            layer.v = np.concatenate([layer.v, oracle.rounded(tensors[2][span], kv_dtype)])
        digest = self._digest(request, span, len(tensors[0]))
        layer.appends[item.position] = Append(item.n_tokens, digest)
        self.n_appended += item.n_tokens

    # ---------------------------------------------------------------- cluster

    def GetStatus(self, _: pb.GetStatusRequest) -> pb.ClusterStatus:
        free = self.kv_bytes_total - self._used()
        return pb.ClusterStatus(
            version="mock",
            state="draining" if self.draining else "serving",
            uptime_ms=int((time.monotonic() - self.started) * 1000),
            ranks=[
                pb.RankStatus(
                    rank=0,
                    backend="cpu",
                    device="numpy",
                    state="ready",
                    kv_bytes_total=self.kv_bytes_total,
                    kv_bytes_free=free,
                )
            ],
            n_models=len(self.models),
            n_sessions=len(self.sessions),
            n_requests_done=self.n_done,
            n_requests_failed=self.n_failed,
            n_tokens_appended=self.n_appended,
            kv_bytes_total=self.kv_bytes_total,
            kv_bytes_free=free,
            exchange="none",
        )

    def GetPlacement(self, request: pb.GetPlacementRequest) -> pb.Placement:
        session = self._find(request.session_id)
        info, spec = session.info(), session.model.spec
        share = pb.PlacementShare(
            kv_head_end=spec.n_kv_heads,
            q_head_end=spec.n_q_heads,
            ranges=[pb.TokenRange(begin=0, end=info.max_tokens)] if info.max_tokens else [],
            n_tokens=info.max_tokens,
            kv_bytes=info.kv_bytes,
        )
        return pb.Placement(
            session_id=session.id,
            model_id=session.model.id,
            mode="one rank",
            n_head_parts=1,
            n_ctx_parts=1,
            shares=[share],
            reason="there is only one",
            n_tokens=info.max_tokens,
        )

    def Drain(self, _: pb.DrainRequest) -> pb.DrainResponse:
        self.draining = True
        return pb.DrainResponse(n_sessions=len(self.sessions))

    # ---------------------------------------------------------------- inside

    def _add(self, model: Model, layers: list[Layer], parent: str = "") -> Session:
        session = Session(secrets.token_hex(16), model, layers, int(time.time() * 1000), parent)
        self.sessions[session.id] = session
        return session

    def _find(self, session_id: str) -> Session:
        if len(session_id) != 32 or any(c not in "0123456789abcdef" for c in session_id):
            raise invalid("session_id", repr(session_id), "32 hex digits")
        if session_id not in self.sessions:
            raise Refused(CODE.NOT_FOUND, f"session_id: no session {session_id}")
        return self.sessions[session_id]

    def _used(self) -> int:
        return sum(s.info().kv_bytes for s in self.sessions.values())


def _repeated(request: pb.AttendRequest) -> str:
    ids = [item.session_id for item in request.items]
    return next(each for each in ids if ids.count(each) > 1)

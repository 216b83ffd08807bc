"""client.py - a connection to the service: models, sessions, blocking attention, cluster."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grpc

from fovea import attend as attend_message
from fovea._pb import attention_pb2 as pb
from fovea.attend import AttendResult, Item
from fovea.dtypes import Array
from fovea.errors import Cancelled, FoveaError, NotFound, Unavailable, from_rpc
from fovea.model import ModelSpec, Sharding
from fovea.retry import Retry
from fovea.rpc import Rpc
from fovea.session import Session, SessionLike, as_items, session_id
from fovea.stream import INFLIGHT_MAX, AttendStream

MESSAGE_BYTES_MAX = 1 << 30
RETRY_LIMIT = 10.0  # seconds
# Twice is not once: a second session that nobody knows, or what was appended in between is cut.
_ONCE = ("OpenSession", "ForkSession", "TruncateSession")

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),  # a data plane never goes through a web proxy
    ("grpc.initial_reconnect_backoff_ms", 20),  # a service that restarts is there again in a moment
    ("grpc.min_reconnect_backoff_ms", 1000),  # and the time of an attempt
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.use_local_subchannel_pool", 1),  # one connection per Client, so two Clients never share a pipe
]


def connect(
    address: str,
    *,
    timeout: float | None = 10.0,
    tls: bool = False,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    server_name: str | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    retry: float = RETRY_LIMIT,
) -> Client:
    """Connects to "host:port" or "unix:/path" and waits until the service answers.

    timeout:            seconds to wait (Unavailable afterwards); None = do not wait.
    tls:                TLS; a ca_file or cert_file implies it.
    ca_file:            PEM: who signs the service's certificate; None = whom gRPC trusts.
    cert_file, key_file: PEM: this client's own, for mutual TLS; both or none.
    server_name:        what the service's certificate must name; None = the address's host.
    token, token_file:  shown with every call (in clear text without TLS); or a file whose first line it is.
    credentials:        gRPC's own, instead of the four files.
    message_bytes_max:  of one message, either way; the service has a limit of its own.
    retry:              a call or stream that finds the service unavailable is repeated for so many seconds, with
                        longer and longer pauses; 0 = never. Opening, forking and truncating are repeated only while
                        there is no connection at all.
    """
    sizes = {
        "grpc.max_send_message_length": message_bytes_max,
        "grpc.max_receive_message_length": message_bytes_max,
    }
    if token is not None and token_file is not None:
        raise ValueError("token, token_file: given both, expected one")
    if token_file is not None:
        token = Path(token_file).read_text(encoding="ascii").partition("\n")[0].strip()
    options: list[tuple[str, Any]] = [(name, sizes.get(name, value)) for name, value in _CHANNEL_OPTIONS]
    if server_name is not None:
        options.append(("grpc.ssl_target_name_override", server_name))
    if credentials is None and (tls or ca_file is not None or cert_file is not None):
        credentials = _credentials(ca_file, cert_file, key_file)
    if credentials is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, credentials, options)
    if timeout is not None:
        try:
            grpc.channel_ready_future(channel).result(timeout)
        except grpc.FutureTimeoutError:
            channel.close()
            raise Unavailable(f"no service at {address} within {timeout:g} s") from None
    return Client(channel, token, retry=retry)


def _credentials(
    ca_file: str | Path | None, cert_file: str | Path | None, key_file: str | Path | None
) -> grpc.ChannelCredentials:
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file, key_file: given one of them, expected both or none")
    roots, chain, key = (
        None if path is None else Path(path).read_bytes() for path in (ca_file, cert_file, key_file)
    )
    return grpc.ssl_channel_credentials(roots, key, chain)


def _is_unsent(error: Unavailable) -> bool:
    """gRPC found no connection. By its words: other ones mean "it may have been sent", the safe mistake."""
    return error.message.startswith("failed to connect to all addresses")


class Client:
    """A connection. Made by connect(). Thread: any. A context manager.

    Every method raises a FoveaError subclass named after the gRPC status when the service refuses.
    """

    def __init__(self, channel: grpc.Channel, token: str | None = None, retry: float = RETRY_LIMIT) -> None:
        self._retry = retry
        self._channel = channel
        self._rpc = Rpc(channel, token)
        self._ids = itertools.count(1)
        self._is_closed = False

    def close(self) -> None:
        """Ends the connection (and its streams). Sessions stay: they belong to the service."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ models, sessions

    def register_model(self, spec: ModelSpec) -> str:
        """The model's id. Idempotent: the same spec always gives the same id.

        What the service accepts but advises against comes as Python warnings.
        """
        reply = self._call("RegisterModel", pb.RegisterModelRequest(spec=spec.to_pb()))
        for text in reply.warnings:
            warnings.warn(text, stacklevel=2)
        return str(reply.model_id)

    def open_session(
        self,
        model_id: str,
        max_tokens_hint: int = 0,
        sharding: Sharding | None = None,
        *,
        close_with_stream: bool = False,
    ) -> Session:
        """An empty session. max_tokens_hint guides its placement (0 = unknown), and reserves nothing.

        close_with_stream: it (and its forks) ends with the first stream() that used it, however that ends.
        """
        request = pb.OpenSessionRequest(
            model_id=model_id, max_tokens_hint=max_tokens_hint, close_with_stream=close_with_stream
        )
        if sharding is not None:
            request.sharding.CopyFrom(sharding.to_pb())
        return Session(self, self._call("OpenSession", request).session_id)

    def session(self, id: str) -> Session:
        """A handle to a session that exists already (opened elsewhere, perhaps)."""
        return Session(self, id)

    def fork_session(self, session: SessionLike, at_position: int | None = None) -> Session:
        request = pb.ForkSessionRequest(session_id=session_id(session))
        if at_position is not None:
            request.at_position = at_position
        return Session(self, self._call("ForkSession", request).session_id)

    def truncate_session(self, session: SessionLike, position: int) -> None:
        """Every layer keeps its tokens [0, position) at most.

        If the answer is lost it is not repeated, for what has been appended since would be cut: Unavailable,
        unless the session is as long as it should be.
        """
        request = pb.TruncateSessionRequest(session_id=session_id(session), position=position)
        try:
            self._call("TruncateSession", request)
        except Unavailable:
            if self._retry <= 0.0 or not self._is_cut(session, position):
                raise

    def _is_cut(self, session: SessionLike, position: int) -> bool:
        try:
            return max(self.session_info(session).layer_tokens) == position
        except FoveaError:
            return False

    def close_session(self, session: SessionLike) -> None:
        self._call("CloseSession", pb.CloseSessionRequest(session_id=session_id(session)))

    def session_info(self, session: SessionLike) -> pb.SessionInfo:
        reply = self._call("GetSession", pb.GetSessionRequest(session_id=session_id(session)))
        return cast(pb.SessionInfo, reply)

    def list_sessions(self, model_id: str = "", page_size: int = 0) -> Iterator[pb.SessionInfo]:
        """Every open session (of one model), page by page."""
        token = ""
        while True:
            reply = self._call(
                "ListSessions",
                pb.ListSessionsRequest(page_size=page_size, page_token=token, model_id=model_id),
            )
            yield from reply.sessions
            token = reply.next_page_token
            if not token:
                return

    # ------------------------------------------------------------------ attention

    def attend(
        self,
        layer: int,
        items: Sequence[Item | tuple[SessionLike, int, int]],
        q: Array,
        k: Array | None = None,
        v: Array | None = None,
        causal: bool = True,
        want_lse: bool = False,
        append: bool = True,
        *,
        dtype: str | None = None,
        only_slice: int = 0,
        timeout: float | None = None,
    ) -> AttendResult:
        """Appends K and V to the sessions' caches and attends over all of it; waits for the answer.

        items:   (session, position of the first token, n_tokens) per sequence; T = sum of n_tokens.
        q:       [T, Hq, dk]; k [T, Hkv, dk]; v [T, Hkv, dv]: tokens of all items packed in item order, one
                 dtype for all: float32, float16, ml_dtypes.bfloat16, or uint16 with dtype="bf16".
        append:  False = query only, over what is stored: k and v must be None.
        only_slice: of a model sharded "latent" in groups, 1 + the slice that out (and lse) is of, [T, Hq,
                 latent_dim / groups]: for a client that is itself tensor-parallel. 0 = all slices.
        timeout: seconds; DeadlineExceeded afterwards.

        Repeating a call whose answer was lost is safe: the same K and V at the same position are
        recognised, not appended again. Other bytes there raise FailedPrecondition; a position
        beyond the committed length raises OutOfRange.
        """
        call = attend_message.encode(
            next(self._ids), layer, as_items(items), q, k, v,
            causal=causal, want_lse=want_lse, append=append, dtype=dtype, only_slice=only_slice,
        )  # fmt: skip
        return attend_message.decode(call, self._call("AttendOnce", call.payload, timeout))

    def stream(self, inflight_max: int = INFLIGHT_MAX) -> AttendStream:
        """A pipelined stream: submit() returns futures. Cheaper than attend() per call when kept full."""
        if self._is_closed:
            raise Cancelled("the client is closed")
        return AttendStream(self._rpc, inflight_max, Retry(self._channel, self._retry))

    # ------------------------------------------------------------------ cluster

    def status(self) -> pb.ClusterStatus:
        """Ranks, devices, memory, load, versions."""
        return cast(pb.ClusterStatus, self._call("GetStatus", pb.GetStatusRequest()))

    def watch(self, interval: float = 1.0) -> Iterator[pb.ClusterStatus]:
        """A status now and then every `interval` seconds, until the caller stops iterating."""
        call = self._rpc.WatchStatus(pb.WatchStatusRequest(interval_ms=round(interval * 1000)))
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()

    def placement(self, session: SessionLike) -> pb.Placement:
        """Which rank holds which heads and tokens of a session, and why."""
        reply = self._call("GetPlacement", pb.GetPlacementRequest(session_id=session_id(session)))
        return cast(pb.Placement, reply)

    def drain(self, timeout: float = 0.0) -> pb.DrainResponse:
        """The service refuses new work, finishes what runs and stops. 0 = its own --drain-timeout."""
        request = pb.DrainRequest(timeout_ms=round(timeout * 1000))
        return cast(pb.DrainResponse, self._call("Drain", request, retry=0.0))

    def _call(
        self, method: str, request: Any, timeout: float | None = None, retry: float | None = None
    ) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        patience = Retry(self._channel, self._retry if retry is None else retry, deadline)
        has_failed = False
        while True:
            try:
                return self._call_once(method, request, deadline)
            except NotFound:
                if has_failed and method == "CloseSession":
                    return None  # the first time, whose answer was lost, closed it
                raise
            except Unavailable as error:
                has_failed = True
                if (method in _ONCE and not _is_unsent(error)) or not patience.pause():
                    raise

    def _call_once(self, method: str, request: Any, deadline: float | None) -> Any:
        if self._is_closed:
            raise Cancelled("the client is closed")
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        failure: FoveaError
        try:
            return getattr(self._rpc, method)(request, timeout=left)
        except grpc.RpcError as error:
            failure = from_rpc(error)
        raise failure from None

"""stream.py - the pipelined way to attend: many requests in flight on one gRPC stream."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import grpc

from fovea import attend
from fovea._pb import attention_pb2 as pb
from fovea.attend import AttendResult, Item
from fovea.dtypes import Array
from fovea.errors import Cancelled, FoveaError, Unavailable, from_rpc
from fovea.retry import Retry
from fovea.rpc import Rpc
from fovea.session import SessionLike, as_items

INFLIGHT_MAX = 64


class AttendStream:
    """A long-lived Attend stream. submit() returns a Future at once; answers may come in any order.

    A failed request fails its own future only; the stream goes on. When the stream itself breaks because the
    service is unavailable, it is opened again for at most `retry` seconds, and what has no answer is sent again,
    in order: an append that did happen is recognised. After that, or when it breaks for another reason, every
    future without an answer fails with that error.

    submit() waits while `inflight_max` requests are unanswered, so a caller that never looks at its
    futures cannot pile up memory. Futures are completed on the stream's own thread: callbacks must not block.
    Thread: submit() and close() from any.
    """

    def __init__(self, rpc: Rpc, inflight_max: int, patience: Retry) -> None:
        self._rpc = rpc
        self._patience = patience
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._slots = threading.BoundedSemaphore(inflight_max)
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[attend.AttendCall, Future[AttendResult]]] = {}
        self._ids = itertools.count(1)
        self._closed: FoveaError | None = None  # set: no further request, and why
        self._cancelled = False
        self._call = rpc.Attend(iter(self._outbox.get, None))
        self._reader = threading.Thread(target=self._read, name="fovea-stream", daemon=True)
        self._reader.start()

    def submit(
        self,
        layer: int,
        items: Sequence[Item | tuple[SessionLike, int, int]],
        q: Array,
        k: Array | None = None,
        v: Array | None = None,
        *,
        causal: bool = True,
        want_lse: bool = False,
        append: bool = True,
        dtype: str | None = None,
        only_slice: int = 0,
    ) -> Future[AttendResult]:
        """Sends one request; arguments as in Client.attend(). The arrays may be reused at once."""
        call = attend.encode(
            next(self._ids), layer, as_items(items), q, k, v,
            causal=causal, want_lse=want_lse, append=append, dtype=dtype, only_slice=only_slice,
        )  # fmt: skip
        self._slots.acquire()
        future: Future[AttendResult] = Future()
        future.set_running_or_notify_cancel()  # sent: it cannot be called back any more
        with self._lock:
            if self._closed is not None:
                self._slots.release()
                raise self._closed
            self._pending[call.request_id] = call, future
            self._outbox.put(call.payload)
        return future

    def close(self, timeout: float | None = None) -> None:
        """Waits for the answers under way (at most `timeout` seconds), then ends the stream."""
        with self._lock:
            if self._closed is None:
                self._closed = Cancelled("the stream is closed")
                self._outbox.put(None)  # half-close
        self._reader.join(timeout)
        if self._reader.is_alive():
            self.cancel()
            self._reader.join()

    def cancel(self) -> None:
        """Ends the stream at once; unanswered futures fail with Cancelled."""
        self._cancelled = True
        with self._lock:
            self._call.cancel()

    def __enter__(self) -> AttendStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        while True:
            end: FoveaError = Unavailable("the service ended the stream")
            try:
                self._deliver(self._call)
            except grpc.RpcError as error:
                end = from_rpc(error, self._cancelled)
            if not self._open_again(end):
                break
        with self._lock:
            self._closed = self._closed or end
            pending, self._pending = self._pending, {}
            self._outbox.put(None)
        for _, future in pending.values():
            self._slots.release()
            future.set_exception(end)

    def _open_again(self, end: FoveaError) -> bool:
        with self._lock:
            is_over = self._cancelled or (self._closed is not None and not self._pending)
        if is_over or not isinstance(end, Unavailable) or not self._patience.pause():
            return False
        with self._lock:
            self._outbox.put(None)  # the old call's
            self._outbox = queue.SimpleQueue()
            for call, _ in self._pending.values():
                self._outbox.put(call.payload)
            if self._closed is not None:
                self._outbox.put(None)
            if self._cancelled:
                return False
            self._call = self._rpc.Attend(iter(self._outbox.get, None))
        return True

    def _deliver(self, replies: Iterator[pb.AttendResponse]) -> None:
        for reply in replies:
            self._patience.reset()
            with self._lock:
                entry = self._pending.pop(reply.request_id, None)
            if entry is None:  # an answer nobody asked for
                continue
            self._slots.release()
            call, future = entry
            try:
                future.set_result(attend.decode(call, reply))
            except FoveaError as error:
                future.set_exception(error)

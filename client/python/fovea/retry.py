"""retry.py - how long, and how often, a call is repeated when the service cannot be reached.

The service is unavailable for a moment when it repairs itself or is started again. Repeating is safe: appends
are exactly-once, and the same request at the same position gets the same bits. (What is not safe to repeat: client._ONCE.)
"""

from __future__ import annotations

import contextlib
import random
import time

import grpc

FIRST_DELAY = 0.02
MAX_DELAY = 0.5


class Retry:
    """The patience of one call or stream: pause() again and again, until it returns False."""

    def __init__(self, channel: grpc.Channel, limit: float, deadline: float | None = None) -> None:
        self._channel = channel
        self._limit = limit
        self._deadline = deadline
        self.reset()

    def reset(self) -> None:
        """The service answered: the next failure is a new one."""
        self._delay = FIRST_DELAY
        self._end: float | None = None

    def pause(self) -> bool:
        """Sleeps, longer each time, and until the service can be reached.

        False: the limit, or the call's own deadline, would be passed.
        """
        now = time.monotonic()
        if self._end is None:
            self._end = now + self._limit
        end = self._end if self._deadline is None else min(self._end, self._deadline)
        if now + self._delay >= end:
            return False
        time.sleep(self._delay * (0.5 + random.random() / 2))  # not all clients at once
        self._delay = min(2 * self._delay, MAX_DELAY)
        self._wait_ready(end - time.monotonic())
        return True

    def _wait_ready(self, seconds: float) -> None:
        # By a call, whose answer does not matter: between calls nobody polls a connection that is being made.
        check = self._channel.unary_unary("/grpc.health.v1.Health/Check")
        with contextlib.suppress(grpc.RpcError):
            check(b"", timeout=max(seconds, 0.0), wait_for_ready=True)

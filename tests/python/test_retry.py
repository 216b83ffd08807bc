"""test_retry.py - a client goes on when the service is away for a moment, and each append counts once.

Against a service of this process that does what it is asked, and then loses every third answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

import fovea
import helpers
import mock_server
from fovea._pb import attention_pb2 as pb
from helpers import Known, small_spec
from mock_server import Door
from mock_service import Service as Model


class LosingDoor(Door):
    """Answers that are lost on their way; what was asked has been done."""

    def __init__(self, lose_every: int) -> None:
        super().__init__(Model(1 << 30))
        self.lose_every = lose_every
        self.n_answers = 0
        self.n_lost = 0
        self.after_lost: Callable[[], None] | None = None

    def _is_lost(self) -> bool:
        self.n_answers += 1
        lost = self.n_answers % self.lose_every == 0
        self.n_lost += lost
        return lost

    def call(self, name: str, request: object, context: grpc.ServicerContext) -> object:
        reply = super().call(name, request, context)
        if self._is_lost():
            if self.after_lost is not None:
                self.after_lost()
            context.abort(grpc.StatusCode.UNAVAILABLE, "a rank was lost")
        return reply

    def attend(self, requests: object, context: grpc.ServicerContext) -> Iterator[pb.AttendResponse]:
        for reply in super().attend(requests, context):
            if self._is_lost():
                context.abort(grpc.StatusCode.UNAVAILABLE, "a rank was lost")
            yield reply


@pytest.fixture
def losing(tmp_path):
    door = LosingDoor(3)
    address = f"unix:{tmp_path}/s"
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers([door])
    server.add_insecure_port(address)
    server.start()
    yield door, address
    server.stop(None)


def test_every_call_gets_through(losing, rng):
    door, address = losing
    with fovea.connect(address) as client:
        s = Known(client, small_spec(), rng)
        q, k, v = s.fresh(20)
        outs = [
            client.attend(0, [(s.session, i, 1)], q[i : i + 1], k[i : i + 1], v[i : i + 1]).out
            for i in range(20)
        ]
        s.remember(0, k, v)
        helpers.close(np.concatenate(outs), s.expect(0, q, 0)[0])
        assert s.session.info().layer_tokens[0] == 20
    assert door.n_lost >= 6


def test_what_must_not_be_done_twice(losing, rng):
    door, address = losing
    with fovea.connect(address) as client:
        s = Known(client, small_spec(), rng)
        model = client.register_model(small_spec())
        q, k, v = s.fresh(20)
        client.attend(0, [(s.session, 0, 20)], q, k, v)

        def lose_the_next() -> None:
            door.lose_every = door.n_answers + 1

        def lose_none() -> None:
            door.lose_every = 1 << 30

        def n_sessions() -> int:
            lose_none()
            return len(list(client.list_sessions()))

        lose_the_next()
        with pytest.raises(fovea.Unavailable):
            client.open_session(model)
        assert n_sessions() == 2  # and not more and more
        lose_the_next()
        with pytest.raises(fovea.Unavailable):
            s.session.fork()
        assert n_sessions() == 3

        lose_the_next()
        s.session.truncate(15)  # done, as its length tells
        assert s.session.info().layer_tokens[0] == 15

        def append_in_between() -> None:
            door.after_lost = None
            client.attend(0, [(s.session, 12, 1)], q[12:13], k[12:13], v[12:13])

        door.after_lost = append_in_between
        lose_the_next()
        with pytest.raises(fovea.Unavailable):
            s.session.truncate(12)
        assert s.session.info().layer_tokens[0] == 13  # what was acknowledged stays
        lose_the_next()
        s.session.close()  # it can be said twice
        lose_none()


def test_open_waits_for_a_service_that_is_away(tmp_path):
    address = f"unix:{tmp_path}/s"
    server = mock_server.start(address)
    with fovea.connect(address) as client:
        model = client.register_model(small_spec())
        server.stop(None).wait()
        again: list[grpc.Server] = []
        timer = threading.Timer(0.5, lambda: again.append(mock_server.start(address)))
        timer.start()
        try:
            with pytest.raises(fovea.NotFound):  # this one answers: it does not know the model
                client.open_session(model)
        finally:
            timer.join()
            again[0].stop(None)


def test_a_stream_is_opened_again(losing, rng):
    door, address = losing
    with fovea.connect(address) as client:
        s = Known(client, small_spec(), rng)
        q, k, v = s.fresh(40)
        with client.stream() as stream:
            futures = [
                stream.submit(0, [(s.session, i, 1)], q[i : i + 1], k[i : i + 1], v[i : i + 1])
                for i in range(40)
            ]
            outs = [future.result(60).out for future in futures]
        s.remember(0, k, v)
        helpers.close(np.concatenate(outs), s.expect(0, q, 0)[0])
        assert s.session.info().layer_tokens[0] == 40
    assert door.n_lost >= 13


def test_patience_ends(losing, rng):
    door, address = losing
    with fovea.connect(address, retry=0.0) as client:
        s = None
        while s is None:
            try:
                s = Known(client, small_spec(), rng)
            except fovea.Unavailable:
                pass
        door.lose_every = 1  # all of them
        q, k, v = s.fresh(1)
        with pytest.raises(fovea.Unavailable, match="a rank was lost"):
            client.attend(0, [(s.session, 0, 1)], q, k, v)
        stream = client.stream()
        with pytest.raises(fovea.Unavailable):
            stream.submit(0, [(s.session, 0, 1)], q, k, v).result(10)
    begin = time.monotonic()
    n_before = door.n_lost
    with fovea.connect(address, retry=0.5) as client, pytest.raises(fovea.Unavailable):
        client.status()
    assert door.n_lost - n_before > 2
    assert time.monotonic() - begin < 10

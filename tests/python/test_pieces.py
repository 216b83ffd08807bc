"""test_pieces.py - a prompt served in pieces is one request to its client, and to everybody else."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import fovea
import helpers
from helpers import Known, attend, small_spec

PROMPT = 2000  # tokens; in pieces of 16 more than a hundred steps


@pytest.fixture
def pieces(own_service):
    with own_service(options=["--prefill-tokens-per-step", "16"]).connect(60) as client:
        yield client


def spec():
    return small_spec(n_q_heads=16, n_kv_heads=8, head_dim_qk=128)


def is_busy(client):
    status = client.status()
    return status.n_requests_running + status.n_requests_queued > 0


@pytest.mark.fovead
def test_a_prompt_given_up_half_way_was_never_there(pieces, rng):
    known = Known(pieces, spec(), rng)
    attend([known], [70])
    q, k, v = known.fresh(PROMPT)
    items = [(known.session, 70, PROMPT)]
    begin = time.monotonic()
    first = pieces.attend(0, items, q, k, v)
    seconds = time.monotonic() - begin
    known.session.truncate(70)
    with pytest.raises(fovea.DeadlineExceeded):
        pieces.attend(0, items, q, k, v, timeout=seconds / 3)
    deadline = time.monotonic() + 60
    while is_busy(pieces):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert known.session.info().layer_tokens[0] == 70
    attend([known], [3])  # what is there is as it was, and the next append goes where the prompt would have
    known.session.truncate(70)
    again = pieces.attend(0, items, q, k, v)
    helpers.close(again.out, first.out)
    assert known.session.info().layer_tokens[0] == 70 + PROMPT


@pytest.mark.fovead
def test_others_are_served_between_the_pieces(pieces, rng):
    long, short = Known(pieces, spec(), rng), Known(pieces, spec(), rng)
    attend([short], [100])
    q, k, v = long.fresh(PROMPT)
    out: list[np.ndarray] = []

    def prefill() -> None:
        out.append(pieces.attend(0, [(long.session, 0, PROMPT)], q, k, v).out)

    thread = threading.Thread(target=prefill)
    thread.start()
    n_served = 0
    while thread.is_alive():
        attend([short], [1])
        n_served += 1
    thread.join()
    assert n_served > 3  # in one step the prompt would have let one pass
    assert len(out) == 1
    assert long.session.info().layer_tokens[0] == PROMPT


@pytest.mark.fovead
def test_a_command_for_the_session_waits_for_its_prompt(pieces, rng):
    known, other = Known(pieces, spec(), rng), Known(pieces, spec(), rng)
    q, k, v = known.fresh(PROMPT)
    out: list[np.ndarray] = []

    def prefill() -> None:
        out.append(pieces.attend(0, [(known.session, 0, PROMPT)], q, k, v).out)

    thread = threading.Thread(target=prefill)
    thread.start()
    while pieces.status().n_steps < 3:
        time.sleep(0.005)
    other.session.close()  # of another session: at once
    fork = known.session.fork()
    thread.join()
    assert len(out) == 1
    assert fork.info().layer_tokens[0] in (0, PROMPT)  # before all of it, or after
    fork.close()

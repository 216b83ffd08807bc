"""test_exactly_once.py - positions make a retry harmless."""

from __future__ import annotations

import numpy as np
import pytest

import fovea
import helpers
from helpers import Known, attend, small_spec


@pytest.fixture
def known(client, rng):
    s = Known(client, small_spec(), rng)
    attend([s], [70])
    return s


def test_replay_is_answered_not_doubled(client, known):
    q, k, v = known.fresh(3)
    items = [(known.session, 70, 3)]
    first = client.attend(0, items, q, k, v, want_lse=True)
    for _ in range(3):
        again = client.attend(0, items, q, k, v, want_lse=True)
        assert again.out.tobytes() == first.out.tobytes()
        assert again.lse.tobytes() == first.lse.tobytes()
    assert known.session.info().layer_tokens[0] == 73


def test_replay_of_an_older_append(client, known):
    """A retry of an append that others followed: the answer it had then."""
    q, k, v = known.fresh(2)
    first = client.attend(0, [(known.session, 70, 2)], q, k, v)
    known.remember(0, k, v)
    attend([known], [5])
    again = client.attend(0, [(known.session, 70, 2)], q, k, v)
    helpers.close(again.out, first.out)
    assert known.session.info().layer_tokens[0] == 77


def test_other_bytes_are_refused(client, known):
    q, k, v = known.fresh(1)
    client.attend(0, [(known.session, 70, 1)], q, k, v)
    known.remember(0, k, v)
    for changed in ((k + 1, v), (k, v + 1)):
        with pytest.raises(fovea.FailedPrecondition, match=r"truncate"):
            client.attend(0, [(known.session, 70, 1)], q, *changed)
    attend([known], [1])  # nothing has changed


def test_other_length_is_refused(client, known):
    q, k, v = known.fresh(3)
    client.attend(0, [(known.session, 70, 3)], q, k, v)
    with pytest.raises(fovea.FailedPrecondition):
        client.attend(0, [(known.session, 70, 2)], q[:2], k[:2] + 1, v[:2])
    assert known.session.info().layer_tokens[0] == 73


def test_gap_is_refused_with_the_length(client, known):
    q, k, v = known.fresh(1)
    with pytest.raises(fovea.OutOfRange, match=r"70"):
        client.attend(0, [(known.session, 71, 1)], q, k, v)
    attend([known], [1])


def test_one_bad_item_refuses_the_whole_request(client, rng, known):
    """A refused request changes nothing, not even for its good items."""
    other = Known(client, known.spec, rng)
    q, k, v = known.fresh(2)
    with pytest.raises(fovea.OutOfRange):
        client.attend(0, [(known.session, 70, 1), (other.session, 5, 1)], q, k, v)
    assert list(known.session.info().layer_tokens) == [70, 0]
    attend([known, other], [1, 1])


def test_replay_beside_a_fresh_append(client, rng, known):
    """One request may hold a retried item and a new one."""
    other = Known(client, known.spec, rng)
    attend([other], [10])
    q, k, v = known.fresh(2)
    first = client.attend(0, [(known.session, 70, 1)], q[:1], k[:1], v[:1])
    both = client.attend(0, [(known.session, 70, 1), (other.session, 10, 1)], q, k, v)
    helpers.close(both.out[:1], first.out)
    other.remember(0, k[1:], v[1:])
    helpers.close(both.out[1:], other.expect(0, q[1:], 10)[0])
    assert known.session.info().layer_tokens[0] == 71


def test_truncate_then_append_other_tokens(client, known):
    known.truncate(33)
    assert known.session.info().layer_tokens[0] == 33
    attend([known], [40])
    known.truncate(0)
    attend([known], [3])


def test_layers_are_independent(client, known):
    q, k, v = known.fresh(1)
    with pytest.raises(fovea.OutOfRange):
        client.attend(1, [(known.session, 70, 1)], q, k, v)
    attend([known], [5], layer=1)
    assert list(known.session.info().layer_tokens) == [70, 5]


def test_retry_after_the_connection_was_lost(service, client, rng):
    """Requests of a stream that breaks are sent again on another: each append counts once."""
    s = Known(client, small_spec(), rng)
    q, k, v = s.fresh(40)
    with service.connect() as first:
        stream = first.stream()
        for i in range(40):
            stream.submit(0, [(s.session, i, 1)], q[i : i + 1], k[i : i + 1], v[i : i + 1])
        stream.cancel()
    outs = [
        client.attend(0, [(s.session, i, 1)], q[i : i + 1], k[i : i + 1], v[i : i + 1]).out for i in range(40)
    ]
    s.remember(0, k, v)
    helpers.close(np.concatenate(outs), s.expect(0, q, 0)[0])
    assert s.session.info().layer_tokens[0] == 40

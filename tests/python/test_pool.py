"""test_pool.py - a full KV pool is a status with numbers; what is stored stays usable."""

from __future__ import annotations

import re

import pytest

import fovea
from helpers import Known, attend, small_spec


@pytest.fixture
def small(own_service):
    """A service with 4 MiB of KV (on each rank)."""
    with own_service("4m").connect() as client:
        yield client


SPEC = small_spec(n_layers=1, n_q_heads=8, n_kv_heads=8, head_dim_qk=64)


def fill(known: list[Known], n: int = 512) -> fovea.ResourceExhausted:
    """Appends to the sessions in turn until one is refused."""
    for i in range(10000):
        s = known[i % len(known)]
        q, k, v = s.fresh(n)
        try:
            s.client.attend(0, [(s.session, s.length(), n)], q, k, v)
        except fovea.ResourceExhausted as error:
            return error
        s.remember(0, k, v)
    raise AssertionError("the pool never filled up")


def test_exhaustion(small, rng):
    known = [Known(small, SPEC, rng) for _ in range(3)]
    error = fill(known, 200)
    numbers = [int(n) for n in re.findall(r"\d+", error.message)]
    assert len(numbers) >= 2, f"bytes needed and free are missing: {error.message}"
    lengths = [s.session.info().max_tokens for s in known]
    assert lengths == [s.length() for s in known]
    for s in known:  # queries over what is stored, all of it
        attend([s], [2], append=False)
    short = known[-1]
    room = -short.length() % 64  # the last page of a session has room yet
    if room:
        attend([short], [room])

    known[2].truncate(64)
    attend([known[2]], [64])  # what was freed can be used again, by itself ...
    known[0].session.close()
    attend([Known(small, SPEC, rng)], [64])  # ... or by others: a new session goes where there is room


def test_exhaustion_of_one_item_refuses_the_request(small, rng):
    known = [Known(small, SPEC, rng) for _ in range(2)]
    fill(known[:1], 64)
    room = -known[0].length() % 64
    before = [s.session.info().max_tokens for s in known]
    with pytest.raises(fovea.ResourceExhausted):
        attend(known, [room + 64, 64])
    assert [s.session.info().max_tokens for s in known] == before
    attend(known[:1], [1], append=False)


def test_fork_needs_memory_only_when_written(small, rng):
    """Forks of a full pool are free; the append that must copy a page is what is refused."""
    parent = Known(small, SPEC, rng)
    fill([parent], 64)
    children = [parent.fork() for _ in range(20)]
    for child in children:
        attend([child], [1], append=False)
        child.session.close()
    attend([parent], [1], append=False)


def test_memory_comes_back_after_many_rounds(small, rng):
    free = small.status().kv_bytes_free
    for _ in range(8):
        s = Known(small, SPEC, rng)
        fill([s], 1024)
        s.session.close()
    s = Known(small, SPEC, rng)
    attend([s], [64])
    s.session.close()
    assert small.status().kv_bytes_free == free

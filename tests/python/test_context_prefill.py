"""test_context_prefill.py - prompts over several ranks: queries that visit the KV, and KV that moves to the queries."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

import fovea
import helpers
from helpers import Known, attend, small_spec

N_RANKS = int(os.environ.get("FV_TEST_RANKS", "1"))


def ways(session):
    """Pieces of prompts that visited, and that KV moved to."""
    found = re.search(r"(\d+) visited the KV, to (\d+) it moved", session.placement().reason)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def by_context(**changes):
    return small_spec(sharding=fovea.Sharding("context", shard_tokens=64), **changes)


@pytest.mark.fovead
@pytest.mark.parametrize("way", ["visit", "move"])
def test_a_forced_way_is_taken_and_right(own_service, rng, way):
    options = ["--context-prefill", way, "--prefill-tokens-per-step", "150"]
    with own_service(options=options).connect(60) as client:
        for changes in (
            {},
            {"logit_softcap": 8.0},
            {"policies": [fovea.LayerPolicy(fovea.Window(90, 5))]},
        ):
            known = Known(client, by_context(**changes), rng)
            attend([known], [333])  # judged against the oracle
            attend([known], [1])
            attend([known], [200])
            n_visits, n_moves = ways(known.session)
            if N_RANKS == 1:
                assert (n_visits, n_moves) == (0, 0)
            elif way == "visit":
                assert n_visits > 2
                assert n_moves == 0
            else:
                assert n_visits == 0
                assert n_moves > 2


@pytest.mark.fovead
@pytest.mark.skipif(N_RANKS < 2, reason="one rank alone")
def test_both_ways_agree_and_auto_knows_where(own_service, rng):
    spec = by_context(n_q_heads=16, n_kv_heads=1, head_dim_qk=64)
    q = rng.standard_normal((700, 16, 64), dtype=np.float32)
    k = rng.standard_normal((700, 1, 64), dtype=np.float32)
    v = rng.standard_normal((700, 1, 64), dtype=np.float32)
    outs = {}
    for way in ("visit", "move", "auto"):
        with own_service(options=["--context-prefill", way]).connect(60) as client:
            session = client.open_session(client.register_model(spec))
            outs[way] = client.attend(0, [(session, 0, 700)], q, k, v).out
            n_visits, n_moves = ways(session)
            assert n_visits + n_moves > 0
            if way == "auto":  # 16 query heads share what moves
                assert n_moves > 0
    helpers.close(outs["visit"], outs["move"])
    helpers.close(outs["visit"], outs["auto"])

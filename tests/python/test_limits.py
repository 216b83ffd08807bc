"""test_limits.py - what is too large is refused by name, before it costs anything, and the service goes on."""

from __future__ import annotations

import numpy as np
import pytest

import fovea
from fovea._pb import attention_pb2 as pb
from helpers import small_spec

# An answer many times larger than its question: 16 wide keys, 256 wide values, one KV head.
WIDE = small_spec(
    name="wide", n_layers=1, n_q_heads=32, n_kv_heads=1, head_dim_qk=16, head_dim_v=256, kv_dtype="f16"
)


def ask(client: fovea.Client, session: fovea.Session, n_tokens: int) -> fovea.AttendResult:
    q = np.zeros((n_tokens, 32, 16), np.float16)
    return client.attend(0, [(session, 0, n_tokens)], q, None, None, append=False)


@pytest.mark.fovead
def test_an_answer_over_the_message_limit_is_refused(own_service):
    with own_service("64m", ["--request-memory", "8g"]).connect() as client:
        with client.open_session(client.register_model(WIDE)) as session:
            with pytest.raises(fovea.InvalidArgument, match=r"q: given 143360 tokens.*2348810240 bytes"):
                ask(client, session, 143360)
            assert ask(client, session, 100).out.shape == (100, 32, 256)


@pytest.mark.fovead
def test_answers_count_in_request_memory(own_service):
    with own_service("64m", ["--request-memory", "64m"]).connect() as client:
        with client.open_session(client.register_model(WIDE)) as session:
            with pytest.raises(fovea.ResourceExhausted, match=r"134217728 bytes needed.*request_memory"):
                ask(client, session, 8192)  # 8 MiB of q, 128 MiB of out
            assert ask(client, session, 1024).out.shape == (1024, 32, 256)


@pytest.mark.fovead
@pytest.mark.parametrize("token", ["-1", "1" * 23, "abc", " 1"])
def test_page_tokens_that_are_none(client, token):
    with pytest.raises(fovea.InvalidArgument, match="page_token"):
        client._call("ListSessions", pb.ListSessionsRequest(page_token=token))

"""hosts_attend.py ADDRESS N_RANKS: an attention over all ranks of a service, compared with numpy in float64.

--sharding heads or context; exits with 1 and says what differs. Used by test_hosts.sh.
"""

from __future__ import annotations

import argparse
import sys
import time

import fovea
import numpy as np

HQ, HKV, D = 12, 6, 64


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    """Causal attention of queries at positions first, first + 1, ... over all of k and v."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HQ // HKV, axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(D)
    seen = np.arange(k.shape[0])[None, :] <= first + np.arange(q.shape[0])[:, None]
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


class Traffic:
    """A session that grows by a token after another; every answer is compared."""

    def __init__(self, client: fovea.Client, model: str, n_first: int) -> None:
        self.client, self.model, self.n_first = client, model, n_first
        self.rng = np.random.default_rng(11)
        self.worst = self.longest = 0.0
        self.n_answers = self.n_lost = 0
        self.begin()

    def begin(self) -> None:
        self.session = self.client.open_session(self.model)
        self.k = np.empty((0, HKV, D), np.float32)
        self.v = np.empty((0, HKV, D), np.float32)
        self.append(self.n_first)

    def append(self, n: int) -> None:
        q = self.rng.standard_normal((n, HQ, D), np.float32)
        k, v = (self.rng.standard_normal((n, HKV, D), np.float32) for _ in range(2))
        at = len(self.k)
        all_k, all_v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
        called = time.monotonic()
        out = self.client.attend(0, [(self.session, at, n)], q, k, v).out
        self.longest = max(self.longest, time.monotonic() - called)
        self.worst = max(self.worst, float(np.abs(out - reference(q, all_k, all_v, at)).max()))
        self.k, self.v = all_k, all_v
        self.n_answers += 1

    def go_on(self, seconds: float, may_lose: bool) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.n_answers < 3:
            try:
                self.append(1)
            except fovea.FoveaError as error:
                if not may_lose or error.code.name not in ("DATA_LOSS", "NOT_FOUND", "UNAVAILABLE"):
                    raise
                self.n_lost += 1
                self.begin()
        n = self.session.info().layer_tokens[0]
        assert n == len(self.k), f"{n} tokens, acknowledged {len(self.k)}"


def traffic(args: argparse.Namespace, n_first: int) -> int:
    with fovea.connect(args.address, timeout=60, retry=60) as client:
        sharding = fovea.Sharding(args.sharding, 64)
        model = client.register_model(
            fovea.ModelSpec("traffic", 1, HQ, HKV, D, kv_dtype="f32", sharding=sharding)
        )
        t = Traffic(client, model, n_first)
        print("under way", flush=True)
        t.go_on(args.seconds, args.may_lose)
    print(f"{t.n_answers} answers, largest difference from float64 {t.worst:.2e}, "
          f"longest wait {t.longest * 1000:.0f} ms, sessions lost {t.n_lost}")  # fmt: skip
    return 0 if t.worst < 2e-5 else 1


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("address")
    p.add_argument("n_ranks", type=int)
    p.add_argument("--sharding", choices=("heads", "context"), default="context")
    p.add_argument("--seconds", type=float, default=0, help="go on, token by token, for so long")
    p.add_argument("--may-lose", action="store_true", help="the session may be lost, if that is said")
    args = p.parse_args()
    if args.seconds > 0:
        return traffic(args, 64 * 3 * args.n_ranks + 5)
    rng = np.random.default_rng(7)
    n = 64 * 3 * args.n_ranks + 5  # three blocks of 64 tokens a rank, and a piece
    q = rng.standard_normal((n, HQ, D), np.float32)
    k = rng.standard_normal((n, HKV, D), np.float32)
    v = rng.standard_normal((n, HKV, D), np.float32)
    worst = 0.0
    with fovea.connect(args.address) as client:
        model = client.register_model(
            fovea.ModelSpec(
                "hosts", n_layers=1, n_q_heads=HQ, n_kv_heads=HKV, head_dim_qk=D, kv_dtype="f32",
                sharding=fovea.Sharding(args.sharding, 64),
            )
        )
        session = client.open_session(model)
        for begin, end in ((0, n - 1), (n - 1, n)):  # prefill, then one decoded token
            part = slice(begin, end)
            out = client.attend(
                0, [(session, begin, end - begin)], q[part], k[part], v[part]
            ).out
            worst = max(worst, float(np.abs(out - reference(q[part], k[:end], v[:end], begin)).max()))
        placement = session.placement()
        print(fovea.format_placement(placement))
        session.close()
    n_shares = len(placement.shares)
    print(f"{n} tokens, {args.sharding}, {n_shares} ranks: largest difference from float64 {worst:.2e}")
    if n_shares != args.n_ranks:
        print(f"placement: {n_shares} ranks, expected {args.n_ranks}")
        return 1
    return 0 if worst < 2e-5 else 1


if __name__ == "__main__":
    sys.exit(main())

"""hosts_attend.py ADDRESS N_RANKS: an attention over all ranks of a service, compared with numpy in float64.

--sharding heads or context; exits with 1 and says what differs. Used by test_hosts.sh.
"""

from __future__ import annotations

import argparse
import sys

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


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("address")
    p.add_argument("n_ranks", type=int)
    p.add_argument("--sharding", choices=("heads", "context"), default="context")
    args = p.parse_args()
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

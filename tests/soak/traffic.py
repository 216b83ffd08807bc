"""traffic.py - one client of the soak: a random life of sessions, until it is told to stop.

python traffic.py ADDRESS SEED PAUSE_MS CHECK_EVERY    prints "begun"; its counts as JSON when its stdin ends

It opens, prefills, decodes (alone, several sessions together, pipelined on a stream), forks, truncates, closes, asks wrong
things, and now and then vanishes: its connection closes with requests and a stream under way. Sessions on that stream end by
themselves. Of its answers one in CHECK_EVERY is compared with the reference; every refusal must be one that it asked for.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
import warnings
from collections import Counter

import fovea
import kinds
import numpy as np

SESSIONS_MAX = 10
TOKENS_MAX = 900


class Sequence:
    """A session and what it holds."""

    def __init__(self, kind: kinds.Kind, session: fovea.Session) -> None:
        self.kind, self.session = kind, session
        layers = range(kind.spec.n_layers)
        self.k = [np.zeros((0, kind.n_kv_heads, kind.dim_qk), np.float32) for _ in layers]
        self.v = [k[..., : kind.spec.latent_dim or kind.dim_qk] for k in self.k]

    def length(self, layer: int) -> int:
        return len(self.k[layer])

    def append(self, layer: int, k: np.ndarray, v: np.ndarray | None) -> None:
        k = kinds.stored(self.kind, k).reshape(len(k), self.kind.n_kv_heads, self.kind.dim_qk)
        v = k[..., : self.kind.spec.latent_dim] if v is None else kinds.stored(self.kind, v)
        self.k[layer] = np.concatenate([self.k[layer], k])
        self.v[layer] = np.concatenate([self.v[layer], v])

    def cut(self, position: int) -> None:
        self.k = [k[:position] for k in self.k]
        self.v = [v[:position] for v in self.v]


class Traffic:
    def __init__(self, address: str, seed: int, check_every: int) -> None:
        self.address, self.check_every = address, check_every
        self.random, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.counts: Counter[str] = Counter()
        self.worst_ms = 0.0
        self.sequences: list[Sequence] = []
        self.connect()

    def connect(self) -> None:
        self.client = fovea.connect(self.address, timeout=60, retry=5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # small S2 models
            self.models = [self.client.register_model(kind.spec) for kind in kinds.KINDS]

    # ------------------------------------------------------------------ attention

    def fresh(self, kind: kinds.Kind, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        q = self.rng.standard_normal((n, kind.spec.n_q_heads, kind.dim_qk), np.float32)
        if kind.spec.kind == "latent":
            return q, self.rng.standard_normal((n, kind.dim_qk), np.float32), None
        k, v = (self.rng.standard_normal((n, kind.n_kv_heads, kind.dim_qk), np.float32) for _ in "kv")
        return q, k, v

    def judge(self, s: Sequence, layer: int, q: np.ndarray, position: int, out: np.ndarray) -> None:
        self.counts["answers"] += 1
        if self.counts["answers"] % self.check_every:
            return
        right = kinds.answer(s.kind, q, s.k[layer], s.v[layer], position)
        error = float(np.abs(out - right).max()) / max(1.0, float(np.abs(right).max()))
        if not error <= s.kind.tolerance:
            raise AssertionError(f"{s.kind.spec.name}: off by {error} at {position} of layer {layer}")
        self.counts["compared"] += 1

    def attend(self, group: list[Sequence], layer: int, counts: list[int]) -> None:
        """One request for several sessions of one model."""
        kind = group[0].kind
        parts = [self.fresh(kind, n) for n in counts]
        at = [s.length(layer) for s in group]
        q, k = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        v = None if parts[0][2] is None else np.concatenate([part[2] for part in parts])
        items = [(s.session, p, n) for s, p, n in zip(group, at, counts, strict=True)]
        begin = time.monotonic()
        out = self.client.attend(layer, items, q, k, v).out
        self.worst_ms = max(self.worst_ms, (time.monotonic() - begin) * 1e3)
        self.counts["tokens"] += sum(counts)
        row = 0
        for s, p, n, part in zip(group, at, counts, parts, strict=True):
            s.append(layer, part[1], part[2])
            self.judge(s, layer, part[0], p, out[row : row + n])
            row += n

    def stream(self, s: Sequence, n_steps: int) -> None:
        """Steps of both layers by turns, all under way at once."""
        sent = []
        with self.client.stream() as stream:
            for i in range(n_steps):
                layer = i % s.kind.spec.n_layers
                q, k, v = self.fresh(s.kind, 1)
                p = s.length(layer)
                sent.append((layer, q, k, v, p, stream.submit(layer, [(s.session, p, 1)], q, k, v)))
                s.append(layer, k, v)
            for layer, q, k, v, p, future in sent:
                out = future.result(60).out
                self.counts["tokens"] += 1
                cut = Sequence(s.kind, s.session)
                cut.k, cut.v = ([x[: p + 1] for x in side] for side in (s.k, s.v))
                self.judge(cut, layer, q, p, out)

    # ------------------------------------------------------------------ what it does

    def open(self) -> None:
        kind = self.random.randrange(len(kinds.KINDS))
        sharding = self.random.choice(kinds.KINDS[kind].shardings)
        session = self.client.open_session(self.models[kind], self.random.choice((0, 1000)), sharding)
        self.sequences.append(Sequence(kinds.KINDS[kind], session))
        self.counts["opened"] += 1

    def prefill(self, s: Sequence) -> None:
        n = self.random.randint(2, 250)
        for layer in range(s.kind.spec.n_layers):
            self.attend([s], layer, [n])

    def decode(self, s: Sequence) -> None:
        same = [other for other in self.sequences if other.kind is s.kind]
        group = self.random.sample(same, self.random.randint(1, len(same)))
        for layer in range(s.kind.spec.n_layers):
            self.attend(group, layer, [self.random.choice((1, 1, 1, 3)) for _ in group])

    def fork(self, s: Sequence) -> None:
        if len(self.sequences) < SESSIONS_MAX and s.kind.is_shared:
            at = self.random.randint(0, min(s.length(i) for i in range(s.kind.spec.n_layers)))
            child = Sequence(s.kind, s.session.fork(at))
            child.k, child.v = list(s.k), list(s.v)
            child.cut(at)
            self.sequences.append(child)
            self.counts["forked"] += 1

    def truncate(self, s: Sequence) -> None:
        if s.kind.is_shared:
            at = self.random.randint(0, max(s.length(0) - 1, 0))
            s.session.truncate(at)
            s.cut(at)
            self.counts["truncated"] += 1

    def close(self, s: Sequence) -> None:
        s.session.close()
        self.sequences.remove(s)
        self.counts["closed"] += 1

    def ask_wrongly(self, s: Sequence) -> None:
        q, k, v = self.fresh(s.kind, 1)
        wrong = self.random.choice(
            (
                (fovea.OutOfRange, lambda: self.client.attend(0, [(s.session, s.length(0) + 5, 1)], q, k, v)),
                (fovea.InvalidArgument, lambda: self.client.attend(9, [(s.session, 0, 1)], q, k, v)),
                (fovea.NotFound, lambda: self.client.close_session("0" * 32)),
            )
        )
        try:
            wrong[1]()
        except wrong[0]:
            self.counts["refused"] += 1
            return
        raise AssertionError("what is wrong was not refused")

    def look(self, s: Sequence) -> None:
        assert self.client.status().state == "serving"
        assert list(s.session.info().layer_tokens) == [len(k) for k in s.k]
        assert s.session.placement().shares or not s.length(0)

    def vanish(self) -> None:
        """The connection goes with a call, a stream and a watch under way; its sessions must not stay."""
        kind = kinds.KINDS[0]
        tied = self.client.open_session(self.models[0], close_with_stream=True)
        q, k, v = self.fresh(kind, 200)
        stream = self.client.stream()
        stream.submit(0, [(tied, 0, 200)], q, k, v).result(
            60
        )  # (used: before that nothing ties it to a stream)
        for i in range(1, 5):
            stream.submit(0, [(tied, i * 200, 200)], q, k, v)
        watch = self.client.watch(0.05)
        next(watch)
        held = [s.session.id for s in self.sequences]
        self.client.close()
        self.connect()
        for s, id in zip(self.sequences, held, strict=True):
            s.session = self.client.session(id)
        self.counts["vanished"] += 1

    def act(self) -> None:
        if not self.sequences:
            self.open()
        s = self.random.choice(self.sequences)
        if max(s.length(i) for i in range(s.kind.spec.n_layers)) > TOKENS_MAX:
            self.close(s)
            return
        roll = self.random.random()
        if roll < 0.1 and len(self.sequences) < SESSIONS_MAX:
            self.open()
        elif roll < 0.25:
            self.prefill(s)
        elif roll < 0.65:
            self.decode(s)
        elif roll < 0.8:
            self.stream(s, self.random.randint(2, 24))
        elif roll < 0.86:
            self.fork(s)
        elif roll < 0.9:
            self.truncate(s)
        elif roll < 0.93:
            self.close(s)
        elif roll < 0.96:
            self.ask_wrongly(s)
        elif roll < 0.99:
            self.look(s)
        else:
            self.vanish()


def main() -> int:
    address, seed, pause_ms, check_every = sys.argv[1], *map(int, sys.argv[2:5])
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    traffic = Traffic(address, seed, check_every)
    print("begun", flush=True)
    while not is_over.is_set():
        traffic.act()
        traffic.counts["acts"] += 1
        time.sleep(pause_ms * 2e-3 * traffic.random.random())
    for s in list(traffic.sequences):
        traffic.close(s)
    traffic.client.close()
    print(json.dumps({**traffic.counts, "worst_ms": round(traffic.worst_ms, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

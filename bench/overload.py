"""overload.py - ten times as many requests as the service can serve: how much of its peak is left, and how quickly it refuses.

python bench/overload.py --fovead build/release/bin/fovead [--times 10] [--rounds 3] [--seconds 5] [--calls-max 12] [--deadline 3]

Starts a service of one rank and one thread. A request is 64 query tokens over 4096 tokens of context, appended once: heavy to
serve, cheap to send. Rounds by turns: peak, a closed loop with --in-flight requests under way; then overload, an open loop that
sends --times the round's peak, evenly, whatever comes back. Goodput counts right answers within the deadline. Every answer must be
right, every other outcome RESOURCE_EXHAUSTED or DEADLINE_EXCEEDED: else the exit code is 1. Figures are no pass or fail.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

import fovea
from fovea import attend

N_QUERY, N_CONTEXT = 64, 4096
SPEC = fovea.ModelSpec("overload", 1, 8, 8, 64, kv_dtype="bf16")
GOOD = {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}


def start(folder: Path, options: argparse.Namespace) -> tuple[subprocess.Popen, fovea.Client]:
    words = [options.fovead.resolve(), "--listen", f"unix:{folder}/s", "--kv-memory", "64m", "--threads", "1",
             "--durability", "none", "--log-level", "error", "--calls-max", str(options.calls_max)]  # fmt: skip
    process = subprocess.Popen(words)
    return process, fovea.connect(f"unix:{folder}/s", timeout=60, retry=60)


def resident_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0])


class Load:
    """The same request again and again."""

    def __init__(self, client: fovea.Client, deadline: float) -> None:
        self.deadline, self.attend = deadline, client._rpc.AttendOnce
        rng = np.random.default_rng(1)
        session = client.open_session(client.register_model(SPEC))
        for at in range(0, N_CONTEXT, 512):
            q, k, v = (rng.standard_normal((512, 8, 64), np.float32) for _ in "qkv")
            client.attend(0, [(session, at, 512)], q, k, v)
        q = rng.standard_normal((N_QUERY, 8, 64), np.float32)
        item = fovea.Item(session.id, N_CONTEXT - N_QUERY, N_QUERY)
        self.payload = attend.encode(1, 0, [item], q, None, None, causal=True, want_lse=False, append=False, dtype=None, only_slice=0).payload  # fmt: skip
        self.right = self.values(self.attend(self.payload, timeout=60))
        self.lock = threading.Lock()
        self.reset()

    @staticmethod
    def values(reply: object) -> np.ndarray:
        return np.frombuffer(reply.out, np.float32)  # type: ignore[attr-defined]

    def reset(self) -> None:
        self.codes: Counter[grpc.StatusCode] = Counter()
        self.ms: dict[grpc.StatusCode, list[float]] = {}
        self.n_wrong = self.n_open = 0
        self.end = 0.0

    def send(self, then=lambda: None) -> None:
        begin = time.monotonic()
        with self.lock:
            self.n_open += 1
        call = self.attend.future(self.payload, timeout=self.deadline)

        def done(call: grpc.Future) -> None:
            now = time.monotonic()
            code = call.code()
            with self.lock:
                self.n_open -= 1
                self.codes[code] += now <= self.end or code is not grpc.StatusCode.OK
                self.ms.setdefault(code, []).append((now - begin) * 1e3)
                if code is grpc.StatusCode.OK:  # (bits depend on what shares the step)
                    self.n_wrong += not np.allclose(self.values(call.result()), self.right, atol=1e-4)
            then()

        call.add_done_callback(done)

    def drain(self) -> None:
        while self.n_open:
            time.sleep(0.01)

    def closed(self, n_in_flight: int, seconds: float) -> float:
        """Goodput with so many under way."""
        self.reset()
        self.end = time.monotonic() + seconds

        def again() -> None:
            if time.monotonic() < self.end:
                self.send(again)

        for _ in range(n_in_flight):
            self.send(again)
        time.sleep(seconds)
        self.drain()
        return self.codes[grpc.StatusCode.OK] / seconds

    def open(self, per_second: float, seconds: float) -> tuple[float, float]:
        """(goodput, requests really sent a second)."""
        self.reset()
        begin = time.monotonic()
        self.end = begin + seconds
        n_sent = 0
        while (now := time.monotonic()) < self.end:
            while n_sent < (now - begin) * per_second:
                self.send()
                n_sent += 1
            time.sleep(0.002)
        self.drain()
        return self.codes[grpc.StatusCode.OK] / seconds, n_sent / seconds


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


def one_round(load: Load, options: argparse.Namespace, pid: int) -> dict[str, float]:
    peak = load.closed(options.in_flight, options.seconds)
    peak_ms = percentile(load.ms[grpc.StatusCode.OK], 0.5)
    good, sent = load.open(options.times * peak, options.seconds)
    refused = load.ms.get(grpc.StatusCode.RESOURCE_EXHAUSTED, [])
    return {
        "peak": peak, "peak_p50_ms": peak_ms, "sent": sent, "goodput": good, "ratio": good / peak,
        "answer_p50_ms": percentile(load.ms.get(grpc.StatusCode.OK, []), 0.5),
        "answer_p99_ms": percentile(load.ms.get(grpc.StatusCode.OK, []), 0.99),
        "refused_p50_ms": percentile(refused, 0.5), "refused_p99_ms": percentile(refused, 0.99),
        "refused": len(refused), "late": len(load.ms.get(grpc.StatusCode.DEADLINE_EXCEEDED, [])),
        "wrong": load.n_wrong, "odd": sum(n for code, n in load.codes.items() if code not in GOOD),
        "private_mib": resident_kib(pid) / 1024,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fovead", type=Path, required=True)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--calls-max", type=int, default=12)
    parser.add_argument("--deadline", type=float, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fv-overload-") as folder:
        process, client = start(Path(folder), options)
        try:
            load = Load(client, options.deadline)
            load.closed(options.in_flight, options.seconds / 2)  # warms up
            before = resident_kib(process.pid) / 1024
            rows = [one_round(load, options, process.pid) for _ in range(options.rounds)]
            client.close()
        finally:
            process.terminate()
            process.wait(30)
    for row in rows:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(f"median goodput / peak {statistics.median(row['ratio'] for row in rows):.3f}; private MiB before {before:.0f}, "
          f"at most {max(row['private_mib'] for row in rows):.0f}")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["wrong"] or row["odd"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

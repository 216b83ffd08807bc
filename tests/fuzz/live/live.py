"""live.py - a running fovead, best one with sanitizers, against clients that are broken or hostile.

python tests/fuzz/live/live.py --fovead build/debug-asan/bin/fovead [--executions 1000000] [--seconds S] [--seed N]

Rounds: a burst of badly spoken HTTP/2 (h2.py), each on a connection of its own, then mutated messages (mutate.py) to every RPC,
a few hundred calls on a connection. After each round a healthy client must get a right answer, and memory and descriptors must be
bounded; every call that reaches the service must end. At the end the service stops by itself with exit code 0: with sanitizers that
means no error and no leak. An execution is one call or one bad connection.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import h2
import mutate
import numpy as np

import fovea
from fovea._pb import attention_pb2 as pb

ROOT = Path(__file__).resolve().parents[3]
CALLS = 250  # on one connection
ATTACKS = 40  # in a round
RSS_MIB = 700  # over what it had at first; sanitizers keep what was freed
FDS = 24
LEFT_OUT = {"Drain"}  # does what it is asked to do
STREAMS = {"WatchStatus"}  # do not end by themselves
SPEC = fovea.ModelSpec("live", 1, 2, 1, 16, kv_dtype="f32")


class Service:
    def __init__(self, folder: Path, fovead: Path) -> None:
        self.path = f"{folder}/s"
        self.log = folder / "log"
        environment = {
            "ASAN_OPTIONS": "detect_leaks=1:quarantine_size_mb=16:malloc_context_size=8:allocator_may_return_null=1",
            "LSAN_OPTIONS": f"suppressions={ROOT}/tests/support/lsan.supp",
            **os.environ,
        }
        words = [fovead, "--listen", f"unix:{self.path}", "--kv-memory", "64m", "--threads", "1", "--log-level", "error",
                 "--store-dir", folder / "store", "--request-memory", "128m", "--grpc-memory", "64m",
                 "--sessions-max", "2000", "--message-max", "4m", "--first-message-ms", "2000",
                 "--drain-timeout-ms", "2000"]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.client = fovea.connect(f"unix:{self.path}", timeout=60, retry=60)
        self.model = self.client.register_model(SPEC)

    def resources(self) -> tuple[int, int]:
        """Resident MiB, descriptors."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10, len(
            os.listdir(f"/proc/{self.process.pid}/fd")
        )

    def check_answer(self, rng: np.random.Generator) -> None:
        q, k, v = (rng.standard_normal((3, heads, 16), np.float32) for heads in (2, 1, 1))
        with self.client.open_session(self.model) as session:
            out = self.client.attend(0, [(session, 0, 3)], q, k, v).out
        for head in range(2):
            scores = q[:, head] @ k[:, 0].T / 4
            weights = np.exp(np.where(np.tri(3, dtype=bool), scores, -np.inf))
            right = weights @ v[:, 0] / weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(out[:, head], right, atol=1e-4)

    def close_sessions(self) -> None:
        for info in list(self.client.list_sessions(page_size=1000)):
            try:
                self.client.close_session(info.session_id)
            except fovea.NotFound:
                pass

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1


class Attacker:
    def __init__(self, service: Service, seed: int) -> None:
        self.service, self.rng = service, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.sessions: list[bytes] = []
        self.maker = mutate.Maker(self.rng, self.known)
        self.methods = [
            (f"/{service_.full_name}/{method.name}".encode(), method)
            for service_ in pb.DESCRIPTOR.services_by_name.values()
            for method in service_.methods
            if method.name not in LEFT_OUT
        ]

    def known(self, field: str) -> bytes | None:
        if field == "model_id":
            return self.service.model.encode()
        return self.rng.choice(self.sessions) if field == "session_id" and self.sessions else None

    def speak_badly(self) -> None:
        name = self.rng.choice(list(h2.ATTACKS))
        connection = h2.Connection(self.service.path, 0.5)
        try:
            connection.send(h2.ATTACKS[name](self.rng))
            if self.rng.random() < 0.3:
                connection.linger(self.rng.choice((0.001, 0.02)))
        except AssertionError:  # it does not read on from somebody who does not read its answers
            self.counts["(not read to the end)"] += 1
        connection.close()
        self.counts[name] += 1

    def send_mutants(self) -> None:
        connection = h2.Connection(self.service.path)
        connection.hello()
        streams, endless = set(), []
        for i in range(CALLS):
            path, method = self.rng.choice(self.methods)
            stream = 2 * i + 1
            body = self.maker.message(method.input_type, self.rng.random() < 0.7)
            if method.name == "Attend" and self.rng.random() < 0.5:  # several messages on one stream
                more = self.maker.message(method.input_type)
                data = h2.message(body) + h2.message(more)
                head = h2.frame(h2.HEADERS, h2.END_HEADERS, stream, h2.fields(h2.call_fields(path)))
                connection.exchange(head + h2.frame(h2.DATA, h2.END_STREAM, stream, data))
            else:
                connection.exchange(h2.call(stream, path, body))
            if method.name in STREAMS:
                endless.append(stream)
            else:
                streams.add(stream)
            self.counts[method.name] += 1
        for stream in endless:
            connection.exchange(h2.frame(h2.RST, 0, stream, bytes(4)))
        connection.wait_ended(streams)
        assert not connection.is_closed, "the service closed a connection whose HTTP/2 was right"
        connection.close()

    def round(self) -> None:
        client = self.service.client
        self.sessions = [client.open_session(self.service.model).id.encode() for _ in range(4)]
        for _ in range(ATTACKS):
            self.speak_badly()
        self.send_mutants()
        self.service.check_answer(np.random.default_rng(self.rng.randrange(2**32)))
        self.service.close_sessions()

    @property
    def n_done(self) -> int:
        return sum(n for name, n in self.counts.items() if not name.startswith("("))


def settle(service: Service, n_fds: int) -> tuple[int, int]:
    """Resources when closed connections are gone."""
    deadline = time.monotonic() + 20
    while (now := service.resources())[1] > n_fds + FDS and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def run(service: Service, options: argparse.Namespace) -> tuple[Counter[str], list[str]]:
    attacker = Attacker(service, options.seed)
    service.check_answer(np.random.default_rng(0))
    rss, n_fds = service.resources()
    worst = rss
    begin = time.monotonic()
    problems = []
    while attacker.n_done < options.executions and time.monotonic() - begin < options.seconds:
        try:
            attacker.round()
        except (AssertionError, OSError, fovea.FoveaError) as error:
            problems.append(f"after {attacker.n_done} executions: {type(error).__name__}: {error}")
            break
        now = settle(service, n_fds)
        worst = max(worst, now[0])
        if now[0] > rss + RSS_MIB or now[1] > n_fds + FDS:
            problems.append(f"{now[0]} MiB and {now[1]} descriptors, at first {rss} and {n_fds}")
            break
    now = service.resources() if service.process.poll() is None else (0, 0)
    print(f"{attacker.n_done} executions in {time.monotonic() - begin:.0f} s; resident MiB {rss} at first, {worst} at most, "
          f"{now[0]} now; descriptors {n_fds} at first, {now[1]} now")  # fmt: skip
    return attacker.counts, problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fovead", type=Path, required=True)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FV_SEED", "1")))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fv-live-") as folder:
        service = Service(Path(folder), options.fovead.resolve())
        try:
            counts, problems = run(service, options)
        finally:
            code = service.stop()
        log = service.log.read_text(errors="replace")
    if code != 0 or "Sanitizer" in log or "runtime error" in log:
        problems.append(f"exit code {code}:\n{log[-6000:]}")
    print(", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    for problem in problems:
        print(f"FAILED (seed {options.seed}): {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

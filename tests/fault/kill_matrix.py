"""kill_matrix.py - ranks, spares, the coordinator and mpirun are killed and stopped; what was acknowledged stays.

python tests/fault/kill_matrix.py --fovead build/bin/fovead_faulty [--runs N] [--seed S] [--durability LEVEL]

A run: a service of 3 ranks and 1 spare under fovead-run; one client appends tokens to sessions that lie on all
ranks and on one, one request at a time, and goes through one fault. Then every output must be bit for bit what an
undisturbed run gave, and every session as long as what was acknowledged. Without durability the sessions of a
process that is gone may be lost, said so (DATA_LOSS, NOT_FOUND after a restart); they are begun anew then.

Faults come at each of the ten stations of a step (common/fault.h), or at random times. Prints a table, and at
the end how long clients waited from the fault to the next acknowledged token.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fovea
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
N_RANKS = 3
SPARE = N_RANKS  # its process
STEPS = 24
SPEC = fovea.ModelSpec(
    name="kill-matrix", n_layers=2, n_q_heads=6, n_kv_heads=3, head_dim_qk=32, kv_dtype="f32"
)
SHARDINGS = (
    fovea.Sharding("context", shard_tokens=64),
    fovea.Sharding("heads"),
    None,
)
PREFILL = 200


class Job:
    """A service under fovead-run."""

    def __init__(self, folder: Path, fovead: Path, fault: str | None, options: list[str]) -> None:
        self.address = f"unix:{folder}/s"
        self.log = folder / "log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if fault is not None:
            environment |= {"FV_FAULT": fault, "FV_FAULT_ONCE": str(folder / "once")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(ROOT / "deploy/fovead-run"), "--fovead", str(fovead), "-n", str(N_RANKS), "--spares", "1",
                 "--listen", self.address, "--kv-memory", "32m", "--threads", "1", *options],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def pid_of(self, process: int) -> int | None:
        """The pid of an MPI process of the job."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                is_it = f"OMPI_COMM_WORLD_RANK={process}".encode() in environment
                if is_it and self.address.encode() in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        return None

    def mpirun(self) -> int | None:
        rank_0 = self.pid_of(0)
        if rank_0 is None:
            return None
        return int(Path(f"/proc/{rank_0}/stat").read_text().rpartition(")")[2].split()[1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def output(self) -> str:
        return self.log.read_text(errors="replace")


class Sequence:
    """One session and what it must answer."""

    def __init__(self, client: fovea.Client, number: int) -> None:
        self.number = number
        self.n_lost = 0
        self.open(client)

    def open(self, client: fovea.Client) -> None:
        self.session = client.open_session(
            client.register_model(SPEC), max_tokens_hint=PREFILL + STEPS, sharding=SHARDINGS[self.number]
        )
        self.lengths = [0] * SPEC.n_layers
        rng = np.random.default_rng(self.number)
        n = PREFILL + STEPS
        self.q, self.k, self.v = (
            rng.standard_normal((SPEC.n_layers, n, heads, 32), dtype=np.float32)
            for heads in (SPEC.n_q_heads, SPEC.n_kv_heads, SPEC.n_kv_heads)
        )

    def attend(self, client: fovea.Client, layer: int, n: int) -> np.ndarray:
        at = self.lengths[layer]
        cut = slice(at, at + n)
        result = client.attend(
            layer, [(self.session, at, n)], self.q[layer, cut], self.k[layer, cut], self.v[layer, cut]
        )
        self.lengths[layer] += n
        return result.out


def plan() -> Iterator[tuple[int, int, int]]:
    """(step, sequence, layer): the same in every run."""
    return iter(itertools.product(range(STEPS + 1), range(len(SHARDINGS)), range(SPEC.n_layers)))


def drive(job: Job, fault_at: float | None, act) -> tuple[dict, list[Sequence], float]:
    """All requests of a run; its outputs by (step, sequence, layer), and the longest wait."""
    outputs = {}
    longest = 0.0
    begin = time.monotonic()
    with fovea.connect(job.address, timeout=30, retry=30) as client:
        sequences = [Sequence(client, i) for i in range(len(SHARDINGS))]
        for step, number, layer in plan():
            if fault_at is not None and time.monotonic() - begin >= fault_at:
                act()
                fault_at = None
            called = time.monotonic()
            s = sequences[number]
            try:
                outputs[step, number, layer] = s.attend(client, layer, PREFILL if step == 0 else 1)
            except fovea.FoveaError as error:
                if error.code.name not in ("DATA_LOSS", "NOT_FOUND"):
                    raise
                s.n_lost += 1
                s.open(client)
                for redo in range(step + 1):
                    for each in range(layer + 1 if redo == step else SPEC.n_layers):
                        outputs[redo, number, each] = s.attend(client, each, PREFILL if redo == 0 else 1)
            longest = max(longest, time.monotonic() - called)
        for s in sequences:
            lengths = list(s.session.info().layer_tokens)
            assert lengths == s.lengths, f"lengths {lengths}, acknowledged {s.lengths}"
    return outputs, sequences, longest


def faults(rng: random.Random, n_runs: int) -> Iterator[tuple[str, str | None, str, str]]:
    """(name, FV_FAULT or None, victim, signal): stations first, then random times, round and round."""
    stations = [(1, s) for s in (5, 6, 7, 8, 9, 10)] + [(0, s) for s in range(1, 11)]
    fixed = [(who, s, kind) for kind in ("kill", "stop") for who, s in stations]
    loose = [(v, k) for k in ("KILL", "STOP") for v in ("worker", "spare", "coordinator", "mpirun")]
    loose.remove(("mpirun", "STOP"))  # it has no part in a step: nothing happens
    for i in range(n_runs):
        if i % (len(fixed) + len(loose)) < len(fixed):
            who, s, kind = fixed[i % (len(fixed) + len(loose))]
            count = rng.randint(8, 2 * STEPS)
            yield f"{kind} {'coordinator' if who == 0 else 'worker'} at station {s}, time {count}", \
                f"{who}:{s}:{count}:{kind}", "", ""
        else:
            victim, kind = loose[i % (len(fixed) + len(loose)) - len(fixed)]
            yield f"{kind.lower()} {victim} at a random time", None, victim, kind


def one_run(fovead: Path, options: list[str], rng: random.Random, fault, expected) -> tuple[dict, float, int]:
    name, text, victim, kind = fault

    def act() -> None:
        pids = {"worker": rng.choice([1, 2]), "spare": SPARE, "coordinator": 0}
        pid = job.mpirun() if victim == "mpirun" else job.pid_of(pids[victim])
        assert pid is not None, f"no {victim}"
        os.kill(pid, getattr(signal, "SIG" + kind))

    with tempfile.TemporaryDirectory(prefix="fv-") as folder:
        job = Job(Path(folder), fovead, text, options)
        try:
            outputs, sequences, longest = drive(job, rng.uniform(0.0, 0.3) if victim else None, act)
            if text is not None:
                assert (Path(folder) / "once").exists(), "the fault did not happen"
            if expected is not None:
                assert outputs.keys() == expected.keys()
                for key, out in outputs.items():
                    if sequences[key[1]].n_lost > 0:  # it lies elsewhere now: merged in another order
                        np.testing.assert_allclose(out, expected[key], rtol=1e-5, atol=1e-6)
                    else:
                        assert out.tobytes() == expected[key].tobytes(), f"other bits at {key}"
            assert job.stop() == 0, "no clean stop"
            return outputs, longest, sum(s.n_lost for s in sequences)
        except BaseException:
            sys.stderr.write(f"--- {name}\n{job.output()}\n")
            if job.process.poll() is None:
                job.process.kill()
            raise


def percentile(values: list[float], p: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(p * len(values)))] if values else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fovead", type=Path, required=True, help="fovead_faulty of a build with tests")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FV_SEED", "1")))
    parser.add_argument("--only", default="", help="faults whose name has this")
    parser.add_argument("--durability", default="process", help="of the service")
    parser.add_argument("options", nargs="*", help="of fovead-run")
    args = parser.parse_args()
    if not any(args.only in name for name, *_ in faults(random.Random(args.seed), args.runs)):
        parser.error(f'--only: given "{args.only}", expected a part of a fault that is among {args.runs} runs')
    rng = random.Random(args.seed)
    options = ["--restarts", "5", *args.options]
    options += ["--durability", args.durability]
    print(f"seed {args.seed}, {args.runs} runs, durability {args.durability}", flush=True)
    expected, _, _ = one_run(args.fovead, options, rng, ("undisturbed", None, "", ""), None)
    one_run(args.fovead, options, rng, ("undisturbed, again", None, "", ""), expected)
    waits: dict[str, list[float]] = {}
    n_failed = n_lost = n = 0
    for fault in faults(rng, args.runs):
        if args.only not in fault[0]:
            continue
        n += 1
        try:
            _, longest, lost = one_run(args.fovead, options, rng, fault, expected)
        except Exception as error:  # noqa: BLE001 (the others are run all the same)
            n_failed += 1
            print(f"FAIL  {fault[0]}: {type(error).__name__}: {error}", flush=True)
            continue
        if lost and args.durability != "none":
            n_failed += 1
            print(f"FAIL  {fault[0]}: {lost} sessions lost", flush=True)
            continue
        n_lost += lost
        kind = " ".join(fault[0].split()[:2])
        waits.setdefault(kind, []).append(longest)
        anew = f", {lost} sessions begun anew" if lost else ""
        print(f"ok    {fault[0]}: {longest * 1000:.0f} ms{anew}", flush=True)
    print(f"{n} runs, {n_failed} failed; acknowledged tokens lost: 0, doubled: 0, outputs of other bits: 0"
          if n_failed == 0 else f"{n} runs, {n_failed} FAILED")  # fmt: skip
    for kind, values in waits.items():
        print(f"{kind:18} longest wait of a client: p50 {percentile(values, .5) * 1000:5.0f} ms, "
              f"p99 {percentile(values, .99) * 1000:5.0f} ms, n {len(values)}")  # fmt: skip
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())

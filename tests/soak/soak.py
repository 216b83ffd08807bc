"""soak.py - a service under mixed load for a long time: nothing grows, nothing is left behind, answers stay right.

python tests/soak/soak.py --fovead build/release/bin/fovead [--seconds 1800] [--clients 8] [--ranks 3] [--seed S]
                          [--pause-ms MS] [--check-every N] [--csv FILE]

Starts the service under fovead-run, and clients (traffic.py), each a process. Every sample has memory, descriptors and threads
of each rank, and bytes of the store. After a warm-up (a fifth of the time) private memory, descriptors, threads and the store
must not grow. (Resident memory is shown: what it has beside is the store's pages, and code.) The store's journals grow
until they are written anew, so its maxima are compared, and what may grow is a whole tooth of each: journals that are
never written anew show in half an hour of full traffic, not in a short run. At the end there is no session and every
page is free; after the stop no file of the job is left, in the store, in /dev/shm, among session directories. Prints a table
over time. Exit code 0 only if all of it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import fovea

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KV_MEMORY = "64m"
GROWTH_KIB = 4096  # of a rank's private memory after the warm-up, in a long run
SHORT_S, SHORT_KIB = 60, 16384  # a short one may grow more: pools still find out what they need
# By more than this journals grow until they are written anew: worker/store.c and coord/ledger.c.
TOOTH_KIB, LEDGER_TOOTH_KIB = 16 << 10, 64 << 10
AHEAD_KIB = 1024  # of a journal: allocated ahead, and the new file beside the old one
N_ROWS = 20  # of the table


@dataclass(frozen=True)
class Sample:
    seconds: float
    private_kib: list[int]  # by rank
    resident_kib: list[int]
    n_fds: list[int]
    n_threads: list[int]
    store_kib: int


class Job:
    """The service, with every file that it makes below one folder, or known by name."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.address = f"unix:{folder}/s"
        self.log, self.temporary, self.store = folder / "log", folder / "tmp", folder / "store"
        self.temporary.mkdir()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [ROOT / "deploy/fovead-run", "--fovead", options.fovead, "-n", str(options.ranks),
                 "--listen", self.address, "--kv-memory", KV_MEMORY, "--threads", "1",
                 "--store-dir", str(self.store)],
                stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary)},  # of session directories
            )  # fmt: skip
        fovea.connect(self.address, timeout=60, retry=60).close()
        self.pids = self._ranks(options.ranks)
        self.shared = self._shared_files()

    def _ranks(self, n_ranks: int) -> list[int]:
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if self.address.encode() in words and words[0].endswith(b"fovead"):
                    environment = dict(
                        line.split(b"=", 1)
                        for line in (entry / "environ").read_bytes().split(b"\0")
                        if b"=" in line
                    )
                    found[int(environment[b"OMPI_COMM_WORLD_RANK"])] = int(entry.name)
        assert sorted(found) == list(range(n_ranks)), f"ranks found: {found}"
        return [found[rank] for rank in sorted(found)]

    def _shared_files(self) -> set[str]:
        """What the ranks have mapped of /dev/shm."""
        files = set()
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    files.add(line[line.index("/dev/shm/") :].removesuffix(" (deleted)"))
        return files

    def sample(self, seconds: float) -> Sample:
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]

        def value(name: str) -> list[int]:
            return [int(text.split(f"{name}:")[1].split()[0]) for text in status]

        with contextlib.suppress(FileNotFoundError):
            self.shared |= self._shared_files()
        return Sample(
            seconds,
            private_kib=value("RssAnon"),
            resident_kib=value("VmRSS"),
            n_fds=[len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids],
            n_threads=value("Threads"),
            store_kib=sum(f.stat().st_blocks // 2 for f in self.store.rglob("*") if f.is_file()),
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -1

    def left(self) -> list[str]:
        """Files that outlived the job."""
        below = [str(f) for folder in (self.store, self.temporary) for f in folder.rglob("*")]
        return below + sorted(f for f in self.shared if Path(f).exists())


def start_clients(address: str, options: argparse.Namespace) -> list[subprocess.Popen]:
    """All of them are connected on return."""
    words = [sys.executable, str(HERE / "traffic.py"), address]
    clients = [
        subprocess.Popen(
            [*words, str(options.seed * 1000 + i), str(options.pause_ms), str(options.check_every)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(options.clients)
    ]  # fmt: skip
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    return clients


def watch(job: Job, clients: list[subprocess.Popen], seconds: float) -> list[Sample]:
    """Samples until the time is over, or somebody is gone."""
    samples = []
    begin = time.monotonic()
    every = max(seconds / 200, 0.25)
    while (now := time.monotonic() - begin) < seconds:
        if job.process.poll() is not None or any(c.poll() is not None for c in clients):
            break
        samples.append(job.sample(now))
        time.sleep(every)
    return samples


def stop_clients(clients: list[subprocess.Popen]) -> tuple[Counter[str], list[str]]:
    total: Counter[str] = Counter()
    failed = []
    worst = 0.0
    for client in clients:
        try:
            out, err = client.communicate("", timeout=120)
        except subprocess.TimeoutExpired:
            client.kill()
            out, err = client.communicate()
            err += "(it did not end)"
        if client.returncode == 0:
            counts = json.loads(out)
            worst = max(worst, counts.pop("worst_ms"))
            total.update(counts)
        else:
            failed.append(f"a client failed ({client.returncode}): {err[-2000:]}")
    total["worst_ms"] = round(worst)
    return total, failed


def growth(samples: list[Sample]) -> list[str]:
    """What grew after the warm-up: medians of the first and of the last fifth behind it; see store_growth()."""
    problems = []
    rest = samples[len(samples) // 5 :]
    fifth = max(len(rest) // 5, 1)
    kib = GROWTH_KIB + int(SHORT_KIB * min(1.0, SHORT_S / samples[-1].seconds))
    for field, may in (("private_kib", kib), ("n_fds", 4), ("n_threads", 2)):
        for rank in range(len(samples[0].n_fds)):
            first, last = (
                statistics.median(getattr(s, field)[rank] for s in part)
                for part in (rest[:fifth], rest[-fifth:])
            )
            if last > first + may:
                problems.append(
                    f"rank {rank}: {field} grew from {first:.0f} to {last:.0f} (at most {may} more)"
                )
    return problems + store_growth(rest, len(samples[0].n_fds))


def store_growth(samples: list[Sample], n_ranks: int) -> list[str]:
    """Maxima of the first and of the last third: the first may have seen the foot alone of each tooth."""
    third = max(len(samples) // 3, 1)
    first, last = (max(s.store_kib for s in part) for part in (samples[:third], samples[-third:]))
    may = n_ranks * (TOOTH_KIB + AHEAD_KIB) + LEDGER_TOOTH_KIB + AHEAD_KIB
    return [f"store_kib grew from {first} to {last} (at most {may} more)"] if last > first + may else []


def check_empty(job: Job) -> list[str]:
    """No session is left, and no page: also of clients that vanished."""
    deadline = time.monotonic() + 20
    with fovea.connect(job.address, timeout=20) as client:
        while True:
            status = client.status()
            if status.n_sessions == 0 and status.kv_bytes_free == status.kv_bytes_total:
                return []
            if time.monotonic() > deadline:
                used = status.kv_bytes_total - status.kv_bytes_free
                return [f"{status.n_sessions} sessions and {used} bytes of KV are left"]
            time.sleep(0.2)


def print_table(samples: list[Sample]) -> None:
    def row(values: list[int]) -> str:
        return " ".join(f"{value:7d}" for value in values)

    print("seconds | private KiB by rank | resident KiB by rank | descriptors | threads | store KiB")
    for sample in samples[:: max(len(samples) // N_ROWS, 1)]:
        print(
            f"{sample.seconds:7.0f} | {row(sample.private_kib)} | {row(sample.resident_kib)} | "
            f"{row(sample.n_fds)} | {row(sample.n_threads)} | {sample.store_kib}"
        )


def write_csv(path: Path, samples: list[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        fields = ("private_kib", "resident_kib", "n_fds", "n_threads")
        ranks = range(len(samples[0].n_fds))
        writer.writerow(["seconds", *(f"{name}_{rank}" for name in fields for rank in ranks), "store_kib"])
        for s in samples:
            writer.writerow(
                [
                    f"{s.seconds:.1f}",
                    *(getattr(s, name)[rank] for name in fields for rank in ranks),
                    s.store_kib,
                ]
            )


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    job = Job(folder, options)
    problems: list[str] = []
    try:
        clients = start_clients(job.address, options)
        samples = watch(job, clients, options.seconds)
        counts, problems = stop_clients(clients)
        if job.process.poll() is None:
            problems += check_empty(job)
        else:
            problems.append(f"the service ended ({job.process.returncode}):\n{job.log.read_text()[-2000:]}")
    finally:
        code = job.stop()
    if code != 0:
        problems.append(f"the stop gave exit code {code}:\n{job.log.read_text()[-2000:]}")
    time.sleep(1)  # the launcher's own processes leave
    problems += [f"left behind: {name}" for name in job.left()]
    print_table(samples)
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if counts["compared"] == 0 or counts["vanished"] == 0 and options.seconds >= 60:
        problems.append("no answer was compared, or no client vanished: nothing is shown")
    if options.csv is not None:
        write_csv(options.csv, samples)
    return problems + growth(samples)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fovead", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--pause-ms", type=int, default=5, help="between two things a client does, on average"
    )
    parser.add_argument(
        "--check-every", type=int, default=20, help="of a client's answers, one in so many is compared"
    )
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    options.fovead = options.fovead.resolve()
    with tempfile.TemporaryDirectory(prefix="fv-soak-", dir="/dev/shm") as folder:
        problems = run(options, Path(folder))
    for problem in problems:
        print(f"FAILED: {problem}")
    print("ok" if not problems else f"{len(problems)} problems (seed {options.seed})")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

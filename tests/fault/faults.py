"""faults.py - a service under fovead-run whose processes a test kills or stops, and the page they share with it.

The page is tests/support/fault_hook.c's fault_page_t: a fault at a station is armed here and happens there, in
whichever process of the class comes by. Random times need pids: every process writes its own into the page.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import struct
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

STATIONS, CLASSES, PROCESS_MAX = 11, 2, 4096
COUNTDOWN, HITS, PROCESSES, VISITS = 12, 16, 20, 24
TABLE = VISITS + 4 * CLASSES * STATIONS
PAGE_BYTES = TABLE + 12 * PROCESS_MAX


def is_running(pid: int) -> bool:
    """Alive, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Page:
    """The shared page."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(PAGE_BYTES))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), PAGE_BYTES)

    def _int(self, at: int) -> int:
        return struct.unpack_from("i", self.map, at)[0]

    def _set(self, at: int, value: int) -> None:
        struct.pack_into("i", self.map, at, value)

    def arm(self, is_worker: bool, station: int, count: int, number: int) -> None:
        self._set(COUNTDOWN, 0)
        self._set(HITS, 0)
        for i, value in enumerate((int(is_worker), station, number)):
            self._set(4 * i, value)
        self._set(COUNTDOWN, count)

    def disarm(self) -> bool:
        """Whether the fault has happened."""
        self._set(COUNTDOWN, 0)
        return self._int(HITS) > 0

    def visits(self) -> dict[tuple[bool, int], int]:
        """How often each station was passed: by (is a worker, station)."""
        return {
            (bool(c), s): self._int(VISITS + 4 * (c * STATIONS + s)) for c in range(CLASSES) for s in range(STATIONS)
        }

    def processes(self) -> list[tuple[int, int, bool]]:
        """(pid, number in MPI_COMM_WORLD or -1, has worked) of those that run."""
        found = (struct.unpack_from("iii", self.map, TABLE + 12 * i) for i in range(self._int(PROCESSES)))
        return [(pid, number, bool(worked)) for pid, number, worked in found if pid > 0 and is_running(pid)]


class Job:
    """A service under fovead-run. prefix: what it is started through (another host's shell)."""

    def __init__(self, folder: Path, fovead: Path, n_ranks: int, address: str, options: list[str],
                 prefix: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.n_ranks = n_ranks
        self.address = address
        self.log = folder / "log"
        self.page = Page(folder / "page")
        environment = {**os.environ, "FV_FAULT_PAGE": str(folder / "page")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, str(ROOT / "deploy/fovead-run"), "--fovead", str(fovead), "-n", str(n_ranks),
                 "--listen", address, *options],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def await_start(self, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while "listening on" not in self.output():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError("the service does not start")
            time.sleep(0.02)

    def pids(self, victim: str) -> list[int]:
        """Of a class: coordinator, worker, spare, mpirun."""
        running = self.page.processes()
        if victim == "mpirun":
            return [self._parent(pid) for pid, number, _ in running if number == 0]
        return [pid for pid, number, worked in running if self._class_of(number, worked) == victim]

    def _class_of(self, number: int, has_worked: bool) -> str:
        if number == 0:
            return "coordinator"
        return "worker" if number < self.n_ranks or has_worked else "spare"

    @staticmethod
    def _parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def counts(self) -> dict[str, int]:
        """What has followed losses so far."""
        text = self.output()
        return {
            "spare": text.count("takes its place"),
            "anew": text.count("a process is started in its place"),
            "restart": text.count("starting again"),
        }

    def last_repair_ms(self) -> str:
        """What the service itself says of it."""
        found = re.findall(r"repaired in (\d+) ms", self.output())
        return found[-1] if found else "?"

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        for pid, _, _ in self.page.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(10)
        self.process.kill()

"""conftest.py - which service the tests talk to.

pytest tests/python                            the numpy model of the service, mock_service.py
FOVEAD=/path/to/fovead pytest tests/python     the service; FV_TEST_RANKS=3: under mpirun -np 3
FV_SEED=7                                      the seed of every random test (printed at the top)
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import fovea

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SEED = int(os.environ.get("FV_SEED", "20"))
START_SECONDS = 30


# a service goes when pytest is killed
_TIED_TO_US = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


class Service:
    """A running service on a unix socket. Everything it prints is in `log`."""

    def __init__(self, folder: Path, kv_memory: str | None = None, options: Sequence[str] = ()) -> None:
        self.address = f"unix:{folder}/fovea.sock"
        self.log = folder / "service.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*_TIED_TO_US, *self._command(kv_memory, options)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self.connect(START_SECONDS).close()
        except fovea.Unavailable:
            self.stop()
            pytest.fail(f"the service did not start:\n{self.output()}")

    def _command(self, kv_memory: str | None, options: Sequence[str]) -> list[str]:
        fovead = os.environ.get("FOVEAD")
        if fovead is None:
            n_bytes = int(kv_memory.removesuffix("m")) << 20 if kv_memory else 1 << 30
            return [sys.executable, str(HERE / "mock_server.py"), self.address, str(n_bytes)]
        ranks = os.environ.get("FV_TEST_RANKS")
        launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", ranks] if ranks else []
        extra = shlex.split(os.environ.get("FOVEAD_ARGS", ""))
        memory = ["--kv-memory", kv_memory or "512m"]
        return [*launch, fovead, "--listen", self.address, *memory, *extra, *options]

    def connect(self, timeout: float = 10.0) -> fovea.Client:
        # (little patience: a service that is stopped here does not come back)
        return fovea.connect(self.address, timeout=timeout, retry=0.5)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> int:
        """A clean stop; the exit code."""
        if self.is_running():
            # mpirun answers a SIGTERM by killing, and not every build of it passes SIGUSR1 on (docs/launch.md)
            if "FV_TEST_RANKS" in os.environ:
                for rank in _children(self.process.pid):
                    os.kill(rank, signal.SIGUSR1)
            else:
                self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            pytest.fail(f"the service did not stop:\n{self.output()}")


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def pytest_report_header() -> str:
    fovead = os.environ.get("FOVEAD")
    ranks = os.environ.get("FV_TEST_RANKS", "one process")
    return f"service: {f'{fovead} ({ranks})' if fovead else 'mock_server.py'}; FV_SEED={SEED}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fovead: needs the real service (env FOVEAD)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "FOVEAD" not in os.environ:
        for item in items:
            if item.get_closest_marker("fovead"):
                item.add_marker(pytest.mark.skip(reason="needs the real service: set FOVEAD"))


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fv-")  # short: a socket's path has 107 bytes at most


@pytest.fixture(scope="module")  # a service holds 64 models, and all tests together register more
def shared_service() -> Iterator[Service]:
    with _folder() as folder:
        service = Service(Path(folder))
        yield service
        service.stop()


@pytest.fixture
def service(shared_service: Service) -> Iterator[Service]:
    """A service shared by the tests of a file; it must survive each of them."""
    yield shared_service
    assert shared_service.is_running(), f"the service died:\n{shared_service.output()[-3000:]}"


@pytest.fixture
def own_service() -> Iterator[Callable[..., Service]]:
    """own_service(kv_memory="64m", options=[]): a service for this test alone; the options go to fovead only."""
    started: list[Service] = []
    with _folder() as folder:

        def start(kv_memory: str | None = None, options: Sequence[str] = ()) -> Service:
            place = Path(folder) / str(len(started))
            place.mkdir()
            started.append(Service(place, kv_memory, options))
            return started[-1]

        yield start
        for service in started:
            service.stop()


@pytest.fixture
def client(service: Service) -> Iterator[fovea.Client]:
    with service.connect() as client:
        yield client
        deadline = time.monotonic() + 5  # every test closes what it opens
        while client.status().n_sessions and time.monotonic() < deadline:
            for info in list(client.list_sessions()):
                client.close_session(info.session_id)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    random.seed(SEED)
    return np.random.default_rng([SEED, *request.node.name.encode()])

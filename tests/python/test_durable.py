"""test_durable.py - what survives when every process of the service is killed.

A script of random operations runs twice, with the same seed: undisturbed, and on a service whose processes
are all killed (SIGKILL) at random moments and started again. Every answer must have the same bits, every
acknowledged token must be there.

FV_KILLS=2000 pytest tests/python/test_durable.py -k random      the long version
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from conftest import SEED

import fovea

pytestmark = pytest.mark.fovead

RANKS = os.environ.get("FV_TEST_RANKS")
N_KILLS = int(os.environ.get("FV_KILLS", "15" if RANKS else "50"))
LAYERS = 3


def spec() -> fovea.ModelSpec:
    """A dense layer, one whose window lets pages die, and an S2 one."""
    return fovea.ModelSpec(
        name="durable",
        n_layers=LAYERS,
        n_q_heads=4,
        n_kv_heads=2,
        head_dim_qk=32,
        kv_dtype="bf16",
        policies=[
            fovea.LayerPolicy(fovea.Window(window_tokens=70, sink_tokens=4), [1]),
            fovea.LayerPolicy(fovea.S2(block_tokens=64, local_blocks=1, vert_stride=3), [2]),
        ],
    )


class Killable:
    """A service that is killed and started again on the same address and store."""

    all: ClassVar[list[Killable]] = []

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.address = f"unix:{folder}/fovea.sock"
        self.store = folder / "store"
        self.enter: list[str] = []  # the namespaces it runs in
        self.log = folder / "service.log"
        self.process: subprocess.Popen[bytes] | None = None
        Killable.all.append(self)

    def start(self) -> fovea.Client:
        launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", RANKS] if RANKS else []
        command = [
            *self.enter, *launch, os.environ["FOVEAD"], "--listen", self.address, "--kv-memory", "24m",
            "--store-dir", str(self.store), "--shard-tokens", "64",
            # how a prefill is cut into pieces must not depend on time, nor a sum on the cut
            "--prefill-tokens-per-step", "128", "--threads", "1", *self.options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.connect()

    def connect(self) -> fovea.Client:
        try:
            return fovea.connect(self.address, timeout=30, retry=0.0)  # the test retries
        except fovea.Unavailable:
            pytest.fail(f"the service did not start:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """All of its processes at once."""
        assert self.process is not None
        for pid in [self.process.pid, *_offspring(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            targets = _offspring(self.process.pid) if RANKS else [self.process.pid]
            for pid in targets:
                os.kill(pid, signal.SIGUSR1)
        return self.process.wait(30)


def _offspring(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_offspring(int(child))]
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fv-", dir="/dev/shm") as name:
        yield Path(name)
        for service in Killable.all:  # of a test that failed
            if service.process is not None and service.process.poll() is None:
                service.kill()
        Killable.all.clear()


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that is not memory."""
    with tempfile.TemporaryDirectory(
        prefix="fv-disk-", dir=os.environ.get("FV_TEST_DISK", "/var/tmp")
    ) as name:
        yield Path(name)


@dataclass
class Runner:
    """Plays the script; `again` brings the service back after it died, and is None where it never dies."""

    client: fovea.Client
    again: Callable[[], fovea.Client] | None
    rng: np.random.Generator
    choice: random.Random
    level: int = 0  # as replies name it
    model: str = ""
    sessions: list[str] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)

    def insist(self, call: Callable[[], Any], is_done: Callable[[Exception], bool] = lambda _: False) -> Any:
        """Repeats a call whose service died under it: the same request, at the same position."""
        while True:
            try:
                return call()
            except (fovea.Unavailable, fovea.Cancelled) as error:
                if self.again is None:
                    raise
                del error
                self.client = self.again()
            except fovea.FoveaError as error:
                if not is_done(error):
                    raise
                return None

    def open(self) -> None:
        self.model = self.insist(lambda: self.client.register_model(spec()))
        self.sessions.append(self.insist(lambda: self.client.open_session(self.model)).id)
        self.lengths.append([0] * LAYERS)

    def append(self, i: int) -> None:
        layer = self.choice.randrange(LAYERS)
        n = self.choice.choice([1, 1, 1, 5, 40, 90])
        q = self.rng.standard_normal((n, 4, 32), np.float32)
        k, v = (self.rng.standard_normal((n, 2, 32), np.float32) for _ in range(2))
        items = [(self.sessions[i], self.lengths[i][layer], n)]
        result = self.insist(lambda: self.client.attend(layer, items, q, k, v, want_lse=True))
        self.answers.append(result.out.tobytes() + result.lse.tobytes())
        self.lengths[i][layer] += n

    def fork(self, i: int) -> None:
        self.sessions.append(self.insist(lambda: self.client.fork_session(self.sessions[i])).id)
        self.lengths.append(list(self.lengths[i]))

    def truncate(self, i: int) -> None:
        """Back to nothing: of layers that free pages no other cut is sure to be possible."""
        self.insist(lambda: self.client.truncate_session(self.sessions[i], 0))
        self.lengths[i] = [0] * LAYERS

    def close(self, i: int) -> None:
        session = self.sessions.pop(i)
        self.lengths.pop(i)
        self.insist(
            lambda: self.client.close_session(session), lambda error: isinstance(error, fovea.NotFound)
        )

    def step(self) -> None:
        what = self.choice.random()
        if not self.sessions or (what < 0.04 and len(self.sessions) < 6):
            self.open()
            return
        i = self.choice.randrange(len(self.sessions))
        if what < 0.08 and len(self.sessions) < 6:
            self.fork(i)
        elif what < 0.10:
            self.truncate(i)
        elif what < 0.13:
            self.close(i)
        else:
            self.append(i)

    def check(self) -> None:
        """Every session is there, as long as it was acknowledged to be."""
        for session, lengths in zip(self.sessions, self.lengths, strict=True):
            info = self.insist(lambda session=session: self.client.session_info(session))
            assert list(info.layer_tokens) == lengths
            assert info.durability == self.level


def runner(client: fovea.Client, again: Callable[[], fovea.Client] | None, level: int = 0) -> Runner:
    return Runner(client, again, np.random.default_rng(SEED), random.Random(SEED), level)


@pytest.mark.parametrize("level", ["process", "host"])
def test_all_processes_are_killed_at_random_moments(folder: Path, disk: Path, level: str) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    n_kills = N_KILLS if level == "process" else max(N_KILLS // 3, 5)
    n_steps = n_kills * 12
    calm = Killable(folder / "a", "--durability", "none")
    expected = runner(calm.start(), None)
    for _ in range(n_steps):
        expected.step()
    assert calm.stop() == 0

    options = ["--durability", "host", "--disk-dir", str(disk / "logs")] if level == "host" else []
    service = Killable(folder / "b", *options)
    moments = random.Random(SEED + 1)
    n_starts = 0

    def again() -> fovea.Client:
        nonlocal n_starts
        if service.process is not None:
            service.kill()
        if level == "host" and n_starts % 2 == 1:  # what a host that was down has lost
            shutil.rmtree(service.store)
        n_starts += 1
        return service.start()

    got = runner(again(), again, 1 if level == "process" else 2)
    for n in range(n_steps):
        timer = None
        if n % 12 == 6:  # while one of the next operations runs
            timer = threading.Timer(moments.random() * 0.01, service.kill)
            timer.start()
        got.step()
        if timer is not None:
            timer.join()
        if n % 12 == 11:
            got.check()
    assert n_starts > n_kills // 2
    assert len(got.answers) == len(expected.answers)
    different = [i for i, (a, b) in enumerate(zip(got.answers, expected.answers, strict=True)) if a != b]
    assert different == []
    assert service.stop() == 0
    assert not service.store.exists(), sorted(service.store.rglob("*"))  # a clean stop leaves nothing
    assert not (disk / "logs").exists(), sorted(disk.rglob("*"))


def test_logs_of_a_disk_are_not_left_to_grow_old(folder: Path, disk: Path) -> None:
    """A lower level would go on in memory alone, and the disk's older state be believed one day."""
    logs = ["--disk-dir", str(disk / "logs")]
    service = Killable(folder, "--durability", "host", *logs)
    play = runner(service.start(), None)
    play.open()
    service.kill()
    service.options = ("--durability", "process", *logs)
    with pytest.raises(pytest.fail.Exception):
        service.start()
    service.kill()
    assert "expected host" in service.log.read_text() and "fovea store rm --dir" in service.log.read_text()
    service.options = ("--durability", "host", *logs)
    service.start()
    assert service.stop() == 0


@pytest.mark.parametrize("level", ["process", "host"])
def test_latents_come_back(folder: Path, disk: Path, level: str) -> None:
    """Of slices, too, with their norms: the same bits as before."""
    options = ["--durability", level] + (["--disk-dir", str(disk / "logs")] if level == "host" else [])
    service = Killable(folder, *options)
    client = service.start()
    rng = np.random.default_rng(SEED)
    tokens, heads, latent, rope = 150, 4, 256, 64
    kv = rng.standard_normal((tokens, latent + rope), np.float32)
    q = rng.standard_normal((tokens, heads, latent + rope), np.float32)
    sessions = []
    sliced = {
        "sharding": fovea.Sharding("latent", groups=2),
        "latent_norm": fovea.SliceRms(1e-6, [2.0, 2.0]),
    }
    for more in ({}, sliced) if RANKS else ({},):  # one rank holds no slices
        spec = fovea.ModelSpec(
            name=f"latent{len(more)}",
            n_layers=1,
            n_q_heads=heads,
            kind="latent",
            latent_dim=latent,
            rope_dim=rope,
            kv_dtype="bf16",
            softmax_scale=0.1,
            **more,
        )
        sessions.append(client.open_session(client.register_model(spec)).id)
        client.attend(0, [(sessions[-1], 0, tokens)], q, kv, None)

    def ask(client: fovea.Client) -> list[bytes]:
        calls = [client.attend(0, [(id, tokens - 1, 1)], q[-1:], None, None, append=False) for id in sessions]
        return [call.out.tobytes() for call in calls]

    before = ask(client)
    for _ in range(2):
        service.kill()
        if level == "host":
            shutil.rmtree(service.store)
        client = service.start()
        assert ask(client) == before
    assert service.stop() == 0


def _records(journal: bytearray) -> list[tuple[int, int]]:
    """Type and place of the body of each record of a journal (common/journal_format.h)."""
    found: list[tuple[int, int]] = []
    at = 4096
    while journal[at : at + 4] == b"FREC":
        kind, _, _, n_bytes = struct.unpack_from("<HHII", journal, at + 4)
        found.append((kind, at + 32))
        at += 32 + (n_bytes + 7) // 8 * 8
    return found


def test_a_session_with_damaged_records_answers_data_loss(folder: Path) -> None:
    service = Killable(folder)
    play = runner(service.start(), None)
    for i in range(2):
        play.open()
        play.append(i)
    service.kill()
    [path] = service.store.rglob("coordinator.journal")
    journal = bytearray(path.read_bytes())
    appends = [at for kind, at in _records(journal) if kind == 4]  # FV_LEDGER_APPEND
    assert len(appends) == 2
    journal[appends[0]] ^= 1
    path.write_bytes(journal)
    play.client = service.start()
    lost, kept = play.sessions
    for _ in range(2):
        with pytest.raises(fovea.FoveaError, match="was lost: its records are damaged") as caught:
            play.client.session_info(lost)
        assert caught.value.code.name == "DATA_LOSS"
    assert list(play.client.session_info(kept).layer_tokens) == play.lengths[1]
    play.append(1)
    assert service.stop() == 0


def test_what_ends_with_its_stream_ends_after_a_restart(folder: Path) -> None:
    service = Killable(folder)
    client = service.start()
    model = client.register_model(spec())
    rows = np.ones((1, 4, 32), np.float32)

    def use(client: fovea.Client, id: str, at: int) -> fovea.AttendStream:
        stream = client.stream()
        stream.submit(0, [(id, at, 1)], rows, rows[:, :2], rows[:, :2]).result(30)
        return stream

    left, taken = (client.open_session(model, close_with_stream=True).id for _ in range(2))
    stays = client.open_session(model).id
    streams = [use(client, id, 0) for id in (left, taken)]
    service.kill()
    client = service.start()
    assert len(list(client.list_sessions())) == 3  # a client that comes back finds what it had
    streams.append(use(client, taken, 1))
    end = time.monotonic() + 30
    while len(list(client.list_sessions())) == 3 and time.monotonic() < end:
        time.sleep(0.2)
    assert {s.session_id for s in client.list_sessions()} == {taken, stays}
    streams[-1].close()
    while len(list(client.list_sessions())) == 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert {s.session_id for s in client.list_sessions()} == {stays}
    assert service.stop() == 0


@pytest.fixture
def small_disk(folder: Path) -> Iterator[tuple[list[str], Path]]:
    """A file system of 96 MiB at `folder`/disk: the prefix of commands that see it, and where others find it."""
    disk = folder / "disk"
    disk.mkdir()
    script = f"mount -t tmpfs -o size=96m small {disk} && echo mounted && exec sleep 300"
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout is not None
            said = holder.stdout.readline()
            if said != "mounted\n":
                pytest.skip(f"this system lets nobody mount a file system of his own: {said}")
            enter = ["nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials"]
            yield enter, Path(f"/proc/{holder.pid}/root{disk}")
        finally:
            holder.kill()


def until_refused(call: Callable[[int], Any], at_most: int) -> int:
    """How often it went well before RESOURCE_EXHAUSTED."""
    for i in range(at_most):
        try:
            call(i)
        except fovea.FoveaError as error:
            assert error.code.name == "RESOURCE_EXHAUSTED", error
            return i
    return at_most


def test_a_full_file_system_refuses_and_ends_nothing(
    folder: Path, small_disk: tuple[list[str], Path]
) -> None:
    service = Killable(folder)
    service.enter, seen = small_disk
    service.store = folder / "disk/store"
    client = service.start()
    model = client.register_model(fovea.ModelSpec("full", 1, 2, 2, 32, kv_dtype="f32"))
    ids = [client.open_session(model).id for _ in range(20)]
    rows = np.ones((5000, 2, 32), np.float32)

    def attend(at: int, n: int, append: bool = True) -> np.ndarray:
        kv = rows[:n] if append else None
        return client.attend(0, [(ids[0], at, n)], rows[:n], kv, kv, append=append).out

    def length() -> int:
        return client.session_info(ids[0]).layer_tokens[0]

    attend(0, 4000)
    with (seen / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="space"):
        while True:
            filler.write(bytes(4096))
    for _ in range(3000):
        client.truncate_session(ids[0], 4000)  # cuts nothing, needs nothing
    assert until_refused(lambda i: attend(4000 + i, 1), 20000) < 20000
    n = length()
    n -= until_refused(lambda i: client.truncate_session(ids[0], n - 1 - i), n - 1000)
    assert length() == n
    until_refused(lambda _: client.open_session(model).close(), 100)
    for id in ids[15:]:
        client.close_session(id)
    service.kill()
    client = service.start()  # there is no room for new journals
    assert {s.session_id for s in client.list_sessions()} == set(ids[:15])
    assert length() == n
    np.testing.assert_allclose(attend(0, 1, append=False), 1.0, rtol=1e-5)
    client.close_session(ids[14])
    (seen / "filler").unlink()
    attend(n, 5)
    client.open_session(model).close()
    service.kill()
    client = service.start()
    assert length() == n + 5
    assert {s.session_id for s in client.list_sessions()} == set(ids[:14])
    assert service.stop() == 0

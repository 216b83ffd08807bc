"""access.py - certificates, token files and a service with both, for the tests of who may come in."""

from __future__ import annotations

import hashlib
import secrets
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fovea
from fovea._pb import attention_pb2 as pb

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"


def _openssl(*words: str | Path, cwd: Path) -> None:
    subprocess.run(["openssl", *map(str, words)], cwd=cwd, check=True, capture_output=True, timeout=30)


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def authority(folder: Path, name: str) -> None:
    """A certificate authority: name.pem, name.key."""
    subject = ("-subj", f"/CN={name}", "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    _openssl("req", "-x509", *_KEY, *subject, cwd=folder)


def certificate(folder: Path, ca: str, name: str) -> None:
    """name.pem and name.key, signed by `ca`, for this host."""
    _openssl(
        "req", *_KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=folder
    )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    signer = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
    _openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signer, cwd=folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Tokens:
    """A token file that the test writes; tokens by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.of: dict[str, str] = {}
        self._lines: dict[str, str] = {}
        self.path.write_text("# none yet\n")

    def add(self, name: str, role: str = "user", **entries: object) -> str:
        token = f"fv_{secrets.token_hex(32)}"
        digest = hashlib.sha256(token.encode()).hexdigest()
        words = [name, role, f"sha256={digest}", *(f"{k}={v}" for k, v in entries.items())]
        self.of[name], self._lines[name] = token, " ".join(words)
        self.write()
        return token

    def remove(self, name: str) -> None:
        del self._lines[name]
        self.write()

    def write(self, text: str | None = None) -> None:
        new = self.path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in self._lines.values()) if text is None else text)
        new.replace(self.path)


def decode_step(spec: fovea.ModelSpec, n_tokens: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = np.zeros((n_tokens, spec.n_q_heads, spec.head_dim_qk), np.float32)
    kv = np.zeros((n_tokens, spec.n_kv_heads, spec.head_dim_qk), np.float32)
    return q, kv, kv


Rpc = Callable[[fovea.Client, fovea.ModelSpec, str, str], object]


def _stream(client: fovea.Client, spec: fovea.ModelSpec, _: str, session: str) -> object:
    with client.stream() as stream:
        q, k, v = decode_step(spec)
        return stream.submit(0, [(session, 0, 1)], q, k, v).result(20)


def _once(client: fovea.Client, spec: fovea.ModelSpec, _: str, session: str) -> object:
    return client.attend(0, [(session, 0, 1)], *decode_step(spec))


def _open(client: fovea.Client, _spec: fovea.ModelSpec, model: str, _session: str) -> object:
    return client.open_session(model).close()


def _fork(client: fovea.Client, _spec: fovea.ModelSpec, _model: str, session: str) -> object:
    return client.fork_session(session).close()


def _health(client: fovea.Client, *_: object) -> object:
    return client._channel.unary_unary(HEALTH + "Check")(b"", timeout=10)


def _health_watch(client: fovea.Client, *_: object) -> object:
    return next(client._channel.unary_stream(HEALTH + "Watch")(b"", timeout=10))


def _reflection(version: str) -> Rpc:
    def call(client: fovea.Client, *_: object) -> object:
        token = getattr(client, "test_token", None)
        metadata = [("authorization", f"Bearer {token}")] if token else []
        method = client._channel.stream_stream(REFLECTION.format(version))
        return next(method(iter([b"\x3a\x00"]), timeout=10, metadata=metadata))

    return call


def _watch(client: fovea.Client, *_: object) -> object:
    return next(iter(client.watch(0.1)))


# Every RPC: how to call it, and whether it concerns one session.
RPCS: dict[str, tuple[Rpc, bool]] = {
    "RegisterModel": (lambda c, spec, m, s: c.register_model(spec), False),
    "OpenSession": (_open, False),
    "ForkSession": (_fork, True),
    "TruncateSession": (lambda c, spec, m, s: c.truncate_session(s, 0), True),
    "GetSession": (lambda c, spec, m, s: c.session_info(s), True),
    "ListSessions": (lambda c, spec, m, s: list(c.list_sessions()), False),
    "Attend": (_stream, True),
    "AttendOnce": (_once, True),
    "GetPlacement": (lambda c, spec, m, s: c.placement(s), True),
    "CloseSession": (lambda c, spec, m, s: c.close_session(s), True),
    "GetStatus": (lambda c, spec, m, s: c.status(), False),
    "WatchStatus": (_watch, False),
    "Check": (_health, False),
    "Watch": (_health_watch, False),
    "ServerReflectionInfo": (_reflection("v1"), False),
    "ServerReflectionInfo, v1alpha": (_reflection("v1alpha"), False),
    "Drain": (lambda c, spec, m, s: c.drain(), False),
}


def all_methods() -> set[str]:
    """Of our API, and what the service answers besides."""
    services = pb.DESCRIPTOR.services_by_name.values()
    return {method.name for service in services for method in service.methods} | {"Check", "Watch"}

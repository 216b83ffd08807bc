"""test_tool_access.py - the `fovea` tool, and so the C client, with TLS and tokens; `fovea token`."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest

from access import authority, certificate, free_port

pytestmark = pytest.mark.fovead


def tool(*words: object, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `fovea`, which lies beside fovead."""
    program = Path(os.environ["FOVEAD"]).with_name("fovea")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FOVEA_")}
    done = subprocess.run(
        [str(program), *map(str, words)],
        env={**clean, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_token_and_its_line(tmp_path):
    code, out, _ = tool(
        "token",
        "alice",
        "--role",
        "admin",
        "--kv-bytes",
        "16g",
        "--sessions",
        5,
        "--models",
        3,
        "--expires",
        "2099-01-02",
    )
    token, line = out.splitlines()
    assert code == 0 and token.startswith("fv_") and len(token) == 67
    words = line.split()
    assert words[:2] == ["alice", "admin"]
    assert words[2] == f"sha256={hashlib.sha256(token.encode()).hexdigest()}"
    assert words[3:] == ["expires=2099-01-02T00:00:00Z", "sessions=5", f"kv_bytes={16 << 30}", "models=3"]

    file = tmp_path / "tokens"
    tokens = [tool("token", name, "--file", file)[1].strip() for name in ("bob", "carol")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["bob", "carol"]
    assert len(set(tokens)) == 2 and not any(token in file.read_text() for token in tokens)

    file.write_text(file.read_text().rstrip("\n"))  # as some editors leave it
    tool("token", "dave", "--file", file)
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["bob", "carol", "dave"]


@pytest.mark.parametrize(
    "words",
    [
        ["anonymous"],
        ["a b"],
        [],
        ["a", "b"],
        ["a", "--role", "root"],
        ["a", "--expires", "soon"],
        ["a", "--sessions", "0"],
        ["a", "--models", "0"],
        ["a", "--days", "-1"],
    ],
)
def test_what_makes_no_token(words):
    code, out, _ = tool("token", *words)
    assert code == 2 and not out


def test_a_file_that_cannot_be_written():
    code, out, error = tool("token", "a", "--file", "/nowhere/tokens")
    assert code == 1 and not out and "/nowhere/tokens" in error


def test_tls_and_tokens(own_service, tmp_path):
    authority(tmp_path, "ca")
    certificate(tmp_path, "ca", "server")
    certificate(tmp_path, "ca", "client")
    token = tool("token", "alice", "--file", tmp_path / "tokens")[1].strip()
    (tmp_path / "alice.token").write_text(f"{token}\nsomething else\n")
    port = free_port()
    server = ["--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.key"]
    guards = ["--tls-client-ca", tmp_path / "ca.pem", "--tokens", tmp_path / "tokens"]
    service = own_service("64m", ["--listen", f"127.0.0.1:{port}", *map(str, (*server, *guards))])

    def status(*words: object, **env: str) -> tuple[int, str]:
        code, out, error = tool("-a", f"localhost:{port}", "-t", 2, *words, "status", env=env)
        assert token not in out + error
        return code, out + error

    ca = ["--ca", tmp_path / "ca.pem"]
    own = ["--cert", tmp_path / "client.pem", "--key", tmp_path / "client.key"]
    shown = ["--token-file", tmp_path / "alice.token"]
    assert status(*ca, *own, *shown)[0] == 0
    assert status(*ca, *own, FOVEA_TOKEN=token)[0] == 0
    assert status(*shown, FOVEA_CA=str(ca[1]), FOVEA_CERT=str(own[1]), FOVEA_KEY=str(own[3]))[0] == 0
    for words, text in (
        ([*ca, *own], "UNAUTHENTICATED"),
        ([*ca, *shown], "UNAVAILABLE"),  # no certificate
        ([*own, *shown, "--tls"], "UNAVAILABLE"),  # does not trust the service
        ([*ca, *own, *shown, "--server-name", "elsewhere.example"], "UNAVAILABLE"),
        ([*shown], "UNAVAILABLE"),  # plain
        ([*ca, *own[:2], *shown], "cert_file, key_file: given one of them"),
        (["--ca", tmp_path / "none", *own], "ca_file"),
        ([*ca, *own, "--token-file", tmp_path / "none"], "token_file"),
        ([*ca, *own, "--token-file", tmp_path / "names"], "UNAUTHENTICATED"),
    ):
        code, said = status(*words)
        assert code == 1 and text in said, (words, said)
    assert tool("-a", service.address, *shown, "status")[0] == 0
    assert tool("-a", service.address, *shown, "drain")[0] == 1
    code, _, said = tool("-a", service.address, "status", env={"FOVEA_TOKEN": "two words"})
    assert code == 1 and "visible characters" in said

"""test_tls.py - TLS and mutual TLS: who gets in, certificates that change, what refuses to start."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import fovea
from access import Tokens, authority, certificate, free_port
from helpers import small_spec
from test_access import eventually

pytestmark = [
    pytest.mark.fovead,
    pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def pki(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pki")
    authority(folder, "ca")
    authority(folder, "strangers")
    for name in ("server", "renewed", "client"):
        certificate(folder, "ca", name)
    certificate(folder, "strangers", "stranger")
    return folder


@pytest.fixture
def served(own_service, pki, tmp_path) -> Callable[..., tuple[str, object]]:
    """served("--tls-client-ca", ...): (address, service) over TLS; tmp_path has its cert.pem and key.pem."""

    def start(*options: str) -> tuple[str, object]:
        put(pki, "server", tmp_path)
        port = free_port()
        files = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
        service = own_service("64m", ["--listen", f"127.0.0.1:{port}", *files, *options])
        return f"localhost:{port}", service

    return start


def put(pki: Path, name: str, folder: Path, parts: tuple[str, ...] = ("cert", "key")) -> None:
    for part, suffix in (("cert", "pem"), ("key", "key")):
        if part in parts:
            (folder / "new").write_bytes((pki / f"{name}.{suffix}").read_bytes())
            (folder / "new").replace(folder / f"{part}.pem")


def served_name(address: str, pki: Path, **version: ssl.TLSVersion) -> str:
    """The common name of the certificate that a handshake of these versions shows."""
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    for name, value in version.items():
        setattr(context, name, value)
    with socket.create_connection((host, int(port)), 5) as raw:
        with context.wrap_socket(raw, server_hostname=host) as s:
            subject = dict(pair[0] for pair in s.getpeercert()["subject"])
            return subject["commonName"]


def test_tls(served, pki):
    address, service = served()
    spec = small_spec()
    with fovea.connect(address, ca_file=pki / "ca.pem") as client:
        session = client.open_session(client.register_model(spec))
        assert [s.session_id for s in client.list_sessions()] == [session.id]
        session.close()
    for what, options in {
        "plain": {},
        "another authority": {"ca_file": pki / "strangers.pem"},
        "another name": {"ca_file": pki / "ca.pem", "server_name": "elsewhere.example"},
    }.items():
        with pytest.raises(fovea.Unavailable):
            fovea.connect(address, timeout=1, **options).close()
            pytest.fail(what)
    with service.connect() as client:  # the unix socket stays plain
        assert client.status().listen
    assert "127.0.0.1" in service.output() and "(TLS, no authentication)" in service.output()


def test_versions(served, pki):
    address, _ = served()
    v = ssl.TLSVersion
    assert served_name(address, pki, maximum_version=v.TLSv1_2) == "server"
    assert served_name(address, pki, minimum_version=v.TLSv1_3) == "server"
    for old in (v.TLSv1, v.TLSv1_1):
        with pytest.raises(ssl.SSLError, match="EOF|ALERT_PROTOCOL"):  # by the service
            served_name(address, pki, minimum_version=v.TLSv1, maximum_version=old)


def test_mutual_tls(served, pki, tmp_path):
    tokens = Tokens(tmp_path / "tokens")
    token = tokens.add("alice")
    address, _ = served("--tls-client-ca", str(pki / "ca.pem"), "--tokens", str(tokens.path))
    own = {"cert_file": pki / "client.pem", "key_file": pki / "client.key", "ca_file": pki / "ca.pem"}
    with fovea.connect(address, **own, token=token) as client:
        assert client.status()
    with fovea.connect(address, **own) as client, pytest.raises(fovea.Unauthenticated):
        client.status()
    stranger = {**own, "cert_file": pki / "stranger.pem", "key_file": pki / "stranger.key"}
    for options in ({"ca_file": pki / "ca.pem"}, stranger):
        with pytest.raises(fovea.FoveaError):  # TLS 1.3: the client may learn it only with its first call
            with fovea.connect(address, timeout=1, token=token, **options) as client:
                client.status()


def test_a_new_certificate_is_taken(served, pki, tmp_path):
    address, service = served()
    with fovea.connect(address, ca_file=pki / "ca.pem") as client:
        put(pki, "renewed", tmp_path, ("cert",))  # its key is on its way: the old pair serves
        assert served_name(address, pki) == "server"
        assert "last good certificate stays" in service.output()
        put(pki, "renewed", tmp_path, ("key",))
        assert served_name(address, pki) == "renewed"
        (tmp_path / "cert.pem").write_text("nonsense\n")
        assert served_name(address, pki) == "renewed"
        (tmp_path / "key.pem").unlink()
        assert served_name(address, pki) == "renewed"
        assert client.status()  # its connection stands all the while
    log = service.output()
    assert eventually(lambda: "new certificate" in log)
    for key in ("server.key", "renewed.key"):
        assert (pki / key).read_text().splitlines()[1] not in log


def test_a_certificate_that_could_not_be_read_is_tried_again(served, pki, tmp_path):
    address, service = served()
    pair = {part: (tmp_path / f"{part}.pem", (pki / f"renewed.{end}").read_bytes()) for part, end in
            {"cert": "pem", "key": "key"}.items()}  # fmt: skip
    for path, text in pair.values():
        path.write_bytes(b"x" * len(text))
    times = {path: path.stat() for path, _ in pair.values()}
    for _ in range(3):
        assert served_name(address, pki) == "server"
    for path, text in pair.values():  # whole now, and nothing of the files' looks tells it
        path.write_bytes(text)
        os.utime(path, ns=(times[path].st_atime_ns, times[path].st_mtime_ns))
        assert path.stat().st_mtime_ns == times[path].st_mtime_ns
    assert eventually(lambda: served_name(address, pki) == "renewed")
    assert service.output().count("last good certificate stays") == 1  # once, however many handshakes


def start_once(*options: str) -> tuple[int, str]:
    """Exit code and log of a start; 0 as soon as it serves."""
    words = [os.environ["FOVEAD"], "--kv-memory", "1m", "--threads", "1", *options]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if "listening on" in line:
                process.kill()
                return 0, log
    return process.returncode, log


def test_what_does_not_start(pki, tmp_path):
    port = free_port()
    everywhere, here = ("--listen", f"0.0.0.0:{port}"), ("--listen", f"127.0.0.1:{port}")
    server = ("--tls-cert", str(pki / "server.pem"))
    tokens = Tokens(tmp_path / "tokens")
    tokens.add("alice")
    named = ("--tokens", str(tokens.path))
    for options, text in {
        everywhere: "neither TLS",
        ("--listen", f"[::]:{port}"): "neither TLS",
        (*here, *server): "expected certificate and key",
        (*here, *server, "--tls-key", str(pki / "renewed.key")): "is not the key of the certificate",
        (*here, *server, "--tls-key", str(pki / "none.key")): "No such file",
        (*here, "--tls-client-ca", str(pki / "ca.pem")): "expected certificate and key",
        (*here, *server, "--tls-key", str(pki / "server.pem")): "expected a private key",
        (*here, "--tokens", str(tmp_path / "none")): "No such file",
    }.items():
        code, log = start_once(*options)
        assert code == 1 and text in log, (options, code, log)
    tokens.path.write_text("alice user sha256=fv_secret\n")
    code, log = start_once(*here, *named)
    assert code == 1 and "tokens:1: sha256" in log and "fv_secret" not in log
    tokens.add("alice")
    tokens.path.chmod(0o666)
    code, log = start_once(*here, *named)
    assert code == 1 and "others cannot write" in log
    tokens.path.chmod(0o600)
    by_name = ("--listen", f"localhost:{port}")
    for options in ((*everywhere, "--insecure"), (*everywhere, *named), here, by_name):
        assert start_once(*options)[0] == 0, options
    assert "clear text" in start_once(*everywhere, *named)[1]

"""h2.py - HTTP/2 by hand, and the ways in which it can be spoken badly."""

from __future__ import annotations

import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8


def frame(
    kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None
) -> bytes:
    n = len(payload) if length is None else length
    return struct.pack(">I", n)[1:] + bytes([kind & 255, flags]) + struct.pack(">I", stream) + payload


def setting(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def integer(value: int, prefix: int) -> bytes:
    """An HPACK integer; the first byte's other bits are 0."""
    top = (1 << prefix) - 1
    if value < top:
        return bytes([value])
    out, value = bytearray([top]), value - top
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block, all literal."""
    return b"".join(b"\0" + integer(len(n), 7) + n + integer(len(v), 7) + v for n, v in pairs)


def call_fields(path: bytes, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"localhost"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more,
    ]  # fmt: skip


def message(body: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """gRPC's frame of a message."""
    return bytes([flag]) + struct.pack(">I", len(body) if length is None else length) + body


def call(stream: int, path: bytes, body: bytes) -> bytes:
    """A whole unary call."""
    head = frame(HEADERS, END_HEADERS, stream, fields(call_fields(path)))
    return head + frame(DATA, END_STREAM, stream, message(body))


class Connection:
    """One connection, the server's frames counted."""

    def __init__(self, path: str, timeout: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.buffer = b""
        self.ended: set[int] = set()
        self.is_closed = False

    def send(self, data: bytes) -> None:
        """What the server does not want any more is lost."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionError):
            self.is_closed = True
        except TimeoutError:
            raise AssertionError("the service takes nothing and does not close") from None

    def exchange(self, data: bytes, seconds: float = 60) -> None:
        """Sends, and takes what comes meanwhile: a server need not read on from who does not read its answers."""
        deadline = time.monotonic() + seconds
        while data and not self.is_closed:
            readable, writable, _ = select.select([self.socket], [self.socket], [], 1)
            if readable:
                self.read()
            if writable and not self.is_closed:
                try:
                    data = data[self.socket.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except ConnectionError:
                    self.is_closed = True
            if time.monotonic() > deadline:
                raise AssertionError("the service takes nothing and does not close")

    def hello(self) -> None:
        # (windows so large that no answer waits for us)
        self.send(PREFACE + setting((4, 2**31 - 1)) + frame(WINDOW, 0, 0, struct.pack(">I", 2**30)))

    def close(self) -> None:
        self.socket.close()

    def read(self) -> bool:
        """Takes what has come; False: nothing will come any more."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            self.is_closed = True
            return False
        self.buffer += data
        while len(self.buffer) >= 9:
            n = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + n:
                break
            kind, flags = self.buffer[3], self.buffer[4]
            stream = int.from_bytes(self.buffer[5:9], "big")
            if kind == RST or (kind in (DATA, HEADERS) and flags & END_STREAM):
                self.ended.add(stream)
            elif kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK))
            elif kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, 0, self.buffer[9 : 9 + n]))
            self.buffer = self.buffer[9 + n :]
        return True

    def wait_ended(self, streams: set[int], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not streams <= self.ended and self.read():
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer to {len(streams - self.ended)} calls within {seconds} s")

    def linger(self, seconds: float) -> None:
        """Reads for a while what the server says to all that."""
        self.socket.settimeout(seconds)
        try:
            while self.read():
                pass
        except TimeoutError:
            pass


# ---------------------------------------------------------------------- bad manners

STATUS = b"/fovea.v1.Cluster/GetStatus"
OPEN = b"/fovea.v1.Attention/OpenSession"
ATTEND = b"/fovea.v1.Attention/Attend"
Attack = Callable[[random.Random], bytes]


def _head(stream: int = 1, path: bytes = STATUS, *more: tuple[bytes, bytes]) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, fields(call_fields(path, *more)))


def _start(*frames: bytes) -> bytes:
    return PREFACE + setting() + b"".join(frames)


def _no_preface(rng: random.Random) -> bytes:
    return rng.choice(
        (
            rng.randbytes(200),
            PREFACE[:10],
            b"GET / HTTP/1.1\r\n\r\n",
            PREFACE[:-1] + b"X",
            b"\x16\x03\x01" * 90,
        )
    )


def _flood(kind: int, payload: bytes, flags: int = 0) -> Attack:
    return lambda rng: _start(*(frame(kind, flags, 0, payload) for _ in range(rng.choice((10, 3000)))))


def _settings(rng: random.Random) -> bytes:
    values = (0, 1, 16383, 16384, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
    pairs = [(rng.randrange(0, 10), rng.choice(values)) for _ in range(rng.choice((1, 3, 500)))]
    return _start(setting(*pairs), _head(), frame(DATA, END_STREAM, 1, message(b"")))


def _continuations(rng: random.Random) -> bytes:
    block = fields([(b"x-%d" % i, b"y" * 200) for i in range(40)])
    n = rng.choice((1, 40, 400))
    more = b"".join(frame(CONTINUATION, 0, 1, block) for _ in range(n))
    return _start(
        frame(HEADERS, 0, 1, fields(call_fields(STATUS))), more, frame(CONTINUATION, END_HEADERS, 1)
    )


def _continuation_of_others(rng: random.Random) -> bytes:
    return _start(
        frame(HEADERS, 0, 1, fields(call_fields(STATUS))),
        rng.choice(
            (frame(CONTINUATION, END_HEADERS, 3), frame(PING, 0, 0, bytes(8)), frame(DATA, 0, 1, b"x"))
        ),
    )


def _resets(rng: random.Random) -> bytes:
    """Rapid reset: calls that are cancelled as soon as they are there."""
    path = rng.choice((STATUS, OPEN, ATTEND))
    code = struct.pack(">I", rng.choice((0, 8, 2**32 - 1)))
    n = rng.choice((10, 300))
    return _start(*(_head(2 * i + 1, path) + frame(RST, 0, 2 * i + 1, code) for i in range(n)))


def _windows(rng: random.Random) -> bytes:
    update = struct.pack(">I", rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
    return _start(
        _head(), *(frame(WINDOW, 0, rng.choice((0, 1, 3)), update) for _ in range(rng.choice((1, 2, 100))))
    )


def _no_window(rng: random.Random) -> bytes:
    """Answers that can not be sent."""
    calls = b"".join(call(2 * i + 1, STATUS, b"") for i in range(100))
    return PREFACE + setting((4, 0)) + calls


def _streams(rng: random.Random) -> bytes:
    ids = rng.choice(((2,), (0,), (5, 3), (1, 1), (2**31 - 1, 1), (2**31 + 1,)))
    return _start(*(_head(i) + frame(DATA, END_STREAM, i, message(b"")) for i in ids))


def _stray(rng: random.Random) -> bytes:
    kind = rng.choice((DATA, RST, WINDOW, PRIORITY, PUSH, CONTINUATION, 0x20, 0xFF))
    return _start(
        _head(),
        *(
            frame(
                kind, rng.randrange(256), rng.choice((0, 1, 7)), rng.randbytes(rng.choice((0, 1, 4, 5, 30)))
            )
            for _ in range(20)
        ),
    )


def _lengths(rng: random.Random) -> bytes:
    kind = rng.choice((DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW))
    return _start(
        _head(), frame(kind, 0, rng.choice((0, 1)), b"abc", rng.choice((0, 2, 4, 16385, 2**24 - 1)))
    )


def _padding(rng: random.Random) -> bytes:
    return _start(
        frame(
            HEADERS, PADDED | END_HEADERS, 1, bytes([rng.choice((1, 200, 255))]) + fields(call_fields(STATUS))
        )
    )


def _goaway(rng: random.Random) -> bytes:
    return _start(
        _head(),
        frame(GOAWAY, 0, 0, struct.pack(">II", rng.choice((0, 2**31 - 1)), 0) + bytes(rng.choice((0, 5000)))),
        call(3, STATUS, b""),
    )


def _hpack(rng: random.Random) -> bytes:
    block = rng.choice(
        (
            b"\xff" + b"\xff" * 20,  # an index without end
            b"\x80", b"\xbe", b"\xff\x80\x80\x80\x80\x80\x80\x80\x80\x01",
            b"\x3f\xe1\xff\xff\xff\x0f",  # a table of 4 GiB
            b"\x20" * 1000,
            b"\x40\x7f\xff\xff\xff\x07abc",  # a name of 2^28
            b"\x00\x01A\x01b", b"\x00\x00\x00", b"\x00\x81\xff\x81\xff", b"\x00\x01\x00\x01\n",
            rng.randbytes(100),
            fields(call_fields(STATUS))[: rng.randrange(60)],
        )
    )  # fmt: skip
    return _start(frame(HEADERS, END_HEADERS | END_STREAM, 1, block), call(3, STATUS, b""))


def _odd_fields(rng: random.Random) -> bytes:
    right = call_fields(STATUS)
    odd = rng.choice(
        (
            right[1:], right[:2], right + right[:1], [(b"x", b"y")] + right, right + [(b":odd", b"1")],
            right + [(b"grpc-timeout", rng.choice((b"", b"1", b"99999999H", b"-1S", b"1x", b"0n", b"9" * 100 + b"S")))],
            right + [(b"grpc-encoding", rng.choice((b"gzip", b"deflate", b"nonsense")))],
            right + [(b"content-length", b"5")], right + [(b"connection", b"close")],
            right + [(b"x-bin", b"!!!")], right + [(b"authorization", b"Bearer " + b"x" * 4000)],
            right + [(b"x" * 20000, b"")], right + [(b"k%d" % i, b"v") for i in range(2000)],
            [(n, v if n != b":path" else rng.choice((b"", b"/", b"//", b"/a/b/c", b"\xff", b"/fovea.v1.Attention/", STATUS + b"\0"))) for n, v in right],
            [(n, v if n != b"content-type" else rng.choice((b"", b"application/json", b"application/grpc+json"))) for n, v in right],
            [(n, v if n != b":method" else b"GET") for n, v in right],
        )
    )  # fmt: skip
    block = fields(odd)
    cuts = [block[i : i + 16000] for i in range(0, len(block), 16000)] or [b""]
    head = frame(HEADERS, END_HEADERS if len(cuts) == 1 else 0, 1, cuts[0])
    more = b"".join(frame(CONTINUATION, END_HEADERS if c is cuts[-1] else 0, 1, c) for c in cuts[1:])
    return _start(head, more, frame(DATA, END_STREAM, 1, message(b"")))


def _messages(rng: random.Random) -> bytes:
    body = rng.choice(
        (
            message(b"", 0, 2**32 - 1), message(b"abc", 0, 5), message(b"abc", 1), message(b"abc", 2), message(b"", 255),
            b"\0\0", b"", message(b"") * 3, message(b"\x0a\xff\xff\xff\xff\x0f"), message(bytes(60000), 0, 2**28),
        )
    )  # fmt: skip
    flags = rng.choice((0, END_STREAM))
    parts = [body[i : i + 16000] for i in range(0, len(body), 16000)] or [b""]
    return _start(
        _head(1, rng.choice((STATUS, OPEN, ATTEND))),
        *(frame(DATA, flags if p is parts[-1] else 0, 1, p) for p in parts),
    )


def _mutant(rng: random.Random) -> bytes:
    """A good conversation with damage."""
    good = bytearray(
        _start(
            call(1, STATUS, b""),
            _head(3, ATTEND),
            frame(DATA, 0, 3, message(b"\x08\x01")),
            call(5, OPEN, b"\x0a\x01x"),
            frame(PING, 0, 0, bytes(8)),
        )
    )
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(PREFACE), len(good))
        way = rng.randrange(4)
        if way == 0:
            good[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del good[at : at + rng.randrange(1, 20)]
        elif way == 2:
            good[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            del good[at:]
            break
        if len(good) <= len(PREFACE) + 1:
            break
    return bytes(good)


ATTACKS: dict[str, Attack] = {
    "no preface": _no_preface,
    "settings flood": lambda rng: _start(*(setting() for _ in range(rng.choice((10, 3000))))),
    "settings answers flood": _flood(SETTINGS, b"", ACK),
    "ping flood": _flood(PING, bytes(8)),
    "extreme settings": _settings,
    "continuations": _continuations,
    "continuation of another": _continuation_of_others,
    "rapid reset": _resets,
    "window updates": _windows,
    "no window": _no_window,
    "stream numbers": _streams,
    "stray frames": _stray,
    "lengths": _lengths,
    "padding": _padding,
    "goaway": _goaway,
    "hpack": _hpack,
    "odd headers": _odd_fields,
    "message frames": _messages,
    "mutants": _mutant,
}

"""mutate.py - messages of the API as a careless or hostile client would send them, made along their descriptors.

A message is made field by field: right numbers and types mostly, edge values often. Then its bytes are bent where the wire format
has joints: field numbers, wire types, lengths, varints, nesting, order, repetition, the end.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor

DEPTH_MAX = 4
BYTES_MAX = 3000
EDGES = (0, 1, 2, 63, 64, 65, 127, 128, 255, 1024, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    b"",
    b"x",
    b"m" * 63,
    b"m" * 64,
    b"\xff\xfe",
    b"a\0b",
    b"0" * 32,
    b"f" * 33,
    b"%s%n",
    b"s2-16",
    b"\xed\xa0\x80",
)
_VARINTS = {
    FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM,
}  # fmt: skip


def varint(value: int, n_extra: int = 0) -> bytes:
    """n_extra: longer than it need be."""
    out = bytearray()
    value &= 2**64 - 1
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    for _ in range(n_extra):
        out[-1] |= 128
        out.append(0)
    return bytes(out)


class Maker:
    """Random messages. `ids` gives what session_id, parent_session_id and model_id may be."""

    def __init__(self, rng: random.Random, ids: Callable[[str], bytes | None]) -> None:
        self.rng, self.ids = rng, ids

    def message(self, of: Descriptor, is_bent: bool = True) -> bytes:
        return self._message(of, is_bent, 0)

    # ------------------------------------------------------------------ making

    def _message(self, of: Descriptor, is_bent: bool, depth: int) -> bytes:
        parts = []
        for field in of.fields:
            if self.rng.random() < 0.25:
                continue
            n = self.rng.choice((1, 1, 2, 5)) if field.is_repeated else 1
            parts += [self._field(field, is_bent, depth) for _ in range(n)]
        if is_bent and self.rng.random() < 0.3:
            parts = self._bend_parts(parts)
        out = b"".join(parts)[:BYTES_MAX]
        return self._bend_bytes(out) if is_bent and self.rng.random() < 0.25 else out

    def _field(self, field: FieldDescriptor, is_bent: bool, depth: int) -> bytes:
        wire, body = self._body(field, is_bent, depth)
        number = field.number
        if is_bent and self.rng.random() < 0.03:
            number = self.rng.choice((0, 1, number + 1, 15, 16, 2**28, 2**29 - 1))
        if is_bent and self.rng.random() < 0.03:
            wire = self.rng.randrange(8)
        return varint(number << 3 | wire, self.rng.choice((0, 0, 0, 0, 0, 0, 0, 4)) if is_bent else 0) + body

    def _body(self, field: FieldDescriptor, is_bent: bool, depth: int) -> tuple[int, bytes]:
        if field.type in _VARINTS:
            return 0, varint(self._number(field), 9 if is_bent and self.rng.random() < 0.02 else 0)
        if field.type == FieldDescriptor.TYPE_FLOAT:
            return 5, struct.pack("<f", self.rng.choice(FLOATS))
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            deep = self.rng.random() < 0.01 and is_bent
            body = b"" if depth > DEPTH_MAX else self._message(field.message_type, is_bent, depth + 1)
            for _ in range(200 if deep else 0):  # far deeper than any message is
                body = varint(field.number << 3 | 2) + varint(len(body)) + body
        else:
            body = self._text(field)
        n = len(body)
        if is_bent and self.rng.random() < 0.03:
            n = self.rng.choice((0, n + 1, n - 1, n + 1000, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)) % 2**64
        return 2, varint(n) + body

    def _number(self, field: FieldDescriptor) -> int:
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self.rng.randrange(2)
        if field.enum_type is not None and self.rng.random() < 0.9:
            return self.rng.choice([value.number for value in field.enum_type.values])
        return (
            self.rng.choice((1, 1, 2, 2, 4, 8, 16, 32, 64))
            if self.rng.random() < 0.6
            else self.rng.choice(EDGES)
        )

    def _text(self, field: FieldDescriptor) -> bytes:
        known = self.ids(field.name)
        if known is not None and self.rng.random() < 0.8:
            return known
        if field.type == FieldDescriptor.TYPE_BYTES:  # tensors: of sizes that may fit
            return bytes(self.rng.choice((0, 32, 64, 128, 256, 512, 1024)))
        return self.rng.choice(TEXTS)

    # ------------------------------------------------------------------ bending

    def _bend_parts(self, parts: list[bytes]) -> list[bytes]:
        way = self.rng.randrange(4)
        if way == 0:
            self.rng.shuffle(parts)
        elif way == 1 and parts:
            parts = parts + [self.rng.choice(parts)] * self.rng.choice((1, 2, 50))
        elif way == 2:
            parts.insert(self.rng.randrange(len(parts) + 1), self._unknown())
        else:
            del parts[self.rng.randrange(len(parts) + 1) :]
        return parts

    def _unknown(self) -> bytes:
        number = self.rng.choice((99, 1000, 2**29 - 1))
        return self.rng.choice(
            (
                varint(number << 3) + varint(self.rng.choice(EDGES)),
                varint(number << 3 | 1) + bytes(8),
                varint(number << 3 | 2) + varint(3) + b"abc",
                varint(number << 3 | 3) + varint(number << 3 | 4),  # a group
                varint(number << 3 | 3) * self.rng.choice((1, 300)),  # that does not end
                varint(number << 3 | 4),
                varint(number << 3 | 5) + bytes(4),
            )
        )

    def _bend_bytes(self, data: bytes) -> bytes:
        out = bytearray(data)
        way = self.rng.randrange(4)
        if way == 0 and out:
            out[self.rng.randrange(len(out))] ^= 1 << self.rng.randrange(8)
        elif way == 1:
            del out[self.rng.randrange(len(out) + 1) :]
        elif way == 2:
            at = self.rng.randrange(len(out) + 1)
            out[at:at] = self.rng.randbytes(self.rng.choice((1, 2, 9)))
        else:
            out += b"\xff" * self.rng.choice((1, 9, 10, 11))
        return bytes(out)

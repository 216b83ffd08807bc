"""dtypes.py - numpy arrays <-> the row-major little-endian bytes of the wire.

bfloat16 has no numpy type of its own. Two ways to use it: arrays of ml_dtypes.bfloat16 (if that package
is installed), or arrays of uint16 holding the upper half of the float32 bits, with dtype="bf16".
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from fovea._pb import attention_pb2 as pb

Array = npt.NDArray[Any]

_WIRE_BY_NAME = {
    "f32": pb.DTYPE_F32,
    "float32": pb.DTYPE_F32,
    "f16": pb.DTYPE_F16,
    "float16": pb.DTYPE_F16,
    "bf16": pb.DTYPE_BF16,
    "bfloat16": pb.DTYPE_BF16,
}


def wire_dtype(name: str) -> pb.DType:
    """The wire's number of "f32", "f16", "bf16" (or numpy's names for them)."""
    try:
        return _WIRE_BY_NAME[name]
    except KeyError:
        raise ValueError(f'dtype: given "{name}", expected f32, f16 or bf16') from None


def cache_dtype(name: str) -> pb.DType:
    """The wire's number of a cache's dtype: those of tensors, and "fp8_latent"."""
    return pb.DTYPE_FP8_LATENT if name == "fp8_latent" else wire_dtype(name)


def wire_dtype_of(array: Array, name: str | None = None) -> pb.DType:
    """The wire dtype of an array; `name` is needed (and allowed to be "bf16") only for uint16."""
    if array.dtype == np.uint16:
        if name is None or wire_dtype(name) != pb.DTYPE_BF16:
            raise TypeError('uint16 arrays hold bfloat16 bits: say so with dtype="bf16"')
        return pb.DTYPE_BF16
    found = _WIRE_BY_NAME.get(array.dtype.name)
    if found is None:
        raise TypeError(f"array dtype: given {array.dtype}, expected float32, float16 or bfloat16")
    if name is not None and wire_dtype(name) != found:
        raise TypeError(f'dtype: given "{name}" with an array of {array.dtype}')
    return found


def to_wire(array: Array) -> memoryview:
    """The array's bytes, without a copy when it is contiguous and little-endian already."""
    little = array.astype(little_endian(array.dtype), copy=False)
    flat: Any = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return memoryview(flat)


def little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same type as the wire has it."""
    is_big = dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big")
    return dtype.newbyteorder("<") if is_big else dtype


def from_wire(data: bytes, like: np.dtype[Any], *shape: int) -> Array:
    """A read-only array over `data`; one dimension may be -1."""
    return np.frombuffer(data, dtype=like).reshape(shape)


def to_bf16(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """float32 -> bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    result: npt.NDArray[np.uint16] = np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return result


def from_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

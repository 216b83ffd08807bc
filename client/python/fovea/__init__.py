"""Fovea: the Python client of a distributed attention service.

    import fovea

    client = fovea.connect("127.0.0.1:7411")            # or "unix:/run/fovea.sock"
    spec = fovea.ModelSpec("tiny", n_layers=2, n_q_heads=8, n_kv_heads=2, head_dim_qk=64)
    model = client.register_model(spec)
    with client.open_session(model) as session:
        result = client.attend(0, [(session, 0, T)], q, k, v)   # q [T, 8, 64], k and v [T, 2, 64]
        result.out                                               # [T, 8, 64]

numpy in, numpy out. Errors are exceptions (fovea.FoveaError and its subclasses).
"""

from fovea.attend import AttendResult, Item, Timings
from fovea.client import Client, connect
from fovea.dtypes import from_bf16, to_bf16
from fovea.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FoveaError,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from fovea.model import S2, Dense, LayerPolicy, ModelSpec, Sharding, SliceRms, Window
from fovea.placement import format_placement
from fovea.session import Session
from fovea.stream import AttendStream

__all__ = [
    "S2",
    "AttendResult",
    "AttendStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Dense",
    "FailedPrecondition",
    "FoveaError",
    "Internal",
    "InvalidArgument",
    "Item",
    "LayerPolicy",
    "ModelSpec",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Session",
    "Sharding",
    "SliceRms",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Window",
    "connect",
    "format_placement",
    "from_bf16",
    "to_bf16",
]
__version__ = "0.1.0"

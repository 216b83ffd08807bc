"""errors.py - what can go wrong, as exceptions named after gRPC's status codes."""

from __future__ import annotations

import grpc


class FoveaError(Exception):
    """A request was refused or could not be carried out.

    code:     the gRPC status code.
    message:  the service's text: field, what was given, what was expected.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, code: grpc.StatusCode | None = None) -> None:
        if code is not None:
            self.code = code
        self.message = message
        super().__init__(f"{self.code.name}: {message}")


class Cancelled(FoveaError):
    code = grpc.StatusCode.CANCELLED


class InvalidArgument(FoveaError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(FoveaError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(FoveaError):
    code = grpc.StatusCode.NOT_FOUND


class PermissionDenied(FoveaError):
    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(FoveaError):
    """No KV memory (the message has the bytes needed and free), a quota, or a message over the limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(FoveaError):
    """For example: other K or V bytes at a position that already holds some (truncate first)."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OutOfRange(FoveaError):
    """A position beyond what is committed; the message has the committed length."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(FoveaError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(FoveaError):
    code = grpc.StatusCode.INTERNAL


class Unavailable(FoveaError):
    """The service cannot be reached or is draining. Retrying is safe: appends are exactly-once."""

    code = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(FoveaError):
    code = grpc.StatusCode.UNAUTHENTICATED


_BY_CODE: dict[grpc.StatusCode, type[FoveaError]] = {cls.code: cls for cls in FoveaError.__subclasses__()}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_status(code: int, message: str) -> FoveaError:
    """The exception of a status that came inside an AttendResponse."""
    return from_code(_BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN), message)


def from_code(code: grpc.StatusCode, message: str) -> FoveaError:
    return _BY_CODE.get(code, FoveaError)(message, code)


def from_rpc(error: grpc.RpcError, cancelled_here: bool = False) -> FoveaError:
    """The exception of a call that failed as a whole.

    A call cancelled by nobody here was under way, or just arriving, when the service stopped.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.CANCELLED and not cancelled_here and "Channel closed" not in details:
        return Unavailable("the service ended the call: it is stopping")
    return from_code(code, details)

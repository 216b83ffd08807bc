"""session.py - one sequence's KV cache inside the service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Union

from fovea._pb import attention_pb2 as pb
from fovea.attend import Item

if TYPE_CHECKING:
    from fovea.client import Client


class Session:
    """A handle; the state is the service's. Closing it frees the KV. A context manager."""

    def __init__(self, client: Client, session_id: str) -> None:
        self._client = client
        self.id = session_id

    def fork(self, at_position: int | None = None) -> Session:
        """A copy-on-write copy of the tokens [0, at_position); None = of everything."""
        return self._client.fork_session(self, at_position)

    def truncate(self, position: int) -> None:
        """Every layer keeps its tokens [0, position)."""
        self._client.truncate_session(self, position)

    def info(self) -> pb.SessionInfo:
        """Committed tokens per layer, bytes held, age."""
        return self._client.session_info(self)

    def placement(self) -> pb.Placement:
        """Which rank holds which heads and tokens."""
        return self._client.placement(self)

    def close(self) -> None:
        self._client.close_session(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.id})"


SessionLike = Union[Session, str]


def session_id(session: SessionLike) -> str:
    return session if isinstance(session, str) else session.id


def as_items(items: Iterable[Item | tuple[SessionLike, int, int]]) -> list[Item]:
    """(session or id, position, n_tokens) triples as Items."""
    return [Item(session_id(s), int(position), int(n)) for s, position, n in items]

"""The exceptions of tokenferry: one family, rooted at :class:`TokenferryError`.

Every one is a ``RuntimeError``, which is what programs written for DeepEP catch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class TokenferryError(RuntimeError):
    """Base of everything that tokenferry raises on purpose."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as message and attributes: constructors take neither, and errors travel between processes."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[TokenferryError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TokenferryError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class ArgumentError(TokenferryError, ValueError, AssertionError):
    """An argument is not allowed; raised before any peer is touched.

    Also a ``ValueError`` (what Python programs expect) and an ``AssertionError`` (what DeepEP raises for
    part of its checks).
    """

    def __init__(self, name: str, given: object, allowed: str) -> None:
        super().__init__(f"{name}: got {given}; allowed: {allowed}")
        self.name = name


class BufferStateError(TokenferryError):
    """The Buffer is destroyed, or an earlier operation left it unusable."""


class HeapError(TokenferryError):
    """Shared memory could not be created, grown or opened."""


class PeerError(TokenferryError):
    """An operation cannot finish because of other ranks.

    Attributes:
        operation: name of the operation, e.g. ``"dispatch"``.
        epoch: its number, counted from 1 in the life of the Buffer and equal on all ranks.
        ranks: the ranks at fault.
        reason: what is wrong with them.
    """

    def __init__(self, operation: str, epoch: int, ranks: Sequence[int], reason: str) -> None:
        listed = ", ".join(str(rank) for rank in ranks)
        super().__init__(f"{operation} (epoch {epoch}): rank {listed}: {reason}")
        self.operation = operation
        self.epoch = epoch
        self.ranks = tuple(ranks)
        self.reason = reason


class PeerTimeoutError(PeerError):
    """Ranks did not take part within the deadline. The Buffer is unusable afterwards."""


class PeerLostError(PeerError):
    """Ranks died, destroyed their Buffer or gave up. The Buffer is unusable afterwards."""


class StepBackError(PeerError):
    """Ranks could not agree on an operation and all stepped back.

    Raised on every rank, before any output is written: the Buffer stays usable.
    """


class MismatchError(StepBackError):
    """Ranks called different operations, or the same one with arguments that do not fit together."""


class CapacityError(StepBackError):
    """A rank has no room: ``num_worst_tokens`` is too small, or no shared memory for its stage."""


class CorruptionError(PeerError):
    """Rows did not arrive as they were sent, says the paranoid mode. The Buffer is unusable afterwards.

    ``ranks`` are the sources of the rows; with combine, where no single row is known to be wrong, all that had the
    token.

    Attributes:
        token: the first token that went wrong, by its number at its source; None: not rows, but counts or routes.
    """

    def __init__(
        self, operation: str, epoch: int, ranks: Sequence[int], reason: str, token: int | None = None
    ) -> None:
        super().__init__(operation, epoch, ranks, reason)
        self.token = token

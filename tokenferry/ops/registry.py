"""Names for Buffers: operators take tensors, numbers and strings, so a Buffer goes by its name."""

from __future__ import annotations

import itertools
import re
import weakref

import torch

from tokenferry.buffer import Buffer
from tokenferry.errors import ArgumentError, BufferStateError
from tokenferry.validation import require

_ATTRIBUTE = "operator_name"
"""Of a Buffer that has a name."""

_buffers: dict[str, weakref.ref[Buffer]] = {}
_numbers = itertools.count()


def register(buffer: Buffer, name: str | None = None) -> str:
    """Give a Buffer the name that operators know it by. This does not keep it alive.

    A function is compiled for the name: a Buffer that takes over the name of one that is gone needs no other
    compilation.

    Args:
        buffer: of this rank; one that has a name keeps it.
        name: letters, digits, ``.``, ``-`` and ``_``; by default ``buffer-0``, ``buffer-1`` and so on. Ranks need
            not agree on it.

    Returns:
        The name.

    Raises:
        ArgumentError: the Buffer has another name, or another Buffer that was not destroyed has this one.
    """
    if not isinstance(buffer, Buffer):
        raise ArgumentError("buffer", type(buffer).__name__, "a tokenferry.Buffer")
    known = getattr(buffer, _ATTRIBUTE, None)
    if known is not None:
        require(name is None or name == known, "name", repr(name), f"{known!r}, the name of this Buffer")
        return str(known)
    if name is None:
        name = next(free for free in map("buffer-{}".format, _numbers) if _find(free) is None)
    require(re.fullmatch(r"[\w.-]+", name) is not None, "name", repr(name), "letters, digits, '.', '-' and '_'")
    owner = _find(name)
    require(owner is None or owner.runtime is None, "name", repr(name), "a name that no other live Buffer has")
    setattr(buffer, _ATTRIBUTE, name)
    _buffers[name] = weakref.ref(buffer, lambda gone: _buffers.pop(name) if _buffers.get(name) is gone else None)
    return name


def _find(name: str) -> Buffer | None:
    reference = _buffers.get(name)
    return None if reference is None else reference()


def name_of(buffer: Buffer) -> str:
    """The name of a Buffer; it gets one if it has none yet.

    Raises:
        BufferStateError: it has none, and a function is being compiled: a compiler would not run ``register``.
    """
    name = getattr(buffer, _ATTRIBUTE, None)
    if name is not None:
        return str(name)
    if torch.compiler.is_compiling():
        raise BufferStateError("the Buffer has no name yet: call tokenferry.ops.register(buffer) before compiling")
    return register(buffer)


def buffer_of(name: str) -> Buffer:
    """The Buffer of that name.

    Raises:
        BufferStateError: there is none, or it is gone.
    """
    reference = _buffers.get(name)  # as ``_find``, which is a function more in every call of an operator
    buffer = None if reference is None else reference()
    if buffer is None:
        raise BufferStateError(f"no Buffer is known as {name!r}: tokenferry.ops.register(buffer) returns its name")
    return buffer

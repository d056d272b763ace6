"""What calls came to, kept: a call like an earlier one is neither checked nor prepared again.

What is kept depends on nothing but its key, and on what guards tell of tensors, and holds no tensor: shapes, dtypes,
numbers, signatures, kernels. So these have all that the checks and the preparation look at; a call that differs in
any of it is another one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then nothing is known again
    TensorGuards = None  # type: ignore[assignment, misc]

MOST_KEPT = 1024
_MOST_GUARDS = 8
"""For a key: what tensors are to torch depends on gradients, inference mode, autocast and on being below autograd."""

_Preparation = TypeVar("_Preparation")
_Tensor = torch.Tensor
make = tuple.__new__
"""Makes a NamedTuple of a class and a tuple in half the time that its own constructor takes."""
_STRIDED = torch.strided

Kind = tuple[torch.Size, torch.dtype, torch.device, bool]


def kind_of(value: object) -> Kind | None:
    """All that checks look at of a tensor, but its values. None for all else, which is to be checked every time.

    Subclasses are no plain tensors here: what they answer may change.
    """
    if type(value) is not _Tensor or value.layout is not _STRIDED:
        return None
    try:
        return value.shape, value.dtype, value.device, value.is_contiguous()
    except RuntimeError:  # nested
        return None


def row_kind_of(value: object) -> Kind | None:
    """As :func:`kind_of`, but for how many rows there are: the first dimension."""
    if type(value) is not _Tensor or value.layout is not _STRIDED:
        return None
    try:
        return value.shape[1:], value.dtype, value.device, value.is_contiguous()
    except RuntimeError:  # nested
        return None


class Kept(dict[tuple[Any, ...], _Preparation], Generic[_Preparation]):
    """Preparations by their keys: looked up with ``get``, a bounded number of them."""

    def keep(self, key: tuple[Any, ...], preparation: _Preparation) -> _Preparation:
        """Keep one, unless something in the call is to be checked every time: ``None`` in its key; and return it."""
        if None not in key:
            if len(self) >= MOST_KEPT:
                self.clear()
            self[key] = preparation
        return preparation


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether strides are those of rows that lie one behind the other, also where there is one row or none."""
    return list(tensor.stride()) == [*tensor.shape[1:], 1]


class Alike(Kept[list[tuple[Any, _Preparation]]], Generic[_Preparation]):
    """Preparations of calls with groups of tensors: others like them, but for numbers of rows, are known by one look.

    It looks at what :func:`kind_of` does, at gradients, dispatch keys, and strides of packed tensors. Whether the
    numbers of rows fit each other is for the caller to look at.
    """

    def find(self, key: tuple[Any, ...], tensors: Sequence[object]) -> _Preparation | None:
        """What was added for that key and as many tensors like these; the first are those whose dtypes vary."""
        for tensor in tensors:
            if type(tensor) is not _Tensor or tensor.is_nested:  # of which guards must not be asked for strides
                return None
        known = self.get((tensors[0].dtype, key))  # type: ignore[attr-defined]
        if known is not None:
            for at, (guards, preparation) in enumerate(known):
                if guards.check(*tensors):
                    if at:  # the last that was used is looked at first
                        known.insert(0, known.pop(at))
                    return preparation
        return None

    def add(
        self,
        key: tuple[Any, ...],
        preparation: _Preparation,
        tensors: Sequence[torch.Tensor],
        any_rows: Sequence[bool],
        any_strides: Sequence[bool],
    ) -> None:
        """Find it again for such tensors, instead of one that was added long before.

        Args:
            key: what else the checks look at; as long as ``None`` is in it nothing is found again.
            preparation: depends on no number of rows, and on the strides of packed tensors alone.
            tensors: as for :meth:`find`.
            any_rows: which of them may have any number of rows.
            any_strides: which of them need not be packed: if these are not, others like them may lie in any way.
                Nothing is known of tensors of which another one is not packed.
        """
        if None in key or None in map(kind_of, tensors):
            return
        are_packed = [*map(is_packed, tensors)]
        if not all(map(operator.or_, are_packed, any_strides)):
            return
        sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
        strides: list[Any] = [
            [*size[1:], 1] if packed else [None] * len(size) for packed, size in zip(are_packed, sizes, strict=True)
        ]
        for size, free in zip(sizes, any_rows, strict=True):
            size[0] = None if free else size[0]
        guards = _guards(tensors, sizes, strides)
        if guards is not None:
            _add(self, (tensors[0].dtype, key), (guards, preparation))


class Known(Kept[list[tuple[Any, _Preparation]]], Generic[_Preparation]):
    """Preparations of calls with some tensors, all of which one call looks at to find one again.

    It looks at what :func:`kind_of` does, at gradients, dispatch keys, and strides of dimensions that have several
    elements.
    """

    def find(self, key: tuple[Any, ...], *tensors: object) -> _Preparation | None:
        """What was added for that key and tensors like these, of which the first are those whose shapes vary."""
        for tensor in tensors:
            if type(tensor) is not _Tensor or tensor.is_nested:
                return None
        for guards, preparation in self.get((tensors[0].shape, key), ()):  # type: ignore[attr-defined]
            if guards.check(*tensors):
                return preparation
        return None

    def add(self, key: tuple[Any, ...], preparation: _Preparation, *tensors: torch.Tensor) -> _Preparation:
        """Find it again for such tensors, instead of one that was added long before; and return it."""
        if None in key or None in map(kind_of, tensors):
            return preparation
        guards = _guards(tensors, [list(tensor.shape) for tensor in tensors], [*map(_strides_that_count, tensors)])
        if guards is not None:
            _add(self, (tensors[0].shape, key), (guards, preparation))
        return preparation


def _add(kept: Kept[list[Any]], key: tuple[Any, ...], known: Any) -> None:
    """Keep one more thing of a key, in front, and of those there were before so many."""
    all_known = kept.get(key) or kept.keep(key, [])
    all_known.insert(0, known)
    del all_known[_MOST_GUARDS:]


def guards_of_any_size(tensors: Sequence[torch.Tensor]) -> Any:
    """Guards whose ``check`` tells whether as many tensors are like these, but for sizes and strides.

    It looks at what :func:`kind_of` does, at the number of dimensions, at gradients, and at dispatch keys. Not to be
    asked about nested tensors. None if nothing can be known of these again.
    """
    free: list[Any] = [[None] * tensor.dim() for tensor in tensors]
    return _guards(tensors, free, free)


def _strides_that_count(tensor: torch.Tensor) -> list[int | None]:
    """None for dimensions that have one element, or none."""
    return [stride if size > 1 else None for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _guards(tensors: Sequence[torch.Tensor], sizes: list[Any], strides: list[Any]) -> Any:
    """Guards of plain tensors with these sizes and strides, of which None is any; None if they do not know these."""
    is_plain = None not in map(kind_of, tensors) and len(set(map(id, tensors))) == len(tensors)
    if TensorGuards is None or not is_plain:
        return None
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards if guards.check(*tensors) else None

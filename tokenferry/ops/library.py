"""How an operator comes to be: schema, kernel, shapes, gradient, and what compilers must leave alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import or_
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.effects import EffectType
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from tokenferry.kept import guards_of_any_size

_library = torch.library.Library("tokenferry", "DEF")  # type: ignore[no-untyped-call]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(function: _Function) -> _Function:
    """Have compilers leave a function, and what it calls, alone where it runs: they know the operator from outside.

    Otherwise they would compile it where the operator is called eagerly within something compiled: at a graph break.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def apart(outputs: Any) -> Any:
    """Outputs, a tensor or some, of which none is a part of another's memory: compilers may write to any of them.

    The small ones are made in one piece. Who calls the functions, and not the operators, gets them so.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    return [output.clone() if output.storage_offset() else output for output in outputs]


def define(
    name: str,
    signature: str,
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
    differentiable: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define ``tokenferry::name``.

    Args:
        name: of the operator.
        signature: its arguments and its result, a single one: compilers do not find the unknown sizes in a tuple.
        kernel: computes it, on CPU and CUDA tensors alike.
        shapes: makes results of the right shapes without computing.
        differentiable: called first, with dispatch keys, for :func:`run`, and the arguments.
    """
    _library.define(name + signature)  # type: ignore[no-untyped-call]

    def kernel_of_dispatcher(*args: Any, **kwargs: Any) -> Any:
        return apart(kernel(*args, **kwargs))

    for device in ("CPU", "CUDA"):
        _library.impl(name, opaque(kernel_of_dispatcher), device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tokenferry::{name}", shapes, lib=_library)
    _library.impl(name, opaque(differentiable), "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    operator: torch._ops.OpOverload = getattr(torch.ops.tokenferry, name).default
    # The other ranks take part: a compiler must neither drop an operator without users nor change the order.
    torch.library._register_effectful_op(operator, EffectType.ORDERED, lib=_library)
    return operator


_VALUES = {str, int, bool, type(None)}
_Key = torch._C.DispatchKey
_SEEN_KEYS = ~functools.reduce(
    or_,
    (
        torch._C.DispatchKeySet(key).raw_repr()
        for key in (
            _Key.CPU, _Key.CUDA, _Key.ADInplaceOrView, _Key.AutogradCPU, _Key.AutogradCUDA, _Key.AutocastCPU,
            _Key.AutocastCUDA,
        )
    ),
)  # fmt: skip
"""What the dispatcher would find in a tensor, besides what comes to nothing but the operator's own kernels."""


class _Plain:
    """Tensors of which the dispatcher would find nothing else than the operator's own kernels.

    Their dispatch keys tell. To look at those takes some microseconds for each tensor, so tensors like others before
    are known by one call of torch's guards.

    Attributes:
        known: guards, and whether one of their tensors requires a gradient, by the number of tensors.
    """

    def __init__(self) -> None:
        self.known: dict[int, list[tuple[Any, bool]]] = {}

    def learn(self, tensors: list[torch.Tensor]) -> bool | None:
        """Whether one of them requires a gradient; None if they are not plain."""
        for given in tensors:
            if torch._C._dispatch_keys(given).raw_repr() & _SEEN_KEYS:
                return None
        needs = any(given.requires_grad for given in tensors)
        guards = guards_of_any_size(tensors)
        if guards is not None:
            known = self.known.setdefault(len(tensors), [])
            known.append((guards, needs))
            del known[:-_MOST_KNOWN]
        return needs


_MOST_KNOWN = 8
"""Kinds of as many tensors."""


def _places_of(kinds: tuple[type, ...]) -> tuple[list[int], list[int]] | None:
    """Which of arguments of these types are tensors, and which hold tensors; None if some are anything else."""
    tensors = [place for place, kind in enumerate(kinds) if kind in (torch.Tensor, torch.nn.Parameter)]
    holders = [place for place, kind in enumerate(kinds) if issubclass(kind, (list, tuple))]
    num_values = sum(kind in _VALUES for kind in kinds)
    return (tensors, holders) if len(tensors) + len(holders) + num_values == len(kinds) else None


def function_of(
    operator: torch._ops.OpOverload, differentiable: Callable[..., Any], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    """The operator as a function of Python, which calls its kernel without torch's dispatcher where that may be.

    That is: no compiler, tracer, mode, transform, subclass or other kind of tensor sees the call. The dispatcher
    alone takes longer than the operator's own part.

    Args:
        operator: called everywhere else.
        differentiable: as in :func:`define`; called without keys where an input may need a gradient.
        kernel: as in :func:`define`; called where none does.
    """
    nothing, plain = (), _Plain()
    known = plain.known
    known_places: dict[tuple[type, ...], tuple[list[int], list[int]]] = {}
    is_compiling, num_modes, num_function_modes = (
        torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    )  # fmt: skip
    is_transforming, is_tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing

    def function(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or num_modes() or num_function_modes() or is_transforming() or is_tracing():
            return operator(*args, **kwargs)
        given = (*args, *kwargs.values()) if kwargs else args
        kinds = tuple(map(type, given))
        places = known_places.get(kinds)
        if places is None:
            places = _places_of(kinds)
            if places is None:
                return operator(*args, **kwargs)
            known_places[kinds] = places
        for place in places[1]:
            for element in given[place]:
                if type(element) is not torch.Tensor:
                    return operator(*args, **kwargs)
        tensors = []
        for place in places[0]:
            one = given[place]
            if one.is_nested:  # guards must not be asked for its strides
                return operator(*args, **kwargs)
            tensors.append(one)
        needs: bool | None
        for guards, needs in known.get(len(tensors), nothing):  # noqa: B007
            if guards.check(*tensors):
                break
        else:
            needs = plain.learn(tensors)
            if needs is None:
                return operator(*args, **kwargs)
        if needs or forward_ad._current_level >= 0:
            return differentiable(None, *args, **kwargs)
        return kernel(*args, **kwargs)

    name = operator._schema.name.partition("::")[2]
    function.__name__ = function.__qualname__ = differentiable.__qualname__ = kernel.__qualname__ = name
    function.__doc__ = f"``torch.ops.{operator}``; eagerly, without torch's dispatcher."
    return opaque(function)


def is_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode, of any tensor."""
    return forward_ad._current_level >= 0


def is_differentiated(*inputs: torch.Tensor | None) -> bool:
    """Whether autograd must know what becomes of these inputs."""
    if forward_ad._current_level >= 0:
        return True
    for tensor in inputs:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function in an autograd kernel.

    ``torch.func`` has done its part when such a kernel is called; the function's own ``apply`` would ask it again.
    """
    if torch._C._are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return _of_one_level(function).apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


@functools.cache
def _of_one_level(function: type[torch.autograd.Function]) -> Any:
    """The same function, of which ``torch.func`` is not told."""
    own = {name: method for name, method in vars(function).items() if isinstance(method, staticmethod)}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), own)


_BELOW = torch._C._after_ADInplaceOrView_keyset
_PLAIN = tuple(
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)
"""What keys are below autograd where the kernel is all that is left to do: nothing traces or transforms the call."""


_plain: dict[int, bool] = {}
"""Of the sets of keys that came."""


def is_plain(keys: torch.DispatchKeySet | None) -> bool:
    """Whether the kernel is all that is left to do below autograd; without keys, it is known to be."""
    if keys is None:
        return True
    given = keys.raw_repr()
    found = _plain.get(given)
    if found is None:
        found = _plain[given] = (keys & _BELOW).raw_repr() in _PLAIN
    return found


def run(
    keys: torch.DispatchKeySet | None, operator: torch._ops.OpOverload, kernel: Callable[..., Any], *args: Any
) -> Any:
    """Run an operator that is not differentiated, for its autograd kernel, which got ``keys``.

    Args:
        keys: of the call, if it came through the dispatcher.
        operator: the operator.
        kernel: of it; called right away where the dispatcher would come to nothing else, which costs it some
            microseconds.
        args: of the operator, all of them.
    """
    if is_plain(keys):
        return kernel(*args) if keys is None else apart(kernel(*args))
    assert keys is not None
    if not torch.compiler.is_compiling():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)
    with _kept():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *args)


def run_below(operator: torch._ops.OpOverload, kernel: Callable[..., Any] | None, *args: Any) -> Any:
    """Run an operator in the forward of its autograd function: its kernel right away, if that is given."""
    if kernel is not None:
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)
    if torch.compiler.is_compiling():
        with torch._C._AutoDispatchBelowAutograd(), _kept():
            return operator(*args)
    if torch._C._are_functorch_transforms_active():
        # The forward of a function runs without gradients; an outer transform wants one of it all the same.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


@contextmanager
def _kept() -> Iterator[None]:
    """Keep what the block traces for backward, also where activation checkpointing would compute it again.

    A compiler that recomputes may place it anywhere in backward: ranks would meet in different operations.
    """
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes = mode.tracer.graph.nodes
    num_known = len(nodes)
    yield
    for node in islice(reversed(nodes), len(nodes) - num_known):
        if "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

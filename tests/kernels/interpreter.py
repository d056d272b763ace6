"""Triton's interpreter made fit for the simulator. ``install`` changes it once per process, in three ways:

*Speed.* Stock, every launch and every call of a helper patches ``triton.language`` anew; here it is patched once.
Nor are sums and products computed again in int64 for a check of overflows that reports none without debugging, or
functions rewritten again when their module is imported anew. Shapes and constants are made once, and operands of one
type, or a number that fits the other's, skip the questions that this answers.

*Programs.* Program ids, memory operations and barriers of a thread that has a ``Program`` go through that program;
other threads, and so ordinary launches, keep the stock behaviour.

*Numbers.* The interpreter holds bfloat16 and float8 as bit patterns, truncates where a GPU rounds to nearest even,
does not saturate float8, and adds the bit patterns of bfloat16 as integers. Here conversions agree with the GPU's,
arithmetic is done in float32 and rounded back, and a reduction over such a type is an error. Scalar booleans stay
booleans where they meet tensors.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

ACQUIRING = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASING = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)

NARROW = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
}
"""Types that the interpreter holds as bit patterns."""

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

Perform = Callable[[], stock.TensorHandle]


class Program(Protocol):
    """One program of a grid. Addresses are those of the elements that the mask lets through."""

    index: tuple[int, int, int]
    grid: tuple[int, int, int]

    def load(self, addresses: np.ndarray, *, is_volatile: bool, perform: Perform) -> stock.TensorHandle: ...

    def store(self, addresses: np.ndarray, values: np.ndarray, *, is_scalar: bool) -> None: ...

    def atomic(
        self, addresses: np.ndarray, itemsize: int, *, acquires: bool, releases: bool, perform: Perform
    ) -> stock.TensorHandle: ...

    def barrier(self) -> None: ...


class _Running(threading.local):
    program: Program | None = None


running = _Running()
"""``running.program``: the program that the calling thread executes."""

_is_installed = False


def install() -> None:
    """Change the interpreter; a second call does nothing."""
    global _is_installed
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    if not _is_installed:
        _is_installed = True
        _patch_language_once()
        _compute_once()
        _remember_shapes_and_constants()
        _skip_questions()
        _know_types_at_once()
        _rewrite_once()
        _ask_programs()
        _repair_numbers()


def callable_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    """A function without arguments that runs one program of a launch; tensors become pointers, as at a launch."""
    function = kernel.rewrite()
    stock._patch_lang(kernel.fn)
    known = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = stock.inspect.getcallargs(kernel.fn, *args, **known)
    converted = {name: v if _is_constexpr(kernel, name) else stock._implicit_cvt(v) for name, v in bound.items()}
    return lambda: function(**converted)


def read_words(addresses: np.ndarray, itemsize: int) -> np.ndarray:
    """What memory holds at ``addresses``, as unsigned integers."""
    dtype = np.dtype(f"u{itemsize}")
    every = np.ones(addresses.shape, dtype=bool)
    return stock._interpreter.load(addresses, every, np.zeros(addresses.shape, dtype), dtype)


def write_words(addresses: np.ndarray, values: np.ndarray) -> None:
    """Put ``values``, of any type, to ``addresses``."""
    stock._interpreter.store(addresses, values, np.ones(addresses.shape, dtype=bool))


def _is_constexpr(kernel: Any, name: str) -> bool:
    return "constexpr" in str(kernel.fn.__annotations__.get(name, ""))


class _NothingToRestore:
    def restore(self) -> None:
        pass


def _patch_language_once() -> None:
    patch_language = stock._patch_lang
    patched: set[frozenset[int]] = set()
    seen: dict[int, dict[str, Any]] = {}

    def patch_language_once(function: Any) -> _NothingToRestore:
        names = function.__globals__
        if id(names) not in seen:
            seen[id(names)] = names
            visible = frozenset(id(value) for value in names.values() if value is tl or value is tl.core)
            if visible not in patched:
                patch_language(function)
                # Stock, int(array of one element): a warning of numpy 2.3, an error of 2.4.
                tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
                patched.add(visible)
        return _NothingToRestore()

    stock._patch_lang = patch_language_once


def _compute_once() -> None:
    builder = stock.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    stock_dtype, known = stock._get_np_dtype, {}

    def numpy_dtype(dtype):
        """Stock, a table of all types made anew for each question."""
        name = dtype.scalar.name
        if name not in known:
            known[name] = stock_dtype(dtype)
        return known[name]

    stock._get_np_dtype = numpy_dtype


def _remember_shapes_and_constants() -> None:
    """Nothing in the interpreter changes a shape or a handle's data in place."""
    stock_constant, stock_block = TritonSemantic.scalar_constant, tl.block_type.__init__
    shapes: dict[tuple[int, ...], tuple[tl.tuple, tl.constexpr]] = {}
    blocks: dict[tuple[int, ...], tuple[tl.tuple, int]] = {}
    constants: dict[tuple[int, str], tl.tensor] = {}

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        self.shape, self.numel = shapes[sizes]

    def make_block(self, element, shape):
        sizes = tuple(size.value if type(size) is tl.constexpr else size for size in shape)
        if sizes not in blocks:
            stock_block(self, element, shape)
            blocks[sizes] = self.shape, self.numel
        self.element_ty = element
        self.shape, self.numel = blocks[sizes]

    def constant(self, value, dtype):
        if type(value) is not int:
            return stock_constant(self, value, dtype)
        key = value, dtype.name
        if key not in constants:
            constants[key] = stock_constant(self, value, dtype)
        return constants[key]

    tl.tensor.__init__, tl.block_type.__init__, TritonSemantic.scalar_constant = make_tensor, make_block, constant
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)


def _skip_questions() -> None:
    """Of two operands that need no conversion nothing has to be found out."""
    stock_check = TritonSemantic.binary_op_type_checking_impl
    limits = {dtype.name: (dtype.get_int_min_value(), dtype.get_int_max_value()) for dtype in (tl.int32, tl.int64)}

    def check(self, left, right, *args, **kwargs):
        if type(left) is tl.tensor and left.dtype.name in limits:
            if type(right) is tl.tensor:
                if left.dtype.name == right.dtype.name and left.shape is right.shape:
                    return left, right
            elif type(right) is int:
                low, high = limits[left.dtype.name]
                if low <= right <= high:
                    right = self.scalar_constant(right, left.dtype)
                    return left, self.splat(right, left.type.shape) if left.type.is_block() else right
        return stock_check(self, left, right, *args, **kwargs)

    stock_broadcast = TritonSemantic.broadcast_impl_value

    def broadcast(self, left, right):
        return (left, right) if left.shape is right.shape else stock_broadcast(self, left, right)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = check, broadcast


def _know_types_at_once() -> None:
    """What is asked of every operand is answered by its type where that suffices."""
    stock_unwrap, stock_equal = tl.core._unwrap_if_constexpr, tl.dtype.__eq__
    plain = {int, bool, float, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}

    def unwrap(value):
        return value if type(value) in plain else stock_unwrap(value)

    def equal(self, other):
        return self is other or stock_equal(self, other)

    tl.core._unwrap_if_constexpr, tl.dtype.__eq__ = unwrap, equal


def _rewrite_once() -> None:
    rewriter = stock.FunctionRewriter
    rewrite = rewriter.rewrite_ast
    rewritten: dict[Any, Any] = {}

    def key_of(function):
        return function.__code__.co_filename, function.__code__

    def compile_and_run(self, tree):
        code = rewritten[key_of(self.fn)] = compile(tree, self.filename, "exec")
        return run(self, code)

    def run(self, code):
        names = {**self.kwargs}
        for name, value in vars(stock).items():
            self.fn.__globals__.setdefault(name, value)
        exec(code, self.fn.__globals__, names)
        return names[self.fn.__name__]

    def rewrite_once(self):
        code = rewritten.get(key_of(self.fn))
        return rewrite(self) if code is None else run(self, code)

    rewriter.rewrite_ast, rewriter._compile_and_exec = rewrite_once, compile_and_run


def _ask_programs() -> None:
    """Let the program of the calling thread, if it has one, decide about its memory operations."""
    builder = stock.InterpreterBuilder
    stock_index, stock_grid = builder.create_get_program_id, builder.create_get_num_programs
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def program_id(self, axis):
        program = running.program
        return stock_index(self, axis) if program is None else self.get_int32(program.index[axis])

    def num_programs(self, axis):
        program = running.program
        return stock_grid(self, axis) if program is None else self.get_int32(program.grid[axis])

    def load(self, pointers, mask, other, *policies_and_is_volatile):  # which differ between versions
        def perform():
            return stock_load(self, pointers, mask, other, *policies_and_is_volatile)

        if running.program is None:
            return perform()
        is_volatile = policies_and_is_volatile[-1]
        return running.program.load(pointers.data[mask.data], is_volatile=is_volatile, perform=perform)

    def store(self, pointers, value, mask, *policies):
        if running.program is None:
            return stock_store(self, pointers, value, mask, *policies)
        is_scalar = pointers.data.size == 1
        return running.program.store(pointers.data[mask.data], value.data[mask.data], is_scalar=is_scalar)

    def atomic(addresses, value, sem, perform):
        if running.program is None:
            return perform()
        acquires, releases = sem in ACQUIRING, sem in RELEASING
        return running.program.atomic(
            addresses, value.data.itemsize, acquires=acquires, releases=releases, perform=perform
        )

    def rmw(self, operation, pointers, value, mask, sem, scope):
        def perform():
            return stock_rmw(self, operation, pointers, value, mask, sem, scope)

        return atomic(pointers.data[mask.data], value, sem, perform)

    def cas(self, pointers, expected, value, sem, scope):
        def perform():
            return stock_cas(self, pointers, expected, value, sem, scope)

        return atomic(pointers.data.reshape(-1), value, sem, perform)

    def barrier(self):
        if running.program is not None:
            running.program.barrier()

    builder.create_get_program_id, builder.create_get_num_programs = program_id, num_programs
    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    builder.create_barrier = barrier


def _to_float32(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    if dtype not in NARROW:
        return bits.astype(np.float32)
    signed = np.dtype(f"i{bits.itemsize}")
    return torch.from_numpy(np.array(bits, order="C").view(signed)).view(NARROW[dtype][0]).float().numpy()


def _from_float32(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Round to nearest even; float8 saturates, as the GPU's conversions do."""
    narrow, bits = NARROW[dtype]
    tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    if dtype == tl.float8e4nv:
        tensor = tensor.clamp(-448, 448)
    elif dtype == tl.float8e5:
        tensor = torch.where(tensor.isinf(), tensor, tensor.clamp(-57344, 57344))
    signed = torch.int8 if narrow.itemsize == 1 else torch.int16
    return tensor.to(narrow).view(signed).numpy().view(bits)


def _repair_numbers() -> None:
    _repair_booleans()
    _repair_casts()
    _repair_arithmetic()
    _refuse_reductions()


def _repair_booleans() -> None:
    """Stock, a boolean becomes an integer where a scalar meets a tensor, and a mask of these picks other elements."""
    builder = stock.InterpreterBuilder
    stock_splat = builder.create_splat

    def splat(self, target_type, source):
        result = stock_splat(self, target_type, source)
        return stock.TensorHandle(result.data.astype(bool), tl.int1) if source.data.dtype == bool else result

    builder.create_splat = splat


def _repair_casts() -> None:
    builder = stock.InterpreterBuilder
    stock_cast, stock_float_cast = builder.cast_impl, builder.create_fp_to_fp

    def cast(self, source, target_type):
        source_type, target = source.dtype.scalar, target_type.scalar
        if source_type not in NARROW and target not in NARROW:
            return stock_cast(self, source, target_type)
        values = _to_float32(source.data, source_type)
        converted = _from_float32(values, target) if target in NARROW else values.astype(stock._get_np_dtype(target))
        return stock.TensorHandle(converted, target)

    def float_cast(self, source, target_type, rounding_mode):
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            return stock_float_cast(self, source, target_type, rounding_mode)
        return cast(self, source, target_type)

    builder.cast_impl, builder.create_fp_to_fp = cast, float_cast


def _repair_arithmetic() -> None:
    builder = stock.InterpreterBuilder
    stock_binary, stock_dot = builder.binary_op, builder.create_dot

    def widened(handle):
        dtype = handle.dtype.scalar
        return stock.TensorHandle(_to_float32(handle.data, dtype), tl.float32) if dtype in NARROW else handle

    def binary(self, left, right, operation):
        dtype = left.dtype.scalar
        if dtype not in NARROW or operation in BITWISE:
            return stock_binary(self, left, right, operation)
        result = operation(widened(left).data, widened(right).data)
        if operation in COMPARISONS:
            return stock.TensorHandle(result, tl.int1)
        return stock.TensorHandle(_from_float32(result, dtype), dtype)

    def dot(self, a, b, accumulator, *options):
        return stock_dot(self, widened(a), widened(b), accumulator, *options)

    builder.binary_op, builder.create_dot = binary, dot


def _refuse_reductions() -> None:
    def refusing(reduce):
        def refuse(self, values, *args, **kwargs):
            first = values[0] if isinstance(values, tuple) else values
            if first.dtype.scalar in NARROW:
                raise TypeError(f"the interpreter cannot reduce {first.dtype.scalar}: cast to float32 first")
            return reduce(self, values, *args, **kwargs)

        return refuse

    stock.ReduceOps.sum = refusing(stock.ReduceOps.sum)
    stock.ReduceOps.min_max = refusing(stock.ReduceOps.min_max)

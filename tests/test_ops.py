"""The operators compute what the Buffer computes, say what they are given wrongly, and are what torch expects."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases, low_latency_cases, operator_cost
from tests.cases import Case, Scenario
from tests.conftest import PoolOf, slow
from tests.internode_cases import NodeScenario, make_buffer
from tests.operators import ThroughOperators, draw
from tokenferry import ArgumentError, Buffer, BufferStateError, Config, ops
from tokenferry.nn import functional
from tokenferry.ops import library

CASES = [
    Case(tokens=(33, 0, 7), num_topk=4, local_experts=3, spare_rows=5, bias="two"),
    Case(tokens=(9, 4), routing="duplicates", alignment=16, bias="one", combine_dtype=torch.float32),
    Case(tokens=(5, 8), routing="sparse", dtype=torch.int64, x_layout="columns", combine_dtype=torch.float64),
    Case(
        tokens=(6, 11), dtype=torch.float8_e4m3fn, scales=torch.float32, scale_layout="padded_columns", spare_rows=3
    ),
    Case(tokens=(4, 3), dtype=torch.uint8, scales=torch.int32, scale_columns=3, routing="others", bias="second"),
    Case(tokens=(0,)),
]


def check_cases(
    rank: int,
    num_ranks: int,
    device: str = "cpu",
    timeout: float = cases.TIMEOUT,
    chosen: Sequence[cases.Case] = CASES,
    layout: str = "",
) -> None:
    """Among ranks of one node, or of several in some layout."""
    unset = cases.poisoned_memory if device == "cpu" else cases.filled_memory
    options: dict[str, Any] = {"timeout": timeout, "device": device}
    with make_buffer(rank, layout, **options) if layout else Buffer(dist.group.WORLD, **options) as buffer:
        for case, operators in itertools.product(chosen, (ops, torch.ops.tokenferry)):
            seen = ThroughOperators(buffer, operators)
            if layout:
                scenario: Scenario = NodeScenario(case, rank, layout, device=device)
            else:
                scenario = Scenario(case, rank, num_ranks, device)
            scenario.check_all(seen)
            num_rows = scenario.num_rows[rank]
            with unset():
                worst = num_rows + 40
                received = scenario.dispatch(seen, num_worst_tokens=worst)
                plain = scenario.dispatch(buffer, num_worst_tokens=worst)  # sets none of them
                again = scenario.dispatch(seen, num_worst_tokens=worst)
                cached = seen.dispatch(scenario.x, handle=received[4])
            for outputs in (received[0], plain[0], again[0], cached[0]):
                for rows in outputs if isinstance(outputs, tuple) else (outputs,):
                    assert len(rows) == worst
                    assert bool(cases.bits(rows)[num_rows:].any()) is (outputs is plain[0])


@pytest.mark.parametrize("num_ranks", [3, *slow(1)])
def test_high_throughput_as_the_oracle_says(pool_of: PoolOf, num_ranks: int) -> None:
    """All calls of :mod:`tests.cases`; past the received rows there are zeros, not what was in memory."""
    pool_of(num_ranks).run(check_cases)


def test_between_nodes_as_the_oracle_says(pool_of: PoolOf) -> None:
    pool_of(2).run(check_cases, "cpu", cases.TIMEOUT, CASES, "2x1")


def check_low_latency(rank: int, num_ranks: int) -> None:
    with low_latency_cases.make_buffer() as buffer, cases.poisoned_memory():
        for number, kind in enumerate(low_latency_cases.FORMATS):
            seen = ThroughOperators(buffer, (ops, torch.ops.tokenferry)[number % 2])
            case = low_latency_cases.Case(tokens=(5, 3, 0), spare=1, hidden=256, format=kind, seed=number)
            scenario = low_latency_cases.Scenario(case, rank, num_ranks)
            result = scenario.dispatch(seen)
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(seen, result))


def test_low_latency_as_the_oracle_says(pool_of: PoolOf) -> None:
    pool_of(3).run(check_low_latency)


def check_operators(rank: int, num_ranks: int) -> None:
    every = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with Buffer(dist.group.WORLD, low_latency_mode=True) as buffer:
        name = ops.register(buffer)
        x, ids, weights = (value.requires_grad_(value.is_floating_point()) for value in draw(rank, 5 + rank))
        check(ops.dispatch, every, x, ids, weights, name, 4)
        check(ops.dispatch, every[:3], x, ids, weights, name, 4, 20, 4)
        rows, _, recv_weights, _, *handle = (t.detach() for t in ops.dispatch(x, ids, weights, name, 4))
        check(ops.cached_dispatch, every, x, handle, name)
        check(ops.combine, every[:3], rows.requires_grad_(), handle, name)
        check(ops.combine, every, rows, handle, name, recv_weights.requires_grad_(), x, torch.ones_like(x))
        data = (x.detach().view(torch.uint8), torch.ones(len(x), 3).t().contiguous().t())
        check(ops.dispatch, every[:3], data[0], ids, weights.detach(), name, 4, 0, 1, data[1], 8)
        check(ops.cached_dispatch, every[:3], data[0], handle, name, data[1], 8)
        wide = torch.randn(5 + rank, 256).bfloat16()
        for flags in low_latency_cases.FORMATS.values():
            # Rows past the count are not set: there is nothing to compare between two runs.
            check(ops.low_latency_dispatch, every[:3], wide, ids, name, 8, 4, **flags)
        slabs, _, _, *tables = ops.low_latency_dispatch(wide, ids, name, 8, 4, use_fp8=False)
        slabs.nan_to_num_(0.0, 0.0, 0.0)
        check(ops.low_latency_combine, every[:3], slabs, ids, weights.detach(), tables, name, 8, 4)


def check(function: Callable[..., Any], kinds: tuple[str, ...], *args: Any, **given: Any) -> None:
    operator = getattr(torch.ops.tokenferry, function.__name__).default
    assert operator in ops.OPERATORS
    torch.library.opcheck(operator, args, given, test_utils=kinds)


def configs_that_arrive(rank: int, num_ranks: int) -> None:
    """SMs and chunks between nodes, in forward and backward; a preset stays one."""
    own, preset = Config(24, 8, 300, 16, 512), Buffer.get_dispatch_config(num_ranks)
    with Buffer(dist.group.WORLD) as buffer:
        seen: list[Config | None] = []
        mode = buffer._mode
        buffer._mode = lambda runtime, config: mode(runtime, seen.append(config) or config)  # type: ignore[assignment,func-returns-value,method-assign]
        x, ids, weights = draw(rank, 5)
        for given, wanted in (
            (own, (24, 512)),
            (preset, (20, preset.num_max_rdma_chunked_recv_tokens)),
            (None, None),
        ):
            seen.clear()
            x = x.detach().requires_grad_()
            got = functional.dispatch(buffer, x, ids, weights, 4, config=given)
            functional.combine(buffer, got.x, got.handle, config=given).sum().backward()
            assert len(seen) == 4
            found = [of and (of.num_sms, of.num_max_rdma_chunked_recv_tokens) for of in seen]
            assert found == [wanted] * 4, found
        seen.clear()
        ops.combine(got.x.detach(), list(got.handle), ops.name_of(buffer), num_sms=8)
        assert seen == [dataclasses.replace(Buffer.get_combine_config(num_ranks), num_sms=8)]


def test_configs_arrive(pool_of: PoolOf) -> None:
    pool_of(2).run(configs_that_arrive)


def outputs_are_apart(rank: int, num_ranks: int, layout: str) -> None:
    """Also of a handle between nodes, whose tensors are made in few pieces."""
    with make_buffer(rank, layout) as buffer:
        name = ops.register(buffer)
        x, ids, weights = draw(rank, 5 + rank)
        for x_of in (x, x.clone().requires_grad_()):
            got = torch.ops.tokenferry.dispatch(x_of, ids, weights, name, 4)
            places = [output.untyped_storage().data_ptr() for output in got if output.numel()]
            assert len(set(places)) == len(places)
            wanted = ops.dispatch(x_of, ids, weights, name, 4)
            assert all(map(torch.equal, got, wanted))
            assert [output.stride() for output in got] == [output.stride() for output in wanted]
        rows, handle = got[0].detach(), got[4:]
        assert torch.equal(
            torch.ops.tokenferry.combine(rows, handle, name)[0], ops.combine(rows, wanted[4:], name)[0]
        )


def test_outputs_of_operators_share_no_memory(pool_of: PoolOf) -> None:
    pool_of(2).run(outputs_are_apart, "2x1")


@pytest.mark.slow
def test_opcheck(pool_of: PoolOf) -> None:
    pool_of(2).run(check_operators)


def _traced(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
    torch.jit.trace(call, x, check_trace=False)


class _Subclass(torch.Tensor):
    pass


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


def _within(mode: Any, call: Callable[..., Any], *args: Any) -> None:
    with mode:
        call(*args)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[..., Any]) -> torch.Tensor:
        ctx.call = call
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.call(grad), None


def batched(call: Callable[..., Any], x: torch.Tensor) -> None:
    """By the older of torch's two ways, of which the tensors alone know."""
    doubled = _Doubled.apply(x.requires_grad_(), call)
    torch.autograd.grad(doubled, x, torch.ones(2, 3), is_grads_batched=True)


SEEN: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "a compiler": lambda call, x: torch.compile(lambda x: call(x), backend="eager", fullgraph=True)(x),
    "a mode of dispatch": lambda call, x: _within(_Dispatches(), call, x),
    "a mode of functions": lambda call, x: _within(_Functions(), call, x),
    "a device as a default": lambda call, x: _within(torch.device("cpu"), call, x),
    "a graph that is drawn": lambda call, x: make_fx(call)(x),
    "a trace": _traced,
    "a transform": lambda call, x: torch.func.vjp(call, x),
    "a derivative in forward mode": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "a batch of gradients": lambda call, x: batched(call, x),
    "tensors that stand for functions": lambda call, x: call(torch._to_functional_tensor(x)),
    "a subclass": lambda call, x: call(x.as_subclass(_Subclass)),
    "a subclass behind": lambda call, x: call(x, [], x.as_subclass(_Subclass)),
    "a subclass in a list": lambda call, x: call(x, [x, x.as_subclass(_Subclass)]),
    "a subclass by name": lambda call, x: call(x, other=x.as_subclass(_Subclass)),
    "another device": lambda call, x: call(x.to("meta")),
}
UNSEEN: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "nobody": lambda call, x: call(x),
    "autograd": lambda call, x: call(x.requires_grad_()),
    "inference mode": lambda call, x: _within(torch.inference_mode(), call, x),
    "a parameter": lambda call, x: call(torch.nn.Parameter(x), [x], "name", None, 3, other=True),
    "autocast": lambda call, x: _within(torch.autocast("cpu"), call, x),
    "no gradients": lambda call, x: _within(torch.no_grad(), call, x),
}


def test_functions_are_not_compiled_where_they_run() -> None:
    """Called outside a graph, by what compilers look into, they are no graph of their own."""
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(module.code)
        return module.forward

    call = function(lambda x: x * 2, lambda keys, x: x * 2, lambda x: x * 2)

    @torch.compiler.disable(recursive=False)
    def between(x: torch.Tensor) -> torch.Tensor:
        return call(x)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.compile(lambda x: between(x.sin()).cos(), backend=backend)(torch.ones(3))
    torch._dynamo.reset()
    assert len(graphs) == 2
    assert "sin" in graphs[0]
    assert "cos" in graphs[1]


def function(
    operator: Callable[..., Any], differentiable: Callable[..., Any], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    """A function of what stands for an operator, ``tests::double``."""
    operator._schema = SimpleNamespace(name="tests::double")  # type: ignore[attr-defined]
    return library.function_of(operator, differentiable, kernel)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_the_dispatcher_is_left_out_only_where_nothing_else_sees_the_call(name: str) -> None:
    reached = []

    def operator(x: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        reached.append("operator")
        return x * 2

    def differentiable(keys: None, x: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        assert keys is None
        reached.append("differentiable")
        return x * 2

    def kernel(x: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        reached.append("kernel")
        return x * 2

    call = function(operator, differentiable, kernel)
    assert call.__name__ == "double"
    for known in (torch.ones(3), torch.ones(3).requires_grad_()):
        call(known)
        call(known, [known], known)
    assert set(reached) == {"kernel", "differentiable"}
    reached.clear()
    (SEEN | UNSEEN)[name](call, torch.ones(3))
    expected = "differentiable" if name in ("autograd", "a parameter") else "kernel"
    assert set(reached) == {"operator" if name in SEEN else expected}


def check_numbers(rank: int, num_ranks: int) -> None:
    """Of rows, as the dispatcher takes them."""
    with Buffer(dist.group.WORLD) as buffer, cases.poisoned_memory():
        name, (x, ids, weights) = ops.register(buffer), draw(rank, 3)
        for worst in (9, torch.tensor(9)):
            rows, received_ids, *_ = ops.dispatch(x, ids, weights, name, 4, worst)
            unused = (received_ids < 0).all(1)
            assert len(rows) == 9
            assert unused.any()
            assert not rows[unused].any()


def test_rows_are_zeroed_however_their_number_is_given(pool_of: PoolOf) -> None:
    pool_of(2).run(check_numbers)


def check_names(rank: int, num_ranks: int) -> None:
    first, second = Buffer(dist.group.WORLD), Buffer(dist.group.WORLD)
    name = ops.register(first)
    assert (ops.register(first), ops.name_of(first), ops.register(first, name)) == (name, name, name)
    assert ops.buffer_of(name) is first
    assert ops.name_of(second) != name
    with pytest.raises(ArgumentError, match=f"name: got 'other'; allowed: '{name}', the name of this Buffer"):
        ops.register(first, "other")
    with pytest.raises(ArgumentError, match=r"buffer: got str; allowed: a tokenferry\.Buffer"):
        ops.register(name)
    third = Buffer(dist.group.WORLD)
    with pytest.raises(ArgumentError, match="a name that no other live Buffer has"):
        ops.register(third, name)
    with pytest.raises(ArgumentError, match="name: got 'a name'; allowed: letters"):
        ops.register(third, "a name")
    first.destroy()
    x, ids, weights = draw(rank, 3)
    with pytest.raises(BufferStateError, match="the Buffer was destroyed"):
        ops.dispatch(x, ids, weights, name, 4)
    assert ops.register(third, name) == name
    assert ops.buffer_of(name) is third
    del third
    gc.collect()
    with pytest.raises(BufferStateError, match=f"no Buffer is known as '{name}': tokenferry.ops.register"):
        ops.dispatch(x, ids, weights, name, 4)
    second.destroy()


def test_names(pool_of: PoolOf) -> None:
    """A Buffer has one name, and a name one live Buffer, which it does not keep alive."""
    pool_of(1).run(check_names)


def check_wrong_arguments(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, low_latency_mode=True) as buffer:
        name = ops.register(buffer)
        x, ids, weights = draw(rank, 3)
        rows, _, _, _, *handle = ops.dispatch(x, ids, weights, name, 4)
        for call in (ops.cached_dispatch, ops.combine):
            with pytest.raises(ArgumentError, match="handle: got 5 tensors; allowed: the 6 tensors"):
                call(rows, handle[1:], name)
            with pytest.raises(ArgumentError, match="handle: got NoneType; allowed: the 6 tensors"):
                call(rows, None, name)
            with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) missing 1 required .* 'buffer'"):
                call(rows, handle)
        with pytest.raises(ArgumentError, match="topk_idx: got the value 4; allowed: expert ids from 0 to 3"):
            ops.dispatch(x, ids + 4 * (ids == 0), weights, name, 4)
        small = x.to(torch.float8_e4m3fn).repeat(1, 2).requires_grad_()
        for call, given in ((ops.dispatch, (ids, weights, name, 4)), (ops.cached_dispatch, (handle, name))):
            with pytest.raises(ArgumentError, match=r"x: got torch.float8_e4m3fn rows that require a gradient"):
                call(small, *given)
            with torch.inference_mode():
                call(small, *given)
        with pytest.raises(ArgumentError, match=r"config: got int; allowed: a tokenferry\.Config"):
            functional.dispatch(buffer, x, ids, weights, 4, config=5)
        functional.dispatch(buffer, x, ids, weights, 4, config=Config(8))


def test_wrong_arguments_are_named(pool_of: PoolOf) -> None:
    pool_of(1).run(check_wrong_arguments)


def check_no_gradient(rank: int, num_ranks: int) -> None:
    with low_latency_cases.make_buffer() as buffer:
        x, ids, weights = draw(rank, 4, hidden=128)
        x = x.bfloat16().requires_grad_()
        sent = functional.low_latency_dispatch(buffer, x, ids, 4, 4, use_fp8=False)
        combined = functional.low_latency_combine(buffer, sent.x, ids, weights.requires_grad_(), sent.handle)
        torch.testing.assert_close(combined.float(), (x * weights.sum(1, keepdim=True)).float(), rtol=0.02, atol=0.02)
        for output in (sent.x, combined):
            with pytest.raises(RuntimeError, match=r"low_latency_\w+.default has no gradient: train with"):
                output.sum().backward()
        with torch.inference_mode():
            again = functional.low_latency_combine(buffer, sent.x, ids, weights, sent.handle)
        assert torch.equal(again, combined)


def test_low_latency_has_no_gradient(pool_of: PoolOf) -> None:
    """Inputs that require one pass; backward says what to do."""
    pool_of(2).run(check_no_gradient)


def test_cost_is_measured() -> None:
    """What prints the table of docs/operators.md runs; its figures are not judged here."""
    figures = operator_cost.measure(rounds=1)
    assert len(figures) == 9
    assert all(0 < inference < 1e5 for inference, _, _ in figures.values())

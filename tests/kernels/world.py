"""The ranks of a node under the simulator: heaps, tables, and the host's launches through the package's own code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from tests import oracle
from tests.cases import Case, make_inputs, same
from tests.kernels.simulator import Simulator
from tokenferry.config import align_up
from tokenferry.dataplane import OperationKind, Outputs, SendPlan
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.handles import DispatchHandle

LIST_CAPACITY = 512
TIMEOUT = 1 << 40
GUARD = 4
"""Words behind the counts that nobody may write."""
KERNELS = {"layout": "_LAYOUT", "notify": "_NOTIFY", "dispatch": "_DISPATCH"}
ALL_MODULES = ("layout", "notify", "dispatch", "combine")


class _Address:
    """A pointer argument."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


class Simulated:
    """Stands for :class:`tokenferry.dataplane.cuda.launch.Kernel`: launches go to the simulator."""

    def __init__(self, simulator: Simulator, kernel: Any, original: Any) -> None:
        self._simulator = simulator
        self._kernel = kernel
        self.types = original.types

    def variant(self, num_warps: int, **constants: Any) -> Any:
        return _Launcher(self._simulator, self._kernel, self.types, constants)


class _Launcher:
    def __init__(self, simulator: Simulator, kernel: Any, types: Any, constants: dict[str, Any], *last: int) -> None:
        self._rest, self._last = (simulator, kernel, types, constants), last

    def ending(self, *numbers: int) -> _Launcher:
        return _Launcher(*self._rest, *numbers)

    def launch(self, grid: int, stream: int, arguments: Any) -> None:
        simulator, kernel, types, constants = self._rest
        values = zip((*arguments, *self._last), types, strict=True)
        given = [value if dtype is None else _Address(value, dtype) for value, dtype in values]
        simulator.launch(stream, kernel, (grid,), *given, **constants)


class World:
    """R ranks. Every tensor that a rank exposes is either readable by all peers, or staged, as ``direct`` says.

    Args:
        monkeypatch: puts the simulated kernels in the place of the compiled ones.
        num_ranks: R.
        seed: of the scheduler.
        direct: by rank, whether peers can read the rank's tensors.
        stage_bytes: size of each stage.
        modules: kernels' modules by name, to run mutants.
    """

    def __init__(
        self,
        monkeypatch: Any,
        num_ranks: int,
        seed: int,
        *,
        direct: tuple[bool, ...] = (True,),
        stage_bytes: int = 1 << 14,
        modules: dict[str, ModuleType] | None = None,
        max_steps: int = 400_000,
    ) -> None:
        self.num_ranks = num_ranks
        self.timeout = TIMEOUT
        self.target = programs.Target(num_ranks, False, 0)
        self.simulator = Simulator(seed, max_steps=max_steps)
        for name in ALL_MODULES:
            module = (modules or {}).get(name) or getattr(programs, f"{name}_kernels")
            kernel = getattr(module, name)
            if name == "combine":
                simulated = {k: Simulated(self.simulator, kernel, v) for k, v in programs._COMBINE.items()}
                monkeypatch.setattr(programs, "_COMBINE", simulated)
            else:
                original = getattr(programs, KERNELS[name])
                monkeypatch.setattr(programs, KERNELS[name], Simulated(self.simulator, kernel, original))
        monkeypatch.setattr(programs, "_TOKENS_PER_BLOCK", 16)
        for variants in (programs._layout, programs._notify, programs._dispatch, programs._combine):
            variants.cache_clear()
        self.direct = [direct[rank % len(direct)] for rank in range(num_ranks)]
        self.stage = align_up(words.CONTROL_BYTES + num_ranks * LIST_CAPACITY * 4)
        self.half = stage_bytes // 2
        self.heaps = [torch.full((self.stage + stage_bytes,), 0xCD, dtype=torch.uint8) for _ in range(num_ranks)]
        self.states = [torch.zeros(words.STATE_WORDS, dtype=torch.int64) for _ in range(num_ranks)]
        self.ready = [torch.tensor([1, 1], dtype=torch.int32) for _ in range(num_ranks)]
        # Region 1 of every rank is all of this process's memory: it begins at address 0, as far as peers can tell.
        self.regions = [torch.zeros(2, num_ranks, words.MAX_REGIONS, dtype=torch.int64) for _ in range(num_ranks)]
        self.status = [torch.zeros(words.STATUS_WORDS, dtype=torch.int64) for _ in range(num_ranks)]
        self.counts = [torch.zeros(words.HOST_WORDS, dtype=torch.int64) for _ in range(num_ranks)]
        self.sums = [torch.zeros(1 << 12, dtype=torch.int32) for _ in range(num_ranks)]
        self.table = torch.tensor([heap.data_ptr() for heap in self.heaps])
        self.base = min(heap.data_ptr() for heap in self.heaps) & ~((1 << 43) - 1) or 1 << 12
        for rank in range(num_ranks):
            self.heaps[rank][: words.CONTROL_BYTES] = 0
            released = self.heaps[rank][words.RELEASED.value : words.MESSAGES.value].view(torch.int64)
            released.fill_(words.RELEASED_AT_START)
            self.regions[rank][0, :, 1] = self.base
            self.regions[rank][1, :, 1] = 1 << 47
        self.kept: list[Any] = []

    def context(self, rank: int) -> tuple[int, ...]:
        tensors = (self.table, self.states[rank], self.ready[rank], self.regions[rank], self.status[rank])
        return tuple(tensor.data_ptr() for tensor in tensors)

    def place(self, rank: int, tensor: torch.Tensor | None) -> int:
        if tensor is None or not tensor.numel():
            return 0
        if not self.direct[rank]:
            return -1
        return 1 << words.PLACE_SHIFT.value | (tensor.data_ptr() - self.base)

    def code(self, rank: int) -> int:
        return int(self.status[rank][words.CODE.value])

    def run(self, hosts: Iterable[Iterator[None]] = ()) -> None:
        self.simulator.run(hosts)


class Rank:
    """One rank's calls on a case; launches are only queued.

    Attributes:
        expand: whether an expanded dispatch is to follow the layout.
    """

    expand = False

    def __init__(self, world: World, case: Case, rank: int, num_sms: int = 4) -> None:
        self.world, self.case, self.rank, self.num_sms = world, case, rank, num_sms
        self.num_ranks = world.num_ranks
        self.num_experts = self.num_ranks * case.local_experts
        self.inputs = [make_inputs(case, peer, self.num_ranks) for peer in range(self.num_ranks)]
        self.given = self.inputs[rank]
        self.x = self.given.x.contiguous().clone()
        self.scales = None if self.given.scales is None else self.given.scales.contiguous()
        self.wanted = oracle.dispatch(self.inputs, self.num_experts, rank)
        self.num_rows = oracle.num_received(self.inputs, self.num_experts)
        world.kept.append(self)

    def _plan(self, num_worst_tokens: int, handle: DispatchHandle | None) -> SendPlan:
        return SendPlan(
            rows=self.x.view(torch.uint8),
            scales=None if self.scales is None else self.scales.view(torch.uint8),
            topk_idx=None if handle else self.given.topk_idx,
            topk_weights=None if handle else self.given.topk_weights,
            is_token_in_rank=self.member,
            num_tokens_per_rank=None if handle else self.per_rank,
            num_tokens_per_expert=None if handle else self.per_expert,
            num_worst_tokens=num_worst_tokens,
            handle=handle,
        )

    def layout(self) -> None:
        ranks, world = self.num_ranks, self.world
        num_tokens, num_topk = self.given.topk_idx.shape
        spans, behind = programs.spans_of(num_tokens, num_topk, self.num_experts) if self.expand else (0, 0)
        counts = torch.full((ranks + self.num_experts + behind + GUARD,), -7, dtype=torch.int32)
        self.guard = counts[-GUARD:]
        self.member = torch.full((num_tokens, ranks), 3, dtype=torch.uint8)
        programs.layout(
            self.rank, self.given.topk_idx, world.sums[self.rank], counts, self.member,
            world.states[self.rank], self.num_experts, world.target, spans,
        )  # fmt: skip
        self.per_rank, self.per_expert = counts[:ranks], counts[ranks:][: self.num_experts]

    def notify(self, num_worst_tokens: int = 0, signature: int = 42, *, pulls_meanwhile: bool = False) -> None:
        ranks, num_tokens = self.num_ranks, self.given.topk_idx.size(0)
        self.prefix = torch.full((ranks, ranks), -7, dtype=torch.int32)
        self.channels = torch.full((2, ranks), -7, dtype=torch.int32)
        self.send_head = torch.full((num_tokens, ranks), -7, dtype=torch.int32)
        self.plan = plan = self._plan(num_worst_tokens, None)
        columns = (plan.rows, plan.scales, plan.topk_idx, plan.topk_weights)
        call = programs.notify_call(
            plan, signature, self.case.local_experts, LIST_CAPACITY, self.rank, OperationKind.DISPATCH,
            self.world.timeout, num_worst_tokens == 0 and not pulls_meanwhile, self.world.target,
        )  # fmt: skip
        heap, state, ready, _, status = self.world.context(self.rank)
        context = heap, state, ready, status, self.world.counts[self.rank].data_ptr()
        tensors = programs.notify_tensors(plan, self.send_head, self.prefix, self.channels, self.make_tables())
        call.launch(self.rank, context, tensors, [self.world.place(self.rank, column) for column in columns])

    def make_tables(self) -> torch.Tensor | None:
        """What ``notify`` writes besides, for a plan that has experts."""
        return None

    def pull(
        self, num_rows: int, handle: DispatchHandle | None = None, signature: int = 42, *, zeros: bool = False
    ) -> None:
        room = max(num_rows, 0)  # -1: nothing is wanted
        plan = self._plan(0, handle) if handle else self.plan
        num_topk = 0 if handle else self.given.topk_idx.size(1)
        self.out = Outputs(
            torch.full((room, plan.rows.size(1)), 0xAB, dtype=torch.uint8),
            None if plan.scales is None else torch.full((room, plan.scales.size(1)), 0xAB, dtype=torch.uint8),
            torch.full((room, num_topk), 777),
            torch.full((room, num_topk), torch.nan),
            handle.recv_src_idx if handle else torch.full((room,), -9, dtype=torch.int32),
        )
        places = (0, 0, 0, 0)
        if handle:
            places = (self.world.place(self.rank, plan.rows), self.world.place(self.rank, plan.scales), 0, 0)
        kind = OperationKind.CACHED_DISPATCH if handle else OperationKind.DISPATCH
        call = programs.dispatch_call(
            plan, signature, LIST_CAPACITY, (self.world.stage, self.world.half), self.rank, kind, self.world.timeout,
            self.world.target, self.num_sms,
        )  # fmt: skip
        prefix = handle.rank_prefix_matrix if handle else self.prefix
        tensors = programs.dispatch_tensors(plan, self.out, self.out.recv_src_idx, prefix)
        call.launch(self.rank, self.world.context(self.rank), tensors, (*places, num_rows, int(zeros)))
        self.world.kept.append((plan, self.out))

    def handle(self) -> DispatchHandle:
        channels = self.channels.view(2, self.num_ranks, 1)
        return DispatchHandle(
            self.prefix, channels[0], channels[1], self.out.recv_src_idx, self.member, self.send_head
        )

    def combine(self, handle: DispatchHandle, *, weights: bool = True, signature: int = 43) -> None:
        width = self.case.combine_bytes // self.case.combine_dtype.itemsize
        self.rows_of = [self._randn(peer, width).to(self.case.combine_dtype) for peer in range(self.num_ranks)]
        self.weights_of = [self._randn(peer, self.case.num_topk) for peer in range(self.num_ranks)]
        num_tokens, num_rows = self.given.x.size(0), len(handle.recv_src_idx)
        given = [self.rows_of[self.rank], self.weights_of[self.rank]][: 1 + weights]
        columns = [torch.cat([t, t.new_full((num_rows - len(t), t.size(1)), torch.nan)]) for t in given]
        self.outs = [torch.full((num_tokens, c.size(1)), torch.nan, dtype=c.dtype) for c in columns]
        num_biases = {"none": 0, "two": 2}.get(self.case.bias, 1)
        self.biases = [torch.randn(num_tokens, width).to(self.case.combine_dtype) for _ in range(num_biases)]
        places = [self.world.place(self.rank, column) for column in columns]
        call = programs.combine_call(
            columns, self.outs, num_biases, (self.world.stage, self.world.half), self.rank,
            OperationKind.COMBINE, self.world.timeout, self.world.target, self.num_sms,
        )  # fmt: skip
        tensors = programs.combine_tensors(columns, self.outs, self.biases, handle)
        numbers = places[0], places[1] if weights else 0, signature, num_tokens, num_rows
        call.launch(self.rank, self.world.context(self.rank), tensors, numbers)
        self.world.kept.append((columns, handle))

    def _randn(self, peer: int, width: int) -> torch.Tensor:
        return torch.randn(
            self.num_rows[peer], width, generator=torch.Generator().manual_seed(1000 * self.case.seed + peer)
        )

    def check_layout(self) -> None:
        assert (self.guard == -7).all()
        assert self.per_rank.tolist() == self.wanted.channel_prefix_matrix.flatten().tolist()
        assert self.per_expert.tolist() == oracle.choices_of_experts(self.given.topk_idx, self.num_experts)
        assert self.member.tolist() == self.wanted.is_token_in_rank.int().tolist()

    def check_counts(self) -> None:
        counts = self.world.counts[self.rank]
        assert counts[words.HOST_DONE.value] > 0
        assert counts[words.HOST_ROWS.value] == self.num_rows[self.rank]
        first = words.HOST_EXPERTS.value
        assert counts[first : first + self.case.local_experts].tolist() == self.wanted.num_per_expert

    def check_dispatch(self, *, cached: bool = False, zeros: bool = False) -> None:
        count, out = self.num_rows[self.rank], self.out
        same(out.rows[:count], self.wanted.x.view(torch.uint8), "rows")
        if out.scales is not None:
            same(out.scales[:count], self.wanted.scales.contiguous().view(torch.uint8), "scales")
        for rows in (out.rows, out.scales):
            assert rows is None or (rows[count:] == (0 if zeros else 0xAB)).all(), "rows past the last one"
        if cached:
            return
        same(out.topk_idx[:count], self.wanted.topk_idx, "ids")
        same(out.topk_weights[:count], self.wanted.topk_weights, "weights")
        same(out.recv_src_idx[:count], self.wanted.recv_src_idx, "recv_src_idx")
        assert (out.topk_idx[count:] == -1).all()
        assert (out.topk_weights[count:] == 0).all()
        assert (out.recv_src_idx[count:] == -1).all()
        handle = self.handle()
        for name in ("rank_prefix_matrix", "channel_prefix_matrix", "recv_channel_prefix_matrix", "send_head"):
            same(getattr(handle, name), getattr(self.wanted, name), name)

    def check_combine(self) -> None:
        wanted = oracle.combine(self.inputs, self.num_experts, self.rank, self.rows_of, self.biases)
        same(self.outs[0], wanted, "combined")
        if len(self.outs) > 1:
            wanted = oracle.combine(self.inputs, self.num_experts, self.rank, self.weights_of)
            same(self.outs[1], wanted, "combined weights")

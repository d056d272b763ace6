"""Cases of an ElasticBuffer that every rank derives alike from a seed, and checks against the oracle."""

from __future__ import annotations

from typing import Any

import torch

from tests import oracle
from tests.cases import TIMEOUT, Case, generator, make_inputs, same
from tests.elastic_oracle import Expected, expanded_sums, expected, slot_weights
from tokenferry import ElasticBuffer, EPHandle

SPARE_TOKENS = 3
"""How far N lies above the tokens that any rank has."""


class Elastic:
    """A case on one rank: the calls with their checks."""

    def __init__(
        self, case: Case, rank: int, num_ranks: int, *, expand: bool, cpu_sync: bool = True, device: str = "cpu"
    ) -> None:
        self.case, self.rank, self.num_ranks, self.device = case, rank, num_ranks, device
        self.expand, self.cpu_sync = expand, cpu_sync
        self.num_experts = num_ranks * case.local_experts
        self.most = max(case.tokens) + SPARE_TOKENS
        self.inputs = [make_inputs(case, peer, num_ranks) for peer in range(num_ranks)]
        self.given = make_inputs(case, rank, num_ranks, device)
        self.wants = [
            expected(self.inputs, self.num_experts, peer, case.alignment, self.most) for peer in range(num_ranks)
        ]
        self.want = self.wants[rank]

    @property
    def x(self) -> Any:
        return self.given.x if self.given.scales is None else (self.given.x, self.given.scales)

    def dispatch(self, buffer: ElasticBuffer, **options: Any) -> tuple[Any, ...]:
        arguments: dict[str, Any] = {
            "topk_idx": self.given.topk_idx,
            "topk_weights": self.given.topk_weights,
            "num_experts": self.num_experts,
            "num_max_tokens_per_rank": self.most,
            "expert_alignment": self.case.alignment,
            "do_expand": self.expand,
            "do_cpu_sync": self.cpu_sync,
        }
        return buffer.dispatch(options.pop("x", self.x), **(arguments | options))

    def check_rows(self, recv_x: Any, *, padded: bool = False, column_major: bool = False) -> None:
        """Received rows and scales as far as they are defined, bit for bit; ``padded``: zeros between experts."""
        assert isinstance(recv_x, tuple) == (self.given.scales is not None)
        names = ("x", "scales")
        for name, got in zip(names, recv_x if isinstance(recv_x, tuple) else (recv_x,), strict=False):
            sources = [getattr(given, name) for given in self.inputs]
            width = sources[0].size(1)
            zero = torch.zeros(1, width * sources[0].element_size(), dtype=torch.uint8).view(sources[0].dtype)[0]
            if self.expand:
                rows = [zero if row is None else sources[row[0]][row[1]] for row in self.want.rows]
                known = [row for row, where in enumerate(self.want.rows) if padded or where is not None]
                assert len(got) >= len(rows)
                assert self.cpu_sync <= (len(got) == len(rows))
            else:
                rows = [sources[source][token] for source, token in self.want.sources]
                known = list(range(len(rows)))
                assert len(got) == (len(rows) if self.cpu_sync else self.num_ranks * self.most)
            if column_major and name == "scales":
                assert got.stride(0) == 1
                assert got.stride(1) % 4 == 0
                assert got.stride(1) >= len(got)
            else:
                assert got.is_contiguous()
            if known:
                same(got[known].contiguous(), torch.stack([rows[row] for row in known]), name)

    def check_weights(self, weights: Any, ids: Any, *, padded: bool = False) -> None:
        """Received ids and weights."""
        if not self.expand:
            count = self.want.num_tokens
            same(ids[:count], self.want.ids, "recv_topk_idx")
            same(weights[:count], self.want.weights, "recv_topk_weights")
            assert len(ids) == len(weights) == (count if self.cpu_sync else self.num_ranks * self.most)
            assert (ids[count:] == -1).all()
            assert (weights[count:] == 0).all()
            return
        assert ids is None
        assert weights.dim() == 1
        weights = weights.cpu()
        for row, where in enumerate(self.want.rows):
            if where is not None:
                assert weights[row] == self.inputs[where[0]].topk_weights[where[1], where[2]]
            elif padded:
                assert weights[row] == 0

    def check_handle(self, handle: EPHandle, **same_as: object) -> None:
        """The public fields."""
        want, count = self.want, self.want.num_tokens
        assert handle.do_expand == self.expand
        assert handle.num_experts == self.num_experts
        assert handle.expert_alignment == self.case.alignment
        assert handle.num_max_tokens_per_rank == self.most
        assert isinstance(handle.num_sms, int)
        assert handle.num_sms > 0
        same(handle.topk_idx, self.inputs[self.rank].topk_idx, "topk_idx")
        assert handle.num_recv_tokens == (count if self.cpu_sync else self.num_ranks * self.most)
        assert handle.num_recv_tokens_per_expert_list == (want.aligned if self.cpu_sync else [])
        psum = want.psum_expanded if self.expand else want.psum_compact
        for name, expected_values in (
            ("psum_num_recv_tokens_per_scaleup_rank", want.psum_rank),
            ("psum_num_recv_tokens_per_expert", psum),
            ("num_unaligned_recv_tokens_per_expert", want.pairs),
        ):
            same(getattr(handle, name), torch.tensor(expected_values, dtype=torch.int32).view(-1), name)
        metadata = torch.tensor(want.metadata, dtype=torch.int32).view(count, self.case.num_topk + 2)
        if not self.expand:
            metadata[:, 2:] = -1
        same(handle.recv_src_metadata[:count], metadata, "recv_src_metadata")
        assert len(handle.recv_src_metadata) == handle.num_recv_tokens
        assert (handle.recv_src_metadata[count:] == -1).all()
        if self.expand and self.cpu_sync:
            assert handle.num_expanded_tokens == len(want.rows)
        self.check_slots(handle)

    def check_slots(self, handle: EPHandle) -> None:
        """``dst_buffer_slot_idx``: rank * N + position among the tokens for the rank."""
        head = oracle.dispatch(self.inputs, self.num_experts, self.rank).send_head
        slots = torch.full(self.given.topk_idx.shape, -1, dtype=torch.int32)
        for token, choices in enumerate(self.given.topk_idx.tolist()):
            for choice, expert in enumerate(choices):
                if expert >= 0:
                    owner = expert // self.case.local_experts
                    slots[token, choice] = owner * self.most + head[token, owner]
        same(handle.dst_buffer_slot_idx, slots, "dst_buffer_slot_idx")

    def expert_rows(self, peer: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What experts make of the rows of a rank, alike on all ranks however many there are, and weights."""
        want, dtype = self.wants[peer], self.case.combine_dtype
        defined = len(want.rows) if self.expand else want.num_tokens
        source = generator(self.case, peer, 5)
        width = self.case.combine_bytes // dtype.itemsize
        rows = torch.randn(defined, width, generator=source).to(dtype)
        shape = (defined,) if self.expand else (defined, self.case.num_topk)
        weights = torch.randn(shape, generator=source)
        for row, where in enumerate(want.rows if self.expand else []):
            if where is None:
                rows[row], weights[row] = torch.nan, torch.nan
        if num_rows > defined:
            rows = torch.cat([rows, torch.full((num_rows - defined, width), torch.nan, dtype=dtype)])
            weights = torch.cat([weights, weights.new_full((num_rows - defined, *shape[1:]), torch.nan)])
        return rows, weights

    def check_combine(self, buffer: ElasticBuffer, handle: EPHandle, num_rows: int, *, weights: bool = True) -> None:
        """A combine of what experts make of the rows, against the oracle."""
        given = [self.expert_rows(peer, 0) for peer in range(self.num_ranks)]
        rounded = buffer.allow_multiple_reduction
        rows_of, weights_of = [], []
        for want, (rows, of_rows) in zip(self.wants, given, strict=True):
            rows_of.append(expanded_sums(want, rows, rounded=rounded) if self.expand else rows)
            weights_of.append(slot_weights(want, of_rows, self.case.num_topk) if self.expand else of_rows)
        dtype, width = self.case.combine_dtype, rows_of[0].size(1)
        num_biases = {"none": 0, "two": 2}.get(self.case.bias, 1)
        shape = (self.given.x.size(0), width)
        biases = [
            torch.randn(shape, generator=generator(self.case, self.rank, 7 + i)).to(dtype) for i in range(num_biases)
        ]
        own_biases = tuple(bias.to(self.device) for bias in biases)
        bias = {0: None, 1: own_biases[:1] and own_biases[0], 2: own_biases}[num_biases]
        rows, of_rows = (tensor.to(self.device) for tensor in self.expert_rows(self.rank, num_rows))
        before = handle.recv_src_metadata.clone()
        combined, combined_weights, event = buffer.combine(rows, handle, of_rows if weights else None, bias=bias)
        assert event.event is None
        want_rows = oracle.combine(self.inputs, self.num_experts, self.rank, rows_of, biases).to(dtype)
        same(combined, want_rows, "combined_x")
        if weights:
            same(
                combined_weights,
                oracle.combine(self.inputs, self.num_experts, self.rank, weights_of),
                "combined_topk_weights",
            )
        else:
            assert combined_weights is None
        assert torch.equal(handle.recv_src_metadata, before)

    def check_all(self, buffer: ElasticBuffer) -> None:
        """Every kind of call."""
        for padded in (False, True) if self.expand else (False,):
            stats = torch.arange(self.case.local_experts, dtype=torch.int32, device=self.device)
            options: dict[str, Any] = {"do_zero_padding": padded, "cumulative_local_expert_recv_stats": stats}
            recv_x, ids, weights, handle, event = self.dispatch(buffer, **options)
            assert event.event is None
            self.check_rows(recv_x, padded=padded)
            self.check_weights(weights, ids, padded=padded)
            self.check_handle(handle)
            assert stats.tolist() == [expert + count for expert, count in enumerate(self.want.pairs)]
            num_rows = len(recv_x[0]) if isinstance(recv_x, tuple) else len(recv_x)
            again = buffer.dispatch(
                self.x,
                topk_weights=self.given.topk_weights,
                handle=handle,
                do_zero_padding=padded,
                use_tma_aligned_col_major_sf=True,
            )
            self.check_rows(again[0], padded=padded, column_major=True)
            self.check_weights(again[2], again[1], padded=padded)
            assert again[3] is handle
            self.check_combine(buffer, handle, num_rows)
            self.check_combine(buffer, again[3], num_rows, weights=False)
        recv_x, _, weights, handle, _ = self.dispatch(buffer, topk_weights=None)
        assert weights is None
        self.check_rows(recv_x)
        self.check_rows(buffer.dispatch(self.x, handle=handle)[0])


def elastic_buffer(group: Any, num_bytes: int = 0, **options: Any) -> ElasticBuffer:
    """A buffer with the deadline of tests."""
    return ElasticBuffer(group, num_bytes, **{"num_gpu_timeout_secs": TIMEOUT, **options})


__all__ = ["Elastic", "Expected", "elastic_buffer"]

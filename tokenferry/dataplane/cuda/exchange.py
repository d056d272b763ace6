"""One dispatch on a GPU: exchange the counts, then pull."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokenferry.dataplane import ExpertPlan, Outputs, SendPlan, Signature

if TYPE_CHECKING:
    from tokenferry.dataplane.cuda import CudaDataPlane


class CudaDispatch:
    """See :class:`tokenferry.dataplane.DispatchExchange`. Of a part, the device alone knows what comes."""

    def __init__(self, plane: CudaDataPlane, signature: Signature, plan: SendPlan) -> None:
        self._plane = plane
        self._signature = signature
        self._plan = plan
        self._is_open = False
        self.num_rows = 0
        self.num_received_per_expert: list[int] = []
        self.num_expanded_rows = 0
        self._bases: torch.Tensor | None = None
        self.num_pairs = self.expert_ends = plan.is_token_in_rank  # of no use before there are experts
        handle = plan.handle
        if plan.part is not None:
            self.num_rows = plan.part.num_rows
            self.rank_prefix_matrix = plane.empty_table(3 * plane.num_ranks)
            self.send_head = self.channel_prefix_matrix = self.recv_channel_prefix_matrix = plane.empty(0)
            return
        if handle is not None:
            self.num_rows = handle.recv_src_idx.shape[0]
            self.num_expanded_rows = 0 if plan.experts is None else plan.experts.num_worst_rows
            (
                self.rank_prefix_matrix, self.channel_prefix_matrix, self.recv_channel_prefix_matrix, _, _,
                self.send_head,
            ) = handle  # fmt: skip
            return
        num_tokens, ranks = plan.is_token_in_rank.shape
        small = plane.empty(ranks * ranks + 2 * ranks + num_tokens * ranks)
        of_ranks, first = (ranks, 1), ranks * ranks
        self.rank_prefix_matrix = small.as_strided((ranks, ranks), (ranks, 1))
        self.channel_prefix_matrix = small.as_strided(of_ranks, (1, 1), first)
        self.recv_channel_prefix_matrix = small.as_strided(of_ranks, (1, 1), first + ranks)
        self.send_head = small.as_strided((num_tokens, ranks), (ranks, 1), first + 2 * ranks)

    def __enter__(self) -> CudaDispatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def notify(self) -> None:
        """Tell the ranks what comes and learn the counts, from the host's side if outputs depend on them."""
        plan = self._plan
        if plan.part is not None:
            self._plane.announce_part(self._signature, plan, plan.part, self.rank_prefix_matrix)
            self._is_open = True
            return
        # The two channel matrices lie one behind the other.
        self._plane.notify(self._signature, plan, self.rank_prefix_matrix, self.channel_prefix_matrix, self.send_head)
        self._is_open = True
        if plan.num_worst_tokens:
            self.num_rows = plan.num_worst_tokens
            self._lay_out_experts(plan.experts)
            return
        self._is_open = False  # if this raises, all ranks have stepped back, or the Buffer has failed
        self.num_rows, self.num_received_per_expert = self._plane.wait_for_counts(plan)
        self._is_open = True
        try:
            self._plane.check()  # what else was reported meanwhile
            self._lay_out_experts(plan.experts)
        except BaseException:
            self.abandon()
            raise

    def _lay_out_experts(self, plan: ExpertPlan | None) -> None:
        """Where the rows of the experts begin and end."""
        if plan is None:
            return
        ranks, local = self._plan.is_token_in_rank.size(1), plan.num_local
        step = -(-local // 4) * 4  # each begins on 16 bytes
        small = self._plane.empty(2 * step + plan.expand * ranks * local)
        self.num_pairs, self.expert_ends = small[:local], small[step : step + local]
        self._bases = small[2 * step :]
        self._plane.lay_out_experts(plan, self._bases, self.num_pairs, self.expert_ends)
        if plan.expand:
            aligned = (-(-count // plan.alignment) * plan.alignment for count in self.num_received_per_expert)
            self.num_expanded_rows = plan.num_worst_rows or sum(aligned)

    def pull(self, outputs: Outputs) -> None:
        """See :meth:`tokenferry.dataplane.DispatchExchange.pull`."""
        self._is_open = False
        self._plane.pull(self._signature, self._plan, self.rank_prefix_matrix, outputs, self.num_rows, self._bases)
        if self._plan.experts is not None and (outputs.rows.shape[0] or outputs.metadata is not None):
            self._plane.after_pull(self._plan, self.rank_prefix_matrix, outputs, self.expert_ends)

    def abandon(self) -> None:
        """After an error on this host alone: take part in what was announced, and receive nothing."""
        if self._is_open:
            nothing = self._plan.rows[:0]
            none = torch.empty(0, dtype=torch.int32, device=nothing.device)
            self.num_rows = 0
            columns = (nothing, self._plan.scales, self._plan.topk_idx, self._plan.topk_weights)
            self._is_open = False
            self._plane.pull(
                self._signature, self._plan, self.rank_prefix_matrix, Outputs(*columns, none, none), 0, self._bases
            )

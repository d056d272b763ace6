"""The methods of Buffer that DeepEP has for several nodes."""

from __future__ import annotations

from typing import Any

import torch

from tokenferry.config import Config
from tokenferry.events import EventOverlap
from tokenferry.validation import require


class InternodeMethods:
    """:meth:`tokenferry.Buffer.dispatch` and its combine under further names, on any number of nodes.

    ``config`` must be given; everything else is as there.
    """

    dispatch: Any
    combine: Any

    def internode_dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        handle: tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_worst_tokens: int = 0,
    ) -> Any:
        """See :meth:`tokenferry.Buffer.dispatch`."""
        require(config is not None, "config", None, "a tokenferry.Config")
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """See :meth:`tokenferry.Buffer.combine`."""
        require(config is not None, "config", None, "a tokenferry.Config")
        combined: tuple[torch.Tensor, torch.Tensor | None, EventOverlap] = self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )
        return combined

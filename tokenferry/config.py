"""Config: the tuning knobs of the high-throughput mode, its presets, and the size hints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokenferry.errors import ArgumentError
from tokenferry.validation import check_int, require

ALIGNMENT = 128
"""Bytes; every buffer size and region offset is a multiple of this."""

_INDEX_BYTES = 8
_HINT_TOPK = 128
_HINT_SCALES = 128
_SOURCE_META_BYTES = 8
_RANKS_PER_NODE_HINT = 8


def align_up(value: int, alignment: int = ALIGNMENT) -> int:
    """Round ``value`` up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment


def align_all(counts: Sequence[int], alignment: int) -> list[int]:
    """As :func:`align_up`, each of hundreds, while a GPU may be waiting: not by a call for each."""
    return list(counts) if alignment == 1 else [-(-count // alignment) * alignment for count in counts]


@dataclasses.dataclass(frozen=True)
class Config:
    """How a high-throughput operation may use the machine. Results never depend on it.

    Args:
        num_sms: streaming multiprocessors an operation may use (no meaning on CPU ranks).
        num_max_nvl_chunked_send_tokens: tokens per chunk inside a node.
        num_max_nvl_chunked_recv_tokens: capacity, in tokens, of a ring inside a node.
        num_max_rdma_chunked_send_tokens: tokens per chunk between nodes.
        num_max_rdma_chunked_recv_tokens: capacity, in tokens, of a ring between nodes; kept rounded up to
            a multiple of the send chunk.

    Raises:
        ArgumentError: a value is out of range, or a send chunk does not fit its ring.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        check_int("num_sms", self.num_sms, minimum=0)
        for field in dataclasses.fields(self)[1:]:
            check_int(field.name, getattr(self, field.name), minimum=1)
        nvl_send, nvl_recv = self.num_max_nvl_chunked_send_tokens, self.num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = self.num_max_rdma_chunked_send_tokens, self.num_max_rdma_chunked_recv_tokens
        require(
            nvl_send < nvl_recv,
            "num_max_nvl_chunked_send_tokens",
            nvl_send,
            f"less than num_max_nvl_chunked_recv_tokens = {nvl_recv}",
        )
        require(
            rdma_send < rdma_recv and rdma_send <= rdma_recv // 2,
            "num_max_rdma_chunked_send_tokens",
            rdma_send,
            f"at most half of num_max_rdma_chunked_recv_tokens = {rdma_recv}",
        )
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", align_up(rdma_recv, rdma_send))

    def _row_bytes(self, hidden_bytes: int) -> int:
        return hidden_bytes + _SOURCE_META_BYTES + _HINT_TOPK * (_INDEX_BYTES + 4) + _HINT_SCALES * 4

    def _check_hint_arguments(self, hidden_bytes: int, num_ranks: int) -> tuple[int, int]:
        hidden_bytes = check_int("hidden_bytes", hidden_bytes, minimum=0)
        num_ranks = check_int("num_ranks", num_ranks, minimum=1)
        if num_ranks > _RANKS_PER_NODE_HINT:
            require(self.num_sms % 2 == 0, "num_sms", self.num_sms, "an even number")
        return hidden_bytes, -(-num_ranks // _RANKS_PER_NODE_HINT)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int, /) -> int:
        """Bytes to pass as ``num_nvl_bytes``; tokenferry treats it as a ceiling for its stage.

        Args:
            hidden_bytes: bytes of one row.
            num_ranks: ranks of the group.

        Returns:
            A multiple of 128 that grows with every argument:
            ``4 C n (2 G + 3) + C n Q (hidden_bytes + 8 + 128 * 12 + 128 * 4)`` with ``C = num_sms / 2``,
            ``n = min(num_ranks, 8)``, ``G`` nodes of 8 and ``Q`` the ring capacity (DeepEP's formula).
        """
        hidden_bytes, num_nodes = self._check_hint_arguments(hidden_bytes, num_ranks)
        pairs = self.num_sms // 2 * min(num_ranks, _RANKS_PER_NODE_HINT)
        rows = self.num_max_nvl_chunked_recv_tokens
        return align_up(pairs * (2 * num_nodes + 3) * 4 + pairs * rows * self._row_bytes(hidden_bytes))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int, /) -> int:
        """Bytes to pass as ``num_rdma_bytes``: zero for up to 8 ranks (one node).

        Args and formula as in :meth:`get_nvl_buffer_size_hint`, with the ring between nodes:
        ``144 C G + 2 C G Q (row + 16)``.
        """
        hidden_bytes, num_nodes = self._check_hint_arguments(hidden_bytes, num_ranks)
        if num_ranks <= _RANKS_PER_NODE_HINT:
            return 0
        pairs = self.num_sms // 2 * num_nodes
        rows = self.num_max_rdma_chunked_recv_tokens
        return align_up(
            pairs * (_RANKS_PER_NODE_HINT * 2 + 2) * 8 + 2 * pairs * rows * (self._row_bytes(hidden_bytes) + 16)
        )


def low_latency_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes to pass as ``num_rdma_bytes`` for the low-latency mode (DeepEP's formula, its last V1 form).

    Args:
        num_max_dispatch_tokens_per_rank: most tokens that a rank sends in one call.
        hidden: elements of a row.
        num_ranks: ranks of the group (does not enter the formula).
        num_experts: experts of all ranks.

    Returns:
        A multiple of 128.
    """
    tokens = check_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, minimum=1)
    hidden = check_int("hidden", hidden, minimum=16)
    check_int("num_ranks", num_ranks, minimum=1)
    experts = check_int("num_experts", num_experts, minimum=1)
    scale_bytes = hidden // 128 * 4
    dispatch_message = 16 + max(2 * hidden, hidden + scale_bytes)
    combine_message = 2 * hidden + scale_bytes
    send = max(tokens * dispatch_message, experts * tokens * combine_message)
    receive = experts * tokens * max(dispatch_message, combine_message)
    total = 2 * (align_up(4 * experts) + send + receive)
    return (total + ALIGNMENT) // ALIGNMENT * ALIGNMENT


# ranks: (nvl send, nvl receive, rdma send, rdma receive)
_DISPATCH_PRESETS: dict[int, tuple[int, int, int, int]] = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE_PRESETS: dict[int, tuple[int, int, int, int]] = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


def _preset(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    num_ranks = check_int("num_ranks", num_ranks, minimum=1)
    nearest = min(table, key=lambda ranks: (abs(ranks - num_ranks), ranks))
    return Config(num_sms, *table[nearest])


def dispatch_preset(num_ranks: int, num_sms: int) -> Config:
    """The preset for dispatch among ``num_ranks`` ranks: the nearest entry of the table, any count allowed."""
    return _preset(_DISPATCH_PRESETS, num_ranks, num_sms)


def combine_preset(num_ranks: int, num_sms: int) -> Config:
    """The preset for combine among ``num_ranks`` ranks: the nearest entry of the table, any count allowed."""
    return _preset(_COMBINE_PRESETS, num_ranks, num_sms)


def check_config(config: object) -> Config:
    """Return the Config of an operation if it is usable."""
    if not isinstance(config, Config):
        raise ArgumentError("config", type(config).__name__, "a tokenferry.Config or None")
    if config.num_sms % 2:
        raise ArgumentError("config.num_sms", config.num_sms, "an even number")
    return config

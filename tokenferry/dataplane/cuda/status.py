"""What kernels tell the host through pinned memory, as exceptions."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenferry.dataplane import OperationKind
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.errors import (
    ArgumentError,
    BufferStateError,
    CapacityError,
    HeapError,
    MismatchError,
    PeerLostError,
    PeerTimeoutError,
    TokenferryError,
)
from tokenferry.stats import Recorder
from tokenferry.validation import expert_out_of_range

logger = logging.getLogger("tokenferry")

_NAMES: dict[int, str] = {
    OperationKind.DISPATCH: "dispatch",
    OperationKind.CACHED_DISPATCH: "dispatch",
    OperationKind.COMBINE: "combine",
    OperationKind.LOW_LATENCY_DISPATCH: "low_latency_dispatch",
    OperationKind.LOW_LATENCY_COMBINE: "low_latency_combine",
    OperationKind.EXPANDED_DISPATCH: "dispatch",
    OperationKind.CACHED_EXPANDED_DISPATCH: "dispatch",
    OperationKind.BARRIER: "barrier",
}
_LOOK_EVERY = 1_000_000_000
"""Nanoseconds between two looks at the health of the device while waiting for it."""
_EAGER = 50_000
"""Nanoseconds after which a host that waits lets other threads run: a system call, out of which it comes late."""
_BUILD_ANOTHER = "destroy it and build a new one"
_GAVE_UP = 2
"""What stands for a rank in the details of a mismatch, if it has withdrawn its rows."""
_BAD_INPUT = {
    code.value for code in (words.PEER_PROBLEM, words.BAD_EXPERT, words.CROWDED, words.BAD_COUNTS, words.BAD_HANDLE)
}
"""What is the caller's fault, and leaves the Buffer as it is."""


class Status:
    """The words that kernels write for the host of one Buffer.

    Args:
        rank: of the node.
        num_ranks: of the node.
        timeout: seconds that kernels wait.
        names: what messages call each rank of the node; by default its number there.

    Attributes:
        postpones_input: while set, :meth:`check` leaves what was reported of bad input for later.
        words: int64 in pinned memory; see :mod:`tokenferry.dataplane.cuda.kernels.words`.
        counts: likewise, what ``notify`` leaves for a waiting host.
        unread_address: of likewise words, where ``notify`` writes when no host waits.
    """

    def __init__(self, rank: int, num_ranks: int, timeout: float, names: Sequence[int] | None = None) -> None:
        self._rank = rank
        self._names = tuple(range(num_ranks) if names is None else names)
        self.postpones_input = False
        self._num_ranks = num_ranks
        self._timeout = timeout
        self.failed = False
        self._reason = f"an earlier operation failed on this Buffer: {_BUILD_ANOTHER}"
        self.recorder = Recorder()
        with torch.inference_mode(False):
            self.words = torch.zeros(words.STATUS_WORDS, dtype=torch.int64, device="cpu", pin_memory=True)
        self.counts = _host_words()
        self._unread = _host_words()
        self.unread_address = self._unread.data_ptr()
        self._left: list[torch.Tensor] = []
        self._words = self.words.numpy()
        self._see_counts()
        # What every call looks at, without numpy: a tenth of its time.
        view: Any = memoryview(self._words.data)
        self._code = view[words.CODE.value :][:1]
        self._news = view[words.NEWLY_MASKED.value :][:num_ranks]
        self._no_news = memoryview(bytes(self._news.nbytes)).cast(self._news.format)

    def check(self) -> None:
        """Raise what an earlier operation reported, once, and tell what ranks it has masked.

        Raises:
            BufferStateError: a peer did not come to an earlier operation.
            TokenferryError: what happened since the last check.
        """
        if self.failed:
            raise BufferStateError(self._reason)
        if self._news != self._no_news:
            masked = [rank for rank, is_new in enumerate(self._news) if is_new]
            for rank in masked:
                self._news[rank] = 0
            names = [self._names[rank] for rank in masked]
            logger.warning("low latency: no sign of life from ranks %s for %.1f s: masked", names, self._timeout)
        if self._code[0] and not (self.postpones_input and self._code[0] in _BAD_INPUT):
            raise self._take()

    def give_up(self, reason: str) -> None:
        """From now on all checks fail, and say why."""
        if not self.failed:
            self._reason = f"an earlier operation failed on this Buffer ({reason}): {_BUILD_ANOTHER}"
        self.failed = True

    def close(self) -> None:
        """From now on all checks fail: the memory that operations need is gone."""
        self._reason = "the Buffer was destroyed"
        self.failed = True

    def arm(self) -> int:
        """Before ``notify`` is launched for a host that will wait; returns the address of the counts."""
        self._is_done[0] = 0
        return self._counts_address

    def leave_counts(self) -> None:
        """Nobody will read the counts that are under way: later ones go elsewhere, lest these be taken for them."""
        self._left.append(self.counts)
        self.counts = _host_words()
        self._see_counts()

    def _see_counts(self) -> None:
        self._counts = self.counts.numpy()
        self._counts_address = self.counts.data_ptr()
        view: Any = memoryview(self._counts.data)
        self._is_done = view[words.HOST_DONE.value :][:1]

    def wait_for_counts(self, num_local: int, is_alive: Callable[[], object]) -> tuple[int, list[int]]:
        """Wait, but for the first moments without the interpreter's lock, until ``notify`` is done.

        Args:
            num_local: experts of this rank.
            is_alive: raises if the device has failed.

        Returns:
            The rows that come, and the (token, choice) pairs of each local expert.

        Raises:
            TokenferryError: why all ranks stepped back, or who did not come; the operation is over.
        """
        counts, done, now = self._counts, self._is_done, time.monotonic_ns
        started = now()
        look_at, patience = started + _LOOK_EVERY, started + _EAGER
        try:
            while not done[0]:
                if now() > patience:
                    os.sched_yield()
                    if now() > look_at:
                        is_alive()
                        look_at += _LOOK_EVERY
        except BaseException:
            self.failed = True  # nobody will finish this operation
            raise
        waited = now() - started
        self.recorder.waited(OperationKind.DISPATCH, waited, {})
        if counts[words.HOST_CODE.value]:
            raise self._take(int(counts[words.HOST_CODE.value]))
        first = words.HOST_EXPERTS.value
        return int(counts[words.HOST_ROWS.value]), counts[first : first + num_local].tolist()

    def _take(self, code: int = 0) -> TokenferryError:
        """What is reported, which is forgotten then; ``code`` is known better than the words.

        Kernels may report meanwhile, ``CODE`` last: it is taken first, and what says that all is lost stays.
        """
        first = words.DETAIL.value
        code, self._words[words.CODE.value] = code or int(self._words[words.CODE.value]), 0
        kind = int(self._words[words.OPERATION.value])
        epoch = int(self._words[words.AT_EPOCH.value])
        details = self._words[first : first + self._num_ranks].tolist()
        fatal = int(self._words[words.HAS_FAILED.value])
        if fatal or code == words.TIMED_OUT.value:
            self.failed = True
            code = fatal or code
        if code == words.MISMATCH.value and _GAVE_UP in details:
            self.failed = True
        self._words[first : first + self._num_ranks] = 0
        return self._error(code, _NAMES.get(kind, "an operation"), epoch, details)

    def _error(self, code: int, name: str, epoch: int, details: list[int]) -> TokenferryError:
        here = [rank for rank, detail in enumerate(details) if detail]
        ranks = [self._names[rank] for rank in here]
        if code == words.TIMED_OUT.value:
            return PeerTimeoutError(name, epoch, ranks, f"no sign of life for {self._timeout:.1f} s")
        if code == words.MISMATCH.value and _GAVE_UP in details:
            lost = [self._names[rank] for rank in here if details[rank] == _GAVE_UP]
            return PeerLostError(name, epoch, lost, "gave up, while this rank was late or slow")
        if code == words.MISMATCH.value:
            return MismatchError(name, epoch, ranks, "called another operation, or with other shapes, than this rank")
        if code == words.CAPACITY.value:
            needs = ", ".join(str(details[rank]) for rank in here)
            return CapacityError(name, epoch, ranks, f"num_worst_tokens: too small for the {needs} rows it receives")
        if code == words.PEER_PROBLEM.value and self._rank not in here:
            return MismatchError(name, epoch, ranks, "gave expert ids out of range")
        if code in (words.PEER_PROBLEM.value, words.BAD_EXPERT.value):
            return expert_out_of_range()
        if code == words.CROWDED.value:
            allowed = "at most num_max_dispatch_tokens_per_rank choices of one expert; the others were not sent"
            return ArgumentError("topk_idx", f"more choices of one expert ({name}, epoch {epoch})", allowed)
        if code == words.NO_ROOM.value:
            own = [self._names[self._rank]]
            return CapacityError(name, epoch, own, "choices of one expert twice: no room for all copies")
        if code == words.NOT_RECEIVED.value:
            return BufferStateError(
                f"{name} (epoch {epoch}): an operation whose hook was not called lies in its memory, since graph"
                " replays have come round to it: call hooks before; destroy this Buffer and build a new one"
            )
        if code == words.BAD_PEER.value:
            return HeapError(
                f"{name} (epoch {epoch}): ranks {ranks} sent counts, tokens or places of rows that cannot be;"
                " this Buffer is lost"
            )
        if code == words.TORN.value:
            return HeapError(
                f"{name} (epoch {epoch}): {details[self._rank]} programs of this rank's kernel found that ranks"
                " disagree, the others did not: rows are missing; this Buffer is lost"
            )
        if code == words.BAD_COUNTS.value:
            return ArgumentError("num_tokens_per_rank", "other counts", "those of is_token_in_rank")
        if code == words.BAD_HANDLE.value:
            return ArgumentError("handle", f"routes that do not fit ({name}, epoch {epoch})", "the dispatch's handle")
        return TokenferryError(f"{name} (epoch {epoch}): a kernel reported code {code}")


def _host_words() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(words.HOST_WORDS, dtype=torch.int64, device="cpu", pin_memory=True)

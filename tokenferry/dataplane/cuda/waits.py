"""For whom the kernels of one rank have waited: counters in its device memory, read when the host asks."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import torch

from tokenferry.dataplane.cuda.kernels import words
from tokenferry.errors import BufferStateError
from tokenferry.stats import Waits

_BLOCK = words.MAX_KINDS * words.MAX_RANKS


class DeviceWaits:
    """What kernels have counted since the last reset.

    Args:
        state: int64 [words.STATE_WORDS] of the rank, on its device.
        rank: this rank, which waits for itself in vain: that is not told.
        num_ranks: R, of the node.
    """

    def __init__(self, state: torch.Tensor, rank: int, num_ranks: int) -> None:
        first = words.WAITS.value
        self._counters = state[first : first + 3 * _BLOCK].view(3, words.MAX_KINDS, words.MAX_RANKS)
        self._others = [other for other in range(num_ranks) if other != rank]
        self._lock = threading.Lock()
        is_cuda = state.is_cuda
        with torch.inference_mode(False):
            self._copy = torch.empty(self._counters.shape, dtype=torch.int64, device="cpu", pin_memory=is_cuda)
            self._before = torch.zeros_like(self._counters[:2], device="cpu")
        # Not behind kernels that may be waiting.
        self._stream = torch.cuda.Stream(state.device) if is_cuda else None  # type: ignore[no-untyped-call]

    def read(self, *, reset: bool = False) -> dict[int, dict[int, Waits]]:
        """The waits so far, by kind of operation and rank, those that have been; of running kernels, what is over.

        Args:
            reset: begin again at 0 afterwards. A wait that ends meanwhile is counted, but perhaps not as the longest.

        Raises:
            BufferStateError: a CUDA graph is being captured: nothing can be read then.
        """
        with self._lock:
            if self._stream is not None and torch.cuda.is_current_stream_capturing():
                raise BufferStateError("stats: a CUDA graph is being captured; call it before or afterwards")
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                self._copy.copy_(self._counters, non_blocking=True)
                if reset:
                    self._counters[2].zero_()
            if self._stream is not None:
                self._stream.synchronize()
            counts, totals = (self._copy[:2] - self._before).tolist()
            longest = self._copy[2].tolist()
            if reset:  # sums go on: what kernels add between the copy and a zero would be lost
                self._before.copy_(self._copy[:2])
        return {
            kind: {
                rank: Waits(counts[kind][rank], totals[kind][rank], longest[kind][rank])
                for rank in self._others
                if counts[kind][rank]
            }
            for kind in range(words.MAX_KINDS)
            if any(counts[kind][rank] for rank in self._others)
        }

"""The exchange as operators of torch, for whatever looks into a program: compilers, checkpointing, autograd.

Importing this module defines ``torch.ops.tokenferry.dispatch``, ``cached_dispatch``, ``combine``,
``low_latency_dispatch`` and ``low_latency_combine``. They take and return tensors, numbers and the name of a Buffer,
and compute what the Buffer's methods of these names compute; see ``docs/operators.md``. The functions here are these
operators, called eagerly without torch's dispatcher where nothing but they would see the call. Python programs call
them through :mod:`tokenferry.nn.functional`.
"""

from tokenferry.ops import high_throughput, low_latency
from tokenferry.ops.high_throughput import cached_dispatch, combine, dispatch
from tokenferry.ops.low_latency import low_latency_combine, low_latency_dispatch
from tokenferry.ops.registry import buffer_of, name_of, register

OPERATORS = (
    high_throughput.DISPATCH,
    high_throughput.CACHED_DISPATCH,
    high_throughput.COMBINE,
    low_latency.DISPATCH,
    low_latency.COMBINE,
)
"""All of them; a checkpointing policy that saves what they return looks here."""

__all__ = [
    "OPERATORS",
    "buffer_of",
    "cached_dispatch",
    "combine",
    "dispatch",
    "low_latency_combine",
    "low_latency_dispatch",
    "name_of",
    "register",
]

"""Where the control words of a rank's heap lie, and what they mean. Shared by the host and the kernels.

Every rank's heap starts with words that its *peers* write and it alone reads::

    published[s]   how far source s is with the operation, written by s
    released[r]    how far reader r is with this rank's rows, written by r
    message[s]     what s says about the operation, written by s before ``published``
    experts[s]     (token, choice) pairs that s sends to each local expert
    list[s]        ascending ids of the tokens that s sends here

then the stage follows, written by its owner and read by all. The hazard of each word:
    message, experts, list   rewritten only when the reader has released the previous operation
    published                written after everything it speaks of (release, system scope)
    released                 written after the last read of the owner's rows (release, system scope)

The words of low-latency operations are apart from these, see :mod:`.low_latency`.

Both progress words are ``epoch << 20 | step`` and only grow; nothing is ever reset. Step 1 of ``published``: the
message is there; step k + 2: rounds 0 to k are staged. Step k + 1 of ``released``: rounds 0 to k are read; step
ALL: everything is.
"""

from __future__ import annotations

import triton.language as tl

LINE_BYTES = 128
MAX_RANKS = 32
MAX_LOCAL_EXPERTS = 1024
MAX_REGIONS = 256
"""Regions of one owner that peers can have open."""
MAX_TOKENS = 1 << 21
"""Tokens of a rank that lists have room for, at most; rows are at most 2^31."""
MAX_SLOTS = 4
"""Low-latency operations whose rows can be under way at a time."""

_PUBLISHED = 0
_RELEASED = _PUBLISHED + MAX_RANKS * LINE_BYTES
_MESSAGES = _RELEASED + MAX_RANKS * LINE_BYTES
_MESSAGE_BYTES = 1024
_EXPERTS = _MESSAGES + MAX_RANKS * _MESSAGE_BYTES
_PUSHED = _EXPERTS + MAX_RANKS * MAX_LOCAL_EXPERTS * 4
_PUSH_WORDS = MAX_SLOTS * MAX_RANKS * 8
_LISTS = _PUSHED + 4 * _PUSH_WORDS
CONTROL_BYTES = _LISTS
"""Bytes before the lists."""

PUBLISHED = tl.constexpr(_PUBLISHED)
RELEASED = tl.constexpr(_RELEASED)
MESSAGES = tl.constexpr(_MESSAGES)
MESSAGE_BYTES = tl.constexpr(_MESSAGE_BYTES)
EXPERTS = tl.constexpr(_EXPERTS)
EXPERTS_BYTES = tl.constexpr(MAX_LOCAL_EXPERTS * 4)
LISTS = tl.constexpr(_LISTS)
PUSHED = tl.constexpr(_PUSHED)
PUSH_RELEASED = tl.constexpr(_PUSHED + _PUSH_WORDS)
PUSHED_WEIGHTS = tl.constexpr(_PUSHED + 2 * _PUSH_WORDS)
PUSH_SIGNATURES = tl.constexpr(_PUSHED + 3 * _PUSH_WORDS)
LINE = tl.constexpr(LINE_BYTES)
REGIONS = tl.constexpr(MAX_REGIONS)
MOST_TOKENS = tl.constexpr(MAX_TOKENS)
MOST_ROWS = tl.constexpr(1 << 31)
MOST_CHOICES = tl.constexpr(32)
RANKS = tl.constexpr(MAX_RANKS)

EPOCH_SHIFT = tl.constexpr(20)
ALL = tl.constexpr((1 << 20) - 1)
RELEASED_AT_START = (1 << 20) - 1
"""What ``released`` words hold before the first operation, whose epoch is 1."""

# Where a column lies, in one word: region and byte offset in it; negative where no peer can see it.
PLACE_SHIFT = tl.constexpr(44)
PLACE_MASK = tl.constexpr((1 << 44) - 1)

# Words of a message.
SIGNATURE = tl.constexpr(0)
WITHDRAWN = tl.constexpr(-1)
"""In the place of a signature, which it never is: the rank has given up."""
NUM_TOKENS = tl.constexpr(1)
NUM_ROWS = tl.constexpr(2)
NUM_WORST = tl.constexpr(3)
PROBLEM = tl.constexpr(4)
STAGED = tl.constexpr(5)
FIRST_ROW = tl.constexpr(6)
"""Of one of several combines of the same rows: where those for the reader begin."""
ROW_COUNT = tl.constexpr(7)
"""Likewise, how many there are. Of one of several dispatches: how many tokens are in the list."""
COLUMNS = tl.constexpr(16)
COUNTS = tl.constexpr(32)

# Words of a rank's own state, in its device memory.
EPOCH = tl.constexpr(0)
FAILED = tl.constexpr(1)
BAD_INPUT = tl.constexpr(2)
SKIPPED = tl.constexpr(3)
ARRIVED = tl.constexpr(4)
DIFFERED = tl.constexpr(5)
"""Programs of an operation that found other signatures than theirs."""
STAGE_ARRIVED = tl.constexpr(6)
"""Two counters, for even and odd rounds: a program may be one round ahead, never two."""
ROUND_ARRIVED = tl.constexpr(8)
"""Likewise."""
LAYOUT_ARRIVED = tl.constexpr(10)
PUSH_EPOCH = tl.constexpr(12)
PUSH_BEGUN = tl.constexpr(13)
PUSH_SENT = tl.constexpr(14)
ALONE = tl.constexpr(15)
"""The last dispatch that this rank does not receive, though others may: it goes on sending."""
VERDICTS = tl.constexpr(16)
"""By slot: the ranks that have come, as the first receiver decided."""
RECEIVED = tl.constexpr(16 + MAX_SLOTS)
"""By slot: the last epoch that is received when the next kernel begins."""
SETTLED = tl.constexpr(16 + 2 * MAX_SLOTS)
"""The last operation at whose end all readers had released this rank's rows."""
MASKED = tl.constexpr(32)
"""By rank: whether low-latency operations go on without it; what is under way does after a failure, too."""
SENT_TO = tl.constexpr(32 + MAX_RANKS)
"""By slot and rank: the last epoch whose rows were pushed there."""
CLAIMED = tl.constexpr(32 + MAX_RANKS + MAX_SLOTS * MAX_RANKS)
"""By kind of word (below) and rank: the last value whose wait is counted."""
_WAITS = 32 + MAX_RANKS + MAX_SLOTS * MAX_RANKS + 3 * MAX_RANKS
MAX_KINDS = 16
"""Kinds of operations that waits are counted of."""
WAITS = tl.constexpr(_WAITS)
"""By operation and rank: how often it was waited for; behind that, nanoseconds; behind that, the longest wait."""
WAIT_WORDS = tl.constexpr(MAX_KINDS * MAX_RANKS)
STATE_WORDS = _WAITS + 3 * MAX_KINDS * MAX_RANKS

# Words that several programs wait for, of whom one counts the wait.
FOR_ROWS = tl.constexpr(0)
FOR_RELEASE = tl.constexpr(1)
FOR_WEIGHTS = tl.constexpr(2)

# Words of the status, in pinned host memory.
CODE = tl.constexpr(0)
OPERATION = tl.constexpr(1)
AT_EPOCH = tl.constexpr(2)
HAS_FAILED = tl.constexpr(3)
"""The code of what has made the Buffer useless, if anything has."""
DETAIL = tl.constexpr(4)
NEWLY_MASKED = tl.constexpr(4 + MAX_RANKS)
"""By rank: whether a kernel has masked it."""
STATUS_WORDS = 4 + 2 * MAX_RANKS

# Codes.
OK = tl.constexpr(0)
TIMED_OUT = tl.constexpr(1)
MISMATCH = tl.constexpr(2)
CAPACITY = tl.constexpr(3)
PEER_PROBLEM = tl.constexpr(4)
BAD_EXPERT = tl.constexpr(5)
BAD_COUNTS = tl.constexpr(6)
BAD_HANDLE = tl.constexpr(7)
BAD_PEER = tl.constexpr(8)
"""Words of a rank that none of this group writes; it ends the Buffer."""
CROWDED = tl.constexpr(9)
NO_ROOM = tl.constexpr(10)
NOT_RECEIVED = tl.constexpr(11)
TORN = tl.constexpr(12)
"""Some programs of a kernel went on and others stepped back; it ends the Buffer."""

# Words that notify leaves in pinned host memory.
HOST_DONE = tl.constexpr(0)
HOST_ROWS = tl.constexpr(1)
HOST_CODE = tl.constexpr(2)
"""0, or why the ranks stepped back: the operation is over then."""
HOST_EXPERTS = tl.constexpr(3)
HOST_WORDS = 3 + MAX_LOCAL_EXPERTS

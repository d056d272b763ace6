"""The SM's bulk-copy engine from Gluon, without descriptors: any address, any number of bytes divisible by 16.

One element a thread: on tensors of shape [32 * warps] inline assembly is code of single threads. A *slot* is shared
memory that one row passes through, with an mbarrier of its own; warps have rings of slots and never meet.

Shared memory is addressed by hand, from the start of Triton's dynamic shared memory. :func:`reserve` takes the bytes
that kernels use, as the first and largest allocations, which the compiler therefore puts there; that it does is
tested on the compiled code.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

SHARED_BYTES = (128 + 64 + 32) * 1024
"""What :func:`reserve` takes: the shapes of allocations are powers of two."""


@gluon.jit
def reserve():
    """Take the shared memory; the results must be kept alive until its last use."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    first = gl.allocate_shared_memory(gl.int32, [32768], flat)
    second = gl.allocate_shared_memory(gl.int32, [16384], flat)
    third = gl.allocate_shared_memory(gl.int32, [8192], flat)
    anchor = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(anchor.index(0), count=1)  # some use of shared memory, so that the compiler declares its symbol
    tl.debug_barrier()
    return first, second, third


@gluon.jit
def keep(memory):
    """The end of the life of what :func:`reserve` returned."""
    memory[0]._keep_alive()
    memory[1]._keep_alive()
    memory[2]._keep_alive()


@gluon.jit
def shared_base(like):
    """The address of the reserved shared memory, one a thread."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; // $1", "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def init_barrier(barrier, arrivals, on):
    """Make an mbarrier that so many arrivals, and the bytes they announce, complete."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.u32 p, $3, 0;
        @p mbarrier.init.shared::cta.b64 [$1], $2;
        @p fence.mbarrier_init.release.cluster; mov.u32 $0, 0; }""",
        "=r,r,r,r",
        [barrier, arrivals, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def arrive(barrier, on):
    """The warp meets, and those of its threads that are on arrive at an mbarrier."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b64 s; setp.ne.u32 p, $2, 0; bar.warp.sync 0xffffffff;
        @p mbarrier.arrive.shared::cta.b64 s, [$1]; mov.u32 $0, 0; }""",
        "=r,r,r",
        [barrier, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def announce(barrier, nbytes, on):
    """Arrive at an mbarrier and announce bytes; then the warp meets, so that loads come after."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b64 s; setp.ne.u32 p, $3, 0; bar.warp.sync 0xffffffff;
        @p mbarrier.arrive.expect_tx.shared::cta.b64 s, [$1], $2;
        bar.warp.sync 0xffffffff; mov.u32 $0, 0; }""",
        "=r,r,r,r",
        [barrier, nbytes, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_bulk(target, source, nbytes, barrier, on):
    """Start a copy from global into shared memory; its bytes count at the mbarrier."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.u32 p, $5, 0;
        @p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$4];
        mov.u32 $0, 0; }""",
        "=r,r,l,r,r,r",
        [target, source, nbytes, barrier, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_bulk(target, source, nbytes, on):
    """Start a copy from shared into global memory; a group of its own, also where nothing is to be copied."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.u32 p, $4, 0;
        @p cp.async.bulk.global.shared::cta.bulk_group [$1], [$2], $3;
        cp.async.bulk.commit_group; mov.u32 $0, 0; }""",
        "=r,l,r,r,r",
        [target, source, nbytes, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_parity(barrier, parity):
    """Wait until the phase of this parity is complete: arrived, and all announced bytes there."""
    gl.inline_asm_elementwise(
        """{ .reg .pred c; W: mbarrier.try_wait.parity.shared::cta.b64 c, [$1], $2; @!c bra W; mov.u32 $0, 0; }""",
        "=r,r,r",
        [barrier, parity],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def wait_stores_read(like, PENDING: gl.constexpr):
    """Wait until all but the last PENDING groups of this thread have read their shared memory."""
    if PENDING == 0:
        _wait_group(like, "cp.async.bulk.wait_group.read 0; mov.u32 $0, 0; // $1")
    elif PENDING == 1:
        _wait_group(like, "cp.async.bulk.wait_group.read 1; mov.u32 $0, 0; // $1")
    elif PENDING == 2:
        _wait_group(like, "cp.async.bulk.wait_group.read 2; mov.u32 $0, 0; // $1")
    elif PENDING == 3:
        _wait_group(like, "cp.async.bulk.wait_group.read 3; mov.u32 $0, 0; // $1")
    else:
        _wait_group(like, "cp.async.bulk.wait_group.read 4; mov.u32 $0, 0; // $1")


@gluon.jit
def wait_stores(like):
    """Wait until all stores of this thread have landed, and order them before its later signals.

    They are to global memory: a fence of that alone makes no thread wait for what else it has under way.
    """
    _wait_group(like, "cp.async.bulk.wait_group 0; fence.proxy.async.global; mov.u32 $0, 0; // $1")


@gluon.jit
def fence_before_loads(like):
    """Order what this thread has seen of global memory before its later bulk copies from there."""
    _wait_group(like, "fence.proxy.async.global; mov.u32 $0, 0; // $1")


@gluon.jit
def _wait_group(like, CODE: gl.constexpr):
    gl.inline_asm_elementwise(CODE, "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def meet(like):
    """The warp meets: what its threads have written to shared memory is there for all of them."""
    _wait_group(like, "bar.warp.sync 0xffffffff; mov.u32 $0, 0; // $1")


@gluon.jit
def load_shared(address):
    """An int32 of shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_shared_long(address):
    """An int64 of shared memory."""
    return gl.inline_asm_elementwise(
        "ld.shared.b64 $0, [$1];", "=l,r", [address], dtype=gl.int64, is_pure=False, pack=1
    )


@gluon.jit
def store_shared(address, value, on):
    """Write an int32 to shared memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,r,r",
        [address, value, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_shared_long(address, value, on):
    """Write an int64 to shared memory."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.b64 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,l,r",
        [address, value, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def tell(address, value, on):
    """Let the host see an int64 in pinned memory, and before it what this thread, no other, has stored."""
    gl.inline_asm_elementwise(
        """{ .reg .pred p; setp.ne.u32 p, $3, 0; @p fence.acq_rel.sys;
        @p st.relaxed.sys.global.b64 [$1], $2; mov.u32 $0, 0; }""",
        "=r,l,l,r",
        [address, value, on],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )

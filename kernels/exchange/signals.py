"""How a CTA signals to CTAs of another GPU that data is there, and how they wait for it.

A signal is one word of the receiver's memory: 31 bits of the epoch, 16 of the channel tag (which
channel of which incarnation), 16 of a number of rows. It belongs to one chunk of one message, is set
and never added to, and is compared for equality, so that nothing of another epoch, channel or
incarnation is taken for it.

    writer                                     reader
    stores of all CTAs of the chunk            `wait_for` (acquire, system; then a barrier)
    `publish` (barrier, count, release)   ->   loads

The writer's barrier comes first because a release orders the stores of the thread that issues it.
CTAs count at GPU scope; the last of them has acquired what the others released, and releases all of
it at system scope. Every reading CTA acquires for itself and loads afterwards: neither a flag that
another CTA has seen nor a load above the wait would do. Both hold over a kernel's end, too: a later
kernel on the stream reads what a CTA of an earlier one acquired.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

SILENT, INVALID = 1, 2  # why a rank is blamed: no signal in time; an invalid message
_SILENT: tl.constexpr = tl.constexpr(SILENT)
_POLLS: tl.constexpr = tl.constexpr(64)  # between looks at the clock and the abort word
_POLL: tl.constexpr = tl.constexpr("relaxed")


def blame(code: int) -> tuple[int, int]:
    """The rank that an abort word other than 0 blames, and the reason."""
    return (code & 0xFFFF) - 1, code >> 16


@triton.jit
def stamp_of(epoch, channel_tag):
    """What a signal of this epoch has above its lowest 16 bits."""
    return ((tl.cast(epoch, tl.int64) & 0x7FFFFFFF) << 16) | channel_tag


@triton.jit
def last_of(counter_ptr, arrivals):
    """Whether this CTA is the last of `arrivals`, after the stores of all of them.

    The counter is zero again before the next launch.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def publish(counter_ptr, arrivals, signal_ptr, word):
    """Set the signal once all of `arrivals` CTAs have come here; their stores are seen before it."""
    if last_of(counter_ptr, arrivals):
        tl.atomic_xchg(signal_ptr, word, sem="release", scope="sys")


@triton.jit
def wait_for(
    signal_ptr, stamp, peer, peers_ptr, status_ptr, budget_ns, rank,
    ABORT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Wait until the signal bears the stamp; returns its rows and 0, or 0 and an abort code.

    After `budget_ns` the peer is blamed, in the abort words of all ranks and the host's status. A
    wait that finds an abort word set returns at once. All threads return the same.
    """
    # One thread reads, and a barrier hands the value to the others: loop conditions are uniform.
    word = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys")
    nobody = tl.full((), 0, tl.int64)
    code = nobody
    if (word >> 16) != stamp:
        own = tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32)) + ABORT
        abort_ptr = own.to(tl.pointer_type(tl.int64))
        begun = cuda.globaltimer()
        polls = 0
        while ((word >> 16) != stamp) & (code == 0):
            if polls % _POLLS == 0:
                # Each thread has a clock of its own; the one that issues this decides for all.
                late = cuda.globaltimer() - begun > budget_ns
                verdict = tl.where(late, (_SILENT << 16) + peer + 1, 0).to(tl.int64)
                code = tl.atomic_cas(abort_ptr, nobody, verdict, sem="acq_rel", scope="sys")
            polls += 1
            word = tl.atomic_add(signal_ptr, 0, sem=_POLL, scope="sys")
        word = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys")
        if (word >> 16) == stamp:
            code = nobody
        else:
            set_abort(code, peers_ptr, status_ptr, ABORT, W)
    rows = tl.where(code == 0, word & 0xFFFF, 0).to(tl.int32)
    return rows, code


@triton.jit
def set_abort(code, peers_ptr, status_ptr, ABORT: tl.constexpr, W: tl.constexpr):
    """Set every rank's abort word, and this host's status, unless a rank was blamed before."""
    nobody = tl.full((), 0, tl.int64)
    for other in range(W):
        arena = tl.load(peers_ptr + other)
        if arena != 0:  # a rank that this one cannot store to finds out by its own deadline
            word_ptr = (arena.to(tl.pointer_type(tl.int32)) + ABORT).to(tl.pointer_type(tl.int64))
            tl.atomic_cas(word_ptr, nobody, code, sem="acq_rel", scope="sys")
    tl.store(status_ptr, code, mask=tl.load(status_ptr) == 0)

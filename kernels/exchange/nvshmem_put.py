"""NVSHMEM's put with a signal, for peers whose memory cannot be stored to.

A kernel that calls it is compiled with `extern_libs={"libnvshmem_device": bitcode}`, and its module
must be given to nvshmemx_cumodule_init before the first launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core

_SET: tl.constexpr = tl.constexpr(9)  # NVSHMEM_SIGNAL_SET


@core.extern
def _putmem_signal_nbi_block(to, source, num_bytes, signal, word, op, peer, _semantic=None):
    types = tuple(core.dtype(name) for name in ("int64",) * 4 + ("uint64", "int32", "int32"))
    return core.extern_elementwise(
        "", "", [to, source, num_bytes, signal, word, op, peer],
        {types: ("nvshmemx_putmem_signal_nbi_block", core.dtype("int32"))},
        is_pure=False, _semantic=_semantic,
    )  # fmt: skip


@triton.jit
def put_and_signal(to_ptr, source_ptr, words, signal_ptr, word, peer):
    """Copy `words` of this rank's arena to the same place at `peer`, then set the signal there.

    All threads of the CTA must come here. `to_ptr` and `signal_ptr` are this rank's own addresses.
    """
    _putmem_signal_nbi_block(
        to_ptr.to(tl.int64), source_ptr.to(tl.int64), words.to(tl.int64) * 4,
        signal_ptr.to(tl.int64), word.to(tl.uint64), _SET, tl.cast(peer, tl.int32),
    )  # fmt: skip

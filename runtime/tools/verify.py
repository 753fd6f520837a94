"""What `qroam verify` prints."""

from __future__ import annotations

from itertools import groupby

from ...partition.snapshot.verify import Verified


def render_verified(result: Verified) -> str:
    """One line for the whole, and for each damage what is wrong and the blocks lost with it."""
    unclosed = f", {result.unclosed} blocks not closed yet" if result.unclosed else ""
    lines = [
        f"snapshot {result.sequence}: {result.documents} documents, {result.records} records in "
        f"{result.files} files{unclosed}; {result.num_bytes / 2**20:.1f} MiB intact"
    ]
    for damage in result.damage:
        lost = [
            f"{name!r} {', '.join(str(block) for _, block in blocks)}"
            for name, blocks in groupby(damage.blocks, key=lambda pair: pair[0])
        ]
        lines.append(f"damaged: {damage.what}\n  blocks lost: {'; '.join(lost)}")
    return "\n".join(lines)

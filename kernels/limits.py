"""What the kernels take: sizes and dtypes, as their launchers check them. Importable without Triton.

Each launcher refuses what is beyond these; `runtime/gpu/limits.py` refuses a runtime that would need
it, before anything is opened.
"""

from __future__ import annotations

import torch

# Plan and decide. An item is one (query, branch).
MAX_QUERIES = 256
MAX_ITEMS = 1024
MAX_UNITS = 4096  # of an item, and of a list in a message
MAX_UNIT_TOKENS = 65535
MAX_PLAN_RANKS = 256

# Attention. Rows are those of one launch; columns are of an entry: latent (value), then rope.
MAX_HEADS = 128
MAX_ATTEND_ROWS = 16384
LATENTS = (128, 256, 512)
ROPES = (0, 64)
FP8_LATENT = 512
FP8_ROPE = 64
FP8_ROW_BYTES = 656  # of an entry in codec fp8_v32
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8_v32": torch.bfloat16,
}  # query, by codec

# Exchange and fetch.
MAX_RANKS = 64
MAX_MESSAGE_ROWS = 1024
MAX_MESSAGE_HEADS = 1024
MAX_CHUNK = 8  # rows

"""What launchers check at their door: shapes, dtypes and places always, values only when asked to."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    tensor: Tensor,
    name: str,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """A contiguous tensor of this shape (None: any), dtype (None: any) and device, or a ValueError."""
    fits = len(shape) == tensor.dim() and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or (dtype is not None and tensor.dtype != dtype):
        wanted = "any dtype" if dtype is None else dtype
        raise ValueError(
            f"{name} must be {shape} {wanted}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous on {device}, got strides {tensor.stride()} on {tensor.device}"
        )


def check_ids(ids: Tensor, name: str, limit: int) -> None:
    """No id of `limit` or more; negative ones are padding. Reads the device.

    Raises: ValueError naming the largest id and the limit.
    """
    if ids.numel() and int(ids.max()) >= limit:
        raise ValueError(f"{name} must be below {limit}, got {int(ids.max())}")

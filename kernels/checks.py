"""What launchers check of their arguments: shapes, dtypes and devices always, values only on request."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    tensor: Tensor | None,
    name: str,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    columns: bool = False,
) -> None:
    """A tensor of this shape (None: any), dtype (None: any) and device, or a ValueError.

    It is contiguous, or, with `columns`, its last dimension is. None passes: an optional tensor.
    """
    if tensor is None:
        return
    fits = len(shape) == tensor.dim() and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or (dtype is not None and tensor.dtype != dtype):
        wanted = "any dtype" if dtype is None else dtype
        raise ValueError(
            f"{name} must be {tuple(shape)} {wanted}, got {tuple(tensor.shape)} {tensor.dtype}"
        )
    dense = tensor.stride(-1) == 1 if columns else tensor.is_contiguous()
    if tensor.device != device or not dense:
        what = "have contiguous columns" if columns else "be contiguous"
        raise ValueError(
            f"{name} must {what} on {device}, got strides {tensor.stride()} on {tensor.device}"
        )


def check_ids(ids: Tensor, name: str, limit: int, *, count: Tensor | None = None) -> None:
    """No id of `limit` or more; negative ones are padding. Reads the device.

    Args: count: (1,) int32, how many of the last dimension are in use.
    Raises: ValueError naming the largest id and the limit.
    """
    used = ids if count is None else ids[..., : int(count)]
    if used.numel() and int(used.max()) >= limit:
        raise ValueError(f"{name} must be below {limit}, got {int(used.max())}")

"""The calling process stays outside: its autocast, default device, grad and inference mode, and compiler.

Public calls enter the arithmetic of this library here and nowhere else. Factories give their dtype, since
the default dtype is one for all threads of the process and is not to be changed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import isfunction
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

C = TypeVar("C")
_CPU = torch.device("cpu")


@contextmanager
def own_context() -> Iterator[None]:
    """No autograd, no inference mode, no autocast, factories on the CPU; as it was before afterwards.

    Nothing inside is traced by torch.compile: what compiled code calls here is opaque to it.
    """
    with ExitStack() as stack:
        stack.callback(set_eval_frame, set_eval_frame(None))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device() != _CPU:
            stack.enter_context(_CPU)
        yield


def isolated(cls: type[C]) -> type[C]:
    """The class with every public method, and those of `with`, in `own_context`."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name not in ("__enter__", "__exit__"):
            continue
        if isinstance(member, classmethod):
            setattr(cls, name, classmethod(_isolated(member.__func__)))
        elif isfunction(member):
            setattr(cls, name, _isolated(member))
    return cls


def _isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with own_context():
            return function(*args, **named)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # compiled callers break here
    return call

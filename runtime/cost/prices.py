"""The cost model's lines as the device's decision kernel reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.decide import PriceTable
from ...partition.layout import Form
from .model import Asked, CostModel, Line


def prices_of(
    model: CostModel,
    *,
    world: int,
    forms: tuple[Form, ...] = ("A",),
    device: torch.device | str,
) -> PriceTable:
    """What `CostModel` charges if 1, 2, ... `world` holders are talked to at once.

    Args: forms: payload forms that may be chosen: A, B or A and B.
    Raises: ValueError for forms that the layout does not have.
    """
    chosen = [facts for facts in model.facts.forms if facts.form in forms]
    if not forms or tuple(facts.form for facts in chosen) != forms:
        known = ", ".join(facts.form for facts in model.facts.forms)
        raise ValueError(f"forms must be some of {known}, in that order, got {forms}")
    sharers = torch.arange(1, world + 1).double()
    none = torch.zeros_like(sharers)

    def columns(line: Line, *names: str) -> list[Tensor]:
        """(world,) each; what is named is all there is."""
        given = {
            n: torch.as_tensor(s).double()
            for n, s in zip(Asked._fields, line.coefficients, strict=True)
        }
        assert not any(bool(seconds.any()) for n, seconds in given.items() if n not in names)
        return [given[name].expand(world) for name in names]

    rows = []
    for facts in chosen:
        route = model.route(facts, wait_s=none, sharers=sharers)
        rows += columns(route.total, "used", "items", "units", "weights")
    if len(forms) == 1:
        rows += [none] * 4
    fetch = model.fetch(mixed=none, sharers=sharers)
    rows += columns(fetch.total, "used", "items", "units", "unique", "found")
    rows += columns(model.merge(model.facts.forms[0]), "used", "items")
    rows.append(torch.full_like(sharers, model.facts.branches))
    return PriceTable(
        torch.stack(rows, 1).to(device), len(forms), first_way=2 if forms[0] == "A" else 3
    )

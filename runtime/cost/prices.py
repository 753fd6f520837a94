"""The cost model's constants as the device's decision kernel reads them."""

from __future__ import annotations

import torch

from ...kernels.decide import FormPrices, Prices
from ...partition.layout import Form
from .model import (
    COVERAGE_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    QUERY_META_BYTES,
    UNIT_ID_BYTES,
    CostModel,
)


def prices_of(model: CostModel, *, world: int, forms: tuple[Form, ...] = ("A",)) -> Prices:
    """The constants that `CostModel` works with, each rounded as there.

    Args: world: ranks. forms: payload forms that may be chosen.
    """
    facts, path, device = model.facts, model.profile.path, model.profile.device
    pulls, granule = path.can_pull, model.unit_tokens * facts.entry_bytes
    fastest = path.pull_rate(granule) if pulls else path.push_bytes_per_s
    per_entry = max(
        facts.attend_flop / device.flop_per_s, facts.entry_bytes / device.memory_bytes_per_s
    )
    merge_s = [form.back_bytes / device.merge_bytes_per_s for form in facts.forms]
    sharers = range(1, world + 1)
    return Prices(
        header_bytes=HEADER_BYTES,
        item_bytes=QUERY_META_BYTES,
        unit_bytes=UNIT_ID_BYTES,
        probe_s=path.probe_s,
        attend_base_s=device.attend_s,
        unit_attend_s=model.unit_tokens * per_entry,
        merge_base_s=device.merge_s,
        merge_s=merge_s[0],
        memory_rate=device.memory_bytes_per_s,
        flop_rate=device.flop_per_s,
        branches=facts.branches,
        request_header_bytes=0 if pulls else HEADER_BYTES,
        request_unit_bytes=0 if pulls else UNIT_ID_BYTES,
        reply_header_bytes=0 if pulls else HEADER_BYTES,
        unit_tokens=model.unit_tokens,
        entry_bytes=facts.entry_bytes + (0 if pulls else MARK_BYTES),
        pack_base_s=0 if pulls else device.pack_s,
        pack_rate=float("inf") if pulls else device.pack_bytes_per_s,
        rope_bytes=facts.rope_bytes if model.splice else 0,
        splice_base_s=float(
            torch.tensor(device.splice_s, dtype=torch.float32)
        ),  # bool times float is float32 in torch
        splice_rate=device.splice_bytes_per_s,
        reuse=model.reuse,
        out_rates=tuple(min(path.egress_bytes_per_s / s, path.push_bytes_per_s) for s in sharers),
        in_rates=tuple(min(path.ingress_bytes_per_s / s, path.push_bytes_per_s) for s in sharers),
        fetch_rates=tuple(min(path.ingress_bytes_per_s / s, fastest) for s in sharers),
        forms=tuple(
            (
                form.form,
                FormPrices(
                    out_bytes=form.out_bytes,
                    back_bytes=form.back_bytes + COVERAGE_BYTES,
                    weight_bytes=form.weight_bytes,
                    project_flop=form.project_flop,
                    merge_s=merge,
                ),
            )
            for form, merge in zip(facts.forms, merge_s, strict=True)
            if form.form in forms
        ),
    )

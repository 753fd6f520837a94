"""What `qroam explain` prints: the plain text of the records of `explain_step`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .explain import Candidate, DecisionRecord, Flip, Record, StepRecord


def render(records: Sequence[Record]) -> str:
    """Plain text: a line per decision with its candidates below, and a line for the step."""
    lines: list[str] = []
    for record in records:
        if record["kind"] == "decision":
            lines += _decision_lines(record)
        else:
            lines += _step_lines(record)
    return "\n".join(lines)


def render_lines(records: Sequence[Record]) -> Iterator[str]:
    """One line per (query, holder), with all that `render` prints about its decision."""
    for record in records:
        if record["kind"] == "decision":
            first, last = record["queries"]
            about = _one_line(record)
            for query in range(first, last + 1):
                for holder in range(record["holders"][0], record["holders"][1] + 1):
                    yield f"query {query}, holder {holder}: {about}"


def _decision_lines(record: DecisionRecord) -> list[str]:
    alike = record["queries"][0] != record["queries"][1]
    alike = alike or record["holders"][0] != record["holders"][1]
    head = (
        f"{_span('query', 'queries', record['queries'])}, "
        f"{_span('holder', 'holders', record['holders'])}{' (each the same)' if alike else ''}: "
        f"{record['way'].upper()}, margin {record['margin']:.1%}: {record['reason']}"
    )
    asked = (
        f"    {record['units_per_query']} units a query, {record['unique_units']} different ones "
        "at the holder; times in us for all queries at one holder"
    )
    lines = [head, asked]
    for candidate in record["candidates"]:
        blocked = candidate["blocked"]
        if candidate["parts_us"] is None:
            lines.append(f"    {candidate['way']:<10}{'-':>9}  not priced: {blocked}")
            continue
        parts = _parts_text(candidate["parts_us"])
        lines.append(f"    {candidate['way']:<10}{candidate['total_us']:>9.1f} = {parts}")
        if blocked is not None:
            lines.append(f"    {'':<10}{'':>9}   not available: {blocked}")
    return lines + [f"    flips: {_flip_text(flip)}" for flip in record["flips"]]


def _one_line(record: DecisionRecord) -> str:
    candidates = "; ".join(map(_candidate_text, record["candidates"]))
    flips = "; ".join(map(_flip_text, record["flips"]))
    return (
        f"{record['way'].upper()}, margin {record['margin']:.1%}: {record['reason']} | us for all "
        f"queries at the holder: {candidates} | flips: {flips}"
    )


def _candidate_text(candidate: Candidate) -> str:
    if candidate["parts_us"] is None:
        return f"{candidate['way']} not priced ({candidate['blocked']})"
    text = f"{candidate['way']} {candidate['total_us']:.1f} = {_parts_text(candidate['parts_us'])}"
    return (
        text if candidate["blocked"] is None else f"{text} not available ({candidate['blocked']})"
    )


def _parts_text(parts_us: dict[str, float]) -> str:
    return " + ".join(f"{name} {part:.1f}" for name, part in parts_us.items())


def _flip_text(flip: Flip) -> str:
    low, high = flip["scanned"]
    down, up = flip["down_to"], flip["up_to"]
    below = f"never down to {low}" if down is None else f"falling to {down}: {flip['down_way']}"
    above = f"never up to {high}" if up is None else f"rising to {up}: {flip['up_way']}"
    return f"{flip['quantity']} (now {flip['now']}): {below}, {above}"


def _step_lines(record: StepRecord) -> list[str]:
    parts, totals = record["parts_us"], record["total_us"]
    return [
        f"step of {record['layout']} on {record['fabric']}, reuse {record['reuse']:g}, "
        f"overlap {record['overlap']:g}:",
        f"    auto {totals['auto']:.1f} us = plan {parts['plan']:.1f} + "
        f"max(own {parts['own']:.1f}, slowest holder {parts['exchange']:.1f}) + "
        f"merge {parts['merge']:.1f}",
        f"    always-route {totals['always-route']:.1f} us, "
        f"always-fetch {totals['always-fetch']:.1f} us",
    ]


def _span(one: str, many: str, ends: list[int]) -> str:
    first, last = ends
    return f"{one} {first}" if first == last else f"{many} {first}-{last}"

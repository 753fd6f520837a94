"""The constants of a fabric: a frozen value read from TOML, in which every number names its source.

TOML keys are in human units (`probe_us`, `push_gb_per_s`, `flop_tera_per_s`), fields in SI
(`probe_s`, `push_bytes_per_s`, `flop_per_s`); decimal prefixes throughout.
"""

from __future__ import annotations

import reprlib
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path as FilePath
from typing import Any, cast

PROFILE_NAMES = ("ibgda-ndr200", "nvlink4", "loopback")
ASSUMPTION = "assumption"
MAX_FILE_BYTES = 64 << 10
MAX_LINE_CHARS = 512  # tomllib takes quadratic time for a long dotted key
MAX_GRANULE_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class _Unit:
    """How a TOML key's suffix maps to a field's, and which values (in SI) are believable."""

    toml: str
    field: str
    scale: float
    low: float
    high: float

    def check(self, what: str, value: float) -> None:
        """Raise ValueError, in the unit of TOML, unless `value` (SI) is within bounds."""
        if not self.low <= value <= self.high:
            low, high = self.low / self.scale, self.high / self.scale
            raise ValueError(f"{what} must be in [{low:g}, {high:g}], got {value / self.scale:g}")


_UNITS = (
    _Unit("_us", "_s", 1e-6, 0.0, 10.0),
    _Unit("_gb_per_s", "_bytes_per_s", 1e9, 1e3, 1e15),
    _Unit("_tera_per_s", "_per_s", 1e12, 1e6, 1e18),
)


def _toml_key(field: str) -> tuple[str, _Unit]:
    """The TOML spelling of a field, and its unit (that of the longest suffix)."""
    unit = max((u for u in _UNITS if field.endswith(u.field)), key=lambda u: len(u.field))
    return field.removesuffix(unit.field) + unit.toml, unit


def _check_fields(value: Path | Device) -> None:
    for field in fields(value):
        if field.name != "pull_bytes_per_s":
            key, unit = _toml_key(field.name)
            unit.check(key, getattr(value, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The way from one rank to another.

    Args:
        probe_s: round trip of a small message.
        push_bytes_per_s: rate of large writes to a peer, both directions busy.
        pull_bytes_per_s: (granule in bytes, rate) of scattered one-sided reads, granules rising.
            Empty where a requester cannot read a holder's memory: the holder packs and pushes.
        egress_bytes_per_s, ingress_bytes_per_s: caps of a rank over all its peers.
    """

    probe_s: float
    push_bytes_per_s: float
    pull_bytes_per_s: tuple[tuple[int, float], ...]
    egress_bytes_per_s: float
    ingress_bytes_per_s: float

    def __post_init__(self) -> None:
        _check_fields(self)
        _, unit = _toml_key("pull_bytes_per_s")
        for granule, rate in self.pull_bytes_per_s:
            if not 1 <= granule <= MAX_GRANULE_BYTES:
                raise ValueError(
                    f"granule_bytes must be in [1, {MAX_GRANULE_BYTES}], got {granule}"
                )
            unit.check("gb_per_s of pull_gb_per_s", rate)
        granules = [granule for granule, _ in self.pull_bytes_per_s]
        times = [granule / rate for granule, rate in self.pull_bytes_per_s]
        if granules != sorted(set(granules)) or times != sorted(times):
            raise ValueError(
                "pull_gb_per_s needs rising granule_bytes, and a larger granule may not take "
                f"less time than a smaller one, got {self.pull_bytes_per_s}"
            )

    @property
    def can_pull(self) -> bool:
        return bool(self.pull_bytes_per_s)

    def pull_rate(self, granule_bytes: int) -> float:
        """Bytes per second of scattered reads of `granule_bytes` each.

        The time of one granule is interpolated between the measured ones. Below the smallest it
        stays (the message rate binds); above the largest the rate stays.
        """
        assert self.can_pull
        assert granule_bytes > 0
        points = self.pull_bytes_per_s
        (first, rate), (last, last_rate) = points[0], points[-1]
        if granule_bytes <= first:
            return rate * granule_bytes / first
        if granule_bytes >= last:
            return last_rate
        upper = next(i for i, (granule, _) in enumerate(points) if granule > granule_bytes)
        (g0, r0), (g1, r1) = points[upper - 1 : upper + 1]
        share = (granule_bytes - g0) / (g1 - g0)
        return granule_bytes / ((1 - share) * g0 / r0 + share * g1 / r1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a rank's device takes: a base for each verb that launches, and rates.

    `flop_per_s` and `memory_bytes_per_s` are what attention reaches; projections use them too.
    """

    plan_s: float
    attend_s: float
    flop_per_s: float
    memory_bytes_per_s: float
    pack_s: float
    pack_bytes_per_s: float
    merge_s: float
    merge_bytes_per_s: float
    splice_s: float
    splice_bytes_per_s: float

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricProfile:
    """Ranks that are alike and the path between any two of them.

    `sources` holds, for every number by its TOML key, where it comes from. A source that begins with
    "assumption" says that the number was not measured.
    """

    name: str
    description: str
    path: Path
    device: Device
    sources: tuple[tuple[str, str], ...]

    @property
    def assumed(self) -> tuple[str, ...]:
        """The TOML keys of the numbers that are assumptions, by their sources."""
        return tuple(key for key, text in self.sources if text.startswith(ASSUMPTION))

    @property
    def label(self) -> str:
        """The name, and whether the constants were measured: "nvlink4 (7 of 15 constants assumed)"."""
        if not self.sources:
            origin = "sources not stated"
        elif self.assumed:
            origin = f"{len(self.assumed)} of {len(self.sources)} constants assumed"
        else:
            origin = "measured"
        return f"{self.name} ({origin})"


def load_profile(name_or_path: str | FilePath) -> FabricProfile:
    """A shipped profile by name, or one from a TOML file.

    Raises: ValueError that names the file, the key and what is allowed.
    """
    if name_or_path in PROFILE_NAMES:
        shipped = files(__package__) / "profiles" / f"{name_or_path}.toml"
        return parse_profile(shipped.read_bytes(), where=f"{name_or_path}.toml")
    path = FilePath(name_or_path)
    if path.suffix != ".toml":
        raise ValueError(
            f"unknown fabric profile {str(name_or_path)!r}; "
            f"known: {', '.join(PROFILE_NAMES)}, or a path to a .toml file"
        )
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_profile(raw, where=str(path))


def parse_profile(raw: bytes, *, where: str) -> FabricProfile:
    """The profile in a TOML document; `where` names it in errors."""
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{where}: larger than the allowed {MAX_FILE_BYTES} bytes")
    try:
        text = raw.decode()
        longest = max(map(len, text.split("\n")))
        if longest > MAX_LINE_CHARS:
            raise ValueError(f"a line has {longest} characters, allowed are {MAX_LINE_CHARS}")
        top = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not TOML: {error}") from error
    _expect_keys(top, {"name", "description", "path", "device", "sources"}, where)
    path, device = (_table(top, section, where) for section in ("path", "device"))
    _expect_keys(path, {_toml_key(f.name)[0] for f in fields(Path)}, f"{where}: [path]")
    _expect_keys(device, {_toml_key(f.name)[0] for f in fields(Device)}, f"{where}: [device]")
    sources = _table(top, "sources", where)
    _expect_keys(sources, path.keys() | device.keys(), f"{where}: [sources]")
    pull = _pull(path.pop("pull_gb_per_s"), f"{where}: [path] pull_gb_per_s")
    path_numbers = _numbers(path, Path, f"{where}: [path]")
    device_numbers = _numbers(device, Device, f"{where}: [device]")
    try:
        checked_path = Path(pull_bytes_per_s=pull, **path_numbers)
    except ValueError as error:
        raise ValueError(f"{where}: [path] {error}") from error
    return FabricProfile(
        name=_text(top, "name", where),
        description=_text(top, "description", where),
        path=checked_path,
        device=Device(**device_numbers),
        sources=tuple((key, _text(sources, key, f"{where}: [sources]")) for key in sources),
    )


def _expect_keys(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    missing, unknown = sorted(allowed - table.keys()), sorted(table.keys() - allowed)
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown:
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; allowed: {', '.join(sorted(allowed))}"
        )


def _table(table: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    if not isinstance(table[key], dict):
        raise ValueError(f"{where}: {key} must be a table [{key}], got {reprlib.repr(table[key])}")
    return dict(table[key])


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} must be a non-empty string, got {reprlib.repr(value)}")
    return value


def _number(value: object, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(cast(float, value)) <= sys.float_info.max:
        raise ValueError(f"{where} must be a finite number, got {reprlib.repr(value)}")
    return float(cast(float, value))


def _numbers(table: Mapping[str, Any], kind: type, where: str) -> dict[str, float]:
    """The section's numbers by field name, in SI."""
    numbers = {}
    for field in fields(kind):
        key, unit = _toml_key(field.name)
        if key in table:
            numbers[field.name] = _number(table[key], f"{where} {key}") * unit.scale
            unit.check(f"{where} {key}", numbers[field.name])
    return numbers


def _pull(value: object, where: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, list) or not all(isinstance(point, dict) for point in value):
        raise ValueError(
            f"{where} must be a list of {{granule_bytes, gb_per_s}}, empty where ranks cannot "
            f"read each other's memory, got {reprlib.repr(value)}"
        )
    points = []
    for point in value:
        _expect_keys(point, {"granule_bytes", "gb_per_s"}, where)
        granule = point["granule_bytes"]
        if isinstance(granule, bool) or not isinstance(granule, int):
            raise ValueError(
                f"{where}: granule_bytes must be an integer, got {reprlib.repr(granule)}"
            )
        points.append((granule, _number(point["gb_per_s"], f"{where}: gb_per_s") * 1e9))
    return tuple(points)

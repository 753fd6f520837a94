"""Fabric profiles: shipped ones and their sources, files, and values that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from pathlib import Path as FilePath

import pytest
from costs import paper

from qroam.runtime.cost.profile import MAX_FILE_BYTES, PROFILE_NAMES, load_profile, parse_profile


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_shipped_profiles_load_and_name_their_sources(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert len(profile.sources) == 15
    assert all(text.strip() for _, text in profile.sources)


def test_published_constants() -> None:
    assert paper().path.probe_s == pytest.approx(16e-6)
    assert paper().path.push_bytes_per_s == pytest.approx(25e9)
    assert load_profile("nvlink4").path.probe_s == pytest.approx(5.7e-6)


def test_a_profile_loads_from_a_file(tmp_path: FilePath) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text_of("nvlink4"))
    assert load_profile(path) == load_profile(str(path)) == load_profile("nvlink4")


def test_a_label_says_whether_the_constants_were_measured() -> None:
    labels = {name: load_profile(name).label for name in PROFILE_NAMES}
    assert labels == {
        "ibgda-ndr200": "ibgda-ndr200 (5 of 15 constants assumed)",
        "nvlink4": "nvlink4 (7 of 15 constants assumed)",
        "loopback": "loopback (2 of 15 constants assumed)",
    }
    assert load_profile("loopback").assumed == ("splice_us", "splice_gb_per_s")
    text = text_of("loopback").replace('"assumption: as merge', '"as merge')
    assert parse_profile(text.encode(), where="f.toml").label == "loopback (measured)"
    assert replace(paper(), sources=()).label == "ibgda-ndr200 (sources not stated)"


def text_of(name: str) -> str:
    return (files("qroam.runtime.cost") / "profiles" / f"{name}.toml").read_text()


NUMBER = r"\[path\] probe_us must be a finite number"


BAD_PROFILES = [
    ("probe_us = 5.7", "", r"f.toml: \[path\]: missing probe_us"),
    ("probe_us = 5.7", "probe_us = 5.7\nspeed = 3", r"\[path\]: unknown speed; allowed: egress"),
    ("probe_us = 5.7", 'probe_us = "fast"', NUMBER),
    ("probe_us = 5.7", "probe_us = true", NUMBER),
    ("probe_us = 5.7", "probe_us = nan", NUMBER),
    ("probe_us = 5.7", "probe_us = inf", NUMBER),
    ("probe_us = 5.7", "probe_us = -1", r"\[path\] probe_us must be in \[0, 1e\+07\], got -1"),
    ("probe_us = 5.7", "probe_us = 10000001", r"probe_us must be in"),
    ("push_gb_per_s = 315", "push_gb_per_s = 0", r"push_gb_per_s must be in \[1e-06, 1e\+06\]"),
    ("push_gb_per_s = 315", "push_gb_per_s = 1000001", r"push_gb_per_s must be in"),
    ("flop_tera_per_s = 450", "flop_tera_per_s = 2e6", r"\[device\] flop_tera_per_s must be in"),
    ("plan_us = 15", "", r"f.toml: \[device\]: missing plan_us"),
    ("[device]", "[devices]", r"f.toml: missing device"),
    ('name = "nvlink4"', "name = 4", r"f.toml: name must be a non-empty string"),
    ('name = "nvlink4"', 'name = "x"\nextra = 1', r"f.toml: unknown extra; allowed:"),
    ('name = "nvlink4"', 'name = " "', r"f.toml: name must be a non-empty string"),
    ('splice_us = "assumption', 'splice_us = " "  # "', r"\[sources\]: splice_us must be a non"),
    ('splice_us = "assumption', 'splices = "assumption', r"\[sources\]: missing splice_us"),
    ("granule_bytes = 656", "granule_bytes = 1.5", r"granule_bytes must be an integer, got 1.5"),
    ("granule_bytes = 656", "granule_bytes = 0", r"\[path\] granule_bytes must be in"),
    ("granule_bytes = 656", "granule_bytes = 9000", r"\[path\] pull_gb_per_s needs rising"),
    ("gb_per_s = 250 }", "gb_per_s = 1 }", r"\[path\] pull_gb_per_s needs rising"),
    ("gb_per_s = 250 }", "gb_per_s = -250 }", r"gb_per_s of pull_gb_per_s must be in"),
    ("gb_per_s = 250 }", "rate = 250 }", r"pull_gb_per_s: missing gb_per_s"),
    ("[path]", "[path", r"f.toml: not TOML"),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD_PROFILES)
def test_a_bad_profile_is_refused(tmp_path: FilePath, old: str, new: str, message: str) -> None:
    path = tmp_path / "f.toml"
    text = text_of("nvlink4")
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        load_profile(path)
    assert str(caught.value).startswith(str(path))


def test_other_things_that_are_no_profile(tmp_path: FilePath) -> None:
    with pytest.raises(ValueError, match="unknown fabric profile 'nvlink9'; known: ibgda-ndr200"):
        load_profile("nvlink9")
    with pytest.raises(ValueError, match=r"absent.toml: cannot be read"):
        load_profile(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="larger than the allowed 65536 bytes"):
        parse_profile(b"#" * (MAX_FILE_BYTES + 1), where="big.toml")
    with pytest.raises(ValueError, match=r"latin.toml: not TOML"):
        parse_profile(b'name = "\xe9"', where="latin.toml")
    with pytest.raises(ValueError, match="path must be a table"):
        parse_profile(
            b'name="x"\ndescription="x"\npath=1\n[device]\n[sources]\n', where="flat.toml"
        )
    text = text_of("loopback").replace("pull_gb_per_s = []", "pull_gb_per_s = 3")
    with pytest.raises(ValueError, match=r"pull_gb_per_s must be a list"):
        parse_profile(text.encode(), where="f.toml")


def test_impossible_values_are_refused_without_a_file_too() -> None:
    with pytest.raises(ValueError, match="probe_us must be in"):
        replace(paper().path, probe_s=-1.0)
    with pytest.raises(ValueError, match="pack_gb_per_s must be in"):
        replace(paper().device, pack_bytes_per_s=float("nan"))


def test_pull_rate_follows_the_granule() -> None:
    path = load_profile("nvlink4").path
    assert path.pull_rate(656) == pytest.approx(250e9)
    assert path.pull_rate(1152) == pytest.approx(297e9)
    assert path.pull_rate(1 << 30) == pytest.approx(325e9)
    # Below the smallest granule one read takes as long as that granule's.
    assert 132 / path.pull_rate(132) == pytest.approx(656 / 250e9)
    times = [granule / path.pull_rate(granule) for granule in range(64, 20_000, 64)]
    assert times == sorted(times)


def test_absurd_profiles_are_refused(tmp_path: Path) -> None:
    profile = load_profile("nvlink4")
    with pytest.raises(ValueError, match="known: ibgda-ndr200"):
        load_profile("nvlink9")
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="probe_us must be in"):
        replace(profile.path, probe_s=-1.0)
    with pytest.raises(ValueError, match="probe_us must be in"):
        replace(profile.path, probe_s=math.nan)

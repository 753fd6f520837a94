import json
import sys
from importlib.metadata import version

import pytest
import torch

from qroam.runtime.tools import cli
from qroam.runtime.tools.cli import main
from qroam.runtime.tools.doctor import Check, diagnose, render
from qroam.runtime.tools.progress import progress

EXPLAIN = ["explain", "--layout", "mla-v3.2", "--queries", "8", "--units", "2048"]
EXPLAIN += ["--holders", "4", "--fabric", "ibgda-ndr200", "--reuse", "1"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qroam {version('qroam')}\n"


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([], "command"),
        (["dem"], "dem"),
        (["demo", "--agents", "0"], "--agents"),
        (["demo", "--mode", "sometimes"], "always-fetch"),
        (["demo", "--device", "tpu"], "cuda"),
        (["demo", "--device", "cuda", "--sabotage", "wrong-row"], "allowed with device cpu only"),
        (["demo", "--device", "cuda", "--instances", "99"], "a GPU for each of 99 instances"),
        (["demo", "--corpus", "no/such/folder"], "no/such/folder"),
        (["demo", "--tokens", "1000"], "multiple of 16"),
        (["explain", "--layout", "mla-v9"], "mla-v3.2"),
        (["explain", "--fabric", "pigeon"], "pigeon"),
        (["explain", "--forms", "B"], "A,B"),
        (["explain", "--layout", "mla-tiny", "--units", "1"], "at least holders"),
        (["explain", "--unit-tokens", "0"], "--unit-tokens"),
        (["explain", "--lines", "--json"], "exclude each other"),
    ],
)
def test_errors_are_one_line(
    args: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert word in streams.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--layout", "mla-v9", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_demo_without_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    expected = "error: qroam demo needs the extra 'models': pip install 'qroam[models]'\n"
    assert capsys.readouterr().err == expected


def test_explain_prints_what_it_decided(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXPLAIN, "--json"]) == 0
    *decisions, step = json.loads(capsys.readouterr().out)
    assert step["layout"] == "mla-v3.2"
    assert step["fabric"] == "ibgda-ndr200 (5 of 15 constants assumed)"
    assert main(EXPLAIN) == 0
    text = capsys.readouterr().out
    assert f"step of mla-v3.2 on {step['fabric']}, reuse 1, " in text
    assert decisions
    assert all(decision["reason"] in text for decision in decisions)


def test_explain_shared_units_make_fetching_cheaper(capsys: pytest.CaptureFixture[str]) -> None:
    totals = []
    for shared in ([], ["--shared"]):
        assert main([*EXPLAIN, *shared, "--json"]) == 0
        totals.append(json.loads(capsys.readouterr().out)[-1]["total_us"])
    assert totals[1]["always-fetch"] < totals[0]["always-fetch"]
    assert totals[1]["always-route"] == totals[0]["always-route"]


def test_explain_opens_form_b(capsys: pytest.CaptureFixture[str]) -> None:
    ways = []
    for forms in ([], ["--forms", "A"], ["--forms", "A,B"]):
        assert main([*EXPLAIN, *forms, "--json"]) == 0
        ways.append(json.loads(capsys.readouterr().out)[0]["way"])
    assert ways == ["route A", "route A", "route B"]


def test_explain_units_of_many_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for unit_tokens in ("1", "16"):
        assert main([*EXPLAIN, "--unit-tokens", unit_tokens, "--json"]) == 0
        steps.append(json.loads(capsys.readouterr().out)[-1])
    assert [step["unit_tokens"] for step in steps] == [1, 16]
    assert steps[1]["total_us"]["always-fetch"] > 8 * steps[0]["total_us"]["always-fetch"]


def test_explain_a_line_a_decision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EXPLAIN, "--lines"]) == 0
    printed = capsys.readouterr().out.splitlines()
    heads = [line.split(":")[0] for line in printed]
    assert heads == [f"query {q}, holder {h}" for q in range(8) for h in range(1, 5)]


def test_doctor_knows_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert checks["torch"] == {"name": "torch", "ok": True, "detail": version("torch")}
    for name in ("qroam", "msgpack", "safetensors", "typer", "rich"):
        assert checks[name]["detail"] == version(name)
    assert checks["transport torch (gloo)"]["ok"] == torch.distributed.is_gloo_available()
    assert checks["transport loopback"]["ok"]
    if not torch.cuda.is_available():
        assert "no GPU" in checks["transport nvshmem"]["detail"]
    assert all(entry["detail"] for entry in checks.values())


def test_doctor_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qroam.runtime.tools.doctor._version", lambda distribution: None)
    assert not any("None" in check.detail for check in diagnose())


def test_doctor_does_not_initialise_cuda() -> None:
    diagnose()
    assert not torch.cuda.is_initialized()
    assert "nvshmem" not in sys.modules


def test_doctor_aligns_its_lines() -> None:
    checks = [Check(name="a", ok=True, detail="1"), Check(name="long", ok=False, detail="gone")]
    assert render(checks) == "ok  a     1\nno  long  gone"


def test_progress_in_a_log_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        for done in range(4):
            report("prefill", done, 3)
    assert capsys.readouterr().err == "prefill: 0/3\nprefill: 3/3\n"

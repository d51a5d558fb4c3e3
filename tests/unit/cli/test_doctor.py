"""``vmbus doctor``: the report, and what makes it fail."""

import json

import click

from tests.support.cli import run_cli
from vmbus.cli import doctor
from vmbus.cli.checks import Check, Outcome, general_checks
from vmbus.cli.kvm_checks import SynicMode


def make_check(**changes):
    values = {"group": "serving guests", "name": "thing", "outcome": Outcome.OK, "found": "works"}
    return Check(**{**values, **changes})


def test_missing_and_needed_is_what_fails(monkeypatch):
    missing = make_check(outcome=Outcome.MISSING, advice="get one", name="arm")
    monkeypatch.setattr(doctor, "general_checks", lambda directory: [make_check(), missing])
    monkeypatch.setattr(doctor, "check_kvm", lambda: ([], SynicMode.NONE, {}))
    result = run_cli("doctor")
    assert result.exit_code == 0
    assert "absent  arm" in result.output
    assert "Guests can be served here." in result.output
    needed = make_check(outcome=Outcome.MISSING, advice="get one", name="leg", needed=True)
    monkeypatch.setattr(doctor, "general_checks", lambda directory: [missing, needed])
    result = run_cli("doctor")
    assert result.exit_code == 1
    assert "missing leg" in result.output
    assert "get one" in result.output
    assert "Guests cannot be served here; missing: leg" in result.output
    assert run_cli("doctor", "--json").exit_code == 1


def test_the_report_has_colour_on_a_terminal_only(monkeypatch):
    found = [
        make_check(),
        make_check(outcome=Outcome.LIMITED, advice="hm"),
        make_check(outcome=Outcome.MISSING, advice="hm", group="tools"),
        make_check(outcome=Outcome.MISSING, advice="hm", needed=True, group="tools"),
    ]
    plain = doctor.report(found)
    assert plain[0] == "Serving guests"
    assert "Tools" in plain
    assert not any("\x1b" in line for line in plain)
    monkeypatch.setattr("vmbus.cli.output.styled", lambda: True)
    monkeypatch.setattr(doctor, "styled", lambda: True)
    coloured = doctor.report(found)
    assert [click.unstyle(line) for line in coloured] == plain
    assert "\x1b[32mok" in coloured[1]
    assert "\x1b[31mmissing" in "".join(coloured)


def test_json_has_a_fixed_form():
    result = run_cli("doctor", "--json")
    report = json.loads(result.output)
    assert report.keys() == {
        "ok", "version", "kernel", "synic_mode", "kvm_capabilities", "checks"
    }  # fmt: skip
    assert result.exit_code == (0 if report["ok"] else 1)
    assert report["synic_mode"] in {"kernel", "user", "none"}
    for check in report["checks"]:
        assert check.keys() == {"group", "name", "outcome", "needed", "found", "advice"}
        assert check["outcome"] in {"ok", "limited", "missing"}
        assert bool(check["advice"]) is (check["outcome"] != "ok")
    assert len({(check["group"], check["name"]) for check in report["checks"]}) == len(
        report["checks"]
    )


def test_the_directory_of_the_images_can_be_named(tmp_path):
    names = [check.name for check in general_checks(str(tmp_path))]
    assert f"reads that do not wait, in {tmp_path}" in names
    assert run_cli("doctor", str(tmp_path / "missing")).exit_code == 2

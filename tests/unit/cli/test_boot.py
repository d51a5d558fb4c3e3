"""``vmbus boot``: a guest that says nothing."""

from __future__ import annotations

import threading

import pytest

from tests.support.patience import PATIENCE
from vmbus.cli import boot, kvm_checks
from vmbus.cli.checks import Check, Outcome

GOOD = Check(group="", name="a guest", outcome=Outcome.OK, found="works")
BAD = Check(group="", name="a guest", outcome=Outcome.LIMITED, found="stops", advice="go away")


@pytest.fixture
def told(monkeypatch):
    """What is said, and an event that it has been."""
    lines: list[str] = []
    said = threading.Event()

    def say(text):
        lines.append(text)
        said.set()

    monkeypatch.setattr(boot, "SILENCE", 0.01)
    monkeypatch.setattr(boot, "_say", say)
    return lines, said


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (GOOD, "a guest works. Its console may be another: Linux needs console=ttyS0 (--append)"),
        (BAD, "a guest stops. Go away (see vmbus doctor)"),
    ],
)
def test_a_silent_guest_is_noticed_once_and_a_reason_looked_for(monkeypatch, told, check, reason):
    lines, said = told
    monkeypatch.setattr(kvm_checks, "check_guest", lambda: check)
    with boot._lookout(lambda: False):
        assert said.wait(PATIENCE)
    assert lines == [f"the guest has written nothing for 0.01 s; {reason}"]


def test_a_guest_that_has_spoken_is_left_alone(told):
    lines, _ = told
    looked = threading.Event()

    def has_spoken():
        looked.set()
        return True

    with boot._lookout(has_spoken):
        assert looked.wait(PATIENCE)
    assert lines == []


def test_a_guest_that_ends_soon_is_not_looked_at(monkeypatch, told):
    monkeypatch.setattr(boot, "SILENCE", PATIENCE)
    with boot._lookout(lambda: pytest.fail("nobody should look")):
        pass
    assert told[0] == []


def test_messages_are_lines_also_on_a_raw_terminal(monkeypatch, capsys):
    boot._say("hello")
    assert capsys.readouterr().err == "vmbus: hello\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    boot._say("hello")
    assert capsys.readouterr().err == "vmbus: hello\r\n"

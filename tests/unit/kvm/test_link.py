"""The link to the server, between the lives of a machine and during them."""

from __future__ import annotations

import errno

import pytest

from vmbus.kvm.link import ServerLink


class FakeSynic:
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args))


@pytest.fixture
def link():
    made = ServerLink(lambda reason: None)
    made._attachment = object()  # type: ignore[assignment]
    yield made
    made._attachment = None


def test_between_lives_messages_are_dropped_and_flags_forgotten(link):
    codes: list[int] = []
    link.deliver_message(0, 2, 1, b"x", codes.append)
    link.set_flag(0, 2, 5)

    assert codes == [errno.ENXIO]


def test_a_new_life_gets_the_doorbells_that_are_still_there(link):
    first, second = FakeSynic(), FakeSynic()
    link.begin(first)
    link.event_port_added(0x11, 0, 5)
    link.event_port_added(0x12, 0, 6)
    link.event_port_removed(0x11, 0)
    link.finish()
    link.begin(second)

    assert [call[0] for call in first.calls] == [
        "attach", "event_port_added", "event_port_added", "event_port_removed",
    ]  # fmt: skip
    assert second.calls == [("attach", link.attachment), ("event_port_added", 0x12, 0, 6)]


def test_during_a_life_its_synic_gets_everything(link):
    synic = FakeSynic()
    link.begin(synic)
    link.deliver_message(0, 2, 1, b"x", None)
    link.set_flag(0, 2, 5)

    assert synic.calls[1:] == [("deliver", 0, 2, 1, b"x", None), ("set_flag", 0, 2, 5)]
    assert link.call_fd(1, 0, 2, 5, None) is False


def test_the_end_of_the_connection_is_told_unless_it_was_meant():
    reasons: list[str] = []
    link = ServerLink(reasons.append)
    link.closed("gone")
    link.close()
    link.closed("goodbye")

    assert reasons == ["gone"]

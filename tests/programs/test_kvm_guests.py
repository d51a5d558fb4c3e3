"""Tiny guests on the real KVM, in each mode that this machine has."""

from __future__ import annotations

import os

import pytest
import trio

from tests.support.kvm import (
    Run,
    kernel_mode_possible,
    needs_kvm,
)
from vmbus.attach.protocol.limits import ALL_FEATURES, Feature
from vmbus.attach.server.transport import SocketTransport
from vmbus.engine import EngineConfig
from vmbus.host import BusConfig
from vmbus.kvm.life import MAX_PANICS, SynicMode
from vmbus.kvm.machine import Machine
from vmbus.kvm.outcome import End, Outcome
from vmbus.partition.events import PostedMessage
from vmbus.server import DeviceSetup, GuestServer

pytestmark = needs_kvm

MODES = [
    SynicMode.USER,
    pytest.param(
        SynicMode.KERNEL,
        marks=pytest.mark.skipif(
            not kernel_mode_possible(), reason="this machine's KVM has no SynIC for guests"
        ),
    ),
]


@pytest.fixture(params=MODES, ids=lambda mode: mode.value)
def mode(request):
    return request.param


def test_a_guest_makes_contact_and_takes_message_after_message(mode):
    server = GuestServer([DeviceSetup("storvsp", ("ram:1M",))], BusConfig(engine=EngineConfig()))

    run = Run("contact", server.handle, mode=mode)

    assert run.end == End(Outcome.POWER_OFF, "debug exit with 0x0")
    # VERSION_RESPONSE, supported; then OFFER_CHANNEL and ALL_OFFERS_DELIVERED.
    assert run.output[:5] == bytes([15, 0, 0, 0, 0])
    assert run.output[8] == 1
    assert run.output[16:] == bytes([1, 4])
    # The guest looks before it waits, so it need not have taken an interrupt for each.
    assert run.results[0] >= 1


@pytest.mark.parametrize(
    ("features", "tier"),
    [(Feature(0), 0), (Feature.CALL_FD, 1), (ALL_FEATURES, 2)],
    ids=["messages", "eventfds", "direct"],
)
def test_event_flags_and_doorbells_travel_on_every_tier(mode, features, tier):
    posts = []
    tiers = []

    async def ring(transport: SocketTransport) -> None:
        await transport.add_message_port(1)
        doorbells = [
            await transport.add_event_port(0x11, 0),
            await transport.add_event_port(0x12, 3),
        ]
        async for event in transport.incoming():
            assert isinstance(event, PostedMessage)
            posts.append(event.payload)
            call = transport.open_call(0, 2, 5)
            tiers.append(call.tier)
            call.signal()
            for doorbell in doorbells:
                await trio.lowlevel.wait_readable(doorbell.fd)
                assert os.eventfd_read(doorbell.fd) == 1
            call.close()
            assert await transport.deliver(0, 2, 1, b"bye")
            for connection, flag in ((0x11, 0), (0x12, 3)):
                await transport.remove_event_port(connection, flag)

    run = Run("flags", ring, mode=mode, features=features)

    assert run.end.outcome is Outcome.POWER_OFF, run.end
    assert posts == [b"hello"]
    assert tiers == [tier]
    # KVM words the missing connection differently from TLFS: invalid port id.
    assert run.output in {b"\0\0\0\x12", b"\0\0\0\x11"}


def test_a_crash_report_ends_the_guest_with_its_last_words(mode):
    run = Run("crash", mode=mode)

    assert run.end == End(Outcome.PANIC, "the flux capacitor is empty")
    assert run.end.outcome.value == 3


def test_a_guest_may_go_on_after_its_crash_report(mode):
    words: list[str] = []

    run = Run("crash", mode=mode, panicked=words.append)

    assert words == ["the flux capacitor is empty"]
    assert run.end == End(Outcome.FAILURE, "debug exit with 0x9")


def test_a_guest_that_reports_crash_after_crash_is_not_heard_for_ever(mode):
    words: list[str] = []

    run = Run("crashes", mode=mode, panicked=words.append)

    assert words == ["again"] * MAX_PANICS
    assert run.end == End(Outcome.FAILURE, "debug exit with 0x9")


def test_a_triple_fault_ends_the_guest(mode):
    run = Run("triple", mode=mode)

    assert run.end.outcome is Outcome.TRIPLE_FAULT
    assert run.end.outcome.value == 4


def test_a_reset_begins_a_new_life_with_the_old_memory(mode):
    run = Run("reset", mode=mode)

    assert run.end.outcome is Outcome.POWER_OFF
    assert run.resets == 2


def test_msrs_that_do_not_exist_raise_protection_faults():
    run = Run("faults", mode=SynicMode.USER)

    assert run.end.outcome is Outcome.POWER_OFF, run.end
    assert run.output == bytes([3, 0, 5, ord("M")])


def test_nobody_answers_with_ones_and_a_debug_exit_tells_its_number(mode):
    run = Run("devices", mode=mode)

    assert run.output == b"strings work"
    assert run.end == End(Outcome.FAILURE, "debug exit with 0x7")


def test_a_second_processor_starts(mode):
    run = Run("wakeup", mode=mode, vp_count=2)

    assert run.end.outcome is Outcome.POWER_OFF, run.end


def test_a_server_that_vanishes_ends_the_guest(mode):
    async def vanish(transport: SocketTransport) -> None:
        await transport.add_message_port(1)
        async for event in transport.incoming():
            assert isinstance(event, PostedMessage)
            return

    run = Run("flags", vanish, mode=mode)

    assert run.end.outcome is Outcome.FAILURE
    assert "the server is gone" in run.end.text


def test_a_guest_can_be_ended_from_outside(mode):
    machines: list[Machine] = []

    async def interrupt(transport: SocketTransport) -> None:
        await transport.add_message_port(1)
        async for event in transport.incoming():
            assert isinstance(event, PostedMessage)
            machines[0].end(End(Outcome.INTERRUPTED))

    run = Run("flags", interrupt, mode=mode, before=machines.append)

    assert run.end == End(Outcome.INTERRUPTED)

"""Lengths of control messages: what drivers post, and what they take."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import trio

from tests.support.fake_host import Machine, message, offer
from vmbus.guest import HAIKU, UEFI, GuestPanic, boot
from vmbus.wire.messages import Message, build_message
from vmbus.wire.versions import Feature, Version


async def test_uefi_asks_for_a_client_id_alone_and_opens_with_156_bytes_all_the_same():
    for versions in ({Version.V6_0}, {Version.V3_0}):
        machine = Machine()
        host = machine.host
        host.supported = versions
        host.features = Feature.CLIENT_ID | Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
        host.offers = [offer(1)]
        async with boot(machine, UEFI) as guest:
            (found,) = await guest.connection.connect()
            newest = Version.V6_0 in versions
            assert guest.connection.features == (Feature.CLIENT_ID if newest else Feature(0))
            await guest.connection.open_channel(found, ring_pages=3)
        opened = next(item for item in host.log if item.NAME == "OPENCHANNEL")
        assert (opened.connection_id, opened.event_flag, opened.open_id) == (None, None, 0)
        assert host.log[0].client_id is not None
        sizes = {raw[0]: len(raw) for _, raw in host.raw}
        assert sizes == {14: 56 if newest else 40, 3: 8, 8: 240, 5: 156}
        assert next(raw for _, raw in host.raw if raw[0] == 5)[148:] == bytes(8)


async def test_a_guest_that_names_its_own_signal_says_so_when_it_opens_a_channel():
    machine = Machine()
    host = machine.host
    host.features = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.PAUSE_RESUME
    host.offers = [offer(1)]
    asking = dataclasses.replace(UEFI, features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    async with boot(machine, asking) as guest:
        (found,) = await guest.connection.connect()
        assert guest.connection.features == Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
        await guest.connection.open_channel(found, ring_pages=3)
    opened = next(item for item in host.log if item.NAME == "OPENCHANNEL")
    assert (opened.connection_id, opened.event_flag, opened.open_id) == (0x10001, 1, 0)


async def test_uefi_takes_a_version_response_and_a_rescind_of_any_length():
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    host.handlers["INITIATE_CONTACT"] = lambda item: host.send(message(15, 1, 1, 0, 0, 0))
    async with boot(machine, UEFI) as guest:
        await guest.connection.connect()
        host.send(message(2, 1, 0))
        await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("REQUESTOFFERS", message(4, 0)),
        ("GPADL_HEADER", message(10, 1, 1, 0, 0)),
        ("OPENCHANNEL", message(6, 1, 0, 0, 0)),
        ("GPADL_TEARDOWN", message(12, 1, 0)),
        ("UNLOAD", message(17, 0)),
    ],
)
async def test_uefi_fails_fast_at_a_longer_answer_and_nobody_else_does(name, answer):
    """Checklist row 5."""

    async def run(personality) -> None:
        machine = Machine()
        host = machine.host
        host.offers = [offer(1, monitor_allocated=True)]
        ordinary = getattr(host, f"on_{name.lower()}")
        send = host.send

        def longer(raw, *args) -> None:
            send(answer if not isinstance(raw, Message) else raw, *args)

        def handle(item) -> None:
            host.send = longer  # type: ignore[method-assign, assignment]
            ordinary(item)
            host.send = send  # type: ignore[method-assign]

        host.handlers[name] = handle
        async with boot(machine, personality) as guest:
            (found,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(found, ring_pages=2, target_vp=0)
            await guest.connection.close_channel(channel)
            await guest.connection.unload()

    with pytest.raises(GuestPanic, match="bytes instead of"):
        await run(UEFI)
    await run(dataclasses.replace(UEFI, exact_sizes=False))


async def test_haiku_posts_to_connection_1_whatever_the_host_says():
    machine = Machine()
    host = machine.host
    host.handlers["INITIATE_CONTACT"] = lambda item: host.send(message(15, 1, 4))
    async with boot(machine, HAIKU) as guest:
        await guest.connection.connect()
    assert {connection for connection, _ in host.raw} == {1}


async def test_uefi_fails_fast_at_a_longer_offer():
    for late in (False, True):
        machine = Machine()
        host = machine.host
        longer = build_message(offer(2), version=Version.V6_0, features=Feature(0)) + bytes(4)
        if not late:
            host.handlers["REQUESTOFFERS"] = functools.partial(
                lambda host, raw, _: host.send(raw), host, longer
            )
        with pytest.raises(GuestPanic, match="OFFERCHANNEL: 200 bytes instead of 196"):
            async with boot(machine, UEFI) as guest:
                await guest.connection.connect()
                host.send(longer)
                await trio.sleep_forever()

"""The Python guest's control plane against a scripted host."""

from __future__ import annotations

import functools

import pytest
import trio

from tests.support.fake_host import Machine, message, offer, poll_monitor
from vmbus.errors import LocalProtocolError
from vmbus.guest import (
    FREEBSD,
    HAIKU,
    LINUX_6_1,
    LINUX_NEW,
    MACOS,
    OPENBSD,
    PERSONALITIES,
    UEFI,
    GuestPanic,
    HostRefusedError,
    boot,
)
from vmbus.wire.synic import HvStatus
from vmbus.wire.versions import Version

ALL = pytest.mark.parametrize("personality", PERSONALITIES.values(), ids=str)


@ALL
async def test_every_personality_connects_opens_talks_closes_and_leaves(personality):
    machine = Machine(vps=2)
    host = machine.host
    host.offers = [offer(1, monitor_allocated=True, monitor_id=5)]
    async with boot(machine, personality) as guest:
        connection = guest.connection
        (found,) = await connection.connect()
        assert connection.version == personality.versions[0]
        channel = await connection.open_channel(found, ring_pages=40, contiguous=False)
        async with trio.open_nursery() as nursery:
            if personality.uses_monitor:
                nursery.start_soon(poll_monitor, machine)
            for number in range(3):
                reply = await channel.request(b"%07d" % number)
                assert reply.payload == b"%07d\0" % number
            nursery.cancel_scope.cancel()
        await connection.close_channel(channel)
        await connection.close_channel(channel)
        await connection.unload()
        await connection.unload()
        if not personality.frees_before_teardown:
            guest.check_memory()
    names = host.names()
    assert names.count("OPENCHANNEL") == names.count("CLOSECHANNEL") == 1
    assert names.count("GPADL_TEARDOWN") == 1
    assert not host.gpadls


async def test_linux_walks_down_its_ladder_and_uses_connection_4_above_5():
    machine = Machine()
    machine.host.supported = {Version.V3_0}
    async with boot(machine, LINUX_6_1) as guest:
        assert await guest.connection.contact() == Version.V3_0
        assert repr(guest) == "<Guest Linux 6.1, VMBus 3.0>"
    ports = [port for port, _ in machine.host.raw]
    assert ports == [4, 4, 4, 4, 1, 1, 1]


async def test_linux_takes_the_next_version_if_connection_4_does_not_exist():
    machine = Machine()
    machine.post_status.extend([HvStatus.INVALID_CONNECTION_ID] * 4)
    async with boot(machine, LINUX_6_1) as guest:
        assert await guest.connection.contact() == Version.V4_1


async def test_a_hypercall_error_to_a_contact_is_held_against_the_host():
    """Checklist row 1."""
    machine = Machine()
    machine.post_status.append(HvStatus.INVALID_CONNECTION_ID)
    with pytest.raises(GuestPanic, match="INITIATE_CONTACT"):
        async with boot(machine, FREEBSD) as guest:
            await guest.connection.contact()


async def test_a_host_out_of_buffers_is_asked_again():
    machine = Machine()
    machine.post_status.extend([HvStatus.INSUFFICIENT_BUFFERS, HvStatus.INSUFFICIENT_MEMORY, 0])
    async with boot(machine, FREEBSD) as guest:
        await guest.connection.connect()


async def test_a_message_refused_for_good_crashes_the_guest():
    machine = Machine()
    with pytest.raises(GuestPanic, match="HvPostMessage of message 3"):
        async with boot(machine, FREEBSD) as guest:
            await guest.connection.contact()
            machine.post_status.extend([HvStatus.INSUFFICIENT_BUFFERS] * 100)
            await guest.connection.request_offers()


async def test_a_host_without_a_common_version_is_reported():
    machine = Machine()
    machine.host.supported = set()
    async with boot(machine, OPENBSD) as guest:
        with pytest.raises(HostRefusedError, match="INITIATE_CONTACT"):
            await guest.connection.contact()
    assert len(machine.host.log) == 5


async def test_uefi_falls_to_3_0():
    machine = Machine()
    machine.host.supported = {Version.V4_0, Version.V3_0}
    async with boot(machine, UEFI) as guest:
        assert await guest.connection.contact() == Version.V3_0


@pytest.mark.parametrize(
    ("personality", "answer", "reason"),
    [
        (UEFI, message(15, 1 | 5 << 8, 1, 0), "connection_state 5"),
        (UEFI, message(15, 1, 1), "no feature flags"),
        (LINUX_NEW, message(15, 1, 1), "no feature flags"),
        (LINUX_6_1, message(15, 1, 0), "connection id 0"),
        (LINUX_6_1, message(15, 1), "needs 16"),
        (LINUX_6_1, b"", "0 bytes"),
    ],
)
async def test_a_wrong_version_response_crashes_the_guest(personality, answer, reason):
    """Checklist row 5."""
    machine = Machine()
    machine.host.handlers["INITIATE_CONTACT"] = lambda item: machine.host.send(answer)
    if not answer:
        # Too short even to be told from a message of an earlier connection.
        machine.host.handlers["REQUESTOFFERS"] = lambda item: machine.host.send(answer)
        del machine.host.handlers["INITIATE_CONTACT"]
    with pytest.raises(GuestPanic, match=reason):
        async with boot(machine, personality) as guest:
            await guest.connection.connect()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (message(17), "nobody"),
        (message(4), "nobody"),
        (message(10, 1, 1, 0), "nobody"),
        (message(6, 1, 1, 0), "nobody"),
        (message(12, 1), "nobody"),
        (message(24, 1, 0), "nobody"),
        (message(15, 1, 1), "nobody"),
        (message(2, 9), "no relid 9"),
        (message(5, 1), "guest to host|host to guest"),
        (message(77), "no control message 77"),
    ],
)
async def test_a_message_that_nobody_asked_for_crashes_the_guest(raw, reason):
    """Checklist row 4."""
    machine = Machine()
    with pytest.raises(GuestPanic, match=reason) as caught:
        async with boot(machine, LINUX_6_1) as guest:
            await guest.connection.connect()
            machine.host.send(raw)
            await trio.sleep_forever()
    assert caught.value.guest == "Linux 6.1"


async def test_offers_are_checked_as_drivers_do():
    """Checklist row 6."""
    for wrong, reason in (
        ({"relid": 0}, "relid 0"),
        ({"relid": 2048}, "relid 2048"),
        ({"relid": 1}, "relid 1 is in use"),
        ({"relid": 2, "instance_id": offer(1).instance_id}, "is there already"),
        ({"relid": 2, "monitor_allocated": True, "monitor_id": 128}, "monitor id 128"),
    ):
        machine = Machine()
        machine.host.offers = [offer(1), offer(**wrong)]
        with pytest.raises(GuestPanic, match=reason):
            async with boot(machine, LINUX_6_1) as guest:
                await guest.connection.connect()


@pytest.mark.parametrize(
    ("personality", "fields", "reason"),
    [
        (MACOS, {"relid": 256}, "up to 255"),
        (HAIKU, {"relid": 32}, "up to 31"),
        (OPENBSD, {"relid": 1}, "monitor"),
        (LINUX_NEW, {"relid": 1, "flags": 0x5}, "confidential"),
    ],
)
async def test_some_offers_are_not_served(personality, fields, reason):
    """Checklist row 28."""
    machine = Machine()
    machine.host.offers = [offer(**fields)]
    async with boot(machine, personality) as guest:
        assert await guest.connection.connect() == []
        (ignored,) = guest.connection.ignored.values()
        assert reason in ignored[1]


async def test_new_offers_are_announced():
    machine = Machine()
    async with boot(machine, LINUX_6_1) as guest:
        await guest.connection.connect()
        seen: list[object] = []
        guest.connection.on_offer = seen.append
        async with trio.open_nursery() as nursery:
            found = []

            async def wait() -> None:
                found.extend(await guest.connection.wait_offers(lambda o: o.relid == 3))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            machine.host.send(offer(2))
            machine.host.send(offer(3))
        assert seen == [offer(2), offer(3)]
        assert found == [offer(3)]


async def test_waiting_for_an_offer_ends_with_the_connection():
    machine = Machine()
    async with boot(machine, LINUX_6_1) as guest:
        await guest.connection.connect()
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await guest.connection.wait_offers(lambda o: True)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await guest.connection.unload()


async def test_waiting_for_an_offer_ends_when_the_channel_goes_that_it_would_belong_to():
    machine = Machine()
    machine.host.offers = [offer(1), offer(2)]
    async with boot(machine, LINUX_6_1) as guest:
        primary, _ = await guest.connection.connect()
        async with trio.open_nursery() as nursery:
            ended = []

            async def wait() -> None:
                with pytest.raises(trio.BrokenResourceError, match="rescinded"):
                    await guest.connection.wait_offers(lambda o: o.relid == 3, primary=primary)
                ended.append(True)

            nursery.start_soon(wait)
            machine.host.rescind(2)
            await trio.testing.wait_all_tasks_blocked()
            assert not ended
            machine.host.rescind(1)
            await guest.connection.wait_gone(1)
            # Another device may have come with the same relid: it is not the same channel.
            machine.host.send(offer(1))
        assert ended


async def test_a_refused_gpadl_or_channel_is_reported_and_taken_back():
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest:
        connection = guest.connection
        (found,) = await connection.connect()
        before = guest.ram.free_pages
        host.handlers["GPADL_HEADER"] = lambda item: host.send(
            message(10, item.relid, item.gpadl, 0xC000009A)
        )
        with pytest.raises(HostRefusedError, match="GPADL_HEADER of 4 pages"):
            await connection.open_channel(found, ring_pages=2)
        del host.handlers["GPADL_HEADER"]
        host.handlers["OPENCHANNEL"] = lambda item: host.send(message(6, 1, item.open_id, 5))
        with pytest.raises(HostRefusedError, match=r"OPENCHANNEL 1: .* 0x5"):
            await connection.open_channel(found, ring_pages=2)
        del host.handlers["OPENCHANNEL"]
        channel = await connection.open_channel(found, ring_pages=2)
        with pytest.raises(LocalProtocolError, match="open"):
            await connection.open_channel(found, ring_pages=2)
        await connection.close_channel(channel)
        assert guest.ram.free_pages == before
        assert not host.gpadls


@pytest.mark.parametrize("personality", [LINUX_6_1, FREEBSD], ids=str)
async def test_a_reply_about_something_else_crashes_the_guest(personality):
    """Checklist row 4."""
    for name, answer in (
        ("GPADL_HEADER", message(10, 1, 0x99, 0)),
        ("OPENCHANNEL", message(6, 1, 0x99, 0)),
        ("GPADL_TEARDOWN", message(12, 0x99)),
    ):
        machine = Machine()
        host = machine.host
        host.offers = [offer(1)]
        host.handlers[name] = functools.partial(
            lambda host, answer, _: host.send(answer), host, answer
        )
        with pytest.raises(GuestPanic, match=r"nobody|was due"):
            async with boot(machine, personality) as guest:
                (found,) = await guest.connection.connect()
                channel = await guest.connection.open_channel(found, ring_pages=2)
                await guest.connection.close_channel(channel)


async def test_a_second_contact_without_unload_forgets_the_old_channels():
    """Checklist row 7."""
    machine = Machine()
    machine.host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest:
        (found,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(found, ring_pages=2)
        machine.host.handlers["REQUESTOFFERS"] = lambda item: None
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await guest.connection.request_offers()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            machine.host.send(offer(2))  # on its way when the kernel crashes
            await guest.connection.contact()
        del machine.host.handlers["REQUESTOFFERS"]
        assert guest.connection.stale_messages == 1
        with pytest.raises(trio.BrokenResourceError):
            await channel.request(b"")
        assert await guest.connection.request_offers() == [offer(1)]


async def test_whatever_comes_after_the_unload_response_is_unsolicited():
    machine = Machine()
    with pytest.raises(GuestPanic, match="unconnected"):
        async with boot(machine, LINUX_6_1) as guest:
            await guest.connection.connect()
            await guest.connection.unload()
            machine.host.send(offer(7))
            await trio.sleep_forever()


async def test_freebsd_does_not_wait_for_the_unload_response():
    machine = Machine()
    async with boot(machine, FREEBSD) as guest:
        await guest.connection.connect()
        await guest.connection.unload()
        await trio.testing.wait_all_tasks_blocked()
        assert guest.connection.stale_messages == 1
        await guest.connection.connect()


async def test_a_cancelled_request_still_takes_its_reply():
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    host.handlers["GPADL_HEADER"] = lambda item: None
    async with boot(machine, LINUX_6_1) as guest:
        await guest.connection.connect()
        pages = guest.ram.allocate(1)
        with trio.move_on_after(0):
            await guest.connection.create_gpadl(1, pages)
        host.send(message(10, 1, 0xE1E10, 0))
        del host.handlers["GPADL_HEADER"]
        gpadl = await guest.connection.create_gpadl(1, pages)
        assert gpadl.handle == 0xE1E11


async def test_the_same_request_twice_is_the_callers_mistake():
    machine = Machine()
    machine.host.handlers["REQUESTOFFERS"] = lambda item: None
    async with boot(machine, LINUX_6_1) as guest:
        await guest.connection.contact()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.connection.request_offers)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LocalProtocolError):
                await guest.connection.request_offers()
            nursery.cancel_scope.cancel()


async def test_versions_before_2_4_use_the_interrupt_page():
    for version in (Version.V1_1, Version.V0_13):
        machine = Machine()
        machine.host.supported = {version}
        machine.host.offers = [offer(33, is_dedicated_interrupt=False)]
        async with boot(machine, FREEBSD) as guest:
            (found,) = await guest.connection.connect()
            channel = await guest.connection.open_channel(found, ring_pages=2)
            assert (await channel.request(b"old.....")).payload == b"old....."
            page = machine.view(machine.host.interrupt_page, 4096)
            assert page[2048 + 33 // 8] == 1 << 33 % 8
            await guest.connection.unload()
        expected = 2 if version == Version.V0_13 else 0x10000 + 33
        assert machine.host.signals == [expected]


async def test_raw_and_ready_made_messages_can_be_posted():
    machine = Machine()
    async with boot(machine, LINUX_6_1) as guest:
        await guest.connection.contact()
        await guest.connection.post_raw(message(13, 1))
        await guest.connection.post(machine.host.log[-1])
    assert machine.host.names()[-2:] == ["RELID_RELEASED", "RELID_RELEASED"]

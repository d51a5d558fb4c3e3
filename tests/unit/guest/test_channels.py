"""Channels of the Python guest: where they are served, and how they are taken away."""

from __future__ import annotations

import pytest
import trio

from tests.support.fake_host import Machine, message, offer
from vmbus.errors import LocalProtocolError
from vmbus.guest import LINUX_6_1, NETBSD, OPENBSD, UEFI, GuestPanic, HostRefusedError, boot
from vmbus.wire.versions import Version


async def test_channels_are_spread_over_vps_and_can_be_moved():
    machine = Machine(vps=3)
    machine.host.offers = [offer(relid) for relid in (1, 2, 3, 4)]
    async with boot(machine, LINUX_6_1) as guest:
        offers = await guest.connection.connect()
        channels = [await guest.connection.open_channel(o, ring_pages=2) for o in offers]
        assert [c.target_vp for c in channels] == [0, 1, 2, 0]
        await guest.connection.modify_channel(channels[0], 2)
        assert channels[0].target_vp == 2
        assert (await channels[0].request(b"moved...")).payload == b"moved..."
        machine.host.handlers["MODIFYCHANNEL"] = lambda item: machine.host.send(message(24, 1, 7))
        with pytest.raises(HostRefusedError, match="MODIFYCHANNEL"):
            await guest.connection.modify_channel(channels[0], 1)


async def test_modify_channel_has_no_answer_before_5_3_and_does_not_exist_before_4_1():
    machine = Machine(vps=2)
    machine.host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest:
        for version in (Version.V4_1, Version.V4_0):
            await guest.connection.contact([version])
            (found,) = await guest.connection.request_offers()
            channel = await guest.connection.open_channel(found, ring_pages=2, target_vp=0)
            if version == Version.V4_1:
                await guest.connection.modify_channel(channel, 1)
                assert machine.host.channels[1].vp == 1
            else:
                with pytest.raises(LocalProtocolError):
                    await guest.connection.modify_channel(channel, 1)


async def test_a_rescinded_channel_is_closed_and_its_relid_released():
    """Checklist row 34."""
    machine = Machine()
    host = machine.host
    host.offers = [offer(1), offer(2)]
    async with boot(machine, LINUX_6_1) as guest:
        connection = guest.connection
        first, _second = await connection.connect()
        channel = await connection.open_channel(first, ring_pages=2)
        removed = []
        channel.on_removed = lambda: removed.append(True)
        host.on_packet = lambda channel, packet: None
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                with pytest.raises(trio.BrokenResourceError, match="rescinded"):
                    await channel.request(b"?")

            nursery.start_soon(talk)
            await trio.testing.wait_all_tasks_blocked()
            host.send(message(2, 1))
        host.send(message(2, 2))
        await connection.wait_gone(1)
        await connection.wait_gone(2)
        assert removed == [True]
        names = host.names()
        assert names[-4:-1] == ["CLOSECHANNEL", "GPADL_TEARDOWN", "RELID_RELEASED"] or (
            names.count("RELID_RELEASED") == 2
        )
        host.offers = [offer(1)]
        host.send(offer(1))
        (again,) = await connection.wait_offers(lambda o: o.relid == 1)
        await connection.open_channel(again, ring_pages=2)
        guest.check_memory()


async def test_a_second_rescind_crashes_the_guest():
    """Checklist row 34."""
    machine = Machine()
    machine.host.offers = [offer(1, monitor_allocated=True)]
    with pytest.raises(GuestPanic, match="second time"):
        async with boot(machine, OPENBSD) as guest:
            await guest.connection.connect()
            machine.host.send(message(2, 1))
            machine.host.send(message(2, 1))
            await trio.sleep_forever()


@pytest.mark.parametrize("personality", [LINUX_6_1, NETBSD, UEFI], ids=str)
async def test_a_channel_rescinded_while_it_opens_fails_to_open(personality):
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    for name in ("OPENCHANNEL", "GPADL_HEADER"):
        async with boot(machine, personality) as guest:
            (found,) = await guest.connection.connect()

            def rescind(item, name=name) -> None:
                host.send(message(2, 1))
                if name == "GPADL_HEADER":
                    del host.handlers[name]
                    host.on_gpadl_header(item)

            host.handlers[name] = rescind
            with pytest.raises(trio.BrokenResourceError):
                await guest.connection.open_channel(found, ring_pages=2)
            await trio.testing.wait_all_tasks_blocked()
            released = "RELID_RELEASED" in host.names()
            assert released == (personality is not UEFI)
            host.handlers.clear()
            host.offers = [offer(1)]


async def test_a_connection_that_ends_stops_the_removal_of_a_channel():
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest:
        (found,) = await guest.connection.connect()
        host.handlers["GPADL_HEADER"] = lambda item: host.send(message(2, 1))
        async with trio.open_nursery() as nursery:

            async def opening() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await guest.connection.open_channel(found, ring_pages=2)

            nursery.start_soon(opening)
            await trio.testing.wait_all_tasks_blocked()
            await guest.connection.contact()
        assert "RELID_RELEASED" not in host.names()


@pytest.mark.parametrize("name", ["CLOSECHANNEL", "GPADL_TEARDOWN"])
async def test_a_removal_under_way_posts_nothing_behind_unload(name, autojump_clock):
    machine = Machine()
    host = machine.host
    host.offers = [offer(1)]
    async with boot(machine, LINUX_6_1) as guest, trio.open_nursery() as nursery:
        connection = guest.connection
        (found,) = await connection.connect()
        await connection.open_channel(found, ring_pages=2)
        host.handlers["UNLOAD"] = lambda item: None  # the answer takes its time
        hypercall = machine.hypercall

        async def slow(*args: int) -> int:
            status = await hypercall(*args)
            await trio.sleep(0.01)
            return status

        machine.hypercall = slow  # type: ignore[method-assign, assignment]  # slower than UNLOAD
        host.handlers[name] = lambda item: nursery.start_soon(connection.unload)
        host.send(message(2, 1))
        await connection.wait_gone(1)
        await trio.testing.wait_all_tasks_blocked()
        assert host.names()[-1] == "UNLOAD"
        host.on_unload(None)

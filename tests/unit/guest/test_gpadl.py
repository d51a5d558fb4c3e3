"""How the Python guest describes its pages to a host."""

from __future__ import annotations

import pytest

from tests.support.fake_host import Machine, offer
from vmbus.guest import MACOS, NETBSD, OPENBSD, PERSONALITIES, UEFI, boot
from vmbus.wire.messages import GpadlBody, GpadlHeader

ALL = pytest.mark.parametrize("personality", PERSONALITIES.values(), ids=str)


@pytest.mark.parametrize("personality", [OPENBSD, NETBSD], ids=str)
async def test_openbsd_and_netbsd_go_on_describing_a_gpadl_that_is_complete(personality):
    for pages, sizes in (
        (26, []),
        (42, [240] * 15 + [16]),  # the rings of their disks
        (54, [240]),
        (55, [240, 24]),
        (57, [240, 240, 240, 16]),
    ):
        machine = Machine()
        host = machine.host
        host.offers = [offer(1, monitor_allocated=True)]
        async with boot(machine, personality) as guest:
            await guest.connection.connect()
            pfns = guest.ram.allocate(pages)
            gpadl = await guest.connection.create_gpadl(1, pfns)
        assert host.gpadls[gpadl.handle] == (1, pfns)
        assert [len(raw) for _, raw in host.raw if raw[0] == 9] == sizes
        assert host.surplus_bodies == max(0, len(sizes) - (pages - 26 + 27) // 28)


@ALL
async def test_gpadls_of_all_sizes_arrive_whole(personality):
    """Checklist row 31."""
    machine = Machine(pages=16384)
    host = machine.host
    host.offers = [offer(1, monitor_allocated=True)]
    async with boot(machine, personality) as guest:
        await guest.connection.connect()
        for count in (1, 26, 27, 54, 55, 1000):
            pfns = guest.ram.allocate(count, contiguous=False)
            gpadl = await guest.connection.create_gpadl(1, pfns)
            assert host.gpadls[gpadl.handle] == (1, pfns)
            await guest.connection.teardown_gpadl(gpadl)
        last = await guest.connection.create_gpadl(1, guest.ram.allocate(3), 8193)
    headers = [item for item in host.log if isinstance(item, GpadlHeader)]
    handles = [item.gpadl for item in headers]
    if personality is UEFI:
        assert set(handles) == {1}
    else:
        assert handles == list(range(handles[0], handles[0] + 7))
    assert headers[-1].data[:4] == (8193).to_bytes(4, "little")
    assert last.handle == handles[-1]
    if personality is MACOS:
        assert {len(raw) for _, raw in host.raw if raw[0] == 8} == {20 + 8 + 26 * 8}
        assert host.raw[0][1][4:8] == b"\xa5\x5a\xa5\x5a"
    numbers = {item.message_number for item in host.log if isinstance(item, GpadlBody)}
    assert (numbers == {0}) == (not personality.numbers_bodies)

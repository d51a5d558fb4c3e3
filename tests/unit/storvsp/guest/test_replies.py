"""Which vstor packets a storage driver takes: their lengths, and how it is told of a new size."""

from __future__ import annotations

import struct

import pytest

from storvsp.guest import attach, scan
from tests.support.fake_host import Machine
from tests.support.fake_storage import Storage, answer, sense
from tests.support.storage_guest import attached
from vmbus.guest import (
    DPDK,
    FREEBSD,
    HAIKU,
    ILLUMOS,
    LINUX_5_10,
    LINUX_6_1,
    MACOS,
    NETBSD,
    OPENBSD,
    UEFI,
    GuestPanic,
)


@pytest.mark.parametrize(
    ("personality", "bytes_", "reason"),
    [
        (FREEBSD, 64, "room for 48: ENOBUFS: a KASSERT"),
        (ILLUMOS, 56, "room for 48: ENOBUFS: an ASSERT"),
        (UEFI, 64, "room for 48: .* no boot disk"),
        (LINUX_6_1, 48, "48 bytes instead of 64: .*times out"),
        (LINUX_6_1, 72, "room for 64"),
        (OPENBSD, 48, "48 bytes instead of 64: .*a short read"),
        (OPENBSD, 72, "room for 64: .*EINVAL"),
        (NETBSD, 48, "48 bytes instead of 64"),
        (NETBSD, 72, "room for 64"),
        (DPDK, 48, "48 bytes instead of 64"),
        (LINUX_5_10, 40, "40 bytes instead of 48: .*reads on into the next"),
        (MACOS, 40, "40 bytes instead of 48"),
        (HAIKU, 40, "40 bytes instead of 48"),
        (HAIKU, 504, "room for 496: .*B_NO_MEMORY"),
    ],
    ids=str,
)
async def test_the_first_answer_has_to_have_the_length_that_the_driver_takes(
    personality, bytes_, reason
):
    """Checklist rows 11 and 26."""
    storage = Storage(Machine().host)
    storage.answers[7] = struct.pack("<III", 1, 0, 0).ljust(bytes_, b"\0")
    with pytest.raises(GuestPanic, match=reason):
        async with attached(personality, storage=storage):
            pass


@pytest.mark.parametrize(
    ("personality", "bytes_"),
    [(LINUX_5_10, 48), (LINUX_5_10, 64), (MACOS, 64), (HAIKU, 64), (HAIKU, 496)],
    ids=str,
)
async def test_drivers_that_do_not_look_at_the_length_take_longer_answers(personality, bytes_):
    storage = Storage(Machine().host)
    storage.answers[7] = struct.pack("<III", 1, 0, 0).ljust(bytes_, b"\0")
    async with attached(personality, storage=storage) as (adapter, _):
        assert len(await scan(adapter)) == 2


@pytest.mark.parametrize(
    ("personality", "bytes_", "reason"),
    [
        (FREEBSD, 72, "room for 64"),
        (LINUX_6_1, 48, "instead of 64"),
        (OPENBSD, 48, "instead of 64"),
        (UEFI, 40, "40 bytes instead of 48: .*fails fast"),
    ],
    ids=str,
)
async def test_the_answer_to_a_command_has_to_fit_as_well(personality, bytes_, reason):
    """Checklist row 11."""
    with pytest.raises(GuestPanic, match=reason):
        async with attached(personality) as (adapter, storage):
            storage.size = bytes_
            await adapter.execute(bytes(6))


@pytest.mark.parametrize(
    ("personality", "bytes_"),
    [(FREEBSD, 48), (UEFI, 48), (UEFI, 72), (MACOS, 72), (LINUX_5_10, 72)],
    ids=str,
)
async def test_other_lengths_of_the_answer_to_a_command_do_no_harm(personality, bytes_):
    async with attached(personality) as (adapter, storage):
        storage.size = bytes_
        assert (await adapter.execute(bytes(6))).good


async def test_openbsd_sends_64_bytes_even_if_an_old_version_is_agreed_on():
    for personality, size in ((OPENBSD, 64), (NETBSD, 64), (FREEBSD, 48), (HAIKU, 48)):
        storage = Storage(Machine().host)
        storage.versions = {0x402}
        async with attached(personality, storage=storage) as (adapter, _):
            await adapter.execute(bytes(6))
            assert len(storage.log[-1]) == size
            assert storage.log[-1][21] == 18  # room for sense data


async def test_with_an_old_version_a_long_answer_has_no_room_in_freebsd():
    storage = Storage(Machine().host)
    storage.versions = {0x200}
    with pytest.raises(GuestPanic, match="answer of 64 bytes, there is room for 48"):
        async with attached(FREEBSD, storage=storage) as (adapter, _):
            storage.size = 64
            await adapter.execute(bytes(6))


async def test_freebsds_second_controller_begins_with_the_size_of_the_first():
    for personality, size in ((FREEBSD, 64), (MACOS, 48)):
        async with attached(personality) as (adapter, storage):
            await adapter.close()
            storage.log.clear()
            again = await attach(adapter.guest, adapter.offer)
            assert len(storage.log[0]) == size
            await again.close()


@pytest.mark.parametrize(
    ("personality", "status", "outcome"),
    [
        (LINUX_6_1, 0x84, [(0, 1, 2)]),
        (LINUX_6_1, 0x82, [(0, 1, 2)]),
        (LINUX_5_10, 0x82, [(0, 1, 2)]),
        (LINUX_5_10, 0x84, "beside 0x82 only, and keeps the old size"),
        (OPENBSD, 0x82, []),
        (OPENBSD, 0x84, []),
        (LINUX_6_1, 0x86, "0x86 instead of 0x84"),
    ],
    ids=str,
)
async def test_a_new_size_is_seen_beside_the_srb_statuses_that_a_driver_looks_for(
    personality, status, outcome
):
    seen: list[tuple[int, ...]] = []

    async def run() -> None:
        async with attached(personality) as (adapter, storage):
            adapter.on_resize = lambda *address: seen.append(address)
            storage.replies[0x28] = answer(status, 2, sense(6, 0x2A09))
            result = await adapter.execute(b"\x28" + bytes(9), read=512, target=1, lun=2)
            assert result.resized
            adapter.on_resize = None
            await adapter.execute(b"\x28" + bytes(9), read=512)

    if isinstance(outcome, str):
        with pytest.raises(GuestPanic, match=outcome):
            await run()
    else:
        await run()
        assert seen == outcome


@pytest.mark.parametrize(
    ("personality", "bytes_", "reason"),
    [
        (LINUX_6_1, 72, "notification of 72 bytes, there is room for 64"),
        (FREEBSD, 72, "room for 64: ENOBUFS"),
        (OPENBSD, 48, "48 bytes instead of 64: .*not looked at"),
        (NETBSD, 48, "48 bytes instead of 64"),
        (HAIKU, 504, "room for 496"),
        (LINUX_6_1, 8, ""),
        (FREEBSD, 48, ""),
        (UEFI, 504, ""),
        (MACOS, 504, ""),
        (OPENBSD, 64, ""),
    ],
    ids=str,
)
async def test_a_notification_has_to_have_a_length_that_the_driver_takes(
    personality, bytes_, reason
):
    """Checklist row 11."""

    async def run() -> None:
        async with attached(personality) as (adapter, storage):
            payload = struct.pack("<I", 11).ljust(bytes_, b"\0")
            storage.host.channels[1].send(6, payload)
            assert await adapter.wait_notifications(1) == [11]

    if reason:
        with pytest.raises(GuestPanic, match=reason):
            await run()
    else:
        await run()


async def test_with_an_old_version_freebsd_has_room_for_a_short_notification_only():
    storage = Storage(Machine().host)
    storage.versions = {0x402}
    async with attached(FREEBSD, storage=storage) as (adapter, _):
        storage.host.channels[1].send(6, struct.pack("<I", 11).ljust(48, b"\0"))
        await adapter.wait_notifications(1)
    with pytest.raises(GuestPanic, match="notification of 64 bytes, there is room for 48"):
        async with attached(FREEBSD, storage=storage) as (adapter, _):
            storage.host.channels[1].send(6, struct.pack("<I", 11).ljust(64, b"\0"))
            await adapter.wait_notifications(1)


async def test_openbsd_takes_a_notification_in_the_handshake_for_an_answer():
    for personality, crashes in ((OPENBSD, True), (NETBSD, False), (LINUX_6_1, False)):
        storage = Storage(Machine().host)
        ordinary = storage.packet

        def packet(channel, raw, ordinary=ordinary) -> None:
            if raw[16] == 10:
                channel.send(6, struct.pack("<I", 11).ljust(64, b"\0"))
            ordinary(channel, raw)

        storage.host.on_packet = packet
        if crashes:
            with pytest.raises(GuestPanic, match="in the handshake"):
                async with attached(personality, storage=storage):
                    pass
        else:
            async with attached(personality, storage=storage) as (adapter, _):
                assert adapter.notifications == [11]

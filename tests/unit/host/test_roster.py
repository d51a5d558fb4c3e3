"""The devices of a bus: what they keep beyond a process, and what they hear of channels moving."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from tests.support.patience import SOON
from tests.support.worlds import EchoDevice, RawGuest, world
from vmbus.errors import ConfigError, LocalProtocolError
from vmbus.guest import LINUX_6_1
from vmbus.host import BusConfig, Retargetable, Retiring, Saveable
from vmbus.wire import messages as m


class KeepingDevice(EchoDevice):
    """Keeps a number."""

    def __init__(self, number: int, kept: int = 0) -> None:
        super().__init__(number)
        self.kept = kept

    def save(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def restore(self, state: dict[str, Any]) -> None:
        if set(state) != {"kept"}:
            raise ConfigError("saved state: not a number that is kept")
        self.kept = state["kept"]


class MovingDevice(EchoDevice):
    """Hears of channels that move."""

    def __init__(self) -> None:
        super().__init__(1)
        self.moves: list[tuple[int, int | None]] = []

    def retarget(self, channel: Any) -> None:
        self.moves.append((channel.relid, channel.target_vp))


def test_the_hooks_are_looked_for_by_name():
    assert isinstance(KeepingDevice(1), Saveable)
    assert isinstance(MovingDevice(), Retargetable)
    assert not isinstance(EchoDevice(1), Saveable | Retargetable)


async def test_what_devices_keep_comes_back_on_another_bus():
    async with world(KeepingDevice(1, 5), EchoDevice(2), KeepingDevice(3, 7)) as there:
        await there.transport.pause()
        saved = json.loads(json.dumps(there.bus.save()))
        await there.transport.resume()
    assert len(saved) == 2
    one, three = KeepingDevice(1), KeepingDevice(3)
    async with world(one, EchoDevice(2), three) as there:
        there.bus.restore(saved)
    assert (one.kept, three.kept) == (5, 7)


async def test_a_bus_is_saved_in_a_pause_and_restored_before_its_guest_comes():
    async with world(KeepingDevice(1, 5)) as there:
        with pytest.raises(LocalProtocolError, match="paused"):
            there.bus.save()
        await RawGuest(there).connect()
        with pytest.raises(LocalProtocolError, match="contact"):
            there.bus.restore({})


@pytest.mark.parametrize(
    "state", [[], {"nobody": {}}, {"{}": 5}, {str(EchoDevice(2).offer.instance_id): {}}], ids=str
)
async def test_a_state_of_other_devices_is_refused(state):
    device = KeepingDevice(1, 5)
    async with world(device, EchoDevice(2)) as there:
        with pytest.raises(ConfigError, match="saved state"):
            there.bus.restore(state)
    assert device.kept == 5


async def test_a_device_hears_of_a_channel_that_moves_to_another_vp():
    device = MovingDevice()
    async with world(device) as there:
        guest = RawGuest(there)
        await guest.connect()
        await guest.open()
        assert device.lives[0].target_vp == 0
        await guest.post(m.ModifyChannel(relid=1, target_vp=2))
        assert device.moves == [(1, 2)]
        assert device.lives[0].target_vp == 2


class RetiringDevice(EchoDevice):
    """Writes down what it hears of its end, and lets its guest send as long as a test wants."""

    def __init__(self) -> None:
        super().__init__(1)
        self.heard: list[str] = []
        self.go_on = trio.Event()

    async def retire(self) -> None:
        self.heard.append("retire")
        await self.go_on.wait()
        self.heard.append("retired")

    def stay(self) -> None:
        self.heard.append("stay")

    async def aclose(self) -> None:
        self.heard.append("closed")


async def test_a_device_that_is_removed_has_its_guest_come_to_rest_before_it_is_rescinded():
    device = RetiringDevice()
    assert isinstance(device, Retiring)
    assert not isinstance(EchoDevice(1), Retiring)
    async with (
        world(device) as there,
        trio.open_nursery() as nursery,
        there.boot(LINUX_6_1) as guest,
    ):
        (offer,) = await guest.connection.connect()
        channel = await guest.connection.open_channel(offer, ring_pages=4)
        nursery.start_soon(there.bus.remove_device, 1)
        await there.settle()
        assert (await channel.request(b"answered")).payload == b"answered"
        assert m.RescindChannelOffer.TYPE not in there.transport.messages
        device.go_on.set()
        await guest.connection.wait_gone(offer.relid)
    assert device.heard == ["retire", "retired", "closed"]


async def test_a_guest_that_does_not_come_to_rest_keeps_no_device():
    device = RetiringDevice()
    async with world(device, config=BusConfig(close_grace=SOON)) as there:
        await there.bus.remove_device(1)
        assert there.bus.devices == {}
    assert device.heard == ["retire", "closed"]

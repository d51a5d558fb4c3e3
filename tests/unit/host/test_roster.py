"""The devices of a bus: what they keep beyond a process, and what they hear of channels moving."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.worlds import EchoDevice, RawGuest, world
from vmbus.errors import ConfigError, LocalProtocolError
from vmbus.host import Retargetable, Saveable
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

"""The device conformance check, run on the SCSI controller and on devices that break promises."""

from __future__ import annotations

import pytest
import trio

from storvsp import ScsiController
from storvsp.disks.ram import RamDisk
from vmbus.testing import check_device, make_offer


def make_controller() -> ScsiController:
    controller = ScsiController()
    controller.add_disk(RamDisk(1 << 20))
    return controller


async def test_the_scsi_controller_keeps_every_promise_of_a_device():
    await check_device(make_controller)


class Careless:
    """A device with one fault each."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.offer = make_offer()

    async def run(self, primary):
        try:
            while True:
                for packet in await primary.receive_batch():
                    if packet.wants_completion or self.fault == "unsolicited":
                        primary.complete(packet.transaction_id, b"")
                        if self.fault == "twice":
                            primary.complete(packet.transaction_id, b"")
                await primary.flush()
        except trio.EndOfChannel:
            if self.fault == "stays":
                await trio.sleep_forever()

    def snapshot(self):
        return {}

    async def aclose(self):
        pass


async def test_a_device_that_answers_everything_once_passes():
    await check_device(lambda: Careless(""))


@pytest.mark.parametrize("fault", ["twice", "unsolicited"])
async def test_a_device_that_answers_wrongly_is_found_out(fault):
    with pytest.raises(BaseExceptionGroup) as found:
        await check_device(lambda: Careless(fault))
    assert found.group_contains(AssertionError, match="one completion for each request")


async def test_a_device_that_does_not_return_is_found_out(autojump_clock):
    with pytest.raises(BaseExceptionGroup) as found:
        await check_device(lambda: Careless("stays"))
    assert found.group_contains(AssertionError, match="returns when its channel has ended")

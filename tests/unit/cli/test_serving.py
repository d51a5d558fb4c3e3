"""How guests fared, for the exit code of a server that was there for one."""

import pytest

from vmbus.attach.server import ServerLimits
from vmbus.cli import serving
from vmbus.errors import GuestProtocolError


class FailingServer:
    def __init__(self, error):
        self.error = error
        self.faults = 0

    async def handle(self, transport):
        self.faults += 1
        raise self.error


class FakeTransport:
    dropped_messages = 2
    name = "fake"


@pytest.mark.parametrize(
    ("error", "failed", "faults"),
    [(GuestProtocolError("bad"), False, 4), (OSError(5, "broken"), True, 3)],
)
async def test_how_guests_fared_is_kept_in_mind(error, failed, faults):
    server = serving._SingleProcess(FailingServer(error), ServerLimits(), trust_vmm=False)  # type: ignore[arg-type]
    assert (server.failed, server.faults) == (False, 0)
    with pytest.raises(type(error)):
        await server._handle(FakeTransport())  # type: ignore[arg-type]
    assert (server.failed, server.faults) == (failed, faults)

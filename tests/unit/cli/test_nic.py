"""``vmbus nic``: listing, and the requests that are made of a server."""

import json
import uuid

import pytest

from tests.support.cli import make_controller, make_guest, make_status, run_cli, scripted_server
from tests.support.nics import network_adapter
from vmbus.errors import ConfigError


def described(index, **changes):
    """An adapter as a server describes it."""
    found = {**network_adapter().snapshot(), "source": "tap:vnet0", **changes}
    label = {"plugin": "netvsp", "index": index, "backend": "endpoint"}
    return {"key": 7 + index, "class": "nic", "instance": str(uuid.UUID(int=7)), **label, **found}


class Server:
    """What the scripted server was asked, and what it answers."""

    def __init__(self):
        self.guests = [
            make_guest("vm1", devices=[make_controller(0), described(0), described(1)]),
            make_guest("vm2", devices=[make_controller(0)], number=2),
        ]
        self.commands = []
        self.result = {}
        self.refusal = None

    def query(self, kind):
        return make_status(*self.guests)

    def command(self, request):
        self.commands.append(request)
        if self.refusal is not None:
            raise self.refusal
        return self.result


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def run(server, tmp_path):
    with scripted_server(tmp_path / "s", server.query, server.command) as path:

        def run(action, *arguments):
            return run_cli("nic", action, "--socket", path, *arguments)

        yield run


def test_adapters_of_all_guests_are_listed(run, server):
    server.guests[0]["devices"][2]["failure"] = "vnet0 was deleted"
    result = run("list")
    assert result.exit_code == 0
    head, first, second = result.output.splitlines()
    assert head.split()[:5] == ["guest", "adapter", "address", "link", "mtu"]
    assert first.split()[:4] == ["vm1", "0", "00:15:5d:0a:0b:0c", "up"]
    assert first.split()[-1] == "tap:vnet0"
    assert "down: vnet0 was deleted" in second
    assert json.loads(run("list", "--json").output)[1]["adapter"] == 1


def test_there_may_be_none(run, server):
    assert run("list", "--guest", "vm2").output == "no network adapters\n"
    server.guests = []
    assert run("list").output == "no guests attached\n"


@pytest.mark.parametrize(
    ("arguments", "request_", "result", "said"),
    [
        (("link", "down"), {"action": "link", "up": False}, {"link": "down"}, "the link is down"),
        (("link", "up"), {"action": "link", "up": True}, {"link": "up"}, "the link is up"),
        (
            ("mac", "02:00:00:00:00:01"),
            {"action": "mac", "mac": "02:00:00:00:00:01"},
            {"mac": "02:00:00:00:00:01"},
            "the address is 02:00:00:00:00:01",
        ),
    ],
)
def test_requests(run, server, arguments, request_, result, said):
    server.result = result
    got = run(*arguments, "--guest", "vm1", "--adapter", "1")
    assert (got.exit_code, got.output) == (0, said + "\n")
    assert server.commands == [{"backend": "endpoint", "index": 1, "guest": "vm1", **request_}]
    assert json.loads(run(*arguments, "--json").output) == result


def test_statistics_are_shown_with_the_reasons_of_drops(run, server):
    counted = network_adapter().statistics
    counted.transmit.count(b"\xff" * 14, 1060)
    counted.receive.dropped["filtered"] += 1234
    server.result = {
        "transmit": counted.transmit.describe(),
        "receive": counted.receive.describe(),
        "endpoint": {},
    }
    result = run("stats")
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "from the guest frames 1" in lines
    assert "from the guest bytes 1 060" in lines
    assert "to the guest dropped: filtered 1 234" in lines
    assert json.loads(run("stats", "--json").output) == server.result


def test_a_refusal_is_a_failure(run, server):
    server.refusal = ConfigError("there is no endpoint device number 5")
    result = run("link", "up", "--adapter", "5")
    assert result.exit_code == 2
    assert "there is no endpoint device number 5" in result.output

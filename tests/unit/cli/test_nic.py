"""``vmbus nic``: listing, and the requests that are made of a server."""

import json

import pytest

from netvsp.frames.frame import Frame
from tests.support.cli import make_controller, make_guest, make_status, run_cli, scripted_server
from tests.support.nics import described_nic, network_adapter
from vmbus.cli import nic
from vmbus.errors import ConfigError
from vmbus.server import attached


class Server:
    """What the scripted server was asked, and what it answers."""

    def __init__(self):
        self.guests = [
            make_guest("vm1", devices=[make_controller(0), described_nic(0), described_nic(1)]),
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
    counted.transmit.count(Frame(b"\xff" * 1060))
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


def test_an_adapter_is_added_and_its_number_and_address_are_said(run, server):
    server.result = {**described_nic(2), "warnings": ["passt is missing"]}
    result = run("add", "--guest", "vm1", "switch:[vlan=5]lan")
    assert result.exit_code == 0
    assert result.stdout == "added as adapter 2, address 00:15:5d:0a:0b:0c\n"
    assert result.stderr == "warning: passt is missing\n"
    assert server.commands == [
        {
            "backend": "endpoint",
            "action": "add-device",
            "specs": ["switch:[vlan=5]lan"],
            "guest": "vm1",
        }
    ]
    assert json.loads(run("add", "--json", "null:").stdout) == server.result


def test_an_adapter_is_removed_by_its_number(run, server):
    result = run("remove", "3")
    assert (result.exit_code, result.output) == (0, "removed adapter 3\n")
    assert server.commands == [{"backend": "endpoint", "action": "remove-device", "index": 3}]
    assert json.loads(run("remove", "0", "--json").output) == {}
    assert "is not a whole number from 0 on" in run("remove", "first").output


def test_the_words_for_devices_are_those_of_the_server():
    assert (nic.ADD, nic.REMOVE) == (attached.ADD, attached.REMOVE)

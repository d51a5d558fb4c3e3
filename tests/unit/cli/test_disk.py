"""``vmbus disk``: listing, and the requests that are made of a server."""

import json

import pytest

from tests.support.cli import (
    make_controller,
    make_guest,
    make_status,
    run_cli,
    scripted_server,
)
from vmbus.errors import ConfigError

UNIT = {"address": "0:0:0", "size": 64 << 20, "kind": "RamDisk", "read_only": False,
        "source": "ram:64M"}  # fmt: skip
CD = {"address": "0:0:5", "size": None, "kind": "CD-ROM drive", "read_only": True, "source": "",
      "tray": "closed", "locked": False}  # fmt: skip


class Server:
    """What the scripted server was asked, and what it answers."""

    def __init__(self):
        self.guests = [
            # The order of the devices is not that of the server's command line.
            make_guest(
                "vm1",
                devices=[
                    make_controller(1, CD),
                    {"key": 9, "class": "nic", "instance": "elsewhere"},
                    make_controller(0, UNIT),
                ],
            ),
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
            return run_cli("disk", action, "--socket", path, *arguments)

        yield run


def test_disks_of_all_guests_are_listed_by_controller(run):
    result = run("list")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "guest  controller  address  size    kind          access       state  source",
        "vm1    0           0:0:0    64 MiB  RamDisk       read, write  -      ram:64M",
        "vm1    1           0:0:5    -       CD-ROM drive  read only    empty  -",
    ]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"size": 2048}, "closed"),
        ({"size": 2048, "locked": True}, "locked"),
        ({"size": 2048, "tray": "open"}, "tray open"),
        ({"tray": "open", "locked": True}, "empty, tray open, locked"),
    ],
)
def test_the_state_of_a_drive_is_listed(run, server, changes, state):
    server.guests = [make_guest("vm1", devices=[make_controller(0, {**CD, **changes})])]
    assert f"  read only  {state}  " in run("list").output


@pytest.mark.parametrize("arguments", [("add", "cd:a.iso"), ("insert", "1", "cd:a.iso")])
def test_what_the_operator_should_know_is_told_to_him(run, server, arguments):
    server.result = {"address": "0:0:1", "done": True, "warnings": ["a.iso: \x1b odd"]}
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stderr == "warning: a.iso: ? odd\n"
    assert "odd" not in result.stdout


def test_the_list_says_which_disk_keeps_its_guest_waiting(run, server):
    stopped = {**UNIT, "stopped": "No space left on device"}
    server.guests = [make_guest("vm1", devices=[make_controller(0, stopped)])]
    assert "read, write  stopped: No space left on device  ram:64M" in run("list").output
    lost = {**UNIT, "shared": True, "lost": True, "stopped": ""}
    server.guests = [make_guest("vm1", devices=[make_controller(0, lost)])]
    assert "read, write  lost   ram:64M" in run("list").output


@pytest.mark.parametrize(("was_stopped", "code", "text"), [
    (True, 0, "0:0:1 goes on\n"),
    (False, 1, "0:0:1 was not stopped\n"),
])  # fmt: skip
def test_a_stopped_disk_is_continued(run, server, was_stopped, code, text):
    server.result = {"continued": was_stopped}
    result = run("continue", "0:0:1")
    assert (result.exit_code, result.output) == (code, text)
    assert server.commands == [
        {"backend": "disk", "index": 0, "action": "continue", "address": "0:0:1"}
    ]
    result = run("continue", "0:0:1", "--json")
    assert (result.exit_code, json.loads(result.output)) == (code, server.result)


def test_the_list_as_json(run):
    assert json.loads(run("list", "--json", "--guest", "vm1").output) == [
        {"guest": "vm1", "controller": 0, **UNIT},
        {"guest": "vm1", "controller": 1, **CD},
    ]


def test_an_empty_list_says_why(run, server):
    assert run("list", "--guest", "vm2").output == "no disks\n"
    assert json.loads(run("list", "--guest", "vm2", "--json").output) == []
    server.guests = []
    assert run("list").output == "no guests attached\n"


def test_a_guest_that_is_not_there_is_a_mistake_that_names_the_others(run, server):
    result = run("list", "--guest", "vm3")
    assert result.exit_code == 2
    assert "there is no guest 'vm3'; attached are: vm1, vm2" in result.output
    server.guests = []
    assert "attached are: none" in run("list", "--guest", "vm3").output


def test_a_disk_is_added(run, server):
    server.result = {"address": "0:0:1"}
    result = run("add", "ram:64M")
    assert (result.exit_code, result.output) == (0, "added at 0:0:1\n")
    assert server.commands == [{"backend": "disk", "index": 0, "action": "add", "spec": "ram:64M"}]


def test_guest_and_controller_can_be_chosen(run, server):
    run("add", "--guest", "vm2", "--controller", "1", "ram:64M")
    assert server.commands[0]["guest"] == "vm2"
    assert server.commands[0]["index"] == 1


def test_a_disk_is_removed(run, server):
    result = run("remove", "0:0:1")
    assert (result.exit_code, result.output) == (0, "removed 0:0:1\n")
    assert server.commands[0]["address"] == "0:0:1"


def test_a_disk_is_resized(run, server):
    server.result = {"size": 2 << 30}
    result = run("resize", "0", "2G")
    assert (result.exit_code, result.output) == (0, "0 has 2 GiB now\n")
    assert server.commands[0]["size"] == "2G"


MEDIA = [
    (("insert", "1", "cd:a.iso"), "inserted at 1\n"),
    (("change", "--force", "1", "cd:a.iso"), "changed 1\n"),
    (("eject", "1"), "ejected 1\n"),
]


@pytest.mark.parametrize(("arguments", "told"), MEDIA, ids=["insert", "change", "eject"])
def test_media_are_changed(run, server, arguments, told):
    server.result = {"done": True}
    result = run(*arguments)
    assert (result.exit_code, result.output) == (0, told)
    (request,) = server.commands
    assert (request["action"], request["address"]) == (arguments[0], "1")
    assert request.get("spec") == (None if arguments[0] == "eject" else "cd:a.iso")
    assert request.get("force", False) == ("--force" in arguments)


@pytest.mark.parametrize("arguments", [each for each, _ in MEDIA[1:]], ids=["change", "eject"])
def test_a_locked_tray_is_said_and_seen_in_the_exit_code(run, server, arguments):
    server.result = {"done": False}
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.startswith("the guest has locked the tray and has been asked to let go")
    result = run(*arguments, "--json")
    assert result.exit_code == 1
    assert json.loads(result.output) == {"done": False}


@pytest.mark.parametrize("arguments", [("add", "ram:1M"), ("remove", "0"), ("resize", "0", "1M")])
def test_results_as_json(run, server, arguments):
    server.result = {"anything": [1, 2]}
    assert json.loads(run(*arguments, "--json").output) == {"anything": [1, 2]}


def test_what_cannot_be_honoured_is_a_mistake_with_the_servers_words(run, server):
    server.refusal = ConfigError("unknown disk scheme 'rom'; did you mean 'ram'?")
    result = run("add", "rom:64M")
    assert (result.exit_code, result.output) == (
        2,
        "Error: unknown disk scheme 'rom'; did you mean 'ram'?\n",
    )


def test_a_failing_server_is_a_failure(run, server):
    server.refusal = OSError(28, "no space left")
    result = run("add", "ram:64M")
    assert result.exit_code == 1
    assert "no space left" in result.output


def test_the_help_shows_the_subcommands():
    result = run_cli("disk", "--help")
    for name in ("list", "add", "remove", "resize", "insert", "change", "eject", "continue"):
        assert f"  {name} " in result.output

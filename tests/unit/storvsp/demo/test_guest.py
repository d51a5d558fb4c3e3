"""The guest of the demo, in this process."""

from __future__ import annotations

import contextlib
import functools
import json

import pytest
import trio

from storvsp.demo import guest as demo
from storvsp.guest import scan
from vmbus.attach.client import operator
from vmbus.attach.server import open_listener, serve
from vmbus.server import DeviceSetup, GuestServer

SIZE = 1 << 20


class Story:
    """What the guest has told."""

    def __init__(self, captured: str) -> None:
        self.events = [json.loads(line) for line in captured.splitlines()]

    def of(self, kind: str) -> list[dict[str, object]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def problems(self) -> list[tuple[str, str]]:
        return [(str(event["where"]), str(event["text"])) for event in self.of("problem")]


@contextlib.asynccontextmanager
async def server_for(tmp_path, *specs, **options):
    """A server in this task's nursery; yields it and the socket's path."""
    path = tmp_path / "s"
    server = GuestServer([DeviceSetup("storvsp", specs, options)])
    with open_listener(path) as listener:
        async with trio.open_nursery() as nursery:

            async def run():
                await serve(listener, server.handle, query=server.query, command=server.command)

            nursery.start_soon(run)
            yield server, str(path), nursery
            nursery.cancel_scope.cancel()


def options_for(path, **changes):
    arguments = {"--socket": path, "--size": str(SIZE), "--seconds": "0", "--channels": "2"}
    arguments |= {f"--{name}": str(value) for name, value in changes.items() if value is not True}
    flags = [f"--{name}" for name, value in changes.items() if value is True]
    return demo.parse([*(word for pair in arguments.items() for word in pair), *flags])


async def live(options):
    """Run the guest in a thread of its own: its MSR writes block until the server has answered."""
    return await trio.to_thread.run_sync(trio.run, demo.Demo(options).run)


async def test_the_guest_tells_its_life_in_json_lines(tmp_path, capsys):
    async with server_for(tmp_path, "ram:1M", "ram:[lun=7]1M") as (_, path, _nursery):
        assert await live(options_for(path))
    story = Story(capsys.readouterr().out)
    kinds = list(dict.fromkeys(event["event"] for event in story.events))
    assert kinds == ["start", "attached", "contact", "offer", "vstor", "channel", "disk",
                     "phase", "contents", "verified", "left"]  # fmt: skip
    assert [event["subchannel"] for event in story.of("channel")] == [0, 1]
    assert [event["address"] for event in story.of("verified")] == ["0:0:0", "0:0:7"]
    documented = demo.__doc__ or ""
    for event in story.events:
        assert event["event"] in documented
        assert all(f"``{name}``" in documented for name in event if name != "event")


async def test_a_driver_that_ignores_the_controller_says_why(tmp_path, capsys):
    async with server_for(tmp_path, "ram:1M") as (_, path, _nursery):
        assert not await live(options_for(path, guest="openbsd"))
    story = Story(capsys.readouterr().out)
    assert story.of("offer")[0]["ignored"] == "OpenBSD needs a monitor id"
    assert story.problems == [
        ("guest", "the bus offers no SCSI controller that this driver serves")
    ]


async def test_a_controller_without_disks_is_a_problem(tmp_path, capsys):
    async with server_for(tmp_path) as (_, path, _nursery):
        assert not await live(options_for(path))
    assert Story(capsys.readouterr().out).problems == [
        ("guest", "there are no disks behind the controller")
    ]


async def test_a_disk_that_fails_does_not_keep_the_others_from_being_tried(tmp_path, capsys):
    async with server_for(tmp_path, "fault:[on=write]ram:1M", "ram:1M") as (_, path, _nursery):
        assert not await live(options_for(path))
    story = Story(capsys.readouterr().out)
    ((where, text),) = story.problems
    assert where == "0:0:0"
    assert "sense 3/0c/" in text
    assert [event["address"] for event in story.of("verified")] == ["0:0:1"]
    assert story.of("left")


async def test_no_server_is_a_problem(tmp_path, capsys):
    assert not await live(options_for(str(tmp_path / "nothing")))
    ((where, text),) = Story(capsys.readouterr().out).problems
    assert where == "guest"
    assert "cannot connect" in text


async def test_the_guest_does_not_outlive_its_server(tmp_path, capsys):
    hanging = "fault:[on=read,error=hang]ram:1M"
    async with server_for(tmp_path, hanging) as (server, path, nursery):

        async def stop_when_attached():
            while not (guests := server.query("guests")["guests"]) or not guests[0]["channels"]:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_when_attached)
        with trio.CancelScope(shield=True):
            assert not await live(options_for(path))
    problems = Story(capsys.readouterr().out).problems
    assert problems[0][0] == "guest"
    assert "the server" in problems[0][1]


def test_sizes_are_written_as_everywhere(capsys):
    assert options_for("s", size="8M").size == 8 << 20
    with pytest.raises(SystemExit):
        options_for("s", size="8X")
    assert "--size: '8X' is not a size" in capsys.readouterr().err


async def test_a_panic_is_told_as_it_is_if_the_server_stays(tmp_path, capsys, monkeypatch):
    async def panic(_demo, guest):
        guest.panic("the host is wrong")

    monkeypatch.setattr(demo, "LEAVING_SECONDS", 0)
    monkeypatch.setattr(demo.Demo, "_booted", panic)
    async with server_for(tmp_path, "ram:1M") as (_, path, _nursery):
        assert not await live(options_for(path))
    ((where, text),) = Story(capsys.readouterr().out).problems
    assert (where, text) == ("guest", "Linux 6.1: the host is wrong")


async def operate(server, capsys, story, *actions):
    """Be an operator: carry out what the guest waits for, or do something else instead."""
    for waited, request in actions:
        while waited not in "".join(story):
            story.append(capsys.readouterr().out)
            await trio.sleep(0.01)
        if request:
            await server.command(request)


ADD = {"action": "add", "spec": "ram:1M"}
REMOVE = {"action": "remove", "address": "0:0:1"}
READY_ADD, READY_REMOVE = '"action": "add"', '"action": "remove"'


async def hotplug(tmp_path, capsys, *actions, **options):
    story: list[str] = []
    async with server_for(tmp_path, "ram:1M") as (server, path, nursery):
        nursery.start_soon(operate, server, capsys, story, *actions)
        ok = await live(options_for(path, hotplug=True, **options))
        nursery.cancel_scope.cancel()
    return ok, Story("".join(story) + capsys.readouterr().out)


@pytest.mark.parametrize(("guest", "heeded"), [("linux-6.1", True), ("uefi", False)])
async def test_a_disk_comes_is_used_and_goes(tmp_path, capsys, guest, heeded):
    ok, story = await hotplug(
        tmp_path, capsys, (READY_ADD, ADD), (READY_REMOVE, REMOVE), guest=guest
    )
    assert ok
    assert story.of("notice") == 2 * [
        {"event": "notice", "operation": "ENUMERATE_BUS", "heeded": heeded}
    ]
    assert story.of("gone") == [{"event": "gone", "address": "0:0:1"}]
    assert [event["address"] for event in story.of("verified")] == ["0:0:0", "0:0:1"]


async def test_a_change_without_a_notification_is_a_problem(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "NOTICE_SECONDS", 0.05)
    ok, story = await hotplug(tmp_path, capsys)
    assert not ok
    assert story.problems == [("guest", "no notification within 0.05 s of: add")]


async def test_a_notification_without_a_new_disk_is_a_problem(tmp_path, capsys):
    resize = {"action": "resize", "address": "0:0:0", "size": "2M"}
    ok, story = await hotplug(tmp_path, capsys, (READY_ADD, resize))
    assert not ok
    assert story.problems == [("guest", "a disk was added, but the scan finds no new one")]


async def test_a_disk_that_stays_is_a_problem(tmp_path, capsys):
    ok, story = await hotplug(tmp_path, capsys, (READY_ADD, ADD), (READY_REMOVE, ADD))
    assert not ok
    assert story.problems == [("0:0:1", "removed, but the scan still finds it")]
    assert story.of("left")


async def test_a_disk_whose_commands_are_not_refused_is_a_problem(tmp_path, capsys, monkeypatch):
    calls = []

    async def scan_and_add(adapter):
        found = await scan(adapter)
        calls.append(True)
        if len(calls) == 3:  # it has been seen gone, and comes back
            add_again = functools.partial(operator.command, str(tmp_path / "s"), ADD)
            await trio.to_thread.run_sync(add_again)
        return found

    monkeypatch.setattr(demo, "scan", scan_and_add)
    ok, story = await hotplug(tmp_path, capsys, (READY_ADD, ADD), (READY_REMOVE, REMOVE))
    assert not ok
    assert story.problems == [("0:0:1", "removed, but its commands are not refused as INVALID_LUN")]


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_all_went_well(monkeypatch, good, code):
    async def run(self):
        assert self.options.socket == "s"
        return good

    monkeypatch.setattr(demo.Demo, "run", run)
    assert demo.main(["--socket", "s"]) == code

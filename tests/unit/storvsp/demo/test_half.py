"""The storage half of the demo's guest, in this process."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from contextlib import aclosing

import pytest
import trio

from storvsp.demo import half
from storvsp.demo.half import PROGRAM
from storvsp.guest import scan
from tests.support.cli import child_environment
from tests.support.demo import Told, live, server_for
from tests.support.patience import LOOK
from vmbus import demo
from vmbus.attach.client import operator
from vmbus.demo import half as seam

SIZE = 1 << 20


def guest_for(path, **changes):
    arguments = {"--socket": path, "--size": str(SIZE), "--seconds": "0", "--channels": "2"}
    arguments |= {f"--{name}": str(value) for name, value in changes.items() if value is not True}
    flags = [f"--{name}" for name, value in changes.items() if value is True]
    return PROGRAM.parse([*(word for pair in arguments.items() for word in pair), *flags])


async def test_the_guest_tells_its_life_in_json_lines(tmp_path, capsys):
    async with server_for(tmp_path, "ram:1M", "ram:[lun=7]1M") as (_, path, _nursery):
        assert await live(guest_for(path))
    story = Told(capsys.readouterr().out)
    kinds = list(dict.fromkeys(event["event"] for event in story.events))
    assert kinds == ["start", "attached", "contact", "offer", "vstor", "channel", "disk",
                     "phase", "contents", "verified", "left"]  # fmt: skip
    assert [event["subchannel"] for event in story.of("channel")] == [0, 1]
    assert [event["address"] for event in story.of("verified")] == ["0:0:0", "0:0:7"]
    documented = f"{demo.__doc__}{half.__doc__}"
    for event in story.events:
        assert event["event"] in documented
        assert all(f"``{name}``" in documented for name in event if name != "event")


async def test_a_driver_that_ignores_the_controller_says_why(tmp_path, capsys):
    async with server_for(tmp_path, "ram:1M") as (_, path, _nursery):
        assert not await live(guest_for(path, guest="openbsd"))
    story = Told(capsys.readouterr().out)
    assert story.of("offer")[0]["ignored"] == "OpenBSD needs a monitor id"
    assert story.problems == [
        ("guest", "the bus offers no SCSI controller that this driver serves")
    ]


async def test_a_controller_without_disks_is_a_problem(tmp_path, capsys):
    async with server_for(tmp_path) as (_, path, _nursery):
        assert not await live(guest_for(path))
    assert Told(capsys.readouterr().out).problems == [
        ("guest", "there are no disks behind the controller")
    ]


async def test_a_disk_that_fails_does_not_keep_the_others_from_being_tried(tmp_path, capsys):
    async with server_for(tmp_path, "fault:[on=write]ram:1M", "ram:1M") as (_, path, _nursery):
        assert not await live(guest_for(path))
    story = Told(capsys.readouterr().out)
    ((where, text),) = story.problems
    assert where == "0:0:0"
    assert "sense 3/0c/" in text
    assert [event["address"] for event in story.of("verified")] == ["0:0:1"]
    assert story.of("left")


async def test_the_guest_does_not_outlive_its_server(tmp_path, capsys):
    hanging = "fault:[on=read,error=hang]ram:1M"
    async with server_for(tmp_path, hanging) as (server, path, nursery):

        async def stop_when_attached():
            while not (guests := server.query("guests")["guests"]) or not guests[0]["channels"]:
                await trio.sleep(LOOK)
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_when_attached)
        with trio.CancelScope(shield=True):
            assert not await live(guest_for(path))
    problems = Told(capsys.readouterr().out).problems
    assert problems[0][0] == "guest"
    assert "the server" in problems[0][1]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--depth", "0"), ("--depth", "-3"), ("--size", "0"), ("--size", "100"), ("--size", "many")],
)
def test_what_would_verify_nothing_is_a_mistake(option, value, capsys):
    assert PROGRAM.main(["--socket", "s", option, value]) == 2
    assert option in capsys.readouterr().err


def test_sizes_are_written_as_everywhere(capsys):
    (storage,) = guest_for("s", size="8M").halves
    assert isinstance(storage, half.StorageHalf)
    assert storage.size == 8 << 20
    with pytest.raises(SystemExit):
        guest_for("s", size="8X")
    assert "--size: '8X' is not a size" in capsys.readouterr().err


async def operate(server, capsys, story, *actions):
    """Be an operator: carry out what the guest waits for, or do something else instead."""
    for waited, request in actions:
        while waited not in "".join(story):
            story.append(capsys.readouterr().out)
            await trio.sleep(LOOK)
        if request:
            await server.command(request)


ADD = {"action": "add", "spec": "ram:1M"}
REMOVE = {"action": "remove", "address": "0:0:1"}
READY_ADD, READY_REMOVE = '"action": "add"', '"action": "remove"'


async def hotplug(tmp_path, capsys, *actions, **options):
    story: list[str] = []
    async with server_for(tmp_path, "ram:1M") as (server, path, nursery):
        nursery.start_soon(operate, server, capsys, story, *actions)
        ok = await live(guest_for(path, hotplug=True, **options))
        nursery.cancel_scope.cancel()
    return ok, Told("".join(story) + capsys.readouterr().out)


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
    monkeypatch.setattr(seam, "NOTICE_SECONDS", 0.05)
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

    monkeypatch.setattr(half, "scan", scan_and_add)
    ok, story = await hotplug(tmp_path, capsys, (READY_ADD, ADD), (READY_REMOVE, REMOVE))
    assert not ok
    assert story.problems == [("0:0:1", "removed, but its commands are not refused as INVALID_LUN")]


async def next_event(lines, *kinds):
    """Return the next line about one of these events."""
    async for line in lines:
        event = json.loads(line)
        if event["event"] in kinds:
            return event
    raise AssertionError(f"the guest has ended before {kinds}")


async def split(stream):
    rest = b""
    async for chunk in stream:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
async def test_an_idle_guest_tells_what_changes_until_it_is_interrupted(tmp_path, number, code):
    image = tmp_path / "a.iso"
    image.write_bytes(bytes(1 << 16))
    async with server_for(tmp_path, "ram:1M", "cd:") as (server, path, _):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "storvsp.demo", "--idle", "--channels", "1"],
            stdout=subprocess.PIPE,
            env=child_environment(VMBUS_SOCKET=path),
        )
        assert process.stdout is not None
        async with aclosing(split(process.stdout)) as lines:
            first, drive = [await next_event(lines, "disk") for _ in range(2)]
            assert (first["address"], first["size"], first["kind"]) == ("0:0:0", SIZE, "disk")
            assert (drive["address"], drive["size"], drive["kind"]) == ("0:0:1", 0, "cd")

            await server.command({"action": "add", "spec": "ram:2M"})
            added = await next_event(lines, "disk", "gone", "changed")
            assert (added["address"], added["size"]) == ("0:0:2", 2 * SIZE)
            await server.command({"action": "resize", "address": "2", "size": "3M"})
            assert await next_event(lines, "disk", "gone", "changed") == {
                "event": "changed", "address": "0:0:2", "size": 3 * SIZE, "block_size": 512
            }  # fmt: skip
            await server.command({"action": "insert", "address": "1", "spec": f"cd:{image}"})
            assert await next_event(lines, "disk", "gone", "changed") == {
                "event": "changed", "address": "0:0:1", "size": 1 << 16, "block_size": 2048
            }  # fmt: skip
            await server.command({"action": "remove", "address": "2"})
            gone = await next_event(lines, "disk", "gone", "changed")
            assert gone == {"event": "gone", "address": "0:0:2"}

            process.send_signal(number)
            assert (await next_event(lines, "left", "problem"))["event"] == "left"
        assert await process.wait() == code


def test_an_idle_guest_asks_for_nothing(capsys):
    with pytest.raises(SystemExit):
        guest_for("s", idle=True, hotplug=True)
    assert "not allowed with argument" in capsys.readouterr().err

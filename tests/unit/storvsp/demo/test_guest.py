"""The guest of the demo, and the trials it makes of disks, in this process."""

from __future__ import annotations

import contextlib
import functools
import json
import struct

import pytest
import trio

from storvsp import ScsiController
from storvsp.demo import guest as demo
from storvsp.demo.trial import GRAIN, LARGE, CorruptionError, DiskTrial, Meter, fingerprint, insist
from storvsp.disks.fault import Fault, FaultDisk, FaultKind, Operation
from storvsp.disks.overlay import OverlayDisk
from storvsp.disks.ram import RamDisk
from storvsp.disks.raw import RawDisk
from storvsp.disks.wrapper import DiskWrapper
from storvsp.guest import ScsiError, attach, scan
from storvsp.guest.replies import Result
from vmbus.attach.client import operator
from vmbus.attach.server import open_listener, serve
from vmbus.guest import LINUX_6_1, boot
from vmbus.host import open_bus
from vmbus.partition.loopback import LoopbackTransport
from vmbus.partition.soft_machine import SoftMachine
from vmbus.server import DeviceSetup, GuestServer

SIZE = 1 << 20


class LyingDisk(DiskWrapper):
    """Does everything with a straight face, and one thing wrong."""

    def __init__(self, base, lie):
        super().__init__(base)
        self.lie = lie

    def try_readv(self, offset, buffers):
        done = super().try_readv(offset, buffers)
        if self.lie == "bit" and offset <= 70 * 512 < offset + sum(map(len, buffers)):
            skip = 70 * 512 - offset
            for view in buffers:
                if skip < len(view):
                    view[skip] ^= 0x10
                    break
                skip -= len(view)
        return done

    def try_writev(self, offset, buffers, *, fua=False):
        if self.lie == "lost" and offset == 0:
            return True
        if self.lie == "astray":
            offset ^= LARGE
        return super().try_writev(offset, buffers, fua=fua)

    async def unmap(self, offset, length):
        if self.lie != "kept":
            await super().unmap(offset, length)


@contextlib.asynccontextmanager
async def trying(disk, *, depth=8, limit=SIZE, controller=None):
    """A trial of a disk that a guest has found; yields it and the phases that are over."""
    machine = SoftMachine(((0, 16 << 20),))
    controller = controller or ScsiController()
    controller.add_disk(disk)
    phases: list[Meter] = []
    with LoopbackTransport(machine.synic) as transport:
        async with (
            open_bus(transport, [controller]),
            boot(machine, LINUX_6_1) as guest,
        ):
            (offer,) = await guest.connection.connect()
            adapter = await attach(guest, offer, contiguous=False)
            (found,) = await scan(adapter)
            trial = DiskTrial(found, depth=depth, limit=limit, progress=phases.append)
            await trial.look()
            yield trial, phases
            await adapter.close()
            await guest.connection.unload()
    machine.close()


async def whole(trial):
    await trial.survey()
    await trial.write(0)
    await trial.read(0)
    await trial.mix(0.02)
    await trial.unmap()
    await trial.check()


def digest_of(data):
    """What the module says a digest is."""
    return fingerprint(
        b"".join(fingerprint(data[start : start + GRAIN]) for start in range(0, len(data), GRAIN))
    ).hex()


async def test_an_honest_disk_passes_and_every_byte_is_touched():
    disk = RamDisk(SIZE)
    async with trying(disk) as (trial, phases):
        assert (trial.writable, trial.unmaps, trial.label, trial.used) == (True, True, None, SIZE)
        await trial.survey()
        assert trial.digest == digest_of(bytes(SIZE))
        await whole(trial)
        assert trial.unmapped == SIZE // 4
        content = bytearray(SIZE)
        await disk.readv(0, [memoryview(content)])
        assert trial.digest == digest_of(content)
        assert not any(content[: SIZE // 4])
        assert all(any(content[at : at + 512]) for at in range(SIZE // 4, SIZE, 512))
    over = {meter.phase: meter for meter in phases if meter.over}
    assert list(over) == ["survey", "write", "read", "mixed", "check"]
    for name in ("survey", "write", "read", "check"):
        assert (over[name].requests, over[name].bytes) == (SIZE // LARGE, SIZE)
    assert over["mixed"].bytes == over["mixed"].requests * GRAIN


async def test_phases_go_on_until_their_time_is_over_and_tell_how_they_are_doing():
    async with trying(RamDisk(SIZE)) as (trial, phases):
        await trial.survey()
        await trial.write(0.25)
        meter = phases[-1]
        assert meter.over
        assert meter.seconds >= 0.25
        assert meter.bytes > SIZE
        assert [other for other in phases if other.phase == "write" and not other.over]
        await trial.check()


async def test_news_of_other_disks_does_not_disturb_a_trial():
    controller = ScsiController()
    async with trying(RamDisk(SIZE), controller=controller) as (trial, _):

        def news():
            controller.add_disk(RamDisk(SIZE))

        news()
        assert (await trial.disk.execute(bytes(6))).sense_key == 6  # TEST UNIT READY
        news()
        await trial.look()
        assert trial.unmaps
        for phase in (trial.survey(), trial.write(0), trial.unmap(), trial.check()):
            news()
            await phase


async def test_a_unit_that_has_nothing_but_news_is_given_up():
    asked = []

    async def only_news():
        asked.append(1)
        raise ScsiError("READ", Result(0x84, 2, bytes([0x70, 0, 6]) + bytes(15), 0, b""))

    with pytest.raises(ScsiError, match="sense 6/00/00"):
        await insist(only_news)
    assert 1 < len(asked) < 10


@pytest.mark.parametrize("lie", ["bit", "lost", "astray", "kept"])
async def test_a_disk_that_lies_is_found_out(lie):
    disk = LyingDisk(RamDisk(SIZE), lie)
    async with trying(disk) as (trial, _):
        with pytest.raises(CorruptionError, match=r"4 KiB at byte \d+ \(block \d+\) read as"):
            await whole(trial)


async def test_the_place_of_a_corruption_is_named():
    async with trying(LyingDisk(RamDisk(SIZE), "bit")) as (trial, _):
        await trial.survey()
        await trial.write(0)
        with pytest.raises(CorruptionError, match=r"at byte 32768 \(block 64\)"):
            await trial.read(0)


@pytest.mark.parametrize("operation", Operation)
async def test_an_error_of_the_disk_is_passed_on(operation):
    async with trying(FaultDisk(RamDisk(SIZE), Fault(on=operation))) as (trial, _):
        with pytest.raises(ScsiError):
            await whole(trial)


async def test_a_disk_that_hangs_is_not_told_to_make_progress():
    fault = Fault(FaultKind.HANG, on=Operation.READ)
    disk = FaultDisk(RamDisk(SIZE), fault)
    async with trying(disk) as (trial, phases), trio.open_nursery() as nursery:
        nursery.start_soon(trial.survey)
        while not fault.waiting:
            await trio.sleep(0.01)
        await trio.sleep(0.25)
        assert not phases
        disk.remove(fault)


async def test_more_workers_than_places_do_not_meet():
    async with trying(RamDisk(2 * GRAIN), depth=64) as (trial, _):
        await whole(trial)
        await trial.mix(0.05)
        await trial.check()
        assert trial.unmapped == 0


async def test_no_more_than_the_limit_is_used():
    disk = RamDisk(SIZE)
    async with trying(disk, limit=SIZE // 2) as (trial, _):
        await whole(trial)
        rest = bytearray(SIZE // 2)
        await disk.readv(SIZE // 2, [memoryview(rest)])
        assert not any(rest)


async def test_a_disk_with_large_sectors_is_tried_like_any_other():
    async with trying(RamDisk(SIZE, sector_size=4096)) as (trial, _):
        await whole(trial)


async def test_a_read_only_disk_is_known_as_one(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    async with trying(await RawDisk.open(path, read_only=True)) as (trial, _):
        assert (trial.writable, trial.unmaps) == (False, False)
        await trial.survey()
        await trial.check()


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (bytes(16 * 2048) + b"\x01CD001\x01".ljust(40) + b"MY_DISC".ljust(2008), "MY_DISC"),
        (bytes(64 * 2048), None),
        (bytes(4 * 2048), None),
    ],
)
async def test_a_cd_is_known_by_the_name_of_its_volume(tmp_path, content, label):
    path = tmp_path / "cd.iso"
    path.write_bytes(content)
    disk = await RawDisk.open(path, read_only=True, sector_size=2048, optical=True)
    async with trying(disk) as (trial, _):
        assert (trial.label, trial.writable) == (label, False)
        await trial.survey()
        await trial.check()


async def test_a_cd_that_cannot_be_read_has_no_name(tmp_path):
    path = tmp_path / "cd.iso"
    path.write_bytes(bytes(64 * 2048))
    disk = await RawDisk.open(path, read_only=True, sector_size=2048, optical=True)
    async with trying(FaultDisk(disk, Fault(on=Operation.READ))) as (trial, _):
        assert trial.label is None


# -- the program ----------------------------------------------------------------------------------


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


async def test_an_overlay_passes_with_its_base_showing_through_first(capsys):
    base = RamDisk(SIZE)
    content = struct.pack("<Q", 7) * (SIZE // 8)
    await base.writev(0, [memoryview(bytearray(content))])
    async with trying(OverlayDisk(base, None)) as (trial, _):
        await trial.survey()
        assert trial.digest == digest_of(content)
        await trial.write(0)
        await trial.check()
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_all_went_well(monkeypatch, good, code):
    async def run(self):
        assert self.options.socket == "s"
        return good

    monkeypatch.setattr(demo.Demo, "run", run)
    assert demo.main(["--socket", "s"]) == code

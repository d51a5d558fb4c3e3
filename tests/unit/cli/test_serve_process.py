"""``vmbus serve`` in a process of its own: the socket, signals, and guests from start to end."""

import contextlib
import json
import os
import pwd
import signal
import socket
import stat
import sys

import pytest
import trio

from storvsp.guest import attach, scan
from tests.support.cli import run_child, run_cli, serving
from tests.support.patience import PATIENCE
from vmbus.attach.client import operator
from vmbus.attach.client.machine import attach_machine
from vmbus.attach.protocol.messages import RefusedError
from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.errors import AttachError
from vmbus.guest import boot
from vmbus.guest.personality import LINUX_6_1
from vmbus.partition.soft_machine import SoftMachine
from vmbus.supervisor.sandbox import landlock_version
from vmbus.wire.messages import RequestOffers

pytestmark = pytest.mark.slow

MEMORY = 8 << 20

MODES = [[], ["--single-process"]]
"""A process per guest, and one for all."""


@contextlib.asynccontextmanager
async def guest_on(path, name="vm1", **options):
    """Boot a guest that is attached to the server; it has contacted no bus yet."""
    machine = SoftMachine([(0, MEMORY)])
    try:
        with trio.fail_after(PATIENCE):
            async with (
                attach_machine(machine, path, name=name, **options) as (_, delegate),
                boot(machine, LINUX_6_1) as guest,
            ):
                yield guest, delegate
    finally:
        machine.close()


async def refusal(path, name):
    """Have a guest refused; return what the server says."""
    text = ""
    try:
        async with guest_on(path, name):
            pass
    except* AttachError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = str(error)
    return text


def ask(path):
    """Ask a server how it is, as operators do."""
    return operator.query(path + CONTROL_SUFFIX, "status")


async def in_thread(function, *arguments):
    return await trio.to_thread.run_sync(function, *arguments)


# -- the socket and signals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_server_and_removes_its_socket(path, number, code):
    with serving("--socket", path, "--disk", "ram:1M") as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert server.wait_line("listening").endswith(f"listening on {path}")
        assert server.stop(number) == code
        assert server.lines[-1].endswith(f"stopping: {number.name}")
    assert not os.path.lexists(path)


def test_a_socket_in_use_is_left_to_its_server(path):
    with serving("--socket", path) as server:
        second = run_child("serve", "--socket", path)
        assert second.returncode == 2
        assert "another server is using it" in second.stderr
        assert ask(path)["pid"] == server.process.pid
        assert server.stop() == 0


def test_a_socket_that_nobody_listens_on_is_replaced(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    with serving("--socket", path) as server:
        assert ask(path)["guests_attached"] == 0
        assert server.stop() == 0


def test_stream_sockets_and_permissions(path):
    with serving("--socket", path, "--stream", "--permissions", "660") as server:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(path)
        assert ask(path)["pid"] == server.process.pid


def test_an_inherited_socket_is_listened_on(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        control = path + CONTROL_SUFFIX
        with serving("--fd", str(fd), "--control", control, pass_fds=[fd]) as server:
            server.wait_line(f"listening on descriptor {fd}")
            assert ask(path)["pid"] == server.process.pid
            assert server.stop() == 0
    assert os.path.lexists(path), "it was not this server's to remove"


@pytest.mark.parametrize("mode", MODES)
async def test_a_connected_socket_is_the_only_connection(mode):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        with serving("--fd", str(fd), *mode, ready="serving descriptor", pass_fds=[fd]) as server:
            async with guest_on(ours) as (guest, _):
                await guest.connection.connect()
                await guest.connection.unload()
            assert await in_thread(server.wait) == 0


SYSTEMD = """
import os, sys
sockets = [int(fd) for fd in sys.argv[1].split(",")]
for index, fd in enumerate(sockets):
    os.dup2(fd, 3 + index)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(sockets))
os.environ["LISTEN_FDNAMES"] = sys.argv[2]
from vmbus.cli import main
sys.argv = ["vmbus", "serve"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ("vmm:control", ""),
        ("a:control:b", ""),
        ("control:control:vmm", "systemd passed 2 sockets called control"),
        ("control", "there is nowhere to listen"),
    ],
)
def test_systemd_passes_sockets_for_vmms_and_one_for_operators(
    tmp_path, monkeypatch, names, complaint
):
    with contextlib.ExitStack() as stack:
        listeners = []
        for number, name in enumerate(names.split(":")):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.bind(str(tmp_path / name) if number == names.split(":").index(name) else "")
            sock.listen()
            # Out of the way of descriptors 3 and 4, which the program puts them on.
            high = os.dup(sock.fileno())
            listeners.append(high)
            stack.callback(os.close, high)
        monkeypatch.setattr(
            "tests.support.cli.COMMAND",
            [sys.executable, "-c", SYSTEMD, ",".join(map(str, listeners)), names],
        )
        ready = complaint or "listening on descriptor"
        with serving(ready=ready, pass_fds=listeners) as server:
            if complaint:
                assert server.wait() == 2
            else:
                pid = operator.query(str(tmp_path / "control"), "status")["pid"]
                assert pid == server.process.pid
                assert server.stop() == 0


def test_a_service_manager_is_told_when_vmms_may_connect(path, tmp_path):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(PATIENCE)
        with serving("--socket", path, NOTIFY_SOCKET=name) as server:
            assert manager.recv(100) == b"READY=1"
            assert os.path.exists(path)
            assert server.stop() == 0
            assert manager.recv(100) == b"STOPPING=1"


def test_the_log_can_be_quiet_or_json(path):
    with serving("--socket", path, "--json") as server:
        record = json.loads(server.wait_line("listening"))
        assert record["message"] == f"listening on {path}"
        assert record["level"] == "info"
        assert server.stop() == 0
    with serving("--socket", path, "-v", "-v") as server:
        ask(path)
        server.wait_line("closed: the peer said goodbye")
        assert server.stop() == 0
    assert run_child("serve", "--socket", "/nonexistent/socket", "-q").stderr.count("\n") == 1


# -- guests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_uses_its_disks_while_operators_look_and_change_them(path, mode):
    with serving("--socket", path, "--disk", "ram:4M", *mode) as server:
        async with guest_on(path) as (guest, _):
            (offer,) = await guest.connection.connect()
            adapter = await attach(guest, offer)
            (disk,) = await scan(adapter)
            await disk.write(0, b"x" * 512)
            assert await disk.read(0, 1) == b"x" * 512

            top = await in_thread(run_child, "top", "--socket", path, "--once")
            assert top.returncode == 0, top.stderr
            _, line, channel, used = top.stdout.splitlines()
            assert line == (
                f"guest=vm1 version=5.3 memory={MEMORY} paused=no faults=0 channels=1"
                " disks=1 nics=0"
            )
            assert channel.startswith("guest=vm1 channel=1 device=scsi subchannel=0 ")
            assert used.startswith("guest=vm1 disk=0:0:0 controller=0 size=4194304 errors=0 ")

            # What the other commands say is the same in this process.
            added = await in_thread(run_cli, "disk", "add", "--socket", path, "ram:[lun=3]2M")
            assert (added.exit_code, added.stdout) == (0, "added at 0:0:3\n")
            resized = await in_thread(run_cli, "disk", "resize", "--socket", path, "3", "3M")
            assert resized.stdout == "3 has 3 MiB now\n"
            listed = await in_thread(run_cli, "disk", "list", "--socket", path)
            assert listed.stdout.splitlines()[1:] == [
                "vm1    0           0:0:0    4 MiB  RamDisk  read, write  -      ram:4M",
                "vm1    0           0:0:3    3 MiB  RamDisk  read, write  -      ram:2M",
            ]
            assert [each.size for each in await scan(adapter)] == [4 << 20, 3 << 20]
            removed = await in_thread(run_cli, "disk", "remove", "--socket", path, "0:0:3")
            assert removed.exit_code == 0
            again = await in_thread(run_cli, "disk", "remove", "--socket", path, "3")
            assert again.exit_code == 2
            assert again.stderr == "Error: nothing is at 0:0:3\n"
            late = await in_thread(run_cli, "disk", "resize", "--socket", path, "3", "3M")
            assert (late.exit_code, late.stderr) == (again.exit_code, again.stderr)
            nowhere = await in_thread(
                run_cli, "disk", "add", "--socket", path, "--controller", "1", "ram:1M"
            )
            assert nowhere.exit_code == 2
            assert "there is no disk device number 1; the guest has one, number 0" in nowhere.stderr

            await adapter.close()
            await guest.connection.unload()
        await in_thread(server.wait_line, "vm1: attached with 1 device(s)")
        await in_thread(server.wait_line, "vm1: gone")
        nobody = await in_thread(run_child, "disk", "add", "--socket", path, "ram:1M")
        assert nobody.returncode == 2
        assert nobody.stderr == "Error: no guest is attached\n"
        assert server.stop() == 0


async def test_several_guests_have_disks_of_their_own(path, tmp_path):
    spec = f"raw:[create=1M]{tmp_path}/{{guest}}.img"
    with serving("--socket", path, "--identity", "hello", "--disk", spec) as server:
        async with guest_on(path, "one"), guest_on(path, "two"):
            listed = await in_thread(run_child, "disk", "list", "--socket", path, "--json")
            assert [each["guest"] for each in json.loads(listed.stdout)] == ["one", "two"]
            asked = await in_thread(run_child, "disk", "add", "--socket", path, "ram:1M")
            assert asked.returncode == 2
            assert "which guest? attached are: one, two" in asked.stderr
        assert (tmp_path / "one.img").stat().st_size == 1 << 20
        assert (tmp_path / "two.img").exists()
        assert server.stop() == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_whose_disk_is_taken_is_turned_away_with_a_line_in_the_log(
    path, tmp_path, mode
):
    with serving(
        "--socket", path, "--disk", f"raw:[create=1M]{tmp_path}/disk.img", *mode
    ) as server:
        async with guest_on(path, "one"):
            assert "this guest cannot be served" in await refusal(path, "two")
            line = await in_thread(server.wait_line, "error: two: cannot be served")
            assert "disk.img" in line
        assert server.stop() == 0
    assert not any("Traceback" in line for line in server.lines)


@pytest.mark.parametrize("mode", MODES)
async def test_a_signal_ends_the_server_under_a_guest(path, mode):
    with serving("--socket", path, "--disk", "ram:1M", *mode) as server:
        async with guest_on(path) as (guest, delegate):
            (offer,) = await guest.connection.connect()
            adapter = await attach(guest, offer)
            await scan(adapter)
            assert await in_thread(server.stop) == 0
            await delegate.over.wait()
    assert not os.path.lexists(path)
    assert not any("Traceback" in line for line in server.lines), server.lines


@pytest.mark.parametrize("mode", MODES)
async def test_once_ends_with_the_first_guest(path, mode):
    with serving("--socket", path, "--once", *mode) as server:
        # An operator is no guest.
        await in_thread(ask, path)
        async with guest_on(path) as (guest, _):
            await guest.connection.connect()
            await guest.connection.unload()
        assert await in_thread(server.wait) == 0
    assert not os.path.lexists(path)


@pytest.mark.parametrize("mode", MODES)
async def test_once_tells_of_a_guest_that_broke_a_rule(path, mode):
    with serving("--socket", path, "--once", *mode) as server:
        async with guest_on(path) as (guest, _):
            await guest.connection.connect()
            # Once per connection is what a guest may ask.
            await guest.connection.post(RequestOffers())
            await in_thread(server.wait_line, "(fault 1)")
        assert await in_thread(server.wait) == 3


@pytest.mark.parametrize("mode", MODES)
async def test_once_tells_of_a_guest_that_could_not_be_served(path, tmp_path, mode):
    spec = f"raw:{tmp_path}/{{guest}}.img"
    arguments = ("--socket", path, "--once", "--identity", "hello", "--disk", spec, *mode)
    with serving(*arguments) as server:
        assert "this guest cannot be served" in await refusal(path, "vm1")
        assert await in_thread(server.wait) == 1
        server.wait_line("No such file or directory")


async def test_an_old_version_can_be_the_newest_allowed(path):
    with serving("--socket", path, "--max-version", "4.0", "--monitor", "--subchannels", "0",
                 "--max-transfer", "1M") as server:  # fmt: skip
        async with guest_on(path) as (guest, _):
            (offer,) = await guest.connection.connect()
            assert offer.monitor_allocated
            assert str(guest.connection.version) == "4.0"
            await guest.connection.unload()
        assert server.stop() == 0


@pytest.mark.parametrize("mode", MODES)
async def test_guests_share_a_disk_that_is_said_to_be_shared(path, mode):
    arguments = ("--socket", path, "--disk", "ram:[shared]2M", "--disk", "ram:1M", *mode)
    with serving(*arguments) as server:
        disks = []
        async with guest_on(path, "one") as (one, _), guest_on(path, "two") as (two, _):
            for guest in (one, two):
                (offer,) = await guest.connection.connect()
                disks.append(await scan(await attach(guest, offer)))
            await disks[0][0].write(0, b"x" * 512)
            await disks[0][1].write(0, b"y" * 512)
            assert await disks[1][0].read(0, 1) == b"x" * 512
            assert await disks[1][1].read(0, 1) == bytes(512)
            for size in ((), ("4M",)):
                command = ("disk", "resize", "--socket", path, "--guest", "one", "0", *size)
                resized = await in_thread(run_child, *command)
                assert resized.returncode == 2
                assert "0:0:0 cannot be resized: it is a disk that guests share" in resized.stderr
            for guest in (one, two):
                await guest.connection.unload()
        assert await in_thread(server.stop) == 0
    assert not any("error" in line for line in server.lines), server.lines


# -- who may do what -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_is_called_as_its_socket_is_whatever_its_vmm_says(tmp_path, mode):
    alice, bob = (str(tmp_path / name) for name in ("alice.sock", "bob.sock"))
    spec = f"raw:[create=1M]{tmp_path}/{{guest}}.img"
    arguments = ("--socket", f"alice={alice}", "--socket", f"bob={bob}", "--disk", spec, *mode)
    with serving(*arguments) as server:
        async with guest_on(bob, "alice"):
            assert [each["name"] for each in operator.query(alice, "guests")["guests"]] == ["bob"]
            assert (tmp_path / "bob.img").exists()
            assert not (tmp_path / "alice.img").exists()
            assert "a guest called 'bob' is attached" in await refusal(bob, "other")
            async with guest_on(alice, "bob"):
                assert (tmp_path / "alice.img").exists()
        assert await in_thread(server.stop) == 0
    assert sorted(os.listdir(tmp_path)) == ["alice.img", "bob.img"]


async def test_a_guest_may_be_called_as_the_user_who_runs_its_vmm(path, tmp_path):
    spec = f"raw:[create=1M]{tmp_path}/{{guest}}.img"
    with serving("--socket", path, "--identity", "user", "--disk", spec) as server:
        async with guest_on(path, "somebody-else"):
            user = pwd.getpwuid(os.getuid()).pw_name
            assert (tmp_path / f"{user}.img").exists()
        assert await in_thread(server.stop) == 0


@pytest.mark.parametrize("mode", MODES)
async def test_a_guest_without_a_name_has_no_image_named_by_it(path, tmp_path, mode):
    """Two that nobody names would have one image, one after the other."""
    arguments = ("--socket", path, "--identity", "hello", *mode)
    with serving(*arguments, "--disk", f"raw:[create=1M]{tmp_path}/{{guest}}.img") as server:
        assert "the guest has no name" in await refusal(path, "")
        async with guest_on(path, "vm1"):
            assert (tmp_path / "vm1.img").exists()
        assert await in_thread(server.stop) == 0
    assert sorted(os.listdir(tmp_path)) == ["vm1.img"]
    with serving(*arguments) as server:
        async with guest_on(path, ""):
            assert [
                each["name"] for each in operator.query(path + CONTROL_SUFFIX, "guests")["guests"]
            ] == ["guest"]
        assert await in_thread(server.stop) == 0


@pytest.mark.parametrize("arguments", [(), ("--socket", "b=b.sock")])
def test_an_image_named_by_the_guest_needs_somebody_who_names_it(path, arguments):
    result = run_cli("serve", "--socket", path, *arguments, "--disk", "raw:{guest}.img")
    assert result.exit_code == 2
    assert "say where names come from: --socket NAME=PATH" in result.output
    assert not os.path.lexists(path)


def test_operators_are_let_in_by_their_own_socket_only(path, tmp_path):
    with serving("--socket", path, "--permissions", "666") as server:
        control = path + CONTROL_SUFFIX
        assert stat.S_IMODE(os.stat(control).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as vmm:
            vmm.connect(path)
            with pytest.raises(RefusedError, match="operators have one of their own"):
                operator.command(vmm, {"backend": "disk", "action": "add", "spec": "ram:1M"})
        assert server.stop() == 0
        assert not os.path.lexists(control)
    other = str(tmp_path / "operators")
    with serving("--socket", path, "--control", other) as server:
        assert operator.query(other, "status")["pid"] == server.process.pid
        refused = run_cli("top", "--once", "--socket", path)
        assert refused.exit_code == 1
        assert "is a socket for VMMs" in refused.output
        assert server.stop() == 0


@pytest.mark.parametrize("mode", MODES)
async def test_files_beyond_those_allowed_cannot_be_added(path, tmp_path, mode):
    if not landlock_version():
        pytest.skip("this kernel has no Landlock")
    images, others = tmp_path / "images", tmp_path / "others"
    for each in (images, others):
        each.mkdir()
        (each / "a.img").write_bytes(bytes(1 << 20))
    arguments = ("--socket", path, "--disk", "ram:1M", "--allow", str(images), *mode)
    with serving(*arguments) as server:
        async with guest_on(path):
            for folder, code in ((images, 0), (others, 2)):
                spec = f"raw:{folder}/a.img"
                added = await in_thread(run_child, "disk", "add", "--socket", path, spec)
                assert added.returncode == code, added.stderr
            assert "Permission denied" in added.stderr
        assert await in_thread(server.stop) == 0


async def test_the_guest_beyond_the_limit_is_told_so(path):
    with serving("--socket", path, "--max-guests", "1") as server:
        async with guest_on(path, "one"):
            assert "the limit; try again later" in await refusal(path, "two")
        assert await in_thread(server.stop) == 0

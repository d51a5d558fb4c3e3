"""What a process gives up: tried in processes of their own."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys

import pytest

from tests.support.house import ROOT
from vmbus.supervisor import sandbox

PRELUDE = """
import ctypes, errno, os, signal, socket, subprocess, sys
from vmbus.supervisor import sandbox
libc = ctypes.CDLL(None, use_errno=True)
def refused(call, *numbers):
    try:
        call()
    except OSError as error:
        return error.errno in numbers
    return False
"""


def confined(body: str, *arguments: str) -> None:
    """Run a program that asserts things about itself."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'devices'}"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + body, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_program_is_started_and_nobody_is_looked_into():
    confined("""
sandbox.confine()
assert refused(lambda: os.execv("/bin/true", ["true"]), errno.EPERM)
assert refused(lambda: subprocess.run(["/bin/true"]), errno.EPERM)
assert libc.ptrace(16, os.getppid(), 0, 0) == -1 and ctypes.get_errno() == errno.EPERM
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == -1 and ctypes.get_errno() == errno.EPERM
assert libc.unshare(0x10000000) == -1 and ctypes.get_errno() == errno.EPERM
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
assert status["NoNewPrivs"].strip() == "1"
assert int(status["CapEff"], 16) & ~0xF == 0
assert int(status["CapBnd"], 16) & ~0xF == 0 or os.getuid() != 0
# What a server does goes on.
ours, theirs = socket.socketpair()
ours.send(b"x"); assert theirs.recv(1) == b"x"
import threading
thread = threading.Thread(target=open, args=("/proc/self/status",)); thread.start(); thread.join()
""")


def test_neither_processes_nor_what_belongs_to_others():
    confined("""
import resource, threading
sandbox.confine()
parent = os.getppid()
for call in (
    os.fork,
    lambda: os.kill(parent, 0),
    lambda: os.kill(0, 0),
    lambda: os.kill(-1, 0),
    lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1 << 30, 1 << 30)),
    lambda: os.setpriority(os.PRIO_USER, 0, 19),
    lambda: os.sched_setaffinity(parent, {0}),
    lambda: os.sched_setscheduler(parent, os.SCHED_IDLE, os.sched_param(0)),
):
    assert refused(call, errno.EPERM), call
for number in (56, 220):  # a process with a user name space of its own
    assert libc.syscall(number, 0x10000011, 0, 0, 0, 0) < 0
os.kill(os.getpid(), 0)
assert resource.prlimit(0, resource.RLIMIT_CPU) == resource.getrlimit(resource.RLIMIT_CPU)
os.sched_setaffinity(0, os.sched_getaffinity(0))
thread = threading.Thread(target=print); thread.start(); thread.join()
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.raise_signal(signal.SIGUSR1)
""")


def test_nobody_is_looked_into_by_way_of_files():
    if not sandbox.landlock_version():
        pytest.skip("this kernel has no Landlock")
    confined("""
sandbox.no_new_privileges()
parent = os.getppid()
sandbox.restrict_files(None)
for name in ("mem", "fd/0"):
    assert refused(lambda: open(f"/proc/{parent}/{name}", "rb"), errno.EACCES, errno.EPERM), name
""")


def test_files_are_not_taken_from_one_thread_of_several():
    if not sandbox.landlock_version():
        pytest.skip("this kernel has no Landlock")
    confined("""
import threading
from vmbus.errors import ConfigError
sandbox.no_new_privileges()
end = threading.Event()
thread = threading.Thread(target=end.wait); thread.start()
try:
    sandbox.restrict_files(["/proc"])
except ConfigError as error:
    assert "threads" in str(error)
else:
    raise AssertionError("the thread can still open everything")
finally:
    end.set(); thread.join()
open("/etc/passwd").close()
""")


def test_a_worker_has_no_terminal():
    confined("""
ours, theirs = os.openpty()
if not os.fork():
    os.setsid()
    import fcntl, termios
    fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
    for fd in range(3): os.dup2(theirs, fd)
    os.close(theirs)
    worker = os.fork()
    if not worker:
        try:
            sandbox.leave_terminal()
            assert [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3
            assert refused(lambda: os.open("/dev/tty", os.O_RDWR), errno.ENXIO)
        except BaseException:
            os._exit(1)
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
assert os.wait()[1] == 0
""")


def test_files_beyond_the_named_ones_are_refused(tmp_path):
    if not sandbox.landlock_version():
        pytest.skip("this kernel has no Landlock")
    inside, outside = tmp_path / "in", tmp_path / "out"
    for each in (inside, outside):
        each.mkdir()
        (each / "a").write_text("a")
    (tmp_path / "single").write_text("s")
    (tmp_path / "link").symlink_to(outside / "a")
    confined(
        """
base = sys.argv[1]
held = open(f"{base}/out/a")
sandbox.no_new_privileges()
sandbox.restrict_files([f"{base}/in", f"{base}/single"])
assert open(f"{base}/in/a", "r+").read() == "a"
open(f"{base}/in/new", "w").close(); os.rename(f"{base}/in/new", f"{base}/in/newer")
assert open(f"{base}/single", "r+").read() == "s"
assert held.read() == "a"
for path in ("out/a", "link", "in/../out/a"):
    assert refused(lambda: open(f"{base}/{path}"), errno.EACCES), path
assert refused(lambda: open(f"{base}/out/new", "w"), errno.EACCES)
assert refused(lambda: open("/etc/passwd"), errno.EACCES)
import json.tool  # modules can still be read
""",
        str(tmp_path),
    )


def test_no_signal_leaves_the_process():
    if sandbox.landlock_version() < 6:
        pytest.skip("this kernel's Landlock has no scopes")
    confined("""
sandbox.no_new_privileges()
sandbox.restrict_files(None)
assert refused(lambda: os.kill(os.getppid(), 0), errno.EPERM)
os.kill(os.getpid(), 0)
""")


def test_a_process_dies_with_its_parent():
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            sandbox.die_with_parent()
            os.write(write, b"ready")
            signal.pause()
        os._exit(0 if os.read(read, 5) == b"ready" else 1)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0
    assert os.read(read, 1) == b"", "the pipe's last writer is gone"
    os.close(read)


@pytest.mark.parametrize(
    ("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)]
)
def test_the_filter_jumps_to_where_it_should(machine, architecture):
    """Read as the kernel does (linux/net/core/filter.c, classic BPF)."""
    program = list(struct.iter_unpack("<HBBI", sandbox.seccomp_program(machine, 4711)))
    tests = {0x15: int.__eq__, 0x35: int.__ge__, 0x45: lambda value, k: bool(value & k)}

    def run(number, arch=architecture, first=0):
        at = value = 0
        while True:
            code, yes, no, k = program[at]
            if code == 0x20:
                value = {0: number, 4: arch, 16: first & 0xFFFFFFFF}[k]
            elif code == 0x06:
                return k
            else:
                at += yes if tests[code](value, k) else no
            at += 1

    column = ("x86_64", "aarch64").index(machine)
    forbidden = {numbers[column] for numbers in sandbox._FORBIDDEN.values()} - {0}
    conditions = {each[0][column]: each[1:] for each in sandbox._ON_CONDITION.values()}
    for number in range(600):
        if number == 435:
            assert run(number) == 0x50026, "ENOSYS, so that libraries take what can be looked at"
        elif number in conditions:
            test, value = conditions[number]
            for first in (0, 1, -1, 4711, 4712, 17, 0x10000011, 0x10000, 0x7D0F00):
                mine = first & 0x10000 if test == "any of" else first == (4711, value)[value >= 0]
                right = 0x7FFF0000 if mine else 0x50001
                assert run(number, first=first) == right, (number, first)
        else:
            assert run(number) == (0x50001 if number in forbidden else 0x7FFF0000), number
    assert run(0x40000000 | 1) == 0x50001
    assert run(1, arch=0x40000003) == 0x80000000
    assert sandbox.seccomp_program("vax", 1) == b""

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
    program = list(struct.iter_unpack("<HBBI", sandbox.seccomp_program(machine)))

    def run(number, arch=architecture):
        at = value = 0
        while True:
            code, yes, no, k = program[at]
            if code == 0x20:
                value = arch if k == 4 else number
            elif code == 0x06:
                return k
            else:
                at += yes if (value == k if code == 0x15 else value >= k) else no
            at += 1

    column = ("x86_64", "aarch64").index(machine)
    forbidden = {numbers[column] for numbers in sandbox._FORBIDDEN.values()} - {0}
    for number in range(600):
        assert (run(number) == 0x50001) is (number in forbidden), number
        assert run(number) in (0x50001, 0x7FFF0000)
    assert run(0x40000000 | 1) == 0x50001
    assert run(1, arch=0x40000003) == 0x80000000
    assert sandbox.seccomp_program("vax") == b""

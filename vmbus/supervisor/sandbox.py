"""What a worker gives up before it looks at anything that a VMM has sent.

All of it is open to an ordinary user, and nothing needs a library:

=====================  ============================================================================
no new privileges      set-user-ID programs have no effect (prctl(2), PR_SET_NO_NEW_PRIVS)
capabilities           all but those that opening an image may need; of use if the server is root
system calls           those that start programs or processes, look into other ones, signal them or
                       change their limits and priorities, change mounts, name spaces, the kernel
                       or its keys end with EPERM (seccomp(2))
Landlock               no signal and no abstract socket beyond the worker; with ``--allow``, no
                       file beyond the named directories (landlock(7), Linux 5.13 and later)
limits                 no core dump, which would have the guest's memory in it
=====================  ============================================================================

A back-end may still open files and sockets: plug-ins do. What a worker is left with is the guest's
memory, its disks, and what the server's user may open.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable

from vmbus.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *values: int | ctypes.c_void_p | bytes) -> None:
    padded = (*values, 0, 0, 0, 0)[:4]
    converted = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in padded]
    if _libc.prctl(option, *converted):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def set_name(name: str) -> None:
    """Give this process the name that ``ps`` and ``top`` show, at most 15 bytes."""
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_NAME, name.encode()[:15] + b"\0")


def leave_terminal() -> None:
    """Give up the server's terminal, input and output. Must not be a process group's leader.

    Whoever has a terminal can type into it, commands for the shell of whoever started the server
    among others (TIOCSTI, ioctl_tty(2)).
    """
    os.setsid()
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)
    os.close(nowhere)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, whatever it is doing then."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # too late
        os.kill(os.getpid(), signal.SIGKILL)


# -- seccomp -------------------------------------------------------------------------------------

# Numbers by machine (linux/arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic),
# 0 where there is no such call; read(2), the 0 of one, is not in here.
_FORBIDDEN = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsmount": (432, 432), "mount_setattr": (442, 442), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "bpf": (321, 280),
    "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "acct": (163, 89),
    "quotactl": (179, 60), "open_by_handle_at": (304, 265), "pidfd_getfd": (438, 438),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "iopl": (172, 0),
    "ioperm": (173, 0), "fork": (57, 0), "vfork": (58, 0), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and AUDIT_ARCH (linux/audit.h)."""

_MINE = -1
"""Stands for this process's id."""
_CLONE_THREAD = 0x00010000
# Calls of which the first argument decides (its lower half): threads but no processes, which name
# spaces come with; this process and none of its user's other ones, whose limits, say, it could
# make so low that the kernel ends them.
_ON_CONDITION = {
    "clone": ((56, 220), "any of", _CLONE_THREAD), "kill": ((62, 129), "is", _MINE),
    "tgkill": ((234, 131), "is", _MINE), "prlimit64": ((302, 261), "is", 0),
    "sched_setparam": ((142, 118), "is", 0), "sched_setscheduler": ((144, 119), "is", 0),
    "sched_setaffinity": ((203, 122), "is", 0), "sched_setattr": ((314, 274), "is", 0),
}  # fmt: skip
_CLONE3 = 435
"""Has its flags in memory, where no filter sees them: without it, libraries take ``clone``."""

_LD_W_ABS, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32_BIT = 0x40000000


def seccomp_program(machine: str, pid: int) -> bytes:
    """Return the classic BPF program for a machine, empty if we do not know its numbers.

    Args:
        machine: As ``uname -m`` says it.
        pid: Of the process that it is for.
    """
    if machine not in _MACHINES:
        return b""
    column, audit_arch = _MACHINES[machine]
    numbers = sorted(filter(None, (each[column] for each in _FORBIDDEN.values())))
    conditions: list[tuple[int, int, int, int]] = []
    for both, test, value in _ON_CONDITION.values():
        conditions += [
            (_JEQ, 0, 4, both[column]),
            (_LD_W_ABS, 0, 0, 16),  # seccomp_data.args[0], little endian
            (_JEQ if test == "is" else _JSET, 0, 1, pid if value == _MINE else value),
            (_RET, 0, 0, _ALLOW),
            (_RET, 0, 0, _ERRNO | errno.EPERM),
        ]
    conditions += [(_JEQ, 0, 1, _CLONE3), (_RET, 0, 0, _ERRNO | errno.ENOSYS)]
    refuse = len(conditions) + len(numbers) + 1
    code = [
        (_LD_W_ABS, 0, 0, 4),  # seccomp_data.arch
        (_JEQ, 1, 0, audit_arch),
        (_RET, 0, 0, _KILL),
        (_LD_W_ABS, 0, 0, 0),  # seccomp_data.nr
        (_JGE, refuse, 0, _X32_BIT),
    ]
    code += conditions
    refuse -= len(conditions) + 1
    code += [(_JEQ, refuse - at, 0, number) for at, number in enumerate(numbers)]
    code += [(_RET, 0, 0, _ALLOW), (_RET, 0, 0, _ERRNO | errno.EPERM)]
    return b"".join(struct.pack("<HBBI", *each) for each in code)


def forbid_system_calls() -> None:
    """Install the filter; needs :func:`no_new_privileges`. Nothing happens on other machines."""
    program = seccomp_program(platform.machine(), os.getpid())
    if not program:
        return
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, 2, header)


# -- capabilities --------------------------------------------------------------------------------

_KEPT = {0, 1, 2, 3}
"""CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER: to open and make images as before."""
_CAPABILITY_VERSION_3 = 0x20080522


def drop_capabilities() -> None:
    """Keep those capabilities only that files need."""
    for number in range(64):
        if number not in _KEPT:
            with contextlib.suppress(OSError):  # we have none, or the kernel has no such
                _prctl(_PR_CAPBSET_DROP, number)
    kept = sum(1 << number for number in _KEPT)
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    if _libc.capget(header, data):
        return
    effective, permitted, _, *rest = struct.unpack("<6I", data.raw)
    del rest
    low = (effective & kept, permitted & kept, 0)
    _libc.capset(header, struct.pack("<6I", *low, 0, 0, 0))


# -- Landlock ------------------------------------------------------------------------------------

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
_EXECUTE = 1
_READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_SOCK = 1 << 2, 1 << 3, 1 << 5, 1 << 9
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""File system rights that each version of the interface knows; EXECUTE is the first."""
_SCOPES = 3
"""Abstract sockets and signals (version 6)."""


def landlock_version() -> int:
    """Return the version of Landlock's interface, 0 if there is none."""
    return max(0, int(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)))


def restrict_files(allowed: Iterable[str] | None, *, sockets: Iterable[str] = ()) -> None:
    """Have the kernel refuse files beyond some directories, and signals beyond this process.

    Needs :func:`no_new_privileges`. What is open stays open. What Python itself needs (its
    modules, ``/proc`` and ``/sys``) can still be read.

    Args:
        allowed: Directories or files; None for no such limit.
        sockets: Directories in which sockets can be made, and files removed, and nothing else.

    The kernel takes files from the thread that asks, and those it starts then. So with ``allowed``,
    there may be no other: a VMM can have had one started, by what it sent.

    Raises:
        ConfigError: There are limits and this kernel has no Landlock, or one is not there, or this
            process has threads.
    """
    if allowed is not None and len(os.listdir("/proc/self/task")) > 1:
        raise ConfigError("--allow: files cannot be refused to threads that are there already")
    version = landlock_version()
    if not version:
        if allowed is None:
            return
        raise ConfigError("--allow needs Landlock, which this kernel does not have (Linux 5.13)")
    # Whoever is in a domain looks into no process beyond it, also not through /proc/PID/mem; before
    # there were scopes, a domain took a right.
    rights = _RIGHTS[min(version, max(_RIGHTS))] if allowed is not None else _EXECUTE
    scopes = _SCOPES if version >= 6 else 0
    if scopes and allowed is None:
        rights = 0
    attributes = struct.pack("<QQQ", rights, 0, scopes)[: 24 if version >= 6 else 8]
    ruleset = int(_libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0))
    if ruleset < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        if allowed is not None:
            for path in allowed:
                _allow(ruleset, path, rights & ~_EXECUTE)
            for path in sockets:
                _allow(ruleset, path, _REMOVE_FILE | _MAKE_SOCK)
            for path in {*sys.path, sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/lib"}:
                with contextlib.suppress(ConfigError):
                    _allow(ruleset, path or ".", _READ_FILE | _READ_DIR)
        if _libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"--allow {path}: {error.strerror}") from error
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= _FILE_ONLY
        rule = struct.pack("<Qi", rights, fd)
        _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


# -- all of it -----------------------------------------------------------------------------------


def no_new_privileges() -> None:
    """See prctl(2), PR_SET_NO_NEW_PRIVS."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def confine() -> None:
    """Give up everything that does not depend on what the guest's disks are. For good."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    no_new_privileges()
    drop_capabilities()
    forbid_system_calls()

"""What ``vmbus doctor`` looks at, apart from KVM: see :mod:`vmbus.cli.kvm_checks` for that.

A check tries the thing itself, as the server would, rather than asking for version numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

from vmbus.cli.devices import find_plugins

ENOUGH_DESCRIPTORS = 4096
"""Open files for a few big guests: an open channel needs one or two."""

TUNGETFEATURES = 0x800454CF
"""linux/include/uapi/linux/if_tun.h"""
CAP_NET_ADMIN = 12
"""linux/include/uapi/linux/capability.h"""

TOOLS = {
    "qemu-system-x86_64": "boots the machine in which the tests run real guest kernels",
    "vng": "runs the tests with real guest kernels (virtme-ng)",
    "tshark": "shows captures",
}
"""Programs that help but are not needed."""


class Outcome(StrEnum):
    """How a check went."""

    OK = "ok"
    LIMITED = "limited"
    """It works, but not as well as it could."""
    MISSING = "missing"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    group: str
    name: str
    outcome: Outcome
    needed: bool = False
    """Whether nothing works without it."""
    found: str
    """What is there."""
    advice: str = ""
    """What to do about it; empty if all is well."""


SERVING = "serving guests"
DISKS = "disks"
NETWORK = "network"
TOOLBOX = "tools"

HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


def general_checks(directory: str) -> Iterator[Check]:
    """Look at everything but KVM.

    Args:
        directory: Where image files will be.
    """
    yield check_python()
    yield check_architecture(platform.machine())
    yield try_out("memory files with seals", try_memfd, "a Linux kernel 3.17 or newer is needed")
    yield try_out("eventfd", try_eventfd, "a Linux kernel with CONFIG_EVENTFD is needed")
    yield try_out(
        "seqpacket sockets that pass files",
        try_seqpacket,
        "a Linux kernel with CONFIG_UNIX is needed; a sandbox may forbid it",
    )
    yield check_descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield check_plugins()
    yield check_huge_pages()
    yield check_nowait(directory)
    yield check_tap("/dev/net/tun", effective_capabilities())
    for tool, purpose in TOOLS.items():
        yield check_tool(tool, purpose)


def check_python() -> Check:
    """CPython, because the memory accesses of others are not what we rely on."""
    name, version = platform.python_implementation(), platform.python_version()
    tried = name == "CPython" and sys.version_info >= (3, 11)
    return Check(
        group=SERVING,
        name="Python",
        outcome=Outcome.OK if tried else Outcome.LIMITED,
        needed=True,
        found=f"{name} {version}",
        advice="" if tried else "this is tested with CPython 3.11 and newer only",
    )


def check_architecture(machine: str) -> Check:
    """x86-64: the rings rely on its order of memory accesses (:mod:`vmbus.memory`)."""
    good = machine in {"x86_64", "AMD64"}
    return Check(
        group=SERVING,
        name="processor",
        outcome=Outcome.OK if good else Outcome.MISSING,
        needed=True,
        found=machine,
        advice="" if good else "rings need the memory model of x86-64; use such a machine",
    )


def try_out(name: str, attempt: Callable[[], str], advice: str) -> Check:
    """Report whether ``attempt`` works; it returns what it found, or raises OSError."""
    try:
        found = attempt()
    except (OSError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Check(
            group=SERVING,
            name=name,
            outcome=Outcome.MISSING,
            needed=True,
            found=reason,
            advice=advice,
        )
    return Check(group=SERVING, name=name, outcome=Outcome.OK, needed=True, found=found)


def try_memfd() -> str:
    """Make a memory file that cannot shrink, as guest memory has to be."""
    fd = os.memfd_create("vmbus-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        try:
            os.truncate(fd, 0)
        except PermissionError:
            return "works"
        raise OSError(errno.ENOTSUP, "the seal does not hold")
    finally:
        os.close(fd)


def try_eventfd() -> str:
    """Ring and answer a doorbell."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        os.eventfd_write(fd, 1)
        if os.eventfd_read(fd) != 1:
            raise OSError(errno.ENOTSUP, "it does not count")
    finally:
        os.close(fd)
    return "works"


def try_seqpacket() -> str:
    """Send a file from one end of a socket to the other."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        socket.send_fds(one, [b"x"], [one.fileno()])
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        for fd in fds:
            os.close(fd)
        if len(fds) != 1:
            raise OSError(errno.ENOTSUP, "the file did not arrive")
    return "works"


def check_descriptors(soft: int, hard: int) -> Check:
    """How many files may be open; the server raises the soft limit by itself."""
    unlimited = resource.RLIM_INFINITY
    enough = hard == unlimited or hard >= ENOUGH_DESCRIPTORS
    limits = ["unlimited" if limit == unlimited else str(limit) for limit in (soft, hard)]
    return Check(
        group=SERVING,
        name="open files",
        outcome=Outcome.OK if enough else Outcome.LIMITED,
        needed=True,
        found=f"{limits[0]}, can be raised to {limits[1]}",
        advice=""
        if enough
        else f"big guests need more: raise the hard limit (ulimit -Hn {ENOUGH_DESCRIPTORS} as "
        "root, or LimitNOFILE= of the unit)",
    )


def check_plugins() -> Check:
    """Whether all plug-ins can be imported."""
    plugins = find_plugins()
    counted = ", ".join(
        f"{count} {kind if kind == 'device' else f'{kind} back-end'}{'s' * (count != 1)}"
        for kind, count in Counter(plugin.kind for plugin in plugins).items()
    )
    broken = [f"{plugin.kind} {plugin.name}" for plugin in plugins if plugin.error is not None]
    if broken:
        outcome, advice = Outcome.LIMITED, f"see vmbus devices for {', '.join(broken)}"
    elif not any(plugin.kind == "device" for plugin in plugins):
        outcome, advice = (
            Outcome.MISSING,
            "install the package: pip install vmbus, or pip install -e .",
        )
    else:
        outcome, advice = Outcome.OK, ""
    return Check(
        group=SERVING,
        name="plug-ins",
        outcome=outcome,
        needed=True,
        found=f"{counted or 'none'}, {len(broken)} broken",
        advice=advice,
    )


def check_huge_pages(setting: str = HUGE_PAGES) -> Check:
    """Whether shared memory has huge pages for who asks (madvise), as we do for guest memory."""
    try:
        text = Path(setting).read_text()
        found = text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        found = "unknown to this kernel"
    good = found in {"always", "within_size", "advise", "force"}
    return Check(
        group=SERVING,
        name="huge pages for guest memory",
        outcome=Outcome.OK if good else Outcome.LIMITED,
        found=found,
        advice="" if good else f"guests are faster with: echo advise | sudo tee {setting}",
    )


def check_nowait(directory: str) -> Check:
    """Whether cached reads of files there are served without a worker thread (RWF_NOWAIT)."""
    advice = "reads go through worker threads, which is slower; ext4, xfs and btrfs can do it"
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            try:
                os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                # It knows the flag, and just has nothing in its cache.
                found, outcome = "works", Outcome.OK
            except OSError as error:
                found, outcome = str(error.strerror), Outcome.LIMITED
            else:
                found, outcome = "works", Outcome.OK
    except OSError as error:
        found, outcome = f"cannot make a file there: {error.strerror}", Outcome.LIMITED
        advice = "name the directory of your images: vmbus doctor DIRECTORY"
    return Check(
        group=DISKS,
        name=f"reads that do not wait, in {directory}",
        outcome=outcome,
        found=found,
        advice=advice if outcome is not Outcome.OK else "",
    )


def effective_capabilities(status: str = "/proc/self/status") -> int:
    """Return this process's effective capabilities as a bit mask (proc(5)); 0 if unknown."""
    with contextlib.suppress(OSError, ValueError), open(status, encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "CapEff":
                return int(value, 16)
    return 0


def check_tap(path: str, capabilities: int) -> Check:
    """Whether network devices can be connected to the host."""
    outcome, advice = Outcome.OK, ""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        found, outcome, advice = "not there", Outcome.MISSING, "load it: sudo modprobe tun"
    except OSError as error:
        found, outcome = str(error.strerror), Outcome.MISSING
        advice = f"make {path} readable and writable for you"
    else:
        try:
            fcntl.ioctl(fd, TUNGETFEATURES, bytearray(4))
        except OSError as error:
            found, outcome = f"not a TUN device: {error.strerror}", Outcome.MISSING
            advice = f"make it anew: mknod {path} c 10 200"
        else:
            found = "works"
            if not capabilities >> CAP_NET_ADMIN & 1:
                found, outcome = "works with interfaces that exist", Outcome.LIMITED
                advice = "make interfaces beforehand: sudo ip tuntap add NAME mode tap user $USER"
        finally:
            os.close(fd)
    return Check(group=NETWORK, name="TAP", outcome=outcome, found=found, advice=advice)


def check_tool(name: str, purpose: str) -> Check:
    """Whether an optional program is there."""
    path = shutil.which(name)
    return Check(
        group=TOOLBOX,
        name=name,
        outcome=Outcome.OK if path else Outcome.MISSING,
        found=path or "not installed",
        advice="" if path else f"optional: {purpose}",
    )

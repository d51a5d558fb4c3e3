"""The outer machine: an emulated one whose KVM has Hyper-V support, for machines that have none.

virtme-ng boots Debian's kernel in QEMU on this machine's own file system, without hardware
virtualization: QEMU emulates AMD's, so the kernel in there has a full KVM. Emulation makes
everything slower, and the way to this machine's files is slower still (9p, each lookup a round
trip of its own); therefore everything that the tests read goes in as a disk: the code, Python's
library and the guests' files. It is mounted over the originals, so all paths are as outside.
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.guest.rig.assets import ENVIRONMENT, Assets
from tests.guest.rig.claims import ENVIRONMENT as CLAIMS_ENVIRONMENT, Claims
from tests.guest.rig.code_tree import check_space, copy_repository, copy_tree
from tests.guest.rig.contained import contained
from tests.guest.rig.packages import RigError, run, say
from tests.support.patience import LOOK, PATIENCE

REPOSITORY = Path(__file__).parents[3]
CPUS = 1
"""More are faster by a quarter, and end in a panic now and then: docs/explanation/nested-rig.md."""
MEMORY = "6G"
DISK_SIZE = "8G"
"""Sparse; holds the disks of tests too."""
FREE_SPACE = 4 << 30
"""Bytes: the disk with everything on it, twice for a moment, and room for what tests write."""
ATTEMPTS = 3
SILENCE = 6 * PATIENCE
"""Seconds without a word of the command after which the machine is given up."""
MOUNT_POINT = Path("/run/rig")
OUTER_PARAMETERS = "mitigations=off tsc=reliable clocksource=tsc"
"""The emulated processor has no flaws to be careful about, and its TSC is steady, which Linux does
not believe on its own. Without, every look at the clock is an access to a timer chip, and KVM gives
guests no clock that they can read without an exit: with it, a guest does three times as much."""
_UNUSED_LIBRARY = ("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages",
                   "dist-packages", "turtledemo", "pydoc_data")  # fmt: skip
_UNUSED_PACKAGES = ("mypy", "mypyc", "ruff", "pip", "scapy", "*.so.dbg", "typeshed")
OUTPUT = Path("/run/rig-output")
"""What the outer machine shares with us, wherever it is outside."""
CLAIMS = Path("/run/rig-claims")
"""What it shares with other outer machines."""
_SUMMARY = re.compile(rb"^=+ (?:FAILURES|ERRORS|rerun|short|slowest|\d+ )", re.MULTILINE)


def _make_disk(path: Path, assets: Assets) -> list[tuple[str, str]]:
    """Make the disk image. Returns what is to be mounted where: paths on it and outside."""
    mounts: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tree = Path(folder) / "tree"
        library = Path(sysconfig.get_path("stdlib"))
        code, prefix = tree / "code", Path(sys.prefix)
        copy_repository(REPOSITORY, code)
        # Nothing in there may write: each program would compile all that it imports.
        for name in ("vmbus", "devices", "tests"):
            compileall.compile_dir(code / name, quiet=2)
        if prefix.is_relative_to(REPOSITORY):
            (code / prefix.relative_to(REPOSITORY)).mkdir(parents=True)  # to be mounted over
        copy_tree(prefix, tree / "prefix", _UNUSED_PACKAGES)
        copy_tree(library, tree / "library", _UNUSED_LIBRARY)
        mounts += [("code", str(REPOSITORY)), ("prefix", str(prefix)), ("library", str(library))]
        files = tree / "files"
        files.mkdir()
        inside: dict[str, Any] = {"scratch": MOUNT_POINT / "scratch"}
        for name in Assets.FILES:
            file: Path = getattr(assets, name)
            run("cp", "--reflink=auto", "--sparse=always", file, files / name)
            inside[name] = MOUNT_POINT / "files" / name
        (tree / "scratch").mkdir()
        dataclasses.replace(assets, **inside).save(files / "assets.json")
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", tree, path, DISK_SIZE)
    return mounts


def _script(mounts: Sequence[tuple[str, str]], binds: Mapping[Path, Path], command: Sequence[str],
            environment: Mapping[str, str]) -> str:  # fmt: skip
    """Return what the outer machine runs.

    The directory for temporary files comes before what is mounted over its originals, and shared
    directories get another place before that: each may be below it.
    """
    temporary = shlex.quote(tempfile.gettempdir())
    lines = [
        "cd /",
        "modprobe -a virtio_blk kvm-amd loop tun 2>/dev/null",
        f"mkdir -p {MOUNT_POINT} {shlex.join(map(str, binds.values()))}",
        f"mount /dev/vda {MOUNT_POINT} || exit 1",
        *(f"mount --bind {shlex.quote(str(at))} {there} || exit 1" for at, there in binds.items()),
        f"mount -t tmpfs temporary {temporary} || exit 1",
        *(
            f"mkdir -p {shlex.quote(at)}; "
            f"mount --bind {MOUNT_POINT}/{name} {shlex.quote(at)} || exit 1"
            for name, at in mounts
        ),
        # Guest memory has huge pages then, as QEMU's has anyway.
        "echo advise >/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "ulimit -n 65536",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"export {ENVIRONMENT}={MOUNT_POINT}/files/assets.json",
        f"cd {shlex.quote(str(REPOSITORY))}",
        f"{shlex.join(command)} </dev/null >{OUTPUT}/log 2>&1",
        f"echo $? >{OUTPUT}/exit.part",
        f"mv {OUTPUT}/exit.part {OUTPUT}/exit",
    ]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _run_folder(cache: Path) -> Iterator[str]:
    """Make a directory for one run, and remove those of runs that were killed."""
    for old in cache.glob("run-*"):
        # A run that is under way holds its lock; one without a lock has only just begun.
        with contextlib.suppress(OSError), open(old / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=cache) as folder,
        open(Path(folder) / "lock", "wb") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder


def run_inside(
    command: Sequence[str],
    assets: Assets,
    *,
    kernel: Path,
    busybox: Path,
    cache: Path,
    environment: Mapping[str, str],
    cpus: int = CPUS,
    machines: int = 1,
) -> int:
    """Run a command in an outer machine, with its output on ours.

    An outer machine that comes to an end on its own is no fault of the command's. Another one takes
    its place, twice at most.

    Args:
        command: Runs in the repository, with the same paths as here.
        assets: As they are here; the command finds them through
            :data:`tests.guest.rig.assets.ENVIRONMENT`.
        kernel: The outer machine's bzImage, in an unpacked package that has its modules too.
        busybox: A static one, for the initramfs that mounts this machine's files.
        cache: The rig's; the disk image is made there.
        environment: For the command.
        cpus: Processors of an outer machine.
        machines: How many there are. Each runs the command, which shares out what it has to do by
            :mod:`tests.guest.rig.claims`.

    Returns:
        The command's exit code; the largest of several.

    Raises:
        RigError: There is no outer machine to be had.
    """
    program = Path(sys.prefix) / "bin/vng"
    if not program.exists():
        raise RigError("virtme-ng is missing; make guest-test installs it")
    arguments = [
        *(str(program), "--qemu", str(assets.emulator), "--run", str(kernel), "--disable-kvm"),
        *("--verbose", "--user", "root", "--memory", MEMORY, "--cpus", str(cpus)),
        *("--busybox", str(busybox), "--append", OUTER_PARAMETERS),
        "--qemu-opts=-cpu EPYC,+svm,+npt",
    ]
    with _run_folder(cache) as folder, contextlib.ExitStack() as stack:
        check_space(Path(folder), machines * FREE_SPACE)
        common = _Common(Path(folder), command, environment, arguments, shared_out=machines > 1)
        say("making the outer machine's disk")
        common.mounts = _make_disk(common.disk, assets)
        running = [
            stack.enter_context(contextlib.closing(_runs(common, number)))
            for number in range(1, machines + 1)
        ]
        code = 0
        while running:
            for each in tuple(running):
                try:
                    next(each)
                except StopIteration as end:
                    running.remove(each)
                    code = max(code, end.value)
            time.sleep(LOOK)
        if machines > 1:
            say(f"{Claims(common.claims, 0).finished} tests have run, on {machines} machines")
    return code


class _Common:
    """What the machines of a run have in common."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        arguments: Sequence[str],
        *,
        shared_out: bool,
    ) -> None:
        self.folder = folder
        self.command = command
        self.environment = environment
        self.arguments = arguments
        """Of virtme-ng."""
        self.shared_out = shared_out
        """Whether each does a part only."""
        self.disk = folder / "disk.img"
        self.mounts: list[tuple[str, str]] = []
        self.claims = folder / "claims"
        self.claims.mkdir()


def _runs(common: _Common, number: int) -> Generator[None, None, int]:
    """Run the command in a machine; yields while it does. Returns its exit code."""
    claims = Claims(common.claims, number)
    for attempt in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(dir=common.folder) as folder:
            code, console = yield from _runs_once(common, number, Path(folder))
        if code is not None:
            return code
        message = f"the outer machine came to an end:\n{console}"
        if attempt == ATTEMPTS - 1:
            raise RigError(message)
        again = "".join(f"\nonce more: {test}" for test in claims.give_back())
        say(f"{message}{again}\nanother one is started")
    raise AssertionError


def _runs_once(
    common: _Common, number: int, folder: Path
) -> Generator[None, None, tuple[int | None, str]]:
    """As :func:`_runs`, once. Returns the exit code, if there is one, and the console's end."""
    shared, disk, console = folder / "shared", folder / "disk.img", folder / "console"
    shared.mkdir()
    run("cp", "--reflink=auto", "--sparse=always", common.disk, disk)
    script = shared / "run.sh"
    environment = dict(common.environment)
    if common.shared_out:
        environment[CLAIMS_ENVIRONMENT] = Claims(CLAIMS, number).environment
    binds = {shared: OUTPUT, common.claims: CLAIMS}
    script.write_text(_script(common.mounts, binds, common.command, environment))
    say("starting the outer machine" + (f" {number}" if common.shared_out else ""))
    with (
        open(console, "wb") as output,
        contained(
            [
                *common.arguments,
                *(word for each in binds for word in ("--rwdir", str(each))),
                *("--disk", str(disk), "--", f"sh {shlex.quote(str(script))}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={
                **os.environ,
                "PATH": f"{Path(common.arguments[0]).parent}:{os.environ['PATH']}",
            },
        ) as process,
    ):
        code = yield from _follows(process, shared, console, whole=common.shared_out)
    return code, "\n".join(console.read_text(errors="replace").splitlines()[-40:])


def _follows(
    process: subprocess.Popen[bytes], shared: Path, console: Path, *, whole: bool
) -> Generator[None, None, int | None]:
    """Copy the log to standard output until the command or the machine ends.

    Args:
        process: The emulator.
        shared: Where the log is.
        console: What the machine itself says.
        whole: There are others: say whole lines only, and the summary in one piece.

    Returns:
        The command's exit code; None if there is none, and there will not be.
    """
    log = shared / "log"
    position = 0
    data = b""
    heard = time.monotonic()
    while True:
        ended = process.poll() is not None or b"Kernel panic" in console.read_bytes()
        finished = (shared / "exit").exists()
        ended = ended or time.monotonic() > heard + SILENCE
        if log.exists():
            with open(log, "rb") as file:
                file.seek(position)
                new = file.read()
            if new:
                heard = time.monotonic()
            position += len(new)
            data += new
            ready = len(data) if finished or ended or not whole else _ready(data)
            sys.stdout.buffer.write(data[:ready])
            sys.stdout.buffer.flush()
            data = data[ready:]
        if finished:
            return int((shared / "exit").read_text())
        if ended:
            return None
        yield


def _ready(data: bytes) -> int:
    """Return how many bytes of a log can be said: whole lines, before a summary begins."""
    end = data.rfind(b"\n") + 1
    summary = _SUMMARY.search(data)
    return min(end, summary.start()) if summary else end

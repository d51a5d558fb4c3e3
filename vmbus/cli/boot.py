"""``vmbus boot``: run Linux on KVM with a bus of ours.

The VMM is a client of the server like any other. Without ``--socket`` it starts a server for
itself, as a process of its own, connected by a socket that nobody else can reach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmbus.cli.completion import complete_device, complete_endpoint, complete_file, complete_spec
from vmbus.cli.logs import logging_to
from vmbus.cli.params import Number, parse_size
from vmbus.cli.program import EXIT_INTERRUPTED, EXIT_USAGE, Failure, UsageFailure
from vmbus.errors import AttachError, ConfigError
from vmbus.wire.versions import Version

if TYPE_CHECKING:
    from vmbus.kvm.bzimage import EntryState
    from vmbus.kvm.outcome import End
    from vmbus.memory import GuestMemory

_log = logging.getLogger("vmbus.kvm")

DEFAULT_APPEND = "console=ttyS0"
SILENCE = 20.0
"""Seconds without a first word of the guest, after which something may be wrong. A kernel on a
machine that works has said something within one."""
SERVER_PATIENCE = 120
"""Seconds for a server to start, or for one of our own to end after the guest. A machine that is
itself emulated needs most of a minute to load the program."""


@click.command(
    epilog="Exit codes: 0 the guest switched itself off; 1 it could not go on here; 2 the command "
    "line is wrong; 3 the guest panicked; 4 it triple-faulted; 130 ended from the keyboard.\n\n"
    "Examples:\n\n"
    "\b\n"
    "  vmbus boot --kernel vmlinuz --initrd initrd.img --disk raw:disk.img \\\n"
    "      --append 'console=ttyS0 root=/dev/sda1'\n"
    "  vmbus boot --kernel vmlinuz --socket /run/vmbus.sock --cpus 4 --memory 4G"
)
@click.option(
    "--kernel",
    required=True,
    metavar="BZIMAGE",
    shell_complete=complete_file,
    help="The Linux kernel.",
)
@click.option(
    "--initrd", metavar="FILE", shell_complete=complete_file, help="The initial RAM disk."
)
@click.option(
    "--append",
    default=DEFAULT_APPEND,
    show_default=True,
    metavar="TEXT",
    help="The kernel's command line.",
)
@click.option(
    "--memory",
    type=parse_size,
    default="1G",
    show_default=True,
    metavar="SIZE",
    help="How much of it the guest has.",
)
@click.option("--cpus", type=Number(1, 254), default=1, show_default=True, help="Processors.")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="SPEC",
    shell_complete=complete_spec,
    help="A disk, scheme:[options]target; may be repeated. See vmbus devices.",
)
@click.option(
    "--net",
    "nets",
    multiple=True,
    metavar="SPEC",
    shell_complete=complete_endpoint,
    help="A network adapter, scheme:[options]target; may be repeated.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="'NAME [OPTION=VALUE]... [SPEC]...'",
    shell_complete=complete_device,
    help="Another device, as for vmbus serve.",
)
@click.option(
    "--socket",
    "socket_path",
    metavar="PATH",
    shell_complete=complete_file,
    help="Attach to this server instead of starting one.",
)
@click.option("--name", default="guest", show_default=True, help="What the server calls the guest.")
@click.option(
    "--synic",
    type=click.Choice(["auto", "kernel", "user"]),
    default="auto",
    show_default=True,
    help="Who has the guest's interrupt controller for VMBus: KVM, or this program.",
)
@click.option(
    "--max-version",
    type=click.Choice([str(version) for version in Version]),
    metavar="VERSION",
    help="Newest VMBus version that the guest may use.",
)
@click.option(
    "--on-panic",
    type=click.Choice(["exit", "continue"]),
    default="exit",
    show_default=True,
    help="What happens when the guest reports a panic: the end, or what the guest does then, "
    "such as starting a crash kernel.",
)
@click.option("-v", "--verbose", count=True, help="Log more to standard error.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    kernel: str,
    initrd: str | None,
    append: str,
    memory: int,
    cpus: int,
    disks: tuple[str, ...],
    nets: tuple[str, ...],
    devices: tuple[str, ...],
    socket_path: str | None,
    name: str,
    synic: str,
    max_version: str | None,
    on_panic: str,
    verbose: int,
) -> None:
    """Boot Linux on /dev/kvm, attached to a VMBus server.

    The guest's serial console is standard input and output. On a terminal, Ctrl-] ends the guest;
    every other key is the guest's.

    The kernel has to find its disks with hv_vmbus and hv_storvsc: in distributions these are
    modules, which belong into the initial RAM disk.
    """
    if socket_path is not None and (disks or nets or devices or max_version is not None):
        raise click.UsageError(
            "--disk, --net, --device and --max-version are the server's; with --socket, give them "
            "to vmbus serve"
        )
    with logging_to(sys.stderr, level=verbose - 1, as_json=False):
        load = _loader(kernel, initrd, append, memory, cpus)
        arguments = [f"--disk={disk}" for disk in disks]
        arguments += [f"--net={net}" for net in nets]
        arguments += [f"--device={device}" for device in devices]
        if max_version is not None:
            arguments.append(f"--max-version={max_version}")
        arguments += ["-" + "v" * verbose] if verbose else ["-q"]
        with _server(socket_path, arguments) as target:
            end = _run(
                target,
                load,
                memory=memory,
                cpus=cpus,
                name=name,
                synic=synic,
                panicked=_report_panic if on_panic == "continue" else None,
            )
    if end.text or end.outcome.value not in {0, EXIT_INTERRUPTED}:
        _report(end)
    ctx.exit(end.outcome.value)


def _report(end: End) -> None:
    text = f":\n{end.text}" if end.text else ""
    click.echo(f"vmbus: {end.outcome.words}{text}", err=True)


def _report_panic(text: str) -> None:
    from vmbus.kvm.outcome import End, Outcome

    _report(End(Outcome.PANIC, text))


def _loader(
    kernel: str, initrd: str | None, append: str, memory: int, cpus: int
) -> Callable[[GuestMemory], EntryState]:
    """Read the files, once; return what loads them, for each start of the guest."""
    from vmbus.kvm.bzimage import load_linux, parse_bzimage
    from vmbus.kvm.machine import ram_regions

    image = _read(kernel)
    parse_bzimage(image)
    ramdisk = _read(initrd) if initrd is not None else b""
    regions = ram_regions(memory)

    def load(guest: GuestMemory) -> EntryState:
        return load_linux(
            guest, image, cmdline=append, initrd=ramdisk, ram_regions=regions, vp_count=cpus
        )

    return load


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def _server(path: str | None, arguments: list[str]) -> Iterator[str | int]:
    """Yield what to attach to: a path, or a descriptor that changes owner."""
    if path is not None:
        yield path
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vmbus.cli"),
                *("serve", f"--fd={theirs.fileno()}", "--once", "--single-process"),
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            # Ctrl-C on the terminal is for the VMM, which says goodbye first.
            start_new_session=True,
        )
    try:
        yield ours.detach()
    except AttachError as error:
        if code := _wait(server):
            kind = UsageFailure if code == EXIT_USAGE else Failure
            raise kind("the server did not come up, see above") from error
        raise
    finally:
        code = _wait(server)
    if code:
        _log.warning("the server ended with exit code %d", code)


def _wait(server: subprocess.Popen[bytes]) -> int:
    try:
        return server.wait(SERVER_PATIENCE)
    except subprocess.TimeoutExpired:
        server.terminate()
        return server.wait()


@contextlib.contextmanager
def _lookout(has_spoken: Callable[[], bool]) -> Iterator[None]:
    """Say so if the guest is silent for long, and what may be the reason."""

    def look() -> None:
        if not has_spoken():
            _say(f"the guest has written nothing for {SILENCE:g} s; {_reason()}")

    timer = threading.Timer(SILENCE, look)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _reason() -> str:
    """Try KVM as ``vmbus doctor`` does; the guest goes on meanwhile."""
    from vmbus.cli.checks import Outcome
    from vmbus.cli.kvm_checks import check_guest

    check = check_guest()
    text = f"{check.name} {check.found}"
    if check.outcome is Outcome.OK:
        return f"{text}. Its console may be another: Linux needs console=ttyS0 (--append)"
    return f"{text}. {check.advice[:1].upper()}{check.advice[1:]} (see vmbus doctor)"


def _say(text: str) -> None:
    # A raw terminal does not make a new line of "\n" alone.
    end = "\r\n" if sys.stderr.isatty() else "\n"
    with contextlib.suppress(OSError):
        click.echo(f"vmbus: {text}{end}", nl=False, err=True)


def _run(
    target: str | int,
    load: Callable[[GuestMemory], EntryState],
    *,
    memory: int,
    cpus: int,
    name: str,
    synic: str,
    panicked: Callable[[str], None] | None,
) -> End:
    from vmbus.kvm.console import Console
    from vmbus.kvm.life import SynicMode
    from vmbus.kvm.machine import Machine
    from vmbus.kvm.outcome import End, Outcome

    def interrupted() -> None:
        machine.end(End(Outcome.INTERRUPTED))

    first = threading.Event()

    def transmit(data: bytes) -> None:
        first.set()
        console.transmit(data)

    console = Console(sys.stdin.fileno(), sys.stdout.fileno(), interrupted)
    machine = Machine(
        memory,
        cpus,
        load,
        transmit,
        drained=console.drained,
        panicked=panicked,
        mode=SynicMode(synic),
    )
    with (
        contextlib.closing(machine),
        console.attached(machine.uart.receive),
        _lookout(first.is_set),
    ):
        if console.interactive:
            # Not before the terminal is raw: it would keep keys that are typed by then.
            _say("the console is the guest's; Ctrl-] ends it")
        return machine.run(target, name=name, timeout=SERVER_PATIENCE)

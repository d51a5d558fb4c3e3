"""``vmbus serve``: a server that VMMs attach their guests to.

Everything that can be wrong with the command line is found before the socket exists: back-ends
are opened and closed once, so that a mistake ends the program and not the first guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from vmbus.cli.logs import logging_to
from vmbus.cli.notify import notify
from vmbus.cli.params import parse_permissions, parse_size
from vmbus.cli.program import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PROTOCOL, Failure
from vmbus.errors import ConfigError, ProtocolError
from vmbus.wire.versions import Version

if TYPE_CHECKING:
    import trio

    from vmbus.attach.server import SocketTransport
    from vmbus.server import DeviceSetup, GuestServer

_log = logging.getLogger("vmbus.cli")

_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The command line of ``vmbus serve``, understood."""

    setups: tuple[DeviceSetup, ...]
    max_version: Version
    max_vps: int
    poll: float | None
    """Seconds; None for what is worth while on this machine."""
    path: str | None
    fd: int | None
    mode: str
    permissions: int
    once: bool
    trust_vmm: bool


@click.command(
    epilog="Examples:\n\n"
    "\b\n"
    "  vmbus serve --socket /run/vmbus.sock --disk raw:disk.img\n"
    "  vmbus serve --socket s --disk 'raw:[ro]base.img' --disk 'ram:[lun=5]1G'\n"
    "  vmbus serve --socket s --disk 'raw:[create=10G]{guest}.img'\n"
    "  vmbus serve --socket s --device 'NAME OPTION=on ram:64M ram:1G'"
)
@click.option("--socket", "path", metavar="PATH", help="Listen on a new socket file.")
@click.option(
    "--fd",
    type=click.IntRange(0),
    metavar="N",
    help="Use an inherited socket, listening or connected.",
)
@click.option("--stream", is_flag=True, help="Make a stream socket instead of a seqpacket one.")
@click.option(
    "--permissions",
    type=parse_permissions,
    default="600",
    show_default=True,
    metavar="OCTAL",
    help="Of the socket file: who may connect may attach a guest.",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="SPEC",
    help="A disk on each guest's SCSI controller, scheme:[options]target; may be repeated. "
    "{guest} in it is the guest's name. See vmbus devices.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="'NAME [OPTION=VALUE]... [SPEC]...'",
    help="Another device for each guest; one argument, split like a shell does.",
)
@click.option(
    "--subchannels",
    type=click.IntRange(0, 63),
    metavar="N",
    help="Channels that a guest may open beside the controller's first one.  [default: 15]",
)
@click.option(
    "--max-transfer",
    type=parse_size,
    metavar="SIZE",
    help="Largest transfer of one SCSI request.  [default: 2M]",
)
@click.option(
    "--monitor",
    is_flag=True,
    help="Ring the controller through the monitor page: slower, but OpenBSD needs it.",
)
@click.option(
    "--max-version",
    type=click.Choice([str(version) for version in Version]),
    default=str(max(Version)),
    show_default=True,
    metavar="VERSION",
    help="Newest VMBus version that guests may use.",
)
@click.option(
    "--max-vps",
    type=click.IntRange(1, 2048),
    metavar="N",
    default=2048,
    show_default=True,
    help="Refuse guests with more virtual processors.",
)
@click.option(
    "--poll",
    type=click.IntRange(0, 1_000_000),
    metavar="MICROSECONDS",
    help="Longest look for requests before sleeping; 0 sleeps at once; by default what is worth "
    "while on this machine, 200 or more.",
)
@click.option("--once", is_flag=True, help="Exit when the first guest is gone.")
@click.option(
    "--trust-vmm",
    is_flag=True,
    help="Accept guest memory that its owner could truncate, which would kill this server.",
)
@click.option("-v", "--verbose", count=True, help="Log more; twice: everything.")
@click.option("-q", "--quiet", count=True, help="Log warnings only; twice: errors only.")
@click.option("--json", "as_json", is_flag=True, help="Log JSON objects, one per line.")
@click.pass_context
def command(
    ctx: click.Context,
    *,
    path: str | None,
    fd: int | None,
    stream: bool,
    permissions: int,
    disks: tuple[str, ...],
    devices: tuple[str, ...],
    subchannels: int | None,
    max_transfer: int | None,
    monitor: bool,
    max_version: str,
    max_vps: int,
    poll: int | None,
    once: bool,
    trust_vmm: bool,
    verbose: int,
    quiet: int,
    as_json: bool,
) -> None:
    """Serve guests until stopped.

    VMMs connect to the socket and attach their guests; each guest gets a bus and devices of its
    own. Without --socket and --fd, the socket is one that systemd passes. What happens is logged
    to standard error, beginning with "listening on ..." when VMMs may connect.

    SIGTERM ends the server with exit code 0, Ctrl-C with 130. With --once, the exit code is 1 if
    the guest could not be served, and 3 if it broke a rule.
    """
    if path is not None and fd is not None:
        raise click.UsageError("--socket and --fd are two places; give one of them")
    if stream and path is None:
        raise click.UsageError(
            "--stream is about the socket that --socket makes; add --socket PATH"
        )
    options: dict[str, Any] = {}
    if subchannels is not None:
        options["max_subchannels"] = subchannels
    if max_transfer is not None:
        options["max_transfer_bytes"] = max_transfer
    if monitor:
        options["monitor"] = True
    with logging_to(sys.stderr, level=verbose - quiet, as_json=as_json):
        settings = Settings(
            setups=device_setups(disks, devices, options),
            max_version=Version.from_text(max_version),
            max_vps=max_vps,
            poll=None if poll is None else poll / 1e6,
            path=path,
            fd=fd,
            mode="stream" if stream else "seqpacket",
            permissions=permissions,
            once=once,
            trust_vmm=trust_vmm,
        )
        import trio

        ctx.exit(trio.run(run, settings))


def device_setups(
    disks: tuple[str, ...], devices: tuple[str, ...], options: dict[str, Any]
) -> tuple[DeviceSetup, ...]:
    """Return what each guest gets: a controller for ``--disk``, then every ``--device``.

    Without either there is an empty controller, for disks that are added later.
    """
    from vmbus.plugins.devices import device_with
    from vmbus.server import DeviceSetup

    setups = []
    if disks or not devices:
        setups.append(DeviceSetup(device_with("disk"), disks, options))
    elif options:
        raise click.UsageError(
            "--subchannels, --max-transfer and --monitor are about the controller of --disk; for "
            f"another, write --device '{device_with('disk')} monitor=on ...'"
        )
    setups.extend(parse_device(text) for text in devices)
    return tuple(setups)


def parse_device(text: str) -> DeviceSetup:
    """Parse ``NAME [OPTION=VALUE]... [SPEC]...``. Raises click.UsageError.

    An option's name has no ``:`` before its ``=``; everything from the first specification on is
    one. Values are numbers, sizes, on, off or words.
    """
    from vmbus.plugins.devices import DEVICES
    from vmbus.server import DeviceSetup

    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise click.UsageError(f"--device {text!r}: {str(error).lower()}") from None
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise click.UsageError(
            f"--device {text!r} does not begin with a device's name; installed are: "
            f"{', '.join(DEVICES.names())}; see vmbus devices"
        )
    options: dict[str, Any] = {}
    while words and ":" not in (option := words[0]).partition("=")[0]:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(
                f"--device {text!r}: {option!r} is neither OPTION=VALUE nor scheme:target"
            )
        options[key] = _value(value)
        del words[0]
    return DeviceSetup(name, tuple(words), options)


def _value(text: str) -> int | bool | str:
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    try:
        return parse_size(text)
    except click.BadParameter:
        return text


@contextlib.contextmanager
def listener(settings: Settings) -> Iterator[tuple[socket.socket, str]]:
    """Open the socket for the length of a ``with`` block; yields it and what to call it.

    Raises:
        ConfigError: There is none, too many, or something else in its place.
        Failure: It cannot be made.
    """
    from vmbus.attach.protocol.sockets import from_fd
    from vmbus.attach.server import from_systemd, open_listener

    if settings.path is not None:
        with contextlib.ExitStack() as stack:
            try:
                sock = stack.enter_context(
                    open_listener(
                        settings.path, mode=settings.mode, permissions=settings.permissions
                    )
                )
            except OSError as error:
                raise Failure(f"cannot listen on {settings.path}: {error.strerror}") from error
            yield sock, f"listening on {settings.path}"
        return
    if settings.fd is not None:
        sock = from_fd(settings.fd)
    else:
        passed = from_systemd()
        if not passed:
            raise ConfigError(
                "there is nowhere to listen; give --socket PATH or --fd N, or pass a socket "
                "from systemd"
            )
        if len(passed) > 1:
            raise ConfigError(f"systemd passed {len(passed)} sockets; give the unit one only")
        (sock,) = passed
    with sock:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        number = sock.fileno()
        yield (
            sock,
            f"listening on descriptor {number}" if listens else f"serving descriptor {number}",
        )


class _Guests:
    """Hands guests to the server, and keeps in mind how they fared."""

    def __init__(self, server: GuestServer) -> None:
        self._server = server
        self.failed = False
        self.faults = 0

    async def handle(self, transport: SocketTransport) -> None:
        try:
            await self._server.handle(transport)
        except ProtocolError:
            self.faults += 1
            raise
        except Exception:
            self.failed = True
            raise
        finally:
            self.faults += transport.dropped_messages

    @property
    def exit_code(self) -> int:
        """Exit code of a server that was there for one guest."""
        if self.failed:
            return EXIT_FAILED
        return EXIT_PROTOCOL if self.faults or self._server.faults else 0


async def run(settings: Settings) -> int:
    """Serve until the end of it all; returns the exit code. Is a checkpoint.

    Raises:
        ConfigError: The settings cannot be honoured.
        Failure: The socket cannot be made.
        OSError: The socket is broken.
    """
    import trio

    from vmbus.attach.server import ServerLimits, serve
    from vmbus.engine import EngineConfig
    from vmbus.host import BusConfig
    from vmbus.host.lookout import longest_worth_while
    from vmbus.server import GuestServer, raise_descriptor_limit

    longest = settings.poll
    if longest is None:
        longest = await longest_worth_while()
        _log.debug("looking for requests for up to %.0f us", longest * 1e6)
    config = BusConfig(engine=EngineConfig(max_version=settings.max_version), longest_look=longest)
    raise_descriptor_limit()
    server = GuestServer(settings.setups, config)
    await check(server)
    guests = _Guests(server)
    async with trio.open_nursery() as nursery:
        stop = _Stop(nursery.cancel_scope)
        await nursery.start(stop.run)
        with listener(settings) as (sock, words):
            _log.info("%s", words)
            notify("READY=1")
            await serve(
                sock,
                guests.handle,
                limits=ServerLimits(max_vps=settings.max_vps),
                trust_vmm=settings.trust_vmm,
                query=server.query,
                command=server.command,
                exit_after_guest=settings.once,
            )
        nursery.cancel_scope.cancel()
    notify("STOPPING=1")
    if stop.signal is not None:
        return EXIT_INTERRUPTED if stop.signal == signal.SIGINT else 0
    return guests.exit_code


async def check(server: GuestServer) -> None:
    """Open every back-end once. Is a checkpoint. Raises ConfigError."""
    try:
        await server.check()
    except ConfigError:
        raise
    except ValueError as error:
        # What a device's own conversion of an option says.
        raise ConfigError(str(error)) from error


class _Stop:
    """Ends the server at the first SIGTERM or SIGINT; a second one does what it always does."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope
        self.signal: int | None = None

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        import trio

        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                self.signal = number
                break
        _log.info("stopping: %s", signal.Signals(number).name)
        self._scope.cancel()

"""``vmbus serve``: the command line of a server that VMMs attach their guests to."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from vmbus.attach.protocol.sockets import CONTROL_SUFFIX
from vmbus.cli.completion import complete_device, complete_endpoint, complete_file, complete_spec
from vmbus.cli.logs import logging_to
from vmbus.cli.params import Number, parse_permissions, parse_transfer
from vmbus.cli.serving import Settings, Socket, run
from vmbus.wire.versions import Version

if TYPE_CHECKING:
    from vmbus.server import DeviceSetup


@click.command(
    epilog="Examples:\n\n"
    "\b\n"
    "  vmbus serve --socket /run/vmbus.sock --disk raw:disk.img\n"
    "  vmbus serve --socket s --disk 'raw:[ro]base.img' --disk 'ram:[lun=5]1G'\n"
    "  vmbus serve --socket a=a.sock --socket b=b.sock --disk 'raw:[create=10G]{guest}.img'\n"
    "  vmbus serve --socket s --device 'NAME OPTION=on ram:64M ram:1G'"
)
@click.option(
    "--socket",
    "sockets",
    multiple=True,
    metavar="[NAME=]PATH",
    shell_complete=complete_file,
    help="Listen for VMMs on a new socket file; may be repeated. A guest that comes by a socket "
    "with a NAME has that name, whatever its VMM says.",
)
@click.option(
    "--control",
    metavar="PATH",
    shell_complete=complete_file,
    help=f"Listen for operators on another one.  [default: PATH{CONTROL_SUFFIX} of the first "
    "--socket]",
)
@click.option(
    "--identity",
    type=click.Choice(["hello", "user"]),
    help="What names guests that come by a socket without a NAME: hello, what the VMM says, so "
    "that whoever may connect may be any guest; or user, the user who runs the VMM. {guest} in a "
    "disk needs one of these, or names.",
)
@click.option(
    "--fd",
    type=Number(0),
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
    help="Of the sockets for VMMs: who may connect may attach a guest. The one for operators is "
    "always its owner's only.",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="SPEC",
    shell_complete=complete_spec,
    help="A disk on each guest's SCSI controller, scheme:[options]target; may be repeated. "
    "{guest} in it is the guest's name (see --identity). See vmbus devices.",
)
@click.option(
    "--net",
    "nets",
    multiple=True,
    metavar="SPEC",
    shell_complete=complete_endpoint,
    help="A network adapter for each guest, scheme:[options]target; may be repeated.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="'NAME [OPTION=VALUE]... [SPEC]...'",
    shell_complete=complete_device,
    help="Another device for each guest; one argument, split like a shell does.",
)
@click.option(
    "--subchannels",
    type=Number(0, 63),
    metavar="N",
    help="Channels that a guest may open beside the controller's first one.  [default: 15]",
)
@click.option(
    "--max-transfer",
    type=parse_transfer,
    metavar="SIZE",
    help="Largest transfer of one SCSI request, 64K to 128M.  [default: 2M]",
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
    type=Number(1, 2048),
    metavar="N",
    default=2048,
    show_default=True,
    help="Refuse guests with more virtual processors.",
)
@click.option(
    "--poll",
    type=Number(0, 1_000_000),
    metavar="MICROSECONDS",
    help="Longest look for requests before sleeping; 0 sleeps at once; by default what is worth "
    "while on this machine, 200 or more.",
)
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    metavar="DIR",
    type=click.Path(exists=True),
    help="Once a guest is there, open files below DIR only, and those that --disk names; may be "
    "repeated. Without it, operators may add any file that the server may open.",
)
@click.option(
    "--max-guests",
    type=Number(1, 4096),
    default=64,
    show_default=True,
    metavar="N",
    help="Guests at once.",
)
@click.option(
    "--single-process",
    is_flag=True,
    help="Serve all guests in this process: less memory, and one guest can slow all of them.",
)
@click.option(
    "--no-sandbox",
    is_flag=True,
    help="Do not confine the guests' processes; for plug-ins that start programs.",
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
    sockets: tuple[str, ...],
    control: str | None,
    identity: str | None,
    fd: int | None,
    stream: bool,
    permissions: int,
    disks: tuple[str, ...],
    nets: tuple[str, ...],
    devices: tuple[str, ...],
    subchannels: int | None,
    max_transfer: int | None,
    monitor: bool,
    max_version: str,
    max_vps: int,
    poll: int | None,
    allowed: tuple[str, ...],
    max_guests: int,
    single_process: bool,
    no_sandbox: bool,
    once: bool,
    trust_vmm: bool,
    verbose: int,
    quiet: int,
    as_json: bool,
) -> None:
    """Serve guests until stopped.

    VMMs connect to the socket and attach their guests; each guest gets a bus, devices and a
    process of its own. Operators (vmbus top, vmbus disk) connect to the --control socket. Without
    --socket and --fd, the sockets are those that systemd passes; one with the name "control" is for
    operators. What happens is logged to standard error, beginning with "listening on ..." when VMMs
    may connect.

    SIGTERM and SIGHUP say goodbye to all guests and end the server with exit code 0, Ctrl-C with
    130. With --once, the exit code is 1 if the guest could not be served, and 3 if it broke a rule.
    """
    if sockets and fd is not None:
        raise click.UsageError("--socket and --fd are two places; give one of them")
    if stream and not sockets:
        raise click.UsageError(
            "--stream is about the socket that --socket makes; add --socket PATH"
        )
    if single_process and no_sandbox:
        raise click.UsageError("--no-sandbox is about the processes that --single-process omits")
    if allowed and no_sandbox:
        raise click.UsageError("--allow is one of the things that --no-sandbox leaves out")
    places = tuple(map(parse_socket, sockets))
    check_paths(places, control)
    check_guest_names(places, identity, (*disks, *nets, *devices))
    options: dict[str, Any] = {}
    if subchannels is not None:
        options["max_subchannels"] = subchannels
    if max_transfer is not None:
        options["max_transfer_bytes"] = max_transfer
    if monitor:
        options["monitor"] = True
    with logging_to(sys.stderr, level=verbose - quiet, as_json=as_json):
        settings = Settings(
            setups=device_setups(disks, nets, devices, options),
            max_version=Version.from_text(max_version),
            max_vps=max_vps,
            poll=None if poll is None else poll / 1e6,
            sockets=places,
            control=control,
            identity=identity or "hello",
            fd=fd,
            mode="stream" if stream else "seqpacket",
            permissions=permissions,
            allowed=allowed or None,
            max_guests=max_guests,
            single_process=single_process,
            sandbox=not no_sandbox,
            once=once,
            trust_vmm=trust_vmm,
        )
        import trio

        ctx.exit(trio.run(run, settings))


def parse_socket(text: str) -> Socket:
    """Parse ``[NAME=]PATH``; what is before ``=`` is a name unless it has a slash."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:
        return Socket(None, text)
    if not name or not path:
        raise click.UsageError(f"--socket {text!r}: write PATH, or NAME=PATH")
    return Socket(name, path)


def check_paths(sockets: tuple[Socket, ...], control: str | None) -> None:
    """Raise click.UsageError if a path or a name is given twice."""
    paths = [each.path for each in sockets] + ([control] if control is not None else [])
    names = [each.name for each in sockets if each.name is not None]
    for kind, given in (("path", paths), ("name", names)):
        for each in given:
            if given.count(each) > 1:
                raise click.UsageError(f"{each!r} is the {kind} of two sockets")


def check_guest_names(
    sockets: tuple[Socket, ...], identity: str | None, specs: tuple[str, ...]
) -> None:
    """Raise click.UsageError if a guest could be any ``{guest}`` and nobody said it may.

    Raises ConfigError if a socket's name cannot stand for ``{guest}``.
    """
    from vmbus.server.devices import for_guest

    named = bool(sockets) and all(each.name is not None for each in sockets)
    for name, _ in sockets:
        if name is not None:
            for spec in specs:
                for_guest(spec, name)
    if identity is None and not named and any("{guest}" in spec for spec in specs):
        raise click.UsageError(
            "{guest} stands for a guest's name; say where names come from: --socket NAME=PATH, one "
            "for each guest; --identity user, the user who runs the VMM; or --identity hello, "
            "what the VMM says, if whoever may connect may have any guest's disk"
        )


def device_setups(
    disks: tuple[str, ...],
    nets: tuple[str, ...],
    devices: tuple[str, ...],
    options: dict[str, Any],
) -> tuple[DeviceSetup, ...]:
    """Return what each guest gets: a controller for ``--disk``, every ``--device`` and ``--net``.

    Without a disk and a device there is an empty controller, for disks that are added later. The
    adapters come last: devices keep their instance GUIDs when some are added.
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
    setups.extend(DeviceSetup(device_with("endpoint"), (spec,)) for spec in nets)
    return tuple(setups)


def parse_device(text: str) -> DeviceSetup:
    """Parse ``NAME [OPTION=VALUE]... [SPEC]...``. Raises click.UsageError.

    An option's name has no ``:`` before its ``=``; everything from the first specification on is
    one. What the values mean is the device's business.
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
        options[key] = value
        del words[0]
    return DeviceSetup(name, tuple(words), options)

"""``vmbus disk``: the disks of a running guest."""

from __future__ import annotations

from typing import Any

import click

from vmbus.cli.client import ask_guests, pick_guest, send_command
from vmbus.cli.completion import complete_spec
from vmbus.cli.output import print_json, print_table, size_text, tell_warnings
from vmbus.cli.params import F, Number, json_option, socket_option

_ACCESS = {True: "read only", False: "read, write", None: "-"}
_UNCHANGED = "the guest has locked the tray and has been asked to let go; --force does not ask"

BACKEND = "disk"
"""What the server calls the back-ends of the devices that this is about."""


def guest_option(function: F) -> F:
    """Add ``--guest``."""
    return click.option(
        "--guest", metavar="NAME", help="Which guest; needed if there are several."
    )(function)


def controller_option(function: F) -> F:
    """Add ``--controller``."""
    return click.option(
        "--controller",
        type=Number(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Which of the guest's SCSI controllers.",
    )(function)


@click.group()
def command() -> None:
    """List, add, remove, resize and continue the disks of a running guest, and change media.

    Guests notice at once. A disk's address is its LUN, or path:target:lun.
    """


@command.command("list")
@socket_option
@click.option("--guest", metavar="NAME", help="Only this one's.")
@json_option
def list_disks(*, socket_path: str, guest: str | None, as_json: bool) -> None:
    """List the disks of all guests."""
    guests = pick_guest(ask_guests(socket_path)["guests"], guest)
    disks = [
        {"guest": each["name"], "controller": device["index"], **unit}
        for each in guests
        for device in _controllers(each)
        for unit in device["units"]
    ]
    if as_json:
        print_json(disks)
    elif disks:
        print_table(
            ("guest", "controller", "address", "size", "kind", "access", "state", "source"),
            [
                (
                    disk["guest"],
                    str(disk["controller"]),
                    disk["address"],
                    "-" if disk["size"] is None else size_text(disk["size"]),
                    disk["kind"],
                    _ACCESS[disk["read_only"]],
                    _state(disk),
                    disk["source"] or "-",
                )
                for disk in disks
            ],
        )
    else:
        click.echo("no disks" if guests else "no guests attached")


@command.command("add")
@socket_option
@guest_option
@controller_option
@json_option
@click.argument("spec", shell_complete=complete_spec)
def add_disk(
    *, socket_path: str, guest: str | None, controller: int, as_json: bool, spec: str
) -> None:
    """Add the disk SPEC, scheme:[options]target, to a guest.

    Paths in it are the server's. The options path, target and lun say where it goes; otherwise it
    gets the lowest free LUN.
    """
    result = _operate(socket_path, guest, controller, action="add", spec=spec)
    if as_json:
        print_json(result)
    else:
        click.echo(f"added at {result['address']}")
        tell_warnings(result)


@command.command("remove")
@socket_option
@guest_option
@controller_option
@json_option
@click.argument("address")
def remove_disk(
    *, socket_path: str, guest: str | None, controller: int, as_json: bool, address: str
) -> None:
    """Remove the disk at ADDRESS from a guest.

    Commands under way end with an error; unmount the disk in the guest before.
    """
    result = _operate(socket_path, guest, controller, action="remove", address=address)
    if as_json:
        print_json(result)
    else:
        click.echo(f"removed {address}")


@command.command("resize")
@socket_option
@guest_option
@controller_option
@json_option
@click.option("--shrink", is_flag=True, help="Make it smaller; what is behind is lost.")
@click.argument("address")
@click.argument("size", required=False)
def resize_disk(
    *,
    socket_path: str,
    guest: str | None,
    controller: int,
    as_json: bool,
    shrink: bool,
    address: str,
    size: str | None,
) -> None:
    """Give the disk at ADDRESS another SIZE, for example 20G.

    Without SIZE: look at a file or block device that has grown outside, and tell the guest.
    """
    wanted: dict[str, Any] = {"shrink": True} if shrink else {}
    if size is not None:
        wanted["size"] = size
    result = _operate(socket_path, guest, controller, action="resize", address=address, **wanted)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{address} has {size_text(result['size'])} now")


@command.command("insert")
@socket_option
@guest_option
@controller_option
@json_option
@click.argument("address")
@click.argument("spec", shell_complete=complete_spec)
def insert_medium(
    *, socket_path: str, guest: str | None, controller: int, as_json: bool, address: str, spec: str
) -> None:
    """Put the medium SPEC, such as cd:install.iso, into the empty drive at ADDRESS.

    A drive whose tray the guest has opened counts as empty.
    """
    result = _operate(socket_path, guest, controller, action="insert", address=address, spec=spec)
    _tell_medium(result, as_json=as_json, text=f"inserted at {address}")


@command.command("change")
@socket_option
@guest_option
@controller_option
@json_option
@click.option("--force", is_flag=True, help="Also if the guest has locked the tray.")
@click.argument("address")
@click.argument("spec", shell_complete=complete_spec)
def change_medium(
    *,
    socket_path: str,
    guest: str | None,
    controller: int,
    as_json: bool,
    force: bool,
    address: str,
    spec: str,
) -> None:
    """Put the medium SPEC into the drive at ADDRESS instead of what is there."""
    result = _operate(
        socket_path, guest, controller, action="change", address=address, spec=spec, force=force
    )
    _tell_medium(result, as_json=as_json, text=f"changed {address}")


@command.command("eject")
@socket_option
@guest_option
@controller_option
@json_option
@click.option("--force", is_flag=True, help="Also if the guest has locked the tray.")
@click.argument("address")
def eject_medium(
    *,
    socket_path: str,
    guest: str | None,
    controller: int,
    as_json: bool,
    force: bool,
    address: str,
) -> None:
    """Take the medium out of the drive at ADDRESS.

    A guest that has locked the tray is asked to let go; the exit code is 1 then.
    """
    result = _operate(socket_path, guest, controller, action="eject", address=address, force=force)
    _tell_medium(result, as_json=as_json, text=f"ejected {address}")


@command.command("continue")
@socket_option
@guest_option
@controller_option
@json_option
@click.argument("address")
def continue_disk(
    *, socket_path: str, guest: str | None, controller: int, as_json: bool, address: str
) -> None:
    """Let the disk at ADDRESS go on that has stopped because its image found no room.

    Disks with the option on-error=stop do that. Make room first: what the guest has written
    meanwhile is tried again. The exit code is 1 if the disk was not stopped.
    """
    result = _operate(socket_path, guest, controller, action="continue", address=address)
    if as_json:
        print_json(result)
    elif result["continued"]:
        click.echo(f"{address} goes on")
    else:
        click.echo(f"{address} was not stopped", err=True)
    if not result["continued"]:
        raise SystemExit(1)


def _tell_medium(result: dict[str, Any], *, as_json: bool, text: str) -> None:
    if as_json:
        print_json(result)
    elif result["done"]:
        click.echo(text)
        tell_warnings(result)
    else:
        click.echo(_UNCHANGED, err=True)
    if not result["done"]:
        raise SystemExit(1)


def _state(disk: dict[str, Any]) -> str:
    """Say what a drive does with its medium, or why a disk keeps the guest waiting."""
    if disk.get("stopped"):
        return f"stopped: {disk['stopped']}"
    if disk.get("lost"):
        return "lost"
    if "tray" not in disk:
        return "-"
    words = [] if disk["size"] is not None else ["empty"]
    if disk["tray"] != "closed":
        words.append(f"tray {disk['tray']}")
    if disk["locked"]:
        words.append("locked")
    return ", ".join(words) or "closed"


def _controllers(guest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a guest's devices that have disks, in the order of their numbers."""
    found = [device for device in guest["devices"] if device.get("backend") == BACKEND]
    return sorted(found, key=lambda device: device["index"])


def _operate(path: str, guest: str | None, controller: int, **request: object) -> dict[str, Any]:
    """Have the server carry out a request on a guest's controller."""
    full: dict[str, Any] = {"backend": BACKEND, "index": controller, **request}
    if guest is not None:
        full["guest"] = guest
    return send_command(path, full)

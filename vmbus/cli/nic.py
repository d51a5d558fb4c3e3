"""``vmbus nic``: the network adapters of running guests."""

from __future__ import annotations

from typing import Any

import click

from vmbus.cli.client import ask_guests, pick_guest, send_command
from vmbus.cli.completion import complete_endpoint
from vmbus.cli.output import print_json, print_table, safe, tell_warnings
from vmbus.cli.params import F, Number, json_option, socket_option

BACKEND = "endpoint"
"""What the server calls the back-ends of the devices that this is about."""
ADD, REMOVE = "add-device", "remove-device"
"""What the server calls giving a guest a device, and taking one away."""


def guest_option(function: F) -> F:
    """Add ``--guest``."""
    return click.option(
        "--guest", metavar="NAME", help="Which guest; needed if there are several."
    )(function)


def adapter_option(function: F) -> F:
    """Add ``--adapter``."""
    return click.option(
        "--adapter",
        type=Number(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Which of the guest's network adapters.",
    )(function)


@click.group()
def command() -> None:
    """List, add and remove the network adapters of running guests, and change links and addresses.

    Guests notice at once. Adapters are counted from 0; one that is removed leaves a gap, and one
    that is added fills it.
    """


@command.command("list")
@socket_option
@click.option("--guest", metavar="NAME", help="Only this one's.")
@json_option
def list_adapters(*, socket_path: str, guest: str | None, as_json: bool) -> None:
    """List the network adapters of all guests."""
    guests = pick_guest(ask_guests(socket_path)["guests"], guest)
    found = [
        {"guest": each["name"], "adapter": device["index"], **_shown(device)}
        for each in guests
        for device in each["devices"]
        if device.get("backend") == BACKEND
    ]
    if as_json:
        print_json(found)
    elif found:
        print_table(
            (
                "guest",
                "adapter",
                "address",
                "link",
                "mtu",
                "channels",
                "sent",
                "received",
                "source",
            ),
            [
                (
                    each["guest"],
                    str(each["adapter"]),
                    each["mac"],
                    _link(each),
                    str(each["mtu"]),
                    str(each["channels"]),
                    _count(each["transmit"]["frames"]),
                    _count(each["receive"]["frames"]),
                    each["source"] or "-",
                )
                for each in found
            ],
        )
    else:
        click.echo("no network adapters" if guests else "no guests attached")


@command.command("add")
@socket_option
@guest_option
@json_option
@click.argument("spec", shell_complete=complete_endpoint)
def add_adapter(*, socket_path: str, guest: str | None, as_json: bool, spec: str) -> None:
    """Give a guest one more network adapter, with the endpoint SPEC, scheme:[options]target.

    Paths in it are the server's. The guest has it for as long as its VMM is attached; to have it
    from the start, give SPEC to vmbus serve --net.
    """
    result = _send(socket_path, guest, action=ADD, specs=[spec])
    if as_json:
        print_json(result)
    else:
        click.echo(f"added as adapter {result['index']}, address {result['mac']}")
        tell_warnings(result)


@command.command("remove")
@socket_option
@guest_option
@json_option
@click.argument("adapter", type=Number(0))
def remove_adapter(*, socket_path: str, guest: str | None, as_json: bool, adapter: int) -> None:
    """Take the network adapter of the number ADAPTER away from a guest.

    What it is about to send is sent first; take the interface down in the guest before.
    """
    result = _send(socket_path, guest, action=REMOVE, index=adapter)
    if as_json:
        print_json(result)
    else:
        click.echo(f"removed adapter {adapter}")


def _shown(device: dict[str, Any]) -> dict[str, Any]:
    """What is the adapter's own in a device's description."""
    return {
        name: value
        for name, value in device.items()
        if name not in {"key", "plugin", "index", "backend"}
    }


def _link(adapter: dict[str, Any]) -> str:
    return f"down: {adapter['failure']}" if adapter["failure"] else adapter["link"]


@command.command("link")
@socket_option
@guest_option
@adapter_option
@json_option
@click.argument("state", type=click.Choice(["up", "down"]))
def set_link(
    *, socket_path: str, guest: str | None, adapter: int, as_json: bool, state: str
) -> None:
    """Plug the cable of an adapter in (up) or out (down)."""
    result = _operate(socket_path, guest, adapter, action="link", up=state == "up")
    if as_json:
        print_json(result)
    else:
        click.echo(f"the link is {result['link']}")


@command.command("mac")
@socket_option
@guest_option
@adapter_option
@json_option
@click.argument("address")
def set_address(
    *, socket_path: str, guest: str | None, adapter: int, as_json: bool, address: str
) -> None:
    """Give an adapter another hardware ADDRESS.

    The guest uses it from the next time on that it opens the adapter; what it sends until then is
    dropped, unless the adapter has the option spoof.
    """
    result = _operate(socket_path, guest, adapter, action="mac", mac=address)
    if as_json:
        print_json(result)
    else:
        click.echo(f"the address is {result['mac']}")


@command.command("stats")
@socket_option
@guest_option
@adapter_option
@json_option
def show_statistics(*, socket_path: str, guest: str | None, adapter: int, as_json: bool) -> None:
    """Show what an adapter has counted, and why it dropped frames."""
    result = _operate(socket_path, guest, adapter, action="stats")
    if as_json:
        print_json(result)
        return
    rows = []
    for name, label in (("transmit", "from the guest"), ("receive", "to the guest")):
        counted = result[name]
        rows += [
            (label, key, _count(value)) for key, value in counted.items() if isinstance(value, int)
        ]
        rows += [
            (label, f"dropped: {safe(reason)}", _count(count))
            for reason, count in counted["dropped"].items()
        ]
    print_table(("direction", "what", "count"), rows)


def _count(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _operate(
    socket_path: str, guest: str | None, adapter: int, **request: object
) -> dict[str, Any]:
    return _send(socket_path, guest, index=adapter, **request)


def _send(socket_path: str, guest: str | None, **request: object) -> dict[str, Any]:
    what: dict[str, Any] = {"backend": BACKEND, **request}
    if guest is not None:
        what["guest"] = guest
    return send_command(socket_path, what)

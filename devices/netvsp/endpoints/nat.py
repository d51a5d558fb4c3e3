"""``nat:[tcp=HOST:GUEST,udp=HOST:GUEST]``: the host's own network, without any privilege.

``nat:``, ``nat:[tcp=8080:80]``, ``nat:[tcp=8080:80+2222:22,udp=5353:53]``. The guest gets an
address by DHCP, looks names up, and reaches what this host reaches; nobody reaches it but through
ports that are forwarded, from this host only: ``tcp=0.0.0.0/8080:80`` is for everybody, and
``tcp=8080`` leads to the port of the same number. Services of the host that listen on 127.0.0.1 are
out of its reach.

It takes the program ``passt`` (Debian's package of that name), which runs as a process of its own
as long as the adapter is there. A guest's own process may start no program, so ``vmbus serve`` has
one that does it for all guests; for a ``nat:`` within ``pcap:`` it takes ``--no-sandbox``.

The passt of Debian 12 loses or spoils what comes on a connection that the guest has closed on its
side only, behind the first 64 KB; use a newer one if a program of yours does that.

Without passt, or if this host has no network, a small one is built in: a gateway, DHCP, answers to
ping, and names looked up as this host does it, with nothing behind; a warning says so.
``with=passt`` insists on the one, ``with=built-in`` on the other.

IPv6 is passt's, as far as this host has it. The built-in network is IPv4 alone: it advertises no
router, and answers neither neighbour solicitations nor ICMPv6, so that a guest keeps to its
link-local address. A name's IPv6 addresses are told to a guest that asks for them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Sequence
from typing import NamedTuple

import trio

from netvsp.endpoint import Endpoint
from netvsp.endpoints.passt import (
    PROGRAM,
    Forward,
    Forwards,
    LocalStarter,
    PasstEndpoint,
    Starter,
    find_passt,
)
from netvsp.endpoints.passt_keeper import LineStarter, PasstKeeper
from netvsp.endpoints.responder import ResponderEndpoint
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError
from vmbus.plugins.options import Option
from vmbus.plugins.remarks import remark
from vmbus.plugins.sharing import Line, Share
from vmbus.plugins.specs import parse_number

OPTIONS = (
    Option("tcp", "ports of this host that lead to the guest", "[ADDRESS/]PORT[:PORT]+...", "none"),
    Option("udp", "the same for UDP", "[ADDRESS/]PORT[:PORT]+...", "none"),
    Option("with", "what makes the network", "passt|built-in", "passt, if it can be had"),
)
LIMITS = "the guest gets an address and can look names up, but reaches nobody"

SCHEME = "nat"
KEEPER = f"{SCHEME}:"
"""Of all guests of a server."""

_log = logging.getLogger("vmbus.netvsp")


def parse_forwards(text: str | None) -> list[Forward]:
    """Parse ``8080:80+0.0.0.0/2222:22``. Raises ConfigError."""
    found = []
    for item in text.split("+") if text else ():
        address, slash, ports = item.rpartition("/")
        try:
            where = ipaddress.ip_address(address if slash else "127.0.0.1")
        except ValueError:
            raise ConfigError(f"{address!r} is not an IP address") from None
        host, colon, guest = ports.partition(":")
        found.append(Forward(str(where), _port(host), _port(guest if colon else host)))
    return found


def _port(text: str) -> int:
    number = parse_number(text)
    if not 1 <= number <= 65535:
        raise ConfigError(f"there is no port {number}")
    return number


class _Wishes(NamedTuple):
    """What a specification says."""

    forwards: Forwards
    wanted: str | None
    """``passt`` or ``built-in``, or None: as is possible."""

    @property
    def insists(self) -> bool:
        """Whether only passt will do."""
        return self.wanted == PROGRAM or any(self.forwards)


def _parse(spec: EndpointSpec) -> _Wishes:
    """Read the options. Raises ConfigError."""
    options = spec.reader()
    texts = options.text("tcp"), options.text("udp")
    wanted = options.choice("with", (PROGRAM, "built-in"))
    options.finish()
    spec.without_target()
    try:
        tcp, udp = map(parse_forwards, texts)
    except ConfigError as error:
        raise spec.error(str(error)) from error
    if wanted == "built-in" and any(texts):
        raise spec.error("ports are forwarded by passt only")
    return _Wishes(Forwards(tcp, udp), wanted)


async def open_spec(spec: EndpointSpec) -> Endpoint:
    """Open ``nat:[tcp=FORWARDS,udp=FORWARDS,with=passt|built-in]``."""
    return await _open(spec, None)


async def connect(text: str, line: Line) -> Endpoint:
    """Open it with a passt that is started at the other end of a line. A checkpoint.

    Args:
        text: The specification, with the adapter's own options.
        line: To a :class:`netvsp.endpoints.passt_keeper.PasstKeeper`; owned.

    Raises:
        ConfigError: As :func:`netvsp.endpoints.specs.open_endpoint`.
    """
    spec, _own = EndpointSpec.parse(text).split()
    return await _open(spec, LineStarter(line))


async def _open(spec: EndpointSpec, starter: Starter | None) -> Endpoint:
    await trio.lowlevel.checkpoint()
    wishes = _parse(spec)
    reason = "the built-in network"
    if wishes.wanted != "built-in":
        try:
            return await PasstEndpoint.open(starter or _local(wishes))
        except ConfigError as error:
            if wishes.insists:
                raise spec.error(str(error)) from error
            reason = str(error)
    if wishes.wanted is None:
        remark(_log, f"{spec}: {reason}; {LIMITS}")
    else:
        _log.info("%s: %s; %s", spec, reason, LIMITS)
    return ResponderEndpoint()


def _local(wishes: _Wishes) -> LocalStarter:
    program = find_passt()
    if program is None:
        raise ConfigError("the program passt is not installed")
    return LocalStarter(program, wishes.forwards)


# -- guests in processes that may start no program ------------------------------------------------


def shared(specs: Sequence[str]) -> dict[str, Share]:
    """Return those specifications that want a passt, which a keeper has to start. Cannot block.

    See :meth:`vmbus.plugins.sharing.SharingPlugin.shared`.
    """
    found: dict[str, Share] = {}
    for text in specs:
        with contextlib.suppress(ConfigError):  # will be said where it is opened
            spec, _own = EndpointSpec.parse(text).split()
            if spec.scheme == SCHEME and _parse(spec).wanted != "built-in" and find_passt():
                found[text] = Share(keeper=KEEPER, within_process=False, programs=True)
    return found


async def open_keeper(specs: Sequence[str]) -> PasstKeeper:
    """Make what starts a passt for each guest, and try each specification. A checkpoint.

    Raises:
        ConfigError: One cannot be honoured here.
    """
    for text in specs:
        spec, _own = EndpointSpec.parse(text).split()
        await (await open_spec(spec)).aclose()
    return PasstKeeper(lambda text: _local(_parse(EndpointSpec.parse(text).split()[0])))

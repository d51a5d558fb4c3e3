"""``nat:[tcp=HOST:GUEST,udp=HOST:GUEST]``: the host's own network, without any privilege.

``nat:``, ``nat:[tcp=8080:80]``, ``nat:[tcp=8080:80+2222:22,udp=5353:53]``. The guest gets an
address by DHCP, looks names up, and reaches what this host reaches; nobody reaches it but through
ports that are forwarded, from this host only: ``tcp=0.0.0.0/8080:80`` is for everybody, and
``tcp=8080`` leads to the port of the same number. Services of the host that listen on 127.0.0.1 are
out of its reach.

It takes the program ``passt`` (Debian's package of that name), which runs as a process of its own
as long as the adapter is there. Without it, or if this host has no network, a small one is built
in: a gateway, DHCP, answers to ping, and names looked up as this host does it, with nothing behind;
a warning says so. ``with=passt`` insists on the one, ``with=built-in`` on the other.

IPv6 is passt's, as far as this host has it. The built-in network is IPv4 alone: it advertises no
router, and answers neither neighbour solicitations nor ICMPv6, so that a guest keeps to its
link-local address. A name's IPv6 addresses are told to a guest that asks for them.
"""

from __future__ import annotations

import ipaddress
import logging

import trio

from netvsp.endpoint import Endpoint
from netvsp.endpoints.passt import Forward, PasstEndpoint, find_passt
from netvsp.endpoints.responder import ResponderEndpoint
from netvsp.spec import EndpointSpec
from vmbus.errors import ConfigError
from vmbus.plugins.options import Option
from vmbus.plugins.remarks import remark
from vmbus.plugins.specs import parse_number

OPTIONS = (
    Option("tcp", "ports of this host that lead to the guest", "[ADDRESS/]PORT[:PORT]+...", "none"),
    Option("udp", "the same for UDP", "[ADDRESS/]PORT[:PORT]+...", "none"),
    Option("with", "what makes the network", "passt|built-in", "passt, if it can be had"),
)
LIMITS = "the guest gets an address and can look names up, but reaches nobody"

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


async def open_spec(spec: EndpointSpec) -> Endpoint:
    """Open ``nat:[tcp=FORWARDS,udp=FORWARDS,with=passt|built-in]``."""
    options = spec.reader()
    texts = options.text("tcp"), options.text("udp")
    wanted = options.choice("with", ("passt", "built-in"))
    options.finish()
    spec.without_target()
    await trio.lowlevel.checkpoint()
    try:
        tcp, udp = map(parse_forwards, texts)
        if wanted != "built-in":
            program = find_passt()
            if program is not None:
                return await PasstEndpoint.open(program, tcp=tcp, udp=udp)
            raise ConfigError("the program passt is not installed")
        reason = "the built-in network"
    except ConfigError as error:
        if wanted == "passt" or any(texts):
            raise spec.error(str(error)) from error
        reason = str(error)
    if any(texts):
        raise spec.error("ports are forwarded by passt only")
    if wanted is None:
        remark(_log, f"{spec}: {reason}; {LIMITS}")
    else:
        _log.info("%s: %s; %s", spec, reason, LIMITS)
    return ResponderEndpoint()

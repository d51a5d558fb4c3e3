"""The account of the control plane, a line for each message: ``vmbus serve -vv``.

::

    vm1: guest: MODIFYCHANNEL relid=1 target_vp=3
    vm1: host: MODIFYCHANNEL_RESPONSE relid=1 status=0

Messages are written down in the order in which the engine takes and makes them. A message of the
host's may still wait for its slot then, or may never get there if the guest leaves. Numbers are
written as Linux has them in its own trace of the bus (events ``hyperv``): relids in decimal, GPADL
handles and addresses in hexadecimal, so that two accounts of one connection can be laid side by
side.

Rings are not the control plane: the data path leaves no line.
"""

from __future__ import annotations

import dataclasses
import logging

from vmbus.engine import Engine
from vmbus.errors import GuestProtocolError
from vmbus.host.observer import Observer
from vmbus.wire.messages import Direction, Message, message_name, parse_message_untrusted
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_log = logging.getLogger("vmbus.bus.account")

_HEXADECIMAL = frozenset(
    {"gpadl", "ring_gpadl", "target_info", "monitor_page_1", "monitor_page_2",
     "host_monitor_page_1", "host_monitor_page_2", "connection_id", "supported_features", "flags"}
)  # fmt: skip
_WHO = {Direction.GUEST_TO_HOST: "guest", Direction.HOST_TO_GUEST: "host"}


class Account(Observer):
    """Logs the control messages of one bus; costs next to nothing unless somebody wants them.

    Args:
        name: The partition's.
        engine: Knows the version in force.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine

    def control(self, direction: Direction, payload: bytes) -> None:
        """See :meth:`vmbus.host.observer.Observer.control`."""
        if not _log.isEnabledFor(logging.DEBUG):
            return
        link = self._engine.connection.link
        text = describe_untrusted(
            payload,
            direction=direction,
            version=link.version if link is not None else None,
            features=link.features if link is not None else NO_FEATURES,
        )
        _log.debug("%s: %s: %s", self._name, _WHO[direction], text)


def describe_untrusted(
    payload: bytes,
    *,
    direction: Direction,
    version: Version | None,
    features: Feature = NO_FEATURES,
) -> str:
    """Return a control message as one line of words, ``NAME field=value ...``. Never raises.

    Args:
        payload: As it was posted or is going to be delivered.
        direction: Who has sent it.
        version: The version in force, or None without a connection. A message that is no part of
            it is described all the same.
        features: The 6.0 features in force.
    """
    first: GuestProtocolError | None = None
    for speech in ((version, features), (max(Version), NO_FEATURES)):
        try:
            message = parse_message_untrusted(
                payload, direction=direction, version=speech[0], features=speech[1]
            )
        except GuestProtocolError as error:
            first = first or error
        else:
            return _describe(message)
    return f"{message_name(int.from_bytes(payload[:4], 'little'))}, not readable: {first}"


def _describe(message: Message) -> str:
    words = [message.NAME]
    for field in dataclasses.fields(message):  # type: ignore[arg-type]  # every Message is one
        value = getattr(message, field.name)
        if value is not None:
            words.append(f"{field.name}={_text(field.name, value)}")
    return " ".join(words)


def _text(name: str, value: object) -> str:
    match value:
        case bytes():
            # Page lists, and what devices say to each other by way of an offer: long, and none of
            # the bus's business.
            return f"{len(value)}B"
        case bool():
            return str(int(value))
        case int() if name == "version" and value in set(Version):
            return str(Version(value))
        case int() if name in _HEXADECIMAL:
            return f"{value:#x}"
        case _:
            return str(value)

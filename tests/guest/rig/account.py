"""Two accounts of the control plane: the server's (``vmbus serve -vv``) and the guest's (ftrace).

Both become lists of :class:`Said`, with the same names and fields, so that they can be compared.
The formats of the guest's are those of its kernel (linux/drivers/hv/hv_trace.h), which has no
event for some messages, and in none all fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_SERVER_LINE = re.compile(
    r"^\d\d:\d\d:\d\d (\S+): (guest|host): ([A-Z_]+)((?: \w+=\S+)*)$", re.MULTILINE
)
_TRACE_LINE = re.compile(r"^.*?\[\d+\] \S+ +[\d.]+: (\w+): (.*)$", re.MULTILINE)
_TRACE_FIELD = re.compile(r"(\w+) (0x[0-9a-f]+|-?\d+)(?=[, ]|$)")

GUEST_EVENTS = {
    "vmbus_establish_gpadl_header": "GPADL_HEADER",
    "vmbus_establish_gpadl_body": "GPADL_BODY",
    "vmbus_open": "OPENCHANNEL",
    "vmbus_close_internal": "CLOSECHANNEL",
    "vmbus_teardown_gpadl": "GPADL_TEARDOWN",
    "vmbus_release_relid": "RELID_RELEASED",
    "vmbus_send_modifychannel": "MODIFYCHANNEL",
}
"""What the guest says."""
HOST_EVENTS = {
    "vmbus_onoffer": "OFFERCHANNEL",
    "vmbus_onoffer_rescind": "RESCIND_CHANNELOFFER",
    "vmbus_onopen_result": "OPENCHANNEL_RESULT",
    "vmbus_ongpadl_created": "GPADL_CREATED",
    "vmbus_ongpadl_torndown": "GPADL_TORNDOWN",
    "vmbus_onmodifychannel_response": "MODIFYCHANNEL_RESPONSE",
}
"""What it hears of the host."""
ARRIVAL = "vmbus_on_msg_dpc"
"""A message was in the slot; has its number only."""
_TRACE_NAMES = {
    "child_relid": "relid", "openid": "open_id", "creation_status": "status",
    "gpadlhandle": "ring_gpadl", "rangecount": "range_count", "msgnumber": "message_number",
    "offset": "downstream_page_offset", "monitorid": "monitor_id",
    "is_dedicated": "is_dedicated_interrupt", "chn_flags": "flags",
    "sub_channel_index": "subchannel_index",
}  # fmt: skip
"""Fields that both accounts have under different names."""


class Said(NamedTuple):
    """A control message, as one side knows it."""

    who: str
    """``guest`` or ``host``."""
    name: str
    fields: Mapping[str, str | int]
    """Numbers where they are numbers."""

    def __str__(self) -> str:
        return " ".join(
            [f"{self.who}: {self.name}", *(f"{key}={value}" for key, value in self.fields.items())]
        )


def server_account(log: str, guest: str) -> list[Said]:
    """Return what a server's log has of the messages of a guest."""
    return [
        Said(who, name, dict(_field(word) for word in words.split()))
        for owner, who, name, words in _SERVER_LINE.findall(log)
        if owner == guest
    ]


def _field(word: str) -> tuple[str, str | int]:
    name, _, value = word.partition("=")
    return name, _number(value)


def _number(text: str) -> str | int:
    try:
        return int(text, 0)
    except ValueError:
        return text


def guest_account(trace: str) -> list[Said]:
    """Return what a guest's trace has of its messages; arrivals are :data:`ARRIVAL` of the host."""
    found = []
    for event, text in _TRACE_LINE.findall(trace):
        if event == ARRIVAL:
            found.append(Said("host", ARRIVAL, {"number": int(text.rpartition("=")[2])}))
            continue
        for who, events in (("guest", GUEST_EVENTS), ("host", HOST_EVENTS)):
            if event in events:
                fields = {
                    _TRACE_NAMES.get(name, name): int(value, 0)
                    for name, value in _TRACE_FIELD.findall(text)
                }
                found.append(Said(who, events[event], fields))
    return found

"""What the device tells a driver unasked: the link, a virtual function, where flows are to go.

Sources: linux/drivers/net/hyperv/netvsc.c (``netvsc_receive_inband``, ``netvsc_send_table``,
``netvsc_send_vf``) and netvsc_drv.c (``netvsc_linkstatus_callback``, ``netvsc_link_change``),
freebsd/sys/dev/hyperv/netvsc/if_hn.c (``hn_nvs_handle_notify``), dpdk/drivers/net/netvsc/hn_nvs.c
(``__hn_nvs_execute``), mu_msvm/MsvmPkg/NetvscDxe (``NetvscReceiveCallback``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import trio

from netvsp.guest.habits import NetworkHabits
from netvsp.guest.messages import check_indication
from netvsp.guest.replies import strictly
from netvsp.wire import nvsp, rndis
from vmbus.guest import Incoming
from vmbus.guest.machine import Panic
from vmbus.wire.packets import FLAG_COMPLETION_REQUESTED

_SINCE = {
    nvsp.SEND_VF_ASSOCIATION: nvsp.VERSION_4,
    nvsp.SEND_INDIRECTION_TABLE: nvsp.VERSION_5,
}
_VF_ASSOCIATION = struct.Struct("<III")
_SEND_TABLE = struct.Struct("<III")
_TABLE = struct.Struct(f"<{nvsp.SEND_TABLE_ENTRIES}I")
_FIXED_TABLE_AT = 40
"""sizeof(struct nvsp_message)."""


class Event(NamedTuple):
    """Something that the device has told."""

    name: str
    """``link``, ``speed``, ``network``, ``offloads``, ``vf`` or ``table``."""
    value: object
    """True or False; in 100 bit/s; None; None; ``(allocated, serial)``; numbers of channels."""


class Events:
    """What one adapter has been told.

    Args:
        habits: What the driver does in its own way.
        panic: Called when the host breaks a rule.
    """

    def __init__(self, habits: NetworkHabits, panic: Panic) -> None:
        self.log: list[Event] = []
        """All of them, in order."""
        self.on_event: Callable[[Event], None] | None = None
        """Called for each of them in the interrupt; it must not block."""
        self.link = True
        """Whether the link is up."""
        self.speed = 0
        """In units of 100 bit/s; 0: unknown."""
        self.virtual_function: tuple[bool, int] | None = None
        """Whether there is one beside the adapter, and its serial number, as last told."""
        self._habits = habits
        self._panic = panic
        self._version = 0
        self._capabilities = 0
        self._told = trio.lowlevel.ParkingLot()

    def agreed(self, version: int, capabilities: int) -> None:
        """Know what was agreed on. Cannot block."""
        self._version = version
        self._capabilities = capabilities

    def _tell(self, name: str, value: object) -> None:
        event = Event(name, value)
        self.log.append(event)
        if self.on_event is not None:
            self.on_event(event)
        self._told.unpark_all()

    async def wait_told(self, count: int) -> list[Event]:
        """Wait until there have been ``count`` events in all; return them. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while len(self.log) < count:
            await self._told.park()
        return self.log

    def indication(self, message: bytes) -> None:
        """Take INDICATE_STATUS, in the interrupt. Cannot block."""
        status, data = check_indication(message, self._panic)
        if status in (rndis.STATUS_MEDIA_CONNECT, rndis.STATUS_MEDIA_DISCONNECT):
            self.link = status == rndis.STATUS_MEDIA_CONNECT
            self._tell("link", self.link)
        elif status == rndis.STATUS_LINK_SPEED_CHANGE:
            self.speed = int.from_bytes(data[:4], "little")
            self._tell("speed", self.speed)
        elif status == rndis.STATUS_NETWORK_CHANGE:
            self._tell("network", None)
        else:
            self._tell("offloads", None)

    def notice(
        self, packet: Incoming, *, channel: int, queues: int, asking: bool
    ) -> tuple[int, ...]:
        """Take an in-band packet, in the interrupt. Cannot block.

        Args:
            packet: It.
            channel: Number of the channel it came on.
            queues: Channels that there are.
            asking: An NVSP request is in flight.

        Returns:
            The table of SEND_INDIRECTION_TABLE; empty for other messages.
        """
        habits, panic = self._habits, self._panic
        payload = packet.payload
        kind = strictly(panic, nvsp.parse_type_untrusted, payload)
        name = nvsp.MESSAGE_NAMES.get(kind, str(kind))
        if packet.flags & FLAG_COMPLETION_REQUESTED:
            panic(f"NVSP {name} wants a completion, and no driver sends one")
        if habits.notices is None:
            return ()
        if kind not in habits.notices or kind not in _SINCE:
            panic(f"NVSP {name} in band: {habits.wrong_notice}")
        if channel:
            panic(f"NVSP {name} on channel {channel}: hn_chan_callback looks at the first one only")
        if self._version < _SINCE[kind]:
            panic(f"NVSP {name} in version {nvsp.VERSION_NAMES[self._version]}")
        if kind == nvsp.SEND_INDIRECTION_TABLE:
            table = self._check_table(payload, queues)
            self._tell("table", table)
            return table
        if asking and not habits.notices_in_handshake:
            panic(f"NVSP {name} where an answer was due: hn_nvs_execute takes it for that")
        self._virtual_function(payload)
        return ()

    def _virtual_function(self, payload: bytes) -> None:
        if len(payload) < _VF_ASSOCIATION.size:
            self._panic(f"NVSP SEND_VF_ASSOCIATION of {len(payload)} bytes")
        _kind, allocated, serial = _VF_ASSOCIATION.unpack_from(payload)
        if allocated > 1:
            self._panic(f"NVSP SEND_VF_ASSOCIATION: allocated is {allocated}")
        if not self._capabilities & nvsp.CAPABILITY_SRIOV:
            self._panic("NVSP SEND_VF_ASSOCIATION: the driver has not said that it knows SR-IOV")
        self.virtual_function = (bool(allocated), serial)
        self._tell("vf", self.virtual_function)

    def _check_table(self, payload: bytes, queues: int) -> tuple[int, ...]:
        if len(payload) < _SEND_TABLE.size:
            self._panic(f"NVSP SEND_INDIRECTION_TABLE of {len(payload)} bytes")
        _kind, count, offset = _SEND_TABLE.unpack_from(payload)
        if count != nvsp.SEND_TABLE_ENTRIES:
            self._panic(f"NVSP SEND_INDIRECTION_TABLE: {count} entries")
        if (
            self._version <= nvsp.VERSION_6
            and len(payload) >= _FIXED_TABLE_AT + _TABLE.size
            and offset != _FIXED_TABLE_AT
        ):
            self._panic(
                f"NVSP SEND_INDIRECTION_TABLE: at {offset}; netvsc_send_table takes it from "
                f"{_FIXED_TABLE_AT} on"
            )
        if offset < _SEND_TABLE.size or offset + _TABLE.size > len(payload):
            self._panic(f"NVSP SEND_INDIRECTION_TABLE: at {offset} of {len(payload)} bytes")
        table = _TABLE.unpack_from(payload, offset)
        if max(table) >= queues:
            self._panic(f"NVSP SEND_INDIRECTION_TABLE: {table} with {queues} channels")
        return table

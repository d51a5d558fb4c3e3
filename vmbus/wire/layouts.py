"""Byte layouts of the control messages, behind their 8-byte header.

Every layout has a fixed size, so that a length check is all the checking that parsing needs.
Field names are those of the dataclasses in :mod:`vmbus.wire.messages`.

Sources: linux/include/linux/hyperv.h (``struct vmbus_channel_*``); for the 6.0 additions the
series "Drivers: hv: vmbus" of 2025 on the linux-hyperv list. The interpreted form of construct is
used on purpose: its compiled form accepts truncated input without an error.
"""

from __future__ import annotations

from typing import Any, cast
from uuid import UUID

import construct as c

MAX_PAYLOAD = 240
"""Largest SynIC message payload in bytes (TLFS 11.8)."""
HEADER_SIZE = 8
USER_DEFINED_SIZE = 120
"""Bytes of free data in OFFERCHANNEL and OPENCHANNEL."""


class _Guid(c.Adapter):  # type: ignore[type-arg]  # generic in the stubs only
    """16 bytes <-> UUID, in Microsoft's mixed byte order."""

    def _decode(self, obj: Any, context: Any, path: Any) -> UUID:  # noqa: ANN401
        return UUID(bytes_le=bytes(obj))

    def _encode(self, obj: Any, context: Any, path: Any) -> bytes:  # noqa: ANN401
        return cast("UUID", obj).bytes_le


class _LowBit(c.Adapter):  # type: ignore[type-arg]  # generic in the stubs only
    """A bit field of which only bit 0 means anything <-> bool."""

    def _decode(self, obj: Any, context: Any, path: Any) -> bool:  # noqa: ANN401
        return bool(obj & 1)

    def _encode(self, obj: Any, context: Any, path: Any) -> int:  # noqa: ANN401
        return int(bool(obj))


class _NonZero(c.Adapter):  # type: ignore[type-arg]  # generic in the stubs only
    """A byte that is true if not 0 <-> bool."""

    def _decode(self, obj: Any, context: Any, path: Any) -> bool:  # noqa: ANN401
        return bool(obj)

    def _encode(self, obj: Any, context: Any, path: Any) -> int:  # noqa: ANN401
        return int(bool(obj))


_GUID = _Guid(c.Bytes(16))
_U8 = c.Int8ul
_U16 = c.Int16ul
_U32 = c.Int32ul
_U64 = c.Int64ul

EMPTY = c.Struct()
RELID = c.Struct("relid" / _U32)
OFFER_CHANNEL = c.Struct(
    "class_id" / _GUID,
    "instance_id" / _GUID,
    c.Padding(16),
    "flags" / _U16,
    "mmio_megabytes" / _U16,
    "user_defined" / c.Bytes(USER_DEFINED_SIZE),
    "subchannel_index" / _U16,
    "mmio_megabytes_optional" / _U16,
    "relid" / _U32,
    "monitor_id" / _U8,
    "monitor_allocated" / _LowBit(_U8),
    "is_dedicated_interrupt" / _LowBit(_U16),
    "connection_id" / _U32,
)
OPEN_CHANNEL = c.Struct(
    "relid" / _U32,
    "open_id" / _U32,
    "ring_gpadl" / _U32,
    "target_vp" / _U32,
    "downstream_page_offset" / _U32,
    "user_data" / c.Bytes(USER_DEFINED_SIZE),
)
OPEN_CHANNEL_2 = c.Struct(
    *OPEN_CHANNEL.subcons,
    "connection_id" / _U32,
    "event_flag" / _U16,
    "open_flags" / _U16,
)
OPEN_CHANNEL_RESULT = c.Struct("relid" / _U32, "open_id" / _U32, "status" / _U32)
GPADL_HEADER = c.Struct("relid" / _U32, "gpadl" / _U32, "range_buflen" / _U16, "range_count" / _U16)
GPADL_BODY = c.Struct("message_number" / _U32, "gpadl" / _U32)
GPADL_CREATED = c.Struct("relid" / _U32, "gpadl" / _U32, "status" / _U32)
GPADL_TEARDOWN = c.Struct("relid" / _U32, "gpadl" / _U32)
GPADL_TORNDOWN = c.Struct("gpadl" / _U32)
INITIATE_CONTACT = c.Struct(
    "version" / _U32,
    "target_vp" / _U32,
    "target_info" / _U64,
    "monitor_page_1" / _U64,
    "monitor_page_2" / _U64,
)
VERSION_RESPONSE = c.Struct(
    "version_supported" / _NonZero(_U8),
    "connection_state" / _U8,
    c.Padding(2),
    "message_connection_id" / _U32,
)
VERSION_RESPONSE_2 = c.Struct(*VERSION_RESPONSE.subcons, "supported_features" / _U32)
VERSION_RESPONSE_3 = c.Struct(
    *VERSION_RESPONSE_2.subcons,
    c.Padding(4),
    "host_monitor_page_1" / _U64,
    "host_monitor_page_2" / _U64,
)
OPEN_RESERVED_CHANNEL = c.Struct(
    "relid" / _U32,
    "target_vp" / _U32,
    "target_sint" / _U32,
    "ring_gpadl" / _U32,
    "downstream_page_offset" / _U32,
)
CLOSE_RESERVED_CHANNEL = c.Struct("relid" / _U32, "target_vp" / _U32, "target_sint" / _U32)
TL_CONNECT_REQUEST = c.Struct("endpoint_id" / _GUID, "service_id" / _GUID)
TL_CONNECT_REQUEST_2 = c.Struct(*TL_CONNECT_REQUEST.subcons, "silo_id" / _GUID)
TL_CONNECT_RESULT = c.Struct("endpoint_id" / _GUID, "service_id" / _GUID, "status" / _U32)
MODIFY_CHANNEL = c.Struct("relid" / _U32, "target_vp" / _U32)
MODIFY_CHANNEL_RESPONSE = c.Struct("relid" / _U32, "status" / _U32)
MODIFY_CONNECTION = c.Struct("monitor_page_1" / _U64, "monitor_page_2" / _U64)
MODIFY_CONNECTION_RESPONSE = c.Struct("connection_state" / _U8)

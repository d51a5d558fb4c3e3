"""VMBus protocol versions and the 6.0 feature flags, and what each brings.

========  ==========  ====================================================================
version   Windows     what changes on the wire
========  ==========  ====================================================================
0.13      2008        shared event connection 2 and interrupt page both ways; no reply codes
1.1       2008 R2     dedicated guest-to-host signals; UNLOAD_RESPONSE
2.4       8 / 2012    dedicated signals both ways: the interrupt page is gone
3.0       8.1         the VP named in INITIATE_CONTACT gets the messages (before: VP 0)
4.0       10          hv_sock connect requests; reserved channels
4.1       10 RS3      MODIFYCHANNEL; a result for failed connect requests
5.0       10 RS3      connection id 4; SINT and VTL in INITIATE_CONTACT; message connection id
5.1       10 RS4      target VTL
5.2       10 RS5      connect requests carry a silo id
5.3       2022        MODIFYCHANNEL_RESPONSE
6.0       2025        feature flags, client id, modify connection, pause and resume
========  ==========  ====================================================================

Sources: linux/include/linux/hyperv.h (``VERSION_*``) and linux/drivers/hv/connection.c.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Version(IntEnum):
    """A protocol version as it stands on the wire: major << 16 | minor."""

    V0_13 = 0x0000_000D
    V1_1 = 0x0001_0001
    V2_4 = 0x0002_0004
    V3_0 = 0x0003_0000
    V4_0 = 0x0004_0000
    V4_1 = 0x0004_0001
    V5_0 = 0x0005_0000
    V5_1 = 0x0005_0001
    V5_2 = 0x0005_0002
    V5_3 = 0x0005_0003
    V6_0 = 0x0006_0000

    def __str__(self) -> str:
        return f"{self >> 16}.{self & 0xFFFF}"

    @classmethod
    def from_text(cls, text: str) -> Version:
        """Parse ``"5.3"``. Raises ValueError naming the known versions."""
        for version in cls:
            if str(version) == text:
                return version
        known = ", ".join(map(str, cls))
        raise ValueError(f"{text!r} is not a VMBus version; known are {known}")


class Feature(IntFlag):
    """Feature flags of version 6.0; what is in force is the intersection of both sides."""

    GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x01
    """OPENCHANNEL names the connection id and event flag that the guest will signal."""
    CHANNEL_INTERRUPT_REDIRECTION = 0x02
    """OPENCHANNEL may ask for interrupts to be redirected to a higher VTL."""
    MODIFY_CONNECTION = 0x04
    """Monitor pages can be changed after contact."""
    CLIENT_ID = 0x08
    """INITIATE_CONTACT ends with a GUID naming the client."""
    CONFIDENTIAL_CHANNELS = 0x10
    """Offers of confidential rings; only between trusted peers."""
    PAUSE_RESUME = 0x20
    """The guest can stop the flow of control messages."""
    SERVER_SPECIFIED_MONITOR_PAGES = 0x40
    """VERSION_RESPONSE can carry monitor pages allocated by the host."""
    GPA_PINNING = 0x80
    """Offers may ask for pinned guest pages."""


NO_FEATURES = Feature(0)

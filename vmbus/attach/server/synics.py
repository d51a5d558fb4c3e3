"""What the server knows of the VPs' SynICs: SYNIC_STATE, SET_SINT_FD, and where T2 may be used."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vmbus.attach.protocol.closing import close_foreign
from vmbus.attach.protocol.descriptors import check_eventfd_untrusted
from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.limits import DIRECT_SINT
from vmbus.attach.protocol.to_server import SetSintFd, SynicState
from vmbus.attach.server.calls import FLAGS_PER_SINT_BYTES, VpSynic
from vmbus.errors import GuestProtocolError
from vmbus.memory import GuestMemory


class Synics:
    """The VPs of one partition, as far as tier T2 is concerned. Nothing here blocks.

    Args:
        memory: The guest's.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.vps: list[VpSynic] = []
        self.descriptors = 0
        """SINT eventfds that are held."""

    def __iter__(self) -> Iterator[VpSynic]:
        return iter(self.vps)

    def need(self, vp: int, owner: str) -> None:
        """Raise PeerProtocolError, EINVAL, if there is no such VP."""
        require(vp < len(self.vps), f"{owner}: vp {vp} must be below {len(self.vps)}")

    def describe(self, count: int) -> None:
        """So many VPs there are (VM_INFO)."""
        self.vps = [VpSynic() for _ in range(count)]

    def set_state_untrusted(self, payload: bytes) -> None:
        """SYNIC_STATE. Raises PeerProtocolError."""
        state = SynicState.decode_untrusted(payload)
        self.need(state.vp, "SYNIC_STATE")
        synic = self.vps[state.vp]
        synic.page = state.flags_page
        self._aim(synic)

    def set_sint_fd_untrusted(self, frame: Frame, room: int) -> None:
        """SET_SINT_FD: take the frame's eventfd.

        Args:
            frame: With one descriptor.
            room: How many descriptors more may be kept.

        Raises:
            PeerProtocolError: EINVAL; EMFILE without room.
        """
        request = SetSintFd.decode_untrusted(frame.payload)
        self.need(request.vp, "SET_SINT_FD")
        check_eventfd_untrusted(frame.fds[0], "SET_SINT_FD")
        synic = self.vps[request.vp]
        if synic.fd >= 0:
            close_foreign((synic.fd,))
        else:
            require(
                room > 0,
                "SET_SINT_FD: this server keeps no more descriptors of this VMM",
                errno.EMFILE,
            )
            self.descriptors += 1
        synic.fd = frame.take_fd()
        self._aim(synic)

    def reset(self) -> None:
        """The guest's life is over: its pages are disabled, the eventfds stay."""
        for synic in self.vps:
            synic.page = None
            self._aim(synic)

    def aim(self) -> None:
        """Memory has changed."""
        for synic in self.vps:
            self._aim(synic)

    def close(self) -> None:
        """Give everything up. Idempotent."""
        for synic in self.vps:
            synic.close()
        self.descriptors = 0

    def _aim(self, synic: VpSynic) -> None:
        """Use T2 for this VP exactly while everything it needs is there."""
        synic.flags = None
        if synic.page is not None and synic.fd >= 0:
            start = synic.page + DIRECT_SINT * FLAGS_PER_SINT_BYTES
            try:
                # One page lies in one region, so this is one view.
                (synic.flags,) = self._memory.views(start, FLAGS_PER_SINT_BYTES, write=True)
            except GuestProtocolError:
                # The VMM keeps the page in memory of its own: the slower tiers it is.
                return

"""Raising event flags from the server: the three tiers behind one :class:`SocketCall`.

T2 (direct)
    The server sets the bit in the guest's event flag page and writes the VP's SINT eventfd.
T1 (call eventfd)
    The server writes an eventfd; the VMM sets the bit and interrupts.
T0 (message)
    SIGNAL_FLAG; the VMM sets the bit and interrupts.

Setting a bit in T2 is a load, an OR and a store of one byte, not an atomic operation. Nothing is
lost by that: the guest only ever *clears* bits of the page (locked, linux/drivers/hv/connection.c,
vmbus_chan_sched uses sync_test_and_clear_bit), so a clear between our load and our store is
undone at worst, which is a spurious event; and all *setting* happens in this one thread, because
a VMM that grants T2 sets no flags of that SINT itself. The interrupt follows every set: whether
the bit was clear before says nothing once the guest races with us.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Protocol

from vmbus.attach.protocol.closing import close_all, close_foreign
from vmbus.attach.protocol.limits import DIRECT_SINT, MAX_FLAG, MAX_SINT

FLAGS_PER_SINT_BYTES = (MAX_FLAG + 1) // 8


class VpSynic:
    """What T2 needs of one VP; the transport fills it in and empties it."""

    __slots__ = ("fd", "flags", "page")

    def __init__(self) -> None:
        self.page: int | None = None
        """Guest address of the event flag page, while the guest has it enabled."""
        self.fd = -1
        """SINT eventfd, owned; -1 if none was given."""
        self.flags: memoryview | None = None
        """The 256 flag bytes of the VMBus SINT; None while T2 cannot be used."""

    def close(self) -> None:
        """Give everything up. Idempotent."""
        self.page = self.flags = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close_foreign((fd,))


NO_SYNIC = VpSynic()
"""For SINTs that T2 does not cover; stays empty."""


class CallOwner(Protocol):
    """What a call needs of the transport."""

    vp_count: int
    held: dict[SocketCall, None] | None
    """Calls to be repeated on resume while the VM is paused, else None."""
    open_calls: set[SocketCall]

    @property
    def has_call_fds(self) -> bool:
        """Whether tier T1 was agreed."""

    @property
    def vp_synics(self) -> Sequence[VpSynic]:
        """One for each VP."""

    def signal_by_message(self, vp: int, sint: int, flag: int) -> None:
        """Tier T0."""

    def offer_call_fd(self, call: SocketCall) -> int:
        """Tier T1: make an eventfd and send it to the VMM; return it, owned by the call, or -1.

        :meth:`SocketCall.offered` is called before it is sent, and :meth:`SocketCall.answered`
        exactly once afterwards.
        """

    def drop_call_fd(self, call: SocketCall) -> None:
        """Tell the VMM that the port is not used any more."""


def eventfd_pair() -> tuple[int, int]:
    """Return a non-blocking eventfd, and a copy of it to send away. Raises OSError."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        return fd, os.dup(fd)
    except OSError:
        close_all((fd,))
        raise


def _is_signalled(fd: int) -> bool:
    """Whether an eventfd counts something. Not by reading: the VMM may have made that block."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class SocketCall:
    """One event flag on one VP, see :class:`vmbus.partition.transport.Call`."""

    __slots__ = (
        "_byte", "_known", "_mask", "_offered", "_owner", "_synic", "_untried",
        "closed", "fd", "flag", "port", "sint", "vp",
    )  # fmt: skip

    def __init__(self, owner: CallOwner, port: int, vp: int, sint: int, flag: int) -> None:
        self._owner = owner
        self._byte = flag >> 3
        self._mask = 1 << (flag & 7)
        self.port = port
        self.vp = vp
        self.sint = sint
        self.flag = flag
        self.fd = -1
        self.closed = not (vp < owner.vp_count and sint <= MAX_SINT and flag <= MAX_FLAG)
        self._synic = NO_SYNIC
        self._offered: set[int] = set()
        """Eventfds without an answer of the VMM: kept open, for it may refuse them."""
        self._known = False
        """Whether the VMM has the port."""
        self._untried = True
        """Whether T1 may be had on this VP; nothing else is known until it is asked for."""
        if not self.closed:
            owner.open_calls.add(self)
            self._aim()

    def _aim(self) -> None:
        owner = self._owner
        self._synic = owner.vp_synics[self.vp] if self.sint == DIRECT_SINT else NO_SYNIC
        self._untried = owner.has_call_fds
        if self._synic.flags is None:
            self._try_call_fd()

    def _try_call_fd(self) -> None:
        """Ask for T1, once: T2 is not there, or not there any more."""
        if self._untried:
            self._untried = False
            self.fd = self._owner.offer_call_fd(self)

    @property
    def tier(self) -> int:
        """0, 1 or 2: how the next signal travels."""
        if self._synic.flags is not None:
            return 2
        return 1 if self.fd >= 0 or self._untried else 0

    def signal(self) -> None:
        """Set the flag and interrupt the VP. Cannot block, never raises."""
        owner = self._owner
        if self.closed:
            return
        if owner.held is not None:
            owner.held[self] = None
            return
        synic = self._synic
        flags = synic.flags
        if flags is not None:
            flags[self._byte] |= self._mask
            fd = synic.fd
        else:
            if self.fd < 0:
                self._try_call_fd()
            fd = self.fd
            if fd < 0:
                owner.signal_by_message(self.vp, self.sint, self.flag)
                return
        try:
            os.eventfd_write(fd, 1)
        except BlockingIOError:
            # The counter is full, so the reader has a wake-up waiting already.
            return

    def retarget(self, vp: int) -> None:
        """Deliver to ``vp`` from now on. A fresh eventfd keeps late signals off the old VP."""
        if self.closed or vp >= self._owner.vp_count or vp == self.vp:
            return
        self.vp = vp
        old, self.fd = self.fd, -1
        self._aim()
        self._let_go(old)
        if old >= 0 and self.fd < 0:
            self._drop()

    def offered(self, fd: int) -> None:
        """Eventfd ``fd`` is about to be sent to the VMM."""
        self._offered.add(fd)

    def is_offered(self, fd: int) -> bool:
        """Whether the VMM has not answered yet for ``fd``."""
        return fd in self._offered

    def answered(self, fd: int, *, taken: bool, refused: bool) -> None:
        """The VMM took eventfd ``fd`` or refused it; neither if it has gone.

        What was signalled through a refused one is signalled once more, by what comes next.
        """
        self._offered.discard(fd)
        if taken:
            self._known = True
            if fd == self.fd:
                return
        lost = refused and _is_signalled(fd)
        if fd == self.fd:
            self.fd = -1
        close_all((fd,))
        if lost:
            self.signal()

    def _let_go(self, fd: int) -> None:
        """Close an eventfd, unless it has to wait for its answer."""
        if fd >= 0 and fd not in self._offered:
            close_all((fd,))

    def _drop(self) -> None:
        self._known = False
        self._owner.drop_call_fd(self)

    def close(self) -> None:
        """No signal goes out after this. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._owner.open_calls.discard(self)
        if self._owner.held is not None:
            self._owner.held.pop(self, None)
        self._synic = NO_SYNIC
        self._untried = False
        fd, self.fd = self.fd, -1
        self._let_go(fd)
        # The VMM keeps the port's old eventfd if it refused the last one.
        if fd >= 0 or self._known:
            self._drop()

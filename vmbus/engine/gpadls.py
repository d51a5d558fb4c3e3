"""The GPADLs of all channels: creation, teardown, budgets.

A GPADL is known by its channel and its handle. Bodies carry no relid, so a handle can be
unfinished in one channel at a time only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vmbus.engine.channels import Channel, ChannelTable
from vmbus.engine.config import Budgets
from vmbus.engine.events import GpadlTeardown
from vmbus.engine.outbox import Outbox
from vmbus.engine.states import Gone, GpadlTrigger, TearingDown, Unfinished, Usable, follow
from vmbus.errors import (
    STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_STATE,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    GuestProtocolError,
    LocalProtocolError,
)
from vmbus.gpadl import Gpadl, GpadlAssembly
from vmbus.memory import GuestMemory
from vmbus.wire.messages import (
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTorndown,
)

PAGES_AT_ONCE = 1 << 14
"""Pages that are checked in one turn of whoever posts the guest's messages: some milliseconds."""


class GpadlTable:
    """Does what the four GPADL messages ask for, and answers them.

    Every header gets exactly one GPADL_CREATED, every teardown exactly one GPADL_TORNDOWN, as long
    as the guest stays. The states themselves are kept in :attr:`Channel.gpadls`.
    """

    def __init__(
        self, memory: GuestMemory, budgets: Budgets, channels: ChannelTable, outbox: Outbox
    ) -> None:
        self._memory = memory
        self._budgets = budgets
        self._channels = channels
        self._outbox = outbox
        self._unfinished: dict[int, Channel] = {}
        self._handles: Counter[int] = Counter()
        self._pages: dict[tuple[int, int], int] = {}
        self.page_total = 0
        """Pages of all of them, as announced."""
        self._pages_checked = 0

    @property
    def count(self) -> int:
        """GPADLs of all channels, in any state."""
        return len(self._pages)

    @property
    def unfinished_count(self) -> int:
        """GPADLs that wait for bodies."""
        return len(self._unfinished)

    def has_done_a_lot(self) -> bool:
        """Whether it is time to let others have their turn: many pages were checked since then.

        A message may be the last one of a list of 8000 pages. Says so once.
        """
        if self._pages_checked < PAGES_AT_ONCE:
            return False
        self._pages_checked = 0
        return True

    def usable(self, channel: Channel, handle: int) -> Gpadl | None:
        """Return a GPADL that is complete and not being torn down."""
        state = channel.gpadls.get(handle)
        return state.gpadl if isinstance(state, Usable) else None

    # --- Creation --------------------------------------------------------------------------------

    def header_untrusted(self, channel: Channel | None, message: GpadlHeader) -> None:
        """GPADL_HEADER. ``channel`` is None if the guest may not speak of that relid."""
        try:
            self._check_header(channel, message)
            assembly = GpadlAssembly(
                message.gpadl, range_buflen=message.range_buflen, range_count=message.range_count
            )
            self._check_budget(assembly)
        except GuestProtocolError as error:
            self._answer(message.relid, message.gpadl, error.status)
            raise
        assert channel is not None, "_check_header lets no unknown channel pass"
        self._handles[message.gpadl] += 1
        self._pages[channel.key, message.gpadl] = assembly.page_count
        self.page_total += assembly.page_count
        self._unfinished[message.gpadl] = channel
        channel.gpadls[message.gpadl] = Unfinished(assembly)
        self._extend_untrusted(channel, assembly, message.data)

    def body_untrusted(self, message: GpadlBody) -> None:
        """GPADL_BODY. The message number says nothing: several drivers leave it 0.

        A body behind the last one that was needed is ignored. OpenBSD and NetBSD send n / 28 +
        n % 28 of them for n further pages (openbsd/sys/dev/pv/hyperv.c: hv_handle_alloc), so most
        arrive, full of zeros, when the list is complete and answered.
        """
        channel = self._unfinished.get(message.gpadl)
        if channel is None:
            if message.gpadl in self._handles:
                return
            raise GuestProtocolError(
                f"GPADL {message.gpadl:#x}: no more bodies are expected", field="gpadl"
            )
        state = channel.gpadls[message.gpadl]
        assert isinstance(state, Unfinished)
        self._extend_untrusted(channel, state.assembly, message.data)

    def _check_header(self, channel: Channel | None, message: GpadlHeader) -> None:
        if channel is None:
            raise GuestProtocolError(f"there is no channel {message.relid}", field="relid")
        if channel.is_reserved:
            raise GuestProtocolError(
                "a reserved channel's GPADLs cannot change",
                field="relid",
                status=STATUS_INVALID_DEVICE_STATE,
            )
        if message.gpadl in channel.gpadls or message.gpadl in self._unfinished:
            raise GuestProtocolError(f"GPADL {message.gpadl:#x} exists already", field="gpadl")

    def _check_budget(self, assembly: GpadlAssembly) -> None:
        budgets = self._budgets
        for name, value, limit in (
            ("GPADLs", self.count + 1, budgets.max_gpadls),
            ("unfinished GPADLs", self.unfinished_count + 1, budgets.max_unfinished_gpadls),
            ("GPADL pages", self.page_total + assembly.page_count, budgets.max_gpadl_pages),
        ):
            if value > limit:
                raise GuestProtocolError(
                    f"GPADL {assembly.handle:#x}: only {limit} {name} are allowed",
                    field="gpadl",
                    status=STATUS_INSUFFICIENT_RESOURCES,
                )

    def _extend_untrusted(self, channel: Channel, assembly: GpadlAssembly, data: bytes) -> None:
        try:
            gpadl = assembly.add_untrusted(data)
            if gpadl is None:
                return
            # Proves that all of it is memory; the views themselves are made by whoever uses them.
            self._pages_checked += gpadl.page_count
            gpadl.check(self._memory)
        except GuestProtocolError as error:
            self._fail(channel, assembly.handle, error.status)
            raise
        del self._unfinished[gpadl.handle]
        channel.gpadls[gpadl.handle] = follow(
            channel.gpadls[gpadl.handle], GpadlTrigger.COMPLETE, Usable(gpadl)
        )
        self._answer_of(channel, gpadl.handle, STATUS_SUCCESS)

    def _fail(self, channel: Channel, handle: int, status: int) -> None:
        self._remove(channel, handle, GpadlTrigger.FAIL)
        self._answer_of(channel, handle, status)

    def fail_unfinished(self, channel: Channel) -> None:
        """Give up what is unfinished in ``channel``, and say so."""
        for handle, state in tuple(channel.gpadls.items()):
            if isinstance(state, Unfinished):
                self._fail(channel, handle, STATUS_UNSUCCESSFUL)

    def _answer_of(self, channel: Channel, handle: int, status: int) -> None:
        placement = channel.placement
        assert placement is not None, "a channel that the guest does not know has no new GPADLs"
        self._answer(placement.relid, handle, status)

    def _answer(self, relid: int, handle: int, status: int) -> None:
        self._outbox.post(GpadlCreated(relid=relid, gpadl=handle, status=status))

    # --- Teardown --------------------------------------------------------------------------------

    def teardown_untrusted(self, channel: Channel | None, handle: int) -> None:
        """GPADL_TEARDOWN, on an open or closed channel.

        Every request is answered, once: Linux waits for the answer without a time limit. One for a
        handle that is not in the channel is a fault besides; the host has indeed let go of it,
        whatever another channel uses under the same number. One for a GPADL that the host is taking
        back already, since its channel is gone, is answered when the device has let go. Only a
        second request for the same GPADL gets no answer of its own, and the ring of a reserved
        channel, which is in use for good.
        """
        state = channel.gpadls.get(handle) if channel is not None else None
        if channel is not None and channel.is_reserved:
            raise GuestProtocolError("a reserved channel's GPADLs cannot change", field="relid")
        if state is None or channel is None:
            self._outbox.post(GpadlTorndown(gpadl=handle))
            raise GuestProtocolError(f"GPADL {handle:#x}: is not in this channel", field="gpadl")
        if isinstance(state, Unfinished):
            self._fail(channel, handle, STATUS_UNSUCCESSFUL)
            self._outbox.post(GpadlTorndown(gpadl=handle))
        elif isinstance(state, TearingDown):
            if state.reply:
                raise GuestProtocolError(f"GPADL {handle:#x}: is being torn down", field="gpadl")
            channel.gpadls[handle] = follow(
                state, GpadlTrigger.TEARDOWN, TearingDown(state.gpadl, reply=True)
            )
        else:
            self._start_teardown(channel, state, reply=True)

    def released(self, channel: Channel, handle: int) -> None:
        """Nobody uses the pages any more. Raises LocalProtocolError if that was not asked."""
        state = channel.gpadls.get(handle)
        if not isinstance(state, TearingDown):
            raise LocalProtocolError(f"GPADL {handle:#x} of channel {channel.key}: not asked for")
        self._remove(channel, handle, GpadlTrigger.RELEASED)
        if state.reply:
            self._outbox.post(GpadlTorndown(gpadl=handle))

    def drop(self, channel: Channel, *, guest_left: bool, keep: int | None = None) -> None:
        """Ask for all GPADLs of a channel back on the guest's behalf.

        Args:
            channel: The channel; the guest gets no replies on its account.
            guest_left: Also forget replies that are owed already.
            keep: Handle of one that stays, if it is usable: the ring of a reserved channel.
        """
        for handle, state in tuple(channel.gpadls.items()):
            if isinstance(state, Unfinished):
                self._remove(channel, handle, GpadlTrigger.FAIL)
            elif isinstance(state, TearingDown):
                if guest_left:
                    channel.gpadls[handle] = follow(
                        state, GpadlTrigger.LEAVE, TearingDown(state.gpadl, reply=False)
                    )
            elif handle != keep:
                self._start_teardown(channel, state, reply=False)

    def _start_teardown(self, channel: Channel, state: Usable, *, reply: bool) -> None:
        channel.gpadls[state.gpadl.handle] = follow(
            state, GpadlTrigger.TEARDOWN, TearingDown(state.gpadl, reply)
        )
        self._outbox.emit(GpadlTeardown(key=channel.key, handle=state.gpadl.handle))

    def _remove(self, channel: Channel, handle: int, trigger: GpadlTrigger) -> None:
        state = channel.gpadls.pop(handle)
        follow(state, trigger, Gone())
        if isinstance(state, Unfinished):
            # Not so for a finished one: another channel's may be unfinished under this handle.
            del self._unfinished[handle]
        self._handles[handle] -= 1
        if not self._handles[handle]:
            del self._handles[handle]
        self.page_total -= self._pages.pop((channel.key, handle))
        self._channels.unsettle(channel)

    def check(self, channels: Iterable[Channel]) -> None:
        """Raise AssertionError unless the books agree with the states."""
        states = {
            (channel.key, handle): state
            for channel in channels
            for handle, state in channel.gpadls.items()
        }
        assert states.keys() == self._pages.keys()
        assert sum(self._pages.values()) == self.page_total
        assert Counter(handle for _, handle in states) == self._handles
        unfinished = {
            handle: key for (key, handle), state in states.items() if isinstance(state, Unfinished)
        }
        assert unfinished == {handle: each.key for handle, each in self._unfinished.items()}

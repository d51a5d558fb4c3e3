"""Opening, closing and retargeting channels: the life of a channel, seen from its device.

The device is asked with an event and answers at any later time; the guest does not wait for it
with its next message. What happens in between is a state of its own.
"""

from __future__ import annotations

import dataclasses

from vmbus.engine.channels import Channel, ChannelTable
from vmbus.engine.events import ChannelClose, ChannelModify, ChannelOpen
from vmbus.engine.gpadls import GpadlTable
from vmbus.engine.outbox import Outbox
from vmbus.engine.states import (
    Abandoned,
    Closed,
    CloseReply,
    Closing,
    ClosingReopen,
    Life,
    LifeTrigger,
    Modifying,
    Open,
    Opening,
    OpenRequest,
    follow,
    permits,
)
from vmbus.errors import (
    STATUS_INVALID_DEVICE_STATE,
    STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL,
    GuestProtocolError,
    LocalProtocolError,
)
from vmbus.wire.messages import (
    CloseReservedResponse,
    ModifyChannelResponse,
    OpenChannel,
    OpenChannelResult,
)
from vmbus.wire.versions import Version


class Lives:
    """Moves :attr:`Channel.life`, asks devices and answers guests."""

    def __init__(self, channels: ChannelTable, gpadls: GpadlTable, outbox: Outbox) -> None:
        self._channels = channels
        self._gpadls = gpadls
        self._outbox = outbox

    # --- Open ------------------------------------------------------------------------------------

    def open_untrusted(self, channel: Channel, request: OpenRequest) -> None:
        """OPENCHANNEL or OPEN_RESERVED_CHANNEL for a channel that is offered.

        Raises:
            GuestProtocolError: It is open, or the ring or the signals are not usable; the guest
                has got its answer.
        """
        life = channel.life
        if not permits(life, LifeTrigger.OPEN):
            self.answer_open(request, STATUS_INVALID_DEVICE_STATE)
            raise GuestProtocolError("the channel is open already", field="relid")
        if isinstance(life, Closing) and life.reply is not None:
            # Unlike CLOSECHANNEL, this close is answered, so the guest has something to wait for.
            self.answer_open(request, STATUS_INVALID_DEVICE_STATE)
            raise GuestProtocolError("the reserved channel is still closing", field="relid")
        if isinstance(life, Closing):
            # Whether the ring is usable is looked at when its turn comes.
            self._move(channel, LifeTrigger.OPEN, ClosingReopen(request))
        else:
            self._start(channel, request)

    def _start(self, channel: Channel, request: OpenRequest) -> None:
        try:
            gpadl = self._gpadls.usable(channel, request.ring_gpadl)
            if gpadl is None:
                raise GuestProtocolError(
                    f"GPADL {request.ring_gpadl:#x}: is not one of this channel, complete and in "
                    "use",
                    field="ring_gpadl",
                )
            gpadl.ring_pages(request.downstream_page_offset)
            self._channels.claim(channel, request)
        except GuestProtocolError as error:
            self.answer_open(request, error.status)
            raise
        self._move(channel, LifeTrigger.OPEN, Opening(request))
        placement, link = channel.placement, self._outbox.link
        monitored = placement is not None and link is not None and link.monitor_pages is not None
        self._outbox.emit(
            ChannelOpen(
                key=channel.key,
                relid=request.relid,
                offer=channel.offer,
                subchannel_index=channel.subchannel_index,
                primary_key=channel.primary_key,
                gpadl=gpadl,
                downstream_page_offset=request.downstream_page_offset,
                target_vp=request.target_vp,
                user_data=request.user_data,
                connection_id=request.connection_id,
                event_flag=request.event_flag,
                version=request.version,
                monitor_id=placement.monitor_id if placement and monitored else None,
                outgoing_by_page=request.version < Version.V2_4,
                incoming_by_page=request.version < Version.V1_1,
            )
        )

    def open_done(self, channel: Channel, *, ok: bool) -> None:
        """The device's answer to ChannelOpen."""
        match channel.life:
            case Opening(request) if ok:
                self._move(channel, LifeTrigger.OPENED, Open(request))
                self.answer_open(request, STATUS_SUCCESS)
            case Opening(request):
                self._move(channel, LifeTrigger.REFUSED, Closed())
                self.answer_open(request, STATUS_UNSUCCESSFUL)
            case Abandoned(reply) if ok:
                self._move(channel, LifeTrigger.OPENED, Closing(reply))
                self._outbox.emit(ChannelClose(key=channel.key))
            case Abandoned(reply):
                self._move(channel, LifeTrigger.REFUSED, Closed())
                self.answer_close(reply)
            case _:
                raise LocalProtocolError(f"channel {channel.key}: open_done without ChannelOpen")

    def answer_open(self, request: OpenRequest, status: int) -> None:
        """Send OPENCHANNEL_RESULT, to wherever the request wants it."""
        result = OpenChannelResult(relid=request.relid, open_id=request.open_id, status=status)
        if request.reserved is None:
            self._outbox.post(result)
        else:
            # The layout is the same in all versions.
            self._outbox.post_to(request.reserved, result, version=Version.V4_0, reserved=True)

    # --- Close -----------------------------------------------------------------------------------

    def check_close(self, channel: Channel) -> None:
        """Raise GuestProtocolError unless CLOSECHANNEL is allowed."""
        if channel.is_reserved:
            raise GuestProtocolError(
                "a reserved channel is closed by CLOSE_RESERVED_CHANNEL", field="relid"
            )
        if not channel.is_open:
            raise GuestProtocolError("the channel is not open", field="relid")

    def close(self, channel: Channel, reply: CloseReply | None = None) -> None:
        """Close an open channel. No reply but ``reply``; the guest may open again at once."""
        if isinstance(channel.life, Modifying):
            self.answer_modify(channel.life.request.relid, STATUS_INVALID_DEVICE_STATE)
        self._move(channel, LifeTrigger.CLOSE, Closing(reply))
        self._outbox.emit(ChannelClose(key=channel.key))

    def close_reserved_untrusted(self, channel: Channel, reply: CloseReply) -> None:
        """CLOSE_RESERVED_CHANNEL. Answered when the device has let go, at once if it has before."""
        life = channel.life
        if channel.is_open and not channel.is_reserved:
            raise GuestProtocolError("the channel is not a reserved one", field="relid")
        match life:
            case Open():
                self.close(channel, reply)
            case Opening() | ClosingReopen() if channel.is_reserved:
                self.abandon(channel, tell=True, reply=reply)
            case Abandoned(None):
                self._move(channel, LifeTrigger.AWAIT, Abandoned(reply))
            case Closing(None):
                self._move(channel, LifeTrigger.AWAIT, Closing(reply))
            case Closed():
                self.answer_close(reply)
                if not channel.revoked:
                    raise GuestProtocolError("the reserved channel is not open", field="relid")
            case _:
                raise GuestProtocolError("the channel is being opened or closed", field="relid")

    def abandon(self, channel: Channel, *, tell: bool, reply: CloseReply | None = None) -> None:
        """See to it that the channel will be closed; nothing happens if it is.

        Args:
            channel: Any channel.
            tell: The guest is there and gets the answer that it waits for.
            reply: Owed once it is closed.
        """
        match channel.life:
            case Open() | Modifying():
                self.close(channel, reply)
            case Opening(request) | ClosingReopen(request):
                opening = isinstance(channel.life, Opening)
                next_life = Abandoned(reply) if opening else Closing(reply)
                self._move(channel, LifeTrigger.ABANDON, next_life)
                if tell:
                    self.answer_open(request, STATUS_UNSUCCESSFUL)
            case _:
                pass

    def forget_reply(self, channel: Channel) -> None:
        """The VM was reset: nobody waits for a CLOSE_RESERVED_RESPONSE any more."""
        if isinstance(channel.life, Abandoned | Closing):
            self._move(channel, LifeTrigger.ABANDON, type(channel.life)())

    def close_done(self, channel: Channel) -> None:
        """The device's answer to ChannelClose."""
        life = channel.life
        if not isinstance(life, Closing | ClosingReopen):
            raise LocalProtocolError(f"channel {channel.key}: close_done without ChannelClose")
        self._move(channel, LifeTrigger.CLOSED, Closed())
        if isinstance(life, Closing):
            self.answer_close(life.reply)
            return
        try:
            self._start(channel, life.request)
        except GuestProtocolError as error:
            self._outbox.fault(error, message=OpenChannel.TYPE, relid=life.request.relid, vp=0)

    def answer_close(self, reply: CloseReply | None) -> None:
        """Send CLOSE_RESERVED_RESPONSE, if one is owed."""
        if reply is not None:
            message = CloseReservedResponse(relid=reply.relid)
            self._outbox.post_to(reply.slot, message, version=None, reserved=True)

    # --- Modify ----------------------------------------------------------------------------------

    def modify_untrusted(self, channel: Channel, target_vp: int) -> None:
        """MODIFYCHANNEL to a VP that exists.

        A second one while the first is pending: from 5.3 on the guest has to wait for its reply,
        so it is refused; older guests cannot wait, and the newest of their wishes counts.
        """
        match channel.life:
            case Open(request) if request.target_vp is not None:
                self._retarget(channel, request, target_vp)
            case Modifying(request, pending) if not self._modify_has_reply():
                self._move(
                    channel, LifeTrigger.MODIFY, Modifying(request, pending, newest=target_vp)
                )
            case Open():
                raise GuestProtocolError("the channel was opened without interrupts", field="relid")
            case Modifying():
                raise GuestProtocolError(
                    "the channel is being modified",
                    field="relid",
                    status=STATUS_INVALID_DEVICE_STATE,
                )
            case _:
                raise GuestProtocolError("the channel is not open", field="relid")

    def _retarget(self, channel: Channel, request: OpenRequest, target_vp: int) -> None:
        self._move(channel, LifeTrigger.MODIFY, Modifying(request, target_vp))
        self._outbox.emit(ChannelModify(key=channel.key, target_vp=target_vp))

    def modify_done(self, channel: Channel, *, ok: bool) -> None:
        """The device's answer to ChannelModify; without effect if the guest closed meanwhile."""
        life = channel.life
        if not permits(life, LifeTrigger.MODIFIED):
            raise LocalProtocolError(f"channel {channel.key}: modify_done without ChannelModify")
        if not isinstance(life, Modifying):
            self._move(channel, LifeTrigger.MODIFIED, life)
            return
        request = life.request
        if ok:
            request = dataclasses.replace(request, target_vp=life.target_vp)
        self._move(channel, LifeTrigger.MODIFIED, Open(request))
        self.answer_modify(request.relid, STATUS_SUCCESS if ok else STATUS_UNSUCCESSFUL)
        if life.newest is not None:
            self._retarget(channel, request, life.newest)

    def _modify_has_reply(self) -> bool:
        link = self._outbox.link
        return link is not None and link.version >= Version.V5_3

    def answer_modify(self, relid: int, status: int) -> None:
        """Send MODIFYCHANNEL_RESPONSE, if the connection has that."""
        if self._modify_has_reply():
            self._outbox.post(ModifyChannelResponse(relid=relid, status=status))

    def _move(self, channel: Channel, trigger: LifeTrigger, successor: Life) -> None:
        channel.life = follow(channel.life, trigger, successor)
        if isinstance(successor, Closed):
            self._channels.unclaim(channel)
            self._channels.unsettle(channel)

"""What the guest asks of single channels: looks up whom it means, checks what it says."""

from __future__ import annotations

from vmbus.engine.channels import Channel, ChannelTable
from vmbus.engine.config import EngineConfig
from vmbus.engine.contact import is_sint
from vmbus.engine.gpadls import GpadlTable
from vmbus.engine.lives import Lives
from vmbus.engine.outbox import Outbox
from vmbus.engine.presences import Presences
from vmbus.engine.states import (
    Closed,
    CloseReply,
    Link,
    Offered,
    OpenRequest,
    Released,
    Rescinded,
    Slot,
)
from vmbus.errors import GuestProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version


class ChannelRequests:
    """One handler per message; each raises GuestProtocolError after sending what reply is due."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        channels: ChannelTable,
        gpadls: GpadlTable,
        lives: Lives,
        presences: Presences,
        outbox: Outbox,
    ) -> None:
        self._config = config
        self._channels = channels
        self._gpadls = gpadls
        self._lives = lives
        self._presences = presences
        self._outbox = outbox

    # --- Whom it means ---------------------------------------------------------------------------

    def _find(self, relid: int) -> Channel | None:
        channel = self._channels.by_relid(relid)
        return channel if channel is not None and channel.known else None

    def _known(self, relid: int) -> Channel:
        channel = self._find(relid)
        if channel is None:
            raise GuestProtocolError(f"there is no channel {relid}", field="relid")
        return channel

    def _check_vp(self, target_vp: int) -> None:
        if target_vp >= self._config.vp_count:
            raise GuestProtocolError(f"there is no VP {target_vp}", field="target_vp")

    @property
    def _link(self) -> Link:
        link = self._outbox.link
        assert link is not None, "only a connected guest gets here"
        return link

    # --- GPADLs ----------------------------------------------------------------------------------

    def on_gpadl_header(self, message: m.GpadlHeader) -> None:
        """GPADL_HEADER."""
        self._gpadls.header_untrusted(self._find(message.relid), message)

    def on_gpadl_body(self, message: m.GpadlBody) -> None:
        """GPADL_BODY."""
        self._gpadls.body_untrusted(message)

    def on_gpadl_teardown(self, message: m.GpadlTeardown) -> None:
        """GPADL_TEARDOWN."""
        channel = self._channels.by_relid(message.relid)
        if channel is not None and not (channel.known or isinstance(channel.presence, Released)):
            channel = None
        # A channel that the guest has released holds its pages until the device lets go.
        self._gpadls.teardown_untrusted(channel, message.gpadl)

    # --- Open and close --------------------------------------------------------------------------

    def on_open(self, message: m.OpenChannel) -> None:
        """OPENCHANNEL."""
        channel = self._find(message.relid)
        if channel is not None and channel.revoked:
            # The guest had not seen the RESCIND when it asked; it does not wait any more.
            return
        try:
            request = self._open_request(self._known(message.relid), message)
        except GuestProtocolError as error:
            self._outbox.post(
                m.OpenChannelResult(
                    relid=message.relid, open_id=message.open_id, status=error.status
                )
            )
            raise
        assert channel is not None, "_known would have raised"
        self._lives.open_untrusted(channel, request)

    def _open_request(self, channel: Channel, message: m.OpenChannel) -> OpenRequest:
        link = self._link
        placement = channel.placement
        assert placement is not None, "the guest knows the channel"
        target_vp: int | None = message.target_vp
        if link.version < Version.V2_4:
            # The field was a GPADL handle, and all interrupts went to VP 0.
            target_vp = 0
        elif message.target_vp == m.TARGET_VP_NONE:
            target_vp = None
        else:
            self._check_vp(message.target_vp)
        connection_id, event_flag = placement.connection_id, placement.relid
        if Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS in link.features:
            connection_id = message.connection_id or connection_id
            event_flag = message.event_flag or event_flag
        return OpenRequest(
            version=link.version,
            relid=message.relid,
            open_id=message.open_id,
            ring_gpadl=message.ring_gpadl,
            target_vp=target_vp,
            downstream_page_offset=message.downstream_page_offset,
            user_data=message.user_data,
            connection_id=connection_id,
            event_flag=event_flag,
        )

    def on_close(self, message: m.CloseChannel) -> None:
        """CLOSECHANNEL; sub-channels are closed and rescinded with their primary channel."""
        channel = self._known(message.relid)
        if channel.revoked:
            # Was closed with the RESCIND, which the guest had not seen.
            return
        self._lives.check_close(channel)
        self._presences.revoke_subchannels(channel)
        self._lives.close(channel)

    def on_relid_released(self, message: m.RelidReleased) -> None:
        """RELID_RELEASED, of a channel that is rescinded, or of one that the guest does not want.

        Linux says so when it cannot register a device (linux/drivers/hv/channel_mgmt.c:
        vmbus_add_channel_work, free_channel).
        """
        channel = self._known(message.relid)
        presence = channel.presence
        if isinstance(presence, Offered):
            if not isinstance(channel.life, Closed):
                raise GuestProtocolError("the channel is in use", field="relid")
            self._presences.revoke_subchannels(channel)
        else:
            assert isinstance(presence, Rescinded), "_known lets no other presence pass"
        self._presences.release(channel, presence)

    # --- Reserved channels -----------------------------------------------------------------------

    def _slot(self, target_vp: int, target_sint: int) -> Slot:
        self._check_vp(target_vp)
        if not is_sint(target_sint):
            raise GuestProtocolError(f"SINT {target_sint} is not 1 to 15", field="target_sint")
        return Slot(target_vp, target_sint)

    def on_open_reserved(self, message: m.OpenReservedChannel) -> None:
        """OPEN_RESERVED_CHANNEL; the result goes to the slot named in it."""
        slot = self._slot(message.target_vp, message.target_sint)
        channel = self._find(message.relid)
        if channel is not None and channel.revoked:
            return
        placement = channel.placement if channel is not None else None
        request = OpenRequest(
            version=self._link.version,
            relid=message.relid,
            open_id=0,
            ring_gpadl=message.ring_gpadl,
            target_vp=None,
            downstream_page_offset=message.downstream_page_offset,
            user_data=bytes(m.USER_DEFINED_SIZE),
            connection_id=placement.connection_id if placement is not None else 0,
            event_flag=message.relid,
            reserved=slot,
        )
        if channel is None or not channel.is_primary:
            error = GuestProtocolError(
                f"there is no primary channel {message.relid}", field="relid"
            )
            self._lives.answer_open(request, error.status)
            raise error
        self._lives.open_untrusted(channel, request)

    def on_close_reserved(self, message: m.CloseReservedChannel) -> None:
        """CLOSE_RESERVED_CHANNEL; also from a guest that has unloaded."""
        slot = self._slot(message.target_vp, message.target_sint)
        reply = CloseReply(message.relid, slot)
        channel = self._channels.by_relid(message.relid)
        if channel is None:
            self._lives.answer_close(reply)
            raise GuestProtocolError(f"there is no channel {message.relid}", field="relid")
        if channel.is_reserved:
            self._presences.revoke_subchannels(channel)
        self._lives.close_reserved_untrusted(channel, reply)

    # --- Modify ----------------------------------------------------------------------------------

    def on_modify(self, message: m.ModifyChannel) -> None:
        """MODIFYCHANNEL."""
        try:
            channel = self._known(message.relid)
            self._check_vp(message.target_vp)
            self._lives.modify_untrusted(channel, message.target_vp)
        except GuestProtocolError as error:
            self._lives.answer_modify(message.relid, error.status)
            raise

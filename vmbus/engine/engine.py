"""The engine: one guest's bus, from INITIATE_CONTACT to UNLOAD.

Three parties drive it, and each has its part of :class:`Engine`: the guest posts messages, the
host program offers and revokes, devices answer. What they cause comes out of ``take``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vmbus.engine.channels import Channel, ChannelTable
from vmbus.engine.config import EngineConfig
from vmbus.engine.contact import agree_untrusted, monitor_pages, reply_slot
from vmbus.engine.events import (
    Connected as ConnectedEvent,
    Disconnected as DisconnectedEvent,
    Event,
    InterruptPage,
    MonitorPages,
    ResetDone,
)
from vmbus.engine.gpadls import GpadlTable
from vmbus.engine.lives import Lives
from vmbus.engine.offers import Offer
from vmbus.engine.outbox import Outbox
from vmbus.engine.presences import Presences
from vmbus.engine.requests import ChannelRequests
from vmbus.engine.sockets import SocketRequests
from vmbus.engine.states import (
    ACCEPTED,
    Connected,
    ConnectionState,
    ConnectionTrigger,
    Contact,
    Disconnected,
    Disconnecting,
    Link,
    Paused,
    follow,
)
from vmbus.errors import GuestProtocolError
from vmbus.gpadl import Gpadl
from vmbus.memory import GuestMemory
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version

MESSAGE_CONNECTIONS = (m.CONNECTION_MESSAGES, m.CONNECTION_MESSAGES_5)
"""Connection ids on which guests post; messages after the contact may come in on either."""
_CONNECTION_STATE_FAILED = 2


class Engine:
    """The host side of one VMBus, without I/O.

    No method blocks, and none is a checkpoint. Whatever happens is put into a queue of events;
    after every call, take them and act on them in order.

    Args:
        memory: The guest's memory, borrowed; only looked at to see whether pages exist.
        config: What to offer, and how much a guest may make the host hold.
    """

    def __init__(self, memory: GuestMemory, config: EngineConfig | None = None) -> None:
        self.memory = memory
        self.config = config or EngineConfig()
        self.connection: ConnectionState = Disconnected()
        self.outbox = Outbox()
        self.channel_table = ChannelTable(self.config.budgets.max_channels)
        self.gpadl_table = GpadlTable(memory, self.config.budgets, self.channel_table, self.outbox)
        self._lives = Lives(self.channel_table, self.gpadl_table, self.outbox)
        self._presences = Presences(self.channel_table, self.gpadl_table, self._lives, self.outbox)
        requests = ChannelRequests(
            config=self.config,
            channels=self.channel_table,
            gpadls=self.gpadl_table,
            lives=self._lives,
            presences=self._presences,
            outbox=self.outbox,
        )
        self.sockets = SocketRequests(self.config, self.outbox)
        self._unloaded_before = False
        self._busy: Channel | None = None
        self.received = 0
        self._handlers: dict[type[m.Message], Callable[[Any], None]] = {
            m.RequestOffers: self._on_request_offers,
            m.GpadlHeader: requests.on_gpadl_header,
            m.GpadlBody: requests.on_gpadl_body,
            m.GpadlTeardown: requests.on_gpadl_teardown,
            m.OpenChannel: requests.on_open,
            m.CloseChannel: requests.on_close,
            m.ModifyChannel: requests.on_modify,
            m.RelidReleased: requests.on_relid_released,
            m.OpenReservedChannel: requests.on_open_reserved,
            m.CloseReservedChannel: requests.on_close_reserved,
            m.TlConnectRequest: self.sockets.on_connect,
            m.ModifyConnection: self._on_modify_connection,
            m.Pause: self._on_pause,
            m.Resume: self._on_resume,
            m.Unload: self._on_unload,
        }

    # --- Guest -----------------------------------------------------------------------------------

    def receive_untrusted(self, connection_id: int, payload: bytes, *, vp: int = 0) -> None:
        """Take one control message that the guest posted. Never raises for what is in it.

        Args:
            connection_id: The connection id it was posted to; 1 and 4 are the bus's.
            payload: The SynIC message payload, already copied out of guest memory.
            vp: VP that posted it; for fault reports only.
        """
        self.received += 1
        message: m.Message | None = None
        try:
            if connection_id not in MESSAGE_CONNECTIONS:
                raise GuestProtocolError(
                    f"control message on connection {connection_id}", field="connection_id"
                )
            link = self.connection.link
            message = m.parse_message_untrusted(
                payload,
                direction=m.Direction.GUEST_TO_HOST,
                version=link.version if link is not None else None,
                features=link.features if link is not None else Feature(0),
            )
            if type(self.connection) not in ACCEPTED[type(message)]:
                raise GuestProtocolError(
                    f"{message.NAME} while {type(self.connection).__name__.lower()}", field="type"
                )
            if isinstance(message, m.InitiateContact):
                self._on_contact(Contact(connection_id, message))
            else:
                self._handlers[type(message)](message)
        except GuestProtocolError as error:
            number = int.from_bytes(payload[:4], "little") if len(payload) >= 4 else -1
            gone = isinstance(self.connection, Disconnected | Disconnecting)
            whole = len(payload) >= m.HEADER_SIZE + 4 and connection_id in MESSAGE_CONNECTIONS
            # Linux that unloads hv_vmbus says UNLOAD first and then, one by one, what it forgets
            # (vmbus_exit, vmbus_free_channels). It is forgotten here already.
            if not (gone and whole and number == m.RelidReleased.TYPE):
                relid = getattr(message, "relid", None)
                self.outbox.fault(error, message=number, relid=relid, vp=vp)
        self._settle()

    def reset(self) -> None:
        """The VM was reset: forget the guest, reserved channels included.

        Messages handed out before this call and not in a slot yet are void, reserved ones too.
        Nothing is sent. :class:`ResetDone` follows when all devices have let go; the VMM must not
        let the guest run before.
        """
        self._unloaded_before = False
        self._leave(reset=True)
        self._settle()

    # --- Host program ----------------------------------------------------------------------------

    def offer(self, offer: Offer) -> int:
        """Put a device on the bus; it is offered as soon as the guest wants to know.

        Offering an instance again that was revoked, but that the guest has not released yet, is
        possible: the guest gets to know the new one once it has forgotten the old one.

        Returns:
            The key of its primary channel; keys are never used twice.

        Raises:
            ConfigError: The instance is on the bus already.
            BudgetError: There are too many channels.
        """
        channel = self.channel_table.add(offer)
        self._offer_waiting()
        return channel.key

    def revoke(self, key: int) -> None:
        """Take a channel back, its sub-channels first.

        :class:`~vmbus.engine.events.ChannelGone` follows for each.

        Has no effect on a channel that is revoked already: closing a primary channel revokes its
        sub-channels, so the two can cross.

        Raises:
            LocalProtocolError: There never was a channel with this key.
        """
        channel = self.channel_table.get(key)
        if channel is None and self.channel_table.was_used(key):
            return
        self._presences.revoke(self.channel_table.by_key(key))
        self._settle()

    def offer_subchannels(self, key: int, count: int) -> list[int]:
        """Offer sub-channels 1 to ``count`` of an open primary channel.

        They have its GUIDs, and are revoked when it closes.

        Returns:
            Their keys, in order.

        Raises:
            LocalProtocolError: The primary channel is not open, or has sub-channels, or is a
                reserved one whose guest has left.
            ConfigError: More than its offer's ``max_subchannels``.
            BudgetError: There are too many channels; none has been offered.
        """
        made = self._presences.add_subchannels(self.channel_table.by_key(key), count)
        self._offer_waiting()
        return [channel.key for channel in made]

    # --- Answers to events -----------------------------------------------------------------------

    def open_done(self, key: int, *, ok: bool) -> None:
        """Answer :class:`~vmbus.engine.events.ChannelOpen`.

        Raises LocalProtocolError if it was not asked.
        """
        self._lives.open_done(self.channel_table.by_key(key), ok=ok)
        self._settle()

    def close_done(self, key: int) -> None:
        """Answer :class:`~vmbus.engine.events.ChannelClose`.

        Raises LocalProtocolError if it was not asked.
        """
        self._lives.close_done(self.channel_table.by_key(key))
        self._settle()

    def gpadl_released(self, key: int, handle: int) -> None:
        """Answer :class:`~vmbus.engine.events.GpadlTeardown`.

        Raises LocalProtocolError if it was not asked.
        """
        self.gpadl_table.released(self.channel_table.by_key(key), handle)
        self._settle()

    def modify_done(self, key: int, *, ok: bool) -> None:
        """Answer :class:`~vmbus.engine.events.ChannelModify`.

        Raises LocalProtocolError if it was not asked.
        """
        self._lives.modify_done(self.channel_table.by_key(key), ok=ok)

    def tl_connect_done(self, request_id: int, *, ok: bool) -> None:
        """Answer :class:`~vmbus.engine.events.TlConnect`.

        Raises LocalProtocolError if it was not asked.
        """
        self.sockets.done(request_id, ok=ok)

    # --- Looks -----------------------------------------------------------------------------------

    def take(self) -> list[Event]:
        """Hand out all events since the last call, in order. Messages are among them."""
        return self.outbox.take()

    def gpadl(self, key: int, handle: int) -> Gpadl | None:
        """Return a GPADL of a channel that its device may use, or None."""
        channel = self.channel_table.get(key)
        return self.gpadl_table.usable(channel, handle) if channel is not None else None

    # --- Connection ------------------------------------------------------------------------------

    def _move(self, trigger: ConnectionTrigger, successor: ConnectionState) -> None:
        self.connection = follow(self.connection, trigger, successor)

    def _on_contact(self, contact: Contact) -> None:
        if isinstance(self.connection, Disconnected) and self._is_quiet():
            self._answer_contact(contact)
        else:
            self._leave(contact=contact)

    def _answer_contact(self, contact: Contact) -> None:
        slot = reply_slot(contact, self.config.vp_count)
        delayed = self.config.delay_max_version and not self._unloaded_before
        try:
            link = agree_untrusted(
                contact,
                self.config,
                self.memory,
                Version.V6_0 if delayed else self.config.max_version,
            )
        except GuestProtocolError as error:
            self.outbox.fault(error, message=m.InitiateContact.TYPE, relid=None, vp=slot.vp)
            link = None
        if link is None:
            self.outbox.post_to(slot, m.VersionResponse(version_supported=False), version=None)
            return
        self._move(ConnectionTrigger.ACCEPT, Connected(link))
        self.outbox.link = link
        self.outbox.emit(
            ConnectedEvent(
                version=link.version,
                features=link.features,
                vp=link.slot.vp,
                sint=link.slot.sint,
            )
        )
        if link.monitor_pages is not None:
            self.outbox.emit(
                MonitorPages(page_1=link.monitor_pages[0], page_2=link.monitor_pages[1])
            )
        if link.interrupt_page is not None:
            self.outbox.emit(InterruptPage(gpa=link.interrupt_page))
        # The guest goes on posting where it has posted so far. That must not be 0: Linux uses the
        # number from 5.0 on, Haiku in every version.
        self.outbox.post(
            m.VersionResponse(
                version_supported=True,
                message_connection_id=contact.connection_id,
                supported_features=int(link.features),
            )
        )

    def _on_request_offers(self, _message: m.RequestOffers) -> None:
        state = self.connection
        assert isinstance(state, Connected)
        if state.offers_requested:
            raise GuestProtocolError("offers have been requested already", field="type")
        self._move(ConnectionTrigger.REQUEST_OFFERS, Connected(state.link, offers_requested=True))
        self._offer_waiting()
        self.outbox.post(m.AllOffersDelivered())

    def _on_modify_connection(self, message: m.ModifyConnection) -> None:
        state = self.connection
        assert isinstance(state, Connected)
        pages = monitor_pages(self.memory, message.monitor_page_1, message.monitor_page_2)
        in_use = any(
            channel.request is not None
            and channel.placement is not None
            and channel.placement.monitor_id is not None
            for channel in self.channel_table
        )
        failed = in_use or (
            pages is None and (message.monitor_page_1, message.monitor_page_2) != (0, 0)
        )
        if not failed:
            link = self._with_monitor_pages(state.link, pages)
            self._move(ConnectionTrigger.MODIFY, Connected(link, state.offers_requested))
        self.outbox.post(
            m.ModifyConnectionResponse(connection_state=_CONNECTION_STATE_FAILED if failed else 0)
        )
        if failed:
            raise GuestProtocolError(
                "monitor pages are in use" if in_use else "monitor pages are not memory",
                field="monitor_page_1",
            )

    def _on_pause(self, _message: m.Pause) -> None:
        state = self.connection
        assert isinstance(state, Connected)
        self.outbox.post(m.PauseResponse())
        self.outbox.hold()
        self._move(ConnectionTrigger.PAUSE, Paused(state.link, state.offers_requested))

    def _on_resume(self, _message: m.Resume) -> None:
        state = self.connection
        assert isinstance(state, Paused)
        self._move(ConnectionTrigger.RESUME, Connected(state.link, state.offers_requested))
        self.outbox.flow()

    def _on_unload(self, _message: m.Unload) -> None:
        self._unloaded_before = True
        self._leave(unload=True)

    def _with_monitor_pages(self, link: Link, pages: tuple[int, int] | None) -> Link:
        """Return ``link`` with other monitor pages, and make them known."""
        if pages != link.monitor_pages:
            page_1, page_2 = pages or (None, None)
            self.outbox.emit(MonitorPages(page_1=page_1, page_2=page_2))
        self.outbox.link = dataclasses.replace(link, monitor_pages=pages)
        return self.outbox.link

    # --- The end of a connection -----------------------------------------------------------------

    def _leave(
        self, *, unload: bool = False, reset: bool = False, contact: Contact | None = None
    ) -> None:
        """Start cleaning up; what is owed after that is kept in the state."""
        state = self.connection
        if isinstance(state, Connected | Paused):
            self._disconnect(state.link)
        link = None if isinstance(state, Disconnected) else state.link
        reset_owed = reset or (isinstance(state, Disconnecting) and state.reset)
        self._move(
            ConnectionTrigger.LEAVE,
            Disconnecting(link, unload=unload, reset=reset_owed, contact=contact),
        )
        # Sub-channels go first; they have the higher keys.
        for channel in reversed(tuple(self.channel_table)):
            self._presences.leave(channel, reset=reset)

    def _disconnect(self, link: Link) -> None:
        self.outbox.disconnect()
        self.sockets.abandon()
        if link.monitor_pages is not None:
            self.outbox.emit(MonitorPages(page_1=None, page_2=None))
        if link.interrupt_page is not None:
            self.outbox.emit(InterruptPage(gpa=None))

    def _settle(self) -> None:
        """Draw the consequences of devices and guest having let go of things."""
        if self._presences.settle():
            self._offer_waiting()
        state = self.connection
        if not isinstance(state, Disconnecting) or not self._is_quiet():
            return
        self._move(ConnectionTrigger.DRAINED, Disconnected())
        if state.link is not None:
            self.outbox.emit(DisconnectedEvent())
            if state.unload and state.link.version >= Version.V1_1:
                self.outbox.post_to(state.link.slot, m.UnloadResponse(), version=state.link.version)
        if state.reset:
            self.outbox.emit(ResetDone())
        if state.contact is not None:
            self._answer_contact(state.contact)

    def _is_quiet(self) -> bool:
        # Asked again after each GPADL of a guest that leaves, which may have thousands of them: who
        # was in the way the last time is likely to be it still.
        if self._busy is not None and not self._busy.is_quiet:
            return False
        self._busy = next((each for each in self.channel_table if not each.is_quiet), None)
        return self._busy is None

    def _offer_waiting(self) -> None:
        """Offer what the guest does not know yet, if it has asked for offers."""
        state = self.connection
        if isinstance(state, Connected | Paused) and state.offers_requested:
            self._presences.offer_waiting(state.link)

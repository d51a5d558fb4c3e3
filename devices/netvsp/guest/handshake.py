"""The network driver until it is there: channel, buffers, what it asks, sub-channels.

Sources: linux/drivers/net/hyperv, freebsd/sys/dev/hyperv/netvsc, openbsd/sys/dev/pv/if_hvn.c,
dpdk/drivers/net/netvsc, MacHyperVSupport/Network, mu_msvm/MsvmPkg/NetvscDxe.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container
from functools import partial

from netvsp.guest.control import Control
from netvsp.guest.events import Events
from netvsp.guest.habits import Buffers, HashItem, NetworkHabits, Step
from netvsp.guest.offloads import build_parameters, build_scaling, choose, query_revision
from netvsp.guest.receiving import Receiver
from netvsp.guest.replies import (
    AttachError,
    RndisError,
    check_address,
    check_answer,
    check_bare_completion,
    check_offloads,
    check_receive_section,
    check_scaling,
    check_send_section,
    check_word,
    name_of,
)
from netvsp.guest.sending import Sender
from netvsp.guest.shared import Counters, SharedBuffer
from netvsp.wire import ndis, nvsp, oids, rndis
from vmbus.guest import Driver, Guest, GuestChannel, Incoming
from vmbus.wire.messages import OfferChannel
from vmbus.wire.packets import IN_BAND, TRANSFER_PAGES

_FRIENDLY_NAME_ROOM = 512
_GENERAL_ROOM = 4096


class Handshake(Driver):
    """An adapter that can be started; the rest is in :class:`netvsp.guest.NetvscAdapter`.

    Args:
        guest: Whose driver this is.
        offer: The adapter's primary channel.
        habits: What the driver does in its own way.
        mtu: Bytes of payload that its frames may have.
        contiguous: False scatters the pages of rings, buffers and frames over the RAM.
        ring_pages: Pages of each ring, control page included; None: as the habits say.
        receive_size: Bytes of the receive buffer; None: as the habits say.
        send_size: Bytes of the send buffer; None: as the habits say.
    """

    def __init__(
        self,
        guest: Guest,
        offer: OfferChannel,
        habits: NetworkHabits,
        *,
        mtu: int,
        contiguous: bool,
        ring_pages: int | None,
        receive_size: int | None,
        send_size: int | None,
    ) -> None:
        super().__init__(
            guest,
            offer,
            ring_pages=ring_pages or habits.ring_pages,
            queue_depth=1,  # rings and sections are the limit
            contiguous=contiguous,
            max_packet=habits.max_packet,
        )
        self.habits = habits
        self.mtu = mtu
        self.version = 0
        """Of NVSP."""
        self.address = b""
        """Hardware address, 6 bytes."""
        self.friendly_name = ""
        self.is_up = False
        self.offloads = ndis.OffloadCapabilities()
        """What the device can do."""
        self.scaling = ndis.RssCapabilities(0, 0, 0, 0)
        """What it can do about receive-side scaling; no queues if it cannot."""
        self.scaling_table: tuple[int, ...] = ()
        """Channels, as the device was told; empty without receive-side scaling."""
        self.granted = 0
        """Sub-channels."""
        self.counters = Counters()
        self._panic = guest.panic
        self._sizes = (receive_size, send_size)
        self._start_options: tuple[int | None, Container[int] | None] = (None, None)
        self._receive: SharedBuffer | None = None
        self._send: SharedBuffer | None = None
        self._nvsp_count = 0
        self._asking = False
        """An NVSP request is in flight."""
        self._error: Exception | None = None
        self._capabilities = 0
        self._begin()

    def _begin(self) -> None:
        """Have new halves, for a new life of the channel."""
        self.open_channels: dict[int, GuestChannel] = {}
        """By number, 0 being the primary one."""
        arguments = (self.habits, self._panic, self.counters, self.open_channels)
        self.receiver = Receiver(*arguments, self._control_message)
        self.sender = Sender(
            self.guest, self.habits, self.counters, self.open_channels, contiguous=self._contiguous
        )
        self.control = Control(self.habits, self._panic, self._post_control)
        self.events = Events(self.habits, self._panic)
        self._initialized = False

    # ----------------------------------------------------------------------------- handshake

    async def start(
        self, sub_channels: int | None = None, *, only: Container[int] | None = None
    ) -> None:
        """Open the channel, shake hands, open the sub-channels. A checkpoint.

        Args:
            sub_channels: How many to ask for, if there may be so many; None: as the habits say.
            only: See :meth:`vmbus.guest.Driver.open_sub_channels`.

        Raises:
            AttachError: No version in common, or a step was refused.
            HostRefusedError: A channel or a buffer was refused.
            GuestPanic: The host broke a rule.
        """
        habits = self.habits
        self._start_options = (sub_channels, only)
        if habits.buffers is Buffers.BEFORE_OPEN:
            await self._make_buffers(nvsp.VERSION_6_1)
        channel = await self.open()
        self.open_channels[0] = channel
        self.guest.start_soon(self.receiver.run)
        await self._agree()
        await self._configure()
        await self._share()
        for step in habits.steps:
            await self._step(step)

    def packet_handler(self, offer: OfferChannel) -> Callable[[Incoming], None]:
        """Have the packets of each channel with its number. Cannot block."""
        return partial(self._packet, offer.subchannel_index)

    async def _request(self, payload: bytes) -> Incoming:
        """Send an NVSP message that wants a completion; return it. A checkpoint."""
        habits = self.habits
        number: int | None = None
        if habits.nvsp_id_zero:
            number = 0
        elif habits.nvsp_ids is not None:
            number = habits.nvsp_ids + self._nvsp_count
            self._nvsp_count += 1
        self._asking = True
        try:
            return await self.channels[0].request(
                payload[: habits.message_size], transaction_id=number
            )
        finally:
            self._asking = False

    async def _ask(self, payload: bytes, kind: int) -> bytes:
        """Send an NVSP message; return the payload of its answer, which is of type ``kind``."""
        return check_answer(await self._request(payload), kind, self.habits, self._panic)

    async def _tell(self, payload: bytes) -> None:
        """Send an NVSP message that has no answer."""
        if self.habits.asks_completions:
            kind = nvsp.parse_type_untrusted(payload)
            check_bare_completion(await self._request(payload), kind, self.habits, self._panic)
        else:
            await self.channels[0].send(payload[: self.habits.message_size])

    async def _agree(self) -> None:
        versions = self.habits.versions
        if self.habits.keeps_version and self.version:
            versions = (self.version,)
        for version in versions:
            answer = await self._ask(nvsp.build_init(version, version), nvsp.INIT_COMPLETE)
            found, status = nvsp.parse_init_complete_untrusted(answer)
            if status != nvsp.SUCCESS:
                continue
            if found != version:
                self._panic(f"NVSP INIT_COMPLETE: {found:#x} agreed on, {version:#x} was offered")
            self.version = version
            return
        raise AttachError("the device refuses all NVSP versions of this driver")

    async def _configure(self) -> None:
        habits, version = self.habits, self.version
        self._capabilities = 0
        if version >= nvsp.VERSION_2:
            self._capabilities = habits.capabilities_of(version)
            mtu = habits.config_mtu or self.mtu + habits.config_header
            await self._tell(nvsp.build_ndis_config(mtu, self._capabilities))
        longest = self.mtu + 14
        if version >= nvsp.VERSION_2 and habits.config_mtu is not None:
            longest = habits.config_mtu
        self.receiver.max_frame = longest + 4  # a tag within the frame
        self.receiver.takes_tags = bool(self._capabilities & nvsp.CAPABILITY_8021Q)
        self.events.agreed(version, self._capabilities)
        ndis_version = habits.ndis_version
        if ndis_version is None:
            ndis_version = (6, 30) if version >= nvsp.VERSION_5 else (6, 1)
        await self._tell(nvsp.build_ndis_version(*ndis_version))

    async def _make_buffers(self, version: int) -> None:
        """Take memory for the buffers, and describe those that are described before all else."""
        habits = self.habits
        receive, send = self._sizes
        if receive is None:
            receive = habits.receive_size
            if version <= nvsp.VERSION_2:
                receive = min(receive, habits.receive_size_old)
        make = partial(SharedBuffer, self.guest, self.offer.relid, contiguous=self._contiguous)
        self._receive = make(receive)
        if habits.send_size:
            self._send = make(habits.send_size if send is None else send)
        if habits.buffers is not Buffers.IN_TURN:
            await self._receive.describe()
            if self._send is not None:
                await self._send.describe()

    async def _share(self) -> None:
        habits, panic = self.habits, self._panic
        if self._receive is None:
            await self._make_buffers(self.version)
        receive, send = self._receive, self._send
        assert receive is not None
        await receive.describe()
        assert receive.gpadl is not None
        answer = await self._ask(
            nvsp.build_buffer(nvsp.SEND_RECEIVE_BUFFER, receive.gpadl.handle, habits.receive_id),
            nvsp.SEND_RECEIVE_BUFFER_COMPLETE,
        )
        section = check_receive_section(answer, receive.size, habits, panic)
        if section.status != nvsp.SUCCESS:
            raise AttachError(f"SEND_RECEIVE_BUFFER: status {section.status}")
        self.receiver.section = section
        self.receiver.buffer = receive
        if send is None:
            return
        await send.describe()
        assert send.gpadl is not None
        answer = await self._ask(
            nvsp.build_buffer(nvsp.SEND_SEND_BUFFER, send.gpadl.handle, habits.send_id),
            nvsp.SEND_SEND_BUFFER_COMPLETE,
        )
        status, size = check_send_section(answer, send.size, habits, panic)
        if status != nvsp.SUCCESS:
            raise AttachError(f"SEND_SEND_BUFFER: status {status}")
        self.sender.use_buffer(send, size)

    # ------------------------------------------------------------------------- steps of a start

    async def _step(self, step: Step) -> None:
        actions: dict[Step, Callable[[], Awaitable[None]]] = {
            Step.INITIALIZE: self._initialize,
            Step.FRAME_SIZE: self._ask_frame_size,
            Step.PERMANENT_ADDRESS: partial(self._ask_address, oids.E802_3_PERMANENT_ADDRESS),
            Step.CURRENT_ADDRESS: partial(self._ask_address, oids.E802_3_CURRENT_ADDRESS),
            Step.FRIENDLY_NAME: self._ask_name,
            Step.QUERY_OFFLOADS: self._ask_offloads,
            Step.SET_OFFLOADS: self._set_offloads,
            Step.CONNECT_STATUS: self._ask_link,
            Step.LINK_SPEED: self._ask_speed,
            Step.QUERY_SCALING: self._ask_scaling,
            Step.NO_FILTER: partial(self.set, oids.GEN_CURRENT_PACKET_FILTER, bytes(4)),
            Step.SUB_CHANNELS: self._make_sub_channels,
        }
        await actions[step]()

    async def _initialize(self) -> None:
        self._initialized = True
        reply = await self.control.initialize()
        if reply.status != rndis.STATUS_SUCCESS:
            raise AttachError(f"RNDIS INITIALIZE: status {reply.status:#010x}")
        if reply.alignment > 12 or not reply.max_packets:
            self._panic(
                f"INITIALIZE_CMPLT: {reply.max_packets} packets in a message, each at a multiple "
                f"of 1 << {reply.alignment}"
            )
        self.sender.max_packets = reply.max_packets
        # hn_rndis_init: what it builds is at least 4 bytes aligned.
        self.sender.alignment = max(1 << reply.alignment, 4)
        always = self.habits.hash_item is HashItem.ALWAYS
        self.sender.hashes = always and self.version >= nvsp.VERSION_5

    async def _try(self, oid: int, data: bytes = b"", *, room: int) -> bytes | None:
        """Return an object, or None if the device does not have it."""
        reply = await self.control.query(oid, data, room)
        return reply.buffer if reply.status == rndis.STATUS_SUCCESS else None

    async def _ask_frame_size(self) -> None:
        oid = oids.GEN_MAXIMUM_FRAME_SIZE
        data = await self._try(oid, room=4)
        if data is not None:
            self.mtu = min(self.mtu, check_word(oid, data, self._panic))

    async def _ask_address(self, oid: int) -> None:
        self.address = check_address(await self.query(oid, room=6), self._panic)

    async def _ask_name(self) -> None:
        data = await self._try(oids.GEN_FRIENDLY_NAME, room=_FRIENDLY_NAME_ROOM)
        if data:
            self.friendly_name = data.decode("utf-16-le", "replace").partition("\0")[0]

    async def _ask_offloads(self) -> None:
        revision = query_revision(self.habits, self.version)
        oid = oids.TCP_OFFLOAD_HARDWARE_CAPABILITIES
        data = await self._try(
            oid, ndis.build_offload_query(revision), room=ndis.OFFLOAD_SIZES[revision]
        )
        if data is not None:
            self.offloads = check_offloads(data, revision, self._panic)
        elif self.habits.offloads_required:
            raise AttachError(f"{name_of(oid)}: refused")

    async def _set_offloads(self) -> None:
        chosen = choose(self.habits, self.offloads, self.version)
        try:
            await self.set(
                oids.TCP_OFFLOAD_PARAMETERS, build_parameters(self.habits, chosen, self.version)
            )
        except RndisError as error:
            if self.habits.offloads_required:
                raise AttachError(str(error)) from error
            return
        self.sender.offloads = chosen
        self.receiver.coalesces = bool(self._capabilities & nvsp.CAPABILITY_RSC) and (
            ndis.OFFLOAD_ENABLED in (chosen.rsc_ipv4, chosen.rsc_ipv6)
        )

    async def _ask_link(self) -> None:
        oid = oids.GEN_MEDIA_CONNECT_STATUS
        data = await self._try(oid, room=4)
        if data is not None:
            self.events.link = not check_word(oid, data, self._panic)

    async def _ask_speed(self) -> None:
        oid = oids.GEN_LINK_SPEED
        if self.version >= nvsp.VERSION_5:
            data = await self._try(oid, room=4)
            if data is not None:
                self.events.speed = check_word(oid, data, self._panic)

    async def _ask_scaling(self) -> None:
        if self.version < nvsp.VERSION_5 or self._limit() < 2:
            return
        query = ndis.build_rss_query()
        data = await self._try(oids.GEN_RECEIVE_SCALE_CAPABILITIES, query, room=len(query))
        if data is not None:
            self.scaling = check_scaling(data, self._panic)

    def _limit(self) -> int:
        """Return how many channels the driver would use."""
        wanted = self._start_options[0]
        if wanted is None:
            return min(self.guest.machine.vp_count, self.habits.max_channels)
        return wanted + 1

    async def _make_sub_channels(self) -> None:
        wanted = min(self._limit(), self.scaling.queues) - 1
        if wanted < 1:
            return
        answer = await self._ask(nvsp.build_subchannel(wanted), nvsp.SUBCHANNEL)
        status, granted = nvsp.parse_subchannel_complete_untrusted(answer)
        if status != nvsp.SUCCESS:
            return
        if granted > wanted:
            self._panic(f"NVSP SUBCHANNEL: {granted} granted, {wanted} were asked for")
        if not granted:
            return
        self.granted = granted
        await self.open_sub_channels(granted, only=self._start_options[1])
        for channel in self.channels[1:]:
            self.open_channels[channel.offer.subchannel_index] = channel
        self.sender.queues = 1 + granted
        self.sender.table = tuple(
            number % (1 + granted) for number in range(nvsp.SEND_TABLE_ENTRIES)
        )
        self.sender.hashes |= self.habits.hash_item is HashItem.WITH_SUB_CHANNELS
        # Linux fills its table before it knows how many it gets (rndis_filter_device_add).
        spread = 1 + (wanted if self.habits.table_as_wanted else granted)
        table = tuple(number % spread for number in range(self.scaling.table_entries))
        await self.set_scaling(table)

    async def set_scaling(self, table: tuple[int, ...]) -> None:
        """Have received flows spread over channels. A checkpoint.

        Args:
            table: Numbers of channels, as many as the device's capabilities say.

        Raises:
            AttachError: The device refuses, and this driver does not do without.
        """
        habits = self.habits
        oid = oids.GEN_RECEIVE_SCALE_PARAMETERS
        build = partial(build_scaling, habits, self.scaling, table)
        self.receiver.allowed |= set(table) & self.open_channels.keys()
        try:
            if habits.scaling_disabled_first:
                await self.set(oid, build(flags=ndis.RSS_DISABLE))
            await self.set(oid, build())
        except RndisError as error:
            if habits.scaling_required:
                raise AttachError(str(error)) from error
            return
        self.scaling_table = table

    # ------------------------------------------------------------------------------- requests

    async def _post_control(self, message: bytes, number: int) -> None:
        """Send an RNDIS request and wait for its completion. A checkpoint."""
        habits = self.habits
        identity = 0 if habits.nvsp_id_zero else number if habits.control_ids else None
        status = await self.sender.post_control(message, self.channels[0], transaction_id=identity)
        if status != nvsp.SUCCESS:
            self._panic(f"an RNDIS request is completed with NVSP status {status}")

    async def query(self, oid: int, data: bytes = b"", *, room: int = _GENERAL_ROOM) -> bytes:
        """Ask for an object. A checkpoint.

        Args:
            oid: One of :mod:`netvsp.wire.oids`, or any number.
            data: What goes with the question.
            room: Bytes of the longest answer that is taken.

        Raises:
            RndisError: The device does not have it.
            GuestPanic: It answers wrongly.
        """
        reply = await self.control.query(oid, data, room)
        if reply.status != rndis.STATUS_SUCCESS:
            raise RndisError(f"QUERY {name_of(oid)}", reply.status)
        return reply.buffer

    async def set(self, oid: int, data: bytes) -> None:
        """Set an object; see :meth:`query`. A checkpoint."""
        status = await self.control.set(oid, data)
        if status != rndis.STATUS_SUCCESS:
            raise RndisError(f"SET {name_of(oid)}", status)

    async def keepalive(self) -> None:
        """Ask whether the device is still there. A checkpoint.

        Raises:
            RndisError: It says that something is wrong.
        """
        status = await self.control.keepalive()
        if status != rndis.STATUS_SUCCESS:
            raise RndisError("KEEPALIVE", status)

    # ------------------------------------------------------------------------------- incoming

    def _packet(self, channel: int, packet: Incoming) -> None:
        """Take a packet that is no completion, in the interrupt."""
        if packet.kind == TRANSFER_PAGES:
            self.receiver.packet(channel, packet)
        elif packet.kind == IN_BAND:
            table = self.events.notice(
                packet, channel=channel, queues=1 + self.granted, asking=self._asking
            )
            if table and self.habits.uses_send_table:
                self.sender.table = table
        else:
            self._panic(f"a packet of type {packet.kind}: netvsc_process_raw_pkt drops it")

    def _control_message(self, message: bytes, channel: int) -> None:
        """Take an RNDIS message that is no frame, in the interrupt."""
        kind, _length = rndis.HEADER.unpack_from(message)
        if not self._initialized:
            self._panic("an RNDIS message before INITIALIZE: nvdev->extension is not there yet")
        if kind == rndis.INDICATE_STATUS:
            self.events.indication(message)
        elif kind & rndis.COMPLETE and kind in rndis.MESSAGE_NAMES:
            self.control.reply(message, channel)
        else:
            name = rndis.MESSAGE_NAMES.get(kind, f"{kind:#010x}")
            self._panic(f"RNDIS {name}: rndis_filter_receive does not handle it")

"""Sending: frames and RNDIS requests, in pages of the guest or in the send buffer.

Sources: linux/drivers/net/hyperv/netvsc.c (``netvsc_send``, ``netvsc_copy_to_send_buf``,
``netvsc_build_mpb_array``) and netvsc_drv.c (``netvsc_xmit``), freebsd/sys/dev/hyperv/netvsc/
if_hn.c (``hn_encap``, ``hn_try_txagg``), openbsd/sys/dev/pv/if_hvn.c (``hvn_encap``), dpdk/drivers/
net/netvsc/hn_rxtx.c, MacHyperVSupport/Network (``outputPacket``), mu_msvm/MsvmPkg/NetvscDxe
(``NetvscTransmit``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import trio

from netvsp.guest.frames import TCP, flow_hash, leave_checksum, leave_segments, parse_headers
from netvsp.guest.habits import Form, HashItem, NetworkHabits
from netvsp.guest.replies import check_answer
from netvsp.guest.shared import Counters, SharedBuffer, Slots
from netvsp.wire import ndis, nvsp, ppi, rndis
from vmbus.guest import Buffer, BufferPool, Guest, GuestChannel
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.packets import GPA_DIRECT, IN_BAND, RANGES_HEADER

_SENDS = (ndis.CSUM_TX, ndis.CSUM_BOTH)
_HEADER_AT = 320
"""Where on its page an RNDIS header begins: it stands in the head room of a socket buffer."""
_FRAME_AT = 66
"""Where on its first page a frame begins."""
_LINEAR = 2048
"""Longest frame that is in one piece; of a longer one the headers are."""
_HEAD = 66
_FRAGMENT = 32768
"""Bytes of the pieces of a long frame: what a socket gives at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    """An RNDIS PACKET, ready to be placed."""

    head: bytes
    """Header, per-packet information and gap."""
    frame: bytes

    @property
    def size(self) -> int:
        return len(self.head) + len(self.frame)

    def padded(self, alignment: int) -> bytes:
        """Return the message with its length, and itself, rounded up."""
        size = -(-self.size // alignment) * alignment
        whole = self.head + self.frame
        return (rndis.HEADER.pack(rndis.PACKET, size) + whole[8:]).ljust(size, b"\0")


class Sender:
    """The sending half of an adapter.

    Args:
        guest: Whose adapter it is.
        habits: What the driver does in its own way.
        counters: Of the adapter.
        channels: Its open channels by number; the adapter adds to it.
        contiguous: False scatters the pages of frames over the RAM.
    """

    def __init__(
        self,
        guest: Guest,
        habits: NetworkHabits,
        counters: Counters,
        channels: Mapping[int, GuestChannel],
        *,
        contiguous: bool,
    ) -> None:
        self.buffer: SharedBuffer | None = None
        self.section_size = 0
        self.max_packets = 1
        """Messages in one section."""
        self.alignment = 1
        """Bytes: each message in a section begins at a multiple of it."""
        self.hashes = False
        """Frames say what their flow's hash is."""
        self.table: tuple[int, ...] = (0,)
        """Which channel a flow is sent on, by its hash."""
        self.queues = 1
        """Channels that there should be; some of them may not be open."""
        self.offloads = ndis.OffloadParameters()
        """What the device has been asked to do."""
        self._panic = guest.panic
        self._habits = habits
        self._counters = counters
        self._channels = channels
        self._pool = BufferPool(guest.ram, contiguous=contiguous)
        self._slots = Slots()
        self._sections = Slots(0)
        self._freed = trio.lowlevel.ParkingLot()
        self._error: Exception | None = None

    def use_buffer(self, buffer: SharedBuffer, section_size: int) -> None:
        """Send through a buffer from now on. Cannot block."""
        self.buffer = buffer
        self.section_size = section_size
        self._sections = Slots(buffer.size // section_size)

    # -------------------------------------------------------------------------------- packets

    async def _post(
        self,
        channel: GuestChannel,
        channel_type: int,
        *,
        ranges: Sequence[bytes] = (),
        section: int | None = None,
        section_bytes: int = 0,
        transaction_id: int | None = None,
        release: Callable[[], None],
    ) -> int:
        """Send SEND_RNDIS_PACKET; return the status of its completion. A checkpoint.

        ``release`` is called once, when what the packet names is the driver's again.
        """
        payload = nvsp.build_rndis_packet(
            channel_type, nvsp.NO_SECTION if section is None else section, section_bytes
        )[: self._habits.message_size]
        header = b""
        if ranges:
            header = RANGES_HEADER.pack(0, len(ranges)) + b"".join(ranges)
        packet = await channel.request(
            payload,
            kind=GPA_DIRECT if ranges else IN_BAND,
            header=header,
            transaction_id=transaction_id,
            release=release,
        )
        release()
        answer = check_answer(packet, nvsp.SEND_RNDIS_PACKET_COMPLETE, self._habits, self._panic)
        return nvsp.parse_rndis_packet_complete_untrusted(answer)

    async def _take_section(self) -> int:
        while True:
            if self._error is not None:
                raise self._error
            section = self._sections.take()
            if section is not None:
                return section
            await self._freed.park()

    def _give_section(self, section: int) -> None:
        self._sections.give(section)
        self._freed.unpark()

    async def post_control(
        self, message: bytes, channel: GuestChannel, *, transaction_id: int | None
    ) -> int:
        """Send a control message; return the status of its completion. A checkpoint.

        Raises:
            ValueError: It is longer than a section, and the driver sends it in one.
        """
        if self._habits.control_in_section and self.buffer is not None:
            if len(message) > self.section_size:
                raise ValueError(f"a message of {len(message)} bytes fits into no section")
            section = await self._take_section()
            self.buffer.write(section * self.section_size, message)
            return await self._post(
                channel,
                nvsp.CHANNEL_CONTROL,
                section=section,
                section_bytes=len(message),
                transaction_id=transaction_id,
                release=lambda: self._give_section(section),
            )
        page = self._pool.take(len(message))
        page.write(0, message)
        if self._habits.form is Form.RANGES:
            ranges = [page.range_at(0, len(message))]
        else:
            ranges = _by_pages(page, 0, len(message))
        return await self._post(
            channel,
            nvsp.CHANNEL_CONTROL,
            ranges=ranges,
            transaction_id=transaction_id,
            release=page.release,
        )

    # --------------------------------------------------------------------------------- frames

    def prepare(
        self,
        frame: bytes,
        *,
        vlan: ppi.Vlan | None = None,
        checksum: bool = False,
        segment: int | None = None,
        hash_value: int | None = None,
    ) -> _Prepared:
        """Return a frame as an RNDIS message, with what the device is to do. Cannot block.

        The arguments are those of :meth:`send`.

        Raises:
            ValueError: It is no frame that this can be done with.
        """
        items = b""
        if self.hashes and hash_value is not None:
            items += ppi.build_item(ppi.HASH_VALUE, hash_value)
        if vlan is not None:
            items += ppi.build_item(ppi.VLAN, ppi.pack_vlan(vlan))
        if segment is not None:
            frame, headers = leave_segments(frame)
            asked = self.offloads.lso_v2_ipv6 if headers.ipv6 else self.offloads.lso_v2_ipv4
            if asked != ndis.OFFLOAD_ENABLED:
                raise ValueError("the device has not been asked to cut segments")
            large = ppi.LargeSend(segment, headers.transport, headers.ipv6)
            items += ppi.build_item(ppi.LARGE_SEND, ppi.pack_large_send(large))
        elif checksum:
            frame, word = self._leave_checksum(frame)
            items += ppi.build_item(ppi.CHECKSUM, word)
        else:
            parse_headers(frame)
        return _Prepared(self._head(len(frame), items), frame)

    def _leave_checksum(self, frame: bytes) -> tuple[bytes, int]:
        """Return a frame without its sums, and the word that says which they are."""
        frame, headers = leave_checksum(frame)
        offloads, tcp = self.offloads, headers.protocol == TCP
        asked = (
            (offloads.udp_ipv4, offloads.tcp_ipv4),
            (offloads.udp_ipv6, offloads.tcp_ipv6),
        )[headers.ipv6][tcp]
        if asked not in _SENDS:
            raise ValueError("the device has not been asked to fill in such sums")
        word = ppi.TX_TCP if tcp else ppi.TX_UDP
        if self._habits.header_offsets:
            word |= headers.transport << ppi.TX_HEADER_OFFSET_SHIFT
            word |= ppi.TX_IPV6 if headers.ipv6 else ppi.TX_IPV4
        else:
            word |= ppi.TX_IPV4  # hvn_encap says so of IPv6, too
        if offloads.ipv4 in _SENDS and not headers.ipv6:
            word |= ppi.TX_IP_HEADER
            place = headers.network + 10
            frame = frame[:place] + bytes(2) + frame[place + 2 :]
        return frame, word

    def _head(self, size: int, items: bytes) -> bytes:
        gap = self._habits.header_gap
        fixed = rndis.PACKET_HEADER_SIZE
        begin = fixed + len(items) + gap
        # Drivers that know of per-packet information say where it would be, if there is none.
        info = fixed - rndis.HEADER_SIZE if self._habits.reads_items else 0
        words = (
            rndis.PACKET, begin + size, begin - rndis.HEADER_SIZE, size, 0, 0, 0, info, len(items),
            0, 0,
        )  # fmt: skip
        return rndis.PACKET_HEADER.pack(*words) + items + bytes(gap)

    def pick(self, flow: int) -> tuple[int, GuestChannel]:
        """Return the channel that a flow is sent on, and its number, by the flow's hash."""
        # linux netvsc_select_queue: what is too much is taken off as often as it takes.
        number = self.table[flow % len(self.table)] % self.queues
        if number not in self._channels:
            number = 0
        return number, self._channels[number]

    async def send(
        self,
        frame: bytes,
        *,
        vlan: ppi.Vlan | None = None,
        checksum: bool = False,
        segment: int | None = None,
        hash_value: int | None = None,
        channel: int | None = None,
        copy: bool | None = None,
        pieces: Sequence[int] | None = None,
    ) -> int:
        """Send a frame; see :meth:`netvsp.guest.NetvscAdapter.send`. A checkpoint."""
        flow = flow_hash(frame) if hash_value is None else hash_value
        number, where = self.pick(flow) if channel is None else (channel, self._channels[channel])
        if hash_value is None and self._habits.hash_item is HashItem.ALWAYS:
            flow = number
        prepared = self.prepare(
            frame, vlan=vlan, checksum=checksum, segment=segment, hash_value=flow or None
        )
        if pieces is not None and (copy or sum(pieces) != len(prepared.frame)):
            raise ValueError(f"pieces of {sum(pieces)} bytes for a frame of {len(prepared.frame)}")
        section = await self._section_for(prepared, False if pieces is not None else copy)
        if section is not None:
            assert self.buffer is not None
            message = prepared.head + prepared.frame
            self.buffer.write(section * self.section_size, message)
            return await self._post_frames(
                [prepared], where, section=section, section_bytes=len(message)
            )
        body, ranges = self._place(prepared.frame, pieces)
        head = self._pool.take(_HEADER_AT + len(prepared.head))
        head.write(_HEADER_AT, prepared.head)
        if self._habits.form is Form.RANGES:
            first = [head.range_at(_HEADER_AT, len(prepared.head))]
        else:
            first = _by_pages(head, _HEADER_AT, len(prepared.head))
        return await self._post_frames([prepared], where, pages=(head, body), ranges=first + ranges)

    async def _section_for(self, prepared: _Prepared, copy: bool | None) -> int | None:
        """Return a section for a message that is to be copied, or None if it is not."""
        habits = self._habits
        fits = self.buffer is not None and prepared.size <= self.section_size
        if habits.form is Form.NONE or copy:
            if not fits:
                raise ValueError(
                    f"a message of {prepared.size} bytes does not fit into a section of "
                    f"{self.section_size}"
                )
            return await self._take_section()
        limit = habits.section_limit
        if copy is None and fits:
            if limit is None:
                small = prepared.size + self.alignment < self.section_size
            else:
                small = prepared.size <= limit
            if small:
                return self._sections.take()
        return None

    def _place(self, frame: bytes, pieces: Sequence[int] | None) -> tuple[Buffer, list[bytes]]:
        """Copy a frame into pages; return them, and the ranges that name its pieces."""
        whole = self._habits.form is Form.RANGES
        if pieces is None:
            pieces = [len(frame)]
            if whole and len(frame) > _LINEAR:
                rest = len(frame) - _HEAD
                count = -(-rest // _FRAGMENT)
                pieces = [_HEAD] + [_FRAGMENT] * (count - 1) + [rest - _FRAGMENT * (count - 1)]
        body = self._pool.take(_FRAME_AT + len(frame))
        body.write(_FRAME_AT, frame)
        ranges: list[bytes] = []
        position = _FRAME_AT
        for size in pieces:
            if whole:
                ranges.append(body.range_at(position, size))
            else:
                ranges += _by_pages(body, position, size)
            position += size
        if len(ranges) + 1 > self._habits.max_ranges:
            body.release()
            raise ValueError(
                f"{len(ranges) + 1} ranges, the driver has {self._habits.max_ranges} at most"
            )
        return body, ranges

    async def _post_frames(
        self,
        frames: Sequence[_Prepared],
        channel: GuestChannel,
        *,
        pages: Sequence[Buffer] = (),
        ranges: Sequence[bytes] = (),
        section: int | None = None,
        section_bytes: int = 0,
    ) -> int:
        slot: int | None = None
        transaction_id: int | None = None
        if self._habits.data_ids is not None:
            base, shift = self._habits.data_ids
            slot = self._slots.take()
            assert slot is not None
            transaction_id = base + (slot << shift)

        def release() -> None:
            for buffer in pages:
                buffer.release()
            if section is not None:
                self._give_section(section)
            if slot is not None:
                self._slots.give(slot)

        status = await self._post(
            channel,
            self._habits.data_channel,
            ranges=ranges,
            section=section,
            section_bytes=section_bytes,
            transaction_id=transaction_id,
            release=release,
        )
        counters = self._counters
        if status == nvsp.SUCCESS:
            counters.sent += len(frames)
            counters.sent_bytes += sum(len(each.frame) for each in frames)
        else:
            counters.failed += len(frames)
        return status

    async def send_many(
        self, frames: Sequence[bytes], *, channel: int | None = None, partial: bool = False
    ) -> list[int]:
        """Send frames, several in a section; see :meth:`netvsp.guest.NetvscAdapter.send_many`."""
        habits = self._habits
        if not habits.batches or (partial and not habits.partial):
            raise ValueError("this driver does not do that")
        where = self._channels[0 if channel is None else channel]
        statuses: list[int] = []
        waiting = [self.prepare(frame) for frame in frames]
        while waiting:
            batch, data = self._batch(waiting, leave_one=partial)
            del waiting[: len(batch)]
            section = await self._take_section()
            assert self.buffer is not None
            ends_here = partial and len(waiting) == 1
            if not ends_here:
                self.buffer.write(section * self.section_size, data)
                statuses.append(
                    await self._post_frames(batch, where, section=section, section_bytes=len(data))
                )
                continue
            # netvsc_send, cp_partial: only the header of the last one goes into the section.
            last = waiting.pop()
            data += last.head
            try:
                if len(data) > self.section_size:
                    raise ValueError("the last header does not fit into the section")
                body, ranges = self._place(last.frame, None)
            except ValueError:
                self._give_section(section)
                raise
            self.buffer.write(section * self.section_size, data)
            statuses.append(
                await self._post_frames(
                    [*batch, last],
                    where,
                    pages=(body,),
                    ranges=ranges,
                    section=section,
                    section_bytes=len(data),
                )
            )
        return statuses

    def _batch(
        self, waiting: Sequence[_Prepared], *, leave_one: bool
    ) -> tuple[list[_Prepared], bytes]:
        """Return as many messages as go into one section, and what stands there.

        All but the last are padded: netvsc_copy_to_send_buf does it while more are to come.
        """
        most = len(waiting) - leave_one
        count = 0
        data = b""
        while count < min(most, self.max_packets):
            more = waiting[count].padded(self.alignment)
            if len(data) + len(more) > self.section_size:
                break
            data += more
            count += 1
        if count == 0:
            raise ValueError(f"a message of {waiting[0].size} bytes fits into no section")
        if not leave_one or count < most:
            last = waiting[count - 1]
            start = len(data) - len(last.padded(self.alignment))
            data = data[:start] + last.head + last.frame
        return list(waiting[:count]), data

    def end(self, error: Exception) -> None:
        """Let those who wait for a section raise ``error``. Cannot block."""
        self._error = error
        self._freed.unpark_all()


def _by_pages(buffer: Buffer, offset: int, length: int) -> list[bytes]:
    """Return the ranges of some bytes, one for each page."""
    ranges = []
    while True:
        size = min(length, PAGE_SIZE - offset % PAGE_SIZE)
        ranges.append(buffer.range_at(offset, size))
        offset += size
        length -= size
        if not length:
            return ranges

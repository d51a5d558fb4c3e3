"""The common case of a SCSI request, done with few Python calls.

A request is common if it is a 64-byte EXECUTE_SRB with exactly one GPA range that is as long as
the transfer, for a unit that exists. That is every READ and WRITE of every driver we know. Such a
request is parsed, executed and answered here; anything else, and everything that turns out to be
wrong, goes to :meth:`storvsp.session.Session.handle`, which does the same thing at leisure. A test
proves that both give the same bytes for the same packet.

What it saves (CPython 3.11, ``make bench``): about a third of the host's time per request.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from storvsp.scsi import Command, DataDirection
from storvsp.wire import COMPLETE_IO, EXECUTE_SRB, PACKET_SIZE, REQUEST, SRB_SUCCESS, Srb
from vmbus.channel import Channel
from vmbus.errors import GuestProtocolError
from vmbus.ring import Packet
from vmbus.wire.gpa import PAGE_SIZE, pfn_list
from vmbus.wire.packets import COMPLETION, DESCRIPTOR_SIZE, GPA_DIRECT

if TYPE_CHECKING:
    import trio

    from storvsp.session import Session

RANGE = struct.Struct("<4xIIIQ")
"""From byte 16 of the packet: reserved, range count, byte count, byte offset, first page."""
FIRST_PFN = 32
GOOD = struct.Struct("<HHHHQIIIHBB5sBBxI20x16s")
"""A successful answer, descriptor included: what the request said at bytes 16 to 20 and 48 to 63 is
repeated."""
assert GOOD.size == DESCRIPTOR_SIZE + PACKET_SIZE
assert REQUEST.size == PACKET_SIZE
OFFSET8 = DESCRIPTOR_SIZE // 8
LENGTH8 = GOOD.size // 8

_range = RANGE.unpack_from
_request = REQUEST.unpack_from
_good = GOOD.pack
_DIRECTIONS = (DataDirection.WRITE, DataDirection.READ)


def serve_batch_untrusted(
    session: Session, channel: Channel, packets: list[Packet], nursery: trio.Nursery
) -> None:
    """Answer a batch of packets of a session that is ready. Cannot block.

    Args:
        session: Whose units are meant.
        channel: Where the packets came from and the answers go.
        packets: Private copies.
        nursery: Where commands go that have to wait for their disk.
    """
    units = session.controller.units
    initiator = session.controller.initiator
    gather = channel.memory.gather
    complete = channel.complete_packet
    inline = 0
    for packet in packets:
        data = packet.data
        start = packet.payload_offset
        if packet.kind == GPA_DIRECT and start > FIRST_PFN and len(data) - start == PACKET_SIZE:
            count, byte_count, byte_offset, pfn = _range(data, 16)
            request = _request(data, start)
            # operation, flags, status, length, srb_status, scsi_status, port, path, target, lun,
            # cdb_length, sense_length, data_in, transfer_length, cdb, ...: see storvsp.wire.Srb
            cdb_length = request[10]
            data_in = request[12]
            unit = units.get(request[7:10])
            if (
                request[0] == EXECUTE_SRB
                and count == 1
                and byte_count == request[13]
                and byte_count
                and byte_offset < PAGE_SIZE
                and data_in < 2
                and 0 < cdb_length <= 16
                and unit is not None
            ):
                last = byte_offset + byte_count
                try:
                    if last <= PAGE_SIZE:
                        views = gather(byte_offset, byte_count, (pfn,), write=data_in == 1)
                    else:
                        pages = (last + 4095) >> 12
                        if FIRST_PFN + 8 * pages > start:
                            session.handle(channel, packet, nursery)
                            continue
                        pfns = pfn_list(pages).unpack_from(data, FIRST_PFN)
                        views = gather(byte_offset, byte_count, pfns, write=data_in == 1)
                except GuestProtocolError:
                    session.handle(channel, packet, nursery)
                    continue
                command = Command(
                    request[14][:cdb_length], views, byte_count, _DIRECTIONS[data_in], initiator
                )
                outcome = unit.try_execute(command)
                if outcome is None:
                    session.wait(channel, packet, Srb._make(request), command, nursery)
                elif outcome[0]:
                    inline += 1
                    session.finish(channel, packet, Srb._make(request), outcome)
                else:
                    inline += 1
                    if packet.flags & 1:
                        complete(
                            _good(
                                COMPLETION,
                                OFFSET8,
                                LENGTH8,
                                0,
                                packet.transaction_id,
                                COMPLETE_IO,
                                0,
                                0,
                                request[3],
                                SRB_SUCCESS,
                                0,
                                data[start + 16 : start + 21],
                                0,
                                data_in,
                                outcome[2],
                                data[start + 48 :],
                            )
                        )
                continue
        session.handle(channel, packet, nursery)
    session.inline += inline

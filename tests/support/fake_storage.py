"""A storage device for the scripted host: enough SCSI to please each driver's scan."""

from __future__ import annotations

import struct
from uuid import UUID

from tests.support.fake_host import PAGE, Channel, Host, offer
from vmbus.wire.guids import CLASS_SCSI

INSTANCE = UUID("aaaaaaaa-0000-4444-8888-cccccccccccc")
BLOCK = 512


class Storage:
    """Answers vstor packets in their own size; tests override single answers."""

    def __init__(self, host: Host, *, class_id=CLASS_SCSI, channels: int = 0) -> None:
        self.host = host
        self.units = {(0, 0): bytearray(64 * BLOCK), (0, 3): bytearray(16 * BLOCK)}
        self.versions = {0x602, 0x600, 0x501, 0x402, 0x200}
        self.refusal = 0xC0000059
        self.echo: int | None = None
        self.properties = struct.pack("<IHHII8x", 0, channels, 0, bool(channels), 1 << 20)
        self.answers: dict[int, bytes] = {}
        """Whole payloads by operation, instead of the ordinary ones."""
        self.replies: dict[int, bytes | int] = {}
        """Whole payloads by SCSI operation code; a number: that many bytes of zeros."""
        self.size: int | None = None
        """Bytes of every ordinary answer; None: as many as its request has."""
        self.held: list[tuple[Channel, bytes, int]] = []
        self.holding = False
        self.attention = 0
        self.log: list[bytes] = []
        self.cdbs: list[bytes] = []
        self.extra_sub_channels = 0
        self.first_sub_channel = 1
        self.class_id = class_id
        self.capacity_16 = False
        host.on_packet = self.packet
        host.offers = [
            offer(1, class_id=class_id, instance_id=INSTANCE, monitor_allocated=True, monitor_id=3)
        ]

    def complete(self, channel: Channel, tid: int, payload: bytes) -> None:
        if self.holding:
            self.held.append((channel, payload, tid))
        else:
            channel.send(11, payload, tid)

    def release(self) -> None:
        self.holding = False
        held, self.held = self.held, []
        for channel, payload, tid in held:
            channel.send(11, payload, tid)

    def packet(self, channel: Channel, packet: bytes) -> None:
        kind, offset8, _length8, flags, tid = struct.unpack_from("<HHHHQ", packet)
        payload = packet[offset8 * 8 :]
        assert flags == 1
        assert len(payload) in (48, 64)
        self.log.append(payload)
        operation = int.from_bytes(payload[:4], "little")
        if operation in self.answers:
            self.complete(channel, tid, self.answers[operation])
            return
        body, status = b"", 0
        if operation == 9:
            (version,) = struct.unpack_from("<H", payload, 12)
            if version not in self.versions:
                status = self.refusal
            body = struct.pack("<H", version if self.echo is None else self.echo)
        elif operation == 10:
            body = self.properties
        elif operation == 12:
            body = struct.pack("<B3x8s8s8s8s", 1, b"port....", b"node....", b"", b"")
        elif operation == 13:
            (count,) = struct.unpack_from("<H", payload, 12)
            self.host.offer_sub_channels(
                channel.offer, count + self.extra_sub_channels, first=self.first_sub_channel
            )
        elif operation == 3:
            pages = packet[16 : offset8 * 8] if kind == 9 else b""
            reply = self.srb(payload.ljust(64, b"\0"), pages)
            if len(reply) == 64:  # not one of a test that is about lengths
                reply = reply.ljust(80, b"\0")[: self.size or len(payload)]
            self.complete(channel, tid, reply)
            return
        answer = struct.pack("<III", 1, 0, status) + body
        self.complete(channel, tid, answer.ljust(80, b"\0")[: self.size or len(payload)])

    # -- SCSI
    def srb(self, request: bytes, header: bytes) -> bytes:
        path, target, lun, cdb_size, _sense, _way = request[17:23]
        (length,) = struct.unpack_from("<I", request, 24)
        cdb = request[28 : 28 + cdb_size]
        self.cdbs.append(cdb)
        pages: list[memoryview] = []
        if header:
            _, count, size, start = struct.unpack_from("<IIII", header)
            assert (count, size) == (1, length)
            pfns = struct.unpack_from(f"<{(start + size + 4095) // 4096}Q", header, 16)
            for pfn in pfns:
                pages.append(self.host.machine.view(pfn * PAGE, PAGE)[start : start + size])
                size -= len(pages[-1])
                start = 0
        else:
            assert not length
        if cdb[0] in self.replies:
            reply = self.replies[cdb[0]]
            return reply if isinstance(reply, bytes) else self.fill(pages, bytes(reply))
        if self.attention and cdb[0] == 0:
            self.attention -= 1
            return answer(0x84, 2, sense(6, 0x2900))
        unit = self.units.get((target, lun)) if path == 0 else None
        if cdb[0] == 0x12:
            return self.fill(pages, self.inquiry(cdb, unit))
        if cdb[0] == 0xA0:
            luns = sorted(n for t, n in self.units if (path, t) == (0, target))
            data = struct.pack(">I4x", 8 * len(luns))
            return self.fill(pages, data + b"".join(struct.pack(">H6x", n) for n in luns))
        if unit is None:
            return answer(0x20, 0)
        return self.block(cdb, pages, unit, length)

    def inquiry(self, cdb: bytes, unit: bytearray | None) -> bytes:
        if unit is None:
            return b"\x7f" + bytes(35)
        pages = {0: b"\x00\x80\x83\xb0", 0x80: b"serial", 0x83: b"id", 0xB0: bytes(60)}
        if cdb[1] & 1:
            page = pages[cdb[2]]
            return struct.pack(">BBH", 0, cdb[2], len(page)) + page
        return (b"\x00\x00\x05\x02\x1f" + bytes(3) + b"Msft    Virtual Disk    1.0 ")[: cdb[4]]

    def block(self, cdb: bytes, pages, unit: bytearray, length: int) -> bytes:
        blocks = len(unit) // BLOCK
        code = cdb[0]
        if code == 0x25:
            last = 0xFFFFFFFF if self.capacity_16 else blocks - 1
            return self.fill(pages, struct.pack(">II", last, BLOCK))
        if code == 0x9E:
            return self.fill(pages, struct.pack(">QI20x", blocks - 1, BLOCK))
        if code in (0x28, 0x88, 0x2A, 0x8A):
            first = struct.unpack_from(">I" if code < 0x80 else ">Q", cdb, 2)[0]
            if first * BLOCK + length > len(unit):
                return answer(0x84, 2, sense(5, 0x2100))
            view = memoryview(unit)[first * BLOCK :][:length]
            if code in (0x28, 0x88):
                return self.fill(pages, bytes(view))
            view[:] = b"".join(pages)
        return answer(1, 0, length=length)

    def fill(self, pages, data: bytes) -> bytes:
        done = 0
        for page in pages:
            part = data[done : done + len(page)]
            page[: len(part)] = part
            done += len(part)
        return answer(1, 0, length=done)


def sense(key: int, code: int) -> bytes:
    return struct.pack(">BBB4xB4xHI", 0x70, 0, key, 10, code, 0)


def answer(srb: int, scsi: int, data: bytes = b"", *, length: int = 0, status: int = 0) -> bytes:
    """The payload of an answer to EXECUTE_SRB."""
    head = struct.pack("<III", 1, 0, status)
    body = struct.pack("<HBB4xBBBxI20s", 52, srb, scsi, 0, len(data), 0, length, data)
    return (head + body).ljust(64, b"\0")

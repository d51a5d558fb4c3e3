"""Make the example of docs/reference/trace-format.md, as a program.

It is what the page says; whoever changes the format changes it, and says so there.
"""

from __future__ import annotations

from pathlib import Path

from vmbus.trace import pcapng
from vmbus.trace.pcapng import pack_interface, pack_packet, pack_section, text_option
from vmbus.trace.records import LINKTYPE, Flag, Kind, Record, Way, pack_record
from vmbus.wire.packets import COMPLETION, GPA_DIRECT, build_packet

HERE = Path(__file__).parent
START = 1_796_083_200_000_000_000
RECORDS = [
    (0, Record(Kind.META, b'{"application": "vmbus", "guest": "alice", "version": "0.1.0"}')),
    (1, Record(Kind.MESSAGE, bytes.fromhex("0e000000 00000000".replace(" ", "")) + bytes(32),
               way=Way.TO_HOST, comment="INITIATE_CONTACT")),
    (2, Record(Kind.OPEN, b'{"life": 1, "name": "scsi", "relid": 5}', relid=5, life=1)),
    (2, Record(Kind.PACKET, build_packet(
        GPA_DIRECT, bytes(64), transaction_id=77, flags=1,
        header=bytes.fromhex("0000000001000000 00020000000000003412000000000000".replace(" ", ""))),
        way=Way.TO_HOST, relid=5, life=1)),
    (3, Record(Kind.SIGNAL, way=Way.TO_HOST, relid=5, life=1, ref=1)),
    (4, Record(Kind.MEMORY, b"x" * 100, way=Way.TO_GUEST, flags=Flag.HOST_WROTE | Flag.CUT,
               relid=5, life=1, ref=77, total=512, length=512)),
    (2, Record(Kind.PACKET, build_packet(COMPLETION, bytes(64), transaction_id=77),
               way=Way.TO_GUEST, relid=5, life=1)),
    (2, Record(Kind.CLOSE, relid=5, life=1)),
    (0, Record(Kind.GAP, b"the disk was full", ref=3, comment="3 records are missing")),
]  # fmt: skip
"""By the interface they are of."""
NAMES = (
    "vmbus:meta", "vmbus:control", "vmbus:channel/5.1/scsi", "vmbus:signals", "vmbus:memory",
)  # fmt: skip


def make() -> bytes:
    """Return the file."""
    pieces = [pack_section([
        text_option(pcapng.SECTION_HARDWARE, "alice"),
        text_option(pcapng.SECTION_APPLICATION, "vmbus 0.1.0"),
    ])]  # fmt: skip
    pieces += [
        pack_interface(LINKTYPE, [text_option(pcapng.INTERFACE_NAME, name)]) for name in NAMES
    ]
    for number, (interface, record) in enumerate(RECORDS, 1):
        record.number, record.time_ns = number, START + number * 1000
        data = pack_record(record)
        pieces.append(pack_packet(
            interface, record.time_ns, data, flags=record.way, comment=record.comment.encode(),
            length=len(data) + record.length - len(record.data),
        ))  # fmt: skip
    return b"".join(pieces)


if __name__ == "__main__":
    (HERE / "session.pcapng").write_bytes(make())

"""Reading traces: from files, from compressed ones, from pipes."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Self, cast

from vmbus.errors import TraceCutError, TraceError
from vmbus.trace import pcapng
from vmbus.trace.pcapng import (
    Block,
    CapturedPacket,
    Interface,
    blocks_untrusted,
    parse_interface_untrusted,
    parse_packet_untrusted,
    parse_section_untrusted,
    parse_simple_untrusted,
)
from vmbus.trace.records import LINKTYPE, MAGIC, Record, Way, parse_record_untrusted

MAX_INTERFACES = 1 << 16
"""Of one section."""
_GZIP = b"\x1f\x8b"
_WAYS = {pcapng.INBOUND: Way.TO_HOST, pcapng.OUTBOUND: Way.TO_GUEST}


class Trace:
    """The records of a trace, once, in the order of the file.

    Reading goes on as long as it makes sense: a file that ends within a record has been one up to
    there, and :attr:`cut` says where; packets that are no records, of another program perhaps,
    are counted.

    Args:
        file: Read from its beginning on; the caller's.
        name: For messages to people.

    Attributes:
        guest: Whose bus it is, as the last section said; empty if it has not.
        application: What has written it.
        cut: Where the file ended within something, in bytes; None if it has not, so far.
        foreign: Packets that are no records.
        interfaces: Those of the section that is being read.
    """

    def __init__(self, file: BinaryIO, name: str = "") -> None:
        self.name = name
        self.guest = ""
        self.application = ""
        self.cut: int | None = None
        self.foreign = 0
        self.interfaces: list[Interface] = []
        self._file = file
        self._position = 0
        self._owned: list[BinaryIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if :func:`open_trace` has opened it. Idempotent."""
        for file in self._owned:
            file.close()

    def __iter__(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            TraceError: The file is no trace, or is none any more from a position on. What was
                before that was yielded.
        """
        for block, packet in self.packets_untrusted():
            record = self._record_untrusted(block, packet)
            if record is None:
                self.foreign += 1
            else:
                yield record

    def packets_untrusted(self) -> Iterator[tuple[Block, CapturedPacket]]:
        """Yield all packets, records or not, with the blocks they are in.

        Raises:
            TraceError: As above.
        """
        try:
            for block in blocks_untrusted(self._file):
                self._position = block.position + len(block.body) + 12
                if block.kind == pcapng.SECTION:
                    options = parse_section_untrusted(block)
                    self.guest = options.get(pcapng.SECTION_HARDWARE, "")
                    self.application = options.get(pcapng.SECTION_APPLICATION, "")
                    self.interfaces = []
                elif block.kind == pcapng.INTERFACE:
                    if len(self.interfaces) >= MAX_INTERFACES:
                        raise TraceError(f"more than {MAX_INTERFACES} interfaces", block.position)
                    self.interfaces.append(parse_interface_untrusted(block))
                elif block.kind == pcapng.PACKET:
                    yield block, parse_packet_untrusted(block)
                else:
                    yield block, parse_simple_untrusted(block)
        except TraceCutError as error:
            self.cut = error.position
        except EOFError:
            self.cut = self._position  # of the compressed file, its end
        except (zlib.error, gzip.BadGzipFile) as error:
            raise TraceError(f"compressed data that is broken: {error}", self._position) from error

    def interface_of(self, block: Block, packet: CapturedPacket) -> Interface:
        """Return where a packet was seen. Cannot block.

        Raises:
            TraceError: Its interface has not been described before it.
        """
        if packet.interface >= len(self.interfaces):
            raise TraceError(
                f"a packet of interface {packet.interface}, of {len(self.interfaces)}",
                block.position,
            )
        return self.interfaces[packet.interface]

    def _record_untrusted(self, block: Block, packet: CapturedPacket) -> Record | None:
        interface = self.interface_of(block, packet)
        if interface.link_type != LINKTYPE or packet.data[: len(MAGIC)] != MAGIC:
            return None
        record = parse_record_untrusted(packet.data, block.position)
        record.time_ns = time_ns(interface, packet.ticks)
        record.way = _WAYS.get(packet.direction, Way.NONE)
        record.comment = packet.comment
        record.length += packet.length - len(packet.data)
        return record


def time_ns(interface: Interface, ticks: int) -> int:
    """Return when a packet of an interface was seen: nanoseconds since 1970. Cannot block."""
    ticks_per_second = interface.ticks_per_second
    if ticks_per_second != 1_000_000_000:
        ticks = ticks * 1_000_000_000 // ticks_per_second
    return ticks + interface.offset * 1_000_000_000


def open_trace(path: str | os.PathLike[str]) -> Trace:
    """Open a trace: a file, one that gzip has compressed, or ``-``: standard input. Blocks.

    Use it as a context manager.

    Raises:
        OSError: It cannot be opened.
        TraceError: It is empty.
    """
    name = os.fspath(path)
    shown = "standard input" if name == "-" else name
    file = io.BufferedReader(io.FileIO(0, closefd=False) if name == "-" else io.FileIO(name))
    start = file.peek(2)[:2]
    if not start:
        file.close()
        raise TraceError(f"{shown} is empty")
    if start == _GZIP:
        unpacked = cast("BinaryIO", gzip.GzipFile(fileobj=file))
        trace = Trace(unpacked, shown)
        trace._owned = [unpacked, file]
    else:
        trace = Trace(file, shown)
        trace._owned = [file]
    return trace

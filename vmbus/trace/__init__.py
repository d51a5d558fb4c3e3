"""Traces: what was said on a bus, in files that Wireshark opens.

================== ==========================================================================
module             what is in it
================== ==========================================================================
`pcapng`           the file format, as blocks
`records`          what a trace is made of, as the packets of such a file
`writer`           records, in sections, to a sink
`sinks`            files that follow each other; a ring in memory
`reader`           records from a file, as far as it goes
================== ==========================================================================
"""

from __future__ import annotations

from vmbus.trace.reader import Trace as Trace, open_trace as open_trace
from vmbus.trace.records import Flag as Flag, Kind as Kind, Record as Record, Way as Way
from vmbus.trace.sinks import FileSink as FileSink, RingSink as RingSink
from vmbus.trace.writer import TraceWriter as TraceWriter

__all__ = [
    "FileSink",
    "Flag",
    "Kind",
    "Record",
    "RingSink",
    "Trace",
    "TraceWriter",
    "Way",
    "open_trace",
]

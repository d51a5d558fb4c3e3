"""Capturing: what is said on a bus becomes a trace.

================== ==========================================================================
module             what is in it
================== ==========================================================================
`recorder`         listens to a bus, and writes records
================== ==========================================================================
"""

from __future__ import annotations

from vmbus.capture.recorder import Recorder as Recorder

__all__ = ["Recorder"]

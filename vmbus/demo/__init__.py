"""The guest of a demo, without its devices: attaches itself to a server and tells of its life.

It is a program of its own, so that the bus is between two processes which share memory and
nothing else. What it does with a device is that device's :class:`Half`; the rest is here, and a
:class:`Program` puts both together, with one half or with several.

What happens goes to standard output, one JSON object per line, ``event`` first:

==========  ====================================================================================
event       further members (sizes in bytes, times in seconds)
==========  ====================================================================================
start       ``guest``, ``vps``, ``ram``, ``pid``
attached    ``server``, ``features`` of the connection to it
contact     ``version`` of the bus and names of its 6.0 ``features``
offer       ``relid``, ``class``, ``instance``, ``subchannel``, ``connection``, ``monitor`` (bit
            number or null), ``ignored`` (why this driver leaves it alone, or null)
channel     ``relid``, ``subchannel``, ``vp``, ``ring`` (each of the two), ``gpadl_pages``
ready       ``action``, what the operator shall do with a device now, as "add" or "remove"
notice      ``operation`` of the device's notification, ``heeded`` by this driver
problem     ``where`` (the name of what is tried, or a part of the system), ``text``
left        ``interrupts``, ``signals``: how often each side has called the other
==========  ====================================================================================

Between them are the lines of the halves; each half says which. Exit codes: 0 all is well, 1 there
was a problem, 2 the arguments are wrong, 130 interrupted from the keyboard.
"""

from __future__ import annotations

from vmbus.demo.guest import DemoGuest
from vmbus.demo.half import NOTICE_SECONDS, Half, Options
from vmbus.demo.program import Program, whole_number
from vmbus.demo.story import Story

__all__ = ["NOTICE_SECONDS", "DemoGuest", "Half", "Options", "Program", "Story", "whole_number"]

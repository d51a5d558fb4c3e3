"""A message on its way into a slot, with the VMM."""

from __future__ import annotations

import trio

from vmbus.attach.server.questions import Answer


class Delivery:
    """One DELIVER_MESSAGE that the VMM has not answered yet."""

    __slots__ = ("abandoned", "answer", "answered")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.answer: Answer = b""
        self.abandoned = False
        """The task that waited was cancelled; the slot is still spoken for."""

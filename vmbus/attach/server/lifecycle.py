"""RESET, PAUSE and RESUME: one at a time, and each is answered once, well or badly."""

from __future__ import annotations

import errno
from collections.abc import Callable

from vmbus.attach.protocol.framing import Frame
from vmbus.attach.protocol.layout import require
from vmbus.attach.protocol.messages import MESSAGES, Number
from vmbus.attach.server.link import Link
from vmbus.partition.events import Once


class Lifecycle:
    """The requests of one link about its partition's life.

    Args:
        link: Gets the answers.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self.busy = False
        """Whether one is under way."""

    def begin(
        self, frame: Frame, then: Callable[[], None] = lambda: None
    ) -> tuple[Once, Callable[[str], None]]:
        """Check a request and make it the one that is under way. Cannot block.

        Args:
            frame: The request.
            then: Called when it has been carried out, before the answer.

        Returns:
            What to call when it has been carried out, and what to call with the reason if it has
            not; the first call of either is the answer.

        Raises:
            PeerProtocolError: It is malformed, or another one is under way (EBUSY).
        """
        MESSAGES[frame.kind].request.decode_untrusted(frame.payload)
        kind, seq, name = frame.kind, frame.seq, Number(frame.kind).name
        require(not self.busy, f"{name}: RESET, PAUSE or RESUME is under way", errno.EBUSY)
        self.busy = True

        def carried_out() -> None:
            self.busy = False
            then()
            self._link.reply(kind, seq)

        done = Once(carried_out)

        def failed(text: str) -> None:
            if done.call_off():
                self.busy = False
                self._link.reply_error(kind, seq, errno.ETIMEDOUT, f"{name}: {text}")

        return done, failed

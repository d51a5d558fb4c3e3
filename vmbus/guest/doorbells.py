"""Ringing the host's doorbells: hypercall, interrupt page or monitor page.

Sources: linux/drivers/hv/connection.c (``vmbus_set_event``), linux/drivers/hv/channel.c
(``vmbus_setevent``), freebsd/sys/dev/hyperv/vmbus/vmbus_chan.c (``vmbus_chan_signal``).
"""

from __future__ import annotations

from vmbus.guest.personality import Personality
from vmbus.guest.processor import Processors
from vmbus.guest.ram import Ram
from vmbus.wire.gpa import PAGE_SIZE
from vmbus.wire.messages import CONNECTION_EVENTS, OfferChannel
from vmbus.wire.monitor import GROUP_BITS, pending_word
from vmbus.wire.versions import Version

_HALF_WORDS = PAGE_SIZE // 8
"""u32 words in half an interrupt page: the host writes the first half, the guest the second."""


class Doorbells:
    """The three pages that a guest shares with the host for signals.

    Args:
        personality: Whose habits to follow.
        ram: Gives the pages.
        processors: Make the hypercalls.
    """

    def __init__(self, personality: Personality, ram: Ram, processors: Processors) -> None:
        self._personality = personality
        self._processors = processors
        pages = ram.allocate(3)
        self.interrupt_page, self.monitor_page_1, self.monitor_page_2 = (
            pfn * PAGE_SIZE for pfn in pages
        )
        self._interrupt_words = ram.page(pages[0]).cast("I")
        self._monitor_words = ram.page(pages[2]).cast("I")

    async def ring(self, offer: OfferChannel, vp: int, version: Version | None) -> None:
        """Signal the host in the way the offer and the personality agree on.

        Args:
            offer: Of the channel.
            vp: VP that does it.
            version: The version in force.
        """
        personality = self._personality
        monitored = personality.uses_monitor and offer.monitor_allocated
        if monitored or personality.marks_interrupt_page or not offer.is_dedicated_interrupt:
            word = _HALF_WORDS + offer.relid // 32
            self._interrupt_words[word] |= 1 << offer.relid % 32
        if monitored:
            group, bit = divmod(offer.monitor_id, GROUP_BITS)
            self._monitor_words[pending_word(group)] |= 1 << bit
            return
        connection = offer.connection_id
        if version == Version.V0_13:
            connection = CONNECTION_EVENTS
        await self._processors.signal(connection, vp=vp)

    def take_interrupt_page(self) -> list[int]:
        """Take the bits of the half of the interrupt page that the host writes."""
        words = self._interrupt_words
        found = []
        for index in range(_HALF_WORDS):
            bits, words[index] = words[index], 0
            found += [index * 32 + bit for bit in range(32) if bits >> bit & 1]
        return found

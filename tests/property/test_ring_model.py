"""Both rings against plain lists, with an independent guest at the other end.

The model knows which packets are in which ring and how much room that leaves; it says when a
signal is due. The guest of tests/support/ring_peer.py checks indices and trailers on its way.
"""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.ring_peer import (
    MASK,
    PENDING,
    READ,
    WRITE,
    PeerReader,
    PeerRing,
    PeerWriter,
    packet,
)
from vmbus.memory import PAGE_SIZE, GuestMemory, allocate_memory
from vmbus.ring import RingMemory, RingReader, RingWriter

sizes = st.integers(0, 64) | st.integers(0, 5000) | st.sampled_from([4064, 4072, 8160, 8168])
batches = st.lists(sizes, max_size=8)
limits = st.integers(0, 10) | st.just(256)


class Model:
    """What is in one ring: bodies, and the bytes that each takes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.packets: list[bytes] = []
        self.taken: list[bytes] = []
        """Read, and not yet given back."""
        self.masked = False
        self.pending = 0

    @staticmethod
    def footprint(packets: list[bytes]) -> int:
        return sum(len(each) + 8 for each in packets)

    @property
    def used(self) -> int:
        """As the writer sees it."""
        return self.footprint(self.taken) + self.footprint(self.packets)

    @property
    def free(self) -> int:
        return self.size - self.used

    def put(self, packets: list[bytes]) -> tuple[int, bool]:
        was_empty = not self.taken and not self.packets
        count = 0
        for each in packets:
            if len(each) + 8 >= self.free:
                break
            self.packets.append(each)
            count += 1
        return count, bool(count) and was_empty and not self.masked

    def take(self, limit: int) -> list[bytes]:
        found, self.packets = self.packets[:limit], self.packets[limit:]
        self.taken += found
        return found


class RingMachine(RuleBasedStateMachine):
    """Any interleaving of both sides' steps."""

    memory: GuestMemory

    @initialize(
        shape=st.sampled_from([((0, 1), (2, 3)), ((0, 1, 2), (3, 9, 5)), ((9, 3, 8, 1), (2, 0))]),
        starts=st.tuples(st.integers(0, 511), st.integers(0, 511)),
    )
    def open(self, shape, starts):
        self.memory = allocate_memory(6 * PAGE_SIZE, 4 * PAGE_SIZE)
        self.serial = 0
        in_pfns, out_pfns = shape
        self.to_host = Model((len(in_pfns) - 1) * PAGE_SIZE)
        self.to_guest = Model((len(out_pfns) - 1) * PAGE_SIZE)
        for pfns, start in zip(shape, starts, strict=True):
            control = self.memory.page(pfns[0]).cast("I")
            control[WRITE] = control[READ] = start * 8
        self.reader = RingReader(RingMemory(self.memory, in_pfns))
        self.writer = RingWriter(RingMemory(self.memory, out_pfns))
        views = [[self.memory.page(pfn) for pfn in pfns] for pfns in shape]
        self.guest_writer = PeerWriter(PeerRing(views[0]))
        self.guest_reader = PeerReader(PeerRing(views[1]))

    def make(self, lengths: list[int]) -> list[bytes]:
        made = []
        for length in lengths:
            self.serial += 1
            body = (self.serial.to_bytes(8, "little") * (length // 8 + 1))[:length]
            made.append(packet(6, body, self.serial, self.serial & 1))
        return made

    # -- guest to host ---------------------------------------------------------------------------

    @rule(lengths=batches)
    def guest_writes(self, lengths):
        packets = self.make(lengths)
        assert self.guest_writer.put(packets) == self.to_host.put(packets)

    @rule(limit=limits)
    def host_reads(self, limit):
        got = self.reader.read_batch_untrusted(limit)
        assert [each.data for each in got] == self.to_host.take(limit)
        for each in got:
            assert each.kind == 6
            assert each.flags == each.transaction_id & 1
            assert each.payload_offset == 16

    @rule()
    def host_commits(self):
        model = self.to_host
        before = model.free
        model.taken.clear()
        after = model.free
        signal = self.reader.commit()
        # Linux: signal if there is more room than asked for now, and was not before.
        due = model.pending != 0 and after > model.pending >= before
        assert signal or not due
        # Not for nothing, either: the guest must be waiting, and the room must have grown past it.
        if signal:
            low = model.pending & ~7
            assert low
            assert before <= low <= after
            assert before < after

    @rule()
    def host_masks(self):
        self.reader.mask()
        self.to_host.masked = True

    @rule()
    def host_unmasks(self):
        self.to_host.masked = False
        assert self.reader.unmask() is bool(self.to_host.packets)

    @rule(wanted=st.integers(0, 9000))
    def guest_waits_for_room(self, wanted):
        assert self.guest_writer.ask_for_room(wanted) is (self.to_host.free > wanted)
        self.to_host.pending = wanted

    # -- host to guest ---------------------------------------------------------------------------

    @rule(lengths=batches)
    def host_writes(self, lengths):
        packets = self.make(lengths)
        assert self.writer.write_batch_untrusted(packets) == self.to_guest.put(packets)

    @rule(limit=limits)
    def guest_reads(self, limit):
        got = self.guest_reader.take(limit)
        expected = self.to_guest.take(limit)
        assert [each.payload for each in got] == [each[16:] for each in expected]

    @rule()
    def guest_gives_back_and_signals_if_we_wait(self):
        model = self.to_guest
        before = model.free
        model.taken.clear()
        due = model.pending != 0 and model.free > model.pending >= before
        assert self.guest_reader.done() is due
        if due:
            assert self.writer.free_untrusted() >= model.pending

    @rule()
    def guest_masks(self):
        self.guest_reader.mask()
        self.to_guest.masked = True

    @rule()
    def guest_unmasks(self):
        self.to_guest.masked = False
        assert self.guest_reader.unmask() is bool(self.to_guest.packets)

    @rule(words=st.integers(1, 1100))
    def host_waits_for_room(self, words):
        wanted = words * 8
        there = self.to_guest.free - 8 >= wanted
        assert self.writer.wait_for_room(wanted) is there
        self.to_guest.pending = wanted

    @rule()
    def host_stops_waiting(self):
        self.writer.stop_waiting()
        self.to_guest.pending = 0

    # -- always ----------------------------------------------------------------------------------

    @invariant()
    def both_sides_count_the_same(self):
        assert self.reader.available() == Model.footprint(self.to_host.packets)
        assert self.reader.has_data() is bool(self.to_host.packets)
        assert self.guest_writer.free() == self.to_host.free
        assert self.writer.occupied() == self.to_guest.used
        assert self.writer.free_untrusted() == self.to_guest.free - 8

    @invariant()
    def control_words_say_what_was_done(self):
        for model, control in (
            (self.to_host, self.reader.ring.control),
            (self.to_guest, self.writer.ring.control),
        ):
            assert bool(control[MASK]) is model.masked
            assert control[PENDING] == model.pending

    def teardown(self) -> None:
        if hasattr(self, "reader"):
            for ring in (self.reader.ring, self.writer.ring):
                ring.release()
            for each in (self.guest_reader.ring, self.guest_writer.ring):
                each.release()
            self.memory.close()
            assert self.memory.drained()


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=150, stateful_step_count=40)

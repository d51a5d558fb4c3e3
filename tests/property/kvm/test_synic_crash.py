"""What a guest says about its crash, whatever it says."""

from __future__ import annotations

from contextlib import closing

from hypothesis import given, strategies as st

from vmbus.kvm.synic import MAX_CRASH_TEXT, crash_text_untrusted
from vmbus.memory import allocate_memory
from vmbus.wire.synic import CRASH_CTL_MESSAGE

SIZE = 1 << 17
U64 = st.integers(0, 2**64 - 1)
NEAR = st.integers(SIZE - 100, SIZE + 100)


@given(
    st.tuples(U64, U64, U64, U64 | NEAR, U64 | st.integers(0, SIZE)), U64, st.binary(max_size=200)
)
def test_any_report_gives_a_text_and_never_an_error(parameters, control, text):
    with closing(allocate_memory(SIZE)) as memory:
        memory.write(SIZE - len(text), text)

        told = crash_text_untrusted(memory, parameters, control)

    assert len(told) <= MAX_CRASH_TEXT
    if not control & CRASH_CTL_MESSAGE:
        assert told.startswith("crash parameters 0x")


def test_the_text_ends_at_the_first_nul():
    with closing(allocate_memory(SIZE)) as memory:
        memory.write(0x1000, b"Kernel panic\n\0rubbish")

        told = crash_text_untrusted(memory, (0, 0, 0, 0x1000, 4096), CRASH_CTL_MESSAGE)

    assert told == "Kernel panic"


def test_a_text_outside_of_memory_leaves_the_numbers():
    with closing(allocate_memory(SIZE)) as memory:
        told = crash_text_untrusted(memory, (1, 2, 3, SIZE, 16), CRASH_CTL_MESSAGE)

    assert told == f"crash parameters 0x1 0x2 0x3 {SIZE:#x} 0x10"

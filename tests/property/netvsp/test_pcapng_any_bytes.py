"""Any file is a capture or refused; what is written is read again."""

from __future__ import annotations

import contextlib
import io

from hypothesis import given, settings, strategies as st

from netvsp.frames import pcapng

packets = st.lists(
    st.tuples(st.binary(max_size=80), st.integers(0, 2**62), st.sampled_from([1, 2])), max_size=5
)


def written(items: list[tuple[bytes, int, int]]) -> bytes:
    blocks = [pcapng.build_packet(data, len(data), when, way) for data, when, way in items]
    return pcapng.build_header("name", 0) + b"".join(blocks)


@given(packets)
def test_what_is_written_is_read_again(items):
    found = list(pcapng.read_capture(io.BytesIO(written(items)).read))
    assert [(each.data, each.direction) for each in found] == [
        (data, way) for data, _, way in items
    ]
    assert [each.time for each in found] == [when / 1e9 for _, when, _ in items]


@given(packets, st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_read_or_refused(items, data):
    content = bytearray(written(items))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(pcapng.CaptureError):
        list(pcapng.read_capture(io.BytesIO(content[:cut]).read))


@given(st.binary(max_size=200), st.sampled_from([b"", b"\n\r\r\n", b"\xa1\xb2\xc3\xd4"]))
def test_any_file_is_read_or_refused(content, start):
    with contextlib.suppress(pcapng.CaptureError):
        list(pcapng.read_capture(io.BytesIO(start + content).read))

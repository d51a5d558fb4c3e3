"""What the rig reads of iperf3's words."""

from __future__ import annotations

import pytest

from tests.guest.rig.network_work import received

ONE = "[  5]   0.00-1.64   sec  1.64 MBytes  3107 Kbits/sec                  receiver\n"
SUM = """\
[  5]   0.00-0.45   sec  25.5 KBytes   468 Kbits/sec                  receiver
[  7]   0.00-0.45   sec   512 Bytes   416 Kbits/sec                  receiver
[SUM]   0.00-0.45   sec  26.0 KBytes  1716 Kbits/sec                  receiver
"""


@pytest.mark.parametrize(
    ("text", "size"), [(ONE, 1.64 * 2**20), (SUM, 26 * 1024), (SUM.splitlines()[1], 512)]
)
def test_what_has_arrived_is_that_of_all_streams(text, size):
    assert received(text) == size


def test_an_error_is_no_number():
    with pytest.raises(AssertionError, match="unable to connect"):
        received("iperf3: error - unable to connect to server")

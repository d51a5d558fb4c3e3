"""What testpmd prints, taken apart."""

from __future__ import annotations

from tests.guest.rig.testpmd import parse_statistics

PRINTED = """show port stats all

  ######################## NIC statistics for port 0  ########################
  RX-packets: 84         RX-missed: 0          RX-bytes:  41234
  RX-errors: 0

  ######################## NIC statistics for port 1  ########################
  TX-packets: 7          TX-errors: 2          TX-bytes:  420
testpmd> show port xstats all
###### NIC extended statistics for port 0
rx_q0_good_packets: 40
rx_q1_ring full: 3
###### NIC extended statistics for port 1
tx_q0_multicast_packets: 1
"""


def test_the_counters_of_each_port_are_found_by_name():
    assert parse_statistics(PRINTED) == [
        {
            "RX-packets": 84,
            "RX-missed": 0,
            "RX-bytes": 41234,
            "RX-errors": 0,
            "rx_q0_good_packets": 40,
            "rx_q1_ring full": 3,
        },
        {"TX-packets": 7, "TX-errors": 2, "TX-bytes": 420, "tx_q0_multicast_packets": 1},
    ]


def test_where_nothing_is_printed_there_are_no_ports():
    assert parse_statistics("testpmd> ") == []

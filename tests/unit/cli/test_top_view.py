"""What ``vmbus top`` says: for a pipe, and for a terminal of any width."""

import re

import click
import pytest
from rich.cells import cell_len

from tests.support.cli import make_channel, make_controller, make_guest, make_unit
from tests.support.looks import view_of
from tests.support.nics import described_nic
from vmbus.cli.top_view import _disk_cells, megabytes, plain_lines, short, table_lines


@pytest.mark.parametrize(
    ("number", "base", "text"),
    [
        (0, 1000, "0"),
        (999.4, 1000, "999"),
        (4390, 1000, "4.39k"),
        (999_700, 1000, "1M"),
        (1536, 1024, "1.5k"),
        (5 << 30, 1024, "5G"),
        (7e14, 1000, "700T"),
    ],
)
def test_numbers_are_short(number, base, text):
    assert short(number, base) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0, "0"), (9, "0.0"), (1.26e6, "1.3"), (99.94e6, "99.9"), (99.96e6, "100"), (2.5e9, "2500")],
)
def test_rates_of_disks_are_megabytes(rate, text):
    assert megabytes(rate) == text


GUESTS = [
    make_guest(
        "vm\x1b[2J 1",
        make_channel(1, packets_in=5000, bytes_in=3 << 20, incoming_used=500, outstanding=32),
        make_channel(2, subchannel_index=1),
        make_channel(3, packets_in=69_400, signals_in=999_499),
        faults=3,
        devices=[
            make_controller(
                0,
                make_unit(
                    commands=69_400, bytes_read=123_456_789, errors=2, source="raw:" + "x" * 90
                ),
                make_unit("0:0:1", size=None, kind="CD-ROM drive", source="", bytes_written=99),
            )
        ],
    ),
    make_guest("idle", number=2, version=None, paused=True),
]


def test_lines_for_a_pipe_are_key_and_value():
    lines = list(plain_lines(view_of([], GUESTS, 1.0)))
    assert lines[0] == "server=vmbus_1.2.3 pid=42 rss=41943040 guests_served=7 guests=2"
    assert lines[1] == (
        "guest=vm?[2J_1 version=5.3 memory=1073741824 paused=no faults=3 channels=3 disks=2 nics=0"
    )
    assert lines[2].startswith(
        "guest=vm?[2J_1 channel=1 device=scsi subchannel=0 ring_in=0.500 ring_out=0.000 "
        "outstanding=32 packets_in=5000.0 packets_out=0.0 bytes_in=3145728.0"
    )
    assert lines[5].startswith("guest=vm?[2J_1 disk=0:0:0 controller=0 size=1048576 errors=2 comm")
    assert lines[5].endswith("commands=69400.0 bytes_read=123456789.0 bytes_written=0.0")
    assert lines[6].startswith("guest=vm?[2J_1 disk=0:0:1 controller=0 size=- errors=0 ")
    assert lines[7] == (
        "guest=idle version=- memory=1073741824 paused=yes faults=0 channels=0 disks=0 nics=0"
    )
    for line in lines:
        assert all(len(word.split("=")) == 2 for word in line.split(" "))


def test_a_disk_that_keeps_its_guest_waiting_says_so():
    unit = make_unit(stopped="No space left on device", source="raw:thin.img")
    views = view_of([], [make_guest("vm", devices=[make_controller(0, unit)])], 1.0)
    (disk,) = views.guests[0].disks
    assert disk.stopped == "No space left on device"
    assert _disk_cells(disk, views.guests[0])[-1] == "stopped: No space left on device"


def test_a_shared_disk_that_is_lost_is_seen():
    unit = make_unit(stopped="", lost=True, source="raw:[shared]a.img")
    views = view_of([], [make_guest("vm", devices=[make_controller(0, unit)])], 1.0)
    assert views.guests[0].disks[0].stopped == "its keeper is gone"


def test_a_guest_without_a_name_is_a_word():
    assert list(plain_lines(view_of([], [make_guest(" ")])))[1].startswith("guest=- ")


@pytest.mark.parametrize("width", range(40, 201, 4))
def test_the_table_fits_the_terminal_and_no_figure_is_cut(width):
    lines = table_lines(view_of([], GUESTS, 1.0), width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    disk = next(line for line in lines if line.startswith("0:0:0 "))
    assert disk.split()[:3] == ["0:0:0", "123", "0"]
    channel = next(line for line in lines if line.startswith("3 scsi ")).split()
    assert channel[2:6] == ["0%", "0%", "0", "69.4k"]
    # Whatever else there is stands under its title, whole.
    assert set(channel[6:]) <= {"0", "999k"}
    if width >= 80:
        assert disk.split()[3:7] == ["69.4k", "2", "1", "MiB"]
        assert channel[6:] == ["0", "0", "0", "999k", "0"]
    assert "vm?[2J 1: VMBus 5.3, 1 GiB of memory," in text.replace("\n ", "")
    assert "paused" in text


def test_everything_is_shown_where_there_is_room():
    lines = table_lines(view_of([], GUESTS, 1.0), 120)
    assert lines[0].endswith("40 MiB in use, 7 guest(s) served, 2 attached")
    assert (
        "vm?[2J 1: VMBus 5.3, 1 GiB of memory, 3 fault(s), 123 MB/s read, 0.0 MB/s written" in lines
    )
    assert "idle: no contact yet, 1 GiB of memory, 0 fault(s), paused, no open channels" in lines
    row = next(line for line in lines if line.startswith("1 scsi ")).split()
    assert row == ["1", "scsi", "50%", "0%", "32", "5k", "0", "3M", "0", "0", "0"]
    assert any(line.startswith("2 scsi.1 ") for line in lines)
    assert next(line for line in lines if line.startswith("0:0:1 ")).endswith("-  CD-ROM drive")


def test_disks_of_several_controllers_are_told_apart():
    devices = [make_controller(place, make_unit()) for place in range(2)]
    lines = table_lines(view_of([], [make_guest("a", devices=devices)]), 80)
    assert [line.split()[0] for line in lines if "0:0:0" in line] == ["0/0:0:0", "1/0:0:0"]


def test_wide_characters_take_the_room_that_they_take():
    lines = table_lines(view_of([], [make_guest("漢" * 60)]), 40)
    assert all(cell_len(line) <= 40 for line in lines)


def test_styles_are_for_those_who_want_them(monkeypatch):
    view = view_of([], GUESTS, 1.0)
    plain = table_lines(view, 80)
    monkeypatch.setattr("vmbus.cli.output.styled", lambda: True)
    styled = table_lines(view, 80)
    assert [click.unstyle(line) for line in styled] == plain
    assert any(re.match("\x1b\\[33m.*3 fault", line) for line in styled)


NICS = [
    make_guest(
        "net",
        devices=[
            described_nic(
                0,
                channels=4,
                transmit={
                    "frames": 69_400,
                    "bytes": 123_456_789,
                    "segments": 3000,
                    "checksums": 812,
                    "dropped": {"spoofed address": 3},
                },
                receive={
                    "frames": 4390,
                    "bytes": 1_260_000,
                    "dropped": {"filtered": 4, "no room": 9999},
                },
            ),
            described_nic(1, source="", link="down", failure="vnet1\x1b was deleted"),
        ],
    )
]


@pytest.mark.parametrize("width", range(40, 201, 4))
def test_network_adapters_fit_the_terminal_and_no_figure_is_cut(width):
    lines = table_lines(view_of([], NICS, 1.0), width)
    assert max(map(cell_len, lines)) <= width
    row = next(line for line in lines if line.startswith("0 ")).split()
    assert row[:4] == ["0", "123", "1.3", "69.4k"]
    if width >= 60:
        assert row[3:7] == ["69.4k", "4.39k", "10k", "4"]
    if width >= 120:
        assert row[7:] == ["3k", "0", "812", "0", "tap:vnet0"]
    # Why a link is down and what was dropped is there at any width.
    text = " ".join(" ".join(lines).split())
    assert "nic 1: the link is down, vnet1? was deleted" in text
    assert (
        "nic 0 dropped: 3 spoofed address (sent), 9999 no room (received), 4 filtered (received)"
        in text
    )
    assert "123 MB/s sent, 1.3 MB/s received" in text


def test_a_network_adapter_is_known_by_its_address_if_nothing_is_said_of_its_network():
    lines = table_lines(view_of([], NICS, 1.0), 120)
    assert next(line for line in lines if line.startswith("1 ")).endswith("  00:15:5d:0a:0b:0c")


def test_network_adapters_are_key_and_value_for_a_pipe():
    lines = list(plain_lines(view_of([], NICS, 1.0)))
    assert lines[1].endswith("channels=0 disks=0 nics=2")
    assert lines[2].startswith(
        "guest=net nic=0 address=00:15:5d:0a:0b:0c link=up queues=4 frames_sent=69400.0 "
        "bytes_sent=123456789.0 segments_sent=3000.0 checksums_sent=812.0 frames_received=4390.0"
    )
    assert lines[2].endswith("sent_drops=spoofed_address:3 received_drops=filtered:4,no_room:9999")
    assert lines[3].endswith("sent_drops=- received_drops=-")
    for line in lines:
        assert all(len(word.split("=")) == 2 for word in line.split(" "))

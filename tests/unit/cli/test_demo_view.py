"""The words that a demo has for everything, on terminals and in pipes."""

from __future__ import annotations

import io
import signal

import click
import pytest
from rich.console import Console

from tests.support.demo_report import DISK, phase, report_of
from vmbus.cli import demo, demo_view
from vmbus.cli.demo_report import Report
from vmbus.cli.demo_view import Line, PlainView, RichView, make_view, narrate, show, summarize

START = {"event": "start", "guest": "Linux", "vps": 4, "ram": 1 << 20, "pid": 7}


OFFER = {"event": "offer", "relid": 1, "class": "scsi", "instance": "f036f06a-bcfd",
         "subchannel": 0, "connection": 0x2001, "monitor": None, "ignored": None}  # fmt: skip


READ_ONLY = DISK | {"writable": False, "unmaps": False}


def words(event, *before):
    return [line.text for line in narrate(event, report_of(*before, event), 32)]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (START, "Linux: pid 7, 4 VPs, 1 MiB of RAM in a memfd"),
        ({"event": "attached", "features": ["LOG"]}, "attached over vmbus-user: LOG"),
        ({"event": "contact", "version": "5.3", "features": []}, "VMBus 5.3"),
        (
            {"event": "contact", "version": "6.0", "features": ["CLIENT_ID"]},
            "VMBus 6.0, features: CLIENT_ID",
        ),
        (OFFER, "relid 1: scsi f036f06a, connection 0x2001"),
        (
            OFFER | {"subchannel": 2, "monitor": 5, "ignored": "why ever"},
            "relid 1: scsi, sub-channel 2 of f036f06a, connection 0x2001, monitor bit 5, why ever",
        ),
        (
            {"event": "vstor", "version": "6.2", "max_transfer": 2 << 20, "max_subchannels": 15},
            "6.2: up to 2 MiB per request, 15 sub-channels",
        ),
        (
            {"event": "channel", "relid": 3, "ring": 131072, "gpadl_pages": 64, "vp": 2},
            "relid 3: 2 rings of 128 KiB, GPADL of 64 pages, interrupts VP 2",
        ),
        (DISK, "0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, unmap"),
        (READ_ONLY, "0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, read only"),
        (
            READ_ONLY | {"kind": "cd", "label": "X"},
            '0:0:0  Virtual Disk      RamDisk       1 MiB, 512 B blocks, volume "X"',
        ),
        (
            {"event": "notice", "operation": "ENUMERATE_BUS", "heeded": True},
            "ENUMERATE_BUS from the host: scan again",
        ),
        (
            {"event": "notice", "operation": "ENUMERATE_BUS", "heeded": False},
            "ENUMERATE_BUS from the host: this driver ignores it, by hand: scan again",
        ),
        ({"event": "problem", "where": "guest", "text": "ouch"}, "ouch"),
        (
            {"event": "left", "interrupts": 1234, "signals": 5},
            "left: channels closed, GPADLs torn down; 1,234 interrupts in, 5 signals out",
        ),
    ],
)
def test_every_event_has_its_words(event, text):
    assert words(event) == [text]


def test_events_about_disks_have_their_words_too():
    told = words(phase("write"), DISK)
    assert told == ["write   4 KiB x 32        20 requests/s       0 MB/s"]
    assert words(phase("mixed", requests=0), DISK) == []
    assert words(phase("survey"), DISK) == []
    verified = {"event": "verified", "address": "0:0:0", "unmapped": 4096}
    assert words(verified, DISK, phase("read")) == [
        "verified: 40 KiB read and compared, flushed, 4 KiB unmapped, now zeros"
    ]
    assert words(verified | {"unmapped": 0}, READ_ONLY, phase("read")) == [
        "verified: 40 KiB read and compared"
    ]
    gone = {"event": "gone", "address": "0:0:0"}
    assert words(gone, DISK) == ["0:0:0 is gone, commands to it get INVALID_LUN"]


def test_a_pipe_gets_lines_without_colour_and_a_time_before_each(capsys):
    view = make_view(quiet=False)
    assert type(view) is PlainView
    view.tell(Line("guest", "hello\033[1m", "bold red"))
    view.status("not shown")
    view.close()
    time, _, text = capsys.readouterr().out.partition("] ")
    assert time.startswith("[  0.0")
    assert text == "guest    hello?[1m\n"


def test_a_terminal_gets_colour_and_a_line_that_moves(monkeypatch):
    monkeypatch.setattr(demo_view, "on_terminal", lambda: True)
    screen = io.StringIO()
    monkeypatch.setattr(
        demo_view, "console",
        lambda: Console(file=screen, force_terminal=True, width=100, color_system="standard"),
    )  # fmt: skip
    view = make_view(quiet=False)
    assert type(view) is RichView
    report = report_of(DISK)
    show(view, {**phase("write"), "event": "progress"}, report, 32)
    view.tell(Line("server", "meanwhile"))
    before = screen.getvalue()
    assert "0:0:0 RamDisk: write   4 KiB x 32        20 requests/s" in before
    show(view, {"event": "problem", "where": "guest", "text": "ouch"}, report, 32)
    view.close()
    view.close()
    after = screen.getvalue().removeprefix(before)
    assert "\033[1;31mouch" in after
    assert "RamDisk" not in after.partition("ouch")[2]  # what is over is not shown any longer


def test_json_readers_get_no_lines(capsys):
    view = make_view(quiet=True)
    view.tell(Line("guest", "hello"))
    view.status("busy")
    view.close()
    assert capsys.readouterr().out == ""


def summary(report):
    with click.Context(demo.command):
        summarize(report)


def test_the_summary_has_a_row_for_each_disk(capsys):
    other = DISK | {"address": "0:0:1"}
    third = READ_ONLY | {"address": "0:0:2"}
    report = report_of(
        DISK, other, third, phase("write"), phase("mixed"),
        {"event": "verified", "address": "0:0:0", "unmapped": 0},
        {"event": "problem", "where": "0:0:1", "text": "corrupt\033"},
    )  # fmt: skip
    report.last_lines = {"server": [f"line {n}" for n in range(20)], "guest": []}
    summary(report)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("0:0:")]
    assert rows[0] == ["0:0:0", "RamDisk", "1", "MiB", "40", "KiB", "0", "B", "0", "MB/s", "-",
                       "20", "/s", "ok"]  # fmt: skip
    assert rows[1][-1] == "broken"
    assert rows[2][-1] == "-"
    assert "  line 11" not in lines
    assert "  line 12" in lines
    assert "0:0:1: corrupt?" in lines
    assert "the guest's last lines:" not in lines


def test_the_summary_of_an_interrupted_demo_blames_nobody(capsys):
    report = Report(interrupted=signal.SIGINT)
    summary(report)
    assert capsys.readouterr().out == "\nended by SIGINT\n"
    assert demo.exit_code(report) == 130

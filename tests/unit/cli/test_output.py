"""How commands write: tables, sizes, the log, and what they tell a service manager."""

import io
import json
import logging
import socket
import sys

import click
import pytest

from tests.support.cli import Terminal
from vmbus.cli import output
from vmbus.cli.logs import JsonFormatter, LineFormatter, logging_to
from vmbus.cli.notify import notify
from vmbus.cli.output import print_json, print_table, safe, size_text
from vmbus.cli.params import parse_permissions, parse_size
from vmbus.errors import ConfigError


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (512, "512 B"),
        (1010, "1010 B"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (1023 << 20, "1023 MiB"),
        (1 << 40, "1 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_written_for_people(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("64k", 65536), ("3M", 3 << 20), ("1G", 1 << 30)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1.5M", "-1", "1KB", "²"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is not a size; write bytes"):
        parse_size(text)


def test_permissions_are_octal():
    assert parse_permissions("660") == 0o660
    for text in ("6", "999", "0o660", "rw-", ""):
        with pytest.raises(click.BadParameter, match="as in 660"):
            parse_permissions(text)


def test_text_of_strangers_cannot_steer_a_terminal():
    assert safe("vm\x1b[2J\x9b1m\u202eé 1") == "vm?[2J?1m?é 1"


def test_tables_in_a_pipe_are_aligned_and_not_cut(capsys):
    long = "x" * 300
    print_table(("a", "long one"), [("1", long), ("333", "\x1b[2J")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a    long one", f"1    {long}", "333  ?[2J"]


def test_tables_on_a_terminal_show_what_rich_must_not_interpret(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_table(("name", "state"), [("[red]x", "broken"), ("y" * 60, "fine")])
    text = terminal.getvalue()
    assert "[red]x" in text
    assert "\x1b[31mbroken" in text
    assert click.unstyle(text).count("y") == 60


def test_json_is_one_line(capsys):
    print_json({"a": ["é", 1]})
    assert capsys.readouterr().out == '{"a": ["é", 1]}\n'


def test_a_pipe_is_no_terminal():
    assert output.on_terminal() is sys.stdout.isatty()


def record(level=logging.INFO, message="hello %s", *arguments, error=None):
    info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("vmbus.x", level, __file__, 1, message, arguments or ("vm1",), info)


def caught(error):
    try:
        raise error
    except Exception as found:
        return found


def test_log_lines_have_a_time_and_a_level_from_warnings_on():
    formatter = LineFormatter(colour=False)
    assert formatter.format(record())[8:] == " hello vm1"
    assert formatter.format(record(logging.WARNING))[8:] == " warning: hello vm1"
    assert formatter.format(record(logging.ERROR, "a\x1b%s"))[8:] == " error: a?vm1"


def test_levels_have_colour_on_a_terminal():
    formatter = LineFormatter(colour=True)
    assert formatter.format(record(logging.WARNING))[8:] == " \x1b[33mwarning:\x1b[0m hello vm1"
    assert formatter.format(record(logging.ERROR))[8:] == " \x1b[31merror:\x1b[0m hello vm1"


def test_expected_errors_are_logged_without_a_traceback():
    formatter = LineFormatter(colour=False)
    line = formatter.format(record(logging.ERROR, error=caught(ConfigError("file is locked"))))
    assert line[8:] == " error: hello vm1: file is locked"
    lines = formatter.format(record(logging.ERROR, error=caught(KeyError("bug")))).splitlines()
    assert lines[0][8:] == " error: hello vm1: 'bug'"
    assert lines[1].startswith("Traceback")


def test_json_log_lines_have_everything():
    formatter = JsonFormatter()
    plain = json.loads(formatter.format(record()))
    assert plain.pop("time").endswith("Z")
    assert plain == {"level": "info", "logger": "vmbus.x", "message": "hello vm1"}
    expected = json.loads(formatter.format(record(error=caught(ConfigError("locked")))))
    assert expected["error"] == "locked"
    assert "traceback" not in expected
    bug = json.loads(formatter.format(record(error=caught(KeyError("bug")))))
    assert "KeyError" in bug["traceback"]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (-2, ["error"]),
        (-1, ["error", "warning"]),
        (0, ["error", "warning", "guest"]),
        (1, ["error", "warning", "guest", "connection"]),
        (2, ["error", "warning", "guest", "connection", "debug"]),
    ],
)
def test_verbosity_chooses_what_is_logged(level, shown):
    stream = io.StringIO()
    before = logging.getLogger().level, logging.getLogger("vmbus.server").level
    with logging_to(stream, level=level):
        logging.getLogger("storvsp").error("error")
        logging.getLogger("storvsp").warning("warning")
        logging.getLogger("vmbus.server").info("guest")
        logging.getLogger("vmbus.attach.server").info("connection")
        logging.getLogger("vmbus.attach.server").debug("debug")
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == shown
    assert (logging.getLogger().level, logging.getLogger("vmbus.server").level) == before


def test_the_log_can_be_json():
    stream = io.StringIO()
    with logging_to(stream, as_json=True):
        logging.getLogger("vmbus.server").info("guest")
    assert json.loads(stream.getvalue())["message"] == "guest"


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_told(tmp_path, abstract):
    name = f"@vmbus-test-{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        assert notify("READY=1", {"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", [None, "", "relative", "/nonexistent/socket"])
def test_without_a_service_manager_nothing_happens(path):
    assert not notify("READY=1", {} if path is None else {"NOTIFY_SOCKET": path})

"""The log of commands: lines, colours, JSON, and what is too quiet to be shown."""

import io
import json
import logging

import pytest

from vmbus.cli.logs import JsonFormatter, LineFormatter, logging_to
from vmbus.errors import ConfigError


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

"""Lines of a worker's log, as they leave it and as they are written."""

import json
import logging

import pytest

from vmbus.errors import ConfigError
from vmbus.supervisor import relay


@pytest.fixture
def root():
    """The root logger, put back as it was afterwards."""
    logger = logging.getLogger()
    before, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = before
    logger.setLevel(level)


def test_a_line_arrives_as_it_left(root, caplog):
    sent: list[dict[str, dict[str, object]]] = []
    handlers = root.handlers[:]
    relay.install(sent.append, {"": logging.DEBUG, "vmbus.some": logging.ERROR})
    logging.getLogger("vmbus.bus").info("%s is there", "vm")
    logging.getLogger("vmbus.some").info("not asked for")
    try:
        raise ConfigError("no such disk")
    except ConfigError:
        logging.getLogger("vmbus.bus").exception("vm: failed")
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        logging.getLogger("vmbus.bus").exception("vm: failed")
    logging.getLogger("vmbus.some").setLevel(logging.NOTSET)
    root.handlers[:] = handlers
    assert len(sent) == 3
    for parcel in json.loads(json.dumps(sent)):
        relay.replay_untrusted(parcel["log"])
    there, failed, bug = caplog.records
    assert (there.name, there.levelno, there.getMessage()) == ("vmbus.bus", 20, "vm is there")
    assert (failed.getMessage(), str(failed.exc_info[1])) == ("vm: failed", "no such disk")
    assert "ZeroDivisionError: a bug" in bug.getMessage()
    assert bug.exc_info is None


def test_what_cannot_be_sent_harms_nobody(root, capsys):
    def broken(_):
        raise BrokenPipeError("the supervisor is gone")

    relay.install(broken, {"": logging.INFO})
    logging.getLogger("vmbus.bus").info("who hears this?")
    assert "BrokenPipeError" in capsys.readouterr().err


def test_levels_are_those_of_this_process(root):
    root.setLevel(logging.ERROR)
    logging.getLogger("vmbus.test_levels").setLevel(logging.INFO)
    found = relay.levels()
    assert found[""] == logging.ERROR
    assert found["vmbus.test_levels"] == logging.INFO
    assert "vmbus" not in found or found["vmbus"]


def test_a_line_that_nobody_wants_is_not_written(caplog):
    with caplog.at_level(logging.WARNING):
        relay.replay_untrusted({"logger": "vmbus.bus", "level": 10, "text": "noise"})
        relay.replay_untrusted({"logger": "x" * 1000, "level": 10**9, "text": "5"})
    assert [record.getMessage() for record in caplog.records] == ["5"]

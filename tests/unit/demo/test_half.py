"""What every half of a demo's guest can do: ask the operator for something."""

from __future__ import annotations

import argparse

import pytest
import trio

from tests.support.demo import Told
from vmbus.demo import Half, Options, Story, half
from vmbus.errors import VMBusError
from vmbus.guest import LINUX_6_1, Driver


class IdleHalf(Half[Driver]):
    """Nothing but what it has from the base."""

    @classmethod
    def add_options(cls, parser):
        raise AssertionError

    @property
    def ram(self):
        raise AssertionError

    async def attach(self, guest, offers):
        raise AssertionError

    async def use(self, driver):
        raise AssertionError


def idle():
    options = Options(socket="s", personality=LINUX_6_1, channels=1, seconds=0)
    return IdleHalf(options, argparse.Namespace(), Story())


async def test_the_operator_is_asked_and_what_the_host_tells_is_returned(capsys):
    asked = []

    async def told():
        asked.extend(Told(capsys.readouterr().out).events)
        await trio.lowlevel.checkpoint()
        return 7

    assert await idle().ask("add", told) == 7
    assert asked == [{"event": "ready", "action": "add"}]


async def test_a_host_that_tells_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(half, "NOTICE_SECONDS", 0.01)
    with pytest.raises(VMBusError, match=r"no notification within 0\.01 s of: remove"):
        await idle().ask("remove", trio.sleep_forever)

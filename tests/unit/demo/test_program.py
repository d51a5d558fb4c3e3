"""The command line and the exit code of a demo's guest."""

from __future__ import annotations

import signal

import pytest
import trio

from vmbus.demo import DemoGuest, Half, Program
from vmbus.guest import HAIKU, LINUX_6_1, Driver


class CountHalf(Half[Driver]):
    """Has an option."""

    OPTION = "--count"

    def __init__(self, options, arguments, story):
        super().__init__(options, arguments, story)
        self.arguments = arguments

    @classmethod
    def add_options(cls, parser):
        parser.add_argument(cls.OPTION, type=int, default=3)

    @property
    def ram(self):
        raise AssertionError

    async def attach(self, guest, offers):
        raise AssertionError

    async def use(self, driver):
        raise AssertionError


class WeighHalf(CountHalf):
    """Has another option."""

    OPTION = "--weight"


PROGRAM = Program("python -m counting", "Counts.", (CountHalf,))
BOTH = Program("python -m counting", "Counts and weighs.", (CountHalf, WeighHalf))


def test_what_is_not_said_is_as_it_mostly_is():
    guest = PROGRAM.parse(["--socket", "s"])
    options = guest.options
    assert (options.socket, options.personality) == ("s", LINUX_6_1)
    assert (options.channels, options.seconds) == (4, 6.0)
    (half,) = guest.halves
    assert isinstance(half, CountHalf)
    assert half.options is options
    assert half.story is guest.story
    assert half.arguments.count == 3


def test_every_half_finds_its_options_and_has_its_share_of_the_time():
    words = "--socket s --guest haiku --channels 2 --seconds 3 --weight 5 --count 4"
    guest = BOTH.parse(words.split())
    count, weigh = guest.halves
    assert isinstance(count, CountHalf)
    assert isinstance(weigh, WeighHalf)
    assert (count.arguments.count, weigh.arguments.weight) == (4, 5)
    assert guest.options.personality is HAIKU
    assert (guest.options.channels, guest.options.seconds) == (2, 1.5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--socket"),
        (["--socket", "s", "--guest", "plan9"], "plan9"),
        (["--socket", "s", "--count", "many"], "--count"),
        (["--socket", "s", "--weight", "1"], "--weight"),
        (["--socket", "s", "--channels", "0"], "a number from 1 to 16, not '0'"),
        (["--socket", "s", "--channels", "-1"], "--channels"),
        (["--socket", "s", "--channels", "9" * 5000], "a number from 1 to 16"),
        (["--socket", "s", "--seconds", "-1"], "seconds, not '-1'"),
        (["--socket", "s", "--seconds", "nan"], "seconds, not 'nan'"),
        (["--socket", "s", "--seconds", "soon"], "seconds, not 'soon'"),
    ],
)
def test_wrong_arguments_end_with_2(arguments, complaint, capsys):
    assert PROGRAM.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m counting")
    assert complaint in told.splitlines()[-1]


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_all_went_well(monkeypatch, good, code):
    async def run(self):
        assert self.options.socket == "s"
        return good

    monkeypatch.setattr(DemoGuest, "run", run)
    assert PROGRAM.main(["--socket", "s"]) == code


def test_the_socket_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("VMBUS_SOCKET", "s2")
    assert PROGRAM.parse([]).options.socket == "s2"
    assert PROGRAM.parse([]).options.name == "demo"
    assert PROGRAM.parse(["--name", "vm"]).options.name == "vm"
    assert PROGRAM.parse(["--socket", "s"]).options.socket == "s"
    monkeypatch.setenv("VMBUS_SOCKET", "")
    with pytest.raises(SystemExit):
        PROGRAM.parse([])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_end_of_a_guest_that_stays_is_no_problem(monkeypatch, number, code):
    async def run(self):
        self.story.interrupted = number
        return True

    monkeypatch.setattr(DemoGuest, "run", run)
    assert PROGRAM.main(["--socket", "s"]) == code


def test_ctrl_c_at_any_other_time_has_its_exit_code(monkeypatch):
    async def run(self):
        async with trio.open_nursery():
            raise KeyboardInterrupt

    monkeypatch.setattr(DemoGuest, "run", run)
    assert PROGRAM.main(["--socket", "s"]) == 130

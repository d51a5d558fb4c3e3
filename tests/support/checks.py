"""The outcome of a check, if it comes with advice where there is need of it."""

from vmbus.cli.checks import Outcome


def outcome(check):
    assert bool(check.advice) is (check.outcome is not Outcome.OK), check
    return check.outcome

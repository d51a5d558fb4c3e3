"""What a server says of itself, as rates see it."""

from tests.support.cli import make_status
from vmbus.cli.rates import Sample, compare


def view_of(before, after, seconds=2.0):
    return compare(Sample(10.0, make_status(*before)), Sample(10.0 + seconds, make_status(*after)))


def channel_of(view, guest=0, channel=0):
    return view.guests[guest].channels[channel]

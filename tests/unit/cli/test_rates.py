"""Rates: differences between two looks at a server."""

from tests.support.cli import make_channel, make_guest
from tests.support.looks import channel_of, view_of


def test_rates_are_differences_per_second():
    view = view_of(
        [make_guest("a", make_channel(packets_in=100, bytes_out=5))],
        [make_guest("a", make_channel(packets_in=150, bytes_out=5, incoming_used=250))],
    )
    channel = channel_of(view)
    assert channel.rates["packets_in"] == 25.0
    assert channel.rates["bytes_out"] == 0.0
    assert channel.incoming_fill == 0.25
    assert channel.device == "scsi"
    assert view.interval == 2.0


def test_a_new_channel_counts_from_zero():
    view = view_of([make_guest("a")], [make_guest("a", make_channel(packets_in=10))])
    assert channel_of(view).rates["packets_in"] == 5.0


def test_a_channel_that_was_opened_again_counts_from_zero():
    before = make_guest("a", make_channel(packets_in=100, bytes_in=1))
    after = make_guest("a", make_channel(packets_in=10, bytes_in=50))
    channel = channel_of(view_of([before], [after]))
    assert (channel.rates["packets_in"], channel.rates["bytes_in"]) == (5.0, 25.0)


def test_another_guest_of_the_same_name_is_another_guest():
    before = make_guest("a", make_channel(packets_in=4), number=1)
    after = make_guest("a", make_channel(packets_in=10), number=2)
    assert channel_of(view_of([before], [after])).rates["packets_in"] == 5.0


def test_two_looks_at_the_same_moment_divide_by_something():
    view = view_of([make_guest("a", make_channel())], [make_guest("a", make_channel())], 0.0)
    assert channel_of(view).rates["packets_in"] == 0.0

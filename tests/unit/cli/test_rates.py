"""Rates: differences between two looks at a server."""

from tests.support.cli import make_channel, make_controller, make_guest, make_unit
from tests.support.looks import channel_of, view_of
from tests.support.nics import described_nic


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


def test_devices_that_are_gone_and_rings_without_size_are_shown():
    channel = make_channel(device=99, outgoing_size=0, outgoing_used=0)
    shown = channel_of(view_of([], [make_guest("a", channel)]))
    assert (shown.device, shown.outgoing_fill) == ("?", 0.0)


def guest_with(*units, **changes):
    return make_guest("a", devices=[make_controller(0, *units)], **changes)


def test_disks_have_rates_of_their_own_and_sums():
    before = [guest_with(make_unit(bytes_read=1000, commands=10, errors=1))]
    after = [
        guest_with(
            make_unit(bytes_read=5000, commands=30, errors=3),
            make_unit("0:0:1", bytes_read=200),  # new
        )
    ]
    (guest,) = view_of(before, after).guests
    assert [disk.address for disk in guest.disks] == ["0:0:0", "0:0:1"]
    assert guest.disks[0].rates == {"commands": 10.0, "bytes_read": 2000.0, "bytes_written": 0.0}
    assert guest.disks[0].errors == 3
    assert guest.disk_rate("bytes_read") == 2100.0


def test_another_disk_at_the_same_address_counts_from_zero():
    before, after = guest_with(make_unit(commands=9)), guest_with(make_unit(commands=4))
    (guest,) = view_of([before], [after]).guests
    assert guest.disks[0].rates["commands"] == 2.0


def test_what_counts_nothing_is_no_disk():
    device = {**make_controller(0, {"address": "0"}), "key": 2}
    bare = {"key": 3, "class": "nic"}
    (guest,) = view_of([], [make_guest("a", devices=[device, bare])]).guests
    assert guest.disks == ()


def test_network_adapters_have_rates_of_their_own_sums_and_drops_by_reason():
    before = [
        make_guest("a", devices=[described_nic(0, transmit={"frames": 10, "dropped": {"vlan": 4}})])
    ]
    after = [
        make_guest(
            "a",
            devices=[
                make_controller(0),
                described_nic(
                    0,
                    transmit={"frames": 30, "bytes": 5000, "dropped": {"vlan": 5, "spoofed": 1}},
                    receive={"segments": 7},
                ),
                described_nic(1, transmit={"frames": 100}),  # new
            ],
        )
    ]
    (guest,) = view_of(before, after).guests
    first, second = guest.nics
    assert (first.rates["frames_sent"], first.rates["bytes_sent"]) == (10.0, 2500.0)
    assert (first.rates["dropped_sent"], first.rates["segments_received"]) == (1.0, 3.5)
    assert first.drops == {"sent": {"vlan": 5, "spoofed": 1}, "received": {}}
    assert (second.adapter, second.rates["frames_sent"]) == (1, 50.0)
    assert guest.nic_rate("frames_sent") == 60.0


def test_another_adapter_of_the_same_number_counts_from_zero():
    before = [make_guest("a", devices=[described_nic(0, transmit={"frames": 10}, key=3)])]
    after = [make_guest("a", devices=[described_nic(0, transmit={"frames": 12}, key=4)])]
    (nic,) = view_of(before, after).guests[0].nics
    assert nic.rates["frames_sent"] == 6.0

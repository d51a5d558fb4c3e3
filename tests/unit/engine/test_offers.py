"""Offers, hot add and remove, relids and monitor ids."""

from __future__ import annotations

import pytest

from tests.support.engine import Guest, fault_field, make_offer, only
from vmbus.engine import (
    Budgets,
    ChannelClose,
    ChannelGone,
    EngineConfig,
    Fault,
    SendMessage,
    describe,
    describe_channels,
)
from vmbus.errors import BudgetError, ConfigError, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Version


def test_the_end_of_the_offers_is_told_even_if_there_are_none() -> None:
    """Checklist row 3: most guests stop booting without it."""
    guest = Guest()
    guest.contact()
    assert guest.post(m.RequestOffers()) == [m.AllOffersDelivered()]
    assert len(only(SendMessage, guest.events)[-1].payload) == 8


def test_offers_come_in_their_order_with_dense_relids_and_before_the_end() -> None:
    """Checklist rows 3, 5, 6 and 39."""
    guest = Guest()
    for number in (9, 3, 7):
        guest.engine.offer(make_offer(number))
    guest.contact()
    assert guest.take() == [], "not before the guest asks"
    *offers, last = guest.post(m.RequestOffers())
    assert last == m.AllOffersDelivered()
    assert [(each.instance_id.int, each.relid) for each in offers] == [(9, 1), (3, 2), (7, 3)]
    assert [len(event.payload) for event in only(SendMessage, guest.events)[1:]] == [196] * 3 + [8]


def test_an_offer_carries_what_the_device_says() -> None:
    guest = Guest()
    offer = make_offer(
        5, flags=0x11, mmio_megabytes=8, user_defined=bytes(range(120)), monitor_latency=1000
    )
    guest.engine.offer(offer)
    guest.contact()
    found = guest.post(m.RequestOffers())[0]
    assert found == m.OfferChannel(
        class_id=offer.class_id,
        instance_id=offer.instance_id,
        flags=0x11,
        mmio_megabytes=8,
        user_defined=bytes(range(120)),
        relid=1,
        monitor_id=0,
        monitor_allocated=True,
        is_dedicated_interrupt=True,
        connection_id=0x2001,
    )


def test_a_0_13_guest_signals_one_connection_for_all() -> None:
    guest = Guest()
    for number in (1, 2):
        guest.engine.offer(make_offer(number))
    guest.contact(Version.V0_13)
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [(each.connection_id, each.is_dedicated_interrupt) for each in offers] == [
        (2, False)
    ] * 2


def test_connection_ids_are_never_those_of_the_bus() -> None:
    """Checklist row 6."""
    guest = Guest()
    for number in range(1, 2048):
        guest.engine.outbox.take()
        guest.engine.channel_table.add(make_offer(number))
    guest.contact(Version.V1_1)
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [each.relid for each in offers] == list(range(1, 2048))
    ids = {each.connection_id for each in offers}
    assert len(ids) == 2047
    assert min(ids) > 4
    assert max(ids) < 1 << 24
    with pytest.raises(BudgetError):
        guest.engine.offer(make_offer(5000))


def test_asking_for_offers_twice_is_a_fault_without_a_reply() -> None:
    """Checklist row 4."""
    guest = Guest()
    guest.connect()
    (fault,) = guest.post(m.RequestOffers())
    assert isinstance(fault, Fault)


def test_asking_for_offers_without_a_connection_is_a_fault() -> None:
    guest = Guest()
    assert fault_field(guest.post_bytes(bytes([3]) + bytes(7))) == "type"


def test_a_device_can_be_added_while_the_guest_runs() -> None:
    guest = Guest()
    guest.engine.offer(make_offer(1))
    guest.connect()
    guest.engine.offer(make_offer(2))
    (offer,) = guest.take()
    assert offer.relid == 2


def test_an_instance_cannot_be_offered_twice() -> None:
    """Checklist row 6."""
    guest = Guest()
    guest.engine.offer(make_offer(1))
    with pytest.raises(ConfigError):
        guest.engine.offer(make_offer(1))


def test_the_channel_budget_is_kept() -> None:
    guest = Guest(EngineConfig(budgets=Budgets(max_channels=2)))
    guest.engine.offer(make_offer(1))
    guest.engine.offer(make_offer(2, max_subchannels=3))
    with pytest.raises(BudgetError):
        guest.engine.offer(make_offer(3))
    guest.connect()
    guest.create(2)
    event = guest.opened(2)
    with pytest.raises(BudgetError):
        guest.engine.offer_subchannels(event.key, 1)


# --- Monitor ids --------------------------------------------------------------------------


def test_monitor_ids_are_unique_and_only_for_those_who_want_one() -> None:
    """Checklist row 28."""
    guest = Guest()
    for number in range(1, 7):
        guest.engine.offer(make_offer(number, monitor_latency=number % 2 or None))
    guest.connect()
    offers = [(each["relid"], each["monitor_id"]) for each in describe_channels(guest.engine)]
    assert offers == [(1, 0), (2, None), (3, 1), (4, None), (5, 2), (6, None)]


def test_without_monitor_pages_nobody_gets_a_monitor_id() -> None:
    """Checklist row 28."""
    guest = Guest()
    guest.engine.offer(make_offer(1, monitor_latency=1))
    guest.contact(monitor_page_1=0, monitor_page_2=0)
    offer = guest.post(m.RequestOffers())[0]
    assert not offer.monitor_allocated


def test_the_129th_gets_plain_signals_and_ids_are_used_again() -> None:
    """Checklist row 28: FreeBSD panics at 128."""
    guest = Guest()
    keys = [guest.engine.offer(make_offer(n, monitor_latency=1)) for n in range(1, 130)]
    guest.contact()
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [each.monitor_id for each in offers[:128]] == list(range(128))
    assert not offers[128].monitor_allocated
    guest.engine.revoke(keys[5])
    guest.post(m.RelidReleased(relid=6))
    guest.engine.offer(make_offer(500, monitor_latency=1))
    (offer,) = only(m.OfferChannel, guest.take())
    assert (offer.relid, offer.monitor_id, offer.monitor_allocated) == (6, 5, True)


# --- Rescind ------------------------------------------------------------------------------


def test_a_channel_that_the_guest_never_saw_goes_at_once() -> None:
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.engine.revoke(key)
    assert guest.take() == [ChannelGone(key=key)]
    guest.connect()
    assert only(m.AllOffersDelivered, guest.take()) == []
    assert describe_channels(guest.engine) == []


def test_a_rescind_is_sent_once_and_the_relid_stays_taken_until_released() -> None:
    """Checklist rows 6 and 34."""
    guest = Guest()
    key = guest.engine.offer(make_offer(1))
    guest.connect()
    guest.engine.revoke(key)
    guest.engine.revoke(key)
    assert guest.take() == [m.RescindChannelOffer(relid=1)]
    guest.engine.offer(make_offer(2))
    assert guest.take()[0].relid == 2
    assert guest.post(m.RelidReleased(relid=1)) == [ChannelGone(key=key)]
    guest.engine.revoke(key)
    assert guest.take() == []
    guest.engine.offer(make_offer(3))
    assert guest.take()[0].relid == 1


def test_a_key_that_never_was_cannot_be_revoked() -> None:
    guest = Guest()
    with pytest.raises(LocalProtocolError):
        guest.engine.revoke(1)


def test_releasing_what_was_never_offered_is_a_fault() -> None:
    guest = Guest()
    guest.engine.offer(make_offer())
    guest.connect()
    for relid in (0, 2, 0xFFFFFFFF):
        assert fault_field(guest.post(m.RelidReleased(relid=relid))) == "relid"


def test_releasing_a_channel_that_is_in_use_is_a_fault() -> None:
    guest = Guest()
    guest.engine.offer(make_offer())
    guest.connect()
    guest.create()
    opening = guest.post(guest.open_message())
    assert fault_field(guest.post(m.RelidReleased(relid=1))) == "relid"
    guest.answer(opening)
    assert fault_field(guest.post(m.RelidReleased(relid=1))) == "relid"


def test_a_guest_may_give_back_what_it_has_no_use_for() -> None:
    """Linux does when it cannot register the device; relid and instance are free then."""
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.connect()
    found = guest.post(m.RelidReleased(relid=1))
    assert found == [ChannelGone(key=key, unwanted=True)]
    again = guest.engine.offer(make_offer())
    (offer,) = only(m.OfferChannel, guest.take())
    assert (offer.relid, again != key) == (1, True)


def test_one_that_was_opened_and_closed_can_be_given_back_with_its_buffers() -> None:
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.connect()
    guest.create()
    guest.opened()
    guest.answer(guest.post(m.CloseChannel(relid=1)))
    asked = guest.post(m.RelidReleased(relid=1))
    assert only(ChannelGone, asked) == [], "the device has yet to let go of the ring"
    assert only(ChannelGone, guest.answer(asked)) == [ChannelGone(key=key, unwanted=True)]
    assert describe(guest.engine)["gpadls"] == 0


def test_an_open_channel_is_closed_before_it_is_rescinded_and_gone_when_all_let_go() -> None:
    """Checklist row 34."""
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.connect()
    guest.create()
    guest.opened()
    guest.engine.revoke(key)
    assert guest.take() == [ChannelClose(key=key), m.RescindChannelOffer(relid=1)]
    # Linux closes and tears down first, not knowing yet.
    assert guest.post(m.CloseChannel(relid=1)) == []
    teardown = guest.post(m.GpadlTeardown(relid=1, gpadl=0xE1E10))
    assert guest.post(m.RelidReleased(relid=1)) == []
    guest.engine.close_done(key)
    assert guest.take() == []
    assert guest.answer(teardown) == [m.GpadlTorndown(gpadl=0xE1E10), ChannelGone(key=key)]


def test_releasing_the_relid_gives_back_what_the_guest_did_not_tear_down() -> None:
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.connect()
    guest.create()
    guest.engine.revoke(key)
    found = guest.post(m.RelidReleased(relid=1))
    assert guest.answer(guest.take() + found) == [ChannelGone(key=key)]


def test_opening_a_rescinded_channel_is_ignored() -> None:
    """Checklist row 34."""
    guest = Guest()
    key = guest.engine.offer(make_offer())
    guest.connect()
    guest.create()
    guest.engine.revoke(key)
    guest.take()
    assert guest.post(guest.open_message()) == []
    reserved = m.OpenReservedChannel(
        relid=1, target_vp=0, target_sint=2, ring_gpadl=1, downstream_page_offset=4
    )
    assert guest.post(reserved) == []


def test_an_instance_comes_back_when_the_guest_has_forgotten_the_old_one() -> None:
    """Linux takes an offer of an instance it knows for a resumed channel."""
    guest = Guest()
    old = guest.engine.offer(make_offer(1))
    guest.connect()
    guest.engine.revoke(old)
    guest.take()
    new = guest.engine.offer(make_offer(1))
    assert guest.take() == []
    with pytest.raises(ConfigError):
        guest.engine.offer(make_offer(1))
    gone, offer = guest.post(m.RelidReleased(relid=1))
    assert gone == ChannelGone(key=old)
    assert (offer.relid, new != old) == (1, True)


def test_a_guest_that_never_releases_sees_the_new_instance_in_its_next_life() -> None:
    """UEFI and OpenBSD never send RELID_RELEASED."""
    guest = Guest()
    old = guest.engine.offer(make_offer(1))
    guest.connect()
    guest.engine.revoke(old)
    guest.engine.offer(make_offer(1))
    found = guest.post(m.Unload())
    assert only(ChannelGone, found) == [ChannelGone(key=old)]
    guest.contact()
    assert guest.post(m.RequestOffers())[0].relid == 1


def test_an_offer_waits_while_a_guest_uses_the_last_free_flag_for_another_channel() -> None:
    guest = Guest()
    table = guest.engine.channel_table
    for number in range(1, 2047):
        table.add(make_offer(number))
    guest.connect(Version.V6_0)
    guest.create()
    event = guest.opened(event_flag=2047)
    assert event.event_flag == 2047
    guest.engine.offer(make_offer(5000))
    assert guest.take() == []
    (offer,) = only(m.OfferChannel, guest.answer(guest.post(m.CloseChannel(relid=1))))
    assert offer.relid == 2047

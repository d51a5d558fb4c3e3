"""Reserved channels: opened for a crash dump or a debugger, they outlive the connection."""

from __future__ import annotations

import pytest

from tests.support.engine import Guest, fault_field, make_offer, only, pages_message
from vmbus.engine import (
    ChannelClose,
    ChannelGone,
    ChannelOpen,
    Disconnected,
    EngineConfig,
    GpadlTeardown,
    ResetDone,
    SendMessage,
    describe,
    describe_channels,
)
from vmbus.errors import STATUS_INVALID_DEVICE_STATE, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Version

RING = 0xE1E10


def open_reserved(relid: int = 1, **changes) -> m.OpenReservedChannel:
    values = {
        "relid": relid,
        "target_vp": 1,
        "target_sint": 5,
        "ring_gpadl": RING,
        "downstream_page_offset": 4,
        **changes,
    }
    return m.OpenReservedChannel(**values)


def close_reserved(relid: int = 1, **changes) -> m.CloseReservedChannel:
    return m.CloseReservedChannel(**{"relid": relid, "target_vp": 2, "target_sint": 6, **changes})


CLOSED = m.CloseReservedResponse(relid=1)


def ready() -> Guest:
    guest = Guest(EngineConfig(vp_count=4))
    guest.engine.offer(make_offer(1, max_subchannels=1))
    guest.engine.offer(make_offer(2))
    guest.connect()
    guest.create()
    return guest


def reserved() -> Guest:
    guest = ready()
    (event,) = guest.post(open_reserved())
    assert isinstance(event, ChannelOpen)
    assert (event.target_vp, event.user_data) == (None, bytes(120))
    guest.engine.open_done(1, ok=True)
    assert guest.take() == [m.OpenChannelResult(relid=1, open_id=0, status=0)]
    return guest


def last_slot(guest: Guest) -> tuple[int, int, bool]:
    sent = only(SendMessage, guest.events)[-1]
    return sent.vp, sent.sint, sent.reserved


def test_replies_go_to_the_slots_named() -> None:
    guest = reserved()
    assert last_slot(guest) == (1, 5, True)
    assert guest.post(close_reserved()) == [ChannelClose(key=1)]
    guest.engine.close_done(1)
    assert guest.take() == [CLOSED]
    assert last_slot(guest) == (2, 6, True)
    assert len(only(SendMessage, guest.events)[-1].payload) == 12
    guest.answer(guest.post(m.GpadlTeardown(relid=1, gpadl=RING)))
    assert describe(guest.engine)["gpadls"] == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"target_vp": 4}, "target_vp"),
        ({"target_sint": 0}, "target_sint"),
        ({"target_sint": 16}, "target_sint"),
    ],
)
def test_a_slot_that_does_not_exist_cannot_be_answered(changes, field) -> None:
    guest = ready()
    for message in (open_reserved(**changes), close_reserved(**changes)):
        (fault,) = guest.post(message)
        assert fault.field == field


def test_only_a_primary_channel_that_exists_can_be_reserved() -> None:
    guest = ready()
    found = guest.post(open_reserved(9))
    assert only(m.OpenChannelResult, found)[0].status
    assert fault_field(found) == "relid"
    guest.opened()
    guest.engine.offer_subchannels(1, 1)
    guest.take()
    assert fault_field(guest.post(open_reserved(3))) == "relid"
    found = guest.post(open_reserved(2))
    assert only(m.OpenChannelResult, found)[0].status
    assert fault_field(found) == "ring_gpadl"


def test_its_pages_cannot_change() -> None:
    guest = reserved()
    assert fault_field(guest.post(m.GpadlTeardown(relid=1, gpadl=RING))) == "relid"
    found = guest.post(*pages_message(1, 7, [5]))
    assert only(m.GpadlCreated, found)[0].status
    assert fault_field(found) == "relid"


def test_it_is_not_closed_or_retargeted_like_others() -> None:
    guest = reserved()
    assert fault_field(guest.post(m.CloseChannel(relid=1))) == "relid"
    assert fault_field(guest.post(m.ModifyChannel(relid=1, target_vp=1))) == "relid"


def test_what_is_not_reserved_is_not_closed_by_this_message() -> None:
    guest = ready()
    guest.opened()
    guest.engine.offer_subchannels(1, 1)
    guest.take()
    (fault,) = guest.post(close_reserved())
    assert fault.field == "relid"
    assert describe_channels(guest.engine)[0]["life"] == "Open"
    assert len(describe_channels(guest.engine)) == 3
    guest.answer(guest.post(m.CloseChannel(relid=1)))


def test_closing_what_is_closed_or_unknown_is_answered() -> None:
    guest = ready()
    for relid in (1, 9):
        found = guest.post(close_reserved(relid))
        assert only(m.CloseReservedResponse, found)[0].relid == relid
        assert fault_field(found) == "relid"


def test_closing_before_the_open_result_answers_both() -> None:
    for ok in (True, False):
        guest = ready()
        guest.post(open_reserved())
        (refused,) = guest.post(close_reserved())
        assert refused.status
        assert fault_field(guest.post(close_reserved())) == "relid"
        guest.engine.open_done(1, ok=ok)
        found = guest.take()
        if ok:
            guest.engine.close_done(1)
            found += guest.take()
        assert found[-1] == CLOSED


def test_closing_while_an_ordinary_open_is_pending_is_a_fault() -> None:
    guest = ready()
    guest.post(guest.open_message())
    assert fault_field(guest.post(close_reserved())) == "relid"


def test_it_may_be_opened_while_the_channel_still_closes_and_closed_again() -> None:
    guest = ready()
    guest.opened()
    guest.post(m.CloseChannel(relid=1))
    assert guest.post(open_reserved()) == []
    (refused,) = guest.post(close_reserved())
    assert refused.status
    guest.engine.close_done(1)
    assert guest.take() == [CLOSED]


def test_a_close_already_under_way_can_be_waited_for() -> None:
    guest = reserved()
    guest.engine.revoke(1)
    assert guest.take() == [ChannelClose(key=1), m.RescindChannelOffer(relid=1)]
    assert guest.post(close_reserved()) == []
    assert fault_field(guest.post(close_reserved())) == "relid"
    guest.engine.close_done(1)
    assert guest.take() == [CLOSED]
    assert guest.post(close_reserved()) == [CLOSED]


@pytest.mark.parametrize("ok", [True, False])
def test_an_abandoned_open_can_be_waited_for(ok) -> None:
    guest = ready()
    guest.post(open_reserved())
    guest.engine.revoke(1)
    assert only(m.OpenChannelResult, guest.take())[0].status
    assert guest.post(close_reserved()) == []
    guest.engine.open_done(1, ok=ok)
    assert only(m.CloseReservedResponse, guest.answer() or guest.events) or not ok
    assert describe_channels(guest.engine)[0]["life"] == "Closed"


# --- Without a connection ---------------------------------------------------------------------


def unloaded() -> Guest:
    guest = reserved()
    found = guest.post(m.Unload())
    assert found[-2:] == [Disconnected(), m.UnloadResponse()]
    assert only(ChannelClose, found) == []
    assert only(GpadlTeardown, found) == []
    return guest


def test_it_survives_unload_with_its_ring_and_is_closed_without_a_connection() -> None:
    guest = unloaded()
    assert guest.engine.gpadl(1, RING) is not None
    assert describe_channels(guest.engine)[0]["presence"] == "Kept"
    assert guest.post(close_reserved()) == [ChannelClose(key=1)]
    guest.engine.close_done(1)
    assert guest.take() == [CLOSED, GpadlTeardown(key=1, handle=RING)]
    guest.engine.gpadl_released(1, RING)
    assert describe_channels(guest.engine)[0]["presence"] == "Hidden"


def test_other_pages_of_its_channel_do_not_survive() -> None:
    guest = ready()
    guest.create(1, 5)
    guest.answer(guest.post(open_reserved()))
    found = guest.post(m.Unload())
    assert only(GpadlTeardown, found) == [GpadlTeardown(key=1, handle=5)]
    assert guest.answer(found)[-1] == m.UnloadResponse()


def test_it_keeps_its_relid_and_is_offered_again_when_closed() -> None:
    guest = unloaded()
    guest.contact()
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [(each.instance_id.int, each.relid) for each in offers] == [(2, 2)]
    assert fault_field(guest.post(guest.open_message())) == "relid"
    done = guest.answer(guest.post(close_reserved()))
    assert only(m.CloseReservedResponse, done) == [CLOSED]
    assert [each.relid for each in only(m.OfferChannel, done)] == [1]


def test_it_survives_two_lives_and_a_new_contact() -> None:
    guest = unloaded()
    guest.connect()
    guest.answer(guest.contact(Version.V3_0))
    guest.answer(guest.post(m.Unload()))
    assert describe_channels(guest.engine)[0]["life"] == "Open"
    guest.answer(guest.post(close_reserved()))
    assert describe_channels(guest.engine)[0]["presence"] == "Hidden"


def test_the_result_of_an_open_reaches_its_slot_after_unload() -> None:
    guest = ready()
    guest.post(open_reserved())
    assert guest.post(m.Unload())[-1] == m.UnloadResponse()
    guest.engine.open_done(1, ok=True)
    assert only(m.OpenChannelResult, guest.take())[0].status == 0
    assert last_slot(guest) == (1, 5, True)


def test_an_open_that_fails_after_unload_gives_the_channel_free() -> None:
    guest = ready()
    guest.post(open_reserved())
    guest.post(m.Unload())
    guest.engine.open_done(1, ok=False)
    refused, teardown = guest.take()
    assert refused.status
    guest.answer([teardown])
    assert describe_channels(guest.engine)[0]["presence"] == "Hidden"


def test_a_contact_waits_until_a_reserved_channel_that_closes_has_let_go() -> None:
    guest = unloaded()
    found = guest.post(close_reserved()) + guest.contact()
    assert only(m.VersionResponse, found) == []
    done = guest.answer(found)
    assert only(m.CloseReservedResponse, done) == [CLOSED]
    assert only(m.VersionResponse, done)[0].version_supported


def test_a_reopen_after_unload_still_happens() -> None:
    guest = ready()
    guest.opened()
    guest.post(m.CloseChannel(relid=1), open_reserved())
    assert only(m.UnloadResponse, guest.post(m.Unload())) == [], "the device has not let go"
    guest.engine.close_done(1)
    opened, _, done = guest.take()
    assert isinstance(opened, ChannelOpen)
    assert (opened.version, opened.monitor_id) == (Version.V5_3, None)
    assert done == m.UnloadResponse()


def test_a_close_under_way_at_unload_is_still_answered() -> None:
    guest = reserved()
    found = guest.post(close_reserved()) + guest.post(m.Unload())
    done = guest.answer(found)
    assert only(m.CloseReservedResponse, done) == [CLOSED]
    assert done[-1] == m.UnloadResponse()


def test_a_reset_ends_it_without_an_answer() -> None:
    for guest in (reserved(), unloaded()):
        guest.engine.reset()
        done = guest.answer()
        assert done[-1] == ResetDone()
        assert only(m.CloseReservedResponse, done) == []
        assert describe_channels(guest.engine)[0]["presence"] == "Hidden"


def test_a_reset_forgets_that_somebody_waits_for_the_close() -> None:
    for guest in (reserved(), unloaded()):
        found = guest.post(close_reserved())
        guest.engine.reset()
        done = guest.answer(found + guest.take())
        assert only(m.CloseReservedResponse, done) == []
    guest = ready()
    guest.post(open_reserved(), close_reserved())
    guest.engine.reset()
    assert only(m.CloseReservedResponse, guest.answer(guest.take())) == []
    guest.engine.open_done(1, ok=True)
    assert guest.answer()[-1] == ResetDone()


def test_a_second_reset_changes_nothing() -> None:
    guest = unloaded()
    guest.engine.reset()
    guest.engine.reset()
    done = guest.answer()
    assert only(ResetDone, done) == [ResetDone()]
    assert only(Disconnected, done) == []


def test_it_can_be_revoked_without_a_connection() -> None:
    guest = unloaded()
    guest.engine.revoke(1)
    assert guest.answer()[-1] == ChannelGone(key=1)
    assert only(m.RescindChannelOffer, guest.take()) == []
    guest = ready()
    guest.post(open_reserved(), m.Unload())
    guest.engine.revoke(1)
    found = guest.take()
    assert only(m.OpenChannelResult, found)[0].status
    guest.engine.open_done(1, ok=True)
    assert guest.answer(found + guest.take())[-1] == ChannelGone(key=1)


def test_chosen_signals_are_not_needed_by_it() -> None:
    guest = Guest(EngineConfig(vp_count=4))
    guest.engine.offer(make_offer(1))
    guest.connect(Version.V6_0)
    guest.create()
    (event,) = guest.post(open_reserved())
    assert (event.connection_id, event.event_flag) == (0x2001, 1)


def test_before_4_0_there_are_none() -> None:
    guest = Guest()
    guest.connect(Version.V3_0)
    assert fault_field(guest.post_bytes(bytes([18]) + bytes(27))) == "type"


def test_a_reserved_channel_without_a_guest_gets_no_subchannels() -> None:
    """The next guest would be offered sub-channels of a channel that it does not know."""
    guest = reserved()
    assert len(guest.engine.offer_subchannels(1, 1)) == 1
    guest.answer(guest.post(m.Unload()))
    with pytest.raises(LocalProtocolError):
        guest.engine.offer_subchannels(1, 1)
    guest.contact()
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [offer.subchannel_index for offer in offers] == [0]


def test_a_reserved_channel_cannot_be_opened_before_its_close_is_answered() -> None:
    guest = reserved()
    (event,) = guest.post(close_reserved())
    for message in (guest.open_message(), open_reserved()):
        result, fault = guest.post(message)
        assert isinstance(result, m.OpenChannelResult)
        assert result.status == STATUS_INVALID_DEVICE_STATE
        assert fault.field == "relid"
    assert guest.answer([event]) == [CLOSED]
    assert isinstance(guest.post(open_reserved())[0], ChannelOpen)

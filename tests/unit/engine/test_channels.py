"""Opening, closing and retargeting channels; sub-channels."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.engine import Guest, fault_field, make_offer, only, pages_message
from vmbus.engine import (
    ChannelClose,
    ChannelGone,
    ChannelModify,
    ChannelOpen,
    EngineConfig,
    Fault,
    SendMessage,
    describe_channels,
)
from vmbus.errors import ConfigError, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version


def ready(version: Version = Version.V5_3, **options) -> Guest:
    """A guest with two channels and a ring GPADL in the first."""
    guest = Guest(EngineConfig(vp_count=4, **options))
    guest.engine.offer(make_offer(1, max_subchannels=3, monitor_latency=1000))
    guest.engine.offer(make_offer(2))
    guest.connect(version)
    guest.create()
    return guest


@pytest.fixture
def guest() -> Guest:
    return ready()


def result(events, *, ok: bool) -> m.OpenChannelResult:
    """The one OPENCHANNEL_RESULT among the events."""
    (reply,) = only(m.OpenChannelResult, events)
    assert (reply.status == 0) == ok
    return reply


# --- Open -------------------------------------------------------------------------------------


def test_the_device_is_asked_first_and_then_the_guest_is_told(guest) -> None:
    """Checklist rows 4, 5 and 33: no signal may come before the result."""
    (event,) = guest.post(guest.open_message(target_vp=3))
    gpadl = guest.engine.gpadl(1, 0xE1E10)
    assert event == ChannelOpen(
        key=1,
        relid=1,
        offer=make_offer(1, max_subchannels=3, monitor_latency=1000),
        subchannel_index=0,
        primary_key=1,
        gpadl=gpadl,
        downstream_page_offset=4,
        target_vp=3,
        user_data=bytes(range(120)),
        connection_id=0x2001,
        event_flag=1,
        version=Version.V5_3,
        monitor_id=0,
        outgoing_by_page=False,
        incoming_by_page=False,
    )
    guest.engine.open_done(1, ok=True)
    assert guest.take() == [m.OpenChannelResult(relid=1, open_id=1, status=0)]
    assert len(only(SendMessage, guest.events)[-1].payload) == 20


@pytest.mark.parametrize("open_id", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("ok", [True, False])
def test_the_open_id_is_echoed_whatever_it_is(guest, open_id, ok) -> None:
    """UEFI uses 0."""
    guest.post(guest.open_message(open_id=open_id))
    guest.engine.open_done(1, ok=ok)
    assert result(guest.take(), ok=ok).open_id == open_id


def test_a_device_may_refuse_and_be_asked_again(guest) -> None:
    guest.post(guest.open_message())
    guest.engine.open_done(1, ok=False)
    result(guest.take(), ok=False)
    guest.opened()


def test_without_a_target_there_are_no_interrupts(guest) -> None:
    assert guest.opened(target_vp=m.TARGET_VP_NONE).target_vp is None


def test_a_vp_that_does_not_exist_is_refused(guest) -> None:
    """Fuzzing catalogue G08."""
    found = guest.post(guest.open_message(target_vp=4, open_id=9))
    assert result(found, ok=False).open_id == 9
    assert fault_field(found) == "target_vp"


@pytest.mark.parametrize(
    ("version", "outgoing", "incoming", "connection_id"),
    [
        (Version.V0_13, True, True, 2),
        (Version.V1_1, True, False, 0x2001),
        (Version.V2_4, False, False, 0x2001),
    ],
)
def test_old_guests_signal_through_the_interrupt_page(
    version, outgoing, incoming, connection_id
) -> None:
    guest = ready(version)
    event = guest.opened(target_vp=0x77 if version < Version.V2_4 else 0)
    assert (event.outgoing_by_page, event.incoming_by_page) == (outgoing, incoming)
    assert (event.connection_id, event.target_vp) == (connection_id, 0)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 9, 0xFFFFFFFF])
def test_a_ring_that_cannot_be_split_is_refused(guest, offset) -> None:
    """Fuzzing catalogue G08."""
    found = guest.post(guest.open_message(downstream_page_offset=offset))
    result(found, ok=False)
    assert fault_field(found) == "downstream_page_offset"


def test_a_ring_of_any_size_is_fine(guest) -> None:
    """Fuzzing catalogue G08: OpenBSD uses 21 pages a ring."""
    guest.create(1, 5, 42)
    assert guest.opened(ring_gpadl=5, downstream_page_offset=21).gpadl.page_count == 42


def test_a_ring_of_another_channel_or_not_ready_or_gone_is_refused(guest) -> None:
    """Fuzzing catalogue G08."""
    guest.create(2, 50)
    guest.post(pages_message(1, 51, list(range(100, 140)))[0])
    guest.create(1, 52)
    guest.post(m.GpadlTeardown(relid=1, gpadl=52))
    for handle in (50, 51, 52, 53):
        found = guest.post(guest.open_message(ring_gpadl=handle))
        result(found, ok=False)
        assert fault_field(found) == "ring_gpadl"
    guest.opened()


def test_a_channel_cannot_be_opened_twice(guest) -> None:
    """Fuzzing catalogue G08."""
    guest.post(guest.open_message())
    result(guest.post(guest.open_message(open_id=8)), ok=False)
    guest.engine.open_done(1, ok=True)
    assert result(guest.take(), ok=True).open_id == 1
    result(guest.post(guest.open_message()), ok=False)
    assert describe_channels(guest.engine)[0]["life"] == "Open"


@pytest.mark.parametrize("relid", [0, 3, 0xFFFFFFFF])
def test_opening_what_does_not_exist_is_refused(guest, relid) -> None:
    found = guest.post(guest.open_message(relid))
    assert result(found, ok=False).relid == relid
    assert fault_field(found) == "relid"


def test_devices_cannot_answer_what_was_not_asked(guest) -> None:
    for call in (
        lambda: guest.engine.open_done(1, ok=True),
        lambda: guest.engine.close_done(1),
        lambda: guest.engine.modify_done(1, ok=True),
        lambda: guest.engine.gpadl_released(1, 0xE1E10),
        lambda: guest.engine.open_done(99, ok=True),
    ):
        with pytest.raises(LocalProtocolError):
            call()


def test_the_monitor_bit_is_only_used_with_pages() -> None:
    guest = ready(Version.V6_0)
    guest.post(m.ModifyConnection(monitor_page_1=0, monitor_page_2=0))
    assert guest.opened().monitor_id is None


# --- Signals chosen by the guest --------------------------------------------------------------


def test_a_6_0_guest_may_choose_its_signals() -> None:
    guest = ready(Version.V6_0)
    event = guest.opened(connection_id=0x123456, event_flag=2047)
    assert (event.connection_id, event.event_flag) == (0x123456, 2047)
    guest.create(2)
    event = guest.opened(2, connection_id=0x123457)
    assert (event.connection_id, event.event_flag) == (0x123457, 2)


@pytest.mark.parametrize(
    ("connection_id", "flag", "field"),
    [
        (1, 0, "connection_id"),
        (4, 0, "connection_id"),
        (1 << 24, 0, "connection_id"),
        (0xFFFFFFFF, 0, "connection_id"),
        (0x2002, 0, "connection_id"),
        (0x777, 0, "connection_id"),
        (0, 2048, "event_flag"),
        (0, 0xFFFF, "event_flag"),
        (0, 2, "event_flag"),
        (0, 99, "event_flag"),
    ],
)
def test_signals_of_others_or_out_of_range_are_refused(connection_id, flag, field) -> None:
    guest = ready(Version.V6_0)
    guest.engine.offer(make_offer(3))
    guest.take()
    guest.create(3)
    guest.opened(3, connection_id=0x777, event_flag=99)
    found = guest.post(guest.open_message(connection_id=connection_id, event_flag=flag))
    result(found, ok=False)
    assert fault_field(found) == field


def test_chosen_signals_are_free_again_after_close() -> None:
    guest = ready(Version.V6_0)
    guest.opened(connection_id=0x777, event_flag=99)
    guest.answer(guest.post(m.CloseChannel(relid=1)))
    guest.create(2)
    guest.opened(2, connection_id=0x777, event_flag=99)


def test_signals_wanted_for_opening_again_are_looked_at_when_it_is_closed() -> None:
    guest = ready(Version.V6_0)
    guest.create(2)
    guest.opened(2)
    guest.opened()
    asked = guest.post(m.CloseChannel(relid=1), guest.open_message(event_flag=2))
    found = guest.answer(asked)
    result(found, ok=False)
    assert fault_field(found) == "event_flag"
    guest.opened()


def test_a_new_relid_keeps_clear_of_chosen_signals() -> None:
    guest = ready(Version.V6_0)
    guest.opened(connection_id=0x2003, event_flag=4)
    guest.engine.offer(make_offer(3))
    assert only(m.OfferChannel, guest.take())[0].relid == 5


def test_signals_are_not_chosen_without_the_feature() -> None:
    guest = ready(Version.V6_0, supported_features=Feature.PAUSE_RESUME)
    assert guest.opened().connection_id == 0x2001


# --- Close ------------------------------------------------------------------------------------


def test_closing_has_no_reply_and_the_channel_can_be_opened_again(guest) -> None:
    guest.opened()
    assert guest.post(m.CloseChannel(relid=1)) == [ChannelClose(key=1)]
    guest.engine.close_done(1)
    assert guest.take() == []
    guest.opened()


def test_a_guest_may_open_again_while_the_device_still_closes(guest) -> None:
    guest.opened()
    guest.post(m.CloseChannel(relid=1))
    assert guest.post(guest.open_message(open_id=5)) == []
    result(guest.post(guest.open_message(open_id=6)), ok=False)
    assert fault_field(guest.post(m.CloseChannel(relid=1))) == "relid"
    guest.engine.close_done(1)
    (event,) = guest.take()
    assert isinstance(event, ChannelOpen)
    guest.engine.open_done(1, ok=True)
    assert result(guest.take(), ok=True).open_id == 5


def test_a_ring_torn_down_while_waiting_to_reopen_is_noticed(guest) -> None:
    guest.opened()
    guest.post(m.CloseChannel(relid=1), guest.open_message())
    guest.post(m.GpadlTeardown(relid=1, gpadl=0xE1E10))
    guest.engine.close_done(1)
    found = guest.take()
    result(found, ok=False)
    assert fault_field(found) == "ring_gpadl"


def test_closing_what_is_not_open_is_a_fault(guest) -> None:
    """Fuzzing catalogue G09."""
    assert fault_field(guest.post(m.CloseChannel(relid=1))) == "relid"
    guest.post(guest.open_message())
    assert fault_field(guest.post(m.CloseChannel(relid=1))) == "relid"
    guest.engine.open_done(1, ok=True)
    guest.post(m.CloseChannel(relid=1))
    assert fault_field(guest.post(m.CloseChannel(relid=1))) == "relid"
    assert fault_field(guest.post(m.CloseChannel(relid=9))) == "relid"


@pytest.mark.parametrize("ok", [True, False])
def test_a_channel_revoked_while_opening_is_answered_and_closed(guest, ok) -> None:
    guest.post(guest.open_message())
    guest.engine.revoke(1)
    refused, rescind = guest.take()
    result([refused], ok=False)
    assert rescind == m.RescindChannelOffer(relid=1)
    guest.post(m.RelidReleased(relid=1))
    guest.engine.open_done(1, ok=ok)
    assert ChannelGone(key=1) not in guest.take()
    if ok:
        guest.engine.close_done(1)
    guest.engine.gpadl_released(1, 0xE1E10)
    assert guest.take() == [ChannelGone(key=1)]


def test_a_channel_revoked_while_reopening_is_answered_once(guest) -> None:
    guest.opened()
    guest.post(m.CloseChannel(relid=1), guest.open_message())
    guest.engine.revoke(1)
    result(guest.take(), ok=False)
    guest.engine.close_done(1)
    assert guest.take() == []


# --- Modify -----------------------------------------------------------------------------------


def response(events, *, ok: bool) -> None:
    (reply,) = only(m.ModifyChannelResponse, events)
    assert (reply.status == 0) == ok


@pytest.mark.parametrize("ok", [True, False])
def test_from_5_3_on_retargeting_is_answered(guest, ok) -> None:
    """Checklist row 4."""
    guest.opened()
    assert guest.post(m.ModifyChannel(relid=1, target_vp=2)) == [ChannelModify(key=1, target_vp=2)]
    guest.engine.modify_done(1, ok=ok)
    response(guest.take(), ok=ok)
    assert len(only(SendMessage, guest.events)[-1].payload) == 16
    assert describe_channels(guest.engine)[0]["target_vp"] == (2 if ok else 0)


def test_a_second_wish_while_the_first_is_pending_is_refused(guest) -> None:
    guest.opened()
    guest.post(m.ModifyChannel(relid=1, target_vp=2))
    found = guest.post(m.ModifyChannel(relid=1, target_vp=3))
    response(found, ok=False)
    assert only(Fault, found)
    guest.engine.modify_done(1, ok=True)
    response(guest.take(), ok=True)


def test_before_5_3_there_is_no_answer_and_the_newest_wish_counts() -> None:
    guest = ready(Version.V4_1)
    guest.opened()
    guest.post(m.ModifyChannel(relid=1, target_vp=1))
    for vp in (2, 3):
        assert guest.post(m.ModifyChannel(relid=1, target_vp=vp)) == []
    guest.engine.modify_done(1, ok=True)
    assert guest.take() == [ChannelModify(key=1, target_vp=3)]
    guest.engine.modify_done(1, ok=True)
    assert guest.take() == []
    assert describe_channels(guest.engine)[0]["target_vp"] == 3


def test_retargeting_what_cannot_be_is_refused(guest) -> None:
    for relid, vp in ((1, 1), (9, 1)):
        found = guest.post(m.ModifyChannel(relid=relid, target_vp=vp))
        response(found, ok=False)
        assert fault_field(found) == "relid"
    guest.opened()
    for vp in (4, m.TARGET_VP_NONE):
        found = guest.post(m.ModifyChannel(relid=1, target_vp=vp))
        response(found, ok=False)
        assert fault_field(found) == "target_vp"


def test_a_channel_without_interrupts_cannot_be_retargeted(guest) -> None:
    guest.opened(target_vp=m.TARGET_VP_NONE)
    response(guest.post(m.ModifyChannel(relid=1, target_vp=1)), ok=False)


def test_closing_while_retargeting_answers_both(guest) -> None:
    guest.opened()
    guest.post(m.ModifyChannel(relid=1, target_vp=2))
    found = guest.post(m.CloseChannel(relid=1))
    response(found, ok=False)
    assert found[-1] == ChannelClose(key=1)
    guest.engine.modify_done(1, ok=True)
    assert guest.take() == []
    guest.post(guest.open_message())
    guest.engine.modify_done(1, ok=True)
    guest.engine.close_done(1)
    assert only(ChannelOpen, guest.take())


def test_retargeting_before_4_1_does_not_exist() -> None:
    guest = ready(Version.V4_0)
    payload = bytes([22]) + bytes(15)
    assert fault_field(guest.post_bytes(payload)) == "type"


# --- Sub-channels -----------------------------------------------------------------------------


def with_subchannels() -> tuple[Guest, list[int]]:
    guest = ready()
    guest.opened()
    keys = guest.engine.offer_subchannels(1, 2)
    return guest, keys


def test_subchannels_have_the_guids_of_the_primary_and_dense_indices() -> None:
    """Checklist row 17."""
    guest, keys = with_subchannels()
    offers = guest.take()
    assert [each.subchannel_index for each in offers] == [1, 2]
    assert {each.instance_id.int for each in offers} == {1}
    assert [each.relid for each in offers] == [3, 4]
    guest.create(3)
    event = guest.opened(3)
    assert (event.key, event.primary_key, event.subchannel_index) == (keys[0], 1, 1)


def test_only_an_open_primary_gets_subchannels_once_and_not_too_many(guest) -> None:
    with pytest.raises(LocalProtocolError):
        guest.engine.offer_subchannels(1, 1)
    guest.opened()
    for count in (4, -1):
        with pytest.raises(ConfigError):
            guest.engine.offer_subchannels(1, count)
    assert guest.engine.offer_subchannels(1, 0) == []
    (key,) = guest.engine.offer_subchannels(1, 1)
    for wrong in (1, key):
        with pytest.raises(LocalProtocolError):
            guest.engine.offer_subchannels(wrong, 1)


def test_closing_the_primary_takes_its_subchannels_back_first() -> None:
    """Fuzzing catalogue G27; FreeBSD waits for the rescinds."""
    guest, keys = with_subchannels()
    guest.take()
    guest.create(3)
    guest.opened(3)
    found = guest.post(m.CloseChannel(relid=1))
    assert found == [
        ChannelClose(key=keys[0]),
        m.RescindChannelOffer(relid=3),
        m.RescindChannelOffer(relid=4),
        ChannelClose(key=1),
    ]
    guest.answer(found)
    found = guest.post(m.RelidReleased(relid=4), m.RelidReleased(relid=3))
    assert only(ChannelGone, guest.answer(found) + found) != []
    assert [each["key"] for each in describe_channels(guest.engine)] == [1, 2]


def test_new_subchannels_wait_until_the_old_ones_are_forgotten() -> None:
    guest, _ = with_subchannels()
    guest.take()
    guest.answer(guest.post(m.CloseChannel(relid=1)))
    guest.opened()
    guest.engine.offer_subchannels(1, 2)
    assert guest.take() == []
    found = guest.post(m.RelidReleased(relid=4))
    assert [each.subchannel_index for each in only(m.OfferChannel, found)] == [2]


def test_revoking_the_primary_revokes_its_subchannels_first() -> None:
    guest, _ = with_subchannels()
    guest.take()
    guest.engine.revoke(1)
    rescinded = [each.relid for each in only(m.RescindChannelOffer, guest.take())]
    assert rescinded == [3, 4, 1]


def test_a_subchannel_can_be_closed_and_opened_alone() -> None:
    guest, _ = with_subchannels()
    guest.take()
    guest.create(4)
    guest.opened(4)
    assert len(guest.post(m.CloseChannel(relid=4))) == 1
    guest.engine.close_done(4)
    guest.opened(4)


def test_open_messages_of_the_other_layout_are_cut_at_their_size() -> None:
    guest = ready(Version.V6_0)
    payload = m.build_message(
        dataclasses.replace(guest.open_message(), connection_id=None),
        version=Version.V5_3,
    )
    assert fault_field(guest.post_bytes(payload)) == "size"

"""UNLOAD, reset, contact anew, pause, changed monitor pages."""

from __future__ import annotations

import pytest

from tests.support.engine import (
    INTERRUPT_PAGE,
    MONITOR_1,
    MONITOR_2,
    Guest,
    fault_field,
    make_offer,
    only,
    pages_message,
)
from vmbus.engine import (
    ChannelClose,
    ChannelGone,
    ChannelOpen,
    Connected,
    DiscardMessages,
    Disconnected,
    Fault,
    GpadlTeardown,
    InterruptPage,
    MonitorPages,
    ResetDone,
    SendMessage,
    describe,
    describe_channels,
)
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version

NO_MONITOR = MonitorPages(page_1=None, page_2=None)


def busy(version: Version = Version.V5_3) -> Guest:
    """Two devices; the first is open, has a sub-channel, a buffer and an unfinished GPADL."""
    guest = Guest()
    guest.engine.offer(make_offer(1, max_subchannels=1, monitor_latency=1))
    guest.engine.offer(make_offer(2))
    guest.connect(version)
    guest.create()
    guest.create(1, 5)
    guest.opened()
    guest.engine.offer_subchannels(1, 1)
    guest.take()
    guest.create(3)
    guest.opened(3)
    guest.post(pages_message(2, 9, list(range(100, 130)))[0])
    return guest


def assert_clean(guest: Guest) -> None:
    """Nothing of the guest is left."""
    info = describe(guest.engine)
    assert (info["gpadls"], info["gpadl_pages"], info["unfinished_gpadls"]) == (0, 0, 0)
    assert [
        (each["key"], each["life"], each["relid"]) for each in describe_channels(guest.engine)
    ] == [
        (1, "Closed", None),
        (2, "Closed", None),
    ]


# --- Unload -----------------------------------------------------------------------------------


def test_unload_is_answered_when_every_device_has_let_go() -> None:
    """Checklist row 7."""
    guest = busy()
    found = guest.post(m.Unload())
    assert found == [
        DiscardMessages(),
        NO_MONITOR,
        ChannelClose(key=3),
        GpadlTeardown(key=3, handle=0xE1E10),
        ChannelClose(key=1),
        GpadlTeardown(key=1, handle=0xE1E10),
        GpadlTeardown(key=1, handle=5),
    ]
    assert guest.engine.gpadl(1, 5) is None
    guest.engine.gpadl_released(1, 5)
    guest.engine.close_done(1)
    guest.engine.gpadl_released(3, 0xE1E10)
    guest.engine.gpadl_released(1, 0xE1E10)
    assert guest.take() == []
    guest.engine.close_done(3)
    assert guest.take() == [ChannelGone(key=3), Disconnected(), m.UnloadResponse()]
    assert len(only(SendMessage, guest.events)[-1].payload) == 8
    assert_clean(guest)


def test_before_1_1_nobody_waits_for_the_end() -> None:
    guest = busy(Version.V0_13)
    found = guest.post(m.Unload())
    assert InterruptPage(gpa=None) in found
    assert guest.answer(found)[-1] == Disconnected()
    assert only(m.UnloadResponse, guest.events) == []


def test_an_idle_guest_gets_its_answer_at_once_and_may_come_back_with_any_version() -> None:
    """Checklist row 7."""
    guest = Guest()
    guest.connect(Version.V6_0)
    assert guest.post(m.Unload())[-1] == m.UnloadResponse()
    for version in (Version.V3_0, Version.V0_13, Version.V5_3):
        guest.connect(version)
        assert guest.version == version
        guest.post(m.Unload())


def test_relids_are_the_same_in_the_next_life() -> None:
    """Checklist row 39: Linux resumes from hibernation by instance."""
    guest = busy()
    guest.answer(guest.post(m.Unload()))
    guest.contact()
    offers = only(m.OfferChannel, guest.post(m.RequestOffers()))
    assert [(each.instance_id.int, each.relid) for each in offers] == [(1, 1), (2, 2)]
    guest.create()
    guest.opened()


def test_linux_releases_its_relids_after_unload_and_that_is_no_fault() -> None:
    guest = Guest()
    guest.engine.offer(make_offer(1))
    guest.connect()
    guest.post(m.Unload())

    assert guest.post(m.RelidReleased(relid=1)) == []
    assert describe(guest.engine)["faults"] == 0


def test_a_second_unload_is_a_fault() -> None:
    """Checklist row 4."""
    guest = busy()
    found = guest.post(m.Unload())
    assert fault_field(guest.post(m.Unload())) == "type"
    guest.answer(found)
    assert [event for event in guest.events if isinstance(event, Fault)] != []
    assert fault_field(guest.post(m.Unload())) == "type"


def test_a_guest_that_leaves_while_a_device_opens_gets_no_result() -> None:
    for ok in (True, False):
        guest = Guest()
        guest.engine.offer(make_offer(1))
        guest.connect()
        guest.create()
        guest.post(guest.open_message())
        found = guest.post(m.Unload())
        assert only(ChannelClose, found) == []
        guest.engine.open_done(1, ok=ok)
        found += guest.take()
        assert len(only(ChannelClose, found)) == ok
        guest.answer(found)
        assert only(m.OpenChannelResult, guest.take()) == []
        assert describe(guest.engine)["state"] == "Disconnected"


def test_a_guest_that_leaves_while_waiting_to_reopen_gets_no_result() -> None:
    guest = busy()
    close = guest.post(m.CloseChannel(relid=1))
    guest.post(guest.open_message())
    found = close + guest.post(m.Unload())
    assert only(ChannelOpen, guest.answer(found)) == []
    assert_clean(guest)


def test_answers_that_are_owed_are_not_given_to_the_next_life() -> None:
    guest = busy()
    teardown = guest.post(m.GpadlTeardown(relid=1, gpadl=5))
    guest.post(m.ModifyChannel(relid=1, target_vp=0))
    found = guest.contact()
    done = guest.answer(teardown + found)
    assert only(m.GpadlTorndown, done) == []
    assert only(m.ModifyChannelResponse, done) == []
    assert only(m.VersionResponse, done) != []


def test_messages_not_taken_yet_are_discarded_with_the_connection() -> None:
    guest = Guest()
    guest.engine.offer(make_offer(1))
    guest.contact()
    payloads = [
        m.build_message(message, version=Version.V5_3)
        for message in (m.RequestOffers(), m.Unload())
    ]
    for payload in payloads:
        guest.engine.receive_untrusted(4, payload)
    assert only(m.OfferChannel, events := guest.take()) == []
    assert events[-1] == m.UnloadResponse()


def test_a_device_revoked_while_the_guest_leaves_is_gone_in_the_end() -> None:
    guest = busy()
    found = guest.post(m.Unload())
    guest.engine.revoke(1)
    done = guest.answer(found + guest.take())
    assert ChannelGone(key=1) in done
    assert done[-1] == m.UnloadResponse()
    assert [each["key"] for each in describe_channels(guest.engine)] == [2]


def test_a_device_rescinded_before_the_guest_leaves_is_gone_in_the_end() -> None:
    guest = busy()
    guest.engine.revoke(1)
    found = guest.take() + guest.post(m.Unload())
    assert ChannelGone(key=1) in guest.answer(found)


def test_a_guest_without_monitor_pages_leaves_none_behind() -> None:
    guest = Guest()
    guest.contact(monitor_page_1=0)
    assert only(MonitorPages, guest.post(m.Unload())) == []


# --- Contact without unload -------------------------------------------------------------------


@pytest.mark.parametrize("version", [Version.V5_3, Version.V3_0])
def test_a_new_contact_cleans_up_first_and_is_then_answered(version) -> None:
    """Checklist row 7 (kdump) and fuzzing catalogue G11."""
    guest = busy()
    found = guest.contact(version)
    assert only(m.VersionResponse, found) == []
    done = guest.answer(found)
    kinds = [type(event) for event in done]
    assert kinds.index(Disconnected) < kinds.index(Connected)
    assert only(m.VersionResponse, done)[0].version_supported
    assert_clean(guest)
    guest.post(m.RequestOffers())
    guest.create()
    guest.opened()


def test_a_new_contact_that_is_refused_leaves_the_guest_without_connection() -> None:
    guest = busy()
    done = guest.answer(guest.contact(0x00070000))
    assert done[-1] == m.VersionResponse(version_supported=False)
    assert_clean(guest)


def test_the_last_of_several_contacts_counts_and_is_answered_once() -> None:
    guest = busy()
    found = guest.post(m.Unload())
    guest.contact(Version.V4_0)
    guest.contact(Version.V3_0)
    assert fault_field(guest.post(m.RequestOffers())) == "type"
    done = guest.answer(found)
    assert only(m.UnloadResponse, done) == []
    assert [each.version for each in only(Connected, done)] == [Version.V3_0]
    assert len(only(m.VersionResponse, done)) == 1


# --- Reset ------------------------------------------------------------------------------------


def test_a_reset_cleans_up_and_sends_nothing() -> None:
    """Checklist row 7."""
    guest = busy()
    guest.engine.reset()
    done = guest.answer()
    assert done[-2:] == [Disconnected(), ResetDone()]
    assert_clean(guest)
    assert guest.events[-1] == ResetDone()


def test_a_reset_without_a_connection_is_done_at_once() -> None:
    guest = Guest()
    guest.engine.reset()
    assert guest.take() == [ResetDone()]


def test_a_reset_cancels_what_unload_or_contact_have_started() -> None:
    for first in (m.Unload(), None):
        guest = busy()
        found = guest.post(first) if first else guest.contact()
        guest.engine.reset()
        done = guest.answer(found + guest.take())
        assert done[-1] == ResetDone()
        assert only(m.UnloadResponse, done) == []
        assert only(m.VersionResponse, done) == []


def test_a_contact_right_after_a_reset_waits_for_its_end() -> None:
    guest = busy()
    guest.engine.reset()
    found = guest.take() + guest.contact()
    kinds = [type(event) for event in guest.answer(found)]
    assert kinds.index(ResetDone) < kinds.index(Connected)


# --- Pause ------------------------------------------------------------------------------------


def paused() -> Guest:
    guest = Guest()
    guest.engine.offer(make_offer(1))
    guest.connect(Version.V6_0)
    assert guest.post(m.Pause()) == [m.PauseResponse()]
    return guest


@pytest.mark.parametrize("farewell", ["contact", "unload", "reset"])
def test_subchannels_that_still_wait_to_be_offered_do_not_reach_the_next_guest(
    farewell: str,
) -> None:
    guest = Guest()
    guest.engine.offer(make_offer(1, max_subchannels=2))
    guest.connect()
    guest.create()
    guest.opened()
    guest.engine.offer_subchannels(1, 2)
    guest.answer()
    guest.answer(guest.post(m.CloseChannel(relid=1)))
    guest.opened()
    # The guest has not released the first two.
    keys = guest.engine.offer_subchannels(1, 2)
    assert guest.take() == []
    if farewell == "unload":
        guest.answer(guest.post(m.Unload()))
    elif farewell == "reset":
        guest.engine.reset()
        guest.answer()
    guest.answer(guest.contact())
    assert {event.key for event in only(ChannelGone, guest.events)} >= set(keys)
    assert len(only(m.OfferChannel, guest.post(m.RequestOffers()))) == 1
    guest.create()
    guest.opened()
    assert len(guest.engine.offer_subchannels(1, 2)) == 2


def test_while_paused_messages_are_held_back_in_order() -> None:
    guest = paused()
    guest.engine.offer(make_offer(2))
    guest.engine.revoke(1)
    assert guest.take() == []
    offer, rescind = guest.post(m.Resume())
    assert (offer.relid, rescind) == (2, m.RescindChannelOffer(relid=1))
    assert guest.post(m.Pause()) == [m.PauseResponse()]
    assert guest.post(m.Resume()) == []


def test_while_paused_only_resume_and_the_farewells_are_accepted() -> None:
    guest = paused()
    for message in (m.Pause(), m.RequestOffers(), m.CloseChannel(relid=1)):
        assert fault_field(guest.post(message)) == "type"
    assert guest.post(m.Unload())[-1] == m.UnloadResponse()
    guest = paused()
    guest.engine.offer(make_offer(2))
    found = guest.contact()
    assert only(m.OfferChannel, found) == [], "what was held back belonged to the old life"
    assert only(m.VersionResponse, found)


def test_resuming_what_is_not_paused_is_a_fault() -> None:
    guest = Guest()
    guest.connect(Version.V6_0)
    assert fault_field(guest.post(m.Resume())) == "type"


# --- Monitor pages ----------------------------------------------------------------------------


def test_monitor_pages_can_be_changed_and_taken_away() -> None:
    guest = Guest()
    guest.connect(Version.V6_0)
    ok = m.ModifyConnectionResponse(connection_state=0)
    found = guest.post(m.ModifyConnection(monitor_page_1=MONITOR_2, monitor_page_2=MONITOR_1))
    assert found == [MonitorPages(page_1=MONITOR_2, page_2=MONITOR_1), ok]
    assert len(only(SendMessage, guest.events)[-1].payload) == 9
    same = guest.post(m.ModifyConnection(monitor_page_1=MONITOR_2, monitor_page_2=MONITOR_1))
    assert same == [ok]
    assert guest.post(m.ModifyConnection(monitor_page_1=0, monitor_page_2=0)) == [NO_MONITOR, ok]


@pytest.mark.parametrize("pages", [(MONITOR_1, 0), (0, MONITOR_2), (8, 8), (1 << 60, 1 << 61)])
def test_monitor_pages_that_are_not_memory_are_refused(pages) -> None:
    guest = Guest()
    guest.connect(Version.V6_0)
    found = guest.post(m.ModifyConnection(monitor_page_1=pages[0], monitor_page_2=pages[1]))
    assert only(m.ModifyConnectionResponse, found)[0].connection_state != 0
    assert fault_field(found) == "monitor_page_1"


def test_monitor_pages_in_use_stay() -> None:
    guest = busy(Version.V6_0)
    found = guest.post(m.ModifyConnection(monitor_page_1=0, monitor_page_2=0))
    assert only(m.ModifyConnectionResponse, found)[0].connection_state != 0
    assert only(MonitorPages, found) == []


def test_6_0_messages_need_their_feature() -> None:
    guest = Guest()
    guest.contact(Version.V6_0, features=Feature(0))
    for kind in (25, 27, 29):
        assert fault_field(guest.post_bytes(bytes([kind]) + bytes(23))) == "type"


def test_the_interrupt_page_of_an_old_guest_goes_with_it() -> None:
    guest = Guest()
    guest.connect(Version.V1_1)
    assert InterruptPage(gpa=INTERRUPT_PAGE) in guest.events
    assert InterruptPage(gpa=None) in guest.post(m.Unload())

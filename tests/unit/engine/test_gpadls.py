"""GPADL messages: creation, teardown, budgets."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.engine import Guest, fault_field, make_offer, only, pages_message
from vmbus.engine import Budgets, Engine, EngineConfig, Fault, GpadlTeardown, SendMessage, describe
from vmbus.engine.states import Unfinished
from vmbus.errors import LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.gpa import build_range

PAGE = 4096


@pytest.fixture
def guest() -> Guest:
    found = Guest()
    for number in (1, 2):
        found.engine.offer(make_offer(number))
    found.connect()
    return found


def created(events, status: int | None = None) -> m.GpadlCreated:
    """The one GPADL_CREATED among the events."""
    (reply,) = only(m.GpadlCreated, events)
    if status is None:
        assert reply.status
    else:
        assert reply.status == status
    return reply


def test_a_list_in_one_header_is_answered_at_once(guest) -> None:
    """Checklist rows 4 and 5."""
    assert guest.post(*pages_message(1, 7, [20, 30])) == [
        m.GpadlCreated(relid=1, gpadl=7, status=0)
    ]
    assert len(only(SendMessage, guest.events)[-1].payload) == 20
    gpadl = guest.engine.gpadl(1, 7)
    assert gpadl is not None
    assert gpadl.pages == (20, 30)
    assert guest.engine.gpadl(2, 7) is None
    assert guest.engine.gpadl(99, 7) is None


def test_bodies_may_come_between_other_messages_and_are_answered_after_the_last(guest) -> None:
    """Checklist row 31: the message number is 0 in all bodies of some drivers."""
    one = pages_message(1, 7, list(range(100, 200)))
    two = pages_message(2, 8, list(range(300, 400)))
    assert guest.post(one[0], two[0]) == []
    for first, second in zip(one[1:], two[1:], strict=True):
        assert guest.engine.gpadl(1, 7) is None
        guest.post(
            dataclasses.replace(second, message_number=0),
            dataclasses.replace(first, message_number=0),
        )
    assert [event for event in guest.events if isinstance(event, Fault)] == []
    assert guest.engine.gpadl(1, 7).pages == tuple(range(100, 200))
    assert guest.engine.gpadl(2, 8).pages == tuple(range(300, 400))


def test_messages_of_240_bytes_with_junk_behind_the_list_are_understood(guest) -> None:
    """Checklist row 31."""
    for message in pages_message(1, 7, list(range(100, 127))):
        payload = m.build_message(message, version=guest.version)
        found = guest.post_bytes(payload.ljust(240, b"\xff"))
    created(found, 0)
    assert guest.engine.gpadl(1, 7).pages == tuple(range(100, 127))
    assert guest.post(m.GpadlBody(message_number=1, gpadl=7, data=b"")) == []


@pytest.mark.parametrize(
    ("data", "changes", "field"),
    [
        (build_range(PAGE, 0, [1]), {"range_count": 0}, "range_count"),
        (build_range(PAGE, 0, [1]), {"range_count": 2}, "range_buflen"),
        (build_range(PAGE, 0, [1]), {"range_count": 65535}, "range_buflen"),
        (build_range(PAGE, 0, [1]), {"range_buflen": 0}, "range_buflen"),
        (build_range(PAGE, 0, [1]), {"range_buflen": 15}, "range_buflen"),
        (build_range(PAGE, 0, [1, 2]), {}, "range_buflen"),
        (build_range(2 * PAGE, 0, [1]), {}, "byte_count"),
        (build_range(0, 0, []) + bytes(8), {}, "byte_count"),
        (build_range(0xFFFFFFFF, 0, [1]), {}, "byte_count"),
        (build_range(PAGE, PAGE, [1, 2]), {}, "byte_offset"),
        (build_range(PAGE, 0, [1 << 52]), {}, "gpa"),
        (build_range(PAGE, 0, [(1 << 64) - 1]), {}, "gpa"),
        (build_range(PAGE, 0, [5000]), {}, "gpa"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_and_forgotten(guest, data, changes, field) -> None:
    """Fuzzing catalogue G05."""
    values = {"range_buflen": len(data), "range_count": 1, **changes}
    found = guest.post(m.GpadlHeader(relid=1, gpadl=7, data=data, **values))
    assert created(found) == dataclasses.replace(created(found), relid=1, gpadl=7)
    assert fault_field(found) == field
    assert guest.engine.gpadl_table.count == 0
    guest.create(1, 7)


def test_a_body_that_completes_nonsense_fails_its_list_only(guest) -> None:
    """Fuzzing catalogue G06."""
    header, body = pages_message(1, 7, list(range(100, 130)))
    guest.create(1, 6)
    guest.post(header)
    found = guest.post(dataclasses.replace(body, data=b"\xff" * len(body.data)))
    assert created(found).gpadl == 7
    assert fault_field(found) == "gpa"
    assert guest.engine.gpadl(1, 6) is not None


def test_a_body_without_a_header_is_a_fault(guest) -> None:
    """Fuzzing catalogue G06."""
    body = m.GpadlBody(message_number=1, gpadl=7, data=bytes(8))
    assert fault_field(guest.post(body)) == "gpadl"


@pytest.mark.parametrize("torn_down", [False, True])
def test_more_bodies_than_a_list_needs_change_nothing(guest, torn_down) -> None:
    """OpenBSD and NetBSD send n / 28 + n % 28 of them, for 42 pages 16 instead of 1."""
    pages = list(range(100, 142))
    header, body = pages_message(1, 7, pages)
    guest.post(header)
    created(guest.post(body), 0)
    if torn_down:
        assert guest.post(m.GpadlTeardown(relid=1, gpadl=7)) == [GpadlTeardown(key=1, handle=7)]
    for data in (bytes(8), bytes(28 * 8), b"\xff" * 28 * 8, b""):
        assert guest.post(m.GpadlBody(message_number=0, gpadl=7, data=data)) == []
    if not torn_down:
        assert guest.engine.gpadl(1, 7).pages == tuple(pages)


@pytest.mark.parametrize("relid", [1, 2])
def test_a_second_header_for_an_unfinished_handle_is_refused(guest, relid) -> None:
    """Fuzzing catalogue G06: bodies could not be told apart."""
    header, body = pages_message(1, 7, list(range(100, 130)))
    guest.post(header)
    found = guest.post(dataclasses.replace(header, relid=relid))
    assert created(found).relid == relid
    created(guest.post(body), 0)


def test_a_handle_belongs_to_its_channel(guest) -> None:
    guest.create(1, 7)
    guest.create(2, 7)
    created(guest.post(*pages_message(1, 7, [5])))
    assert guest.post(m.GpadlTeardown(relid=2, gpadl=7)) == [GpadlTeardown(key=2, handle=7)]
    assert guest.engine.gpadl(1, 7) is not None
    assert guest.engine.gpadl(2, 7) is None


def test_letting_go_of_a_handle_leaves_the_same_one_unfinished_elsewhere(guest) -> None:
    guest.create(1, 7)
    teardown = guest.post(m.GpadlTeardown(relid=1, gpadl=7))
    header, body = pages_message(2, 7, list(range(100, 130)))
    guest.post(header)
    assert guest.answer(teardown) == [m.GpadlTorndown(gpadl=7)]
    created(guest.post(body), 0)


@pytest.mark.parametrize("relid", [0, 3, 0xFFFFFFFF])
def test_a_list_for_an_unknown_channel_is_refused(guest, relid) -> None:
    found = guest.post(*pages_message(relid, 7, [5]))
    assert created(found).relid == relid
    assert fault_field(found) == "relid"


def test_torn_down_is_said_once_and_after_the_last_use(guest) -> None:
    """Checklist rows 4, 5 and 32."""
    guest.create(1, 7)
    assert guest.post(m.GpadlTeardown(relid=1, gpadl=7)) == [GpadlTeardown(key=1, handle=7)]
    assert fault_field(guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == "gpadl"
    created(guest.post(*pages_message(1, 7, [5])))
    guest.engine.gpadl_released(1, 7)
    assert guest.take() == [m.GpadlTorndown(gpadl=7)]
    assert len(only(SendMessage, guest.events)[-1].payload) == 12
    with pytest.raises(LocalProtocolError):
        guest.engine.gpadl_released(1, 7)
    guest.create(1, 7)


def test_an_unfinished_list_can_be_torn_down(guest) -> None:
    header, body = pages_message(1, 7, list(range(100, 130)))
    guest.post(header)
    failed, torn_down = guest.post(m.GpadlTeardown(relid=1, gpadl=7))
    created([failed])
    assert torn_down == m.GpadlTorndown(gpadl=7)
    assert fault_field(guest.post(body)) == "gpadl"


@pytest.mark.parametrize("relid", [1, 77])
def test_tearing_down_what_is_unknown_is_answered(guest, relid) -> None:
    """Checklist row 32: Linux waits for the answer without a time limit."""
    found = guest.post(m.GpadlTeardown(relid=relid, gpadl=7))
    assert only(m.GpadlTorndown, found) == [m.GpadlTorndown(gpadl=7)]
    assert fault_field(found) == "gpadl"


def test_tearing_down_through_the_wrong_channel_is_answered_and_costs_the_other_nothing(
    guest,
) -> None:
    guest.create(1, 7)
    found = guest.post(m.GpadlTeardown(relid=2, gpadl=7))
    assert only(m.GpadlTorndown, found) == [m.GpadlTorndown(gpadl=7)]
    assert fault_field(found) == "gpadl"
    assert guest.engine.gpadl(1, 7) is not None
    assert guest.answer(guest.post(m.GpadlTeardown(relid=1, gpadl=7))) == [m.GpadlTorndown(gpadl=7)]


def test_a_teardown_that_crosses_the_hosts_own_is_answered_when_the_device_has_let_go(
    guest,
) -> None:
    """The guest releases the relid first and wants its pages back then, or the other way round."""
    guest.create(1, 7)
    guest.engine.revoke(1)
    asked = guest.take()
    asked += guest.post(m.RelidReleased(relid=1))
    assert only(m.GpadlTorndown, asked) == []
    late = guest.post(m.GpadlTeardown(relid=1, gpadl=7))
    assert only(m.GpadlTorndown, guest.answer(asked + late)) == [m.GpadlTorndown(gpadl=7)]


def test_buffers_can_be_torn_down_before_and_after_close(guest) -> None:
    """Checklist row 32: Linux does it before on less than 4.0 and after on 4.0 and later."""
    for handle in (0xE1E10, 2, 3):
        guest.create(1, handle)
    guest.opened()
    before = guest.post(m.GpadlTeardown(relid=1, gpadl=2))
    assert guest.answer(before) == [m.GpadlTorndown(gpadl=2)]
    close = guest.post(m.CloseChannel(relid=1))
    after = guest.post(m.GpadlTeardown(relid=1, gpadl=3), m.GpadlTeardown(relid=1, gpadl=0xE1E10))
    assert guest.answer(close + after) == [
        m.GpadlTorndown(gpadl=3),
        m.GpadlTorndown(gpadl=0xE1E10),
    ]


def test_a_ring_torn_down_while_open_is_let_go_when_closed(guest) -> None:
    """Fuzzing catalogue G10."""
    guest.create()
    event = guest.opened()
    assert only(GpadlTeardown, guest.post(m.GpadlTeardown(relid=1, gpadl=0xE1E10)))
    assert guest.post(m.CloseChannel(relid=1)) != []
    guest.engine.close_done(event.key)
    guest.engine.gpadl_released(event.key, 0xE1E10)
    assert guest.take() == [m.GpadlTorndown(gpadl=0xE1E10)]


def test_rescinding_fails_what_is_unfinished_first(guest) -> None:
    header, body = pages_message(1, 7, list(range(100, 130)))
    guest.post(header)
    guest.engine.revoke(1)
    failed, rescind = guest.take()
    created([failed])
    assert rescind == m.RescindChannelOffer(relid=1)
    assert fault_field(guest.post(body)) == "gpadl"
    guest.create(1, 7)


def test_releasing_a_relid_fails_what_is_unfinished(guest) -> None:
    header, body = pages_message(1, 7, list(range(100, 130)))
    guest.engine.revoke(1)
    guest.post(header)
    created(guest.post(m.RelidReleased(relid=1)))
    assert guest.engine.gpadl_table.count == 0
    assert fault_field(guest.post(body)) == "gpadl"


# --- Budgets ----------------------------------------------------------------------------------


def limited(**budgets: int) -> Guest:
    guest = Guest(EngineConfig(budgets=Budgets(**budgets)))
    guest.engine.offer(make_offer(1))
    guest.connect()
    return guest


def test_a_guest_cannot_start_any_number_of_lists() -> None:
    """Fuzzing catalogue G07."""
    guest = limited(max_unfinished_gpadls=5)
    for handle in range(1000):
        found = guest.post(pages_message(1, handle, list(range(100, 130)))[0])
        assert (found == []) == (handle < 5)
        assert handle < 5 or created(found).gpadl == handle
    assert guest.engine.gpadl_table.unfinished_count == 5
    guest.answer(guest.post(m.Unload()))
    assert guest.engine.gpadl_table.unfinished_count == 0


def test_the_number_of_lists_is_limited() -> None:
    guest = limited(max_gpadls=2)
    guest.create(1, 1)
    guest.create(1, 2)
    created(guest.post(*pages_message(1, 3, [5])))
    guest.answer(guest.post(m.GpadlTeardown(relid=1, gpadl=1)))
    guest.create(1, 3)


def test_pages_are_counted_when_announced_and_given_back() -> None:
    guest = limited(max_gpadl_pages=40)
    guest.post(pages_message(1, 1, list(range(100, 130)))[0])
    created(guest.post(*pages_message(1, 2, list(range(100, 111)))))
    guest.create(1, 3, 10)
    guest.post(m.GpadlTeardown(relid=1, gpadl=1))
    guest.create(1, 4, 26)
    assert describe(guest.engine)["gpadl_pages"] == 36


def test_nothing_is_held_for_an_announcement() -> None:
    guest = limited()
    guest.post(m.GpadlHeader(relid=1, gpadl=1, range_buflen=65528, range_count=1, data=b""))
    state = next(iter(guest.engine.channel_table)).gpadls[1]
    assert isinstance(state, Unfinished)
    assert len(state.assembly._data) == 0


def test_every_known_guest_fits_into_the_default_budgets() -> None:
    guest = Guest()
    for number in range(1, 5):
        guest.engine.offer(make_offer(number))
    guest.connect()
    for relid in range(1, 5):
        # 31 MiB and 16 MiB of buffers, and a 2 + 2 MiB ring, over the memory there is.
        for handle, pages in ((1, 7936), (2, 4096), (3, 1026)):
            pfns = [page % 4000 for page in range(pages)]
            created(guest.post(*pages_message(relid, handle, pfns)), 0)


def test_whoever_posts_hears_when_many_pages_were_checked(guest) -> None:
    table = guest.engine.gpadl_table
    pages = list(range(4096)) * 2
    for handle in range(2):
        assert not table.has_done_a_lot()
        guest.post(*pages_message(1, handle, pages[:8190]))
    assert not table.has_done_a_lot()
    guest.post(*pages_message(1, 7, pages[:100]))
    assert table.has_done_a_lot()
    assert not table.has_done_a_lot()


def test_a_guest_that_leaves_is_gone_when_the_last_of_its_lists_is(guest) -> None:
    looks = 0
    for handle in range(40):
        guest.post(*pages_message(1 + handle % 2, handle, [20, 30]))
    events = guest.post(m.Unload())
    original = type(guest.engine.channel_table).__iter__

    def counted(table):
        nonlocal looks
        looks += 1
        return original(table)

    type(guest.engine.channel_table).__iter__ = counted
    try:
        torn_down = only(GpadlTeardown, events)
        assert len(torn_down) == 40
        for event in torn_down:
            assert only(m.UnloadResponse, guest.take()) == []
            Engine.gpadl_released(guest.engine, event.key, event.handle)
        assert len(only(m.UnloadResponse, guest.take())) == 1
    finally:
        type(guest.engine.channel_table).__iter__ = original
    assert looks < 10, "not all channels for each list"

"""Every message of a guest in every state: a defined effect or a fault, never an exception."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from uuid import UUID

import pytest

from tests.support.engine import Guest, make_offer, only, pages_message
from vmbus.engine import ChannelClose, EngineConfig, Fault, SendMessage, describe, describe_channels
from vmbus.engine.states import ACCEPTED, CONNECTION, GPADL, LIFE, PRESENCE
from vmbus.errors import LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Feature, Version

GUEST_MESSAGES = {
    spec.message for spec in m.MESSAGES if spec.direction is m.Direction.GUEST_TO_HOST
}


def build(version: Version) -> Guest:
    guest = Guest(EngineConfig(vp_count=2, hv_sock=True))
    guest.engine.offer(make_offer(1, max_subchannels=1, monitor_latency=1))
    guest.engine.offer(make_offer(2))
    guest.connect(version)
    guest.create()
    return guest


def disconnected() -> Guest:
    return Guest()


def contacted() -> Guest:
    guest = Guest()
    guest.contact(Version.V6_0)
    return guest


def closed() -> Guest:
    return build(Version.V6_0)


def unfinished() -> Guest:
    guest = closed()
    guest.post(pages_message(1, 7, list(range(100, 140)))[0])
    return guest


def tearing_down() -> Guest:
    guest = closed()
    guest.post(m.GpadlTeardown(relid=1, gpadl=0xE1E10))
    return guest


def opening() -> Guest:
    guest = closed()
    guest.post(guest.open_message())
    return guest


def opened() -> Guest:
    guest = closed()
    guest.opened()
    guest.engine.offer_subchannels(1, 1)
    guest.take()
    return guest


def modifying() -> Guest:
    guest = opened()
    guest.post(m.ModifyChannel(relid=1, target_vp=1))
    return guest


def modifying_before_5_3() -> Guest:
    guest = build(Version.V5_2)
    guest.opened()
    guest.post(m.ModifyChannel(relid=1, target_vp=1))
    return guest


def closing() -> Guest:
    guest = opened()
    guest.post(m.CloseChannel(relid=1))
    return guest


def reopening() -> Guest:
    guest = closing()
    guest.post(guest.open_message())
    return guest


def abandoned() -> Guest:
    guest = opening()
    guest.engine.revoke(1)
    guest.take()
    return guest


def rescinded() -> Guest:
    guest = closed()
    guest.engine.revoke(1)
    guest.take()
    return guest


def released() -> Guest:
    guest = rescinded()
    guest.post(m.RelidReleased(relid=1))
    return guest


def reserved() -> Guest:
    guest = closed()
    guest.answer(
        guest.post(
            m.OpenReservedChannel(
                relid=1,
                target_vp=0,
                target_sint=3,
                ring_gpadl=0xE1E10,
                downstream_page_offset=4,
            )
        )
    )
    return guest


def kept() -> Guest:
    guest = reserved()
    guest.post(m.Unload())
    return guest


def kept_and_connected() -> Guest:
    guest = kept()
    guest.connect(Version.V6_0)
    return guest


def paused() -> Guest:
    guest = opened()
    guest.post(m.Pause())
    return guest


def disconnecting() -> Guest:
    guest = opened()
    guest.post(m.Unload())
    return guest


def reconnecting() -> Guest:
    guest = opened()
    guest.contact(Version.V5_3)
    return guest


def resetting() -> Guest:
    guest = opened()
    guest.engine.reset()
    guest.take()
    return guest


STATES: list[Callable[[], Guest]] = [
    disconnected,
    contacted,
    closed,
    unfinished,
    tearing_down,
    opening,
    opened,
    modifying,
    modifying_before_5_3,
    closing,
    reopening,
    abandoned,
    rescinded,
    released,
    reserved,
    kept,
    kept_and_connected,
    paused,
    disconnecting,
    reconnecting,
    resetting,
]


def samples(relid: int, gpadl: int) -> list[m.Message]:
    header, body = pages_message(relid, gpadl, list(range(100, 140)))
    names = UUID(int=5)
    ring: Any = {"ring_gpadl": gpadl, "downstream_page_offset": 4}
    slot: Any = {"target_vp": 0, "target_sint": 3}
    return [
        m.InitiateContact(
            version=Version.V5_3, target_vp=0, target_info=2, monitor_page_1=0, monitor_page_2=0
        ),
        m.RequestOffers(),
        header,
        body,
        m.GpadlTeardown(relid=relid, gpadl=gpadl),
        m.OpenChannel(
            relid=relid,
            open_id=1,
            target_vp=0,
            connection_id=0,
            event_flag=0,
            open_flags=0,
            **ring,
        ),
        m.CloseChannel(relid=relid),
        m.ModifyChannel(relid=relid, target_vp=0),
        m.RelidReleased(relid=relid),
        m.OpenReservedChannel(relid=relid, **slot, **ring),
        m.CloseReservedChannel(relid=relid, **slot),
        m.TlConnectRequest(endpoint_id=names, service_id=names),
        m.ModifyConnection(monitor_page_1=0, monitor_page_2=0),
        m.Pause(),
        m.Resume(),
        m.Unload(),
    ]


def test_the_samples_are_all_messages_that_a_guest_has() -> None:
    assert {type(message) for message in samples(1, 1)} == GUEST_MESSAGES == set(ACCEPTED)


@cache
def sample(relid: int, gpadl: int, index: int) -> m.Message:
    return samples(relid, gpadl)[index]


def raw(message: m.Message, guest: Guest) -> bytes:
    version = guest.version or Version.V6_0
    for features in (guest.features, sum(Feature)):
        for chosen in (version, Version.V6_0):
            try:
                return m.build_message(message, version=chosen, features=Feature(features))
            except LocalProtocolError:
                continue
    raise AssertionError(message)


class Image:
    """A guest and its engine as they stand, to be had again and again; they share the memory.

    To go the whole way to a state for each message takes ten times as long.
    """

    def __init__(self, guest: Guest) -> None:
        self.memory = guest.memory
        image = io.BytesIO()
        pickler = pickle.Pickler(image)
        pickler.persistent_id = lambda each: "memory" if each is self.memory else None  # type: ignore[method-assign]
        pickler.dump(guest)
        self.image = image.getvalue()

    def again(self) -> Guest:
        unpickler = pickle.Unpickler(io.BytesIO(self.image))
        unpickler.persistent_load = lambda _: self.memory  # type: ignore[method-assign]
        guest: Guest = unpickler.load()
        return guest


def numbers(*, pairs: bool) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Relid, handle and the messages to send: all pairs for what exists, one each for the rest."""
    for relid, gpadl in itertools.product((1, 3, 77), (0xE1E10, 7)):
        both = pairs and (relid, gpadl) == (1, 0xE1E10)
        for indices in itertools.product(range(16), repeat=2 if both else 1):
            yield relid, gpadl, indices


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
@pytest.mark.parametrize("size", ["exact", "padded", "truncated"])
def test_any_two_messages_in_any_state_do_no_harm(state, size) -> None:
    """Fuzzing catalogue G01, G03, G09, G11 and G34; the engine checks itself after each call."""
    image = Image(state())
    for relid, gpadl, indices in numbers(pairs=size == "exact"):
        guest = image.again()
        for index in indices:
            payload = raw(sample(relid, gpadl, index), guest)
            if size == "padded":
                payload = payload.ljust(240, b"\xa5")
            elif size == "truncated":
                payload = payload[:-1]
            found = guest.post_bytes(payload)
            if size == "truncated" and index not in (2, 3):
                assert [type(event) for event in found] == [Fault]
            json.dumps([describe(guest.engine), describe_channels(guest.engine)])
        assert_the_guest_can_start_again(guest)


def assert_the_guest_can_start_again(guest: Guest) -> None:
    """Whatever has happened: after a reset, with all questions answered, nothing is left."""
    guest.engine.take()
    guest.engine.reset()
    pending = describe_channels(guest.engine)
    events = guest.take()
    for channel in pending:
        key = channel["key"]
        life = {each["key"]: each["life"] for each in describe_channels(guest.engine)}.get(key)
        if life == "Abandoned":
            guest.engine.open_done(key, ok=True)
        elif life == "Closing":
            guest.engine.close_done(key)
            events = [each for each in events if each != ChannelClose(key=key)]
    for channel in describe_channels(guest.engine):
        for gpadl in channel["gpadls"]:
            assert gpadl["state"] == "TearingDown"
            guest.engine.gpadl_released(channel["key"], gpadl["handle"])
    found = guest.answer([event for event in guest.take() if isinstance(event, ChannelClose)])
    assert only(SendMessage, found) == []
    info = describe(guest.engine)
    assert (info["state"], info["gpadls"], info["gpadl_pages"]) == ("Disconnected", 0, 0)
    assert {each["presence"] for each in describe_channels(guest.engine)} <= {"Hidden"}


# --- The tables themselves --------------------------------------------------------------------


@pytest.mark.parametrize("table", [CONNECTION, PRESENCE, LIFE, GPADL])
def test_every_state_of_a_table_can_be_reached_and_every_target_has_a_row(table) -> None:
    targets = {target for row in table.values() for target in row.values()}
    first = next(iter(table))
    assert targets <= set(table)
    assert set(table) - targets <= {first}


@pytest.mark.parametrize("table", [CONNECTION, PRESENCE, LIFE, GPADL])
def test_every_trigger_of_a_table_is_used(table) -> None:
    used = {trigger for row in table.values() for trigger in row}
    kind: Any = type(next(iter(used)))
    assert used == set(kind)

"""A guest, a host program and devices that do anything, in any order, against one engine.

The model knows nothing but the books that matter: which requests are open, and which questions.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from uuid import UUID

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.engine import Guest, make_offer, pages_message
from vmbus.engine import (
    Budgets,
    ChannelClose,
    ChannelGone,
    ChannelModify,
    ChannelOpen,
    DiscardMessages,
    EngineConfig,
    GpadlTeardown,
    ResetDone,
    TlConnect,
    describe,
    describe_channels,
)
from vmbus.errors import BudgetError, ConfigError, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Version

CONFIG = EngineConfig(
    vp_count=2,
    hv_sock=True,
    budgets=Budgets(
        max_channels=8, max_gpadls=6, max_unfinished_gpadls=2, max_pending_tl_connects=2
    ),
)
relids = st.integers(0, 5)
handles = st.integers(1, 3)
coins = st.booleans()
slots = st.tuples(st.integers(0, 1), st.integers(2, 3))


class Bus(RuleBasedStateMachine):
    """Requests that have to be answered once are counted when posted and when answered."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = Guest(CONFIG)
        self.engine = self.guest.engine
        self.questions: list[Any] = []
        self.owed: Counter[tuple[Any, ...]] = Counter()
        self.gone: set[int] = set()
        self.keys: set[int] = set()
        self.resets = 0
        self.opens = 0

    # --- Books -------------------------------------------------------------------------------

    def digest(self, events: list[Any]) -> None:
        for event in events:
            match event:
                case ChannelOpen() | ChannelClose() | ChannelModify() | GpadlTeardown():
                    assert event.key not in self.gone
                    self.check_question(event)
                    self.questions.append(event)
                case TlConnect():
                    self.questions.append(event)
                case ChannelGone():
                    assert event.key not in self.gone
                    assert not any(getattr(each, "key", 0) == event.key for each in self.questions)
                    self.gone.add(event.key)
                case DiscardMessages():
                    # Replies to reserved channels and the farewell outlive the connection.
                    for owed in list(self.owed):
                        reserved = owed[0] == "open" and owed[2] == 0
                        if owed[0] not in ("unload", "contact", "close reserved") and not reserved:
                            del self.owed[owed]
                case ResetDone():
                    assert self.resets
                    self.resets = 0
                case m.GpadlCreated():
                    self.settle(("gpadl", event.relid, event.gpadl))
                case m.GpadlTorndown():
                    self.settle(("teardown", event.gpadl))
                case m.OpenChannelResult():
                    self.settle(("open", event.relid, event.open_id))
                case m.VersionResponse():
                    self.settle(("contact",))
                case m.UnloadResponse():
                    self.settle(("unload",))
                case m.ModifyChannelResponse():
                    self.settle(("modify", event.relid))
                case m.CloseReservedResponse():
                    self.settle(("close reserved", event.relid))
                case m.AllOffersDelivered():
                    self.settle(("offers",))
                case _:
                    pass

    def check_question(self, event: object) -> None:
        """A device is never asked to open and to close at once, nor anything twice."""
        assert event not in self.questions
        if isinstance(event, ChannelOpen | ChannelClose):
            asked = [
                each
                for each in self.questions
                if isinstance(each, ChannelOpen | ChannelClose) and each.key == event.key
            ]
            assert asked == []

    def settle(self, owed: tuple[object, ...]) -> None:
        assert self.owed[owed] > 0, f"{owed} was not asked for"
        self.owed[owed] -= 1
        self.owed += Counter()

    def post(self, message: m.Message, owed: tuple[object, ...] | None = None) -> None:
        state = describe(self.engine)["state"]
        if owed is not None and (state == "Connected" or owed[0] in ("contact", "close reserved")):
            self.owed[owed] += 1
        self.digest(self.guest.post(message))

    @initialize(version=st.sampled_from([None, *Version]), open_one=coins)
    def begin(self, version: Version | None, open_one: bool) -> None:
        """Most interesting things need a guest that has come some way."""
        if version is not None:
            for number in (1, 2):
                self.offer(number, latency=1)
            self.contact(version)
            self.request_offers()
            for relid, gpadl in ((1, 1), (2, 1), (1, 2)):
                self.create(relid, gpadl, pages=8, cut=False)
            if open_one:
                self.open(1, 1, vp=0)
                self.answer_one(0, ok=True)

    # --- Guest -------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(["stay"] * 9 + ["contact", "unload", "reset"]),
        version=st.sampled_from([Version.V0_13, Version.V4_1, Version.V5_3, Version.V6_0, 99]),
    )
    def part(self, kind: str, version: int) -> None:
        """One rule for all, and seldom: a guest that always leaves gets nowhere."""
        if kind == "contact":
            self.contact(version)
        elif kind == "unload":
            self.unload()
        elif kind == "reset":
            self.reset()
        elif describe(self.engine)["state"] == "Disconnected":
            self.contact(version)
            self.request_offers()

    def contact(self, version: int) -> None:
        # A contact replaces one that is waiting, and voids the answer to UNLOAD.
        self.owed.pop(("contact",), None)
        self.owed.pop(("unload",), None)
        self.owed[("contact",)] += 1
        self.digest(self.guest.contact(version))

    @rule()
    def request_offers(self) -> None:
        requested = describe(self.engine).get("offers_requested")
        self.post(m.RequestOffers(), None if requested else ("offers",))

    def unload(self) -> None:
        info = describe(self.engine)
        if info["state"] in ("Connected", "Paused") and info["version"] != "0.13":
            self.owed[("unload",)] += 1
        self.digest(self.guest.post(m.Unload()))

    @rule(relid=relids, gpadl=handles, pages=st.sampled_from([4, 8, 30]), cut=coins)
    def create(self, relid: int, gpadl: int, pages: int, cut: bool) -> None:
        messages = pages_message(relid, gpadl, list(range(100, 100 + pages)))
        self.post(messages[0], ("gpadl", relid, gpadl))
        if not cut:
            for body in messages[1:]:
                self.digest(self.guest.post(body))

    @rule(gpadl=handles)
    def body(self, gpadl: int) -> None:
        self.digest(self.guest.post(m.GpadlBody(message_number=0, gpadl=gpadl, data=bytes(48))))

    @rule(relid=relids, gpadl=handles)
    def tear_down(self, relid: int, gpadl: int) -> None:
        meant = [
            each
            for each in describe_channels(self.engine)
            if each["relid"] == relid and each["presence"] in ("Offered", "Rescinded", "Released")
        ]
        reserved = any(each["reserved"] and each["presence"] == "Offered" for each in meant)
        owed = any(
            each["answer_owed"]
            for channel in meant
            for each in channel["gpadls"]
            if each["handle"] == gpadl
        )
        message = m.GpadlTeardown(relid=relid, gpadl=gpadl)
        self.post(message, None if reserved or owed else ("teardown", gpadl))

    @rule(relid=relids, gpadl=handles, vp=st.sampled_from([0, 1, 2, m.TARGET_VP_NONE]))
    def open(self, relid: int, gpadl: int, vp: int) -> None:
        self.opens += 1
        message = self.guest.open_message(
            relid, open_id=self.opens, ring_gpadl=gpadl, target_vp=vp, downstream_page_offset=2
        )
        self.post(message, None if self.is_rescinded(relid) else ("open", relid, self.opens))

    def is_rescinded(self, relid: int) -> bool:
        return any(
            each["relid"] == relid and each["presence"] == "Rescinded"
            for each in describe_channels(self.engine)
        )

    @rule(relid=relids)
    def close(self, relid: int) -> None:
        self.post(m.CloseChannel(relid=relid))

    @rule(relid=relids, vp=st.sampled_from([0, 1, 2]))
    def modify(self, relid: int, vp: int) -> None:
        if self.guest.version is not None and self.guest.version >= Version.V4_1:
            owed = ("modify", relid) if self.guest.version >= Version.V5_3 else None
            self.post(m.ModifyChannel(relid=relid, target_vp=vp), owed)

    @rule(relid=relids)
    def release(self, relid: int) -> None:
        self.post(m.RelidReleased(relid=relid))

    @rule(relid=relids, gpadl=handles, slot=slots)
    def open_reserved(self, relid: int, gpadl: int, slot: tuple[int, int]) -> None:
        if self.guest.version is not None and self.guest.version >= Version.V4_0:
            self.post(
                m.OpenReservedChannel(
                    relid=relid,
                    target_vp=slot[0],
                    target_sint=slot[1],
                    ring_gpadl=gpadl,
                    downstream_page_offset=2,
                ),
                None if self.is_rescinded(relid) else ("open", relid, 0),
            )

    @rule(relid=relids, slot=slots)
    def close_reserved(self, relid: int, slot: tuple[int, int]) -> None:
        message = m.CloseReservedChannel(relid=relid, target_vp=slot[0], target_sint=slot[1])
        before = [each for each in describe_channels(self.engine) if each["relid"] == relid]
        pending = self.owed[("close reserved", relid)]
        paused = describe(self.engine)["state"] == "Paused"
        answered = not pending and not paused
        if before and answered:
            life = before[0]["life"]
            answered = bool(before[0]["reserved"]) or life in ("Closed", "Closing", "Abandoned")
        self.post(message, ("close reserved", relid) if answered else None)

    @rule(number=st.integers(1, 3))
    def connect_socket(self, number: int) -> None:
        if self.guest.version is not None and self.guest.version >= Version.V4_0:
            endpoint = UUID(int=number)
            self.post(m.TlConnectRequest(endpoint_id=endpoint, service_id=endpoint))

    @rule(resume=coins)
    def pause(self, resume: bool) -> None:
        if self.guest.version == Version.V6_0:
            self.digest(self.guest.post(m.Resume() if resume else m.Pause()))

    # --- Host program and devices ------------------------------------------------------------

    @rule(number=st.integers(1, 4), latency=st.sampled_from([None, 1]))
    def offer(self, number: int, latency: int | None) -> None:
        try:
            key = self.engine.offer(make_offer(number, max_subchannels=2, monitor_latency=latency))
        except (ConfigError, BudgetError):
            return
        assert key not in self.keys
        self.keys.add(key)
        self.digest(self.guest.take())

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        if self.keys:
            self.engine.revoke(data.draw(st.sampled_from(sorted(self.keys))))
            self.digest(self.guest.take())

    @rule(data=st.data(), count=st.integers(0, 2))
    def subchannels(self, data: st.DataObject, count: int) -> None:
        present = [each["key"] for each in describe_channels(self.engine)]
        if present:
            try:
                made = self.engine.offer_subchannels(data.draw(st.sampled_from(present)), count)
            except (LocalProtocolError, BudgetError):
                return
            self.keys.update(made)
            self.digest(self.guest.take())

    @rule(data=st.data(), ok=coins)
    def answer(self, data: st.DataObject, ok: bool) -> None:
        if self.questions:
            index = data.draw(st.integers(0, len(self.questions) - 1))
            self.answer_one(index, ok=ok)

    def answer_one(self, index: int, *, ok: bool) -> None:
        event = self.questions.pop(index)
        match event:
            case ChannelOpen():
                self.engine.open_done(event.key, ok=ok)
            case ChannelClose():
                # Says that a ChannelModify from before is done with, too.
                self.questions = [
                    each
                    for each in self.questions
                    if not (isinstance(each, ChannelModify) and each.key == event.key)
                ]
                self.engine.close_done(event.key)
            case ChannelModify():
                self.engine.modify_done(event.key, ok=ok)
            case GpadlTeardown():
                self.engine.gpadl_released(event.key, event.handle)
            case _:
                self.engine.tl_connect_done(event.request_id, ok=ok)
        self.digest(self.guest.take())

    def reset(self) -> None:
        self.resets += 1
        self.owed.clear()
        self.engine.reset()
        self.digest(self.guest.take())

    # --- What must hold ----------------------------------------------------------------------

    @invariant()
    def budgets_are_kept(self) -> None:
        info = describe(self.engine)
        assert info["channels"] <= 8
        assert info["gpadls"] <= 6
        assert info["unfinished_gpadls"] <= 2
        assert info["pending_tl_connects"] <= 2

    @invariant()
    def nothing_is_owed_when_nobody_is_asked(self) -> None:
        info = describe(self.engine)
        if not self.questions and info["state"] == "Connected" and not info["unfinished_gpadls"]:
            assert not self.owed

    def teardown_everything(self) -> None:
        while self.questions:
            self.answer_one(0, ok=True)

    def teardown(self) -> None:
        """Whatever has been done: after a reset and all answers nothing is left."""
        self.reset()
        self.teardown_everything()
        info = describe(self.engine)
        assert info["state"] == "Disconnected"
        assert (info["gpadls"], info["gpadl_pages"], info["pending_tl_connects"]) == (0, 0, 0)
        assert {each["presence"] for each in describe_channels(self.engine)} <= {"Hidden"}
        assert self.keys - self.gone == {each["key"] for each in describe_channels(self.engine)}
        assert self.resets == 0


TestBus = Bus.TestCase
TestBus.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)

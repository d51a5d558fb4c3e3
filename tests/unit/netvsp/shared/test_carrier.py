"""Each line has its turn, and what waits for one is bounded, whatever there is to tell."""

from __future__ import annotations

import socket

import trio
import trio.testing

from netvsp.shared.carrier import Carrier
from netvsp.shared.line import FrameLine, make_buffer
from netvsp.shared.messages import (
    HEADER,
    Kind,
    kind_untrusted,
    pack_frames,
    pack_info,
    stations_untrusted,
)
from netvsp.switch.switch import JOINT, Switch
from tests.support.switch import make_frame, station


async def test_stations_that_come_and_go_while_nobody_reads_are_not_remembered():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = FrameLine(ours, make_buffer())
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while line.send(bytes(1000)):
            continue
        switch = Switch(trio.current_time)
        carrier = Carrier(switch, line, "joint", JOINT, lambda *_: False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carrier.run)
            for number in range(1, 10_000):
                carrier.tell_station(station(number), True)
                if number > 3:
                    carrier.tell_station(station(number), False)
            await trio.testing.wait_all_tasks_blocked()
            assert len(carrier._changes) == 3
            theirs.setblocking(False)
            heard: list[bytes] = []
            while not heard:
                try:
                    data = theirs.recv(4096)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(theirs)
                    continue
                if any(data):
                    kind, count = kind_untrusted(data)
                    assert kind is Kind.ADD
                    heard = stations_untrusted(data, count)
            assert heard == [station(1), station(2), station(3)]
            carrier.tell_station(station(2), False)
            carrier.tell_station(station(3), False)
            carrier.tell_station(station(3), True)
            await trio.lowlevel.wait_readable(theirs)
            data = theirs.recv(4096)
            assert kind_untrusted(data) == (Kind.REMOVE, 1)
            assert stations_untrusted(data, 1) == [station(2)]
            nursery.cancel_scope.cancel()
    line.close()


async def test_a_message_is_not_sent_again_before_it_was_read():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line = FrameLine(ours, make_buffer())
    with theirs:
        carrier = Carrier(Switch(trio.current_time), line, "port", JOINT, lambda *_: False)
        for number in range(100):
            carrier.post(pack_info({"n": number}))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carrier.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        theirs.setblocking(False)
        assert theirs.recv(4096) == HEADER.pack(Kind.INFO, 0) + b'{"n": 0}'
        line.close()
        assert theirs.recv(4096) == b""


async def test_one_message_of_a_line_is_a_turn(monkeypatch):
    switch = Switch(trio.current_time)
    turns = []
    receive = switch.receive

    def watch(port, frames):
        turns.append(port.name)
        return receive(port, frames)

    monkeypatch.setattr(switch, "receive", watch)
    message = b"".join(pack_frames([make_frame(1, 2)])[0])
    buffer = make_buffer()
    ends = []
    async with trio.open_nursery() as nursery:
        for name in ("a", "b"):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends.append((FrameLine(ours, buffer), theirs))
            for _ in range(20):
                theirs.send(message)
            carrier = Carrier(switch, ends[-1][0], name, JOINT, lambda *_: False)
            nursery.start_soon(carrier.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [sorted(turns[at : at + 2]) for at in range(0, 40, 2)] == [["a", "b"]] * 20
    for line, theirs in ends:
        line.close()
        theirs.close()

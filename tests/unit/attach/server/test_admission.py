"""What guests are called: who says it, and that no two are called the same."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import uuid

import pytest
import trio
import trio.testing

from vmbus.attach.server.admission import LEAVING_GRACE, Names, Peer, Roll
from vmbus.errors import PeerProtocolError

ME = Peer(os.getpid(), os.getuid(), os.getgid())


def test_a_peer_is_whom_the_kernel_saw():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert Peer.of(ours) == ME
        assert Peer.of(ours).user == pwd.getpwuid(os.getuid()).pw_name
    assert Peer(1, 0x7FFFFFF0, 1).user == str(0x7FFFFFF0)


@pytest.mark.parametrize(
    ("identity", "given", "name"),
    [
        ("hello", None, "said"),
        ("user", None, ME.user),
        ("hello", "socket", "socket"),
        ("user", "socket", "socket"),
    ],
)
async def test_who_names_a_guest(identity, given, name):
    assert await Names(identity=identity, given=given).admit("said", ME) == name


async def test_a_name_is_had_by_one_guest_whatever_socket_it_comes_by():
    roll = Roll()
    first, second = Names(roll), Names(roll, given="vm")
    assert await first.admit("vm", ME) == "vm"
    with pytest.raises(PeerProtocolError, match="a guest called 'vm' is attached") as caught:
        await second.admit("other", ME)
    assert caught.value.errno == errno.EBUSY
    first.leave("vm")
    assert await second.admit("other", ME) == "vm"


async def test_a_guest_that_nobody_names_gets_a_free_name():
    names = Names()
    assert [await names.admit("", ME) for _ in range(3)] == ["guest", "guest-2", "guest-3"]
    names.leave("guest-2")
    assert await names.admit("", ME) == "guest-2"


async def test_a_guest_that_nobody_names_is_refused_where_names_say_whose_files_are_whose():
    names = Names(anonymous=False)
    with pytest.raises(PeerProtocolError, match="the guest has no name") as caught:
        await names.admit("", ME)
    assert caught.value.errno == errno.EINVAL
    assert await names.admit("guest", ME) == "guest"


async def test_a_guest_that_comes_back_waits_for_the_end_of_its_old_self():
    names = Names()
    await names.admit("vm", ME)
    names.leaving("vm")
    async with trio.open_nursery() as nursery:
        came = []

        async def come():
            came.append(await names.admit("vm", ME))

        nursery.start_soon(come)
        await trio.testing.wait_all_tasks_blocked()
        assert came == []
        names.leave("vm")
    assert came == ["vm"]


async def test_but_not_for_ever(autojump_clock):
    names = Names()
    await names.admit("vm", ME)
    names.leaving("vm")
    start = trio.current_time()
    with pytest.raises(PeerProtocolError, match="is attached"):
        await names.admit("vm", ME)
    assert trio.current_time() == start + LEAVING_GRACE


async def test_an_id_is_had_by_one_guest_and_goes_with_it():
    names, number = Names(), uuid.uuid4()
    for name in ("a", "b"):
        await names.admit(name, ME)
        names.claim(name, uuid.UUID(int=0))
    names.claim("a", number)
    names.claim("a", number)
    with pytest.raises(PeerProtocolError, match="this vm_id is attached"):
        names.claim("b", number)
    names.leave("a")
    names.claim("b", number)
    names.leaving("nobody")
    names.leave("nobody")

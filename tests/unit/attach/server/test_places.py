"""How the descriptors of the process are shared out."""

from __future__ import annotations

import resource

import pytest

from vmbus.attach.server import ServerLimits
from vmbus.attach.server.places import DescriptorShares


class Holder:
    def __init__(self) -> None:
        self.descriptors = 0


def take_all(shares: DescriptorShares, holder: Holder) -> int:
    while shares.room(holder) > 0:
        holder.descriptors += 1
    return holder.descriptors


async def test_a_greedy_vmm_leaves_everybody_else_a_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 + 4 * 8 + 1600, 9999))
    shares = DescriptorShares(ServerLimits(max_connections=8))
    holders = [Holder() for _ in range(8)]
    for each in holders:
        shares.add(each)
    assert take_all(shares, holders[0]) == 100 + 800
    assert [take_all(shares, each) for each in holders[1:]] == [100] * 7
    # With the first one's end there is more for all.
    shares.remove(holders[0])
    shares.remove(holders[0])
    assert take_all(shares, holders[1]) == 900


async def test_nobody_has_more_than_the_limit_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    shares = DescriptorShares(ServerLimits(max_descriptors=7))
    holder = Holder()
    shares.add(holder)
    assert take_all(shares, holder) == 7

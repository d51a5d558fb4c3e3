"""The guest's own account of the bus, its kernel's trace, agrees with the server's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.guest.conftest import Lab, Server
from tests.guest.rig.account import (
    ARRIVAL,
    GUEST_EVENTS,
    HOST_EVENTS,
    Said,
    guest_account,
    server_account,
)
from tests.guest.rig.guest import Guest, until
from vmbus.wire import messages as m

CPUS = 2
TRACING = "/sys/kernel/tracing"
EVENTS = (*GUEST_EVENTS, *HOST_EVENTS, ARRIVAL)
NEW_EVENT = "vmbus_onmodifychannel_response"
"""Not there before Linux 5.12, which has no use for it either: it speaks VMBus 5.2 at most."""
NUMBERS = {
    spec.message.TYPE: spec.message.NAME
    for spec in m.MESSAGES
    if spec.direction is m.Direction.HOST_TO_GUEST
}


class Accounts:
    """Both accounts of the same stretch of time, in which nothing else happens on the bus."""

    def __init__(self, server: Server, guest: Guest) -> None:
        self._server = server
        self._guest = guest
        self._start = 0

    def begin(self) -> None:
        """Begin; the bus is idle."""
        each = " ".join(EVENTS)
        self._guest.run(
            f"cd {TRACING} && for event in {each}; do"
            f" [ $event = {NEW_EVENT} ] && [ ! -e events/hyperv/$event ] && continue;"
            " echo 1 >events/hyperv/$event/enable || exit 1; done; echo >trace; echo 1 >tracing_on"
        )
        self._start = len(self._server.command.log())

    def end(self) -> tuple[list[Said], list[Said]]:
        """Return the guest's and the server's, once the guest has let go of all it has lost.

        It does so on its own time; and writes a message down a moment after it has posted it.
        """

        def count(name: str) -> int:
            return sum(each.name == name for each in self._servers())

        # What is offered in between are sub-channels, which go with the driver.
        until(
            lambda: count("OFFERCHANNEL") == count("RELID_RELEASED"),
            what="the release of the sub-channels",
        )
        text = self._guest.run(
            f"cd {TRACING} && until [ $(grep -c ': vmbus_release_relid:' trace)"
            f" = {count('RELID_RELEASED')} ]; do usleep 50000; done;"
            " echo 0 >tracing_on && cat trace"
        )
        assert "LOST" not in text
        return guest_account(text), self._servers()

    def _servers(self) -> list[Said]:
        return server_account(self._server.command.log()[self._start :], "guest")


def by_relid(said: Iterable[Said], who: str) -> dict[int, list[Said]]:
    """Return what one side said of each channel, in order.

    The guest writes a message down when it has posted it, so what it does for two channels at
    once, or what comes in meanwhile, may stand in another order in its trace than it happened.
    """
    owners: dict[object, int] = {}
    found: dict[int, list[Said]] = {}
    for each in said:
        if each.name == "GPADL_HEADER":
            owners[each.fields["gpadl"]] = int(each.fields["relid"])
    for each in said:
        if each.who != who or each.name == ARRIVAL:
            continue
        # Two messages have no relid.
        relid = each.fields.get("relid")
        if relid is None:
            relid = owners[each.fields["gpadl"]]
        found.setdefault(int(relid), []).append(each)
    return found


def check_agreement(guests: Sequence[Said], servers: Sequence[Said]) -> None:
    """Compare message by message, in all the fields that the guest's trace has."""
    for who in ("guest", "host"):
        ours, theirs = by_relid(servers, who), by_relid(guests, who)
        assert ours.keys() == theirs.keys()
        for relid, messages in theirs.items():
            names = [each.name for each in messages]
            assert [each.name for each in ours[relid]] == names, f"{who}, channel {relid}"
            for known, traced in zip(ours[relid], messages, strict=True):
                # What the hypercall returned is no part of the message.
                wanted = {key: value for key, value in traced.fields.items() if key != "ret"}
                seen = {key: known.fields.get(key) for key in wanted}
                assert seen == wanted, f"{traced}; and for the server, {known}"
                assert traced.fields.get("ret", 0) == 0, traced
    # Arrivals are written down by the one interrupt that takes them, so these are in order.
    arrived = [NUMBERS[int(each.fields["number"])] for each in guests if each.name == ARRIVAL]
    assert arrived == [each.name for each in servers if each.who == "host"]


def test_both_sides_tell_the_same_story(lab: Lab):
    server = lab.serve("ram:[lun=0]16M")
    # The events are hv_vmbus's own, so they are there as soon as it is; storage comes later.
    guest = lab.boot(
        server,
        f"--cpus={CPUS}",
        modules=("hv_vmbus", "sd_mod"),
        append="hv_storvsc.storvsc_vcpus_per_sub_channel=1",
    )
    guest.run("for try in $(seq 1200); do ls /sys/bus/vmbus/devices/*/id && exit 0;"
              " usleep 50000; done; exit 1")  # fmt: skip
    until(lambda: server.account()[-1].name == "ALLOFFERS_DELIVERED", what="the last offer")
    accounts = Accounts(server, guest)
    channels = "/sys/bus/vmbus/devices/*/channels"

    accounts.begin()
    guest.run("modprobe hv_storvsc")
    guest.disk(0)
    until(lambda: len(server.guests()[0]["channels"]) == CPUS, what="the sub-channel")
    guest.run(
        f"for channel in $(ls {channels}); do for cpu in 1 0; do"
        f" echo $cpu >$(ls -d {channels}/$channel)/cpu || exit 1; done; done"
    )
    guest.run("cd /sys/bus/vmbus/drivers/hv_storvsc && device=$(basename *-*-*-*-*) &&"
              " echo $device >unbind && echo $device >bind")  # fmt: skip
    guest.disk(0)
    until(lambda: len(server.guests()[0]["channels"]) == CPUS, what="the sub-channel")
    guest.run("rmmod hv_storvsc")
    guests, servers = accounts.end()

    check_agreement(guests, servers)
    # All of it was there to be compared.
    assert {each.name for each in servers} >= {
        *("GPADL_HEADER", "GPADL_BODY", "GPADL_CREATED", "OPENCHANNEL", "OPENCHANNEL_RESULT"),
        *("OFFERCHANNEL", "MODIFYCHANNEL", "CLOSECHANNEL", "GPADL_TEARDOWN", "GPADL_TORNDOWN"),
        *("RESCIND_CHANNELOFFER", "RELID_RELEASED"),
    }
    guest.check_log()
    guest.power_off()

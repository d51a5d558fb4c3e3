"""Reading the two accounts of the control plane that tests with real guests compare."""

from __future__ import annotations

from tests.guest.rig.account import ARRIVAL, Said, guest_account, server_account
from vmbus.host.account import describe_untrusted
from vmbus.wire import messages as m
from vmbus.wire.versions import Version

HEAD = "     kworker/1:2-44    [001] .....    12.345678: "
INTERRUPT = "          <idle>-0     [000] ..s1.   100.000001: "
OPEN = m.OpenChannel(relid=1, open_id=7, ring_gpadl=0xE1E10, target_vp=3, downstream_page_offset=33)


def test_a_line_of_the_servers_log_is_read_back():
    payload = m.build_message(OPEN, version=Version.V5_3)
    text = describe_untrusted(payload, direction=m.Direction.GUEST_TO_HOST, version=Version.V5_3)
    log = (
        "12:03:05 listening on s\n"
        f"12:03:06 vm1: guest: {text}\n"
        "12:03:06 vm1: host: ALLOFFERS_DELIVERED\n"
        "12:03:06 vm2: host: GPADL_TORNDOWN gpadl=0x10\n"
        "12:03:07 warning: vm1: channel 1: guest: something else\n"
    )

    assert server_account(log, "vm1") == [
        Said(
            "guest",
            "OPENCHANNEL",
            {
                "relid": 1,
                "open_id": 7,
                "ring_gpadl": 0xE1E10,
                "target_vp": 3,
                "downstream_page_offset": 33,
                "user_data": "120B",
            },
        ),
        Said("host", "ALLOFFERS_DELIVERED", {}),
    ]
    assert server_account(log, "vm2") == [Said("host", "GPADL_TORNDOWN", {"gpadl": 0x10})]


def test_a_trace_is_read_with_the_servers_names():
    trace = (
        "# tracer: nop\n"
        f"{HEAD}vmbus_open: sending child_relid 0x1, openid 7, gpadlhandle 0xe1e10, "
        "target_vp 0x3, offset 0x21, ret 0\n"
        f"{HEAD}vmbus_establish_gpadl_header: sending child_relid 0x1, gpadl 0xe1e10, "
        "range_buflen 536 rangecount 1, ret 0\n"
        f"{INTERRUPT}vmbus_on_msg_dpc: msgtype=10\n"
        f"{HEAD}vmbus_ongpadl_created: child_relid 0x1, gpadl 0xe1e10, creation_status 0\n"
        f"{HEAD}vmbus_send_modifychannel: binding child_relid 0x1 to target_vp 0x2, ret 0\n"
        f"{HEAD}vmbus_setevent: relid 0x1\n"
    )

    assert guest_account(trace) == [
        Said(
            "guest",
            "OPENCHANNEL",
            {
                "relid": 1,
                "open_id": 7,
                "ring_gpadl": 0xE1E10,
                "target_vp": 3,
                "downstream_page_offset": 33,
                "ret": 0,
            },
        ),
        Said(
            "guest",
            "GPADL_HEADER",
            {"relid": 1, "gpadl": 0xE1E10, "range_buflen": 536, "range_count": 1, "ret": 0},
        ),
        Said("host", ARRIVAL, {"number": 10}),
        Said("host", "GPADL_CREATED", {"relid": 1, "gpadl": 0xE1E10, "status": 0}),
        Said("guest", "MODIFYCHANNEL", {"relid": 1, "target_vp": 2, "ret": 0}),
    ]


def test_interfaces_of_an_offer_are_no_numbers():
    trace = (
        f"{HEAD}vmbus_onoffer: child_relid 0x2, monitorid 0x0, is_dedicated 1, connection_id "
        "0x2002, if_type 00000000-04a1-4d29-b605-72e2ffb1dc7f, if_instance "
        "12345678-0000-0000-0000-000000000001, chn_flags 0x0, mmio_megabytes 0, "
        "sub_channel_index 1\n"
    )

    (offer,) = guest_account(trace)

    assert offer.fields == {
        "relid": 2,
        "monitor_id": 0,
        "is_dedicated_interrupt": 1,
        "connection_id": 0x2002,
        "flags": 0,
        "mmio_megabytes": 0,
        "subchannel_index": 1,
    }

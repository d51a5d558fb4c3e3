"""A guest on the host's own network, or on one that is built in: addresses, names, strangers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import TOOLS_LUN, Lab
from tests.guest.rig.assets import Assets
from tests.guest.rig.host_tools import serve_iperf
from tests.guest.rig.internet import (
    HOST,
    NAME,
    PAGE,
    SERVER,
    Internet,
    open_internet,
)
from tests.guest.rig.network_work import (
    get_address,
    interface,
    iperf,
    make_data,
    ping,
)
from tests.support.patience import LONG_TEST

pytestmark = pytest.mark.timeout(LONG_TEST)

PASST, BUILT_IN = "00:15:5d:00:bb:01", "00:15:5d:00:bb:02"


@pytest.fixture
def internet(assets: Assets, tmp_path: Path) -> Iterator[Internet]:
    with open_internet(tmp_path) as internet:
        yield internet


def test_a_guest_gets_address_and_names_and_reaches_what_its_host_reaches(
    lab: Lab, internet: Internet, host_tools: Path
):
    server = lab.serve(
        lab.tools,
        options=[
            f"--net=nat:[with=passt,tcp={HOST}/8080:80,mac={PASST}]",
            f"--net=nat:[with=built-in,offloads=off,mac={BUILT_IN}]",
        ],
        place=internet.place,
    )
    guest = lab.boot(server, modules=("hv_storvsc", "sd_mod", "hv_netvsc"))
    guest.mount_tools(TOOLS_LUN)

    # The network that is built in: names, and nothing behind them.
    name = interface(guest, BUILT_IN)
    assert get_address(guest, name) == "10.0.2.15"
    ping(guest, "10.0.2.2")
    features = guest.tool(f"ethtool -k {name}")
    for feature in ("tx-checksumming", "tcp-segmentation-offload"):
        assert f"\n{feature}: off" in features, features
    assert SERVER in guest.run(f"nslookup {NAME} 10.0.2.3")
    assert guest.attempt("nslookup other.example 10.0.2.3")[0]
    assert guest.attempt(f"ping -c 1 -W 20 {SERVER}")[0]
    guest.run(f"ip addr flush dev {name}; ip link set {name} down")

    # That of passt: the guest has its host's address, and sees what that sees.
    name = interface(guest, PASST)
    assert get_address(guest, name) == HOST
    ping(guest, SERVER)
    assert SERVER in guest.run(f"nslookup {NAME}")
    assert guest.attempt("nslookup other.example")[0]
    page = guest.run(f"wget -q -O - http://{SERVER}/ | sha256sum").split()[0]
    assert page == hashlib.sha256(PAGE).hexdigest()
    # What it sends is told back in the same request: no connection is closed on one side only.
    make_data(guest, 0.5)
    guest.run("base64 -w 0 </run/data >/run/text")  # busybox sends text
    told = guest.run(f"wget -q -O - --post-file=/run/text http://{SERVER}/")
    assert told == guest.run("sha256sum </run/text").split()[0]
    with serve_iperf(internet.there, host_tools, lab.file("iperf3.log")):
        for way in ("", "-R"):
            iperf(guest, SERVER, way)
    # Somebody out there comes by the port that is forwarded.
    guest.run("mkdir -p /run/www; echo here I am >/run/www/index.html; httpd -h /run/www")
    assert internet.fetch(f"http://{HOST}:8080/") == b"here I am\n"

    for adapter in server.adapters():
        assert adapter["refused"] == 0, adapter
        assert adapter["failure"] == "", adapter
    guest.check_log()
    guest.power_off()

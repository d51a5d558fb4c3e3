"""The internet of the rig: what its name server says."""

from __future__ import annotations

import hashlib
import http.client
import socket

import pytest
from scapy.layers.dns import DNS, DNSQR

from tests.guest.rig import internet
from tests.guest.rig.internet import HOST, NAME, PAGE, SERVER, open_internet


def ask(name: str, kind: str) -> DNS:
    query = bytes(DNS(id=77, rd=1, qd=DNSQR(qname=name, qtype=kind)))
    answer = DNS(internet.dns_answer(query))
    assert (answer.id, answer.qr, answer.rd) == (77, 1, 1)
    assert answer.qd[0].qname.decode() == f"{name}."
    return answer


@pytest.mark.parametrize("name", [NAME, NAME.upper()])
def test_the_one_name_has_an_address_of_ipv4(name):
    answer = ask(name, "A")
    assert answer.rcode == 0
    assert [each.rdata for each in answer.an] == [SERVER]
    answer = ask(name, "AAAA")
    assert (answer.rcode, answer.ancount) == (0, 0)


def test_there_are_no_other_names():
    answer = ask("other.example", "A")
    assert (answer.rcode, answer.ancount) == (3, 0)


@pytest.mark.root
def test_home_reaches_what_is_there_and_nothing_is_left(tmp_path):
    with open_internet(tmp_path) as network:
        for method, data, answer in (
            ("GET", None, PAGE),
            ("POST", b"hello", hashlib.sha256(b"hello").hexdigest().encode()),
        ):
            page = http.client.HTTPConnection(SERVER, 80)
            with network.home.inside():
                page.connect()
            page.request(method, "/", data)
            assert page.getresponse().read() == answer
            page.close()
        with network.home.inside():
            socket.create_server((HOST, 8080)).close()
        with pytest.raises(OSError, match="assign"):
            socket.create_server((HOST, 8080))  # this is another network
    with pytest.raises(FileNotFoundError), network.home.inside():
        pass

"""Connect requests of hv_sock."""

from __future__ import annotations

from uuid import UUID

import pytest

from tests.support.engine import Guest, make_offer, only
from vmbus.engine import Budgets, EngineConfig, Fault, TlConnect
from vmbus.errors import STATUS_CONNECTION_REFUSED, LocalProtocolError
from vmbus.wire import messages as m
from vmbus.wire.versions import Version

ENDPOINT, SERVICE, SILO = UUID(int=1), UUID(int=2), UUID(int=3)
REFUSED = m.TlConnectResult(
    endpoint_id=ENDPOINT, service_id=SERVICE, status=STATUS_CONNECTION_REFUSED
)


def request(endpoint: UUID = ENDPOINT) -> m.TlConnectRequest:
    return m.TlConnectRequest(endpoint_id=endpoint, service_id=SERVICE, silo_id=SILO)


def ready(version: Version = Version.V5_3, **budgets: int) -> Guest:
    guest = Guest(EngineConfig(hv_sock=True, budgets=Budgets(**budgets)))
    guest.connect(version)
    return guest


@pytest.mark.parametrize(("version", "silo"), [(Version.V5_3, SILO), (Version.V5_1, UUID(int=0))])
def test_an_accepted_request_is_told_by_an_offer_alone(version, silo) -> None:
    guest = ready(version)
    event = TlConnect(request_id=1, endpoint=ENDPOINT, service=SERVICE, silo=silo)
    assert guest.post(request()) == [event]
    guest.engine.offer(make_offer(1, flags=m.OFFER_TLNPI_PROVIDER))
    guest.engine.tl_connect_done(1, ok=True)
    (offer,) = guest.take()
    assert offer.flags == m.OFFER_TLNPI_PROVIDER


def test_a_refused_request_is_answered_from_4_1_on() -> None:
    for version, found in ((Version.V5_3, [REFUSED]), (Version.V4_1, [REFUSED]), (0x40000, [])):
        guest = ready(Version(version))
        guest.post(request())
        guest.engine.tl_connect_done(1, ok=False)
        assert guest.take() == found


def test_without_sockets_all_requests_are_refused() -> None:
    guest = Guest()
    guest.connect()
    assert guest.post(request()) == [REFUSED]


def test_too_many_requests_are_refused() -> None:
    guest = ready()
    for number in range(1, 17):
        assert only(TlConnect, guest.post(request(UUID(int=number))))
    refused, fault = guest.post(request())
    assert refused == REFUSED
    assert isinstance(fault, Fault)
    guest.engine.tl_connect_done(5, ok=True)
    assert only(TlConnect, guest.post(request()))[0].request_id == 17


def test_answers_for_a_guest_that_has_left_are_ignored_once() -> None:
    guest = ready(max_pending_tl_connects=1)
    guest.post(request(), m.Unload())
    guest.connect()
    assert only(TlConnect, guest.post(request())) == [], "the old one still counts"
    guest.engine.tl_connect_done(1, ok=False)
    assert guest.take() == []
    with pytest.raises(LocalProtocolError):
        guest.engine.tl_connect_done(1, ok=False)
    assert only(TlConnect, guest.post(request()))

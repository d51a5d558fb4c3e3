"""INITIATE_CONTACT: versions, features, message slots and pages of the connection."""

from __future__ import annotations

from uuid import UUID

import pytest

from tests.support.engine import (
    INTERRUPT_PAGE,
    MONITOR_1,
    MONITOR_2,
    Guest,
    fault_field,
    only,
)
from vmbus.engine import (
    SUPPORTED_FEATURES,
    Budgets,
    Connected,
    EngineConfig,
    Fault,
    InterruptPage,
    MonitorPages,
    Offer,
    SendMessage,
    describe,
)
from vmbus.errors import ConfigError
from vmbus.wire import messages as m
from vmbus.wire.guids import CLASS_NIC, NULL_GUID
from vmbus.wire.versions import Feature, Version

REFUSED = m.VersionResponse(version_supported=False)


@pytest.mark.parametrize("version", list(Version))
def test_every_known_version_is_accepted(version) -> None:
    """Checklist row 1."""
    guest = Guest()
    found = guest.contact(version)
    (connected,) = only(Connected, found)
    assert (connected.version, connected.vp, connected.sint) == (version, 0, 2)
    (response,) = only(m.VersionResponse, found)
    assert response.version_supported
    assert response.connection_state == 0
    assert found[-1] is response


@pytest.mark.parametrize("version", [0, 1, 0x00050004, 0x00060001, 0x00070000, 0xFFFFFFFF])
@pytest.mark.parametrize("connection_id", [1, 4])
def test_an_unknown_version_is_refused_but_answered(version, connection_id) -> None:
    """Checklist row 1: silence, or a hypercall error, would hang the guest or cost it minutes."""
    guest = Guest()
    assert guest.contact(version, connection_id=connection_id) == [REFUSED]
    assert describe(guest.engine)["state"] == "Disconnected"


def test_a_guest_goes_down_the_ladder_until_a_version_fits() -> None:
    """Checklist row 1."""
    guest = Guest(EngineConfig(max_version=Version.V4_0))
    for version in (Version.V5_3, Version.V5_2, Version.V5_1, Version.V5_0, Version.V4_1):
        assert guest.contact(version) == [REFUSED]
    assert only(m.VersionResponse, guest.contact(Version.V4_0))[0].version_supported


def test_replies_have_the_sizes_that_guests_insist_on() -> None:
    """Checklist row 5: 16 bytes, 20 with 6.0; a refusal is always the short one."""
    guest = Guest()
    guest.contact(0x00070000)
    guest.contact(Version.V5_3)
    guest.contact(Version.V6_0)
    sizes = [len(event.payload) for event in only(SendMessage, guest.events)]
    assert sizes == [16, 16, 20]


@pytest.mark.parametrize(
    ("version", "connection_id"), [(0x50003, 4), (0x50003, 1), (0x40000, 1), (0xD, 1)]
)
def test_the_reply_names_a_connection_that_takes_messages(version, connection_id) -> None:
    # Linux posts there from 5.0 on, Haiku in every version.
    guest = Guest()
    found = guest.contact(version, connection_id=connection_id)
    assert only(m.VersionResponse, found)[0].message_connection_id == connection_id


@pytest.mark.parametrize("connection_id", [1, 4])
def test_later_messages_are_taken_on_both_connections(connection_id) -> None:
    """Checklist row 30."""
    guest = Guest()
    guest.contact()
    payload = m.build_message(m.RequestOffers(), version=Version.V5_3)
    assert guest.post_bytes(payload, connection_id) == [m.AllOffersDelivered()]


@pytest.mark.parametrize("connection_id", [0, 2, 3, 5, 0x2001])
def test_a_message_on_any_other_connection_is_a_fault(connection_id) -> None:
    guest = Guest()
    guest.engine.receive_untrusted(connection_id, bytes([14]) + bytes(39), vp=3)
    (fault,) = guest.take()
    assert (fault.field, fault.message_type, fault.vp) == ("connection_id", 14, 3)


def test_on_connection_1_an_interrupt_page_is_no_sint() -> None:
    """Haiku posts 5.3 there, with a page address where others have SINT and VTL."""
    guest = Guest()
    found = guest.contact(Version.V5_3, connection_id=1, target_info=INTERRUPT_PAGE)
    assert only(Connected, found)[0].sint == 2
    assert only(InterruptPage, found) == []


def test_firmware_gets_its_features_on_connection_1() -> None:
    """UEFI asks for 6.0 on connection 1."""
    guest = Guest()
    info = 2 | 0x0F << 32
    found = guest.contact(Version.V6_0, connection_id=1, target_info=info)
    # It asks for 0x0f; interrupt redirection, 0x02, is not to be had.
    assert only(Connected, found)[0].features == 0x0D
    assert only(m.VersionResponse, found)[0].supported_features == 0x0D


@pytest.mark.parametrize(("sint", "slot"), [(0, 2), (1, 1), (3, 3), (15, 15), (16, 2), (255, 2)])
def test_another_sint_is_refused_and_told_so_there(sint, slot) -> None:
    guest = Guest()
    found = guest.contact(target_info=sint)
    assert fault_field(found) == "target_info"
    assert only(m.VersionResponse, found) == [REFUSED]
    assert only(SendMessage, guest.events)[0].sint == slot


def test_another_trust_level_is_refused() -> None:
    guest = Guest()
    found = guest.contact(target_info=2 | 2 << 8)
    assert fault_field(found) == "target_info"
    assert only(m.VersionResponse, found) == [REFUSED]


@pytest.mark.parametrize(("version", "vp"), [(0x30000, 3), (0x50003, 3), (0x20004, 0), (0xD, 0)])
def test_from_3_0_on_the_guest_chooses_the_vp(version, vp) -> None:
    guest = Guest(EngineConfig(vp_count=4))
    assert only(Connected, guest.contact(version, target_vp=3))[0].vp == vp
    assert only(SendMessage, guest.events)[-1].vp == vp


@pytest.mark.parametrize("vp", [4, 0xFFFFFFFF])
def test_a_vp_that_does_not_exist_is_refused_on_vp_0(vp) -> None:
    guest = Guest(EngineConfig(vp_count=4))
    found = guest.contact(target_vp=vp)
    assert fault_field(found) == "target_vp"
    assert only(SendMessage, guest.events)[0].vp == 0
    assert only(m.VersionResponse, found) == [REFUSED]


def test_features_are_those_that_both_sides_have() -> None:
    config = EngineConfig(supported_features=Feature.PAUSE_RESUME | Feature.MODIFY_CONNECTION)
    guest = Guest(config)
    found = guest.contact(Version.V6_0, features=Feature.PAUSE_RESUME | Feature.GPA_PINNING)
    assert only(Connected, found)[0].features == Feature.PAUSE_RESUME
    assert only(m.VersionResponse, found)[0].supported_features == Feature.PAUSE_RESUME


def test_a_client_id_is_not_agreed_on_when_there_is_none() -> None:
    guest = Guest()
    found = guest.contact(Version.V6_0, client_id=None)
    assert Feature.CLIENT_ID not in only(Connected, found)[0].features


def test_all_features_at_once_never_bring_what_the_host_lacks() -> None:
    guest = Guest()
    found = guest.contact(Version.V6_0, target_info=2 | 0xFFFFFFFF << 32)
    assert only(Connected, found)[0].features == SUPPORTED_FEATURES


def test_features_before_6_0_mean_nothing() -> None:
    guest = Guest()
    found = guest.contact(Version.V5_3, target_info=2 | 0xFF << 32)
    assert only(Connected, found)[0].features == Feature(0)


def test_monitor_pages_are_made_known() -> None:
    guest = Guest()
    found = guest.contact()
    assert only(MonitorPages, found) == [MonitorPages(page_1=MONITOR_1, page_2=MONITOR_2)]


@pytest.mark.parametrize(
    "pages", [(0, 0), (MONITOR_1, 0), (0, MONITOR_2), (MONITOR_1, 8), (1 << 60, MONITOR_2)]
)
def test_without_two_good_monitor_pages_there_is_no_monitoring(pages) -> None:
    guest = Guest()
    found = guest.contact(monitor_page_1=pages[0], monitor_page_2=pages[1])
    assert only(MonitorPages, found) == []
    assert only(m.VersionResponse, found)[0].version_supported


@pytest.mark.parametrize("version", [Version.V0_13, Version.V1_1])
def test_old_guests_have_an_interrupt_page(version) -> None:
    guest = Guest()
    assert only(InterruptPage, guest.contact(version)) == [InterruptPage(gpa=INTERRUPT_PAGE)]
    bad = Guest()
    found = bad.contact(version, target_info=1 << 60)
    assert fault_field(found) == "interrupt_page"
    assert only(m.VersionResponse, found) == [REFUSED]


def test_the_maximum_can_be_delayed_until_the_firmware_has_unloaded() -> None:
    guest = Guest(EngineConfig(max_version=Version.V4_0, delay_max_version=True))
    assert only(Connected, guest.contact(Version.V6_0))
    guest.post(m.Unload())
    assert guest.contact(Version.V5_3) == [REFUSED]
    assert only(Connected, guest.contact(Version.V4_0))
    guest.engine.reset()
    guest.take()
    assert only(Connected, guest.contact(Version.V6_0)), "a reset starts the firmware again"


@pytest.mark.parametrize("size", range(40))
def test_a_contact_cut_short_is_a_fault(size) -> None:
    guest = Guest()
    whole = bytes([14]) + bytes(39)
    (fault,) = guest.post_bytes(whole[:size])
    assert isinstance(fault, Fault)
    assert fault.message_type == (14 if size >= 4 else -1)


@pytest.mark.parametrize("kind", [0, 1, 4, 6, 15, 17, 30, 0xFFFFFFFF])
def test_what_a_guest_never_sends_is_a_fault(kind) -> None:
    guest = Guest()
    guest.contact()
    (fault,) = guest.post_bytes(kind.to_bytes(4, "little") + bytes(236))
    assert (fault.field, fault.message_type) == ("type", kind)


def test_counters_count() -> None:
    guest = Guest()
    guest.connect()
    guest.post(m.RequestOffers())
    info = describe(guest.engine)
    assert info["messages_received"] == 3
    assert info["messages_sent"] == 2
    assert info["faults"] == 1


def test_configuration_that_cannot_be_honoured_is_refused() -> None:
    for feature in (
        Feature.CONFIDENTIAL_CHANNELS,
        Feature.GPA_PINNING,
        Feature.CHANNEL_INTERRUPT_REDIRECTION,
        Feature.SERVER_SPECIFIED_MONITOR_PAGES,
    ):
        with pytest.raises(ConfigError):
            EngineConfig(supported_features=feature)
    with pytest.raises(ConfigError):
        EngineConfig(vp_count=0)
    with pytest.raises(ConfigError):
        Budgets(max_gpadls=-1)
    with pytest.raises(ConfigError):
        Budgets(max_channels=2048)


@pytest.mark.parametrize(
    "options",
    [
        {"instance_id": NULL_GUID},
        {"flags": 0x2},
        {"flags": 0x4},
        {"flags": 0x8},
        {"flags": 0x10000},
        {"mmio_megabytes": 65536},
        {"user_defined": b""},
        {"monitor_latency": -1},
        {"max_subchannels": 2047},
    ],
)
def test_an_offer_that_guests_would_drop_is_refused(options) -> None:
    with pytest.raises(ConfigError):
        Offer(**{"class_id": CLASS_NIC, "instance_id": UUID(int=1), **options})

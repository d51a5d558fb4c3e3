"""INITIATE_CONTACT: whom to answer, and what to agree on."""

from __future__ import annotations

from vmbus.engine.config import EngineConfig
from vmbus.engine.states import Contact, Link, Slot
from vmbus.errors import GuestProtocolError
from vmbus.memory import PAGE_SIZE, GuestMemory
from vmbus.wire.messages import CONNECTION_MESSAGES_5, DEFAULT_SINT
from vmbus.wire.versions import NO_FEATURES, Feature, Version

_MAX_SINT = 15


def is_sint(sint: int) -> bool:
    """Whether messages can go there: SINT 0 belongs to the hypervisor (TLFS 11.10)."""
    return 1 <= sint <= _MAX_SINT


def _names_sint(contact: Contact) -> bool:
    """Whether bytes 16 to 23 name SINT and VTL.

    From 5.0 on they do, but only for those who post to connection 4. Haiku posts 5.3 to
    connection 1 and has an interrupt page there, whose address would read as SINT 0.
    """
    return (
        contact.connection_id == CONNECTION_MESSAGES_5 and contact.message.version >= Version.V5_0
    )


def reply_slot(contact: Contact, vp_count: int) -> Slot:
    """Return where the guest waits for VERSION_RESPONSE, as far as one can tell.

    Never fails: a contact without an answer hangs every guest.
    """
    vp, sint = 0, DEFAULT_SINT
    message = contact.message
    if message.version >= Version.V3_0 and message.target_vp < vp_count:
        vp = message.target_vp
    if _names_sint(contact) and is_sint(message.target_sint):
        sint = message.target_sint
    return Slot(vp, sint)


def agree_untrusted(
    contact: Contact, config: EngineConfig, memory: GuestMemory, max_version: Version
) -> Link | None:
    """Decide about a contact. Cannot block.

    Args:
        contact: The message and the connection id it was posted to.
        config: What the host offers.
        memory: Where the guest's pages must be.
        max_version: The newest version allowed now.

    Returns:
        The connection, or None for a version that is unknown or too new, which is no fault:
        guests try one after the other.

    Raises:
        GuestProtocolError: VP, SINT, VTL or interrupt page make no sense.
    """
    message = contact.message
    if message.version not in set(Version) or message.version > max_version:
        return None
    version = Version(message.version)
    if version >= Version.V3_0 and message.target_vp >= config.vp_count:
        raise GuestProtocolError(f"there is no VP {message.target_vp}", field="target_vp")
    if _names_sint(contact) and (message.target_sint != DEFAULT_SINT or message.target_vtl):
        raise GuestProtocolError(
            f"SINT {message.target_sint}, VTL {message.target_vtl}: only SINT {DEFAULT_SINT} of "
            "VTL 0 is served",
            field="target_info",
        )
    features = NO_FEATURES
    if version >= Version.V6_0:
        # UEFI asks for 6.0 on connection 1, so this does not depend on the connection.
        features = message.feature_flags & config.supported_features
        if message.client_id is None:
            features &= ~Feature.CLIENT_ID
    interrupt_page = None
    if version < Version.V2_4:
        interrupt_page = message.interrupt_page
        if not is_page(memory, interrupt_page):
            raise GuestProtocolError(
                f"interrupt page {interrupt_page:#x} is not a page of memory",
                field="interrupt_page",
            )
    return Link(
        version=version,
        features=features,
        slot=reply_slot(contact, config.vp_count),
        monitor_pages=monitor_pages(memory, message.monitor_page_1, message.monitor_page_2),
        interrupt_page=interrupt_page,
    )


def monitor_pages(memory: GuestMemory, page_1: int, page_2: int) -> tuple[int, int] | None:
    """Return the monitor pages if both can be used, else None: then there is no monitoring."""
    if is_page(memory, page_1) and is_page(memory, page_2):
        return page_1, page_2
    return None


def is_page(memory: GuestMemory, gpa: int) -> bool:
    """Whether ``gpa`` is the address of a page of writable memory, and not 0."""
    return gpa != 0 and gpa % PAGE_SIZE == 0 and memory.contains(gpa, PAGE_SIZE, write=True)

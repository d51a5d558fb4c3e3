"""Class (interface type) GUIDs of VMBus devices, and the byte order of GUIDs on the wire.

Source: linux/include/linux/hyperv.h (``HV_*_GUID``). On the wire a GUID is in Microsoft's mixed
byte order: the first three fields little-endian, the rest as written (``UUID.bytes_le``).
"""

from __future__ import annotations

from uuid import UUID

NULL_GUID = UUID(int=0)

CLASS_SCSI = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
CLASS_IDE = UUID("32412632-86cb-44a2-9b5c-50d1417354f5")
CLASS_FIBRE_CHANNEL = UUID("2f9bcc4a-0069-4af3-b76b-6fd0be528cda")
CLASS_NIC = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
CLASS_NETWORK_DIRECT = UUID("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501")
CLASS_PCI = UUID("44c4f61d-4444-4400-9d52-802e27ede19f")
CLASS_VIDEO = UUID("da0a7802-e377-4aac-8e77-0558eb1073f8")
CLASS_KEYBOARD = UUID("f912ad6d-2b17-48ea-bd65-f927a61c7684")
CLASS_MOUSE = UUID("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a")
CLASS_SHUTDOWN = UUID("0e0b6031-5213-4934-818b-38d90ced39db")
CLASS_TIME_SYNC = UUID("9527e630-d0ae-497b-adce-e80ab0175caf")
CLASS_HEARTBEAT = UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
CLASS_KVP = UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6")
CLASS_VSS = UUID("35fa2e29-ea23-4236-96ae-3a6ebacba440")
CLASS_FCOPY = UUID("34d14be3-dee4-41c8-9ae7-6b174977c192")
CLASS_DYNAMIC_MEMORY = UUID("525074dc-8985-46e2-8057-a307dc18a502")
CLASS_VMBFS = UUID("c376c1c3-d276-48d2-90a9-c04748072c60")

CLASS_NAMES: dict[UUID, str] = {
    CLASS_SCSI: "scsi",
    CLASS_IDE: "ide",
    CLASS_FIBRE_CHANNEL: "fc",
    CLASS_NIC: "net",
    CLASS_NETWORK_DIRECT: "nd",
    CLASS_PCI: "pci",
    CLASS_VIDEO: "video",
    CLASS_KEYBOARD: "keyboard",
    CLASS_MOUSE: "mouse",
    CLASS_SHUTDOWN: "shutdown",
    CLASS_TIME_SYNC: "timesync",
    CLASS_HEARTBEAT: "heartbeat",
    CLASS_KVP: "kvp",
    CLASS_VSS: "vss",
    CLASS_FCOPY: "fcopy",
    CLASS_DYNAMIC_MEMORY: "balloon",
    CLASS_VMBFS: "vmbfs",
}
"""Short names for people; used in listings, logs and traces."""


def class_name(guid: UUID) -> str:
    """Return the short name of a device class, or its GUID as text."""
    return CLASS_NAMES.get(guid, str(guid))

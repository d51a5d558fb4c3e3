"""The host half of the synthetic SCSI controller (storage VSP), peer of ``hv_storvsc``."""

from storvsp.controller import ScsiController as ScsiController
from storvsp.disk import (
    Disk as Disk,
    DiskError as DiskError,
    DiskInfo as DiskInfo,
)
from storvsp.disks.specs import open_disk as open_disk
from storvsp.plugin import OPTIONS as OPTIONS, PLUGIN as PLUGIN

__all__ = ["ScsiController", "Disk", "DiskError", "DiskInfo", "open_disk", "PLUGIN"]

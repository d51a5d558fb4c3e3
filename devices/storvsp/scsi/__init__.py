"""SCSI: logical units over disks, independent of VMBus.

A controller makes one unit per disk, turns each request into a :class:`Command`, calls
:meth:`LogicalUnit.try_execute` and, if that returns None, awaits :meth:`LogicalUnit.execute`.
:func:`absent_unit` answers for addresses without a unit.
"""

from storvsp.scsi.cdrom_unit import CdromUnit
from storvsp.scsi.disk_unit import DiskUnit
from storvsp.scsi.target import absent_unit, report_luns_untrusted
from storvsp.scsi.unit import Command, DataDirection, LogicalUnit, Outcome

__all__ = [
    "Command",
    "DataDirection",
    "LogicalUnit",
    "Outcome",
    "DiskUnit",
    "CdromUnit",
    "absent_unit",
    "report_luns_untrusted",
]

"""What every disk owes the SCSI controller, as a test: :func:`check_disk`."""

from storvsp.testing.disks import check_disk as check_disk

__all__ = ["check_disk"]

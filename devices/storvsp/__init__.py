"""The host half of the synthetic SCSI controller (storage VSP), peer of ``hv_storvsc``."""

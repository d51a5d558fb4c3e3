"""The host side of Hyper-V's VMBus: bus engine, rings, devices and attachment, for trio."""

__version__ = "0.1.0"

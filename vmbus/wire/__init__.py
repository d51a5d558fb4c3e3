"""The bytes of VMBus. No I/O, no state; shared by the host, the guest and the tools."""

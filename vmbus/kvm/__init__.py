"""The reference VMM, a process of its own that runs Linux on ``/dev/kvm``.

It attaches to a server through ``vmbus-user`` like any other VMM, and shares with it no more than
that: the client of :mod:`vmbus.attach`, the SynIC model and the wire formats.

================ ===========================================================================
`api`            KVM's ioctls and structures
`vm`             one virtual machine: memory, interrupt controllers, routes
`vcpu`           one virtual processor and its thread
`cpuid`          what the processors say of themselves
`synic`          what the two kinds of SynIC have in common
`synic_kernel`   KVM has the guest's SynIC
`synic_user`     the VMM has it: MSR exits and a hypercall page of its own
`link`           the attachment to the server
`life`           one life of a guest, from reset to reset
`outcome`        how a life ends
`machine`        all of it put together
`bzimage`        loading Linux
`acpi`, `aml`    ACPI tables, and the byte code in them
`ports`          which device answers at which I/O port
`chipset`        all port devices, and the small ones of them
`power`          ACPI's fixed hardware
`cmos`           the clock
`serial`         the serial port
`console`        the serial port's other end, a terminal
`trial`          a guest of some bytes, to see what KVM is worth
================ ===========================================================================
"""

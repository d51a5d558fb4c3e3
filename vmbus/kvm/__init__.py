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
`machine`        all of it put together
`bzimage`        loading Linux
`acpi`           ACPI tables
`serial`         the serial port
`ports`          what else is on the I/O ports
================ ===========================================================================
"""

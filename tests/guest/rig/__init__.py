"""What it takes to test against a real Linux kernel; ``python -m tests.guest.rig --help``.

============ ===================================================================================
`packages`   Debian packages: kernels, a user land, an emulator
`images`     initramfs and root file system
`assets`     where all of that is, for the tests
`outer`      the outer machine, which has a KVM with Hyper-V support where this one has none
`processes`  servers and VMMs as processes, without starting Python anew for each
`guest`      a guest, and commands given over its serial console
`disk_work`  writing to its disks and reading back
`looks`      what its kernel says of its bus
`account`    what server and guest say of every control message
`complaints` what a kernel's log must not have
============ ===================================================================================

Everything that is made once is kept in a cache, ``~/.cache/vmbus-rig`` or ``$VMBUS_RIG_CACHE``.
"""

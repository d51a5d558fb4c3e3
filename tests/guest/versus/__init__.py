"""``make guest-bench``: our disk and our network beside QEMU's virtio devices, for the same guest.

Same machine, guest kernel, initramfs and work; our server and VMM on one side, QEMU with KVM on
the others. They take turns, at least five rounds for a table that is worth keeping. Nothing here
decides anything: it prints Markdown (``tests/guest/rig/comparison.py``).
"""

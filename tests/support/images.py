"""Image files of a megabyte, and the descriptors that are open."""

import os

MIB = 1 << 20


def open_descriptors():
    return set(os.listdir("/proc/self/fd"))

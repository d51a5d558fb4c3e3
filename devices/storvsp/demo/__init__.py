"""The storage half of ``vmbus demo``: a guest that finds its disks and checks every byte.

::

    python -m storvsp.demo --socket PATH [--guest linux-6.1] [--channels 4] [--depth 32] [--hotplug]

What it writes is said by :mod:`vmbus.demo` and :mod:`storvsp.demo.half`.
"""

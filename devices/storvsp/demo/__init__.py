"""The storage half of ``vmbus demo``: a guest that finds its disks and checks every byte.

Started as ``python -m storvsp.demo``; :mod:`storvsp.demo.guest` says what it writes.
"""

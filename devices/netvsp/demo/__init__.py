"""The network half of ``vmbus demo``: one of two guests that talk through a switch.

::

    python -m netvsp.demo --socket PATH --name NAME --station 1 [--guest linux-6.1] [--channels 4]

and another one with ``--station 2``. What they write is said by :mod:`vmbus.demo` and
:mod:`netvsp.demo.half`.
"""

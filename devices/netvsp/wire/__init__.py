"""Layouts of the network device's protocols: NVSP, and RNDIS within it.

Everything on the data path is plain ``struct``; the construct twins in ``tests/reference`` prove
the layouts. Both halves use them: the device, and the guest drivers that try it.
"""

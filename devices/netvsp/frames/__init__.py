"""Ethernet frames, their checksums, and what is left to do for them."""

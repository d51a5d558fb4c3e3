"""The host half of the synthetic network adapter (network VSP), peer of ``hv_netvsc``."""

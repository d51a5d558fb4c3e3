"""The host half of the synthetic network adapter (network VSP), peer of ``hv_netvsc``."""

from netvsp.adapter import NetworkAdapter as NetworkAdapter
from netvsp.endpoint import Endpoint as Endpoint, EndpointInfo as EndpointInfo
from netvsp.endpoints.specs import open_endpoint as open_endpoint
from netvsp.plugin import PLUGIN as PLUGIN

__all__ = ["NetworkAdapter", "Endpoint", "EndpointInfo", "open_endpoint", "PLUGIN"]

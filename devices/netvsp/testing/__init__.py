"""What every endpoint owes the network adapter, as a test: :func:`check_endpoint`.

:class:`ListeningPort` is an adapter's side of an endpoint, for tests of one.
"""

from netvsp.testing.endpoints import check_endpoint as check_endpoint
from netvsp.testing.port import ListeningPort as ListeningPort

__all__ = ["check_endpoint", "ListeningPort"]

"""Every endpoint keeps the contract."""

import pytest

from netvsp.endpoints.specs import open_endpoint
from netvsp.endpoints.wrapper import EndpointWrapper
from netvsp.testing import check_endpoint


@pytest.mark.parametrize("spec", ["null:", "loopback:", "loopback:[as-is]"])
async def test_a_simple_endpoint_keeps_the_contract(spec):
    await check_endpoint(lambda: open_endpoint(spec))


async def test_a_wrapper_keeps_the_contract():
    async def make():
        return EndpointWrapper(await open_endpoint("loopback:"))

    await check_endpoint(make)

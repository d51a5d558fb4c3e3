"""The network driver: frames both ways, up and down, changes, the end.

Sources: linux/drivers/net/hyperv, freebsd/sys/dev/hyperv/netvsc, openbsd/sys/dev/pv/if_hvn.c,
dpdk/drivers/net/netvsc, MacHyperVSupport/Network, mu_msvm/MsvmPkg/NetvscDxe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence

import trio

from netvsp.guest.frames import GuestFrame
from netvsp.guest.habits import HABITS, End, NetworkHabits, Teardown
from netvsp.guest.handshake import Handshake
from netvsp.guest.receiving import Expecting
from netvsp.guest.replies import RndisError, check_bare_completion
from netvsp.wire import ndis, nvsp, oids, ppi, rndis
from vmbus.guest import Guest
from vmbus.wire.messages import OfferChannel
from vmbus.wire.versions import Version

_LOOK_SECONDS = 0.001
"""How often a driver looks whether the host has read its ring; linux netvsc_wait_until_empty."""
_DEFAULT_MTU = 1500


class NetvscAdapter(Handshake):
    """A network adapter as its driver sees it; made by :func:`attach`.

    Its parts do the work: :attr:`receiver`, :attr:`sender`, :attr:`control`, :attr:`events`.
    """

    @property
    def link(self) -> bool:
        """Whether the link is up, as far as the driver has been told."""
        return self.events.link

    @property
    def received(self) -> deque[GuestFrame]:
        """Frames that have come and are not taken yet."""
        return self.receiver.frames

    # --------------------------------------------------------------------------------- frames

    async def send(
        self,
        frame: bytes,
        *,
        vlan: ppi.Vlan | None = None,
        checksum: bool = False,
        segment: int | None = None,
        hash_value: int | None = None,
        channel: int | None = None,
        copy: bool | None = None,
        pieces: Sequence[int] | None = None,
    ) -> int:
        """Send a frame and wait until the device is done with it. A checkpoint.

        Args:
            frame: From its Ethernet header on, with right lengths and sums.
            vlan: A tag for the device to put in.
            checksum: The device is to fill in the sum of TCP or UDP, and that of the IPv4 header
                if it was asked to do such; the guest leaves them out as its driver does.
            segment: The device is to cut the payload of TCP into pieces of so many bytes.
            hash_value: Of its flow, 32 bits; None: as the driver would have it.
            channel: Number of the channel to send it on; None: by the flow's hash.
            copy: Through the send buffer or not; None: as the driver would.
            pieces: Bytes of the pieces that it lies in, which are not copied; they may be 0.

        Returns:
            NVSP status, 1 for success.

        Raises:
            ValueError: The driver or the device does not do that.
            MemoryError: The guest has no pages left.
            trio.ClosedResourceError: The adapter was closed.
            trio.BrokenResourceError: The host has taken it away.
            GuestPanic: The host broke a rule.
        """
        return await self.sender.send(
            frame,
            vlan=vlan,
            checksum=checksum,
            segment=segment,
            hash_value=hash_value,
            channel=channel,
            copy=copy,
            pieces=pieces,
        )

    async def send_many(
        self, frames: Sequence[bytes], *, channel: int | None = None, partial: bool = False
    ) -> list[int]:
        """Send frames, as many of them in one section of the send buffer as go there.

        A checkpoint. They are sent one packet after the other.

        Args:
            frames: See :meth:`send`.
            channel: Number of the channel; None: the first.
            partial: The last one stays where it is, and only its header is in the section.

        Returns:
            NVSP status of each packet.

        Raises:
            ValueError: The driver does not do that, or a frame is too long for it.
        """
        return await self.sender.send_many(frames, channel=channel, partial=partial)

    async def receive(self) -> GuestFrame:
        """Wait for the next frame and take it. A checkpoint.

        Raises:
            trio.ClosedResourceError: The adapter was closed, and there are no more.
            trio.BrokenResourceError: The host has taken it away.
        """
        return await self.receiver.receive()

    # -------------------------------------------------------------------------------- changes

    async def up(self) -> None:
        """Let frames in. A checkpoint.

        Raises:
            RndisError: The device refuses.
        """
        before = self.receiver.expecting
        self.receiver.expecting = Expecting.FRAMES
        word = self.habits.up_filter.to_bytes(4, "little")
        try:
            await self.set(oids.GEN_CURRENT_PACKET_FILTER, word)
        except RndisError:
            self.receiver.expecting = before
            raise
        self.is_up = True
        for step in self.habits.up_steps:
            await self._step(step)

    async def down(self) -> None:
        """Let no more frames in. A checkpoint.

        Raises:
            RndisError: The device refuses.
        """
        self.is_up = False
        await self.set(oids.GEN_CURRENT_PACKET_FILTER, bytes(4))
        self.receiver.expecting = Expecting.NO_MORE
        await self._all_read()

    async def set_address(self, address: bytes) -> None:
        """Change the hardware address. A checkpoint.

        Args:
            address: 6 bytes.

        Raises:
            ValueError: This driver cannot.
            RndisError: The device refuses.
        """
        if not self.habits.changes_address:
            raise ValueError("this driver does not change the address")
        parameter = rndis.build_parameter("NetworkAddress", address.hex())
        await self.set(oids.GEN_RNDIS_CONFIG_PARAMETER, parameter)
        self.address = address

    async def set_mtu(self, mtu: int) -> None:
        """Change the MTU: close the adapter, open it again, shake hands anew. A checkpoint.

        Raises:
            ValueError: This driver cannot.
            AttachError: The device does not come back; see :meth:`start`.
        """
        if not self.habits.changes_mtu:
            raise ValueError("this driver does not change the MTU")
        await self.reopen(mtu=mtu)

    async def reopen(self, *, mtu: int | None = None, sub_channels: int | None = None) -> None:
        """Close the adapter and open it again, as for a change of its MTU or its channels.

        A checkpoint.

        Args:
            mtu: The new one; None: as it was.
            sub_channels: How many to ask for; None: as before.

        Raises:
            AttachError: The device does not come back; see :meth:`start`.
        """
        was_up = self.is_up
        if was_up:
            await self.down()
        await self.close()
        await self.reset()
        if mtu is not None:
            self.mtu = mtu
        wanted, only = self._start_options
        if self.habits.keeps_sections:
            section = self.receiver.section
            self._sizes = (section.sub_alloc_size * section.sub_alloc_count, self._sizes[1])
        self._error = None
        self.granted = 0
        self.scaling = ndis.RssCapabilities(0, 0, 0, 0)
        self.scaling_table = ()
        self._begin()
        await self.start(wanted if sub_channels is None else sub_channels, only=only)
        if was_up:
            await self.up()

    async def switch_data_path(self, *, virtual_function: bool) -> None:
        """Say which way frames are to go. A checkpoint."""
        path = nvsp.DATA_PATH_VF if virtual_function else nvsp.DATA_PATH_SYNTHETIC
        packet = await self._request(nvsp.build_data_path(path))
        check_bare_completion(packet, nvsp.SWITCH_DATA_PATH, self.habits, self._panic)

    # ------------------------------------------------------------------------------------ end

    async def close(self) -> None:
        """Leave the device, in the driver's own order. A checkpoint.

        It does not wait for frames that are being sent, but for packets that it has to complete.
        """
        habits = self.habits
        version = self.guest.connection.version
        early = habits.teardown is Teardown.BEFORE_CLOSE or (
            habits.teardown is Teardown.BY_VERSION
            and version is not None
            and version < Version.V4_0
        )
        if self._error is None:
            try:
                for step in habits.ending:
                    if step is End.HALT:
                        await self.control.halt()
                        await self.receiver.wait_completed()
                    else:
                        await self._revoke(early=early)
            except trio.BrokenResourceError as error:
                self._end(error)
        await super().close()
        self._end(trio.ClosedResourceError("the adapter is closed"))
        if habits.teardown is not Teardown.NEVER and not isinstance(
            self._error, trio.BrokenResourceError
        ):
            for buffer in (self._receive, self._send):
                if buffer is not None:
                    await buffer.take_back()
        self._receive = self._send = None

    async def _revoke(self, *, early: bool) -> None:
        parts = (
            (nvsp.REVOKE_RECEIVE_BUFFER, self._receive, self.habits.receive_id),
            (nvsp.REVOKE_SEND_BUFFER, self._send, self.habits.send_id),
        )
        channel = self.channels[0]
        for kind, buffer, number in parts:
            if buffer is None:
                continue
            await channel.send(nvsp.build_revoke(kind, number)[: self.habits.message_size])
            if early:
                await self._all_read()
                await buffer.take_back()

    async def _all_read(self) -> None:
        """Wait until the host has read all that was sent; nobody tells when it has."""
        for channel in self.channels:
            while self._error is None and not channel.all_read:  # noqa: ASYNC110
                await trio.sleep(_LOOK_SECONDS)

    def removed(self) -> None:
        """Take note that the host has taken the adapter, or a channel of it, away."""
        left = sum(channel.outstanding for channel in self.channels)
        if left and self.habits.waits_when_removed and self._error is None:
            self._panic(f"removed with {left} packet(s) unanswered: the driver waits for ever")
        self._end(trio.BrokenResourceError("the host has taken the adapter away"))
        super().removed()

    def _end(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        self.control.end(error)
        self.sender.end(error)
        self.receiver.end(error)


async def attach(
    guest: Guest,
    offer: OfferChannel,
    *,
    habits: NetworkHabits | None = None,
    mtu: int = _DEFAULT_MTU,
    sub_channels: int | None = None,
    only: Container[int] | None = None,
    contiguous: bool = True,
    ring_pages: int | None = None,
    receive_size: int | None = None,
    send_size: int | None = None,
) -> NetvscAdapter:
    """Attach the network driver to an offered adapter, which stays down. A checkpoint.

    Args:
        guest: A connected guest.
        offer: Class ``CLASS_NIC`` of :mod:`vmbus.wire.guids`.
        habits: How the driver behaves; None: as that of the guest's personality.
        mtu: Bytes of payload that frames may have.
        sub_channels: How many to ask for; None: as many as the habits say.
        only: Numbers of the sub-channels that can be opened; None: all of them.
        contiguous: False scatters the pages of rings, buffers and frames over the RAM.
        ring_pages: Pages of each ring; None: as the habits say, up to 512.
        receive_size: Bytes of the receive buffer; None: as the habits say, up to 31 MiB.
        send_size: Bytes of the send buffer; None: as the habits say, up to 16 MiB.

    Raises:
        KeyError: No ``habits`` are given, and :data:`netvsp.guest.habits.HABITS` has none for the
            personality.
        AttachError: No version in common, or a step of the handshake was refused.
        RndisError: The device does not tell its address.
        HostRefusedError: A channel or a buffer was refused.
        GuestPanic: The host broke a rule.
    """
    if habits is None:
        habits = HABITS[guest.personality.key]
    adapter = NetvscAdapter(
        guest,
        offer,
        habits,
        mtu=mtu,
        contiguous=contiguous,
        ring_pages=ring_pages,
        receive_size=receive_size,
        send_size=send_size,
    )
    await adapter.start(sub_channels, only=only)
    return adapter

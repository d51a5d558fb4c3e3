"""A VMM without processors, for attach-a-vmm.md: ``python example_vmm.py SOCKET``.

It has what any VMM brings: memory in a memfd, a SynIC, and a delegate. In the place of a guest's
kernel, a few lines do what every driver does first: switch the SynIC on, agree on a version with
the bus, ask for its offers, and leave.
"""

from __future__ import annotations

import struct
import sys
import threading
import uuid

from vmbus.attach.client import Attachment, Done, Region
from vmbus.attach.client.synic import AttachedSynic
from vmbus.errors import AttachError
from vmbus.memory import GuestMemory, create_memfd
from vmbus.synic import Synic
from vmbus.wire import messages as m, synic as wire
from vmbus.wire.versions import Version

RAM_SIZE = 1 << 20
SIMP, SIEFP, INPUT = 0x1000, 0x2000, 0x3000
"""Guest pages: messages, event flags, the input of hypercalls."""
VECTOR = 0xF3


class Vmm:
    """One VM: its memory, its SynIC, and what the server asks of it."""

    def __init__(self) -> None:
        self.memfd = create_memfd("guest-ram", RAM_SIZE)
        self.memory = GuestMemory()
        self.memory.add_region(0, RAM_SIZE, self.memfd)
        self.interrupted = threading.Semaphore(0)
        self.model = Synic(self.memory, 1, self.interrupt)
        self.synic = AttachedSynic(self.model)
        self.model.slot_free = self.synic.queue.retry

    def interrupt(self, vp: int, vector: int) -> None:
        """Interrupt a processor. A real VMM tells its hypervisor."""
        self.interrupted.release()

    # -- vmbus.attach.client.Delegate ----------------------------------------------------------

    def deliver_message(
        self, vp: int, sint: int, message_type: int, payload: bytes, done: Done
    ) -> None:
        """Put a message into its slot, now or at the guest's next EOM."""
        self.synic.deliver(vp, sint, message_type, payload, done)

    def set_flag(self, vp: int, sint: int, flag: int) -> None:
        """Set an event flag and interrupt."""
        self.model.set_flag(vp, sint, flag)

    def event_port_added(self, connection_id: int, flag: int, eventfd: int) -> None:
        """Nothing to do: this SynIC hands every hypercall to the attachment."""

    def event_port_removed(self, connection_id: int, flag: int) -> None:
        """Nothing to do."""

    def call_fd(self, port: int, vp: int, sint: int, flag: int, fd: int | None) -> bool:
        """Leave the eventfd to the attachment, which calls :meth:`set_flag`."""
        return False

    def log(self, text: str) -> None:
        """Show what the server says of the guest."""
        print("server:", text)

    def closed(self, reason: str) -> None:
        """The connection is over."""
        print("closed:", reason)


class Kernel:
    """What a guest's kernel does, on the only processor."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.model = vmm.model

    def start(self) -> None:
        """Switch the SynIC on: where messages and flags go, and which interrupt announces them."""
        self.model.write_msr(0, wire.Msr.SIMP, wire.page_register(SIMP))
        self.model.write_msr(0, wire.Msr.SIEFP, wire.page_register(SIEFP))
        self.model.write_msr(0, wire.Msr.SINT2, VECTOR)

    def post(self, message: m.Message, version: Version | None) -> None:
        """HvPostMessage, on the connection for control messages of 5.0 and later."""
        payload = m.build_message(message, version=version)
        self.vmm.memory.write(INPUT, wire.build_post_message(4, 1, payload))
        control = wire.build_hypercall_input(wire.HypercallCode.POST_MESSAGE)
        status = self.model.hypercall(0, control, INPUT, 0)
        assert status == wire.HvStatus.SUCCESS, hex(status)

    def receive(self) -> bytes:
        """Wait for the interrupt of a message, and take it out of its slot."""
        page = self.vmm.memory.page(SIMP >> 12)
        while True:
            self.vmm.interrupted.acquire()
            slot = wire.parse_message_slot_untrusted(bytes(page[wire.message_slot(2)]))
            if slot.message_type != wire.MESSAGE_NONE:
                page.cast("I")[2 * 64] = wire.MESSAGE_NONE
                self.model.write_msr(0, wire.Msr.EOM, 0)
                return slot.payload


def main(path: str) -> None:
    """Attach a VM to the server at ``path``, and let it see who is there."""
    vmm = Vmm()
    attachment = Attachment.connect(path, vmm, name="example")
    vmm.synic.attach(attachment)
    attachment.vm_info(1, vm_id=uuid.uuid4())
    attachment.set_memory_table([Region(gpa=0, size=RAM_SIZE, fd=vmm.memfd)])
    reader = threading.Thread(target=attachment.run)
    reader.start()
    # Now the guest may run.
    kernel = Kernel(vmm)
    kernel.start()
    contact = m.InitiateContact(
        version=Version.V5_3, target_vp=0, target_info=2, monitor_page_1=0, monitor_page_2=0
    )
    kernel.post(contact, None)
    answer = kernel.receive()
    print("version 5.3:", "agreed" if answer[8] else "refused")
    kernel.post(m.RequestOffers(), Version.V5_3)
    while struct.unpack_from("<I", offer := kernel.receive())[0] == m.OfferChannel.TYPE:
        print("offer: class", uuid.UUID(bytes_le=offer[8:24]))
    kernel.post(m.Unload(), Version.V5_3)
    kernel.receive()
    attachment.goodbye()
    reader.join()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python example_vmm.py SOCKET")
    try:
        main(sys.argv[1])
    except AttachError as error:
        sys.exit(str(error))

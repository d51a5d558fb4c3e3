"""A life of a machine on a KVM that is made up."""

from __future__ import annotations

import os

from tests.support.kvm_fakes import FakeKvm
from vmbus.kvm import api
from vmbus.kvm.life import Life, SynicMode
from vmbus.kvm.outcome import End
from vmbus.kvm.ports import PortBus
from vmbus.memory import allocate_memory


class LifeRig:
    def __init__(self, capabilities=(), mode=SynicMode.AUTO) -> None:
        self.kvm = FakeKvm(capabilities)
        self.memory = allocate_memory(0x10000)
        self.ends: list[End] = []
        try:
            self.life = Life(
                self.memory, 2, PortBus(), self.ends.append,
                mode=mode, path=os.devnull, call=self.kvm,
            )  # fmt: skip
        except BaseException:
            self.memory.close()
            self.kvm.close()
            raise

    def close(self) -> None:
        self.life.close()
        self.life.close()
        self.memory.close()
        self.kvm.close()


USER = (api.CAP_X86_USER_SPACE_MSR, api.CAP_X86_MSR_FILTER)

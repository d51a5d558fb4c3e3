# Starts the second processor, which begins in real mode at 0x11000, and waits for it.
        .include "common.s"
        .set STARTED, 0x5000

start:
        mov dword ptr [STARTED], 0
        mov eax, APIC
        mov dword ptr [rax + 0xf0], 0x1ff
        mov dword ptr [rax + 0x310], 1 << 24    # to APIC id 1
        mov dword ptr [rax + 0x300], 0x4500     # INIT
        mov dword ptr [rax + 0x310], 1 << 24
        mov dword ptr [rax + 0x300], 0x4611     # start at page 0x11
1:      pause
        cmp dword ptr [STARTED], 0x1234
        jne 1b
        EXIT 0

        .org 0x1000
        .code16
        cli
        xor ax, ax
        mov ds, ax
        mov word ptr [STARTED], 0x1234
2:      hlt
        jmp 2b

# Says that it is there, waits for event flag 5, clears it, rings doorbells in both forms, and
# shows each status: 0x11 flag 0 from a register, 0x12 flag 3 from memory, 0x99, which nobody has.
# Ends when a message comes.
        .include "common.s"

start:
        SET_UP_INTERRUPTS
        SET_UP_SYNIC
        mov dword ptr [INPUT], 1                # connection
        mov dword ptr [INPUT + 8], 1            # type
        mov dword ptr [INPUT + 12], 5           # payload size
        mov dword ptr [INPUT + 16], 0x6c6c6568  # "hello"
        mov byte ptr [INPUT + 20], 0x6f
        POST
        SHOW

1:      cli
        lock btr dword ptr [FLAGS2], 5
        jc 2f
        sti
        hlt
        jmp 1b

2:      HYPERCALL 0x1005d, 0x11
        SHOW
        mov rax, 0x0000000300000012
        mov qword ptr [INPUT], rax
        HYPERCALL 0x5d, INPUT
        SHOW
        HYPERCALL 0x1005d, 0x99
        SHOW

3:      cli
        cmp dword ptr [SLOT2], 0
        jne 4f
        sti
        hlt
        jmp 3b
4:      FREE_SLOT
        EXIT 0

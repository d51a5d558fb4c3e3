# Reports twenty crashes, and goes on to EXIT 9 if nobody minds.
        .include "common.s"

start:
        SET_MSR 0x40000103, "offset text"
        SET_MSR 0x40000104, "offset TEXT_SIZE"
        mov ebx, 20
again:
        mov ecx, 0x40000105
        xor eax, eax
        mov edx, 0xc0000000                     # notify, with a message
        wrmsr
        dec ebx
        jnz again
        EXIT 9

text:   .ascii "again"
        .set TEXT_SIZE, . - text

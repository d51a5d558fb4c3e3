# Reports a crash with a text, or goes on to EXIT 9 if nobody takes the report.
        .include "common.s"

start:
        SET_MSR 0x40000103, "offset text"
        SET_MSR 0x40000104, "offset TEXT_SIZE"
        mov ecx, 0x40000105
        xor eax, eax
        mov edx, 0xc0000000                     # notify, with a message
        wrmsr
        EXIT 9

text:   .ascii "the flux capacitor is empty"
        .set TEXT_SIZE, . - text

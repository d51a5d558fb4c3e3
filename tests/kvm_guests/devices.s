# Reads where nobody answers, in memory and on ports; string output; ends with a number.
        .include "common.s"

start:
        mov eax, dword ptr [0xd0000000]
        cmp eax, -1
        jne 1f
        mov dword ptr [0xd0000000], eax
        mov dx, 0x1234
        in ax, dx
        cmp ax, -1
        jne 1f
        mov dx, SERIAL_PORT
        lea rsi, [rip + text]
        mov ecx, text_end - text
        rep outsb
        EXIT 7
1:      EXIT 1

text:   .ascii "strings work"
text_end:

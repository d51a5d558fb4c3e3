# Counts its lives in memory; resets the machine through port 0xcf9 in the first two.
        .include "common.s"
        .set LIVES, 0x50000

start:
        inc dword ptr [LIVES]
        cmp dword ptr [LIVES], 3
        je 1f
        mov dx, 0xcf9
        mov al, 6
        out dx, al
        hlt
1:      mov eax, 0x3400                         # SLP_TYP 5, SLP_EN: power off
        mov dx, 0x604
        out dx, ax
        hlt

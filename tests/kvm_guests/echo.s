# Sends back what comes in on the serial port, until a "q" comes. Runs at any address.
        .include "common.s"

start:
        mov dx, SERIAL_PORT + 4                 # MCR: RTS and OUT2, or nobody sends
        mov al, 10
        out dx, al
1:      mov dx, SERIAL_PORT + 5                 # LSR
        in al, dx
        test al, 1
        jz 1b
        mov dx, SERIAL_PORT
        in al, dx
        out dx, al
        cmp al, 'q'
        jne 1b
        mov eax, 0x3400                         # power off
        mov dx, 0x604
        out dx, ax
        hlt

# Makes contact with VMBus as version 4.0, shows the answer's first 16 bytes on the serial port,
# asks for all offers and counts messages until the last one has come.
        .include "common.s"

start:
        SET_UP_INTERRUPTS
        SET_UP_SYNIC
        mov edi, INPUT
        lea rsi, [rip + initiate_contact]
        mov ecx, 56 / 4
        rep movsd
        POST
        test rax, rax
        jnz refused
        call wait_for_message
        # The answer.
        mov rsi, SLOT2 + 16
        mov ecx, 16
        mov dx, SERIAL_PORT
1:      lodsb
        out dx, al
        loop 1b
        FREE_SLOT

        mov edi, INPUT
        lea rsi, [rip + request_offers]
        mov ecx, 24 / 4
        rep movsd
        POST
        test rax, rax
        jnz refused
next:
        call wait_for_message
        mov ebx, dword ptr [SLOT2 + 16]
        FREE_SLOT
        mov eax, ebx
        mov dx, SERIAL_PORT
        out dx, al
        cmp ebx, 4                              # ALL_OFFERS_DELIVERED
        jne next
        EXIT 0

refused:
        EXIT eax

wait_for_message:
        cli
        cmp dword ptr [SLOT2], 0
        jne 1f
        sti
        hlt
        jmp wait_for_message
1:      ret

initiate_contact:
        .long 1, 0, 1, 40                       # connection, reserved, type, payload size
        .long 14, 0                             # INITIATE_CONTACT
        .long 0x40000, 0                        # version 4.0, target VP 0
        .quad 0                                 # interrupt page
        .quad 0, 0                              # monitor pages

request_offers:
        .long 1, 0, 1, 8
        .long 3, 0                              # REQUEST_OFFERS

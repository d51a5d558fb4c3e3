# What the tiny guests share. They begin at 0x10000 in 64-bit mode, with the first 4 GiB mapped
# to themselves, the stack below 0x9000 and a writable scratch area from 0x30000 on.
#
#   0x30000  hypercall page      0x31000  SIM page     0x32000  SIEF page
#   0x33000  hypercall input     0x34000  IDT          0x35000  results
        .intel_syntax noprefix
        .set HYPERCALL_PAGE, 0x30000
        .set SIMP, 0x31000
        .set SIEFP, 0x32000
        .set INPUT, 0x33000
        .set IDT, 0x34000
        .set RESULTS, 0x35000
        .set SLOT2, SIMP + 2 * 256
        .set FLAGS2, SIEFP + 2 * 256
        .set VECTOR, 0xf3
        .set APIC, 0xfee00000
        .set EXIT_PORT, 0xf4
        .set SERIAL_PORT, 0x3f8

        .macro SET_MSR msr, value
        mov ecx, \msr
        mov eax, \value
        xor edx, edx
        wrmsr
        .endm

# Ends the machine with a number; 0 is success.
        .macro EXIT code
        mov eax, \code
        mov dx, EXIT_PORT
        out dx, eax
        hlt
        .endm

# Sets up the local APIC and a handler for VECTOR that counts in RESULTS.
        .macro SET_UP_INTERRUPTS
        lea rax, [rip + handler]
        mov rdi, IDT + VECTOR * 16
        mov word ptr [rdi], ax
        mov word ptr [rdi + 2], 0x10
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov word ptr [rdi + 6], ax
        shr rax, 16
        mov dword ptr [rdi + 8], eax
        lidt [rip + idt_pointer]
        mov eax, APIC
        mov dword ptr [rax + 0xf0], 0x1ff       # spurious vector 255, APIC on
        .endm

# Says what the guest is, and switches hypercalls and SynIC on.
        .macro SET_UP_SYNIC
        SET_MSR 0x40000000, 0x8100
        SET_MSR 0x40000001, HYPERCALL_PAGE + 1
        SET_MSR 0x40000083, SIMP + 1
        SET_MSR 0x40000082, SIEFP + 1
        SET_MSR 0x40000092, VECTOR
        SET_MSR 0x40000080, 1
        .endm

# Calls the hypercall page; leaves the status in RAX.
        .macro HYPERCALL control, input
        mov rcx, \control
        mov rdx, \input
        xor r8d, r8d
        mov rax, HYPERCALL_PAGE
        call rax
        .endm

# Shows the low byte of RAX on the serial port.
        .macro SHOW
        mov dx, SERIAL_PORT
        out dx, al
        .endm

# HvPostMessage with the 256 bytes at INPUT; leaves the status in RAX.
        .macro POST
        HYPERCALL 0x5c, INPUT
        .endm

# Frees slot 2 as guests do: type 0, then EOM if another message waits.
        .macro FREE_SLOT
        mov dword ptr [SLOT2], 0
        mfence
        test byte ptr [SLOT2 + 5], 1
        jz 9f
        SET_MSR 0x40000084, 0
9:
        .endm

        jmp start

handler:
        push rax
        lock inc dword ptr [RESULTS]
        mov eax, APIC
        mov dword ptr [rax + 0xb0], 0           # EOI
        pop rax
        iretq

idt_pointer:
        .word 0xfff
        .quad IDT

# Accesses MSRs that are not there or do not take the value, and counts the #GPs in RESULTS + 4.
# Shows the count and what it can read.
        .include "common.s"

start:
        lea rax, [rip + protection_fault]
        mov rdi, IDT + 13 * 16
        mov word ptr [rdi], ax
        mov word ptr [rdi + 2], 0x10
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov word ptr [rdi + 6], ax
        shr rax, 16
        mov dword ptr [rdi + 8], eax
        lidt [rip + idt_pointer]

        SET_MSR 0x40000092, 5                   # an exception's vector: #GP
        SET_MSR 0x40000092, 0x10005             # masked it may have that
        mov ecx, 0x400001f0                     # no such register: #GP
        rdmsr
        SET_MSR 0x400001f0, 0                   # #GP
        mov eax, dword ptr [RESULTS + 4]
        SHOW
        mov ecx, 0x40000002                     # VP index
        rdmsr
        SHOW
        mov ecx, 0x40000092                     # SINT2
        rdmsr
        SHOW
        mov eax, 0x40000000
        cpuid
        mov eax, ebx                            # "Micr"
        SHOW
        EXIT 0

protection_fault:
        add rsp, 8                              # the error code
        add qword ptr [rsp], 2                  # RDMSR and WRMSR have two bytes
        inc dword ptr [RESULTS + 4]
        iretq

# An exception without a handler, without a handler for that, and so on.
        .include "common.s"

start:
        lidt [rip + nothing]
        ud2

nothing:
        .word 0
        .quad 0

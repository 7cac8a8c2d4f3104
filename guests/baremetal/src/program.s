# The program, in 32-bit code at 0x100000. See lib.rs for what it prints.
#
# AT(label) is where a label lies in the guest. Variables lie behind the file's bytes:
#   0x110000 interrupt table    0x111000 ticks       0x111004 in service at a tick
#   0x111008 serial interrupts  0x120000 stack's end

.macro say label
    movl $(\label - dunlin_baremetal_start + 0x100000), %esi
    call print
.endm

.macro gate vector, label
    movl $(\label - dunlin_baremetal_start + 0x100000), %eax
    movl %eax, %ecx
    andl $0x0000ffff, %eax
    orl $0x00080000, %eax
    movl %eax, (0x110000 + 8 * \vector)
    andl $0xffff0000, %ecx
    orl $0x00008e00, %ecx
    movl %ecx, (0x110004 + 8 * \vector)
.endm

.macro put port, value
    movb $\value, %al
    outb %al, $\port
.endm

.section .rodata.dunlin_baremetal, "a", @progbits
.balign 16
.global dunlin_baremetal_start
dunlin_baremetal_start:
.code32
    .long 0x1badb002
    .long 3
    .long -(0x1badb002 + 3)
    .long 0

    # The entry.
    movl $0x120000, %esp
    movl %eax, %ebp
    movl %ebx, %edi
    lgdt (table_register - dunlin_baremetal_start + 0x100000)
    ljmp $8, $(with_segments - dunlin_baremetal_start + 0x100000)
with_segments:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss

    say magic_text
    movl %ebp, %eax
    call print_number
    call end_line

    say command_text
    movl 16(%edi), %esi
    call print
    call end_line

    # Modules: size, sum of the bytes, text.
    movl 20(%edi), %ebp
    movl 24(%edi), %ebx
next_module:
    testl %ebp, %ebp
    jz no_more_modules
    say module_text
    movl 4(%ebx), %eax
    subl (%ebx), %eax
    call print_number
    call space
    movl (%ebx), %esi
    xorl %eax, %eax
    xorl %ecx, %ecx
next_byte:
    cmpl 4(%ebx), %esi
    jae summed
    movb (%esi), %cl
    addl %ecx, %eax
    incl %esi
    jmp next_byte
summed:
    call print_number
    call space
    movl 8(%ebx), %esi
    call print
    call end_line
    addl $16, %ebx
    decl %ebp
    jmp next_module
no_more_modules:

    say lower_text
    movl 4(%edi), %eax
    call print_number
    call space
    movl 8(%edi), %eax
    call print_number
    call end_line

    # The memory map: start, size, kind.
    movl 48(%edi), %ebx
    movl 44(%edi), %ebp
    addl %ebx, %ebp
next_range:
    cmpl %ebp, %ebx
    jae no_more_ranges
    say map_text
    movl 8(%ebx), %eax
    call print_number
    movl 4(%ebx), %eax
    call print_number
    call space
    movl 16(%ebx), %eax
    call print_number
    movl 12(%ebx), %eax
    call print_number
    call space
    movl 20(%ebx), %eax
    call print_number
    call end_line
    addl (%ebx), %ebx
    addl $4, %ebx
    jmp next_range
no_more_ranges:

    # A command line that ends with "short" ends the program here.
    movl 16(%edi), %esi
to_end:
    lodsb
    testb %al, %al
    jnz to_end
    cmpl $0x74726f68, -5(%esi)
    je finish

    # Both controllers: edges, vectors from 0x20, slave at line 2, all but line 0 masked.
    put 0x20, 0x11
    put 0xa0, 0x11
    put 0x21, 0x20
    put 0xa1, 0x28
    put 0x21, 0x04
    put 0xa1, 0x02
    put 0x21, 0x01
    put 0xa1, 0x01
    put 0x21, 0xfe
    put 0xa1, 0xff
    gate 0x20, tick
    gate 0x24, serial
    lidt (interrupt_register - dunlin_baremetal_start + 0x100000)

    # Channel 0: mode 2, 100 times a second.
    put 0x43, 0x34
    put 0x40, 0x9c
    put 0x40, 0x2e
    sti
wait_for_ticks:
    cli
    cmpl $10, 0x111000
    jae ticked
    sti
    hlt
    jmp wait_for_ticks
ticked:
    put 0x21, 0xff
    say ticks_text
    movl 0x111000, %eax
    call print_number
    call space
    movl 0x111004, %eax
    call print_number
    call end_line

    # Channel 2: mode 0, a millisecond, seen at port 0x61. Its output falls with the mode.
    inb $0x61, %al
    andb $0xfc, %al
    orb $0x01, %al
    outb %al, $0x61
    put 0x43, 0xb0
    inb $0x61, %al
    andl $0x20, %eax
    movl %eax, %ebx
    put 0x42, 0xa9
    put 0x42, 0x04
wait_for_output:
    inb $0x61, %al
    testb $0x20, %al
    jz wait_for_output
    say output_text
    movl %ebx, %eax
    call print_number
    call end_line

    # The serial port's empty transmitter is line 4.
    put 0x21, 0xef
    movw $0x3fc, %dx
    movb $0x0b, %al
    outb %al, %dx
    movw $0x3f9, %dx
    movb $0x02, %al
    outb %al, %dx
    sti
wait_for_serial:
    cli
    cmpl $1, 0x111008
    jae served
    sti
    hlt
    jmp wait_for_serial
served:
    put 0x21, 0xff
    say serial_text
    movl 0x111008, %eax
    call print_number
    call end_line

finish:
    say end_text
    movw $0xf4, %dx
    movb $0x10, %al
    outb %al, %dx
    cli
    hlt
    jmp finish

tick:
    pushl %eax
    put 0x20, 0x0b
    xorl %eax, %eax
    inb $0x20, %al
    movl %eax, 0x111004
    put 0x20, 0x20
    incl 0x111000
    popl %eax
    iret

serial:
    pushl %eax
    pushl %edx
    movw $0x3fa, %dx
    inb %dx, %al
    movw $0x3f9, %dx
    xorb %al, %al
    outb %al, %dx
    put 0x20, 0x64
    incl 0x111008
    popl %edx
    popl %eax
    iret

# Prints the text at ESI.
print:
    pushl %eax
print_next:
    lodsb
    testb %al, %al
    jz printed
    call print_byte
    jmp print_next
printed:
    popl %eax
    ret

space:
    movb $0x20, %al
    jmp print_byte

end_line:
    movb $0x0a, %al

# Prints AL.
print_byte:
    pushl %edx
    pushl %eax
    movw $0x3fd, %dx
print_wait:
    inb %dx, %al
    testb $0x20, %al
    jz print_wait
    popl %eax
    movw $0x3f8, %dx
    outb %al, %dx
    popl %edx
    ret

# Prints EAX as eight digits.
print_number:
    pushl %ecx
    pushl %edx
    movl %eax, %edx
    movl $8, %ecx
print_digit:
    roll $4, %edx
    movb %dl, %al
    andb $0x0f, %al
    addb $0x30, %al
    cmpb $0x3a, %al
    jb print_decimal
    addb $0x27, %al
print_decimal:
    call print_byte
    loop print_digit
    popl %edx
    popl %ecx
    ret

.balign 8
segment_table:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
table_register:
    .word 23
    .long segment_table - dunlin_baremetal_start + 0x100000
interrupt_register:
    .word 0x7ff
    .long 0x110000

magic_text: .asciz "magic "
command_text: .asciz "command line "
module_text: .asciz "module "
lower_text: .asciz "memory "
map_text: .asciz "map "
ticks_text: .asciz "ticks "
output_text: .asciz "output "
serial_text: .asciz "serial interrupts "
end_text: .asciz "end\n"

.global dunlin_baremetal_end
dunlin_baremetal_end:
.code64
.text

// board.c - what the firmware needs of a Cortex-M4 (QEMU's mps2-an386): vectors, floating point on, data copied, stack
// painted; lines and the exit code go to the debugger (semihosting).
#include <stddef.h>
#include <stdint.h>

extern uint32_t data_from[], data_begin[], data_end[], bss_begin[], bss_end[], stack_low[], stack_high[];
int main(void);
void put_line(const char *text);
void reset(void);
void fault(void);

static void debugger(int what, const void *about) {
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = about;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}
void put_line(const char *text) {
    debugger(4, text);
    debugger(4, "\n");
}
static void leave(int code) {
    uint32_t about[2] = {0x20026, (uint32_t)code}; // the application's own exit
    debugger(0x20, about);
    for (;;) {}
}
void fault(void) { leave(255); }

// The stack that main used, of what was painted.
static void put_stack(void) {
    char line[] = "stack 000000";
    uint32_t *low = stack_low;
    while (low < stack_high && *low == 0xa5a5a5a5u) low++;
    uint32_t used = (uint32_t)((char *)stack_high - (char *)low);
    for (int i = 11; i > 5; i--, used /= 10) line[i] = (char)('0' + used % 10);
    put_line(line);
}
void reset(void) {
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; // CPACR: the floating-point unit
    __asm__ volatile("dsb\n isb");
    for (uint32_t *to = data_begin, *from = data_from; to < data_end;) *to++ = *from++;
    for (uint32_t *to = bss_begin; to < bss_end;) *to++ = 0;
    uint32_t *here = (uint32_t *)__builtin_frame_address(0) - 16;
    for (uint32_t *to = stack_low; to < here;) *to++ = 0xa5a5a5a5u;
    int code = main();
    put_stack();
    leave(code);
}
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_high, (const void *)reset, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault,
};

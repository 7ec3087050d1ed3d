#!/bin/sh
# The embedded developer's session (docs/embedded.md): a layer is trained here, exported to const arrays and to the
# bytes of a file, built for a Cortex-M4 that has this one desc, and run under QEMU with the same bits. Code, RAM
# and stack are printed (make sizes) and held. The last line is "N passed, N failed[, N skipped]".
cd "$(dirname "$0")/../.." || exit 1
suite=embedded
. tests/lib/check.sh
in=examples/embedded
# shellcheck disable=SC2086 # a list of words
desktop() { $cc -std=c99 -Wall -Wextra -Werror -Wno-unused -O1 -I. -I"$tmp" $2 $in/"$1".c -o "$tmp/$1" -lm; }

# ---- on the desktop: train, export, and try the firmware's programs ----
check "the desktop's part" desktop train -DMOE_NO_SIMD
[ "$failed" -eq 0 ] || finish
check "it trains and exports" sh -c "'$tmp/train' '$tmp' >'$tmp/want'"
check "outputs of 3 tokens" [ "$(wc -l <"$tmp/want")" -eq 24 ]
for program in flash file; do
    check "$program compiles" desktop $program
    check "$program gives the same bits here" sh -c "'$tmp/$program' | cmp - '$tmp/want'"
done

# ---- what a small build leaves out is refused ----
cat >"$tmp/refused.c" <<'END'
#define MOE_STATIC
#define MOE_NO_TRAINING
#define MOE_ONLY_GATE MOE_GATE_SOFTMAX
#define MOE_ONLY_EXPERT MOE_EXPERT_SWIGLU
#include "examples/embedded/model_of.h"
static int refused(moe_desc desc) {
    size_t bytes;
    return moe_tape_size(&desc, 1, MOE_OFF, &bytes) == MOE_E_ONLY;
}
int main(void) {
    moe_desc whole = model_desc(), gate = whole, expert = whole, training = whole;
    size_t bytes;
    gate.gate = MOE_GATE_SIGMOID, expert.expert = MOE_EXPERT_RELU, training.training = MOE_ON;
    return moe_tape_size(&whole, 1, MOE_OFF, &bytes) || !refused(gate) || !refused(expert) || !refused(training);
}
END
cat >"$tmp/only.c" <<'END'
#define MOE_STATIC
#include "plan.h"
#include "examples/embedded/model_of.h"
int main(void) {
    moe_desc desc = model_desc();
    size_t bytes;
    return moe_tape_size(NULL, 1, MOE_OFF, &bytes) || moe_tape_size(&desc, 1, MOE_OFF, &bytes) != MOE_E_ONLY;
}
END
check "a program that asks for more compiles" $cc -std=c99 -w -I. "$tmp/refused.c" -o "$tmp/refused" -lm
check "and is refused" "$tmp/refused"
check "so does one that gives a desc to the build that has its own" $cc -std=c99 -w -I. -I"$tmp" "$tmp/only.c" -o \
    "$tmp/only" -lm
check "which is refused too" "$tmp/only"

# ---- on the Cortex-M4 ----
if ! command -v arm-none-eabi-gcc >/dev/null 2>&1; then
    skip "the Cortex-M4" "no arm-none-eabi-gcc (Debian: gcc-arm-none-eabi, libnewlib-arm-none-eabi)"
    finish
fi
firmware() {
    arm-none-eabi-gcc -std=c99 -mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 -Os -ffunction-sections \
        -fdata-sections -Wl,--gc-sections -nostartfiles --specs=nano.specs --specs=nosys.specs -I. -I"$tmp" \
        -T $in/board.ld $in/"$1".c $in/board.c -o "$tmp/$1.elf" -lm
}
arrays=0 # bytes of the weights and tokens, which are no code
size_of() { arm-none-eabi-nm -S "$1" | awk -v name="$2" '$4 == name { print $2 }'; }
for program in flash file; do
    check "$program for the Cortex-M4" firmware $program
    arrays=0
    for name in router experts tokens model; do
        bytes=$(size_of "$tmp/$program.elf" $name)
        [ -n "$bytes" ] && arrays=$((arrays + 0x$bytes))
    done
    code=$(($(arm-none-eabi-size -A "$tmp/$program.elf" | awk '$1 == ".text" { print $2 }') - arrays))
    ram=$(arm-none-eabi-size -A "$tmp/$program.elf" | awk '$1 == ".data" || $1 == ".bss" { n += $2 } END { print n }')
    stack=-
    if command -v qemu-system-arm >/dev/null 2>&1; then
        timeout 120 qemu-system-arm -M mps2-an386 -nographic -monitor none -serial none -semihosting \
            -kernel "$tmp/$program.elf" >"$tmp/out" 2>&1 </dev/null
        check "$program ends well under QEMU: $?" [ $? -eq 0 ]
        stack=$(sed -n 's/^stack 0*//p' "$tmp/out")
        check "$program gives the same bits under QEMU" sh -c "grep -v '^stack' '$tmp/out' | cmp - '$tmp/want'"
    else
        skip "$program under QEMU" "no qemu-system-arm"
    fi
    printf 'sizes: %-6s code %6d   weights %6d   RAM %6d   stack %s\n' $program "$code" $arrays "$ram" "$stack"
    case $program in
        flash)
            check "flash: code" [ "$code" -le 14600 ]
            check "flash: RAM" [ "$ram" -le 17000 ]
            most_stack=3584
            ;;
        *)
            check "file: RAM" [ "$ram" -le 80000 ]
            most_stack=7168
            ;;
    esac
    [ "$stack" = - ] || check "$program: stack" [ "$stack" -le $most_stack ]
done
finish

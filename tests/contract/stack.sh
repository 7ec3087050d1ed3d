#!/bin/sh
# What gcc says of moe.h at -O2: no warning, and how much stack its functions use: at most 4 KB each, but for three that
# docs/manual.md names.
# The last line is "N passed, N failed[, N skipped]".
cd "$(dirname "$0")/../.." || exit 1
suite=stack
. tests/lib/check.sh
if ! command -v gcc >/dev/null 2>&1; then
    echo "skipped stack: no gcc"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
warnings='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'
# shellcheck disable=SC2086 # words
check "compiles without a warning" gcc -std=c99 -O2 $warnings -fstack-usage -I. \
    -c tests/contract/compile/implementation.c -o "$tmp/moe.o"
# FUNCTION BYTES [dynamic], without the suffixes of gcc's clones
awk -F '\t' '{ n = split($1, part, ":"); sub(/\..*/, "", part[n]); print part[n], $2, $3 }' "$tmp/moe.su" |
    sort -k 2,2nr >"$tmp/stack"
over() { # the functions above BYTES that are not in the list
    awk -v most="$1" -v list="$2" '$2 > most && list !~ " " $1 " " { print; bad = 1 } END { exit bad }' "$tmp/stack"
}
check "no function uses more than 4 KB" over 4096 \
    " moe__loss_gram moe_game_add_null moe__kernel_topk_block_avx2 moe__kernel_topk_block_avx512 \
      moe__kernel_topk_block_neon "
check "and these not more than 28 KB" over 28672 " "
unbounded() { ! grep 'dynamic$' "$tmp/stack"; }
check "none has an array of variable length" unbounded
check "there are functions" [ "$(wc -l <"$tmp/stack")" -gt 300 ]
finish

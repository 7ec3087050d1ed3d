#!/bin/sh
# Arithmetic that is not as it is written is refused, by the compiler or at start; a wrong fmaf is noticed and our own
# is right; and where clang may fuse every product with a sum, none is that could round otherwise.
# The last line is "N passed, N failed".
cd "$(dirname "$0")/../.." || exit 1
suite=arithmetic
. tests/lib/check.sh

build() { # COMPILER OPTION...
    compiler=$1
    shift
    "$compiler" -w -DMOE_NO_SIMD "$@" -I. tests/contract/compile/arithmetic.c -o "$tmp/program" -lm
}
accepted() { build "$@" && "$tmp/program"; }
refused() { # while compiling, or at start
    if ! build "$@" >"$tmp/refusal" 2>&1; then grep 'error.*fast-math' "$tmp/refusal"; return; fi
    "$tmp/program"
    [ $? -eq 3 ]
}

# shellcheck disable=SC2086 # options are words
for compiler in gcc clang; do
    command -v $compiler >/dev/null 2>&1 || continue
    for options in '-std=c99 -O0' '-std=c99 -O2 -UMOE_NO_SIMD' '-std=gnu11 -O2 -ffp-contract=fast'; do
        check "$compiler $options computes as it should" accepted $compiler $options
    done
    for options in -funsafe-math-optimizations -freciprocal-math -fno-signed-zeros \
        '-fassociative-math -fno-signed-zeros -fno-trapping-math' -ffinite-math-only -ffast-math; do
        check "$compiler $options is refused" refused $compiler -O2 $options
    done
    check "$compiler: an fmaf that rounds twice is noticed" refused $compiler -O2 -DWRONG_FMAF
    check "$compiler: MOE_SOFT_FMA does without it" accepted $compiler -O2 -DMOE_SOFT_FMA -DWRONG_FMAF
    check "$compiler: MOE_SOFT_FMA, not optimised" accepted $compiler -O0 -DMOE_SOFT_FMA
done

# ---- no product is fused with a sum outside moe__fma ----
# With fmaf a function that the compiler does not know, each fused instruction that is left was made by it. One may
# stand where the product is exact ("/* exact */"), and in the diagnostics, which are outside the contract.
fused() {
    printf '%s\n' '#include <math.h>' 'float other(float, float, float);' '#define fmaf other' \
        '#define MOE_IMPLEMENTATION' '#include "moe.h"' >"$tmp/unknown.c"
    clang -O2 -march=haswell -ffp-contract=fast -fno-math-errno -DMOE_NO_SIMD -g1 -I. -S "$tmp/unknown.c" \
        -o "$tmp/unknown.s" || return 1
    awk '/\.loc\t/ { line = $3 } /\tvfn?m(add|sub)/ && line > 0 { print line }' "$tmp/unknown.s" | sort -n | uniq \
        >"$tmp/lines"
    awk -v lines="$tmp/lines" '
        BEGIN { while ((getline line <lines) > 0) fused[line] = 1 }
        /==== >>health ==/ { outside = 1 }
        /==== >>desc ==/ { outside = 0 }
        FNR in fused && !outside && !/\/\* exact \*\// { print FNR ": " $0; bad = 1 }
        END { exit bad }' moe.h && [ -s "$tmp/lines" ]
}
if command -v clang >/dev/null 2>&1 && [ "$(uname -m)" = x86_64 ]; then
    check "clang -ffp-contract=fast fuses nothing that rounds" fused
fi

# ---- WebAssembly's vectors have no fma: theirs is made of double's ----
wasm() {
    clang-19 --target=wasm32-wasi -O1 -w "$@" -I. tests/contract/compile/arithmetic.c -o "$tmp/program" -lm &&
        node --no-warnings --experimental-wasi-unstable-preview1 tests/lib/wasi.mjs "$tmp/program"
}
echo 'int main(void) { return 0; }' >"$tmp/hello.c"
if command -v node >/dev/null 2>&1 && clang-19 --target=wasm32-wasi "$tmp/hello.c" -o "$tmp/hello" 2>/dev/null; then
    check "WebAssembly's SIMD128 computes as it should" wasm -msimd128
fi

finish

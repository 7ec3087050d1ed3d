#!/bin/sh
# The page: one HTML file with the WebAssembly in it, which opens from a folder as from a server.
#
#     examples/browser/build.sh [FOLDER [OPTION...]]   FOLDER/index.html and .wasm, default build/browser; options for
#                                                      the compiler, default -msimd128 (-DMOE_NO_SIMD: scalar code)
#     examples/browser/build.sh --compiler             prints the compiler that it would use
#
# Needs clang with lld and a C library for WebAssembly. Debian: clang-19 lld-19 libclang-rt-19-dev-wasm32 wasi-libc.
# WASM_CC: that compiler, or wasi-sdk's clang.
cd "$(dirname "$0")/../.." || exit 1
source=examples/browser
makes() { # COMPILER: can it?
    command -v "$1" >/dev/null 2>&1 && echo '#include <math.h>
        double page(double x) { return exp(x); }' |
        "$1" --target=wasm32-wasi -x c - -nostartfiles -Wl,--no-entry -Wl,--export=page -lm -o /dev/null 2>/dev/null
}
compiler=
for each in ${WASM_CC:-clang-19 clang clang-20 clang-18 clang-17 clang-16 clang-15 clang-14}; do
    if makes "$each"; then compiler=$each && break; fi
done
if [ -z "$compiler" ]; then
    echo "no compiler for the page: it needs clang, lld and wasi-libc" >&2
    echo "(Debian: clang-19 lld-19 libclang-rt-19-dev-wasm32 wasi-libc)" >&2
    exit 1
fi
[ "${1:-}" != --compiler ] || { echo "$compiler"; exit 0; }

folder=${1:-build/browser}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- -msimd128
mkdir -p "$folder" || exit 1
"$compiler" --target=wasm32-wasi -std=c99 -Os -Wall -Wextra -nostartfiles -Wl,--no-entry -Wl,--gc-sections \
    -Wl,--strip-all -Wl,-z,stack-size=131072 "$@" -I. $source/browser.c -lm -o "$folder/browser.wasm" || exit 1
# the bytes where the page has their mark
base64 "$folder/browser.wasm" | tr -d '\n' >"$folder/browser.base64"
awk -v bytes="$folder/browser.base64" '
    /@WASM@/ { getline module <bytes; sub(/@WASM@.*/, ""); printf "%s%s", $0, module; print "\";"; next }
    { print }' $source/index.html >"$folder/index.html" && rm "$folder/browser.base64"

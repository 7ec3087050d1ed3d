#!/bin/sh
# Builds tests/contract/golden.c with every compiler and option set that should make no difference, natively and for
# other processors under qemu, and holds each build against tests/contract/golden/golden.txt: the same bits everywhere.
# The last line is "N passed, N failed[, N skipped]". To make the file anew: build/golden/gcc-O0
# >tests/contract/golden/golden.txt. ROWS=gcc (default: what needs no more than gcc), more (the others), or all.
cd "$(dirname "$0")/../.." || exit 1
dir=${BUILD:-build}/golden
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}

# One build: NAME RUNNER COMPILER OPTION...; RUNNER "-" means that it runs as it is.
if [ "${1:-}" = --one ]; then
    shift
    name=$1 runner=$2
    shift 2
    [ "$runner" = - ] && runner=
    if "$@" -I. -Itests/lib tests/contract/golden.c -o "$dir/$name" -lm >"$dir/$name.log" 2>&1 &&
        $runner "$dir/$name" --check tests/contract/golden/golden.txt >>"$dir/$name.log" 2>&1; then
        echo passed >"$dir/$name.result"
    else
        echo failed >"$dir/$name.result"
    fi
    exit 0
fi

mkdir -p "$dir" || exit 1
rm -f "$dir"/*.result "$dir"/*.log
list=$dir/list
: >"$list"
skipped=0
skip() {
    skipped=$((skipped + 1))
    echo "skipped $1: $2"
}

# Can this compiler, with these options, make a program that its runner can run?
works() {
    with=$1
    shift
    [ "$with" = - ] && with=
    printf '#include <math.h>\n#include <stdio.h>\nint main(void) { puts("ok"); return (int)floor(0.5); }\n' \
        >"$dir/hello.c"
    "$@" "$dir/hello.c" -o "$dir/hello" -lm >/dev/null 2>&1 && [ "$($with "$dir/hello" 2>/dev/null)" = ok ]
}

add() {
    name=$1 runner=$2
    shift 2
    if ! command -v "$1" >/dev/null 2>&1; then skip "$name" "no $1 here"
    elif [ "$runner" != - ] && ! command -v "$runner" >/dev/null 2>&1; then skip "$name" "no $runner here"
    elif ! works "$runner" "$@"; then skip "$name" "$* cannot build a program that runs here"
    else echo "$name $runner $*" >>"$list"
    fi
}

# the hardest: contracted wherever the compiler likes, and the processor has the instruction
hardest='-O2 -march=native -ffp-contract=fast'
# shellcheck disable=SC2086 # options are words
rows_of() { # the rows that both compilers have: COMPILER
    add $1-O2 - $1 -std=c99 -O2
    add $1-O2-flto - $1 -std=c99 -O2 -flto
    add $1-O2-fopenmp - $1 -std=c99 -O2 -fopenmp
    add $1-soft-fma - $1 -std=c99 -O1 -DMOE_SOFT_FMA
}
# shellcheck disable=SC2086
rows_gcc() { # the two ends; what lies between them is in the other rows, with what needs more than gcc
    add gcc-O0 - gcc -std=c99 -O0
    add gcc-O1-native - gcc -std=gnu11 $hardest -O1
    # every new gradient past the caches; no atomic counters: each step a parallel region
    add gcc-stream - gcc -std=c99 -O1 -fopenmp -DMOE__STREAM=0 -U__GCC_ATOMIC_POINTER_LOCK_FREE
}
# shellcheck disable=SC2086
rows_more() {
    rows_of gcc
    rows_of clang
    add gcc-O3-native - gcc -std=gnu11 $hardest -O3
    add g++-O2 - g++ -x c++ -std=c++11 -O2
    add clang-O2-native - clang -std=c99 $hardest
    add clang-O3-native - clang -std=gnu11 $hardest -O3
    add clang-soft-fma-native - clang -std=c99 $hardest -DMOE_SOFT_FMA
    add clang++-O3-native - clang++ -x c++ -std=c++11 -O3 -march=native
    add i686-O2 - i686-linux-gnu-gcc -std=c99 -O2 -msse2 -mfpmath=sse -static
    add i686-soft-fma - i686-linux-gnu-gcc -std=c99 -O1 -msse2 -mfpmath=sse -static -DMOE_SOFT_FMA
    add aarch64-O3 qemu-aarch64 aarch64-linux-gnu-gcc -std=c99 -O3 -ffp-contract=fast -static
    add aarch64-clang-O2 qemu-aarch64 clang --target=aarch64-linux-gnu -std=c99 -O2 -static
    add arm-O2 qemu-arm arm-linux-gnueabihf-gcc -std=c99 -O2 -static
    add arm-neon-O3 qemu-arm arm-linux-gnueabihf-gcc -std=c99 -O3 -mfpu=neon-vfpv4 -ffp-contract=fast -static
}
case ${ROWS:=gcc} in
    all) rows_gcc && rows_more ;;
    *) "rows_$ROWS" ;;
esac

xargs -P "$jobs" -L 1 sh tests/contract/golden.sh --one <"$list"

passed=0 failed=0
while read -r name rest; do
    if [ "$(cat "$dir/$name.result" 2>/dev/null)" = passed ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $name ($rest):"
        tail -n 15 "$dir/$name.log"
    fi
done <"$list"
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
[ "$failed" -eq 0 ]

#!/bin/sh
# Builds tests/contract/golden.c with every compiler and option set that should make no difference, natively and for
# other
# processors under qemu, and holds each build against tests/contract/golden/golden.txt: the same bits everywhere.
# The last line is "N passed, N failed[, N skipped]". To make the file anew: build/golden/gcc-O2
# >tests/contract/golden/golden.txt
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

for cc in gcc clang; do
    # the third is the hardest: GNU mode contracts by default, and the processor has the instruction
    for options in '-std=c99 -O0' '-std=c99 -O2' '-std=gnu11 -O3 -march=native -ffp-contract=fast' \
        '-std=c99 -O2 -flto' '-std=c99 -O2 -fopenmp'; do
        name=$cc$(echo " ${options#-std=c99}" | tr -d ' =')
        # shellcheck disable=SC2086 # options are words
        add "$name" - $cc $options
    done
done
add g++-O2 - g++ -x c++ -std=c++11 -O2
add clang++-O3-native - clang++ -x c++ -std=c++11 -O3 -march=native
add aarch64-O2 qemu-aarch64 aarch64-linux-gnu-gcc -std=c99 -O2 -static
add aarch64-O3 qemu-aarch64 aarch64-linux-gnu-gcc -std=c99 -O3 -ffp-contract=fast -static
add aarch64-clang-O2 qemu-aarch64 clang --target=aarch64-linux-gnu -std=c99 -O2 -static
add arm-O2 qemu-arm arm-linux-gnueabihf-gcc -std=c99 -O2 -static
add arm-neon-O3 qemu-arm arm-linux-gnueabihf-gcc -std=c99 -O3 -mfpu=neon-vfpv4 -ffp-contract=fast -static

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

#!/bin/sh
# The suites that have to do with bytes, whole, where bytes stand the other way round (s390x) and where size_t has 32
# bits (i386, armhf), under qemu-user: numbers in files, their sizes, what is packed from the arrays of others, and the
# fuzzers' corpus.
# The last line is "N passed, N failed[, N skipped]": of tests, of all suites.
#
#     tests/long/suites.sh [TARGET...]     s390x, i386, armhf (default: all)
cd "$(dirname "$0")/../.." || exit 1
dir=${BUILD:-build}/suites
suites='text formats models models_rows safetensors npy save contract/replay'
mkdir -p "$dir" || exit 1
passed=0 failed=0 skipped=0

# fewer rounds, as under a sanitizer: the processor is emulated
# 32-bit x86 returns floats through the 387, where nothing is inlined: -O0 would show bits that it changes
# _FILE_OFFSET_BITS: a folder's entries have numbers of 64 bits
compile() {
    $compiler -std=c99 $level -D_FILE_OFFSET_BITS=64 -I. -Itests/lib -pthread -static -DTEST_SANITIZED=1 "$@" -lm
}
run() { # SUITE
    library=$dir/$target.o program=$dir/$target-${1##*/} log=$dir/$target-${1##*/}.log
    if grep -q '^.define MOE_IMPLEMENTATION' "tests/$1.c"; then library=; fi
    # shellcheck disable=SC2086 # no library is no word
    compile "tests/$1.c" $library -o "$program" >"$log" 2>&1 && $runner "$program" >>"$log" 2>&1
    line=$(tail -n 1 "$log")
    counts=$(echo "$line" | sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed.*/\1 \2/p')
    [ -n "$counts" ] || counts='0 1'
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
    printf '%-8s %-15s %s\n' "$target" "$1" "$line"
    [ "${counts#* }" -eq 0 ] || tail -n 20 "$log"
}
for target in ${*:-s390x i386 armhf}; do
    level=-O1
    case $target in
        s390x) runner=qemu-s390x compiler=s390x-linux-gnu-gcc ;;
        i386) runner= compiler='i686-linux-gnu-gcc -msse2 -mfpmath=sse' level=-O0 ;;
        armhf) runner=qemu-arm compiler=arm-linux-gnueabihf-gcc ;;
        *) echo "no target $target" >&2; exit 1 ;;
    esac
    for need in $runner ${compiler%% *}; do
        command -v "$need" >/dev/null 2>&1 && continue
        echo "skipped $target: no $need here"
        skipped=$((skipped + 1))
        continue 2
    done
    if ! compile -c tests/lib/moe.c -o "$dir/$target.o" >"$dir/$target.log" 2>&1; then
        failed=$((failed + 1))
        cat "$dir/$target.log"
        continue
    fi
    for suite in $suites; do run "$suite"; done
done
echo "$passed passed, $failed failed$([ "$skipped" -eq 0 ] || echo ", $skipped skipped")"
[ "$failed" -eq 0 ]

#!/bin/sh
# Whatever can be said about moe.h by compiling it: no warnings in any mode or language, one implementation and many
# users, nothing exported but moe_*, fast-math refused, and every block of C in the documentation.
# The last line is "N passed, N failed[, N skipped]". ROWS=gcc (default: what needs no more than gcc), more
# (the same with clang, and what mingw-w64 says), or all.
#
# Documentation: a block that starts with ```c is compiled. One with "int main" is a whole program; any other is a
# fragment: the body of a function that may use the names given in compile/fragment.h, or else declarations at file
# scope. What is not to be compiled starts with ```text.
cd "$(dirname "$0")/../.." || exit 1
root=$PWD
suite=compile
. tests/lib/check.sh
dir=$tmp
fails() { ! "$@"; }
other_version() { ! "$@" 2>"$dir/refusal" && grep 'error.*export the desc again' "$dir/refusal"; }
refused() { ! "$@" >"$dir/refusal" 2>&1 && grep 'error.*fast-math' "$dir/refusal"; }

warnings='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'
compilers=
case ${ROWS:=gcc} in gcc) rows=gcc ;; more) rows=clang ;; *) rows='gcc clang' ;; esac
for cc in $rows; do
    if command -v $cc >/dev/null 2>&1; then compilers="$compilers $cc"; else skip "$cc" "not installed"; fi
done

# ---- no warnings: every mode, C and C++ ----
least='-DMOE_NO_STDIO -DMOE_NO_TRAINING -DMOE_NO_FORMATS -DMOE_NO_TEXT'
# shellcheck disable=SC2086 # lists of words
for cc in $compilers; do
    for language in '-std=c99' '-std=c11' '-x c++ -std=c++11' '-x c++ -std=c++20'; do
        for mode in '' -DMOE_STATIC -DMOE_NO_SIMD "$least" -fopenmp '-fopenmp -DMOE_NO_OPENMP' '-O2'; do
            # the newer standards: once, and not for each mode
            case "$language$mode" in *c11-* | *++20-*) continue ;; esac
            case "$ROWS$mode" in gcc-O2) continue ;; esac # stack.sh, and g++ with the other rows
            compile=-fsyntax-only
            case $mode in *-O2*) compile="-c -o $dir/warnings.o" ;; esac
            check "warnings $cc $language $mode" $cc $language $warnings $mode -I. $compile \
                tests/contract/compile/implementation.c
        done
        check "warnings of the declarations $cc $language" $cc $language $warnings -I. -fsyntax-only \
            tests/contract/compile/user.c
    done
done

if [ "$ROWS" = more ]; then
    # shellcheck disable=SC2086
    check "warnings g++ -O2" gcc -x c++ -std=c++11 $warnings -O2 -I. -c tests/contract/compile/implementation.c \
        -o "$dir/warnings.o"
fi
# shellcheck disable=SC2086
if [ "$ROWS" != gcc ] && command -v x86_64-w64-mingw32-gcc >/dev/null 2>&1; then
    for mode in -O0 '-O0 -mfma' '-O2 -mavx2'; do # without and with its own fmaf
        check "warnings mingw-w64 $mode" x86_64-w64-mingw32-gcc -std=c99 $warnings $mode -I. -c -o "$dir/warnings.o" \
            tests/contract/compile/implementation.c
    done
fi

# floats in a wider type: refused where an option is needed, which is named; switched off where the compiler can
if [ "$ROWS" != gcc ] && command -v i686-linux-gnu-gcc >/dev/null 2>&1; then
    wider() { ! i686-linux-gnu-gcc "$@" >"$dir/refusal" 2>&1 && grep 'error.*-mfpmath=sse' "$dir/refusal"; }
    check "387 arithmetic is refused" wider -std=c99 -mfpmath=387 -I. -fsyntax-only \
        tests/contract/compile/implementation.c
fi
if [ "$ROWS" != gcc ] && command -v s390x-linux-gnu-gcc >/dev/null 2>&1; then
    # shellcheck disable=SC2086
    check "warnings s390x -std=c99" s390x-linux-gnu-gcc -std=c99 $warnings -O1 -I. -c -o "$dir/warnings.o" \
        tests/contract/compile/implementation.c
fi

# ---- one implementation, other users; C and C++ together; static ----
# shellcheck disable=SC2086
for cc in $compilers; do
    check "implementation $cc" $cc -std=c99 -I. -c tests/contract/compile/implementation.c -o "$dir/$cc.o"
    check "user $cc" $cc -std=c99 -I. tests/contract/compile/user.c "$dir/$cc.o" -o "$dir/user" -lm
    check "run user $cc" "$dir/user"
    check "C++ user of a C implementation $cc" $cc -x c++ -std=c++11 -I. -c tests/contract/compile/user.c -o \
        "$dir/user.o"
    check "link C and C++ $cc" $cc "$dir/user.o" "$dir/$cc.o" -o "$dir/user" -lm
    check "run C and C++ $cc" "$dir/user"
    check "included before it is implemented $cc" $cc -std=c99 $warnings -I. -DUSER_IMPLEMENTS -DMOE_NO_SIMD \
        tests/contract/compile/user.c -o "$dir/user" -lm
    check "run it $cc" "$dir/user"
    check "static, first $cc" $cc -std=c99 -I. -DMOE_NO_SIMD -DALONE=first -c tests/contract/compile/alone.c -o \
        "$dir/first.o"
    check "static, second $cc" $cc -std=c99 -I. -DMOE_NO_SIMD -DALONE=second -DALONE_MAIN -c \
        tests/contract/compile/alone.c -o \
        "$dir/second.o"
    check "static, linked $cc" $cc "$dir/first.o" "$dir/second.o" -o "$dir/alone" -lm
    check "static, run $cc" "$dir/alone"
    for option in -ffast-math -Ofast; do
        check "$option is refused by $cc, which says why" refused $cc -std=c99 $option -I. -fsyntax-only \
            tests/contract/compile/implementation.c
    done
done

# ---- a build for one exported desc: the same bits as the build that exported it, no warnings, C and C++ ----
only=tests/contract/compile/only.c
for cc in $compilers; do
    check "exporter $cc" $cc -std=c99 -I. $only -o "$dir/exporter" -lm
    while read -r system fields; do
        want=$("$dir/exporter" "$system" "$fields" "$dir/plan.h")
        check "$system exports itself: $want" [ ${#want} -eq 16 ]
        for language in '-std=c99' '-x c++ -std=c++11'; do
            # shellcheck disable=SC2086
            check "warnings of the only $system, $cc $language" $cc $language $warnings -O1 -DMOE_NO_SIMD \
                -include "$dir/plan.h" -I. $only -o "$dir/only" -lm # an option that it has anyway may be given
            check "bits of the only $system, $cc $language" [ "$("$dir/only")" = "$want" ]
        done
    done <<LIST
mixtral
deepseek-v3 bias=true capacity_factor=1 router_gain=0.1
LIST
    sed 's/_VERSION .*/_VERSION 1/' "$dir/plan.h" >"$dir/old.h"
    check "a plan of another version is refused, $cc" other_version $cc -include "$dir/old.h" -I. -fsyntax-only $only
done

# ---- the header where others put it: a directory of its own, found by a relative path, from another directory ----
mkdir -p "$dir/project/lib/include" "$dir/project/src"
cp moe.h "$dir/project/lib/include/"
cp tests/contract/compile/implementation.c "$dir/project/src/a.c"
printf '#define MOE_IMPLEMENTATION\n#include "../lib/include/moe.h"\n' >"$dir/project/src/b.c"
for cc in $compilers; do
    check "header in a directory, $cc" sh -c "cd '$dir/project' && $cc -Ilib/include -DMOE_NO_SIMD \
        -fsyntax-only src/a.c"
    check "header by a relative path, $cc" sh -c "cd '$dir/project' && $cc -DMOE_NO_SIMD -fsyntax-only src/b.c"
    check "header from elsewhere, $cc" sh -c "cd '$dir/project/src' && $cc -I../lib/include -DMOE_NO_SIMD \
        -fsyntax-only a.c"
done

# ---- symbols ----
exported() {
    nm -g --defined-only "$1" | sed -n 's/^[^ ]* [A-Za-z] //p' | grep -v '^moe_[a-z]' >"$dir/symbols" &&
        cat "$dir/symbols"
}
imported() { nm -u "$1" | sed 's/.* //; s/@.*//' | grep -E -x "$2"; }
if command -v nm >/dev/null 2>&1; then
    for cc in $compilers; do
        check "only moe_* is exported, $cc" fails exported "$dir/$cc.o"
        check "static exports nothing of it, $cc" sh -c "! nm -g --defined-only '$dir/first.o' | grep -q ' moe_'"
        # shellcheck disable=SC2086
        check "modes, $cc" $cc -std=c99 -DMOE_NO_SIMD -DMOE_NO_STDIO '-DMOE_MALLOC(n,c)=my_malloc(n,c)' \
            '-DMOE_FREE(p,c)=my_free(p,c)' \
            -include tests/contract/compile/allocator.h -I. -c tests/contract/compile/implementation.c -o "$dir/modes.o"
        check "MOE_NO_STDIO opens no file, $cc" fails imported "$dir/modes.o" \
            'f?open|fopen64|fread|fwrite|fclose|rename|remove|v?f?printf'
        check "own allocator: malloc is not called, $cc" fails imported "$dir/modes.o" 'malloc|calloc|realloc|free'
        check "the library does not print or exit, $cc" fails imported "$dir/$cc.o" \
            'printf|puts|putchar|exit|abort|__assert_fail'
    done
else
    skip symbols "no nm"
fi

# ---- macros: the declarations define MOE_* and what the two standard headers define ----
macros() { # SOURCE-LINES
    printf "$1" | gcc -std=c99 -I. -dM -E - | sed 's/^#define \([A-Za-z0-9_]*\).*/\1/' | sort -u
}
only_moe_macros() {
    macros '#include <stddef.h>\n#include <stdint.h>\n' >"$dir/before"
    macros '#include "moe.h"\n' >"$dir/after"
    comm -13 "$dir/before" "$dir/after" | grep -v '^MOE_' && return 1
    return 0
}
if [ "$ROWS" != more ] && command -v gcc >/dev/null 2>&1; then check "only MOE_* macros" only_moe_macros; fi

# ---- CBLAS ----
cblas=
for directory in /usr/include /usr/include/*/ /usr/local/include /opt/homebrew/opt/openblas/include; do
    if [ -f "$directory/cblas.h" ]; then cblas=$directory; fi
done
printf '#include <cblas.h>\nint main(void) { return cblas_sgemm == 0; }\n' >"$dir/links.c"
if [ -n "$cblas" ] && ! gcc -I"$cblas" "$dir/links.c" -o "$dir/links" -lopenblas >/dev/null 2>&1; then
    skip MOE_USE_CBLAS "cblas.h without a libopenblas to link"
elif [ -n "$cblas" ]; then
    for cc in $compilers; do
        check "MOE_USE_CBLAS $cc" $cc -std=c99 -DMOE_NO_SIMD -DMOE_USE_CBLAS -DUSER_IMPLEMENTS -I. -I"$cblas" \
            tests/contract/compile/user.c \
            -o "$dir/cblas" -lopenblas -lm
        check "MOE_USE_CBLAS runs $cc" "$dir/cblas"
    done
else
    skip MOE_USE_CBLAS "no cblas.h"
fi

# ---- the shortest whole program, as the header's first lines give it ----
awk '/The shortest whole program:/ { on = 1; next } on && /^ \* TABLE/ { exit }
     on { sub(/^ \*/, ""); print }' moe.h >"$dir/shortest.c"
for cc in $compilers; do
    check "shortest program $cc" $cc -std=c99 -Wall -Wextra -DMOE_NO_SIMD -I. "$dir/shortest.c" -o "$dir/shortest" -lm
    check "shortest program runs $cc" "$dir/shortest"
done

# ---- the documentation's blocks of C ----
for page in README.md docs/*.md; do
    [ -f "$page" ] && [ "$ROWS" != more ] || continue
    base=$dir/$(basename "$page" .md)
    awk -v base="$base" '
        /^```/ && on { on = 0; close(file); next }
        /^<!-- adding .*: program -->/ { other = 1 } # needs what the page adds to moe.h: adding.sh
        /^```c[ \t]*$/ && other { other = 0; next }
        /^```c[ \t]*$/ { on = 1; file = base "-" NR ".c"; print file; printf "" >file; next }
        on { print >file }' "$page" >"$dir/blocks"
    while read -r block; do
        where="$page, the block at line $(basename "$block" .c | sed 's/.*-//')"
        cc=gcc
        command -v gcc >/dev/null 2>&1 || cc=clang
        if grep -q 'int main' "$block"; then
            check "$where" $cc -std=c99 -Wall -Wextra -Werror -I. -fsyntax-only "$block"
            continue
        fi
        body=${block%.c}.body.c scope=${block%.c}.scope.c
        {
            echo '#include "tests/contract/compile/fragment.h"'
            grep '^ *#include' "$block"
            echo 'int fragment(FRAGMENT_GIVEN);'
            echo 'int fragment(FRAGMENT_GIVEN) { {'
            grep -v '^ *#include' "$block"
            echo '} return 0; }'
        } >"$body"
        { echo '#include "tests/contract/compile/fragment.h"' && cat "$block"; } >"$scope"
        if $cc -std=c99 -w -I. -Werror=implicit-function-declaration -fsyntax-only "$scope" >/dev/null 2>&1; then
            body=$scope
        fi
        check "$where" $cc -std=c99 -w -I. -Werror=implicit-function-declaration -fsyntax-only "$body"
    done <"$dir/blocks"
done

cd "$root" || exit 1
finish

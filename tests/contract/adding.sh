#!/bin/sh
# docs/manual.md, "Adding ...": each exercise is carried out on a copy of moe.h. A block of the page stands behind a
# comment:
#     <!-- adding NAME: place before PATTERN -->      a line of a list or table (counted against the page's own table)
#     <!-- adding NAME: beside after PATTERN -->      functions
#     <!-- adding NAME: program -->                   and the block after it is what it prints
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
suite=adding
. tests/lib/check.sh
page=docs/manual.md

block() { # block N: the N-th block of code of the page
    awk -v want="$1" '/^```/ { open = !open; if (open) n++; next } open && n == want { print }' $page
}
# name, kind (place, beside, program), where, pattern, and the number of the block after the comment
awk '/^<!-- adding / { mark = $0; next }
    !/^```/ { next }
    { open = !open }
    !open { next }
    { n++ }
    mark { sub(/^<!-- adding /, "", mark); sub(/ -->$/, "", mark); print n " " mark; mark = "" }' $page >"$tmp/steps"
put() { # put FILE WHERE PATTERN HEADER: before or after the first line that matches
    awk -v file="$1" -v where="$2" -v pattern="$3" '
        function paste(  line) { while ((getline line <file) > 0) print line }
        $0 ~ pattern && !done { if (where == "before") paste(); print; if (where == "after") paste(); done = 1; next }
        { print }
        END { exit !done }' "$4" >"$tmp/put" && mv "$tmp/put" "$4"
}
build_and_run() { # build_and_run NAME: scalar kernels give the same bits and compile faster
    dir=$tmp/$1
    $cc -std=c99 -O0 -DMOE_NO_SIMD -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -I"$dir" "$dir/program.c" \
        -o "$dir/run" -lm && "$dir/run" >"$dir/got" && [ -s "$dir/want" ] && diff "$dir/want" "$dir/got"
}
for name in $(sed 's/^[0-9]* //; s/:.*//' "$tmp/steps" | sort -u); do
    mkdir "$tmp/$name"
    cp moe.h "$tmp/$name/moe.h"
    places=0
    grep "^[0-9]* $name:" "$tmp/steps" >"$tmp/mine"
    while read -r number _ kind where pattern; do
        case $kind in
            place | beside)
                block "$number" >"$tmp/text"
                check "$name: the page has block $number" [ -s "$tmp/text" ]
                check "$name: $kind $where $pattern" put "$tmp/text" "$where" "$pattern" "$tmp/$name/moe.h"
                [ "$kind" = place ] && places=$((places + 1))
                ;;
            program)
                block "$number" >"$tmp/$name/program.c"
                block $((number + 1)) >"$tmp/$name/want"
                ;;
        esac
    done <"$tmp/mine"
    case $name in tensor) row='a tensor of the router' ;; format) row='a weight format' ;; *) row="a $name" ;; esac
    check "$name: as many places as the page says ($places)" grep -q "^| $row | $places |" $page
    check "$name: compiles without a warning and prints what the page says" build_and_run "$name"
done
for name in gate score loss tensor format; do check "an exercise for $name" [ -d "$tmp/$name" ]; done

finish

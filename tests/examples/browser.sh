#!/bin/sh
# The page of examples/browser: the same training natively and in the page has the same bits, with SIMD128 and without,
# in Chromium and in node, as far as these are installed; it collapses without the balance loss and heals with it; it
# needs no network. CHROMIUM names another browser of its kind. The last line is "N passed, N failed[, N skipped]".
cd "$(dirname "$0")/../.." || exit 1
suite=browser
. tests/lib/check.sh
in=examples/browser

# ---- natively ----
warnings='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'
# shellcheck disable=SC2086 # words
check "it compiles natively" $cc -std=c99 -O1 -ffp-contract=off $warnings -I. $in/browser.c -o "$tmp/native" -lm
check "and runs" sh -c "'$tmp/native' >'$tmp/native.out'"
sed 1d "$tmp/native.out" >"$tmp/want"
rows=$(sed -n '/^static const char \*const rows/,/};/p' $in/browser.c | grep -o '"[^"]*"' | wc -l)
check "some rows" [ "$rows" -ge 10 ]
check "a line for each, three of the tour" [ "$(wc -l <"$tmp/want")" -eq $((rows + 3)) ]
check "each is whole" [ "$(grep -c '^[a-z0-9-]* loss [0-9a-f]\{16\} right [0-9]* dead [0-9]* hash [0-9a-f]\{16\}$' \
    "$tmp/want")" -eq $((rows + 3)) ]
check "each is another" [ "$(sed 's/.* //' "$tmp/want" | sort -u | wc -l)" -eq $((rows + 3)) ]
dead() { grep '^tour' "$tmp/want" | sed -n "$1s/.* dead \([0-9]*\) .*/\1/p"; } # after a part of the tour, of 8
check "without the balance loss the router collapses" [ "$(dead 1)" -ge 5 ]
check "with it all experts live" [ "$(dead 2)" -eq 0 ]
check "without it again they die" [ "$(dead 3)" -ge 2 ]
right() { grep '^tour' "$tmp/want" | sed -n "$1s/.* right \([0-9]*\) .*/\1/p"; } # of 4096 points
check "the picture is learned then alone" [ "$(right 2)" -gt $(($(right 1) + 600)) ]

# ---- the page ----
if ! sh $in/build.sh --compiler >"$tmp/compiler" 2>"$tmp/why"; then
    skip "the page" "$(head -n 1 "$tmp/why")"
    finish
fi
for kind in simd128 scalar; do
    option=-msimd128
    [ $kind = simd128 ] || option=-DMOE_NO_SIMD
    check "the page with $kind" sh -c "sh $in/build.sh '$tmp/$kind' $option >'$tmp/said' 2>&1"
    check "its compiler has nothing to say: $(cat "$tmp/said")" [ ! -s "$tmp/said" ]
done
network='https\{0,1\}:|src=|url(|@import|fetch(|XMLHttp|import(|import '
check "it asks for nothing from outside" sh -c "! grep -n -e '$(echo "$network" | sed 's/|/\\|/g')' $in/index.html"
said() { # KIND FILE: what the test of a page said: its kernels, and the bits of the native program
    [ "$(head -n 1 "$2")" = "kernels $1" ] && sed 1d "$2" | diff - "$tmp/want"
}
if command -v node >/dev/null 2>&1; then
    imports='import { readFileSync } from "node:fs";
        const module = new WebAssembly.Module(readFileSync(process.argv[2]));
        process.exit(WebAssembly.Module.imports(module).length);'
    echo "$imports" >"$tmp/imports.mjs"
    for kind in simd128 scalar; do
        check "node, $kind: the module imports nothing" node "$tmp/imports.mjs" "$tmp/$kind/browser.wasm"
        check "node, $kind: the test ends" sh -c "node tests/lib/page.mjs '$tmp/$kind/index.html' >'$tmp/$kind.node'"
        check "node, $kind: the native program's bits" said $kind "$tmp/$kind.node"
    done
else
    skip "in node" "no node"
fi

browser=
for each in ${CHROMIUM:-chromium chromium-browser google-chrome}; do
    if command -v "$each" >/dev/null 2>&1; then browser=$each && break; fi
done
open_page() { # ADDRESS OPTION...: the page as the browser has it when it has loaded
    address=$1
    shift
    timeout 300 "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$tmp/profile" "$@" --dump-dom \
        "file://$address" 2>"$tmp/browser.err"
}
if [ -z "$browser" ]; then
    skip "in Chromium" "no chromium"
    finish
fi
for kind in simd128 scalar; do
    open_page "$tmp/$kind/index.html#test" >"$tmp/$kind.page"
    sed -n '/<pre>/,/<\/pre>/{s/.*<pre>//;/<\/pre>/d;p;}' "$tmp/$kind.page" >"$tmp/$kind.chromium"
    check "Chromium, $kind: the native program's bits" said $kind "$tmp/$kind.chromium"
done
# the page as one sees it, with the tour's first part behind it
open_page "$tmp/simd128/index.html#600" --virtual-time-budget=20000 >"$tmp/seen"
hash=$(grep '^tour' "$tmp/want" | sed -n '1s/.* //p')
check "it shows the steps, the experts that are dead and the checksum" \
    grep -q "<dd>600</dd>.*<dt>dead experts</dt><dd>$(dead 1)</dd>.*<code>$hash</code>" "$tmp/seen"
check "and says so" grep -q "Balance loss off: $(dead 1) of 8 experts are dead" "$tmp/seen"
check "a bar for each expert" [ "$(grep -o '<button data-e="[0-9]' "$tmp/seen" | wc -l)" -eq 8 ]
check "a choice for each row" [ "$(grep -o '<select name="row">.*</select>' "$tmp/seen" | sed 's/<\/select>.*//' |
    grep -o '<option value=' | wc -l)" -eq "$rows" ]
finish

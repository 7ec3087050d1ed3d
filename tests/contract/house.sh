#!/bin/sh
# The house rules that a machine can hold: the table of contents, the banners, their order and the prefixes of private
# names agree; every room has a test; nothing calls downward; lines, functions, ternaries and one-letter names within
# their limits. Needs sh, awk and grep. The last line is "N passed, N failed".
#
#     tests/contract/house.sh [HEADER]     another header than moe.h
cd "$(dirname "$0")/../.." || exit 1
header=${1:-moe.h}
most_columns=120 most_function=60 most_ternaries=15 most_letters=5 # a line; lines; in 1,000 lines; in 100 lines
tmp=$(mktemp -d "${TMPDIR:-/tmp}/house.XXXXXX") || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0
check() { # WHAT COMMAND...: the command prints what is wrong
    what=$1
    shift
    if "$@" >"$tmp/log" 2>&1; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAILED $what"
        head -n "${HOUSE_LINES:-15}" "$tmp/log"
    fi
}
none() { ! "$@" | grep .; } # prints nothing

# Calls downward that are meant, one a line: name, then why.
cat >"$tmp/allowed" <<'LIST'
moe__score_latent_of  a row's functions read their own row of the table that names them
moe__gate_own_back    the same
LIST
# Functions that may be longer: name, then why.
cat >"$tmp/long" <<'LIST'
LIST

# ---- the code without comments and strings, line by line ----
awk '{
    out = ""
    n = length($0)
    for (i = 1; i <= n; i++) {
        two = substr($0, i, 2)
        one = substr(two, 1, 1)
        if (comment) {
            if (two == "*/") { comment = 0; i++ }
        } else if (two == "/*") { comment = 1; i++; out = out " " }
        else if (two == "//") break
        else if (one == "\"" || one == "\047") {
            for (i++; i <= n && substr($0, i, 1) != one; i++) if (substr($0, i, 1) == "\\") i++
            out = out one one
        } else out = out one
    }
    print out
}' "$header" >"$tmp/code"

# ---- the rooms ----
# A line of the table of contents: " *     >>room   prefix   table   what". prefix: of its private names; table: where
# adding a row adds a feature; "-" for none.
awk '/^ \* +>>[a-z]/ { print substr($2, 3), $3, $4 }' "$header" >"$tmp/contents"
awk '/^\/\* ==== >>[a-z_]+ =/ { print substr($3, 3), FNR }
     END { print "end", FNR + 1 }' "$header" >"$tmp/banners"
same_order() {
    awk '{ print $1 }' "$tmp/contents" >"$tmp/a"
    sed '$d' "$tmp/banners" | awk '{ print $1 }' >"$tmp/b"
    diff "$tmp/a" "$tmp/b" && [ "$(wc -l <"$tmp/a")" -ge 30 ]
}
check "table of contents and banners name the same rooms in the same order" same_order
check "a banner is a line of its own kind: /* ==== >>room ====" none grep -n '>>[a-z]* =' "$tmp/code"
unmarked() { # after the declarations every banner is a room's
    awk '/^\/\* ==== >>/ { inside = 1; next }
        inside && /^\/\* ====/ { print FILENAME ":" NR ": " $0 }' "$header"
}
check "no banner but a room's in the implementation" none unmarked
says_what() { # a paragraph under each banner, before the first line of code
    awk '/^\/\* ==== >>/ { if (/\*\/$/) print FILENAME ":" NR ": no paragraph: " $3 }' "$header"
}
check "a paragraph under every banner" none says_what

# Where each function is defined: name, line, last line, room. A definition begins at the left edge, has a name with
# moe_ before its first parenthesis, and a brace before any semicolon.
awk 'FILENAME == ARGV[1] { room_line[++rooms] = $2; room_name[rooms] = $1; next }
    depth == 0 && !open && /^[A-Za-z]/ && !/^(typedef|enum|struct|union|extern)/ && /\(/ {
        head = $0
        first = FNR
        open = 1
    }
    open && FNR > first { head = head " " $0 }
    {
        line = $0
        opened = gsub(/[{]/, "{", line)
        closed = gsub(/[}]/, "}", line)
    }
    open && (opened || /;/) {
        open = 0
        before = head
        sub(/[{;].*/, "", before)
        declares = head !~ /[{]/ || (index(head, ";") && index(head, ";") < index(head, "{"))
        if (before !~ /=/ && match(before, /moe__?[a-z0-9_]*(_\))?\(/)) {
            name = substr(before, RSTART, RLENGTH - 1)
            sub(/\)/, "", name)
            while (at < rooms && room_line[at + 1] <= first) at++
            place = at ? room_name[at] : "declarations"
            if (declares) print "declared", name, first, first, place
            else { current = name; current_first = first; current_room = place }
        }
    }
    {
        depth += opened - closed
        if (current != "" && depth == 0) { print "defined", current, current_first, FNR, current_room; current = "" }
    }' "$tmp/banners" "$tmp/code" >"$tmp/functions"
check "some functions were found" [ "$(grep -c '^defined' "$tmp/functions")" -gt 500 ]

prefixes() {
    awk 'FILENAME == ARGV[1] { prefix[$1] = $2; next }
        $1 == "defined" && $2 ~ /^moe__/ && ($5 in prefix) {
            if (index($2, prefix[$5]) != 1)
                print $3 ": " $2 " stands in >>" $5 ", whose prefix is " prefix[$5]
        }' "$tmp/contents" "$tmp/functions"
}
check "private names carry their room's prefix" none prefixes
tables() {
    awk 'FILENAME == ARGV[1] { table[$1] = $3; next }
        FILENAME == ARGV[2] { name[++rooms] = $1; from[rooms] = $2; next }
        {
            while (at < rooms && from[at + 1] <= FNR) at++
            if (name[at] in table && match($0, table[name[at]] "([^A-Za-z0-9_]|$)")) found[name[at]] = 1
        }
        END {
            for (room in table)
                if (table[room] != "-" && !(room in found)) print ">>" room " has no " table[room]
        }' "$tmp/contents" "$tmp/banners" "$header"
}
check "every table stands in its room" none tables
suites() { # a room that is only its banner needs none
    awk 'FILENAME == ARGV[1] { name[++rooms] = $1; from[rooms] = $2; next }
        { while (at < rooms && from[at + 1] <= FNR) at++; if (/[^ ]/) code[name[at]]++ }
        END { for (i = 1; i < rooms; i++) if (code[name[i]] > 2) print name[i] }' "$tmp/banners" "$tmp/code" |
        while read -r room; do [ -f "tests/$room.c" ] || echo "no tests/$room.c"; done
}
check "every room has a test" none suites

# ---- nothing calls downward ----
forward() {
    awk 'FILENAME == ARGV[1] { allowed[$1] = 1; next }
        $1 == "declared" && $5 != "declarations" && !($2 in allowed) {
            print $3 ": " $2 " is declared before it is defined"
        }' "$tmp/allowed" "$tmp/functions"
}
check "no private function is declared before its definition" none forward
downward() {
    awk 'FILENAME == ARGV[1] { allowed[$1] = 1; next }
        FILENAME == ARGV[2] { name[++rooms] = $1; from[rooms] = $2; next }
        FILENAME == ARGV[3] { if ($1 == "defined") { line[$2] = $3; room[$2] = $5 } next }
        FNR < from[1] || /^#/ || /\\$/ { next }
        {
            while (at < rooms && from[at + 1] <= FNR) at++
            rest = $0
            while (match(rest, /[A-Za-z_][A-Za-z0-9_]*/)) {
                word = substr(rest, RSTART, RLENGTH)
                rest = substr(rest, RSTART + RLENGTH)
                if (!(word in line) || (word in allowed) || room[word] == name[at]) continue
                if (line[word] > FNR && rest ~ /^ *[(,)}]/)
                    print FNR ": " name[at] " uses " word ", of the later room " room[word]
            }
        }' "$tmp/allowed" "$tmp/banners" "$tmp/functions" "$tmp/code"
}
check "nothing calls downward" none downward

# ---- lengths ----
long_functions() {
    awk -v most=$most_function 'FILENAME == ARGV[1] { allowed[$1] = 1; next }
        $1 == "defined" && $4 - $3 + 1 > most && !($2 in allowed) { print $3 ": " $2 " has " $4 - $3 + 1 " lines" }' \
        "$tmp/long" "$tmp/functions"
}
check "no function over $most_function lines" none long_functions
ternaries() {
    awk -v most=$most_ternaries '{ n += gsub(/[?]/, "?") }
        END { print n " in " NR " lines"; exit n * 1000 >= most * NR }' "$tmp/code"
}
check "ternaries: fewer than $most_ternaries in 1,000 lines" ternaries
nested() { awk '{ line = $0; if (gsub(/[?]/, "?", line) > 1) print FNR ": " $0 }' "$tmp/code"; }
check "at most one ternary a line" none nested

# One letter after a type, or in the list after it. The axes T, E, S, d, f, N, L and the head of a for do not count.
letters() {
    awk -v most=$most_letters '
        BEGIN {
            type = "(^|[^A-Za-z0-9_])(size_t|int|float|double|char|unsigned|void|u?int(8|16|32|64)_t|" \
                "moe_[a-z0-9_]+|FILE|__m[0-9a-z]+)"
        }
        /^ *#/ { next }
        {
            line = $0
            while (match(line, /for \([^;]*;/)) line = substr(line, 1, RSTART - 1) substr(line, RSTART + RLENGTH)
            while (match(line, type "( const)? +[*]*(const )?[A-Za-z_][A-Za-z0-9_]*")) {
                word = substr(line, RSTART, RLENGTH)
                line = substr(line, RSTART + RLENGTH)
                sub(/.*[ *]/, "", word)
                if (line ~ /^ *[(]/) continue
                if (word ~ /^[A-Za-z]$/ && word !~ /[TESdfNL]/) count++
                # the rest of a declaration: up to what is no list of names any more
                list = line
                while (match(list, /^(\[[^]]*\]| = [^,;()]*)*, *[*]*[A-Za-z_][A-Za-z0-9_]*/)) {
                    word = substr(list, RSTART, RLENGTH)
                    list = substr(list, RLENGTH + 1)
                    if (list ~ /^ +[*A-Za-z]/) break # a type: the next parameter
                    sub(/.*[ *]/, "", word)
                    if (word ~ /^[A-Za-z]$/ && word !~ /[TESdfNL]/) count++
                }
            }
        }
        END {
            printf "%d in %d lines: %.1f in 100\n", count, NR, count * 100 / NR
            exit count * 100 >= most * NR
        }' "$tmp/code"
}
check "one-letter names: fewer than $most_letters in 100 lines" letters

# A status that no test asks for is dead, or nobody knows whether it comes.
unasked() {
    grep -rhoE 'MOE_E_[A-Z0-9_]+' tests | sort -u >"$tmp/asked"
    sed -n 's/^    X(\(MOE_E_[A-Z0-9_]*\), .*/\1/p' "$header" | sort | comm -23 - "$tmp/asked"
}
check "every status stands in a test" none unasked

# Every tracked text file; in Markdown a table's row and what a program printed may be longer.
files() {
    git ls-files -c -o --exclude-standard 2>/dev/null || find . -type f ! -path './build/*' ! -path './out/*'
}
wide() {
    files |
        grep -E '(\.(c|h|sh|md|yml)|Makefile|LICENSE|\.ci/run)$' | while read -r file; do
        [ -f "$file" ] || continue
        [ "$file" = moe.h ] && file=$header
        awk -v most=$most_columns '
            FILENAME ~ /\.md$/ && /^ *```/ { output = !output }
            length($0) > most && !output && !(FILENAME ~ /\.md$/ && /^[|]|^ *(!?\[|<)|https?:/) {
            print FILENAME ":" FNR ": " length($0) " columns" }' "$file"
    done
}
check "no line over $most_columns columns" none wide

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]

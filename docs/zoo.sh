#!/bin/sh
# Makes the generated parts of docs/systems.md anew: between <!-- zoo --> and <!-- /zoo --> the table, between
# <!-- zoo NAME --> and <!-- /zoo --> the line of one system.
#     sh docs/zoo.sh          trains the zoo first (some minutes)
#     sh docs/zoo.sh FILE     with the table in FILE: the output of build/zoo --markdown, or a page that holds it
set -eu
cd "$(dirname "$0")/.."
page=${PAGE:-docs/systems.md}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
if [ $# -gt 0 ]; then cp "$1" "$tmp/zoo"; else
    make -s build/zoo
    build/zoo --quiet --markdown --seeds 3 --out "$tmp/out" >"$tmp/zoo"
fi
awk -F ' *[|] *' -v command='build/zoo --quiet --markdown --seeds 3' '
    FNR == 1 { file++ }
    file == 1 && /^[|] system / {
        for (i = 2; i < NF; i++) { head[i] = $i; if ($i == "tokens/s") skip = i }
        columns = NF - 1
        on = 1
    }
    file == 1 && on && !/^[|]/ { on = 0 }
    file == 1 && on { # the table without tokens/s, and each row by its heading
        line = "|"
        for (i = 2; i <= columns; i++) if (i != skip) line = line (/^[|]-/ ? $i : " " $i " ") "|"
        table = table line "\n"
        if (/^[|]-/ || $2 == "system") next
        if ($2 != "(no mixture)") rank[$2] = ++n
        for (i = 2; i <= columns; i++) cell[$2, head[i]] = $i
    }
    file == 1 { next }
    /^<!-- \/zoo -->$/ { inside = 0 }
    inside { next }
    { print }
    /^<!-- zoo -->$/ { printf "`%s`\n\n%s", command, table; inside = 1 }
    /^<!-- zoo [^ ]+ -->$/ {
        inside = 1
        s = $0
        sub(/^<!-- zoo /, "", s)
        sub(/ -->$/, "", s)
        if (!(s in rank)) { print "no row of " s >"/dev/stderr"; exit 1 }
        printf "Zoo: test loss %s (%d of %d), accuracy %s, training loss %s,\n", cell[s, "test loss"], rank[s], n,
            cell[s, "test accuracy"], cell[s, "train loss"]
        printf "%s active parameters; ", cell[s, "active parameters"]
        printf "MaxVio %s, load CV %s, dead %s, dropped %s, PES %s.\n", cell[s, "MaxVio"], cell[s, "CV"],
            cell[s, "dead"], cell[s, "dropped"], cell[s, "PES"]
        if (cell[s, "notes"] != "") printf "Beside it:\n%s.\n", cell[s, "notes"]
    }' "$tmp/zoo" "$page" >"$tmp/page"
cp "$tmp/page" "$page"

#!/bin/sh
# Runs a tiny form of every experiment and holds it against what it promises: the thresholds of the collapse map
# against formulas worked out here, and a verdict that turns when the dynamics are not given their time; the ecology
# number of each training from its own T, H, O and B; a line for each training, checkpoint and claim; tables that are
# Markdown; one sentence at the end; the same results for any number of threads; bad arguments.
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=experiments
. tests/lib/example.sh
events() { grep "^{\"event\":\"$2\"" "$tmp/$1.out"; } # events RUN EVENT
number() { events "$1" "$2" | wc -l | tr -d ' '; }
verdict() { events "$1" final | sed -n "s/.*\"experiment\":\"$2\",\"verdict\":\"\([^\"]*\)\".*/\1/p"; }
tables() { # every table's rows have as many cells as its headings
    awk -F'|' '/^\|/ { if (!n) n = NF; if (NF != n) { print; bad = 1 }; next } { n = 0 } END { exit bad }' "$tmp/$1.err"
}

# the collapse map: Ks = min of s (e^s + M - 1) / (e^s - 1), Kc = 2 (M - 1) / (M - 2) ln(M - 1), M
run collapse 0 --only collapse --quick --json
near() { # near KIND EXPERTS WANT: measured within 0.5%
    events collapse threshold | sed -n "s/.*\"kind\":\"$1\",\"experts\":$2,.*\"measured\":\([^}]*\)}/\1/p" |
        awk -v want="$3" '{ n++; bad += ($1 / want - 1) ^ 2 > 0.005 ^ 2 } END { exit !(n == 1 && !bad) }'
}
ks=$(awk 'BEGIN { best = 1e9; for (s = 0.5; s < 6; s += 0.0001) {
    k = s * (exp(s) + 7) / (exp(s) - 1); if (k < best) best = k }; print best }')
kc=$(awk 'BEGIN { print 2 * 7 / 6 * log(7) }')
check "two experts: 2" near unstable 2 2
check "eight: one-sided states from Ks = $ks on" near one-sided 8 "$ks"
check "as deep as balance at Kc = $kc" near equal-depth 8 "$kc"
check "balance unstable from 8 on" near unstable 8 8
check "confirmed" [ "$(verdict collapse collapse)" = confirmed ]
balanced() { # below every threshold both starts end even, above the last both collapsed
    events collapse run | grep '"experts":8' |
        sed 's/.*"kf":\([^,]*\),"maxvio_from_balance":\([^,]*\),"maxvio_from_one":\([^,]*\),.*/\1 \2 \3/' |
        awk '$1 < 4.2 && ($2 > 0.1 || $3 > 0.1) { bad = 1 } $1 > 4.6 && $3 < 3 { bad = 1 }
            $1 > 4.6 && $1 < 7.9 && $2 > 0.1 { bad = 1 } $1 > 8.5 && $2 < 3 { bad = 1 } END { exit bad || NR < 40 }'
}
check "the map of eight experts: even, both, collapsed" balanced
run hurried 0 --only collapse --quick --steps 40 --json
check "without time to settle: not confirmed" [ "$(verdict hurried collapse)" = 'not confirmed' ]

# ecology
run ecology 0 --only ecology --quick --seeds 1 --steps 2 --threads 1 --json
check "a line for each training: $(number ecology run)" \
    [ "$(number ecology run)" -eq $((48 + 12 + 10 + 3 + 1 + 4 + 3)) ]
of_numbers() {
    events ecology run |
        sed 's/.*"T":\([^,]*\),"H":\([^,]*\),"O":\([^,]*\),"B":\([^,]*\),"ecology":\([^,]*\),.*/\1 \2 \3 \4 \5/' |
        awk '{ if ($3 + $4 == 0) { bad += $5 != "null"; next }
               want = $1 * $2 / ($3 + $4); bad += ($5 - want) ^ 2 > 1e-10 } END { exit bad || NR < 80 }'
}
check "E = T H / (O + B)" of_numbers
swept() {
    events ecology run | grep '"part":"sweep"' | sed 's/.*"ecology":\([^,]*\),.*/\1/' | sort -n | uniq -c |
        awk '{ print $1 "x" $2 }' | tr '\n' ' '
}
check "swept from 0.05 to 2, eight times each: $(swept)" [ "$(swept)" = '8x0.05 8x0.1 8x0.25 8x0.5 8x1 8x2 ' ]
check "tables" tables ecology

# SimBal and the phases
run both 0 --only simbal,phases --quick --seeds 2 --steps 3 --threads 1 --json
check "three routers of two seeds" [ "$(number both run)" -eq 6 ]
check "a checkpoint for each layer" [ "$(number both checkpoint)" -eq $((3 * 3)) ]
check "with tau 0 all choices stay" [ "$(events both run | grep -c '"tau":0,"loss":[0-9.]*,"kept":1,')" -eq 6 ]
fewer() { # at tau 0.2 fewer than at 0
    events both run | sed 's/.*"tau":0.2[0-9]*,"loss":[^,]*,"kept":\([^,]*\),.*/\1/' |
        awk '!($1 < 1 && $1 >= 0.25) { bad = 1 } END { exit bad }'
}
check "with tau 0.2 fewer, the first always" fewer
check "tables of both" tables both
run threads 0 --only phases --quick --steps 3 --threads 3 --json
events both checkpoint >"$tmp/a"
events threads checkpoint >"$tmp/b"
check "the same checkpoints for 1 and 3 threads" cmp -s "$tmp/a" "$tmp/b"

# sentences and files
for name in collapse ecology; do
    check "$name: one sentence" \
        [ "$(grep -c '^Claim \(confirmed\|not confirmed\|not testable here\): .*\.' "$tmp/$name.err")" -eq 1 ]
    check "$name: its picture" [ "$(tail -n 1 "$tmp/$name/experiments_$name.svg")" = '</svg>' ]
    check "$name: the page" [ "$(tail -n 1 "$tmp/$name/experiments.html")" = '</main></body></html>' ]
done
check "two experiments, two sentences, in the table's order" \
    [ "$(events both final | sed 's/.*"experiment":"\([^"]*\)".*/\1/' | tr '\n' ' ')" = 'simbal phases ' ]
check "the last line is a final" [ "$(tail -n 1 "$tmp/both.out" | grep -c '^{"event":"final"')" -eq 1 ]
check "standard output is experiments.jsonl" cmp -s "$tmp/both.out" "$tmp/both/experiments.jsonl"
check "the sentence is in the page" grep -q '<b>Claim ' "$tmp/both/experiments.html"

run unknown 2 --only zzz
check "an unknown experiment: the names" says unknown "'zzz'.* ecology, simbal, phases, collapse"
run seeds 2 --seeds 100
check "nothing is written then" [ ! -e "$tmp/unknown" ]

finish

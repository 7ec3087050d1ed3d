#!/bin/sh
# Repeated prompts against a small model that is trained here for a few steps: what must be exactly so when all tokens
# are the same (the ranks' imbalance is TMI where each has one expert, two replicas halve it, LLEP levels it), the keys
# of the lines, the detector, the same numbers for any threads, and bad arguments; with MOE_MODELS=DIR other models.
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=repetition
. tests/lib/example.sh
[ -x "${BUILD:-build}/wikitext2" ] || make -s "${BUILD:-build}/wikitext2" || exit 1
"${BUILD:-build}/wikitext2" --quiet --steps 6 --vocab 300 --width 32 --hidden 32 --heads 1 --layers 2 --length 32 \
    --batch 4 --experts 8 --threads 1 --out "$tmp/lm" >"$tmp/lm.out" 2>&1
check "a model: $(tail -n 1 "$tmp/lm.out")" [ -s "$tmp/lm/wikitext2/config.json" ]
few="--length 32 --prompts 2 --tried 3 --min-tokens 1"

run all 0 --model "$tmp/lm/wikitext2" $few --threads 1 --json
line() { grep "^{\"event\":\"$1\",\"$2\":\"$3\"${4:+,\"attacked\":$4}," "$tmp/all.out"; }
list() { sed "s/.*\"$1\":\[\([^]]*\)\].*/\1/"; }
last() { list "$1" | sed 's/.*,//'; }
n='-\{0,1\}[0-9][0-9.e+-]*' l='\[[0-9.e,+-]*\]'
check "2, 4 and 8 ranks" [ "$(head -n 1 "$tmp/all.out" | list ranks)" = 2,4,8 ]
check "TMI = min(k, E / P) / (k / P)" [ "$(head -n 1 "$tmp/all.out" | list tmi)" = 2,4,4 ]
check "three kinds of prompts, with exactly these keys" [ "$(grep -c "^{\"event\":\"prompts\",\"kind\":\"[a-z]*\",\
\"jaccard\":$n,\"longest\":$n,\"spread\":$n,\"imbalance\":$l}\$" "$tmp/all.out")" -eq 3 ]
check "five defences against nothing, half and all" [ "$(grep -c "^{\"event\":\"defence\",\"method\":\"[a-z-]*\",\
\"attacked\":$n,\"imbalance\":$l,\"latency_ratio\":$l,\"moved_bytes\":$l}\$" "$tmp/all.out")" -eq 15 ]
way="{\"threshold\":$n,\"false_alarms\":$n,\"detected\":$n,\"random_alarms\":$n}"
check "the last line" [ "$(tail -n 1 "$tmp/all.out" | grep -c "^{\"event\":\"final\",\"ranks\":8,\"tmi\":4,\
\"imbalance\":4,\"latency_ratio\":$n,\"detector\":{\"jaccard\":$way,\"longest\":$way}}\$")" -eq 1 ]
check "a repeated token: one set of experts, one state" [ "$(line prompts kind repeated |
    grep -c '"jaccard":1,"longest":32,"spread":\(0\|[0-9.]*e-[0-9]*\),')" -eq 1 ]
check "text: other sets, other states" holds \
    "$(line prompts kind text | sed 's/.*"jaccard":\([^,]*\),.*/\1/') < 0.9 &&
     $(line prompts kind text | sed 's/.*"spread":\([^,]*\),.*/\1/') > 1"
check "all attacked, an expert a rank: TMI" [ "$(line defence method none 1 | last imbalance)" = 4 ]
check "two replicas halve it" [ "$(line defence method replicate-and-quantize-dynamic 1 | last imbalance)" = 2 ]
check "LLEP levels it" [ "$(line defence method llep 1 | last imbalance)" = 1 ]
check "and moves weights for that" holds "$(line defence method llep 1 | last moved_bytes) >= 2 * 6 * 3 * 32 * 32 * 4"
check "nobody else does" [ "$(line defence method none 1 | last moved_bytes)" = 0 ]
check "LASER spreads it over its four candidates of eight, or where states differ more" \
    holds "(a = $(line defence method laser 1 | last imbalance)) <= 2 && a > 1.5"
check "half attacked: less" holds "$(line defence method none 0.5 | last imbalance) < 4"
check "both detectors find every one" [ "$(tail -n 1 "$tmp/all.out" | grep -o '"detected":1,' | wc -l)" -eq 2 ]
check "and take little text for one" [ "$(tail -n 1 "$tmp/all.out" | grep -o '"false_alarms":0\(.0[0-9]*\)\{0,1\},' |
    wc -l)" -eq 2 ]
check "standard output is repetition.jsonl" cmp -s "$tmp/all.out" "$tmp/all/repetition.jsonl"
check "the tables go to standard error" says all '^replicate-and-quantize-dynamic *100%'
check "the picture and the page" grep -q 'All attacked' "$tmp/all/repetition.svg" "$tmp/all/repetition.html"

run threads 0 --model "$tmp/lm/wikitext2" $few --threads 3 --json
for name in all threads; do
    sed 's/"latency_ratio":[^"]*"/"/' "$tmp/$name.out" | grep -v '"config"' >"$tmp/$name.same"
done
check "the same numbers for 1 and 3 threads" cmp -s "$tmp/all.same" "$tmp/threads.same"

run nowhere 2 --model "$tmp/nowhere"
check "no model says how to make one" says nowhere 'build/wikitext2'
run text 2 --model "$tmp/lm/wikitext2" --text "$tmp/nowhere"
run length 2 --length 1
for model in ${MOE_MODELS:+olmoe/f32 deepseek_v3/f32 gpt_oss/f32}; do
    run all 0 --model "$MOE_MODELS/$model" $few --threads 1 --json
    check "$model: LLEP levels it" holds "$(line defence method llep 1 | last imbalance) < 1.1"
    check "$model: attacked is worse" holds "$(line defence method none 1 | last imbalance) > 3"
done
finish

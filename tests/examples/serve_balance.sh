#!/bin/sh
# Trains a very small unbalanced mixture and serves it in every way: the keys of a result, what must not change, that
# Replicate-and-Quantize lowers the imbalance by 1.3 in no more memory, LASER lowers it too, the same numbers for any
# threads, and bad arguments; with MOE_MODELS=DIR (small checkpoints in their public layout) a language model.
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=serve_balance
. tests/lib/example.sh
few="--images 150 --batch 30 --epochs 20 --experts 8 --seed 2"

run all 0 $few --threads 1 --json
number='-\{0,1\}[0-9][0-9.e+-]*'
check "a result for each method" [ "$(count all)" -eq 12 ]
keys() { # NAME QUALITY: lines of exactly these keys
    finals "$1" | grep -c "^{\"event\":\"final\",\"method\":\"[a-z0-9.-]*\",\"imbalance\":$number,\"$2\":$number,\
\"bytes\":$number,\"tokens_per_s\":$number}\$"
}
check "exactly these keys" [ "$(keys all accuracy)" -eq 12 ]
of() { finals "$1" | sed -n "s/.*\"method\":\"$2\",.*\"$3\":\([^,}]*\)[,}].*/\1/p"; }
plain=$(of all top-k imbalance) accuracy=$(of all top-k accuracy) bytes=$(of all top-k bytes)
check "the model learned ($accuracy) and is unbalanced ($plain)" holds "$accuracy > 0.2 && $plain > 1.2"
check "top-k is 8 experts of 3 matrices 64 x 32" [ "$bytes" -eq $((8 * 3 * 64 * 32 * 4)) ]
for more in "" -2 -4 -dynamic; do
    method=replicate-and-quantize$more
    check "$method: no more memory" [ "$(of all $method bytes)" -le "$bytes" ]
    check "$method: the accuracy, to 0.6%" holds "$(of all $method accuracy) > $accuracy - 0.006"
    check "$method: less imbalance" holds "$(of all $method imbalance) < $plain"
done
check "one replica: less by 1.3" holds "$(of all replicate-and-quantize imbalance) * 1.3 < $plain"
check "four: less by 1.5" holds "$(of all replicate-and-quantize-4 imbalance) * 1.5 < $plain"
check "LASER: less by 1.4" holds "$(of all laser-swept imbalance) * 1.4 < $plain"
check "at under 0.02 of accuracy" holds "$(of all laser-swept accuracy) > $accuracy - 0.02"
check "merging: even" [ "$(of all smear-merged imbalance)" = 1 ]
check "pruning keeps the bytes" [ "$(of all prune-0.2 bytes)" -eq "$bytes" ]
check "four sizes of batch for each" [ "$(grep -c '^{"event":"batch",' "$tmp/all.out")" -eq 48 ]
check "the sweep" [ "$(grep -c '^{"event":"sweep","top_p":' "$tmp/all.out")" -eq 48 ]
check "larger batches are more even" holds "$plain < $(sed -n \
    's/^{"event":"batch","method":"top-k","batch":1,"imbalance":\([^,]*\),.*/\1/p' "$tmp/all.out" | head -n 1)"
at() { # MASS THRESHOLD: the sweep's imbalance
    sed -n "s/^{\"event\":\"sweep\",\"top_p\":$1,\"threshold\":$2,\"imbalance\":\([^,]*\),.*/\1/p" "$tmp/all.out"
}
check "LASER with most to choose is the most even" holds "$(at 1 0) < $(at 0.3 0) && $(at 1 0) < $(at 1 0.75)"
check "standard output is serve_balance.jsonl" cmp -s "$tmp/all.out" "$tmp/all/serve_balance.jsonl"
check "its first line is the configuration" \
    [ "$(head -n 1 "$tmp/all.out" | grep -c '^{"event":"config",.*"seed":2,')" -eq 1 ]
check "the table goes to standard error" says all '^imbalance by batch of'
check "the pictures" grep -q 'imbalance on the calibration' "$tmp/all/serve_balance.svg"
check "the page is whole" [ "$(tail -n 1 "$tmp/all/serve_balance.html")" = "</main></body></html>" ]

run threads 0 $few --threads 3 --json
for name in all threads; do grep '"event":"\(batch\|final\|sweep\)"' "$tmp/$name.out" |
    sed 's/,"tokens_per_s":[^}]*//' >"$tmp/$name.same"; done
check "the same results for 1 and 3 threads" cmp -s "$tmp/all.same" "$tmp/threads.same"

run text 2 --model nowhere
check "--model without --text" says text 'go together'
run system 2 --system nope
check "an unknown system" says system "'nope'"
run candidates 2 $few --candidates 9
check "more candidates than experts" says candidates 'only 8 experts'
run set 2 --set nothing=1
if [ -n "${MOE_MODELS:-}" ]; then
    for i in 1 2 3 4 5 6 7 8; do cat README.md; done | head -c 6000 >"$tmp/text"
    for model in olmoe/f32 mixtral/f32; do
        run lm 0 --model "$MOE_MODELS/$model" --text "$tmp/text" --context 64 --threads 1 --json
        check "$model: exactly these keys" [ "$(keys lm perplexity)" -eq 11 ]
        check "$model: replicas keep the perplexity, to 1%" holds \
            "$(of lm replicate-and-quantize perplexity) < 1.01 * $(of lm top-k perplexity)"
    done
fi
finish

#!/bin/sh
# examples/inspect: its numbers on files made here, its JSON keys, and what it says of bad files: status 2 and one line
# with
# the file's name and the byte. Everything under the address and undefined-behaviour sanitizers.
# The last line is "N passed, N failed".
cd "$(dirname "$0")/../.." || exit 1
suite=inspect
. tests/lib/check.sh
dir=$tmp
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

$cc -fopenmp -x c - -o "$dir/none" 2>/dev/null <<END && openmp=-fopenmp
int main(void) { return 0; }
END
# the library as the sanitized suites have it
build=${BUILD:-build}
make -s CC="$cc" BUILD="$build" "$build/moe_sanitized.o" || exit 1
# shellcheck disable=SC2086
check "it compiles without warnings" $cc -std=c99 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -O1 -g1 \
    $openmp -I. -DMOE_NO_IMPLEMENTATION \
    -fsanitize=address,undefined -fno-sanitize-recover=all examples/inspect.c tests/lib/plain.c \
    "$build/moe_sanitized.o" -o "$dir/inspect" -lm
export ASAN_OPTIONS=detect_leaks=0 # what lives until the end of a program is not freed
check "the maker of test files compiles" $cc -std=c99 -O0 -DMOE_NO_SIMD -I. -DOUT="\"$dir/\"" \
    tests/examples/inspect_files.c -o "$dir/make" -lm
[ "$failed" -eq 0 ] || finish
check "test files" "$dir/make"
limit=
command -v timeout >/dev/null 2>&1 && limit="timeout 60"
inspect() { $limit "$dir/inspect" --quiet --bootstrap 50 "$@"; }

# ---- what it finds ----
check "the sample" inspect
check "help" sh -c "'$dir/inspect' --help | grep -q -- --series"
keys() {
    inspect --json 2>/dev/null | head -n 1 | tr ',' '\n' | sed -n 's/.*"\([a-z0-9_]*\)":.*/\1/p' >"$dir/keys"
    printf '%s\n' layer tokens experts top_k load maxvio maxvio_batch cv \
        gini entropy effective_experts dead dead_experts dead_first gamma_eff \
        gamma_lo gamma_hi gamma_null gamma_excess excess_lo excess_hi \
        gamma_ols identified temperature l1_game l1_softmax l1_uniform l1_types_coupled \
        l1_types_independent masked probabilities feasible k_over_m | diff - "$dir/keys"
}
check "JSON keys, exactly" keys
number() { sed -n "$2p" "$1" | sed -n "s/.*\"$3\":\([-0-9.e+]*\|true\|false\|null\).*/\1/p"; }
near() { # FILE LINE KEY VALUE WITHIN
    got=$(number "$1" "$2" "$3")
    awk -v a="$got" -v b="$4" -v w="$5" -v key="$3" \
        'BEGIN { if (a == "" || a == "null" || a - b > w || b - a > w) { print key " is " a; exit 1 } }'
}
run() { # OUT ARGUMENTS...
    out=$dir/$1
    shift
    inspect --json "$@" >"$out" 2>/dev/null
}
check "planted dump" run planted.json --logits "$dir/planted.npy" --indices "$dir/planted_index.npy"
check "gamma_eff of the planted dump" near "$dir/planted.json" 1 gamma_eff 12 1.5
covers() { # FILE VALUE SLACK: gamma_lo <= VALUE <= gamma_hi, and both within SLACK of it
    awk -v lo="$(number "$1" 1 gamma_lo)" -v hi="$(number "$1" 1 gamma_hi)" -v v="$2" -v s="$3" \
        'BEGIN { exit !(lo <= v && v <= hi && v - lo < s && hi - v < s) }'
}
check "the interval covers it" covers "$dir/planted.json" 12 4
check "the null of the planted dump" near "$dir/planted.json" 1 gamma_null 0 0.5
check "its excess" near "$dir/planted.json" 1 gamma_excess 12 1.5
above() { awk -v v="$(number "$1" 1 "$2")" -v least="$3" 'BEGIN { exit !(v > least) }'; }
check "which is above 0" above "$dir/planted.json" excess_lo 8
check "tokens alike, nothing but noise" run noise.json --top-k 2 "$dir/noise.npy"
check "look like congestion" above "$dir/noise.json" gamma_lo 5
within() { # FILE: the interval of the excess holds 0
    awk -v lo="$(number "$1" 1 excess_lo)" -v hi="$(number "$1" 1 excess_hi)" 'BEGIN { exit !(lo <= 0 && hi >= 0) }'
}
check "and have no excess" within "$dir/noise.json"
check "top-k of indices" near "$dir/planted.json" 1 top_k 1 0
check "planted dump, one thread" run planted1.json --threads 1 --logits "$dir/planted.npy" --indices \
    "$dir/planted_index.npy"
check "the same for any number of threads" cmp "$dir/planted.json" "$dir/planted1.json"

bad() { # FILE BYTE TEXT ARGUMENTS...: status 2, and one line with all three
    file=$1 byte=$2 text=$3
    shift 3
    $limit "$dir/inspect" --quiet --bootstrap 5 "$@" >"$dir/out" 2>"$dir/err"
    code=$?
    [ $code -eq 2 ] || { echo "status $code"; cat "$dir/err"; return 1; }
    [ "$(wc -l <"$dir/err")" -eq 1 ] || { cat "$dir/err"; return 1; }
    grep -F "$file" "$dir/err" | grep -F "byte $byte:" | grep -q "$text" || { cat "$dir/err"; return 1; }
}

check "the same dump, half of it padding" run half.json --logits "$dir/half.npy" --indices "$dir/half_index.npy"
for key in tokens gamma_eff gamma_lo gamma_hi gamma_null gamma_excess gamma_ols temperature maxvio l1_game; do
    check "$key knows no padding" near "$dir/half.json" 1 $key "$(number "$dir/planted.json" 1 $key)" 1e-6
done

check "hand-made indices" run hand.json "$dir/hand_index.npy" --experts 4
check "tokens" near "$dir/hand.json" 1 tokens 6 0
check "experts" near "$dir/hand.json" 1 experts 4 0
check "MaxVio" near "$dir/hand.json" 1 maxvio 1 1e-8       # loads 6 3 2 1
check "CV" near "$dir/hand.json" 1 cv 0.62360956 1e-8
check "Gini" near "$dir/hand.json" 1 gini 0.33333333 1e-8
check "entropy" near "$dir/hand.json" 1 entropy 1.19884931 1e-8
check "effective experts" near "$dir/hand.json" 1 effective_experts 3.31629870 1e-7
check "dead: none" near "$dir/hand.json" 1 dead 0 0              # 1 of 12 is over a tenth of 3
check "dead by first choices" near "$dir/hand.json" 1 dead_first 2 0 # 4 2 0 0
check "an expert that nobody chose" run unused.json "$dir/hand_index.npy" --experts 6
check "is dead" sh -c "grep -q '\"dead\":2,\"dead_experts\":\[4,5\],\"dead_first\":4,' '$dir/unused.json'"
check "and in the table" sh -c "'$dir/inspect' --quiet '$dir/hand_index.npy' --experts 6 | grep -q '^    0  4 5\$'"
check "indices with rows that have no choice" run padded.json "$dir/padded_index.npy" --experts 4
check "are the same as without them" cmp "$dir/hand.json" "$dir/padded.json"
check "no tokens" bad none_index.npy 0 "no tokens" "$dir/none_index.npy"
check "no tokens of as many experts" bad none_index.npy 0 "no tokens" --experts 4 "$dir/none_index.npy"
check "no gamma without logits" sh -c "grep -q '\"gamma_eff\":null.*\"identified\":false' '$dir/hand.json'"
check "indices alone, experts from the largest" run hand2.json "$dir/hand_index.npy"
check "they are the same" cmp "$dir/hand.json" "$dir/hand2.json"
check "int64 indices" run hand64.json "$dir/hand_index64.npy"
check "are the same as int32" cmp "$dir/hand.json" "$dir/hand64.json"

for type in f2 f8 bf16 v2 v3; do # exact in every type
    option=
    [ $type = bf16 ] && option=--bf16
    # shellcheck disable=SC2086
    check "$type" run $type.json --top-k 2 $option "$dir/small_$type.npy"
    run f4.json --top-k 2 "$dir/small_f4.npy"
    check "$type gives what float32 gives" cmp "$dir/f4.json" "$dir/$type.json"
done
check "three dimensions" run layers.json --top-k 2 "$dir/layers.npy"
check "are three layers" near "$dir/layers.json" 3 layer 2 0
check "the first of them" sh -c "head -n 1 '$dir/layers.json' | cmp - '$dir/f4.json'"
check "two files" run two.json --top-k 2 "$dir/small_f4.npy" "$dir/layers.npy"
check "number their layers on" near "$dir/two.json" 4 layer 3 0
check "constant quality and even load" run flat.json --top-k 1 --indices "$dir/flat_index.npy" --logits "$dir/flat.npy"
check "is unidentified" sh -c "grep -q '\"identified\":false' '$dir/flat.json'"

check "labels" sh -c \
    "'$dir/inspect' --quiet --bootstrap 20 --top-k 1 --labels '$dir/labels.npy' '$dir/small_f4.npy' >'$dir/labels.txt'"
check "and what they say" grep -q PURE_CORE "$dir/labels.txt"
# labels are the first choices but in every tenth token, where they are 0
check "the experts of a label" grep -q '^    0      3  3 100%$' "$dir/labels.txt"
check "labels in JSON" run labels.json --top-k 1 --labels "$dir/labels.npy" "$dir/small_f4.npy"
labelled() { # of each expert the tokens by label: only its own number and 0; they sum to the 300 tokens
    sed 's/.*"labels":\[\[\(.*\)\]\],"label_experts".*/\1/; s/\],\[/\n/g' "$dir/labels.json" | awk -F , '
        { for (i = 1; i <= NF; i++) { sum += $i; if ($i && i != 1 && i != NR) bad = 1 } }
        END { exit bad || NR != 6 || sum != 300 }'
}
check "the map of labels" labelled
check "the experts of each label" sh -c \
    "grep -q '\"label_experts\":\[\[0,[0-9],[0-9]\],\[1\],\[2\],\[3\],\[4\],\[5\]\]' '$dir/labels.json'"
check "labels in HTML" inspect --html --out "$dir/html" --top-k 1 --labels "$dir/labels.npy" "$dir/small_f4.npy"
check "with a map and the experts of a label" sh -c "grep -q 'share of a label' '$dir/html/inspect.html' &&
    grep -q '3 100%' '$dir/html/inspect.html'"

# masked experts, probabilities
loads() { sed 's/.*"load":\(\[[^]]*\]\).*/\1/' "$dir/$1.json"; }
same_loads() { [ -n "$(loads "$1")" ] && [ "$(loads "$1")" = "$(loads "$2")" ]; }
check "a masked expert" run masked.json --top-k 2 "$dir/masked.npy"
check "a low logit" run low.json --top-k 2 "$dir/low.npy"
check "are never chosen: the same loads" same_loads masked low
check "the masked one is dead, and has no quality" sh -c "grep -q \
    '\"dead_experts\":\[5\].*\"gamma_eff\":null.*\"identified\":false.*\"masked\":1,' '$dir/masked.json'"
check "and so says a warning" sh -c \
    "'$dir/inspect' --quiet --bootstrap 5 --top-k 2 '$dir/masked.npy' 2>&1 >/dev/null | grep -q 'masked experts: 1'"
check "logits are no probabilities" sh -c "grep -q '\"masked\":0,\"probabilities\":false' '$dir/low.json'"
check "probabilities" run probabilities.json --top-k 2 "$dir/probabilities.npy"
check "are recognised" grep -q '"probabilities":true' "$dir/probabilities.json"
check "with a warning" sh -c "'$dir/inspect' --quiet --bootstrap 5 --top-k 2 '$dir/probabilities.npy' 2>&1 >/dev/null |
    grep -q 'sums to 1): 1; say --probabilities'"
check "their log" run log.json --top-k 2 --probabilities "$dir/probabilities.npy"
check "is as good as logits" sh -c "grep -q '\"probabilities\":false' '$dir/log.json'"
check "with their loads" same_loads log f4
check "one row that does not sum to 1" run not_quite.json --top-k 2 "$dir/not_quite.npy"
check "and they are none" grep -q '"probabilities":false' "$dir/not_quite.json"

for model in olmoe mixtral sharded; do # the same weights and hidden states in three layouts
    file=$dir/$model.safetensors
    [ $model = sharded ] && file=$dir/model.safetensors.index.json
    check "$model" run $model.json --top-k 2 --router "$file" "$dir/hidden.npy"
    check "$model: layers by their names" near "$dir/$model.json" 2 layer 3 0
    check "$model: loads" sh -c \
        "sed 's/.*\"load\":\(\[[^]]*\]\).*/\1/' '$dir/$model.json' | cmp - '$dir/router_loads.txt'"
done

check "a router's bias" run biased.json --top-k 2 --router "$dir/biased.safetensors" "$dir/hidden.npy"
check "chooses" grep -q '"layer":1,.*"load":\[0,0.5,0,0.5\]' "$dir/biased.json"
check "but a bias of zeros changes nothing" sh -c "sed -n 2p '$dir/olmoe.json' >'$dir/olmoe_3.json'
    sed -n 2p '$dir/biased.json' | cmp - '$dir/olmoe_3.json'"
check "its bias is in another shard" run shard_bias.json --top-k 2 --router "$dir/biased.safetensors.index.json" \
    "$dir/hidden.npy"
check "and chooses the same" sh -c "head -n 1 '$dir/biased.json' | cmp - '$dir/shard_bias.json'"

check "a series" run series.json --series --steps-at 1000,2000,4000,8000,16000,32000,64000 --top-k 1 --batches 20 \
    "$dir/step0.npy" "$dir/step1.npy" "$dir/step2.npy" "$dir/step3.npy" "$dir/step4.npy" \
    "$dir/step5.npy" "$dir/step6.npy"
phases() {
    steps='\[1000,2000,4000,8000,16000,32000,64000\]' gammas='"gamma_eff":\[.*\],"gamma_excess":\[.*\]'
    tail -n 1 "$dir/series.json" |
        grep -q "^{\"event\":\"phases\",\"step\":$steps,$gammas,\"excess_lo\":.*,\"phase\":\[\"[a-z]*\",.*\]}\$"
}
check "has an object of phases last" phases
check "and one for each checkpoint" sh -c "[ \$(wc -l <'$dir/series.json') = 8 ]"

check "html" inspect --html --out "$dir/html" --top-k 2 "$dir/layers.npy"
page() { # complete, with pictures, and nothing is loaded from elsewhere
    grep -q '</html>' "$dir/html/inspect.html" && grep -q '<svg' "$dir/html/inspect.html" &&
        ! sed 's|xmlns="[^"]*"||g' "$dir/html/inspect.html" | grep -Eq 'https?://|src=|<link'
}
check "is a page that needs nothing else" page
check "html of a series" inspect --html --out "$dir/html" --series --top-k 1 --batches 10 \
    "$dir/step0.npy" "$dir/step1.npy" "$dir/step2.npy"
check "shows the checkpoints" grep -q "over training" "$dir/html/inspect.html"

# ---- in words (each rule: reading.c) ----
check "in words" sh -c "'$dir/inspect' --quiet --explain --bootstrap 50 >'$dir/words.txt'"
check "the collapsed layer first" sh -c "sed -n '/^In words/{n;p;}' '$dir/words.txt' |
    grep -q '^layer 0: 14 of 16 experts are dead: each has under a tenth of an even share of 4000 selections'"
check "each layer that has dead experts" [ "$(grep -c 'experts are dead' "$dir/words.txt")" = 3 ]
check "in words, JSON" run words.json --explain --indices "$dir/planted_index.npy" --logits "$dir/planted.npy"
rules() {
    sed -n 's/.*"event":"reading","layer":\([0-9]*\),"rule":"\([a-z0-9-]*\)".*/\1 \2/p' "$dir/words.json" | tr "\n" ,
}
check "its rules" [ "$(rules)" = "0 congested,0 top-1,0 healthy," ]
check "the layers' own lines are as without" sh -c "head -n 1 '$dir/words.json' | cmp - '$dir/planted.json'"
check "a router that is well" run well.json --explain --top-k 2 "$dir/small_f4.npy"
check "has one line, which says so" sh -c "[ \$(grep -c reading '$dir/well.json') = 1 ] &&
    grep -q '\"layer\":0,\"rule\":\"healthy\"' '$dir/well.json'"
check "in words, HTML" grep -q 'In words' "$dir/html/inspect.html"

# ---- relations: right values by hand, and by a few lines of Python for the logarithms ----
check "two dumps" run compare.json --experts 4 "$dir/hand_index.npy" --compare "$dir/other_index.npy"
check "first choices kept" near "$dir/compare.json" 2 top1_overlap 0.5 1e-8
check "by chance" near "$dir/compare.json" 2 top1_chance 0.33333333 1e-8  # (4 x 2 + 2 x 2) / 36
check "choices kept" near "$dir/compare.json" 2 topk_overlap 0.66666667 1e-8
check "by chance" near "$dir/compare.json" 2 topk_chance 0.56944444 1e-8  # (6 x 4 + 3 x 3 + 2 x 3 + 1 x 2) / 72
check "churn" near "$dir/compare.json" 2 churn 0.5 1e-8
check "load moved" near "$dir/compare.json" 2 load_moved 0.16666667 1e-8  # (2 + 0 + 1 + 1) / 24
check "MaxVio of the other" near "$dir/compare.json" 2 other_maxvio 0.33333333 1e-8
check "the other alone" run other.json --experts 4 "$dir/other_index.npy"
check "MaxVio by micro-batch, each a token" near "$dir/other.json" 1 maxvio_batch 1 1e-8 # one of 4 has twice 0.5
check "in one batch" run other1.json --experts 4 "$dir/other_index.npy" --batches 1
check "it is that of all" near "$dir/other1.json" 1 maxvio_batch 0.33333333 1e-8
check "the first's line is as alone" sh -c "head -n 1 '$dir/compare.json' | cmp - '$dir/hand.json'"
check "two dumps with padding" run compare_padded.json --experts 4 "$dir/padded_index.npy" --compare \
    "$dir/padded_other.npy"
check "are as without" cmp "$dir/compare.json" "$dir/compare_padded.json"
check "a dump and itself" run itself.json --top-k 2 "$dir/small_f4.npy" --compare "$dir/small_f8.npy"
check "keep all" near "$dir/itself.json" 2 topk_overlap 1 0
check "and move nothing" near "$dir/itself.json" 2 load_moved 0 0
check "dumps of other tokens" run strangers.json --top-k 2 "$dir/small_f4.npy" --compare "$dir/noise.npy"
check "have no overlap" grep -q '"topk_overlap":null' "$dir/strangers.json"
check "relations" run together.json --relations --experts 4 "$dir/hand_index.npy"
# 3 of 6 pairs, where 6 x 18 / 47 are expected; 1 and 2 never
check "chosen together" grep -q '"ratio":\[\[null,1.30555556,1.30555556,1.30555556\],\[1.30555556,null,0,0\]' \
    "$dir/together.json"
check "from layer to layer" run layers_index.json --relations "$dir/layers_index.npy"
transition() { sed -n "/\"from\":$1,/p" "$dir/layers_index.json" >"$dir/transition.json"; }
transition 0
check "mutual information" near "$dir/transition.json" 1 information 0.38039567 1e-8
check "its share" near "$dir/transition.json" 1 information_share 0.52537 1e-5 # of 0.66156 + 1/16
check "the map" grep -q '"share":\[\[0.75,0.25\],\[0,1\]\]' "$dir/transition.json"
bracket() { # its interval holds the estimate and has a width
    awk -v v="$(number "$1" 1 "$2")" -v lo="$(number "$1" 1 "$2_lo")" -v hi="$(number "$1" 1 "$2_hi")" \
        'BEGIN { exit !(lo < v && v < hi) }'
}
check "the interval" bracket "$dir/transition.json" information
transition 1
check "nearly independent" near "$dir/transition.json" 1 information -0.05160918 1e-8
check "percentiles" grep -q '"event":"percentiles","maxvio":\[0,0.125,0.25,0.375,0.5\]' "$dir/layers_index.json"
check "relations, one thread" run layers_index1.json --relations --threads 1 "$dir/layers_index.npy"
check "are the same" cmp "$dir/layers_index.json" "$dir/layers_index1.json"
check "labels and experts" run domains.json --labels "$dir/layers_label.npy" "$dir/layers_index.npy"
check "information" near "$dir/domains.json" 1 label_information 0.36157374 1e-8
check "all of it" near "$dir/domains.json" 2 label_information_share 1 1e-8 # labels are the choices; one has none
check "none of it" near "$dir/domains.json" 3 label_information -0.06728514 1e-8
check "its interval" bracket "$dir/domains.json" label_information
check "CSV" inspect --csv --out "$dir/csv" --experts 4 "$dir/hand_index.npy" --compare "$dir/other_index.npy"
columns() { # as many in every line; the values those of the JSON
    awk -F , 'NR == 1 { n = NF; for (i = 1; i <= n; i++) if ($i == "gini") gini = i }
        NF != n { exit 1 } NR > 1 { print $gini }' "$dir/csv/inspect.csv" | tr '\n' ' '
}
check "a row for each layer" [ "$(columns)" = "0.333333333 0.125 " ]
check "pictures of relations" inspect --html --relations --out "$dir/related" --top-k 2 "$dir/layers.npy" --compare \
    "$dir/layers.npy"
check "are on the page" sh -c "grep -q 'chosen together, observed' '$dir/related/inspect.html' &&
    grep -q 'From layer 1 (rows) to layer 2' '$dir/related/inspect.html' &&
    grep -q 'Share of the choices that both dumps have' '$dir/related/inspect.html'"
check "with a table of both" grep -q '<td>2</td><td>1.000</td><td>0.[0-9]*</td><td>1.000</td>' \
    "$dir/related/inspect.html"

# ---- bad files ----
for file in order dtype nan inf zero overflow long magic version records nohdr; do
    read -r byte text <"$dir/bad_$file.want"
    check "bad: $file" bad "bad_$file.npy" "$byte" "$text" --top-k 2 "$dir/bad_$file.npy"
done
size=$(wc -c <"$dir/small_f4.npy") n=0 wrong=0
while [ $n -lt "$size" ]; do # truncated at every length of the header, and here and there behind it
    head -c $n "$dir/small_f4.npy" >"$dir/cut.npy"
    bad cut.npy $n "" --top-k 2 "$dir/cut.npy" >"$dir/cut.log" 2>&1 || { wrong=$((wrong + 1)); cat "$dir/cut.log"; }
    n=$((n < 136 ? n + 1 : n + 97))
done
check "truncated files" test $wrong -eq 0
check "bad: too few experts left" bad one_left.npy 1996 "fewer experts .* layer 0, token 77, expert 5" --top-k 2 \
    "$dir/one_left.npy"
check "bad: NaN names its place" bad bad_nan.npy 1732 "layer 0, token 66, expert 5" --top-k 2 "$dir/bad_nan.npy"
check "bad: NaN of a hidden state" bad bad_nan.npy 1732 "token 66, number of the hidden state 5" --top-k 1 \
    --router "$dir/six.safetensors" "$dir/bad_nan.npy"
check "bad: a folder as router" bad "$dir" 0 "a folder: give its .safetensors" --top-k 2 --router "$dir" \
    "$dir/hidden.npy"
check "bad: no such file" bad none.npy 0 "No such file" "$dir/none.npy"
check "bad: a folder" bad "$dir" 0 "" "$dir"
check "bad: uint16 without --bf16" bad small_bf16.npy 0 "say --bf16" "$dir/small_bf16.npy"
check "bad: top-k above the experts" bad small_f4.npy 0 "top-9 of 6" --top-k 9 "$dir/small_f4.npy"
check "bad: an index too large" bad hand_index.npy 164 "not below" --experts 3 "$dir/hand_index.npy"
check "bad: an expert twice" bad twice_index.npy 132 "twice" "$dir/twice_index.npy"
check "bad: an index over 31 bits" bad wide_index.npy 136 "31 bits" "$dir/wide_index.npy"
check "bad: another number of tokens" bad hand_index.npy 0 "tokens" --logits "$dir/small_f4.npy" --indices \
    "$dir/hand_index.npy"
check "bad: floats as indices" bad small_f4.npy 0 "indices are integers" --indices "$dir/small_f4.npy"
check "bad: too few labels" bad hand_index.npy 0 "one for each token" --top-k 2 \
    --labels "$dir/hand_index.npy" "$dir/small_f4.npy"
check "a negative label is none" "$dir/inspect" --quiet --bootstrap 20 --top-k 1 --labels "$dir/negative_labels.npy" \
    "$dir/small_f4.npy"
# 299 tokens with the one label: pure, whatever the token without a label
check "a token without a label does not count in purity" sh -c \
    "'$dir/inspect' --quiet --json --bootstrap 20 --top-k 1 --labels '$dir/negative_labels.npy' \
    '$dir/small_f4.npy' | grep -q '\"purity\":1[,}]'"
check "bad: safetensors" bad small_f4.npy 0 "" --top-k 2 --router "$dir/small_f4.npy" "$dir/hidden.npy"
check "bad: no router" bad none.safetensors 0 "no router" --router "$dir/none.safetensors" "$dir/hidden.npy"
check "bad: NaN in a router" bad nan.safetensors 96 "NaN" --router "$dir/nan.safetensors" "$dir/hidden.npy"
check "bad: a shard is missing" bad "" 0 "No such file" --router "$dir/missing.safetensors.index.json" "$dir/hidden.npy"
check "bad: an index with a path" bad escape.safetensors.index.json 49 "weight_map" \
    --router "$dir/escape.safetensors.index.json" "$dir/hidden.npy"
check "bad: hidden states of another width" bad small_f4.npy 0 "width" --top-k 2 --router "$dir/olmoe.safetensors" \
    "$dir/small_f4.npy"

# ---- where a file cannot be mapped it is read piece by piece, with the same results ----
# shellcheck disable=SC2086
check "inspect that reads" $cc -std=c99 -O1 -g1 $openmp -I. -DMOE_NO_IMPLEMENTATION -DDUMP_READ \
    -fsanitize=address,undefined -fno-sanitize-recover=all examples/inspect.c tests/lib/plain.c \
    "$build/moe_sanitized.o" -o "$dir/reading" -lm
alike() {
    for program in inspect reading; do
        $limit "$dir/$program" --quiet --json --bootstrap 20 "$@" >"$dir/$program.json" 2>"$dir/$program.err"
        echo "status $?" >>"$dir/$program.json"
    done
    cmp "$dir/inspect.json" "$dir/reading.json" && cmp "$dir/inspect.err" "$dir/reading.err"
}
check "logits" alike --top-k 2 "$dir/small_f4.npy"
check "bfloat16" alike --top-k 2 --bf16 "$dir/small_bf16.npy"
check "logits and indices" alike --logits "$dir/planted.npy" --indices "$dir/planted_index.npy"
check "hidden states" alike --top-k 2 --router "$dir/olmoe.safetensors" "$dir/hidden.npy"
check "labels" alike --top-k 1 --labels "$dir/negative_labels.npy" "$dir/small_f4.npy"
check "masked experts" alike --top-k 2 "$dir/masked.npy"
check "probabilities" alike --probabilities --top-k 2 "$dir/probabilities.npy"
check "too few experts left" alike --top-k 2 "$dir/one_left.npy"
check "NaN" alike --top-k 2 "$dir/bad_nan.npy"

# ---- bad options ----
option() { "$dir/inspect" --quiet "$@" >/dev/null 2>"$dir/err"; [ $? -eq 2 ] && [ "$(wc -l <"$dir/err")" -eq 1 ]; }
check "option: unknown" option --nonsense
check "option: steps without a series" option --steps-at 1,2 "$dir/small_f4.npy"
check "option: too few steps" option --series --top-k 1 --steps-at 1 "$dir/step0.npy" "$dir/step1.npy"
check "option: steps that fall" option --series --top-k 1 --steps-at 2,1 "$dir/step0.npy" "$dir/step1.npy"
check "option: compare a series" option --series --compare "$dir/step1.npy" --top-k 1 "$dir/step0.npy"
check "option: compare two files" option --compare "$dir/step1.npy" --top-k 1 "$dir/step0.npy" "$dir/step2.npy"
check "bad: no such file to compare" bad none.npy 0 "No such file" --top-k 2 "$dir/small_f4.npy" --compare \
    "$dir/none.npy"
check "option: top-k 0" option --top-k 0
check "option: logits need --top-k" option "$dir/small_f4.npy"
check "with a hint" grep -q "small_f4.npy: say --top-k N" "$dir/err"
finish

#!/bin/sh
# bench/checkpoint: a small checkpoint of random weights, in shards with their index; that build/llm reads the same of
# it in every format, by any number of threads and from one file or three; and what a writer that is killed leaves.
cd "$(dirname "$0")/../.." || exit 1
writer=${BUILD:-build}/bench_checkpoint program=${BUILD:-build}/llm
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
suite=checkpoint
. tests/lib/check.sh
make -s "$writer" "$program" || exit 1
limit=
command -v timeout >/dev/null 2>&1 && limit="timeout 60"
same() { [ "$1" = "$2" ] || { printf '%s\nnot\n%s\n' "$1" "$2" && false; }; }
differ() { ! cmp -s "$1" "$2"; }
write() { # NAME ARGUMENTS...: into $tmp/NAME
    name=$1
    shift
    $limit "$writer" --quiet --out "$tmp/$name" --layers 2 --hidden 256 --inner 128 --experts 16 --top-k 4 --heads 4 \
        --vocabulary 700 "$@"
}
refuses() { # STATUS WORDS ARGUMENTS...: of the writer, in one line
    want=$1 words=$2
    shift 2
    write refused "$@" >"$tmp/out" 2>"$tmp/err"
    [ $? -eq "$want" ] || return 1
    [ "$(wc -l <"$tmp/err")" -eq 1 ] || return 1
    for word in $words; do grep -q -e "$word" "$tmp/err" || { cat "$tmp/err" && return 1; }; done
}

# ---- the folder ----
check "it is written" write three --threads 1
check "some MB" sh -c "cat '$tmp'/three/*.safetensors | wc -c | grep -q '^ *[6-9][0-9]\{6\}$'"
check "three files" same "$(ls "$tmp/three" | grep -c '^model-0000[123]-of-00003.safetensors$')" 3
index=$tmp/three/model.safetensors.index.json
check "and their index, of every tensor" \
    same "$(grep -c '^    "[a-z].*": "model-0000[123]-of-00003.safetensors"' "$index")" $((3 + 2 * (9 + 3 * 16)))
check "each file holds some" same "$(grep -o 'model-0000[123]' "$index" | sort -u | wc -l | tr -d ' ')" 3
check "nothing else" same "$(ls "$tmp/three" | grep -v '^model' | tr '\n' ' ')" 'config.json tokenizer.json '
check "by two threads" write again --threads 2
for file in "$tmp"/three/*; do check "the same bytes: ${file##*/}" cmp "$file" "$tmp/again/${file##*/}"; done
check "in one file" write one --shards 1
check "which has no index" [ ! -e "$tmp/one/model.safetensors.index.json" ]
check "another seed" write other --seed 2
check "fewer files over more" write again --shards 1
check "leave no index" [ ! -e "$tmp/again/model.safetensors.index.json" ]
check "heads that do not divide" refuses 2 'heads' --heads 3
check "more experts a token than there are" refuses 2 'top-k experts 16' --top-k 17
check "too few tokens" refuses 2 'vocabulary 257' --vocabulary 256

# ---- what build/llm makes of it ----
llm() { # FOLDER ARGUMENTS...
    folder=$tmp/$1
    shift
    $limit "$program" --quiet --model "$folder" "$@"
}
ids=1,22,333,444,555
for format in f32 bf16 int8 int4; do
    for threads in 1 2; do
        check "$format, $threads threads" llm three --ids $ids --format $format --threads $threads --dump \
            "$tmp/$format$threads"
        llm three --ids $ids --format $format --threads $threads --greedy 9 --json >"$tmp/$format$threads.ids"
    done
    check "$format: the same ids" cmp "$tmp/${format}1.ids" "$tmp/${format}2.ids"
    check "$format: nine of them" grep -q '^{"event":"final","ids":\[[0-9]*\(,[0-9]*\)\{8\}\]}$' "$tmp/${format}1.ids"
    check "$format: from one file" llm one --ids $ids --format $format --threads 2 --dump "$tmp/${format}one"
    for part in logits router_logits experts; do
        check "$format: the same $part" cmp "$tmp/${format}1.$part.npy" "$tmp/${format}2.$part.npy"
        check "$format: from one file the same $part" cmp "$tmp/${format}1.$part.npy" "$tmp/${format}one.$part.npy"
    done
done
check "bf16 loses nothing" cmp "$tmp/f321.logits.npy" "$tmp/bf161.logits.npy"
check "int8 does" differ "$tmp/f321.logits.npy" "$tmp/int81.logits.npy"
check "int4 is another" differ "$tmp/int81.logits.npy" "$tmp/int41.logits.npy"
llm other --ids $ids --dump "$tmp/other"
check "another seed is another model" differ "$tmp/f321.logits.npy" "$tmp/other.logits.npy"
check "every id is a text" same "$(llm three --decode "$(llm three --encode 'What is it?')")" 'What is it?'
check "it writes on" llm three --prompt 'What' --tokens 4 --format int4 --out "$tmp/out.d"

# ---- a writer that is killed ----
# kill_writer NAME: ended without warning in the middle of its first file
kill_writer() {
    rm -f "$tmp/$1"/*.part
    "$writer" --quiet --out "$tmp/$1" --layers 16 --hidden 1024 --inner 512 >/dev/null 2>&1 &
    victim=$! turn=0
    while [ $turn -lt 300 ] && [ -z "$(find "$tmp/$1" -name 'model-*.part' -size +64k 2>/dev/null)" ]; do
        kill -0 $victim 2>/dev/null || break
        sleep 0.1
        turn=$((turn + 1))
    done
    kill -9 $victim
    wait $victim
    [ $? -eq 137 ]
}
unfinished() { # no file has its name, and build/llm says that there is no model
    ls "$tmp/$1" | grep -v 'part$' | grep '^model-0000.-of-00003\|^config' && return 1
    llm "$1" --ids 1 --greedy 1 2>"$tmp/err"
    [ $? -eq 2 ] && grep -q 'config.json' "$tmp/err"
}
check "killed" kill_writer killed
check "and nothing half written has its name" unfinished killed
check "written again" write killed
check "it runs" llm killed --ids 1 --greedy 1
check "killed over a whole one" kill_writer killed
gone() { llm killed --ids 1 --greedy 1 2>"$tmp/err"; [ $? -eq 2 ] && grep -q 'config.json' "$tmp/err"; }
check "that is no longer taken for one" gone
old() { cmp "$tmp/killed/model-00002-of-00003.safetensors" "$tmp/three/model-00002-of-00003.safetensors"; }
check "its files are the old ones, whole" old
small_disk() { (ulimit -f 1000 && write full) >/dev/null 2>&1; [ $? -ne 0 ] && [ ! -e "$tmp/full/config.json" ]; }
check "no room: an error" small_disk
finish

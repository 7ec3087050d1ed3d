#!/bin/sh
# cifar10: the main job's keys and files, seeds, experts that split on a plateau, DynMoE's rule, and bad arguments.
# The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
example=cifar10
. tests/lib/example.sh
epochs() { grep '^{"event":"epoch",' "$tmp/$1.out"; }
growth() { grep '^{"event":"growth",' "$tmp/$1.out"; }
few='--batch 20 --eval 20 --json'

# seeds: a final line each, and their mean
run seeds 0 $few --steps 2 --seeds 2 --no-dense
check "a line for each seed" [ "$(grep -c '"seed":[12],.*"checksum"' "$tmp/seeds.out")" -ge 2 ]
run second 0 $few --steps 2 --seed 2 --no-dense
check "the second of two seeds is --seed 2" grep -q "$(finals second | value_of checksum)" "$tmp/seeds.out"
check "the page and the picture are whole" \
    [ "$(tail -n 1 "$tmp/second/cifar10.html")$(tail -n 1 "$tmp/second/cifar10.svg")" = "</main></body></html></svg>" ]
check "standard output is cifar10.jsonl" cmp -s "$tmp/second.out" "$tmp/second/cifar10.jsonl"

# Muon for the convolutions: another training, and the same with any number of threads
run muon 0 $few --steps 3 --no-dense --optimizer muon --threads 1
run adamw 0 $few --steps 3 --no-dense --optimizer adamw
run threads 0 $few --steps 3 --no-dense --optimizer muon --threads 3
check "another optimiser, another training" \
    sh -c "[ '$(finals muon | value_of checksum)' != '$(finals adamw | value_of checksum)' ]"
check "the same bits with 3 threads" [ "$(finals muon | value_of checksum)" = "$(finals threads | value_of checksum)" ]
check "the configuration names it" grep -q '"optimizer":"muon"' "$tmp/muon.out"
run gelu 0 $few --steps 3 --no-dense --optimizer muon --activation gelu --threads 1
run gelus 0 $few --steps 3 --no-dense --optimizer muon --activation gelu --threads 3
check "another activation, another training" \
    sh -c "[ '$(finals muon | value_of checksum)' != '$(finals gelu | value_of checksum)' ]"
check "that too has the same bits with 3 threads" \
    [ "$(finals gelu | value_of checksum)" = "$(finals gelus | value_of checksum)" ]
check "it is named too" grep -q '"activation":"gelu"' "$tmp/gelu.out"
run tiles 0 $few --steps 3 --no-dense --convolution winograd --threads 1
run tiless 0 $few --steps 3 --no-dense --convolution winograd --threads 3
run direct 0 $few --steps 3 --no-dense --convolution direct --threads 2
check "convolutions by tiles are rounded otherwise" \
    sh -c "[ '$(finals tiles | value_of checksum)' != '$(finals direct | value_of checksum)' ]"
check "those too have the same bits with 3 threads" \
    [ "$(finals tiles | value_of checksum)" = "$(finals tiless | value_of checksum)" ]
check "and direct ones are the sample's" \
    [ "$(finals adamw | value_of checksum)" = "$(finals direct | value_of checksum)" ]
check "and named" grep -q '"convolution":"winograd"' "$tmp/tiles.out"

# nothing is learned: the controller sees a plateau after three epochs, splits once, and the pair has places at the end
still='--grow --lr 1e-30 --batch 200 --eval 20 --no-dense --json'
run plateau 0 $still --epochs 5
check "one expert split, in the fourth epoch" [ "$(growth plateau | sed 's/,"reason".*//')" = \
    '{"event":"growth","epoch":4,"experts":9' ]
check "and why" says plateau 'plateau for 3 epochs, cooldown over: split expert [0-7] (load 0\.[0-9]*): now 9'
check "the function is what it was: bound to its parent" [ "$(epochs plateau | sed -n 5p | value_of test_accuracy)" = \
    "$(epochs plateau | sed -n 4p | value_of test_accuracy)" ]
params=$(finals plateau | value_of params)
run still 0 --lr 1e-30 --steps 1 --batch 20 --eval 20 --no-dense --json
check "nine experts' parameters" [ "$params" -gt "$(finals still | value_of params)" ]

# DynMoE's own rule: tokens that no expert takes get a new one
run dynmoe 0 --system dynmoe --grow $few --epochs 2 --no-dense
check "dynmoe says what it did" sh -c "grep -c '\"event\":\"growth\"' '$tmp/dynmoe.out' | grep -qv '^0\$'"
check "and why" says dynmoe 'experts, [0-9]* tokens that none took: now [0-9]'

# bad arguments
run system 2 --system mixtrl
check "near names" says system 'did you mean mixtral'
run optimizer 2 --optimizer sgd
run convolution 2 --convolution fft
run activation 2 --activation tanh
run batch 2 --batch 5000
run nothing 2 --data "$tmp"
finish

#!/bin/sh
# Experts on MPI processes: the checksum of a training is the same for 1, 2, 3 and 4 of them; what travels, and what
# LLEP and Gating Dropout make of it; bad arguments; one of four processes killed ends the others with a message.
# Skipped where there is no MPI. The last line is "N passed, N failed".
set -u
cd "$(dirname "$0")/../.." || exit 1
skip() {
    echo "skipped expert_parallel: $1"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
}
command -v mpirun >/dev/null 2>&1 || skip "no mpirun"
command -v "${MPICC:-mpicc}" >/dev/null 2>&1 || skip "no mpicc"
example=expert_parallel
. tests/lib/example.sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_mpi_yield_when_idle=1 # more processes than processors: who waits makes room
mpirun -np 1 true >"$tmp/mpirun" 2>&1 || skip "mpirun does not run here: $(head -n 1 "$tmp/mpirun")"
real=$program
program=$tmp/program # of example.sh's run: with so many processes
printf '#!/bin/sh\nexec mpirun -np "$ranks" "%s" "$@"\n' "$real" >"$program"
chmod +x "$program"
export ranks
value() { finals "$1" | grep "\"method\":\"$2\"" | value_of "$3"; } # value RUN METHOD KEY

for ranks in 1 2 3 4; do
    run "of$ranks" 0 --steps 12 --images 150 --json --method standard,balanced
    for method in standard balanced; do
        check "$method on $ranks has the bits of one: $(value "of$ranks" $method checksum)" \
            [ "$(value of1 $method checksum)" = "$(value "of$ranks" $method checksum)" ]
    done
    check "standard output is expert_parallel.jsonl" cmp -s "$tmp/of$ranks.out" "$tmp/of$ranks/expert_parallel.jsonl"
done
check "a checksum" [ "$(value of1 standard checksum | wc -c)" -eq 17 ]
check "another training, another checksum" [ "$(value of1 standard checksum)" != "$(value of1 balanced checksum)" ]
for ranks in 2 4; do
    of_one="$(value of1 standard expert_bytes)"
    held=$(value "of$ranks" standard expert_bytes)
    check "on $ranks each holds its part of the experts" [ $((held * ranks)) -eq "$of_one" ]
done
check "alone nothing is sent" [ "$(value of1 standard row_bytes)" = 0 ]

ranks=4
run all 0 --steps 12 --images 150 --json
check "seven methods" [ "$(count all)" -eq 7 ]
check "waited for at once, the same bits" [ "$(value all balanced checksum)" = "$(value all blocking checksum)" ]
check "LLEP evens the work" holds "$(value all llep makespan) * 2 < $(value all standard makespan)"
check "and moves weights" holds "$(value all llep weight_bytes) > 0 && $(value all standard weight_bytes) == 0"
check "LLEP learns the same" holds "($(value all llep loss) - $(value all standard loss))^2 < 1e-8"
kept="(1 - $(value all gating-dropout dropped) / 12)"
check "a step without exchange sends no rows" \
    holds "($(value all gating-dropout row_bytes) / $(value all balanced row_bytes) / $kept - 1)^2 < 0.02^2"
check "some are" holds "$(value all gating-dropout dropped) > 0"
check "a quarter stays at home by chance" holds "($(value all balanced home) - 0.25)^2 < 0.05^2"
for ending in html svg; do check "expert_parallel.$ending" [ -s "$tmp/all/expert_parallel.$ending" ]; done
for ratio in Memory Overlap LLEP 'Gating Dropout' Locality; do check "$ratio in words" says all "^$ratio.*: "; done

run wrong 2 --method nothing
check "names the method" says wrong "there is no 'nothing'"
run uneven 2 --experts 6
check "says what does not divide" says uneven "4 processes do not divide 6 experts"

# one of four is killed
"$program" --quiet --steps 1000000 --epochs 1000000 --images 150 --out "$tmp/killed" \
    >"$tmp/killed.out" 2>"$tmp/killed.err" &
job=$!
seconds=0
victim=
while [ "$seconds" -lt 120 ] && ! grep -q '^method' "$tmp/killed.out"; do sleep 1; seconds=$((seconds + 1)); done
sleep 2
for process in $(ps -o pid= --ppid "$job"); do
    case $(ps -o args= -p "$process") in *expert_parallel*) victim=$process ;; esac
done
check "the training runs" [ -n "$victim" ]
[ -n "$victim" ] && kill -9 "$victim"
seconds=0
while [ "$seconds" -lt 10 ] && kill -0 "$job" 2>/dev/null; do sleep 1; seconds=$((seconds + 1)); done
ended=yes
kill -0 "$job" 2>/dev/null && ended=no && kill "$job"
wait "$job"
code=$?
check "the others end within 10 s" [ "$ended" = yes ]
check "not as if all were well" [ "$code" -ne 0 ]
check "with a message" grep -q 'killed\|signal 9\|noticed' "$tmp/killed.err"
finish

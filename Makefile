# make run     train on the real CIFAR-10 sample of this repository, print the health table, write out/
# make test    everything that a change must pass; ends with "N passed, N failed"
# make coverage, make fuzz   what the tests reach, and random bytes for all that reads (docs/testing.md)
# make bench   speed, as a share of this machine's limits (PEERS=1: other libraries beside it)
# make experiments-quick   what the sources claim, put to a test: minutes (make experiments ARGS="--data data": hours)
# make browser a page in which a mixture learns (needs clang for WebAssembly; docs/manual.md)
# make data    download the full CIFAR-10 into data/ (curl)
# make install PREFIX=/usr/local
# Needs a C compiler and make. OpenMP is used where the compiler has it.

CC ?= cc
CXX ?= c++
PREFIX ?= /usr/local
BUILD ?= build
WARN = -Wall -Wextra -Wpedantic -Wconversion -Wshadow
OPENMP := $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo -fopenmp)
CFLAGS ?= -O3
FLAGS = -std=c99 $(WARN) $(CFLAGS) -ffp-contract=off $(OPENMP) $(CPPFLAGS) -I.
LIBS = -lm

# an MPI compiler, for the one example that is made of several processes; without it that one is left out
MPICC ?= $(shell command -v mpicc 2>/dev/null)
OF_MPI = $(BUILD)/expert_parallel
EXAMPLES = $(filter-out $(if $(MPICC),,$(OF_MPI)),$(patsubst examples/%.c,$(BUILD)/%,$(wildcard examples/*.c)))
BENCHES = $(patsubst bench/%.c,$(BUILD)/bench_%,$(wildcard bench/*.c))
# a suite is a .c file: tests/gate.c -> build/test/gate, tests/contract/bits.c -> build/test/contract/bits;
# sanitized: build/sanitized/...
NO_SUITE = tests/contract/golden.c tests/examples/inspect_files.c tests/examples/npy_near.c
SUITES = $(filter-out $(NO_SUITE),$(wildcard tests/*.c tests/contract/*.c tests/examples/*.c))
TESTS = $(SUITES:tests/%.c=$(BUILD)/test/%)
# balance trains for minutes under the sanitizers, and calls nothing that other suites do not
SANITIZED = $(filter-out $(BUILD)/sanitized/balance,$(SUITES:tests/%.c=$(BUILD)/sanitized/%))
SCRIPTS = $(wildcard tests/contract/*.sh tests/examples/*.sh)

.PHONY: all run test coverage fuzz bench experiments experiments-quick sizes browser data install clean help
all: $(EXAMPLES) $(BENCHES)

help:
	@sed -n 's/^# //p' Makefile | head -9

run: $(BUILD)/cifar10
	$(BUILD)/cifar10 $(ARGS)

# Each example is a whole program of one file; the library in it is compiled once for all of them.
LINKED = -DMOE_NO_IMPLEMENTATION $(BUILD)/moe.o
$(BUILD)/moe.o: examples/common/moe.c moe.h | $(BUILD)
	$(CC) $(FLAGS) -c $< -o $@

$(BUILD)/%: examples/%.c $(BUILD)/moe.o $(wildcard examples/common/*.h) | $(BUILD)
	$(CC) $(FLAGS) $< $(LINKED) -o $@ $(LIBS)

$(OF_MPI): examples/expert_parallel.c $(BUILD)/moe.o $(wildcard examples/common/*.h) | $(BUILD)
	OMPI_CC="$(CC)" MPICH_CC="$(CC)" $(MPICC) $(FLAGS) $< $(LINKED) -o $@ $(LIBS)

$(BUILD)/bench_%: bench/%.c $(BUILD)/moe.o $(wildcard bench/*.h examples/common/*.h) | $(BUILD)
	$(CC) $(FLAGS) $< $(LINKED) -o $@ $(LIBS)

TEST_NEEDS = moe.h $(wildcard tests/lib/*.h examples/common/*.h)
TEST_FLAGS = $(FLAGS) -Itests/lib -pthread
SANITIZE = -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
# the library once for all suites, unless a suite has it in itself (tests/lib/test.h); a suite is compiled quickly: what
# it tests is not speed
WITHIN = $(shell grep -l '^.define MOE_IMPLEMENTATION' $<)
$(BUILD)/moe_test.o: tests/lib/moe.c moe.h | $(BUILD)
	$(CC) $(TEST_FLAGS) -O2 -c $< -o $@
$(BUILD)/moe_sanitized.o: tests/lib/moe.c moe.h | $(BUILD)
	$(CC) $(TEST_FLAGS) $(SANITIZE) -O1 -c $< -o $@
$(BUILD)/test/%: tests/%.c $(BUILD)/moe_test.o $(TEST_NEEDS)
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) -O0 $< $(if $(WITHIN),,$(BUILD)/moe_test.o) -o $@ $(LIBS)
$(BUILD)/sanitized/%: tests/%.c $(BUILD)/moe_sanitized.o $(TEST_NEEDS)
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(SANITIZE) -O0 $< $(if $(WITHIN),,$(BUILD)/moe_sanitized.o) -o $@ $(LIBS)

JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
test:
	@$(MAKE) --no-print-directory -j$(JOBS) $(TESTS) $(SANITIZED) $(EXAMPLES)
	@CC="$(CC)" CXX="$(CXX)" BUILD=$(BUILD) JOBS=$(JOBS) sh tests/lib/run.sh $(SCRIPTS) $(TESTS) $(SANITIZED)

# what the suites run of moe.h, by room: lines, functions, branches, MC/DC (ARGS="--show save": what they do not)
coverage:
	@python3 tests/coverage.py $(ARGS)
# every target of tests/fuzz so many times, with clang's libFuzzer (ARGS="desc layer": these)
RUNS ?= 1000000
fuzz:
	@BUILD=$(BUILD) sh tests/fuzz/run.sh $(RUNS) $(ARGS)

bench: $(BENCHES)
	$(BUILD)/bench_gemm $(if $(PEERS),--peers all) $(ARGS)
	$(BUILD)/bench_layer $(if $(PEERS),--peers all) $(ARGS)
	$(BUILD)/bench_train_step $(if $(PEERS),--peers pytorch)
	$(BUILD)/bench_routing
	$(BUILD)/bench_losses $(ARGS)
	$(BUILD)/bench_growth --quick
	$(BUILD)/bench_scale --quick
	$(BUILD)/bench_contract
	$(BUILD)/bench_threads

experiments: $(BUILD)/experiments
	$(BUILD)/experiments $(ARGS)
experiments-quick: $(BUILD)/experiments
	$(BUILD)/experiments --quick $(ARGS)

# code, weights, RAM and stack of a Cortex-M4 build (docs/embedded.md)
sizes:
	@CC="$(CC)" sh tests/examples/embedded.sh | grep -e '^sizes' -e '^skipped' -e FAILED

# build/browser/index.html, one file; clang-19 lld-19 libclang-rt-19-dev-wasm32 wasi-libc on Debian
browser:
	@sh examples/browser/build.sh $(BUILD)/browser && echo "open $(BUILD)/browser/index.html in a browser"

data:
	sh examples/data/fetch.sh data

install:
	mkdir -p $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig
	cp moe.h $(DESTDIR)$(PREFIX)/include/moe.h
	sed -n 's/^#define MOE_VERSION "\(.*\)"/\1/p' moe.h | \
	while read version; do \
	    printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: moe' \
	        'Description: Mixture-of-Experts for the CPU in one C header' "Version: $$version" \
	        'Cflags: -I$${includedir}' 'Libs: -lm' > $(DESTDIR)$(PREFIX)/lib/pkgconfig/moe.pc; \
	done

clean:
	rm -rf $(BUILD) out

$(BUILD):
	mkdir -p $@

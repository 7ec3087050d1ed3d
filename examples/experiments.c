// experiments.c - what the sources claim, put to a test: one row of a table for each experiment.
//
//     build/experiments --quick                  all of them, on the data that the repository carries: minutes
//     build/experiments --data DIR               more seeds and steps, on all of CIFAR-10 and WikiText-2: hours
//     build/experiments --only simbal,phases     some of them
//
// Each prints its tables (as Markdown), draws a picture, and ends with one sentence: claim confirmed, not confirmed, or
// not testable here, with the numbers that say so. The verdicts are rules over numbers (common/exp_verdict.h), written
// before the numbers were there. docs/results.md has what was printed.
#define MOE_IMPLEMENTATION
#include "common/exp_collapse.h"
#include "common/exp_ecology.h"
#include "common/exp_phases.h"
#include "common/exp_simbal.h"
#include "common/experiment.h"

#include <math.h>

static const struct {
    const char *name, *claim;
    void (*run)(exp_run *e);
} experiments[] = {
    {"ecology", "no expert dies where the ecology number T H / (O + B) is at least 0.5", experiment_ecology},
    {"simbal", "a router kept orthogonal learns with fewer tokens than one under a load-balancing loss",
     experiment_simbal},
    {"phases", "gamma_eff surges, stabilises and relaxes over a training", experiment_phases},
    {"collapse", "a router whose feedback is above a threshold collapses; the thresholds are known",
     experiment_collapse},
};
enum { EXPERIMENTS = sizeof experiments / sizeof *experiments };

static const char *experiment_name(void *unused, size_t i) { // for experiment_choose
    (void)unused;
    return i < EXPERIMENTS ? experiments[i].name : NULL;
}

// The processor's name, where the system tells it.
static void machine(char *out, size_t size) {
    char line[256], *at;
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(out, size, "unknown processor");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, "model name", 10) != 0 || !(at = strchr(line, ':'))) continue;
        at[strcspn(at, "\n")] = 0;
        snprintf(out, size, "%s", at + 2);
        break;
    }
    if (f) fclose(f);
}

static void begin(exp_run *e) {
    char processor[256], text[640];
    struct json *j = &e->lines;
    const char *size = e->quick ? "--quick" : "full";
    machine(processor, sizeof processor);
    snprintf(text, sizeof text, "%s, data: %s, seed %llu; %s, %s, threads: %zu; moe.h %s", size,
             e->data ? e->data : "sample", (unsigned long long)e->seed, processor, moe_isa_name(moe_active_isa()),
             moe_workers(&e->parallel), MOE_VERSION);
    e->human = e->json ? stderr : stdout;
    e->lines = (struct json){{open_output(e->out, "experiments.jsonl"), e->json ? stdout : NULL}, 0};
    e->page = open_output(e->out, "experiments.html");
    fprintf(e->human, "%s\n", text);
    page_begin(e->page, "What the sources claim, put to a test", text);
    json_config(j, "experiments");
    json_text(j, "data", e->data ? e->data : "sample");
    json_raw(j, "quick", e->quick ? "true" : "false");
    json_whole(j, "seed", e->seed);
    json_whole(j, "seeds", e->seeds);
    json_whole(j, "steps", e->steps);
    json_text(j, "machine", processor);
    json_text(j, "isa", moe_isa_name(moe_active_isa()));
    json_whole(j, "threads", moe_workers(&e->parallel));
    json_end(j);
}

static void run(exp_run *e, size_t i) {
    e->name = experiments[i].name;
    e->begin = seconds_now();
    fprintf(e->human, "\n## %s: %s\n", experiments[i].name, experiments[i].claim);
    fflush(e->human);
    page_heading(e->page, experiments[i].claim);
    experiments[i].run(e);
}

static void parse(exp_run *e, unsigned char chosen[EXPERIMENTS], int argc, char **argv) {
    args_option options[] = {
        {"only", ARGS_TEXT, &e->only, "NAME", "ecology, simbal, phases, collapse, or several with commas", 0, 0},
        {"quick", ARGS_FLAG, &e->quick, NULL, "fewer seeds and steps: minutes instead of hours", 0, 0},
        {"seeds", ARGS_SIZE, &e->seeds, "N", "trainings of each kind, from --seed on (0: the experiment's)", 0,
         EXP_MAX_SEEDS},
        ARGS_DATA(&e->data), ARGS_STEPS(&e->steps), ARGS_SEED(&e->seed), ARGS_THREADS(&e->threads), ARGS_ISA(&e->isa),
        ARGS_OUT(&e->out), ARGS_JSON(&e->json), ARGS_QUIET(&e->quiet),
    };
    args_parse("experiments", "Puts what the sources claim to a test.", options, sizeof options / sizeof *options,
               argc, argv);
    nn_isa("experiments", e->isa);
    experiment_choose("experiments", "only", e->only, EXPERIMENTS, experiment_name, chosen);
    e->argv0 = argv[0];
    e->parallel.n_threads = e->threads;
}

int main(int argc, char **argv) {
    exp_run e = {.only = "all", .isa = "auto", .out = "out", .seed = 1};
    unsigned char chosen[EXPERIMENTS] = {0};
    parse(&e, chosen, argc, argv);
    double start = seconds_now();
    begin(&e);
    for (size_t i = 0; i < EXPERIMENTS; i++)
        if (chosen[i]) run(&e, i);
    exp_text_free(&e);
    page_end(e.page);
    close_output(e.page, "experiments.html");
    close_output(e.lines.file[0], "experiments.jsonl");
    fprintf(e.human, "\n%.0f s; see %s/experiments.html, experiments_*.svg, experiments.jsonl\n",
            seconds_now() - start, e.out);
    return 0;
}

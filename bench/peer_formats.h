/* The peers of bench/formats.c, programs of their own that are given a layer's weights, tokens and routing:
 * peer_formats.py (PyTorch: a loop over the experts, float32 and bfloat16) and peer_onnx.mjs (ONNX Runtime: its
 * operators MoE in float32, QMoE in int8 and int4). Who is not installed says so and is left out; whose outputs are not
 * the layer's ends the run. */
#ifndef BENCH_PEER_FORMATS_H
#define BENCH_PEER_FORMATS_H

#include "peer_process.h"

/* A program: its name among the peers, how it is started, and how far from float32's its outputs may be (root mean
 * square, relative) in each format; 0: it has not that format. */
typedef struct peer_program {
    const char *name, *runs, *script;
    double limit[MOE_FORMAT_COUNT]; /* f32, bf16, int8, int4 */
} peer_program;
static const peer_program peer_programs[] = {
    {"pytorch", "/usr/bin/python3", "bench/peer_formats.py", {1e-5, 0.05, 0, 0}},
    {"onnxruntime", "node", "bench/peer_onnx.mjs", {1e-5, 0, 0.05, 0.3}},
};
enum { N_PEER_PROGRAMS = sizeof peer_programs / sizeof peer_programs[0] };

/* What all of them are given: a layer's shape, calls of T tokens with their routing, and where they write y. */
typedef struct peer_calls {
    size_t n_calls, T, d, ff, E, k, n_layers;
    moe_format_kind format;
    const float *x, *weight, *y; /* (n_calls, T, d); (n_calls, T, k); (T, d), of the first call in float32 */
    const int32_t *index;        /* (n_calls, T, k) */
    char weights[64], path[64];  /* files: w1, wu, w2; x, weight, index, room for y */
} peer_calls;

typedef struct peer_layer {
    peer_process process;
    const peer_program *program;
    const peer_calls *calls;
    size_t repeats; /* of all calls, a timed run */
    double error;
} peer_layer;

static void peer_file_name(char path[64], const char *what)
{
    snprintf(path, 64, "%s/moe-bench-%s-%ld", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm", what, (long)getpid());
}

static void peer_put(FILE *f, const void *data, size_t count)
{
    if (f == NULL || fwrite(data, sizeof(float), count, f) != count) bench_die("peers: no room for their input");
}

/* The experts of a float32 layer: w1, wu (E, d, ff), w2 (E, ff, d). */
static inline void peer_write_weights(peer_calls *c, const moe_layer *layer)
{
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2"};
    size_t count = c->E * c->d * c->ff;
    float *values = bench_floats(count);
    peer_file_name(c->weights, "weights");
    FILE *f = fopen(c->weights, "wb");
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        bench_ok(moe_layer_get(layer, MOE_PART_PARAMS, names[i], values, count), "moe_layer_get");
        peer_put(f, values, count);
    }
    if (fclose(f) != 0) bench_die("peers: no room for their input");
    free(values);
}

static inline void peer_write_calls(peer_calls *c)
{
    peer_file_name(c->path, "calls");
    FILE *f = fopen(c->path, "wb");
    peer_put(f, c->x, c->n_calls * c->T * c->d);
    peer_put(f, c->weight, c->n_calls * c->T * c->k);
    peer_put(f, c->index, c->n_calls * c->T * c->k);
    peer_put(f, c->y, c->T * c->d); /* to be written over */
    if (fclose(f) != 0) bench_die("peers: no room for their input");
}

static double peer_error(const peer_calls *c)
{
    size_t n = c->T * c->d;
    double error = 0, size = 0;
    float *y = bench_floats(n);
    FILE *f = fopen(c->path, "rb");
    if (f == NULL || fseeko(f, -(off_t)(n * sizeof *y), SEEK_END) != 0 || fread(y, sizeof *y, n, f) != n)
        bench_die("peers: their results cannot be read");
    fclose(f);
    for (size_t i = 0; i < n; i++) {
        error += ((double)y[i] - (double)c->y[i]) * ((double)y[i] - (double)c->y[i]);
        size += (double)c->y[i] * (double)c->y[i];
    }
    free(y);
    return sqrt(error / size);
}

/* 0: it is not asked for, not there, or has not the format. */
static inline int peer_layer_start(peer_layer *l, const bench_options *o, const peer_program *program,
                                   const peer_calls *c)
{
    const size_t numbers[] = {c->n_calls, c->T, c->d, c->ff, c->E, c->k, c->n_layers};
    enum { N_NUMBERS = sizeof numbers / sizeof numbers[0] };
    char text[N_NUMBERS][24], *args[5 + N_NUMBERS + 1] = {NULL};
    const char *words[] = {program->runs, program->script, c->weights, c->path, moe_format_name(c->format)};
    memset(l, 0, sizeof *l);
    if (!bench_listed(o->peers, program->name) || program->limit[c->format] <= 0) return 0;
    if (access(program->script, R_OK) != 0) {
        fprintf(stderr, "bench: %s skipped: %s is not here; run it from the repository's root\n", program->name,
                program->script);
        return 0;
    }
    for (size_t i = 0; i < 5; i++) args[i] = (char *)(intptr_t)words[i];
    for (size_t i = 0; i < N_NUMBERS; i++) snprintf(args[5 + i] = text[i], sizeof text[i], "%zu", numbers[i]);
    *l = (peer_layer){.program = program, .calls = c, .repeats = 1};
    peer_start(&l->process, args);
    if (peer_ask(&l->process, "check", bench_threads, 0) < 0) { /* it says why */
        peer_stop(&l->process);
        return 0;
    }
    l->error = peer_error(c);
    if (!(l->error <= program->limit[c->format]))
        bench_die("%s: its %s outputs are off by %g", program->name, moe_format_name(c->format), l->error);
    return 1;
}

static inline double peer_layer_run(void *self)
{
    peer_layer *l = (peer_layer *)self;
    double seconds = peer_ask(&l->process, "run", bench_threads, l->repeats);
    if (seconds <= 0) bench_die("%s: the process ended early", l->program->name);
    return seconds / (double)(l->repeats * l->calls->n_calls);
}

#endif

/* What the benchmarks share: memory in huge pages, options, time, the limits of the machine, the table.
 *
 * Processors change their clock and virtual machines have neighbours, so a figure alone says little. Every
 * timed run therefore has its limit measured right before and right after it, in the same process and with the
 * same number of threads: a loop of fused multiply-adds that stays in registers, and a sum over 1 GB. The
 * larger of the two is what the run is compared with; the median over the runs is printed. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* madvise, clock_gettime, dlopen under -std=c99 */
#endif
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define BENCH_PARALLEL_FOR _Pragma("omp parallel for schedule(static)")
#define BENCH_SIMD _Pragma("omp simd")
#define BENCH_SIMD_SUM(x) BENCH_PRAGMA(omp simd reduction(+ : x))
#define BENCH_PRAGMA(x) _Pragma(#x)
#else
#define BENCH_PARALLEL_FOR
#define BENCH_SIMD
#define BENCH_SIMD_SUM(x)
#endif

/* ---- memory: 2 MB pages where the system offers them ---------------------------------------- */
enum { BENCH_HUGE_PAGE = 2 << 20 };
static int bench_huge = 1;

static void *bench_malloc(size_t bytes, void *context)
{
    void *p = NULL;
    (void)context;
    if (bytes < 2 * (size_t)BENCH_HUGE_PAGE) return malloc(bytes ? bytes : 1);
    if (posix_memalign(&p, BENCH_HUGE_PAGE, bytes) != 0) return NULL;
#ifdef __linux__
    madvise(p, bytes, bench_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    return p;
}

#define MOE_MALLOC(n, ctx) bench_malloc(n, ctx)
#define MOE_FREE(p, ctx) ((void)(ctx), free(p))
#define MOE_IMPLEMENTATION
#include "moe.h"

/* ---- errors --------------------------------------------------------------------------------- */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2), noreturn))
#endif
static void bench_die(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("bench: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static void bench_ok(moe_status s, const char *call)
{
    if (s != MOE_OK) bench_die("%s: %s", call, moe_status_string(s));
}

static void *bench_array(size_t count, size_t size)
{
    void *p = bench_malloc(count * size, NULL);
    if (p == NULL) bench_die("out of memory: %.2f GB more are needed", (double)count * (double)size * 1e-9);
    return p;
}

static float *bench_floats(size_t count)
{
    return (float *)bench_array(count, sizeof(float));
}

/* ---- options -------------------------------------------------------------------------------- */
typedef struct bench_options {
    const char *shape, *pass, *isa, *peers; /* comma lists; peers may be "" */
    size_t threads[16], n_threads;
    size_t runs; /* 0: as many as fit, at least 7 */
    int json, quiet, accumulate, phases;
    FILE *csv;
    FILE *human; /* stdout, or stderr with --json */
} bench_options;

/* Is `word` one of the comma list? "all" matches everything. */
static int bench_listed(const char *list, const char *word)
{
    size_t n = strlen(word);
    if (strcmp(list, "all") == 0) return 1;
    for (const char *p = list; p != NULL; p = strchr(p, ',')) {
        p += *p == ',';
        if (strncmp(p, word, n) == 0 && (p[n] == ',' || p[n] == '\0')) return 1;
    }
    return 0;
}

/* Every word of the list has to be one of the names. */
static void bench_check_list(const char *option, const char *list, const char *const *names, size_t n_names)
{
    if (strcmp(list, "all") == 0) return;
    for (const char *p = list; p != NULL; p = strchr(p, ',')) {
        p += *p == ',';
        size_t length = strcspn(p, ","), i = 0;
        while (i < n_names && !(strlen(names[i]) == length && strncmp(p, names[i], length) == 0)) i++;
        if (i < n_names) continue;
        fprintf(stderr, "bench: %s: '%.*s' is not one of: all", option, (int)length, p);
        for (i = 0; i < n_names; i++) fprintf(stderr, " %s", names[i]);
        fputc('\n', stderr);
        exit(2);
    }
}

static size_t bench_number(const char *option, const char *text, size_t least, size_t most, const char **end)
{
    char *stop;
    unsigned long long v = strtoull(text, &stop, 10);
    if (stop == text || text[0] == '-' || v < least || v > most) {
        fprintf(stderr, "bench: %s: '%s' is not a number from %zu to %zu\n", option, text, least, most);
        exit(2);
    }
    *end = stop;
    return (size_t)v;
}

static void bench_parse_threads(bench_options *o, const char *text)
{
    const char *p = text;
    o->n_threads = 0;
    for (;;) {
        if (o->n_threads == sizeof o->threads / sizeof o->threads[0]) bench_die("--threads: at most 16 values");
        o->threads[o->n_threads++] = bench_number("--threads", p, 1, 1024, &p);
        if (*p == '\0') break;
        if (*p++ != ',') bench_die("--threads: a comma list of numbers is needed, not '%s'", text);
    }
}

static const char *const bench_isa_names[] = {"auto", "scalar", "avx2", "avx512", "neon", "simd128"};
static const char *const bench_pass_names[] = {"forward", "forward+backward"};
static const char *const bench_peer_names[] = {"onednn", "openblas", "pytorch", "onnxruntime"};
enum { BENCH_MAX_PEERS = 4, BENCH_MAX_RUNS = 1000 };

static void bench_usage(const char *program, const char *what, int with_pass)
{
    printf("%s: %s\n\n"
           "  --shape LIST     names from the table below, or all (default all)\n", program, what);
    if (with_pass) {
        printf(
            "  --pass LIST      forward,forward+backward (default both)\n"
            "  --accumulate     forward+backward adds to the gradients; without it they are fresh, as after a step\n"
            "  --phases         where a pass spends its time, and the share of the peak of each of its products\n");
    }
    printf("  --threads LIST   numbers of threads (default 1,2)\n"
           "  --isa LIST       auto, all, or of scalar,avx2,avx512,neon (default auto: the best)\n"
           "  --peers LIST     all, none, or of onednn,openblas,pytorch,onnxruntime (default none)\n"
           "  --runs N         timed runs a line (default: 7 to 15)\n"
           "  --no-huge        no huge pages\n"
           "  --json           one JSON line a measurement on standard output; with peers one for each, the best last\n"
           "  --csv FILE       the same as CSV\n"
           "  --quiet          no progress\n"
           "  --help           this\n");
}

static inline bench_options bench_parse(int argc, char **argv, const char *what, const char *const *shapes,
                                        size_t n_shapes, int with_pass, void (*print_shapes)(FILE *))
{
    bench_options o;
    memset(&o, 0, sizeof o);
    o.shape = o.pass = "all";
    o.isa = "auto";
    o.peers = "none";
    bench_parse_threads(&o, "1,2");
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *end;
        if (strcmp(a, "--help") == 0) {
            bench_usage(argv[0], what, with_pass);
            print_shapes(stdout);
            exit(0);
        }
        if (strcmp(a, "--json") == 0) { o.json = 1; continue; }
        if (strcmp(a, "--quiet") == 0) { o.quiet = 1; continue; }
        if (strcmp(a, "--no-huge") == 0) { bench_huge = 0; continue; }
        if (with_pass && strcmp(a, "--accumulate") == 0) { o.accumulate = 1; continue; }
        if (with_pass && strcmp(a, "--phases") == 0) { o.phases = 1; continue; }
        if (i + 1 == argc) {
            fprintf(stderr, "bench: '%s' is not an option, or its value is missing (see --help)\n", a);
            exit(2);
        }
        const char *v = argv[++i];
        if (strcmp(a, "--shape") == 0) o.shape = v;
        else if (with_pass && strcmp(a, "--pass") == 0) o.pass = v;
        else if (strcmp(a, "--isa") == 0) o.isa = v;
        else if (strcmp(a, "--peers") == 0) o.peers = v;
        else if (strcmp(a, "--threads") == 0) bench_parse_threads(&o, v);
        else if (strcmp(a, "--runs") == 0) o.runs = bench_number(a, v, 1, BENCH_MAX_RUNS, &end);
        else if (strcmp(a, "--csv") == 0) {
            o.csv = fopen(v, "w");
            if (o.csv == NULL) bench_die("--csv: '%s' cannot be written", v);
        } else {
            fprintf(stderr, "bench: '%s' is not an option (see --help)\n", a);
            exit(2);
        }
    }
    o.human = o.json ? stderr : stdout;
    bench_check_list("--shape", o.shape, shapes, n_shapes);
    bench_check_list("--pass", o.pass, bench_pass_names, 2);
    bench_check_list("--isa", o.isa, bench_isa_names, 5);
    if (strcmp(o.peers, "none") == 0) o.peers = "";
    else bench_check_list("--peers", o.peers, bench_peer_names, BENCH_MAX_PEERS);
    return o;
}

/* Is this instruction set asked for, and there? If so it is active afterwards. */
static inline int bench_use_isa(const bench_options *o, moe_isa_kind isa)
{
    if (isa == MOE_ISA_AUTO) {
        if (strcmp(o->isa, "all") == 0 || !bench_listed(o->isa, "auto")) return 0;
    } else if (!bench_listed(o->isa, moe_isa_name(isa))) {
        return 0;
    }
    if (moe_force_isa(isa) == MOE_OK) return 1;
    if (strcmp(o->isa, "all") != 0) fprintf(stderr, "bench: skipped: this machine has no %s\n", moe_isa_name(isa));
    return 0;
}

/* Threads of everything that follows: the library, the limits, the peers. */
static size_t bench_threads = 1;
static inline int bench_use_threads(size_t n)
{
#ifdef _OPENMP
    omp_set_num_threads((int)n);
#else
    static int said = 0;
    if (n > 1 && !said++) fprintf(stderr, "bench: compiled without OpenMP: only 1 thread is measured\n");
    if (n > 1) return 0;
#endif
    bench_threads = n;
    return 1;
}

/* ---- time ----------------------------------------------------------------------------------- */
static double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Idle workers of thread pools spin for a while after their last work: let them fall asleep. */
static void bench_settle(void)
{
    struct timespec t = {0, 40 * 1000 * 1000};
    nanosleep(&t, NULL);
}

static int bench_compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts. */
static double bench_median(double *v, size_t n)
{
    qsort(v, n, sizeof *v, bench_compare);
    return n % 2 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

/* ---- the limits of the machine -------------------------------------------------------------- */
static volatile float bench_sink; /* keeps results alive */

/* Three loops for each instruction set: `steps` times 12 independent fused multiply-adds; the sum of n floats (a
 * multiple of 4 vectors, aligned), two vectors and two vectors, in one stream or with those others `apart` floats
 * behind, n / 2: processors read two streams faster than one, or the other way round; and to[i] = p[i] + p[apart + i],
 * n floats, past the caches or by plain stores: two reads and a write. */
#define BENCH_LOOPS(suffix, attributes, vec, width, set1, fma, load, add, store, stream)                     \
    attributes static void bench_fma_##suffix(size_t steps)                                                  \
    {                                                                                                        \
        vec x = set1(0.5f), y = set1(0.25f);                                                                 \
        vec a = set1(1), b = set1(2), c = set1(3), d = set1(4), e = set1(5), f = set1(6); /* all different, */ \
        vec g = set1(7), h = set1(8), i = set1(9), j = set1(10), k = set1(11), l = set1(12); /* or they merge */ \
        float out[width];                                                                                    \
        for (size_t s = 0; s < steps; s++) {                                                                 \
            a = fma(x, y, a); b = fma(x, y, b); c = fma(x, y, c); d = fma(x, y, d);                          \
            e = fma(x, y, e); f = fma(x, y, f); g = fma(x, y, g); h = fma(x, y, h);                          \
            i = fma(x, y, i); j = fma(x, y, j); k = fma(x, y, k); l = fma(x, y, l);                          \
        }                                                                                                    \
        a = add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h)));                                       \
        store(out, add(a, add(add(i, j), add(k, l))));                                                       \
        bench_sink = out[0];                                                                                 \
    }                                                                                                        \
    attributes static void bench_sum_##suffix(const float *p, size_t n, size_t apart)                        \
    {                                                                                                        \
        vec a = set1(0.0f), b = a, c = a, d = a;                                                             \
        float out[width];                                                                                    \
        const float *q = p + (apart ? apart : 2 * width);                                                    \
        size_t step = apart ? 2 * width : 4 * width;                                                         \
        for (size_t left = n / (4 * width); left; left--, p += step, q += step) {                            \
            a = add(a, load(p));                                                                             \
            b = add(b, load(p + width));                                                                     \
            c = add(c, load(q));                                                                             \
            d = add(d, load(q + width));                                                                     \
        }                                                                                                    \
        store(out, add(add(a, b), add(c, d)));                                                               \
        bench_sink = out[0];                                                                                 \
    }                                                                                                        \
    attributes static void bench_add_##suffix(const float *p, size_t n, size_t apart, int past, float *to)   \
    {                                                                                                        \
        for (size_t i = 0; past && i < n; i += width) stream(to + i, add(load(p + i), load(p + apart + i))); \
        for (size_t i = 0; !past && i < n; i += width) store(to + i, add(load(p + i), load(p + apart + i))); \
    }

#define BENCH_SET(x) (x)
#define BENCH_LOAD(p) (*(p))
#define BENCH_ADD(x, y) ((x) + (y))
#define BENCH_STORE(p, x) (*(p) = (x))
#define BENCH_NO_ATTRIBUTES
BENCH_LOOPS(scalar, BENCH_NO_ATTRIBUTES, float, 1, BENCH_SET, fmaf, BENCH_LOAD, BENCH_ADD, BENCH_STORE,
            BENCH_STORE)
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include <immintrin.h>
BENCH_LOOPS(avx2, __attribute__((target("avx2,fma"))), __m256, 8, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_load_ps,
            _mm256_add_ps, _mm256_storeu_ps, _mm256_stream_ps)
BENCH_LOOPS(avx512, __attribute__((target("avx512f"))), __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_load_ps,
            _mm512_add_ps, _mm512_storeu_ps, _mm512_stream_ps)
#elif defined(__aarch64__)
#include <arm_neon.h>
#define BENCH_NEON_FMA(x, y, z) vfmaq_f32(z, x, y)
BENCH_LOOPS(neon, BENCH_NO_ATTRIBUTES, float32x4_t, 4, vdupq_n_f32, BENCH_NEON_FMA, vld1q_f32, vaddq_f32, vst1q_f32,
            vst1q_f32)
#endif

typedef struct bench_loops {
    void (*fma)(size_t steps);
    void (*sum)(const float *p, size_t n, size_t apart);
    void (*add)(const float *p, size_t n, size_t apart, int past, float *to);
    size_t width;
} bench_loops;

static bench_loops bench_loops_of(moe_isa_kind isa)
{
    bench_loops l = {bench_fma_scalar, bench_sum_scalar, bench_add_scalar, 1};
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    if (isa == MOE_ISA_AVX2) l = (bench_loops){bench_fma_avx2, bench_sum_avx2, bench_add_avx2, 8};
    if (isa == MOE_ISA_AVX512) l = (bench_loops){bench_fma_avx512, bench_sum_avx512, bench_add_avx512, 16};
#elif defined(__aarch64__)
    if (isa == MOE_ISA_NEON) l = (bench_loops){bench_fma_neon, bench_sum_neon, bench_add_neon, 4};
#endif
    (void)isa;
    return l;
}

typedef struct bench_limit_task {
    bench_loops loops;
    size_t steps;  /* of a task of the first kind */
    const float *data;
    size_t floats, apart; /* of a task of the other kinds */
    int past;             /* of the third kind */
    float *to;
} bench_limit_task;

static void bench_peak_task(void *arg, size_t i, size_t worker)
{
    const bench_limit_task *t = (const bench_limit_task *)arg;
    (void)i, (void)worker;
    t->loops.fma(t->steps);
}

static void bench_read_task(void *arg, size_t i, size_t worker)
{
    const bench_limit_task *t = (const bench_limit_task *)arg;
    (void)worker;
    t->loops.sum(t->data + i * t->floats, t->floats, t->apart);
}

static void bench_move_task(void *arg, size_t i, size_t worker)
{
    const bench_limit_task *t = (const bench_limit_task *)arg;
    (void)worker;
    t->loops.add(t->data + i * t->floats, t->floats, t->apart, t->past, t->to + i * t->floats);
}

/* Fused multiply-adds in registers, flops a second: the best of a few bursts of about 4 ms. */
static double bench_peak(void)
{
    enum { N_BURSTS = 4, N_TASKS = 16 };
    static size_t steps[MOE_ISA_COUNT];
    moe_isa_kind isa = moe_active_isa();
    bench_limit_task t = {.loops = bench_loops_of(isa), .steps = 1000};
    double best = 0;
    while (steps[isa] == 0) { /* a task takes at least a quarter of a millisecond */
        double start = bench_now();
        t.loops.fma(t.steps);
        if (bench_now() - start > 0.25e-3) steps[isa] = t.steps;
        t.steps *= 2;
    }
    t.steps = steps[isa];
    for (int burst = 0; burst < N_BURSTS; burst++) {
        size_t n_tasks = N_TASKS * bench_threads;
        double start = bench_now();
        moe_run(NULL, n_tasks, bench_peak_task, &t);
        double flops = (double)(n_tasks * t.steps * 12 * t.loops.width) * 2 / (bench_now() - start);
        if (flops > best) best = flops;
    }
    return best;
}

/* 1 GB whose pages are there. */
static float *bench_gigabyte(size_t *floats)
{
    static float *data;
    *floats = ((size_t)1 << 30) / sizeof(float);
    if (data == NULL) {
        data = bench_floats(*floats);
        for (size_t i = 0; i < *floats; i++) data[i] = 1.0f;
    }
    return data;
}

/* Bytes a second of a sum over 1 GB, in one stream or in two, whichever is faster. */
static double bench_read(void)
{
    enum { N_TASKS = 256 };
    bench_limit_task t = {.loops = bench_loops_of(moe_active_isa())};
    double best = 0;
    t.data = bench_gigabyte(&t.floats);
    double bytes = (double)(t.floats * sizeof(float));
    t.floats /= N_TASKS;
    for (int streams = 1; streams <= 2; streams++, t.apart = t.floats / 2) {
        double start = bench_now();
        moe_run(NULL, N_TASKS, bench_read_task, &t);
        double seconds = bench_now() - start;
        if (bytes / seconds > best) best = bytes / seconds;
    }
    return best;
}

/* Bytes a second where two of three are read and one is written, as in a backward: read for the forward, read again,
 * gradient written. By stores past the caches or plain ones, whichever is faster; what plain ones read before they
 * write is not counted. */
static double bench_move(void)
{
    enum { N_TASKS = 256 };
    bench_limit_task t = {.loops = bench_loops_of(moe_active_isa())};
    double best = 0;
    size_t all;
    float *data = bench_gigabyte(&all);
    t.data = data;
    t.floats = all / 4 / N_TASKS;
    t.apart = all / 4;
    t.to = data + all / 2;
    for (t.past = 0; t.past <= 1; t.past++) {
        double start = bench_now();
        moe_run(NULL, N_TASKS, bench_move_task, &t);
        double seconds = bench_now() - start, bytes = 3 * (double)(all / 4 * sizeof(float));
        if (bytes / seconds > best) best = bytes / seconds;
    }
    return best;
}

/* ---- measurements --------------------------------------------------------------------------- */
typedef double bench_run(void *self); /* one timed run: seconds for each call in it */
typedef struct bench_subject { const char *name; bench_run *run; void *self; } bench_subject;

typedef struct bench_row {
    const char *shape, *pass;
    double flops;   /* of one call */
    double bytes;   /* of weights that one call touches, where moving them is the limit, else 0 */
    int writes;     /* a third of these is written (bench_move), else all is read */
    char note[160];
    /* measured */
    double seconds, peak_share, memory_share, spread; /* spread: (longest - shortest) / median */
    size_t runs, n_peers;
    struct { const char *name; double seconds; } peer[BENCH_MAX_PEERS]; /* the best last */
} bench_row;

static double bench_bandwidth(const bench_row *r)
{
    if (r->bytes <= 0) return 0;
    return r->writes ? bench_move() : bench_read();
}

static void bench_progress(const bench_options *o, const bench_row *r, const char *who, size_t run, size_t runs)
{
    if (o->quiet || !isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s %s, %zu thread%s, %s: run %zu of %zu\033[K", r->shape, r->pass, bench_threads,
            bench_threads == 1 ? "" : "s", who, run + 1, runs);
    if (run == runs) fprintf(stderr, "\r\033[K");
}

/* Times the first subject, and the others, the peers, in turns with it. Everyone had a warm-up of the caller's. */
static inline void bench_measure(const bench_options *o, bench_row *r, const bench_subject *subject, size_t n_subjects)
{
    double seconds[BENCH_MAX_RUNS], share[BENCH_MAX_RUNS], read[BENCH_MAX_RUNS], peer[BENCH_MAX_PEERS][BENCH_MAX_RUNS];
    size_t n_runs[1 + BENCH_MAX_PEERS];
    for (size_t s = 0; s < n_subjects; s++) {
        double first = subject[s].run(subject[s].self);
        n_runs[s] = o->runs ? o->runs : first < 0.1 ? 15 : first < 0.5 ? 9 : 7;
        if (o->runs == 0 && s > 0 && first > 1) n_runs[s] = first > 3 ? 3 : 5; /* a slow peer */
        if (n_runs[s] > n_runs[0]) n_runs[s] = n_runs[0];
    }
    for (size_t i = 0; i < n_runs[0]; i++) {
        bench_progress(o, r, "moe.h", i, n_runs[0]);
        bench_settle();
        double peak = bench_peak(), bandwidth = bench_bandwidth(r);
        seconds[i] = subject[0].run(subject[0].self);
        double peak_after = bench_peak(), bandwidth_after = bench_bandwidth(r);
        if (peak_after > peak) peak = peak_after;
        if (bandwidth_after > bandwidth) bandwidth = bandwidth_after;
        share[i] = r->flops / seconds[i] / peak;
        read[i] = r->bytes > 0 ? r->bytes / seconds[i] / bandwidth : 0;
        for (size_t s = 1; s < n_subjects; s++) {
            if (i >= n_runs[s]) continue;
            bench_progress(o, r, subject[s].name, i, n_runs[s]);
            bench_settle();
            peer[s - 1][i] = subject[s].run(subject[s].self);
        }
    }
    bench_progress(o, r, "", n_runs[0], n_runs[0]);
    r->runs = n_runs[0];
    r->seconds = bench_median(seconds, n_runs[0]);
    r->spread = (seconds[n_runs[0] - 1] - seconds[0]) / r->seconds;
    r->peak_share = bench_median(share, n_runs[0]);
    r->memory_share = bench_median(read, n_runs[0]);
    r->n_peers = n_subjects - 1;
    for (size_t s = 1; s < n_subjects; s++) { /* slowest first */
        double t = bench_median(peer[s - 1], n_runs[s]);
        size_t at = s - 1;
        for (; at > 0 && r->peer[at - 1].seconds < t; at--) r->peer[at] = r->peer[at - 1];
        r->peer[at].name = subject[s].name;
        r->peer[at].seconds = t;
    }
}

/* ---- output --------------------------------------------------------------------------------- */
static double bench_ratio(const bench_row *r, size_t p)
{
    return r->peer[p].seconds / r->seconds;
}

static inline void bench_header(const bench_options *o, size_t n_peers)
{
    fprintf(o->human, "%-13s %-16s %-6s %3s %10s %9s %6s %7s %6s %7s ", "shape", "pass", "isa", "thr", "ms", "GFLOP/s",
            "peak", "GB/s", "memory", "spread");
    for (size_t p = 0; p < n_peers; p++) fprintf(o->human, " %-27s", "peer ms (ratio)");
    fprintf(o->human, " %s\n", "note");
    if (o->csv) {
        fprintf(o->csv, "shape,pass,isa,threads,ms,gflops,peak_share,gbytes_per_s,memory_share,spread,runs,note,"
                        "peer,peer_ms,ratio\n");
    }
}

/* One line a peer, or one line: the figures of the row, then the peer's. */
static void bench_print_values(const bench_options *o, const bench_row *r, size_t p)
{
    const char *isa = moe_isa_name(moe_active_isa());
    double ms = r->seconds * 1e3, gflops = r->flops / r->seconds * 1e-9, gbytes = r->bytes / r->seconds * 1e-9;
    if (o->json) {
        printf("{\"shape\":\"%s\",\"pass\":\"%s\",\"isa\":\"%s\",\"threads\":%zu,\"ms\":%.6g,\"gflops\":%.6g,"
               "\"peak_share\":%.4g,", r->shape, r->pass, isa, bench_threads, ms, gflops, r->peak_share);
        if (r->bytes > 0) printf("\"gbytes_per_s\":%.4g,\"memory_share\":%.4g", gbytes, r->memory_share);
        else printf("\"gbytes_per_s\":null,\"memory_share\":null");
        if (p < r->n_peers) {
            printf(",\"peer\":\"%s\",\"peer_ms\":%.6g,\"ratio\":%.4g", r->peer[p].name, r->peer[p].seconds * 1e3,
                   bench_ratio(r, p));
        }
        puts("}");
    }
    if (o->csv) {
        fprintf(o->csv, "%s,%s,%s,%zu,%.6g,%.6g,%.4g,", r->shape, r->pass, isa, bench_threads, ms, gflops,
                r->peak_share);
        if (r->bytes > 0) fprintf(o->csv, "%.4g,%.4g", gbytes, r->memory_share);
        else fputc(',', o->csv);
        fprintf(o->csv, ",%.4g,%zu,\"%s\"", r->spread, r->runs, r->note);
        if (p < r->n_peers) {
            fprintf(o->csv, ",%s,%.6g,%.4g", r->peer[p].name, r->peer[p].seconds * 1e3, bench_ratio(r, p));
        } else {
            fputs(",,,", o->csv);
        }
        fputc('\n', o->csv);
    }
}

static inline void bench_print(const bench_options *o, const bench_row *r)
{
    char peer[64];
    fprintf(o->human, "%-13s %-16s %-6s %3zu %10.4g %9.1f %5.1f%%", r->shape, r->pass, moe_isa_name(moe_active_isa()),
            bench_threads, r->seconds * 1e3, r->flops / r->seconds * 1e-9, 100 * r->peak_share);
    if (r->bytes > 0) fprintf(o->human, " %7.2f %5.1f%%", r->bytes / r->seconds * 1e-9, 100 * r->memory_share);
    else fprintf(o->human, " %7s %6s", "-", "-");
    fprintf(o->human, " %6.1f%% ", 100 * r->spread);
    for (size_t p = 0; p < r->n_peers; p++) {
        snprintf(peer, sizeof peer, "%s%s %.4g (%.2f)", p + 1 == r->n_peers ? "best " : "", r->peer[p].name,
                 r->peer[p].seconds * 1e3, bench_ratio(r, p));
        fprintf(o->human, " %-27s", peer);
    }
    fprintf(o->human, " %s\n", r->note);
    for (size_t p = 0; p == 0 || p < r->n_peers; p++) bench_print_values(o, r, p);
    fflush(stdout);
    fflush(o->human);
    if (o->csv) fflush(o->csv);
}

#endif

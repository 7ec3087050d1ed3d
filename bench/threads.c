/* How do threads scale, and what would bind on more cores than are here?
 *
 *     build/bench_threads [--threads 1,2,4] [--shape LIST] [--runs N] [--json] [--csv FILE]
 *
 * Measured: what a parallel region costs (as many tasks as threads, which do nothing), and what one increment of a
 * counter costs that all threads add to, as those that tasks are taken from; whole layers, forward and forward +
 * backward, for each number of threads in turns, so that all see the same machine. With more threads than processors a
 * layer may take at most 1.5 times as long as with as many threads as processors: else it has collapsed, and the status
 * is 1. Run it with OMP_WAIT_POLICY=passive and without.
 *
 * Derived, not measured: the same layers on 64 cores, of one socket or two, from these figures and assumed bandwidths
 * (docs/scale.md says how). */
#include "common.h"

typedef struct threads_shape { const char *name; size_t T, d, ff, E, k; } threads_shape;
static const threads_shape shapes[] = {
    {"small", 4096, 256, 512, 16, 2},
    {"small1", 1, 256, 512, 16, 2},
    {"olmoe32", 32, 2048, 1024, 16, 8},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], MOST_THREADS = 16, MANY = 64 };
static const double collapsed = 1.5;
/* Assumed for the paper: a socket of 32 cores, 8 channels of DDR5-4800 of which 80% can be read, and a third of that
 * through the link between two sockets. */
static const double socket_bytes = 8 * 38.4e9 * 0.8, link_bytes = 8 * 38.4e9 * 0.8 / 3;
enum { SOCKET_CORES = 32 };

static void print_shapes(FILE *f)
{
    fputs("\nshape       T     d    ff   E  k\n", f);
    for (size_t i = 0; i < N_SHAPES; i++) {
        const threads_shape *s = &shapes[i];
        fprintf(f, "%-9s %4zu %5zu %5zu %3zu %2zu\n", s->name, s->T, s->d, s->ff, s->E, s->k);
    }
}

/* ---- regions and counters ---- */
static void nothing(void *arg, size_t i, size_t worker) { (void)arg, (void)i, (void)worker; }
static double region_seconds(void)
{
    enum { TIMES = 200, RUNS = 9 };
    double run[RUNS];
    for (int r = 0; r < RUNS; r++) {
        double start = bench_now();
        for (int i = 0; i < TIMES; i++) moe_run(NULL, bench_threads, nothing, NULL);
        run[r] = (bench_now() - start) / TIMES;
    }
    return bench_median(run, RUNS);
}

enum { INCREMENTS = 200000 };
static size_t counter;
static void count_task(void *arg, size_t i, size_t worker)
{
    (void)arg, (void)i, (void)worker;
    for (int n = 0; n < INCREMENTS; n++) __atomic_fetch_add(&counter, 1, __ATOMIC_ACQ_REL);
}
/* Seconds of one increment, all threads' together. */
static double increment_seconds(void)
{
    enum { RUNS = 9 };
    double run[RUNS];
    for (int r = 0; r < RUNS; r++) {
        double start = bench_now();
        moe_run(NULL, bench_threads, count_task, NULL);
        run[r] = (bench_now() - start) / INCREMENTS / (double)bench_threads;
    }
    return bench_median(run, RUNS);
}

/* ---- layers ---- */
typedef struct subject {
    const threads_shape *s;
    int training;
    moe_desc desc;
    moe_layer *layer;
    moe_tape *tape;
    float *x, *y, *dy, *dx;
    size_t regions, repeats;
} subject;

static void pass(subject *j)
{
    bench_ok(moe_forward_tape(j->layer, j->tape, j->x, j->s->T, j->y), "moe_forward_tape");
    if (j->training) bench_ok(moe_backward_tape(j->layer, j->tape, j->dy, j->dx), "moe_backward_tape");
}

/* A way to run tasks that counts how often it is asked. */
static void counted(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg)
{
    ++*(size_t *)user;
    for (size_t i = 0; i < n_tasks; i++) task(arg, i, i % n_threads);
}

static void open_subject(subject *j, const threads_shape *s, int training)
{
    size_t floats = s->T * s->d;
    memset(j, 0, sizeof *j);
    j->s = s, j->training = training;
    j->desc.d_model = s->d, j->desc.d_ff = s->ff, j->desc.n_experts = s->E, j->desc.top_k = s->k;
    j->desc.expert = MOE_EXPERT_SWIGLU;
    j->desc.training = training ? MOE_ON : MOE_OFF;
    j->desc.optimizer = MOE_OPTIMIZER_SGD;
    j->x = bench_floats(floats), j->y = bench_floats(floats);
    j->dy = bench_floats(floats), j->dx = bench_floats(floats);
    bench_ok(moe_rand_normal(1, 0, floats, 0, 1, j->x), "moe_rand_normal");
    bench_ok(moe_rand_normal(2, 0, floats, 0, 1, j->dy), "moe_rand_normal");
    moe_desc plain = j->desc;
    j->desc.parallel = (moe_parallel){counted, &j->regions, 2};
    bench_ok(moe_layer_new(&j->layer, &j->desc), "moe_layer_new");
    bench_ok(moe_tape_new(&j->tape, &j->desc, s->T, training ? MOE_ON : MOE_OFF), "moe_tape_new");
    j->regions = 0;
    pass(j);
    moe_tape_free(j->tape), moe_layer_free(j->layer);
    j->desc = plain;
    bench_use_threads(MOST_THREADS); /* a tape has room for as many as there are now */
    bench_ok(moe_layer_new(&j->layer, &j->desc), "moe_layer_new");
    bench_ok(moe_tape_new(&j->tape, &j->desc, s->T, training ? MOE_ON : MOE_OFF), "moe_tape_new");
    bench_use_threads(1);
    double start = bench_now();
    pass(j);
    double seconds = bench_now() - start;
    j->repeats = seconds < 0.02 ? (size_t)(0.02 / seconds) + 1 : 1;
}

static void close_subject(subject *j)
{
    moe_tape_free(j->tape), moe_layer_free(j->layer);
    free(j->x), free(j->y), free(j->dy), free(j->dx);
}

static double time_subject(subject *j)
{
    bench_settle();
    pass(j);
    double start = bench_now();
    for (size_t i = 0; i < j->repeats; i++) pass(j);
    return (bench_now() - start) / (double)j->repeats;
}

/* What the passes of MANY cores would take, from one thread's time: arithmetic that is shared evenly, or bytes that
 * have to come, whichever is longer; and the regions, whose cost grows as the logarithm of the cores, or with each. */
static void print_paper(const bench_options *o, const subject *j, double one, double region)
{
    double bytes = 12.0 * (double)(j->s->d * j->s->ff), hit = (double)(j->s->T * j->s->k), work = one / MANY;
    if (hit > (double)j->s->E) hit = (double)j->s->E;
    bytes *= hit * (j->training ? 3 : 1);
    double near = bytes / (socket_bytes * MANY / SOCKET_CORES), far = bytes / 2 / link_bytes;
    double tree = (double)j->regions * region * log2(MANY), each = (double)j->regions * region * (MANY - 1);
    const char *binds = "arithmetic";
    if (near > work) binds = "memory";
    if (far > work && far > near) binds = "the link, unless each socket has experts of its own";
    if (tree > work && tree > near) binds = "regions";
    fprintf(o->human, "%-9s %-16s %7zu %10.4f %10.4f %10.4f %10.4f %10.4f   %s\n", j->s->name,
            j->training ? "forward+backward" : "forward", j->regions, work * 1e3, near * 1e3, far * 1e3, tree * 1e3,
            each * 1e3, binds);
}

static int measure(const bench_options *o, subject *j, double *one)
{
    static double run[MOST_THREADS][BENCH_MAX_RUNS];
    size_t runs = o->runs ? o->runs : 9, processors = (size_t)sysconf(_SC_NPROCESSORS_ONLN);
    double median[MOST_THREADS], full = 0; /* with as many threads as processors, or the most below */
    size_t most = 0;
    int bad = 0;
    for (size_t r = 0; r < runs; r++)
        for (size_t t = 0; t < o->n_threads; t++)
            if (bench_use_threads(o->threads[t])) run[t][r] = time_subject(j);
    for (size_t t = 0; t < o->n_threads; t++) {
        if (!bench_use_threads(o->threads[t])) continue;
        median[t] = bench_median(run[t], runs);
        if (o->threads[t] == 1) *one = median[t];
        if (o->threads[t] <= processors && o->threads[t] > most) most = o->threads[t], full = median[t];
    }
    for (size_t t = 0; t < o->n_threads; t++) {
        if (!bench_use_threads(o->threads[t])) continue;
        double faster = *one / median[t], slower = median[t] / full;
        int over = o->threads[t] > processors && slower > collapsed;
        const char *name = j->training ? "forward+backward" : "forward";
        bad |= over;
        fprintf(o->human, "%-9s %-16s %3zu %10.4f %8.2fx %8.2fx%s\n", j->s->name, name, o->threads[t],
                median[t] * 1e3, faster, slower, over ? "   COLLAPSED" : "");
        if (o->json)
            printf("{\"shape\":\"%s\",\"pass\":\"%s\",\"threads\":%zu,\"ms\":%.6g,\"faster\":%.4g,\"collapsed\":%d}\n",
                   j->s->name, name, o->threads[t], median[t] * 1e3, faster, over);
        if (o->csv)
            fprintf(o->csv, "%s,%s,%zu,%.6g,%.4g,%d\n", j->s->name, name, o->threads[t], median[t] * 1e3, faster,
                    over);
    }
    return bad;
}

int main(int argc, char **argv)
{
    static subject j[N_SHAPES][2];
    static double one[N_SHAPES][2];
    const char *names[N_SHAPES], *policy = getenv("OMP_WAIT_POLICY");
    double region = 0;
    int bad = 0;
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    bench_options o = bench_parse(argc, argv, "layers on more threads", names, N_SHAPES, 0, print_shapes);
    if (o.n_threads == 2 && o.threads[0] == 1 && o.threads[1] == 2) o.threads[o.n_threads++] = 4;
    for (size_t t = 0; t < o.n_threads; t++)
        if (o.threads[t] > MOST_THREADS) bench_die("--threads: at most %d", MOST_THREADS);
    fprintf(o.human, "%ld processors, OMP_WAIT_POLICY %s\nthreads   a region, us   an increment, ns\n",
            sysconf(_SC_NPROCESSORS_ONLN), policy ? policy : "not set");
    for (size_t t = 0; t < o.n_threads; t++) {
        if (!bench_use_threads(o.threads[t])) continue;
        double cost = region_seconds();
        if (o.threads[t] == 2) region = cost;
        fprintf(o.human, "%7zu %14.2f %18.1f\n", o.threads[t], cost * 1e6, increment_seconds() * 1e9);
    }
    fputs("\nshape     pass             thr         ms   faster  to full\n", o.human);
    if (o.csv) fputs("shape,pass,threads,ms,faster,collapsed\n", o.csv);
    for (size_t i = 0; i < N_SHAPES; i++)
        for (int training = 0; training < 2; training++) {
            if (!bench_listed(o.shape, shapes[i].name)) continue;
            open_subject(&j[i][training], &shapes[i], training);
            bad |= measure(&o, &j[i][training], &one[i][training]);
            close_subject(&j[i][training]);
        }
    fprintf(o.human, "\nDerived: %d cores, ms. Memory: of two sockets' own; link: half of the bytes from the other "
                     "socket;\nregions: a tree, or each thread in turn.\n"
                     "shape     pass             regions       work     memory       link       tree       each   "
                     "binds\n", MANY);
    for (size_t i = 0; i < N_SHAPES && region > 0; i++)
        for (int training = 0; training < 2; training++)
            if (one[i][training] > 0) print_paper(&o, &j[i][training], one[i][training], region);
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return bad;
}

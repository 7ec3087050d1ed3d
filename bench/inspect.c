/* How fast does examples/inspect.c read a dump? A file of logits that lies in the page cache passes through the same
 * reader and counters, and, right before and after, through reads of pieces into small buffers with nothing done to
 * them: what a program can have of the file with read(), with the same number of threads. The share is of that. Where
 * the file can be mapped, inspect looks at it in place, which saves that copy; so a sum over the mapped file, the limit
 * of the memory, stands beside it. */
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function" /* of common.h: what measures against the FMA peak */
#endif
#include "common.h"
#include "../examples/common/dump.h"

typedef struct dump_shape {
    const char *name;
    size_t experts, top_k;
    moe_dtype_kind dtype;
} dump_shape;

static const dump_shape shapes[] = {
    {"f32-8-2", 8, 2, MOE_DTYPE_F32},   {"f32-64-8", 64, 8, MOE_DTYPE_F32},  {"f32-128-4", 128, 4, MOE_DTYPE_F32},
    {"f32-256-8", 256, 8, MOE_DTYPE_F32}, {"f16-64-8", 64, 8, MOE_DTYPE_F16}, {"bf16-64-8", 64, 8, MOE_DTYPE_U16},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], BATCHES = 50 };
static const size_t FILE_BYTES = (size_t)1 << 30;

static void print_shapes(FILE *f)
{
    fputs("\nshape       experts  top-k  a number   (a file of 1 GB, in TMPDIR or /tmp)\n", f);
    for (size_t i = 0; i < N_SHAPES; i++)
        fprintf(f, "%-10s  %7zu  %5zu  %zu bytes\n", shapes[i].name, shapes[i].experts, shapes[i].top_k,
                moe_dtype_size(shapes[i].dtype));
}

/* A megabyte of numbers, again and again: normal logits, in the file's type. */
static void write_file(const char *path, const dump_shape *s)
{
    enum { N = 1 << 18 };
    size_t size = moe_dtype_size(s->dtype), tokens = FILE_BYTES / (s->experts * size), left = tokens * s->experts;
    float *z = bench_floats(N);
    unsigned char *out = (unsigned char *)bench_array(N, size);
    char header[118];
    FILE *f = fopen(path, "wb");
    if (f == NULL) bench_die("%s cannot be written", path);
    bench_ok(moe_rand_normal(1, 0, N, 0, 1, z), "moe_rand_normal");
    for (size_t i = 0; i < N; i++) {
        uint32_t u;
        memcpy(&u, z + i, 4);
        if (s->dtype == MOE_DTYPE_U16) u >>= 16;
        if (s->dtype == MOE_DTYPE_F16)
            u = (u >> 16 & 0x8000) | ((u & 0x7fffffff) < 0x38800000 ? 0 : ((u & 0x7fffffff) - 0x38000000) >> 13);
        for (size_t b = 0; b < size; b++) out[i * size + b] = (unsigned char)(u >> 8 * b);
    }
    memset(header, ' ', sizeof header);
    int n = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%zu, %zu), }",
                     s->dtype == MOE_DTYPE_F32 ? "<f4" : s->dtype == MOE_DTYPE_F16 ? "<f2" : "<u2", tokens, s->experts);
    header[n] = ' ';
    header[sizeof header - 1] = '\n';
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f);
    fwrite(header, 1, sizeof header, f);
    for (size_t some; left > 0; left -= some) {
        some = left < N ? left : N;
        fwrite(out, size, some, f);
    }
    if (ferror(f) || fclose(f)) bench_die("%s cannot be written: is the disk full?", path);
    free(z);
    free(out);
}

/* ---- reading alone ---- */
typedef struct reading { const dump_file *d; FILE *file[64]; unsigned char *buffer[64]; } reading;

static void read_task(void *arg, size_t batch, size_t worker)
{
    reading *r = (reading *)arg;
    size_t row = r->d->width * moe_dtype_size(r->d->npy.dtype), piece = DUMP_PIECE / row, n;
    size_t first = batch * r->d->tokens / BATCHES, end = (batch + 1) * r->d->tokens / BATCHES;
    if (!r->file[worker]) {
        r->file[worker] = fopen(r->d->path, "rb");
        if (!r->file[worker]) bench_die("%s cannot be read", r->d->path);
        setvbuf(r->file[worker], NULL, _IONBF, 0);
        r->buffer[worker] = (unsigned char *)bench_array(DUMP_PIECE, 1);
    }
    file_seek(r->file[worker], r->d->npy.data + (uint64_t)first * row);
    for (; first < end; first += n) {
        n = end - first < piece ? end - first : piece;
        if (fread(r->buffer[worker], row, n, r->file[worker]) != n) bench_die("%s cannot be read", r->d->path);
        bench_sink = (float)r->buffer[worker][0];
    }
}

static double read_rate(const dump_file *d, const moe_parallel *p)
{
    reading r = {.d = d};
    double start = bench_now();
    moe_run(p, BATCHES, read_task, &r);
    double seconds = bench_now() - start;
    for (size_t i = 0; i < 64; i++) {
        if (r.file[i]) fclose(r.file[i]);
        free(r.buffer[i]);
    }
    return (double)d->npy.count * (double)moe_dtype_size(d->npy.dtype) / seconds;
}

/* ---- the same file as memory: a sum of what stands in it ---- */
static void map_task(void *arg, size_t batch, size_t worker)
{
    const dump_file *d = (const dump_file *)arg;
    size_t bytes = d->npy.count * moe_dtype_size(d->npy.dtype);
    size_t first = batch * bytes / BATCHES / 4096 * 4096, end = (batch + 1) * bytes / BATCHES / 4096 * 4096;
    (void)worker;
    bench_loops_of(moe_active_isa()).sum((const float *)(const void *)(d->view + first), (end - first) / 4, 0);
}

static double map_rate(dump_file *d, const moe_parallel *p)
{
    double start = bench_now();
    if (!d->view || (uintptr_t)d->view % 64) return 0;
    moe_run(p, BATCHES, map_task, d);
    return (double)d->npy.count * (double)moe_dtype_size(d->npy.dtype) / (bench_now() - start);
}

static double inspect_rate(const dump_file *d, const dump_shape *s, const moe_parallel *p)
{
    size_t bytes = 0;
    moe_game g;
    dump_layer l = {.logits = d, .experts = s->experts, .top_k = s->top_k, .game = &g, .n_sample = 4096, .parallel = p};
    bench_ok(moe_game_size(s->experts, BATCHES, &bytes), "moe_game_size");
    void *memory = bench_array(bytes, 1);
    bench_ok(moe_game_init(&g, s->experts, BATCHES, memory, bytes), "moe_game_init");
    l.first = (uint64_t *)bench_array(BATCHES * s->experts, sizeof(uint64_t));
    memset(l.first, 0, BATCHES * s->experts * sizeof(uint64_t));
    l.sample = bench_floats(l.n_sample * s->experts);
    l.sample_batch = (uint32_t *)bench_array(l.n_sample, sizeof(uint32_t));
    double start = bench_now();
    dump_read(&l, NULL, NULL);
    double seconds = bench_now() - start;
    uint64_t selections = 0;
    for (size_t i = 0; i < BATCHES * s->experts; i++) selections += g.count[i];
    if (selections != (uint64_t)d->tokens * s->top_k)
        bench_die("%s: counted %llu selections", d->path, (unsigned long long)selections);
    free(memory), free(l.first), free(l.sample), free(l.sample_batch);
    return (double)d->npy.count * (double)moe_dtype_size(d->npy.dtype) / seconds;
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES], *folder = getenv("TMPDIR");
    char path[1100];
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    bench_options o = bench_parse(argc, argv, "speed of inspect's pass over a file in the page cache", names, N_SHAPES,
                                  0, print_shapes);
    size_t runs = o.runs ? o.runs : 7;
    double *share = (double *)bench_array(runs, sizeof *share), *rate = (double *)bench_array(runs, sizeof *rate);
    double *limit = (double *)bench_array(runs, sizeof *limit), *map = (double *)bench_array(runs, sizeof *map);
    snprintf(path, sizeof path, "%s/moe_bench_inspect.%ld.npy", folder ? folder : "/tmp", (long)getpid());
    fprintf(o.human, "shape       threads  isa       inspect GB/s  read GB/s  share  mapped GB/s\n");
    if (o.csv) fprintf(o.csv, "shape,threads,isa,gb_s,read_gb_s,share,mapped_gb_s\n");
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (!bench_listed(o.shape, shapes[i].name)) continue;
        write_file(path, &shapes[i]);
        dump_file d = dump_open(path);
        for (int isa = 0; isa < MOE_ISA_COUNT; isa++) {
            if (!bench_use_isa(&o, (moe_isa_kind)isa)) continue;
            for (size_t t = 0; t < o.n_threads; t++) {
                moe_parallel p = {.n_threads = o.threads[t]};
                if (o.threads[t] > 64 || !bench_use_threads(o.threads[t])) continue;
                double before = read_rate(&d, &p); /* warms the cache */
                before = read_rate(&d, &p);
                for (size_t r = 0; r < runs; r++) {
                    rate[r] = inspect_rate(&d, &shapes[i], &p);
                    double after = read_rate(&d, &p);
                    limit[r] = before > after ? before : after;
                    share[r] = rate[r] / limit[r];
                    map[r] = map_rate(&d, &p);
                    before = after;
                }
                double m[] = {bench_median(rate, runs), bench_median(limit, runs), bench_median(share, runs),
                              bench_median(map, runs)};
                const char *name = moe_isa_name(moe_active_isa());
                fprintf(o.human, "%-10s  %7zu  %-8s  %12.2f  %9.2f  %4.1f%%  %11.2f\n", shapes[i].name, o.threads[t],
                        name, m[0] * 1e-9, m[1] * 1e-9, 100 * m[2], m[3] * 1e-9);
                fflush(o.human);
                if (o.csv)
                    fprintf(o.csv, "%s,%zu,%s,%.4g,%.4g,%.4g,%.4g\n", shapes[i].name, o.threads[t], name,
                            m[0] * 1e-9, m[1] * 1e-9, m[2], m[3] * 1e-9);
                if (o.json)
                    printf("{\"shape\":\"%s\",\"threads\":%zu,\"isa\":\"%s\",\"gb_s\":%.4g,\"read_gb_s\":%.4g,"
                           "\"share\":%.4g,\"mapped_gb_s\":%.4g}\n",
                           shapes[i].name, o.threads[t], name, m[0] * 1e-9, m[1] * 1e-9, m[2], m[3] * 1e-9);
            }
        }
        remove(path);
    }
    if (o.csv) fclose(o.csv);
    free(share), free(rate), free(limit), free(map);
    return 0;
}

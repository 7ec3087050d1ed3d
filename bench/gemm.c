/* How fast is moe_gemm? Squares, and the products of a convolution: its forward (m pixels, k = 9 channels), the
 * same with an implicit operand (im2col inside a_fill), and the weight gradient (ta = 1). */
#include "peers.h"

typedef struct gemm_shape {
    const char *name;
    size_t m, n, k;
    int ta;
    size_t image; /* side of the square images of n channels each, if the operand is implicit */
} gemm_shape;

static const gemm_shape shapes[] = {
    {"sq256", 256, 256, 256, 0, 0},
    {"sq512", 512, 512, 512, 0, 0},
    {"sq1024", 1024, 1024, 1024, 0, 0},
    {"sq2048", 2048, 2048, 2048, 0, 0},
    {"conv64", 16384, 64, 576, 0, 0},
    {"conv64fill", 16384, 64, 576, 0, 32},
    {"conv128", 16384, 128, 1152, 0, 0},
    {"conv128fill", 16384, 128, 1152, 0, 16},
    {"conv256", 16384, 256, 2304, 0, 0},
    {"conv256fill", 16384, 256, 2304, 0, 8},
    {"wgrad64", 576, 64, 16384, 1, 0},
    {"wgrad64fill", 576, 64, 16384, 1, 32},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static void print_shapes(FILE *f)
{
    fputs("\nshape            m     n     k\n", f);
    for (size_t i = 0; i < N_SHAPES; i++) {
        fprintf(f, "%-12s %5zu %5zu %5zu%s%s\n", shapes[i].name, shapes[i].m, shapes[i].n, shapes[i].k,
                shapes[i].ta ? "  a transposed" : "", shapes[i].image ? "  implicit 3x3 patches" : "");
    }
}

/* Images (count, side, side, channels) seen as the matrix of their 3x3 patches (count * side^2, 9 * channels). */
typedef struct patches {
    const float *images;
    size_t side, channels;
} patches;

static void fill_patches(void *user, size_t row, size_t rows, size_t col, size_t cols, float *dst)
{
    const patches *p = (const patches *)user;
    for (size_t r = row; r < row + rows; r++, dst += 32) {
        size_t pixel = r % (p->side * p->side), y = pixel / p->side, x = pixel % p->side;
        for (size_t c = 0; c < cols;) {
            size_t tap = (col + c) / p->channels, channel = (col + c) % p->channels;
            size_t n = p->channels - channel < cols - c ? p->channels - channel : cols - c;
            size_t ty = y + tap / 3 - 1, tx = x + tap % 3 - 1; /* below 0 wraps and is too large as well */
            if (ty < p->side && tx < p->side) {
                memcpy(dst + c, p->images + (r - pixel + ty * p->side + tx) * p->channels + channel, n * sizeof *dst);
            } else {
                memset(dst + c, 0, n * sizeof *dst);
            }
            c += n;
        }
    }
}

typedef struct problem {
    moe_gemm_args g;
    const float *a; /* the same operand as a plain matrix, for the peers */
    size_t lda;
    peer_gemm *gemm;
    float *c;
    size_t repeats;
} problem;

static double run_moe(void *self)
{
    problem *p = (problem *)self;
    double start = bench_now();
    for (size_t i = 0; i < p->repeats; i++) bench_ok(moe_gemm(&p->g), "moe_gemm");
    return (bench_now() - start) / (double)p->repeats;
}

static double run_peer(void *self)
{
    problem *p = (problem *)self;
    const moe_gemm_args *g = &p->g;
    double start = bench_now();
    for (size_t i = 0; i < p->repeats; i++) {
        p->gemm(g->ta, g->tb, g->m, g->n, g->k, p->a, p->lda, g->b, g->ldb, 0.0f, p->c, g->ldc);
    }
    return (bench_now() - start) / (double)p->repeats;
}

/* Some elements of C against double arithmetic. */
static void check(const problem *p, const float *c, const char *shape, const char *who)
{
    const moe_gemm_args *g = &p->g;
    for (uint64_t s = 0; s < 200; s++) {
        size_t i = moe_rand_u32(7, 0, s) % g->m, j = moe_rand_u32(7, 1, s) % g->n;
        double sum = 0, size = 0;
        for (size_t k = 0; k < g->k; k++) {
            double term = (double)(g->ta ? p->a[k * p->lda + i] : p->a[i * p->lda + k]) * (double)g->b[k * g->ldb + j];
            sum += term;
            size += term * term;
        }
        double error = fabs((double)c[i * g->ldc + j] - sum);
        if (!(error <= 1e-4 * sqrt(size))) {
            bench_die("%s: %s is wrong: c[%zu][%zu] is %.9g, should be %.9g", shape, who, i, j,
                      (double)c[i * g->ldc + j], sum);
        }
    }
}

static void repeat_for(problem *p, bench_run *run)
{
    p->repeats = 1;
    double seconds = run(p);
    p->repeats = seconds >= 0.02 ? 1 : (size_t)(0.02 / seconds) + 1;
}

static void measure(const bench_options *o, const gemm_shape *s, const peer_library *library, size_t n_peers,
                    problem *p)
{
    problem peer[BENCH_MAX_PEERS];
    bench_subject subject[1 + BENCH_MAX_PEERS] = {{"moe.h", run_moe, p}};
    bench_row row = {s->name, "gemm", 2.0 * (double)s->m * (double)s->n * (double)s->k, 0, "", 0, 0, 0, 0, 0, 0,
                     {{NULL, 0}}};
    bench_ok(moe_gemm_scratch(&p->g, &p->g.scratch_bytes), "moe_gemm_scratch");
    p->g.scratch = bench_array(p->g.scratch_bytes + 1, 1);
    repeat_for(p, run_moe);
    check(p, p->g.c, s->name, "moe_gemm");
    for (size_t i = 0; i < n_peers; i++) {
        peer[i] = *p;
        peer[i].gemm = library[i].gemm;
        repeat_for(&peer[i], run_peer);
        check(&peer[i], peer[i].c, s->name, library[i].name);
        subject[1 + i] = (bench_subject){library[i].name, run_peer, &peer[i]};
    }
    bench_measure(o, &row, subject, 1 + n_peers);
    snprintf(row.note, sizeof row.note, "%zu x %zu x %zu", s->m, s->n, s->k);
    bench_print(o, &row);
    free(p->g.scratch);
}

static void measure_shape(const bench_options *o, const gemm_shape *s, const peer_library *library, size_t n_peers)
{
    size_t rows_a = s->ta ? s->k : s->m, cols_a = s->ta ? s->m : s->k;
    float *a = bench_floats(rows_a * cols_a), *b = bench_floats(s->k * s->n), *images = NULL;
    problem p;
    patches patch;
    memset(&p, 0, sizeof p);
    p.g.m = s->m, p.g.n = s->n, p.g.k = s->k, p.g.ta = s->ta;
    p.g.b = b, p.g.ldb = s->n;
    p.g.c = bench_floats(s->m * s->n), p.g.ldc = s->n;
    p.a = a, p.lda = cols_a;
    p.c = bench_floats(s->m * s->n);
    bench_ok(moe_rand_uniform(1, 0, s->k * s->n, -1, 1, b), "moe_rand_uniform");
    if (s->image) {
        images = bench_floats(rows_a * cols_a / 9);
        bench_ok(moe_rand_uniform(1, 1, rows_a * cols_a / 9, -1, 1, images), "moe_rand_uniform");
        patch = (patches){images, s->image, cols_a / 9};
        for (size_t r = 0; r < rows_a; r++) {
            float piece[32];
            for (size_t c = 0; c < cols_a; c += 32) {
                size_t n = cols_a - c < 32 ? cols_a - c : 32;
                fill_patches(&patch, r, 1, c, n, piece);
                memcpy(a + r * cols_a + c, piece, n * sizeof *piece);
            }
        }
        p.g.a_fill = fill_patches;
        p.g.a_user = &patch;
    } else {
        bench_ok(moe_rand_uniform(1, 1, rows_a * cols_a, -1, 1, a), "moe_rand_uniform");
        p.g.a = a, p.g.lda = cols_a;
    }
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(o, (moe_isa_kind)isa)) continue;
        for (size_t i = 0; i < o->n_threads; i++) {
            if (bench_use_threads(o->threads[i])) measure(o, s, library, n_peers, &p);
        }
    }
    free(a), free(b), free(images), free(p.g.c), free(p.c);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES];
    peer_library library[BENCH_MAX_PEERS];
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    bench_options o = bench_parse(argc, argv, "speed of moe_gemm, float32", names, N_SHAPES, 0, print_shapes);
    size_t n_peers = peer_load(&o, library);
    bench_header(&o, n_peers);
    for (size_t i = 0; i < N_SHAPES; i++) {
        if (bench_listed(o.shape, shapes[i].name)) measure_shape(&o, &shapes[i], library, n_peers);
    }
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}

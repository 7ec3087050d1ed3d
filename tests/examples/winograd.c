/* Convolutions by Winograd's filtering (examples/common/winograd.h) against sums in double, forward and backward, on
 * images whose sides are and are not whole tiles; the same bits for any number of threads and instruction set. */
#include "test.h"

#include "examples/common/winograd.h"

static const nn_conv shapes[] = {
    {1, 8, 8, 8, 3, 1, 1, 8},    /* four whole tiles */
    {2, 5, 5, 16, 3, 1, 1, 8},   /* one pixel beyond a tile */
    {3, 7, 7, 8, 3, 1, 1, 40},
    {2, 6, 11, 24, 3, 1, 1, 16}, /* not square */
    {50, 15, 15, 8, 3, 1, 1, 8}, /* several blocks, the last one smaller */
};

/* y, dx and dweight in double, and the sizes of their sums' terms, by which errors are measured. */
typedef struct sums {
    double *y, *dx, *dw, *y_size, *dx_size, *dw_size;
} sums;

static void add(double *to, double *size, double term) {
    *to += term;
    *size += fabs(term);
}
static void naive(const nn_conv *v, const float *x, const float *w, const float *dy, sums *s) {
    for (size_t at = 0; at < v->n * v->h * v->w; at++)
        for (size_t tap = 0; tap < 9; tap++) {
            ptrdiff_t py = (ptrdiff_t)(at / v->w % v->h + tap / 3) - 1, px = (ptrdiff_t)(at % v->w + tap % 3) - 1;
            if (py < 0 || px < 0 || py >= (ptrdiff_t)v->h || px >= (ptrdiff_t)v->w) continue;
            size_t from = (at / (v->h * v->w) * v->h + (size_t)py) * v->w + (size_t)px;
            for (size_t c = 0; c < v->c; c++)
                for (size_t f = 0; f < v->filters; f++) {
                    size_t i = from * v->c + c, k = (tap * v->c + c) * v->filters + f, o = at * v->filters + f;
                    add(&s->y[o], &s->y_size[o], (double)x[i] * (double)w[k]);
                    add(&s->dx[i], &s->dx_size[i], (double)dy[o] * (double)w[k]);
                    add(&s->dw[k], &s->dw_size[k], (double)dy[o] * (double)x[i]);
                }
        }
}
static void check(const char *what, size_t n, const float *got, const double *want, const double *size) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)got[i] - want[i]) / (1 + size[i]));
    printf("%s: %.1e of the terms' sizes\n", what, worst);
    CHECK(worst < 8e-6); /* the matrices have entries to 8, and 1/24: a direct sum is within 3e-7 */
}

static uint64_t one(const nn_conv *v, size_t threads, int against) {
    nn s = {.parallel = {.n_threads = threads}};
    size_t nx = v->n * v->h * v->w * v->c, ny = nx / v->c * v->filters, nw = nn_conv_weights(v);
    float *x = nn_floats(&s, nx), *w = nn_floats(&s, nw), *dy = nn_floats(&s, ny);
    float *y = nn_floats(&s, ny), *dx = nn_floats(&s, nx), *dw = nn_floats(&s, nw), *alone = nn_floats(&s, nw);
    nn_must(moe_rand_normal(5, 1, nx, 0, 1, x));
    nn_must(moe_rand_normal(5, 2, nw, 0, 1, w));
    nn_must(moe_rand_normal(5, 3, ny, 0, 1, dy));
    CHECK(winograd_fits(v));
    for (size_t i = 0; i < ny; i++) y[i] = NAN; /* is overwritten */
    for (size_t i = 0; i < nx; i++) dx[i] = NAN;
    winograd_forward(&s, v, x, w, y);
    winograd_backward(&s, v, x, dy, w, dw, 0, dx);
    uint64_t h = moe_hash(moe_hash(moe_hash(1, y, ny * sizeof *y), dx, nx * sizeof *dx), dw, nw * sizeof *dw);
    if (against) {
        double *room = allocate(2 * (ny + nx + nw), sizeof *room), *size = room + ny + nx + nw;
        sums want = {room, room + ny, room + ny + nx, size, size + ny, size + ny + nx};
        naive(v, x, w, dy, &want);
        check("y", ny, y, want.y, want.y_size);
        check("dx", nx, dx, want.dx, want.dx_size);
        check("dweight", nw, dw, want.dw, want.dw_size);
        winograd_backward(&s, v, x, dy, w, alone, 0, NULL);
        CHECK(memcmp(alone, dw, nw * sizeof *dw) == 0);
        winograd_backward(&s, v, x, dy, w, dw, 1, dx); /* adds */
        for (size_t i = 0; i < nx; i++) want.dx[i] *= 2, want.dx_size[i] *= 2;
        check("dx, added", nx, dx, want.dx, want.dx_size);
        free(room);
    }
    nn_free(&s);
    return h;
}
static void test_sums(void) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) one(&shapes[i], 1, 1);
}
static void test_same(void) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        uint64_t h = one(&shapes[i], 1, 0);
        for (size_t threads = 2; threads < 5; threads++) CHECK(one(&shapes[i], threads, 0) == h);
        for (int isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; isa++)
            if (moe_force_isa((moe_isa_kind)isa) == MOE_OK) CHECK(one(&shapes[i], 2, 0) == h);
        moe_force_isa(MOE_ISA_AUTO);
    }
}
/* What does not fit: other taps, strides, borders, channels that are no whole lanes, images of one tile. */
static void test_fits(void) {
    static const nn_conv not[] = {
        {1, 8, 8, 8, 2, 1, 1, 8}, {1, 8, 8, 8, 3, 2, 1, 8}, {1, 8, 8, 8, 3, 1, 0, 8}, {1, 8, 8, 12, 3, 1, 1, 8},
        {1, 8, 8, 8, 3, 1, 1, 9}, {1, 4, 8, 8, 3, 1, 1, 8}, {1, 8, 4, 8, 3, 1, 1, 8},
    };
    for (size_t i = 0; i < sizeof not / sizeof *not; i++) CHECK(!winograd_fits(&not[i]));
}
/* 15 x 15 pixels are 16 tiles, each of 36 products of (c) and (c, filters). */
static void test_flops(void) {
    CHECK(winograd_flops(&(nn_conv){3, 15, 15, 8, 3, 1, 1, 24}) == 2.0 * 3 * 16 * 36 * 8 * 24);
}

int main(void) {
    RUN(test_sums);
    RUN(test_same);
    RUN(test_fits);
    RUN(test_flops);
    return test_end();
}

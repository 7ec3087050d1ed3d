// winograd.h - convolutions of 3 x 3 taps with a quarter of the multiplications: Winograd's minimal filtering
// F(4 x 4, 3 x 3), as in Lavin and Gray 2016 (arXiv 1509.09308) [K].
//
// The output is cut into tiles of 4 x 4 pixels; a tile reads 6 x 6 pixels d of the input, so that neighbours overlap by
// two. With the matrices A, B, G of the paper, and a filter's taps g:
//
//     V = B' d B (6 x 6)    U = G g G' (6 x 6)    M = sum over the channels of U . V    y = A' M A (4 x 4)
//
// At each of the 36 places p of a tile the sum is a product of matrices, M_p (tiles, filters) = V_p (tiles, c) U_p (c,
// filters), and these are the only multiplications that count. The gradients are the adjoints, in reverse:
//
//     dM = A dy A'    dU_p = V_p' dM_p    dg = G' dU G    dV_p = dM_p U_p'    dd = B dV B', added where tiles overlap
//
// The images are cut into blocks by the shape alone, a block is a task, and what blocks say of the taps is added up in
// their order: the same bits for any number of threads.
#ifndef EX_WINOGRAD_H
#define EX_WINOGRAD_H

#include "transformer_back.h"

enum { WG_OUT = 4, WG_IN = 6, WG_TAPS = 3, WG_PLACES = WG_IN * WG_IN, WG_LANES = 8, WG_TILES = 196 };
typedef struct wg_lane {
    float of[WG_LANES]; // channels
} wg_lane;

// Whether a convolution can be made so, and has some tiles an image.
EX_FUNC int winograd_fits(const nn_conv *v) {
    int taps = v->size == WG_TAPS && v->stride == 1 && v->pad == 1;
    return taps && v->c % WG_LANES == 0 && v->filters % WG_LANES == 0 && v->h > WG_OUT && v->w > WG_OUT;
}

// ---- the matrices, along one axis: element i of x is x[i * step] ----

TF_INLINE void wg_input(const wg_lane *restrict x, size_t step, wg_lane *restrict y, size_t to) { // B' x
    for (int l = 0; l < WG_LANES; l++) {
        float x1 = x[step].of[l], x2 = x[2 * step].of[l], x3 = x[3 * step].of[l], x4 = x[4 * step].of[l];
        float even = x4 - 4 * x2, odd = x3 - 4 * x1, near = x4 - x2, twice = 2 * (x3 - x1);
        y[0].of[l] = 4 * x[0].of[l] - 5 * x2 + x4;
        y[to].of[l] = even + odd;
        y[2 * to].of[l] = even - odd;
        y[3 * to].of[l] = near + twice;
        y[4 * to].of[l] = near - twice;
        y[5 * to].of[l] = 4 * x1 - 5 * x3 + x[5 * step].of[l];
    }
}
TF_INLINE void wg_input_back(const wg_lane *restrict y, size_t step, wg_lane *restrict x, size_t to) { // B y
    for (int l = 0; l < WG_LANES; l++) {
        float y0 = y[0].of[l], y5 = y[5 * step].of[l];
        float sum1 = y[step].of[l] + y[2 * step].of[l], less1 = y[step].of[l] - y[2 * step].of[l];
        float sum2 = y[3 * step].of[l] + y[4 * step].of[l], less2 = y[3 * step].of[l] - y[4 * step].of[l];
        x[0].of[l] = 4 * y0;
        x[to].of[l] = 4 * (y5 - less1) - 2 * less2;
        x[2 * to].of[l] = -5 * y0 - 4 * sum1 - sum2;
        x[3 * to].of[l] = less1 + 2 * less2 - 5 * y5;
        x[4 * to].of[l] = y0 + sum1 + sum2;
        x[5 * to].of[l] = y5;
    }
}
TF_INLINE void wg_output(const wg_lane *restrict m, size_t step, wg_lane *restrict y, size_t to) { // A' m
    for (int l = 0; l < WG_LANES; l++) {
        float sum1 = m[step].of[l] + m[2 * step].of[l], less1 = m[step].of[l] - m[2 * step].of[l];
        float sum2 = m[3 * step].of[l] + m[4 * step].of[l], less2 = m[3 * step].of[l] - m[4 * step].of[l];
        y[0].of[l] = m[0].of[l] + sum1 + sum2;
        y[to].of[l] = less1 + 2 * less2;
        y[2 * to].of[l] = sum1 + 4 * sum2;
        y[3 * to].of[l] = less1 + 8 * less2 + m[5 * step].of[l];
    }
}
TF_INLINE void wg_output_back(const wg_lane *restrict y, size_t step, wg_lane *restrict m, size_t to) { // A y
    for (int l = 0; l < WG_LANES; l++) {
        float y0 = y[0].of[l], y1 = y[step].of[l], y2 = y[2 * step].of[l], y3 = y[3 * step].of[l];
        m[0].of[l] = y0;
        m[to].of[l] = (y0 + y2) + (y1 + y3);
        m[2 * to].of[l] = (y0 + y2) - (y1 + y3);
        m[3 * to].of[l] = (y0 + 4 * y2) + (2 * y1 + 8 * y3);
        m[4 * to].of[l] = (y0 + 4 * y2) - (2 * y1 + 8 * y3);
        m[5 * to].of[l] = y3;
    }
}
TF_INLINE void wg_taps(const wg_lane *restrict g, size_t step, wg_lane *restrict u, size_t to) { // G g
    for (int l = 0; l < WG_LANES; l++) {
        float g0 = g[0].of[l], g1 = g[step].of[l], g2 = g[2 * step].of[l];
        float sum = (g0 + g2) * (-1.0f / 6), one = g1 * (1.0f / 6), far = g0 * (1.0f / 24) + g2 * (1.0f / 6);
        u[0].of[l] = g0 * 0.25f;
        u[to].of[l] = sum - one;
        u[2 * to].of[l] = sum + one;
        u[3 * to].of[l] = far + 0.5f * one;
        u[4 * to].of[l] = far - 0.5f * one;
        u[5 * to].of[l] = g2;
    }
}
TF_INLINE void wg_taps_back(const wg_lane *restrict u, size_t step, wg_lane *restrict g, size_t to) { // G' u
    for (int l = 0; l < WG_LANES; l++) {
        float u1 = u[step].of[l] * (1.0f / 6), u2 = u[2 * step].of[l] * (1.0f / 6), sum1 = u1 + u2, less1 = u2 - u1;
        float sum2 = u[3 * step].of[l] + u[4 * step].of[l], less2 = u[3 * step].of[l] - u[4 * step].of[l];
        g[0].of[l] = u[0].of[l] * 0.25f - sum1 + sum2 * (1.0f / 24);
        g[to].of[l] = less1 + less2 * (1.0f / 12);
        g[2 * to].of[l] = sum2 * (1.0f / 6) - sum1 + u[5 * step].of[l];
    }
}
// The same along both axes: x (from, from) -> y (to, to).
typedef void wg_axis(const wg_lane *restrict x, size_t step, wg_lane *restrict y, size_t to);
TF_INLINE void wg_both(wg_axis *axis, size_t from, size_t to, const wg_lane *restrict x, wg_lane *restrict y) {
    wg_lane half[WG_PLACES];
    for (size_t i = 0; i < from; i++) axis(x + i, from, half + i, from);
    for (size_t i = 0; i < to; i++) axis(half + i * from, 1, y + i * to, 1);
}

// ---- a convolution at work ----

typedef struct wg_job {
    const nn_conv *v;
    size_t rows, cols, tiles, images, blocks; // tiles of an image (rows x cols); images of a block
    size_t room;                              // tiles of a block
    const float *x, *dy, *weight;
    float *y, *dx, *dweight;
    int accumulate;
    float *u, *panels, *part, *worker; // u (36, c, filters); panels (36, ...); part (blocks, 36, c, filters)
    size_t panel, worker_floats, gemm_bytes;
} wg_job;

// Blocks of about WG_TILES tiles.
EX_FUNC wg_job wg_begin(const nn_conv *v) {
    wg_job j = {.v = v, .rows = (v->h + WG_OUT - 1) / WG_OUT, .cols = (v->w + WG_OUT - 1) / WG_OUT};
    j.tiles = j.rows * j.cols;
    j.images = j.tiles < WG_TILES ? WG_TILES / j.tiles : 1;
    j.blocks = (v->n + j.images - 1) / j.images;
    j.room = j.images * j.tiles;
    return j;
}

// Which pixel of the image is pixel i of the square of a tile, or SIZE_MAX; the square of the input (WG_IN) begins a
// pixel before the tile.
TF_INLINE size_t wg_pixel(const wg_job *j, size_t tile, size_t side, size_t i) {
    size_t before = side == WG_IN; // a row or column -1 is above all others
    size_t row = tile / j->cols * WG_OUT + i / side - before, col = tile % j->cols * WG_OUT + i % side - before;
    return row < j->v->h && col < j->v->w ? row * j->v->w + col : SIZE_MAX;
}
TF_INLINE void wg_load(const float *from, wg_lane *to) { memcpy(to, from, sizeof *to); }
TF_INLINE void wg_store(const wg_lane *from, float *to) { memcpy(to, from, sizeof *from); }

// The square of a tile in an image (pixels, c) -> places, through a matrix along both axes; place p at to + p * apart.
TF_INLINE void wg_spread(wg_axis *axis, size_t side, const wg_job *j, size_t c, const float *image, size_t tile,
                         float *to, size_t apart) {
    size_t pixel[WG_PLACES];
    for (size_t i = 0; i < side * side; i++) pixel[i] = wg_pixel(j, tile, side, i);
    for (size_t k = 0; k < c; k += WG_LANES) {
        wg_lane x[WG_PLACES], y[WG_PLACES];
        for (size_t i = 0; i < side * side; i++) {
            if (pixel[i] == SIZE_MAX)
                memset(&x[i], 0, sizeof *x);
            else
                wg_load(image + pixel[i] * c + k, &x[i]);
        }
        wg_both(axis, side, WG_IN, x, y);
        for (size_t p = 0; p < WG_PLACES; p++) wg_store(&y[p], to + p * apart + k);
    }
}
// Places -> the square: written where that is the output's, added where it is the input's.
TF_INLINE void wg_gather(wg_axis *axis, size_t side, const wg_job *j, size_t c, const float *from, size_t apart,
                         size_t tile, float *image) {
    size_t pixel[WG_PLACES];
    for (size_t i = 0; i < side * side; i++) pixel[i] = wg_pixel(j, tile, side, i);
    for (size_t k = 0; k < c; k += WG_LANES) {
        wg_lane x[WG_PLACES], y[WG_PLACES];
        for (size_t p = 0; p < WG_PLACES; p++) wg_load(from + p * apart + k, &x[p]);
        wg_both(axis, WG_IN, side, x, y);
        for (size_t i = 0; i < side * side; i++) {
            if (pixel[i] == SIZE_MAX) continue;
            float *at = image + pixel[i] * c + k;
            for (int l = 0; side == WG_IN && l < WG_LANES; l++) y[i].of[l] += at[l];
            wg_store(&y[i], at);
        }
    }
}
TF_WIDE void wg_spread_input(const wg_job *j, const float *image, size_t tile, float *to, size_t apart) {
    wg_spread(wg_input, WG_IN, j, j->v->c, image, tile, to, apart);
}
TF_WIDE void wg_spread_gradient(const wg_job *j, const float *image, size_t tile, float *to, size_t apart) {
    wg_spread(wg_output_back, WG_OUT, j, j->v->filters, image, tile, to, apart);
}
TF_WIDE void wg_gather_output(const wg_job *j, const float *from, size_t apart, size_t tile, float *image) {
    wg_gather(wg_output, WG_OUT, j, j->v->filters, from, apart, tile, image);
}
TF_WIDE void wg_gather_gradient(const wg_job *j, const float *from, size_t apart, size_t tile, float *image) {
    wg_gather(wg_input_back, WG_IN, j, j->v->c, from, apart, tile, image);
}

// ---- tasks ----

// The taps of a channel -> u.
TF_WIDE void wg_taps_row(const wg_job *j, size_t c) {
    size_t filters = j->v->filters, apart = j->v->c * filters;
    for (size_t f = 0; f < filters; f += WG_LANES) {
        wg_lane g[WG_TAPS * WG_TAPS], u[WG_PLACES];
        for (size_t k = 0; k < WG_TAPS * WG_TAPS; k++) wg_load(j->weight + k * apart + c * filters + f, &g[k]);
        wg_both(wg_taps, WG_TAPS, WG_IN, g, u);
        for (size_t p = 0; p < WG_PLACES; p++) wg_store(&u[p], j->u + p * apart + c * filters + f);
    }
}
EX_FUNC void wg_taps_task(void *arg, size_t i, size_t worker) {
    (void)worker;
    wg_taps_row(arg, i);
}
// What the blocks say of a place, in the first block's part.
TF_WIDE void wg_sum(size_t n, size_t blocks, size_t apart, float *restrict part) {
    for (size_t b = 1; b < blocks; b++)
        for (size_t i = 0; i < n; i++) part[i] += part[b * apart + i];
}
EX_FUNC void wg_sum_task(void *arg, size_t p, size_t worker) {
    const wg_job *j = arg;
    size_t n = j->v->c * j->v->filters;
    (void)worker;
    wg_sum(n, j->blocks, WG_PLACES * n, j->part + p * n);
}
// The sums for the taps of a channel -> dweight.
TF_WIDE void wg_taps_back_row(const wg_job *j, size_t c) {
    size_t filters = j->v->filters, apart = j->v->c * filters;
    for (size_t f = 0; f < filters; f += WG_LANES) {
        wg_lane g[WG_PLACES], u[WG_PLACES];
        for (size_t p = 0; p < WG_PLACES; p++) wg_load(j->part + p * apart + c * filters + f, &u[p]);
        wg_both(wg_taps_back, WG_IN, WG_TAPS, u, g);
        for (size_t k = 0; k < WG_TAPS * WG_TAPS; k++) wg_store(&g[k], j->dweight + k * apart + c * filters + f);
    }
}
EX_FUNC void wg_taps_back_task(void *arg, size_t i, size_t worker) {
    (void)worker;
    wg_taps_back_row(arg, i);
}
// u at a place -> panels: as it is for the forward, its transpose for the gradient.
EX_FUNC void wg_pack_task(void *arg, size_t p, size_t worker) {
    const wg_job *j = arg;
    size_t c = j->v->c, filters = j->v->filters;
    moe_parallel alone = {.n_threads = 1};
    moe_gemm_args g = {.n = filters, .k = c, .b = j->u + p * c * filters, .parallel = &alone};
    if (j->dy) g.n = c, g.k = filters, g.tb = 1;
    (void)worker;
    nn_must(moe_gemm_pack(&g, j->panels + p * j->panel));
}

// The products at the places, (rows, k) (k, n), with the arguments that do not change.
EX_FUNC void wg_product(const wg_job *j, moe_gemm_args g, void *scratch) {
    moe_parallel alone = {.n_threads = 1};
    g.parallel = &alone, g.scratch = scratch, g.scratch_bytes = j->gemm_bytes;
    nn_must(moe_gemm(&g));
}
// A block at work: its images, and its worker's memory for the places of the input's channels and of the filters.
typedef struct wg_block {
    size_t first, images;
    float *in, *out, *scratch;
} wg_block;
EX_FUNC wg_block wg_block_of(const wg_job *j, size_t i, size_t worker) {
    wg_block b = {.first = i * j->images, .in = j->worker + worker * j->worker_floats};
    b.images = j->v->n - b.first < j->images ? j->v->n - b.first : j->images;
    b.out = b.in + WG_PLACES * j->room * j->v->c;
    b.scratch = b.out + WG_PLACES * j->room * j->v->filters;
    return b;
}
EX_FUNC void wg_forward_task(void *arg, size_t i, size_t worker) {
    const wg_job *j = arg;
    wg_block b = wg_block_of(j, i, worker);
    size_t c = j->v->c, filters = j->v->filters, pixels = j->v->h * j->v->w, tiles = b.images * j->tiles;
    float *in = b.in, *out = b.out;
    for (size_t t = 0; t < tiles; t++)
        wg_spread_input(j, j->x + (b.first + t / j->tiles) * pixels * c, t % j->tiles, in + t * c, j->room * c);
    for (size_t p = 0; p < WG_PLACES; p++) {
        moe_gemm_args g = {.m = tiles, .n = filters, .k = c, .b_panels = j->panels + p * j->panel};
        g.a = in + p * j->room * c, g.c = out + p * j->room * filters;
        wg_product(j, g, b.scratch);
    }
    for (size_t t = 0; t < tiles; t++)
        wg_gather_output(j, out + t * filters, j->room * filters, t % j->tiles,
                         j->y + (b.first + t / j->tiles) * pixels * filters);
}
EX_FUNC void wg_backward_task(void *arg, size_t i, size_t worker) {
    const wg_job *j = arg;
    wg_block b = wg_block_of(j, i, worker);
    size_t c = j->v->c, filters = j->v->filters, pixels = j->v->h * j->v->w, tiles = b.images * j->tiles;
    float *in = b.in, *out = b.out;
    for (size_t t = 0; t < tiles; t++) {
        size_t image = b.first + t / j->tiles;
        wg_spread_input(j, j->x + image * pixels * c, t % j->tiles, in + t * c, j->room * c);
        wg_spread_gradient(j, j->dy + image * pixels * filters, t % j->tiles, out + t * filters, j->room * filters);
    }
    for (size_t p = 0; p < WG_PLACES; p++) {
        float *v_p = in + p * j->room * c, *m_p = out + p * j->room * filters;
        wg_product(j, (moe_gemm_args){.m = c, .n = filters, .k = tiles, .a = v_p, .ta = 1, .b = m_p,
                                      .c = j->part + (i * WG_PLACES + p) * c * filters}, b.scratch);
        if (!j->dx) continue;
        wg_product(j, (moe_gemm_args){.m = tiles, .n = c, .k = filters, .a = m_p, .b_panels = j->panels + p * j->panel,
                                      .c = v_p}, b.scratch);
    }
    if (!j->dx) return;
    float *dx = j->dx + b.first * pixels * c;
    if (!j->accumulate) memset(dx, 0, b.images * pixels * c * sizeof *dx);
    for (size_t t = 0; t < tiles; t++)
        wg_gather_gradient(j, in + t * c, j->room * c, t % j->tiles, dx + t / j->tiles * pixels * c);
}

// ---- the convolution ----

// Memory, the taps, and their panels.
EX_FUNC void wg_prepare(nn *s, wg_job *j) {
    const nn_conv *v = j->v;
    moe_parallel alone = {.n_threads = 1};
    size_t c = v->c, filters = v->filters, u = WG_PLACES * c * filters, n = j->dy ? c : filters;
    moe_gemm_args forward = {.m = j->room, .n = filters, .k = c, .b_panels = j->weight};
    moe_gemm_args taps = {.m = c, .n = filters, .k = j->room, .ta = 1}, data = forward;
    data.n = c, data.k = filters;
    j->panel = (n + 31) / 32 * 32 * (c + filters - n);
    j->gemm_bytes = tb_bytes(j->dy ? data : forward, &alone, 0);
    if (j->dy) j->gemm_bytes = tb_bytes(taps, &alone, j->gemm_bytes);
    j->worker_floats = WG_PLACES * j->room * (c + filters) + j->gemm_bytes / sizeof(float) + 32;
    size_t parts = j->dy ? j->blocks * u : 0, workers = moe_workers(&s->parallel);
    j->u = nn_scratch(s, u + WG_PLACES * j->panel + parts + workers * j->worker_floats);
    j->panels = j->u + u;
    j->part = j->panels + WG_PLACES * j->panel;
    j->worker = j->part + parts;
    if (j->dy && !j->dx) return;
    moe_run(&s->parallel, c, wg_taps_task, j);
    moe_run(&s->parallel, WG_PLACES, wg_pack_task, j);
}

EX_FUNC void winograd_forward(nn *s, const nn_conv *v, const float *x, const float *weight, float *y) {
    wg_job j = wg_begin(v);
    j.x = x, j.weight = weight, j.y = y;
    wg_prepare(s, &j);
    moe_run(&s->parallel, j.blocks, wg_forward_task, &j);
}
// dweight, and dx (or +=) unless that is NULL.
EX_FUNC void winograd_backward(nn *s, const nn_conv *v, const float *x, const float *dy, const float *weight,
                               float *dweight, int accumulate, float *dx) {
    wg_job j = wg_begin(v);
    j.x = x, j.dy = dy, j.weight = weight, j.dweight = dweight, j.dx = dx, j.accumulate = accumulate;
    wg_prepare(s, &j);
    moe_run(&s->parallel, j.blocks, wg_backward_task, &j);
    moe_run(&s->parallel, WG_PLACES, wg_sum_task, &j);
    moe_run(&s->parallel, v->c, wg_taps_back_task, &j);
}

// Multiplications and additions of one pass over the images, in products.
EX_FUNC double winograd_flops(const nn_conv *v) {
    wg_job j = wg_begin(v);
    return 2 * (double)(v->n * j.tiles * WG_PLACES) * (double)(v->c * v->filters);
}

#endif

// muon.h - the optimiser Muon for matrices: momentum, made orthogonal, is the direction of the step.
//
//     m = momentum m + g,  u = g + momentum m (Nesterov),  x = u / |u|
//     five times (or `rounds`) x = a x + (b X + c X X) x, X = x x^T
//     W -= lr 0.2 sqrt(max(rows, columns)) x
//
// as in Jordan et al. 2024 (a, b, c are theirs) [K]; the factor, after Moonlight (arXiv 2502.16982) [K], gives a step
// the size of one of AdamW, so that both take the same rate. With `turns` a matrix keeps its length instead, and lr is
// about the angle that it turns by, which is what normalisation behind a convolution leaves to learn:
//
//     W -= lr |W| x / sqrt(min(rows, columns)),  then as long as before
//
// after Jordan's record program for CIFAR-10 [K], which brings filters to a fixed length before each step. Matrices are
// independent: each is a task.
#ifndef EX_MUON_H
#define EX_MUON_H

#include "transformer_back.h"

enum { MUON_ROUNDS = 5, MUON_BLOCK = 32 };
static const float muon_momentum = 0.95f;

typedef struct muon_matrix {
    float *value, *grad, *momentum;
    size_t rows, cols;
} muon_matrix;

typedef struct muon {
    muon_matrix *matrix;
    size_t n, room, n_momentum;
    float *momentum;            // of all matrices
    float *worker;              // scratch
    size_t worker_floats, small_bytes;
    float lr, decay;
    int turns;                  // lr is an angle, and there is no decay
    int rounds;                 // 0: MUON_ROUNDS
    const moe_parallel *parallel;
} muon;

EX_FUNC void muon_add(muon *u, float *value, float *grad, size_t rows, size_t cols) {
    if (u->n == u->room) {
        u->room = u->room ? 2 * u->room : 16;
        u->matrix = realloc(u->matrix, u->room * sizeof *u->matrix);
        if (!u->matrix) die("out of memory");
    }
    u->matrix[u->n++] = (muon_matrix){value, grad, NULL, rows, cols};
    u->n_momentum += rows * cols;
}

// After the last muon_add; memory lives until nn_free but for the list of matrices: muon_free.
EX_FUNC void muon_begin(muon *u, nn *s) {
    size_t largest = 0, side = 0, panels = 0;
    moe_parallel alone = {.n_threads = 1};
    if (!u->rounds) u->rounds = MUON_ROUNDS;
    u->parallel = &s->parallel;
    u->momentum = nn_floats(s, u->n_momentum);
    float *at = u->momentum;
    for (size_t i = 0; i < u->n; i++) {
        muon_matrix *m = &u->matrix[i];
        size_t few = m->rows < m->cols ? m->rows : m->cols, many = m->rows + m->cols - few;
        m->momentum = at;
        at += m->rows * m->cols;
        if (few * many > largest) largest = few * many;
        if (few > side) side = few;
        size_t panel = (few + 31) / 32 * 32 * many; // not less than that of few x few
        if (panel > panels) panels = panel;
        u->small_bytes = tb_bytes((moe_gemm_args){.m = few, .n = many, .k = few}, &alone, u->small_bytes);
        u->small_bytes = tb_bytes((moe_gemm_args){.m = MUON_BLOCK, .n = few, .k = many, .b_panels = u->momentum},
                                  &alone, u->small_bytes);
    }
    u->worker_floats = 2 * largest + 2 * side * side + panels + u->small_bytes / sizeof(float) + 32;
    u->worker = nn_floats(s, moe_workers(u->parallel) * u->worker_floats);
}
EX_FUNC void muon_free(muon *u) { free(u->matrix); }

// A block below the diagonal of c (n, n) from the one above it.
EX_FUNC void muon_mirror(size_t n, size_t row, size_t col, float *c) {
    size_t last_row = row + MUON_BLOCK < n ? row + MUON_BLOCK : n, last_col = col + MUON_BLOCK;
    for (size_t r = row; r < last_row; r++)
        for (size_t s = col; s < last_col; s++) c[r * n + s] = c[s * n + r];
}
// c (n, n) = a b of a (n, k) and b in panels, where the product is symmetric: blocks of rows from the diagonal on.
// (Which of two numbers multiplies the other makes no difference, so the rest has the same bits: muon_mirror.)
EX_FUNC void muon_square(moe_gemm_args g, size_t n, size_t k, const float *a, const float *panels, float *c) {
    g.k = k;
    for (size_t i = 0; i < n; i += MUON_BLOCK) {
        g.m = n - i < MUON_BLOCK ? n - i : MUON_BLOCK, g.n = n - i;
        g.a = a + i * k;
        g.b_panels = panels + i * k; // MUON_BLOCK is a panel's width, or some
        g.c = c + i * n + i, g.ldc = n;
        nn_must(moe_gemm(&g));
    }
}
// Its operations, as a share of the whole product's.
EX_FUNC double muon_share(double n) {
    double blocks = ceil(n / MUON_BLOCK);
    return (blocks + 1) / (2 * blocks);
}

// Operations of a step in products.
EX_FUNC double muon_flops(const muon *u) {
    double sum = 0;
    for (size_t i = 0; i < u->n; i++) {
        double r = (double)u->matrix[i].rows, c = (double)u->matrix[i].cols, few = fmin(r, c), many = fmax(r, c);
        sum += u->rounds * (2 * few * few * many + muon_share(few) * (2 * few * few * many + 2 * few * few * few));
    }
    return sum;
}

// m = momentum m + g, u = g + momentum m
TF_WIDE void muon_direction(size_t n, const float *restrict g, float *restrict m, float *restrict u) {
    for (size_t k = 0; k < n; k++) {
        m[k] = muon_momentum * m[k] + g[k];
        u[k] = g[k] + muon_momentum * m[k];
    }
}
TF_WIDE void muon_divide(size_t n, float size, float *x) {
    for (size_t i = 0; i < n; i++) x[i] /= size;
}
// y = a x + b y
TF_WIDE void muon_mix(size_t n, float a, const float *restrict x, float b, float *restrict y) {
    for (size_t i = 0; i < n; i++) y[i] = a * x[i] + b * y[i];
}
TF_WIDE void muon_axpy(size_t n, float a, float *restrict x, const float *restrict y) {
    for (size_t i = 0; i < n; i++) x[i] = a * x[i] + y[i];
}

// x (few, many) -> nearly orthogonal rows; room: 2 (few, few), (few, many) and the panels
EX_FUNC void muon_orthogonal(int rounds, size_t few, size_t many, float *x, float *room, void *gemm, size_t bytes) {
    float *square = room, *mixed = room + few * few, *next = room + 2 * few * few, *panels = next + few * many;
    moe_parallel alone = {.n_threads = 1};
    moe_gemm_args g = {.parallel = &alone, .scratch = gemm, .scratch_bytes = bytes}, last = g;
    moe_gemm_args turned = {.n = few, .k = many, .b = x, .tb = 1, .parallel = &alone};
    moe_gemm_args whole = {.n = few, .k = few, .b = square, .parallel = &alone};
    last.m = last.k = few, last.n = many, last.a = mixed, last.b = x, last.c = next;
    muon_divide(few * many, sqrtf(tb_dot(few * many, x, x)) + 1e-7f, x);
    for (int round = 0; round < rounds; round++) {
        nn_must(moe_gemm_pack(&turned, panels));
        muon_square(g, few, many, x, panels, square);
        for (size_t row = MUON_BLOCK; row < few; row += MUON_BLOCK)
            for (size_t col = 0; col < row; col += MUON_BLOCK) muon_mirror(few, row, col, square);
        nn_must(moe_gemm_pack(&whole, panels));
        muon_square(g, few, few, square, panels, mixed);
        for (size_t row = 0; row < few; row++) {
            size_t from = row / MUON_BLOCK * MUON_BLOCK, at = row * few + from;
            muon_mix(few - from, -4.7750f, square + at, 2.0315f, mixed + at);
        }
        for (size_t row = MUON_BLOCK; row < few; row += MUON_BLOCK)
            for (size_t col = 0; col < row; col += MUON_BLOCK) muon_mirror(few, row, col, mixed);
        nn_must(moe_gemm(&last));
        muon_axpy(few * many, 3.4445f, x, next);
    }
}

// value = keep value - step direction
TF_WIDE void muon_move(size_t n, float keep, float step, const float *restrict direction, float *restrict value) {
    for (size_t k = 0; k < n; k++) value[k] = keep * value[k] - step * direction[k];
}
// value turns by `angle` away from the direction, whose length is about sqrt(few).
EX_FUNC void muon_rotate(size_t n, size_t few, float angle, const float *direction, float *value) {
    float length = sqrtf(tb_dot(n, value, value));
    if (!(length > 0)) return;
    muon_move(n, 1, angle * length / sqrtf((float)few), direction, value);
    muon_divide(n, sqrtf(tb_dot(n, value, value)) / length, value);
}
EX_FUNC void muon_transpose(size_t rows, size_t cols, const float *x, float *y) { // y = x^T
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) y[c * rows + r] = x[r * cols + c];
}
EX_FUNC void muon_task(void *arg, size_t i, size_t worker) {
    const muon *u = arg;
    const muon_matrix *m = &u->matrix[i];
    size_t rows = m->rows, cols = m->cols, n = rows * cols, few = rows < cols ? rows : cols, many = n / few;
    float *x = u->worker + worker * u->worker_floats;
    float *gemm = x + u->worker_floats - u->small_bytes / sizeof(float) - 16;
    const float *direction = x;
    muon_direction(n, m->grad, m->momentum, rows > cols ? x + n : x);
    if (rows > cols) muon_transpose(rows, cols, x + n, x);
    muon_orthogonal(u->rounds, few, many, x, x + n, gemm, u->small_bytes);
    if (rows > cols) muon_transpose(cols, rows, x, x + n), direction = x + n;
    if (u->turns)
        muon_rotate(n, few, u->lr, direction, m->value);
    else
        muon_move(n, 1 - u->lr * u->decay, u->lr * 0.2f * sqrtf((float)many), direction, m->value);
}
EX_FUNC void muon_step(muon *u, float lr, float decay) {
    u->lr = lr;
    u->decay = decay;
    moe_run(u->parallel, u->n, muon_task, u);
}

#endif

// muon.h - the optimiser Muon for matrices: momentum, made orthogonal, is the direction of the step.
//
//     m = momentum m + g,  u = g + momentum m (Nesterov),  x = u / |u|
//     five times x = a x + (b X + c X X) x, X = x x^T
//     W -= lr 0.2 sqrt(max(rows, columns)) x
//
// as in Jordan et al. 2024 (a, b, c are theirs) [K]; the factor, after Moonlight (arXiv 2502.16982) [K], gives a step
// the size of one of AdamW, so that both take the same rate. Matrices are independent: each is a task.
#ifndef EX_MUON_H
#define EX_MUON_H

#include "transformer_back.h"

enum { MUON_ROUNDS = 5, MUON_BLOCK = 64 };
static const float muon_momentum = 0.95f;

typedef struct muon_matrix {
    float *value, *grad, *momentum; // grad is used up
    size_t rows, cols;
} muon_matrix;

typedef struct muon {
    muon_matrix *matrix;
    size_t n, room, n_momentum;
    float *momentum;            // of all matrices
    float *worker;              // scratch
    size_t worker_floats, small_bytes;
    float lr, decay;
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
    size_t largest = 0, side = 0;
    moe_parallel alone = {.n_threads = 1};
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
        u->small_bytes = tb_bytes((moe_gemm_args){.m = few, .n = few, .k = many, .tb = 1}, &alone, u->small_bytes);
        u->small_bytes = tb_bytes((moe_gemm_args){.m = few, .n = many, .k = few}, &alone, u->small_bytes);
    }
    u->worker_floats = 2 * largest + 2 * side * side + u->small_bytes / sizeof(float) + 32;
    u->worker = nn_floats(s, moe_workers(u->parallel) * u->worker_floats);
}
EX_FUNC void muon_free(muon *u) { free(u->matrix); }

// c (n, n) = a a^T of a (n, k), which is symmetric: blocks of rows from the diagonal on, the rest is copied. (Which of
// two numbers multiplies the other makes no difference, so the bits are those of the whole product.)
EX_FUNC void muon_square(moe_gemm_args g, size_t n, size_t k, const float *a, float *c) {
    g.k = k, g.tb = 1;
    for (size_t i = 0; i < n; i += MUON_BLOCK) {
        g.m = n - i < MUON_BLOCK ? n - i : MUON_BLOCK, g.n = n - i;
        g.a = g.b = a + i * k;
        g.c = c + i * n + i, g.ldc = n;
        nn_must(moe_gemm(&g));
        for (size_t r = i + g.m; r < n; r++)
            for (size_t s = i; s < i + g.m; s++) c[r * n + s] = c[s * n + r];
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
        sum += MUON_ROUNDS * (2 * few * few * many + muon_share(few) * (2 * few * few * many + 2 * few * few * few));
    }
    return sum;
}

// x (few, many) -> nearly orthogonal rows; room: 2 (few, few) and (few, many)
EX_FUNC void muon_orthogonal(size_t few, size_t many, float *x, float *room, void *gemm, size_t bytes) {
    float *square = room, *mixed = room + few * few, *next = room + 2 * few * few;
    float size = sqrtf(tb_dot(few * many, x, x)) + 1e-7f;
    moe_parallel alone = {.n_threads = 1};
    moe_gemm_args g = {.parallel = &alone, .scratch = gemm, .scratch_bytes = bytes};
    for (size_t i = 0; i < few * many; i++) x[i] /= size;
    for (int round = 0; round < MUON_ROUNDS; round++) {
        moe_gemm_args last = g;
        muon_square(g, few, many, x, square);
        muon_square(g, few, few, square, mixed);
        for (size_t i = 0; i < few * few; i++) mixed[i] = -4.7750f * square[i] + 2.0315f * mixed[i];
        last.m = last.k = few, last.n = many, last.a = mixed, last.b = x, last.c = next;
        nn_must(moe_gemm(&last));
        for (size_t i = 0; i < few * many; i++) x[i] = 3.4445f * x[i] + next[i];
    }
}

EX_FUNC void muon_task(void *arg, size_t i, size_t worker) {
    const muon *u = arg;
    const muon_matrix *m = &u->matrix[i];
    size_t rows = m->rows, cols = m->cols, n = rows * cols, few = rows < cols ? rows : cols, many = n / few;
    float *x = u->worker + worker * u->worker_floats;
    float *gemm = x + u->worker_floats - u->small_bytes / sizeof(float) - 16;
    for (size_t k = 0; k < n; k++) {
        m->momentum[k] = muon_momentum * m->momentum[k] + m->grad[k];
        m->grad[k] += muon_momentum * m->momentum[k];
    }
    if (rows <= cols) memcpy(x, m->grad, n * sizeof(float));
    for (size_t r = 0; rows > cols && r < rows; r++)
        for (size_t c = 0; c < cols; c++) x[c * rows + r] = m->grad[r * cols + c];
    muon_orthogonal(few, many, x, x + n, gemm, u->small_bytes);
    float step = u->lr * 0.2f * sqrtf((float)many), keep = 1 - u->lr * u->decay;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            float direction = rows <= cols ? x[r * cols + c] : x[c * rows + r];
            m->value[r * cols + c] = keep * m->value[r * cols + c] - step * direction;
        }
}
EX_FUNC void muon_step(muon *u, float lr, float decay) {
    u->lr = lr;
    u->decay = decay;
    moe_run(u->parallel, u->n, muon_task, u);
}

#endif

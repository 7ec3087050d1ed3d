// nn.h - the few neural-network operations around a Mixture-of-Experts layer: convolution, normalisation, ReLU, GELU,
// pooling, linear, cross-entropy, and a bank of parameters. Plain functions over float arrays, forward and backward;
// images are NHWC: (n, h, w, c) with channels innermost.
//
// It stands on moe.h: products are moe_gemm (a convolution is one product whose left operand is filled on the fly with
// patches of the image), threads are moe_run, exp and log are moe_exp and moe_log. Results have the same bits for any
// number of threads and every instruction set: work is cut into blocks by index, sums run inside a block in order and
// then over the blocks in order. Compile with -ffp-contract=off, so that the compiler does not fuse a * b + c here.
//
// Backward functions set (not add) the gradients of parameters.
#ifndef EX_NN_H
#define EX_NN_H

#include "args.h"

#include <math.h>

#include "moe.h"

// What every operation needs: who runs the tasks, scratch memory that grows when needed, and the arrays of nn_floats.
typedef struct nn {
    moe_parallel parallel;
    float *scratch;
    size_t scratch_count;
    struct nn_memory *memory;
} nn;

typedef struct nn_memory {
    struct nn_memory *next;
    float *floats;
} nn_memory;

// An array of `count` zeros that lives until nn_free.
EX_FUNC float *nn_floats(nn *s, size_t count) {
    nn_memory *m = allocate(1, sizeof *m);
    m->next = s->memory;
    m->floats = allocate(count, sizeof(float));
    s->memory = m;
    return m->floats;
}

// `count` floats of any content, in huge pages where there are some; release with free().
EX_FUNC float *nn_huge(size_t count) {
    float *floats = count <= SIZE_MAX / sizeof(float) ? huge_malloc(count * sizeof(float)) : NULL;
    if (!floats) die("out of memory (%zu numbers)", count);
    return floats;
}

// An array as nn_floats gives one, but of any content, for what is written whole.
EX_FUNC float *nn_room(nn *s, size_t count) {
    nn_memory *m = allocate(1, sizeof *m);
    m->next = s->memory;
    m->floats = nn_huge(count);
    s->memory = m;
    return m->floats;
}

EX_FUNC void nn_free(nn *s) {
    for (nn_memory *m = s->memory, *next; m; m = next) {
        next = m->next;
        free(m->floats);
        free(m);
    }
    free(s->scratch);
    s->scratch = NULL;
    s->scratch_count = 0;
    s->memory = NULL;
}

// At least `count` floats, valid until the next operation.
EX_FUNC float *nn_scratch(nn *s, size_t count) {
    if (s->scratch_count < count) {
        free(s->scratch);
        s->scratch = nn_huge(count);
        s->scratch_count = count;
    }
    return s->scratch;
}

EX_FUNC void nn_must(moe_status status) {
    const char *hint = "";
    if (moe_status_kind(status) == MOE_KIND_NUMBER) hint = "; if the training diverges, try a smaller --lr";
    if (status != MOE_OK) die("%s%s", moe_status_string(status), hint);
}

// --top-k: k experts a token. With one the weight is its score, not 1 as its share of one: a router whose weight is
// always 1 would learn nothing from the task. (DeepSeek's gate normalises for top_k > 1 alone.)
EX_FUNC void nn_top_k(moe_desc *desc, size_t k) {
    desc->top_k = k;
    if (k != 1 || desc->select == MOE_SELECT_EXPERT_CHOICE) return;
    desc->normalize = MOE_OFF;
    if (desc->gate == MOE_GATE_SOFTMAX_SELECTED) desc->gate = MOE_GATE_SOFTMAX;
    if (desc->combine == MOE_COMBINE_ROBUST) desc->combine = MOE_COMBINE_SUM;
}

// A desc from the command line; a fault ends the program as a bad option does. --system, a row or its alias:
EX_FUNC void nn_system(const char *program, moe_desc *desc, const char *name) {
    if (moe_desc_system(desc, name)) args_unknown(program, "system", name, moe_system_name, NULL);
}
// --set: fields as text. NULL: none.
EX_FUNC void nn_set(const char *program, moe_desc *desc, const char *text) {
    char why[1000];
    moe_status status = text ? moe_desc_parse(desc, text, NULL) : MOE_OK;
    if (status) moe_desc_explain(status, desc, text, why, sizeof why), args_fail(program, "--set: %s", why);
}
// Effective values. whose: which desc, where there are several, and ": "; or "".
EX_FUNC void nn_resolve(const char *program, const char *whose, moe_desc *desc) {
    char why[1000];
    moe_status status = moe_desc_resolve(desc, desc);
    if (status) moe_desc_explain(status, desc, NULL, why, sizeof why), args_fail(program, "%s%s", whose, why);
}

// Arrays of (rows, c) are cut into blocks of whole rows, about 64 KiB each. The cut depends on the shape alone.
EX_FUNC size_t nn_block_rows(size_t c) { return c < 16384 ? 16384 / c : 1; }
EX_FUNC size_t nn_blocks(size_t rows, size_t c) { return (rows + nn_block_rows(c) - 1) / nn_block_rows(c); }

// What a task over blocks of rows gets. Each operation uses the fields that it needs.
typedef struct nn_job {
    size_t rows, c;
    const float *x, *y, *dy, *a, *b, *mean, *k1, *k2;
    float *out, *sum1, *sum2;
    int relu;
    float floor; // what ReLU lets through is above; minus infinity without ReLU
} nn_job;

EX_FUNC void nn_run(nn *s, nn_job *job, moe_task *task) {
    moe_run(&s->parallel, nn_blocks(job->rows, job->c), task, job);
}

// Rows [*begin, *end) of block i.
EX_FUNC void nn_block(const nn_job *j, size_t i, size_t *begin, size_t *end) {
    size_t n = nn_block_rows(j->c);
    *begin = i * n;
    *end = *begin + n < j->rows ? *begin + n : j->rows;
}

// ---- parameters ----

// Tensors one after another in one block, each with gradient and optimiser moments. Declare them all with nn_add, then
// nn_bank_alloc; value + offset is a tensor.
#define NN_MAX_TENSORS 64
typedef struct nn_bank {
    size_t n_tensors, count;
    struct {
        size_t at, count;
        int decay;
    } tensor[NN_MAX_TENSORS];
    float *value, *grad, *moment1, *moment2; // (count) each
} nn_bank;

// Declares a tensor; decay: it takes weight decay; NN_ELSEWHERE: another optimiser steps it. Returns its offset.
enum { NN_ELSEWHERE = 2 };
EX_FUNC size_t nn_add(nn_bank *b, size_t count, int decay) {
    if (b->n_tensors == NN_MAX_TENSORS) die("more than %d tensors", NN_MAX_TENSORS);
    size_t at = b->count;
    b->tensor[b->n_tensors].at = at;
    b->tensor[b->n_tensors].count = count;
    b->tensor[b->n_tensors++].decay = decay;
    b->count += count;
    return at;
}

EX_FUNC void nn_bank_alloc(nn *s, nn_bank *b) {
    b->value = nn_floats(s, 4 * b->count);
    b->grad = b->value + b->count;
    b->moment1 = b->grad + b->count;
    b->moment2 = b->moment1 + b->count;
}

// One optimiser step over all tensors; o.weight_decay for those that take it.
EX_FUNC void nn_bank_step(nn_bank *b, moe_optimizer_args o) {
    float decay = o.weight_decay;
    for (size_t i = 0; i < b->n_tensors; i++) {
        size_t at = b->tensor[i].at;
        if (b->tensor[i].decay == NN_ELSEWHERE) continue;
        o.weight_decay = b->tensor[i].decay ? decay : MOE_OFF;
        nn_must(
            moe_optimizer_step(&o, b->tensor[i].count, b->value + at, b->grad + at, b->moment1 + at, b->moment2 + at));
    }
}

// ---- convolution ----

// x (n, h, w, c), weight (size, size, c, filters), y (n, out_h, out_w, filters); zeros around the image.
typedef struct nn_conv {
    size_t n, h, w, c, size, stride, pad, filters;
} nn_conv;

EX_FUNC size_t nn_conv_out(const nn_conv *v, size_t extent) { return (extent + 2 * v->pad - v->size) / v->stride + 1; }
EX_FUNC size_t nn_conv_weights(const nn_conv *v) { return v->size * v->size * v->c * v->filters; }

// The matrix of patches: row = pixel (n, y, x) of a grid of h x w, column = (ky, kx, channel) of a source image.
// Source row of grid row y and tap ky: (y * step + direction * ky + offset) / divide, where that is a whole number
// inside the image; else the element is 0. The same for columns.
typedef struct nn_patches {
    const float *source;
    size_t h, w;                  // grid
    size_t source_h, source_w, c; // source image
    size_t size, step, divide;
    ptrdiff_t direction, offset;
} nn_patches;

// Which source row or column a tap reads, or SIZE_MAX.
EX_FUNC size_t nn_patch_index(const nn_patches *p, size_t grid, size_t tap, size_t extent) {
    ptrdiff_t t = (ptrdiff_t)(grid * p->step) + p->direction * (ptrdiff_t)tap + p->offset;
    if (t < 0) return SIZE_MAX;
    size_t u = (size_t)t;
    if (p->divide > 1) {
        if (u % p->divide) return SIZE_MAX;
        u /= p->divide;
    }
    return u < extent ? u : SIZE_MAX;
}

// The a_fill of moe_gemm: rows x cols elements from (row, col), 32 floats a row.
EX_FUNC void nn_patches_fill(void *user, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    const nn_patches *p = user;
    for (size_t done = 0, run; done < cols; done += run) { // one run = channels of one tap
        size_t tap = (col + done) / p->c, channel = (col + done) % p->c;
        size_t ky = tap / p->size, kx = tap % p->size;
        run = p->c - channel < cols - done ? p->c - channel : cols - done;
        size_t x = row % p->w, y = row / p->w % p->h, image = row / p->w / p->h;
        float *out = dst + done;
        for (size_t r = 0; r < rows;) { // one line of the grid, or what is asked of it
            size_t end = r + (p->w - x) < rows ? r + (p->w - x) : rows;
            size_t sy = nn_patch_index(p, y, ky, p->source_h);
            const float *line =
                p->source + (image * p->source_h + (sy == SIZE_MAX ? 0 : sy)) * p->source_w * p->c + channel;
            for (; r < end; r++, x++, out += 32) {
                size_t sx = sy == SIZE_MAX ? SIZE_MAX : nn_patch_index(p, x, kx, p->source_w);
                if (sx == SIZE_MAX)
                    memset(out, 0, run * sizeof(float));
                else if (run == 32)
                    memcpy(out, line + sx * p->c, 32 * sizeof(float)); // a constant size is inlined
                else
                    memcpy(out, line + sx * p->c, run * sizeof(float));
            }
            x = 0;
            if (++y == p->h) y = 0, image++;
        }
    }
}

// The patches of x that the convolution reads, and those of dy that its data gradient reads.
EX_FUNC nn_patches nn_conv_patches(const nn_conv *v, const float *x) {
    return (nn_patches){.source = x,
                        .h = nn_conv_out(v, v->h),
                        .w = nn_conv_out(v, v->w),
                        .source_h = v->h,
                        .source_w = v->w,
                        .c = v->c,
                        .size = v->size,
                        .step = v->stride,
                        .divide = 1,
                        .direction = 1,
                        .offset = -(ptrdiff_t)v->pad};
}
EX_FUNC nn_patches nn_conv_back_patches(const nn_conv *v, const float *dy) {
    return (nn_patches){.source = dy,
                        .h = v->h,
                        .w = v->w,
                        .source_h = nn_conv_out(v, v->h),
                        .source_w = nn_conv_out(v, v->w),
                        .c = v->filters,
                        .size = v->size,
                        .step = 1,
                        .divide = v->stride,
                        .direction = -1,
                        .offset = (ptrdiff_t)v->pad};
}

// c (m, n) = op(patches) b (k, n), or += it
EX_FUNC void nn_patches_product(nn *s, nn_patches *p, int transpose, size_t m, size_t n, size_t k, const float *b,
                                int accumulate, float *c) {
    moe_gemm_args g = {0};
    g.m = m, g.n = n, g.k = k;
    g.a_fill = nn_patches_fill;
    g.a_user = p;
    g.ta = transpose;
    g.b = b;
    g.c = c;
    g.accumulate = accumulate;
    g.parallel = &s->parallel;
    nn_must(moe_gemm(&g));
}

// y = patches(x) weight
EX_FUNC void nn_conv_forward(nn *s, const nn_conv *v, const float *x, const float *weight, float *y) {
    nn_patches p = nn_conv_patches(v, x);
    nn_patches_product(s, &p, 0, v->n * p.h * p.w, v->filters, v->size * v->size * v->c, weight, 0, y);
}

// dweight = patches(x)^T dy
EX_FUNC void nn_conv_backward_weight(nn *s, const nn_conv *v, const float *x, const float *dy, float *dweight) {
    nn_patches p = nn_conv_patches(v, x);
    nn_patches_product(s, &p, 1, v->size * v->size * v->c, v->filters, v->n * p.h * p.w, dy, 0, dweight);
}

// dx = (or +=) patches(dy) weight', weight' (size, size, filters, c) the weight with its last two axes exchanged
EX_FUNC void nn_conv_backward_data(nn *s, const nn_conv *v, const float *dy, const float *weight, int accumulate,
                                   float *dx) {
    size_t taps = v->size * v->size;
    float *exchanged = nn_scratch(s, nn_conv_weights(v));
    for (size_t t = 0; t < taps; t++) {
        const float *from = weight + t * v->c * v->filters;
        float *to = exchanged + t * v->c * v->filters;
        for (size_t f = 0; f < v->filters; f++)
            for (size_t c = 0; c < v->c; c++) to[f * v->c + c] = from[c * v->filters + f];
    }
    nn_patches p = nn_conv_back_patches(v, dy);
    nn_patches_product(s, &p, 0, v->n * v->h * v->w, v->c, taps * v->filters, exchanged, accumulate, dx);
}

// ---- whitening ----

// Eigenvalues and eigenvectors (rows of `vector`) of a symmetric matrix a (n, n), which is destroyed: its diagonal ends
// up as the eigenvalues. Cyclic Jacobi rotations.
EX_FUNC void nn_eigen(size_t n, double *a, double *vector) {
    for (size_t i = 0; i < n * n; i++) vector[i] = i % (n + 1) == 0;
    for (int sweep = 0; sweep < 30; sweep++)
        for (size_t p = 0; p < n; p++)
            for (size_t q = p + 1; q < n; q++) {
                if (fabs(a[p * n + q]) < 1e-300) continue;
                double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
                double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (size_t k = 0; k < n; k++) { // columns p and q
                    double x = a[k * n + p], y = a[k * n + q];
                    a[k * n + p] = c * x - s * y;
                    a[k * n + q] = s * x + c * y;
                }
                for (size_t k = 0; k < n; k++) { // rows p and q, and the vectors
                    double x = a[p * n + k], y = a[q * n + k], u = vector[p * n + k], v = vector[q * n + k];
                    a[p * n + k] = c * x - s * y;
                    a[q * n + k] = s * x + c * y;
                    vector[p * n + k] = c * u - s * v;
                    vector[q * n + k] = s * u + c * v;
                }
            }
}

// Fills the weight of a convolution with 2 * size * size * c filters so that its outputs on the images x (as v
// describes) are uncorrelated and of about the same size: the eigenvectors of the patches' covariance, each divided by
// the root of its eigenvalue, and the same with the other sign for the ReLU that follows (as in Jordan 2024, "94% on
// CIFAR-10 in 3.29 seconds" [K]).
EX_FUNC void nn_whiten(const nn_conv *v, const float *x, float *weight) {
    size_t n = v->size * v->size * v->c, rows = v->n * nn_conv_out(v, v->h) * nn_conv_out(v, v->w);
    double *a = allocate(2 * n * n, sizeof(double)), *vector = a + n * n;
    nn_patches p = nn_conv_patches(v, x);
    float *row = allocate(32 * ((n + 31) / 32), sizeof(float));
    if (v->filters != 2 * n) die("whitening needs %zu filters, not %zu", 2 * n, v->filters);
    for (size_t r = 0; r < rows; r++) {
        for (size_t k = 0; k < n; k += 32) nn_patches_fill(&p, r, 1, k, n - k < 32 ? n - k : 32, row + k);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++) a[i * n + j] += (double)row[i] * (double)row[j] / (double)rows;
    }
    nn_eigen(n, a, vector);
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < n; k++) {
            float w = (float)(vector[i * n + k] / sqrt(a[i * n + i] + 5e-4));
            weight[k * 2 * n + i] = w;
            weight[k * 2 * n + n + i] = -w;
        }
    free(a);
    free(row);
}

// ---- normalisation ----
// Batch normalisation: each of c channels is shifted and scaled to mean 0 and variance 1 over the rows of the batch,
// then to beta and gamma. In evaluation the mean and variance come from running averages instead.

#define NN_EPSILON 1e-5f

EX_FUNC void nn_moments_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end, c = j->c;
    (void)worker;
    nn_block(j, i, &begin, &end);
    float *restrict mean = j->sum1 + i * c, *restrict square = j->sum2 + i * c, scale = 1.0f / (float)(end - begin);
    const float *restrict origin = j->x + begin * c; // sums of differences from the first row stay small
    for (size_t k = 0; k < c; k++) mean[k] = square[k] = 0;
    for (size_t r = begin; r < end; r++) {
        const float *restrict x = j->x + r * c;
        for (size_t k = 0; k < c; k++) mean[k] += x[k] - origin[k];
    }
    for (size_t k = 0; k < c; k++) mean[k] = origin[k] + mean[k] * scale;
    for (size_t r = begin; r < end; r++) {
        const float *restrict x = j->x + r * c;
        for (size_t k = 0; k < c; k++) square[k] += (x[k] - mean[k]) * (x[k] - mean[k]);
    }
}

// mean (c) and variance (c) of x (rows, c). Blocks are merged as in Chan, Golub, LeVeque 1979 [K].
EX_FUNC void nn_moments(nn *s, size_t rows, size_t c, const float *x, float *mean, float *variance) {
    size_t blocks = nn_blocks(rows, c), per_block = nn_block_rows(c);
    nn_job j = {.rows = rows, .c = c, .x = x};
    j.sum1 = nn_scratch(s, 2 * blocks * c);
    j.sum2 = j.sum1 + blocks * c;
    nn_run(s, &j, nn_moments_task);
    for (size_t k = 0; k < c; k++) {
        double n = 0, m = 0, q = 0;
        for (size_t i = 0; i < blocks; i++) {
            double nb = (double)(i + 1 < blocks ? per_block : rows - i * per_block), delta = j.sum1[i * c + k] - m;
            m += delta * nb / (n + nb);
            q += j.sum2[i * c + k] + delta * delta * n * nb / (n + nb);
            n += nb;
        }
        mean[k] = (float)m;
        variance[k] = (float)(q / n);
    }
}

// Running averages for evaluation: running = keep * running + (1 - keep) * batch.
EX_FUNC void nn_track(size_t c, float keep, const float *batch, float *running) {
    for (size_t k = 0; k < c; k++) running[k] += (1 - keep) * (batch[k] - running[k]);
}

// The whole normalisation of a channel as x * a + b.
EX_FUNC void nn_norm_affine(size_t c, const float *mean, const float *variance, const float *gamma, const float *beta,
                            float *a, float *b) {
    for (size_t k = 0; k < c; k++) {
        a[k] = gamma[k] / sqrtf(variance[k] + NN_EPSILON);
        b[k] = beta[k] - mean[k] * a[k];
    }
}

EX_FUNC void nn_norm_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end, c = j->c;
    (void)worker;
    nn_block(j, i, &begin, &end);
    const float *restrict a = j->a, *restrict b = j->b;
    for (size_t r = begin; r < end; r++) {
        const float *x = j->x + r * c, *add = j->y ? j->y + r * c : NULL;
        float *out = j->out + r * c;
        if (j->relu && add)
            for (size_t k = 0; k < c; k++) {
                float z = x[k] * a[k] + b[k];
                out[k] = (z > 0 ? z : 0) + add[k];
            }
        else if (j->relu)
            for (size_t k = 0; k < c; k++) {
                float z = x[k] * a[k] + b[k];
                out[k] = z > 0 ? z : 0;
            }
        else
            for (size_t k = 0; k < c; k++) out[k] = x[k] * a[k] + b[k] + (add ? add[k] : 0);
    }
}

// y = act(gamma * (x - mean) / sqrt(variance + epsilon) + beta) + add, all (rows, c); act is ReLU or nothing; add (a
// residual connection) may be NULL. y may be x or add.
EX_FUNC void nn_norm_forward(nn *s, size_t rows, size_t c, int relu, const float *x, const float *mean,
                             const float *variance, const float *gamma, const float *beta, const float *add, float *y) {
    float *a = nn_scratch(s, 2 * c), *b = a + c;
    nn_norm_affine(c, mean, variance, gamma, beta, a, b);
    nn_job j = {.rows = rows, .c = c, .x = x, .y = add, .a = a, .b = b, .out = y, .relu = relu};
    nn_run(s, &j, nn_norm_task);
}

// The gradient behind a ReLU; where there is none, `floor` is minus infinity.
EX_FUNC float nn_through(float z, float floor, float dy) { return z > floor ? dy : 0; }

// One row's part of the sums: s1 += g, s2 += g * (x - mean), g the gradient behind the ReLU.
EX_FUNC void nn_norm_sums_row(size_t c, float floor, const float *x, const float *dy, const float *a, const float *b,
                              const float *mean, float *restrict s1, float *restrict s2) {
    for (size_t k = 0; k < c; k++) {
        float g = nn_through(x[k] * a[k] + b[k], floor, dy[k]);
        s1[k] += g;
        s2[k] += g * (x[k] - mean[k]);
    }
}

EX_FUNC void nn_norm_sums_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end, c = j->c;
    (void)worker;
    nn_block(j, i, &begin, &end);
    float *s1 = j->sum1 + i * c, *s2 = j->sum2 + i * c;
    for (size_t k = 0; k < c; k++) s1[k] = s2[k] = 0;
    for (size_t r = begin; r < end; r++)
        nn_norm_sums_row(c, j->floor, j->x + r * c, j->dy + r * c, j->a, j->b, j->mean, s1, s2);
}

EX_FUNC void nn_norm_gradient_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end, c = j->c;
    float floor = j->floor;
    (void)worker;
    nn_block(j, i, &begin, &end);
    const float *restrict a = j->a, *restrict b = j->b, *restrict mean = j->mean, *restrict k1 = j->k1,
                          *restrict k2 = j->k2;
    for (size_t r = begin; r < end; r++) {
        const float *x = j->x + r * c, *dy = j->dy + r * c;
        float *dx = j->out + r * c;
        for (size_t k = 0; k < c; k++)
            dx[k] = a[k] * (nn_through(x[k] * a[k] + b[k], floor, dy[k]) - k1[k] - (x[k] - mean[k]) * k2[k]);
    }
}

// Gradients of nn_norm_forward with the batch's own moments, which depend on x too. dx may be dy (or x). The gradient
// by `add` is dy itself.
EX_FUNC void nn_norm_backward(nn *s, size_t rows, size_t c, int relu, const float *x, const float *mean,
                              const float *variance, const float *gamma, const float *beta, const float *dy, float *dx,
                              float *dgamma, float *dbeta) {
    size_t blocks = nn_blocks(rows, c);
    float *a = nn_scratch(s, 4 * c + 2 * blocks * c), *b = a + c, *k1 = b + c, *k2 = k1 + c;
    nn_norm_affine(c, mean, variance, gamma, beta, a, b);
    nn_job j = {.rows = rows,
                .c = c,
                .x = x,
                .dy = dy,
                .a = a,
                .b = b,
                .mean = mean,
                .k1 = k1,
                .k2 = k2,
                .out = dx,
                .floor = relu ? 0 : -INFINITY};
    j.sum1 = k2 + c;
    j.sum2 = j.sum1 + blocks * c;
    nn_run(s, &j, nn_norm_sums_task);
    for (size_t k = 0; k < c; k++) {
        double s1 = 0, s2 = 0, inverse = 1.0 / sqrt((double)variance[k] + NN_EPSILON);
        for (size_t i = 0; i < blocks; i++) {
            s1 += j.sum1[i * c + k];
            s2 += j.sum2[i * c + k];
        }
        dbeta[k] = (float)s1;
        dgamma[k] = (float)(s2 * inverse);
        k1[k] = (float)(s1 / (double)rows);
        k2[k] = (float)(s2 * inverse * inverse / (double)rows);
    }
    nn_run(s, &j, nn_norm_gradient_task);
}

// The same with its own parameters in a bank and its running averages: nn_norm_declare, nn_bank_alloc, nn_norm_alloc.
typedef struct nn_norm {
    size_t c, gamma, beta;                                    // offsets in the bank
    float keep;                                               // of the running averages, e.g. 0.9 ...
    size_t seen;                                              // ... after a plain average over the first batches
    float *mean, *variance, *running_mean, *running_variance; // (c) each
} nn_norm;

EX_FUNC void nn_norm_declare(nn_norm *m, nn_bank *bank, size_t c, float keep) {
    m->c = c;
    m->gamma = nn_add(bank, c, 0);
    m->beta = nn_add(bank, c, 0);
    m->keep = keep;
}

EX_FUNC void nn_norm_alloc(nn *s, nn_norm *m, nn_bank *bank) {
    m->mean = nn_floats(s, 4 * m->c);
    m->variance = m->mean + m->c;
    m->running_mean = m->variance + m->c;
    m->running_variance = m->running_mean + m->c;
    for (size_t k = 0; k < m->c; k++) bank->value[m->gamma + k] = m->running_variance[k] = 1;
}

// training: normalise with the batch's moments and remember them; else with the running averages.
EX_FUNC void nn_norm_apply(nn *s, nn_norm *m, const nn_bank *bank, int training, size_t rows, int relu, const float *x,
                           const float *add, float *y) {
    if (training) {
        nn_moments(s, rows, m->c, x, m->mean, m->variance);
        float plain = (float)m->seen / (float)(m->seen + 1), keep = plain < m->keep ? plain : m->keep;
        m->seen++;
        nn_track(m->c, keep, m->mean, m->running_mean);
        nn_track(m->c, keep, m->variance, m->running_variance);
    }
    nn_norm_forward(s, rows, m->c, relu, x, training ? m->mean : m->running_mean,
                    training ? m->variance : m->running_variance, bank->value + m->gamma, bank->value + m->beta, add,
                    y);
}

EX_FUNC void nn_norm_gradient(nn *s, const nn_norm *m, nn_bank *bank, size_t rows, int relu, const float *x,
                              const float *dy, float *dx) {
    nn_norm_backward(s, rows, m->c, relu, x, m->mean, m->variance, bank->value + m->gamma, bank->value + m->beta, dy,
                     dx, bank->grad + m->gamma, bank->grad + m->beta);
}

// ---- activations ----

// Runs an activation's task over n floats: forward if dy is NULL, else backward.
EX_FUNC void nn_each(nn *s, moe_task *task, size_t n, const float *x, const float *dy, float *out) {
    nn_job j = {.rows = n, .c = 1, .x = x, .dy = dy, .out = out};
    nn_run(s, &j, task);
}

EX_FUNC void nn_relu_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end;
    (void)worker;
    nn_block(j, i, &begin, &end);
    const float *x = j->x, *dy = j->dy;
    float *out = j->out;
    if (!dy)
        for (size_t k = begin; k < end; k++) out[k] = x[k] > 0 ? x[k] : 0;
    else
        for (size_t k = begin; k < end; k++) out[k] = nn_through(x[k], 0, dy[k]);
}

// y = max(x, 0), n floats; y may be x.
EX_FUNC void nn_relu_forward(nn *s, size_t n, const float *x, float *y) { nn_each(s, nn_relu_task, n, x, NULL, y); }
// x may be the input or the output of the forward: both have the same sign. dx may be dy.
EX_FUNC void nn_relu_backward(nn *s, size_t n, const float *x, const float *dy, float *dx) {
    nn_each(s, nn_relu_task, n, x, dy, dx);
}

EX_FUNC void nn_gelu_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end;
    float phi[256], slope[256];
    (void)worker;
    nn_block(j, i, &begin, &end);
    for (size_t n; begin < end; begin += n) {
        const float *x = j->x + begin;
        n = end - begin < 256 ? end - begin : 256;
        for (size_t k = 0; k < n; k++) phi[k] = x[k] * 0.70710678f;
        nn_must(moe_erf(n, phi, phi));
        for (size_t k = 0; k < n; k++) phi[k] = 0.5f + 0.5f * phi[k];
        float *out = j->out + begin;
        if (!j->dy) {
            for (size_t k = 0; k < n; k++) out[k] = x[k] * phi[k];
        } else {
            const float *dy = j->dy + begin;
            for (size_t k = 0; k < n; k++) slope[k] = -0.5f * x[k] * x[k];
            nn_must(moe_exp(n, slope, slope));
            for (size_t k = 0; k < n; k++) out[k] = dy[k] * (phi[k] + x[k] * 0.39894228f * slope[k]);
        }
    }
}

// y = x * Phi(x), the exact GELU, n floats; y may be x.
EX_FUNC void nn_gelu_forward(nn *s, size_t n, const float *x, float *y) { nn_each(s, nn_gelu_task, n, x, NULL, y); }
// x is the input of the forward; dx may be dy.
EX_FUNC void nn_gelu_backward(nn *s, size_t n, const float *x, const float *dy, float *dx) {
    nn_each(s, nn_gelu_task, n, x, dy, dx);
}

EX_FUNC void nn_add_task(void *arg, size_t i, size_t worker) {
    nn_job *j = arg;
    size_t begin, end;
    (void)worker;
    nn_block(j, i, &begin, &end);
    for (size_t k = begin; k < end; k++) j->out[k] += j->x[k];
}
// y += x, n floats each.
EX_FUNC void nn_add_to(nn *s, size_t n, const float *x, float *y) { nn_each(s, nn_add_task, n, x, NULL, y); }

// y = act(normalisation(x)) + add, all (rows, c), add may be NULL: ReLU in one pass, or GELU where `given` (rows, c) is
// not NULL, which keeps what it was given for the gradient.
EX_FUNC void nn_norm_act(nn *s, nn_norm *m, const nn_bank *bank, int training, size_t rows, const float *x,
                         const float *add, float *given, float *y) {
    nn_norm_apply(s, m, bank, training, rows, !given, x, given ? NULL : add, given ? given : y);
    if (!given) return;
    nn_gelu_forward(s, rows * m->c, given, y);
    if (add) nn_add_to(s, rows * m->c, add, y);
}
// dy -> dx, which may be dy; the gradient by `add` is dy itself.
EX_FUNC void nn_norm_act_gradient(nn *s, const nn_norm *m, nn_bank *bank, size_t rows, const float *x,
                                  const float *given, const float *dy, float *dx) {
    if (given) nn_gelu_backward(s, rows * m->c, given, dy, dx);
    nn_norm_gradient(s, m, bank, rows, !given, x, given ? dx : dy, dx);
}

// ---- pooling ----

// Windows of size x size side by side; what is left over at the right and at the bottom is not used.
typedef struct nn_pool {
    size_t n, h, w, c, size;
    int mean; // else the maximum
} nn_pool;

typedef struct nn_pool_job {
    const nn_pool *pool;
    const float *x, *y, *dy;
    float *out;
} nn_pool_job;

EX_FUNC void nn_pool_forward_task(void *arg, size_t image, size_t worker) {
    const nn_pool_job *j = arg;
    const nn_pool *p = j->pool;
    size_t oh = p->h / p->size, ow = p->w / p->size, c = p->c;
    float scale = 1.0f / (float)(p->size * p->size);
    (void)worker;
    for (size_t o = 0; o < oh * ow; o++) {
        float *restrict y = j->out + (image * oh * ow + o) * c;
        const float *window = j->x + ((image * p->h + o / ow * p->size) * p->w + o % ow * p->size) * c;
        memcpy(y, window, c * sizeof(float));
        for (size_t t = 1; t < p->size * p->size; t++) {
            const float *restrict x = window + (t / p->size * p->w + t % p->size) * c;
            if (p->mean)
                for (size_t k = 0; k < c; k++) y[k] += x[k];
            else
                for (size_t k = 0; k < c; k++) y[k] = x[k] > y[k] ? x[k] : y[k];
        }
        if (p->mean)
            for (size_t k = 0; k < c; k++) y[k] *= scale;
    }
}

// x (n, h, w, c) -> y (n, h / size, w / size, c)
EX_FUNC void nn_pool_forward(nn *s, const nn_pool *p, const float *x, float *y) {
    nn_pool_job j = {p, x, NULL, NULL, y};
    moe_run(&s->parallel, p->n, nn_pool_forward_task, &j);
}

EX_FUNC void nn_pool_backward_task(void *arg, size_t image, size_t worker) {
    const nn_pool_job *j = arg;
    const nn_pool *p = j->pool;
    size_t oh = p->h / p->size, ow = p->w / p->size, c = p->c;
    float scale = 1.0f / (float)(p->size * p->size), left[64];
    (void)worker;
    for (size_t row = 0; row < p->h; row++) // pixels outside every window
        for (size_t col = row < oh * p->size ? ow * p->size : 0; col < p->w; col++)
            memset(j->out + ((image * p->h + row) * p->w + col) * c, 0, c * sizeof(float));
    for (size_t o = 0; o < oh * ow; o++) {
        size_t out = (image * oh * ow + o) * c;
        size_t corner = ((image * p->h + o / ow * p->size) * p->w + o % ow * p->size) * c;
        for (size_t first = 0, n; first < c; first += n) {
            n = c - first < 64 ? c - first : 64;
            const float *dy = j->dy + out + first;
            for (size_t k = 0; k < n; k++) left[k] = p->mean ? dy[k] * scale : dy[k];
            for (size_t t = 0; t < p->size * p->size; t++) {
                size_t at = corner + (t / p->size * p->w + t % p->size) * c + first;
                float *dx = j->out + at;
                if (p->mean) {
                    memcpy(dx, left, n * sizeof(float));
                } else { // the first pixel that has the maximum gets the gradient
                    const float *x = j->x + at, *y = j->y + out + first;
                    for (size_t k = 0; k < n; k++) {
                        float give = x[k] == y[k] ? left[k] : 0;
                        left[k] = x[k] == y[k] ? 0 : left[k];
                        dx[k] = give;
                    }
                }
            }
        }
    }
}

// x and y as in the forward (used by the maximum only); dx may be x.
EX_FUNC void nn_pool_backward(nn *s, const nn_pool *p, const float *x, const float *y, const float *dy, float *dx) {
    nn_pool_job j = {p, x, y, dy, dx};
    moe_run(&s->parallel, p->n, nn_pool_backward_task, &j);
}

// ---- linear layer ----

// y (rows, out) = x (rows, in) weight (in, out) + bias (out); bias may be NULL
EX_FUNC void nn_linear_forward(nn *s, size_t rows, size_t in, size_t out, const float *x, const float *weight,
                               const float *bias, float *y) {
    moe_gemm_args g = {0};
    g.m = rows;
    g.n = out;
    g.k = in;
    g.a = x;
    g.b = weight;
    g.c = y;
    g.parallel = &s->parallel;
    nn_must(moe_gemm(&g));
    for (size_t r = 0; bias && r < rows; r++)
        for (size_t k = 0; k < out; k++) y[r * out + k] += bias[k];
}

// dweight = x^T dy, dbias = sum of dy's rows (or NULL), dx = dy weight^T (or NULL)
EX_FUNC void nn_linear_backward(nn *s, size_t rows, size_t in, size_t out, const float *x, const float *weight,
                                const float *dy, float *dx, float *dweight, float *dbias) {
    moe_gemm_args g = {0};
    g.m = in;
    g.n = out;
    g.k = rows;
    g.a = x;
    g.ta = 1;
    g.b = dy;
    g.c = dweight;
    g.parallel = &s->parallel;
    nn_must(moe_gemm(&g));
    if (dbias) {
        for (size_t k = 0; k < out; k++) dbias[k] = 0;
        for (size_t r = 0; r < rows; r++)
            for (size_t k = 0; k < out; k++) dbias[k] += dy[r * out + k];
    }
    if (!dx) return;
    g = (moe_gemm_args){0};
    g.m = rows;
    g.n = in;
    g.k = out;
    g.a = dy;
    g.b = weight;
    g.tb = 1;
    g.c = dx;
    g.parallel = &s->parallel;
    nn_must(moe_gemm(&g));
}

// ---- loss ----

// Sum over the rows of the cross-entropy between softmax(logits (rows, classes)) and the targets: 1 - smoothing on the
// label plus smoothing / classes everywhere (label smoothing, as in Szegedy et al. 2016 [K]). The gradient of the MEAN
// goes to dlogits, unless NULL. prob (rows, classes) receives the softmax.
EX_FUNC double nn_cross_entropy(nn *s, size_t rows, size_t classes, float smoothing, const float *logits,
                                const unsigned char *label, float *prob, float *dlogits) {
    float *logp = nn_scratch(s, classes), even = smoothing / (float)classes, scale = 1.0f / (float)rows;
    double loss = 0;
    nn_must(moe_softmax(rows, classes, 1, logits, prob));
    for (size_t r = 0; r < rows; r++) {
        const float *p = prob + r * classes;
        for (size_t k = 0; k < classes; k++) logp[k] = p[k] > 1e-30f ? p[k] : 1e-30f;
        nn_must(moe_log(classes, logp, logp));
        for (size_t k = 0; k < classes; k++) {
            float target = even + (k == label[r] ? 1 - smoothing : 0);
            loss -= (double)target * (double)logp[k];
            if (dlogits) dlogits[r * classes + k] = (p[k] - target) * scale;
        }
    }
    return loss;
}

// How many rows of logits (rows, classes) are highest at their label.
EX_FUNC size_t nn_count_right(size_t rows, size_t classes, const float *logits, const unsigned char *label) {
    size_t right = 0;
    for (size_t r = 0; r < rows; r++) {
        const float *z = logits + r * classes;
        size_t best = 0;
        for (size_t k = 1; k < classes; k++)
            if (z[k] > z[best]) best = k;
        right += best == label[r];
    }
    return right;
}

// ---- the machine ----

// Makes moe.h use the instruction set of this name ("auto", "scalar", ...). 0: there is none of this name.
EX_FUNC int nn_use_isa(const char *name) {
    size_t i = 0;
    while (moe_isa_name((moe_isa_kind)i) && strcmp(moe_isa_name((moe_isa_kind)i), name) != 0) i++;
    if (!moe_isa_name((moe_isa_kind)i)) return 0;
    nn_must(moe_force_isa((moe_isa_kind)i));
    return 1;
}
EX_FUNC const char *nn_isa_name(void *unused, size_t i) {
    (void)unused;
    return moe_isa_name((moe_isa_kind)i);
}
EX_FUNC void nn_isa(const char *program, const char *name) { // --isa
    if (!nn_use_isa(name)) args_unknown(program, "isa", name, nn_isa_name, NULL);
}

#endif

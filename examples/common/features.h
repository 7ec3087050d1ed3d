// features.h - images as sequences of tokens, by a frozen extractor that is fitted once and without labels, so that a
// small trainable network on top of it learns in a second.
//
//     features *f = features_fit(&ops, &data.train, seed);
//     tokens train = features_make(&ops, f, &data.train, 0, NULL, 0);     // x (images, 16, 64)
//
// After Coates, Lee, Ng 2011 and Coates, Ng 2012 [K]: patches of 5 x 5 pixels, their contrast normalised, whitened, and
// compared with 64 filters that k-means found among such patches; what is above a threshold, for either sign, is
// averaged over each of 4 x 4 cells of the image. A cell is a token: the roots of its 128 averages, projected on their
// 64 main directions, plus a fixed random vector for the cell's position. Its id is the nearest of 64 prototypes of
// such tokens (before the position is added), a "visual word": what a word's number is to a text.
#ifndef EX_FEATURES_H
#define EX_FEATURES_H

#include "cifar.h"
#include "nn.h"
#include "progress.h"

enum {
    FEATURES_PATCH = 5,
    FEATURES_PIXELS = FEATURES_PATCH * FEATURES_PATCH * 3,
    FEATURES_SIDE = CIFAR_SIDE - FEATURES_PATCH + 1, // positions of a patch
    FEATURES_FILTERS = 64,
    FEATURES_RAW = 2 * FEATURES_FILTERS, // both signs
    FEATURES_GRID = 4,
    FEATURES_TOKENS = FEATURES_GRID * FEATURES_GRID,
    FEATURES_WIDTH = 64,
    FEATURES_WORDS = 64,
    FEATURES_CHUNK = 32 // images at a time
};

// The fitted extractor.
typedef struct features {
    float filter[FEATURES_PIXELS * FEATURES_FILTERS], bias[FEATURES_FILTERS]; // whitening included
    float mean[FEATURES_RAW], project[FEATURES_RAW * FEATURES_WIDTH];
    float prototype[FEATURES_WORDS / 2 * FEATURES_WIDTH];
    float position[FEATURES_TOKENS * FEATURES_WIDTH];
    float *image, *patch, *response; // of a chunk, at work
} features;

typedef struct tokens {
    size_t count;         // images
    float *x;             // (count, FEATURES_TOKENS, FEATURES_WIDTH)
    uint32_t *id;         // (count, FEATURES_TOKENS): below FEATURES_WORDS
    unsigned char *label; // (count)
} tokens;

EX_FUNC void features_free(features *f) {
    free(f->image);
    free(f);
}

EX_FUNC void tokens_free(tokens *t) {
    free(t->x);
    free(t->id);
    free(t->label);
    memset(t, 0, sizeof *t);
}

// c (m, n) = a (m, k) b (n, k)^T
EX_FUNC void features_compare(nn *s, size_t m, size_t n, size_t k, const float *a, const float *b, float *c) {
    moe_gemm_args g = {.m = m, .n = n, .k = k, .a = a, .b = b, .tb = 1, .c = c, .parallel = &s->parallel};
    nn_must(moe_gemm(&g));
}

EX_FUNC void features_unit(float *x, size_t n) {
    float sum = 0;
    for (size_t k = 0; k < n; k++) sum += x[k] * x[k];
    float scale = sum > 0 ? 1 / sqrtf(sum) : 0;
    for (size_t k = 0; k < n; k++) x[k] *= scale;
}

// Which of n similarities is the largest, whatever its sign.
EX_FUNC size_t features_nearest(const float *similarity, size_t n) {
    size_t best = 0;
    for (size_t k = 1; k < n; k++)
        if (fabsf(similarity[k]) > fabsf(similarity[best])) best = k;
    return best;
}

// k centres of unit length for the rows of x (rows, d), where x and -x are the same (gain shape quantisation, as in
// Coates, Ng 2012 [K]): a few rounds from k of the rows.
EX_FUNC void features_cluster(nn *s, size_t rows, size_t d, size_t k, const float *x, float *centre) {
    float *similarity = allocate(rows * k, sizeof(float));
    for (size_t i = 0; i < k; i++) {
        memcpy(centre + i * d, x + rows / k * i * d, d * sizeof(float));
        features_unit(centre + i * d, d);
    }
    for (int round = 0; round < 5; round++) {
        features_compare(s, rows, k, d, x, centre, similarity);
        memset(centre, 0, k * d * sizeof(float));
        for (size_t r = 0; r < rows; r++) {
            size_t best = features_nearest(similarity + r * k, k);
            float weight = similarity[r * k + best];
            for (size_t i = 0; i < d; i++) centre[best * d + i] += weight * x[r * d + i];
        }
        for (size_t i = 0; i < k; i++) features_unit(centre + i * d, d);
    }
    free(similarity);
}

// Means of the columns of x (rows, n), which are subtracted; then the eigenvalues `value` (n) and eigenvectors (rows of
// `vector` (n, n)) of the covariance.
EX_FUNC void features_spectrum(nn *s, size_t rows, size_t n, float *x, float *mean, double *value, double *vector) {
    float *square = allocate(n * n, sizeof(float));
    double *a = allocate(n * n, sizeof(double));
    for (size_t k = 0; k < n; k++) {
        double sum = 0;
        for (size_t r = 0; r < rows; r++) sum += (double)x[r * n + k];
        mean[k] = (float)(sum / (double)rows);
        for (size_t r = 0; r < rows; r++) x[r * n + k] -= mean[k];
    }
    nn_linear_backward(s, rows, n, n, x, NULL, x, NULL, square, NULL); // x^T x
    for (size_t i = 0; i < n * n; i++) a[i] = (double)square[i] / (double)rows;
    nn_eigen(n, a, vector);
    for (size_t i = 0; i < n; i++) value[i] = a[i * n + i];
    free(square);
    free(a);
}

// The patch at (row, col) of an image, its mean 0 and its variance 1, or less where there is little contrast.
EX_FUNC void features_patch(const float *image, size_t row, size_t col, float *patch) {
    enum { LINE = 3 * FEATURES_PATCH, N = FEATURES_PIXELS };
    float mean = 0, square = 0;
    for (size_t r = 0; r < FEATURES_PATCH; r++)
        memcpy(patch + r * LINE, image + ((row + r) * CIFAR_SIDE + col) * 3, LINE * sizeof(float));
    for (size_t k = 0; k < N; k++) mean += patch[k] * (1.0f / N);
    for (size_t k = 0; k < N; k++) patch[k] -= mean, square += patch[k] * patch[k] * (1.0f / N);
    float scale = 1 / sqrtf(square + 0.01f);
    for (size_t k = 0; k < N; k++) patch[k] *= scale;
}

// Whitening and filters, from random patches of the images x (n, 32, 32, 3).
EX_FUNC void features_fit_filters(nn *s, features *f, size_t n, const float *x, uint64_t seed) {
    enum { SAMPLES = 10000, N = FEATURES_PIXELS, K = FEATURES_FILTERS };
    float *patch = allocate(SAMPLES * N, sizeof(float)), *white = allocate(SAMPLES * N, sizeof(float));
    float *whitening = allocate(N * N, sizeof(float)), *centre = allocate(K * N, sizeof(float)), mean[N];
    double *value = allocate(N, sizeof(double)), *vector = allocate(N * N, sizeof(double));
    for (size_t i = 0; i < SAMPLES; i++) {
        uint32_t r[4];
        moe_philox(seed, i, 2000, r);
        features_patch(x + r[0] % n * 3 * CIFAR_PIXELS, r[1] % FEATURES_SIDE, r[2] % FEATURES_SIDE, patch + i * N);
    }
    features_spectrum(s, SAMPLES, N, patch, mean, value, vector);
    for (size_t i = 0; i < N; i++) {
        double scale = 1 / sqrt(value[i] + 0.1);
        for (size_t a = 0; a < N; a++)
            for (size_t b = 0; b < N; b++)
                whitening[a * N + b] += (float)(scale * vector[i * N + a] * vector[i * N + b]);
    }
    nn_linear_forward(s, SAMPLES, N, N, patch, whitening, NULL, white);
    features_cluster(s, SAMPLES, N, K, white, centre);
    features_compare(s, N, K, N, whitening, centre, f->filter);
    for (size_t k = 0; k < K; k++) {
        f->bias[k] = 0;
        for (size_t i = 0; i < N; i++) f->bias[k] -= mean[i] * f->filter[i * K + k];
    }
    free(patch);
    free(white);
    free(whitening);
    free(centre);
    free(value);
    free(vector);
}

typedef struct features_job {
    const float *image, *response;
    float *patch, *raw;
} features_job;

EX_FUNC void features_patch_task(void *arg, size_t i, size_t worker) {
    const features_job *j = arg;
    enum { SIDE = FEATURES_SIDE };
    (void)worker;
    for (size_t o = 0; o < SIDE * SIDE; o++)
        features_patch(j->image + i * 3 * CIFAR_PIXELS, o / SIDE, o % SIDE,
                       j->patch + (i * SIDE * SIDE + o) * FEATURES_PIXELS);
}

EX_FUNC void features_pool_task(void *arg, size_t i, size_t worker) {
    const features_job *j = arg;
    enum { SIDE = FEATURES_SIDE, CELL = SIDE / FEATURES_GRID, K = FEATURES_FILTERS };
    const float threshold = 0.5f;
    (void)worker;
    for (size_t t = 0; t < FEATURES_TOKENS; t++) {
        float *restrict raw = j->raw + (i * FEATURES_TOKENS + t) * FEATURES_RAW;
        size_t top = t / FEATURES_GRID * CELL, left = t % FEATURES_GRID * CELL;
        memset(raw, 0, FEATURES_RAW * sizeof(float));
        for (size_t o = 0; o < CELL * CELL; o++) {
            const float *z = j->response + ((i * SIDE + top + o / CELL) * SIDE + left + o % CELL) * K;
            for (size_t k = 0; k < K; k++) raw[k] += z[k] > threshold ? z[k] - threshold : 0;
            for (size_t k = 0; k < K; k++) raw[K + k] += z[k] < -threshold ? -z[k] - threshold : 0;
        }
        for (size_t k = 0; k < FEATURES_RAW; k++) raw[k] = sqrtf(raw[k] * (1.0f / (CELL * CELL)));
    }
}

// Records first .. first + count - 1 of a set -> raw (count, tokens, FEATURES_RAW) and their labels; flip: mirrored.
EX_FUNC void features_raw(nn *s, const features *f, const cifar_set *set, size_t first, size_t count, int flip,
                          float *raw, unsigned char *label) {
    enum { SIDE = FEATURES_SIDE, CHUNK = FEATURES_CHUNK };
    for (size_t at = 0, n; at < count; at += n) {
        n = count - at < CHUNK ? count - at : CHUNK;
        cifar_batch b = {.set = set,
                         .first = first + at,
                         .count = n,
                         .flip = flip ? 2 : 0,
                         .x = f->image,
                         .label = label + at};
        cifar_batch_make(&b, &s->parallel);
        features_job j = {f->image, f->response, f->patch, raw + at * FEATURES_TOKENS * FEATURES_RAW};
        moe_run(&s->parallel, n, features_patch_task, &j);
        nn_linear_forward(s, n * SIDE * SIDE, FEATURES_PIXELS, FEATURES_FILTERS, f->patch, f->filter, f->bias,
                          f->response);
        moe_run(&s->parallel, n, features_pool_task, &j);
    }
}

// Fits everything to the first images of a set.
EX_FUNC features *features_fit(nn *s, const cifar_set *set, uint64_t seed) {
    enum { N = FEATURES_RAW, D = FEATURES_WIDTH, T = FEATURES_TOKENS, PIXELS = FEATURES_CHUNK * 3 * CIFAR_PIXELS };
    enum { POSITIONS = FEATURES_CHUNK * FEATURES_SIDE * FEATURES_SIDE };
    features *f = allocate(1, sizeof *f);
    f->image = allocate(PIXELS + POSITIONS * (FEATURES_PIXELS + FEATURES_FILTERS), sizeof(float));
    f->patch = f->image + PIXELS;
    f->response = f->patch + POSITIONS * FEATURES_PIXELS;
    size_t n = set->count < 1000 ? set->count : 1000, rows = n * T;
    float *image = allocate(n * 3 * CIFAR_PIXELS, sizeof(float)), *raw = allocate(rows * N, sizeof(float));
    float *x = allocate(rows * D, sizeof(float));
    unsigned char *label = allocate(n, 1);
    double *value = allocate(N, sizeof(double)), *vector = allocate(N * N, sizeof(double));
    cifar_batch b = {.set = set, .count = n, .x = image, .label = label};
    cifar_batch_make(&b, &s->parallel);
    features_fit_filters(s, f, n, image, seed);

    features_raw(s, f, set, 0, n, 0, raw, label);
    features_spectrum(s, rows, N, raw, f->mean, value, vector);
    // Half whitened: directions of large variance keep some of their weight. The whole has a variance of about 1.
    double sum = 0;
    size_t order[N];
    for (size_t i = 0; i < N; i++) {
        size_t k = i;
        for (; k && value[order[k - 1]] < value[i]; k--) order[k] = order[k - 1];
        order[k] = i;
    }
    for (size_t i = 0; i < D; i++) sum += sqrt(value[order[i]] > 0 ? value[order[i]] : 0);
    for (size_t i = 0; i < D; i++) {
        double v = value[order[i]] + 0.01 * value[order[0]], scale = v > 0 ? sqrt(D / (sum * sqrt(v))) : 0;
        for (size_t k = 0; k < N; k++) f->project[k * D + i] = (float)(scale * vector[order[i] * N + k]);
    }
    nn_linear_forward(s, rows, N, D, raw, f->project, NULL, x);
    features_cluster(s, rows, D, FEATURES_WORDS / 2, x, f->prototype);
    nn_must(moe_rand_normal(seed, 2001, T * D, 0, 1, f->position));
    free(image);
    free(raw);
    free(x);
    free(label);
    free(value);
    free(vector);
    return f;
}

// All images of a set; flip: mirrored. p (NULL: none) shows how far it is, counting from `before` images.
EX_FUNC tokens features_make(nn *s, const features *f, const cifar_set *set, int flip, progress *p, size_t before) {
    enum { N = FEATURES_RAW, D = FEATURES_WIDTH, T = FEATURES_TOKENS, CHUNK = FEATURES_CHUNK, K = FEATURES_WORDS / 2 };
    tokens t = {.count = set->count};
    t.x = allocate(t.count * T * D, sizeof(float));
    t.id = allocate(t.count * T, sizeof *t.id);
    t.label = allocate(t.count, 1);
    float *raw = allocate(CHUNK * T * N, sizeof(float)), *similarity = allocate(CHUNK * T * K, sizeof(float));
    for (size_t first = 0, n; first < t.count; first += n) {
        n = t.count - first < CHUNK ? t.count - first : CHUNK;
        float *x = t.x + first * T * D;
        features_raw(s, f, set, first, n, flip, raw, t.label + first);
        for (size_t i = 0; i < n * T * N; i++) raw[i] -= f->mean[i % N];
        nn_linear_forward(s, n * T, N, D, raw, f->project, NULL, x);
        features_compare(s, n * T, K, D, x, f->prototype, similarity);
        for (size_t i = 0; i < n * T; i++) { // two words a prototype: like it, and like its opposite
            size_t best = features_nearest(similarity + i * K, K);
            t.id[first * T + i] = (uint32_t)(2 * best + (similarity[i * K + best] < 0));
        }
        for (size_t i = 0; i < n * T * D; i++) x[i] += f->position[i % (T * D)];
        if (p) progress_update(p, before + first + n, "%s", "");
    }
    free(raw);
    free(similarity);
    return t;
}

#endif

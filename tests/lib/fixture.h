/* fixture.h - A layer beside the double oracle: the same parameters, tokens and gradients. Include test.h and
 * oracle.h first. */
#ifndef FIXTURE_H
#define FIXTURE_H

/* Errors of float against double, relative to the largest value of the array (what is exactly 0 in theory: to 1e-3). */
static inline double worst_error(const float *got, const double *want, size_t n) {
    double worst = 0, top = 1e-3;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - want[i]);
        top = fmax(top, fabs(want[i]));
        if (!(e <= worst)) worst = e; /* NaN stays */
    }
    return worst / top;
}

/* float sums of n terms err by about sqrt(n) roundings; 12 covers the steps around them */
static inline double limit_for(size_t n) { return (12 + 3 * sqrt((double)n)) * 0x1p-24; }

typedef struct fixture { moe_desc d; moe_layer *m; oracle *o; size_t T; float *x, *y, *dy, *dx; } fixture;

/* A layer with parameters large enough for every part to matter (biases too, which start at 0). */
static inline int fixture_new(fixture *F, const moe_desc *d, size_t T) {
    memset(F, 0, sizeof *F);
    if (!CHECK_OK(moe_desc_resolve(d, &F->d)) || !CHECK_OK(moe_layer_new(&F->m, d))) return 0; /* nothing to free */
    F->T = T;
    F->o = oracle_new(&F->d, T);
    size_t n = T * d->d_model;
    F->x = test_floats(n), F->y = test_floats(n), F->dy = test_floats(n), F->dx = test_floats(n);
    test_fill(F->x, n, -1.5f, 1.5f);
    test_fill(F->dy, n, -1, 1);
    for (int i = 0; i < ORACLE_PARTS; i++) {
        if (F->o->count[i] == 0) continue;
        float *p = test_floats(F->o->count[i]);
        float size = i >= ORACLE_B1 ? 0.5f : 1.5f / sqrtf((float)(i == ORACLE_W2 ? F->d.d_ff : F->d.d_model));
        test_fill(p, F->o->count[i], -size, size);
        CHECK_OK(moe_layer_set(F->m, MOE_PART_PARAMS, oracle_names[i], p, F->o->count[i]));
        free(p);
    }
    oracle_read(F->o, F->m);
    for (size_t i = 0; i < n; i++) F->o->x[i] = F->x[i], F->o->dy[i] = F->dy[i];
    return 1;
}

static inline void fixture_free(fixture *F) {
    if (F->m) moe_layer_free(F->m);
    if (F->o) oracle_free(F->o);
    free(F->x), free(F->y), free(F->dy), free(F->dx);
}

static inline moe_desc desc_of(size_t d_model, size_t d_ff, size_t E, size_t k) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = d_model, d.d_ff = d_ff, d.n_experts = E, d.top_k = k;
    return d;
}

/* ---- gradients of two micro-batches ---- */
static inline float *grads_of(const moe_layer *m, const size_t count[ORACLE_PARTS], size_t *n) {
    *n = 0;
    for (int i = 0; i < ORACLE_PARTS; i++) *n += count[i];
    float *g = test_floats(*n), *at = g;
    for (int i = 0; i < ORACLE_PARTS; at += count[i++])
        if (count[i]) CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, oracle_names[i], at, count[i]));
    return g;
}

#endif

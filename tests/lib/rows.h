/* rows.h - What the tests of systems share: a layer of a row of the table, its tensors, tokens, one forward. Include
 * test.h first. */
#ifndef ROWS_H
#define ROWS_H

enum { D = 16, F = 6, E = 8, SEQ = 4, MAX_TOKENS = 4096 };
static float x[MAX_TOKENS * D], y[MAX_TOKENS * D], dy[MAX_TOKENS * D];

/* ---- helpers ---- */
static inline moe_desc row_desc(const char *name, const char *more) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.sequence = SEQ, d.seed = 7;
    if (name) CHECK_OK(moe_desc_system(&d, name));
    if (!CHECK_OK(moe_desc_parse(&d, more, NULL))) printf("        %s\n", more);
    return d;
}
static inline moe_layer *row(const char *name, const char *more) {
    moe_desc d = row_desc(name, more);
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) printf("        %s %s\n", name ? name : "", more);
    return m;
}
static inline size_t count_of(const moe_layer *m, const char *name) { /* 0: no such tensor */
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(m); i++) {
        CHECK_OK(moe_layer_tensor(m, i, &t));
        if (!strcmp(t.name, name)) return t.count;
    }
    return 0;
}
static inline float *get(const moe_layer *m, const char *name) {
    size_t n = count_of(m, name);
    float *p = test_floats(n);
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, name, p, n));
    return p;
}
static inline void set(moe_layer *m, const char *name, float *p) { /* p is freed */
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, name, p, count_of(m, name)));
    free(p);
}
static inline void scale(moe_layer *m, const char *name, float by) {
    float *p = get(m, name);
    for (size_t i = 0; i < count_of(m, name); i++) p[i] *= by;
    set(m, name, p);
}
/* Tokens whose last number is 1, so that a linear router can be given any mean logits. */
static inline void tokens(size_t n) {
    test_fill(x, n * D, -1, 1);
    for (size_t t = 0; t < n; t++) x[t * D + D - 1] = 1;
    test_fill(dy, n * D, -1, 1);
}
static inline void lean(moe_layer *m, size_t e, float amount) { /* logit e of every token of tokens() += amount */
    float *p = get(m, "router");
    p[(D - 1) * moe_layer_desc(m)->n_experts + e] += amount;
    set(m, "router", p);
}
static inline const moe_tape *go(moe_layer *m, size_t n, int evaluate) {
    moe_layer_side(m)->evaluate = evaluate;
    CHECK_OK(moe_forward(m, x, n, y));
    return moe_layer_tape(m);
}
static inline void back_and_step(moe_layer *m, float lr) {
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_step(m, lr));
}
/* out (n, d) = expert e of m alone, on in (n, d); with `weights` (experts) e is ignored: the weighted mean of
 * the parameters */
static inline void network(const moe_layer *m, size_t e, const float *weights, const float *in, size_t n, float *out) {
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2",
                                        "experts.b1", "experts.bu", "experts.b2"};
    const moe_desc *from = moe_layer_desc(m);
    size_t F_ = from->n_experts - from->n_zero - from->n_copy - from->n_constant + from->n_shared;
    moe_desc d;
    moe_layer *one = NULL;
    memset(&d, 0, sizeof d);
    d.d_model = from->d_model, d.d_ff = from->d_ff, d.expert = from->expert, d.bias = from->bias, d.n_experts = 1;
    d.expert_norm = from->expert_norm, d.input_scale = from->input_scale;
    if (!CHECK_OK(moe_layer_new(&one, &d))) return;
    for (size_t i = 0; i < 6; i++) {
        size_t c = count_of(one, names[i]);
        if (!c) continue;
        float *all = get(m, names[i]), *p = test_floats(c);
        for (size_t k = 0; k < c; k++) {
            double sum = 0;
            for (size_t g = 0; weights && g < F_; g++) sum += (double)weights[g] * (double)all[g * c + k];
            p[k] = weights ? (float)sum : all[e * c + k];
        }
        set(one, names[i], p);
        free(all);
    }
    CHECK_OK(moe_forward(one, in, n, out));
    moe_layer_free(one);
}
static inline double largest(const float *a, const float *b, size_t n) { /* of |a - b|; b NULL: of |a| */
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs((double)a[i] - (b ? (double)b[i] : 0)));
    return most;
}
static inline double sigmoid(double v) { return 1 / (1 + exp(-v)); }
/* z_e of a linear router, in double */
static inline double linear(const moe_layer *m, size_t t, size_t e) {
    float *R = get(m, "router");
    double sum = 0;
    for (size_t i = 0; i < D; i++) sum += (double)x[t * D + i] * (double)R[i * moe_layer_desc(m)->n_experts + e];
    free(R);
    return sum;
}
/* index of token t holds the n highest of v (E), best first, and nothing else */
static inline int holds_best(const moe_tape *tape, size_t t, const float *v, size_t experts, size_t n) {
    const int32_t *index = tape->index + t * tape->n_slots;
    for (size_t i = 0; i < tape->n_slots; i++) {
        if (i >= n) {
            if (index[i] >= 0) return 0;
            continue;
        }
        if (index[i] < 0) return 0;
        for (size_t e = 0; e < experts; e++) {
            int before = 0;
            for (size_t l = 0; l < i; l++) before |= index[l] == (int32_t)e;
            if (before || (int32_t)e == index[i]) continue;
            if (v[e] > v[index[i]] || (v[e] == v[index[i]] && (int32_t)e < index[i])) return 0;
        }
    }
    return 1;
}
static inline size_t kept(const moe_tape *t, size_t e) { return t->routes.begin[e + 1] - t->routes.begin[e]; }

/* ---- bad input, for every score and every selection ---- */
/* each score, and each selection with the gates and combinations that it goes with */
static const char *const stages[] = {"score=linear",
                                     "score=unit",
                                     "score=mlp",
                                     "score=mlp d_router=1",
                                     "score=tanh input_scale=2",
                                     "score=half-cosine",
                                     "expert_norm=true",
                                     "score=cosine",
                                     "score=projected",
                                     "score=normed",
                                     "score=prototype",
                                     "score=slice",
                                     "score=subspace expert=orthonormal",
                                     "score=hash",
                                     "score=random",
                                     "select=top-k threshold=0.3",
                                     "select=groups",
                                     "select=top-p",
                                     "select=threshold gate=relu",
                                     "select=threshold gate=sigmoid threshold=0.5",
                                     "select=threshold gate=sign score=cosine",
                                     "select=expert-choice",
                                     "select=sinkhorn",
                                     "select=auction gate=sigmoid",
                                     "select=sampled gate=sparsemixer",
                                     "select=all",
                                     "select=gumbel",
                                     "select=all gate=softmax-selected",
                                     "combine=soft select=all score=cosine",
                                     "combine=soft select=all",
                                     "combine=merge select=all",
                                     "combine=merge select=all score=normed",
                                     "combine=robust",
                                     "n_codes=16",
                                     "noise=learned",
                                     "route_sequence=true",
                                     "jitter=0.1",
                                     "gate_drop=1",
                                     "gate_drop=1 n_ranks=1 gate_drop_experts=true",
                                     "random_steps=9"};
enum { STAGES = sizeof stages / sizeof *stages };
static inline int finite_all(const float *v, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!isfinite(v[i])) return 0;
    return 1;
}
/* Forward, and in training backward and step: everything stays finite. */
static inline void whole_step(const char *stage, const char *more, size_t T, moe_layer *m, int evaluate) {
    static float back[MAX_TOKENS * D];
    double norm = NAN;
    moe_layer_side(m)->evaluate = evaluate;
    moe_status s = moe_forward(m, x, T, y);
    if (!s) s = moe_backward(m, dy, back);
    if (!s) s = moe_layer_grad_norm(m, &norm);
    int ok = CHECK_OK(s) && CHECK(finite_all(y, T * D)) && CHECK(finite_all(back, T * D)) && CHECK(isfinite(norm)) &&
             CHECK_OK(moe_step(m, 0.01f));
    if (!ok) printf("        %s %s, %d tokens, evaluate %d\n", stage, more, (int)T, evaluate);
}

#endif

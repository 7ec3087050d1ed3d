/* Growth: split layers give the same bits, pairs stay bound, gradients add up, released pairs keep their sides;
 * merging, pruning, adding, reviving and upcycling give what was written down by hand; moments, controllers and special
 * experts follow; whatever allocation fails, the old layer is whole; the controller decides as its settings say. */
#include "test.h"

enum { D = 16, F = 24, E = 8, T = 32 };

static moe_desc plain(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.top_k = 2, d.bias = MOE_ON, d.seed = 7;
    d.parallel.n_threads = 1;
    return d;
}
static void tokens(uint64_t stream, size_t n, float *x) { CHECK_OK(moe_rand_normal(5, stream, n * D, 0.1f, 1, x)); }
static int train(moe_layer *m, int steps, uint64_t stream) {
    float x[T * D], y[T * D], dy[T * D];
    int ok = 1;
    for (int i = 0; i < steps && ok; i++) {
        tokens(stream + (uint64_t)i, T, x);
        ok = CHECK_OK(moe_forward(m, x, T, y));
        for (size_t k = 0; k < T * D; k++) dy[k] = y[k] - x[(k + 3) % (T * D)];
        if (ok) ok = CHECK_OK(moe_backward(m, dy, NULL));
        if (ok) ok = CHECK_OK(moe_step(m, 0.02f));
    }
    return ok;
}
static moe_layer *trained(const moe_desc *d, int steps) {
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, d))) return NULL;
    train(m, steps, 100);
    return m;
}
static size_t length_of(const moe_layer *m, const char *name) {
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(m); i++)
        if (CHECK_OK(moe_layer_tensor(m, i, &t)) && !strcmp(t.name, name)) return t.count;
    return 0;
}
static float *part_of(const moe_layer *m, moe_part_kind part, const char *name) {
    size_t n = length_of(m, name);
    float *v = test_floats(n);
    if (CHECK(n > 0)) CHECK_OK(moe_layer_get(m, part, name, v, n));
    return v;
}
static float *tensor_of(const moe_layer *m, const char *name) { return part_of(m, MOE_PART_PARAMS, name); }
static const char *const expert_names[] = {"experts.w1", "experts.wu", "experts.w2",
                                           "experts.b1", "experts.bu", "experts.b2"};
static size_t expert_length(int i) { return i < 3 ? D * F : i < 5 ? F : D; }
static double worst(const float *a, const float *b, size_t n) { /* relative to the largest */
    double far = 0, top = 1e-30;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)a[i] - (double)b[i]);
        top = fmax(top, fabs((double)b[i]));
        if (!(e <= far)) far = e;
    }
    return far / top;
}

/* ---- split: the same bits, whatever the system; refusals have names ---- */
static moe_status expected(const moe_desc *d) {
    switch (d->score) {
    case MOE_SCORE_SLICE: case MOE_SCORE_SUBSPACE: case MOE_SCORE_HASH: case MOE_SCORE_RANDOM:
        return MOE_E_GROWTH_SCORE;
    default: return d->n_codes ? MOE_E_GROWTH_CODES : MOE_OK;
    }
}
static int is_dense(const moe_desc *d) {
    return d->select == MOE_SELECT_ALL && d->gate == MOE_GATE_SOFTMAX && d->combine != MOE_COMBINE_ROBUST;
}
/* Both layers on a batch: y, in evaluation or training, and dx and the router's gradient after that. */
static void compare(moe_layer *a, moe_layer *b, int evaluate, double limit, const char *name) {
    float x[T * D], y[T * D], z[T * D], dy[T * D], dx[T * D], dz[T * D];
    tokens(900 + (uint64_t)evaluate, T, x), tokens(901, T, dy);
    moe_layer_side(a)->evaluate = moe_layer_side(b)->evaluate = evaluate;
    if (!CHECK_OK(moe_forward(a, x, T, y)) || !CHECK_OK(moe_forward(b, x, T, z))) return;
    int ok = limit > 0 ? CHECK_WITHIN(worst(z, y, T * D), 0, limit) : CHECK_SAME(z, y, T * D);
    if (!evaluate && CHECK_OK(moe_backward(a, dy, dx)) && CHECK_OK(moe_backward(b, dy, dz))) {
        ok &= limit > 0 ? CHECK_WITHIN(worst(dz, dx, T * D), 0, 1.9 * limit) : CHECK_SAME(dz, dx, T * D);
        moe_tensor t;
        for (size_t i = 0; i < moe_layer_tensors(a) && !(limit > 0); i++)
            if (CHECK_OK(moe_layer_tensor(a, i, &t)) && !strncmp(t.name, "router", 6)) {
                float *u = part_of(a, MOE_PART_GRADS, t.name), *v = part_of(b, MOE_PART_GRADS, t.name);
                ok &= CHECK_SAME(v, u, t.count);
                free(u), free(v);
            }
    }
    moe_layer_side(a)->evaluate = moe_layer_side(b)->evaluate = 0;
    if (!ok) printf("    ... with %s\n", name);
}
/* The gradient of expert `parent` is the sum of those of the two. */
static void check_sum(const moe_layer *a, const moe_layer *b, size_t parent, size_t child, const char *name) {
    for (int i = 0; i < 6; i++) {
        size_t n = expert_length(i);
        if (!length_of(a, expert_names[i])) continue;
        n = length_of(a, expert_names[i]) / (moe_layer_desc(a)->n_experts + moe_layer_desc(a)->n_shared -
            moe_layer_desc(a)->n_zero - moe_layer_desc(a)->n_copy - moe_layer_desc(a)->n_constant);
        float *u = part_of(a, MOE_PART_GRADS, expert_names[i]), *v = part_of(b, MOE_PART_GRADS, expert_names[i]);
        for (size_t k = 0; k < n; k++) v[parent * n + k] += v[child * n + k];
        if (!CHECK_WITHIN(worst(v + parent * n, u + parent * n, n), 0, 1e-6))
            printf("    ... %s of %s\n", expert_names[i], name);
        free(u), free(v);
    }
}
static void split_system(const moe_system *system, int with_x, int shared) {
    moe_desc d = plain();
    moe_layer *m, *s = NULL;
    float x[T * D];
    d.bias = MOE_DEFAULT, d.top_k = 0, d.sequence = 8;
    if (!CHECK_OK(moe_desc_system(&d, system->name))) return;
    if (d.expert == MOE_EXPERT_ORTHONORMAL) d.d_ff = D / 2;
    if (!CHECK_OK(moe_desc_resolve(&d, &d)) || d.n_experts == 1) return;
    d.n_shared += (size_t)shared;
    d.random_steps = 0;
    m = trained(&d, 2);
    if (!m) return;
    d = *moe_layer_desc(m);
    tokens(50, T, x);
    moe_growth_data data = {with_x ? x : NULL, with_x ? T : 0, NULL, NULL, 3};
    moe_status want = expected(&d);
    if (!CHECK_STATUS(moe_layer_split(&s, m, 1, &data), want) || want) {
        CHECK(s == NULL || !want);
        if (want) CHECK_STATUS(moe_layer_prune(&s, m, 0, NULL), want);
        moe_layer_free(m);
        return;
    }
    size_t networks = d.n_experts - d.n_zero - d.n_copy - d.n_constant;
    CHECK(moe_layer_desc(s)->n_bound == (size_t)!is_dense(&d));
    CHECK(moe_layer_desc(s)->n_experts == d.n_experts + (size_t)is_dense(&d));
    CHECK(moe_layer_params(s) > moe_layer_params(m));
    double limit = is_dense(&d) ? 1e-6 : 0;
    if (is_dense(&d)) { /* child and parent begin a thousandth apart */
        float *r = tensor_of(s, "router");
        double apart = 0;
        for (size_t i = 1; i < length_of(s, "router"); i += networks + 1)
            apart = fmax(apart, fabs((double)r[i] - (double)r[i - 1 + networks]));
        CHECK(apart > 1e-5 && apart < 2e-3);
        free(r);
    }
    compare(m, s, 1, limit, system->name);
    if (!is_dense(&d) || (d.noise == MOE_NOISE_NONE && d.expert_drop == 0.0f)) { /* else other draws */
        compare(m, s, 0, limit, system->name);
        check_sum(m, s, 1, networks, system->name);
    }
    moe_layer_free(m), moe_layer_free(s);
}
static void test_split_systems(void) {
    for (size_t i = 0; i < moe_systems_count(); i++)
        for (int with_x = 0; with_x < 2; with_x++) split_system(moe_system_at(i), with_x, (int)(i % 2));
}

/* ---- bound: what each half computes, from layers that hold only one of them ---- */
static moe_layer *with_expert(const moe_layer *old, const moe_layer *s, size_t parent, size_t network) {
    moe_layer *m = NULL;
    moe_desc d = *moe_layer_desc(old);
    if (!CHECK_OK(moe_layer_new(&m, &d))) return NULL;
    moe_tensor t;
    for (size_t i = 0; i < moe_layer_tensors(m); i++) {
        CHECK_OK(moe_layer_tensor(m, i, &t));
        float *v = tensor_of(s, t.name), *out = test_floats(t.count);
        if (!strncmp(t.name, "experts.", 8)) {
            size_t n = t.count / t.dim[0];
            for (size_t e = 0; e < t.dim[0]; e++)
                memcpy(out + e * n, v + (e == parent ? network : e) * n, n * sizeof *v);
        } else memcpy(out, v, t.count * sizeof *v);
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, t.name, out, t.count));
        free(v), free(out);
    }
    return m;
}
static void test_bound(void) {
    moe_desc d = plain();
    d.capacity_factor = 1.25f, d.loss[MOE_LOSS_SWITCH] = 0.1f;
    moe_layer *m = trained(&d, 3), *s = NULL, *half[2];
    float x[T * D], y[T * D], z[2][T * D];
    tokens(51, T, x);
    moe_growth_data data = {x, T, NULL, NULL, 0};
    if (!m || !CHECK_OK(moe_layer_split(&s, m, 2, &data))) return;
    train(s, 4, 300); /* the two are different now */
    float *w = tensor_of(s, "experts.w1");
    CHECK(worst(w + 2 * D * F, w + E * D * F, D * F) > 1e-3);
    free(w);
    half[0] = with_expert(m, s, 2, 2), half[1] = with_expert(m, s, 2, E);
    tokens(52, T, x);
    for (int i = 0; i < 3; i++) moe_layer_side(i == 2 ? s : half[i])->evaluate = 1;
    CHECK_OK(moe_forward(s, x, T, y));
    for (int i = 0; i < 2; i++) CHECK_OK(moe_forward(half[i], x, T, z[i]));
    float *plane = tensor_of(s, "router.pair"), *offset = tensor_of(s, "router.pair_offset");
    float *parent = tensor_of(s, "router.pair_parent");
    CHECK(parent[0] == 2.0f);
    const moe_tape *tape = moe_layer_tape(s), *old = moe_layer_tape(half[0]);
    CHECK(tape->routes.n_experts == E && !memcmp(tape->routes.load, old->routes.load, E * sizeof(uint64_t)));
    CHECK(!memcmp(tape->index, old->index, T * 2 * sizeof(int32_t)));
    size_t moved = 0, sides[2] = {0, 0};
    for (size_t t = 0; t < T; t++) {
        double side = -(double)offset[0];
        for (size_t i = 0; i < D; i++) side += (double)plane[i] * (double)x[t * D + i];
        CHECK_SAME(y + t * D, z[side > 0] + t * D, D);
        for (size_t k = 0; k < 2; k++)
            if (tape->index[t * 2 + k] == 2) {
                uint32_t route = tape->routes.slot[t * 2 + k];
                sides[side > 0]++;
                if (route == MOE_NONE) continue;
                CHECK(tape->routes.token[route] == t && tape->routes.weight[route] == tape->weight[t * 2 + k]);
                moved += side > 0;
            }
    }
    CHECK(tape->bound[0] == moved && moved > 0 && sides[0] > 0);
    free(plane), free(offset), free(parent);
    moe_layer_free(m), moe_layer_free(s), moe_layer_free(half[0]), moe_layer_free(half[1]);
}
/* The pair gate of tokens that spread along one line: that line, through the median, and mean distance 1. */
static void test_gate(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 0), *s = NULL;
    enum { N = 201 };
    static float x[N * D];
    float *router = tensor_of(m, "router");
    memset(router, 0, D * E * sizeof *router);
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", router, D * E)); /* ties: all choose 0 and 1 */
    free(router);
    double direction[D], length = 0, far = 0;
    for (int i = 0; i < D; i++) direction[i] = sin(1.0 + i), length += direction[i] * direction[i];
    for (size_t t = 0; t < N; t++)
        for (int i = 0; i < D; i++) {
            double along = pow((double)((t * 77) % N) / N, 3) * 9; /* skewed: median and mean differ */
            x[t * D + (size_t)i] = (float)(3 + along * direction[i] / sqrt(length)) + 0.01f * test_uniform(-1, 1);
        }
    moe_growth_data data = {x, N, NULL, NULL, 0};
    if (!CHECK_OK(moe_layer_split(&s, m, 1, &data))) return;
    float *plane = tensor_of(s, "router.pair"), *offset = tensor_of(s, "router.pair_offset");
    double dot = 0, size = 0;
    int above = 0;
    for (int i = 0; i < D; i++) dot += (double)plane[i] * direction[i], size += (double)plane[i] * (double)plane[i];
    CHECK_NEAR(fabs(dot) / sqrt(size * length), 1, 1e-6);
    for (size_t t = 0; t < N; t++) {
        double side = -(double)offset[0];
        for (int i = 0; i < D; i++) side += (double)plane[i] * (double)x[t * D + (size_t)i];
        above += side > 0, far += fabs(side) / N;
    }
    CHECK(above == N / 2 || above == N - N / 2);
    CHECK_NEAR(far, 1, 2e-6);
    free(plane), free(offset);
    moe_layer_free(m), moe_layer_free(s);
}

/* ---- release ---- */
static void release_check(moe_layer *s, moe_layer *r, float gap) {
    float x[T * D], y[T * D];
    tokens(53, T, x);
    moe_layer_side(s)->evaluate = moe_layer_side(r)->evaluate = 1;
    CHECK_OK(moe_forward(s, x, T, y));
    CHECK_OK(moe_forward(r, x, T, y));
    float *plane = tensor_of(s, "router.pair"), *offset = tensor_of(s, "router.pair_offset");
    const float *old = moe_layer_tape(s)->logits, *now = moe_layer_tape(r)->logits;
    const size_t parents[] = {2, 5};
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < 2; i++) {
            double m = -(double)offset[i], z = (double)old[t * E + parents[i]];
            for (size_t k = 0; k < D; k++) m += (double)plane[i * D + k] * (double)x[t * D + k];
            double child = (double)now[t * (E + 2) + E + i], parent = (double)now[t * (E + 2) + parents[i]];
            CHECK_WITHIN(child, z + gap / 2 * (m - 1), 3e-6);
            CHECK_WITHIN(parent, z + gap / 2 * (-m - 1), 3e-6);
        }
    for (size_t t = 0; t < T; t++)
        for (size_t e = 0; e < E; e++)
            if (e != 2 && e != 5) CHECK_BITS(now[t * (E + 2) + e], old[t * E + e]);
    free(plane), free(offset);
}
static void test_release(void) {
    moe_desc d = plain();
    d.n_shared = 1;
    moe_layer *m = trained(&d, 3), *s = NULL, *both = NULL, *r = NULL;
    float x[T * D];
    tokens(54, T, x);
    moe_growth_data data = {x, T, NULL, NULL, 0};
    if (!m || !CHECK_OK(moe_layer_split(&s, m, 2, &data)) || !CHECK_OK(moe_layer_split(&both, s, 5, &data))) return;
    CHECK(moe_layer_desc(both)->n_bound == 2);
    compare(m, both, 1, 0, "two pairs");
    train(both, 2, 400);
    if (CHECK_OK(moe_layer_release(&r, both, 0))) {
        CHECK(moe_layer_desc(r)->n_bound == 0 && moe_layer_desc(r)->n_experts == E + 2);
        release_check(both, r, 1);
        for (int i = 0; i < 6; i++) { /* networks have the numbers that they had */
            float *u = tensor_of(both, expert_names[i]), *v = tensor_of(r, expert_names[i]);
            CHECK_SAME(v, u, length_of(r, expert_names[i]));
            CHECK(length_of(r, expert_names[i]) == length_of(both, expert_names[i]));
            free(u), free(v);
        }
    }
    moe_layer_free(r);
    if (CHECK_OK(moe_layer_release(&r, both, 3))) release_check(both, r, 3);
    moe_layer_free(r);
    if (CHECK_OK(moe_layer_release(&r, both, MOE_OFF))) release_check(both, r, 0);
    train(r, 2, 500);
    moe_layer_free(m), moe_layer_free(s), moe_layer_free(both), moe_layer_free(r);
}
/* Scores that scale their columns: the sides are kept. */
static void test_release_scaled(void) {
    static const moe_score_kind scores[] = {MOE_SCORE_COSINE, MOE_SCORE_NORMED, MOE_SCORE_HALF_COSINE, MOE_SCORE_MLP,
                                            MOE_SCORE_PROTOTYPE, MOE_SCORE_TANH};
    for (size_t i = 0; i < sizeof scores / sizeof *scores; i++) {
        moe_desc d = plain();
        d.score = scores[i];
        moe_layer *m = trained(&d, 3), *s = NULL, *r = NULL;
        static float x[8 * T * D], y[8 * T * D];
        tokens(55, 8 * T, x);
        moe_growth_data data = {x, 8 * T, NULL, NULL, 0};
        if (!CHECK_OK(moe_layer_split(&s, m, 3, &data)) || !CHECK_OK(moe_layer_release(&r, s, 0))) return;
        moe_layer_side(s)->evaluate = moe_layer_side(r)->evaluate = 1;
        CHECK_OK(moe_forward(s, x, 8 * T, y));
        const moe_tape *a = moe_layer_tape(s);
        uint64_t pair = a->routes.load[3];
        size_t same = 0, seen = 0;
        unsigned char child[8 * T];
        memset(child, 0, sizeof child);
        for (uint32_t k = a->routes.begin[4] - a->bound[0]; k < a->routes.begin[4]; k++) child[a->routes.token[k]] = 1;
        CHECK(a->bound[0] > pair / 3 && a->bound[0] < pair - pair / 3);
        float *old = (float *)test_memory(8 * T * E, sizeof(float));
        memcpy(old, a->logits, 8 * T * E * sizeof(float));
        CHECK_OK(moe_forward(r, x, 8 * T, y));
        for (size_t t = 0; t < 8 * T; t++)
            for (size_t k = 0; k < 2; k++)
                if (a->index[t * 2 + k] == 3) {
                    const float *z = moe_layer_tape(r)->logits + t * (E + 1);
                    seen++, same += (z[E] > z[3]) == child[t];
                }
        if (!CHECK(same * 100 >= seen * 90)) printf("    ... %s %zu of %zu\n", moe_score_name(d.score), same, seen);
        free(old);
        moe_layer_free(m), moe_layer_free(s), moe_layer_free(r);
    }
}

/* ---- merge ---- */
static void permute(moe_layer *m, moe_part_kind part, size_t from, size_t to) { /* to = from, its units reversed */
    for (int i = 0; i < 6; i++) {
        if (!length_of(m, expert_names[i])) continue;
        size_t n = expert_length(i), f = F;
        float *v = part_of(m, part, expert_names[i]);
        for (size_t k = 0; k < n; k++) {
            size_t r = i == 2 ? k / D : i < 2 ? k / f : 0, c = i == 2 ? k % D : i < 2 ? k % f : k;
            size_t at = i == 2 ? (f - 1 - r) * D + c : i < 2 ? r * f + (f - 1 - c) : i < 5 ? f - 1 - c : c;
            v[to * n + at] = v[from * n + k];
        }
        CHECK_OK(moe_layer_set(m, part, expert_names[i], v, length_of(m, expert_names[i])));
        free(v);
    }
}
static void test_merge(void) {
    static const moe_expert_kind kinds[] = {MOE_EXPERT_SWIGLU, MOE_EXPERT_GELU};
    for (int k = 0; k < 2; k++) {
        moe_desc d = plain();
        d.expert = kinds[k], d.n_shared = 1;
        moe_layer *m = trained(&d, 3), *r = NULL;
        for (int part = 0; part < MOE_PART_COUNT; part++)
            if (part != MOE_PART_GRADS) permute(m, (moe_part_kind)part, 2, 6);
        const double usage[E] = {1, 1, 3, 1, 1, 1, 2, 1};
        if (!CHECK_OK(moe_layer_merge(&r, m, 6, 2, usage))) return; /* of 6: given back in its units */
        CHECK(moe_layer_desc(r)->n_experts == E - 1);
        for (int i = 0; i < 6; i++) {
            if (!length_of(m, expert_names[i])) continue;
            size_t n = expert_length(i);
            for (int part = 0; part < MOE_PART_COUNT; part++) {
                float *u = part_of(m, (moe_part_kind)part, expert_names[i]);
                float *v = part_of(r, (moe_part_kind)part, expert_names[i]);
                double scale = part == MOE_PART_MOMENT1 ? 2 : part == MOE_PART_MOMENT2 ? 4 : 1;
                for (size_t e = 0; e < E + 1; e++) { /* the others, the shared one too, as they were */
                    if (e == 6) continue;
                    size_t now = e > 6 ? e - 1 : e;
                    if (e != 2) CHECK_SAME(v + now * n, u + e * n, n);
                    else {
                        for (size_t j = 0; j < n; j++) u[2 * n + j] *= (float)scale;
                        CHECK_WITHIN(worst(v + now * n, u + e * n, n), 0, 9e-7);
                    }
                }
                free(u), free(v);
            }
        }
        float *u = tensor_of(m, "router"), *v = tensor_of(r, "router");
        for (size_t i = 0; i < D; i++)
            for (size_t e = 0; e < E - 1; e++) {
                double want = (double)u[i * E + (e >= 6 ? e + 1 : e)];
                if (e == 2) want = (3 * (double)u[i * E + 2] + 2 * (double)u[i * E + 6]) / 5;
                CHECK_WITHIN(v[i * (E - 1) + e], want, 1e-7);
            }
        free(u), free(v);
        moe_layer_free(m), moe_layer_free(r);
    }
}
/* Eight experts (what is counted of them fills whole lines of memory) whose outputs are far apart: two become one, the
 * others stay. */
static void test_merge_far(void) {
    moe_desc d = plain();
    d.n_experts = 8;
    moe_layer *m = trained(&d, 2), *r = NULL;
    size_t n = expert_length(2), kept = 0;
    float x[T * D], *w = tensor_of(m, "experts.w2");
    for (size_t i = 0; i < 8 * n; i++) w[i] *= 1000;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "experts.w2", w, 8 * n));
    tokens(57, T, x);
    if (!CHECK_OK(moe_layer_merge_to(&r, m, 7, x, T, NULL))) return;
    float *made = tensor_of(r, "experts.w2");
    for (size_t e = 0; e < 7; e++)
        for (size_t old = 0; old < 8; old++) kept += !memcmp(made + e * n, w + old * n, n * sizeof *w);
    CHECK(moe_layer_desc(r)->n_experts == 7 && kept == 6);
    free(w), free(made);
    moe_layer_free(m), moe_layer_free(r);
}
/* Twelve experts that are three, each four times, in a shuffled order: clusters find the three again. */
static void test_merge_to(void) {
    moe_desc d = plain();
    d.n_experts = 12;
    moe_layer *m = trained(&d, 2), *r = NULL;
    const size_t kind[12] = {0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 2, 1};
    for (int i = 0; i < 6; i++) {
        size_t n = expert_length(i);
        float *v = tensor_of(m, expert_names[i]);
        for (size_t e = 0; e < 12; e++) memmove(v + e * n, v + kind[e] * n, n * sizeof *v);
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, expert_names[i], v, 12 * n));
        free(v);
    }
    float x[T * D];
    tokens(56, T, x);
    if (!CHECK_OK(moe_layer_merge_to(&r, m, 3, x, T, NULL))) return;
    CHECK(moe_layer_desc(r)->n_experts == 3);
    for (int i = 0; i < 6; i++) {
        float *u = tensor_of(m, expert_names[i]), *v = tensor_of(r, expert_names[i]);
        CHECK_WITHIN(worst(v, u, 3 * expert_length(i)), 0, 1e-6);
        free(u), free(v);
    }
    moe_layer_free(r);
    CHECK_STATUS(moe_layer_merge_to(&r, m, 0, x, T, NULL), MOE_E_GROWTH_N_EXPERTS);
    CHECK_STATUS(moe_layer_merge_to(&r, m, 13, x, T, NULL), MOE_E_GROWTH_N_EXPERTS);
    CHECK_STATUS(moe_layer_merge_to(&r, m, 1, x, T, NULL), MOE_E_TOP_K);
    static const double usage[12] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    CHECK_STATUS(moe_layer_merge_to(&r, m, 3, x, 0, NULL), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_layer_merge_to(&r, m, 3, x, 0, usage), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_layer_merge_to(&r, m, 3, NULL, T, NULL), MOE_E_NULL_X);
    moe_layer_free(m);
}

/* ---- prune, add, special experts, controllers ---- */
static int same_layers(const moe_layer *a, const moe_layer *b, int moments) {
    moe_tensor t, u;
    int ok = CHECK(moe_layer_tensors(a) == moe_layer_tensors(b));
    for (size_t i = 0; i < moe_layer_tensors(a) && ok; i++) {
        ok = CHECK_OK(moe_layer_tensor(a, i, &t)) && CHECK_OK(moe_layer_tensor(b, i, &u));
        ok = ok && CHECK(!strcmp(t.name, u.name) && t.count == u.count);
        for (int part = 0; part < MOE_PART_COUNT && ok; part++) {
            if (part && !moments) continue;
            if (part == MOE_PART_MOMENT2 && moe_layer_desc(a)->optimizer == MOE_OPTIMIZER_SGD) continue;
            float *v = part_of(a, (moe_part_kind)part, t.name), *w = part_of(b, (moe_part_kind)part, t.name);
            ok = CHECK_SAME(v, w, t.count);
            if (!ok) printf("    ... %s, part %d\n", t.name, part);
            free(v), free(w);
        }
    }
    const moe_control *c = moe_layer_control((moe_layer *)(uintptr_t)a);
    const moe_control *k = moe_layer_control((moe_layer *)(uintptr_t)b);
    if (ok && c->n_state) ok = CHECK(c->n_state == k->n_state) && CHECK_SAME(c->state, k->state, c->n_state);
    return ok;
}
static void test_prune_add(void) {
    for (int k = 0; k < 5; k++) {
        moe_desc d = plain();
        d.n_shared = 1, d.noise = MOE_NOISE_LEARNED, d.router_bias = MOE_ON;
        d.n_zero = d.n_copy = d.n_constant = (size_t)(k == 1);
        if (k == 2) d.controller = MOE_CONTROL_ID;
        if (k == 3) d.controller = MOE_CONTROL_USAGE_BOOST, d.optimizer = MOE_OPTIMIZER_SGD, d.score = MOE_SCORE_MLP;
        if (k == 4) d.expert = MOE_EXPERT_ORTHONORMAL, d.d_ff = D / 2, d.bias = MOE_OFF; /* orthonormal as it is */
        moe_layer *m = trained(&d, 3), *p = NULL, *a = NULL;
        size_t gone = 3;
        moe_growth_donor donor = {m, gone}, no_donor = {NULL, 0};
        CHECK_STATUS(moe_layer_add(&a, m, 3, NULL, &no_donor), MOE_E_GROWTH_DONOR);
        if (!CHECK_OK(moe_layer_prune(&p, m, 1, &gone))) return;
        CHECK(moe_layer_desc(p)->n_experts == E - 1);
        if (CHECK_OK(moe_layer_add(&a, p, 3, NULL, &donor))) {
            if (k == 3) { /* its usage was in units of another even load, there and back */
                const moe_control *u = moe_layer_control(m), *v = moe_layer_control(a);
                for (size_t e = 0; e < E; e++)
                    CHECK_WITHIN(v->usage[e], u->usage[e] * (e == 3 ? (float)E / (E - 1) : 1), 1e-6);
                CHECK_OK(moe_layer_set(a, MOE_PART_PARAMS, "controller.state", u->state, u->n_state));
            }
            same_layers(m, a, 1);
            compare(m, a, 1, 0, "prune and add");
        }
        moe_layer_free(m), moe_layer_free(p), moe_layer_free(a);
    }
}
/* An added expert: its column is the direction of those that nobody took, its thresholds and moments 0. */
static void test_add(void) {
    moe_desc d = plain();
    CHECK_OK(moe_desc_system(&d, "dynmoe"));
    d.bias = MOE_OFF, d.n_experts = 4;
    moe_layer *m = trained(&d, 1), *a = NULL;
    float x[T * D], y[T * D], sum[D], threshold[4] = {0.3f, 0.2f, 0.3f, 0.25f}, loss[T];
    uint64_t count = 0, missed = 0;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router.threshold", threshold, 4)); /* only tokens near a column pass */
    tokens(57, T, x);
    memset(sum, 0, sizeof sum);
    CHECK_OK(moe_forward(m, x, T, y));
    const moe_tape *tape = moe_layer_tape(m);
    double want[D], length = 0, worse[D], long_worse = 0, mean = 0;
    memset(want, 0, sizeof want), memset(worse, 0, sizeof worse);
    for (size_t t = 0; t < T; t++) loss[t] = (float)((t * 13) % 7), mean += (double)loss[t] / T;
    for (size_t t = 0; t < T; t++) {
        int taken = 0;
        double size = 0;
        for (size_t s = 0; s < tape->n_slots; s++) taken |= tape->index[t * tape->n_slots + s] >= 0;
        for (size_t i = 0; i < D; i++) size += (double)x[t * D + i] * (double)x[t * D + i];
        missed += !taken;
        for (size_t i = 0; i < D; i++) {
            if (!taken) want[i] += (double)x[t * D + i] / sqrt(size); /* a cosine's latent row */
            worse[i] += fmax((double)loss[t] - mean, 0) * (double)x[t * D + i] / sqrt(size);
        }
    }
    for (size_t i = 0; i < D; i++) length += want[i] * want[i], long_worse += worse[i] * worse[i];
    CHECK(missed > 0 && missed < T);
    CHECK_OK(moe_growth_unserved(tape, sum, &count));
    CHECK(count == missed);
    for (size_t i = 0; i < D; i++) CHECK_WITHIN(sum[i], want[i], 2e-6);
    for (int with_loss = 0; with_loss < 2; with_loss++) {
        moe_growth_data data = {x, T, with_loss ? loss : NULL, NULL, 0};
        if (!CHECK_OK(moe_layer_add(&a, m, MOE_GROWTH_END, &data, NULL))) return;
        float *router = tensor_of(a, "router"), *moment = part_of(a, MOE_PART_MOMENT1, "router");
        float *limit = tensor_of(a, "router.threshold"), *w = tensor_of(a, "experts.w1");
        for (size_t i = 0; i < D; i++) {
            double is = with_loss ? worse[i] / sqrt(long_worse) : want[i] / sqrt(length);
            CHECK_WITHIN(router[i * 5 + 4], is, 7e-7);
            CHECK(moment[i * 5 + 4] == 0.0f);
        }
        CHECK(limit[4] == 0.0f && limit[3] == threshold[3]);
        CHECK(w[4 * D * F] != 0.0f && fabsf(w[4 * D * F]) <= 0.25f && w[4 * D * F] != w[3 * D * F]);
        free(router), free(moment), free(limit), free(w);
        moe_layer_free(a);
    }
    /* the window of DynMoE: 1 and 2 unused; one added */
    moe_health h;
    CHECK_OK(moe_layer_health(m, &h));
    uint64_t load[4] = {5, 0, 0, 7};
    memcpy(h.load, load, sizeof load);
    if (CHECK_OK(moe_layer_dynmoe(&a, m, &h, sum, count, 0, 0))) {
        float *now = tensor_of(a, "router"), *old = tensor_of(m, "router");
        CHECK(moe_layer_desc(a)->n_experts == 3);
        for (size_t i = 0; i < D; i++) {
            CHECK_BITS(now[i * 3], old[i * 4]), CHECK_BITS(now[i * 3 + 1], old[i * 4 + 3]);
            CHECK_WITHIN(now[i * 3 + 2], want[i] / sqrt(length), 6e-7);
        }
        free(now), free(old);
        moe_layer_free(a);
    }
    if (CHECK_OK(moe_layer_dynmoe(&a, m, &h, sum, count, 2, 0))) CHECK(moe_layer_desc(a)->n_experts == 2);
    moe_layer_free(a);
    memset(h.load, 0, sizeof load);
    if (CHECK_OK(moe_layer_dynmoe(&a, m, &h, NULL, 0, 0, 0))) same_layers(a, m, 1);
    moe_layer *no = NULL;
    CHECK_STATUS(moe_layer_dynmoe(&no, m, &h, NULL, 1, 0, 0), MOE_E_NULL_X);
    moe_layer_free(a), moe_layer_free(m);
}
/* A pair keeps its parent where an expert made of nothing, or of another layer's, comes before it. */
/* A donor, a layer of its own desc: what fits and what does not. */
static void test_donors(void) {
    static const struct { const char *layer, *donor; size_t expert; moe_status status; } rows[] = {
        {"", "", 0, MOE_OK}, {"", "training=false", 7, MOE_OK}, {"", "seed=3 n_experts=9", 8, MOE_OK},
        {"", "", E, MOE_E_GROWTH_EXPERT}, {"", "n_zero=1", E - 1, MOE_E_GROWTH_SPECIAL},
        {"", "d_model=8", 0, MOE_E_GROWTH_DONOR}, {"", "d_ff=12", 0, MOE_E_GROWTH_DONOR},
        {"score=mlp d_router=8", "score=mlp d_router=4", 0, MOE_E_GROWTH_DONOR},
        {"", "expert=geglu", 0, MOE_E_GROWTH_DONOR}, {"", "bias=false", 0, MOE_E_GROWTH_DONOR},
        {"combine=soft select=all soft_slots=2", "combine=soft select=all soft_slots=3", 0, MOE_E_GROWTH_DONOR},
        {"", "controller=bias", 0, MOE_E_GROWTH_DONOR}, {"", "router_bias=true", 0, MOE_E_GROWTH_DONOR},
        {"router_bias=true", "", 0, MOE_E_GROWTH_DONOR}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc d = plain(), other = plain();
        moe_layer *m = NULL, *from = NULL, *made = NULL;
        CHECK_OK(moe_desc_parse(&d, rows[i].layer, NULL)), CHECK_OK(moe_desc_parse(&other, rows[i].donor, NULL));
        if (!CHECK_OK(moe_layer_new(&from, &other))) { printf("        %s\n", rows[i].donor); continue; }
        m = trained(&d, 1);
        const moe_growth_donor donor = {from, rows[i].expert};
        if (!CHECK_STATUS(moe_layer_add(&made, m, 2, NULL, &donor), rows[i].status))
            printf("        %s | %s\n", rows[i].layer, rows[i].donor);
        if (CHECK((made != NULL) == (rows[i].status == MOE_OK)) && made) { /* its weights; it has no moments yet */
            float *u = tensor_of(made, "experts.w1"), *v = tensor_of(from, "experts.w1");
            float *moment = part_of(made, MOE_PART_MOMENT1, "experts.w1");
            float *columns = tensor_of(made, "router"), *theirs = tensor_of(from, "router");
            size_t n = other.n_experts;
            CHECK_SAME(u + 2 * D * F, v + rows[i].expert * D * F, D * F);
            for (size_t k = 0; k < D * F; k++) CHECK(moment[2 * D * F + k] == 0);
            for (size_t r = 0; r < D; r++) CHECK(columns[r * (E + 1) + 2] == theirs[r * n + rows[i].expert]);
            free(u), free(v), free(moment), free(columns), free(theirs);
        }
        moe_layer_free(m), moe_layer_free(from), moe_layer_free(made);
    }
}
static float parent_after(moe_status status, moe_layer *made) {
    if (!CHECK_OK(status)) return -1;
    float *parent = tensor_of(made, "router.pair_parent"), is = parent[0];
    train(made, 1, 720);
    free(parent);
    moe_layer_free(made);
    return is;
}
static void test_parents(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 1), *s = NULL, *a = NULL;
    float unit[D] = {1};
    moe_growth_data along = {NULL, 0, NULL, unit, 0};
    moe_growth_donor same_number = {m, 2};
    if (!CHECK_OK(moe_layer_split(&s, m, 2, NULL))) return;
    moe_status status = moe_layer_add(&a, s, 2, &along, NULL);
    CHECK(parent_after(status, a) == 3);
    status = moe_layer_add(&a, s, 0, NULL, &same_number);
    CHECK(parent_after(status, a) == 3);
    status = moe_layer_add(&a, s, 3, NULL, &same_number);
    CHECK(parent_after(status, a) == 2);
    status = moe_layer_revive(&a, s, 1, MOE_GROWTH_END, &along);
    CHECK(parent_after(status, a) == 2);
    status = moe_layer_revive(&a, s, 0, 1, &along);
    CHECK(parent_after(status, a) == 2);
    moe_layer_free(m), moe_layer_free(s);
}
/* What a split does to moments and to a controller's state. */
static void test_moments(void) {
    moe_desc d = plain();
    d.n_zero = 1, d.n_constant = 1, d.controller = MOE_CONTROL_USAGE_BOOST;
    moe_layer *m = trained(&d, 3), *s = NULL, *r = NULL;
    if (!CHECK_OK(moe_layer_split(&s, m, 1, NULL)) || !CHECK_OK(moe_layer_release(&r, s, 0))) return;
    for (int i = 0; i < 6; i++)
        for (int part = MOE_PART_MOMENT1; part <= MOE_PART_MOMENT2; part++) {
            float *u = part_of(m, (moe_part_kind)part, expert_names[i]);
            float *v = part_of(r, (moe_part_kind)part, expert_names[i]);
            float half = part == MOE_PART_MOMENT1 ? 0.5f : 0.25f;
            size_t n = expert_length(i);
            for (size_t k = 0; k < n; k++) {
                CHECK_BITS(v[n + k], half * u[n + k]);
                CHECK_BITS(v[6 * n + k], half * u[n + k]); /* 6 networks were there */
                CHECK_BITS(v[5 * n + k], u[5 * n + k]);
            }
            free(u), free(v);
        }
    for (int part = 0; part < MOE_PART_COUNT; part++) {
        if (part == MOE_PART_GRADS) continue;
        float *u = part_of(m, (moe_part_kind)part, "router"), *v = part_of(r, (moe_part_kind)part, "router");
        float half = part == MOE_PART_MOMENT1 ? 0.5f : 0.25f;
        for (size_t i = 0; i < D; i++) {
            CHECK_BITS(v[i * 9 + 5], u[i * 8 + 5]);
            CHECK_BITS(v[i * 9 + 7], u[i * 8 + 6]), CHECK_BITS(v[i * 9 + 8], u[i * 8 + 7]); /* zero, constant */
            if (part) CHECK_BITS(v[i * 9 + 1], half * u[i * 8 + 1]), CHECK_BITS(v[i * 9 + 6], half * u[i * 8 + 1]);
        }
        free(u), free(v);
    }
    const moe_control *a = moe_layer_control(m), *b = moe_layer_control(s), *c = moe_layer_control(r);
    CHECK_SAME(b->state, a->state, a->n_state); /* bound: the parent's */
    CHECK_WITHIN(c->usage[1], a->usage[1] * 0.5f * 9 / 8, 1e-7);
    CHECK_WITHIN(c->usage[6], a->usage[1] * 0.5f * 9 / 8, 1e-7);
    CHECK_WITHIN(c->usage[8], a->usage[7] * 9 / 8, 1e-7);
    CHECK(c->bias[6] == a->bias[1] && c->bias[8] == a->bias[7]);
    float *u = tensor_of(m, "experts.constant"), *v = tensor_of(r, "experts.constant");
    CHECK_SAME(v, u, D);
    free(u), free(v);
    size_t one = 7;
    moe_layer *no = m;
    CHECK_STATUS(moe_layer_split(&no, m, 6, NULL), MOE_E_GROWTH_SPECIAL);
    CHECK_STATUS(moe_layer_prune(&no, m, 1, &one), MOE_E_GROWTH_SPECIAL);
    CHECK(no == NULL);
    moe_layer_free(m), moe_layer_free(s), moe_layer_free(r);
}

/* ---- clone, revive, upcycle, worth ---- */
static void test_clone(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 2), *c = NULL, *h = NULL;
    if (!CHECK_OK(moe_layer_clone(&c, m, 4, 0.1f, 0, 9)) || !CHECK_OK(moe_layer_clone(&h, m, 4, 0, 0.5f, 9))) return;
    for (int i = 0; i < 3; i++) {
        float *u = tensor_of(m, expert_names[i]), *v = tensor_of(c, expert_names[i]);
        float *w = tensor_of(h, expert_names[i]);
        size_t n = D * F, same = 0;
        double size = 0, moved = 0, sum = 0, squares = 0, old = 0, old_squares = 0, drawn = 0;
        for (size_t k = 0; k < n; k++) {
            double parent = (double)v[4 * n + k], child = (double)v[E * n + k], was = (double)u[4 * n + k];
            CHECK_WITHIN(parent + child, 2 * was, 1e-7);
            size += was * was, moved += (child - was) * (child - was);
            CHECK_BITS(w[4 * n + k], u[4 * n + k]);
            if (test_bits(w[E * n + k]) == test_bits(u[4 * n + k])) { same++; continue; }
            drawn++, old += was, old_squares += was * was;
            sum += (double)w[E * n + k], squares += (double)w[E * n + k] * (double)w[E * n + k];
        }
        CHECK_NEAR(sqrt(moved / size), 0.1, 0.1);
        CHECK(same == n / 2); /* half of the units, whole */
        double deviation = sqrt(old_squares / drawn - pow(old / drawn, 2));
        CHECK_WITHIN(sum / drawn, old / drawn, 0.3 * deviation);
        CHECK_NEAR(sqrt(squares / drawn - pow(sum / drawn, 2)), deviation, 0.2);
        free(u), free(v), free(w);
    }
    moe_layer_free(c);
    for (size_t units = 1; units < F; units++) { /* a share that float cannot hold is still so many units */
        if (!CHECK_OK(moe_layer_clone(&c, m, 4, 0, (float)units / F, 9))) return;
        float *u = tensor_of(m, "experts.w1"), *v = tensor_of(c, "experts.w1");
        size_t drawn = 0;
        for (size_t k = 0; k < F; k++) drawn += test_bits(v[E * D * F + k]) != test_bits(u[4 * D * F + k]);
        CHECK(drawn == units);
        free(u), free(v);
        moe_layer_free(c);
    }
    CHECK_STATUS(moe_layer_clone(&c, m, 4, -1, 0, 9), MOE_E_GROWTH_NOISE);
    CHECK_STATUS(moe_layer_clone(&c, m, 4, 0, 1.5f, 9), MOE_E_GROWTH_SHARE);
    CHECK_STATUS(moe_layer_clone(&c, m, 4, NAN, 0, 9), MOE_E_GROWTH_NOISE);
    moe_layer_free(m), moe_layer_free(h);
}
/* Where columns are scaled and an expert has several, the turn is by the length of its own: unit gap along e0, so a
 * column of length 4 moves by 4 / 4 in that direction, whatever length the columns of others have. */
static void revive_slots(void) {
    moe_desc d = plain();
    moe_layer *m = NULL, *r = NULL;
    float unit[D] = {1}, column[D * 2 * E];
    moe_growth_data along = {NULL, 0, NULL, unit, 0};
    CHECK_OK(moe_desc_system(&d, "soft-moe"));
    d.soft_slots = 2;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    for (size_t i = 0; i < D * 2 * E; i++) column[i] = i / (2 * E) == 1 ? (i % (2 * E) == 3 ? 64.0f : 4.0f) : 0.0f;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", column, D * 2 * E));
    if (!CHECK_OK(moe_layer_revive(&r, m, 3, 2, &along))) return;
    float *router = tensor_of(r, "router");
    for (size_t slot = 0; slot < 2; slot++) {
        CHECK_NEAR(router[6 + slot], 1.0f, 1e-6);
        CHECK_NEAR(router[4 + slot], -1.0f, 1e-6);
    }
    free(router);
    moe_layer_free(m), moe_layer_free(r);
}
static void test_revive(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 2), *r = NULL;
    float x[T * D], y[T * D], loss[T];
    tokens(58, T, x);
    for (size_t t = 0; t < T; t++) loss[t] = t < 4 ? 5.0f : 0.0f;
    moe_growth_data data = {x, T, NULL, NULL, 0}, worst_served = {x, T, loss, NULL, 0};
    if (!CHECK_OK(moe_layer_revive(&r, m, 6, 1, &data))) return;
    CHECK(moe_layer_desc(r)->n_experts == E);
    float *u = tensor_of(m, "experts.w2"), *v = tensor_of(r, "experts.w2");
    CHECK_SAME(v + 6 * D * F, u + 1 * D * F, D * F);
    CHECK_SAME(v, u, 6 * D * F);
    free(v);
    moe_layer_side(m)->evaluate = moe_layer_side(r)->evaluate = 1;
    CHECK_OK(moe_forward(m, x, T, y)), CHECK_OK(moe_forward(r, x, T, y));
    const float *old = moe_layer_tape(m)->logits, *now = moe_layer_tape(r)->logits;
    int sides[2] = {0, 0};
    for (size_t t = 0; t < T; t++) { /* their mean is the busy one's, less gap / 2 */
        CHECK_WITHIN(0.5f * (now[t * E + 6] + now[t * E + 1]), old[t * E + 1] - 0.5f, 1e-6);
        sides[now[t * E + 6] > now[t * E + 1]]++;
    }
    CHECK(sides[0] > T / 5 && sides[1] > T / 5);
    moe_layer_free(r);
    if (CHECK_OK(moe_layer_revive(&r, m, 6, MOE_GROWTH_END, &worst_served))) {
        double sum[D], length = 0;
        float *router = tensor_of(r, "router");
        for (size_t i = 0; i < D; i++) {
            sum[i] = 0;
            for (size_t t = 0; t < 4; t++) sum[i] += (double)x[t * D + i];
            length += sum[i] * sum[i];
        }
        for (size_t i = 0; i < D; i++) CHECK_WITHIN(router[i * E + 6], sum[i] / sqrt(length), 3e-7);
        v = tensor_of(r, "experts.w2");
        CHECK(memcmp(v + 6 * D * F, u + 6 * D * F, D * F * sizeof *v));
        free(router), free(v);
    }
    moe_layer *no = m;
    revive_slots();
    CHECK_STATUS(moe_layer_revive(&no, m, 6, 6, &data), MOE_E_GROWTH_TWICE);
    CHECK_STATUS(moe_layer_revive(&no, m, 6, E, &data), MOE_E_GROWTH_EXPERT);
    CHECK_STATUS(moe_layer_revive(&no, m, 6, MOE_GROWTH_END, NULL), MOE_E_NULL_X);
    CHECK_STATUS(moe_layer_revive(&no, m, 6, MOE_GROWTH_END, &data), MOE_E_GROWTH_DIRECTION); /* all were served */
    free(u);
    moe_layer_free(m), moe_layer_free(r);
}
/* The columns of w1 of orthonormal expert e, and the rows of its w2, at right angles; columns of length 1. */
static void columns_orthonormal(const moe_layer *m, size_t e) {
    float *w1 = tensor_of(m, "experts.w1"), *w2 = tensor_of(m, "experts.w2");
    size_t d = moe_layer_desc(m)->d_model, f = moe_layer_desc(m)->d_ff;
    for (size_t a = 0; a < f; a++)
        for (size_t b = 0; b <= a; b++) {
            double in = 0, out = 0;
            for (size_t i = 0; i < d; i++) {
                in += (double)w1[(e * d + i) * f + a] * (double)w1[(e * d + i) * f + b];
                out += (double)w2[(e * f + a) * d + i] * (double)w2[(e * f + b) * d + i];
            }
            CHECK_WITHIN(in, a == b, 3e-6);
            if (a != b) CHECK_WITHIN(out, 0, 3e-6);
        }
    free(w1), free(w2);
}
/* A dense network of 2 F hidden units, in double. */
static void dense_y(const moe_expert_weights *w, size_t f, const float *x, double *y) {
    double h[4 * F];
    for (size_t c = 0; c < f; c++) {
        double gate = (double)w->b1[c], up = (double)w->bu[c];
        for (size_t i = 0; i < D; i++) {
            gate += (double)x[i] * (double)w->w1[i * f + c];
            up += (double)x[i] * (double)w->wu[i * f + c];
        }
        h[c] = gate / (1 + exp(-gate)) * up;
    }
    for (size_t i = 0; i < D; i++) {
        y[i] = (double)w->b2[i];
        for (size_t c = 0; c < f; c++) y[i] += h[c] * (double)w->w2[c * D + i];
    }
}
/* Descs as text over `plain`, of copies of the whole dense network: what they compute, or why they cannot. */
static void upcycle_texts(const moe_expert_weights *w, const float *x) {
    static float zeros[4 * F];
    static const struct { const char *text; moe_status status; } rows[] = {
        {"select=all gate=sigmoid top_k=8", MOE_OK}, {"combine=robust normalize=false", MOE_OK}, {"bias=false", MOE_OK},
        {"expert=orthonormal d_ff=12 bias=false", MOE_OK}, {"select=all gate=softmax top_k=8", MOE_OK},
        {"combine=soft select=all gate=softmax", MOE_E_GROWTH_UPCYCLE}, {"gate=relu select=threshold",
        MOE_E_GROWTH_UPCYCLE}, {"gate=sparsemixer select=sampled", MOE_E_GROWTH_UPCYCLE},
        {"select=expert-choice normalize=false", MOE_E_GROWTH_UPCYCLE}, {"d_model=0", MOE_E_D_MODEL}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc d = plain();
        moe_layer *m = NULL;
        moe_expert_weights dense = *w;
        float y[T * D];
        d.router_init = MOE_INIT_ZERO;
        if (!CHECK_OK(moe_desc_parse(&d, rows[i].text, NULL))) printf("        %s\n", rows[i].text);
        int ok = CHECK_STATUS(moe_layer_upcycle(&m, &d, &dense, F, 0, 0), rows[i].status);
        if (!ok) printf("        %s\n", rows[i].text);
        if (!CHECK((m != NULL) == (rows[i].status == MOE_OK)) || !m) continue;
        if (d.bias == MOE_OFF) dense.b1 = dense.bu = dense.b2 = zeros; /* those of the dense network have no place */
        CHECK_OK(moe_forward(m, x, T, y));
        for (size_t t = 0; t < T && d.expert != MOE_EXPERT_ORTHONORMAL; t++) {
            double want[D];
            dense_y(&dense, F, x + t * D, want);
            for (size_t k = 0; k < D; k++) ok &= CHECK_WITHIN(y[t * D + k], want[k], 1e-5);
        }
        if (d.expert == MOE_EXPERT_ORTHONORMAL) columns_orthonormal(m, 0);
        if (!ok) printf("        %s\n", rows[i].text);
        moe_layer_free(m);
    }
}
static void test_upcycle(void) {
    static float w1[D * 4 * F], wu[D * 4 * F], w2[4 * F * D], b1[4 * F], bu[4 * F], b2[D], x[T * D], y[T * D];
    moe_expert_weights w = {w1, wu, w2, b1, bu, b2};
    float *all[] = {w1, wu, w2, b1, bu, b2};
    const size_t length[] = {D * 4 * F, D * 4 * F, 4 * F * D, 4 * F, 4 * F, D};
    for (int i = 0; i < 6; i++) test_fill(all[i], length[i], -0.4f, 0.4f);
    tokens(59, T, x);
    static const struct {
        moe_gate_kind gate;
        int normalize;
        size_t parts, k;
        float scale;
        moe_init_kind init;
    } rows[] = {
        {MOE_GATE_SOFTMAX, MOE_ON, 1, 2, 0, MOE_INIT_UNIFORM}, {MOE_GATE_SOFTMAX, MOE_OFF, 1, 2, 0, MOE_INIT_ZERO},
        {MOE_GATE_SIGMOID, MOE_OFF, 1, 3, 2.5f, MOE_INIT_ZERO}, {MOE_GATE_SOFTMAX, MOE_ON, 2, 4, 0, MOE_INIT_UNIFORM},
        {MOE_GATE_SOFTMAX, MOE_OFF, 4, 4, 0.5f, MOE_INIT_ZERO},
        {MOE_GATE_SOFTMAX_SELECTED, MOE_OFF, 1, 2, 0, MOE_INIT_UNIFORM}};
    upcycle_texts(&w, x);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc d = plain();
        moe_layer *m = NULL;
        d.gate = rows[i].gate, d.normalize = rows[i].normalize, d.top_k = rows[i].k, d.weight_scale = rows[i].scale;
        d.router_init = rows[i].init, d.n_shared = 1;
        if (!CHECK_OK(moe_layer_upcycle(&m, &d, &w, rows[i].parts * F, 0, 0))) continue;
        CHECK_OK(moe_forward(m, x, T, y));
        for (size_t t = 0; t < T; t++) {
            double want[D];
            dense_y(&w, rows[i].parts * F, x + t * D, want);
            for (size_t k = 0; k < D; k++) CHECK_WITHIN(y[t * D + k], want[k], 1e-5);
        }
        train(m, 1, 600);
        moe_layer_free(m);
    }
    moe_desc d = plain();
    moe_layer *m = NULL, *n = NULL;
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, F + 1, 0, 0), MOE_E_GROWTH_DENSE_FF);
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, 4 * F, 0, 0), MOE_E_GROWTH_DENSE_FF); /* k = 2 */
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, 3 * F, 0, 0), MOE_E_GROWTH_DENSE_FF); /* E = 8 */
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, F - 1, 0, 0), MOE_E_GROWTH_DENSE_FF);
    CHECK_STATUS(moe_layer_upcycle(NULL, &d, &w, F, 0, 0), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_upcycle(&m, &d, NULL, F, 0, 0), MOE_E_NULL_WEIGHT);
    const float shares[] = {-0.1f, 1.1f, NAN};
    for (int i = 0; i < 3; i++) {
        moe_expert_weights less = w;
        if (i == 0) less.w1 = NULL;
        if (i == 1) less.wu = NULL;
        if (i == 2) less.w2 = NULL;
        CHECK_STATUS(moe_layer_upcycle(&m, &d, &less, F, 0, 0), MOE_E_NULL_WEIGHT);
        CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, F, shares[i], 0), MOE_E_GROWTH_SHARE);
    }
    d.top_k = E + 1;
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, F, 0, 0), MOE_E_TOP_K);
    d.top_k = 2, d.d_ff = 257; /* one column more than are copied at a time */
    static float wide[D * 257];
    const moe_expert_weights square = {wide, wide, wide, NULL, NULL, NULL};
    test_fill(wide, D * 257, -1, 1);
    if (CHECK_OK(moe_layer_upcycle(&m, &d, &square, 257, 0, 0))) {
        float *u = tensor_of(m, "experts.w1");
        CHECK_SAME(u, wide, D * 257);
        free(u);
    }
    moe_layer_free(m), m = NULL;
    d.d_ff = F, d.n_zero = 1;
    CHECK_STATUS(moe_layer_upcycle(&m, &d, &w, F, 0, 0), MOE_E_GROWTH_UPCYCLE);
    d.n_zero = 0;
    if (CHECK_OK(moe_layer_upcycle(&m, &d, &w, F, 0, 3)) && CHECK_OK(moe_layer_upcycle(&n, &d, &w, F, 0.5f, 3))) {
        float *u = tensor_of(m, "experts.w1"), *v = tensor_of(n, "experts.w1");
        for (size_t e = 0; e < E; e++) { /* whole units, half of them, others in each expert */
            size_t units = 0;
            for (size_t c = 0; c < F; c++) {
                size_t changed = 0;
                for (size_t r = 0; r < D; r++) changed += u[e * D * F + r * F + c] != v[e * D * F + r * F + c];
                CHECK(changed == 0 || changed == D);
                units += changed > 0;
            }
            CHECK(units == F / 2);
        }
        CHECK(memcmp(v, v + D * F, D * F * sizeof *v) != 0);
        free(u), free(v);
    }
    moe_layer_free(m), moe_layer_free(n);
}
/* Clones where there is less: no moments, no biases, columns that stay orthonormal; splits of a softmax over all whose
 * temperature moves, and by gate alone. */
static void test_systems_grow(void) {
    static const char *const texts[] = {"training=false", "bias=false", "bias=false expert=orthonormal d_ff=12",
                                        "n_zero=1", "select=all gate=sigmoid", "select=all combine=robust",
                                        "select=all temperature=2 temperature_end=0.5 schedule_steps=4"};
    float x[T * D], y[T * D], z[T * D];
    tokens(64, T, x);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        moe_desc d = plain();
        moe_layer *m = NULL, *c = NULL, *s = NULL;
        moe_growth_data one = {x, 1, NULL, NULL, 0};
        CHECK_OK(moe_desc_parse(&d, texts[i], NULL));
        if (!CHECK_OK(moe_layer_new(&m, &d))) { printf("        %s\n", texts[i]); continue; }
        if (CHECK_OK(moe_layer_clone(&c, m, 1, 0.01f, 0.5f, 3))) {
            CHECK(moe_layer_desc(c)->n_experts == E + 1);
            CHECK_OK(moe_forward(c, x, T, y));
            if (d.expert == MOE_EXPERT_ORTHONORMAL) columns_orthonormal(c, 1), columns_orthonormal(c, E);
        }
        if (CHECK_OK(moe_layer_split(&s, m, 1, &one))) { /* by one token's gate: it begins as one */
            int dense = d.select == MOE_SELECT_ALL && d.gate != MOE_GATE_SIGMOID && d.combine != MOE_COMBINE_ROBUST;
            moe_layer_side(m)->evaluate = moe_layer_side(s)->evaluate = 1;
            CHECK_OK(moe_forward(m, x, T, y)), CHECK_OK(moe_forward(s, x, T, z));
            int ok = dense ? CHECK_WITHIN(worst(z, y, T * D), 0, 1e-3) : CHECK_SAME(z, y, T * D);
            CHECK((moe_layer_desc(s)->n_bound == 1) == !dense);
            if (!ok) printf("        %s\n", texts[i]);
        }
        moe_layer_free(m), moe_layer_free(c), moe_layer_free(s);
    }
}
/* What a desc has no worth of; and gradients before there are any. */
static void worth_refused(const float *x) {
    static const struct { const char *text; moe_worth_kind kind; moe_status status; } rows[] = {
        {"combine=soft select=all", MOE_WORTH_SALIENCY, MOE_E_GROWTH_WORTH},
        {"combine=merge select=all", MOE_WORTH_SALIENCY, MOE_E_GROWTH_WORTH},
        {"combine=robust", MOE_WORTH_SALIENCY, MOE_OK},
        {"training=false", MOE_WORTH_GRADIENT, MOE_E_INFERENCE}, {"", MOE_WORTH_GRADIENT, MOE_OK}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_desc d = plain();
        moe_layer *m = NULL;
        double worth[E], sum = 0;
        CHECK_OK(moe_desc_parse(&d, rows[i].text, NULL));
        if (!CHECK_OK(moe_layer_new(&m, &d))) { printf("        %s\n", rows[i].text); continue; }
        if (!CHECK_STATUS(moe_layer_worth(m, rows[i].kind, x, T, worth), rows[i].status))
            printf("        %s\n", rows[i].text);
        for (size_t e = 0; e < E && !rows[i].status; e++) sum += worth[e];
        if (!rows[i].status) CHECK((sum > 0) == (rows[i].kind == MOE_WORTH_SALIENCY));
        moe_layer_free(m);
    }
}
static void test_worth(void) {
    moe_desc d = plain();
    d.n_copy = 1;
    moe_layer *m = trained(&d, 2), *s = NULL;
    float x[T * D], y[T * D];
    double usage[E], gate[E], saliency[E], gradient[E];
    tokens(60, T, x);
    CHECK_OK(moe_layer_worth(m, MOE_WORTH_USAGE, x, T, usage));
    CHECK_OK(moe_layer_worth(m, MOE_WORTH_GATE, x, T, gate));
    CHECK_OK(moe_layer_worth(m, MOE_WORTH_SALIENCY, x, T, saliency));
    moe_layer_side(m)->evaluate = 1;
    CHECK_OK(moe_forward(m, x, T, y));
    const moe_tape *tape = moe_layer_tape(m);
    float *w[6];
    for (int i = 0; i < 6; i++) w[i] = tensor_of(m, expert_names[i]);
    for (size_t e = 0; e < E; e++) {
        double n = 0, weights = 0, norms = 0;
        for (size_t t = 0; t < T; t++)
            for (size_t k = 0; k < 2; k++) {
                if (tape->index[t * 2 + k] != (int32_t)e) continue;
                double out[D], square = 0;
                n++, weights += (double)tape->weight[t * 2 + k];
                if (e == E - 1) continue; /* a copy */
                moe_expert_weights one = {w[0] + e * D * F, w[1] + e * D * F, w[2] + e * D * F, w[3] + e * F,
                                          w[4] + e * F, w[5] + e * D};
                dense_y(&one, F, x + t * D, out);
                for (size_t i = 0; i < D; i++) square += out[i] * out[i];
                norms += (double)tape->weight[t * 2 + k] * sqrt(square);
            }
        CHECK_WITHIN(usage[e], n / T, 2e-15);
        CHECK_WITHIN(gate[e], n > 0 ? weights / n : 0, 1e-7);
        CHECK_WITHIN(saliency[e], n > 0 ? norms / n : 0, 7e-8);
    }
    for (int i = 0; i < 6; i++) free(w[i]);
    moe_layer_side(m)->evaluate = 0;
    if (!CHECK_OK(moe_layer_split(&s, m, 0, NULL))) return;
    CHECK_OK(moe_forward(s, x, T, y)), CHECK_OK(moe_backward(s, x, NULL));
    CHECK_OK(moe_layer_worth(s, MOE_WORTH_GRADIENT, NULL, 0, gradient));
    double want[E + 1];
    memset(want, 0, sizeof want);
    for (int i = 0; i < 6; i++) {
        float *g = part_of(s, MOE_PART_GRADS, expert_names[i]);
        for (size_t k = 0; k < E * expert_length(i); k++) want[k / expert_length(i)] += (double)g[k] * (double)g[k];
        free(g);
    }
    for (size_t e = 0; e < E - 1; e++) CHECK_NEAR(gradient[e], sqrt(want[e] + (e ? 0 : want[E - 1])), 5e-15);
    CHECK(gradient[E - 1] == 0);
    const float elsewhere[] = {8, -1, 1e30f};
    for (int i = 0; i < 3; i++) { /* what a file may hold */
        CHECK_OK(moe_layer_set(s, MOE_PART_PARAMS, "router.pair_parent", elsewhere + i, 1));
        CHECK_STATUS(moe_layer_worth(s, MOE_WORTH_GRADIENT, NULL, 0, gradient), MOE_E_PAIR);
    }
    worth_refused(x);
    CHECK_STATUS(moe_layer_worth(NULL, MOE_WORTH_USAGE, x, T, usage), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_worth(m, MOE_WORTH_USAGE, x, SIZE_MAX / 8, usage), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_layer_worth(m, MOE_WORTH_COUNT, x, T, usage), MOE_E_GROWTH_WORTH);
    CHECK_STATUS(moe_layer_worth(m, MOE_WORTH_USAGE, x, 0, usage), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_layer_worth(m, MOE_WORTH_USAGE, NULL, T, usage), MOE_E_NULL_X);
    CHECK_STATUS(moe_layer_worth(m, MOE_WORTH_USAGE, x, T, NULL), MOE_E_NULL_OUT);
    CHECK(!strcmp(moe_worth_name(MOE_WORTH_SALIENCY), "saliency") && !moe_worth_name(MOE_WORTH_COUNT));
    moe_layer_free(m), moe_layer_free(s);
}

/* ---- memory and arguments ---- */
typedef struct operation {
    const char *name;
    moe_status (*run)(moe_layer **out, const moe_layer *m, const float *x);
} operation;
static moe_status do_split(moe_layer **out, const moe_layer *m, const float *x) {
    moe_growth_data data = {x, T, NULL, NULL, 0};
    return moe_layer_split(out, m, 1, &data);
}
static moe_status do_release(moe_layer **out, const moe_layer *m, const float *x) {
    moe_layer *s = NULL;
    moe_status status = do_split(&s, m, x);
    *out = NULL;
    if (!status) status = moe_layer_release(out, s, 0);
    moe_layer_free(s);
    return status;
}
static moe_status do_clone(moe_layer **out, const moe_layer *m, const float *x) {
    (void)x;
    return moe_layer_clone(out, m, 1, 0.1f, 0.5f, 0);
}
static moe_status do_add(moe_layer **out, const moe_layer *m, const float *x) {
    float loss[T];
    for (size_t t = 0; t < T; t++) loss[t] = (float)t;
    moe_growth_data data = {x, T, loss, NULL, 0};
    return moe_layer_add(out, m, MOE_GROWTH_END, &data, NULL);
}
static moe_status do_merge(moe_layer **out, const moe_layer *m, const float *x) {
    (void)x;
    return moe_layer_merge(out, m, 1, 4, NULL);
}
static moe_status do_merge_to(moe_layer **out, const moe_layer *m, const float *x) {
    return moe_layer_merge_to(out, m, 3, x, T, NULL);
}
static moe_status do_prune(moe_layer **out, const moe_layer *m, const float *x) {
    const size_t which[] = {0, 3};
    (void)x;
    return moe_layer_prune(out, m, 2, which);
}
static moe_status do_revive(moe_layer **out, const moe_layer *m, const float *x) {
    moe_growth_data data = {x, T, NULL, NULL, 0};
    return moe_layer_revive(out, m, 2, 5, &data);
}
static moe_status do_upcycle(moe_layer **out, const moe_layer *m, const float *x) {
    static float w[F * D];
    moe_expert_weights dense = {w, w, w, NULL, NULL, NULL};
    (void)x;
    return moe_layer_upcycle(out, moe_layer_desc(m), &dense, F, 0.5f, 0);
}
static moe_status do_dynmoe(moe_layer **out, const moe_layer *m, const float *x) {
    moe_health h;
    moe_status status = moe_layer_health((moe_layer *)(uintptr_t)m, &h);
    return status ? status : moe_layer_dynmoe(out, m, &h, x, 1, 0, 0);
}
static moe_status do_worth(moe_layer **out, const moe_layer *m, const float *x) {
    double worth[E];
    *out = NULL;
    return moe_layer_worth(m, MOE_WORTH_SALIENCY, x, T, worth);
}
static const operation operations[] = {
    {"split", do_split}, {"release", do_release}, {"clone", do_clone}, {"add", do_add}, {"merge", do_merge},
    {"merge_to", do_merge_to}, {"prune", do_prune}, {"revive", do_revive}, {"upcycle", do_upcycle},
    {"dynmoe", do_dynmoe}, {"worth", do_worth}};
static void test_allocations_fail(void) {
    moe_desc d = plain();
    d.controller = MOE_CONTROL_ID;
    moe_layer *m = trained(&d, 2);
    float x[T * D];
    tokens(61, T, x);
    size_t bytes = 0;
    CHECK_OK(moe_layer_save_size(m, 1, &bytes));
    unsigned char *before = (unsigned char *)test_memory(bytes, 1), *after = (unsigned char *)test_memory(bytes, 1);
    CHECK_OK(moe_layer_save_memory(m, 1, before, bytes));
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        for (long n = 0;; n++) {
            moe_layer *out = m;
            long live = test_live_blocks;
            test_fail_at = n;
            moe_status status = operations[i].run(&out, m, x);
            test_fail_at = -1;
            if (status == MOE_OK) {
                if (!CHECK(n > 0)) printf("    ... %s\n", operations[i].name);
                moe_layer_free(out);
            } else CHECK_STATUS(status, MOE_E_NO_MEMORY), CHECK(out == NULL);
            int ok = CHECK(test_live_blocks == live);
            CHECK_OK(moe_layer_save_memory(m, 1, after, bytes));
            ok &= CHECK(!memcmp(before, after, bytes));
            if (!ok) printf("    ... %s, allocation %ld\n", operations[i].name, n);
            if (status == MOE_OK || !CHECK(n < 100)) break;
        }
    free(before), free(after);
    moe_layer_free(m);
}
/* DynMoE's window: of what tape, and into what; no more experts than it may have. */
static void dynmoe_refused(moe_layer *m, const float *x) {
    const uint64_t other[2] = {1, 1};
    const size_t bytes_of_sum = D * sizeof(float);
    moe_desc d = plain();
    moe_layer *no = NULL, *bound = NULL;
    moe_tape *tape = NULL;
    moe_health h, few;
    float sum[D], y[T * D];
    uint64_t count = 0;
    memset(sum, 0, bytes_of_sum), memset(&few, 0, sizeof few);
    few.n_experts = 2, few.load = (uint64_t *)(uintptr_t)other;
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_layer_health(m, &h));
    CHECK_STATUS(moe_layer_dynmoe(&no, m, &few, NULL, 0, 0, 0), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_layer_dynmoe(&no, m, &h, NULL, 1, 0, 0), MOE_E_NULL_X);
    CHECK_STATUS(moe_layer_dynmoe(&no, m, &h, sum, 1, 0, 0), MOE_E_GROWTH_DIRECTION);
    for (size_t most = E; most <= E + 1; most++) {
        size_t kept = 0;
        for (size_t e = 0; e < E; e++) kept += h.load[e] > 0;
        if (CHECK_OK(moe_layer_dynmoe(&no, m, &h, x, 1, kept + (most - E), 0)))
            CHECK(moe_layer_desc(no)->n_experts == kept + (most - E));
        moe_layer_free(no);
    }
    if (CHECK_OK(moe_layer_split(&bound, m, 1, NULL)))
        CHECK_STATUS(moe_layer_dynmoe(&no, bound, &h, NULL, 0, 0, 0), MOE_E_GROWTH_PAIRED);
    moe_layer_free(bound);
    for (int random = 0; random < 2; random++) {
        if (random) d.score = MOE_SCORE_RANDOM;
        if (!CHECK_OK(moe_tape_new(&tape, &d, T, MOE_ON))) return;
        CHECK_STATUS(moe_growth_unserved(NULL, sum, &count), MOE_E_NULL_TAPE);
        CHECK_STATUS(moe_growth_unserved(tape, NULL, &count), MOE_E_NULL_OUT);
        CHECK_STATUS(moe_growth_unserved(tape, sum, NULL), MOE_E_NULL_OUT);
        CHECK_STATUS(moe_growth_unserved(tape, sum, &count), MOE_E_NO_ROUTES);
        static float router[D * E];
        CHECK_OK(moe_route(tape, router, x, T));
        CHECK_STATUS(moe_growth_unserved(tape, sum, &count), random ? MOE_E_GROWTH_SCORE : MOE_OK);
        CHECK(count == 0);
        moe_tape_free(tape);
    }
}
static void test_arguments(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 1), *s = NULL, *no = m, *one = NULL;
    float x[T * D], y[T * D], zero[D];
    const size_t twice[] = {1, 1}, beyond = E, all[E] = {0, 1, 2, 3, 4, 5, 6, 7}, pair = 1, last = 0;
    const double bad[E] = {1, 1, -1, 1, 1, 1, 1, 1};
    memset(zero, 0, sizeof zero);
    moe_growth_data flat = {NULL, 0, NULL, zero, 0}, nothing = {x, 0, NULL, NULL, 0};
    tokens(62, T, x);
    CHECK_STATUS(moe_layer_split(NULL, m, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_split(&no, NULL, 1, NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_layer_split(&no, m, E, NULL), MOE_E_GROWTH_EXPERT);
    CHECK_STATUS(moe_layer_split(&no, m, 1, &flat), MOE_E_GROWTH_DIRECTION);
    CHECK_STATUS(moe_layer_split(&no, m, 1, &nothing), MOE_E_NO_TOKENS);
    CHECK(no == NULL);
    CHECK_STATUS(moe_layer_prune(&no, m, 1, &beyond), MOE_E_GROWTH_EXPERT);
    CHECK_STATUS(moe_layer_prune(&no, m, 2, twice), MOE_E_GROWTH_TWICE);
    CHECK_STATUS(moe_layer_prune(&no, m, E, all), MOE_E_GROWTH_LAST);
    CHECK_STATUS(moe_layer_prune(&no, m, E - 1, all), MOE_E_TOP_K);
    CHECK_STATUS(moe_layer_prune(&no, m, 1, NULL), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_layer_merge(&no, m, 1, 1, NULL), MOE_E_GROWTH_TWICE);
    CHECK_STATUS(moe_layer_merge(&no, m, 1, E, NULL), MOE_E_GROWTH_EXPERT);
    CHECK_STATUS(moe_layer_merge(&no, m, 1, 2, bad), MOE_E_GROWTH_USAGE);
    CHECK_STATUS(moe_layer_release(&no, m, 0), MOE_E_GROWTH_NO_PAIR);
    CHECK_STATUS(moe_layer_add(&no, m, E + 1, &flat, NULL), MOE_E_GROWTH_EXPERT);
    CHECK_STATUS(moe_layer_add(&no, m, E, NULL, NULL), MOE_E_NULL_X);
    if (CHECK_OK(moe_layer_shard(m, 1, 2, &s))) { /* half of its experts are elsewhere */
        moe_growth_donor half = {s, 0};
        CHECK_STATUS(moe_layer_add(&no, m, E, NULL, &half), MOE_E_SHARD);
        moe_layer_free(s);
    }
    const float far[] = {-0.5f, NAN, INFINITY}, beyond_one[] = {-0.5f, NAN, 1.5f};
    const double infinite[E] = {1, HUGE_VAL, 1, 1, 1, 1, 1, 1}, unused[E] = {0, 0, 0, 0, 0, 0, 0, 0};
    float loss[T];
    for (size_t t = 0; t < T; t++) loss[t] = t == 3 ? NAN : 1;
    for (size_t i = 0; i < D; i++) x[i] = 1e30f;
    moe_growth_data nowhere = {NULL, 0, NULL, NULL, 0}, long_one = {NULL, 0, NULL, x, 0}, lossy = {y, T, loss, NULL, 0};
    moe_growth_data vast = {y, SIZE_MAX / 2, NULL, NULL, 0}, not_numbers = {x, 1, NULL, NULL, 0};
    tokens(62, T, y);
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(moe_layer_clone(&no, m, 1, far[i], 0, 0), MOE_E_GROWTH_NOISE);
        CHECK_STATUS(moe_layer_clone(&no, m, 1, 0, beyond_one[i], 0), MOE_E_GROWTH_SHARE);
    }
    CHECK_STATUS(moe_layer_add(&no, m, E, &nowhere, NULL), MOE_E_NULL_X);
    CHECK_STATUS(moe_layer_add(&no, m, E, &long_one, NULL), MOE_E_GROWTH_DIRECTION); /* its square is no float */
    CHECK_STATUS(moe_layer_add(&no, m, E, &lossy, NULL), MOE_E_GROWTH_DIRECTION);
    CHECK_STATUS(moe_layer_split(&no, m, 1, &vast), MOE_E_OVERFLOW);
    x[0] = NAN;
    CHECK_STATUS(moe_layer_split(&no, m, 1, &not_numbers), MOE_E_NAN_X);
    tokens(62, T, x);
    CHECK_STATUS(moe_layer_merge(&no, m, 1, 2, infinite), MOE_E_GROWTH_USAGE);
    CHECK_STATUS(moe_layer_merge_to(&no, m, 2, x, T, infinite), MOE_E_GROWTH_USAGE);
    if (CHECK_OK(moe_layer_merge(&s, m, 1, 2, unused))) { /* nobody's mean is everybody's */
        if (CHECK_OK(moe_layer_merge(&no, m, 1, 2, NULL))) CHECK(moe_layer_hash(s) == moe_layer_hash(no));
        moe_layer_free(s), moe_layer_free(no);
    }
    if (CHECK_OK(moe_layer_prune(&s, m, 0, NULL))) CHECK(moe_layer_hash(s) == moe_layer_hash(m));
    moe_layer_free(s);
    static const moe_layer_formats small = {MOE_FORMAT_INT8, NULL, MOE_OFF, 0, NULL};
    for (int kind = 0; kind < 2; kind++) { /* neither is changed, nor gives an expert */
        moe_status want = kind ? MOE_E_SHARD : MOE_E_QUANTISED;
        if (!CHECK_OK(kind ? moe_layer_shard(m, 1, 2, &s) : moe_layer_quantize(m, &small, &s))) continue;
        const moe_growth_donor donor = {s, 0};
        double worth[E];
        CHECK_STATUS(moe_layer_split(&no, s, 1, NULL), want);
        CHECK_STATUS(moe_layer_add(&no, m, E, NULL, &donor), kind ? MOE_E_SHARD : MOE_E_GROWTH_DONOR);
        if (kind) CHECK_STATUS(moe_layer_worth(s, MOE_WORTH_USAGE, x, T, worth), MOE_E_SHARD);
        moe_layer_free(s);
    }
    const moe_growth_donor nobody = {NULL, 0};
    CHECK_STATUS(moe_layer_add(&no, m, E, NULL, &nobody), MOE_E_GROWTH_DONOR);
    dynmoe_refused(m, x);
    CHECK_STATUS(moe_layer_dynmoe(&no, m, NULL, NULL, 0, 0, 0), MOE_E_NULL_HEALTH);
    if (CHECK_OK(moe_layer_split(&s, m, 1, NULL))) { /* pairs are left alone; others may change */
        const size_t other = 0;
        CHECK_STATUS(moe_layer_split(&no, s, 1, NULL), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_prune(&no, s, 1, &pair), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_merge(&no, s, 1, 2, NULL), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_clone(&no, s, 1, 0, 0, 0), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_revive(&no, s, 1, 2, NULL), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_merge_to(&no, s, 3, x, T, NULL), MOE_E_GROWTH_PAIRED);
        CHECK_STATUS(moe_layer_release(&no, s, -0.5f), MOE_E_GROWTH_GAP);
        CHECK_STATUS(moe_layer_release(&no, s, NAN), MOE_E_GROWTH_GAP);
        CHECK_STATUS(moe_layer_release(&no, s, INFINITY), MOE_E_GROWTH_GAP);
        if (CHECK_OK(moe_layer_prune(&no, s, 1, &other))) { /* the parent is 0 now, and its child still follows */
            float *parent = tensor_of(no, "router.pair_parent");
            float *u = tensor_of(s, "experts.w1"), *v = tensor_of(no, "experts.w1");
            CHECK(parent[0] == 0.0f);
            CHECK_SAME(v, u + D * F, E * D * F);
            free(parent), free(u), free(v);
            train(no, 1, 700);
            moe_layer_free(no);
        }
        if (CHECK_OK(moe_layer_split(&no, s, 2, NULL))) { /* no expert has two children */
            const float both[] = {1, 1};
            CHECK_OK(moe_layer_set(no, MOE_PART_PARAMS, "router.pair_parent", both, 2));
            CHECK_STATUS(moe_forward(no, x, T, y), MOE_E_PAIR);
            moe_layer_free(no), no = NULL;
        }
        float wrong[] = {8, -1, 0.5f, 1e30f};
        for (int i = 0; i < 4; i++) { /* what a file may hold */
            CHECK_OK(moe_layer_set(s, MOE_PART_PARAMS, "router.pair_parent", wrong + i, 1));
            CHECK_STATUS(moe_forward(s, x, T, y), MOE_E_PAIR);
            CHECK_STATUS(moe_layer_release(&no, s, 0), MOE_E_PAIR);
        }
        moe_layer_free(s);
    }
    CHECK_OK(moe_forward(m, x, T, y)), CHECK_OK(moe_backward(m, x, NULL));
    for (size_t i = 0; i < sizeof operations / sizeof *operations - 3; i++)
        if (!CHECK_STATUS(operations[i].run(&no, m, x), MOE_E_GROWTH_GRADS)) printf("    ... %s\n", operations[i].name);
    CHECK_OK(moe_layer_scale_grads(m, 0));
    if (CHECK_OK(do_split(&s, m, x))) moe_layer_free(s);
    /* what no longer fits says so */
    d.select = MOE_SELECT_GROUPS, d.n_groups = 4, d.top_groups = 2;
    s = trained(&d, 1);
    CHECK_STATUS(moe_layer_prune(&no, s, 1, &pair), MOE_E_GROUPS);
    moe_layer *bound = NULL;
    if (CHECK_OK(moe_layer_split(&bound, s, 1, NULL))) CHECK_STATUS(moe_layer_release(&no, bound, 0), MOE_E_GROUPS);
    moe_layer_free(s), moe_layer_free(bound);
    d = plain();
    d.n_experts = 1, d.top_k = 1;
    one = trained(&d, 1);
    CHECK_STATUS(moe_layer_prune(&no, one, 1, &last), MOE_E_GROWTH_LAST);
    d.n_bound = 2;
    CHECK_STATUS(moe_layer_new(&no, &d), MOE_E_N_BOUND);
    d.n_bound = 1, d.score = MOE_SCORE_HASH;
    CHECK_STATUS(moe_layer_new(&no, &d), MOE_E_N_BOUND);
    d = plain(), d.growth = 5;
    CHECK_STATUS(moe_layer_new(&no, &d), MOE_E_GROWTH_FLAG);
    moe_layer_free(m), moe_layer_free(one);
}

/* ---- the same bits: trained, split, saved, loaded, trained, released, trained ---- */
static uint64_t life(size_t threads, int save) {
    moe_desc d = plain();
    d.parallel.n_threads = threads, d.n_shared = 1, d.growth = MOE_ON, d.controller = MOE_CONTROL_BIAS;
    moe_layer *m = trained(&d, 3), *s = NULL, *r = NULL, *again = NULL;
    float x[T * D];
    uint64_t hash = 0;
    tokens(63, T, x);
    if (m) moe_layer_growth(m)->epoch = 9;
    if (!m || !CHECK_OK(do_split(&s, m, x))) return 0;
    if (save) {
        size_t bytes;
        CHECK_OK(moe_layer_save_size(s, 1, &bytes));
        unsigned char *file = (unsigned char *)test_memory(bytes, 1);
        CHECK_OK(moe_layer_save_memory(s, 1, file, bytes));
        if (CHECK_OK(moe_layer_load_memory(&again, file, bytes, &d))) {
            same_layers(s, again, 1);
            CHECK(moe_layer_growth(again)->epoch == 9);
            moe_layer_free(s);
            s = again;
        }
        free(file);
    }
    train(s, 3, 800);
    if (CHECK_OK(moe_layer_release(&r, s, 0))) train(r, 3, 850), hash = moe_layer_hash(r);
    moe_layer_free(m), moe_layer_free(s), moe_layer_free(r);
    return hash;
}
static void test_same_bits(void) {
    uint64_t first = life(1, 0);
    FOR_EACH_ISA(isa)
        for (size_t threads = 1; threads <= 3; threads++) CHECK(life(threads, (int)threads % 2) == first);
}

/* ---- the controller ---- */
typedef struct bed { moe_health h; void *memory; } bed; /* a health of n experts with these loads of 100 tokens */
static bed bed_of(size_t n, const uint64_t *load) {
    bed b;
    size_t bytes = 0;
    CHECK_OK(moe_health_size(n, &bytes));
    b.memory = test_memory(bytes, 1);
    CHECK_OK(moe_health_init(&b.h, n, b.memory, bytes));
    memcpy(b.h.load, load, n * sizeof *load);
    b.h.n_tokens = 100;
    for (size_t e = 0; e < n; e++) b.h.n_selected += load[e];
    CHECK_OK(moe_health_update(&b.h));
    return b;
}
static void says(moe_growth *g, double metric, const moe_health *h, moe_growth_action want, const char *reason) {
    CHECK_OK(moe_growth_step(g, metric, h, NULL));
    if (!CHECK(g->decision == want) || !CHECK(!strcmp(g->reason, reason)))
        printf("        epoch %d said \"%s\", not \"%s\"\n", g->epoch, g->reason, reason);
}
static void test_controller(void) {
    const uint64_t load[3] = {84, 79, 37};
    bed b = bed_of(3, load);
    moe_growth g;
    memset(&g, 0, sizeof g);
    g.target = 0.97f;
    static const double rise[] = {0.5, 0.6, 0.7, 0.8, 0.9};
    for (int i = 0; i < 5; i++) says(&g, rise[i], &b.h, MOE_GROWTH_NONE, "no plateau: 0 of 3 epochs without a gain");
    says(&g, 0.9005, &b.h, MOE_GROWTH_NONE, "no plateau: 1 of 3 epochs without a gain");
    says(&g, 0.9008, &b.h, MOE_GROWTH_NONE, "no plateau: 2 of 3 epochs without a gain");
    says(&g, 0.9011, &b.h, MOE_GROWTH_NONE, "no plateau: 0 of 3 epochs without a gain"); /* slow gains add up */
    says(&g, 0.9, &b.h, MOE_GROWTH_NONE, "no plateau: 1 of 3 epochs without a gain");
    says(&g, 0.9, &b.h, MOE_GROWTH_NONE, "no plateau: 2 of 3 epochs without a gain");
    says(&g, 0.9, &b.h, MOE_GROWTH_SPLIT, "plateau for 3 epochs, cooldown over: split expert 0 (load 0.84)");
    CHECK(g.expert == 0 && g.other == MOE_GROWTH_END && g.events == 1 && !g.release);
    char text[64];
    for (int i = 1; i <= 5; i++) {
        snprintf(text, sizeof text, "cooldown: %d of 5 epochs", i);
        says(&g, 0.9, &b.h, MOE_GROWTH_NONE, text);
        CHECK(g.release == (i == 5)); /* at the end of the fifth the pair is released */
    }
    says(&g, 0.9, &b.h, MOE_GROWTH_NONE, "newborn: 2 of 4 experts would be, allowed 0.33");
    g.newborn_share = MOE_OFF;
    says(&g, 0.98, &b.h, MOE_GROWTH_NONE, "target met: 0.9800, wanted 0.9700");
    moe_growth below = g;
    below.target = -0.5f;
    says(&below, -0.25, &b.h, MOE_GROWTH_NONE, "target met: -0.2500, wanted -0.5000");
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, "no plateau: %d of 3 epochs without a gain", i + 1);
        says(&g, 0.9, &b.h, MOE_GROWTH_NONE, text);
    }
    g.max_experts = 3;
    says(&g, 0.9, &b.h, MOE_GROWTH_NONE, "cap: 3 of 3 experts");
    g.max_experts = 4;
    says(&g, 0.9, &b.h, MOE_GROWTH_SPLIT, "plateau for 4 epochs, cooldown over: split expert 0 (load 0.84)");
    free(b.memory);
}
static void test_controller_brakes(void) {
    const uint64_t load[4] = {10, 79, 99, 12};
    bed b = bed_of(4, load);
    moe_growth g, saved;
    moe_health few;
    memset(&g, 0, sizeof g);
    g.window = g.cooldown = g.max_experts = MOE_OFF, g.newborn_share = g.delta = MOE_OFF, g.n_special = 1;
    for (int i = 0; i < 70; i++) { /* every epoch, on a rising metric too */
        says(&g, 0.01 * i, &b.h, MOE_GROWTH_SPLIT, "every epoch a plateau, no cooldown: split expert 2 (load 0.99)");
        CHECK(g.release == (i > 0) && g.bound == 1);
    }
    memset(&g, 0, sizeof g);
    g.window = g.max_experts = MOE_OFF, g.newborn_share = MOE_OFF, g.cooldown = 2; /* the cooldown alone */
    for (int i = 0; i < 30; i++) {
        CHECK_OK(moe_growth_step(&g, 0.01 * i, &b.h, NULL));
        CHECK(g.decision == (i % 3 ? MOE_GROWTH_NONE : MOE_GROWTH_SPLIT));
    }
    /* lower is better; health's own metrics; by loss and utility */
    memset(&g, 0, sizeof g);
    g.metric = MOE_GROWTH_LOSS, g.which = MOE_GROWTH_HIGHEST_LOSS, g.window = 1, g.target = 1;
    const double worth[4] = {0.5, 2.25, 1, 9}, nan_worth[4] = {1, 2, NAN, 1};
    g.n_special = 1;
    CHECK_OK(moe_growth_step(&g, 3, &b.h, worth));
    CHECK_OK(moe_growth_step(&g, 2, &b.h, worth));
    CHECK(g.decision == MOE_GROWTH_NONE);
    CHECK_OK(moe_growth_step(&g, 2, &b.h, worth));
    CHECK(g.expert == 1 && !strcmp(g.reason, "plateau for 1 epochs, cooldown over: split expert 1 (loss 2.25)"));
    saved = g;
    CHECK_STATUS(moe_growth_step(&g, NAN, &b.h, worth), MOE_E_GROWTH_METRIC);
    CHECK_STATUS(moe_growth_step(&g, 2, &b.h, NULL), MOE_E_GROWTH_METRIC);
    CHECK_STATUS(moe_growth_step(&g, 2, &b.h, nan_worth), MOE_E_GROWTH_METRIC);
    CHECK_STATUS(moe_growth_step(&g, 2, NULL, worth), MOE_E_NULL_HEALTH);
    CHECK_STATUS(moe_growth_step(NULL, 2, &b.h, worth), MOE_E_NULL_OUT);
    CHECK(!memcmp(&saved, &g, sizeof g));
    b.h.n_experts = 4, g.action = MOE_GROWTH_PRUNE; /* which needs no worth of any expert */
    CHECK_OK(moe_growth_step(&g, 2, &b.h, NULL));
    g = saved, g.action = MOE_GROWTH_REVIVE;
    CHECK_STATUS(moe_growth_step(&g, 2, &b.h, NULL), MOE_E_GROWTH_METRIC);
    g = saved, few = b.h, few.load = NULL;
    CHECK_STATUS(moe_growth_step(&g, 2, &few, worth), MOE_E_NULL_HEALTH);
    for (int i = 0; i < 8; i++) { /* one bad setting each */
        moe_growth bad = g;
        if (i == 0) bad.young = 17;
        if (i == 1) bad.window = -2;
        if (i == 2) bad.newborn_share = 1.5f;
        if (i == 3) bad.delta = -0.5f;
        if (i == 4) bad.n_special = 4;
        if (i == 5) bad.action = MOE_GROWTH_ACTION_COUNT;
        if (i == 6) bad.n_special = -1;
        if (i == 7) bad.newborn_share = -0.5f;
        CHECK_STATUS(moe_growth_step(&bad, 2, &b.h, worth), MOE_E_GROWTH_SETTING);
    }
    memset(&g, 0, sizeof g);
    g.metric = MOE_GROWTH_ENTROPY, g.action = MOE_GROWTH_ADD, g.window = 1;
    CHECK_OK(moe_growth_step(&g, 0, &b.h, NULL));
    b.h.entropy = 1;
    says(&g, 0, &b.h, MOE_GROWTH_NONE, "no plateau: 0 of 1 epochs without a gain");
    says(&g, 0, &b.h, MOE_GROWTH_ADD, "plateau for 1 epochs, cooldown over: add an expert");
    CHECK(g.expert == MOE_GROWTH_END && g.bound == 0);
    g.action = MOE_GROWTH_NONE;
    says(&g, 0, &b.h, MOE_GROWTH_NONE, "growth is off");
    memset(&g, 0, sizeof g); /* below zero; what the load says; no target */
    g.target = -0.5f;
    says(&g, -0.25, &b.h, MOE_GROWTH_NONE, "target met: -0.2500, wanted -0.5000");
    g.target = 0.5f, g.metric = MOE_GROWTH_MAXVIO, b.h.maxvio = 0.375;
    says(&g, 9, &b.h, MOE_GROWTH_NONE, "target met: 0.3750, wanted 0.5000");
    moe_growth same = g; /* where less is better too, just as much is enough */
    same.target = 0.375f;
    says(&same, 9, &b.h, MOE_GROWTH_NONE, "target met: 0.3750, wanted 0.3750");
    g.target = MOE_OFF;
    says(&g, 9, &b.h, MOE_GROWTH_NONE, "no plateau: 2 of 3 epochs without a gain");
    free(b.memory);
    b = bed_of(4, (const uint64_t[]){0, 1, 100, 0}); /* of the dead the least in use, of these the first */
    memset(&g, 0, sizeof g);
    g.action = MOE_GROWTH_PRUNE;
    says(&g, 0.5, &b.h, MOE_GROWTH_PRUNE, "expert 0 is dead (load 0.00), cooldown over: prune it");
    free(b.memory);
    b = bed_of(2, (const uint64_t[]){0, 100}); /* the last network stays */
    memset(&g, 0, sizeof g);
    g.action = MOE_GROWTH_PRUNE, g.n_special = 1;
    says(&g, 0.5, &b.h, MOE_GROWTH_NONE, "no expert is dead");
    free(b.memory);
    const uint64_t dying[4] = {90, 1, 100, 0};
    b = bed_of(4, dying);
    memset(&g, 0, sizeof g);
    g.action = MOE_GROWTH_REVIVE, g.cooldown = 1;
    says(&g, 0.5, &b.h, MOE_GROWTH_REVIVE,
         "expert 3 is dead (load 0.00), cooldown over: revive it from expert 2 (load 1.00)");
    CHECK(g.expert == 3 && g.other == 2 && g.births[0] == 1);
    says(&g, 0.6, &b.h, MOE_GROWTH_NONE, "cooldown: 1 of 1 epochs");
    g.action = MOE_GROWTH_PRUNE, g.n_special = 1; /* the last is no network */
    says(&g, 0.6, &b.h, MOE_GROWTH_PRUNE, "expert 1 is dead (load 0.01), cooldown over: prune it");
    free(b.memory);
    b = bed_of(3, (const uint64_t[]){50, 50, 50});
    says(&g, 0.6, &b.h, MOE_GROWTH_NONE, "cooldown: 1 of 1 epochs");
    says(&g, 0.6, &b.h, MOE_GROWTH_NONE, "no expert is dead");
    free(b.memory);
}
static void test_state(void) {
    moe_desc d = plain();
    moe_layer *m = trained(&d, 0), *s = NULL;
    CHECK(moe_layer_growth(m) == NULL && moe_layer_growth(NULL) == NULL);
    moe_layer_free(m);
    d.growth = MOE_ON, d.n_zero = 1;
    m = trained(&d, 1);
    moe_growth *g = moe_layer_growth(m);
    CHECK(g->n_special == 1);
    g->target = 0.97f, g->window = MOE_OFF, g->births[3] = 2, g->best = -0.25f, g->action = MOE_GROWTH_ADD;
    if (!CHECK_OK(moe_layer_split(&s, m, 0, NULL))) return;
    CHECK(!memcmp(moe_layer_growth(s), g, sizeof *g));
    float state[64];
    size_t n = 1;
    while (n < 64 && moe_layer_get(s, MOE_PART_PARAMS, "growth.state", state, n)) n++;
    if (!CHECK(n < 64)) return;
    for (size_t i = 0; i < n; i++) { /* every number is looked at */
        float kept = state[i];
        state[i] = 3e7f;
        moe_status status = moe_layer_set(s, MOE_PART_PARAMS, "growth.state", state, n);
        CHECK(status == MOE_E_GROWTH_STATE || i == 3 || i == 4 || kept == -0.25f);
        if (status) { /* no fractions of whole numbers, and none below -1 */
            state[i] = kept + 0.5f;
            moe_status half = moe_layer_set(s, MOE_PART_PARAMS, "growth.state", state, n);
            CHECK(half == MOE_E_GROWTH_STATE || !half);
            state[i] = -3;
            CHECK_STATUS(moe_layer_set(s, MOE_PART_PARAMS, "growth.state", state, n), MOE_E_GROWTH_STATE);
        }
        state[i] = kept;
        CHECK_OK(moe_layer_set(s, MOE_PART_PARAMS, "growth.state", state, n));
    }
    CHECK(!memcmp(moe_layer_growth(s), g, sizeof *g));
    CHECK_STATUS(moe_layer_get(s, MOE_PART_MOMENT1, "growth.state", state, n), MOE_E_PART);
    CHECK(!strcmp(moe_growth_action_name(MOE_GROWTH_REVIVE), "revive"));
    CHECK(!moe_growth_action_name(MOE_GROWTH_ACTION_COUNT));
    moe_layer_free(m), moe_layer_free(s);
}

int main(void) {
    RUN(test_split_systems);
    RUN(test_bound);
    RUN(test_gate);
    RUN(test_release);
    RUN(test_release_scaled);
    RUN(test_merge);
    RUN(test_merge_to);
    RUN(test_merge_far);
    RUN(test_prune_add);
    RUN(test_add);
    RUN(test_donors);
    RUN(test_parents);
    RUN(test_moments);
    RUN(test_clone);
    RUN(test_revive);
    RUN(test_upcycle);
    RUN(test_systems_grow);
    RUN(test_worth);
    RUN(test_allocations_fail);
    RUN(test_arguments);
    RUN(test_same_bits);
    RUN(test_controller);
    RUN(test_controller_brakes);
    RUN(test_state);
    CHECK(test_live_blocks == 0);
    return test_end();
}

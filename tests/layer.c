/* The layer and level 2 against the double oracle: outputs, every gradient, losses; in the caller's
 * memory; by parts. */
#include "test.h"
#include "oracle.h"
#include "fixture.h"

static const char *describe(const moe_desc *d, size_t T) {
    static char text[200];
    snprintf(text, sizeof text,
             "d %zu f %zu E %zu k %zu shared %zu T %zu %s %s bias %d normalize %d tau %g capacity %g order %d",
             d->d_model, d->d_ff, d->n_experts, d->top_k, d->n_shared, T, moe_expert_name(d->expert),
             moe_gate_name(d->gate), d->bias, d->normalize, (double)d->temperature, (double)d->capacity_factor,
             (int)d->capacity_order);
    return text;
}

/* The oracle's choice must not hang on a rounding: tokens near a tie, or near the kink of relu, are moved. */
static void move_from_kinks(fixture *F) {
    size_t d = F->d.d_model, f = F->d.d_ff;
    double *z = test_doubles(f), *u = test_doubles(f), *h = test_doubles(f), *out = test_doubles(d);
    for (int round = 0; round < 100; round++) {
        int moved = 0;
        oracle_forward(F->o, 1);
        for (size_t t = 0; t < F->T; t++) {
            int near = F->o->margin[t] < 2e-5;
            for (size_t e = 0; e < F->o->G && F->d.expert == MOE_EXPERT_RELU; e++) {
                oracle_expert(F->o, e, F->o->x + t * d, z, u, h, out);
                for (size_t j = 0; j < f; j++) near |= fabs(z[j]) < 2e-6;
            }
            for (size_t i = 0; i < d && near; i++) {
                F->x[t * d + i] = test_uniform(-1.5f, 1.5f);
                F->o->x[t * d + i] = F->x[t * d + i];
            }
            moved |= near;
        }
        if (!moved) break;
    }
    free(z), free(u), free(h), free(out);
}

static void check_forward(const fixture *F, const moe_tape *t) {
    const oracle *o = F->o;
    size_t E = F->d.n_experts, k = F->d.top_k, n = F->T * F->d.d_model;
    size_t terms = F->d.d_model + F->d.d_ff;
    CHECK(t->n_tokens == F->T);
    for (size_t i = 0; i < F->T * k; i++) CHECK(t->index[i] == o->index[i]);
    for (size_t i = 0; i < F->T * k; i++) CHECK((t->routes.slot[i] != MOE_NONE) == o->kept[i]);
    for (size_t e = 0; e < E; e++) CHECK(t->routes.load[e] == o->load[e]);
    CHECK(t->routes.n_dropped == o->dropped);
    CHECK_WITHIN(worst_error(t->logits, o->logits, F->T * E), 0, limit_for(F->d.d_model));
    CHECK_WITHIN(worst_error(t->prob, o->prob, F->T * E), 0, 2.8 * limit_for(F->d.d_model));
    if (F->d.gate == MOE_GATE_SOFTMAX)
        CHECK_WITHIN(worst_error(t->scores, o->prob, F->T * E), 0, 2.8 * limit_for(F->d.d_model));
    CHECK_WITHIN(worst_error(t->weight, o->weight, F->T * k), 0, 2.8 * limit_for(F->d.d_model));
    double e = worst_error(F->y, o->y, n);
    if (!CHECK_WITHIN(e, 0, 3.6 * limit_for(terms))) printf("        error of y: %.3g of its largest\n", e);
}

static void check_gradients(const fixture *F, double scale) {
    const oracle *o = F->o;
    double limit = 8 * limit_for(F->d.d_model + F->d.d_ff + F->T);
    for (int i = 0; i < ORACLE_PARTS; i++) {
        if (o->count[i] == 0) continue;
        float *g = test_floats(o->count[i]);
        CHECK_OK(moe_layer_get(F->m, MOE_PART_GRADS, oracle_names[i], g, o->count[i]));
        for (size_t j = 0; j < o->count[i]; j++) g[j] *= (float)scale;
        double e = worst_error(g, o->g[i], o->count[i]);
        if (!CHECK_WITHIN(e, 0, limit))
            printf("        error of the gradient of %s: %.3g of its largest\n", oracle_names[i], e);
        free(g);
    }
    double e = worst_error(F->dx, o->dx, F->T * F->d.d_model);
    if (!CHECK_WITHIN(e, 0, limit / 4)) printf("        error of dx: %.3g of its largest\n", e);
}

static void compare_with_oracle(const moe_desc *d, size_t T) {
    fixture F;
    int errors = test_errors;
    if (!fixture_new(&F, d, T)) return;
    move_from_kinks(&F);
    oracle_backward(F.o);
    CHECK_OK(moe_forward(F.m, F.x, T, F.y));
    if (!CHECK(moe_layer_tape(F.m) != NULL)) return;
    check_forward(&F, moe_layer_tape(F.m));
    CHECK_OK(moe_backward(F.m, F.dy, F.dx));
    check_gradients(&F, 1);
    double value[MOE_LOSS_COUNT], weighted[MOE_LOSS_COUNT];
    CHECK_OK(moe_layer_losses(F.m, value, weighted));
    for (int l = 0; l < MOE_LOSS_COUNT; l++) {
        if (!(F.d.loss[l] > 0)) continue;
        CHECK_NEAR(value[l], F.o->loss[l], 8e-7);
        CHECK_NEAR(weighted[l], (double)F.d.loss[l] * F.o->loss[l], 8e-7);
        CHECK(moe_layer_tape(F.m)->loss[l] == value[l]);
    }
    CHECK_STATUS(moe_backward(F.m, F.dy, NULL), MOE_E_NO_FORWARD); /* one backward for each forward */
    CHECK_OK(moe_forward(F.m, F.x, T, F.y));
    CHECK_OK(moe_backward(F.m, F.dy, NULL)); /* added; and dx is optional */
    check_gradients(&F, 0.5);
    if (test_errors > errors && test_errors <= TEST_MAX_MESSAGES + 1) printf("        with %s\n", describe(&F.d, T));
    fixture_free(&F);
}

/* ---- the oracle itself: its gradients against finite differences of its objective ---- */
static double slope_of(oracle *o, double *where) {
    const double h = 1e-5, keep = *where;
    *where = keep + h;
    oracle_forward(o, 0);
    double up = oracle_objective(o);
    *where = keep - h;
    oracle_forward(o, 0);
    double down = oracle_objective(o);
    *where = keep;
    return (up - down) / (2 * h);
}

static void test_oracle_by_finite_differences(void) {
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++)
        for (int gate = MOE_GATE_SOFTMAX; gate <= MOE_GATE_SOFTMAX_SELECTED; gate++)
            for (int normalize = MOE_OFF; normalize <= MOE_ON; normalize += 2) {
                moe_desc d = desc_of(4, 5, 5, 2);
                d.expert = (moe_expert_kind)expert, d.gate = (moe_gate_kind)gate, d.normalize = normalize;
                d.bias = MOE_ON, d.n_shared = 1, d.temperature = 0.8f, d.capacity_factor = 0.5f;
                d.loss[MOE_LOSS_SWITCH] = 0.3f, d.loss[MOE_LOSS_Z] = 0.2f;
                fixture F;
                if (!fixture_new(&F, &d, 7)) return;
                move_from_kinks(&F);
                CHECK(F.o->dropped > 0);
                oracle_backward(F.o);
                for (int i = 0; i < ORACLE_PARTS; i++)
                    for (size_t j = 0; j < F.o->count[i]; j++)
                        CHECK_WITHIN(F.o->g[i][j], slope_of(F.o, &F.o->p[i][j]), 1e-9);
                for (size_t j = 0; j < 7 * 4; j++) CHECK_WITHIN(F.o->dx[j], slope_of(F.o, &F.o->x[j]), 6e-10);
                fixture_free(&F);
            }
}

/* ---- every combination of the table, on a ragged shape ---- */
static void refused_as_one_weight(moe_desc *d) { /* with one expert a weight that is always 1 is refused */
    int always = d->gate == MOE_GATE_SOFTMAX_SELECTED || d->normalize == MOE_ON;
    if (d->top_k != 1 || d->n_experts == 1 || !always) return;
    moe_desc out;
    CHECK_STATUS(moe_desc_resolve(d, &out), MOE_E_ONE_WEIGHT);
    d->gate = MOE_GATE_SOFTMAX, d->normalize = MOE_OFF;
}
static void test_all_combinations(void) {
    size_t turn = 0;
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++)
        for (int gate = MOE_GATE_SOFTMAX; gate <= MOE_GATE_SOFTMAX_SELECTED; gate++)
            for (int bias = MOE_OFF; bias <= MOE_ON; bias += 2)
                for (int normalize = MOE_OFF; normalize <= MOE_ON; normalize += 2)
                    for (size_t shared = 0; shared < 3; shared++)
                        for (int capacity = 0; capacity < 3; capacity++) {
                            moe_desc d = desc_of(9, 13, 6, 1 + turn % 3);
                            d.expert = (moe_expert_kind)expert, d.gate = (moe_gate_kind)gate, d.bias = bias;
                            d.normalize = normalize, d.n_shared = shared;
                            d.capacity_factor = capacity ? 0.5f * (float)capacity : (float)MOE_OFF;
                            d.capacity_order = (moe_order_kind)(turn % MOE_ORDER_COUNT);
                            d.temperature = turn % 2 ? 1 : 1.7f;
                            d.loss[MOE_LOSS_SWITCH] = turn % 4 < 2 ? 0.5f : 0, d.loss[MOE_LOSS_Z] = turn % 3 ? 0.1f : 0;
                            refused_as_one_weight(&d);
                            compare_with_oracle(&d, 23);
                            turn++;
                        }
}

/* ---- ragged shapes ---- */
static void test_shapes(void) {
    static const size_t shape[][5] = {/* d, f, E, k, T */
        {1, 1, 1, 1, 1},   {1, 1, 3, 2, 5},     {1, 40, 4, 1, 9},   {33, 1, 4, 2, 9},   {2, 3, 2, 2, 0},
          {8, 16, 4, 2, 1},
        {33, 47, 5, 3, 2}, {17, 65, 7, 7, 30},  {64, 32, 8, 2, 64}, {31, 33, 64, 8, 3}, {16, 48, 3, 1, 200},
        {40, 100, 16, 4, 5},
        {5, 7, 100, 3, 4}, {65, 129, 2, 1, 70}, {8, 8, 1, 1, 300},  {96, 80, 4, 2, 17}, {48, 64, 8, 1, 16},
         {32, 32, 40, 40, 3}};
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU;
             expert += 1 + (shape[s][0] * shape[s][1] > 3000)) {
            moe_desc d = desc_of(shape[s][0], shape[s][1], shape[s][2], shape[s][3]);
            d.expert = (moe_expert_kind)expert;
            d.bias = (s + (size_t)expert) % 2 ? MOE_ON : MOE_OFF, d.n_shared = s % 3 == 2;
            d.gate = (s + (size_t)expert) % 3 ? MOE_GATE_SOFTMAX : MOE_GATE_SOFTMAX_SELECTED;
            d.loss[MOE_LOSS_SWITCH] = 0.01f;
            refused_as_one_weight(&d);
            compare_with_oracle(&d, shape[s][4]);
        }
}

/* Every small number of tokens: the paths for few tokens an expert, and their edges. */
static void test_token_counts(void) {
    for (size_t T = 0; T <= 40; T++) {
        moe_desc d = desc_of(19, 37, 1 + T % 3, 1);
        d.expert = (moe_expert_kind)(MOE_EXPERT_RELU + T % 5), d.bias = T % 2 ? MOE_ON : MOE_OFF;
        compare_with_oracle(&d, T);
    }
}

static void force_experts(fixture *F, size_t first) { /* tokens of ones; the router prefers `first` and its followers */
    size_t d = F->d.d_model, E = F->d.n_experts;
    for (size_t i = 0; i < d; i++)
        for (size_t e = 0; e < E; e++)
            F->o->p[ORACLE_ROUTER][i * E + e] = -(double)((e + E - first) % E) / 4 / (double)d;
    float *r = test_floats(d * E);
    for (size_t i = 0; i < d * E; i++) F->o->p[ORACLE_ROUTER][i] = r[i] = (float)F->o->p[ORACLE_ROUTER][i];
    CHECK_OK(moe_layer_set(F->m, MOE_PART_PARAMS, "router", r, d * E));
    for (size_t i = 0; i < F->T * d; i++) F->o->x[i] = F->x[i] = test_uniform(0.8f, 1.2f);
    free(r);
}

static void test_one_expert_takes_all(void) {
    for (size_t first = 0; first < 12; first += 11)
        for (size_t k = 1; k <= 2; k++)
            for (int capacity = 0; capacity < 2; capacity++) {
                moe_desc d = desc_of(24, 40, 12, k);
                d.capacity_factor = capacity ? 1 : 0;
                d.loss[MOE_LOSS_SWITCH] = 0.1f;
                fixture F;
                if (!fixture_new(&F, &d, 77)) return;
                force_experts(&F, first);
                oracle_forward(F.o, 1);
                CHECK(F.o->load[first] == 77);
                oracle_backward(F.o);
                CHECK_OK(moe_forward(F.m, F.x, F.T, F.y));
                check_forward(&F, moe_layer_tape(F.m));
                CHECK_OK(moe_backward(F.m, F.dy, F.dx));
                check_gradients(&F, 1);
                fixture_free(&F);
            }
}

/* However small the factor, an expert takes one token; however large, no more than there are. */
static void test_capacity_bounds(void) {
    static const float factor[] = {0.01f, 0.3f, 0.5f, 1, 3, 1e6f, 1e30f};
    for (size_t i = 0; i < sizeof factor / sizeof *factor; i++)
        for (size_t T = 0; T < 12; T += 5) {
            moe_desc d = desc_of(6, 8, 3, 2);
            d.capacity_factor = factor[i], d.capacity_order = (moe_order_kind)(i % MOE_ORDER_COUNT);
            compare_with_oracle(&d, T);
        }
}

/* Each weight gradient is one chain of fused multiply-adds over the tokens, so cutting the batch changes no bit. */
static void test_micro_batches(void) {
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++)
        for (size_t cut = 1; cut < 50; cut += 16) {
            moe_desc d = desc_of(21, 35, 4, 2);
            d.expert = (moe_expert_kind)expert, d.bias = expert % 2 ? MOE_ON : MOE_OFF, d.n_shared = (size_t)expert % 2;
            fixture F;
            size_t n, at = cut * d.d_model;
            if (!fixture_new(&F, &d, 50)) return;
            CHECK_OK(moe_forward(F.m, F.x, 50, F.y));
            CHECK_OK(moe_backward(F.m, F.dy, F.dx));
            float *whole = grads_of(F.m, F.o->count, &n);
            float *y = test_floats(50 * d.d_model), *dx = test_floats(50 * d.d_model);
            moe_layer_free(F.m), F.m = NULL; /* begin again */
            if (!CHECK_OK(moe_layer_new(&F.m, &d))) return;
            for (int i = 0; i < ORACLE_PARTS; i++) {
                if (!F.o->count[i]) continue;
                float *p = test_floats(F.o->count[i]);
                for (size_t j = 0; j < F.o->count[i]; j++) p[j] = (float)F.o->p[i][j];
                CHECK_OK(moe_layer_set(F.m, MOE_PART_PARAMS, oracle_names[i], p, F.o->count[i]));
                free(p);
            }
            CHECK_OK(moe_forward(F.m, F.x, cut, y));
            CHECK_OK(moe_backward(F.m, F.dy, dx));
            CHECK_OK(moe_forward(F.m, F.x + at, 50 - cut, y + at));
            CHECK_OK(moe_backward(F.m, F.dy + at, dx + at));
            float *parts = grads_of(F.m, F.o->count, &n);
            CHECK_SAME(y, F.y, 50 * d.d_model);
            CHECK_SAME(dx, F.dx, 50 * d.d_model);
            size_t router = F.o->count[ORACLE_ROUTER];
            CHECK_SAME(parts + router, whole + router, n - router);
            for (size_t i = 0; i < router; i++) CHECK_WITHIN(parts[i], whole[i], 1e-7);
            free(whole), free(parts), free(y), free(dx);
            fixture_free(&F);
        }
}

/* Tokens do not see each other: any batch gives a token the same output bits. */
static void test_batch_size_changes_no_bit(void) {
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++) {
        moe_desc d = desc_of(29, 50, 5, 2);
        d.expert = (moe_expert_kind)expert, d.n_shared = 1, d.bias = MOE_ON;
        fixture F;
        float y[29];
        if (!fixture_new(&F, &d, 60)) return;
        CHECK_OK(moe_forward(F.m, F.x, 60, F.y));
        for (size_t t = 0; t < 60; t++) {
            CHECK_OK(moe_forward(F.m, F.x + t * 29, 1, y));
            CHECK_SAME(y, F.y + t * 29, 29);
        }
        fixture_free(&F);
    }
}

/* ---- the layer's small functions ---- */
static void test_inference_only(void) {
    moe_desc d = desc_of(14, 22, 5, 2), infer = d;
    infer.training = MOE_OFF;
    fixture F, I;
    if (!fixture_new(&F, &d, 12)) return;
    if (!fixture_new(&I, &infer, 12)) return;
    size_t trained = 0, bare = 0;
    for (int i = 0; i < ORACLE_PARTS; i++) {
        if (!F.o->count[i]) continue;
        float *p = test_floats(F.o->count[i]);
        CHECK_OK(moe_layer_get(F.m, MOE_PART_PARAMS, oracle_names[i], p, F.o->count[i]));
        CHECK_OK(moe_layer_set(I.m, MOE_PART_PARAMS, oracle_names[i], p, F.o->count[i]));
        CHECK_STATUS(moe_layer_get(I.m, MOE_PART_GRADS, oracle_names[i], p, F.o->count[i]), MOE_E_INFERENCE);
        CHECK_STATUS(moe_layer_get(I.m, MOE_PART_MOMENT1, oracle_names[i], p, F.o->count[i]), MOE_E_INFERENCE);
        free(p);
    }
    CHECK(moe_layer_hash(I.m) == moe_layer_hash(F.m));
    CHECK_OK(moe_forward(F.m, F.x, 12, F.y));
    CHECK_OK(moe_forward(I.m, F.x, 12, I.y));
    CHECK_SAME(I.y, F.y, 12 * 14);
    CHECK_STATUS(moe_backward(I.m, F.dy, NULL), MOE_E_INFERENCE);
    CHECK_STATUS(moe_step(I.m, 0.1f), MOE_E_INFERENCE);
    CHECK_OK(moe_layer_size(&d, &trained));
    CHECK_OK(moe_layer_size(&infer, &bare));
    CHECK(bare < trained / 2);
    moe_tape *t = NULL; /* a tape for inference, with a layer that trains */
    CHECK_OK(moe_tape_new(&t, &F.d, 12, MOE_OFF));
    CHECK_OK(moe_forward_tape(F.m, t, F.x, 12, I.y));
    CHECK_SAME(I.y, F.y, 12 * 14);
    CHECK_STATUS(moe_backward_tape(F.m, t, F.dy, NULL), MOE_E_NO_FORWARD);
    moe_tape_free(t);
    fixture_free(&F), fixture_free(&I);
}

static void test_get_set(void) {
    static const moe_part_kind part[] = {MOE_PART_PARAMS, MOE_PART_GRADS, MOE_PART_MOMENT1, MOE_PART_MOMENT2};
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++) {
        moe_desc d = desc_of(7, 19, 3, 2);
        d.expert = (moe_expert_kind)expert, d.bias = expert % 2 ? MOE_ON : MOE_OFF, d.n_shared = (size_t)expert % 3;
        moe_layer *m = NULL;
        size_t count[ORACLE_PARTS], total = 0, tensors = 0;
        if (!CHECK_OK(moe_layer_new(&m, &d))) return;
        oracle_shapes(moe_layer_desc(m), count);
        for (int i = 0; i < ORACLE_PARTS; i++) total += count[i], tensors += count[i] != 0;
        CHECK(moe_layer_params(m) == total);
        size_t f_parts = (expert >= MOE_EXPERT_SWIGLU ? 3u : 2u),
               biases = d.bias == MOE_ON ? 19 * (f_parts - 1) + 7 : 0;
        CHECK(moe_layer_active_params(m) == 7 * 3 + (2 + d.n_shared) * (f_parts * 7 * 19 + biases));
        CHECK(moe_layer_tensors(m) == tensors);
        for (size_t i = 0; i < tensors; i++) {
            moe_tensor x;
            if (!CHECK_OK(moe_layer_tensor(m, i, &x))) continue;
            size_t product = 1, known = 0;
            for (size_t j = 0; j < x.n_dims; j++) product *= x.dim[j];
            CHECK(product == x.count && x.n_dims >= 2 && x.n_dims <= 3);
            for (int j = 0; j < ORACLE_PARTS; j++) known += !strcmp(x.name, oracle_names[j]) && x.count == count[j];
            CHECK(known == 1);
            float *in = test_floats(x.count), *out = test_floats(x.count);
            for (int p = 0; p < 4; p++) {
                test_fill(in, x.count, part[p] == MOE_PART_MOMENT2 ? 0 : -1, 1); /* a step takes its root */
                CHECK_OK(moe_layer_set(m, part[p], x.name, in, x.count));
                memset(out, 0, x.count * sizeof *out);
                CHECK_OK(moe_layer_get(m, part[p], x.name, out, x.count));
                CHECK_SAME(out, in, x.count);
            }
            CHECK_STATUS(moe_layer_get(m, MOE_PART_PARAMS, x.name, out, x.count - 1), MOE_E_TENSOR_SIZE);
            free(in), free(out);
        }
        moe_layer_free(m);
    }
}

/* The hash is of what moe_layer_get gives: it sees every parameter, and nothing else. */
static void check_hash(const char *set) {
    moe_desc d = desc_of(3, 5, 4, 1);
    moe_layer *a = NULL, *b = NULL;
    if (!CHECK_OK(moe_desc_parse(&d, set, NULL))) return;
    CHECK_OK(moe_layer_new(&a, &d));
    CHECK_OK(moe_layer_new(&b, &d));
    uint64_t before = moe_layer_hash(a);
    CHECK(moe_layer_hash(b) == before);
    float x[6] = {1, 2, 3, 4, 5, 6}, y[6];
    CHECK_OK(moe_forward(a, x, 2, y));
    CHECK_OK(moe_backward(a, x, NULL));
    CHECK(moe_layer_hash(a) == before);
    for (size_t i = 0; i < moe_layer_tensors(a); i++) {
        moe_tensor t;
        CHECK_OK(moe_layer_tensor(a, i, &t));
        float *v = test_floats(t.count);
        CHECK_OK(moe_layer_get(a, MOE_PART_PARAMS, t.name, v, t.count));
        for (size_t j = 0; j < t.count; j++) {
            float keep = v[j];
            v[j] += 1;
            CHECK_OK(moe_layer_set(a, MOE_PART_PARAMS, t.name, v, t.count));
            if (!CHECK(moe_layer_hash(a) != before)) printf("    %s: %s\n", set, t.name);
            v[j] = keep;
        }
        CHECK_OK(moe_layer_set(a, MOE_PART_PARAMS, t.name, v, t.count));
        CHECK(moe_layer_hash(a) == before);
        free(v);
    }
    CHECK_OK(moe_step(a, 0.1f));
    CHECK(moe_layer_hash(a) != before);
    moe_layer_free(a), moe_layer_free(b);
    d.seed = 2;
    CHECK_OK(moe_layer_new(&a, &d));
    CHECK(moe_layer_hash(a) != before);
    moe_layer_free(a);
}
static void test_layer_hash(void) {
    check_hash("");
    check_hash("n_constant=1");
    check_hash("n_constant=2 n_zero=1 n_shared=1 shared_gate=true");
    check_hash("n_copy=1 n_shared=2 shared_gate=true bias=true");
    check_hash("n_codes=6 noise=learned router_bias=true");
}

/* Gradients that a step has used count as zero: who sets some sets the others to zero. */
static void test_set_gradients_after_step(void) {
    moe_desc d = desc_of(6, 9, 4, 2);
    fixture F;
    size_t n;
    float given[6 * 4];
    double norm = 0, sum = 0;
    if (!fixture_new(&F, &d, 20)) return;
    CHECK_OK(moe_forward(F.m, F.x, 20, F.y));
    CHECK_OK(moe_backward(F.m, F.dy, NULL));
    CHECK_OK(moe_step(F.m, 0.1f));
    test_fill(given, 6 * 4, -1, 1);
    for (int i = 0; i < 6 * 4; i++) sum += (double)given[i] * (double)given[i];
    CHECK_OK(moe_layer_set(F.m, MOE_PART_GRADS, "router", given, 6 * 4));
    CHECK_OK(moe_layer_grad_norm(F.m, &norm));
    CHECK_NEAR(norm, sqrt(sum), 2e-15);
    float *g = grads_of(F.m, F.o->count, &n);
    CHECK_SAME(g, given, 6 * 4); /* the router's come first */
    for (size_t i = 6 * 4; i < n; i++) CHECK(g[i] == 0.0f);
    free(g);
    fixture_free(&F);
}
static void test_norm_and_scale(void) {
    moe_desc d = desc_of(6, 9, 4, 2);
    fixture F;
    size_t n;
    double norm = 0, half = 0, sum = 0;
    d.bias = MOE_ON;
    if (!fixture_new(&F, &d, 20)) return;
    CHECK_OK(moe_forward(F.m, F.x, 20, F.y));
    CHECK_OK(moe_backward(F.m, F.dy, NULL));
    float *g = grads_of(F.m, F.o->count, &n);
    for (size_t i = 0; i < n; i++) sum += (double)g[i] * (double)g[i];
    CHECK_OK(moe_layer_grad_norm(F.m, &norm));
    CHECK_NEAR(norm, sqrt(sum), 2e-15);
    CHECK_OK(moe_layer_scale_grads(F.m, 0.5f));
    CHECK_OK(moe_layer_grad_norm(F.m, &half));
    CHECK_NEAR(half, norm / 2, 2e-15);
    CHECK_OK(moe_step(F.m, 0.1f)); /* then the gradients count as zero */
    CHECK_OK(moe_layer_grad_norm(F.m, &norm));
    CHECK(norm == 0);
    free(g), g = grads_of(F.m, F.o->count, &n);
    for (size_t i = 0; i < n; i++) CHECK(g[i] == 0);
    CHECK_OK(moe_forward(F.m, F.x, 20, F.y)); /* what is added next starts from zero */
    CHECK_OK(moe_backward(F.m, F.dy, F.dx));
    oracle_read(F.o, F.m);
    move_from_kinks(&F);
    oracle_backward(F.o);
    check_gradients(&F, 1);
    free(g);
    fixture_free(&F);
}

static void test_layer_health(void) {
    moe_desc d = desc_of(8, 8, 4, 2);
    d.capacity_factor = 1;
    fixture F;
    moe_health h = {0};
    uint64_t load[4] = {0}, dropped = 0;
    if (!fixture_new(&F, &d, 30)) return;
    for (int i = 0; i < 3; i++) {
        CHECK_OK(moe_forward(F.m, F.x, (size_t)(10 * (i + 1)), F.y));
        const moe_routes *r = &moe_layer_tape(F.m)->routes;
        for (int e = 0; e < 4; e++) load[e] += r->load[e];
        dropped += r->n_dropped;
    }
    CHECK_OK(moe_layer_health(F.m, &h));
    CHECK(h.n_batches == 3 && h.n_tokens == 60 && h.n_selected == 120 && h.n_dropped == dropped && h.n_experts == 4);
    double top = 0;
    for (int e = 0; e < 4; e++) {
        CHECK(h.load[e] == load[e]);
        top = fmax(top, (double)load[e]);
    }
    CHECK_NEAR(h.maxvio, top / 30 - 1, 2e-15);
    CHECK(h.entropy > 0 && h.entropy <= log(4) + 1e-9);
    CHECK_OK(moe_layer_health_reset(F.m));
    CHECK_OK(moe_layer_health(F.m, &h));
    CHECK(h.n_batches == 0 && h.n_tokens == 0 && h.load[1] == 0);
    fixture_free(&F);
}
/* The adaptive controller sees the drop rate of both micro-batches of a step. */
static void test_drop_rate(void) {
    moe_desc d = desc_of(8, 8, 4, 2);
    d.capacity_factor = 1, d.controller = MOE_CONTROL_ADAPTIVE, d.loss[MOE_LOSS_SWITCH] = 0.5f;
    d.controller_rate = 0.01f, d.controller_damping = 0.5f;
    fixture F;
    uint64_t dropped = 0;
    if (!fixture_new(&F, &d, 30)) return;
    for (size_t n = 10; n <= 30; n += 20) {
        CHECK_OK(moe_forward(F.m, F.x, n, F.y));
        CHECK_OK(moe_backward(F.m, F.dy, NULL));
        dropped += moe_layer_tape(F.m)->routes.n_dropped;
        CHECK(dropped > 0);
    }
    CHECK_OK(moe_step(F.m, 0.01f));
    CHECK_NEAR(moe_layer_desc(F.m)->loss[MOE_LOSS_SWITCH], 0.25 + 0.5 * 0.01 * (double)dropped / 80, 6e-8);
    fixture_free(&F);
}

/* A bad batch is refused, and leaves the layer as it was. */
static void test_nan_batch(void) {
    moe_desc d = desc_of(6, 9, 4, 2);
    fixture F;
    if (!fixture_new(&F, &d, 9)) return;
    uint64_t before = moe_layer_hash(F.m);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        float keep = F.x[31];
        F.x[31] = bad[i];
        CHECK_STATUS(moe_forward(F.m, F.x, 9, F.y), MOE_E_NAN_X);
        CHECK_STATUS(moe_backward(F.m, F.dy, NULL), MOE_E_NO_FORWARD);
        F.x[31] = keep;
        CHECK_OK(moe_forward(F.m, F.x, 9, F.y));
        float keep_dy = F.dy[7];
        F.dy[7] = bad[i];
        if (moe_backward(F.m, F.dy, NULL) == MOE_OK) CHECK_STATUS(moe_step(F.m, 0.1f), MOE_E_NAN_GRADS);
        F.dy[7] = keep_dy;
        CHECK(moe_layer_hash(F.m) == before);
        double norm = 1;
        CHECK_OK(moe_layer_scale_grads(F.m, 0)); /* the way to be rid of them */
        CHECK_OK(moe_layer_grad_norm(F.m, &norm));
        CHECK(norm == 0);
    }
    moe_health h = {0};
    CHECK_OK(moe_layer_health(F.m, &h));
    CHECK(h.n_batches == 3 && h.n_tokens == 27); /* refused batches are not counted */
    fixture_free(&F);
}

/* Losses go down: the whole of forward, backward and step does what it is for. */
static void test_it_learns(void) {
    for (int expert = MOE_EXPERT_RELU; expert <= MOE_EXPERT_GEGLU; expert++)
        for (int optimizer = MOE_OPTIMIZER_ADAMW; optimizer < MOE_OPTIMIZER_COUNT; optimizer++) {
            enum { T = 64, D = 8 };
            moe_desc d = desc_of(D, 16, 4, 2);
            d.expert = (moe_expert_kind)expert, d.optimizer = (moe_optimizer_kind)optimizer,
            d.loss[MOE_LOSS_SWITCH] = 0.01f;
            moe_layer *m = NULL;
            static float x[T * D], y[T * D], dy[T * D];
            double first = 0, last = 0;
            if (!CHECK_OK(moe_layer_new(&m, &d))) return;
            CHECK_OK(moe_rand_normal(3, 3, T * D, 0, 1, x));
            for (int step = 0; step < 200; step++) {
                CHECK_OK(moe_forward(m, x, T, y));
                last = 0;
                for (int i = 0; i < T * D; i++) {
                    double error = (double)y[i] - sin(2 * (double)x[i / D * D + (i + 1) % D]);
                    last += error * error / (T * D);
                    dy[i] = (float)(2 * error / (T * D));
                }
                if (step == 0) first = last;
                CHECK_OK(moe_backward(m, dy, NULL));
                CHECK_OK(moe_step(m, optimizer == MOE_OPTIMIZER_ADAMW ? 0.01f : 0.2f));
            }
            if (!CHECK(last < 0.5 * first))
                printf("        loss %g -> %g, %s\n", first, last, moe_expert_name(d.expert));
            moe_layer_free(m);
        }
}

/* ---- sparse steps: what no token chose stays, the rest moves as any array would ---- */
enum { SPARSE_E = 8, SPARSE_D = 12, SPARSE_F = 20, SPARSE_TENSORS = 4 };
static const char *const sparse_name[SPARSE_TENSORS] = {"experts.w1", "experts.b1", "experts.w2", "experts.b2"};
static const size_t sparse_each[SPARSE_TENSORS] = {SPARSE_D * SPARSE_F, SPARSE_F, SPARSE_F *SPARSE_D, SPARSE_D};
typedef struct sparse_state { float *part[MOE_PART_COUNT][SPARSE_TENSORS]; } sparse_state;

static void sparse_get(const moe_layer *m, moe_part_kind part, sparse_state *s) {
    for (int i = 0; i < SPARSE_TENSORS; i++)
        CHECK_OK(moe_layer_get(m, part, sparse_name[i], s->part[part][i], SPARSE_E * sparse_each[i]));
}
static void sparse_backward(moe_layer *m, size_t n, const float *x, const float *dy, unsigned char *used) {
    static float y[4 * SPARSE_D];
    CHECK_OK(moe_forward(m, x, n, y));
    const moe_tape *tape = moe_layer_tape(m);
    for (size_t i = 0; i < n * tape->n_slots; i++) used[tape->index[i]] = 1;
    CHECK_OK(moe_backward(m, dy, NULL));
}
/* What a step must make of the state, given the gradients. */
static void sparse_expect(const moe_desc *d, sparse_state *s, const unsigned char *used, size_t step) {
    for (int i = 0; i < SPARSE_TENSORS; i++)
        for (size_t e = 0, n = sparse_each[i]; e < SPARSE_E; e++) {
            moe_optimizer_args args = {0};
            args.lr = 0.01f, args.step = step, args.weight_decay = i % 2 ? MOE_OFF : d->weight_decay;
            if (!used[e]) continue;
            float *part[MOE_PART_COUNT];
            for (int p = 0; p < MOE_PART_COUNT; p++) part[p] = s->part[p][i] + e * n;
            CHECK_OK(moe_optimizer_step(&args, n, part[MOE_PART_PARAMS], part[MOE_PART_GRADS], part[MOE_PART_MOMENT1],
                                        part[MOE_PART_MOMENT2]));
        }
}
static void test_sparse_step(void) {
    moe_desc d = {0}, dense_desc;
    moe_layer *sparse = NULL, *dense = NULL;
    sparse_state want, got, other;
    d.d_model = SPARSE_D, d.d_ff = SPARSE_F, d.n_experts = SPARSE_E, d.top_k = 2, d.bias = MOE_ON;
    d.expert = MOE_EXPERT_GELU, d.weight_decay = 0.1f, d.sparse_step = MOE_ON;
    dense_desc = d;
    dense_desc.sparse_step = MOE_OFF;
    for (int part = 0; part < MOE_PART_COUNT; part++)
        for (int i = 0; i < SPARSE_TENSORS; i++) {
            want.part[part][i] = test_floats(SPARSE_E * sparse_each[i]);
            got.part[part][i] = test_floats(SPARSE_E * sparse_each[i]);
            other.part[part][i] = test_floats(SPARSE_E * sparse_each[i]);
        }
    if (!CHECK_OK(moe_layer_new(&sparse, &d)) || !CHECK_OK(moe_layer_new(&dense, &dense_desc))) return;
    for (int part = 0; part < MOE_PART_COUNT; part++)
        if (part != MOE_PART_GRADS) sparse_get(sparse, (moe_part_kind)part, &want);
    for (size_t step = 1; step < 9; step++) {
        float x[4 * SPARSE_D], dy[4 * SPARSE_D];
        unsigned char used[SPARSE_E] = {0}, same[SPARSE_E] = {0};
        double norm, dense_norm;
        for (size_t i = 0; i < 4 * SPARSE_D; i++) x[i] = test_uniform(-1, 1), dy[i] = test_uniform(-1, 1);
        for (int i = 0; i < SPARSE_TENSORS; i++)
            CHECK_OK(moe_layer_set(dense, MOE_PART_PARAMS, sparse_name[i], want.part[MOE_PART_PARAMS][i],
                                   SPARSE_E * sparse_each[i]));
        for (size_t part = 0; part < step % 4; part++) { /* none, one, or two and three that add up */
            sparse_backward(sparse, 1, x + part * SPARSE_D, dy + part * SPARSE_D, used);
            sparse_backward(dense, 1, x + part * SPARSE_D, dy + part * SPARSE_D, same);
        }
        CHECK(!memcmp(used, same, sizeof used));
        sparse_get(sparse, MOE_PART_GRADS, &want);
        sparse_get(dense, MOE_PART_GRADS, &other);
        CHECK_OK(moe_layer_grad_norm(sparse, &norm));
        CHECK_OK(moe_layer_grad_norm(dense, &dense_norm));
        CHECK(norm == dense_norm);
        sparse_expect(&d, &want, used, step);
        CHECK_OK(moe_step(sparse, 0.01f));
        CHECK_OK(moe_step(dense, 0.01f));
        for (int part = 0; part < MOE_PART_COUNT; part++) {
            if (part != MOE_PART_GRADS) sparse_get(sparse, (moe_part_kind)part, &got);
            for (int i = 0; i < SPARSE_TENSORS; i++) {
                sparse_state *is = part == MOE_PART_GRADS ? &other : &got;
                CHECK_SAME(is->part[part][i], want.part[part][i], SPARSE_E * sparse_each[i]);
            }
        }
        float router[SPARSE_D * SPARSE_E]; /* both layers' routers see the same gradients */
        CHECK_OK(moe_layer_get(sparse, MOE_PART_PARAMS, "router", router, SPARSE_D * SPARSE_E));
        CHECK_OK(moe_layer_set(dense, MOE_PART_PARAMS, "router", router, SPARSE_D * SPARSE_E));
    }
    /* a gradient from outside: the others are zero */
    memset(want.part[MOE_PART_GRADS][0], 0, SPARSE_E * sparse_each[0] * sizeof(float));
    CHECK_OK(moe_layer_set(sparse, MOE_PART_GRADS, "experts.b1", want.part[MOE_PART_PARAMS][1], SPARSE_E * SPARSE_F));
    sparse_get(sparse, MOE_PART_GRADS, &got);
    CHECK_SAME(got.part[MOE_PART_GRADS][0], want.part[MOE_PART_GRADS][0], SPARSE_E * sparse_each[0]);
    CHECK_SAME(got.part[MOE_PART_GRADS][1], want.part[MOE_PART_PARAMS][1], SPARSE_E * SPARSE_F);
    moe_layer_free(sparse);
    moe_layer_free(dense);
    d.n_codes = 16;
    CHECK(moe_layer_new(&sparse, &d) == MOE_E_SPARSE_STEP);
    for (int part = 0; part < MOE_PART_COUNT; part++)
        for (int i = 0; i < SPARSE_TENSORS; i++) {
            free(want.part[part][i]), free(got.part[part][i]), free(other.part[part][i]);
        }
}

/* ---- what a layer refuses, and leaves as it was ---- */
enum { RD = 6, RE = 4, RT = 8 };
static moe_layer *layer_of(const char *text) {
    moe_desc d;
    moe_layer *m = NULL;
    memset(&d, 0, sizeof d);
    d.d_model = RD, d.d_ff = 5, d.n_experts = RE, d.top_k = 2, d.parallel.n_threads = 1;
    if (!CHECK_OK(moe_desc_parse(&d, text, NULL)) || !CHECK_OK(moe_layer_new(&m, &d))) printf("        %s\n", text);
    return m;
}
/* A backward that is refused, for a loss whose coefficient has no finite product with its weight, or for a teacher of
 * no expert: no gradient is there yet, and the forward is not used up. */
static void test_losses_refused(void) {
    static const char *const texts[] = {"loss.switch=1e38", "loss.z=1e38", "loss.sequence=1e38 sequence=4",
                                        "n_ranks=2 loss.rank=1e38", "n_ranks=2 loss.locality=1e38",
                                        "loss.output-orthogonality=1e38", "noise=gaussian loss.load=1e38",
                                        "expert=orthonormal loss.orthonormal=1e38"};
    int32_t teacher[RT] = {0, 1, 2, 3, RE, -1, 0, 1};
    float x[RT * RD], y[RT * RD];
    test_fill(x, RT * RD, -1, 1);
    for (size_t i = 0; i <= sizeof texts / sizeof *texts; i++) {
        int taught = i == sizeof texts / sizeof *texts;
        moe_layer *m = layer_of(taught ? "loss.oracle=0.1" : texts[i]);
        if (!m) continue;
        moe_side *side = moe_layer_side(m);
        double norm = 1;
        if (taught) side->teacher = teacher;
        else side->loss_weight = 1e5f;
        CHECK_OK(moe_forward(m, x, RT, y));
        if (!CHECK_STATUS(moe_backward(m, x, NULL), taught ? MOE_E_TEACHER : MOE_E_COEFFICIENT))
            printf("        %s\n", taught ? "teacher" : texts[i]);
        CHECK_OK(moe_layer_grad_norm(m, &norm));
        CHECK(norm == 0);
        if (taught) teacher[4] = -1, CHECK_OK(moe_backward(m, x, NULL)); /* of the same forward */
        moe_layer_free(m);
    }
}
static void test_refused(void) {
    static const moe_layer_formats int8 = {MOE_FORMAT_INT8, NULL, MOE_OFF, 0, NULL};
    moe_layer *m = layer_of(""), *other = layer_of("training=false sparse_step=true"), *made = m;
    moe_tape *t = NULL;
    float x[RT * RD], y[RT * RD];
    double pes = -1;
    moe_desc bad = *moe_layer_desc(m);
    test_fill(x, RT * RD, -1, 1);
    CHECK_OK(moe_tape_new(&t, &bad, RT, MOE_ON));
    CHECK_OK(moe_forward_tape(m, t, NULL, 0, NULL));
    CHECK_OK(moe_forward_tape(other, t, x, RT, y));
    CHECK_STATUS(moe_backward_tape(other, t, x, NULL), MOE_E_INFERENCE);
    CHECK_STATUS(moe_layer_scale_grads(other, 1), MOE_E_INFERENCE);
    CHECK_OK(moe_forward_tape(m, t, x, RT, y));
    CHECK_OK(moe_backward_tape(m, t, x, NULL));
    CHECK_STATUS(moe_layer_new_formats(NULL, &bad, &int8), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_new_formats(&made, &bad, NULL), MOE_E_FORMAT);
    bad.d_model = 0;
    CHECK_STATUS(moe_layer_new_formats(&made, &bad, &int8), MOE_E_D_MODEL);
    CHECK(made == NULL);
    moe_layer_free(other);
    if (!CHECK_OK(moe_layer_quantize(m, &int8, &other))) return;
    CHECK_STATUS(moe_layer_shard(other, 0, 1, &made), MOE_E_QUANTISED);
    CHECK_STATUS(moe_layer_scale_grads(other, 1), MOE_E_QUANTISED);
    CHECK(moe_layer_format(other, 1) == MOE_FORMAT_INT8 && moe_layer_format(m, 1) == MOE_FORMAT_F32);
    CHECK(moe_layer_format(NULL, 0) == MOE_FORMAT_COUNT && moe_layer_format(m, RE) == MOE_FORMAT_COUNT);
    CHECK(moe_layer_expert_bytes(NULL, 0) == 0 && moe_layer_expert_bytes(m, RE) == 0);
    CHECK_OK(moe_layer_pes(m, NULL, 0, &pes));
    CHECK(pes == 0);
    moe_tape_free(t);
    moe_layer_free(m), moe_layer_free(other);
    uint64_t load[RE] = {9, 1, 1, 1};
    m = layer_of("d_model=32 d_ff=64");
    if (!CHECK_OK(moe_layer_quantize(m, &int8, &other))) return;
    moe_replicate_desc replicas;
    moe_replicate by_default, by_hand;
    memset(&replicas, 0, sizeof replicas);
    replicas.load = load, replicas.small = MOE_FORMAT_INT8, replicas.budget = 100000;
    replicas.n_experts = RE + 1;
    CHECK_STATUS(moe_layer_replicate(m, &replicas, &made, NULL), MOE_E_N_EXPERTS);
    replicas.n_experts = RE, replicas.full = MOE_FORMAT_COUNT;
    CHECK_STATUS(moe_layer_replicate(m, &replicas, &made, NULL), MOE_E_FORMAT);
    replicas.full = MOE_FORMAT_F32, replicas.small = MOE_FORMAT_COUNT;
    CHECK_STATUS(moe_layer_replicate(m, &replicas, &made, NULL), MOE_E_FORMAT);
    replicas.small = MOE_FORMAT_INT8;
    if (CHECK_OK(moe_layer_replicate(m, &replicas, &made, &by_default))) moe_layer_free(made);
    replicas.full_bytes = moe_layer_expert_bytes(m, 0), replicas.small_bytes = moe_layer_expert_bytes(other, 0);
    if (CHECK_OK(moe_layer_replicate(m, &replicas, &made, &by_hand))) moe_layer_free(made);
    CHECK(!memcmp(&by_default, &by_hand, sizeof by_hand));
    moe_layer_free(m), moe_layer_free(other);
}
/* Controllers of a layer: a step that is refused moves nothing; biases in the middle; the coefficient of the switch
 * loss; scores in the caller's memory. */
static void test_layer_controllers(void) {
    static const char *const texts[] = {"controller=bias controller_rate=0.25 controller_recentre=true",
                                        "controller=adaptive loss.switch=0.5",
                                        "controller=quantile"};
    float x[RT * RD], y[RT * RD];
    CHECK_OK(moe_rand_uniform(3, 1, RT * RD, -1, 1, x)); /* the first expert's load is not the mean */
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        moe_layer *m = layer_of(texts[i]);
        if (!m) continue;
        moe_control *control = moe_layer_control(m);
        float rate = control->rate, sum = 0;
        CHECK_OK(moe_forward(m, NULL, 0, NULL));
        CHECK_OK(moe_backward(m, NULL, NULL)); /* of no tokens nothing is counted */
        CHECK_OK(moe_forward(m, x, RT, y));
        CHECK_OK(moe_backward(m, x, NULL));
        CHECK(!memcmp(moe_layer_step_load(m), moe_layer_tape(m)->routes.load, RE * sizeof(uint64_t)));
        uint64_t before = moe_layer_hash(m);
        control->rate = NAN;
        CHECK_STATUS(moe_step(m, 0.1f), MOE_E_RATE);
        CHECK(moe_layer_hash(m) == before);
        control->rate = rate;
        CHECK_OK(moe_step(m, 0.1f));
        for (size_t e = 0; e < RE && control->bias; e++) sum += control->bias[e];
        if (i == 0) CHECK(sum == 0 && control->bias[0] != 0);
        if (i == 1) CHECK_BITS(moe_layer_desc(m)->loss[MOE_LOSS_SWITCH], *control->coefficient);
        if (i == 1) CHECK(*control->coefficient < 0.5f);
        moe_layer_free(m);
    }
    moe_layer *m = layer_of("controller=quantile"), *placed = NULL;
    moe_desc d = *moe_layer_desc(m);
    moe_tape *t = NULL;
    size_t bytes = 0;
    CHECK_OK(moe_layer_size(&d, &bytes));
    size_t more = 256 + 7 * RT * (RE + 2) * sizeof(float), backwards[2];
    void *memory = test_memory(bytes + more, 1);
    CHECK_OK(moe_tape_new(&t, &d, RT, MOE_ON));
    for (int enough = 0; enough < 2; enough++) { /* scores of so many backwards fit; then a step is due */
        moe_status status = MOE_OK;
        CHECK_OK(moe_layer_init(&placed, &d, memory, bytes + more * (size_t)enough));
        for (backwards[enough] = 0; !status && backwards[enough] < 1000; backwards[enough]++) {
            CHECK_OK(moe_forward_tape(placed, t, x, RT, y));
            status = moe_backward_tape(placed, t, x, NULL);
        }
        CHECK_STATUS(status, MOE_E_NO_MEMORY);
        long before = test_allocations;
        CHECK_OK(moe_step(placed, 0.1f));
        CHECK(test_allocations == before);
        CHECK_OK(moe_forward_tape(placed, t, x, RT, y));
        CHECK_OK(moe_backward_tape(placed, t, x, NULL));
        moe_layer_free(placed);
    }
    CHECK(backwards[1] >= backwards[0] + 7);
    free(memory);
    moe_tape_free(t);
    moe_layer_free(m);
}
/* Sparse steps: a tensor that no expert has is always there, and what is set is what is got. */
static void test_sparse_tensors(void) {
    static const char *const names[] = {"router", "experts.w1", "experts.constant"};
    moe_layer *m = layer_of("sparse_step=true n_constant=1");
    float x[RD], y[RD], ones[RE * RD * 5], got[RE * RD * 5];
    test_fill(x, RD, -1, 1);
    for (size_t i = 0; i < RE * RD * 5; i++) ones[i] = 1;
    for (int before = 0; before < 2; before++) {
        if (!before) CHECK_OK(moe_forward(m, x, 1, y)); /* one token: some experts have no gradient */
        if (!before) CHECK_OK(moe_backward(m, x, NULL));
        for (int i = 0; i < 3; i++) {
            moe_tensor tensor;
            size_t k = 0;
            while (!moe_layer_tensor(m, k, &tensor) && strcmp(tensor.name, names[i])) k++;
            CHECK_OK(moe_layer_set(m, MOE_PART_GRADS, names[i], ones, tensor.count));
            CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, names[i], got, tensor.count));
            CHECK_SAME(got, ones, tensor.count);
        }
        CHECK_OK(moe_step(m, 0.1f));
    }
    moe_layer_free(m);
}

int main(void) {
    RUN(test_oracle_by_finite_differences);
    RUN(test_all_combinations);
    RUN(test_shapes);
    RUN(test_token_counts);
    RUN(test_one_expert_takes_all);
    RUN(test_capacity_bounds);
    RUN(test_micro_batches);
    RUN(test_batch_size_changes_no_bit);
    RUN(test_inference_only);
    RUN(test_get_set);
    RUN(test_layer_hash);
    RUN(test_set_gradients_after_step);
    RUN(test_norm_and_scale);
    RUN(test_sparse_step);
    RUN(test_layer_health);
    RUN(test_drop_rate);
    RUN(test_nan_batch);
    RUN(test_it_learns);
    RUN(test_losses_refused);
    RUN(test_refused);
    RUN(test_layer_controllers);
    RUN(test_sparse_tensors);
    return test_end();
}

/* Balance in a layer: what each loss and controller does to a collapsed router, held against docs/math.md; a bias that
 * has no gradient and no part in weights; statistics summed over micro-batches; state that is saved; the same bits. */
#include "test.h"
#include "inside.h"
#include "examples/common/loss_cases.h"

/* ---- a task on which a router collapses ----
 * A token is of one of TYPES types, and its target is the token turned round by as many places as its type says: one
 * expert does it badly, eight do it well. The last number of each token is a constant, and the router begins by looking
 * at that for its first expert. So all tokens begin there, and the task alone leaves them there. */
enum { D = 16, F = 8, E = 8, TYPES = 8, T = 128, STEPS = 120 };

static void make_batch(uint64_t seed, size_t n, float *x, float *target, int32_t *type) {
    CHECK_OK(moe_rand_normal(seed, 7, n * D, 0, 0.5f, x));
    for (size_t t = 0; t < n; t++) {
        size_t kind = moe_rand_u32(seed, 8, t) % TYPES;
        x[t * D + kind] += 2;
        x[t * D + D - 1] = 4;
        type[t] = (int32_t)kind;
        for (size_t i = 0; target && i < D; i++) target[t * D + i] = x[t * D + (i + kind) % D];
    }
}

static moe_layer *make_layer(const char *set, size_t threads) {
    moe_layer *m = NULL;
    moe_desc d;
    moe_tensor tensor;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.top_k = 1, d.sequence = 16, d.seed = 5;
    d.parallel.n_threads = threads;
    if (!CHECK_OK(moe_desc_parse(&d, set, NULL))) return NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) printf("    %s\n", set);
    if (!m) return NULL;
    CHECK_OK(moe_layer_tensor(m, 0, &tensor));
    float *router = test_floats(tensor.count);
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "router", router, tensor.count));
    /* not behind a hidden layer */
    for (size_t i = 0; tensor.dim[0] == D && i < D; i++) router[i * E] = i == D - 1 ? 1 : 0;
    CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, "router", router, tensor.count));
    free(router);
    return m;
}

typedef enum teacher { CLASS_TEACHER, BEST_TEACHER } teacher;

/* The expert whose output alone is nearest to the target. */
static void best_teacher(moe_layer *m, moe_tape *tape, const float *x, const float *target, int32_t *out) {
    static float y[T * D], error[T * E], one[T];
    static int32_t index[T];
    for (size_t t = 0; t < T; t++) one[t] = 1;
    for (size_t e = 0; e < E; e++) {
        for (size_t t = 0; t < T; t++) index[t] = (int32_t)e;
        CHECK_OK(moe_tape_tokens(tape, x, T));
        CHECK_OK(moe_routes_fill(&tape->routes, T, index, one, 0, MOE_ORDER_TOKEN));
        CHECK_OK(moe_experts_forward(tape, inside_params(m), y));
        for (size_t t = 0; t < T; t++) {
            float sum = 0;
            for (size_t i = 0; i < D; i++)
                sum += (y[t * D + i] - target[t * D + i]) * (y[t * D + i] - target[t * D + i]);
            error[t * E + e] = sum;
        }
    }
    CHECK_OK(moe_teacher_best(T, E, error, out));
}

typedef struct outcome {
    double share;         /* of the busiest expert among the tokens, at first */
    double before, after; /* MaxVio: of the first step; mean of the last ten steps */
    double pooled;        /* of the last ten steps' loads together */
    double loss;
} outcome;

static outcome train(const char *set, teacher who) {
    static float x[T * D], y[T * D], target[T * D], dy[T * D];
    static int32_t type[T], best[T];
    outcome r = {0, 0, 0, 0, 0};
    uint64_t load[E] = {0};
    moe_health h;
    moe_tape *tape = NULL;
    moe_layer *m = make_layer(set, 1);
    if (!m) return r;
    if (who == BEST_TEACHER) CHECK_OK(moe_tape_new(&tape, moe_layer_desc(m), T, MOE_OFF));
    for (int step = 0; step < STEPS; step++) {
        make_batch((uint64_t)step, T, x, target, type);
        if (tape) best_teacher(m, tape, x, target, best);
        moe_layer_side(m)->teacher = tape ? best : type;
        CHECK_OK(moe_layer_health_reset(m));
        if (!CHECK_OK(moe_forward(m, x, T, y))) break;
        r.loss = 0;
        for (size_t i = 0; i < T * D; i++) {
            float error = y[i] - target[i];
            r.loss += (double)(error * error) / (T * D);
            dy[i] = 2 * error / (T * D);
        }
        if (!CHECK_OK(moe_backward(m, dy, NULL))) break;
        CHECK_OK(moe_layer_health(m, &h));
        if (step == 0) r.before = h.maxvio;
        for (size_t e = 0; step == 0 && e < E; e++)
            if ((double)h.load[e] / T > r.share) r.share = (double)h.load[e] / T;
        if (step >= STEPS - 10) r.after += h.maxvio / 10;
        for (size_t e = 0; step >= STEPS - 10 && e < E; e++) load[e] += h.load[e];
        if (!CHECK_OK(moe_step(m, 0.02f))) break;
    }
    double most = 0, all = 0;
    for (size_t e = 0; e < E; e++) all += (double)load[e], most = (double)load[e] > most ? (double)load[e] : most;
    r.pooled = most * E / all - 1;
    moe_tape_free(tape);
    moe_layer_free(m);
    return r;
}

/* ---- from a collapsed start ---- */
#define COSINE LOSS_CASES_COSINE

typedef struct case_of {
    const char *name, *set, *field;
    double coefficient;
    int balances; /* MaxVio falls by a factor of three or more; if not, then at no coefficient */
} case_of;

#define IN_LAYER(KIND, name, reads, set, coefficient, even, about) {name, set, "loss." name, even, even > 0},
#define NO_LAYER(KIND, name, reads) {name, NULL, "loss." name, 0, 0},
static const case_of cases[] = { /* in the order of the library's tables */
    LOSS_CASES(IN_LAYER, NO_LAYER)
    {"bias", "controller=bias", "controller_rate", 0.02, 1},
    {"quantile", "controller=quantile", NULL, 0, 1},
    {"id", "controller=id", "controller_rate", 0.03, 1},
    {"relu-lambda", "gate=relu loss.relu-l1=0.0001 controller=relu-lambda", "controller_rate", 1.2, 1},
    {"adaptive", "controller=adaptive capacity_factor=1.25 loss.switch=0.1", NULL, 0, 1},
    {"usage-boost", "controller=usage-boost", "controller_rate", 0, 0},
};

enum { CASES = sizeof cases / sizeof *cases };

static void check_case(const case_of *c) {
    static const double strengths[] = {1, 0.1, 10}; /* of one that cannot */
    for (int i = 0; i < (c->balances || TEST_SANITIZED ? 1 : 3); i++) {
        char set[160];
        const char *more = "";
        if (!strcmp(c->name, "importance-selected")) more = "top_k=2"; /* or no weight but the winner's is in it */
        if (!strcmp(c->name, "locality")) more = "n_ranks=8";          /* an expert each */
        snprintf(set, sizeof set, "%s %s %s%s", c->set, more, c->field ? c->field : "", c->field ? "=" : "");
        if (c->field)
            snprintf(set + strlen(set), sizeof set - strlen(set), "%g", c->balances ? c->coefficient : strengths[i]);
        outcome r = train(set, CLASS_TEACHER);
        int fell = r.after * 3 <= r.before;
        if (!CHECK(r.share > 0.9) || !CHECK(fell == c->balances))
            printf("    %s: the busiest expert had %.0f%% of the tokens, MaxVio %.2f -> %.2f\n", set, 100 * r.share,
                   r.before, r.after);
    }
}

static void test_collapsed(void) {
    outcome alone = train("", CLASS_TEACHER);
    CHECK(alone.share > 0.9 && alone.before > 6 && alone.after > 6);
    for (size_t i = 0; i < CASES; i++)
        if (cases[i].set) check_case(&cases[i]);
}

static void test_every_row_has_a_case(void) {
    CHECK(CASES == MOE_LOSS_COUNT + MOE_CONTROL_COUNT - 1);
    for (int i = 0; i < MOE_LOSS_COUNT; i++) CHECK(!strcmp(cases[i].name, moe_loss_name((moe_loss_kind)i)));
    for (int i = 1; i < MOE_CONTROL_COUNT; i++)
        CHECK(!strcmp(cases[MOE_LOSS_COUNT + i - 1].name, moe_control_name((moe_control_kind)i)));
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.loss[MOE_LOSS_LATENT_KL] = 1;
    CHECK_STATUS(moe_desc_resolve(&d, &d), MOE_E_LOSS_LATENT_KL);
    for (int i = 0; i < MOE_LOSS_COUNT; i++) { /* what a bare layer lacks is said by the name of the loss */
        char field[64];
        memset(&d, 0, sizeof d);
        d.d_model = D, d.score = MOE_SCORE_HASH, d.combine = i % 2 ? MOE_COMBINE_ROBUST : MOE_COMBINE_DEFAULT;
        d.loss[i] = 1, d.n_zero = i % 2 ? 0 : 1;
        snprintf(field, sizeof field, "loss.%s", moe_loss_name((moe_loss_kind)i));
        moe_status status = moe_desc_resolve(&d, &d);
        if (status) CHECK(!strcmp(moe_status_field(status), field));
        CHECK(status != MOE_E_LOSS_STAGE);
    }
}

/* What docs/math.md says of each: "yes" or "no". */
static void test_document(void) {
    FILE *f = fopen("docs/math.md", "r");
    char line[1024], want[96];
    size_t row = 0;
    int on = 0;
    if (!CHECK(f != NULL)) return;
    while (fgets(line, sizeof line, f)) {
        if (!strncmp(line, "| loss or controller | balances |", 33)) { on = 1; continue; }
        if (!on || !strncmp(line, "| ---", 5)) continue;
        if (line[0] != '|') break;
        if (!CHECK(row < CASES)) break;
        snprintf(want, sizeof want, "| `%s` | %s |", cases[row].name, cases[row].balances ? "yes" : "no");
        if (!CHECK(!strncmp(line, want, strlen(want)))) printf("    %s    does not begin with %s\n", line, want);
        row++;
    }
    fclose(f);
    CHECK(row == CASES);
}

/* Where the teacher or the view decides. */
static void test_depends(void) {
    outcome best = train("loss.oracle=1", BEST_TEACHER); /* the only trained expert is the best one */
    CHECK(best.before > 6 && best.after > 6);
    outcome boost = train("controller=usage-boost controller_rate=1", CLASS_TEACHER); /* all tokens move together */
    CHECK(boost.after > 6 && boost.pooled * 3 <= boost.before);
    outcome single = train("loss.importance-selected=0.1", CLASS_TEACHER); /* no weight but the winner's is in it */
    CHECK(single.after * 3 > single.before);
    outcome two = train("top_k=2", CLASS_TEACHER); /* so it was the loss, not the second choice, that balanced these */
    CHECK(two.after * 3 > two.before);
}

/* ---- a bias: no gradient, no part in weights ---- */
enum { PARAMS_MAX = 1 << 16 };

static size_t all_of(const moe_layer *m, moe_part_kind part, float *out) {
    size_t n = 0;
    for (size_t i = 0; i < moe_layer_tensors(m); i++) {
        moe_tensor t;
        CHECK_OK(moe_layer_tensor(m, i, &t));
        if (!CHECK(n + t.count <= PARAMS_MAX)) return n;
        CHECK_OK(moe_layer_get(m, part, t.name, out + n, t.count));
        n += t.count;
    }
    return n;
}

static void test_bias(void) {
    static const char *const gates[] = {"gate=softmax normalize=false", "gate=softmax", "gate=softmax-selected",
                                        "gate=sigmoid normalize=false"};
    static float x[T * D], y[T * D], dy[T * D], dx[2][T * D], grad[2][PARAMS_MAX], weight[T * 2], one[E];
    static int32_t type[T], index[T * 2];
    make_batch(1, T, x, NULL, type);
    CHECK_OK(moe_rand_normal(2, 0, T * D, 0, 1, dy));
    for (size_t g = 0; g < sizeof gates / sizeof *gates; g++) {
        char set[160];
        snprintf(set, sizeof set, "top_k=2 controller=bias loss.switch=0.1 loss.z=0.1 %s", gates[g]);
        moe_layer *m = make_layer(set, 1);
        if (!m) return;
        moe_control *c = moe_layer_control(m);
        const moe_tape *t;
        size_t n = 0, same = 0, other = 0;
        /* a bias that changes no choice changes no bit */
        for (int pass = 0; pass < 2; pass++) {
            for (size_t e = 0; e < E; e++) c->bias[e] = pass ? 1.5f : 0;
            CHECK_OK(moe_forward(m, x, T, y));
            CHECK_OK(moe_backward(m, dy, dx[pass]));
            n = all_of(m, MOE_PART_GRADS, grad[pass]);
            CHECK_OK(moe_layer_scale_grads(m, 0));
        }
        CHECK_SAME(grad[0], grad[1], n);
        CHECK_SAME(dx[0], dx[1], T * D);
        for (size_t e = 0; e < E; e++) CHECK(c->bias[e] == 1.5f);
        /* one that changes some: the weights of the others are the same bits */
        t = moe_layer_tape(m);
        memcpy(index, t->index, sizeof index), memcpy(weight, t->weight, sizeof weight);
        for (size_t e = 0; e < E; e++) c->bias[e] = e < E / 2 ? 0.02f : -0.02f;
        CHECK_OK(moe_forward(m, x, T, y));
        for (size_t i = 0; i < T; i++) {
            int equal = index[2 * i] == t->index[2 * i] && index[2 * i + 1] == t->index[2 * i + 1];
            if (!equal) other++;
            for (int k = 0; equal && k < 2; k++)
                same += CHECK_BITS(weight[2 * i + (size_t)k], t->weight[2 * i + (size_t)k]) != 0;
            if (g == 0) /* and those of the new choices are the scores as they are */
                for (size_t k = 0; k < 2; k++)
                    CHECK_BITS(t->weight[2 * i + k], t->prob[i * E + (size_t)t->index[2 * i + k]]);
        }
        CHECK(same > 0 && other > 0);
        /* no gradient reaches it, however large: a step moves it by the rate */
        memcpy(one, c->bias, sizeof one);
        for (size_t i = 0; i < T * D; i++) dy[i] *= 100;
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_SAME(one, c->bias, E);
        const uint64_t *load = moe_layer_step_load(m);
        float want[E];
        uint64_t all = 0;
        for (size_t e = 0; e < E; e++) all += load[e];
        for (size_t e = 0; e < E; e++)
            want[e] = one[e] + (load[e] * E > all ? -0.001f : load[e] * E < all ? 0.001f : 0);
        CHECK_OK(moe_step(m, 10));
        CHECK_SAME(want, c->bias, E);
        for (size_t i = 0; i < T * D; i++) dy[i] /= 100;
        CHECK_STATUS(moe_layer_get(m, MOE_PART_GRADS, "controller.state", one, E), MOE_E_PART);
        moe_layer_free(m);
    }
}

/* ---- a batch cut into micro-batches ---- */
/* Losses whose gradient is that of the whole, however it is cut; `counts`: only with what the side says of it. */
static const struct { const char *set; int counts; } global[] = {
    {"top_k=2 loss.switch=1", 1},
    {"top_k=2 loss.switch=1 switch_load=first", 1},
    {"top_k=2 loss.switch=1 switch_load=tokens", 1},
    {"top_k=2 n_ranks=4 loss.rank=1", 1},
    {"top_k=2 n_ranks=4 loss.communication=1", 1},
    {"gate=relu top_k=2 loss.relu-l1=1", 1},
    {"loss.importance=1", 1},
    {"loss.kl-uniform=1", 1},
    {"loss.kl-reverse=1", 1},
    {"loss.mutual-information=1", 1},
    {"loss.l2-uniform=1", 1},
    {"loss.variance=1", 1},
    {"loss.z=1", 0},
    {"loss.entropy=1", 0},
    {"loss.certainty=1", 0},
    {"loss.sequence=1", 0},
    {"loss.oracle=1", 0},
    {"loss.simbal=1", 0},
    {"loss.diverse-simple=1", 0},
    {COSINE " loss.prototype-alignment=1", 0},
    {COSINE " loss.prototype-diversity=1", 0},
    {COSINE " loss.prototype-orthogonality=1", 0},
    {"top_k=2 expert=relu loss.output-orthogonality=1", 0},
    {"n_codes=16 loss.codebook=1", 0},
    {"expert=orthonormal loss.orthonormal=1", 0},
};
/* These look at the batch in a way that no number tells: balanced batch by batch. */
static const char *const local[] = {"loss.redundancy=1", "top_k=2 loss.importance-selected=1",
                                    "n_ranks=4 loss.locality=1"};

/* Sizes of the parts; the sequences have 16 tokens. */
static const size_t cuts[][3] = {{48, 16, 64}, {75, 21, 32}, {1, 126, 1}};
enum { CUTS = sizeof cuts / sizeof *cuts, PARTS = 3 };

/* What the side says of the whole: what its parts say, summed; a mean by their sizes. */
typedef struct whole_of { uint64_t load[E], first[E], rank_tokens[E]; double mean[E]; } whole_of;
static void add_to_whole(const moe_tape *t, size_t n_ranks, whole_of *w) {
    double mean[E];
    uint64_t ranks[E] = {0};
    CHECK_OK(moe_mean_scores(t->n_tokens, E, t->prob, mean));
    CHECK_OK(moe_rank_tokens(t->n_tokens, E, t->n_slots, n_ranks, t->index, ranks));
    for (size_t e = 0; e < E; e++) {
        w->load[e] += t->routes.load[e], w->first[e] += t->routes.top1[e], w->rank_tokens[e] += ranks[e];
        w->mean[e] += mean[e] * (double)t->n_tokens / T;
    }
}

/* The largest difference between the gradients of one batch and of its parts, as a share of the largest gradient; and
 * of the losses' values. told: the parts know of the whole. */
static double parts_differ(const char *set, const size_t cut[PARTS], int told) {
    static float x[T * D], y[T * D], dy[T * D], whole[PARAMS_MAX], parts[PARAMS_MAX];
    static int32_t type[T];
    moe_layer *m = make_layer(set, 1);
    moe_tape *t[PARTS] = {NULL};
    whole_of w;
    double most = 0, off = 0, value[MOE_LOSS_COUNT], sum[MOE_LOSS_COUNT] = {0};
    if (!m) return 0;
    memset(&w, 0, sizeof w);
    make_batch(1, T, x, NULL, type);
    CHECK_OK(moe_rand_normal(4, 0, T * D, 0, 0.001f, dy));
    for (size_t i = 0; i < T / 4 * D; i++) x[i] *= -1; /* the first part is unlike the others */
    moe_layer_side(m)->teacher = type;
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_losses(m, value, NULL));
    size_t n = all_of(m, MOE_PART_GRADS, whole);
    CHECK_OK(moe_layer_scale_grads(m, 0));
    for (size_t p = 0, at = 0; p < PARTS; at += cut[p++]) {
        CHECK_OK(moe_tape_new(&t[p], moe_layer_desc(m), cut[p], MOE_ON));
        t[p]->side.teacher = type + at;
        CHECK_OK(moe_forward_tape(m, t[p], x + at * D, cut[p], y));
        add_to_whole(t[p], moe_layer_desc(m)->n_ranks, &w);
    }
    for (size_t p = 0, at = 0; p < PARTS; at += cut[p++]) {
        moe_side *side = &t[p]->side;
        side->loss_weight = (float)cut[p] / T;
        if (told) side->load = w.load, side->first = w.first, side->mean = w.mean, side->counted = T;
        if (told) side->rank_tokens = w.rank_tokens;
        CHECK_OK(moe_backward_tape(m, t[p], dy + at * D, NULL));
        for (int l = 0; l < MOE_LOSS_COUNT; l++) sum[l] += t[p]->loss[l] * (double)cut[p] / T;
    }
    CHECK(all_of(m, MOE_PART_GRADS, parts) == n);
    for (size_t i = 0; i < n; i++) {
        most = fmax(most, fabs((double)whole[i]));
        off = fmax(off, fabs((double)whole[i] - (double)parts[i]));
    }
    for (int l = 0; l < MOE_LOSS_COUNT; l++) off = fmax(off, most * fabs(sum[l] - value[l]) / fmax(fabs(value[l]), 1));
    for (size_t p = 0; p < PARTS; p++) moe_tape_free(t[p]);
    moe_layer_free(m);
    return most > 0 ? off / most : off;
}

static void test_micro_batches(void) {
    for (size_t i = 0; i < sizeof global / sizeof *global; i++)
        for (size_t c = 0; c < CUTS; c++) {
            const char *set = global[i].set;
            if (c && strstr(set, "sequence")) continue; /* a cut through one is another sequence */
            double off = parts_differ(set, cuts[c], 1);
            if (!CHECK_WITHIN(off, 0, 1e-6)) printf("    %s, cut %zu: %.2g\n", set, c, off);
            if (global[i].counts && !CHECK(parts_differ(set, cuts[c], 0) > 1e-4)) printf("    %s: untold too\n", set);
        }
    for (size_t i = 0; i < sizeof local / sizeof *local; i++)
        if (!CHECK(parts_differ(local[i], cuts[0], 1) > 1e-3)) printf("    %s: sees more than its batch\n", local[i]);
}

/* The gradient is linear in the weight, 0 is 1, and what the side may not say. */
static void test_loss_weight(void) {
    static float x[T * D], y[T * D], dy[T * D], one[PARAMS_MAX], other[PARAMS_MAX];
    static int32_t type[T];
    static const float weights[] = {1, 0.25f, 4}; /* powers of 2: exact */
    moe_layer *m = make_layer("loss.z=0.5 loss.switch=0.125 switch_load=first", 1);
    if (!m) return;
    make_batch(1, T, x, NULL, type);
    moe_side *side = moe_layer_side(m);
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, dy, NULL)); /* dy is 0: the losses alone */
    size_t n = all_of(m, MOE_PART_GRADS, one);
    for (size_t i = 0; i < 3; i++) {
        CHECK_OK(moe_layer_scale_grads(m, 0));
        side->loss_weight = weights[i];
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK(all_of(m, MOE_PART_GRADS, other) == n);
        for (size_t k = 0; k < n; k++) other[k] /= weights[i];
        CHECK_SAME(one, other, n);
    }
    static const float bad[] = {-1, NAN, INFINITY};
    uint64_t load[E] = {1};
    double mean[E] = {0};
    CHECK_OK(moe_layer_scale_grads(m, 0));
    for (size_t i = 0; i < 5; i++) {
        side->loss_weight = i < 3 ? bad[i] : 1;
        side->load = i == 3 ? load : NULL; /* without the first choices */
        mean[1] = i == 4 ? (double)NAN : 0, side->mean = mean;
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_STATUS(moe_backward(m, dy, NULL), i < 3 ? MOE_E_LOSS_WEIGHT : i == 3 ? MOE_E_NULL_LOAD : MOE_E_NAN_MEAN);
        double norm;
        CHECK_OK(moe_layer_grad_norm(m, &norm)); /* nothing was added */
        CHECK(norm == 0);
    }
    moe_layer_free(m);
}

/* f of the loss switch for two choices a token, against sums in double. */
static void test_switch_load(void) {
    static const char *const kinds[] = {"all", "first", "tokens"};
    static float x[T * D], y[T * D], dy[T * D], grad[3][D * E];
    static int32_t type[T];
    double value[3];
    make_batch(1, T, x, NULL, type);
    for (size_t i = 0; i < T * D; i++) x[i] *= i % (D * 3) < D ? -1 : 0.5f;
    for (size_t i = 0; i < 3; i++) {
        char set[80];
        double want = 0, f[E] = {0};
        snprintf(set, sizeof set, "top_k=2 loss.switch=1 switch_load=%s", kinds[i]);
        moe_layer *m = make_layer(set, 1);
        if (!m) return;
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_OK(moe_backward(m, dy, NULL));
        const moe_tape *t = moe_layer_tape(m);
        for (size_t c = 0; c < T * 2; c++)
            if (i != 1 || c % 2 == 0) f[t->index[c]] += i == 0 ? 0.5 / T : 1.0 / T;
        for (size_t c = 0; c < T * E; c++) want += f[c % E] * (double)t->prob[c] * E / T;
        value[i] = t->loss[MOE_LOSS_SWITCH];
        CHECK_NEAR(value[i], want, 1e-7);
        CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", grad[i], D * E));
        moe_layer_free(m);
    }
    CHECK_NEAR(value[2], 2 * value[0], 2e-15); /* f sums to k */
    CHECK(fabs(value[1] - value[0]) > 0.1);
    for (size_t i = 0; i < D * E; i++)
        CHECK_WITHIN(grad[2][i], 2 * grad[0][i], 1e-7 * fabs((double)grad[0][i]));
}

/* Controllers: one batch; the same in two backward calls; and half of it here, the other half's loads
 * from elsewhere. */
static const char *const controllers[] = {"controller=bias top_k=2", "controller=id top_k=2", "controller=usage-boost",
                                          "gate=relu loss.relu-l1=1e-4 controller=relu-lambda",
                                          "controller=quantile top_k=2 gate=sigmoid",
                                          "controller=adaptive capacity_factor=1 loss.switch=0.1"};

enum { BY_LOAD = 3, QUANTILE = 4, CONTROLLERS = sizeof controllers / sizeof *controllers };

static void test_controllers_sum(void) {
    static float x[T * D], y[T * D], dy[T * D];
    static int32_t type[T];
    for (size_t c = 0; c < CONTROLLERS; c++) {
        moe_layer *m[3];
        for (int i = 0; i < 3; i++)
            if ((m[i] = make_layer(controllers[c], 1)) == NULL) return;
        size_t state = moe_layer_control(m[0])->n_state;
        for (int step = 0; step < 4; step++) {
            uint64_t half[E];
            double dropped[2] = {0, 0}, selected[2] = {0, 0};
            float before = moe_layer_control(m[1])->state[0];
            make_batch((uint64_t)step, T, x, NULL, type);
            for (size_t p = 0; p < 2; p++) {
                CHECK_OK(moe_forward(m[1], x + p * T / 2 * D, T / 2, y));
                CHECK_OK(moe_backward(m[1], dy, NULL));
                const moe_routes *r = &moe_layer_tape(m[1])->routes;
                memcpy(half, r->load, sizeof half);
                dropped[p] = (double)r->n_dropped, selected[p] = (double)(r->n_dropped + r->n_routes);
            }
            CHECK_OK(moe_forward(m[0], x, T, y));
            CHECK_OK(moe_backward(m[0], dy, NULL));
            for (size_t e = 0; c != QUANTILE && e < E; e++)
                CHECK(moe_layer_step_load(m[0])[e] == moe_layer_step_load(m[1])[e]);
            CHECK_OK(moe_forward(m[2], x, T / 2, y));
            CHECK_OK(moe_backward(m[2], dy, NULL));
            for (size_t e = 0; e < E; e++) moe_layer_step_load(m[2])[e] += half[e];
            for (int i = 0; i < 3; i++) CHECK_OK(moe_step(m[i], 0)); /* the parameters stay, so all route alike */
            if (c < BY_LOAD) CHECK_SAME(moe_layer_control(m[0])->state, moe_layer_control(m[2])->state, state);
            if (c <= BY_LOAD) CHECK_SAME(moe_layer_control(m[0])->state, moe_layer_control(m[1])->state, state);
            /* capacity is a micro-batch's; what it drops is summed */
            if (!strncmp(controllers[c], "controller=adaptive", 19)) {
                double goal = 0.2 * (dropped[0] + dropped[1]) / (selected[0] + selected[1]);
                CHECK(dropped[0] > 0 && dropped[1] > 0);
                CHECK_NEAR(moe_layer_control(m[1])->state[0], 0.99 * (double)before + 0.01 * fmin(goal, 0.01), 1e-7);
            }
        }
        for (int i = 0; i < 3; i++) moe_layer_free(m[i]);
    }
}

/* The quantile is over the scores of every backward since the last step; a forward without a backward
 * does not count. */
static void test_quantile_sees_every_backward(void) {
    static float x[T * D], other[T * D], y[T * D], dy[T * D];
    static int32_t type[T];
    moe_layer *m[3];
    for (int i = 0; i < 3; i++) m[i] = make_layer(controllers[QUANTILE], 1);
    if (!m[0] || !m[1] || !m[2]) return;
    make_batch(2, T, other, NULL, type);
    make_batch(1, T, x, NULL, type);
    for (size_t p = 0; p < 2; p++) {
        CHECK_OK(moe_forward(m[0], x + p * T / 2 * D, T / 2, y));
        CHECK_OK(moe_backward(m[0], dy, NULL));
        CHECK_OK(moe_forward(m[0], other, T, y));
    }
    CHECK_OK(moe_forward(m[1], x, T, y));
    CHECK_OK(moe_backward(m[1], dy, NULL));
    CHECK_OK(moe_forward(m[2], x + T / 2 * D, T / 2, y)); /* the last half alone is something else */
    CHECK_OK(moe_backward(m[2], dy, NULL));
    for (int i = 0; i < 3; i++) CHECK_OK(moe_step(m[i], 0));
    CHECK_SAME(moe_layer_control(m[0])->bias, moe_layer_control(m[1])->bias, E);
    CHECK(memcmp(moe_layer_control(m[2])->bias, moe_layer_control(m[1])->bias, E * sizeof(float)) != 0);
    for (int i = 0; i < 3; i++) moe_layer_free(m[i]);
}

/* ---- files, and the same bits ---- */
static void some_steps(moe_layer *m, int from, int to) {
    static float x[T * D], y[T * D], dy[T * D];
    static int32_t type[T];
    for (int step = from; step < to; step++) {
        make_batch((uint64_t)step, T, x, NULL, type);
        CHECK_OK(moe_rand_normal(3, (uint64_t)step, T * D, 0, 0.01f, dy));
        moe_layer_side(m)->teacher = type;
        CHECK_OK(moe_forward(m, x, T, y));
        CHECK_OK(moe_backward(m, dy, NULL));
        CHECK_OK(moe_step(m, 0.02f));
    }
}

static void test_saved(void) {
    for (size_t c = 0; c < CONTROLLERS; c++) {
        moe_layer *m = make_layer(controllers[c], 1), *copy = NULL;
        size_t bytes = 0;
        if (!m) return;
        some_steps(m, 0, 4);
        size_t n = moe_layer_control(m)->n_state;
        float *before = test_floats(n);
        memcpy(before, moe_layer_control(m)->state, n * sizeof(float));
        CHECK_OK(moe_layer_save_size(m, 1, &bytes));
        void *file = test_memory(bytes, 1);
        CHECK_OK(moe_layer_save_memory(m, 1, file, bytes));
        if (CHECK_OK(moe_layer_load_memory(&copy, file, bytes, NULL))) {
            CHECK_SAME(moe_layer_control(copy)->state, before, n);
            some_steps(m, 4, 8);
            some_steps(copy, 4, 8);
            CHECK(moe_layer_hash(m) == moe_layer_hash(copy));
            CHECK_SAME(moe_layer_control(m)->state, moe_layer_control(copy)->state, n);
            CHECK(memcmp(before, moe_layer_control(m)->state, n * sizeof(float)) != 0);
        }
        free(before), free(file);
        moe_layer_free(m), moe_layer_free(copy);
    }
}

/* Every loss that a layer with these stages can have, and a controller. */
static const char *const rich[] = {
    "top_k=2 noise=learned n_ranks=4 controller=bias",
    "top_k=2 noise=gaussian n_ranks=4 gate=sigmoid controller=quantile",
    "top_k=2 n_ranks=2 n_codes=16 controller=id score=mlp",
    "top_k=2 gate=relu n_ranks=4 controller=relu-lambda",
    "top_k=2 n_ranks=4 capacity_factor=1 controller=adaptive",
    COSINE " top_k=2 n_ranks=4 controller=usage-boost",
    "top_k=2 n_ranks=4 expert=orthonormal",
};

static void test_same_bits(void) {
    int seen[MOE_LOSS_COUNT] = {0};
    for (size_t i = 0; i < sizeof rich / sizeof *rich; i++) {
        char set[1024];
        moe_desc d;
        memset(&d, 0, sizeof d);
        d.d_model = D;
        snprintf(set, sizeof set, "%s", rich[i]);
        CHECK_OK(moe_desc_parse(&d, set, NULL));
        for (int l = 0; l < MOE_LOSS_COUNT; l++) { /* one after the other: those that fit */
            moe_desc with = d, out;
            with.controller = MOE_CONTROL_NONE;
            with.loss[l] = 0.01f;
            if (moe_desc_resolve(&with, &out) != MOE_OK) continue;
            snprintf(set + strlen(set), sizeof set - strlen(set), " loss.%s=0.01", moe_loss_name((moe_loss_kind)l));
            seen[l] = 1;
        }
        uint64_t first = 0;
        FOR_EACH_ISA(isa) {
            for (size_t threads = 1; threads <= 3; threads++) {
                moe_layer *m = make_layer(set, threads);
                if (!m) return;
                some_steps(m, 0, TEST_SANITIZED ? 2 : 6);
                moe_control *c = moe_layer_control(m);
                uint64_t hash =
                    moe_hash(moe_layer_hash(m), c->state ? c->state : (void *)&hash, c->n_state * sizeof(float));
                double value[MOE_LOSS_COUNT];
                CHECK_OK(moe_layer_losses(m, value, NULL));
                hash = moe_hash(hash, value, sizeof value);
                if (!first) first = hash;
                if (!CHECK(hash == first)) printf("    %s, %zu threads: %s\n", moe_isa_name(isa), threads, set);
                moe_layer_free(m);
            }
        }
    }
    for (int l = 0; l < MOE_LOSS_COUNT; l++) CHECK(seen[l] || l == MOE_LOSS_LATENT_KL);
}

/* Fewer tokens than ranks, so that one has none: the mean over the others, in double. */
static void test_locality_of_few(void) {
    enum { FEW = 3, RANKS = 4, SMALL = 1 };
    float x[FEW * D], y[FEW * D], dy[FEW * D] = {0};
    int32_t type[FEW];
    double value[MOE_LOSS_COUNT], want = 0;
    moe_layer *m = make_layer("n_ranks=4 loss.locality=1", SMALL);
    if (!m) return;
    make_batch(1, FEW, x, NULL, type);
    CHECK_OK(moe_forward(m, x, FEW, y));
    const float *p = moe_layer_tape(m)->prob;
    for (size_t t = 0; t < FEW; t++) /* at home on rank t of 4: floor(4 t / 3) */
        for (size_t rank = 0; rank < RANKS; rank++) {
            double share = 0, target = rank == t ? 0.99 : 0.01 / (RANKS - 1);
            for (size_t e = 0; e < E / RANKS; e++) share += (double)p[t * E + rank * (E / RANKS) + e];
            want += share * log(share / target) / FEW;
        }
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_losses(m, value, NULL));
    CHECK_NEAR(value[MOE_LOSS_LOCALITY], want, 1e-6);
    moe_layer_free(m);
}

int main(void) {
    RUN(test_every_row_has_a_case);
    RUN(test_document);
    RUN(test_collapsed);
    RUN(test_depends);
    RUN(test_bias);
    RUN(test_micro_batches);
    RUN(test_loss_weight);
    RUN(test_switch_load);
    RUN(test_controllers_sum);
    RUN(test_quantile_sees_every_backward);
    RUN(test_saved);
    RUN(test_locality_of_few);
    RUN(test_same_bits);
    return test_end();
}

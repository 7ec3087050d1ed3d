/* Masked tokens change nothing: outputs, losses, gradients, controllers, routes and health have the bits of a batch
 * without them, for every system of the table, and what stands in their rows is not read. Sequences of different
 * lengths are those of side.sequence_begin, or what a mask leaves of sequences of one length. */
#include "test.h"

enum { D = 24, F = 16, E = 8, SEQ = 4, T = 72, KEPT = 48, STEPS = 3 };
typedef struct batch {
    float x[T * D], y[T * D], dy[T * D], dx[T * D], previous[T * E], d_previous[T * E];
    uint32_t id[T];
    int32_t teacher[T], index[T * E];
    unsigned char mask[T];
    size_t n, begin[T], n_sequences;
    moe_layer *layer;
    moe_tape *tape;
    moe_health health;
    unsigned char memory[4096];
} batch;
static batch whole, kept;
static size_t place[KEPT];

/* whole: T tokens, of which KEPT count, the others poisoned; kept: these alone, with the same sequences. */
static void draw(void) {
    size_t left = KEPT, last = SIZE_MAX;
    test_fill(whole.x, T * D, -0.5f, 1);
    test_fill(whole.dy, T * D, -1, 1);
    test_fill(whole.previous, T * E, -1, 1);
    kept.n = kept.n_sequences = 0;
    whole.n = T;
    for (size_t t = 0; t < T; t++) {
        whole.id[t] = test_u32() % 1000;
        whole.teacher[t] = (int32_t)(test_u32() % E);
        whole.mask[t] = test_u32() % (T - t) < left;
        for (size_t c = 0; c < D && !whole.mask[t]; c++) whole.x[t * D + c] = whole.dy[t * D + c] = NAN;
        for (size_t e = 0; e < E && !whole.mask[t]; e++) whole.previous[t * E + e] = NAN;
        if (!whole.mask[t]) whole.teacher[t] = 99;
        if (!whole.mask[t]) continue;
        left--;
        if (t / SEQ != last) kept.begin[kept.n_sequences++] = kept.n;
        last = t / SEQ;
        place[kept.n] = t;
        memcpy(kept.x + kept.n * D, whole.x + t * D, D * sizeof(float));
        memcpy(kept.dy + kept.n * D, whole.dy + t * D, D * sizeof(float));
        memcpy(kept.previous + kept.n * E, whole.previous + t * E, E * sizeof(float));
        kept.id[kept.n] = whole.id[t];
        kept.teacher[kept.n++] = whole.teacher[t];
    }
}
static int begin(batch *b, const moe_desc *desc) {
    size_t bytes = 0;
    if (!CHECK_OK(moe_layer_new(&b->layer, desc))) return 0;
    size_t n_experts = moe_layer_desc(b->layer)->n_experts;
    CHECK_OK(moe_health_size(n_experts, &bytes));
    CHECK(bytes <= sizeof b->memory);
    CHECK_OK(moe_health_init(&b->health, n_experts, b->memory, sizeof b->memory));
    return CHECK_OK(moe_tape_new(&b->tape, desc, T, MOE_ON));
}
static void end(batch *b) {
    moe_tape_free(b->tape);
    moe_layer_free(b->layer);
}
static void side(batch *b, int masked, uint64_t step) {
    moe_side *s = &b->tape->side;
    memset(s, 0, sizeof *s);
    s->draw = step, s->id = b->id, s->teacher = b->teacher, s->previous = b->previous, s->d_previous = b->d_previous;
    if (masked) s->mask = b->mask;
    else s->sequence_begin = b->begin, s->n_sequences = b->n_sequences;
    memset(b->d_previous, 0, sizeof b->d_previous);
}
static void run(batch *b, int evaluate) {
    b->tape->side.evaluate = evaluate;
    CHECK_OK(moe_forward_tape(b->layer, b->tape, b->x, b->n, b->y));
    CHECK_OK(moe_tape_index(b->tape, b->index));
    CHECK_OK(moe_health_add(&b->health, &b->tape->routes, b->tape->prob));
    if (evaluate) return;
    CHECK_OK(moe_backward_tape(b->layer, b->tape, b->dy, b->dx));
    CHECK_OK(moe_step(b->layer, 0.02f));
}
static void check_rows(const float *a, const float *b, size_t width) { /* a: whole, masked rows 0; b: kept */
    static const float zero[D];
    for (size_t i = 0, t = 0; t < T; t++) {
        int counts = i < KEPT && place[i] == t;
        CHECK_SAME(a + t * width, counts ? b + i * width : zero, width);
        i += (size_t)counts;
    }
}
static void compare(void) {
    double a[MOE_LOSS_COUNT], b[MOE_LOSS_COUNT];
    size_t S = kept.tape->n_slots;
    check_rows(whole.y, kept.y, D);
    if (whole.health.n_experts == E) check_rows(whole.d_previous, kept.d_previous, E);
    CHECK(whole.tape->n_tokens == KEPT && whole.tape->n_given == T && kept.tape->n_given == KEPT && !kept.tape->kept);
    for (size_t i = 0; i < KEPT; i++) {
        CHECK(whole.tape->kept[i] == place[i]);
        CHECK(!memcmp(whole.index + place[i] * S, kept.index + i * S, S * sizeof(int32_t)));
    }
    for (size_t t = 0; t < T; t++)
        for (size_t s = 0; s < S && !whole.mask[t]; s++) CHECK(whole.index[t * S + s] == -1);
    CHECK_OK(moe_layer_losses(whole.layer, a, NULL));
    CHECK_OK(moe_layer_losses(kept.layer, b, NULL));
    CHECK(!memcmp(a, b, sizeof a));
    CHECK(moe_layer_hash(whole.layer) == moe_layer_hash(kept.layer));
    CHECK(whole.health.n_tokens == kept.health.n_tokens);
    CHECK(!memcmp(whole.health.load, kept.health.load, kept.health.n_experts * sizeof *kept.health.load));
}
static void check_desc(const char *system, const char *more, size_t sequence) {
    moe_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.d_model = D, desc.d_ff = F, desc.n_experts = E, desc.sequence = sequence, desc.seed = 5;
    if (system) CHECK_OK(moe_desc_system(&desc, system));
    CHECK_OK(moe_desc_parse(&desc, more, NULL));
    draw();
    if (!sequence) kept.n_sequences = 1;
    if (!begin(&whole, &desc) || !begin(&kept, &desc)) return;
    for (uint64_t step = 0; step < STEPS; step++) {
        side(&whole, 1, step), side(&kept, 0, step);
        run(&whole, 0), run(&kept, 0);
        check_rows(whole.dx, kept.dx, D);
        compare();
    }
    side(&whole, 1, 9), side(&kept, 0, 9);
    run(&whole, 1), run(&kept, 1);
    compare();
    end(&whole), end(&kept);
}

static void test_every_system(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) {
        int errors = test_errors;
        check_desc(moe_system_at(i)->name, "", SEQ);
        check_desc(moe_system_at(i)->name, "", 0);
        if (errors != test_errors) printf("        %s\n", moe_system_at(i)->name);
    }
}
/* What no row has: each loss, noise, capacity, ranks, drops, schedules, controllers. */
static void test_choices(void) {
    static const char *const more[] = {
        "loss.switch=1 loss.z=1 loss.oracle=1 loss.sequence=1 loss.redundancy=1 loss.variance=1 loss.entropy=1",
        "gate=sigmoid loss.sequence=1 jitter=0.1 noise=learned loss.load=1 normalize=true top_k=3",
        "capacity_factor=0.6 capacity_order=weight n_shared=2 loss.importance-selected=1 loss.kl-uniform=1",
        "n_ranks=4 gate_drop=0.5 loss.rank=1 loss.communication=1 loss.locality=1",
        "random_steps=2 expert_drop=0.3 random_second=true top_k_min=1 schedule_steps=3",
        "controller=quantile residual=true n_constant=2 n_copy=1 n_zero=1",
        "controller=bias controller_rate=0.1 select=groups n_groups=4 top_groups=2",
        "route_sequence=true noise=gumbel score=random", "score=hash n_codes=8 loss.codebook=1",
        "combine=soft select=all soft_slots=2 loss.z=1", "combine=merge select=all expert_drop=0.5",
    };
    for (size_t i = 0; i < sizeof more / sizeof *more; i++) {
        int errors = test_errors;
        check_desc(NULL, more[i], SEQ);
        check_desc(NULL, more[i], 0);
        if (errors != test_errors) printf("        %s\n", more[i]);
    }
}

/* A mask of all ones, and sequence_begin that says what desc.sequence says, give the bits of neither. */
static void test_nothing_masked(void) {
    static float y[T * D];
    size_t at[T / SEQ];
    moe_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.d_model = D, desc.d_ff = F, desc.sequence = SEQ;
    CHECK_OK(moe_desc_parse(&desc, "route_sequence=true loss.sequence=1", NULL));
    test_fill(whole.x, T * D, -1, 1);
    CHECK_OK(moe_layer_new(&whole.layer, &desc));
    CHECK_OK(moe_forward(whole.layer, whole.x, T, y));
    memset(whole.mask, 7, T);
    moe_layer_side(whole.layer)->mask = whole.mask;
    CHECK_OK(moe_forward(whole.layer, whole.x, T, whole.y));
    CHECK_SAME(whole.y, y, T * D);
    for (size_t i = 0; i < T / SEQ; i++) at[i] = i * SEQ;
    moe_layer_side(whole.layer)->sequence_begin = at, moe_layer_side(whole.layer)->n_sequences = T / SEQ;
    CHECK_OK(moe_forward(whole.layer, whole.x, T, whole.y));
    CHECK_SAME(whole.y, y, T * D);
    memset(whole.mask, 0, T); /* all masked: nothing is left, and nothing is wrong with that */
    CHECK_OK(moe_forward(whole.layer, whole.x, T, whole.y));
    for (size_t i = 0; i < T * D; i++) CHECK(whole.y[i] == 0);
    CHECK_OK(moe_backward(whole.layer, whole.dy, whole.dx));
    for (size_t i = 0; i < T * D; i++) CHECK(whole.dx[i] == 0);
    CHECK_OK(moe_step(whole.layer, 0.1f));
    moe_layer_free(whole.layer);
}

/* Sequences of 3, 1 and 4 tokens: a router that sees the mean of each routes by that mean; loss.sequence is the mean of
 * the three sequences' own. Both in double here. */
static double mean_logit(const float *router, size_t from, size_t to, size_t e) {
    double z = 0;
    for (size_t t = from; t < to; t++)
        for (size_t c = 0; c < D; c++) z += (double)whole.x[t * D + c] * (double)router[c * E + e];
    return z / (double)(to - from);
}
static double switch_of(const moe_tape *tape, size_t from, size_t to) {
    double sum = 0, share[E] = {0}, load[E] = {0};
    size_t S = tape->n_slots;
    for (size_t t = from; t < to; t++) {
        for (size_t e = 0; e < E; e++) share[e] += (double)tape->prob[t * E + e] / (double)(to - from);
        for (size_t s = 0; s < S; s++) load[tape->index[t * S + s]] += 1.0 / (double)((to - from) * S);
    }
    for (size_t e = 0; e < E; e++) sum += E * share[e] * load[e];
    return sum;
}
static void test_packed_sequences(void) {
    const size_t at[4] = {0, 3, 4, 8}, wrong[3] = {0, 5, 4}, late[1] = {1}, far[2] = {0, 9};
    float router[D * E];
    double losses[MOE_LOSS_COUNT], want = 0;
    for (int route = 0; route < 2; route++) {
        moe_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.d_model = D, desc.d_ff = F, desc.sequence = 2, desc.route_sequence = route ? MOE_ON : MOE_OFF;
        desc.loss[MOE_LOSS_SEQUENCE] = 1;
        test_fill(whole.x, 8 * D, -1, 1);
        test_fill(whole.dy, 8 * D, -1, 1);
        CHECK_OK(moe_layer_new(&whole.layer, &desc));
        CHECK_OK(moe_layer_get(whole.layer, MOE_PART_PARAMS, "router", router, D * E));
        moe_side *s = moe_layer_side(whole.layer);
        s->sequence_begin = at, s->n_sequences = 3;
        CHECK_OK(moe_forward(whole.layer, whole.x, 8, whole.y));
        const moe_tape *tape = moe_layer_tape(whole.layer);
        for (size_t i = 0; i < 3 && route; i++)
            for (size_t t = at[i]; t < at[i + 1]; t++)
                for (size_t e = 0; e < E; e++)
                    CHECK(fabs((double)tape->logits[t * E + e] - mean_logit(router, at[i], at[i + 1], e)) < 1e-7);
        CHECK_OK(moe_backward(whole.layer, whole.dy, whole.dx));
        CHECK_OK(moe_layer_losses(whole.layer, losses, NULL));
        want = 0;
        for (size_t i = 0; i < 3; i++) want += switch_of(tape, at[i], at[i + 1]) / 3;
        CHECK_NEAR(losses[MOE_LOSS_SEQUENCE], want, 1e-6);
        s->sequence_begin = wrong;
        CHECK(moe_forward(whole.layer, whole.x, 8, whole.y) == MOE_E_SEQUENCE_BEGIN);
        s->sequence_begin = late, s->n_sequences = 1;
        CHECK(moe_forward(whole.layer, whole.x, 8, whole.y) == MOE_E_SEQUENCE_BEGIN);
        s->sequence_begin = far, s->n_sequences = 2;
        CHECK(moe_forward(whole.layer, whole.x, 8, whole.y) == MOE_E_SEQUENCE_BEGIN);
        CHECK(moe_backward(whole.layer, whole.dy, whole.dx) == MOE_E_NO_FORWARD);
        moe_layer_free(whole.layer);
    }
    CHECK(want > 0.5);
}
/* More sequences than desc.sequence made room for are refused; the gradient of loss.sequence over packed sequences is
 * its slope. */
static double loss_at(const float *router) {
    double losses[MOE_LOSS_COUNT];
    memset(whole.dy, 0, sizeof whole.dy);
    CHECK_OK(moe_layer_set(whole.layer, MOE_PART_PARAMS, "router", router, D * E));
    CHECK_OK(moe_forward(whole.layer, whole.x, 8, whole.y));
    CHECK_OK(moe_backward(whole.layer, whole.dy, whole.dx));
    CHECK_OK(moe_layer_losses(whole.layer, losses, NULL));
    return losses[MOE_LOSS_SEQUENCE];
}
static void test_packed_slope(void) {
    const size_t at[5] = {0, 3, 4, 5, 6};
    float router[D * E], grads[D * E], step[D * E], up[D * E], down[D * E];
    double slope = 0;
    moe_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.d_model = D, desc.d_ff = F, desc.sequence = 2, desc.loss[MOE_LOSS_SEQUENCE] = 1;
    test_fill(whole.x, 8 * D, -1, 1);
    test_fill(step, D * E, -0.01f, 0.01f);
    CHECK_OK(moe_layer_new(&whole.layer, &desc));
    CHECK_OK(moe_layer_get(whole.layer, MOE_PART_PARAMS, "router", router, D * E));
    moe_side *s = moe_layer_side(whole.layer);
    s->sequence_begin = at, s->n_sequences = 5;
    CHECK(moe_forward(whole.layer, whole.x, 8, whole.y) == MOE_E_N_SEQUENCES);
    CHECK(strstr(moe_status_string(MOE_E_N_SEQUENCES), "desc.sequence") != NULL);
    s->n_sequences = 3;
    (void)loss_at(router);
    CHECK_OK(moe_layer_get(whole.layer, MOE_PART_GRADS, "router", grads, D * E));
    for (size_t i = 0; i < D * E; i++) {
        slope += (double)grads[i] * (double)step[i];
        up[i] = router[i] + 0.1f * step[i], down[i] = router[i] - 0.1f * step[i];
    }
    CHECK_NEAR((loss_at(up) - loss_at(down)) / 0.2, slope, 2e-3);
    moe_layer_free(whole.layer);
}

/* Level 2: the same mask; gradients are added to dx, a masked row of which stays as it is. */
static void test_level_two(void) {
    moe_desc desc;
    size_t n_router = 0, n_params = 0;
    memset(&desc, 0, sizeof desc);
    desc.d_model = D, desc.d_ff = F, desc.n_experts = E;
    draw();
    CHECK_OK(moe_router_count(&desc, &n_router));
    CHECK_OK(moe_experts_count(&desc, &n_params));
    float *router = test_floats(n_router), *params = test_floats(n_params), *d_router[2], *d_params[2];
    test_fill(router, n_router, -1, 1);
    test_fill(params, n_params, -1, 1);
    for (size_t i = 0; i < T * D; i++) whole.dx[i] = (float)i;
    for (size_t i = 0; i < KEPT; i++) memcpy(kept.dx + i * D, whole.dx + place[i] * D, D * sizeof(float));
    batch *const both[2] = {&whole, &kept};
    for (int i = 0; i < 2; i++) {
        batch *b = both[i];
        d_router[i] = test_floats(n_router), d_params[i] = test_floats(n_params);
        CHECK_OK(moe_tape_new(&b->tape, &desc, T, MOE_ON));
        if (!i) b->tape->side.mask = b->mask;
        CHECK_OK(moe_route(b->tape, router, b->x, b->n));
        CHECK_OK(moe_experts_forward(b->tape, params, b->y));
        float *d_weight = test_floats(b->tape->routes.n_routes);
        CHECK_OK(moe_experts_backward(b->tape, params, b->dy, 1, d_params[i], d_weight, b->dx));
        CHECK_OK(moe_route_backward(b->tape, router, d_weight, d_router[i], b->dx));
        free(d_weight);
        moe_tape_free(b->tape);
    }
    check_rows(whole.y, kept.y, D);
    CHECK_SAME(d_router[0], d_router[1], n_router);
    CHECK_SAME(d_params[0], d_params[1], n_params);
    for (size_t i = 0, t = 0; t < T; t++) {
        int counts = i < KEPT && place[i] == t;
        for (size_t c = 0; c < D; c++)
            CHECK(whole.dx[t * D + c] == (counts ? kept.dx[i * D + c] : (float)(t * D + c)));
        i += (size_t)counts;
    }
    for (int i = 0; i < 2; i++) free(d_router[i]), free(d_params[i]);
    free(router), free(params);
}

int main(void) {
    RUN(test_every_system);
    RUN(test_choices);
    RUN(test_nothing_masked);
    RUN(test_packed_sequences);
    RUN(test_packed_slope);
    RUN(test_level_two);
    CHECK(test_live_blocks == 0);
    return test_end();
}

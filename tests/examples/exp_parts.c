/* The parts of experiments.c that a short run cannot show to be right: narrow experts stay narrow, a layer's double has
 * its parameters, E is reached by each knob, tokens saved between two curves, the depth of a collapsed state. */
#include "test.h"

#include "examples/common/exp_collapse.h"
#include "examples/common/exp_ecology.h"
#include "examples/common/exp_simbal.h"

static moe_layer *trained(const size_t *width) { /* 4 experts of 8 hidden units, some narrower, after 3 steps */
    moe_desc d = {.d_model = 16, .n_experts = 4, .d_ff = 8, .top_k = 2};
    moe_layer *m = NULL;
    float x[32 * 16], dy[32 * 16], y[32 * 16];
    nn_must(moe_layer_new(&m, &d));
    if (width) eco_narrow(m, width);
    for (uint64_t step = 0; step < 3; step++) {
        nn_must(moe_rand_normal(1, 2 * step, 32 * 16, 0, 1, x));
        nn_must(moe_rand_normal(1, 2 * step + 1, 32 * 16, 0, 1, dy));
        nn_must(moe_forward(m, x, 32, y));
        nn_must(moe_backward(m, dy, NULL));
        nn_must(moe_step(m, 0.01f));
    }
    return m;
}

static void test_narrow(void) {
    static const size_t width[] = {8, 4, 2, 8};
    moe_layer *m = trained(width);
    float w1[4 * 16 * 8], wu[4 * 16 * 8], w2[4 * 8 * 16];
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "experts.w1", w1, 4 * 16 * 8));
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "experts.wu", wu, 4 * 16 * 8));
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "experts.w2", w2, 4 * 8 * 16));
    for (size_t e = 0; e < 4; e++)
        for (size_t r = 0; r < 16; r++)
            for (size_t f = 0; f < 8; f++) {
                int gone = f >= width[e];
                CHECK((w1[(e * 16 + r) * 8 + f] == 0) == gone);
                CHECK((wu[(e * 16 + r) * 8 + f] == 0) == gone);
                CHECK((w2[(e * 8 + f) * 16 + r] == 0) == gone);
            }
    moe_layer_free(m);
}

static void test_scale(void) { /* an expert of 2 of 8 units: its w2 as large as that of a layer of 2 would be */
    static const size_t width[] = {2, 2, 2, 2};
    moe_desc d = {.d_model = 64, .n_experts = 4, .d_ff = 64}, small = {.d_model = 64, .n_experts = 4, .d_ff = 2};
    moe_layer *wide = NULL, *narrow = NULL;
    float a[4 * 64 * 64], b[4 * 2 * 64];
    double square[2] = {0};
    nn_must(moe_layer_new(&wide, &d));
    nn_must(moe_layer_new(&narrow, &small));
    eco_narrow(wide, width);
    nn_must(moe_layer_get(wide, MOE_PART_PARAMS, "experts.w2", a, 4 * 64 * 64));
    nn_must(moe_layer_get(narrow, MOE_PART_PARAMS, "experts.w2", b, 4 * 2 * 64));
    for (size_t i = 0; i < 4 * 64 * 64; i++) square[0] += (double)a[i] * (double)a[i];
    for (size_t i = 0; i < 4 * 2 * 64; i++) square[1] += (double)b[i] * (double)b[i];
    CHECK_NEAR(square[0], square[1], 0.2); /* 512 random numbers each */
    moe_layer_free(wide);
    moe_layer_free(narrow);
}

static void test_like(void) {
    moe_layer *m = trained(NULL);
    moe_desc d = *moe_layer_desc(m);
    d.prune = 0.2f;
    moe_layer *other = exp_layer_like(m, &d);
    CHECK(moe_layer_hash(other) == moe_layer_hash(m));
    CHECK(moe_layer_desc(other)->prune > 0 && !(moe_layer_desc(m)->prune > 0));
    moe_layer_free(other);
    moe_layer_free(m);
}

static void test_knobs(void) {
    for (int k = 0; k < ECO_KNOBS; k++)
        for (int i = 0; i < ECO_MAX_E; i++) {
            eco_setup s = eco_at(&eco_knobs[k], eco_full[i], ECO_PICTURES);
            CHECK(s.T > 0 && s.H > 0 && s.O >= 0 && s.B >= 0);
            CHECK_NEAR(s.T * s.H / (s.O + s.B), eco_full[i], 1e-9);
        }
}

static void test_saved(void) {
    const double slow[] = {4, 3, 2, 1}, fast[] = {3, 2, 1, 0.5}, half[] = {4, 2, 0, 0}, never[] = {9, 9, 9, 9};
    CHECK_NEAR(simbal_reach(4, slow, 1.5), 0.875, 1e-12); /* half of the way from the third to the fourth quarter */
    CHECK_NEAR(simbal_reach(4, slow, 5), 0.25, 1e-12);
    CHECK(isnan(simbal_reach(4, slow, 0.5)));
    CHECK_NEAR(simbal_saved(4, fast, slow), 0.25, 1e-12);  /* 1 is reached after three quarters */
    CHECK_NEAR(simbal_saved(4, slow, fast), -0.25, 1e-12); /* the other way round: as much is lost */
    CHECK_NEAR(simbal_saved(4, half, slow), 0.375, 1e-12); /* 2 to 0 in the third quarter: 1 in its middle */
    CHECK_NEAR(simbal_saved(4, slow, slow), 0, 1e-12);
    CHECK(simbal_saved(4, never, slow) < 0);
}

static void test_depth(void) { /* against the potential of the forces: s^2 / 2 - lse(Kf s) / Kf, for a = lambda = 1 */
    for (int k = 0; k < 3; k++) {
        double kf = 4.4 + 0.2 * k, depth = 0, sum = 0;
        collapse_router r = collapse_start(8, kf, 1, 1);
        double u = collapse_settle(&r, 100000);
        CHECK(u > 0.5 && u < 1);
        for (size_t i = 0; i < 8; i++) depth += r.s[i] * r.s[i] / 2, sum += exp(kf * r.s[i]);
        depth -= log(sum) / kf;
        double even = 8 * (1.0 / 64) / 2 - log(8 * exp(kf / 8)) / kf;
        CHECK_NEAR(collapse_work(&r), depth - even, 1e-4);
        CHECK((collapse_work(&r) < 0) == (kf > 4.5405)); /* Kc */
    }
}

int main(void) {
    RUN(test_narrow);
    RUN(test_scale);
    RUN(test_like);
    RUN(test_knobs);
    RUN(test_saved);
    RUN(test_depth);
    return test_end();
}

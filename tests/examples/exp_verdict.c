/* exp_verdict.h: every verdict on both sides of its border, on numbers made up for it. */
#include "test.h"

#include "examples/common/exp_verdict.h"

static void test_threshold(void) {
    exp_sides s;
    const double at[] = {0.1, 0.3, 0.5, 1}, clean[] = {3, 1, 0, 0}, late[] = {3, 0, 0, 2}, none[] = {0, 0, 0, 0};
    CHECK(exp_threshold(4, at, clean, 0.5, &s) == EXP_CONFIRMED);
    CHECK(s.above == 2 && s.above_bad == 0 && s.below == 2 && s.below_bad == 2);
    CHECK(exp_threshold(4, at, clean, 0.3, &s) == EXP_NOT_CONFIRMED);
    CHECK(s.above == 3 && s.above_bad == 1 && s.most == 1);
    CHECK(exp_threshold(4, at, late, 0.5, &s) == EXP_NOT_CONFIRMED && s.most == 2);
    CHECK(exp_threshold(4, at, none, 0.5, &s) == EXP_NOT_TESTABLE); /* nothing died below either */
    CHECK(exp_threshold(2, at, clean, 0.5, &s) == EXP_NOT_TESTABLE); /* nothing above */
    const double unknown[] = {3, 1, NAN, 0}, rounded[] = {0.1, 0.5 * (1 - 1e-7)}, two[] = {1, 1};
    CHECK(exp_threshold(4, at, unknown, 0.5, &s) == EXP_CONFIRMED && s.above == 1);
    CHECK(exp_threshold(2, rounded, two, 0.5, &s) == EXP_NOT_CONFIRMED && s.above == 1); /* a float32's 0.5 */
}

static void test_positive(void) {
    /* differences 1, 2, 3: mean 2, deviation 1, t of 2 degrees 4.303: half = 4.303 / sqrt(3) = 2.484 */
    const double wide[] = {1, 2, 3}, narrow[] = {2.4, 2.5, 2.6}, below[] = {-2.4, -2.5, -2.6};
    CHECK_NEAR(spread_half(spread_of(3, wide)), 4.303 / sqrt(3), 1e-6);
    CHECK(exp_positive(spread_of(3, wide)) == EXP_NOT_CONFIRMED);
    CHECK(exp_positive(spread_of(3, narrow)) == EXP_CONFIRMED);
    CHECK(exp_positive(spread_of(3, below)) == EXP_NOT_CONFIRMED);
    CHECK(exp_positive(spread_of(1, narrow)) == EXP_NOT_TESTABLE);
    CHECK(exp_differs(spread_of(3, narrow)) == EXP_CONFIRMED);
    CHECK(exp_differs(spread_of(3, below)) == EXP_CONFIRMED);
    CHECK(exp_differs(spread_of(3, wide)) == EXP_NOT_CONFIRMED);
    CHECK(exp_differs(spread_of(1, below)) == EXP_NOT_TESTABLE);
}

static void test_same(void) {
    const double near_zero[] = {-0.1, 0, 0.1}, away[] = {2.4, 2.5, 2.6}, wide[] = {-2, 0, 2};
    CHECK(exp_same(spread_of(3, near_zero), 0.5) == EXP_CONFIRMED);
    CHECK(exp_same(spread_of(3, away), 0.5) == EXP_NOT_CONFIRMED);
    CHECK(exp_same(spread_of(3, wide), 0.5) == EXP_NOT_TESTABLE);
    CHECK(exp_same(spread_of(1, away), 0.5) == EXP_NOT_TESTABLE);
}

static void test_at_least(void) {
    const double r[] = {0.95, 0.89, NAN}, none[] = {NAN, NAN};
    CHECK(exp_at_least(3, r, 0.89) == EXP_CONFIRMED);
    CHECK(exp_at_least(3, r, 0.9) == EXP_NOT_CONFIRMED);
    CHECK(exp_at_least(2, none, 0.9) == EXP_NOT_TESTABLE);
}

static void test_near(void) {
    double worst;
    const double predicted[] = {2, NAN, 4}, good[] = {2.01, 7, 3.96}, lost[] = {2, 1, NAN}, off[] = {2, 1, 4.1};
    const double nothing[] = {NAN, NAN, NAN};
    CHECK(exp_near(3, good, predicted, 0.0101, &worst) == EXP_CONFIRMED);
    CHECK_NEAR(worst, 0.01, 1e-9);
    CHECK(exp_near(3, good, predicted, 0.0099, &worst) == EXP_NOT_CONFIRMED);
    CHECK(exp_near(3, off, predicted, 0.02, &worst) == EXP_NOT_CONFIRMED);
    CHECK(exp_near(3, lost, predicted, 0.02, &worst) == EXP_NOT_CONFIRMED && isinf(worst));
    CHECK(exp_near(3, good, nothing, 0.02, &worst) == EXP_NOT_TESTABLE);
}

static void test_phases(void) {
    const moe_phase_kind S = MOE_PHASE_SURGE, P = MOE_PHASE_STABILISATION, R = MOE_PHASE_RELAXATION,
                         D = MOE_PHASE_DORMANT;
    const moe_phase_kind all[] = {D, S, S, P, P, P, R, R}, two[] = {S, S, S, P, P, P, P, P},
                         turned[] = {R, R, P, P, P, S, S, S};
    char text[100];
    CHECK(exp_phases(8, all, 8) == EXP_CONFIRMED);
    CHECK(exp_phases(8, two, 8) == EXP_NOT_CONFIRMED);
    CHECK(exp_phases(8, turned, 8) == EXP_NOT_CONFIRMED);
    CHECK(exp_phases(8, all, 4) == EXP_CONFIRMED);
    CHECK(exp_phases(8, all, 3) == EXP_NOT_TESTABLE);
    CHECK(exp_phases(7, all, 7) == EXP_NOT_TESTABLE);
    CHECK(exp_majority(2, 3) == EXP_CONFIRMED);
    CHECK(exp_majority(2, 4) == EXP_NOT_CONFIRMED);
    CHECK(exp_majority(0, 0) == EXP_NOT_TESTABLE);
    exp_phases_text(8, all, text, sizeof text);
    CHECK(strcmp(text, "dormant, surge, stabilisation, relaxation") == 0);
    exp_phases_text(8, two, text, sizeof text);
    CHECK(strcmp(text, "surge, stabilisation") == 0);
}

int main(void) {
    RUN(test_threshold);
    RUN(test_positive);
    RUN(test_same);
    RUN(test_at_least);
    RUN(test_near);
    RUN(test_phases);
    return test_end();
}

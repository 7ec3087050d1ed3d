/* The feedback between routing and scores: steady states, the fold, thresholds, the fit. */
#include "test.h"

/* ---- randomness and reference solvers of the tests' own ---- */
static double uniform(void) { return (double)test_u32() / 4294967296.0; }

static void ref_softmax(size_t n, const double *q, const double *m, double gamma, double *out) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, q[i] - gamma * m[i]);
    for (size_t i = 0; i < n; i++) sum += out[i] = exp(q[i] - gamma * m[i] - top);
    for (size_t i = 0; i < n; i++) out[i] /= sum;
}

/* ---- feedback ---- */
static void test_feedback(void) {
    double u, h, ks, kc, a, lambda;
    CHECK_OK(moe_feedback_two(2.5, 0, &u));
    CHECK_WITHIN(u, 0.710411783488, 1e-12);
    CHECK_OK(moe_feedback_two(1.5, 0, &u)); /* below the critical Kf = 2 */
    CHECK_WITHIN(u, 0, 2e-15);
    static const double far[][3] = {{-1e300, 5e299, 0.5}, {-1e300, -2e300, -1}, {1e300, 0, 1}, {1, -1e300, -1}};
    for (int i = 0; i < 4; i++) { /* Kf u + h = 2 atanh(u), which is nothing beside them */
        CHECK_OK(moe_feedback_two(far[i][0], far[i][1], &u));
        CHECK_WITHIN(u, far[i][2], 2e-15);
    }
    CHECK_OK(moe_feedback_fold(1e18, &u, &h)); /* ln(2 Kf) - Kf */
    CHECK(u == 1);
    CHECK_NEAR(h, log(2e18) - 1e18, 2e-15);
    CHECK_OK(moe_feedback_fold(3, &u, &h));
    CHECK_WITHIN(u, 0.577350, 1e-6);
    CHECK_WITHIN(h, -0.415093, 8e-7);
    for (int i = 0; i < 200; i++) { /* a root, and none is larger */
        double kf = 8 * uniform() - 2, field = 4 * uniform() - 2;
        CHECK_OK(moe_feedback_two(kf, field, &u));
        CHECK_WITHIN(u, tanh((kf * u + field) / 2), 2e-15);
        for (double x = u + 1e-3; x < 1; x += 1e-3) CHECK(tanh((kf * x + field) / 2) < x + 1e-9);
    }
    CHECK_OK(moe_feedback_two(3, h + 1e-6, &u)); /* either side of the fold */
    CHECK(u > 0.5);
    CHECK_OK(moe_feedback_two(3, h - 1e-6, &u));
    CHECK(u < -0.5);
    CHECK_OK(moe_feedback_thresholds(3, &ks, &kc));
    CHECK_WITHIN(ks, 2.745644, 1e-6);
    CHECK_WITHIN(kc, 2.772589, 1e-6);
    CHECK_OK(moe_feedback_thresholds(64, &ks, &kc));
    CHECK_WITHIN(ks, 6.924585, 1e-6);
    CHECK_WITHIN(kc, 8.419919, 3e-7);
    CHECK_OK(moe_feedback_thresholds(2, &ks, &kc));
    CHECK(ks == 2 && kc == 2);
    enum { N = 30, E = 4 };
    double s[N * E], p[N * E], beta = 1.5, dt = 0.1;
    for (int e = 0; e < E; e++) s[e] = 0.3 * e;
    for (int t = 0; t < N; t++) {
        double zero[E] = {0}, scaled[E];
        for (int e = 0; e < E; e++) scaled[e] = beta * s[t * E + e];
        ref_softmax(E, scaled, zero, 0, p + t * E);
        for (int e = 0; e < E && t + 1 < N; e++)
            s[(t + 1) * E + e] = s[t * E + e] + dt * (2 * p[t * E + e] - 0.7 * s[t * E + e]);
    }
    CHECK_OK(moe_feedback_fit(N, E, dt, s, p, &a, &lambda));
    CHECK_NEAR(a, 2, 4e-13);
    CHECK_NEAR(lambda, 0.7, 5e-13);
    CHECK_STATUS(moe_feedback_fit(N, E, dt, s, s, &a, &lambda), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_fit(1, E, dt, s, p, &a, &lambda), MOE_E_SERIES);
    CHECK_STATUS(moe_feedback_fit(N, 0, dt, s, p, &a, &lambda), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_feedback_fit(SIZE_MAX, E, dt, s, p, &a, &lambda), MOE_E_SERIES);
    CHECK_STATUS(moe_feedback_fit(N, E, 0, s, p, &a, &lambda), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_fit(N, E, INFINITY, s, p, &a, &lambda), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_fit(N, E, dt, NULL, p, &a, &lambda), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_feedback_fit(N, E, dt, s, NULL, &a, &lambda), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_feedback_fit(N, E, dt, s, p, NULL, &lambda), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_fit(N, E, dt, s, p, &a, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_fold(INFINITY, &u, &h), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_fold(3, NULL, &h), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_fold(3, &u, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_thresholds(3, NULL, &kc), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_thresholds(3, &ks, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_fold(1.9, &u, &h), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_two(NAN, 0, &u), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_thresholds(1, &ks, &kc), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_feedback_two(2, INFINITY, &u), MOE_E_FEEDBACK);
    CHECK_STATUS(moe_feedback_two(2, 0, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_feedback_thresholds(SIZE_MAX, &ks, &kc), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_feedback_fit(N, SIZE_MAX, dt, s, p, &a, &lambda), MOE_E_N_EXPERTS);
    s[E] = INFINITY;
    CHECK_STATUS(moe_feedback_fit(N, E, dt, s, p, &a, &lambda), MOE_E_FEEDBACK);
}

int main(void) {
    RUN(test_feedback);
    return test_end();
}

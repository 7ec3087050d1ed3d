/* The congestion game: the solver against oracles, against two other solvers and at its extremes; fits and intervals on
 * data that was made with a known gamma; several types of tokens; phases of a series; feedback. */
#include "test.h"

/* ---- randomness and reference solvers of the tests' own ---- */
static double uniform(void) { return (double)test_u32() / 4294967296.0; }

static double normal(void) {
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum - 6;
}

static void ref_softmax(size_t n, const double *q, const double *m, double gamma, double *out) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, q[i] - gamma * m[i]);
    for (size_t i = 0; i < n; i++) sum += out[i] = exp(q[i] - gamma * m[i] - top);
    for (size_t i = 0; i < n; i++) out[i] /= sum;
}

/* m <- m + d (softmax(q - gamma m) - m) */
static int ref_damped(size_t n, const double *q, double gamma, double *m) {
    double d = 1 / (1 + gamma), *next = test_doubles(n), change = 1;
    int rounds = 0;
    for (size_t i = 0; i < n; i++) m[i] = 1 / (double)n;
    for (; rounds < 100000 && change > 1e-14; rounds++) {
        change = 0;
        ref_softmax(n, q, m, gamma, next);
        for (size_t i = 0; i < n; i++) {
            change = fmax(change, fabs(next[i] - m[i]));
            m[i] += d * (next[i] - m[i]);
        }
    }
    free(next);
    return change <= 1e-14;
}

/* m in [0, 1] with log m + gamma m = a, by bisection */
static double ref_response(double a, double gamma) {
    double lo = 0, hi = 1;
    if (a >= gamma) return 1;
    for (int i = 0; i < 1100 && hi > nextafter(lo, 2); i++) {
        double mid = hi > 2e-3 * lo && lo > 0 ? sqrt(lo * hi) : (lo + hi) / 2;
        if (lo == 0) mid = hi / 4;
        if (mid <= lo || mid >= hi) mid = (lo + hi) / 2;
        if (mid <= lo || mid >= hi) break;
        if (log(mid) + gamma * mid < a)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

static void ref_bisection(size_t n, const double *q, double gamma, double *m) {
    double lse = 0, top = -INFINITY;
    for (size_t i = 0; i < n; i++) top = fmax(top, q[i]);
    for (size_t i = 0; i < n; i++) lse += exp(q[i] - top);
    lse = top + log(lse);
    double lo = lse - fabs(gamma), hi = lse + fabs(gamma);
    for (int i = 0; i < 200; i++) {
        double c = (lo + hi) / 2, sum = 0;
        for (size_t j = 0; j < n; j++) sum += m[j] = ref_response(q[j] - c, gamma);
        if (sum > 1)
            lo = c;
        else
            hi = c;
    }
}

/* ---- the solver ---- */
static void test_oracles(void) {
    static const double q1[] = {1, 0}, q2[] = {1, .5, 0, -.5}, flat[] = {3, 3, 3, 3, 3};
    static const double m2[] = {0.335134560530600, 0.274818679109413, 0.219641579066284, 0.170405181293703};
    static const double d2[] = {-0.0097948764, -0.0020703426, 0.0039037372, 0.0079614818};
    double m[5], d[4], work[10];
    moe_game_info info;
    moe_game_fit fit;
    CHECK_OK(moe_game_solve(2, q1, 2, m, &info));
    CHECK_WITHIN(m[0], 0.623689978420069, 3e-15);
    CHECK_OK(moe_game_solve(4, q2, 5, m, &info));
    for (int i = 0; i < 4; i++) CHECK_WITHIN(m[i], m2[i], 4e-15);
    CHECK_OK(moe_game_sensitivity(4, 5, m, d));
    for (int i = 0; i < 4; i++) CHECK_WITHIN(d[i], d2[i], 1e-10);
    CHECK_OK(moe_game_estimate(4, q2, m, 0, work, &fit)); /* exact data: both estimators give it back */
    CHECK_WITHIN(fit.gamma_ols, 5, 8e-15);
    CHECK_WITHIN(fit.gamma, 5, 6e-11);
    CHECK_WITHIN(fit.l1_game, 0, 1e-12);
    CHECK(fit.identified);
    static const double gammas[] = {-0.99, -0.5, 0, 0.05, 0.5, 1, 36, 1e6};
    for (int g = 0; g < 8; g++) {
        CHECK_OK(moe_game_solve(5, flat, gammas[g], m, &info));
        for (int i = 0; i < 5; i++) CHECK_WITHIN(m[i], 0.2, 1e-15);
    }
}

/* Independent of the solver: c from the largest load, and the worst relative residual of the others. */
static double residual(size_t n, const double *q, double gamma, const double *m) {
    size_t top = 0;
    long double worst = 0;
    for (size_t i = 0; i < n; i++)
        if (m[i] > m[top]) top = i;
    long double c = (long double)q[top] - logl((long double)m[top]) - (long double)gamma * (long double)m[top];
    for (size_t i = 0; i < n; i++) {
        if (m[i] < 1e-300) continue;
        long double l = logl((long double)m[i]), g = (long double)gamma * (long double)m[i], x = (long double)q[i];
        long double r = fabsl(l + g - x + c) /
                        (1 + fabsl(l) + fabsl(g) + fabsl(x - (long double)q[top]) + fabsl(c - (long double)q[top]));
        if (r > worst) worst = r;
    }
    return (double)worst;
}

static void test_solver_extremes(void) {
    static const size_t sizes[] = {1, 2, 3, 8, 64, 257, 1024, 4096};
    static const double gammas[] = {-0.999999, -0.9, -0.5, -1e-9, 0,  1e-300, 1e-9, 0.1,
                                    0.10001,   0.5,  1,    2,     10, 36,     1e3,  1e6};
    double *q = test_doubles(4096), *m = test_doubles(4096);
    int most = 0;
    for (size_t s = 0; s < 8; s++)
        for (int kind = 0; kind < 8; kind++) {
            size_t n = sizes[s];
            for (size_t i = 0; i < n; i++) switch (kind) {
                case 0:
                    q[i] = normal();
                    break;
                case 1:
                    q[i] = 100 * normal();
                    break;
                case 2:
                    q[i] = 1e6 * normal() + 1e9;
                    break;
                case 3:
                    q[i] = i ? 0 : 50;
                    break; /* one is far better */
                case 4:
                    q[i] = i ? 0 : -50;
                    break; /* one is far worse */
                case 5:
                    q[i] = i % 2 ? 1e308 : -1e308;
                    break; /* their difference overflows */
                case 6:
                    q[i] = 1e-12 * normal();
                    break;
                default:
                    q[i] = -0.5 * (double)i;
                    break; /* a long tail that underflows */
                }
            for (size_t g = 0; g < sizeof gammas / sizeof *gammas; g++) {
                moe_game_info info = {0, 1};
                double sum = 0;
                if (!CHECK_OK(moe_game_solve(n, q, gammas[g], m, &info))) {
                    printf("        n %zu kind %d gamma %g\n", n, kind, gammas[g]);
                    continue;
                }
                int bad = 0;
                for (size_t i = 0; i < n; i++) sum += m[i], bad += !(m[i] >= 0 && m[i] <= 1 + 1e-12);
                if (!CHECK(!bad && info.iterations >= 1 && info.iterations <= 60) ||
                    !CHECK_WITHIN(info.residual, 0, 9e-15) ||
                    !CHECK_WITHIN(sum, 1, 1e-12) ||
                    !CHECK_WITHIN(kind == 5 ? 0 : residual(n, q, gammas[g], m), 0, 8e-15))
                    printf("        n %zu kind %d gamma %g: %d rounds, residual %g\n", n, kind, gammas[g],
                           info.iterations, info.residual);
                if (info.iterations > most && gammas[g] > 0.1) most = info.iterations;
            }
        }
    CHECK(most <= 20); /* Newton's, far below the limit */
    free(q), free(m);
}

static void test_three_solvers(void) {
    static const double gammas[] = {-0.9, -0.3, 0, 0.05, 0.3, 1, 1.9, 5, 36};
    double q[9], m[9], b[9], f[9];
    for (int round = 0; round < 20; round++)
        for (int g = 0; g < 9; g++) {
            size_t n = 2 + test_below(8);
            for (size_t i = 0; i < n; i++) q[i] = 1.5 * normal();
            CHECK_OK(moe_game_solve(n, q, gammas[g], m, NULL));
            ref_bisection(n, q, gammas[g], b);
            int converged = ref_damped(n, q, gammas[g] < 0 ? 0 : gammas[g], f);
            if (gammas[g] < 0) { /* undamped there */
                for (int k = 0; k < 400; k++) memcpy(b, f, sizeof b), ref_softmax(n, q, b, gammas[g], f);
                ref_bisection(n, q, gammas[g], b);
            }
            CHECK(converged);
            for (size_t i = 0; i < n; i++) {
                CHECK_WITHIN(m[i], b[i], 2e-14);
                CHECK_WITHIN(m[i], f[i], 7e-14);
            }
        }
}

static void test_sensitivity(void) {
    static const double gammas[] = {-0.5, 0, 0.3, 3, 40};
    double q[7], m[7], d[7], lo[7], hi[7], h = 1e-4;
    for (int g = 0; g < 5; g++) {
        double sum = 0;
        for (int i = 0; i < 7; i++) q[i] = normal();
        CHECK_OK(moe_game_solve(7, q, gammas[g], m, NULL));
        CHECK_OK(moe_game_solve(7, q, gammas[g] - h, lo, NULL));
        CHECK_OK(moe_game_solve(7, q, gammas[g] + h, hi, NULL));
        CHECK_OK(moe_game_sensitivity(7, gammas[g], m, d));
        for (int i = 0; i < 7; i++) CHECK_WITHIN(d[i], (hi[i] - lo[i]) / (2 * h), 1e-9), sum += d[i];
        CHECK_WITHIN(sum, 0, 1e-15);
    }
}

/* ---- fits ---- */
static void test_exact_fits(void) {
    static const double gammas[] = {0, 0.05, 0.5, 5, 14, 36, 100, 190};
    double q[32], m[32], work[64];
    moe_game_fit fit;
    for (int g = 0; g < 8; g++)
        for (size_t n = 3; n <= 32; n += 29) {
            for (size_t i = 0; i < n; i++) q[i] = normal();
            CHECK_OK(moe_game_solve(n, q, gammas[g], m, NULL));
            CHECK_OK(moe_game_estimate(n, q, m, 0, work, &fit));
            CHECK(fit.identified);
            CHECK_NEAR(fit.gamma, gammas[g], 1e-10);
            CHECK_NEAR(fit.gamma_ols, gammas[g], 7e-12);
            double top = 0, p[32], uniform_l1 = 0;
            for (size_t i = 0; i < n; i++) top = fmax(top, m[i]), uniform_l1 += fabs(m[i] - 1 / (double)n);
            CHECK_NEAR(fit.peak_load, (double)n * top, 4e-15);
            CHECK_NEAR(fit.l1_uniform, uniform_l1, 5e-15);
            CHECK_OK(moe_game_softmax(n, q, 1, p));
            top = 0;
            for (size_t i = 0; i < n; i++) top = fmax(top, p[i]);
            CHECK_NEAR(fit.peak_softmax, (double)n * top, 2e-15);
            /* the temperature 1 + gamma / n is right to first order; no other is better than the one found */
            double best = fit.l1_softmax, probe[32];
            for (double t = 0.05; t < 100; t *= 1.1) {
                double l1 = 0;
                CHECK_OK(moe_game_softmax(n, q, t, probe));
                for (size_t i = 0; i < n; i++) l1 += fabs(probe[i] - m[i]);
                CHECK_WITHIN(fmin(l1 - best, 0), 0, 2e-15);
            }
            /* and a planted temperature is found; any multiple of the load will do */
            CHECK_OK(moe_game_softmax(n, q, 2.5, m));
            for (size_t i = 0; i < n; i++) m[i] *= 1000;
            CHECK_OK(moe_game_estimate(n, q, m, 0, work, &fit));
            CHECK_NEAR(fit.temperature, 2.5, 1e-12);
            CHECK_WITHIN(fit.l1_softmax, 0, 8e-13);
        }
    for (int i = 0; i < 20; i++) q[i] = 0.01 * normal(); /* near uniform: T = 1 + gamma / n */
    CHECK_OK(moe_game_solve(20, q, 30, m, NULL));
    CHECK_OK(moe_game_estimate(20, q, m, 0, work, &fit));
    CHECK_NEAR(fit.temperature, 1 + 30.0 / 20, 1e-3);
    CHECK_OK(moe_game_solve(20, q, -0.7, m, NULL)); /* below the range: its end, and the closed form says so */
    CHECK_OK(moe_game_estimate(20, q, m, 0, work, &fit));
    CHECK(fit.identified);
    CHECK_WITHIN(fit.gamma, 0, 2e-15);
    CHECK_NEAR(fit.gamma_ols, -0.7, 7e-13);
    CHECK_NEAR(moe_game_explicit(0.01, 64, 2.0 / 16), 0.01 * 64 * 2 / 16, 1e-15);
}

static void test_unidentified(void) {
    double q[16], m[16], work[32];
    moe_game_fit fit;
    for (int i = 0; i < 16; i++) q[i] = 2, m[i] = 1.0 / 16; /* constant quality, even load */
    CHECK_OK(moe_game_estimate(16, q, m, 0, work, &fit));
    CHECK(!fit.identified && isnan(fit.gamma) && isnan(fit.gamma_ols) && isnan(fit.temperature));
    q[3] += 1e-12; /* as good as constant */
    CHECK_OK(moe_game_estimate(16, q, m, 0, work, &fit));
    CHECK(isnan(fit.temperature));
    q[3] = 2, m[3] = 0.2; /* constant quality, uneven load: nothing to explain it by */
    CHECK_OK(moe_game_estimate(16, q, m, 0, work, &fit));
    CHECK(!fit.identified && isnan(fit.gamma));
    /* even load in spite of quality: gamma is anything large */
    for (int i = 0; i < 16; i++) q[i] = normal(), m[i] = 1.0 / 16;
    CHECK_OK(moe_game_estimate(16, q, m, 0, work, &fit));
    CHECK(!fit.identified && isnan(fit.gamma) && isnan(fit.gamma_ols));
    for (int round = 0; round < 50; round++) { /* constant quality seen through noise, sampled load */
        uint64_t count[16] = {0};
        for (int t = 0; t < 10000; t++) count[test_below(16)]++;
        for (int i = 0; i < 16; i++) q[i] = 0.01 * normal(), m[i] = (double)count[i];
        CHECK_OK(moe_game_estimate(16, q, m, 10000, work, &fit));
        CHECK(!fit.identified);
    }
    q[0] = 1, m[0] = 3; /* one expert: nothing to tell */
    CHECK_OK(moe_game_estimate(1, q, m, 0, work, &fit));
    CHECK(!fit.identified);
    CHECK_WITHIN(fit.l1_game, 0, 2e-15);
    CHECK_WITHIN(fit.l1_uniform, 0, 2e-15);
}

/* ---- a dump with a planted gamma ---- */
typedef struct dump {
    moe_game g;
    void *memory;
} dump;

static dump dump_new(size_t n, size_t batches) {
    dump d;
    size_t bytes = 0;
    memset(&d, 0, sizeof d);
    CHECK_OK(moe_game_size(n, batches, &bytes));
    d.memory = test_memory(bytes + 1, 1);
    CHECK_OK(moe_game_init(&d.g, n, batches, (char *)d.memory + 1, bytes));
    return d;
}

/* Each token picks one expert with the equilibrium's probabilities; its logits are the quality and noise. */
static void dump_plant(dump *d, const double *q, double gamma, size_t tokens, double noise) {
    size_t n = d->g.n_experts, B = d->g.n_batches;
    double *m = test_doubles(n);
    CHECK_OK(moe_game_reset(&d->g));
    CHECK_OK(moe_game_solve(n, q, gamma, m, NULL));
    /* of 4096 equal slices of [0, 1): the first expert in it */
    uint32_t *from = (uint32_t *)test_memory(4096, sizeof *from);
    double sum = 0;
    for (size_t i = 0, slice = 0; i < n; i++) {
        sum += m[i];
        for (; slice < 4096 && ((double)slice / 4096 < sum || i + 1 == n); slice++) from[slice] = (uint32_t)i;
        m[i] = sum;
    }
    for (size_t b = 0; b < B; b++) {
        size_t count = (b + 1) * tokens / B - b * tokens / B;
        d->g.tokens[b] = count;
        for (size_t t = 0; t < count; t++) {
            double u = uniform();
            size_t i = from[(size_t)(u * 4096)];
            while (i + 1 < n && u >= m[i]) i++;
            d->g.count[b * n + i]++;
        }
        for (size_t i = 0; i < n; i++)
            d->g.logit[b * n + i] = (double)count * q[i] + noise * sqrt((double)count) * normal();
    }
    free(from), free(m);
}

static int covers(size_t n, double gamma, size_t tokens, size_t replicates, uint64_t seed, double *width) {
    double *q = test_doubles(n), *g = test_doubles(replicates), lo = 0, hi = 0;
    dump d = dump_new(n, 50);
    test_seed = seed * 1000003 + n;
    for (size_t i = 0; i < n; i++) q[i] = normal();
    dump_plant(&d, q, gamma, tokens, 0);
    CHECK_OK(moe_game_bootstrap(&d.g, replicates, 7, NULL, g, &lo, &hi));
    int ok = lo <= gamma && gamma <= hi;
    *width += (hi - lo) / gamma;
    free(q), free(g), free(d.memory);
    return ok;
}

/* 200 seeds for each number of experts (20 of the largest, which take longest), 50 for each gamma. */
static void test_planted_gamma(void) {
    static const size_t sizes[] = {4, 16, 64, 256};
    static const double gammas[] = {0.5, 5, 36, 100};
    for (int s = 0; s < 4; s++) {
        size_t seeds = TEST_SANITIZED ? 2 : s < 3 ? 50 : 5, covered = 0;
        double width = 0;
        for (int g = 0; g < 4; g++)
            for (size_t seed = 0; seed < seeds; seed++)
                covered += (size_t)covers(sizes[s], gammas[g], 100000, 50, seed + 1, &width);
        if (!CHECK(covered * 10 >= (TEST_SANITIZED ? 7 : 9) * 4 * seeds))
            printf("        %zu experts: %zu of %zu\n", sizes[s], covered, 4 * seeds);
        CHECK(width / (double)(4 * seeds) < 1.5); /* and not by being wide: mean width / gamma */
    }
}

static void test_planted_zero(void) {
    size_t seeds = TEST_SANITIZED ? 3 : 200, ok = 0;
    double q[16], g[60], lo, hi;
    dump d = dump_new(16, 50);
    for (size_t seed = 0; seed < seeds; seed++) {
        for (int i = 0; i < 16; i++) q[i] = normal();
        dump_plant(&d, q, 0, 20000, 1);
        CHECK_OK(moe_game_bootstrap(&d.g, 60, seed, NULL, g, &lo, &hi));
        ok += lo <= 0 && hi >= 0 && hi < 3;
    }
    CHECK(ok * 100 >= 90 * seeds);
    free(d.memory);
}

static void test_bootstrap(void) {
    double q[12], g1[200], g2[200], lo1, hi1, lo2, hi2, x[5] = {5, 1, 4, 2, 3};
    moe_parallel two = {NULL, NULL, 2}, one = {NULL, NULL, 1};
    dump d = dump_new(12, 20);
    for (int i = 0; i < 12; i++) q[i] = normal();
    dump_plant(&d, q, 20, 20000, 1);
    d.g.alloc_context = &d;
    CHECK_OK(moe_game_bootstrap(&d.g, 200, 3, &one, g1, &lo1, &hi1));
    CHECK(test_last_context == &d);
    CHECK_OK(moe_game_bootstrap(&d.g, 200, 3, &two, g2, &lo2, &hi2));
    CHECK(!memcmp(g1, g2, sizeof g1) && lo1 == lo2 && hi1 == hi2); /* the same for any number of threads */
    CHECK_OK(moe_game_bootstrap(&d.g, 200, 4, &one, g2, &lo2, &hi2));
    CHECK(memcmp(g1, g2, sizeof g1) != 0);
    size_t below = 0;
    for (int i = 0; i < 200; i++) below += g1[i] < lo1;
    CHECK(below == 5);
    /* a replicate by hand: number 17 of seed 3 */
    dump r = dump_new(12, 20);
    moe_game_fit fit;
    double quality[12], load[12], work[24], selections;
    for (size_t i = 0; i < 20; i++) {
        size_t b = (size_t)((uint64_t)moe_rand_u32(3, 18, i) * 20 >> 32);
        r.g.tokens[0] += d.g.tokens[b];
        for (size_t e = 0; e < 12; e++) r.g.count[e] += d.g.count[b * 12 + e], r.g.logit[e] += d.g.logit[b * 12 + e];
    }
    CHECK_OK(moe_game_pool(&r.g, NULL, 0, quality, load, &selections));
    CHECK_OK(moe_game_estimate(12, quality, load, selections, work, &fit));
    CHECK_WITHIN(fit.gamma, g1[17], 3e-3);
    CHECK_OK(moe_interval(5, x, &lo1, &hi1));
    CHECK_NEAR(lo1, 1.1, 2e-15);
    CHECK_NEAR(hi1, 4.9, 2e-15);
    for (long n = 0; n < 3; n++) { /* each allocation fails once */
        test_fail_at = n;
        CHECK_STATUS(moe_game_bootstrap(&d.g, 10, 3, &one, g2, &lo2, &hi2), MOE_E_NO_MEMORY);
        if (n < 2) CHECK_STATUS(moe_game_holdout(&d.g, 1, &fit), MOE_E_NO_MEMORY);
        test_fail_at = -1;
    }
    CHECK(test_live_blocks == 0);
    for (size_t b = 1; b < 20; b++) d.g.tokens[b] = 0;
    CHECK_STATUS(moe_game_bootstrap(&d.g, 10, 3, &one, g2, &lo2, &hi2), MOE_E_N_BATCHES);
    free(d.memory), free(r.memory);
}

static void test_batches(void) {
    enum { E = 5, B = 7, K = 2, T = 40 };
    dump a = dump_new(E, B), b = dump_new(E, B), both = dump_new(E, B);
    float z[T * E];
    int32_t index[T * K];
    uint8_t half[B], again[B];
    double quality[E], load[E], selections, ref_q[E] = {0}, ref_m[E] = {0}, tokens = 0;
    for (int round = 0; round < 30; round++) {
        size_t batch = test_below(B), n = test_below(T + 1);
        test_fill(z, T * E, -3, 3);
        CHECK_OK(moe_topk(T, E, K, z, index, NULL));
        for (size_t t = 0; t < T; t++)
            if (test_below(10) == 0) index[t * K + 1] = -1; /* a token with one expert */
        CHECK_OK(moe_game_add(round % 2 ? &a.g : &b.g, batch, n, K, z, index));
        CHECK_OK(moe_game_add(&both.g, batch, n, K, z, index));
        tokens += (double)n;
        for (size_t t = 0; t < n; t++) {
            for (size_t e = 0; e < E; e++) ref_q[e] += (double)z[t * E + e];
            for (size_t i = 0; i < K; i++)
                if (index[t * K + i] >= 0) ref_m[index[t * K + i]]++;
        }
    }
    CHECK_OK(moe_game_merge(&a.g, &b.g));
    for (size_t i = 0; i < B * E; i++) {
        CHECK(a.g.count[i] == both.g.count[i]);
        CHECK_NEAR(a.g.logit[i], both.g.logit[i], 2e-15);
    }
    double total = 0;
    for (size_t e = 0; e < E; e++) total += ref_m[e];
    CHECK_OK(moe_game_pool(&a.g, NULL, 0, quality, load, &selections));
    CHECK(selections == total);
    for (size_t e = 0; e < E; e++) {
        CHECK_NEAR(quality[e], ref_q[e] / tokens, 2e-15);
        CHECK_NEAR(load[e], ref_m[e] / total, 2e-15);
    }
    /* halves: 3 and 4 of 7, the same for a seed; each batch falls on both sides */
    size_t sum[B] = {0};
    for (uint64_t seed = 0; seed < 200; seed++) {
        size_t zeros = 0;
        CHECK_OK(moe_game_split(&a.g, seed, half));
        CHECK_OK(moe_game_split(&a.g, seed, again));
        CHECK(!memcmp(half, again, B));
        for (size_t i = 0; i < B; i++) zeros += half[i] == 0, sum[i] += half[i];
        CHECK(zeros == B / 2);
    }
    for (size_t i = 0; i < B; i++) CHECK(sum[i] > 60 && sum[i] < 170);
    free(a.memory), free(b.memory), free(both.memory);
}

/* Rows without a choice change no bit of any result, wherever they stand and whatever logits they have. */
enum { PAD_T = 200, PAD_MORE = 3 * PAD_T, PAD_E = 7, PAD_K = 2 };
typedef struct padded { float z[PAD_MORE * PAD_E]; int32_t index[PAD_MORE * PAD_K]; size_t n; } padded;

static padded pad_rows(const float *z, const int32_t *index, int where) {
    padded p = {{0}, {0}, 0};
    for (size_t t = 0; t < PAD_T; t++) {
        size_t before = where == 0 ? (t ? 0 : PAD_T) : where == 1 ? 1 : test_below(3);
        for (size_t i = 0; i < before; i++, p.n++) {
            for (size_t e = 0; e < PAD_E; e++) p.z[p.n * PAD_E + e] = test_below(4) ? 99 : NAN;
            for (size_t k = 0; k < PAD_K; k++) p.index[p.n * PAD_K + k] = -1 - (int32_t)test_below(3);
        }
        memcpy(p.z + p.n * PAD_E, z + t * PAD_E, PAD_E * sizeof *z);
        memcpy(p.index + p.n++ * PAD_K, index + t * PAD_K, PAD_K * sizeof *index);
    }
    return p;
}

static void test_padding(void) {
    enum { T = PAD_T, E = PAD_E, K = PAD_K };
    float z[T * E];
    int32_t index[T * K], none[T * K];
    double plain[E], other[E], load[E], other_load[E], work[PAD_MORE], n, other_n, epsilon, other_epsilon;
    dump a = dump_new(E, 2), b = dump_new(E, 2);
    for (int i = 0; i < T * K; i++) none[i] = -1;
    for (int round = 0; round < 12; round++) {
        for (int i = 0; i < T * E; i++) z[i] = (float)(normal() + 0.3 * (i % E));
        CHECK_OK(moe_topk(T, E, K, z, index, NULL));
        for (int t = 0; t < T; t += 5) index[t * K + 1] = -1; /* one choice makes a token */
        padded p = pad_rows(z, index, round % 3);
        CHECK(p.n > T);
        CHECK_OK(moe_game_reset(&a.g));
        CHECK_OK(moe_game_reset(&b.g));
        CHECK_OK(moe_game_add(&a.g, 1, T, K, z, index));
        CHECK_OK(moe_game_add(&b.g, 1, p.n, K, p.z, p.index));
        CHECK_OK(moe_game_add(&b.g, 0, T, K, z, none)); /* a batch of nothing else */
        CHECK(a.g.tokens[1] == T && b.g.tokens[1] == T && b.g.tokens[0] == 0);
        CHECK(!memcmp(a.g.null_count, b.g.null_count, 2 * E * sizeof *a.g.null_count));
        CHECK_OK(moe_game_pool(&a.g, NULL, 0, plain, load, &n));
        CHECK_OK(moe_game_pool(&b.g, NULL, 0, other, other_load, &other_n));
        CHECK(!memcmp(plain, other, sizeof plain) && !memcmp(load, other_load, sizeof load) && n == other_n);
        for (int kind = 0; kind < MOE_QUALITY_COUNT; kind++) {
            CHECK_OK(moe_game_quality((moe_quality_kind)kind, T, E, K, z, index, work, plain));
            CHECK_OK(moe_game_quality((moe_quality_kind)kind, p.n, E, K, p.z, p.index, work, other));
            if (!CHECK(!memcmp(plain, other, sizeof plain))) printf("        quality %d\n", kind);
            CHECK_STATUS(moe_game_quality((moe_quality_kind)kind, T, E, K, z, none, work, plain), MOE_E_NO_TOKENS);
        }
        CHECK_OK(moe_game_epsilon(T, E, K, index, E, z, load, 2, 1, work, &epsilon));
        CHECK_OK(moe_game_epsilon(p.n, E, K, p.index, E, p.z, load, 2, 1, work, &other_epsilon));
        CHECK(epsilon == other_epsilon && epsilon > 0);
    }
    CHECK_STATUS(moe_game_epsilon(T, E, K, none, E, z, load, 2, 1, work, &epsilon), MOE_E_NO_TOKENS);
    CHECK_OK(moe_game_reset(&a.g));
    CHECK_OK(moe_game_add(&a.g, 0, T, K, z, none));
    CHECK_STATUS(moe_game_pool(&a.g, NULL, 0, plain, load, &n), MOE_E_NO_TOKENS);
    free(a.memory), free(b.memory);
}

/* A dump of 20 batches whose choices follow softmax(q), so gamma is 0; then the same with as many rows of padding whose
 * logits would say that the even load of nobody comes from these qualities. Every estimate has the same bits. */
static void test_half_padding(void) {
    enum { B = 20, T = 250, E = 5, R = 60 };
    static const double q[E] = {1, 0.6, 0, -0.4, -0.9};
    static float z[2 * T * E];
    static int32_t index[2 * T];
    dump plain = dump_new(E, B), half_empty = dump_new(E, B), as_tokens = dump_new(E, B);
    double g[2][R], lo[2], hi[2], quality[E], load[E], work[2 * E], n;
    moe_game_fit fit[3], half[2];
    moe_game_null null[2];
    dump *of[3] = {&plain, &half_empty, &as_tokens};
    memset(fit, 0, sizeof fit), memset(half, 0, sizeof half), memset(null, 0, sizeof null);
    for (size_t b = 0; b < B; b++) {
        for (size_t t = 0; t < T; t++) {
            double best = -INFINITY;
            for (size_t e = 0; e < E; e++) {
                double gumbel = -log(-log(((double)test_u32() + 0.5) / 4294967296.0));
                z[2 * t * E + e] = (float)(q[e] + 0.3 * normal());
                if (q[e] + gumbel > best) best = q[e] + gumbel, index[2 * t] = (int32_t)e;
                z[(2 * t + 1) * E + e] = (float)(3 * q[e]);
            }
            index[2 * t + 1] = -1;
        }
        CHECK_OK(moe_game_add(&half_empty.g, b, 2 * T, 1, z, index));
        for (size_t t = 0; t < T; t++) index[2 * t + 1] = (int32_t)(t % E);
        CHECK_OK(moe_game_add(&as_tokens.g, b, 2 * T, 1, z, index));
        for (size_t t = 0; t < T; t++) {
            memmove(z + t * E, z + 2 * t * E, E * sizeof *z);
            index[t] = index[2 * t];
        }
        CHECK_OK(moe_game_add(&plain.g, b, T, 1, z, index));
    }
    for (int i = 0; i < 3; i++) {
        CHECK_OK(moe_game_pool(&of[i]->g, NULL, 0, quality, load, &n));
        CHECK_OK(moe_game_estimate(E, quality, load, n, work, &fit[i]));
        if (i == 2) break;
        CHECK(n == B * T);
        CHECK_OK(moe_game_bootstrap(&of[i]->g, R, 5, NULL, g[i], &lo[i], &hi[i]));
        CHECK_OK(moe_game_holdout(&of[i]->g, 5, &half[i]));
        double excess[R];
        CHECK_OK(moe_game_excess(&of[i]->g, R, 5, NULL, g[i], excess, &null[i]));
    }
    CHECK(!memcmp(&fit[0], &fit[1], sizeof *fit) && !memcmp(&half[0], &half[1], sizeof *half));
    CHECK(!memcmp(g[0], g[1], sizeof *g) && lo[0] == lo[1] && hi[0] == hi[1]);
    CHECK(!memcmp(&null[0], &null[1], sizeof *null));
    CHECK(fit[0].gamma < 1 && lo[0] < 1 && fabs(fit[0].gamma_ols) < 1);
    CHECK(fit[2].gamma > 5); /* what they would be taken for */
    free(plain.memory), free(half_empty.memory), free(as_tokens.memory);
}

/* ---- the null ---- */
enum { NULL_T = 5000, NULL_E = 64, NULL_B = 50 };
static float null_z[NULL_T * NULL_E];
static int32_t null_index[NULL_T * NULL_E];

static void null_logits(size_t E, double sd, double slope) { /* some experts are better, tokens are alike */
    CHECK_OK(moe_rand_normal(test_u32(), 0, NULL_T * E, 0, (float)sd, null_z));
    for (size_t i = 0; i < NULL_T * E; i++) null_z[i] -= (float)(slope * (double)(i % E));
}

static double null_excess(size_t E, size_t K, moe_game_null *out) { /* of null_z and null_index; returns gamma */
    dump d = dump_new(E, NULL_B);
    double q[NULL_E], m[NULL_E], work[2 * NULL_E], g[100], n, lo, hi;
    size_t each = NULL_T / NULL_B;
    moe_game_fit fit;
    for (size_t b = 0; b < NULL_B; b++) {
        uint64_t data = 0, null = 0;
        CHECK_OK(moe_game_add(&d.g, b, each, K, null_z + b * each * E, null_index + b * each * K));
        for (size_t e = 0; e < E; e++) data += d.g.count[b * E + e], null += d.g.null_count[b * E + e];
        CHECK(data == null);
    }
    CHECK_OK(moe_game_pool(&d.g, NULL, 0, q, m, &n));
    CHECK_OK(moe_game_estimate(E, q, m, n, work, &fit));
    CHECK_OK(moe_game_bootstrap(&d.g, 100, 1, NULL, g, &lo, &hi));
    CHECK_OK(moe_game_excess(&d.g, 100, 1, NULL, g, g, out));
    CHECK(isnan(out->gamma_excess) || out->gamma_excess == fit.gamma - out->gamma_null);
    free(d.memory);
    return fit.gamma;
}

static void test_null_of_noise(void) {
    static const struct { size_t E, k; double sd, slope, least, most; } row[] = {
        {8, 1, 1, 0.1, 0, 1},      {16, 2, 3, 0.1, 10, 17}, {16, 4, 3, 0.1, 10, 25},
        {64, 8, 3, 0.02, 40, 66},  {16, 2, 10, 0.3, 65, 100}};
    for (size_t r = 0; r < sizeof row / sizeof *row; r++) {
        size_t seeds = TEST_SANITIZED ? 2 : 20, holds = 0;
        for (size_t seed = 0; seed < seeds; seed++) {
            moe_game_null null;
            null_logits(row[r].E, row[r].sd, row[r].slope);
            CHECK_OK(moe_topk(NULL_T, row[r].E, row[r].k, null_z, null_index, NULL));
            double gamma = null_excess(row[r].E, row[r].k, &null);
            CHECK(gamma >= row[r].least && gamma <= row[r].most); /* what looks like congestion */
            holds += null.excess_lo <= 0 && null.excess_hi >= 0;
        }
        if (!CHECK(holds * 10 >= 9 * seeds)) printf("        row %zu: %zu of %zu\n", r, holds, seeds);
    }
}

/* Tokens whose highest z_i - gamma m_i wins, z the quality and Gumbel noise: their load is the game's own equilibrium,
 * and that of z alone is the softmax of the quality, which has gamma 0. */
static void test_null_of_congestion(void) {
    enum { E = 8 };
    static const double gammas[] = {5, 12, 36};
    double q[E], m[E];
    for (int i = 0; i < E; i++) q[i] = 1.5 - 0.4 * i;
    for (int g = 0; g < 3; g++)
        for (int seed = 0; seed < (TEST_SANITIZED ? 1 : 5); seed++) {
            moe_game_null null;
            CHECK_OK(moe_game_solve(E, q, gammas[g], m, NULL));
            for (size_t t = 0; t < NULL_T; t++) {
                int best = 0;
                float *z = null_z + t * E;
                for (int i = 0; i < E; i++) z[i] = (float)(q[i] - log(-log((test_u32() + 0.5) / 4294967296.0)));
                for (int i = 1; i < E; i++)
                    if ((double)z[i] - gammas[g] * m[i] > (double)z[best] - gammas[g] * m[best]) best = i;
                null_index[t] = best;
            }
            (void)null_excess(E, 1, &null);
            if (!CHECK(null.gamma_null < 1 && null.excess_lo > gammas[g] / 2 && null.excess_hi < gammas[g] * 2 &&
                       null.gamma_excess > null.excess_lo && null.gamma_excess < null.excess_hi))
                printf("        gamma %g: null %g, excess %g [%g, %g]\n", gammas[g], null.gamma_null,
                       null.gamma_excess, null.excess_lo, null.excess_hi);
        }
}

/* Logits that only grow draw a surge of gamma; its excess has no phases. */
static void test_null_of_growing_logits(void) {
    enum { N = 8 };
    double step[N], gamma[N], excess[N], lo[N], hi[N], work[N];
    moe_phase_kind phase[N];
    null_logits(16, 1, 0.1);
    CHECK_OK(moe_topk(NULL_T, 16, 2, null_z, null_index, NULL));
    for (int i = 0; i < N; i++) {
        moe_game_null null;
        gamma[i] = null_excess(16, 2, &null);
        step[i] = i, excess[i] = null.gamma_excess, lo[i] = null.excess_lo, hi[i] = null.excess_hi;
        for (size_t j = 0; j < NULL_T * 16; j++) null_z[j] *= 1.3f;
    }
    CHECK_OK(moe_game_phases(N, step, excess, lo, hi, work, phase));
    for (int i = 0; i < N; i++) CHECK(phase[i] == MOE_PHASE_NONE);
    for (int i = 0; i < N; i++) lo[i] += gamma[i] - excess[i], hi[i] += gamma[i] - excess[i];
    CHECK_OK(moe_game_phases(N, step, gamma, lo, hi, work, phase));
    CHECK(gamma[N - 1] > gamma[0] + 10 && phase[0] == MOE_PHASE_SURGE);
}

static void test_null_by_hand(void) {
    static const float z[] = {3, 2, 1, 0, 0, 1, 2, 3};
    static const int32_t index[] = {1, -1, 3, 2};
    moe_game_null null;
    double g[4] = {0};
    dump d = dump_new(4, 2), twice = dump_new(4, 2);
    CHECK_OK(moe_game_add(&d.g, 0, 1, 2, z, index)); /* one token: there is nothing to permute; it picks one expert */
    CHECK(d.g.null_count[0] == 1 && d.g.null_count[1] + d.g.null_count[2] + d.g.null_count[3] == 0);
    CHECK_OK(moe_game_add_null(&d.g, 0, 1, 3, z + 4, NULL)); /* and here three */
    CHECK(d.g.null_count[0] == 1 && d.g.null_count[1] == 1 && d.g.null_count[2] == 1 && d.g.null_count[3] == 1);
    CHECK(d.g.tokens[0] == 1 && d.g.count[1] == 1); /* the rest is the caller's */
    CHECK_OK(moe_game_merge(&twice.g, &d.g));
    CHECK_OK(moe_game_merge(&twice.g, &d.g));
    CHECK(twice.g.null_count[0] == 2);
    CHECK_STATUS(moe_game_excess(&d.g, 4, 1, NULL, g, g, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_excess(&d.g, 4, 1, NULL, NULL, g, &null), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_excess(&d.g, 4, 1, NULL, g, g, &null), MOE_E_N_BATCHES);
    CHECK_OK(moe_game_excess(&d.g, 0, 1, NULL, NULL, NULL, &null)); /* without an interval one batch will do */
    CHECK(isnan(null.excess_lo) && isnan(null.excess_hi));
    CHECK_STATUS(moe_game_add_null(&d.g, 2, 1, 3, z, NULL), MOE_E_BATCH);
    CHECK_STATUS(moe_game_add_null(&d.g, 0, 1, 5, z, NULL), MOE_E_TOP_K);
    CHECK_OK(moe_game_add(&d.g, 1, 2, 2, z, index));
    for (long n = 0; n < 4; n++) { /* each allocation fails once */
        test_fail_at = n;
        CHECK_STATUS(moe_game_excess(&d.g, 4, 1, NULL, g, g, &null), MOE_E_NO_MEMORY);
        test_fail_at = -1;
    }
    CHECK(test_live_blocks == 0);
    CHECK_OK(moe_game_reset(&d.g));
    CHECK(d.g.null_count[0] == 0);
    CHECK_STATUS(moe_game_excess(&d.g, 4, 1, NULL, g, g, &null), MOE_E_NO_TOKENS);
    free(d.memory), free(twice.memory);
}

static void test_holdout(void) {
    enum { E = 10, B = 20 };
    dump d = dump_new(E, B);
    double q[E], quality[E], load[E], truth[E], unused[E], m[E], work[2 * E], selections, l1 = 0;
    uint8_t half[B];
    moe_game_fit held, fit;
    for (int i = 0; i < E; i++) q[i] = normal();
    dump_plant(&d, q, 25, 50000, 0.5);
    CHECK_OK(moe_game_holdout(&d.g, 9, &held));
    CHECK_OK(moe_game_split(&d.g, 9, half));
    CHECK_OK(moe_game_pool(&d.g, half, 0, quality, load, &selections));
    CHECK_OK(moe_game_pool(&d.g, half, 1, unused, truth, NULL));
    CHECK_OK(moe_game_estimate(E, quality, load, selections, work, &fit));
    CHECK(held.gamma == fit.gamma && held.temperature == fit.temperature && held.gamma_ols == fit.gamma_ols);
    CHECK_OK(moe_game_solve(E, quality, fit.gamma, m, NULL));
    for (int i = 0; i < E; i++) l1 += fabs(m[i] - truth[i]);
    CHECK_NEAR(held.l1_game, l1, 2e-15);
    CHECK_OK(moe_game_softmax(E, quality, fit.temperature, m));
    l1 = 0;
    for (int i = 0; i < E; i++) l1 += fabs(m[i] - truth[i]);
    CHECK_NEAR(held.l1_softmax, l1, 2e-15);
    CHECK(held.l1_game < held.l1_uniform && held.l1_game > fit.l1_game / 4);
    free(d.memory);
    d = dump_new(E, B);
    for (int i = 0; i < E; i++) q[i] = 0; /* all alike: no gamma, and no prediction by it */
    dump_plant(&d, q, 0, 50000, 0.5);
    CHECK_OK(moe_game_holdout(&d.g, 9, &held));
    CHECK(!held.identified && isnan(held.gamma) && isnan(held.l1_game) && held.l1_uniform < 0.1);
    free(d.memory);
}

/* ---- types ---- */
static double *types_work(size_t E, size_t C) {
    size_t bytes = 0;
    CHECK_OK(moe_game_types_scratch(E, C, &bytes));
    return test_doubles(bytes / sizeof(double));
}

static void test_types(void) {
    static const double pi[] = {.6, .4}, q[] = {2, 0, 0, 0, 1, 0},
                        want[] = {0.459977469970163, 0.316226344455347, 0.223796185574490};
    static const double gammas[] = {0, 1e-6, 0.3, 3, 36, 200, 1e4};
    double m[32], p[32], single[32], share[5], quality[5 * 32], *work = types_work(32, 5);
    moe_game_info info;
    CHECK_OK(moe_game_types_solve(3, 2, pi, q, 3, m, work, &info));
    for (int i = 0; i < 3; i++) CHECK_WITHIN(m[i], want[i], 4e-15);
    for (int round = 0; round < 10; round++)
        for (int g = 0; g < 7; g++) {
            size_t E = 2 + test_below(31), C = 1 + test_below(5);
            double sum = 0, total = 0;
            for (size_t c = 0; c < C; c++) sum += share[c] = uniform() + 0.01;
            for (size_t c = 0; c < C; c++) share[c] /= sum;
            for (size_t i = 0; i < C * E; i++) quality[i] = 2 * normal();
            /* one type is the single-type game */
            double all = 1;
            CHECK_OK(moe_game_types_solve(E, 1, &all, quality, gammas[g], m, work, NULL));
            CHECK_OK(moe_game_solve(E, quality, gammas[g], single, NULL));
            for (size_t i = 0; i < E; i++) CHECK_WITHIN(m[i], single[i], 3e-13);
            /* several: the fixed point holds */
            CHECK_OK(moe_game_types_solve(E, C, share, quality, gammas[g], m, work, &info));
            CHECK(info.iterations <= 60);
            CHECK_WITHIN(info.residual, 0, 3e-13);
            memset(single, 0, sizeof single);
            for (size_t c = 0; c < C; c++) {
                ref_softmax(E, quality + c * E, m, gammas[g], p);
                for (size_t i = 0; i < E; i++) single[i] += share[c] * p[i];
            }
            for (size_t i = 0; i < E; i++) CHECK_WITHIN(m[i], single[i], 1e-13 * (1 + gammas[g])), total += m[i];
            CHECK_WITHIN(total, 1, 3e-15);
            /* equal types are one */
            for (size_t c = 1; c < C; c++) memcpy(quality + c * E, quality, E * sizeof *quality);
            CHECK_OK(moe_game_types_solve(E, C, share, quality, gammas[g], m, work, NULL));
            CHECK_OK(moe_game_solve(E, quality, gammas[g], single, NULL));
            for (size_t i = 0; i < E; i++) CHECK_WITHIN(m[i], single[i], 3e-13);
            CHECK_OK(moe_game_types_softmax(E, C, share, quality, 0.7, m, work));
            CHECK_OK(moe_game_softmax(E, quality, 0.7, single));
            for (size_t i = 0; i < E; i++) CHECK_WITHIN(m[i], single[i], 2e-15);
        }
    free(work);
}

static void test_types_fit(void) {
    double share[3] = {.5, .3, .2}, quality[3 * 16], m[16], *work = types_work(16, 3), one = 1;
    moe_game_types_fit fit;
    moe_game_fit single;
    for (int i = 0; i < 48; i++) quality[i] = 2 * normal();
    CHECK_OK(moe_game_types_solve(16, 3, share, quality, 17, m, work, NULL));
    CHECK_OK(moe_game_types_estimate(16, 3, share, quality, m, work, &fit));
    CHECK_NEAR(fit.gamma, 17, 2e-12);
    CHECK_WITHIN(fit.l1_coupled, 0, 4e-13);
    CHECK(fit.l1_independent > 1e-6);
    CHECK_OK(moe_game_types_solve(16, 3, share, quality, 0.25, m, work, NULL));
    CHECK_OK(moe_game_types_estimate(16, 3, share, quality, m, work, &fit));
    CHECK_NEAR(fit.gamma, 0.25, 2e-11);
    CHECK_OK(moe_game_types_softmax(16, 3, share, quality, 1.7, m, work));
    CHECK_OK(moe_game_types_estimate(16, 3, share, quality, m, work, &fit));
    CHECK_NEAR(fit.temperature, 1.7, 5e-12);
    CHECK_WITHIN(fit.l1_independent, 0, 2e-12);
    CHECK_OK(moe_game_estimate(16, quality, m, 0, work, &single)); /* one type: the same fits as the single-type game */
    CHECK_OK(moe_game_types_estimate(16, 1, &one, quality, m, work, &fit));
    CHECK_NEAR(fit.l1_coupled, single.l1_game, 3e-15);
    CHECK_NEAR(fit.l1_independent, single.l1_softmax, 2e-15);
    free(work);
}

static void test_cluster(void) {
    enum { T = 300, E = 6, C = 3 };
    static const double centre[C][E] = {{3, 0, 0, -1, -1, -1}, {0, 3, 0, -1, -1, -1}, {0, 0, 3, -3, 0, 0}};
    float z[T * E];
    uint32_t type[T], again[T], truth[T];
    double share[8], quality[8 * E], work[T + E], *other = test_doubles(C * E); /* no more than C centres */
    for (int t = 0; t < T; t++) {
        truth[t] = (uint32_t)(test_below(10) < 5 ? 0 : test_below(2) + 1);
        double lift = 5 * normal(); /* a token's own level means nothing */
        for (int e = 0; e < E; e++) z[t * E + e] = (float)(centre[truth[t]][e] + lift + 0.2 * normal());
    }
    for (uint64_t seed = 0; seed < 10; seed++) {
        CHECK_OK(moe_game_cluster(T, E, C, seed, z, type, share, quality, work));
        CHECK_OK(moe_game_cluster(T, E, C, seed, z, again, share, other, work));
        CHECK(!memcmp(type, again, sizeof type) && !memcmp(quality, other, C * E * sizeof *quality));
        double sum = 0;
        for (int c = 0; c < C; c++) { /* shares and means are those of the assignment */
            double n = 0, mean[E] = {0};
            for (int t = 0; t < T; t++) {
                double row = 0;
                if ((int)type[t] != c) continue;
                n++;
                for (int e = 0; e < E; e++) row += (double)z[t * E + e] / E;
                for (int e = 0; e < E; e++) mean[e] += (double)z[t * E + e] - row;
            }
            CHECK_NEAR(share[c], n / T, 2e-15);
            for (int e = 0; e < E && n > 0; e++) CHECK_WITHIN(quality[c * E + e], mean[e] / n, 1e-14);
            sum += share[c];
        }
        CHECK_NEAR(sum, 1, 2e-15);
        for (int t = 0; t < T; t++) { /* and each token is with its nearest centre */
            double row = 0, d[C] = {0};
            for (int e = 0; e < E; e++) row += (double)z[t * E + e] / E;
            for (int c = 0; c < C; c++)
                for (int e = 0; e < E; e++) d[c] += pow((double)z[t * E + e] - row - quality[c * E + e], 2);
            for (int c = 0; c < C; c++) CHECK_WITHIN(fmax(d[type[t]] - d[c], 0), 0, 2e-15);
        }
    }
    free(other);
    CHECK_OK(moe_game_cluster(T, E, C, 1, z, type, share, quality, work)); /* the planted types, by other numbers */
    int name[C] = {-1, -1, -1}, wrong = 0;
    for (int t = 0; t < T; t++) {
        if (name[truth[t]] < 0) name[truth[t]] = (int)type[t];
        wrong += name[truth[t]] != (int)type[t];
    }
    CHECK(wrong == 0);
    for (int t = 0; t < T; t++) /* two distinct tokens and eight types: six have no share */
        for (int e = 0; e < E; e++) z[t * E + e] = t % 3 ? (float)(e == 1) : (float)(e == 2);
    memset(quality, 0xff, sizeof quality);
    CHECK_OK(moe_game_cluster(T, E, 8, 1, z, type, share, quality, work));
    int used = 0;
    for (int c = 0; c < 8; c++) used += share[c] > 0;
    for (int i = 2 * E; i < 8 * E; i++) CHECK(quality[i] == 0);
    CHECK(used == 2);
}

/* ---- scope and quality ---- */
static void test_scope(void) {
    static const int32_t index[] = {0, 1, 1, 2, 0, 2, 1, -1};
    static const float z[] = {1, 0, 0, 2, 1, 1, 0, 0};
    static const double load[] = {.75, .25}, even[] = {.5, .5, 0}, over[] = {.6, .4, 0};
    double v[4], work[6], epsilon, mean[3] = {0};
    int feasible = -1;
    for (int t = 0; t < 4; t++)
        v[t] = log(exp((double)z[2 * t] - 2 * load[0]) + exp((double)z[2 * t + 1] - 2 * load[1]));
    mean[0] = (v[0] + v[2]) / 2, mean[1] = (v[0] + v[1] + v[3]) / 3, mean[2] = (v[1] + v[2]) / 2;
    CHECK_OK(moe_game_epsilon(4, 3, 2, index, 2, z, load, 2, 1, work, &epsilon));
    CHECK_NEAR(epsilon, fmax(fmax(mean[0], mean[1]), mean[2]) - fmin(fmin(mean[0], mean[1]), mean[2]), 2e-15);
    CHECK_OK(moe_game_epsilon(4, 3, 2, index, 2, z, load, 2, 3, work, &epsilon)); /* one expert has three tokens */
    CHECK(epsilon == 0);
    CHECK_NEAR(moe_game_epsilon_bound(0.5, 8, 4), 0.5 / 6, 1e-15);
    CHECK_NEAR(moe_game_epsilon_bound(0.5, 0, 4), 2 * tanh(0.125), 1e-15);
    CHECK(isnan(moe_game_epsilon_bound(-1, 0, 4)) && isnan(moe_game_epsilon_bound(1, -0.5, 4)));
    CHECK_OK(moe_game_feasible(3, 2, even, &feasible));
    CHECK(feasible == 1);
    CHECK_OK(moe_game_feasible(3, 2, over, &feasible));
    CHECK(feasible == 0);
    /* the bound holds: two layers' loads with and without a shift of at most epsilon in the next layer's value */
    for (int round = 0; round < 50; round++) {
        double q[6], shifted[6], a[6], b[6], eps = uniform(), gamma = round % 5 ? 20 * uniform() : 0, l1 = 0;
        for (int i = 0; i < 6; i++) q[i] = normal(), shifted[i] = q[i] + eps * (double)test_below(2);
        CHECK_OK(moe_game_solve(6, q, gamma, a, NULL));
        CHECK_OK(moe_game_solve(6, shifted, gamma, b, NULL));
        for (int i = 0; i < 6; i++) l1 += fabs(a[i] - b[i]);
        CHECK_WITHIN(fmax(l1 - 2 * tanh(eps / 4), 0), 0, 2e-15);
    }
}

static int ascending(const void *a, const void *b) {
    return (*(const float *)a > *(const float *)b) - (*(const float *)a < *(const float *)b);
}

static void test_quality(void) {
    enum { T = 53, E = 4, K = 2 };
    float z[T * E], column[T];
    int32_t index[T * K];
    double work[T], q[MOE_QUALITY_COUNT][E], r;
    test_fill(z, T * E, -2, 2);
    CHECK_OK(moe_topk(T, E, K, z, index, NULL));
    for (int t = 0; t < T; t++)
        for (int i = 0; i < K; i++)
            if (index[t * K + i] == 3) index[t * K + i] = -1; /* nobody uses expert 3 */
    for (int kind = 0; kind < MOE_QUALITY_COUNT; kind++)
        CHECK_OK(moe_game_quality((moe_quality_kind)kind, T, E, K, z, index, work, q[kind]));
    for (int e = 0; e < E; e++) {
        double mean = 0, prob = 0, selected = 0, n = 0, trimmed = 0;
        for (int t = 0; t < T; t++) {
            double sum = 0;
            column[t] = z[t * E + e];
            mean += (double)column[t] / T;
            for (int j = 0; j < E; j++) sum += exp((double)z[t * E + j]);
            prob += exp((double)column[t]) / sum / T;
            for (int i = 0; i < K; i++)
                if (index[t * K + i] == e) selected += (double)column[t], n++;
        }
        qsort(column, T, sizeof *column, ascending);
        for (int t = T / 10; t < T - T / 10; t++) trimmed += (double)column[t] / (T - 2 * (T / 10));
        CHECK_NEAR(q[MOE_QUALITY_MEAN][e], mean, 2e-15);
        CHECK_NEAR(q[MOE_QUALITY_LOG_PROB][e], log(prob), 2e-15);
        CHECK_NEAR(q[MOE_QUALITY_MEDIAN][e], column[T / 2], 2e-15);
        CHECK_NEAR(q[MOE_QUALITY_TRIMMED][e], trimmed, 2e-15);
        if (e < 3)
            CHECK_NEAR(q[MOE_QUALITY_SELECTED][e], selected / n, 2e-15);
        else
            CHECK(q[MOE_QUALITY_SELECTED][e] == -INFINITY);
        CHECK(moe_quality_name((moe_quality_kind)e) != NULL);
    }
    CHECK_OK(moe_game_quality(MOE_QUALITY_MEDIAN, 4, E, K, z, NULL, work, q[0])); /* an even number: between the two */
    for (int t = 0; t < 4; t++) column[t] = z[t * E];
    qsort(column, 4, sizeof *column, ascending);
    CHECK_NEAR(q[0][0], ((double)column[1] + (double)column[2]) / 2, 2e-15);
    static const double a[] = {1, 2, 3, 4, INFINITY}, b[] = {2, 4, 6, 8, 1}, c[] = {4, 3, 2, 1, 0},
                        d[] = {1, 1, 1, 1, 1}, e[] = {1, 3, 2, 5, 9};
    CHECK_OK(moe_pearson(5, a, b, &r));
    CHECK_NEAR(r, 1, 1e-15);
    CHECK_OK(moe_pearson(5, a, c, &r));
    CHECK_NEAR(r, -1, 1e-15);
    CHECK_OK(moe_pearson(5, a, d, &r));
    CHECK(isnan(r));
    CHECK_OK(moe_pearson(4, a, e, &r));
    CHECK_NEAR(r, 5.5 / sqrt(5.0 * 8.75), 2e-15);
    CHECK_OK(moe_pearson(5, b, a, &r)); /* where either is no number, the pair does not count */
    CHECK_NEAR(r, 1, 1e-15);
    CHECK_OK(moe_pearson(4, d, e, &r));
    CHECK(isnan(r));
    r = 7;
    CHECK_OK(moe_pearson(0, NULL, NULL, &r));
    CHECK(isnan(r));
    CHECK(moe_quality_name(MOE_QUALITY_COUNT) == NULL);
}

/* ---- phases ---- */
enum { SERIES = 20 };

/* Rise to `top` at step 5, slow fall to `shelf` at step 11, fast fall to `end`. Noise is as wide as the
 * intervals say. */
static void plant_series(double start, double top, double shelf, double end, double sd, double *step, double *gamma,
                         double *lo, double *hi) {
    for (int i = 0; i < SERIES; i++) {
        double at = i, truth;
        step[i] = 1000 * at;
        if (i <= 5)
            truth = start + (top - start) * at / 5;
        else if (i <= 11)
            truth = top + (shelf - top) * (at - 5) / 6;
        else
            truth = shelf + (end - shelf) * (at - 11) / 8;
        gamma[i] = truth + sd * normal();
        lo[i] = gamma[i] - 1.96 * sd, hi[i] = gamma[i] + 1.96 * sd;
    }
}

static void test_phases(void) {
    double step[SERIES], gamma[SERIES], lo[SERIES], hi[SERIES], work[SERIES];
    moe_phase_kind phase[SERIES];
    size_t right = 0, none = 0, seeds = 200;
    for (size_t seed = 0; seed < seeds; seed++) {
        int ok = 1;
        plant_series(14, 38, 33, 9, 0.8, step, gamma, lo, hi);
        CHECK_OK(moe_game_phases(SERIES, step, gamma, lo, hi, work, phase));
        for (int i = 0; i < SERIES; i++) { /* at most one checkpoint beside the truth */
            moe_phase_kind want = i <= 5 ? MOE_PHASE_SURGE : i <= 11 ? MOE_PHASE_STABILISATION : MOE_PHASE_RELAXATION;
            int border = (i >= 4 && i <= 6) || (i >= 10 && i <= 12);
            ok &= border || phase[i] == want;
        }
        ok &= phase[4] != MOE_PHASE_RELAXATION && phase[12] != MOE_PHASE_SURGE;
        right += (size_t)ok;
        plant_series(20, 20, 20, 20, 0.8, step, gamma, lo, hi);
        CHECK_OK(moe_game_phases(SERIES, step, gamma, lo, hi, work, phase));
        ok = 1;
        for (int i = 0; i < SERIES; i++) ok &= phase[i] == MOE_PHASE_NONE;
        none += (size_t)ok;
    }
    if (!CHECK(right * 100 >= 95 * seeds && none * 100 >= 95 * seeds))
        printf("        %zu and %zu of %zu\n", right, none, seeds);
}

static void test_phases_by_hand(void) {
    static const double g[] = {2, 2.1, 1.9, 2, 20, 40, 40, 39, 30, 20, 10}, rise[] = {1, 10, 20, 30, 30, 30, 30, 30},
                        fall[] = {30, 30, 30, 30, 20, 10, 5};
    static const moe_phase_kind want[] = {MOE_PHASE_DORMANT, MOE_PHASE_DORMANT, MOE_PHASE_DORMANT,
                                     MOE_PHASE_DORMANT, MOE_PHASE_SURGE,   MOE_PHASE_SURGE};
    double step[11], lo[11], hi[11], work[11];
    moe_phase_kind phase[11];
    for (int i = 0; i < 11; i++) step[i] = i, lo[i] = g[i] - 1, hi[i] = g[i] + 1;
    CHECK_OK(moe_game_phases(11, step, g, lo, hi, work, phase));
    for (int i = 0; i < 6; i++) CHECK(phase[i] == want[i]);
    CHECK(phase[6] == MOE_PHASE_STABILISATION && phase[7] == MOE_PHASE_STABILISATION &&
          phase[8] == MOE_PHASE_RELAXATION && phase[10] == MOE_PHASE_RELAXATION);
    for (int i = 0; i < 8; i++) lo[i] = rise[i] - 1, hi[i] = rise[i] + 1;
    CHECK_OK(moe_game_phases(8, step, rise, lo, hi, work, phase)); /* no fall: it stays */
    for (int i = 0; i < 8; i++) CHECK(phase[i] == (i <= 3 ? MOE_PHASE_SURGE : MOE_PHASE_STABILISATION));
    for (int i = 0; i < 7; i++) lo[i] = fall[i] - 1, hi[i] = fall[i] + 1;
    CHECK_OK(moe_game_phases(7, step, fall, lo, hi, work, phase)); /* no rise */
    for (int i = 0; i < 7; i++) CHECK(phase[i] == (i <= 3 ? MOE_PHASE_STABILISATION : MOE_PHASE_RELAXATION));
    CHECK_OK(moe_game_phases(0, NULL, NULL, NULL, NULL, NULL, NULL));
    CHECK_OK(moe_game_phases(1, step, g, lo, hi, work, phase));
    CHECK(phase[0] == MOE_PHASE_NONE);
    CHECK_OK(moe_game_phases(2, step, fall, lo, hi, work, phase));
    step[2] = step[1];
    CHECK_STATUS(moe_game_phases(7, step, fall, lo, hi, work, phase), MOE_E_SERIES);
    CHECK(!strcmp(moe_phase_name(MOE_PHASE_STABILISATION), "stabilisation") && moe_phase_name(MOE_PHASE_COUNT) == NULL);
}

/* ---- bad arguments ---- */
static void test_bad_arguments(void) {
    double q[4] = {1, 2, 3, 4}, m[4] = {.25, .25, .25, .25}, work[400], bad[4] = {1, NAN, 0, 0},
           less[4] = {1.5, -0.5, 0, 0}, zero[4] = {0}, e;
    float z[4] = {0, 1, 2, 3}, nan[4] = {0, 1, NAN, 3};
    int32_t index[2] = {0, 5};
    uint32_t type[1];
    moe_game_fit fit;
    moe_game g;
    memset(&g, 0, sizeof g);
    CHECK_STATUS(moe_game_solve(0, q, 1, m, NULL), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_solve(4, NULL, 1, m, NULL), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_game_solve(4, bad, 1, m, NULL), MOE_E_QUALITY);
    CHECK_STATUS(moe_game_solve(4, q, -1, m, NULL), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_solve(4, q, NAN, m, NULL), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_solve(4, q, INFINITY, m, NULL), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_solve(4, q, 1, NULL, NULL), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_softmax(4, q, 0, m), MOE_E_TEMPERATURE);
    CHECK_STATUS(moe_game_softmax(4, q, 1e-320, m), MOE_E_TEMPERATURE);
    CHECK_STATUS(moe_game_sensitivity(4, 1, zero, m), MOE_E_LOAD);
    CHECK_STATUS(moe_game_estimate(4, q, bad, 0, work, &fit), MOE_E_LOAD);
    CHECK_STATUS(moe_game_estimate(4, q, less, 0, work, &fit), MOE_E_LOAD);
    CHECK_STATUS(moe_game_estimate(4, q, zero, 0, work, &fit), MOE_E_LOAD);
    CHECK_STATUS(moe_game_estimate(4, q, m, NAN, work, &fit), MOE_E_LOAD);
    CHECK_STATUS(moe_game_estimate(4, q, m, 0, NULL, &fit), MOE_E_NULL_WORK);
    const double second[2] = {0, 1}; /* of the first type there is nothing */
    CHECK_OK(moe_game_types_solve(2, 2, second, q, 1, work, work + 2, NULL));
    CHECK_STATUS(moe_game_types_solve(2, 2, less, q, 1, m, work, NULL), MOE_E_TYPE_SHARE);
    CHECK_STATUS(moe_game_types_solve(2, 2, m, q, 1, m, work, NULL), MOE_E_TYPE_SHARE); /* sums to one half */
    CHECK_STATUS(moe_game_types_solve(4, 65, m, q, 1, m, work, NULL), MOE_E_N_TYPES);
    e = 1;
    CHECK_STATUS(moe_game_types_solve(4, 1, &e, q, -0.5, m, work, NULL), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_types_solve(4, 1, &e, bad, 1, m, work, NULL), MOE_E_QUALITY);
    CHECK_STATUS(moe_game_cluster(0, 4, 1, 1, z, type, work, work, work), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_game_cluster(1, 4, 0, 1, z, type, work, work, work), MOE_E_N_TYPES);
    CHECK_STATUS(moe_game_cluster(1, 4, 1, 1, nan, type, work, work, work), MOE_E_NAN_LOGITS);
    CHECK_STATUS(moe_game_quality((moe_quality_kind)9, 1, 4, 1, z, NULL, work, m), MOE_E_QUALITY_KIND);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_SELECTED, 1, 4, 2, z, index, work, m), MOE_E_INDEX);
    CHECK_STATUS(moe_game_epsilon(1, 4, 2, index, 4, z, m, 1, 1, work, &e), MOE_E_INDEX);
    CHECK_STATUS(moe_game_feasible(4, 5, m, &(int){0}), MOE_E_TOP_K);
    CHECK_STATUS(moe_game_reset(&g), MOE_E_NULL_GAME);
    CHECK_STATUS(moe_game_pool(&g, NULL, 0, q, m, NULL), MOE_E_NULL_GAME);
    CHECK_STATUS(moe_game_size(4, 0, &(size_t){0}), MOE_E_N_BATCHES);
    CHECK_STATUS(moe_game_size((size_t)1 << 20, SIZE_MAX, &(size_t){0}), MOE_E_OVERFLOW);
    dump d = dump_new(4, 2);
    CHECK_STATUS(moe_game_add(&d.g, 2, 1, 2, z, index), MOE_E_BATCH);
    CHECK_STATUS(moe_game_add(&d.g, 0, 1, 2, z, index), MOE_E_INDEX);
    CHECK_STATUS(moe_game_add(&d.g, 0, 1, 1, nan, index), MOE_E_NAN_LOGITS);
    CHECK(d.g.tokens[0] == 0 && d.g.count[0] == 0);
    CHECK_STATUS(moe_game_pool(&d.g, NULL, 0, q, m, NULL), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_game_holdout(&d.g, 1, &fit), MOE_E_N_BATCHES);
    free(d.memory);
}

/* What is not given, one thing at a time; what cannot be counted. */
static void test_missing_arguments(void) {
    enum { E = 4 };
    double q[E] = {1, 2, 3, 4}, m[E] = {.25, .25, .25, .25}, zero[E] = {0}, huge[E] = {1e308, 1e308, 0, 0};
    double work[400], one = 1, x;
    float z[E] = {0, 1, 2, 3};
    int32_t index[1] = {0};
    uint32_t type[1];
    uint8_t half[2];
    int feasible;
    size_t n;
    moe_game_fit fit;
    moe_game_types_fit types;
    moe_game_null null;
    moe_phase_kind phase[1];
    dump d = dump_new(E, 2), other = dump_new(E + 1, 2), longer = dump_new(E, 3);
    moe_game none, *g = &d.g;
    memset(&none, 0, sizeof none);
    CHECK_STATUS(moe_game_solve(SIZE_MAX, q, 1, m, NULL), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_softmax(0, q, 1, m), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_softmax(E, q, 1, NULL), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_softmax(E, q, NAN, m), MOE_E_TEMPERATURE);
    CHECK_STATUS(moe_game_sensitivity(0, 1, m, q), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_sensitivity(SIZE_MAX, 1, m, q), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_sensitivity(E, -1, m, q), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_sensitivity(E, 1, NULL, q), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_sensitivity(E, 1, m, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_sensitivity(E, 1, huge, work), MOE_E_LOAD); /* whose sum is infinite */
    CHECK_STATUS(moe_game_estimate(0, q, m, 1, work, &fit), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_estimate(E, q, NULL, 1, work, &fit), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_estimate(E, q, m, 1, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_estimate(E, q, m, INFINITY, work, &fit), MOE_E_LOAD);
    CHECK_STATUS(moe_game_types_scratch(E, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_types_scratch(0, 1, &n), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_types_scratch(SIZE_MAX, 1, &n), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_cluster(SIZE_MAX, E, 1, 1, z, type, work, work, work), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_game_cluster(1, E, 1, 1, NULL, type, work, work, work), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_game_cluster(1, E, 1, 1, z, NULL, work, work, work), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_cluster(1, E, 1, 1, z, type, NULL, work, work), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_cluster(1, E, 1, 1, z, type, work, NULL, work), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_cluster(1, E, 1, 1, z, type, work, work, NULL), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_types_solve(E, 1, NULL, q, 1, m, work, NULL), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_game_types_solve(E, 1, &one, NULL, 1, m, work, NULL), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_game_types_solve(E, 1, &one, q, INFINITY, m, work, NULL), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_types_solve(E, 1, &one, q, 1, NULL, work, NULL), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_types_solve(E, 1, &one, q, 1, m, NULL, NULL), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_types_softmax(E, 0, &one, q, 1, m, work), MOE_E_N_TYPES);
    CHECK_STATUS(moe_game_types_softmax(E, 1, &one, q, 0, m, work), MOE_E_TEMPERATURE);
    CHECK_STATUS(moe_game_types_softmax(E, 1, &one, q, 1, NULL, work), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_types_softmax(E, 1, &one, q, 1, m, NULL), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_types_estimate(E, 0, &one, q, m, work, &types), MOE_E_N_TYPES);
    CHECK_STATUS(moe_game_types_estimate(E, 1, &one, q, NULL, work, &types), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_types_estimate(E, 1, &one, q, m, NULL, &types), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_types_estimate(E, 1, &one, q, m, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_types_estimate(E, 1, &one, q, zero, work, &types), MOE_E_LOAD);
    CHECK_STATUS(moe_game_feasible(E, 2, NULL, &feasible), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_feasible(E, 2, m, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_feasible(E, 2, zero, &feasible), MOE_E_LOAD);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, 0, z, m, 1, 1, work, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, SIZE_MAX, z, m, 1, 1, work, &x), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, NULL, m, 1, 1, work, &x), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, z, NULL, 1, 1, work, &x), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, z, m, NAN, 1, work, &x), MOE_E_GAMMA);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, z, m, 1, 1, NULL, &x), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, z, m, 1, 1, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_epsilon(1, E, 1, index, E, z, zero, 1, 1, work, &x), MOE_E_LOAD);
    CHECK(isnan(moe_game_epsilon_bound(-1, 1, E)) && isnan(moe_game_epsilon_bound(1, -1, E)));
    CHECK(isnan(moe_game_epsilon_bound(1, 1, 0)));
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEAN, 1, 0, 1, z, NULL, work, q), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEAN, 1, SIZE_MAX, 1, z, NULL, work, q), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEAN, 0, E, 1, z, NULL, work, q), MOE_E_NO_TOKENS);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEAN, SIZE_MAX, E, 1, z, NULL, work, q), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEAN, 1, E, 1, z, NULL, work, NULL), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_MEDIAN, 1, E, 1, z, NULL, NULL, q), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_quality(MOE_QUALITY_SELECTED, 1, E, 1, z, NULL, work, q), MOE_E_NULL_INDEX);
    CHECK_STATUS(moe_pearson(1, NULL, q, &x), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_pearson(1, q, NULL, &x), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_pearson(1, q, q, NULL), MOE_E_NULL_OUT);
    double single = 3, low = 0, high = 0;
    CHECK_OK(moe_interval(1, &single, &low, &high));
    CHECK(low == 3 && high == 3);
    CHECK_STATUS(moe_interval(1, &single, NULL, &high), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_interval(1, &single, &low, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_size(E, SIZE_MAX, &n), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_game_size(((size_t)1 << 20) + 1, 1, &n), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_size(E, 0, &n), MOE_E_N_BATCHES);
    CHECK_OK(moe_game_add_null(g, 0, 0, 1, NULL, NULL)); /* no tokens, nothing to add */
    CHECK_STATUS(moe_game_size(0, 1, &n), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_size(E, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_init(NULL, E, 1, work, sizeof work), MOE_E_NULL_GAME);
    CHECK_STATUS(moe_game_init(&none, 0, 1, work, sizeof work), MOE_E_N_EXPERTS);
    CHECK_STATUS(moe_game_init(&none, E, 1, NULL, sizeof work), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_game_init(&none, E, 1, work, 1), MOE_E_SMALL_MEMORY);
    memset(&none, 0, sizeof none);
    moe_game *const games[] = {NULL, &none};
    for (int i = 0; i < 2; i++) { /* no game, and one that was never begun */
        moe_game *no = games[i];
        CHECK_STATUS(moe_game_reset(no), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_add(no, 0, 1, 1, z, index), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_add_null(no, 0, 1, 1, z, index), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_merge(no, g), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_merge(g, no), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_pool(no, NULL, 0, q, m, &x), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_split(no, 1, half), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_holdout(no, 1, &fit), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_bootstrap(no, 1, 1, NULL, work, work, work), MOE_E_NULL_GAME);
        CHECK_STATUS(moe_game_excess(no, 1, 1, NULL, work, work, &null), MOE_E_NULL_GAME);
    }
    CHECK_STATUS(moe_game_add(g, 0, 1, 1, NULL, index), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_game_add(g, 0, SIZE_MAX, 1, z, index), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_game_add_null(g, 0, 1, 1, NULL, index), MOE_E_NULL_LOGITS);
    CHECK_STATUS(moe_game_merge(g, &other.g), MOE_E_MERGE);
    CHECK_STATUS(moe_game_merge(g, &longer.g), MOE_E_N_BATCHES);
    CHECK_STATUS(moe_game_pool(g, NULL, 0, NULL, m, &x), MOE_E_NULL_QUALITY);
    CHECK_STATUS(moe_game_pool(g, NULL, 0, q, NULL, &x), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_game_split(g, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_holdout(g, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_bootstrap(g, 0, 1, NULL, work, work, work), MOE_E_REPLICATES);
    CHECK_STATUS(moe_game_bootstrap(g, 1, 1, NULL, NULL, work, work), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_bootstrap(g, 1, 1, NULL, work, NULL, work), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_bootstrap(g, 1, 1, NULL, work, work, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_bootstrap(g, SIZE_MAX, 1, NULL, work, work, work), MOE_E_OVERFLOW);
    moe_parallel many = {NULL, NULL, SIZE_MAX / 8};
    CHECK_STATUS(moe_game_bootstrap(g, 1, 1, &many, work, work, work), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_game_excess(g, 1, 1, NULL, work, NULL, &null), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_game_excess(g, SIZE_MAX, 1, NULL, work, work, &null), MOE_E_OVERFLOW);
    CHECK_OK(moe_game_phases(0, NULL, NULL, NULL, NULL, NULL, NULL));
    const double *series[4] = {&one, &one, &one, &one};
    static const double bad[] = {NAN, INFINITY};
    for (int i = 0; i < 4; i++) {
        series[i] = NULL;
        CHECK_STATUS(moe_game_phases(1, series[0], series[1], series[2], series[3], work, phase), MOE_E_NULL_QUALITY);
        series[i] = &bad[i % 2];
        CHECK_STATUS(moe_game_phases(1, series[0], series[1], series[2], series[3], work, phase), MOE_E_SERIES);
        series[i] = &one;
    }
    CHECK_STATUS(moe_game_phases(1, &one, &one, &one, &one, NULL, phase), MOE_E_NULL_WORK);
    CHECK_STATUS(moe_game_phases(1, &one, &one, &one, &one, work, NULL), MOE_E_NULL_OUT);
    free(d.memory), free(other.memory), free(longer.memory);
}

/* Numbers so far apart that rounding hides the equilibrium. */
static void test_not_found(void) {
    static const double quality[4] = {0, 0, 0, 0}, apart[4] = {0, 0, 1, 0}, share[2] = {0.5, 0.5};
    double load[4];
    size_t bytes = 0;
    CHECK_OK(moe_game_solve(4, quality, 1e10, load, NULL));
    for (size_t e = 0; e < 4; e++) CHECK_NEAR(load[e], 0.25, 1e-12);
    CHECK_STATUS(moe_game_solve(4, quality, 1e200, load, NULL), MOE_E_GAME);
    CHECK_OK(moe_game_types_scratch(2, 2, &bytes));
    double *work = (double *)test_memory(bytes, 1);
    CHECK_STATUS(moe_game_types_solve(2, 2, share, apart, 1e10, load, work, NULL), MOE_E_GAME);
    free(work);
}

int main(void) {
    RUN(test_oracles);
    RUN(test_solver_extremes);
    RUN(test_three_solvers);
    RUN(test_sensitivity);
    RUN(test_exact_fits);
    RUN(test_unidentified);
    RUN(test_planted_gamma);
    RUN(test_planted_zero);
    RUN(test_bootstrap);
    RUN(test_batches);
    RUN(test_padding);
    RUN(test_half_padding);
    RUN(test_null_of_noise);
    RUN(test_null_of_congestion);
    RUN(test_null_of_growing_logits);
    RUN(test_null_by_hand);
    RUN(test_holdout);
    RUN(test_types);
    RUN(test_types_fit);
    RUN(test_cluster);
    RUN(test_scope);
    RUN(test_quality);
    RUN(test_phases);
    RUN(test_phases_by_hand);
    RUN(test_bad_arguments);
    RUN(test_missing_arguments);
    RUN(test_not_found);
    return test_end();
}

// exp_verdict.h - what numbers say about a claim. Nothing here knows an experiment: made-up numbers can be judged too.
#ifndef EX_EXP_VERDICT_H
#define EX_EXP_VERDICT_H

#include "spread.h"

#include "moe.h"

typedef enum exp_verdict { EXP_CONFIRMED, EXP_NOT_CONFIRMED, EXP_NOT_TESTABLE } exp_verdict;
static const char *const exp_verdict_name[] = {"confirmed", "not confirmed", "not testable here"};

// ---- "from a threshold on there is none" ----

typedef struct exp_sides {
    size_t above, above_bad, below, below_bad; // trainings on each side, and those that have some
    double most;                               // above
} exp_sides;

// The claim: where at[i] >= threshold, count[i] is 0. Where nothing below has any either, the threshold was not put
// to a test. What is NaN does not count.
EX_FUNC exp_verdict exp_threshold(size_t n, const double *at, const double *count, double threshold, exp_sides *out) {
    exp_sides s = {0, 0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        if (isnan(at[i]) || isnan(count[i])) continue;
        if (at[i] >= threshold * (1 - 1e-6)) { // float32 coefficients
            s.above++;
            if (count[i] > 0) s.above_bad++;
            s.most = fmax(s.most, count[i]);
        } else {
            s.below++;
            if (count[i] > 0) s.below_bad++;
        }
    }
    *out = s;
    if (s.above_bad) return EXP_NOT_CONFIRMED;
    return s.above && s.below_bad ? EXP_CONFIRMED : EXP_NOT_TESTABLE;
}

// ---- "it is more" ----

// The claim: the mean of value is above 0. By the 95% interval of the mean (Student's t).
EX_FUNC exp_verdict exp_positive(spread s) {
    if (s.n < 2) return EXP_NOT_TESTABLE;
    return s.mean - spread_half(s) > 0 ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
}

// The claim: the mean is not 0, whichever way.
EX_FUNC exp_verdict exp_differs(spread s) {
    spread turned = {s.n, -s.mean, s.sd};
    exp_verdict v = exp_positive(s);
    return v == EXP_NOT_CONFIRMED ? exp_positive(turned) : v;
}

// The claim: x is at least `least` in all; what is NaN was not measured.
EX_FUNC exp_verdict exp_at_least(size_t n, const double *x, double least) {
    size_t known = 0, good = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(x[i])) continue;
        known++;
        if (x[i] >= least) good++;
    }
    if (!known) return EXP_NOT_TESTABLE;
    return good == known ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
}

// The claim: two groups of numbers have the same mean. Confirmed where the 95% interval of the difference lies within
// `margin`, not confirmed where it is without; between them these trainings cannot tell.
EX_FUNC exp_verdict exp_same(spread difference, double margin) {
    if (difference.n < 2) return EXP_NOT_TESTABLE;
    double lo = difference.mean - spread_half(difference), hi = difference.mean + spread_half(difference);
    if (lo >= -margin && hi <= margin) return EXP_CONFIRMED;
    return lo > margin || hi < -margin ? EXP_NOT_CONFIRMED : EXP_NOT_TESTABLE;
}

// ---- "it is where theory says" ----

// The claim: each measured number is the predicted one to a relative tolerance. What is predicted as NaN is no part of
// it; what was not found (NaN) is not where it should be. *worst: the largest relative distance.
EX_FUNC exp_verdict exp_near(size_t n, const double *measured, const double *predicted, double tolerance,
                             double *worst) {
    size_t counted = 0;
    *worst = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(predicted[i])) continue;
        double away = fabs(measured[i] / predicted[i] - 1);
        counted++;
        *worst = isnan(away) ? INFINITY : fmax(*worst, away);
    }
    if (!counted) return EXP_NOT_TESTABLE;
    return *worst <= tolerance ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
}

// ---- "surge, stabilisation, relaxation" ----

// The claim: the three phases in this order. identified: at how many of the n points there is a number at all.
EX_FUNC exp_verdict exp_phases(size_t n, const moe_phase_kind *phase, size_t identified) {
    static const moe_phase_kind want[] = {MOE_PHASE_SURGE, MOE_PHASE_STABILISATION, MOE_PHASE_RELAXATION};
    size_t found = 0;
    if (n < 8 || 2 * identified < n) return EXP_NOT_TESTABLE;
    for (size_t i = 0; i < n && found < 3; i++)
        if (phase[i] == want[found]) found++;
    return found == 3 ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
}

// The claim: it is so in more than half of the cases that tell.
EX_FUNC exp_verdict exp_majority(size_t so, size_t telling) {
    if (!telling) return EXP_NOT_TESTABLE;
    return 2 * so > telling ? EXP_CONFIRMED : EXP_NOT_CONFIRMED;
}

// The phases one after the other, each once: "surge, stabilisation".
EX_FUNC void exp_phases_text(size_t n, const moe_phase_kind *phase, char *out, size_t size) {
    size_t at = 0;
    *out = 0;
    for (size_t i = 0; i < n && at < size; i++)
        if (!i || phase[i] != phase[i - 1])
            at += (size_t)snprintf(out + at, size - at, "%s%s", i ? ", " : "", moe_phase_name(phase[i]));
}

#endif

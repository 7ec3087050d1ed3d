// rates.h - by which law does a series of losses fall? Two laws of two numbers each, fitted to the log of the loss:
//
//     the linear rate         loss = A e^(-c step)      O(log 1/eps) steps
//     the law it must beat    loss = A / (t0 + step)    O(1/eps) steps; t0 >= 0
//
//     verdict v = rate_judge(step, loss, n);
//     puts(v.why);            // with the condition that decided
#ifndef EX_RATES_H
#define EX_RATES_H

#include "platform.h"

#include <math.h>

typedef struct verdict {
    int linear;            // the linear rate is borne out
    double slope;          // of log loss
    double line, slow;     // share of the variance of log loss that the linear rate, and the slow law, explain
    double t0;             // of the slow law, as far as a grid of it goes
    char why[160];
} verdict;

// The squares of log loss that A / (t0 + step) leaves, with the best A.
EX_FUNC double rate_slow_left(const double *step, const double *log_loss, size_t n, double t0) {
    double mean = 0, left = 0;
    for (size_t i = 0; i < n; i++) mean += (log_loss[i] + log(t0 + step[i])) / (double)n;
    for (size_t i = 0; i < n; i++) left += pow(log_loss[i] + log(t0 + step[i]) - mean, 2);
    return left;
}

// The squares that the line leaves; its slope, and the squares about the mean.
EX_FUNC double rate_line_left(const double *step, const double *log_loss, size_t n, double *slope, double *about) {
    double mx = 0, my = 0, xx = 0, xy = 0;
    for (size_t i = 0; i < n; i++) mx += step[i] / (double)n, my += log_loss[i] / (double)n;
    *about = 0;
    for (size_t i = 0; i < n; i++) {
        xx += (step[i] - mx) * (step[i] - mx);
        xy += (step[i] - mx) * (log_loss[i] - my);
        *about += (log_loss[i] - my) * (log_loss[i] - my);
    }
    *slope = xy / xx;
    return fmax(*about - xy * xy / xx, 0);
}

// Steps ascend, and are above 0; n is at least 3. Borne out: the loss falls, the line explains over 95% of its log, and
// is better than the slow law by more than chance: n ln(squares left by the law / squares left by the line), the
// difference of their AIC, is over 4.
EX_FUNC verdict rate_judge(const double *step, const double *loss, size_t n) {
    enum { GRID = 1600 }; // of t0, from 1e-4 to 1e4 of the last step
    double *log_loss = allocate(n, sizeof *log_loss), about, slow = INFINITY;
    verdict r = {0};
    for (size_t i = 0; i < n; i++) log_loss[i] = log(fmax(loss[i], 1e-30));
    double line = rate_line_left(step, log_loss, n, &r.slope, &about);
    for (int k = -1; k < GRID; k++) {
        double t0 = k < 0 ? 0 : step[n - 1] * pow(10, 8.0 * k / (GRID - 1) - 4);
        double left = rate_slow_left(step, log_loss, n, t0);
        if (left < slow) slow = left, r.t0 = t0;
    }
    free(log_loss);
    if (about > 0) r.line = 1 - line / about, r.slow = 1 - slow / about;
    double better = (double)n * log((slow + 1e-300) / (line + 1e-300));
    const char *why = NULL;
    if (!(r.slope < 0))
        why = "no: the loss does not fall";
    else if (!(r.line > 0.95))
        why = "no: the line explains not over 95%";
    else if (better < -4)
        why = "no: the slower law fits better";
    else if (!(better > 4))
        why = "not told: the two laws fit alike";
    r.linear = !why;
    snprintf(r.why, sizeof r.why, "%s; of log loss e^(-c step) explains %.2f%%, 1 / (t0 + step) %.2f%%",
             why ? why : "yes: it falls, over 95%, and better than the slower law", 100 * r.line, 100 * r.slow);
    return r;
}

#endif

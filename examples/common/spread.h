// spread.h - mean and standard deviation of what several seeds gave, and the interval that a mean deserves.
//
//     spread s = spread_of(n, value);                     // of those that are finite
//     spread_text(s, "%.4f", cell, sizeof cell);          // "1.2834 +- 0.0121"; without the second of one value
//     s.mean - spread_half(s), s.mean + spread_half(s)    // 95%
//     spread_json(&lines, "test_loss", s);                // "test_loss_mean":1.28,"test_loss_sd":0.0121
#ifndef EX_SPREAD_H
#define EX_SPREAD_H

#include "json.h"

#include <math.h>

typedef struct spread {
    size_t n;
    double mean, sd; // sd: with n - 1; NaN of fewer than two values, as the mean of none
} spread;

EX_FUNC spread spread_of(size_t n, const double *value) {
    spread s = {0, 0, 0};
    for (size_t i = 0; i < n; i++)
        if (isfinite(value[i])) s.n++, s.mean += value[i];
    s.mean = s.n ? s.mean / (double)s.n : NAN;
    for (size_t i = 0; i < n; i++)
        if (isfinite(value[i])) s.sd += (value[i] - s.mean) * (value[i] - s.mean);
    s.sd = s.n > 1 ? sqrt(s.sd / (double)(s.n - 1)) : NAN;
    return s;
}

// Half of the mean's 95% interval, by Student's t; NaN of fewer than two values.
EX_FUNC double spread_half(spread s) {
    static const double known[] = {12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
                                   2.201,  2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086};
    if (s.n < 2) return NAN;
    size_t freedom = s.n - 1;
    double z = 1.959964, f = (double)freedom, t; // many: the first terms of its expansion around the normal one
    t = z + (z * z * z + z) / (4 * f) + (5 * pow(z, 5) + 16 * z * z * z + 3 * z) / (96 * f * f);
    if (freedom <= sizeof known / sizeof *known) t = known[freedom - 1];
    return t * s.sd / sqrt((double)s.n);
}

EX_FUNC void spread_text(spread s, const char *format, char *out, size_t size) {
    if (!s.n) {
        snprintf(out, size, "-");
        return;
    }
    size_t at = (size_t)snprintf(out, size, format, s.mean);
    if (s.n < 2 || at + 5 > size) return;
    at += (size_t)snprintf(out + at, size - at, " +- ");
    snprintf(out + at, size - at, format, s.sd);
}

EX_FUNC void spread_json(json *j, const char *key, spread s) {
    char name[64];
    snprintf(name, sizeof name, "%s_mean", key);
    json_real(j, name, s.mean);
    snprintf(name, sizeof name, "%s_sd", key);
    json_real(j, name, s.sd);
}

#endif

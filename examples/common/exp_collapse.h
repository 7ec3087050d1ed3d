// exp_collapse.h - the collapse map: at which strength of its own feedback does a router collapse?
//
// The minimal dynamics (after arXiv 2605.29121 [D]; docs/gamma.md, "Feedback"): an expert's score grows with what it
// is given and is forgotten,  ds_i/dt = a p_i - lambda s_i,  p = softmax(beta s);  Kf = a beta / lambda. Here they are
// run, from a balance that is a little disturbed and from a one-sided state, and the strengths at which each is left
// are looked for by bisection. None of that uses the formulas that predict them (moe_feedback_thresholds).
#ifndef EX_EXP_COLLAPSE_H
#define EX_EXP_COLLAPSE_H

#include "exp_run.h"

enum { COLLAPSE_MOST = 8, COLLAPSE_POINTS = 41 };
static const double collapse_gone = 0.02; // a one-sidedness u above it counts as collapsed: 0 = even, 1 = all to one

typedef struct collapse_router {
    size_t n;
    double a, lambda, beta, dt, s[COLLAPSE_MOST], p[COLLAPSE_MOST];
} collapse_router;

EX_FUNC void collapse_softmax(collapse_router *r) {
    double top = r->s[0], sum = 0;
    for (size_t i = 1; i < r->n; i++) top = fmax(top, r->s[i]);
    for (size_t i = 0; i < r->n; i++) sum += r->p[i] = exp(r->beta * (r->s[i] - top));
    for (size_t i = 0; i < r->n; i++) r->p[i] /= sum;
}
// u = (M max p - 1) / (M - 1). For M = 2: |p_1 - p_2|.
EX_FUNC double collapse_u(const collapse_router *r) {
    double top = 0;
    for (size_t i = 0; i < r->n; i++) top = fmax(top, r->p[i]);
    return ((double)r->n * top - 1) / ((double)r->n - 1);
}
// One step; returns how fast it moves.
EX_FUNC double collapse_step(collapse_router *r) {
    double fastest = 0;
    collapse_softmax(r);
    for (size_t i = 0; i < r->n; i++) {
        double v = r->a * r->p[i] - r->lambda * r->s[i];
        r->s[i] += r->dt * v;
        fastest = fmax(fastest, fabs(v));
    }
    return fastest;
}

// a = lambda = 1, so that beta is Kf. one_sided: all to expert 0, else even but for disturbances of about 1e-4.
EX_FUNC collapse_router collapse_start(size_t n, double kf, int one_sided, uint64_t seed) {
    collapse_router r = {.n = n, .a = 1, .lambda = 1, .beta = kf, .dt = 0.1};
    float disturbance[COLLAPSE_MOST];
    nn_must(moe_rand_normal(seed, 1, n, 0, 1e-4f, disturbance));
    for (size_t i = 0; i < n; i++) {
        r.s[i] = one_sided ? (double)(i == 0) : 1 / (double)n;
        r.s[i] += (double)disturbance[i];
    }
    return r;
}
EX_FUNC double collapse_settle(collapse_router *r, size_t steps) {
    for (size_t i = 0; i < steps; i++)
        if (collapse_step(r) < 1e-13) break;
    collapse_softmax(r);
    return collapse_u(r);
}

// What it costs to carry the scores in a straight line from the balance to the one-sided state, against the forces:
// positive where the balance lies deeper. (The forces have a potential, so the way does not matter.)
EX_FUNC double collapse_work(const collapse_router *settled) {
    enum { PARTS = 4000 };
    collapse_router r = *settled;
    double work = 0, even = 1 / (double)r.n;
    for (size_t k = 0; k < PARTS; k++) {
        double at = ((double)k + 0.5) / PARTS;
        for (size_t i = 0; i < r.n; i++) r.s[i] = even + at * (settled->s[i] - even);
        collapse_softmax(&r);
        for (size_t i = 0; i < r.n; i++)
            work -= (r.a * r.p[i] - r.lambda * r.s[i]) * (settled->s[i] - even) / PARTS;
    }
    return work;
}

typedef enum collapse_kind { COLLAPSE_FROM_BALANCE, COLLAPSE_FROM_ONE, COLLAPSE_DEPTH } collapse_kind;
// Whether at strength kf the router is on the collapsed side of the threshold in question.
EX_FUNC int collapse_over(collapse_kind kind, size_t n, double kf, size_t steps, uint64_t seed) {
    collapse_router r = collapse_start(n, kf, kind != COLLAPSE_FROM_BALANCE, seed);
    double u = collapse_settle(&r, steps);
    if (kind == COLLAPSE_DEPTH) return u > collapse_gone && collapse_work(&r) < 0;
    return u > collapse_gone;
}
EX_FUNC double collapse_find(collapse_kind kind, size_t n, size_t steps, double width, uint64_t seed) {
    double lo = 0.5, hi = 2 * (double)n + 1;
    while (hi - lo > width) {
        double middle = (lo + hi) / 2;
        if (collapse_over(kind, n, middle, steps, seed)) hi = middle;
        else lo = middle;
    }
    return (lo + hi) / 2;
}

// ---- the map ----

typedef struct collapse_map {
    size_t n, points;
    double kf[3 * COLLAPSE_POINTS], maxvio[3 * COLLAPSE_POINTS]; // three points at each strength
    int group[3 * COLLAPSE_POINTS];
    double mark[3]; // predicted: one-sided states begin, equal depth, balance unstable
    double found[3];
} collapse_map;

EX_FUNC void collapse_fill(exp_run *e, collapse_map *m, size_t steps, double width) {
    double ks, kc, n = (double)m->n, first = n / 4, last = 1.5 * n;
    nn_must(moe_feedback_thresholds(m->n, &ks, &kc));
    m->mark[0] = ks, m->mark[1] = kc, m->mark[2] = n;
    if (m->n == 2) m->mark[0] = m->mark[1] = NAN; // one threshold: 2
    for (size_t i = 0; i < COLLAPSE_POINTS; i++) {
        double kf = first + (last - first) * (double)i / (COLLAPSE_POINTS - 1), u[3] = {0, 0, NAN};
        for (int k = 0; k < 2; k++) {
            collapse_router r = collapse_start(m->n, kf, k, e->seed);
            u[k] = collapse_settle(&r, steps);
        }
        if (m->n == 2) nn_must(moe_feedback_two(kf, 0, &u[2]));
        for (int k = 0; k < 3; k++) {
            m->kf[m->points] = kf;
            m->maxvio[m->points] = u[k] * (n - 1);
            m->group[m->points++] = k;
        }
        struct json *j = exp_line(e, "run");
        json_whole(j, "experts", m->n);
        json_real(j, "kf", kf);
        json_real(j, "maxvio_from_balance", u[0] * (n - 1));
        json_real(j, "maxvio_from_one", u[1] * (n - 1));
        json_real(j, "maxvio_predicted", u[2] * (n - 1));
        json_end(j);
    }
    for (int k = 0; k < 3; k++) {
        static const collapse_kind kind[] = {COLLAPSE_FROM_ONE, COLLAPSE_DEPTH, COLLAPSE_FROM_BALANCE};
        m->found[k] = NAN;
        if (!isnan(m->mark[k])) m->found[k] = collapse_find(kind[k], m->n, steps, width, e->seed);
    }
}

EX_FUNC void collapse_draw(FILE *f, const void *arg) {
    static const char *const group[] = {"from balance", "from one expert", "predicted"};
    const collapse_map *m = arg;
    for (int k = 0; k < 2; k++) {
        char title[80];
        snprintf(title, sizeof title, "MaxVio of %zu experts against the feedback Kf", m[k].n);
        plot_points(f, &(plot_point_chart){.box = {480.0 * k, 0, 480, 320}, .title = title,
                                           .x_label = "Kf = a beta / lambda; dashed: predicted thresholds",
                                           .n = m[k].points, .x = m[k].kf, .y = m[k].maxvio, .group = m[k].group,
                                           .group_name = group, .n_groups = 2 + (m[k].n == 2), .mark = m[k].mark,
                                           .n_marks = 3});
    }
}

EX_FUNC void experiment_collapse(exp_run *e) {
    static const char *const what[] = {"one-sided states exist from Ks on", "they lie as deep as balance at Kc",
                                       "balance is unstable from M on"};
    static const char *const name[] = {"one-sided", "equal-depth", "unstable"};
    size_t steps = exp_size(e, e->steps, 100000, 1000000);
    double width = e->quick ? 2e-3 : 1e-4, tolerance = 0.005, predicted[6], found[6], worst;
    static collapse_map map[2];
    exp_table t = exp_table_begin("Thresholds of the feedback Kf");
    memset(map, 0, sizeof map);
    map[0].n = 2, map[1].n = 8;
    exp_row(&t, "<threshold|experts|predicted|measured|away");
    for (int k = 0; k < 2; k++) {
        collapse_fill(e, &map[k], steps, width);
        for (int i = 0; i < 3; i++) {
            predicted[3 * k + i] = map[k].mark[i], found[3 * k + i] = map[k].found[i];
            if (isnan(map[k].mark[i])) continue;
            struct json *j = exp_line(e, "threshold");
            json_text(j, "kind", name[i]);
            json_whole(j, "experts", map[k].n);
            json_real(j, "predicted", map[k].mark[i]);
            json_real(j, "measured", map[k].found[i]);
            json_end(j);
            exp_row(&t, "%s|%zu|%.4f|%.4f|%.2f%%", what[i], map[k].n, map[k].mark[i], map[k].found[i],
                    100 * fabs(map[k].found[i] / map[k].mark[i] - 1));
        }
    }
    exp_picture(e, "The collapse map", 960, 330, collapse_draw, map);
    exp_table_end(e, &t);
    exp_verdict v = exp_near(6, found, predicted, tolerance, &worst);
    exp_claim(e, "thresholds of the minimal dynamics", "2; Ks, Kc, M of M = 8", v, "worst %.2f%% away", 100 * worst);
    exp_final(e, v,
              "for 2 and 8 experts the minimal dynamics collapse where predicted, the farthest of four thresholds "
              "%.2f%% away (allowed %.1f%%)", 100 * worst, 100 * tolerance);
}

#endif

/* pipeline.h - the whole pipeline, every stage and every loss that a layer adds, in plain double loops. What is
 * discrete (choices, drops, codes) and what is random (noise, jitter) is read from the library's tape and held
 * constant; where a source gives a surrogate gradient (straight-through, SparseMixer), the surrogate is what is
 * computed here: its value is the forward's and its slope the surrogate's. Gradients are central differences of
 * pipeline_objective, so nothing of the library's backward pass is repeated. Include test.h and oracle.h first. */
#ifndef PIPELINE_H
#define PIPELINE_H

#include "inside.h"

enum { PIPELINE_TENSORS = 24 };
typedef struct pipeline {
    moe_layer *m;
    const moe_tape *t;
    inside in;
    moe_desc d;
    size_t T, E, F, S, N, L, seq;
    size_t n_tensors;
    moe_tensor info[PIPELINE_TENSORS];
    double *v[PIPELINE_TENSORS];
    double *x, *dy, *y, *jitter;
    double loss[MOE_LOSS_COUNT];
    int recorded;             /* 0: this pass records what stands behind stop-gradient */
    double *stop, *stop_x;    /* (T * S * 2) per choice; (T, d) */
    double inv_t;
} pipeline;

static inline double *pipeline_tensor(const pipeline *o, const char *name) {
    for (size_t i = 0; i < o->n_tensors; i++)
        if (!strcmp(o->info[i].name, name)) return o->v[i];
    return NULL;
}

/* After a forward of m on x (T, d): reads everything. */
static inline pipeline *pipeline_new(moe_layer *m, const float *x, const float *dy, size_t T) {
    pipeline *o = (pipeline *)test_memory(1, sizeof *o);
    o->m = m, o->t = moe_layer_tape(m), o->in = inside_of(o->t), o->d = *moe_layer_desc(m), o->T = T;
    o->E = o->d.n_experts, o->F = o->E - o->d.n_zero - o->d.n_copy - o->d.n_constant, o->S = o->t->n_slots;
    o->N = o->E * o->d.soft_slots, o->seq = o->d.sequence ? o->d.sequence : T;
    o->n_tensors = moe_layer_tensors(m);
    for (size_t i = 0; i < o->n_tensors; i++) {
        CHECK_OK(moe_layer_tensor(m, i, &o->info[i]));
        float *f = test_floats(o->info[i].count);
        CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, o->info[i].name, f, o->info[i].count));
        o->v[i] = test_doubles(o->info[i].count);
        for (size_t j = 0; j < o->info[i].count; j++) o->v[i][j] = f[j];
        free(f);
    }
    size_t n = T * o->d.d_model;
    o->x = test_doubles(n), o->dy = test_doubles(n), o->y = test_doubles(n), o->jitter = test_doubles(n);
    o->stop = test_doubles(T * o->S * 2), o->stop_x = test_doubles(n);
    for (size_t i = 0; i < n; i++) o->x[i] = x[i], o->dy[i] = dy[i], o->jitter[i] = 1;
    if (o->d.jitter > 0 && o->in.training) { /* the same numbers as the library draws */
        float *u = test_floats(n);
        CHECK(inside_jitter(o->t, n, 1 - o->d.jitter, 1 + o->d.jitter, u));
        for (size_t i = 0; i < n; i++) o->jitter[i] = u[i];
        free(u);
    }
    return o;
}
static inline void pipeline_free(pipeline *o) {
    for (size_t i = 0; i < o->n_tensors; i++) free(o->v[i]);
    free(o->x), free(o->dy), free(o->y), free(o->jitter), free(o->stop), free(o->stop_x), free(o);
}

static inline double pl_dot(size_t n, const double *a, const double *b) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
static inline void pl_unit(size_t n, double *v) {
    double length = sqrt(pl_dot(n, v, v));
    for (size_t i = 0; i < n; i++) v[i] = length > 0 ? v[i] / length : 0;
}
static inline void pl_ln(size_t n, double *v) {
    double mean = 0;
    for (size_t i = 0; i < n; i++) mean += v[i] / (double)n;
    for (size_t i = 0; i < n; i++) v[i] -= mean;
    double deviation = sqrt(pl_dot(n, v, v) / (double)n);
    for (size_t i = 0; i < n; i++) v[i] = deviation > 0 ? v[i] / deviation : 0;
}

/* logits without noise, z (N), of one token's view xr (d) */
static inline void pl_score(const pipeline *o, size_t t, const double *xr, double *z) {
    size_t d = o->d.d_model, N = o->N, h = o->d.d_router, L = d;
    const double *R = pipeline_tensor(o, "router"), *W = pipeline_tensor(o, "router.proj"),
                 *b = pipeline_tensor(o, "router.proj_bias");
    const double *c = pipeline_tensor(o, "router.bias"), *V = pipeline_tensor(o, "experts.w1");
    moe_score_kind kind = o->d.score;
    double *u = test_doubles(d > h ? d : h), *col = test_doubles(d > h ? d : h), *in = test_doubles(d);
    memcpy(in, xr, d * sizeof *in);
    if (kind == MOE_SCORE_SLICE)
        for (size_t e = 0; e < N; e++) {
            z[e] = 0;
            for (size_t i = 0; i < d / N; i++) z[e] += xr[e * (d / N) + i] / (double)(d / N);
        }
    else if (kind == MOE_SCORE_SUBSPACE)
        for (size_t e = 0; e < N; e++) {
            double sum = 0;
            for (size_t k = 0; k < o->d.d_ff; k++) {
                double p = 0;
                for (size_t i = 0; i < d; i++) p += xr[i] * V[(e * d + i) * o->d.d_ff + k];
                sum += p * p;
            }
            z[e] = sqrt(sum) / sqrt(pl_dot(d, xr, xr));
        }
    else if (kind == MOE_SCORE_HASH || kind == MOE_SCORE_RANDOM)
        for (size_t e = 0; e < N; e++) z[e] = o->t->logits[t * N + e];
    else {
        if (kind == MOE_SCORE_PROTOTYPE) {
            pl_ln(d, in);
            for (size_t i = 0; i < d; i++) in[i] *= oracle_sigmoid(in[i]);
        }
        if (kind == MOE_SCORE_MLP || kind == MOE_SCORE_TANH || kind == MOE_SCORE_PROJECTED ||
            kind == MOE_SCORE_PROTOTYPE || kind == MOE_SCORE_HALF_COSINE) {
            L = h;
            for (size_t k = 0; k < h; k++) {
                u[k] = b ? b[k] : 0;
                for (size_t i = 0; i < d; i++) u[k] += in[i] * W[i * h + k];
                if (kind == MOE_SCORE_MLP && u[k] < 0) u[k] = 0;
                if (kind == MOE_SCORE_TANH) u[k] = tanh(u[k]);
            }
        } else memcpy(u, in, d * sizeof *u);
        if (kind == MOE_SCORE_COSINE || kind == MOE_SCORE_PROJECTED || kind == MOE_SCORE_PROTOTYPE) pl_unit(L, u);
        if (kind == MOE_SCORE_NORMED) pl_ln(L, u);
        for (size_t e = 0; e < N; e++) {
            for (size_t i = 0; i < L; i++) col[i] = R[i * N + e];
            if (kind == MOE_SCORE_NORMED) pl_ln(L, col);
            else if (kind != MOE_SCORE_LINEAR && kind != MOE_SCORE_MLP && kind != MOE_SCORE_TANH) pl_unit(L, col);
            z[e] = pl_dot(L, u, col) + (c ? c[e] : 0);
        }
    }
    free(u), free(col), free(in);
}

/* what the experts see of x (d) */
static inline const double *pl_view(const pipeline *o, const double *x) {
    static double seen[4][256];
    static int at;
    size_t d = o->d.d_model;
    double mean = 0, square = 0, *v = seen[at++ % 4];
    for (size_t i = 0; i < d; i++) mean += o->d.expert_norm == MOE_ON ? x[i] / (double)d : 0;
    for (size_t i = 0; i < d; i++) square += (x[i] - mean) * (x[i] - mean) / (double)d;
    double scale = o->d.expert_norm == MOE_ON ? 1 / sqrt(square + 1e-5) : 1;
    for (size_t i = 0; i < d; i++) v[i] = (x[i] - mean) * scale * (double)o->d.input_scale;
    return v;
}
/* out (d) = expert `e` with parameters at the given tensors (one expert's) */
static inline void pl_network(const pipeline *o, const double *w1, const double *wu, const double *w2, const double *b1,
                              const double *bu, const double *b2, const double *x, double *out) {
    size_t d = o->d.d_model, f = o->d.d_ff;
    for (size_t i = 0; i < d; i++) out[i] = b2 ? b2[i] : 0;
    for (size_t k = 0; k < f; k++) {
        double z = b1 ? b1[k] : 0, u = bu ? bu[k] : 0, slope, h;
        for (size_t i = 0; i < d; i++) z += x[i] * w1[i * f + k];
        for (size_t i = 0; wu && i < d; i++) u += x[i] * wu[i * f + k];
        h = o->d.expert == MOE_EXPERT_ORTHONORMAL ? z : oracle_act(o->d.expert, z, &slope);
        if (o->d.expert == MOE_EXPERT_SWIGLU_CLAMPED) u = 1 + fmax(-7, fmin(7, u));
        if (wu) h *= u;
        for (size_t i = 0; i < d; i++) out[i] += h * w2[k * d + i];
    }
}
static const char *const pl_names[] = {"experts.w1", "experts.wu", "experts.w2",
                                       "experts.b1", "experts.bu", "experts.b2"};
static inline size_t pl_size(const pipeline *o, int k) {
    return k < 3 ? o->d.d_model * o->d.d_ff : k < 5 ? o->d.d_ff : o->d.d_model;
}
static inline void pl_expert(const pipeline *o, size_t e, const double *x, double *out) {
    const double *p[6];
    size_t d = o->d.d_model;
    if (e >= o->F && e < o->E) { /* no network */
        size_t i = e - o->F, c = i - o->d.n_zero - o->d.n_copy;
        for (size_t k = 0; k < d; k++) out[k] = i < o->d.n_zero ? 0 : x[k];
        if (i < o->d.n_zero + o->d.n_copy) return;
        const double *g = pipeline_tensor(o, "experts.constant_gate") + c * 2 * d,
                     *v = pipeline_tensor(o, "experts.constant") + c * d;
        double z[2] = {pl_dot(d, g, x), pl_dot(d, g + d, x)}, a[2];
        oracle_softmax(2, z, 1, a);
        for (size_t k = 0; k < d; k++) out[k] = a[0] * x[k] + a[1] * v[k];
        return;
    }
    size_t block = e < o->F ? e : e - o->E + o->F;
    for (int k = 0; k < 6; k++) {
        p[k] = pipeline_tensor(o, pl_names[k]);
        if (p[k]) p[k] += block * pl_size(o, k);
    }
    pl_network(o, p[0], p[1], p[2], p[3], p[4], p[5], x, out);
}

static inline int pl_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static inline double pl_median(size_t n, double *v) {
    qsort(v, n, sizeof *v, pl_compare);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}
/* reliability of n outputs (n, d) */
static inline void pl_reliability(size_t n, size_t d, const double *out, double tau, double *r) {
    double *col = test_doubles(n), *median = test_doubles(d), *far = test_doubles(n);
    for (size_t i = 0; i < d; i++) {
        for (size_t e = 0; e < n; e++) col[e] = out[e * d + i];
        median[i] = pl_median(n, col);
    }
    for (size_t e = 0; e < n; e++) {
        for (size_t i = 0; i < d; i++) far[e] += (out[e * d + i] - median[i]) * (out[e * d + i] - median[i]);
        far[e] = col[e] = sqrt(far[e]);
    }
    double mad = pl_median(n, col);
    for (size_t e = 0; e < n; e++) r[e] = mad > 0 ? exp(-far[e] / (tau * mad)) : far[e] == 0;
    free(col), free(median), free(far);
}

/* -- the losses -- */
/* (T, E) or (T, S) or (T, S, d) */
typedef struct pl_batch { double *z, *clean, *std, *prob, *score, *w, *outputs; } pl_batch;
/* E sum f mean q */
static inline double pl_shares(const pipeline *o, size_t t0, size_t t1, const double *q, const double *f) {
    double sum = 0;
    for (size_t t = t0; t < t1; t++)
        for (size_t e = 0; e < o->E; e++) sum += (double)o->E * f[e] * q[t * o->E + e] / (double)(t1 - t0);
    return sum;
}
static inline double pl_loss(const pipeline *o, int kind, const pl_batch *b) {
    size_t T = o->T, E = o->E, S = o->S, d = o->d.d_model, P = o->d.n_ranks, k = o->in.k;
    const int32_t *index = o->t->index;
    const double *R = pipeline_tensor(o, "router");
    size_t L = pipeline_tensor(o, "router.proj") ? o->d.d_router : d;
    double *f = test_doubles(E), *mean = test_doubles(E), *n = test_doubles(E), total = 0, v = 0;
    for (size_t p = 0; p < T * S; p++)
        if (index[p] >= 0) n[index[p]]++, total++;
    for (size_t e = 0; e < E; e++) f[e] = total > 0 ? n[e] / total : 0;
    for (size_t i = 0; i < T * E; i++) mean[i % E] += b->prob[i] / (double)T;
    double entropy = 0;
    for (size_t i = 0; i < T * E; i++) entropy -= b->prob[i] * log(b->prob[i]) / (double)T;
    switch (kind) {
    case MOE_LOSS_SWITCH:
        for (size_t p = 0; o->d.switch_load == MOE_LOAD_FIRST && p < E; p++) f[p] = 0;
        for (size_t p = 0; o->d.switch_load == MOE_LOAD_FIRST && p < T * S; p += S)
            if (index[p] >= 0) f[index[p]] += 1.0 / (double)T;
        for (size_t e = 0; o->d.switch_load == MOE_LOAD_TOKENS && e < E; e++) f[e] = n[e] / (double)T;
        v = pl_shares(o, 0, T, b->prob, f);
        break;
    case MOE_LOSS_Z:
        for (size_t t = 0; t < T; t++) {
            double lse = oracle_softmax(E, b->z + t * E, 1, n);
            v += lse * lse / (double)T;
        }
        break;
    case MOE_LOSS_IMPORTANCE_SELECTED:
    case MOE_LOSS_LOAD:
        memset(mean, 0, E * sizeof *mean);
        if (kind == MOE_LOSS_IMPORTANCE_SELECTED)
            for (size_t p = 0; p < T * S; p++) mean[index[p] < 0 ? 0 : (size_t)index[p]] += index[p] < 0 ? 0 : b->w[p];
        else
            for (size_t t = 0; t < T; t++)
                /* the threshold: the k-th highest noisy logit of the others, which moves with it */
                for (size_t e = 0; e < E; e++) {
                    double *other = test_doubles(E);
                    size_t m = 0;
                    for (size_t i = 0; i < E; i++)
                        if (i != e) other[m++] = b->z[t * E + i];
                    qsort(other, m, sizeof *other, pl_compare);
                    mean[e] += 0.5 * erfc(-(b->clean[t * E + e] - other[m - k]) / b->std[t * E + e] / sqrt(2));
                    free(other);
                }
        {
            double mu = 0, var = 0;
            for (size_t e = 0; e < E; e++) mu += mean[e] / (double)E;
            for (size_t e = 0; e < E; e++) var += (mean[e] - mu) * (mean[e] - mu) / (double)E;
            v = var / (mu * mu);
        }
        break;
    case MOE_LOSS_ENTROPY: v = -entropy; break;
    case MOE_LOSS_CERTAINTY: v = entropy; break;
    case MOE_LOSS_KL_UNIFORM:
        for (size_t e = 0; e < E; e++) v += mean[e] * log(mean[e] * (double)E);
        break;
    case MOE_LOSS_SEQUENCE:
        for (size_t t0 = 0; t0 < T; t0 += o->seq) {
            size_t t1 = t0 + o->seq < T ? t0 + o->seq : T;
            double *q = test_doubles(T * E);
            total = 0, memset(f, 0, E * sizeof *f);
            for (size_t p = t0 * S; p < t1 * S; p++)
                if (index[p] >= 0) f[index[p]]++, total++;
            for (size_t e = 0; e < E; e++) f[e] = total > 0 ? f[e] / total : 0;
            for (size_t t = t0; t < t1; t++) {
                double sum = 0;
                for (size_t e = 0; e < E; e++) sum += b->score[t * E + e];
                for (size_t e = 0; e < E; e++) q[t * E + e] = b->score[t * E + e] / sum;
            }
            v += pl_shares(o, t0, t1, q, f) / (double)((T + o->seq - 1) / o->seq);
            free(q);
        }
        break;
    case MOE_LOSS_RANK:
        for (size_t r = 0; r < P; r++) {
            double F = 0, q = 0;
            for (size_t e = r * E / P; e < (r + 1) * E / P; e++) F += (double)E * f[e] / (double)(E / P), q += mean[e];
            v += F * q;
        }
        break;
    case MOE_LOSS_LOCALITY: {
        double used = 0, sum = 0;
        for (size_t home = 0; home < P; home++) {
            double *q = test_doubles(P), count = 0;
            for (size_t t = 0; t < T; t++)
                if (t * P / T == home) {
                    count++;
                    for (size_t e = 0; e < E; e++) q[e / (E / P)] += b->prob[t * E + e];
                }
            for (size_t r = 0; r < P && count > 0; r++)
                sum += q[r] / count * log(q[r] / count / (r == home ? 0.99 : 0.01 / (double)(P - 1)));
            used += count > 0;
            free(q);
        }
        v = sum / used;
        break;
    }
    case MOE_LOSS_RELU_L1:
        for (size_t i = 0; i < T * E; i++)
            v += (double)E * n[i % E] / (double)(k * T) * fmax(0, b->score[i]) / (double)T;
        break;
    case MOE_LOSS_ORACLE:
        for (size_t t = 0; t < T; t++) v -= log(b->prob[t * E + (size_t)o->t->side.teacher[t]]) / (double)T;
        break;
    case MOE_LOSS_PROTOTYPE_ALIGNMENT:
        for (size_t p = 0; p < T * S; p++)
            if (index[p] >= 0) v += (1 - b->z[p / S * E + (size_t)index[p]]) / total;
        break;
    case MOE_LOSS_OUTPUT_ORTHOGONALITY:
        for (size_t t = 0; t < T; t++)
            for (size_t i = 0; i < S; i++)
                for (size_t l = 0; l < S; l++) {
                    const double *a = b->outputs + (t * S + i) * d, *c = b->outputs + (t * S + l) * d;
                    if (i != l && o->t->routes.slot[t * S + i] != MOE_NONE && o->t->routes.slot[t * S + l] != MOE_NONE)
                        v += pow(pl_dot(d, a, c), 2) / pl_dot(d, c, c) / (double)T;
                }
        break;
    case MOE_LOSS_ORTHONORMAL: {
        const double *V = pipeline_tensor(o, "experts.w1");
        for (size_t e = 0; e < o->F; e++)
            for (size_t i = 0; i < o->d.d_ff; i++)
                for (size_t j = 0; j < o->d.d_ff; j++) {
                    double dot = -(double)(i == j);
                    for (size_t c = 0; c < d; c++)
                        dot += V[(e * d + c) * o->d.d_ff + i] * V[(e * d + c) * o->d.d_ff + j];
                    v += dot * dot;
                }
        break;
    }
    case MOE_LOSS_CODEBOOK: { /* the codes' part and the tokens' part, each with the other constant */
        const double *C = pipeline_tensor(o, "router.codebook");
        for (size_t t = 0; t < T; t++) {
            const float *code = o->in.code_x + t * d; /* the token as it was */
            size_t j = (size_t)o->in.code[t];
            float *before = test_floats(o->d.n_codes * d);
            CHECK_OK(moe_layer_get(o->m, MOE_PART_PARAMS, "router.codebook", before, o->d.n_codes * d));
            for (size_t i = 0; i < d; i++) {
                double to_x = C[j * d + i] - (double)code[i], to_c = (double)before[j * d + i] - o->x[t * d + i];
                v += (to_x * to_x + 0.25 * to_c * to_c) / (double)(T * d);
            }
            free(before);
        }
        break;
    }
    case MOE_LOSS_SIMBAL:
    case MOE_LOSS_DIVERSE_SIMPLE:
    case MOE_LOSS_PROTOTYPE_ORTHOGONALITY:
    case MOE_LOSS_PROTOTYPE_DIVERSITY: {
        double squares = 0, norms = 0;
        for (size_t i = 0; i < E; i++)
            for (size_t j = 0; j < E; j++) {
                double dot = 0, ii = 0, jj = 0;
                for (size_t c = 0; c < L; c++)
                    dot += R[c * E + i] * R[c * E + j], ii += R[c * E + i] * R[c * E + i],
                        jj += R[c * E + j] * R[c * E + j];
                double off = dot - (i == j), angle = dot / sqrt(ii * jj);
                if (kind == MOE_LOSS_SIMBAL) v += fabs(off);
                if (kind == MOE_LOSS_PROTOTYPE_ORTHOGONALITY) v += (angle - (i == j)) * (angle - (i == j));
                if (kind == MOE_LOSS_PROTOTYPE_DIVERSITY && i != j) v += exp(2 * angle - 2) / (double)(E * (E - 1));
                squares += (angle - (i == j)) * (angle - (i == j));
                if (i == j) norms += sqrt(ii) / (double)E;
            }
        if (kind == MOE_LOSS_DIVERSE_SIMPLE) v = sqrt(squares) + norms;
        break;
    }
    default: CHECK(0);
    }
    free(f), free(mean), free(n);
    return v;
}

/* y and the losses; returns sum dy y + sum coefficient loss */
static inline double pipeline_objective(pipeline *o) {
    size_t T = o->T, E = o->E, S = o->S, d = o->d.d_model, N = o->N;
    const moe_tape *t = o->t;
    const double *Wn = pipeline_tensor(o, "router.noise"), *G = pipeline_tensor(o, "router.threshold"),
                 *A = pipeline_tensor(o, "router.residual");
    const double *log_scale = pipeline_tensor(o, "router.log_scale");
    double *z = test_doubles(T * N), *clean = test_doubles(T * E), *std = test_doubles(T * E),
           *prob = test_doubles(T * E), *score = test_doubles(T * E);
    double *w = test_doubles(T * S), *out = test_doubles(T * S * d), *one = test_doubles(d), *xr = test_doubles(T * d);
    double tau = (double)o->in.prob_t, inv_t = log_scale ? exp(fmin(*log_scale, 20)) : 1 / tau, objective = 0;
    int training = o->in.training, soft = o->d.combine == MOE_COMBINE_SOFT;
    for (size_t i = 0; i < T; i++)
        for (size_t c = 0; c < d; c++) {
            size_t t0 = i / o->seq * o->seq, t1 = t0 + o->seq < T ? t0 + o->seq : T;
            if (o->d.route_sequence != MOE_ON) xr[i * d + c] = o->x[i * d + c] * o->jitter[i * d + c];
            else
                for (size_t l = t0; l < t1; l++)
                    xr[i * d + c] += o->x[l * d + c] / (double)(t1 - t0) * o->jitter[i / o->seq * d + c];
        }
    for (size_t i = 0; i < T; i++) {
        pl_score(o, i, xr + i * d, z + i * N);
        if (soft) continue;
        for (size_t e = 0; e < E; e++) {
            double *v = &z[i * E + e], raw = 0;
            for (size_t c = 0; A && t->side.previous && c < E; c++)
                *v += (double)t->side.previous[i * E + c] * A[c * E + e];
            clean[i * E + e] = *v;
            std[i * E + e] = o->d.noise == MOE_NOISE_NONE ? 0 : (double)o->d.noise_std;
            if (Wn) {
                for (size_t c = 0; c < d; c++) raw += xr[i * d + c] * Wn[c * E + e];
                std[i * E + e] = log(1 + exp(raw)) + 0.01;
            }
            if (o->d.noise != MOE_NOISE_NONE && training)
                *v += std[i * E + e] * (double)o->in.noise[i * E + e];
            if (o->d.score == MOE_SCORE_SLICE && *v < 0) *v = 0;
        }
        oracle_softmax(E, z + i * E, tau, prob + i * E);
        for (size_t e = 0; e < E; e++) score[i * E + e] = z[i * E + e] * inv_t;
        if (o->d.gate == MOE_GATE_SOFTMAX) oracle_softmax(E, score + i * E, 1, score + i * E);
        else if (o->d.gate == MOE_GATE_RELU)
            for (size_t e = 0; e < E; e++) score[i * E + e] = fmax(0, z[i * E + e]);
        else if (o->d.gate == MOE_GATE_SIGMOID || o->d.gate == MOE_GATE_SIGN)
            for (size_t e = 0; e < E; e++) score[i * E + e] = oracle_sigmoid(score[i * E + e]);
        /* the weights of the choices */
        int normal = o->d.normalize == MOE_ON && o->d.gate != MOE_GATE_SOFTMAX_SELECTED && o->d.gate != MOE_GATE_SIGN &&
                     o->d.gate != MOE_GATE_SPARSEMIXER;
        int second = training && o->d.random_second == MOE_ON && !(normal && o->d.normalize_late == MOE_ON);
        const int32_t *index = (second ? o->in.before : t->index) + i * S; /* those that share the weight */
        double *wi = w + i * S, sum = 0, n = 0;
        for (size_t s = 0; s < S; s++) n += index[s] >= 0;
        for (size_t s = 0; s < S; s++) {
            if (index[s] < 0) continue;
            size_t e = (size_t)index[s], at = (i * S + s) * 2;
            wi[s] = score[i * E + e];
            if (o->d.gate == MOE_GATE_SOFTMAX_SELECTED) {
                double all = 0;
                for (size_t l = 0; l < S; l++)
                    if (index[l] >= 0) all += exp((z[i * E + (size_t)index[l]] - z[i * E + e]) * inv_t);
                wi[s] = 1 / all;
            }
            if (o->d.gate == MOE_GATE_SIGN) { /* value 1 / n, slope of sigmoid(z) - sigmoid(threshold) */
                double a = score[i * E + e] - oracle_sigmoid(G[e] * inv_t);
                if (!o->recorded) o->stop[at] = a;
                wi[s] = (1 + a - o->stop[at]) / n;
            }
            if (o->d.gate == MOE_GATE_SPARSEMIXER) { /* value p or p / 3, slope of p among the same experts */
                double top = -INFINITY, all = 0;
                char *in = (char *)test_memory(E, 1);
                for (size_t c = 0; c < E; c++) {
                    in[c] = 1;
                    for (size_t l = 0; l < s; l++) in[c] = in[c] && index[l] != (int32_t)c;
                    if (in[c]) top = fmax(top, (double)t->logits[i * E + c]);
                }
                for (size_t c = 0; c < E; c++) {
                    double v = t->logits[i * E + c];
                    in[c] = in[c] && !((top - v) / fmax(fabs(v), top) > 2 * (double)o->d.mask_jitter);
                    if (in[c]) all += exp((z[i * E + c] - z[i * E + e]) * inv_t);
                }
                double p = 1 / all;
                if (!o->recorded)
                    o->stop[at] = p, o->stop[at + 1] = (double)t->weight[i * S + s] / p > 0.6 ? 1 : 1 / 3.0;
                wi[s] = o->stop[at + 1] * o->stop[at] + p - o->stop[at];
                free(in);
            }
            if (e >= o->F && e < o->F + o->d.n_zero) wi[s] = 0;
            sum += wi[s];
        }
        for (size_t s = 0; s < S; s++) wi[s] = (normal && sum > 0 ? wi[s] / sum : wi[s]) * (double)o->d.weight_scale;
        for (size_t s = 0; s < S; s++) wi[s] *= t->index[i * S + s] >= 0; /* some were taken away */
    }
    memset(o->y, 0, T * d * sizeof(double));
    size_t shared = o->d.n_shared;
    for (size_t i = 0; i < T; i++)
        for (size_t g = 0; g < shared; g++) {
            const double *gate = pipeline_tensor(o, "experts.shared_gate");
            double weight = gate ? oracle_sigmoid(pl_dot(d, pl_view(o, o->x + i * d), gate)) : 1;
            pl_expert(o, E + g, pl_view(o, o->x + i * d), one);
            for (size_t c = 0; c < d; c++) o->y[i * d + c] += weight * one[c];
        }
    if (soft) {
        size_t slots = N / E;
        for (size_t t0 = 0; t0 < T; t0 += o->seq) {
            size_t t1 = t0 + o->seq < T ? t0 + o->seq : T;
            for (size_t i = t0; i < t1; i++) { /* tape.logits, prob: of whole experts */
                for (size_t e = 0; e < E; e++) {
                    double all = 0;
                    for (size_t k = 0; k < slots; k++) all += exp(z[i * N + e * slots + k] * inv_t);
                    clean[i * E + e] = log(all) / inv_t;
                }
                oracle_softmax(E, clean + i * E, tau, prob + i * E);
            }
            for (size_t n = 0; n < N; n++) {
                double all = 0, *in = test_doubles(d);
                for (size_t i = t0; i < t1; i++) all += exp(z[i * N + n] * inv_t);
                for (size_t i = t0; i < t1; i++)
                    for (size_t c = 0; c < d; c++)
                        in[c] += exp(z[i * N + n] * inv_t) / all * pl_view(o, o->x + i * d)[c];
                pl_expert(o, n / slots, in, one);
                for (size_t i = t0; i < t1; i++) {
                    double row = 0;
                    for (size_t k = 0; k < N; k++) row += exp(z[i * N + k] * inv_t);
                    for (size_t c = 0; c < d; c++) o->y[i * d + c] += exp(z[i * N + n] * inv_t) / row * one[c];
                }
                free(in);
            }
        }
    } else if (o->d.combine == MOE_COMBINE_MERGE) {
        for (size_t t0 = 0; t0 < T; t0 += o->seq) {
            double *p[6] = {0};
            for (int k = 0; k < 6; k++) {
                const double *from = pipeline_tensor(o, pl_names[k]);
                if (!from) continue;
                p[k] = test_doubles(pl_size(o, k));
                for (size_t s = 0; s < S; s++)
                    for (size_t c = 0; t->index[t0 * S + s] >= 0 && c < pl_size(o, k); c++)
                        p[k][c] += w[t0 * S + s] * from[(size_t)t->index[t0 * S + s] * pl_size(o, k) + c];
            }
            for (size_t i = t0; i < T && i < t0 + o->seq; i++) {
                pl_network(o, p[0], p[1], p[2], p[3], p[4], p[5], pl_view(o, o->x + i * d), one);
                for (size_t c = 0; c < d; c++) o->y[i * d + c] += one[c];
            }
            for (int k = 0; k < 6; k++) free(p[k]);
        }
    } else
        for (size_t i = 0; i < T; i++) {
            double *r = test_doubles(S), *kept = test_doubles(S * d), sum = 0;
            size_t n = 0;
            for (size_t s = 0; s < S; s++) {
                if (t->index[i * S + s] < 0) continue;
                double *in = test_doubles(d), by = o->d.combine == MOE_COMBINE_INPUT ? w[i * S + s] : 1;
                for (size_t c = 0; c < d; c++) in[c] = by * pl_view(o, o->x + i * d)[c];
                pl_expert(o, (size_t)t->index[i * S + s], in, out + (i * S + s) * d);
                free(in);
                if (t->routes.slot[i * S + s] != MOE_NONE)
                    memcpy(kept + n++ * d, out + (i * S + s) * d, d * sizeof(double));
            }
            if (o->d.combine == MOE_COMBINE_ROBUST) {
                if (!o->recorded) pl_reliability(n, d, kept, (double)o->d.robust_tau, o->stop + i * S * 2);
                memcpy(r, o->stop + i * S * 2, n * sizeof *r);
            } else
                for (size_t s = 0; s < n; s++) r[s] = 1;
            for (size_t s = 0, l = 0; s < S; s++)
                if (t->routes.slot[i * S + s] != MOE_NONE) sum += w[i * S + s] * r[l++];
            for (size_t s = 0, l = 0; s < S; s++) {
                if (t->routes.slot[i * S + s] == MOE_NONE) continue;
                double weight = o->d.combine == MOE_COMBINE_ROBUST ? w[i * S + s] * r[l] / sum : w[i * S + s];
                if (o->d.combine == MOE_COMBINE_INPUT) weight = 1;
                for (size_t c = 0; c < d; c++) o->y[i * d + c] += weight * out[(i * S + s) * d + c];
                l++;
            }
            free(r), free(kept);
        }
    if (o->d.n_codes) { /* y = g_0 y + g_1 LN(f(LN(in))), in = q + x - sg x or (1 - c) x + c sg(q - x), q constant */
        const double *gate = pipeline_tensor(o, "router.branch");
        float *codes = test_floats(o->d.n_codes * d);
        double *q = test_doubles(d);
        CHECK_OK(moe_layer_get(o->m, MOE_PART_PARAMS, "router.codebook", codes, o->d.n_codes * d));
        for (size_t i = 0; i < T; i++) {
            size_t j = (size_t)o->in.code[i];
            double zg[2] = {0, 0}, g[2];
            for (size_t c = 0; c < d; c++) {
                if (!o->recorded) o->stop_x[i * d + c] = o->x[i * d + c];
                double share = (double)o->d.code_share, code = (double)codes[j * d + c], stop = o->stop_x[i * d + c];
                q[c] = code + o->x[i * d + c] - stop;
                if (share > 0) q[c] = (1 - share) * o->x[i * d + c] + share * (code - stop);
                zg[0] += o->x[i * d + c] * gate[c * 2], zg[1] += o->x[i * d + c] * gate[c * 2 + 1];
            }
            pl_ln(d, q);
            pl_expert(o, j % E, q, one);
            pl_ln(d, one);
            oracle_softmax(2, zg, 1, g);
            for (size_t c = 0; c < d; c++) o->y[i * d + c] = g[0] * o->y[i * d + c] + g[1] * one[c];
        }
        free(codes), free(q);
    }
    pl_batch b = {soft ? clean : z, clean, std, prob, score, w, out};
    if (o->d.gate == MOE_GATE_SOFTMAX || o->d.gate == MOE_GATE_SOFTMAX_SELECTED || o->d.gate == MOE_GATE_SPARSEMIXER)
        b.score = prob;
    for (size_t i = 0; i < T * d; i++) objective += o->dy[i] * o->y[i];
    for (int l = 0; l < MOE_LOSS_COUNT; l++) {
        o->loss[l] = o->d.loss[l] > 0 ? pl_loss(o, l, &b) : 0;
        if (o->d.loss[l] > 0) objective += (double)o->d.loss[l] * o->loss[l];
    }
    o->recorded = 1;
    free(z), free(clean), free(std), free(prob), free(score), free(w), free(out), free(one), free(xr);
    return objective;
}

static inline double pipeline_slope(pipeline *o, double *where, double h) {
    double keep = *where, up, down;
    *where = keep + h, up = pipeline_objective(o);
    *where = keep - h, down = pipeline_objective(o);
    *where = keep;
    return (up - down) / (2 * h);
}

#endif

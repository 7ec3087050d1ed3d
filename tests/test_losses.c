/* Every auxiliary loss against a naive double-precision value of its own: the value, and the gradient against central
 * differences of it with loads held constant; closed forms, invariances, loads and means of a larger batch, bad input,
 * the same bits on every instruction set, and the table in docs/math.md. */
#define MOE_IMPLEMENTATION
#include "test.h"

/* ---- one batch with everything that a loss can ask for ---- */
enum { Z, S, STD, THR, W, R, X, LV, O, C, V, VARS }; /* what a gradient can be by */

typedef struct batch {
    size_t T, E, k, d, D, home, sequence, n_codes, rows, counted;
    double tau;
    size_t n[VARS];
    float *f[VARS];       /* what the library reads */
    double *x[VARS];      /* what the oracle reads: the same, moved by the finite differences */
    const double *x0[VARS]; /* the same, not moved: for what stands behind a stopped gradient */
    float *prob;          /* softmax(f[Z] / tau) */
    int32_t *index, *teacher, *code;
    uint64_t *load, *sequence_load, *device_load, *device_tokens;
    double *mean_prob, *mean_scores, *mean_weights, *mean_selection, *device_prob;
} batch;

static void batch_shape(batch *b) {
    size_t n[VARS];
    n[Z] = n[S] = n[STD] = n[THR] = b->T * b->E;
    n[W] = b->T * b->k, n[R] = b->d * b->E, n[X] = n[LV] = b->T * b->d, n[O] = b->T * b->k * b->d;
    n[C] = b->n_codes * b->d, n[V] = b->rows * b->E;
    memcpy(b->n, n, sizeof n);
}

/* What follows from the floats and the choices. */
static void batch_statistics(batch *b) {
    CHECK_OK(moe_softmax(b->T, b->E, (float)b->tau, b->f[Z], b->prob));
    CHECK_OK(moe_mean_scores(b->T, b->E, b->prob, b->mean_prob));
    CHECK_OK(moe_mean_scores(b->T, b->E, b->f[S], b->mean_scores));
    CHECK_OK(moe_mean_weights(b->T, b->k, b->E, b->index, b->f[W], b->mean_weights));
    CHECK_OK(moe_mean_selection(b->T, b->E, b->f[Z], b->f[STD], b->f[THR], b->mean_selection));
    CHECK_OK(moe_sequence_load(b->T, b->E, b->k, b->sequence, b->index, b->sequence_load));
    CHECK_OK(moe_device_load(b->E, b->D, b->load, b->device_load));
    CHECK_OK(moe_device_tokens(b->T, b->E, b->D, b->k, b->index, b->device_tokens));
    CHECK_OK(moe_device_prob(b->E, b->D, b->mean_prob, b->device_prob));
    for (int v = 0; v < VARS; v++)
        for (size_t i = 0; i < b->n[v]; i++) b->x[v][i] = (double)b->f[v][i];
}

static batch batch_new(size_t T, size_t E, size_t k, size_t d, size_t D, size_t sequence, double tau) {
    batch b;
    memset(&b, 0, sizeof b);
    b.T = T, b.E = E, b.k = k, b.d = d, b.D = D, b.home = D / 2, b.sequence = sequence, b.tau = tau, b.n_codes = 3, b.rows = d + 1;
    b.counted = T + 5; /* loads of more than this batch */
    batch_shape(&b);
    for (int v = 0; v < VARS; v++) b.f[v] = test_floats(b.n[v]), b.x[v] = test_doubles(b.n[v]), b.x0[v] = test_doubles(b.n[v]);
    b.prob = test_floats(T * E);
    b.index = (int32_t *)test_memory(T * k, sizeof *b.index), b.teacher = (int32_t *)test_memory(T, sizeof *b.teacher);
    b.code = (int32_t *)test_memory(T, sizeof *b.code);
    b.load = (uint64_t *)test_memory(E, sizeof *b.load), b.device_load = (uint64_t *)test_memory(D, sizeof *b.load);
    b.sequence_load = (uint64_t *)test_memory((T / sequence + 1) * E, sizeof *b.load);
    b.device_tokens = (uint64_t *)test_memory(D, sizeof *b.load);
    b.mean_prob = test_doubles(E), b.mean_scores = test_doubles(E), b.mean_weights = test_doubles(E);
    b.mean_selection = test_doubles(E), b.device_prob = test_doubles(D);
    for (int v = 0; v < VARS; v++) test_fill(b.f[v], b.n[v], -1.5f, 1.5f);
    test_fill(b.f[S], b.n[S], -0.5f, 1); /* as of a ReLU gate */
    for (size_t i = 0; i < b.n[S]; i++) b.f[S][i] = b.f[S][i] > 0.05f ? b.f[S][i] : 0;
    test_fill(b.f[STD], b.n[STD], 0.3f, 1.5f);
    test_fill(b.f[W], b.n[W], 0.05f, 1);
    for (size_t t = 0; t < T; t++) {
        b.f[S][t * E + test_below(E)] = 0.75f; /* some score for each token */
        for (size_t i = 0; i < k; i++) { /* k different ones */
            int32_t e = (int32_t)((test_below(2) ? test_below(E) : 0) % E);
            for (size_t j = 0; j < i; j++)
                if (b.index[t * k + j] == e) e = (int32_t)((size_t)(e + 1) % E), j = (size_t)-1;
            b.index[t * k + i] = e;
        }
        if (k > 1 && test_below(4) == 0) b.index[t * k + k - 1] = -1;
        b.teacher[t] = test_below(4) || t == 0 ? (int32_t)test_below(E) : -1;
        b.code[t] = test_below(4) || t == 0 ? (int32_t)test_below(b.n_codes) : -1;
        for (size_t i = 0; i < k; i++)
            if (b.index[t * k + i] >= 0) b.load[b.index[t * k + i]]++;
    }
    for (size_t i = 0; i < 5 * k; i++) b.load[test_below(E)]++; /* of other micro-batches */
    batch_statistics(&b);
    for (int v = 0; v < VARS; v++) memcpy((double *)(uintptr_t)b.x0[v], b.x[v], b.n[v] * sizeof(double));
    return b;
}

static void batch_free(batch *b) {
    for (int v = 0; v < VARS; v++) free(b->f[v]), free(b->x[v]), free((void *)(uintptr_t)b->x0[v]);
    free(b->prob), free(b->index), free(b->teacher), free(b->code), free(b->load), free(b->sequence_load), free(b->device_load);
    free(b->device_tokens), free(b->mean_prob), free(b->mean_scores), free(b->mean_weights), free(b->mean_selection), free(b->device_prob);
}

/* ---- the oracles: as the formulas are written ---- */
static double p_of(const batch *b, size_t t, size_t e) {
    double sum = 0;
    for (size_t j = 0; j < b->E; j++) sum += exp((b->x[Z][t * b->E + j] - b->x[Z][t * b->E + e]) / b->tau);
    return 1 / sum;
}
static double P_of(const batch *b, size_t e) {
    double sum = 0;
    for (size_t t = 0; t < b->T; t++) sum += p_of(b, t, e);
    return sum / (double)b->T;
}
static double token_entropy(const batch *b) { /* mean_t S_t */
    double sum = 0;
    for (size_t t = 0; t < b->T; t++)
        for (size_t e = 0; e < b->E; e++) sum -= p_of(b, t, e) * log(p_of(b, t, e)) / (double)b->T;
    return sum;
}
static double cv2(size_t n, const double *v) {
    double mean = 0, var = 0;
    for (size_t i = 0; i < n; i++) mean += v[i] / (double)n;
    for (size_t i = 0; i < n; i++) var += (v[i] - mean) * (v[i] - mean) / (double)n;
    return var / (mean * mean);
}
static double total_load(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += (double)b->load[e];
    return sum;
}
static double want_switch(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += (double)b->E * (double)b->load[e] / total_load(b) * P_of(b, e);
    return sum;
}
static double lse_of(const batch *b, size_t t) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += exp(b->x[Z][t * b->E + e]);
    return log(sum);
}
static double want_z(const batch *b) {
    double sum = 0;
    for (size_t t = 0; t < b->T; t++) sum += lse_of(b, t) * lse_of(b, t) / (double)b->T;
    return sum;
}
static double want_importance(const batch *b) {
    double P[64];
    for (size_t e = 0; e < b->E; e++) P[e] = P_of(b, e);
    return cv2(b->E, P);
}
static double want_importance_selected(const batch *b) {
    double I[64] = {0};
    for (size_t i = 0; i < b->T * b->k; i++)
        if (b->index[i] >= 0) I[b->index[i]] += b->x[W][i];
    return cv2(b->E, I);
}
static double want_load(const batch *b) {
    double I[64] = {0};
    for (size_t t = 0; t < b->T; t++)
        for (size_t e = 0; e < b->E; e++) {
            size_t i = t * b->E + e;
            I[e] += 0.5 * erfc(-(b->x[Z][i] - b->x[THR][i]) / b->x[STD][i] / sqrt(2.0));
        }
    return cv2(b->E, I);
}
static double want_entropy(const batch *b) { return -token_entropy(b); }
static double want_kl_uniform(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += P_of(b, e) * log(P_of(b, e) * (double)b->E);
    return sum;
}
static double want_kl_reverse(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += log(1 / (double)b->E / P_of(b, e)) / (double)b->E;
    return sum;
}
static double want_mutual_information(const batch *b) {
    double H = 0;
    for (size_t e = 0; e < b->E; e++) H -= P_of(b, e) * log(P_of(b, e));
    return -(H - token_entropy(b));
}
static double want_l2_uniform(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) sum += pow(P_of(b, e) - 1 / (double)b->E, 2);
    return sum;
}
static double want_sequence(const batch *b) {
    size_t n = (b->T + b->sequence - 1) / b->sequence;
    double sum = 0;
    for (size_t q = 0; q < n; q++) {
        size_t begin = q * b->sequence, end = begin + b->sequence < b->T ? begin + b->sequence : b->T;
        double counts = 0;
        for (size_t i = begin * b->k; i < end * b->k; i++) counts += b->index[i] >= 0;
        for (size_t e = 0; e < b->E; e++) {
            double f = 0, P = 0;
            for (size_t i = begin * b->k; i < end * b->k; i++) f += b->index[i] == (int32_t)e;
            for (size_t t = begin; t < end; t++) {
                double all = 0;
                for (size_t j = 0; j < b->E; j++) all += b->x[S][t * b->E + j];
                P += b->x[S][t * b->E + e] / all / (double)(end - begin);
            }
            sum += (double)b->E * f / counts * P / (double)n;
        }
    }
    return sum;
}
static double P_device(const batch *b, size_t d) {
    double sum = 0;
    for (size_t e = d * (b->E / b->D); e < (d + 1) * (b->E / b->D); e++) sum += P_of(b, e);
    return sum;
}
static double want_device(const batch *b) {
    double sum = 0, per = (double)(b->E / b->D);
    for (size_t d = 0; d < b->D; d++) {
        double F = 0;
        for (size_t e = d * (b->E / b->D); e < (d + 1) * (b->E / b->D); e++)
            F += (double)b->E * (double)b->load[e] / total_load(b) / per;
        sum += F * P_device(b, d);
    }
    return sum;
}
enum { LIMIT = 1 }; /* devices that a token may use */
static double want_communication(const batch *b) {
    double sum = 0;
    for (size_t d = 0; d < b->D; d++) {
        double sent = 0;
        for (size_t t = 0; t < b->T; t++) {
            int any = 0;
            for (size_t i = 0; i < b->k; i++) any |= b->index[t * b->k + i] >= 0 && (size_t)b->index[t * b->k + i] / (b->E / b->D) == d;
            sent += any;
        }
        sum += (double)b->D / (double)(LIMIT * b->T) * sent * P_device(b, d);
    }
    return sum;
}
#define SMOOTHING 0.125
static double want_locality(const batch *b) {
    double sum = 0;
    for (size_t d = 0; d < b->D; d++) {
        double local = b->D == 1 ? 1 : d == b->home ? 1 - SMOOTHING : SMOOTHING / (double)(b->D - 1);
        sum += P_device(b, d) * log(P_device(b, d) / local);
    }
    return sum;
}
static double want_relu_l1(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++)
        for (size_t t = 0; t < b->T; t++)
            sum += (double)b->E * (double)b->load[e] / (double)(b->k * b->counted) * fmax(0, b->x[S][t * b->E + e]) / (double)b->T;
    return sum;
}
static double want_variance(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++) {
        double mean = 0;
        for (size_t t = 0; t < b->T; t++) mean += b->x[S][t * b->E + e] / (double)b->T;
        for (size_t t = 0; t < b->T; t++) sum -= pow(b->x[S][t * b->E + e] - mean, 2) / (double)b->T;
    }
    return sum;
}
static double want_oracle(const batch *b) {
    double sum = 0, taught = 0;
    for (size_t t = 0; t < b->T; t++)
        if (b->teacher[t] >= 0) sum -= log(p_of(b, t, (size_t)b->teacher[t])), taught++;
    return sum / taught;
}
static double column_dot(const double *a, size_t rows, size_t cols, size_t i, size_t j) {
    double sum = 0;
    for (size_t r = 0; r < rows; r++) sum += a[r * cols + i] * a[r * cols + j];
    return sum;
}
static double column_cos(const double *a, size_t rows, size_t cols, size_t i, size_t j) {
    return column_dot(a, rows, cols, i, j) / sqrt(column_dot(a, rows, cols, i, i) * column_dot(a, rows, cols, j, j));
}
static double want_simbal(const batch *b) {
    double sum = 0;
    for (size_t i = 0; i < b->E; i++)
        for (size_t j = 0; j < b->E; j++) sum += fabs(column_dot(b->x[R], b->d, b->E, i, j) - (i == j));
    return sum;
}
static double gram_square(const double *a, size_t rows, size_t cols) {
    double sum = 0;
    for (size_t i = 0; i < cols; i++)
        for (size_t j = 0; j < cols; j++) sum += pow(column_dot(a, rows, cols, i, j) - (i == j), 2);
    return sum;
}
static double want_diverse_simple(const batch *b) {
    double sum = sqrt(gram_square(b->x[R], b->d, b->E));
    for (size_t e = 0; e < b->E; e++) sum += sqrt(column_dot(b->x[R], b->d, b->E, e, e)) / (double)b->E;
    return sum;
}
static double want_prototype_orthogonality(const batch *b) {
    double sum = 0;
    for (size_t i = 0; i < b->E; i++)
        for (size_t j = 0; j < b->E; j++) sum += pow(column_cos(b->x[R], b->d, b->E, i, j) - (i == j), 2);
    return sum;
}
static double want_prototype_diversity(const batch *b) {
    double sum = 0, pairs = 0;
    for (size_t i = 0; i < b->E; i++)
        for (size_t j = 0; j < b->E; j++)
            if (i != j) sum += exp(2 * column_cos(b->x[R], b->d, b->E, i, j) - 2), pairs++;
    return pairs > 0 ? sum / pairs : 0;
}
static double want_redundancy(const batch *b) {
    double sum = 0, pairs = 0;
    for (size_t i = 0; i < b->E; i++)
        for (size_t j = i + 1; j < b->E; j++) sum += fmax(0, column_cos(b->x[Z], b->T, b->E, i, j)), pairs++;
    return pairs > 0 ? sum / pairs : 0;
}
static double want_prototype_alignment(const batch *b) {
    double sum = 0, n = 0;
    for (size_t t = 0; t < b->T; t++)
        for (size_t i = 0; i < b->k; i++) {
            int32_t e = b->index[t * b->k + i];
            double xx = 0, xc = 0;
            if (e < 0) continue;
            for (size_t r = 0; r < b->d; r++)
                xx += pow(b->x[X][t * b->d + r], 2), xc += b->x[X][t * b->d + r] * b->x[R][r * b->E + (size_t)e];
            sum += 1 - xc / sqrt(xx * column_dot(b->x[R], b->d, b->E, (size_t)e, (size_t)e)), n++;
        }
    return sum / n;
}
static double want_latent_kl(const batch *b) {
    double sum = 0;
    for (size_t i = 0; i < b->T * b->d; i++)
        sum += 0.5 * (pow(b->x[X][i], 2) + exp(b->x[LV][i]) - b->x[LV][i] - 1) / (double)b->T;
    return sum;
}
static double want_output_orthogonality(const batch *b) {
    double sum = 0;
    for (size_t t = 0; t < b->T; t++)
        for (size_t j = 0; j < b->k; j++)
            for (size_t l = 0; l < b->k; l++) {
                double jl = 0, ll = 0;
                const double *oj = b->x[O] + (t * b->k + j) * b->d, *ol = b->x[O] + (t * b->k + l) * b->d;
                for (size_t i = 0; i < b->d; i++) jl += oj[i] * ol[i], ll += ol[i] * ol[i];
                if (j != l) sum += jl * jl / ll / (double)b->T;
            }
    return sum;
}
static double want_orthonormal(const batch *b) { return gram_square(b->x[V], b->rows, b->E); }
#define COMMITMENT 0.25
static double want_codebook(const batch *b) {
    double sum = 0, n = 0;
    for (size_t t = 0; t < b->T; t++) {
        if (b->code[t] < 0) continue;
        for (size_t i = 0; i < b->d; i++) {
            size_t at = t * b->d + i, c = (size_t)b->code[t] * b->d + i;
            sum += pow(b->x[C][c] - b->x0[X][at], 2) + COMMITMENT * pow(b->x0[C][c] - b->x[X][at], 2);
        }
        n++;
    }
    return sum / n;
}

/* ---- the library's functions, called alike ---- */
#define ARGS const batch *b, float c, double *value, float *const g[VARS]
#define SHAPE b->T, b->E
#define SOFT SHAPE, (float)b->tau, b->prob
#define OUT c, value, g[Z]
static moe_status call_switch(ARGS) { return moe_loss_switch(SOFT, b->load, OUT); }
static moe_status call_z(ARGS) { return moe_loss_z(SHAPE, b->f[Z], OUT); }
static moe_status call_importance(ARGS) { return moe_loss_importance(SOFT, b->mean_prob, OUT); }
static moe_status call_importance_selected(ARGS) {
    return moe_loss_importance_selected(b->T, b->k, b->E, b->index, b->mean_weights, c, value, g[W]);
}
static moe_status call_load(ARGS) {
    return moe_loss_load(SHAPE, b->f[Z], b->f[STD], b->f[THR], b->mean_selection, c, value, g[Z], g[STD], g[THR]);
}
static moe_status call_entropy(ARGS) { return moe_loss_entropy(SOFT, OUT); }
static moe_status call_certainty(ARGS) { return moe_loss_certainty(SOFT, OUT); }
static moe_status call_kl_uniform(ARGS) { return moe_loss_kl_uniform(SOFT, b->mean_prob, OUT); }
static moe_status call_kl_reverse(ARGS) { return moe_loss_kl_reverse(SOFT, b->mean_prob, OUT); }
static moe_status call_mutual_information(ARGS) { return moe_loss_mutual_information(SOFT, b->mean_prob, OUT); }
static moe_status call_l2_uniform(ARGS) { return moe_loss_l2_uniform(SOFT, b->mean_prob, OUT); }
static moe_status call_sequence(ARGS) { return moe_loss_sequence(SHAPE, b->sequence, b->f[S], b->sequence_load, c, value, g[S]); }
static moe_status call_device(ARGS) { return moe_loss_device(SHAPE, b->D, (float)b->tau, b->prob, b->device_load, OUT); }
static moe_status call_communication(ARGS) {
    return moe_loss_communication(SHAPE, b->D, LIMIT, (float)b->tau, b->prob, b->device_tokens, b->T, OUT);
}
static moe_status call_locality(ARGS) {
    return moe_loss_locality(SHAPE, b->D, b->home, (float)SMOOTHING, (float)b->tau, b->prob, b->device_prob, OUT);
}
static moe_status call_relu_l1(ARGS) { return moe_loss_relu_l1(SHAPE, b->k, b->f[S], b->load, b->counted, c, value, g[S]); }
static moe_status call_variance(ARGS) { return moe_loss_variance(SHAPE, b->f[S], b->mean_scores, c, value, g[S]); }
static moe_status call_oracle(ARGS) { return moe_loss_oracle(SOFT, b->teacher, OUT); }
static moe_status call_simbal(ARGS) { return moe_loss_simbal(b->d, b->E, b->f[R], c, value, g[R]); }
static moe_status call_diverse_simple(ARGS) { return moe_loss_diverse_simple(b->d, b->E, b->f[R], c, value, g[R]); }
static moe_status call_prototype_orthogonality(ARGS) { return moe_loss_prototype_orthogonality(b->d, b->E, b->f[R], c, value, g[R]); }
static moe_status call_prototype_diversity(ARGS) { return moe_loss_prototype_diversity(b->d, b->E, b->f[R], c, value, g[R]); }
static moe_status call_prototype_alignment(ARGS) {
    return moe_loss_prototype_alignment(b->T, b->d, b->E, b->k, b->f[X], b->f[R], b->index, c, value, g[X], g[R]);
}
static moe_status call_latent_kl(ARGS) { return moe_loss_latent_kl(b->T, b->d, b->f[X], b->f[LV], c, value, g[X], g[LV]); }
static moe_status call_redundancy(ARGS) { return moe_loss_redundancy(SHAPE, b->f[Z], OUT); }
static moe_status call_output_orthogonality(ARGS) { return moe_loss_output_orthogonality(b->T, b->k, b->d, b->f[O], c, value, g[O]); }
static moe_status call_orthonormal(ARGS) { return moe_loss_orthonormal(b->rows, b->E, b->f[V], c, value, g[V]); }
static moe_status call_codebook(ARGS) {
    return moe_loss_codebook(b->T, b->d, b->n_codes, b->f[X], b->f[C], b->code, (float)COMMITMENT, c, value, g[X], g[C]);
}
static double want_certainty(const batch *b) { return token_entropy(b); }

/* by: what the gradient is by. shift: adding a constant to a token's logits changes nothing. experts: renaming them changes nothing:
 * 1 = any names, 2 = within a device. */
typedef struct loss_case {
    moe_loss_kind kind;
    double (*want)(const batch *);
    moe_status (*call)(ARGS);
    unsigned by;
    int shift, experts;
} loss_case;
#define BY(v) (1u << (v))
#define CASE(KIND, name, by, shift, experts) {MOE_LOSS_##KIND, want_##name, call_##name, by, shift, experts}
static const loss_case cases[] = {
    CASE(SWITCH, switch, BY(Z), 1, 1),
    CASE(Z, z, BY(Z), 0, 1),
    CASE(IMPORTANCE, importance, BY(Z), 1, 1),
    CASE(IMPORTANCE_SELECTED, importance_selected, BY(W), 0, 1),
    CASE(LOAD, load, BY(Z) | BY(STD) | BY(THR), 0, 1),
    CASE(ENTROPY, entropy, BY(Z), 1, 1),
    CASE(CERTAINTY, certainty, BY(Z), 1, 1),
    CASE(KL_UNIFORM, kl_uniform, BY(Z), 1, 1),
    CASE(KL_REVERSE, kl_reverse, BY(Z), 1, 1),
    CASE(MUTUAL_INFORMATION, mutual_information, BY(Z), 1, 1),
    CASE(L2_UNIFORM, l2_uniform, BY(Z), 1, 1),
    CASE(SEQUENCE, sequence, BY(S), 0, 1),
    CASE(DEVICE, device, BY(Z), 1, 2),
    CASE(COMMUNICATION, communication, BY(Z), 1, 2),
    CASE(LOCALITY, locality, BY(Z), 1, 2),
    CASE(RELU_L1, relu_l1, BY(S), 0, 1),
    CASE(VARIANCE, variance, BY(S), 0, 1),
    CASE(ORACLE, oracle, BY(Z), 1, 1),
    CASE(SIMBAL, simbal, BY(R), 0, 1),
    CASE(DIVERSE_SIMPLE, diverse_simple, BY(R), 0, 1),
    CASE(PROTOTYPE_ORTHOGONALITY, prototype_orthogonality, BY(R), 0, 1),
    CASE(PROTOTYPE_DIVERSITY, prototype_diversity, BY(R), 0, 1),
    CASE(PROTOTYPE_ALIGNMENT, prototype_alignment, BY(X) | BY(R), 0, 1),
    CASE(LATENT_KL, latent_kl, BY(X) | BY(LV), 0, 1),
    CASE(REDUNDANCY, redundancy, BY(Z), 0, 1),
    CASE(OUTPUT_ORTHOGONALITY, output_orthogonality, BY(O), 0, 1),
    CASE(ORTHONORMAL, orthonormal, BY(V), 0, 1),
    CASE(CODEBOOK, codebook, BY(X) | BY(C), 0, 1),
};
enum { CASES = sizeof cases / sizeof *cases };
static const char *name_of(const loss_case *c) { return moe_loss_name(c->kind); }

/* Zeroed gradient arrays, only those that the loss has one by; the others NULL. */
static void grads_new(const batch *b, unsigned by, float *g[VARS]) {
    for (int v = 0; v < VARS; v++) g[v] = by & BY(v) ? test_floats(b->n[v]) : NULL;
}
static void grads_free(float *g[VARS]) {
    for (int v = 0; v < VARS; v++) free(g[v]);
}
static double largest(size_t n, const float *x) {
    double top = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, fabs((double)x[i]));
    return top;
}
/* One message that names the loss. */
static void check_near(const loss_case *c, const char *what, double got, double want, double limit) {
    if (!(fabs(got - want) <= limit)) {
        printf("    %s, %s: %.9g and %.9g differ by %.3g, over %.3g\n", name_of(c), what, got, want, fabs(got - want), limit);
        CHECK(!"near");
    }
}

static void test_every_loss_has_a_case(void) {
    CHECK((int)CASES == (int)MOE_LOSS_COUNT);
    for (int i = 0; i < CASES; i++) CHECK((int)cases[i].kind == i);
}

/* ---- values and gradients ----
 * A gradient is a sum of a few products of floats, some of which cancel: its error is some tens of roundings of the
 * largest entry, or of its terms where all entries cancel (an even load, two columns of one number). The differences,
 * in double with h = 1e-5, add about 1e-9. */
#define GRADIENT_LIMIT (64 * 0x1p-24)
#define GRADIENT_FLOOR 0.02
static double worst;
static void check_case(const loss_case *c, batch *b) {
    static const float coefficient = 0.5f;
    float *g[VARS];
    double value = -1, want = c->want(b);
    grads_new(b, c->by, g);
    if (!CHECK_OK(c->call(b, coefficient, &value, g))) printf("    %s\n", name_of(c));
    check_near(c, "value", value, want, 4e-6 * fmax(fabs(want), 0.1));
    for (int v = 0; v < VARS; v++) {
        if (!g[v]) continue;
        double *slope = test_doubles(b->n[v]), top = 0, h = 1e-5;
        for (size_t i = 0; i < b->n[v]; i++) {
            double keep = b->x[v][i], side[2];
            for (int s = 0; s < 2; s++) b->x[v][i] = keep + (s ? h : -h), side[s] = c->want(b);
            b->x[v][i] = keep;
            slope[i] = (double)coefficient * (side[1] - side[0]) / (2 * h);
            if (v == S && keep == 0 && c->kind == MOE_LOSS_RELU_L1) slope[i] = 0; /* the kink: a closed gate gets nothing */
            top = fmax(top, fabs(slope[i]));
        }
        for (size_t i = 0; i < b->n[v]; i++) {
            if (fabs((double)g[v][i] - slope[i]) / fmax(top, GRADIENT_FLOOR) > worst) worst = fabs((double)g[v][i] - slope[i]) / fmax(top, GRADIENT_FLOOR);
            check_near(c, "gradient", (double)g[v][i], slope[i], GRADIENT_LIMIT * fmax(top, GRADIENT_FLOOR));
        }
        free(slope);
    }
    grads_free(g);
}

static const struct { size_t T, E, k, d, D, sequence; double tau; } shapes[] = {
    {1, 2, 1, 3, 1, 1, 1}, {5, 4, 2, 4, 2, 2, 0.5}, {7, 6, 3, 5, 3, 3, 2}, {6, 17, 2, 3, 17, 6, 1}, {4, 36, 4, 2, 3, 9, 1.5},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static batch shape_batch(int i) {
    return batch_new(shapes[i].T, shapes[i].E, shapes[i].k, shapes[i].d, shapes[i].D, shapes[i].sequence, shapes[i].tau);
}

static void test_gradients(void) {
    for (int s = 0; s < SHAPES; s++)
        for (int i = 0; i < CASES; i++) {
            batch b = shape_batch(s);
            check_case(&cases[i], &b);
            batch_free(&b);
        }
    if (getenv("TEST_WORST")) printf("worst %.3g\n", worst);
}

int main(void) {
    RUN(test_every_loss_has_a_case);
    RUN(test_gradients);
    return test_end();
}

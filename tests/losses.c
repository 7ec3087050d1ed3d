/* Every auxiliary loss against a naive double-precision value of its own: the value, and the gradient against central
 * differences of it with loads held constant; closed forms, invariances, loads and means of a larger batch, bad input,
 * the same bits on every instruction set, and the table in docs/math.md. */
#include "test.h"
#include "oracle.h"
#include "examples/common/loss_cases.h"

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
    uint64_t *load, *sequence_load, *rank_load, *rank_tokens;
    double *mean_prob, *mean_scores, *mean_weights, *mean_selection, *rank_prob;
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
    CHECK_OK(moe_mean_weights(b->T, b->E, b->k, b->index, b->f[W], b->mean_weights));
    CHECK_OK(moe_mean_selection(b->T, b->E, b->f[Z], b->f[STD], b->f[THR], b->mean_selection));
    CHECK_OK(moe_sequence_load(b->T, b->E, b->k, b->sequence, b->index, b->sequence_load));
    CHECK_OK(moe_rank_load(b->E, b->D, b->load, b->rank_load));
    CHECK_OK(moe_rank_tokens(b->T, b->E, b->k, b->D, b->index, b->rank_tokens));
    CHECK_OK(moe_rank_prob(b->E, b->D, b->mean_prob, b->rank_prob));
    for (int v = 0; v < VARS; v++)
        for (size_t i = 0; i < b->n[v]; i++) b->x[v][i] = (double)b->f[v][i];
}

static batch batch_new(size_t T, size_t E, size_t k, size_t d, size_t D, size_t sequence, double tau) {
    batch b;
    memset(&b, 0, sizeof b);
    b.T = T, b.E = E, b.k = k, b.d = d, b.D = D, b.home = D / 2, b.sequence = sequence, b.tau = tau, b.n_codes = 3,
    b.rows = d + 1;
    b.counted = T + 5; /* loads of more than this batch */
    batch_shape(&b);
    for (int v = 0; v < VARS; v++)
        b.f[v] = test_floats(b.n[v]), b.x[v] = test_doubles(b.n[v]), b.x0[v] = test_doubles(b.n[v]);
    b.prob = test_floats(T * E);
    b.index = (int32_t *)test_memory(T * k, sizeof *b.index), b.teacher = (int32_t *)test_memory(T, sizeof *b.teacher);
    b.code = (int32_t *)test_memory(T, sizeof *b.code);
    b.load = (uint64_t *)test_memory(E, sizeof *b.load), b.rank_load = (uint64_t *)test_memory(D, sizeof *b.load);
    b.sequence_load = (uint64_t *)test_memory((T / sequence + 1) * E, sizeof *b.load);
    b.rank_tokens = (uint64_t *)test_memory(D, sizeof *b.load);
    b.mean_prob = test_doubles(E), b.mean_scores = test_doubles(E), b.mean_weights = test_doubles(E);
    b.mean_selection = test_doubles(E), b.rank_prob = test_doubles(D);
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
    free(b->prob), free(b->index), free(b->teacher), free(b->code), free(b->load), free(b->sequence_load),
        free(b->rank_load);
    free(b->rank_tokens), free(b->mean_prob), free(b->mean_scores), free(b->mean_weights), free(b->mean_selection),
        free(b->rank_prob);
}

/* ---- the oracles: as the formulas are written ---- */
enum { MOST = 512 }; /* experts */
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
    double P[MOST];
    for (size_t e = 0; e < b->E; e++) P[e] = P_of(b, e);
    return cv2(b->E, P);
}
static double want_importance_selected(const batch *b) {
    double I[MOST] = {0};
    for (size_t i = 0; i < b->T * b->k; i++)
        if (b->index[i] >= 0) I[b->index[i]] += b->x[W][i];
    return cv2(b->E, I);
}
static double want_load(const batch *b) {
    double I[MOST] = {0};
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
static double P_rank(const batch *b, size_t d) {
    double sum = 0;
    for (size_t e = d * (b->E / b->D); e < (d + 1) * (b->E / b->D); e++) sum += P_of(b, e);
    return sum;
}
static double want_rank(const batch *b) {
    double sum = 0, per = (double)(b->E / b->D);
    for (size_t d = 0; d < b->D; d++) {
        double F = 0;
        for (size_t e = d * (b->E / b->D); e < (d + 1) * (b->E / b->D); e++)
            F += (double)b->E * (double)b->load[e] / total_load(b) / per;
        sum += F * P_rank(b, d);
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
            for (size_t i = 0; i < b->k; i++)
                any |= b->index[t * b->k + i] >= 0 && (size_t)b->index[t * b->k + i] / (b->E / b->D) == d;
            sent += any;
        }
        sum += (double)b->D / (double)(LIMIT * b->T) * sent * P_rank(b, d);
    }
    return sum;
}
#define SMOOTHING 0.125
static double want_locality(const batch *b) {
    double sum = 0;
    for (size_t d = 0; d < b->D; d++) {
        double local = b->D == 1 ? 1 : d == b->home ? 1 - SMOOTHING : SMOOTHING / (double)(b->D - 1);
        sum += P_rank(b, d) * log(P_rank(b, d) / local);
    }
    return sum;
}
static double want_relu_l1(const batch *b) {
    double sum = 0;
    for (size_t e = 0; e < b->E; e++)
        for (size_t t = 0; t < b->T; t++)
            sum += (double)b->E * (double)b->load[e] / (double)(b->k * b->counted) * fmax(0, b->x[S][t * b->E + e]) /
                   (double)b->T;
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
    double sum = 0;
    for (size_t i = 0; i < b->E; i++)
        for (size_t j = 0; j < b->E; j++) sum += pow(column_cos(b->x[R], b->d, b->E, i, j) - (i == j), 2);
    sum = sqrt(sum);
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
    return sum / (n * (double)b->d);
}

/* ---- the library's function, called alike ---- */
/* by: what the gradient is by. shift: adding a constant to a token's logits changes nothing. experts: renaming them
 * changes nothing: 1 = any names, 2 = within a rank. */
typedef struct loss_case {
    moe_loss_kind kind;
    double (*want)(const batch *);
    unsigned by;
    int shift, experts;
} loss_case;
#define BY(v) (1u << (v))

/* Everything that the batch has, and of what differs from loss to loss the one that this loss reads. */
static moe_loss_args args_of(const loss_case *c, const batch *b, float *const g[VARS]) {
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = b->T, a.n_experts = b->E, a.top_k = b->k, a.d_model = b->d, a.sequence = b->sequence;
    a.n_ranks = b->D, a.rank_limit = LIMIT, a.home = b->home, a.n_codes = b->n_codes, a.counted = b->counted;
    a.temperature = (float)b->tau, a.smoothing = (float)SMOOTHING, a.commitment = (float)COMMITMENT;
    a.prob = b->prob, a.scores = b->f[S], a.logits = b->f[Z], a.noise_std = b->f[STD], a.threshold = b->f[THR];
    a.router = b->f[R], a.matrix = b->f[V], a.latent = a.x = b->f[X], a.log_var = b->f[LV], a.outputs = b->f[O],
    a.codebook = b->f[C];
    a.index = b->index, a.teacher = b->teacher, a.load = b->load, a.mean = b->mean_prob, a.rank_prob = b->rank_prob;
    a.d_logits = c->by & BY(Z) ? g[Z] : NULL, a.d_scores = g[S], a.d_noise_std = g[STD], a.d_threshold = g[THR];
    a.d_weight = g[W], a.d_router = g[R], a.d_latent = a.dx = g[X], a.d_log_var = g[LV], a.d_outputs = g[O];
    a.d_codebook = g[C], a.d_matrix = g[V];
    if (c->kind == MOE_LOSS_ORTHONORMAL) a.d_model = b->rows, a.d_ff = b->E;
    switch (loss_case_reads(c->kind)) {
    case READS_SEQUENCE_LOAD: a.load = b->sequence_load; break;
    case READS_RANK_LOAD: a.load = b->rank_load; break;
    case READS_RANK_TOKENS: a.load = b->rank_tokens, a.counted = b->T; break;
    case READS_MEAN_WEIGHT: a.mean = b->mean_weights; break;
    case READS_MEAN_SELECTION: a.mean = b->mean_selection; break;
    case READS_MEAN_SCORE: a.mean = b->mean_scores; break;
    case READS_CODE: a.index = b->code; break;
    case READS_NOTHING:
    case READS_LOAD:
    case READS_MEAN_PROB:
    case READS_RANK_PROB: break;
    }
    return a;
}
static moe_status call(const loss_case *c, const batch *b, float coefficient, double *value, float *const g[VARS]) {
    moe_loss_args a = args_of(c, b, g);
    return moe_loss(c->kind, &a, coefficient, value);
}
static double want_certainty(const batch *b) { return token_entropy(b); }
#define CASE(KIND, name, by, shift, experts) {MOE_LOSS_##KIND, want_##name, by, shift, experts}
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
    CASE(RANK, rank, BY(Z), 1, 2),
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

/* ---- values and gradients ----
 * A gradient is a sum of a few products of floats, some of which cancel: its error is some tens of roundings of the
 * largest entry, or of its terms where all entries cancel (an even load, two columns of one number). The differences,
 * in double with h = 1e-5, add about 1e-9. */
#define GRADIENT_LIMIT (64 * 0x1p-24)
#define GRADIENT_FLOOR 0.02

/* Zeroed gradient arrays, only those that the loss has one by; the others NULL. */
static void grads_new(const batch *b, unsigned by, float *g[VARS]) {
    for (int v = 0; v < VARS; v++) g[v] = by & BY(v) ? test_floats(b->n[v]) : NULL;
}
static void grads_free(float *g[VARS]) {
    for (int v = 0; v < VARS; v++) free(g[v]);
}
static double largest(size_t n, const float *x) {
    double top = GRADIENT_FLOOR;
    for (size_t i = 0; i < n; i++) top = fmax(top, fabs((double)x[i]));
    return top;
}
/* One message that names the loss. */
static void check_near(const loss_case *c, const char *what, double got, double want, double limit) {
    if (!(fabs(got - want) <= limit)) {
        printf("    %s, %s: %.9g and %.9g differ by %.3g, over %.3g\n", name_of(c), what, got, want, fabs(got - want),
               limit);
        CHECK(!"near");
    }
}

static void test_every_loss_has_a_case(void) {
    CHECK((int)CASES == (int)MOE_LOSS_COUNT);
    for (int i = 0; i < CASES; i++) CHECK((int)cases[i].kind == i);
}

static void check_case(const loss_case *c, batch *b) {
    static const float coefficient = 0.5f;
    float *g[VARS];
    double value = -1, want = c->want(b);
    grads_new(b, c->by, g);
    if (!CHECK_OK(call(c, b, coefficient, &value, g))) printf("    %s\n", name_of(c));
    check_near(c, "value", value, want, 4e-6 * fmax(fabs(want), 0.1));
    for (int v = 0; v < VARS; v++) {
        if (!g[v]) continue;
        double *slope = test_doubles(b->n[v]), top = 0, h = 1e-5;
        for (size_t i = 0; i < b->n[v]; i++) {
            double keep = b->x[v][i], side[2];
            for (int s = 0; s < 2; s++) b->x[v][i] = keep + (s ? h : -h), side[s] = c->want(b);
            b->x[v][i] = keep;
            slope[i] = (double)coefficient * (side[1] - side[0]) / (2 * h);
            /* the kink: a closed gate gets nothing */
            if (v == S && keep == 0 && c->kind == MOE_LOSS_RELU_L1) slope[i] = 0;
            top = fmax(top, fabs(slope[i]));
        }
        for (size_t i = 0; i < b->n[v]; i++) {
            check_near(c, "gradient", (double)g[v][i], slope[i], GRADIENT_LIMIT * fmax(top, GRADIENT_FLOOR));
        }
        free(slope);
    }
    grads_free(g);
}

static const struct { size_t T, E, k, d, D, sequence; double tau; } shapes[] = {
    {1, 2, 1, 3, 1, 1, 1}, {5, 4, 2, 4, 2, 2, 0.5}, {7, 6, 3, 5, 3, 3, 2}, {6, 17, 2, 3, 17, 6, 1},
    {4, 36, 4, 2, 3, 9, 1.5}, {7, 2, 1, 43, 1, 3, 1}, /* more latents than 256, not all in full parts */
};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static batch shape_batch(int i) {
    return batch_new(shapes[i].T, shapes[i].E, shapes[i].k, shapes[i].d, shapes[i].D, shapes[i].sequence,
                     shapes[i].tau);
}

static void test_gradients(void) {
    for (int s = 0; s < SHAPES; s++)
        for (int i = 0; i < CASES; i++) {
            batch b = shape_batch(s);
            check_case(&cases[i], &b);
            batch_free(&b);
        }
}

/* More experts than are filled at a time: the derivative along one random direction; a small step, as 90000 pairs of
 * columns have kinks close by. */
static void test_many_experts(void) {
    for (int i = 0; i < CASES; i++) {
        batch b = batch_new(3, 300, 2, 2, 5, 2, 1);
        const loss_case *c = &cases[i];
        float *g[VARS];
        double value = -1, want = c->want(&b), along = 0, size = 0, side[2], h = 1e-7;
        grads_new(&b, c->by, g);
        CHECK_OK(call(c, &b, 0.5f, &value, g));
        check_near(c, "value of many", value, want, 4e-6 * fmax(fabs(want), 0.1));
        for (int s = 0; s < 2; s++) {
            test_seed = 77;
            for (int v = 0; v < VARS; v++)
                for (size_t j = 0; g[v] && j < b.n[v]; j++) {
                    double way = (double)test_uniform(-1, 1);
                    if (v == S && b.f[S][j] == 0) way = 0; /* closed gates stay closed */
                    b.x[v][j] = (double)b.f[v][j] + (s ? h : -h) * way;
                    if (s) along += (double)g[v][j] * way, size += fabs((double)g[v][j] * way);
                }
            side[s] = c->want(&b);
        }
        check_near(c, "gradient of many", along, 0.5 * (side[1] - side[0]) / (2 * h),
                   GRADIENT_LIMIT * fmax(size, GRADIENT_FLOOR) + 1e-7 * fabs(want));
        grads_free(g), batch_free(&b);
    }
}

/* More outputs a token than the function takes at a time, one of them zero: value and gradient by the
 * definition, in double. */
static void test_many_outputs(void) {
    enum { N = 2, K = 70, WIDE = 9 };
    static float o[N * K * WIDE], g[N * K * WIDE];
    static double want[N * K * WIDE];
    double value, sum = 0;
    test_fill(o, N * K * WIDE, -1, 1);
    memset(o + 40 * WIDE, 0, WIDE * sizeof(float));
    for (size_t t = 0; t < N; t++)
        for (size_t j = 0; j < K; j++)
            for (size_t l = 0; l < K; l++) {
                const float *a = o + (t * K + j) * WIDE, *b = o + (t * K + l) * WIDE;
                double ab = 0, bb = 0;
                for (size_t i = 0; i < WIDE; i++) ab += (double)a[i] * (double)b[i], bb += (double)b[i] * (double)b[i];
                if (j == l || !(bb > 0)) continue;
                sum += ab * ab / bb / N;
                for (size_t i = 0; i < WIDE; i++) {
                    want[(t * K + j) * WIDE + i] += 2.0 / N * ab / bb * (double)b[i];
                    want[(t * K + l) * WIDE + i] +=
                        2.0 / N * (ab / bb * (double)a[i] - ab / bb * ab / bb * (double)b[i]);
                }
            }
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = N, a.top_k = K, a.d_model = WIDE, a.outputs = o, a.d_outputs = g;
    CHECK_OK(moe_loss(MOE_LOSS_OUTPUT_ORTHOGONALITY, &a, 1, &value));
    CHECK_NEAR(value, sum, 1e-7);
    for (size_t i = 0; i < N * K * WIDE; i++) CHECK_WITHIN(g[i], want[i], 7e-5);
}

/* ---- closed forms at uniform p ---- */
static double value_of(moe_loss_kind kind, const moe_loss_args *a) {
    double v = NAN;
    CHECK_OK(moe_loss(kind, a, 1, NULL));
    CHECK_OK(moe_loss(kind, a, 1, &v));
    return v;
}
static double value_of_columns(moe_loss_kind kind, size_t rows, size_t columns, const float *matrix) {
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.d_model = a.n_tokens = rows, a.n_experts = a.d_ff = columns;
    a.router = a.matrix = a.logits = matrix;
    return value_of(kind, &a);
}
static void test_closed_forms(void) {
    enum { T = 3, E = 8, D = 4 };
    float z[T * E] = {0}, p[T * E];
    uint64_t load[E], devices[D], even[D] = {3, 3, 3, 3};
    double mean[E], share[D], nothing[E] = {0};
    static const int32_t teacher[T] = {0, 5, 7}, index[T * 2] = {0, 1, 2, 5, 7, 0}; /* devices of a token: 1, 2, 2 */
    CHECK_OK(moe_softmax(T, E, 1, z, p));
    CHECK_OK(moe_mean_scores(T, E, p, mean));
    CHECK_OK(moe_rank_prob(E, D, mean, share));
    for (size_t e = 0; e < E; e++) load[e] = 5 * e; /* whatever it is */
    CHECK_OK(moe_rank_load(E, D, load, devices));
    CHECK(devices[0] == 5 && devices[1] == 25 && devices[2] == 45 && devices[3] == 65);
    moe_loss_args a; /* temperature 0 is 1 */
    memset(&a, 0, sizeof a);
    a.n_tokens = T, a.n_experts = E, a.n_ranks = D, a.rank_limit = 1, a.sequence = T, a.counted = 12;
    a.prob = a.scores = p, a.logits = z, a.mean = mean, a.teacher = teacher, a.load = load;
    CHECK_NEAR(value_of(MOE_LOSS_SWITCH, &a), 1, 1e-12); /* so its term is its coefficient */
    a.load = devices, CHECK_NEAR(value_of(MOE_LOSS_RANK, &a), 1, 1e-12);
    a.load = even, CHECK_NEAR(value_of(MOE_LOSS_COMMUNICATION, &a), 1, 1e-12);
    CHECK_OK(moe_rank_tokens(T, E, 2, D, index, devices));
    CHECK(devices[0] == 2 && devices[1] == 1 && devices[2] == 1 && devices[3] == 1);
    a.load = load, CHECK_NEAR(value_of(MOE_LOSS_SEQUENCE, &a), 1, 1e-7);
    CHECK_NEAR(value_of(MOE_LOSS_Z, &a), log(8.0) * log(8.0), 1e-7);
    CHECK_WITHIN(value_of(MOE_LOSS_IMPORTANCE, &a), 0, 1e-12);
    a.mean = nothing, CHECK(value_of(MOE_LOSS_IMPORTANCE, &a) == 0), a.mean = mean;
    CHECK_WITHIN(value_of(MOE_LOSS_KL_UNIFORM, &a), 0, 1e-12);
    CHECK_WITHIN(value_of(MOE_LOSS_KL_REVERSE, &a), 0, 1e-12);
    CHECK_WITHIN(value_of(MOE_LOSS_L2_UNIFORM, &a), 0, 1e-12);
    CHECK_WITHIN(value_of(MOE_LOSS_MUTUAL_INFORMATION, &a), 0, 1e-7);
    CHECK_NEAR(value_of(MOE_LOSS_ENTROPY, &a), -log(8.0), 1e-7);
    CHECK_NEAR(value_of(MOE_LOSS_CERTAINTY, &a), log(8.0), 1e-7);
    CHECK_NEAR(value_of(MOE_LOSS_ORACLE, &a), log(8.0), 1e-7);
    CHECK_WITHIN(value_of(MOE_LOSS_VARIANCE, &a), 0, 1e-12);
    /* a quarter of it at home, where it should be 3/4 */
    a.home = 1, a.smoothing = 0.25f, a.rank_prob = share;
    CHECK_NEAR(value_of(MOE_LOSS_LOCALITY, &a), 0.25 * log(0.25 / 0.75) + 0.75 * log(0.25 / (0.25 / 3)), 4e-7);
    /* all tokens and all their probability on one: E; logits whose exponentials sum to 1: nothing to make smaller */
    for (size_t i = 0; i < T * E; i++) p[i] = i % E == 0, z[i] = -(float)log(8.0);
    for (size_t e = 0; e < E; e++) load[e] = e ? 0 : 12;
    CHECK_NEAR(value_of(MOE_LOSS_SWITCH, &a), 8, 1e-7);
    CHECK_WITHIN(value_of(MOE_LOSS_Z, &a), 0, 1e-12);
    /* columns of a unit matrix, two of them the same, and all the same */
    static const float unit[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1}, pair[6] = {2, 2, 0, 0, 0, 3},
                       same[6] = {1, 1, 1, 2, 2, 2};
    CHECK(value_of_columns(MOE_LOSS_SIMBAL, 3, 3, unit) == 0);
    CHECK(value_of_columns(MOE_LOSS_PROTOTYPE_ORTHOGONALITY, 3, 3, unit) == 0);
    CHECK(value_of_columns(MOE_LOSS_ORTHONORMAL, 3, 3, unit) == 0);
    CHECK_NEAR(value_of_columns(MOE_LOSS_DIVERSE_SIMPLE, 3, 3, unit), 1, 1e-12);
    static const float twice[4] = {2, 0, 0, 2}, none[4] = {3, 0, 4, 0}; /* 2 I: 0 + 2; (3, 4) and a zero: 1 + 5 / 2 */
    CHECK_NEAR(value_of_columns(MOE_LOSS_DIVERSE_SIMPLE, 2, 2, twice), 2, 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_DIVERSE_SIMPLE, 2, 2, none), 3.5, 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_DIVERSE_SIMPLE, 2, 3, pair), sqrt(2.0) + (2 + 2 + 3) / 3.0, 1e-7);
    CHECK(value_of_columns(MOE_LOSS_REDUNDANCY, 3, 3, unit) == 0);
    CHECK_NEAR(value_of_columns(MOE_LOSS_PROTOTYPE_DIVERSITY, 3, 3, unit), exp(-2.0), 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_SIMBAL, 2, 3, pair), 3 + 3 + 8 + 4 + 4, 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_PROTOTYPE_ORTHOGONALITY, 2, 3, pair), 2, 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_REDUNDANCY, 2, 3, pair), 1 / 3.0, 1e-7);
    CHECK_NEAR(value_of_columns(MOE_LOSS_PROTOTYPE_DIVERSITY, 2, 3, same), 1, 1e-6);
}

/* Where the scores are the softmax, variance gives its gradient by the logits as well: that by the scores, through
 * the softmax. */
static void test_variance_of_the_softmax(void) {
    batch b = batch_new(5, 17, 2, 3, 1, 5, 0.5);
    float *by_scores = test_floats(5 * 17), *through = test_floats(5 * 17), *by_logits = test_floats(5 * 17);
    float *none[VARS] = {0};
    double one = -1, two = -2;
    memcpy(b.f[S], b.prob, 5 * 17 * sizeof(float));
    batch_statistics(&b);
    moe_loss_args a = args_of(&cases[MOE_LOSS_VARIANCE], &b, none);
    a.d_scores = by_scores, CHECK_OK(moe_loss(MOE_LOSS_VARIANCE, &a, 0.5f, &one));
    a.prob = NULL; /* not read */
    a.d_scores = NULL, a.d_logits = by_logits, CHECK_OK(moe_loss(MOE_LOSS_VARIANCE, &a, 0.5f, &two));
    CHECK_OK(moe_softmax_backward(5, 17, 0.5f, b.prob, by_scores, through));
    CHECK(one == two);
    for (size_t i = 0; i < 5 * 17; i++)
        CHECK_WITHIN(by_logits[i], through[i], GRADIENT_LIMIT * largest(5 * 17, through));
    free(by_scores), free(through), free(by_logits), batch_free(&b);
}

/* ---- invariances ---- */
/* Experts renamed: column e of the copy is column name[e] of b. */
static batch renamed(const batch *b, const size_t *name) {
    batch r = batch_new(b->T, b->E, b->k, b->d, b->D, b->sequence, b->tau);
    for (int v = 0; v < VARS; v++) memcpy(r.f[v], b->f[v], b->n[v] * sizeof(float));
    memcpy(r.code, b->code, b->T * sizeof *r.code);
    for (size_t e = 0; e < b->E; e++) {
        static const int columns[] = {Z, S, STD, THR, R, V};
        for (size_t i = 0; i < sizeof columns / sizeof *columns; i++)
            for (size_t row = 0; row < b->n[columns[i]] / b->E; row++)
                r.f[columns[i]][row * b->E + e] = b->f[columns[i]][row * b->E + name[e]];
        r.load[e] = b->load[name[e]];
        for (size_t i = 0; i < b->T * b->k; i++)
            if (b->index[i] == (int32_t)name[e]) r.index[i] = (int32_t)e;
            else if (b->index[i] < 0) r.index[i] = -1;
        for (size_t t = 0; t < b->T; t++)
            if (b->teacher[t] == (int32_t)name[e]) r.teacher[t] = (int32_t)e;
            else if (b->teacher[t] < 0) r.teacher[t] = -1;
    }
    batch_statistics(&r);
    return r;
}

static void test_names_of_experts_do_not_matter(void) {
    for (int i = 0; i < CASES; i++)
        for (int within = 0; within < 2; within++) {
            const loss_case *c = &cases[i];
            size_t name[12];
            float *g[VARS], *h[VARS];
            double a = -1, other = -1;
            batch b = batch_new(7, 12, 3, 4, 3, 3, 0.7);
            if (!within && c->experts == 2) { batch_free(&b); continue; }
            for (size_t e = 0; e < 12; e++) name[e] = within ? e / 4 * 4 + (e + 1) % 4 : (5 * e + 3) % 12;
            batch r = renamed(&b, name);
            grads_new(&b, c->by, g), grads_new(&b, c->by, h);
            CHECK_OK(call(c, &b, 0.5f, &a, g));
            CHECK_OK(call(c, &r, 0.5f, &other, h));
            check_near(c, "renamed value", other, a, 2e-6 * fmax(fabs(a), 0.1));
            for (int v = 0; v < VARS; v++)
                for (size_t j = 0; g[v] && j < b.n[v]; j++) {
                    int by_column = v == Z || v == S || v == STD || v == THR || v == R || v == V;
                    size_t from = by_column ? j / 12 * 12 + name[j % 12] : j;
                    check_near(c, "renamed gradient", (double)h[v][j], (double)g[v][from],
                               GRADIENT_LIMIT * largest(b.n[v], g[v]));
                }
            grads_free(g), grads_free(h), batch_free(&b), batch_free(&r);
        }
}

static void test_a_constant_in_the_logits(void) {
    int moved = 0;
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        if (!(c->by & BY(Z))) continue;
        batch b = shape_batch(2);
        float *g[VARS];
        double before = -1, after = -1;
        grads_new(&b, c->by, g);
        CHECK_OK(call(c, &b, 0.5f, &before, g));
        for (size_t t = 0; t < b.T && c->shift; t++) { /* no gradient that way */
            double sum = 0, size = 0;
            for (size_t e = 0; e < b.E; e++) sum += (double)g[Z][t * b.E + e], size += fabs((double)g[Z][t * b.E + e]);
            check_near(c, "sum of a token's gradient", sum, 0, GRADIENT_LIMIT * fmax(size, GRADIENT_FLOOR));
        }
        for (size_t t = 0; t < b.T; t++)
            for (size_t e = 0; e < b.E; e++) b.f[Z][t * b.E + e] += (float)(t + 1); /* exact but for a rounding */
        batch_statistics(&b);
        CHECK_OK(call(c, &b, 0.5f, &after, g));
        if (c->shift) check_near(c, "value with a constant", after, before, 4e-6 * fmax(fabs(before), 0.1));
        else moved += fabs(after - before) > 0.01;
        grads_free(g), batch_free(&b);
    }
    CHECK(moved == 3); /* z, load, redundancy look at the logits themselves */
}

/* ---- how they are called ---- */
static void test_same_bits(void) {
    for (int s = 0; s < SHAPES; s++)
        for (int i = 0; i < CASES; i++) {
            const loss_case *c = &cases[i];
            batch b = shape_batch(s);
            float *first[VARS], *g[VARS];
            int any = 0;
            grads_new(&b, c->by, first);
            FOR_EACH_ISA(isa) {
                grads_new(&b, c->by, g);
                batch_statistics(&b);
                CHECK_OK(call(c, &b, 0.3f, NULL, any ? g : first));
                for (int v = 0; any && v < VARS; v++)
                    if (g[v] && !CHECK_SAME(first[v], g[v], b.n[v])) printf("    %s\n", name_of(c));
                any = 1;
                grads_free(g);
            }
            grads_free(first), batch_free(&b);
        }
}

/* Gradients are added; value and gradients may each be NULL; twice the coefficient is twice the gradient. */
static void test_added(void) {
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        batch b = shape_batch(1);
        float *one[VARS], *two[VARS], *none[VARS] = {0}, *only[VARS] = {0};
        double value = -1, again = -2;
        grads_new(&b, c->by, one), grads_new(&b, c->by, two);
        CHECK_OK(call(c, &b, 0.5f, &value, one));
        CHECK_OK(call(c, &b, 0.5f, &again, none));
        CHECK(value == again);
        CHECK_OK(call(c, &b, 0.5f, NULL, none));
        CHECK_OK(call(c, &b, 0.5f, NULL, two));
        CHECK_OK(call(c, &b, 0.5f, NULL, two));
        for (int v = 0; v < VARS; v++)
            for (size_t j = 0; one[v] && j < b.n[v]; j++)
                check_near(c, "added twice", (double)two[v][j], 2 * (double)one[v][j],
                           GRADIENT_LIMIT * largest(b.n[v], one[v]));
        for (int v = 0; v < VARS; v++) { /* one gradient without the others */
            if (!one[v]) continue;
            memset(only, 0, sizeof only);
            only[v] = test_floats(b.n[v]);
            CHECK_OK(call(c, &b, 0.5f, NULL, only));
            CHECK_SAME(only[v], one[v], b.n[v]);
            free(only[v]);
        }
        for (int v = 0; v < VARS; v++)
            for (size_t j = 0; two[v] && j < b.n[v]; j++) two[v][j] = 0;
        CHECK_OK(call(c, &b, 0, &again, two)); /* the value alone */
        CHECK(value == again);
        for (int v = 0; v < VARS; v++)
            for (size_t j = 0; two[v] && j < b.n[v]; j++) CHECK(two[v][j] == 0);
        grads_free(one), grads_free(two), batch_free(&b);
    }
}

/* A teacher who says nothing, choices that are all dropped, loads and means of nothing, tokens without scores, numbers
 * whose squares are no floats: a loss of 0 there, and no gradient. */
static void check_nothing(moe_loss_kind kind, const batch *b, double want) {
    const loss_case *c = &cases[kind];
    float *g[VARS];
    double value = -1;
    grads_new(b, c->by, g);
    if (!CHECK_OK(call(c, b, 1, &value, g)) || !CHECK(value == want)) printf("        %s\n", moe_loss_name(kind));
    for (int v = 0; v < VARS; v++)
        for (size_t i = 0; g[v] && i < b->n[v]; i++) CHECK(g[v][i] == 0);
    grads_free(g);
}
static void test_nothing_to_count(void) {
    batch b = shape_batch(2);
    memset(b.teacher, 0xff, b.T * sizeof *b.teacher), memset(b.index, 0xff, b.T * b.k * sizeof *b.index);
    memset(b.code, 0xff, b.T * sizeof *b.code);
    check_nothing(MOE_LOSS_ORACLE, &b, 0);
    check_nothing(MOE_LOSS_PROTOTYPE_ALIGNMENT, &b, 0);
    check_nothing(MOE_LOSS_CODEBOOK, &b, 0);
    memset(b.sequence_load, 0, (b.T / b.sequence + 1) * b.E * sizeof *b.sequence_load);
    check_nothing(MOE_LOSS_SEQUENCE, &b, 0);
    for (size_t e = 0; e < b.E; e++) b.mean_prob[e] = b.mean_scores[e] = b.mean_weights[e] = 0;
    check_nothing(MOE_LOSS_IMPORTANCE, &b, 0);
    b.counted = 0;
    check_nothing(MOE_LOSS_RELU_L1, &b, 0);
    batch_free(&b);
    b = shape_batch(2);
    for (size_t i = 0; i < b.n[S]; i++) b.f[S][i] = 3e38f;
    check_nothing(MOE_LOSS_SEQUENCE, &b, 0);
    for (size_t i = 0; i < b.n[O]; i++) b.f[O][i] = i % 2 ? 1e30f : 1e-30f;
    check_nothing(MOE_LOSS_OUTPUT_ORTHOGONALITY, &b, 0);
    for (size_t i = 0; i < b.n[R]; i++) b.f[R][i] = 0;
    check_nothing(MOE_LOSS_PROTOTYPE_ALIGNMENT, &b, 1); /* 1 - cos, of columns that point nowhere */
    batch_free(&b);
}
static void test_no_tokens_and_one_expert(void) {
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        batch b = batch_new(4, 1, 1, 3, 1, 2, 1), empty;
        float *g[VARS], *none[VARS] = {0};
        double value = -1;
        grads_new(&b, c->by, g);
        CHECK_OK(call(c, &b, 1, &value, g));
        check_near(c, "value of one expert", value, c->want(&b), 4e-6 * fmax(fabs(value), 0.1));
        /* p is 1 whatever z is */
        for (size_t j = 0; g[Z] && c->shift && j < b.n[Z]; j++) CHECK_WITHIN(g[Z][j], 0, 1e-7);
        grads_free(g);
        empty = b;
        empty.T = empty.rows = 0;
        for (int v = 0; v < VARS; v++)
            if (v != R) empty.f[v] = NULL;
        empty.prob = NULL, empty.index = empty.teacher = empty.code = NULL,
        empty.load = empty.sequence_load = empty.rank_load = NULL;
        empty.mean_prob = empty.mean_scores = empty.mean_weights = empty.mean_selection = empty.rank_prob = NULL;
        value = -1;
        if (c->by & BY(R) && !(c->by & BY(X))) { batch_free(&b); continue; } /* no tokens there */
        CHECK_OK(call(c, &empty, 1, &value, none));
        CHECK(value == 0);
        batch_free(&b);
    }
}

/* Logits so far apart that probabilities are 0: every gradient is a number. */
static void test_extreme_logits(void) {
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        batch b = shape_batch(2);
        float *g[VARS];
        double value = NAN;
        for (size_t j = 0; j < b.n[Z]; j++) b.f[Z][j] = j % b.E == 0 ? 100 : j % b.E == 1 ? -100 : test_uniform(-1, 1);
        b.tau = 0.25;
        batch_statistics(&b);
        CHECK(b.mean_prob[1] == 0 && b.mean_prob[0] == 1);
        grads_new(&b, c->by, g);
        CHECK_OK(call(c, &b, 1, &value, g));
        if (!CHECK(isfinite(value))) printf("    %s\n", name_of(c));
        for (int v = 0; v < VARS; v++)
            for (size_t j = 0; g[v] && j < b.n[v]; j++)
                if (!CHECK(isfinite(g[v][j]))) printf("    %s\n", name_of(c));
        grads_free(g), batch_free(&b);
    }
    /* columns, outputs and scores of zeros have no direction */
    static const float zero[12] = {0};
    float g[12] = {0}, g2[12] = {0};
    double v = -1;
    static const int32_t index[3] = {0, 1, 2};
    uint64_t load[3] = {1, 2, 3};
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = a.d_model = a.sequence = 4, a.n_experts = 3, a.load = load, a.index = index;
    a.logits = a.router = a.scores = a.outputs = a.latent = zero,
    a.d_logits = a.d_router = a.d_scores = a.d_outputs = g;
    CHECK_OK(moe_loss(MOE_LOSS_REDUNDANCY, &a, 1, &v)), CHECK(v == 0);
    CHECK_OK(moe_loss(MOE_LOSS_PROTOTYPE_ORTHOGONALITY, &a, 1, &v)), CHECK(v == 0);
    CHECK_OK(moe_loss(MOE_LOSS_DIVERSE_SIMPLE, &a, 1, &v)), CHECK_NEAR(v, sqrt(3.0), 1e-12);
    CHECK_OK(moe_loss(MOE_LOSS_SEQUENCE, &a, 1, &v)), CHECK(v == 0);
    a.n_tokens = 3, a.top_k = 1, a.d_latent = g, a.d_router = g2;
    CHECK_OK(moe_loss(MOE_LOSS_PROTOTYPE_ALIGNMENT, &a, 1, &v)), CHECK(v == 1);
    a.n_tokens = 2, a.top_k = 2, a.d_model = 3;
    CHECK_OK(moe_loss(MOE_LOSS_OUTPUT_ORTHOGONALITY, &a, 1, &v)), CHECK(v == 0);
    for (int i = 0; i < 12; i++) CHECK(g[i] == 0 && g2[i] == 0);
}

/* ---- statistics of a larger batch ---- */
/* Two halves, each with half the coefficient, with the loads and means of the whole: the gradients are those
 * of the whole. */
static void test_global_batch(void) {
    enum { T = 10, E = 6, K = 2, D = 3, HALF = T / 2 };
    batch b = batch_new(T, E, K, 3, D, T, 0.8);
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        unsigned rows = BY(Z) | BY(S) | BY(W) | BY(STD) | BY(THR);
        if (!(c->by & rows) || c->kind == MOE_LOSS_REDUNDANCY || c->kind == MOE_LOSS_ORACLE ||
            c->kind == MOE_LOSS_SEQUENCE)
            continue;
        float *whole[VARS], *parts[VARS];
        double value = -1, part = -1;
        grads_new(&b, c->by, whole), grads_new(&b, c->by, parts);
        CHECK_OK(call(c, &b, 0.5f, &value, whole));
        for (size_t half = 0; half < 2; half++) {
            batch h = b;
            float *g[VARS];
            h.T = HALF;
            h.prob += half * HALF * E, h.index += half * HALF * K;
            for (int v = 0; v < VARS; v++) {
                g[v] = parts[v] ? parts[v] + half * b.n[v] / 2 : NULL;
                if (rows & BY(v)) h.f[v] += half * b.n[v] / 2;
            }
            moe_loss_args a = args_of(c, &h, g);
            if (c->kind == MOE_LOSS_COMMUNICATION) a.counted = T; /* the tokens that the counts are of */
            CHECK_OK(moe_loss(c->kind, &a, 0.25f, &part));
        }
        for (int v = 0; v < VARS; v++)
            for (size_t j = 0; whole[v] && j < b.n[v]; j++)
                check_near(c, "two halves", (double)parts[v][j], (double)whole[v][j],
                           GRADIENT_LIMIT * largest(b.n[v], whole[v]));
        grads_free(whole), grads_free(parts);
    }
    batch_free(&b);
}

static void test_statistics(void) {
    static const int32_t index[10] = {0, 1, 2, -1, 3, 0, 1, 0, 3, 2}; /* 5 tokens, 2 choices */
    static const float weight[10] = {0.5f, 0.25f, 1, 9, 0.5f, 0.5f, 0.25f, 0.75f, 1, 0.5f};
    static const float loss[6] = {3, 1, 1, 2, 2, 0.5f};
    uint64_t load[12];
    double mean[4];
    int32_t teacher[2];
    CHECK_OK(moe_sequence_load(5, 4, 2, 2, index, load));
    static const uint64_t want[12] = {1, 1, 1, 0, 2, 1, 0, 1, 0, 0, 1, 1};
    CHECK(!memcmp(load, want, sizeof want));
    CHECK_OK(moe_mean_weights(5, 4, 2, index, weight, mean));
    CHECK(mean[0] == 1.75 / 5 && mean[1] == 0.5 / 5 && mean[2] == 1.5 / 5 && mean[3] == 1.5 / 5);
    static const int32_t dropped[4] = {-1, 0, 1, -1};
    CHECK_OK(moe_rank_tokens(2, 4, 2, 2, dropped, load));
    CHECK(load[0] == 2 && load[1] == 0);
    for (int e = 0; e < 4; e++) mean[e] = 1; /* of no tokens */
    CHECK_OK(moe_mean_weights(0, 4, 2, NULL, NULL, mean));
    CHECK(mean[0] == 0 && mean[3] == 0);
    mean[0] = 1;
    CHECK_OK(moe_mean_selection(0, 2, NULL, NULL, NULL, mean));
    CHECK(mean[0] == 0 && mean[1] == 0);
    CHECK_OK(moe_sequence_load(0, 4, 2, 2, NULL, NULL));
    CHECK_OK(moe_teacher_best(0, 3, NULL, NULL));
    CHECK_OK(moe_teacher_best(2, 3, loss, teacher));
    CHECK(teacher[0] == 1 && teacher[1] == 2);
    static const float z[2] = {1, 2}, std[2] = {1, 0.5f}, thr[2] = {1, 1}; /* Phi(0), Phi(2) */
    CHECK_OK(moe_mean_selection(1, 2, z, std, thr, mean));
    CHECK_NEAR(mean[0], 0.5, 1e-7), CHECK_NEAR(mean[1], 0.97724986805, 2e-7);
}

/* ---- bad input ---- */
/* Nothing that is needed may be missing or wrong: each pointer and each number in turn, for every loss that has it. */
static void test_arguments(void) {
    static const float wild[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        batch b = shape_batch(2), bad;
        float *g[VARS];
        double value = -1;
        grads_new(&b, c->by, g);
        for (int j = 0; j < 3; j++) CHECK_STATUS(call(c, &b, wild[j], &value, g), MOE_E_COEFFICIENT);
#define NULLED(field, status)                                                  \
    do {                                                                       \
        bad = b, bad.field = NULL;                                             \
        moe_status s = call(c, &bad, 1, &value, g);                            \
        if (s != MOE_OK) CHECK_STATUS(s, status), refused++;                   \
        else needless++;                                                       \
    } while (0)
        int refused = 0, needless = 0;
        NULLED(prob, MOE_E_NULL_PROB);
        NULLED(load, MOE_E_NULL_LOAD);
        NULLED(sequence_load, MOE_E_NULL_LOAD);
        NULLED(rank_load, MOE_E_NULL_LOAD);
        NULLED(rank_tokens, MOE_E_NULL_LOAD);
        NULLED(mean_prob, MOE_E_NULL_MEAN);
        NULLED(mean_scores, MOE_E_NULL_MEAN);
        NULLED(mean_weights, MOE_E_NULL_MEAN);
        NULLED(mean_selection, MOE_E_NULL_MEAN);
        NULLED(rank_prob, MOE_E_NULL_MEAN);
        NULLED(index, MOE_E_NULL_INDEX);
        NULLED(code, MOE_E_NULL_INDEX);
        NULLED(teacher, MOE_E_NULL_TEACHER);
        NULLED(f[Z], MOE_E_NULL_LOGITS);
        NULLED(f[S], MOE_E_NULL_SCORES);
        NULLED(f[STD], MOE_E_NULL_NOISE);
        NULLED(f[THR], MOE_E_NULL_NOISE);
        NULLED(f[R], MOE_E_NULL_ROUTER);
        NULLED(f[LV], MOE_E_NULL_LATENT);
        NULLED(f[O], MOE_E_NULL_OUTPUTS);
        NULLED(f[C], MOE_E_NULL_CODEBOOK);
        NULLED(f[V], MOE_E_NULL_MATRIX);
        NULLED(f[X], c->kind == MOE_LOSS_CODEBOOK ? MOE_E_NULL_X : MOE_E_NULL_LATENT);
        CHECK(refused >= 1 && refused <= 5 && refused + needless == 23);
        grads_free(g), grads_new(&b, c->by, g); /* the calls that did not need it have added */
        static const moe_status nan_of[VARS] = {MOE_E_NAN_LOGITS,   MOE_E_NAN_SCORES, MOE_E_NOISE_VALUE,
                                                MOE_E_NOISE_VALUE,  MOE_OK,           MOE_E_NAN_ROUTER,
                                                MOE_E_NAN_LATENT,   MOE_E_NAN_LATENT, MOE_E_NAN_OUTPUTS,
                                                MOE_E_NAN_CODEBOOK, MOE_E_NAN_MATRIX};
        for (int v = 0; v < VARS; v++) {
            int direct = c->by & BY(v) && !(v == Z && c->shift) && v != W; /* read, not through prob */
            for (int j = 0; j < 3 && direct; j++) {
                float keep = b.f[v][b.n[v] / 2];
                b.f[v][b.n[v] / 2] = wild[j];
                CHECK_STATUS(call(c, &b, 1, &value, g),
                             v == X && c->kind == MOE_LOSS_CODEBOOK ? MOE_E_NAN_X : nan_of[v]);
                b.f[v][b.n[v] / 2] = keep;
            }
        }
        if (c->shift) { /* through prob */
            b.prob[3] = NAN;
            CHECK_STATUS(call(c, &b, 1, &value, g), MOE_E_NAN_PROB);
            b.prob[3] = 0.1f;
            bad = b, bad.tau = -1, CHECK_STATUS(call(c, &bad, 1, &value, g), MOE_E_TEMPERATURE);
            bad = b, bad.E = 0, CHECK_STATUS(call(c, &bad, 1, &value, g), MOE_E_N_EXPERTS);
            bad = b, bad.E = ((size_t)1 << 20) + 1, CHECK_STATUS(call(c, &bad, 1, &value, g), MOE_E_N_EXPERTS);
            bad = b, bad.T = SIZE_MAX / 2, CHECK_STATUS(call(c, &bad, 1, &value, g), MOE_E_OVERFLOW);
        }
        for (int v = 0; v < VARS; v++)
            /* nothing was added on the way to an error */
            for (size_t j = 0; g[v] && j < b.n[v]; j++) CHECK(g[v][j] == 0);
        grads_free(g), batch_free(&b);
    }
}

/* One thing wrong in the arguments of one loss. */
#define WRONG(KIND, change, status)                                           \
    do {                                                                      \
        moe_loss_args a = args_of(&cases[MOE_LOSS_##KIND], b, g);             \
        change;                                                               \
        CHECK_STATUS(moe_loss(MOE_LOSS_##KIND, &a, 1, &v), status);           \
    } while (0)
static void test_other_arguments(void) {
    batch own = shape_batch(2);
    const batch *b = &own;
    float zeros[64] = {0}, *g[VARS];
    double v = -1, keep;
    uint64_t out[64];
    double means[64];
    for (int i = 0; i < VARS; i++) g[i] = zeros;
    CHECK_STATUS(moe_loss(MOE_LOSS_COUNT, NULL, 1, &v), MOE_E_LOSS_KIND);
    CHECK_STATUS(moe_loss((moe_loss_kind)-1, NULL, 1, &v), MOE_E_LOSS_KIND);
    CHECK_STATUS(moe_loss(MOE_LOSS_Z, NULL, 1, &v), MOE_E_NULL_INPUT);
#define RANKS(n, status)                                                              \
    WRONG(RANK, a.n_ranks = n, status);                                               \
    WRONG(COMMUNICATION, a.n_ranks = n, status);                                      \
    WRONG(LOCALITY, (a.n_ranks = n, a.home = 0), status);                             \
    CHECK_STATUS(moe_rank_load(b->E, n, b->load, out), status);                       \
    CHECK_STATUS(moe_rank_tokens(b->T, b->E, b->k, n, b->index, out), status);        \
    CHECK_STATUS(moe_rank_prob(b->E, n, b->mean_prob, means), status);
    RANKS(0, MOE_E_RANKS)
    RANKS(4, MOE_E_RANKS) /* 6 experts */
    RANKS(7, MOE_E_RANKS)
    WRONG(COMMUNICATION, a.rank_limit = 0, MOE_E_RANK_LIMIT);
    WRONG(COMMUNICATION, a.rank_limit = 4, MOE_E_RANK_LIMIT);
    WRONG(LOCALITY, a.home = 3, MOE_E_HOME);
    WRONG(LOCALITY, a.smoothing = 0, MOE_E_SMOOTHING);
    WRONG(LOCALITY, a.smoothing = 1, MOE_E_SMOOTHING);
    WRONG(LOCALITY, a.smoothing = NAN, MOE_E_SMOOTHING);
    WRONG(SEQUENCE, a.sequence = 0, MOE_E_SEQUENCE);
    CHECK_STATUS(moe_sequence_load(b->T, b->E, b->k, 0, b->index, out), MOE_E_SEQUENCE);
    CHECK_STATUS(moe_sequence_load(b->T, b->E, 0, 1, b->index, out), MOE_E_TOP_K);
    CHECK_STATUS(moe_sequence_load(b->T, b->E, b->E + 1, 1, b->index, out), MOE_E_TOP_K);
    WRONG(RELU_L1, a.top_k = 0, MOE_E_TOP_K);
    WRONG(RELU_L1, a.top_k = b->E + 1, MOE_E_TOP_K);
    WRONG(VARIANCE, a.temperature = -1, MOE_E_TEMPERATURE);
    WRONG(SIMBAL, a.d_model = 0, MOE_E_D_MODEL);
    WRONG(ORTHONORMAL, a.d_ff = 0, MOE_E_D_FF);
    WRONG(CODEBOOK, a.commitment = -1, MOE_E_COMMITMENT);
    WRONG(CODEBOOK, a.commitment = INFINITY, MOE_E_COMMITMENT);
    WRONG(CODEBOOK, a.n_codes = 0, MOE_E_CODE);
    WRONG(OUTPUT_ORTHOGONALITY, a.top_k = 0, MOE_E_TOP_K);
    WRONG(OUTPUT_ORTHOGONALITY, (a.n_tokens = SIZE_MAX / 2, a.top_k = a.d_model = 2), MOE_E_OVERFLOW);
    WRONG(LATENT_KL, (a.n_tokens = SIZE_MAX / 2, a.d_model = 3), MOE_E_OVERFLOW);
    CHECK_STATUS(moe_mean_scores(b->T, b->E, b->f[S], NULL), MOE_E_NULL_MEAN);
    CHECK_STATUS(moe_mean_weights(b->T, b->E, b->k, b->index, b->f[W], NULL), MOE_E_NULL_MEAN);
    CHECK_STATUS(moe_mean_weights(b->T, b->E, 0, b->index, b->f[W], means), MOE_E_TOP_K);
    CHECK_STATUS(moe_mean_selection(b->T, b->E, b->f[Z], b->f[STD], b->f[THR], NULL), MOE_E_NULL_MEAN);
    CHECK_STATUS(moe_sequence_load(b->T, b->E, b->k, 1, b->index, NULL), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_rank_load(b->E, b->D, b->load, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_rank_tokens(b->T, b->E, b->k, b->D, b->index, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_rank_prob(b->E, b->D, b->mean_prob, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_teacher_best(b->T, 0, b->f[S], own.teacher), MOE_E_N_EXPERTS);
    keep = (double)own.f[W][2];
    own.f[W][2] = NAN;
    CHECK_STATUS(moe_mean_weights(b->T, b->E, b->k, b->index, own.f[W], means), MOE_E_NAN_WEIGHT);
    own.f[W][2] = (float)keep;
    CHECK_STATUS(moe_mean_weights(b->T, b->E, b->k, b->index, NULL, means), MOE_E_NULL_WEIGHT);
    CHECK_STATUS(moe_teacher_best(b->T, b->E, b->f[S], NULL), MOE_E_NULL_TEACHER);
    own.index[3] = 6, CHECK_STATUS(moe_sequence_load(own.T, own.E, own.k, 1, own.index, out), MOE_E_INDEX);
    WRONG(IMPORTANCE_SELECTED, (void)a, MOE_E_INDEX);
    own.teacher[3] = 6;
    WRONG(ORACLE, (void)a, MOE_E_TEACHER);
    own.f[S][3] = -0.1f;
    WRONG(SEQUENCE, (void)a, MOE_E_NAN_SCORES);
    own.f[STD][3] = 0,
    CHECK_STATUS(moe_mean_selection(own.T, own.E, own.f[Z], own.f[STD], own.f[THR], means), MOE_E_NOISE_VALUE);
    keep = own.mean_prob[1];
    own.mean_prob[1] = -0.1;
    WRONG(KL_UNIFORM, (void)a, MOE_E_NAN_MEAN);
    own.mean_prob[1] = (double)NAN;
    WRONG(IMPORTANCE, (void)a, MOE_E_NAN_MEAN);
    own.mean_prob[1] = HUGE_VAL;
    WRONG(IMPORTANCE, (void)a, MOE_E_NAN_MEAN);
    own.mean_prob[1] = keep;
    own.f[LV][0] = 200;
    WRONG(LATENT_KL, (void)a, MOE_E_NAN_LATENT);
    for (int i = 0; i < 64; i++) CHECK(zeros[i] == 0);
    /* loads of nothing say nothing */
    memset(own.load, 0, own.E * sizeof *own.load), memset(own.sequence_load, 0, own.E * sizeof *own.load);
    CHECK_OK(call(&cases[MOE_LOSS_SWITCH], &own, 1, &v, g)), CHECK(v == 0);
    for (int i = 0; i < 64; i++) CHECK(zeros[i] == 0);
    batch_free(&own);
}

/* ---- the layer ---- */
static double within(const char *name, const float *got, const float *want, size_t n) {
    double top = 1e-3, off = 0;
    for (size_t i = 0; i < n; i++)
        top = fmax(top, fabs((double)want[i])), off = fmax(off, fabs((double)got[i] - (double)want[i]));
    if (!CHECK(off <= GRADIENT_LIMIT * top)) printf("    %s: %.3g of %.3g\n", name, off, top);
    return top;
}
/* A layer with one loss and no other gradient: its router gets what the level-1 function says. A loss that the layer
 * cannot add is refused before anything is changed. */
static void test_layer(void) {
    enum { T = 9, E = 6, K = 2, WIDTH = 5 };
    int added = 0;
    for (int i = 0; i < CASES; i++) {
        const loss_case *c = &cases[i];
        moe_desc d;
        moe_layer *m = NULL;
        float x[T * WIDTH], y[T * WIDTH], dy[T * WIDTH] = {0}, got[WIDTH * E], want[WIDTH * E] = {0};
        memset(&d, 0, sizeof d);
        d.d_model = WIDTH, d.d_ff = 4, d.n_experts = E, d.top_k = K, d.temperature = 0.75f, d.loss[c->kind] = 0.5f;
        /* these see the weights, the sequences, a teacher, the outputs: test_layer_sequences_and_ranks and
         * tests/systems.c have them in layers of their own */
        if (c->kind == MOE_LOSS_IMPORTANCE_SELECTED || c->kind == MOE_LOSS_SEQUENCE || c->kind == MOE_LOSS_ORACLE ||
            c->kind == MOE_LOSS_OUTPUT_ORTHOGONALITY)
            continue;
        moe_status fits = moe_layer_new(&m, &d);
        if (moe_status_kind(fits) == MOE_KIND_SUPPORT) continue; /* a layer lacks what it needs */
        if (!CHECK_OK(fits)) continue;
        test_fill(x, T * WIDTH, -1, 1);
        CHECK_OK(moe_forward(m, x, T, y));
        moe_status s = moe_backward(m, dy, NULL);
        CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", got, WIDTH * E));
        CHECK_OK(s);
        const moe_tape *t = moe_layer_tape(m);
        batch b = batch_new(T, E, K, WIDTH, 3, 3, 0.75);
        float *g[VARS];
        double value = -1;
        memcpy(b.f[Z], t->logits, sizeof(float) * T * E), memcpy(b.f[S], t->prob, sizeof(float) * T * E);
        CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "router", b.f[R], WIDTH * E));
        memcpy(b.index, t->index, sizeof(int32_t) * T * K), memcpy(b.load, t->routes.load, sizeof(uint64_t) * E);
        batch_statistics(&b);
        CHECK_SAME(b.prob, t->prob, T * E);
        grads_new(&b, c->by | BY(Z), g);
        CHECK_OK(call(c, &b, 0.5f, &value, g));
        CHECK(t->loss[c->kind] == value);
        if (g[S]) CHECK_OK(moe_softmax_backward(T, E, 0.75f, b.prob, g[S], g[Z]));
        for (size_t w = 0; w < WIDTH; w++)
            for (size_t e = 0; e < E; e++) {
                double sum = g[R] ? (double)g[R][w * E + e] : 0;
                for (size_t j = 0; j < T; j++) sum += (double)x[j * WIDTH + w] * (double)g[Z][j * E + e];
                want[w * E + e] = (float)sum;
            }
        if (CHECK(within(name_of(c), got, want, WIDTH * E) > 1e-3)) added++;
        double values[MOE_LOSS_COUNT], weighted[MOE_LOSS_COUNT];
        CHECK_OK(moe_layer_losses(m, values, weighted));
        for (int l = 0; l < MOE_LOSS_COUNT; l++)
            CHECK(values[l] == (l == i ? value : 0) && weighted[l] == 0.5 * values[l]);
        grads_free(g), batch_free(&b), moe_layer_free(m);
    }
    CHECK(added >= 15);
}

/* The same in double for those that see sequences or ranks, at temperatures other than 1: the value of the router's
 * columns with the choices held, the gradient by central differences. M of communication is at most k. */
enum { LAYER_T = 11, LAYER_E = 6, LAYER_D = 5 };
static double layer_share(const moe_desc *d, const double *router, const float *x, size_t t, size_t e) { /* s / sum s */
    double all = 0, own = 0;
    for (size_t j = 0; j < LAYER_E; j++) {
        double z = 0;
        for (size_t i = 0; i < LAYER_D; i++) z += (double)x[t * LAYER_D + i] * router[i * LAYER_E + j];
        double s = exp(z / (double)d->temperature);
        if (d->gate == MOE_GATE_SIGMOID) s /= 1 + s;
        all += s;
        if (j == e) own = s;
    }
    return own / all;
}
static double layer_loss(moe_loss_kind kind, const moe_tape *t, const moe_desc *d, const double *router,
                         const float *x) {
    size_t T = LAYER_T, length = kind == MOE_LOSS_SEQUENCE ? d->sequence : T, n = (T + length - 1) / length;
    size_t groups = kind == MOE_LOSS_SEQUENCE ? LAYER_E : d->n_ranks, width = LAYER_E / groups;
    double sum = 0;
    for (size_t begin = 0; begin < T; begin += length) {
        size_t end = begin + length < T ? begin + length : T;
        for (size_t g = 0; g < groups; g++) {
            double tokens = 0, P = 0, whole = (double)((end - begin) * d->top_k); /* tokens: choices, or tokens sent */
            for (size_t i = begin; i < end; i++) {
                size_t here = 0;
                for (size_t c = 0; c < d->top_k; c++) here += (size_t)t->index[i * d->top_k + c] / width == g;
                tokens += (double)(kind == MOE_LOSS_COMMUNICATION && here ? 1 : here);
                for (size_t e = g * width; e < (g + 1) * width; e++)
                    P += layer_share(d, router, x, i, e) / (double)(end - begin);
            }
            if (kind == MOE_LOSS_COMMUNICATION) whole = (double)T * fmin((double)groups, (double)d->top_k);
            sum += (double)groups * tokens / whole * P / (double)n;
        }
    }
    return sum;
}
static void check_layer_loss(moe_loss_kind kind, const char *set) {
    moe_desc d;
    moe_layer *m = NULL;
    float x[LAYER_T * LAYER_D], y[LAYER_T * LAYER_D], dy[LAYER_T * LAYER_D] = {0}, got[LAYER_D * LAYER_E];
    double router[LAYER_D * LAYER_E], top = 0, off = 0;
    memset(&d, 0, sizeof d);
    d.d_model = LAYER_D, d.d_ff = 4, d.n_experts = LAYER_E, d.top_k = 2, d.loss[kind] = 1;
    if (!CHECK_OK(moe_desc_parse(&d, set, NULL)) || !CHECK_OK(moe_layer_new(&m, &d))) return;
    test_fill(x, LAYER_T * LAYER_D, -2, 2);
    CHECK_OK(moe_forward(m, x, LAYER_T, y));
    CHECK_OK(moe_backward(m, dy, NULL));
    CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, "router", got, LAYER_D * LAYER_E));
    for (size_t i = 0; i < LAYER_D * LAYER_E; i++) router[i] = (double)got[i];
    CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, "router", got, LAYER_D * LAYER_E));
    const moe_tape *t = moe_layer_tape(m);
    const moe_desc *full = moe_layer_desc(m);
    double want = layer_loss(kind, t, full, router, x);
    if (!CHECK(fabs(t->loss[kind] - want) <= 1e-6 * want)) printf("    %s: %.9g, not %.9g\n", set, t->loss[kind], want);
    for (size_t i = 0; i < LAYER_D * LAYER_E; i++) {
        double h = 1e-5, keep = router[i], side[2];
        for (int k = 0; k < 2; k++) router[i] = keep + (k ? h : -h), side[k] = layer_loss(kind, t, full, router, x);
        router[i] = keep;
        double slope = (side[1] - side[0]) / (2 * h);
        top = fmax(top, fabs(slope)), off = fmax(off, fabs((double)got[i] - slope));
    }
    if (!CHECK(top > 1e-3 && off <= GRADIENT_LIMIT * top)) printf("    %s: %.3g of %.3g\n", set, off, top);
    moe_layer_free(m);
}
static void test_layer_sequences_and_ranks(void) {
    static const char *const sequences[] = {"sequence=4 temperature=0.5", "sequence=11 temperature=3",
                                            "sequence=3 temperature=0.25 top_k=3 gate=softmax-selected",
                                            "sequence=4 temperature=0.5 gate=sigmoid",
                                            "sequence=2 temperature=2 gate=sigmoid top_k=1 normalize=false"};
    static const char *const ranks[] = {"n_ranks=3 temperature=0.5", "n_ranks=2 top_k=3 temperature=2", "n_ranks=6",
                                        "n_ranks=3 top_k=1"}; /* k below, above, below and far below the ranks */
    test_seed = 2; /* where no rank has exactly its share, of which the slope is nothing */
    for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) check_layer_loss(MOE_LOSS_SEQUENCE, sequences[i]);
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
        check_layer_loss(MOE_LOSS_COMMUNICATION, ranks[i]);
        check_layer_loss(MOE_LOSS_RANK, ranks[i]);
    }
}

/* ---- the table in docs/math.md ---- */
/* The rows of a table of `columns` cells whose first is a name in backquotes: its cells, trimmed. */
static int table_row(const char *line, char cell[8][400], int columns) {
    if (strncmp(line, "| `", 3)) return 0;
    for (int i = 0; i < columns; i++) {
        const char *end = strstr(line + 1, i + 1 < columns ? " | " : " |");
        if (!end || end - line - 2 >= 400 || end < line + 2) return 0;
        memcpy(cell[i], line + 2, (size_t)(end - line - 2));
        cell[i][end - line - 2] = 0;
        line = end + 1;
    }
    return 1;
}
static const moe_info *loss_info(int i) { return moe_loss_info((moe_loss_kind)i); }
static const moe_info *control_info(int i) { return moe_control_info((moe_control_kind)(i + 1)); }
/* The table after the line `head`: as many rows as there are infos, in order. column: of formula,
 * coefficient, source. */
static void check_table(const char *head, const moe_info *(*info)(int), int count, int columns, const int column[3]) {
    char line[2000], cell[8][400], want[400];
    int on = 0, rows = 0;
    FILE *f = fopen("docs/math.md", "r");
    if (!f) f = fopen("../docs/math.md", "r");
    if (!CHECK(f != NULL)) return;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, head)) { on = 1; continue; }
        if (!on || !strncmp(line, "| ---", 5)) continue;
        if (line[0] != '|') break;
        if (!CHECK(table_row(line, cell, columns))) { printf("    %s\n", line); continue; }
        const moe_info *row = rows < count ? info(rows) : NULL;
        rows++;
        if (!CHECK(row != NULL)) break;
        snprintf(want, sizeof want, "`%s`", row->name);
        if (strcmp(cell[0], want)) CHECK(!"name"), printf("    %s, not %s\n", cell[0], want);
        snprintf(want, sizeof want, "`%s`", row->formula);
        if (strcmp(cell[column[0]], want))
            CHECK(!"formula"), printf("    %s: %s, not %s\n", row->name, cell[column[0]], want);
        if (row->coefficient > 0) snprintf(want, sizeof want, "%g", (double)row->coefficient);
        else snprintf(want, sizeof want, "-");
        if (strcmp(cell[column[1]], want))
            CHECK(!"coefficient"), printf("    %s: %s, not %s\n", row->name, cell[column[1]], want);
        snprintf(want, sizeof want, "%s [%s]", row->source, row->mark);
        if (strcmp(cell[column[2]], want))
            CHECK(!"source"), printf("    %s: %s, not %s\n", row->name, cell[column[2]], want);
    }
    fclose(f);
    CHECK(rows == count);
}
static void test_document(void) {
    static const int of_loss[3] = {1, 3, 4}, of_control[3] = {1, 2, 3};
    static const char *const head = "| loss | value | gradient | usual coefficient | source | as whose code |";
    check_table(head, loss_info, MOE_LOSS_COUNT, 6, of_loss);
    check_table("| controller | update | usual rate | source |", control_info, MOE_CONTROL_COUNT - 1, 4, of_control);
    CHECK(moe_loss_info(MOE_LOSS_COUNT) == NULL && moe_loss_info((moe_loss_kind)-1) == NULL);
    for (int i = 0; i < MOE_LOSS_COUNT; i++) {
        const moe_info *info = loss_info(i);
        CHECK(info->name == moe_loss_name((moe_loss_kind)i) && info->formula[0] && info->source[0]);
        CHECK(strlen(info->mark) == 1 && strchr("PCSKD", info->mark[0]) && info->coefficient >= 0);
    }
}

/* At its declaration each loss has the mark of its row. */
static void test_marks(void) {
    char line[256], want[8];
    int on = 0, rows = 0;
    FILE *f = fopen("moe.h", "r");
    if (!f) f = fopen("../moe.h", "r");
    if (!CHECK(f != NULL)) return;
    while (fgets(line, sizeof line, f) && strncmp(line, "    MOE_LOSS_COUNT\n", 19)) {
        on |= !strncmp(line, "typedef enum moe_loss_kind {", 28);
        if (!on || strncmp(line, "    MOE_LOSS_", 13)) continue;
        snprintf(want, sizeof want, "[%s] */", rows < MOE_LOSS_COUNT ? loss_info(rows)->mark : "?");
        const char *mark = strchr(line, '[');
        if (!CHECK(mark && !strncmp(mark, want, 6))) printf("    %s    has not %s\n", line, want);
        rows++;
    }
    fclose(f);
    CHECK(rows == MOE_LOSS_COUNT);
}

/* ---- the two losses of most layers once more, with their statistics made here ---- */
static moe_status loss_switch(size_t T, size_t E, float temperature, const float *prob, const uint64_t *load,
                              float coefficient, double *value, float *d_logits) {
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = T, a.n_experts = E, a.temperature = temperature, a.prob = prob, a.load = load, a.d_logits = d_logits;
    return moe_loss(MOE_LOSS_SWITCH, &a, coefficient, value);
}
static moe_status loss_z(size_t T, size_t E, const float *logits, float coefficient, double *value, float *d_logits) {
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = T, a.n_experts = E, a.logits = logits, a.d_logits = d_logits;
    return moe_loss(MOE_LOSS_Z, &a, coefficient, value);
}

static void test_switch_and_z_closed_forms(void) {
    enum { T = 6, E = 4 };
    float p[T * E], z[T * E] = {0};
    uint64_t load[E] = {3, 3, 3, 3};
    double value = 0;
    for (int i = 0; i < T * E; i++) p[i] = 0.25f;
    CHECK_OK(loss_switch(T, E, 1, p, load, 0.5f, &value, NULL));
    CHECK_NEAR(value, 1, 1e-7);
    load[0] = 12, load[1] = load[2] = load[3] = 0; /* uniform p: the load does not matter */
    CHECK_OK(loss_switch(T, E, 1, p, load, 0.5f, &value, NULL));
    CHECK_NEAR(value, 1, 1e-7);
    for (int i = 0; i < T * E; i++) p[i] = i % E == 0; /* all on one: E */
    CHECK_OK(loss_switch(T, E, 1, p, load, 1, &value, NULL));
    CHECK_NEAR(value, 4, 1e-7);
    CHECK_OK(loss_z(T, E, z, 0.5f, &value, NULL));
    CHECK_NEAR(value, log(4) * log(4), 1e-7);
    for (int i = 0; i < T * E; i++) z[i] = -(float)log(4);
    CHECK_OK(loss_z(T, E, z, 1, &value, NULL));
    CHECK_WITHIN(value, 0, 1e-12);
    CHECK_OK(loss_z(T, E, z, 1, NULL, NULL));
    CHECK_OK(loss_switch(T, E, 1, p, load, 1, NULL, NULL));
    value = 7; /* no tokens: nothing to be said, and no division by zero */
    CHECK_OK(loss_z(0, E, NULL, 1, &value, NULL));
    CHECK(value == 0);
    uint64_t none[E] = {0};
    CHECK_OK(loss_switch(0, E, 1, NULL, none, 1, &value, NULL));
    CHECK(value == 0);
}

/* E sum f P with f = load / sum(load), in double; P from logits */
static double switch_of(size_t T, size_t E, double tau, const double *z, const uint64_t *load) {
    double sum = 0, total = 0, *p = test_doubles(E);
    for (size_t e = 0; e < E; e++) total += (double)load[e];
    for (size_t t = 0; t < T; t++) {
        oracle_softmax(E, z + t * E, tau, p);
        for (size_t e = 0; e < E; e++) sum += (double)E * (double)load[e] / total * p[e] / (double)T;
    }
    free(p);
    return sum;
}

static double z_of(size_t T, size_t E, const double *z) {
    double sum = 0, *p = test_doubles(E);
    for (size_t t = 0; t < T; t++) {
        double lse = oracle_softmax(E, z + t * E, 1, p);
        sum += lse * lse / (double)T;
    }
    free(p);
    return sum;
}

static void switch_and_z_case(size_t T, size_t E, double tau) {
    size_t n = T * E;
    const double h = 1e-4;
    float *z = test_floats(n), *p = test_floats(n), *ds = test_floats(n), *dz = test_floats(n);
    double *zd = test_doubles(n), value;
    uint64_t *load = (uint64_t *)test_memory(E, sizeof *load);
    test_fill(z, n, -2, 2);
    for (size_t i = 0; i < n; i++) zd[i] = z[i];
    for (size_t i = 0; i < 3 * T; i++) load[test_below(E)]++; /* any counts, also of other micro-batches */
    CHECK_OK(moe_softmax(T, E, (float)tau, z, p));
    FOR_EACH_ISA(isa) {
        memset(ds, 0, n * sizeof *ds), memset(dz, 0, n * sizeof *dz);
        CHECK_OK(loss_switch(T, E, (float)tau, p, load, 0.5f, &value, ds));
        CHECK_NEAR(value, switch_of(T, E, tau, zd, load), 6e-7);
        CHECK_OK(loss_z(T, E, z, 0.25f, &value, dz));
        CHECK_NEAR(value, z_of(T, E, zd), 8e-7);
        for (size_t i = 0; i < n; i++) {
            double keep = zd[i], slope[2] = {0, 0};
            for (int side = -1; side <= 1; side += 2) {
                zd[i] = keep + side * h;
                slope[0] += side * 0.5 * switch_of(T, E, tau, zd, load) / (2 * h);
                slope[1] += side * 0.25 * z_of(T, E, zd) / (2 * h);
            }
            zd[i] = keep;
            CHECK_WITHIN(ds[i], slope[0], 1e-6 / (double)T);
            CHECK_WITHIN(dz[i], slope[1], 2e-6 / (double)T);
        }
    }
    float *added = test_floats(n); /* added, not set */
    for (size_t i = 0; i < n; i++) added[i] = 1;
    CHECK_OK(loss_z(T, E, z, 0.25f, NULL, added));
    for (size_t i = 0; i < n; i++) CHECK_WITHIN(added[i] - 1, dz[i], 0x1p-23);
    free(z), free(p), free(ds), free(dz), free(zd), free(load), free(added);
}

static void test_switch_and_z_gradients(void) {
    switch_and_z_case(1, 2, 1);
    switch_and_z_case(5, 3, 0.5);
    switch_and_z_case(4, 8, 2);
    switch_and_z_case(3, 17, 1);
    switch_and_z_case(2, 33, 1.5);
}

/* ---- what a layer's losses are told from outside, and what they do without ---- */
static moe_desc layer_desc(const char *text) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = 6, d.d_ff = 5, d.n_experts = 6, d.top_k = 2, d.parallel.n_threads = 1;
    if (!CHECK_OK(moe_desc_parse(&d, text, NULL))) printf("        %s\n", text);
    return d;
}
/* The losses of a route and its backward at level 2, with weights of these parameters. */
static moe_status route_loss(const char *text, moe_loss_kind kind, moe_side side, double *loss, float *d_router) {
    enum { T = 8 };
    static float x[T * 6], router[10000], weights[20000];
    moe_desc d = layer_desc(text);
    moe_tape *t = NULL;
    size_t n = 0;
    uint64_t seed = test_seed;
    test_seed = 5;
    test_fill(x, T * 6, -1, 1), test_fill(router, 10000, -1, 1), test_fill(weights, 20000, -1, 1);
    test_seed = seed;
    if (!CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON)) || !CHECK_OK(moe_router_count(&d, &n))) return MOE_OK;
    CHECK(n <= 10000);
    if (side.experts) side.experts = weights;
    t->side = side;
    memset(d_router, 0, 10000 * sizeof *d_router);
    CHECK_OK(moe_route(t, router, x, T));
    moe_status status = moe_route_backward(t, router, NULL, d_router, NULL);
    *loss = t->loss[kind];
    moe_tape_free(t);
    return status;
}
static void test_layer_from_outside(void) {
    static float grads[2][10000];
    static const float some = 1;
    moe_side plain, side;
    double loss[2];
    uint64_t tokens[3] = {0, 0, 0};
    memset(&plain, 0, sizeof plain);
    CHECK_OK(route_loss("n_ranks=3 loss.communication=0.5", MOE_LOSS_COMMUNICATION, plain, loss, grads[0]));
    side = plain, side.rank_tokens = tokens, side.counted = 8; /* whoever counts nothing, has no loss */
    CHECK_OK(route_loss("n_ranks=3 loss.communication=0.5", MOE_LOSS_COMMUNICATION, side, loss + 1, grads[1]));
    CHECK(loss[0] > 0 && loss[1] == 0);
    tokens[0] = tokens[1] = tokens[2] = 8;
    for (int counted = 0; counted < 2; counted++) { /* 0: those of this batch, which are as many */
        side.counted = counted ? 8 : 0;
        CHECK_OK(route_loss("n_ranks=3 loss.communication=0.5", MOE_LOSS_COMMUNICATION, side, loss + counted,
                            grads[counted]));
    }
    CHECK(loss[0] == loss[1]);
    CHECK_SAME(grads[0], grads[1], 10000);
    CHECK_OK(route_loss("noise=gaussian loss.load=0.5 top_k=6", MOE_LOSS_LOAD, plain, loss, grads[0]));
    CHECK(loss[0] == 0); /* every expert has every token */
    CHECK_OK(route_loss("n_codes=6 loss.codebook=0.5", MOE_LOSS_CODEBOOK, plain, loss, grads[0]));
    CHECK(loss[0] == 0); /* no token has a code yet */
    CHECK_STATUS(route_loss("expert=orthonormal loss.orthonormal=0.5", MOE_LOSS_ORTHONORMAL, plain, loss, grads[0]),
                 MOE_E_NULL_EXPERTS);
    side = plain, side.experts = &some;
    CHECK_OK(route_loss("expert=orthonormal loss.orthonormal=0.5", MOE_LOSS_ORTHONORMAL, side, loss, grads[0]));
    CHECK(loss[0] > 0); /* its gradient is not wanted */
    /* weights that overflow */
    CHECK_STATUS(route_loss("gate=relu select=threshold weight_scale=3e38 loss.importance-selected=0.5",
                            MOE_LOSS_IMPORTANCE_SELECTED, plain, loss, grads[0]), MOE_E_NAN_WEIGHT);
    /* of the choices above a threshold alone */
    CHECK_OK(route_loss("score=cosine select=threshold threshold=0.2 fallback=false loss.prototype-alignment=0.5",
                        MOE_LOSS_PROTOTYPE_ALIGNMENT, plain, loss, grads[0]));
    CHECK_OK(route_loss("score=cosine select=all loss.prototype-alignment=0.5", MOE_LOSS_PROTOTYPE_ALIGNMENT, plain,
                        loss + 1, grads[1]));
    CHECK(loss[0] > 0 && loss[0] < loss[1]); /* the more alike are chosen */
}

int main(void) {
    RUN(test_every_loss_has_a_case);
    RUN(test_gradients);
    RUN(test_many_experts);
    RUN(test_many_outputs);
    RUN(test_closed_forms);
    RUN(test_names_of_experts_do_not_matter);
    RUN(test_a_constant_in_the_logits);
    RUN(test_same_bits);
    RUN(test_added);
    RUN(test_no_tokens_and_one_expert);
    RUN(test_extreme_logits);
    RUN(test_global_batch);
    RUN(test_statistics);
    RUN(test_arguments);
    RUN(test_other_arguments);
    RUN(test_layer);
    RUN(test_layer_sequences_and_ranks);
    RUN(test_variance_of_the_softmax);
    RUN(test_switch_and_z_closed_forms);
    RUN(test_switch_and_z_gradients);
    RUN(test_document);
    RUN(test_marks);
    RUN(test_nothing_to_count);
    RUN(test_layer_from_outside);
    return test_end();
}

/* oracle.h - one Mixture-of-Experts layer in plain double loops: the forward, and gradients written out by hand.
 * Nothing here calls moe.h except to read the desc and the parameters; layer.c holds the gradients themselves
 * against finite differences of the objective below. Include test.h first. */
#ifndef ORACLE_H
#define ORACLE_H

enum { ORACLE_ROUTER, ORACLE_W1, ORACLE_WU, ORACLE_W2, ORACLE_B1, ORACLE_BU, ORACLE_B2, ORACLE_PARTS };
static const char *const oracle_names[ORACLE_PARTS] = {"router",     "experts.w1", "experts.wu", "experts.w2",
                                                       "experts.b1", "experts.bu", "experts.b2"};

typedef struct oracle {
    moe_desc d;                                    /* resolved */
    size_t T, G;                                   /* tokens; experts with the shared ones */
    size_t count[ORACLE_PARTS];                    /* 0: this layer has no such tensor */
    double *p[ORACLE_PARTS], *g[ORACLE_PARTS];     /* parameters and their gradients, shapes of moe_layer_get */
    double *x, *dx, *y, *dy;                       /* (T, d) */
    double *logits, *prob, *weight, *raw, *margin; /* (T, E), (T, E), (T, k), (T, k) before normalisation, (T) */
    int32_t *index;                                /* (T, k) */
    char *kept;                                    /* (T, k) */
    uint64_t *load;                                /* (E) */
    size_t dropped;
    double loss[MOE_LOSS_COUNT]; /* unweighted */
} oracle;

static inline int oracle_gated(const oracle *o) {
    return o->d.expert == MOE_EXPERT_SWIGLU || o->d.expert == MOE_EXPERT_GEGLU;
}

/* The tensors' sizes by the documented shapes; 0 for a tensor that such a layer does not have. */
static inline void oracle_shapes(const moe_desc *d, size_t count[ORACLE_PARTS]) {
    size_t G = d->n_experts + d->n_shared;
    int gated = d->expert == MOE_EXPERT_SWIGLU || d->expert == MOE_EXPERT_GEGLU, bias = d->bias == MOE_ON;
    count[ORACLE_ROUTER] = d->d_model * d->n_experts;
    count[ORACLE_W1] = count[ORACLE_W2] = G * d->d_model * d->d_ff;
    count[ORACLE_WU] = gated ? G * d->d_model * d->d_ff : 0;
    count[ORACLE_B1] = bias ? G * d->d_ff : 0;
    count[ORACLE_BU] = bias && gated ? G * d->d_ff : 0;
    count[ORACLE_B2] = bias ? G * d->d_model : 0;
}

/* d must be resolved. */
static inline oracle *oracle_new(const moe_desc *d, size_t T) {
    oracle *o = (oracle *)test_memory(1, sizeof *o);
    size_t E = d->n_experts, k = d->top_k;
    o->d = *d, o->T = T, o->G = E + d->n_shared;
    oracle_shapes(d, o->count);
    for (int i = 0; i < ORACLE_PARTS; i++) o->p[i] = test_doubles(o->count[i]), o->g[i] = test_doubles(o->count[i]);
    o->x = test_doubles(T * d->d_model), o->dx = test_doubles(T * d->d_model);
    o->y = test_doubles(T * d->d_model), o->dy = test_doubles(T * d->d_model);
    o->logits = test_doubles(T * E), o->prob = test_doubles(T * E);
    o->weight = test_doubles(T * k), o->raw = test_doubles(T * k), o->margin = test_doubles(T);
    o->index = (int32_t *)test_memory(T * k, sizeof *o->index);
    o->kept = (char *)test_memory(T * k, 1);
    o->load = (uint64_t *)test_memory(E, sizeof *o->load);
    return o;
}

static inline void oracle_free(oracle *o) {
    for (int i = 0; i < ORACLE_PARTS; i++) free(o->p[i]), free(o->g[i]);
    free(o->x), free(o->dx), free(o->y), free(o->dy), free(o->logits), free(o->prob), free(o->weight), free(o->raw);
    free(o->margin), free(o->index), free(o->kept), free(o->load), free(o);
}

/* Reads the layer's parameters. */
static inline void oracle_read(oracle *o, const moe_layer *m) {
    for (int i = 0; i < ORACLE_PARTS; i++) {
        if (o->count[i] == 0) continue;
        float *f = test_floats(o->count[i]);
        CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, oracle_names[i], f, o->count[i]));
        for (size_t j = 0; j < o->count[i]; j++) o->p[i][j] = f[j];
        free(f);
    }
}

static inline double oracle_sigmoid(double z) { return 1 / (1 + exp(-z)); }

/* The activation and its derivative. */
static inline double oracle_act(moe_expert_kind kind, double z, double *slope) {
    double phi, s;
    switch (kind) {
    case MOE_EXPERT_RELU: *slope = z > 0; return z > 0 ? z : 0;
    case MOE_EXPERT_GELU:
    case MOE_EXPERT_GEGLU:
        phi = 0.5 * (1 + erf(z * sqrt(0.5)));
        *slope = phi + z * exp(-z * z / 2) * 0.39894228040143267794; /* 1 / sqrt(2 pi) */
        return z * phi;
    case MOE_EXPERT_GELU_TANH:
    case MOE_EXPERT_GEGLU_TANH:
        s = tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z));
        *slope = 0.5 * (1 + s) + 0.5 * z * (1 - s * s) * sqrt(2 / acos(-1)) * (1 + 3 * 0.044715 * z * z);
        return 0.5 * z * (1 + s);
    case MOE_EXPERT_SWIGLU_CLAMPED: /* the gate's half */
        s = oracle_sigmoid(1.702 * fmin(z, 7));
        *slope = z > 7 ? 0 : s + 1.702 * z * s * (1 - s);
        return fmin(z, 7) * s;
    default: /* SiLU and SwiGLU */
        s = oracle_sigmoid(z);
        *slope = s + z * s * (1 - s);
        return z * s;
    }
}

/* softmax of n values, and the logarithm of the sum of exponentials */
static inline double oracle_softmax(size_t n, const double *z, double temperature, double *p) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, z[i] / temperature);
    for (size_t i = 0; i < n; i++) sum += p[i] = exp(z[i] / temperature - top);
    for (size_t i = 0; i < n; i++) p[i] /= sum;
    return top + log(sum);
}

/* The k largest, descending, ties to the lowest index. Returns the smallest gap between two neighbours down to the
 * first that is not taken: how far the choice is from being another. */
static inline double oracle_topk(size_t n, size_t k, const double *v, int32_t *index) {
    double gap = INFINITY, last = 0;
    char *used = (char *)test_memory(n, 1);
    for (size_t j = 0; j <= k && j < n; j++) {
        size_t best = n;
        for (size_t i = 0; i < n; i++)
            if (!used[i] && (best == n || v[i] > v[best])) best = i;
        if (j > 0) gap = fmin(gap, last - v[best]);
        last = v[best];
        if (j < k) used[best] = 1, index[j] = (int32_t)best;
    }
    free(used);
    return gap;
}

/* Which pairs capacity keeps, by the words of moe_order_kind: go through the pairs in the order of their rank and
 * give each a place while its expert has one. capacity 0: all. Returns how many were dropped. */
static inline size_t oracle_capacity(size_t T, size_t k, size_t E, const int32_t *index, const double *weight,
                                     size_t capacity, moe_order_kind order, char *kept) {
    size_t n = T * k, dropped = 0;
    size_t *used = (size_t *)test_memory(E, sizeof *used);
    char *seen = (char *)test_memory(n, 1);
    double *first = test_doubles(T); /* each token's weight of its first choice */
    for (size_t i = n; i-- > 0;)
        if (index[i] >= 0) first[i / k] = weight[i];
    for (size_t round = 0; round < n; round++) {
        size_t best = n;
        for (size_t i = 0; i < n; i++) { /* the first pair, by rank, that has not been seen */
            if (seen[i]) continue;
            int before = best == n;
            if (!before && order == MOE_ORDER_TOKEN) before = i / k < best / k;
            if (!before && order == MOE_ORDER_CHOICE) before = i % k < best % k;
            if (!before && order == MOE_ORDER_PAIR) before = weight[i] > weight[best];
            if (!before && order == MOE_ORDER_WEIGHT && i % k != best % k) before = i % k < best % k;
            else if (!before && order == MOE_ORDER_WEIGHT) before = first[i / k] > first[best / k];
            if (before) best = i;
        }
        seen[best] = 1;
        kept[best] = 0;
        if (index[best] < 0) continue;
        kept[best] = capacity == 0 || used[index[best]]++ < capacity;
        dropped += !kept[best];
    }
    free(used), free(seen), free(first);
    return dropped;
}

/* One expert on one token: h (f) = the inside, z and u (f) its arguments, out (d). */
static inline void oracle_expert(const oracle *o, size_t e, const double *x, double *z, double *u, double *h,
                                 double *out) {
    size_t d = o->d.d_model, f = o->d.d_ff;
    double slope;
    for (size_t j = 0; j < f; j++) {
        z[j] = o->count[ORACLE_B1] ? o->p[ORACLE_B1][e * f + j] : 0;
        u[j] = o->count[ORACLE_BU] ? o->p[ORACLE_BU][e * f + j] : 0;
        for (size_t i = 0; i < d; i++) {
            z[j] += x[i] * o->p[ORACLE_W1][(e * d + i) * f + j];
            if (oracle_gated(o)) u[j] += x[i] * o->p[ORACLE_WU][(e * d + i) * f + j];
        }
        h[j] = oracle_act(o->d.expert, z[j], &slope) * (oracle_gated(o) ? u[j] : 1);
    }
    for (size_t i = 0; i < d; i++) {
        out[i] = o->count[ORACLE_B2] ? o->p[ORACLE_B2][e * d + i] : 0;
        for (size_t j = 0; j < f; j++) out[i] += h[j] * o->p[ORACLE_W2][(e * f + j) * d + i];
    }
}

static inline void oracle_weights(oracle *o, size_t t) {
    size_t E = o->d.n_experts, k = o->d.top_k;
    double chosen[64], sum = 0;
    for (size_t j = 0; j < k; j++) chosen[j] = o->logits[t * E + (size_t)o->index[t * k + j]];
    if (o->d.gate == MOE_GATE_SOFTMAX_SELECTED) oracle_softmax(k, chosen, o->d.temperature, o->raw + t * k);
    else
        for (size_t j = 0; j < k; j++) o->raw[t * k + j] = o->prob[t * E + (size_t)o->index[t * k + j]];
    for (size_t j = 0; j < k; j++) sum += o->raw[t * k + j];
    for (size_t j = 0; j < k; j++) o->weight[t * k + j] = o->raw[t * k + j] / (o->d.normalize == MOE_ON ? sum : 1);
}

/* select 0: keep index, kept and load as they are (for finite differences). top_k at most 64. */
static inline void oracle_forward(oracle *o, int select) {
    size_t T = o->T, d = o->d.d_model, f = o->d.d_ff, E = o->d.n_experts, k = o->d.top_k;
    double *z = test_doubles(f), *u = test_doubles(f), *h = test_doubles(f), *out = test_doubles(d),
           *P = test_doubles(E);
    double z_loss = 0, switch_loss = 0;
    for (size_t t = 0; t < T; t++) {
        for (size_t e = 0; e < E; e++) {
            o->logits[t * E + e] = 0;
            for (size_t i = 0; i < d; i++) o->logits[t * E + e] += o->x[t * d + i] * o->p[ORACLE_ROUTER][i * E + e];
        }
        oracle_softmax(E, o->logits + t * E, o->d.temperature, o->prob + t * E);
        double lse = oracle_softmax(E, o->logits + t * E, 1, P);
        z_loss += lse * lse / (double)T;
        if (select) o->margin[t] = oracle_topk(E, k, o->logits + t * E, o->index + t * k);
        oracle_weights(o, t);
    }
    if (select) {
        size_t per_expert = T / E + (T % E != 0), capacity = 0;
        if (o->d.capacity_factor > 0) {
            double places = (double)o->d.capacity_factor * (double)k * (double)per_expert;
            capacity = places < 1 ? 1 : places > (double)T ? T : (size_t)places;
        }
        o->dropped = oracle_capacity(T, k, E, o->index, o->weight, capacity, o->d.capacity_order, o->kept);
        memset(o->load, 0, E * sizeof *o->load);
        for (size_t i = 0; i < T * k; i++) o->load[o->index[i]]++;
    }
    memset(o->y, 0, T * d * sizeof *o->y);
    for (size_t t = 0; t < T; t++) {
        for (size_t j = 0; j < k + o->d.n_shared; j++) {
            if (j < k && !o->kept[t * k + j]) continue;
            size_t e = j < k ? (size_t)o->index[t * k + j] : E + j - k;
            oracle_expert(o, e, o->x + t * d, z, u, h, out);
            for (size_t i = 0; i < d; i++) o->y[t * d + i] += (j < k ? o->weight[t * k + j] : 1) * out[i];
        }
    }
    for (size_t e = 0; e < E && T > 0; e++) {
        double mean = 0;
        for (size_t t = 0; t < T; t++) mean += o->prob[t * E + e] / (double)T;
        switch_loss += (double)E * mean * (double)o->load[e] / (double)(T * k);
    }
    o->loss[MOE_LOSS_SWITCH] = switch_loss, o->loss[MOE_LOSS_Z] = z_loss;
    free(z), free(u), free(h), free(out), free(P);
}

/* What the gradients are of: sum of dy * y plus the weighted auxiliary losses. */
static inline double oracle_objective(const oracle *o) {
    double sum = 0;
    for (size_t i = 0; i < o->T * o->d.d_model; i++) sum += o->dy[i] * o->y[i];
    for (int l = 0; l < MOE_LOSS_COUNT; l++)
        if (o->d.loss[l] > 0) sum += (double)o->d.loss[l] * o->loss[l];
    return sum;
}

/* Gradients of expert e on one token for an output gradient `dout` (d): adds to g and to dx (d). */
static inline void oracle_expert_backward(oracle *o, size_t e, const double *x, const double *z, const double *u,
                                          const double *h, const double *dout, double *dx) {
    size_t d = o->d.d_model, f = o->d.d_ff;
    if (o->count[ORACLE_B2])
        for (size_t i = 0; i < d; i++) o->g[ORACLE_B2][e * d + i] += dout[i];
    for (size_t j = 0; j < f; j++) {
        double dh = 0, slope, act = oracle_act(o->d.expert, z[j], &slope);
        for (size_t i = 0; i < d; i++) {
            dh += dout[i] * o->p[ORACLE_W2][(e * f + j) * d + i];
            o->g[ORACLE_W2][(e * f + j) * d + i] += h[j] * dout[i];
        }
        double dz = dh * slope * (oracle_gated(o) ? u[j] : 1), du = dh * act;
        if (o->count[ORACLE_B1]) o->g[ORACLE_B1][e * f + j] += dz;
        if (o->count[ORACLE_BU]) o->g[ORACLE_BU][e * f + j] += du;
        for (size_t i = 0; i < d; i++) {
            size_t at = (e * d + i) * f + j;
            o->g[ORACLE_W1][at] += x[i] * dz;
            dx[i] += o->p[ORACLE_W1][at] * dz;
            if (oracle_gated(o)) o->g[ORACLE_WU][at] += x[i] * du, dx[i] += o->p[ORACLE_WU][at] * du;
        }
    }
}

/* After oracle_forward and with dy set: g and dx = the gradients of oracle_objective, the choice held constant. */
static inline void oracle_backward(oracle *o) {
    size_t T = o->T, d = o->d.d_model, f = o->d.d_ff, E = o->d.n_experts, k = o->d.top_k;
    double *z = test_doubles(f), *u = test_doubles(f), *h = test_doubles(f), *out = test_doubles(d),
           *dout = test_doubles(d);
    double *dlogit = test_doubles(E), *dprob = test_doubles(E), *p1 = test_doubles(E), *draw = test_doubles(k),
           *dw = test_doubles(k);
    double tau = o->d.temperature;
    for (int i = 0; i < ORACLE_PARTS; i++) memset(o->g[i], 0, o->count[i] * sizeof(double));
    memset(o->dx, 0, T * d * sizeof(double));
    for (size_t t = 0; t < T; t++) {
        const double *x = o->x + t * d, *dy = o->dy + t * d;
        for (size_t j = 0; j < k + o->d.n_shared; j++) {
            if (j < k) dw[j] = 0;
            if (j < k && !o->kept[t * k + j]) continue;
            size_t e = j < k ? (size_t)o->index[t * k + j] : E + j - k;
            oracle_expert(o, e, x, z, u, h, out);
            for (size_t i = 0; i < d; i++) {
                dout[i] = dy[i] * (j < k ? o->weight[t * k + j] : 1);
                if (j < k) dw[j] += dy[i] * out[i];
            }
            oracle_expert_backward(o, e, x, z, u, h, dout, o->dx + t * d);
        }
        double sum = 0, dot = 0; /* weight = raw / sum */
        for (size_t j = 0; j < k; j++) sum += o->raw[t * k + j];
        for (size_t j = 0; j < k; j++) dot += dw[j] * o->weight[t * k + j];
        for (size_t j = 0; j < k; j++) draw[j] = o->d.normalize == MOE_ON ? (dw[j] - dot) / sum : dw[j];

        double lse = oracle_softmax(E, o->logits + t * E, 1, p1);
        for (size_t e = 0; e < E; e++) {
            dlogit[e] = (double)(o->d.loss[MOE_LOSS_Z] > 0 ? o->d.loss[MOE_LOSS_Z] : 0) * 2 * lse * p1[e] / (double)T;
            dprob[e] = (double)(o->d.loss[MOE_LOSS_SWITCH] > 0 ? o->d.loss[MOE_LOSS_SWITCH] : 0) * (double)E *
                       (double)o->load[e] / (double)(T * k) / (double)T;
        }
        if (o->d.gate == MOE_GATE_SOFTMAX_SELECTED) {
            double mean = 0;
            for (size_t j = 0; j < k; j++) mean += draw[j] * o->raw[t * k + j];
            for (size_t j = 0; j < k; j++) dlogit[o->index[t * k + j]] += o->raw[t * k + j] * (draw[j] - mean) / tau;
        } else
            for (size_t j = 0; j < k; j++) dprob[o->index[t * k + j]] += draw[j];
        double mean = 0;
        for (size_t e = 0; e < E; e++) mean += dprob[e] * o->prob[t * E + e];
        for (size_t e = 0; e < E; e++) dlogit[e] += o->prob[t * E + e] * (dprob[e] - mean) / tau;
        for (size_t i = 0; i < d; i++)
            for (size_t e = 0; e < E; e++) {
                o->g[ORACLE_ROUTER][i * E + e] += x[i] * dlogit[e];
                o->dx[t * d + i] += o->p[ORACLE_ROUTER][i * E + e] * dlogit[e];
            }
    }
    free(z), free(u), free(h), free(out), free(dout), free(dlogit), free(dprob), free(p1), free(draw), free(dw);
}

#endif

/* The language model of examples/common/language.h: its forward and every gradient against a naive version in double,
 * with dropout; the same bits for any number of threads; Muon's direction; checkpoints that come back; the tokens. */
#include "test.h"

#include "examples/common/checkpoint.h"
#include "examples/common/corpus.h"

enum { V = 24, D = 16, HEADS = 2, HEAD = D / HEADS, LAYERS = 2, L = 5, B = 3, ROWS = B * L, E = 4, K = 2, F = 8 };
enum { ROUTER = D * E, MATRICES = E * D * F, MIXTURE = ROUTER + 3 * MATRICES, PLACES = 1 + 2 * LAYERS };
static const lm_shape shape = {V, D, HEADS, LAYERS, L, 0, LM_MUON, 0.25, 10000, 1e-5, 3};
static const char *const tensor_name[4] = {"router", "experts.w1", "experts.wu", "experts.w2"};
static int32_t token[ROWS], target[ROWS];

static moe_desc mixture(const char *choices) {
    moe_desc d = {0};
    CHECK_OK(moe_desc_system(&d, "mixtral"));
    d.d_model = D;
    d.d_ff = F;
    d.n_experts = E;
    d.loss[MOE_LOSS_SWITCH] = 0; /* the oracle has no losses of the router */
    if (choices) CHECK_OK(moe_desc_parse(&d, choices, NULL));
    CHECK_OK(moe_desc_resolve(&d, &d));
    return d;
}
static void fill(void) {
    for (size_t t = 0; t < ROWS; t++) {
        token[t] = (int32_t)(moe_rand_u32(5, 1, t) % V);
        target[t] = (int32_t)(moe_rand_u32(5, 2, t) % V);
    }
    target[7] = -1;
}

/* ---- the oracle: formulas as the models' public code has them, one number after the other ---- */

typedef struct oracle {
    const lm *m;
    double *p; /* the bank, then of each layer the router, w1, wu, w2 */
    size_t n;
    float mask[PLACES][ROWS * D];
} oracle;

static oracle oracle_new(lm *m, const lm_moment *now) {
    oracle o = {.m = m, .n = m->bank.count + LAYERS * MIXTURE};
    float *buffer = allocate(o.n, sizeof *buffer), ones[ROWS * D];
    memcpy(buffer, m->bank.value, m->bank.count * sizeof *buffer);
    for (size_t i = 0; i < LAYERS; i++) checkpoint_get_mixture(m, i, buffer + m->bank.count + i * MIXTURE, 0);
    o.p = allocate(o.n, sizeof *o.p);
    for (size_t k = 0; k < o.n; k++) o.p[k] = (double)buffer[k];
    for (size_t k = 0; k < ROWS * D; k++) ones[k] = 1;
    for (size_t i = 0; i < PLACES; i++) tb_add(&m->run, ROWS, NULL, ones, lm_drop(m, now, i), o.mask[i]);
    free(buffer);
    return o;
}
static void norm(const double *x, const double *w, double *y) {
    double square = 0;
    for (size_t k = 0; k < D; k++) square += x[k] * x[k] / D;
    for (size_t k = 0; k < D; k++) y[k] = x[k] / sqrt(square + 1e-5) * w[k];
}
static void linear(const double *x, const double *w, size_t in, size_t out, double *y) {
    for (size_t r = 0; r < out; r++) {
        y[r] = 0;
        for (size_t c = 0; c < in; c++) y[r] += x[c] * w[r * in + c];
    }
}
static void rotate(double *x, size_t position) {
    for (size_t h = 0; h < HEADS; h++)
        for (size_t i = 0; i < HEAD / 2; i++) {
            double angle = (double)position / pow(10000, 2 * (double)i / HEAD);
            double a = x[h * HEAD + i], b = x[h * HEAD + HEAD / 2 + i];
            x[h * HEAD + i] = a * cos(angle) - b * sin(angle);
            x[h * HEAD + HEAD / 2 + i] = b * cos(angle) + a * sin(angle);
        }
}
static void attend(const double (*q)[D], const double (*k)[D], const double (*v)[D], size_t t, double *y) {
    for (size_t h = 0; h < HEADS; h++) {
        double p[L], total = 0;
        for (size_t s = 0; s <= t % L; s++) {
            p[s] = 0;
            for (size_t i = 0; i < HEAD; i++) p[s] += q[t][h * HEAD + i] * k[t - t % L + s][h * HEAD + i];
            total += p[s] = exp(p[s] / sqrt(HEAD));
        }
        for (size_t i = 0; i < HEAD; i++) {
            y[h * HEAD + i] = 0;
            for (size_t s = 0; s <= t % L; s++) y[h * HEAD + i] += p[s] / total * v[t - t % L + s][h * HEAD + i];
        }
    }
}
static void mix(const double *p, const double *x, double *y) { /* softmax, the two highest, shares of their sum */
    double logit[E] = {0}, sum = 0;
    size_t chosen[K] = {0, 0};
    for (size_t e = 0; e < E; e++)
        for (size_t k = 0; k < D; k++) logit[e] += x[k] * p[k * E + e];
    for (size_t e = 1; e < E; e++)
        if (logit[e] > logit[chosen[0]]) chosen[0] = e;
    chosen[1] = chosen[0] == 0;
    for (size_t e = 0; e < E; e++)
        if (e != chosen[0] && logit[e] > logit[chosen[1]]) chosen[1] = e;
    memset(y, 0, D * sizeof *y);
    for (size_t s = 0; s < K; s++) sum += exp(logit[chosen[s]]);
    for (size_t s = 0; s < K; s++) {
        const double *w1 = p + ROUTER + chosen[s] * D * F, *wu = w1 + MATRICES, *w2 = wu + MATRICES;
        for (size_t f = 0; f < F; f++) {
            double a = 0, u = 0;
            for (size_t k = 0; k < D; k++) a += x[k] * w1[k * F + f], u += x[k] * wu[k * F + f];
            for (size_t k = 0; k < D; k++) y[k] += exp(logit[chosen[s]]) / sum * a / (1 + exp(-a)) * u * w2[f * D + k];
        }
    }
}
/* The mean of the nats over the targets that count. */
static double oracle_loss(const oracle *o) {
    static double x[ROWS][D], n[ROWS][D], q[ROWS][D], k[ROWS][D], v[ROWS][D];
    const lm *m = o->m;
    double y[D], z[D], logit[V], nats = 0;
    size_t counted = 0;
    for (size_t t = 0; t < ROWS; t++)
        for (size_t c = 0; c < D; c++)
            x[t][c] = o->p[m->embed + (size_t)token[t] * D + c] * (double)o->mask[0][t * D + c];
    for (size_t i = 0; i < LAYERS; i++) {
        const lm_layer *l = &m->layer[i];
        for (size_t t = 0; t < ROWS; t++) {
            norm(x[t], o->p + l->norm1, n[t]);
            linear(n[t], o->p + l->qkv, D, D, y);
            norm(y, o->p + l->query, q[t]);
            linear(n[t], o->p + l->qkv + D * D, D, D, y);
            norm(y, o->p + l->query + D, k[t]);
            linear(n[t], o->p + l->qkv + 2 * D * D, D, D, v[t]);
            rotate(q[t], t % L);
            rotate(k[t], t % L);
        }
        for (size_t t = 0; t < ROWS; t++) {
            attend((const double (*)[D])q, (const double (*)[D])k, (const double (*)[D])v, t, y);
            linear(y, o->p + l->out, D, D, z);
            for (size_t c = 0; c < D; c++) x[t][c] += z[c] * (double)o->mask[1 + 2 * i][t * D + c];
            norm(x[t], o->p + l->norm2, y);
            mix(o->p + m->bank.count + i * MIXTURE, y, z);
            for (size_t c = 0; c < D; c++) x[t][c] += z[c] * (double)o->mask[2 + 2 * i][t * D + c];
        }
    }
    for (size_t t = 0; t < ROWS; t++) {
        double sum = 0;
        if (target[t] < 0) continue;
        norm(x[t], o->p + m->norm, y);
        linear(y, o->p + m->head, D, V, logit);
        for (size_t c = 0; c < V; c++) sum += exp(logit[c]);
        nats += log(sum) - logit[target[t]];
        counted++;
    }
    return nats / (double)counted;
}

static lm *grown(const lm_shape *s, const moe_desc *desc) { /* norms that are not 1 */
    lm *m = lm_new(s, desc, ROWS);
    for (size_t i = 0; i < m->bank.n_tensors; i++)
        if (!m->bank.tensor[i].decay)
            for (size_t k = 0; k < m->bank.tensor[i].count; k++)
                m->bank.value[m->bank.tensor[i].at + k] += 0.3f * sinf((float)(7 * i + k));
    return m;
}
static void check_gradients(const lm_shape *s) {
    moe_desc desc = mixture(NULL);
    lm *m = grown(s, &desc);
    lm_moment now = {11};
    oracle o = oracle_new(m, &now);
    fill();
    CHECK_NEAR(lm_forward(m, token, target, ROWS, &now) / (ROWS - 1), oracle_loss(&o), 2e-6);
    lm_backward(m, ROWS, &now);
    float *grad = allocate(o.n, sizeof *grad);
    memcpy(grad, m->bank.grad, m->bank.count * sizeof *grad);
    for (size_t i = 0; i < LAYERS; i++) {
        float *at = grad + m->bank.count + i * MIXTURE;
        for (size_t k = 0; k < 4; k++)
            CHECK_OK(moe_layer_get(m->layer[i].moe, MOE_PART_GRADS, tensor_name[k],
                                   at + (k ? ROUTER + (k - 1) * MATRICES : 0), k ? MATRICES : ROUTER));
    }
    for (size_t k = (size_t)s->tied; k < o.n; k += TEST_SANITIZED ? 13 : 2) {
        double keep = o.p[k], h = 1e-5;
        o.p[k] = keep + h;
        double up = oracle_loss(&o);
        o.p[k] = keep - h;
        double down = oracle_loss(&o);
        o.p[k] = keep;
        CHECK_WITHIN(grad[k], (up - down) / (2 * h), 2e-6);
    }
    free(grad);
    free(o.p);
    lm_free(m);
}
static void test_gradients(void) { check_gradients(&shape); }
static void test_gradients_tied(void) {
    lm_shape tied = shape;
    tied.tied = 1;
    check_gradients(&tied);
}

/* An evaluation is the same as transformer.h's own block over its cache, which inference uses. */
static void test_block(void) {
    moe_desc desc = mixture(NULL);
    lm *m = grown(&shape, &desc);
    nn s = {.parallel = {.n_threads = 1}};
    float x[ROWS * D];
    fill();
    lm_forward(m, token, target, ROWS, NULL);
    for (size_t i = 0; i < LAYERS; i++) {
        const lm_layer *l = &m->layer[i];
        const float *w = m->bank.value, *next = i + 1 < LAYERS ? m->layer[i + 1].x : m->x;
        tf_block b = {.d = D, .eps = 1e-5f, .residual = 1, .norm1 = w + l->norm1, .norm2 = w + l->norm2};
        const tf_linear *part[] = {&b.q, &b.k, &b.v};
        for (size_t k = 0; k < 3; k++)
            memcpy((void *)part[k], &(tf_linear){.in = D, .out = D, .weight = w + l->qkv + k * D * D}, sizeof b.q);
        b.o = (tf_linear){.in = D, .out = D, .weight = w + l->out};
        b.q_norm = w + l->query, b.k_norm = w + l->query + D;
        b.rope = &m->run.rope;
        b.attention = (tf_attention){HEADS, HEADS, HEAD, HEAD, 0, 1 / sqrtf(HEAD), NULL};
        b.mixture = l->moe;
        tf_cache cache[B];
        for (size_t k = 0; k < B; k++) cache[k] = tf_cache_new(&s, L, HEADS, HEAD, HEAD);
        tf_acts acts = tf_acts_new(&s, &b, 1, ROWS);
        CHECK_OK(moe_tape_new(&acts.tape, moe_layer_desc(l->moe), ROWS, MOE_OFF));
        acts.tape->side.evaluate = 1;
        tf_block_forward(&s, &b, &acts, B, L, 0, cache, l->x, x);
        for (size_t k = 0; k < ROWS * D; k++)
            if (!CHECK_NEAR(next[k], x[k], 1e-4)) break;
        moe_tape_free(acts.tape);
    }
    nn_free(&s);
    lm_free(m);
}

/* ---- training ---- */

static double learn(lm *m, size_t steps) {
    double loss = 0;
    fill();
    for (size_t i = 0; i < steps; i++) {
        lm_moment now = {m->steps};
        loss = lm_forward(m, token, target, ROWS, &now) / (ROWS - 1);
        lm_backward(m, ROWS, &now);
        lm_step(m, 0.02f, 0.1f);
    }
    return loss;
}
static void test_learns(void) {
    moe_desc desc = mixture("loss.switch=0.02");
    for (int optimizer = LM_MUON; optimizer <= LM_ADAMW; optimizer++) {
        lm_shape s = shape;
        s.optimizer = (lm_optimizer)optimizer;
        s.dropout = 0;
        lm *m = lm_new(&s, &desc, ROWS);
        double first = learn(m, 1);
        CHECK_WITHIN(first, log(V), 0.5);
        CHECK(learn(m, 40) < 0.5 * first);
        lm_free(m);
    }
}
static void test_threads(void) {
    uint64_t hash[3];
    for (size_t k = 0; k < 3; k++) {
        moe_desc desc = mixture("loss.switch=0.02");
        desc.parallel.n_threads = k + 1;
        lm *m = lm_new(&shape, &desc, ROWS);
        learn(m, 3);
        hash[k] = lm_hash(m);
        lm_free(m);
    }
    CHECK(hash[0] == hash[1] && hash[1] == hash[2]);
}
/* x x^T of what Muon makes of a random matrix is near I: its rounds bring each singular value to about 0.7 ... 1.2. */
static void test_muon(void) {
    enum { FEW = 12, MANY = 40 };
    nn s = {.parallel = {.n_threads = 1}};
    float value[FEW * MANY] = {0}, grad[FEW * MANY], turned[FEW * MANY] = {0}, turned_grad[FEW * MANY];
    muon u = {.n = 0};
    test_fill(grad, FEW * MANY, -1, 1);
    for (size_t r = 0; r < FEW; r++)
        for (size_t c = 0; c < MANY; c++) turned_grad[c * FEW + r] = grad[r * MANY + c];
    muon_add(&u, value, grad, FEW, MANY);
    muon_add(&u, turned, turned_grad, MANY, FEW);
    muon_begin(&u, &s);
    muon_step(&u, 1, 0);
    for (size_t i = 0; i < FEW; i++)
        for (size_t j = 0; j < FEW; j++) {
            double dot = 0, scale = 0.2 * sqrt(MANY);
            for (size_t k = 0; k < MANY; k++) dot += (double)value[i * MANY + k] * (double)value[j * MANY + k];
            CHECK_WITHIN(dot / scale / scale, i == j ? 0.95 : 0, i == j ? 0.5 : 0.35);
        }
    for (size_t r = 0; r < FEW; r++)
        for (size_t c = 0; c < MANY; c++) CHECK_BITS(turned[c * FEW + r], value[r * MANY + c]);
    muon_free(&u);
    nn_free(&s);
}

/* A matrix that turns keeps its length, and goes where the plain step goes: from 0 that is -0.2 sqrt(MANY) x. */
static void test_muon_turns(void) {
    enum { FEW = 12, MANY = 40, N = FEW * MANY };
    nn s = {.parallel = {.n_threads = 1}};
    float direction[N] = {0}, value[N], before[N], nothing[N] = {0}, grad[N];
    double length = 0, now = 0, moved = 0, moved_length = 0, angle = 0.125;
    muon plain = {.n = 0}, turning = {.n = 0, .turns = 1};
    test_fill(grad, N, -1, 1);
    test_fill(value, N, -3, 3);
    memcpy(before, value, sizeof value);
    muon_add(&plain, direction, grad, FEW, MANY);
    muon_begin(&plain, &s);
    muon_step(&plain, 1, 0);
    muon_add(&turning, value, grad, FEW, MANY);
    muon_add(&turning, nothing, grad, FEW, MANY);
    muon_begin(&turning, &s);
    muon_step(&turning, (float)angle, 0.5f); /* decay would shorten it */
    for (size_t i = 0; i < N; i++) length += (double)before[i] * (double)before[i];
    for (size_t i = 0; i < N; i++) now += (double)value[i] * (double)value[i];
    CHECK_NEAR(sqrt(now), sqrt(length), 1e-6 * sqrt(length));
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < N; i++) {
            double x = (double)direction[i] / (-0.2 * sqrt(MANY));
            moved = (double)before[i] - angle * sqrt(length) / sqrt(FEW) * x;
            if (!pass) moved_length += moved * moved;
            else CHECK_WITHIN(value[i], moved * sqrt(length / moved_length), 1e-5);
        }
    for (size_t i = 0; i < N; i++) CHECK(nothing[i] == 0); /* 0 has no direction to turn to */
    muon_free(&plain);
    muon_free(&turning);
    nn_free(&s);
}

/* ---- checkpoints ---- */

static const char *folder(void) {
    static char path[200];
    snprintf(path, sizeof path, "%s/moe-wikitext2-test", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    return path;
}
static void test_model_file(void) {
    moe_desc desc = mixture(NULL), other = desc;
    lm_shape elsewhere = shape;
    lm *m = grown(&shape, &desc);
    elsewhere.seed = other.seed = 99;
    lm *again = lm_new(&elsewhere, &other, ROWS);
    CHECK(checkpoint_fits(moe_layer_desc(m->layer[0].moe)));
    checkpoint_save(m, NULL, 0, folder());
    CHECK(lm_hash(again) != lm_hash(m));
    checkpoint_load(again, folder());
    CHECK(lm_hash(again) == lm_hash(m));
    lm_free(m);
    lm_free(again);
}
static void test_state(void) { /* 5 steps are 3 and 2; noise and a controller too */
    moe_desc desc = mixture("noise=gaussian controller=bias");
    CHECK(!checkpoint_fits(&desc));
    lm *whole = lm_new(&shape, &desc, ROWS), *first = lm_new(&shape, &desc, ROWS), *second;
    double curve[3] = {1, 2, 3}, back[3];
    learn(whole, 5);
    learn(first, 3);
    checkpoint_state_save(first, "config", curve, sizeof curve, folder());
    lm_free(first);
    second = lm_new(&shape, &desc, ROWS);
    checkpoint_state_load(second, "config", back, sizeof back, folder());
    CHECK(second->steps == 3 && memcmp(curve, back, sizeof back) == 0);
    learn(second, 2);
    CHECK(lm_hash(second) == lm_hash(whole));
    lm_free(whole);
    lm_free(second);
}

/* ---- tokens ---- */

static void test_tokens(void) {
    const char text[] = " = The cat = \n \n The cat sat on the <unk> mat , and the cat 's hat @-@ 12 caf\xc3\xa9 "
                        "<unk> \n";
    bpe *b = bpe_learn(text, sizeof text - 1, 300);
    int32_t out[sizeof text];
    char back[sizeof text];
    bpe_encoder e = bpe_encoder_new(b);
    size_t n = bpe_encode(&e, text, sizeof text - 1, out), used = 0;
    CHECK(n > 0 && n < sizeof text - 20);
    for (size_t i = 0; i < n; i++) used += bpe_bytes(b, (uint32_t)out[i], back + used, sizeof back - used);
    CHECK(used == sizeof text - 1 && memcmp(back, text, used) == 0);
    CHECK(strcmp(b->added[b->n_added - 1], "<|endoftext|>") == 0 && strcmp(b->added[0], " <unk>") == 0);
    CHECK(b->merge[0][0] == 'a' && b->merge[0][1] == 't'); /* 6 times; the next are 4 or fewer */
    CHECK(corpus_words(text, sizeof text - 1) == 4 + 17 + 3);
    bpe_encoder_free(&e);
    bpe_free(b);
}
/* By hand: "aab" x 3 and "ab" x 2. Pairs: (a, b) 5, (a, a) 3. First ab; then "a ab" 3 times, "ab" alone has none. */
static void test_merges(void) {
    const char text[] = "aab\naab\naab\nab\nab\n";
    bpe *b = bpe_learn(text, sizeof text - 1, 1000);
    CHECK(b->n_merges == 2 && b->n_tokens == 259);
    CHECK(b->merge[0][0] == 'a' && b->merge[0][1] == 'b');
    CHECK(b->merge[1][0] == 'a' && b->merge[1][1] == 256);
    bpe_free(b);
}

int main(void) {
    RUN(test_gradients);
    RUN(test_gradients_tied);
    RUN(test_block);
    RUN(test_learns);
    RUN(test_threads);
    RUN(test_muon);
    RUN(test_muon_turns);
    RUN(test_model_file);
    RUN(test_state);
    RUN(test_tokens);
    RUN(test_merges);
    return test_end();
}

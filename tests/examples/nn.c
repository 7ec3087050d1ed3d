/* The neural-network operations of the examples (examples/common/nn.h): each forward against a naive
 * version in double, each backward against central differences of that naive version; the same bits for any number of
 * threads. */
#include "test.h"
#include "examples/common/nn.h"


#define MAX 4096

static nn ops;

/* Inputs of an operation under test, kept in double for the naive version and in float for the real one. Values are
 * spread so that no two are equal and none is near 0: no kink of ReLU or of the maximum is near. */
static double in[4][MAX];
static float fin[4][MAX];

static void fill(int which, size_t n, uint64_t stream, double scale) {
    for (size_t i = 0; i < n; i++) {
        double v = (double)moe_rand_u32(7, stream, i) / 4294967296.0 * 2 - 1;
        fin[which][i] = (float)(scale * (v + (v < 0 ? -0.1 : 0.1)));
        in[which][i] = (double)fin[which][i];
    }
}

/* The naive version: reads in[], writes out; returns the number of outputs. */
typedef size_t naive(double *out);

/* d(sum of out * weight) / d(in[which][i]) by central differences */
static double difference(naive *f, const float *weight, int which, size_t i) {
    static double out[MAX];
    double h = 1e-5, keep = in[which][i], sum[2];
    for (int side = 0; side < 2; side++) {
        in[which][i] = keep + (side ? h : -h);
        size_t n = f(out);
        sum[side] = 0;
        for (size_t k = 0; k < n; k++) sum[side] += out[k] * (double)weight[k];
    }
    in[which][i] = keep;
    return (sum[1] - sum[0]) / (2 * h);
}

static void check_forward(naive *f, const float *got, double tolerance) {
    static double want[MAX];
    size_t n = f(want);
    for (size_t i = 0; i < n; i++) CHECK_WITHIN(got[i], want[i], tolerance * (1 + fabs(want[i])));
}

static void check_gradient(naive *f, const float *weight, int which, size_t n, const float *got, double tolerance) {
    for (size_t i = 0; i < n; i++) {
        double want = difference(f, weight, which, i);
        CHECK_WITHIN(got[i], want, tolerance * (1 + fabs(want)));
    }
}

/* ---- convolution: in[0] = x, in[1] = weight ---- */
static nn_conv conv;

static size_t naive_conv(double *out) {
    size_t oh = nn_conv_out(&conv, conv.h), ow = nn_conv_out(&conv, conv.w), at = 0;
    for (size_t n = 0; n < conv.n; n++)
        for (size_t y = 0; y < oh; y++)
            for (size_t x = 0; x < ow; x++)
                for (size_t f = 0; f < conv.filters; f++, at++) {
                    out[at] = 0;
                    for (size_t ky = 0; ky < conv.size; ky++)
                        for (size_t kx = 0; kx < conv.size; kx++) {
                            size_t sy = y * conv.stride + ky - conv.pad, sx = x * conv.stride + kx - conv.pad;
                            if (sy >= conv.h || sx >= conv.w) continue; /* also below 0 */
                            for (size_t c = 0; c < conv.c; c++)
                                out[at] += in[0][((n * conv.h + sy) * conv.w + sx) * conv.c + c] *
                                           in[1][((ky * conv.size + kx) * conv.c + c) * conv.filters + f];
                        }
                }
    return at;
}

static void check_conv(nn_conv v) {
    static float y[MAX], dx[MAX], before[MAX], dw[MAX];
    conv = v;
    size_t nx = v.n * v.h * v.w * v.c, nw = nn_conv_weights(&v);
    size_t ny = v.n * nn_conv_out(&v, v.h) * nn_conv_out(&v, v.w) * v.filters;
    if (!CHECK(nx <= MAX && nw <= MAX && ny <= MAX)) return;
    fill(0, nx, 1, 1);
    fill(1, nw, 2, 1);
    fill(2, ny, 3, 1); /* dy */
    nn_conv_forward(&ops, &v, fin[0], fin[1], y);
    check_forward(naive_conv, y, 1e-5);
    nn_conv_backward_weight(&ops, &v, fin[0], fin[2], dw);
    check_gradient(naive_conv, fin[2], 1, nw, dw, 1e-4);
    nn_conv_backward_data(&ops, &v, fin[2], fin[1], 0, dx);
    check_gradient(naive_conv, fin[2], 0, nx, dx, 1e-4);
    for (size_t i = 0; i < nx; i++) before[i] = fin[0][i];
    nn_conv_backward_data(&ops, &v, fin[2], fin[1], 1, before);
    for (size_t i = 0; i < nx; i++) CHECK_NEAR(before[i], fin[0][i] + dx[i], 1e-4);
}

static void test_conv_3x3(void) { check_conv((nn_conv){2, 5, 4, 3, 3, 1, 1, 5}); }
static void test_conv_3x3_no_pad(void) { check_conv((nn_conv){1, 6, 5, 2, 3, 1, 0, 3}); }
static void test_conv_3x3_stride(void) { check_conv((nn_conv){2, 7, 6, 2, 3, 2, 1, 4}); }
static void test_conv_1x1(void) { check_conv((nn_conv){2, 3, 4, 7, 1, 1, 0, 6}); }
static void test_conv_1x1_stride(void) { check_conv((nn_conv){2, 5, 5, 3, 1, 2, 0, 4}); }
static void test_conv_2x2(void) { check_conv((nn_conv){2, 5, 5, 3, 2, 1, 0, 4}); }
static void test_conv_2x2_stride_pad(void) { check_conv((nn_conv){1, 4, 6, 2, 2, 2, 1, 3}); }
static void test_conv_wide(void) { check_conv((nn_conv){1, 4, 4, 40, 2, 1, 1, 9}); } /* a tap over two chunks of 32 */
static void test_conv_one_pixel(void) { check_conv((nn_conv){3, 1, 1, 4, 3, 1, 1, 2}); }

/* ---- normalisation: in[0] = x, in[1] = gamma and beta, in[2] = add ---- */
static struct {
    size_t rows, c;
    int relu, add;
} norm;

static size_t naive_norm(double *out) {
    for (size_t k = 0; k < norm.c; k++) {
        double mean = 0, variance = 0, n = (double)norm.rows;
        for (size_t r = 0; r < norm.rows; r++) mean += in[0][r * norm.c + k] / n;
        for (size_t r = 0; r < norm.rows; r++) variance += pow(in[0][r * norm.c + k] - mean, 2) / n;
        for (size_t r = 0; r < norm.rows; r++) {
            double z =
                in[1][k] * (in[0][r * norm.c + k] - mean) / sqrt(variance + (double)NN_EPSILON) + in[1][norm.c + k];
            out[r * norm.c + k] = (norm.relu && z < 0 ? 0 : z) + (norm.add ? in[2][r * norm.c + k] : 0);
        }
    }
    return norm.rows * norm.c;
}

static void check_norm(size_t rows, size_t c, int relu, int add) {
    static float y[MAX], dx[MAX], mean[MAX], variance[MAX], dgamma[MAX];
    size_t n = rows * c;
    float *dbeta = dgamma + c;
    norm.rows = rows, norm.c = c, norm.relu = relu, norm.add = add;
    fill(0, n, 11, 2);
    fill(1, 2 * c, 12, 1);
    fill(2, n, 13, 1);
    fill(3, n, 14, 1); /* dy */
    nn_moments(&ops, rows, c, fin[0], mean, variance);
    nn_norm_forward(&ops, rows, c, relu, fin[0], mean, variance, fin[1], fin[1] + c, add ? fin[2] : NULL, y);
    check_forward(naive_norm, y, 1e-5);
    nn_norm_backward(&ops, rows, c, relu, fin[0], mean, variance, fin[1], fin[1] + c, fin[3], dx, dgamma, dbeta);
    check_gradient(naive_norm, fin[3], 0, n, dx, 1e-4);
    check_gradient(naive_norm, fin[3], 1, 2 * c, dgamma, 1e-4);
    nn_norm_backward(&ops, rows, c, relu, fin[0], mean, variance, fin[1], fin[1] + c, fin[3], fin[3], dgamma, dbeta);
    CHECK_SAME(fin[3], dx, n); /* in place */
}

static void test_norm(void) { check_norm(13, 5, 0, 0); }
static void test_norm_relu(void) { check_norm(20, 3, 1, 0); }
static void test_norm_relu_add(void) { check_norm(9, 4, 1, 1); }
static void test_norm_add(void) { check_norm(6, 7, 0, 1); }

/* Many blocks, and a mean far from 0: the variance must not cancel. */
static void test_moments_blocks(void) {
    enum { ROWS = 40000, C = 3 };
    float *x = allocate(ROWS * C, sizeof(float)), mean[C], variance[C];
    nn_must(moe_rand_normal(3, 1, ROWS * C, 1000, 0.5f, x));
    nn_moments(&ops, ROWS, C, x, mean, variance);
    for (int k = 0; k < C; k++) {
        double m = 0, v = 0;
        for (size_t r = 0; r < ROWS; r++) m += (double)x[r * C + (size_t)k] / ROWS;
        for (size_t r = 0; r < ROWS; r++) v += pow((double)x[r * C + (size_t)k] - m, 2) / ROWS;
        CHECK_NEAR(mean[k], m, 1e-6);
        CHECK_NEAR(variance[k], v, 1e-3);
    }
    free(x);
}

/* When the running statistics are those of the batch, evaluation gives the same bits as training. */
static void test_norm_evaluation(void) {
    enum { ROWS = 30, C = 6 };
    static float training[ROWS * C], evaluation[ROWS * C];
    nn_bank bank = {0};
    nn_norm m = {0};
    nn_norm_declare(&m, &bank, C, 0.9f);
    nn_bank_alloc(&ops, &bank);
    nn_norm_alloc(&ops, &m, &bank);
    fill(0, ROWS * C, 21, 1);
    nn_norm_apply(&ops, &m, &bank, 1, ROWS, 1, fin[0], NULL,
                  training); /* after one batch the running averages are its own */
    for (int k = 0; k < C; k++) {
        CHECK_NEAR(m.running_mean[k], m.mean[k], 1e-6);
        CHECK_NEAR(m.running_variance[k], m.variance[k], 1e-6);
        m.running_mean[k] = m.mean[k];
        m.running_variance[k] = m.variance[k];
    }
    nn_norm_apply(&ops, &m, &bank, 0, ROWS, 1, fin[0], NULL, evaluation);
    CHECK_SAME(training, evaluation, ROWS * C);
    nn_norm_apply(&ops, &m, &bank, 0, 1, 1, fin[0], NULL, evaluation); /* alone as in company */
    CHECK_SAME(training, evaluation, C);
    fill(0, ROWS * C, 22, 3);
    nn_norm_apply(&ops, &m, &bank, 0, ROWS, 1, fin[0], NULL, evaluation);
    for (int k = 0; k < C; k++) CHECK(m.running_mean[k] == m.mean[k]); /* evaluation changes nothing */
}

static void test_track(void) {
    float running = 1, batch = 3;
    nn_track(1, 0.75f, &batch, &running);
    CHECK_NEAR(running, 1.5, 1e-6);
}

/* ---- activations: in[0] = x ---- */
static size_t length;
static size_t naive_relu(double *out) {
    for (size_t i = 0; i < length; i++) out[i] = in[0][i] > 0 ? in[0][i] : 0;
    return length;
}
static size_t naive_gelu(double *out) {
    for (size_t i = 0; i < length; i++) out[i] = in[0][i] * 0.5 * (1 + erf(in[0][i] / sqrt(2)));
    return length;
}

static void test_relu(void) {
    static float y[MAX], dx[MAX], dx2[MAX];
    length = 301;
    fill(0, length, 31, 1);
    fill(1, length, 32, 1);
    nn_relu_forward(&ops, length, fin[0], y);
    check_forward(naive_relu, y, 1e-6);
    nn_relu_backward(&ops, length, fin[0], fin[1], dx);
    check_gradient(naive_relu, fin[1], 0, length, dx, 1e-5);
    nn_relu_backward(&ops, length, y, fin[1], dx2);
    CHECK_SAME(dx, dx2, length);
}

/* Behind a normalisation, with something added: as ReLU in one pass, as GELU in two. */
static int norm_gelu;
static size_t naive_norm_act(double *out) {
    size_t n = naive_norm(out);
    for (size_t i = 0; norm_gelu && i < n; i++) out[i] *= 0.5 * (1 + erf(out[i] / sqrt(2)));
    for (size_t i = 0; i < n; i++) out[i] += in[2][i];
    return n;
}
static void check_norm_act(int gelu) {
    enum { ROWS = 12, C = 5 };
    static float y[ROWS * C], dx[ROWS * C], given[ROWS * C];
    nn_bank bank = {0};
    nn_norm m = {0};
    nn_norm_declare(&m, &bank, C, 0.9f);
    nn_bank_alloc(&ops, &bank);
    nn_norm_alloc(&ops, &m, &bank);
    norm.rows = ROWS, norm.c = C, norm.relu = !gelu, norm.add = 0, norm_gelu = gelu;
    fill(0, ROWS * C, 51, 2);
    fill(1, 2 * C, 52, 1);
    fill(2, ROWS * C, 53, 1);
    fill(3, ROWS * C, 54, 1); /* dy */
    memcpy(bank.value + m.gamma, fin[1], C * sizeof(float));
    memcpy(bank.value + m.beta, fin[1] + C, C * sizeof(float));
    nn_norm_act(&ops, &m, &bank, 1, ROWS, fin[0], fin[2], gelu ? given : NULL, y);
    check_forward(naive_norm_act, y, 1e-5);
    nn_norm_act_gradient(&ops, &m, &bank, ROWS, fin[0], gelu ? given : NULL, fin[3], dx);
    check_gradient(naive_norm_act, fin[3], 0, ROWS * C, dx, 1e-4);
    for (size_t k = 0; k < C; k++) {
        double gamma = difference(naive_norm_act, fin[3], 1, k), beta = difference(naive_norm_act, fin[3], 1, C + k);
        CHECK_WITHIN(bank.grad[m.gamma + k], gamma, 1e-4 * (1 + fabs(gamma)));
        CHECK_WITHIN(bank.grad[m.beta + k], beta, 1e-4 * (1 + fabs(beta)));
    }
    nn_norm_act(&ops, &m, &bank, 1, ROWS, fin[0], NULL, gelu ? given : NULL, y);
    for (size_t i = 0; i < ROWS * C; i++) in[2][i] = 0;
    check_forward(naive_norm_act, y, 1e-5); /* nothing added */
}
static void test_norm_act_relu(void) { check_norm_act(0); }
static void test_norm_act_gelu(void) { check_norm_act(1); }

static void test_gelu(void) {
    static float y[MAX], dx[MAX];
    length = 601; /* more than one run of 256 */
    fill(0, length, 33, 4);
    fill(1, length, 34, 1);
    nn_gelu_forward(&ops, length, fin[0], y);
    check_forward(naive_gelu, y, 1e-6);
    nn_gelu_backward(&ops, length, fin[0], fin[1], dx);
    check_gradient(naive_gelu, fin[1], 0, length, dx, 1e-4);
}

/* ---- pooling: in[0] = x ---- */
static nn_pool pool;
static size_t naive_pool(double *out) {
    size_t oh = pool.h / pool.size, ow = pool.w / pool.size, at = 0;
    for (size_t n = 0; n < pool.n; n++)
        for (size_t y = 0; y < oh; y++)
            for (size_t x = 0; x < ow; x++)
                for (size_t c = 0; c < pool.c; c++, at++) {
                    double best = -INFINITY, sum = 0;
                    for (size_t t = 0; t < pool.size * pool.size; t++) {
                        size_t sy = y * pool.size + t / pool.size, sx = x * pool.size + t % pool.size;
                        double v = in[0][((n * pool.h + sy) * pool.w + sx) * pool.c + c];
                        sum += v / (double)(pool.size * pool.size);
                        best = v > best ? v : best;
                    }
                    out[at] = pool.mean ? sum : best;
                }
    return at;
}

static void check_pool(nn_pool p) {
    static float y[MAX], dx[MAX];
    pool = p;
    size_t nx = p.n * p.h * p.w * p.c, ny = p.n * (p.h / p.size) * (p.w / p.size) * p.c;
    fill(0, nx, 41, 1);
    fill(1, ny, 42, 1);
    nn_pool_forward(&ops, &p, fin[0], y);
    check_forward(naive_pool, y, 1e-5);
    nn_pool_backward(&ops, &p, fin[0], y, fin[1], dx);
    check_gradient(naive_pool, fin[1], 0, nx, dx, 1e-5);
    nn_pool_backward(&ops, &p, fin[0], y, fin[1], fin[0]); /* in place */
    CHECK_SAME(fin[0], dx, nx);
}
static void test_pool_max(void) { check_pool((nn_pool){2, 4, 6, 5, 2, 0}); }
static void test_pool_max_left_over(void) { check_pool((nn_pool){1, 5, 7, 70, 2, 0}); }
static void test_pool_mean(void) { check_pool((nn_pool){2, 3, 3, 70, 3, 1}); }
static void test_pool_mean_left_over(void) { check_pool((nn_pool){1, 5, 4, 3, 2, 1}); }

/* Equal values: the gradient goes to the first of them, once. */
static void test_pool_ties(void) {
    nn_pool p = {1, 2, 2, 1, 2, 0};
    float x[4] = {1, 2, 2, 2}, y, dy = 5, dx[4];
    nn_pool_forward(&ops, &p, x, &y);
    nn_pool_backward(&ops, &p, x, &y, &dy, dx);
    CHECK(y == 2 && dx[0] == 0 && dx[1] == 5 && dx[2] == 0 && dx[3] == 0);
}

/* ---- linear: in[0] = x, in[1] = weight and bias ---- */
static struct { size_t rows, in, out; } linear;
static size_t naive_linear(double *out) {
    for (size_t r = 0; r < linear.rows; r++)
        for (size_t o = 0; o < linear.out; o++) {
            out[r * linear.out + o] = in[1][linear.in * linear.out + o];
            for (size_t i = 0; i < linear.in; i++)
                out[r * linear.out + o] += in[0][r * linear.in + i] * in[1][i * linear.out + o];
        }
    return linear.rows * linear.out;
}

static void test_linear(void) {
    static float y[MAX], dx[MAX], dw[MAX];
    linear.rows = 7, linear.in = 35, linear.out = 10;
    size_t nw = linear.in * linear.out;
    fill(0, linear.rows * linear.in, 51, 1);
    fill(1, nw + linear.out, 52, 1);
    fill(2, linear.rows * linear.out, 53, 1);
    nn_linear_forward(&ops, 7, 35, 10, fin[0], fin[1], fin[1] + nw, y);
    check_forward(naive_linear, y, 1e-5);
    nn_linear_backward(&ops, 7, 35, 10, fin[0], fin[1], fin[2], dx, dw, dw + nw);
    check_gradient(naive_linear, fin[2], 1, nw + linear.out, dw, 1e-4);
    check_gradient(naive_linear, fin[2], 0, 7 * 35, dx, 1e-4);
}

/* ---- cross-entropy: in[0] = logits ---- */
static struct {
    size_t rows, classes;
    double smoothing;
    unsigned char label[64];
} entropy;
static size_t naive_entropy(double *out) {
    out[0] = 0;
    for (size_t r = 0; r < entropy.rows; r++) {
        double sum = 0, k = (double)entropy.classes;
        for (size_t c = 0; c < entropy.classes; c++) sum += exp(in[0][r * entropy.classes + c]);
        for (size_t c = 0; c < entropy.classes; c++) {
            double target = entropy.smoothing / k + (c == entropy.label[r] ? 1 - entropy.smoothing : 0);
            out[0] -= target * (in[0][r * entropy.classes + c] - log(sum)) / (double)entropy.rows;
        }
    }
    return 1;
}

static void test_cross_entropy(void) {
    static float prob[MAX], dx[MAX];
    const float one = 1;
    for (int smooth = 0; smooth < 2; smooth++) {
        entropy.rows = 9, entropy.classes = 10, entropy.smoothing = smooth * 0.2;
        fill(0, 90, 61, 3);
        for (size_t r = 0; r < 9; r++) entropy.label[r] = (unsigned char)(r * 7 % 10);
        float loss =
            (float)(nn_cross_entropy(&ops, 9, 10, (float)entropy.smoothing, fin[0], entropy.label, prob, dx) / 9);
        check_forward(naive_entropy, &loss, 1e-5);
        check_gradient(naive_entropy, &one, 0, 90, dx, 1e-5);
    }
    float far[2] = {-500, 500}, p[2]; /* the logarithm of a probability of 0 */
    unsigned char label = 0;
    CHECK(isfinite(nn_cross_entropy(&ops, 1, 2, 0, far, &label, p, NULL)));
}

/* ---- parameters ---- */
static void test_count_right(void) {
    const float logits[4 * 3] = {1, 2, 3, 3, 2, 1, 0, 5, 5, -1, -2, -3}; /* the third: a tie goes to the lower class */
    const unsigned char label[4] = {2, 0, 1, 1};
    CHECK(nn_count_right(4, 3, logits, label) == 3);
    CHECK(nn_count_right(2, 3, logits, label + 2) == 0);
    CHECK(nn_count_right(0, 3, logits, label) == 0);
}

static void test_use_isa(void) {
    CHECK(nn_use_isa("scalar") && moe_active_isa() == MOE_ISA_SCALAR);
    CHECK(!nn_use_isa("mmx") && moe_active_isa() == MOE_ISA_SCALAR);
    CHECK(nn_use_isa("auto"));
}

static void test_bank(void) {
    nn_bank b = {0};
    size_t w = nn_add(&b, 5, 1), bias = nn_add(&b, 3, 0);
    CHECK(w == 0 && bias == 5 && b.count == 8);
    nn_bank_alloc(&ops, &b);
    for (int i = 0; i < 8; i++) b.value[i] = 1;
    nn_bank_step(
        &b, (moe_optimizer_args){.lr = 0.1f, .weight_decay = 0.5f, .step = 1}); /* gradient 0: only the decay acts */
    for (int i = 0; i < 5; i++) CHECK_NEAR(b.value[i], 0.95, 1e-6);
    for (int i = 5; i < 8; i++) CHECK(b.value[i] == 1);
}

/* ---- the same bits for any number of threads ---- */
enum { SHAPE_N = 3, SHAPE = 20, SHAPE_C = 33, SHAPE_F = 24 };

/* All operations one after another; returns a hash of all that they gave. */
static uint64_t everything(size_t threads) {
    nn s = {.parallel = {.n_threads = threads}};
    nn_conv v = {SHAPE_N, SHAPE, SHAPE, SHAPE_C, 3, 1, 1, SHAPE_F};
    nn_pool p = {SHAPE_N, SHAPE, SHAPE, SHAPE_F, 2, 0};
    size_t rows = SHAPE_N * SHAPE * SHAPE, nx = rows * SHAPE_C, ny = rows * SHAPE_F, nw = nn_conv_weights(&v);
    float *x = allocate(nx, sizeof(float)), *w = allocate(nw, sizeof(float)), *y = allocate(ny, sizeof(float));
    float *z = allocate(ny, sizeof(float)), *q = allocate(ny, sizeof(float)), *dx = allocate(nx, sizeof(float));
    float mean[SHAPE_F], variance[SHAPE_F], gamma[SHAPE_F], beta[SHAPE_F], dgamma[SHAPE_F], dbeta[SHAPE_F],
        prob[9 * 10];
    unsigned char label[9] = {0};
    nn_must(moe_rand_normal(5, 1, nx, 0, 1, x));
    nn_must(moe_rand_normal(5, 2, nw, 0, 0.1f, w));
    nn_must(moe_rand_uniform(5, 3, SHAPE_F, 0.5f, 1.5f, gamma));
    nn_must(moe_rand_uniform(5, 4, SHAPE_F, -1, 1, beta));
    uint64_t h = 0;
#define MIX(array, n) h = moe_hash(h, array, (n) * sizeof(float))
    nn_conv_forward(&s, &v, x, w, y);
    MIX(y, ny);
    nn_moments(&s, rows, SHAPE_F, y, mean, variance);
    MIX(mean, SHAPE_F);
    MIX(variance, SHAPE_F);
    nn_norm_forward(&s, rows, SHAPE_F, 1, y, mean, variance, gamma, beta, y, z);
    MIX(z, ny);
    nn_gelu_forward(&s, ny, z, z);
    MIX(z, ny);
    nn_pool_forward(&s, &p, z, q);
    MIX(q, ny / 4);
    nn_pool_backward(&s, &p, z, q, q, z);
    MIX(z, ny);
    nn_gelu_backward(&s, ny, y, z, z);
    nn_norm_backward(&s, rows, SHAPE_F, 1, y, mean, variance, gamma, beta, z, z, dgamma, dbeta);
    MIX(z, ny);
    MIX(dgamma, SHAPE_F);
    MIX(dbeta, SHAPE_F);
    nn_conv_backward_data(&s, &v, z, w, 0, dx);
    MIX(dx, nx);
    nn_conv_backward_weight(&s, &v, x, z, w);
    MIX(w, nw);
    nn_relu_forward(&s, nx, x, dx);
    MIX(dx, nx);
    double loss = nn_cross_entropy(&s, 9, 10, 0.1f, x, label, prob, prob);
    h = moe_hash(h, &loss, sizeof loss);
#undef MIX
    nn_free(&s);
    free(x), free(w), free(y), free(z), free(q), free(dx);
    return h;
}

static void test_threads(void) {
    uint64_t one = everything(1);
    for (size_t threads = 2; threads <= 5; threads++) CHECK(everything(threads) == one);
}

static void test_isa(void) {
    uint64_t best = everything(1);
    for (int isa = MOE_ISA_SCALAR; isa < MOE_ISA_COUNT; isa++)
        if (moe_force_isa((moe_isa_kind)isa) == MOE_OK) CHECK(everything(2) == best);
    CHECK_OK(moe_force_isa(MOE_ISA_AUTO));
}

int main(void) {
    RUN(test_conv_3x3);
    RUN(test_conv_3x3_no_pad);
    RUN(test_conv_3x3_stride);
    RUN(test_conv_1x1);
    RUN(test_conv_1x1_stride);
    RUN(test_conv_2x2);
    RUN(test_conv_2x2_stride_pad);
    RUN(test_conv_wide);
    RUN(test_conv_one_pixel);
    RUN(test_norm);
    RUN(test_norm_relu);
    RUN(test_norm_relu_add);
    RUN(test_norm_add);
    RUN(test_moments_blocks);
    RUN(test_norm_evaluation);
    RUN(test_track);
    RUN(test_relu);
    RUN(test_gelu);
    RUN(test_norm_act_relu);
    RUN(test_norm_act_gelu);
    RUN(test_pool_max);
    RUN(test_pool_max_left_over);
    RUN(test_pool_mean);
    RUN(test_pool_mean_left_over);
    RUN(test_pool_ties);
    RUN(test_linear);
    RUN(test_cross_entropy);
    RUN(test_count_right);
    RUN(test_use_isa);
    RUN(test_bank);
    RUN(test_threads);
    RUN(test_isa);
    nn_free(&ops);
    return test_end();
}

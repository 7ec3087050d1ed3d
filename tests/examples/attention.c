/* The attention of examples/common/attention.h: the forward against a naive version in double, the
 * backward against central differences of that version, and the same bits for any number of threads. */
#include "test.h"

#include "examples/common/attention.h"

enum { N = 5, L = 4, D = 6, E = 3, WIDE = N * L * D, WEIGHT = E * D * D };
static const int32_t expert[N] = {2, 0, 2, 1, 0};
static double x[WIDE], w[WEIGHT];
static float fx[WIDE], fw[WEIGHT], dy[WIDE];

/* The sum of y * dy; y (N, L, D) is set. */
static double naive(double *y) {
    double sum = 0;
    for (size_t i = 0; i < N; i++)
        for (size_t a = 0; a < L; a++) {
            double p[L], total = 0;
            for (size_t b = 0; b < L; b++) {
                double s = 0;
                for (size_t r = 0; r < D; r++)
                    for (size_t c = 0; c < D; c++)
                        s += x[(i * L + a) * D + r] * w[((size_t)expert[i] * D + r) * D + c] * x[(i * L + b) * D + c];
                total += p[b] = exp(s / sqrt((double)D));
            }
            for (size_t c = 0; c < D; c++) {
                double *out = &y[(i * L + a) * D + c];
                *out = 0;
                for (size_t b = 0; b < L; b++) *out += p[b] / total * x[(i * L + b) * D + c];
                sum += *out * (double)dy[(i * L + a) * D + c];
            }
        }
    return sum;
}
static double difference(double *at) {
    static double y[WIDE];
    double keep = *at, h = 1e-5;
    *at = keep + h;
    double up = naive(y);
    *at = keep - h;
    double down = naive(y);
    *at = keep;
    return (up - down) / (2 * h);
}
static void fill(void) {
    test_fill(fx, WIDE, -2, 2);
    test_fill(fw, WEIGHT, -1, 1);
    test_fill(dy, WIDE, -1, 1);
    for (size_t i = 0; i < WIDE; i++) x[i] = (double)fx[i];
    for (size_t i = 0; i < WEIGHT; i++) w[i] = (double)fw[i];
}
static attention make(nn *s) {
    attention a = attention_new(s, N, L, D, E, 1);
    a.expert = expert;
    a.x = fx;
    a.weight = fw;
    a.dy = dy;
    a.dweight = nn_floats(s, WEIGHT);
    a.dx = nn_floats(s, WIDE);
    attention_forward(s, &a);
    attention_backward(s, &a);
    return a;
}

static void test_gradients(void) {
    static double y[WIDE];
    nn s = {.parallel = {.n_threads = 1}};
    fill();
    attention a = make(&s);
    naive(y);
    for (size_t i = 0; i < WIDE; i++) CHECK_NEAR(a.y[i], y[i], 1e-4);
    for (size_t i = 0; i < WEIGHT; i++) CHECK_NEAR(a.dweight[i], difference(&w[i]), 1e-3);
    for (size_t i = 0; i < WIDE; i++) CHECK_NEAR(a.dx[i], difference(&x[i]), 1e-3);
    nn_free(&s);
}
/* W = 0: everyone gets the mean of the sequence. */
static void test_zero(void) {
    nn s = {.parallel = {.n_threads = 1}};
    fill();
    memset(fw, 0, sizeof fw);
    attention a = make(&s);
    for (size_t i = 0; i < WIDE; i++) {
        float mean = 0;
        for (size_t b = 0; b < L; b++) mean += fx[(i / (L * D) * L + b) * D + i % D] / L;
        CHECK_NEAR(a.y[i], mean, 1e-5);
    }
    nn_free(&s);
}
/* An expert that no sequence uses has a gradient of zeros, whatever was there. */
static void test_unused(void) {
    static const int32_t one[N] = {1, 1, 1, 1, 1};
    nn s = {.parallel = {.n_threads = 1}};
    fill();
    attention a = make(&s);
    a.expert = one;
    attention_forward(&s, &a);
    attention_backward(&s, &a);
    for (size_t i = 0; i < D * D; i++) CHECK(a.dweight[i] == 0 && a.dweight[2 * D * D + i] == 0);
    CHECK(moe_sum_squares(NULL, D * D, a.dweight + D * D) > 0);
    nn_free(&s);
}
static void test_threads(void) {
    nn s = {.parallel = {.n_threads = 1}}, more = {.parallel = {.n_threads = 3}};
    fill();
    attention a = make(&s), b = make(&more);
    CHECK_SAME(a.y, b.y, WIDE);
    CHECK_SAME(a.dweight, b.dweight, WEIGHT);
    CHECK_SAME(a.dx, b.dx, WIDE);
    nn_free(&s);
    nn_free(&more);
}

int main(void) {
    RUN(test_gradients);
    RUN(test_zero);
    RUN(test_unused);
    RUN(test_threads);
    return test_end();
}

/* The frozen extractor of the examples (examples/common/features.h) on made-up images, against a naive
 * version in double and against what it promises of its tokens. */
#include "test.h"
#include "examples/common/features.h"


enum { IMAGES = 40, D = FEATURES_WIDTH, T = FEATURES_TOKENS, N = FEATURES_RAW, K = FEATURES_WORDS / 2 };

static nn ops;
static cifar_set set;
static features *fitted;

/* Images with structure at several scales: sums of random waves, and noise. */
static void make_images(void) {
    set.count = IMAGES;
    set.records = allocate(IMAGES, CIFAR_RECORD);
    for (size_t i = 0; i < IMAGES; i++) {
        unsigned char *record = set.records + i * CIFAR_RECORD;
        record[0] = (unsigned char)(i % CIFAR_CLASSES);
        for (int plane = 0; plane < 3; plane++) {
            float a = test_uniform(0, 1), b = test_uniform(0, 1), c = test_uniform(0, 60);
            for (int p = 0; p < CIFAR_PIXELS; p++) {
                double v =
                    128 + (double)c * sin((double)a * (p / 32) + (double)b * (p % 32)) + (double)test_uniform(-60, 60);
                record[1 + plane * CIFAR_PIXELS + p] = (unsigned char)v;
            }
        }
    }
}

static void test_patch(void) {
    float image[3 * CIFAR_PIXELS], patch[FEATURES_PIXELS];
    test_fill(image, 3 * CIFAR_PIXELS, -2, 2);
    features_patch(image, 27, 26, patch); /* the last row of positions */
    double sum = 0, square = 0, mean = 0;
    for (int k = 0; k < FEATURES_PIXELS; k++) sum += (double)patch[k], square += (double)patch[k] * (double)patch[k];
    CHECK_WITHIN(sum / FEATURES_PIXELS, 0, 1e-7);
    CHECK(square / FEATURES_PIXELS > 0.98 && square / FEATURES_PIXELS < 1);
    for (size_t k = 0; k < FEATURES_PIXELS; k++)
        mean += (double)image[((27 + k / 15) * 32 + 26 + k / 3 % 5) * 3 + k % 3] / FEATURES_PIXELS;
    double ratio = ((double)image[(27 * 32 + 26) * 3] - mean) / (double)patch[0];
    for (size_t k = 0; k < FEATURES_PIXELS; k++)
        CHECK_WITHIN((double)image[((27 + k / 15) * 32 + 26 + k / 3 % 5) * 3 + k % 3] - mean, ratio * (double)patch[k],
                     2e-6);
    for (int k = 0; k < 3 * CIFAR_PIXELS; k++) image[k] = 0.7f; /* no contrast: nothing */
    features_patch(image, 0, 0, patch);
    for (int k = 0; k < FEATURES_PIXELS; k++) CHECK_WITHIN(patch[k], 0, 1e-5);
}

/* Points near the axes of three directions, on both sides: these are what is found. */
static void test_cluster(void) {
    enum { ROWS = 300, C = 7 };
    float x[ROWS * C], centre[3 * C];
    for (size_t r = 0; r < ROWS; r++)
        for (size_t k = 0; k < C; k++)
            x[r * C + k] =
                test_uniform(-0.05f, 0.05f) + (k == r / 100 ? (r % 2 ? 1.0f : -1.0f) * test_uniform(0.5f, 2) : 0);
    features_cluster(&ops, ROWS, C, 3, x, centre);
    for (size_t i = 0; i < 3; i++)
        for (size_t k = 0; k < C; k++) CHECK_WITHIN(fabsf(centre[i * C + k]), k == i, 0.03);
}

/* The eigenvectors rebuild the covariance, and the mean is gone. */
static void test_spectrum(void) {
    enum { ROWS = 50, C = 9 };
    float x[ROWS * C], copy[ROWS * C], mean[C];
    double value[C], vector[C * C], m[C] = {0};
    test_fill(x, ROWS * C, -1, 2);
    memcpy(copy, x, sizeof x);
    features_spectrum(&ops, ROWS, C, x, mean, value, vector);
    for (size_t i = 0; i < ROWS * C; i++) m[i % C] += (double)copy[i] / ROWS;
    for (size_t k = 0; k < C; k++) CHECK_NEAR(mean[k], m[k], 5e-7);
    for (size_t i = 0; i < ROWS * C; i++) CHECK_WITHIN(x[i], (double)copy[i] - m[i % C], 8e-7);
    for (size_t a = 0; a < C; a++)
        for (size_t b = 0; b < C; b++) {
            double want = 0, got = 0, unit = 0;
            for (size_t r = 0; r < ROWS; r++)
                want += ((double)copy[r * C + a] - m[a]) * ((double)copy[r * C + b] - m[b]) / ROWS;
            for (size_t i = 0; i < C; i++) got += value[i] * vector[i * C + a] * vector[i * C + b];
            for (size_t k = 0; k < C; k++) unit += vector[a * C + k] * vector[b * C + k];
            CHECK_WITHIN(got, want, 9e-7);
            CHECK_WITHIN(unit, a == b, 1e-9);
        }
}

/* The averages of one image, from the patches on. */
static void test_raw(void) {
    float image[3 * CIFAR_PIXELS], patch[FEATURES_PIXELS], got[T * N];
    unsigned char label[1], want_label[1];
    for (int flip = 0; flip < 2; flip++) {
        static double want[T * N];
        memset(want, 0, sizeof want);
        cifar_batch b = {.set = &set, .first = 33, .count = 1, .flip = 2 * flip, .x = image, .label = want_label};
        cifar_batch_make(&b, &ops.parallel);
        for (size_t row = 0; row < 28; row++)
            for (size_t col = 0; col < 28; col++) {
                features_patch(image, row, col, patch);
                for (size_t k = 0; k < FEATURES_FILTERS; k++) {
                    double z = (double)fitted->bias[k], *cell = want + (row / 7 * 4 + col / 7) * N + k;
                    for (size_t i = 0; i < FEATURES_PIXELS; i++)
                        z += (double)patch[i] * (double)fitted->filter[i * FEATURES_FILTERS + k];
                    cell[0] += fmax(z - 0.5, 0) / 49;
                    cell[FEATURES_FILTERS] += fmax(-z - 0.5, 0) / 49;
                }
            }
        features_raw(&ops, fitted, &set, 33, 1, flip, got, label);
        CHECK(label[0] == want_label[0] && label[0] == 3);
        for (size_t i = 0; i < T * N; i++) CHECK_WITHIN((double)got[i] * (double)got[i], want[i], 1e-6);
    }
}

/* Tokens without their position: mean 0, uncorrelated, a variance of about 1 over all, more in the first directions.
 * The id is the nearest prototype and its side. */
static void test_tokens(void) {
    tokens t = features_make(&ops, fitted, &set, 0, NULL, 0);
    double variance = 0, first = 0, last = 0;
    if (!CHECK(t.count == IMAGES)) return;
    for (size_t i = 0; i < IMAGES; i++) CHECK(t.label[i] == i % CIFAR_CLASSES);
    for (size_t i = 0; i < IMAGES * T * D; i++) t.x[i] -= fitted->position[i % (T * D)];
    for (size_t a = 0; a < D; a++)
        for (size_t b = 0; b <= a; b++) {
            double sum = 0, mean = 0;
            for (size_t r = 0; r < IMAGES * T; r++) {
                sum += (double)t.x[r * D + a] * (double)t.x[r * D + b] / (IMAGES * T);
                mean += (double)t.x[r * D + a] / (IMAGES * T);
            }
            CHECK_WITHIN(mean, 0, 2e-6);
            if (a != b) CHECK_WITHIN(sum, 0, 2e-6);
            else variance += sum / D;
            if (a == b && a == 0) first = sum;
            if (a == b && a == D - 1) last = sum;
        }
    CHECK(variance > 0.8 && variance < 1.01);
    CHECK(first > 2 * last && last > 0);
    size_t words = 0, count[FEATURES_WORDS] = {0};
    for (size_t r = 0; r < IMAGES * T; r++) {
        double similarity[K], best = 0;
        if (!CHECK(t.id[r] < FEATURES_WORDS)) return;
        words += count[t.id[r]]++ == 0;
        for (size_t k = 0; k < K; k++) {
            similarity[k] = 0;
            for (size_t i = 0; i < D; i++)
                similarity[k] += (double)t.x[r * D + i] * (double)fitted->prototype[k * D + i];
            best = fmax(best, fabs(similarity[k]));
        }
        double of_id = similarity[t.id[r] / 2] * (t.id[r] % 2 ? -1 : 1);
        CHECK_WITHIN(of_id, best, 1e-7);
    }
    CHECK(words > FEATURES_WORDS / 4);
    tokens_free(&t);
}

/* The same bits for 1 and 3 threads, from the fit on; another seed, other tokens; mirrored images, other tokens. */
static void test_same(void) {
    tokens want = features_make(&ops, fitted, &set, 0, NULL, 0),
           mirrored = features_make(&ops, fitted, &set, 1, NULL, 0);
    nn other = {.parallel = {.n_threads = 3}};
    for (uint64_t seed = 5; seed < 7; seed++) {
        features *f = features_fit(&other, &set, seed);
        tokens t = features_make(&other, f, &set, 0, NULL, 0);
        if (seed == 5) {
            CHECK_SAME(t.x, want.x, IMAGES * T * D);
            CHECK(memcmp(t.id, want.id, IMAGES * T * sizeof *t.id) == 0);
        } else {
            CHECK(memcmp(t.x, want.x, IMAGES * T * D * sizeof(float)) != 0);
        }
        tokens_free(&t);
        features_free(f);
    }
    CHECK(memcmp(mirrored.x, want.x, IMAGES * T * D * sizeof(float)) != 0);
    CHECK(memcmp(mirrored.label, want.label, IMAGES) == 0);
    tokens_free(&want);
    tokens_free(&mirrored);
    nn_free(&other);
}

int main(void) {
    ops.parallel.n_threads = 1;
    make_images();
    fitted = features_fit(&ops, &set, 5);
    RUN(test_patch);
    RUN(test_cluster);
    RUN(test_spectrum);
    RUN(test_raw);
    RUN(test_tokens);
    RUN(test_same);
    features_free(fitted);
    free(set.records);
    nn_free(&ops);
    return test_end();
}

// Rebuilds router.npy, the sample of examples/inspect.c: what three routers say about patches of real pictures.
//
//     cc -O2 -I. -Iexamples examples/data/make_router.c -o build/make_router -lm && build/make_router
//
// Three layers of 16 experts, top-2, learn to foretell the patch (8 x 8 pixels) to the right of the one that they see,
// on the CIFAR-10 sample. They differ in their balance loss alone: none, 0.01 and 0.1. Their logits for the same 2000
// patches are written as float16, (3, 2000, 16). The same bytes on every machine.
#define MOE_IMPLEMENTATION
#include "common/cifar.h"

enum { SIDE = 8, D = 3 * SIDE * SIDE, EXPERTS = 16, LAYERS = 3, BATCH = 512, STEPS = 150, DUMPED = 2000 };

// Patch `column` of row `row` of a picture, 0 to 2: (D)
static void patch(const unsigned char *record, size_t row, size_t column, float *out) {
    for (size_t c = 0; c < 3; c++)
        for (size_t y = 0; y < SIDE; y++)
            for (size_t x = 0; x < SIDE; x++)
                *out++ =
                    (float)record[1 + c * CIFAR_PIXELS + (row * SIDE + y) * CIFAR_SIDE + column * SIDE + x] / 128.0f;
}

static void batch(const cifar_set *set, uint64_t stream, size_t n, float *x, float *next) {
    for (size_t i = 0; i < n; i++) {
        size_t pick = moe_rand_u32(1, stream, i) % (set->count * 12), at = pick % 12;
        patch(set->records + pick / 12 * CIFAR_RECORD, at / 3, at % 3, x + i * D);
        if (next) patch(set->records + pick / 12 * CIFAR_RECORD, at / 3, at % 3 + 1, next + i * D);
    }
}

// The nearest float16, for numbers of its normal range; smaller ones become 0.
static uint16_t half(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    uint32_t sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest < 0x38800000) return (uint16_t)sign;
    rest += 0xfff + (rest >> 13 & 1); // to nearest, ties to even
    if (rest >= 0x47800000) die("%g is no float16", (double)x);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

int main(int argc, char **argv) {
    static const float balance[LAYERS] = {0, 0.01f, 0.1f};
    static float x[DUMPED * D], next[BATCH * D], y[DUMPED * D], dy[BATCH * D];
    const char *path = argc > 1 ? argv[1] : "examples/data/router.npy";
    cifar data;
    cifar_load(&data, NULL, argv[0]);
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s", path);
    char header[118];
    memset(header, ' ', sizeof header);
    int n = snprintf(header, sizeof header, "{'descr': '<f2', 'fortran_order': False, 'shape': (%d, %d, %d), }", LAYERS,
                     DUMPED, EXPERTS);
    header[n] = ' ', header[sizeof header - 1] = '\n';
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, f);
    fwrite(header, 1, sizeof header, f);
    for (int layer = 0; layer < LAYERS; layer++) {
        moe_desc d = {.d_model = D, .d_ff = 64, .n_experts = EXPERTS, .top_k = 2, .seed = 1 + (uint64_t)layer};
        d.loss[MOE_LOSS_SWITCH] = balance[layer];
        moe_layer *m = NULL;
        moe_status s = moe_layer_new(&m, &d);
        double error = 0;
        for (uint64_t step = 0; step < STEPS && !s; step++) {
            batch(&data.train, step, BATCH, x, next);
            s = moe_forward(m, x, BATCH, y);
            error = 0;
            for (size_t i = 0; i < BATCH * D; i++) {
                dy[i] = 2 * (y[i] - next[i]) / (BATCH * D);
                error += (double)((y[i] - next[i]) * (y[i] - next[i])) / (BATCH * D);
            }
            if (!s) s = moe_backward(m, dy, NULL);
            if (!s) s = moe_step(m, moe_schedule_cosine(step, 20, STEPS, 3e-3f, 0));
        }
        batch(&data.train, 1 << 20, DUMPED, x, NULL);
        if (!s) s = moe_forward(m, x, DUMPED, y);
        if (s) die("%s", moe_status_string(s));
        const moe_tape *t = moe_layer_tape(m);
        for (size_t i = 0; i < DUMPED * EXPERTS; i++) {
            uint16_t h = half(t->logits[i]);
            unsigned char bytes[2] = {(unsigned char)h, (unsigned char)(h >> 8)};
            fwrite(bytes, 1, 2, f);
        }
        printf("balance %.2f: error %.4f\n", (double)balance[layer], error);
        moe_layer_free(m);
    }
    if (ferror(f) || fclose(f)) die("cannot write %s", path);
    return 0;
}

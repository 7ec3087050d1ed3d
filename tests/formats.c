/* Formats of weights: what a matrix in panels is after packing (within the bounds that follow from the format), and
 * that products, layers, gradients and files are those of float32 with the same weights, bit for bit. */
#define MOE_IMPLEMENTATION
#include "test.h"

enum { D = 33, F = 40, E = 5, T = 7 };

/* A matrix in a format, and the floats that it stands for, in panels. */
typedef struct packed { void *memory, *floats; moe__weights weights, exact; } packed;
static void *aligned(size_t bytes, void **memory) {
    *memory = test_memory(bytes + 64, 1);
    return (char *)*memory + (64 - (uintptr_t)*memory % 64) % 64;
}
static packed pack(moe_format_kind kind, const float *matrix, size_t rows, size_t columns) {
    packed made;
    size_t panels = (columns + 31) / 32, stride = moe__format_panel(&moe__format_table[kind], rows);
    float *exact = (float *)aligned(panels * rows * 128, &made.floats);
    unsigned char *data = (unsigned char *)aligned(panels * stride, &made.memory);
    memset(data, 0xff, panels * stride);
    made.weights = moe__format_over(data, kind, rows);
    made.exact = moe__format_f32(exact, rows);
    float *padded = (float *)test_floats(rows * 32);
    for (size_t panel = 0; panel < panels; panel++) {
        for (size_t i = 0; i < rows * 32; i++) {
            size_t c = panel * 32 + i % 32;
            padded[i] = c < columns ? matrix[i / 32 * columns + c] : 0;
        }
        moe__format_write(moe__dispatched(), &made.weights, panel, 0, rows, padded);
    }
    free(padded);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < panels * 32; c++)
            exact[(c / 32 * rows + r) * 32 + c % 32] = moe__format_value(&made.weights, r, c);
    return made;
}
/* The words of a panel as the room's drawing has them, element by element. */
static uint32_t nearest_bfloat(float x) { /* of the two around it, in double precision */
    uint32_t below = test_bits(x) >> 16;
    double low = moe__float_of(below << 16), next = moe__float_of((below + 1) << 16);
    if (!moe__finite((float)next)) return below;
    double near = fabs((double)x - low), far = fabs(next - (double)x);
    return near < far || (near == far && below % 2 == 0) ? below : below + 1;
}
static void naive_words(int kind, const float *matrix, size_t rows, size_t columns, size_t panel, uint32_t *words) {
    unsigned bits = kind == MOE_FORMAT_BF16 ? 16 : kind == MOE_FORMAT_INT8 ? 8 : 4;
    size_t per = 16 / bits, scaled = kind != MOE_FORMAT_BF16, block = (scaled + 32 / per) * 16;
    double most = bits == 8 ? 127 : 7;
    memset(words, 0, (rows + 31) / 32 * block * sizeof *words);
    for (size_t b = 0; b < rows; b += 32, words += block)
        for (size_t c = 0; c < 32 && panel * 32 + c < columns; c++) {
            size_t column = panel * 32 + c, end = b + 32 < rows ? b + 32 : rows;
            float high = 0;
            for (size_t r = b; r < end; r++) high = fmaxf(high, fabsf(matrix[r * columns + column]));
            float step = high / (float)most;
            uint32_t least = test_bits(ldexpf(1, -110)) >> 16;
            uint32_t scale = (test_bits(step) >> 16) + ((test_bits(step) & 0xffffu) != 0);
            if (isinf(moe__float_of(scale << 16) * (float)most)) scale--;
            if (step > 0 && scale < least) scale = least;
            if (scaled) words[c % 16] |= scale << (c / 16 * 16);
            for (size_t r = b; r < end; r++) {
                float w = matrix[r * columns + column];
                double q = scale ? rint((double)(w / moe__float_of(scale << 16))) : 0;
                uint32_t field = (uint32_t)(int32_t)fmin(fmax(q, -most), most) & ((1u << bits) - 1);
                if (!scaled) field = nearest_bfloat(w);
                size_t in = r - b, shift = (in % per * 2 + c / 16) * bits;
                words[(scaled + in / per) * 16 + c % 16] |= field << shift;
            }
        }
}
static void unpack(packed *made) { free(made->memory), free(made->floats); }
static void check_words(int kind, const float *matrix, size_t rows, size_t columns) {
    if (kind == MOE_FORMAT_F32) return;
    size_t size = moe__format_panel(&moe__format_table[kind], rows);
    uint32_t *want = (uint32_t *)test_memory(size, 1);
    FOR_EACH_ISA(isa) {
        packed made = pack((moe_format_kind)kind, matrix, rows, columns);
        for (size_t panel = 0; panel < (columns + 31) / 32; panel++) {
            naive_words(kind, matrix, rows, columns, panel, want);
            CHECK(!memcmp(moe__format_at(&made.weights, panel, 0), want, size));
        }
        unpack(&made);
    }
    free(want);
}

/* The largest magnitude of the up to 32 weights that share a scale with this one. */
static double highest(const float *matrix, size_t rows, size_t columns, size_t r, size_t c) {
    double high = 0;
    for (size_t i = r / 32 * 32; i < rows && i < r / 32 * 32 + 32; i++) {
        double x = fabs((double)matrix[i * columns + c]);
        if (x > high) high = x;
    }
    return high;
}
/* bf16: half a unit in the last of 8 bits. Integers: half a step, which is high / most, and up to 2^-7 more, for the
 * scale is rounded up to 8 bits. */
static double allowed_error(int kind, double w, double high) {
    if (kind == MOE_FORMAT_F32) return 0;
    if (kind == MOE_FORMAT_BF16) return fabs(w) / 256 + 1e-40;
    return 0.5 * fmax(high / (kind == MOE_FORMAT_INT8 ? 127 : 7) * (1 + 1.0 / 128), ldexp(1, -110));
}
static void check_values(int kind, const float *matrix, size_t rows, size_t columns) {
    packed made = pack((moe_format_kind)kind, matrix, rows, columns);
    const float *exact = (const float *)made.exact.data;
    size_t panels = (columns + 31) / 32;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < panels * 32; c++) {
            double got = exact[(c / 32 * rows + r) * 32 + c % 32], want = c < columns ? matrix[r * columns + c] : 0;
            double high = c < columns ? highest(matrix, rows, columns, r, c) : 0;
            CHECK_WITHIN(got, want, allowed_error(kind, want, high));
        }
    FOR_EACH_ISA(isa) { /* what the kernels fetch is that, whole panels and block by block */
        MOE__ALIGN64 float got[36 * 32 * 4];
        for (size_t panel = 0; panel < panels; panel++)
            for (size_t r = 0; r < rows; r += 32) {
                size_t n = rows - r < 129 ? rows - r : 129;
                const float *at = moe__format_rows(moe__dispatched(), &made.weights, panel, r, n, got);
                CHECK_SAME(at, exact + (panel * rows + r) * 32, n * 32);
            }
    }
    unpack(&made);
}
static void test_values(void) {
    static const size_t shape[][2] = {{1, 1}, {9, 70}, {33, 33}, {64, 32}, {130, 40}};
    for (int kind = 0; kind < MOE_FORMAT_COUNT; kind++)
        for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
            size_t n = shape[i][0] * shape[i][1];
            float *matrix = test_floats(n);
            test_fill(matrix, n, -1, 1);
            matrix[n / 2] = 0;
            check_values(kind, matrix, shape[i][0], shape[i][1]);
            check_words(kind, matrix, shape[i][0], shape[i][1]);
            for (size_t k = 0; k < n; k++) matrix[k] *= k % 3 ? 1e-38f : 1e-3f; /* subnormals too */
            check_values(kind, matrix, shape[i][0], shape[i][1]);
            check_words(kind, matrix, shape[i][0], shape[i][1]);
            for (size_t k = 0; k < n; k++) { /* any finite bits: the largest, -0, between two bfloats */
                uint32_t bits = test_u32();
                if (k % 3 == 0) bits = (bits & 0xffff0000u) | (k % 2 ? 0x8000u : 0x7fffu);
                matrix[k] = moe__finite(moe__float_of(bits)) ? moe__float_of(bits) : -3.4028235e38f;
            }
            check_words(kind, matrix, shape[i][0], shape[i][1]);
            free(matrix);
        }
}
static void test_hand(void) { /* by hand: scale 1 (127 / 127, 7 / 7), ties to even */
    static const float w[6] = {127, -127, 2.5f, 3.5f, -0.5f, 0}, q[6] = {127, -127, 2, 4, 0, 0};
    static const float v[6] = {-7, 7, 2.5f, 3.5f, -0.5f, 6.6f}, n[6] = {-7, 7, 2, 4, 0, 7};
    packed a = pack(MOE_FORMAT_INT8, w, 6, 1), b = pack(MOE_FORMAT_INT4, v, 6, 1);
    for (size_t i = 0; i < 6; i++) {
        CHECK(moe__format_value(&a.weights, i, 0) == q[i]);
        CHECK(moe__format_value(&b.weights, i, 0) == n[i]);
    }
    unpack(&a), unpack(&b);
    /* bf16: 1 + 2^-8 lies between 1 and 1 + 2^-7, ties to even; the largest float does not become infinite */
    static const float x[4] = {1.00390625f, 1.01171875f, 3.4028235e38f, -1e-45f};
    packed c = pack(MOE_FORMAT_BF16, x, 4, 1);
    CHECK(moe__format_value(&c.weights, 0, 0) == 1.0f);
    CHECK(moe__format_value(&c.weights, 1, 0) == 1.015625f);
    CHECK(moe__format_value(&c.weights, 2, 0) == moe__float_of(0x7f7f0000u));
    CHECK(moe__format_value(&c.weights, 3, 0) == 0.0f);
    unpack(&c);
    packed d = pack(MOE_FORMAT_INT8, x + 2, 1, 1), e = pack(MOE_FORMAT_INT4, x + 2, 1, 1);
    CHECK(moe__finite(moe__format_value(&d.weights, 0, 0)) && moe__format_value(&d.weights, 0, 0) > 3.3e38f);
    CHECK(moe__finite(moe__format_value(&e.weights, 0, 0)) && moe__format_value(&e.weights, 0, 0) > 3.3e38f);
    unpack(&d), unpack(&e);
}

/* -- products -- */
static void check_product(int kind, size_t rows, size_t k, size_t n) {
    MOE__ALIGN64 static float room[(MOE__KC + MOE__W) * MOE__W];
    size_t ap = (k + 31) / 32, np = (n + 31) / 32;
    float *matrix = test_floats(k * n), *a = test_floats(ap * 32 * rows), *at = test_floats(np * 32 * rows);
    float *want = test_floats(rows * n), *got = test_floats(rows * n), *bias = test_floats(np * 32);
    float *want_t = test_floats(rows * k), *got_t = test_floats(rows * k);
    test_fill(matrix, k * n, -1, 1);
    test_fill(a, ap * 32 * rows, -1, 1);
    test_fill(at, np * 32 * rows, -1, 1);
    test_fill(bias, np * 32, -1, 1);
    packed made = pack((moe_format_kind)kind, matrix, k, n);
    const float *w = (const float *)made.exact.data; /* one chain each, in increasing k */
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < n; c++) {
            float sum = bias[c];
            for (size_t i = 0; i < k; i++)
                sum = fmaf(a[i / 32 * rows * 32 + r * 32 + i % 32], w[(c / 32 * k + i) * 32 + c % 32], sum);
            want[r * n + c] = sum;
        }
        for (size_t i = 0; i < k; i++) {
            float sum = 0;
            for (size_t c = 0; c < n; c++)
                sum = fmaf(at[c / 32 * rows * 32 + r * 32 + c % 32], w[(c / 32 * k + i) * 32 + c % 32], sum);
            want_t[r * k + i] = sum;
        }
    }
    FOR_EACH_ISA(isa) {
        moe__product_target to = {got, n, 32, n, bias, 32}, back = {got_t, k, 32, k, moe__product_zeros, 0};
        moe__product_weights(moe__dispatched(), rows, k, a, rows * 32, &made.weights, &to, 1, NULL, room);
        CHECK_SAME(got, want, rows * n);
        moe__product_weights_t(moe__dispatched(), rows, n, at, rows * 32, &made.weights, k, 0, &back, room);
        CHECK_SAME(got_t, want_t, rows * k);
    }
    unpack(&made);
    free(matrix), free(a), free(at), free(want), free(got), free(bias), free(want_t), free(got_t);
}
static void test_products(void) {
    static const size_t shape[][3] = {{1, 33, 33}, {1, 1, 1}, {1, 1100, 70}, {2, 33, 64}, {7, 129, 33}, {33, 64, 40}};
    for (int kind = 0; kind < MOE_FORMAT_COUNT; kind++)
        for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
            check_product(kind, shape[i][0], shape[i][1], shape[i][2]);
}

/* One row by each table of kernels, that without VNNI too: any fields, and scales that VNNI leaves to the others. */
static void check_row(const moe__kernels *kernels, int kind, size_t rows, const void *const panel[2]) {
    float *a = test_floats((rows + 31) / 32 * 64), want[64], got[64];
    void (*row)(size_t, const float *, size_t, const void *, const void *, float *) = kernels->row_int8;
    void (*plain)(size_t, const float *, size_t, const void *, const void *, float *) = moe__kernels_scalar.row_int8;
    if (kind == MOE_FORMAT_INT4) row = kernels->row_int4, plain = moe__kernels_scalar.row_int4;
    test_fill(a, (rows + 31) / 32 * 64, 0, 1e-6f);
    for (size_t i = rows; i % 32; i++) a[i / 32 * 64 + i % 32] = NAN; /* is not read */
    for (size_t panels = 1; panels < 3; panels++) {
        for (size_t i = 0; i < 64; i++) want[i] = got[i] = i % 3 ? -0.0f : (float)i;
        plain(rows, a, 64, panel[0], panels > 1 ? panel[1] : NULL, want);
        row(rows, a, 64, panel[0], panels > 1 ? panel[1] : NULL, got);
        CHECK_SAME(got, want, 64);
    }
    free(a);
}
static void check_rows(int kind, size_t rows, uint32_t seldom) { /* a column of each block has that scale */
    const moe__format *format = &moe__format_table[kind];
    size_t size = moe__format_panel(format, rows), block = format->block / 4;
    uint32_t *words = (uint32_t *)test_memory(2 * size / 4, 4), lowest = kind == MOE_FORMAT_INT8 ? 0x80u : 8u;
    for (size_t i = 0; i < 2 * size / 4; i++) {
        words[i] = 0;
        for (unsigned shift = 0; shift < 32; shift += format->bits) {
            uint32_t field = test_u32() % (lowest - 1) + 1;
            if (!seldom || test_u32() % 2) field += lowest; /* negative */
            words[i] |= field << shift;
        }
        if (i % block < 16) words[i] = ((0x3800u + test_u32() % 0x800u) << 16) + 0x3800u + test_u32() % 0x800u;
        if (i % block != i / block % 16) continue;
        if (i / block % 2) words[i] = (words[i] & 0xffff0000u) | seldom;
        else words[i] = (words[i] & 0xffffu) | seldom << 16;
    }
    const void *panel[2] = {words, words + size / 4};
    FOR_EACH_ISA(isa) check_row(moe__dispatched(), kind, rows, panel);
#ifdef MOE__X86
    if (moe_force_isa(MOE_ISA_AVX512) == MOE_OK) check_row(&moe__kernels_avx512, kind, rows, panel);
    CHECK_OK(moe_force_isa(MOE_ISA_AUTO));
#endif
    free(words);
}
static void test_rows(void) { /* 1; 0, where a weight may be -0; the least; on both sides of 2^112; the largest */
    static const uint32_t seldom[] = {0x3f80u, 0, MOE__SCALE_LEAST, 0x777fu, 0x7780u, 0x7bffu};
    for (size_t i = 0; i < sizeof seldom / sizeof *seldom; i++)
        for (size_t rows = 1; rows <= 200; rows += rows < 31 ? 30 : 31) {
            check_rows(MOE_FORMAT_INT8, rows, seldom[i]);
            check_rows(MOE_FORMAT_INT4, rows, seldom[i]);
        }
}

/* -- layers -- */
static const char *const descs[] = {
    "d_model=33 d_ff=40 n_experts=4 top_k=2 n_shared=1 bias=true shared_gate=true seed=3",
    "d_model=33 d_ff=40 n_experts=5 top_k=1 expert=relu seed=4",
    "d_model=33 d_ff=40 n_experts=7 top_k=3 expert=geglu n_zero=1 n_constant=1 controller=bias bias=true seed=5",
    "d_model=33 d_ff=40 n_experts=5 seed=6",
    "d_model=33 d_ff=40 n_experts=5 top_k=2 n_codes=8 seed=7",
};
enum { N_DESCS = sizeof descs / sizeof *descs };
static moe_desc desc_of(size_t i, int training) {
    moe_desc desc;
    size_t at;
    memset(&desc, 0, sizeof desc);
    if (i == 3) CHECK_OK(moe_desc_system(&desc, "soft-moe"));
    moe_status status = moe_desc_parse(&desc, descs[i], &at);
    if (!CHECK_OK(status)) printf("    %s\n", descs[i]);
    desc.training = training ? MOE_ON : MOE_OFF;
    return desc;
}
static moe_layer *layer_of(size_t i, int training) {
    moe_desc desc = desc_of(i, training);
    moe_layer *layer = NULL;
    CHECK_OK(moe_layer_new(&layer, &desc));
    return layer;
}
static const moe_format_kind mixed[E] = {MOE_FORMAT_INT4, MOE_FORMAT_F32, MOE_FORMAT_INT8, MOE_FORMAT_BF16,
                                         MOE_FORMAT_INT4};
static moe_layer_formats formats_of(int kind, int train_router) { /* MOE_FORMAT_COUNT: mixed */
    moe_layer_formats formats = {(moe_format_kind)kind, NULL, train_router ? MOE_ON : MOE_OFF, 0, NULL};
    if (kind == MOE_FORMAT_COUNT) formats.by_expert = mixed;
    return formats;
}
static moe_layer *quantized(const moe_layer *from, int kind, int train_router) {
    moe_layer_formats formats = formats_of(kind, train_router);
    moe_layer *layer = NULL;
    uint64_t before = moe_layer_hash(from);
    CHECK_OK(moe_layer_quantize(from, &formats, &layer));
    CHECK(moe_layer_hash(from) == before);
    return layer;
}
/* float32's layer gets the other's weights */
static void dequantize(moe_layer *to, const moe_layer *from) {
    for (size_t i = 0; i < moe_layer_tensors(from); i++) {
        moe_tensor tensor;
        CHECK_OK(moe_layer_tensor(from, i, &tensor));
        float *values = test_floats(tensor.count);
        CHECK_OK(moe_layer_get(from, MOE_PART_PARAMS, tensor.name, values, tensor.count));
        CHECK_OK(moe_layer_set(to, MOE_PART_PARAMS, tensor.name, values, tensor.count));
        free(values);
    }
}
static void test_forward(void) {
    float x[T * D], want[T * D], got[T * D];
    test_fill(x, T * D, -1, 1);
    for (size_t i = 0; i < N_DESCS; i++)
        for (int kind = 0; kind <= MOE_FORMAT_COUNT; kind++) {
            moe_layer *plain = layer_of(i, 0), *layer = quantized(plain, kind, 0);
            uint64_t before = moe_layer_hash(plain);
            dequantize(plain, layer);
            CHECK(moe_layer_hash(layer) == moe_layer_hash(plain));
            CHECK((before == moe_layer_hash(plain)) == (kind == MOE_FORMAT_F32));
            CHECK(moe_layer_params(layer) == moe_layer_params(plain));
            CHECK(moe_layer_active_params(layer) == moe_layer_active_params(plain));
            CHECK(moe_layer_format(layer, 2) == (kind == MOE_FORMAT_COUNT ? MOE_FORMAT_INT8 : (moe_format_kind)kind));
            CHECK(moe_layer_format(plain, 2) == MOE_FORMAT_F32 && moe_layer_format(layer, E) == MOE_FORMAT_COUNT);
            CHECK(moe_layer_expert_bytes(layer, E) == 0 && moe_layer_expert_bytes(plain, 1) >= 3 * D * F);
            CHECK(moe_layer_expert_bytes(layer, 2) <= moe_layer_expert_bytes(plain, 2) + 64);
            FOR_EACH_ISA(isa)
                for (size_t threads = 1; threads < 4; threads += 2) {
                    layer->plan.desc.parallel.n_threads = plain->plan.desc.parallel.n_threads = threads;
                    CHECK_OK(moe_forward(plain, x, T, want));
                    CHECK_OK(moe_forward(layer, x, T, got));
                    CHECK_SAME(got, want, T * D);
                    CHECK_OK(moe_forward(layer, x, 1, got)); /* the kernels of one row; soft slots see the others */
                    if (i != 3) CHECK_SAME(got, want, D);
                }
            moe_layer_free(plain);
            moe_layer_free(layer);
        }
}
/* Frozen experts: dx and the router's gradients are those of float32. */
static void test_router(void) {
    float x[T * D], dy[T * D], y[T * D], want[T * D], got[T * D];
    test_fill(x, T * D, -1, 1);
    test_fill(dy, T * D, -1, 1);
    for (size_t i = 0; i < N_DESCS; i++) {
        moe_layer *plain = layer_of(i, 1), *layer = quantized(plain, MOE_FORMAT_COUNT, 1), *frozen;
        dequantize(plain, layer);
        CHECK_OK(moe_forward(plain, x, T, y));
        CHECK_OK(moe_backward(plain, dy, want));
        CHECK_OK(moe_forward(layer, x, T, y));
        CHECK_OK(moe_backward(layer, dy, got));
        CHECK_SAME(got, want, T * D);
        uint64_t before = moe_layer_hash(layer);
        for (size_t t = 0; t < moe_layer_tensors(layer); t++) {
            moe_tensor tensor;
            CHECK_OK(moe_layer_tensor(layer, t, &tensor));
            float *a = test_floats(tensor.count), *b = test_floats(tensor.count);
            memset(a, 0, tensor.count * sizeof *a);
            int networks = !strncmp(tensor.name, "experts.", 8) && tensor.dim[0] == E && tensor.name[8] != 'c';
            moe_status status = moe_layer_get(layer, MOE_PART_GRADS, tensor.name, a, tensor.count);
            CHECK_STATUS(status, networks ? MOE_E_QUANTISED : MOE_OK);
            CHECK_OK(moe_layer_get(plain, MOE_PART_GRADS, tensor.name, b, tensor.count));
            if (!networks) CHECK_SAME(a, b, tensor.count);
            if (networks)
                CHECK_STATUS(moe_layer_set(layer, MOE_PART_PARAMS, tensor.name, a, tensor.count),
                             tensor.n_dims == 3 ? MOE_E_QUANTISED : MOE_OK);
            free(a), free(b);
        }
        float *w1 = test_floats(E * D * F), *after = test_floats(E * D * F);
        CHECK_OK(moe_layer_get(layer, MOE_PART_PARAMS, "experts.w1", w1, E * D * F));
        CHECK_OK(moe_step(layer, 0.01f));
        CHECK(moe_layer_hash(layer) != before);
        CHECK_OK(moe_layer_get(layer, MOE_PART_PARAMS, "experts.w1", after, E * D * F));
        CHECK_SAME(after, w1, E * D * F);
        frozen = quantized(plain, MOE_FORMAT_BF16, 0);
        CHECK_OK(moe_forward(frozen, x, T, y));
        CHECK_STATUS(moe_backward(frozen, dy, got), MOE_E_QUANTISED);
        CHECK_STATUS(moe_step(frozen, 0.1f), MOE_E_QUANTISED);
        double norm;
        CHECK_STATUS(moe_layer_grad_norm(frozen, &norm), MOE_E_QUANTISED);
        free(w1), free(after);
        moe_layer_free(plain), moe_layer_free(layer), moe_layer_free(frozen);
    }
}
static void test_refusals(void) {
    moe_layer *plain = layer_of(0, 1), *layer = quantized(plain, MOE_FORMAT_INT8, 0), *none = plain;
    moe_layer_formats formats = formats_of(MOE_FORMAT_INT4, 0), wrong = formats_of(MOE_FORMAT_COUNT, 0);
    moe_format_kind bad[E] = {MOE_FORMAT_F32, MOE_FORMAT_F32, MOE_FORMAT_F32, MOE_FORMAT_F32, (moe_format_kind)-1};
    float x[D] = {0};
    double pes;
    CHECK_STATUS(moe_layer_quantize(NULL, &formats, &none), MOE_E_NULL_LAYER);
    CHECK(!none);
    CHECK_STATUS(moe_layer_quantize(plain, &formats, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_quantize(plain, NULL, &none), MOE_E_FORMAT);
    CHECK_STATUS(moe_layer_quantize(layer, &formats, &none), MOE_E_QUANTISED);
    CHECK_STATUS(moe_layer_pes(layer, x, 1, &pes), MOE_E_QUANTISED);
    wrong.by_expert = NULL;
    CHECK_STATUS(moe_layer_quantize(plain, &wrong, &none), MOE_E_FORMAT);
    wrong.by_expert = bad;
    CHECK_STATUS(moe_layer_quantize(plain, &wrong, &none), MOE_E_FORMAT);
    float *w = test_floats(E * D * F);
    w[5] = NAN;
    memcpy(plain->part[MOE_PART_PARAMS] + 7, w + 5, sizeof *w);
    CHECK_STATUS(moe_layer_quantize(plain, &formats, &none), MOE_E_NAN_PARAMS);
    free(w);
    static const char *const refused[] = {"d_model=33 d_ff=8 n_experts=4", /* smear */
                                          "d_model=33 d_ff=8 n_experts=4 score=subspace expert=orthonormal",
                                          "d_model=33 d_ff=8 n_experts=4 expert=orthonormal loss.orthonormal=0.1"};
    for (size_t i = 0; i < 3; i++) {
        moe_desc desc;
        memset(&desc, 0, sizeof desc);
        if (i == 0) CHECK_OK(moe_desc_system(&desc, "smear"));
        CHECK_OK(moe_desc_parse(&desc, refused[i], NULL));
        CHECK_STATUS(moe_layer_new_formats(&none, &desc, &formats), MOE_E_FORMAT_DESC);
    }
    moe_layer_free(plain), moe_layer_free(layer);
}
static void test_out_of_memory(void) { /* the n-th allocation fails: nothing is made, the old layer is whole */
    moe_layer *plain = layer_of(0, 1), *layer = NULL;
    moe_layer_formats formats = formats_of(MOE_FORMAT_COUNT, 1);
    long live = test_live_blocks;
    uint64_t hash = moe_layer_hash(plain);
    test_fail_at = 0;
    CHECK_STATUS(moe_layer_quantize(plain, &formats, &layer), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    CHECK(!layer && test_live_blocks == live && moe_layer_hash(plain) == hash);
    moe_layer_free(plain);
}

/* -- packing from the arrays of others -- */
static void test_pack(void) {
    size_t n = E * D * F;
    uint16_t *file = (uint16_t *)test_memory(3 * n, sizeof *file);
    float *floats = test_floats(3 * n), *back = test_floats(n);
    for (size_t i = 0; i < 3 * n; i++) {
        file[i] = (uint16_t)((test_u32() & 0x80ffu) | 0x3e00u);
        floats[i] = moe__float_of((uint32_t)file[i] << 16);
    }
    test_little_endian(file, 3 * n, sizeof *file);
    const void *at[2][3] = {{file, file + n, file + 2 * n}, {floats, floats + n, floats + 2 * n}};
    for (int kind = 0; kind <= MOE_FORMAT_COUNT; kind++) {
        moe_desc desc;
        memset(&desc, 0, sizeof desc);
        CHECK_OK(moe_desc_parse(&desc, "d_model=33 d_ff=40 n_experts=5 top_k=2 seed=3", NULL));
        moe_layer_formats formats = formats_of(kind, 0);
        moe_layer *plain = NULL, *want = NULL, *got = NULL;
        moe_experts_layout layout = {MOE_DTYPE_BF16, 1, MOE_GATE_UP_SEPARATE};
        moe_experts_arrays arrays = {at[0][0], at[0][1], at[0][2], NULL, NULL, NULL};
        moe_experts_arrays plain_arrays = {at[1][0], at[1][1], at[1][2], NULL, NULL, NULL};
        CHECK_OK(moe_layer_new(&plain, &desc));
        desc.parallel.n_threads = 2;
        CHECK_OK(moe_layer_new_formats(&got, &desc, &formats));
        CHECK_STATUS(moe_layer_pack(got, 1, E, &arrays, &layout), MOE_E_INDEX);
        CHECK_STATUS(moe_layer_pack(got, 0, E, NULL, &layout), MOE_E_NULL_WEIGHT);
        CHECK_STATUS(moe_layer_pack(NULL, 0, E, &arrays, &layout), MOE_E_NULL_LAYER);
        CHECK_OK(moe_layer_pack(got, 0, E, &arrays, &layout));
        layout.dtype = MOE_DTYPE_NONE; /* floats of this machine, not of a file */
        CHECK_OK(moe_layer_pack(plain, 0, E, &plain_arrays, &layout));
        CHECK_OK(moe_layer_quantize(plain, &formats, &want));
        CHECK(moe_layer_hash(got) == moe_layer_hash(want));
        CHECK((moe_layer_hash(got) == moe_layer_hash(plain)) == (kind <= MOE_FORMAT_BF16)); /* bf16 keeps bf16 */
        float keep = floats[2 * n + 1];
        floats[2 * n + 1] = INFINITY;
        CHECK_STATUS(moe_layer_pack(got, 0, E, &plain_arrays, &layout), MOE_E_NAN_WEIGHT);
        floats[2 * n + 1] = keep;
        moe_layer_free(plain), moe_layer_free(want), moe_layer_free(got);
    }
    free(file), free(floats), free(back);
}

/* Every layout of others, shapes that end anywhere, against the same numbers set by name: the same bytes. */
typedef struct from_others {
    size_t d, f;
    int gated;
    moe_experts_layout layout;
    uint16_t *file[6];
    float *own[6];
} from_others;
static size_t other_place(const from_others *o, int i, size_t e, size_t r, size_t c) {
    size_t rows = i == 2 ? o->f : o->d, columns = i == 2 || i == 5 ? o->d : o->f, from = 0, step = 1, all = columns;
    int up = i == 1 || i == 4;
    if (i > 2) rows = 1;
    if (o->layout.gate_up && i != 2 && i != 5) {
        all = 2 * columns;
        if (o->layout.gate_up == MOE_GATE_UP_INTERLEAVED) step = 2, from = (size_t)up;
        else if (up) from = columns;
    }
    if (o->layout.out_first && i < 3) return (e * all + from + step * c) * rows + r;
    return (e * rows + r) * all + from + step * c;
}
static void others_make(from_others *o) {
    for (int i = 0; i < 6; i++) {
        size_t rows = i > 2 ? 1 : i == 2 ? o->f : o->d, columns = i == 2 || i == 5 ? o->d : o->f;
        int up = i == 1 || i == 4, to = up && o->layout.gate_up ? i - 1 : i;
        o->own[i] = test_floats(E * rows * columns);
        if (!o->file[to]) o->file[to] = (uint16_t *)test_memory(2 * E * rows * columns, sizeof(uint16_t));
        for (size_t k = 0; k < E * rows * columns; k++) {
            uint16_t bits = (uint16_t)((test_u32() & 0x80ffu) | 0x3e00u);
            o->own[i][k] = moe__float_of((uint32_t)bits << 16);
            test_little_endian(&bits, 1, sizeof bits); /* as in a file */
            o->file[to][other_place(o, i, k / columns / rows, k / columns % rows, k % columns)] = bits;
        }
    }
}
static void check_others(const from_others *o, int kind) {
    static const char *const names[] = {"experts.w1", "experts.wu", "experts.w2",
                                        "experts.b1", "experts.bu", "experts.b2"};
    moe_desc desc;
    moe_layer *plain = NULL, *want = NULL, *got = NULL;
    moe_layer_formats formats = formats_of(kind, 0);
    moe_experts_arrays a = {o->file[0], o->file[1], o->file[2], o->file[3], o->file[4], o->file[5]};
    memset(&desc, 0, sizeof desc);
    desc.d_model = o->d, desc.d_ff = o->f, desc.n_experts = E, desc.top_k = 2, desc.bias = MOE_ON;
    desc.expert = o->gated ? MOE_EXPERT_SWIGLU : MOE_EXPERT_RELU;
    desc.parallel.n_threads = 2;
    if (!o->gated || o->layout.gate_up) a.wu = a.bu = NULL;
    CHECK_OK(moe_layer_new(&plain, &desc));
    for (int i = 0; i < 6; i++) {
        size_t rows = i > 2 ? 1 : i == 2 ? o->f : o->d, columns = i == 2 || i == 5 ? o->d : o->f;
        if (o->gated || (i != 1 && i != 4))
            CHECK_OK(moe_layer_set(plain, MOE_PART_PARAMS, names[i], o->own[i], E * rows * columns));
    }
    CHECK_OK(moe_layer_quantize(plain, &formats, &want));
    CHECK_OK(moe_layer_new_formats(&got, &desc, &formats));
    memset(got->stock.data, 0xaa, got->stock.at[E]);
    CHECK_OK(moe_layer_pack(got, 0, E, &a, &o->layout));
    for (size_t e = 0; e < E; e++) {
        const moe__plan *plan = &got->plan;
        moe__plan_block block = moe__plan_stock_block(plan, &got->stock, e);
        const unsigned char *begin = (const unsigned char *)block.w1.data;
        size_t bytes = (size_t)((const unsigned char *)(block.b2 + plan->expert - plan->b2) - begin);
        CHECK(!memcmp(begin, want->stock.data + want->stock.at[e], bytes));
    }
    moe_layer_free(plain), moe_layer_free(want), moe_layer_free(got);
}
static void test_pack_shapes(void) {
    static const size_t shape[][2] = {{1, 1}, {5, 31}, {37, 149}, {150, 33}, {128, 64}, {257, 16}};
    for (size_t i = 0; i < sizeof shape / sizeof *shape; i++)
        for (int layout = 0; layout < 8; layout++) {
            from_others o;
            memset(&o, 0, sizeof o);
            o.d = shape[i][0], o.f = shape[i][1], o.gated = layout < 6;
            o.layout.dtype = MOE_DTYPE_BF16;
            o.layout.out_first = layout % 2 * 3; /* anything but 0 is 1 */
            o.layout.gate_up = (moe_gate_up_kind)(layout < 6 ? layout / 2 : 0);
            others_make(&o);
            for (int kind = 0; kind <= MOE_FORMAT_COUNT; kind++) check_others(&o, kind);
            for (int k = 0; k < 6; k++) free(o.file[k]), free(o.own[k]);
        }
}

/* -- files -- */
typedef struct saved { unsigned char *bytes; size_t size; } saved;
static saved save(const moe_layer *layer, int with_optimizer) {
    saved file = {NULL, 0};
    CHECK_OK(moe_layer_save_size(layer, with_optimizer, &file.size));
    file.bytes = (unsigned char *)test_memory(file.size, 1);
    CHECK_OK(moe_layer_save_memory(layer, with_optimizer, file.bytes, file.size));
    return file;
}
static void test_files(void) {
    for (size_t i = 0; i < N_DESCS; i++)
        for (int kind = 0; kind <= MOE_FORMAT_COUNT; kind++) {
            moe_layer *plain = layer_of(i, 1), *layer = quantized(plain, kind, (int)i % 2), *back = NULL;
            moe_part_kind part;
            const char *name;
            saved file = save(layer, (int)i % 2), whole = save(plain, 0);
            CHECK(kind == MOE_FORMAT_F32 || file.size < whole.size + 20000);
            CHECK_OK(moe_layer_check(layer, 0, &part, &name));
            CHECK_OK(moe_layer_load_memory(&back, file.bytes, file.size, NULL));
            if (back) {
                CHECK(moe_layer_hash(back) == moe_layer_hash(layer));
                for (size_t e = 0; e < E; e++) {
                    CHECK(moe_layer_format(back, e) == moe_layer_format(layer, e));
                    CHECK(moe_layer_expert_bytes(back, e) == moe_layer_expert_bytes(layer, e));
                }
                CHECK(moe_layer_desc(back)->training == moe_layer_desc(layer)->training);
                saved again = save(back, (int)i % 2); /* the same file */
                CHECK(again.size == file.size && !memcmp(again.bytes, file.bytes, file.size));
                free(again.bytes);
            }
            moe_layer_free(back);
            back = NULL;
            for (size_t n = 0; n < file.size; n += 1 + n / 40) { /* cut anywhere */
                CHECK(moe_layer_load_memory(&back, file.bytes, n, NULL) != MOE_OK);
                CHECK(!back);
            }
            free(file.bytes), free(whole.bytes);
            moe_layer_free(plain), moe_layer_free(layer);
        }
}
/* Where a tensor's bytes begin. */
static unsigned char *bytes_of(const saved *file, const char *name) {
    moe_file view;
    moe_file_tensor tensor;
    CHECK_OK(moe_file_open(&view, file->bytes, file->size));
    if (!CHECK_OK(moe_file_find(&view, name, &tensor))) exit(1);
    size_t at = (size_t)(tensor.data - file->bytes);
    moe_file_close(&view);
    return file->bytes + at;
}
static void check_bad(const saved *file, const char *name, size_t at, unsigned value, size_t bytes, moe_status want) {
    unsigned char *p = bytes_of(file, name) + at, keep[2];
    moe_layer *layer = NULL;
    moe_file view;
    memcpy(keep, p, bytes);
    for (size_t i = 0; i < bytes; i++) p[i] = (unsigned char)(value >> (8 * i));
    CHECK_OK(moe_file_open(&view, file->bytes, file->size));
    CHECK_STATUS(moe_layer_load_file(&layer, &view, NULL), want);
    CHECK(!layer);
    CHECK(view.fault.name_length == strlen(name) && !memcmp(view.fault.name, name, strlen(name)));
    moe_file_close(&view);
    memcpy(p, keep, bytes);
}
static void check_header(const saved *file, const char *from, const char *to, moe_status want) {
    moe_layer *layer = NULL;
    unsigned char *copy = (unsigned char *)test_memory(file->size, 1);
    size_t n = strlen(from), at = 8;
    memcpy(copy, file->bytes, file->size);
    while (at + n < file->size && memcmp(copy + at, from, n)) at++;
    CHECK(at + n < file->size && strlen(to) == n);
    memcpy(copy + at, to, n);
    CHECK_STATUS(moe_layer_load_memory(&layer, copy, file->size, NULL), want);
    CHECK(!layer);
    moe_layer_free(layer);
    free(copy);
}
static void test_bad_files(void) {
    moe_layer *plain = layer_of(0, 0), *layer = quantized(plain, MOE_FORMAT_COUNT, 0);
    saved file = save(layer, 0);
    check_bad(&file, "experts.w1.0.scale", 2, 0x7fc0, 2, MOE_E_FILE_QUANTISED); /* NaN */
    check_bad(&file, "experts.wu.2.scale", 4, 0x7f80, 2, MOE_E_FILE_QUANTISED); /* infinity */
    check_bad(&file, "experts.w2.2.scale", 0, 0xbf80, 2, MOE_E_FILE_QUANTISED); /* -1 */
    check_bad(&file, "experts.w2.2.scale", 0, 0x7f7f, 2, MOE_E_FILE_QUANTISED); /* its weights would be infinite */
    check_bad(&file, "experts.w2.2.scale", 0, 0x087f, 2, MOE_E_FILE_QUANTISED); /* below 2^-110 */
    check_bad(&file, "experts.w1.2", 9, 0x80, 1, MOE_E_FILE_QUANTISED);         /* -128 */
    check_bad(&file, "experts.w1.0", 9, 0x08, 1, MOE_E_FILE_QUANTISED);         /* -8 */
    check_bad(&file, "experts.w2.3", 2, 0x7f80, 2, MOE_E_FILE_NAN);
    check_bad(&file, "experts.w2.1", 2, 0x7f80, 2, MOE_E_FILE_NAN);
    check_header(&file, "experts.w1.3\"", "experts.w1.7\"", MOE_E_FILE_TENSOR); /* missing */
    check_header(&file, "experts.w2.0.scale", "experts.w2.9.scale", MOE_E_FILE_TENSOR);
    check_header(&file, "\"I8\",\"shape\":[33,40]", "\"I8\",\"shape\":[40,33]", MOE_E_FILE_TENSOR);
    check_header(&file, "\"U8\",\"shape\":[33,20]", "\"I8\",\"shape\":[33,20]", MOE_E_FILE_TENSOR);
    free(file.bytes);
    moe_layer_free(plain), moe_layer_free(layer);
}
static void test_names(void) {
    for (int kind = 0; kind < MOE_FORMAT_COUNT; kind++) {
        CHECK(moe_format_name((moe_format_kind)kind) && moe__format_table[kind].block % 64 == 0);
        for (int other = 0; other < kind; other++) {
            CHECK(strcmp(moe__format_table[kind].name, moe__format_table[other].name) != 0);
            CHECK(moe__format_table[kind].dtype != moe__format_table[other].dtype); /* files tell them apart */
        }
    }
    CHECK(!moe_format_name(MOE_FORMAT_COUNT));
}

int main(void) {
    RUN(test_names);
    RUN(test_values);
    RUN(test_hand);
    RUN(test_products);
    RUN(test_rows);
    RUN(test_forward);
    RUN(test_router);
    RUN(test_refusals);
    RUN(test_out_of_memory);
    RUN(test_pack);
    RUN(test_pack_shapes);
    RUN(test_files);
    RUN(test_bad_files);
    return test_end();
}

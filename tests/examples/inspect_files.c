/* Makes the files of inspect.sh, in the folder OUT. Not a test itself. */
#define MOE_IMPLEMENTATION
#include "moe.h"

#include <stdlib.h>

static FILE *create(const char *name) {
    char path[1024];
    snprintf(path, sizeof path, "%s%s", OUT, name);
    FILE *f = fopen(path, "wb");
    if (!f) exit(1);
    return f;
}

/* Header of 128 bytes (version 1), or with its 4-byte length. */
static FILE *npy(const char *name, int version, const char *descr, const char *order, const char *shape) {
    FILE *f = create(name);
    char header[128];
    int start = version == 1 ? 10 : 12, length = 128 - start;
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY", 6);
    header[6] = (char)version, header[7] = 0, header[8] = (char)length, header[9] = 0;
    if (version > 1) header[10] = header[11] = 0;
    int n = snprintf(header + start, sizeof header - (size_t)start, "{'descr': %s, 'fortran_order': %s, 'shape': %s, }",
                     descr, order, shape);
    header[start + n] = ' ', header[127] = '\n';
    fwrite(header, 1, 128, f);
    return f;
}

static void put(FILE *f, uint64_t v, int bytes) {
    for (int i = 0; i < bytes; i++) fputc((int)(v >> 8 * i & 255), f);
}
static void put_float(FILE *f, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    put(f, u, 4);
}
static void put_as(FILE *f, const char *type, float x) { /* exact for small quarters */
    uint32_t u;
    uint64_t w;
    double d = (double)x;
    memcpy(&u, &x, 4), memcpy(&w, &d, 8);
    if (!strcmp(type, "f8"))
        put(f, w, 8);
    else if (!strcmp(type, "bf16"))
        put(f, u >> 16, 2);
    else if (!strcmp(type, "f2"))
        put(f, (u >> 16 & 0x8000) | (u & 0x7fffffff ? ((u & 0x7fffffff) - 0x38000000) >> 13 : 0), 2);
    else
        put(f, u, 4);
}

enum { T = 300, E = 6 };
/* A token's logits: quarters from -2 to 2, its best expert by its number. */
static float small(size_t layer, size_t t, size_t e) {
    return 0.25f * (float)((int)(moe_rand_u32(5, layer, t * E + e) % 9) - 4) + (t % 3 == e ? 1.0f : 0.0f);
}

static void write_small(void) {
    static const char *const name[] = {"small_f4.npy",   "small_f2.npy", "small_f8.npy",
                                       "small_bf16.npy", "small_v2.npy", "small_v3.npy"};
    static const char *const type[] = {"f4", "f2", "f8", "bf16", "f4", "f4"}, *const descr[] = {"'<f4'", "'<f2'",
                                                                                                "'<f8'", "'<u2'",
                                                                                                "'<f4'", "'<f4'"};
    for (int i = 0; i < 6; i++) {
        FILE *f = npy(name[i], i < 4 ? 1 : i - 2, descr[i], "False", "(300, 6)");
        for (size_t t = 0; t < T; t++)
            for (size_t e = 0; e < E; e++) put_as(f, type[i], small(0, t, e));
        fclose(f);
    }
    FILE *f = npy("layers.npy", 1, "'<f4'", "False", "(3, 300, 6)");
    for (size_t l = 0; l < 3; l++)
        for (size_t t = 0; t < T; t++)
            for (size_t e = 0; e < E; e++) put_float(f, small(l, t, e));
    fclose(f);
    f = npy("labels.npy", 1, "'<i8'", "False", "(300,)");
    for (size_t t = 0; t < T; t++) { /* nearly the first choice */
        size_t best = 0;
        for (size_t e = 1; e < E; e++)
            if (small(0, t, e) > small(0, t, best)) best = e;
        put(f, t % 10 ? best : 0, 8);
    }
    fclose(f);
    f = npy("negative_labels.npy", 1, "'<i4'", "False", "(300,)");
    for (size_t t = 0; t < T; t++) put(f, t == 2 ? 0xffffffffu : 0, 4);
    fclose(f);
}

static void write_indices(void) {
    /* loads 6 3 2 1, first choices 4 2 0 0; byte 164: a 3 */
    static const int32_t hand[] = {0, 2, 0, 1, 0, 2, 1, 0, 0, 3, 1, 0};
    FILE *f = npy("hand_index.npy", 1, "'<i4'", "False", "(6, 2)");
    for (int i = 0; i < 12; i++) put(f, (uint64_t)(int64_t)hand[i], 4);
    fclose(f);
    f = npy("hand_index64.npy", 1, "'<i8'", "False", "(6, 2)");
    for (int i = 0; i < 12; i++) put(f, (uint64_t)(int64_t)hand[i], 8);
    fclose(f);
    f = npy("padded_index.npy", 1, "'<i4'", "False", "(18, 2)"); /* each row between two without a choice */
    for (int i = 0; i < 36; i++) put(f, (uint64_t)(int64_t)(i / 2 % 3 == 1 ? hand[i / 6 * 2 + i % 2] : -1), 4);
    fclose(f);
    f = npy("none_index.npy", 1, "'<i4'", "False", "(6, 2)");
    for (int i = 0; i < 12; i++) put(f, (uint64_t)(int64_t)-1, 4);
    fclose(f);
    /* beside hand_index: 3 of 6 first choices and 8 of 12 choices the same */
    static const int32_t other[] = {0, 2, 1, 0, 3, 2, 1, 0, 0, 1, 2, 3};
    f = npy("other_index.npy", 1, "'<i4'", "False", "(6, 2)");
    for (int i = 0; i < 12; i++) put(f, (uint64_t)(int64_t)other[i], 4);
    fclose(f);
    f = npy("padded_other.npy", 1, "'<i4'", "False", "(18, 2)");
    for (int i = 0; i < 36; i++) put(f, (uint64_t)(int64_t)(i / 2 % 3 == 1 ? other[i / 6 * 2 + i % 2] : -1), 4);
    fclose(f);
    /* first choices of 8 tokens in three layers: tables 3 1 / 0 4, and, between the second and the third, 1 2 / 1 4 */
    static const int32_t layers[] = {0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1};
    f = npy("layers_index.npy", 1, "'<i4'", "False", "(3, 8, 1)");
    for (int i = 0; i < 24; i++) put(f, (uint64_t)(int64_t)layers[i], 4);
    fclose(f);
    f = npy("layers_label.npy", 1, "'<i4'", "False", "(8,)"); /* the second layer's choices; the last has no label */
    for (int i = 0; i < 8; i++) put(f, (uint64_t)(int64_t)(i == 7 ? -1 : layers[8 + i]), 4);
    fclose(f);
    f = npy("twice_index.npy", 1, "'<i4'", "False", "(2, 2)");
    put(f, 1, 4), put(f, 1, 4), put(f, 0, 4), put(f, 1, 4);
    fclose(f);
    f = npy("wide_index.npy", 1, "'<i8'", "False", "(2, 1)");
    put(f, 1, 8), put(f, UINT64_C(1) << 32, 8);
    fclose(f);
}

/* Tokens that pick by the congestion game with a known gamma; their logits are the quality and noise. padding: rows
 * without a choice after each, whose logits are NaN. */
static void write_planted(const char *logits, const char *indices, size_t tokens, size_t padding, double gamma,
                          double spread, uint64_t seed) {
    enum { M = 8 };
    char shape[32];
    double q[M], m[M];
    float noise[M];
    snprintf(shape, sizeof shape, "(%zu, %d)", tokens * (1 + padding), M);
    FILE *z = npy(logits, 1, "'<f4'", "False", shape), *i = NULL;
    snprintf(shape, sizeof shape, "(%zu, 1)", tokens * (1 + padding));
    if (indices) i = npy(indices, 1, "'<i4'", "False", shape);
    for (int e = 0; e < M; e++) q[e] = spread * (1.5 - 0.4 * e);
    if (moe_game_solve(M, q, gamma, m, NULL)) exit(1);
    for (size_t t = 0; t < tokens; t++) {
        double u = (double)moe_rand_u32(seed, 1, t) / 4294967296.0, sum = 0;
        uint32_t pick = 0;
        for (; pick + 1 < M && u >= (sum += m[pick]); pick++) {}
        if (i) put(i, pick, 4);
        moe_rand_normal(seed, 2 + t, M, 0, 0.5f, noise);
        /* without indices the pick must be the highest logit: the noise is left out, and the pick lifted */
        for (uint32_t e = 0; e < M; e++)
            put_float(z, (float)q[e] + (i           ? noise[e]
                                        : e == pick ? 8.0f
                                                    : -8.0f * (float)m[e] / (float)(1 - m[e] + 1e-9)));
        for (size_t p = 0; i && p < padding * M; p++) put_float(z, NAN);
        for (size_t p = 0; i && p < padding; p++) put(i, UINT64_MAX, 4);
    }
    fclose(z);
    if (i) fclose(i);
}

/* Tokens that differ by nothing but noise. */
static void write_noise(void) {
    enum { TOKENS = 4000, M = 16 };
    static float z[TOKENS * M];
    if (moe_rand_normal(9, 0, TOKENS * M, 0, 3, z)) exit(1);
    FILE *f = npy("noise.npy", 1, "'<f4'", "False", "(4000, 16)");
    for (int i = 0; i < TOKENS * M; i++) put_float(f, z[i] - 0.1f * (float)(i % M));
    fclose(f);
}

static void want(const char *name, const char *text) {
    FILE *f = create(name);
    fprintf(f, "%s\n", text);
    fclose(f);
}

static void write_bad(void) {
    FILE *f = npy("bad_order.npy", 1, "'<f4'", "True", "(2, 3)");
    for (int i = 0; i < 6; i++) put_float(f, 1);
    fclose(f), want("bad_order.want", "48 Fortran");
    f = npy("bad_dtype.npy", 1, "'<c8'", "False", "(1, 3)");
    put(f, 0, 8), put(f, 0, 8), put(f, 0, 8);
    fclose(f), want("bad_dtype.want", "20 element type");
    f = npy("bad_records.npy", 1, "[('a', '<f4')]", "False", "(1, 3)");
    fclose(f), want("bad_records.want", "20 element type");
    f = npy("bad_nan.npy", 1, "'<f4'", "False", "(100, 6)");
    for (int i = 0; i < 600; i++) put_float(f, i == 401 ? NAN : (float)(i % 7));
    fclose(f), want("bad_nan.want", "1732 NaN");
    f = npy("bad_inf.npy", 1, "'<f2'", "False", "(100, 6)");
    for (int i = 0; i < 600; i++) put(f, i == 599 ? 0x7c00 : 0, 2);
    fclose(f), want("bad_inf.want", "1326 NaN or infinite");
    f = npy("bad_zero.npy", 1, "'<f4'", "False", "(0, 6)");
    fclose(f), want("bad_zero.want", "128 no tokens");
    f = npy("bad_overflow.npy", 1, "'<f4'", "False", "(4294967296, 4294967296)");
    fclose(f), want("bad_overflow.want", "128 shape");
    f = npy("bad_long.npy", 1, "'<f4'", "False", "(1, 3)");
    for (int i = 0; i < 4; i++) put_float(f, 1);
    fclose(f), want("bad_long.want", "140 longer");
    f = create("bad_magic.npy");
    fputs("this is no array, whatever its name says, and long enough to look", f);
    fclose(f), want("bad_magic.want", "0 not an .npy");
    f = npy("bad_version.npy", 9, "'<f4'", "False", "(1, 3)");
    fclose(f), want("bad_version.want", "6 not an .npy");
    f = create("bad_nohdr.npy");
    fwrite("\x93NUMPY\x02\x00\xff\xff\xff\xff{}", 1, 14, f);
    fclose(f), want("bad_nohdr.want", "8 header");
}

/* Expert 5 masked in all tokens, and the same with a low number; a token with one expert left; probabilities. */
static void write_masked(void) {
    static const char *const name[] = {"masked.npy", "low.npy", "one_left.npy", "probabilities.npy", "not_quite.npy"};
    for (int i = 0; i < 5; i++) {
        FILE *f = npy(name[i], 1, "'<f4'", "False", "(300, 6)");
        for (size_t t = 0; t < T; t++) {
            double sum = 0;
            for (size_t e = 0; e < E; e++) sum += exp((double)small(0, t, e));
            for (size_t e = 0; e < E; e++) {
                float z = small(0, t, e), p = (float)(exp((double)z) / sum);
                if (i < 3 && e == 5) z = i == 1 ? -100.0f : -INFINITY;
                if (i == 2 && t == 77 && e > 0) z = -INFINITY;
                if (i >= 3) z = i == 4 && t == 299 ? p * 1.01f : p; /* one row that sums to 1.01 */
                put_float(f, z);
            }
        }
        fclose(f);
    }
}

/* ---- routers: two layers (1 and 3) of 4 experts over 2-dimensional hidden states ---- */
enum { D = 2, R = 4, H = 40 };
static const float weight[2][R][D] = {{{1, 0}, {-1, 0}, {0, 1}, {0, -1}}, {{1, 1}, {-1, 1}, {1, -1}, {-2, -2}}};
static float hidden(size_t t, size_t i) {
    return 0.25f * (float)((int)(moe_rand_u32(6, i, t) % 33) - 16) + 0.03125f * (float)i;
}

static void safetensors(const char *name, const char *header, int first, int n, const char *type) {
    FILE *f = create(name);
    put(f, strlen(header), 8);
    fputs(header, f);
    for (int l = first; l < first + n; l++)
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) put_as(f, type, weight[l][r][d]);
    fclose(f);
}

static void write_routers(void) {
    safetensors("olmoe.safetensors",
                "{\"model.layers.3.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[4,2],\"data_offsets\":[16,32]},"
                "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[4,2],\"data_offsets\":[0,16]}}",
                0, 2, "bf16");
    safetensors(
        "mixtral.safetensors",
        "{\"model.layers.1.block_sparse_moe.gate.weight\":{\"dtype\":\"F16\",\"shape\":[4,2],\"data_offsets\":[0,16]},"
        "\"model.layers.3.block_sparse_moe.gate.weight\":{\"dtype\":\"F16\",\"shape\":[4,2],\"data_offsets\":[16,32]}}",
        0, 2, "f2");
    safetensors("model-00001-of-00002.safetensors",
                "{\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[0,32]}}", 0,
                1, "f4");
    safetensors("model-00002-of-00002.safetensors",
                "{\"model.layers.3.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[0,32]}}", 1,
                1, "f4");
    /* layer 1 has a bias that moves every token to experts 3 and 1, layer 3 one of zeros: sigmoid keeps the order */
    static const float bias[2][R] = {{0, 2, 1, 3}, {0, 0, 0, 0}};
    FILE *b = create("biased.safetensors");
    const char *biased =
        "{\"model.layers.3.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[32,64]},"
        "\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[0,32]},"
        "\"model.layers.1.mlp.gate.e_score_correction_bias\":"
        "{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[64,80]},"
        "\"model.layers.3.mlp.gate.e_score_correction_bias\":"
        "{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[80,96]}}";
    put(b, strlen(biased), 8);
    fputs(biased, b);
    for (int i = 0; i < 2 * R * D; i++) put_as(b, "f4", weight[i / (R * D)][i / D % R][i % D]);
    for (int i = 0; i < 2 * R; i++) put_as(b, "f4", bias[i / R][i % R]);
    fclose(b);
    want("biased.safetensors.index.json",
         "{\"weight_map\":{\"model.layers.1.mlp.gate.weight\":\"model-00001-of-00002.safetensors\","
         "\"model.layers.1.mlp.gate.e_score_correction_bias\":\"biased.safetensors\"}}");
    safetensors("none.safetensors", "{\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[4,2],\"data_offsets\":[0,32]}}",
                1, 1, "f4");
    FILE *six = create("six.safetensors"); /* one router of two experts over hidden states of 6 numbers */
    const char *of_six =
        "{\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[2,6],\"data_offsets\":[0,48]}}";
    put(six, strlen(of_six), 8);
    fputs(of_six, six);
    for (int i = 0; i < 12; i++) put_float(six, 1);
    fclose(six);
    FILE *f = create("nan.safetensors");
    const char *header =
        "{\"model.layers.1.mlp.gate.weight\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[0,4]}}";
    put(f, strlen(header), 8);
    fputs(header, f);
    put(f, 0x3f80, 2), put(f, 0x7fc0, 2);
    fclose(f);
    want("model.safetensors.index.json", "{\"metadata\":{\"total_size\":64},\"weight_map\":{\"model.layers.1.mlp.gate."
                                         "weight\":\"model-00001-of-00002.safetensors\","
                                         "\"model.layers.3.mlp.gate.weight\":\"model-00002-of-00002.safetensors\",\"lm_"
                                         "head.weight\":\"model-00002-of-00002.safetensors\"}"
                                         "}");
    want("missing.safetensors.index.json",
         "{\"weight_map\":{\"model.layers.1.mlp.gate.weight\":\"missing-00001.safetensors\"}}");
    want("escape.safetensors.index.json",
         "{\"weight_map\":{\"model.layers.1.mlp.gate.weight\":\"../olmoe.safetensors\"}}");
    f = npy("hidden.npy", 1, "'<f4'", "False", "(40, 2)");
    for (size_t t = 0; t < H; t++)
        for (size_t d = 0; d < D; d++) put_float(f, hidden(t, d));
    fclose(f);
    f = create("router_loads.txt");
    for (int l = 0; l < 2; l++) { /* by hand: each token's two best */
        int load[R] = {0};
        for (size_t t = 0; t < H; t++) {
            double z[R];
            for (int r = 0; r < R; r++)
                z[r] = (double)(weight[l][r][0] * hidden(t, 0) + weight[l][r][1] * hidden(t, 1));
            for (int r = 0; r < R; r++) {
                int better = 0;
                for (int o = 0; o < R; o++) better += z[o] > z[r] || (!(z[o] < z[r]) && o < r);
                load[r] += better < 2;
            }
        }
        for (int r = 0; r < R; r++) fprintf(f, "%s%.9g", r ? "," : "[", load[r] / (2.0 * H));
        fputs("]\n", f);
    }
    fclose(f);
}

int main(void) {
    static const double gamma[] = {2, 8, 20, 22, 20, 10, 4};
    write_small();
    write_indices();
    write_noise();
    write_planted("planted.npy", "planted_index.npy", 20000, 0, 12, 1, 3);
    write_planted("half.npy", "half_index.npy", 20000, 1, 12, 1, 3);
    write_planted("flat.npy", "flat_index.npy", 4000, 0, 5, 0, 4);
    for (int s = 0; s < 7; s++) {
        char name[32];
        snprintf(name, sizeof name, "step%d.npy", s);
        write_planted(name, NULL, 2000, 0, gamma[s], 1, 10 + (uint64_t)s);
    }
    write_bad();
    write_masked();
    write_routers();
    return 0;
}

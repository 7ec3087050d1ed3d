/* Numbers as text and back, with the C library as the other reader and writer; text that is cut. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"
#include "files.h"

/* Every float reads back as itself, with the C library as the reader. */
static void test_float_text(void) {
    static const float chosen[] = { 0, 1, 0.1f, 0.3f, 1e-5f, 9.9999e-6f, 123456789.0f, 999999999.0f, 1e9f, 0.99999994f,
                                    16777216.0f, 3.4028235e38f, 1.17549435e-38f, 1.4e-45f, 8.5e-44f, 1e23f, 9e9f };
    enum { CHOSEN = sizeof chosen / sizeof chosen[0] };
    moe_desc d = small_desc();
    char text[2048];
    for (size_t i = 0; i < 20000; i++) {
        uint32_t bits = test_u32();
        float v;
        memcpy(&v, &bits, sizeof v);
        if (i < CHOSEN) v = chosen[i];
        if (!(fabsf(v) <= FLT_MAX)) continue;
        d.clip_norm = v;
        moe_desc_json(&d, text, sizeof text);
        const char *p = strstr(text, "\"clip_norm\":");
        if (!CHECK(p != NULL)) return;
        if (p[12] == '"') CHECK(v == MOE_OFF);
        else if (!CHECK_BITS(strtof(p + 12, NULL), v)) return;
    }
}

static void test_fewest_digits(void) { /* a part in 10^13 beside the middle of two floats: six digits are enough */
    char text[32];
    moe__text out = {text, sizeof text, 0};
    moe__text_float(&out, 0x1.04068ap-37f);
    moe__text_end(&out);
    CHECK(!strcmp(text, "7.39037e-12") && strtof(text, NULL) == 0x1.04068ap-37f);
}

static void test_parse_float(void) { /* what the library writes it reads; what anybody writes it reads as strtof does */
    char text[64];
    float back = 0;
    for (size_t i = 0; i < 20000; i++) {
        uint32_t bits = test_u32();
        float value;
        memcpy(&value, &bits, sizeof value);
        if (!(fabsf(value) <= FLT_MAX)) continue;
        moe__text out = {text, sizeof text, 0};
        moe__text_float(&out, value);
        moe__text_end(&out);
        if (!CHECK(moe__parse_float(text, &back)) || !CHECK_BITS(back, value)) return;
        snprintf(text, sizeof text, "%.9g", (double)value);
        if (!CHECK(moe__parse_float(text, &back)) || !CHECK_BITS(back, strtof(text, NULL))) return;
    }
    static const char *const bad[] = {"",    "-",  ".",  "e5",     "1e",     "1e+-5", "1e+", "1ex",  "0x10",  "nan",
                                      "inf", "1 ", " 1", "1e1000", "3.5e38", "--1",  "1..2", "1.2.3", "+1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (!CHECK(!moe__parse_float(bad[i], &back))) printf("        \"%s\"\n", bad[i]);
    static const struct { const char *text; double value; } good[] = {
        {"1e-05", 1e-5}, {"1E5", 1e5}, {"1e+16", 1e16}, {"1e00", 1}, {"-2.5E+01", -25}, {"10000000000", 1e10},
        {"0.1", 0.1}, {"1e308", 1e308}, {"5e-324", 0}};
    double wide = 1;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        CHECK(moe__parse_double(good[i].text, &wide));
        CHECK_WITHIN(wide, good[i].value, 1e-14 * fabs(good[i].value) + 1e-323);
    }
    CHECK(!moe__parse_double("1e309", &wide) && !moe__parse_double("1e1000", &wide));
    char digits[80], null[8];
    memset(digits, '1', 65), digits[65] = 0;
    CHECK(!moe__parse_double(digits, &wide)); /* 65 of them; 64 are read */
    digits[64] = 0;
    CHECK(moe__parse_double(digits, &wide) && fabs(wide / strtod(digits, NULL) - 1) < 1e-15);
    static const float no_numbers[3] = {INFINITY, -INFINITY, NAN};
    for (int i = 0; i < 3; i++) { /* JSON has no word for them */
        moe__text no_number = {null, sizeof null, 0};
        moe__text_float(&no_number, no_numbers[i]);
        moe__text_end(&no_number);
        CHECK(!strcmp(null, "null"));
    }
}

static void test_integers(void) {
    static const uint64_t chosen[] = {0, 1, 9, 10, 18446744073709551615u, 10000000000000000000u, 9999999999999999999u};
    char text[32], other[32];
    uint64_t back;
    for (size_t i = 0; i < 1000; i++) {
        uint64_t value = i < 7 ? chosen[i] : ((uint64_t)test_u32() << 32 | test_u32()) >> test_below(64);
        moe__text out = {text, sizeof text, 0};
        moe__text_u64(&out, value);
        moe__text_end(&out);
        snprintf(other, sizeof other, "%llu", (unsigned long long)value);
        CHECK(!strcmp(text, other) && moe__parse_u64(text, &back) && back == value);
    }
    static const char *const bad[] = {
        "", "-1", "+1", "01", "1a", " 1", "18446744073709551616", "18446744073709551620", "99999999999999999999",
        "100000000000000000000"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) CHECK(!moe__parse_u64(bad[i], &back));
}

static void test_cut(void) { /* as snprintf: what fits, a zero at the end, and how much there was */
    for (size_t size = 0; size < 12; size++) {
        char text[16];
        memset(text, '#', sizeof text);
        moe__text out = {text, size, 0};
        moe__text_add(&out, "expert ");
        moe__text_u64(&out, 42);
        moe__text_end(&out);
        CHECK(out.n == 9 && text[size] == '#');
        if (size) CHECK(strlen(text) == (size > 9 ? 9 : size - 1) && !strncmp(text, "expert 42", strlen(text)));
    }
}

static const char *of_list(void *list, size_t i) { return ((const char *const *)list)[i]; }
/* Near names: the nearest, then one change more, then those with the word in them; at most eight; cut at the size. */
static void test_near(void) {
    static const char *const few[] = {"softmax", "sigmoid", "softmax-selected", "relu", NULL};
    static const char *const many[] = {"a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", NULL};
    static const char *const lengthy[] = {"abcdefghijklmnopqrstuvwxyzabcdefghij", NULL};
    char out[128], cut[4], word[100];
    void *list = (void *)(uintptr_t)few;
    moe_near("sofmax", of_list, list, out, sizeof out);
    CHECK(!strcmp(out, "softmax"));
    moe_near("soft", of_list, list, out, sizeof out);
    CHECK(!strcmp(out, "softmax, softmax-selected"));
    moe_near("zzz", of_list, list, out, sizeof out);
    CHECK(!strcmp(out, ""));
    moe_near("", of_list, list, out, sizeof out);
    CHECK(!strcmp(out, ""));
    moe_near("sofmax", of_list, list, cut, sizeof cut);
    CHECK(!strcmp(cut, "sof"));
    moe_near("ax", of_list, (void *)(uintptr_t)many, out, sizeof out);
    CHECK(!strcmp(out, "a1, a2, a3, a4, a5, a6, a7, a8"));
    memset(word, 'x', 99), word[99] = 0; /* neither is read past what there is room for */
    moe_near(word, of_list, (void *)(uintptr_t)lengthy, out, sizeof out);
    moe_near(lengthy[0], of_list, (void *)(uintptr_t)lengthy, out, sizeof out);
    CHECK(!strcmp(out, lengthy[0]));
    moe_near(NULL, of_list, list, out, sizeof out);
    CHECK(out[0] == 0);
    moe_near("relu", NULL, NULL, out, sizeof out);
    CHECK(out[0] == 0);
    moe_near("relu", of_list, list, NULL, 10);
}

int main(void) {
    RUN(test_float_text);
    RUN(test_fewest_digits);
    RUN(test_parse_float);
    RUN(test_integers);
    RUN(test_cut);
    RUN(test_near);
    return test_end();
}

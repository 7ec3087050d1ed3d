/* JSON: a desc as text, and a file's header with its depth and escapes. */
#include "test.h"
#include "files.h"

/* ---- JSON of a desc ---- */
static void test_desc_json(void) {
    moe_desc d = small_desc(), r;
    char text[4096], cut[16];
    d.loss[MOE_LOSS_SWITCH] = 0.01f;
    d.weight_decay = MOE_OFF;
    d.temperature = 1.5f;
    d.seed = UINT64_MAX;
    CHECK_OK(moe_desc_resolve(&d, &r));
    size_t n = moe_desc_json(&r, text, sizeof text);
    CHECK(n == strlen(text) && n + 1 < sizeof text);
    static const char start[] = "{\"d_model\":3,\"d_ff\":2,\"n_experts\":2,\"top_k\":2,\"n_shared\":0,";
    CHECK(!strncmp(text, start, sizeof start - 1));
    CHECK(strstr(text, "\"gate\":\"softmax\",") != NULL);
    CHECK(strstr(text, "\"normalize\":true,\"weight_scale\":1,\"temperature\":1.5,") != NULL);
    CHECK(strstr(text, "\"epsilon\":1e-8,") != NULL);
    CHECK(strstr(text, "\"beta2\":0.999,") != NULL);
    CHECK(strstr(text, "\"weight_decay\":\"off\",") != NULL);
    CHECK(strstr(text, "\"seed\":18446744073709551615,") != NULL);
    CHECK(strstr(text, "\"loss.switch\":0.01}") != NULL);
    CHECK(moe_desc_json(&r, NULL, 0) == n);
    CHECK(moe_desc_json(&r, cut, sizeof cut) == n);
    CHECK(strlen(cut) == sizeof cut - 1 && !strncmp(cut, text, sizeof cut - 1));
    CHECK(moe_desc_json(NULL, cut, sizeof cut) == 0 && cut[0] == 0);
}

static void test_depth(void) {
    for (size_t depth = 1; depth <= 100000; depth = depth < 40 ? depth + 1 : depth * 10) {
        static const char head[] = "{\"a\":{\"x\":", tail[] = ",\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}";
        char *text = (char *)test_memory(2 * depth + sizeof head + sizeof tail, 1);
        memcpy(text, head, sizeof head);
        memset(text + sizeof head - 1, '[', depth);
        memset(text + sizeof head - 1 + depth, ']', depth);
        strcat(text, tail);
        bytes b = with_header(text, 1);
        moe_status s = open_status(b);
        CHECK(s == (depth <= 16 ? MOE_OK : MOE_E_FILE_HEADER));
        free(b.p);
        free(text);
    }
}

/* Escapes are undone in names and in values. */
static void test_escapes(void) {
    bytes b = with_header("{\"__metadata__\":{\"\\u006bey\":"
                          "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00E9\\u20ac\\uD83D\\ude00\\u0000!\"},"
                          "\"a\\/\\u0062\":" ONE("U8", "1", "0", "1") "}", 1);
    static const char want[] = "\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\0!";
    moe_file f;
    moe_file_tensor t;
    char text[sizeof want];
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK_OK(moe_file_find(&f, "a/b", &t));
    CHECK(t.name_length == 9 && t.data == b.p + b.n - 1);
    CHECK_OK(moe_file_metadata(&f, "key", text, sizeof text));
    CHECK(!memcmp(text, want, sizeof want));
    CHECK_STATUS(moe_file_metadata(&f, "key", text, sizeof text - 1), MOE_E_SMALL_MEMORY);
    free(b.p);
}

int main(void) {
    RUN(test_desc_json);
    RUN(test_depth);
    RUN(test_escapes);
    return test_end();
}

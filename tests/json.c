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

/* ---- values ---- */
static void test_values(void) {
    static const char text[] = " {\"a\": [1, -2.5e+3, \"x\\u00e9\\\"\", {}, [[]]],"
                               " \"b\": {\"c.d\": null, \"c\": {\"d\": true}},"
                               " \"\\u0065\": false, \"big\": 123456789012345678901234567890, \"b\": 7} ";
    moe_json all, value, key, item = {MOE_JSON_NONE, NULL, 0, 0};
    char word[32];
    double number;
    size_t size = sizeof text - 1, n = 0;
    CHECK_OK(moe_json_open(&all, text, size));
    CHECK(all.kind == MOE_JSON_OBJECT && all.begin == 1 && all.end == size - 1);
    CHECK_OK(moe_json_find(&all, "a.1", &value));
    CHECK_OK(moe_json_number(&value, &number));
    CHECK(number == -2500);
    CHECK_OK(moe_json_text(&value, word, sizeof word));
    CHECK(!strcmp(word, "-2.5e+3"));
    CHECK_OK(moe_json_find(&all, "a.2", &value));
    CHECK(value.kind == MOE_JSON_TEXT && moe_json_number(&value, &number) == MOE_E_CONFIG_VALUE);
    CHECK_OK(moe_json_text(&value, word, value.end - value.begin));
    CHECK(!strcmp(word, "x\xc3\xa9\""));
    CHECK_STATUS(moe_json_text(&value, word, 4), MOE_E_SMALL_MEMORY);
    CHECK_OK(moe_json_find(&all, "a.4.0", &value));
    CHECK(value.kind == MOE_JSON_LIST);
    CHECK_OK(moe_json_find(&all, "b.c.d", &value)); /* the first b; a point in a key is not to be found */
    CHECK(value.kind == MOE_JSON_TRUE);
    CHECK_OK(moe_json_find(&all, "e", &value));
    CHECK(value.kind == MOE_JSON_FALSE);
    CHECK_OK(moe_json_find(&all, "", &value));
    CHECK(value.kind == MOE_JSON_OBJECT);
    CHECK_OK(moe_json_find(&all, "big", &value));
    CHECK_OK(moe_json_number(&value, &number));
    CHECK(fabs(number / 123456789012345678901234567890.0 - 1) < 1e-14);
    static const char *const none[] = {"c", "a.5", "a.x", "a.-1", "a.1.0", "b.c.d.e", "a.01", ".a",
        "a_key_of_more_than_sixty-three_letters_which_no_config_in_the_world_has"};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        if (!CHECK_STATUS(moe_json_find(&all, none[i], &value), MOE_E_NAME)) printf("        %s\n", none[i]);
    while (moe_json_next(&all, &key, &item)) n++, CHECK(key.kind == MOE_JSON_TEXT);
    CHECK(n == 5);
    CHECK_OK(moe_json_find(&all, "a", &value));
    for (n = 0, item.kind = MOE_JSON_NONE; moe_json_next(&value, &key, &item); n++) CHECK(key.kind == MOE_JSON_NONE);
    CHECK(n == 5 && item.kind == MOE_JSON_LIST);
    CHECK_OK(moe_json_find(&value, "3", &item));
    value = item, item.kind = MOE_JSON_NONE;
    CHECK(!moe_json_next(&value, NULL, &item) && !moe_json_next(&all, NULL, NULL) && !moe_json_next(NULL, NULL, &item));
    for (n = 0; n + 1 < size; n++) { /* cut anywhere */
        char *cut = (char *)malloc(n + 1);
        memcpy(cut, text, n);
        CHECK_STATUS(moe_json_open(&all, cut, n), MOE_E_JSON);
        CHECK(all.kind == MOE_JSON_NONE && all.begin <= n);
        free(cut);
    }
    static const char *const bad[] = {"", "{} x", "nul", "01", "NaN", "[1,]", "{\"a\" 1}", "\"\x01\"", "'a'"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (!CHECK_STATUS(moe_json_open(&all, bad[i], strlen(bad[i])), MOE_E_JSON)) printf("        %s\n", bad[i]);
    CHECK_STATUS(moe_json_open(&all, NULL, 1), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_json_open(NULL, text, size), MOE_E_NULL_OUT);
}

/* Both ends of each range of characters; what is asked for wrongly; values that somebody made by hand. */
static void test_edges(void) {
    static const struct { const char *text; moe_status want; } rows[] = {
        {"\"\\uD7FF\"", MOE_OK}, {"\"\\uE000\"", MOE_OK}, {"\"\\uD800\"", MOE_E_JSON}, {"\"\\uDC00\"", MOE_E_JSON},
        {"\"\\uD83D\\uDC00\"", MOE_OK}, {"\"\\uD83D\\uE000\"", MOE_E_JSON}, {"\"\\uD83D\\uDBFF\"", MOE_E_JSON},
        {"\"\\uD83Dx\"", MOE_E_JSON}, {"\"\\uD83D\\n\"", MOE_E_JSON}, {"\"\\u00g0\"", MOE_E_JSON},
        {"\"\xEE\x80\x80\"", MOE_OK}, {"\"\xED\x9F\xBF\"", MOE_OK}, {"\"\xED\xA0\x80\"", MOE_E_JSON},
        {"\"\xE0\x9F\xBF\"", MOE_E_JSON}, {"\"\xF0\x8F\xBF\xBF\"", MOE_E_JSON},
        {"\"\xF4\x90\x80\x80\"", MOE_E_JSON},
        {"\"\xF4\x8F\xBF\xBF\"", MOE_OK}, {"\"\xC1\xBF\"", MOE_E_JSON}, {"\"\xF5\x80\x80\x80\"", MOE_E_JSON},
        {"1E5", MOE_OK}, {"1e+5", MOE_OK}, {"1E-5", MOE_OK}, {"1e", MOE_E_JSON}, {"1.e5", MOE_E_JSON},
        {"-", MOE_E_JSON},
        {"\"\\", MOE_E_JSON}, {"{\"a\"", MOE_E_JSON}, {"{1:2}", MOE_E_JSON}};
    static const char object[] = "{\"a\" 1}", other[] = "{?}", list[] = "[1?2]";
    moe_json json, key, item;
    char text[8];
    double number;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (!CHECK_STATUS(moe_json_open(&json, rows[i].text, strlen(rows[i].text)), rows[i].want))
            printf("        %s\n", rows[i].text);
    CHECK_OK(moe_json_open(&json, "{\"a\":123456789}", 15));
    CHECK_STATUS(moe_json_find(NULL, "a", &item), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_json_find(&json, NULL, &item), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_json_find(&json, "a", NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_json_find(&json, "a", &item));
    CHECK_STATUS(moe_json_text(NULL, text, sizeof text), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_json_text(&item, NULL, 8), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_json_text(&item, text, 0), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_json_text(&item, text, 8), MOE_E_SMALL_MEMORY);
    CHECK_STATUS(moe_json_number(&item, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_json_number(NULL, &number), MOE_E_CONFIG_VALUE);
    item.kind = MOE_JSON_NONE;
    CHECK_STATUS(moe_json_text(&item, text, 8), MOE_E_NULL_BYTES);
    CHECK(moe_json_next(&json, NULL, &item) && item.kind == MOE_JSON_NUMBER);
    char digits[200];
    memset(digits, '7', sizeof digits);
    CHECK_OK(moe_json_open(&json, digits, sizeof digits));
    CHECK_STATUS(moe_json_number(&json, &number), MOE_E_CONFIG_VALUE); /* too long to be read */
    CHECK_OK(moe_json_open(&json, "1e999", 5));
    CHECK_STATUS(moe_json_number(&json, &number), MOE_E_CONFIG_VALUE);
    const char *const made[] = {object, other, list};
    for (size_t i = 0; i < 3; i++) { /* not from moe_json_open */
        moe_json hand = {i == 2 ? MOE_JSON_LIST : MOE_JSON_OBJECT, (const unsigned char *)made[i], 0, strlen(made[i])};
        item.kind = MOE_JSON_NONE;
        int n = 0;
        while (moe_json_next(&hand, &key, &item)) n++;
        CHECK(n == (i == 2));
    }
}

int main(void) {
    RUN(test_desc_json);
    RUN(test_depth);
    RUN(test_escapes);
    RUN(test_values);
    RUN(test_edges);
    return test_end();
}

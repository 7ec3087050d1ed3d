/* tokenizer.h and what it stands on: patterns, normal form, and tokenizer.json files made here whose ids were worked
 * out by hand. With MOE_MODELS=DIR (small checkpoints in their public layout) every pair of
 * DIR/tokenizers/x/pairs.json, which the original tokenizers wrote. */
#include "test.h"

#include "examples/common/tokenizer.h"

static char path[512];
/* A tokenizer lives until the program ends: from here it can be reached. */
static tokenizer *opened(const char *file) {
    static tokenizer *kept[256];
    static size_t n;
    if (n == sizeof kept / sizeof *kept) exit(1);
    kept[n] = tokenizer_open(file);
    return kept[n++];
}
static tokenizer *open_text(const char *json) {
    FILE *f = fopen(path, "w");
    if (!f || fputs(json, f) < 0 || fclose(f)) exit(1);
    return opened(path);
}
/* ids as "1 2 3" */
static int encodes(const tokenizer *t, const char *text, int special, const char *ids) {
    token_list l = tokenizer_encode(t, text, strlen(text), special);
    char got[1024] = "";
    size_t used = 0;
    for (size_t i = 0; i < l.n; i++)
        used += (size_t)snprintf(got + used, sizeof got - used, "%s%d", i ? " " : "", (int)l.id[i]);
    int same = strcmp(got, ids) == 0;
    if (!same) printf("  '%s' gives %s, not %s\n", text, got, ids);
    free(l.id);
    return same;
}
static int decodes(const tokenizer *t, const int32_t *ids, size_t n, int skip, const char *text) {
    text_buffer b = tokenizer_decode(t, ids, n, skip);
    int same = strcmp(b.text, text) == 0;
    if (!same) printf("  gives '%s', not '%s'\n", b.text, text);
    free(b.text);
    return same;
}

/* Where a pattern's matches end, as "3 4 ". */
static const char *cuts(const char *text, const char *on) {
    static char out[256];
    size_t n, used = 0, begin = 0, end;
    pattern p = pattern_read(text);
    uint32_t *codes = token_codes(on, strlen(on), &n);
    out[0] = 0;
    if (p.fault) snprintf(out, sizeof out, "%s", p.fault);
    for (; !p.fault && pattern_find(&p, codes, n, &begin, &end); begin = end)
        used += (size_t)snprintf(out + used, sizeof out - used, "%zu-%zu ", begin, end);
    free(codes);
    pattern_free(&p);
    return out;
}
static void test_patterns(void) {
    CHECK(strcmp(cuts("a|bc", "xabcb"), "1-2 2-4 ") == 0);
    CHECK(strcmp(cuts("\\s+(?!\\S)|\\s+", "a   b"), "1-3 3-4 ") == 0);
    CHECK(strcmp(cuts("\\p{N}{1,3}", "12345"), "0-3 3-5 ") == 0);
    CHECK(strcmp(cuts("[^\\r\\n\\p{L}]?\\p{L}+", "!ab \xC3\xA9"), "0-3 3-5 ") == 0);
    CHECK(strcmp(cuts("(?i:'s|'ll)", "'S'lL's'x"), "0-2 2-5 5-7 ") == 0);
    CHECK(strcmp(cuts("(?:ab|a)b", "abb ab"), "0-3 4-6 ") == 0); /* gives back */
    CHECK(strcmp(cuts("x(yz)*y", "xyzyzy xy"), "0-6 7-9 ") == 0);
    CHECK(strcmp(cuts("a?+a", "aa a"), "0-2 ") == 0); /* possessive: does not */
    CHECK(strcmp(cuts("[a-c\\]-]+", "ab-]d"), "0-4 ") == 0);
    CHECK(strcmp(cuts("\\S+$", "ab cd"), "3-5 ") == 0);
    CHECK(strcmp(cuts("(?=b)\\w+", "ab"), "1-2 ") == 0);
    static const char *const bad[] = {"(",           "a)", "[a",  "\\p{Xx}", "a{2",    "(?<=a)b", "a*?",
                                      "[[:alpha:]]", "*a", "\\q", "(ab){3}", "a{3,2}", "\\"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        pattern p = pattern_read(bad[i]);
        CHECK(p.fault != NULL);
        pattern_free(&p);
    }
}
static void test_unicode(void) {
    static const struct {
        uint32_t in[4], n, out[4], count;
    } forms[] = {
        {{0x65, 0x301}, 2, {0xE9}, 1},               /* e, acute */
        {{0x1100, 0x1161, 0x11A8}, 3, {0xAC01}, 1},  /* Hangul */
        {{0x212B}, 1, {0xC5}, 1},                    /* Angstrom sign */
        {{0x61, 0x315, 0x300}, 3, {0xE0, 0x315}, 2}, /* marks in the order of their classes */
        {{0x915, 0x93C}, 2, {0x915, 0x93C}, 2},      /* excluded from composition */
        {{0x61, 0x301, 0x301}, 3, {0xE1, 0x301}, 2},
        {{0x61, 0x41, 0x301}, 3, {0x61, 0xC1}, 2},
    };
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        uint32_t out[16];
        CHECK(uni_normalize(forms[i].in, forms[i].n, 1, out) == forms[i].count);
        CHECK(memcmp(out, forms[i].out, forms[i].count * sizeof *out) == 0);
    }
    CHECK(uni_is('a', uni_mask("Ll", 2)) && uni_is(0x41, uni_mask("L", 1)) && !uni_is('1', uni_mask("L", 1)));
    CHECK(uni_is(0x1F600, uni_mask("So", 2)) && uni_is(0x2167, uni_mask("Nl", 2)) && uni_space(0x3000));
    CHECK(!uni_space(0x200B) && uni_is(0x10FFFF, uni_mask("Cn", 2)) && !uni_mask("Xy", 2));
}

/* Byte-level: a space before a word belongs to it; a b merges before b c; of added tokens the longest. */
static const char byte_level[] =
    "{\"added_tokens\":[{\"id\":9,\"content\":\"<e>\",\"special\":true},"
    "{\"id\":10,\"content\":\"  \",\"normalized\":true},{\"id\":11,\"content\":\"   \",\"normalized\":true}],"
    "\"normalizer\":{\"type\":\"NFC\"},\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
    "\"decoder\":{\"type\":\"ByteLevel\"},\"post_processor\":null,\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":"
    "1,"
    "\"c\":2,\"\\u0120\":3,\"ab\":4,\"bc\":5,\"\\u0120ab\":6,\"\\u00c3\":7,\"\\u00a9\":8,\"abab\":12},"
    "\"merges\":[\"a b\",\"b c\",[\"\\u0120\",\"ab\"],\"ab ab\"]}}";
static void test_byte_level(void) {
    tokenizer *t = open_text(byte_level);
    CHECK(encodes(t, "", 0, "") && encodes(t, "abc", 0, "4 2") && encodes(t, "bc ab", 0, "5 6"));
    CHECK(encodes(t, "ababab", 0, "12 4") && encodes(t, "a<e> ab", 0, "0 9 6"));
    CHECK(encodes(t, "a   b     ", 0, "0 11 1 11 10"));
    CHECK(encodes(t, "e\xCC\x81z\xC3\xA9", 0, "7 8 7 8")); /* NFC; z is no token and falls out */
    CHECK(encodes(t, "a\xC3 b", 0, "0 7 3 1") && encodes(t, "\xA9", 0, "8")); /* no UTF-8: bytes as they are */
    CHECK(encodes(t, "\xC3\xA9\xC3", 0, "7 8 7") && encodes(t, "\xC3\xC3\xA9", 0, "7 7 8"));
    static const int32_t ids[] = {6, 9, 7, 8, 7, 0};
    CHECK(decodes(t, ids, 6, 0,
                  " ab<e>\xC3\xA9\xEF\xBF\xBD"
                  "a") &&
          decodes(t, ids, 4, 1, " ab\xC3\xA9"));
}
/* SentencePiece's: a space is put before; unknown characters are bytes; merges cross words; <s> before. */
static const char pieces[] =
    "{\"added_tokens\":[{\"id\":1,\"content\":\"<s>\",\"special\":true}],\"normalizer\":{\"type\":\"Sequence\","
    "\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" "
    "\"},"
    "\"content\":\"\\u2581\"}]},\"pre_tokenizer\":null,\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
    "{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"special_tokens\":"
    "{\"<s>\":{\"id\":\"<s>\",\"ids\":[1],\"tokens\":[\"<s>\"]}}},\"decoder\":{\"type\":\"Sequence\",\"decoders\":["
    "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\\u2581\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},"
    "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},\"model\":{\"type\":\"BPE\","
    "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,\"vocab\":{\"<unk>\":0,\"<s>\":1,\"<0xC3>\":2,"
    "\"<0xA9>\":3,\"\\u2581\":4,\"a\":5,\"b\":6,\"\\u2581a\":7,\"\\u2581\\u2581\":8,\"a\\u2581\":9},"
    "\"merges\":[\"\\u2581 \\u2581\",\"a \\u2581\",\"\\u2581 a\"]}}";
static void test_pieces(void) {
    tokenizer *t = open_text(pieces);
    CHECK(encodes(t, "a", 0, "7") && encodes(t, "a", 1, "1 7") && encodes(t, "  b", 0, "8 4 6"));
    CHECK(encodes(t, "a b", 0, "4 9 6")); /* "a " before " a" */
    CHECK(encodes(t, "\xC3\xA9", 0, "4 2 3"));
    CHECK(encodes(t, "\xC3\xA8\xC3\xA8", 0, "4 0")); /* no byte A8: unknown, fused */
    CHECK(encodes(t, "b<s>b", 0, "4 6 1 4 6") && encodes(t, "", 1, "1"));
    static const int32_t ids[] = {1, 4, 2, 3, 7}, half[] = {4, 2, 7};
    CHECK(decodes(t, ids + 1, 4, 0, "\xC3\xA9 a") && decodes(t, ids, 5, 1, "\xC3\xA9 a"));
    CHECK(decodes(t, half, 3, 0, "\xEF\xBF\xBD a"));
}

/* ---- what the original tokenizers say ---- */
static char *read_string(const js_file *f, const moe_json *pair, const char *key, size_t *n) {
    moe_json v;
    return moe_json_find(pair, key, &v) == MOE_OK ? js_string(f, &v, n) : NULL;
}
static int same_ids(const moe_json *pair, const char *key, token_list l) {
    moe_json list, item = {0};
    size_t i = 0;
    double n;
    if (moe_json_find(pair, key, &list) != MOE_OK) return 0;
    for (; moe_json_next(&list, NULL, &item); i++)
        if (i >= l.n || moe_json_number(&item, &n) != MOE_OK || l.id[i] != (int32_t)n) return 0;
    return i == l.n;
}
static int same_text(const tokenizer *t, token_list l, int skip, const char *text, size_t n) {
    text_buffer b = tokenizer_decode(t, l.id, l.n, skip);
    int same = b.length == n && memcmp(b.text, text, n) == 0;
    free(b.text);
    return same;
}
static void check_pairs(const char *folder) {
    char own[1024], file[1024];
    snprintf(own, sizeof own, "%s/tokenizer.json", folder);
    snprintf(file, sizeof file, "%s/pairs.json", folder);
    tokenizer *t = opened(own);
    js_file f = js_open(file);
    moe_json list = js_must(&f, &f.root, "pairs", MOE_JSON_LIST), pair = {0};
    size_t count = 0;
    while (moe_json_next(&list, NULL, &pair)) {
        size_t n, plain, skipped;
        char *text = read_string(&f, &pair, "text", &n), *decoded = read_string(&f, &pair, "decoded", &plain);
        char *without = read_string(&f, &pair, "decoded_skip_special", &skipped);
        token_list ids = tokenizer_encode(t, text, n, 0), all = tokenizer_encode(t, text, n, 1);
        int good = CHECK(same_ids(&pair, "ids", ids)) && CHECK(same_ids(&pair, "ids_with_special", all));
        good = good && CHECK(same_text(t, ids, 0, decoded, plain)) && CHECK(same_text(t, all, 1, without, skipped));
        if (!good) printf("  %s: '%s'\n", folder, text);
        free(text), free(decoded), free(without), free(ids.id), free(all.id);
        count++;
    }
    CHECK(count > 50);
}
static void test_original(void) {
    static const char *const names[] = {"mixtral_tiny304", "mixtral_trunc", "mixtral_trunc_metaspace", "neox_own",
                                        "neox_tiny304",    "neox_trunc",    "neox_trunc_pairmerges"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char folder[512];
        snprintf(folder, sizeof folder, "%s/tokenizers/%s", getenv("MOE_MODELS"), names[i]);
        check_pairs(folder);
    }
}
/* The text of sequence c and its tokens, special ones included. */
static void test_sequence(void) {
    static const char *const names[] = {"olmoe", "mixtral"};
    for (size_t i = 0; i < 2; i++) {
        char own[1024], file[1024];
        size_t n;
        snprintf(own, sizeof own, "%s/%s/f32/tokenizer.json", getenv("MOE_MODELS"), names[i]);
        snprintf(file, sizeof file, "%s/%s/f32/expected/expected.json", getenv("MOE_MODELS"), names[i]);
        js_file f = js_open(file);
        moe_json c = js_must(&f, &f.root, "sequences.c", MOE_JSON_OBJECT);
        char *text = read_string(&f, &c, "text", &n);
        if (!CHECK(text != NULL)) return;
        token_list ids = tokenizer_encode(opened(own), text, n, 1);
        CHECK(same_ids(&c, "tokens", ids));
        free(text);
        free(ids.id);
    }
}

int main(void) {
    const char *dir = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/tokenizer-%ld.json", dir ? dir : "/tmp", (long)getpid());
    RUN(test_patterns);
    RUN(test_unicode);
    RUN(test_byte_level);
    RUN(test_pieces);
    remove(path);
    RUN_IF(getenv("MOE_MODELS"), test_original, "MOE_MODELS is not set");
    RUN_IF(getenv("MOE_MODELS"), test_sequence, "MOE_MODELS is not set");
    return test_end();
}

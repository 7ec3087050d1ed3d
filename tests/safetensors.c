/* safetensors: every way in which a header can lie. */
#include <time.h>
#include "test.h"
#include "files.h"

static void test_header_length(void) {
    bytes b = with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4);
    CHECK_OK(open_status(b));
    static const uint64_t lies[] = { UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63, UINT64_C(1) << 32,
                                     100000001, 100000000, 61 };
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        set_header_length(b, lies[i]);
        CHECK_STATUS(open_status(b), MOE_E_FILE_HEADER_SIZE);
        moe_file file;
        CHECK_STATUS(moe_file_open(&file, b.p, b.n), MOE_E_FILE_HEADER_SIZE);
        CHECK(file.offset == 0); /* where it is told */
    }
    set_header_length(b, 0);
    CHECK_STATUS(open_status(b), MOE_E_FILE_HEADER);
    free(b.p);
}

#define F32X2(begin, end) ONE("F32", "2", begin, end)
#define EMPTY(at) ONE("U8", "0", at, at)
#define REST8 "\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"

static void test_headers(void) {
    static const struct {
        const char *header;
        size_t n_data;
        moe_status status;
    } rows[] = {
        /* fine */
        { "{}", 0, MOE_OK },
        { "{}   ", 0, MOE_OK },
        { "{\"a\":" F32X2("0", "8") "}", 8, MOE_OK },
        { "{ \"a\" : { \"data_offsets\" : [ 0 , 8 ] , \"shape\" : [ 2 ] , \"dtype\" : \"F32\" } } ", 8, MOE_OK },
        { "{\"a\":" F32X2("8", "16") ",\"b\":" F32X2("0", "8") "}", 16, MOE_OK },
        { "{\"a\":" ONE("F64", "", "0", "8") "}", 8, MOE_OK },
        { "{\"a\":" ONE("F8_E4M3", "1,1,1,1,1,1,1,5", "0", "5") "}", 5, MOE_OK },
        { "{\"a\":" ONE("BF16", "3,0,5", "0", "0") ",\"b\":" F32X2("0", "8") ",\"c\":" EMPTY("8") "}", 8, MOE_OK },
        { "{\"a\":" EMPTY("8") ",\"c\":" EMPTY("8") ",\"b\":" F32X2("0", "8") "}", 8, MOE_OK },
        { "{\"__metadata__\":{},\"a\":" F32X2("0", "8") "}", 8, MOE_OK },
        { "{\"__metadata__\":{\"k\":\"v\",\"l\":\"\\ud83d\\ude00\\n\"},\"a\":" F32X2("0", "8") "}", 8, MOE_OK },
        { "{\"a\":{\"x\":[1,-2.5e+3,true,{\"y\":null}]," REST8 "}", 8, MOE_OK },
        { "{\"\":" F32X2("0", "8") "}", 8, MOE_OK },
        { "{\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\":" F32X2("0", "8") "}", 8, MOE_OK },
        /* not the JSON of the format */
        { "", 0, MOE_E_FILE_HEADER },
        { " {}", 0, MOE_E_FILE_HEADER },
        { "[]", 0, MOE_E_FILE_HEADER },
        { "{", 0, MOE_E_FILE_HEADER },
        { "{}x", 0, MOE_E_FILE_HEADER },
        { "{}{}", 0, MOE_E_FILE_HEADER },
        { "{\"a\":" F32X2("0", "8") ",}", 8, MOE_E_FILE_HEADER },
        { "{,\"a\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\"" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{a:" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":1}", 0, MOE_E_FILE_HEADER },
        { "{\"a\":{}}", 0, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":\"F32\"," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":4,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "02", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "-2", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "+2", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "2.0", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "2e0", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "2,", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":" ONE("F32", "\"2\"", "0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"x\":[1 2]," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"x\":01," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"x\":1.," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"x\":-," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\":{\"x\":nul," REST8 "}", 8, MOE_E_FILE_HEADER },
        { "{\"__metadata__\":{\"k\":1},\"a\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"__metadata__\":[],\"a\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"__metadata__\":null}", 0, MOE_E_FILE_HEADER },
        { "{\"__metadata__\":{\"k\":\"v\"}", 0, MOE_E_FILE_HEADER },
        /* strings */
        { "{\"a\x01\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\n\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\\x\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\\u12g4\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\\ud800\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\\ud800\\u0041\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"a\\udc00\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xff\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\x80\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xc0\x80\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xc3\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xe0\x9f\xbf\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xed\xa0\x80\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xf0\x8f\xbf\xbf\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xf4\x90\x80\x80\":" F32X2("0", "8") "}", 8, MOE_E_FILE_HEADER },
        { "{\"\xf0\x9f\x98", 0, MOE_E_FILE_HEADER },
        { "{\"\\", 0, MOE_E_FILE_HEADER },
        { "{\"\\u00", 0, MOE_E_FILE_HEADER },
        { "{\"\\ud800\\", 0, MOE_E_FILE_HEADER },
        /* element types that are not known: only who asks for such a tensor is told (test_unknown_types) */
        { "{\"a\":" ONE("F33", "2", "0", "8") "}", 8, MOE_OK },
        { "{\"a\":" ONE("f32", "2", "0", "8") "}", 8, MOE_OK },
        { "{\"a\":" ONE("", "2", "0", "8") "}", 8, MOE_OK },
        { "{\"a\":" ONE("F32F32F32", "2", "0", "8") "}", 8, MOE_OK },
        { "{\"a\":" ONE("F32\\u0000", "2", "0", "8") "}", 8, MOE_OK },
        /* shapes */
        { "{\"a\":" ONE("F32", "3", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F8_E4M3", "5", "0", "4") "}", 4, MOE_E_FILE_SHAPE }, /* the last type of a known size */
        { "{\"a\":" ONE("F32", "0", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "4294967296,4294967296,4294967296", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "9223372036854775808,2", "0", "0") "}", 0, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "4611686018427387906", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "18446744073709551616", "0", "0") "}", 0, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "99999999999999999999999999", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        { "{\"a\":" ONE("F32", "1,1,1,1,1,1,1,1,2", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
        /* offsets */
        { "{}", 1, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") "}", 9, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("1", "9") "}", 9, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("8", "0") "}", 8, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" F32X2("0", "8") "}", 8, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" F32X2("0", "8") "}", 16, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" F32X2("4", "12") "}", 16, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" F32X2("9", "17") "}", 17, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("8", "16") ",\"b\":" F32X2("8", "16") "}", 16, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" ONE("U8", "0", "5", "5") "}", 8, MOE_E_FILE_OFFSETS },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "18446744073709551624") "}", 8, MOE_E_FILE_OFFSETS },
        { "{\"a\":" F32X2("0", "8") "}", 7, MOE_E_FILE_SHORT },
        { "{\"a\":" F32X2("4294967288", "4294967295") "}", 8, MOE_E_FILE_SHORT },
        /* names */
        { "{\"a\":" F32X2("0", "8") ",\"a\":" F32X2("8", "16") "}", 16, MOE_E_FILE_TWICE },
        { "{\"a\":" F32X2("0", "8") ",\"\\u0061\":" F32X2("8", "16") "}", 16, MOE_E_FILE_TWICE },
        { "{\"a\":" F32X2("0", "8") ",\"b\":" EMPTY("8") ",\"a\":" EMPTY("8") "}", 8, MOE_E_FILE_TWICE },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, MOE_E_FILE_TWICE },
        { "{\"__metadata__\":{\"k\":\"v\",\"k\":\"v\"}}", 0, MOE_E_FILE_TWICE },
        { "{\"__metadata__\":{\"a\":\"v\"},\"a\":" F32X2("0", "8") "}", 8, MOE_OK }
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        bytes b = with_header(rows[i].header, rows[i].n_data);
        if (!CHECK_STATUS(open_status(b), rows[i].status)) printf("        %s\n", rows[i].header);
        if (rows[i].status == MOE_OK) CHECK_STATUS(load_status(b), MOE_E_FILE_DESC);
        free(b.p);
    }
}

static void test_offset(void) { /* moe_file.offset: where the fault is */
    static const struct {
        const char *header;
        size_t n_data, offset;
    } rows[] = {
        { "{\"a\":" F32X2("0", "8") "} x", 8, 8 + 55 },
        { "{\"a\xff\":" F32X2("0", "8") "}", 8, 8 + 3 },
        { "{\"abc\":" ONE("F32", "3", "0", "8") "}", 8, 8 + 2 },
        { "{\"a\":" F32X2("0", "8") ",\"a\":" EMPTY("8") "}", 8, 8 + 55 },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, 8 + 20 },
        { "{\"a\":" F32X2("0", "8") "}", 9, 8 + 54 + 8 }
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        bytes b = with_header(rows[i].header, rows[i].n_data);
        moe_file f;
        CHECK(moe_file_open(&f, b.p, b.n) != MOE_OK);
        if (!CHECK(f.offset == rows[i].offset)) printf("        %zu for %s\n", f.offset, rows[i].header);
        free(b.p);
    }
}

/* n tensors of one byte, tensor i at place[i]; `names` of them, then the names repeat. */
static bytes many_tensors(size_t n, const size_t *place, size_t names) {
    char *text = (char *)test_memory(n, 100), *p = text;
    *p++ = '{';
    for (size_t i = 0; i < n; i++)
        p += sprintf(p, "%s\"tensor.%zu\":" ONE("U8", "1", "%zu", "%zu"), i ? "," : "", i % names, place[i],
                     place[i] + 1);
    strcpy(p, "}");
    bytes b = with_header(text, n);
    for (size_t i = 0; i < n; i++) b.p[b.n - n + place[i]] = (unsigned char)(i % 251);
    free(text);
    return b;
}

/* Any order is accepted, and checked, over more tensors than are read without an index. */
static void test_many(void) {
    enum { N = 2000 };
    static size_t place[N];
    for (int order = 0; order < 3; order++) {
        for (size_t i = 0; i < N; i++) place[i] = order == 1 ? N - 1 - i : i;
        for (size_t i = N - 1; order == 2 && i > 0; i--) {
            size_t j = test_below(i + 1), t = place[i];
            place[i] = place[j];
            place[j] = t;
        }
        bytes b = many_tensors(N, place, N);
        moe_file f;
        moe_file_tensor t;
        CHECK_OK(moe_file_open(&f, b.p, b.n));
        CHECK(f.n_tensors == N);
        for (size_t i = 0; i < N; i += 37) {
            char name[32];
            sprintf(name, "tensor.%zu", i);
            CHECK_OK(moe_file_find(&f, name, &t));
            CHECK(t.data == b.p + b.n - N + place[i] && *t.data == i % 251);
            CHECK_OK(moe_file_tensor_at(&f, i, &t));
            CHECK(t.data == b.p + b.n - N + place[i]);
        }
        moe_file_close(&f);
        free(b.p);
        b = many_tensors(N, place, N - 1);
        CHECK_STATUS(open_status(b), MOE_E_FILE_TWICE);
        free(b.p);
        size_t kept = place[1234];
        place[1234] = place[77]; /* one byte twice, one not at all */
        b = many_tensors(N, place, N);
        CHECK_STATUS(open_status(b), MOE_E_FILE_OFFSETS);
        free(b.p);
        place[1234] = kept;
    }
}

/* Types of which not even the size is known are skipped, and named to who asks for them. */
static void test_unknown_types(void) {
    static const char *const types[] = { "F33", "f32", "", "F32F32F32", "F32\\u0000", "F4", "C64" };
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        char header[256];
        sprintf(header, "{\"odd\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[4,9]},"
                        "\"fine\":" ONE("F32", "1", "0", "4") "}", types[i]);
        bytes b = with_header(header, 9);
        moe_file f;
        moe_file_tensor t;
        CHECK_OK(moe_file_open(&f, b.p, b.n));
        CHECK(f.n_tensors == 2);
        CHECK_OK(moe_file_find(&f, "fine", &t));
        CHECK(t.bytes == 4 && t.data == b.p + b.n - 9);
        CHECK_STATUS(moe_file_find(&f, "odd", &t), MOE_E_FILE_DTYPE);
        CHECK(!strcmp(t.dtype, types[i]) && t.name_length == 3 && !memcmp(t.name, "odd", 3));
        CHECK(t.bytes == 5 && t.data == b.p + b.n - 5 && t.n_dims == 1 && t.dim[0] == 3);
        CHECK_STATUS(moe_file_tensor_at(&f, 0, &t), MOE_E_FILE_DTYPE);
        CHECK(!strcmp(t.dtype, types[i]));
        CHECK_OK(moe_file_tensor_at(&f, 1, &t));
        free(b.p);
    }
#define LONG_TYPE "\"x\":" ONE("A_VERY_LONG_NAME_OF_A_TYPE", "2", "0", "8")
    bytes b = with_header("{" LONG_TYPE ",\"y\":" ONE("F32", "3", "8", "16") "}", 16);
    moe_file f; /* and the fault of a file names its tensor */
    CHECK_STATUS(moe_file_open(&f, b.p, b.n), MOE_E_FILE_SHAPE);
    CHECK(f.fault.name_length == 1 && *f.fault.name == 'y' && !strcmp(f.fault.dtype, "F32") && f.fault.dim[0] == 3);
    free(b.p);
    b = with_header("{" LONG_TYPE "}", 8);
    moe_file_tensor t;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(f.fault.name == NULL);
    CHECK_STATUS(moe_file_find(&f, "x", &t), MOE_E_FILE_DTYPE);
    CHECK(!strcmp(t.dtype, "A_VERY_LONG_NAM"));
    free(b.p);
}

/* ---- time: four times the tensors take about four times as long, where comparing all with all takes sixteen ---- */
static double seconds_since(clock_t start) { return (double)(clock() - start) / CLOCKS_PER_SEC; }

/* Open it, walk all tensors, find each by name: the processor's time. */
static double reading(size_t n) {
    size_t *place = (size_t *)test_memory(n, sizeof(size_t));
    for (size_t i = 0; i < n; i++) place[i] = n - 1 - i;
    bytes b = many_tensors(n, place, n);
    moe_file f;
    moe_file_tensor t;
    size_t right = 0;
    clock_t start = clock();
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    for (size_t i = 0; i < n; i++) {
        char name[32];
        sprintf(name, "tensor.%zu", i);
        right += !moe_file_tensor_at(&f, i, &t) && t.data == b.p + b.n - n + place[i];
        right += !moe_file_find(&f, name, &t) && t.data == b.p + b.n - n + place[i];
    }
    CHECK_STATUS(moe_file_find(&f, "tensor.", &t), MOE_E_NAME);
    CHECK_STATUS(moe_file_tensor_at(&f, n, &t), MOE_E_NAME);
    moe_file_close(&f);
    CHECK(f.index == NULL && f.n_tensors == 0);
    double took = seconds_since(start);
    CHECK(right == 2 * n);
    free(b.p);
    free(place);
    return took;
}

static void test_time(void) {
    double ratio = 1e30;
    for (int attempt = 0; attempt < 5 && ratio > 8; attempt++) ratio = reading(8000) / reading(2000);
    if (!CHECK(ratio < 8)) printf("        4 times the tensors took %.1f times as long\n", ratio);
}

/* The header's cap is 100 MB and nothing less: a header of 10.6 MB is read, with its names in any order. */
static void test_cap(void) {
    enum { N = 160000 };
    size_t *place = (size_t *)test_memory(N, sizeof(size_t));
    for (size_t i = 0; i < N; i++) place[i] = N - 1 - i;
    bytes b = many_tensors(N, place, N);
    moe_file f;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(f.n_tensors == N && f.header > 10600000);
    moe_file_close(&f);
    free(b.p);
    b = many_tensors(N, place, N - 1); /* the last has the first one's name */
    CHECK_STATUS(open_status(b), MOE_E_FILE_TWICE);
    free(b.p);
    place[N - 1] = place[77];
    b = many_tensors(N, place, N);
    CHECK_STATUS(open_status(b), MOE_E_FILE_OFFSETS);
    free(b.p);
    free(place);
}

/* Of many names, metadata among them; and no memory for the index. */
static void test_index(void) {
    enum { N = 700 };
    char *text = (char *)test_memory(N, 100), value[8], name[32];
    size_t n = (size_t)sprintf(text, "{\"w\":" ONE("F32", "1", "0", "4") " , \"__metadata__\" : {");
    for (int i = 0; i < N; i++) n += (size_t)sprintf(text + n, "%s \"k%d\" : \"%d\"", i ? "," : "", i, i * i % 9973);
    n += (size_t)sprintf(text + n, "} , \"model.layers.4.mlp.gate.weight\" : " ONE("F32", "1", "4", "8"));
    sprintf(text + n, ",\"k3\":" ONE("F32", "1", "8", "12") "}");
    bytes b = with_header(text, 12);
    moe_file f;
    moe_file_tensor t;
    size_t layer = 0;
    test_fail_at = 0;
    CHECK_STATUS(open_status(b), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(f.n_tensors == 3 && f.index != NULL);
    for (int i = 0; i < N; i++) {
        sprintf(name, "k%d", i);
        CHECK_OK(moe_file_metadata(&f, name, value, sizeof value));
        CHECK(atoi(value) == i * i % 9973);
    }
    CHECK_STATUS(moe_file_metadata(&f, "w", value, sizeof value), MOE_E_NAME);
    for (int i = 0; i < 20000; i++) { /* before the first, between them and after the last of their order */
        sprintf(name, "a name of none, %d", i);
        CHECK_STATUS(moe_file_metadata(&f, name, value, sizeof value), MOE_E_NAME);
    }
    CHECK_STATUS(moe_file_find(&f, "k4", &t), MOE_E_NAME);
    CHECK_OK(moe_file_find(&f, "k3", &t));
    CHECK(t.data == b.p + b.n - 4);
    CHECK_OK(moe_file_tensor_at(&f, 1, &t));
    CHECK(t.data == b.p + b.n - 8);
    CHECK_OK(moe_file_router(&f, 0, &layer, &t));
    CHECK(layer == 4 && t.data == b.p + b.n - 8);
    CHECK_STATUS(moe_file_router(&f, 1, &layer, &t), MOE_E_NAME);
    long live = test_live_blocks;
    moe_file_close(&f);
    CHECK(test_live_blocks == live - 1);
    moe_file_close(&f);
    moe_file_close(NULL);
    free(b.p);
    free(text);
}

/* Tensors in another order than their bytes, metadata between them; two routers of one layer, of which the first
 * counts. */
static void test_out_of_order(void) {
    bytes b = with_header("{\"model.layers.1.mlp.gate.weight\":" ONE("U8", "2", "3", "5")
                          ",\"__metadata__\":{\"k\":\"v\",\"l\":\"w\"},\"model.layers.0.mlp.gate.weight\":"
                          ONE("U8", "3", "0", "3") ",\"model.layers.1.block_sparse_moe.gate.weight\":"
                          ONE("U8", "1", "5", "6") "}", 6);
    moe_file f;
    moe_file_tensor t;
    size_t layer = 9;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    CHECK(f.n_tensors == 3);
    CHECK_OK(moe_file_router(&f, 0, &layer, &t));
    CHECK(layer == 0 && t.bytes == 3 && t.data == b.p + b.n - 6);
    CHECK_OK(moe_file_router(&f, 1, &layer, &t));
    CHECK(layer == 1 && t.bytes == 2 && t.data == b.p + b.n - 3);
    CHECK_STATUS(moe_file_router(&f, 2, &layer, &t), MOE_E_NAME);
    CHECK_STATUS(moe_file_router(&f, 0, &layer, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_router(&f, 0, NULL, &t), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_file_router(NULL, 0, &layer, &t), MOE_E_NULL_BYTES);
    moe_file_close(&f);
    free(b.p);
}

/* A file that changes after it was opened (somebody writes to what is mapped): an answer or a refusal, no crash. */
static void test_changed(void) {
    bytes b = with_header("{\"__metadata__\":{\"k\":\"v\"},\"a\":" ONE("U8", "1", "0", "1") ",\"b\":"
                          ONE("U8", "1", "1", "2") "}", 2);
    moe_file f;
    moe_file_tensor t;
    char text[8];
    size_t refused = 0;
    CHECK_OK(moe_file_open(&f, b.p, b.n));
    for (size_t i = 8; i < b.n - 2; i++) {
        static const char to[] = "\"}{[]:,0\\x\x80";
        for (size_t k = 0; k < sizeof to; k++) {
            unsigned char kept = b.p[i];
            b.p[i] = (unsigned char)to[k];
            moe_status s[3] = {moe_file_find(&f, "b", &t), moe_file_tensor_at(&f, 1, &t),
                               moe_file_metadata(&f, "nothing", text, sizeof text)};
            for (int n = 0; n < 3; n++) {
                refused += s[n] == MOE_E_FILE_HEADER;
                CHECK(s[n] == MOE_OK || s[n] == MOE_E_NAME || moe_status_kind(s[n]) == MOE_KIND_FILE);
            }
            b.p[i] = kept;
        }
    }
    CHECK(refused > 300);
    CHECK_OK(moe_file_find(&f, "b", &t));
    moe_file_close(&f);
    free(b.p);
}

int main(void) {
    RUN(test_header_length);
    RUN(test_headers);
    RUN(test_offset);
    RUN(test_many);
    RUN(test_unknown_types);
    RUN(test_time);
    RUN(test_cap);
    RUN(test_index);
    RUN(test_out_of_order);
    RUN(test_changed);
    return test_end();
}

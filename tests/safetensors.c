/* safetensors: every way in which a header can lie. */
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
        /* element types */
        { "{\"a\":" ONE("F33", "2", "0", "8") "}", 8, MOE_E_FILE_DTYPE },
        { "{\"a\":" ONE("f32", "2", "0", "8") "}", 8, MOE_E_FILE_DTYPE },
        { "{\"a\":" ONE("", "2", "0", "8") "}", 8, MOE_E_FILE_DTYPE },
        { "{\"a\":" ONE("F32F32F32", "2", "0", "8") "}", 8, MOE_E_FILE_DTYPE },
        { "{\"a\":" ONE("F32\\u0000", "2", "0", "8") "}", 8, MOE_E_FILE_DTYPE },
        /* shapes */
        { "{\"a\":" ONE("F32", "3", "0", "8") "}", 8, MOE_E_FILE_SHAPE },
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
        { "{\"abc\":" ONE("F33", "2", "0", "8") "}", 8, 8 + 2 },
        { "{\"a\":" F32X2("0", "8") ",\"a\":" EMPTY("8") "}", 8, 8 + 55 },
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

/* Any order is accepted, and checked, over more tensors than fit in the reader's window. */
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

/* So many tensors that checking them would take long are refused at once. */
static void test_work_limit(void) {
    enum { N = 120000 };
    size_t *place = (size_t *)test_memory(N, sizeof(size_t));
    for (size_t i = 0; i < N; i++) place[i] = N - 1 - i;
    bytes b = many_tensors(N, place, N);
    CHECK_STATUS(open_status(b), MOE_E_FILE_HEADER_SIZE);
    free(b.p);
    free(place);
}

int main(void) {
    RUN(test_header_length);
    RUN(test_headers);
    RUN(test_offset);
    RUN(test_many);
    RUN(test_work_limit);
    return test_end();
}

/* .npy in all its forms and broken in every way; half floats, indices. */
#include "test.h"

/* ---- making .npy files ---- */
typedef struct npy {
    unsigned char bytes[4096];
    size_t size, header;
} npy;

static npy npy_make(int version, const char *dictionary, const void *data, size_t n) {
    npy f;
    memset(&f, 0, sizeof f);
    size_t start = version == 1 ? 10 : 12, length = strlen(dictionary) + 1;
    length += (64 - (start + length) % 64) % 64;
    memcpy(f.bytes, "\x93NUMPY", 6);
    f.bytes[6] = (unsigned char)version;
    for (size_t i = 8; i < start; i++) f.bytes[i] = (unsigned char)(length >> 8 * (i - 8));
    memset(f.bytes + start, ' ', length);
    memcpy(f.bytes + start, dictionary, strlen(dictionary));
    f.bytes[start + length - 1] = '\n';
    f.header = start + length;
    if (n) memcpy(f.bytes + f.header, data, n);
    f.size = f.header + n;
    return f;
}

/* Opens bytes that end where the block ends, so that a sanitizer sees every step too far. */
static moe_status open_copy(const unsigned char *bytes, size_t size, moe_npy *f) {
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1);
    if (size) memcpy(copy, bytes, size);
    moe_status s = moe_npy_open(f, copy, size);
    CHECK(s ? f->offset <= size && f->count == 0 && f->elements == NULL && f->dtype == MOE_DTYPE_NONE
            : f->elements <= copy + size);
    CHECK(s || (size_t)(copy + size - f->elements) == f->count * moe_dtype_size(f->dtype));
    free(copy);
    return s;
}

static const float six[] = {1, 2, 3, 4, 5, 6};

static void test_good_headers(void) {
    static const struct {
        const char *text;
        size_t n_dims, dim[3];
        size_t bytes;
        moe_dtype_kind dtype;
    } good[] = {
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 2, {2, 3, 0}, 24, MOE_DTYPE_F32},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }", 1, {6, 0, 0}, 24, MOE_DTYPE_F32},
        {"{'shape':(1,2,3),'fortran_order':False,'descr':'<f4'}", 3, {1, 2, 3}, 24, MOE_DTYPE_F32},
        {"{ \"descr\" : \"<f4\" ,\"fortran_order\":False , \"shape\":( 3 , 2 , ) } ", 2, {3, 2, 0}, 24, MOE_DTYPE_F32},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (), }", 0, {0, 0, 0}, 4, MOE_DTYPE_F32},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 64), }", 2, {0, 64, 0}, 0, MOE_DTYPE_F32},
        {"{'descr': '<f2', 'fortran_order': False, 'shape': (4, 3), }", 2, {4, 3, 0}, 24, MOE_DTYPE_F16},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", 1, {3, 0, 0}, 24, MOE_DTYPE_F64},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (12,), }", 1, {12, 0, 0}, 24, MOE_DTYPE_U16},
        {"{'descr': '<i4', 'fortran_order': False, 'shape': (3, 2), }", 2, {3, 2, 0}, 24, MOE_DTYPE_I32},
        {"{'descr': '<i8', 'fortran_order': False, 'shape': (3, 1), }", 2, {3, 1, 0}, 24, MOE_DTYPE_I64},
        {"{'descr': '|i1', 'fortran_order': False, 'shape': (24,), }", 1, {24, 0, 0}, 24, MOE_DTYPE_I8},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (12, 2), }", 2, {12, 2, 0}, 24, MOE_DTYPE_U8},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (12,), }", 1, {12, 0, 0}, 24, MOE_DTYPE_I16},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (6,), }", 1, {6, 0, 0}, 24, MOE_DTYPE_U32},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (3,), }", 1, {3, 0, 0}, 24, MOE_DTYPE_U64},
        {"{'descr': '<V2', 'fortran_order': False, 'shape': (12,), }", 1, {12, 0, 0}, 24, MOE_DTYPE_BF16},
        {"{'descr': '|V2', 'fortran_order': False, 'shape': (4, 3), }", 2, {4, 3, 0}, 24, MOE_DTYPE_BF16},
        {"{'descr': 'bfloat16', 'fortran_order': False, 'shape': (12,), }", 1, {12, 0, 0}, 24, MOE_DTYPE_BF16},
    };
    for (int version = 1; version <= 3; version++)
        for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
            npy file = npy_make(version, good[i].text, six, good[i].bytes);
            moe_npy f;
            if (!CHECK_OK(open_copy(file.bytes, file.size, &f))) {
                printf("        %s\n", good[i].text);
                continue;
            }
            CHECK(f.dtype == good[i].dtype && f.n_dims == good[i].n_dims && f.data == file.header && f.offset == 0);
            for (size_t k = 0; k < f.n_dims; k++) CHECK(f.dim[k] == good[i].dim[k]);
            CHECK(f.count * moe_dtype_size(f.dtype) == good[i].bytes);
        }
}

static void test_bad_headers(void) {
    static const struct {
        const char *text;
        moe_status want;
    } bad[] = {
        {"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", MOE_E_NPY_ORDER},
        {"{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3), }", MOE_E_FILE_DTYPE},
        {"{'descr': '<c8', 'fortran_order': False, 'shape': (3,), }", MOE_E_FILE_DTYPE},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", MOE_E_FILE_DTYPE},
        {"{'descr': '', 'fortran_order': False, 'shape': (3,), }", MOE_E_FILE_DTYPE},
        {"{'descr': '|V1', 'fortran_order': False, 'shape': (24,), }", MOE_E_FILE_DTYPE},
        {"{'descr': '|b1', 'fortran_order': False, 'shape': (24,), }", MOE_E_FILE_DTYPE},
        {"{'descr': 'float8_e4m3fn', 'fortran_order': False, 'shape': (24,), }", MOE_E_FILE_DTYPE},
        {"{'descr': 'datetime64[ns] and more than any type is long', 'fortran_order': False, 'shape': (3,), }",
         MOE_E_FILE_DTYPE},
        {"{'descr and more than any key is long': '<f4', 'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,), }", MOE_E_FILE_DTYPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }", MOE_E_FILE_SHORT},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }", MOE_E_NPY_SIZE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 0), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4294967296, 4294967296), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (6148914691236517206,), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,2,3), }", MOE_E_FILE_SHAPE},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 6), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (02, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (6), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2,,3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': [2, 3], }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3}", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, }", MOE_E_NPY_HEADER},
        {"{'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3),, }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4' 'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } x", MOE_E_NPY_HEADER},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), ", MOE_E_NPY_HEADER},
        {"{'descr: '<f4', 'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{'descr': '\\x3cf4', 'fortran_order': False, 'shape': (2, 3), }", MOE_E_NPY_HEADER},
        {"{,}", MOE_E_NPY_HEADER},
        {"{}", MOE_E_NPY_HEADER},
        {"", MOE_E_NPY_HEADER},
    };
    for (int version = 1; version <= 3; version++)
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
            npy file = npy_make(version, bad[i].text, six, sizeof six);
            moe_npy f;
            if (!CHECK_STATUS(open_copy(file.bytes, file.size, &f), bad[i].want)) printf("        %s\n", bad[i].text);
            CHECK(f.offset > 0);
            CHECK(moe_status_kind(bad[i].want) == MOE_KIND_FILE);
        }
    moe_npy f;
    npy file = npy_make(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", six, sizeof six), other;
    for (int version = 0; version < 256; version++) { /* 2 and 3 read a longer length, which is nonsense here */
        other = file;
        other.bytes[6] = (unsigned char)version;
        moe_status s = open_copy(other.bytes, other.size, &f);
        CHECK(version == 1                   ? s == MOE_OK
              : version == 2 || version == 3 ? s != MOE_OK
                                             : s == MOE_E_NPY_MAGIC && f.offset == 6);
    }
    other = file;
    other.bytes[0] = 'N';
    CHECK_STATUS(open_copy(other.bytes, other.size, &f), MOE_E_NPY_MAGIC);
    other = npy_make(2, "{}", six, sizeof six);
    memset(other.bytes + 8, 0xff, 4);
    CHECK_STATUS(open_copy(other.bytes, other.size, &f), MOE_E_NPY_HEADER);
    CHECK_STATUS(moe_npy_open(&f, NULL, 3), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_npy_open(NULL, file.bytes, 3), MOE_E_NULL_OUT);
}

/* Every length too short is refused, where it ends; every single changed byte is read or refused, never worse. */
static void test_truncated_and_flipped(void) {
    for (int version = 1; version <= 3; version++) {
        npy file = npy_make(version, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", six, sizeof six);
        moe_npy f;
        for (size_t size = 0; size < file.size; size++) {
            CHECK_STATUS(open_copy(file.bytes, size, &f), MOE_E_FILE_SHORT);
            CHECK(f.offset == size);
        }
        CHECK_STATUS(open_copy(file.bytes, file.size + 1, &f), MOE_E_NPY_SIZE);
        CHECK(f.offset == file.size);
        for (size_t i = 0; i < file.header; i++)
            for (int bit = 0; bit < 8; bit++) {
                npy other = file;
                other.bytes[i] = (unsigned char)(other.bytes[i] ^ 1 << bit);
                moe_status s = open_copy(other.bytes, other.size, &f);
                CHECK(s == MOE_OK || moe_status_kind(s) == MOE_KIND_FILE);
            }
        for (int round = 0; round < 2000; round++) { /* several bytes at once */
            npy other = file;
            for (size_t k = 1 + test_below(4); k-- > 0;)
                other.bytes[6 + test_below(file.header - 6)] = (unsigned char)test_u32();
            moe_status s = open_copy(other.bytes, test_below(other.size + 1), &f);
            CHECK(s == MOE_OK || moe_status_kind(s) == MOE_KIND_FILE);
        }
    }
}

static void test_streaming_header(void) {
    for (int version = 1; version <= 3; version++) {
        /* as many elements as 32 bits count, in more bytes than they do */
        npy file = npy_make(version, "{'descr': '<f2', 'fortran_order': False, 'shape': (2000000000, 2), }", NULL, 0);
        uint64_t length = file.header + UINT64_C(8000000000);
        moe_npy f;
        size_t give = 0;
        int rounds = 0;
        moe_status s;
        while ((s = moe_npy_header(&f, file.bytes, give, length)) == MOE_E_FILE_SHORT && f.offset > give &&
               rounds++ < 5)
            give = f.offset;
        CHECK_OK(s);
        CHECK(give <= file.header && f.data == file.header && f.dim[0] == 2000000000u && f.elements == NULL &&
              f.count == 4000000000u && f.dtype == MOE_DTYPE_F16);
        CHECK_STATUS(moe_npy_header(&f, file.bytes, file.size, length - 1), MOE_E_FILE_SHORT);
        CHECK(f.offset == (length - 1 < SIZE_MAX ? (size_t)(length - 1) : SIZE_MAX));
        CHECK_STATUS(moe_npy_header(&f, file.bytes, file.size, length + 1), MOE_E_NPY_SIZE);
        CHECK(f.offset == (length < SIZE_MAX ? (size_t)length : SIZE_MAX));
        CHECK_STATUS(moe_npy_header(&f, file.bytes, file.size, 5), MOE_E_FILE_SHORT);
        CHECK(f.offset == 5);
        /* as many bytes as 64 bits count less 8, of a file of as many as they count */
        file = npy_make(version, "{'descr':'<f8','fortran_order':False,'shape':(2305843009213693951,)}", NULL, 0);
        s = moe_npy_header(&f, file.bytes, file.size, UINT64_MAX);
        CHECK_STATUS(s, SIZE_MAX < UINT64_MAX ? MOE_E_FILE_SHAPE : MOE_E_FILE_SHORT);
        if (s == MOE_E_FILE_SHORT) CHECK(f.offset == SIZE_MAX);
    }
}

/* ---- elements ---- */
static double half_value(unsigned h) {
    double sign = h & 0x8000u ? -1 : 1, m = h & 0x3ffu;
    int e = (int)(h >> 10 & 31);
    if (e == 31) return m > 0 ? NAN : sign * INFINITY;
    return sign * (e ? ldexp(1024 + m, e - 25) : ldexp(m, -24));
}

static void test_conversion(void) {
    unsigned char raw[8 * 4 + 1], *p = raw + 1; /* not aligned */
    float out[4];
    int32_t index[4];
    size_t bad = 99;
    for (unsigned h = 0; h < 65536; h++) { /* every half and every bfloat16 */
        p[0] = (unsigned char)h, p[1] = (unsigned char)(h >> 8);
        moe_to_float(MOE_DTYPE_F16, 1, p, out);
        double want = half_value(h);
        if (!(want != want ? out[0] != out[0] : (double)out[0] == want && !signbit(out[0]) == !(h >> 15)))
            CHECK(!"half");
        moe_to_float(h & 1 ? MOE_DTYPE_BF16 : MOE_DTYPE_U16, 1, p, out);
        if (test_bits(out[0]) != h << 16) CHECK(!"bfloat16");
    }
    static const double d[] = {1.5, -1e300, 3e-50, 0.1};
    static const float f[] = {1.5f, -3.25f, 1e-40f, INFINITY};
    memcpy(p, d, sizeof d), test_little_endian(p, 4, sizeof *d);
    CHECK_OK(moe_to_float(MOE_DTYPE_F64, 4, p, out));
    CHECK(out[0] == 1.5f && out[1] == -INFINITY && out[2] == 0 && out[3] == (float)0.1);
    memcpy(p, f, sizeof f), test_little_endian(p, 4, sizeof *f);
    CHECK_OK(moe_to_float(MOE_DTYPE_F32, 4, p, out));
    CHECK_SAME(out, f, 4);
    CHECK_STATUS(moe_to_float(MOE_DTYPE_I32, 4, p, out), MOE_E_FILE_DTYPE);
    CHECK_STATUS(moe_to_float(MOE_DTYPE_NONE, 4, p, out), MOE_E_FILE_DTYPE);
    CHECK_STATUS(moe_to_float(MOE_DTYPE_F32, 4, NULL, out), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_to_float(MOE_DTYPE_F32, 4, p, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_to_float(MOE_DTYPE_F32, 0, NULL, NULL));

    static const int32_t i32[] = {0, -1, INT32_MAX, INT32_MIN};
    static const int64_t i64[] = {5, -1, INT32_MAX, INT32_MIN}, wide[] = {1, 2, (int64_t)INT32_MAX + 1, 4},
                         low[] = {1, (int64_t)INT32_MIN - 1, 0, 0};
    memcpy(p, i32, sizeof i32), test_little_endian(p, 4, sizeof *i32);
    CHECK_OK(moe_to_index(MOE_DTYPE_I32, 4, p, index, &bad));
    CHECK(!memcmp(index, i32, sizeof i32));
    memcpy(p, i64, sizeof i64), test_little_endian(p, 4, sizeof *i64);
    CHECK_OK(moe_to_index(MOE_DTYPE_I64, 4, p, index, NULL));
    CHECK(index[0] == 5 && index[1] == -1 && index[2] == INT32_MAX && index[3] == INT32_MIN && bad == 99);
    memcpy(p, wide, sizeof wide), test_little_endian(p, 4, sizeof *wide);
    CHECK_STATUS(moe_to_index(MOE_DTYPE_I64, 4, p, index, &bad), MOE_E_NPY_INDEX);
    CHECK(bad == 2);
    memcpy(p, low, sizeof low), test_little_endian(p, 4, sizeof *low);
    CHECK_STATUS(moe_to_index(MOE_DTYPE_I64, 4, p, index, &bad), MOE_E_NPY_INDEX);
    CHECK(bad == 1);
    CHECK_STATUS(moe_to_index(MOE_DTYPE_I64, 4, p, index, NULL), MOE_E_NPY_INDEX);
    CHECK_STATUS(moe_to_index(MOE_DTYPE_I64, 4, NULL, index, &bad), MOE_E_NULL_BYTES);
    CHECK_STATUS(moe_to_index(MOE_DTYPE_I64, 4, p, NULL, &bad), MOE_E_NULL_OUT);
    CHECK_OK(moe_to_index(MOE_DTYPE_I64, 0, NULL, NULL, NULL));
    CHECK_STATUS(moe_to_index(MOE_DTYPE_F32, 4, p, index, &bad), MOE_E_FILE_DTYPE);

    CHECK(moe_dtype_of("BF16") == MOE_DTYPE_BF16 && moe_dtype_of("F32") == MOE_DTYPE_F32 &&
          moe_dtype_of("I64") == MOE_DTYPE_I64);
    CHECK(moe_dtype_of("U8") == MOE_DTYPE_U8 && moe_dtype_of("BOOL") == MOE_DTYPE_NONE &&
          moe_dtype_of(NULL) == MOE_DTYPE_NONE &&
          moe_dtype_size(MOE_DTYPE_COUNT) == 0);
    CHECK(!strcmp(moe_dtype_name(MOE_DTYPE_F16), "F16") && moe_dtype_name(MOE_DTYPE_COUNT) == NULL);
}

/* What cannot be read is named. */
static void test_named_type(void) {
    static const char *const rows[][2] = {{"'>f4'", ">f4"}, {"'<U12'", "<U12"}, {"'complex128'", "complex128"},
        {"[('a', '<f4')]", "["}, {"'datetime64[ns, UTC]'", "datetime64[ns, "}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[128];
        moe_npy f;
        sprintf(text, "{'descr': %s, 'fortran_order': False, 'shape': (6,), }", rows[i][0]);
        npy file = npy_make(1, text, six, sizeof six);
        CHECK_STATUS(open_copy(file.bytes, file.size, &f), MOE_E_FILE_DTYPE);
        if (!CHECK(!strcmp(f.descr, rows[i][1]))) printf("        %s\n", f.descr);
    }
}

/* Every integer type at the ends of its range and of 31 bits: from the bytes, one at a time. */
static void test_index_types(void) {
    static const struct {
        moe_dtype_kind dtype;
        const char *hex; /* little-endian */
        int fits;
        int32_t want;
    } rows[] = {
        {MOE_DTYPE_I8, "00", 1, 0}, {MOE_DTYPE_I8, "7f", 1, 127}, {MOE_DTYPE_I8, "80", 1, -128},
        {MOE_DTYPE_I8, "ff", 1, -1}, {MOE_DTYPE_U8, "7f", 1, 127}, {MOE_DTYPE_U8, "80", 1, 128},
        {MOE_DTYPE_U8, "ff", 1, 255}, {MOE_DTYPE_I16, "ff7f", 1, 32767}, {MOE_DTYPE_I16, "0080", 1, -32768},
        {MOE_DTYPE_I16, "ffff", 1, -1}, {MOE_DTYPE_I16, "0201", 1, 258}, {MOE_DTYPE_U16, "0080", 1, 32768},
        {MOE_DTYPE_U16, "ffff", 1, 65535}, {MOE_DTYPE_I32, "ffffff7f", 1, INT32_MAX},
        {MOE_DTYPE_I32, "00000080", 1, INT32_MIN}, {MOE_DTYPE_U32, "ffffff7f", 1, INT32_MAX},
        {MOE_DTYPE_U32, "00000080", 0, 0}, {MOE_DTYPE_U32, "ffffffff", 0, 0},
        {MOE_DTYPE_I64, "ffffff7f00000000", 1, INT32_MAX}, {MOE_DTYPE_I64, "0000008000000000", 0, 0},
        {MOE_DTYPE_I64, "00000080ffffffff", 1, INT32_MIN}, {MOE_DTYPE_I64, "ffffff7fffffffff", 0, 0},
        {MOE_DTYPE_I64, "ffffffffffffffff", 1, -1}, {MOE_DTYPE_I64, "0000000000000080", 0, 0},
        {MOE_DTYPE_U64, "ffffff7f00000000", 1, INT32_MAX}, {MOE_DTYPE_U64, "0000008000000000", 0, 0},
        {MOE_DTYPE_U64, "ffffffffffffffff", 0, 0}, {MOE_DTYPE_U64, "0000000001000000", 0, 0},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        unsigned char raw[17] = {0}, *two = raw + 1; /* a 0, then the row's; not aligned */
        size_t size = moe_dtype_size(rows[i].dtype), bad = 99;
        int32_t out[2] = {77, 77};
        CHECK(strlen(rows[i].hex) == 2 * size);
        for (size_t k = 0; k < size; k++) {
            char pair[3] = {rows[i].hex[2 * k], rows[i].hex[2 * k + 1], 0};
            two[size + k] = (unsigned char)strtoul(pair, NULL, 16);
        }
        moe_status want = rows[i].fits ? MOE_OK : MOE_E_NPY_INDEX;
        if (!CHECK_STATUS(moe_to_index(rows[i].dtype, 2, two, out, &bad), want)) printf("        row %zu\n", i);
        CHECK(out[0] == 0 && out[1] == (rows[i].fits ? rows[i].want : 77) && bad == (rows[i].fits ? 99u : 1u));
    }
    static const moe_dtype_kind floats[] = {MOE_DTYPE_NONE, MOE_DTYPE_F32, MOE_DTYPE_F16,
                                            MOE_DTYPE_BF16, MOE_DTYPE_F64, MOE_DTYPE_COUNT};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        int32_t out = 0;
        CHECK_STATUS(moe_to_index(floats[i], 1, six, &out, NULL), MOE_E_FILE_DTYPE);
    }
}

int main(void) {
    RUN(test_good_headers);
    RUN(test_bad_headers);
    RUN(test_truncated_and_flipped);
    RUN(test_streaming_header);
    RUN(test_conversion);
    RUN(test_named_type);
    RUN(test_index_types);
    return test_end();
}

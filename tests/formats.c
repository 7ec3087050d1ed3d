/* Formats of weights: a matrix laid into panels and read back row by row is the same matrix, padded with zeros. */
#define MOE_IMPLEMENTATION
#include "test.h"

enum { ROWS = 9, COLUMNS = 70, PANELS = (COLUMNS + MOE__W - 1) / MOE__W };

/* Largest error of a weight that is stored in the format, relative to the largest weight: 0 for floats. */
static double allowed_error(int kind) { return kind == MOE__FORMAT_F32 ? 0 : 0.1; }

static void check_format(int kind) {
    const moe__format *format = &moe__format_table[kind];
    float matrix[ROWS * COLUMNS], scale[PANELS * MOE__W], rows[ROWS * MOE__W + 16];
    float *buffer = rows + (64 - (uintptr_t)rows % 64) % 64 / sizeof *rows;
    size_t stride = ROWS * format->row_bytes;
    unsigned char *panels = (unsigned char *)test_memory(PANELS * stride + 64, 1), *data = panels;
    data += (64 - (uintptr_t)panels % 64) % 64;
    test_fill(matrix, ROWS * COLUMNS, -1, 1);
    for (size_t i = 0; i < PANELS * MOE__W; i++) scale[i] = 1;
    for (size_t panel = 0; panel < PANELS; panel++) {
        size_t left = COLUMNS - panel * MOE__W, columns = left < MOE__W ? left : MOE__W;
        memset(data + panel * stride, 0xff, stride);
        format->pack(matrix + panel * MOE__W, COLUMNS, ROWS, columns, data + panel * stride, scale + panel * MOE__W);
    }
    moe__weights weights = {data, format, scale, stride};
    for (size_t from = 0; from < PANELS; from++) { /* from the beginning, and from a panel on */
        moe__weights rest = moe__format_from(weights, from);
        for (size_t panel = from; panel < PANELS; panel++)
            for (size_t row = 0; row < ROWS; row++) {
                size_t n = ROWS - row < 3 ? ROWS - row : 3;
                const float *got = moe__format_rows(moe__dispatched(), &rest, panel - from, row, n, buffer);
                CHECK(!format->fetch || got == buffer);
                for (size_t i = 0; i < n * MOE__W; i++) {
                    size_t column = panel * MOE__W + i % MOE__W;
                    float want = column < COLUMNS ? matrix[(row + i / MOE__W) * COLUMNS + column] : 0;
                    CHECK(fabs((double)got[i] - (double)want) <= allowed_error(kind));
                }
            }
    }
    free(panels);
}

static void test_formats(void) {
    for (int kind = 0; kind < MOE__FORMAT_COUNT; kind++) {
        CHECK(moe__format_table[kind].name && moe__format_table[kind].name[0] && moe__format_table[kind].row_bytes);
        for (int other = 0; other < kind; other++)
            CHECK(strcmp(moe__format_table[kind].name, moe__format_table[other].name) != 0);
        FOR_EACH_ISA(isa) check_format(kind);
    }
}

static void test_float_panels(void) { /* a float format without a scale of its own */
    float data[2 * 4 * MOE__W];
    test_fill(data, 2 * 4 * MOE__W, -1, 1);
    moe__weights weights = moe__format_f32(data, 4);
    for (size_t panel = 0; panel < 2; panel++)
        for (size_t row = 0; row < 4; row++)
            CHECK(moe__format_rows(moe__dispatched(), &weights, panel, row, 1, NULL) ==
                  data + (panel * 4 + row) * MOE__W);
}

int main(void) {
    RUN(test_formats);
    RUN(test_float_panels);
    return test_end();
}

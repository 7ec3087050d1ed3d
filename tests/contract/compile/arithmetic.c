/* Does this build compute as it should? Exit 0: a desc resolves, and moe__fma is fmaf where the C library's is right;
 * 3: the library says that the arithmetic is not IEEE. WRONG_FMAF: with the fmaf of mingw-w64, which rounds twice. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
static float wrong_fmaf(float a, float b, float c) { return (float)((long double)a * b + c); }
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#ifdef WRONG_FMAF
#define fmaf wrong_fmaf
#endif
#include "moe.h"
#undef fmaf

/* random bits: every exponent, subnormals, infinities and NaN; and numbers near each other, whose sums cancel */
static float number(uint64_t at, int near_one) {
    uint32_t word[4], bits;
    moe_philox(1, 2, at, word);
    bits = near_one ? (word[0] & 0x807fffffu) | (120u + word[1] % 16) << 23 : word[0];
    return moe__float_of(bits);
}
/* The sum is so near the middle between two floats that a double is the middle itself: rounded twice, it is wrong.
 * Every other one is below the smallest normal float, where the middle is elsewhere. */
static void middle(uint64_t i, float *a, float *b, float *c) {
    uint32_t k = 18 + (uint32_t)(i / 10 % 6), odd = (uint32_t)(i / 60 % 4096) * 2 + 1, small = i / 5 % 2 ? 1 : 0;
    float part = moe__float_of((127 - k) << 23);
    *a = (1.0f + part) * moe__float_of((127 - 40 * small) << 23);
    *b = (1.0f - part) * moe__float_of((127 - (small ? 110 : 24)) << 23);
    *c = moe__float_of((small ? 1u << 20 : 127u << 23) + odd);
    if (i / 7 % 2) *a = -*a, *c = -*c;
}
#ifdef MOE__SIMD128 /* against our own, which others hold against their C library's: wasi-libc's rounds twice */
static float fma_of(uint64_t i, float a, float b, float c) {
    float x[4] = {1, 1, 1, 1}, y[4] = {1, 1, 1, 1}, z[4] = {1, 1, 1, 1};
    x[i % 4] = a, y[i % 4] = b, z[i % 4] = c;
    wasm_v128_store(z, moe__fma_simd128(wasm_v128_load(x), wasm_v128_load(y), wasm_v128_load(z)));
    return z[i % 4];
}
#define fmaf moe__fma
#else
#define fma_of(i, a, b, c) moe__fma(a, b, c)
#endif
static int fma_is_exact(void) {
    for (uint64_t i = 0; i < 2000000; i++) {
        float a = number(3 * i, i & 1), b = number(3 * i + 1, i & 1), c = number(3 * i + 2, i & 1);
        if (i % 5 == 0) c = -a * b * number(3 * i, 1); /* near the product */
        if (i % 5 == 1) middle(i, &a, &b, &c);
        float got = fma_of(i, a, b, c), want = fmaf(a, b, c);
        if (moe__bits_of(got) == moe__bits_of(want) || (got != got && want != want)) continue;
        printf("fma(%a, %a, %a) = %a, not %a\n", (double)a, (double)b, (double)c, (double)got, (double)want);
        return 0;
    }
    return 1;
}
int main(void) {
    moe_desc d = {0};
    (void)wrong_fmaf;
    d.d_model = 8;
    moe_status status = moe_desc_resolve(&d, &d);
    puts(moe_status_string(status));
    if (status) return status == MOE_E_ARITHMETIC ? 3 : 1;
    return fma_is_exact() ? 0 : 2;
}

/* What bench/contract.c compares the library with: the forward of SwiGLU experts, and a few reductions, as fast as they
 * can be written for one instruction set when nobody asks in which order anything is summed. Included once for each
 * set, with FREE_AVX512 or without (AVX2).
 *
 * Free here, and not in moe.h: chains of sums run through the whole of k and end in registers, where the activation
 * follows at once; few rows have several chains an element; the exponential is a short polynomial, the quotient an
 * estimate with one step of Newton's; a sum ends in the processor's own order; what experts give a token is added to
 * its y as they come, in a y of each thread's own, and these are added up at the end.
 *
 * The layout is the same idea as moe.h's: weights in panels of FREE_TC columns, row after row; half of a panel's
 * columns are gates and half what they gate. Rows of x and h lie in panels of 32 columns, row r's at r * 32, so that a
 * kernel's addresses are constants. What the next panel needs is asked for while this one is computed. */
#ifdef FREE_AVX512
#define FREE(name) free512_##name
#define FREE_FN static __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#define FREE_FI static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#define FREE_VL 16
#define FREE_MR 14
typedef __m512 FREE(v);
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, a) _mm512_storeu_ps(p, a)
#define V_SET1(x) _mm512_set1_ps(x)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define V_FNMA(a, b, c) _mm512_fnmadd_ps(a, b, c)
#define V_ADD(a, b) _mm512_add_ps(a, b)
#define V_SUB(a, b) _mm512_sub_ps(a, b)
#define V_MUL(a, b) _mm512_mul_ps(a, b)
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_MIN(a, b) _mm512_min_ps(a, b)
#define V_INVERSE(a) _mm512_rcp14_ps(a)
#define V_INTEGER(a) _mm512_cvtps_epi32(a)
#define V_WHOLE(i) _mm512_cvtepi32_ps(i)
#define V_POWER(i) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23))
#define V_SUM(a) _mm512_reduce_add_ps(a)
#define V_MAXIMUM(a) _mm512_reduce_max_ps(a)
#define D_OF(p) _mm512_cvtps_pd(_mm256_loadu_ps(p))
#define D_FMA(a, b, c) _mm512_fmadd_pd(a, b, c)
#define D_ADD(a, b) _mm512_add_pd(a, b)
#define D_STORE(p, a) _mm512_storeu_pd(p, a)
#define D_ZERO() _mm512_setzero_pd()
typedef __m512d FREE(d);
#define FREE_DL 8
#else
#define FREE(name) free256_##name
#define FREE_FN static __attribute__((target("avx2,fma")))
#define FREE_FI static inline __attribute__((always_inline, target("avx2,fma")))
#define FREE_VL 8
#define FREE_MR 6
typedef __m256 FREE(v);
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, a) _mm256_storeu_ps(p, a)
#define V_SET1(x) _mm256_set1_ps(x)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define V_FNMA(a, b, c) _mm256_fnmadd_ps(a, b, c)
#define V_ADD(a, b) _mm256_add_ps(a, b)
#define V_SUB(a, b) _mm256_sub_ps(a, b)
#define V_MUL(a, b) _mm256_mul_ps(a, b)
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_MIN(a, b) _mm256_min_ps(a, b)
#define V_INVERSE(a) _mm256_rcp_ps(a)
#define V_INTEGER(a) _mm256_cvtps_epi32(a)
#define V_WHOLE(i) _mm256_cvtepi32_ps(i)
#define V_POWER(i) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23))
#define V_SUM(a) FREE(sum8)(a)
#define V_MAXIMUM(a) FREE(max8)(a)
#define D_OF(p) _mm256_cvtps_pd(_mm_loadu_ps(p))
#define D_FMA(a, b, c) _mm256_fmadd_pd(a, b, c)
#define D_ADD(a, b) _mm256_add_pd(a, b)
#define D_STORE(p, a) _mm256_storeu_pd(p, a)
#define D_ZERO() _mm256_setzero_pd()
typedef __m256d FREE(d);
#define FREE_DL 4
FREE_FI float FREE(sum8)(__m256 a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FREE_FI float FREE(max8)(__m256 a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
#endif
#define FREE_TC (2 * FREE_VL)

/* e^x to about 2^-19: x = n ln 2 + r, a polynomial of degree 5 without the second step of the reduction. */
FREE_FI FREE(v) FREE(exp)(FREE(v) x)
{
    x = V_MIN(V_MAX(x, V_SET1(-87.0f)), V_SET1(88.0f));
    FREE(v) scaled = V_MUL(x, V_SET1(1.44269502f)), whole = V_WHOLE(V_INTEGER(scaled));
    FREE(v) r = V_FNMA(whole, V_SET1(0.693147182f), x), p = V_SET1(0.00833333f);
    p = V_FMA(p, r, V_SET1(0.0416667f));
    p = V_FMA(p, r, V_SET1(0.16666667f));
    p = V_FMA(p, r, V_SET1(0.5f));
    p = V_FMA(p, r, V_SET1(1.0f));
    p = V_FMA(p, r, V_SET1(1.0f));
    return V_MUL(p, V_POWER(V_INTEGER(scaled)));
}
FREE_FI FREE(v) FREE(inverse)(FREE(v) a)
{
    FREE(v) guess = V_INVERSE(a);
    return V_MUL(guess, V_FNMA(a, guess, V_SET1(2.0f)));
}
/* silu(gate) * value */
FREE_FI FREE(v) FREE(swiglu)(FREE(v) gate, FREE(v) value)
{
    FREE(v) one = V_SET1(1.0f), below = FREE(exp)(V_SUB(V_SET1(0.0f), gate));
    return V_MUL(V_MUL(gate, value), FREE(inverse)(V_ADD(one, below)));
}

/* One panel times R rows, whole k. down: c * weight is added to the rows' tokens in y; else SwiGLU goes into h. */
typedef struct FREE(tile) {
    size_t k, rows;          /* rows: of the whole block, a's panels are rows * 32 apart */
    const float *a, *b;
    const float *next;       /* to be asked for: `lines` lines for each 32 of k */
    size_t lines;
    float *h;                /* FREE_VL columns of row 0 */
    const float *weight;
    const uint32_t *token;   /* NULL: up */
    float *y; size_t d;      /* the panel's columns of token 0 */
} FREE(tile);

#define FREE_EACH_1(M) M(0)
#define FREE_EACH_2(M) FREE_EACH_1(M) M(1)
#define FREE_EACH_3(M) FREE_EACH_2(M) M(2)
#define FREE_EACH_4(M) FREE_EACH_3(M) M(3)
#define FREE_EACH_5(M) FREE_EACH_4(M) M(4)
#define FREE_EACH_6(M) FREE_EACH_5(M) M(5)
#define FREE_EACH_7(M) FREE_EACH_6(M) M(6)
#define FREE_EACH_8(M) FREE_EACH_7(M) M(7)
#define FREE_EACH_9(M) FREE_EACH_8(M) M(8)
#define FREE_EACH_10(M) FREE_EACH_9(M) M(9)
#define FREE_EACH_11(M) FREE_EACH_10(M) M(10)
#define FREE_EACH_12(M) FREE_EACH_11(M) M(11)
#define FREE_EACH_13(M) FREE_EACH_12(M) M(12)
#define FREE_EACH_14(M) FREE_EACH_13(M) M(13)
#define FREE_BEGIN(r) FREE(v) p##r = V_SET1(0.0f), q##r = p##r;
#define FREE_STEP(r) { FREE(v) x = V_SET1(a[(r) * 32 + i]); p##r = V_FMA(x, b0, p##r); q##r = V_FMA(x, b1, q##r); }
#define FREE_DONE(r) FREE(end)(t, r, p##r, q##r);
FREE_FI void FREE(end)(const FREE(tile) *t, size_t r, FREE(v) p, FREE(v) q)
{
    if (!t->token) {
        V_STORE(t->h + r * 32, FREE(swiglu)(p, q));
        return;
    }
    FREE(v) w = V_SET1(t->weight[r]);
    float *y = t->y + t->token[r] * t->d;
    V_STORE(y, V_FMA(w, p, V_LOAD(y)));
    V_STORE(y + FREE_VL, V_FMA(w, q, V_LOAD(y + FREE_VL)));
}
#define FREE_TILE(R)                                                                                     \
    FREE_FN void FREE(tile##R)(const FREE(tile) *t)                                                      \
    {                                                                                                    \
        const float *a = t->a, *b = t->b, *next = t->next;                                               \
        FREE_EACH_##R(FREE_BEGIN)                                                                        \
        for (size_t left = t->k; left; left -= 32, a += t->rows * 32) {                                  \
            for (size_t l = 0; l < t->lines; l++, next += 16) _mm_prefetch((const char *)next, _MM_HINT_T1); \
            for (size_t i = 0; i < 32; i++, b += FREE_TC) {                                              \
                FREE(v) b0 = V_LOAD(b), b1 = V_LOAD(b + FREE_VL);                                        \
                FREE_EACH_##R(FREE_STEP)                                                                 \
            }                                                                                            \
        }                                                                                                \
        FREE_EACH_##R(FREE_DONE)                                                                         \
    }
/* 2 and 3 rows: odd k have chains of their own, or a chain's latency would show. */
#define FREE_BEGIN_TWICE(r) FREE(v) p##r = V_SET1(0.0f), q##r = p##r, s##r = p##r, t##r = p##r;
#define FREE_STEP_ODD(r)                                                                                 \
    { FREE(v) x = V_SET1(a[(r) * 32 + i + 1]); s##r = V_FMA(x, b2, s##r); t##r = V_FMA(x, b3, t##r); }
#define FREE_DONE_TWICE(r) FREE(end)(t, r, V_ADD(p##r, s##r), V_ADD(q##r, t##r));
#define FREE_TILE_TWICE(R)                                                                               \
    FREE_FN void FREE(tile##R)(const FREE(tile) *t)                                                      \
    {                                                                                                    \
        const float *a = t->a, *b = t->b, *next = t->next;                                               \
        FREE_EACH_##R(FREE_BEGIN_TWICE)                                                                  \
        for (size_t left = t->k; left; left -= 32, a += t->rows * 32) {                                  \
            for (size_t l = 0; l < t->lines; l++, next += 16) _mm_prefetch((const char *)next, _MM_HINT_T1); \
            for (size_t i = 0; i < 32; i += 2, b += 2 * FREE_TC) {                                       \
                FREE(v) b0 = V_LOAD(b), b1 = V_LOAD(b + FREE_VL);                                        \
                FREE(v) b2 = V_LOAD(b + FREE_TC), b3 = V_LOAD(b + FREE_TC + FREE_VL);                    \
                FREE_EACH_##R(FREE_STEP)                                                                 \
                FREE_EACH_##R(FREE_STEP_ODD)                                                             \
            }                                                                                            \
        }                                                                                                \
        FREE_EACH_##R(FREE_DONE_TWICE)                                                                   \
    }
FREE_TILE_TWICE(1) FREE_TILE_TWICE(2) FREE_TILE_TWICE(3)
FREE_TILE(4) FREE_TILE(5) FREE_TILE(6)
#ifdef FREE_AVX512
FREE_TILE(7) FREE_TILE(8) FREE_TILE(9) FREE_TILE(10) FREE_TILE(11) FREE_TILE(12) FREE_TILE(13) FREE_TILE(14)
#endif
static void (*const FREE(tiles)[])(const FREE(tile) *) = {
    NULL, FREE(tile1), FREE(tile2), FREE(tile3), FREE(tile4), FREE(tile5), FREE(tile6),
#ifdef FREE_AVX512
    FREE(tile7), FREE(tile8), FREE(tile9), FREE(tile10), FREE(tile11), FREE(tile12), FREE(tile13), FREE(tile14),
#endif
};

/* Weights w (k, n), and `other` beside them where its columns are gated -> panels. */
FREE_FN void FREE(pack)(size_t k, size_t n, const float *w, const float *other, float *panel)
{
    size_t step = other ? FREE_VL : FREE_TC;
    for (size_t c = 0; c < n; c += step)
        for (size_t i = 0; i < k; i++, panel += FREE_TC) {
            memcpy(panel, w + i * n + c, step * sizeof *panel);
            if (other) memcpy(panel + step, other + i * n + c, step * sizeof *panel);
        }
}

/* All row tiles of one panel; the next panel is asked for in as many parts. */
FREE_FN void FREE(panel)(FREE(tile) t)
{
    size_t n_tiles = (t.rows + FREE_MR - 1) / FREE_MR, blocks = t.k / 32, ask = blocks * 32 * FREE_TC / 16;
    FREE(tile) one = t;
    one.lines = (ask / n_tiles + blocks - 1) / blocks;
    for (size_t i = 0; i < n_tiles; i++) { /* rows split evenly */
        size_t r = i * t.rows / n_tiles, n = (i + 1) * t.rows / n_tiles - r;
        one.a = t.a + r * 32;
        one.next = t.next + i * one.lines * blocks * 16;
        if (t.token) one.token = t.token + r, one.weight = t.weight + r;
        else one.h = t.h + r * 32;
        FREE(tiles)[n](&one);
    }
}
/* One row: reading the weights is all of the time. Two panels in turn, 8 rows of each, as two streams are read faster
 * than one; SwiGLU goes into h, or, where that is NULL, weight * c is added to y. */
#define FREE_ROW_PIECE(b, p, q, r, u)                                                                    \
    for (size_t j = i; j < i + 8; j += 2, b += 2 * FREE_TC) {                                            \
        FREE(v) x = V_SET1(a[j]), odd = V_SET1(a[j + 1]);                                                \
        p = V_FMA(x, V_LOAD(b), p), q = V_FMA(x, V_LOAD(b + FREE_VL), q);                                \
        r = V_FMA(odd, V_LOAD(b + FREE_TC), r), u = V_FMA(odd, V_LOAD(b + FREE_TC + FREE_VL), u);        \
    }
FREE_FN void FREE(row)(size_t k, size_t n_panels, const float *a, const float *b, float *h, float weight, float *y)
{
    for (size_t n = 0; n < n_panels; n += 2, b += 2 * k * FREE_TC) {
        const float *b0 = b, *b1 = b + k * FREE_TC;
        FREE(v) p0 = V_SET1(0.0f), q0 = p0, r0 = p0, u0 = p0, p1 = p0, q1 = p0, r1 = p0, u1 = p0, w = V_SET1(weight);
        for (size_t i = 0; i < k; i += 8) {
            FREE_ROW_PIECE(b0, p0, q0, r0, u0)
            FREE_ROW_PIECE(b1, p1, q1, r1, u1)
        }
        p0 = V_ADD(p0, r0), q0 = V_ADD(q0, u0), p1 = V_ADD(p1, r1), q1 = V_ADD(q1, u1);
        if (h) {
            V_STORE(h + n * FREE_VL, FREE(swiglu)(p0, q0));
            V_STORE(h + (n + 1) * FREE_VL, FREE(swiglu)(p1, q1));
            continue;
        }
        float *to = y + n * FREE_TC;
        V_STORE(to, V_FMA(w, p0, V_LOAD(to)));
        V_STORE(to + FREE_VL, V_FMA(w, q0, V_LOAD(to + FREE_VL)));
        V_STORE(to + FREE_TC, V_FMA(w, p1, V_LOAD(to + FREE_TC)));
        V_STORE(to + FREE_TC + FREE_VL, V_FMA(w, q1, V_LOAD(to + FREE_TC + FREE_VL)));
    }
}
/* n routes of an expert: x (., d) by token -> y (., d) += weight * expert(x). up, down: its panels; after: what is read
 * after them. room: n * (d + ff) floats. */
FREE_FN void FREE(expert)(size_t d, size_t ff, size_t n, const uint32_t *token, const float *weight, const float *x,
                          const float *up, const float *down, const float *after, float *room, float *y)
{
    float *a = room, *h = room + n * d;
    if (n == 1) {
        FREE(row)(d, ff / FREE_VL, x + *token * d, up, h, 0.0f, NULL);
        FREE(row)(ff, d / FREE_TC, h, down, NULL, *weight, y + *token * d);
        return;
    }
    for (size_t c = 0; c < d; c += 32)
        for (size_t r = 0; r < n; r++) memcpy(a + (c * n + r * 32), x + token[r] * d + c, 32 * sizeof *a);
    FREE(tile) t = {.k = d, .rows = n, .a = a, .b = up};
    for (size_t c = 0; c < ff; c += FREE_VL, t.b += d * FREE_TC) {
        t.next = c + FREE_VL < ff ? t.b + d * FREE_TC : down;
        t.h = h + c / 32 * 32 * n + c % 32;
        FREE(panel)(t);
    }
    t = (FREE(tile)){.k = ff, .rows = n, .a = h, .b = down, .weight = weight, .token = token, .d = d};
    for (size_t c = 0; c < d; c += FREE_TC, t.b += ff * FREE_TC) {
        t.next = c + FREE_TC < d ? t.b + ff * FREE_TC : after;
        t.y = y + c;
        FREE(panel)(t);
    }
}

/* ---- reductions ---- */
FREE_FN void FREE(softmax)(size_t rows, size_t n, const float *x, float *y)
{
    for (size_t r = 0; r < rows; r++, x += n, y += n) {
        FREE(v) top = V_LOAD(x), sum = V_SET1(0.0f);
        for (size_t i = FREE_VL; i < n; i += FREE_VL) top = V_MAX(top, V_LOAD(x + i));
        top = V_SET1(V_MAXIMUM(top));
        for (size_t i = 0; i < n; i += FREE_VL) {
            FREE(v) e = FREE(exp)(V_SUB(V_LOAD(x + i), top));
            V_STORE(y + i, e);
            sum = V_ADD(sum, e);
        }
        FREE(v) factor = V_SET1(1.0f / V_SUM(sum));
        for (size_t i = 0; i < n; i += FREE_VL) V_STORE(y + i, V_MUL(V_LOAD(y + i), factor));
    }
}
/* dx += p (dy - <p, dy>) */
FREE_FN void FREE(softmax_back)(size_t rows, size_t n, const float *p, const float *dy, float *dx)
{
    for (size_t r = 0; r < rows; r++, p += n, dy += n, dx += n) {
        FREE(v) s0 = V_SET1(0.0f), s1 = s0, s2 = s0, s3 = s0;
        size_t i = 0;
        for (; n - i >= 4 * FREE_VL; i += 4 * FREE_VL) {
            s0 = V_FMA(V_LOAD(p + i), V_LOAD(dy + i), s0);
            s1 = V_FMA(V_LOAD(p + i + FREE_VL), V_LOAD(dy + i + FREE_VL), s1);
            s2 = V_FMA(V_LOAD(p + i + 2 * FREE_VL), V_LOAD(dy + i + 2 * FREE_VL), s2);
            s3 = V_FMA(V_LOAD(p + i + 3 * FREE_VL), V_LOAD(dy + i + 3 * FREE_VL), s3);
        }
        for (; i < n; i += FREE_VL) s0 = V_FMA(V_LOAD(p + i), V_LOAD(dy + i), s0);
        FREE(v) mean = V_SET1(V_SUM(V_ADD(V_ADD(s0, s1), V_ADD(s2, s3))));
        for (i = 0; i < n; i += FREE_VL)
            V_STORE(dx + i, V_FMA(V_LOAD(p + i), V_SUB(V_LOAD(dy + i), mean), V_LOAD(dx + i)));
    }
}
FREE_FN double FREE(squares)(size_t n, const float *x)
{
    FREE(d) s[4] = {D_ZERO(), D_ZERO(), D_ZERO(), D_ZERO()};
    double out[FREE_DL], sum = 0;
    for (; n >= 4 * FREE_DL; n -= 4 * FREE_DL, x += 4 * FREE_DL) {
        FREE(d) a = D_OF(x), b = D_OF(x + FREE_DL), c = D_OF(x + 2 * FREE_DL), e = D_OF(x + 3 * FREE_DL);
        s[0] = D_FMA(a, a, s[0]), s[1] = D_FMA(b, b, s[1]), s[2] = D_FMA(c, c, s[2]), s[3] = D_FMA(e, e, s[3]);
    }
    D_STORE(out, D_ADD(D_ADD(s[0], s[1]), D_ADD(s[2], s[3])));
    for (size_t i = 0; i < FREE_DL; i++) sum += out[i];
    for (; n; n--, x++) sum += (double)*x * (double)*x;
    return sum;
}
/* mean (n) of rows, in double: a block of columns in registers while all rows pass */
FREE_FN void FREE(means)(size_t rows, size_t n, const float *x, double *mean)
{
    for (size_t c = 0; c < n; c += 4 * FREE_DL) {
        FREE(d) s[4] = {D_ZERO(), D_ZERO(), D_ZERO(), D_ZERO()};
        double out[4 * FREE_DL];
        for (size_t r = 0; r < rows; r++)
            for (size_t i = 0; i < 4; i++) s[i] = D_ADD(s[i], D_OF(x + r * n + c + i * FREE_DL));
        for (size_t i = 0; i < 4; i++) D_STORE(out + i * FREE_DL, s[i]);
        for (size_t i = 0; i < 4 * FREE_DL; i++) mean[c + i] = out[i] / (double)rows;
    }
}

#undef FREE
#undef FREE_FN
#undef FREE_FI
#undef FREE_VL
#undef FREE_MR
#undef FREE_DL
#undef FREE_TC
#undef FREE_EACH_1
#undef FREE_EACH_2
#undef FREE_EACH_3
#undef FREE_EACH_4
#undef FREE_EACH_5
#undef FREE_EACH_6
#undef FREE_EACH_7
#undef FREE_EACH_8
#undef FREE_EACH_9
#undef FREE_EACH_10
#undef FREE_EACH_11
#undef FREE_EACH_12
#undef FREE_EACH_13
#undef FREE_EACH_14
#undef FREE_BEGIN
#undef FREE_STEP
#undef FREE_DONE
#undef FREE_TILE
#undef FREE_BEGIN_TWICE
#undef FREE_STEP_ODD
#undef FREE_DONE_TWICE
#undef FREE_TILE_TWICE
#undef FREE_ROW_PIECE
#undef V_LOAD
#undef V_STORE
#undef V_SET1
#undef V_FMA
#undef V_FNMA
#undef V_ADD
#undef V_SUB
#undef V_MUL
#undef V_MAX
#undef V_MIN
#undef V_INVERSE
#undef V_INTEGER
#undef V_WHOLE
#undef V_POWER
#undef V_SUM
#undef V_MAXIMUM
#undef D_OF
#undef D_FMA
#undef D_ADD
#undef D_STORE
#undef D_ZERO

// peak.h - what this machine can do: a loop of fused multiply-adds that stays in registers, on as many threads as the
// program uses and with the instruction set that the library uses.
//
//     double flops = peak_flops(&parallel);        // a second; about 20 ms
#ifndef EX_PEAK_H
#define EX_PEAK_H

#include "nn.h"

// 12 independent sums of W numbers each, `steps` times. Written once, compiled for each width.
#if defined(__GNUC__)
#define PEAK_LOOP(name, width, attributes)                                                                             \
    attributes EX_FUNC float name(size_t steps) {                                                                      \
        typedef float vec __attribute__((vector_size(4 * width)));                                                     \
        vec x = {0.5f}, y = {0.25f}, a = x, b = x, c = x, d = x, e = x, f = x;                                         \
        vec g = x, h = x, i = x, j = x, k = x, l = x;                                                                  \
        for (size_t s = 0; s < steps; s++) {                                                                           \
            PEAK_FMA(a) PEAK_FMA(b) PEAK_FMA(c) PEAK_FMA(d) PEAK_FMA(e) PEAK_FMA(f)                                    \
            PEAK_FMA(g) PEAK_FMA(h) PEAK_FMA(i) PEAK_FMA(j) PEAK_FMA(k) PEAK_FMA(l)                                    \
        }                                                                                                              \
        a += b + c + d + e + f + g + h + i + j + k + l;                                                                \
        return a[0];                                                                                                   \
    }
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define PEAK_FMA(a) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(a) : "v"(x), "v"(y));
PEAK_LOOP(peak_avx2, 8, __attribute__((target("avx2,fma"))))
PEAK_LOOP(peak_avx512, 16, __attribute__((target("avx512f"))))
#undef PEAK_FMA
#elif defined(__GNUC__) && defined(__aarch64__)
#define PEAK_FMA(a) __asm__ volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(a) : "w"(x), "w"(y));
PEAK_LOOP(peak_neon, 4, )
#undef PEAK_FMA
#endif
EX_FUNC float peak_scalar(size_t steps) {
    float s[12], sum = 0;
    for (int i = 0; i < 12; i++) s[i] = (float)i;
    for (size_t k = 0; k < steps; k++)
        for (int i = 0; i < 12; i++) s[i] = fmaf(0.5f, 0.25f, s[i]);
    for (int i = 0; i < 12; i++) sum += s[i];
    return sum;
}

typedef struct peak_loop {
    float (*run)(size_t steps);
    size_t width, steps;
} peak_loop;
static volatile float peak_sink; // keeps the sums alive

EX_FUNC peak_loop peak_of(moe_isa_kind isa) {
    peak_loop l = {peak_scalar, 1, 1000};
#if defined(__GNUC__) && defined(__x86_64__)
    if (isa == MOE_ISA_AVX2) l = (peak_loop){peak_avx2, 8, 1000};
    if (isa == MOE_ISA_AVX512) l = (peak_loop){peak_avx512, 16, 1000};
#elif defined(__GNUC__) && defined(__aarch64__)
    if (isa == MOE_ISA_NEON) l = (peak_loop){peak_neon, 4, 1000};
#endif
    (void)isa;
    return l;
}
EX_FUNC void peak_task(void *arg, size_t i, size_t worker) {
    const peak_loop *l = arg;
    (void)i, (void)worker;
    peak_sink = l->run(l->steps);
}

// The best of four bursts.
EX_FUNC double peak_flops(const moe_parallel *parallel) {
    peak_loop l = peak_of(moe_active_isa());
    size_t tasks = 16 * moe_workers(parallel);
    double best = 0, spent = 0;
    for (; spent < 0.25e-3; l.steps *= 2) { // a task takes at least a quarter of a millisecond
        double begin = seconds_now();
        peak_sink = l.run(l.steps);
        spent = seconds_now() - begin;
    }
    l.steps /= 2;
    for (int burst = 0; burst < 4; burst++) {
        double begin = seconds_now();
        moe_run(parallel, tasks, peak_task, &l);
        best = fmax(best, (double)(tasks * l.steps * 12 * l.width) * 2 / (seconds_now() - begin));
    }
    return best;
}

#endif

// model_of.h - what desktop and firmware agree on, and one way to print for both.
#ifndef MODEL_OF_H
#define MODEL_OF_H

#define MOE_IMPLEMENTATION
#include "moe.h"

enum { D = 32, F = 32, E = 4, TOKENS = 3 };

static inline moe_desc model_desc(void) {
    moe_desc desc = {0};
    desc.d_model = D;
    desc.d_ff = F;
    desc.n_experts = E;
    desc.top_k = 2;
    desc.training = MOE_OFF;
    return desc;
}

#ifdef __arm__
void put_line(const char *text); // board.c
#else
#include <stdio.h>
static void put_line(const char *text) { puts(text); }
#endif

// The bits of the outputs, four numbers a line.
static void print_outputs(const float *y) {
    char line[40];
    for (size_t i = 0; i < TOKENS * D; i++) {
        uint32_t bits;
        memcpy(&bits, &y[i], sizeof bits);
        for (int k = 0; k < 8; k++) line[i % 4 * 9 + (size_t)k] = "0123456789abcdef"[bits >> (28 - 4 * k) & 15];
        line[i % 4 * 9 + 8] = ' ';
        line[i % 4 * 9 + 9] = 0;
        if (i % 4 == 3) put_line(line);
    }
}

#endif

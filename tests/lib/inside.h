/* inside.h - What tests see of a tape's private memory, and of a layer's, when the library is linked: tests/lib/moe.c,
 * which has it in itself, looks. Include test.h first. */
#ifndef INSIDE_H
#define INSIDE_H

/* Of the last forward; pointers are NULL where the system has no such thing. Rows: the tape's tokens. */
typedef struct inside {
    int training;
    size_t k, network_rows;          /* routes a token; rows that networks compute */
    float prob_t;                    /* temperature of prob */
    const int32_t *before;           /* (T, n_slots): the gate's choices before they were dropped */
    const float *noise;              /* (T, E): the normal numbers drawn */
    const float *mix, *dispatch;     /* (T, slots): combine=soft */
    const int32_t *code, *code_expert; /* (T): the code of a token, and its expert */
    const float *code_gate, *code_x; /* (T, 2); (T, d): the token as it was */
} inside;
inside inside_of(const moe_tape *tape);

/* The n numbers of the forward's jitter, as the library draws them; 0: it could not. */
int inside_jitter(const moe_tape *tape, size_t n, float low, float high, float *out);

/* All parameters of a layer, as the calls of level 2 take the experts. */
const float *inside_params(const moe_layer *layer);

#endif

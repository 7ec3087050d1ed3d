/* routing.h - Random choices and the routes over them. Include test.h first. */
#ifndef ROUTING_H
#define ROUTING_H

/* ---- routes ---- */
typedef struct routing { moe_routes r; void *memory; size_t T, k, E; int32_t *index; float *weight; } routing;

static inline routing routing_new(size_t T, size_t k, size_t E) {
    routing g;
    size_t bytes = 0;
    memset(&g, 0, sizeof g);
    g.T = T, g.k = k, g.E = E;
    CHECK_OK(moe_routes_size(T, E, k, &bytes));
    g.memory = test_memory(bytes + 1, 1);
    memset(g.memory, 0xff, bytes + 1);
    CHECK_OK(moe_routes_init(&g.r, T, E, k, (char *)g.memory + 1, bytes)); /* any alignment */
    CHECK(((unsigned char *)g.memory)[0] == 0xff);
    g.index = (int32_t *)test_memory(T * k, sizeof *g.index);
    g.weight = test_floats(T * k);
    return g;
}

static inline void routing_free(routing *g) { free(g->memory), free(g->index), free(g->weight); }

/* k different experts for each token, the low ones more often; `missing` in 16 choices are -1 */
static inline void routing_random(routing *g, size_t missing) {
    for (size_t t = 0; t < g->T; t++) {
        for (size_t j = 0; j < g->k; j++) {
            int again = 1;
            while (again) {
                size_t e = test_below(g->E);
                if (test_below(2)) e = e * e / g->E;
                g->index[t * g->k + j] = (int32_t)e, again = 0;
                for (size_t i = 0; i < j; i++) again |= g->index[t * g->k + i] == (int32_t)e;
            }
        }
        for (size_t j = 0; j < g->k; j++)
            if (test_below(16) < missing) g->index[t * g->k + j] = -1 - (int32_t)test_below(3);
    }
    for (size_t i = 0; i < g->T * g->k; i++) g->weight[i] = (float)(1 + test_below(20)) / 32; /* with ties */
}

/* Random choices, distinct within a token; expert e with weight as given; some choices are none. */
static inline void random_index(int32_t *index, size_t T, size_t E, size_t k, size_t none_in) {
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < k; i++) {
            int again = 1;
            while (again) {
                size_t a = test_below(E), b = test_below(E); /* the lower ones more often */
                index[t * k + i] = (int32_t)(a < b ? a : b);
                again = 0;
                for (size_t j = 0; j < i; j++) again |= index[t * k + j] == index[t * k + i];
            }
            if (none_in && test_below(none_in) == 0) index[t * k + i] = -1;
        }
}

#endif

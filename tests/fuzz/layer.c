/* A layer of any desc with any parameters and tokens: a byte that names a system, a line of fields, then floats. What
 * runs leaves routes and counters that agree; what is refused leaves the layer as it was. */
#include "fuzz.h"

enum { FUZZ_TOKENS = 6, FUZZ_WIDTH = 24 };

static void fuzz_layer_routes(moe_layer *m) {
    const moe_tape *t = moe_layer_tape(m);
    if (!t) return;
    const moe_routes *r = &t->routes;
    uint64_t load = 0;
    require(r->n_experts == 0 || r->begin[0] == 0);
    for (size_t e = 0; e < r->n_experts; e++) {
        require(r->begin[e] <= r->begin[e + 1] && r->begin[e + 1] - r->begin[e] <= r->load[e]);
        require(r->top1[e] <= r->load[e]);
        load += r->load[e];
        for (size_t i = r->begin[e]; i < r->begin[e + 1]; i++) require(r->token[i] < r->n_tokens);
    }
    require(load == r->n_routes + r->n_dropped && r->n_chosen <= r->n_tokens);
    moe_health h;
    require(moe_layer_health(m, &h) == MOE_OK);
    require(h.n_dead <= h.n_experts && h.drop_rate >= 0 && h.drop_rate <= 1);
}
static int fuzz_layer(const uint8_t *data, size_t size) {
    static float x[FUZZ_TOKENS * FUZZ_WIDTH], y[FUZZ_TOKENS * FUZZ_WIDTH], dx[FUZZ_TOKENS * FUZZ_WIDTH], values[4096];
    fuzz_input in = {data, size};
    moe_desc d, resolved;
    moe_layer *m = NULL;
    size_t layer_bytes = 0, tape_bytes = 0;
    if (fuzz_desc_of(&in, &d) || d.d_model > FUZZ_WIDTH || moe_desc_resolve(&d, &resolved)) return 0;
    moe_status sized = moe_layer_size(&d, &layer_bytes);
    if (sized || moe_tape_size(&d, FUZZ_TOKENS, MOE_ON, &tape_bytes)) return 0;
    if (layer_bytes > 1 << 18 || tape_bytes > 1 << 20) return 0;
    d.parallel.n_threads = 1;
    moe_status status = moe_layer_new(&m, &d);
    require((status == MOE_OK) == (m != NULL));
    if (!m) return 0;
    size_t n = fuzz_byte(&in) % (FUZZ_TOKENS + 1), which = fuzz_byte(&in);
    moe_tensor t;
    if (which < moe_layer_tensors(m) && moe_layer_tensor(m, which, &t) == MOE_OK && t.count <= 4096) {
        fuzz_floats(&in, t.count, values);
        (void)moe_layer_set(m, MOE_PART_PARAMS, t.name, values, t.count);
    }
    for (int step = 0; step < 2; step++) {
        fuzz_floats(&in, n * d.d_model, x);
        uint64_t before = moe_layer_hash(m);
        status = moe_forward(m, x, n, y);
        if (!status) fuzz_layer_routes(m);
        fuzz_floats(&in, n * d.d_model, y);
        if (!status) status = moe_backward(m, y, step ? NULL : dx);
        require(moe_layer_hash(m) == before);
        if (!status) status = moe_step(m, 0.01f);
        if (status) require(moe_layer_hash(m) == before);
    }
    moe_layer_free(m);
    return 0;
}
FUZZ_TARGET(fuzz_layer)

/* Arrays over one another: y over x gives the bits of y apart from it, for every system of the table; a backward that
 * would read what it has already written is refused, does nothing, and can be called again with other arrays. */
#include "test.h"

enum { D = 24, E = 8, T = 72, SEQ = 4, MOST = T * D + 3 * D };
static float x[T * D], dy[T * D], previous[T * E], both[MOST], want[T * D], dx[T * D], dx_want[T * D];
static unsigned char mask[T];

static moe_layer *layer(const char *system, const char *more) {
    moe_desc d;
    moe_layer *m = NULL;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = 16, d.n_experts = E, d.sequence = SEQ, d.seed = 5;
    if (system) CHECK_OK(moe_desc_system(&d, system));
    CHECK_OK(moe_desc_parse(&d, more, NULL));
    CHECK_OK(moe_layer_new(&m, &d));
    if (m) moe_layer_side(m)->previous = previous;
    return m;
}
/* x at both + x_at, y at both + y_at: the result is `want`, and so is what the backward makes of it. */
static void check_forward(const char *system, const char *more, int masked, size_t x_at, size_t y_at) {
    moe_layer *apart = layer(system, more), *over = layer(system, more);
    double norm[2] = {0, 1};
    if (!apart || !over) return;
    if (masked) moe_layer_side(apart)->mask = moe_layer_side(over)->mask = mask;
    for (int step = 0; step < 2 - TEST_SANITIZED; step++) {
        memcpy(both + x_at, x, sizeof x);
        CHECK_OK(moe_forward(apart, x, T, want));
        CHECK_OK(moe_forward(over, both + x_at, T, both + y_at));
        int same = CHECK_SAME(both + y_at, want, T * D);
        CHECK_OK(moe_backward(apart, dy, dx_want));
        CHECK_OK(moe_backward(over, dy, dx));
        same &= CHECK_SAME(dx, dx_want, T * D);
        CHECK_OK(moe_layer_grad_norm(apart, &norm[0]));
        CHECK_OK(moe_layer_grad_norm(over, &norm[1]));
        if (!CHECK(same && norm[0] == norm[1])) printf("        %s %s\n", system ? system : "", more);
        CHECK_OK(moe_step(apart, 0.01f));
        CHECK_OK(moe_step(over, 0.01f));
    }
    moe_layer_free(apart), moe_layer_free(over);
}
static void test_forward(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        check_forward(name, "", 0, 0, 0);
        check_forward(name, "", 1, 0, 0);
        check_forward(name, "", 0, 0, 3 * D - 1); /* a token before the one that is read */
        check_forward(name, "", 0, D + 1, 0);
    }
    check_forward(NULL, "jitter=0.2 noise=learned n_shared=1", 0, 0, 0);
    check_forward(NULL, "n_codes=16 code_share=0.1 n_shared=1", 1, 0, 0);
    check_forward(NULL, "n_codes=16 loss.codebook=1", 0, 0, D);
}

/* The refused backward leaves the gradients, dy and the tape as they were. */
static void check_backward(const char *system, const char *more) {
    moe_layer *m = layer(system, more), *other = layer(system, more);
    float *buffer = both;
    if (!m || !other) return;
    CHECK_OK(moe_forward(m, x, T, want));
    CHECK_OK(moe_forward(other, x, T, want));
    CHECK_OK(moe_backward(other, dy, dx_want));
    static const size_t at[][2] = {{0, 0}, {0, 3 * D}, {3 * D, 0}, {1, 0}, {0, 1}};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        memcpy(buffer + at[i][0], dy, sizeof dy);
        CHECK_STATUS(moe_backward(m, buffer + at[i][0], buffer + at[i][1]), MOE_E_OVERLAP);
        CHECK_SAME(buffer + at[i][0], dy, T * D);
    }
    double norm = 1;
    CHECK_OK(moe_layer_grad_norm(m, &norm));
    CHECK(norm == 0);
    CHECK_OK(moe_backward(m, dy, dx)); /* the tape is not used up */
    if (!CHECK_SAME(dx, dx_want, T * D)) printf("        %s\n", system ? system : "");
    double norms[2] = {0, 1};
    CHECK_OK(moe_layer_grad_norm(m, &norms[0]));
    CHECK_OK(moe_layer_grad_norm(other, &norms[1]));
    CHECK(norms[0] > 0 && norms[0] == norms[1]);
    moe_layer_free(m), moe_layer_free(other);
}
static void test_backward(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) check_backward(moe_system_at(i)->name, "");
    check_backward(NULL, "n_codes=16");
}
/* Arrays that touch and do not overlap, at both ends; and no tokens. */
static void test_beside(void) {
    static float line[2 * T * D + T * E];
    moe_layer *m = layer("switch", "");
    for (int before = 0; before < 2; before++) {
        float *in = line + (before ? T * D : 0), *out = line + (before ? 0 : T * D);
        memcpy(in, dy, sizeof dy);
        CHECK_OK(moe_forward(m, x, T, want));
        CHECK_OK(moe_backward(m, in, out));
    }
    CHECK_OK(moe_forward(m, x, 0, want));
    CHECK_OK(moe_backward(m, line, line));
    moe_layer_free(m);
    m = layer(NULL, "residual=true");
    for (int which = 0; which < 4; which++) { /* d_previous over dy, over dx, behind both, between them */
        static const moe_status wants[] = {MOE_E_OVERLAP, MOE_E_OVERLAP, MOE_OK, MOE_OK};
        float *in = line, *out = line + T * D + (which == 3 ? T * E : 0);
        static const size_t at[] = {T * D - 1, T * D + T * E - 1, 2 * T * D, T * D};
        memset(line, 0, sizeof line);
        memcpy(in, dy, sizeof dy);
        CHECK_OK(moe_forward(m, x, T, want));
        moe_layer_side(m)->d_previous = line + at[which];
        CHECK_OK(moe_forward(m, x, T, want));
        CHECK_STATUS(moe_backward(m, in, out), wants[which]);
        moe_layer_side(m)->d_previous = NULL;
    }
    moe_layer_free(m);
}

/* ---- levels 1 and 2 ---- */
static void test_levels(void) {
    moe_desc d;
    moe_tape *t = NULL;
    size_t n_router = 0, n_experts = 0;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = 16, d.n_experts = E, d.residual = MOE_ON;
    CHECK_OK(moe_router_count(&d, &n_router));
    CHECK_OK(moe_experts_count(&d, &n_experts));
    float *router = test_floats(n_router), *params = test_floats(n_experts), *grads = test_floats(n_experts);
    float *d_weight = test_floats(T * E), d_previous[T * E];
    test_fill(router, n_router, -1, 1);
    test_fill(params, n_experts, -1, 1);
    if (!CHECK_OK(moe_tape_new(&t, &d, T, MOE_ON))) return;
    t->side.previous = previous;
    CHECK_OK(moe_route(t, router, x, T));
    CHECK_OK(moe_experts_forward(t, params, want));
    memcpy(both, dy, sizeof dy);
    CHECK_STATUS(moe_experts_backward(t, params, both, 1, grads, d_weight, both + D), MOE_E_OVERLAP);
    CHECK_SAME(both, dy, T * D);
    CHECK_OK(moe_experts_backward(t, params, both, 1, grads, d_weight, dx));
    t->side.d_previous = both + D;
    CHECK_STATUS(moe_route_backward(t, router, d_weight, NULL, both), MOE_E_OVERLAP);
    t->side.d_previous = d_previous;
    memset(d_previous, 0, sizeof d_previous);
    CHECK_OK(moe_route_backward(t, router, d_weight, NULL, both));
    moe_tape_free(t);
    free(router), free(params), free(grads), free(d_weight);

    float s[4] = {0.5f, 0.5f, 0.25f, 0.75f}, ds[4] = {1, 0, 0, 1}, dz[4] = {0};
    CHECK_STATUS(moe_softmax_backward(2, 2, 1, s, ds, ds), MOE_E_OVERLAP);
    CHECK_STATUS(moe_softmax_backward(2, 2, 1, s, ds, s), MOE_E_OVERLAP);
    CHECK_STATUS(moe_softmax_backward(1, 2, 1, s, ds, s + 1), MOE_E_OVERLAP);
    CHECK(ds[0] == 1 && s[2] == 0.25f);
    CHECK_OK(moe_softmax_backward(2, 2, 1, s, ds, dz));
    CHECK(dz[0] == 0.25f && dz[1] == -0.25f && dz[2] == -0.1875f && dz[3] == 0.1875f); /* p (g - <p, g>) by hand */
    CHECK_OK(moe_softmax(2, 2, 1, dz, dz)); /* in place */
    CHECK_NEAR(dz[0], 1 / (1 + exp(-0.5)), 1e-6);
}

int main(void) {
    test_fill(x, T * D, -1, 1);
    test_fill(dy, T * D, -1, 1);
    test_fill(previous, T * E, -1, 1);
    for (size_t t = 0; t < T; t++) mask[t] = t % 3 > 0; /* 48: some systems want a multiple of E */
    RUN(test_forward);
    RUN(test_backward);
    RUN(test_beside);
    RUN(test_levels);
    return test_end();
}

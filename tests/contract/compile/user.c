/* Another translation unit, C or C++, that only declares: every level of the API once, linked with implementation.c.
 * With USER_IMPLEMENTS it holds the implementation itself, asked for after the header was already included. */
#include "moe.h"
#include "moe.h"
#ifdef USER_IMPLEMENTS
#define MOE_IMPLEMENTATION
#include "moe.h"
#include "moe.h"
#endif
#include <stdio.h>
#include <string.h>

int main(void) {
    float a[6] = {1, 2, 3, 4, 5, 6}, c[9], y[6];
    moe_gemm_args g;
    moe_desc d;
    moe_layer *m = NULL;
    moe_health h;
    memset(&g, 0, sizeof g);
    memset(&d, 0, sizeof d);
    g.m = g.n = 3, g.k = 2, g.a = a, g.b = a, g.tb = 1, g.c = c;
    moe_status s = moe_gemm(&g);
    d.d_model = 3, d.n_experts = 2, d.d_ff = 5, d.top_k = 1;
    if (!s) s = moe_layer_new(&m, &d);
    if (!s) s = moe_forward(m, a, 2, y);
    if (!s) s = moe_backward(m, y, NULL);
    if (!s) s = moe_step(m, 0.1f);
    if (!s) s = moe_layer_health(m, &h);
    int right =
        !s && c[0] == 5 && c[1] == 11 && c[5] == 39 && h.n_tokens == 2 && moe_layer_params(m) == 3 * 2 + 2 * 3 * 3 * 5;
    printf("%s\n", s ? moe_status_string(s) : right ? "right" : "wrong");
    moe_layer_free(m);
    return !right;
}

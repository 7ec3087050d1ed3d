/* The tensors of a layer against formulas: which there are, their shapes, counts and initial values. */
#include "test.h"

static moe_desc desc_of(const char *choices) {
    moe_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.d_model = 24, desc.d_ff = 10, desc.n_experts = 8, desc.seed = 5;
    CHECK_OK(moe_desc_parse(&desc, choices, NULL));
    CHECK_OK(moe_desc_resolve(&desc, &desc));
    return desc;
}

/* "name AxBxC" for each tensor, in order. */
static void check_tensors(const char *choices, const char *want) {
    moe_desc desc = desc_of(choices);
    moe_tensor tensor;
    char got[1024] = "", one[80];
    size_t i = 0, router = 0, experts = 0, count = 0;
    for (; moe_desc_tensor(&desc, i, &tensor) == MOE_OK; i++) {
        size_t product = 1;
        snprintf(one, sizeof one, "%s%s ", i ? ", " : "", tensor.name);
        strcat(got, one);
        for (size_t k = 0; k < tensor.n_dims; k++) {
            product *= tensor.dim[k];
            snprintf(one, sizeof one, "%s%zu", k ? "x" : "", tensor.dim[k]);
            strcat(got, one);
        }
        CHECK(tensor.count == product);
        if (!strncmp(tensor.name, "router", 6) || !strncmp(tensor.name, "experts.constant", 16)) router += product;
        else experts += product;
    }
    if (!CHECK(!strcmp(got, want))) printf("        %s:\n        %s\n     not %s\n", choices, got, want);
    CHECK_STATUS(moe_desc_tensor(&desc, i, &tensor), MOE_E_NAME);
    CHECK_STATUS(moe_desc_tensor(&desc, SIZE_MAX, &tensor), MOE_E_NAME);
    CHECK_OK(moe_router_count(&desc, &count));
    CHECK(count == router);
    CHECK_OK(moe_experts_count(&desc, &count));
    CHECK(count >= experts); /* with the panels' padding */
    moe_layer *layer = NULL;
    if (!CHECK_OK(moe_layer_new(&layer, &desc))) return;
    CHECK(moe_layer_tensors(layer) == i && moe_layer_params(layer) == router + experts);
    moe_layer_free(layer);
}

static void test_shapes(void) {
    check_tensors("expert=relu", "router 24x8, experts.w1 8x24x10, experts.w2 8x10x24");
    check_tensors("n_shared=2 bias=true", "router 24x8, experts.w1 10x24x10, experts.wu 10x24x10, experts.w2 10x10x24, "
                                          "experts.b1 10x10, experts.bu 10x10, experts.b2 10x24");
    check_tensors("score=mlp expert=gelu bias=true",
                  "router 12x8, router.bias 8, router.proj 24x12, router.proj_bias 12, "
                  "experts.w1 8x24x10, experts.w2 8x10x24, experts.b1 8x10, experts.b2 8x24");
    check_tensors("score=projected d_router=6 expert=relu", "router 6x8, router.proj 24x6, "
                                                            "experts.w1 8x24x10, experts.w2 8x10x24");
    check_tensors("score=slice expert=relu", "experts.w1 8x24x10, experts.w2 8x10x24");
    check_tensors("noise=learned residual=true learn_temperature=true expert=relu",
                  "router 24x8, router.noise 24x8, router.log_scale 1, router.residual 8x8, "
                  "experts.w1 8x24x10, experts.w2 8x10x24");
    check_tensors("gate=sign select=threshold n_codes=9 expert=relu",
                  "router 24x8, router.threshold 8, router.codebook 9x24, router.branch 24x2, "
                  "experts.w1 8x24x10, experts.w2 8x10x24");
    check_tensors("combine=soft select=all soft_slots=3 expert=relu",
                  "router 24x24, experts.w1 8x24x10, experts.w2 8x10x24");
}

static float *initial(const char *choices, const char *name, size_t *count) {
    moe_desc desc = desc_of(choices);
    moe_layer *layer = NULL;
    moe_tensor tensor;
    float *values = NULL;
    *count = 0;
    if (!CHECK_OK(moe_layer_new(&layer, &desc))) return NULL;
    for (size_t i = 0; i < moe_layer_tensors(layer) && moe_layer_tensor(layer, i, &tensor) == MOE_OK; i++)
        if (!strcmp(tensor.name, name)) values = test_floats(*count = tensor.count);
    CHECK_OK(moe_layer_get(layer, MOE_PART_PARAMS, name, values, *count));
    moe_layer_free(layer);
    return values;
}

static void test_initial_values(void) {
    size_t n, m;
    float *router = initial("expert=relu", "router", &n), most = 0;
    for (size_t i = 0; i < n; i++) most = fabsf(router[i]) > most ? fabsf(router[i]) : most;
    CHECK(most <= 1 / sqrtf(24) && most > 0.9f / sqrtf(24)); /* uniform in +-1/sqrt(d) */
    /* a tensor more, of the router or of the experts, changes no other tensor's numbers */
    static const char *const more[] = {"expert=relu residual=true", "expert=relu bias=true", "expert=relu n_codes=8",
                                       "expert=swiglu", "expert=relu noise=learned learn_temperature=true"};
    for (size_t i = 0; i < 5; i++) {
        float *again = initial(more[i], "router", &m);
        CHECK(m == n && CHECK_SAME(again, router, n));
        free(again);
    }
    free(router);
    float *w1 = initial("expert=relu", "experts.w1", &n),
          *gated = initial("expert=swiglu residual=true", "experts.w1", &m);
    CHECK(m == n && CHECK_SAME(gated, w1, n));
    free(w1), free(gated);
    float *w2 = initial("zero_output=true", "experts.w2", &n);
    for (size_t i = 0; i < n; i++) CHECK(w2[i] == 0);
    free(w2);
    float *scale = initial("learn_temperature=true temperature=0.25", "router.log_scale", &n);
    CHECK(n == 1);
    CHECK_NEAR(scale[0], log(4), 1e-6);
    free(scale);
}

int main(void) {
    RUN(test_shapes);
    RUN(test_initial_values);
    return test_end();
}

/* Every row of the table of systems: it trains, its gradients are those of the pipeline in double, its bits are the
 * same everywhere, and it has the property that defines it. */
#include "test.h"
#include "oracle.h"
#include "pipeline.h"

enum { D = 16, F = 6, T = 16 };

static moe_desc system_desc(const char *name) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.sequence = 4, d.seed = 7;
    CHECK_OK(moe_desc_system(&d, name));
    return d;
}

/* ---- the table itself ---- */
static void test_table(void) {
    CHECK(moe_systems_count() >= 32);
    CHECK(moe_system_at(moe_systems_count()) == NULL && moe_system_find("no such") == NULL &&
          moe_system_find(NULL) == NULL);
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const moe_system *row = moe_system_at(i);
        moe_desc d = system_desc(row->name), r;
        CHECK(row->name[0] && row->title[0] && row->source[0] && row->mark[0] && row->choices[0] && row->purpose[0] &&
              row->limits[0]);
        CHECK(moe_system_find(row->name) == row && strlen(row->name) < 32);
        for (const char *c = row->mark; *c; c++) CHECK(strchr("PCSKD+", *c) != NULL);
        if (!CHECK_OK(moe_desc_resolve(&d, &r))) printf("        %s\n", row->name);
        for (size_t j = 0; j < i; j++) CHECK(strcmp(row->name, moe_system_at(j)->name) != 0);
    }
    moe_desc d;
    char near[200];
    memset(&d, 0, sizeof d);
    CHECK_STATUS(moe_desc_system(&d, "swich"), MOE_E_SYSTEM);
    CHECK(d.top_k == 0 && d.gate == MOE_GATE_DEFAULT); /* nothing was changed */
    moe_system_near("swich", near, sizeof near);
    CHECK(!strcmp(near, "switch"));
    moe_system_near("deepseek", near, sizeof near);
    CHECK(strstr(near, "deepseek-v3") != NULL && strstr(near, "deepseek-moe") != NULL);
    moe_system_near("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", near, 8);
    CHECK(strlen(near) < 8);
    CHECK_STATUS(moe_desc_system(NULL, "switch"), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_desc_system(&d, NULL), MOE_E_NULL_NAME);
}

static void test_parse(void) {
    moe_desc d;
    size_t at;
    memset(&d, 0, sizeof d);
    CHECK_OK(moe_desc_parse(&d, "  top_k=3 gate=sigmoid  loss.z=0.5 bias=true capacity_factor=off ", NULL));
    CHECK(d.top_k == 3 && d.gate == MOE_GATE_SIGMOID && d.loss[MOE_LOSS_Z] == 0.5f && d.bias == MOE_ON &&
          d.capacity_factor == (float)MOE_OFF);
    CHECK_STATUS(moe_desc_parse(&d, "top_k=5 gate=soft", &at), MOE_E_VALUE);
    CHECK(at == 8 && d.top_k == 3); /* all or nothing */
    CHECK_STATUS(moe_desc_parse(&d, "topk=5", &at), MOE_E_FIELD);
    CHECK_STATUS(moe_desc_parse(&d, "top_k", &at), MOE_E_FIELD);
    CHECK_STATUS(moe_desc_parse(&d, "top_k=", &at), MOE_E_VALUE);
    CHECK_STATUS(moe_desc_parse(&d, "top_k=-1", &at), MOE_E_VALUE);
    CHECK_OK(moe_desc_parse(&d, "", NULL));
    CHECK_STATUS(moe_desc_set(&d, "gate", "relu "), MOE_E_VALUE);
    CHECK_STATUS(moe_desc_set(NULL, "gate", "relu"), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_desc_set(&d, NULL, "relu"), MOE_E_NULL_NAME);
}

/* ---- aliases ---- */
/* A folder of a model: this config.json, and routers of nothing under the names of all families. */
static moe_status config_file(void *config, const char *name, const void **bytes, size_t *size) {
#define NONE ":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}"
    static char weights[] = "01234567{\"model.layers.0.mlp.gate.weight\"" NONE
        ",\"model.layers.0.mlp.router.weight\"" NONE
        ",\"model.layers.0.feed_forward.router.weight\"" NONE ",\"transformer.blocks.0.ffn.router.layer.weight\"" NONE
        ",\"model.layers.0.block_sparse_moe.router.layer.weight\"" NONE
        ",\"model.layers.0.block_sparse_moe.gate.weight\"" NONE "}";
    uint64_t header = sizeof weights - 9;
    for (int i = 0; i < 8; i++) weights[i] = (char)(header >> 8 * i); /* little-endian */
    int json = !strcmp(name, "config.json");
    if (!json && strcmp(name, "model.safetensors")) return MOE_E_OPEN;
    *bytes = json ? config : (void *)weights;
    *size = json ? strlen((const char *)config) : sizeof weights - 1;
    return MOE_OK;
}
/* What the published configs say of the mixture [K], with the sizes of a small one. */
static const struct { const char *alias, *config; } published[] = {
    {"olmoe", "'olmoe','num_experts':64,'num_experts_per_tok':8,'intermediate_size':32,'norm_topk_prob':false"},
    {"qwen2-moe", "'qwen2_moe','num_experts':60,'num_experts_per_tok':4,'moe_intermediate_size':32,"
     "'shared_expert_intermediate_size':128,'norm_topk_prob':false"},
    {"qwen3-moe", "'qwen3_moe','num_experts':128,'num_experts_per_tok':8,'moe_intermediate_size':32,"
     "'norm_topk_prob':true"},
    {"qwen3-next", "'qwen3_next','num_experts':512,'num_experts_per_tok':10,'moe_intermediate_size':32,"
     "'shared_expert_intermediate_size':32,'norm_topk_prob':true"},
    {"jamba", "'jamba','num_experts':16,'num_experts_per_tok':2,'intermediate_size':32"},
    {"dbrx", "'dbrx','n_layers':1,'d_model':16,'ffn_config':{'moe_num_experts':16,'moe_top_k':4,"
     "'ffn_hidden_size':32,'moe_normalize_expert_weights':1}"},
    {"llama-4", "'llama4_text','num_local_experts':16,'num_experts_per_tok':1,'intermediate_size':32"},
    {"granite-moe", "'granitemoe','num_local_experts':32,'num_experts_per_tok':8,'intermediate_size':32"},
    {"gpt-oss", "'gpt_oss','num_local_experts':32,'num_experts_per_tok':4,'intermediate_size':32,'swiglu_limit':7.0"},
    {"deepseek-v2", "'deepseek_v2','n_routed_experts':160,'num_experts_per_tok':6,'moe_intermediate_size':32,"
     "'n_shared_experts':2,'n_group':8,'topk_group':3,'topk_method':'group_limited_greedy',"
     "'routed_scaling_factor':16.0,'norm_topk_prob':false"},
    {"deepseek-r1", "'deepseek_v3','n_routed_experts':256,'num_experts_per_tok':8,'moe_intermediate_size':32,"
     "'n_shared_experts':1,'n_group':8,'topk_group':4,'routed_scaling_factor':2.5,'norm_topk_prob':true"},
    {"kimi-k2", "'kimi_k2','n_routed_experts':384,'num_experts_per_tok':8,'moe_intermediate_size':32,"
     "'n_shared_experts':1,'n_group':1,'topk_group':1,'routed_scaling_factor':2.827,'norm_topk_prob':true"},
    {"glm-4.5", "'glm4_moe','n_routed_experts':160,'num_experts_per_tok':8,'moe_intermediate_size':32,"
     "'n_shared_experts':1,'n_group':1,'topk_group':1,'routed_scaling_factor':2.5,'norm_topk_prob':true"},
    {"phi-3.5-moe", "'phimoe','num_local_experts':16,'num_experts_per_tok':2,'intermediate_size':32,"
     "'router_jitter_noise':0.01"},
};
static void check_published(const char *alias, const char *config) {
    char json[700];
    moe_model model;
    moe_model_source source;
    moe_desc want, d, r;
    snprintf(json, sizeof json, "{'hidden_size':16,'num_hidden_layers':1,'hidden_act':'silu','model_type':%s}", config);
    for (char *c = json; *c; c++) if (*c == '\'') *c = '"';
    memset(&source, 0, sizeof source), memset(&d, 0, sizeof d);
    source.file = config_file, source.user = json;
    if (!CHECK_OK(moe_model_open(&model, &source)) || !CHECK_OK(moe_model_desc(&model, 0, &want))) {
        printf("        %s: %s\n", alias, model.about);
        return;
    }
    moe_model_close(&model);
    /* what is not the model's mathematics: sizes, and what only training sees */
    CHECK_OK(moe_desc_system(&d, alias));
    CHECK((d.n_shared > 0) == (want.n_shared > 0));
    d.d_model = want.d_model, d.d_ff = want.d_ff, d.n_experts = want.n_experts, d.top_k = want.top_k;
    d.n_shared = want.n_shared, d.training = want.training, d.n_ranks = want.n_ranks;
    CHECK((d.n_groups > 1) == (want.n_groups > 1) && (d.top_groups > 1) == (want.top_groups > 1));
    d.n_groups = want.n_groups, d.top_groups = want.top_groups;
    d.controller_rate = want.controller_rate, d.switch_load = want.switch_load;
    memset(d.loss, 0, sizeof d.loss), memset(want.loss, 0, sizeof want.loss);
    CHECK_OK(moe_desc_resolve(&d, &r)), CHECK_OK(moe_desc_resolve(&want, &want));
    char mine[4000], theirs[4000];
    moe_desc_json(&r, mine, sizeof mine), moe_desc_json(&want, theirs, sizeof theirs);
    if (!CHECK(!strcmp(mine, theirs))) printf("        %s\n%s\n%s\n", alias, mine, theirs);
}
static void test_aliases(void) {
    size_t n = 0, families = sizeof published / sizeof *published;
    for (const moe_alias *alias; (alias = moe_system_alias(n)) != NULL; n++) {
        moe_desc d = system_desc(alias->name), plain = system_desc(alias->system), r;
        CHECK(moe_system_find(alias->name) == moe_system_find(alias->system) && strlen(alias->name) < 32);
        for (size_t i = 0; i < moe_systems_count(); i++) CHECK(strcmp(alias->name, moe_system_at(i)->name) != 0);
        for (size_t i = 0; i < n; i++) CHECK(strcmp(alias->name, moe_system_alias(i)->name) != 0);
        for (const char *c = alias->mark; *c; c++) CHECK(strchr("PCSKD+", *c) != NULL);
        CHECK((memcmp(&d, &plain, sizeof d) == 0) == !alias->choices[0]);
        if (!CHECK_OK(moe_desc_resolve(&d, &r))) printf("        %s\n", alias->name);
    }
    CHECK(n >= families + 8 && moe_system_alias(n) == NULL);
    for (size_t i = 0; i < families; i++) check_published(published[i].alias, published[i].config);
    char near[200];
    moe_system_near("olmo", near, sizeof near);
    CHECK(!strcmp(near, "olmoe"));
    moe_system_near("gpt_oss", near, sizeof near);
    CHECK(!strcmp(near, "gpt-oss"));
    moe_system_near("qwen", near, sizeof near);
    CHECK(strstr(near, "qwen2-moe") != NULL && strstr(near, "qwen3-next") != NULL);
}

/* ---- gradients ---- */
static double worst_gradient;
static char worst_name[80];

/* The gradients that the layer has against central differences, each tensor relative to its largest entry. At most
 * `most` entries of a tensor are looked at, spread over it. */
static void check_gradients(const char *name, moe_desc d, size_t tokens, moe_side *side, size_t most, double limit) {
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) { printf("        %s\n", name); return; }
    size_t n = tokens * d.d_model;
    float *x = test_floats(n), *y = test_floats(n), *dy = test_floats(n), *dx = test_floats(n);
    test_fill(x, n, -1.5f, 1.5f);
    test_fill(dy, n, -1, 1);
    for (size_t i = 0; i < moe_layer_tensors(m); i++) { /* nothing at 0, and large enough to matter */
        moe_tensor info;
        CHECK_OK(moe_layer_tensor(m, i, &info));
        float *p = test_floats(info.count);
        CHECK_OK(moe_layer_get(m, MOE_PART_PARAMS, info.name, p, info.count));
        int keep = !strcmp(info.name, "router.log_scale") ||
                   (d.expert == MOE_EXPERT_ORTHONORMAL && !strncmp(info.name, "experts", 7));
        for (size_t k = 0; k < info.count && !keep; k++) p[k] = 2 * p[k] + test_uniform(-0.3f, 0.3f);
        CHECK_OK(moe_layer_set(m, MOE_PART_PARAMS, info.name, p, info.count));
        free(p);
    }
    if (side) *moe_layer_side(m) = *side;
    moe_status s = moe_forward(m, x, tokens, y);
    if (!s) s = moe_backward(m, dy, dx);
    if (!CHECK_OK(s)) printf("        %s\n", name);
    if (s) return;
    pipeline *o = pipeline_new(m, x, dy, tokens);
    (void)pipeline_objective(o);
    double top = 1e-3, off = 0;
    for (size_t i = 0; i < n; i++) top = fmax(top, fabs(o->y[i])), off = fmax(off, fabs(o->y[i] - (double)y[i]));
    if (!CHECK_WITHIN(off / top, 0, 4e-6)) printf("        %s: y is off by %.3g of %.3g\n", name, off, top);
    double value[MOE_LOSS_COUNT];
    CHECK_OK(moe_layer_losses(m, value, NULL));
    for (int l = 0; l < MOE_LOSS_COUNT; l++)
        if (!CHECK_WITHIN(fabs(value[l] - o->loss[l]) / fmax(fabs(o->loss[l]), 0.01), 0, 4e-6))
            printf("        %s: loss %s is %.9g, not %.9g\n", name, moe_loss_name((moe_loss_kind)l), value[l],
                   o->loss[l]);
    for (size_t i = 0; i <= o->n_tensors; i++) { /* the last: dx */
        size_t count = i < o->n_tensors ? o->info[i].count : n, step = count / most + 1;
        const char *tensor = i < o->n_tensors ? o->info[i].name : "dx";
        float *g = i < o->n_tensors ? test_floats(count) : dx;
        double *v = i < o->n_tensors ? o->v[i] : o->x;
        if (i < o->n_tensors) CHECK_OK(moe_layer_get(m, MOE_PART_GRADS, tensor, g, count));
        top = 1e-3, off = 0;
        for (size_t k = 0; k < count; k++) top = fmax(top, fabs((double)g[k]));
        for (size_t k = test_below(step); k < count; k += step) {
            if (d.freeze_router == MOE_ON && !strncmp(tensor, "router", 6)) CHECK(g[k] == 0);
            else off = fmax(off, fabs(pipeline_slope(o, v + k, 1e-5) - (double)g[k]));
        }
        if (count == 1) top *= 10; /* the temperature: one sum over all tokens whose terms cancel */
        if (!CHECK_WITHIN(off / top, 0, limit))
            printf("        %s: the gradient of %s is off by %.3g of %.3g\n", name, tensor, off, top);
        if (off / top > worst_gradient) {
            worst_gradient = off / top;
            snprintf(worst_name, sizeof worst_name, "%s, %s", name, tensor);
        }
        if (i < o->n_tensors) free(g);
    }
    pipeline_free(o);
    free(x), free(y), free(dy), free(dx);
    moe_layer_free(m);
}

#define GRADIENT_LIMIT 1e-5 /* float32 against double, of the tensor's largest: some 100 roundings of 6e-8 */
enum { MOST = TEST_SANITIZED ? 3 : 12 };

static void test_gradients(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        moe_desc d = system_desc(name);
        test_seed = i + 1; /* a row's numbers do not depend on the rows before */
        for (int l = 0; l < MOE_LOSS_COUNT; l++) /* weights that show */
            if (d.loss[l] > 0) d.loss[l] = l == MOE_LOSS_SIMBAL ? 0.05f : 0.3f;
        d.controller = MOE_CONTROL_NONE;
        float previous[T * 8], d_previous[T * 8] = {0};
        moe_side side;
        memset(&side, 0, sizeof side);
        test_fill(previous, T * 8, -1, 1);
        if (d.residual == MOE_ON) side.previous = previous, side.d_previous = d_previous;
        check_gradients(name, d, T, &side, MOST, GRADIENT_LIMIT);
        side.evaluate = 1; /* what a system does without its noise */
        check_gradients(name, d, T, &side, MOST / 4 + 1, GRADIENT_LIMIT);
    }
    printf("    largest error of a gradient: %.2g of its tensor's largest (%s)\n", worst_gradient, worst_name);
}

/* Choices that no row combines, and the losses that need something of the layer. */
static void test_more_gradients(void) {
    static const char *const mixes[] = {
        "score=unit loss.simbal=0.05",
        "score=mlp bias=true n_shared=2",
        "score=projected d_router=5 gate=softmax-selected jitter=0.2 top_k=3",
        "score=prototype d_router=20 gate=sigmoid normalize=true weight_scale=2.5",
        "score=normed noise=learned loss.load=0.2 loss.importance-selected=0.2",
        "noise=gaussian noise_std=0.5 loss.load=0.2",
        "noise=gumbel noise_std=0.3 gate=sigmoid",
        "noise=uniform route_sequence=true jitter=0.1",
        "score=cosine combine=soft select=all soft_slots=3 learn_temperature=true n_shared=1 loss.switch=0.3",
        "score=mlp combine=soft select=all temperature=0.5",
        "combine=merge select=all n_shared=1 bias=true learn_temperature=true",
        "combine=robust top_k=5 bias=true n_shared=1 gate=sigmoid",
        "combine=input top_k=1 n_shared=1 gate=sigmoid", "combine=input top_k=3 bias=true expert_norm=true",
        "combine=input gate=sigmoid normalize=true capacity_factor=0.7 expert=swiglu-clamped bias=true",
        "n_zero=2 n_copy=1 n_constant=3 top_k=4 capacity_factor=0.75 residual=true",
        "learn_temperature=true temperature=0.3 gate=softmax normalize=false loss.z=0.1",
        "learn_temperature=true gate=softmax-selected top_k=4",
        "gate=relu select=threshold threshold=0.1 n_shared=1 bias=true",
        "select=top-p top_p=0.6 normalize=true bias=true",
        "expert=orthonormal loss.orthonormal=0.1 bias=true",
        "score=subspace expert=orthonormal gate=sigmoid threshold=0.5 loss.orthonormal=0.2",
        "loss.output-orthogonality=0.2 top_k=3 bias=true n_shared=1",
        "loss.output-orthogonality=0.2 capacity_factor=0.5 top_k=2",
        "n_codes=9 loss.codebook=0.3 bias=true n_shared=1 capacity_factor=0.5",
        "gate=sigmoid loss.sequence=0.5 normalize=true",
        "gate=relu select=threshold loss.sequence=0.5",
        "loss.oracle=0.4",
        "capacity_factor=0.5 capacity_order=weight random_second=true top_k=3",
        "random_second=true top_k=3 normalize_late=true", "random_second=true top_k=3 gate=softmax-selected",
        "random_second=true top_k=3 gate=sigmoid n_zero=1",
        "gate=sparsemixer select=sampled top_k=3 mask_jitter=0.5 n_shared=1",
        "select=sinkhorn top_k=2 gate=sigmoid",
        "n_ranks=4 gate_drop=1 top_k=2",
        "n_ranks=4 gate_drop=1 gate_drop_experts=true n_shared=1",
        "random_steps=5",
        "expert_drop=0.3 combine=merge select=all",
        "router_bias=true gate=softmax-selected expert=relu loss.z=0.1",
        "router_bias=true score=cosine combine=soft select=all soft_slots=2",
        "router_bias=false score=mlp",
        "shared_gate=true n_shared=1 bias=true expert=gelu",
        "shared_gate=true n_shared=2 n_constant=2 n_zero=1 top_k=3",
        "shared_gate=true n_shared=1 loss.output-orthogonality=0.2 bias=true",
        "shared_gate=true n_shared=1 combine=merge select=all",
        "shared_gate=true n_shared=2 combine=soft select=all",
        "shared_gate=true n_shared=2 n_codes=9 loss.codebook=0.3 bias=true",
        "shared_gate=true n_shared=1 combine=robust top_k=3",
        "expert=gelu-tanh bias=true n_shared=1",
        "expert=geglu-tanh",
        "expert=swiglu-clamped bias=true router_bias=true gate=softmax-selected",
        "expert=swiglu-clamped combine=merge select=all",
        "score=tanh bias=true",
        "capacity_factor=0.5 capacity_sequence=true capacity_order=weight top_k=3",
        "capacity_factor=0.6 capacity_round=nearest min_capacity=3 capacity_order=pair top_k=3",
        "select=gumbel top_k=3 gate=softmax loss.switch=0.3",
        "score=half-cosine loss.switch=0.3 router_bias=true",
        "score=half-cosine d_router=3 gate=sigmoid learn_temperature=true",
        "score=half-cosine combine=soft select=all soft_slots=2 route_sequence=false",
        "score=tanh d_router=5 router_bias=true gate=sigmoid jitter=0.1",
        "input_scale=0.5 n_copy=1 n_constant=2 n_shared=1 top_k=3 shared_gate=true",
        "input_scale=3 combine=soft select=all soft_slots=2 n_shared=1",
        "input_scale=3 route_sequence=true",
        "expert_norm=true bias=true n_shared=1 expert=relu",
        "expert_norm=true input_scale=2 combine=merge select=all",
        "expert_norm=true combine=robust top_k=3 n_zero=0 noise=gaussian"};
    for (size_t i = 0; i < sizeof mixes / sizeof *mixes; i++) {
        moe_desc d;
        size_t at;
        moe_side side;
        int32_t teacher[T];
        memset(&d, 0, sizeof d);
        memset(&side, 0, sizeof side);
        d.d_model = D, d.d_ff = F, d.n_experts = 8, d.sequence = 5, d.seed = i + 1;
        test_seed = i + 100;
        for (size_t t = 0; t < T; t++) teacher[t] = (int32_t)test_below(8);
        side.teacher = teacher;
        if (!CHECK_OK(moe_desc_parse(&d, mixes[i], &at))) printf("        %s at %zu\n", mixes[i], at);
        check_gradients(mixes[i], d, T, &side, MOST / 2, GRADIENT_LIMIT);
    }
    printf("    largest error of a gradient: %.2g of its tensor's largest (%s)\n", worst_gradient, worst_name);
}

/* the gradient by the logits of the layer before */
static void test_residual_gradient(void) {
    moe_desc d = system_desc("moe++");
    float x[T * D], y[T * D], dy[T * D], previous[T * 8], g[T * 8] = {0};
    moe_layer *m = NULL;
    d.normalize = MOE_ON, d.loss[MOE_LOSS_SWITCH] = 0;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    test_fill(x, T * D, -1, 1), test_fill(dy, T * D, -1, 1), test_fill(previous, T * 8, -1, 1);
    moe_layer_side(m)->previous = previous, moe_layer_side(m)->d_previous = g;
    CHECK_OK(moe_forward(m, x, T, y));
    CHECK_OK(moe_backward(m, dy, NULL));
    pipeline *o = pipeline_new(m, x, dy, T);
    (void)pipeline_objective(o);
    for (size_t k = 0; k < T * 8; k += 5) { /* previous is read as float: a step that float can hold */
        float keep = previous[k];
        const float h = 0x1p-10f;
        previous[k] = keep + h;
        double up = pipeline_objective(o);
        previous[k] = keep - h;
        double down = pipeline_objective(o);
        previous[k] = keep;
        CHECK_WITHIN(g[k], (up - down) / (2 * (double)h), 6e-7);
    }
    pipeline_free(o);
    moe_layer_free(m);
}

/* ---- every row trains, with the same bits everywhere ---- */
static uint64_t train(const char *name, size_t threads, int steps, double *first, double *last) {
    moe_desc d = system_desc(name);
    moe_layer *m = NULL;
    enum { N = 64 };
    static float x[N * D], y[N * D], dy[N * D];
    uint64_t hash = 0;
    d.parallel.n_threads = threads;
    d.schedule_steps = d.schedule_steps ? (uint64_t)steps / 2 : 0;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return 0;
    for (int step = 0; step < steps; step++) {
        double loss = 0;
        CHECK_OK(moe_rand_uniform(5, (uint64_t)(step % 4), N * D, -1, 1, x));
        /* tokens have a mean, or a ReLU router could not be sparse */
        for (size_t t = 0; t < N; t++) x[t * D + D - 1] = 1;
        moe_status s = moe_forward(m, x, N, y);
        for (size_t i = 0; i < N * D; i++) { /* each class of tokens (the sign of its first number) has its own map */
            float want = x[i / D * D] > 0 ? x[i] : -x[i / D * D + (i + 1) % D];
            float error = y[i] - want;
            loss += (double)error * (double)error / (N * D);
            dy[i] = 2 * error / (N * D) * 10;
        }
        if (!s) s = moe_backward(m, dy, NULL);
        if (!s) s = moe_step(m, 0.01f);
        if (!CHECK_OK(s)) { printf("        %s\n", name); break; }
        if (first && !step) *first = loss;
        /* the lowest: a controller may go too far before it comes back */
        if (last && (!step || loss < *last)) *last = loss;
    }
    hash = moe_hash(moe_layer_hash(m), y, sizeof y);
    moe_layer_free(m);
    return hash;
}

static void test_rows_train(void) {
    for (size_t i = 0; i < moe_systems_count(); i++) {
        double first = 0, last = 0;
        train(moe_system_at(i)->name, 2, TEST_SANITIZED ? 20 : 80, &first, &last);
        if (!CHECK(last < (TEST_SANITIZED ? 0.95 : 0.8) * first))
            printf("        %s: loss %.4f, then %.4f\n", moe_system_at(i)->name, first, last);
    }
}

static void test_same_bits(void) {
    int steps = TEST_SANITIZED ? 4 : 20;
    for (size_t i = 0; i < moe_systems_count(); i++) {
        const char *name = moe_system_at(i)->name;
        uint64_t want = train(name, 1, steps, NULL, NULL);
        FOR_EACH_ISA(isa)
            for (size_t threads = 1; threads <= 3; threads++)
                if (!CHECK(train(name, threads, steps, NULL, NULL) == want))
                    printf("        %s, %s, %zu threads\n", name, moe_isa_name(isa), threads);
    }
}

int main(void) {
    RUN(test_table);
    RUN(test_parse);
    RUN(test_aliases);
    RUN(test_gradients);
    RUN(test_more_gradients);
    RUN(test_residual_gradient);
    RUN(test_rows_train);
    RUN(test_same_bits);
    return test_end();
}

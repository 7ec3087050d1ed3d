/* A desc: defaults, every field out of range, JSON. */
#include "test.h"

#include <limits.h>

static moe_desc small_desc(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = 4, d.d_ff = 6, d.n_experts = 3, d.top_k = 2;
    return d;
}

/* ---- desc ---- */
static void test_desc_defaults(void) {
    moe_desc d, r;
    memset(&d, 0, sizeof d);
    CHECK_STATUS(moe_desc_resolve(&d, &r), MOE_E_D_MODEL);
    d.d_model = 10;
    CHECK_OK(moe_desc_resolve(&d, &r));
    CHECK(r.d_model == 10 && r.d_ff == 40 && r.n_experts == 8 && r.top_k == 2 && r.n_shared == 0);
    CHECK(r.score == MOE_SCORE_LINEAR && r.gate == MOE_GATE_SOFTMAX && r.select == MOE_SELECT_TOP_K &&
          r.expert == MOE_EXPERT_SWIGLU);
    CHECK(r.capacity_round == MOE_ROUND_SHARE && r.min_capacity == 1);
    CHECK(r.capacity_order == MOE_ORDER_TOKEN && r.optimizer == MOE_OPTIMIZER_ADAMW && r.training == MOE_ON);
    CHECK(r.normalize == MOE_ON && r.bias == MOE_OFF && r.temperature == 1 && !(r.capacity_factor > 0) &&
          !(r.clip_norm > 0));
    CHECK(r.beta1 == 0.9f && r.beta2 == 0.999f && r.epsilon == 1e-8f && r.momentum == 0.9f && r.weight_decay == 0.01f &&
          r.seed == 1);
    d.n_experts = 1;
    CHECK_OK(moe_desc_resolve(&d, &r));
    CHECK(r.top_k == 1 && r.normalize == MOE_OFF);
}

static int same_desc(const moe_desc *a, const moe_desc *b) {
    int same = a->d_model == b->d_model && a->d_ff == b->d_ff && a->n_experts == b->n_experts && a->top_k == b->top_k;
    same &= a->n_shared == b->n_shared && a->score == b->score && a->gate == b->gate && a->select == b->select;
    same &= a->expert == b->expert && a->capacity_order == b->capacity_order && a->normalize == b->normalize &&
            a->bias == b->bias;
    same &= test_bits(a->temperature) == test_bits(b->temperature) &&
            test_bits(a->capacity_factor) == test_bits(b->capacity_factor);
    for (int l = 0; l < MOE_LOSS_COUNT; l++) same &= test_bits(a->loss[l]) == test_bits(b->loss[l]);
    same &= a->training == b->training && a->optimizer == b->optimizer && test_bits(a->beta1) == test_bits(b->beta1);
    same &= test_bits(a->beta2) == test_bits(b->beta2) && test_bits(a->epsilon) == test_bits(b->epsilon);
    same &=
        test_bits(a->momentum) == test_bits(b->momentum) && test_bits(a->weight_decay) == test_bits(b->weight_decay);
    same &= test_bits(a->clip_norm) == test_bits(b->clip_norm) && a->seed == b->seed &&
            a->alloc_context == b->alloc_context;
    same &= a->parallel.run == b->parallel.run && a->parallel.user == b->parallel.user;
    return same && a->parallel.n_threads == b->parallel.n_threads;
}

static void test_desc_resolve_is_idempotent(void) {
    int resolved = 0;
    for (int i = 0; i < 1500; i++) {
        moe_desc d = small_desc(), once, twice;
        static const float value[] = {0, MOE_OFF, 0.5f, 0.25f};
        d.d_ff = test_below(3) * 7, d.n_experts = test_below(2) * 5, d.top_k = test_below(3),
        d.n_shared = test_below(3);
        d.score = (moe_score_kind)test_below(MOE_SCORE_COUNT), d.gate = (moe_gate_kind)test_below(MOE_GATE_COUNT);
        d.select = (moe_select_kind)test_below(MOE_SELECT_COUNT),
        d.expert = (moe_expert_kind)test_below(MOE_EXPERT_COUNT);
        d.capacity_order = (moe_order_kind)test_below(MOE_ORDER_COUNT),
        d.optimizer = (moe_optimizer_kind)test_below(MOE_OPTIMIZER_COUNT);
        d.normalize = (int)test_below(3) - 1, d.bias = (int)test_below(3) - 1, d.training = (int)test_below(3) - 1;
        d.temperature = test_below(2) ? 0 : 2, d.capacity_factor = value[test_below(4)];
        for (int l = 0; l <= MOE_LOSS_IMPORTANCE; l++) d.loss[l] = value[test_below(4)];
        d.beta1 = value[test_below(4)], d.beta2 = value[test_below(4)], d.momentum = value[test_below(4)];
        d.weight_decay = value[test_below(4)], d.clip_norm = value[test_below(4)],
        d.epsilon = test_below(2) ? 0 : 1e-6f;
        d.seed = test_below(3), d.parallel.n_threads = test_below(4), d.alloc_context = &d;
        moe_status fits = moe_desc_resolve(&d, &once); /* not every choice goes with every other */
        CHECK(!fits || moe_status_kind(fits) == MOE_KIND_ARGUMENT || moe_status_kind(fits) == MOE_KIND_SUPPORT);
        if (fits) continue;
        resolved++;
        CHECK_OK(moe_desc_resolve(&once, &twice));
        CHECK(same_desc(&once, &twice));
        CHECK(once.alloc_context == &d && once.parallel.n_threads == d.parallel.n_threads);
        CHECK_OK(moe_desc_resolve(&d, &d)); /* in place */
        d.alloc_context = once.alloc_context;
        CHECK(same_desc(&once, &d));
        CHECK(d.weight_decay == (float)MOE_OFF || d.weight_decay > 0); /* off stays off */
    }
    CHECK(resolved > 100);
}

/* Each bad value gives `want` from every function that takes a desc, and none of them touches its result. */
static void bad_desc(const moe_desc *d, moe_status want) {
    size_t bytes = 77;
    moe_layer *m = NULL;
    moe_tape *t = NULL;
    static float memory[4096];
    moe_desc out = small_desc(), keep = out;
    CHECK_STATUS(moe_desc_resolve(d, &out), want);
    CHECK(same_desc(&out, &keep));
    CHECK_STATUS(moe_layer_size(d, &bytes), want);
    CHECK_STATUS(moe_layer_new(&m, d), want);
    CHECK_STATUS(moe_layer_init(&m, d, memory, sizeof memory), want);
    CHECK_STATUS(moe_tape_size(d, 3, MOE_ON, &bytes), want);
    CHECK_STATUS(moe_tape_new(&t, d, 3, MOE_ON), want);
    CHECK_STATUS(moe_tape_init(&t, d, 3, MOE_ON, memory, sizeof memory), want);
    CHECK_STATUS(moe_experts_count(d, &bytes), want);
    moe_expert_weights none = {NULL, NULL, NULL, NULL, NULL, NULL};
    moe_expert_arrays nowhere = {NULL, NULL, NULL, NULL, NULL, NULL};
    CHECK_STATUS(moe_expert_pack(d, 0, &none, memory), want);
    CHECK_STATUS(moe_expert_unpack(d, 0, memory, &nowhere), want);
    CHECK_STATUS(moe_router_count(d, &bytes), want);
    CHECK(m == NULL && t == NULL && bytes == 77);
    CHECK(test_live_blocks == 0);
}

#define BAD(field, value, status) do { moe_desc x = small_desc(); x.field = value; bad_desc(&x, status); } while (0)

static void test_desc_fields(void) {
    bad_desc(NULL, MOE_E_NULL_DESC);
    BAD(d_model, 0, MOE_E_D_MODEL);
    BAD(n_experts, ((size_t)1 << 20) + 1, MOE_E_N_EXPERTS);
    BAD(n_experts, SIZE_MAX, MOE_E_N_EXPERTS);
    BAD(top_k, 4, MOE_E_TOP_K);
    BAD(top_k, SIZE_MAX, MOE_E_TOP_K);
    static const int past[] = {-1, 50, INT_MAX, INT_MIN};
    for (int i = 0; i < 4; i++) {
        BAD(score, (moe_score_kind)past[i], MOE_E_SCORE);
        BAD(gate, (moe_gate_kind)past[i], MOE_E_GATE);
        BAD(select, (moe_select_kind)past[i], MOE_E_SELECT);
        BAD(expert, (moe_expert_kind)past[i], MOE_E_EXPERT);
        BAD(optimizer, (moe_optimizer_kind)past[i], MOE_E_OPTIMIZER);
        BAD(capacity_order, (moe_order_kind)past[i], MOE_E_CAPACITY_ORDER);
        BAD(capacity_round, (moe_round_kind)past[i], MOE_E_CAPACITY_ROUND);
        int odd = i == 0 ? 2 : i == 1 ? -2 : past[i];
        BAD(normalize, odd, MOE_E_NORMALIZE);
        BAD(bias, odd, MOE_E_BIAS);
        BAD(training, odd, MOE_E_TRAINING);
    }
    BAD(score, MOE_SCORE_COUNT, MOE_E_SCORE);
    BAD(gate, MOE_GATE_COUNT, MOE_E_GATE);
    BAD(select, MOE_SELECT_COUNT, MOE_E_SELECT);
    BAD(expert, MOE_EXPERT_COUNT, MOE_E_EXPERT);
    BAD(optimizer, MOE_OPTIMIZER_COUNT, MOE_E_OPTIMIZER);
    BAD(capacity_order, MOE_ORDER_COUNT, MOE_E_CAPACITY_ORDER);
    BAD(capacity_round, MOE_ROUND_COUNT, MOE_E_CAPACITY_ROUND);
    static const float wrong[] = {-0.5f, -2, NAN, INFINITY, -INFINITY, 1, 1.5f};
    for (int i = 0; i < 7; i++) {
        BAD(beta1, wrong[i], MOE_E_BETA1);
        BAD(beta2, wrong[i], MOE_E_BETA2);
        BAD(momentum, wrong[i], MOE_E_MOMENTUM);
        if (i >= 5) continue; /* the others may be 1 and more */
        BAD(temperature, wrong[i], MOE_E_TEMPERATURE);
        BAD(capacity_factor, wrong[i], MOE_E_CAPACITY_FACTOR);
        for (int l = 0; l < MOE_LOSS_COUNT; l++) BAD(loss[l], wrong[i], MOE_E_LOSS);
        BAD(epsilon, wrong[i], MOE_E_EPSILON);
        BAD(weight_decay, wrong[i], MOE_E_WEIGHT_DECAY);
        BAD(clip_norm, wrong[i], MOE_E_CLIP_NORM);
    }
    BAD(temperature, MOE_OFF, MOE_E_TEMPERATURE); /* has no off */
    BAD(epsilon, MOE_OFF, MOE_E_EPSILON);
    moe_desc d = small_desc();
    CHECK_STATUS(moe_desc_resolve(&d, NULL), MOE_E_NULL_OUT);
}

/* Descs as text over 8 experts: what a loss needs, and what no address reaches though every field is in its range. */
static void test_desc_texts(void) {
    static const struct { const char *text; moe_status status; } rows[] = {
        {"score=cosine loss.prototype-alignment=0.1", MOE_OK}, {"score=projected loss.prototype-alignment=0.1", MOE_OK},
        {"score=prototype loss.prototype-alignment=0.1", MOE_OK},
        {"loss.prototype-alignment=0.1", MOE_E_LOSS_PROTOTYPE_ALIGNMENT},
        {"score=cosine noise=gaussian loss.prototype-alignment=0.1", MOE_E_LOSS_PROTOTYPE_ALIGNMENT},
        {"score=cosine combine=soft select=all loss.prototype-alignment=0.1", MOE_E_LOSS_PROTOTYPE_ALIGNMENT},
        {"n_ranks=4 loss.rank=0.1", MOE_OK}, {"loss.rank=0.1", MOE_E_LOSS_RANK}, {"n_ranks=3 loss.rank=0.1",
        MOE_E_LOSS_RANK}, {"loss.output-orthogonality=0.1", MOE_OK},
        {"n_zero=1 loss.output-orthogonality=0.1", MOE_E_LOSS_OUTPUT_ORTHOGONALITY},
        {"combine=robust loss.output-orthogonality=0.1", MOE_E_LOSS_OUTPUT_ORTHOGONALITY},
        {"score=subspace expert=orthonormal d_ff=2", MOE_OK}, {"score=subspace", MOE_E_SUBSPACE},
        {"score=subspace expert=orthonormal d_ff=2 n_zero=1", MOE_E_SUBSPACE},
        {"score=subspace expert=orthonormal d_ff=2 n_copy=1", MOE_E_SUBSPACE},
        {"score=subspace expert=orthonormal d_ff=2 n_constant=1", MOE_E_SUBSPACE}};
    static const char *const large[] = {
        "score=mlp d_model=1099511627776 d_ff=1 d_router=1099511627776", /* 2^40: the projection's d_model d_router */
        "score=mlp d_model=1073741824 d_ff=1 d_router=268435456", "score=mlp d_router=9007199254740992",
        "d_model=1073741824 d_ff=268435456", "expert=relu d_model=1 d_ff=4503599627370496",
        "n_experts=1048576 d_model=1048576 d_ff=1048576",
        "score=mlp n_experts=1048576 d_model=1 d_ff=1 d_router=1099511627776"};
    moe_desc d, r;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        d = small_desc(), d.n_experts = 8;
        CHECK_OK(moe_desc_parse(&d, rows[i].text, NULL));
        if (!CHECK_STATUS(moe_desc_resolve(&d, &r), rows[i].status)) printf("        %s\n", rows[i].text);
    }
    for (size_t i = 0; i < sizeof large / sizeof *large && sizeof(size_t) == 8; i++) {
        d = small_desc(), d.n_experts = 8, d.top_k = 1;
        CHECK_OK(moe_desc_parse(&d, large[i], NULL));
        if (!CHECK_STATUS(moe_desc_resolve(&d, &r), MOE_E_OVERFLOW)) printf("        %s\n", large[i]);
    }
}
/* A tape fits a layer if all that decides on its memory is the same. */
static void test_tape_fits(void) {
    static const struct { const char *text; int fits; } rows[] = {
        {"", 1}, {"seed=9 temperature=2 loss.z=0.1", 1}, {"n_zero=1", 0}, {"jitter=0.1", 0}, {"expert_norm=true", 0},
        {"input_scale=2", 0}, {"loss.output-orthogonality=0.1", 0}, {"top_k=3", 0}, {"d_ff=7", 0}, {"bias=true", 0}};
    moe_desc d = small_desc();
    moe_layer *m = NULL;
    float x[4] = {1, 2, 3, 4}, y[4];
    CHECK_OK(moe_layer_new(&m, &d));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        moe_tape *t = NULL;
        d = small_desc();
        CHECK_OK(moe_desc_parse(&d, rows[i].text, NULL));
        CHECK_OK(moe_tape_new(&t, &d, 1, MOE_ON));
        if (!CHECK_STATUS(moe_forward_tape(m, t, x, 1, y), rows[i].fits ? MOE_OK : MOE_E_TAPE_DESC))
            printf("        %s\n", rows[i].text);
        moe_tape_free(t);
    }
    moe_layer_free(m);
    for (int other = 0; other < 2; other++) { /* the latent row's width; a loss on the experts themselves */
        moe_tape *t = NULL;
        d = small_desc(), d.n_experts = 8;
        CHECK_OK(moe_desc_parse(&d, other ? "expert=orthonormal d_ff=2" : "score=mlp d_router=8", NULL));
        CHECK_OK(moe_layer_new(&m, &d));
        CHECK_OK(moe_desc_parse(&d, other ? "loss.orthonormal=0.1" : "d_router=4", NULL));
        CHECK_OK(moe_tape_new(&t, &d, 1, MOE_ON));
        CHECK_STATUS(moe_forward_tape(m, t, x, 1, y), MOE_E_TAPE_DESC);
        moe_tape_free(t);
        moe_layer_free(m);
    }
}
static void test_desc_json(void) {
    moe_desc d = small_desc();
    char text[3000], part[3000];
    size_t n = moe_desc_json(&d, text, sizeof text);
    CHECK(moe_desc_json(NULL, text, 10) == 0);
    n = moe_desc_json(&d, text, sizeof text);
    CHECK(n > 20 && n < sizeof text && strlen(text) == n && text[0] == '{' && text[n - 1] == '}');
    CHECK(strstr(text, "\"d_model\":4") != NULL && strstr(text, "\"top_k\":2") != NULL);
    CHECK(moe_desc_json(&d, NULL, 0) == n);
    moe_desc garbage = d;
    garbage.gate = MOE_GATE_COUNT, garbage.bias = 7; /* JSON all the same */
    moe_desc_json(&garbage, part, sizeof part);
    CHECK(strstr(part, "\"gate\":\"unknown\"") != NULL && strstr(part, "\"bias\":null") != NULL);
    CHECK_STATUS(moe_desc_set(&d, "gate", NULL), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_desc_set(&d, NULL, "relu"), MOE_E_NULL_NAME);
    for (size_t size = 1; size <= n + 1; size++) {
        memset(part, '#', sizeof part);
        CHECK(moe_desc_json(&d, part, size) == n);
        CHECK(part[size] == '#' && strlen(part) == (size - 1 < n ? size - 1 : n) && !memcmp(part, text, strlen(part)));
    }
}

/* ---- systems ---- */
#include "rows.h"

/* ---- fields of the desc out of range: each its own status, whose field is the one that is wrong ---- */
static void bad_field(const moe_desc *d, const char *field, moe_status want) {
    moe_desc r, before;
    moe_layer *m = NULL;
    memset(&r, 0x5a, sizeof r);
    memcpy(&before, &r, sizeof r);
    moe_status s = moe_desc_resolve(d, &r);
    if (!CHECK_STATUS(s, want)) printf("        %s\n", field);
    CHECK(!memcmp(&r, &before, sizeof r)); /* nothing was written */
    if (!CHECK(strstr(moe_status_field(s), field) != NULL)) printf("        %s: \"%s\"\n", field, moe_status_field(s));
    CHECK_STATUS(moe_layer_new(&m, d), want);
    CHECK(m == NULL);
}

static void test_fields(void) {
    static const struct { const char *field, *text; moe_status status; } by_text[] = {
        {"n_zero", "n_zero=8", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_zero=3 n_copy=3 n_constant=2", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_zero=18446744073709551615 n_copy=1", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_copy=1 combine=robust", MOE_E_SPECIAL_EXPERTS},
        {"n_zero", "n_zero=1 combine=input", MOE_E_SPECIAL_EXPERTS},
        {"soft_slots", "soft_slots=2 combine=input", MOE_E_SOFT_SLOTS},
        {"n_zero", "n_constant=1 combine=merge select=all", MOE_E_SPECIAL_EXPERTS},
        {"n_ranks", "n_ranks=9", MOE_E_N_RANKS}, {"d_ff", "expert=orthonormal d_ff=16", MOE_E_D_FF},
        {"score", "score=subspace", MOE_E_SUBSPACE},
        {"score", "score=subspace expert=orthonormal n_copy=1", MOE_E_SUBSPACE},
        {"d_model", "score=slice d_model=12", MOE_E_SLICE}, {"gate", "gate=sparsemixer", MOE_E_GATE_SELECT},
        {"gate", "select=sampled", MOE_E_GATE_SELECT},
        {"gate", "gate=sign", MOE_E_GATE_SELECT}, {"select", "combine=soft", MOE_E_SELECT_COMBINE},
        {"select", "combine=merge", MOE_E_SELECT_COMBINE},
        {"gate", "combine=merge select=all gate=sigmoid", MOE_E_COMBINE_GATE},
        {"score", "combine=soft select=all score=hash", MOE_E_COMBINE_SCORE},
        {"noise", "combine=soft select=all noise=gaussian", MOE_E_COMBINE_NOISE},
        {"capacity_factor", "combine=soft select=all capacity_factor=1", MOE_E_COMBINE_CAPACITY},
        {"capacity_factor", "combine=merge select=all capacity_factor=1", MOE_E_COMBINE_CAPACITY},
        {"capacity_factor", "combine=merge select=all capacity_factor_eval=1", MOE_E_COMBINE_CAPACITY},
        {"route_sequence", "combine=merge select=all route_sequence=false", MOE_E_ROUTE_SEQUENCE},
        {"route_sequence", "combine=soft select=all route_sequence=true", MOE_E_ROUTE_SEQUENCE},
        {"residual", "combine=soft select=all residual=true", MOE_E_RESIDUAL},
        {"n_codes", "n_codes=7", MOE_E_N_CODES}, {"n_codes", "n_codes=8 jitter=0.1", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 combine=robust", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 n_zero=1", MOE_E_N_CODES}, {"n_codes", "n_codes=8 n_copy=1", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 n_constant=1", MOE_E_N_CODES},
        {"n_codes", "n_codes=8 route_sequence=true", MOE_E_N_CODES},
        {"expert_norm", "expert_norm=true n_copy=1", MOE_E_EXPERT_NORM},
        {"expert_norm", "expert_norm=true n_constant=1", MOE_E_EXPERT_NORM},
        {"expert_norm", "expert_norm=true n_codes=8", MOE_E_EXPERT_NORM},
        {"expert_norm", "expert_norm=true combine=soft select=all", MOE_E_EXPERT_NORM},
        {"input_scale", "input_scale=2 n_codes=8", MOE_E_INPUT_SCALE},
        {"sparse_step", "sparse_step=true n_codes=8", MOE_E_SPARSE_STEP},
        {"sparse_step", "sparse_step=true expert=orthonormal", MOE_E_SPARSE_STEP},
        {"n_bound", "n_bound=1 score=hash", MOE_E_N_BOUND}, {"n_bound", "n_bound=1 n_codes=8", MOE_E_N_BOUND},
        {"n_bound", "n_bound=1 combine=soft select=all", MOE_E_N_BOUND},
        {"n_bound", "n_bound=1 combine=merge select=all", MOE_E_N_BOUND},
        {"n_bound", "n_bound=8 n_zero=1", MOE_E_N_BOUND},
        {"router_bias", "router_bias=true score=hash", MOE_E_ROUTER_BIAS},
        {"shared_gate", "shared_gate=true", MOE_E_SHARED_GATE}, {"temperature", "temperature=1e-40", MOE_E_TEMPERATURE},
        {"temperature_end", "temperature_end=1e-40 schedule_steps=5", MOE_E_TEMPERATURE_END},
        {"soft_slots", "soft_slots=2", MOE_E_SOFT_SLOTS},
        {"soft_slots", "combine=soft select=all soft_slots=131073", MOE_E_SOFT_SLOTS},
        {"n_groups", "n_groups=3", MOE_E_GROUPS},
        {"n_groups", "n_groups=512 n_experts=512", MOE_E_GROUPS},
        {"top_groups", "n_groups=4 top_groups=5", MOE_E_TOP_GROUPS},
        {"top_groups", "select=groups n_groups=8 top_groups=1 top_k=2", MOE_E_TOP_GROUPS},
        {"top_k_min", "top_k_min=3 schedule_steps=5", MOE_E_TOP_K_MIN},
        {"top_k_min", "top_k_min=1", MOE_E_TOP_K_MIN}, {"temperature_end", "temperature_end=2", MOE_E_TEMPERATURE_END},
        {"gate_drop", "gate_drop=0.3 select=sinkhorn", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=auction", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=sampled gate=sparsemixer", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=all combine=soft", MOE_E_GATE_DROP},
        {"gate_drop", "gate_drop=0.3 select=all combine=merge", MOE_E_GATE_DROP},
        {"top_k", "select=auction top_k=2", MOE_E_ONE_CHOICE},
        {"controller", "controller=relu-lambda", MOE_E_CONTROLLER},
        {"controller", "controller=relu-lambda gate=relu", MOE_E_CONTROLLER},
        {"controller", "controller=adaptive", MOE_E_CONTROLLER},
        {"loss.load", "loss.load=1", MOE_E_LOSS_LOAD}, {"loss.codebook", "loss.codebook=1", MOE_E_LOSS_CODEBOOK},
        {"loss.orthonormal", "loss.orthonormal=1", MOE_E_LOSS_ORTHONORMAL},
        {"loss.importance-selected", "loss.importance-selected=1 select=all combine=soft",
         MOE_E_LOSS_IMPORTANCE_SELECTED},
        {"loss.rank", "loss.rank=1", MOE_E_LOSS_RANK},
        {"loss.communication", "loss.communication=1", MOE_E_LOSS_COMMUNICATION},
        {"loss.locality", "loss.locality=1", MOE_E_LOSS_LOCALITY},
        {"loss.relu-l1", "loss.relu-l1=1", MOE_E_LOSS_RELU_L1},
        {"loss.simbal", "loss.simbal=1 score=random", MOE_E_LOSS_SIMBAL},
        {"loss.diverse-simple", "loss.diverse-simple=1 score=random", MOE_E_LOSS_DIVERSE_SIMPLE},
        {"loss.prototype-orthogonality", "loss.prototype-orthogonality=1 score=random",
         MOE_E_LOSS_PROTOTYPE_ORTHOGONALITY},
        {"loss.prototype-diversity", "loss.prototype-diversity=1 score=random", MOE_E_LOSS_PROTOTYPE_DIVERSITY},
        {"loss.prototype-alignment", "loss.prototype-alignment=1", MOE_E_LOSS_PROTOTYPE_ALIGNMENT},
        {"loss.output-orthogonality", "loss.output-orthogonality=1 combine=input", MOE_E_LOSS_OUTPUT_ORTHOGONALITY}};
    for (size_t i = 0; i < sizeof by_text / sizeof *by_text; i++) {
        moe_desc d = row_desc(NULL, by_text[i].text);
        bad_field(&d, by_text[i].field, by_text[i].status);
    }
    static const char *const good[] = {
        "expert_norm=true", "input_scale=2", "sparse_step=true", "n_bound=1 router_bias=true", "n_codes=8",
        "gate_drop=0.3", "shared_gate=true n_shared=1", "temperature_end=2 schedule_steps=5",
        "top_k_min=1 schedule_steps=5", "controller=relu-lambda gate=relu loss.relu-l1=1",
        "controller=adaptive loss.switch=1", "top_k=1 gate=softmax-selected freeze_router=true",
        "select=threshold threshold=off"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) { /* what is left out of a rule */
        moe_desc d = row_desc(NULL, good[i]), resolved;
        if (!CHECK_OK(moe_desc_resolve(&d, &resolved))) printf("        %s\n", good[i]);
    }
    moe_desc none = row_desc(NULL, "");
    size_t at;
    CHECK_STATUS(moe_desc_set(NULL, "top_k", "2"), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_desc_set(&none, NULL, "2"), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_desc_set(&none, "top_k", NULL), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_desc_parse(NULL, "top_k=2", &at), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_desc_parse(&none, NULL, &at), MOE_E_NULL_NAME);
    CHECK_STATUS(moe_desc_parse(&none, "a_name_that_is_longer_than_any_field_or_value_may_be=2", &at), MOE_E_FIELD);
#define BAD_FIELD(member, value, status)                                                                           \
    do {                                                                                                     \
        moe_desc bad_ = row_desc(NULL, "");                                                                  \
        bad_.member = value;                                                                                 \
        bad_field(&bad_, #member, status);                                                                   \
    } while (0)
    BAD_FIELD(capacity_sequence, 2, MOE_E_CAPACITY_SEQUENCE);
    static const int past[] = {-1, -2, 50, 1 << 30};
    for (int i = 0; i < 4; i++) {
        BAD_FIELD(noise, (moe_noise_kind)past[i], MOE_E_NOISE);
        BAD_FIELD(combine, (moe_combine_kind)past[i], MOE_E_COMBINE);
        BAD_FIELD(schedule, (moe_schedule_kind)past[i], MOE_E_SCHEDULE);
        BAD_FIELD(router_init, (moe_init_kind)past[i], MOE_E_ROUTER_INIT);
        BAD_FIELD(controller, (moe_control_kind)past[i], MOE_E_CONTROLLER);
        BAD_FIELD(switch_load, (moe_load_kind)past[i], MOE_E_SWITCH_LOAD);
        int odd = i ? past[i] : 2;
        BAD_FIELD(route_sequence, odd, MOE_E_ROUTE_SEQUENCE);
        BAD_FIELD(freeze_router, odd, MOE_E_FREEZE_ROUTER);
        BAD_FIELD(sparse_step, odd, MOE_E_SPARSE_STEP);
        BAD_FIELD(residual, odd, MOE_E_RESIDUAL);
        BAD_FIELD(learn_temperature, odd, MOE_E_LEARN_TEMPERATURE);
        BAD_FIELD(fallback, odd, MOE_E_FALLBACK);
        BAD_FIELD(random_second, odd, MOE_E_RANDOM_SECOND);
        BAD_FIELD(normalize_late, odd, MOE_E_NORMALIZE_LATE);
        BAD_FIELD(controller_recentre, odd, MOE_E_CONTROLLER_RECENTRE);
        BAD_FIELD(gate_drop_experts, odd, MOE_E_GATE_DROP_EXPERTS);
        BAD_FIELD(zero_output, odd, MOE_E_ZERO_OUTPUT);
    }
    static const float wrong[] = {NAN, INFINITY, -INFINITY, -0.5f, -1, 1, 1.5f};
    for (int i = 0; i < 7; i++) {
        float v = wrong[i];
        if (i != 5) { /* 1 itself is a probability */
            BAD_FIELD(gate_drop, v, MOE_E_GATE_DROP);
            BAD_FIELD(top_p, v, MOE_E_TOP_P);
        }
        BAD_FIELD(expert_drop, v, MOE_E_EXPERT_DROP);
        BAD_FIELD(jitter, v, MOE_E_JITTER);
        if (i >= 5) continue;
        BAD_FIELD(router_gain, v, MOE_E_ROUTER_GAIN);
        BAD_FIELD(noise_std, v, MOE_E_NOISE_STD);
        BAD_FIELD(weight_scale, v, MOE_E_WEIGHT_SCALE);
        BAD_FIELD(mask_jitter, v, MOE_E_MASK_JITTER);
        BAD_FIELD(sinkhorn_epsilon, v, MOE_E_SINKHORN);
        BAD_FIELD(robust_tau, v, MOE_E_ROBUST_TAU);
        BAD_FIELD(controller_rate, v, MOE_E_CONTROLLER_RATE);
        BAD_FIELD(temperature_end, v, MOE_E_TEMPERATURE_END);
        if (i < 3) BAD_FIELD(threshold, v, MOE_E_THRESHOLD);
        if (i == 4) continue; /* MOE_OFF */
        BAD_FIELD(controller_damping, v, MOE_E_CONTROLLER_DAMPING);
        BAD_FIELD(capacity_factor_eval, v, MOE_E_CAPACITY_FACTOR_EVAL);
    }
#undef BAD_FIELD
}

/* ---- the ecology number T H / (O + B), by hand ---- */
static void check_ecology(const char *set, double want) {
    moe_desc d = small_desc();
    if (!CHECK_OK(moe_desc_parse(&d, set, NULL))) return;
    double got = moe_desc_ecology(&d);
    /* the coefficients are floats */
    if (!CHECK(got == want || fabs(got - want) <= 1e-7 * want)) printf("    %s: %.9g, not %.9g\n", set, got, want);
}
static void test_ecology(void) {
    check_ecology("loss.entropy=0.3 loss.oracle=0.25 loss.switch=0.85 temperature=2", 0.6 / 1.1);
    check_ecology("loss.entropy=0.3 loss.oracle=0.25 loss.kl-uniform=0.85", 0.3 / 1.1); /* temperature 1 */
    check_ecology("loss.entropy=0.5 loss.switch=0.1 loss.kl-uniform=0.4", 1.25); /* B: the larger, and no other */
    check_ecology("loss.entropy=0.5 loss.switch=0.8 loss.kl-uniform=0.4", 0.625);
    check_ecology("loss.entropy=0.5 loss.oracle=2 loss.importance=5 loss.z=7 loss.certainty=3", 0.25);
    check_ecology("loss.entropy=off loss.oracle=off loss.switch=off loss.kl-uniform=0.4", 0); /* off is 0 */
    check_ecology("loss.entropy=0.4 loss.oracle=off loss.switch=0.4 loss.kl-uniform=off temperature=0.5", 0.5);
    check_ecology("loss.entropy=0.4 loss.oracle=0.4 loss.switch=off loss.kl-uniform=off", 1);
    check_ecology("loss.entropy=0.4 loss.oracle=off loss.switch=off loss.kl-uniform=off", (double)INFINITY);
    moe_desc d = small_desc();
    CHECK_OK(moe_desc_system(&d, "ecology"));
    CHECK_NEAR(moe_desc_ecology(&d), 0.218 / 0.4, 1e-7); /* as its row says: 0.545 */
    d.top_k = 1000;
    CHECK(isnan(moe_desc_ecology(&d)) && isnan(moe_desc_ecology(NULL)));
}

/* ---- why a desc is refused ---- */
static const char *why(const char *set) {
    static char text[900];
    moe_desc d = small_desc(), r;
    size_t at = 0;
    moe_status status = moe_desc_parse(&d, set, &at);
    if (!status) status = moe_desc_resolve(&d, &r);
    d = small_desc();
    moe_desc before = d;
    size_t n = moe_desc_explain(status, &d, set, text, sizeof text);
    CHECK(n == strlen(text) && same_desc(&d, &before));
    return text;
}
static void test_explain(void) {
    static const char *const cases[][2] = {
        {"topk=2", "topk: no such field; did you mean top_k, top_p?"},
        {"top_k=2 loss.swich=1", "loss.swich: no such field; did you mean loss.switch?"},
        {"zzzzzz=1", "zzzzzz: no such field"},
        {"top_k = 2",
         "top_k: no value, for which write field=value without blanks: must be a whole number, at least 0"},
        {"top_k=-1", "top_k = -1: must be a whole number, at least 0"},
        {"n_experts=2000000", "n_experts = 2000000: must be a whole number, 1 to 1048576"},
        {"top_k=4", "top_k = 4: must be 1 to n_experts (n_experts = 3)"},
        {"gate=relus", "gate = relus: must be one of default, softmax, softmax-selected, sigmoid, relu, sign, "
         "sparsemixer; did you mean relu?"},
        {"bias=yes", "bias = yes: must be one of false, null, true"},
        {"bias=treu", "bias = treu: must be one of false, null, true; did you mean true?"},
        {"capacity_factor=-2", "capacity_factor = -2: must be a number, at least 0, or off"},
        {"capacity_factor=two", "capacity_factor = two: must be a number, at least 0, or off"},
        {"temperature=-1", "temperature = -1: must be a number, at least 0"}, /* has no off */
        {"top_p=1.5", "top_p = 1.5: must be a number, 0 to 1"},
        {"threshold=nan", "threshold = nan: must be a number, or off"},
        {"loss.z=-0.5", "loss.z = -0.5: must be a number, at least 0, or off"},
        {"combine=soft", "select = top-k: must be all for combine = soft and merge (combine = soft)"},
        {"loss.load=1", "loss.load = 1: needs noise = gaussian or learned (noise = none)"},
        {"top_k_min=1",
         "top_k_min = 1: must be at most top_k, and needs schedule_steps (top_k = 2, schedule_steps = 0)"},
        {"score=slice",
         "d_model = 4: must be a multiple of n_experts for score = slice (n_experts = 3, score = slice)"},
        {"d_ff=18446744073709551615", "size: the memory needed does not fit in size_t or an index in 31 bits"},
        {"", "ok"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (!CHECK(!strcmp(why(cases[i][0]), cases[i][1]))) printf("        %s\n", why(cases[i][0]));
    const char *one = why("top_k=1 normalize=true"); /* its sentence names the field itself: not shown again */
    CHECK(!strncmp(one, "normalize = true: ", 18) && !strstr(one + 18, "normalize = ") && strstr(one, "(top_k = 1, "));
}
/* Every field has its message, whatever fields there are: their names are those of the JSON. */
static void test_explain_every_field(void) {
    char json[6000], name[64], text[80], want[80];
    moe_desc d = small_desc();
    size_t fields = 0;
    for (int l = 0; l < MOE_LOSS_COUNT; l++) d.loss[l] = 1;
    CHECK(moe_desc_json(&d, json, sizeof json) < sizeof json);
    for (const char *at = json; (at = strstr(at + 1, "\":")) != NULL; fields++) {
        const char *begin = at;
        while (begin[-1] != '"') begin--;
        snprintf(name, sizeof name, "%.*s", (int)(at - begin), begin);
        snprintf(text, sizeof text, "%s=?", name), snprintf(want, sizeof want, "%s = ?: must be ", name);
        if (!CHECK(!strncmp(why(text), want, strlen(want)))) printf("        %s\n", why(text));
        if (at[2] == '"' && !CHECK(strstr(why(text), "one of ") || strstr(why(text), "or off"))) puts(name);
        snprintf(text, sizeof text, "%.*s=1", (int)strlen(name) - 1, name); /* a letter is missing */
        if (!CHECK(strstr(why(text), "did you mean ") && strstr(why(text), name))) printf("        %s\n", why(text));
    }
    CHECK(fields > 70 + MOE_LOSS_COUNT);
}
static void explains(moe_status status, const moe_desc *d, const char *begin) {
    char text[400];
    moe_desc_explain(status, d, NULL, text, sizeof text);
    if (!CHECK(!strncmp(text, begin, strlen(begin)))) printf("        %s\n", text);
}
static void test_explain_garbage(void) {
    moe_desc wild = small_desc();
    wild.temperature = INFINITY, explains(MOE_E_TEMPERATURE, &wild, "temperature = infinity: ");
    wild.temperature = -INFINITY, explains(MOE_E_TEMPERATURE, &wild, "temperature = -infinity: ");
    wild.gate = (moe_gate_kind)-7, explains(MOE_E_GATE, &wild, "gate = -7: ");
    char text[400], cut[8];
    moe_desc d, r;
    memset(&d, 0x55, sizeof d);
    moe_status status = moe_desc_resolve(&d, &r);
    moe_desc_explain(status, &d, NULL, text, sizeof text);
    CHECK(!strncmp(text, "n_experts = ", 12) && strstr(text, "; was the desc set to {0} before its fields?") != NULL);
    d = small_desc();
    d.gate = (moe_gate_kind)99, d.beta1 = NAN;
    moe_desc_explain(MOE_E_GATE, &d, NULL, text, sizeof text);
    CHECK(!strncmp(text, "gate = 99: must be one of default, ", 35) && strstr(text, "{0}") != NULL);
    CHECK(strstr(text, "beta1") == NULL);
    d.gate = MOE_GATE_RELU;
    moe_desc_explain(MOE_E_BETA1, &d, NULL, text, sizeof text);
    CHECK(!strcmp(text, "beta1 = NaN: must be a number, 0 to 0.99999994, or off"));
    d.beta1 = -INFINITY, d.bias = 7;
    moe_desc_explain(MOE_E_BIAS, &d, NULL, text, sizeof text);
    CHECK(!strcmp(text, "bias = 7: must be one of false, null, true; was the desc set to {0} before its fields?"));
    d = small_desc();
    d.d_model = 0;
    size_t length = strlen("d_model = 0: must be a whole number, at least 1");
    CHECK(moe_desc_explain(MOE_E_D_MODEL, &d, NULL, cut, sizeof cut) == length && !strcmp(cut, "d_model"));
    CHECK(moe_desc_explain(MOE_E_D_MODEL, &d, NULL, NULL, 0) == length);
    d = small_desc(); /* nothing is wrong with it */
    moe_desc_explain(MOE_E_NO_MEMORY, &d, "top_k=1 normalize=false", text, sizeof text);
    CHECK(!strcmp(text, moe_status_string(MOE_E_NO_MEMORY)));
    moe_desc_explain(MOE_E_NULL_DESC, NULL, "top_k=1", text, sizeof text);
    CHECK(!strcmp(text, moe_status_string(MOE_E_NULL_DESC)));
}
static const char *color(void *colors, size_t i) { return ((const char *const *)colors)[i]; }
static void test_near(void) {
    static const char *const colors[] = {"red", "green", "greenish", "blue", "grey", NULL};
    char near[100] = "?", cut[6];
    moe_near("gren", color, (void *)(size_t)colors, near, sizeof near);
    CHECK(!strcmp(near, "green, grey, red")); /* one change, one, two */
    moe_near("green", color, (void *)(size_t)colors, near, sizeof near);
    CHECK(!strcmp(near, "green, greenish")); /* the word itself, and where it is in */
    moe_near("green", color, (void *)(size_t)colors, cut, sizeof cut);
    CHECK(!strcmp(cut, "green"));
    moe_near("rat", color, (void *)(size_t)colors, near, sizeof near);
    CHECK(!strcmp(near, "")); /* red would be two changes of three letters */
    moe_near("orange-yellow", color, (void *)(size_t)colors, near, sizeof near);
    CHECK(!strcmp(near, ""));
    moe_near("", color, (void *)(size_t)colors, near, sizeof near);
    CHECK(!strcmp(near, ""));
    moe_near(NULL, color, (void *)(size_t)colors, near, sizeof near);
    moe_near("x", NULL, NULL, near, sizeof near);
    moe_near("x", color, (void *)(size_t)colors, NULL, 9);
    CHECK(!strcmp(near, ""));
}

/* How often a text stands in another. */
static size_t times(const char *text, const char *word) {
    size_t n = 0;
    while ((text = strstr(text, word)) != NULL) n++, text++;
    return n;
}
static void test_export(void) { /* that it is the plan: tests/contract/compile.sh */
    moe_desc d = small_desc();
    static char text[8192], part[8192];
    d.loss[MOE_LOSS_SWITCH] = 0.5f, d.seed = 0xffffffffffffffffull, d.router_gain = 0.1f, d.bias = MOE_ON;
    size_t n = moe_desc_export(&d, text, sizeof text);
    CHECK(n > 1000 && n < sizeof text && strlen(text) == n && text[n - 1] == '\n');
    CHECK(moe_desc_export(&d, NULL, 0) == n && moe_desc_export(&d, part, 100) == n);
    CHECK(strlen(part) == 99 && !memcmp(part, text, 99));
    CHECK(times(text, "#define MOE_ONLY_GATE 1\n") == 1 && times(text, "#define MOE_ONLY_EXPERT 4\n") == 1);
    CHECK(times(text, "#define") == 8 && times(text, "{") == times(text, "}"));
    CHECK(times(text, " {0},\\\n") == 1); /* the losses, which are off */
    CHECK(times(text, "MOE_FIELD(top_k, 2u)") == 1 && times(text, "MOE_FIELD(bias, 1)") == 1);
    CHECK(times(text, "MOE_FIELD(seed, 18446744073709551615u)") == 1); /* router_gain, mask_jitter: */
    CHECK(times(text, "(float)0.1,") == 2 && times(text, "(float)") + times(text, "MOE_FIELD") == 82);
    CHECK(times(text, "MOE_FIELD(training, -1)") == 1); /* off, as the losses and their extents are */
    d.loss[MOE_LOSS_SWITCH] = 0.0f, d.training = MOE_OFF;
    CHECK(moe_desc_export(&d, part, sizeof part) == n && !strcmp(part, text));
    d.loss[MOE_LOSS_OUTPUT_ORTHOGONALITY] = 0.5f;
    CHECK(moe_desc_export(&d, part, sizeof part) == n && !strcmp(part, text));
    CHECK(moe_desc_export(NULL, text, sizeof text) == 0);
    d.n_codes = 6, d.loss[MOE_LOSS_OUTPUT_ORTHOGONALITY] = 0.0f;
    CHECK_OK(moe_desc_resolve(&d, &d));
    CHECK(moe_desc_export(&d, text, sizeof text) == 0);
    d.top_k = 99;
    CHECK(moe_desc_export(&d, text, sizeof text) == 0);
}

int main(void) {
    RUN(test_desc_defaults);
    RUN(test_export);
    RUN(test_explain);
    RUN(test_explain_every_field);
    RUN(test_explain_garbage);
    RUN(test_near);
    RUN(test_desc_resolve_is_idempotent);
    RUN(test_desc_fields);
    RUN(test_desc_texts);
    RUN(test_tape_fits);
    RUN(test_desc_json);
    RUN(test_fields);
    RUN(test_ecology);
    return test_end();
}

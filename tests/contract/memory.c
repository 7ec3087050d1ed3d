/* Running out of memory: the N-th allocation fails, for every N. Each time the status says so, nothing leaks, the
 * layer is as it was, and works when there is memory again. */
#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L /* getpid */
#endif
#include "test.h"
#include "temp.h"

enum { D = 12, F = 20, E = 5, T = 30 };
static float x[T * D], dy[T * D], y[T * D], dx[T * D], y_want[T * D], dx_want[T * D];
static int context;

static moe_desc desc(void) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = F, d.n_experts = E, d.bias = MOE_ON, d.n_shared = 1, d.capacity_factor = 1, d.clip_norm = 1;
    d.loss[MOE_LOSS_SWITCH] = 0.01f, d.loss[MOE_LOSS_Z] = 0.01f, d.alloc_context = &context;
    return d;
}

/* Something that allocates; returns its status, and cleans up what it made. */
typedef moe_status action(moe_layer *m);

static moe_status create(moe_layer *m) {
    moe_desc d = desc();
    moe_layer *made = m;
    moe_status s = moe_layer_new(&made, &d);
    if (s) CHECK(made == NULL || made == m); /* never half a layer */
    if (!s) CHECK(test_last_context == &context);
    if (!s) moe_layer_free(made);
    return s;
}

static moe_status make_tape(moe_layer *m) {
    moe_desc d = desc();
    moe_tape *t = NULL;
    (void)m;
    moe_status s = moe_tape_new(&t, &d, T, MOE_ON);
    if (s) CHECK(t == NULL);
    moe_tape_free(t);
    return s;
}

static moe_status forward(moe_layer *m) { return moe_forward(m, x, T, y); }
static moe_status backward(moe_layer *m) { return moe_backward(m, dy, dx); }
static moe_status step(moe_layer *m) { return moe_step(m, 0.01f); }

static moe_status health(moe_layer *m) {
    moe_health h;
    return moe_layer_health(m, &h);
}

static moe_status gemm(moe_layer *m) {
    moe_gemm_args g;
    memset(&g, 0, sizeof g);
    (void)m;
    g.m = T, g.n = T, g.k = D, g.a = x, g.b = dy, g.tb = 1, g.alloc_context = &context;
    static float c[T * T];
    g.c = c;
    return moe_gemm(&g);
}

static moe_status load_again(moe_layer *m, int with_optimizer) {
    static unsigned char bytes[100000];
    size_t size = 0;
    moe_layer *made = NULL;
    moe_desc d = desc();
    CHECK_OK(moe_layer_save_size(m, with_optimizer, &size));
    if (!CHECK(size <= sizeof bytes)) return MOE_OK;
    moe_status s = moe_layer_save_memory(m, with_optimizer, bytes, size);
    if (!s) s = moe_layer_load_memory(&made, bytes, size, &d);
    if (s) CHECK(made == NULL);
    moe_layer_free(made);
    return s;
}

static moe_status load(moe_layer *m) { return load_again(m, 1); }

/* ---- what makes another layer: the old one stays whole ---- */
static float values[T * F], hot[T * E];
static double worth_of[E + 2];
static const moe_growth_data by_x = {x, T, NULL, NULL, 3}, by_column = {NULL, 0, NULL, values, 3};
static moe_status made_of(moe_status status, moe_layer *made) {
    CHECK((status == MOE_OK) == (made != NULL));
    moe_layer_free(made);
    return status;
}
#define MAKES(name, call)                  \
    static moe_status name(moe_layer *m) { \
        moe_layer *made = NULL;            \
        moe_status s = call;               \
        return made_of(s, made);           \
    }
MAKES(split, moe_layer_split(&made, m, 1, &by_x))
MAKES(clone, moe_layer_clone(&made, m, 1, 0.01f, 0.5f, 3))
MAKES(add, moe_layer_add(&made, m, 2, &by_column, NULL))
MAKES(merge, moe_layer_merge(&made, m, 1, 2, NULL))
MAKES(merge_to, moe_layer_merge_to(&made, m, E - 2, x, T, NULL))
MAKES(revive, moe_layer_revive(&made, m, 1, 2, &by_x))
static const size_t pruned[] = {1};
MAKES(prune, moe_layer_prune(&made, m, 1, pruned))
static const moe_layer_formats int8 = {MOE_FORMAT_INT8, NULL, MOE_OFF, 0, NULL};
MAKES(quantize, moe_layer_quantize(m, &int8, &made))
static moe_status release(moe_layer *m) {
    moe_layer *bound = NULL, *made = NULL;
    moe_status s = moe_layer_split(&bound, m, 1, &by_x);
    if (!s) s = moe_layer_release(&made, bound, 1), (void)made_of(s, made);
    moe_layer_free(bound);
    return s;
}
static moe_status new_formats(moe_layer *m) {
    moe_layer *made = NULL;
    moe_desc d = desc();
    (void)m;
    moe_status s = moe_layer_new_formats(&made, &d, &int8);
    return made_of(s, made);
}
static moe_status replicate(moe_layer *m) {
    moe_layer *made = NULL;
    static const uint64_t load[E] = {9, 1, 1, 1, 1};
    moe_replicate_desc d;
    memset(&d, 0, sizeof d);
    d.load = load, d.small = MOE_FORMAT_INT8;
    moe_status s = moe_layer_replicate(m, &d, &made, NULL);
    return made_of(s, made);
}
static moe_status upcycle(moe_layer *m) {
    moe_layer *made = NULL;
    moe_expert_weights dense = {values, NULL, values, NULL, NULL, NULL};
    moe_desc d = desc();
    (void)m;
    d.expert = MOE_EXPERT_RELU, d.n_shared = 0;
    moe_status s = moe_layer_upcycle(&made, &d, &dense, F, 0.5f, 3);
    return made_of(s, made);
}
static moe_status dynmoe(moe_layer *m) {
    moe_layer *made = NULL;
    moe_health h;
    moe_status s = moe_layer_health(m, &h);
    if (!s) s = moe_layer_dynmoe(&made, m, &h, x, 3, 0, 3);
    return made_of(s, made);
}

/* ---- what measures a layer, and its file ---- */
static moe_status worth(moe_layer *m) { return moe_layer_worth(m, MOE_WORTH_SALIENCY, x, T, worth_of); }
static moe_status pes(moe_layer *m) { return moe_layer_pes(m, x, T, worth_of); }
static moe_status check_layer(moe_layer *m) {
    moe_part_kind part;
    const char *name;
    return moe_layer_check(m, 1, &part, &name);
}

/* ---- ranks, the arrays of others, files ---- */
MAKES(new_shard, moe_layer_new_shard(&made, moe_layer_desc(m), 1, E))
MAKES(shard, moe_layer_shard(m, 1, E, &made))
static const moe_experts_arrays arrays = {values, NULL, values, NULL, NULL, NULL};
static moe_status pack(moe_layer *m) {
    moe_layer *made = NULL;
    moe_status s = moe_layer_quantize(m, &int8, &made);
    if (!s) s = moe_layer_pack(made, 1, 1, &arrays, NULL);
    if (!s) s = load_again(made, 0);
    moe_layer_free(made);
    return s;
}
static moe_status experts_pack(moe_layer *m) {
    static float params[100000];
    moe_desc d = desc();
    size_t count = 0;
    (void)m;
    d.expert = MOE_EXPERT_RELU;
    CHECK_OK(moe_experts_count(&d, &count));
    if (!CHECK(count <= sizeof params / sizeof *params)) return MOE_OK;
    return moe_experts_pack(&d, 0, 1, &arrays, NULL, params);
}
/* 200 names have an index; and of tensors in another order than their bytes. */
static moe_status names_open(const char *begin, const char *end, int file) {
    static char text[20000];
    moe_file opened;
    moe_shards shards;
    moe_status s;
    size_t n = (size_t)sprintf(text + 8, "{%s", begin);
    for (int i = 0; i < 200; i++)
        n += (size_t)sprintf(text + 8 + n, file ? "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}"
                                                : "%s\"t%d\":\"a\"", i ? "," : "", i);
    n += (size_t)sprintf(text + 8 + n, "}%s", end);
    for (int i = 0; i < 8; i++) text[i] = (char)(unsigned char)((uint64_t)n >> 8 * i);
    if (file) {
        s = moe_file_open(&opened, text, 8 + n);
        CHECK((opened.index != NULL) == (s == MOE_OK));
        moe_file_close(&opened);
        return s;
    }
    s = moe_shards_open(&shards, text + 8, n);
    CHECK((shards.index != NULL) == (s == MOE_OK));
    moe_shards_close(&shards);
    return s;
}
static moe_status file_open(moe_layer *m) { return (void)m, names_open("", "", 1); }
static moe_status shards_open(moe_layer *m) { return (void)m, names_open("\"weight_map\":{", "}", 0); }
static char path[512];
static moe_status save(moe_layer *m) {
    moe_layer *back = NULL;
    moe_status s = moe_layer_save(m, 0, path);
    if (!s) s = moe_layer_load(&back, path, NULL), CHECK((s == MOE_OK) == (back != NULL));
    moe_layer_free(back);
    return s;
}

/* A checkpoint of two shards; the first has so many names that it gets an index. */
enum { MODEL_FILES = 4, EXTRA = 200 };
static const char *const model_names[MODEL_FILES] = {"config.json", "model.safetensors.index.json", "a", "b"};
static const char *const model_tensors[] = {"r", "g0", "g1", "u0", "u1", "d0", "d1"};
static char model_bytes[MODEL_FILES][20000];
static size_t model_length[MODEL_FILES];
static void make_shard(size_t file, size_t first, size_t last, int extra) {
    char *text = model_bytes[file] + 8;
    size_t n = (size_t)sprintf(text, "{"), at = 0;
    for (int i = 0; i < extra; i++)
        n += (size_t)sprintf(text + n, "\"t%d\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]},", i);
    for (size_t i = first; i < last; i++, at += 32)
        n += (size_t)sprintf(text + n, "%s\"x.%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                             i > first ? "," : "", model_tensors[i], i < 5 ? "2,4" : "4,2", at, at + 32);
    n += (size_t)sprintf(text + n, "}");
    for (int i = 0; i < 8; i++) model_bytes[file][i] = (char)(unsigned char)((uint64_t)n >> 8 * i);
    for (size_t i = 0; i < at; i++) text[n + i] = 0; /* the weights */
    model_length[file] = 8 + n + at;
}
static void make_model(void) {
    char *text = model_bytes[1];
    size_t n = (size_t)sprintf(text, "{\"weight_map\":{");
    model_length[0] = (size_t)sprintf(model_bytes[0], "{}");
    for (int i = 0; i < EXTRA; i++) n += (size_t)sprintf(text + n, "\"t%d\":\"a\",", i);
    for (size_t i = 0; i < 7; i++)
        n += (size_t)sprintf(text + n, "%s\"x.%s\":\"%s\"", i ? "," : "", model_tensors[i], i < 3 ? "a" : "b");
    model_length[1] = n + (size_t)sprintf(text + n, "}}");
    make_shard(2, 0, 3, EXTRA);
    make_shard(3, 3, 7, 0);
}
static moe_status model_file(void *user, const char *name, const void **bytes, size_t *size) {
    for (size_t i = 0; i < MODEL_FILES; i++) {
        if (strcmp(name, model_names[i]) != 0) continue;
        *bytes = model_bytes[i], *size = model_length[i];
        return MOE_OK;
    }
    return (void)user, MOE_E_OPEN;
}
static moe_status model(moe_layer *m) {
    moe_model opened;
    moe_layer *made = NULL;
    moe_model_source source = {model_file, NULL, "n_layers=1 d_model=4 d_ff=2 n_experts=2 top_k=1 layer=x. router=r "
                               "experts.w1=g* experts.wu=u* experts.w2=d*", &context};
    (void)m;
    moe_status s = moe_model_open(&opened, &source);
    if (s) CHECK(opened.memory == NULL);
    if (!s) s = moe_model_layer(&opened, 0, NULL, NULL, &made), (void)made_of(s, made);
    moe_model_close(&opened);
    return s;
}

/* ---- arrays, with scratch of their own ---- */
static int32_t some[T * E];
static float window[E];
static moe_status choice(moe_layer *m) { return (void)m, moe_expert_choice(T, E, 3, E, hot, some, NULL, 0); }
static moe_status sinkhorn(moe_layer *m) { return (void)m, moe_sinkhorn(T, E, 1, 3, hot, values, NULL, 0); }
static moe_status auction(moe_layer *m) { return (void)m, moe_auction(T, E, hot, some, NULL, 0); }
static moe_status aggregate(moe_layer *m) {
    return (void)m, moe_aggregate(MOE_AGGREGATE_MEDIAN, T, D, x, 0.1f, values, NULL, 0);
}

static moe_status laser(moe_layer *m) { return (void)m, moe_laser(T, E, 2, 0.9f, 0, 3, hot, window, some, NULL, 0); }
static moe_status robust(moe_layer *m) {
    static const float *const outputs[3] = {x, x + D, x + 2 * D};
    static float reliability[3], out[3];
    return (void)m, moe_robust_weights(3, D, outputs, values, 1, reliability, out, NULL, 0);
}

/* ---- the game: fits of batches that were counted before ---- */
enum { BATCHES = 6, REPLICATES = 4 };
static moe_game game;
static const moe_parallel one_thread = {NULL, NULL, 1};
static double gamma_of[REPLICATES], excess_of[REPLICATES], low, high;
static moe_status holdout(moe_layer *m) {
    moe_game_fit fit;
    return (void)m, moe_game_holdout(&game, 1, &fit);
}
static moe_status bootstrap(moe_layer *m) {
    return (void)m, moe_game_bootstrap(&game, REPLICATES, 3, &one_thread, gamma_of, &low, &high);
}
static moe_status excess(moe_layer *m) {
    moe_game_null null;
    return (void)m, moe_game_excess(&game, REPLICATES, 3, &one_thread, gamma_of, excess_of, &null);
}

/* Fails the first, second, ... allocation of `act` until it needs no more; how many it needs. Before each try
 * `prepare` (may be NULL) runs. */
static long fail_each(moe_layer *m, action *prepare, action *act, int fresh_layer, const char *name) {
    long n = 0;
    for (;; n++) {
        moe_desc d = desc();
        moe_layer *own = m;
        if (fresh_layer && !CHECK_OK(moe_layer_new(&own, &d))) return n;
        if (prepare) CHECK_OK(prepare(own));
        uint64_t before = own ? moe_layer_hash(own) : 0;
        long live = test_live_blocks;
        test_fail_at = n;
        moe_status s = act(own);
        int reached = test_fail_at == 0;
        test_fail_at = -1;
        if (s) {
            if (!CHECK(moe_status_kind(s) == MOE_KIND_MEMORY))
                printf("        %s: \"%s\"\n", name, moe_status_string(s));
            CHECK(test_live_blocks <= live); /* a tape that could not grow may be gone; no more than before */
            if (own) CHECK(moe_layer_hash(own) == before);
        }
        if (own) { /* with memory again, everything works as if nothing had been */
            if (s && prepare) CHECK_OK(prepare(own));
            if (s) CHECK_OK(act(own));
            if (fresh_layer) moe_layer_free(own);
        }
        if (!s) break;
        if (!CHECK(reached)) break; /* it failed without an allocation having failed */
        if (!CHECK(n < 1000)) break;
    }
    CHECK(test_live_blocks == 0 || !fresh_layer);
    return n;
}

static void test_create(void) {
    fail_each(NULL, NULL, create, 0, "create");
    fail_each(NULL, NULL, make_tape, 0, "tape");
    CHECK(test_live_blocks == 0);
}

static void test_layer_calls(void) {
    fail_each(NULL, NULL, forward, 1, "forward");
    fail_each(NULL, forward, backward, 1, "backward");
    fail_each(NULL, forward, step, 1, "step");
    fail_each(NULL, forward, health, 1, "health");
    fail_each(NULL, forward, load, 1, "load");
}

static void test_other_calls(void) {
    static const struct { const char *name; action *act; } calls[] = {
        {"split", split}, {"release", release}, {"clone", clone}, {"add", add}, {"merge", merge},
        {"merge_to", merge_to},
        {"prune", prune}, {"revive", revive}, {"quantize", quantize}, {"new_formats", new_formats},
        {"replicate", replicate}, {"upcycle", upcycle}, {"dynmoe", dynmoe}, {"worth", worth}, {"pes", pes},
        {"check", check_layer}, {"new_shard", new_shard}, {"shard", shard}, {"pack", pack}, {"save", save}};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        test_want_context = calls[i].act == save ? NULL : &context; /* a file's layer has none */
        if (!CHECK(fail_each(NULL, forward, calls[i].act, 1, calls[i].name) > 0 && !test_other_contexts))
            printf("        %s\n", calls[i].name);
    }
    test_want_context = NULL;
}

static void test_arrays(void) {
    static const struct { const char *name; action *act; } calls[] = {
        {"gemm", gemm}, {"expert_choice", choice}, {"sinkhorn", sinkhorn}, {"auction", auction},
        {"aggregate", aggregate}, {"laser", laser}, {"robust_weights", robust}, {"experts_pack", experts_pack},
        {"holdout", holdout}, {"bootstrap", bootstrap}, {"excess", excess}, {"file_open", file_open},
        {"shards_open", shards_open}, {"model", model}};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!CHECK(fail_each(NULL, NULL, calls[i].act, 0, calls[i].name) > 0)) printf("        %s\n", calls[i].name);
    CHECK(test_live_blocks == 0);
}

/* A forward that fails while the tape grows: the layer then gives the same bits as one that never failed. */
static void test_growing_tape(void) {
    moe_desc d = desc();
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    CHECK_OK(moe_forward(m, x, T, y_want));
    CHECK_OK(moe_backward(m, dy, dx_want));
    CHECK_OK(moe_step(m, 0.01f));
    uint64_t want = moe_layer_hash(m);
    moe_layer_free(m);
    for (long n = 0; n < 50; n++) {
        if (!CHECK_OK(moe_layer_new(&m, &d))) return;
        CHECK_OK(moe_forward(m, x, 3, y));
        test_fail_at = n;
        moe_status s = moe_forward(m, x, T, y);
        test_fail_at = -1;
        if (s) {
            CHECK_STATUS(s, MOE_E_NO_MEMORY);
            CHECK_STATUS(moe_backward(m, dy, dx), MOE_E_NO_FORWARD); /* not of a batch that is no more */
            CHECK_OK(moe_forward(m, x, T, y));
        }
        CHECK_SAME(y, y_want, T * D);
        CHECK_OK(moe_backward(m, dy, dx));
        CHECK_SAME(dx, dx_want, T * D);
        CHECK_OK(moe_step(m, 0.01f));
        CHECK(moe_layer_hash(m) == want);
        moe_layer_free(m);
        CHECK(test_live_blocks == 0);
        if (!s) break;
    }
}

/* Quantiles are of all scores since the last step, so every backward needs more room than the one before; one that gets
 * none changes nothing, whatever tape it is of. */
static void test_room_for_scores(void) {
    moe_desc d = desc();
    uint64_t hash[2];
    d.controller = MOE_CONTROL_QUANTILE;
    for (int failing = 0; failing < 2; failing++) {
        moe_layer *m = NULL;
        moe_tape *tape = NULL;
        if (!CHECK_OK(moe_layer_new(&m, &d)) || !CHECK_OK(moe_tape_new(&tape, &d, T, MOE_ON))) return;
        for (size_t i = 0; i < 3; i++) {
            CHECK_OK(moe_forward_tape(m, tape, x, T - i, y));
            test_fail_at = failing ? 0 : -1;
            if (failing) CHECK_STATUS(moe_backward_tape(m, tape, dy, dx), MOE_E_NO_MEMORY);
            test_fail_at = -1;
            CHECK_OK(moe_backward_tape(m, tape, dy, dx));
        }
        CHECK_OK(moe_step(m, 0.01f));
        hash[failing] = moe_layer_hash(m);
        CHECK(moe_layer_control(m)->bias[0] != 0);
        moe_tape_free(tape);
        moe_layer_free(m);
        CHECK(test_live_blocks == 0);
    }
    CHECK(hash[0] == hash[1]);
}

/* After the first batch of a size no call allocates any more. */
static void test_no_allocation_in_the_loop(void) {
    moe_desc d = desc();
    moe_layer *m = NULL;
    if (!CHECK_OK(moe_layer_new(&m, &d))) return;
    for (int i = 0; i < 5; i++) {
        long before = test_allocations;
        CHECK_OK(moe_forward(m, x, (size_t)(T - i), y));
        CHECK_OK(moe_backward(m, dy, dx));
        CHECK_OK(moe_step(m, 0.01f));
        if (i > 0) CHECK(test_allocations == before);
    }
    moe_layer_free(m);
    CHECK(test_live_blocks == 0);
}

static void *game_memory;
static void make_game(void) {
    size_t bytes = 0;
    CHECK_OK(moe_game_size(E, BATCHES, &bytes));
    game_memory = test_memory(bytes, 1);
    CHECK_OK(moe_game_init(&game, E, BATCHES, game_memory, bytes));
    CHECK_OK(moe_topk(T, E, 2, hot, some, NULL));
    for (size_t b = 0; b < BATCHES; b++) {
        CHECK_OK(moe_game_add(&game, b, 5, 2, hot + b * 5 * E, some + b * 5 * 2));
    }
}
int main(void) {
    test_fill(x, T * D, -1, 1);
    test_fill(dy, T * D, -1, 1);
    test_fill(values, T * F, -1, 1);
    test_fill(hot, T * E, 0, 1);
    temp_path(path, sizeof path, "memory");
    make_game();
    make_model();
    RUN(test_create);
    RUN(test_layer_calls);
    RUN(test_other_calls);
    RUN(test_arrays);
    RUN(test_growing_tape);
    RUN(test_room_for_scores);
    RUN(test_no_allocation_in_the_loop);
    remove(path);
    free(game_memory);
    return test_end();
}

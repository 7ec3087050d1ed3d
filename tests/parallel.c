/* A layer over ranks against the plain layer with all tokens. The ranks are threads of which one runs at a time: it
 * hands over where it waits for the others. */
#include "test.h"

#include <pthread.h>
#include <time.h>

enum { MOST_RANKS = 8, D = 16 };

/* -- an engine in one process -- */
typedef enum fault { NO_FAULT, FAILS, LATE, BAD_COUNT, BAD_ROW, BAD_FIRST, ALLOCATION } fault; /* a number: NaN */
enum { AT_ONCE = 2, WAYS }; /* the ways of begin and wait, and exchange's own */
typedef struct letter { /* what a rank sends, between begin and wait */
    const void *send;
    float *copy;            /* of it */
    void *receive;
    const size_t *bytes, *receive_bytes;
    size_t total, n_bytes[2][MOST_RANKS];
    int changed; /* on its way, by a fault */
} letter;
typedef struct hall {
    pthread_mutex_t lock;
    pthread_cond_t bell;
    size_t size, arrived, round;
    int broken;
    size_t limit;
    const void *send[MOST_RANKS];
    letter way[WAYS][MOST_RANKS];
    int under_way[WAYS][MOST_RANKS], failed[MOST_RANKS];
    uint64_t sent; /* bytes that left a rank */
    size_t begun, wrong; /* exchanges that began; breaches of what moe.h promises the engine */
    fault kind;                /* of the last rank, BAD_FIRST of the second, whose expert llep splits, */
    size_t at;                 /* at its call number so many */
    size_t done[MOST_RANKS];   /* calls of each rank */
} hall;
typedef struct seat { hall *in; size_t rank; } seat;

/* All have come, or somebody is missing too long. */
static int meet(hall *in) {
    struct timespec until;
    size_t round = in->round;
    if (in->broken) return 1;
    if (++in->arrived == in->size) {
        in->arrived = 0;
        in->round++;
        pthread_cond_broadcast(&in->bell);
        return 0;
    }
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += in->kind == LATE ? 0 : 60; /* s; a machine may be busy */
    until.tv_nsec += in->kind == LATE ? 200000000 : 0;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    while (in->round == round && !in->broken)
        if (pthread_cond_timedwait(&in->bell, &in->lock, &until)) in->broken = 1;
    if (in->broken) pthread_cond_broadcast(&in->bell);
    return in->broken;
}
/* The fault of this call, if it is its turn. */
static fault fault_now(const seat *at, int is_wait) {
    hall *in = at->in;
    size_t call = in->done[at->rank]++;
    in->wrong += in->failed[at->rank] && !is_wait; /* after a failure what has begun is waited for, and nothing else */
    if (at->rank != (in->kind == BAD_FIRST ? 1 : in->size - 1)) return NO_FAULT;
    return call == in->at ? in->kind : NO_FAULT;
}
static int fail_now(const seat *at, fault now) {
    hall *in = at->in;
    if (now == FAILS) in->broken = 1, pthread_cond_broadcast(&in->bell);
    while (now == LATE && !in->broken) pthread_cond_wait(&in->bell, &in->lock);
    in->failed[at->rank] |= in->broken;
    return now == FAILS || now == LATE;
}
static int ended(const seat *at, int bad) {
    at->in->failed[at->rank] |= bad;
    return bad;
}
static int hall_begin(void *context, int way, const void *send, const size_t *send_bytes, void *receive,
                      const size_t *receive_bytes) {
    const seat *at = (const seat *)context;
    hall *in = at->in;
    fault now = fault_now(at, 0);
    letter mine = {send, NULL, receive, send_bytes, receive_bytes, 0, {{0}}, now == BAD_ROW || now == BAD_FIRST};
    size_t room = 0;
    if (fail_now(at, now)) return 1;
    in->wrong += in->under_way[way][at->rank] || (way != AT_ONCE && send == receive); /* MPI: it stays in place */
    for (size_t r = 0; r < in->size; r++) {
        mine.total += mine.n_bytes[0][r] = send_bytes[r];
        if (r != at->rank) in->sent += send_bytes[r];
        room += mine.n_bytes[1][r] = receive_bytes[r];
    }
    mine.copy = (float *)malloc(mine.total + sizeof(float));
    if (mine.total) memcpy(mine.copy, send, mine.total);
    if (room && way != AT_ONCE) memset(receive, 0xff, room); /* NaN: not to be read before the wait */
    if (now == BAD_ROW && mine.total) mine.copy[mine.total / sizeof(float) - 1] = NAN;
    if (now == BAD_FIRST && mine.total) mine.copy[0] = NAN;
    in->way[way][at->rank] = mine;
    in->under_way[way][at->rank] = 1;
    in->begun += way != AT_ONCE;
    return 0;
}
static int hall_wait(void *context, int way) {
    const seat *at = (const seat *)context;
    hall *in = at->in;
    letter *mine = &in->way[way][at->rank];
    unsigned char *to = (unsigned char *)mine->receive;
    int bad = way != AT_ONCE && fail_now(at, fault_now(at, 1));
    if (!bad) bad = meet(in);
    in->wrong += !in->under_way[way][at->rank];
    for (size_t r = 0; r < in->size; r++) { /* nothing moved meanwhile */
        in->wrong += mine->bytes[r] != mine->n_bytes[0][r] || mine->receive_bytes[r] != mine->n_bytes[1][r];
        if (bad) continue;
        const letter *their = &in->way[way][r];
        const unsigned char *from = (const unsigned char *)their->copy;
        for (size_t k = 0; k < at->rank; k++) from += their->n_bytes[0][k];
        if (their->n_bytes[0][at->rank] != mine->receive_bytes[r]) bad = in->broken = 1;
        else if (mine->receive_bytes[r]) memcpy(to, from, mine->receive_bytes[r]);
        to += mine->receive_bytes[r];
    }
    in->wrong += way != AT_ONCE && !mine->changed && mine->total && memcmp(mine->send, mine->copy, mine->total);
    bad |= meet(in);
    free(mine->copy);
    in->under_way[way][at->rank] = 0;
    return ended(at, bad);
}
static void not_under_way(const seat *at) {
    for (int way = 0; way < WAYS; way++) at->in->wrong += (size_t)at->in->under_way[way][at->rank];
}
static int hall_exchange(void *context, const void *send, const size_t *send_bytes, void *receive,
                         const size_t *receive_bytes) {
    not_under_way((const seat *)context);
    if (hall_begin(context, AT_ONCE, send, send_bytes, receive, receive_bytes)) return 1;
    return hall_wait(context, AT_ONCE);
}
static int hall_sum(void *context, uint64_t *values, size_t n) {
    const seat *at = (const seat *)context;
    hall *in = at->in;
    uint64_t *sum = (uint64_t *)calloc(n + 1, sizeof *sum);
    fault now = fault_now(at, 0);
    not_under_way(at);
    int bad = fail_now(at, now);
    if (now == BAD_COUNT) values[n - 1] = (uint64_t)1 << 50;
    in->sent += n * sizeof *values;
    in->send[at->rank] = values;
    if (!bad) bad = meet(in);
    for (size_t r = 0; r < in->size && !bad; r++)
        for (size_t i = 0; i < n; i++) sum[i] += ((const uint64_t *)in->send[r])[i];
    if (!bad) bad = meet(in);
    if (!bad) memcpy(values, sum, n * sizeof *sum);
    free(sum);
    return ended(at, bad);
}
static int hall_broadcast(void *context, size_t root, void *bytes, size_t n) {
    const seat *at = (const seat *)context;
    hall *in = at->in;
    not_under_way(at);
    if (fail_now(at, fault_now(at, 0))) return 1;
    if (at->rank == root) in->send[root] = bytes, in->sent += n * (in->size - 1);
    if (meet(in)) return ended(at, 1);
    if (at->rank != root) memcpy(bytes, in->send[root], n);
    return ended(at, meet(in));
}

/* -- a case: the same steps on one rank and on several -- */
typedef struct trial {
    const char *text;    /* of the desc */
    size_t size, tokens, steps;
    float lr;
    double skew;         /* share of the tokens that look like one */
    moe_ep_desc plan;
    int uneven, mask, micro, evaluate; /* evaluate: no backward */
    int shards, overlap;               /* each rank has its own experts alone; rows travel while others are computed */
    /* what came out: of the plain layer, of the ranks */
    float *x, *dy, *y[2], *dx[2];
    unsigned char *masked;
    double loss[2][MOE_LOSS_COUNT], most, standard; /* the largest makespan, of LLEP's plans and the standard one's */
    size_t over; /* plans with a rank over capacity + m */
    uint64_t hash[2], rank_hash[MOST_RANKS];
    moe_layer *plain, *of[MOST_RANKS];
    moe_status status[MOST_RANKS];
    uint64_t row_bytes, weight_bytes, guest_bytes, other_bytes, moved; /* moved: bytes, as the plans say */
    hall in;
} trial;
typedef struct player { trial *of; size_t rank; } player;

static size_t first_token(const trial *t, size_t rank) {
    if (!t->uneven) return rank * t->tokens / t->size;
    return rank * rank * t->tokens / (t->size * t->size); /* the first rank has few, with P = 1 all */
}
static moe_desc desc_of(const trial *t) {
    moe_desc d;
    memset(&d, 0, sizeof d);
    d.d_model = D, d.d_ff = 17, d.n_experts = 8, d.seed = 3;
    d.parallel.n_threads = 1;
    CHECK_OK(moe_desc_parse(&d, t->text, NULL));
    return d;
}
static void note_plan(trial *t, const moe_ep_report *report) {
    const moe_ep *plan = report->plan;
    double standard = 0;
    size_t each = plan->n_experts / plan->n_ranks, held = t->shards ? each : plan->n_experts;
    /* weights there, gradients back */
    t->moved += (1 + (uint64_t)!t->evaluate) * plan->n_moved * (report->expert_bytes / held);
    if (plan->makespan > t->most) t->most = (double)plan->makespan;
    for (size_t g = 0; g < plan->n_ranks; g++) {
        uint64_t native = 0;
        for (size_t e = g * each; e < (g + 1) * each; e++)
            for (size_t i = 0; i < plan->count[e]; i++)
                native += plan->part[plan->first[e] + i].end - plan->part[plan->first[e] + i].begin;
        if ((double)native > standard) standard = (double)native;
        uint64_t m = t->plan.min_tokens ? t->plan.min_tokens : 1024;
        if (plan->acts) t->over += plan->work[g] > plan->capacity + m;
    }
    if (standard > t->standard) t->standard = standard;
}
static moe_status play_steps(trial *t, moe_layer *layer, moe_ranks *ranks, size_t rank) {
    size_t at = first_token(t, rank), n = first_token(t, rank + 1) - at;
    moe_status status = MOE_OK;
    if (t->mask) moe_layer_side(layer)->mask = t->masked + at;
    moe_layer_side(layer)->evaluate = t->evaluate;
    if (t->evaluate) {
        status = moe_ep_forward(ranks, t->x + at * D, n, t->y[1] + at * D);
        if (!status && rank == 0) note_plan(t, moe_ranks_report(ranks));
        return status;
    }
    for (size_t step = 0; step < t->steps && !status; step++) {
        for (int i = 0; i <= t->micro && !status; i++) {
            status = moe_ep_forward(ranks, t->x + at * D, n, t->y[1] + at * D);
            if (!status && rank == 0) note_plan(t, moe_ranks_report(ranks));
            if (!status) status = moe_ep_backward(ranks, t->dy + at * D, t->dx[1] + at * D);
        }
        if (!status && rank == 0) moe_layer_losses(layer, t->loss[1], NULL);
        if (!status) status = moe_step(layer, t->lr);
    }
    return status;
}
/* All experts on every rank: in its layer, or of shards in *whole. */
static moe_status play_whole(const trial *t, moe_ranks *ranks, size_t rank, moe_layer **whole) {
    moe_status status = moe_ep_gather(ranks);
    if (t->shards && t->size > 1 && status == MOE_E_SHARD) status = MOE_OK;
    for (size_t root = 0; root < t->size && !status; root++) {
        moe_layer *made = NULL;
        status = moe_ep_collect(ranks, root, &made);
        CHECK((made != NULL) == (!status && root == rank));
        moe_layer_free(made ? *whole : NULL);
        if (made) *whole = made;
    }
    return status;
}
static void *play(void *arg) {
    player *p = (player *)arg;
    trial *t = p->of;
    moe_layer *layer = NULL, *whole = NULL;
    moe_ranks *ranks = NULL;
    moe_desc d = desc_of(t);
    seat at = {&t->in, p->rank};
    moe_ep_engine engine = {p->rank, t->size, hall_exchange, hall_sum, hall_broadcast, &at, NULL, NULL};
    if (t->overlap) engine.begin = hall_begin, engine.wait = hall_wait;
    pthread_mutex_lock(&t->in.lock);
    moe_status status = moe_layer_new_shard(&layer, &d, t->shards ? p->rank : 0, t->shards ? t->size : 1);
    if (!status) status = moe_ranks_new(&ranks, layer, &engine, &t->plan);
    if (meet(&t->in)) status = MOE_E_EP_EXCHANGE; /* one has failed already */
    if (!status) {
        if (t->in.kind == ALLOCATION && p->rank == t->size - 1) test_fail_at = (long)t->in.at;
        status = play_steps(t, layer, ranks, p->rank);
        if (!status) status = play_whole(t, ranks, p->rank, &whole);
    }
    t->status[p->rank] = status;
    if (!status && whole && !t->shards) CHECK(moe_layer_hash(layer) == moe_layer_hash(whole)); /* gathered: collected */
    if (!status) t->rank_hash[p->rank] = moe_layer_hash(whole ? whole : layer);
    if (ranks) t->row_bytes += moe_ranks_report(ranks)->row_bytes;
    if (ranks) t->weight_bytes += moe_ranks_report(ranks)->weight_bytes;
    if (ranks) t->guest_bytes += moe_ranks_report(ranks)->guest_bytes;
    if (ranks) t->other_bytes += moe_ranks_report(ranks)->other_bytes;
    moe_ranks_free(ranks);
    t->of[p->rank] = layer;
    if (whole) moe_layer_free(layer), t->of[p->rank] = whole;
    pthread_mutex_unlock(&t->in.lock);
    return NULL;
}
static void trial_begin(trial *t) {
    size_t n = t->tokens * D;
    float **array[] = {&t->x, &t->dy, &t->y[0], &t->y[1], &t->dx[0], &t->dx[1]};
    for (size_t i = 0; i < 6; i++) *array[i] = (float *)calloc(n, sizeof(float));
    t->masked = (unsigned char *)calloc(t->tokens, 1);
    CHECK_OK(moe_rand_normal(5, 1, n, 0, 1, t->x));
    CHECK_OK(moe_rand_normal(5, 2, n, 0, 1, t->dy));
    for (size_t i = 0; i < t->tokens; i++) {
        t->masked[i] = i % 5 != 2;
        if ((double)(i * 7919 % 1000) < t->skew * 1000)
            for (size_t k = 0; k < D; k++) t->x[i * D + k] = t->x[k] + 1e-3f * t->x[i * D + k];
    }
}
static void trial_end(trial *t) {
    float *array[] = {t->x, t->dy, t->y[0], t->y[1], t->dx[0], t->dx[1]};
    for (size_t i = 0; i < 6; i++) free(array[i]);
    free(t->masked);
    for (size_t r = 0; r < t->size; r++) moe_layer_free(t->of[r]);
    moe_layer_free(t->plain);
}
static void play_plain(trial *t) {
    moe_desc d = desc_of(t);
    CHECK_OK(moe_layer_new(&t->plain, &d));
    if (t->mask) moe_layer_side(t->plain)->mask = t->masked;
    moe_layer_side(t->plain)->evaluate = t->evaluate;
    if (t->evaluate) CHECK_OK(moe_forward(t->plain, t->x, t->tokens, t->y[0]));
    for (size_t step = 0; step < t->steps && !t->evaluate; step++) {
        for (int i = 0; i <= t->micro; i++) {
            CHECK_OK(moe_forward(t->plain, t->x, t->tokens, t->y[0]));
            CHECK_OK(moe_backward(t->plain, t->dy, t->dx[0]));
        }
        moe_layer_losses(t->plain, t->loss[0], NULL);
        CHECK_OK(moe_step(t->plain, t->lr));
    }
    t->hash[0] = moe_layer_hash(t->plain);
}
static void play_ranks(trial *t) {
    pthread_t thread[MOST_RANKS];
    player players[MOST_RANKS];
    memset(t->status, 0xff, sizeof t->status);
    t->in.size = t->size;
    pthread_mutex_init(&t->in.lock, NULL);
    pthread_cond_init(&t->in.bell, NULL);
    for (size_t r = 0; r < t->size; r++) {
        players[r].of = t, players[r].rank = r;
        pthread_create(&thread[r], NULL, play, &players[r]);
    }
    for (size_t r = 0; r < t->size; r++) pthread_join(thread[r], NULL);
    for (size_t r = 0; r < t->size; r++) not_under_way(&(seat){&t->in, r}); /* however it ended */
    test_fail_at = -1;
    pthread_cond_destroy(&t->in.bell);
    pthread_mutex_destroy(&t->in.lock);
}
static trial trial_of(const char *text, size_t size, size_t tokens, size_t steps) {
    trial t;
    memset(&t, 0, sizeof t);
    t.text = text, t.size = size, t.tokens = tokens, t.steps = steps, t.lr = 0.02f;
    return t;
}
static int same_hashes(const trial *t) {
    int same = 1;
    for (size_t r = 0; r < t->size; r++) same &= t->rank_hash[r] == t->hash[0];
    return same;
}
static void check_sent(const trial *t) { /* bytes, as the ranks report them */
    CHECK(t->weight_bytes == t->moved);
    CHECK(t->row_bytes + t->weight_bytes + t->other_bytes == t->in.sent);
}
static void check_bits(trial t) {
    int errors = test_errors;
    trial_begin(&t);
    play_plain(&t);
    play_ranks(&t);
    for (size_t r = 0; r < t.size; r++) CHECK_OK(t.status[r]);
    CHECK(t.in.wrong == 0 && (t.in.begun > 0) == (t.overlap && t.size > 1));
    CHECK_SAME(t.y[1], t.y[0], t.tokens * D);
    CHECK_SAME(t.dx[1], t.dx[0], t.tokens * D);
    CHECK(same_hashes(&t));
    check_sent(&t);
    for (int i = 0; i < MOE_LOSS_COUNT; i++) CHECK_NEAR(t.loss[1][i], t.loss[0][i], 1e-12);
    if (test_errors != errors)
        printf("    P = %zu, uneven %d, shards %d, overlap %d: %s\n", t.size, t.uneven, t.shards, t.overlap, t.text);
    trial_end(&t);
}
static void check_ways(trial t) { /* whole and at once, and what is harder */
    check_bits(t);
    t.shards = t.overlap = 1;
    check_bits(t);
}

/* Every kind of thing that ranks share or send. */
static const char *const alike[] = {
    "",
    "top_k=1 gate=softmax normalize=false loss.switch=0.1 loss.z=0.01 loss.locality=0.1 n_ranks=8",
    "n_shared=1 shared_gate=true bias=true gate=sigmoid controller=bias controller_rate=0.05 loss.rank=0.1 n_ranks=4",
    "expert_norm=true input_scale=2 expert=gelu loss.importance=0.1 loss.kl-uniform=0.2 loss.entropy=0.05",
    "n_experts=12 n_zero=1 n_copy=1 n_constant=2 score=tanh loss.switch=0.05 switch_load=first",
    "noise=gaussian jitter=0.1 random_second=true loss.switch=0.05 switch_load=tokens top_k=3 random_steps=2",
    "combine=robust top_k=3 noise=learned loss.simbal=0.1",
    "combine=input top_k=2 router_bias=true loss.l2-uniform=1 loss.kl-reverse=0.1 loss.certainty=0.1",
    "score=slice top_k=1 normalize=false noise=gaussian loss.switch=0.01 loss.locality=0.1 n_ranks=8",
    "gate=relu select=threshold loss.relu-l1=0.01 controller=relu-lambda fallback=false normalize=false",
    "top_k=1 normalize=false capacity_factor=1 gate_drop=0.5 n_ranks=8 loss.switch=0.01 sequence=8 "
    "capacity_sequence=true",
    "gate=sparsemixer select=sampled top_k=2 expert=relu",
    "gate=sign select=threshold score=linear optimizer=sgd",
};
enum { ALIKE = sizeof alike / sizeof *alike };
static void test_alike(void) {
    for (size_t i = 0; i < ALIKE; i++)
        for (size_t size = 1; size <= 8; size *= 2) {
            trial t = trial_of(alike[i], size, 64, 3);
            t.micro = size == 2;
            check_ways(t);
        }
}
/* Ranks with few tokens, one without any; a mask. */
static void test_uneven(void) {
    for (size_t i = 0; i < ALIKE; i++) {
        trial t = trial_of(alike[i], i % 2 ? 8 : 4, 40, 2);
        if (strstr(alike[i], "n_ranks") || strstr(alike[i], "sequence")) continue;
        t.uneven = 1;
        t.mask = i % 3 == 0;
        check_ways(t);
    }
}
static void test_evaluation(void) {
    static const char *const text[] = {"noise=gaussian gate_drop=1 n_ranks=4", "training=false n_shared=1 prune=0.1"};
    for (size_t i = 0; i < 4; i++) {
        trial t = trial_of(text[i % 2], 4, 40, 1);
        t.evaluate = 1;
        t.plan.llep = i > 1;
        t.plan.min_tokens = 1;
        t.skew = 0.8;
        check_ways(t);
    }
}
static void test_long(void) {
    for (size_t size = 1; size <= 8; size++) {
        int prime = size == 5 || size == 7;
        trial t = trial_of(prime ? "n_experts=35 d_ff=5 n_shared=1 loss.switch=0.05 noise=gaussian"
                                 : "n_experts=24 d_ff=5 n_shared=1 loss.switch=0.05 noise=gaussian",
                           size, 42, TEST_SANITIZED ? 2 : 20);
        t.shards = size % 2;
        t.overlap = size > 3;
        check_bits(t);
    }
}

/* -- LLEP: outputs and dx are the same bits, gradients of a split expert within rounding -- */
static void check_near_layers(const trial *t) {
    for (size_t i = 0; i < moe_layer_tensors(t->plain); i++) {
        moe_tensor tensor;
        CHECK_OK(moe_layer_tensor(t->plain, i, &tensor));
        float *want = (float *)malloc(tensor.count * sizeof(float));
        float *got = (float *)malloc(tensor.count * sizeof(float));
        CHECK_OK(moe_layer_get(t->plain, MOE_PART_PARAMS, tensor.name, want, tensor.count));
        for (size_t r = 0; r < t->size; r++) {
            double worst = 0;
            CHECK_OK(moe_layer_get(t->of[r], MOE_PART_PARAMS, tensor.name, got, tensor.count));
            for (size_t k = 0; k < tensor.count; k++) worst = fmax(worst, fabs((double)got[k] - (double)want[k]));
            CHECK(worst <= 1e-6);
            CHECK(t->rank_hash[r] == t->rank_hash[0]);
        }
        free(want), free(got);
    }
}
static void test_llep(void) {
    static const double skews[] = {0, 0.5, 0.8, 0.95};
    for (size_t size = 1; size <= 8; size++)
        for (size_t i = 0; i < 4; i++)
            for (int steps = 1; steps <= 20; steps += 19) {
                static const char *const text[] = {
                    "top_k=1 normalize=false optimizer=sgd bias=true loss.switch=0.01 n_experts=24",
                    "top_k=1 normalize=false optimizer=sgd bias=true loss.switch=0.01 n_experts=35"};
                trial t = trial_of(text[24 % size != 0], size, 160, (size_t)steps);
                if (TEST_SANITIZED && (size & (size - 1)) && i < 3) continue;
                if (TEST_SANITIZED && steps > 1) t.steps = 2;
                t.skew = skews[i];
                t.lr = 1e-4f; /* momentum */
                t.plan.llep = 1;
                t.plan.min_tokens = 4;
                t.micro = size == 4; /* a helper must not keep what it sent home */
                t.shards = i % 2;
                t.overlap = i > 1;
                trial_begin(&t);
                play_plain(&t);
                play_ranks(&t);
                for (size_t r = 0; r < size; r++) CHECK_OK(t.status[r]);
                if (steps == 1) {
                    CHECK_SAME(t.y[1], t.y[0], t.tokens * D);
                    CHECK_SAME(t.dx[1], t.dx[0], t.tokens * D);
                }
                check_near_layers(&t);
                CHECK(t.over == 0 && t.in.wrong == 0);
                if (i == 3 && size == 8) CHECK(t.standard >= 5 * t.most);
                check_sent(&t);
                if (i == 3 && size > 1) CHECK(t.weight_bytes > 0 && t.standard >= 0.95 * (double)t.tokens);
                trial_end(&t);
            }
}
/* The mean probabilities of all tokens go from rank to rank, and back to all, only where a loss reads them. */
static void test_mean(void) {
    uint64_t bytes[2];
    for (int i = 0; i < 2; i++) {
        trial t = trial_of(i ? "top_k=1 normalize=false loss.importance=0.1" : "top_k=1 normalize=false", 4, 16, 1);
        trial_begin(&t);
        play_ranks(&t);
        for (size_t r = 0; r < 4; r++) CHECK_OK(t.status[r]);
        bytes[i] = t.other_bytes;
        trial_end(&t);
    }
    CHECK(bytes[1] - bytes[0] == 2 * 3 * 8 * sizeof(double)); /* 8 experts, to three others, twice */
}
/* A shared draw: a step without an exchange sends no rows, another as many as leave their rank. */
static void test_dropout(void) {
    uint64_t bytes[3];
    for (int i = 0; i < 3; i++) {
        static const char *const text[] = {
            "top_k=1 normalize=false n_ranks=4", "top_k=1 normalize=false n_ranks=4 gate_drop=1",
            "top_k=1 normalize=false n_ranks=4 gate_drop=1 gate_drop_experts=true"};
        trial t = trial_of(text[i], 4, 64, 2);
        t.plan.llep = i == 1;
        trial_begin(&t);
        play_ranks(&t);
        for (size_t r = 0; r < 4; r++) CHECK_OK(t.status[r]);
        bytes[i] = t.row_bytes;
        trial_end(&t);
    }
    CHECK(bytes[0] > 0 && bytes[1] == 0 && bytes[2] == 0);
    trial t = trial_of("top_k=1 normalize=false n_ranks=4 gate_drop=1", 4, 64, 2);
    t.plan.llep = t.plan.by_expert = 1;
    t.plan.alpha = 0.5; /* no rank may have its 16 tokens: LLEP would move them, and rests */
    t.plan.min_tokens = 1;
    t.shards = 1;
    check_bits(t);
    trial_begin(&t);
    play_ranks(&t);
    CHECK(t.row_bytes == 0 && t.weight_bytes == 0 && t.guest_bytes == 0 && t.most == 16);
    trial_end(&t);
    t.text = "top_k=1 normalize=false n_ranks=4";
    trial_begin(&t);
    play_ranks(&t);
    CHECK(t.weight_bytes > 0 && t.guest_bytes > 0 && t.guest_bytes <= t.weight_bytes);
    check_sent(&t);
    trial_end(&t);
}

/* -- a shard: a rank's own experts -- */
enum { SHARD_F = 1568 }; /* floats of an expert: panels of 32 columns, 2 of 16 rows for w1 and wu, 1 of 17 for w2 */
static void check_slice(const moe_layer *whole, const moe_layer *shard, size_t rank, size_t size) {
    moe_tensor all, mine;
    CHECK(moe_layer_tensors(whole) == moe_layer_tensors(shard));
    for (size_t i = 0; i < moe_layer_tensors(whole); i++) {
        CHECK_OK(moe_layer_tensor(whole, i, &all));
        CHECK_OK(moe_layer_tensor(shard, i, &mine));
        float *a = (float *)malloc(all.count * sizeof(float)), *b = (float *)malloc(mine.count * sizeof(float));
        size_t each = all.count / all.dim[0], held = 8 / size;
        int experts = !strncmp(all.name, "experts.w", 9) || !strncmp(all.name, "experts.b", 9);
        CHECK(mine.dim[0] == all.dim[0] - (experts ? 8 - held : 0));
        for (int part = 0; part < MOE_PART_COUNT; part++) {
            if (part == MOE_PART_GRADS) continue;
            CHECK_OK(moe_layer_get(whole, (moe_part_kind)part, all.name, a, all.count));
            CHECK_OK(moe_layer_get(shard, (moe_part_kind)part, all.name, b, mine.count));
            if (!experts) CHECK_SAME(b, a, all.count);
            if (!experts) continue;
            CHECK_SAME(b, a + rank * held * each, held * each);
            CHECK_SAME(b + held * each, a + 8 * each, mine.count - held * each); /* the shared ones */
        }
        free(a), free(b);
    }
}
static moe_layer *stepped(const moe_desc *d) { /* a whole layer with moments */
    moe_layer *whole = NULL;
    float x[6 * D], y[6 * D];
    CHECK_OK(moe_rand_normal(7, 1, 6 * D, 0, 1, x));
    CHECK_OK(moe_layer_new(&whole, d));
    CHECK_OK(moe_forward(whole, x, 6, y));
    CHECK_OK(moe_backward(whole, x, NULL));
    CHECK_OK(moe_step(whole, 0.1f));
    return whole;
}
static void test_shard(void) {
    trial t = trial_of("n_shared=2 shared_gate=true bias=true controller=bias optimizer=adamw", 4, 4, 1);
    moe_desc d = desc_of(&t);
    moe_layer *fresh = NULL, *whole = stepped(&d), *shard = NULL, *loaded = NULL;
    CHECK_OK(moe_layer_new(&fresh, &d));
    for (size_t size = 1; size <= 8; size *= 2)
        for (size_t rank = 0; rank < size; rank++) {
            size_t bytes;
            CHECK_OK(moe_layer_new_shard(&shard, &d, rank, size));
            check_slice(fresh, shard, rank, size);
            moe_layer_free(shard);
            CHECK_OK(moe_layer_shard(whole, rank, size, &shard));
            check_slice(whole, shard, rank, size);
            CHECK_OK(moe_layer_save_size(shard, 1, &bytes)); /* a part to a file, and back */
            void *file = malloc(bytes);
            CHECK_OK(moe_layer_save_memory(shard, 1, file, bytes));
            CHECK_OK(moe_layer_load_memory(&loaded, file, bytes, NULL));
            check_slice(whole, loaded, rank, size);
            CHECK(moe_layer_hash(loaded) == moe_layer_hash(shard));
            float state[2][8];
            CHECK_OK(moe_layer_get(loaded, MOE_PART_PARAMS, "controller.state", state[0], 8));
            CHECK_OK(moe_layer_get(whole, MOE_PART_PARAMS, "controller.state", state[1], 8));
            CHECK_SAME(state[0], state[1], 8);
            free(file);
            moe_layer_free(loaded);
            moe_layer_free(shard);
        }
    moe_layer_free(fresh);
    moe_layer_free(whole);
    t.text = "noise=gaussian"; /* a part goes on where the whole's draws are */
    d = desc_of(&t);
    float x[6 * D], y[2][6 * D];
    whole = stepped(&d);
    CHECK_OK(moe_layer_shard(whole, 0, 1, &shard));
    CHECK_OK(moe_rand_normal(7, 2, 6 * D, 0, 1, x));
    CHECK_OK(moe_forward(whole, x, 6, y[0]));
    CHECK_OK(moe_forward(shard, x, 6, y[1]));
    CHECK_SAME(y[1], y[0], 6 * D);
    moe_layer_free(whole);
    moe_layer_free(shard);
}
/* Parts that come back from files train on as the layer that was never cut. */
typedef struct cut { trial *of; size_t rank; const moe_layer *from; moe_layer *whole; moe_status status; } cut;
static void *play_cut(void *arg) {
    cut *c = (cut *)arg;
    trial *t = c->of;
    seat at = {&t->in, c->rank};
    moe_ep_engine engine = {c->rank, t->size, hall_exchange, hall_sum, hall_broadcast, &at, hall_begin, hall_wait};
    moe_layer *shard = NULL, *layer = NULL, *none = NULL;
    moe_ranks *ranks = NULL;
    size_t bytes, first = c->rank * t->tokens / t->size, n = t->tokens / t->size;
    pthread_mutex_lock(&t->in.lock);
    CHECK_OK(moe_layer_shard(c->from, c->rank, t->size, &shard));
    CHECK_OK(moe_layer_save_size(shard, 1, &bytes));
    void *file = malloc(bytes);
    CHECK_OK(moe_layer_save_memory(shard, 1, file, bytes));
    CHECK_OK(moe_layer_load_memory(&layer, file, bytes, NULL));
    CHECK_OK(moe_ranks_new(&ranks, layer, &engine, NULL));
    const moe_ep_report *report = moe_ranks_report(ranks);
    for (int part = 0; part < MOE_PART_COUNT; part++)
        CHECK(report->part_bytes[part] == (8 / t->size * SHARD_F + D * 8) * sizeof(float));
    CHECK(report->expert_bytes == 8 / t->size * SHARD_F * sizeof(float) && report->n_chunks == (t->size > 2 ? 2 : 4));
    c->status = moe_ep_forward(ranks, t->x + first * D, n, t->y[1] + first * D);
    if (!c->status) c->status = moe_ep_backward(ranks, t->dy + first * D, t->dx[1] + first * D);
    if (!c->status) c->status = moe_step(layer, 0.02f);
    if (!c->status) c->status = moe_ep_collect(ranks, 1, &c->whole);
    CHECK_STATUS(moe_ep_collect(ranks, t->size, &none), MOE_E_SHARD_RANK);
    moe_layer_free(shard);
    moe_ranks_free(ranks);
    moe_layer_free(layer);
    free(file);
    pthread_mutex_unlock(&t->in.lock);
    return NULL;
}
static void test_cut(void) {
    for (size_t size = 2; size <= 4; size *= 2) {
        trial t = trial_of("optimizer=adamw", size, 48, 1);
        moe_desc d = desc_of(&t);
        moe_layer *whole = stepped(&d);
        pthread_t thread[4];
        cut cuts[4];
        trial_begin(&t);
        t.in.size = size;
        pthread_mutex_init(&t.in.lock, NULL);
        pthread_cond_init(&t.in.bell, NULL);
        for (size_t r = 0; r < size; r++) {
            cut c = {&t, r, whole, NULL, MOE_E_EP_EXCHANGE};
            cuts[r] = c;
        }
        for (size_t r = 0; r < size; r++) pthread_create(&thread[r], NULL, play_cut, &cuts[r]);
        for (size_t r = 0; r < size; r++) pthread_join(thread[r], NULL);
        CHECK_OK(moe_forward(whole, t.x, 48, t.y[0]));
        CHECK_OK(moe_backward(whole, t.dy, t.dx[0]));
        CHECK_OK(moe_step(whole, 0.02f));
        CHECK_SAME(t.y[1], t.y[0], 48 * D);
        CHECK_SAME(t.dx[1], t.dx[0], 48 * D);
        for (size_t r = 0; r < size; r++) CHECK_OK(cuts[r].status);
        for (size_t r = 0; r < size; r++) CHECK((cuts[r].whole != NULL) == (r == 1));
        check_slice(whole, cuts[1].whole, 0, 1); /* moments too */
        CHECK(moe_layer_hash(cuts[1].whole) == moe_layer_hash(whole) && t.in.wrong == 0);
        moe_layer_free(cuts[1].whole);
        moe_layer_free(whole);
        pthread_cond_destroy(&t.in.bell);
        pthread_mutex_destroy(&t.in.lock);
        trial_end(&t);
    }
}
/* What a shard cannot do says so, and nothing reads the experts that it has not. */
static void test_shard_refused(void) {
    trial t = trial_of("", 1, 4, 1);
    moe_desc d = desc_of(&t);
    moe_layer *whole = stepped(&d), *shard = NULL, *out = NULL;
    moe_ranks *ranks = NULL;
    moe_tape *tape = NULL;
    float x[6 * D] = {0}, y[6 * D];
    double number, worth[8];
    moe_ep_engine engine = {1, 2, hall_exchange, hall_sum, hall_broadcast, NULL, NULL, NULL};
    static const size_t wrong[][2] = {{0, 0}, {2, 2}, {0, 3}, {0, 16}, {9, 8}};
    moe_layer_formats formats;
    memset(&formats, 0, sizeof formats);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        CHECK_STATUS(moe_layer_new_shard(&out, &d, wrong[i][0], wrong[i][1]), MOE_E_SHARD_RANK);
        CHECK_STATUS(moe_layer_shard(whole, wrong[i][0], wrong[i][1], &out), MOE_E_SHARD_RANK);
    }
    CHECK_STATUS(moe_layer_new_shard(NULL, &d, 0, 1), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_shard(whole, 0, 1, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_layer_shard(NULL, 0, 1, &out), MOE_E_NULL_LAYER);
    test_fail_at = 0;
    CHECK_STATUS(moe_layer_shard(whole, 0, 2, &out), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    CHECK_OK(moe_layer_shard(whole, 0, 2, &shard));
    CHECK_OK(moe_tape_new(&tape, &d, 6, MOE_ON));
    CHECK_STATUS(moe_layer_shard(shard, 0, 2, &out), MOE_E_SHARD);
    CHECK_STATUS(moe_forward(shard, x, 6, y), MOE_E_SHARD);
    CHECK_STATUS(moe_backward(shard, x, NULL), MOE_E_NO_FORWARD);
    CHECK_OK(moe_forward_tape(whole, tape, x, 6, y));
    CHECK_STATUS(moe_backward_tape(shard, tape, x, NULL), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_experts(shard, tape, y), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_pes(shard, x, 6, &number), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_worth(shard, MOE_WORTH_USAGE, x, 6, worth), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_quantize(shard, &formats, &out), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_prune(&out, shard, 1, wrong[0]), MOE_E_SHARD);
    CHECK_STATUS(moe_layer_clone(&out, shard, 0, 0.1f, 0.5f, 1), MOE_E_SHARD);
    CHECK_STATUS(moe_ranks_new(&ranks, shard, &engine, NULL), MOE_E_SHARD_RANK); /* rank 0's as rank 1 */
    engine.rank = 0, engine.size = 4;
    CHECK_STATUS(moe_ranks_new(&ranks, shard, &engine, NULL), MOE_E_SHARD_RANK);
    engine.size = 2, engine.wait = hall_wait;
    CHECK_STATUS(moe_ranks_new(&ranks, shard, &engine, NULL), MOE_E_EP_ENGINE); /* a wait without begin */
    CHECK_STATUS(moe_ep_collect(NULL, 0, &out), MOE_E_NULL_RANKS);
    CHECK(!out && !ranks);
    moe_tape_free(tape);
    moe_layer_free(shard);
    moe_layer_free(whole);
    CHECK(test_live_blocks == 0);
}
/* A dy that is not finite moves no gradient; a number spoiled on its way back none of the experts that it reaches. */
static void *play_dy(void *arg) {
    cut *c = (cut *)arg;
    trial *t = c->of;
    seat at = {&t->in, c->rank};
    moe_ep_engine engine = {c->rank, t->size, hall_exchange, hall_sum, hall_broadcast, &at, NULL, NULL};
    moe_desc d = desc_of(t);
    moe_layer *layer = NULL;
    moe_ranks *ranks = NULL;
    size_t first = c->rank * t->tokens / t->size, n = t->tokens / t->size, count = 8 / t->size * D * 17;
    float *grad[2] = {(float *)calloc(count, sizeof(float)), (float *)calloc(count, sizeof(float))};
    if (t->overlap) engine.begin = hall_begin, engine.wait = hall_wait;
    pthread_mutex_lock(&t->in.lock);
    CHECK_OK(moe_layer_new_shard(&layer, &d, c->rank, t->size));
    CHECK_OK(moe_ranks_new(&ranks, layer, &engine, NULL));
    for (int i = 0; i < 2; i++) { /* the second time it goes wrong */
        CHECK_OK(moe_ep_forward(ranks, t->x + first * D, n, t->y[1] + first * D));
        CHECK_OK(moe_layer_get(layer, MOE_PART_GRADS, "experts.w1", grad[0], count));
        int last = i && c->rank == t->size - 1;
        if (last && t->in.kind == BAD_ROW) t->in.at = t->in.done[t->size - 1] + t->in.limit;
        if (last && t->in.kind == NO_FAULT) t->dy[t->tokens * D - 1] = NAN;
        c->status = moe_ep_backward(ranks, t->dy + first * D, NULL);
    }
    CHECK_OK(moe_layer_get(layer, MOE_PART_GRADS, "experts.w1", grad[1], count));
    if (t->in.kind == NO_FAULT) CHECK_SAME(grad[1], grad[0], count);
    for (size_t i = 0; i < count; i++) if (!CHECK(isfinite(grad[1][i]))) break;
    moe_ranks_free(ranks);
    moe_layer_free(layer);
    free(grad[0]), free(grad[1]);
    pthread_mutex_unlock(&t->in.lock);
    return NULL;
}
static size_t spoiled(int overlap, fault kind, size_t call) { /* ranks that saw it */
    trial t = trial_of("top_k=1 normalize=false", 4, 48, 1);
    pthread_t thread[4];
    cut cuts[4];
    size_t seen = 0;
    trial_begin(&t);
    t.overlap = overlap;
    t.in.size = 4, t.in.kind = kind, t.in.at = SIZE_MAX, t.in.limit = call;
    pthread_mutex_init(&t.in.lock, NULL);
    pthread_cond_init(&t.in.bell, NULL);
    for (size_t r = 0; r < 4; r++) cuts[r].of = &t, cuts[r].rank = r;
    for (size_t r = 0; r < 4; r++) pthread_create(&thread[r], NULL, play_dy, &cuts[r]);
    for (size_t r = 0; r < 4; r++) pthread_join(thread[r], NULL);
    for (size_t r = 0; r < 4; r++) seen += cuts[r].status == MOE_E_EP_ROWS;
    pthread_cond_destroy(&t.in.bell);
    pthread_mutex_destroy(&t.in.lock);
    trial_end(&t);
    return seen;
}
static void test_dy(void) {
    for (int overlap = 0; overlap < 2; overlap++) {
        CHECK(spoiled(overlap, NO_FAULT, 0) == 4);
        size_t ends = 0;
        for (size_t call = 0; call < 12; call++) ends += spoiled(overlap, BAD_ROW, call) == 4;
        printf("    %zu of a backward's first 12 calls ended by NaN\n", ends);
        CHECK(ends >= 2);
    }
}

/* -- what goes wrong on one rank ends the call on all -- */
static size_t named_rows; /* of MOE_E_EP_ROWS itself */
/* Returns whether it ended with a status; *calls: what the last rank made of the engine. */
static int play_fault(fault kind, size_t at, int way, size_t *calls) {
    trial t = trial_of("top_k=1 normalize=false n_shared=1 loss.switch=0.01 loss.importance=0.1", 4, 48, 1);
    if (kind == BAD_FIRST) t.text = "top_k=1 normalize=false expert=relu", t.evaluate = 1;
    t.skew = 0.9;
    t.plan.llep = way > 0;
    t.shards = t.overlap = way > 1;
    t.plan.min_tokens = 4;
    t.in.kind = kind;
    t.in.at = at;
    trial_begin(&t);
    play_ranks(&t);
    *calls = t.in.done[3];
    CHECK(t.in.wrong == 0);
    int ended = t.status[0] != MOE_OK;
    for (size_t r = 1; r < 4; r++) CHECK((t.status[r] != MOE_OK) == ended);
    for (size_t r = 1; r < 4 && kind != FAILS && kind != LATE; r++) CHECK_STATUS(t.status[r], t.status[0]);
    if (kind == FAILS || kind == LATE)
        for (size_t r = 0; r < 4; r++) CHECK_STATUS(t.status[r], MOE_E_EP_EXCHANGE);
    if (kind == ALLOCATION && ended) CHECK_STATUS(t.status[0], MOE_E_NO_MEMORY);
    if ((kind == BAD_ROW || kind == BAD_FIRST) && ended)
        CHECK(moe_status_kind(t.status[0]) == MOE_KIND_NUMBER && t.status[0] != MOE_E_EP_COUNTS);
    if (kind == BAD_ROW) named_rows += t.status[0] == MOE_E_EP_ROWS;
    if (kind == BAD_COUNT && ended) CHECK(t.status[0] == MOE_E_EP_COUNTS || t.status[0] == MOE_E_EP_DIFFER);
    trial_end(&t);
    return ended;
}
/* A weight on its way to who helps becomes NaN, and the ReLU behind it makes it 0, so that no output shows it: of the
 * three exchanges of an evaluation (weights, rows there, rows back) each must end it. */
static void test_hidden(void) {
    size_t calls, ends = 0;
    for (size_t at = 0; at < 15; at++) ends += (size_t)play_fault(BAD_FIRST, at, 1, &calls);
    CHECK(ends == 3);
}
static void test_faults(void) {
    static const size_t least[3] = {2, 5, 7}; /* exchanges whose last number matters to somebody */
    size_t all, calls;
    for (int way = 0; way < 3; way++) { /* standard; LLEP; LLEP of shards, with begin and wait */
        size_t rows = 0, counts = 0, lost = 0;
        CHECK(!play_fault(NO_FAULT, 0, way, &all));
        CHECK(all > 15);
        for (size_t at = 0; at < all; at++) {
            CHECK(play_fault(FAILS, at, way, &calls) && calls >= at + 1 && calls <= at + (way > 1 ? 3 : 1));
            rows += (size_t)play_fault(BAD_ROW, at, way, &calls);
            counts += (size_t)play_fault(BAD_COUNT, at, way, &calls);
        }
        for (size_t at = 0; at < 40; at++) lost += (size_t)play_fault(ALLOCATION, at, way, &calls);
        for (size_t at = 0; way && at < all; at += all / (way > 1 ? 7 : 2)) CHECK(play_fault(LATE, at, way, &calls));
        printf("    calls %zu; ended by NaN rows %zu, bad counts %zu, allocations %zu\n", all, rows, counts, lost);
        CHECK(rows >= least[way] && counts >= 8 && lost >= 4);
    }
    CHECK(named_rows >= 3);
    CHECK(test_live_blocks == 0);
}

static void test_refused(void) {
    static const char *const cannot[] = {"combine=soft select=all", "combine=merge select=all", "n_codes=16 top_k=2",
                                         "score=subspace expert=orthonormal d_ff=2", "clip_norm=1",
                                         "controller=quantile", "loss.redundancy=0.1", "loss.mutual-information=0.1"};
    moe_ep_engine one = {0, 1, NULL, NULL, NULL, NULL, NULL, NULL}, two = one;
    two.size = 2;
    moe_ep_desc plan;
    moe_layer *layer = NULL;
    moe_ranks *ranks = NULL;
    trial t = trial_of("n_experts=7", 1, 4, 1);
    float x[2 * D] = {0};
    for (size_t i = 0; i < sizeof cannot / sizeof *cannot; i++) {
        t.text = cannot[i];
        moe_desc d = desc_of(&t);
        CHECK_OK(moe_layer_new(&layer, &d));
        CHECK_STATUS(moe_ranks_new(&ranks, layer, &one, NULL), MOE_E_EP_DESC);
        moe_layer_free(layer);
    }
    t.text = "n_experts=7";
    moe_desc d = desc_of(&t);
    CHECK_OK(moe_layer_new(&layer, &d));
    CHECK_STATUS(moe_ranks_new(NULL, layer, &one, NULL), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_ranks_new(&ranks, NULL, &one, NULL), MOE_E_NULL_LAYER);
    CHECK_STATUS(moe_ranks_new(&ranks, layer, NULL, NULL), MOE_E_EP_ENGINE);
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &two, NULL), MOE_E_EP_ENGINE);
    two.exchange = hall_exchange;
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &two, NULL), MOE_E_EP_ENGINE);
    two.sum = hall_sum;
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &two, NULL), MOE_E_EP_ENGINE);
    two.broadcast = hall_broadcast;
    static const moe_layer_formats int8 = {MOE_FORMAT_INT8, NULL, MOE_OFF, 0, NULL};
    for (int kind = 0; kind < 2; kind++) { /* experts in formats, and pairs */
        moe_layer *other = NULL;
        CHECK_OK(kind ? moe_layer_split(&other, layer, 1, NULL) : moe_layer_quantize(layer, &int8, &other));
        CHECK_STATUS(moe_ranks_new(&ranks, other, &one, NULL), MOE_E_EP_DESC);
        moe_layer_free(other);
    }
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &two, NULL), MOE_E_RANKS); /* 2 does not divide 7 */
    two.rank = 2;
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &two, NULL), MOE_E_EP_ENGINE);
    memset(&plan, 0, sizeof plan);
    plan.lambda = 0.5;
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &one, &plan), MOE_E_EP_LAMBDA);
    CHECK(!ranks);
    CHECK_STATUS(moe_ep_forward(NULL, x, 2, x), MOE_E_NULL_RANKS);
    CHECK_STATUS(moe_ep_backward(NULL, x, x), MOE_E_NULL_RANKS);
    CHECK_STATUS(moe_ep_gather(NULL), MOE_E_NULL_RANKS);
    CHECK(!moe_ranks_report(NULL) && !moe_ranks_tape(NULL));
    moe_ranks_free(NULL);
    test_fail_at = 0;
    CHECK_STATUS(moe_ranks_new(&ranks, layer, &one, NULL), MOE_E_NO_MEMORY);
    test_fail_at = -1;
    CHECK_OK(moe_ranks_new(&ranks, layer, &one, NULL));
    float y[2 * D], dx[2 * D];
    CHECK_STATUS(moe_ep_backward(ranks, x, dx), MOE_E_NO_FORWARD);
    CHECK_STATUS(moe_ep_forward(ranks, NULL, 2, y), MOE_E_NULL_X);
    CHECK_STATUS(moe_ep_forward(ranks, x, 2, NULL), MOE_E_NULL_Y);
    x[3] = NAN;
    CHECK_STATUS(moe_ep_forward(ranks, x, 2, y), MOE_E_NAN_X);
    CHECK(moe_ranks_tape(ranks)->bad_token == 0);
    x[3] = 1;
    CHECK_OK(moe_ep_forward(ranks, x, 2, y));
    CHECK_STATUS(moe_ep_backward(ranks, NULL, dx), MOE_E_NULL_DY);
    CHECK_OK(moe_ep_backward(ranks, x, dx));
    CHECK_STATUS(moe_ep_backward(ranks, x, dx), MOE_E_NO_FORWARD);
    CHECK_OK(moe_ep_forward(ranks, NULL, 0, NULL));
    CHECK_OK(moe_ep_backward(ranks, NULL, NULL));
    moe_ranks_free(ranks);
    moe_layer_free(layer);
    CHECK(test_live_blocks == 0);
}

int main(void) {
    RUN(test_alike);
    RUN(test_uneven);
    RUN(test_evaluation);
    RUN(test_long);
    RUN(test_llep);
    RUN(test_mean);
    RUN(test_dropout);
    RUN(test_shard);
    RUN(test_cut);
    RUN(test_shard_refused);
    RUN(test_dy);
    RUN(test_hidden);
    RUN(test_faults);
    RUN(test_refused);
    return test_end();
}

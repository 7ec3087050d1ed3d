/* Ranks hold blocks of consecutive experts and tokens, as even as they can be. moe_ep_plan: against the source's pseudo
 * code with a look at every rank for every piece, properties that any plan must have, hand values, and time. */
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"

#include <time.h>

static void check_blocks(size_t (*rank_of)(size_t, size_t, size_t), size_t count, size_t ranks) {
    size_t last = 0, held[17] = {0};
    for (size_t i = 0; i < count; i++) {
        size_t rank = rank_of(i, count, ranks);
        if (!CHECK(rank < ranks && rank >= last)) return;
        last = rank;
        held[rank]++;
    }
    for (size_t rank = 0; rank < ranks; rank++) CHECK(held[rank] >= count / ranks && held[rank] <= count / ranks + 1);
}

static void test_blocks(void) {
    for (size_t ranks = 1; ranks <= 17; ranks++)
        for (size_t count = ranks; count < 70; count++) {
            check_blocks(moe__placement_of_expert, count, ranks);
            check_blocks(moe__placement_of_token, count, ranks);
        }
}

#define MOST 64 /* experts of the random cases */
#define MOST_PARTS 20000

/* The pseudo code of LLEP, word for word: native and assigned load apart, all other ranks in order of their sum. In the
 * source what fits nowhere goes to one rank as a whole; cut: in pieces of m, while anything is free. */
typedef struct naive_part { size_t expert, rank; uint64_t begin, end; } naive_part;
static naive_part naive[MOST_PARTS];
static size_t n_naive, n_forced; /* n_forced: how often more than m fitted nowhere although something was free */
static int64_t ga[MOST], gp[MOST];
static void naive_add(size_t e, size_t g, uint64_t begin, uint64_t end) {
    naive_part *last = naive + n_naive - 1;
    if (n_naive && last->expert == e && last->rank == g && last->end == begin) { last->end = end; return; }
    if (n_naive == MOST_PARTS) return;
    naive_part part = {e, g, begin, end};
    naive[n_naive++] = part;
}
static void naive_spill(size_t n_ranks, size_t e, size_t home, int64_t r, int64_t off, int64_t cap, int64_t m,
                        int cut) {
    while (r > 0) {
        size_t order[MOST], n = 0, i;
        for (size_t g = 0; g < n_ranks; g++) {
            if (g == home) continue;
            size_t at = n++;
            for (; at && ga[order[at - 1]] + gp[order[at - 1]] > ga[g] + gp[g]; at--) order[at] = order[at - 1];
            order[at] = g;
        }
        int64_t c = 0;
        for (i = 0; i < n; i++) {
            c = cap - ga[order[i]] - gp[order[i]];
            if (c > r) c = r;
            if (!(c < m && r > c)) break;
        }
        if (i == n) { /* none fitted */
            int64_t free_there = cap - ga[order[0]] - gp[order[0]];
            i = 0;
            c = r;
            n_forced += free_there > 0 && r > m;
            if (cut && free_there > 0 && r > m) c = m;
        }
        naive_add(e, order[i], (uint64_t)off, (uint64_t)(off + c));
        ga[order[i]] += c, off += c, r -= c;
    }
}
static void naive_llep(size_t n_experts, size_t n_ranks, const uint64_t *load, int64_t cap, int64_t m, int cut) {
    size_t order[MOST], each = n_experts / n_ranks;
    memset(ga, 0, sizeof ga);
    memset(gp, 0, sizeof gp);
    n_naive = n_forced = 0;
    for (size_t e = 0; e < n_experts; e++) {
        size_t at = e;
        gp[e / each] += (int64_t)load[e];
        for (; at && load[order[at - 1]] < load[e]; at--) order[at] = order[at - 1];
        order[at] = e;
    }
    for (size_t i = 0; i < n_experts; i++) {
        size_t e = order[i], n = e / each;
        int64_t l = (int64_t)load[e];
        gp[n] -= l;
        int64_t na = cap - ga[n] - gp[n], keep = l;
        if (na < l) keep = na;
        if (keep < 0) keep = 0;
        if (keep) naive_add(e, n, 0, (uint64_t)keep);
        ga[n] += keep;
        naive_spill(n_ranks, e, n, l - keep, keep, cap, m, cut);
    }
}

/* A plan with memory of its own size exactly, and what holds for every plan. */
static moe_ep plan_of(const moe_ep_desc *desc, const uint64_t *load, void **memory) {
    moe_ep plan;
    size_t bytes = 0, moved = 0, parts = 0;
    uint64_t away = 0, total = 0, largest = 0, *work = (uint64_t *)calloc(desc->n_ranks, sizeof(uint64_t));
    memset(&plan, 0, sizeof plan);
    CHECK_OK(moe_ep_plan_size(desc, &bytes));
    *memory = malloc(bytes);
    memset(*memory, 0xa5, bytes);
    if (!CHECK_OK(moe_ep_plan(desc, load, &plan, *memory, bytes))) { free(work); return plan; }
    for (size_t e = 0; e < desc->n_experts; e++) {
        const moe_ep_part *part = plan.part + plan.first[e];
        size_t home = e / (desc->n_experts / desc->n_ranks);
        uint64_t at = 0;
        CHECK(plan.first[e] + plan.count[e] <= plan.n_parts);
        for (size_t i = 0; i < plan.count[e]; i++) { /* every token once, in order */
            if (!CHECK(part[i].expert == e && part[i].begin == at && part[i].end > at && part[i].rank < desc->n_ranks))
                break;
            int fresh = part[i].rank != home;
            if (fresh) away += part[i].end - at;
            else CHECK(i == 0);
            for (size_t j = 0; j < i; j++) fresh &= part[j].rank != part[i].rank;
            moved += (size_t)fresh;
            work[part[i].rank] += part[i].end - at;
            at = part[i].end;
        }
        CHECK(at == load[e]);
        parts += plan.count[e];
        total += load[e];
    }
    for (size_t g = 0; g < desc->n_ranks; g++) {
        CHECK(work[g] == plan.work[g]);
        if (work[g] > largest) largest = work[g];
    }
    CHECK(parts == plan.n_parts && moved == plan.n_moved && away == plan.n_away && total == plan.n_tokens);
    CHECK(largest == plan.makespan);
    CHECK_NEAR(plan.imbalance, total ? (double)largest * (double)desc->n_ranks / (double)total : 0.0, 1e-12);
    free(work);
    return plan;
}

/* Load number `kind` of the random cases: uniform, many zeros, powers, nearly all on one. */
static void random_load(uint64_t seed, size_t n, uint64_t *load) {
    uint32_t kind = moe_rand_u32(seed, 1, 0) % 4;
    for (size_t e = 0; e < n; e++) {
        uint64_t draw = moe_rand_u32(seed, 2, e);
        load[e] = draw % 500;
        if (kind == 1) load[e] = draw % 3 ? 0 : draw % 97;
        if (kind == 2) load[e] = (uint64_t)1 << draw % 14;
    }
    if (kind == 3) load[moe_rand_u32(seed, 3, 0) % n] = 20000;
}
static int same_as_naive(const moe_ep *plan) {
    size_t at = 0; /* the naive parts stand in the order in which the experts were treated */
    for (; at < n_naive && at < plan->n_parts; at++) {
        const moe_ep_part *part = plan->part + at;
        if (part->expert != naive[at].expert || part->rank != naive[at].rank || part->begin != naive[at].begin ||
            part->end != naive[at].end)
            return 0;
    }
    return n_naive == plan->n_parts;
}
static void test_naive(void) {
    static const size_t ranks[] = {1, 2, 3, 4, 8, 16}, each[] = {1, 2, 4};
    static const double alphas[] = {0, 0.5, 0.9, 1.25};
    static const uint64_t ms[] = {1, 7, 64, 1024};
    size_t acted = 0, as_source = 0, cut = 0;
    for (uint64_t seed = 0; seed < (TEST_SANITIZED ? 600 : 4000); seed++) {
        uint64_t load[MOST], total = 0;
        moe_ep_desc desc;
        void *memory;
        memset(&desc, 0, sizeof desc);
        desc.n_ranks = ranks[seed % 6];
        desc.n_experts = desc.n_ranks * each[seed / 6 % 3];
        desc.llep = 1;
        desc.lambda = 1;
        desc.alpha = alphas[seed / 18 % 4];
        desc.min_tokens = ms[seed / 72 % 4];
        random_load(seed, desc.n_experts, load);
        for (size_t e = 0; e < desc.n_experts; e++) total += load[e];
        double share = (double)total / (double)desc.n_ranks;
        if (desc.alpha > 0) share *= desc.alpha;
        uint64_t cap = (uint64_t)ceil(share);
        moe_ep plan = plan_of(&desc, load, &memory);
        if (plan.acts) {
            CHECK(plan.capacity == cap);
            naive_llep(desc.n_experts, desc.n_ranks, load, (int64_t)cap, (int64_t)desc.min_tokens, 1);
            CHECK(same_as_naive(&plan));
            acted++;
            cut += n_forced > 0;
            if (!n_forced) {
                naive_llep(desc.n_experts, desc.n_ranks, load, (int64_t)cap, (int64_t)desc.min_tokens, 0);
                CHECK(same_as_naive(&plan));
                as_source++;
            }
            if (!(desc.alpha > 0 && desc.alpha < 1)) CHECK(plan.makespan <= cap + desc.min_tokens);
        } else CHECK(desc.n_ranks == 1 || !total);
        free(memory);
    }
    CHECK(acted > 400 && as_source > acted / 2 && cut > 10);
}

/* E = 4, P = 2, by hand: 90 4 | 3 3, cap 50. Expert 0 keeps 50 - 4 and spills 44 to rank 1, which has 6: all fit. */
static void test_hand(void) {
    uint64_t load[4] = {90, 4, 3, 3};
    moe_ep_desc desc;
    void *memory;
    memset(&desc, 0, sizeof desc);
    desc.n_experts = 4, desc.n_ranks = 2, desc.llep = 1, desc.min_tokens = 10;
    moe_ep plan = plan_of(&desc, load, &memory);
    CHECK(plan.acts && plan.capacity == 50 && plan.n_parts == 5 && plan.n_moved == 1 && plan.n_away == 44);
    CHECK(plan.work[0] == 50 && plan.work[1] == 50 && plan.part[1].rank == 1 && plan.part[1].begin == 46);
    free(memory);
    desc.llep = 0;
    plan = plan_of(&desc, load, &memory);
    CHECK(!plan.acts && plan.n_parts == 4 && plan.n_moved == 0 && plan.work[0] == 94 && plan.makespan == 94);
    CHECK_NEAR(plan.imbalance, 1.88, 1e-12);
    free(memory);
}
/* Ranks 60 : 40 are at 1.2 of their mean, experts 40 20 20 20 at 1.6: which of them lambda asks. */
static void test_lambda(void) {
    uint64_t load[4] = {40, 20, 20, 20}, none[4] = {0, 0, 0, 0};
    moe_ep_desc desc;
    void *memory;
    memset(&desc, 0, sizeof desc);
    desc.n_experts = 4, desc.n_ranks = 2, desc.llep = 1, desc.min_tokens = 1;
    for (int by_expert = 0; by_expert < 2; by_expert++)
        for (int i = 0; i < 3; i++) {
            static const double lambdas[] = {0, 1.19, 1.61};
            desc.by_expert = by_expert;
            desc.lambda = lambdas[i];
            moe_ep plan = plan_of(&desc, load, &memory);
            CHECK(plan.acts == (by_expert ? i < 2 : i == 1));
            CHECK(plan.makespan == (plan.acts ? 50u : 60u) && (plan.n_moved > 0) == plan.acts);
            free(memory);
        }
    moe_ep plan = plan_of(&desc, none, &memory);
    CHECK(!plan.acts && !plan.n_parts && !plan.makespan);
    free(memory);
}

static void skewed(size_t n, uint64_t tokens, size_t hot, uint64_t *load) { /* 95% on one */
    for (size_t e = 0; e < n; e++) load[e] = tokens / 20 / n;
    load[hot] += tokens - tokens / 20 / n * n;
}
static void test_makespan(void) {
    uint64_t load[64];
    for (size_t hot = 0; hot < 64; hot += 21) {
        moe_ep_desc desc;
        void *memory;
        memset(&desc, 0, sizeof desc);
        desc.n_experts = 64, desc.n_ranks = 8;
        skewed(64, 262144, hot, load);
        moe_ep standard = plan_of(&desc, load, &memory);
        free(memory);
        desc.llep = 1;
        moe_ep plan = plan_of(&desc, load, &memory);
        CHECK(standard.makespan >= 5 * plan.makespan);
        CHECK(plan.makespan <= plan.capacity + 1024);
        free(memory);
    }
}

static double seconds_of_plan(size_t n_experts, size_t n_ranks, int kind) {
    uint64_t *load = (uint64_t *)malloc(n_experts * sizeof(uint64_t));
    double best = 1e30;
    moe_ep_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_experts = n_experts, desc.n_ranks = n_ranks, desc.llep = 1;
    if (kind) skewed(n_experts, (uint64_t)1 << 33, n_experts / 3, load);
    else
        for (size_t e = 0; e < n_experts; e++) load[e] = (uint64_t)(1e9 / (double)(e + 1));
    for (int i = 0; i < 3; i++) {
        void *memory;
        moe_ep plan;
        size_t bytes;
        CHECK_OK(moe_ep_plan_size(&desc, &bytes));
        memory = malloc(bytes);
        clock_t from = clock();
        CHECK_OK(moe_ep_plan(&desc, load, &plan, memory, bytes));
        double took = (double)(clock() - from) / CLOCKS_PER_SEC;
        if (took < best) best = took;
        CHECK(plan.acts);
        free(memory);
    }
    free(load);
    return best;
}
static void test_time(void) { /* this suite is compiled without optimisation, and under sanitizers */
    for (int kind = 0; kind < 2; kind++) {
        double small = seconds_of_plan(256, 64, kind), large = seconds_of_plan(65536, 4096, kind);
        printf("    a plan: E = 256, P = 64 %.3f ms, E = 65,536, P = 4,096 %.3f ms\n", small * 1e3, large * 1e3);
        CHECK(small < (TEST_SANITIZED ? 0.02 : 0.001));
        CHECK(large < (TEST_SANITIZED ? 10.0 : 1.0));
    }
}

static void test_refused(void) {
    uint64_t load[6] = {1, 2, 3, 4, 5, 6};
    unsigned char memory[4096];
    size_t bytes;
    moe_ep plan, before;
    moe_ep_desc desc, good;
    memset(&good, 0, sizeof good);
    good.n_experts = 6, good.n_ranks = 3, good.llep = 1;
    memset(&plan, 0x5a, sizeof plan);
    before = plan;
    CHECK_STATUS(moe_ep_plan_size(NULL, &bytes), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_ep_plan_size(&good, NULL), MOE_E_NULL_OUT);
    CHECK_OK(moe_ep_plan_size(&good, &bytes));
    CHECK_STATUS(moe_ep_plan(&good, load, NULL, memory, sizeof memory), MOE_E_NULL_OUT);
    CHECK_STATUS(moe_ep_plan(NULL, load, &plan, memory, sizeof memory), MOE_E_NULL_DESC);
    CHECK_STATUS(moe_ep_plan(&good, NULL, &plan, memory, sizeof memory), MOE_E_NULL_LOAD);
    CHECK_STATUS(moe_ep_plan(&good, load, &plan, NULL, sizeof memory), MOE_E_NULL_MEMORY);
    CHECK_STATUS(moe_ep_plan(&good, load, &plan, memory, bytes - 1), MOE_E_SMALL_MEMORY);
#define REFUSED(change, status)                                                                    \
    do {                                                                                           \
        desc = good;                                                                               \
        change;                                                                                    \
        CHECK_STATUS(moe_ep_plan(&desc, load, &plan, memory, sizeof memory), status);              \
    } while (0)
    REFUSED(desc.n_experts = 0, MOE_E_N_EXPERTS);
    REFUSED(desc.n_experts = SIZE_MAX - 3, MOE_E_N_EXPERTS);
    REFUSED(desc.n_ranks = 0, MOE_E_RANKS);
    REFUSED(desc.n_ranks = 4, MOE_E_RANKS);
    REFUSED(desc.n_ranks = 12, MOE_E_RANKS);
    REFUSED(desc.lambda = 0.5, MOE_E_EP_LAMBDA);
    REFUSED(desc.lambda = (double)NAN, MOE_E_EP_LAMBDA);
    REFUSED(desc.lambda = (double)INFINITY, MOE_E_EP_LAMBDA);
    REFUSED(desc.alpha = -1, MOE_E_EP_ALPHA);
    REFUSED(desc.alpha = 2e6, MOE_E_EP_ALPHA);
    REFUSED(desc.alpha = (double)NAN, MOE_E_EP_ALPHA);
    load[2] = ((uint64_t)1 << 40) - 17;
    REFUSED((void)0, MOE_E_EP_LOAD);
    load[2] = UINT64_MAX;
    REFUSED((void)0, MOE_E_EP_LOAD);
    CHECK(!memcmp(&plan, &before, sizeof plan)); /* none of them touched it */
    load[2] = ((uint64_t)1 << 40) - 18;
    CHECK_OK(moe_ep_plan(&good, load, &plan, memory, sizeof memory));
}

int main(void) {
    RUN(test_blocks);
    RUN(test_naive);
    RUN(test_hand);
    RUN(test_lambda);
    RUN(test_makespan);
    RUN(test_time);
    RUN(test_refused);
    return test_end();
}

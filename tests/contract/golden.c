/* Golden values: what every build of moe.h must compute, bit for bit, on every processor.
 *     golden                  prints the cases, one a line: name, hash of the whole result, its first values
 *     golden --check FILE     compares with the lines of FILE, on every instruction set that works here
 * tests/contract/golden.sh builds this with many compilers and options and checks each build. */
#define MOE_IMPLEMENTATION
#include "test.h"
#include "cases.h"

enum { SHOWN = 4, MOST_LINES = 200 };
typedef struct line { char name[40]; uint64_t hash; size_t shown; float value[SHOWN]; } line;

static line lines[MOST_LINES];
static size_t n_lines;

static void add(const char *topic, const char *name, uint64_t hash, const float *value, size_t n) {
    line *l = &lines[n_lines++];
    if (n_lines > MOST_LINES) abort();
    snprintf(l->name, sizeof l->name, "%s/%s", topic, name);
    l->hash = hash;
    l->shown = n < SHOWN ? n : SHOWN;
    for (size_t i = 0; i < SHOWN; i++) l->value[i] = i < n ? value[i] : 0;
}

static void add_array(const char *topic, const char *name, const float *x, size_t n) {
    add(topic, name, moe_hash(0, x, n * sizeof *x), x, n);
}

static void random_cases(void) {
    static float x[1001];
    uint32_t u[4];
    char bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (char)(i * 7 % 256 - 128);
    moe_philox(UINT64_C(0x0123456789abcdef), 5, 6, u);
    add("random", "philox", ((uint64_t)u[0] << 32 | u[1]) ^ ((uint64_t)u[2] << 32 | u[3]), NULL, 0);
    add("random", "hash", moe_hash(9, bytes, 255), NULL, 0);
    CHECK_OK(moe_rand_uniform(11, 3, 1001, -2, 5, x));
    add_array("random", "uniform", x, 1001);
    CHECK_OK(moe_rand_normal(11, 3, 1001, 1, 3, x));
    add_array("random", "normal", x, 1001);
}

static void math_cases(void) {
    static const struct {
        const char *name;
        moe_status (*f)(size_t, const float *, float *);
        float lo, hi;
        int minus;
    } all[] = {{"exp", moe_exp, 1e-8f, 88, 1},
               {"log", moe_log, 2e-38f, 3e38f, 0},
               {"tanh", moe_tanh, 1e-8f, 12, 1},
               {"erf", moe_erf, 1e-8f, 5, 1}};
    enum { N = 6000 };
    static float x[N];
    for (size_t f = 0; f < 4; f++) { /* the floats from lo to hi, evenly by their bits */
        uint32_t lo = test_bits(all[f].lo), hi = test_bits(all[f].hi);
        for (uint32_t i = 0; i < N; i++) {
            uint32_t bits = lo + (hi - lo) / N * i;
            memcpy(&x[i], &bits, sizeof bits);
            if (all[f].minus && i % 2) x[i] = -x[i];
        }
        CHECK_OK(all[f].f(N, x, x));
        for (uint32_t i = 0; i < SHOWN; i++) { float t = x[i]; x[i] = x[N / 2 + i], x[N / 2 + i] = t; } /* show these */
        add_array("math", all[f].name, x, N);
    }
}

static void gemm_cases(void) {
    static const size_t shape[][3] = {{1, 1, 1}, {7, 19, 33}, {64, 48, 65}, {3, 100, 200}, {100, 5, 31}};
    static float a[13000], b[20000], c[7000];
    for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
        for (int bits = 0; bits < 4; bits++) {
            moe_gemm_args g;
            char name[40];
            memset(&g, 0, sizeof g);
            g.m = shape[s][0], g.n = shape[s][1], g.k = shape[s][2], g.ta = bits & 1, g.tb = bits >> 1,
            g.accumulate = bits == 3;
            g.a = a, g.b = b, g.c = c;
            CHECK_OK(moe_rand_normal(1, s, g.m * g.k, 0, 1, a));
            CHECK_OK(moe_rand_normal(2, s, g.k * g.n, 0, 1, b));
            CHECK_OK(moe_rand_normal(3, s, g.m * g.n, 0, 1, c));
            CHECK_OK(moe_gemm(&g));
            snprintf(name, sizeof name, "%dx%dx%d%s%s%s", (int)g.m, (int)g.n, (int)g.k, g.ta ? "-ta" : "",
                     g.tb ? "-tb" : "", g.accumulate ? "-add" : "");
            add_array("gemm", name, c, g.m * g.n);
        }
}

static void stage_cases(void) {
    enum { T = 23, E = 37, K = 5 };
    static float z[T * E], p[T * E], g[T * E], value[T * K];
    int32_t index[T * K];
    uint64_t load[E];
    CHECK_OK(moe_rand_normal(4, 4, T * E, 0, 3, z));
    CHECK_OK(moe_softmax(T, E, 0.7f, z, p));
    add_array("stage", "softmax", p, T * E);
    CHECK_OK(moe_topk(T, E, K, p, index, value));
    add("stage", "topk", moe_hash(1, index, sizeof index), value, T * K);
    memset(g, 0, sizeof g);
    CHECK_OK(moe_softmax_backward(T, E, 0.7f, p, z, g));
    add_array("stage", "softmax-backward", g, T * E);
    memset(g, 0, sizeof g);
    for (size_t e = 0; e < E; e++) load[e] = e % 5;
    moe_loss_args a;
    memset(&a, 0, sizeof a);
    a.n_tokens = T, a.n_experts = E, a.temperature = 0.7f, a.prob = p, a.logits = z, a.load = load, a.d_logits = g;
    CHECK_OK(moe_loss(MOE_LOSS_SWITCH, &a, 0.01f, NULL));
    add_array("stage", "loss-switch", g, T * E);
    CHECK_OK(moe_loss(MOE_LOSS_Z, &a, 0.001f, NULL));
    add_array("stage", "loss-z", g, T * E);
    for (uint64_t i = 0; i < 100; i++) z[i] = moe_schedule_cosine(i, 10, 90, 0.3f, 0.001f);
    add_array("stage", "schedule", z, 100);
}

static void layer_case_lines(void) {
    static const char *const part[HASHES] = {"start", "y", "dx", "gradients", "end"};
    for (size_t i = 0; i < LAYER_CASES; i++) {
        uint64_t hash[HASHES];
        float y[4];
        run_layer_case(&layer_cases[i], NULL, 3, hash, y);
        for (int h = 0; h < HASHES; h++) add(layer_cases[i].name, part[h], hash[h], y, h == HASH_Y ? 4 : 0);
    }
}

/* Every system of the table: two steps of training, so noise, random choices, losses and controllers are in it, and
 * what the parameters are then. */
static void system_cases(void) {
    enum { T = 48, D = 16, SEQ = 4 };
    static float x[T * D], y[T * D], dy[T * D], dx[T * D];
    uint32_t id[T];
    for (uint32_t t = 0; t < T; t++) id[t] = t * 7 % 31;
    for (size_t i = 0; i < moe_systems_count(); i++) {
        moe_desc d;
        moe_layer *m = NULL;
        uint64_t hash = 0;
        memset(&d, 0, sizeof d);
        d.d_model = D, d.d_ff = 12, d.sequence = SEQ, d.seed = 9;
        CHECK_OK(moe_desc_system(&d, moe_system_at(i)->name));
        if (!CHECK_OK(moe_layer_new(&m, &d))) continue;
        for (uint64_t step = 0; step < 2; step++) {
            CHECK_OK(moe_rand_normal(5, step, T * D, 0.2f, 1, x));
            CHECK_OK(moe_rand_uniform(6, step, T * D, -1, 1, dy));
            moe_layer_side(m)->id = id;
            CHECK_OK(moe_forward(m, x, T, y));
            CHECK_OK(moe_backward(m, dy, dx));
            CHECK_OK(moe_step(m, 0.02f));
            hash = moe_hash(hash, y, sizeof y), hash = moe_hash(hash, dx, sizeof dx);
        }
        add("system", moe_system_at(i)->name, hash ^ moe_layer_hash(m), y, T * D);
        moe_layer_free(m);
    }
}

static void compute(void) {
    n_lines = 0;
    random_cases();
    math_cases();
    gemm_cases();
    stage_cases();
    layer_case_lines();
    system_cases();
}

/* ---- printing and checking ---- */
static line want[MOST_LINES];
static size_t n_want;

static int read_file(const char *path) {
    char text[400], *at;
    FILE *f = fopen(path, "r");
    if (f == NULL) { printf("cannot open %s\n", path); return 0; }
    while (n_want < MOST_LINES && fgets(text, sizeof text, f)) {
        line *l = &want[n_want];
        size_t length = strcspn(text, " \n");
        if (text[0] == '#' || length == 0 || length >= sizeof l->name) continue;
        memset(l, 0, sizeof *l);
        memcpy(l->name, text, length);
        l->hash = strtoull(text + length, &at, 16);
        for (int i = 0; i < SHOWN; i++) l->value[i] = (float)strtod(at, &at);
        n_want++;
    }
    fclose(f);
    return 1;
}

static const char *isa_name = "";

static void test_golden(void) {
    compute();
    CHECK(n_lines == n_want);
    for (size_t i = 0; i < n_lines && i < n_want; i++) {
        const line *a = &lines[i], *b = &want[i];
        int same = !strcmp(a->name, b->name) && a->hash == b->hash;
        for (int j = 0; j < SHOWN; j++) same &= test_bits(a->value[j]) == test_bits(b->value[j]);
        if (same) continue;
        if (test_error(__FILE__, __LINE__))
            printf("%s with %s: hash %016llx, values %a %a ..., not %016llx, %a %a ...\n", a->name, isa_name,
                   (unsigned long long)a->hash, (double)a->value[0], (double)a->value[1], (unsigned long long)b->hash,
                   (double)b->value[0], (double)b->value[1]);
    }
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "--check")) {
        if (!read_file(argv[2])) return 1;
        FOR_EACH_ISA(isa) {
            isa_name = moe_isa_name(isa);
            RUN(test_golden);
        }
        return test_end();
    }
    compute();
    for (size_t i = 0; i < n_lines; i++) {
        printf("%s %016llx", lines[i].name, (unsigned long long)lines[i].hash);
        for (size_t j = 0; j < lines[i].shown; j++) printf(" %a", (double)lines[i].value[j]);
        printf("\n");
    }
    return test_errors != 0;
}

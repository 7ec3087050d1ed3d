// browser.c - a mixture of experts that learns a picture, for a page in the browser: index.html, which build.sh makes.
//
// A token is a point of the plane; what is learned is where the picture is dark. All numbers on the page are made here,
// by the library; the page draws them. The module imports nothing: no files, no clock, no random numbers but counted
// ones. For any other machine this is a program that makes the same calls and prints what the page's test says:
//
//     cc -std=c99 -ffp-contract=off -I. examples/browser/browser.c -lm
#define MOE_STATIC
#define MOE_NO_STDIO
#define MOE_NO_FORMATS
#define MOE_IMPLEMENTATION
#include "moe.h"

#ifdef __wasm__
#define PAGE(name) __attribute__((export_name(#name))) name // what the page calls
#else
#define PAGE(name) name
#endif

enum {
    D = 4, D_FF = 8, CLASSES = 2,                 // width of a token; hidden width of an expert; light and dark
    BATCH = 256, SIDE = 64, POINTS = SIDE * SIDE, // points a step; of the map that the page draws
    MOST = 16, GAME = 50, REPLICATES = 100,       // experts; batches for gamma_eff, and of its bootstrap
    POINT_STREAM = 1000                           // random streams from here on are the steps' points
};
static const float rate = 0.02f;

// Rows whose routing shows on single points.
static const char *const rows[] = {"switch", "softmax-topk", "mixtral", "gshard", "noisy-topk", "simbal", "deepseek-v3",
                                   "xmoe", "expert-choice", "sinkhorn", "remoe", "dynmoe", "ecology", "random"};
enum { ROWS = sizeof rows / sizeof *rows };
typedef enum picture { YIN_YANG, RINGS, CHECKS } picture;

// What the page reads: numbers (NaN where the data do not tell), and of each expert its share of the choices, and
// whether it is dead.
enum { STEP, LOSS, RIGHT, DEAD, DROPPED, MAXVIO, EFFECTIVE, PER_TOKEN, ECOLOGY, GAMMA, GAMMA_LO, GAMMA_HI, NUMBERS };
static double number[NUMBERS], load[MOST], dead[MOST];
// Of each point of the map: the two heaviest experts, or NONE, and the first's share of both; how dark it is made, and
// how dark it is.
enum { FIRST, SECOND, SHARE, DARK, WANTED, PLANES, NONE = 255 };
static unsigned char map[PLANES][POINTS];
static char text[1600];

static moe_desc desc;
static moe_layer *layer;
static moe_game game;
static unsigned char game_memory[1 << 17];
static picture shown;
static size_t steps, played; // played: since gamma_eff was last fitted
static float x[POINTS * D], y[POINTS * D], dy[BATCH * D], logits[POINTS * CLASSES], prob[POINTS * CLASSES];
static float value[1 << 12]; // one tensor

// ---- the picture ----

static int within(float across, float up, float radius) { return across * across + up * up < radius * radius; }

static int is_dark(float across, float up) {
    const float ball = 0.46f, eye = 0.15f;
    if (shown == CHECKS) return ((int)(2 * across + 4) + (int)(2 * up + 4)) & 1;
    if (shown == RINGS) return within(across, up, 0.3f) || (within(across, up, 0.9f) && !within(across, up, 0.6f));
    if (!within(across, up, 2 * ball) || within(across, up - ball, eye)) return 0;
    if (within(across, up + ball, eye) || within(across, up - ball, ball)) return 1;
    return across > 0 && !within(across, up + ball, ball);
}

static void make_token(size_t t, float across, float up) {
    float *to = x + t * D;
    to[0] = across, to[1] = up, to[2] = across * across + up * up, to[3] = 1;
}

// ---- the mixture ----

static moe_status forward(size_t n, int evaluate) {
    moe_layer_side(layer)->evaluate = evaluate;
    moe_status status = moe_forward(layer, x, n, y);
    for (size_t t = 0; t < n; t++) memcpy(logits + t * CLASSES, y + t * D, CLASSES * sizeof *y);
    return status ? status : moe_softmax(n, CLASSES, 1, logits, prob);
}

// The mean cross entropy of the batch, and dy = its gradient.
static moe_status cross_entropy(double *loss) {
    static float log_prob[BATCH * CLASSES];
    for (size_t i = 0; i < BATCH * CLASSES; i++) log_prob[i] = prob[i] > 1e-20f ? prob[i] : 1e-20f;
    moe_status status = moe_log(BATCH * CLASSES, log_prob, log_prob);
    memset(dy, 0, sizeof dy);
    *loss = 0;
    for (size_t t = 0; t < BATCH; t++) {
        size_t wanted = (size_t)is_dark(x[t * D], x[t * D + 1]);
        for (size_t c = 0; c < CLASSES; c++) dy[t * D + c] = (prob[t * CLASSES + c] - (float)(c == wanted)) / BATCH;
        *loss -= (double)log_prob[t * CLASSES + wanted] / BATCH;
    }
    return status;
}

static moe_status train_step(double *loss) {
    float place[2 * BATCH];
    moe_status status = moe_rand_uniform(desc.seed, POINT_STREAM + steps, 2 * BATCH, -1, 1, place);
    for (size_t t = 0; t < BATCH; t++) make_token(t, place[2 * t], place[2 * t + 1]);
    if (!status) status = forward(BATCH, 0);
    const moe_tape *tape = moe_layer_tape(layer);
    if (!status)
        status = moe_game_add(&game, played++ % GAME, tape->n_tokens, tape->n_slots, tape->logits, tape->index);
    if (!status) status = cross_entropy(loss);
    if (!status) status = moe_backward(layer, dy, NULL);
    if (!status) status = moe_step(layer, rate);
    steps++;
    return status;
}

// A coefficient below 0 leaves the row's own; 0 switches the loss off.
static void set_loss(moe_desc *to, moe_loss_kind kind, float coefficient) {
    if (coefficient > 0) to->loss[kind] = coefficient;
    else if (coefficient == 0) to->loss[kind] = MOE_OFF;
}
static void set_losses(moe_desc *to, float balance, float entropy) {
    set_loss(to, MOE_LOSS_SWITCH, balance);
    if (to->loss[MOE_LOSS_KL_UNIFORM] > 0) set_loss(to, MOE_LOSS_KL_UNIFORM, balance); // ecology: both, as one weight
    set_loss(to, MOE_LOSS_ENTROPY, entropy);
}

static int explain(moe_status status, const moe_desc *refused) {
    moe_desc_explain(status, refused, NULL, text, sizeof text);
    return status != MOE_OK;
}

// ---- what the page calls: 0, or 1 with the reason in the text ----

const char *PAGE(page_text)(void) { return text; }
double *PAGE(page_numbers)(void) { return number; }
double *PAGE(page_loads)(void) { return load; }
double *PAGE(page_deaths)(void) { return dead; }
unsigned char *PAGE(page_planes)(void) { return &map[0][0]; }

// What a row is, or 1 past the last.
int PAGE(page_row)(size_t row, int part) {
    if (row >= ROWS) return 1;
    const moe_system *system = moe_system_find(rows[row]);
    const char *const words[] = {system->name, system->title, system->source, system->choices};
    size_t length = strlen(words[part]);
    memcpy(text, words[part], length < sizeof text ? length + 1 : 0);
    return 0;
}

// top_k 0: the row's own.
int PAGE(page_start)(size_t row, int which, size_t experts, size_t top_k, float balance, float entropy,
                     uint32_t seed) {
    moe_desc asked = {0};
    moe_layer *begun = NULL;
    asked.d_model = D, asked.d_ff = D_FF;
    moe_status status = moe_desc_system(&asked, rows[row]);
    asked.n_experts = experts, asked.seed = seed, asked.capacity_factor_eval = MOE_OFF;
    if (top_k) asked.top_k = top_k;
    set_losses(&asked, balance, entropy);
    if (!status) status = moe_layer_new(&begun, &asked);
    if (!status) status = moe_game_init(&game, experts, GAME, game_memory, sizeof game_memory);
    if (status) {
        moe_layer_free(begun);
        return explain(status, &asked);
    }
    moe_layer_free(layer);
    layer = begun, desc = asked, steps = played = 0, shown = (picture)which;
    for (size_t i = 0; i < NUMBERS; i++) number[i] = NAN;
    memset(load, 0, sizeof load), memset(dead, 0, sizeof dead);
    number[STEP] = 0, number[ECOLOGY] = moe_desc_ecology(&desc);
    return 0;
}

// Other coefficients. A layer's desc stands, so the parameters go to a new layer, whose optimiser begins anew.
int PAGE(page_retune)(float balance, float entropy) {
    moe_desc asked = desc;
    moe_layer *tuned = NULL;
    moe_tensor tensor;
    set_losses(&asked, balance, entropy);
    moe_status status = moe_layer_new(&tuned, &asked);
    for (size_t i = 0; !status && i < moe_layer_tensors(layer); i++) {
        status = moe_layer_tensor(layer, i, &tensor);
        if (!status) status = moe_layer_get(layer, MOE_PART_PARAMS, tensor.name, value, tensor.count);
        if (!status) status = moe_layer_set(tuned, MOE_PART_PARAMS, tensor.name, value, tensor.count);
    }
    if (status) {
        moe_layer_free(tuned);
        return explain(status, &asked);
    }
    const moe_control *from = moe_layer_control(layer), *to = moe_layer_control(tuned);
    if (to->n_state) memcpy(to->state, from->state, to->n_state * sizeof *to->state);
    moe_layer_free(layer);
    layer = tuned, desc = asked, number[ECOLOGY] = moe_desc_ecology(&desc);
    return 0;
}

// n steps; then loss, load and health are theirs.
int PAGE(page_train)(size_t n) {
    double loss = 0, sum = 0;
    moe_health health;
    moe_status status = moe_layer_health_reset(layer);
    for (size_t i = 0; !status && i < n; i++, sum += loss) status = train_step(&loss);
    if (!status) status = moe_layer_health(layer, &health);
    if (status) return explain(status, &desc);
    for (size_t e = 0; e < desc.n_experts; e++) {
        load[e] = (double)health.load[e] / (double)health.n_selected;
        dead[e] = 0;
    }
    for (size_t i = 0; i < health.n_dead; i++) dead[health.dead[i]] = 1;
    number[STEP] = (double)steps, number[LOSS] = sum / (double)n, number[DEAD] = (double)health.n_dead;
    number[DROPPED] = health.drop_rate, number[MAXVIO] = health.maxvio;
    number[EFFECTIVE] = health.effective_experts;
    number[PER_TOKEN] = (double)health.n_selected / (double)health.n_tokens;
    return 0;
}

// The layer over the whole plane, in evaluation.
int PAGE(page_map)(void) {
    size_t right = 0;
    for (size_t i = 0; i < POINTS; i++)
        make_token(i, (float)(2 * (i % SIDE) + 1) / SIDE - 1, 1 - (float)(2 * (i / SIDE) + 1) / SIDE);
    moe_status status = forward(POINTS, 1);
    if (status) return explain(status, &desc);
    const moe_tape *tape = moe_layer_tape(layer);
    for (size_t i = 0; i < POINTS; i++) {
        float weight[2] = {0, 0};
        map[FIRST][i] = map[SECOND][i] = NONE;
        for (size_t slot = i * tape->n_slots; slot < (i + 1) * tape->n_slots; slot++) {
            if (tape->index[slot] < 0 || tape->weight[slot] <= weight[1]) continue;
            int heaviest = tape->weight[slot] > weight[0];
            if (heaviest) map[SECOND][i] = map[FIRST][i], weight[1] = weight[0];
            map[heaviest ? FIRST : SECOND][i] = (unsigned char)tape->index[slot];
            weight[!heaviest] = tape->weight[slot];
        }
        map[SHARE][i] = weight[0] > 0 ? (unsigned char)(255 * weight[0] / (weight[0] + weight[1])) : 0;
        map[DARK][i] = (unsigned char)(255 * prob[i * CLASSES + 1]);
        map[WANTED][i] = is_dark(x[i * D], x[i * D + 1]) ? 255 : 0;
        right += (map[DARK][i] > 127) == (map[WANTED][i] > 127);
    }
    number[RIGHT] = (double)right / POINTS;
    return 0;
}

// gamma_eff of the steps since the last call, of the last GAME of them at most.
int PAGE(page_game)(void) {
    double quality[MOST], taken[MOST], work[2 * MOST], replicate[REPLICATES], selections;
    moe_game_fit fit = {0};
    moe_game view = game;
    view.n_batches = played < GAME ? played : GAME;
    moe_status status = moe_game_pool(&view, NULL, 0, quality, taken, &selections);
    if (!status && selections > 0)
        status = moe_game_estimate(desc.n_experts, quality, taken, selections, work, &fit);
    number[GAMMA] = fit.identified ? fit.gamma : NAN, number[GAMMA_LO] = number[GAMMA_HI] = NAN;
    if (!status && fit.identified && view.n_batches > 1)
        status = moe_game_bootstrap(&view, REPLICATES, 1, NULL, replicate, &number[GAMMA_LO], &number[GAMMA_HI]);
    played = 0;
    if (!status) status = moe_game_reset(&game);
    return status ? explain(status, &desc) : 0;
}

// The checksum of all parameters, as 16 digits.
const char *PAGE(page_hash)(void) {
    uint64_t hash = moe_layer_hash(layer);
    for (int i = 0; i < 16; i++) text[i] = "0123456789abcdef"[hash >> (60 - 4 * i) & 15];
    text[16] = 0;
    return text;
}

const char *PAGE(page_kernels)(void) { return moe_isa_name(moe_active_isa()); }

#ifndef __wasm__
#include <stdio.h>

// What index.html does for its test: each row for 60 steps, with other coefficients from the middle on, and the tour.
static void told(int failed, const char *what) {
    uint64_t bits;
    memcpy(&bits, &number[LOSS], sizeof bits);
    if (failed) printf("%s: %s\n", what, text);
    else printf("%s loss %016llx right %g dead %g hash %s\n", what, (unsigned long long)bits, number[RIGHT] * POINTS,
                number[DEAD], page_hash());
}
int main(void) {
    static const struct { float balance; size_t end; } tour[] = {{0, 600}, {0.03f, 1600}, {0, 2600}};
    printf("kernels %s\n", page_kernels());
    for (size_t row = 0; row < ROWS; row++) {
        int failed = page_start(row, (int)(row % 3), 8, 0, -1, -1, (uint32_t)row + 1) || page_train(30);
        told(failed || page_retune(0.1f, 0.01f) || page_train(30) || page_map() || page_game(), rows[row]);
    }
    for (size_t i = 0; i < sizeof tour / sizeof *tour; i++) {
        int failed = i ? page_retune(tour[i].balance, -1) : page_start(0, YIN_YANG, 8, 1, tour[i].balance, -1, 1);
        while (!failed && steps < tour[i].end) failed = page_train(10);
        told(failed || page_map() || page_game(), "tour");
    }
    return 0;
}
#endif

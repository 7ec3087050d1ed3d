// game.h - gamma_eff of a stretch of training, with its interval, from the layer's own forward passes.
//
//     game g = game_new(layer, 50);                    // at most 50 batches of text, the bootstrap's units
//     game_take(&g, layer);                            // after each moe_forward
//     game_note n = game_end(&g, layer, threads);      // and begin again
//
// docs/gamma.md says what gamma_eff is, and when the data do not tell it.
#ifndef EX_GAME_H
#define EX_GAME_H

#include "json.h"
#include "nn.h"

enum { GAME_REPLICATES = 200 };

typedef struct game {
    moe_game counts;
    void *memory;
    size_t taken;
} game;

typedef struct game_note {
    double gamma, lo, hi; // NaN where the data do not tell
    moe_game_null null;   // the same of what the noise of the tokens alone makes, and the difference
    double ecology;       // T H / (O + B) of the layer's description; infinite without an oracle and a balance loss
} game_note;

EX_FUNC game game_new(const moe_layer *layer, size_t batches) {
    game g = {.taken = 0};
    size_t bytes = 0;
    nn_must(moe_game_size(moe_layer_desc(layer)->n_experts, batches, &bytes));
    g.memory = allocate(1, bytes);
    nn_must(moe_game_init(&g.counts, moe_layer_desc(layer)->n_experts, batches, g.memory, bytes));
    return g;
}

EX_FUNC void game_free(game *g) { free(g->memory); }

EX_FUNC void game_take(game *g, const moe_layer *layer) {
    const moe_tape *t = moe_layer_tape(layer);
    nn_must(moe_game_add(&g->counts, g->taken++ % g->counts.n_batches, t->n_tokens, t->n_slots, t->logits, t->index));
}

EX_FUNC game_note game_end(game *g, const moe_layer *layer, const moe_parallel *parallel) {
    size_t E = g->counts.n_experts, used = g->taken < g->counts.n_batches ? g->taken : g->counts.n_batches;
    double *quality = allocate(4 * E, sizeof *quality), *replicate = allocate(GAME_REPLICATES, sizeof *replicate), n;
    moe_game_fit fit;
    game_note note = {NAN, NAN, NAN, {NAN, NAN, NAN, NAN}, moe_desc_ecology(moe_layer_desc(layer))};
    nn_must(moe_game_pool(&g->counts, NULL, 0, quality, quality + E, &n));
    nn_must(moe_game_estimate(E, quality, quality + E, n, quality + 2 * E, &fit));
    if (fit.identified) {
        moe_game view = g->counts; // the batches that were used
        view.n_batches = used;
        note.gamma = fit.gamma;
        moe_status s = moe_game_bootstrap(&view, GAME_REPLICATES, 1, parallel, replicate, &note.lo, &note.hi);
        if (s != MOE_E_N_BATCHES) nn_must(s); // one batch gives no interval
        nn_must(moe_game_excess(&view, s ? 0 : GAME_REPLICATES, 1, parallel, replicate, replicate, &note.null));
    }
    free(quality);
    free(replicate);
    nn_must(moe_game_reset(&g->counts));
    g->taken = 0;
    return note;
}

// "E 0.55  gamma_eff 12.30 [10.10, 14.20]  excess 1.20 [-0.90, 3.10]"; "unidentified" in place of what is
EX_FUNC void game_text(const game_note *n, char *out, size_t size) {
    char gamma[48] = "unidentified", excess[48] = "unidentified";
    if (!isnan(n->gamma)) snprintf(gamma, sizeof gamma, "%.2f [%.2f, %.2f]", n->gamma, n->lo, n->hi);
    if (!isnan(n->null.gamma_excess))
        snprintf(excess, sizeof excess, "%.2f [%.2f, %.2f]", n->null.gamma_excess, n->null.excess_lo,
                 n->null.excess_hi);
    if (isnan(n->gamma)) snprintf(out, size, "E %.3g  gamma_eff %s", n->ecology, gamma);
    else snprintf(out, size, "E %.3g  gamma_eff %s  excess %s", n->ecology, gamma, excess);
}

EX_FUNC void game_json(json *j, const game_note *n) {
    json_real(j, "ecology_number", n->ecology);
    json_real(j, "gamma_eff", n->gamma);
    json_real(j, "gamma_lo", n->lo);
    json_real(j, "gamma_hi", n->hi);
    json_real(j, "gamma_null", n->null.gamma_null);
    json_real(j, "gamma_excess", n->null.gamma_excess);
    json_real(j, "excess_lo", n->null.excess_lo);
    json_real(j, "excess_hi", n->null.excess_hi);
}

#endif

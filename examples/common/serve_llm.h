// serve_llm.h - the mixtures of build/llm's model, served in other ways (serve.h).
//
//     size_t layers = serve_llm_layers(&m, trained, most);   // the model's own mixtures, in order
//     ... live[i] = serve_begin(trained[i], ...) ...
//     serve_llm_place(&m, live);                             // they stand in the model's blocks now
//     llm_forward_batch(&m, ...);  serve_llm_after(&m, live);    // after each batch
#ifndef EX_SERVE_LLM_H
#define EX_SERVE_LLM_H

#include "llm_model.h"
#include "serve.h"

EX_FUNC size_t serve_llm_layers(llm *m, moe_layer **trained, size_t most) {
    size_t layers = 0;
    for (size_t l = 0; l < m->layers; l++) {
        m->tape[l] = NULL; // equal layers share one: here each gets its own
        if (m->block[l].mixture && layers < most) trained[layers++] = m->block[l].mixture;
    }
    if (!layers) refuse(m->o->model, "it has no mixture");
    return layers;
}
EX_FUNC void serve_llm_place(llm *m, served *live) {
    for (size_t l = 0; l < m->layers; l++) {
        if (!m->block[l].mixture) continue;
        m->block[l].mixture = live->layer;
        moe_tape_free(m->tape[l]);
        nn_must(moe_tape_new(&m->tape[l], moe_layer_desc(live->layer), m->o->batch, MOE_OFF));
        m->tape[l]->side.evaluate = 1;
        live++;
    }
}
EX_FUNC void serve_llm_after(llm *m, served *live) {
    for (size_t l = 0; l < m->layers; l++) {
        if (!m->block[l].mixture) continue;
        serve_after(live, m->tape[l]);
        m->block[l].mixture = (live++)->layer; // made again perhaps: of the same shape, so that the tape fits
    }
}

#endif

// serve.h - a trained mixture, served in other ways: what serve_balance compares, and repetition sets against attacks.
//
//     served s = serve_begin(trained, &serve_methods[i], load, &status); // load (E): of a calibration
//     ... a forward of s.layer with `tape` in evaluation ...
//     imbalance += serve_imbalance(&s, tape);                     // largest / mean work of this batch's experts
//     serve_after(&s, tape);                                      // what the dynamic variant does between batches
//     serve_end(&s);
//
// The trained layer stays as it is. Every method is a text of moe_desc's fields and, for Replicate-and-Quantize, how
// many replicas: the router's and experts' numbers are the trained ones, nothing is trained again.
#ifndef EX_SERVE_H
#define EX_SERVE_H

#include "nn.h"

typedef struct serve_method {
    const char *name, *set; // fields of moe_desc, beside the trained layer's
    size_t replicas;        // of the heaviest experts, in int8; 0 = none
    size_t window;          // plans again from the last so many batches; 0 = once, from the calibration
    const char *what;
} serve_method;

enum { SERVE_LASER = 1, SERVE_RQ = 2, SERVE_MOST_REPLICAS = 4 };
static const serve_method serve_methods[] = {
    {"top-k", "", 0, 0, "as trained"},
    {"laser", "select=laser top_p=0.8 threshold=0.5", 0, 0, "the row's mass 0.8 and threshold 0.5; 2 k candidates"},
    {"replicate-and-quantize", "", 1, 0, "one replica in int8, from the calibration"},
    {"replicate-and-quantize-2", "", 2, 0, "two replicas"},
    {"replicate-and-quantize-4", "", 4, 0, "four replicas"},
    {"replicate-and-quantize-dynamic", "", 4, 16, "four replicas, planned again from the last 16 batches"},
    {"prune-0.05", "prune=0.05", 0, 0, "choices of a probability below tau are dropped"},
    {"prune-0.1", "prune=0.1", 0, 0, "the same"},
    {"prune-0.15", "prune=0.15", 0, 0, "the same"},
    {"prune-0.2", "prune=0.2", 0, 0, "the same"},
    {"smear-merged", "select=all combine=merge", 0, 0, "one expert a sequence, merged by the mean of the softmax"},
};
#define SERVE_METHODS (sizeof serve_methods / sizeof *serve_methods)

typedef struct served {
    const serve_method *method;
    moe_layer *trained, *layer;
    moe_replicate plan;                  // with replicas
    size_t experts, parents, replica[SERVE_MOST_REPLICAS]; // parents: how many have a replica, and which
    size_t batches, made;                // made: how many layers
    moe_health *ring, window;            // (method->window), and their sum
    void *memory;
    uint64_t *work, *load;               // (experts + replicas) of a batch; (experts) of all batches
} served;

// A layer of this desc's fields with the trained layer's numbers, for evaluation; what cannot be says why.
EX_FUNC moe_status serve_as(moe_layer *trained, const char *set, moe_layer **out) {
    moe_desc desc = *moe_layer_desc(trained);
    moe_tensor t;
    size_t experts = desc.n_experts;
    desc.training = MOE_OFF;
    memset(desc.loss, 0, sizeof desc.loss);
    desc.candidates = 0, desc.top_p = 0;
    nn_set("serve_balance", &desc, set);
    if (desc.combine == MOE_COMBINE_MERGE) desc.route_sequence = MOE_ON, desc.gate = MOE_GATE_SOFTMAX;
    moe_status status = moe_layer_new(out, &desc);
    for (size_t i = 0; !status && moe_layer_tensor(*out, i, &t) == MOE_OK; i++) {
        float *values = allocate(t.count, sizeof *values);
        status = moe_layer_get(trained, MOE_PART_PARAMS, t.name, values, t.count);
        if (!status) status = moe_layer_set(*out, MOE_PART_PARAMS, t.name, values, t.count);
        free(values);
    }
    if (status) return status;
    const float *bias = moe_layer_control(trained)->bias;
    if (bias) memcpy(moe_layer_control(*out)->bias, bias, experts * sizeof *bias);
    moe_layer_side(*out)->evaluate = 1;
    return MOE_OK;
}

// The plan for these loads, carried out where other experts are the heaviest now; the layer of before is freed.
EX_FUNC moe_status serve_replicate(served *s, const uint64_t *load) {
    moe_replicate_desc given = {.small = MOE_FORMAT_INT8, .full = MOE_FORMAT_F32, .load = load};
    moe_format_kind *formats = allocate(s->experts + s->method->replicas, sizeof *formats);
    size_t replica[SERVE_MOST_REPLICAS];
    moe_replicate unused;
    given.n_experts = s->experts, given.n_replicas = s->method->replicas;
    given.full_bytes = 2, given.small_bytes = 1, given.budget = SIZE_MAX; // only who is replicated is asked here
    nn_must(moe_replicate_plan(&given, replica, formats, &unused));
    free(formats);
    if (s->parents && memcmp(replica, s->replica, s->parents * sizeof *replica) == 0) return MOE_OK;
    moe_layer *made;
    given.full_bytes = given.small_bytes = given.budget = 0;
    moe_status status = moe_layer_replicate(s->trained, &given, &made, &s->plan);
    if (status) return status;
    moe_layer_free(s->layer);
    s->layer = made;
    s->made++;
    s->parents = s->plan.n_replicas;
    memcpy(s->replica, replica, sizeof replica);
    moe_layer_side(made)->evaluate = 1;
    return MOE_OK;
}

EX_FUNC void serve_ring(served *s) {
    size_t each, n = s->method->window + 1;
    nn_must(moe_health_size(s->experts, &each));
    s->ring = allocate(n, sizeof *s->ring);
    s->memory = allocate(n, each);
    for (size_t i = 0; i < n; i++)
        nn_must(moe_health_init(i + 1 < n ? &s->ring[i] : &s->window, s->experts, (char *)s->memory + i * each, each));
}
// *status: why the method is not for this layer.
EX_FUNC served serve_begin(moe_layer *trained, const serve_method *method, const uint64_t *load, moe_status *status) {
    served s = {.method = method, .trained = trained, .experts = moe_layer_desc(trained)->n_experts};
    s.work = allocate(s.experts + SERVE_MOST_REPLICAS, sizeof *s.work);
    s.load = allocate(s.experts, sizeof *s.load);
    if (method->replicas > s.experts)
        *status = MOE_E_REPLICA;
    else if (method->replicas)
        *status = serve_replicate(&s, load);
    else
        *status = serve_as(trained, method->set, &s.layer);
    if (method->window) serve_ring(&s);
    return s;
}
EX_FUNC void serve_end(served *s) {
    moe_layer_free(s->layer);
    free(s->ring);
    free(s->memory);
    free(s->work);
    free(s->load);
}

// After a batch: what came is counted; the dynamic variant makes the layer anew where others are the heaviest now.
EX_FUNC void serve_after(served *s, const moe_tape *tape) {
    size_t n = s->method->window;
    for (size_t e = 0; e < s->experts; e++) s->load[e] += tape->routes.load[e];
    if (!n) return;
    moe_health *now = &s->ring[s->batches++ % n];
    nn_must(moe_health_reset(now));
    nn_must(moe_health_add(now, &tape->routes, NULL));
    if (s->batches % n) return;
    nn_must(moe_health_reset(&s->window));
    for (size_t i = 0; i < n; i++) nn_must(moe_health_merge(&s->window, &s->ring[i]));
    nn_must(serve_replicate(s, s->window.load));
}

// Bytes of the experts, replicas among them.
EX_FUNC size_t serve_bytes(const served *s) {
    size_t bytes = 0;
    for (size_t e = 0; moe_layer_expert_bytes(s->layer, e); e++) bytes += moe_layer_expert_bytes(s->layer, e);
    return bytes;
}

// What each expert of the last forward computes, then what each replica does; returns the sum.
EX_FUNC uint64_t serve_work(const served *s, const moe_tape *tape) {
    const uint32_t *begin = tape->routes.begin;
    uint64_t sum = begin[s->experts];
    for (size_t e = 0; e < s->experts; e++) s->work[e] = begin[e + 1] - begin[e];
    for (size_t i = 0; i < s->parents; i++) {
        s->work[s->experts + i] = tape->bound[i];
        s->work[s->replica[i]] -= tape->bound[i];
    }
    return sum;
}
// Largest work of an expert or a replica, by the mean of the experts: 1 = even.
EX_FUNC double serve_imbalance(const served *s, const moe_tape *tape) {
    uint64_t sum = serve_work(s, tape), most = 0;
    for (size_t i = 0; i < s->experts + s->parents; i++) most = s->work[i] > most ? s->work[i] : most;
    return sum ? (double)most * (double)s->experts / (double)sum : 1;
}

#endif

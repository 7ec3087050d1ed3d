/* How much of the machine does a whole training step use? Forward, backward and optimiser of a language model, all of
 * it, against a loop of fused multiply-adds. Operations are those of products alone: the model's (three times its
 * forward's) and Muon's; the note says what the model's are without Muon's.
 *
 *     wikitext2    the default of build/wikitext2 --data: 4 layers of width 256, 8 experts of 256, two a token
 *     dense        the same with one feed-forward network of as many active parameters
 *     gpt2-124m    GPT-2's sizes at batch 4 x 64 tokens, AdamW, as llm.c's CPU program is timed: the same products, but
 *                  OLMoE's norms and rotation in place of LayerNorm, biases and learned positions */
#include "common.h"

#include "examples/common/language.h"

typedef struct train_shape {
    const char *name, *choices;
    size_t batch, hidden;
    lm_shape shape;
} train_shape;

static const train_shape shapes[] = {
    {"wikitext2", "mixtral", 16, 256, {4096, 256, 4, 4, 256, 1, LM_MUON, 0.1, 10000, 1e-5, 1}},
    {"dense", "dense", 16, 512, {4096, 256, 4, 4, 256, 1, LM_MUON, 0.1, 10000, 1e-5, 1}},
    {"gpt2-124m", "dense", 4, 3072, {50257, 768, 12, 12, 64, 1, LM_ADAMW, 0, 10000, 1e-5, 1}},
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static void print_shapes(FILE *f)
{
    fputs("\nshape       batch  length  width  layers  vocabulary\n", f);
    for (size_t i = 0; i < N_SHAPES; i++) {
        const lm_shape *s = &shapes[i].shape;
        fprintf(f, "%-11s %5zu %7zu %6zu %7zu %11zu\n", shapes[i].name, shapes[i].batch, s->length, s->d, s->layers,
                s->vocab);
    }
}

typedef struct trained {
    lm *m;
    int32_t *token;
} trained;

static double run_step(void *self)
{
    trained *t = (trained *)self;
    lm_moment now = {t->m->steps};
    double start = bench_now(), nats = lm_forward(t->m, t->token, t->token + 1, t->m->rows, &now);
    lm_backward(t->m, t->m->rows, &now);
    lm_step(t->m, 1e-4f, 0.1f);
    if (!(nats / (double)t->m->rows < 50)) bench_die("the loss is %g", nats / (double)t->m->rows);
    return bench_now() - start;
}

static void measure(const bench_options *o, const train_shape *s)
{
    moe_desc desc = {0};
    bench_ok(moe_desc_system(&desc, s->choices), "moe_desc_system");
    desc.d_model = s->shape.d;
    desc.d_ff = s->hidden;
    if (s->shape.optimizer == LM_ADAMW) desc.expert = MOE_EXPERT_GELU_TANH;
    bench_ok(moe_desc_resolve(&desc, &desc), "moe_desc_resolve");
    size_t rows = s->batch * s->shape.length;
    trained t = {lm_new(&s->shape, &desc, rows), (int32_t *)bench_array(rows + 1, sizeof *t.token)};
    for (size_t i = 0; i <= rows; i++) t.token[i] = (int32_t)(moe_rand_u32(1, 0, i) % s->shape.vocab);
    run_step(&t);
    bench_subject subject = {"moe.h", run_step, &t};
    bench_row r = {.shape = s->name, .pass = "training step", .flops = lm_flops(t.m, rows) + lm_step_flops(t.m)};
    bench_measure(o, &r, &subject, 1);
    snprintf(r.note, sizeof r.note, "%.0f tokens/s; the model's products alone %.1f%%", (double)rows / r.seconds,
             100 * r.peak_share * lm_flops(t.m, rows) / r.flops);
    bench_print(o, &r);
    lm_free(t.m);
    free(t.token);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES];
    for (size_t i = 0; i < N_SHAPES; i++) names[i] = shapes[i].name;
    bench_options o = bench_parse(argc, argv, "a whole training step of a language model", names, N_SHAPES, 0,
                                  print_shapes);
    bench_header(&o, 0);
    for (moe_isa_kind isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(&o, isa)) continue;
        for (size_t k = 0; k < o.n_threads; k++) {
            if (!bench_use_threads(o.threads[k])) continue;
            for (size_t i = 0; i < N_SHAPES; i++)
                if (bench_listed(o.shape, shapes[i].name)) measure(&o, &shapes[i]);
        }
    }
    return 0;
}

/* How near is a layer in each weight format to the machine's limits? OLMoE's shape (d 2048, ff 1024, 64 experts, 8 a
 * token), forward: T = 1 and 32 against the read bandwidth, rotating over at least 1.5 GB of experts so that none is in
 * a cache; T = 512 against the peak of fused multiply-adds. Both limits are measured in the same run. The bytes are
 * those of the experts that were hit, scales included. The note has what the format costs in exactness: the root mean
 * square error of the outputs, relative to float32's.
 * Peers: PyTorch and ONNX Runtime, in the formats that they have (peer_formats.h). They are given the routing; their
 * outputs' error stands in the note too. */
#include "peer_formats.h"

enum { D = 2048, FF = 1024, E = 64, K = 8, N_TOKENS = 64 };
static const size_t tokens[] = {1, 32, 512};
enum { N_T = sizeof tokens / sizeof tokens[0], N_SHAPES = N_T * MOE_FORMAT_COUNT };

typedef struct model {
    moe_layer *layer[16];
    size_t n_layers, bytes; /* of a layer's experts */
    double error;           /* of a token's outputs */
} model;
typedef struct problem {
    const model *m;
    moe_tape *tape;
    size_t T, calls, next;
    float *x, *y; /* (calls, T, d); (T, d) */
} problem;

static void print_shapes(FILE *f)
{
    fprintf(f, "\nshape: FORMAT-T, d %d, ff %d, E %d, k %d\n", D, FF, E, K);
    for (int kind = 0; kind < MOE_FORMAT_COUNT; kind++)
        for (size_t t = 0; t < N_T; t++) fprintf(f, "  %s-%zu\n", moe_format_name((moe_format_kind)kind), tokens[t]);
}

static double forward(void *self)
{
    problem *p = (problem *)self;
    double start = bench_now();
    for (size_t call = 0; call < p->calls; call++, p->next++) {
        const moe_layer *layer = p->m->layer[p->next % p->m->n_layers];
        bench_ok(moe_forward_tape(layer, p->tape, p->x + call * p->T * D, p->T, p->y), "moe_forward_tape");
    }
    return (bench_now() - start) / (double)p->calls;
}

/* Bytes of the experts that the calls hit, of one. */
static double bytes_of(const problem *p)
{
    double sum = 0;
    for (size_t call = 0; call < p->calls; call++) {
        bench_ok(moe_forward_tape(p->m->layer[0], p->tape, p->x + call * p->T * D, p->T, p->y), "moe_forward_tape");
        for (size_t e = 0; e < E; e++)
            if (p->tape->routes.load[e]) sum += (double)moe_layer_expert_bytes(p->m->layer[0], e);
    }
    return sum / (double)p->calls;
}

static double error_of(const moe_layer *exact, const moe_layer *layer)
{
    float *x = bench_floats(N_TOKENS * D), *y = bench_floats(N_TOKENS * D), *want = bench_floats(N_TOKENS * D);
    double error = 0, size = 0;
    moe_tape *tape;
    bench_ok(moe_tape_new(&tape, moe_layer_desc(exact), N_TOKENS, MOE_OFF), "moe_tape_new");
    bench_ok(moe_rand_normal(7, 0, N_TOKENS * D, 0, 1, x), "moe_rand_normal");
    bench_ok(moe_forward_tape(exact, tape, x, N_TOKENS, want), "moe_forward_tape");
    bench_ok(moe_forward_tape(layer, tape, x, N_TOKENS, y), "moe_forward_tape");
    for (size_t i = 0; i < N_TOKENS * D; i++) {
        error += ((double)y[i] - (double)want[i]) * ((double)y[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    moe_tape_free(tape);
    free(x), free(y), free(want);
    return sqrt(error / size);
}

static void model_make(model *m, moe_layer *exact, moe_format_kind kind)
{
    moe_layer_formats formats = {kind, NULL, MOE_OFF, 0, NULL};
    memset(m, 0, sizeof *m);
    do {
        moe_layer **layer = &m->layer[m->n_layers++];
        if (kind == MOE_FORMAT_F32) *layer = exact;
        else bench_ok(moe_layer_quantize(exact, &formats, layer), "moe_layer_quantize");
        m->bytes = moe_layer_expert_bytes(*layer, 0) * E;
    } while (m->bytes * m->n_layers < (size_t)1500000000);
    m->error = error_of(exact, m->layer[0]);
}

/* ---- the peers ------------------------------------------------------------------------------ */
typedef struct peers {
    peer_calls calls;
    peer_layer layer[N_PEER_PROGRAMS];
    float *weight, *y;
    int32_t *index;
    size_t n;
} peers;

/* Starts those that are asked for and have the format, on the problem's tokens, routed as the layer in float32 does. */
static void peers_start(peers *all, const bench_options *o, problem *p, moe_layer *exact, moe_format_kind kind,
                        const char *weights)
{
    size_t routes = p->calls * p->T * K, bytes = moe_layer_expert_bytes(p->m->layer[0], 0) * E;
    memset(all, 0, sizeof *all);
    if (!*weights) return;
    all->weight = bench_floats(routes), all->y = bench_floats(p->T * D);
    all->index = (int32_t *)bench_array(routes, sizeof(int32_t));
    for (size_t call = p->calls; call-- > 0;) { /* the first one last: its y stays */
        bench_ok(moe_forward_tape(exact, p->tape, p->x + call * p->T * D, p->T, all->y), "moe_forward_tape");
        memcpy(all->weight + call * p->T * K, p->tape->weight, p->T * K * sizeof(float));
        memcpy(all->index + call * p->T * K, p->tape->index, p->T * K * sizeof(int32_t));
    }
    all->calls = (peer_calls){p->calls, p->T, D, FF, E, K, 1, kind, p->x, all->weight, all->y, all->index, "", ""};
    while (all->calls.n_layers < 4 && bytes * all->calls.n_layers < (size_t)1500000000) all->calls.n_layers++;
    snprintf(all->calls.weights, sizeof all->calls.weights, "%s", weights);
    peer_write_calls(&all->calls);
    for (size_t i = 0; i < N_PEER_PROGRAMS; i++)
        all->n += (size_t)peer_layer_start(&all->layer[all->n], o, &peer_programs[i], &all->calls);
    unlink(all->calls.path);
}
static void peers_stop(peers *all)
{
    for (size_t i = 0; i < all->n; i++) peer_stop(&all->layer[i].process);
    free(all->weight), free(all->y), free(all->index);
}

static void measure(const bench_options *o, const model *m, moe_layer *exact, moe_format_kind kind, size_t T,
                    const char *weights)
{
    char shape[32];
    bench_row row;
    peers all;
    problem p = {m, NULL, T, T == 1 ? N_TOKENS : 1, 0, NULL, NULL};
    bench_subject subject[1 + N_PEER_PROGRAMS] = {{"moe.h", forward, &p}};
    memset(&row, 0, sizeof row);
    snprintf(shape, sizeof shape, "%s-%zu", moe_format_name(kind), T);
    if (!bench_listed(o->shape, shape)) return;
    p.x = bench_floats(p.calls * T * D), p.y = bench_floats(T * D);
    bench_ok(moe_rand_normal(3, 0, p.calls * T * D, 0, 1, p.x), "moe_rand_normal");
    bench_ok(moe_tape_new(&p.tape, moe_layer_desc(m->layer[0]), T, MOE_OFF), "moe_tape_new");
    row.shape = shape;
    row.pass = "forward";
    row.flops = 2.0 * (double)T * K * 3 * D * FF;
    row.bytes = T > 256 ? 0 : bytes_of(&p);
    snprintf(row.note, sizeof row.note, "%.2f bits a weight, error %.2e", 8.0 * (double)m->bytes / (3.0 * E * D * FF),
             m->error);
    peers_start(&all, o, &p, exact, kind, weights);
    for (size_t i = 0; i < all.n; i++) {
        size_t used = strlen(row.note);
        subject[1 + i] = (bench_subject){all.layer[i].program->name, peer_layer_run, &all.layer[i]};
        snprintf(row.note + used, sizeof row.note - used, ", %s's %.2e", all.layer[i].program->name,
                 all.layer[i].error);
    }
    bench_measure(o, &row, subject, 1 + all.n);
    bench_print(o, &row);
    peers_stop(&all);
    moe_tape_free(p.tape);
    free(p.x), free(p.y);
}

static void measure_format(const bench_options *o, moe_layer *exact, moe_format_kind kind, const char *weights)
{
    model m;
    model_make(&m, exact, kind);
    for (int isa = MOE_ISA_AUTO; isa < MOE_ISA_COUNT; isa++) {
        if (!bench_use_isa(o, (moe_isa_kind)isa)) continue;
        for (size_t t = 0; t < N_T; t++)
            for (size_t i = 0; i < o->n_threads; i++)
                if (bench_use_threads(o->threads[i])) measure(o, &m, exact, kind, tokens[t], weights);
    }
    for (size_t i = 0; i < m.n_layers; i++)
        if (m.layer[i] != exact) moe_layer_free(m.layer[i]);
}

int main(int argc, char **argv)
{
    const char *names[N_SHAPES];
    char name[N_SHAPES][32];
    moe_desc desc = {0};
    moe_layer *exact;
    peer_calls given = {.d = D, .ff = FF, .E = E};
    for (size_t i = 0; i < N_SHAPES; i++) {
        const char *format = moe_format_name((moe_format_kind)(i / N_T));
        snprintf(name[i], sizeof name[i], "%s-%zu", format, tokens[i % N_T]);
        names[i] = name[i];
    }
    bench_options o = bench_parse(argc, argv, "speed of a layer in each weight format", names, N_SHAPES, 0,
                                  print_shapes);
    desc.d_model = D, desc.d_ff = FF, desc.n_experts = E, desc.top_k = K, desc.training = MOE_OFF;
    bench_ok(moe_layer_new(&exact, &desc), "moe_layer_new");
    size_t n_peers = 0;
    for (size_t i = 0; i < N_PEER_PROGRAMS; i++) n_peers += (size_t)bench_listed(o.peers, peer_programs[i].name);
    if (n_peers) peer_write_weights(&given, exact);
    bench_header(&o, n_peers);
    for (int kind = 0; kind < MOE_FORMAT_COUNT; kind++) {
        int any = 0;
        for (size_t t = 0; t < N_T; t++) any |= bench_listed(o.shape, names[(size_t)kind * N_T + t]);
        if (any) measure_format(&o, exact, (moe_format_kind)kind, given.weights);
    }
    if (n_peers) unlink(given.weights);
    moe_layer_free(exact);
    if (o.csv && fclose(o.csv) != 0) bench_die("--csv: the file could not be written to its end");
    return 0;
}

// expert_parallel.c - a mixture whose experts lie on the processes of an MPI job. Each process has the router, its own
// experts and its share of every batch; tokens travel to their experts and their outputs back, while others are
// computed. What comes out does not depend on how many processes there are: the checksum of the trained network is the
// one of one process.
//
//     mpirun -np 4 build/expert_parallel                       all methods, on the sample of CIFAR-10 here
//     mpirun -np 4 build/expert_parallel --method standard,llep
//
// The network is that of zoo (common/tokens_net.h), one expert a token. Methods:
//
//     standard        made to collapse: a constant in every token, for which the router begins with its first expert
//     llep            the same, with least-loaded expert parallelism: what is too much for a rank goes to others
//     balanced        no constant, and the loss switch: what the next ones are compared with
//     blocking        the same, but each exchange is waited for at once, as --no-overlap does for all
//     gating-dropout  in 3 of 10 steps, drawn once for all, no token leaves its rank
//     sorted          as balanced, but each batch is in the order of the classes, so that the ranks have unlike tokens:
//                     where they have not, no router can tell on which rank a token is
//     locality        the same with LocMoE's locality loss: tokens prefer the experts of their rank
#define MOE_IMPLEMENTATION
#include "common/experiment.h"

#include <limits.h>
#include <mpi.h>

enum { CONSTANT = NET_D - 1, D_FF = 32 };
static const float constant = 4, head_start = 1; // the first expert's logit begins at their product

// ---- MPI as moe.h wants it: what fails returns, and the library makes a status of it ----

enum { WAYS = 3 }; // there and back, which may be under way together; at once
typedef struct world {
    int rank, size;
    int *count; // (WAYS, 4, size) bytes and places of what is sent and received
    MPI_Request request[2];
    double waited; // seconds in the exchanges
} world;

// Bytes as MPI counts them, in int; 1: too many.
static int world_places(const world *w, const size_t *bytes, int *count, int *place) {
    size_t at = 0;
    for (int r = 0; r < w->size; r++) {
        if (bytes[r] > INT_MAX - at) return 1;
        count[r] = (int)bytes[r];
        place[r] = (int)at;
        at += bytes[r];
    }
    return 0;
}
static int world_begin(void *context, int way, const void *send, const size_t *send_bytes, void *receive,
                       const size_t *receive_bytes) {
    world *w = context;
    int *out = w->count + way * 4 * w->size, *from = out + w->size, *in = from + w->size, *to = in + w->size;
    double begin = seconds_now();
    if (world_places(w, send_bytes, out, from) || world_places(w, receive_bytes, in, to)) return 1;
    int failed = MPI_Ialltoallv(send, out, from, MPI_BYTE, receive, in, to, MPI_BYTE, MPI_COMM_WORLD, &w->request[way]);
    w->waited += seconds_now() - begin;
    return failed != MPI_SUCCESS;
}
static int world_wait(void *context, int way) {
    world *w = context;
    double begin = seconds_now();
    int failed = MPI_Wait(&w->request[way], MPI_STATUS_IGNORE);
    w->waited += seconds_now() - begin;
    return failed != MPI_SUCCESS;
}
// At once, and with the blocking function: of one array that is sent and received MPI's others think that it stays.
static int world_exchange(void *context, const void *send, const size_t *send_bytes, void *receive,
                          const size_t *receive_bytes) {
    world *w = context;
    int *out = w->count + 2 * 4 * w->size, *from = out + w->size, *in = from + w->size, *to = in + w->size;
    double begin = seconds_now();
    if (world_places(w, send_bytes, out, from) || world_places(w, receive_bytes, in, to)) return 1;
    int failed = MPI_Alltoallv(send, out, from, MPI_BYTE, receive, in, to, MPI_BYTE, MPI_COMM_WORLD);
    w->waited += seconds_now() - begin;
    return failed != MPI_SUCCESS;
}
static int world_sum(void *context, uint64_t *values, size_t n) {
    (void)context;
    if (n > INT_MAX) return 1;
    return MPI_Allreduce(MPI_IN_PLACE, values, (int)n, MPI_UINT64_T, MPI_SUM, MPI_COMM_WORLD) != MPI_SUCCESS;
}
static int world_broadcast(void *context, size_t root, void *bytes, size_t n) {
    (void)context;
    if (n > INT_MAX) return 1;
    return MPI_Bcast(bytes, (int)n, MPI_BYTE, (int)root, MPI_COMM_WORLD) != MPI_SUCCESS;
}
// A status ends the program on all ranks, with a message.
static void world_must(const world *w, moe_status status) {
    if (!status) return;
    fprintf(stderr, "expert_parallel: rank %d: %s\n", w->rank, moe_status_string(status));
    MPI_Abort(MPI_COMM_WORLD, 1);
}

// ---- the methods ----

typedef struct method {
    const char *name, *set;
    int skewed, llep, ranks, sorted, blocking; // ranks: desc.n_ranks is that of the job, which must be more than one
} method;
enum { STANDARD, LLEP, BALANCED, BLOCKING, DROPOUT, SORTED, LOCALITY, METHODS };
#define TOP "top_k=1 normalize=false "
static const method methods[METHODS] = {
    {"standard", TOP, 1, 0, 0, 0, 0},
    {"llep", TOP, 1, 1, 0, 0, 0},
    {"balanced", TOP "loss.switch=0.01", 0, 0, 0, 0, 0},
    {"blocking", TOP "loss.switch=0.01", 0, 0, 0, 0, 1},
    {"gating-dropout", TOP "loss.switch=0.01 gate_drop=0.3", 0, 0, 1, 0, 0},
    {"sorted", TOP "loss.switch=0.01", 0, 0, 0, 1, 0},
    {"locality", TOP "loss.switch=0.01 loss.locality=0.1", 0, 0, 1, 1, 0},
};
static const char *method_name(void *unused, size_t i) { // for experiment_choose
    (void)unused;
    return i < METHODS ? methods[i].name : NULL;
}

typedef struct config {
    experiment e;
    const char *method, *set;
    size_t min_tokens;
    int no_overlap;
    unsigned char chosen[METHODS];
    world w;
} config;

typedef struct result {
    const method *method;
    double loss, test_loss, accuracy, seconds;
    double imbalance, home;          // mean over the steps; share of the routes that stay on their rank
    uint64_t makespan, dropped;      // sum over the steps of the largest rank's rows; steps without exchange
    uint64_t row_bytes, weight_bytes, other_bytes; // sent by all ranks
    double waited;                   // of the seconds, those in exchanges: mean over the ranks
    uint64_t params, grads, moments, experts, guests; // bytes of the largest rank; of the first three the experts'
    uint64_t routes, at_home, checksum;
} result;

static moe_desc layer_desc(const config *o, const method *m) {
    moe_desc d = {.d_model = NET_D, .d_ff = D_FF, .n_experts = o->e.experts, .seed = o->e.plan.seed};
    d.parallel.n_threads = o->e.plan.threads;
    d.weight_decay = o->e.plan.decay;
    nn_set("expert_parallel", &d, m->set);
    if (o->e.top_k) nn_top_k(&d, o->e.top_k);
    if (m->ranks) d.n_ranks = (size_t)o->w.size;
    nn_set("expert_parallel", &d, o->set);
    nn_resolve("expert_parallel", "", &d);
    return d;
}
// The collapse begins: one number of each token is the same, and the first expert likes it.
static void favour_first(moe_layer *layer, size_t experts) {
    float *router = allocate(NET_D * experts, sizeof *router);
    nn_must(moe_layer_get(layer, MOE_PART_PARAMS, "router", router, NET_D * experts));
    router[CONSTANT * experts] = head_start;
    nn_must(moe_layer_set(layer, MOE_PART_PARAMS, "router", router, NET_D * experts));
    free(router);
}

// ---- a training over the ranks ----

typedef struct job {
    config *o;
    const method *m;
    net *n;
    moe_ranks *ranks;
    size_t first, images; // this rank's of the batch
    int *count, *place;   // (size) floats of q that each rank makes
} job;

static void take_batch(job *j, size_t step) {
    const net_plan *plan = &j->o->e.plan;
    const samples *data = &j->o->e.samples;
    net *n = j->n;
    size_t count = data->train->count, per_epoch = count / plan->batch, epoch = step / per_epoch;
    if (!n->order) n->order = allocate(count, sizeof *n->order);
    if (step % per_epoch == 0) cifar_shuffle(n->order, count, plan->seed, epoch);
    const uint32_t *batch = n->order + step % per_epoch * plan->batch;
    size_t taken = 0;
    for (int class = 0; class < (j->m->sorted ? NET_CLASSES : 1); class++)
        for (size_t i = 0; i < plan->batch; i++) {
            if (j->m->sorted && data->train->label[batch[i]] != class) continue;
            net_take(n, taken++, &data->train[(moe_rand_u32(plan->seed, 1000, batch[i]) + epoch) & 1], batch[i]);
        }
    for (size_t t = 0; j->m->skewed && t < plan->batch * NET_T; t++) n->x[t * NET_D + CONSTANT] = constant;
}
// Mean over an image's tokens of x + y, of this rank's images; then of all ranks'.
static void share_means(job *j) {
    net *n = j->n;
    for (size_t i = j->first; i < j->first + j->images; i++)
        for (size_t k = 0; k < NET_D; k++) {
            float sum = 0;
            for (size_t t = i * NET_T; t < (i + 1) * NET_T; t++) sum += n->x[t * NET_D + k] + n->y[t * NET_D + k];
            n->q[i * NET_D + k] = sum * (1.0f / NET_T);
        }
    if (MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, n->q, j->count, j->place, MPI_FLOAT, MPI_COMM_WORLD))
        world_must(&j->o->w, MOE_E_EP_EXCHANGE);
}
static void note_step(const job *j, result *r) {
    const moe_ep *plan = moe_ranks_report(j->ranks)->plan;
    const moe_tape *tape = moe_ranks_tape(j->ranks);
    size_t each = plan->n_experts / plan->n_ranks, own = (size_t)j->o->w.rank * each;
    r->makespan += plan->makespan;
    r->imbalance += plan->imbalance;
    r->dropped += (uint64_t)tape->dropped;
    r->routes += tape->routes.n_routes;
    r->at_home += tape->routes.begin[own + each] - tape->routes.begin[own];
}
// The linear classifier is small: every rank has it, and trains it on the whole batch.
static void train_step(job *j, size_t step, result *r) {
    const net_plan *plan = &j->o->e.plan;
    net *n = j->n;
    size_t at = j->first * NET_T * NET_D, rows = j->images * NET_T, all = plan->batch;
    float lr = moe_schedule_cosine(step, plan->total / 10, plan->total, (float)plan->lr, 0);
    take_batch(j, step);
    world_must(&j->o->w, moe_ep_forward(j->ranks, n->x + at, rows, n->y + at));
    note_step(j, r);
    share_means(j);
    nn_linear_forward(&n->ops, all, NET_D, NET_CLASSES, n->q, n->bank.value + n->class_weight,
                      n->bank.value + n->class_bias, n->logits);
    r->loss = nn_cross_entropy(&n->ops, all, NET_CLASSES, plan->smoothing, n->logits, n->label, n->prob, n->dlogits);
    r->loss /= (double)all;
    nn_linear_backward(&n->ops, all, NET_D, NET_CLASSES, n->q, n->bank.value + n->class_weight, n->dlogits, n->dq,
                       n->bank.grad + n->class_weight, n->bank.grad + n->class_bias);
    for (size_t i = at; i < at + rows * NET_D; i++)
        n->dy[i] = n->dq[i / (NET_T * NET_D) * NET_D + i % NET_D] * (1.0f / NET_T);
    world_must(&j->o->w, moe_ep_backward(j->ranks, n->dy + at, NULL));
    world_must(&j->o->w, moe_step(n->moe, lr));
    nn_bank_step(&n->bank, (moe_optimizer_args){
                               .lr = lr, .weight_decay = plan->decay, .step = step + 1, .parallel = &n->ops.parallel});
}
static job job_begin(config *o, const method *m) {
    moe_desc d = layer_desc(o, m);
    size_t size = (size_t)o->w.size, rank = (size_t)o->w.rank, batch = o->e.plan.batch;
    moe_ep_engine engine = {.rank = rank, .size = size, .exchange = world_exchange, .sum = world_sum,
                            .broadcast = world_broadcast, .context = &o->w};
    if (!o->no_overlap && !m->blocking) engine.begin = world_begin, engine.wait = world_wait;
    moe_ep_desc plan = {.llep = m->llep, .min_tokens = o->min_tokens};
    job j = {.o = o, .m = m, .n = net_new(&o->e.plan, NULL)};
    nn_must(moe_layer_new_shard(&j.n->moe, &d, rank, size));
    if (m->skewed) favour_first(j.n->moe, d.n_experts);
    world_must(&o->w, moe_ranks_new(&j.ranks, j.n->moe, &engine, &plan));
    j.count = allocate(2 * size, sizeof *j.count);
    j.place = j.count + size;
    for (size_t r = 0; r < size; r++) {
        j.place[r] = (int)(r * batch / size * NET_D);
        j.count[r] = (int)((r + 1) * batch / size * NET_D) - j.place[r];
    }
    j.first = rank * batch / size;
    j.images = (rank + 1) * batch / size - j.first;
    return j;
}
static void job_end(job *j) {
    moe_ranks_free(j->ranks);
    net_free(j->n);
    free(j->count);
}
static uint64_t over_ranks(uint64_t value, MPI_Op op) {
    MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_UINT64_T, op, MPI_COMM_WORLD);
    return value;
}
static uint64_t total(uint64_t value) { return over_ranks(value, MPI_SUM); }
static void note_memory(const moe_ep_report *report, result *r) {
    const size_t *part = report->part_bytes;
    r->params = over_ranks(part[MOE_PART_PARAMS], MPI_MAX);
    r->grads = over_ranks(part[MOE_PART_GRADS], MPI_MAX);
    r->moments = over_ranks(part[MOE_PART_MOMENT1] + part[MOE_PART_MOMENT2], MPI_MAX);
    r->guests = over_ranks(report->guest_bytes, MPI_MAX);
    for (int i = 0; i < MOE_PART_COUNT; i++) r->experts += part[i] ? report->expert_bytes : 0;
    r->experts = over_ranks(r->experts, MPI_MAX);
}
// Rank 0 gets the whole layer, to test it; the shards are done with.
static void collect(job *j, result *r) {
    moe_layer *whole = NULL;
    world_must(&j->o->w, moe_ep_collect(j->ranks, 0, &whole));
    if (!whole) return;
    moe_ranks_free(j->ranks);
    moe_layer_free(j->n->moe);
    j->ranks = NULL;
    j->n->moe = whole;
    r->checksum = moe_layer_hash(whole);
}
// The test is rank 0's alone, which has all experts by then; of skewed tokens, if it learned such.
static void test_net(job *j, result *r) {
    tokens *set = &j->o->e.samples.test;
    size_t count = set->count * NET_T;
    float *kept = allocate(count, sizeof *kept);
    for (size_t t = 0; t < count; t++) {
        kept[t] = set->x[t * NET_D + CONSTANT];
        if (j->m->skewed) set->x[t * NET_D + CONSTANT] = constant;
    }
    if (net_test(j->n, &j->o->e.plan, set, set->count, &r->test_loss, &r->accuracy)) r->accuracy = NAN;
    for (size_t t = 0; t < count; t++) set->x[t * NET_D + CONSTANT] = kept[t];
    free(kept);
}
static result train(config *o, const method *m) {
    size_t steps = o->e.plan.total;
    job j = job_begin(o, m);
    result r = {.method = m};
    progress p = progress_begin(m->name, "steps", steps, o->e.quiet || o->w.rank);
    double begin = seconds_now();
    o->w.waited = 0;
    for (size_t step = 0; step < steps; step++) {
        train_step(&j, step, &r);
        progress_update(&p, step + 1, "loss %.3f", r.loss);
    }
    progress_clear(&p);
    r.seconds = seconds_now() - begin;
    r.waited = (double)total((uint64_t)(o->w.waited * 1e9)) * 1e-9 / (double)o->w.size;
    const moe_ep_report *report = moe_ranks_report(j.ranks);
    note_memory(report, &r);
    r.row_bytes = total(report->row_bytes);
    r.weight_bytes = total(report->weight_bytes);
    r.other_bytes = total(report->other_bytes);
    r.routes = total(r.routes);
    r.home = (double)total(r.at_home) / (double)r.routes;
    r.imbalance /= (double)steps;
    collect(&j, &r);
    for (size_t i = 0; i < 2; i++) {
        size_t at = i ? j.n->class_bias : j.n->class_weight, count = i ? NET_CLASSES : NET_D * NET_CLASSES;
        r.checksum = moe_hash(r.checksum, j.n->bank.value + at, count * sizeof(float));
    }
    if (o->w.rank == 0) test_net(&j, &r);
    job_end(&j);
    return r;
}

// ---- what rank 0 writes ----

enum { COLUMNS = 12 };
static const char *const heading[COLUMNS] = {
    "method",   "test accuracy", "makespan",  "imbalance", "at home", "dropped",
    "rows, MB", "weights, MB",   "other, MB", "MB a rank", "seconds", "checksum"};
static void row_cells(const result *r, char cell[COLUMNS][64]) {
    snprintf(cell[0], 64, "%s", r->method->name);
    experiment_number(cell[1], "%.1f%%", 100 * r->accuracy);
    snprintf(cell[2], 64, "%llu", (unsigned long long)r->makespan);
    snprintf(cell[3], 64, "%.2f", r->imbalance);
    snprintf(cell[4], 64, "%.1f%%", 100 * r->home);
    snprintf(cell[5], 64, "%llu", (unsigned long long)r->dropped);
    snprintf(cell[6], 64, "%.2f", (double)r->row_bytes * 1e-6);
    snprintf(cell[7], 64, "%.2f", (double)r->weight_bytes * 1e-6);
    snprintf(cell[8], 64, "%.2f", (double)r->other_bytes * 1e-6);
    snprintf(cell[9], 64, "%.2f", (double)(r->params + r->grads + r->moments + r->guests) * 1e-6);
    snprintf(cell[10], 64, "%.1f", r->seconds);
    snprintf(cell[11], 64, "%016llx", (unsigned long long)r->checksum);
}
static void print_row(FILE *f, const char *const *cell) {
    static const int width[COLUMNS] = {-16, 14, 10, 10, 9, 9, 10, 13, 11, 11, 9, 18};
    experiment_row(f, COLUMNS, width, cell);
    fflush(f);
}
static void print_result(FILE *f, const result *r) {
    char cell[COLUMNS][64];
    const char *text[COLUMNS];
    row_cells(r, cell);
    for (int i = 0; i < COLUMNS; i++) text[i] = cell[i];
    print_row(f, text);
}
static void write_final(json *j, const config *o, const result *r) {
    char checksum[32];
    snprintf(checksum, sizeof checksum, "%016llx", (unsigned long long)r->checksum);
    json_begin(j);
    json_text(j, "event", "final");
    json_text(j, "method", r->method->name);
    json_whole(j, "ranks", (uint64_t)o->w.size);
    json_real(j, "loss", r->loss);
    json_real(j, "test_loss", r->test_loss);
    json_real(j, "test_accuracy", r->accuracy);
    json_whole(j, "makespan", r->makespan);
    json_real(j, "imbalance", r->imbalance);
    json_real(j, "home", r->home);
    json_whole(j, "dropped", r->dropped);
    json_whole(j, "row_bytes", r->row_bytes);
    json_whole(j, "weight_bytes", r->weight_bytes);
    json_whole(j, "other_bytes", r->other_bytes);
    json_whole(j, "param_bytes", r->params);
    json_whole(j, "grad_bytes", r->grads);
    json_whole(j, "optimizer_bytes", r->moments);
    json_whole(j, "expert_bytes", r->experts);
    json_whole(j, "guest_bytes", r->guests);
    json_real(j, "waited", r->waited);
    json_real(j, "seconds", r->seconds);
    json_text(j, "checksum", checksum);
    json_end(j);
}
// What the published numbers are about, of the methods that ran.
static void print_ratios(FILE *f, const result *r, size_t n, size_t steps) {
    const result *of[METHODS] = {NULL};
    for (size_t i = 0; i < n; i++) of[r[i].method - methods] = &r[i];
    fprintf(f,
            "Memory of a rank: parameters %.3f MB, gradients %.3f MB, optimiser %.3f MB; its experts' share %.3f MB\n",
            (double)r->params * 1e-6, (double)r->grads * 1e-6, (double)r->moments * 1e-6, (double)r->experts * 1e-6);
    if (of[BALANCED] && of[BLOCKING])
        fprintf(f, "Overlap: %.1f%% of the exchange hidden (waited for %.2f s of %.2f, without overlap %.2f of %.2f)\n",
                100 * (1 - of[BALANCED]->waited / of[BLOCKING]->waited), of[BALANCED]->waited, of[BALANCED]->seconds,
                of[BLOCKING]->waited, of[BLOCKING]->seconds);
    if (of[STANDARD] && of[LLEP])
        fprintf(f, "LLEP: makespan / %.2f (published: a layer 6.11 times as fast at 95%% skew and 8 ranks)\n",
                (double)of[STANDARD]->makespan / (double)of[LLEP]->makespan);
    if (of[BALANCED] && of[DROPOUT] && of[BALANCED]->row_bytes)
        fprintf(f, "Gating Dropout: %.1f%% of the steps without exchange, bytes of rows %+.1f%%\n",
                100 * (double)of[DROPOUT]->dropped / (double)steps,
                100 * ((double)of[DROPOUT]->row_bytes / (double)of[BALANCED]->row_bytes - 1));
    if (of[SORTED] && of[LOCALITY] && of[SORTED]->row_bytes)
        fprintf(f, "Locality: at home %.1f%% -> %.1f%%, bytes of rows %+.1f%%, makespan %+.1f%% (LocMoE's epochs: "
                   "-12.68%% to -22.24%%)\n",
                100 * of[SORTED]->home, 100 * of[LOCALITY]->home,
                100 * ((double)of[LOCALITY]->row_bytes / (double)of[SORTED]->row_bytes - 1),
                100 * ((double)of[LOCALITY]->makespan / (double)of[SORTED]->makespan - 1));
}
static void write_pages(const config *o, const result *r, size_t n) {
    double value[METHODS];
    FILE *f = experiment_file(&o->e, "html");
    page_begin(f, "Experts on ranks", "The same network, with its experts on the processes of an MPI job.");
    page_card(f);
    page_table_begin(f);
    for (size_t i = 0; i <= n; i++) {
        char cell[COLUMNS][64];
        for (int k = 0; k < COLUMNS && !i; k++) snprintf(cell[k], 64, "%s", heading[k]);
        if (i) row_cells(&r[i - 1], cell);
        page_row(f, !i, "%s|<%s|%s|%s|%s|%s|%s|%s|%s|%s|%s|%s", cell[0], cell[1], cell[2], cell[3], cell[4],
                 cell[5], cell[6], cell[7], cell[8], cell[9], cell[10], cell[11]);
    }
    page_table_end(f);
    page_card_end(f);
    page_end(f);
    experiment_close(&o->e, f, "html");
    for (size_t i = 0; i < n; i++) value[i] = (double)r[i].makespan;
    plot_bar_chart bars = {{0, 0, 560, 280}, "largest rank's work over the training, in rows", "method", n, value,
                           0, 0};
    f = experiment_file(&o->e, "svg");
    plot_begin(f, 560, 280, "Experts on ranks");
    plot_bars(f, &bars);
    plot_end(f);
    experiment_close(&o->e, f, "svg");
}

// ---- the program ----

static void parse(config *o, int argc, char **argv) {
    args_option options[] = {
        EXPERIMENT_OPTIONS(&o->e),
        ARGS_SET(&o->set),
        {"method", ARGS_TEXT, &o->method, "NAMES",
         "standard,llep,balanced,blocking,gating-dropout,sorted,locality", 0, 0},
        {"no-overlap", ARGS_FLAG, &o->no_overlap, NULL, "each exchange is waited for at once", 0, 0},
        {"min-tokens", ARGS_SIZE, &o->min_tokens, "N", "LLEP: fewer tokens do not travel", 1, 0},
    };
    args_parse("expert_parallel", "Trains a mixture whose experts lie on the processes of an MPI job.", options,
               sizeof options / sizeof *options, argc, argv);
    experiment_choose("expert_parallel", "method", o->method, METHODS, method_name, o->chosen);
    if (!o->e.experts) o->e.experts = 12;
    if (!o->e.plan.batch) o->e.plan.batch = 48;
    if (!o->e.plan.threads) o->e.plan.threads = 1;
    if (o->e.experts % (size_t)o->w.size)
        args_fail("expert_parallel", "%d processes do not divide %zu experts", o->w.size, o->e.experts);
}
static int runs(const config *o, size_t i) {
    return o->chosen[i] && ((!methods[i].ranks && !methods[i].blocking) || o->w.size > 1);
}
static void begin(config *o) {
    experiment_begin(&o->e);
    if (o->w.rank) return;
    experiment_config(&o->e);
    json_whole(&o->e.lines, "ranks", (uint64_t)o->w.size);
    for (size_t i = 0; i < METHODS; i++) {
        if (!runs(o, i)) continue;
        moe_desc d = layer_desc(o, &methods[i]);
        experiment_layer(&o->e, methods[i].name, &d);
    }
    json_end(&o->e.lines);
    fprintf(o->e.human, "%d ranks, %zu steps of %zu images\n", o->w.size, o->e.plan.total, o->e.plan.batch);
    print_row(o->e.human, heading);
}
int main(int argc, char **argv) {
    config o = {.e = experiment_defaults("expert_parallel"), .method = "all", .min_tokens = 16};
    result r[METHODS];
    size_t n = 0;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &o.w.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &o.w.size);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    o.w.count = allocate(WAYS * 4 * (size_t)o.w.size, sizeof *o.w.count);
    if (o.w.rank && !freopen("/dev/null", "w", stdout)) return 1; // one rank speaks
    parse(&o, argc, argv);
    experiment_load(&o.e, argv[0], (experiment_by_data){{8, 1}, {0.01, 0.005}});
    if (o.w.rank) o.e.human = stdout, o.e.quiet = 1;
    begin(&o);
    for (size_t i = 0; i < METHODS; i++) {
        if (!runs(&o, i)) continue;
        r[n] = train(&o, &methods[i]);
        if (o.w.rank == 0) write_final(&o.e.lines, &o, &r[n]), print_result(o.e.human, &r[n]);
        n++;
    }
    if (o.w.rank == 0) {
        print_ratios(o.e.human, r, n, o.e.plan.total);
        write_pages(&o, r, n);
        experiment_end(&o.e);
    }
    experiment_free(&o.e);
    free(o.w.count);
    MPI_Finalize();
    return 0;
}

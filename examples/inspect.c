// inspect.c - how does a model route? Looks at router logits, at top-k indices, or at router weights and hidden states.
//
//     build/inspect                                    three routers that the repository carries
//     build/inspect --top-k 8 logits.npy               (tokens, experts) or (layers, tokens, experts)
//     build/inspect --logits z.npy --indices i.npy     the load is that of the indices
//     build/inspect --router model.safetensors --top-k 8 hidden.npy
//     build/inspect --explain                          the same in words: what is wrong, and which knob to turn
//     build/inspect --series --steps-at 1000,2000,4000 a.npy b.npy c.npy
//
// For each layer: the load and its metrics, and gamma_eff of the congestion game with its interval. docs/inspect.md
// says what every column means and how to get the files from a model; docs/gamma.md has the mathematics.
#define MOE_IMPLEMENTATION
#include "common/inspect_show.h"

// The routers that the repository carries, from the current folder or from that of the program.
static const char *sample_path(const char *program) {
    static char path[1200];
    char folder[1100];
    if (!sample_folder(program, "examples/data", "router.npy", folder, sizeof folder))
        args_fail("inspect", "no files given, and the sample examples/data/router.npy is not there");
    snprintf(path, sizeof path, "%s/router.npy", folder);
    return path;
}

static void parse(inspect_config *o, int argc, char **argv) {
    args_option options[] = {
        {"logits", ARGS_TEXT, &o->logits, "FILE", "router logits, .npy (as the first file without an option)", 0, 0},
        {"indices", ARGS_TEXT, &o->indices, "FILE", "selected experts, .npy (T, k): the load is theirs", 0, 0},
        {"router", ARGS_TEXT, &o->router, "FILE", "safetensors, or its index: the files are hidden states", 0, 0},
        {"labels", ARGS_TEXT, &o->labels, "FILE", "a class for each token, .npy of integers", 0, 0},
        {"top-k", ARGS_SIZE, &o->top_k, "N", "experts a token, where no indices are given", 1, 1 << 20},
        {"experts", ARGS_SIZE, &o->experts, "N", "experts, where only indices are given (0: the largest index + 1)", 0,
         1 << 20},
        {"probabilities", ARGS_FLAG, &o->probabilities, NULL, "the files hold probabilities: take their log", 0, 0},
        {"bf16", ARGS_FLAG, &o->bf16, NULL, "uint16 files hold bfloat16", 0, 0},
        {"batches", ARGS_SIZE, &o->batches, "N", "batches that the bootstrap draws from", 1, 1 << 20},
        {"bootstrap", ARGS_SIZE, &o->bootstrap, "N", "replicates for the intervals (0: none)", 0, 1 << 24},
        {"types", ARGS_SIZE, &o->types, "C", "types of tokens", 1, 64},
        {"explain", ARGS_FLAG, &o->explain, NULL, "in words: what is wrong, how sure that is, what to do", 0, 0},
        {"relations", ARGS_FLAG, &o->relations, NULL, "chosen together, from layer to layer, over the layers", 0, 0},
        {"compare", ARGS_TEXT, &o->compare, "FILE", "another dump, beside the first: what is kept", 0, 0},
        {"csv", ARGS_FLAG, &o->csv, NULL, "write inspect.csv, a layer a row", 0, 0},
        {"series", ARGS_FLAG, &o->series, NULL, "the files are checkpoints, in order", 0, 0},
        {"steps-at", ARGS_TEXT, &o->steps_at, "A,B,...", "the checkpoints' steps (default: 1, 2, ...)", 0, 0},
        ARGS_SEED(&o->seed),
        ARGS_THREADS(&o->threads),
        {"html", ARGS_FLAG, &o->html, NULL, "write inspect.html, which needs nothing else", 0, 0},
        ARGS_OUT(&o->out),
        ARGS_JSON(&o->json),
        ARGS_QUIET(&o->quiet),
    };
    o->file = allocate((size_t)argc + 1, sizeof *o->file);
    o->n_files = args_parse_files("inspect", "Tells how a model routes, from .npy files of its router's logits.",
                                 options, sizeof options / sizeof *options, argc, argv, o->file);
    o->parallel.n_threads = o->threads;
    if (o->series && !o->bootstrap) args_fail("inspect", "--series: phases need intervals, so --bootstrap above 0");
    if (o->steps_at && !o->series) args_fail("inspect", "--steps-at: only with --series");
    if (o->logits) o->file[o->n_files++] = o->logits;
    if (o->indices && o->n_files > 1) args_fail("inspect", "--indices: with one file of logits at most");
    if (o->probabilities && o->router) args_fail("inspect", "--probabilities: not of hidden states");
    if (!o->n_files && !o->indices) {
        o->file[o->n_files++] = sample_path(argv[0]);
        if (!o->top_k) o->top_k = 2; // the sample's
    }
    if (o->compare && (o->series || o->n_files > 1)) args_fail("inspect", "--compare: with one dump, no --series");
    if (o->router && !o->n_files) args_fail("inspect", "--router: a file of hidden states is needed");
}

// Every file's layers into t; end[i]: the layers up to and with file i.
static void inspect_all(inspect_config *o, inspect_table *t, size_t *end, json *j) {
    size_t printed = 0;
    inspect_routers opened = {0}, *r = NULL;
    if (o->router) opened = inspect_open_routers(o->router), r = &opened;
    for (size_t i = 0; i < o->n_files || (!i && o->indices); i++) {
        const char *path = i < o->n_files ? o->file[i] : NULL, *indices = o->indices;
        dump_file first = path ? dump_open(path) : (dump_file){0};
        if (path && !indices && dump_is_index(&first)) indices = path, path = NULL; // a file of indices alone
        inspect_files(o, path, indices, r, t);
        if (!o->series && i)
            // numbered on
            for (size_t k = end[i - 1]; k < t->n; k++) t->row[k].layer += t->row[end[i - 1] - 1].layer + 1;
        end[i] = t->n;
        for (; o->json && printed < t->n; printed++) inspect_write_layer(j, &t->row[printed]);
    }
}

// The dump that is compared: choices, or numbers of the kind that the first one has.
static inspect_table inspect_other(const inspect_config *o, const inspect_table *first) {
    inspect_table t = {0};
    inspect_config mine = *o;
    inspect_routers opened = {0};
    dump_file file = dump_open(o->compare);
    int indices = dump_is_index(&file) || (!o->n_files && dump_can_index(&file));
    mine.labels = NULL;
    if (!mine.top_k) mine.top_k = first->row[0].top_k;
    if (indices && !mine.experts) mine.experts = first->row[0].experts;
    if (o->router && !indices) opened = inspect_open_routers(o->router);
    inspect_files(&mine, indices ? NULL : o->compare, indices ? o->compare : NULL, opened.n ? &opened : NULL, &t);
    return t;
}

int main(int argc, char **argv) {
    inspect_config o = {.name = "inspect", .batches = 50, .bootstrap = 1000, .types = 8, .seed = 1, .out = "out"};
    parse(&o, argc, argv);
    FILE *human = o.json ? stderr : stdout;
    json j = {{o.json ? stdout : NULL}, 0};
    inspect_table t = {0}, other = {0};
    inspect_series s = {0};
    size_t *end = allocate(o.n_files + 1, sizeof *end);
    inspect_all(&o, &t, end, &j);
    inspect_print_table(human, &o, &t);
    inspect_warn(&t);
    if (o.compare) other = inspect_other(&o, &t);
    inspect_more(&o, &(inspect_outputs){human, NULL, &j}, &t, o.compare ? &other : NULL);
    if (o.series) {
        s = inspect_make_series(&o, &t, end);
        inspect_print_series(human, &s);
        inspect_write_phases(&j, &s);
    }
    if (o.html) {
        inspect_page(&o, &t, o.compare ? &other : NULL, o.series ? &s : NULL,
                   o.series && o.n_files > 1 ? end[o.n_files - 2] : 0);
        fprintf(human, "see %s/inspect.html\n", o.out);
    }
    return 0;
}

// args.h - command lines from a table: parsing, defaults, --help.
//
//     args_option options[] = {
//         ARGS_EPOCHS(&o.epochs), ARGS_SEED(&o.seed), ARGS_QUIET(&o.quiet),
//         {"width", ARGS_SIZE, &o.width, "N", "channels of the first block", 1, 4096},
//     };
//     args_parse("cifar10", "Trains a small network.", options, sizeof options / sizeof *options, argc, argv);
//
// Both "--name value" and "--name=value" work. An unknown name or a bad value prints one clear line, with near names or
// the range, and ends the program with status 2; --help prints the table and ends it with 0. What a variable holds
// before is its default. With args_parse_files whatever is no option is a file; "--" ends the options.
#ifndef EX_ARGS_H
#define EX_ARGS_H

#include "platform.h"

#include "moe.h"

typedef enum args_kind {
    ARGS_FLAG, // int, no value: sets 1
    ARGS_SIZE, // size_t
    ARGS_U64,  // uint64_t
    ARGS_REAL, // double
    ARGS_TEXT  // const char *
} args_kind;

typedef struct args_option {
    const char *name; // without the dashes
    args_kind kind;
    void *value;
    const char *hint; // what the value is called in --help
    const char *help;
    double lo, hi; // allowed range of SIZE and REAL; hi 0 = no upper bound
} args_option;

// clang-format off
// The flags that mean the same in every program.
#define ARGS_DATA(p) {"data", ARGS_TEXT, p, "DIR", "the full data set (default: the sample in examples/data)", 0, 0}
#define ARGS_EPOCHS(p) {"epochs", ARGS_SIZE, p, "N", "passes over the training data (0: by the data)", 0, 1e6}
#define ARGS_STEPS(p) {"steps", ARGS_SIZE, p, "N", "stop after N steps (0: no limit)", 0, 0}
#define ARGS_SEED(p) {"seed", ARGS_U64, p, "N", "of everything random", 0, 0}
#define ARGS_THREADS(p) {"threads", ARGS_SIZE, p, "N", "threads (0: all); the result does not depend on it", 0, 1024}
#define ARGS_ISA(p) {"isa", ARGS_TEXT, p, "NAME", "auto, scalar, avx2, avx512, neon: the same result", 0, 0}
#define ARGS_SYSTEM(p, names) {"system", ARGS_TEXT, p, "NAME", names, 0, 0}
#define ARGS_EXPERTS(p) {"experts", ARGS_SIZE, p, "N", "number of experts (0: the system's)", 0, 1 << 20}
#define ARGS_TOP_K(p) {"top-k", ARGS_SIZE, p, "N", "experts a token (0: the system's); 1: weight = score", 0, 1 << 20}
#define ARGS_SEEDS(p) {"seeds", ARGS_SIZE, p, "N", "train with N seeds, from --seed on: mean and deviation", 1, 1000}
#define ARGS_SET(p) {"set", ARGS_TEXT, p, "TEXT", "other fields of moe_desc: \"gate=sigmoid loss.z=0.01\"", 0, 0}
#define ARGS_OUT(p) {"out", ARGS_TEXT, p, "DIR", "folder for the results", 0, 0}
#define ARGS_JSON(p) {"json", ARGS_FLAG, p, NULL, "JSON lines to standard output, the rest to standard error", 0, 0}
#define ARGS_QUIET(p) {"quiet", ARGS_FLAG, p, NULL, "no progress lines", 0, 0}
// clang-format on

EX_FUNC void args_help(const char *program, const char *about, const args_option *o, size_t n) {
    printf("usage: %s [options]\n%s\n\n", program, about);
    for (size_t i = 0; i < n; i++) {
        char left[64];
        snprintf(left, sizeof left, "--%s%s%s", o[i].name, o[i].hint ? " " : "", o[i].hint ? o[i].hint : "");
        printf("  %-16s %s", left, o[i].help);
        switch (o[i].kind) {
        case ARGS_SIZE:
            printf(" [%zu]", *(size_t *)o[i].value);
            break;
        case ARGS_U64:
            printf(" [%llu]", (unsigned long long)*(uint64_t *)o[i].value);
            break;
        case ARGS_REAL:
            printf(" [%g]", *(double *)o[i].value);
            break;
        case ARGS_TEXT:
            if (*(const char **)o[i].value) printf(" [%s]", *(const char **)o[i].value);
            break;
        case ARGS_FLAG:
            break;
        }
        printf("\n");
    }
    printf("  %-16s %s\n", "--help", "this text");
}

// Ends the program with status 2 and one line that says why.
EX_PRINTF(2, 3) EX_FUNC void args_fail(const char *program, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", program);
    vfprintf(stderr, format, args);
    fprintf(stderr, " (--help lists the options)\n");
    va_end(args);
    exit(2);
}

// A word that a list does not have, for --option: near names, or where none is near all of them.
EX_FUNC void args_unknown(const char *program, const char *option, const char *word, moe_names *names, void *list) {
    char text[1600];
    const char *name;
    size_t n = 0;
    moe_near(word, names, list, text, sizeof text);
    if (*text) args_fail(program, "--%s: there is no '%s'; did you mean %s?", option, word, text);
    for (size_t i = 0; (name = names(list, i)) != NULL && n < sizeof text; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s%s", i ? ", " : "", name);
    args_fail(program, "--%s: there is no '%s'; there are: %s", option, word, text);
}

// A word that is no option.
typedef struct args_names { const args_option *option; size_t n; } args_names;
EX_FUNC const char *args_name(void *list, size_t i) {
    const args_names *all = list;
    return i < all->n ? all->option[i].name : NULL;
}
EX_FUNC void args_no_option(const char *program, const char *word, const args_option *o, size_t n) {
    args_names all = {o, n};
    char name[64], near[300];
    size_t dashes = strspn(word, "-");
    snprintf(name, sizeof name, "%.*s", (int)strcspn(word + dashes, "="), word + dashes);
    moe_near(name, args_name, &all, near, sizeof near);
    args_fail(program, "%.*s%s: no such option%s%s%s", (int)dashes, word, name, *near ? "; did you mean --" : "", near,
              *near ? "?" : "");
}

EX_FUNC void args_range(const char *program, const args_option *o, const char *text) {
    const char *kind = o->kind == ARGS_REAL ? "number" : "whole number";
    if (o->hi > 0) args_fail(program, "--%s %s: must be a %s from %.10g to %.10g", o->name, text, kind, o->lo, o->hi);
    args_fail(program, "--%s %s: must be a %s of at least %.10g", o->name, text, kind, o->lo);
}
EX_FUNC void args_set(const char *program, const args_option *o, const char *text) {
    char *end = NULL;
    errno = 0;
    if (o->kind == ARGS_TEXT) {
        *(const char **)o->value = text;
    } else if (o->kind == ARGS_REAL) {
        double v = strtod(text, &end);
        if (end == text || *end || errno || v - v != 0 || v < o->lo || (o->hi > 0 && v > o->hi))
            args_range(program, o, text);
        *(double *)o->value = v;
    } else {
        unsigned long long v = strtoull(text, &end, 10);
        int outside = (double)v < o->lo || (o->hi > 0 && (double)v > o->hi) || (o->kind == ARGS_SIZE && v > SIZE_MAX);
        if (text[0] < '0' || text[0] > '9' || *end || errno || outside) args_range(program, o, text);
        if (o->kind == ARGS_SIZE)
            *(size_t *)o->value = (size_t)v;
        else
            *(uint64_t *)o->value = v;
    }
}

// files: room for argc names, or NULL where there are none. Returns how many there are.
EX_FUNC size_t args_parse_files(const char *program, const char *about, const args_option *o, size_t n, int argc,
                                char **argv, const char **files) {
    size_t n_files = 0;
    int only_files = 0;
    for (int a = 1; a < argc; a++) {
        const char *name = argv[a];
        if (files && !only_files && strcmp(name, "--") == 0) {
            only_files = 1;
            continue;
        }
        if (files && (only_files || *name != '-')) {
            files[n_files++] = name;
            continue;
        }
        if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
            args_help(program, about, o, n);
            exit(0);
        }
        if (strncmp(name, "--", 2) != 0 || !name[2]) args_no_option(program, name, o, n);
        name += 2;
        const char *equals = strchr(name, '=');
        size_t length = equals ? (size_t)(equals - name) : strlen(name), i = 0;
        while (i < n && (strlen(o[i].name) != length || strncmp(o[i].name, name, length) != 0)) i++;
        if (i == n) args_no_option(program, argv[a], o, n);
        if (o[i].kind == ARGS_FLAG) {
            if (equals) args_fail(program, "--%s: takes no value", o[i].name);
            *(int *)o[i].value = 1;
        } else {
            if (!equals && a + 1 == argc) args_fail(program, "--%s: a value is missing", o[i].name);
            args_set(program, &o[i], equals ? equals + 1 : argv[++a]);
        }
    }
    return n_files;
}

EX_FUNC void args_parse(const char *program, const char *about, const args_option *o, size_t n, int argc, char **argv) {
    args_parse_files(program, about, o, n, argc, argv, NULL);
}

#endif

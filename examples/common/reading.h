// reading.h - what a router's numbers say, in words: what is wrong, how sure that is, which knob to turn and why.
//
//     reading r = reading_unknown();           // every number that nobody sets stays unknown, and no rule asks for it
//     r.experts = 16, r.selected = 4000, r.dead = 14, r.maxvio = 7, r.effective = 2;
//     reading_print(stdout, "layer 0", &r);
//
// One table of rules: a name, how grave it is, when it holds, and a text with {numbers} in it. A rule of a graver kind
// or of doubt keeps the last one, "healthy", away. Borders that no document has are stated in the text of their rule.
#ifndef EX_READING_H
#define EX_READING_H

#include "platform.h"

#include <math.h>
#include <stddef.h>

// Every number a double, NaN = unknown: then no comparison holds. name, how it is printed, what it is
#define READING_NUMBERS(X)                                                                    \
    X(experts, "%.0f")      /* of the layer */                                                \
    X(top_k, "%.0f")        /* experts a token */                                             \
    X(selected, "%.0f")     /* selections counted */                                          \
    X(dead, "%.0f")         /* experts under a tenth of an even share of the selections */    \
    X(dead_first, "%.0f")   /* under 1% of the first choices */                               \
    X(maxvio, "%.2f")       /* busiest load / even load - 1 */                                \
    X(effective, "%.1f")    /* exp of the load's entropy */                                   \
    X(drop_rate, "%.3f")    /* dropped / selected */                                          \
    X(logits, "%.0f")       /* 1: there were logits */                                        \
    X(masked, "%.0f")       /* experts masked in some token */                                \
    X(probabilities, "%.0f") /* 1: the logits look like probabilities */                      \
    X(gamma, "%.2f")        /* gamma_eff; NaN with logits = unidentified */                   \
    X(ols, "%.2f")          /* its closed form */                                             \
    X(excess, "%.2f")       /* gamma_eff less the null's */                                   \
    X(excess_lo, "%.2f")    /* 95% of it */                                                   \
    X(excess_hi, "%.2f")                                                                      \
    X(batches, "%.0f")      /* that the bootstrap drew from */                                \
    X(batch_tokens, "%.0f") /* tokens of one */                                               \
    X(ecology, "%.3g")      /* the ecology number of the layer's description */               \
    X(each, "%.4g")         /* the others follow from these (reading_complete) */             \
    X(scatter, "%.2f")                                                                        \
    X(chance, "%.2g")                                                                         \
    X(times, "%.2f")

typedef struct reading {
#define X(name, format) double name;
    READING_NUMBERS(X)
#undef X
} reading;

typedef struct reading_number {
    const char *name, *format;
    size_t offset;
} reading_number;
static const reading_number reading_numbers[] = {
#define X(name, format) {#name, format, offsetof(reading, name)},
    READING_NUMBERS(X)
#undef X
};

typedef enum reading_grave { READING_FINE, READING_NOTE, READING_DOUBT, READING_WRONG } reading_grave;

typedef struct reading_rule {
    const char *name;
    reading_grave grave;
    int (*when)(const reading *r);
    const char *text;
} reading_rule;

EX_FUNC reading reading_unknown(void) {
    reading r;
    double *number = (double *)&r;
    for (size_t i = 0; i < sizeof r / sizeof *number; i++) number[i] = NAN;
    return r;
}

// The chance that an even router shows any expert under a tenth of an even share, were tokens independent: of one
// expert that of fewer than n / 10 where n are expected (Poisson), times the experts; 1e-9 where it is less.
EX_FUNC double reading_chance(double experts, double n) {
    double term = exp(-n), sum = 0;
    for (double i = 0; i < n / 10; i++, term *= n / i) sum += term;
    return fmin(1, fmax(1e-9, experts * sum));
}

EX_FUNC reading reading_complete(reading r) {
    r.each = r.selected / r.experts;
    r.scatter = sqrt(2 * log(r.experts) / r.each); // about the largest of so many normal deviations
    r.chance = reading_chance(r.experts, r.each);
    r.times = r.maxvio + 1;
    return r;
}

// ---- when ----

enum { READING_FEW = 20 }; // selections an expert
static int reading_ill(const reading *r) { return r->dead > 0 || r->maxvio > 1; }
static int reading_told(const reading *r) { return r->excess_lo > 0 || r->excess_hi < 0; } // an excess, of either sign
static int reading_holds_0(const reading *r) { return r->excess_lo <= 0 && r->excess_hi >= 0; }
static int reading_sure(const reading *r) { return r->dead > 0 && r->chance < 0.05; }

#define READING_WHEN(name, condition) \
    static int reading_is_##name(const reading *r) { return condition; }
READING_WHEN(probabilities, r->probabilities > 0)
READING_WHEN(few, r->each < READING_FEW)
READING_WHEN(dead_most, reading_sure(r) && 2 * r->dead >= r->experts)
READING_WHEN(dead_some, reading_sure(r) && 2 * r->dead < r->experts)
READING_WHEN(dead_unsure, r->dead > 0 && r->chance >= 0.05)
READING_WHEN(uneven, r->dead <= 0 && r->maxvio > 1 && r->each >= READING_FEW)
READING_WHEN(dropped, r->drop_rate > 0.01)
READING_WHEN(masked, r->masked > 0)
READING_WHEN(second, r->dead <= 0 && r->dead_first > 0 && r->experts <= 100 && r->top_k > 1)
READING_WHEN(congested, r->excess_lo > 0)
READING_WHEN(below, r->excess_hi < 0)
READING_WHEN(thin, reading_told(r) && (r->batch_tokens < 100 || r->batches < 50))
READING_WHEN(top_1, reading_told(r) && r->top_k <= 1)
READING_WHEN(no_excess, reading_ill(r) && r->gamma >= 0.005 && reading_holds_0(r))
READING_WHEN(floor, reading_ill(r) && r->gamma < 0.005 && r->ols < 0)
READING_WHEN(no_interval, reading_ill(r) && r->gamma >= 0.005 && isnan(r->excess_lo))
READING_WHEN(unidentified, reading_ill(r) && r->logits > 0 && r->masked <= 0 && isnan(r->gamma))
READING_WHEN(ecology_high, r->dead > 0 && r->ecology >= 0.5 && r->ecology < INFINITY)
READING_WHEN(ecology_low, r->dead > 0 && r->ecology < 0.5)
static int reading_is_healthy(const reading *r);

#define READING_BACK                                                                                                  \
    "loss.switch=0.01 and controller=bias each brought a router back that began with all tokens at one expert; "      \
    "loss.z and loss.entropy did not (docs/math.md#from-a-collapsed-start). "

static const reading_rule reading_rules[] = {
    {"probabilities", READING_DOUBT, reading_is_probabilities,
     "The numbers are probabilities, not logits (each row sums to 1): gamma_eff is of the wrong numbers, the load is "
     "right. inspect's --probabilities takes their log (docs/inspect.md#getting-the-files)."},
    {"few", READING_DOUBT, reading_is_few,
     "Only {each} selections an expert (border: 20): at even load the busiest would by chance be {scatter} of an even "
     "share above it. More tokens, before the load means much."},
    {"dead-most", READING_WRONG, reading_is_dead_most,
     "{dead} of {experts} experts are dead: each has under a tenth of an even share of {selected} selections. An even "
     "router would show any such with a chance of at most {chance}, were tokens independent. MaxVio {maxvio}: the load "
     "is that of {effective} even experts. In training, " READING_BACK
     "Without more training moe_layer_prune takes the dead away (docs/manual.md#growth)."},
    {"dead-some", READING_WRONG, reading_is_dead_some,
     "{dead} of {experts} experts are dead: each has under a tenth of an even share of {selected} selections. An even "
     "router would show any such with a chance of at most {chance}, were tokens independent. In training, "
     "moe_layer_revive makes a dead expert a copy of a busy one, and moe_growth decides when (docs/manual.md#growth); "
     READING_BACK "Without more training moe_layer_prune takes the dead away."},
    {"dead-unsure", READING_DOUBT, reading_is_dead_unsure,
     "{dead} of {experts} experts have under a tenth of an even share, but with {each} selections an expert an even "
     "router may show that too (chance up to {chance}): more tokens, before a knob is turned."},
    {"uneven", READING_WRONG, reading_is_uneven,
     "No expert is dead, but the busiest has {times} times an even share (border: 2; even load would show "
     "1 + {scatter} by chance): the load is that of {effective} even experts out of {experts}. In training, "
     READING_BACK "docs/manual.md#balance has the ways."},
    {"dropped", READING_WRONG, reading_is_dropped,
     "A share of {drop_rate} of the selected pairs found no place (border: 0.01), and a dropped pair adds nothing to "
     "the output. A larger capacity_factor has more places, capacity_factor=off drops nothing; a more even load needs "
     "fewer (docs/math.md#routes-capacity)."},
    {"masked", READING_NOTE, reading_is_masked,
     "{masked} of {experts} experts are masked in some token: without a mean logit there is no gamma_eff, and where an "
     "expert is masked it is never chosen, so it may count as dead (docs/inspect.md#getting-the-files)."},
    {"second", READING_NOTE, reading_is_second,
     "{dead_first} of {experts} experts have under 1% of the first choices, though none is dead by all selections: "
     "they are later choices (docs/math.md#health)."},
    {"congested", READING_NOTE, reading_is_congested,
     "Beyond the noise of the tokens, a token gives up {excess} [{excess_lo}, {excess_hi}] logits for a unit of load "
     "share: crowding pushes tokens away, or types of tokens differ; this number cannot tell which "
     "(docs/gamma.md#the-null)."},
    {"below", READING_NOTE, reading_is_below,
     "gamma_eff lies {excess} [{excess_lo}, {excess_hi}] from what the noise of the tokens makes: below it, so no sign "
     "of congestion; differences between tokens alone can move it so (docs/gamma.md)."},
    {"thin", READING_NOTE, reading_is_thin,
     "That interval is from {batches} batches of {batch_tokens} tokens; it was tested with 50 of at least 100 "
     "(docs/gamma.md#the-null)."},
    {"top-1", READING_NOTE, reading_is_top_1,
     "Top-1 routing is outside the scope of the paper that gamma_eff follows (docs/gamma.md#where-it-applies)."},
    {"no-excess", READING_NOTE, reading_is_no_excess,
     "gamma_eff {gamma} is no sign of congestion: less what the noise of the tokens makes it is {excess} "
     "[{excess_lo}, {excess_hi}], which holds 0 (docs/gamma.md#the-null)."},
    {"floor", READING_NOTE, reading_is_floor,
     "gamma_eff is 0, the end of its range, and its closed form is {ols}: mean logits and load run against each other, "
     "as where each kind of token has its own expert. It says nothing about crowding (docs/gamma.md)."},
    {"no-interval", READING_NOTE, reading_is_no_interval,
     "gamma_eff {gamma} has no interval, so nothing follows from it: that takes two batches and a bootstrap "
     "(docs/gamma.md#estimates)."},
    {"unidentified", READING_NOTE, reading_is_unidentified,
     "The data do not tell gamma_eff: no value of it foretells the load any better, or the best is the end of its "
     "range (docs/gamma.md#estimates)."},
    {"ecology-high", READING_NOTE, reading_is_ecology_high,
     "The ecology number is {ecology}, and experts are dead all the same: the claim that 0.5 suffices does not hold "
     "here, as in its paper's own runs; it is a ratio of settings, not a measurement (docs/math.md#health)."},
    {"ecology-low", READING_NOTE, reading_is_ecology_low,
     "The ecology number is {ecology}, under its paper's 0.5. A larger loss.entropy or a smaller balance loss raises "
     "it; but the first did not bring a collapsed router back, and the second is what does "
     "(docs/math.md#from-a-collapsed-start, docs/math.md#health)."},
    {"healthy", READING_FINE, reading_is_healthy,
     "Healthy: no expert is dead, the busiest has {times} times an even share (border: 2), and the load is that of "
     "{effective} even experts out of {experts}."},
};
enum { READING_RULES = sizeof reading_rules / sizeof *reading_rules };

static int reading_is_healthy(const reading *r) {
    for (size_t i = 0; i < READING_RULES; i++)
        if (reading_rules[i].grave >= READING_DOUBT && reading_rules[i].when(r)) return 0;
    return r->dead <= 0 && r->maxvio <= 1;
}

// ---- what holds ----

// The text of a rule with its numbers.
EX_FUNC void reading_text(const reading_rule *rule, const reading *r, char *out, size_t size) {
    size_t at = 0, count = sizeof reading_numbers / sizeof *reading_numbers;
    for (const char *c = rule->text; *c && at + 1 < size; c++) {
        size_t length = *c == '{' ? strcspn(c, "}") - 1 : 0, i = 0;
        while (length && i < count &&
               (strlen(reading_numbers[i].name) != length || strncmp(reading_numbers[i].name, c + 1, length) != 0))
            i++;
        if (!length || i == count) {
            out[at++] = *c;
            continue;
        }
        double value;
        memcpy(&value, (const char *)r + reading_numbers[i].offset, sizeof value);
        at += (size_t)snprintf(out + at, size - at, reading_numbers[i].format, value);
        c += length + 1;
    }
    out[at < size ? at : size - 1] = 0;
}

// The first rule that holds from number *at on, which moves behind it; NULL: no more.
EX_FUNC const reading_rule *reading_next(const reading *r, size_t *at) {
    while (*at < READING_RULES)
        if (reading_rules[(*at)++].when(r)) return &reading_rules[*at - 1];
    return NULL;
}

enum { READING_TEXT = 1024, READING_COLUMNS = 112 };

// A line for each rule that holds, "WHERE: text"; broken between words, further lines with two blanks before them.
EX_FUNC void reading_print(FILE *f, const char *where, const reading *r) {
    char text[READING_TEXT];
    const reading_rule *rule;
    for (size_t at = 0; (rule = reading_next(r, &at)) != NULL;) {
        reading_text(rule, r, text, sizeof text);
        size_t column = (size_t)fprintf(f, "%s:", where);
        for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
            if (column + 1 + strlen(word) > READING_COLUMNS) column = (size_t)fprintf(f, "\n ") - 1;
            column += (size_t)fprintf(f, " %s", word);
        }
        fputc('\n', f);
    }
}

#endif

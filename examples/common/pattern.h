// pattern.h - the regular expressions that tokenizers cut text with: alternatives, groups, classes with categories,
// greedy repetition, look-ahead, anchors. As the files of tokenizers use them; whatever else is an error, not a guess.
//
//     |   ( )   (?: )   (?i: )   (?= )   (?! )   [ ]   [^ ]   .   ^   $   ? * + {m,n}
//     \p{L}  \P{Lu}  \s \S \d \D \w \W  \r \n \t \f \v  \xHH  \x{HHHH}  \uHHHH
//
// A pattern becomes a chain of nodes, each with the node that follows; matching tries the alternatives in order and
// gives back what a repetition took, one by one.
#ifndef EX_PATTERN_H
#define EX_PATTERN_H

#include "unicode.h"

typedef enum pattern_kind {
    PATTERN_SET,       // code points of a class, so many times
    PATTERN_EMPTY,     // nothing: where parts join
    PATTERN_EITHER,    // `branch`, else what is next
    PATTERN_AHEAD,     // `branch` must match here, and takes nothing
    PATTERN_NOT_AHEAD, // must not
    PATTERN_BEGIN,     // of a line
    PATTERN_END
} pattern_kind;
typedef struct pattern_item { // code points lo .. hi, or those of the categories; or all but these
    uint32_t lo, hi, mask;
    int space, inverse;
} pattern_item;
typedef struct pattern_node {
    pattern_kind kind;
    int next; // node that follows; -1: the match is complete
    int branch;
    size_t item, items, lo, hi; // SET: lo to hi code points of these items
    int inverse, keep;          // of all others; nothing that was taken is given back
} pattern_node;
typedef struct pattern {
    pattern_node *node;
    pattern_item *item;
    int nodes, first;
    size_t items;
    const char *text, *at, *end; // while it is read
    const char *fault;           // NULL: the pattern is good
    int fold, depth;
} pattern;

EX_FUNC int pattern_new(pattern *p, pattern_kind kind, int next) {
    p->node = realloc(p->node, (size_t)(p->nodes + 1) * sizeof *p->node);
    if (!p->node) die("out of memory");
    p->node[p->nodes] = (pattern_node){.kind = kind, .next = next, .branch = -1, .item = p->items, .lo = 1, .hi = 1};
    return p->nodes++;
}
EX_FUNC void pattern_item_add(pattern *p, pattern_item item) {
    p->item = realloc(p->item, (p->items + 1) * sizeof *p->item);
    if (!p->item) die("out of memory");
    p->item[p->items++] = item;
}
// Code points lo .. hi; under (?i: ) the other case of ASCII letters too, and what folds to s and k.
EX_FUNC void pattern_range(pattern *p, uint32_t lo, uint32_t hi) {
    pattern_item_add(p, (pattern_item){.lo = lo, .hi = hi});
    if (!p->fold) return;
    for (uint32_t c = 'a'; c <= 'z'; c++) {
        uint32_t upper = c - 32;
        if (!((c >= lo && c <= hi) || (upper >= lo && upper <= hi))) continue;
        pattern_item_add(p, (pattern_item){.lo = c, .hi = c});
        pattern_item_add(p, (pattern_item){.lo = upper, .hi = upper});
        if (c == 's') pattern_item_add(p, (pattern_item){.lo = 0x17F, .hi = 0x17F});
        if (c == 'k') pattern_item_add(p, (pattern_item){.lo = 0x212A, .hi = 0x212A});
    }
}

EX_FUNC int pattern_take(pattern *p, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n) != 0) return 0;
    p->at += n;
    return 1;
}
EX_FUNC uint32_t pattern_code(pattern *p) { // the next code point of the pattern's text
    size_t length = 1;
    uint32_t code = p->at < p->end ? uni_decode(p->at, (size_t)(p->end - p->at), &length) : UNI_NONE;
    if (code == UNI_NONE)
        p->fault = "it ends too early";
    else
        p->at += length;
    return code;
}
EX_FUNC uint32_t pattern_hex(pattern *p, size_t digits) {
    char text[9] = {0}, *end;
    int braces = pattern_take(p, "{");
    for (size_t i = 0; i < (braces ? 8 : digits) && p->at < p->end && *p->at != '}'; i++) text[i] = *p->at++;
    if (braces && !pattern_take(p, "}")) p->fault = "a } is missing";
    uint32_t code = (uint32_t)strtoul(text, &end, 16);
    if (*end || !*text || code >= UNI_END) p->fault = "no such code point";
    return code;
}
// After a backslash: adds a class and returns UNI_NONE, or returns the code point that is meant.
EX_FUNC uint32_t pattern_escape(pattern *p) {
    static const char letters[] = "rntfv0", meanings[] = "\r\n\t\f\v";
    uint32_t c = pattern_code(p), lower = c | 32;
    pattern_item item = {.inverse = c != lower};
    if (c == UNI_NONE) return 0;
    if (lower == 'p') {
        int not = pattern_take(p, "{^") ? 1 : 0;
        if (!not &&!pattern_take(p, "{")) p->fault = "\\p wants {";
        const char *begin = p->at;
        while (p->at < p->end && *p->at != '}') p->at++;
        item.mask = uni_mask(begin, (size_t)(p->at - begin));
        item.inverse ^= not ;
        if (!item.mask || !pattern_take(p, "}")) p->fault = "\\p of an unknown category";
    } else if (lower == 's')
        item.space = 1;
    else if (lower == 'd')
        item.mask = uni_mask("Nd", 2);
    else if (lower == 'w')
        item.mask = uni_mask("L", 1) | uni_mask("M", 1) | uni_mask("Nd", 2) | uni_mask("Pc", 2);
    else if (c == 'x')
        return pattern_hex(p, 2);
    else if (c == 'u')
        return pattern_hex(p, 4);
    else if (c < 128 && strchr(letters, (int)c))
        return (uint32_t)meanings[strchr(letters, (int)c) - letters];
    else if ((lower >= 'a' && lower <= 'z') || (c >= '1' && c <= '9'))
        p->fault = "an escape that is not known here";
    else
        return c;
    pattern_item_add(p, item);
    return UNI_NONE;
}
// After [: the items up to ], and whether all others are meant.
EX_FUNC int pattern_class(pattern *p) {
    int inverse = pattern_take(p, "^");
    for (int first = 1; !p->fault; first = 0) {
        if (!first && pattern_take(p, "]")) return inverse;
        if (p->at < p->end && *p->at == '[') p->fault = "a class in a class is not known here";
        if (pattern_take(p, "&&")) p->fault = "&& is not known here";
        uint32_t lo = pattern_take(p, "\\") ? pattern_escape(p) : pattern_code(p), hi = lo;
        if (lo == UNI_NONE || p->fault) continue;
        if (p->end - p->at > 1 && *p->at == '-' && p->at[1] != ']') {
            p->at++;
            hi = pattern_take(p, "\\") ? pattern_escape(p) : pattern_code(p);
            if (hi == UNI_NONE || hi < lo) p->fault = "a range that is none";
        }
        if (!p->fault) pattern_range(p, lo, hi);
    }
    return inverse;
}
// ? * + {m} {m,} {m,n} after an atom, into its node
EX_FUNC void pattern_repeat(pattern *p, pattern_node *n) {
    if (pattern_take(p, "?"))
        n->lo = 0;
    else if (pattern_take(p, "*"))
        n->lo = 0, n->hi = SIZE_MAX;
    else if (pattern_take(p, "+"))
        n->hi = SIZE_MAX;
    else if (pattern_take(p, "{")) {
        char *end;
        n->lo = n->hi = strtoul(p->at, &end, 10);
        if (*end == ',' && end[1] == '}')
            n->hi = SIZE_MAX, end++;
        else if (*end == ',')
            n->hi = strtoul(end + 1, &end, 10);
        if (*end != '}' || n->hi < n->lo || n->lo > 1000)
            p->fault = "a {} that is no number of times";
        else
            p->at = end + 1;
        return;
    }
    if (n->lo == 1 && n->hi == 1) return;
    if (pattern_take(p, "+"))
        n->keep = 1;
    else if (pattern_take(p, "?"))
        p->fault = "lazy repetition is not known here";
}

EX_FUNC int pattern_either(pattern *p, int next);
// A group after its bracket.
EX_FUNC int pattern_group(pattern *p, int next) {
    pattern_kind kind = PATTERN_EMPTY;
    int fold = p->fold;
    if (pattern_take(p, "?="))
        kind = PATTERN_AHEAD;
    else if (pattern_take(p, "?!"))
        kind = PATTERN_NOT_AHEAD;
    else if (pattern_take(p, "?i:"))
        p->fold = 1;
    else if (!pattern_take(p, "?:") && p->at < p->end && *p->at == '?')
        p->fault = "a group that is not known here";
    int end = pattern_new(p, PATTERN_EMPTY, -1), inside = pattern_either(p, end);
    pattern_node times = {.lo = 1, .hi = 1};
    p->fold = fold;
    if (!p->fault && !pattern_take(p, ")")) p->fault = "a ) is missing";
    if (!p->fault) pattern_repeat(p, &times);
    if (p->fault) return inside;
    if (kind != PATTERN_EMPTY) {
        int look = pattern_new(p, kind, next);
        p->node[look].branch = inside;
        return look;
    }
    if (times.keep || times.lo > 1 || (times.hi > 1 && times.hi != SIZE_MAX))
        p->fault = "a group so many times is not known here";
    if (times.lo == 1 && times.hi == 1) {
        p->node[end].next = next;
        return inside;
    }
    int choice = pattern_new(p, PATTERN_EITHER, next);
    p->node[choice].branch = inside;
    p->node[end].next = times.hi == 1 ? next : choice;
    return times.lo ? inside : choice;
}
EX_FUNC int pattern_atom(pattern *p, int next) {
    if (pattern_take(p, "(")) return pattern_group(p, next);
    if (pattern_take(p, "^")) return pattern_new(p, PATTERN_BEGIN, next);
    if (pattern_take(p, "$")) return pattern_new(p, PATTERN_END, next);
    int node = pattern_new(p, PATTERN_SET, next), inverse = 0;
    if (pattern_take(p, "["))
        inverse = pattern_class(p);
    else if (pattern_take(p, ".")) {
        pattern_range(p, '\n', '\n');
        inverse = 1;
    } else {
        int escaped = pattern_take(p, "\\");
        if (!escaped && strchr("?*+{", *p->at)) p->fault = "nothing to repeat";
        uint32_t code = escaped ? pattern_escape(p) : pattern_code(p);
        if (code != UNI_NONE && !p->fault) pattern_range(p, code, code);
    }
    p->node[node].inverse = inverse;
    p->node[node].items = p->items - p->node[node].item;
    if (!p->fault) pattern_repeat(p, &p->node[node]);
    return node;
}
// Alternatives up to ) or the end; after each comes `next`.
EX_FUNC int pattern_either(pattern *p, int next) {
    int first = pattern_new(p, PATTERN_EMPTY, -1), last = first;
    if (++p->depth > 50) p->fault = "groups in groups in groups";
    while (!p->fault && p->at < p->end && *p->at != '|' && *p->at != ')') {
        int join = pattern_new(p, PATTERN_EMPTY, -1), atom = pattern_atom(p, join);
        p->node[last].next = atom;
        last = join;
    }
    p->node[last].next = next;
    if (!p->fault && pattern_take(p, "|")) {
        int choice = pattern_new(p, PATTERN_EITHER, -1), rest = pattern_either(p, next);
        p->node[choice].branch = first;
        p->node[choice].next = rest;
        first = choice;
    }
    p->depth--;
    return first;
}
// Reads a pattern; p->fault says what is wrong with it, if anything.
EX_FUNC pattern pattern_read(const char *text) {
    pattern p = {.text = text, .at = text, .end = text + strlen(text)};
    p.first = pattern_either(&p, -1);
    if (!p.fault && p.at < p.end) p.fault = "a ) too many";
    return p;
}
EX_FUNC void pattern_free(pattern *p) {
    free(p->node);
    free(p->item);
}

EX_FUNC int pattern_has(const pattern *p, const pattern_node *n, uint32_t code) {
    for (const pattern_item *i = p->item + n->item, *end = i + n->items; i < end; i++) {
        int is = code >= i->lo && code <= i->hi;
        if (i->mask)
            is = uni_is(code, i->mask);
        else if (i->space)
            is = uni_space(code);
        if (is != i->inverse) return !n->inverse;
    }
    return n->inverse;
}
// Where the match of a chain ends that begins at `at` of n code points; SIZE_MAX: there is none.
#define PATTERN_DEPTH 2000
EX_FUNC size_t pattern_chain(const pattern *p, int node, const uint32_t *text, size_t n, size_t at, int depth) {
    if (depth > PATTERN_DEPTH) return SIZE_MAX;
    while (node >= 0) {
        const pattern_node *m = &p->node[node];
        size_t count = 0, end;
        node = m->next;
        switch (m->kind) {
        case PATTERN_EMPTY:
            break;
        case PATTERN_BEGIN:
            if (at && text[at - 1] != '\n') return SIZE_MAX;
            break;
        case PATTERN_END:
            if (at < n && text[at] != '\n') return SIZE_MAX;
            break;
        case PATTERN_AHEAD:
        case PATTERN_NOT_AHEAD:
            end = pattern_chain(p, m->branch, text, n, at, depth + 1);
            if ((end == SIZE_MAX) == (m->kind == PATTERN_AHEAD)) return SIZE_MAX;
            break;
        case PATTERN_EITHER:
            end = pattern_chain(p, m->branch, text, n, at, depth + 1);
            if (end != SIZE_MAX) return end;
            break;
        case PATTERN_SET:
            while (count < m->hi && at + count < n && pattern_has(p, m, text[at + count])) count++;
            if (count < m->lo) return SIZE_MAX;
            for (; count > m->lo && !m->keep; count--) { // the last try is the chain's own
                end = pattern_chain(p, node, text, n, at + count, depth + 1);
                if (end != SIZE_MAX) return end;
            }
            at += count;
            break;
        }
    }
    return at;
}
// The first match from *begin on: 1, its begin and end; 0: none. An empty match is none.
EX_FUNC int pattern_find(const pattern *p, const uint32_t *text, size_t n, size_t *begin, size_t *end) {
    for (; *begin < n; ++*begin) {
        *end = pattern_chain(p, p->first, text, n, *begin, 0);
        if (*end != SIZE_MAX && *end > *begin) return 1;
    }
    return 0;
}

#endif

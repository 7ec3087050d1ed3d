// dead.h - which experts are dead, for tables and JSON: those with under a tenth of an even share of the selections,
// by number; and, beside them under a name of its own, how many are by the ecology paper's word (under 1% of the first
// choices). moe_health says it; what is kept here outlives the layer whose health it was.
//
//     dead_note dead = dead_take(&health);
//     dead_text(&dead, text, sizeof text);    // "2 (3 5)", or "0"
//     dead_json(&lines, &dead);               // "dead":2,"dead_experts":[3,5],"dead_first":2
//     dead_free(&dead);
#ifndef EX_DEAD_H
#define EX_DEAD_H

#include "platform.h"

#include "moe.h"

#include "json.h" // after moe.h, which has locals of that name

typedef struct dead_note {
    size_t n, first;
    uint32_t *expert; // (n); NULL: nothing is known
} dead_note;

EX_FUNC dead_note dead_take(const moe_health *h) {
    dead_note d = {h->n_dead, h->n_dead_first, allocate(h->n_dead, sizeof(uint32_t))};
    memcpy(d.expert, h->dead, d.n * sizeof *d.expert);
    return d;
}
EX_FUNC void dead_free(dead_note *d) {
    free(d->expert);
    *d = (dead_note){0};
}

// As many numbers as find room; "..." stands for the rest, "-" for what is not known.
EX_FUNC void dead_text(const dead_note *d, char *out, size_t size) {
    size_t at = (size_t)snprintf(out, size, d->expert ? "%zu" : "-", d->n);
    for (size_t i = 0; d->expert && i < d->n; i++) {
        if (at + 16 > size) {
            snprintf(out + at, size - at, " ...)");
            return;
        }
        at += (size_t)snprintf(out + at, size - at, "%s%u%s", i ? " " : " (", (unsigned)d->expert[i],
                               i + 1 == d->n ? ")" : "");
    }
}

EX_FUNC void dead_json(json *j, const dead_note *d) {
    if (!d->expert) {
        json_raw(j, "dead", "null");
        json_raw(j, "dead_experts", "null");
        json_raw(j, "dead_first", "null");
        return;
    }
    json_whole(j, "dead", d->n);
    json_list_begin(j, "dead_experts");
    for (size_t i = 0; i < d->n; i++) json_whole(j, NULL, d->expert[i]);
    json_list_end(j);
    json_whole(j, "dead_first", d->first);
}

#endif

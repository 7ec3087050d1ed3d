// lanes.h - a picture of experts that come and go: each is a lane over the epochs, as wide as its share of the work;
// a split is a fork, a death (under a tenth of an even share) a cross, a revival a ring.
//
//     lanes_begin(&p, "no brakes", 3);
//     lanes_epoch(&p, epoch, n_experts, utilisation);    // each epoch
//     lanes_split(&p, epoch, parent);                    // after it: the child is the next expert's number
//     lanes_draw(f, &p, box);
#ifndef EX_LANES_H
#define EX_LANES_H

#include "plot.h"

enum { LANES_MOST = 128, LANES_EPOCHS = 128 };

typedef struct lanes {
    const char *title;
    size_t n, epochs, begin[LANES_MOST];
    size_t parent[LANES_MOST]; // SIZE_MAX: there from the start
    double share[LANES_MOST][LANES_EPOCHS];
    unsigned char dead[LANES_MOST][LANES_EPOCHS];
} lanes;

EX_FUNC void lanes_begin(lanes *p, const char *title, size_t n) {
    memset(p, 0, sizeof *p);
    p->title = title;
    p->n = n;
    for (size_t e = 0; e < n; e++) p->parent[e] = SIZE_MAX;
}

EX_FUNC void lanes_split(lanes *p, size_t epoch, size_t parent) {
    if (p->n == LANES_MOST) die("more than %d experts", LANES_MOST);
    p->parent[p->n] = parent;
    p->begin[p->n++] = epoch + 1;
}

EX_FUNC void lanes_epoch(lanes *p, size_t epoch, size_t n, const double *share) {
    double sum = 0;
    for (size_t e = 0; e < n; e++) sum += share[e];
    for (size_t e = 0; e < n && e < p->n; e++) {
        p->share[e][epoch] = share[e];
        p->dead[e][epoch] = share[e] < 0.1 * sum / (double)n;
    }
    p->epochs = epoch + 1;
}

// A lane's place: children stand next below their parent, the youngest first.
EX_FUNC size_t lanes_order(const lanes *p, size_t parent, size_t next, size_t *place) {
    for (size_t i = p->n; i-- > 0;) {
        size_t e = parent == SIZE_MAX ? p->n - 1 - i : i; // those of the start by number
        if (p->parent[e] != parent) continue;
        place[e] = next++;
        next = lanes_order(p, e, next, place);
    }
    return next;
}

EX_FUNC size_t lanes_root(const lanes *p, size_t e) {
    while (p->parent[e] != SIZE_MAX) e = p->parent[e];
    return e;
}

EX_FUNC void lanes_one(FILE *f, const lanes *p, size_t e, const double *y, double left, double step, double gap) {
    const char *colour = plot_colour[lanes_root(p, e) % PLOT_COLOURS];
    size_t begin = p->begin[e];
    double half[LANES_EPOCHS];
    if (begin >= p->epochs) return;
    for (size_t k = begin; k < p->epochs; k++) half[k] = fmax(0.4, fmin(p->share[e][k], 1) * gap * 0.48);
    fprintf(f, "<path fill=\"%s\" fill-opacity=\".8\" d=\"M%.1f %.1f", colour, left + (double)begin * step,
            y[e] - half[begin]);
    for (size_t k = begin + 1; k < p->epochs; k++) fprintf(f, "L%.1f %.1f", left + (double)k * step, y[e] - half[k]);
    for (size_t k = p->epochs; k-- > begin;) fprintf(f, "L%.1f %.1f", left + (double)k * step, y[e] + half[k]);
    fputs("Z\"/>\n", f);
    for (size_t k = begin; k < p->epochs; k++) {
        int was = k > begin && p->dead[e][k - 1];
        double x = left + (double)k * step;
        if (p->dead[e][k] && !was)
            fprintf(f, "<path stroke=\"" PLOT_INK "\" d=\"M%.1f %.1fl6 6m0 -6l-6 6\"/>\n", x - 3, y[e] - 3);
        if (!p->dead[e][k] && was)
            fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"none\" stroke=\"%s\"/>\n", x, y[e], PLOT_INK);
    }
    if (p->parent[e] == SIZE_MAX) return;
    double x = left + (double)begin * step, from = x - step, middle = x - step / 2, above = y[p->parent[e]];
    fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.5\" ", colour);
    fprintf(f, "d=\"M%.1f %.1fC%.1f %.1f %.1f %.1f %.1f %.1f\"/>\n", from, above, middle, above, middle, y[e], x,
            y[e]);
    fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.5\" fill=\"#fff\" stroke=\"%s\"/>\n", from, above, colour);
}

EX_FUNC void lanes_draw(FILE *f, const lanes *p, plot_box box) {
    double left = box.x + 40, right = box.x + box.w - 14, top = box.y + 44, bottom = box.y + box.h - 42;
    double gap = (bottom - top) / (double)p->n, step = (right - left) / (double)(p->epochs > 1 ? p->epochs - 1 : 1);
    double y[LANES_MOST];
    size_t place[LANES_MOST];
    char text[64];
    plot_text(f, box.x + 14, box.y + 24, 14, PLOT_START, PLOT_INK, "font-weight=\"600\"", p->title);
    lanes_order(p, SIZE_MAX, 0, place);
    for (size_t e = 0; e < p->n; e++) y[e] = top + ((double)place[e] + 0.5) * gap;
    for (size_t e = 0; e < p->n; e++) lanes_one(f, p, e, y, left, step, gap);
    for (size_t e = 0; e < p->n; e++) {
        snprintf(text, sizeof text, "%zu", e);
        plot_text(f, left - 8, y[e] + 4, gap < 12 ? 8 : 11, PLOT_END, PLOT_SOFT, "", text);
    }
    size_t every = (size_t)fmax(1, plot_step((double)p->epochs, 8));
    for (size_t k = 0; k < p->epochs; k += every) {
        snprintf(text, sizeof text, "%zu", k + 1);
        plot_text(f, left + (double)k * step, bottom + 17, 11, PLOT_MIDDLE, PLOT_SOFT, "", text);
    }
    plot_text(f, (left + right) / 2, bottom + 34, 11, PLOT_MIDDLE, PLOT_SOFT, "",
              "epoch; width: load, fork: split, cross: dies, ring: revives");
}

#endif

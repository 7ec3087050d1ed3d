// plot.h - charts as SVG, and an HTML page around them that needs nothing else.
//
//     plot_begin(f, 800, 300, "Training");
//     plot_lines(f, &(plot_chart){.box = {0, 0, 400, 300}, .title = "loss", ...});
//     plot_heat(f, &(plot_map){.box = {400, 0, 400, 300}, .title = "load", ...});
//     plot_end(f);
//
// The same calls write into a file of their own or into the middle of a page (page_begin ... page_end).
#ifndef EX_PLOT_H
#define EX_PLOT_H

#include "platform.h"

#include <math.h>

typedef struct plot_box {
    double x, y, w, h;
} plot_box; // in pixels, labels included

#define PLOT_FONT "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
#define PLOT_INK "#1f2933"
#define PLOT_SOFT "#6b7785"
#define PLOT_GRID "#e4e8ee"

static const char *const plot_colour[] = {"#2b6cb0", "#dd6b20", "#2f9e5f", "#b83280", "#6b46c1", "#7b8794"};
#define PLOT_COLOURS (sizeof plot_colour / sizeof *plot_colour)

// Text with what XML reserves escaped.
EX_FUNC void plot_escape(FILE *f, const char *text) {
    for (; *text; text++) switch (*text) {
        case '<':
            fputs("&lt;", f);
            break;
        case '>':
            fputs("&gt;", f);
            break;
        case '&':
            fputs("&amp;", f);
            break;
        case '"':
            fputs("&quot;", f);
            break;
        default:
            fputc(*text, f);
        }
}

typedef enum plot_anchor { PLOT_START, PLOT_MIDDLE, PLOT_END } plot_anchor;

EX_FUNC void plot_text(FILE *f, double x, double y, double size, plot_anchor anchor, const char *colour,
                       const char *extra, const char *text) {
    static const char *const name[] = {"start", "middle", "end"};
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" font-size=\"%.4g\" text-anchor=\"%s\" fill=\"%s\"%s%s>", x, y, size,
            name[anchor], colour, *extra ? " " : "", extra);
    plot_escape(f, text);
    fputs("</text>\n", f);
}

EX_FUNC void plot_begin(FILE *f, double w, double h, const char *title) {
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" "
            "font-family=\"" PLOT_FONT "\" role=\"img\">\n<title>",
            w, h, w, h);
    plot_escape(f, title);
    fprintf(f, "</title>\n<rect width=\"%.0f\" height=\"%.0f\" fill=\"#fff\"/>\n", w, h);
}
EX_FUNC void plot_end(FILE *f) { fputs("</svg>\n", f); }

// A round step of 1, 2 or 5 times a power of ten, for at most n intervals of range.
EX_FUNC double plot_step(double range, double n) {
    double raw = range / n, power = pow(10, floor(log10(raw)));
    double m = raw / power;
    return power * (m <= 1 ? 1 : m <= 2 ? 2 : m <= 5 ? 5 : 10);
}

// A number without needless digits.
EX_FUNC void plot_number(char *out, size_t size, double v, double step) {
    int digits = step >= 1 ? 0 : (int)ceil(-log10(step) - 1e-9);
    snprintf(out, size, "%.*f", digits < 9 ? digits : 9, fabs(v) < step * 1e-6 ? 0.0 : v);
}

typedef struct plot_line {
    const char *name;
    const double *y; // (n), at x = 1, 2, ...; NaN = a gap
    size_t n;
    int dashed;
} plot_line;

typedef struct plot_chart {
    plot_box box;
    const char *title, *x_label;
    const plot_line *line;
    size_t n_lines;
    double lo, hi; // range of y; both 0 = from the data
} plot_chart;

EX_FUNC void plot_lines(FILE *f, const plot_chart *c) {
    double left = c->box.x + 52, right = c->box.x + c->box.w - 16, top = c->box.y + 56,
           bottom = c->box.y + c->box.h - 42;
    double lo = c->lo, hi = c->hi;
    size_t longest = 1;
    char text[64];
    for (size_t i = 0; i < c->n_lines; i++)
        if (c->line[i].n > longest) longest = c->line[i].n;
    if (lo == 0 && hi == 0) {
        lo = INFINITY, hi = -INFINITY;
        for (size_t i = 0; i < c->n_lines; i++)
            for (size_t k = 0; k < c->line[i].n; k++)
                if (isfinite(c->line[i].y[k])) lo = fmin(lo, c->line[i].y[k]), hi = fmax(hi, c->line[i].y[k]);
        if (!(lo <= hi)) lo = 0, hi = 1;
    }
    if (hi - lo < 1e-9) lo -= 0.5, hi += 0.5;
    double step = plot_step(hi - lo, 5);
    lo = floor(lo / step + 1e-9) * step, hi = ceil(hi / step - 1e-9) * step;
    plot_text(f, c->box.x + 14, c->box.y + 24, 14, PLOT_START, PLOT_INK, "font-weight=\"600\"", c->title);
    for (int i = 0; i <= (int)((hi - lo) / step + 0.5); i++) {
        double v = lo + i * step, y = bottom - (v - lo) / (hi - lo) * (bottom - top);
        plot_number(text, sizeof text, v, step);
        fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" PLOT_GRID "\"/>\n", left, y, right);
        plot_text(f, left - 8, y + 4, 11, PLOT_END, PLOT_SOFT, "", text);
    }
    double last = longest > 1 ? (double)longest : 2, x_step = fmax(1, plot_step(last - 1, 7));
    for (double v = x_step > 1 ? x_step : 1; v <= last + 1e-9; v += x_step) {
        plot_number(text, sizeof text, v, 1);
        plot_text(f, left + (v - 1) / (last - 1) * (right - left), bottom + 17, 11, PLOT_MIDDLE, PLOT_SOFT, "", text);
    }
    fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" PLOT_SOFT "\"/>\n", left, bottom, right);
    plot_text(f, (left + right) / 2, bottom + 34, 11, PLOT_MIDDLE, PLOT_SOFT, "", c->x_label);
    double legend = c->box.x + 14;
    for (size_t i = 0; i < c->n_lines; i++) {
        const plot_line *l = &c->line[i];
        const char *colour = plot_colour[i % PLOT_COLOURS], *dash = l->dashed ? " stroke-dasharray=\"5 4\"" : "";
        int pen = 0;
        fprintf(f,
                "<path fill=\"none\" stroke=\"%s\" stroke-width=\"2\" stroke-linejoin=\"round\" "
                "stroke-linecap=\"round\"%s d=\"",
                colour, dash);
        for (size_t k = 0; k < l->n; k++) {
            if (!isfinite(l->y[k])) {
                pen = 0;
                continue;
            }
            double v = fmin(fmax(l->y[k], lo), hi);
            fprintf(f, "%c%.1f %.1f", pen ? 'L' : 'M', left + (double)k / (last - 1) * (right - left),
                    bottom - (v - lo) / (hi - lo) * (bottom - top));
            if (l->n == 1) fputs("h.1", f); // a dot
            pen = 1;
        }
        fputs("\"/>\n", f);
        fprintf(f, "<path d=\"M%.1f %.1fh18\" stroke=\"%s\" stroke-width=\"2.5\"%s/>\n", legend, c->box.y + 40, colour,
                dash);
        plot_text(f, legend + 23, c->box.y + 44, 11, PLOT_START, PLOT_SOFT, "", l->name);
        legend += 23 + 6.1 * (double)strlen(l->name) + 16;
    }
}

// The lines and numbers of a y axis over a box; lo and hi become round.
EX_FUNC void plot_axis(FILE *f, double left, double right, double top, double bottom, double *lo, double *hi) {
    char text[64];
    if (!(*lo <= *hi)) *lo = 0, *hi = 1;
    if (*hi - *lo < 1e-9) *lo -= 0.5, *hi += 0.5;
    double step = plot_step(*hi - *lo, 5);
    *lo = floor(*lo / step + 1e-9) * step, *hi = ceil(*hi / step - 1e-9) * step;
    for (int i = 0; i <= (int)((*hi - *lo) / step + 0.5); i++) {
        double v = *lo + i * step, y = bottom - (v - *lo) / (*hi - *lo) * (bottom - top);
        plot_number(text, sizeof text, v, step);
        fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" PLOT_GRID "\"/>\n", left, y, right);
        plot_text(f, left - 8, y + 4, 11, PLOT_END, PLOT_SOFT, "", text);
    }
}

typedef struct plot_bar_chart {
    plot_box box;
    const char *title, *x_label;
    size_t n;
    const double *value; // (n), at least 0
    double hi;           // top of the scale; 0 = from the data
    double mark;         // a dashed line at this height; 0 = none
} plot_bar_chart;

EX_FUNC void plot_bars(FILE *f, const plot_bar_chart *c) {
    double left = c->box.x + 52, right = c->box.x + c->box.w - 16, top = c->box.y + 40,
           bottom = c->box.y + c->box.h - 42, lo = 0, hi = c->hi;
    char text[64];
    for (size_t i = 0; i < c->n && c->hi <= 0; i++)
        if (isfinite(c->value[i])) hi = fmax(hi, c->value[i]);
    if (hi <= 0) hi = 1;
    plot_text(f, c->box.x + 14, c->box.y + 24, 13, PLOT_START, PLOT_INK, "font-weight=\"600\"", c->title);
    plot_axis(f, left, right, top, bottom, &lo, &hi);
    double w = (right - left) / (double)(c->n ? c->n : 1), gap = w > 5 ? 1.5 : 0;
    for (size_t i = 0; i < c->n; i++) {
        double h = isfinite(c->value[i]) ? fmin(c->value[i], hi) / hi * (bottom - top) : 0;
        fprintf(f, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\"/>\n",
                left + (double)i * w + gap / 2, bottom - h, w - gap, h, plot_colour[0]);
    }
    if (c->mark > 0)
        fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"%s\" stroke-dasharray=\"5 4\"/>\n", left,
                bottom - fmin(c->mark, hi) / hi * (bottom - top), right, plot_colour[1]);
    size_t every = (size_t)fmax(1, plot_step((double)c->n, 8));
    for (size_t i = 0; i < c->n; i += every) {
        snprintf(text, sizeof text, "%zu", i);
        plot_text(f, left + ((double)i + 0.5) * w, bottom + 15, 11, PLOT_MIDDLE, PLOT_SOFT, "", text);
    }
    plot_text(f, (left + right) / 2, bottom + 32, 11, PLOT_MIDDLE, PLOT_SOFT, "", c->x_label);
}

typedef struct plot_point_chart {
    plot_box box;
    const char *title, *x_label;
    size_t n;
    const double *x, *y;   // (n); x ascends; y NaN = none
    const double *lo, *hi; // (n): whiskers; NULL or NaN = none
    const int *group;      // (n): colours by this; NULL = one colour
    const char *const *group_name;
    int n_groups;
    int joined; // a line through the points
    const double *mark; // (n_marks): dashed lines at these x
    size_t n_marks;
} plot_point_chart;

EX_FUNC void plot_points(FILE *f, const plot_point_chart *c) {
    double left = c->box.x + 52, right = c->box.x + c->box.w - 24, top = c->box.y + (c->group ? 56 : 40),
           bottom = c->box.y + c->box.h - 42, lo = INFINITY, hi = -INFINITY, first = c->n ? c->x[0] : 0,
           last = c->n ? c->x[c->n - 1] : 1, legend = c->box.x + 14;
    char text[64];
    if (!(last > first)) first -= 1, last += 1;
    for (size_t i = 0; i < c->n; i++) {
        const double *part[] = {c->y, c->lo, c->hi};
        for (int k = 0; k < 3; k++)
            if (part[k] && isfinite(part[k][i])) lo = fmin(lo, part[k][i]), hi = fmax(hi, part[k][i]);
    }
    plot_text(f, c->box.x + 14, c->box.y + 24, 14, PLOT_START, PLOT_INK, "font-weight=\"600\"", c->title);
    plot_axis(f, left, right, top, bottom, &lo, &hi);
    double step = fmax(1, plot_step(last - first, 8));
    for (double v = ceil(first / step - 1e-9) * step; v <= last + step * 1e-6; v += step) {
        plot_number(text, sizeof text, v, step);
        plot_text(f, left + 12 + (v - first) / (last - first) * (right - left - 24), bottom + 17, 11, PLOT_MIDDLE,
                  PLOT_SOFT, "", text);
    }
    fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" PLOT_SOFT "\"/>\n", left, bottom, right);
    plot_text(f, (left + right) / 2, bottom + 34, 11, PLOT_MIDDLE, PLOT_SOFT, "", c->x_label);
    for (size_t i = 0; i < c->n_marks; i++)
        if (c->mark[i] >= first && c->mark[i] <= last)
            fprintf(f, "<path d=\"M%.1f %.1fV%.1f\" stroke=\"" PLOT_SOFT "\" stroke-dasharray=\"5 4\"/>\n",
                    left + 12 + (c->mark[i] - first) / (last - first) * (right - left - 24), top, bottom);
    for (int pass = c->joined ? 0 : 1; pass < 2; pass++) { // the line lies below the points
        int pen = 0;
        if (!pass) fputs("<path fill=\"none\" stroke=\"" PLOT_GRID "\" stroke-width=\"2\" d=\"", f);
        for (size_t i = 0; i < c->n; i++) {
            double x = left + 12 + (c->x[i] - first) / (last - first) * (right - left - 24);
            double scale = (bottom - top) / (hi - lo), y = bottom - (c->y[i] - lo) * scale;
            const char *colour = plot_colour[c->group ? (size_t)c->group[i] % PLOT_COLOURS : 0];
            if (!isfinite(c->y[i])) {
                pen = 0;
            } else if (!pass) {
                fprintf(f, "%c%.1f %.1f", pen ? 'L' : 'M', x, y);
                pen = 1;
            } else {
                if (c->lo && c->hi && isfinite(c->lo[i]) && isfinite(c->hi[i]))
                    fprintf(f, "<path d=\"M%.1f %.1fV%.1fm-3 0h6m-6 %.1fh6\" stroke=\"%s\" fill=\"none\"/>\n", x,
                            bottom - (c->lo[i] - lo) * scale, bottom - (c->hi[i] - lo) * scale,
                            (c->hi[i] - c->lo[i]) * scale, colour);
                fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", x, y, colour);
            }
        }
        if (!pass) fputs("\"/>\n", f);
    }
    for (int g = 0; c->group && g < c->n_groups; g++) {
        size_t i = 0;
        while (i < c->n && c->group[i] != g) i++;
        if (i == c->n) continue; // nobody is in it
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", legend + 4, c->box.y + 40,
                plot_colour[(size_t)g % PLOT_COLOURS]);
        plot_text(f, legend + 13, c->box.y + 44, 11, PLOT_START, PLOT_SOFT, "", c->group_name[g]);
        legend += 13 + 6.1 * (double)strlen(c->group_name[g]) + 16;
    }
}

typedef struct plot_point {
    double x, y;
    const char *label; // NULL = none
    int group;         // its colour
} plot_point;

typedef struct plot_cloud {
    plot_box box;
    const char *title, *x_label, *y_label;
    const plot_point *point;
    size_t n_points;
    size_t n_path;            // a line joins the first n_path points
    const char *const *group; // (n_groups) names, for a legend; NULL = none
    size_t n_groups;
} plot_cloud;

// Points in a plane, with their names beside them. A name moves up or down, or to the other side, where it would stand
// on another one or on a point; then a hairline leads to it.
EX_FUNC void plot_scatter(FILE *f, const plot_cloud *c) {
    enum { TRIES = 41, LINE = 12 };
    double left = c->box.x + 58, right = c->box.x + c->box.w - 20, top = c->box.y + (c->group ? 74 : 50),
           bottom = c->box.y + c->box.h - 42, legend = c->box.x + 14;
    double lo = INFINITY, hi = -INFINITY, first = INFINITY, last = -INFINITY;
    plot_box *used = allocate(2 * c->n_points, sizeof *used); // the points, then the names
    size_t n_used = c->n_points;
    char text[64];
    for (size_t i = 0; i < c->n_points; i++) {
        lo = fmin(lo, c->point[i].y), hi = fmax(hi, c->point[i].y);
        first = fmin(first, c->point[i].x), last = fmax(last, c->point[i].x);
    }
    if (!(first <= last)) first = 0, last = 1;
    if (last - first < 1e-9) first -= 0.5, last += 0.5;
    plot_text(f, c->box.x + 14, c->box.y + 24, 14, PLOT_START, PLOT_INK, "font-weight=\"600\"", c->title);
    plot_axis(f, left, right, top, bottom, &lo, &hi);
    plot_text(f, c->box.x + 14, top - 8, 11, PLOT_START, PLOT_SOFT, "", c->y_label);
    double step = plot_step(last - first, c->box.w / 80), wide = right - left - 32;
    for (double v = ceil(first / step - 1e-9) * step; v <= last + step * 1e-6; v += step) {
        plot_number(text, sizeof text, v, step);
        plot_text(f, left + 16 + (v - first) / (last - first) * wide, bottom + 17, 11, PLOT_MIDDLE, PLOT_SOFT, "",
                  text);
    }
    fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"" PLOT_SOFT "\"/>\n", left, bottom, right);
    plot_text(f, (left + right) / 2, bottom + 34, 11, PLOT_MIDDLE, PLOT_SOFT, "", c->x_label);
    for (size_t i = 0; i < c->n_points; i++)
        used[i] = (plot_box){left + 16 + (c->point[i].x - first) / (last - first) * wide - 4,
                             bottom - (c->point[i].y - lo) / (hi - lo) * (bottom - top) - 4, 8, 8};
    if (c->n_path) fputs("<path fill=\"none\" stroke=\"" PLOT_SOFT "\" stroke-width=\"1.5\" d=\"", f);
    for (size_t i = 0; i < c->n_path; i++) fprintf(f, "%c%.1f %.1f", i ? 'L' : 'M', used[i].x + 4, used[i].y + 4);
    if (c->n_path) fputs("\"/>\n", f);
    for (size_t i = 0; i < c->n_points; i++) {
        const char *colour = plot_colour[(size_t)c->point[i].group % PLOT_COLOURS];
        double x = used[i].x + 4, y = used[i].y + 4;
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", x, y, colour);
        if (!c->point[i].label) continue;
        plot_box name = {0, 0, 5.6 * (double)strlen(c->point[i].label), LINE};
        for (int t = 0; t < 2 * TRIES; t++) { // right and left; level, then up and down in turn
            int rows = t / 2, shift = rows % 2 ? -(rows + 1) / 2 : rows / 2, clear = 1;
            name.x = t % 2 ? x - 9 - name.w : x + 9;
            name.y = y - LINE / 2 + shift * (LINE - 2);
            for (size_t k = 0; k < n_used && clear; k++)
                clear = name.x + name.w <= used[k].x || used[k].x + used[k].w <= name.x ||
                        name.y + name.h <= used[k].y || used[k].y + used[k].h <= name.y;
            int inside = name.x >= left && name.x + name.w <= right && name.y >= top - 14 && name.y <= bottom - 8;
            if (clear && inside) break;
        }
        if (fabs(name.y + LINE / 2 - y) > LINE)
            fprintf(f, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"%s\" stroke-width=\"0.5\"/>\n", x, y,
                    name.x > x ? name.x - 1 : name.x + name.w + 1, name.y + LINE / 2, colour);
        plot_text(f, name.x, name.y + 10, 10, PLOT_START, PLOT_INK, "", c->point[i].label);
        used[n_used++] = name;
    }
    free(used);
    for (size_t g = 0; c->group && g < c->n_groups; g++) {
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", legend + 4, c->box.y + 40,
                plot_colour[g % PLOT_COLOURS]);
        plot_text(f, legend + 13, c->box.y + 44, 11, PLOT_START, PLOT_SOFT, "", c->group[g]);
        legend += 13 + 6.1 * (double)strlen(c->group[g]) + 16;
    }
}

// Colours from dark to light, in steps that look even (after viridis, by Smith and van der Walt, CC0). v in [0, 1].
EX_FUNC void plot_shade(double v, int rgb[3]) {
    static const unsigned char stop[][3] = {{68, 1, 84},    {72, 40, 120},  {62, 73, 137},  {49, 104, 142},
                                            {38, 130, 142}, {31, 158, 137}, {53, 183, 121}, {110, 206, 88},
                                            {181, 222, 43}, {253, 231, 37}};
    double at = (v < 0 ? 0 : v > 1 ? 1 : v) * 9;
    int i = at >= 9 ? 8 : (int)at;
    for (int k = 0; k < 3; k++) rgb[k] = (int)(stop[i][k] + (at - i) * (stop[i + 1][k] - stop[i][k]) + 0.5);
}

typedef struct plot_map {
    plot_box box;
    const char *title, *x_label;
    size_t rows, cols;
    const double *value;         // (rows, cols); NaN = empty
    double lo, hi;               // the ends of the colours
    const char *const *row_name; // NULL = numbers from 0
    const char *const *col_name; // NULL = numbers from col_first
    size_t col_first;
    const char *format;       // e.g. "%.0f": the value in each cell; NULL = colours only
    const char *scale_format; // of the ends of the scale; NULL = "%.2g"
} plot_map;

EX_FUNC void plot_heat(FILE *f, const plot_map *m) {
    double widest = 0, left, right = m->box.x + m->box.w - 62, top = m->box.y + 40, bottom = m->box.y + m->box.h - 42;
    char text[64];
    int rgb[3];
    for (size_t r = 0; m->row_name && r < m->rows; r++) widest = fmax(widest, (double)strlen(m->row_name[r]));
    left = m->box.x + 14 + (m->row_name ? 6.6 * widest : 16) + 8;
    double w = (right - left) / (double)(m->cols ? m->cols : 1), h = (bottom - top) / (double)(m->rows ? m->rows : 1);
    double gap = w > 8 && h > 8 ? 1 : 0; // a hairline between large cells
    plot_text(f, m->box.x + 14, m->box.y + 24, 14, PLOT_START, PLOT_INK, "font-weight=\"600\"", m->title);
    for (size_t r = 0; r < m->rows; r++) {
        double y = top + (double)r * h;
        snprintf(text, sizeof text, "%zu", r);
        if (h >= 9 || r % (size_t)ceil(9 / h) == 0)
            plot_text(f, left - 8, y + h / 2 + 4, 11, PLOT_END, PLOT_SOFT, "", m->row_name ? m->row_name[r] : text);
        for (size_t c = 0; c < m->cols; c++) {
            double v = m->value[r * m->cols + c], x = left + (double)c * w;
            double level = m->hi > m->lo ? (v - m->lo) / (m->hi - m->lo) : 0;
            if (isfinite(v))
                plot_shade(level, rgb);
            else
                rgb[0] = rgb[1] = rgb[2] = 235;
            fprintf(f, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"#%02x%02x%02x\"%s/>\n", x, y,
                    w - gap + (gap > 0 ? 0 : 0.3), h - gap + (gap > 0 ? 0 : 0.3), (unsigned)rgb[0], (unsigned)rgb[1],
                    (unsigned)rgb[2], gap > 0 ? " rx=\"1.5\"" : "");
            if (m->format && isfinite(v)) {
                snprintf(text, sizeof text, m->format, v);
                plot_text(f, x + w / 2, y + h / 2 + 3.5, 10, PLOT_MIDDLE, level > 0.62 ? PLOT_INK : "#fff", "", text);
            }
        }
    }
    size_t every = m->col_name ? 1 : (size_t)fmax(1, plot_step((double)m->cols, 10));
    for (size_t c = every > 1 ? (every - m->col_first % every) % every : 0; c < m->cols; c += every) {
        double x = left + ((double)c + 0.5) * w;
        snprintf(text, sizeof text, "%zu", c + m->col_first);
        plot_text(f, x, bottom + 15, m->col_name ? 10 : 11, PLOT_MIDDLE, PLOT_SOFT, "",
                  m->col_name ? m->col_name[c] : text);
    }
    plot_text(f, (left + right) / 2, bottom + 34, 11, PLOT_MIDDLE, PLOT_SOFT, "", m->x_label);
    for (int i = 0; i < 48; i++) { // the scale
        plot_shade(i / 47.0, rgb);
        fprintf(f,
                "<rect x=\"%.1f\" y=\"%.2f\" width=\"10\" height=\"%.2f\" fill=\"#%02x%02x%02x\" "
                "shape-rendering=\"crispEdges\"/>\n",
                right + 12, bottom - (i + 1) * (bottom - top) / 48, (bottom - top) / 48 + 0.4, (unsigned)rgb[0],
                (unsigned)rgb[1], (unsigned)rgb[2]);
    }
    const char *ends = m->scale_format ? m->scale_format : "%.2g";
    snprintf(text, sizeof text, ends, m->hi);
    plot_text(f, right + 26, top + 9, 10, PLOT_START, PLOT_SOFT, "", text);
    snprintf(text, sizeof text, ends, m->lo);
    plot_text(f, right + 26, bottom, 10, PLOT_START, PLOT_SOFT, "", text);
}

// ---- a page ----

EX_FUNC void page_begin(FILE *f, const char *title, const char *about) {
    fputs("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
          "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>",
          f);
    plot_escape(f, title);
    fputs("</title>\n<style>\n"
          "body{font:15px/1.5 " PLOT_FONT ";color:" PLOT_INK ";background:#f4f6f9;margin:0}\n"
          "main{max-width:980px;margin:32px auto;padding:0 16px}\n"
          "h1{font-size:26px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}p{color:" PLOT_SOFT
          ";margin:0 0 16px}\n"
          ".card{background:#fff;border:1px solid " PLOT_GRID
          ";border-radius:10px;padding:10px;margin:16px 0;overflow-x:auto}\n"
          "svg{display:block;width:100%;height:auto}\n"
          "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\n"
          "th,td{padding:5px 10px;text-align:right;border-bottom:1px solid " PLOT_GRID "}\n"
          "th{color:" PLOT_SOFT ";font-weight:600}th:first-child,td:first-child,.text{text-align:left}\n"
          "tr:last-child td{border-bottom:0}pre{white-space:pre-wrap;word-break:break-all;font-size:12px;margin:6px}\n"
          "</style></head><body><main>\n<h1>",
          f);
    plot_escape(f, title);
    fputs("</h1>\n<p>", f);
    plot_escape(f, about);
    fputs("</p>\n", f);
}
EX_FUNC void page_end(FILE *f) { fputs("</main></body></html>\n", f); }
EX_FUNC void page_card(FILE *f) { fputs("<div class=\"card\">\n", f); }
EX_FUNC void page_card_end(FILE *f) { fputs("</div>\n", f); }
EX_FUNC void page_heading(FILE *f, const char *text) {
    fputs("<h2>", f);
    plot_escape(f, text);
    fputs("</h2>\n", f);
}
EX_FUNC void page_pre(FILE *f, const char *text) {
    fputs("<pre>", f);
    plot_escape(f, text);
    fputs("</pre>\n", f);
}

// One row of a table; the header row first. Cells are given as "a|b|c"; one that begins with '<' stands at the left.
EX_FUNC void page_table_begin(FILE *f) { fputs("<table>\n", f); }
EX_FUNC void page_table_end(FILE *f) { fputs("</table>\n", f); }
EX_PRINTF(3, 4) EX_FUNC void page_row(FILE *f, int header, const char *format, ...) {
    char row[1024], *cell = row;
    va_list args;
    va_start(args, format);
    vsnprintf(row, sizeof row, format, args);
    va_end(args);
    fputs("<tr>", f);
    for (char *end; cell; cell = end) {
        end = strchr(cell, '|');
        if (end) *end++ = 0;
        int left = *cell == '<';
        fprintf(f, "<%s%s>", header ? "th" : "td", left ? " class=\"text\"" : "");
        plot_escape(f, cell + left);
        fputs(header ? "</th>" : "</td>", f);
    }
    fputs("</tr>\n", f);
}

#endif

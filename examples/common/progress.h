// progress.h - one line on standard error that says how far, how fast and how long to go.
// On a terminal the line is redrawn at most ten times a second; elsewhere a new line comes at most every ten seconds;
// quiet: nothing.
#ifndef EX_PROGRESS_H
#define EX_PROGRESS_H

#include "platform.h"

typedef struct progress {
    const char *label, *unit;
    size_t total;
    double start, last;
    int quiet, terminal;
} progress;

EX_FUNC progress progress_begin(const char *label, const char *unit, size_t total, int quiet) {
    double now = seconds_now();
    return (progress){label, unit, total, now, now, quiet, stderr_is_terminal()};
}

EX_FUNC void progress_duration(char *out, size_t size, double seconds) {
    unsigned long s = seconds > 0 && seconds < 1e9 ? (unsigned long)(seconds + 0.5) : 0;
    if (s < 60)
        snprintf(out, size, "%lu s", s);
    else if (s < 3600)
        snprintf(out, size, "%lu:%02lu min", s / 60, s % 60);
    else
        snprintf(out, size, "%lu:%02lu h", s / 3600, s / 60 % 60);
}

// done of total units; the rest is free text for the end of the line, e.g. "loss 1.234".
EX_PRINTF(3, 4) EX_FUNC void progress_update(progress *p, size_t done, const char *format, ...) {
    double now = seconds_now(), spent = now - p->start;
    if (p->quiet || now - p->last < (p->terminal ? 0.1 : 10.0) || !done) return;
    p->last = now;
    char left[32];
    progress_duration(left, sizeof left, spent * (double)(p->total - done) / (double)done);
    fprintf(stderr, "%s%s %3.0f%%  %.0f %s/s  %s left  ", p->terminal ? "\r" : "", p->label,
            100.0 * (double)done / (double)p->total, (double)done / (spent > 0 ? spent : 1), p->unit, left);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputs(p->terminal ? "\x1b[K" : "\n", stderr);
    fflush(stderr);
}

// Clears the line, so that other text can follow.
EX_FUNC void progress_clear(const progress *p) {
    if (!p->quiet && p->terminal) fputs("\r\x1b[K", stderr);
}

#endif

// platform.h - the few things the examples need that C99 does not have: a clock, terminals, folders.
// Include it (or any header of examples/common) before the system headers.
#ifndef EX_PLATFORM_H
#define EX_PLATFORM_H

#if !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
#include <direct.h>
#include <io.h>
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

// The examples use a part of these headers each.
#if defined(__GNUC__)
#define EX_FUNC static __attribute__((unused))
#define EX_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define EX_FUNC static
#define EX_PRINTF(text, first)
#endif

// Prints "error: ..." and ends the program with status 1.
EX_PRINTF(1, 2) EX_FUNC void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

// Memory, zeroed, or the end of the program.
EX_FUNC void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) die("out of memory (%zu x %zu bytes)", count, size);
    return p;
}

// Seconds on a clock that never goes back.
EX_FUNC double seconds_now(void) {
#ifdef _WIN32
    return (double)clock() / CLOCKS_PER_SEC;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#endif
}

// Whether standard error is a terminal.
EX_FUNC int stderr_is_terminal(void) {
#ifdef _WIN32
    return _isatty(2);
#else
    return isatty(2);
#endif
}

// Opens DIR/NAME for writing, making DIR if needed; ends the program if that fails.
EX_FUNC FILE *open_output(const char *dir, const char *name) {
    char path[1024];
#ifdef _WIN32
    int made = _mkdir(dir);
#else
    int made = mkdir(dir, 0777);
#endif
    if (made && errno != EEXIST) die("cannot create the folder %s: %s", dir, strerror(errno));
    if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
        die("the path %s/%s is too long", dir, name);
    FILE *f = fopen(path, "w");
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    return f;
}

// Closes a file that was written; a full disk shows here at the latest.
EX_FUNC void close_output(FILE *f, const char *name) {
    int bad = ferror(f);
    if (fclose(f) || bad) die("cannot write %s completely: %s", name, strerror(errno));
}

#endif

// platform.h - the few things the examples need that C99 does not have: a clock, terminals, folders.
// Include it (or any header of examples/common) before the system headers.
#ifndef EX_PLATFORM_H
#define EX_PLATFORM_H

#if !defined(_POSIX_C_SOURCE) && !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE // madvise
#endif
#if !defined(_FILE_OFFSET_BITS) && !defined(_WIN32)
#define _FILE_OFFSET_BITS 64 // files of more than 2 GB on 32 bits too
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
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
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

// Bad input from a file: "error: FILE: ...", and status 2.
EX_PRINTF(2, 3) EX_FUNC void refuse(const char *file, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "error: %s: ", file);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

// Memory, zeroed, or the end of the program.
EX_FUNC void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) die("out of memory (%zu x %zu bytes)", count, size);
    return p;
}

// malloc; large blocks in huge pages, where the system has them: a checkpoint's gigabytes are then some thousand page
// faults, not millions.
EX_FUNC void *huge_malloc(size_t bytes) {
#ifdef MADV_HUGEPAGE
    const size_t page = (size_t)1 << 21;
    void *p = NULL;
    if (bytes >= 4 * page && bytes <= SIZE_MAX - page) {
        if (posix_memalign(&p, page, bytes)) return NULL;
        madvise(p, bytes / page * page, MADV_HUGEPAGE); // a wish: without it the pages are small
        return p;
    }
#endif
    return malloc(bytes ? bytes : 1);
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

// Is there such a file in the folder?
EX_FUNC int file_exists(const char *folder, const char *file) {
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

// The folder of the repository (with its part `under`: "examples/data") that holds `file`, looked for from the current
// folder and from that of the program, build/NAME = argv0. 0: it is in neither.
EX_FUNC int sample_folder(const char *argv0, const char *under, const char *file, char *folder, size_t size) {
    const char *slash = strrchr(argv0, '/');
    snprintf(folder, size, "%s", under);
    if (file_exists(folder, file)) return 1;
    snprintf(folder, size, "%.*s/../%s", slash ? (int)(slash - argv0) : 1, slash ? argv0 : ".", under);
    return file_exists(folder, file);
}

// Goes to byte `at` of a file, beyond 2 GB too. 0 if that fails.
EX_FUNC int file_seek(FILE *f, uint64_t at) {
#ifdef _WIN32
    return _fseeki64(f, (long long)at, SEEK_SET) == 0;
#else
    return fseeko(f, (off_t)at, SEEK_SET) == 0;
#endif
}

// The size of an open file, which is at its beginning then; 0 if it cannot be told (a pipe).
EX_FUNC uint64_t file_size(FILE *f) {
#ifdef _WIN32
    long long n = _fseeki64(f, 0, SEEK_END) ? 0 : _ftelli64(f);
#else
    off_t n = fseeko(f, 0, SEEK_END) ? 0 : ftello(f);
#endif
    return file_seek(f, 0) && n > 0 ? (uint64_t)n : 0;
}

#ifndef _WIN32
// What is mapped, so that a file which another program makes shorter meanwhile has its name in the message. The rest of
// a page past the new end reads as zeros and is noticed by whoever checks them; a page past it ends the program.
static struct { const char *begin, *end; char path[256]; } file_views[64];
static size_t file_views_n;

EX_FUNC void file_view_shorter(int signal_number, siginfo_t *info, void *context) {
    static const char before[] = "error: ", after[] = ": was made shorter while it was read, or its disk failed\n";
    const char *at = info->si_addr, *path = "a file";
    (void)signal_number, (void)context;
    for (size_t i = 0; i < file_views_n; i++)
        if (at >= file_views[i].begin && at < file_views[i].end) path = file_views[i].path;
    ssize_t written = write(2, before, sizeof before - 1);
    written += write(2, path, strlen(path));
    written += write(2, after, sizeof after - 1);
    _exit(written < 0 ? 3 : 2);
}
EX_FUNC void file_view_watch(const char *path, const void *begin, size_t size) {
    struct sigaction action;
    size_t i = file_views_n;
    if (i == sizeof file_views / sizeof file_views[0]) return; // then without its name
    memset(&action, 0, sizeof action);
    action.sa_sigaction = file_view_shorter;
    action.sa_flags = SA_SIGINFO;
    if (!i) sigaction(SIGBUS, &action, NULL);
    size_t length = strlen(path), most = sizeof file_views[i].path - 1;
    strcpy(file_views[i].path, length > most ? path + (length - most) : path); // the end of it, where it is too long
    file_views[i].begin = begin;
    file_views[i].end = (const char *)begin + size;
    file_views_n = i + 1;
}
#endif

// A whole file as memory that is read from disk only where it is looked at (on Windows: read). NULL if that fails; an
// empty file has size 0. The view stays until the program ends.
EX_FUNC const void *file_view(const char *path, size_t *size) {
    *size = 0;
#ifdef _WIN32
    FILE *f = fopen(path, "rb");
    uint64_t n = f ? file_size(f) : 0;
    void *p = f ? malloc(n ? (size_t)n : 1) : NULL;
    if (p && fread(p, 1, (size_t)n, f) == n) *size = (size_t)n;
    if (f) fclose(f);
    return p;
#else
    struct stat info;
    int file = open(path, O_RDONLY);
    if (file < 0) return NULL;
    void *p = NULL;
    errno = 0;
    int known = fstat(file, &info) == 0;
    if (known && S_ISDIR(info.st_mode)) errno = EISDIR;
    if (known && S_ISREG(info.st_mode)) {
        p = info.st_size ? mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0) : (void *)"";
        if (p == MAP_FAILED) p = NULL;
        if (p) *size = (size_t)info.st_size;
        if (*size) file_view_watch(path, p, *size);
    }
    close(file);
    return p;
#endif
}

// Closes a file that was written; a full disk shows here at the latest.
EX_FUNC void close_output(FILE *f, const char *name) {
    int bad = ferror(f);
    if (fclose(f) || bad) die("cannot write %s completely: %s", name, strerror(errno));
}

#endif

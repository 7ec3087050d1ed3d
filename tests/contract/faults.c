/* A disk that fails: each call to the system in its turn, and several at once. A save that fails leaves the old file
 * whole, nothing beside it, and the system's reason; bytes are on the disk before they have the name. */
#ifndef _WIN32
#define _POSIX_C_SOURCE 200809L
#define _XOPEN_SOURCE 700
#include <unistd.h>
#endif
#include "temp.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the system, with a log of what was called, one letter each ---- */
static char calls[4096];
static const char *broken = ""; /* these letters fail */
static long writes_left;         /* so many still succeed */
static int why = ENOSPC;         /* the system's reason */
static int fails(char call) {
    size_t n = strlen(calls);
    if (n + 1 < sizeof calls) calls[n] = call, calls[n + 1] = 0;
    if (!strchr(broken, call) || (call == 'W' && writes_left-- > 0)) return 0;
    errno = why;
    return 1;
}
static FILE *disk_fopen(const char *path, const char *mode) { return fails('O') ? NULL : fopen(path, mode); }
static size_t disk_fwrite(const void *p, size_t size, size_t n, FILE *f) {
    return fails('W') ? 0 : fwrite(p, size, n, f);
}
static size_t disk_fread(void *p, size_t size, size_t n, FILE *f) { return fails('R') ? 0 : fread(p, size, n, f); }
static int disk_fgetc(FILE *f) { return fails('G') ? EOF : fgetc(f); }
static int disk_ferror(FILE *f) { return fails('E') ? 1 : ferror(f); }
static int disk_fflush(FILE *f) { return fflush(f) | (fails('F') ? EOF : 0); }
static int disk_fclose(FILE *f) { return fclose(f) | (fails('C') ? EOF : 0); }
static int disk_rename(const char *from, const char *to) { return fails('N') ? -1 : rename(from, to); }
static int disk_fseek(FILE *f, long to, int from) {
    return fails(from == SEEK_END ? 'S' : 'B') ? -1 : fseek(f, to, from);
}
static long disk_ftell(FILE *f) { return fails('T') ? -1 : ftell(f); }
#define fopen disk_fopen
#define fwrite disk_fwrite
#define fread disk_fread
#define fgetc disk_fgetc
#undef ferror
#define ferror disk_ferror
#define fflush disk_fflush
#define fclose disk_fclose
#define rename disk_rename
#define fseek disk_fseek
#define ftell disk_ftell
#ifndef _WIN32
static int disk_fsync(int file) { return fails('Y') ? -1 : fsync(file); }
#define fsync disk_fsync
#endif
#define MOE_IMPLEMENTATION
#define MOE_NO_SIMD /* quick to compile: see the Makefile */
#include "test.h"
#undef fopen
#undef fwrite
#undef fread
#undef fclose
#undef fflush

static char path[512], part[540];
static moe_layer *layer;

static size_t read_back(const char *name, unsigned char *bytes, size_t room) {
    FILE *f = fopen(name, "rb");
    size_t n = f ? fread(bytes, 1, room, f) : 0;
    if (f) fclose(f);
    return n;
}
static unsigned char old_bytes[1 << 14], new_bytes[1 << 14];

/* The old file, a save with these calls broken, and the old file again. */
static void check_save(const char *letters, moe_status want) {
    broken = "";
    CHECK_OK(moe_layer_save(layer, 0, path));
    size_t n = read_back(path, old_bytes, sizeof old_bytes);
    long live = test_live_blocks;
    calls[0] = 0, broken = letters, errno = 0;
    moe_status s = moe_layer_save(layer, 1, path);
    int reason = errno;
    broken = "";
    if (!CHECK_STATUS(s, want)) printf("        with %s broken\n", letters);
    CHECK(reason == why && test_live_blocks == live);
    CHECK(n > 0 && read_back(path, new_bytes, sizeof new_bytes) == n && !memcmp(old_bytes, new_bytes, n));
    CHECK(read_back(part, new_bytes, 1) == 0);
}
static void test_save(void) {
    CHECK_OK(moe_layer_save(layer, 1, path));
    calls[0] = 0;
    CHECK_OK(moe_layer_save(layer, 1, path));
#ifndef _WIN32
    const char *sync = strchr(calls, 'Y'), *last = strrchr(calls, 'W'), *name = strchr(calls, 'N');
    const char *flush = strchr(calls, 'F'), *closed = strchr(calls, 'C');
    if (CHECK(calls[0] == 'O' && sync && last && name && flush && closed))
        CHECK(last < flush && flush < sync && sync < closed && closed < name); /* on the disk, then named */
    check_save("Y", MOE_E_WRITE);
    check_save("YN", MOE_E_WRITE);
#endif
    check_save("O", MOE_E_OPEN);
    check_save("W", MOE_E_WRITE);
    check_save("F", MOE_E_WRITE);
    check_save("E", MOE_E_WRITE);
    check_save("C", MOE_E_WRITE);
    check_save("N", MOE_E_WRITE);
    check_save("WFEC", MOE_E_WRITE);
    why = EISDIR; /* since it was looked at, a folder came there */
    check_save("N", MOE_E_FOLDER);
    check_save("O", MOE_E_FOLDER);
    why = EEXIST; /* and so many saves are under way that no name is free */
    check_save("O", MOE_E_OPEN);
    for (const char *c = calls; *c; c++) CHECK(*c == 'O');
    CHECK(strlen(calls) == 1000);
    why = ENOSPC;
}
/* Each write in its turn: the header, then each tensor. */
static void test_save_later(void) {
    size_t writes = 0;
    calls[0] = 0;
    CHECK_OK(moe_layer_save(layer, 1, path));
    for (const char *c = calls; *c; c++) writes += *c == 'W';
    CHECK(writes > 5);
    for (size_t i = 0; i < writes; i++) {
        writes_left = (long)i;
        check_save("W", MOE_E_WRITE);
    }
    writes_left = 0;
}

static void check_load(const char *letters, moe_status want) {
    moe_layer *m = layer;
    long live = test_live_blocks;
    calls[0] = 0, broken = letters;
    moe_status s = moe_layer_load(&m, path, NULL);
    broken = "";
    if (!CHECK_STATUS(s, want)) printf("        with %s broken\n", letters);
    CHECK(m == NULL && test_live_blocks == live);
}
static void test_load(void) {
    CHECK_OK(moe_layer_save(layer, 1, path));
    check_load("O", MOE_E_OPEN);
    check_load("G", MOE_E_FILE_SHORT); /* nothing to read, and nothing wrong */
    check_load("GE", MOE_E_READ);
    check_load("S", MOE_E_READ);
    check_load("T", MOE_E_READ);
    check_load("B", MOE_E_READ);
    check_load("R", MOE_E_READ);
    check_load("C", MOE_E_READ);
    check_load("RC", MOE_E_READ);
    why = EISDIR;
    check_load("GE", MOE_E_FOLDER);
    why = ENOSPC;
    moe_layer *back = NULL;
    if (CHECK_OK(moe_layer_load(&back, path, NULL))) CHECK(moe_layer_hash(back) == moe_layer_hash(layer));
    moe_layer_free(back);
}

int main(void) {
    temp_path(path, sizeof path, "faults");
    snprintf(part, sizeof part, "%s.part", path);
    moe_desc d = {0};
    d.d_model = 3, d.d_ff = 2, d.n_experts = 2, d.parallel.n_threads = 1;
    if (moe_layer_new(&layer, &d)) return 1;
    RUN(test_save);
    RUN(test_save_later);
    RUN(test_load);
    remove(path);
    moe_layer_free(layer);
    return test_end();
}

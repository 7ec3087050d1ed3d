// whole.h - files that are written whole: beside their place, flushed to the disk and then renamed, so that whatever
// ends the program leaves the old file or the new one.
//
//     whole_file f = whole_begin(dir, "config.json");
//     whole_put(&f, bytes, n);
//     whole_end(&f);
#ifndef EX_WHOLE_H
#define EX_WHOLE_H

#include "platform.h"

typedef struct whole_file {
    FILE *file;
    char path[1000], part[1030];
} whole_file;

EX_FUNC whole_file whole_begin(const char *dir, const char *name) {
    whole_file f = {.file = NULL};
    if (snprintf(f.path, sizeof f.path, "%s/%s", dir, name) >= (int)sizeof f.path) die("the path %s is too long", dir);
    long own = 0; // two programs that write to one folder do not share what they have not finished
#ifndef _WIN32
    own = (long)getpid();
#endif
    snprintf(f.part, sizeof f.part, "%.900s.%ld.part", name, own);
    f.file = open_output(dir, f.part);
    snprintf(f.part, sizeof f.part, "%s.%ld.part", f.path, own);
    return f;
}
EX_FUNC void whole_put(whole_file *f, const void *bytes, size_t n) {
    if (n && fwrite(bytes, 1, n, f->file) != n) die("cannot write %s: %s", f->part, strerror(errno));
}
EX_FUNC void whole_end(whole_file *f) {
    int bad = fflush(f->file) != 0;
#ifdef _WIN32
    close_output(f->file, f->part);
    remove(f->path); // there, rename does not replace
#else
    bad = bad || fsync(fileno(f->file)) != 0;
    close_output(f->file, f->part);
#endif
    if (bad || rename(f->part, f->path) != 0) die("cannot write %s: %s", f->path, strerror(errno));
}

#endif

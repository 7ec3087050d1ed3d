/* temp.h - The path of a file for a test, no other process's. */
#ifndef TEMP_H
#define TEMP_H

#include <stdio.h>
#include <stdlib.h>
#ifndef _WIN32
#include <unistd.h>
#endif

static inline void temp_path(char *path, size_t size, const char *name) {
    const char *folder = getenv("TMPDIR");
    long id = 0;
#ifndef _WIN32
    id = (long)getpid();
    if (!folder) folder = "/tmp";
#endif
    snprintf(path, size, "%.400s/moe_test_%s_%ld", folder ? folder : ".", name, id);
}

#endif

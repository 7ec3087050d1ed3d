/* The inputs in tests/fuzz/corpus, which libFuzzer found (tests/fuzz/run.sh), with any compiler: none may end the
 * program, and each target keeps its promises. */
#define FUZZ_REPLAY
#include "test.h"

#include "tests/fuzz/desc.c"
#include "tests/fuzz/file.c"
#include "tests/fuzz/layer.c"
#include "tests/fuzz/model.c"
#include "tests/fuzz/routes.c"
#include "tests/fuzz/tokenizer.c"

#include <dirent.h>

typedef int fuzz_target(const uint8_t *data, size_t size);
static const struct { const char *name; fuzz_target *run; } targets[] = {
    {"desc", fuzz_desc}, {"file", fuzz_file}, {"layer", fuzz_layer},
    {"model", fuzz_model}, {"routes", fuzz_routes}, {"tokenizer", fuzz_tokenizer}};

/* A file's bytes in a block of just that length, so that a sanitizer sees who reads past it. */
static void replay(fuzz_target *run, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!CHECK(f != NULL) || !CHECK(!fseek(f, 0, SEEK_END))) return;
    size_t n = (size_t)ftell(f);
    uint8_t *bytes = (uint8_t *)test_memory(n, 1), *just = NULL;
    rewind(f);
    CHECK(fread(bytes, 1, n, f) == n);
    fclose(f);
    if (n) just = (uint8_t *)realloc(bytes, n);
    CHECK(run(n ? just : bytes, n) == 0);
    free(n ? just : bytes);
}
static void test_corpus(void) {
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
        char folder[64], path[400];
        snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", targets[i].name);
        DIR *all = opendir(folder);
        size_t n = 0;
        long live = test_live_blocks;
        if (!CHECK(all != NULL)) continue;
        for (struct dirent *entry = readdir(all); entry; entry = readdir(all)) {
            if (entry->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "%s/%.250s", folder, entry->d_name);
            replay(targets[i].run, path);
            n++;
        }
        closedir(all);
        CHECK(n >= 10);
        CHECK(test_live_blocks == live);
    }
}
/* What no corpus needs to hold: nothing at all, and every single byte. */
static void test_short(void) {
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        for (int b = -1; b < 256; b++) {
            uint8_t byte = (uint8_t)b;
            CHECK(targets[i].run(&byte, (size_t)(b >= 0)) == 0);
        }
}

int main(void) {
    RUN(test_corpus);
    RUN(test_short);
    return test_end();
}

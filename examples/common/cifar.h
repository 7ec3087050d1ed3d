// cifar.h - loads CIFAR-10 and makes batches of it.
#ifndef EX_CIFAR_H
#define EX_CIFAR_H

#include "platform.h"

#include "moe.h"

#define CIFAR_SIDE 32
#define CIFAR_PIXELS (CIFAR_SIDE * CIFAR_SIDE)
#define CIFAR_RECORD (1 + 3 * CIFAR_PIXELS) // label, then the red, green and blue planes
#define CIFAR_CLASSES 10

static const char *const cifar_class[CIFAR_CLASSES] = {"airplane", "automobile", "bird",  "cat",  "deer",
                                                       "dog",      "frog",       "horse", "ship", "truck"};

typedef struct cifar_set {
    size_t count;
    unsigned char *records; // (count, CIFAR_RECORD)
} cifar_set;

typedef struct cifar {
    cifar_set train, test;
    int sample; // the small sample of examples/data
} cifar;

// Appends the records of a file, which has so many; ends the program if it is not what it should be.
EX_FUNC void cifar_read(cifar_set *set, const char *path, size_t records) {
    size_t before = set->count;
    FILE *f = fopen(path, "rb");
    if (!f) refuse(path, "cannot be read: %s", strerror(errno));
    for (;;) {
        unsigned char *grown = realloc(set->records, (set->count + 1000) * CIFAR_RECORD);
        if (!grown) die("out of memory for %s", path);
        set->records = grown;
        unsigned char *to = set->records + set->count * CIFAR_RECORD;
        size_t got = fread(to, 1, 1000 * CIFAR_RECORD, f);
        if (ferror(f)) refuse(path, "cannot be read: %s", strerror(errno));
        if (got % CIFAR_RECORD)
            refuse(path, "its size is not a multiple of %d bytes: not CIFAR-10's binary layout", CIFAR_RECORD);
        for (size_t i = 0; i < got; i += CIFAR_RECORD)
            if (to[i] >= CIFAR_CLASSES)
                refuse(path, "record %zu has label %d: not CIFAR-10's binary layout", set->count + i / CIFAR_RECORD,
                       to[i]);
        set->count += got / CIFAR_RECORD;
        if (got < 1000 * CIFAR_RECORD) break;
    }
    fclose(f);
    if (set->count - before != records)
        refuse(path, "holds %zu records of %d bytes, not %zu: cut off, or not CIFAR-10's", set->count - before,
               CIFAR_RECORD, records);
}

// dir: a folder with data_batch_1.bin ... data_batch_5.bin and test_batch.bin (the official binary version), or one
// that has such a folder in it under its usual name. NULL: the sample in examples/data, looked for from the current
// folder and from that of the program (argv0).
EX_FUNC void cifar_load(cifar *c, const char *dir, const char *argv0) {
    char folder[1100], path[1200];
    memset(c, 0, sizeof *c);
    if (dir) {
        static const char *const inside[] = {"", "/cifar-10-batches-bin", "/cifar-10"};
        size_t i = 0;
        for (; i < 3; i++) {
            snprintf(folder, sizeof folder, "%s%s", dir, inside[i]);
            if (file_exists(folder, "data_batch_1.bin")) break;
        }
        if (i == 3)
            refuse(dir, "no CIFAR-10 in it: %s: data_batch_1.bin, nor in a folder cifar-10-batches-bin or cifar-10 "
                        "('make data' downloads it)", strerror(errno));
        for (int b = 1; b <= 5; b++) {
            snprintf(path, sizeof path, "%s/data_batch_%d.bin", folder, b);
            cifar_read(&c->train, path, 10000);
        }
        snprintf(path, sizeof path, "%s/test_batch.bin", folder);
        cifar_read(&c->test, path, 10000);
    } else {
        if (!sample_folder(argv0, "examples/data", "cifar10_train.bin", folder, sizeof folder))
            die("the sample examples/data/cifar10_train.bin was not found: run from the folder of the repository, or "
                "give --data DIR");
        snprintf(path, sizeof path, "%s/cifar10_train.bin", folder);
        cifar_read(&c->train, path, 1000);
        snprintf(path, sizeof path, "%s/cifar10_test.bin", folder);
        cifar_read(&c->test, path, 290);
        c->sample = 1;
    }
}

EX_FUNC void cifar_free(cifar *c) {
    free(c->train.records);
    free(c->test.records);
    memset(c, 0, sizeof *c);
}

// How a batch is made from records.
typedef struct cifar_batch {
    const cifar_set *set;
    const uint32_t *order; // which records, (count); NULL = first, first + 1, ...
    size_t first, count;
    // Augmentation: random shifts by up to `shift` pixels (the border is mirrored), and mirrored images: each image in
    // every second epoch, beginning at random.
    size_t shift;
    int flip;  // 0 = never, 1 = every second epoch, 2 = always
    int moved; // every image by so many pixels down and to the right, besides
    uint64_t seed, epoch;
    float *x;             // out: (count, 32, 32, 3), each channel with mean 0 and variance 1 over the training set
    unsigned char *label; // out: (count)
    float value[3][256];  // private
} cifar_batch;

EX_FUNC void cifar_batch_task(void *arg, size_t i, size_t worker) {
    const cifar_batch *b = arg;
    size_t which = b->order ? b->order[b->first + i] : b->first + i;
    const unsigned char *record = b->set->records + which * CIFAR_RECORD;
    float *x = b->x + i * 3 * CIFAR_PIXELS;
    int dx = -b->moved, dy = dx, flip = b->flip == 2;
    (void)worker;
    if (b->flip == 1) flip = (int)((moe_rand_u32(b->seed, 1000, which) + b->epoch) & 1);
    if (b->shift) {
        uint32_t random = moe_rand_u32(b->seed, 1001 + b->epoch, which), n = 2 * (uint32_t)b->shift + 1;
        dx += (int)(random % n) - (int)b->shift;
        dy += (int)(random / n % n) - (int)b->shift;
    }
    b->label[i] = record[0];
    for (int row = 0; row < CIFAR_SIDE; row++) {
        int sy = abs(row + dy);
        if (sy >= CIFAR_SIDE) sy = 2 * CIFAR_SIDE - 2 - sy;
        for (int col = 0; col < CIFAR_SIDE; col++) {
            int sx = abs((flip ? CIFAR_SIDE - 1 - col : col) + dx);
            if (sx >= CIFAR_SIDE) sx = 2 * CIFAR_SIDE - 2 - sx;
            const unsigned char *pixel = record + 1 + sy * CIFAR_SIDE + sx;
            for (int k = 0; k < 3; k++) *x++ = b->value[k][pixel[k * CIFAR_PIXELS]];
        }
    }
}

EX_FUNC void cifar_batch_make(cifar_batch *b, const moe_parallel *parallel) {
    static const double mean[3] = {0.49140, 0.48216, 0.44653}, deviation[3] = {0.24703, 0.24349, 0.26159};
    for (int k = 0; k < 3; k++)
        for (int v = 0; v < 256; v++) b->value[k][v] = (float)((v / 255.0 - mean[k]) / deviation[k]);
    moe_run(parallel, b->count, cifar_batch_task, b);
}

// A random order of n records for an epoch (Fisher and Yates).
EX_FUNC void cifar_shuffle(uint32_t *order, size_t n, uint64_t seed, uint64_t epoch) {
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    for (size_t i = n; i > 1; i--) {
        size_t j = moe_rand_u32(seed, UINT64_C(1) << 32 | epoch, i) % i;
        uint32_t t = order[i - 1];
        order[i - 1] = order[j];
        order[j] = t;
    }
}

#endif

// mnist.h - loads MNIST: the official IDX files, or the sample of examples/data, whose pictures have 16 shades of grey
// and are run-length coded so that ten thousand fit into less than 2 MB.
//
//     file:  "MNIST4R1", then for each picture its label (one byte) and runs until its 784 pixels are full
//     run:   a byte b below 128: b + 1 black pixels
//            else:               n = b - 127 other pixels in (n + 1) / 2 bytes, the first of each pair in the low half
#ifndef EX_MNIST_H
#define EX_MNIST_H

#include "platform.h"

enum { MNIST_PIXELS = 28 * 28, MNIST_CLASSES = 10 };
#define MNIST_MARK "MNIST4R1"

typedef struct mnist_set {
    size_t count;
    unsigned char *pixel; // (count, MNIST_PIXELS), 0 to 255
    unsigned char *label; // (count)
} mnist_set;

typedef struct mnist {
    mnist_set train, test;
    int sample; // the small sample of examples/data
} mnist;

// The bytes of a whole file; *size of them. NULL: it cannot be opened.
EX_FUNC unsigned char *mnist_file(const char *path, size_t *size) {
    unsigned char *bytes = NULL;
    size_t have = 0, got = 1;
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    for (*size = 0; got; *size += got) {
        if (*size == have) {
            have = have ? 2 * have : (size_t)1 << 20;
            unsigned char *grown = realloc(bytes, have);
            if (!grown) die("out of memory for %s", path);
            bytes = grown;
        }
        got = fread(bytes + *size, 1, have - *size, f);
        if (ferror(f)) refuse(path, "cannot be read: %s", strerror(errno));
    }
    fclose(f);
    return bytes;
}

EX_FUNC void mnist_room(mnist_set *set, size_t count) {
    set->pixel = allocate(count, MNIST_PIXELS);
    set->label = allocate(count, 1);
}

EX_FUNC void mnist_read_sample(mnist_set *set, const char *path) {
    size_t size, mark = strlen(MNIST_MARK);
    unsigned char *bytes = mnist_file(path, &size);
    if (!bytes) refuse(path, "cannot be read: %s", strerror(errno));
    if (size < mark || memcmp(bytes, MNIST_MARK, mark) != 0) refuse(path, "does not begin with %s", MNIST_MARK);
    mnist_room(set, (size - mark) / 8 + 1); // black pictures are the shortest: a label and seven runs
    for (size_t at = mark; at < size; set->count++) {
        unsigned char *to = set->pixel + set->count * MNIST_PIXELS;
        set->label[set->count] = bytes[at++];
        if (set->label[set->count] >= MNIST_CLASSES)
            refuse(path, "picture %zu has label %d", set->count, set->label[set->count]);
        for (size_t done = 0, n; done < MNIST_PIXELS; done += n) {
            unsigned run = at < size ? bytes[at++] : 255;
            n = run < 128 ? run + 1 : run - 127;
            if (n > MNIST_PIXELS - done || (run >= 128 && (n + 1) / 2 > size - at))
                refuse(path, "picture %zu is damaged or cut off", set->count);
            if (run < 128) continue; // black already
            for (size_t k = 0; k < n; k++)
                to[done + k] = (unsigned char)(17 * (k % 2 ? bytes[at + k / 2] >> 4 : bytes[at + k / 2] & 15));
            at += (n + 1) / 2;
        }
    }
    free(bytes);
}

EX_FUNC size_t mnist_number(const unsigned char *at) {
    return (size_t)at[0] << 24 | (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
}

// A pair of official files: PREFIX-images-idx3-ubyte and PREFIX-labels-idx1-ubyte of a folder.
EX_FUNC void mnist_read_idx(mnist_set *set, const char *folder, const char *prefix) {
    char images[1200], labels[1200];
    size_t size, label_size;
    snprintf(images, sizeof images, "%s/%s-images-idx3-ubyte", folder, prefix);
    snprintf(labels, sizeof labels, "%s/%s-labels-idx1-ubyte", folder, prefix);
    unsigned char *pixel = mnist_file(images, &size), *label = pixel ? mnist_file(labels, &label_size) : NULL;
    if (!pixel || !label) refuse(pixel ? labels : images, "cannot be read: %s", strerror(errno));
    if (size < 16 || mnist_number(pixel) != 0x803 || mnist_number(pixel + 8) != 28 || mnist_number(pixel + 12) != 28)
        refuse(images, "not the IDX file of pictures of 28 x 28 bytes");
    set->count = mnist_number(pixel + 4);
    if (set->count == 0 || set->count != (size - 16) / MNIST_PIXELS || (size - 16) % MNIST_PIXELS)
        refuse(images, "says %zu pictures, but holds %zu bytes of them", set->count, size - 16);
    if (label_size < 8 || mnist_number(label) != 0x801 || mnist_number(label + 4) != set->count ||
        label_size != 8 + set->count)
        refuse(labels, "not the labels of the %zu pictures in %s", set->count, images);
    mnist_room(set, set->count);
    memcpy(set->pixel, pixel + 16, set->count * MNIST_PIXELS);
    memcpy(set->label, label + 8, set->count);
    for (size_t i = 0; i < set->count; i++)
        if (set->label[i] >= MNIST_CLASSES) refuse(labels, "label %zu is %d", i, set->label[i]);
    free(pixel);
    free(label);
}

// folder: with the four official files (unzipped), or one that has them in its folder mnist. NULL: the sample in
// examples/data, looked for from the current folder and from that of the program (argv0).
EX_FUNC void mnist_load(mnist *m, const char *folder, const char *argv0) {
    char in[1100], path[1200];
    memset(m, 0, sizeof *m);
    if (folder) {
        snprintf(in, sizeof in, "%s", folder);
        if (!file_exists(in, "train-images-idx3-ubyte")) snprintf(in, sizeof in, "%s/mnist", folder);
        if (!file_exists(in, "train-images-idx3-ubyte"))
            refuse(folder, "no MNIST in it: %s: train-images-idx3-ubyte, which it needs with the other three files, "
                           "unzipped, there or in its folder mnist", strerror(errno));
        mnist_read_idx(&m->train, in, "train");
        mnist_read_idx(&m->test, in, "t10k");
        return;
    }
    if (!sample_folder(argv0, "examples/data", "mnist_train.bin", in, sizeof in))
        die("the sample examples/data/mnist_train.bin was not found: run from the folder of the repository, or give "
            "--data DIR");
    snprintf(path, sizeof path, "%s/mnist_train.bin", in);
    mnist_read_sample(&m->train, path);
    snprintf(path, sizeof path, "%s/mnist_test.bin", in);
    mnist_read_sample(&m->test, path);
    m->sample = 1;
    if (!m->train.count || !m->test.count) refuse(in, "no pictures");
}

EX_FUNC void mnist_free(mnist *m) {
    mnist_set *set[] = {&m->train, &m->test};
    for (int k = 0; k < 2; k++) {
        free(set[k]->pixel);
        free(set[k]->label);
    }
    memset(m, 0, sizeof *m);
}

#endif

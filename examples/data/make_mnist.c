// make_mnist.c - rebuilds mnist_train.bin and mnist_test.bin from the official files (unzipped):
//
//     cc -std=c99 -O2 examples/data/make_mnist.c -o make_mnist && ./make_mnist DIR OUT
//
// In the order of the files a picture is taken while its class still needs one: 1,200 a class for training, 250 for the
// test. A pixel keeps its 16 shades of grey that lie nearest. The layout is in mnist.h.
#include "../common/mnist.h"

static unsigned shade(unsigned char pixel) { return (pixel + 8u) / 17; }

static void encode(FILE *f, const unsigned char *pixel) {
    for (size_t at = 0, n; at < MNIST_PIXELS; at += n) {
        int black = shade(pixel[at]) == 0;
        for (n = 1; n < 128 && at + n < MNIST_PIXELS; n++)
            if ((shade(pixel[at + n]) == 0) != black) break;
        fputc((int)(black ? n - 1 : n + 127), f);
        if (black) continue;
        for (size_t k = 0; k < n; k += 2) {
            unsigned second = k + 1 < n ? shade(pixel[at + k + 1]) : 0;
            fputc((int)(shade(pixel[at + k]) | second << 4), f);
        }
    }
}

static void sample(const mnist_set *set, size_t a_class, const char *folder, const char *name) {
    size_t taken[MNIST_CLASSES] = {0};
    FILE *f = open_output(folder, name);
    fputs(MNIST_MARK, f);
    for (size_t i = 0; i < set->count; i++) {
        if (taken[set->label[i]]++ >= a_class) continue;
        fputc(set->label[i], f);
        encode(f, set->pixel + i * MNIST_PIXELS);
    }
    close_output(f, name);
}

int main(int argc, char **argv) {
    static mnist all;
    if (argc != 3) die("usage: make_mnist DIR OUT");
    mnist_load(&all, argv[1], argv[0]);
    sample(&all.train, 1200, argv[2], "mnist_train.bin");
    sample(&all.test, 250, argv[2], "mnist_test.bin");
    mnist_free(&all);
    return 0;
}

/* npy_near A.npy B.npy X: prints the largest difference of two arrays; 1 unless their shapes are the same and it is at
 * most X. Integers and floats alike. */
#define MOE_IMPLEMENTATION
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static moe_npy read_npy(const char *path) {
    static unsigned char *bytes;
    moe_npy npy = {MOE_DTYPE_NONE};
    FILE *f = fopen(path, "rb");
    size_t room = 64u << 20, size = 0;
    bytes = malloc(room);
    if (f && bytes) size = fread(bytes, 1, room, f);
    if (f) fclose(f);
    if (moe_npy_open(&npy, bytes, size)) fprintf(stderr, "%s: no .npy\n", path), exit(2);
    return npy;
}
static double number(const moe_npy *npy, size_t i) {
    float x = 0;
    int32_t n = 0;
    if (npy->dtype != MOE_DTYPE_I32 && !moe_to_float(npy->dtype, 1, npy->elements + 4 * i, &x)) return (double)x;
    if (npy->dtype == MOE_DTYPE_I32 && !moe_to_index(npy->dtype, 1, npy->elements + 4 * i, &n, NULL)) return n;
    exit(2);
}
int main(int argc, char **argv) {
    double most = 0;
    if (argc != 4) return 2;
    moe_npy a = read_npy(argv[1]), b = read_npy(argv[2]);
    if (a.dtype != b.dtype || a.n_dims != b.n_dims) return puts("not the same type"), 1;
    for (size_t i = 0; i < a.n_dims; i++)
        if (a.dim[i] != b.dim[i]) return puts("not the same shape"), 1;
    for (size_t i = 0; i < a.count; i++) {
        double d = fabs(number(&a, i) - number(&b, i));
        if (!(d <= most)) most = d;
    }
    printf("%g\n", most);
    return !(most <= atof(argv[3]));
}

/* The peers' sgemm, loaded at run time from their shared libraries, so that nothing is linked and their
 * environment can still be chosen: libdnnl (oneDNN) and libopenblas. A library that is not there is skipped. */
#ifndef BENCH_PEERS_H
#define BENCH_PEERS_H

#include "common.h"
#include <dlfcn.h>
#include <sys/wait.h>

/* C (m, n) = op(A) op(B) + beta C, all row-major. */
typedef void peer_gemm(int ta, int tb, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b,
                       size_t ldb, float beta, float *c, size_t ldc);
typedef struct peer_library {
    const char *name;
    peer_gemm *gemm;
} peer_library;

static void *peer_open(const char *const *names)
{
    void *library = NULL;
    for (; library == NULL && *names != NULL; names++) library = dlopen(*names, RTLD_NOW | RTLD_LOCAL);
    return library;
}

/* dlsym gives an object pointer, which ISO C does not convert to a function's. */
static void peer_symbol(void *library, const char *name, void *function_pointer)
{
    void *symbol = dlsym(library, name);
    if (symbol == NULL) bench_die("%s is missing in the peer's library", name);
    memcpy(function_pointer, &symbol, sizeof symbol);
}

/* ---- oneDNN --------------------------------------------------------------------------------- */
static struct {
    int (*sgemm)(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                 const float *b, int64_t ldb, float beta, float *c, int64_t ldc);
} peer_dnnl;

static void peer_dnnl_gemm(int ta, int tb, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b,
                           size_t ldb, float beta, float *c, size_t ldc)
{
    peer_dnnl.sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', (int64_t)m, (int64_t)n, (int64_t)k, 1.0f, a, (int64_t)lda, b,
                    (int64_t)ldb, beta, c, (int64_t)ldc);
}

static int peer_dnnl_load(const bench_options *o, peer_library *out)
{
    static const char *const names[] = {"libdnnl.so.3", "libdnnl.so.2", "libdnnl.so", NULL};
    typedef struct { int major, minor, patch; } version_head;
    const version_head *(*version)(void);
    void *library = peer_open(names);
    if (library == NULL) return 0;
    peer_symbol(library, "dnnl_sgemm", &peer_dnnl.sgemm);
    peer_symbol(library, "dnnl_version", &version);
    fprintf(o->human, "peer onednn: version %d.%d.%d\n", version()->major, version()->minor, version()->patch);
    *out = (peer_library){"onednn", peer_dnnl_gemm};
    return 1;
}

/* ---- OpenBLAS ------------------------------------------------------------------------------- */
enum { PEER_ROW_MAJOR = 101, PEER_NO_TRANS = 111, PEER_TRANS = 112 }; /* of the CBLAS standard */
static struct {
    void (*sgemm)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                  int ldb, float beta, float *c, int ldc);
    char *(*core)(void);
    void (*set_threads)(int n);
} peer_blas;

static void peer_blas_gemm(int ta, int tb, size_t m, size_t n, size_t k, const float *a, size_t lda, const float *b,
                           size_t ldb, float beta, float *c, size_t ldc)
{
    static size_t threads;
    if (threads != bench_threads) peer_blas.set_threads((int)(threads = bench_threads));
    peer_blas.sgemm(PEER_ROW_MAJOR, ta ? PEER_TRANS : PEER_NO_TRANS, tb ? PEER_TRANS : PEER_NO_TRANS, (int)m, (int)n,
                    (int)k, 1.0f, a, (int)lda, b, (int)ldb, beta, c, (int)ldc);
}

static int peer_blas_open(void)
{
    static const char *const names[] = {"libopenblas.so.0", "libopenblas.so", NULL};
    void *library = peer_open(names);
    if (library == NULL) return 0;
    peer_symbol(library, "cblas_sgemm", &peer_blas.sgemm);
    peer_symbol(library, "openblas_get_corename", &peer_blas.core);
    peer_symbol(library, "openblas_set_num_threads", &peer_blas.set_threads);
    return 1;
}

/* GFLOP/s of OpenBLAS, one thread, in a process of its own with this OPENBLAS_CORETYPE (NULL: as the environment is);
 * 0 if it does not run. OpenBLAS knows only the processors of its day and takes old kernels for newer ones. */
static double peer_blas_try(const char *core)
{
    enum { N = 512 };
    int fd[2];
    double rate = 0;
    fflush(NULL);
    if (pipe(fd) != 0) return 0;
    pid_t child = fork();
    if (child == 0) {
        if (core) setenv("OPENBLAS_CORETYPE", core, 1);
        if (!peer_blas_open()) _exit(1);
        float *a = bench_floats(3 * N * N);
        for (size_t i = 0; i < 3 * N * N; i++) a[i] = (float)(i % 7) - 3;
        peer_blas.set_threads(1);
        for (int run = 0; run < 12; run++) {
            double start = bench_now();
            peer_blas.sgemm(PEER_ROW_MAJOR, PEER_NO_TRANS, PEER_NO_TRANS, N, N, N, 1.0f, a, N, a + N * N, N, 0.0f,
                            a + 2 * N * N, N);
            double r = 2e-9 * N * N * N / (bench_now() - start);
            if (r > rate) rate = r;
        }
        _exit(write(fd[1], &rate, sizeof rate) != (ssize_t)sizeof rate);
    }
    close(fd[1]);
    if (child < 0 || read(fd[0], &rate, sizeof rate) != (ssize_t)sizeof rate) rate = 0;
    close(fd[0]);
    if (child > 0) waitpid(child, NULL, 0);
    return rate;
}

static int peer_blas_load(const bench_options *o, peer_library *out)
{
    static const char *const cores[] = {NULL, "SAPPHIRERAPIDS", "COOPERLAKE", "SKYLAKEX", "HASWELL", "ZEN"};
    const size_t n_cores = sizeof cores / sizeof cores[0];
    double given = 0, best = 0;
    const char *core = NULL;
    for (size_t i = 0; i < n_cores; i++) {
        double rate = peer_blas_try(cores[i]);
        if (i == 0) given = best = rate;
        if (rate == 0 && i == 0) break; /* not installed */
        if (rate > 1.1 * best) best = rate, core = cores[i];
    }
    if (given == 0) return 0;
    if (core) setenv("OPENBLAS_CORETYPE", core, 1);
    if (!peer_blas_open()) return 0;
    fprintf(o->human, "peer openblas: kernels %s, %.0f GFLOP/s", peer_blas.core(), best);
    if (core) fprintf(o->human, " (OPENBLAS_CORETYPE=%s set here; %.0f without)", core, given);
    fputc('\n', o->human);
    *out = (peer_library){"openblas", peer_blas_gemm};
    return 1;
}

/* Call it before the first parallel region: it forks. Returns how many of the peers asked for are there. */
static size_t peer_load(const bench_options *o, peer_library out[BENCH_MAX_PEERS])
{
    static int (*const load[])(const bench_options *, peer_library *) = {peer_dnnl_load, peer_blas_load};
    static const char *const package[] = {"libdnnl-dev", "libopenblas-dev"};
    size_t n = 0;
#ifndef _OPENMP
    setenv("OMP_NUM_THREADS", "1", 1); /* the peers as serial as the rest */
#endif
    for (size_t i = 0; i < 2; i++) {
        if (!bench_listed(o->peers, bench_peer_names[i])) continue;
        if (load[i](o, &out[n])) n++;
        else fprintf(o->human, "peer %s: not installed (Debian package %s)\n", bench_peer_names[i], package[i]);
    }
    return n;
}

#endif

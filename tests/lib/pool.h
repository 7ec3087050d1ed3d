/* pool.h - threads that stay and wait for work: a moe_parallel of so many. Include test.h first.
 *
 *     pool p;
 *     pool_start(&p, 32);
 *     desc.parallel = pool_parallel(&p);
 *     pool_stop(&p);
 */
#ifndef POOL_H
#define POOL_H

#include <pthread.h>

enum { POOL_MOST = 32 };
typedef struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t thread[POOL_MOST];
    size_t n_threads, n_workers, n_tasks, next, busy, calls, started; /* n_workers of the threads work on this call */
    int stop;
    moe_task *task;
    void *arg;
} pool;

static void *pool_work(void *user) {
    pool *p = (pool *)user;
    size_t seen = 0;
    pthread_mutex_lock(&p->lock);
    for (size_t worker = p->started++;;) {
        while (p->calls == seen && !p->stop) pthread_cond_wait(&p->work, &p->lock);
        if (p->stop) break;
        seen = p->calls;
        if (worker >= p->n_workers) continue;
        while (p->next < p->n_tasks) {
            size_t i = p->next++;
            pthread_mutex_unlock(&p->lock);
            p->task(p->arg, i, worker);
            pthread_mutex_lock(&p->lock);
        }
        if (--p->busy == 0) pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

static void pool_run(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg) {
    pool *p = (pool *)user;
    pthread_mutex_lock(&p->lock);
    p->n_workers = n_threads < p->n_threads ? n_threads : p->n_threads;
    p->n_tasks = n_tasks, p->task = task, p->arg = arg;
    p->next = 0, p->busy = p->n_workers, p->calls++;
    pthread_cond_broadcast(&p->work);
    while (p->busy > 0) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static inline void pool_start(pool *p, size_t n_threads) {
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->lock, NULL), pthread_cond_init(&p->work, NULL), pthread_cond_init(&p->done, NULL);
    p->n_threads = n_threads;
    for (size_t i = 0; i < n_threads; i++)
        if (pthread_create(&p->thread[i], NULL, pool_work, p) != 0) abort();
}
static inline void pool_stop(pool *p) {
    pthread_mutex_lock(&p->lock);
    p->stop = 1;
    pthread_cond_broadcast(&p->work);
    pthread_mutex_unlock(&p->lock);
    for (size_t i = 0; i < p->n_threads; i++) pthread_join(p->thread[i], NULL);
    pthread_cond_destroy(&p->done), pthread_cond_destroy(&p->work), pthread_mutex_destroy(&p->lock);
}
static inline moe_parallel pool_parallel(pool *p) {
    moe_parallel parallel;
    memset(&parallel, 0, sizeof parallel);
    parallel.run = pool_run, parallel.user = p, parallel.n_threads = p->n_threads;
    return parallel;
}

#endif

/* Work on several threads at the same time, by OpenMP where libgomp is there and by a pool of our own elsewhere. */
#include "threads.h"

#ifdef _OPENMP
#include <omp.h>

void on_threads(int n, Work *work, void *context) {
#pragma omp parallel num_threads(n)
    work(context, omp_get_thread_num(), omp_get_num_threads());
}

#else
#include <pthread.h>

/* Threads sleep between two calls of `on_threads`. The caller is thread 0, and who calls meanwhile waits. */
static struct {
    pthread_mutex_t call; /* held through a call */
    pthread_mutex_t lock; /* of all below */
    pthread_cond_t begin, end;
    int n_started, n_wanted, n_running; /* besides the caller */
    unsigned call_number;
    Work *work;
    void *context;
} pool = {.call = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .begin = PTHREAD_COND_INITIALIZER, .end = PTHREAD_COND_INITIALIZER};

static void *wait_for_work(void *number) {
    const int thread = (int)(intptr_t)number;
    unsigned seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.call_number == seen) pthread_cond_wait(&pool.begin, &pool.lock);
        seen = pool.call_number;
        if (thread > pool.n_wanted) continue;
        Work *const work = pool.work;
        void *const context = pool.context;
        const int n = pool.n_wanted + 1;
        pthread_mutex_unlock(&pool.lock);
        work(context, thread, n);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.n_running) pthread_cond_signal(&pool.end);
    }
    return NULL;
}

/* A process that was forked has the pool's memory and none of its threads. */
static void forget(void) {
    pool.n_started = pool.n_running = 0, pool.call_number = 0;
    pthread_mutex_init(&pool.call, NULL), pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.begin, NULL), pthread_cond_init(&pool.end, NULL);
}

static void forget_when_forked(void) { pthread_atfork(NULL, NULL, forget); }

void on_threads(int n, Work *work, void *context) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, forget_when_forked);
    pthread_mutex_lock(&pool.call);
    pthread_mutex_lock(&pool.lock);
    for (pthread_t made; pool.n_started < n - 1; pool.n_started++) {
        /* A thread that begins now must see this call: its number grows below, before the lock is let go. */
        if (pthread_create(&made, NULL, wait_for_work, (void *)(intptr_t)(pool.n_started + 1))) break;
        pthread_detach(made);
    }
    pool.n_wanted = pool.n_running = n - 1 < pool.n_started ? n - 1 : pool.n_started;
    pool.work = work, pool.context = context, pool.call_number++;
    const int all = pool.n_wanted + 1;
    pthread_cond_broadcast(&pool.begin);
    pthread_mutex_unlock(&pool.lock);
    work(context, 0, all);
    pthread_mutex_lock(&pool.lock);
    while (pool.n_running) pthread_cond_wait(&pool.end, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.call);
}

#endif

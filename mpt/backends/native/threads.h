/* The threads of a step: started together, a barrier, and loops shared out.
 *
 * Where the compiler makes calls of libgomp they are OpenMP's, from the pool that torch uses too; elsewhere they are a
 * pool of our own (threads.c). The barrier and the loops are always our own: libgomp puts threads to sleep at its
 * barriers as soon as a process has more threads than cores, idle ones included. Waking one takes longer than most
 * parts of a step: 10 ms a step instead of 6 where a second thread of the process had used torch.
 */
#pragma once
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

/* Call work(context, thread, n) on n threads, or on fewer, at the same time; n is how many there are. */
typedef void Work(void *context, int thread, int n);
void on_threads(int n, Work *work, void *context);

typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
} Team;

typedef struct {
    Team *team;
    atomic_int *queue; /* how many turns of the current loop are taken; a cache line for each loop of the step */
    int thread, n;     /* this thread, of how many */
} Worker;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* as long as x86's pause; `yield` does nothing on most processors */
#endif
}

/* A barrier: return when all threads have called it. It spins for some 100 us, then yields the core at each turn. */
static inline void wait_for_all(Worker *worker) {
    Team *team = worker->team;
    const int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == worker->n - 1) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->round, round + 1);
        return;
    }
    for (int spins = 0; atomic_load(&team->round) == round; spins++) {
        if (spins < 4000)
            relax();
        else
            sched_yield();
    }
}

/* Loops whose turns the threads take as they become free: `take` takes the next n turns and returns the first of them.
 * Every thread calls `end_loop` when nothing is left, which moves it to the counter of the next loop. */
static inline int take(Worker *worker, int n) { return atomic_fetch_add(worker->queue, n); }
static inline void end_loop(Worker *worker) { worker->queue += 16; }

/* Where this thread's equal part of 0..n begins (which = 0) and ends (which = 1), in multiples of `step`. */
static inline int part(const Worker *worker, int n, int step, int which) {
    return (int)((int64_t)(n / step) * (worker->thread + which) / worker->n) * step;
}

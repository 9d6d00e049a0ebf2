/* Read bandwidth: how fast pinned threads sum memory that they only read.

   The reading half of STREAM (McCalpin 1995), independent of hasten: every thread owns a slice of memory, which it
   wrote first itself, and sums it over and over with vector registers. Pages are those that any program gets.

       cc -O3 -march=native -pthread stream.c -o stream
       echo "67108864 0.05" | ./stream 2 1073741824

   Arguments: threads, and the largest working set in bytes. One line in (a working set in bytes and how many seconds
   to read it), one line out (bytes per second, the share of its core that the worst-off thread had, the sum), so that
   another program can take turns with it. */

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LANES = 8, REGISTERS = 8, MOST_THREADS = 1024 };
static const size_t LARGE_PAGE = 2 << 20, LOOK_AT_CLOCK = 4 << 20;
typedef uint64_t vector __attribute__((vector_size(8 * LANES)));

static struct slice {
    pthread_t thread;
    int core;
    vector *data;
    size_t vectors, passes;
    double begun, ended, own;
    uint64_t sum;
} slices[MOST_THREADS];
static pthread_barrier_t gate;
static size_t largest_slice;
static double seconds;

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static uint64_t sum(const vector *data, size_t vectors) {
    vector sums[REGISTERS] = {{0}};
    for (size_t i = 0; i < vectors; i += REGISTERS)
        for (int r = 0; r < REGISTERS; r++) sums[r] += data[i + r];
    uint64_t total = 0;
    for (int r = 0; r < REGISTERS; r++)
        for (int lane = 0; lane < LANES; lane++) total += sums[r][lane];
    return total;
}

static void *reader(void *argument) {
    struct slice *s = argument;
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(s->core, &cores);
    pthread_setaffinity_np(pthread_self(), sizeof cores, &cores);
    if (!s->data) {
        if (posix_memalign((void **)&s->data, LARGE_PAGE, largest_slice)) exit(1);
        memset(s->data, 1, largest_slice);
    }
    size_t bytes = s->vectors * sizeof(vector);
    s->sum = sum(s->data, s->vectors); /* into the cache, if it fits one */
    s->passes = 0;
    pthread_barrier_wait(&gate);
    s->begun = s->ended = now(CLOCK_MONOTONIC);
    s->own = now(CLOCK_THREAD_CPUTIME_ID);
    while (s->ended - s->begun < seconds) {
        for (size_t done = 0; done < LOOK_AT_CLOCK; done += bytes, s->passes++) s->sum += sum(s->data, s->vectors);
        s->ended = now(CLOCK_MONOTONIC);
    }
    s->own = now(CLOCK_THREAD_CPUTIME_ID) - s->own;
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    int threads = atoi(arguments[1]), cores[CPU_SETSIZE], found = 0;
    size_t largest = strtoull(arguments[2], NULL, 10), working_set, block = sizeof(vector) * REGISTERS;
    if (threads < 1 || threads > MOST_THREADS) return 2;
    largest_slice = largest / threads / block * block;
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &allowed)) cores[found++] = core;
    pthread_barrier_init(&gate, NULL, threads);
    while (scanf("%zu %lf", &working_set, &seconds) == 2) {
        if (working_set > largest || working_set < threads * block) return 2;
        for (int i = 0; i < threads; i++) {
            slices[i].core = cores[i % found];
            slices[i].vectors = working_set / threads / block * REGISTERS;
            if (pthread_create(&slices[i].thread, NULL, reader, &slices[i])) return 1;
        }
        double rate = 0, least = 1;
        uint64_t total = 0;
        for (int i = 0; i < threads; i++) {
            struct slice *s = &slices[i];
            pthread_join(s->thread, NULL);
            double elapsed = s->ended - s->begun;
            rate += (double)s->passes * s->vectors * sizeof(vector) / elapsed;
            if (s->own / elapsed < least) least = s->own / elapsed;
            total += s->sum; /* printed, so that the compiler cannot leave the reading out */
        }
        printf("%.6e %.4f %llu\n", rate, least, (unsigned long long)total);
        fflush(stdout);
    }
    return 0;
}

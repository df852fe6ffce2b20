/* Counters of a process: by kind, and launches by kernel and library calls by name. */
#include "counters.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_SIZE (1 << 18) /* a power of two; torch registers some 60,000 kernels */

struct entry {
    const void *key; /* a kernel's host function, or the text of a name */
    const char *name;
    long count;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct entry table[TABLE_SIZE];
static long counts[NUM_COUNTERS];

/* The entry of a key, a new one if there is none; call it with the mutex. */
static struct entry *find(const void *key, const char *name)
{
    unsigned long slot = ((unsigned long)key * 0x9E3779B97F4A7C15ul) >> 46;
    while (table[slot].key && table[slot].key != key)
        slot = (slot + 1) & (TABLE_SIZE - 1);
    if (!table[slot].key) {
        table[slot].key = key;
        table[slot].name = name;
    }
    return &table[slot];
}

void null_count(enum counter counter)
{
    __atomic_add_fetch(&counts[counter], 1, __ATOMIC_RELAXED);
}

void null_name_kernel(const void *function, const char *name)
{
    pthread_mutex_lock(&mutex);
    find(function, name)->name = name;
    pthread_mutex_unlock(&mutex);
}

void null_count_kernel(const void *function)
{
    null_count(LAUNCHES);
    pthread_mutex_lock(&mutex);
    find(function, "unnamed")->count++;
    pthread_mutex_unlock(&mutex);
}

void null_count_call(const char *name)
{
    null_count(LIBRARY_CALLS);
    pthread_mutex_lock(&mutex);
    find(name, name)->count++;
    pthread_mutex_unlock(&mutex);
}

void null_read(long *into)
{
    memcpy(into, counts, sizeof counts);
}

void null_reset(void)
{
    pthread_mutex_lock(&mutex);
    memset(counts, 0, sizeof counts);
    for (int slot = 0; slot < TABLE_SIZE; slot++)
        table[slot].count = 0;
    pthread_mutex_unlock(&mutex);
}

/* One line for each kernel and call: count, tab, name. */
int null_write(const char *path)
{
    FILE *file = fopen(path, "w");
    if (!file)
        return -1;
    pthread_mutex_lock(&mutex);
    for (int slot = 0; slot < TABLE_SIZE; slot++)
        if (table[slot].count)
            fprintf(file, "%ld\t%s\n", table[slot].count, table[slot].name);
    pthread_mutex_unlock(&mutex);
    return fclose(file);
}

/* What the null device counts; read from Python through ctypes (device.py). */
#ifndef NULL_GPU_COUNTERS_H
#define NULL_GPU_COUNTERS_H

/* The order is that of COUNTERS in device.py. */
enum counter {
    LAUNCHES,
    COPIES_TO_DEVICE,
    COPIES_TO_HOST,
    COPIES_ON_DEVICE,
    MEMSETS,
    STREAM_SYNCS,
    DEVICE_SYNCS,
    EVENT_SYNCS,
    ALLOCATIONS,
    LIBRARY_CALLS, /* cuBLAS, cuSOLVER, NCCL: each is a launch or more on a real device */
    NUM_COUNTERS
};

void null_count(enum counter counter);
void null_name_kernel(const void *function, const char *name);
void null_count_kernel(const void *function);
void null_count_call(const char *name);

#endif

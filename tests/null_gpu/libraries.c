/* What torch reads from cuBLAS, cuSOLVER and NCCL; every other function of theirs is a counted stub
 * that build.py writes. */
#include <stdlib.h>
#include <string.h>

#include "counters.h"

static int make(void **handle)
{
    *handle = malloc(64);
    return 0;
}

int cublasCreate_v2(void **handle) { return make(handle); }
int cublasLtCreate(void **handle) { return make(handle); }
int cusolverDnCreate(void **handle) { return make(handle); }
int cublasLtMatmulDescCreate(void **handle, int compute, int scale) { return make(handle); }
int cublasLtMatmulPreferenceCreate(void **handle) { return make(handle); }

int cublasLtMatrixLayoutCreate(void **handle, int type, unsigned long rows, unsigned long columns,
                               long stride)
{
    return make(handle);
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int requested, void *results, int *found)
{
    *found = 1;
    return 0;
}

const char *cublasGetStatusString(int status) { return "null GPU"; }

int cublasGetMathMode(void *handle, int *mode)
{
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode)
{
    *mode = 0;
    return 0;
}

/* ---- NCCL ---- */

int ncclGetVersion(int *version)
{
    *version = 22907;
    return 0;
}

const char *ncclGetErrorString(int error) { return "null GPU"; }
const char *ncclGetLastError(void *communicator) { return "null GPU"; }

int ncclGetUniqueId(void *id)
{
    memset(id, 0, 128);
    return 0;
}

int ncclCommInitRank(void **communicator, int ranks) { return make(communicator); }
int ncclCommInitRankConfig(void **communicator, int ranks) { return make(communicator); }
int ncclCommInitRankScalable(void **communicator, int ranks) { return make(communicator); }

int ncclCommSplit(void *communicator, int color, int key, void **made, void *config)
{
    return make(made);
}

int ncclCommGetAsyncError(void *communicator, int *error)
{
    *error = 0;
    return 0;
}

int ncclCommCount(void *communicator, int *count)
{
    *count = 1;
    return 0;
}

int ncclCommUserRank(void *communicator, int *rank)
{
    *rank = 0;
    return 0;
}

int ncclCommCuDevice(void *communicator, int *device)
{
    *device = 0;
    return 0;
}

int ncclMemAlloc(void **pointer, size_t size)
{
    *pointer = malloc(size);
    return 0;
}

#define LARGEST_COPY (4 << 20)
static const int TYPE_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

/* The part of this rank, taken for that of all. */
static int collect(const char *name, const void *source, void *target, size_t count, int type)
{
    size_t size = count * TYPE_BYTES[type];
    null_count_call(name);
    if (source != target && size <= LARGEST_COPY)
        memmove(target, source, size);
    return 0;
}

#define COLLECTIVE(name)                                                                           \
    int name(const void *source, void *target, size_t count, int type)                             \
    {                                                                                              \
        return collect(#name, source, target, count, type);                                        \
    }
COLLECTIVE(ncclAllGather)
COLLECTIVE(ncclAllReduce)
COLLECTIVE(ncclReduceScatter)
COLLECTIVE(ncclBroadcast)
COLLECTIVE(ncclReduce)

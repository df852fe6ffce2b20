/* What torch reads from cuBLAS, cuSOLVER and NCCL; every other function of theirs is a counted stub
 * that build.py writes. */
#include <stdlib.h>
#include <string.h>

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

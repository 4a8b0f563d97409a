/* libcuda as far as the C++ node's launches need it, for test_native_launches.py: it prints what it is asked to do. Kernel
 * 13 does not launch. */
#include <stdio.h>

static void* context = NULL;

int cuCtxGetCurrent(void** found) { *found = context; return 0; }
int cuDeviceGet(int* handle, int device) { *handle = device; return 0; }
int cuDevicePrimaryCtxRetain(void** found, int handle) { *found = &context; printf("retain\n"); return 0; }
int cuCtxSetCurrent(void* given) { context = given; return 0; }
int cuGetErrorName(int error, const char** name) { *name = "CUDA_ERROR_OF_A_TEST"; return 0; }

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
  printf("launch %d grid %u %u %u block %u %u %u shared %u stream %d first %#lx rows %d\n", (int)(long)function, x, y, z,
         threads, by, bz, shared, stream != NULL, *(unsigned long*)arguments[0], *(int*)arguments[3]);
  fflush(stdout);
  return (long)function == 13 ? 700 : 0;
}

/* Stands in for NVIDIA's driver: it notes which processes begin to use CUDA, and says that there is no GPU. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NO_DEVICE = 100, NEWEST = 99000 };

int cuInit(unsigned flags) {
    char name[64] = "";
    FILE *own = fopen("/proc/self/comm", "r"), *log = fopen(getenv("CUDA_USERS"), "a");
    fgets(name, sizeof name, own);
    fputs(name, log);
    fclose(own);
    fclose(log);
    return NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    *version = NEWEST;
    return SUCCESS;
}

static int anything_else(void) { return NO_DEVICE; }

/* CUDA's runtime asks for each function by its name. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *found) {
    *function = (void *)anything_else;
    if (!strcmp(name, "cuInit")) *function = (void *)cuInit;
    if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)cuDriverGetVersion;
    if (!strcmp(name, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    if (found) *found = 0;
    return SUCCESS;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

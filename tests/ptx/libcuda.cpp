// A libcuda that records: Triton's host path runs on it without a GPU. CMake builds it for driver.py.
#include <cstddef>
#include <cstdint>

using Launched = void (*)(uint64_t function, uint32_t grid, uint32_t threads, uint32_t shared, void** parameters);
using Described = int (*)(void* out, int kind, uint32_t rank, uint64_t address, const uint64_t* dims,
                          const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                          int swizzle);

static Launched on_launch;
static Described on_describe;
static uint64_t handles = 0x1000;
static constexpr int SUCCESS = 0;

struct Config {  // CUlaunchConfig
    uint32_t grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void* stream;
    void* attributes;
    uint32_t attribute_count;
};

// Limits of an H100, by CUdevice_attribute.
static int attribute(int which) {
    switch (which) {
        case 8: return 49152;     // shared memory of a block
        case 10: return 32;       // lanes of a warp
        case 12: return 65536;    // registers of a block
        case 16: return 132;      // multiprocessors
        case 81: return 233472;   // shared memory of a multiprocessor
        case 97: return 232448;   // shared memory of a block that asks for it
        default: return 1000;
    }
}

extern "C" {
void record(Launched launched, Described described) { on_launch = launched; on_describe = described; }

int cuCtxGetCurrent(void** context) { *context = &handles; return SUCCESS; }
int cuCtxSetCurrent(void*) { return SUCCESS; }
int cuCtxGetDevice(int* device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t* value, int) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int, size_t) { return SUCCESS; }
int cuDeviceGet(int* device, int) { *device = 0; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &handles; return SUCCESS; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = attribute(which); return SUCCESS; }
int cuFuncGetAttribute(int* value, int which, uint64_t) { *value = which == 0 ? 1024 : 0; return SUCCESS; }
int cuFuncSetAttribute(uint64_t, int, int) { return SUCCESS; }
int cuFuncSetCacheConfig(uint64_t, int) { return SUCCESS; }
int cuDriverGetVersion(int* version) { *version = 12080; return SUCCESS; }
int cuGetErrorString(int, const char** text) { *text = "an error of the recording libcuda"; return SUCCESS; }
int cuModuleLoadData(void** module, const void*) { *module = reinterpret_cast<void*>(handles += 16); return SUCCESS; }
int cuModuleGetFunction(uint64_t* function, void*, const char*) { *function = (handles += 16); return SUCCESS; }
int cuModuleUnload(void*) { return SUCCESS; }
int cuPointerGetAttribute(uint64_t* out, int, uint64_t pointer) { *out = pointer; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int* count, uint64_t, const void*) { *count = 1; return SUCCESS; }

int cuTensorMapEncodeTiled(void* out, int kind, uint32_t rank, void* address, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int /* l2 promotion */, int /* fill */) {
    return on_describe(out, kind, rank, reinterpret_cast<uint64_t>(address), dims, strides, box, steps, interleave,
                       swizzle);
}

int cuLaunchKernelEx(const Config* config, uint64_t function, void** parameters, void**) {
    on_launch(function, config->grid_x * config->grid_y * config->grid_z, config->block_x, config->shared, parameters);
    return SUCCESS;
}
}

// The twin for a compiler that tells host and device apart: clang, as if for CUDA. A test lets it look
// at who calls whom; nothing runs. The twin itself belongs to both sides, by force.
#pragma once

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))

// What the twin includes is the host's.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#pragma clang force_cuda_host_device begin
#include "../kernel_operator.h"
#pragma clang force_cuda_host_device end

#undef __aicore__
#undef __global__
#define __aicore__ __device__
#define __host_aicore__ __host__ __device__
#define __global__ __attribute__((global))

// What `kernel<<<blocks, nullptr, stream>>>` takes.
extern "C" int cudaConfigureCall(uint32_t blocks, void* l2, void* stream);
extern "C" int __cudaPushCallConfiguration(uint32_t blocks, void* l2, void* stream);

// The host twin: the part of the public Ascend C interface that the kernels use, on a CPU.
//
// It has the name of CANN's header, so the same kernel source compiles against either. Written from
// the public documentation; it contains nothing of CANN.
#pragma once

#include "copy.h"
#include "cube.h"
#include "machine.h"
#include "number.h"
#include "sync.h"
#include "tensor.h"
#include "vector.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*
#define ASCEND_IS_AIC (::twin::cube())
#define ASCEND_IS_AIV (!::twin::cube())
#define __vector__
#define __mix__(cube, vector)

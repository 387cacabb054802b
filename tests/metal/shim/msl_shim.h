// Enough of the Metal standard library to run compute kernels on a CPU, in two dialects of clang: plain C++17 and
// "C++ for OpenCL". Not covered: textures, float matrices, packed vectors of 3, tensor operations.
#pragma once
#include "msl_types.h"
#include "msl_traits.h"
#include "msl_vector.h"
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
#include "msl_mlx.h"
#include "msl_entry.h"

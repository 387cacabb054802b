// Words and types of MSL, for clang on a CPU.
//
// Address spaces stay types, so that a pointer to the wrong one does not compile. The opencl_* attributes are used
// and not address_space(n), because on x86 they become address space 0 and the memory checker still sees the access.
#pragma once
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __HAVE_BFLOAT__ 1

#ifdef __OPENCL_CPP_VERSION__
// "C++ for OpenCL": the second opinion. It also copies classes between address spaces, which plain C++ cannot.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define device __global
#define threadgroup __local
#define constant const __constant
#define __MSL_CONSTANT_SPACE __constant
// Keywords of OpenCL that are ordinary names in MSL.
#define atomic_int __msl_atomic_int
#define atomic_uint __msl_atomic_uint
#define atomic_float __msl_atomic_float
#define atomic_ulong __msl_atomic_ulong
#define atomic_bool __msl_atomic_bool
#define memory_order __msl_memory_order
#define memory_order_relaxed __msl_memory_order_relaxed
#define memory_order_seq_cst __msl_memory_order_seq_cst
#else
#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
// `constant` implies const in MSL: MLX passes `const constant int&` to `constant int&`.
#define constant const __attribute__((opencl_constant))
#define __MSL_CONSTANT_SPACE
typedef _Float16 half;
#endif

#define thread
#define kernel
#define double __msl_no_double_in_metal
#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST static constant constexpr const
#define METAL_ASM(...)
#define coherent(x)
#define ray_data object_data_not_supported
#define __METAL_MAYBE_FAST_MATH__ false
#define __METAL_FAST_MATH__ true
#define __METAL_PRECISE_MATH__ false
// Without debug information of its own, the code of an inlined function gets the line it is called from.
#define __MSL_INLINE inline __attribute__((always_inline, nodebug))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef __bf16 bfloat;

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define HUGE_VALF INFINITY
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define HALF_MAX ((half)65504.0f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define UCHAR_MAX 255
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_H ((half)M_PI_F)
#define M_PI_2_F 1.57079632679489661923132169163975144f
#define M_1_PI_F 0.318309886183790671537767526745028724f
#define M_2_SQRTPI_F 1.12837916709551257389615890312154517f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f

// Native vectors of clang give swizzles and elementwise operators. A vector of bool is one of char.
#define __MSL_VECTOR(T, name, n) typedef T name##n __attribute__((ext_vector_type(n)));
#define __MSL_VECTORS(T, name) __MSL_VECTOR(T, name, 2) __MSL_VECTOR(T, name, 3) __MSL_VECTOR(T, name, 4)
#define __MSL_PACKED(T, n) typedef T packed_##T##n __attribute__((ext_vector_type(n), aligned(sizeof(T))));
#define __MSL_INTEGERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)
#define __MSL_SCALARS(M) __MSL_INTEGERS(M) M(half) M(float) M(bfloat)
#define __MSL_DECLARE(T) __MSL_VECTORS(T, T) __MSL_PACKED(T, 2) __MSL_PACKED(T, 4)
__MSL_SCALARS(__MSL_DECLARE)
__MSL_VECTORS(char, bool)

// `metal::float4` is the same type.
namespace metal {
#define __MSL_EXPORT(T) using ::T##2; using ::T##3; using ::T##4;
__MSL_SCALARS(__MSL_EXPORT) __MSL_EXPORT(bool)
}

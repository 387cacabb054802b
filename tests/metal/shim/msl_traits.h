// <type_traits> and <limits> of MSL.
#pragma once

namespace metal {
template <class T, T v>
struct integral_constant {
    static constexpr constant T value = v;
    typedef T value_type;
    typedef integral_constant type;
    constexpr operator T() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class... B> struct _disjunction : false_type {};
template <class B, class... R> struct _disjunction<B, R...> : bool_constant<B::value || _disjunction<R...>::value> {};

template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr constant bool is_same_v = is_same<A, B>::value;

template <class T> struct remove_const { typedef T type; };
template <class T> struct remove_const<const T> { typedef T type; };
template <class T> struct remove_volatile { typedef T type; };
template <class T> struct remove_volatile<volatile T> { typedef T type; };
template <class T> struct remove_reference { typedef T type; };
template <class T> struct remove_reference<T&> { typedef T type; };
template <class T> struct remove_reference<device T&> { typedef T type; };
template <class T> struct remove_reference<threadgroup T&> { typedef T type; };
template <class T> struct remove_reference<constant T&> { typedef T type; };
template <class T> struct remove_addrspace { typedef T type; };
template <class T> struct remove_addrspace<device T> { typedef T type; };
template <class T> struct remove_addrspace<threadgroup T> { typedef T type; };
template <class T> struct remove_addrspace<constant T> { typedef T type; };
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_cv {
    typedef typename remove_volatile<typename remove_const<remove_addrspace_t<T>>::type>::type type;
};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;

template <class T> struct __is_integer : false_type {};
#define M(T) template <> struct __is_integer<T> : true_type {};
__MSL_INTEGERS(M) M(bool) M(signed char)
#undef M
template <class T> struct is_integral : bool_constant<__is_integer<remove_cv_t<T>>::value> {};
template <class T> constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T> struct __is_float : false_type {};
template <> struct __is_float<float> : true_type {};
template <> struct __is_float<half> : true_type {};
template <> struct __is_float<bfloat> : true_type {};
template <class T> struct is_floating_point : bool_constant<__is_float<remove_cv_t<T>>::value> {};
template <class T> constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T> struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T> constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T> struct is_signed : bool_constant<__is_signed(T)> {};
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T> constexpr constant bool is_signed_v = __is_signed(T);
template <class T> constexpr constant bool is_unsigned_v = __is_unsigned(T);
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B> constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class T> struct is_pointer : false_type {};
template <class T> struct is_pointer<T*> : true_type {};
template <class T> struct is_pointer<device T*> : true_type {};
template <class T> struct is_pointer<threadgroup T*> : true_type {};
template <class T> struct is_pointer<constant T*> : true_type {};

template <class T> struct make_unsigned;
template <> struct make_unsigned<char> { typedef uchar type; };
template <> struct make_unsigned<short> { typedef ushort type; };
template <> struct make_unsigned<int> { typedef uint type; };
template <> struct make_unsigned<long> { typedef ulong type; };

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T, size_t N>
struct array {
    T __d[N];
    constexpr T operator[](size_t i) const { return __d[i]; }
    thread T& operator[](size_t i) { return __d[i]; }
    constexpr size_t size() const { return N; }
};
template <class T> using uniform = T;
template <class T> __MSL_INLINE constexpr T make_uniform(T x) { return x; }

template <class T> struct numeric_limits;
#define M(T, lowest_value, max_value)                                         \
    template <> struct numeric_limits<T> {                                    \
        static constexpr constant bool is_integer = true;                     \
        static constexpr constant int digits = sizeof(T) * 8 - __is_signed(T); \
        static constexpr T max() { return max_value; }                        \
        static constexpr T min() { return lowest_value; }                     \
        static constexpr T lowest() { return lowest_value; }                  \
        static constexpr T infinity() { return 0; }                           \
    };
M(bool, 0, 1)
M(char, -128, 127)
M(int8_t, -128, 127)
M(uchar, 0, 255)
M(short, -32768, 32767)
M(ushort, 0, 65535)
M(int, INT_MIN, INT_MAX)
M(uint, 0, UINT_MAX)
M(long, (-0x7fffffffffffffffL - 1), 0x7fffffffffffffffL)
M(ulong, 0, 0xffffffffffffffffUL)
#undef M
#define M(T, max_value, min_value, epsilon_value, digit_count)    \
    template <> struct numeric_limits<T> {                        \
        static constexpr constant bool is_integer = false;        \
        static constexpr constant int digits = digit_count;       \
        static constexpr T max() { return (T)(max_value); }       \
        static constexpr T lowest() { return (T)(-max_value); }   \
        static constexpr T min() { return (T)(min_value); }       \
        static constexpr T epsilon() { return (T)(epsilon_value); } \
        static constexpr T infinity() { return (T)INFINITY; }     \
        static constexpr T quiet_NaN() { return (T)NAN; }         \
    };
M(float, 3.402823466e+38f, 1.175494351e-38f, 1.192092896e-07f, 24)
M(half, 65504.f, 6.103515625e-05f, 0.0009765625f, 11)
M(bfloat, 3.38953139e38f, 1.175494351e-38f, 0.0078125f, 8)
#undef M
}  // namespace metal

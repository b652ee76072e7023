// A vector of N values of type T, written with the compiler's vector extensions (GCC and Clang), so that one
// source serves SSE2, NEON, AVX2 and AVX-512: the flags of the translation unit decide. Instructions are named only
// where compilers do not find them.
//
// Everything that a level compiles lives in an unnamed namespace: an inline function with one name and two
// instruction sets would let the linker choose either, also for a machine that has only one of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mopd {
namespace {

template <class T, int bytes>
struct Registers;

#define MOPD_REGISTERS(T, Bits_, bytes)                                      \
    template <>                                                              \
    struct Registers<T, bytes> {                                             \
        using Bits = Bits_;                                                  \
        typedef T Register __attribute__((vector_size(bytes)));              \
        typedef Bits_ Mask __attribute__((vector_size(bytes)));              \
    };
MOPD_REGISTERS(float, std::int32_t, 16)
MOPD_REGISTERS(float, std::int32_t, 32)
MOPD_REGISTERS(float, std::int32_t, 64)
MOPD_REGISTERS(double, std::int64_t, 16)
MOPD_REGISTERS(double, std::int64_t, 32)
#undef MOPD_REGISTERS

template <class T_, int bytes>
struct Vector {
    using T = T_;
    static constexpr int N = bytes / sizeof(T);
    using Bits = typename Registers<T, bytes>::Bits;
    using Register = typename Registers<T, bytes>::Register;
    using Mask = typename Registers<T, bytes>::Mask;  // all ones where true

    Register r;

    Vector() = default;
    Vector(Register value) : r(value) {}
    Vector(T value) : r(Register{} + value) {}

    static Vector load(const T* p) {
        Vector v;
        std::memcpy(&v.r, p, sizeof v.r);
        return v;
    }
    void store(T* p) const { std::memcpy(p, &r, sizeof r); }

    friend Vector operator+(Vector a, Vector b) { return a.r + b.r; }
    friend Vector operator-(Vector a, Vector b) { return a.r - b.r; }
    friend Vector operator*(Vector a, Vector b) { return a.r * b.r; }
    friend Vector operator/(Vector a, Vector b) { return a.r / b.r; }
    friend Mask operator>(Vector a, Vector b) { return a.r > b.r; }
    friend Mask operator<=(Vector a, Vector b) { return a.r <= b.r; }
    friend Mask operator==(Vector a, Vector b) { return a.r == b.r; }
};

template <class V>
V select(typename V::Mask mask, V yes, V no) {
    return mask ? yes.r : no.r;
}

// a > b ? a : b, so the second operand where either is NaN. Named, because compilers compare and blend otherwise.
template <class V>
V max(V a, V b) {
    if constexpr (!std::is_same_v<typename V::T, float>) return select(a > b, a, b);
#if defined(__AVX512F__)
    else if constexpr (V::N == 16) return V(_mm512_max_ps(a.r, b.r));
#endif
#if defined(__AVX2__)
    else if constexpr (V::N == 8) return V(_mm256_max_ps(a.r, b.r));
#endif
#if defined(__SSE2__)
    else if constexpr (V::N == 4) return V(_mm_max_ps(a.r, b.r));
#endif
    else return select(a > b, a, b);
}

template <class V>
V min(V a, V b) {
    if constexpr (!std::is_same_v<typename V::T, float>) return select(b > a, a, b);
#if defined(__AVX512F__)
    else if constexpr (V::N == 16) return V(_mm512_min_ps(a.r, b.r));
#endif
#if defined(__AVX2__)
    else if constexpr (V::N == 8) return V(_mm256_min_ps(a.r, b.r));
#endif
#if defined(__SSE2__)
    else if constexpr (V::N == 4) return V(_mm_min_ps(a.r, b.r));
#endif
    else return select(b > a, a, b);
}

template <class V>
V abs(V a) {
    using Mask = typename V::Mask;
    using Bits = typename V::Bits;
    return reinterpret_cast<typename V::Register>(reinterpret_cast<Mask>(a.r) & (std::is_same_v<Bits, std::int32_t>
        ? Bits(0x7fffffff) : Bits(0x7fffffffffffffff)));
}

// Bit i is lane i.
template <class V>
unsigned bits(typename V::Mask mask) {
#if defined(__AVX512DQ__)
    if constexpr (sizeof mask == 64 && sizeof(typename V::T) == 4)
        return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof mask == 32 && sizeof(typename V::T) == 4)
        return unsigned(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#endif
#if defined(__SSE2__)
    if constexpr (sizeof mask == 16 && sizeof(typename V::T) == 4)
        return unsigned(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#endif
    unsigned result = 0;
    for (int i = 0; i < V::N; ++i) result |= unsigned(mask[i] != 0) << i;
    return result;
}

// How a kernel reads and writes N neighbouring values: all of them, or the first n at the end of a row.
template <class V>
struct Whole {
    static constexpr int count = V::N;
    V load(const typename V::T* p) const { return V::load(p); }
    void store(typename V::T* p, V v) const { v.store(p); }
};

template <class V>
struct Part {
    int count;
    V load(const typename V::T* p) const {
        V v(typename V::T(0));
        std::memcpy(&v.r, p, count * sizeof(typename V::T));
        return v;
    }
    void store(typename V::T* p, V v) const { std::memcpy(p, &v.r, count * sizeof(typename V::T)); }
};

// body(first, lanes) over [0, count) in vectors.
template <class V, class Body>
void in_vectors(std::int64_t count, Body body) {
    std::int64_t i = 0;
    for (; i + V::N <= count; i += V::N) body(i, Whole<V>{});
    if (i < count) body(i, Part<V>{int(count - i)});
}

}  // namespace
}  // namespace mopd

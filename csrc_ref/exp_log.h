// exp, expm1, log and log1p of vectors. float: polynomials, at most 1 ulp for exp over all normal results and 2 ulp for
// log; double: libm by lane, since double only checks float.
#pragma once

#include <cmath>

#include "vector.h"

namespace mopd {
namespace {

template <class V>
constexpr bool is_float = std::is_same_v<typename V::T, float>;

// y 2^n for integral n in [-252, 254], in two factors so that 2^n itself may lie outside float.
template <class V>
V scale(V y, V n) {
#if defined(__AVX512F__)
    if constexpr (V::N == 16) return V(_mm512_scalef_ps(y.r, n.r));
#endif
    typename V::Mask integer = __builtin_convertvector(n.r, typename V::Mask), half = integer >> 1;
    auto power = [](typename V::Mask e) { return V(reinterpret_cast<typename V::Register>((e + 127) << 23)); };
    return y * power(half) * power(integer - half);
}

// n and e^r - 1 of x = n ln 2 + r, |r| <= ln 2 / 2, for x in [-106, 89].
//   e^r = 1 + r + r^2 Q(r), Q minimax of degree 4 (relative error 3e-9)
template <class V>
V reduced_expm1(V x, V& n) {
    const V shift(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    n = (x * V(1.44269504f) + shift) - shift;
    V r = x - n * V(0.693359375f);  // 9 bits of ln 2: the product is exact
    r = r - n * V(-2.12194440e-4f);
    V q(1.381453942e-03f);
    q = q * r + V(8.368745446e-03f);
    q = q * r + V(4.166838899e-02f);
    q = q * r + V(1.666652113e-01f);
    q = q * r + V(4.999999404e-01f);
    return q * r * r + r;
}

// e^x; 0 at and below -106, inf above 88.73, NaN for NaN.
template <class V>
V exp(V x) {
    if constexpr (is_float<V>) {
        V n, y = reduced_expm1(min(V(89.0f), max(V(-106.0f), x)), n);
        return scale(y + V(1.0f), n);
    } else {
        for (int i = 0; i < V::N; ++i) x.r[i] = std::exp(x.r[i]);
        return x;
    }
}

// e^x - 1 for x <= 0, in full relative precision near 0, and e^x as `power`; NaN for NaN.
//   2^n e^r - 1 = 2^n (e^r - 1) + (2^n - 1)
template <class V>
V expm1(V x, V& power) {
    if constexpr (is_float<V>) {
        V n, y = reduced_expm1(max(V(-106.0f), x), n);
        power = scale(y + V(1.0f), n);
        return scale(y, n) + (scale(V(1.0f), n) - V(1.0f));
    } else {
        power = exp(x);
        for (int i = 0; i < V::N; ++i) x.r[i] = std::expm1(x.r[i]);
        return x;
    }
}

// log x for finite normal x > 0; NaN for NaN.
//   x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2);  log(1 + f) = f - f^2/2 + f^3 P(f), P minimax of degree 7
template <class V>
V log(V x) {
    if constexpr (is_float<V>) {
        using Mask = typename V::Mask;
        using Register = typename V::Register;
        const std::int32_t root_half = 0x3f3504f3;
        Mask raw = reinterpret_cast<Mask>(x.r);
        Mask exponent = (raw - root_half) >> 23;
        V f = V(reinterpret_cast<Register>(raw - (exponent << 23))) - V(1.0f);
        V n(__builtin_convertvector(exponent, Register));
        V p(-7.634496689e-02f);
        p = p * f + V(1.276157647e-01f);
        p = p * f + V(-1.316018254e-01f);
        p = p * f + V(1.420175731e-01f);
        p = p * f + V(-1.662335694e-01f);
        p = p * f + V(2.000122666e-01f);
        p = p * f + V(-2.500081956e-01f);
        p = p * f + V(3.333333135e-01f);
        V square = f * f;
        V y = p * f * square + n * V(-2.12194440e-4f) - V(0.5f) * square;
        return select(x == x, (f + y) + n * V(0.693359375f), x);
    } else {
        for (int i = 0; i < V::N; ++i) x.r[i] = std::log(x.r[i]);
        return x;
    }
}

// log(1 + x) for -1 <= x <= 0, in full relative precision near 0; about log 1e-38 at -1; NaN for NaN.
//   log(1 + x) = log w + (x - (w - 1)) / w, w = 1 + x rounded
template <class V>
V log1p(V x) {
    using T = typename V::T;
    V w = max(V(T(1.17549435e-38)), V(T(1)) + x);
    return log(w) + (x - (w - V(T(1)))) / w;
}

}  // namespace
}  // namespace mopd

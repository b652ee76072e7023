// Sums and updates that need both logsumexps first: Jensen-Shannon, and the mixture of several teachers.
#pragma once

#include "gradient.h"

namespace mopd {
namespace {

// sums[0] += q (log q - log m), sums[1] += p (log p - log m) over the slice.
template <class V>
void mixture_slice(Plane<const typename V::T> z_s, Plane<const typename V::T> z_t, const typename V::T* lse_s,
                   const typename V::T* lse_t, typename V::T alpha, Range rows, typename V::T* sums) {
    using T = typename V::T;
    for (std::int64_t i = 0; i < 2 * z_s.tokens; ++i) sums[i] = 0;
    for (std::int64_t first = rows.first; first < rows.last; first += BLOCK) {
        std::int64_t last = first + BLOCK < rows.last ? first + BLOCK : rows.last;
        in_vectors<V>(z_s.tokens, [&](std::int64_t i, auto lanes) {
            V shift_s = lanes.load(lse_s + i), shift_t = lanes.load(lse_t + i);
            V student(T(0)), teacher(T(0));
            for (std::int64_t v = first; v < last; ++v) {
                V log_q = lanes.load(z_s.data + v * z_s.stride + i) - shift_s;
                V log_p = lanes.load(z_t.data + v * z_t.stride + i) - shift_t;
                Mixture<V> mixture(log_q, log_p, alpha);
                student = student + expected(mixture.q, mixture.student);
                teacher = teacher + expected(mixture.p, mixture.teacher);
            }
            lanes.store(sums + i, lanes.load(sums + i) + student);
            lanes.store(sums + z_s.tokens + i, lanes.load(sums + z_s.tokens + i) + teacher);
        });
    }
}

// log_p <- log(e^log_p + e^(z + shift)) = m + log(1 + e^(least - m)); -inf where both are.
template <class V>
void mix_slice(Plane<typename V::T> log_p, Plane<const typename V::T> z, const typename V::T* shift, Range rows) {
    using T = typename V::T;
    for (std::int64_t v = rows.first; v < rows.last; ++v)
        in_vectors<V>(z.tokens, [&](std::int64_t i, auto lanes) {
            T* place = log_p.data + v * log_p.stride + i;
            V a = lanes.load(place), b = lanes.load(z.data + v * z.stride + i) + lanes.load(shift + i);
            V high = select(a > b, a, b), low = select(a > b, b, a);
            V sum = high + log(V(T(1)) + exp(low - high));
            lanes.store(place, select(high == minus_infinity<V>(), high, sum));
        });
}

}  // namespace
}  // namespace mopd

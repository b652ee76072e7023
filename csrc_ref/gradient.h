// d(loss)/d(logits) of every entry of a slice, in place.
#pragma once

#include "stats.h"

namespace mopd {
namespace {

// 1 - (z / cap)^2, the slope of z = cap tanh(x / cap); 1 without a cap (0).
template <class V>
V cap_slope(V z, typename V::T cap) {
    if (cap == 0) return V(typename V::T(1));
    V ratio = z / V(cap);
    return V(typename V::T(1)) - ratio * ratio;
}

// q, p, log(q / m) and log(p / m) with m = (1 - alpha) q + alpha p; the ratios are exactly 0 where q = p.
//   with d = log p - log q:  log(q / m) = -log1p(alpha expm1(d)),  log(p / m) = -log1p((1 - alpha) expm1(-d));
// the one with the negative exponent is computed, the other differs from it by d.
template <class V>
struct Mixture {
    V q, p, student, teacher;

    Mixture(V log_q, V log_p, typename V::T alpha) {
        using T = typename V::T;
        const V zero(T(0));
        V d = select(log_q == log_p, zero, log_p - log_q);  // also where both are -inf
        auto student_larger = d <= zero;
        V share = select(student_larger, V(alpha), V(T(1) - alpha));
        V quotient, less = expm1(zero - abs(d), quotient);
        V larger = exp(select(student_larger, log_q, log_p)), smaller = larger * quotient;
        V ratio = zero - log1p(share * less);
        q = select(student_larger, larger, smaller);
        p = select(student_larger, smaller, larger);
        student = select(student_larger, ratio, ratio - d);
        teacher = select(student_larger, ratio + d, ratio);
    }
};

// Before token weight and cap. forward: q - p;  reverse: q (log q - log p - R);
// mixture: (1 - alpha) q (log q - log m - KL(q||M))
template <class V, Loss loss>
V divergence_entry(V log_q, V log_p, V student_kl, typename V::T alpha) {
    using T = typename V::T;
    if constexpr (loss == Loss::forward) return exp(log_q) - exp(log_p);
    if constexpr (loss == Loss::reverse) return expected(exp(log_q), log_q - log_p - student_kl);
    Mixture<V> mixture(log_q, log_p, alpha);
    return V(T(1) - alpha) * expected(mixture.q, mixture.student - student_kl);
}

// keep(row, first token, lanes, mask of entries with |g| > filter, gradient with token weight and cap)
template <class V, Loss loss, class Keep>
void each_entry(Plane<const typename V::T> z_s, Plane<const typename V::T> z_t, TokenTerms<typename V::T> terms,
                typename V::T alpha, typename V::T cap, typename V::T filter, Range rows, Keep keep) {
    for (std::int64_t v = rows.first; v < rows.last; ++v)
        in_vectors<V>(z_s.tokens, [&](std::int64_t i, auto lanes) {
            V s = lanes.load(z_s.data + v * z_s.stride + i), t = lanes.load(z_t.data + v * z_t.stride + i);
            V g = divergence_entry<V, loss>(s - lanes.load(terms.student_lse + i), t - lanes.load(terms.teacher_lse + i),
                                            lanes.load(terms.student_kl + i), alpha);
            auto small = abs(g) <= V(filter);
            keep(v, i, lanes, ~small, g * lanes.load(terms.coefficient + i) * cap_slope(s, cap));
        });
}

template <class V, Loss loss>
void divergence_slice(Plane<typename V::T> z_s, Plane<const typename V::T> z_t, TokenTerms<typename V::T> terms,
                      typename V::T alpha, typename V::T cap, typename V::T filter, Range rows) {
    using T = typename V::T;
    Plane<const T> source{z_s.data, z_s.tokens, z_s.rows, z_s.stride};
    each_entry<V, loss>(source, z_t, terms, alpha, cap, filter > 0 ? filter : T(-1), rows,
                        [&](std::int64_t v, std::int64_t i, auto lanes, auto kept, V g) {
                            lanes.store(z_s.data + v * z_s.stride + i, select(kept, g, V(T(0))));
                        });
}

// a log q[y] + b H + c lse:  q (c - a - b (log q + H)) + a [y]
template <class V>
void logprob_slice(Plane<typename V::T> z, LogprobTerms<typename V::T> terms, typename V::T cap, Range rows) {
    using T = typename V::T;
    for (std::int64_t v = rows.first; v < rows.last; ++v)
        in_vectors<V>(z.tokens, [&](std::int64_t i, auto lanes) {
            T* place = z.data + v * z.stride + i;
            V value = lanes.load(place), a = lanes.load(terms.grad_logprob + i);
            V log_q = value - lanes.load(terms.lse + i);
            V slope = lanes.load(terms.grad_lse + i) - a -
                      lanes.load(terms.grad_entropy + i) * (log_q + lanes.load(terms.entropy + i));
            V one_hot = select(lanes.load(terms.label + i) == V(T(v)), a, V(T(0)));
            lanes.store(place, (expected(exp(log_q), slope) + one_hot) * cap_slope(value, cap));
        });
}

}  // namespace
}  // namespace mopd

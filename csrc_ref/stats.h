// Online statistics of every token over a slice of the vocabulary, one pass over memory.
//
// A block of vocabulary rows stays in the first-level cache: its maximum is found, the sums are rescaled where
// the maximum rose, then the block is added. Lanes are tokens, so nothing is reduced across a vector.
#pragma once

#include "exp_log.h"
#include "slices.h"

namespace mopd {
namespace {

constexpr std::int64_t BLOCK = 16;  // vocabulary rows; times 200 tokens, 2 sides, 4 bytes: 26 KB

template <class V>
V minus_infinity() {
    return V(-__builtin_inff());
}

// weight * value, 0 where the weight is 0 also for an infinite value, NaN for a weight of NaN.
template <class V>
V expected(V weight, V value) {
    return select(weight <= V(typename V::T(0)), V(typename V::T(0)), weight * value);
}

// Running statistics of one side, as in mopd.h: max, argmax, sum e^(z-m), sum e^(z-m) (z-m).
template <class V>
struct Online {
    using T = typename V::T;
    V maximum, sum, moment, argmax;

    template <class Lanes>
    static Online load(const Lanes& lanes, const T* state, std::int64_t tokens) {
        return {lanes.load(state), lanes.load(state + tokens), lanes.load(state + 2 * tokens),
                lanes.load(state + 3 * tokens)};
    }

    template <class Lanes>
    void store(const Lanes& lanes, T* state, std::int64_t tokens) const {
        lanes.store(state, maximum);
        lanes.store(state + tokens, sum);
        lanes.store(state + 2 * tokens, moment);
        lanes.store(state + 3 * tokens, argmax);
    }

    // Take the maximum of rows [first, last) of z; returns e^(old - new), by which other sums must be scaled.
    template <class Lanes>
    V raise(const Lanes& lanes, const T* z, std::int64_t stride, std::int64_t first, std::int64_t last) {
        V top = maximum;
        for (std::int64_t v = first; v < last; ++v) {
            __builtin_prefetch(z + (v + BLOCK) * stride);
            top = max(top, lanes.load(z + v * stride));
        }
        if (bits<V>(top > maximum) == 0) return V(T(1));
        for (std::int64_t v = last; v-- > first;)
            argmax = select((lanes.load(z + v * stride) == top) & (top > maximum), V(T(v)), argmax);
        V shift = select(sum <= V(T(0)), V(T(0)), max(V(T(FARTHEST)), maximum - top));
        V factor = exp(shift);
        moment = factor * (moment + shift * sum);
        sum = factor * sum;
        maximum = top;
        return factor;
    }

    V origin() const { return select(maximum > minus_infinity<V>(), maximum, V(T(0))); }
};

// Sums of one block: added up apart and then to the running sums, so that rounding grows with the number of blocks.
template <class V>
struct BlockSums {
    using T = typename V::T;
    V origin, sum{T(0)}, moment{T(0)};

    explicit BlockSums(const Online<V>& side) : origin(side.origin()) {}

    // Add z; returns e^(z - origin).
    V add(V z) {
        V shifted = z - origin;
        V weight = exp(shifted);
        sum = sum + weight;
        moment = moment + weight * max(V(T(FARTHEST)), shifted);
        return weight;
    }

    void add_to(Online<V>& side) const {
        side.sum = side.sum + sum;
        side.moment = side.moment + moment;
    }
};

template <class T>
void start_side(T* state, std::int64_t tokens) {
    for (std::int64_t i = 0; i < 4 * tokens; ++i) state[i] = i < tokens ? T(-__builtin_inff()) : T(0);
}

template <class V>
void side_slice(Plane<const typename V::T> z, Range rows, typename V::T* state) {
    start_side(state, z.tokens);
    for (std::int64_t first = rows.first; first < rows.last; first += BLOCK) {
        std::int64_t last = first + BLOCK < rows.last ? first + BLOCK : rows.last;
        in_vectors<V>(z.tokens, [&](std::int64_t i, auto lanes) {
            auto side = Online<V>::load(lanes, state + i, z.tokens);
            side.raise(lanes, z.data + i, z.stride, first, last);
            BlockSums<V> block(side);
            for (std::int64_t v = first; v < last; ++v) block.add(lanes.load(z.data + v * z.stride + i));
            block.add_to(side);
            side.store(lanes, state + i, z.tokens);
        });
    }
}

// Both sides and the cross moment of a KL: sum e^(a - m_a) (a - b), a the side that weights.
template <class V, Loss loss>
void pair_slice(Plane<const typename V::T> z_s, Plane<const typename V::T> z_t, Range rows, typename V::T* state) {
    const std::int64_t tokens = z_s.tokens;
    auto* teacher_state = state + 4 * tokens;
    auto* cross_state = state + 8 * tokens;
    start_side(state, tokens);
    start_side(teacher_state, tokens);
    for (std::int64_t i = 0; i < tokens; ++i) cross_state[i] = 0;
    for (std::int64_t first = rows.first; first < rows.last; first += BLOCK) {
        std::int64_t last = first + BLOCK < rows.last ? first + BLOCK : rows.last;
        in_vectors<V>(tokens, [&](std::int64_t i, auto lanes) {
            auto student = Online<V>::load(lanes, state + i, tokens);
            auto teacher = Online<V>::load(lanes, teacher_state + i, tokens);
            V rescale_s = student.raise(lanes, z_s.data + i, z_s.stride, first, last);
            V rescale_t = teacher.raise(lanes, z_t.data + i, z_t.stride, first, last);
            BlockSums<V> block_s(student), block_t(teacher);
            V cross(typename V::T(0));
            for (std::int64_t v = first; v < last; ++v) {
                V s = lanes.load(z_s.data + v * z_s.stride + i), t = lanes.load(z_t.data + v * z_t.stride + i);
                V weight_s = block_s.add(s), weight_t = block_t.add(t);
                if constexpr (loss == Loss::reverse) cross = cross + expected(weight_s, s - t);
                if constexpr (loss == Loss::forward) cross = cross + expected(weight_t, t - s);
            }
            block_s.add_to(student);
            block_t.add_to(teacher);
            V rescale = loss == Loss::reverse ? rescale_s : rescale_t;
            lanes.store(cross_state + i, lanes.load(cross_state + i) * rescale + cross);
            student.store(lanes, state + i, tokens);
            teacher.store(lanes, teacher_state + i, tokens);
        });
    }
}

}  // namespace
}  // namespace mopd

// The gradient filter: most entries of d(loss)/d(logits) are negligible, so the products with W and h are taken
// over the kept ones only.
//
// Logits lie by vocabulary row, so a row's kept entries are packed at its start: values over the student's
// logits, token numbers over the teacher's. That takes no memory and cannot overflow, however dense a row is.
#pragma once

#include "gradient.h"

namespace mopd {
namespace {

template <class T>
using TokenNumber = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <class V, Loss loss>
void kept_slice(Kept<typename V::T> kept, TokenTerms<typename V::T> terms, typename V::T alpha, typename V::T cap,
                typename V::T filter, Range rows) {
    using T = typename V::T;
    auto source = [](Plane<T> z) { return Plane<const T>{z.data, z.tokens, z.rows, z.stride}; };
    for (std::int64_t v = rows.first; v < rows.last; ++v) kept.counts[v] = 0;
    each_entry<V, loss>(source(kept.values), source(kept.tokens), terms, alpha, cap, filter, rows,
                        [&](std::int64_t v, std::int64_t i, auto lanes, auto mask, V g) {
                            unsigned set = bits<V>(mask) & ((1u << lanes.count) - 1);
                            if (set == 0) return;
                            T packed[V::N];
                            g.store(packed);
                            T* values = kept.values.data + v * kept.values.stride;
                            T* tokens = kept.tokens.data + v * kept.tokens.stride;
                            std::int32_t count = kept.counts[v];
                            for (; set != 0; set &= set - 1, ++count) {
                                int lane = __builtin_ctz(set);
                                TokenNumber<T> token = i + lane;
                                values[count] = packed[lane];
                                std::memcpy(tokens + count, &token, sizeof token);
                            }
                            kept.counts[v] = count;
                        });
}

template <class T>
TokenNumber<T> token_of(const T* tokens, std::int64_t entry) {
    TokenNumber<T> token;
    std::memcpy(&token, tokens + entry, sizeof token);
    return token;
}

// Back to a dense row, last entry first: an entry never lies left of where it was packed.
template <class V>
void expand_slice(Kept<typename V::T> kept, Range rows) {
    using T = typename V::T;
    for (std::int64_t v = rows.first; v < rows.last; ++v) {
        T* values = kept.values.data + v * kept.values.stride;
        const T* tokens = kept.tokens.data + v * kept.tokens.stride;
        std::int64_t end = kept.values.tokens;
        for (std::int64_t entry = kept.counts[v]; entry-- > 0;) {
            std::int64_t token = token_of(tokens, entry);
            T value = values[entry];
            for (std::int64_t i = token + 1; i < end; ++i) values[i] = 0;
            values[token] = value;
            end = token;
        }
        for (std::int64_t i = 0; i < end; ++i) values[i] = 0;
    }
}

constexpr int TILE = 8;  // vectors of W and dW held in registers while a row's entries go by

// One tile of `count` vectors from column `first`, for all rows of the slice: h and dH of the chunk stay in
// the second-level cache, W and dW are read once.
template <class V, int count, class Lanes>
void product_tile(Kept<typename V::T> kept, Products<typename V::T> p, Range rows, typename V::T* grad_hidden,
                  std::int64_t first, Lanes lanes) {
    using T = typename V::T;
    for (std::int64_t v = rows.first; v < rows.last; ++v) {
        std::int64_t entries = kept.counts[v];
        if (entries == 0) continue;
        const T* values = kept.values.data + v * kept.values.stride;
        const T* tokens = kept.tokens.data + v * kept.tokens.stride;
        V weight[count], sum[count];
        for (int j = 0; j < count; ++j) {
            weight[j] = lanes.load(p.weight + v * p.weight_stride + first + j * V::N) * V(p.slope);
            sum[j] = V(T(0));
        }
        for (std::int64_t entry = 0; entry < entries; ++entry) {
            const V g(values[entry]);
            const std::int64_t place = token_of(tokens, entry) * p.width + first;
            if (p.grad_weight)
                for (int j = 0; j < count; ++j) sum[j] = sum[j] + g * lanes.load(p.hidden + place + j * V::N);
            if (grad_hidden)
                for (int j = 0; j < count; ++j) {
                    T* target = grad_hidden + place + j * V::N;
                    lanes.store(target, lanes.load(target) + g * weight[j]);
                }
        }
        if (p.grad_weight)
            for (int j = 0; j < count; ++j) {
                T* target = p.grad_weight + v * p.width + first + j * V::N;
                lanes.store(target, lanes.load(target) + sum[j] * V(p.slope));
            }
    }
}

template <class V, int most>
void product_columns(Kept<typename V::T> kept, Products<typename V::T> p, Range rows, typename V::T* grad_hidden,
                     std::int64_t first, std::int64_t vectors) {
    if constexpr (most > 1)
        if (vectors < most) return product_columns<V, most - 1>(kept, p, rows, grad_hidden, first, vectors);
    product_tile<V, most>(kept, p, rows, grad_hidden, first, Whole<V>{});
}

template <class V>
void products_slice(Kept<typename V::T> kept, Products<typename V::T> p, Range rows, typename V::T* grad_hidden) {
    using T = typename V::T;
    if (p.grad_bias)
        for (std::int64_t v = rows.first; v < rows.last; ++v) {
            T sum = 0;
            for (std::int64_t e = 0; e < kept.counts[v]; ++e) sum += kept.values.data[v * kept.values.stride + e];
            p.grad_bias[v] += p.slope * sum;
        }
    if (!p.grad_weight && !grad_hidden) return;
    const std::int64_t vectors = p.width / V::N, tiles = (vectors + TILE - 1) / TILE;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        std::int64_t first = vectors * tile / tiles, last = vectors * (tile + 1) / tiles;
        product_columns<V, TILE>(kept, p, rows, grad_hidden, first * V::N, last - first);
    }
    if (int rest = int(p.width - vectors * V::N))
        product_tile<V, 1>(kept, p, rows, grad_hidden, vectors * V::N, Part<V>{rest});
}

}  // namespace
}  // namespace mopd

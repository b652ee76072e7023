// The k largest logits of every token, one pass: a vector of thresholds rejects almost every entry, the others go
// through a heap by token. Equal values: the smaller row first.
#pragma once

#include "stats.h"

namespace mopd {
namespace {

template <class T>
bool before(T value, std::int64_t row, T other, std::int64_t other_row) {  // in descending order
    return value > other || (value == other && row < other_row);
}

// Restore the heap below `hole`, the last in order at the root.
template <class T>
void sink(T* values, std::int64_t* rows, std::int64_t size, std::int64_t hole, T value, std::int64_t row) {
    for (std::int64_t child; (child = 2 * hole + 1) < size; hole = child) {
        if (child + 1 < size && before(values[child], rows[child], values[child + 1], rows[child + 1])) ++child;
        if (!before(value, row, values[child], rows[child])) break;
        values[hole] = values[child];
        rows[hole] = rows[child];
    }
    values[hole] = value;
    rows[hole] = row;
}

template <class T>
void sort_heap(T* values, std::int64_t* rows, std::int64_t size) {
    while (size-- > 1) {
        T value = values[size];
        std::int64_t row = rows[size];
        values[size] = values[0];
        rows[size] = rows[0];
        sink(values, rows, size, 0, value, row);
    }
}

template <class V>
void topk_tokens(Plane<const typename V::T> z, Range tokens, std::int64_t k, typename V::T* values,
                 std::int64_t* rows) {
    using T = typename V::T;
    in_vectors<V>(tokens.last - tokens.first, [&](std::int64_t offset, auto lanes) {
        const std::int64_t i = tokens.first + offset;
        T threshold[V::N] = {};
        for (int lane = 0; lane < lanes.count; ++lane) {
            T* heap = values + (i + lane) * k;
            std::int64_t* heap_rows = rows + (i + lane) * k;
            for (std::int64_t v = 0; v < k; ++v) {
                heap[v] = z.data[v * z.stride + i + lane];
                heap_rows[v] = v;
            }
            for (std::int64_t v = k / 2; v-- > 0;) sink(heap, heap_rows, k, v, heap[v], heap_rows[v]);
            threshold[lane] = heap[0];
        }
        for (std::int64_t v = k; v < z.rows; ++v) {
            __builtin_prefetch(z.data + (v + 16) * z.stride + i);
            V value = lanes.load(z.data + v * z.stride + i);
            unsigned set = bits<V>(value > V::load(threshold)) & ((1u << lanes.count) - 1);
            for (; set != 0; set &= set - 1) {
                int lane = __builtin_ctz(set);
                T* heap = values + (i + lane) * k;
                sink(heap, rows + (i + lane) * k, k, 0, value.r[lane], v);
                threshold[lane] = heap[0];
            }
        }
        for (int lane = 0; lane < lanes.count; ++lane)
            sort_heap(values + (i + lane) * k, rows + (i + lane) * k, k);
    });
}

}  // namespace
}  // namespace mopd

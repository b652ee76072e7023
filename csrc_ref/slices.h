// What a level offers: functions on a slice of vocabulary rows, single-threaded, one table for each type.
// api.cpp splits the vocabulary, runs slices on threads and adds up what they return.
#pragma once

#include <cstdint>

namespace mopd {

// Bound of z - max in a moment: e to it is 0, and it stays finite times a sum, so no 0 * infinity arises.
constexpr double FARTHEST = -1e30;

enum class Loss { forward, reverse, mixture };

// Logits by vocabulary row: the value of token i in row v is data[v * stride + i].
template <class T>
struct Plane {
    T* data;
    std::int64_t tokens, rows, stride;
};

struct Range {
    std::int64_t first, last;
};

// What the gradient of a token needs, each of `tokens` values.
template <class T>
struct TokenTerms {
    const T *student_lse, *teacher_lse, *student_kl, *coefficient;
};

template <class T>
struct LogprobTerms {
    const T *lse, *entropy, *label, *grad_logprob, *grad_entropy, *grad_lse;  // label: row index here, or any other
};

// Kept entries of a gradient: row v holds counts[v] values at the start of its row of `values`, and their token
// numbers, as integers of the same size, at the start of its row of `tokens`.
template <class T>
struct Kept {
    Plane<T> values;
    Plane<T> tokens;
    std::int32_t* counts;
};

// dW[v] += slope sum_i g_vi h_i,  db[v] += slope sum_i g_vi,  dH_i += sum_v g_vi W_v; null where not wanted.
template <class T>
struct Products {
    const T* hidden;  // (tokens, width)
    const T* weight;  // (rows, width), row stride weight_stride
    T* grad_weight;   // (rows, width) contiguous
    T* grad_bias;     // (rows,)
    std::int64_t width, weight_stride;
    T slope;
};

template <class T>
struct Slices {
    void (*exp)(const T* x, T* y, std::int64_t count);
    void (*log)(const T* x, T* y, std::int64_t count);
    void (*side)(Plane<const T> z, Range, T* state);                                         // state (4, tokens)
    void (*pair)(Plane<const T> z_s, Plane<const T> z_t, Loss, Range, T* state);             // state (9, tokens)
    void (*mixture)(Plane<const T> z_s, Plane<const T> z_t, const T* lse_s, const T* lse_t, T alpha, Range,
                    T* sums);                                                                // sums (2, tokens)
    void (*mix)(Plane<T> log_p, Plane<const T> z, const T* log_weight_minus_lse, Range);
    void (*divergence)(Plane<T> z_s, Plane<const T> z_t, TokenTerms<T>, Loss, T alpha, T cap, T filter, Range);
    void (*divergence_kept)(Kept<T>, TokenTerms<T>, Loss, T alpha, T cap, T filter, Range);  // z_s, z_t in, kept out
    void (*expand)(Kept<T>, Range);                                                          // kept in, dense out
    void (*products)(Kept<T>, Products<T>, Range, T* grad_hidden);                           // (tokens, width)
    void (*logprob)(Plane<T> z, LogprobTerms<T>, T cap, Range);
    void (*topk)(Plane<const T> z, Range tokens, std::int64_t k, T* values, std::int64_t* indices);  // (tokens, k)
};

struct Level {
    const char* name;
    Slices<float> single;
    Slices<double> twice;
};

extern const Level level_portable;
extern const Level level_avx2;
extern const Level level_avx512;

}  // namespace mopd

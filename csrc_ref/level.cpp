// Compiled once for each instruction set, with MOPD_LEVEL its name and MOPD_WIDTH the bytes of a vector.
#include "mixture.h"
#include "sparse.h"
#include "topk.h"

namespace mopd {
namespace {

template <class V>
void exp_array(const typename V::T* x, typename V::T* y, std::int64_t count) {
    in_vectors<V>(count, [&](std::int64_t i, auto lanes) { lanes.store(y + i, exp(lanes.load(x + i))); });
}

template <class V>
void log_array(const typename V::T* x, typename V::T* y, std::int64_t count) {
    in_vectors<V>(count, [&](std::int64_t i, auto lanes) { lanes.store(y + i, log(lanes.load(x + i))); });
}

// f(loss as a compile-time constant)
template <class F>
void with_loss(Loss loss, F f) {
    if (loss == Loss::forward) f(std::integral_constant<Loss, Loss::forward>{});
    if (loss == Loss::reverse) f(std::integral_constant<Loss, Loss::reverse>{});
    if (loss == Loss::mixture) f(std::integral_constant<Loss, Loss::mixture>{});
}

template <class V, class T = typename V::T>
constexpr Slices<T> slices() {
    return {
        exp_array<V>,
        log_array<V>,
        side_slice<V>,
        [](Plane<const T> s, Plane<const T> t, Loss loss, Range rows, T* state) {
            with_loss(loss, [&](auto constant) { pair_slice<V, constant.value>(s, t, rows, state); });
        },
        mixture_slice<V>,
        mix_slice<V>,
        [](Plane<T> s, Plane<const T> t, TokenTerms<T> terms, Loss loss, T alpha, T cap, T filter, Range rows) {
            with_loss(loss, [&](auto constant) {
                divergence_slice<V, constant.value>(s, t, terms, alpha, cap, filter, rows);
            });
        },
        [](Kept<T> kept, TokenTerms<T> terms, Loss loss, T alpha, T cap, T filter, Range rows) {
            with_loss(loss, [&](auto constant) {
                kept_slice<V, constant.value>(kept, terms, alpha, cap, filter, rows);
            });
        },
        expand_slice<V>,
        products_slice<V>,
        logprob_slice<V>,
        topk_tokens<V>,
    };
}

}  // namespace

#define MOPD_STRING_(x) #x
#define MOPD_STRING(x) MOPD_STRING_(x)
#define MOPD_JOIN_(a, b) a##b
#define MOPD_JOIN(a, b) MOPD_JOIN_(a, b)

const Level MOPD_JOIN(level_, MOPD_LEVEL) = {
    MOPD_STRING(MOPD_LEVEL),
    slices<Vector<float, MOPD_WIDTH>>(),
    slices<Vector<double, (MOPD_WIDTH < 32 ? 16 : 32)>>(),
};

}  // namespace mopd

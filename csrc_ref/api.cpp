// The C interface: cuts the vocabulary into slices, runs them on threads, adds up their results in order.
// Compiled for the oldest machine, as everything outside level.cpp.
#include "mopd.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "slices.h"

namespace mopd {
namespace {

constexpr std::int64_t SLICE = 2048;     // vocabulary rows a slice: fixed, so that sums do not depend on threads
constexpr std::int64_t PARTITIONS = 8;   // of the sparse products, each with its own partial dH
constexpr std::int64_t TOKEN_GROUP = 16; // tokens a thread takes at a time in top-k: one vector of the widest level

const Level* const LEVELS[] = {
    &level_portable,
#if defined(MOPD_X86)
    &level_avx2,
    &level_avx512,
#endif
};
constexpr int LEVEL_COUNT = sizeof LEVELS / sizeof *LEVELS;

bool runs(int level) {
#if defined(MOPD_X86)
    if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == 2)  // every flag that CMakeLists.txt builds it with: the compiler may use any of them
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#endif
    return level == 0;
}

template <class T>
const Slices<T>& slices(mopd_run run) {
    const Level& level = *LEVELS[run.level];
    if constexpr (sizeof(T) == 4) return level.single;
    else return level.twice;
}

// f(T{}) with the type that run.bytes stands for.
template <class F>
void with_type(mopd_run run, F f) {
    if (run.bytes == 4) f(float{});
    if (run.bytes == 8) f(double{});
}

template <class T>
Plane<T> plane(mopd_plane p) {
    return {static_cast<T*>(p.data), p.tokens, p.rows, p.stride};
}

template <class T>
const T* in(const void* p) {
    return static_cast<const T*>(p);
}

// f(slice number, vocabulary rows) for all slices.
template <class F>
void each_slice(mopd_run run, std::int64_t rows, F f) {
    const std::int64_t count = (rows + SLICE - 1) / SLICE;
#pragma omp parallel for num_threads(run.threads) schedule(dynamic)
    for (std::int64_t slice = 0; slice < count; ++slice)
        f(slice, Range{slice * SLICE, std::min(rows, (slice + 1) * SLICE)});
}

// Space for `lines` (·, C) of every slice.
template <class T>
std::vector<T> workspace(mopd_plane z, std::int64_t lines) {
    return std::vector<T>((z.rows + SLICE - 1) / SLICE * lines * z.tokens);
}

// One side (4, C) from the slices' (lines, C) each, and with `cross` one more line that scales as the side does:
//   s = sum f s_p,  moment = sum f (moment_p + (m_p - m) s_p),  f = e^(m_p - m)
template <class T>
void merge_side(const std::vector<T>& parts, std::int64_t tokens, std::int64_t lines, std::int64_t first_line, T* out,
                std::int64_t cross_line, T* cross) {
    const std::int64_t count = parts.size() / (lines * tokens);
    for (std::int64_t i = 0; i < tokens; ++i) {
        auto part = [&](std::int64_t p, std::int64_t line) { return parts[(p * lines + line) * tokens + i]; };
        std::int64_t best = 0;
        for (std::int64_t p = 1; p < count; ++p)
            if (part(p, first_line) > part(best, first_line)) best = p;
        const T maximum = part(best, first_line);
        T sum = 0, moment = 0, crossed = 0;
        for (std::int64_t p = 0; p < count; ++p) {
            const T part_sum = part(p, first_line + 1);
            if (part_sum == 0) continue;
            const T shift = std::max(T(FARTHEST), part(p, first_line) - maximum);
            const T factor = std::exp(shift);
            sum += factor * part_sum;
            moment += factor * (part(p, first_line + 2) + shift * part_sum);
            if (cross) crossed += factor * part(p, cross_line);
        }
        out[i] = maximum;
        out[tokens + i] = sum;
        out[2 * tokens + i] = moment;
        out[3 * tokens + i] = part(best, first_line + 3);
        if (cross) cross[i] = crossed;
    }
}

template <class T>
TokenTerms<T> token_terms(const mopd_divergence& d) {
    return {in<T>(d.student_lse), in<T>(d.teacher_lse), in<T>(d.student_kl), in<T>(d.coefficient)};
}

template <class T>
Kept<T> kept(mopd_plane values, mopd_plane tokens, const std::int32_t* counts) {
    return {plane<T>(values), plane<T>(tokens), const_cast<std::int32_t*>(counts)};
}

// Vocabulary rows cut into at most PARTITIONS + 1 of about equal numbers of entries; none where there are no entries.
std::vector<Range> by_entries(const std::int32_t* counts, std::int64_t rows) {
    std::int64_t total = 0, seen = 0, first = 0;
    for (std::int64_t v = 0; v < rows; ++v) total += counts[v];
    std::vector<Range> parts;
    if (total == 0) return parts;
    for (std::int64_t v = 0; v < rows; ++v) {
        seen += counts[v];
        if (seen * PARTITIONS < total * std::int64_t(parts.size() + 1) && v + 1 < rows) continue;
        parts.push_back({first, v + 1});
        first = v + 1;
    }
    if (first < rows) parts.back().last = rows;
    return parts;
}

template <class T>
void sparse_products(mopd_run run, Kept<T> kept, const mopd_products& p) {
    const Products<T> products{in<T>(p.hidden), in<T>(p.weight), static_cast<T*>(p.grad_weight),
                               static_cast<T*>(p.grad_bias), p.width, p.weight_stride, T(p.slope)};
    const std::vector<Range> parts = by_entries(kept.counts, kept.values.rows);
    const std::int64_t size = kept.values.tokens * p.width, count = parts.size();
    std::vector<T> partial(p.grad_hidden ? size * count : 0);
#pragma omp parallel for num_threads(run.threads) schedule(dynamic)
    for (std::int64_t part = 0; part < count; ++part)
        slices<T>(run).products(kept, products, parts[part], p.grad_hidden ? &partial[part * size] : nullptr);
    if (!p.grad_hidden) return;
    T* sum = static_cast<T*>(p.grad_hidden);
#pragma omp parallel for num_threads(run.threads)
    for (std::int64_t token = 0; token < kept.values.tokens; ++token)
        for (std::int64_t i = token * p.width; i < (token + 1) * p.width; ++i) {
            sum[i] = 0;
            for (std::int64_t part = 0; part < count; ++part) sum[i] += partial[part * size + i];
        }
}

}  // namespace
}  // namespace mopd

using namespace mopd;

int mopd_interface(void) { return MOPD_INTERFACE; }

const char* mopd_level_name(int level) { return level < LEVEL_COUNT ? LEVELS[level]->name : nullptr; }

int mopd_level_runs(int level) { return level >= 0 && level < LEVEL_COUNT && runs(level); }

void mopd_exp(mopd_run run, const void* x, void* y, int64_t count) {
    with_type(run, [&](auto t) { slices<decltype(t)>(run).exp(in<decltype(t)>(x), static_cast<decltype(t)*>(y), count); });
}

void mopd_log(mopd_run run, const void* x, void* y, int64_t count) {
    with_type(run, [&](auto t) { slices<decltype(t)>(run).log(in<decltype(t)>(x), static_cast<decltype(t)*>(y), count); });
}

void mopd_side_stats(mopd_run run, mopd_plane z, void* out) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        std::vector<T> parts = workspace<T>(z, 4);
        each_slice(run, z.rows, [&](std::int64_t slice, Range rows) {
            slices<T>(run).side(plane<const T>(z), rows, &parts[slice * 4 * z.tokens]);
        });
        merge_side<T>(parts, z.tokens, 4, 0, static_cast<T*>(out), 0, nullptr);
    });
}

void mopd_pair_stats(mopd_run run, mopd_plane student, mopd_plane teacher, int loss, void* out) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        const std::int64_t tokens = student.tokens;
        std::vector<T> parts = workspace<T>(student, 9);
        each_slice(run, student.rows, [&](std::int64_t slice, Range rows) {
            slices<T>(run).pair(plane<const T>(student), plane<const T>(teacher), Loss(loss), rows,
                                &parts[slice * 9 * tokens]);
        });
        T *students = static_cast<T*>(out), *teachers = students + 4 * tokens, *cross = students + 8 * tokens;
        merge_side<T>(parts, tokens, 9, 0, students, 8, loss == MOPD_REVERSE ? cross : nullptr);
        merge_side<T>(parts, tokens, 9, 4, teachers, 8, loss == MOPD_FORWARD ? cross : nullptr);
        if (loss == MOPD_MIXTURE) std::fill(cross, cross + tokens, T(0));
    });
}

void mopd_mixture_sums(mopd_run run, mopd_plane student, mopd_plane teacher, const void* student_lse,
                       const void* teacher_lse, double alpha, void* out) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        const std::int64_t size = 2 * student.tokens;
        std::vector<T> parts = workspace<T>(student, 2);
        each_slice(run, student.rows, [&](std::int64_t slice, Range rows) {
            slices<T>(run).mixture(plane<const T>(student), plane<const T>(teacher), in<T>(student_lse),
                                   in<T>(teacher_lse), T(alpha), rows, &parts[slice * size]);
        });
        T* sums = static_cast<T*>(out);
        for (std::int64_t i = 0; i < size; ++i) {
            sums[i] = 0;
            for (std::int64_t p = 0; p * size < std::int64_t(parts.size()); ++p) sums[i] += parts[p * size + i];
        }
    });
}

void mopd_mix(mopd_run run, mopd_plane log_p, mopd_plane z, const void* shift) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        each_slice(run, z.rows, [&](std::int64_t, Range rows) {
            slices<T>(run).mix(plane<T>(log_p), plane<const T>(z), in<T>(shift), rows);
        });
    });
}

void mopd_divergence_grad(mopd_run run, mopd_plane student, mopd_plane teacher, mopd_divergence d) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        each_slice(run, student.rows, [&](std::int64_t, Range rows) {
            slices<T>(run).divergence(plane<T>(student), plane<const T>(teacher), token_terms<T>(d), Loss(d.loss),
                                      T(d.alpha), T(d.cap), T(d.filter), rows);
        });
    });
}

void mopd_divergence_kept(mopd_run run, mopd_plane student, mopd_plane teacher, mopd_divergence d, int32_t* counts) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        each_slice(run, student.rows, [&](std::int64_t, Range rows) {
            slices<T>(run).divergence_kept(kept<T>(student, teacher, counts), token_terms<T>(d), Loss(d.loss),
                                           T(d.alpha), T(d.cap), T(d.filter), rows);
        });
    });
}

void mopd_expand(mopd_run run, mopd_plane values, mopd_plane tokens, const int32_t* counts) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        each_slice(run, values.rows, [&](std::int64_t, Range rows) {
            slices<T>(run).expand(kept<T>(values, tokens, counts), rows);
        });
    });
}

void mopd_sparse_products(mopd_run run, mopd_plane values, mopd_plane tokens, const int32_t* counts,
                          mopd_products products) {
    with_type(run, [&](auto t) { sparse_products(run, kept<decltype(t)>(values, tokens, counts), products); });
}

void mopd_logprob_grad(mopd_run run, mopd_plane z, mopd_logprob p) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
        const LogprobTerms<T> terms{in<T>(p.lse), in<T>(p.entropy), in<T>(p.label),
                                    in<T>(p.grad_logprob), in<T>(p.grad_entropy), in<T>(p.grad_lse)};
        each_slice(run, z.rows, [&](std::int64_t, Range rows) {
            slices<T>(run).logprob(plane<T>(z), terms, T(p.cap), rows);
        });
    });
}

void mopd_topk(mopd_run run, mopd_plane z, int64_t k, void* values, int64_t* rows) {
    with_type(run, [&](auto t) {
        using T = decltype(t);
#pragma omp parallel for num_threads(run.threads) schedule(dynamic)
        for (std::int64_t first = 0; first < z.tokens; first += TOKEN_GROUP)
            slices<T>(run).topk(plane<const T>(z), Range{first, std::min(z.tokens, first + TOKEN_GROUP)}, k,
                                static_cast<T*>(values), rows);
    });
}

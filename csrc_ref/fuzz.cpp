// Calls every function of mopd.h on random shapes and values, at every level of the machine, on buffers without a
// spare byte: what the address and undefined-behaviour sanitizers look for. Checks itself that values past a row's
// tokens stay untouched, that levels agree and that packed gradients are the dense ones. Usage: fuzz ROUNDS SEED
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "mopd.h"

namespace {

std::mt19937 generator;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

void require(bool condition, const char* what, mopd_run run) {
    if (condition) return;
    std::fprintf(stderr, "fuzz: %s, level %s, %d bytes\n", what, mopd_level_name(run.level), run.bytes);
    std::exit(1);
}

// Logits by vocabulary row with spare values of a mark after each row; the last row ends where its tokens do.
template <class T>
struct Chunk {
    static constexpr T MARK = T(12345);
    std::int64_t tokens, rows, stride;
    std::vector<T> data;

    Chunk(int tokens_, int rows_)
        : tokens(tokens_), rows(rows_), stride(tokens_ + pick(0, 3)), data((rows_ - 1) * stride + tokens_, MARK) {
        const T special[] = {0, T(-INFINITY), T(1e30), T(-1e30), std::numeric_limits<T>::max(), T(1e-40), T(NAN)};
        const double spread = std::pow(10.0, pick(-2, 3));
        const int kinds = pick(0, 3) ? 0 : 7;  // most chunks hold ordinary values only
        for (std::int64_t v = 0; v < rows; ++v)
            for (std::int64_t i = 0; i < tokens; ++i)
                data[v * stride + i] = kinds && pick(0, 20) == 0 ? special[pick(0, kinds - 1)]
                                                                 : T(spread * std::normal_distribution<double>()(generator));
    }

    mopd_plane plane() { return {data.data(), tokens, rows, stride}; }

    bool untouched() const {
        for (std::int64_t v = 0; v + 1 < rows; ++v)
            for (std::int64_t i = tokens; i < stride; ++i)
                if (data[v * stride + i] != MARK) return false;
        return true;
    }
};

template <class T>
std::vector<T> values(std::int64_t count) {
    std::vector<T> result(count);
    for (T& x : result) x = T(std::normal_distribution<double>()(generator));
    return result;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
void statistics(mopd_run run, Chunk<T>& s, Chunk<T>& t, int loss) {
    std::vector<T> side(4 * s.tokens), pair(9 * s.tokens), sums(2 * s.tokens);
    mopd_side_stats(run, s.plane(), side.data());
    mopd_pair_stats(run, s.plane(), t.plane(), loss, pair.data());
    require(std::memcmp(side.data(), pair.data(), side.size() * sizeof(T)) == 0, "side and pair differ", run);
    for (std::int64_t i = 0; i < s.tokens; ++i)
        require(side[3 * s.tokens + i] >= 0 && side[3 * s.tokens + i] < s.rows, "argmax outside the rows", run);
    const std::vector<T> lse = values<T>(s.tokens), other = values<T>(s.tokens);
    mopd_mixture_sums(run, s.plane(), t.plane(), lse.data(), other.data(), 0.3, sums.data());
    Chunk<T> mixed = s;
    mopd_mix(run, mixed.plane(), t.plane(), lse.data());
    require(mixed.untouched(), "mix wrote past a row", run);
}

template <class T>
void gradients(mopd_run run, const Chunk<T>& s, const Chunk<T>& t, int loss) {
    const auto lse_s = values<T>(s.tokens), lse_t = values<T>(s.tokens), kl = values<T>(s.tokens), c = values<T>(s.tokens);
    const double filter = std::pow(10.0, -pick(0, 8));
    mopd_divergence terms = {lse_s.data(), lse_t.data(), kl.data(), c.data(), loss, 0.3, pick(0, 1) * 50.0, filter};
    Chunk<T> dense = s, teacher = t, packed = s;
    mopd_divergence_grad(run, dense.plane(), teacher.plane(), terms);
    require(dense.untouched(), "gradient wrote past a row", run);
    std::vector<std::int32_t> counts(s.rows);
    mopd_divergence_kept(run, packed.plane(), teacher.plane(), terms, counts.data());
    require(packed.untouched() && teacher.untouched(), "packing wrote past a row", run);

    const std::int64_t width = pick(1, 70), weight_stride = width + pick(0, 2);
    const auto hidden = values<T>(s.tokens * width), weight = values<T>((s.rows - 1) * weight_stride + width);
    std::vector<T> grad_hidden(s.tokens * width), grad_weight(s.rows * width), grad_bias(s.rows);
    const bool wants[] = {pick(0, 3) > 0, pick(0, 3) > 0, pick(0, 3) > 0};
    mopd_products products = {hidden.data(), weight.data(), wants[0] ? grad_hidden.data() : nullptr,
                              wants[1] ? grad_weight.data() : nullptr, wants[2] ? grad_bias.data() : nullptr,
                              width, weight_stride, 0.5};
    mopd_sparse_products(run, packed.plane(), teacher.plane(), counts.data(), products);
    mopd_expand(run, packed.plane(), teacher.plane(), counts.data());
    require(same(packed.data, dense.data), "packed and dense gradients differ", run);

    const auto entropy = values<T>(s.tokens), a = values<T>(s.tokens), b = values<T>(s.tokens), d = values<T>(s.tokens);
    std::vector<T> label(s.tokens);
    for (T& x : label) x = T(pick(-3, int(s.rows) + 3));
    Chunk<T> z = s;
    mopd_logprob_grad(run, z.plane(), {lse_s.data(), entropy.data(), label.data(), a.data(), b.data(), d.data(), 0});
    require(z.untouched(), "log-prob gradient wrote past a row", run);
}

template <class T>
void topk(mopd_run run, Chunk<T>& z) {
    const std::int64_t k = pick(1, int(z.rows));
    std::vector<T> top(z.tokens * k);
    std::vector<std::int64_t> rows(z.tokens * k);
    mopd_topk(run, z.plane(), k, top.data(), rows.data());
    for (std::int64_t i = 0; i < z.tokens; ++i)
        for (std::int64_t j = 0; j < k; ++j) {
            const std::int64_t row = rows[i * k + j];
            require(row >= 0 && row < z.rows, "top-k row outside the rows", run);
            require(!(top[i * k + j] < z.data[row * z.stride + i]), "top-k value of another row", run);
        }
}

template <class T>
void round(mopd_run run) {
    const int tokens = pick(1, 40), rows = pick(0, 9) ? pick(1, 90) : pick(2040, 2060);
    Chunk<T> s(tokens, rows), t(tokens, rows);
    const int loss = pick(0, 2);
    statistics(run, s, t, loss);
    gradients(run, s, t, loss);
    topk(run, s);
    const auto x = values<T>(pick(1, 50));
    std::vector<T> y(x.size());
    mopd_exp(run, x.data(), y.data(), x.size());
    mopd_log(run, y.data(), y.data(), y.size());
    for (std::size_t i = 0; i < x.size(); ++i)
        require(std::abs(y[i] - x[i]) <= 1e-6 * (1 + std::abs(x[i])), "log exp x is not x", run);
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 100;
    generator.seed(count > 2 ? std::atoi(arguments[2]) : 0);
    int levels = 0;
    for (int level = 0; mopd_level_name(level); ++level) {
        if (!mopd_level_runs(level)) continue;
        ++levels;
        for (int i = 0; i < rounds; ++i) {
            round<float>({level, 4, pick(1, 3)});
            round<double>({level, 8, pick(1, 3)});
        }
    }
    std::printf("%d levels, %d rounds each\n", levels, rounds);
}

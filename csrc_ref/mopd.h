/* Row kernels for chunks of logits, as a C interface.
 *
 * A chunk lies by vocabulary row: the logit of token i in vocabulary row v is data[v * stride + i], so that a vector
 * holds neighbouring tokens and nothing is reduced across it. C tokens, V rows of vocabulary.
 * Arrays "(n, C)" are contiguous, one value a token in each of n lines, of the chunk's type.
 *
 * Results do not depend on the number of threads: the vocabulary is cut by its size, and the parts' sums are added
 * in order. Nothing is allocated that grows with C * V. Terms of probability 0 count 0, also against infinity;
 * NaN in a token's logits makes that token's results NaN.
 */
#ifndef MOPD_H
#define MOPD_H

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

/* How a call is run. level: index into mopd_level_name. bytes: 4 for float, 8 for double. */
typedef struct {
    int32_t level, bytes, threads;
} mopd_run;

typedef struct {
    void* data;
    int64_t tokens, rows, stride;
} mopd_plane;

enum { MOPD_FORWARD = 0, MOPD_REVERSE = 1, MOPD_MIXTURE = 2 }; /* alpha = 0, alpha = 1, between */

#define MOPD_API __attribute__((visibility("default")))

MOPD_API int mopd_interface(void);                /* MOPD_INTERFACE of the build */
#define MOPD_INTERFACE 1
MOPD_API const char* mopd_level_name(int level);  /* "portable", "avx2", "avx512"; null past the last */
MOPD_API int mopd_level_runs(int level);          /* whether this build and this machine have it */

MOPD_API void mopd_exp(mopd_run run, const void* x, void* y, int64_t count);
MOPD_API void mopd_log(mopd_run run, const void* x, void* y, int64_t count);

/* out (4, C): max z, sum e^(z - max), sum e^(z - max) (z - max), row of the maximum (the first among equals) */
MOPD_API void mopd_side_stats(mopd_run run, mopd_plane z, void* out);

/* out (9, C): both sides as above, then sum e^(a - max a) (a - b), where a is the side that weights: teacher for
 * MOPD_FORWARD, student for MOPD_REVERSE; 0 for MOPD_MIXTURE */
MOPD_API void mopd_pair_stats(mopd_run run, mopd_plane student, mopd_plane teacher, int loss, void* out);

/* out (2, C): sum q (log q - log m), sum p (log p - log m) with m = (1 - alpha) q + alpha p */
MOPD_API void mopd_mixture_sums(mopd_run run, mopd_plane student, mopd_plane teacher, const void* student_lse,
                                const void* teacher_lse, double alpha, void* out);

/* log_p <- log(e^log_p + e^(z + shift)), shift (1, C) */
MOPD_API void mopd_mix(mopd_run run, mopd_plane log_p, mopd_plane z, const void* shift);

/* What the gradient of a token needs, (1, C) each. cap: 0 for none; filter: 0 keeps every entry. */
typedef struct {
    const void *student_lse, *teacher_lse, *student_kl, *coefficient;
    int32_t loss;
    double alpha, cap, filter;
} mopd_divergence;

/* student <- coefficient d(value)/d(student before its cap); entries |d(value)/d(student)| <= filter become 0 */
MOPD_API void mopd_divergence_grad(mopd_run run, mopd_plane student, mopd_plane teacher, mopd_divergence terms);

/* The same gradient, packed: of row v the counts[v] entries above the filter, their values at the start of the
 * student's row and their token numbers (integers of the type's size) at the start of the teacher's. */
MOPD_API void mopd_divergence_kept(mopd_run run, mopd_plane student, mopd_plane teacher, mopd_divergence terms,
                                   int32_t* counts);

/* Packed entries back to a dense gradient in `values`. */
MOPD_API void mopd_expand(mopd_run run, mopd_plane values, mopd_plane tokens, const int32_t* counts);

/* Products of a packed gradient G (C, V) with the head's weight W (V, H) and the hidden states h (C, H):
 * grad_hidden (C, H) = slope G W, grad_weight (V, H) += slope G^T h, grad_bias (V) += slope sum G; null is not wanted.
 * hidden and the gradients are contiguous, weight has rows of weight_stride. */
typedef struct {
    const void *hidden, *weight;
    void *grad_hidden, *grad_weight, *grad_bias;
    int64_t width, weight_stride;
    double slope;
} mopd_products;
MOPD_API void mopd_sparse_products(mopd_run run, mopd_plane values, mopd_plane tokens, const int32_t* counts,
                                   mopd_products products);

/* z <- d/dz of grad_logprob log q[label] + grad_entropy H + grad_lse lse, before the cap; (1, C) each,
 * label as a number of the chunk's type: a row of this chunk, or any other number */
typedef struct {
    const void *lse, *entropy, *label, *grad_logprob, *grad_entropy, *grad_lse;
    double cap;
} mopd_logprob;
MOPD_API void mopd_logprob_grad(mopd_run run, mopd_plane z, mopd_logprob terms);

/* values (C, k) in descending order and their rows (C, k), equal values by row; 1 <= k <= V */
MOPD_API void mopd_topk(mopd_run run, mopd_plane z, int64_t k, void* values, int64_t* rows);

#if defined(__cplusplus)
}
#endif
#endif

"""The arithmetic of the kernels, written once: online statistics, mixtures, closed-form gradients.

All of it accepts -inf logits (masked tails, forbidden tokens) without making a NaN: differences are
guarded where both sides may be -inf, products where the weight is 0. Tensors have any one shape; scalars
arrive as 0-d tensors of the accumulation dtype (`scalar`).
"""

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)


def kind_of(alpha: float) -> int:
    """The KIND constexpr: the ends of alpha are separate losses, the value between is a run-time number."""
    return {0.0: FORWARD_KL.value, 1.0: REVERSE_KL.value}.get(float(alpha), JENSEN_SHANNON.value)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A number in `dtype`: run-time floats arrive as float64, or as Python floats when interpreting."""
    return tl.full((), value, dtype)


@triton.jit
def guarded(weight, value):
    """weight * value, and 0 where the weight is 0, also for value = inf; NaN for a weight of NaN."""
    return tl.where(weight <= 0, 0.0, weight * value)


@triton.jit
def capped(x, cap, HAS_CAP: tl.constexpr):
    """cap tanh(x / cap), through exp: tanh t = 1 - 2 / (exp(2 t) + 1), exact at both ends."""
    if HAS_CAP:
        x = cap - 2 * cap / (tl.exp(2 * (x / cap)) + 1)
    return x


@triton.jit
def cap_slope(z, cap):
    """d z / d x of the softcap, from z."""
    return 1 - (z / cap) * (z / cap)


@triton.jit
def observe(z, column, maximum, sumexp, moment, argmax, AXIS: tl.constexpr):
    """A tile of logits into running statistics (max, sum e^{z-m}, sum e^{z-m}(z-m), argmax), reduced over AXIS.

    m' = max(m, z), s' = e^{m-m'} s + sum e^{z-m'}, moment' = e^{m-m'} (moment + (m - m') s) + sum e^{z-m'}(z-m').
    Ties go to the lower column. Also returns the factor e^{m-m'} and the weights e^{z-m'}, for a cross moment.
    """
    top = tl.max(z, AXIS)
    at_top = tl.where(z == tl.expand_dims(top, AXIS), column, 2147483647)
    argmax = tl.where(top > maximum, tl.min(at_top, AXIS), argmax)
    risen = tl.maximum(maximum, top)
    base = tl.where(risen > MINUS_INFINITY, risen, 0.0)
    drop = maximum - base
    factor = tl.exp(drop)
    gap = z - tl.expand_dims(base, AXIS)
    weight = tl.exp(gap)
    moment = guarded(factor, moment + drop * sumexp) + tl.sum(guarded(weight, gap), AXIS)
    sumexp = factor * sumexp + tl.sum(weight, AXIS)
    return risen, sumexp, moment, argmax, factor, weight


@triton.jit
def fold(maximum, sumexp, moment, argmax, AXIS: tl.constexpr):
    """Lanes into rows; also the lanes' factors, for a cross moment. Ties go to the lower column."""
    top = tl.max(maximum, AXIS, keep_dims=True)
    alive = maximum > MINUS_INFINITY
    shift = tl.where(alive, maximum - top, 0.0)
    factor = tl.where(alive, tl.exp(shift), 0.0)
    winner = tl.min(tl.where(maximum == top, argmax, 2147483647), AXIS)
    total = tl.sum(factor * sumexp, AXIS)
    moment = tl.sum(guarded(factor, moment + shift * sumexp), AXIS)
    return tl.max(maximum, AXIS), total, moment, winner, factor


@triton.jit
def logaddexp(a, b):
    """log(e^a + e^b), -inf where both are."""
    high = tl.maximum(a, b)
    gap = tl.where(a == b, 0.0, tl.abs(a - b))
    return high + tl.log(1 + tl.exp(-gap))


@triton.jit
def mixture_ratios(log_q, log_p, alpha):
    """log(q / m) and log(p / m), m = (1 - alpha) q + alpha p, d = log p - log q; exactly 0 where q = p.

    With e = -log(1 + share (e^-|d| - 1)) they are e - max(d, 0) and e + min(d, 0), also where d is infinite. The
    hardware's logarithm has an absolute error of 2^-22, which is all there is of e near d = 0; so for |d| < 1/4 they
    are -f and d - f with f = log(1 - alpha + alpha e^d) = sum_n k_n d^n / n! up to n = 6, k_n the cumulants of one draw
    of probability alpha.
    """
    d = tl.where(log_q == log_p, 0.0, log_p - log_q)
    share = tl.where(d > 0, 1 - alpha, alpha)
    e = -tl.log(tl.maximum(1 + share * (tl.exp(-tl.abs(d)) - 1), 1e-37))
    of_q, of_p = e - tl.maximum(d, 0.0), e + tl.minimum(d, 0.0)
    if d.dtype != tl.float64:
        v = alpha * (1 - alpha)
        skew = 1 - 2 * alpha
        k6 = v * (1 - 30 * v + 120 * v * v) * (1 / 720)
        series = v * skew * (1 - 12 * v) * (1 / 120) + d * k6
        series = v * skew * (1 / 6) + d * (v * (1 - 6 * v) * (1 / 24) + d * series)
        f = d * (alpha + d * (v * 0.5 + d * series))
        near = tl.abs(d) < 0.25
        of_q, of_p = tl.where(near, -f, of_q), tl.where(near, d - f, of_p)
    return of_q, of_p


@triton.jit
def divergence_slope(log_q, log_p, student_kl, alpha, KIND: tl.constexpr):
    """d(divergence)/dz of the student, closed form; `student_kl` as in losses.stats.Terms.

    forward q - p;  reverse q (log q - log p - R);  Jensen-Shannon (1 - alpha) q (log q - log m - KL(q||M))
    """
    q = tl.exp(log_q)
    if KIND == FORWARD_KL:
        slope = q - tl.exp(log_p)
    elif KIND == REVERSE_KL:
        slope = guarded(q, log_q - log_p - student_kl)
    else:
        ratio, _ = mixture_ratios(log_q, log_p, alpha)
        slope = guarded(q, (1 - alpha) * (ratio - student_kl))
    return slope


@triton.jit
def logprob_slope(log_q, entropy, is_label, grad_logprob, grad_entropy, grad_lse):
    """d/dz of a·log q[y] + b·H + c·lse: q (c - a - b (log q + H)) + a·1[y]"""
    slope = guarded(tl.exp(log_q), grad_lse - grad_logprob - grad_entropy * (log_q + entropy))
    return slope + tl.where(is_label, grad_logprob, 0.0)


@triton.jit
def filtered(slope, threshold, HAS_FILTER: tl.constexpr):
    """0 where |slope| <= threshold."""
    if HAS_FILTER:
        slope = tl.where(tl.abs(slope) <= threshold, 0.0, slope)
    return slope

/* Memory-bound pieces of a decoder layer in bf16 for the CPU: RMSNorm, rotary embedding, DoRA's gains, gated
 * activation and softmax cross-entropy, forward and backward. Each reads its inputs once, computes in fp32 and rounds once.
 *
 * Compiled at first use by build.py with the machine's compiler; every function has a plain-torch reference in ops.py,
 * and a test that both agree. Rows are independent, so threads share nothing.
 */
#include "steps.h"

#include <math.h>

static inline float to_float(bf16 value) {
    union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
    return u.number;
}

/* Round to nearest even; NaN stays NaN because the payload's top bit survives. */
static inline bf16 to_bf16(float value) {
    union { float number; uint32_t bits; } u = {value};
    uint32_t rounded = u.bits + 0x7fffu + ((u.bits >> 16) & 1u);
    return (bf16)((value != value ? u.bits | 0x400000u : rounded) >> 16);
}

/* exp by 2^n * p(r), |r| <= ln2/2: relative error below 2e-7, vectorised by the compiler. */
static inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float n = rintf(x * 1.44269504088896f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t bits; float number; } scale = {((int32_t)n + 127) << 23};
    return p * scale.number;
}

void rms_norm(const bf16 *x, const float *weight, bf16 *y, float *inverse_rms, long rows, long width, float eps) {
    #pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const bf16 *in = x + t * width;
        bf16 *out = y + t * width;
        float sum = 0.0f;
        #pragma omp simd reduction(+:sum)
        for (long i = 0; i < width; i++) { float v = to_float(in[i]); sum += v * v; }
        float scale = 1.0f / sqrtf(sum / (float)width + eps);
        inverse_rms[t] = scale;
        #pragma omp simd
        for (long i = 0; i < width; i++) out[i] = to_bf16(to_float(in[i]) * scale * weight[i]);
    }
}

void rms_norm_backward(const bf16 *x, const float *weight, const float *inverse_rms, const bf16 *dy, bf16 *dx,
                       long rows, long width) {
    #pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const bf16 *in = x + t * width, *grad = dy + t * width;
        bf16 *out = dx + t * width;
        float scale = inverse_rms[t], dot = 0.0f;
        #pragma omp simd reduction(+:dot)
        for (long i = 0; i < width; i++) dot += to_float(grad[i]) * weight[i] * to_float(in[i]);
        float shared = scale * scale * scale * dot / (float)width;
        #pragma omp simd
        for (long i = 0; i < width; i++)
            out[i] = to_bf16(scale * to_float(grad[i]) * weight[i] - shared * to_float(in[i]));
    }
}

/* Rotate the halves of each head: (a, b) -> (a cos - b sin, b cos + a sin). direction -1 is the backward. */
void rotate(const bf16 *x, const float *cosine, const float *sine, bf16 *y, long rows, long heads, long half,
            float direction) {
    #pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        const float *c = cosine + t * half, *s = sine + t * half;
        for (long h = 0; h < heads; h++) {
            const bf16 *in = x + (t * heads + h) * 2 * half;
            bf16 *out = y + (t * heads + h) * 2 * half;
            #pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = to_float(in[i]), b = to_float(in[half + i]), sn = direction * s[i];
                out[i] = to_bf16(a * c[i] - b * sn);
                out[half + i] = to_bf16(b * c[i] + a * sn);
            }
        }
    }
}

/* y *= gain, per column. */
void scale_columns(bf16 *y, const float *gain, long rows, long width) {
    #pragma omp parallel for schedule(static)
    for (long t = 0; t < rows; t++) {
        bf16 *row = y + t * width;
        #pragma omp simd
        for (long i = 0; i < width; i++) row[i] = to_bf16(to_float(row[i]) * gain[i]);
    }
}

/* For y = gain * x: dx = gain * dy, and per part of the rows the sum of dy * y [parts, width]. */
void scale_columns_backward(const bf16 *dy, const bf16 *y, const float *gain, bf16 *dx, float *sums, long rows,
                            long width, long parts) {
    #pragma omp parallel for schedule(static)
    for (long part = 0; part < parts; part++) {
        float *sum = sums + part * width;
        for (long i = 0; i < width; i++) sum[i] = 0.0f;
        for (long t = part * rows / parts; t < (part + 1) * rows / parts; t++) {
            const bf16 *grad = dy + t * width, *out = y + t * width;
            bf16 *in = dx + t * width;
            #pragma omp simd
            for (long i = 0; i < width; i++) {
                float g = to_float(grad[i]);
                sum[i] += g * to_float(out[i]);
                in[i] = to_bf16(g * gain[i]);
            }
        }
    }
}

/* gelu(tanh) is z * sigmoid(2 u), u = sqrt(2/pi) (z + 0.044715 z^3); silu is z * sigmoid(z). */
static inline float gate_argument(float z, int gelu) {
    return gelu ? 1.5957691216057308f * (z + 0.044715f * z * z * z) : z;
}

static inline float gate_slope(float z, int gelu) {
    return gelu ? 1.5957691216057308f * (1.0f + 0.134145f * z * z) : 1.0f;
}

void gated(const bf16 *gate, const bf16 *up, bf16 *y, long count, int gelu) {
    #pragma omp parallel for schedule(static)
    for (long block = 0; block < (count + 1023) / 1024; block++) {
        long end = block * 1024 + 1024 < count ? block * 1024 + 1024 : count;
        #pragma omp simd
        for (long i = block * 1024; i < end; i++) {
            float z = to_float(gate[i]);
            float sigmoid = 1.0f / (1.0f + fast_exp(-gate_argument(z, gelu)));
            y[i] = to_bf16(z * sigmoid * to_float(up[i]));
        }
    }
}

/* Write d gate, d up and the recomputed forward product, which is cheaper than keeping it. */
void gated_backward(const bf16 *gate, const bf16 *up, const bf16 *dy, bf16 *dgate, bf16 *dup, bf16 *y, long count,
                    int gelu) {
    #pragma omp parallel for schedule(static)
    for (long block = 0; block < (count + 1023) / 1024; block++) {
        long end = block * 1024 + 1024 < count ? block * 1024 + 1024 : count;
        #pragma omp simd
        for (long i = block * 1024; i < end; i++) {
            float z = to_float(gate[i]), u = to_float(up[i]), g = to_float(dy[i]);
            float sigmoid = 1.0f / (1.0f + fast_exp(-gate_argument(z, gelu)));
            float activated = z * sigmoid;
            y[i] = to_bf16(activated * u);
            dup[i] = to_bf16(g * activated);
            dgate[i] = to_bf16(g * u * (sigmoid + activated * (1.0f - sigmoid) * gate_slope(z, gelu)));
        }
    }
}

/* For each row: loss = logsumexp - logit[target], and in place the gradient weight * (softmax - onehot).
 * A logit z means cap * tanh(z / cap) if cap > 0, after multiplication with `scale`. */
static inline float squash(bf16 logit, float scale, float cap) {
    float v = to_float(logit) * scale;
    return cap > 0.0f ? cap * (1.0f - 2.0f / (1.0f + fast_exp(2.0f * v / cap))) : v;
}

void cross_entropy(bf16 *logits, const int64_t *targets, const float *weights, float *losses, long rows, long vocab,
                   float scale, float cap) {
    #pragma omp parallel for schedule(dynamic, 4)
    for (long t = 0; t < rows; t++) {
        bf16 *row = logits + t * vocab;
        float top = -INFINITY, sum = 0.0f, inverse_cap = cap > 0.0f ? 1.0f / cap : 0.0f;
        #pragma omp simd reduction(max:top)
        for (long i = 0; i < vocab; i++) { float v = squash(row[i], scale, cap); top = v > top ? v : top; }
        #pragma omp simd reduction(+:sum)
        for (long i = 0; i < vocab; i++) sum += fast_exp(squash(row[i], scale, cap) - top);
        float wanted = squash(row[targets[t]], scale, cap), inverse = weights[t] / sum;
        losses[t] = top + logf(sum) - wanted;
        bf16 at_target;
        {
            float v = wanted * inverse_cap;
            at_target = to_bf16((fast_exp(wanted - top) * inverse - weights[t]) * scale * (1.0f - v * v));
        }
        #pragma omp simd
        for (long i = 0; i < vocab; i++) {
            float v = squash(row[i], scale, cap), th = v * inverse_cap;
            row[i] = to_bf16(fast_exp(v - top) * inverse * scale * (1.0f - th * th));
        }
        row[targets[t]] = at_target;
    }
}

/* For each row: loss of `tuned` at its target, KL(base || tuned), and 1 if both have the same largest logit, else 0. */
void divergence(const bf16 *base, const bf16 *tuned, const int64_t *targets, float *losses, float *kl, float *same,
                long rows, long vocab, float scale, float cap) {
    #pragma omp parallel for schedule(dynamic, 4)
    for (long t = 0; t < rows; t++) {
        const bf16 *p = base + t * vocab, *q = tuned + t * vocab;
        float top_p = -INFINITY, top_q = -INFINITY, sum_p = 0.0f, sum_q = 0.0f, dot = 0.0f;
        #pragma omp simd reduction(max:top_p, top_q)
        for (long i = 0; i < vocab; i++) {
            float a = squash(p[i], scale, cap), b = squash(q[i], scale, cap);
            top_p = a > top_p ? a : top_p;
            top_q = b > top_q ? b : top_q;
        }
        #pragma omp simd reduction(+:sum_p, sum_q, dot)
        for (long i = 0; i < vocab; i++) {
            float a = squash(p[i], scale, cap), b = squash(q[i], scale, cap), e = fast_exp(a - top_p);
            sum_p += e;
            sum_q += fast_exp(b - top_q);
            dot += e * (a - b);
        }
        float lse_p = top_p + logf(sum_p), lse_q = top_q + logf(sum_q);
        long best_p = 0, best_q = 0; /* of the raw logits: a cap makes large ones equal */
        for (long i = 1; i < vocab; i++) {
            if (to_float(p[i]) > to_float(p[best_p])) best_p = i;
            if (to_float(q[i]) > to_float(q[best_q])) best_q = i;
        }
        losses[t] = lse_q - squash(q[targets[t]], scale, cap);
        kl[t] = dot / sum_p - lse_p + lse_q;
        same[t] = best_p == best_q ? 1.0f : 0.0f;
    }
}

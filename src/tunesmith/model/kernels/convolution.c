/* The short convolution of Gated DeltaNet and Mamba2 with its SiLU, channel by channel, for CPUs with AVX512-BF16,
 * forward and backward.
 *
 *     y_t = silu(bias + sum over k of weight_k x_(back_tk))
 *
 * back_tk is the token k before t on its path, -1 if there is none: segments need no other attention here. The forward
 * takes tokens in turn; a task of the backward is STRIP channels of all tokens, so that no two tasks add to one place.
 * Sums are fp32. mixers/convolution.py is the reference.
 *
 * Shapes: x, y, dx [tokens, channels] bf16; dy the same in fp32; weight, dweight [taps, channels]; bias, dbias
 * [channels] or NULL; back [tokens, taps]. channels are a multiple of LANES.
 */
#include "vectors.h"

#include <string.h>

#ifdef VECTORS

enum { STRIP = 16 * LANES };

typedef struct {
    const bf16 *x;
    const float *weight, *bias;
    const int64_t *back;
    long tokens, channels, taps;
} Convolution;

/* Before the SiLU. */
INLINE __m512 convolve_at(const Convolution *v, long t, long channel) {
    __m512 sum = v->bias ? _mm512_loadu_ps(v->bias + channel) : _mm512_setzero_ps();
    for (long k = 0; k < v->taps; k++) {
        long from = v->back[t * v->taps + k];
        if (from < 0) continue;
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(v->weight + k * v->channels + channel),
                              load_wide(v->x + from * v->channels + channel), sum);
    }
    return sum;
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-(float)M_LOG2E)))));
}

void convolve(const bf16 *x, const float *weight, const float *bias, const int64_t *back, bf16 *y, long tokens,
              long channels, long taps) {
    Convolution v = {x, weight, bias, back, tokens, channels, taps};
    #pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long c = 0; c < channels; c += LANES) {
            __m512 sum = convolve_at(&v, t, c);
            store_narrow(y + t * channels + c, _mm512_mul_ps(sum, sigmoid(sum)));
        }
}

/* dx of some channels; dweight and dbias are added to, if they are wanted. */
static void backward_strip(const Convolution *v, const float *dy, long first, long last, float *sums, bf16 *dx,
                           float *dweight, float *dbias) {
    long width = last - first;
    memset(sums, 0, (size_t)(v->tokens * width) * sizeof(float));
    for (long t = 0; t < v->tokens; t++)
        for (long c = first; c < last; c += LANES) {
            __m512 y = convolve_at(v, t, c), part = sigmoid(y), one = _mm512_set1_ps(1.0f);
            __m512 slope = _mm512_mul_ps(part, _mm512_fmadd_ps(y, _mm512_sub_ps(one, part), one));
            __m512 dsum = _mm512_mul_ps(_mm512_loadu_ps(dy + t * v->channels + c), slope);
            if (dbias) _mm512_storeu_ps(dbias + c, _mm512_add_ps(_mm512_loadu_ps(dbias + c), dsum));
            for (long k = 0; k < v->taps; k++) {
                long from = v->back[t * v->taps + k], tap = k * v->channels + c;
                if (from < 0) continue;
                float *to = sums + from * width + c - first;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(v->weight + tap), dsum, _mm512_loadu_ps(to)));
                if (dweight)
                    _mm512_storeu_ps(dweight + tap, _mm512_fmadd_ps(load_wide(v->x + from * v->channels + c), dsum,
                                                                    _mm512_loadu_ps(dweight + tap)));
            }
        }
    for (long t = 0; t < v->tokens; t++)
        for (long c = first; c < last; c += LANES)
            store_narrow(dx + t * v->channels + c, _mm512_loadu_ps(sums + t * width + c - first));
}

/* dweight and dbias are zeros at first, or NULL. Returns 0, or 1 without memory for the scratch space. */
int convolve_backward(const bf16 *x, const float *weight, const float *bias, const int64_t *back, const float *dy, bf16 *dx,
                      float *dweight, float *dbias, long tokens, long channels, long taps) {
    Convolution v = {x, weight, bias, back, tokens, channels, taps};
    int failed = 0;
    #pragma omp parallel
    {
        float *memory = scratch(tokens * STRIP * (long)sizeof(float));
        if (!memory) failed = 1;
        #pragma omp for schedule(dynamic, 1)
        for (long c = 0; c < channels; c += STRIP)
            if (memory) backward_strip(&v, dy, c, least(c + STRIP, channels), memory, dx, dweight, dbias);
        free(memory);
    }
    return failed;
}

#endif

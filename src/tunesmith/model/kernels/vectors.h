/* Shared by the C files: vectors of bf16 and fp32 for CPUs with AVX512-BF16, their transposition, and the rotary embedding of
 * heads. VECTORS is defined if the processor has the instructions.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VECTORS
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum { LANES = 16 };

INLINE long round_up(long value, long unit) { return (value + unit - 1) / unit * unit; }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE void *scratch(long bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)bytes) ? NULL : memory;
}

/* 2^x = 2^floor(x) * p(x - floor(x)), relative error of p 1e-7; 0 for -inf, NaN stays NaN. */
INLINE __m512 exp2_ps(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, 9);
    __m512 p = _mm512_set1_ps(1.879318648e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.990995096e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.581867596e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.401592715e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931517388e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

INLINE void store_narrow(bf16 *out, __m512 value) {
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE __m512 load_wide(const bf16 *x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

typedef struct { const float *cosine, *sine; } Angles; /* NULL: no rotation */

/* Store vectors of the two halves of a head, rotated: (a cos - b sin, b cos + a sin); back for direction -1. */
INLINE void store_turned(bf16 *out, __m512 a, __m512 b, Angles angles, long place, long half, float direction) {
    if (angles.cosine) {
        __m512 cosine = _mm512_loadu_ps(angles.cosine + place);
        __m512 sine = _mm512_mul_ps(_mm512_loadu_ps(angles.sine + place), _mm512_set1_ps(direction));
        __m512 turned = _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine));
        b = _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine));
        a = turned;
    }
    store_narrow(out, a);
    store_narrow(out + half, b);
}

/* Contiguous rows of one head, rotated. */
INLINE void copy_rows(const bf16 *x, long stride, long length, long width, Angles angles, bf16 *rows) {
    for (long t = 0; t < length; t++)
        for (long d = 0, half = width / 2; d < half; d += LANES)
            store_turned(rows + t * width + d, load_wide(x + t * stride + d), load_wide(x + t * stride + half + d),
                         angles, t * half + d, half, 1.0f);
}

/* out[c][r] = x[r][c] of LANES rows and columns. */
INLINE void turn_block(const float *x, long stride, float *out, long out_stride) {
    __m512 a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) a[i] = _mm512_loadu_ps(x + i * stride);
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    for (int i = 0; i < 4; i++) { /* a[4 s + i] has columns i, i + 4, i + 8, i + 12 of rows 4 s to 4 s + 3 */
        __m512 even_low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd_low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        __m512 even_high = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        __m512 odd_high = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_ps(out + i * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
        _mm512_storeu_ps(out + (i + 4) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_ps(out + (i + 8) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
        _mm512_storeu_ps(out + (i + 12) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
}

#endif

/* One more token per row of a generation: store its key and value, and attend with its queries to everything stored.
 * For CPUs with AVX512-BF16, forward only, with rotary embedding.
 *
 * One task is one row and one key/value head with the query heads that share it. It is bound by reading the stored
 * tokens, which lie in blocks; rows that begin with the same tokens have the same blocks, which then stay in the
 * processor's cache. Scores take bf16 pairs and sum in fp32; softmax (in powers of two) and the sum of the values are
 * fp32.
 *
 * Shapes: q, out [rows, heads, width]; k, v [rows, kv_heads, width]; keys, values [blocks, kv_heads, BLOCK, width];
 * places [rows], the position of each row's new token; tables [rows, columns], the blocks of each row in order; cosine,
 * sine [rows, width / 2], or NULL if q and k are already rotated; sinks [heads], a score of each head that has no value,
 * or NULL. width is a multiple of 64. scale > 0.
 */
#include "steps.h"
#include "vectors.h"

#include <string.h>

#ifdef VECTORS

enum { COLUMNS = 4, STRIP = COLUMNS * LANES, HEADS = 4, BLOCK = 64 /* tokens: a multiple of LANES */ };

typedef struct {
    const bf16 *q, *k, *v;
    bf16 *keys, *values, *out;
    Angles angles;
    const float *sinks;
    const int64_t *places, *tables;
    long rows, heads, kv_heads, width, columns, window;
    float scale;
} Step;

/* The sums of 16 vectors, in order. */
INLINE __m512 sum_each(__m512 v[LANES]) {
    __m512 pairs[8], fours[4], halves[2];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
        fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

/* Raw scores of one query and LANES keys. */
INLINE __m512 score(const bf16 *query, const bf16 *keys, long width) {
    __m512 sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
    for (long d = 0; d < width; d += 2 * LANES) {
        __m512bh part = (__m512bh)_mm512_loadu_si512(query + d);
        for (int i = 0; i < LANES; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], part, (__m512bh)_mm512_loadu_si512(keys + i * width + d));
    }
    return sum_each(sums);
}

/* Turn raw scores of keys begin..end, of which first..length are visible, into weights; returns their normalizer, in
 * which the sink (to base 2) takes its share. */
static float weigh(float *scores, long begin, long first, long length, float scale, float sink) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale * (float)M_LOG2E);
    for (long key = begin; key < length; key += LANES) {
        __mmask16 seen = (__mmask16)(0xffffu << (first > key ? first - key : 0));
        if (length - key < LANES) seen &= (__mmask16)((1u << (length - key)) - 1);
        __m512 value = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, _mm512_loadu_ps(scores + key), factor);
        top = _mm512_max_ps(top, value);
        _mm512_storeu_ps(scores + key, value);
    }
    float peak = fmaxf(_mm512_reduce_max_ps(top), sink);
    __m512 highest = _mm512_set1_ps(peak);
    for (long key = begin; key < length; key += LANES) {
        __m512 value = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + key), highest));
        total = _mm512_add_ps(total, value);
        _mm512_storeu_ps(scores + key, value);
    }
    return 1.0f / (_mm512_reduce_add_ps(total) + exp2f(sink - peak));
}

/* The stored tokens of one head of a row. */
typedef struct {
    const bf16 *stored;
    const int64_t *table;
    long kv_head;
} Stored;

INLINE const bf16 *at(const Step *s, Stored x, long key) {
    return x.stored + ((x.table[key / BLOCK] * s->kv_heads + x.kv_head) * BLOCK + key % BLOCK) * s->width;
}

/* The weighted sum of STRIP columns of the values from `column` on, for several heads at once. */
INLINE void add_values(const Step *s, Stored values, long column, const float *weights, long stride, const float *factors,
                       long first, long length, bf16 *out, const int heads) {
    __m512 sums[HEADS][COLUMNS];
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < COLUMNS; c++) sums[h][c] = _mm512_setzero_ps();
    for (long key = first; key < length;) {
        const bf16 *value = at(s, values, key) + column;
        long end = least(length, (key / BLOCK + 1) * BLOCK);
        for (; key < end; key++, value += s->width) {
            __m512 parts[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) parts[c] = load_wide(value + c * LANES);
            for (int h = 0; h < heads; h++) {
                __m512 weight = _mm512_set1_ps(weights[h * stride + key]);
                for (int c = 0; c < COLUMNS; c++) sums[h][c] = _mm512_fmadd_ps(parts[c], weight, sums[h][c]);
            }
        }
    }
    for (int h = 0; h < heads; h++)
        for (int c = 0; c < COLUMNS; c++)
            store_narrow(out + h * s->width + c * LANES, _mm512_mul_ps(sums[h][c], _mm512_set1_ps(factors[h])));
}

static void step_task(const Step *s, long row, long kv_head, char *memory, long stride) {
    long width = s->width, half = width / 2, group = s->heads / s->kv_heads, place = s->places[row];
    long length = place + 1, first = s->window && length > s->window ? length - s->window : 0;
    long begin = first / LANES * LANES;
    const int64_t *table = s->tables + row * s->columns;
    Stored keys = {s->keys, table, kv_head}, values = {s->values, table, kv_head};
    long new_token = at(s, keys, place) - s->keys;
    Angles angles = s->angles.cosine ? (Angles){s->angles.cosine + row * half, s->angles.sine + row * half} : s->angles;
    float *scores = (float *)memory, *factors = scores + group * stride;
    bf16 *queries = (bf16 *)(factors + round_up(group, LANES)), *out = s->out + (row * s->heads + kv_head * group) * width;
    copy_rows(s->k + (row * s->kv_heads + kv_head) * width, width, 1, width, angles, s->keys + new_token);
    memcpy(s->values + new_token, s->v + (row * s->kv_heads + kv_head) * width, (size_t)width * sizeof(bf16));
    for (long g = 0; g < group; g++)
        copy_rows(s->q + (row * s->heads + kv_head * group + g) * width, width, 1, width, angles, queries + g * width);
    for (long key = begin; key < length; key += LANES)
        for (long g = 0; g < group; g++)
            _mm512_storeu_ps(scores + g * stride + key, score(queries + g * width, at(s, keys, key), width));
    for (long g = 0; g < group; g++) {
        float sink = s->sinks ? s->sinks[kv_head * group + g] * (float)M_LOG2E : -INFINITY;
        factors[g] = weigh(scores + g * stride, begin, first, length, s->scale, sink);
    }
    for (long g = 0; g < group; g += HEADS)
        for (long d = 0; d < width; d += STRIP) {
            const float *weights = scores + g * stride;
            switch (least(group - g, HEADS)) { /* a compile-time constant */
                case 1: add_values(s, values, d, weights, stride, factors + g, first, length, out + g * width + d, 1); break;
                case 2: add_values(s, values, d, weights, stride, factors + g, first, length, out + g * width + d, 2); break;
                case 3: add_values(s, values, d, weights, stride, factors + g, first, length, out + g * width + d, 3); break;
                default: add_values(s, values, d, weights, stride, factors + g, first, length, out + g * width + d, HEADS);
            }
        }
}

/* Returns 0, or 1 without memory for the scratch space. */
int attend_rows(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, bf16 *out, const float *cosine,
                const float *sine, const float *sinks, const int64_t *places, const int64_t *tables, long rows, long heads,
                long kv_heads, long width, long columns, long window, float scale) {
    Step step = {q, k, v, keys, values, out, {cosine, sine}, sinks, places, tables, rows, heads, kv_heads, width, columns,
                 window, scale};
    long stride = columns * BLOCK + LANES, group = heads / kv_heads; /* so that heads do not share cache sets */
    int failed = 0;
    #pragma omp parallel
    {
        char *memory = scratch((group * stride + round_up(group, LANES)) * (long)sizeof(float) + group * width * 2);
        if (!memory) failed = 1;
        #pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < rows * kv_heads; task++)
            if (memory) step_task(&step, task / kv_heads, task % kv_heads, memory, stride);
        free(memory);
    }
    return failed;
}

#endif

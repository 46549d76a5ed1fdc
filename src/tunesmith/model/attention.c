/* Causal attention of packed documents in bf16 for CPUs with AVX512-BF16, forward and backward.
 *
 * One task is one document and one key/value head, with the query heads that share it: keys and values are re-ordered
 * once for the dot-product instruction, gradients of keys and values stay private to the task. A block of ROWS queries
 * sees its whole row of scores at once (no running maximum), from the first key its window reaches to its own.
 * Products take bf16 pairs and sum in fp32; softmax is fp32.
 *
 * Shapes: q, out, dq [tokens, heads, width]; k, v, dk, dv [tokens, kv_heads, width]; width a multiple of 64.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

typedef uint16_t bf16;

enum { ROWS = 6, LANES = 16, COLUMNS = 64, BLOCK = 48 }; /* BLOCK: queries whose gradients of k and v are summed at once */

int attention_available(void) { return 1; }

static inline long round_up(long value, long unit) { return (value + unit - 1) / unit * unit; }

static void *scratch(long bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)bytes) ? NULL : memory;
}

static inline __m512 exp_ps(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x); /* in this order a NaN stays one */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 120.0f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* sums[r][c] += sum over depth of pair a[r, p] . pair b[p, c]: ROWS rows, COLUMNS columns, pairs of bf16. */
static inline __attribute__((always_inline)) void multiply(const uint32_t *a, long a_row, long a_step, const uint32_t *b,
                                                           long b_step, long depth, __m512 sums[ROWS][4]) {
    for (long p = 0; p < depth; p++) {
        __m512bh right[4];
        for (int c = 0; c < 4; c++) right[c] = (__m512bh)_mm512_loadu_si512(b + p * b_step + c * LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + p * a_step]);
            for (int c = 0; c < 4; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, right[c]);
        }
    }
}

static inline __attribute__((always_inline)) void clear(__m512 sums[ROWS][4]) {
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++) sums[r][c] = _mm512_setzero_ps();
}

/* Columns first + 0..15 that query `row` may see: not ahead of it, and at most window - 1 behind. */
static inline __mmask16 visible(long row, long first, long window) {
    long ahead = row - first + 1, behind = window ? row - window + 1 - first : 0;
    __mmask16 upto = ahead >= LANES ? 0xffff : (ahead <= 0 ? 0 : (__mmask16)((1u << ahead) - 1));
    __mmask16 before = behind <= 0 ? 0 : (behind >= LANES ? 0xffff : (__mmask16)((1u << behind) - 1));
    return upto & ~before;
}

static inline __m512i pair_rows(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Contiguous rows of one head, zeros after the last. */
static void gather(const bf16 *x, long stride, long length, long padded, long width, bf16 *rows) {
    for (long t = 0; t < length; t++) memcpy(rows + t * width, x + t * stride, (size_t)width * 2);
    memset(rows + length * width, 0, (size_t)((padded - length) * width) * 2);
}

/* pairs along the width, keys across: out[d / 2][key]. For products over the width. */
static void across(const bf16 *rows, long padded, long width, uint32_t *out) {
    const uint32_t *pairs = (const uint32_t *)rows;
    for (long first = 0; first < padded; first += LANES)
        for (long p = 0; p < width / 2; p++)
            for (long t = first; t < first + LANES; t++) out[p * padded + t] = pairs[t * (width / 2) + p];
}

/* pairs of neighbouring rows, width across: out[row / 2][d]. For products over the rows. */
static void along(const bf16 *rows, long padded, long width, uint32_t *out) {
    for (long t = 0; t < padded; t += 2)
        for (long d = 0; d < width; d++)
            out[t / 2 * width + d] = (uint32_t)rows[t * width + d] | (uint32_t)rows[(t + 1) * width + d] << 16;
}

static inline void store_rows(__m512 sums[ROWS][4], long first, long length, bf16 *out, long stride, const float *factor) {
    for (int r = 0; r < ROWS && first + r < length; r++)
        for (int c = 0; c < 4; c++) {
            __m512 value = _mm512_mul_ps(sums[r][c], _mm512_set1_ps(factor[r]));
            _mm256_storeu_si256((__m256i *)(out + (first + r) * stride + c * LANES),
                                (__m256i)_mm512_cvtneps_pbh(value));
        }
}

typedef struct {
    long heads, kv_heads, width, window;
    float scale;
} Shape;

static inline long first_key(long row, long window) {
    return window && row - window + 1 > 0 ? (row - window + 1) / COLUMNS * COLUMNS : 0;
}

static void forward_task(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, long length, long kv_head,
                         Shape s, char *memory) {
    long padded = round_up(length, COLUMNS), rows = round_up(length, BLOCK), width = s.width, group = s.heads / s.kv_heads;
    long most = padded > rows ? padded : rows;
    bf16 *head = (bf16 *)memory;
    uint32_t *keys = (uint32_t *)(head + most * width), *values = keys + padded * width / 2;
    float *scores = (float *)(values + padded * width / 2);
    bf16 *weights = (bf16 *)(scores + ROWS * padded);
    gather(k + kv_head * width, s.kv_heads * width, length, padded, width, head);
    across(head, padded, width, keys);
    gather(v + kv_head * width, s.kv_heads * width, length, padded, width, head);
    along(head, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(q + h * width, s.heads * width, length, rows, width, head);
        for (long row = 0; row < length; row += ROWS) {
            long begin = first_key(row, s.window), last = row + ROWS < length ? row + ROWS : length;
            long end = round_up(last, COLUMNS);
            __m512 top[ROWS], sums[ROWS][4];
            float factor[ROWS];
            for (int r = 0; r < ROWS; r++) top[r] = _mm512_set1_ps(-INFINITY);
            for (long key = begin; key < end; key += COLUMNS) {
                clear(sums);
                multiply((uint32_t *)(head + row * width), width / 2, 1, keys + key, padded, width / 2, sums);
                for (int r = 0; r < ROWS; r++)
                    for (int c = 0; c < 4; c++) {
                        __mmask16 seen = visible(row + r, key + c * LANES, s.window);
                        __m512 value = _mm512_mul_ps(sums[r][c], _mm512_set1_ps(s.scale));
                        value = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, value);
                        top[r] = _mm512_max_ps(top[r], value);
                        _mm512_storeu_ps(scores + r * padded + key + c * LANES, value);
                    }
            }
            for (int r = 0; r < ROWS; r++) {
                float highest = _mm512_reduce_max_ps(top[r]);
                __m512 total = _mm512_setzero_ps();
                for (long key = begin; key < end; key += LANES) {
                    __mmask16 seen = visible(row + r, key, s.window);
                    __m512 value = _mm512_sub_ps(_mm512_loadu_ps(scores + r * padded + key), _mm512_set1_ps(highest));
                    value = _mm512_maskz_mov_ps(seen, exp_ps(value));
                    total = _mm512_add_ps(total, value);
                    _mm256_storeu_si256((__m256i *)(weights + r * padded + key), (__m256i)_mm512_cvtneps_pbh(value));
                }
                float sum = _mm512_reduce_add_ps(total);
                factor[r] = 1.0f / sum;
                if (row + r < length) lse[(row + r) * s.heads + h] = highest + logf(sum);
            }
            for (long d = 0; d < width; d += COLUMNS) {
                clear(sums);
                multiply((uint32_t *)(weights + begin), padded / 2, 1, values + begin / 2 * width + d, width,
                         (end - begin) / 2, sums);
                store_rows(sums, row, length, out + h * width + d, s.heads * width, factor);
            }
        }
    }
}

/* sum[key, d] += over the block's rows of weight[row, key] * x[row, d], for keys begin..end. */
static void add_products(const uint32_t *weights, long padded, const uint32_t *x, long width, long begin, long end,
                         float *sum) {
    __m512 sums[ROWS][4];
    for (long key = begin; key < end; key += ROWS) /* up to ROWS - 1 keys past `end`: the buffers have room, values 0 */
        for (long d = 0; d < width; d += COLUMNS) {
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 4; c++) sums[r][c] = _mm512_loadu_ps(sum + (key + r) * width + d + c * LANES);
            multiply(weights + key, 1, padded, x + d, width, BLOCK / 2, sums);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 4; c++) _mm512_storeu_ps(sum + (key + r) * width + d + c * LANES, sums[r][c]);
        }
}

static void write_narrow(const float *sum, long length, long width, bf16 *out, long stride) {
    for (long t = 0; t < length; t++)
        for (long d = 0; d < width; d += LANES)
            _mm256_storeu_si256((__m256i *)(out + t * stride + d),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sum + t * width + d)));
}

static void backward_task(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *lse, const bf16 *dout,
                          bf16 *dq, bf16 *dk, bf16 *dv, long length, long kv_head, Shape s, char *memory) {
    long padded = round_up(length, COLUMNS) + COLUMNS, rows = round_up(length, BLOCK), width = s.width;
    long group = s.heads / s.kv_heads, most = padded > rows ? padded : rows;
    float *dkeys = (float *)memory, *dvalues = dkeys + padded * width;
    uint32_t *keys = (uint32_t *)(dvalues + padded * width), *values = keys + padded * width / 2;
    uint32_t *key_pairs = values + padded * width / 2, *query_pairs = key_pairs + padded * width / 2;
    uint32_t *dout_pairs = query_pairs + most * width / 2;
    uint32_t *weights = dout_pairs + most * width / 2, *slopes = weights + BLOCK / 2 * padded;
    bf16 *slope_rows = (bf16 *)(slopes + BLOCK / 2 * padded), *queries = slope_rows + ROWS * padded;
    bf16 *douts = queries + most * width;
    memset(dkeys, 0, (size_t)(2 * padded * width) * 4);
    gather(k + kv_head * width, s.kv_heads * width, length, padded, width, queries);
    across(queries, padded, width, keys);
    along(queries, padded, width, key_pairs);
    gather(v + kv_head * width, s.kv_heads * width, length, padded, width, queries);
    across(queries, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(q + h * width, s.heads * width, length, rows, width, queries);
        gather(dout + h * width, s.heads * width, length, rows, width, douts);
        along(queries, rows, width, query_pairs);
        along(douts, rows, width, dout_pairs);
        for (long block = 0; block < rows; block += BLOCK) {
            long begin = first_key(block, s.window), last = block + BLOCK < length ? block + BLOCK : length;
            long end = round_up(last, COLUMNS);
            for (long row = block; row < block + BLOCK; row += ROWS) {
                __m512 sums[ROWS][4];
                float delta[ROWS], offset[ROWS], one[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    long t = row + r;
                    one[r] = 1.0f;
                    offset[r] = t < length ? lse[t * s.heads + h] : INFINITY;
                    __m512 dot = _mm512_setzero_ps();
                    for (long d = 0; t < length && d < width; d += 2 * LANES)
                        dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_loadu_si512(douts + t * width + d),
                                               (__m512bh)_mm512_loadu_si512(out + (t * s.heads + h) * width + d));
                    delta[r] = _mm512_reduce_add_ps(dot);
                }
                for (long key = begin; key < end; key += COLUMNS) {
                    float kept[ROWS][COLUMNS] __attribute__((aligned(64)));
                    long place = (row - block) / 2 * padded + key;
                    clear(sums);
                    multiply((uint32_t *)(queries + row * width), width / 2, 1, keys + key, padded, width / 2, sums);
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < 4; c++) {
                            __mmask16 seen = row + r < length ? visible(row + r, key + c * LANES, s.window) : 0;
                            __m512 value = _mm512_fmsub_ps(sums[r][c], _mm512_set1_ps(s.scale), _mm512_set1_ps(offset[r]));
                            _mm512_store_ps(&kept[r][c * LANES], _mm512_maskz_mov_ps(seen, exp_ps(value)));
                        }
                    for (int r = 0; r < ROWS; r += 2)
                        for (int c = 0; c < COLUMNS; c += LANES)
                            _mm512_storeu_si512(weights + place + r / 2 * padded + c,
                                                pair_rows(_mm512_load_ps(&kept[r][c]), _mm512_load_ps(&kept[r + 1][c])));
                    clear(sums);
                    multiply((uint32_t *)(douts + row * width), width / 2, 1, values + key, padded, width / 2, sums);
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < 4; c++) {
                            __m512 value = _mm512_sub_ps(sums[r][c], _mm512_set1_ps(delta[r]));
                            value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(s.scale)),
                                                  _mm512_load_ps(&kept[r][c * LANES]));
                            _mm512_store_ps(&kept[r][c * LANES], value);
                            _mm256_storeu_si256((__m256i *)(slope_rows + r * padded + key + c * LANES),
                                                (__m256i)_mm512_cvtneps_pbh(value));
                        }
                    for (int r = 0; r < ROWS; r += 2)
                        for (int c = 0; c < COLUMNS; c += LANES)
                            _mm512_storeu_si512(slopes + place + r / 2 * padded + c,
                                                pair_rows(_mm512_load_ps(&kept[r][c]), _mm512_load_ps(&kept[r + 1][c])));
                }
                for (long d = 0; d < width; d += COLUMNS) {
                    clear(sums);
                    multiply((uint32_t *)(slope_rows + begin), padded / 2, 1, key_pairs + begin / 2 * width + d, width,
                             (end - begin) / 2, sums);
                    store_rows(sums, row, length, dq + h * width + d, s.heads * width, one);
                }
            }
            for (long r = 0; r < BLOCK / 2; r++) /* the overhang of add_products */
                memset(weights + r * padded + end, 0, ROWS * 4), memset(slopes + r * padded + end, 0, ROWS * 4);
            add_products(weights, padded, dout_pairs + block / 2 * width, width, begin, end, dvalues);
            add_products(slopes, padded, query_pairs + block / 2 * width, width, begin, end, dkeys);
        }
    }
    write_narrow(dkeys, length, width, dk + kv_head * width, s.kv_heads * width);
    write_narrow(dvalues, length, width, dv + kv_head * width, s.kv_heads * width);
}

static long longest(const int64_t *lengths, long documents) {
    long most = 0;
    for (long i = 0; i < documents; i++) most = lengths[i] > most ? lengths[i] : most;
    return round_up(most, COLUMNS) + COLUMNS + BLOCK;
}

/* Both return 0, or 1 when there was no memory for the scratch space. */
int attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const int64_t *starts,
                      const int64_t *lengths, long documents, long heads, long kv_heads, long width, long window,
                      float scale) {
    Shape s = {heads, kv_heads, width, window, scale};
    long most = longest(lengths, documents);
    int failed = 0;
    #pragma omp parallel
    {
        char *memory = scratch(most * (width * 6 + ROWS * 6));
        if (!memory) failed = 1;
        #pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < documents * kv_heads; task++) {
            long start = starts[task / kv_heads];
            if (memory)
                forward_task(q + start * heads * width, k + start * kv_heads * width, v + start * kv_heads * width,
                             out + start * heads * width, lse + start * heads, lengths[task / kv_heads],
                             task % kv_heads, s, memory);
        }
        free(memory);
    }
    return failed;
}

int attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *lse, const bf16 *dout,
                       bf16 *dq, bf16 *dk, bf16 *dv, const int64_t *starts, const int64_t *lengths, long documents,
                       long heads, long kv_heads, long width, long window, float scale) {
    Shape s = {heads, kv_heads, width, window, scale};
    long most = longest(lengths, documents);
    int failed = 0;
    #pragma omp parallel
    {
        char *memory = scratch(most * (width * 22 + BLOCK * 4 + ROWS * 2));
        if (!memory) failed = 1;
        #pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < documents * kv_heads; task++) {
            long start = starts[task / kv_heads], to_q = start * heads * width, to_k = start * kv_heads * width;
            if (memory)
                backward_task(q + to_q, k + to_k, v + to_k, out + to_q, lse + start * heads, dout + to_q, dq + to_q,
                              dk + to_k, dv + to_k, lengths[task / kv_heads], task % kv_heads, s, memory);
        }
        free(memory);
    }
    return failed;
}

#else
int attention_available(void) { return 0; }
#endif

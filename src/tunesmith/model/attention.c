/* Causal attention of packed documents in bf16 for CPUs with AVX512-BF16, forward and backward.
 *
 * One task is one document and one key/value head, with the query heads that share it: keys and values are re-ordered
 * once for the dot-product instruction, gradients of keys and values stay private to the task. ROWS queries at a time
 * meet tiles of TILE keys; the tile that holds the diagonal stops at the next LANES keys, and only tiles that are not
 * wholly visible are masked. The forward sees whole rows of scores (no running maximum). The backward takes BLOCK
 * queries, then adds what they give to the gradients of all their keys and values.
 * Products take bf16 pairs and sum in fp32; softmax is fp32, in powers of two.
 *
 * Shapes: q, out, dq [tokens, heads, width]; k, v, dk, dv [tokens, kv_heads, width]; width a multiple of 64; scale > 0.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum { ROWS = 6, LANES = 16, COLUMNS = 4, TILE = COLUMNS * LANES, BLOCK = 48 }; /* BLOCK: a multiple of ROWS and LANES */

int attention_available(void) { return 1; }

INLINE long round_up(long value, long unit) { return (value + unit - 1) / unit * unit; }
INLINE long least(long a, long b) { return a < b ? a : b; }

static void *scratch(long bytes) {
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

/* sums[r][c] += sum over depth of pair a[r, p] . pair b[p, c]: ROWS rows, `columns` vectors, pairs of bf16. */
INLINE void multiply(const uint32_t *a, long a_row, long a_step, const uint32_t *b, long b_step, long depth,
                     const int columns, __m512 sums[ROWS][COLUMNS]) {
    for (long p = 0; p < depth; p++) {
        __m512bh right[COLUMNS];
        for (int c = 0; c < columns; c++) right[c] = (__m512bh)_mm512_loadu_si512(b + p * b_step + c * LANES);
        for (int r = 0; r < ROWS; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * a_row + p * a_step]);
            for (int c = 0; c < columns; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, right[c]);
        }
    }
}

INLINE void clear(__m512 sums[ROWS][COLUMNS]) {
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_setzero_ps();
}

/* Keys first + 0..15 that query `row` may see: not ahead of it, and at most window - 1 behind. */
INLINE __mmask16 visible(long row, long first, long window) {
    long ahead = row - first + 1, behind = window ? row - window + 1 - first : 0;
    __mmask16 upto = ahead >= LANES ? 0xffff : (ahead <= 0 ? 0 : (__mmask16)((1u << ahead) - 1));
    __mmask16 before = behind <= 0 ? 0 : (behind >= LANES ? 0xffff : (__mmask16)((1u << behind) - 1));
    return upto & ~before;
}

/* The first key that `row` sees, rounded down. */
INLINE long first_key(long row, long window, long unit) {
    return window && row >= window ? (row - window + 1) / unit * unit : 0;
}

/* bf16 pairs (even[i], odd[i]). */
INLINE __m512i pair_rows(__m512 even, __m512 odd) {
    static const uint16_t order[32] __attribute__((aligned(64))) = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

INLINE void store_narrow(bf16 *out, __m512 value) { _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(value)); }

/* Contiguous rows of one head, zeros after the last. */
static void gather(const bf16 *x, long stride, long length, long padded, long width, bf16 *rows) {
    for (long t = 0; t < length; t++) memcpy(rows + t * width, x + t * stride, (size_t)width * 2);
    memset(rows + length * width, 0, (size_t)((padded - length) * width) * 2);
}

/* Pairs along the width, keys across: out[key / TILE][d / 2][key % TILE]. For products over the width. */
static void across(const bf16 *rows, long padded, long width, uint32_t *out) {
    const uint32_t *pairs = (const uint32_t *)rows;
    for (long t = 0; t < padded; t++)
        for (long p = 0; p < width / 2; p++)
            out[t / TILE * TILE * width / 2 + p * TILE + t % TILE] = pairs[t * (width / 2) + p];
}

/* Pairs of neighbouring rows, width across: out[row / 2][d]. For products over the rows. */
static void along(const bf16 *rows, long padded, long width, uint32_t *out) {
    for (long t = 0; t < padded; t += 2)
        for (long d = 0; d < width; d++)
            out[t / 2 * width + d] = (uint32_t)rows[t * width + d] | (uint32_t)rows[(t + 1) * width + d] << 16;
}

INLINE void store_rows(__m512 sums[ROWS][COLUMNS], long first, long length, bf16 *out, long stride, const float *factor) {
    for (int r = 0; r < ROWS && first + r < length; r++)
        for (int c = 0; c < COLUMNS; c++)
            store_narrow(out + (first + r) * stride + c * LANES, _mm512_mul_ps(sums[r][c], _mm512_set1_ps(factor[r])));
}

typedef struct {
    long heads, kv_heads, width, window;
    float scale;
} Shape;

/* ROWS queries from `row` and the keys from `key`: where they are and where their results go. */
typedef struct {
    const bf16 *queries, *douts;
    const uint32_t *keys, *values;
    long width, row, key, window, stride;
    float scale;
    __m512 *top;
    float *scores;
    const float *offset, *delta;
    uint32_t *weights, *slopes;
    bf16 *slope_rows;
} Tile;

/* Products with 16 * columns keys: raw scores, -inf where masked, and the highest of each lane. */
INLINE void score_tile(const Tile *t, const int columns, const int masked) {
    __m512 sums[ROWS][COLUMNS];
    clear(sums);
    multiply((const uint32_t *)t->queries, t->width / 2, 1, t->keys, TILE, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++) {
            __m512 value = sums[r][c];
            if (masked)
                value = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), visible(t->row + r, t->key + c * LANES, t->window), value);
            t->top[r] = _mm512_max_ps(t->top[r], value);
            _mm512_storeu_ps(t->scores + r * t->stride + c * LANES, value);
        }
}

/* The softmax weights again, and the gradients of the scores ("slopes"), each as pairs of rows; slopes also as rows. */
INLINE void slope_tile(const Tile *t, const int columns, const int masked) {
    __m512 sums[ROWS][COLUMNS], kept[ROWS][COLUMNS];
    clear(sums);
    multiply((const uint32_t *)t->douts, t->width / 2, 1, t->values, TILE, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++)
            kept[r][c] = _mm512_fmsub_ps(sums[r][c], _mm512_set1_ps(t->scale), _mm512_set1_ps(t->delta[r]));
    clear(sums);
    multiply((const uint32_t *)t->queries, t->width / 2, 1, t->keys, TILE, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++) {
            __m512 weight = exp2_ps(_mm512_fmsub_ps(sums[r][c], _mm512_set1_ps(t->scale * (float)M_LOG2E),
                                                    _mm512_set1_ps(t->offset[r])));
            if (masked) weight = _mm512_maskz_mov_ps(visible(t->row + r, t->key + c * LANES, t->window), weight);
            sums[r][c] = weight;
            kept[r][c] = _mm512_mul_ps(kept[r][c], weight);
            store_narrow(t->slope_rows + r * t->stride + c * LANES, kept[r][c]);
            if (r % 2 == 0) continue;
            _mm512_storeu_si512(t->weights + r / 2 * t->stride + c * LANES, pair_rows(sums[r - 1][c], weight));
            _mm512_storeu_si512(t->slopes + r / 2 * t->stride + c * LANES, pair_rows(kept[r - 1][c], kept[r][c]));
        }
}

/* Runs `task` on as many columns as there are keys up to `end` in this tile; returns the next key. */
#define ON_TILE(task, tile, end)                                                                                       \
    do {                                                                                                               \
        long next_ = least(round_up((tile).key + 1, TILE), end), columns_ = (next_ - (tile).key) / LANES;              \
        int whole_ = (tile).key + TILE <= (tile).row + 1 && first_key((tile).row + ROWS - 1, (tile).window, 1) <= (tile).key;  \
        if (columns_ == 4 && whole_) task(&(tile), 4, 0);                                                              \
        else if (columns_ == 4) task(&(tile), 4, 1);                                                                   \
        else if (columns_ == 3) task(&(tile), 3, 1);                                                                   \
        else if (columns_ == 2) task(&(tile), 2, 1);                                                                   \
        else task(&(tile), 1, 1);                                                                                      \
    } while (0)

static void forward_task(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, long length, long kv_head,
                         Shape s, char *memory) {
    long width = s.width, group = s.heads / s.kv_heads, padded = round_up(length, TILE) + TILE, stride = padded + LANES;
    bf16 *head = (bf16 *)memory;
    uint32_t *keys = (uint32_t *)(head + padded * width), *values = keys + padded * width / 2;
    float *scores = (float *)(values + padded * width / 2);
    bf16 *weights = (bf16 *)(scores + ROWS * stride);
    gather(k + kv_head * width, s.kv_heads * width, length, padded, width, head);
    across(head, padded, width, keys);
    gather(v + kv_head * width, s.kv_heads * width, length, padded, width, head);
    along(head, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(q + h * width, s.heads * width, length, padded, width, head);
        for (long row = 0; row < length; row += ROWS) {
            long begin = first_key(row, s.window, LANES), end = round_up(least(row + ROWS, length), LANES);
            __m512 top[ROWS], sums[ROWS][COLUMNS], scale = _mm512_set1_ps(s.scale * (float)M_LOG2E);
            float factor[ROWS];
            for (int r = 0; r < ROWS; r++) top[r] = _mm512_set1_ps(-INFINITY);
            Tile t = {.queries = head + row * width, .width = width, .row = row, .window = s.window, .stride = stride, .top = top};
            for (long key = begin; key < end; key = round_up(key + 1, TILE)) {
                t.key = key, t.keys = keys + key / TILE * TILE * width / 2 + key % TILE, t.scores = scores + key;
                ON_TILE(score_tile, t, end);
            }
            for (int r = 0; r < ROWS; r++) {
                float highest = _mm512_reduce_max_ps(top[r]) * (s.scale * (float)M_LOG2E);
                __m512 total = _mm512_setzero_ps();
                for (long key = begin; key < end; key += LANES) {
                    __m512 score = _mm512_loadu_ps(scores + r * stride + key);
                    __m512 value = exp2_ps(_mm512_fmsub_ps(score, scale, _mm512_set1_ps(highest)));
                    total = _mm512_add_ps(total, value);
                    store_narrow(weights + r * stride + key, value);
                }
                float sum = _mm512_reduce_add_ps(total);
                factor[r] = 1.0f / sum;
                if (row + r < length) lse[(row + r) * s.heads + h] = highest + log2f(sum);
            }
            for (long d = 0; d < width; d += TILE) {
                clear(sums);
                multiply((uint32_t *)(weights + begin), stride / 2, 1, values + begin / 2 * width + d, width,
                         least(row + ROWS, end) / 2 - begin / 2, COLUMNS, sums);
                store_rows(sums, row, length, out + h * width + d, s.heads * width, factor);
            }
        }
    }
}

/* sum[key, d] += over the rows of a block of weight[row, key] * x[row, d], for keys begin..end and rows not before. */
static void add_products(const uint32_t *weights, long stride, const uint32_t *x, long width, long block, long begin,
                         long end, float *sum) {
    __m512 sums[ROWS][COLUMNS];
    for (long key = begin; key < end; key += ROWS)
        for (long d = 0; d < width; d += TILE) {
            long first = key > block ? (key - block) / 2 : 0;
            float *place = sum + key * width + d;
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_loadu_ps(place + r * width + c * LANES);
            multiply(weights + first * stride + key, 1, stride, x + first * width + d, width,
                     (end - block) / 2 - first, COLUMNS, sums);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) _mm512_storeu_ps(place + r * width + c * LANES, sums[r][c]);
        }
}

static void write_narrow(const float *sum, long length, long width, bf16 *out, long stride) {
    for (long t = 0; t < length; t++)
        for (long d = 0; d < width; d += LANES) store_narrow(out + t * stride + d, _mm512_loadu_ps(sum + t * width + d));
}

static void backward_task(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *lse, const bf16 *dout,
                          bf16 *dq, bf16 *dk, bf16 *dv, long length, long kv_head, Shape s, char *memory) {
    long width = s.width, group = s.heads / s.kv_heads, padded = round_up(length, TILE) + TILE, stride = padded + LANES;
    float *dkeys = (float *)memory, *dvalues = dkeys + padded * width;
    uint32_t *keys = (uint32_t *)(dvalues + padded * width), *values = keys + padded * width / 2;
    uint32_t *key_pairs = values + padded * width / 2, *query_pairs = key_pairs + padded * width / 2;
    uint32_t *dout_pairs = query_pairs + padded * width / 2;
    uint32_t *weights = dout_pairs + padded * width / 2, *slopes = weights + BLOCK / 2 * stride;
    bf16 *slope_rows = (bf16 *)(slopes + BLOCK / 2 * stride), *queries = slope_rows + ROWS * stride;
    bf16 *douts = queries + padded * width;
    const float one[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    memset(dkeys, 0, (size_t)(2 * padded * width) * 4);
    gather(k + kv_head * width, s.kv_heads * width, length, padded, width, queries);
    across(queries, padded, width, keys);
    along(queries, padded, width, key_pairs);
    gather(v + kv_head * width, s.kv_heads * width, length, padded, width, queries);
    across(queries, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(q + h * width, s.heads * width, length, padded, width, queries);
        gather(dout + h * width, s.heads * width, length, padded, width, douts);
        along(queries, padded, width, query_pairs);
        along(douts, padded, width, dout_pairs);
        for (long block = 0; block < length; block += BLOCK) {
            long begin = first_key(block, s.window, BLOCK), last = least(block + BLOCK, round_up(length, ROWS));
            for (long row = block; row < last; row += ROWS) {
                __m512 sums[ROWS][COLUMNS];
                float delta[ROWS], offset[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    long t = row + r;
                    offset[r] = t < length ? lse[t * s.heads + h] : INFINITY;
                    __m512 dot = _mm512_setzero_ps();
                    for (long d = 0; t < length && d < width; d += 2 * LANES)
                        dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_loadu_si512(douts + t * width + d),
                                               (__m512bh)_mm512_loadu_si512(out + (t * s.heads + h) * width + d));
                    delta[r] = _mm512_reduce_add_ps(dot) * s.scale;
                }
                Tile t = {.queries = queries + row * width, .douts = douts + row * width, .width = width, .row = row,
                          .window = s.window, .stride = stride, .scale = s.scale, .offset = offset, .delta = delta};
                long end = round_up(row + ROWS, LANES);
                for (long key = begin; key < end; key = round_up(key + 1, TILE)) {
                    long packed = key / TILE * TILE * width / 2 + key % TILE, place = (row - block) / 2 * stride + key;
                    t.key = key, t.keys = keys + packed, t.values = values + packed;
                    t.weights = weights + place, t.slopes = slopes + place, t.slope_rows = slope_rows + key;
                    ON_TILE(slope_tile, t, end);
                }
                for (long d = 0; d < width; d += TILE) {
                    clear(sums);
                    multiply((uint32_t *)(slope_rows + begin), stride / 2, 1, key_pairs + begin / 2 * width + d, width,
                             (row + ROWS - begin) / 2, COLUMNS, sums);
                    store_rows(sums, row, length, dq + h * width + d, s.heads * width, one);
                }
            }
            add_products(weights, stride, dout_pairs + block / 2 * width, width, block, begin, last, dvalues);
            add_products(slopes, stride, query_pairs + block / 2 * width, width, block, begin, last, dkeys);
        }
    }
    write_narrow(dkeys, length, width, dk + kv_head * width, s.kv_heads * width);
    write_narrow(dvalues, length, width, dv + kv_head * width, s.kv_heads * width);
}

static long longest(const int64_t *lengths, long documents) {
    long most = 0;
    for (long i = 0; i < documents; i++) most = lengths[i] > most ? lengths[i] : most;
    return round_up(most, TILE) + TILE + LANES;
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

/* Causal attention of packed documents in bf16 for CPUs with AVX512-BF16, forward and backward, with rotary embedding.
 *
 * One task is one document and one key/value head, with the query heads that share it: keys and values are turned and
 * re-ordered once for the dot-product instruction, gradients of keys and values stay private to the task. ROWS queries
 * at a time meet tiles of TILE keys; the tile with the diagonal stops at the next LANES keys, and only tiles that are
 * not wholly visible are masked. The forward sees whole rows of scores (no running maximum). The backward takes BLOCK
 * queries, then adds what they give to the gradients of all their keys and values.
 * Products take bf16 pairs and sum in fp32; softmax is fp32, in powers of two.
 *
 * Shapes: q, out, dq [tokens, heads, width]; k, v, dk, dv [tokens, kv_heads, width]; width a multiple of 64;
 * lse [tokens, heads]; cosine, sine [tokens, width / 2], or NULL where q and k are turned already. scale > 0.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

enum { ROWS = 6, LANES = 16, COLUMNS = 4, TILE = COLUMNS * LANES, BLOCK = 96 }; /* a multiple of ROWS and LANES */

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

/* sums[r][c] += sum over depth of pair a[r, p] . pair b[p, c]: ROWS rows, `columns` vectors, pairs of bf16. The second
 * two vectors of b lie `half` after the first two. */
INLINE void multiply(const uint32_t *a, long a_row, long a_step, const uint32_t *b, long b_step, long half, long depth,
                     const int columns, __m512 sums[ROWS][COLUMNS]) {
    for (long p = 0; p < depth; p++) {
        __m512bh right[COLUMNS];
        for (int c = 0; c < columns; c++)
            right[c] = (__m512bh)_mm512_loadu_si512(b + p * b_step + c / 2 * half + c % 2 * LANES);
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

INLINE void store_narrow(bf16 *out, __m512 value) {
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE __m512 load_wide(const bf16 *x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

typedef struct { const float *cosine, *sine; } Angles; /* NULL: nothing is turned */

/* Stores vectors of the two halves of a head, turned: (a cos - b sin, b cos + a sin), backwards for direction -1. */
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

/* Contiguous rows of one head, turned, zeros after the last. */
static void gather(const bf16 *x, long stride, long length, long padded, long width, Angles angles, bf16 *rows) {
    for (long t = 0; t < length; t++)
        for (long d = 0, half = width / 2; d < half; d += LANES)
            store_turned(rows + t * width + d, load_wide(x + t * stride + d), load_wide(x + t * stride + half + d),
                         angles, t * half + d, half, 1.0f);
    memset(rows + length * width, 0, (size_t)((padded - length) * width) * 2);
}

/* Asks for rows that a later gather reads, while there is arithmetic to do. */
INLINE void expect(const bf16 *x, long stride, long first, long last, long width) {
    for (long t = first; t < last; t++)
        for (long d = 0; d < width; d += 2 * LANES) _mm_prefetch((const char *)(x + t * stride + d), _MM_HINT_T1);
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

/* One head's log-sum-exp of each row, and the dot product of the row's output and its gradient, times scale. Rows after
 * the last see nothing. */
static void row_statistics(const bf16 *douts, const bf16 *out, const float *lse, long length, long heads, long width,
                           float scale, float *offset, float *delta) {
    for (long t = 0; t < length; t++) {
        __m512 dot = _mm512_setzero_ps();
        for (long d = 0; d < width; d += 2 * LANES)
            dot = _mm512_dpbf16_ps(dot, (__m512bh)_mm512_loadu_si512(douts + t * width + d),
                                   (__m512bh)_mm512_loadu_si512(out + t * heads * width + d));
        delta[t] = _mm512_reduce_add_ps(dot) * scale;
        offset[t] = lse[t * heads];
    }
    for (long t = length; t < length + ROWS; t++) offset[t] = INFINITY, delta[t] = 0.0f;
}

/* One document: its rows of all tensors. */
typedef struct {
    const bf16 *q, *k, *v, *dout;
    bf16 *out, *dq, *dk, *dv;
    float *lse;
    Angles angles;
    long length, heads, kv_heads, width, window;
    float scale;
} Document;

/* ROWS queries from `row` and the keys from `key`: where they are and where their results go. */
typedef struct {
    const bf16 *queries, *douts;
    const uint32_t *keys, *values;
    long width, row, key, window, stride;
    float scale, *scores;
    __m512 *top;
    const float *offset, *delta;
    uint32_t *weights, *slopes;
    bf16 *slope_rows;
} Tile;

/* Products with 16 * columns keys: raw scores, -inf where masked, and the highest of each lane. */
INLINE void score_tile(const Tile *t, const int columns, const int masked) {
    __m512 sums[ROWS][COLUMNS];
    clear(sums);
    multiply((const uint32_t *)t->queries, t->width / 2, 1, t->keys, TILE, TILE / 2, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++) {
            __mmask16 seen = masked ? visible(t->row + r, t->key + c * LANES, t->window) : 0xffff;
            __m512 value = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, sums[r][c]);
            t->top[r] = _mm512_max_ps(t->top[r], value);
            _mm512_storeu_ps(t->scores + r * t->stride + c * LANES, value);
        }
}

/* The softmax weights again, and the gradients of the scores ("slopes"), each as pairs of rows; slopes also as rows. */
INLINE void slope_tile(const Tile *t, const int columns, const int masked) {
    __m512 sums[ROWS][COLUMNS], kept[ROWS][COLUMNS];
    clear(sums);
    multiply((const uint32_t *)t->douts, t->width / 2, 1, t->values, TILE, TILE / 2, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++)
            kept[r][c] = _mm512_fmsub_ps(sums[r][c], _mm512_set1_ps(t->scale), _mm512_set1_ps(t->delta[r]));
    clear(sums);
    multiply((const uint32_t *)t->queries, t->width / 2, 1, t->keys, TILE, TILE / 2, t->width / 2, columns, sums);
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

/* How many vectors of keys there are up to `end` in this tile; 0 for a whole tile of which every key is visible. */
INLINE int columns_of(const Tile *t, long end) {
    long columns = (least(round_up(t->key + 1, TILE), end) - t->key) / LANES;
    int whole = t->key + TILE <= t->row + 1 && first_key(t->row + ROWS - 1, t->window, 1) <= t->key;
    return columns == COLUMNS && whole ? 0 : (int)columns;
}

/* `task` with its number of columns, and whether it masks, known to the compiler. */
#define WITH_COLUMNS(task, t, columns)      \
    switch (columns) {                      \
        case 0: task(t, COLUMNS, 0); break; \
        case 1: task(t, 1, 1); break;       \
        case 2: task(t, 2, 1); break;       \
        case 3: task(t, 3, 1); break;       \
        default: task(t, COLUMNS, 1);       \
    }

static __attribute__((noinline)) void slope(const Tile *t, long end) { WITH_COLUMNS(slope_tile, t, columns_of(t, end)) }

static void forward_task(Document s, long kv_head, char *memory) {
    long length = s.length, width = s.width, group = s.heads / s.kv_heads;
    long padded = round_up(length, TILE) + TILE, stride = padded + LANES; /* so that rows do not share cache sets */
    bf16 *head = (bf16 *)memory;
    uint32_t *keys = (uint32_t *)(head + padded * width), *values = keys + padded * width / 2;
    float *scores = (float *)(values + padded * width / 2);
    bf16 *weights = (bf16 *)(scores + ROWS * stride);
    gather(s.k + kv_head * width, s.kv_heads * width, length, padded, width, s.angles, head);
    across(head, padded, width, keys);
    gather(s.v + kv_head * width, s.kv_heads * width, length, padded, width, (Angles){0}, head);
    along(head, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(s.q + h * width, s.heads * width, length, padded, width, s.angles, head);
        for (long row = 0; row < length; row += ROWS) {
            long begin = first_key(row, s.window, LANES), end = round_up(least(row + ROWS, length), LANES);
            __m512 top[ROWS], sums[ROWS][COLUMNS], scale = _mm512_set1_ps(s.scale * (float)M_LOG2E);
            float factor[ROWS];
            if (h + 1 < s.heads) expect(s.q + (h + 1) * width, s.heads * width, row, least(row + ROWS, length), width);
            for (int r = 0; r < ROWS; r++) top[r] = _mm512_set1_ps(-INFINITY);
            Tile t = {.queries = head + row * width, .width = width, .row = row, .window = s.window, .stride = stride};
            t.top = top;
            for (long key = begin; key < end; key = round_up(key + 1, TILE)) {
                t.key = key, t.keys = keys + key / TILE * TILE * width / 2 + key % TILE, t.scores = scores + key;
                WITH_COLUMNS(score_tile, &t, columns_of(&t, end))
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
                if (row + r < length) s.lse[(row + r) * s.heads + h] = highest + log2f(sum);
            }
            for (long d = 0; d < width; d += TILE) {
                clear(sums);
                multiply((uint32_t *)(weights + begin), stride / 2, 1, values + begin / 2 * width + d, width, TILE / 2,
                         least(row + ROWS, end) / 2 - begin / 2, COLUMNS, sums);
                for (int r = 0; r < ROWS && row + r < length; r++)
                    for (int c = 0; c < COLUMNS; c++)
                        store_narrow(s.out + ((row + r) * s.heads + h) * width + d + c * LANES,
                                     _mm512_mul_ps(sums[r][c], _mm512_set1_ps(factor[r])));
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
            multiply(weights + first * stride + key, 1, stride, x + first * width + d, width, TILE / 2,
                     (end - block) / 2 - first, COLUMNS, sums);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < COLUMNS; c++) _mm512_storeu_ps(place + r * width + c * LANES, sums[r][c]);
        }
}

static void write_narrow(const float *sum, long length, long width, Angles angles, bf16 *out, long stride) {
    for (long t = 0; t < length; t++)
        for (long d = 0, half = width / 2; d < half; d += LANES)
            store_turned(out + t * stride + d, _mm512_loadu_ps(sum + t * width + d),
                         _mm512_loadu_ps(sum + t * width + half + d), angles, t * half + d, half, -1.0f);
}

static void backward_task(Document s, long kv_head, char *memory) {
    long length = s.length, width = s.width, group = s.heads / s.kv_heads;
    long padded = round_up(length, TILE) + TILE, stride = padded + LANES; /* so that rows do not share cache sets */
    float *dkeys = (float *)memory, *dvalues = dkeys + padded * width;
    uint32_t *keys = (uint32_t *)(dvalues + padded * width), *values = keys + padded * width / 2;
    uint32_t *key_pairs = values + padded * width / 2, *query_pairs = key_pairs + padded * width / 2;
    uint32_t *dout_pairs = query_pairs + padded * width / 2;
    uint32_t *weights = dout_pairs + padded * width / 2, *slopes = weights + BLOCK / 2 * stride;
    bf16 *slope_rows = (bf16 *)(slopes + BLOCK / 2 * stride), *queries = slope_rows + ROWS * stride;
    bf16 *douts = queries + padded * width;
    float *offset = (float *)(douts + padded * width), *delta = offset + padded;
    memset(dkeys, 0, (size_t)(2 * padded * width) * 4);
    gather(s.k + kv_head * width, s.kv_heads * width, length, padded, width, s.angles, queries);
    across(queries, padded, width, keys);
    along(queries, padded, width, key_pairs);
    gather(s.v + kv_head * width, s.kv_heads * width, length, padded, width, (Angles){0}, queries);
    across(queries, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(s.q + h * width, s.heads * width, length, padded, width, s.angles, queries);
        gather(s.dout + h * width, s.heads * width, length, padded, width, (Angles){0}, douts);
        row_statistics(douts, s.out + h * width, s.lse + h, length, s.heads, width, s.scale, offset, delta);
        along(queries, padded, width, query_pairs);
        along(douts, padded, width, dout_pairs);
        for (long block = 0; block < length; block += BLOCK) {
            long begin = first_key(block, s.window, BLOCK), last = least(block + BLOCK, round_up(length, ROWS));
            for (long row = block; row < last; row += ROWS) {
                __m512 sums[ROWS][COLUMNS];
                if (h + 1 < s.heads) {
                    const bf16 *later[] = {s.q, s.dout, s.out};
                    for (int i = 0; i < 3; i++)
                        expect(later[i] + (h + 1) * width, s.heads * width, row, least(row + ROWS, length), width);
                }
                Tile t = {.queries = queries + row * width, .douts = douts + row * width, .width = width, .row = row,
                          .window = s.window, .stride = stride, .scale = s.scale, .offset = offset + row,
                          .delta = delta + row};
                long end = round_up(row + ROWS, LANES);
                for (long key = begin; key < end; key = round_up(key + 1, TILE)) {
                    long packed = key / TILE * TILE * width / 2 + key % TILE, place = (row - block) / 2 * stride + key;
                    t.key = key, t.keys = keys + packed, t.values = values + packed;
                    t.weights = weights + place, t.slopes = slopes + place, t.slope_rows = slope_rows + key;
                    slope(&t, end);
                }
                for (long d = 0, half = width / 2; d < half; d += TILE / 2) {
                    clear(sums);
                    multiply((uint32_t *)(slope_rows + begin), stride / 2, 1, key_pairs + begin / 2 * width + d, width,
                             half, (row + ROWS - begin) / 2, COLUMNS, sums);
                    for (int r = 0; r < ROWS && row + r < length; r++)
                        for (int c = 0; c < 2; c++)
                            store_turned(s.dq + ((row + r) * s.heads + h) * width + d + c * LANES, sums[r][c],
                                         sums[r][c + 2], s.angles, (row + r) * half + d + c * LANES, half, -1.0f);
                }
            }
            add_products(weights, stride, dout_pairs + block / 2 * width, width, block, begin, last, dvalues);
            add_products(slopes, stride, query_pairs + block / 2 * width, width, block, begin, last, dkeys);
        }
    }
    write_narrow(dkeys, length, width, s.angles, s.dk + kv_head * width, s.kv_heads * width);
    write_narrow(dvalues, length, width, (Angles){0}, s.dv + kv_head * width, s.kv_heads * width);
}

/* Forward, or where dq is not NULL backward. Returns 0, or 1 when there was no memory for the scratch space. */
int attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const bf16 *dout, bf16 *dq, bf16 *dk,
              bf16 *dv, const float *cosine, const float *sine, const int64_t *starts, const int64_t *lengths,
              long documents, long heads, long kv_heads, long width, long window, float scale) {
    long most = 0, failed = 0;
    for (long i = 0; i < documents; i++) most = lengths[i] > most ? lengths[i] : most;
    most = round_up(most, TILE) + TILE + LANES;
    #pragma omp parallel
    {
        char *memory = scratch(most * (dq ? width * 22 + BLOCK * 4 + ROWS * 2 + 8 : width * 6 + ROWS * 6));
        if (!memory) failed = 1;
        #pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < documents * kv_heads; task++) {
            long start = starts[task / kv_heads], to_q = start * heads * width, to_k = start * kv_heads * width;
            Angles angles = cosine ? (Angles){cosine + start * width / 2, sine + start * width / 2} : (Angles){0};
            Document s = {q + to_q, k + to_k, v + to_k, dout + to_q, out + to_q, dq + to_q, dk + to_k, dv + to_k,
                          lse + start * heads, angles, lengths[task / kv_heads], heads, kv_heads, width, window, scale};
            if (!memory) continue;
            if (dq) backward_task(s, task % kv_heads, memory);
            else forward_task(s, task % kv_heads, memory);
        }
        free(memory);
    }
    return (int)failed;
}

#else
int attention_available(void) { return 0; }
#endif

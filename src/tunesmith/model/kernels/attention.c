/* Causal attention over packed documents in bf16 for CPUs with AVX512-BF16, forward and backward, with rotary embedding.
 *
 * One task is one segment and one key/value head with the query heads that share it: keys and values are rotated and
 * reordered once for the dot-product instruction, gradients of keys and values stay private to the task. ROWS queries
 * at a time meet tiles of TILE keys; the tile with the diagonal stops at the next LANES keys, and only tiles that are
 * partly visible are masked. The forward computes full rows of scores (no running maximum). The backward takes BLOCK
 * queries, then adds their contribution to the gradients of all their keys and values.
 * Products take bf16 pairs and sum in fp32; softmax is fp32, in powers of two.
 *
 * Most segments are complete documents. A segment that continues others (its parent, the parent's parent, up to a root)
 * has their keys before its rows: rows and keys are counted along the full path, and the segment's rows come last.
 * The forward adds up in their order, so a row's result has the same bits wherever its path is divided. The backward puts
 * `front` empty keys first, so that the segment's rows begin at a multiple of ROWS. Its contribution to the gradients of
 * other segments goes to separate fp32 memory; when all tasks are done, these are summed in the order of the segments.
 *
 * Shapes: q, out, dq [tokens, heads, width]; k, v, dk, dv [tokens, kv_heads, width]; width a multiple of 64;
 * lse [tokens, heads]; cosine, sine [tokens, width / 2], or NULL if q and k are already rotated. scale > 0.
 */
#include "vectors.h"

#include <string.h>

#ifdef VECTORS

enum { ROWS = 6, COLUMNS = 4, TILE = COLUMNS * LANES, BLOCK = 96 }; /* a multiple of ROWS and LANES */

int attention_available(void) { return 1; }

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

/* The first key that `row` sees: after the `front` empty ones, at most window - 1 before the row. */
INLINE long first_seen(long row, long window, long front) {
    return window && row - window + 1 > front ? row - window + 1 : front;
}

/* Mask of keys first + 0..15 that query `row` may see: from its first key to itself. */
INLINE __mmask16 visible(long row, long first, long window, long front) {
    long ahead = row - first + 1, behind = first_seen(row, window, front) - first;
    __mmask16 upto = ahead >= LANES ? 0xffff : (ahead <= 0 ? 0 : (__mmask16)((1u << ahead) - 1));
    __mmask16 before = behind <= 0 ? 0 : (behind >= LANES ? 0xffff : (__mmask16)((1u << behind) - 1));
    return upto & ~before;
}

/* bf16 pairs (even[i], odd[i]). */
INLINE __m512i pair_rows(__m512 even, __m512 odd) {
    static const uint16_t order[32] __attribute__((aligned(64))) = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* Prefetch rows that a later gather reads. */
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

/* Pairs of neighboring rows, width across: out[row / 2][d]. For products over the rows. */
static void along(const bf16 *rows, long padded, long width, uint32_t *out) {
    for (long t = 0; t < padded; t += 2)
        for (long d = 0; d < width; d++)
            out[t / 2 * width + d] = (uint32_t)rows[t * width + d] | (uint32_t)rows[(t + 1) * width + d] << 16;
}

/* Per row of one head: log-sum-exp, and the dot product of output and output gradient, times scale. Rows after the
 * last see nothing. */
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

/* The tensors, and where their segments are: segment i is tokens starts[i] : starts[i] + lengths[i]. */
typedef struct {
    const bf16 *q, *k, *v;
    bf16 *out;
    float *lse;
    const bf16 *dout;
    bf16 *dq, *dk, *dv;
    Angles angles;
    const int64_t *starts, *lengths, *parents; /* parents NULL: all are roots */
    long segments, heads, kv_heads, width, window;
    float scale;
    /* By segment: for how many of the first tokens of its path it keeps what it gives to the gradients of their keys
     * and values, and where. Those are all that it continues, and its own if others continue it. NULL: none. */
    long *kept;
    float **given, *room;
} Pack;

INLINE long parent_of(const Pack *p, long segment) { return p->parents ? p->parents[segment] : -1; }

/* How many tokens a segment continues. */
static long before(const Pack *p, long segment) {
    long tokens = 0;
    while ((segment = parent_of(p, segment)) >= 0) tokens += p->lengths[segment];
    return tokens;
}

INLINE long front_of(long before) { return round_up(before, ROWS) - before; }

INLINE Angles from(Angles angles, long place) {
    return angles.cosine ? (Angles){angles.cosine + place, angles.sine + place} : angles;
}

/* A segment's rows of one head, rotated, after `first` others; zeros after the last. */
static void gather(const Pack *p, long segment, const bf16 *x, long stride, long first, long padded, Angles angles,
                   bf16 *rows) {
    long start = p->starts[segment], length = p->lengths[segment], width = p->width;
    copy_rows(x + start * stride, stride, length, width, from(angles, start * width / 2), rows + first * width);
    memset(rows + (first + length) * width, 0, (size_t)((padded - first - length) * width) * 2);
}

/* The same, preceded by the rows of all segments that it continues. */
static void gather_path(const Pack *p, long segment, const bf16 *x, long stride, long first, long padded,
                        Angles angles, bf16 *rows) {
    gather(p, segment, x, stride, first, padded, angles, rows);
    while ((segment = parent_of(p, segment)) >= 0) {
        long start = p->starts[segment], width = p->width;
        first -= p->lengths[segment];
        copy_rows(x + start * stride, stride, p->lengths[segment], width, from(angles, start * width / 2),
                  rows + first * width);
    }
    memset(rows, 0, (size_t)(first * p->width) * 2);
}

/* ROWS queries from `row` and the keys from `key`: their addresses and those of their results. */
typedef struct {
    const bf16 *queries, *douts;
    const uint32_t *keys, *values;
    long width, row, key, window, front, stride;
    float scale, *scores;
    __m512 *top;
    const float *offset, *delta;
    uint32_t *weights, *slopes;
    bf16 *slope_rows;
} Tile;

/* Products with 16 * columns keys: raw scores, -inf if masked, and the maximum of each lane. */
INLINE void score_tile(const Tile *t, const int columns, const int masked) {
    __m512 sums[ROWS][COLUMNS];
    clear(sums);
    multiply((const uint32_t *)t->queries, t->width / 2, 1, t->keys, TILE, TILE / 2, t->width / 2, columns, sums);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < columns; c++) {
            __mmask16 seen = masked ? visible(t->row + r, t->key + c * LANES, t->window, t->front) : 0xffff;
            __m512 value = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, sums[r][c]);
            t->top[r] = _mm512_max_ps(t->top[r], value);
            _mm512_storeu_ps(t->scores + r * t->stride + c * LANES, value);
        }
}

/* Recompute the softmax weights, and the gradients of the scores ("slopes"), as pairs of rows; slopes also as rows. */
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
            if (masked) weight = _mm512_maskz_mov_ps(visible(t->row + r, t->key + c * LANES, t->window, t->front), weight);
            sums[r][c] = weight;
            kept[r][c] = _mm512_mul_ps(kept[r][c], weight);
            store_narrow(t->slope_rows + r * t->stride + c * LANES, kept[r][c]);
            if (r % 2 == 0) continue;
            _mm512_storeu_si512(t->weights + r / 2 * t->stride + c * LANES, pair_rows(sums[r - 1][c], weight));
            _mm512_storeu_si512(t->slopes + r / 2 * t->stride + c * LANES, pair_rows(kept[r - 1][c], kept[r][c]));
        }
}

/* Vectors of keys up to `end` in this tile; 0 for a full tile whose keys are all visible. */
INLINE int columns_of(const Tile *t, long end) {
    long columns = (least(round_up(t->key + 1, TILE), end) - t->key) / LANES;
    int whole = t->key + TILE <= t->row + 1 && first_seen(t->row + ROWS - 1, t->window, t->front) <= t->key;
    return columns == COLUMNS && whole ? 0 : (int)columns;
}

/* `task` with a compile-time number of columns and mask flag. */
#define WITH_COLUMNS(task, t, columns)      \
    switch (columns) {                      \
        case 0: task(t, COLUMNS, 0); break; \
        case 1: task(t, 1, 1); break;       \
        case 2: task(t, 2, 1); break;       \
        case 3: task(t, 3, 1); break;       \
        default: task(t, COLUMNS, 1);       \
    }

static __attribute__((noinline)) void slope(const Tile *t, long end) { WITH_COLUMNS(slope_tile, t, columns_of(t, end)) }

static void forward_task(const Pack *p, long segment, long kv_head, char *memory) {
    long width = p->width, heads = p->heads, group = heads / p->kv_heads, own = before(p, segment);
    long length = own + p->lengths[segment];
    long shift = p->starts[segment] - own; /* from a row to its token */
    long padded = round_up(length, TILE) + TILE, stride = padded + LANES; /* so that rows do not share cache sets */
    bf16 *head = (bf16 *)memory;
    uint32_t *keys = (uint32_t *)(head + padded * width), *values = keys + padded * width / 2;
    float *scores = (float *)(values + padded * width / 2);
    bf16 *weights = (bf16 *)(scores + ROWS * stride);
    gather_path(p, segment, p->k + kv_head * width, p->kv_heads * width, own, padded, p->angles, head);
    across(head, padded, width, keys);
    gather_path(p, segment, p->v + kv_head * width, p->kv_heads * width, own, padded, (Angles){0}, head);
    along(head, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(p, segment, p->q + h * width, heads * width, own, padded, p->angles, head);
        for (long row = own; row < length; row += ROWS) {
            long begin = first_seen(row, p->window, 0) / LANES * LANES;
            long end = round_up(least(row + ROWS, length), LANES), token = row + shift;
            __m512 top[ROWS], sums[ROWS][COLUMNS], scale = _mm512_set1_ps(p->scale * (float)M_LOG2E);
            float factor[ROWS];
            if (h + 1 < heads)
                expect(p->q + (h + 1) * width, heads * width, token, token + least(ROWS, length - row), width);
            for (int r = 0; r < ROWS; r++) top[r] = _mm512_set1_ps(-INFINITY);
            Tile t = {.queries = head + row * width, .width = width, .row = row, .window = p->window, .stride = stride,
                      .top = top};
            for (long key = begin; key < end; key = round_up(key + 1, TILE)) {
                t.key = key, t.keys = keys + key / TILE * TILE * width / 2 + key % TILE, t.scores = scores + key;
                WITH_COLUMNS(score_tile, &t, columns_of(&t, end))
            }
            for (int r = 0; r < ROWS; r++) {
                float highest = _mm512_reduce_max_ps(top[r]) * (p->scale * (float)M_LOG2E);
                __m512 total = _mm512_setzero_ps();
                for (long key = begin; key < end; key += LANES) {
                    __m512 score = _mm512_loadu_ps(scores + r * stride + key);
                    __m512 value = exp2_ps(_mm512_fmsub_ps(score, scale, _mm512_set1_ps(highest)));
                    total = _mm512_add_ps(total, value);
                    store_narrow(weights + r * stride + key, value);
                }
                float sum = _mm512_reduce_add_ps(total);
                factor[r] = 1.0f / sum;
                if (row + r < length) p->lse[(token + r) * heads + h] = highest + log2f(sum);
            }
            for (long d = 0; d < width; d += TILE) {
                clear(sums);
                multiply((uint32_t *)(weights + begin), stride / 2, 1, values + begin / 2 * width + d, width, TILE / 2,
                         (least(row + ROWS, end) + 1) / 2 - begin / 2, COLUMNS, sums);
                for (int r = 0; r < ROWS && row + r < length; r++)
                    for (int c = 0; c < COLUMNS; c++)
                        store_narrow(p->out + ((token + r) * heads + h) * width + d + c * LANES,
                                     _mm512_mul_ps(sums[r][c], _mm512_set1_ps(factor[r])));
            }
        }
    }
}

/* sum[key, d] += sum over the rows of a block of weight[row, key] * x[row, d], for keys begin..end. */
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

static void write_gradients(const Pack *p, long segment, long kv_head, const float *dkeys, const float *dvalues) {
    long start = p->starts[segment], length = p->lengths[segment], width = p->width, stride = p->kv_heads * width;
    write_narrow(dkeys, length, width, from(p->angles, start * width / 2), p->dk + start * stride + kv_head * width,
                 stride);
    write_narrow(dvalues, length, width, (Angles){0}, p->dv + start * stride + kv_head * width, stride);
}

/* Memory for a segment's contribution to the gradients of keys (0) or values (1) of its path. */
INLINE float *given_by(const Pack *p, long segment, long kv_head, int which) {
    return p->given[segment] + (kv_head * 2 + which) * p->kept[segment] * p->width;
}

static void backward_task(const Pack *p, long segment, long kv_head, char *memory) {
    long width = p->width, heads = p->heads, group = heads / p->kv_heads, ahead = before(p, segment);
    long front = front_of(ahead), own = front + ahead, length = own + p->lengths[segment];
    long start = p->starts[segment], shift = start - own; /* from a row to its token */
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
    gather_path(p, segment, p->k + kv_head * width, p->kv_heads * width, own, padded, p->angles, queries);
    across(queries, padded, width, keys);
    along(queries, padded, width, key_pairs);
    gather_path(p, segment, p->v + kv_head * width, p->kv_heads * width, own, padded, (Angles){0}, queries);
    across(queries, padded, width, values);
    for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
        gather(p, segment, p->q + h * width, heads * width, own, padded, p->angles, queries);
        gather(p, segment, p->dout + h * width, heads * width, own, padded, (Angles){0}, douts);
        row_statistics(douts + own * width, p->out + (start * heads + h) * width, p->lse + start * heads + h,
                       length - own, heads, width, p->scale, offset + own, delta + own);
        along(queries + own * width, padded - own, width, query_pairs + own / 2 * width);
        along(douts + own * width, padded - own, width, dout_pairs + own / 2 * width);
        for (long block = own; block < length; block += BLOCK) {
            long begin = first_seen(block, p->window, front) / BLOCK * BLOCK;
            long last = least(block + BLOCK, round_up(length, ROWS));
            for (long row = block; row < last; row += ROWS) {
                __m512 sums[ROWS][COLUMNS];
                long token = row + shift, rows = least(ROWS, length - row);
                if (h + 1 < heads) {
                    const bf16 *later[] = {p->q, p->dout, p->out};
                    for (int i = 0; i < 3; i++)
                        expect(later[i] + (h + 1) * width, heads * width, token, token + rows, width);
                }
                Tile t = {.queries = queries + row * width, .douts = douts + row * width, .width = width, .row = row,
                          .window = p->window, .front = front, .stride = stride, .scale = p->scale,
                          .offset = offset + row, .delta = delta + row};
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
                            store_turned(p->dq + ((token + r) * heads + h) * width + d + c * LANES, sums[r][c],
                                         sums[r][c + 2], p->angles, (token + r) * half + d + c * LANES, half, -1.0f);
                }
            }
            add_products(weights, stride, dout_pairs + block / 2 * width, width, block, begin, last, dvalues);
            add_products(slopes, stride, query_pairs + block / 2 * width, width, block, begin, last, dkeys);
        }
    }
    long kept = p->kept ? p->kept[segment] : 0, bytes = kept * width * (long)sizeof(float);
    if (kept) {
        memcpy(given_by(p, segment, kv_head, 0), dkeys + front * width, (size_t)bytes);
        memcpy(given_by(p, segment, kv_head, 1), dvalues + front * width, (size_t)bytes);
    }
    if (kept <= ahead) write_gradients(p, segment, kv_head, dkeys + own * width, dvalues + own * width);
}

/* Add the contributions of the segments that continue this one to its gradients. */
static void sum_task(const Pack *p, long segment, long kv_head) {
    long width = p->width, ahead = before(p, segment), first = ahead * width, length = p->lengths[segment] * width;
    float *sums[2];
    for (int which = 0; which < 2; which++) sums[which] = given_by(p, segment, kv_head, which) + first;
    for (long other = 0; other < p->segments; other++) {
        long up = parent_of(p, other);
        while (up >= 0 && up != segment) up = parent_of(p, up);
        for (int which = 0; up == segment && which < 2; which++) {
            const float *more = given_by(p, other, kv_head, which) + first;
            for (long i = 0; i < length; i++) sums[which][i] += more[i];
        }
    }
    write_gradients(p, segment, kv_head, sums[0], sums[1]);
}

/* Allocate memory for contributions to other segments, and for the receivers. Returns 1 if out of memory. */
static int make_room(Pack *p) {
    long total = 0, row = p->kv_heads * 2 * p->width;
    long *kept = calloc((size_t)p->segments, sizeof(long));
    float **given = calloc((size_t)p->segments, sizeof(float *)), *room;
    p->kept = kept, p->given = given;
    if (!kept || !given) return 1;
    for (long i = 0; i < p->segments; i++) kept[i] = before(p, i);
    for (long i = 0, up; i < p->segments; i++)
        if ((up = p->parents[i]) >= 0) kept[up] = before(p, up) + p->lengths[up];
    for (long i = 0; i < p->segments; i++) total += kept[i];
    if (!(room = scratch((total * row + 1) * (long)sizeof(float)))) return 1;
    p->room = room;
    for (long i = 0; i < p->segments; i++) given[i] = room, room += kept[i] * row;
    return 0;
}

/* Forward, or backward if dq is not NULL. Returns 0, or 1 without memory for the scratch space. */
int attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const bf16 *dout, bf16 *dq, bf16 *dk,
              bf16 *dv, const float *cosine, const float *sine, const int64_t *starts, const int64_t *lengths,
              const int64_t *parents, long segments, long heads, long kv_heads, long width, long window, float scale) {
    Pack pack = {q, k, v, out, lse, dout, dq, dk, dv, {cosine, sine}, starts, lengths, parents, segments, heads,
                 kv_heads, width, window, scale, NULL, NULL, NULL};
    const Pack *p = &pack;
    long most = 0, failed = dq && parents ? make_room(&pack) : 0;
    for (long i = 0; i < segments; i++) {
        long ahead = before(p, i), length = front_of(ahead) + ahead + lengths[i];
        most = length > most ? length : most;
    }
    most = round_up(most, TILE) + TILE + LANES;
    if (!failed) {
        #pragma omp parallel
        {
            char *memory = scratch(most * (dq ? width * 22 + BLOCK * 4 + ROWS * 2 + 8 : width * 6 + ROWS * 6));
            if (!memory) failed = 1;
            #pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < segments * kv_heads; task++) {
                if (!memory) continue;
                if (dq) backward_task(p, task / kv_heads, task % kv_heads, memory);
                else forward_task(p, task / kv_heads, task % kv_heads, memory);
            }
            free(memory);
            if (p->kept) {
                #pragma omp for schedule(dynamic, 1)
                for (long task = 0; task < segments * kv_heads; task++)
                    if (p->kept[task / kv_heads] > before(p, task / kv_heads))
                        sum_task(p, task / kv_heads, task % kv_heads);
            }
        }
    }
    free(pack.kept), free(pack.given), free(pack.room);
    return (int)failed;
}

#else
int attention_available(void) { return 0; }
#endif

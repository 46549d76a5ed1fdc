/* Products of activations and a frozen weight in bf16 for CPUs with AVX512-BF16: outputs from inputs, and gradients of
 * inputs from those of outputs, from one copy of the weight.
 *
 * y [rows, outputs] = x m, plus a bias or what y holds. m [inputs, outputs] lies in memory as it is (COLUMNS_LAST),
 * transposed (COLUMNS_FIRST), or in blocks that `pack_weight` has made once (PACKED): for LANES columns, pairs of
 * neighboring inputs [inputs / 2][LANES]. The first two are brought into such blocks strip by strip, in memory that
 * stays in the cache while all rows are multiplied with it.
 *
 * Each sum is fp32, goes through the inputs in order, and is rounded once, with the bias: a row's result depends neither
 * on the other rows nor on the number of threads. inputs is even.
 */
#include "steps.h"
#include "vectors.h"

#ifdef VECTORS

typedef uint32_t __attribute__((may_alias)) pair;

enum { COLUMNS_FIRST, COLUMNS_LAST, PACKED };
enum { ROWS = 6, BLOCKS = 4, STRIP = BLOCKS * LANES /* columns whose sums stay in registers */ };
enum { DEPTH = 1024 /* pairs of inputs of a strip */, CACHED = 3 << 16 /* values of x */, MOST_ROWS = 512 };

/* AMX multiplies large matrices faster, through oneDNN. */
#ifdef __AMX_BF16__
int matmul_available(void) { return 0; }
#else
int matmul_available(void) { return 1; }
#endif

typedef struct {
    const bf16 *x, *m, *bias; /* bias NULL: none */
    bf16 *y;
    long rows, inputs, outputs;
    int layout, adds; /* adds: to what y holds */
} Product;

INLINE pair join(bf16 low, bf16 high) { return (pair)low | (pair)high << 16; }

/* The element of m at an input and a column; 0 outside. */
INLINE bf16 element(const Product *s, long input, long column) {
    if (column >= s->outputs) return 0;
    return s->m[s->layout == COLUMNS_FIRST ? column * s->inputs + input : input * s->outputs + column];
}

/* Pairs first..last of LANES columns, as a block. */
static void pack_block(const Product *s, long column, long first, long last, pair *out) {
    long p = first, half = s->inputs / 2;
    int is_whole = column + LANES <= s->outputs;
    if (is_whole && s->layout == COLUMNS_FIRST)
        for (; p + LANES <= last; p += LANES)
            turn_block((const float *)((const pair *)s->m + column * half + p), half, (float *)(out + (p - first) * LANES),
                       LANES);
    if (is_whole && s->layout == COLUMNS_LAST)
        for (; p < last; p++) {
            const bf16 *even = s->m + 2 * p * s->outputs + column, *odd = even + s->outputs;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)odd));
            _mm512_storeu_si512(out + (p - first) * LANES, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    for (; p < last; p++)
        for (long c = 0; c < LANES; c++)
            out[(p - first) * LANES + c] = join(element(s, 2 * p, column + c), element(s, 2 * p + 1, column + c));
}

/* A part of a product: rows of x, pairs of inputs of some blocks, and the sums of earlier pairs. */
typedef struct {
    const pair *x[ROWS], *blocks;
    long pairs, block_pairs; /* from one block to the next */
    float *sums; /* [ROWS][STRIP] */
    int is_first, is_last;
} Part;

INLINE void finish_rows(const Product *s, __m512 sums[ROWS][BLOCKS], long row, long count, long column, const int blocks) {
    for (int v = 0; v < blocks; v++) {
        long at = column + v * LANES, left = s->outputs - at;
        __mmask16 inside = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 bias = _mm512_setzero_ps();
        if (s->bias) bias = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, s->bias + at)), 16);
        for (long r = 0; r < count; r++) {
            bf16 *to = s->y + (row + r) * s->outputs + at;
            __m512 value = _mm512_add_ps(sums[r][v], bias);
            if (s->adds) {
                __m512i old = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, to));
                value = _mm512_add_ps(value, (__m512)_mm512_slli_epi32(old, 16));
            }
            _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(value));
        }
    }
}

/* `count` rows (a constant, at most ROWS) of which `stored` are written, and `blocks` blocks (a constant). */
INLINE void multiply_tile(const Product *s, const Part *t, long row, long stored, long column, const int count,
                          const int blocks) {
    __m512 sums[ROWS][BLOCKS];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < blocks; v++)
            sums[r][v] = t->is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(t->sums + r * STRIP + v * LANES);
    for (long p = 0; p < t->pairs; p++) {
        __m512bh right[BLOCKS];
        for (int v = 0; v < blocks; v++)
            right[v] = (__m512bh)_mm512_loadu_si512(t->blocks + (v * t->block_pairs + p) * LANES);
        for (int r = 0; r < count; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)t->x[r][p]);
            for (int v = 0; v < blocks; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }
    if (t->is_last) finish_rows(s, sums, row, stored, column, blocks);
    else
        for (int r = 0; r < count; r++)
            for (int v = 0; v < blocks; v++) _mm512_storeu_ps(t->sums + r * STRIP + v * LANES, sums[r][v]);
}

INLINE void multiply_blocks(const Product *s, const Part *t, long row, long stored, long column, const int blocks) {
    if (stored == 1) multiply_tile(s, t, row, stored, column, 1, blocks);
    else if (stored == 2) multiply_tile(s, t, row, stored, column, 2, blocks);
    else if (stored <= 4) multiply_tile(s, t, row, stored, column, 4, blocks);
    else multiply_tile(s, t, row, stored, column, ROWS, blocks);
}

/* Functions of their own, so that all sums stay in registers. */
static __attribute__((noinline)) void multiply_4(const Product *s, const Part *t, long row, long stored, long column) {
    multiply_blocks(s, t, row, stored, column, 4);
}
static __attribute__((noinline)) void multiply_3(const Product *s, const Part *t, long row, long stored, long column) {
    multiply_blocks(s, t, row, stored, column, 3);
}
static __attribute__((noinline)) void multiply_2(const Product *s, const Part *t, long row, long stored, long column) {
    multiply_blocks(s, t, row, stored, column, 2);
}
static __attribute__((noinline)) void multiply_1(const Product *s, const Part *t, long row, long stored, long column) {
    multiply_blocks(s, t, row, stored, column, 1);
}

/* The columns of one strip, of `blocks` blocks, for rows begin..end. */
static void multiply_strip(const Product *s, long column, long blocks, long begin, long end, pair *packed, float *sums) {
    long half = s->inputs / 2;
    for (long first = 0; first < half; first += DEPTH) {
        long last = least(first + DEPTH, half);
        Part t = {.blocks = packed, .pairs = last - first, .block_pairs = last - first, .is_first = first == 0,
                  .is_last = last == half};
        if (s->layout == PACKED) {
            t.blocks = (const pair *)s->m + (column / LANES * half + first) * LANES;
            t.block_pairs = half;
        } else
            for (long v = 0; v < blocks; v++)
                pack_block(s, column + v * LANES, first, last, packed + v * t.pairs * LANES);
        for (long row = begin; row < end; row += ROWS) {
            for (int r = 0; r < ROWS; r++) /* repeats the last row after the end */
                t.x[r] = (const pair *)(s->x + least(row + r, end - 1) * s->inputs) + first;
            t.sums = sums + (row - begin) * STRIP;
            long stored = least(ROWS, end - row);
            if (blocks == 4) multiply_4(s, &t, row, stored, column);
            else if (blocks == 3) multiply_3(s, &t, row, stored, column);
            else if (blocks == 2) multiply_2(s, &t, row, stored, column);
            else multiply_1(s, &t, row, stored, column);
        }
    }
}

/* The blocks of a whole matrix that lies transposed: out [ceil(outputs / LANES)][inputs / 2][LANES]. */
void pack_weight(const bf16 *m, pair *out, long inputs, long outputs) {
    Product s = {.m = m, .inputs = inputs, .outputs = outputs, .layout = COLUMNS_FIRST};
    long half = inputs / 2;
    #pragma omp parallel for schedule(static)
    for (long column = 0; column < outputs; column += LANES) pack_block(&s, column, 0, half, out + column * half);
}

/* Returns 0, or 1 without memory for a strip. `threads` share the work: strip after strip of the rows of x that stay in
 * a core's cache. */
int multiply_weight(const bf16 *x, const bf16 *m, const bf16 *bias, bf16 *y, long rows, long inputs, long outputs,
                    long layout, long adds, long threads) {
    Product s = {x, m, bias, y, rows, inputs, outputs, (int)layout, (int)adds};
    long total = (outputs + LANES - 1) / LANES, depth = least(inputs / 2, DEPTH);
    long blocks = total >= BLOCKS * threads ? BLOCKS : (total + threads - 1) / threads; /* of a strip */
    long strips = (total + blocks - 1) / blocks;
    long chunk = round_up(least(MOST_ROWS, CACHED / (2 * depth)), ROWS), chunks = (rows + chunk - 1) / chunk;
    int failed = 0;
    #pragma omp parallel
    {
        pair *packed = scratch(blocks * depth * LANES * (long)sizeof(pair) + chunk * STRIP * (long)sizeof(float));
        float *sums = (float *)(packed + blocks * depth * LANES);
        if (!packed) failed = 1;
        #pragma omp for schedule(static)
        for (long task = 0; task < chunks * strips; task++) {
            long first = task % strips * blocks, row = task / strips * chunk;
            if (packed)
                multiply_strip(&s, first * LANES, least(blocks, total - first), row, least(row + chunk, rows), packed, sums);
        }
        free(packed);
    }
    return failed;
}

#else
int matmul_available(void) { return 0; }
#endif

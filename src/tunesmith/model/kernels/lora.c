/* The low-rank products of adapters in bf16 for CPUs with AVX512-BF16, forward and backward.
 *
 * A factor is a tall matrix m [width, rank]: B itself, A transposed. Ranks come in blocks of LANES, zeros after the
 * last; several adapters of one input are one factor with more blocks. `lora_pack` writes both layouts that the
 * dot-product instruction needs: `down` [blocks][width / 2][LANES], pairs along the width, and `up`
 * [blocks][LANES / 2][padded], pairs along the rank, padded to a multiple of STRIP. Inner activations z are
 * [blocks][rows][LANES], so that each block is contiguous.
 *
 * Each thread has one part of the rows; it reads them in tiles that stay in the cache between two products, and sums
 * the factor's gradient separately. All sums are fp32 and rounded once. width is even.
 */
#include "steps.h"

#include <string.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

typedef uint32_t __attribute__((may_alias)) pair;
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 8, STRIP = 2 * LANES, TILE = 64 };

int lora_available(void) { return 1; }

INLINE long lower(long a, long b) { return a < b ? a : b; }
INLINE long padded_width(long width) { return (width + STRIP - 1) / STRIP * STRIP; }
INLINE __m512bh load(const pair *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE __m512bh repeat(const pair *x) { return (__m512bh)_mm512_set1_epi32((int)*x); }
INLINE __m512 widen(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
INLINE __mmask32 columns(long left) { return left >= STRIP ? 0xffffffffu : (1u << left) - 1; }

/* First row of a part; the parts differ by at most ROWS rows. */
INLINE long part_start(long part, long parts, long rows) {
    return lower(rows, (rows + ROWS - 1) / ROWS * part / parts * ROWS);
}

void lora_pack(const bf16 *m, pair *down, pair *up, long width, long rank, long width_step, long rank_step) {
    long padded = padded_width(width);
    #pragma omp parallel for schedule(static)
    for (long c = 0; c < padded; c += 2)
        for (long i = 0; i < (rank + LANES - 1) / LANES * LANES; i += 2) {
            const bf16 *at = m + c * width_step + i * rank_step;
            int odd = i + 1 < rank;
            uint32_t here = 0, right = 0, below = 0, both = 0; /* of a square of two columns and two ranks */
            if (c < width && i < rank) here = at[0], below = at[width_step];
            if (c < width && odd) right = at[rank_step], both = at[width_step + rank_step];
            pair *d = down + (i / LANES * (width / 2) + c / 2) * LANES + i % LANES, *u = up + i / 2 * padded + c;
            if (c < width) d[0] = here | below << 16, d[1] = right | both << 16;
            u[0] = here | right << 16, u[1] = below | both << 16;
        }
}

/* z[row, i] = scale * sum over c of x[row, c] m[c, i], of `count` rows (a constant, at most ROWS) and `blocks` (a
 * constant, at most 3) blocks. The sums of a row are the same for any `count` and `blocks`. */
INLINE void narrow_rows(const pair *const x[ROWS], const pair *down, bf16 *z, long row, long last, long rows, long half,
                        int count, int blocks, float scale) {
    __m512 sums[ROWS][3];
    for (int r = 0; r < count; r++)
        for (int v = 0; v < blocks; v++) sums[r][v] = _mm512_setzero_ps();
    for (long p = 0; p < half; p++) {
        __m512bh right[3];
        for (int v = 0; v < blocks; v++) right[v] = load(down + (v * half + p) * LANES);
        for (int r = 0; r < count; r++) {
            __m512bh left = repeat(x[r] + p);
            for (int v = 0; v < blocks; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < count && row + r < last; r++)
        for (int v = 0; v < blocks; v++)
            _mm256_storeu_si256((__m256i *)(z + (v * rows + row + r) * LANES),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[r][v], _mm512_set1_ps(scale))));
}

INLINE void narrow_blocks(const pair *const from[ROWS], const pair *down, bf16 *z, long row, long last, long rows,
                          long half, long blocks, int count, float scale) {
    for (long v = 0, step; v < blocks; v += step) {
        long left = blocks - v;
        const pair *m = down + v * half * LANES;
        bf16 *out = z + v * rows * LANES;
        step = left == 4 ? 2 : lower(left, 3);
        if (step == 3) narrow_rows(from, m, out, row, last, rows, half, count, 3, scale);
        if (step == 2) narrow_rows(from, m, out, row, last, rows, half, count, 2, scale);
        if (step == 1) narrow_rows(from, m, out, row, last, rows, half, count, 1, scale);
    }
}

static void narrow(const bf16 *x, const pair *down, bf16 *z, long first, long last, long rows, long width, long blocks,
                   float scale) {
    for (long row = first; row < last; row += ROWS) {
        const pair *from[ROWS]; /* repeats the last row after the end; not stored */
        for (int r = 0; r < ROWS; r++) from[r] = (const pair *)(x + lower(row + r, last - 1) * width);
        narrow_blocks(from, down, z, row, last, rows, width / 2, blocks, ROWS, scale);
    }
}

/* sums[r] = sum over i of z[row + r, i] m[c.., i], of STRIP columns and `count` rows (a constant, at most ROWS). */
INLINE void widen_rows(__m512 sums[ROWS][2], const bf16 *z, const pair *up, long row, long last, long rows, long padded,
                       long blocks, int count) {
    for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long v = 0; v < blocks; v++) {
        const pair *left[ROWS];
        for (int r = 0; r < count; r++) left[r] = (const pair *)(z + (v * rows + lower(row + r, last - 1)) * LANES);
        for (int p = 0; p < LANES / 2; p++) {
            const pair *right = up + (v * LANES / 2 + p) * padded;
            for (int r = 0; r < count; r++)
                for (int h = 0; h < 2; h++)
                    sums[r][h] = _mm512_dpbf16_ps(sums[r][h], repeat(left[r] + p), load(right + h * LANES));
        }
    }
}

/* y[row, c] += scale * sum over i of z[row, i] m[c, i] */
static void add_wide(bf16 *y, const bf16 *z, const pair *up, long first, long last, long rows, long width, long blocks,
                     float scale) {
    long padded = padded_width(width);
    for (long row = first; row < last; row += ROWS)
        for (long c = 0; c < width; c += STRIP) {
            __m512 sums[ROWS][2];
            widen_rows(sums, z, up + c, row, last, rows, padded, blocks, ROWS);
            __mmask32 inside = columns(width - c);
            for (int r = 0; r < ROWS && row + r < last; r++) {
                bf16 *to = y + (row + r) * width + c;
                __m512i old = _mm512_maskz_loadu_epi16(inside, to);
                __m512 low = widen(_mm512_castsi512_si256(old)), high = widen(_mm512_extracti64x4_epi64(old, 1));
                low = _mm512_fmadd_ps(sums[r][0], _mm512_set1_ps(scale), low);
                high = _mm512_fmadd_ps(sums[r][1], _mm512_set1_ps(scale), high);
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                if (inside == 0xffffffffu) _mm512_storeu_si512(to, both);
                else _mm512_mask_storeu_epi16(to, inside, both);
            }
        }
}

/* Adds scale * sums of ranks i.. and columns c.. to a part's gradient. Unpacking the pairs leaves the columns as
 * 0-3, 8-11, 16-19, 24-27 in the first half and the others in the second. */
INLINE void add_sums(__m512 sums[ROWS][2], float *gradient, long padded, float scale) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int i = 0; i < ROWS; i++)
        for (int h = 0; h < 2; h++) {
            float *to = gradient + i * padded + h * LANES;
            __m512 sum = _mm512_permutex2var_ps(sums[i][0], h ? high : low, sums[i][1]);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), _mm512_loadu_ps(to)));
        }
}

/* gradient[i, c] += scale * sum over rows of z[row, i] y[row, c], of at most TILE rows */
static void add_outer(const bf16 *y, const bf16 *z, float *gradient, long first, long last, long rows, long width,
                      long blocks, float scale) {
    long padded = padded_width(width);
    for (long v = 0; v < blocks; v++) {
        pair left[TILE / 2][LANES]; /* of z: pairs of neighboring rows */
        for (long row = first; row < last; row += 2) {
            const __m256i *from = (const __m256i *)(z + (v * rows + row) * LANES);
            __m512i odd = row + 1 < last ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(from + 1)) : _mm512_setzero_si512();
            odd = _mm512_slli_epi32(odd, 16);
            _mm512_storeu_si512(left[(row - first) / 2],
                                _mm512_or_si512(odd, _mm512_cvtepu16_epi32(_mm256_loadu_si256(from))));
        }
        for (long c = 0; c < width; c += STRIP)
            for (int i = 0; i < LANES; i += ROWS) {
                __m512 sums[ROWS][2];
                for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
                __mmask32 inside = columns(width - c);
                for (long row = first; row < last; row += 2) {
                    const bf16 *from = y + row * width + c;
                    __m512i even = _mm512_maskz_loadu_epi16(inside, from);
                    __m512i odd = _mm512_maskz_loadu_epi16(row + 1 < last ? inside : 0, from + width);
                    __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd);
                    __m512bh high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
                    for (int r = 0; r < ROWS; r++) {
                        __m512bh rank = repeat(&left[(row - first) / 2][i + r]);
                        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], rank, low);
                        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], rank, high);
                    }
                }
                add_sums(sums, gradient + (v * LANES + i) * padded + c, padded, scale);
            }
    }
}

/* z = x m */
void lora_inner(const bf16 *x, const pair *down, bf16 *z, long rows, long width, long blocks, long parts) {
    #pragma omp parallel for schedule(static, 1)
    for (long part = 0; part < parts; part++)
        narrow(x, down, z, part_start(part, parts, rows), part_start(part + 1, parts, rows), rows, width, blocks, 1.0f);
}

/* y += scale * z m^T */
void lora_add(bf16 *y, const bf16 *z, const pair *up, long rows, long width, long blocks, long parts, float scale) {
    #pragma omp parallel for schedule(static, 1)
    for (long part = 0; part < parts; part++)
        add_wide(y, z, up, part_start(part, parts, rows), part_start(part + 1, parts, rows), rows, width, blocks, scale);
}

/* Each part's share of scale * z^T x [parts][blocks * LANES][padded]. If `down` is not null, x is the gradient of
 * outputs and the same pass writes dz = scale * x m. */
void lora_gradient(const bf16 *x, const bf16 *z, const pair *down, bf16 *dz, float *gradient, long rows, long width,
                   long blocks, long parts, float scale) {
    long size = blocks * LANES * padded_width(width);
    #pragma omp parallel for schedule(static, 1)
    for (long part = 0; part < parts; part++) {
        long end = part_start(part + 1, parts, rows);
        memset(gradient + part * size, 0, (size_t)size * sizeof(float));
        for (long first = part_start(part, parts, rows); first < end; first += TILE) {
            long last = lower(first + TILE, end);
            if (down) narrow(x, down, dz, first, last, rows, width, blocks, scale);
            add_outer(x, z, gradient + part * size, first, last, rows, width, blocks, scale);
        }
    }
}

/* ---- rows of different adapters ---- */

enum { MAX_BLOCKS = 256 };

/* What an adapter does to a linear: y = gain * (y + scale * B A x) + offset; no gain without DoRA, no offset without a
 * bias. blocks is 0 for a linear without adapter. */
typedef struct {
    const pair *down, *up;
    const float *gain, *offset;
    long blocks;
    float scale;
} Factors;
/* At most ROWS rows of one adapter: order[first .. first + count]. */
struct Tile {
    const Factors *adapter; /* an entry for each linear of the bank */
    long first, count;
};

INLINE __m512 finish(__m512 sum, __m512 old, const Factors *f, long c, __mmask16 inside) {
    __m512 y = _mm512_fmadd_ps(sum, _mm512_set1_ps(f->scale), old);
    if (!f->gain) return y;
    __m512 offset = f->offset ? _mm512_maskz_loadu_ps(inside, f->offset + c) : _mm512_setzero_ps();
    return _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(inside, f->gain + c), offset);
}

/* One tile through one linear, for `count` rows (a constant); rows after the tile's last repeat it, not stored. */
INLINE void adapt_tile(const bf16 *x, bf16 *y, const long *rows, long last, long inputs, long width, const Factors *f,
                       int count) {
    bf16 z[MAX_BLOCKS * ROWS * LANES];
    const pair *from[ROWS];
    bf16 *to[ROWS];
    for (int r = 0; r < count; r++) {
        long row = rows[lower(r, last - 1)];
        from[r] = (const pair *)(x + row * inputs);
        to[r] = y + row * width;
    }
    narrow_blocks(from, f->down, z, 0, last, ROWS, inputs / 2, f->blocks, count, 1.0f);
    for (long c = 0; c < width; c += STRIP) {
        __m512 sums[ROWS][2];
        widen_rows(sums, z, f->up + c, 0, last, ROWS, padded_width(width), f->blocks, count);
        __mmask32 inside = columns(width - c);
        for (int r = 0; r < count && r < last; r++) {
            __m512i old = _mm512_maskz_loadu_epi16(inside, to[r] + c);
            __m512 low = widen(_mm512_castsi512_si256(old)), high = widen(_mm512_extracti64x4_epi64(old, 1));
            low = finish(sums[r][0], low, f, c, (__mmask16)inside);
            high = finish(sums[r][1], high, f, c + LANES, (__mmask16)(inside >> LANES));
            _mm512_mask_storeu_epi16(to[r] + c, inside, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* Adds its adapter's outputs to each row of y[0..linears], which hold W x + b, from one x. A row's result does not
 * depend on the others. */
void lora_rows(const bf16 *x, bf16 *const *y, const Tile *tiles, const long *order, const Linear *linears, long num_tiles,
               long num_linears, long inputs) {
    #pragma omp parallel for schedule(dynamic, 1)
    for (long item = 0; item < num_tiles * num_linears; item++) {
        const Tile *tile = tiles + item / num_linears;
        const Linear *linear = linears + item % num_linears;
        const Factors *f = tile->adapter + linear->entry;
        const long *rows = order + tile->first;
        bf16 *out = y[item % num_linears];
        if (!f->blocks) continue;
        if (tile->count == 1) adapt_tile(x, out, rows, 1, inputs, linear->width, f, 1);
        else if (tile->count == 2) adapt_tile(x, out, rows, 2, inputs, linear->width, f, 2);
        else if (tile->count <= 4) adapt_tile(x, out, rows, tile->count, inputs, linear->width, f, 4);
        else adapt_tile(x, out, rows, tile->count, inputs, linear->width, f, ROWS);
    }
}

#else
int lora_available(void) { return 0; }
#endif

/* Products and triangular systems of small fp32 matrices, for recurrence.c. Rows are a multiple of ROWS, columns of
 * LANES.
 */
#include "vectors.h"

#ifdef VECTORS

enum { ROWS = 8 };

typedef struct {
    float *at;
    long stride;
} Matrix;

/* The left matrix of a product: element [i, p] is at[i * stride + p], at[p * stride + i] if it is turned. Of a lower
 * matrix, what lies right of the blocks on the diagonal is left out, of an upper one what lies left of them. */
typedef struct {
    const float *at;
    long stride;
    int turned;
    enum { FULL, LOWER, UPPER } shape;
} Left;

/* sums[r][c] += sum over p of a[r, p] b[p, c]: ROWS rows, `vectors` vectors. */
INLINE void accumulate(const float *a, long a_row, long a_step, const float *b, long b_row, long depth,
                       const int vectors, __m512 sums[ROWS][2]) {
    for (long p = 0; p < depth; p++) {
        __m512 right = _mm512_loadu_ps(b + p * b_row), next = right;
        if (vectors == 2) next = _mm512_loadu_ps(b + p * b_row + LANES);
        #pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            __m512 left = _mm512_set1_ps(a[r * a_row + p * a_step]);
            sums[r][0] = _mm512_fmadd_ps(left, right, sums[r][0]);
            if (vectors == 2) sums[r][1] = _mm512_fmadd_ps(left, next, sums[r][1]);
        }
    }
}

INLINE void load_sums(const float *x, long stride, float factor, const int vectors, __m512 sums[ROWS][2]) {
    __m512 scale = _mm512_set1_ps(factor);
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        sums[r][0] = _mm512_mul_ps(_mm512_loadu_ps(x + r * stride), scale);
        if (vectors == 2) sums[r][1] = _mm512_mul_ps(_mm512_loadu_ps(x + r * stride + LANES), scale);
    }
}

INLINE void clear(const int vectors, __m512 sums[ROWS][2]) {
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        sums[r][0] = _mm512_setzero_ps();
        if (vectors == 2) sums[r][1] = _mm512_setzero_ps();
    }
}

INLINE void store_sums(float *x, long stride, const int vectors, __m512 sums[ROWS][2]) {
    #pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        _mm512_storeu_ps(x + r * stride, sums[r][0]);
        if (vectors == 2) _mm512_storeu_ps(x + r * stride + LANES, sums[r][1]);
    }
}

typedef struct {
    const float *a, *b, *initial; /* initial NULL: 0 */
    long a_stride, b_stride, stride, depth; /* `stride` of out and initial */
    float factor, *out;
} Block;

/* out = factor * initial + a b, of ROWS rows and `vectors` vectors. */
INLINE void multiply_block(const Block *x, const int vectors, const int turned) {
    __m512 sums[ROWS][2];
    if (x->initial) load_sums(x->initial, x->stride, x->factor, vectors, sums);
    else clear(vectors, sums);
    accumulate(x->a, turned ? 1 : x->a_stride, turned ? x->a_stride : 1, x->b, x->b_stride, x->depth, vectors, sums);
    store_sums(x->out, x->stride, vectors, sums);
}

/* Functions of their own, so that all sums stay in registers. */
static __attribute__((noinline)) void multiply_narrow(const Block *x) { multiply_block(x, 1, 0); }
static __attribute__((noinline)) void multiply_wide(const Block *x) { multiply_block(x, 2, 0); }
static __attribute__((noinline)) void multiply_narrow_turned(const Block *x) { multiply_block(x, 1, 1); }
static __attribute__((noinline)) void multiply_wide_turned(const Block *x) { multiply_block(x, 2, 1); }

/* out = factor * initial + a b, where initial has the shape and stride of out, or is NULL for 0. */
static void multiply(Left a, Matrix b, long depth, long rows, long columns, const float *initial, float factor,
                     Matrix out) {
    for (long c = 0; c < columns; c += 2 * LANES)
        for (long row = 0; row < rows; row += ROWS) {
            long first = a.shape == UPPER ? least(row, depth) : 0;
            long last = a.shape == LOWER ? least(row + ROWS, depth) : depth, at = row * out.stride + c;
            Block x = {.a = a.at + (a.turned ? first * a.stride + row : row * a.stride + first),
                       .b = b.at + first * b.stride + c, .initial = initial ? initial + at : NULL,
                       .a_stride = a.stride, .b_stride = b.stride, .stride = out.stride, .depth = last - first,
                       .factor = factor, .out = out.at + at};
            if (columns - c == LANES) (a.turned ? multiply_narrow_turned : multiply_narrow)(&x);
            else (a.turned ? multiply_wide_turned : multiply_wide)(&x);
        }
}

/* x = (1 - system)^-1 x, where system [rows, rows] is below its diagonal; the inverse's transpose if `turned`. */
INLINE void solve_strip(Matrix system, long rows, Matrix x, const int vectors, const int turned) {
    for (long step = 0; step < rows; step += ROWS) {
        long row = turned ? rows - ROWS - step : step;
        const float *left = system.at + (turned ? (row + ROWS) * system.stride + row : row * system.stride);
        const float *corner = system.at + row * system.stride + row;
        __m512 sums[ROWS][2];
        load_sums(x.at + row * x.stride, x.stride, 1.0f, vectors, sums);
        if (turned)
            accumulate(left, 1, system.stride, x.at + (row + ROWS) * x.stride, x.stride, rows - row - ROWS, vectors, sums);
        else accumulate(left, system.stride, 1, x.at, x.stride, row, vectors, sums);
        #pragma GCC unroll 8
        for (int i = 1; i < ROWS; i++)
            #pragma GCC unroll 8
            for (int j = 0; j < i; j++) {
                int to = turned ? ROWS - 1 - i : i, from = turned ? ROWS - 1 - j : j;
                __m512 factor = _mm512_set1_ps(corner[turned ? from * system.stride + to : to * system.stride + from]);
                sums[to][0] = _mm512_fmadd_ps(factor, sums[from][0], sums[to][0]);
                if (vectors == 2) sums[to][1] = _mm512_fmadd_ps(factor, sums[from][1], sums[to][1]);
            }
        store_sums(x.at + row * x.stride, x.stride, vectors, sums);
    }
}

static void solve(Matrix system, long rows, long columns, Matrix x, int turned) {
    for (long c = 0; c < columns; c += 2 * LANES) {
        Matrix strip = {x.at + c, x.stride};
        if (columns - c == LANES && turned) solve_strip(system, rows, strip, 1, 1);
        else if (columns - c == LANES) solve_strip(system, rows, strip, 1, 0);
        else if (turned) solve_strip(system, rows, strip, 2, 1);
        else solve_strip(system, rows, strip, 2, 0);
    }
}

static void turn(Matrix x, long rows, long columns, Matrix out) {
    for (long r = 0; r < rows; r += LANES)
        for (long c = 0; c < columns; c += LANES)
            turn_block(x.at + r * x.stride + c, x.stride, out.at + c * out.stride + r, out.stride);
}

INLINE float dot(const float *x, const float *y, long size) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < size; i += LANES) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(y + i), sum);
    return _mm512_reduce_add_ps(sum);
}

/* out = x * factor + y, y NULL for 0. */
INLINE void scale_row(const float *x, float factor, const float *y, long size, float *out) {
    for (long i = 0; i < size; i += LANES) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor));
        _mm512_storeu_ps(out + i, y ? _mm512_add_ps(value, _mm512_loadu_ps(y + i)) : value);
    }
}

#endif

/* The recurrence of Gated DeltaNet and Mamba2 over packed documents for CPUs with AVX512-BF16, forward and backward.
 *
 *     S_t = exp(g_t) S_(t-1) + k_t u_t        o_t = q_t S_t + skip v_t
 *     u_t = beta_t (v_t - exp(g_t) k_t S_(t-1)) with the delta rule, beta_t v_t otherwise
 *
 * One task is one root segment with all that continue it, and one head (some heads of a group in the backward, one after
 * the other). Segments are cut into chunks of CHUNK tokens; within a chunk, a_i is the sum of g up to token i and
 * F_ij = exp(a_i - a_j) for j <= i:
 *
 *     u = (1 + tril(beta k k^T F, -1))^-1 beta (v - exp(a) k S)      o = (q k^T F) u + exp(a) q S
 *
 * The backward runs the task again, keeps the state after each chunk, and goes through the chunks from the last to the
 * first. Inputs are bf16; everything else is fp32, products included. mixers/recurrence.py is the reference.
 *
 * Each output is written by one task, so the number of threads changes nothing. Heads that share q and k add their
 * gradients one after the other, or in `parts` whose sum the caller forms.
 *
 * Shapes: active, dactive [tokens, channels], where channels are q, k [groups, keys], v [heads, values] with the delta
 * rule (q and k are then normalized here), v, k, q otherwise; decay, beta and their gradients [tokens, heads]; skip
 * [heads] or NULL; out, dout [tokens, heads, values]; dkeys [parts, tokens, 2 groups keys], unused for one part. keys
 * and values are multiples of LANES.
 */
#include "products.h"

#include <string.h>

#ifdef VECTORS

enum { CHUNK = 2 * LANES };
static const float NORM_EPS = 1e-6f; /* as in mixers/scan.py */

int recurrence_available(void) { return 1; }

/* ---------------------------------------------------------------- a pack and its chunks */

typedef struct {
    const bf16 *active;
    const float *decay, *beta, *skip;
    bf16 *out;
    const bf16 *dout;
    float *dactive, *dkeys, *ddecay, *dbeta;
    const int64_t *starts, *lengths, *parents; /* parents NULL: all are roots */
    long segments, tokens, groups, group_size, keys, values, parts;
    int is_delta;
    long heads, channels, q_at, k_at, v_at;
    /* By segment: its root, its place and that of its first chunk among those of the root, and whether others continue
     * it. Of a root: how many segments and chunks it has, itself included. */
    long *root, *place, *first_chunk, *is_continued, *root_segments, *root_chunks;
} Pack;

INLINE long parent_of(const Pack *p, long segment) { return p->parents ? p->parents[segment] : -1; }

/* A chunk of one head. Vectors by token, matrices [token, token]; rows after the last token are 0. */
typedef struct {
    const Pack *pack;
    long head, token, length, rows; /* first token, tokens, the same rounded up to LANES */
    float *log_decay, *since_start, *until_end, *beta, *inverse_q, *inverse_k; /* the last two: of the lengths of q, k */
    float *fading, *scores, *overlaps, *system; /* F, q k^T F, k k^T F below the diagonal, -beta times that */
    Matrix q, k, turned_k;
} Chunk;

INLINE float *take(float **memory, long count) {
    float *start = *memory;
    *memory += round_up(count, LANES);
    return start;
}

/* Strides are odd multiples of a cache line, so that rows do not share cache sets. */
INLINE long stride_of(long size) { return size / LANES % 2 ? size : size + LANES; }
INLINE Matrix take_matrix(float **memory, long rows, long columns) {
    return (Matrix){take(memory, rows * stride_of(columns)), stride_of(columns)};
}

INLINE long count_state(const Pack *p) { return p->keys * stride_of(p->values); }

static Chunk take_chunk(const Pack *p, float **memory) {
    Chunk c = {.pack = p};
    float **vectors[] = {&c.log_decay, &c.since_start, &c.until_end, &c.beta, &c.inverse_q, &c.inverse_k};
    float **squares[] = {&c.fading, &c.scores, &c.overlaps, &c.system};
    for (int i = 0; i < 6; i++) *vectors[i] = take(memory, CHUNK);
    for (int i = 0; i < 4; i++) *squares[i] = take(memory, CHUNK * CHUNK);
    c.q = take_matrix(memory, CHUNK, p->keys);
    c.k = take_matrix(memory, CHUNK, p->keys);
    c.turned_k = (Matrix){take(memory, p->keys * CHUNK), CHUNK};
    return c;
}

/* Widen the rows of a chunk; zeros after the last. */
static void load_rows(const Chunk *c, const bf16 *x, long stride, long size, Matrix out) {
    for (long t = 0; t < c->length; t++)
        for (long d = 0; d < size; d += LANES)
            _mm512_storeu_ps(out.at + t * out.stride + d, load_wide(x + (c->token + t) * stride + d));
    memset(out.at + c->length * out.stride, 0, (size_t)((c->rows - c->length) * out.stride) * sizeof(float));
}

/* Give rows a length of `length`; `inverse` are their inverse lengths. */
static void normalize(const Chunk *c, Matrix x, float length, float *inverse) {
    long size = c->pack->keys;
    for (long t = 0; t < c->length; t++) {
        float *row = x.at + t * x.stride;
        inverse[t] = 1.0f / sqrtf(dot(row, row, size) + NORM_EPS);
        scale_row(row, inverse[t] * length, NULL, size, row);
    }
}

INLINE float query_length(const Pack *p) { return 1.0f / sqrtf((float)p->keys); }

static void load_decays(Chunk *c) {
    const Pack *p = c->pack;
    float sum = 0.0f;
    for (long t = 0; t < CHUNK; t++) {
        long place = (c->token + t) * p->heads + c->head;
        c->log_decay[t] = sum += t < c->length ? p->decay[place] : 0.0f;
        c->beta[t] = t < c->length ? p->beta[place] : 0.0f;
    }
    __m512 factor = _mm512_set1_ps((float)M_LOG2E);
    for (long t = 0; t < CHUNK; t += LANES) {
        __m512 logs = _mm512_loadu_ps(c->log_decay + t);
        _mm512_storeu_ps(c->since_start + t, exp2_ps(_mm512_mul_ps(logs, factor)));
        _mm512_storeu_ps(c->until_end + t, exp2_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(sum), logs), factor)));
    }
    for (long i = 0; i < c->rows; i++)
        for (long j = 0; j < CHUNK; j += LANES) {
            long seen = i - j + 1;
            __mmask16 mask = seen >= LANES ? 0xffff : (seen <= 0 ? 0 : (__mmask16)((1u << seen) - 1));
            __m512 logs = _mm512_sub_ps(_mm512_set1_ps(c->log_decay[i]), _mm512_loadu_ps(c->log_decay + j));
            _mm512_storeu_ps(c->fading + i * CHUNK + j, _mm512_maskz_mov_ps(mask, exp2_ps(_mm512_mul_ps(logs, factor))));
        }
}

INLINE void fade(const Chunk *c, float *products) {
    for (long i = 0; i < c->rows * CHUNK; i += LANES)
        _mm512_storeu_ps(products + i, _mm512_mul_ps(_mm512_loadu_ps(products + i), _mm512_loadu_ps(c->fading + i)));
}

/* Read a chunk, and relate its tokens to each other; `has_scores` if q is needed too. */
static void load_chunk(Chunk *c, long head, long token, long length, int has_scores) {
    const Pack *p = c->pack;
    long at = head / p->group_size * p->keys;
    c->head = head, c->token = token, c->length = length, c->rows = round_up(length, LANES);
    load_decays(c);
    load_rows(c, p->active + p->k_at + at, p->channels, p->keys, c->k);
    if (p->is_delta) normalize(c, c->k, 1.0f, c->inverse_k);
    if (!has_scores && !p->is_delta) return;
    turn(c->k, c->rows, p->keys, c->turned_k);
    if (has_scores) {
        load_rows(c, p->active + p->q_at + at, p->channels, p->keys, c->q);
        if (p->is_delta) normalize(c, c->q, query_length(p), c->inverse_q);
        multiply((Left){c->q.at, c->q.stride}, c->turned_k, p->keys, c->rows, c->rows, NULL, 0, (Matrix){c->scores, CHUNK});
        fade(c, c->scores);
    }
    if (!p->is_delta) return;
    multiply((Left){c->k.at, c->k.stride}, c->turned_k, p->keys, c->rows, c->rows, NULL, 0, (Matrix){c->overlaps, CHUNK});
    fade(c, c->overlaps);
    for (long i = 0; i < c->rows; i++) {
        c->overlaps[i * CHUNK + i] = 0.0f;
        scale_row(c->overlaps + i * CHUNK, -c->beta[i], NULL, c->rows, c->system + i * CHUNK);
    }
}

/* Compute u from `residual`, which comes in as v and goes out without what the state before predicts. */
static void compute_updates(const Chunk *c, const float *before, Matrix residual, Matrix u) {
    const Pack *p = c->pack;
    if (before && p->is_delta) {
        multiply((Left){c->k.at, c->k.stride}, (Matrix){(float *)before, stride_of(p->values)}, p->keys, c->rows,
                 p->values, NULL, 0, u);
        for (long t = 0; t < c->length; t++) {
            float *row = residual.at + t * residual.stride;
            scale_row(u.at + t * u.stride, -c->since_start[t], row, p->values, row);
        }
    }
    for (long t = 0; t < c->rows; t++)
        scale_row(residual.at + t * residual.stride, c->beta[t], NULL, p->values, u.at + t * u.stride);
    if (p->is_delta) solve((Matrix){c->system, CHUNK}, c->rows, p->values, u, 0);
}

/* Scale the rows of u by the decay until the end. */
static void scale_updates(const Chunk *c, Matrix u, Matrix out) {
    for (long t = 0; t < c->rows; t++)
        scale_row(u.at + t * u.stride, c->until_end[t], NULL, c->pack->values, out.at + t * out.stride);
}

/* The state after a chunk, from the scaled updates; may be written over the one before. */
static void end_state(const Chunk *c, const float *before, Matrix updates, float *after) {
    const Pack *p = c->pack;
    multiply((Left){c->k.at, c->k.stride, 1}, updates, c->length, p->keys, p->values, before, c->since_start[CHUNK - 1],
             (Matrix){after, stride_of(p->values)});
}

static void write_outputs(const Chunk *c, const float *before, Matrix u, Matrix read, Matrix out) {
    const Pack *p = c->pack;
    const bf16 *v = p->active + p->v_at + c->head * p->values;
    float skip = p->skip ? p->skip[c->head] : 0.0f;
    if (before) {
        multiply((Left){c->q.at, c->q.stride}, (Matrix){(float *)before, stride_of(p->values)}, p->keys, c->rows,
                 p->values, NULL, 0, read);
        for (long t = 0; t < c->rows; t++) {
            float *row = read.at + t * read.stride;
            scale_row(row, c->since_start[t], NULL, p->values, row);
        }
    }
    multiply((Left){c->scores, CHUNK, 0, LOWER}, u, c->length, c->rows, p->values, before ? read.at : NULL, 1.0f, out);
    for (long t = 0; t < c->length; t++)
        for (long d = 0; d < p->values; d += LANES) {
            __m512 value = _mm512_loadu_ps(out.at + t * out.stride + d);
            if (p->skip)
                value = _mm512_fmadd_ps(_mm512_set1_ps(skip), load_wide(v + (c->token + t) * p->channels + d), value);
            store_narrow(p->out + ((c->token + t) * p->heads + c->head) * p->values + d, value);
        }
}

static void forward_task(const Pack *p, long root, long head, float *memory) {
    Chunk c = take_chunk(p, &memory);
    Matrix residual = take_matrix(&memory, CHUNK, p->values), u = take_matrix(&memory, CHUNK, p->values);
    Matrix read = take_matrix(&memory, CHUNK, p->values), out = take_matrix(&memory, CHUNK, p->values);
    for (long s = root; s < p->segments; s++) {
        if (p->root[s] != root) continue;
        long parent = parent_of(p, s), end = p->starts[s] + p->lengths[s];
        float *state = memory + p->place[s] * count_state(p);
        const float *before = parent >= 0 ? memory + p->place[parent] * count_state(p) : NULL;
        for (long token = p->starts[s]; token < end; token += CHUNK) {
            load_chunk(&c, head, token, least(CHUNK, end - token), 1);
            load_rows(&c, p->active + p->v_at + head * p->values, p->channels, p->values, residual);
            compute_updates(&c, before, residual, u);
            write_outputs(&c, before, u, read, out);
            if (token + CHUNK >= end && !p->is_continued[s]) continue;
            scale_updates(&c, u, u);
            end_state(&c, before, u, state);
            before = state;
        }
    }
}

/* ---------------------------------------------------------------- gradients */

/* Of one chunk: what it was computed from, and the gradients of all that. */
typedef struct {
    Matrix u, residual, dout, du, weighted, key_room, value_room; /* the last: what passes through the state */
    Matrix dq, dk;
    Matrix turned_keys, turned_values; /* [keys or values, token] */
    float *dscores, *doverlaps, *square, *dlog, *dbeta;
} Grads;

static Grads take_grads(const Pack *p, float **memory) {
    Grads g;
    Matrix *values[] = {&g.dout, &g.du, &g.weighted, &g.value_room}, *keys[] = {&g.dq, &g.dk, &g.key_room};
    float **squares[] = {&g.dscores, &g.doverlaps, &g.square};
    for (int i = 0; i < 4; i++) *values[i] = take_matrix(memory, CHUNK, p->values);
    for (int i = 0; i < 3; i++) *keys[i] = take_matrix(memory, CHUNK, p->keys);
    for (int i = 0; i < 3; i++) *squares[i] = take(memory, CHUNK * CHUNK);
    g.turned_keys = (Matrix){take(memory, p->keys * CHUNK), CHUNK};
    g.turned_values = (Matrix){take(memory, p->values * CHUNK), CHUNK};
    g.dlog = take(memory, CHUNK);
    g.dbeta = take(memory, CHUNK);
    return g;
}

/* What the backward keeps of each chunk: the state after it, u, and what was left of v. */
INLINE long count_kept(const Pack *p) { return count_state(p) + 2 * CHUNK * stride_of(p->values); }

/* key_room = x state^T, for rows x. */
static void read_turned(const Chunk *c, Grads *g, Matrix x, const float *state) {
    const Pack *p = c->pack;
    turn(x, c->rows, p->values, g->turned_values);
    multiply((Left){state, stride_of(p->values)}, g->turned_values, p->values, p->keys, c->rows, NULL, 0, g->turned_keys);
    turn(g->turned_keys, p->keys, c->rows, g->key_room);
}

/* Add key_room to the gradient of q or k, and to that of the logarithms: with `sign` to each token's own, and if
 * `total` is given, to that as well. */
static void add_key_room(const Chunk *c, Grads *g, Matrix x, Matrix dx, float sign, float *total) {
    for (long t = 0; t < c->length; t++) {
        const float *row = g->key_room.at + t * g->key_room.stride;
        float share = dot(row, x.at + t * x.stride, c->pack->keys);
        scale_row(row, 1.0f, dx.at + t * dx.stride, c->pack->keys, dx.at + t * dx.stride);
        g->dlog[t] += sign * share;
        if (total) *total += share;
    }
}

/* Through the state after the chunk: the gradients of k, and, added to `du`, of u. */
static void add_end_state(const Chunk *c, Grads *g, const float *before, const float *dafter) {
    const Pack *p = c->pack;
    Matrix state = {(float *)dafter, stride_of(p->values)};
    float total = 0.0f;
    multiply((Left){c->k.at, c->k.stride}, state, p->keys, c->rows, p->values, NULL, 0, g->value_room);
    for (long t = 0; t < c->rows; t++) {
        float *row = g->du.at + t * g->du.stride;
        scale_row(g->value_room.at + t * g->value_room.stride, c->until_end[t], row, p->values, row);
    }
    scale_updates(c, g->u, g->value_room);
    read_turned(c, g, g->value_room, dafter);
    add_key_room(c, g, c->k, g->dk, -1.0f, &total);
    for (long d = 0; before && d < p->keys; d++)
        total += c->since_start[CHUNK - 1] * dot(before + d * state.stride, dafter + d * state.stride, p->values);
    g->dlog[c->length - 1] += total;
}

/* Through the state before the chunk, which `x` (q or k) reads with the gradient `rows`: adds to the gradients of x and
 * of the state. */
static void add_reading(const Chunk *c, Grads *g, Matrix x, Matrix rows, float factor, Matrix dx, const float *before,
                        const float *dafter, float end, float *dbefore) {
    const Pack *p = c->pack;
    for (long t = 0; t < c->rows; t++)
        scale_row(rows.at + t * rows.stride, factor * c->since_start[t], NULL, p->values,
                  g->value_room.at + t * g->value_room.stride);
    read_turned(c, g, g->value_room, before);
    add_key_room(c, g, x, dx, 1.0f, NULL);
    multiply((Left){x.at, x.stride, 1}, g->value_room, c->length, p->keys, p->values, dafter, end,
             (Matrix){dbefore, stride_of(p->values)});
}

/* dlog_i += sum_j x_ij y_ij, dlog_j -= the same; then x = x F. */
static void add_fading(const Chunk *c, Grads *g, float *x, const float *y) {
    __m512 columns[CHUNK / LANES];
    for (int j = 0; j < CHUNK / LANES; j++) columns[j] = _mm512_setzero_ps();
    for (long i = 0; i < c->rows; i++) {
        __m512 row = _mm512_setzero_ps();
        for (long j = 0; j < c->rows / LANES; j++) {
            long at = i * CHUNK + j * LANES;
            __m512 product = _mm512_mul_ps(_mm512_loadu_ps(x + at), _mm512_loadu_ps(y + at));
            row = _mm512_add_ps(row, product);
            columns[j] = _mm512_add_ps(columns[j], product);
        }
        g->dlog[i] += _mm512_reduce_add_ps(row);
    }
    for (long j = 0; j < c->rows / LANES; j++)
        _mm512_storeu_ps(g->dlog + j * LANES, _mm512_sub_ps(_mm512_loadu_ps(g->dlog + j * LANES), columns[j]));
    fade(c, x);
}

/* Between the tokens of the chunk. */
static void add_inside(const Chunk *c, Grads *g) {
    const Pack *p = c->pack;
    Matrix scores = {g->dscores, CHUNK}, overlaps = {g->doverlaps, CHUNK}, square = {g->square, CHUNK};
    turn(g->u, c->rows, p->values, g->turned_values);
    multiply((Left){g->dout.at, g->dout.stride}, g->turned_values, p->values, c->rows, c->rows, NULL, 0, scores);
    add_fading(c, g, g->dscores, c->scores);
    multiply((Left){g->dscores, CHUNK, 0, LOWER}, c->k, c->length, c->rows, p->keys, g->dq.at, 1.0f, g->dq);
    multiply((Left){g->dscores, CHUNK, 1, UPPER}, c->q, c->length, c->rows, p->keys, g->dk.at, 1.0f, g->dk);
    if (!p->is_delta) return;
    multiply((Left){g->du.at, g->du.stride}, g->turned_values, p->values, c->rows, c->rows, NULL, 0, overlaps);
    for (long i = 0; i < c->rows; i++) {
        float *row = g->doverlaps + i * CHUNK;
        g->dbeta[i] -= dot(row, c->overlaps + i * CHUNK, c->rows);
        scale_row(row, -c->beta[i], NULL, c->rows, row);
    }
    add_fading(c, g, g->doverlaps, c->overlaps);
    for (long i = 0; i < c->rows; i++) g->doverlaps[i * CHUNK + i] = 0.0f;
    turn(overlaps, c->rows, c->rows, square);
    for (long i = 0; i < c->rows; i++)
        scale_row(g->doverlaps + i * CHUNK, 1.0f, g->square + i * CHUNK, c->rows, g->square + i * CHUNK);
    multiply((Left){g->square, CHUNK}, c->k, c->length, c->rows, p->keys, g->dk.at, 1.0f, g->dk);
}

/* Write the gradient of q or k of this head: back through the normalization, added to that of the heads before. */
static void write_keys(const Chunk *c, Matrix x, Matrix dx, float length, const float *inverse, float *out, long stride,
                       int is_first) {
    const Pack *p = c->pack;
    for (long t = 0; t < c->length; t++) {
        const float *row = x.at + t * x.stride;
        float *drow = dx.at + t * dx.stride, *to = out + (c->token + t) * stride;
        if (p->is_delta) {
            float along = dot(row, drow, p->keys) * inverse[t] / length;
            scale_row(drow, inverse[t] * length, NULL, p->keys, drow);
            scale_row(row, -along, drow, p->keys, drow);
        }
        scale_row(drow, 1.0f, is_first ? NULL : to, p->keys, to);
    }
}

static void write_gradients(const Chunk *c, Grads *g, int is_first) {
    const Pack *p = c->pack;
    long group = c->head / p->group_size, part = c->head % p->group_size / (p->group_size / p->parts);
    long first = least(p->q_at, p->k_at), stride = p->parts > 1 ? 2 * p->groups * p->keys : p->channels;
    float *keys = p->parts > 1 ? p->dkeys + part * p->tokens * stride : p->dactive + first, sum = 0.0f;
    keys += group * p->keys;
    write_keys(c, c->q, g->dq, query_length(p), c->inverse_q, keys + p->q_at - first, stride, is_first);
    write_keys(c, c->k, g->dk, 1.0f, c->inverse_k, keys + p->k_at - first, stride, is_first);
    for (long t = 0; t < c->length; t++)
        scale_row(g->du.at + t * g->du.stride, c->beta[t], NULL, p->values,
                  p->dactive + (c->token + t) * p->channels + p->v_at + c->head * p->values);
    for (long t = 0; p->skip && t < c->length; t++) {
        float *to = p->dactive + (c->token + t) * p->channels + p->v_at + c->head * p->values;
        scale_row(g->dout.at + t * g->dout.stride, p->skip[c->head], to, p->values, to);
    }
    for (long t = c->length - 1; t >= 0; t--) {
        long place = (c->token + t) * p->heads + c->head;
        p->ddecay[place] = sum += g->dlog[t];
        p->dbeta[place] = g->dbeta[t];
    }
}

/* All gradients of a chunk. `before` and `dafter` are NULL for a state of zeros, and for one that nothing reads;
 * dbefore, which may be dafter, is written if there is `before`. */
static void backward_chunk(const Chunk *c, Grads *g, const float *before, const float *dafter, float *dbefore) {
    const Pack *p = c->pack;
    memset(g->dq.at, 0, (size_t)(CHUNK * g->dq.stride) * sizeof(float));
    memset(g->dk.at, 0, (size_t)(CHUNK * g->dk.stride) * sizeof(float));
    memset(g->dlog, 0, CHUNK * sizeof(float));
    load_rows(c, p->dout + c->head * p->values, p->heads * p->values, p->values, g->dout);
    multiply((Left){c->scores, CHUNK, 1, UPPER}, g->dout, c->length, c->rows, p->values, NULL, 0, g->du);
    if (dafter) add_end_state(c, g, before, dafter);
    if (p->is_delta) solve((Matrix){c->system, CHUNK}, c->rows, p->values, g->du, 1); /* now of beta times the residual */
    for (long t = 0; t < c->rows; t++)
        g->dbeta[t] = dot(g->du.at + t * g->du.stride, g->residual.at + t * g->residual.stride, p->values);
    if (before) {
        add_reading(c, g, c->q, g->dout, 1.0f, g->dq, before, dafter, c->since_start[CHUNK - 1], dbefore);
        if (p->is_delta) {
            for (long t = 0; t < c->rows; t++)
                scale_row(g->du.at + t * g->du.stride, c->beta[t], NULL, p->values,
                          g->weighted.at + t * g->weighted.stride);
            add_reading(c, g, c->k, g->weighted, -1.0f, g->dk, before, dbefore, 1.0f, dbefore);
        }
    }
    add_inside(c, g);
}

INLINE long count_chunks(const Pack *p, long segment) { return (p->lengths[segment] + CHUNK - 1) / CHUNK; }

/* What is kept of a chunk, by its place among those of its root. */
typedef struct {
    float *after;
    Matrix u, residual;
} Kept;

static Kept kept_of(const Pack *p, float *kept, long chunk) {
    float *memory = kept + chunk * count_kept(p);
    Kept k = {take(&memory, count_state(p)), {0}, {0}};
    k.u = take_matrix(&memory, CHUNK, p->values);
    k.residual = take_matrix(&memory, CHUNK, p->values);
    return k;
}

/* The state before chunk `number` of a segment; NULL: zeros. */
static const float *state_before(const Pack *p, float *kept, long segment, long number) {
    long parent = parent_of(p, segment);
    if (number) return kept_of(p, kept, p->first_chunk[segment] + number - 1).after;
    return parent < 0 ? NULL : kept_of(p, kept, p->first_chunk[parent] + count_chunks(p, parent) - 1).after;
}

INLINE void load_chunk_of(Chunk *c, long head, long segment, long number, int has_scores) {
    long start = number * CHUNK;
    load_chunk(c, head, c->pack->starts[segment] + start, least(CHUNK, c->pack->lengths[segment] - start), has_scores);
}

static void run_again(Chunk *c, Matrix room, long root, long head, float *kept) {
    const Pack *p = c->pack;
    for (long s = root; s < p->segments; s++)
        for (long i = 0; p->root[s] == root && i < count_chunks(p, s); i++) {
            Kept k = kept_of(p, kept, p->first_chunk[s] + i);
            const float *before = state_before(p, kept, s, i);
            load_chunk_of(c, head, s, i, 0);
            load_rows(c, p->active + p->v_at + head * p->values, p->channels, p->values, k.residual);
            compute_updates(c, before, k.residual, k.u);
            if (i + 1 == count_chunks(p, s) && !p->is_continued[s]) continue;
            scale_updates(c, k.u, room);
            end_state(c, before, room, k.after);
        }
}

/* The heads of a group that belong to `part`, one after the other. */
static void backward_task(const Pack *p, long root, long task, float *memory) {
    long in_part = p->group_size / p->parts, first = task * in_part, state = count_state(p);
    Chunk c = take_chunk(p, &memory);
    Grads g = take_grads(p, &memory);
    float *dstates = memory, *kept = memory + p->root_segments[root] * state;
    for (long head = first; head < first + in_part; head++) {
        run_again(&c, g.value_room, root, head, kept);
        memset(dstates, 0, (size_t)(p->root_segments[root] * state) * sizeof(float));
        for (long s = p->segments - 1; s >= root; s--) {
            if (p->root[s] != root) continue;
            long parent = parent_of(p, s);
            float *dstate = dstates + p->place[s] * state;
            for (long i = count_chunks(p, s) - 1; i >= 0; i--) {
                Kept k = kept_of(p, kept, p->first_chunk[s] + i);
                int is_read = i + 1 < count_chunks(p, s) || p->is_continued[s];
                g.u = k.u, g.residual = k.residual;
                load_chunk_of(&c, head, s, i, 1);
                backward_chunk(&c, &g, state_before(p, kept, s, i), is_read ? dstate : NULL, dstate);
                write_gradients(&c, &g, head == first);
            }
            if (parent < 0) continue;
            float *dparent = dstates + p->place[parent] * state;
            scale_row(dstate, 1.0f, dparent, state, dparent);
        }
    }
}

/* Find the trees of segments. Returns 1 if out of memory. */
static int find_roots(Pack *p) {
    long *memory = calloc((size_t)(6 * p->segments), sizeof(long));
    long **lists[] = {&p->root, &p->place, &p->first_chunk, &p->is_continued, &p->root_segments, &p->root_chunks};
    if (!memory) return 1;
    for (int i = 0; i < 6; i++) *lists[i] = memory + i * p->segments;
    for (long s = 0; s < p->segments; s++) {
        long parent = parent_of(p, s), root = parent < 0 ? s : p->root[parent];
        if (parent >= 0) p->is_continued[parent] = 1;
        p->root[s] = root, p->place[s] = p->root_segments[root]++, p->first_chunk[s] = p->root_chunks[root];
        p->root_chunks[root] += count_chunks(p, s);
    }
    return 0;
}

/* Floats of scratch memory of the largest task. */
static long count_scratch(const Pack *p, int is_backward) {
    long values = CHUNK * stride_of(p->values), keys = CHUNK * stride_of(p->keys), most = 0;
    for (long s = 0; s < p->segments; s++) {
        long size = p->root_segments[s] * count_state(p) + (is_backward ? p->root_chunks[s] * count_kept(p) : 0);
        most = size > most ? size : most;
    }
    return most + 5 * values + 7 * keys + CHUNK * (p->keys + p->values) + 7 * CHUNK * CHUNK + 8 * CHUNK;
}

/* Forward, or backward if dout is not NULL. Returns 0, or 1 without memory for the scratch space. */
int recurrence(const bf16 *active, const float *decay, const float *beta, const float *skip, bf16 *out, const bf16 *dout,
               float *dactive, float *dkeys, float *ddecay, float *dbeta, const int64_t *starts, const int64_t *lengths,
               const int64_t *parents, long segments, long tokens, long groups, long group_size, long keys, long values,
               long parts, long is_delta) {
    long heads = groups * group_size, all_keys = groups * keys, all_values = heads * values;
    Pack pack = {.active = active, .decay = decay, .beta = beta, .skip = skip, .out = out, .dout = dout,
                 .dactive = dactive, .dkeys = dkeys, .ddecay = ddecay, .dbeta = dbeta, .starts = starts,
                 .lengths = lengths, .parents = parents, .segments = segments, .tokens = tokens, .groups = groups,
                 .group_size = group_size, .keys = keys, .values = values, .parts = parts, .is_delta = (int)is_delta,
                 .heads = heads, .channels = 2 * all_keys + all_values, .q_at = is_delta ? 0 : all_values + all_keys,
                 .k_at = is_delta ? all_keys : all_values, .v_at = is_delta ? 2 * all_keys : 0};
    const Pack *p = &pack;
    long tasks = dout ? groups * parts : heads;
    int failed = find_roots(&pack);
    if (!failed) {
        long size = count_scratch(p, dout != NULL);
        #pragma omp parallel
        {
            float *memory = scratch(size * (long)sizeof(float));
            if (!memory) failed = 1;
            #pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < segments * tasks; task++) {
                long root = task / tasks;
                if (!memory || p->root[root] != root) continue;
                if (dout) backward_task(p, root, task % tasks, memory);
                else forward_task(p, root, task % tasks, memory);
            }
            free(memory);
        }
    }
    free(pack.root);
    return failed;
}

#else
int recurrence_available(void) { return 0; }
#endif

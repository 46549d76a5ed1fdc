/* One more token per row through the plain pre-norm layers of a decoder, in one call: what Python would call step by step
 * for each layer. Of few rows, those calls take as long as reading the weights.
 *
 * x = x + o(attention(q, k, v of norm(x))), x = x + down(gated(gate, up of norm(x))), each product with its rows' adapters.
 * The steps are the functions of the other files, in the same order on the same bf16 values, so the bits are theirs.
 * Shapes: x [rows, size], in place; for the others see decode.c, lora.c and matmul.c.
 */
#include "steps.h"
#include "vectors.h"

#ifdef VECTORS

/* entry: where its adapters are in their tables, -1 if it has none. */
typedef struct {
    const bf16 *m, *bias;
    long outputs, layout, entry;
} Projection;

typedef struct {
    const float *attention_norm, *mlp_norm, *q_norm, *k_norm; /* the last two may be NULL */
    bf16 *keys, *values;
    Projection q, k, v, o, gate, up, down;
    long heads, kv_heads, window, gelu;
    float attention_eps, mlp_eps, q_eps, k_eps, scale;
} Layer;

/* What all layers share. No adapters: num_tiles is 0. */
typedef struct {
    const float *cosine, *sine;
    const int64_t *places, *tables;
    const Tile *tiles;
    const long *order;
    long rows, size, width, columns, num_tiles, threads;
} Rows;

static int project(const Rows *s, const bf16 *x, long inputs, const Projection *const *projections, bf16 *const *y,
                   long count) {
    Linear adapted[3];
    bf16 *outputs[3];
    long num_adapted = 0;
    for (long i = 0; i < count; i++) {
        const Projection *p = projections[i];
        if (multiply_weight(x, p->m, p->bias, y[i], s->rows, inputs, p->outputs, p->layout, 0, s->threads)) return 1;
        if (p->entry < 0) continue;
        adapted[num_adapted].entry = p->entry;
        adapted[num_adapted].width = p->outputs;
        outputs[num_adapted++] = y[i];
    }
    if (num_adapted && s->num_tiles) lora_rows(x, outputs, s->tiles, s->order, adapted, s->num_tiles, num_adapted, inputs);
    return 0;
}

static void add(bf16 *x, const bf16 *y, long count) {
    for (long i = 0; i < count; i++) {
        union { uint32_t bits; float number; } a = {(uint32_t)x[i] << 16}, b = {(uint32_t)y[i] << 16};
        x[i] = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(a.number + b.number)), 0);
    }
}

static int run_layer(const Layer *l, const Rows *s, bf16 *x, bf16 *memory, float *inverse_rms) {
    long rows = s->rows, heads = l->heads * s->width, kv_heads = l->kv_heads * s->width, inner = l->gate.outputs;
    bf16 *normed = memory, *q = normed + rows * s->size, *k = q + rows * heads, *v = k + rows * kv_heads;
    bf16 *out = v + rows * kv_heads, *gate = q, *up = gate + rows * inner, *product = up + rows * inner;
    rms_norm(x, l->attention_norm, normed, inverse_rms, rows, s->size, l->attention_eps);
    if (project(s, normed, s->size, (const Projection *[]){&l->q, &l->k, &l->v}, (bf16 *[]){q, k, v}, 3)) return 1;
    if (l->q_norm) {
        rms_norm(q, l->q_norm, q, inverse_rms, rows * l->heads, s->width, l->q_eps);
        rms_norm(k, l->k_norm, k, inverse_rms, rows * l->kv_heads, s->width, l->k_eps);
    }
    if (attend_rows(q, k, v, l->keys, l->values, out, s->cosine, s->sine, NULL, s->places, s->tables, rows, l->heads,
                    l->kv_heads, s->width, s->columns, l->window, l->scale)) return 1;
    if (project(s, out, heads, (const Projection *[]){&l->o}, (bf16 *[]){normed}, 1)) return 1;
    add(x, normed, rows * s->size);
    rms_norm(x, l->mlp_norm, normed, inverse_rms, rows, s->size, l->mlp_eps);
    if (project(s, normed, s->size, (const Projection *[]){&l->gate, &l->up}, (bf16 *[]){gate, up}, 2)) return 1;
    gated(gate, up, product, rows * inner, (int)l->gelu);
    if (project(s, product, inner, (const Projection *[]){&l->down}, (bf16 *[]){normed}, 1)) return 1;
    add(x, normed, rows * s->size);
    return 0;
}

/* Returns 0, or 1 without memory for what lies between the steps. */
int decode_layers(bf16 *x, const Layer *layers, const Rows *rows, long num_layers) {
    long most = 0, most_heads = 0;
    for (long i = 0; i < num_layers; i++) {
        const Layer *l = layers + i;
        long attention = (2 * l->heads + 2 * l->kv_heads) * rows->width, mlp = 3 * l->gate.outputs;
        most = attention > most ? attention : most;
        most = mlp > most ? mlp : most;
        most_heads = l->heads > most_heads ? l->heads : most_heads;
    }
    bf16 *memory = scratch(rows->rows * (rows->size + most) * (long)sizeof(bf16));
    float *inverse_rms = scratch(rows->rows * most_heads * (long)sizeof(float));
    int failed = !memory || !inverse_rms;
    for (long i = 0; i < num_layers && !failed; i++) failed = run_layer(layers + i, rows, x, memory, inverse_rms);
    free(memory);
    free(inverse_rms);
    return failed;
}

#endif

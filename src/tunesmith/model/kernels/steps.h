/* The functions that layers.c calls, included where they are defined, too: a changed parameter does not compile. */
#include <stdint.h>

typedef uint16_t bf16;
typedef struct Tile Tile;
/* A linear of a group: its entry in an adapter, and its outputs. */
typedef struct Linear {
    long entry, width;
} Linear;

void rms_norm(const bf16 *x, const float *weight, bf16 *y, float *inverse_rms, long rows, long width, float eps);
void gated(const bf16 *gate, const bf16 *up, bf16 *y, long count, int gelu);
int multiply_weight(const bf16 *x, const bf16 *m, const bf16 *bias, bf16 *y, long rows, long inputs, long outputs,
                    long layout, long adds, long threads);
void lora_rows(const bf16 *x, bf16 *const *y, const Tile *tiles, const long *order, const Linear *linears, long num_tiles,
               long num_linears, long inputs);
int attend_rows(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, bf16 *out, const float *cosine,
                const float *sine, const float *sinks, const int64_t *places, const int64_t *tables, long rows, long heads,
                long kv_heads, long width, long columns, long window, float scale);

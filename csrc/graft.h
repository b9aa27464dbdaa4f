/* graft's native CPU kernels: the plain C interface.

   Every function reads packed weights as they lie in the file (see graft/kernels/packed and
   graft/formats) and returns 0, or -1 when memory runs out. Matrices are row-major and contiguous.
   `threads` is the largest number of threads to use. Results do not depend on it. */
#ifndef GRAFT_H
#define GRAFT_H

#include <stdint.h>

#ifdef _WIN32
#define GRAFT_API __declspec(dllexport)
#else
#define GRAFT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum graft_kind { GRAFT_DENSE, GRAFT_CODEBOOK, GRAFT_INT_GROUP, GRAFT_INT8 };
enum graft_dtype { GRAFT_F32, GRAFT_BF16, GRAFT_F16 };

/* A frozen weight [rows, cols] = [out_features, in_features]. */
typedef struct graft_weight {
    int64_t kind;
    int64_t rows, cols;
    int64_t dtype;      /* of a dense weight; of the scales of an int group weight */
    int64_t offsets_dtype; /* int group: adapters move offsets in float */
    int64_t bits;       /* int group: 2, 3, 4 or 8 */
    int64_t group_size; /* int group: inputs per group; codebook: weights per block */
    const void *data;   /* dense weight, or codes */
    const uint8_t *codes_high; /* int group of 3 bits: the plane of high bits */
    const void *scales;        /* int group; int8 (float, one per row); codebook: absmax (float) */
    const void *offsets;       /* int group */
    const float *codebook;     /* codebook: 16 values by code */
    /* Double quantisation: absmax[b] = nested_code[nested[b]] * nested_scale[b / 256] + offset. */
    const uint8_t *nested;
    const float *nested_code, *nested_scale, *nested_offset;
} graft_weight;

/* A low-rank update beside a weight: y += scaling * (x down^T) up^T. Null pointers: there is none.
   down [rank, cols] and up [rows, rank] have the dtype of x. */
typedef struct graft_low_rank {
    int64_t rank;
    float scaling;
    const void *down, *up;
} graft_low_rank;

/* y [tokens, rows] = x [tokens, cols] W^T + hidden up^T, all of one dtype (float or bf16);
   hidden [tokens, rank] = scaling * x down^T is written when there is a low-rank update. */
GRAFT_API int graft_linear(const graft_weight *weight, const graft_low_rank *low_rank,
                           int64_t dtype, const void *x, int64_t tokens, void *y, void *hidden,
                           int64_t threads);

/* y [tokens, rows] = r(x) W^T, where r rounds a token's inputs, or each block of 32 of them, to 127
   steps either way of the largest (csrc/rounded_products.inc); for int8 weights and for integers in
   groups of whole blocks. */
GRAFT_API int graft_rounded_linear(const graft_weight *weight, int64_t dtype, const void *x,
                                   int64_t tokens, int64_t by_block, void *y, int64_t threads);

/* out = r(x) [tokens, cols] of dtype, as graft_rounded_linear's r. */
GRAFT_API int graft_rounded_inputs(int64_t dtype, const void *x, int64_t tokens, int64_t cols,
                                   int64_t by_block, void *out, int64_t threads);

/* dx [tokens, cols] = dy [tokens, rows] W + hidden down, where
   hidden [tokens, rank] = scaling * dy up. */
GRAFT_API int graft_grad_input(const graft_weight *weight, const graft_low_rank *low_rank,
                               int64_t dtype, const void *dy, int64_t tokens, void *dx,
                               void *hidden, int64_t threads);

/* out float [a_cols, b_cols] = a^T b for a [tokens, a_cols] and b [tokens, b_cols]. */
GRAFT_API int graft_token_product(int64_t dtype, const void *a, int64_t a_cols, const void *b,
                                  int64_t b_cols, int64_t tokens, float *out, int64_t threads);

/* For an int group weight, float [rows, groups]: sums over each group of dy^T x (offsets) and of
   (dy^T x) * code (scales), both times the weight's scales if it has any. rounds: dy and x may be rounded to 7
   bits first. */
GRAFT_API int graft_grad_statistics(const graft_weight *weight, int64_t dtype, const void *dy,
                                    const void *x, int64_t tokens, int64_t rounds, float *scales,
                                    float *offsets, int64_t threads);

/* out [tokens, ceil(cols / group_size)] of dtype: sums over each group, taken in float. */
GRAFT_API int graft_pool(int64_t dtype, const void *x, int64_t tokens, int64_t cols,
                         int64_t group_size, void *out, int64_t threads);

/* out float [rows, groups] = dtype(offsets + scaling * up down), taken in double; up [rows, rank]
   and down [rank, groups] are float, offsets [rows, groups] and the rounding are of dtype. Offsets
   of floats may be NULL, which stands for zeros. */
GRAFT_API int graft_move_offsets(int64_t dtype, const void *offsets, const float *up,
                                 const float *down, int64_t rows, int64_t groups, int64_t rank,
                                 double scaling, float *out, int64_t threads);

/* out [count] = start + scales * moves, taken in double; start, scales and out are of dtype. */
GRAFT_API int graft_move_scaled(int64_t dtype, const void *start, const void *scales,
                                const float *moves, int64_t count, void *out, int64_t threads);

/* A latent weight W + scaling * up down [rows, cols] that rounds to int group codes on a grid of its
   own; W is of weight_dtype (float or bf16), up [rows, rank] and down [rank, cols] are float. */
typedef struct graft_latent {
    int64_t rows, cols, bits, group_size;
    int64_t weight_dtype;
    int64_t dtype; /* of scales and offsets [rows, groups] */
    const void *weight, *scales, *offsets;
    int64_t rank; /* 0: there is no update */
    float scaling;
    const float *down, *up;
} graft_latent;

/* The packed codes. */
GRAFT_API int graft_latent_codes(const graft_latent *weight, uint8_t *codes, uint8_t *codes_high,
                                 int64_t threads);

/* From product [rows, cols] = dy^T x: grad = product where the weight lies in the grid's range, else
   0; grad_u and grad_v [rows, groups]: scale * sums over the group of product * code and product. */
GRAFT_API int graft_latent_grads(const graft_latent *weight, const float *product, float *grad,
                                 float *grad_u, float *grad_v, int64_t threads);

/* out [rows, cols] of dtype (float or bf16). */
GRAFT_API int graft_dequantize(const graft_weight *weight, int64_t dtype, void *out,
                               int64_t threads);

/* The nearest codes and the absmax of each block of `block_size` (an even number) weights.
   bounds [15] are the midpoints, code_of_rank [16] the codes in ascending order of value. */
GRAFT_API int graft_codebook_quantize(int64_t dtype, const void *weight, int64_t count,
                                      int64_t block_size, const float *bounds,
                                      const uint8_t *code_of_rank, uint8_t *codes, float *absmax,
                                      int64_t threads);

/* Double quantisation: codes [count] and scales [ceil(count / 256)] of absmax - offset, each block
   of 256 over its largest magnitude; table [65536] has the code of the value i / 32767.5 - 1. */
GRAFT_API int graft_absmax_quantize(const float *absmax, int64_t count, float offset,
                                    const uint8_t *table, uint8_t *codes, float *scales,
                                    int64_t threads);

/* Codes and statistics of dtype for a weight [rows, cols], rounded to nearest between each group's
   minimum and maximum; returns 1 when a statistic is not finite. */
GRAFT_API int graft_int_group_quantize(int64_t weight_dtype, const void *weight, int64_t rows,
                                       int64_t cols, int64_t bits, int64_t group_size,
                                       int64_t dtype, float smallest_scale, uint8_t *codes,
                                       uint8_t *codes_high, void *scales, void *offsets,
                                       int64_t threads);

/* A linear layer: y = x W^T + bias, where the bias [rows] may be null. */
typedef struct graft_projection {
    graft_weight weight;
    const float *bias;
} graft_projection;

/* One layer of a decoder. keys and values [sequences, key_value_heads, capacity, stride] of the
   decoder's dtype are its cache, where stride is head_dim rounded up to 64, and what lies beyond
   head_dim is 0. */
typedef struct graft_decoder_layer {
    const float *attention_norm, *mlp_norm; /* [hidden] */
    graft_projection query, key, value, out, gate, up, down;
    void *keys, *values;
} graft_decoder_layer;

/* A decoder of the Llama family: RMSNorm, rotated heads that may share keys and values, SiLU. */
typedef struct graft_decoder {
    int64_t dtype; /* of what it computes: float or bf16 */
    int64_t layers, hidden, intermediate, heads, key_value_heads, head_dim;
    int64_t capacity; /* positions of a sequence's cache */
    int64_t rounds_inputs; /* inputs meet integer codes in groups of whole blocks of 32 rounded to 8 bits: 1: with a
                              scale for each block, as in llama.cpp, 2: with one for all; 0: as they are */
    int64_t folds_inputs; /* 1: there is one sequence, whose sums may be taken another way than those of several */
    float epsilon, attention_scaling;
    const graft_decoder_layer *layer;
    graft_weight embedding;
    const float *norm;
    graft_projection head;
    const float *cosines, *sines; /* [capacity, head_dim]; a head's halves are turned together */
} graft_decoder;

/* A token that stands at `position` of a sequence, whose cache holds what came before. */
typedef struct graft_next {
    int64_t token, position, sequence;
} graft_next;

/* logits float [tokens, rows of the head] of what comes after each token, one of each of up to 16
   sequences; the caches then hold these tokens too. A sequence's logits do not depend on which
   others are asked for in the same call. */
GRAFT_API int graft_next_logits(const graft_decoder *decoder, const graft_next *next, int64_t tokens,
                                float *logits, int64_t threads);

/* Vectors [batch, heads, length, head_dim] of a dtype; strides in numbers, 1 along head_dim. */
typedef struct graft_rows {
    void *data;
    int64_t batch, head, row;
} graft_rows;

/* Causal attention: out = softmax(scale q k^T) v, where query i sees the keys 0 to i; head h reads
   kv head h / (heads / kv_heads). lse float [batch, heads, length] is log(sum of e^scores).

   Where starts is not null the batch is 1 and holds `sequences` sequences one behind the other:
   number s has the rows starts[s] to starts[s + 1] - 1, and no row sees those of another. */
typedef struct graft_attention_call {
    int64_t batch, heads, kv_heads, length, head_dim;
    int64_t sequences;
    const int32_t *starts;
    float scale;
    graft_rows q, k, v, out;
    float *lse;
    graft_rows grad_out, grad_q, grad_k, grad_v; /* of graft_attention_backward */
} graft_attention_call;

/* Writes out and lse. */
GRAFT_API int graft_attention(int64_t dtype, const graft_attention_call *call, int64_t threads);

/* Writes grad_q, grad_k and grad_v from the others (FlashAttention-2, arXiv 2307.08691). */
GRAFT_API int graft_attention_backward(int64_t dtype, const graft_attention_call *call, int64_t threads);

/* y [tokens, cols] = weight * (x * scale), scale float [tokens] = 1 / sqrt(mean(x^2) + epsilon); x and
   weight [cols] have the dtype of y, to which x * scale is rounded. */
GRAFT_API int graft_rms_norm(int64_t dtype, const void *x, const void *weight, int64_t tokens,
                             int64_t cols, float epsilon, void *y, float *scale, int64_t threads);

/* dx [tokens, cols] from grad, that of y. */
GRAFT_API int graft_rms_norm_backward(int64_t dtype, const void *grad, const void *x,
                                      const void *weight, const float *scale, int64_t tokens,
                                      int64_t cols, void *dx, int64_t threads);

/* out [count] = silu(gate) * up, silu(gate) rounded to the dtype. */
GRAFT_API int graft_gate(int64_t dtype, const void *gate, const void *up, int64_t count, void *out,
                         int64_t threads);

/* The gradients of gate and up from grad, that of out. */
GRAFT_API int graft_gate_backward(int64_t dtype, const void *grad, const void *gate, const void *up,
                                  int64_t count, void *d_gate, void *d_up, int64_t threads);

/* Name of the instruction set in use. `graft_limit` caps it (for tests): 0 baseline, 1 avx2,
   2 avx512, 3 avx512 with bf16; it returns the level in use. */
GRAFT_API const char *graft_instructions(void);
GRAFT_API int graft_limit(int level);

/* Lends the kernels another runtime's threads: GOMP_parallel of the OpenMP library that PyTorch
   uses. Without it they start their own for each call. */
typedef void (*graft_parallel)(void (*function)(void *), void *data, unsigned threads,
                               unsigned flags);
GRAFT_API void graft_use_threads_of(graft_parallel parallel);

#ifdef __cplusplus
}
#endif
#endif

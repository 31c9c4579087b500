/* heedful's CPU kernels: the whole interface, in plain C.
 *
 * A program is a flat array of ops built once per model. hk_run executes all of them for one batch,
 * on a pool whose threads meet once per op. Pointers inside ops are borrowed: whoever builds a
 * program keeps the weights and activation buffers alive and does not move them.
 *
 * Promise: the bits of a row's result depend on that row alone. Not on the other rows of the batch,
 * on how its prompt was cut into chunks, on the number of threads or on who ran before it.
 *
 * Shape letters: T rows, R selected rows, H hidden, K and N a linear's inputs and outputs, G = K/32
 * groups, D head_dim, V vocabulary, S sequences. Row-major, densely packed. Every pointer is 64-byte
 * aligned. "fp16 d, m": w = d*q + m.
 */
#ifndef HEEDFUL_CPU_H
#define HEEDFUL_CPU_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HK_ABI_VERSION 1
#define HK_MAX_DIMS 10
#define HK_MAX_INPUTS 8
#define HK_MAX_OUTPUTS 4

/* For every kind: dims | params | inputs | outputs, in slot order. "?" marks a pointer that may be
 * null. Row-wise ops run over the T rows of the batch, or over the R selected ones when
 * HK_FLAG_SELECTED is set. */
enum hk_kind {
  /* H, V, table format | - | table | x_TH fp32 */
  HK_EMBED = 0,
  /* H | eps | x_TH fp32, weight_H fp32, bias_H? fp32 (HK_FLAG_CENTERED) |
   * values_TH? int8, scale_TG? fp32, sums_TG? fp32, y_TH? fp32 */
  HK_NORM_QUANT = 1,
  /* K | - | x_TK fp32 | values_TK int8, scale_TG fp32, sums_TG fp32 */
  HK_QUANT = 2,
  /* N, K | - | values_TK, scale_TG, sums_TG, packed q4 weight, bias_N? fp32 | y_TN fp32 */
  HK_LINEAR_Q4 = 3,
  /* the same with a packed q8 weight */
  HK_LINEAR_Q8 = 4,
  /* Hq, Hkv, D, rotary_dim, block_size, num_blocks, max_positions | eps |
   * cos_[P, rotary_dim/2] fp32, sin likewise, q_norm_D? fp32, k_norm_D? fp32 |
   * qkv_[T, (Hq+2Hkv)*D] fp32 (q and k rotated in place), key cache, value cache */
  HK_ROPE_KV = 5,
  /* Hq, Hkv, D, block_size, num_blocks, max_positions | score scale |
   * qkv_[T, (Hq+2Hkv)*D] fp32, key cache, value cache | y_[T, Hq*D] fp32 */
  HK_ATTENTION = 6,
  /* F, activation | - | gate_up_[T, 2F] fp32 ([T, F] for an ungated activation) |
   * values_TF? int8, scale_TG? fp32, sums_TG? fp32, y_TF? fp32 */
  HK_ACT_QUANT = 7,
  /* H | - | x_TH fp32 | y_RH fp32 */
  HK_GATHER_ROWS = 8,
  /* K, max_rank, segments, slots, bf16 (0 or 1) | - | x_TK fp32,
   * A_[slots, segments * max_rank * K], a slot being [segments, ceil(rank/16), K/2, 16, 2] (fp32: [.., K/2, 2, 16]) at
   * its start, ranks_[slots] int32 | h_[T, segments, max_rank] fp32 */
  HK_LORA_SHRINK = 9,
  /* N, max_rank, segments, slots, bf16, end of segment 0..3 | - | h,
   * B_[slots, N * max_rank], a slot being [N/16, ceil(rank/16) * 8, 16, 2] (fp32: [.., 2, 16]) at its start,
   * ranks_[slots] int32, scale_[slots] fp32 | y_TN fp32 (added to) */
  HK_LORA_EXPAND = 10,
  /* V | - | logits_RV fp32 | argmax_R int32 (-1: the row holds a NaN), max_R fp32, lse_R fp32 */
  HK_ARGMAX_LSE = 11,
  /* H, max_positions | - | table_[max_positions, H] fp32 | x_TH fp32 (added to) */
  HK_ADD_POSITION = 12,
  HK_NUM_KINDS = 13
};

enum hk_flag {
  HK_FLAG_SELECTED = 1,   /* rows are the R selected ones */
  HK_FLAG_ACCUMULATE = 2, /* linear: y += instead of y = */
  HK_FLAG_CENTERED = 4,   /* norm: LayerNorm instead of RMSNorm */
  HK_FLAG_OVERLAP = 8     /* the next op does not read what this one writes: no wait in between */
};

enum hk_table { HK_TABLE_FP32 = 0, HK_TABLE_BF16 = 1, HK_TABLE_Q8 = 2, HK_TABLE_Q4 = 3 };
enum hk_activation { HK_SWIGLU = 0, HK_GELU = 1, HK_GELU_TANH = 2, HK_RELU = 3, HK_GEGLU_TANH = 4 };

typedef struct hk_op {
  int32_t kind;
  int32_t flags;
  int32_t dims[HK_MAX_DIMS];
  float params[4];
  const void *inputs[HK_MAX_INPUTS];
  void *outputs[HK_MAX_OUTPUTS];
} hk_op;

typedef struct hk_limits {
  int32_t max_rows;     /* rows that the activation buffers hold */
  int32_t max_selected; /* rows that the buffers behind the selected rows hold */
} hk_limits;

/* One step's rows. lora_slot may be null (no row has an adapter). */
typedef struct hk_batch {
  int32_t num_rows;
  int32_t num_selected;
  int32_t num_sequences;
  int32_t max_blocks;           /* columns of block_tables */
  const int32_t *token_ids;     /* [T] */
  const int32_t *positions;     /* [T] */
  const int32_t *sequence;      /* [T] row of block_tables */
  const int32_t *block_tables;  /* [S, max_blocks] */
  const int64_t *slot_mapping;  /* [T] block * block_size + offset; negative: K and V are not kept */
  const int32_t *selected_rows; /* [R] */
  const int32_t *lora_slot;     /* [T] -1: none */
} hk_batch;

typedef struct hk_pool hk_pool;
typedef struct hk_program hk_program;

int32_t hk_abi_version(void);
/* The instruction set that a request resolves to: null or "" is the best one here. Null when the
 * request is unknown or this machine lacks it. */
const char *hk_isa(const char *requested);
/* The calling thread's last error; valid until its next failing call. */
const char *hk_last_error(void);

/* num_threads counts the thread that calls hk_run. spin_us is how long an idle worker spins before
 * it sleeps. Null on error. */
hk_pool *hk_pool_create(int32_t num_threads, const char *isa, int32_t spin_us);
void hk_pool_destroy(hk_pool *pool);

/* Checks and copies the ops, allocates scratch. Null on error. */
hk_program *hk_program_create(const hk_op *ops, int32_t num_ops, hk_limits limits);
void hk_program_destroy(hk_program *program);

/* 0, or an error code with hk_last_error set and no buffer written. One run at a time per pool and
 * per program. op_seconds, when not null, receives num_ops wall times. */
int32_t hk_run(hk_pool *pool, hk_program *program, const hk_batch *batch, double *op_seconds);

#ifdef __cplusplus
}
#endif
#endif

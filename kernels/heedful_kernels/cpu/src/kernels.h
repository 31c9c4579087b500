// What the program runner and the instruction-set variants agree on: the stages, and what one gets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heedful_cpu.h"

namespace hk {

constexpr int kTile = 16;          // outputs that a packed weight keeps side by side
constexpr int kGroup = 32;         // inputs that share a scale
constexpr int kSplit = 256;        // positions that one softmax covers; splits count from position 0
constexpr int kVocabSplit = 8192;  // logits that one partial argmax covers
constexpr int kLoraRows = 8;       // rows of one adapter that share its loads
constexpr int kRankTile = 16;
constexpr int kLoraColumns = 256;
constexpr int kMaxGroupHeads = 4;  // query heads that share one pass over K and V

// One stage per op, and a second one for the two ops whose parts must be combined.
enum Stage {
  kStageAttentionCombine = HK_NUM_KINDS,
  kStageArgmaxCombine,
  kNumStages,
};

// Rows order[first .. first + count) all use this adapter slot; count <= kLoraRows.
struct LoraGroup {
  int32_t slot, first, count;
};

struct Call {
  const hk_op *op;
  const hk_batch *batch;
  int rows;                 // of this op: all rows or the selected ones
  int splits;               // attention: most splits that a row of this batch has
  bool split_kv;            // attention: a unit is one split instead of all of a row's
  float *shared_scratch;    // the same for all threads; written by one stage, read by the next
  float *thread_scratch;    // this thread's own
  const int32_t *lora_order;
  const LoraGroup *lora_groups;
  int num_lora_groups;
};

using Kernel = void (*)(const Call &call, int begin, int end);

struct KernelTable {
  const char *name;
  Kernel kernels[kNumStages];
};

const KernelTable *generic_table();
#if defined(__x86_64__)
const KernelTable *avx2_table();
const KernelTable *avx512vnni_table();
#endif

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int padded_head_dim(int d) { return ceil_div(d, 32) * 32; }
// One head's partial attention: max, sum, then the unnormalised output. 16-float aligned.
inline int partial_stride(int d) { return 16 + padded_head_dim(d); }
inline int packed_q4_tile_bytes(int groups) { return groups * 320; }
inline int packed_q8_tile_bytes(int groups) { return ceil_div(groups, 2) * 1088; }

}  // namespace hk

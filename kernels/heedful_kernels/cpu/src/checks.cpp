// See checks.h. Sets hk_last_error and returns false instead of crashing later.
#include "checks.h"

namespace hk {
namespace {

const char *const kNames[HK_NUM_KINDS] = {
    "embed",       "norm_quant",  "quant",       "linear_q4",  "linear_q8",
    "rope_kv",     "attention",   "act_quant",   "gather_rows", "lora_shrink",
    "lora_expand", "argmax_lse",  "add_position"};

// Slots that must be filled, as bit masks.
struct Required {
  unsigned inputs, outputs;
};
const Required kRequired[HK_NUM_KINDS] = {
    {0x1, 0x1}, {0x3, 0x0}, {0x1, 0x7}, {0xf, 0x1}, {0xf, 0x1}, {0x0, 0x7}, {0x7, 0x1},
    {0x1, 0x0}, {0x1, 0x1}, {0x7, 0x1}, {0xf, 0x1}, {0x1, 0x7}, {0x1, 0x1}};

bool fail(int index, const hk_op &op, const char *what) {
  set_error("op %d (%s): %s", index, kNames[op.kind], what);
  return false;
}

bool check_pointers(int index, const hk_op &op) {
  const Required &required = kRequired[op.kind];
  for (int i = 0; i < HK_MAX_INPUTS; ++i) {
    if ((required.inputs >> i & 1) && !op.inputs[i]) return fail(index, op, "an input is missing");
    if ((uintptr_t)op.inputs[i] % 64) return fail(index, op, "an input is not 64-byte aligned");
  }
  for (int i = 0; i < HK_MAX_OUTPUTS; ++i) {
    if ((required.outputs >> i & 1) && !op.outputs[i]) {
      return fail(index, op, "an output is missing");
    }
    if ((uintptr_t)op.outputs[i] % 64) return fail(index, op, "an output is not 64-byte aligned");
  }
  if (op.kind == HK_NORM_QUANT || op.kind == HK_ACT_QUANT) {
    const bool whole = op.outputs[0] && op.outputs[1] && op.outputs[2];
    const bool none = !op.outputs[0] && !op.outputs[1] && !op.outputs[2];
    if (!whole && !none) return fail(index, op, "int8 rows need values, scale and sums");
    if (none && !op.outputs[3]) return fail(index, op, "no output");
  }
  return true;
}

bool check_heads(int index, const hk_op &op, int block_size, int num_blocks) {
  const int hq = op.dims[0], hkv = op.dims[1], d = op.dims[2];
  if (hq <= 0 || hkv <= 0 || hq % hkv) return fail(index, op, "query heads per kv head");
  if (d < 16 || d > 256 || d % 16) return fail(index, op, "head_dim is 16 to 256, by 16");
  if (block_size <= 0 || block_size % 16) return fail(index, op, "block_size is a multiple of 16");
  if (num_blocks <= 0) return fail(index, op, "no blocks");
  return true;
}

bool check_lora(int index, const hk_op &op) {
  if (op.dims[1] <= 0 || op.dims[1] % kRankTile || op.dims[2] < 1 || op.dims[2] > 4 ||
      op.dims[3] <= 0) {
    return fail(index, op, "max_rank is a multiple of 16, segments 1 to 4, slots at least 1");
  }
  if (op.kind == HK_LORA_SHRINK) {
    return op.dims[0] > 0 && op.dims[0] % 32 == 0 ? true : fail(index, op, "K is a multiple of 32");
  }
  int start = 0;
  for (int i = 0; i < op.dims[2]; ++i) {
    if (op.dims[5 + i] <= start || op.dims[5 + i] % kTile) {
      return fail(index, op, "segments end at rising multiples of 16");
    }
    start = op.dims[5 + i];
  }
  return start == op.dims[0] ? true : fail(index, op, "the last segment ends at N");
}

bool check_dims(int index, const hk_op &op) {
  const int *dims = op.dims;
  switch (op.kind) {
    case HK_EMBED:
      if (dims[0] <= 0 || dims[1] <= 0 || dims[2] < 0 || dims[2] > HK_TABLE_Q4) break;
      if (dims[2] >= HK_TABLE_Q8 && dims[0] % kGroup) break;
      return true;
    case HK_NORM_QUANT:
    case HK_QUANT:
      if (dims[0] <= 0 || dims[0] % kGroup) break;
      return true;
    case HK_ACT_QUANT:
      if (dims[0] <= 0 || dims[0] % kGroup || dims[1] < 0 || dims[1] > HK_GEGLU_TANH) break;
      return true;
    case HK_LINEAR_Q4:
    case HK_LINEAR_Q8:
      if (dims[0] <= 0 || dims[1] <= 0 || dims[1] % kGroup) break;
      return true;
    case HK_ROPE_KV:
      if (dims[3] < 0 || dims[3] > dims[2] || dims[3] % 2 || dims[6] <= 0) break;
      if (dims[3] && (!op.inputs[0] || !op.inputs[1])) break;
      return check_heads(index, op, dims[4], dims[5]);
    case HK_ATTENTION:
      if (dims[5] <= 0) break;
      return check_heads(index, op, dims[3], dims[4]);
    case HK_GATHER_ROWS:
    case HK_ARGMAX_LSE:
      if (dims[0] <= 0 || !(op.flags & HK_FLAG_SELECTED)) break;
      return true;
    case HK_LORA_SHRINK:
    case HK_LORA_EXPAND: return check_lora(index, op);
    default:
      if (dims[0] <= 0 || dims[1] <= 0) break;
      return true;
  }
  return fail(index, op, "dimensions out of range");
}

void tighten(int32_t *bound, int32_t value) {
  if (*bound == 0 || value < *bound) *bound = value;
}

bool bad_row(const char *what, int row, int64_t value) {
  set_error("row %d: %s %lld is out of range", row, what, (long long)value);
  return false;
}

bool check_row(const hk_batch &batch, const BatchLimits &needs, int t) {
  if (needs.vocabulary && (uint32_t)batch.token_ids[t] >= (uint32_t)needs.vocabulary) {
    return bad_row("token id", t, batch.token_ids[t]);
  }
  if (needs.max_positions && (uint32_t)batch.positions[t] >= (uint32_t)needs.max_positions) {
    return bad_row("position", t, batch.positions[t]);
  }
  if (needs.block_size) {
    const int64_t slots = (int64_t)needs.num_blocks * needs.block_size;
    if (batch.slot_mapping[t] >= slots) return bad_row("slot", t, batch.slot_mapping[t]);
    if ((uint32_t)batch.sequence[t] >= (uint32_t)batch.num_sequences) {
      return bad_row("sequence", t, batch.sequence[t]);
    }
  }
  if (needs.lora_slots && batch.lora_slot && batch.lora_slot[t] >= needs.lora_slots) {
    return bad_row("adapter slot", t, batch.lora_slot[t]);
  }
  return true;
}

// Every block that any row will read, looked at once per sequence.
bool check_blocks(const hk_batch &batch, const BatchLimits &needs, int32_t *ends) {
  for (int s = 0; s < batch.num_sequences; ++s) ends[s] = -1;
  for (int t = 0; t < batch.num_rows; ++t) {
    int32_t &end = ends[batch.sequence[t]];
    if (batch.positions[t] > end) end = batch.positions[t];
  }
  for (int s = 0; s < batch.num_sequences; ++s) {
    if (ends[s] < 0) continue;
    const int blocks = ends[s] / needs.block_size + 1;
    if (blocks > batch.max_blocks) {
      set_error("sequence %d: position %d needs %d blocks, its table has %d", s, ends[s], blocks,
                batch.max_blocks);
      return false;
    }
    const int32_t *table = batch.block_tables + (int64_t)s * batch.max_blocks;
    for (int i = 0; i < blocks; ++i) {
      if ((uint32_t)table[i] < (uint32_t)needs.num_blocks) continue;
      set_error("sequence %d: block %d of its table is %d", s, i, table[i]);
      return false;
    }
  }
  return true;
}

}  // namespace

bool check_ops(const hk_op *ops, int num_ops, hk_limits limits) {
  if (!ops || num_ops <= 0 || limits.max_rows <= 0 || limits.max_selected < 0) {
    set_error("a program needs ops and room for rows: %d ops, %d rows, %d selected", num_ops,
              limits.max_rows, limits.max_selected);
    return false;
  }
  for (int i = 0; i < num_ops; ++i) {
    if (ops[i].kind < 0 || ops[i].kind >= HK_NUM_KINDS) {
      set_error("op %d: unknown kind %d", i, ops[i].kind);
      return false;
    }
    if (!check_pointers(i, ops[i]) || !check_dims(i, ops[i])) return false;
  }
  return true;
}

BatchLimits batch_limits_of(const hk_op *ops, int num_ops) {
  BatchLimits limits{};
  for (int i = 0; i < num_ops; ++i) {
    const int32_t *dims = ops[i].dims;
    limits.selects |= (ops[i].flags & HK_FLAG_SELECTED) != 0;
    switch (ops[i].kind) {
      case HK_EMBED: tighten(&limits.vocabulary, dims[1]); break;
      case HK_ADD_POSITION: tighten(&limits.max_positions, dims[1]); break;
      case HK_ROPE_KV:
        tighten(&limits.max_positions, dims[6]);
        tighten(&limits.block_size, dims[4]);
        tighten(&limits.num_blocks, dims[5]);
        break;
      case HK_ATTENTION:
        limits.attends = true;
        tighten(&limits.max_positions, dims[5]);
        tighten(&limits.block_size, dims[3]);
        tighten(&limits.num_blocks, dims[4]);
        break;
      case HK_LORA_SHRINK:
      case HK_LORA_EXPAND: tighten(&limits.lora_slots, dims[3]); break;
      default: break;
    }
  }
  return limits;
}

bool check_batch(const hk_batch &batch, const BatchLimits &needs, hk_limits limits,
                 int32_t *sequence_ends) {
  if (batch.num_rows < 0 || batch.num_rows > limits.max_rows) {
    set_error("%d rows in a program for %d", batch.num_rows, limits.max_rows);
    return false;
  }
  if (needs.selects && (batch.num_selected < 0 || batch.num_selected > limits.max_selected)) {
    set_error("%d selected rows in a program for %d", batch.num_selected, limits.max_selected);
    return false;
  }
  if (batch.num_sequences < 0 || batch.max_blocks < 0) {
    set_error("%d sequences of %d blocks", batch.num_sequences, batch.max_blocks);
    return false;
  }
  for (int t = 0; t < batch.num_rows; ++t) {
    if (!check_row(batch, needs, t)) return false;
  }
  for (int r = 0; needs.selects && r < batch.num_selected; ++r) {
    if ((uint32_t)batch.selected_rows[r] >= (uint32_t)batch.num_rows) {
      return bad_row("selected row", r, batch.selected_rows[r]);
    }
  }
  return !needs.attends || check_blocks(batch, needs, sequence_ends);
}

}  // namespace hk

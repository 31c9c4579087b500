// What is refused before anything runs: ops once, batches at every run.
#pragma once

#include "kernels.h"

namespace hk {

// The tightest bounds that a program's ops put on a batch; 0 where no op cares.
struct BatchLimits {
  int32_t vocabulary, max_positions, block_size, num_blocks, lora_slots;
  bool selects, attends;
};

void set_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

bool check_ops(const hk_op *ops, int num_ops, hk_limits limits);
BatchLimits batch_limits_of(const hk_op *ops, int num_ops);
// sequence_ends has room for batch.num_sequences entries and is overwritten.
bool check_batch(const hk_batch &batch, const BatchLimits &needs, hk_limits limits,
                 int32_t *sequence_ends);

}  // namespace hk

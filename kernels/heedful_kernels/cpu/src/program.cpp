// Programs: checked copies of ops, expanded to stages, with the scratch memory that they need.
#include <time.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "checks.h"
#include "pool.h"

#define HK_EXPORT extern "C" __attribute__((visibility("default")))

namespace hk {
namespace {

thread_local char last_error[512] = "";

struct StageSpec {
  int op, kernel;
  bool overlap;
};

float *allocate_floats(size_t count) {
  return (float *)aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64 + 64);
}

}  // namespace

void set_error(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
}

namespace {

const KernelTable *find_table(const char *requested) {
  const bool any = !requested || !*requested;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (vnni && (any || !strcmp(requested, "avx512vnni"))) return avx512vnni_table();
  if (avx2 && (any || !strcmp(requested, "avx2"))) return avx2_table();
#endif
  if (any || !strcmp(requested, "generic")) return generic_table();
  set_error("instruction set '%s' is unknown or not available here", requested);
  return nullptr;
}

// Split-KV pays off only while single rows cannot feed all threads; beyond, partials cost memory.
constexpr int kMaxSplitRows = 16;

}  // namespace
}  // namespace hk

using namespace hk;

struct hk_pool {
  Pool *pool;
  std::atomic<bool> busy{false};
};

struct hk_program {
  std::atomic<bool> busy{false};
  int num_ops = 0, num_stages = 0;
  hk_limits limits{};
  BatchLimits batch_limits{};
  hk_op *ops = nullptr;
  StageSpec *stages = nullptr;
  float *shared_scratch = nullptr;
  float *thread_scratch = nullptr;
  int thread_scratch_threads = 0;
  size_t thread_scratch_floats = 0;
  int32_t *lora_order = nullptr;
  LoraGroup *lora_groups = nullptr;
  int32_t *sequence_ends = nullptr;
  int sequence_capacity = 0;

  // Of the run in progress.
  const KernelTable *table = nullptr;
  Call call{};
  double *op_seconds = nullptr;
  double stage_started = 0;

  ~hk_program() {
    free(ops), free(stages), free(shared_scratch), free(thread_scratch);
    free(lora_order), free(lora_groups), free(sequence_ends);
  }
};

namespace {

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int op_rows(const hk_op &op, const hk_batch &batch) {
  return op.flags & HK_FLAG_SELECTED ? batch.num_selected : batch.num_rows;
}

int num_units(const hk_program &program, const StageSpec &stage) {
  const hk_op &op = program.ops[stage.op];
  const Call &call = program.call;
  const int rows = op_rows(op, *call.batch);
  switch (stage.kernel) {
    case HK_LINEAR_Q4:
    case HK_LINEAR_Q8: return rows ? ceil_div(op.dims[0], kTile) : 0;
    case HK_ATTENTION: return rows * op.dims[1] * (call.split_kv ? call.splits : 1);
    case kStageAttentionCombine: return call.split_kv ? rows * op.dims[0] : 0;
    case HK_LORA_SHRINK: return call.num_lora_groups * op.dims[2] * (op.dims[1] / kRankTile);
    case HK_LORA_EXPAND: return call.num_lora_groups * ceil_div(op.dims[0], kLoraColumns);
    case HK_ARGMAX_LSE: return rows * ceil_div(op.dims[0], kVocabSplit);
    default: return rows;
  }
}

void run_units(void *job, int stage, int thread, int begin, int end) {
  const hk_program &program = *(const hk_program *)job;
  const StageSpec &spec = program.stages[stage];
  Call call = program.call;
  call.op = &program.ops[spec.op];
  call.rows = op_rows(*call.op, *call.batch);
  call.thread_scratch = program.thread_scratch + thread * program.thread_scratch_floats;
  program.table->kernels[spec.kernel](call, begin, end);
}

void stage_done(void *job, int stage) {
  hk_program &program = *(hk_program *)job;
  const double now = now_s();
  program.op_seconds[program.stages[stage].op] += now - program.stage_started;
  program.stage_started = now;
}

// Sorts rows by adapter slot, stably, and cuts each slot's rows into groups.
void group_lora_rows(hk_program &program, const hk_batch &batch) {
  program.call.num_lora_groups = 0;
  if (!batch.lora_slot || !program.batch_limits.lora_slots) return;
  int placed = 0;
  for (int slot = 0; slot < program.batch_limits.lora_slots; ++slot) {
    const int first = placed;
    for (int t = 0; t < batch.num_rows; ++t) {
      if (batch.lora_slot[t] == slot) program.lora_order[placed++] = t;
    }
    for (int at = first; at < placed; at += kLoraRows) {
      const int count = placed - at < kLoraRows ? placed - at : kLoraRows;
      program.lora_groups[program.call.num_lora_groups++] = LoraGroup{slot, at, count};
    }
  }
}

void plan_attention(hk_program &program, const hk_batch &batch) {
  int last = 0;
  for (int t = 0; t < batch.num_rows; ++t) {
    if (batch.positions[t] > last) last = batch.positions[t];
  }
  program.call.splits = last / kSplit + 1;
  program.call.split_kv = program.call.splits > 1 && batch.num_rows <= kMaxSplitRows;
}

bool provide_thread_scratch(hk_program &program, int threads) {
  if (threads <= program.thread_scratch_threads) return true;
  free(program.thread_scratch);
  program.thread_scratch = allocate_floats(program.thread_scratch_floats * threads);
  program.thread_scratch_threads = program.thread_scratch ? threads : 0;
  return program.thread_scratch != nullptr;
}

bool provide_sequence_ends(hk_program &program, int sequences) {
  if (sequences <= program.sequence_capacity) return true;
  free(program.sequence_ends);
  program.sequence_ends = (int32_t *)malloc((size_t)sequences * 4);
  program.sequence_capacity = program.sequence_ends ? sequences : 0;
  return program.sequence_ends != nullptr;
}

// The largest scratch that any op asks for: stages of different ops never overlap in their use of it.
void size_scratch(const hk_program &program, size_t *shared, size_t *per_thread) {
  *shared = *per_thread = 16;
  for (int i = 0; i < program.num_ops; ++i) {
    const hk_op &op = program.ops[i];
    size_t wanted = 0, own = 0;
    if (op.kind == HK_ATTENTION) {
      const size_t splits = ceil_div(op.dims[5], kSplit), stride = partial_stride(op.dims[2]);
      const int rows = program.limits.max_rows < kMaxSplitRows ? program.limits.max_rows
                                                               : kMaxSplitRows;
      wanted = splits > 1 ? rows * op.dims[0] * splits * stride : 0;
      own = op.dims[0] / op.dims[1] * splits * stride;
    } else if (op.kind == HK_ARGMAX_LSE) {
      wanted = (size_t)program.limits.max_selected * ceil_div(op.dims[0], kVocabSplit) * 4;
    }
    if (wanted > *shared) *shared = wanted;
    if (own > *per_thread) *per_thread = own;
  }
  *per_thread = (*per_thread + 15) / 16 * 16;
}

void expand_stages(hk_program &program) {
  int n = 0;
  for (int i = 0; i < program.num_ops; ++i) {
    const hk_op &op = program.ops[i];
    const bool combines = op.kind == HK_ATTENTION || op.kind == HK_ARGMAX_LSE;
    program.stages[n++] = StageSpec{i, op.kind, !combines && (op.flags & HK_FLAG_OVERLAP)};
    if (!combines) continue;
    const int second = op.kind == HK_ATTENTION ? kStageAttentionCombine : kStageArgmaxCombine;
    program.stages[n++] = StageSpec{i, second, false};
  }
  program.num_stages = n;
}

bool fill_program(hk_program &program, const hk_op *ops, int num_ops, hk_limits limits) {
  const size_t rows = limits.max_rows, stages = 2 * (size_t)num_ops;
  program.num_ops = num_ops;
  program.limits = limits;
  program.ops = (hk_op *)malloc(num_ops * sizeof(hk_op));
  program.stages = (StageSpec *)malloc(stages * sizeof(StageSpec));
  program.lora_order = (int32_t *)malloc(rows * 4);
  program.lora_groups = (LoraGroup *)malloc(rows * sizeof(LoraGroup));
  if (!program.ops || !program.stages || !program.lora_order || !program.lora_groups) {
    return false;
  }
  memcpy(program.ops, ops, num_ops * sizeof(hk_op));
  program.batch_limits = batch_limits_of(ops, num_ops);
  expand_stages(program);
  size_t shared;
  size_scratch(program, &shared, &program.thread_scratch_floats);
  program.shared_scratch = allocate_floats(shared);
  return program.shared_scratch != nullptr;
}

}  // namespace

HK_EXPORT int32_t hk_abi_version(void) { return HK_ABI_VERSION; }

HK_EXPORT const char *hk_isa(const char *requested) {
  const KernelTable *table = find_table(requested);
  return table ? table->name : nullptr;
}

HK_EXPORT const char *hk_last_error(void) { return last_error; }

HK_EXPORT hk_pool *hk_pool_create(int32_t num_threads, const char *isa, int32_t spin_us) {
  if (num_threads < 1 || num_threads > 1024 || spin_us < 0) {
    set_error("1 to 1024 threads and a spin time of at least 0: %d, %d", num_threads, spin_us);
    return nullptr;
  }
  const KernelTable *table = find_table(isa);
  if (!table) return nullptr;
  Pool *pool = Pool::create(num_threads, table, spin_us);
  hk_pool *handle = pool ? new (std::nothrow) hk_pool{pool, {false}} : nullptr;
  if (!handle) set_error("cannot start %d threads", num_threads);
  return handle;
}

HK_EXPORT void hk_pool_destroy(hk_pool *pool) {
  if (!pool) return;
  delete pool->pool;
  delete pool;
}

HK_EXPORT hk_program *hk_program_create(const hk_op *ops, int32_t num_ops, hk_limits limits) {
  if (!check_ops(ops, num_ops, limits)) return nullptr;
  hk_program *program = new (std::nothrow) hk_program;
  if (program && fill_program(*program, ops, num_ops, limits)) return program;
  set_error("out of memory for a program of %d ops", num_ops);
  delete program;
  return nullptr;
}

HK_EXPORT void hk_program_destroy(hk_program *program) { delete program; }

namespace {

// Both stay claimed for the length of a run; a second caller is told so instead of racing.
struct Claim {
  std::atomic<bool> *flag;
  bool held;
  explicit Claim(std::atomic<bool> *f) : flag(f), held(!f->exchange(true)) {}
  ~Claim() {
    if (held) flag->store(false);
  }
};

}  // namespace

HK_EXPORT int32_t hk_run(hk_pool *pool, hk_program *program, const hk_batch *batch,
                         double *op_seconds) {
  const Claim pool_claim(&pool->busy), program_claim(&program->busy);
  if (!pool_claim.held || !program_claim.held) {
    set_error("the %s is running already", pool_claim.held ? "program" : "pool");
    return 3;
  }
  const BatchLimits &limits = program->batch_limits;
  if (!provide_sequence_ends(*program, batch->num_sequences)) {
    set_error("out of memory for %d sequences", batch->num_sequences);
    return 2;
  }
  if (!check_batch(*batch, limits, program->limits, program->sequence_ends)) return 1;
  if (batch->num_rows == 0) return 0;
  Slot *slots = pool->pool->prepare(program->num_stages);
  if (!slots || !provide_thread_scratch(*program, pool->pool->num_threads())) {
    set_error("out of memory for scratch");
    return 2;
  }
  program->table = &pool->pool->table();
  program->call.batch = batch;
  program->call.shared_scratch = program->shared_scratch;
  program->call.lora_order = program->lora_order;
  program->call.lora_groups = program->lora_groups;
  plan_attention(*program, *batch);
  group_lora_rows(*program, *batch);
  for (int s = 0; s < program->num_stages; ++s) {
    slots[s].total = num_units(*program, program->stages[s]);
    slots[s].overlap = program->stages[s].overlap;
  }
  program->op_seconds = op_seconds;
  if (op_seconds) {
    memset(op_seconds, 0, program->num_ops * sizeof(double));
    program->stage_started = now_s();
  }
  pool->pool->run(Work{slots, program->num_stages, run_units,
                       op_seconds ? stage_done : nullptr, program});
  return 0;
}

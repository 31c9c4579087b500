// Threads that walk one list of stages together.
//
// A stage is done when all its units are done, not when every thread has arrived: a thread that was
// descheduled holds up nobody unless it sits on a claimed unit. Late threads find nothing to claim
// and catch up. Waiting threads spin briefly, then yield, since the server and its clients run on
// the same cores.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

#include "kernels.h"

namespace hk {

// One stage of a run. On a cache line of its own: both counters are written by every thread.
struct alignas(64) Slot {
  std::atomic<int32_t> next;
  std::atomic<int32_t> done;
  int32_t total;
  bool overlap;  // the next stage may start before this one is done
};

// What the units of a stage call. `thread` is 0 for the caller of run.
using RunUnits = void (*)(void *job, int stage, int thread, int begin, int end);
using StageDone = void (*)(void *job, int stage);

struct Work {
  Slot *slots;  // from prepare()
  int num_stages;
  RunUnits run_units;
  StageDone stage_done;  // called by the caller's thread; may be null
  void *job;
};

class Pool {
 public:
  // Null when the threads cannot be started.
  static Pool *create(int num_threads, const KernelTable *table, int spin_us);
  ~Pool();

  // Slots for the next run, zeroed counters and all; null when there is no memory. They belong to the
  // pool because late threads may still look at the last run's: this waits until none does.
  Slot *prepare(int num_stages);
  // Returns when every stage is done. One caller at a time.
  void run(const Work &work);

  int num_threads() const { return num_threads_; }
  const KernelTable &table() const { return *table_; }

 private:
  Pool(int num_threads, const KernelTable *table, int spin_us);
  static void *thread_main(void *argument);
  void serve(int thread);
  uint64_t await_run(uint64_t last);
  void walk(int thread);
  int claim(Slot &slot, int *begin) const;

  const int num_threads_;
  const KernelTable *table_;
  const int64_t spin_ns_;
  Work work_{};
  Slot *slots_ = nullptr;
  int capacity_ = 0;
  // Odd while a run is open. A worker may look at work_ only between entering (active_) and leaving,
  // and only if the gate was open after it entered.
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<int32_t> active_{0};
  std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> stop_{false};
  pthread_mutex_t mutex_;
  pthread_cond_t wake_;
  pthread_t *threads_ = nullptr;
  int started_ = 0;
};

}  // namespace hk

// See pool.h.
#include "pool.h"

#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hk {
namespace {

// About 30 us of spinning: longer than a stage lasts, far shorter than a scheduler's quantum.
constexpr int kSpinsBeforeYield = 1500;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

template <typename Ready>
void wait_until(Ready ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < kSpinsBeforeYield) {
      relax();
    } else {
      sched_yield();
    }
  }
}

struct Start {
  Pool *pool;
  int thread;
};

}  // namespace

Pool::Pool(int num_threads, const KernelTable *table, int spin_us)
    : num_threads_(num_threads), table_(table), spin_ns_((int64_t)spin_us * 1000) {
  pthread_mutex_init(&mutex_, nullptr);
  pthread_cond_init(&wake_, nullptr);
}

Pool *Pool::create(int num_threads, const KernelTable *table, int spin_us) {
  Pool *pool = new (std::nothrow) Pool(num_threads, table, spin_us);
  if (!pool) return nullptr;
  pool->threads_ = new (std::nothrow) pthread_t[num_threads];
  for (int i = 1; pool->threads_ && i < num_threads; ++i) {
    Start *start = new (std::nothrow) Start{pool, i};
    if (!start || pthread_create(&pool->threads_[i - 1], nullptr, thread_main, start)) {
      delete start;
      break;
    }
    pool->started_ = i;
  }
  if (pool->threads_ && pool->started_ == num_threads - 1) return pool;
  delete pool;
  return nullptr;
}

Pool::~Pool() {
  pthread_mutex_lock(&mutex_);
  stop_.store(true);
  pthread_cond_broadcast(&wake_);
  pthread_mutex_unlock(&mutex_);
  for (int i = 0; i < started_; ++i) pthread_join(threads_[i], nullptr);
  delete[] threads_;
  free(slots_);
  pthread_cond_destroy(&wake_);
  pthread_mutex_destroy(&mutex_);
}

void *Pool::thread_main(void *argument) {
  const Start start = *(Start *)argument;
  delete (Start *)argument;
  start.pool->serve(start.thread);
  return nullptr;
}

// Blocks until a run other than `last` is open and returns its gate, or 0 when the pool closes.
uint64_t Pool::await_run(uint64_t last) {
  const auto open = [&] {
    const uint64_t gate = gate_.load();
    return (gate & 1) && gate != last;
  };
  const int64_t deadline_ns = now_ns() + spin_ns_;
  while (!open() && !stop_.load() && now_ns() < deadline_ns) {
    for (int i = 0; i < 50 && !open(); ++i) relax();
  }
  if (!open()) {
    pthread_mutex_lock(&mutex_);
    // Sequentially consistent against run(): either it sees the sleeper or we see the open gate.
    sleepers_.fetch_add(1);
    while (!open() && !stop_.load()) pthread_cond_wait(&wake_, &mutex_);
    sleepers_.fetch_sub(1);
    pthread_mutex_unlock(&mutex_);
  }
  return stop_.load() ? 0 : gate_.load();
}

void Pool::serve(int thread) {
  uint64_t last = 0;
  while (const uint64_t gate = await_run(last)) {
    active_.fetch_add(1);
    // A gate that closed in between means that the slots may be about to change.
    if ((gate & 1) && gate_.load() == gate) walk(thread);
    active_.fetch_sub(1);
    last = gate;
  }
}

Slot *Pool::prepare(int num_stages) {
  wait_until([&] { return active_.load() == 0; });
  if (num_stages > capacity_) {
    free(slots_);
    slots_ = (Slot *)aligned_alloc(64, num_stages * sizeof(Slot));
    capacity_ = slots_ ? num_stages : 0;
  }
  for (int s = 0; slots_ && s < num_stages; ++s) new (&slots_[s]) Slot{{0}, {0}, 0, false};
  return slots_;
}

void Pool::run(const Work &work) {
  work_ = work;
  gate_.fetch_add(1);
  if (sleepers_.load() > 0) {
    pthread_mutex_lock(&mutex_);
    pthread_cond_broadcast(&wake_);
    pthread_mutex_unlock(&mutex_);
  }
  walk(0);
  gate_.fetch_add(1);
}

// Large pieces first, single units last: few claims, and little to wait for at the end.
int Pool::claim(Slot &slot, int *begin) const {
  int32_t at = slot.next.load(std::memory_order_relaxed);
  while (at < slot.total) {
    const int32_t share = (slot.total - at) / (2 * num_threads_);
    const int32_t end = at + (share > 1 ? share : 1);
    if (slot.next.compare_exchange_weak(at, end, std::memory_order_relaxed)) {
      *begin = at;
      return end;
    }
  }
  return 0;
}

void Pool::walk(int thread) {
  const Work work = work_;
  int waited = 0;
  for (int s = 0; s < work.num_stages; ++s) {
    Slot &slot = work.slots[s];
    int begin;
    while (const int end = claim(slot, &begin)) {
      work.run_units(work.job, s, thread, begin, end);
      slot.done.fetch_add(end - begin, std::memory_order_release);
    }
    if (slot.overlap) continue;
    for (; waited <= s; ++waited) {
      Slot &earlier = work.slots[waited];
      wait_until([&] { return earlier.done.load(std::memory_order_acquire) == earlier.total; });
      if (thread == 0 && work.stage_done) work.stage_done(work.job, waited);
    }
  }
}

}  // namespace hk

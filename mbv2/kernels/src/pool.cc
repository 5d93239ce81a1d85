#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "imnet_prep/images/native/platform.h"

namespace mbv2 {
namespace {

constexpr int kSpins = 4000;  // some tens of microseconds: the gap between two operators of one step

}  // namespace

Arena::~Arena() { imnet::FreeAligned(data_); }

float* Arena::reserve(size_t floats) {
  if (floats > size_) {
    imnet::FreeAligned(data_);
    size_t bytes = floats * sizeof(float);
    data_ = static_cast<float*>(imnet::AllocateAligned(&bytes));
    size_ = data_ == nullptr ? 0 : bytes / sizeof(float);
  }
  return data_;
}

struct Pool::State {
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Arena>> arenas;
  std::mutex mutex;
  std::condition_variable wake, finished;
  std::atomic<unsigned> round{0};
  std::atomic<int> pending{0};
  std::atomic<bool> stopping{false};
  const std::function<void(int)>* job = nullptr;
};

Pool& Pool::instance() {
  static Pool& pool = *new Pool;
  return pool;
}

Pool::Pool() : state_(new State) {
  start(imnet::UsableThreads());
  imnet::AfterFork(&Pool::forked);
}

// A forked child has none of the threads: it starts its own, and leaves its copy of the parent's bookkeeping alone.
void Pool::forked() {
  Pool& pool = instance();
  new (&pool.turn_) std::mutex;
  pool.state_ = new State;
  pool.state_->arenas.emplace_back(new Arena);
}

void Pool::start(int count) {
  State& s = *state_;
  s.arenas.emplace_back(new Arena);
  for (int worker = 1; worker < count; ++worker) {
    try {
      s.threads.emplace_back(&Pool::work, std::ref(s), worker);
    } catch (const std::system_error&) {  // a limit on threads: work with those that there are
      return;
    }
    s.arenas.emplace_back(new Arena);
  }
}

void Pool::work(State& s, int worker) {
  for (unsigned seen = 0;;) {
    for (int i = 0; i < kSpins && s.round.load(std::memory_order_acquire) == seen; ++i) imnet::Pause();
    if (s.round.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(s.mutex);
      s.wake.wait(lock, [&] { return s.round.load(std::memory_order_acquire) != seen; });
    }
    ++seen;
    if (s.stopping.load(std::memory_order_acquire)) return;
    (*s.job)(worker);
    if (s.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard<std::mutex> lock(s.mutex);
      s.finished.notify_one();
    }
  }
}

void Pool::stop() {
  State& s = *state_;
  {
    std::lock_guard<std::mutex> lock(s.mutex);
    s.stopping.store(true, std::memory_order_release);
    s.round.fetch_add(1, std::memory_order_acq_rel);
  }
  s.wake.notify_all();
  for (auto& thread : s.threads) thread.join();
  s.threads.clear();
}

int Pool::size() { return static_cast<int>(state_->arenas.size()); }

void Pool::resize(int count) {
  if (count <= 0) count = imnet::UsableThreads();
  if (count == size()) return;
  stop();
  delete state_;
  state_ = new State;
  start(count);
}

Arena& Pool::arena(int worker) { return *state_->arenas[worker]; }

void Pool::run(const std::function<void(int)>& job) {
  State& s = *state_;
  const int others = static_cast<int>(s.threads.size());
  if (others > 0) {
    s.job = &job;
    s.pending.store(others, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(s.mutex);
      s.round.fetch_add(1, std::memory_order_acq_rel);
    }
    s.wake.notify_all();
  }
  job(0);
  if (others > 0) {
    for (int i = 0; i < kSpins && s.pending.load(std::memory_order_acquire) > 0; ++i) imnet::Pause();
    if (s.pending.load(std::memory_order_acquire) > 0) {
      std::unique_lock<std::mutex> lock(s.mutex);
      s.finished.wait(lock, [&] { return s.pending.load(std::memory_order_acquire) == 0; });
    }
  }
}

Range part(int64_t total, int worker, int count, int64_t grain) {
  const int64_t pieces = (total + grain - 1) / grain;
  const int64_t begin = pieces * worker / count * grain, end = pieces * (worker + 1) / count * grain;
  return {std::min(begin, total), std::min(end, total)};
}

}  // namespace mbv2

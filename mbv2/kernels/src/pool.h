// The threads, kept between calls, and each one's scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>

namespace mbv2 {

// Memory that only grows, aligned to 64 bytes. Empty after a failed allocation.
class Arena {
 public:
  ~Arena();
  float* reserve(size_t floats);  // nullptr: out of memory. What was there before is lost.

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

class Pool {
 public:
  static Pool& instance();  // never destroyed: on Windows its threads are gone before a library can join them

  int size();              // workers, the caller included
  void resize(int count);  // 0: as many as the process may use

  // Calls job(worker) for every worker 0..size-1, the caller being 0, and waits. Which worker does what depends on its
  // number alone: results are the same bits at the same size.
  void run(const std::function<void(int)>& job);

  // One operator at a time: MindSpore may launch two from two of its threads.
  std::mutex& turn() { return turn_; }
  Arena& arena(int worker);

 private:
  Pool();
  Pool(const Pool&) = delete;
  struct State;
  void start(int count);  // fewer where the system starts no more threads
  static void work(State& state, int worker);
  void stop();
  static void forked();
  State* state_;
  std::mutex turn_;
};

// Part `worker` of `count` equal parts of [0, total), cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
Range part(int64_t total, int worker, int count, int64_t grain);

}  // namespace mbv2

// What differs between compilers, processors and operating systems, for the decoder and for mbv2's operators.
//
// Both libraries use the vector extension of GCC and Clang, which MSVC lacks: on Windows they are built by MinGW.
#ifndef IMNET_PREP_NATIVE_PLATFORM_H_
#define IMNET_PREP_NATIVE_PLATFORM_H_

#if !defined(__GNUC__)
#error "These libraries need GCC or Clang; on Windows, MinGW."
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <thread>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

// Before a function that the library shows to Python; every other one is hidden.
#if defined(_WIN32)
#define IMNET_API extern "C" __declspec(dllexport)
#else
#define IMNET_API extern "C" __attribute__((visibility("default")))
#endif

namespace imnet {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks the system for huge pages where memory is not in use yet: a hint, whose failure changes nothing.
inline void AskForHugePages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = 4096, begin = reinterpret_cast<uintptr_t>(memory) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Returns memory aligned to 64 bytes, or null. From 2 MiB on it is aligned to that, and the system is asked for huge
// pages. `bytes` is rounded up to what is there.
inline void* AllocateAligned(size_t* bytes) {
  constexpr size_t kLine = 64;
  const size_t alignment = *bytes >= kHugePage ? kHugePage : kLine;
  *bytes = (*bytes + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
  return _aligned_malloc(*bytes, alignment);
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, *bytes) != 0) return nullptr;
  if (alignment == kHugePage) AskForHugePages(memory, *bytes);
  return memory;
#endif
}

inline void FreeAligned(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

// How many threads the process may run at once.
inline int UsableThreads() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

// In a loop that waits for another thread.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Calls `child` in each process that is forked from this one.
inline void AfterFork([[maybe_unused]] void (*child)()) {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, child);
#endif
}

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_PLATFORM_H_

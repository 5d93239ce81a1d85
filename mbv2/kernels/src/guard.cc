#include "guard.h"

#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "instruction_set.h"
#include "pool.h"

namespace mbv2 {
namespace {

thread_local std::string last_error;

// The same of any thread, for those who called an operator through MindSpore: it runs them on threads of its own.
std::mutex any_mutex;
std::string any_error;

int keep(int code, std::string why) {
  std::lock_guard<std::mutex> lock(any_mutex);
  any_error = last_error = std::move(why);
  return code;
}

}  // namespace

int guarded(void (*body)(Call&), const char* name, int n, void** data, int* ndims, int64_t** shapes, const char** dtypes) {
  try {
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Call call(name, n, data, ndims, shapes, dtypes);
    body(call);
    return 0;
  } catch (const Refused& refused) {
    return keep(1, refused.what());
  } catch (const std::bad_alloc&) {
    return keep(2, std::string(name) + ": out of memory");
  } catch (const std::exception& error) {  // none may cross the C interface
    return keep(3, std::string(name) + ": " + error.what());
  }
}

}  // namespace mbv2

// Why the last call on this thread was refused.
IMNET_API const char* mbv2_last_error() { return mbv2::last_error.c_str(); }
// Why the last call on any thread was refused, once: then it is empty again.
IMNET_API const char* mbv2_take_error() {
  static thread_local std::string taken;
  std::lock_guard<std::mutex> lock(mbv2::any_mutex);
  taken = std::move(mbv2::any_error);
  mbv2::any_error.clear();
  return taken.c_str();
}
IMNET_API const char* mbv2_instruction_set() { return mbv2::vector_code().name; }
IMNET_API int mbv2_threads() { return mbv2::Pool::instance().size(); }
// Returns the number of threads, which is smaller than `count` where the system starts no more.
IMNET_API int mbv2_set_threads(int count) {
  try {
    std::lock_guard<std::mutex> turn(mbv2::Pool::instance().turn());
    mbv2::Pool::instance().resize(count);
  } catch (const std::exception&) {  // out of memory: the pool is as large as it is
  }
  return mbv2::Pool::instance().size();
}

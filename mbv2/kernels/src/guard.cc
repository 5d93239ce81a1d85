#include "guard.h"

#include <exception>
#include <new>
#include <string>

#include "instruction_set.h"
#include "pool.h"

namespace mbv2 {
namespace {

thread_local std::string last_error;

}  // namespace

int guarded(void (*body)(Call&), const char* name, int n, void** data, int* ndims, int64_t** shapes, const char** dtypes) {
  try {
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Call call(name, n, data, ndims, shapes, dtypes);
    body(call);
    return 0;
  } catch (const Refused& refused) {
    last_error = refused.what();
    return 1;
  } catch (const std::bad_alloc&) {
    last_error = std::string(name) + ": out of memory";
    return 2;
  } catch (const std::exception& error) {  // none may cross the C interface
    last_error = std::string(name) + ": " + error.what();
    return 3;
  }
}

}  // namespace mbv2

// Why the last call on this thread was refused.
EXPORT const char* mbv2_last_error() { return mbv2::last_error.c_str(); }
EXPORT const char* mbv2_instruction_set() { return mbv2::vector_code().name; }
EXPORT int mbv2_threads() { return mbv2::Pool::instance().size(); }
// Returns the number of threads, which is smaller than `count` where the system starts no more.
EXPORT int mbv2_set_threads(int count) {
  try {
    std::lock_guard<std::mutex> turn(mbv2::Pool::instance().turn());
    mbv2::Pool::instance().resize(count);
  } catch (const std::exception&) {  // out of memory: the pool is as large as it is
  }
  return mbv2::Pool::instance().size();
}

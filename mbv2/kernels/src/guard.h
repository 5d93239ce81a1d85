// The C interface of an operator, as MindSpore's ops.Custom("<library>:<name>", ..., "aot") calls it: inputs, then outputs.
#pragma once

#include "call.h"
#include "imnet_prep/images/native/platform.h"

namespace mbv2 {

// Runs an operator's body, alone in the process. Returns 0, or another number and keeps why: no exception crosses the C
// interface.
int guarded(void (*body)(Call&), const char* name, int n, void** data, int* ndims, int64_t** shapes, const char** dtypes);

}  // namespace mbv2

// Defines and exports operator mbv2_NAME inside the unnamed namespace of mbv2; a body in braces follows, with `call`.
#define OPERATOR(NAME)                                                                                             \
  void NAME##_body(Call& call);                                                                                    \
  }                                                                                                                \
  IMNET_API int mbv2_##NAME(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) { \
    return guarded(NAME##_body, #NAME, n, data, ndims, shapes, dtypes);                                            \
  }                                                                                                                \
  namespace {                                                                                                      \
  void NAME##_body(Call& call)

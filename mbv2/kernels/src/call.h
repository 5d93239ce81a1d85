// A MindSpore "aot" call, taken apart and checked: tensors in order, each with the shape and type it must have.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "imnet_prep/images/native/platform.h"
#include "instruction_set.h"

namespace mbv2 {

// What a refused call says; the binding shows it to the user.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Call {
 public:
  Call(const char* name, int count, void** data, int* ndims, int64_t** shapes, const char** dtypes)
      : name_(name), count_(count), data_(data), ndims_(ndims), shapes_(shapes), dtypes_(dtypes) {}

  [[noreturn]] void refuse(const std::string& what) const { throw Refused(std::string(name_) + ": " + what); }

  // The next tensor, of a given type and rank; its sizes go to `shape`.
  template <class T>
  T* next(const char* what, int rank, int64_t* shape) {
    if (at_ >= count_) refuse(std::string("expects more tensors, got ") + std::to_string(count_) + "; missing " + what);
    const int i = at_++;
    if (!dtypes_[i] || std::strcmp(dtypes_[i], type_name<T>()) != 0)
      refuse(std::string(what) + " must be " + type_name<T>() + ", got " + (dtypes_[i] ? dtypes_[i] : "no type"));
    if (ndims_[i] != rank) refuse(std::string(what) + " must have " + std::to_string(rank) + " dimensions, got " + sizes(i));
    for (int d = 0; d < rank; ++d) {
      if (shapes_[i][d] <= 0 || shapes_[i][d] > INT32_MAX) refuse(std::string(what) + " has an empty or huge dimension: " + sizes(i));
      shape[d] = shapes_[i][d];
    }
    if (!data_[i]) refuse(std::string(what) + " has no memory");
    return static_cast<T*>(data_[i]);
  }

  // The next tensor, of a given type and any shape, and how many values it has.
  template <class T>
  T* any(const char* what, int64_t* count) {
    int64_t shape[8];
    const int rank = at_ < count_ ? ndims_[at_] : 0;
    if (rank > 8) refuse(std::string(what) + " has more than 8 dimensions");
    T* data = next<T>(what, rank, shape);
    *count = 1;
    for (int d = 0; d < rank; ++d) *count *= shape[d];
    return data;
  }

  // The next tensor, whose sizes are known.
  template <class T>
  T* exactly(const char* what, std::initializer_list<int64_t> expected) {
    int64_t shape[8];
    const int i = at_;
    T* data = next<T>(what, static_cast<int>(expected.size()), shape);
    int d = 0;
    for (const int64_t size : expected) {
      if (shape[d++] == size) continue;
      std::string text;
      for (const int64_t s : expected) text += (text.empty() ? "" : ", ") + std::to_string(s);
      refuse(std::string(what) + " must be (" + text + "), got " + sizes(i));
    }
    return data;
  }

  int channels(const char* what, int64_t count) const {
    if (count % 8 != 0) refuse(std::string(what) + " must be a multiple of 8, got " + std::to_string(count));
    return static_cast<int>(count);
  }

  // All tensors are read. MindSpore's memory has no huge pages of its own: it is asked for them before an operator is the
  // first to write there.
  void done() const {
    if (at_ != count_) refuse("expects " + std::to_string(at_) + " tensors, got " + std::to_string(count_));
    for (int i = 0; i < count_; ++i) {
      size_t bytes = std::strcmp(dtypes_[i], "uint8") == 0 ? 1 : std::strcmp(dtypes_[i], "bfloat16") == 0 ? 2 : 4;
      for (int d = 0; d < ndims_[i]; ++d) bytes *= static_cast<size_t>(shapes_[i][d]);
      if (bytes >= imnet::kHugePage) imnet::AskForHugePages(data_[i], bytes);
    }
  }

 private:
  template <class T>
  static const char* type_name();

  std::string sizes(int i) const {
    std::string text = "(";
    for (int d = 0; d < ndims_[i]; ++d) text += (d ? ", " : "") + std::to_string(shapes_[i][d]);
    return text + ")";
  }

  const char* name_;
  int count_, at_ = 0;
  void** data_;
  int* ndims_;
  int64_t** shapes_;
  const char** dtypes_;
};

template <>
inline const char* Call::type_name<float>() { return "float32"; }
template <>
inline const char* Call::type_name<bfloat16>() { return "bfloat16"; }
template <>
inline const char* Call::type_name<int32_t>() { return "int32"; }
template <>
inline const char* Call::type_name<uint8_t>() { return "uint8"; }

}  // namespace mbv2

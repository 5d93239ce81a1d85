// One of this package's libraries, loaded at run time as Python does it: for the programs that call all of it.
#ifndef IMNET_PREP_NATIVE_STRESS_LIBRARY_H_
#define IMNET_PREP_NATIVE_STRESS_LIBRARY_H_

#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

class Library {
 public:
  // Ends the program where the library does not load.
  explicit Library(const char* path) {
#if defined(_WIN32)
    library_ = LoadLibraryA(path);
    const std::string why = "error " + std::to_string(GetLastError());
#else
    library_ = dlopen(path, RTLD_NOW);
    const std::string why = library_ == nullptr ? dlerror() : "";
#endif
    if (library_ != nullptr) return;
    std::fprintf(stderr, "%s does not load: %s\n", path, why.c_str());
    std::exit(2);
  }

  // The function of that name; ends the program where there is none.
  template <class Function>
  Function* function(const std::string& name) const {
#if defined(_WIN32)
    auto* const found = reinterpret_cast<void*>(GetProcAddress(library_, name.c_str()));
#else
    auto* const found = dlsym(library_, name.c_str());
#endif
    if (found == nullptr) {
      std::fprintf(stderr, "the library has no %s\n", name.c_str());
      std::exit(2);
    }
    return reinterpret_cast<Function*>(found);
  }

 private:
#if defined(_WIN32)
  HMODULE library_;
#else
  void* library_;
#endif
};

#endif  // IMNET_PREP_NATIVE_STRESS_LIBRARY_H_

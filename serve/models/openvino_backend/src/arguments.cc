// Preloaded into tritonserver, which takes its admin key only as an argument, where the other users of a machine can read
// it in the list of processes. The argument that they see holds a placeholder; the key is put in its place, out of a file
// that only its owner can read, in memory of this process and before its main function.
//   LD_PRELOAD=libunet_arguments.so UNET_ARGUMENT_FILE=FILE UNET_ARGUMENT_PLACEHOLDER=WORD tritonserver ...
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include <unistd.h>

namespace {

constexpr char kFile[] = "UNET_ARGUMENT_FILE";
constexpr char kPlaceholder[] = "UNET_ARGUMENT_PLACEHOLDER";

// glibc hands main's own arguments to constructors.
__attribute__((constructor)) void Replace(int argc, char** argv, char**) {
  const char* file = std::getenv(kFile);
  const char* named = std::getenv(kPlaceholder);
  if (file == nullptr || named == nullptr || *named == '\0') {
    return;
  }
  const std::string path = file, placeholder = named;
  // What this process starts needs neither.
  unsetenv(kFile);
  unsetenv(kPlaceholder);
  std::string key;
  if (!(std::ifstream(path) >> key)) {
    std::fprintf(stderr, "error: %s, which holds the admin key, cannot be read\n", path.c_str());
    _exit(78);
  }
  for (int index = 1; index < argc; ++index) {
    std::string argument = argv[index];
    const auto place = argument.find(placeholder);
    if (place != std::string::npos) {
      argv[index] = strdup(argument.replace(place, placeholder.size(), key).c_str());
    }
  }
}

}  // namespace

// What a request or a model is refused for, in one sentence.
#pragma once

#include <stdexcept>

namespace unet {

// The fault of who asks: Triton's INVALID_ARG. Everything else that is thrown is INTERNAL.
class Refused : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace unet

#pragma once

#include <string>
#include <string_view>

namespace unet {

// SHA-256 of bytes, 64 hexadecimal digits in lower case.
std::string sha256(std::string_view bytes);

}  // namespace unet

#include "tile_limit.h"

#include <algorithm>
#include <string>

#include "fault.h"
#include "machine.h"

namespace unet {

int64_t output_size(int64_t size) {
  if (size >= kLeast && (size - kLeast) % kGrid == 0) return size - kContext;
  const int64_t wanted = std::max<int64_t>(1, size - kContext) + kContext - kLeast;
  const int64_t above = kLeast + kGrid * std::max<int64_t>(0, (wanted + kGrid - 1) / kGrid);
  const std::string near =
      above == kLeast ? std::to_string(kLeast) : std::to_string(above - kGrid) + " and " + std::to_string(above);
  throw Refused("a tile of " + std::to_string(size) + " pixels does not fit the network, which takes 188 + 16k: near are " +
                near);
}

TileLimit::TileLimit(int64_t side, int64_t usual_side, int64_t pixel_bytes)
    : side_(side), usual_side_(usual_side), pixel_bytes_(pixel_bytes), own_bytes_(resident()) {}

int64_t TileLimit::images_at_once(int64_t height, int64_t width) const {
  const std::string size = std::to_string(height) + " x " + std::to_string(width) + " pixels";
  if (height * width > side_ * side_)
    throw Refused("a tile of " + size + " is too large for this server's memory: send tiles of at most " +
                  std::to_string(side_) + " x " + std::to_string(side_) + ", the model's max_tile_size");
  if (std::max(height, width) > usual_side_) {
    const int64_t needed = height * width * pixel_bytes_;
    // What former passes took is used again.
    const int64_t left = free_memory() + std::max<int64_t>(0, resident() - own_bytes_);
    if (needed > left)
      throw Refused("a tile of " + size + " takes " + std::to_string(needed >> 20) + " MiB, and this server has " +
                    std::to_string(left >> 20) + " MiB left: send smaller tiles");
  }
  return std::max<int64_t>(1, side_ * side_ / std::max<int64_t>(1, height * width));
}

}  // namespace unet

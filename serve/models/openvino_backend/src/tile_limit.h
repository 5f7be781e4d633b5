#pragma once

#include <cstdint>

namespace unet {

// The sizes of the network's valid convolutions: a tile of 188 + 16k pixels gives an output of 184 fewer.
inline constexpr int64_t kContext = 184, kGrid = 16, kLeast = 188;

// The side of the output of a tile; refuses a side that is not 188 + 16k.
int64_t output_size(int64_t size);

// Refuses tiles that would have the system kill the server.
class TileLimit {
 public:
  // Sides of the largest tile that is ever taken, and of the largest one that is taken without a look at the memory.
  TileLimit(int64_t side, int64_t usual_side, int64_t pixel_bytes);

  // How many tiles of this size one pass may hold; at least 1.
  int64_t images_at_once(int64_t height, int64_t width) const;

 private:
  int64_t side_, usual_side_, pixel_bytes_, own_bytes_;
};

}  // namespace unet

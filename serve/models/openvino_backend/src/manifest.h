// What a version carries: engine.txt, which the publisher wrote of its card, and the files that it names.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace unet {

// One proven engine of the card.
struct EngineEntry {
  std::string precision;  // "bf16", "f32" or "int8"
  bool native = false;    // whether the CPU that proved it multiplies this format itself
  int64_t pixel_bytes = 0;  // memory that a pass takes for each pixel of its tile
  std::string sha256;       // of the file
  std::string file;         // relative to the version's folder
};

struct Manifest {
  std::string card_sha256;
  int64_t largest_tile = 0;  // of the sizes that the network was checked at, in pixels
  std::vector<EngineEntry> engines;  // the chosen one, then the one in float32 if OpenVINO runs that too
};

// Read engine.txt, and check that the card is the one that it was written of.
Manifest read_manifest(const std::filesystem::path& version);

// The chosen engine if its proof holds on this CPU, else the one in float32; what to warn of goes into `warning`.
const EngineEntry& engine_here(const Manifest& manifest, std::string& warning);

// The bytes of an engine's file, which are those that the card describes.
std::string read_proven(const std::filesystem::path& version, const EngineEntry& engine);

// The description and the weights in an INT8 engine's file, a ZIP without compression.
struct Packed {
  std::string description;
  std::string weights;
};
Packed unpack(const std::string& bytes, const std::filesystem::path& path);

}  // namespace unet

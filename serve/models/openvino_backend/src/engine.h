// The network in OpenVINO, on memory that is not its own.
#pragma once

#include <filesystem>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

#include "manifest.h"

namespace unet {

// One tile: uint8 [H, W] to float16 [H - 184, W - 184], both in the caller's memory.
struct Image {
  const void* pixels;
  void* probability;
};

// One loaded engine, for one thread at a time: what _OpenVino in unet/engine/cpu.py is in Python, with the same
// settings, so that the answers are the same to the bit.
class Engine {
 public:
  Engine(const std::filesystem::path& version, const EngineEntry& entry, int threads);

  // A lone image on all threads, several two by two, each on half of the threads.
  void infer(const std::vector<Image>& images, size_t height, size_t width);

 private:
  void pass(std::vector<ov::InferRequest>& requests, const Image* images, size_t height, size_t width);

  std::string weights_;  // that the network refers to
  std::vector<ov::InferRequest> alone_, pair_;
};

}  // namespace unet

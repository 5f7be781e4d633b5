#include "engine.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "fault.h"
#include "machine.h"
#include "tile_limit.h"

namespace unet {
namespace {

const char kInput[] = "image", kOutput[] = "probability";

// The last line of what OpenVINO says; those before it name its sources.
std::string last_line(const std::string& said) {
  const size_t end = said.find_last_not_of(" \t\r\n");
  if (end == std::string::npos) return "no reason given";
  const size_t before = said.find_last_of('\n', end);
  const size_t start = said.find_first_not_of(" \t", before == std::string::npos ? 0 : before + 1);
  return said.substr(start, end + 1 - start);
}

void require_interface(const ov::Model& model, const std::filesystem::path& path) {
  const bool fits = model.inputs().size() == 1 && model.outputs().size() == 1 &&
                    model.input().get_names().count(kInput) && model.output().get_names().count(kOutput) &&
                    model.input().get_element_type() == ov::element::u8 &&
                    model.output().get_element_type() == ov::element::f16;
  if (!fits)
    throw Refused(path.string() + " does not take uint8 image and give float16 probability: export it with python "
                                  "export/main.py");
}

}  // namespace

Engine::Engine(const std::filesystem::path& version, const EngineEntry& entry, int threads) {
  const std::filesystem::path path = version / entry.file;
  std::string bytes = read_proven(version, entry);
  try {
    ov::Core core;
    if (entry.precision == "bf16") {
      const auto able = core.get_property("CPU", ov::device::capabilities);
      if (!native("bf16", instruction_sets()) || std::find(able.begin(), able.end(), "BF16") == able.end())
        throw Refused("this CPU has no bf16 instructions: choose the precision f32");
    }
    std::shared_ptr<ov::Model> model;
    if (entry.precision == "int8") {
      Packed packed = unpack(bytes, path);
      weights_ = std::move(packed.weights);
      model = core.read_model(packed.description, ov::Tensor(ov::element::u8, {weights_.size()}, weights_.data()));
    } else {
      model = core.read_model(bytes, ov::Tensor());
    }
    require_interface(*model, path);
    ov::AnyMap settings = {
        {"PERFORMANCE_HINT", "LATENCY"},
        // What INT8 leaves over (normalisation, softmax) is quicker in f32 than converted to bf16 and back.
        {"INFERENCE_PRECISION_HINT", entry.precision == "bf16" ? "bf16" : "f32"},
        // Pinned, several engines on one machine would take the same cores.
        {"ENABLE_CPU_PINNING", false},
        {"INFERENCE_NUM_THREADS", threads},
    };
    alone_.push_back(core.compile_model(model, "CPU", settings).create_infer_request());
    if (threads > 1) {
      settings["NUM_STREAMS"] = 2;
      ov::CompiledModel paired = core.compile_model(model, "CPU", settings);
      pair_ = {paired.create_infer_request(), paired.create_infer_request()};
    }
  } catch (const ov::Exception& error) {
    throw Refused("OpenVINO cannot load " + path.string() + ": " + last_line(error.what()));
  }
}

void Engine::infer(const std::vector<Image>& images, size_t height, size_t width) {
  const size_t paired = pair_.empty() ? 0 : images.size() - images.size() % 2;
  for (size_t first = 0; first < paired; first += 2) pass(pair_, &images[first], height, width);
  for (size_t first = paired; first < images.size(); ++first) pass(alone_, &images[first], height, width);
}

void Engine::pass(std::vector<ov::InferRequest>& requests, const Image* images, size_t height, size_t width) {
  const ov::Shape in = {1, 1, height, width}, out = {1, 1, height - kContext, width - kContext};
  for (size_t index = 0; index < requests.size(); ++index) {
    // OpenVINO only reads its input.
    requests[index].set_input_tensor(ov::Tensor(ov::element::u8, in, const_cast<void*>(images[index].pixels)));
    requests[index].set_output_tensor(ov::Tensor(ov::element::f16, out, images[index].probability));
  }
  std::exception_ptr fault;
  size_t started = 0;
  try {
    // One alone is computed in this very thread, so that no other one has to wake up first.
    if (requests.size() == 1) requests[0].infer();
    else
      for (; started < requests.size(); ++started) requests[started].start_async();
  } catch (...) {
    fault = std::current_exception();
  }
  // None may be left at work in memory that is about to be given back.
  for (size_t index = 0; index < started; ++index) {
    try {
      requests[index].wait();
    } catch (...) {
      fault = std::current_exception();
    }
  }
  if (fault) std::rethrow_exception(fault);
  for (size_t index = 0; index < requests.size(); ++index) {
    const ov::Tensor answer = requests[index].get_output_tensor();
    if (answer.get_shape() != out) throw std::runtime_error("the network gave another shape than due: export it again");
    if (answer.data() != images[index].probability)
      std::memcpy(images[index].probability, answer.data(), answer.get_byte_size());
  }
}

}  // namespace unet

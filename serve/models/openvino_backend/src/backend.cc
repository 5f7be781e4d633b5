// A Triton backend for machines without a GPU: the same answers, errors and statistics as the python backend's
// serve/models/python_backend/model.py, without a second process, and without copies: OpenVINO reads a request's pixels
// and writes its answer where Triton has them, in shared memory where the client registered some.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <regex>
#include <string>
#include <vector>

#include "engine.h"
#include "fault.h"
#include "machine.h"
#include "manifest.h"
#include "tile_limit.h"
#include "triton/core/tritonbackend.h"

namespace unet {
namespace {

const char kInput[] = "image", kOutput[] = "probability";

// An error of Triton's own, thrown.
void require(TRITONSERVER_Error* error) {
  if (error == nullptr) return;
  const std::string said = TRITONSERVER_ErrorMessage(error);
  TRITONSERVER_ErrorDelete(error);
  throw std::runtime_error(said);
}

// What was thrown, as an error of Triton's.
TRITONSERVER_Error* as_error() {
  try {
    throw;
  } catch (const Refused& refused) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INVALID_ARG, refused.what());
  } catch (const std::bad_alloc&) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, "MemoryError");
  } catch (const std::exception& error) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, error.what());
  } catch (...) {
    return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, "an unknown fault of the engine");
  }
}

void log(TRITONSERVER_LogLevel level, const std::string& text) {
  if (TRITONSERVER_Error* error = TRITONSERVER_LogMessage(level, __FILE__, __LINE__, text.c_str()))
    TRITONSERVER_ErrorDelete(error);
}

// An error that nobody is left to hear is logged.
void note(TRITONSERVER_Error* error) {
  if (error == nullptr) return;
  log(TRITONSERVER_LOG_ERROR, TRITONSERVER_ErrorMessage(error));
  TRITONSERVER_ErrorDelete(error);
}

uint64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string config_of(TRITONBACKEND_Model* model) {
  TRITONSERVER_Message* message = nullptr;
  require(TRITONBACKEND_ModelConfig(model, 1, &message));
  const char* text = nullptr;
  size_t size = 0;
  TRITONSERVER_Error* error = TRITONSERVER_MessageSerializeToJson(message, &text, &size);
  const std::string config = error == nullptr ? std::string(text, size) : "";
  TRITONSERVER_MessageDelete(message);
  require(error);
  return config;
}

// A number among the configuration's parameters, which the publisher writes as text.
int64_t parameter(const std::string& config, const std::string& name, int64_t otherwise) {
  const std::regex entry("\"" + name + "\"\\s*:\\s*\\{\\s*\"string_value\"\\s*:\\s*\"([0-9]{1,9})\"");
  std::smatch found;
  return std::regex_search(config, found, entry) ? std::stoll(found[1]) : otherwise;
}

struct Instance {
  std::unique_ptr<Engine> engine;
  std::unique_ptr<TileLimit> limit;
};

void load(TRITONBACKEND_ModelInstance* handle) {
  TRITONBACKEND_Model* model = nullptr;
  const char *name = nullptr, *folder = nullptr;
  uint64_t number = 0;
  TRITONBACKEND_ArtifactType kind;
  require(TRITONBACKEND_ModelInstanceModel(handle, &model));
  require(TRITONBACKEND_ModelName(model, &name));
  require(TRITONBACKEND_ModelVersion(model, &number));
  require(TRITONBACKEND_ModelRepository(model, &kind, &folder));
  if (kind != TRITONBACKEND_ARTIFACT_FILESYSTEM) throw Refused("the model must lie in a folder");
  const std::filesystem::path version = std::filesystem::path(folder) / std::to_string(number);
  const std::string config = config_of(model);
  int threads = static_cast<int>(parameter(config, "threads", 0));
  if (threads == 0)
    threads = std::max(1, usable_cores() / static_cast<int>(std::max<int64_t>(1, parameter(config, "core_shares", 1))));
  const Manifest manifest = read_manifest(version);
  std::string warning;
  const EngineEntry& entry = engine_here(manifest, warning);
  if (!warning.empty()) log(TRITONSERVER_LOG_WARN, warning);
  auto instance = std::make_unique<Instance>();
  instance->engine = std::make_unique<Engine>(version, entry, threads);
  // A version that is served on beside a newer one has the newer one's configuration.
  instance->limit = std::make_unique<TileLimit>(parameter(config, "max_tile_size", manifest.largest_tile),
                                                manifest.largest_tile, entry.pixel_bytes);
  require(TRITONBACKEND_ModelInstanceSetState(handle, instance.get()));
  instance.release();
  log(TRITONSERVER_LOG_INFO, std::string(name) + " version " + std::to_string(number) + ": openvino " +
                                 entry.precision + ", " + std::to_string(threads) + " threads");
}

// One request on its way: where its pixels lie, and where its answer goes.
struct Work {
  TRITONBACKEND_Request* request = nullptr;
  TRITONBACKEND_Response* response = nullptr;
  TRITONSERVER_Error* fault = nullptr;
  int64_t count = 0, height = 0, width = 0;
  const char* pixels = nullptr;
  std::vector<char> gathered;  // pixels that came in several pieces
  char* probability = nullptr;
};

void read_input(Work& work) {
  TRITONBACKEND_Input* input = nullptr;
  const int64_t* shape = nullptr;
  uint32_t dims = 0, buffers = 0;
  uint64_t bytes = 0;
  require(TRITONBACKEND_RequestInput(work.request, kInput, &input));
  require(TRITONBACKEND_InputProperties(input, nullptr, nullptr, &shape, &dims, &bytes, &buffers));
  if (dims != 4 || shape[1] != 1 || shape[0] < 1) throw Refused("tiles must have the shape [N, 1, H, W]");
  work.count = shape[0], work.height = shape[2], work.width = shape[3];
  if (bytes != static_cast<uint64_t>(work.count * work.height * work.width))
    throw Refused("the pixels of a request do not fit its shape");
  for (uint32_t index = 0; index < buffers; ++index) {
    const void* buffer = nullptr;
    uint64_t size = 0;
    TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
    int64_t device = 0;
    require(TRITONBACKEND_InputBuffer(input, index, &buffer, &size, &memory, &device));
    if (memory == TRITONSERVER_MEMORY_GPU) throw Refused("the pixels lie on a GPU, and this model runs on a CPU");
    if (buffers == 1) {
      work.pixels = static_cast<const char*>(buffer);
      return;
    }
    work.gathered.insert(work.gathered.end(), static_cast<const char*>(buffer), static_cast<const char*>(buffer) + size);
  }
  work.pixels = work.gathered.data();
}

void make_room(Work& work) {
  const int64_t shape[] = {work.count, 1, output_size(work.height), output_size(work.width)};
  TRITONBACKEND_Output* output = nullptr;
  require(TRITONBACKEND_ResponseOutput(work.response, &output, kOutput, TRITONSERVER_TYPE_FP16, shape, 4));
  void* buffer = nullptr;
  TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
  int64_t device = 0;
  require(TRITONBACKEND_OutputBuffer(output, &buffer, shape[0] * shape[2] * shape[3] * 2, &memory, &device));
  if (memory == TRITONSERVER_MEMORY_GPU) throw Refused("the answer is wanted on a GPU, and this model runs on a CPU");
  work.probability = static_cast<char*>(buffer);
}

// The requests of one tile size, in as many passes as keep their memory within the limit.
void compute(Instance& instance, const std::vector<Work*>& works) {
  const int64_t height = works.front()->height, width = works.front()->width;
  const size_t at_once = instance.limit->images_at_once(height, width);
  std::vector<Image> images;
  for (Work* work : works) {
    make_room(*work);
    const int64_t answer = (height - kContext) * (width - kContext) * 2;
    for (int64_t index = 0; index < work->count; ++index)
      images.push_back({work->pixels + index * height * width, work->probability + index * answer});
  }
  for (size_t first = 0; first < images.size(); first += at_once) {
    const size_t last = std::min(images.size(), first + at_once);
    instance.engine->infer({images.begin() + first, images.begin() + last}, height, width);
  }
}

TRITONSERVER_Error* copy_of(TRITONSERVER_Error* error) {
  return TRITONSERVER_ErrorNew(TRITONSERVER_ErrorCode(error), TRITONSERVER_ErrorMessage(error));
}

void compute_all(Instance& instance, std::vector<Work>& works) {
  std::map<std::pair<int64_t, int64_t>, std::vector<Work*>> sizes;
  for (Work& work : works)
    if (work.fault == nullptr) sizes[{work.height, work.width}].push_back(&work);
  for (auto& size : sizes) {
    try {
      compute(instance, size.second);
    } catch (...) {
      TRITONSERVER_Error* fault = as_error();
      for (Work* work : size.second) work->fault = copy_of(fault);
      TRITONSERVER_ErrorDelete(fault);
    }
  }
}

// Takes over the requests, whatever happens.
void execute(TRITONBACKEND_ModelInstance* handle, Instance& instance, TRITONBACKEND_Request** requests, uint32_t count) {
  const uint64_t began = now_ns();
  std::vector<Work> works(count);
  for (uint32_t index = 0; index < count; ++index) {
    works[index].request = requests[index];
    try {
      require(TRITONBACKEND_ResponseNew(&works[index].response, requests[index]));
      read_input(works[index]);
    } catch (...) {
      works[index].fault = as_error();
    }
  }
  const uint64_t computed_from = now_ns();
  compute_all(instance, works);
  const uint64_t computed_to = now_ns();
  uint64_t images = 0;
  for (Work& work : works) {
    images += work.fault == nullptr ? work.count : 0;
    if (work.response != nullptr)
      note(TRITONBACKEND_ResponseSend(work.response, TRITONSERVER_RESPONSE_COMPLETE_FINAL, work.fault));
  }
  const uint64_t ended = now_ns();
  for (Work& work : works) {
    note(TRITONBACKEND_ModelInstanceReportStatistics(
        handle, work.request, work.fault == nullptr, began, computed_from, computed_to, ended));
    if (work.fault != nullptr) TRITONSERVER_ErrorDelete(work.fault);
    note(TRITONBACKEND_RequestRelease(work.request, TRITONSERVER_REQUEST_RELEASE_ALL));
  }
  if (images > 0)
    note(TRITONBACKEND_ModelInstanceReportBatchStatistics(handle, images, began, computed_from, computed_to, ended));
}

}  // namespace
}  // namespace unet

#define UNET_EXPORT __attribute__((visibility("default")))

extern "C" {

UNET_EXPORT TRITONSERVER_Error* TRITONBACKEND_Initialize(TRITONBACKEND_Backend*) {
  uint32_t major = 0, minor = 0;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ApiVersion(&major, &minor)) return error;
  if (major == TRITONBACKEND_API_VERSION_MAJOR && minor >= TRITONBACKEND_API_VERSION_MINOR) return nullptr;
  return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNSUPPORTED, "the backend unet_openvino is built for a newer Triton");
}

UNET_EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* handle) {
  try {
    unet::load(handle);
    return nullptr;
  } catch (...) {
    return unet::as_error();
  }
}

UNET_EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* handle) {
  void* state = nullptr;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ModelInstanceState(handle, &state)) return error;
  delete static_cast<unet::Instance*>(state);
  return nullptr;
}

UNET_EXPORT TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* handle, TRITONBACKEND_Request** requests, const uint32_t count) {
  void* state = nullptr;
  if (TRITONSERVER_Error* error = TRITONBACKEND_ModelInstanceState(handle, &state)) return error;
  unet::execute(handle, *static_cast<unet::Instance*>(state), requests, count);
  return nullptr;
}

}  // extern "C"

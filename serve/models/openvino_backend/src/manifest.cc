#include "manifest.h"

#include <fstream>
#include <sstream>

#include "fault.h"
#include "machine.h"
#include "sha256.h"

namespace unet {
namespace {

const char kManifest[] = "engine.txt", kCard[] = "card.json";
const char kAgain[] = ": publish the version again with python serve/repository.py";

std::string read_file(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream content;
  if (!stream || !(content << stream.rdbuf())) throw Refused(path.string() + " cannot be read" + kAgain);
  return content.str();
}

void require_sha256(const std::filesystem::path& path, const std::string& bytes, const std::string& expected) {
  const std::string found = sha256(bytes);
  if (found != expected)
    throw Refused(path.string() + " is not the file that its card describes: its SHA-256 begins with " +
                  found.substr(0, 12) + ", the card's with " + expected.substr(0, 12) + kAgain);
}

std::string words(const std::set<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "no vector instructions" : text;
}

// A little-endian number of a ZIP; beyond the end it is 0, which no check below passes.
size_t little(const std::string& bytes, size_t offset, int count) {
  size_t value = 0;
  for (int i = count - 1; i >= 0; --i)
    value = value << 8 | (offset + i < bytes.size() ? static_cast<unsigned char>(bytes[offset + i]) : 0);
  return value;
}

}  // namespace

Manifest read_manifest(const std::filesystem::path& version) {
  const std::filesystem::path path = version / kManifest;
  std::istringstream lines(read_file(path));
  Manifest manifest;
  std::string format;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    std::string name, native;
    EngineEntry engine;
    fields >> name;
    if (name == "format") fields >> format;
    if (name == "card_sha256") fields >> manifest.card_sha256;
    if (name == "largest_tile") fields >> manifest.largest_tile;
    if (name != "engine") continue;
    fields >> engine.precision >> native >> engine.pixel_bytes >> engine.sha256 >> engine.file;
    engine.native = native == "native";
    if (fields.fail() || engine.pixel_bytes < 1 || engine.file.find('/') != std::string::npos)
      throw Refused(path.string() + " is damaged" + kAgain);
    manifest.engines.push_back(engine);
  }
  if (format != "1" || manifest.card_sha256.empty() || manifest.largest_tile < 1 || manifest.engines.empty())
    throw Refused(path.string() + " is damaged, or of another release" + kAgain);
  require_sha256(version / kCard, read_file(version / kCard), manifest.card_sha256);
  return manifest;
}

const EngineEntry& engine_here(const Manifest& manifest, std::string& warning) {
  const auto here = instruction_sets();
  const EngineEntry& chosen = manifest.engines.front();
  if (native(chosen.precision, here) == chosen.native) return chosen;
  const std::string proven = "openvino " + chosen.precision + " was proven on a CPU with other instructions than this "
                             "one's (" + words(here) + ")";
  for (const EngineEntry& engine : manifest.engines)
    if (engine.precision == "f32") {
      warning = proven + ": openvino f32 serves instead; export on this machine for the fastest engine";
      return engine;
    }
  throw Refused(proven + ": run python export/main.py on this machine, and publish");
}

std::string read_proven(const std::filesystem::path& version, const EngineEntry& engine) {
  std::string bytes = read_file(version / engine.file);
  require_sha256(version / engine.file, bytes, engine.sha256);
  return bytes;
}

Packed unpack(const std::string& bytes, const std::filesystem::path& path) {
  const auto damaged = [&] { return Refused(path.string() + " is not an INT8 engine: export it with python export/main.py"); };
  // The directory's end is the last thing in the file, but for a comment that the exporter does not write.
  const size_t end = bytes.rfind("PK\5\6");
  if (end == std::string::npos) throw damaged();
  Packed packed;
  size_t entry = little(bytes, end + 16, 4);
  for (size_t left = little(bytes, end + 10, 2); left > 0; --left) {
    if (bytes.compare(entry, 4, "PK\1\2") != 0 || little(bytes, entry + 10, 2) != 0) throw damaged();
    const size_t size = little(bytes, entry + 20, 4), name_size = little(bytes, entry + 28, 2);
    const size_t local = little(bytes, entry + 42, 4);
    const std::string name = bytes.substr(entry + 46, name_size);
    const size_t data = local + 30 + little(bytes, local + 26, 2) + little(bytes, local + 28, 2);
    if (bytes.compare(local, 4, "PK\3\4") != 0 || data + size > bytes.size()) throw damaged();
    if (name == "model.xml") packed.description = bytes.substr(data, size);
    if (name == "model.bin") packed.weights = bytes.substr(data, size);
    entry += 46 + name_size + little(bytes, entry + 30, 2) + little(bytes, entry + 32, 2);
    if (entry > bytes.size()) throw damaged();
  }
  if (packed.description.empty() || packed.weights.empty()) throw damaged();
  return packed;
}

}  // namespace unet

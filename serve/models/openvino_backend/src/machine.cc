#include "machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace unet {
namespace {

namespace fs = std::filesystem;
const fs::path kCgroup = "/sys/fs/cgroup";

// The words of a file; none where it cannot be read.
std::vector<std::string> words_of(const fs::path& path) {
  std::ifstream stream(path);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::optional<double> number(const std::string& word) {
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  return end != word.c_str() && *end == '\0' && std::isfinite(value) ? std::optional(value) : std::nullopt;
}

// The control groups of a controller ("cpu" or "memory") that hold this process, those above included. A container
// sees its own group at the root; without a namespace of its own it reads the host's path, which is not there.
std::set<fs::path> groups_of(const std::string& controller) {
  std::set<fs::path> groups = {kCgroup, kCgroup / "unified", kCgroup / controller};
  std::ifstream membership("/proc/self/cgroup");
  for (std::string line; std::getline(membership, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && ("," + controllers + ",").find("," + controller + ",") == std::string::npos) continue;
    const fs::path own = fs::path(line.substr(second + 1)).relative_path();
    if (std::find(own.begin(), own.end(), "..") != own.end()) continue;
    const std::vector<fs::path> mounts = controllers.empty()
                                             ? std::vector{kCgroup, kCgroup / "unified"}
                                             : std::vector{kCgroup / controller, kCgroup / controllers};
    for (const fs::path& mount : mounts)
      for (fs::path above = own; !above.empty(); above = above.parent_path()) groups.insert(mount / above);
  }
  return groups;
}

// Cores' worth of time that a control group grants, by version 2 or version 1.
std::optional<double> quota_of(const fs::path& group) {
  std::vector<std::string> words = words_of(group / "cpu.max");
  if (words.size() != 2) {
    words = words_of(group / "cpu.cfs_quota_us");
    for (const std::string& word : words_of(group / "cpu.cfs_period_us")) words.push_back(word);
  }
  if (words.size() != 2) return std::nullopt;
  const auto granted = number(words[0]), period = number(words[1]);
  return granted && period && *granted > 0 && *period > 0 ? std::optional(*granted / *period) : std::nullopt;
}

int64_t meminfo(const std::string& name) {
  std::ifstream stream("/proc/meminfo");
  for (std::string line; std::getline(stream, line);)
    if (line.rfind(name + ":", 0) == 0) return std::stoll(line.substr(name.size() + 1)) << 10;
  throw std::runtime_error("/proc/meminfo has no " + name);
}

// Bytes of files that a group has read, which the kernel gives back when memory is short.
int64_t reclaimable(const fs::path& group) {
  const std::vector<std::string> words = words_of(group / "memory.stat");
  for (size_t i = 0; i + 1 < words.size(); i += 2)
    if (words[i] == "inactive_file" || words[i] == "total_inactive_file")
      return static_cast<int64_t>(number(words[i + 1]).value_or(0));
  return 0;
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  const int allowed = sched_getaffinity(0, sizeof set, &set) == 0
                          ? CPU_COUNT(&set)
                          : static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  double quota = allowed;
  for (const fs::path& group : groups_of("cpu")) quota = std::min(quota, quota_of(group).value_or(quota));
  return std::max(1, std::min(allowed, static_cast<int>(std::ceil(quota))));
}

std::set<std::string> instruction_sets() {
  std::set<std::string> flags;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; flags.empty() && std::getline(cpuinfo, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream rest(line.substr(line.find(':') + 1));
    for (std::string flag; rest >> flag;) flags.insert(flag);
  }
  const char* set = std::getenv("ONEDNN_MAX_CPU_ISA");
  std::string most = set == nullptr ? "" : set;
  std::transform(most.begin(), most.end(), most.begin(), [](unsigned char letter) { return std::toupper(letter); });
  const bool unlimited = most.empty() || most == "ALL" || most == "DEFAULT";
  // The values of ONEDNN_MAX_CPU_ISA that allow a kind of instructions.
  const std::set<std::string> amx = {"AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX",
                                     "AVX10_1_512_AMX_FP16"};
  const auto with = [](std::set<std::string> names, const std::set<std::string>& more) {
    names.insert(more.begin(), more.end());
    return names;
  };
  const auto bf16 = with({"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}, amx);
  const auto vnni = with({"AVX512_CORE_VNNI"}, bf16);
  const auto avx512 = with({"AVX512_CORE"}, vnni);
  const auto small_vnni = with({"AVX2_VNNI", "AVX2_VNNI_2"}, vnni);
  const auto avx2 = with({"AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}, avx512);
  std::set<std::string> found;
  const auto look = [&](const char* name, const char* flag, const std::set<std::string>& levels) {
    if (flags.count(flag) && (unlimited || levels.count(most))) found.insert(name);
  };
  look("avx2", "avx2", avx2);
  look("avx512", "avx512bw", avx512);
  look("vnni", "avx_vnni", small_vnni);
  look("vnni", "avx512_vnni", vnni);
  look("bf16", "avx512_bf16", bf16);
  look("amx", "amx_tile", amx);
  return found;
}

bool native(const std::string& precision, const std::set<std::string>& instructions) {
  return precision == "f32" || instructions.count("amx") || instructions.count(precision == "bf16" ? "bf16" : "vnni");
}

int64_t resident() {
  const std::vector<std::string> words = words_of("/proc/self/statm");
  return words.size() < 2 ? 0 : std::stoll(words[1]) * sysconf(_SC_PAGE_SIZE);
}

int64_t free_memory() {
  int64_t free = meminfo("MemAvailable");
  for (const fs::path& group : groups_of("memory"))
    for (const auto& [limit, used] : {std::pair("memory.max", "memory.current"),
                                      std::pair("memory.limit_in_bytes", "memory.usage_in_bytes")}) {
      const auto most = words_of(group / limit), now = words_of(group / used);
      if (most.empty() || now.empty() || !number(most[0]) || !number(now[0])) continue;
      free = std::min(free, static_cast<int64_t>(*number(most[0]) - *number(now[0])) + reclaimable(group));
    }
  return free;
}

}  // namespace unet

// What unet/machine.py and unet/engine/memory.py ask of the machine, in the server's process.
#pragma once

#include <cstdint>
#include <set>
#include <string>

namespace unet {

// Cores that this process may compute on: its CPU affinity, and no more than its container's quota; at least 1.
int usable_cores();

// Of "avx2", "avx512", "vnni", "bf16" and "amx" those that libraries compute with here; ONEDNN_MAX_CPU_ISA, which they
// obey, takes away what lies beyond it.
std::set<std::string> instruction_sets();

// Whether a CPU with such instructions multiplies a number format, "bf16", "int8" or "f32", itself.
bool native(const std::string& precision, const std::set<std::string>& instructions);

// Bytes of memory that this process holds.
int64_t resident();

// Bytes of memory that this process can still get: what the machine has, and what its container grants.
int64_t free_memory();

}  // namespace unet

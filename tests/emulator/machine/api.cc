// The machine for ctypes. A call that fails returns nullptr or a number other than 0, and LastError says why.

#include <cstring>
#include <memory>
#include <string>

#include "machine.h"

namespace emulator {
namespace {

thread_local std::string last_error;

struct Call {
  GlobalMemory memory;
  std::vector<Grid> grids;
};

template <typename F>
auto Guarded(F f, decltype(f()) failed) {
  try {
    return f();
  } catch (const std::exception& error) {
    last_error = error.what();
    return failed;
  }
}

}  // namespace
}  // namespace emulator

using emulator::Call;
using emulator::Grid;
using emulator::Program;

extern "C" {

const char* EmulatorLastError() { return emulator::last_error.c_str(); }

// Names of all operations, a line each.
const char* EmulatorOperations() {
  static const std::string* names = [] {
    auto* text = new std::string;
    for (const std::string& name : emulator::OperationNames()) *text += name + "\n";
    return text;
  }();
  return names->c_str();
}

// `texts`: each with a zero behind it.
void* EmulatorProgram(const int64_t* words, int64_t count, const char* texts, int64_t num_texts) {
  return emulator::Guarded(
      [&]() -> void* {
        std::vector<std::string> strings;
        for (int64_t i = 0; i < num_texts; ++i) {
          strings.emplace_back(texts);
          texts += strings.back().size() + 1;
        }
        return new Program(emulator::Decode(words, count, strings));
      },
      nullptr);
}

void EmulatorFreeProgram(void* program) { delete static_cast<Program*>(program); }

void* EmulatorCall() { return new Call; }

void EmulatorFreeCall(void* call) { delete static_cast<Call*>(call); }

// The address of a buffer.
uint64_t EmulatorBuffer(void* call, const char* name, void* data, void* marks, int64_t bytes, int strict) {
  return static_cast<Call*>(call)->memory.Add(
      {name, static_cast<uint8_t*>(data), static_cast<uint8_t*>(marks), bytes, strict != 0});
}

// One more grid of the call.
void EmulatorGrid(void* call, const void* program, int ctas, int threads, int cluster, int64_t shared_bytes,
                  int overlap, int ctas_per_multiprocessor, const void* parameters, int64_t parameter_bytes) {
  auto& grids = static_cast<Call*>(call)->grids;
  Grid grid;
  grid.program = static_cast<const Program*>(program);
  grid.number = static_cast<int>(grids.size());
  grid.ctas = ctas;
  grid.threads = threads;
  grid.cluster = cluster;
  grid.shared_bytes = shared_bytes;
  grid.overlap = overlap != 0;
  grid.ctas_per_multiprocessor = ctas_per_multiprocessor;
  const auto* bytes = static_cast<const uint8_t*>(parameters);
  grid.parameters.assign(bytes, bytes + parameter_bytes);
  const auto warps = static_cast<size_t>((threads + emulator::kLanes - 1) / emulator::kLanes);
  grid.counts.resize(grid.program->code.size() * warps);
  grids.push_back(std::move(grid));
}

// `check`: 0, nothing; 1, accesses of warps that are not ordered; 2, those of lanes too. `written`: reads of global
// memory that nobody has written.
int EmulatorRun(void* call, uint64_t seed, int order, int multiprocessors, int64_t most_instructions, int check,
                int written) {
  return emulator::Guarded(
      [&] {
        auto* given = static_cast<Call*>(call);
        emulator::Options options;
        options.seed = seed;
        options.order = static_cast<emulator::Order>(order);
        options.multiprocessors = multiprocessors;
        options.most_instructions = most_instructions;
        options.check = check > 0;
        options.check_lanes = check > 1;
        options.check_written = written != 0;
        emulator::Machine(&given->memory, options).Run(&given->grids);
        return 0;
      },
      1);
}

// Executed warp instructions of a grid, by instruction and then warp of the CTA.
void EmulatorCounts(const void* call, int grid, int64_t* counts) {
  const auto& from = static_cast<const Call*>(call)->grids[static_cast<size_t>(grid)].counts;
  std::memcpy(counts, from.data(), from.size() * sizeof(int64_t));
}

}  // extern "C"

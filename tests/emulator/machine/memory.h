// Global memory, shared memory and tensor memory, with a mark for every byte or cell that nobody has written.

#ifndef JAX_MOE_EMULATOR_MEMORY_H_
#define JAX_MOE_EMULATOR_MEMORY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "program.h"

namespace emulator {

// Marks of a byte.
constexpr uint8_t kWritten = 0, kPoison = 1, kBarrierByte = 2;

enum class Space { kGlobal, kShared, kTensor };

// Where an access goes: its bytes, their marks, and what the checker calls them.
struct Place {
  uint8_t* data;
  uint8_t* marks;
  Space space;
  int owner;  // a buffer, or a CTA
  int64_t offset;
};

struct Buffer {
  std::string name;
  uint8_t* data;
  uint8_t* marks;
  int64_t bytes;
  bool strict;  // to store poison there is an error
};

// Buffers, each in an address range of its own with nothing before or behind it.
class GlobalMemory {
 public:
  uint64_t Add(Buffer buffer);
  // Throws for an access outside every buffer, or one that is not aligned to its size.
  Place At(uint64_t address, int64_t bytes, int64_t alignment) const;
  const Buffer& buffer(int index) const { return buffers_[static_cast<size_t>(index)]; }
  int count() const { return static_cast<int>(buffers_.size()); }

 private:
  std::vector<Buffer> buffers_;
};

// Shared memory of a CTA. Addresses start at kSharedBase: what is below belongs to the system.
constexpr int64_t kSharedBase = 1024;

class SharedMemory {
 public:
  SharedMemory(int cta, int64_t end);
  Place At(uint64_t address, int64_t bytes, int64_t alignment);
  int64_t end() const { return static_cast<int64_t>(data_.size()); }
  void Free();

 private:
  int cta_;
  std::vector<uint8_t> data_, marks_;
};

// 128 lanes by 512 columns of 32 bits, of one multiprocessor. A cell's mark is kPoison or kWritten.
class TensorMemory {
 public:
  static constexpr int kTensorLanes = 128, kColumns = 512;

  TensorMemory() : cells_(kTensorLanes * kColumns), marks_(kTensorLanes * kColumns, kPoison), owner_(kColumns, -1) {}

  // Where `columns` free ones start, each at a multiple of their number.
  std::vector<int> Room(int columns) const;
  void Allocate(int cta, int column, int columns);
  void Free(int cta, int column, int columns);
  // Whether a CTA has any.
  bool Owns(int cta) const;
  // Throws if the columns are not the CTA's.
  void Check(int cta, int lane, int column, int columns) const;
  uint32_t& cell(int lane, int column) { return cells_[static_cast<size_t>(lane * kColumns + column)]; }
  uint8_t& mark(int lane, int column) { return marks_[static_cast<size_t>(lane * kColumns + column)]; }

 private:
  std::vector<uint32_t> cells_;
  std::vector<uint8_t> marks_;
  std::vector<int> owner_;
};

std::string Hex(uint64_t value);

}  // namespace emulator

#endif  // JAX_MOE_EMULATOR_MEMORY_H_

#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace emulator {
namespace {

constexpr int kBufferShift = 40;  // a buffer's number is in the bits from here up

}  // namespace

std::string Hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

uint64_t GlobalMemory::Add(Buffer buffer) {
  buffers_.push_back(std::move(buffer));
  return static_cast<uint64_t>(buffers_.size()) << kBufferShift;
}

Place GlobalMemory::At(uint64_t address, int64_t bytes, int64_t alignment) const {
  // The nearest buffer is the one meant, also a little before its start.
  const uint64_t rounded = address + (uint64_t{1} << (kBufferShift - 1));
  const int64_t index = static_cast<int64_t>(rounded >> kBufferShift) - 1;
  if (index < 0 || index >= count()) {
    throw Error("address " + Hex(address) + " is in no buffer" + (address >> 20 == 0 ? " (a null pointer?)" : ""));
  }
  const Buffer& buffer = buffers_[static_cast<size_t>(index)];
  const int64_t offset = static_cast<int64_t>(address - (static_cast<uint64_t>(index + 1) << kBufferShift));
  if (offset < 0 || offset + bytes > buffer.bytes) {
    throw Error(std::to_string(bytes) + " bytes at " + std::to_string(offset) + " are outside of " + buffer.name +
                ", which has " + std::to_string(buffer.bytes) + " bytes");
  }
  if (offset % alignment != 0) {
    throw Error("offset " + std::to_string(offset) + " of " + buffer.name + " is not a multiple of " +
                std::to_string(alignment));
  }
  return {buffer.data + offset, buffer.marks + offset, Space::kGlobal, static_cast<int>(index), offset};
}

SharedMemory::SharedMemory(int cta, int64_t end)
    : cta_(cta), data_(static_cast<size_t>(end)), marks_(static_cast<size_t>(end), kPoison) {}

Place SharedMemory::At(uint64_t address, int64_t bytes, int64_t alignment) {
  const int64_t offset = static_cast<int64_t>(address);
  if (offset < kSharedBase || offset + bytes > end()) {
    throw Error(std::to_string(bytes) + " bytes at " + Hex(address) + " are outside of shared memory, which is " +
                Hex(kSharedBase) + " to " + Hex(static_cast<uint64_t>(end())));
  }
  if (offset % alignment != 0) {
    throw Error("shared address " + Hex(address) + " is not a multiple of " + std::to_string(alignment));
  }
  return {data_.data() + offset, marks_.data() + offset, Space::kShared, cta_, offset};
}

void SharedMemory::Free() {
  data_ = {};
  marks_ = {};
}

std::vector<int> TensorMemory::Room(int columns) const {
  std::vector<int> room;
  for (int first = 0; first + columns <= kColumns; first += columns) {
    const auto begin = owner_.begin() + first;
    if (std::all_of(begin, begin + columns, [](int owner) { return owner < 0; })) room.push_back(first);
  }
  return room;
}

void TensorMemory::Allocate(int cta, int column, int columns) {
  std::fill(owner_.begin() + column, owner_.begin() + column + columns, cta);
}

void TensorMemory::Free(int cta, int column, int columns) {
  for (int i = column; i < column + columns; ++i) {
    if (i < 0 || i >= kColumns || owner_[static_cast<size_t>(i)] != cta) {
      throw Error("column " + std::to_string(i) + " of tensor memory is freed by who does not have it");
    }
    owner_[static_cast<size_t>(i)] = -1;
    for (int lane = 0; lane < kTensorLanes; ++lane) mark(lane, i) = kPoison;
  }
}

bool TensorMemory::Owns(int cta) const { return std::find(owner_.begin(), owner_.end(), cta) != owner_.end(); }

void TensorMemory::Check(int cta, int lane, int column, int columns) const {
  if (lane < 0 || lane >= kTensorLanes) throw Error("lane " + std::to_string(lane) + " of tensor memory");
  for (int i = column; i < column + columns; ++i) {
    if (i < 0 || i >= kColumns || owner_[static_cast<size_t>(i)] != cta) {
      throw Error("column " + std::to_string(i) + " of tensor memory is not allocated to this CTA");
    }
  }
}

}  // namespace emulator

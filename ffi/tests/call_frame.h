// Calls an FFI handler as XLA would, from C++: buffers of exactly the size they claim, attributes, and a thread pool.
//
// Used by hostile_calls.cc under AddressSanitizer, where every buffer is an allocation of its own, with red zones at
// both ends.

#ifndef JAX_MOE_TESTS_CALL_FRAME_H_
#define JAX_MOE_TESTS_CALL_FRAME_H_

#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_moe::testing {

// A buffer argument. `claims` dtype[dims]; `bytes` holds its data, which hostile calls may leave short.
struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
  std::vector<uint8_t> bytes;
  bool is_null = false;
  size_t misalignment = 0;  // the data starts this many bytes into its allocation

  Buffer(XLA_FFI_DataType dtype, std::vector<int64_t> dims) : dtype(dtype), dims(std::move(dims)) {
    int64_t size = ElementSize();
    for (int64_t dim : this->dims) size *= dim;
    bytes.resize(static_cast<size_t>(size));
  }

  int64_t ElementSize() const {
    switch (dtype) {
      case XLA_FFI_DataType_F64:
      case XLA_FFI_DataType_S64:
        return 8;
      case XLA_FFI_DataType_F32:
      case XLA_FFI_DataType_S32:
        return 4;
      case XLA_FFI_DataType_BF16:
      case XLA_FFI_DataType_F16:
        return 2;
      default:
        return 1;
    }
  }

  bool SameTypeAs(const Buffer& other) const { return dtype == other.dtype && dims == other.dims; }
};

using Attribute = std::variant<std::string, float, int32_t>;

struct HandlerCall {
  std::vector<Buffer> operands;
  std::vector<Buffer> results;
  std::map<std::string, Attribute> attributes;
};

// When the pool runs what the handler schedules.
enum class Pool {
  kNone,   // XLA has no pool: scheduling fails, which makes the FFI run the task at once
  kEager,  // on other threads, at once
  kLate,   // after the handler has returned and its buffers are freed
};

struct Outcome {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message;
  std::vector<std::vector<uint8_t>> results;
};

// What XLA keeps behind XLA_FFI_ExecutionContext: here, the pool.
class Context {
 public:
  explicit Context(Pool pool) : pool_(pool) {
    if (pool == Pool::kEager) {
      for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { Serve(); });
    }
  }

  ~Context() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    for (; !tasks_.empty(); tasks_.pop_front()) tasks_.front().first(tasks_.front().second);
  }

  bool Schedule(XLA_FFI_Task* task, void* data) {
    if (pool_ == Pool::kNone) return false;
    {
      const std::lock_guard lock(mutex_);
      tasks_.emplace_back(task, data);
    }
    wake_.notify_one();
    return true;
  }

 private:
  void Serve() {
    for (std::unique_lock lock(mutex_);;) {
      wake_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
      lock.lock();
    }
  }

  const Pool pool_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

struct Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

inline XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
    return reinterpret_cast<XLA_FFI_Error*>(new Error{args->errc, args->message});
  };
  api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = reinterpret_cast<Error*>(args->error)->message.c_str();
  };
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete reinterpret_cast<Error*>(args->error); };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    if (reinterpret_cast<Context*>(args->ctx)->Schedule(args->task, args->data)) return nullptr;
    return reinterpret_cast<XLA_FFI_Error*>(new Error{XLA_FFI_Error_Code_UNAVAILABLE, "no pool"});
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = 3;
    return nullptr;
  };
  return api;
}

// Buffers as the C API passes them; owns the copies of the data that the handler sees.
class BufferList {
 public:
  explicit BufferList(const std::vector<Buffer>& buffers) {
    for (const Buffer& buffer : buffers) {
      auto* data = static_cast<uint8_t*>(std::malloc(buffer.bytes.size() + buffer.misalignment));
      if (!buffer.bytes.empty()) std::memcpy(data + buffer.misalignment, buffer.bytes.data(), buffer.bytes.size());
      allocations_.push_back(data);
      dims_.push_back(buffer.dims);
      buffers_.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype,
                          buffer.is_null ? nullptr : data + buffer.misalignment,
                          static_cast<int64_t>(buffer.dims.size()), nullptr});
    }
    for (size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i].dims = dims_[i].data();
      pointers_.push_back(&buffers_[i]);
    }
  }
  ~BufferList() {
    for (uint8_t* allocation : allocations_) std::free(allocation);
  }
  BufferList(const BufferList&) = delete;
  BufferList& operator=(const BufferList&) = delete;

  void** pointers() { return pointers_.data(); }
  const void* data(size_t i) const { return buffers_[i].data; }

 private:
  std::vector<uint8_t*> allocations_;
  std::vector<std::vector<int64_t>> dims_;
  std::vector<XLA_FFI_Buffer> buffers_;
  std::vector<void*> pointers_;
};

inline Outcome Invoke(XLA_FFI_Handler* handler, const HandlerCall& call, Pool pool) {
  static const XLA_FFI_Api api = MakeApi();
  Context context(pool);  // outlives the buffers: late tasks run after those are gone
  Outcome outcome;

  BufferList operands(call.operands), results(call.results);
  std::vector<XLA_FFI_ArgType> operand_types(call.operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(call.results.size(), XLA_FFI_RetType_BUFFER);

  const size_t num_attributes = call.attributes.size();
  std::vector<XLA_FFI_ByteSpan> names, strings(num_attributes);
  std::vector<XLA_FFI_Scalar> scalars(num_attributes);
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<void*> values;
  names.reserve(num_attributes);
  for (const auto& [name, value] : call.attributes) {  // a map is sorted by name, as the FFI requires
    const size_t i = names.size();
    name_pointers.push_back(&names.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
    if (const auto* text = std::get_if<std::string>(&value)) {
      strings[i] = {text->data(), text->size()};
      types.push_back(XLA_FFI_AttrType_STRING);
      values.push_back(&strings[i]);
    } else {
      const auto* number = std::get_if<float>(&value);
      const void* data = number != nullptr ? static_cast<const void*>(number) : std::get_if<int32_t>(&value);
      scalars[i] = {number != nullptr ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_S32, const_cast<void*>(data)};
      types.push_back(XLA_FFI_AttrType_SCALAR);
      values.push_back(&scalars[i]);
    }
  }

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<XLA_FFI_ExecutionContext*>(&context);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.operands.size()), operand_types.data(),
                operands.pointers()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(call.results.size()), result_types.data(),
                results.pointers()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(num_attributes), types.data(),
                 name_pointers.data(),      values.data()};
  if (auto* error = reinterpret_cast<Error*>(handler(&frame))) {
    outcome.code = error->code;
    outcome.message = error->message;
    delete error;
  }
  for (size_t i = 0; i < call.results.size(); ++i) {
    std::vector<uint8_t> bytes(call.results[i].bytes.size());
    if (!bytes.empty() && results.data(i) != nullptr) std::memcpy(bytes.data(), results.data(i), bytes.size());
    outcome.results.push_back(std::move(bytes));
  }
  return outcome;
}

}  // namespace jax_moe::testing

#endif  // JAX_MOE_TESTS_CALL_FRAME_H_

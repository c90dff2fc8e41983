#include "cuda/program.h"

#include <charconv>
#include <string_view>
#include <tuple>
#include <utility>

#include "decode.h"

namespace jax_moe::cuda {

ffi::TypeId Program::id = {};

namespace {

ffi::Error RefuseAttribute(std::string_view step, std::string_view name, const std::string& what) {
  return Refuse("attribute kernels." + std::string(step) + (name.empty() ? "" : ".") + std::string(name) + ": " + what);
}

ffi::Error GetUnsigned(const ffi::Dictionary& attributes, std::string_view step, std::string_view name, uint32_t least,
                       uint32_t most, uint32_t* value) {
  ffi::ErrorOr<int64_t> got = attributes.get<int64_t>(name);
  if (got.has_error()) return RefuseAttribute(step, name, got.error().message());
  if (*got < least || *got > most) {
    return RefuseAttribute(
        step, name, "got " + std::to_string(*got) + ", needs " + std::to_string(least) + ".." + std::to_string(most));
  }
  *value = static_cast<uint32_t>(*got);
  return ffi::Error::Success();
}

ffi::Error GetString(const ffi::Dictionary& attributes, std::string_view step, std::string_view name,
                     std::string_view* value) {
  ffi::ErrorOr<std::string_view> got = attributes.get<std::string_view>(name);
  if (got.has_error()) return RefuseAttribute(step, name, got.error().message());
  if (got->empty()) return RefuseAttribute(step, name, "is empty");
  *value = *got;
  return ffi::Error::Success();
}

template <typename T>
bool ParseNumber(std::string_view text, T* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

// "operand:1", "result:0", "i32:128" or "null".
bool ParseArgument(std::string_view text, Argument* argument) {
  if (text == "null") {
    *argument = {Argument::Kind::kScalar, 0};
    return true;
  }
  const size_t colon = text.find(':');
  if (colon == std::string_view::npos) return false;
  const std::string_view kind = text.substr(0, colon), value = text.substr(colon + 1);
  if (kind == "operand" || kind == "result") {
    argument->kind = kind == "operand" ? Argument::Kind::kOperand : Argument::Kind::kResult;
    return ParseNumber(value, &argument->value);
  }
  argument->kind = Argument::Kind::kScalar;
  if (int32_t number; kind == "i32" && ParseNumber(value, &number)) {
    argument->value = static_cast<uint32_t>(number);
    return true;
  }
  return false;
}

ffi::Error ParseArguments(std::string_view step, std::string_view text, std::vector<Argument>* arguments) {
  while (!text.empty()) {
    const size_t space = text.find(' ');
    Argument argument;
    if (arguments->size() == kMostArguments || !ParseArgument(text.substr(0, space), &argument)) {
      return RefuseAttribute(step, "arguments", "cannot read '" + std::string(text.substr(0, space)) + "'");
    }
    arguments->push_back(argument);
    text = space == std::string_view::npos ? std::string_view() : text.substr(space + 1);
  }
  return ffi::Error::Success();
}

ffi::Error DecodeKernel(const ffi::Dictionary& attributes, std::string_view step, Kernel* kernel) {
  std::string_view image, name, arguments;
  uint32_t overlap = 0;
  // A grid has at most 2^31 - 1 blocks along x, a Hopper block 1024 threads and 227 KiB, a portable cluster 8 blocks.
  ffi::Error error = GetString(attributes, step, "image", &image);
  if (error.success()) error = GetString(attributes, step, "name", &name);
  if (error.success()) error = GetUnsigned(attributes, step, "grid", 1, 0x7fffffff, &kernel->grid);
  if (error.success()) error = GetUnsigned(attributes, step, "block", 1, 1024, &kernel->block);
  if (error.success()) error = GetUnsigned(attributes, step, "cluster", 1, 8, &kernel->cluster);
  if (error.success()) error = GetUnsigned(attributes, step, "shared", 0, 227 * 1024, &kernel->shared_bytes);
  if (error.success()) error = GetUnsigned(attributes, step, "overlap", 0, 1, &overlap);
  if (error.success()) error = GetString(attributes, step, "arguments", &arguments);
  if (error.success()) error = ParseArguments(step, arguments, &kernel->arguments);
  if (error.success() && kernel->grid % kernel->cluster != 0) {
    error = RefuseAttribute(step, "grid", "is not a multiple of cluster");
  }
  if (error.failure()) return error;
  kernel->image = image;
  kernel->name = name;
  kernel->overlap = overlap == 1;
  kernel->present = true;
  return error;
}

template <size_t n>
ffi::Error GetSizes(const ffi::Dictionary& attributes, std::string_view name, std::array<int64_t, n>* sizes) {
  ffi::ErrorOr<ffi::Span<const int64_t>> got = attributes.get<ffi::Span<const int64_t>>(name);
  if (got.has_error()) return RefuseAttribute(name, "", got.error().message());
  if (got->size() != n) return RefuseAttribute(name, "", "needs " + std::to_string(n) + " sizes");
  std::copy(got->begin(), got->end(), sizes->begin());
  return ffi::Error::Success();
}

// Kernels loaded in this process, by context and content: the layers of a model share them.
//
// They are never unloaded. XLA may drop an executable whose last run is still on the GPU's queue, and at the end of the
// process the driver may be gone before we are; what this costs is bounded by the number of distinct kernels.
class LoadedKernels {
 public:
  static LoadedKernels& Instance() {
    static LoadedKernels* const instance = new LoadedKernels;
    return *instance;
  }

  ffi::Error Get(const Driver& driver, unsigned long long context_id, const Kernel& kernel, Function* function) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key(context_id, kernel.name, kernel.shared_bytes, kernel.image);
    if (auto found = functions_.find(key); found != functions_.end()) {
      *function = found->second;
      return ffi::Error::Success();
    }
    auto failed = [&](const char* call, Result result) {
      std::string what = "fused_moe: loading kernel " + kernel.name + ": " + call + ": " + ErrorText(driver, result);
      if (result == kErrorNoBinaryForGpu) {
        what += ". The kernel was compiled for another GPU than this one: call jax_moe.prepare() for this GPU's target";
      }
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, what);
    };
    Module module = nullptr;
    if (Result result = driver.cuModuleLoadData(&module, kernel.image.data())) {
      return failed("cuModuleLoadData", result);
    }
    if (Result result = driver.cuModuleGetFunction(function, module, kernel.name.c_str())) {
      return failed("cuModuleGetFunction", result);
    }
    // cuModuleGetFunction has put the code on the device, also where the driver loads lazily (CUDA programming guide,
    // "Lazy Loading"): no launch, which may be captured, has to. This allows more than 48 KiB.
    const int shared_bytes = static_cast<int>(kernel.shared_bytes);
    if (Result result = driver.cuFuncSetAttribute(*function, kFunctionMaxDynamicSharedBytes, shared_bytes)) {
      return failed("cuFuncSetAttribute", result);
    }
    // A kernel with so much shared memory is planned for as many blocks on a multiprocessor as fit in all of it.
    constexpr int kMuch = 48 * 1024, kAll = 100;
    if (shared_bytes > kMuch) {
      if (Result result = driver.cuFuncSetAttribute(*function, kFunctionPreferredSharedCarveout, kAll)) {
        return failed("cuFuncSetAttribute", result);
      }
    }
    functions_.emplace(key, *function);
    return ffi::Error::Success();
  }

 private:
  using Key = std::tuple<unsigned long long, std::string, uint32_t, std::string>;

  std::mutex mutex_;
  std::map<Key, Function> functions_;  // guarded by mutex_
};

// Contexts are told apart by id and not by address, which a destroyed context passes on.
ffi::Error CurrentContext(const Driver& driver, unsigned long long* id) {
  constexpr Context kCurrent = nullptr;
  if (Result result = driver.cuCtxGetId(kCurrent, id)) {
    return ffi::Error::Internal("fused_moe: cuCtxGetId: " + ErrorText(driver, result));
  }
  return ffi::Error::Success();
}

}  // namespace

std::string ErrorText(const Driver& driver, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.cuGetErrorName(result, &name) != kSuccess || name == nullptr) return "error " + std::to_string(result);
  if (driver.cuGetErrorString(result, &text) != kSuccess || text == nullptr) return name;
  return std::string(name) + " (" + text + ")";
}

ffi::ErrorOr<std::unique_ptr<Program>> Program::Decode(const ffi::Dictionary& attributes) {
  auto program = std::make_unique<Program>();
  ffi::Error error = DecodeOptions(attributes, &program->options_);
  if (error.success()) error = program->DecodeKernels(attributes);
  if (error.success()) error = program->CheckKernels();
  if (error.failure()) return ffi::Unexpected(error);
  return program;
}

ffi::Error Program::DecodeKernels(const ffi::Dictionary& attributes) {
  ffi::ErrorOr<ffi::Dictionary> kernels = attributes.get<ffi::Dictionary>("kernels");
  if (kernels.has_error()) return Refuse("attribute kernels: " + kernels.error().message());
  JAX_MOE_TRY(GetSizes(*kernels, "shape", &shape_));
  JAX_MOE_TRY(GetSizes(*kernels, "weight_bytes", &weight_bytes_));
  ffi::ErrorOr<ffi::Span<const int64_t>> workspaces = kernels->get<ffi::Span<const int64_t>>("workspace_bytes");
  if (workspaces.has_error()) return RefuseAttribute("workspace_bytes", "", workspaces.error().message());
  if (workspaces->size() >= kMostResults) {
    return RefuseAttribute("workspace_bytes", "", "needs fewer than " + std::to_string(kMostResults) + " sizes");
  }
  workspace_bytes_.assign(workspaces->begin(), workspaces->end());

  for (size_t step = 0; step < kNumSteps; ++step) {
    const std::string_view name = kStepNames[step];
    if (!kernels->contains(name)) continue;
    ffi::ErrorOr<ffi::Dictionary> kernel = kernels->get<ffi::Dictionary>(name);
    if (kernel.has_error()) return RefuseAttribute(name, "", kernel.error().message());
    JAX_MOE_TRY(DecodeKernel(*kernel, name, &kernels_[step]));
  }
  return ffi::Error::Success();
}

ffi::Error Program::CheckKernels() const {
  std::array<bool, kNumSteps> is_needed;
  is_needed.fill(shape_[0] > 0);
  is_needed[kPrepare] &= options_.precision == Precision::kW4A4 || options_.weight_on == WeightOn::kInput;
  is_needed[kCombine] &= options_.combine == Combine::kOrdered;
  for (size_t step = 0; step < kNumSteps; ++step) {
    if (is_needed[step] && !kernels_[step].present) {
      return Refuse(std::string("attribute kernels: has no ") + kStepNames[step]);
    }
    for (const Argument& argument : kernels_[step].arguments) {
      const size_t num_results = 1 + workspace_bytes_.size();
      const bool is_there = argument.kind == Argument::Kind::kScalar ||
                            argument.value < (argument.kind == Argument::Kind::kOperand ? kNumOperands : num_results);
      if (!is_there) return RefuseAttribute(kStepNames[step], "arguments", "no such buffer");
    }
  }
  return ffi::Error::Success();
}

ffi::Error Program::Load(const Driver& driver) {
  unsigned long long context_id = 0;
  if (ffi::Error error = CurrentContext(driver, &context_id); error.failure()) return error;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (functions_.count(context_id) != 0) return ffi::Error::Success();
  Functions functions = {};
  for (size_t step = 0; step < kNumSteps; ++step) {
    if (!kernels_[step].present) continue;
    ffi::Error error = LoadedKernels::Instance().Get(driver, context_id, kernels_[step], &functions[step]);
    if (error.failure()) return error;
  }
  functions_.emplace(context_id, functions);
  return ffi::Error::Success();
}

ffi::Error Program::Loaded(const Driver& driver, Functions* functions) const {
  unsigned long long context_id = 0;
  if (ffi::Error error = CurrentContext(driver, &context_id); error.failure()) return error;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = functions_.find(context_id);
  if (found == functions_.end()) return ffi::Error::Internal("fused_moe: executed before it was initialized");
  *functions = found->second;
  return ffi::Error::Success();
}

}  // namespace jax_moe::cuda

#include "cuda/program.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <tuple>
#include <utility>

#include "cuda/zero_kernel.h"

namespace jax_moe::cuda {

ffi::TypeId Program::id = {};

namespace {

// What stands between single spaces.
std::vector<std::string_view> Words(std::string_view text) {
  std::vector<std::string_view> words;
  while (!text.empty()) {
    const size_t space = text.find(' ');
    words.push_back(text.substr(0, space));
    text = space == std::string_view::npos ? std::string_view() : text.substr(space + 1);
  }
  return words;
}

std::string Quoted(std::string_view text) { return std::string("'").append(text).append("'"); }

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

ffi::Error DecodeLaunch(const Attributes& kernels, std::string_view name, Launch* launch) {
  Attributes attributes{kernels.dictionary, kernels.path + std::string(name) + "."};
  JAX_MOE_TRY(kernels.Get(name, &attributes.dictionary));
  launch->name = name;
  std::string arguments;
  uint32_t overlap = 0;
  JAX_MOE_TRY(attributes.GetText("image", &launch->image));
  JAX_MOE_TRY(attributes.GetText("name", &launch->kernel));
  // CUDA's limits for every GPU: 2^31 - 1 CTAs along x, 1024 threads, a portable cluster of 8 CTAs. How much shared
  // memory there is, the driver knows.
  JAX_MOE_TRY(attributes.GetUnsigned("grid", 1, 0x7fffffff, &launch->grid));
  JAX_MOE_TRY(attributes.GetUnsigned("threads", 1, 1024, &launch->threads));
  JAX_MOE_TRY(attributes.GetUnsigned("cluster", 1, 8, &launch->cluster));
  JAX_MOE_TRY(attributes.GetUnsigned("shared", 0, 0x7fffffff, &launch->shared_bytes));
  JAX_MOE_TRY(attributes.GetUnsigned("overlap", 0, 1, &overlap));
  launch->overlap = overlap == 1;
  if (launch->grid % launch->cluster != 0) return attributes.Refuse("grid", "is not a multiple of cluster");
  JAX_MOE_TRY(attributes.GetText("arguments", &arguments));
  for (std::string_view word : Words(arguments)) {
    Argument argument;
    if (launch->arguments.size() == kMostArguments || !ParseArgument(word, &argument)) {
      return attributes.Refuse("arguments", "cannot read " + Quoted(word));
    }
    launch->arguments.push_back(argument);
  }
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

  // `whose`: of messages.
  ffi::Error Get(const Driver& driver, unsigned long long context_id, std::string_view whose, const Launch& launch,
                 Function* function) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Key key(context_id, launch.kernel, launch.shared_bytes, launch.image);
    if (auto found = functions_.find(key); found != functions_.end()) {
      *function = found->second;
      return ffi::Error::Success();
    }
    auto failed = [&](const char* call, Result result) {
      std::string what =
          std::string(whose) + ": loading kernel " + launch.kernel + ": " + call + ": " + ErrorText(driver, result);
      if (result == kErrorNoBinaryForGpu) {
        what += ". The kernel was compiled for another GPU than this one: call jax_moe.prepare() for this GPU's target";
      }
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, what);
    };
    Module module = nullptr;
    if (Result result = driver.cuModuleLoadData(&module, launch.image.data())) {
      return failed("cuModuleLoadData", result);
    }
    if (Result result = driver.cuModuleGetFunction(function, module, launch.kernel.c_str())) {
      return failed("cuModuleGetFunction", result);
    }
    // cuModuleGetFunction has put the code on the device, also where the driver loads lazily (CUDA programming guide,
    // "Lazy Loading"): no launch, which may be captured, has to. This allows more than 48 KiB.
    const int shared_bytes = static_cast<int>(launch.shared_bytes);
    if (Result result = driver.cuFuncSetAttribute(*function, kFunctionMaxDynamicSharedBytes, shared_bytes)) {
      return failed("cuFuncSetAttribute", result);
    }
    // A kernel with so much shared memory is planned for as many CTAs on a multiprocessor as fit in all of it.
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
ffi::Error CurrentContext(const Driver& driver, std::string_view whose, unsigned long long* id) {
  constexpr Context kCurrent = nullptr;
  if (Result result = driver.cuCtxGetId(kCurrent, id)) {
    return ffi::Error::Internal(std::string(whose) + ": cuCtxGetId: " + ErrorText(driver, result));
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

bool Launch::IsGiven(const Argument& argument) const {
  return std::find(arguments.begin(), arguments.end(), argument) != arguments.end();
}

ffi::ErrorOr<std::unique_ptr<Program>> Program::Decode(std::unique_ptr<Kind> kind, const ffi::Dictionary& attributes) {
  auto program = std::make_unique<Program>(std::move(kind));
  const Attributes call{attributes, ""};
  Attributes kernels{attributes, "kernels."};
  ffi::Error error = program->kind_->DecodeOptions(call);
  if (error.success()) error = call.Get("kernels", &kernels.dictionary);
  if (error.success()) error = program->DecodeKernels(kernels);
  if (error.success()) error = program->CheckLaunches(kernels);
  if (error.failure()) return ffi::Unexpected(error);
  return program;
}

ffi::Error Program::DecodeKernels(const Attributes& kernels) {
  Attributes sizes{kernels.dictionary, "kernels.sizes."}, weights{kernels.dictionary, "kernels.weight_bytes."};
  JAX_MOE_TRY(kernels.Get("sizes", &sizes.dictionary));
  const auto size_names = kind_->size_names();
  for (size_t i = 0; i < size_names.size(); ++i) JAX_MOE_TRY(sizes.Get(size_names[i], &sizes_[i]));
  JAX_MOE_TRY(kernels.Get("weight_bytes", &weights.dictionary));
  const auto packed = kind_->packed_weights();
  for (size_t i = 0; i < packed.size(); ++i) {
    JAX_MOE_TRY(weights.Get(kind_->operand_names()[packed[i]], &weight_bytes_[i]));
  }
  ffi::Span<const int64_t> workspaces;
  JAX_MOE_TRY(kernels.Get("workspace_bytes", &workspaces));
  if (workspaces.size() >= kMostResults) {
    return kernels.Refuse("workspace_bytes", "needs fewer than " + std::to_string(kMostResults) + " sizes");
  }
  workspace_bytes_.assign(workspaces.begin(), workspaces.end());

  std::string_view names;
  JAX_MOE_TRY(kernels.Get("launches", &names));
  for (std::string_view name : Words(names)) {
    if (!kernels.dictionary.contains(name)) return kernels.Refuse("launches", "has no kernel for " + Quoted(name));
    JAX_MOE_TRY(DecodeLaunch(kernels, name, &launches_.emplace_back()));
  }
  if (launches_.empty() != (sizes_[0] == 0)) {
    return kernels.Refuse("launches",
                          "got " + Quoted(names) + ", " +
                              (launches_.empty() ? "needs one where x has rows" : "needs none where x has no rows"));
  }
  return ffi::Error::Success();
}

ffi::Error Program::CheckLaunches(const Attributes& kernels) {
  const auto operand_names = kind_->operand_names();
  const size_t num_operands = operand_names.size(), num_results = 1 + workspace_bytes_.size();
  for (const Launch& launch : launches_) {
    for (const Argument& argument : launch.arguments) {
      const bool is_there = argument.kind == Argument::Kind::kScalar ||
                            argument.value < (argument.kind == Argument::Kind::kOperand ? num_operands : num_results);
      if (!is_there) return kernels.Refuse(launch.name + ".arguments", "no such buffer");
    }
  }
  if (!launches_.empty() && launches_[0].overlap) {
    return kernels.Refuse(launches_[0].name + ".overlap",
                          "got 1, needs 0: what is in front of the first launch writes the operands");
  }
  std::string_view adds, first_name;
  JAX_MOE_TRY(kernels.Get("adds", &adds));
  if (!launches_.empty()) {
    const auto first_given = [this](Argument::Kind kind, uint32_t value) {
      size_t i = 0;
      while (i < launches_.size() && !launches_[i].IsGiven({kind, value})) ++i;
      return i;
    };
    for (size_t scale : kind_->input_scales()) {
      if (first_given(Argument::Kind::kOperand, static_cast<uint32_t>(scale)) == launches_.size()) {
        return kernels.Refuse("launches", "none is given " + std::string(operand_names[scale]) + ", as w4a4 needs");
      }
    }
    // Before the first launch that adds, none is given the output.
    const size_t first = first_given(Argument::Kind::kResult, 0);
    if (first == launches_.size()) return kernels.Refuse("launches", "none is given the output");
    if (kind_->adds()) first_that_adds_ = first, first_name = launches_[first].name;
  }
  if (adds == first_name) return ffi::Error::Success();
  return kernels.Refuse("adds", "got " + Quoted(adds) + ", needs " + Quoted(first_name) +
                                    (first_that_adds_ ? ", the first launch that is given the output"
                                                      : ": nothing adds into the output"));
}

ffi::Error Program::Load(const Driver& driver) {
  unsigned long long context_id = 0;
  JAX_MOE_TRY(CurrentContext(driver, kind_->name(), &context_id));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (functions_.count(context_id) != 0) return ffi::Error::Success();
  std::vector<Function> functions;
  for (const Launch& launch : launches_) {
    JAX_MOE_TRY(LoadedKernels::Instance().Get(driver, context_id, kind_->name(), launch, &functions.emplace_back()));
  }
  Function zero = nullptr;
  if (first_that_adds_) {
    Launch launch;
    launch.kernel = kZeroKernel, launch.image = kZeroPtx;
    // Without the driver's compiler of PTX a memset does the same, only slower.
    if (LoadedKernels::Instance().Get(driver, context_id, kind_->name(), launch, &zero).failure()) zero = nullptr;
  }
  functions.push_back(zero);
  functions_.emplace(context_id, std::move(functions));
  return ffi::Error::Success();
}

ffi::Error Program::Loaded(const Driver& driver, const Function** functions) const {
  unsigned long long context_id = 0;
  JAX_MOE_TRY(CurrentContext(driver, kind_->name(), &context_id));
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = functions_.find(context_id);
  if (found == functions_.end()) {
    return ffi::Error::Internal(std::string(kind_->name()) + ": executed before it was initialized");
  }
  *functions = found->second.data();
  return ffi::Error::Success();
}

}  // namespace jax_moe::cuda

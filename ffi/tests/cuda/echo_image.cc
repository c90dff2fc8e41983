// A CPU custom call that decodes its attributes as the CUDA handler does and returns a kernel's image, so that a test
// sees what XLA makes of the attributes on the way from Python: nesting, number arrays, every byte value.

#include <cstring>

#include "cuda/program.h"
#include "xla/ffi/api/ffi.h"

namespace jax_moe::cuda {
namespace {

ffi::Error EchoImage(ffi::Dictionary attributes, ffi::Result<ffi::Buffer<ffi::U8>> image,
                     ffi::Result<ffi::Buffer<ffi::S32>> facts) {
  ffi::ErrorOr<std::unique_ptr<Program>> program = Program::Decode(std::make_unique<FusedMoe>(), attributes);
  if (program.has_error()) return program.error();
  const Launch& kernel = (*program)->launches().back();
  if (kernel.image.size() != image->size_bytes()) return Refuse("image: " + std::to_string(kernel.image.size()));
  std::memcpy(image->typed_data(), kernel.image.data(), kernel.image.size());
  const int32_t numbers[] = {static_cast<int32_t>(kernel.grid),
                             static_cast<int32_t>(kernel.threads),
                             static_cast<int32_t>(kernel.cluster),
                             static_cast<int32_t>(kernel.shared_bytes),
                             kernel.overlap,
                             static_cast<int32_t>(kernel.arguments.size()),
                             static_cast<int32_t>(kernel.arguments.back().value),
                             static_cast<int32_t>((*program)->sizes()[6])};
  if (facts->element_count() != std::size(numbers)) return Refuse("facts");
  std::memcpy(facts->typed_data(), numbers, sizeof(numbers));
  return ffi::Error::Success();
}

// Decodes the attributes of a call that makes parcels: they have an empty dictionary and an empty array of numbers.
ffi::Error DecodeParcelsCall(ffi::Dictionary attributes, ffi::Result<ffi::Buffer<ffi::S32>> sizes) {
  ffi::ErrorOr<std::unique_ptr<Program>> program = Program::Decode(std::make_unique<Parcels>(), attributes);
  if (program.has_error()) return program.error();
  if (sizes->element_count() != 3) return Refuse("sizes");
  for (int i = 0; i < 3; ++i) sizes->typed_data()[i] = static_cast<int32_t>((*program)->sizes()[i]);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeTestDecodeParcels, DecodeParcelsCall,
                              ffi::Ffi::Bind().Attrs().Ret<ffi::Buffer<ffi::S32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxMoeTestEchoImage, EchoImage,
                              ffi::Ffi::Bind().Attrs().Ret<ffi::Buffer<ffi::U8>>().Ret<ffi::Buffer<ffi::S32>>());

}  // namespace jax_moe::cuda

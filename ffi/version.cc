// Which FFI the library was built for, for `python -m jax_moe doctor`.

#include <cstdint>

#include "xla/ffi/api/c_api.h"

// Writes the major and the minor version of XLA's FFI.
extern "C" __attribute__((visibility("default"))) void JaxMoeFfiVersion(int32_t version[2]) {
  version[0] = XLA_FFI_API_MAJOR;
  version[1] = XLA_FFI_API_MINOR;
}

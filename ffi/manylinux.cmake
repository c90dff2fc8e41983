# CMake's toolchain file of the published wheels (`make wheels`). Zig compiles for either architecture on either, for a
# glibc that is older than this machine's, and links its own C++ library: the wheel needs glibc alone.
#
# JAX_MOE_ZIG is the compiler of PyPI's ziglang, JAX_MOE_MANYLINUX the architecture.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR "$ENV{JAX_MOE_MANYLINUX}")

# Zig compiles its C++ library once for each combination of the last three options, which takes minutes, and keeps it in
# ~/.cache/zig. They are part of the compiler's name so that CMake's checks and all that is built share one.
set(CMAKE_CXX_COMPILER "$ENV{JAX_MOE_ZIG}" c++ -target "${CMAKE_SYSTEM_PROCESSOR}-linux-gnu.2.28" -O3 -fPIC -s)

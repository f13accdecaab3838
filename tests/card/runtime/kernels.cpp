// Kernels: a launch is checked as the driver would, counted, and does nothing.
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

#include "card.h"

namespace card {
namespace {

constexpr int kNotSupported = 801;  // CUDA_ERROR_NOT_SUPPORTED

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration pushed;
std::mutex mutex;
std::unordered_map<const void*, std::string> names;
void* fat_binary = nullptr;

size_t most_shared() {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device());
  return bytes;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared) {
  launched();
  REQUIRE_HEALTH();
  unsigned long long threads = 1ull * block.x * block.y * block.z;
  bool is_empty = !grid.x || !grid.y || !grid.z || !threads;
  if (is_empty || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u || block.z > 64)
    return fail(cudaErrorInvalidConfiguration);
  if (shared > most_shared()) return fail(cudaErrorInvalidValue);
  if (settings().log) {
    std::lock_guard<std::mutex> held(mutex);
    auto found = names.find(function);
    log("launch %s grid %u,%u,%u block %u shared %zu", found == names.end() ? "?" : found->second.c_str(), grid.x, grid.y,
        grid.z, block.x, shared);
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace card

API void** __cudaRegisterFatBinary(void*) { return &card::fat_binary; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> held(card::mutex);
  card::names.emplace(function, name);
}

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  card::pushed = {grid, block, shared, stream};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = card::pushed.grid;
  *block = card::pushed.block;
  *shared = card::pushed.shared;
  *static_cast<void**>(stream) = card::pushed.stream;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return card::launch(function, grid, block, shared);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return card::launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t) {
  return card::launch(kernel, grid, block, shared);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 64;
  // The wheel has code for 7.5, 8.0, 8.6, 9.0 and up; a card runs the nearest of its own generation.
  out->binaryVersion = out->ptxVersion = card::settings().capability == 89 ? 86 : card::settings().capability;
  out->maxDynamicSharedSizeBytes = static_cast<int>(card::most_shared());
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  return is_size && static_cast<size_t>(value) > card::most_shared() ? card::fail(cudaErrorInvalidValue) : cudaSuccess;
}

API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute attribute, int value, int) {
  return cudaFuncSetAttribute(nullptr, attribute, value);
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return card::health(); }

API cudaError_t cudaGetSymbolAddress(void** out, const void*) {
  static char room[1 << 20];
  *out = room;
  return cudaSuccess;
}

API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// The driver's own functions are not here: whoever asks for one is told so.
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  card::log("driver entry point %s", name);
  static auto nothing = +[]() -> int { return card::kNotSupported; };
  *out = reinterpret_cast<void*>(nothing);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

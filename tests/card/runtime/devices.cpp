// Devices: how many there are, what they can do, and the driver's version.
#include <cstdlib>
#include <cstring>

#include "card.h"

namespace card {

static thread_local int current = 0;

int current_device() { return current; }

// CUDA looks once, when it is first used.
static int visible() {
  static const int count = [] {
    const char* listed = getenv("CUDA_VISIBLE_DEVICES");
    if (!listed) return settings().devices;
    int found = 0;
    for (const char* at = listed; *at >= '0' && *at <= '9'; ++at) {
      char* end;
      if (strtol(at, &end, 10) >= settings().devices) break;
      ++found;
      at = end;
      if (*at != ',') break;
    }
    return found;
  }();
  return count;
}

static int shared_memory() {  // bytes a block may ask for, of the programming guide's table of compute capabilities
  switch (settings().capability) {
    case 75: return 64 << 10;
    case 80: return 163 << 10;
    case 90: return 227 << 10;
    default: return 99 << 10;
  }
}

static cudaError_t check(int device) {
  return device < 0 || device >= visible() ? fail(cudaErrorInvalidDevice) : cudaSuccess;
}

}  // namespace card

using card::settings;

API cudaError_t cudaGetDeviceCount(int* count) {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  *count = 0;
  if (settings().driver < version) return card::fail(cudaErrorInsufficientDriver);
  if (!card::visible()) return card::fail(cudaErrorNoDevice);
  *count = card::visible();
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = settings().driver;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
  *device = card::current;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  if (cudaError_t wrong = card::check(device)) return wrong;
  card::current = device;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  if (cudaError_t wrong = card::check(device)) return wrong;
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%s", settings().name);
  out->totalGlobalMem = settings().memory;
  out->major = settings().capability / 10;
  out->minor = settings().capability % 10;
  out->multiProcessorCount = settings().multiprocessors;
  out->sharedMemPerBlock = 48 << 10;
  out->sharedMemPerBlockOptin = card::shared_memory();
  out->sharedMemPerMultiprocessor = card::shared_memory() + (1 << 10);
  out->reservedSharedMemPerBlock = 1 << 10;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = settings().capability == 75 ? 1024 : 1536;
  out->maxBlocksPerMultiProcessor = 16;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = out->memPitch = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->totalConstMem = 65536;
  out->textureAlignment = 512;
  out->l2CacheSize = 3 << 20;
  out->memoryBusWidth = 192;
  out->unifiedAddressing = out->concurrentKernels = out->managedMemory = out->cooperativeLaunch = 1;
  out->concurrentManagedAccess = 1;
  out->asyncEngineCount = 2;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (cudaError_t wrong = cudaGetDeviceProperties(&p, device)) return wrong;
  switch (static_cast<int>(attribute)) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrTextureAlignment: *value = p.textureAlignment; break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* out, int length, int device) {
  snprintf(out, length, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return card::fail(cudaErrorPeerAccessUnsupported); }

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

// Memory: budgeted blocks of host memory. A page takes no room until it is written, so sizes can be rehearsed alone.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "card.h"

namespace card {
namespace {

constexpr size_t kGranularity = 2 << 20;  // of cudaMalloc on cards of these generations

struct Block {
  size_t bytes;
  Kind kind;
  int device;
};
struct Freed {
  void* pointer;
  size_t bytes;
  uint64_t until;
};

std::mutex mutex;
std::map<uintptr_t, Block> blocks;
std::vector<Freed> graveyard;
size_t used[kMostDevices], peak[kMostDevices];
size_t taken = 0;

size_t budget() {
  const Settings& s = settings();
  size_t gone = s.context + s.other + taken;
  return s.memory > gone ? s.memory - gone : 0;
}

std::map<uintptr_t, Block>::iterator holding(const void* pointer) {
  auto next = blocks.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (next == blocks.begin()) return blocks.end();
  --next;
  return reinterpret_cast<uintptr_t>(pointer) < next->first + next->second.bytes ? next : blocks.end();
}

cudaError_t take(void** out, size_t bytes, Kind kind) {
  REQUIRE_HEALTH();
  bury();
  *out = nullptr;
  if (!bytes) return cudaSuccess;
  std::lock_guard<std::mutex> held(mutex);
  int device = current_device();
  if (kind == Kind::kDevice) {
    bytes = (bytes + kGranularity - 1) / kGranularity * kGranularity;
    long count = ++counters.allocations;
    if (settings().take_after && count == settings().take_after + 1) taken += settings().take_bytes;
    if (used[device] + bytes > budget()) {
      log("refused %zu bytes, %zu used of %zu", bytes, used[device], budget());
      return fail(cudaErrorMemoryAllocation);
    }
  }
  void* pointer = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pointer == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  blocks[reinterpret_cast<uintptr_t>(pointer)] = {bytes, kind, device};
  if (kind == Kind::kDevice) {
    used[device] += bytes;
    if (used[device] > peak[device]) peak[device] = used[device];
  }
  log("allocated %zu kind %d", bytes, static_cast<int>(kind));
  *out = pointer;
  return cudaSuccess;
}

// The budget has the bytes back at once. The pages stay until queued work that may touch them is done: the allocator of
// torch frees while it holds its lock, and work done then would wait for Python's.
cudaError_t give(void* pointer) {
  REQUIRE_HEALTH();
  if (!pointer) return cudaSuccess;
  {
    std::lock_guard<std::mutex> held(mutex);
    auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == blocks.end()) return fail(cudaErrorInvalidValue);
    if (found->second.kind == Kind::kDevice) used[found->second.device] -= found->second.bytes;
    graveyard.push_back({pointer, found->second.bytes, issued_so_far()});
    blocks.erase(found);
  }
  bury();
  return cudaSuccess;
}

}  // namespace

void bury() {
  std::lock_guard<std::mutex> held(mutex);
  std::vector<Freed> kept;
  for (const Freed& freed : graveyard) {
    if (is_all_done(freed.until))
      munmap(freed.pointer, freed.bytes);
    else
      kept.push_back(freed);
  }
  graveyard.swap(kept);
}

Kind kind_of(const void* pointer) {
  std::lock_guard<std::mutex> held(mutex);
  auto found = holding(pointer);
  return found == blocks.end() ? Kind::kUnknown : found->second.kind;
}

void require_inside(const void* pointer, size_t bytes, const char* what) {
  std::lock_guard<std::mutex> held(mutex);
  auto found = holding(pointer);
  if (found == blocks.end() || reinterpret_cast<uintptr_t>(pointer) + bytes <= found->first + found->second.bytes) return;
  fprintf(stderr, "rehearsed card: a %s goes past the end of its memory\n", what);
  abort();
}

}  // namespace card

using card::Kind;

API cudaError_t cudaMalloc(void** out, size_t bytes) { return card::take(out, bytes, Kind::kDevice); }
API cudaError_t cudaMallocManaged(void** out, size_t bytes, unsigned) { return card::take(out, bytes, Kind::kManaged); }
API cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) { return card::take(out, bytes, Kind::kPinned); }
API cudaError_t cudaMallocHost(void** out, size_t bytes) { return card::take(out, bytes, Kind::kPinned); }
API cudaError_t cudaFree(void* pointer) { return card::give(pointer); }
API cudaError_t cudaFreeHost(void* pointer) { return card::give(pointer); }
API cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) { return card::health(); }

API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  REQUIRE_HEALTH();
  std::lock_guard<std::mutex> held(card::mutex);
  card::blocks[reinterpret_cast<uintptr_t>(pointer)] = {bytes, Kind::kRegistered, card::current_device()};
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* pointer) {
  cudaDeviceSynchronize();  // its owner frees it next
  std::lock_guard<std::mutex> held(card::mutex);
  return card::blocks.erase(reinterpret_cast<uintptr_t>(pointer)) ? cudaSuccess : card::fail(cudaErrorInvalidValue);
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  REQUIRE_HEALTH();
  std::lock_guard<std::mutex> held(card::mutex);
  size_t used = card::used[card::current_device()];
  *total = card::settings().memory;
  *free = card::budget() > used ? card::budget() - used : 0;
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* pointer) {
  memset(out, 0, sizeof *out);
  std::lock_guard<std::mutex> held(card::mutex);
  auto found = card::holding(pointer);
  out->device = -2;
  out->type = cudaMemoryTypeUnregistered;
  if (found == card::blocks.end()) return cudaSuccess;
  Kind kind = found->second.kind;
  out->device = found->second.device;
  out->devicePointer = out->hostPointer = const_cast<void*>(pointer);
  out->type = kind == Kind::kDevice    ? cudaMemoryTypeDevice
              : kind == Kind::kManaged ? cudaMemoryTypeManaged
                                       : cudaMemoryTypeHost;
  return cudaSuccess;
}

API size_t rehearsed_card_used(int device) { return card::used[device]; }
API size_t rehearsed_card_peak(int device) { return card::peak[device]; }
API void rehearsed_card_reset_peak(int device) { card::peak[device] = card::used[device]; }

// Another program takes memory of the card.
API void rehearsed_card_take(size_t bytes) {
  std::lock_guard<std::mutex> held(card::mutex);
  card::taken += bytes;
}

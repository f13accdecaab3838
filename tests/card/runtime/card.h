// What the parts of the rehearsed card share: its settings, its health and its books.
//
// The library stands in for CUDA's runtime. Memory is host memory under a budget, streams are queues whose work is done
// as late as CUDA's rules allow, kernels are counted and do nothing: their results come from the Python side, as calls
// in the same queues (see tests/card/replay.py).
#pragma once
#define __CUDA_RUNTIME_API_INTERNAL
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>

// The header gives these names to other versions of the functions.
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

#define API extern "C" __attribute__((visibility("default")))

namespace card {

constexpr int kMostDevices = 8;

// Read once from REHEARSED_CARD_*; sizes in bytes. See tests/card/settings.py, which writes them.
struct Settings {
  size_t memory, context, other;
  int capability, multiprocessors, devices, driver;
  bool traces;              // waits and records are kept for whoever looks for races
  bool is_late;             // streams do their work as late as they may, else at once
  size_t largest_copy;      // larger ones are counted and not done: sizes are rehearsed then, not values
  long take_after;          // cudaMalloc calls after which take_bytes are gone, 0 never
  size_t take_bytes;
  long poison_at;           // kernel launch from which on the context is lost, 0 never
  const char* name;
  FILE* log;
};
const Settings& settings();

struct Counters {
  std::atomic<long> launches{0}, synchronizations{0}, to_device{0}, to_host{0}, allocations{0};
};
extern Counters counters;

enum class Kind { kUnknown, kDevice, kPinned, kManaged, kRegistered };
// What a pointer points into; kUnknown is pageable host memory.
Kind kind_of(const void* pointer);
// Ends the process where a range that starts in one of our blocks goes past its end.
void require_inside(const void* pointer, size_t bytes, const char* what);
// Unmaps what was freed and is no longer in anybody's queue.
void bury();

int current_device();
cudaError_t fail(cudaError_t error);  // remembered for cudaGetLastError
cudaError_t health();                 // cudaSuccess until the context is poisoned
void launched();                      // counts a kernel and poisons the context when its time has come

// A number that grows with each piece of queued work, and whether all work up to it is done.
uint64_t issued_so_far();
bool is_all_done(uint64_t until);

// Something that orders streams, for rehearsed_card_trace.
enum class Order : long { kRecord, kWait, kEventDone, kStreamDone, kAllDone };
void trace(Order order, uintptr_t event, uintptr_t stream);

void log(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace card

#define REQUIRE_HEALTH() \
  if (cudaError_t lost = card::health()) return card::fail(lost)

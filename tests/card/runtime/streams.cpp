// Streams and events: queues whose work is done as late as CUDA's rules allow, so that a missing wait changes numbers.
//
// Work waits in its stream until somebody synchronises with it, or until a stream that must come after it has to go on.
// An event is a place in a stream's order. The two default streams and blocking streams share one queue: CUDA puts them
// in order with each other. With REHEARSED_CARD_LATE=0 all is done at once, which is another order that CUDA allows.
#include <dlfcn.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "card.h"

namespace card {
namespace {

constexpr size_t kMostQueued = 1 << 14;     // a card's queue is finite too: then the older half is done
constexpr size_t kSnapshot = 64 << 10;      // CUDA stages copies of pageable memory up to this size
constexpr int kQueriesUntilDone = 64;       // whoever asks often enough sees the work get on

struct Stream;
struct Item {
  std::function<void()> work;  // empty where another stream is waited for
  Stream* after = nullptr;
  uint64_t until = 0;
  uint64_t number = 0;
};
struct Stream {
  std::deque<Item> items;
  uint64_t issued = 0, done = 0;
  bool is_running = false;
  std::thread::id runner;
};
struct Event {
  Stream* stream = nullptr;
  uint64_t until = 0;
  int queries = 0;
};

std::mutex mutex;
std::condition_variable changed;
std::map<uintptr_t, std::unique_ptr<Stream>> streams;
std::unordered_map<uintptr_t, Event> events;
uintptr_t next_handle = 0x1000;
uint64_t numbered = 0;
std::unordered_map<uintptr_t, bool> is_blocking;

thread_local long waits = 0;

void waited() {
  ++counters.synchronizations;
  ++waits;
}

using Held = std::unique_lock<std::mutex>;

template <typename Handle>
uintptr_t number_of(Handle handle) {
  return reinterpret_cast<uintptr_t>(handle);
}

Stream* queue_of(cudaStream_t stream) {
  uintptr_t handle = number_of(stream);
  if (handle <= 2 || is_blocking[handle]) handle = 0;
  auto& found = streams[handle];
  if (!found) found = std::make_unique<Stream>();
  return found.get();
}

// Work of another thread's may need Python's lock, so a thread that waits for it gives that up.
void wait_for_change(Held& held, Stream* stream) {
  static auto holds = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
  static auto save = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
  static auto restore = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
  void* state = nullptr;
  if (holds && holds()) {
    held.unlock();
    state = save();
    held.lock();
  }
  changed.wait(held, [stream] { return !stream->is_running; });
  if (state) {
    held.unlock();
    restore(state);
    held.lock();
  }
}

// All that was put into the stream up to a place in its order is done when this returns.
void carry_out(Held& held, Stream* stream, uint64_t until) {
  while (stream->done < until) {
    if (stream->is_running) {
      if (stream->runner == std::this_thread::get_id()) return;
      wait_for_change(held, stream);
      continue;
    }
    Item item = std::move(stream->items.front());
    stream->items.pop_front();
    stream->is_running = true;
    stream->runner = std::this_thread::get_id();
    if (item.after) {
      carry_out(held, item.after, item.until);
    } else {
      held.unlock();
      item.work();
      held.lock();
    }
    stream->is_running = false;
    ++stream->done;
    changed.notify_all();
  }
}

void put(Held& held, Stream* stream, Item item) {
  item.number = ++numbered;
  stream->items.push_back(std::move(item));
  ++stream->issued;
  if (!settings().is_late)
    carry_out(held, stream, stream->issued);
  else if (stream->items.size() > kMostQueued)
    carry_out(held, stream, stream->done + kMostQueued / 2);
}

void put(cudaStream_t stream, std::function<void()> work) {
  Held held(mutex);
  Item item;
  item.work = std::move(work);
  put(held, queue_of(stream), std::move(item));
}

void finish(cudaStream_t stream) {
  Held held(mutex);
  Stream* queue = queue_of(stream);
  carry_out(held, queue, queue->issued);
}

void finish_all() {
  Held held(mutex);
  std::deque<Stream*> all;
  for (auto& [handle, stream] : streams) all.push_back(stream.get());
  for (Stream* stream : all) carry_out(held, stream, stream->issued);
}

cudaStream_t create(unsigned flags) {
  Held held(mutex);
  next_handle += 16;
  is_blocking[next_handle] = !(flags & cudaStreamNonBlocking);
  return reinterpret_cast<cudaStream_t>(next_handle);
}

cudaError_t create_event(cudaEvent_t* out) {
  REQUIRE_HEALTH();
  Held held(mutex);
  next_handle += 16;
  events[next_handle] = Event{};
  *out = reinterpret_cast<cudaEvent_t>(next_handle);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  REQUIRE_HEALTH();
  if (!bytes) return cudaSuccess;
  require_inside(to, bytes, "copy");
  require_inside(from, bytes, "copy");
  Kind source = kind_of(from), target = kind_of(to);
  auto is_host = [](Kind k) { return k != Kind::kDevice && k != Kind::kManaged; };
  if (is_host(source) && !is_host(target)) counters.to_device += bytes;
  if (!is_host(source) && is_host(target)) counters.to_host += bytes;
  log("copy %zu kind %d", bytes, static_cast<int>(kind));
  auto move = [=] {
    if (bytes <= settings().largest_copy) memmove(to, from, bytes);
  };
  bool is_staged = source == Kind::kUnknown && bytes <= kSnapshot;
  if (is_staged && target != Kind::kUnknown) {
    auto snapshot = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    put(stream, [=] { memmove(to, snapshot->data(), bytes); });
  } else if (source == Kind::kUnknown || target == Kind::kUnknown) {
    put(stream, move);
    finish(stream);
  } else {
    put(stream, move);
  }
  return cudaSuccess;
}

}  // namespace

uint64_t issued_so_far() {
  Held held(mutex);
  return numbered;
}

bool is_all_done(uint64_t until) {
  Held held(mutex);
  for (auto& [handle, stream] : streams)
    if (stream->is_running || (!stream->items.empty() && stream->items.front().number <= until)) return false;
  return true;
}

}  // namespace card

using namespace card;

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int) {
  REQUIRE_HEALTH();
  *out = create(flags);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  finish(stream);
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  REQUIRE_HEALTH();
  waited();
  finish(stream);
  trace(Order::kStreamDone, 0, number_of(stream));
  return fail(health());
}

API cudaError_t cudaDeviceSynchronize() {
  REQUIRE_HEALTH();
  waited();
  finish_all();
  trace(Order::kAllDone, 0, 0);
  return fail(health());
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  REQUIRE_HEALTH();
  Held held(mutex);
  Stream* queue = queue_of(stream);
  static std::unordered_map<Stream*, int> queries;
  if (queue->done < queue->issued && ++queries[queue] % kQueriesUntilDone) return cudaErrorNotReady;
  carry_out(held, queue, queue->issued);
  trace(Order::kStreamDone, 0, number_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  REQUIRE_HEALTH();
  Held held(mutex);
  Event found = events[number_of(event)];
  Stream* queue = queue_of(stream);
  trace(Order::kWait, number_of(event), number_of(stream));
  if (!found.stream || found.stream == queue || found.stream->done >= found.until) return cudaSuccess;
  Item item;
  item.after = found.stream;
  item.until = found.until;
  put(held, queue, std::move(item));
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) { return create_event(out); }
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return create_event(out); }

API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Held held(mutex);
  events.erase(number_of(event));
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  REQUIRE_HEALTH();
  Held held(mutex);
  Stream* queue = queue_of(stream);
  events[number_of(event)] = Event{queue, queue->issued, 0};
  trace(Order::kRecord, number_of(event), number_of(stream));
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) { return cudaEventRecord(event, stream); }

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  REQUIRE_HEALTH();
  Held held(mutex);
  Event& found = events[number_of(event)];
  if (found.stream && found.stream->done < found.until) {
    if (++found.queries < kQueriesUntilDone) return cudaErrorNotReady;
    carry_out(held, found.stream, found.until);
  }
  trace(Order::kEventDone, number_of(event), 0);
  return cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  REQUIRE_HEALTH();
  waited();
  Held held(mutex);
  Event found = events[number_of(event)];
  if (found.stream) carry_out(held, found.stream, found.until);
  trace(Order::kEventDone, number_of(event), 0);
  return fail(health());
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  REQUIRE_HEALTH();
  *milliseconds = 1.0f;  // nothing here takes the time that it would take on a card
  return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind, stream);
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (cudaError_t wrong = copy(to, from, bytes, kind, nullptr)) return wrong;
  return cudaStreamSynchronize(nullptr);
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                                  cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row)
    if (cudaError_t wrong = copy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch,
                                 width, kind, stream))
      return wrong;
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  REQUIRE_HEALTH();
  require_inside(to, bytes, "memset");
  put(stream, [=] {
    if (bytes <= settings().largest_copy) memset(to, value, bytes);
  });
  return cudaSuccess;
}

API cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  REQUIRE_HEALTH();
  put(stream, [=] { function(data); });
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  REQUIRE_HEALTH();
  put(stream, [=] { function(stream, cudaSuccess, data); });
  return cudaSuccess;
}

// The Python side's work: `function(token)` takes its place in the stream.
API void rehearsed_card_put(uintptr_t stream, void (*function)(long), long token) {
  put(reinterpret_cast<cudaStream_t>(stream), [=] { function(token); });
}

API void rehearsed_card_finish(uintptr_t stream) { finish(reinterpret_cast<cudaStream_t>(stream)); }

API long rehearsed_card_waits() { return waits; }

// How many pieces of work wait in a stream; those that wait for other streams count.
API long rehearsed_card_waiting(uintptr_t stream) {
  Held held(mutex);
  Stream* queue = queue_of(reinterpret_cast<cudaStream_t>(stream));
  return static_cast<long>(queue->issued - queue->done);
}

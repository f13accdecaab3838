// The settings, the counters, and what C says of them to ctypes.
#include <cstdarg>
#include <cstdlib>
#include <mutex>

#include "card.h"

namespace card {

static const char* text(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}

static long long number(const char* name, long long otherwise) {
  const char* value = getenv(name);
  return value && *value ? strtoll(value, nullptr, 10) : otherwise;
}

const Settings& settings() {
  static const Settings read = [] {
    Settings s{};
    s.memory = number("REHEARSED_CARD_MEMORY", 12ll << 30);
    s.context = number("REHEARSED_CARD_CONTEXT", 300ll << 20);
    s.other = number("REHEARSED_CARD_OTHER", 0);
    s.capability = number("REHEARSED_CARD_SM", 86);
    s.multiprocessors = number("REHEARSED_CARD_MULTIPROCESSORS", 28);
    s.devices = number("REHEARSED_CARD_DEVICES", 1);
    s.driver = number("REHEARSED_CARD_DRIVER", 13000);
    s.traces = number("REHEARSED_CARD_RACES", 0);
    s.is_late = number("REHEARSED_CARD_LATE", 1);
    s.largest_copy = number("REHEARSED_CARD_LARGEST_COPY", 1ll << 62);
    s.take_after = number("REHEARSED_CARD_TAKE_AFTER", 0);
    s.take_bytes = number("REHEARSED_CARD_TAKE_BYTES", 0);
    s.poison_at = number("REHEARSED_CARD_POISON_AT", 0);
    s.name = text("REHEARSED_CARD_NAME", "NVIDIA GeForce RTX 3060");
    const char* path = text("REHEARSED_CARD_LOG", nullptr);
    s.log = path ? fopen(path, "a") : nullptr;
    return s;
  }();
  return read;
}

Counters counters;

void log(const char* format, ...) {
  FILE* file = settings().log;
  if (!file) return;
  static std::mutex one;
  std::lock_guard<std::mutex> held(one);
  va_list values;
  va_start(values, format);
  vfprintf(file, format, values);
  va_end(values);
  fputc('\n', file);
  fflush(file);
}

static std::atomic<bool> poisoned{false};
static thread_local cudaError_t last = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

cudaError_t health() { return poisoned ? cudaErrorIllegalAddress : cudaSuccess; }

void launched() {
  long count = ++counters.launches;
  if (settings().poison_at && count >= settings().poison_at && !poisoned.exchange(true)) log("poisoned at launch %ld", count);
}

}  // namespace card

API cudaError_t cudaGetLastError() {
  cudaError_t error = card::health() ? card::health() : card::last;
  card::last = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError() { return card::health() ? card::health() : card::last; }

API void rehearsed_card_poison() { card::poisoned = true; }

// 0 launches, 1 synchronisations, 2 bytes to the device, 3 bytes to the host, 4 allocations.
API long rehearsed_card_count(int which) {
  std::atomic<long>* all[] = {&card::counters.launches, &card::counters.synchronizations, &card::counters.to_device,
                              &card::counters.to_host, &card::counters.allocations};
  return which >= 0 && which < 5 ? all[which]->load() : -1;
}

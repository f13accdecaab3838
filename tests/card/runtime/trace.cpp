// What orders streams with each other, in the order it was asked for: races are looked for on the Python side.
#include <cstring>
#include <mutex>
#include <vector>

#include "card.h"

namespace card {
namespace {

struct Entry {
  long order, event, stream;
};
std::mutex mutex;
std::vector<Entry> entries;

}  // namespace

void trace(Order order, uintptr_t event, uintptr_t stream) {
  if (!settings().traces) return;
  std::lock_guard<std::mutex> held(mutex);
  entries.push_back({static_cast<long>(order), static_cast<long>(event), static_cast<long>(stream)});
}

}  // namespace card

// Takes up to `most` entries of three numbers each: order, event, stream.
API long rehearsed_card_trace(long* out, long most) {
  std::lock_guard<std::mutex> held(card::mutex);
  long count = static_cast<long>(card::entries.size()) < most ? static_cast<long>(card::entries.size()) : most;
  memcpy(out, card::entries.data(), count * sizeof(card::Entry));
  card::entries.erase(card::entries.begin(), card::entries.begin() + count);
  return count;
}

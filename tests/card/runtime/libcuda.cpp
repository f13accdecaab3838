// The driver's library, as far as somebody looks whether it is there: `libcuda.so.1` with a version and a count.
#include <cstdio>
#include <cstdlib>

#define API extern "C" __attribute__((visibility("default")))

static int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}

API int cuInit(unsigned) { return 0; }
API int cuDriverGetVersion(int* version) {
  *version = number("REHEARSED_CARD_DRIVER", 13000);
  return 0;
}
API int cuDeviceGetCount(int* count) {
  *count = number("REHEARSED_CARD_DEVICES", 1);
  return 0;
}
API int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
API int cuGetErrorString(int, const char** text) {
  *text = "the driver is rehearsed";
  return 0;
}
API int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(8);
  return 0;
}
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

API int cuDeviceGetName(char* name, int length, int) {
  const char* value = getenv("REHEARSED_CARD_NAME");
  snprintf(name, length, "%s", value && *value ? value : "NVIDIA GeForce RTX 3060");
  return 0;
}
API int cuDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMajor = 75, kMinor = 76;
  int capability = number("REHEARSED_CARD_SM", 86);
  *value = attribute == kMajor ? capability / 10 : attribute == kMinor ? capability % 10 : 0;
  return 0;
}

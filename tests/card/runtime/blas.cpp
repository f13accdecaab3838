// cuBLAS: handles and descriptors are memory, products are launches that do nothing.
//
// Without its headers: what is declared here without arguments may be called with any, and none is looked at.
#include <cstdlib>
#include <cstring>

#include "card.h"

namespace {

constexpr int kSuccess = 0, kExecutionFailed = 13;
constexpr size_t kRoom = 256;  // for a handle or a descriptor

int fine() { return card::health() ? kExecutionFailed : kSuccess; }

int product() {
  card::launched();
  return fine();
}

int create(void** out) {
  *out = calloc(1, kRoom);
  return fine();
}

}  // namespace

#define PRODUCT(name) \
  API int name() { return product(); }
#define FINE(name) \
  API int name() { return fine(); }
#define CREATE(name) \
  API int name(void** out) { return create(out); }
#define DESTROY(name)     \
  API int name(void* it) { \
    free(it);             \
    return kSuccess;      \
  }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

CREATE(cublasCreate_v2)
CREATE(cublasLtCreate)
CREATE(cublasLtMatmulDescCreate)
CREATE(cublasLtMatmulPreferenceCreate)
CREATE(cublasLtMatrixLayoutCreate)
DESTROY(cublasDestroy_v2)
DESTROY(cublasLtMatmulDescDestroy)
DESTROY(cublasLtMatmulPreferenceDestroy)
DESTROY(cublasLtMatrixLayoutDestroy)

FINE(cublasSetStream_v2)
FINE(cublasSetWorkspace_v2)
FINE(cublasSetMathMode)
FINE(cublasSetPointerMode_v2)
FINE(cublasSetSmCountTarget)
FINE(cublasLtMatmulDescSetAttribute)
FINE(cublasLtMatmulPreferenceSetAttribute)
FINE(cublasLtMatrixLayoutSetAttribute)

API int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return fine();
}

API int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return fine();
}

// One algorithm is found, which needs no workspace.
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  memset(results, 0, 64);
  *found = 1;
  return fine();
}

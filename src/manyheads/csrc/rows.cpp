// Linear layers on a few rows, as a decoding step has them.
//
// Without it: a token of a language model waits for its weights about twice as long.

#include <omp.h>

#include "rows.h"

extern "C" {

// x (rows, inputs), weight (outputs, inputs), bias (outputs) or null, out (rows, outputs).
void rows_linear(const float *x, const float *weight, const float *bias, float *out, int64_t rows,
                 int64_t inputs, int64_t outputs, int64_t threads) {
  const manyheads::FewRows t = {x, weight, bias, out, rows, inputs, outputs, inputs};
  if (threads < 2) return manyheads::row_slice(t, 0, outputs);
#pragma omp parallel num_threads((int)threads)
  manyheads::row_share(t, omp_get_thread_num(), omp_get_num_threads());
}

}  // extern "C"

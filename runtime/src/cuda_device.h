// The GPUs of this machine.
#ifndef QGRAPH_SRC_CUDA_DEVICE_H_
#define QGRAPH_SRC_CUDA_DEVICE_H_

#include <string_view>
#include <vector>

#include "device.h"

namespace qg::cuda {

// In the driver's order, at least one; they live as long as the process. Throws Error(QG_UNSUPPORTED) that
// says why there is none.
const std::vector<const Device*>& gpus();

// Whether a GPU of compute capability major.minor runs code that asks for a feature: sm_XY of its own
// generation up to its own number, sm_XYa of exactly its own, ptx_XY up to its own.
bool has_feature(int major, int minor, std::string_view feature);

}  // namespace qg::cuda

#endif  // QGRAPH_SRC_CUDA_DEVICE_H_

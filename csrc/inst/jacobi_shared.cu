#include "jacobi.cuh"

namespace osf {
template void launch_jacobi<true>(const JacobiParams&, int, int, cudaStream_t);
}  // namespace osf

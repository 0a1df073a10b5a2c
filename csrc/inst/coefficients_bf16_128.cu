#include "coefficients.cuh"

namespace osf {
template void launch_coefficients<Math::bf16, 128>(const Params<CoefficientsProblem>&, int,
                                                   cudaStream_t);
}  // namespace osf

#include "coefficients.cuh"

namespace osf {
template void launch_coefficients<Math::f16, 64>(const Params<CoefficientsProblem>&, int,
                                                 cudaStream_t);
}  // namespace osf

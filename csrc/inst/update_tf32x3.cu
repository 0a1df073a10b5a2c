#include "update.cuh"

namespace osf {
template void launch_update<Math::tf32x3>(const Params<UpdateProblem>&, int, cudaStream_t);
}  // namespace osf

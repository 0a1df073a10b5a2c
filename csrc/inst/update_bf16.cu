#include "update.cuh"

namespace osf {
template void launch_update<Math::bf16>(const Params<UpdateProblem>&, int, cudaStream_t);
}  // namespace osf

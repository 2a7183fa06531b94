// Every kernel of gather-scale in bf16, or in every type, for reports and tests of what nvcc makes.
#include "gather_scale_kernels.cuh"

namespace shorn {
namespace gpu {

#define FORWARD(T) template void forward<T>(const Forward<T>&, cudaStream_t);
#define BACKWARD(T, G) \
  template void backward<T, G>(const Backward<T, G>&, Wide<T>*, Wide<T>*, cudaStream_t);

FORWARD(BFloat16)
BACKWARD(BFloat16, BFloat16)
BACKWARD(BFloat16, float)
#ifdef EVERY_TYPE
FORWARD(double)
FORWARD(float)
FORWARD(Half)
BACKWARD(double, double)
BACKWARD(float, float)
BACKWARD(Half, Half)
BACKWARD(Half, float)
#endif

}  // namespace gpu
}  // namespace shorn

#define GRAFT_LEVEL 3
#define GRAFT_NAMESPACE avx512_bf16
#define GRAFT_NAME "AVX-512+BF16"
#if GRAFT_LEVEL == 0 || defined(__x86_64__)
#include "kernels.inc"
#endif

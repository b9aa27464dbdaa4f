#define GRAFT_LEVEL 2
#define GRAFT_NAMESPACE avx512
#define GRAFT_NAME "AVX-512"
#if GRAFT_LEVEL == 0 || defined(__x86_64__)
#include "kernels.inc"
#endif

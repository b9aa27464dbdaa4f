#define GRAFT_LEVEL 1
#define GRAFT_NAMESPACE avx2
#define GRAFT_NAME "AVX2"
#if GRAFT_LEVEL == 0 || defined(__x86_64__)
#include "kernels.inc"
#endif

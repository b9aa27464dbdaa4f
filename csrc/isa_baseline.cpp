#define GRAFT_LEVEL 0
#define GRAFT_NAMESPACE baseline
#define GRAFT_NAME "baseline"
#if GRAFT_LEVEL == 0 || defined(__x86_64__)
#include "kernels.inc"
#endif

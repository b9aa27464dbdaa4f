#define GRAFT_LEVEL 0
#define GRAFT_NAMESPACE baseline
#if defined(__aarch64__)
#define GRAFT_NAME "NEON" /* part of every 64-bit Arm processor */
#else
#define GRAFT_NAME "baseline"
#endif
#if GRAFT_LEVEL == 0 || defined(__x86_64__)
#include "kernels.inc"
#endif

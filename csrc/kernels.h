/* What the entry points (graft.cpp) know of the kernels, which are compiled once for each
   instruction set from kernels.inc. */
#ifndef GRAFT_KERNELS_H
#define GRAFT_KERNELS_H

#include "graft.h"

struct Kernels {
    const char *name;
    int (*linear)(const graft_weight &, const graft_low_rank *, int64_t, const void *, int64_t,
                  void *, void *, int64_t);
    int (*grad_input)(const graft_weight &, const graft_low_rank *, int64_t, const void *, int64_t,
                      void *, void *, int64_t);
    int (*token_product)(int64_t, const void *, int64_t, const void *, int64_t, int64_t, float *,
                         int64_t);
    int (*grad_statistics)(const graft_weight &, int64_t, const void *, const void *, int64_t, int64_t, float *,
                           float *, int64_t);
    int (*dequantize)(const graft_weight &, int64_t, void *, int64_t);
    int (*codebook_quantize)(int64_t, const void *, int64_t, int64_t, const float *,
                             const uint8_t *, uint8_t *, float *, int64_t);
    int (*absmax_quantize)(const float *, int64_t, float, const uint8_t *, uint8_t *, float *, int64_t);
    int (*pool)(int64_t, const void *, int64_t, int64_t, int64_t, void *, int64_t);
    int (*move_offsets)(int64_t, const void *, const float *, const float *, int64_t, int64_t, int64_t,
                        double, float *, int64_t);
    int (*move_scaled)(int64_t, const void *, const void *, const float *, int64_t, void *, int64_t);
    int (*latent_codes)(const graft_latent &, uint8_t *, uint8_t *, int64_t);
    int (*latent_grads)(const graft_latent &, const float *, float *, float *, float *, int64_t);
    int (*int_group_quantize)(int64_t, const void *, int64_t, int64_t, int64_t, int64_t, int64_t, float,
                              uint8_t *, uint8_t *, void *, void *, int64_t);
    int (*next_logits)(const graft_decoder &, const graft_next *, int64_t, float *, int64_t);
    int (*attention)(int64_t, const graft_attention_call &, int64_t);
    int (*attention_backward)(int64_t, const graft_attention_call &, int64_t);
    int (*rms_norm)(int64_t, const void *, const void *, int64_t, int64_t, float, void *, float *, int64_t);
    int (*rms_norm_backward)(int64_t, const void *, const void *, const void *, const float *, int64_t, int64_t,
                             void *, int64_t);
    int (*gate)(int64_t, const void *, const void *, int64_t, void *, int64_t);
    int (*gate_backward)(int64_t, const void *, const void *, const void *, int64_t, void *, void *, int64_t);
    int (*rounded_inputs)(int64_t, const void *, int64_t, int64_t, int64_t, void *, int64_t);
    int (*rounded_linear)(const graft_weight &, int64_t, const void *, int64_t, int64_t, void *, int64_t);
};

namespace baseline { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

/* Calls task(context, index) for every index in [0, count), on up to `threads` threads; returns
   -1 when a task returned other than 0. */
int parallel_for(int64_t count, int64_t threads, int (*task)(void *context, int64_t index),
                 void *context);

/* This thread's reusable memory in one of a few slots, 64-byte aligned; null when there is none. */
enum Slot { SLOT_SHARED, SLOT_SHARED_HIDDEN, SLOT_SHARED_SIDE, SLOT_PANEL, SLOT_SUMS, SLOT_ROW, SLOTS };
void *workspace(Slot slot, int64_t bytes);

template <class Task> int parallel(int64_t count, int64_t threads, const Task &task) {
    return parallel_for(
        count, threads,
        [](void *context, int64_t index) -> int { return (*static_cast<const Task *>(context))(index); },
        const_cast<Task *>(&task));
}

/* Runs stages one after another on up to `threads` threads in one parallel region. Stage s has
   counts[s] tasks, handed out in order. A worker, 0 to `threads` - 1, first calls
   prepare(context, s, task), and run(context, worker, s, task) when all tasks of the stages before
   are done. */
int run_stages(int64_t stages, const int64_t *counts, int64_t threads,
               void (*prepare)(const void *context, int64_t stage, int64_t task),
               int (*run)(const void *context, int64_t worker, int64_t stage, int64_t task), const void *context);

template <class Work> int parallel_stages(int64_t stages, const int64_t *counts, int64_t threads, const Work &work) {
    return run_stages(
        stages, counts, threads,
        [](const void *context, int64_t stage, int64_t task) {
            static_cast<const Work *>(context)->prepare(stage, task);
        },
        [](const void *context, int64_t worker, int64_t stage, int64_t task) -> int {
            return static_cast<const Work *>(context)->run(worker, stage, task);
        },
        &work);
}

#endif

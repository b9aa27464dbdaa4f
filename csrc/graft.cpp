/* Entry points: the instruction set, the threads, the workspaces. */

#include <stdlib.h>

#include <atomic>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

/* Threads -------------------------------------------------------------------------------------- */

namespace {

std::atomic<graft_parallel> borrowed{nullptr};

struct Job {
    int64_t count;
    int (*task)(void *, int64_t);
    void *context;
    std::atomic<int64_t> next{0};
    std::atomic<int> status{0};
};

void work(void *data) {
    Job &job = *static_cast<Job *>(data);
    for (;;) {
        int64_t index = job.next.fetch_add(1, std::memory_order_relaxed);
        if (index >= job.count) return;
        int status = job.task(job.context, index);
        if (status) job.status.store(status, std::memory_order_relaxed);
    }
}

}  // namespace

int parallel_for(int64_t count, int64_t threads, int (*task)(void *, int64_t), void *context) {
    Job job{count, task, context};
    if (threads > count) threads = count;
    graft_parallel parallel = borrowed.load(std::memory_order_relaxed);
    if (threads <= 1) {
        work(&job);
    } else if (parallel) {
        parallel(work, &job, unsigned(threads), 0);
    } else {
        std::vector<std::thread> helpers;
        for (int64_t i = 1; i < threads; i++) helpers.emplace_back(work, &job);
        work(&job);
        for (std::thread &helper : helpers) helper.join();
    }
    return job.status.load();
}

namespace {

/* Gives way to what else runs on the core: at first for a moment, then for a turn of the scheduler. */
void wait_a_little(int tries) {
    if (tries >= 4096) return std::this_thread::yield();
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* waits for a moment; "yield" does nothing on most processors */
#endif
}

}  // namespace

int run_stages(int64_t stages, const int64_t *counts, int64_t threads,
               void (*prepare)(const void *, int64_t, int64_t),
               int (*run)(const void *, int64_t, int64_t, int64_t), const void *context) {
    alignas(64) std::atomic<int64_t> next{0}; /* of all stages' tasks, in order */
    alignas(64) std::atomic<int64_t> done{0};
    std::atomic<int> status{0};
    /* A task is taken after all earlier ones, and waits for those of earlier stages alone: however
       few threads there come to be, none waits for a task that no thread has. */
    parallel(threads, threads, [&](int64_t worker) {
        int64_t stage = 0, first = 0;
        for (;;) {
            int64_t index = next.fetch_add(1, std::memory_order_relaxed);
            while (stage < stages && index >= first + counts[stage]) first += counts[stage++];
            if (stage == stages) return 0;
            prepare(context, stage, index - first);
            for (int tries = 0; done.load(std::memory_order_acquire) < first; tries++) wait_a_little(tries);
            if (!status.load(std::memory_order_relaxed) && run(context, worker, stage, index - first)) status = -1;
            done.fetch_add(1, std::memory_order_release);
        }
    });
    return status.load();
}

void graft_use_threads_of(graft_parallel parallel) { borrowed.store(parallel); }

/* Workspaces ----------------------------------------------------------------------------------- */

namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;

struct Workspaces {
    void *data[SLOTS] = {};
    int64_t bytes[SLOTS] = {};
    ~Workspaces() {
        for (void *slot : data) free(slot);
    }
};

thread_local Workspaces workspaces;

}  // namespace

void *workspace(Slot slot, int64_t bytes) {
    Workspaces &own = workspaces;
    if (own.bytes[slot] < bytes) {
        free(own.data[slot]);
        own.data[slot] = nullptr, own.bytes[slot] = 0;
        int64_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
        int64_t whole = (bytes + alignment - 1) / alignment * alignment;
        void *data = aligned_alloc(size_t(alignment), size_t(whole));
        if (!data) return nullptr;
#ifdef __linux__
        if (alignment == HUGE_PAGE) madvise(data, size_t(whole), MADV_HUGEPAGE);
#endif
        own.data[slot] = data, own.bytes[slot] = whole;
    }
    return own.data[slot];
}

/* Instruction sets ----------------------------------------------------------------------------- */

namespace {

int best_level() {
#ifdef __x86_64__
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        return 3;
    if (wide) return 2;
    if (f16c) return 1;
#endif
    return 0;
}

std::atomic<int> level{best_level()};

const Kernels &kernels() {
#ifdef __x86_64__
    switch (level.load(std::memory_order_relaxed)) {
        case 3: return avx512_bf16::kernels;
        case 2: return avx512::kernels;
        case 1: return avx2::kernels;
    }
#endif
    return baseline::kernels;
}

}  // namespace

const char *graft_instructions(void) { return kernels().name; }

int graft_limit(int limit) {
    int best = best_level();
    level.store(limit < best ? limit : best);
    return level.load();
}

/* Operations ----------------------------------------------------------------------------------- */

int graft_linear(const graft_weight *weight, const graft_low_rank *low_rank, int64_t dtype, const void *x,
                 int64_t tokens, void *y, void *hidden, int64_t threads) {
    return kernels().linear(*weight, low_rank, dtype, x, tokens, y, hidden, threads);
}

int graft_rounded_linear(const graft_weight *weight, int64_t dtype, const void *x, int64_t tokens, int64_t by_block,
                         void *y, int64_t threads) {
    return kernels().rounded_linear(*weight, dtype, x, tokens, by_block, y, threads);
}

int graft_rounded_inputs(int64_t dtype, const void *x, int64_t tokens, int64_t cols, int64_t by_block, void *out,
                         int64_t threads) {
    return kernels().rounded_inputs(dtype, x, tokens, cols, by_block, out, threads);
}

int graft_grad_input(const graft_weight *weight, const graft_low_rank *low_rank, int64_t dtype, const void *dy,
                     int64_t tokens, void *dx, void *hidden, int64_t threads) {
    return kernels().grad_input(*weight, low_rank, dtype, dy, tokens, dx, hidden, threads);
}

int graft_token_product(int64_t dtype, const void *a, int64_t a_cols, const void *b, int64_t b_cols, int64_t tokens,
                        float *out, int64_t threads) {
    return kernels().token_product(dtype, a, a_cols, b, b_cols, tokens, out, threads);
}

int graft_grad_statistics(const graft_weight *weight, int64_t dtype, const void *dy, const void *x, int64_t tokens,
                          int64_t rounds, float *scales, float *offsets, int64_t threads) {
    return kernels().grad_statistics(*weight, dtype, dy, x, tokens, rounds, scales, offsets, threads);
}

int graft_pool(int64_t dtype, const void *x, int64_t tokens, int64_t cols, int64_t group_size, void *out,
               int64_t threads) {
    return kernels().pool(dtype, x, tokens, cols, group_size, out, threads);
}

int graft_move_offsets(int64_t dtype, const void *offsets, const float *up, const float *down, int64_t rows,
                       int64_t groups, int64_t rank, double scaling, float *out, int64_t threads) {
    return kernels().move_offsets(dtype, offsets, up, down, rows, groups, rank, scaling, out, threads);
}

int graft_latent_codes(const graft_latent *weight, uint8_t *codes, uint8_t *codes_high, int64_t threads) {
    return kernels().latent_codes(*weight, codes, codes_high, threads);
}

int graft_latent_grads(const graft_latent *weight, const float *product, float *grad, float *grad_u, float *grad_v,
                       int64_t threads) {
    return kernels().latent_grads(*weight, product, grad, grad_u, grad_v, threads);
}

int graft_move_scaled(int64_t dtype, const void *start, const void *scales, const float *moves, int64_t count,
                      void *out, int64_t threads) {
    return kernels().move_scaled(dtype, start, scales, moves, count, out, threads);
}

int graft_dequantize(const graft_weight *weight, int64_t dtype, void *out, int64_t threads) {
    return kernels().dequantize(*weight, dtype, out, threads);
}

int graft_codebook_quantize(int64_t dtype, const void *weight, int64_t count, int64_t block_size,
                            const float *bounds, const uint8_t *code_of_rank, uint8_t *codes, float *absmax,
                            int64_t threads) {
    return kernels().codebook_quantize(dtype, weight, count, block_size, bounds, code_of_rank, codes, absmax,
                                       threads);
}

int graft_absmax_quantize(const float *absmax, int64_t count, float offset, const uint8_t *table, uint8_t *codes,
                          float *scales, int64_t threads) {
    return kernels().absmax_quantize(absmax, count, offset, table, codes, scales, threads);
}

int graft_int_group_quantize(int64_t weight_dtype, const void *weight, int64_t rows, int64_t cols, int64_t bits,
                             int64_t group_size, int64_t dtype, float smallest_scale, uint8_t *codes,
                             uint8_t *codes_high, void *scales, void *offsets, int64_t threads) {
    return kernels().int_group_quantize(weight_dtype, weight, rows, cols, bits, group_size, dtype, smallest_scale,
                                        codes, codes_high, scales, offsets, threads);
}

int graft_next_logits(const graft_decoder *decoder, const graft_next *next, int64_t tokens, float *logits,
                      int64_t threads) {
    return kernels().next_logits(*decoder, next, tokens, logits, threads);
}

int graft_attention(int64_t dtype, const graft_attention_call *call, int64_t threads) {
    return kernels().attention(dtype, *call, threads);
}

int graft_attention_backward(int64_t dtype, const graft_attention_call *call, int64_t threads) {
    return kernels().attention_backward(dtype, *call, threads);
}

int graft_rms_norm(int64_t dtype, const void *x, const void *weight, int64_t tokens, int64_t cols, float epsilon,
                   void *y, float *scale, int64_t threads) {
    return kernels().rms_norm(dtype, x, weight, tokens, cols, epsilon, y, scale, threads);
}

int graft_rms_norm_backward(int64_t dtype, const void *grad, const void *x, const void *weight, const float *scale,
                            int64_t tokens, int64_t cols, void *dx, int64_t threads) {
    return kernels().rms_norm_backward(dtype, grad, x, weight, scale, tokens, cols, dx, threads);
}

int graft_gate(int64_t dtype, const void *gate, const void *up, int64_t count, void *out, int64_t threads) {
    return kernels().gate(dtype, gate, up, count, out, threads);
}

int graft_gate_backward(int64_t dtype, const void *grad, const void *gate, const void *up, int64_t count,
                        void *d_gate, void *d_up, int64_t threads) {
    return kernels().gate_backward(dtype, grad, gate, up, count, d_gate, d_up, threads);
}

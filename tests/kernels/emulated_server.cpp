/* Runs graft's kernels for a caller on another processor (emulated_library.py), over stdin and stdout.

   The caller sends calls with its own addresses. Its memory is not copied as a whole: a page that a
   kernel touches is fetched at that moment, and what a kernel changed goes back after the call. A
   kernel that reads what is not the caller's thus fails. The caller's addresses are moved to where
   the emulator has nothing of its own. */

#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <utility>
#include <vector>

#include "../../csrc/graft.h"

namespace {

constexpr uint64_t MOVED = 0x600000000000; /* where the caller's memory is, exclusive or with its address */
constexpr uint64_t PAGE = 4096;

void send(const void *data, size_t bytes) {
    for (const char *from = static_cast<const char *>(data); bytes;) {
        ssize_t done = write(1, from, bytes);
        if (done < 0) _exit(3);
        from += done, bytes -= size_t(done);
    }
}

void receive(void *data, size_t bytes) {
    for (char *to = static_cast<char *>(data); bytes;) {
        ssize_t done = read(0, to, bytes);
        if (done <= 0) _exit(done < 0 ? 3 : 0); /* the caller has ended */
        to += done, bytes -= size_t(done);
    }
}

/* Pages -------------------------------------------------------------------------------------------- */

struct Message {
    char kind[8]; /* "page": send that at `address`; "changed": it follows; "done": `value` is the status */
    uint64_t address, value;
};

std::map<uint64_t, std::vector<char>> pages; /* the caller's pages that are here, and how they were */
std::atomic_flag busy;

void fetch(int, siginfo_t *info, void *) {
    while (busy.test_and_set(std::memory_order_acquire)) {}
    uint64_t first = uint64_t(info->si_addr) / PAGE * PAGE;
    if (!pages.count(first)) { /* else another thread was quicker */
        Message wanted = {"page", first ^ MOVED, PAGE};
        send(&wanted, sizeof wanted);
        uint64_t bytes;
        receive(&bytes, sizeof bytes);
        if (bytes != PAGE) _exit(4);
        /* Moved to its place when it is whole, so that no other thread sees a part of it. */
        void *page = mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        receive(page, PAGE);
        pages[first].assign(static_cast<char *>(page), static_cast<char *>(page) + PAGE);
        void *place = reinterpret_cast<void *>(first);
        if (mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place) _exit(5);
    }
    busy.clear(std::memory_order_release);
}

/* Sends changed pages back and forgets all of them: the caller may write to them before the next call. */
void give_back() {
    for (auto &[address, was] : pages) {
        void *page = reinterpret_cast<void *>(address);
        if (memcmp(page, was.data(), PAGE)) {
            Message changed = {"changed", address ^ MOVED, PAGE};
            send(&changed, sizeof changed);
            send(page, PAGE);
        }
        munmap(page, PAGE);
    }
    pages.clear();
}

/* Calls -------------------------------------------------------------------------------------------- */

template <class T> T *here(T *theirs) { return theirs ? reinterpret_cast<T *>(uint64_t(theirs) ^ MOVED) : nullptr; }
template <class... T> void move(T *&...pointers) { ((pointers = here(pointers)), ...); }

void move_all(graft_weight &w) {
    move(w.data, w.codes_high, w.scales, w.offsets, w.codebook, w.nested, w.nested_code, w.nested_scale, w.nested_offset);
}
void move_all(graft_low_rank &l) { move(l.down, l.up); }
void move_all(graft_latent &w) { move(w.weight, w.scales, w.offsets, w.down, w.up); }
void move_all(graft_projection &p) { move_all(p.weight), move(p.bias); }
void move_all(graft_decoder_layer &l) {
    move(l.attention_norm, l.mlp_norm, l.keys, l.values);
    for (graft_projection *p : {&l.query, &l.key, &l.value, &l.out, &l.gate, &l.up, &l.down}) move_all(*p);
}
void move_all(graft_decoder &d) {
    static std::vector<graft_decoder_layer> layers;
    const graft_decoder_layer *theirs = here(d.layer);
    layers.assign(theirs, theirs + d.layers);
    for (graft_decoder_layer &layer : layers) move_all(layer);
    d.layer = layers.data();
    move_all(d.embedding), move_all(d.head);
    move(d.norm, d.cosines, d.sines);
}
void move_all(graft_attention_call &a) {
    move(a.starts, a.lse);
    for (graft_rows *rows : {&a.q, &a.k, &a.v, &a.out, &a.grad_out, &a.grad_q, &a.grad_k, &a.grad_v}) move(rows->data);
}

/* An argument from its 8 bytes: a number, an array, or a structure, which is copied. */
template <class T> struct Argument {
    T value;
    explicit Argument(uint64_t word) { memcpy(&value, &word, sizeof value); }
    operator T() { return value; }
};
template <class T> struct Array {
    T *value;
    explicit Array(uint64_t word) : value(here(reinterpret_cast<T *>(word))) {}
    operator T *() { return value; }
};
template <class T> struct Structure {
    bool there;
    T value;
    explicit Structure(uint64_t word) : there(word), value() {
        if (there) value = *here(reinterpret_cast<const T *>(word)), move_all(value);
    }
    operator const T *() { return there ? &value : nullptr; }
};
template <> struct Argument<const graft_weight *> : Structure<graft_weight> { using Structure::Structure; };
template <> struct Argument<const graft_low_rank *> : Structure<graft_low_rank> { using Structure::Structure; };
template <> struct Argument<const graft_latent *> : Structure<graft_latent> { using Structure::Structure; };
template <> struct Argument<const graft_decoder *> : Structure<graft_decoder> { using Structure::Structure; };
template <> struct Argument<const graft_attention_call *> : Structure<graft_attention_call> { using Structure::Structure; };
template <class T> struct Argument<T *> : Array<T> { using Array<T>::Array; };

template <class... T, size_t... I>
int call(int (*kernel)(T...), const uint64_t *words, std::index_sequence<I...>) {
    return kernel(Argument<T>(words[I])...);
}
template <class... T> int call(int (*kernel)(T...), const uint64_t *words) {
    return call(kernel, words, std::index_sequence_for<T...>());
}

int call(const char *name, const uint64_t *words) {
#define KERNEL(which) if (!strcmp(name, #which)) return call(graft_##which, words);
    KERNEL(linear) KERNEL(grad_input) KERNEL(token_product) KERNEL(grad_statistics) KERNEL(pool)
    KERNEL(move_offsets) KERNEL(move_scaled) KERNEL(latent_codes) KERNEL(latent_grads) KERNEL(dequantize)
    KERNEL(codebook_quantize) KERNEL(absmax_quantize) KERNEL(int_group_quantize) KERNEL(attention)
    KERNEL(attention_backward) KERNEL(rms_norm) KERNEL(rms_norm_backward) KERNEL(gate) KERNEL(gate_backward)
    KERNEL(next_logits)
#undef KERNEL
    _exit(6);
}

struct Call {
    char name[32];
    uint64_t words[16];
};

}  // namespace

int main() {
    struct sigaction action = {};
    action.sa_sigaction = fetch, action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    char name[32] = {};
    strncpy(name, graft_instructions(), sizeof name - 1);
    send(name, sizeof name);
    for (;;) {
        Call asked;
        receive(&asked, sizeof asked);
        int status = call(asked.name, asked.words);
        give_back();
        Message done = {"done", 0, uint64_t(int64_t(status))};
        send(&done, sizeof done);
    }
}

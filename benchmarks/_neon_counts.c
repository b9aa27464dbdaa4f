/* A plugin of QEMU (1 of its interface, docs/devel/tcg-plugins.rst of QEMU): counts what the native kernels execute,
   into a file that the program beside reads while the kernels run (neon_counts.py).

   [0] instructions, [1] multiply-adds of four floats, [2] loads and stores. */

#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef struct qemu_info_t qemu_info_t;
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                                  void (*translated)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, enum qemu_plugin_op op, void *number,
                                                     uint64_t by);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
extern const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *insn);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t *counts;

static int multiplies_and_adds(uint32_t word) { /* FMLA and FMLS, of vectors or with one element of one */
    return (word & 0xff20fc00) == 0x4e20cc00 || (word & 0xff20fc00) == 0x4ea0cc00 ||
           (word & 0xff80f400) == 0x4f801000 || (word & 0xff80f400) == 0x4f805000;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    size_t all = qemu_plugin_tb_n_insns(block);
    const char *where = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0));
    if (!where || !strstr(where, "8baseline")) return; /* the namespace of the kernels */
    uint64_t own[3] = {all, 0, 0};
    for (size_t i = 0; i < all; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), 4);
        own[1] += multiplies_and_adds(word);
        own[2] += (word & 0x0a000000) == 0x08000000;
    }
    for (int i = 0; i < 3; i++)
        if (own[i]) qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, counts + i, own[i]);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                                                               char **argv) {
    (void)info;
    int file = argc == 1 && !strncmp(argv[0], "counts=", 7) ? open(argv[0] + 7, O_RDWR) : -1;
    if (file < 0) return -1;
    counts = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (counts == MAP_FAILED) return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}

/* Faults at the n-th file operation of a process, and a record of all of them.

   A seccomp filter turns every system call that changes files into a SIGSYS, whoever makes it:
   glibc's wrappers and its stdio, Rust's rustix (which makes its calls itself, so that no symbol
   can be interposed), numpy. The handler counts the calls below a folder, does to the n-th what it
   was told to do, and makes all others itself, from one page at a fixed address that the filter
   lets through. A program that is started by the process keeps the filter, so it needs this
   library, too: set LD_PRELOAD. Linux on x86-64. Not seen: stores into shared maps (their making
   is counted in fault_uncovered), io_uring, openat2, splice, reflinks.

   In the environment: FAULT_PREFIX, FAULT_ACTION, FAULT_AT, FAULT_VALUE, FAULT_LOG; or call
   fault_arm. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum action { OFF, COUNT, KILL, TEAR, SIGNAL, FAIL, RECORD };
enum kind { LOOK, OPEN, WRITE, RENAME, LINK, SYMLINK, UNLINK, RMDIR, MKDIR, TRUNCATE, FSYNC, SYNC };
enum { CREATED = 1, EMPTIED = 2, GROWS = 4 };

struct entry { /* of the record; two paths and the written bytes follow */
  uint32_t kind, flags;
  uint64_t number, inode;
  int64_t offset;
  uint64_t size;
  uint32_t first, second;
};

struct call {
  enum kind kind;
  uint32_t flags;
  uint64_t inode;
  char first[PATH_MAX], second[PATH_MAX];
};

static enum action action;
static char prefix[PATH_MAX];
static size_t prefix_length;
static long at, count, failed, uncovered;
static int value, record = -1, installed;
static atomic_flag busy = ATOMIC_FLAG_INIT;

/* System calls that the filter lets through ------------------------------------------------------ */

#define PAGE ((void *)0x6f6000000000)
typedef long (*raw_call)(long, ...);
#define raw(...) (((raw_call)PAGE)(__VA_ARGS__))

static int map_page(void) {
  static const unsigned char code[] = {
      0x48, 0x89, 0xf8,             /* mov rax, rdi */
      0x48, 0x89, 0xf7,             /* mov rdi, rsi */
      0x48, 0x89, 0xd6,             /* mov rsi, rdx */
      0x48, 0x89, 0xca,             /* mov rdx, rcx */
      0x4d, 0x89, 0xc2,             /* mov r10, r8 */
      0x4d, 0x89, 0xc8,             /* mov r8, r9 */
      0x4c, 0x8b, 0x4c, 0x24, 0x08, /* mov r9, [rsp+8] */
      0x0f, 0x05, 0xc3,             /* syscall; ret */
  };
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
  if (mmap(PAGE, 4096, PROT_READ | PROT_WRITE, flags, -1, 0) != PAGE) return errno;
  memcpy(PAGE, code, sizeof code);
  return mprotect(PAGE, 4096, PROT_READ | PROT_EXEC) ? errno : 0;
}

/* Paths ------------------------------------------------------------------------------------------ */

static void name_of_fd(int fd, char *name) {
  char digits[12];
  int n = 0;
  strcpy(name, "/proc/self/fd/");
  do digits[n++] = '0' + fd % 10; while (fd /= 10);
  for (name += strlen(name); n;) *name++ = digits[--n];
  *name = 0;
}

static int path_of_fd(int fd, char *path) {
  char name[40];
  if (fd < 0) return 0;
  name_of_fd(fd, name);
  long length = raw(SYS_readlinkat, AT_FDCWD, name, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
  return length > 0;
}

/* Write the absolute path without "." and ".."; links are not followed. */
static int absolute(int folder, const char *path, char *out) {
  char whole[2 * PATH_MAX] = "";
  size_t length = strnlen(path, PATH_MAX), from = 0, to = 0;
  if (path[0] != '/') {
    if (folder == AT_FDCWD) {
      if (raw(SYS_getcwd, whole, PATH_MAX) < 0) return 0;
    } else if (!path_of_fd(folder, whole)) {
      return 0;
    }
    from = strlen(whole);
    whole[from++] = '/';
  }
  memcpy(whole + from, path, length);
  whole[from + length] = 0;
  for (char *part = whole; *part;) {
    while (*part == '/') part++;
    size_t size = strcspn(part, "/");
    if (size == 2 && part[0] == '.' && part[1] == '.') {
      while (to && out[--to] != '/') continue;
    } else if (size && !(size == 1 && part[0] == '.')) {
      if (to + size + 2 > PATH_MAX) return 0;
      out[to++] = '/';
      memcpy(out + to, part, size);
      to += size;
    }
    part += size;
  }
  out[to] = 0;
  return 1;
}

static int watched(const char *path) {
  return strncmp(path, prefix, prefix_length) == 0 &&
         (path[prefix_length] == '/' || path[prefix_length] == 0);
}

static uint64_t inode_of(int folder, const char *path, int flags) {
  struct stat found;
  return raw(SYS_newfstatat, folder, path, &found, flags) == 0 ? found.st_ino : 0;
}

/* What is done to a call ------------------------------------------------------------------------- */

static void die(void) {
  raw(SYS_kill, raw(SYS_getpid), SIGKILL);
  for (;;) raw(SYS_pause);
}

/* Whether the error can come of such a call: a full disk still renames nothing, but it unlinks. */
static int meets(const struct call *call) {
  switch (value) {
  case EMFILE: return call->kind == OPEN || call->kind == LOOK;
  case EROFS: return call->kind != LOOK && call->kind != FSYNC && call->kind != SYNC;
  case EIO: return call->kind != LOOK && call->kind != UNLINK && call->kind != RMDIR;
  default: /* no space, no quota */
    if (call->kind == OPEN) return call->flags & CREATED;
    if (call->kind == TRUNCATE) return call->flags & GROWS;
    return call->kind != LOOK && call->kind != UNLINK && call->kind != RMDIR && call->kind != SYNC;
  }
}

/* Count the call. Returns an error to fail with (negative), 1 to tear it, or 0 to make it. */
static int begin(const struct call *call) {
  int due = 0;
  if (call->kind != LOOK) due = ++count == at;
  if (due && action == KILL) die();
  if (due && action == SIGNAL) raw(SYS_kill, raw(SYS_getpid), value);
  if (action == FAIL && count >= at && meets(call)) {
    failed++;
    return -value;
  }
  return due && action == TEAR;
}

static void put(const void *data, size_t size) {
  for (const char *from = data; size;) {
    long done = raw(SYS_write, record, from, size);
    if (done <= 0) die(); /* a record with a hole would be taken for a whole one */
    from += done;
    size -= done;
  }
}

static void note(const struct call *call, int64_t offset, uint64_t size) {
  struct entry entry = {call->kind, call->flags, count, call->inode, offset, size,
                        strlen(call->first), strlen(call->second)};
  put(&entry, sizeof entry);
  put(call->first, entry.first);
  put(call->second, entry.second);
}

/* Record what was written to fd at offset, read back from the file. */
static void note_written(const struct call *call, int fd, int64_t offset, uint64_t size) {
  static char piece[1 << 16];
  char name[40];
  name_of_fd(fd, name);
  note(call, offset, size);
  long file = raw(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
  while (size) {
    long got = raw(SYS_pread64, file, piece, size < sizeof piece ? size : sizeof piece, offset);
    if (got <= 0) die();
    put(piece, got);
    offset += got;
    size -= got;
  }
  raw(SYS_close, file);
}

/* The calls -------------------------------------------------------------------------------------- */

typedef long args[6];

static long pass(long number, const args a) {
  return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static long do_open(long number, const args a, int folder, const char *path, int flags) {
  struct call call = {.kind = LOOK};
  if (!absolute(folder, path, call.first) || !watched(call.first)) return pass(number, a);
  if ((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) {
    call.kind = OPEN;
    if (flags & O_CREAT && !inode_of(folder, path, 0)) call.flags |= CREATED;
    if (flags & O_TRUNC) call.flags |= EMPTIED;
  }
  int verdict = begin(&call);
  if (verdict < 0) return verdict;
  long fd = pass(number, a);
  if (verdict) die();
  if (action == RECORD && fd >= 0 && call.flags) {
    call.inode = inode_of(fd, "", AT_EMPTY_PATH);
    note(&call, 0, 0);
  }
  return fd;
}

static void do_half(long number, const args a) {
  args half = {a[0], a[1], a[2], a[3], a[4], a[5]};
  if (number == SYS_writev || number == SYS_pwritev || number == SYS_pwritev2) {
    const struct iovec *parts = (const struct iovec *)a[1];
    if (a[2] > 1) {
      half[2] = (a[2] + 1) / 2;
    } else {
      struct iovec part = {parts->iov_base, parts->iov_len / 2};
      half[1] = (long)&part;
      pass(number, half);
      return;
    }
  } else if (number == SYS_sendfile || number == SYS_copy_file_range) {
    int length = number == SYS_sendfile ? 3 : 4; /* more may be asked for than there is */
    struct stat source;
    raw(SYS_newfstatat, number == SYS_sendfile ? a[1] : a[0], "", &source, AT_EMPTY_PATH);
    half[length] = (a[length] < source.st_size ? a[length] : source.st_size) / 2;
  } else {
    half[2] = a[2] / 2;
  }
  pass(number, half);
}

static long do_write(long number, const args a, int fd) {
  struct call call = {.kind = WRITE};
  if (!path_of_fd(fd, call.first) || !watched(call.first)) return pass(number, a);
  int verdict = begin(&call);
  if (verdict < 0) return verdict;
  if (verdict) {
    do_half(number, a);
    die();
  }
  long done = pass(number, a);
  if (action == RECORD && done > 0) {
    int64_t end = raw(SYS_lseek, fd, 0, SEEK_CUR), offset = end - done;
    if (number == SYS_pwrite64 || number == SYS_pwritev) offset = a[3];
    if (number == SYS_pwritev2 && a[3] != -1) offset = a[3];
    if (number == SYS_copy_file_range && a[3]) offset = *(int64_t *)a[3] - done;
    call.inode = inode_of(fd, "", AT_EMPTY_PATH);
    note_written(&call, fd, offset, done);
  }
  return done;
}

static long do_file(long number, const args a, enum kind kind, int fd, int64_t size) {
  struct call call = {.kind = kind};
  struct stat found;
  if (!path_of_fd(fd, call.first) || !watched(call.first)) return pass(number, a);
  raw(SYS_newfstatat, fd, "", &found, AT_EMPTY_PATH);
  if (kind == TRUNCATE && size > found.st_size) call.flags |= GROWS;
  int verdict = begin(&call);
  if (verdict < 0) return verdict;
  long result = pass(number, a);
  if (verdict) die();
  call.inode = found.st_ino;
  if (action == RECORD && result == 0) note(&call, size, 0);
  return result;
}

static long do_names(long number, const args a, enum kind kind, int folder, const char *path,
                     int other_folder, const char *other) {
  struct call call = {.kind = kind};
  if (kind == SYMLINK) {
    strncpy(call.first, path, PATH_MAX - 1);
  } else if (!absolute(folder, path, call.first)) {
    return pass(number, a);
  }
  if (other && !absolute(other_folder, other, call.second)) return pass(number, a);
  if (!watched(other ? call.second : call.first) && !(kind == RENAME && watched(call.first)))
    return pass(number, a);
  int verdict = begin(&call);
  if (verdict < 0) return verdict;
  long result = pass(number, a);
  if (verdict) die();
  if (action == RECORD && result == 0) {
    call.inode = other ? inode_of(other_folder, other, AT_SYMLINK_NOFOLLOW)
                       : inode_of(folder, path, AT_SYMLINK_NOFOLLOW);
    note(&call, 0, 0);
  }
  return result;
}

static long do_sync(long number, const args a) {
  struct call call = {.kind = SYNC};
  long result = pass(number, a);
  if (action == RECORD) note(&call, 0, 0);
  return result;
}

static long serve(long number, const args a) {
  const char *p0 = (const char *)a[0], *p1 = (const char *)a[1];
  const char *p2 = (const char *)a[2], *p3 = (const char *)a[3];
  int here = AT_FDCWD;
  switch (number) {
  case SYS_open: return do_open(number, a, here, p0, a[1]);
  case SYS_creat: return do_open(number, a, here, p0, O_CREAT | O_WRONLY | O_TRUNC);
  case SYS_openat: return do_open(number, a, a[0], p1, a[2]);
  case SYS_write:
  case SYS_pwrite64:
  case SYS_writev:
  case SYS_pwritev:
  case SYS_pwritev2:
  case SYS_sendfile: return do_write(number, a, a[0]);
  case SYS_copy_file_range: return do_write(number, a, a[2]);
  case SYS_rename: return do_names(number, a, RENAME, here, p0, here, p1);
  case SYS_renameat:
  case SYS_renameat2: return do_names(number, a, RENAME, a[0], p1, a[2], p3);
  case SYS_link: return do_names(number, a, LINK, here, p0, here, p1);
  case SYS_linkat: return do_names(number, a, LINK, a[0], p1, a[2], p3);
  case SYS_symlink: return do_names(number, a, SYMLINK, here, p0, here, p1);
  case SYS_symlinkat: return do_names(number, a, SYMLINK, here, p0, a[1], p2);
  case SYS_unlink: return do_names(number, a, UNLINK, here, p0, 0, NULL);
  case SYS_rmdir: return do_names(number, a, RMDIR, here, p0, 0, NULL);
  case SYS_unlinkat:
    return do_names(number, a, a[2] & AT_REMOVEDIR ? RMDIR : UNLINK, a[0], p1, 0, NULL);
  case SYS_mkdir: return do_names(number, a, MKDIR, here, p0, 0, NULL);
  case SYS_mkdirat: return do_names(number, a, MKDIR, a[0], p1, 0, NULL);
  case SYS_ftruncate: return do_file(number, a, TRUNCATE, a[0], a[1]);
  case SYS_fallocate: return do_file(number, a, TRUNCATE, a[0], a[2] + a[3]);
  case SYS_truncate: {
    long fd = raw(SYS_openat, here, p0, O_WRONLY | O_CLOEXEC, 0);
    const args with_fd = {fd, a[1]};
    if (fd < 0) return fd;
    long result = do_file(SYS_ftruncate, with_fd, TRUNCATE, fd, a[1]);
    raw(SYS_close, fd);
    return result;
  }
  case SYS_fsync:
  case SYS_fdatasync: return do_file(number, a, FSYNC, a[0], 0);
  case SYS_sync:
  case SYS_syncfs: return do_sync(number, a);
  case SYS_mmap: {
    char path[PATH_MAX];
    if (a[3] & MAP_SHARED && a[2] & PROT_WRITE && path_of_fd(a[4], path) && watched(path))
      uncovered++;
    return pass(number, a);
  }
  default: return pass(number, a);
  }
}

static void on_call(int signal_number, siginfo_t *info, void *state) {
  greg_t *registers = ((ucontext_t *)state)->uc_mcontext.gregs;
  const args a = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX],
                  registers[REG_R10], registers[REG_R8],  registers[REG_R9]};
  (void)signal_number;
  if (action == OFF) {
    registers[REG_RAX] = pass(info->si_syscall, a);
    return;
  }
  while (atomic_flag_test_and_set(&busy)) raw(SYS_sched_yield);
  registers[REG_RAX] = serve(info->si_syscall, a);
  atomic_flag_clear(&busy);
}

#define LOAD_AT(offset) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (offset))
#define LOAD(field) LOAD_AT(offsetof(struct seccomp_data, field))
#define EQUAL(number, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (number), 0, (skip))
#define ANY_OF(bits, skip) BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, (bits), 0, (skip))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define TRAP BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP)

/* Programs that are started make calls before their copy of this library is there to answer: they
   open files to read and map them, so such calls are let through, unless opening is to fail. */
static int install(void) {
  static const int always[] = {
      SYS_creat, SYS_write, SYS_pwrite64, SYS_writev, SYS_pwritev, SYS_pwritev2, SYS_sendfile,
      SYS_copy_file_range, SYS_rename, SYS_renameat, SYS_renameat2, SYS_link, SYS_linkat,
      SYS_symlink, SYS_symlinkat, SYS_unlink, SYS_rmdir, SYS_unlinkat, SYS_mkdir, SYS_mkdirat,
      SYS_ftruncate, SYS_fallocate, SYS_truncate, SYS_fsync, SYS_fdatasync, SYS_sync, SYS_syncfs};
  enum { N = sizeof always / sizeof *always };
  uint32_t writing = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
  if (action == FAIL && value == EMFILE) writing = ~0u; /* O_LARGEFILE or O_CLOEXEC is always set */
  const struct sock_filter head[] = {
      LOAD_AT(offsetof(struct seccomp_data, instruction_pointer) + 4), EQUAL((uint64_t)PAGE >> 32, 1), ALLOW,
      LOAD(nr), EQUAL(SYS_open, 4), LOAD(args[1]), ANY_OF(writing, 1), TRAP, ALLOW,
      EQUAL(SYS_openat, 4), LOAD(args[2]), ANY_OF(writing, 1), TRAP, ALLOW,
      EQUAL(SYS_mmap, 6), LOAD(args[2]), ANY_OF(PROT_WRITE, 3),
      LOAD(args[3]), ANY_OF(MAP_SHARED, 1), TRAP, ALLOW};
  enum { H = sizeof head / sizeof *head };
  struct sock_filter filter[H + 2 * N + 1];
  memcpy(filter, head, sizeof head);
  for (int i = 0; i < N; i++) {
    filter[H + 2 * i] = (struct sock_filter)EQUAL(always[i], 1);
    filter[H + 2 * i + 1] = (struct sock_filter)TRAP;
  }
  filter[H + 2 * N] = (struct sock_filter)ALLOW;
  struct sock_fprog program = {H + 2 * N + 1, filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}

/* Watch what lies below `folder`; return 0 or an errno. `which` is an enum action, `number` counts
   from 1, `what` is the signal or the errno, `log` the file of the record. */
int fault_arm(const char *folder, int which, long number, int what, const char *log) {
  if (which == RECORD) {
    int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0 || (record = fcntl(fd, F_DUPFD_CLOEXEC, 500)) < 0) return errno;
    close(fd);
  }
  prefix_length = strlen(strncpy(prefix, folder, PATH_MAX - 1));
  at = number, value = what, count = failed = uncovered = 0;
  action = which;
  if (installed) return 0;
  int error = install();
  installed = !error;
  return error;
}

void fault_disarm(void) { action = OFF; }
long fault_count(void) { return count; }
long fault_failed(void) { return failed; }
long fault_uncovered(void) { return uncovered; }

static long number_in(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction handler = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO};
  sigfillset(&handler.sa_mask);
  if (map_page() || sigaction(SIGSYS, &handler, NULL)) abort();
  if (getenv("FAULT_PREFIX") &&
      fault_arm(getenv("FAULT_PREFIX"), number_in("FAULT_ACTION"), number_in("FAULT_AT"),
                number_in("FAULT_VALUE"), getenv("FAULT_LOG")))
    abort();
  unsetenv("FAULT_PREFIX"); /* what the program starts is not counted */
}

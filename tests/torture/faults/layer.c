// Preloaded into a process, this makes the Nth call that changes a file below a folder fail, write half, or kill the process.
// Nothing fails before fault_arm(). Forked processes count together.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE = 2, SYNC = 4, RENAME = 8, MODE = 16, MAKE = 32 };
enum { FINE = 0, FAIL = 1, HALF = 2 };

static char folder[PATH_MAX];
static int operations, number, sticky, halves;
static long at;
static long *met;

// Arms the layer: of the calls in the set `which` whose file lies below `below`, the one numbered `nth` (from 1 on; 0:
// none) fails with `error`. With `more` all later ones fail as well; with `half` it writes half, and then only later ones
// fail, if `more` says so. A negative `error` is a signal, which the process gets instead of an answer.
void fault_arm(const char *below, int which, int error, int more, int half, long nth) {
  if (!met) met = mmap(NULL, sizeof *met, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  snprintf(folder, sizeof folder, "%s/", below);
  *met = 0, number = error, sticky = more, halves = half, at = nth;
  operations = which;
}

void fault_disarm(void) { operations = 0; }

long fault_met(void) { return met ? *met : 0; }

static int below(const char *path) {
  if (path[0] == '/') return strncmp(path, folder, strlen(folder)) == 0;
  char full[2 * PATH_MAX];
  if (!getcwd(full, PATH_MAX)) return 0;
  strcat(full, "/");
  strncat(full, path, PATH_MAX - 1);
  return strncmp(full, folder, strlen(folder)) == 0;
}

static int verdict(int operation, const char *path) {
  if (!(operations & operation) || !below(path)) return FINE;
  long now = __atomic_add_fetch(met, 1, __ATOMIC_SEQ_CST);
  if (at == 0 || now < at || (now > at && !sticky)) return FINE;
  if (now == at && halves) return HALF;
  if (number < 0) kill(getpid(), -number);
  errno = number;
  return FAIL;
}

static int of_descriptor(int operation, int descriptor) {
  if (!(operations & operation) || descriptor <= 2) return FINE;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return FINE;
  path[length] = 0;
  return verdict(operation, path);
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define HALVED(what, size) ((what) == HALF && (size) > 1 ? (size) / 2 : (size))

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  int what = of_descriptor(WRITE, fd);
  return what == FAIL ? -1 : real(fd, data, HALVED(what, size));
}

#define PWRITE(name, offset_type) \
  ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
    REAL(name); \
    int what = of_descriptor(WRITE, fd); \
    return what == FAIL ? -1 : real(fd, data, HALVED(what, size), offset); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  int what = of_descriptor(WRITE, fd);
  return what == FAIL ? -1 : real(fd, parts, HALVED(what, count));
}

#define SENDFILE(name, offset_type) \
  ssize_t name(int to, int from, offset_type *offset, size_t size) { \
    static ssize_t (*real)(int, int, offset_type *, size_t); \
    if (!real) real = (ssize_t(*)(int, int, offset_type *, size_t))dlsym(RTLD_NEXT, #name); \
    int what = of_descriptor(WRITE, to); \
    return what == FAIL ? -1 : real(to, from, offset, HALVED(what, size)); \
  }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t size, unsigned flags) {
  REAL(copy_file_range);
  int what = of_descriptor(WRITE, to);
  return what == FAIL ? -1 : real(from, in, to, out, HALVED(what, size), flags);
}

// The C library writes its buffers by calls of its own, which cannot be taken over: so a stream fails when it is given data.
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
  REAL(fwrite);
  return of_descriptor(WRITE, fileno(stream)) == FAIL ? 0 : real(data, size, count, stream);
}

#define ON_DESCRIPTOR(name, operation, type) \
  int name(int fd, type value) { \
    REAL(name); \
    return of_descriptor(operation, fd) == FAIL ? -1 : real(fd, value); \
  }
ON_DESCRIPTOR(ftruncate, TRUNCATE, off_t)
ON_DESCRIPTOR(ftruncate64, TRUNCATE, off64_t)
ON_DESCRIPTOR(fchmod, MODE, mode_t)

#define ON_PATH(name, operation, type) \
  int name(const char *path, type value) { \
    REAL(name); \
    return verdict(operation, path) == FAIL ? -1 : real(path, value); \
  }
ON_PATH(truncate, TRUNCATE, off_t)
ON_PATH(truncate64, TRUNCATE, off64_t)
ON_PATH(chmod, MODE, mode_t)
ON_PATH(mkdir, MAKE, mode_t)

int fsync(int fd) {
  REAL(fsync);
  return of_descriptor(SYNC, fd) == FAIL ? -1 : real(fd);
}

int fdatasync(int fd) {
  REAL(fdatasync);
  return of_descriptor(SYNC, fd) == FAIL ? -1 : real(fd);
}

int fchmodat(int place, const char *path, mode_t mode, int flags) {
  REAL(fchmodat);
  return verdict(MODE, path) == FAIL ? -1 : real(place, path, mode, flags);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return verdict(RENAME, to) == FAIL ? -1 : real(from, to);
}

int renameat(int place, const char *from, int other, const char *to) {
  REAL(renameat);
  return verdict(RENAME, to) == FAIL ? -1 : real(place, from, other, to);
}

int renameat2(int place, const char *from, int other, const char *to, unsigned flags) {
  REAL(renameat2);
  return verdict(RENAME, to) == FAIL ? -1 : real(place, from, other, to, flags);
}

int link(const char *from, const char *to) {
  REAL(link);
  return verdict(RENAME, to) == FAIL ? -1 : real(from, to);
}

static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = mode_of(flags, rest); \
    va_end(rest); \
    return flags & O_CREAT && verdict(MAKE, path) == FAIL ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int place, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = mode_of(flags, rest); \
    va_end(rest); \
    return flags & O_CREAT && verdict(MAKE, path) == FAIL ? -1 : real(place, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
  FILE *name(const char *path, const char *mode) { \
    REAL(name); \
    return mode[0] != 'r' && verdict(MAKE, path) == FAIL ? NULL : real(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

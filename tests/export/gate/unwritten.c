// Preloaded into a process, this fills what malloc and its like give with one byte, in hexadecimal in UNWRITTEN_BYTE.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

static void *filled(void *memory, size_t size) {
  const char *byte = getenv("UNWRITTEN_BYTE");
  // Small ones are of the interpreter and cost time.
  if (byte && memory && size >= 256) memset(memory, (int)strtol(byte, NULL, 16), size);
  return memory;
}

void *malloc(size_t size) { return filled(__libc_malloc(size), size); }

void *memalign(size_t alignment, size_t size) { return filled(__libc_memalign(alignment, size), size); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **result, size_t alignment, size_t size) {
  void *memory = memalign(alignment, size);
  if (!memory && size) return ENOMEM;
  *result = memory;
  return 0;
}

/* A disk that fills up, for tests: preloaded, it lets a process write so many bytes into a folder.
 *
 * Once the bytes are spent, every write to a regular file below that folder fails with ENOSPC, as
 * on a full disk or, because statvfs still tells of free space, at a used-up quota. What is removed
 * gives no room back. Without `chaos_fill_disk` and CHAOS_DISK it does nothing. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long bytes_left = -1; /* -1: the disk is large enough */
static char folder[4096];

/* From now on `bytes` may be written into the folder `place`. */
void chaos_fill_disk(long bytes, const char *place) {
  snprintf(folder, sizeof folder, "%s", place);
  __atomic_store_n(&bytes_left, bytes, __ATOMIC_SEQ_CST);
}

__attribute__((constructor)) static void read_environment(void) {
  const char *text = getenv("CHAOS_DISK"); /* BYTES:FOLDER */
  const char *colon = text ? strchr(text, ':') : NULL;
  if (colon) chaos_fill_disk(atol(text), colon + 1);
}

static int is_ours(int descriptor) {
  char link[64], path[4096];
  struct stat status;
  if (fstat(descriptor, &status) || !S_ISREG(status.st_mode)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return strncmp(path, folder, strlen(folder)) == 0;
}

/* How many of `wanted` bytes fit; -1 with errno set where none does. */
static ssize_t granted(int descriptor, size_t wanted) {
  long left = __atomic_load_n(&bytes_left, __ATOMIC_SEQ_CST);
  if (left < 0 || wanted == 0 || !is_ours(descriptor)) return (ssize_t)wanted;
  if (left == 0) {
    errno = ENOSPC;
    return -1;
  }
  long taken = (long)wanted < left ? (long)wanted : left;
  __atomic_sub_fetch(&bytes_left, taken, __ATOMIC_SEQ_CST);
  return taken;
}

ssize_t write(int descriptor, const void *data, size_t size) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  ssize_t fits = granted(descriptor, size);
  return fits < 0 ? fits : real(descriptor, data, (size_t)fits);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
  ssize_t fits = granted(descriptor, size);
  return fits < 0 ? fits : real(descriptor, data, (size_t)fits, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  static ssize_t (*real)(int, const struct iovec *, int);
  if (!real) real = dlsym(RTLD_NEXT, "writev");
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  ssize_t fits = granted(descriptor, size);
  if (fits < 0) return fits;
  if ((size_t)fits == size) return real(descriptor, parts, count);
  /* A short write of the first part that is not empty. */
  for (int i = 0; i < count; i++)
    if (parts[i].iov_len) {
      size_t part = parts[i].iov_len < (size_t)fits ? parts[i].iov_len : (size_t)fits;
      return write(descriptor, parts[i].iov_base, part);
    }
  return 0;
}

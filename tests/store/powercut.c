/* Records what a process asks the kernel to keep, and fails syncs and writes on demand.
 *
 * Preloaded into a writer process. Every write, truncation, removal and sync of a file below
 * $POWERCUT_DIR is appended to $POWERCUT_LOG before it happens, with its data, so that a test can
 * rebuild what a disk would hold had the power failed at any moment. With $POWERCUT_FAIL_SYNC=N
 * the N-th sync of a "-wal" file fails with EIO; while $POWERCUT_FULL exists, writes give ENOSPC.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static int syncs;

struct header {
    uint8_t kind; /* w write, t truncate, s sync, u unlink */
    uint8_t name_len;
    uint64_t offset;
    uint64_t length;
} __attribute__((packed));

/* Returns the path below the watched directory, or NULL. */
static const char *watched(const char *path) {
    const char *dir = getenv("POWERCUT_DIR");
    size_t n = dir ? strlen(dir) : 0;
    if (n == 0 || strncmp(path, dir, n) != 0 || path[n] != '/') return NULL;
    return path + n + 1;
}

static const char *name_of(int fd, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, size - 1);
    if (n < 0) return NULL;
    buffer[n] = 0;
    return watched(buffer);
}

static void record(char kind, const char *name, uint64_t offset, const void *data, uint64_t length) {
    struct header h = {(uint8_t)kind, (uint8_t)strlen(name), offset, length};
    struct iovec parts[3] = {
        {&h, sizeof h}, {(void *)name, h.name_len}, {(void *)data, data ? length : 0}};
    pthread_mutex_lock(&gate);
    if (log_fd < 0)
        log_fd = (int)syscall(SYS_openat, AT_FDCWD, getenv("POWERCUT_LOG"),
                              O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    syscall(SYS_writev, log_fd, parts, data ? 3 : 2);
    pthread_mutex_unlock(&gate);
}

static int is_full(void) {
    const char *flag = getenv("POWERCUT_FULL");
    return flag && syscall(SYS_faccessat, AT_FDCWD, flag, F_OK) == 0;
}

static ssize_t write_at(int fd, const void *data, size_t length, off_t offset) {
    char buffer[4096];
    const char *name = name_of(fd, buffer, sizeof buffer);
    if (name && is_full()) {
        errno = ENOSPC;
        return -1;
    }
    if (name) record('w', name, (uint64_t)offset, data, length);
    return syscall(SYS_pwrite64, fd, data, length, offset);
}

ssize_t pwrite(int fd, const void *d, size_t n, off_t o) { return write_at(fd, d, n, o); }
ssize_t pwrite64(int fd, const void *d, size_t n, off64_t o) { return write_at(fd, d, n, o); }

ssize_t write(int fd, const void *data, size_t length) {
    char buffer[4096];
    const char *name = name_of(fd, buffer, sizeof buffer);
    if (name) record('w', name, (uint64_t)lseek(fd, 0, SEEK_CUR), data, length);
    return syscall(SYS_write, fd, data, length);
}

static int truncate_to(int fd, off_t length) {
    char buffer[4096];
    const char *name = name_of(fd, buffer, sizeof buffer);
    if (name) record('t', name, (uint64_t)length, NULL, 0);
    return (int)syscall(SYS_ftruncate, fd, length);
}

int ftruncate(int fd, off_t n) { return truncate_to(fd, n); }
int ftruncate64(int fd, off64_t n) { return truncate_to(fd, n); }

static int sync_file(int fd, long number) {
    char buffer[4096];
    const char *name = name_of(fd, buffer, sizeof buffer);
    const char *nth = getenv("POWERCUT_FAIL_SYNC");
    if (name && nth && strstr(name, "-wal") && ++syncs == atoi(nth)) {
        errno = EIO;
        return -1;
    }
    int result = (int)syscall(number, fd);
    /* Recorded once it has happened: only then may anybody rely on it. */
    if (name && result == 0) record('s', name, 0, NULL, 0);
    return result;
}

int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

int unlink(const char *path) {
    const char *name = watched(path);
    if (name) record('u', name, 0, NULL, 0);
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

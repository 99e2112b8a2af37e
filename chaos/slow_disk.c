/* A slow disk: preloaded into a process, this library delays its operations on files below a directory.
 *
 * CHAOS_DISK names the directory, and CHAOS_DISK_DELAY names a file with the milliseconds (no file: no delay). The file
 * is read at each call, so that the delay can be changed while the process runs. Chaos Mesh's IOChaos has the same
 * effect through a file system of its own; a library needs no privileges.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static long milliseconds(void) {
    static ssize_t (*take)(int, void *, size_t);
    static int (*look)(const char *, int, ...);
    if (!take) take = dlsym(RTLD_NEXT, "read");
    if (!look) look = dlsym(RTLD_NEXT, "open");
    const char *name = getenv("CHAOS_DISK_DELAY");
    char text[32] = {0};
    int fd = name ? look(name, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return 0;
    if (take(fd, text, sizeof text - 1) < 0) text[0] = 0;
    close(fd);
    return strtol(text, NULL, 10);
}

static void wait_for(const char *path) {
    const char *below = getenv("CHAOS_DISK");
    if (!below || strncmp(path, below, strlen(below)) != 0) return;
    long ms = milliseconds();
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
    if (ms > 0) nanosleep(&pause, NULL);
}

static void wait_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!getenv("CHAOS_DISK") || fd < 3) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') return;
    path[length] = 0;
    wait_for(path);
}

#define REAL(result, name, ...)         \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        static int (*real)(const char *, int, ...);                                 \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0;           \
        va_end(rest);                                                               \
        wait_for(path);                                                             \
        return real(path, flags, mode);                                             \
    }
OPEN(open)
OPEN(open64)

FILE *fopen(const char *path, const char *mode) {
    REAL(FILE *, fopen, const char *, const char *);
    wait_for(path);
    return real(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    REAL(FILE *, fopen64, const char *, const char *);
    wait_for(path);
    return real(path, mode);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    wait_fd(fileno(file));
    return real(data, size, count, file);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    wait_fd(fd);
    return real(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    wait_fd(fd);
    return real(fd, parts, count);
}

ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    wait_fd(fd);
    return real(fd, data, size);
}

int fsync(int fd) {
    REAL(int, fsync, int);
    wait_fd(fd);
    return real(fd);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    wait_for(to);
    return real(from, to);
}

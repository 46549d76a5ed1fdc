/* Preloaded into a test process: counts the calls that change files below one folder, whoever makes them (Python, the
   safetensors writer, libc), and lets the process die, or the disk be full, at one of them, or calls a function at each. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

/* TEAR: half of a write is done before the death; FULL: ENOSPC from that call on; WATCH: the function sees each call
   before it is done, and each write once more when half of it is done. */
enum { OFF, DIE, TEAR, FULL, WATCH };

static char root[PATH_MAX];
static size_t root_length;
static long target, count;
static int mode = OFF;
static void (*watch)(long call, int needs_room, int is_torn);

void faulty_arm(const char *folder, long call, int how) {
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    target = call;
    count = 0;
    mode = how;
}

void faulty_watch(void (*function)(long, int, int)) { watch = function; }

static int below(const char *path) { return strncmp(path, root, root_length) == 0; }

static int descriptor_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int place_below(int folder, const char *path) {
    return path[0] == '/' || folder == AT_FDCWD ? below(path) : descriptor_below(folder);
}

/* 1 if the call has to fail for want of room. */
static int counted(int needs_room) {
    long now = ++count;
    if (now == target && (mode == DIE || mode == TEAR)) _exit(9);
    if (mode == WATCH) watch(now, needs_room, 0);
    if (mode == FULL && now >= target && needs_room) {
        errno = ENOSPC;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WATCHED(test) (mode != OFF && (test))

#define OPEN(name)                                                                         \
    int name(const char *path, int flags, ...) {                                           \
        va_list rest;                                                                      \
        va_start(rest, flags);                                                             \
        mode_t bits = va_arg(rest, mode_t);                                                \
        va_end(rest);                                                                      \
        if (WATCHED(flags & (O_CREAT | O_TRUNC) && below(path)) && counted(1)) return -1;  \
        return REAL(name)(path, flags, bits);                                              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                     \
    int name(int folder, const char *path, int flags, ...) {                                             \
        va_list rest;                                                                                    \
        va_start(rest, flags);                                                                           \
        mode_t bits = va_arg(rest, mode_t);                                                              \
        va_end(rest);                                                                                    \
        if (WATCHED(flags & (O_CREAT | O_TRUNC) && place_below(folder, path)) && counted(1)) return -1;  \
        return REAL(name)(folder, path, flags, bits);                                                    \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void *bytes, size_t size) {
    if (WATCHED(descriptor_below(descriptor))) {
        if (mode == TEAR && count + 1 == target) {
            REAL(write)(descriptor, bytes, size / 2);
            _exit(9);
        }
        if (counted(1)) return -1;
        if (mode == WATCH && size > 1) {
            ssize_t half = REAL(write)(descriptor, bytes, size / 2);
            if (half < 0) return -1;
            watch(count, 1, 1);
            ssize_t rest = REAL(write)(descriptor, (const char *)bytes + half, size - half);
            return rest < 0 ? half : half + rest;
        }
    }
    return REAL(write)(descriptor, bytes, size);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    if (WATCHED(descriptor_below(out)) && counted(1)) return -1;
    return REAL(sendfile)(out, in, offset, size);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    if (WATCHED(descriptor_below(out)) && counted(1)) return -1;
    return REAL(sendfile64)(out, in, offset, size);
}

#define ON_DESCRIPTOR(name, parameters, arguments, room)                          \
    int name parameters {                                                         \
        if (WATCHED(descriptor_below(descriptor)) && counted(room)) return -1;    \
        return REAL(name) arguments;                                              \
    }
ON_DESCRIPTOR(fsync, (int descriptor), (descriptor), 0)
ON_DESCRIPTOR(fdatasync, (int descriptor), (descriptor), 0)
ON_DESCRIPTOR(ftruncate, (int descriptor, off_t size), (descriptor, size), 0)
ON_DESCRIPTOR(ftruncate64, (int descriptor, off64_t size), (descriptor, size), 0)

#define ON_PATH(name, parameters, arguments, room)                \
    int name parameters {                                         \
        if (WATCHED(below(path)) && counted(room)) return -1;     \
        return REAL(name) arguments;                              \
    }
ON_PATH(mkdir, (const char *path, mode_t bits), (path, bits), 1)
ON_PATH(unlink, (const char *path), (path), 0)
ON_PATH(rmdir, (const char *path), (path), 0)
ON_PATH(rename, (const char *path, const char *to), (path, to), 0)

int unlinkat(int folder, const char *path, int flags) {
    if (WATCHED(place_below(folder, path)) && counted(0)) return -1;
    return REAL(unlinkat)(folder, path, flags);
}

int renameat(int folder, const char *path, int to_folder, const char *to) {
    if (WATCHED(place_below(folder, path)) && counted(0)) return -1;
    return REAL(renameat)(folder, path, to_folder, to);
}

/* Makes the n-th change of a file below a path fail, or kills the process at it; preloaded into one process.
 *
 * A change is an open for writing, a write, a rename, a sync, a removal, and so on; with the path "net", a send or a
 * connect. A process arms itself and asks how many changes it made, by ctypes. At a kill half of a write is done first.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL_ONCE, FAIL_FROM_NOW_ON };

static char prefix[PATH_MAX];
static long nth, seen;
static int action, error_number;

void faults_arm(const char *path, long at, int what, int number) {
    snprintf(prefix, sizeof prefix, "%s", path);
    nth = at, action = what, error_number = number, seen = 0;
}

long faults_seen(void) { return seen; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    size_t length = strlen(prefix);
    return length && !strncmp(path, prefix, length);
}

static int concerns_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int concerns(int folder, const char *path) {
    char whole[PATH_MAX], link[64];
    if (!prefix[0]) return 0;
    if (path[0] == '/') return below(path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, sizeof whole)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, whole, sizeof whole - 1);
        if (length < 0) return 0;
        whole[length] = 0;
    }
    strncat(whole, "/", sizeof whole - strlen(whole) - 1);
    strncat(whole, path, sizeof whole - strlen(whole) - 1);
    return below(whole);
}

/* Whether this change is to fail; `half` of it is done before a kill. */
static int strikes(int concerned, int fd, const void *half, size_t size) {
    if (!concerned) return 0;
    seen++;
    if (action == COUNT || seen < nth || (seen > nth && action != FAIL_FROM_NOW_ON)) return 0;
    if (action == KILL) {
        if (half && size / 2 && REAL(write)(fd, half, size / 2) < 0) errno = 0;
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    errno = error_number;
    return 1;
}

#define CHANGE(type, name, parameters, arguments, concerned)            \
    type name parameters {                                              \
        if (strikes(concerned, -1, 0, 0)) return (type)-1;              \
        return REAL(name) arguments;                                    \
    }

CHANGE(int, rename, (const char *a, const char *b), (a, b), concerns(AT_FDCWD, a) || concerns(AT_FDCWD, b))
CHANGE(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), concerns(d, a) || concerns(e, b))
CHANGE(int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f),
       concerns(d, a) || concerns(e, b))
CHANGE(int, fsync, (int fd), (fd), concerns_fd(fd))
CHANGE(int, fdatasync, (int fd), (fd), concerns_fd(fd))
CHANGE(int, ftruncate, (int fd, off_t n), (fd, n), concerns_fd(fd))
CHANGE(int, ftruncate64, (int fd, off64_t n), (fd, n), concerns_fd(fd))
CHANGE(int, truncate, (const char *a, off_t n), (a, n), concerns(AT_FDCWD, a))
CHANGE(int, truncate64, (const char *a, off64_t n), (a, n), concerns(AT_FDCWD, a))
CHANGE(int, unlink, (const char *a), (a), concerns(AT_FDCWD, a))
CHANGE(int, unlinkat, (int d, const char *a, int f), (d, a, f), concerns(d, a))
CHANGE(int, rmdir, (const char *a), (a), concerns(AT_FDCWD, a))
CHANGE(int, mkdir, (const char *a, mode_t m), (a, m), concerns(AT_FDCWD, a))
CHANGE(int, mkdirat, (int d, const char *a, mode_t m), (d, a, m), concerns(d, a))
CHANGE(int, chmod, (const char *a, mode_t m), (a, m), concerns(AT_FDCWD, a))
CHANGE(int, fchmodat, (int d, const char *a, mode_t m, int f), (d, a, m, f), concerns(d, a))
CHANGE(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), concerns_fd(fd))
CHANGE(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), concerns_fd(fd))
CHANGE(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), concerns_fd(fd))
CHANGE(ssize_t, sendfile, (int out, int in, off_t *o, size_t n), (out, in, o, n), concerns_fd(out))
CHANGE(ssize_t, sendfile64, (int out, int in, off64_t *o, size_t n), (out, in, o, n), concerns_fd(out))
CHANGE(ssize_t, copy_file_range, (int in, off64_t *i, int out, off64_t *o, size_t n, unsigned f), (in, i, out, o, n, f),
       concerns_fd(out))
CHANGE(ssize_t, send, (int fd, const void *b, size_t n, int f), (fd, b, n, f), !strcmp(prefix, "net"))
CHANGE(int, connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n), !strcmp(prefix, "net"))

ssize_t write(int fd, const void *bytes, size_t size) {
    if (strikes(concerns_fd(fd), fd, bytes, size)) return -1;
    return REAL(write)(fd, bytes, size);
}

#define OPEN(name, folder_parameter, folder, call)                                      \
    int name(folder_parameter const char *path, int flags, ...) {                       \
        va_list more;                                                                   \
        va_start(more, flags);                                                          \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;         \
        va_end(more);                                                                   \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) && strikes(concerns(folder, path), -1, 0, 0)) return -1; \
        return REAL(name) call;                                                         \
    }
#define COMMA ,
OPEN(open, , AT_FDCWD, (path, flags, mode))
OPEN(open64, , AT_FDCWD, (path, flags, mode))
OPEN(openat, int d COMMA, d, (d, path, flags, mode))
OPEN(openat64, int d COMMA, d, (d, path, flags, mode))

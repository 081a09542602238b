/* Faults of a mounted Drive, put between a process and the C library; tests/faults.py builds, arms and explains it.

   Preloaded (LD_PRELOAD), it is asked first by everything that runs: Python, PyTorch's C++, Rust's readers. Loaded into
   a process that already runs, faults_patch() turns that process's calls here. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum op { STAT, OPEN, READ, LIST, MAP, CREATE, WRITE, TRUNCATE, FSYNC, CLOSE, TOUCH, RENAME, UNLINK, MKDIR, LINK, OPS };
static const char *const NAMES[OPS] = {"stat", "open", "read", "list", "map", "create", "write", "truncate",
                                       "fsync", "close", "touch", "rename", "unlink", "mkdir", "link"};
/* a kind fails at most once a path, so that whoever repeats an operation, or a whole copy, gets through */
static const char *const KINDS[OPS] = {"read", "read", "read", "read", "read", "write", "write", "write",
                                       "write", "write", "write", "rename", "unlink", "mkdir", "link"};
enum { FINE = 0, DIE = -1 };

static struct {
    char folder[PATH_MAX], broken[256], counted[256], match[256], log[PATH_MAX];
    long seed, kill_at, raise_at, broken_from, number, count;
    double share;
    int armed;
} fault;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
#define SLOTS (1 << 20)
static uint64_t *seen;
static unsigned char ours[1 << 16]; /* by file descriptor: 1 under the folder, 2 and open for writing */

static uint64_t hash(uint64_t state, const char *text) { /* FNV-1a, then mixed: its low bits alone are not even */
    for (; *text; text++) state = (state ^ (unsigned char)*text) * 1099511628211ull;
    state ^= state >> 33; state *= 0xff51afd7ed558ccdull; state ^= state >> 33;
    return state ? state : 1;
}

static int first(uint64_t key) { /* whether this key comes for the first time; remembers it */
    if (!seen) seen = calloc(SLOTS, sizeof *seen);
    for (uint64_t at = key % SLOTS, tries = 0; tries < SLOTS; at = (at + 1) % SLOTS, tries++) {
        if (seen[at] == key) return 0;
        if (!seen[at]) { seen[at] = key; return 1; }
    }
    abort();
}

static int has(uint64_t key) {
    for (uint64_t at = key % SLOTS; seen && seen[at]; at = (at + 1) % SLOTS) if (seen[at] == key) return 1;
    return 0;
}

static int listed(const char *list, const char *word) { /* a comma-separated list; "all" holds every word */
    size_t length = strlen(word);
    if (!strcmp(list, "all")) return 1;
    for (const char *at = list; (at = strstr(at, word)); at += length)
        if ((at == list || at[-1] == ',') && (at[length] == ',' || !at[length])) return 1;
    return 0;
}

static void note(const char *what, long value, enum op op, const char *path) {
    char line[PATH_MAX + 128];
    if (!fault.log[0]) return;
    int length = snprintf(line, sizeof line, "%d\t%s\t%ld\t%s\t%s\n", (int)getpid(), what, value, NAMES[op], path);
    int file = syscall(SYS_openat, AT_FDCWD, fault.log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0) return;
    if (syscall(SYS_write, file, line, length) < 0) {}
    syscall(SYS_close, file);
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); for (;;) pause(); }

/* An absolute path without ".", ".." and doubled slashes; symbolic links stay as they are named. */
static int absolute(int at, const char *path, char *out) {
    char raw[PATH_MAX * 2] = "", link[64];
    if (!path) return 0;
    if (path[0] != '/') {
        ssize_t length;
        if (at == AT_FDCWD) { length = syscall(SYS_getcwd, raw, PATH_MAX); if (length > 0) length--; }
        else { snprintf(link, sizeof link, "/proc/self/fd/%d", at);
               length = syscall(SYS_readlinkat, AT_FDCWD, link, raw, PATH_MAX - 1); }
        if (length <= 0) return 0;
        raw[length] = '/'; raw[length + 1] = 0;
    }
    if (strlen(raw) + strlen(path) >= sizeof raw) return 0;
    strcat(raw, path);
    char *end = out;
    for (char *part = raw; *part;) {
        while (*part == '/') part++;
        size_t length = strcspn(part, "/");
        if (length == 2 && !strncmp(part, "..", 2)) { while (end > out && *--end != '/') {} }
        else if (length && !(length == 1 && *part == '.')) {
            if (end - out + length + 2 >= PATH_MAX) return 0;
            *end++ = '/'; memcpy(end, part, length); end += length;
        }
        part += length;
    }
    *end = 0;
    return 1;
}

static int of(int file, char *out) { return absolute(file, "", out); }

/* FINE, DIE, or the errno that this operation on this absolute path fails with. */
static int verdict(enum op op, const char *path) {
    size_t length = strlen(fault.folder);
    if (!fault.armed || strncmp(path, fault.folder, length) || (path[length] && path[length] != '/')) return FINE;
    const char *name = path[length] ? path + length + 1 : ".";
    int result = FINE, saved = errno;
    pthread_mutex_lock(&lock);
    uint64_t chance = hash(hash(hash(14695981039346656037ull + fault.seed, NAMES[op]), "/"), name);
    int error = fault.number ? fault.number : (chance >> 40) & 1 ? EIO : ENOTCONN;
    if (listed(fault.counted, NAMES[op]) && !fnmatch(fault.match, name, 0)) {
        note("moment", ++fault.count, op, name);
        if (fault.count == fault.kill_at) { note("kill", fault.count, op, name); result = DIE; }
        else if (fault.count == fault.raise_at) result = error;
    }
    if (!result && fault.broken[0] && fault.count >= fault.broken_from &&
        (listed(fault.broken, KINDS[op]) || listed(fault.broken, NAMES[op])))
        result = error;
    if (!result && fault.seed >= 0) {
        if (op == LINK) result = EOPNOTSUPP; /* Drive knows no links */
        else if (first(hash(hash(1, NAMES[op]), name)) && chance % 10000 < fault.share * 10000) {
            uint64_t kind = hash(hash(2, KINDS[op]), name);
            if (!has(kind)) { first(kind); result = error; }
        }
    }
    if (result > 0) note("fault", result, op, name);
    pthread_mutex_unlock(&lock);
    errno = saved;
    return result;
}

static int refuse(enum op op, int at, const char *path) { /* 1 with errno set when it fails; does not come back to die */
    char whole[PATH_MAX];
    if (!fault.armed || !absolute(at, path, whole)) return 0;
    int result = verdict(op, whole);
    if (result == DIE) die();
    if (result) errno = result;
    return result != FINE;
}

static int refuse_file(enum op op, int file) {
    char whole[PATH_MAX];
    if (!fault.armed || file < 0 || file >= (int)sizeof ours || !ours[file] || !of(file, whole)) return 0;
    int result = verdict(op, whole);
    if (result == DIE) die();
    if (result) errno = result;
    return result != FINE;
}

static int remember(int file, int writes) {
    char whole[PATH_MAX];
    size_t length = strlen(fault.folder);
    if (file < 0 || file >= (int)sizeof ours) return file;
    int saved = errno;
    ours[file] = fault.armed && of(file, whole) && !strncmp(whole, fault.folder, length) ? 1 + (writes != 0) : 0;
    errno = saved;
    return file;
}

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static mode_t mode_of(int flags, va_list *rest) { return flags & (O_CREAT | __O_TMPFILE) ? va_arg(*rest, mode_t) : 0; }

#define OPEN_AS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, &rest); va_end(rest); \
        if (refuse(WRITES(flags) ? CREATE : OPEN, AT_FDCWD, path)) return -1; \
        return remember(real(path, flags, mode), WRITES(flags)); }
#define OPENAT_AS(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, &rest); va_end(rest); \
        if (refuse(WRITES(flags) ? CREATE : OPEN, at, path)) return -1; \
        return remember(real(at, path, flags, mode), WRITES(flags)); }
#define OPEN2_AS(name) \
    int name(const char *path, int flags) { \
        REAL(int, name, const char *, int); \
        if (refuse(OPEN, AT_FDCWD, path)) return -1; \
        return remember(real(path, flags), WRITES(flags)); }
#define FOPEN_AS(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        int writes = strpbrk(mode, "wa+") != NULL; \
        if (refuse(writes ? CREATE : OPEN, AT_FDCWD, path)) return NULL; \
        FILE *file = real(path, mode); \
        if (file) remember(fileno(file), writes); \
        return file; }
#define CREAT_AS(name) \
    int name(const char *path, mode_t mode) { \
        REAL(int, name, const char *, mode_t); \
        if (refuse(CREATE, AT_FDCWD, path)) return -1; \
        return remember(real(path, mode), 1); }
OPEN_AS(open) OPEN_AS(open64) OPENAT_AS(openat) OPENAT_AS(openat64) OPEN2_AS(__open_2) OPEN2_AS(__open64_2)
FOPEN_AS(fopen) FOPEN_AS(fopen64) CREAT_AS(creat) CREAT_AS(creat64)

#define READ_AS(name, op, type, types, names, file) \
    type name types { \
        REAL(type, name, OPEN_TYPES types); \
        if (refuse_file(op, file)) return (type)-1; \
        return real names; }
#define OPEN_TYPES(...) __VA_ARGS__
READ_AS(read, READ, ssize_t, (int file, void *to, size_t size), (file, to, size), file)
READ_AS(__read_chk, READ, ssize_t, (int file, void *to, size_t size, size_t room), (file, to, size, room), file)
READ_AS(pread, READ, ssize_t, (int file, void *to, size_t size, off_t at), (file, to, size, at), file)
READ_AS(pread64, READ, ssize_t, (int file, void *to, size_t size, off64_t at), (file, to, size, at), file)
READ_AS(readv, READ, ssize_t, (int file, const struct iovec *to, int count), (file, to, count), file)
READ_AS(ftruncate, TRUNCATE, int, (int file, off_t size), (file, size), file)
READ_AS(ftruncate64, TRUNCATE, int, (int file, off64_t size), (file, size), file)
READ_AS(fsync, FSYNC, int, (int file), (file), file)
READ_AS(fdatasync, FSYNC, int, (int file), (file), file)
READ_AS(mmap, MAP, void *, (void *to, size_t size, int how, int flags, int file, off_t at),
        (to, size, how, flags, file, at), file)
READ_AS(mmap64, MAP, void *, (void *to, size_t size, int how, int flags, int file, off64_t at),
        (to, size, how, flags, file, at), file)

/* A write that fails, or in which the process dies, leaves half of its bytes behind. */
#define WRITE_AS(name, types, names, half) \
    ssize_t name types { \
        REAL(ssize_t, name, OPEN_TYPES types); \
        char whole[PATH_MAX]; int result = FINE; \
        if (fault.armed && file >= 0 && file < (int)sizeof ours && ours[file] && of(file, whole)) \
            result = verdict(WRITE, whole); \
        if (result) { if (size > 1 && real half < 0) {} } \
        if (result == DIE) die(); \
        if (result) { errno = result; return -1; } \
        return real names; }
WRITE_AS(write, (int file, const void *from, size_t size), (file, from, size), (file, from, size / 2))
WRITE_AS(pwrite, (int file, const void *from, size_t size, off_t at), (file, from, size, at), (file, from, size / 2, at))
WRITE_AS(pwrite64, (int file, const void *from, size_t size, off64_t at), (file, from, size, at),
         (file, from, size / 2, at))
WRITE_AS(writev, (int file, const struct iovec *from, int size), (file, from, size), (file, from, size / 2))

#define COPY_AS(name, types, names, half, source, target) \
    ssize_t name types { \
        REAL(ssize_t, name, OPEN_TYPES types); \
        char whole[PATH_MAX]; int result = FINE; \
        if (refuse_file(READ, source)) return -1; \
        if (fault.armed && target >= 0 && target < (int)sizeof ours && ours[target] && of(target, whole)) \
            result = verdict(WRITE, whole); \
        if (result) { struct stat about; size = fstat(source, &about) || size < (size_t)about.st_size ? size : about.st_size; \
                      if (size > 1 && real half < 0) {} } \
        if (result == DIE) die(); \
        if (result) { errno = result; return -1; } \
        return real names; }
COPY_AS(sendfile, (int to, int from, off_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2), from, to)
COPY_AS(sendfile64, (int to, int from, off64_t *at, size_t size), (to, from, at, size), (to, from, at, size / 2),
        from, to)
COPY_AS(copy_file_range, (int from, off64_t *at, int to, off64_t *where, size_t size, unsigned int flags),
        (from, at, to, where, size, flags), (from, at, to, where, size / 2, flags), from, to)

int close(int file) { /* closes in any case: a mounted Drive reports here what it could not write */
    REAL(int, close, int);
    int bad = file >= 0 && file < (int)sizeof ours && ours[file] == 2 && refuse_file(CLOSE, file), error = errno;
    if (file >= 0 && file < (int)sizeof ours) ours[file] = 0;
    int result = real(file);
    if (bad) { errno = error; return -1; }
    return result;
}

#define PATH_AS(name, op, at, type, fails, types, names) \
    type name types { \
        REAL(type, name, OPEN_TYPES types); \
        if (refuse(op, at, path)) return fails; \
        return real names; }
#define HERE AT_FDCWD
PATH_AS(stat, STAT, HERE, int, -1, (const char *path, struct stat *to), (path, to))
PATH_AS(stat64, STAT, HERE, int, -1, (const char *path, struct stat64 *to), (path, to))
PATH_AS(lstat, STAT, HERE, int, -1, (const char *path, struct stat *to), (path, to))
PATH_AS(lstat64, STAT, HERE, int, -1, (const char *path, struct stat64 *to), (path, to))
PATH_AS(fstatat, STAT, at, int, -1, (int at, const char *path, struct stat *to, int flags), (at, path, to, flags))
PATH_AS(fstatat64, STAT, at, int, -1, (int at, const char *path, struct stat64 *to, int flags), (at, path, to, flags))
PATH_AS(statx, STAT, at, int, -1, (int at, const char *path, int flags, unsigned int mask, struct statx *to),
        (at, path, flags, mask, to))
PATH_AS(access, STAT, HERE, int, -1, (const char *path, int how), (path, how))
PATH_AS(statvfs, STAT, HERE, int, -1, (const char *path, struct statvfs *to), (path, to))
PATH_AS(statvfs64, STAT, HERE, int, -1, (const char *path, struct statvfs64 *to), (path, to))
PATH_AS(opendir, LIST, HERE, DIR *, NULL, (const char *path), (path))
PATH_AS(unlink, UNLINK, HERE, int, -1, (const char *path), (path))
PATH_AS(unlinkat, UNLINK, at, int, -1, (int at, const char *path, int flags), (at, path, flags))
PATH_AS(rmdir, UNLINK, HERE, int, -1, (const char *path), (path))
PATH_AS(mkdir, MKDIR, HERE, int, -1, (const char *path, mode_t mode), (path, mode))
PATH_AS(mkdirat, MKDIR, at, int, -1, (int at, const char *path, mode_t mode), (at, path, mode))
PATH_AS(truncate, TRUNCATE, HERE, int, -1, (const char *path, off_t size), (path, size))
PATH_AS(truncate64, TRUNCATE, HERE, int, -1, (const char *path, off64_t size), (path, size))
PATH_AS(chmod, TOUCH, HERE, int, -1, (const char *path, mode_t mode), (path, mode))
PATH_AS(utimensat, TOUCH, at, int, -1, (int at, const char *path, const struct timespec *times, int flags),
        (at, path, times, flags))
PATH_AS(link, LINK, HERE, int, -1, (const char *source, const char *path), (source, path))
PATH_AS(symlink, LINK, HERE, int, -1, (const char *source, const char *path), (source, path))
PATH_AS(linkat, LINK, at, int, -1, (int from, const char *source, int at, const char *path, int flags),
        (from, source, at, path, flags))
PATH_AS(symlinkat, LINK, at, int, -1, (const char *source, int at, const char *path), (source, at, path))

DIR *fdopendir(int file) {
    REAL(DIR *, fdopendir, int);
    if (refuse(LIST, file, "")) return NULL;
    return real(file);
}

/* Of a rename both names are asked, the new one first: it is the moment at which something gets its finished name. */
#define RENAME_AS(name, types, names, from, to) \
    int name types { \
        REAL(int, name, OPEN_TYPES types); \
        char one[PATH_MAX], other[PATH_MAX]; size_t length = strlen(fault.folder); \
        if (fault.armed && absolute(from, old, one) && absolute(to, new, other)) { \
            int inside = !strncmp(other, fault.folder, length) && (!other[length] || other[length] == '/'); \
            if (refuse(RENAME, AT_FDCWD, inside ? other : one)) return -1; \
        } \
        return real names; }
RENAME_AS(rename, (const char *old, const char *new), (old, new), AT_FDCWD, AT_FDCWD)
RENAME_AS(renameat, (int from, const char *old, int to, const char *new), (from, old, to, new), from, to)
RENAME_AS(renameat2, (int from, const char *old, int to, const char *new, unsigned int flags),
          (from, old, to, new, flags), from, to)

/* ---- arming ------------------------------------------------------------------------------------------------------ */

void faults_arm(const char *folder, long seed, double share, const char *broken, long broken_from, long kill_at,
                long raise_at, long number, const char *counted, const char *match, const char *log) {
    pthread_mutex_lock(&lock);
    memset(&fault, 0, sizeof fault);
    free(seen); seen = NULL;
    snprintf(fault.folder, sizeof fault.folder, "%s", folder);
    snprintf(fault.broken, sizeof fault.broken, "%s", broken);
    snprintf(fault.counted, sizeof fault.counted, "%s", counted);
    snprintf(fault.match, sizeof fault.match, "%s", match);
    snprintf(fault.log, sizeof fault.log, "%s", log);
    fault.seed = seed; fault.share = share; fault.broken_from = broken_from;
    fault.kill_at = kill_at; fault.raise_at = raise_at; fault.number = number;
    fault.armed = folder[0] != 0;
    pthread_mutex_unlock(&lock);
}

long faults_count(void) { return fault.count; }

static void take(void) { pthread_mutex_lock(&lock); }
static void give(void) { pthread_mutex_unlock(&lock); }

__attribute__((constructor)) static void begin(void) {
    pthread_atfork(take, give, give); /* a fork while another thread is in here */
    const char *line = getenv("RECIPES_FAULTS");
    char field[11][PATH_MAX] = {{0}};
    if (!line) return;
    for (int i = 0; i < 11; i++) {
        size_t length = strcspn(line, "\n");
        if (length >= PATH_MAX) abort();
        memcpy(field[i], line, length);
        line += length + (line[length] == '\n');
    }
    faults_arm(field[0], atol(field[1]), atof(field[2]), field[3], atol(field[4]), atol(field[5]), atol(field[6]),
               atol(field[7]), field[8], field[9], field[10]);
}

/* ---- a process that already runs --------------------------------------------------------------------------------- */

#define HOOK(name) {#name, (void *)name}
static const struct { const char *name; void *function; } HOOKS[] = {
    HOOK(open), HOOK(open64), HOOK(openat), HOOK(openat64), HOOK(__open_2), HOOK(__open64_2), HOOK(fopen),
    HOOK(fopen64), HOOK(creat), HOOK(creat64), HOOK(read), HOOK(__read_chk), HOOK(pread), HOOK(pread64), HOOK(readv),
    HOOK(ftruncate), HOOK(ftruncate64), HOOK(fsync), HOOK(fdatasync), HOOK(mmap), HOOK(mmap64), HOOK(write),
    HOOK(pwrite), HOOK(pwrite64), HOOK(writev), HOOK(sendfile), HOOK(sendfile64), HOOK(copy_file_range), HOOK(close),
    HOOK(stat), HOOK(stat64), HOOK(lstat), HOOK(lstat64), HOOK(fstatat), HOOK(fstatat64), HOOK(statx), HOOK(access),
    HOOK(statvfs), HOOK(statvfs64), HOOK(opendir), HOOK(fdopendir), HOOK(unlink), HOOK(unlinkat), HOOK(rmdir),
    HOOK(mkdir), HOOK(mkdirat), HOOK(truncate), HOOK(truncate64), HOOK(chmod), HOOK(utimensat), HOOK(link),
    HOOK(symlink), HOOK(linkat), HOOK(symlinkat), HOOK(rename), HOOK(renameat), HOOK(renameat2)};

#if defined(__x86_64__)
enum { SLOT = R_X86_64_JUMP_SLOT, DATA = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { SLOT = R_AARCH64_JUMP_SLOT, DATA = R_AARCH64_GLOB_DAT };
#else
#error "the relocations of this processor are not known here"
#endif

static void patch(uintptr_t base, const Elf64_Rela *entry, size_t bytes, const Elf64_Sym *symbols, const char *names) {
    for (const Elf64_Rela *end = entry + bytes / sizeof *entry; entry && entry < end; entry++) {
        unsigned type = ELF64_R_TYPE(entry->r_info);
        if (type != SLOT && type != DATA) continue;
        const char *name = names + symbols[ELF64_R_SYM(entry->r_info)].st_name;
        for (size_t i = 0; i < sizeof HOOKS / sizeof *HOOKS; i++) {
            if (strcmp(name, HOOKS[i].name)) continue;
            void **slot = (void **)(base + entry->r_offset);
            uintptr_t page = (uintptr_t)slot & ~(uintptr_t)(sysconf(_SC_PAGESIZE) - 1);
            if (*slot == HOOKS[i].function) continue;
            mprotect((void *)page, sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE);
            *slot = HOOKS[i].function;
        }
    }
}

static int object(struct dl_phdr_info *info, size_t size, void *self) {
    (void)size;
    if (info->dlpi_addr == *(uintptr_t *)self || strstr(info->dlpi_name, "/ld-") || strstr(info->dlpi_name, "/libc.so") ||
        strstr(info->dlpi_name, "vdso"))
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_DYNAMIC) continue;
        const Elf64_Rela *slots = NULL, *data = NULL;
        size_t slot_bytes = 0, data_bytes = 0;
        const Elf64_Sym *symbols = NULL;
        const char *names = NULL;
        for (const Elf64_Dyn *at = (void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr); at->d_tag; at++) {
            if (at->d_tag == DT_JMPREL) slots = (void *)at->d_un.d_ptr;
            if (at->d_tag == DT_PLTRELSZ) slot_bytes = at->d_un.d_val;
            if (at->d_tag == DT_RELA) data = (void *)at->d_un.d_ptr;
            if (at->d_tag == DT_RELASZ) data_bytes = at->d_un.d_val;
            if (at->d_tag == DT_SYMTAB) symbols = (void *)at->d_un.d_ptr;
            if (at->d_tag == DT_STRTAB) names = (void *)at->d_un.d_ptr;
        }
        if (!symbols || !names) continue;
        patch(info->dlpi_addr, slots, slot_bytes, symbols, names);
        patch(info->dlpi_addr, data, data_bytes, symbols, names);
    }
    return 0;
}

void faults_patch(void) { /* every library that is loaded now; one that is loaded later needs another call */
    Dl_info self;
    uintptr_t base = dladdr((void *)faults_patch, &self) ? (uintptr_t)self.dli_fbase : 0;
    dl_iterate_phdr(object, &base);
}

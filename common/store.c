/*
 * store.c - names, folders, and what lies about in them.
 */
#define _GNU_SOURCE /* flock */

#include "common/store.h"

#include "common/digest.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define JOURNAL_END   ".journal"
#define LOG_END       ".log"
#define PREPARE_TRIES 100
#define SETTLED_S     10

static void default_dir(char *out, size_t cap)
{
    (void)snprintf(out, cap, "/dev/shm/fovea-%u", (unsigned)getuid());
}

static const char *or_default(const char *dir, char scratch[64])
{
    default_dir(scratch, 64);
    return ((dir == NULL) || (dir[0] == '\0')) ? scratch : dir;
}

static bool is_job_name(const char *job)
{
    size_t n = strlen(job);

    for (size_t i = 0; i < n; i++) {
        if ((isalnum((unsigned char)job[i]) == 0) && (strchr("._-", job[i]) == NULL)) {
            return false;
        }
    }
    return (n > 0) && (n < FV_JOURNAL_JOB_BYTES) && (job[0] != '.');
}

fv_status_t fv_store_place_make(const char *dir,
                                const char *job,
                                uint32_t slot,
                                uint32_t n_slots,
                                fv_store_place_t *out)
{
    char scratch[64];
    fv_store_place_t place = {.slot = slot, .n_slots = n_slots, .wait_ms = 3000};

    if (!is_job_name(job)) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "job: given \"%s\", expected 1..63 letters, digits, '.', '_' or '-'", job);
    }
    if (slot >= FV_STORE_SLOTS_MAX) {
        return fv_fail(FV_ERR_INVALID_ARG, "store: slot %u, expected less than %u", slot,
                       FV_STORE_SLOTS_MAX);
    }
    int n = snprintf(place.dir, sizeof(place.dir), "%s/%s", or_default(dir, scratch), job);
    if (n >= (int)sizeof(place.dir)) {
        return fv_fail(FV_ERR_INVALID_ARG, "store_dir: given %s, expected a shorter path", dir);
    }
    (void)snprintf(place.job, sizeof(place.job), "%s", job);
    *out = place;
    return FV_OK;
}

fv_status_t fv_store_place_disk(fv_store_place_t *place, const char *disk_dir)
{
    int n = snprintf(place->disk_dir, sizeof(place->disk_dir), "%s/%s", disk_dir, place->job);

    return (n < (int)sizeof(place->disk_dir))
               ? FV_OK
               : fv_fail(FV_ERR_INVALID_ARG, "disk_dir: given %s, expected a shorter path",
                         disk_dir);
}

/* A folder of ours that nobody else writes to, nor has put a link in the place of. */
static fv_status_t make_dir(const char *path)
{
    struct stat info = {0};

    if ((mkdir(path, 0700) != 0) && (errno != EEXIST)) {
        return fv_fail(FV_ERR_SYSTEM,
                       "store_dir: cannot make %s: %s; name another one, or set durability to none",
                       path, strerror(errno));
    }
    if (lstat(path, &info) != 0) {
        return fv_fail(FV_ERR_SYSTEM, "store_dir: %s: %s", path, strerror(errno));
    }
    if (!S_ISDIR(info.st_mode) || (info.st_uid != geteuid()) ||
        ((info.st_mode & (S_IWGRP | S_IWOTH)) != 0)) {
        return fv_fail(
            FV_ERR_PERMISSION,
            "store_dir: %s, expected a folder (no link) that this user alone may write to", path);
    }
    return FV_OK;
}

static fv_status_t prepare(const char *dir)
{
    char base[FV_STORE_DIR_BYTES];

    (void)snprintf(base, sizeof(base), "%s", dir);
    *strrchr(base, '/') = '\0';
    fv_status_t status = FV_ERR_SYSTEM;
    for (int i = 0; (i < PREPARE_TRIES) && (status == FV_ERR_SYSTEM); i++) {
        status = make_dir(base); /* another service may take it away again while it is empty */
        if (status == FV_OK) {
            status = make_dir(dir);
        }
    }
    return status;
}

fv_status_t fv_store_prepare(const fv_store_place_t *place)
{
    FV_RETURN_IF_ERR(prepare(place->dir));
    return (place->disk_dir[0] == '\0') ? FV_OK : prepare(place->disk_dir);
}

void fv_store_path(const fv_store_place_t *place,
                   fv_store_file_t file,
                   char out[FV_STORE_PATH_BYTES])
{
    switch (file) {
    case FV_STORE_TABLES:
        (void)snprintf(out, FV_STORE_PATH_BYTES, "%s/slot-%04u" JOURNAL_END, place->dir,
                       place->slot);
        break;
    case FV_STORE_PAGES:
        (void)snprintf(out, FV_STORE_PATH_BYTES, "%s/slot-%04u.kv", place->dir, place->slot);
        break;
    case FV_STORE_LOG:
        (void)snprintf(out, FV_STORE_PATH_BYTES, "%s/slot-%04u" LOG_END, place->disk_dir,
                       place->slot);
        break;
    case FV_STORE_COORDINATOR_LOG:
        (void)snprintf(out, FV_STORE_PATH_BYTES, "%s/coordinator" LOG_END, place->disk_dir);
        break;
    case FV_STORE_COORDINATOR:
    default:
        (void)snprintf(out, FV_STORE_PATH_BYTES, "%s/coordinator" JOURNAL_END, place->dir);
        break;
    }
}

static void leave(const char *dir)
{
    char base[FV_STORE_DIR_BYTES];

    (void)snprintf(base, sizeof(base), "%s", dir);
    *strrchr(base, '/') = '\0';
    (void)rmdir(dir); /* the last one succeeds */
    (void)rmdir(base);
}

void fv_store_leave(const fv_store_place_t *place)
{
    leave(place->dir);
    if (place->disk_dir[0] != '\0') {
        leave(place->disk_dir);
    }
}

void fv_store_job_name(const char *address, char out[FV_JOURNAL_JOB_BYTES])
{
    char full[1024];
    const char *path = (strncmp(address, "unix:", 5) == 0) ? (address + 5) : NULL;
    const char *colon = strrchr(address, ':');
    char cwd[512] = "";

    out[0] = '\0';
    if ((path == NULL) && ((colon == NULL) || (strcmp(colon, ":0") == 0))) {
        return;
    }
    if ((path != NULL) && (path[0] != '/') && (getcwd(cwd, sizeof(cwd)) != NULL)) {
        (void)snprintf(full, sizeof(full), "%s/%s", cwd, path);
    } else {
        (void)snprintf(full, sizeof(full), "%s", (path != NULL) ? path : address);
    }
    size_t n = strlen(full);
    const char *end = full + ((n > 40U) ? (n - 40U) : 0U); /* what differs is mostly at the end */
    int at = snprintf(out, FV_JOURNAL_JOB_BYTES, "%s-", (path != NULL) ? "unix" : "tcp");
    for (; *end != '\0'; end++) {
        out[at++] =
            ((isalnum((unsigned char)*end) != 0) || (strchr("._", *end) != NULL)) ? *end : '-';
    }
    (void)snprintf(out + at, (size_t)(FV_JOURNAL_JOB_BYTES - at), "-%08x", fv_crc32c(0, full, n));
}

bool fv_store_space(const fv_store_place_t *place, uint64_t *out_free, uint64_t *out_total)
{
    struct statvfs fs;

    if (statvfs(place->dir, &fs) != 0) {
        return false;
    }
    *out_free = (uint64_t)fs.f_bavail * fs.f_frsize;
    *out_total = (uint64_t)fs.f_blocks * fs.f_frsize;
    return *out_total > 0U;
}

/* ------------------------------------------------------------------ all jobs */

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name);
    size_t n_end = strlen(end);

    return (n >= n_end) && (strcmp(name + n - n_end, end) == 0);
}

static bool is_store_file(const char *name)
{
    return ((strncmp(name, "slot-", 5) == 0) || (strncmp(name, "coordinator.", 12) == 0)) &&
           (ends_with(name, JOURNAL_END) || ends_with(name, JOURNAL_END ".new") ||
            ends_with(name, JOURNAL_END ".damaged") || ends_with(name, ".kv") ||
            ends_with(name, LOG_END) || ends_with(name, LOG_END ".new") ||
            ends_with(name, LOG_END ".damaged"));
}

fv_status_t fv_store_each(const char *dir, fv_store_visit_t visit, void *arg)
{
    char scratch[64];
    char path[FV_STORE_DIR_BYTES];
    const char *base = or_default(dir, scratch);
    DIR *jobs = opendir(base);

    if (jobs == NULL) {
        return (errno == ENOENT) ? FV_OK : fv_fail(FV_ERR_SYSTEM, "%s: %s", base, strerror(errno));
    }
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): a DIR of our own */
    for (struct dirent *e = readdir(jobs); e != NULL; e = readdir(jobs)) {
        struct stat info;

        if (!is_job_name(e->d_name) ||
            (snprintf(path, sizeof(path), "%s/%s", base, e->d_name) >= (int)sizeof(path)) ||
            (lstat(path, &info) != 0) || !S_ISDIR(info.st_mode)) {
            continue;
        }
        if (!visit(arg, path, e->d_name)) {
            break;
        }
    }
    (void)closedir(jobs);
    return FV_OK;
}

/* Calls use(path) for each file of a job until one returns false. */
static bool each_file(const char *job_dir, bool (*use)(const char *path))
{
    char path[FV_STORE_PATH_BYTES];
    bool is_fine = true;
    DIR *files = opendir(job_dir);

    if (files == NULL) {
        return errno == ENOENT;
    }
    /* NOLINTNEXTLINE(concurrency-mt-unsafe): a DIR of our own */
    for (struct dirent *e = readdir(files); is_fine && (e != NULL); e = readdir(files)) {
        if (is_store_file(e->d_name) &&
            (snprintf(path, sizeof(path), "%s/%s", job_dir, e->d_name) < (int)sizeof(path))) {
            is_fine = use(path);
        }
    }
    (void)closedir(files);
    return is_fine;
}

/* A slot's files belong to whoever has its journal locked, slot-0002.kv goes by slot-0002.journal; or its log, on a disk. */
static bool lock_path(const char *path, char out[FV_STORE_PATH_BYTES])
{
    const char *name = strrchr(path, '/');
    int n_dir = (name == NULL) ? 0 : (int)(name + 1 - path);
    int n_stem = (int)strcspn(path + n_dir, ".");
    bool is_log = strncmp(path + n_dir + n_stem, LOG_END, strlen(LOG_END)) == 0;

    return snprintf(out, FV_STORE_PATH_BYTES, "%.*s%s", n_dir + n_stem, path,
                    is_log ? LOG_END : JOURNAL_END) < FV_STORE_PATH_BYTES;
}

/*
 * The lock of a file's journal, which is made for it where there is none: a service that begins meanwhile has to wait. -1:
 * a process has it; or one may have it, for it can not be looked at.
 */
static int lock_of(const char *path, char journal[FV_STORE_PATH_BYTES])
{
    struct stat held;
    struct stat named;
    int fd = lock_path(path, journal)
                 ? open(journal, O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600)
                 : -1;

    if (fd < 0) {
        return -1;
    }
    if ((fstat(fd, &held) != 0) || !S_ISREG(held.st_mode) || (flock(fd, LOCK_EX | LOCK_NB) != 0) ||
        (stat(journal, &named) != 0) || (held.st_ino != named.st_ino) ||
        (held.st_dev != named.st_dev)) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

/* What was made for the lock goes with it. */
static void unlock(int fd, const char *journal)
{
    struct stat info;

    if ((fstat(fd, &info) == 0) && (info.st_size == 0)) {
        (void)unlink(journal);
    }
    (void)close(fd);
}

/* Only what is not there is nobody's for certain; that it can not be opened says nothing. */
static bool is_free(const char *path)
{
    char journal[FV_STORE_PATH_BYTES];
    struct stat held;

    if (!lock_path(path, journal)) {
        return false;
    }
    int fd = open(journal, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) {
        return errno == ENOENT;
    }
    bool is_ours =
        (fstat(fd, &held) == 0) && S_ISREG(held.st_mode) && (flock(fd, LOCK_EX | LOCK_NB) == 0);
    (void)close(fd);
    return is_ours;
}

/* False: it is used, or could not be deleted (errno). */
static bool delete_free(const char *path)
{
    char journal[FV_STORE_PATH_BYTES];
    struct stat info;

    if ((lstat(path, &info) != 0) && (errno == ENOENT)) {
        return true;
    }
    int fd = lock_of(path, journal);
    if (fd < 0) {
        errno = EBUSY;
        return false;
    }
    bool is_gone = (unlink(path) == 0) || (errno == ENOENT);
    unlock(fd, journal);
    return is_gone;
}

bool fv_store_is_used(const char *job_dir)
{
    return !each_file(job_dir, is_free);
}

fv_status_t fv_store_delete(const char *job_dir)
{
    if (fv_store_is_used(job_dir)) {
        return fv_fail(FV_ERR_PRECONDITION, "%s is in use by a running service", job_dir);
    }
    if (!each_file(job_dir, delete_free) || ((rmdir(job_dir) != 0) && (errno != ENOENT))) {
        return fv_fail(FV_ERR_SYSTEM, "%s: %s", job_dir, strerror(errno));
    }
    return FV_OK;
}

fv_status_t fv_store_delete_file(const char *path)
{
    if (delete_free(path)) {
        return FV_OK;
    }
    return (errno == EBUSY)
               ? fv_fail(FV_ERR_PRECONDITION, "%s is in use by a running service", path)
               : fv_fail(FV_ERR_SYSTEM, "%s: %s", path, strerror(errno));
}

static bool clear_one(const char *path)
{
    (void)delete_free(path);
    return true;
}

void fv_store_clear(const fv_store_place_t *place)
{
    (void)each_file(place->dir, clear_one);
    if (place->disk_dir[0] != '\0') {
        (void)each_file(place->disk_dir, clear_one);
    }
}

/* Not one that just begins, and holds no lock yet. */
static bool is_settled(const char *dir)
{
    struct stat info;

    return (stat(dir, &info) == 0) && (info.st_mtime + SETTLED_S < time(NULL));
}

static bool sweep_one(void *arg, const char *dir, const char *job)
{
    uint32_t *n_swept = arg;

    if ((strncmp(job, FV_STORE_ANONYMOUS, strlen(FV_STORE_ANONYMOUS)) == 0) && is_settled(dir) &&
        (fv_store_delete(dir) == FV_OK)) {
        (*n_swept)++;
    }
    return true;
}

uint32_t fv_store_sweep(const char *dir)
{
    uint32_t n_swept = 0;

    return (fv_store_each(dir, sweep_one, &n_swept) == FV_OK) ? n_swept : 0U;
}

/*
 * disklog_scan.c - reads a log, whatever has become of it.
 *
 * Twice: once for which batches there are, which got through, and where the last snapshot begins; then for what they say.
 */
#include "common/disklog.h"
#include "common/disklog_format.h"

#define HOLE_BYTES sizeof(fv_journal_disk_record_t)

/* A batch as it was found; or what was found where there should be one. */
typedef struct batch {
    size_t begin, end; /* of its records */
    fv_disklog_batch_t said;
    bool is_whole;
    bool is_gap; /* no head can be made out; said.n_records: what is there is all, or UINT32_MAX */
    bool may_be_older; /* a gap, and said.snapshot is a guess: that of the batch behind it */
} batch_t;

typedef struct walk {
    const uint8_t *data;
    size_t n_bytes;
    size_t end; /* of the last batch */
    uint64_t next_number;
    uint32_t snapshot; /* of the last batch whose head could be read; 0: of none */
} walk_t;

/* What the first reading found. */
typedef struct found {
    size_t end;            /* of the last batch that counts */
    uint64_t n_batches;    /* the number of the last one */
    uint32_t snapshot;     /* the last whole one; 0: none */
    size_t snapshot_end;   /* its last batch's end */
    bool has_damaged_tail; /* behind `end`, not torn */
} found_t;

static size_t last_byte(const uint8_t *data, size_t begin, size_t n_bytes)
{
    while ((n_bytes > begin) && (data[n_bytes - 1U] == 0U)) {
        n_bytes--;
    }
    return n_bytes;
}

/* ------------------------------------------------------------------ batches */

/* Records that follow each other from `begin` to `end`, all of them whole; UINT32_MAX: something else is there. */
static uint32_t count_whole(const uint8_t *data, size_t begin, size_t end)
{
    fv_journal_disk_record_t disk;
    uint32_t n = 0;

    for (size_t at = begin; at < end; at += fv_journal_size(disk.n_bytes)) {
        if (!fv_journal_read_record(data, end, at, &disk) ||
            (fv_crc32c(0, data + at + sizeof(disk), disk.n_bytes) != disk.body_crc)) {
            return UINT32_MAX;
        }
        n++;
    }
    return n;
}

static bool read_batch(const walk_t *walk, size_t at, batch_t *out, uint64_t *out_number)
{
    fv_journal_disk_record_t disk;

    if (!fv_journal_read_record(walk->data, walk->n_bytes, at, &disk) ||
        (disk.type != FV_DISKLOG_BATCH) || (disk.n_bytes != sizeof(out->said)) ||
        (fv_crc32c(0, walk->data + at + sizeof(disk), disk.n_bytes) != disk.body_crc)) {
        return false;
    }
    *out = (batch_t){.begin = at + FV_DISKLOG_BATCH_BYTES};
    memcpy(&out->said, walk->data + at + sizeof(disk), sizeof(out->said));
    *out_number = disk.number;
    return (out->said.n_bytes % 8U == 0U) && (disk.number >= walk->next_number);
}

/* Between batches, or behind the last, where a head should be. */
static void make_gap(const walk_t *walk, size_t end, uint32_t snapshot, batch_t *out)
{
    size_t begin = walk->end + FV_DISKLOG_BATCH_BYTES;
    uint32_t n = (begin < end) ? count_whole(walk->data, begin, end) : UINT32_MAX;

    *out = (batch_t){.begin = (n == UINT32_MAX) ? walk->end : begin,
                     .end = end,
                     .said = {.n_records = n, .snapshot = snapshot},
                     .is_whole = n != UINT32_MAX,
                     .is_gap = true};
}

/* Nothing but the head of the last batch may have been hit. */
static bool next_is_tail(walk_t *walk, batch_t *out)
{
    size_t end = (last_byte(walk->data, walk->end, walk->n_bytes) + 7U) & ~(size_t)7U;

    if ((end <= walk->end + FV_DISKLOG_BATCH_BYTES) || (end > walk->n_bytes)) {
        return false;
    }
    make_gap(walk, end, 0, out);
    walk->end = out->is_whole ? end : walk->end;
    walk->next_number += out->is_whole ? 1U : 0U;
    return out->is_whole;
}

/* The next one that can be made out, or what lies before it. One that ends behind the file: out->end is the file's. */
static bool next_batch(walk_t *walk, batch_t *out)
{
    uint64_t number = 0;

    for (size_t at = walk->end;
         (at <= walk->n_bytes) && (walk->n_bytes - at >= FV_DISKLOG_BATCH_BYTES); at += 8U) {
        if (!read_batch(walk, at, out, &number)) {
            continue;
        }
        if (at != walk->end) {
            make_gap(walk, at, out->said.snapshot, out);
            out->is_whole = out->is_whole && (number == walk->next_number + 1U);
            out->said.n_records = out->is_whole ? out->said.n_records : UINT32_MAX;
            out->may_be_older = out->said.snapshot != walk->snapshot;
            walk->next_number = number; /* what it lacks is said */
            walk->end = at;
            return true;
        }
        bool is_inside = out->said.n_bytes <= walk->n_bytes - out->begin;
        out->end = is_inside ? (out->begin + (size_t)out->said.n_bytes) : walk->n_bytes;
        out->is_whole =
            is_inside && (count_whole(walk->data, out->begin, out->end) == out->said.n_records);
        walk->next_number = number + 1U;
        walk->snapshot = out->said.snapshot;
        walk->end = out->end;
        return true;
    }
    return next_is_tail(walk, out);
}

static bool is_zeros(const uint8_t *data, size_t begin, size_t end)
{
    for (size_t i = begin; i < end; i++) {
        if (data[i] != 0U) {
            return false;
        }
    }
    return begin < end;
}

/* A sector of these bytes, which begin with a record, was not written, or the file ends first. */
static bool lacks_sector(const uint8_t *data, size_t n_bytes, size_t begin, uint64_t end)
{
    bool lacks = end > n_bytes;

    for (size_t at = begin; !lacks && (at < end);) {
        size_t next = (at / FV_DISKLOG_SECTOR + 1U) * FV_DISKLOG_SECTOR;
        size_t until = (next < end) ? next : (size_t)end;
        lacks = is_zeros(data, at, until);
        at = until;
    }
    return lacks;
}

/* Behind the last batch that got through: nothing, one that did not, or something that was damaged. */
static bool has_damaged_tail(const uint8_t *data, size_t n_bytes, size_t end)
{
    size_t last = last_byte(data, end, n_bytes);

    return (last - end > FV_DISKLOG_BATCH_BYTES) && !lacks_sector(data, n_bytes, end, last);
}

/* The last batch is not whole: was it ever? */
static bool is_torn(const uint8_t *data, size_t n_bytes, const batch_t *batch)
{
    return !batch->is_whole && !batch->is_gap &&
           lacks_sector(data, n_bytes, batch->begin, batch->begin + batch->said.n_bytes);
}

static void look(const uint8_t *data, size_t n_bytes, found_t *out)
{
    walk_t walk = {.data = data, .n_bytes = n_bytes, .next_number = 1};
    batch_t batch;
    batch_t last = {0};
    bool has_last = false;
    size_t before = 0;

    *out = (found_t){0};
    while (next_batch(&walk, &batch)) {
        before = has_last ? last.end : 0U;
        last = batch;
        has_last = true;
        if ((batch.said.is_last != 0U) && batch.is_whole) {
            out->snapshot = batch.said.snapshot;
            out->snapshot_end = batch.end;
        }
    }
    out->n_batches = walk.next_number - 1U;
    out->end = walk.end;
    if (has_last && is_torn(data, n_bytes, &last)) {
        out->end = before;
        out->n_batches--;
        return;
    }
    out->has_damaged_tail = has_damaged_tail(data, n_bytes, out->end);
}

/* ------------------------------------------------------------------ records */

typedef struct play {
    const uint8_t *data;
    const fv_disklog_reader_t *reader;
    fv_journal_report_t *report;
    const found_t *found;
} play_t;

/* What a snapshot says takes the place of all before it; one that was not finished says nothing. */
static bool batch_has_tables(const play_t *play, const batch_t *batch)
{
    return batch->said.snapshot ==
           ((batch->end <= play->found->snapshot_end) ? play->found->snapshot : 0U);
}

static fv_status_t give_table(const play_t *play, size_t begin, size_t end)
{
    return ((end > begin) && (play->reader->table != NULL))
               ? play->reader->table(play->reader->arg, play->data + begin, end - begin)
               : FV_OK;
}

static fv_status_t give_hole(const play_t *play, const batch_t *batch)
{
    static const uint8_t k_hole[HOLE_BYTES] = {0xffU, 0xffU, 0xffU, 0xffU};

    play->report->n_holes++;
    return ((play->reader->table == NULL) || !batch_has_tables(play, batch))
               ? FV_OK
               : play->reader->table(play->reader->arg, k_hole, sizeof(k_hole));
}

static fv_status_t
play_record(const play_t *play, const batch_t *batch, const fv_journal_record_t *r, size_t at)
{
    const fv_disklog_reader_t *reader = play->reader;

    play->report->n_records += (r->body != NULL) ? 1U : 0U;
    play->report->n_damaged += (r->body != NULL) ? 0U : 1U;
    if (r->type >= FV_DISKLOG_PAGES) {
        return (reader->page == NULL) ? FV_OK : reader->page(reader->arg, r);
    }
    if (r->type >= FV_DISKLOG_OWN) {
        return FV_OK;
    }
    if (((r->flags & FV_JOURNAL_FIRST) != 0U) && (batch->said.snapshot == 0U) &&
        (reader->first != NULL)) {
        FV_RETURN_IF_ERR(reader->first(reader->arg, r));
    }
    return batch_has_tables(play, batch) ? give_table(play, at, at + fv_journal_size(r->n_bytes))
                                         : FV_OK;
}

static fv_status_t suspect(const play_t *play, uint32_t key)
{
    return (play->reader->suspect == NULL) ? FV_OK : play->reader->suspect(play->reader->arg, key);
}

/* The next record of a batch, wherever it is; false: there is none. */
static bool
next_record(const play_t *play, const batch_t *batch, size_t *at, fv_journal_record_t *out)
{
    fv_journal_disk_record_t disk;

    for (; *at < batch->end; *at += 8U) {
        if (fv_journal_read_record(play->data, batch->end, *at, &disk)) {
            const uint8_t *body = play->data + *at + sizeof(disk);
            bool is_body_whole = fv_crc32c(0, body, disk.n_bytes) == disk.body_crc;
            *out = (fv_journal_record_t){.type = disk.type,
                                         .flags = disk.flags,
                                         .key = disk.key,
                                         .n_bytes = disk.n_bytes,
                                         .number = disk.number,
                                         .body = is_body_whole ? body : NULL};
            return true;
        }
    }
    return false;
}

/*
 * Something of a batch is missing: pages of any key that it speaks of. Of which else is told by the numbers of its records -
 * unless a snapshot has come since: it has its own numbers, so that anybody may lack something. A snapshot's pages are known by
 * their places.
 */
static fv_status_t suspect_all(const play_t *play, const batch_t *batch)
{
    fv_journal_record_t record;

    for (size_t at = batch->begin; next_record(play, batch, &at, &record);
         at += fv_journal_size(record.n_bytes)) {
        FV_RETURN_IF_ERR(suspect(play, record.key));
    }
    return (batch->end <= play->found->snapshot_end) ? suspect(play, FV_DISKLOG_ANYBODY) : FV_OK;
}

static fv_status_t play_batch(const play_t *play, const batch_t *batch)
{
    fv_journal_record_t record;
    size_t end = batch->begin; /* of the records that follow each other from there */
    uint32_t n = 0;

    for (size_t at = batch->begin; next_record(play, batch, &at, &record);
         at += fv_journal_size(record.n_bytes)) {
        FV_RETURN_IF_ERR(play_record(play, batch, &record, at));
        end += (at == end) ? fv_journal_size(record.n_bytes) : 0U;
        n++;
    }
    play->report->n_damaged += (batch->is_gap && batch->is_whole) ? 1U : 0U; /* its head */
    /* found behind a head that is not: it may be of the bytes that a client gave, and makes up for no other */
    if ((n == batch->said.n_records) && (end == batch->end)) {
        return FV_OK;
    }
    FV_RETURN_IF_ERR(give_hole(play, batch));
    return ((batch->said.snapshot == 0U) || batch->may_be_older) ? suspect_all(play, batch) : FV_OK;
}

fv_status_t fv_disklog_scan(const uint8_t *data,
                            size_t n_bytes,
                            const fv_disklog_reader_t *reader,
                            fv_journal_report_t *out,
                            size_t *out_end,
                            uint64_t *out_n_batches)
{
    found_t found;
    const play_t play = {.data = data, .reader = reader, .report = out, .found = &found};
    batch_t batch;

    *out = (fv_journal_report_t){0};
    look(data, n_bytes, &found);
    walk_t walk = {.data = data, .n_bytes = found.end, .next_number = 1};
    while (next_batch(&walk, &batch)) {
        FV_RETURN_IF_ERR(play_batch(&play, &batch));
    }
    if (found.has_damaged_tail) {
        const batch_t nothing = {.end = SIZE_MAX};
        FV_RETURN_IF_ERR(give_hole(&play, &nothing));
    }
    out->n_bytes = found.end;
    out->tail_bytes = last_byte(data, found.end, n_bytes) - found.end;
    *out_end = found.end;
    *out_n_batches = found.n_batches;
    return FV_OK;
}

/*
 * config_table.h - the option table and the reading of one value. Private to common/.
 */
#ifndef FV_COMMON_CONFIG_TABLE_H
#define FV_COMMON_CONFIG_TABLE_H

#include "common/config.h"

#include <stddef.h>

typedef enum fv_option_type {
    FV_OPTION_BOOL,      /* bool */
    FV_OPTION_INT,       /* int32_t in min..max, a multiple of `multiple` */
    FV_OPTION_BYTES,     /* uint64_t in min..max; 512m */
    FV_OPTION_MEMORY,    /* fv_memory_limit_t; 512m or 90% */
    FV_OPTION_CHOICE,    /* char[FV_CONFIG_TEXT_BYTES], one word of `choices` */
    FV_OPTION_ADDRESS,   /* char[FV_CONFIG_TEXT_BYTES], "auto" or an address */
    FV_OPTION_PATH,      /* char[FV_CONFIG_PATH_BYTES], may be empty: none */
    FV_OPTION_ADDRESSES, /* fv_address_list_t; repeated, or separated by commas */
} fv_option_type_t;

typedef struct fv_option {
    const char *group; /* heading that begins here; NULL: the same as before */
    const char *name;  /* key; --name with '-' for '_'; FV_NAME in capitals */
    const char *arg;   /* how help calls the value */
    const char *value; /* default, as text */
    const char *help;
    fv_option_type_t type;
    size_t offset; /* in fv_config_t */
    uint64_t min, max;
    uint64_t multiple;   /* 0 = any */
    const char *choices; /* "auto cpu" */
} fv_option_t;

extern const fv_option_t fv_options[];
extern const size_t fv_n_options;

/* Where a value comes from; higher numbers win. */
typedef enum fv_source_kind {
    FV_SOURCE_DEFAULT = 0,
    FV_SOURCE_FILE,
    FV_SOURCE_ENV,
    FV_SOURCE_COMMAND_LINE,
} fv_source_kind_t;

typedef struct fv_source {
    fv_source_kind_t kind;
    const char *name; /* file or environment variable */
    int line;         /* FILE */
} fv_source_t;

#define FV_SOURCE_TEXT_BYTES 160
void fv_source_text(const fv_source_t *source, char out[FV_SOURCE_TEXT_BYTES]);

/* The option called `name`, NULL if there is none. */
const fv_option_t *fv_option_find(const char *name);

/* Reads `text` into the option's place in `config`. Errors: as fv_config_load(). */
FV_MUST_CHECK fv_status_t fv_option_set(const fv_option_t *option,
                                        const char *text,
                                        const fv_source_t *source,
                                        fv_config_t *config);

/* Sets what the file says. Errors: as fv_config_load(), with file and line; FV_ERR_NOT_FOUND. */
FV_MUST_CHECK fv_status_t fv_config_read_file(const char *path, fv_config_t *config);

/* Writes `key = value`, one line; a list takes one line an element. */
void fv_option_print(const fv_option_t *option, const fv_config_t *config, FILE *out);

/* "FV_KV_MEMORY" and "kv-memory" for kv_memory; cut to fit. */
void fv_option_env_name(const fv_option_t *option, char *out, size_t cap);
void fv_option_long_name(const fv_option_t *option, char *out, size_t cap);

/* What is allowed, in words: "0..1024", "auto, cpu or null". */
void fv_option_expected(const fv_option_t *option, char *out, size_t cap);

/* "512m" -> bytes; digits and at most one suffix of k, m, g, t. */
bool fv_bytes_parse(const char *text, uint64_t *out);

#endif /* FV_COMMON_CONFIG_TABLE_H */

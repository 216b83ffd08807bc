/*
 * scale_report.c - the scaling benchmark's figures as a table, JSON and CSV.
 */
#include "bench/scale/scale.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

static const char *const k_axes[] = {"heads", "context", "heads x context", "slices"};

static bool is_table(const fv_scale_result_t *result, const char *table)
{
    return strcmp(result->spec->table, table) == 0;
}

double fv_scale_tokens_per_second(const fv_scale_result_t *x)
{
    return (double)x->n_items * 1e6 / ((double)x->n_layers * x->device.p50);
}

/* Of KV, by the rank that holds most. */
static double token_bytes(const fv_scale_result_t *x)
{
    return x->kv_bytes / ((double)x->n_items * (double)x->n_tokens);
}

/* By the rank that holds most. */
static double held_bytes(const fv_scale_result_t *x)
{
    return (double)x->n_layers * x->kv_bytes;
}

void fv_scale_print_machine(const fv_scale_rank_t *r)
{
    (void)printf(
        "%d ranks, %d on this host; rank 0: %s; exchange: %s; KV %.1f GB a rank; streaming read %.0f GB/s "
        "(slowest rank, all at once)\n",
        r->n_ranks, r->n_local_ranks, r->device.device, r->exchange.text,
        (double)r->arena_bytes * 1e-9, r->read_gbps);
}

void fv_scale_print_head(const char *table)
{
    if (strcmp(table, "prefill") == 0) {
        (void)printf("\n%-30s %5s %12s %6s %12s %10s %10s %10s %9s %8s\n", table, "ranks",
                     "items x tok", "chunks", "device ms", "exchange", "wall ms", "sent MB",
                     "TFLOP/s", "speed-up");
        return;
    }
    (void)printf("\n%-30s %5s %12s %10s %9s %22s %9s %9s %9s %7s %8s\n", table, "ranks",
                 "items x tok", "KV MB/rank", "sent KB", "device us (p10..p90)", "exchange",
                 "wall us", "floor", "x floor",
                 (strcmp(table, "weak") == 0)       ? "weak eff"
                 : (strcmp(table, "exchange") == 0) ? "over 1 us"
                 : (strcmp(table, "s2") == 0)       ? "tokens/s, GB held"
                 : (strcmp(table, "mla") == 0)      ? "B/token, GB held, tokens/s, x heads"
                                                    : "speed-up");
}

void fv_scale_print(const fv_scale_result_t *x)
{
    char size[32];

    (void)snprintf(size, sizeof(size), "%ux%llu", x->n_items, (unsigned long long)x->n_tokens);
    if (is_table(x, "check")) {
        (void)printf("%-30s %5d %12s   ok: rows within %.1e of fp64", x->name, x->n_ranks, size,
                     x->error);
        if (x->spec->axis == FV_SCALE_SLICES) {
            (void)printf(", a softmax a slice\n");
        } else {
            (void)printf(", %.1e of one rank's\n", x->difference);
        }
    } else if (is_table(x, "prefill")) {
        (void)printf("%-30s %5d %12s %6u %12.2f %10.2f %10.2f %10.1f %9.2f %8.3f\n", x->name,
                     x->n_ranks, size, x->n_steps, x->device.p50 * 1e-3, x->exchange.p50 * 1e-3,
                     x->wall.p50 * 1e-3, x->sent_bytes * (double)x->n_steps * 1e-6,
                     fv_scale_prefill_flops(x) / x->device.p50 * 1e-6, x->ratio);
    } else {
        (void)printf("%-30s %5d %12s %10.1f %9.1f %9.1f (%4.0f..%5.0f) %9.1f %9.1f %9.1f %7.3f",
                     x->name, x->n_ranks, size, x->kv_bytes * 1e-6, x->sent_bytes / 1024.0,
                     x->device.p50, x->device.p10, x->device.p90, x->exchange.p50, x->wall.p50,
                     x->floor_us, x->device.p50 / x->floor_us);
        if (is_table(x, "exchange")) {
            (void)printf(" %8.1f", x->over_us);
        } else if (is_table(x, "s2")) {
            (void)printf(" %8.1f %8.2f", fv_scale_tokens_per_second(x), held_bytes(x) * 1e-9);
        } else if (is_table(x, "mla")) {
            (void)printf(" %8.0f %8.2f %9.1f %8.3f", token_bytes(x), held_bytes(x) * 1e-9,
                         fv_scale_tokens_per_second(x), x->ratio);
        } else if (x->ratio > 0.0) {
            (void)printf(" %8.3f", x->ratio);
        }
        (void)printf("\n");
    }
    (void)fflush(stdout);
}

static void add_times(cJSON *entry, const char *name, fv_scale_times_t times)
{
    cJSON *object = cJSON_AddObjectToObject(entry, name);

    (void)cJSON_AddNumberToObject(object, "p10", times.p10);
    (void)cJSON_AddNumberToObject(object, "p50", times.p50);
    (void)cJSON_AddNumberToObject(object, "p90", times.p90);
}

static cJSON *entry_of(const fv_scale_result_t *x)
{
    cJSON *e = cJSON_CreateObject();

    (void)cJSON_AddStringToObject(e, "table", x->spec->table);
    (void)cJSON_AddStringToObject(e, "case", x->name);
    (void)cJSON_AddStringToObject(e, "axis", k_axes[x->spec->axis]);
    (void)cJSON_AddNumberToObject(e, "ranks", x->n_ranks);
    (void)cJSON_AddNumberToObject(e, "items", x->n_items);
    (void)cJSON_AddNumberToObject(e, "tokens", (double)x->n_tokens);
    (void)cJSON_AddNumberToObject(e, "q_heads", x->spec->n_q_heads);
    (void)cJSON_AddNumberToObject(e, "kv_heads", x->spec->n_kv_heads);
    (void)cJSON_AddNumberToObject(e, "head_dim", x->spec->head_dim);
    (void)cJSON_AddNumberToObject(e, "layers_rotated", x->n_layers);
    (void)cJSON_AddNumberToObject(e, "steps", x->n_steps);
    (void)cJSON_AddNumberToObject(e, "kv_bytes_per_rank", x->kv_bytes);
    (void)cJSON_AddNumberToObject(e, "sent_bytes_per_rank", x->sent_bytes);
    (void)cJSON_AddNumberToObject(e, "s2_stride", x->spec->s2_stride);
    (void)cJSON_AddNumberToObject(e, "rope_dim", x->spec->latent.rope_dim);
    (void)cJSON_AddNumberToObject(e, "slices", x->spec->latent.groups);
    (void)cJSON_AddNumberToObject(e, "kv_bytes_per_token", token_bytes(x));
    (void)cJSON_AddNumberToObject(e, "held_bytes_per_rank", held_bytes(x));
    (void)cJSON_AddNumberToObject(e, "tokens_per_second", fv_scale_tokens_per_second(x));
    add_times(e, "device_us", x->device);
    add_times(e, "compute_us", x->compute);
    add_times(e, "exchange_us", x->exchange);
    add_times(e, "wall_us", x->wall);
    if (x->floor_us > 0.0) {
        (void)cJSON_AddNumberToObject(e, "floor_us", x->floor_us);
        (void)cJSON_AddNumberToObject(e, "ratio_to_floor", x->device.p50 / x->floor_us);
    } else {
        (void)cJSON_AddNumberToObject(e, "chunk", x->spec->chunk);
        (void)cJSON_AddNumberToObject(e, "flops", fv_scale_prefill_flops(x));
    }
    (void)cJSON_AddNumberToObject(
        e, is_table(x, "mla") ? "throughput_over_heads" : "ratio_to_one_rank", x->ratio);
    (void)cJSON_AddNumberToObject(e, "us_over_one_rank", x->over_us);
    (void)cJSON_AddNumberToObject(e, "row_error", x->error);
    (void)cJSON_AddNumberToObject(e, "row_difference_to_one_rank", x->difference);
    return e;
}

static FILE *open_file(const char *path)
{
    FILE *file = fopen(path, "w");

    if (file == NULL) {
        (void)fv_fail(FV_ERR_SYSTEM, "%s cannot be written", path);
        fv_scale_die("report");
    }
    return file;
}

static void write_json(const fv_scale_rank_t *r, const fv_scale_result_t *results, size_t n)
{
    cJSON *all = cJSON_CreateObject();
    cJSON *list = NULL;
    char *text = NULL;
    FILE *file = open_file(r->options->json);

    (void)cJSON_AddStringToObject(all, "device", r->device.device);
    (void)cJSON_AddStringToObject(all, "backend", r->backend->name);
    (void)cJSON_AddStringToObject(all, "exchange", r->exchange.text);
    (void)cJSON_AddNumberToObject(all, "ranks", r->n_ranks);
    (void)cJSON_AddNumberToObject(all, "ranks_on_first_host", r->n_local_ranks);
    (void)cJSON_AddNumberToObject(all, "read_gbps", r->read_gbps);
    list = cJSON_AddArrayToObject(all, "results");
    for (size_t i = 0; i < n; i++) {
        (void)cJSON_AddItemToArray(list, entry_of(&results[i]));
    }
    text = cJSON_Print(all);
    (void)fprintf(file, "%s\n", (text == NULL) ? "{}" : text);
    cJSON_free(text);
    cJSON_Delete(all);
    (void)fclose(file);
}

static void write_csv(const fv_scale_rank_t *r, const fv_scale_result_t *results, size_t n)
{
    FILE *file = open_file(r->options->csv);

    (void)fprintf(file,
                  "table,case,axis,ranks,items,tokens,q_heads,kv_heads,head_dim,kv_bytes_per_rank,"
                  "sent_bytes_per_rank,device_us_p10,device_us_p50,device_us_p90,compute_us_p50,"
                  "exchange_us_p50,wall_us_p10,wall_us_p50,wall_us_p90,floor_us,ratio_to_floor,"
                  "ratio_to_one_rank,us_over_one_rank,row_error,slices,kv_bytes_per_token,"
                  "tokens_per_second,throughput_over_heads\n");
    for (size_t i = 0; i < n; i++) {
        const fv_scale_result_t *x = &results[i];

        (void)fprintf(
            file,
            "%s,%s,%s,%d,%u,%llu,%d,%d,%d,%.0f,%.0f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.1f,%.2f,%.4f,%.4f,%.1f,%.2e,%d,%.1f,%.2f,%.4f\n",
            x->spec->table, x->name, k_axes[x->spec->axis], x->n_ranks, x->n_items,
            (unsigned long long)x->n_tokens, x->spec->n_q_heads, x->spec->n_kv_heads,
            x->spec->head_dim, x->kv_bytes, x->sent_bytes, x->device.p10, x->device.p50,
            x->device.p90, x->compute.p50, x->exchange.p50, x->wall.p10, x->wall.p50, x->wall.p90,
            x->floor_us, (x->floor_us > 0.0) ? (x->device.p50 / x->floor_us) : 0.0,
            is_table(x, "mla") ? 0.0 : x->ratio, x->over_us, x->error, x->spec->latent.groups,
            token_bytes(x), fv_scale_tokens_per_second(x), is_table(x, "mla") ? x->ratio : 0.0);
    }
    (void)fclose(file);
}

void fv_scale_write(const fv_scale_rank_t *r, const fv_scale_result_t *results, size_t n_results)
{
    if (r->options->json != NULL) {
        write_json(r, results, n_results);
    }
    if (r->options->csv != NULL) {
        write_csv(r, results, n_results);
    }
}

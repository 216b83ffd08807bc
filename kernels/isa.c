/*
 * isa.c - which instruction set this process may use.
 *
 * AMX needs three yeses: the CPU has it, the kernel grants its 8 KiB of state (asked once for the whole process), and the
 * compiler knew it.
 */
#define _GNU_SOURCE /* syscall */
#include "kernels/tile.h"

#include <stdbool.h>
#include <string.h>

#if defined(FV_KERNELS_X86)
#    include <cpuid.h>
#    include <sys/syscall.h>
#    include <unistd.h>

#    define ARCH_REQ_XCOMP_PERM 0x1023
#    define XFEATURE_XTILEDATA  18
#    define CPUID_7_EDX_AMX     ((1U << 22U) | (1U << 24U)) /* AMX-BF16, AMX-TILE */

static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool has_amx(void)
{
    unsigned eax = 0;
    unsigned ebx = 0;
    unsigned ecx = 0;
    unsigned edx = 0;

    if (!has_avx512() || (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) ||
        ((edx & CPUID_7_EDX_AMX) != CPUID_7_EDX_AMX)) {
        return false;
    }
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static const char *const k_names[] = {"amx", "avx512", "avx2", "portable"};

/* False when this CPU, kernel or build lacks it. */
static bool isa_get(const char *name, fv_isa_t *out)
{
    fv_isa_t isa = {.name = name, .ops = &fv_tile_portable, .dense = NULL};
    bool ok = strcmp(name, "portable") == 0;

#if defined(FV_KERNELS_X86)
    if (strcmp(name, "avx2") == 0) {
        isa.ops = &fv_tile_avx2;
        ok = has_avx2();
    } else if (strcmp(name, "avx512") == 0) {
        isa.ops = &fv_tile_avx512;
        ok = has_avx512();
    } else if (strcmp(name, "amx") == 0) {
        isa.ops = &fv_tile_avx512;
        isa.dense = &fv_tile_amx;
        ok = has_amx();
    }
#endif
    *out = isa;
    return ok;
}

fv_status_t fv_isa_choose(const char *name, fv_isa_t *out)
{
    bool is_auto = (name == NULL) || (strcmp(name, "auto") == 0);
    bool known = is_auto;

    for (size_t i = 0; i < sizeof(k_names) / sizeof(k_names[0]); i++) {
        if (!is_auto && (strcmp(name, k_names[i]) != 0)) {
            continue;
        }
        known = true;
        if (isa_get(k_names[i], out)) {
            return FV_OK;
        }
    }
    if (!known) {
        return fv_fail(FV_ERR_INVALID_ARG,
                       "isa: given \"%s\", expected auto, amx, avx512, avx2 or portable", name);
    }
    return fv_fail(FV_ERR_UNIMPLEMENTED, "isa: \"%s\" is not available on this machine", name);
}

/*
 * fault.c - no faults, unless a test links some.
 */
#include "common/fault.h"

fv_fault_hook_t fv_fault_hook;

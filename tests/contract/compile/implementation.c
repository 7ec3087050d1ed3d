/* The implementation alone, in one translation unit. */
#define MOE_IMPLEMENTATION
#include "moe.h"

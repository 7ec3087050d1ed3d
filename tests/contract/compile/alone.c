/* moe.h private to this file; linked twice into one program, as ALONE=first and ALONE=second. */
#define MOE_STATIC
#define MOE_IMPLEMENTATION
#include "moe.h"

int first(void);
int second(void);

int ALONE(void) {
    float x[2] = {0.0f, 1.0f};
    return moe_exp(2, x, x) == MOE_OK && x[0] == 1.0f;
}

#ifdef ALONE_MAIN
int main(void) { return !(first() && second()); }
#endif

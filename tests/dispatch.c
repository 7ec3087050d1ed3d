/* Instruction sets: forced, refused, and the best one. */
#include "test.h"
#include "cases.h"

static void test_force_isa(void) {
    int available = 0;
    moe_isa_kind best = (CHECK_OK(moe_force_isa(MOE_ISA_AUTO)), moe_active_isa());
    CHECK(best != MOE_ISA_AUTO && best < MOE_ISA_COUNT);
    for (int i = MOE_ISA_SCALAR; i < MOE_ISA_COUNT; i++) {
        moe_isa_kind before = moe_active_isa();
        moe_status s = moe_force_isa((moe_isa_kind)i);
        CHECK(moe_active_isa() == (s ? before : (moe_isa_kind)i));
        if (s) CHECK_STATUS(s, MOE_E_ISA);
        else available++;
    }
    CHECK_OK(moe_force_isa(MOE_ISA_SCALAR)); /* is everywhere */
    CHECK(available >= 1);
    CHECK_STATUS(moe_force_isa((moe_isa_kind)99), MOE_E_ISA);
    CHECK_STATUS(moe_force_isa((moe_isa_kind)-1), MOE_E_ISA);
    CHECK(moe_active_isa() == MOE_ISA_SCALAR);
    CHECK_OK(moe_force_isa(MOE_ISA_AUTO));
    CHECK(moe_active_isa() == best);
    CHECK(!moe_isa_name(MOE_ISA_COUNT) && !moe_isa_name((moe_isa_kind)-1));
    const char *backend = moe_thread_backend();
#if defined(_OPENMP) && !defined(MOE_NO_OPENMP)
    CHECK(!strcmp(backend, "openmp"));
#else
    CHECK(!strcmp(backend, "serial"));
#endif
}

int main(void) {
    RUN(test_force_isa);
    return test_end();
}

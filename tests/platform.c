/* Statuses: every code has a kind, a field and a sentence of its own; no other number has any. */
#include "test.h"

#include <limits.h>

/* ---- statuses ---- */
static void test_status_strings(void) {
    for (int i = 0; i < MOE_STATUS_COUNT; i++) {
        moe_status s = (moe_status)i;
        const char *text = moe_status_string(s), *field = moe_status_field(s);
        if (!CHECK(text && field && text[0])) continue;
        CHECK((s == MOE_OK) == (moe_status_kind(s) == MOE_KIND_OK));
        CHECK((s == MOE_OK) == (field[0] == 0));
        size_t n = strlen(field); /* "field: what is wrong" */
        if (s != MOE_OK && !CHECK(!strncmp(text, field, n) && (text[n] == ':' || text[n] == ',')))
            printf("        %s\n", text);
        for (int j = 0; j < i; j++) /* each code has a sentence of its own */
            if (!CHECK(strcmp(text, moe_status_string((moe_status)j)))) printf("        twice: %s\n", text);
    }
    static const int other[] = {-1, -2, -1000, INT_MIN, MOE_STATUS_COUNT, MOE_STATUS_COUNT + 1, 1000, INT_MAX};
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        int kind = (int)moe_status_kind((moe_status)other[i]);
        CHECK(moe_status_string((moe_status)other[i]) != NULL && moe_status_string((moe_status)other[i])[0]);
        CHECK(moe_status_field((moe_status)other[i]) != NULL);
        CHECK(kind > MOE_KIND_OK && kind <= MOE_KIND_SUPPORT);
    }
    CHECK(!strcmp(moe_status_string(MOE_OK), "ok"));
}

int main(void) {
    RUN(test_status_strings);
    return test_end();
}

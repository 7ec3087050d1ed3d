/* Any text as fields of a desc. What is refused leaves the desc alone and has a place and a reason; what is taken comes
 * back from its own JSON. */
#include "fuzz.h"

static void fuzz_desc_json(const moe_desc *d) {
    char text[8192], word[128], value[256], cut[7];
    moe_json json, key, item;
    moe_desc back;
    memset(&back, 0, sizeof back);
    memset(&item, 0, sizeof item);
    size_t n = moe_desc_json(d, text, sizeof text);
    require(n < sizeof text && strlen(text) == n && moe_desc_json(d, cut, sizeof cut) == n && strlen(cut) == 6);
    require(moe_json_open(&json, text, n) == MOE_OK);
    while (moe_json_next(&json, &key, &item)) {
        require(moe_json_text(&key, word, sizeof word) == MOE_OK);
        require(moe_json_text(&item, value, sizeof value) == MOE_OK);
        require(moe_desc_set(&back, word, value) == MOE_OK);
    }
    char again[8192];
    require(moe_desc_json(&back, again, sizeof again) == n && !strcmp(text, again));
}
static int fuzz_desc(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    char text[512], why[300], little[5];
    moe_desc d, before, out, twice;
    size_t at = 0;
    memset(&d, 0, sizeof d);
    const moe_system *row = moe_system_at(fuzz_byte(&in) % (moe_systems_count() + 1));
    if (row) require(moe_desc_system(&d, row->name) == MOE_OK);
    before = d;
    fuzz_line(&in, text, sizeof text);
    moe_status status = moe_desc_parse(&d, text, &at);
    size_t length = moe_desc_explain(status, &before, text, why, sizeof why);
    require(length > 0 && strlen(why) == (length < sizeof why ? length : sizeof why - 1));
    require(moe_desc_explain(status, &before, text, little, sizeof little) == length && strlen(little) <= 4);
    moe_system_near(text, why, sizeof why);
    if (status) {
        require(at <= strlen(text) && !memcmp(&d, &before, sizeof d));
        return 0;
    }
    status = moe_desc_resolve(&d, &out);
    require(moe_desc_explain(status, &d, NULL, why, sizeof why) > 0);
    if (status) return 0;
    require(moe_desc_resolve(&out, &twice) == MOE_OK && !memcmp(&out, &twice, sizeof out));
    fuzz_desc_json(&out);
    return 0;
}
FUZZ_TARGET(fuzz_desc)

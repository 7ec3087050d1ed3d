/* reading.h: every rule on both sides of its border; numbers in their texts; and that knobs, functions and places in
 * docs/ that a text names exist. */
#include "test.h"

#include "examples/common/reading.h"

/* 16 experts, top-2, 250 selections each: healthy. Then "name=value ..." */
static reading make(const char *changes) {
    reading r = reading_unknown();
    r.experts = 16, r.top_k = 2, r.selected = 4000, r.dead = r.dead_first = 0, r.maxvio = 0.5, r.effective = 15;
    while (*changes) {
        char name[32];
        double value;
        int used = 0;
        size_t i = 0, count = sizeof reading_numbers / sizeof *reading_numbers;
        if (sscanf(changes, " %31[a-z_]=%lf%n", name, &value, &used) != 2) break;
        while (i < count && strcmp(reading_numbers[i].name, name) != 0) i++;
        if (!CHECK(i < count)) break;
        memcpy((char *)&r + reading_numbers[i].offset, &value, sizeof value);
        changes += used;
    }
    return reading_complete(r);
}

/* The names of the rules that hold, with blanks between them. */
static void rules_of(const reading *r, char out[512]) {
    const reading_rule *rule;
    *out = 0;
    for (size_t at = 0; (rule = reading_next(r, &at)) != NULL;) {
        if (*out) strcat(out, " ");
        strcat(out, rule->name);
    }
}

/* What holds is all that holds: a rule beside the one that is meant is an error too. */
static const struct {
    const char *rule, *changes, *holds;
} cases[] = {
    {"healthy", "", "healthy"},
    {"healthy", "maxvio=1", "healthy"},
    {"healthy", "maxvio=1.01", "uneven"},
    {"healthy", "maxvio=nan", ""},
    {"probabilities", "probabilities=1", "probabilities"},
    {"probabilities", "probabilities=0", "healthy"},
    {"few", "selected=319", "few"},
    {"few", "selected=320", "healthy"},
    {"dead-most", "dead=8 maxvio=3", "dead-most"},
    {"dead-most", "dead=7 maxvio=3", "dead-some"},
    {"dead-some", "dead=1", "dead-some"},
    {"dead-some", "dead=0", "healthy"},
    {"dead-some", "dead=1 selected=96", "few dead-some"}, /* 16 e^-6 = 0.040 */
    {"dead-most", "dead=9 selected=96", "few dead-most"},
    {"dead-unsure", "dead=1 selected=80", "few dead-unsure"}, /* 16 e^-5 = 0.108 */
    {"dead-unsure", "dead=9 selected=80", "few dead-unsure"},
    {"dead-unsure", "dead=0 selected=80", "few"},
    {"uneven", "maxvio=1.01", "uneven"},
    {"uneven", "maxvio=1.01 selected=319", "few"},
    {"uneven", "maxvio=1.01 dead=1", "dead-some"},
    {"dropped", "drop_rate=0.011", "dropped"},
    {"dropped", "drop_rate=0.01", "healthy"},
    {"masked", "masked=1 logits=1", "masked healthy"},
    {"masked", "masked=0 logits=1", "healthy"},
    {"second", "dead_first=1", "second healthy"},
    {"second", "dead_first=1 top_k=1", "healthy"},
    {"second", "dead_first=0", "healthy"},
    {"second", "dead_first=1 experts=100", "second healthy"},
    {"second", "dead_first=1 experts=101", "healthy"}, /* there even load has under 1% */
    {"second", "dead_first=1 dead=1", "dead-some"},
    {"congested", "gamma=3 excess=2 excess_lo=0.01 excess_hi=4 batches=50 batch_tokens=100", "congested healthy"},
    {"congested", "gamma=3 excess=2 excess_lo=0 excess_hi=4 batches=50 batch_tokens=100", "healthy"},
    {"below", "gamma=3 excess=-2 excess_lo=-4 excess_hi=-0.01 batches=50 batch_tokens=100", "below healthy"},
    {"below", "gamma=3 excess=-2 excess_lo=-4 excess_hi=0 batches=50 batch_tokens=100", "healthy"},
    {"thin", "gamma=3 excess=2 excess_lo=1 excess_hi=4 batches=50 batch_tokens=99", "congested thin healthy"},
    {"thin", "gamma=3 excess=2 excess_lo=1 excess_hi=4 batches=49 batch_tokens=100", "congested thin healthy"},
    {"thin", "gamma=3 excess=-2 excess_lo=-3 excess_hi=-1 batches=49 batch_tokens=100", "below thin healthy"},
    {"thin", "gamma=3 excess=2 excess_lo=-1 excess_hi=4 batches=49 batch_tokens=99", "healthy"},
    {"top-1", "top_k=1 excess_lo=1 excess_hi=4 batches=50 batch_tokens=100", "congested top-1 healthy"},
    {"top-1", "top_k=2 excess_lo=1 excess_hi=4 batches=50 batch_tokens=100", "congested healthy"},
    {"top-1", "top_k=1 excess_lo=-1 excess_hi=4 batches=50 batch_tokens=100", "healthy"},
    {"no-excess", "dead=1 gamma=0.005 excess_lo=0 excess_hi=0", "dead-some no-excess"},
    {"no-excess", "maxvio=1.5 gamma=3 excess_lo=-1 excess_hi=1", "uneven no-excess"},
    {"no-excess", "maxvio=1 gamma=3 excess_lo=-1 excess_hi=1", "healthy"},
    {"no-excess", "dead=1 gamma=3 excess_lo=1 excess_hi=2 batches=50 batch_tokens=100", "dead-some congested"},
    {"floor", "dead=1 gamma=0.004 ols=-1 excess_lo=0 excess_hi=0", "dead-some floor"},
    {"floor", "dead=1 gamma=0.005 ols=-1 excess_lo=0 excess_hi=0", "dead-some no-excess"},
    {"floor", "dead=1 gamma=0.004 ols=0 excess_lo=0 excess_hi=0", "dead-some"},
    {"floor", "maxvio=1 gamma=0.004 ols=-1 excess_lo=0 excess_hi=0", "healthy"},
    {"no-interval", "dead=1 gamma=3", "dead-some no-interval"},
    {"no-interval", "dead=1 gamma=3 excess_lo=-1 excess_hi=1", "dead-some no-excess"},
    {"no-interval", "maxvio=1 gamma=3", "healthy"},
    {"unidentified", "dead=1 logits=1 masked=0", "dead-some unidentified"},
    {"unidentified", "dead=1 logits=0 masked=0", "dead-some"},
    {"unidentified", "dead=1 logits=1 masked=1", "dead-some masked"},
    {"unidentified", "maxvio=1 logits=1 masked=0", "healthy"},
    {"ecology-high", "dead=1 ecology=0.5", "dead-some ecology-high"},
    {"ecology-high", "dead=0 ecology=0.5", "healthy"},
    {"ecology-high", "dead=1 ecology=inf", "dead-some"}, /* neither an oracle nor a balance loss */
    {"ecology-low", "dead=1 ecology=0.49", "dead-some ecology-low"},
    {"ecology-low", "dead=0 ecology=0.49", "healthy"},
};
enum { CASES = sizeof cases / sizeof *cases };

static void test_rules(void) {
    char holds[512];
    for (size_t i = 0; i < CASES; i++) {
        reading r = make(cases[i].changes);
        rules_of(&r, holds);
        if (!CHECK(strcmp(holds, cases[i].holds) == 0))
            printf("    \"%s\": %s, not %s\n", cases[i].changes, holds, cases[i].holds);
    }
}

static int holds_in(const char *list, const char *name) {
    size_t length = strlen(name);
    for (const char *at = list; (at = strstr(at, name)) != NULL; at++)
        if ((at == list || at[-1] == ' ') && (!at[length] || at[length] == ' ')) return 1;
    return 0;
}

/* Each rule of the table has a case in which it holds and one of its own in which it does not. */
static void test_every_rule(void) {
    for (size_t k = 0; k < READING_RULES; k++) {
        int yes = 0, no = 0;
        for (size_t i = 0; i < CASES; i++) {
            if (strcmp(cases[i].rule, reading_rules[k].name) != 0) continue;
            if (holds_in(cases[i].holds, reading_rules[k].name)) yes = 1;
            else no = 1;
        }
        if (!CHECK(yes && no)) printf("    %s: %d %d\n", reading_rules[k].name, yes, no);
    }
}

static void test_numbers(void) {
    CHECK_NEAR(reading_chance(16, 20), 16 * exp(-20.0) * 21, 1e-12);           /* fewer than 2 */
    CHECK_NEAR(reading_chance(4, 25), 4 * exp(-25.0) * (1 + 25 + 312.5), 1e-12); /* 2.5: up to 2 */
    CHECK_NEAR(reading_chance(16, 6), 16 * exp(-6.0), 1e-12);
    CHECK(reading_chance(16, 1000) == 1e-9);
    CHECK(reading_chance(1000, 1) == 1);
    reading r = make("maxvio=1.25");
    CHECK_NEAR(r.each, 250, 1e-12);
    CHECK_NEAR(r.times, 2.25, 1e-12);
    CHECK_NEAR(r.scatter, 0.1489319, 1e-6); /* sqrt(2 ln 16 / 250) */
}

static void test_text(void) {
    char text[READING_TEXT], small[20];
    size_t at = 0;
    reading r = make("");
    const reading_rule *rule = reading_next(&r, &at);
    if (!CHECK(rule != NULL)) return;
    reading_text(rule, &r, text, sizeof text);
    CHECK(strcmp(text, "Healthy: no expert is dead, the busiest has 1.50 times an even share (border: 2), and the load "
                       "is that of 15.0 even experts out of 16.") == 0);
    CHECK(reading_next(&r, &at) == NULL); /* one line and no other */
    reading_text(rule, &r, small, sizeof small);
    CHECK(strncmp(small, text, sizeof small - 1) == 0 && !small[sizeof small - 1]);
    r = make("dead=14 maxvio=7 effective=2");
    at = 0;
    if (!CHECK((rule = reading_next(&r, &at)) != NULL)) return;
    reading_text(rule, &r, text, sizeof text);
    CHECK(strstr(text, "14 of 16 experts are dead") == text);
    CHECK(strstr(text, "of 4000 selections") && strstr(text, "at most 1e-09") && strstr(text, "MaxVio 7.00"));
    CHECK(strstr(text, "of 2.0 even experts") && strstr(text, "loss.switch=0.01") && !strchr(text, '{'));
    for (size_t i = 0; i < READING_RULES; i++) { /* no name in braces that the struct has not */
        reading_text(&reading_rules[i], &r, text, sizeof text);
        CHECK(!strchr(text, '{') && !strchr(text, '}') && strlen(text) + 1 < sizeof text);
    }
}

/* ---- what texts name ---- */

static char *whole_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    static char *text = NULL;
    size_t size = 4 << 20;
    text = (char *)realloc(text, size);
    if (text) text[fread(text, 1, size - 1, f)] = 0;
    fclose(f);
    return text;
}

/* Does a heading of the page make this anchor, as GitHub does: lower case, blanks to hyphens, punctuation left out? */
static int has_anchor(const char *page, const char *anchor) {
    for (const char *line = page; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        char made[128];
        size_t n = 0;
        if (*line != '#') continue;
        const char *c = line + strspn(line, "# ");
        for (; *c && *c != '\n' && n + 1 < sizeof made; c++) {
            if (*c == ' ' || *c == '-') made[n++] = '-';
            else if (*c >= 'A' && *c <= 'Z') made[n++] = (char)(*c - 'A' + 'a');
            else if ((*c >= 'a' && *c <= 'z') || (*c >= '0' && *c <= '9')) made[n++] = *c;
        }
        made[n] = 0;
        if (strcmp(made, anchor) == 0) return 1;
    }
    return 0;
}

static int is_knob(const char *word) {
    moe_desc d = {0};
    d.d_model = 8, d.n_experts = 4, d.top_k = 1;
    return moe_desc_parse(&d, word, NULL) == MOE_OK;
}

/* One word of a text, without the punctuation around it. 0: it names what does not exist. */
static int exists(const char *word) {
    char copy[128];
    if (strncmp(word, "docs/", 5) == 0) {
        snprintf(copy, sizeof copy, "%s", word);
        char *anchor = strchr(copy, '#');
        if (anchor) *anchor++ = 0;
        const char *page = whole_file(copy);
        return page && (!anchor || has_anchor(page, anchor));
    }
    if (strchr(word, '=')) return is_knob(word);
    if (strncmp(word, "loss.", 5) == 0) {
        snprintf(copy, sizeof copy, "%s=0.1", word);
        return is_knob(copy);
    }
    if (strcmp(word, "capacity_factor") == 0) return is_knob("capacity_factor=2");
    if (strncmp(word, "moe_", 4) == 0) {
        const char *header = whole_file("moe.h");
        snprintf(copy, sizeof copy, "%s(", word);
        if (header && strstr(header, copy)) return 1;
        snprintf(copy, sizeof copy, "} %s;", word);
        return header && strstr(header, copy);
    }
    if (strncmp(word, "--", 2) == 0) {
        const char *program = whole_file("examples/inspect.c");
        snprintf(copy, sizeof copy, "{\"%s\", ARGS_", word + 2);
        return program && strstr(program, copy);
    }
    return 1;
}

static void test_names(void) {
    size_t named = 0;
    for (size_t i = 0; i < READING_RULES; i++) {
        char text[READING_TEXT];
        snprintf(text, sizeof text, "%s", reading_rules[i].text);
        for (char *word = strtok(text, " ()"); word; word = strtok(NULL, " ()")) {
            size_t length = strlen(word);
            while (length && strchr(".,;:", word[length - 1])) word[--length] = 0;
            named += strpbrk(word, "=#_") != NULL;
            if (!CHECK(exists(word))) printf("    %s: %s\n", reading_rules[i].name, word);
        }
    }
    CHECK(named > 30);
    CHECK(!exists("docs/math.md#no-such-place") && !exists("loss.wish=1") && !exists("moe_layer_wish"));
    CHECK(!exists("controller=wish") && !exists("--wish") && !exists("docs/wish.md"));
}

static void test_print(void) {
    FILE *f = tmpfile();
    if (!CHECK(f != NULL)) return;
    reading r = make("dead=14 maxvio=7 effective=2");
    reading_print(f, "layer 0", &r);
    rewind(f);
    char line[256];
    size_t lines = 0;
    while (fgets(line, sizeof line, f)) {
        CHECK(strlen(line) <= READING_COLUMNS + 1);
        CHECK(lines ? strncmp(line, "  ", 2) == 0 && line[2] != ' ' : strncmp(line, "layer 0: 14 of", 14) == 0);
        lines++;
    }
    CHECK(lines > 3 && lines < 8);
    fclose(f);
}

int main(void) {
    RUN(test_rules);
    RUN(test_every_rule);
    RUN(test_numbers);
    RUN(test_text);
    RUN(test_names);
    RUN(test_print);
    return test_end();
}

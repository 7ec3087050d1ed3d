// json.h - writes JSON lines: one object a line, to up to two files at once.
//
//     json j = {{file, stdout}};
//     json_begin(&j);
//     json_text(&j, "event", "epoch");
//     json_real(&j, "loss", 1.25);
//     json_end(&j);
#ifndef EX_JSON_H
#define EX_JSON_H

#include "platform.h"

#include "moe.h"

typedef struct json {
    FILE *file[2]; // NULL = none
    int comma;     // the next item needs one before it
} json;

EX_PRINTF(2, 3) EX_FUNC void json_put(json *j, const char *format, ...) {
    for (int i = 0; i < 2; i++) {
        if (!j->file[i]) continue;
        va_list args;
        va_start(args, format);
        vfprintf(j->file[i], format, args);
        va_end(args);
    }
}

// A string with its quotes; control characters, quotes and backslashes escaped, UTF-8 passed on.
EX_FUNC void json_quote(json *j, const char *text) {
    json_put(j, "\"");
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\')
            json_put(j, "\\%c", c);
        else if (c == '\n')
            json_put(j, "\\n");
        else if (c == '\t')
            json_put(j, "\\t");
        else if (c < 0x20 || c == 0x7f)
            json_put(j, "\\u%04x", (unsigned)c);
        else
            json_put(j, "%c", c);
    }
    json_put(j, "\"");
}

// The key of a member, or nothing inside a list (key NULL).
EX_FUNC void json_key(json *j, const char *key) {
    if (j->comma) json_put(j, ",");
    j->comma = 1;
    if (!key) return;
    json_quote(j, key);
    json_put(j, ":");
}

EX_FUNC void json_begin(json *j) {
    j->comma = 0;
    json_put(j, "{");
}
EX_FUNC void json_end(json *j) {
    json_put(j, "}\n");
    for (int i = 0; i < 2; i++)
        if (j->file[i]) fflush(j->file[i]);
}
EX_FUNC void json_text(json *j, const char *key, const char *value) {
    json_key(j, key);
    json_quote(j, value);
}
EX_FUNC void json_whole(json *j, const char *key, uint64_t value) {
    json_key(j, key);
    json_put(j, "%llu", (unsigned long long)value);
}
// NaN and infinity have no JSON form: null.
EX_FUNC void json_real(json *j, const char *key, double value) {
    json_key(j, key);
    if (value - value == 0)
        json_put(j, "%.9g", value);
    else
        json_put(j, "null");
}
// Text that is JSON already.
EX_FUNC void json_raw(json *j, const char *key, const char *value) {
    json_key(j, key);
    json_put(j, "%s", value);
}
EX_FUNC void json_list_begin(json *j, const char *key) {
    json_key(j, key);
    json_put(j, "[");
    j->comma = 0;
}
EX_FUNC void json_list_end(json *j) {
    json_put(j, "]");
    j->comma = 1;
}
// An object inside the line; its members follow.
EX_FUNC void json_object_begin(json *j, const char *key) {
    json_key(j, key);
    json_put(j, "{");
    j->comma = 0;
}
EX_FUNC void json_object_end(json *j) {
    json_put(j, "}");
    j->comma = 1;
}

// The beginning of the first line of every program: what follows is its configuration.
EX_FUNC void json_config(json *j, const char *program) {
    json_begin(j);
    json_text(j, "event", "config");
    json_text(j, "program", program);
    json_text(j, "moe", MOE_VERSION);
}

#endif

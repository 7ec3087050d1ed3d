// json_read.h - fields of a JSON file, with a sentence for whatever is wrong: over moe.h's moe_json.
//
//     js_file f = js_open("model/config.json");
//     size_t layers = js_whole(&f, &f.root, "num_hidden_layers", JS_MUST, 1, 1000);
//     double theta = js_real(&f, &f.root, "rope_theta", 10000);
//
// A file that is no JSON, or a field that is missing or wrong, ends the program with status 2 and one line that names
// both. null counts as missing.
#ifndef EX_JSON_READ_H
#define EX_JSON_READ_H

#include "platform.h"

#include <math.h>

#include "moe.h"

typedef struct js_file {
    const char *path;
    moe_json root;
} js_file;

// The path must stay; so does the view of the file.
EX_FUNC js_file js_open(const char *path) {
    js_file f = {path, {0}};
    size_t size;
    const void *bytes = file_view(path, &size);
    if (!bytes) refuse(path, "cannot be read: %s", strerror(errno));
    moe_status status = moe_json_open(&f.root, bytes, size);
    if (status) refuse(path, "byte %zu: %s", f.root.begin, moe_status_string(status));
    if (f.root.kind != MOE_JSON_OBJECT) refuse(path, "not a JSON object");
    return f;
}
// The value at a path of keys, if it is there and not null.
EX_FUNC int js_get(const moe_json *object, const char *path, moe_json *out) {
    return moe_json_find(object, path, out) == MOE_OK && out->kind != MOE_JSON_NULL;
}
EX_FUNC moe_json js_must(const js_file *f, const moe_json *object, const char *path, moe_json_kind kind) {
    static const char *const names[] = {"", "null", "false", "true", "a number", "a text", "a list", "an object"};
    moe_json v = {0};
    if (!js_get(object, path, &v)) refuse(f->path, "%s is missing", path);
    if (v.kind != kind) refuse(f->path, "%s must be %s", path, names[kind]);
    return v;
}
EX_FUNC double js_number(const js_file *f, const moe_json *object, const char *path) {
    moe_json v = js_must(f, object, path, MOE_JSON_NUMBER);
    double n = 0;
    if (moe_json_number(&v, &n) != MOE_OK) refuse(f->path, "%s is a number past all bounds", path);
    return n;
}
EX_FUNC double js_real(const js_file *f, const moe_json *object, const char *path, double fallback) {
    moe_json v;
    return js_get(object, path, &v) ? js_number(f, object, path) : fallback;
}
// The same, above 0.
EX_FUNC double js_above(const js_file *f, const moe_json *object, const char *path, double fallback) {
    double n = js_real(f, object, path, fallback);
    if (!(n > 0) || n > 1e30) refuse(f->path, "%s must be above 0, not %g", path, n);
    return n;
}
// A whole number from lo to hi; where it is missing `fallback`, or JS_MUST: then it must be there.
#define JS_MUST SIZE_MAX
EX_FUNC size_t js_whole(const js_file *f, const moe_json *object, const char *path, size_t fallback, size_t lo,
                        size_t hi) {
    moe_json v;
    if (fallback != JS_MUST && !js_get(object, path, &v)) return fallback;
    double n = js_number(f, object, path);
    if (n != floor(n) || !(n >= (double)lo) || !(n <= (double)hi))
        refuse(f->path, "%s must be a whole number from %zu to %zu, not %g", path, lo, hi, n);
    return (size_t)n;
}
EX_FUNC int js_flag(const js_file *f, const moe_json *object, const char *path, int fallback) {
    moe_json v;
    if (!js_get(object, path, &v)) return fallback;
    if (v.kind != MOE_JSON_TRUE && v.kind != MOE_JSON_FALSE) refuse(f->path, "%s must be true or false", path);
    return v.kind == MOE_JSON_TRUE;
}
// A string, unescaped, in memory of its own; its bytes in *length if that is not NULL: it may hold a NUL.
EX_FUNC char *js_string(const js_file *f, const moe_json *v, size_t *length) {
    size_t size = v->end - v->begin + 1;
    char *text = allocate(size, 1);
    memset(text, 0xFF, size); // no byte of UTF-8: the last other one is the NUL behind the text
    if (v->kind != MOE_JSON_TEXT || moe_json_text(v, text, size) != MOE_OK)
        refuse(f->path, "byte %zu: a text must stand here", v->begin);
    while (text[size - 1]) size--;
    if (length) *length = size - 1;
    return text;
}
// A short string into a buffer; where it is missing, `fallback`.
EX_FUNC const char *js_word(const js_file *f, const moe_json *object, const char *path, const char *fallback,
                            char buffer[64]) {
    moe_json v;
    if (!js_get(object, path, &v)) return fallback;
    if (v.kind != MOE_JSON_TEXT || moe_json_text(&v, buffer, 64) != MOE_OK)
        refuse(f->path, "%s must be a text of at most 63 bytes", path);
    return buffer;
}

#endif

// tokenizer.h - a model's own tokenizer.json: text to token ids and back, as Hugging Face's `tokenizers` [C] has it,
// for byte-pair encodings: byte-level (GPT-2's, with any cutting pattern) and SentencePiece's (spaces as U+2581, bytes
// for unknown characters).
//
//     text -> added tokens cut out -> normalizer -> normalized added tokens cut out -> pre-tokenizer -> merges -> ids
//
// The normalizer, pre-tokenizer and decoder of a file are lists of steps, each a row of a table below. A step that is
// not there, or a file that contradicts itself, ends the program with status 2 and a line that names file and field.
#ifndef EX_TOKENIZER_H
#define EX_TOKENIZER_H

#include "json_read.h"
#include "pattern.h"

// Bytes that grow; always with a NUL behind them.
typedef struct text_buffer {
    char *text;
    size_t length, room;
} text_buffer;
EX_FUNC void text_add(text_buffer *b, const char *text, size_t n) {
    if (b->length + n + 1 > b->room) {
        b->room = 2 * (b->length + n) + 64;
        b->text = realloc(b->text, b->room);
        if (!b->text) die("out of memory");
    }
    if (n) memcpy(b->text + b->length, text, n);
    b->length += n;
    b->text[b->length] = 0;
}
EX_FUNC void text_code(text_buffer *b, uint32_t code) {
    char bytes[4];
    text_add(b, bytes, uni_encode(code, bytes));
}
EX_FUNC int text_begins(const char *text, size_t n, const char *with) {
    size_t length = strlen(with);
    return length && length <= n && memcmp(text, with, length) == 0;
}

typedef enum token_step_kind {
    TOKEN_NFC,
    TOKEN_NFD,
    TOKEN_PREPEND,
    TOKEN_REPLACE, // normalizers; REPLACE decodes too
    TOKEN_SPLIT,
    TOKEN_METASPACE,
    TOKEN_BYTES, // pre-tokenizers
    TOKEN_FROM_BYTES,
    TOKEN_FROM_FALLBACK,
    TOKEN_FUSE,
    TOKEN_STRIP,
    TOKEN_FROM_METASPACE // decoders
} token_step_kind;
typedef enum token_split { TOKEN_ISOLATED, TOKEN_REMOVED, TOKEN_KEPT, TOKEN_WITH_NEXT, TOKEN_WITH_BEFORE } token_split;
typedef struct token_step {
    token_step_kind kind;
    char *from, *to;    // REPLACE; from: PREPEND, STRIP, METASPACE
    pattern pattern;    // SPLIT
    token_split split;  // what becomes of its matches; KEPT: only they stay
    int prefix, first;  // METASPACE, BYTES: a space is put before; only at the beginning of the text
    size_t start, stop; // STRIP: how many at either end
} token_step;
#define TOKEN_STEPS 16
typedef struct token_steps {
    size_t n;
    token_step step[TOKEN_STEPS];
} token_steps;

typedef struct token_added {
    char *text; // normalized where the token is
    size_t length;
    int32_t id;
    int special, normalized, word, left, right; // word: alone only; left, right: takes the white space there
} token_added;
typedef struct token_merge {
    uint64_t pair; // left id, right id
    uint32_t rank;
    int32_t id; // -1: a free place
} token_merge;

typedef struct tokenizer {
    js_file file;
    size_t n_tokens; // the highest id + 1
    char **token;    // by id; NULL where there is none
    unsigned char *special;
    int32_t *slot; // token by text: a hash table of ids, -1 = free
    size_t slots;
    token_merge *merge;
    size_t merges; // places of the table
    token_added *added;
    size_t n_added;
    token_steps normalizer, pre_tokenizer, decoder;
    int32_t unknown, byte_token[256]; // -1 = none
    int has_bytes, fuse_unknown, whole_words;
    int32_t *before, *after; // special tokens around a text
    size_t n_before, n_after;
    uint32_t byte_code[256]; // the letters of byte-level tokens
    int32_t code_byte[512];
} tokenizer;

// ---- tables ----

EX_FUNC int32_t token_find(const tokenizer *t, const char *text, size_t n) {
    for (size_t at = (size_t)moe_hash(0, text, n);; at++) {
        int32_t id = t->slot[at & (t->slots - 1)];
        if (id < 0) return -1;
        if (strlen(t->token[id]) == n && memcmp(t->token[id], text, n) == 0) return id;
    }
}
EX_FUNC void token_put(tokenizer *t, char *text, int32_t id, const char *where) {
    size_t at = (size_t)moe_hash(0, text, strlen(text));
    if (t->token[id]) refuse(t->file.path, "%s: '%s' and '%s' have the same id %d", where, t->token[id], text, (int)id);
    if (token_find(t, text, strlen(text)) >= 0) refuse(t->file.path, "%s: '%s' stands there twice", where, text);
    t->token[id] = text;
    while (t->slot[at & (t->slots - 1)] >= 0) at++;
    t->slot[at & (t->slots - 1)] = id;
}
EX_FUNC token_merge *token_merge_at(const tokenizer *t, int32_t left, int32_t right) { // or the place for it
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t at = (size_t)moe_hash(0, &pair, sizeof pair);
    while (t->merge[at & (t->merges - 1)].id >= 0 && t->merge[at & (t->merges - 1)].pair != pair) at++;
    t->merge[at & (t->merges - 1)].pair = pair;
    return &t->merge[at & (t->merges - 1)];
}

// ---- reading the file ----

EX_FUNC size_t token_count(const moe_json *list) {
    moe_json item = {0};
    size_t n = 0;
    while (moe_json_next(list, NULL, &item)) n++;
    return n;
}
#define TOKEN_MOST ((size_t)1 << 24) // ids
EX_FUNC void token_read_vocab(tokenizer *t, const moe_json *vocab, const moe_json *added) {
    moe_json key, item = {0};
    const char *path = t->file.path;
    size_t count = token_count(vocab) + token_count(added);
    double most = -1, id;
    for (t->slots = 16; t->slots < 2 * count; t->slots *= 2) continue;
    while (moe_json_next(vocab, &key, &item)) {
        if (moe_json_number(&item, &id) != MOE_OK || !(id >= 0) || id != floor(id) || id >= (double)TOKEN_MOST)
            refuse(path, "model.vocab: byte %zu: an id must be a whole number from 0 to %zu", item.begin, TOKEN_MOST);
        if (id > most) most = id;
    }
    for (item.kind = MOE_JSON_NONE; moe_json_next(added, NULL, &item);) {
        id = (double)js_whole(&t->file, &item, "id", JS_MUST, 0, TOKEN_MOST - 1);
        if (id > most) most = id;
    }
    t->n_tokens = (size_t)(most + 1);
    t->token = allocate(t->n_tokens, sizeof *t->token);
    t->special = allocate(t->n_tokens, 1);
    t->slot = allocate(t->slots, sizeof *t->slot);
    memset(t->slot, -1, t->slots * sizeof *t->slot);
    for (item.kind = MOE_JSON_NONE; moe_json_next(vocab, &key, &item);) {
        moe_json_number(&item, &id);
        token_put(t, js_string(&t->file, &key, NULL), (int32_t)id, "model.vocab");
    }
}
// "a b", or ["a", "b"]
EX_FUNC void token_read_merge(tokenizer *t, const moe_json *item, uint32_t rank) {
    moe_json part = {0};
    const char *path = t->file.path;
    char *left = NULL, *right = NULL;
    if (item->kind == MOE_JSON_LIST) {
        if (moe_json_next(item, NULL, &part)) left = js_string(&t->file, &part, NULL);
        if (left && moe_json_next(item, NULL, &part)) right = js_string(&t->file, &part, NULL);
        if (!right || moe_json_next(item, NULL, &part))
            refuse(path, "model.merges.%u: must be two texts", (unsigned)rank);
    } else {
        left = js_string(&t->file, item, NULL);
        right = strchr(left, ' ');
        if (!right || strchr(right + 1, ' '))
            refuse(path, "model.merges.%u: must be two texts, a space between", (unsigned)rank);
        *right++ = 0;
    }
    text_buffer both = {0};
    text_add(&both, left, strlen(left));
    text_add(&both, right, strlen(right));
    int32_t a = token_find(t, left, strlen(left)), b = token_find(t, right, strlen(right));
    int32_t id = token_find(t, both.text, both.length);
    if (a < 0 || b < 0 || id < 0)
        refuse(path, "model.merges.%u: '%s', '%s' or both together are not in model.vocab", (unsigned)rank, left,
               right);
    token_merge *merge = token_merge_at(t, a, b);
    if (merge->id < 0) *merge = (token_merge){merge->pair, rank, id};
    if (item->kind == MOE_JSON_LIST) free(right);
    free(left);
    free(both.text);
}
EX_FUNC void token_read_model(tokenizer *t, const moe_json *added) {
    const js_file *f = &t->file;
    moe_json model = js_must(f, &f->root, "model", MOE_JSON_OBJECT), item = {0};
    moe_json vocab = js_must(f, &model, "vocab", MOE_JSON_OBJECT), list = js_must(f, &model, "merges", MOE_JSON_LIST);
    char word[64];
    if (strcmp(js_word(f, &model, "type", "BPE", word), "BPE") != 0)
        refuse(f->path, "model.type: '%s' is not known here", word);
    if (*js_word(f, &model, "continuing_subword_prefix", "", word) ||
        *js_word(f, &model, "end_of_word_suffix", "", word))
        refuse(f->path, "model: a subword prefix or suffix is not known here");
    token_read_vocab(t, &vocab, added);
    size_t count = token_count(&list);
    for (t->merges = 16; t->merges < 2 * count; t->merges *= 2) continue;
    t->merge = allocate(t->merges, sizeof *t->merge);
    for (size_t i = 0; i < t->merges; i++) t->merge[i].id = -1;
    for (uint32_t rank = 0; moe_json_next(&list, NULL, &item); rank++) token_read_merge(t, &item, rank);
    t->fuse_unknown = js_flag(f, &model, "fuse_unk", 0);
    t->whole_words = js_flag(f, &model, "ignore_merges", 0);
    t->unknown = -1;
    const char *unknown = js_word(f, &model, "unk_token", NULL, word);
    if (unknown) t->unknown = token_find(t, unknown, strlen(unknown));
    if (unknown && t->unknown < 0) refuse(f->path, "model.unk_token: '%s' is not in model.vocab", unknown);
    t->has_bytes = js_flag(f, &model, "byte_fallback", 0);
    for (int b = 0; b < 256; b++) {
        snprintf(word, sizeof word, "<0x%02X>", (unsigned)b);
        t->byte_token[b] = token_find(t, word, 6);
    }
}

// GPT-2's letters for bytes: printable ones stand for themselves, the others are 256, 257, ...
EX_FUNC void token_letters(tokenizer *t) {
    uint32_t other = 256;
    memset(t->code_byte, -1, sizeof t->code_byte);
    for (uint32_t b = 0; b < 256; b++) {
        int printable = (b >= 33 && b <= 126) || (b >= 161 && b != 173);
        t->byte_code[b] = printable ? b : other++;
        t->code_byte[t->byte_code[b]] = (int32_t)b;
    }
}

static const char token_gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

EX_FUNC token_step *token_step_new(const tokenizer *t, token_steps *steps, token_step_kind kind) {
    if (steps->n == TOKEN_STEPS) refuse(t->file.path, "more than %d steps one after the other", TOKEN_STEPS);
    token_step *s = &steps->step[steps->n++];
    *s = (token_step){.kind = kind};
    return s;
}
EX_FUNC void token_step_split(const tokenizer *t, token_steps *steps, const char *text, token_split split) {
    token_step *s = token_step_new(t, steps, TOKEN_SPLIT);
    s->split = split;
    s->pattern = pattern_read(text);
    if (s->pattern.fault) refuse(t->file.path, "pre_tokenizer: the pattern %s: %s", text, s->pattern.fault);
}
EX_FUNC void token_read_metaspace(const tokenizer *t, const moe_json *v, token_step *s) {
    moe_json item;
    char word[64];
    if (js_get(v, "replacement", &item))
        s->from = js_string(&t->file, &item, NULL);
    else
        s->from = strcpy(allocate(4, 1), "\xE2\x96\x81");
    const char *scheme = js_word(&t->file, v, "prepend_scheme", "always", word);
    s->prefix = strcmp(scheme, "never") != 0 && js_flag(&t->file, v, "add_prefix_space", 1);
    s->first = strcmp(scheme, "first") == 0;
}
// The text of a pattern {"String": ..} or {"Regex": ..} as a regular expression.
EX_FUNC char *token_read_pattern(const tokenizer *t, const moe_json *v) {
    moe_json item;
    text_buffer quoted = {0};
    if (js_get(v, "pattern.Regex", &item)) return js_string(&t->file, &item, NULL);
    item = js_must(&t->file, v, "pattern.String", MOE_JSON_TEXT);
    char *text = js_string(&t->file, &item, NULL);
    text_add(&quoted, "", 0);
    for (const char *c = text; *c; c++) {
        if (strchr("\\^$.[]|()?*+{}", *c)) text_add(&quoted, "\\", 1);
        text_add(&quoted, c, 1);
    }
    free(text);
    return quoted.text;
}
EX_FUNC void token_read_split(const tokenizer *t, const moe_json *v, token_steps *steps) {
    static const char *const names[] = {"Isolated", "Removed", "", "MergedWithNext", "MergedWithPrevious"};
    char word[64], *text = token_read_pattern(t, v);
    const char *behaviour = js_word(&t->file, v, "behavior", "Isolated", word);
    int split = 0, invert = js_flag(&t->file, v, "invert", 0);
    while (split < 5 && strcmp(behaviour, names[split]) != 0) split++;
    if (split == TOKEN_REMOVED && invert) split = TOKEN_KEPT, invert = 0;
    if (split == TOKEN_ISOLATED) invert = 0; // the cuts are the same
    if (split == 5 || invert) refuse(t->file.path, "pre_tokenizer.behavior: '%s' is not known here", behaviour);
    token_step_split(t, steps, text, (token_split)split);
    free(text);
}
// One step of `part` ("normalizer", "pre_tokenizer", "decoder"), or a sequence of them.
EX_FUNC void token_read_steps(const tokenizer *t, const char *part, const moe_json *v, token_steps *steps) {
    static const char *const lists[] = {"normalizers", "pretokenizers", "decoders"};
    const js_file *f = &t->file;
    moe_json list, item = {0};
    char word[64];
    const char *type = js_word(f, v, "type", "", word);
    int decoder = *part == 'd';
    for (int i = 0; i < 3; i++)
        if (strcmp(type, "Sequence") == 0 && js_get(v, lists[i], &list)) {
            while (moe_json_next(&list, NULL, &item)) {
                if (item.kind != MOE_JSON_OBJECT)
                    refuse(f->path, "%s: byte %zu: a step must be an object", part, item.begin);
                token_read_steps(t, part, &item, steps);
            }
            return;
        }
    if (strcmp(type, "NFC") == 0)
        token_step_new(t, steps, TOKEN_NFC);
    else if (strcmp(type, "NFD") == 0)
        token_step_new(t, steps, TOKEN_NFD);
    else if (strcmp(type, "Prepend") == 0) {
        list = js_must(f, v, "prepend", MOE_JSON_TEXT);
        token_step_new(t, steps, TOKEN_PREPEND)->from = js_string(f, &list, NULL);
    } else if (strcmp(type, "Replace") == 0) {
        token_step *s = token_step_new(t, steps, TOKEN_REPLACE);
        list = js_must(f, v, "pattern.String", MOE_JSON_TEXT);
        item = js_must(f, v, "content", MOE_JSON_TEXT);
        s->from = js_string(f, &list, NULL);
        s->to = js_string(f, &item, NULL);
    } else if (strcmp(type, "Split") == 0)
        token_read_split(t, v, steps);
    else if (strcmp(type, "Digits") == 0)
        token_step_split(t, steps, js_flag(f, v, "individual_digits", 0) ? "\\p{N}" : "\\p{N}+", TOKEN_ISOLATED);
    else if (strcmp(type, "Punctuation") == 0)
        token_step_split(t, steps, "[\\p{P}$+<=>^`|~]", TOKEN_ISOLATED);
    else if (strcmp(type, "Whitespace") == 0)
        token_step_split(t, steps, "\\w+|[^\\w\\s]+", TOKEN_KEPT);
    else if (strcmp(type, "WhitespaceSplit") == 0)
        token_step_split(t, steps, "\\s", TOKEN_REMOVED);
    else if (strcmp(type, "ByteLevel") == 0 && decoder)
        token_step_new(t, steps, TOKEN_FROM_BYTES);
    else if (strcmp(type, "ByteLevel") == 0) {
        if (js_flag(f, v, "add_prefix_space", 1)) {
            token_step *s = token_step_new(t, steps, TOKEN_METASPACE);
            s->from = strcpy(allocate(2, 1), " ");
            s->prefix = 1;
        }
        if (js_flag(f, v, "use_regex", 1)) token_step_split(t, steps, token_gpt2, TOKEN_ISOLATED);
        token_step_new(t, steps, TOKEN_BYTES);
    } else if (strcmp(type, "Metaspace") == 0) {
        token_read_metaspace(t, v, token_step_new(t, steps, decoder ? TOKEN_FROM_METASPACE : TOKEN_METASPACE));
        if (!decoder && js_flag(f, v, "split", 1))
            token_step_split(t, steps, steps->step[steps->n - 1].from, TOKEN_WITH_NEXT);
    } else if (strcmp(type, "ByteFallback") == 0)
        token_step_new(t, steps, TOKEN_FROM_FALLBACK);
    else if (strcmp(type, "Fuse") == 0)
        token_step_new(t, steps, TOKEN_FUSE);
    else if (strcmp(type, "Strip") == 0 && decoder) {
        token_step *s = token_step_new(t, steps, TOKEN_STRIP);
        list = js_must(f, v, "content", MOE_JSON_TEXT);
        s->from = js_string(f, &list, NULL);
        s->start = js_whole(f, v, "start", 0, 0, 1000);
        s->stop = js_whole(f, v, "stop", 0, 0, 1000);
    } else
        refuse(f->path, "%s.type: '%s' is not known here", part, type);
}

EX_FUNC void token_normalize(const tokenizer *t, const char *text, size_t n, text_buffer *out);
EX_FUNC void token_read_added(tokenizer *t, const moe_json *list) {
    const js_file *f = &t->file;
    moe_json item = {0};
    t->added = allocate(token_count(list), sizeof *t->added);
    while (moe_json_next(list, NULL, &item)) {
        token_added *a = &t->added[t->n_added++];
        moe_json content = js_must(f, &item, "content", MOE_JSON_TEXT);
        char *text = js_string(f, &content, &a->length);
        a->id = (int32_t)js_whole(f, &item, "id", JS_MUST, 0, TOKEN_MOST - 1);
        a->special = js_flag(f, &item, "special", 0);
        a->normalized = js_flag(f, &item, "normalized", 0);
        a->word = js_flag(f, &item, "single_word", 0);
        a->left = js_flag(f, &item, "lstrip", 0);
        a->right = js_flag(f, &item, "rstrip", 0);
        if (!a->length) refuse(f->path, "added_tokens.%zu: content is empty", t->n_added - 1);
        if (token_find(t, text, a->length) != a->id) token_put(t, text, a->id, "added_tokens");
        t->special[a->id] = (unsigned char)a->special;
        a->text = text;
        if (a->normalized) {
            text_buffer normal = {0};
            token_normalize(t, text, a->length, &normal);
            a->text = normal.text;
            a->length = normal.length;
        }
    }
}
// {"SpecialToken": {"id": "<s>"}} or {"Sequence": {"id": "A"}}: what stands before and after the text.
EX_FUNC void token_read_template(tokenizer *t, const moe_json *v) {
    const js_file *f = &t->file;
    moe_json list = js_must(f, v, "single", MOE_JSON_LIST), item = {0}, ids;
    size_t count = 0, *n = &t->n_before;
    t->before = allocate(64, sizeof *t->before);
    t->after = allocate(64, sizeof *t->after);
    while (moe_json_next(&list, NULL, &item)) {
        moe_json sequence, id = {0};
        char word[64], path[128];
        if (js_get(&item, "Sequence", &sequence)) {
            count++;
            n = &t->n_after;
            continue;
        }
        js_word(f, &item, "SpecialToken.id", "", word);
        snprintf(path, sizeof path, "special_tokens.%s.ids", word);
        if (strchr(word, '.')) refuse(f->path, "post_processor: '%s' has a point in its name", word);
        ids = js_must(f, v, path, MOE_JSON_LIST);
        while (moe_json_next(&ids, NULL, &id)) {
            double number = -1;
            if (moe_json_number(&id, &number) != MOE_OK || !(number >= 0) || number >= (double)t->n_tokens || *n == 64)
                refuse(f->path, "post_processor.%s: not the id of a token", path);
            if (n == &t->n_before)
                t->before[(*n)++] = (int32_t)number;
            else
                t->after[(*n)++] = (int32_t)number;
        }
    }
    if (count != 1) refuse(f->path, "post_processor.single must hold the text once");
}
EX_FUNC void token_read_post(tokenizer *t, const moe_json *v) {
    moe_json list, item = {0};
    char word[64];
    const char *type = js_word(&t->file, v, "type", "", word);
    if (strcmp(type, "Sequence") == 0) {
        list = js_must(&t->file, v, "processors", MOE_JSON_LIST);
        while (moe_json_next(&list, NULL, &item))
            if (item.kind == MOE_JSON_OBJECT) token_read_post(t, &item);
    } else if (strcmp(type, "TemplateProcessing") == 0)
        token_read_template(t, v);
    else if (strcmp(type, "ByteLevel") != 0)
        refuse(t->file.path, "post_processor.type: '%s' is not known here", type);
}
// The path must stay. The tokenizer lives until the program ends.
EX_FUNC tokenizer *tokenizer_open(const char *path) {
    tokenizer *t = allocate(1, sizeof *t);
    moe_json added = {0}, part;
    t->file = js_open(path);
    js_get(&t->file.root, "added_tokens", &added);
    token_letters(t);
    token_read_model(t, &added);
    if (js_get(&t->file.root, "normalizer", &part)) token_read_steps(t, "normalizer", &part, &t->normalizer);
    if (js_get(&t->file.root, "pre_tokenizer", &part)) token_read_steps(t, "pre_tokenizer", &part, &t->pre_tokenizer);
    if (js_get(&t->file.root, "decoder", &part)) token_read_steps(t, "decoder", &part, &t->decoder);
    token_read_added(t, &added);
    if (js_get(&t->file.root, "post_processor", &part)) token_read_post(t, &part);
    return t;
}

// ---- text to ids ----

typedef struct token_list {
    int32_t *id;
    size_t n, room;
} token_list;
EX_FUNC void token_push(token_list *l, int32_t id) {
    if (l->n == l->room) {
        l->room = 2 * l->room + 64;
        l->id = realloc(l->id, l->room * sizeof *l->id);
        if (!l->id) die("out of memory");
    }
    l->id[l->n++] = id;
}

EX_FUNC void token_replace(const char *text, size_t n, const char *from, const char *to, text_buffer *out) {
    size_t length = strlen(from);
    text_add(out, "", 0);
    for (size_t i = 0, step; i < n; i += step) {
        int is = text_begins(text + i, n - i, from);
        step = is ? length : 1;
        text_add(out, is ? to : text + i, is ? strlen(to) : 1);
    }
}
EX_FUNC uint32_t *token_codes(const char *text, size_t n, size_t *count) {
    uint32_t *codes = allocate(n, sizeof *codes);
    *count = 0;
    for (size_t i = 0, length; i < n; i += length) codes[(*count)++] = uni_decode(text + i, n - i, &length);
    return codes;
}
EX_FUNC void token_normal_form(const char *text, size_t n, int compose, text_buffer *out) {
    size_t plain = 0;
    while (plain < n && (unsigned char)text[plain] < 128) plain++;
    text_add(out, text, plain == n ? n : 0);
    if (plain == n) return;
    uint32_t *codes = allocate(n, sizeof *codes), *normal = allocate(n, 4 * sizeof *normal), code;
    for (size_t i = 0; i < n;) {
        size_t count = 0, length;
        for (; i < n && (code = uni_decode(text + i, n - i, &length)) != UNI_NONE; i += length) codes[count++] = code;
        count = uni_normalize(codes, count, compose, normal);
        for (size_t k = 0; k < count; k++) text_code(out, normal[k]);
        if (i < n) text_add(out, text + i++, 1); // no UTF-8: stays
    }
    free(codes);
    free(normal);
}
EX_FUNC void token_normalize(const tokenizer *t, const char *text, size_t n, text_buffer *out) {
    text_add(out, text, n);
    for (size_t i = 0; i < t->normalizer.n; i++) {
        const token_step *s = &t->normalizer.step[i];
        text_buffer in = *out;
        *out = (text_buffer){0};
        if (s->kind == TOKEN_REPLACE)
            token_replace(in.text, in.length, s->from, s->to, out);
        else if (s->kind == TOKEN_PREPEND) {
            if (in.length) text_add(out, s->from, strlen(s->from));
            text_add(out, in.text, in.length);
        } else
            token_normal_form(in.text, in.length, s->kind == TOKEN_NFC, out);
        free(in.text);
    }
}

// Merging: the parts of a word are a list; a heap holds the pairs that can be merged, the lowest rank first, then the
// leftmost. What a merge has outdated is passed over.
typedef struct token_part {
    int32_t id;
    size_t before, next;
} token_part;
typedef struct token_pair {
    uint32_t rank;
    size_t at;
    int32_t left, right, id;
} token_pair;
typedef struct token_word {
    token_part *part;
    token_pair *heap;
    size_t n, pairs;
} token_word;
EX_FUNC int token_sooner(const token_pair *a, const token_pair *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}
EX_FUNC void token_offer(const tokenizer *t, token_word *w, size_t at) { // the pair that begins at `at`
    size_t next = w->part[at].next, i = w->pairs;
    if (next == SIZE_MAX) return;
    const token_merge *m = token_merge_at(t, w->part[at].id, w->part[next].id);
    if (m->id < 0) return;
    token_pair pair = {m->rank, at, w->part[at].id, w->part[next].id, m->id};
    for (w->pairs++; i && token_sooner(&pair, &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = pair;
}
EX_FUNC token_pair token_best(token_word *w) {
    token_pair best = w->heap[0], last = w->heap[--w->pairs];
    size_t i = 0;
    for (size_t child = 1; child < w->pairs; child = 2 * i + 1) {
        if (child + 1 < w->pairs && token_sooner(&w->heap[child + 1], &w->heap[child])) child++;
        if (!token_sooner(&w->heap[child], &last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return best;
}
// The characters of a word as tokens: of the vocabulary, or its bytes, or the unknown token.
EX_FUNC void token_parts(const tokenizer *t, const char *text, size_t n, token_list *out) {
    int unknown = 0; // the last one was
    for (size_t i = 0, length; i < n; i += length) {
        uni_decode(text + i, n - i, &length);
        int32_t id = token_find(t, text + i, length);
        int bytes = id < 0 && t->has_bytes;
        for (size_t k = 0; k < length && bytes; k++) bytes = t->byte_token[(unsigned char)text[i + k]] >= 0;
        for (size_t k = 0; k < length && bytes; k++) token_push(out, t->byte_token[(unsigned char)text[i + k]]);
        if (id >= 0)
            token_push(out, id);
        else if (!bytes && t->unknown >= 0 && !(unknown && t->fuse_unknown))
            token_push(out, t->unknown);
        unknown = id < 0 && !bytes;
    }
}
EX_FUNC void token_merges(const tokenizer *t, const char *text, size_t n, token_list *out) {
    token_list parts = {0};
    int32_t whole = t->whole_words ? token_find(t, text, n) : -1;
    if (whole >= 0) {
        token_push(out, whole);
        return;
    }
    token_parts(t, text, n, &parts);
    token_word w = {allocate(parts.n, sizeof *w.part), allocate(3 * parts.n, sizeof *w.heap), parts.n, 0};
    for (size_t i = 0; i < w.n; i++) w.part[i] = (token_part){parts.id[i], i - 1, i + 1}; // 0 - 1: none
    if (w.n) w.part[w.n - 1].next = SIZE_MAX;
    for (size_t i = 0; i < w.n; i++) token_offer(t, &w, i);
    while (w.pairs) {
        token_pair p = token_best(&w);
        size_t next = w.part[p.at].next;
        if (w.part[p.at].id != p.left || next == SIZE_MAX || w.part[next].id != p.right) continue;
        w.part[p.at].id = p.id;
        w.part[p.at].next = w.part[next].next;
        w.part[next].id = -1;
        if (w.part[next].next != SIZE_MAX) w.part[w.part[next].next].before = p.at;
        token_offer(t, &w, p.at);
        if (w.part[p.at].before != SIZE_MAX) token_offer(t, &w, w.part[p.at].before);
    }
    for (size_t i = 0; i < w.n; i++)
        if (w.part[i].id >= 0) token_push(out, w.part[i].id);
    free(parts.id);
    free(w.part);
    free(w.heap);
}

// The pre-tokenizer's steps from `step` on, then the merges. first: the piece is the beginning of the whole text.
EX_FUNC void token_piece(const tokenizer *t, size_t step, const char *text, size_t n, int first, token_list *out);
EX_FUNC void token_cut(const tokenizer *t, size_t step, const char *text, size_t n, int first, token_list *out) {
    const token_step *s = &t->pre_tokenizer.step[step];
    size_t count, begin = 0, end, done = 0, at = 0; // done: how far pieces are made; at: bytes of it
    uint32_t *codes = token_codes(text, n, &count);
    size_t *byte = allocate(count + 1, sizeof *byte);
    for (size_t i = 0, length; i < count; i++, at += length) {
        byte[i] = at;
        uni_decode(text + at, n - at, &length);
    }
    byte[count] = n;
    for (int found = 1; found; begin = end) {
        found = pattern_find(&s->pattern, codes, count, &begin, &end);
        if (!found) begin = end = count;
        size_t cut[3] = {begin, end, end}; // pieces: done .. cut[0] .. cut[1]
        int keep[2] = {s->split != TOKEN_KEPT, s->split != TOKEN_REMOVED};
        if (s->split == TOKEN_WITH_NEXT) cut[1] = begin; // the match begins the next piece
        if (s->split == TOKEN_WITH_BEFORE) cut[0] = end;
        for (int i = 0; i < 2; i++) {
            if (cut[i] > done && keep[i])
                token_piece(t, step + 1, text + byte[done], byte[cut[i]] - byte[done], first && !done, out);
            if (cut[i] > done) done = cut[i];
        }
    }
    free(codes);
    free(byte);
}
EX_FUNC void token_piece(const tokenizer *t, size_t step, const char *text, size_t n, int first, token_list *out) {
    if (!n) return;
    if (step == t->pre_tokenizer.n) {
        token_merges(t, text, n, out);
        return;
    }
    const token_step *s = &t->pre_tokenizer.step[step];
    text_buffer b = {0}, spaced = {0};
    if (s->kind == TOKEN_SPLIT) {
        token_cut(t, step, text, n, first, out);
        return;
    }
    if (s->kind == TOKEN_BYTES)
        for (size_t i = 0; i < n; i++) text_code(&b, t->byte_code[(unsigned char)text[i]]);
    else {
        token_replace(text, n, " ", s->from, &spaced);
        if (s->prefix && (first || !s->first) && !text_begins(spaced.text, spaced.length, s->from))
            text_add(&b, s->from, strlen(s->from));
        text_add(&b, spaced.text, spaced.length);
    }
    token_piece(t, step + 1, b.text, b.length, first, out);
    free(b.text);
    free(spaced.text);
}

// The first added token in the text from *begin on, the longest of those that begin there; normalized ones or not.
EX_FUNC const token_added *token_added_find(const tokenizer *t, int normalized, const char *text, size_t n,
                                            size_t *begin) {
    for (; *begin < n; ++*begin) {
        const token_added *best = NULL;
        for (size_t i = 0; i < t->n_added; i++) {
            const token_added *a = &t->added[i];
            if (a->normalized != normalized || a->text[0] != text[*begin]) continue;
            if (best && a->length <= best->length) continue;
            if (a->length <= n - *begin && memcmp(text + *begin, a->text, a->length) == 0) best = a;
        }
        if (best) return best;
    }
    return NULL;
}
EX_FUNC int token_is_word(const char *text, size_t n, size_t at, int before) { // the character before or at `at`
    size_t length, i = at;
    if (before ? !at : at == n) return 0;
    while (before && i && ((unsigned char)text[--i] & 0xC0) == 0x80) continue;
    uint32_t code = uni_decode(text + i, n - i, &length);
    return uni_is(code, uni_mask("L", 1) | uni_mask("M", 1) | uni_mask("N", 1) | uni_mask("Pc", 2));
}
// Text without added tokens of the first kind: normalized, cut at those of the second, then in pieces.
EX_FUNC void token_segment(const tokenizer *t, int normalized, const char *text, size_t n, int first, token_list *out) {
    text_buffer normal = {0};
    if (normalized) {
        token_normalize(t, text, n, &normal);
        text = normal.text;
        n = normal.length;
    }
    for (size_t done = 0, at = 0; done < n;) {
        const token_added *a = token_added_find(t, normalized, text, n, &at);
        size_t begin = at, end = a ? at + a->length : n, length;
        at = end;
        if (a && a->word && (token_is_word(text, n, begin, 1) || token_is_word(text, n, end, 0))) continue;
        while (a && a->right && end < n && uni_space(uni_decode(text + end, n - end, &length))) end += length;
        while (a && a->left && begin > done && strchr(" \t\r\n\f\v", text[begin - 1])) begin--;
        if (begin > done && normalized)
            token_piece(t, 0, text + done, begin - done, first && !done, out);
        else if (begin > done)
            token_segment(t, 1, text + done, begin - done, first && !done, out);
        if (a) token_push(out, a->id);
        done = end;
        if (at < end) at = end;
    }
    free(normal.text);
}
// The ids of a text of n bytes of UTF-8, with the special tokens around it if `special`; free(list.id).
EX_FUNC token_list tokenizer_encode(const tokenizer *t, const char *text, size_t n, int special) {
    token_list out = {0};
    for (size_t i = 0; i < t->n_before && special; i++) token_push(&out, t->before[i]);
    token_segment(t, 0, text, n, 1, &out);
    for (size_t i = 0; i < t->n_after && special; i++) token_push(&out, t->after[i]);
    return out;
}
// Where the text is no UTF-8, or n.
EX_FUNC size_t text_bad(const char *text, size_t n) {
    size_t i = 0, length;
    while (i < n && uni_decode(text + i, n - i, &length) != UNI_NONE) i += length;
    return i;
}

// ---- ids to text ----

// Bytes as UTF-8; for what is none U+FFFD, one for each beginning of a character that breaks off [Unicode 3.9, D93b].
EX_FUNC void text_lossy(const char *text, size_t n, text_buffer *out) {
    for (size_t i = 0, length; i < n; i += length) {
        const unsigned char *s = (const unsigned char *)text + i;
        if (uni_decode(text + i, n - i, &length) != UNI_NONE) {
            text_add(out, text + i, length);
            continue;
        }
        size_t whole = s[0] >= 0xF0 ? 4 : 3;
        int low = 0x80, high = 0xBF; // the second byte must not be too low or too high after some
        if (s[0] == 0xE0) low = 0xA0;
        if (s[0] == 0xF0) low = 0x90;
        if (s[0] == 0xED) high = 0x9F;
        if (s[0] == 0xF4) high = 0x8F;
        if (s[0] < 0xE0 || s[0] >= 0xF5) whole = 1;
        for (; length < whole && i + length < n && s[length] >= low && s[length] <= high; low = 0x80, high = 0xBF)
            length++;
        text_code(out, 0xFFFD);
    }
}
// The bytes that a byte-level token stands for; a letter that stands for none: its own text.
EX_FUNC void token_from_bytes(const tokenizer *t, const text_buffer *in, text_buffer *out) {
    size_t begin = out->length;
    for (size_t i = 0, length; i < in->length; i += length) {
        uint32_t code = uni_decode(in->text + i, in->length - i, &length);
        int32_t byte = code < 512 ? t->code_byte[code] : -1;
        char c = (char)byte;
        if (byte < 0) {
            out->length = begin;
            text_add(out, in->text, in->length);
            return;
        }
        text_add(out, &c, 1);
    }
}
EX_FUNC int token_fallback_byte(const text_buffer *b) { // of "<0x41>"; -1: another token
    char *end;
    if (b->length != 6 || memcmp(b->text, "<0x", 3) != 0) return -1;
    unsigned long byte = strtoul(b->text + 3, &end, 16);
    return end == b->text + 5 && *end == '>' ? (int)byte : -1;
}
EX_FUNC void token_from_fallback(text_buffer *part, size_t n) {
    for (size_t i = 0, run; i < n; i += run) {
        text_buffer bytes = {0};
        for (run = 0; i + run < n && token_fallback_byte(&part[i + run]) >= 0; run++) {
            char c = (char)token_fallback_byte(&part[i + run]);
            text_add(&bytes, &c, 1);
            part[i + run].length = 0;
        }
        if (!run) {
            run = 1;
            continue;
        }
        if (text_bad(bytes.text, run) < run)
            for (size_t k = 0; k < run; k++) text_code(&part[i], 0xFFFD);
        else
            text_add(&part[i], bytes.text, run);
        free(bytes.text);
    }
}
EX_FUNC void token_strip(const token_step *s, text_buffer *b) {
    size_t length = strlen(s->from), begin = 0, end = b->length;
    for (size_t i = 0; i < s->start && text_begins(b->text + begin, end - begin, s->from); i++) begin += length;
    for (size_t i = 0; i < s->stop && end >= begin + length; i++)
        if (text_begins(b->text + end - length, length, s->from)) end -= length;
    memmove(b->text, b->text + begin, end - begin);
    b->length = end - begin;
}
// One step over the texts of n tokens; fusing leaves one.
EX_FUNC size_t token_decode_step(const tokenizer *t, const token_step *s, text_buffer *part, size_t n) {
    text_buffer all = {0}, out = {0};
    text_add(&out, "", 0);
    for (size_t i = 0; i < n; i++) {
        if (s->kind == TOKEN_STRIP) token_strip(s, &part[i]);
        if (s->kind == TOKEN_FROM_BYTES) token_from_bytes(t, &part[i], &all);
        if (s->kind == TOKEN_FUSE) text_add(&out, part[i].text, part[i].length);
        if (s->kind != TOKEN_REPLACE && s->kind != TOKEN_FROM_METASPACE) continue;
        text_buffer in = part[i];
        part[i] = (text_buffer){0};
        token_replace(in.text, in.length, s->from, s->kind == TOKEN_REPLACE ? s->to : " ", &part[i]);
        if (s->kind == TOKEN_FROM_METASPACE && !i && s->prefix && part[i].length && *part[i].text == ' ')
            memmove(part[i].text, part[i].text + 1, part[i].length--);
        free(in.text);
    }
    if (s->kind == TOKEN_FROM_FALLBACK) token_from_fallback(part, n);
    if (s->kind == TOKEN_FROM_BYTES) text_lossy(all.text, all.length, &out);
    int one = s->kind == TOKEN_FUSE || s->kind == TOKEN_FROM_BYTES;
    free(all.text);
    if (!one || !n) {
        free(out.text);
        return n;
    }
    for (size_t i = 0; i < n; i++) free(part[i].text);
    part[0] = out;
    return 1;
}
// The text of n ids; without special tokens if `skip`. free(buffer.text).
EX_FUNC text_buffer tokenizer_decode(const tokenizer *t, const int32_t *ids, size_t n, int skip) {
    text_buffer *part = allocate(n, sizeof *part), out = {0};
    size_t count = 0;
    for (size_t i = 0; i < n; i++) {
        int known = ids[i] >= 0 && (size_t)ids[i] < t->n_tokens && t->token[ids[i]];
        if (!known || (skip && t->special[ids[i]])) continue;
        text_add(&part[count++], t->token[ids[i]], strlen(t->token[ids[i]]));
    }
    for (size_t i = 0; i < t->decoder.n; i++) count = token_decode_step(t, &t->decoder.step[i], part, count);
    text_add(&out, "", 0);
    for (size_t i = 0; i < count; i++) {
        if (i && !t->decoder.n) text_add(&out, " ", 1);
        text_add(&out, part[i].text, part[i].length);
        free(part[i].text);
    }
    free(part);
    return out;
}

#endif

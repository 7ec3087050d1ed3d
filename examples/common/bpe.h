// bpe.h - learns a byte-level byte-pair encoding from a text and writes it as tokenizer.json, which the usual Python
// tools read (GPT-2's layout: ByteLevel pre-tokeniser, list of merges).
//
//     bpe *b = bpe_learn(text, size, 4096);
//     bpe_save(b, "tokenizer.json");
//     bpe_free(b);
//
// Ids: 0 to 255 are the bytes, then one for each merge, then the added tokens: words that the text is full of and that
// GPT-2's pattern would cut ("<unk>", "@-@"; each with the space before it), at last "<|endoftext|>". The most frequent
// pair of neighbours inside a piece is merged first; of equal ones that with the lower ids. Counts stand in a table by
// pair and their order in a heap whose entries are put right when they come up, so that a text of 10 MB takes about a
// second. Every byte keeps a token of its own, so any text can be written and reads back as it was.
#ifndef EX_BPE_H
#define EX_BPE_H

#include "platform.h"

#include <stddef.h>

enum { BPE_MAX_ADDED = 32, BPE_ADDED_SIZE = 48 };

typedef struct bpe {
    size_t n_tokens; // all of them: 256 + n_merges + n_added
    size_t n_merges, n_added;
    uint32_t (*merge)[2]; // (n_merges): token 256 + i is these two
    char added[BPE_MAX_ADDED][BPE_ADDED_SIZE];
} bpe;

// ---- pieces ----

// What a byte is to GPT-2's pattern; here every byte of a character beyond ASCII counts as a letter, which is enough to
// learn from: who encodes looks at characters.
typedef enum bpe_class { BPE_SPACE, BPE_LETTER, BPE_DIGIT, BPE_OTHER } bpe_class;
EX_FUNC bpe_class bpe_class_of(unsigned char c) {
    if (c == ' ' || (c >= 9 && c <= 13)) return BPE_SPACE;
    if (c >= '0' && c <= '9') return BPE_DIGIT;
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c >= 128) return BPE_LETTER;
    return BPE_OTHER;
}

// Length of the piece that text (at least one byte) begins with: a contraction; a run of one class, with one space
// before it; white space up to the last before what follows.
EX_FUNC size_t bpe_piece(const char *text, size_t size) {
    static const char *const contraction[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    const unsigned char *at = (const unsigned char *)text;
    for (size_t i = 0; i < sizeof contraction / sizeof *contraction; i++) {
        size_t length = strlen(contraction[i]);
        if (length <= size && memcmp(text, contraction[i], length) == 0) return length;
    }
    size_t begin = at[0] == ' ' && size > 1 && bpe_class_of(at[1]) != BPE_SPACE, end = begin;
    bpe_class class = bpe_class_of(at[begin]);
    while (end < size && bpe_class_of(at[end]) == class) end++;
    if (class == BPE_SPACE && end > 1 && end < size) end--; // the last goes with what follows
    return end;
}

// Length of the added token that text begins with, the longest of them; 0 for none.
EX_FUNC size_t bpe_added(const bpe *b, const char *text, size_t size) {
    size_t longest = 0;
    for (size_t i = 0; i < b->n_added; i++) {
        if (b->added[i][0] != *text) continue;
        size_t length = strlen(b->added[i]);
        if (length > longest && length <= size && memcmp(text, b->added[i], length) == 0) longest = length;
    }
    return longest;
}

// ---- tables ----

// 64-bit keys -> indices 0, 1, ... in the order of their arrival. Key 0 is not allowed.
typedef struct bpe_table {
    uint64_t *key;
    uint32_t *index;
    size_t count, room; // room: a power of two
} bpe_table;

EX_FUNC uint64_t bpe_mix(uint64_t x) {
    x = (x ^ (x >> 31)) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 32);
}
EX_FUNC size_t bpe_slot(const bpe_table *t, uint64_t key) {
    size_t at = (size_t)bpe_mix(key) & (t->room - 1);
    while (t->key[at] && t->key[at] != key) at = (at + 1) & (t->room - 1);
    return at;
}
EX_FUNC void bpe_table_grow(bpe_table *t) {
    bpe_table old = *t;
    t->room = old.room ? 2 * old.room : 1024;
    t->key = allocate(t->room, sizeof *t->key);
    t->index = allocate(t->room, sizeof *t->index);
    for (size_t i = 0; i < old.room; i++)
        if (old.key[i]) {
            size_t at = bpe_slot(t, old.key[i]);
            t->key[at] = old.key[i];
            t->index[at] = old.index[i];
        }
    free(old.key);
    free(old.index);
}
// The index of a key, which enters the table if it is new.
EX_FUNC size_t bpe_index(bpe_table *t, uint64_t key) {
    if (2 * t->count >= t->room) bpe_table_grow(t);
    size_t at = bpe_slot(t, key);
    if (!t->key[at]) {
        t->key[at] = key;
        t->index[at] = (uint32_t)t->count++;
    }
    return t->index[at];
}
EX_FUNC void bpe_table_free(bpe_table *t) {
    free(t->key);
    free(t->index);
}
// At least `need` elements of `size` bytes; what is new is zero.
EX_FUNC void *bpe_more(void *array, size_t *room, size_t need, size_t size) {
    if (need <= *room) return array;
    size_t more = *room ? 2 * *room : 16;
    if (more < need) more = need;
    array = realloc(array, more * size);
    if (!array) die("out of memory");
    memset((char *)array + *room * size, 0, (more - *room) * size);
    *room = more;
    return array;
}

// ---- what is counted ----

// Different strings of a text, each with its number. Two strings with one hash of 64 bits would count as one.
typedef struct bpe_words {
    bpe_table table;
    struct bpe_word {
        const char *text;
        uint32_t size, count;
    } *word;
    size_t room;
} bpe_words;

EX_FUNC void bpe_count(bpe_words *w, const char *text, size_t size) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    size_t i = bpe_index(&w->table, hash | 1);
    w->word = bpe_more(w->word, &w->room, i + 1, sizeof *w->word);
    if (!w->word[i].count++) w->word[i].text = text, w->word[i].size = (uint32_t)size;
}
EX_FUNC void bpe_words_free(bpe_words *w) {
    bpe_table_free(&w->table);
    free(w->word);
}

EX_FUNC int bpe_word_order(const void *a, const void *b) { // the most frequent first, then by the text
    const struct bpe_word *x = a, *y = b;
    if (x->count != y->count) return x->count < y->count ? 1 : -1;
    int order = memcmp(x->text, y->text, x->size < y->size ? x->size : y->size);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

// Words of one in 1000 and more that the pattern would cut become tokens, each with the space before it.
EX_FUNC void bpe_find_added(bpe *b, const char *text, size_t size) {
    bpe_words words = {.room = 0};
    size_t total = 0;
    for (size_t at = 0, end; at < size; at = end) {
        end = at + 1;
        if (text[at] != ' ') continue;
        while (end < size && bpe_class_of((unsigned char)text[end]) != BPE_SPACE) end++;
        if (end == at + 1) continue;
        total++;
        if (bpe_piece(text + at, end - at) < end - at) bpe_count(&words, text + at, end - at);
    }
    if (words.table.count) qsort(words.word, words.table.count, sizeof *words.word, bpe_word_order);
    for (size_t i = 0; i < words.table.count && b->n_added + 1 < BPE_MAX_ADDED; i++) {
        const struct bpe_word *w = &words.word[i];
        if (w->size >= BPE_ADDED_SIZE || (size_t)w->count * 1000 < total) continue;
        memcpy(b->added[b->n_added++], w->text, w->size);
    }
    bpe_words_free(&words);
}

// ---- learning ----

typedef struct bpe_pair {
    uint64_t key; // (first + 1) << 32 | second
    int64_t count;
    uint32_t *where; // words that have, or had, the pair
    size_t n_where, room;
} bpe_pair;

typedef struct bpe_heap_entry {
    int64_t count;
    uint64_t key;
    uint32_t pair;
} bpe_heap_entry;

typedef struct bpe_learner {
    bpe_words words;
    uint32_t **symbol; // of each word
    uint32_t *length;
    bpe_table table; // of pairs
    bpe_pair *pair;
    size_t pair_room;
    bpe_heap_entry *heap;
    size_t n_heap, heap_room;
} bpe_learner;

EX_FUNC int bpe_before(const bpe_heap_entry *a, const bpe_heap_entry *b) {
    return a->count != b->count ? a->count > b->count : a->key < b->key;
}
EX_FUNC void bpe_push(bpe_learner *l, size_t pair) {
    bpe_heap_entry e = {l->pair[pair].count, l->pair[pair].key, (uint32_t)pair};
    l->heap = bpe_more(l->heap, &l->heap_room, l->n_heap + 1, sizeof *l->heap);
    size_t at = l->n_heap++;
    for (; at && bpe_before(&e, &l->heap[(at - 1) / 2]); at = (at - 1) / 2) l->heap[at] = l->heap[(at - 1) / 2];
    l->heap[at] = e;
}
EX_FUNC bpe_heap_entry bpe_pop(bpe_learner *l) {
    bpe_heap_entry top = l->heap[0], last = l->heap[--l->n_heap];
    size_t at = 0;
    for (size_t child; (child = 2 * at + 1) < l->n_heap; at = child) {
        if (child + 1 < l->n_heap && bpe_before(&l->heap[child + 1], &l->heap[child])) child++;
        if (!bpe_before(&l->heap[child], &last)) break;
        l->heap[at] = l->heap[child];
    }
    l->heap[at] = last;
    return top;
}

EX_FUNC size_t bpe_pair_add(bpe_learner *l, uint32_t first, uint32_t second, size_t word, int64_t count) {
    uint64_t key = ((uint64_t)first + 1) << 32 | second;
    size_t i = bpe_index(&l->table, key);
    l->pair = bpe_more(l->pair, &l->pair_room, i + 1, sizeof *l->pair);
    bpe_pair *p = &l->pair[i];
    p->key = key;
    p->count += count;
    if (count > 0 && (!p->n_where || p->where[p->n_where - 1] != word)) {
        p->where = bpe_more(p->where, &p->room, p->n_where + 1, sizeof *p->where);
        p->where[p->n_where++] = (uint32_t)word;
    }
    return i;
}

EX_FUNC void bpe_learn_begin(bpe_learner *l, const bpe *b, const char *text, size_t size) {
    for (size_t at = 0, end, stop = 0; at < size; at += end) {
        end = bpe_added(b, text + at, size - at);
        if (end) continue;
        if (stop <= at) // where the next of them stands: a piece ends there
            for (stop = at + 1; stop < size && !bpe_added(b, text + stop, size - stop); stop++) {}
        end = bpe_piece(text + at, stop - at);
        bpe_count(&l->words, text + at, end);
    }
    size_t n = l->words.table.count;
    l->symbol = allocate(n, sizeof *l->symbol);
    l->length = allocate(n, sizeof *l->length);
    for (size_t w = 0; w < n; w++) {
        const struct bpe_word *word = &l->words.word[w];
        l->symbol[w] = allocate(word->size, sizeof **l->symbol);
        l->length[w] = word->size;
        for (size_t i = 0; i < word->size; i++) l->symbol[w][i] = (unsigned char)word->text[i];
        for (size_t i = 0; i + 1 < word->size; i++)
            bpe_pair_add(l, l->symbol[w][i], l->symbol[w][i + 1], w, word->count);
    }
    for (size_t i = 0; i < l->table.count; i++) bpe_push(l, i);
}

// In one word, left to right: every pair (first, second) becomes the new token; the neighbours' counts follow.
EX_FUNC void bpe_merge_word(bpe_learner *l, size_t w, uint32_t first, uint32_t second, uint32_t token) {
    uint32_t *s = l->symbol[w];
    size_t n = l->length[w], out = 0;
    int64_t count = l->words.word[w].count;
    for (size_t i = 0; i < n; out++) {
        if (i + 1 == n || s[i] != first || s[i + 1] != second) {
            s[out] = s[i++];
            continue;
        }
        if (out) bpe_pair_add(l, s[out - 1], first, w, -count);
        if (out) bpe_push(l, bpe_pair_add(l, s[out - 1], token, w, count));
        if (i + 2 < n) bpe_pair_add(l, second, s[i + 2], w, -count);
        if (i + 2 < n) bpe_push(l, bpe_pair_add(l, token, s[i + 2], w, count));
        s[out] = token;
        i += 2;
    }
    l->length[w] = (uint32_t)out;
}

// The most frequent pair, or -1 when no pair comes twice.
EX_FUNC ptrdiff_t bpe_best(bpe_learner *l) {
    while (l->n_heap) {
        bpe_heap_entry e = bpe_pop(l);
        if (e.count == l->pair[e.pair].count) return e.count > 1 ? (ptrdiff_t)e.pair : -1;
        if (l->pair[e.pair].count > 0 && l->pair[e.pair].count < e.count) bpe_push(l, e.pair);
    }
    return -1;
}

EX_FUNC void bpe_learn_end(bpe_learner *l) {
    for (size_t w = 0; w < l->words.table.count; w++) free(l->symbol[w]);
    for (size_t i = 0; i < l->table.count; i++) free(l->pair[i].where);
    bpe_words_free(&l->words);
    bpe_table_free(&l->table);
    free(l->symbol);
    free(l->length);
    free(l->pair);
    free(l->heap);
}

// At most n_tokens tokens in all; fewer if the text has no pair left that comes twice.
EX_FUNC bpe *bpe_learn(const char *text, size_t size, size_t n_tokens) {
    bpe *b = allocate(1, sizeof *b);
    bpe_learner l = {.pair_room = 0};
    bpe_find_added(b, text, size);
    size_t most = n_tokens > 257 + b->n_added ? n_tokens - 257 - b->n_added : 0;
    b->merge = allocate(most, sizeof *b->merge);
    bpe_learn_begin(&l, b, text, size);
    while (b->n_merges < most) {
        ptrdiff_t best = bpe_best(&l);
        if (best < 0) break;
        uint32_t first = (uint32_t)(l.pair[best].key >> 32) - 1, second = (uint32_t)l.pair[best].key;
        uint32_t token = (uint32_t)(256 + b->n_merges), *where = l.pair[best].where;
        size_t n = l.pair[best].n_where;
        l.pair[best].where = NULL; // bpe_pair_add may move the pairs
        l.pair[best].n_where = l.pair[best].room = 0;
        for (size_t i = 0; i < n; i++) bpe_merge_word(&l, where[i], first, second, token);
        free(where);
        l.pair[best].count = 0;
        b->merge[b->n_merges][0] = first;
        b->merge[b->n_merges++][1] = second;
    }
    bpe_learn_end(&l);
    strcpy(b->added[b->n_added++], "<|endoftext|>");
    b->n_tokens = 256 + b->n_merges + b->n_added;
    return b;
}

EX_FUNC void bpe_free(bpe *b) {
    if (b) free(b->merge);
    free(b);
}

// ---- encoding ----

// Text -> tokens, each piece by the merges in their order; a piece that came before is looked up.
typedef struct bpe_encoder {
    const bpe *b;
    bpe_table rank, seen;    // (first + 1) << 32 | second -> merge; hash of a piece -> its place
    size_t *begin, n, room;  // of each piece, its tokens: token[begin[i]] to token[begin[i + 1]]
    size_t begin_room;
    int32_t *token;
} bpe_encoder;

EX_FUNC bpe_encoder bpe_encoder_new(const bpe *b) {
    bpe_encoder e = {.b = b};
    for (size_t i = 0; i < b->n_merges; i++) bpe_index(&e.rank, ((uint64_t)b->merge[i][0] + 1) << 32 | b->merge[i][1]);
    e.begin = bpe_more(NULL, &e.begin_room, 1, sizeof *e.begin);
    return e;
}
EX_FUNC void bpe_encoder_free(bpe_encoder *e) {
    bpe_table_free(&e->rank);
    bpe_table_free(&e->seen);
    free(e->begin);
    free(e->token);
}

// Merges n tokens in place: the lowest merge first, of equal ones the leftmost. Returns how many are left.
EX_FUNC size_t bpe_merge(const bpe_encoder *e, int32_t *token, size_t n) {
    for (;;) {
        size_t best = SIZE_MAX, at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            uint64_t key = ((uint64_t)token[i] + 1) << 32 | (uint32_t)token[i + 1];
            size_t slot = e->rank.room ? bpe_slot(&e->rank, key) : 0;
            if (e->rank.room && e->rank.key[slot] && e->rank.index[slot] < best) best = e->rank.index[slot], at = i;
        }
        if (best == SIZE_MAX) return n;
        token[at] = (int32_t)(256 + best);
        memmove(token + at + 1, token + at + 2, (n - at - 2) * sizeof *token);
        n--;
    }
}

EX_FUNC size_t bpe_encode_piece(bpe_encoder *e, const char *text, size_t size, int32_t *out) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)text[i]) * 0x100000001b3u;
    size_t i = bpe_index(&e->seen, hash | 1);
    if (i == e->n) { // new
        size_t at = e->begin[i];
        e->token = bpe_more(e->token, &e->room, at + size, sizeof *e->token);
        for (size_t k = 0; k < size; k++) e->token[at + k] = (unsigned char)text[k];
        size_t n = bpe_merge(e, e->token + at, size);
        e->begin = bpe_more(e->begin, &e->begin_room, ++e->n + 1, sizeof *e->begin);
        e->begin[e->n] = at + n;
    }
    size_t n = e->begin[i + 1] - e->begin[i];
    memcpy(out, e->token + e->begin[i], n * sizeof *out);
    return n;
}

// out: room for `size` tokens. Returns how many there are.
EX_FUNC size_t bpe_encode(bpe_encoder *e, const char *text, size_t size, int32_t *out) {
    const bpe *b = e->b;
    size_t n = 0;
    for (size_t at = 0, end, stop; at < size; at = end) {
        size_t longest = 0;
        for (size_t i = 0; i < b->n_added; i++) {
            size_t length = strlen(b->added[i]);
            if (length <= longest || length > size - at || memcmp(text + at, b->added[i], length) != 0) continue;
            longest = length;
            out[n] = (int32_t)(256 + b->n_merges + i);
        }
        end = at + longest;
        if (longest) {
            n++;
            continue;
        }
        for (stop = at + 1; stop < size && !bpe_added(b, text + stop, size - stop); stop++) {}
        for (end = at; end < stop;) {
            size_t length = bpe_piece(text + end, stop - end);
            n += bpe_encode_piece(e, text + end, length, out + n);
            end += length;
        }
    }
    return n;
}

// The bytes of a token, at most `size` of them; returns how many it has.
EX_FUNC size_t bpe_bytes(const bpe *b, uint32_t token, char *out, size_t size) {
    if (token >= 256 + b->n_merges) {
        size_t i = token - 256 - b->n_merges, n = i < b->n_added ? strlen(b->added[i]) : 0;
        memcpy(out, b->added[n ? i : 0], n < size ? n : size);
        return n;
    }
    if (token < 256) {
        if (size) *out = (char)token;
        return 1;
    }
    size_t n = bpe_bytes(b, b->merge[token - 256][0], out, size);
    return n + bpe_bytes(b, b->merge[token - 256][1], out + n, size > n ? size - n : 0);
}

// ---- tokenizer.json ----

// GPT-2's letter for a byte: printable Latin-1 stands for itself, the rest follows from U+0100 on.
EX_FUNC uint32_t bpe_letter(unsigned byte) {
    uint32_t next = 256;
    for (unsigned c = 0; c <= byte; c++) {
        int plain = (c >= 33 && c <= 126) || (c >= 161 && c <= 172) || c >= 174;
        if (c == byte) return plain ? c : next;
        next += !plain;
    }
    return 0;
}

// A token's bytes as letters, escaped for JSON.
EX_FUNC void bpe_write_token(FILE *f, const bpe *b, uint32_t token) {
    if (token >= 256) {
        bpe_write_token(f, b, b->merge[token - 256][0]);
        bpe_write_token(f, b, b->merge[token - 256][1]);
        return;
    }
    uint32_t c = bpe_letter(token);
    if (c == '"' || c == '\\') fputc('\\', f);
    if (c < 128) fputc((int)c, f);
    else fprintf(f, "%c%c", (int)(0xc0 | c >> 6), (int)(0x80 | (c & 63)));
}

EX_FUNC void bpe_write(FILE *f, const bpe *b) {
    static const char level[] = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, "
                                "\"use_regex\": true}";
    fputs("{\n \"version\": \"1.0\",\n \"truncation\": null,\n \"padding\": null,\n \"added_tokens\": [", f);
    for (size_t i = 0; i < b->n_added; i++) {
        fprintf(f, "%s\n  {\"id\": %zu, \"content\": \"", i ? "," : "", 256 + b->n_merges + i);
        for (const char *c = b->added[i]; *c; c++) fprintf(f, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        fprintf(f, "\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, "
                   "\"special\": %s}",
                i + 1 == b->n_added ? "true" : "false");
    }
    fprintf(f, "\n ],\n \"normalizer\": null,\n \"pre_tokenizer\": %s,\n \"post_processor\": %s,\n \"decoder\": %s,\n",
            level, level, level);
    fputs(" \"model\": {\n  \"type\": \"BPE\",\n  \"dropout\": null,\n  \"unk_token\": null,\n"
          "  \"continuing_subword_prefix\": null,\n  \"end_of_word_suffix\": null,\n  \"fuse_unk\": false,\n"
          "  \"byte_fallback\": false,\n  \"vocab\": {",
          f);
    for (uint32_t t = 0; t < 256 + b->n_merges; t++) {
        fputs(t ? ",\n   \"" : "\n   \"", f);
        bpe_write_token(f, b, t);
        fprintf(f, "\": %u", (unsigned)t);
    }
    fputs("\n  },\n  \"merges\": [", f);
    for (size_t i = 0; i < b->n_merges; i++) {
        fputs(i ? ",\n   \"" : "\n   \"", f);
        bpe_write_token(f, b, b->merge[i][0]);
        fputc(' ', f);
        bpe_write_token(f, b, b->merge[i][1]);
        fputc('"', f);
    }
    fputs("\n  ]\n }\n}\n", f);
}

#endif

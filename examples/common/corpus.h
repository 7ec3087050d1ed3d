// corpus.h - a text of three parts as tokens: training, validation, test; and the batches that a model reads.
//
// The parts are the files wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of WikiText-2, in which words stand
// apart by spaces, rare ones as <unk>. Tokens are bytes' (bpe.h), learned from the training part, so a model predicts
// every byte of the files: the spaces at both ends of a line and its newline, and <unk> as any word. What is said about
// it is by the word all the same: the nats of all tokens over the number of words as the published perplexities count
// them, a word being what white space separates, and one <eos> a line.
#ifndef EX_CORPUS_H
#define EX_CORPUS_H

#include "bpe.h"
#include "nn.h"

enum { CORPUS_TRAIN, CORPUS_VALID, CORPUS_TEST, CORPUS_PARTS };

typedef struct corpus {
    int sample; // of this repository
    struct corpus_part {
        const char *text;
        size_t size, words; // bytes; words and one <eos> a line
        int32_t *token;     // (n + 1): the first is <|endoftext|>, which nothing predicts
        size_t n;
    } part[CORPUS_PARTS];
    bpe *bpe;
    int32_t end; // <|endoftext|>
    uint32_t *order; // of the training sequences of an epoch
    size_t epoch;    // that `order` is of, plus 1
} corpus;

// DIR/wikitext-2/NAME or DIR/NAME.
EX_FUNC const char *corpus_read(const char *dir, const char *name, size_t *size) {
    char path[2100];
    const char *text = NULL;
    for (int inside = 1; inside >= 0 && !text; inside--) {
        snprintf(path, sizeof path, "%s/%s%s", dir, inside ? "wikitext-2/" : "", name);
        text = file_view(path, size);
    }
    return text;
}

EX_FUNC size_t corpus_words(const char *text, size_t size) {
    size_t words = 0;
    for (size_t i = 0; i < size; i++) {
        int blank = bpe_class_of((unsigned char)text[i]) == BPE_SPACE;
        words += text[i] == '\n' || (!blank && (!i || bpe_class_of((unsigned char)text[i - 1]) == BPE_SPACE));
    }
    return words;
}

// The texts; data NULL: the sample, which stands beside the sources: argv0 is build/NAME.
EX_FUNC void corpus_load(corpus *c, const char *data, const char *argv0) {
    static const char *const name[] = {"wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"};
    char sample[1024];
    const char *dir = data ? data : "examples/data/wikitext2";
    *c = (corpus){.sample = !data};
    if (!data && sample_folder(argv0, dir, name[0], sample, sizeof sample)) dir = sample;
    for (int i = 0; i < CORPUS_PARTS; i++) {
        struct corpus_part *p = &c->part[i];
        p->text = corpus_read(dir, name[i], &p->size);
        if (!p->text) refuse(dir, "%s cannot be read, nor in its folder wikitext-2: %s", name[i], strerror(errno));
        if (!p->size) refuse(dir, "%s is empty", name[i]);
        p->words = corpus_words(p->text, p->size);
    }
}

// The tokens of all parts, at most `vocab` different ones.
EX_FUNC void corpus_tokens(corpus *c, size_t vocab) {
    c->bpe = bpe_learn(c->part[0].text, c->part[0].size, vocab);
    c->end = (int32_t)c->bpe->n_tokens - 1;
    bpe_encoder e = bpe_encoder_new(c->bpe);
    for (int i = 0; i < CORPUS_PARTS; i++) {
        struct corpus_part *p = &c->part[i];
        p->token = allocate(p->size + 1, sizeof *p->token);
        p->token[0] = c->end;
        p->n = bpe_encode(&e, p->text, p->size, p->token + 1);
    }
    bpe_encoder_free(&e);
}

EX_FUNC void corpus_free(corpus *c) {
    for (int i = 0; i < CORPUS_PARTS; i++) free(c->part[i].token);
    free(c->order);
    bpe_free(c->bpe);
}

// Training sequences of an epoch. They begin at another token in each, so that cuts fall elsewhere.
EX_FUNC size_t corpus_sequences(const corpus *c, size_t length) {
    size_t n = c->part[CORPUS_TRAIN].n;
    return n >= 2 * length ? (n - length) / length : 0;
}
EX_FUNC void corpus_shuffle(corpus *c, size_t n, uint64_t seed, size_t epoch) {
    if (!c->order) c->order = allocate(n, sizeof *c->order);
    for (size_t i = 0; i < n; i++) c->order[i] = (uint32_t)i;
    for (size_t i = n; i > 1; i--) {
        size_t j = moe_rand_u32(seed, 5000 + epoch, i) % i;
        uint32_t keep = c->order[i - 1];
        c->order[i - 1] = c->order[j];
        c->order[j] = keep;
    }
    c->epoch = epoch + 1;
}
// Batch number `at` of an epoch: token and target (batch, length).
EX_FUNC void corpus_batch(corpus *c, uint64_t seed, size_t epoch, size_t at, size_t batch, size_t length,
                          int32_t *token, int32_t *target) {
    const struct corpus_part *p = &c->part[CORPUS_TRAIN];
    size_t n = corpus_sequences(c, length), shift = moe_rand_u32(seed, 4999, epoch) % length;
    if (c->epoch != epoch + 1) corpus_shuffle(c, n, seed, epoch);
    for (size_t i = 0; i < batch; i++) {
        const int32_t *from = p->token + shift + (size_t)c->order[(at * batch + i) % n] * length;
        memcpy(token + i * length, from, length * sizeof *token);
        memcpy(target + i * length, from + 1, length * sizeof *target);
    }
}

// Evaluation: windows of `length` tokens, `stride` apart; a token counts in the first window that has it, so all but
// the first tokens have at least length - stride tokens before them. Window number i: token and target (length), -1
// where a target does not count. 0: there is no such window.
EX_FUNC int corpus_window(const corpus *c, int part, size_t i, size_t length, size_t stride, int32_t *token,
                          int32_t *target) {
    const struct corpus_part *p = &c->part[part];
    size_t begin = i * stride, fresh = i ? length - stride : 0;
    if (begin + fresh >= p->n) return 0;
    for (size_t k = 0; k < length; k++) {
        int inside = begin + k < p->n;
        token[k] = inside ? p->token[begin + k] : c->end;
        target[k] = inside && k >= fresh ? p->token[begin + k + 1] : -1;
    }
    return 1;
}

#endif

/* loss_cases.h - Every auxiliary loss once, in the order of moe_loss_kind, for what goes through all of them: balance,
 * its test, the tests and the bench of losses. Include moe.h first. */
#ifndef LOSS_CASES_H
#define LOSS_CASES_H

/* What of a batch a loss reads that another does not, beside prob, logits and the like. */
typedef enum loss_reads {
    READS_NOTHING,
    READS_LOAD,
    READS_SEQUENCE_LOAD,
    READS_RANK_LOAD,
    READS_RANK_TOKENS,
    READS_MEAN_PROB,
    READS_MEAN_SCORE,
    READS_MEAN_WEIGHT,
    READS_MEAN_SELECTION,
    READS_RANK_PROB,
    READS_CODE
} loss_reads;

#define LOSS_CASES_COSINE "score=cosine temperature=0.07"
#define LOSS_CASES_RELU "gate=relu router_gain=1"
/* LAYER(kind, name, reads, what a layer needs for it, its coefficient in examples/balance.c, one in tests/balance.c at
 * which it evens the loads there: 0 = at none, what it wants); ALONE(kind, name, reads): no layer can have it. */
#define LOSS_CASES(LAYER, ALONE)                                                                                       \
    LAYER(SWITCH, "switch", LOAD, "", 0.1, 0.1, "even load")                                                           \
    LAYER(Z, "z", NOTHING, "", 0.01, 0, "small logits: says nothing about which expert")                               \
    LAYER(IMPORTANCE, "importance", MEAN_PROB, "", 0.05, 0.1, "even mean probabilities, by their CV")                  \
    LAYER(IMPORTANCE_SELECTED, "importance-selected", MEAN_WEIGHT, "", 1, 0.1, "even sums of the selected weights")    \
    LAYER(LOAD, "load", MEAN_SELECTION, "noise=gaussian", 0.05, 0.1, "even chances over the router's noise")           \
    LAYER(ENTROPY, "entropy", NOTHING, "", 0.1, 0, "each token spreads over the experts")                              \
    LAYER(CERTAINTY, "certainty", NOTHING, "", 0.1, 0, "the opposite: each token is sure of its expert")               \
    LAYER(KL_UNIFORM, "kl-uniform", MEAN_PROB, "", 0.4, 0.4, "even mean probabilities, by their entropy")              \
    LAYER(KL_REVERSE, "kl-reverse", MEAN_PROB, "", 0.1, 0.4, "even mean probabilities, hardest on dead experts")       \
    LAYER(MUTUAL_INFORMATION, "mutual-information", MEAN_PROB, "", 1, 0.4, "even means of sure tokens")                \
    LAYER(L2_UNIFORM, "l2-uniform", MEAN_PROB, "", 0.5, 1, "even mean probabilities, by their squares")                \
    LAYER(SEQUENCE, "sequence", SEQUENCE_LOAD, "", 0.1, 0.1, "even load in every image")                               \
    LAYER(RANK, "rank", RANK_LOAD, "n_ranks=4", 0.1, 0.1, "even load of ranks, each with two experts")                 \
    LAYER(COMMUNICATION, "communication", RANK_TOKENS, "n_ranks=4", 0.1, 0.1, "even traffic to ranks")                 \
    LAYER(LOCALITY, "locality", RANK_PROB, "n_ranks=4", 0.1, 1, "tokens stay on their rank: a quarter on each")        \
    LAYER(RELU_L1, "relu-l1", LOAD, LOSS_CASES_RELU, 0.1, 0.1, "sparse ReLU gate, the busy expert first")              \
    LAYER(VARIANCE, "variance", MEAN_SCORE, "", 1, 10, "scores that differ between tokens")                            \
    LAYER(ORACLE, "oracle", NOTHING, "", 1, 1, "a teacher: the expert of the image's class")                           \
    LAYER(SIMBAL, "simbal", NOTHING, "", 0.1, 0, "the router's columns orthonormal")                                   \
    LAYER(DIVERSE_SIMPLE, "diverse-simple", NOTHING, "", 0.1, 0, "the same, by a norm")                                \
    LAYER(PROTOTYPE_ORTHOGONALITY, "prototype-orthogonality", NOTHING, LOSS_CASES_COSINE, 0.05, 0,                     \
          "columns at right angles")                                                                                   \
    LAYER(PROTOTYPE_DIVERSITY, "prototype-diversity", NOTHING, LOSS_CASES_COSINE, 1, 0, "columns apart")               \
    LAYER(PROTOTYPE_ALIGNMENT, "prototype-alignment", NOTHING, LOSS_CASES_COSINE, 1, 0,                                \
          "tokens near their expert's column")                                                                         \
    ALONE(LATENT_KL, "latent-kl", NOTHING)                                                                             \
    LAYER(REDUNDANCY, "redundancy", NOTHING, "", 0.1, 0, "logits of two experts at right angles")                      \
    LAYER(OUTPUT_ORTHOGONALITY, "output-orthogonality", NOTHING, "top_k=2", 0.1, 0,                                    \
          "outputs of a token's two experts")                                                                          \
    LAYER(ORTHONORMAL, "orthonormal", NOTHING, "expert=orthonormal", 0.01, 0, "an expert's own basis")                 \
    LAYER(CODEBOOK, "codebook", CODE, "n_codes=16", 0.08, 0, "codes near tokens")

static inline loss_reads loss_case_reads(moe_loss_kind kind) {
#define LAYER(KIND, name, reads, set, coefficient, even, about) [MOE_LOSS_##KIND] = READS_##reads,
#define ALONE(KIND, name, reads) [MOE_LOSS_##KIND] = READS_##reads,
    static const loss_reads of[MOE_LOSS_COUNT] = {LOSS_CASES(LAYER, ALONE)};
#undef LAYER
#undef ALONE
    return of[kind];
}

#endif

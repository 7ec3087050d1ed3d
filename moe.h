/* moe.h - Mixture-of-Experts for the CPU, in one C header.
 *
 * Routes tokens to experts, trains them, balances them, and tells whether they are healthy. It needs
 * libc and libm, nothing else; C99 or C++11. In ONE source file of your project write
 *
 *     #define MOE_IMPLEMENTATION
 *     #include "moe.h"
 *
 * and include moe.h without the macro wherever else you need it. The shortest whole program:
 *
 *     #include <stdio.h>
 *     #define MOE_IMPLEMENTATION
 *     #include "moe.h"
 *     int main(void) {
 *         static float x[64 * 8], y[64 * 8];             // 64 tokens of 8 numbers
 *         moe_rand_uniform(1, 0, 64 * 8, -1, 1, x);
 *         moe_desc d = {0};                              // 0 = the documented default
 *         d.d_model = 8;
 *         moe_layer *m = NULL;
 *         moe_status s = moe_layer_new(&m, &d);
 *         if (!s) s = moe_forward(m, x, 64, y);
 *         puts(s ? moe_status_string(s) : "64 tokens went through 8 experts");
 *         moe_layer_free(m);
 *         return s != MOE_OK;
 *     }
 *
 * TABLE OF CONTENTS (search for the banner "==== name")
 *
 *     declarations: configuration, status, types, arrays, routes and tape, diagnostics, layer, files
 *     implementation: platform, memory, random, kernels, dispatch, threads, score, gate, select, routes,
 *         experts, combine, losses, optimiser, health, game, layer, files
 *
 * Calls go only upward in the implementation: a section may call those above it.
 *
 * THE PIPELINE
 *
 *     x (T, d) --score--> logits (T, E) --gate--> scores (T, E) --select--> routes --experts--> --combine--> y (T, d)
 *
 * Every stage is a row of a small table; a Mixture-of-Experts system is a choice of one row a stage
 * (moe_desc). There are three levels, each usable without the next:
 *     1. arrays: stateless functions on row-major float arrays;
 *     2. routes and tape: one forward or backward of a router or of the experts over T tokens;
 *     3. layer: parameters, gradients, optimiser; forward, backward, step, save.
 *
 * CONTRACTS
 *
 *     Memory    Every allocation goes through MOE_MALLOC(bytes, ctx) and MOE_FREE(ptr, ctx), ctx =
 *               desc.alloc_context; or none at all: sizes can be asked first and a layer and a tape can live in
 *               memory that you give. The only global state is the chosen kernel table.
 *     Errors    Functions that can fail return moe_status (0 = MOE_OK). Each code has its own sentence,
 *               which names the argument (moe_status_string). Bad input never aborts and never half-changes a layer.
 *     Threads   None is started behind your back: desc.parallel.run if you give one, else OpenMP when compiled
 *               with it, else serial. A layer's parameters may be read by many threads, each with its own moe_tape.
 *     Same bits Forward, backward and step give identical bits for every instruction set and number of
 *               threads (docs/determinism.md). MOE_USE_CBLAS and double-precision diagnostics stand outside.
 *     Truth     Each function says where its formula is from: "as in" = read in the source, "after" = our
 *               form of it, where the source is silent.
 *
 * LICENSE: MIT or public domain (Unlicense), at your choice; see the end of this file.
 */
#ifndef MOE__PASS /* the kernels section includes this file again, once for each instruction set */
#ifndef MOE_H
#define MOE_H

/* ==== configuration ===========================================================================
 * Define before including. All are optional.
 *
 *   MOE_IMPLEMENTATION   compile the implementation here
 *   MOE_STATIC           everything static: moe.h private to this file
 *   MOE_MALLOC(n, ctx), MOE_FREE(p, ctx)   your allocator (any alignment); ctx is desc.alloc_context
 *   MOE_ASSERT(x)        the library's own invariants (default: nothing; bad input never reaches it)
 *   MOE_NO_SIMD          scalar kernels only
 *   MOE_NO_STDIO         no functions that open files (the memory forms remain)
 *   MOE_NO_OPENMP        ignore OpenMP even when compiled with it
 *   MOE_FILENAME         this file's name, if you renamed it (default "moe.h"): it includes itself
 *   MOE_USE_CBLAS        moe_gemm without a_fill goes through cblas_sgemm (you link it; outside the same-bits
 *                        contract); a layer's own products do not: their weights are in panels
 */
#include <stddef.h>
#include <stdint.h>

#ifdef MOE_STATIC
#if defined(__GNUC__)
#define MOE_API static __attribute__((unused))
#else
#define MOE_API static
#endif
#elif defined(__cplusplus)
#define MOE_API extern "C"
#else
#define MOE_API extern
#endif

#define MOE_VERSION "0.1.0"
#define MOE_VERSION_NUMBER 100 /* major * 10000 + minor * 100 + patch */

/* ==== status ==================================================================================
 * Every code has a kind, the argument or field that it is about, and a sentence. */
typedef enum moe_kind {
    MOE_KIND_OK,
    MOE_KIND_ARGUMENT, /* a value outside its range, a NULL where memory is needed, a shape that does not fit */
    MOE_KIND_OVERFLOW, /* a size does not fit in size_t, or an index in its type */
    MOE_KIND_MEMORY,   /* an allocation failed, or the given memory is too small */
    MOE_KIND_NUMBER,   /* NaN or infinity where a finite number is needed */
    MOE_KIND_STATE,    /* a call out of order */
    MOE_KIND_FILE,     /* the bytes of a file are not what they should be */
    MOE_KIND_IO,       /* the operating system could not open, read or write */
    MOE_KIND_SUPPORT   /* not available on this machine or in this build */
} moe_kind;

/* X(code, kind, field, sentence) */
#define MOE_STATUS_LIST(X)                                                                                   \
    X(MOE_OK, OK, "", "ok")                                                                                  \
    X(MOE_E_NULL_DESC, ARGUMENT, "desc", "desc: must not be NULL")                                           \
    X(MOE_E_NULL_LAYER, ARGUMENT, "layer", "layer: must not be NULL")                                        \
    X(MOE_E_NULL_TAPE, ARGUMENT, "tape", "tape: must not be NULL")                                           \
    X(MOE_E_NULL_ROUTES, ARGUMENT, "routes", "routes: must not be NULL")                                     \
    X(MOE_E_NULL_HEALTH, ARGUMENT, "health", "health: must not be NULL")                                     \
    X(MOE_E_NULL_OUT, ARGUMENT, "out", "out: the place for the result must not be NULL")                     \
    X(MOE_E_NULL_MEMORY, ARGUMENT, "memory", "memory: must not be NULL")                                     \
    X(MOE_E_NULL_X, ARGUMENT, "x", "x: must not be NULL")                                                    \
    X(MOE_E_NULL_Y, ARGUMENT, "y", "y: must not be NULL")                                                    \
    X(MOE_E_NULL_DY, ARGUMENT, "dy", "dy: must not be NULL")                                                 \
    X(MOE_E_NULL_A, ARGUMENT, "a", "a: must not be NULL (nor a_fill with it)")                               \
    X(MOE_E_NULL_B, ARGUMENT, "b", "b: must not be NULL")                                                    \
    X(MOE_E_NULL_C, ARGUMENT, "c", "c: must not be NULL")                                                    \
    X(MOE_E_NULL_PARAMS, ARGUMENT, "params", "params: must not be NULL")                                     \
    X(MOE_E_NULL_GRADS, ARGUMENT, "grads", "grads: must not be NULL")                                        \
    X(MOE_E_NULL_MOMENTS, ARGUMENT, "moments", "moments: must not be NULL")                                  \
    X(MOE_E_NULL_LOGITS, ARGUMENT, "logits", "logits: must not be NULL")                                     \
    X(MOE_E_NULL_SCORES, ARGUMENT, "scores", "scores: must not be NULL")                                     \
    X(MOE_E_NULL_PROB, ARGUMENT, "prob", "prob: must not be NULL")                                           \
    X(MOE_E_NULL_INDEX, ARGUMENT, "index", "index: must not be NULL")                                        \
    X(MOE_E_NULL_WEIGHT, ARGUMENT, "weight", "weight: must not be NULL")                                     \
    X(MOE_E_NULL_LOAD, ARGUMENT, "load", "load: must not be NULL")                                           \
    X(MOE_E_NULL_NAME, ARGUMENT, "name", "name: must not be NULL")                                           \
    X(MOE_E_NULL_PATH, ARGUMENT, "path", "path: must not be NULL")                                           \
    X(MOE_E_NULL_BYTES, ARGUMENT, "bytes", "bytes: must not be NULL")                                        \
    X(MOE_E_D_MODEL, ARGUMENT, "d_model", "d_model: must be at least 1")                                     \
    X(MOE_E_N_EXPERTS, ARGUMENT, "n_experts", "n_experts: must be 1 to 1048576")                             \
    X(MOE_E_TOP_K, ARGUMENT, "top_k", "top_k: must be 1 to n_experts")                                       \
    X(MOE_E_SCORE, ARGUMENT, "score", "score: not a moe_score_kind")                                         \
    X(MOE_E_GATE, ARGUMENT, "gate", "gate: not a moe_gate_kind")                                             \
    X(MOE_E_SELECT, ARGUMENT, "select", "select: not a moe_select_kind")                                     \
    X(MOE_E_EXPERT, ARGUMENT, "expert", "expert: not a moe_expert_kind")                                     \
    X(MOE_E_OPTIMIZER, ARGUMENT, "optimizer", "optimizer: not a moe_optimizer_kind")                         \
    X(MOE_E_CAPACITY_ORDER, ARGUMENT, "capacity_order", "capacity_order: not a moe_order_kind")              \
    X(MOE_E_NORMALIZE, ARGUMENT, "normalize", "normalize: must be MOE_DEFAULT, MOE_ON or MOE_OFF")           \
    X(MOE_E_BIAS, ARGUMENT, "bias", "bias: must be MOE_DEFAULT, MOE_ON or MOE_OFF")                          \
    X(MOE_E_TRAINING, ARGUMENT, "training", "training: must be MOE_DEFAULT, MOE_ON or MOE_OFF")              \
    X(MOE_E_TEMPERATURE, ARGUMENT, "temperature", "temperature: must be finite and above 0, and so must its inverse")                 \
    X(MOE_E_CAPACITY_FACTOR, ARGUMENT, "capacity_factor", "capacity_factor: must be finite and above 0, or MOE_OFF") \
    X(MOE_E_LOSS, ARGUMENT, "loss", "loss: every coefficient must be finite and at least 0, or MOE_OFF")     \
    X(MOE_E_BETA1, ARGUMENT, "beta1", "beta1: must be in [0, 1), or MOE_OFF")                                \
    X(MOE_E_BETA2, ARGUMENT, "beta2", "beta2: must be in [0, 1), or MOE_OFF")                                \
    X(MOE_E_EPSILON, ARGUMENT, "epsilon", "epsilon: must be finite and above 0")                             \
    X(MOE_E_WEIGHT_DECAY, ARGUMENT, "weight_decay", "weight_decay: must be finite and at least 0, or MOE_OFF") \
    X(MOE_E_MOMENTUM, ARGUMENT, "momentum", "momentum: must be in [0, 1), or MOE_OFF")                       \
    X(MOE_E_CLIP_NORM, ARGUMENT, "clip_norm", "clip_norm: must be finite and above 0, or MOE_OFF")           \
    X(MOE_E_LR, ARGUMENT, "lr", "lr: the learning rate must be finite and at least 0")                       \
    X(MOE_E_STEP, ARGUMENT, "step", "step: counts from 1")                                                   \
    X(MOE_E_RANGE, ARGUMENT, "lo", "lo, hi: must be finite and lo <= hi")                                    \
    X(MOE_E_STD, ARGUMENT, "std", "std: must be finite and at least 0, and mean finite")                           \
    X(MOE_E_N_TOKENS, ARGUMENT, "n_tokens", "n_tokens: more than the tape was made for")                     \
    X(MOE_E_LD, ARGUMENT, "ld", "ld: a leading dimension is shorter than its row")                           \
    X(MOE_E_COEFFICIENT, ARGUMENT, "coefficient", "coefficient: must be finite")                             \
    X(MOE_E_INDEX, ARGUMENT, "index", "index: an expert index is not below n_experts")                       \
    X(MOE_E_INDEX_TWICE, ARGUMENT, "index", "index: a token selects the same expert twice")                  \
    X(MOE_E_ISA, SUPPORT, "isa", "isa: this processor, operating system or build does not have it")          \
    X(MOE_E_NAME, ARGUMENT, "name", "name: no such tensor")                                                  \
    X(MOE_E_PART, ARGUMENT, "part", "part: not a moe_part, or one that this optimizer has not")              \
    X(MOE_E_TENSOR_SIZE, ARGUMENT, "count", "count: not the number of elements of the tensor")               \
    X(MOE_E_NULL_GAME, ARGUMENT, "game", "game: must not be NULL")                                           \
    X(MOE_E_NULL_QUALITY, ARGUMENT, "quality", "quality: must not be NULL")                                  \
    X(MOE_E_NULL_WORK, ARGUMENT, "work", "work: must not be NULL")                                           \
    X(MOE_E_NULL_LABEL, ARGUMENT, "label", "label: must not be NULL, nor what else is given by token")       \
    X(MOE_E_NULL_COUNT, ARGUMENT, "count", "count: must not be NULL")                                        \
    X(MOE_E_QUALITY, NUMBER, "quality", "quality: NaN or infinite")                                          \
    X(MOE_E_LOAD, NUMBER, "load", "load: must be finite, at least 0 and not all 0")                          \
    X(MOE_E_GAMMA, ARGUMENT, "gamma", "gamma: must be finite and above -1; with several types at least 0")   \
    X(MOE_E_N_TYPES, ARGUMENT, "n_types", "n_types: must be 1 to 64")                                        \
    X(MOE_E_TYPE_SHARE, ARGUMENT, "share", "share: must be finite, at least 0 and sum to 1")                 \
    X(MOE_E_N_BATCHES, ARGUMENT, "n_batches", "n_batches: must be at least 1; for halves and intervals 2 with tokens in them") \
    X(MOE_E_BATCH, ARGUMENT, "batch", "batch: not below n_batches")                                          \
    X(MOE_E_LABEL, ARGUMENT, "label", "label: not below n_labels")                                           \
    X(MOE_E_TIER, ARGUMENT, "tier", "tier: not below n_tiers")                                               \
    X(MOE_E_SEQUENCE, ARGUMENT, "sequence", "sequence: must be at least 1")                                  \
    X(MOE_E_N_RANKS, ARGUMENT, "n_ranks", "n_ranks: must be at least 1")                                     \
    X(MOE_E_REPLICATES, ARGUMENT, "replicates", "replicates: must be at least 1")                            \
    X(MOE_E_QUALITY_KIND, ARGUMENT, "kind", "kind: not a moe_quality_kind")                                  \
    X(MOE_E_SERIES, ARGUMENT, "series", "series: steps must be finite and ascend, and values be finite")     \
    X(MOE_E_FEEDBACK, ARGUMENT, "kf", "kf: must be finite, and at least 2 for a fold; h, dt and the series finite, dt above 0") \
    X(MOE_E_GAME, NUMBER, "game", "game: the numbers are too far apart for an equilibrium to be found")      \
    X(MOE_E_MERGE, ARGUMENT, "n_experts", "n_experts: the two health counters differ in it")                 \
    X(MOE_E_TAPE_DESC, STATE, "tape", "tape: was made for another desc")                                     \
    X(MOE_E_OVERFLOW, OVERFLOW, "size", "size: the memory needed does not fit in size_t or an index in 31 bits") \
    X(MOE_E_NO_MEMORY, MEMORY, "memory", "memory: the allocation failed")                                    \
    X(MOE_E_SMALL_MEMORY, MEMORY, "memory", "memory: fewer bytes than the size function asks for")           \
    X(MOE_E_NAN_X, NUMBER, "x", "x: a token (or the router) is NaN, infinite, or so large that a logit overflows")       \
    X(MOE_E_NAN_LOGITS, NUMBER, "logits", "logits: NaN or infinite")                                         \
    X(MOE_E_NAN_WEIGHT, NUMBER, "weight", "weight: NaN or infinite")                                         \
    X(MOE_E_NAN_GRADS, NUMBER, "grads", "grads: the gradient's norm is NaN or infinite; nothing was changed") \
    X(MOE_E_NO_ROUTES, STATE, "routes", "routes: none for the tape's tokens yet: moe_route, or moe_tape_tokens and moe_routes_fill, first") \
    X(MOE_E_NO_FORWARD, STATE, "backward", "backward: needs a training forward on the same tape first")      \
    X(MOE_E_INFERENCE, STATE, "training", "training: the layer was made with training = MOE_OFF")            \
    X(MOE_E_OPEN, IO, "path", "path: the file cannot be opened")                                             \
    X(MOE_E_READ, IO, "path", "path: the file cannot be read")                                               \
    X(MOE_E_WRITE, IO, "path", "path: the file cannot be written")                                           \
    X(MOE_E_FILE_SHORT, FILE, "file", "file: shorter than its header says")                                  \
    X(MOE_E_FILE_HEADER, FILE, "file", "file: the safetensors header is not valid JSON of the format")       \
    X(MOE_E_FILE_HEADER_SIZE, FILE, "file", "file: the safetensors header is over its cap of 100 MB or ends past the file") \
    X(MOE_E_FILE_DTYPE, FILE, "file", "file: a tensor has an element type that is not read here")            \
    X(MOE_E_FILE_SHAPE, FILE, "file", "file: a tensor's shape does not fit its bytes, or overflows")         \
    X(MOE_E_FILE_OFFSETS, FILE, "file", "file: tensors overlap, leave a hole or reach past the end")         \
    X(MOE_E_FILE_TWICE, FILE, "file", "file: two tensors have the same name")                                \
    X(MOE_E_FILE_TENSOR, FILE, "file", "file: a tensor of the layer is missing or has another shape")        \
    X(MOE_E_FILE_DESC, FILE, "file", "file: the layer's description in __metadata__ is missing or not valid") \
    X(MOE_E_NPY_MAGIC, FILE, "file", "file: not an .npy file of version 1, 2 or 3")                          \
    X(MOE_E_NPY_HEADER, FILE, "file", "file: the .npy header is not a dictionary of descr, fortran_order and shape") \
    X(MOE_E_NPY_ORDER, FILE, "file", "file: the array is in Fortran order; save it as numpy.ascontiguousarray gives it") \
    X(MOE_E_NPY_SIZE, FILE, "file", "file: the data after the .npy header is longer than the shape says")    \
    X(MOE_E_NPY_INDEX, FILE, "file", "file: an index or label is not a whole number that fits in 31 bits")   \
    X(MOE_E_SHARDS, FILE, "file", "file: not a safetensors index: an object with a weight_map of names to file names") \
    X(MOE_E_FILE_NAN, NUMBER, "file", "file: a tensor of the layer holds NaN or infinity")

typedef enum moe_status {
#define MOE__X(code, kind, field, sentence) code,
    MOE_STATUS_LIST(MOE__X)
#undef MOE__X
    MOE__STATUS_COUNT
} moe_status;

/* The sentence of a status, e.g. "d_model: must be at least 1". Never NULL; static storage. */
MOE_API const char *moe_status_string(moe_status s);
/* The argument or field that it is about, e.g. "d_model"; "" for MOE_OK. */
MOE_API const char *moe_status_field(moe_status s);
MOE_API moe_kind moe_status_kind(moe_status s);

/* ==== types ===================================================================================
 * moe_desc describes a layer. Zero-initialise it and set what you need: 0 means the documented default.
 * "Off" has a name, MOE_OFF, because 0 is taken. */
enum { MOE_DEFAULT = 0, MOE_ON = 1, MOE_OFF = -1 };

typedef enum moe_score_kind { /* x (T, d) -> logits (T, E) */
    MOE_SCORE_DEFAULT,
    MOE_SCORE_LINEAR, /* logits = x R, R (d, E) */
    MOE__SCORE_COUNT
} moe_score_kind;

typedef enum moe_gate_kind { /* logits (T, E) -> scores (T, E), and the weights of the selected */
    MOE_GATE_DEFAULT,
    MOE_GATE_SOFTMAX,          /* softmax(logits / temperature) over all experts */
    MOE_GATE_SOFTMAX_SELECTED, /* softmax(logits / temperature) over the selected experts: sums to 1 whatever `normalize` says */
    MOE__GATE_COUNT
} moe_gate_kind;

typedef enum moe_select_kind { /* scores (T, E) -> routes */
    MOE_SELECT_DEFAULT,
    MOE_SELECT_TOP_K, /* the k highest scores of each token; ties go to the lowest index */
    MOE__SELECT_COUNT
} moe_select_kind;

typedef enum moe_order_kind { /* who gets an expert's last places when capacity is short */
    MOE_ORDER_DEFAULT,
    MOE_ORDER_TOKEN,  /* lower token first (Switch [C]) */
    MOE_ORDER_CHOICE, /* all first choices before all second choices, then lower token (GShard [C]) */
    MOE_ORDER_WEIGHT, /* higher weight first, then lower token (batch-prioritised routing [K]) */
    MOE__ORDER_COUNT
} moe_order_kind;

typedef enum moe_expert_kind { /* what one expert computes; W1 (d, f), W2 (f, d) */
    MOE_EXPERT_DEFAULT,
    MOE_EXPERT_RELU,   /* relu(x W1) W2 */
    MOE_EXPERT_GELU,   /* gelu(x W1) W2, exact (erf) */
    MOE_EXPERT_SILU,   /* silu(x W1) W2 */
    MOE_EXPERT_SWIGLU, /* (silu(x Wg) * (x Wu)) W2 */
    MOE_EXPERT_GEGLU,  /* (gelu(x Wg) * (x Wu)) W2 */
    MOE__EXPERT_COUNT
} moe_expert_kind;

typedef enum moe_loss_kind { /* auxiliary losses; desc.loss[kind] is the coefficient, 0 = not used */
    MOE_LOSS_SWITCH, /* E * sum_e f_e P_e, as in Switch / GShard [C] */
    MOE_LOSS_Z,      /* mean_t (logsumexp z_t)^2, as in ST-MoE [C] */
    MOE_LOSS_COUNT
} moe_loss_kind;

typedef enum moe_optimizer_kind {
    MOE_OPTIMIZER_DEFAULT,
    MOE_OPTIMIZER_ADAMW, /* decoupled weight decay, bias-corrected moments */
    MOE_OPTIMIZER_SGD,   /* momentum (v = mu v + g; p -= lr v), weight decay decoupled as in AdamW */
    MOE__OPTIMIZER_COUNT
} moe_optimizer_kind;

typedef enum moe_isa { MOE_ISA_AUTO, MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX512, MOE_ISA_NEON, MOE__ISA_COUNT } moe_isa;

/* How to run n_tasks calls task(arg, i, worker), i = 0 .. n_tasks-1, worker < n_threads: in any order, on
 * any threads, returning when all are done; two calls at the same time need different workers. run is only called
 * with two threads or more.
 * run == NULL: OpenMP when compiled with it, else one after the other. n_threads 0: all that OpenMP has
 * (with run given: 1). Wherever a `const moe_parallel *` is asked for, NULL means {0}. */
typedef void moe_task(void *arg, size_t i, size_t worker);
typedef struct moe_parallel {
    void (*run)(void *user, size_t n_threads, size_t n_tasks, moe_task *task, void *arg);
    void *user;
    size_t n_threads;
} moe_parallel;

typedef struct moe_desc {
    /* shape */
    size_t d_model;   /* width of a token; required */
    size_t d_ff;      /* hidden width of an expert; 0 = 4 * d_model */
    size_t n_experts; /* 0 = 8 */
    size_t top_k;     /* experts a token; 0 = 2, or 1 if there is only one */
    size_t n_shared;  /* experts that every token uses with weight 1, added to the routed sum; 0 = none */
    /* the stages */
    moe_score_kind score;          /* default linear */
    moe_gate_kind gate;            /* default softmax */
    moe_select_kind select;        /* default top-k */
    moe_expert_kind expert;        /* default SwiGLU */
    moe_order_kind capacity_order; /* default token */
    int normalize;         /* divide the selected weights by their sum; default on if top_k > 1 (with one
                              expert the weight would be 1 and the router would learn nothing) */
    int bias;              /* experts have biases b1 (f), b2 (d); default off */
    float temperature;     /* of the gate; higher is softer; 0 = 1 */
    float capacity_factor; /* an expert takes at most (size_t)(factor * k * ceil(T/E)) tokens, but at
                              least 1; 0 or MOE_OFF = dropless */
    float loss[MOE_LOSS_COUNT];
    /* training */
    int training; /* MOE_OFF: no gradients, no optimiser state; default on */
    moe_optimizer_kind optimizer; /* default AdamW */
    float beta1, beta2, epsilon;  /* AdamW; 0 = 0.9, 0.999, 1e-8 */
    float momentum;               /* SGD; 0 = 0.9 */
    float weight_decay;           /* on weight matrices, not on biases; 0 = 0.01 */
    float clip_norm;              /* moe_step scales the layer's gradient to at most this L2 norm; 0 or MOE_OFF = no clipping */
    uint64_t seed;                /* of the initial parameters; 0 = 1 */
    /* surroundings (not saved) */
    moe_parallel parallel;
    void *alloc_context;
} moe_desc;

/* Fills *out with the effective values of *in (out may be in). Idempotent. Errors name the field. */
MOE_API moe_status moe_desc_resolve(const moe_desc *in, moe_desc *out);
/* Names of the table rows, for printing and parsing: e.g. moe_gate_name(MOE_GATE_SOFTMAX) = "softmax"; NULL past the end. */
MOE_API const char *moe_score_name(moe_score_kind v);
MOE_API const char *moe_gate_name(moe_gate_kind v);
MOE_API const char *moe_select_name(moe_select_kind v);
MOE_API const char *moe_order_name(moe_order_kind v);
MOE_API const char *moe_expert_name(moe_expert_kind v);
MOE_API const char *moe_loss_name(moe_loss_kind v);
MOE_API const char *moe_optimizer_name(moe_optimizer_kind v);
MOE_API const char *moe_isa_name(moe_isa v);
/* Writes the desc as one JSON object, e.g. {"d_model":8,...}, NUL-terminated, cut at `size`. Returns the
 * length that it needs without the NUL, like snprintf. NULL desc: 0. */
MOE_API size_t moe_desc_json(const moe_desc *d, char *buffer, size_t size);

/* ==== arrays ==================================================================================
 * Level 1: stateless functions on row-major float arrays. Arrays may be NULL only where their count is 0
 * or where it says so. Inputs and outputs must not overlap unless it says so. */

/* Instruction set. AUTO picks the best of processor and operating system; the choice is made once, at the
 * first use, and is the only global state. Forcing one that is not there returns MOE_E_ISA and changes
 * nothing. Not to be called while another thread is inside the library. */
MOE_API moe_status moe_force_isa(moe_isa isa);
MOE_API moe_isa moe_active_isa(void);
/* What this build compiled threads with: "openmp" or "serial". */
MOE_API const char *moe_thread_backend(void);
/* Runs tasks as `p` says (NULL: default); the library's own products use it, and so may you. */
MOE_API void moe_run(const moe_parallel *p, size_t n_tasks, moe_task *task, void *arg);
MOE_API size_t moe_workers(const moe_parallel *p); /* upper bound of worker + 1 in moe_run */

/* Elementwise functions of n floats, y = f(x), in place allowed. Largest error found over all float32 inputs is
 * in docs/determinism.md. exp gives 0 below -86.5 and +inf above 88.7; log gives -inf below FLT_MIN. */
MOE_API moe_status moe_exp(size_t n, const float *x, float *y);
MOE_API moe_status moe_log(size_t n, const float *x, float *y);
MOE_API moe_status moe_tanh(size_t n, const float *x, float *y);
MOE_API moe_status moe_erf(size_t n, const float *x, float *y);

/* Counter-based random numbers: Philox4x32-10, as in Salmon et al. 2011. Number i of (seed, stream) is always
 * the same, whoever asks and in whatever order. */
MOE_API void moe_philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi, uint32_t out[4]);
MOE_API uint32_t moe_rand_u32(uint64_t seed, uint64_t stream, uint64_t i);
MOE_API moe_status moe_rand_uniform(uint64_t seed, uint64_t stream, size_t n, float lo, float hi, float *out);
MOE_API moe_status moe_rand_normal(uint64_t seed, uint64_t stream, size_t n, float mean, float std, float *out); /* Box-Muller */

/* 64-bit hash of n bytes, seeded; for checksums of parameters, not for security. Same on every machine for floats. */
MOE_API uint64_t moe_hash(uint64_t seed, const void *bytes, size_t n);

/* C (m, n) = op(A) op(B), or += if accumulate. One chain of fused multiply-adds in increasing k for each
 * element, so the result does not depend on blocking, threads or instruction set.
 *   a (m, k) with leading dimension lda, or (k, m) if ta;  b (k, n), or (n, k) if tb;  c (m, n).
 * a_fill (optional, instead of a): an implicit operand. It writes rows [row, row + rows) and columns
 * [col, col + cols), cols <= 32, of the matrix that `a` would be ((m, k), or (k, m) if ta) into dst[r * 32 + c]
 * (implicit im2col, see examples/common). It is called from many threads.
 * scratch: NULL = the library allocates it; else moe_gemm_scratch bytes. */
typedef struct moe_gemm_args {
    size_t m, n, k;
    const float *a; size_t lda; int ta; /* ld 0 = the row's length */
    const float *b; size_t ldb; int tb;
    float *c; size_t ldc;
    int accumulate;
    void (*a_fill)(void *user, size_t row, size_t rows, size_t col, size_t cols, float *dst);
    void *a_user;
    const moe_parallel *parallel;
    void *scratch; size_t scratch_bytes;
    void *alloc_context;
} moe_gemm_args;
MOE_API moe_status moe_gemm(const moe_gemm_args *g);
MOE_API moe_status moe_gemm_scratch(const moe_gemm_args *g, size_t *bytes);

/* scores = softmax(logits / temperature), each row of (rows, cols). In place allowed. Logits must be finite. */
MOE_API moe_status moe_softmax(size_t rows, size_t cols, float temperature, const float *logits, float *scores);
/* d_logits += the gradient, given scores = moe_softmax(...) and d_scores, all (rows, cols). */
MOE_API moe_status moe_softmax_backward(size_t rows, size_t cols, float temperature, const float *scores,
                                        const float *d_scores, float *d_logits);
/* The k highest of each row of scores (rows, cols), descending; ties go to the lowest index. index (rows, k);
 * value (rows, k) may be NULL. NaN: MOE_E_NAN_LOGITS; -infinity is allowed. */
MOE_API moe_status moe_topk(size_t rows, size_t cols, size_t k, const float *scores, int32_t *index, float *value);

/* Auxiliary losses: the value, unweighted, into *value (may be NULL), and coefficient * gradient added to
 * d_logits (T, E) (may be NULL). prob (T, E) = softmax of the logits; load (E) = tokens an expert was
 * selected by (summed over micro-batches or ranks if you wish); the load is a constant in the gradient. */
MOE_API moe_status moe_loss_switch(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                   const uint64_t *load, float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_z(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                              double *value, float *d_logits);

/* Optimisers on n floats; an array without weight decay (a bias) takes weight_decay = MOE_OFF. */
typedef struct moe_optimizer_args {
    moe_optimizer_kind kind;
    float lr, beta1, beta2, epsilon, momentum, weight_decay;
    float scale;   /* gradients are multiplied by it first (clipping); 0 = 1 */
    uint64_t step; /* 1, 2, ... */
    const moe_parallel *parallel;
} moe_optimizer_args;
/* params (n) -= ...; m and v (n) are the moments (v may be NULL for SGD), zero before the first step. Zero or
 * unset beta1, beta2, epsilon, momentum and weight_decay mean the defaults of moe_desc; MOE_OFF is 0. */
MOE_API moe_status moe_optimizer_step(const moe_optimizer_args *o, size_t n, float *params, const float *grads, float *m, float *v);
/* Sum of squares of n floats, in double: the same bits for any number of threads. */
MOE_API double moe_sum_squares(const moe_parallel *p, size_t n, const float *x);
/* Learning rate at `step` (from 0): peak * (step + 1) / warmup for the first `warmup` steps, then half a cosine from peak
 * down to `floor_lr` at `total`. */
MOE_API float moe_schedule_cosine(uint64_t step, uint64_t warmup, uint64_t total, float peak, float floor_lr);

/* ==== routes and tape =========================================================================
 * Level 2. moe_routes is who goes where. Every router writes it; experts, losses and health read it. It can
 * also be filled from anybody's top-k indices. */
#define MOE_NONE UINT32_MAX
typedef struct moe_routes {
    size_t n_tokens, n_experts;
    size_t n_slots;   /* the most experts that one token can have (top_k) */
    size_t n_routes;  /* kept pairs (token, expert) */
    size_t n_dropped; /* pairs that capacity refused */
    uint32_t *begin;  /* (n_experts + 1): routes of expert e are begin[e] .. begin[e + 1] - 1 */
    uint32_t *token;  /* (n_routes): ascending within an expert */
    float *weight;    /* (n_routes) */
    uint32_t *slot;   /* (n_tokens, n_slots): the route of each choice, or MOE_NONE */
    uint64_t *load;   /* (n_experts): pairs selected, before capacity */
    uint64_t *top1;   /* (n_experts): of these, first choices */
    size_t max_tokens; /* what the memory was made for */
} moe_routes;

/* Bytes for up to n_tokens tokens with n_slots choices each. */
MOE_API moe_status moe_routes_size(size_t n_tokens, size_t n_slots, size_t n_experts, size_t *bytes);
/* Lays the arrays into `memory` (yours; it must outlive the routes). */
MOE_API moe_status moe_routes_init(moe_routes *r, size_t n_tokens, size_t n_slots, size_t n_experts, void *memory, size_t bytes);
/* Fills r from index (T, n_slots), values below n_experts, each at most once a token, negative = no choice,
 * and weight (T, n_slots), NULL = 1 / n_slots. capacity 0 = dropless, else the most tokens an expert keeps,
 * in the given order (default MOE_ORDER_TOKEN). On error r holds no routes. */
MOE_API moe_status moe_routes_fill(moe_routes *r, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order);

/* moe_tape is what one forward keeps for its backward, and its scratch: one for each batch in flight. */
typedef struct moe_tape {
    /* results that you may read after a forward */
    size_t n_tokens;
    float *logits;  /* (T, E) */
    float *scores;  /* (T, E): what the selection sees: prob, or the logits for MOE_GATE_SOFTMAX_SELECTED */
    float *prob;    /* (T, E): softmax(logits / temperature); the same as scores for MOE_GATE_SOFTMAX */
    int32_t *index; /* (T, top_k): selected, before capacity */
    float *weight;  /* (T, top_k) */
    moe_routes routes;
    double loss[MOE_LOSS_COUNT]; /* values of the last backward, unweighted */
    /* private from here on */
    struct moe__tape_memory *memory;
} moe_tape;

/* A tape for up to max_tokens tokens of layers with this desc. training MOE_OFF: forward only, much smaller. */
MOE_API moe_status moe_tape_new(moe_tape **out, const moe_desc *d, size_t max_tokens, int training);
MOE_API void moe_tape_free(moe_tape *t); /* NULL allowed */
/* The same in your memory (any alignment): ask, then lay out; nothing to free. */
MOE_API moe_status moe_tape_size(const moe_desc *d, size_t max_tokens, int training, size_t *bytes);
MOE_API moe_status moe_tape_init(moe_tape **out, const moe_desc *d, size_t max_tokens, int training, void *memory, size_t bytes);

/* Router alone: x (n, d) -> logits, scores, index, weight, routes of the tape. router (d, E).  */
MOE_API moe_status moe_route(const moe_desc *d, const float *router, const float *x, size_t n, moe_tape *t);
/* Its backward: d_weight (n_routes) is the gradient by routes.weight (NULL = 0). Adds the auxiliary losses of
 * desc.loss. d_router (d, E) += ..., dx (n, d) += ...; either may be NULL. load (E), NULL = this batch's own:
 * the loads that the losses see. */
MOE_API moe_status moe_route_backward(const moe_desc *d, const float *router, moe_tape *t, const float *d_weight,
                                      const uint64_t *load, float *d_router, float *dx);

/* Experts alone, over the routes of the tape (made by moe_route, or filled by you with moe_routes_fill after
 * moe_tape_tokens). params: moe_experts_count floats in the library's panel layout (moe_expert_pack). */
MOE_API moe_status moe_experts_count(const moe_desc *d, size_t *n_floats);
/* Plain arrays -> params: expert e (routed first, then shared): w1 (d, f) [the gate for gated kinds], wu (d, f)
 * [gated kinds only], w2 (f, d), b1 (f), bu (f), b2 (d) [with desc.bias]. NULL = zeros. unpack: the way back. */
typedef struct moe_expert_weights { float *w1, *wu, *w2, *b1, *bu, *b2; } moe_expert_weights;
MOE_API moe_status moe_expert_pack(const moe_desc *d, size_t e, const moe_expert_weights *w, float *params);
MOE_API moe_status moe_expert_unpack(const moe_desc *d, size_t e, const float *params, const moe_expert_weights *w);
/* Tells the tape that n tokens x (n, d) follow, for a routing of your own. */
MOE_API moe_status moe_tape_tokens(const moe_desc *d, moe_tape *t, const float *x, size_t n);
/* y (n, d) = sum over a token's routes of weight * expert(x), plus the shared experts. */
MOE_API moe_status moe_experts_forward(const moe_desc *d, const float *params, moe_tape *t, float *y);
/* d_params += ... (moe_experts_count floats, panel layout; or = if `fresh`), d_weight (n_routes) = ... (may be
 * NULL), dx (n, d) += ... (may be NULL). */
MOE_API moe_status moe_experts_backward(const moe_desc *d, const float *params, moe_tape *t, const float *dy,
                                        int fresh, float *d_params, float *d_weight, float *dx);

/* ==== diagnostics =============================================================================
 * Is the routing healthy? Counters that need no layer, measures of plain arrays, the ecology number, and the
 * congestion game behind gamma_eff. In double with libm: outside the same-bits contract, and never part of a gradient.
 * Wherever index (T, k) is asked for: experts below n_experts, the first choice first, negative = no choice; work is
 * scratch of the stated number of elements. What is counted is added to, so the counts of threads and ranks add up.
 * Formulas and how sure they are: docs/math.md and docs/gamma.md. */

/* moe_health counts routed batches and yields the load metrics. It needs no layer: O(E) memory. */
typedef struct moe_health {
    size_t n_experts;
    /* counters */
    uint64_t n_batches, n_tokens, n_selected, n_dropped;
    uint64_t *load; /* (E): selections, before capacity */
    uint64_t *top1; /* (E): first choices */
    double *prob;   /* (E): sum over tokens of the gate's softmax */
    /* metrics, as of the last moe_health_update (formulas: docs/math.md) */
    double maxvio;       /* max(load) / mean(load) - 1 */
    double load_cv;      /* standard deviation / mean of the load */
    double load_entropy; /* -sum l ln l / ln E of the load's shares: 1 = even */
    double entropy;      /* -sum P ln P in nats, P the mean softmax */
    double drop_rate;    /* dropped / selected */
    size_t n_dead;       /* experts with under 1% of the first choices (after the ecology paper [S]); a single expert is never
                            dead, and above 100 experts even an even router has them: the definition is the source's */
    double minvio;            /* 1 - min(load) / mean(load) */
    double gini;              /* sum_ij |l_i - l_j| / (2 E^2 mean): 0 = even, 1 - 1 / E = all on one expert */
    double min_max;           /* min(load) / max(load) */
    double effective_experts; /* exp of the load's entropy in nats: E = even, 1 = all on one expert */
    size_t n_dead_relative;   /* experts with under dead_fraction / E of the selections */
    double dead_fraction;     /* yours to set, kept by a reset; 0 = 0.1 */
    uint64_t *sorted;         /* (E): scratch of moe_health_update */
} moe_health;
MOE_API moe_status moe_health_size(size_t n_experts, size_t *bytes);
MOE_API moe_status moe_health_init(moe_health *h, size_t n_experts, void *memory, size_t bytes); /* memory stays yours */
MOE_API moe_status moe_health_reset(moe_health *h);
/* Adds one routed batch. prob (T, E) may be NULL. */
MOE_API moe_status moe_health_add(moe_health *h, const moe_routes *r, const float *prob);
MOE_API moe_status moe_health_merge(moe_health *h, const moe_health *other); /* h += other */
MOE_API moe_status moe_health_update(moe_health *h);                         /* counters -> metrics */

/* What changed between two windows, both updated. An expert died if it was alive in `before` and is dead in `now`. */
typedef struct moe_health_change {
    size_t newly_dead, revived;                   /* by the absolute definition of n_dead */
    size_t newly_dead_relative, revived_relative; /* by that of n_dead_relative, with now->dead_fraction */
    double load_moved;                            /* sum |l_e - l'_e| / 2 of the load's shares: 0 to 1 */
} moe_health_change;
MOE_API moe_status moe_health_compare(const moe_health *before, const moe_health *now, moe_health_change *out);

/* Share of the tokens whose set of experts differs; before and after (T, k), in any order within a token. */
MOE_API moe_status moe_churn(size_t n_tokens, size_t top_k, const int32_t *before, const int32_t *after, double *share);
/* Sequence expert utilisation [P]: mean over sequences of `sequence` tokens (the last may be shorter) of distinct experts / E.
 * work (E). */
MOE_API moe_status moe_seu(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence, const int32_t *index,
                           uint32_t *work, double *seu);
/* count (E, E) += tokens that select both i and j; the diagonal is the load. */
MOE_API moe_status moe_coselect(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index, uint64_t *count);
/* Share of the routes that leave their token's rank: token t lives on rank t P / T, expert e on rank e P / E (whole numbers). */
MOE_API moe_status moe_crossing(size_t n_tokens, size_t n_experts, size_t n_ranks, size_t top_k, const int32_t *index,
                                double *share);
/* share (n_tiers) = of the load (E), by tier (E): the tier of each expert, below n_tiers. With a device as a tier: its load. */
MOE_API moe_status moe_tier_usage(size_t n_experts, size_t n_tiers, const uint32_t *tier, const uint64_t *load, double *share);
/* sum (E) += loss (T) of the tokens that select an expert; divided by the load, the expert's mean loss. */
MOE_API moe_status moe_loss_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                      const float *loss, double *sum);
/* By first choice: right (E) += tokens that are correct (T, 0 or 1); count (E, n_labels) += tokens of each label (T). */
MOE_API moe_status moe_right_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                       const uint8_t *correct, uint64_t *right);
MOE_API moe_status moe_label_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_labels,
                                       const int32_t *index, const uint32_t *label, uint64_t *count);
/* Where labels are known and correctness is not: right (E) = tokens of the expert's most frequent label, count (E, n_labels) [D]. */
MOE_API moe_status moe_label_majority(size_t n_experts, size_t n_labels, const uint64_t *count, uint64_t *right);

/* The ecology paper's kinds of experts [S], by usage u (share of first choices) and accuracy a. */
typedef enum moe_ecology {
    MOE_ECOLOGY_DEAD,       /* u < 1% */
    MOE_ECOLOGY_NOISE,      /* 1% <= u < 3%, a < 25% */
    MOE_ECOLOGY_EDGE,       /* 1% <= u < 3%, a >= 25% */
    MOE_ECOLOGY_WEAK_CORE,  /* u >= 3%, a < 30% */
    MOE_ECOLOGY_BROAD_CORE, /* u >= 3%, 30% <= a < 50% */
    MOE_ECOLOGY_PURE_CORE,  /* u >= 3%, a >= 50% */
    MOE__ECOLOGY_COUNT
} moe_ecology;
MOE_API const char *moe_ecology_name(moe_ecology v); /* "DEAD" ... "PURE_CORE"; NULL past the end */
MOE_API moe_status moe_ecology_classes(size_t n_experts, const uint64_t *top1, const uint64_t *right, moe_ecology *out);
/* E = T H / (O + B) [S]: softmax temperature, and the weights of the entropy, oracle and balance losses. O + B = 0 gives
 * infinity, whatever T H is: the source leaves it undefined. Anything negative, infinite or NaN gives NaN. */
MOE_API double moe_ecology_number(double temperature, double entropy, double oracle, double balance);

/* A temperature scan on given logits (T, E): row i is what the softmax gate at temperature[i] would do. Selection is
 * by the float32 scores, as the layer selects: where a low temperature rounds scores to the same number, it changes. */
typedef struct moe_temperature_row {
    double temperature;
    double entropy, token_entropy;   /* of the mean softmax; mean over tokens: nats. These change with T, */
    double top_mass, first_mass;     /* as do the mean mass of the selected, and of the first choice */
    double maxvio, load_cv, changed; /* of the load, and share of tokens with another set than by the logits: these stay */
    size_t n_dead;                   /* absolute */
} moe_temperature_row;
MOE_API moe_status moe_temperature_scan_work(size_t n_experts, size_t top_k, size_t *bytes);
MOE_API moe_status moe_temperature_scan(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, size_t n_rows,
                                        const float *temperature, moe_temperature_row *row, void *work, size_t work_bytes);

/* Pairwise expert similarity [P]: mean over tokens of 2 / (E (E - 1)) sum_{i<j} cos(o_i, o_j), outputs (T, E, d) of ALL
 * experts; the cosine with a zero output is 0 [D]; one expert gives 0. work (E). */
MOE_API moe_status moe_pes(size_t n_tokens, size_t n_experts, size_t d, const float *outputs, double *work, double *pes);

/* One pass over logits (T, E): load (E) += selections by top-k (ties go to the lowest index), top1 (E) += first choices,
 * sum (E) += logits. Each may be NULL (without load there is no top1 either). Adds nothing if a logit is NaN or infinite.
 * work: moe_topk_count_work bytes. */
MOE_API moe_status moe_topk_count_work(size_t n_experts, size_t top_k, size_t *bytes);
MOE_API moe_status moe_topk_count(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, uint64_t *load,
                                  uint64_t *top1, double *sum, void *work, size_t work_bytes);

/* -- the congestion game, after arXiv 2604.04230, of which only the abstract was available: all of it is [D] --
 *
 * Load m on the simplex, quality q in logits: a token that picks expert i pays gamma m_i - q_i, with entropy weight 1, so
 * m = softmax(q - gamma m). gamma is in logits per unit of load share. load (E) is a share: it sums to 1. */
typedef struct moe_game_info {
    int iterations;
    double residual; /* largest |log m_i + gamma m_i - q_i + c|, relative to its terms */
} moe_game_info;
/* load (E) = the equilibrium: finite gamma > -1, where it is unique. info may be NULL. */
MOE_API moe_status moe_game_solve(size_t n_experts, const double *quality, double gamma, double *load, moe_game_info *info);
/* d_load (E) = d load / d gamma at the equilibrium `load`. */
MOE_API moe_status moe_game_sensitivity(size_t n_experts, double gamma, const double *load, double *d_load);
/* load (E) = softmax(quality / temperature): the game to first order around even load, at temperature 1 + gamma / E. */
MOE_API moe_status moe_game_softmax(size_t n_experts, const double *quality, double temperature, double *load);

#define MOE_GAME_GAMMA_MAX 200.0 /* gamma is looked for in [0, this] */
typedef struct moe_game_fit {
    int identified;        /* 0: the data do not tell gamma, which is NaN then (see below) */
    double gamma;          /* argmin of sum_i |m_i - m_i(gamma)| */
    double gamma_ols;      /* closed form: slope of q_i - log m_i on m_i; NaN for an even load */
    double temperature;    /* argmin of sum_i |m_i - softmax(q / T)_i|, T in [0.02, 500]; NaN for constant quality */
    double l1_game, l1_softmax, l1_uniform; /* sum_i |m_i - prediction|, 0 to 2 */
    double peak_load, peak_softmax; /* E max m, and E max softmax(q): two candidates for the paper's B_0, which it does not define */
} moe_game_fit;
/* Fits quality (E) and load (E, any positive multiple of shares). selections: how many the load was counted from, or 0 = exact.
 * Unidentified: over all of [0, MOE_GAME_GAMMA_MAX] the prediction moves by less than the sampling noise of the load, or
 * the best gamma is that upper end. Caveat: differences between tokens alone move gamma, in either sign. work (2 E). */
MOE_API moe_status moe_game_estimate(size_t n_experts, const double *quality, const double *load, double selections,
                                     double *work, moe_game_fit *out);
/* gamma_explicit = alpha E unit_scale, of a Switch loss with coefficient alpha. unit_scale: logit units in a unit of loss (they
 * are not commensurate), 1 / layers where the loss is a mean over layers, times k where f sums to k. gamma_implicit = gamma_eff - it. */
MOE_API double moe_game_explicit(double alpha, size_t n_experts, double unit_scale);

/* Several types of tokens: type c has share pi_c and mean logits q^c; share (C), quality (C, E).
 * Clusters logits (T, E), each row less its mean, by k-means++ (at most 50 rounds; the same for a seed everywhere): type (T),
 * share, quality. work (T + E). C is 1 to 64; with fewer distinct tokens some shares are 0. */
MOE_API moe_status moe_game_cluster(size_t n_tokens, size_t n_experts, size_t n_types, uint64_t seed, const float *logits,
                                    uint32_t *type, double *share, double *quality, double *work);
/* Elements of work for the three below. */
MOE_API moe_status moe_game_types_work(size_t n_experts, size_t n_types, size_t *count);
/* Coupled: load (E) = sum_c pi_c softmax(q^c - gamma load), gamma >= 0. */
MOE_API moe_status moe_game_types_solve(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                        double gamma, double *load, double *work, moe_game_info *info);
/* Independent: load (E) = sum_c pi_c softmax(q^c / T). */
MOE_API moe_status moe_game_types_softmax(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                          double temperature, double *load, double *work);
typedef struct moe_game_types_fit { double gamma, l1_coupled, temperature, l1_independent; } moe_game_types_fit;
MOE_API moe_status moe_game_types_estimate(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                           const double *load, double *work, moe_game_types_fit *out);

/* Scope. Is each expert's load possible with k different experts a token: max m <= 1 / k? */
MOE_API moe_status moe_game_feasible(size_t n_experts, size_t top_k, const double *load, int *feasible);
/* epsilon_l = max V - min V, V(i) = mean over the tokens that use i at layer l, index (T, k) of n_experts, of
 * logsumexp_j(z_j - gamma m_j) at layer l + 1: logits (T, n_next), load (n_next). Experts with under `least` tokens do not count.
 * work (2 n_experts). The last layer's is 0. */
MOE_API moe_status moe_game_epsilon(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index, size_t n_next,
                                    const float *logits, const double *load, double gamma, size_t least, double *work,
                                    double *epsilon);
/* ||m of the whole network - m of the layer alone||_1 is at most epsilon / (2 (1 + gamma / E)); 2 tanh(epsilon / 4) at gamma = 0. */
MOE_API double moe_game_epsilon_bound(double epsilon, double gamma, size_t n_experts);

typedef enum moe_quality_kind { /* four ways to say how good an expert is, from logits (T, E) */
    MOE_QUALITY_MEAN,     /* mean logit */
    MOE_QUALITY_LOG_PROB, /* log of the mean softmax: can be circular, where the load is that softmax */
    MOE_QUALITY_SELECTED, /* mean logit of the tokens that select it; -inf if none does */
    MOE_QUALITY_MEDIAN,   /* median logit */
    MOE_QUALITY_TRIMMED,  /* mean without the lowest and the highest 10% */
    MOE__QUALITY_COUNT
} moe_quality_kind;
MOE_API const char *moe_quality_name(moe_quality_kind v);
/* index (T, k) only for SELECTED, whose work is (E); MEDIAN's and TRIMMED's is (T), the others need none. */
MOE_API moe_status moe_game_quality(moe_quality_kind kind, size_t n_tokens, size_t n_experts, size_t top_k, const float *logits,
                                    const int32_t *index, double *work, double *quality);
/* Pearson's r of two series; pairs with a value that is not finite are left out; NaN if one does not vary. */
MOE_API moe_status moe_pearson(size_t n, const double *a, const double *b, double *r);

/* moe_game is what the estimators need of a dump: counts and logit sums by batch of text, (B, E) each. */
typedef struct moe_game {
    size_t n_experts, n_batches;
    uint64_t *tokens; /* (B) */
    uint64_t *count;  /* (B, E): selections */
    double *logit;    /* (B, E): sums over the tokens */
    void *alloc_context; /* moe_game_bootstrap and moe_game_holdout allocate with it; yours to set */
} moe_game;
MOE_API moe_status moe_game_size(size_t n_experts, size_t n_batches, size_t *bytes);
MOE_API moe_status moe_game_init(moe_game *g, size_t n_experts, size_t n_batches, void *memory, size_t bytes);
MOE_API moe_status moe_game_reset(moe_game *g);
/* Adds tokens to a batch: logits (T, E) and the experts they use, index (T, k). (From logits alone: moe_topk_count.) */
MOE_API moe_status moe_game_add(moe_game *g, size_t batch, size_t n_tokens, size_t top_k, const float *logits, const int32_t *index);
MOE_API moe_status moe_game_merge(moe_game *g, const moe_game *other); /* g += other, batch by batch */
/* quality (E), load (E) and the selections of the batches b with half[b] == which; half NULL: of all. */
MOE_API moe_status moe_game_pool(const moe_game *g, const uint8_t *half, int which, double *quality, double *load, double *selections);
/* A random half of the batches, the same for a seed: half (B) = 0 or 1, B / 2 of them 0. */
MOE_API moe_status moe_game_split(const moe_game *g, uint64_t seed, uint8_t *half);
/* Held-out errors: gamma and T are fitted on half 0; the load of half 1 is predicted from half 0's quality. */
MOE_API moe_status moe_game_holdout(const moe_game *g, uint64_t seed, moe_game_fit *out);
/* Percentile bootstrap: gamma (replicates) = fits on batches drawn with replacement, in order of the draws; lo and hi are their
 * percentiles 2.5 and 97.5. Replicate r draws the same batches for a seed whatever the layer, so means over layers can be formed. */
MOE_API moe_status moe_game_bootstrap(const moe_game *g, size_t replicates, uint64_t seed, const moe_parallel *parallel,
                                      double *gamma, double *lo, double *hi);
/* The percentiles alone. Sorts x. */
MOE_API moe_status moe_interval(size_t n, double *x, double *lo, double *hi);

typedef enum moe_phase {
    MOE_PHASE_NONE, MOE_PHASE_DORMANT, MOE_PHASE_SURGE, MOE_PHASE_STABILISATION, MOE_PHASE_RELAXATION, MOE__PHASE_COUNT
} moe_phase;
MOE_API const char *moe_phase_name(moe_phase v); /* "none", "dormant", "surge", "stabilisation", "relaxation" */
/* Phases of a series: step (n, ascending), gamma and its interval lo, hi (n). work (n). Docs: docs/gamma.md. */
MOE_API moe_status moe_game_phases(size_t n, const double *step, const double *gamma, const double *lo, const double *hi,
                                   double *work, moe_phase *phase);

/* -- feedback, after arXiv 2605.29121: ds_i/dt = a p_i - lambda s_i, p = softmax(beta s); steady states are the game's with
 * gamma = -Kf, Kf = a beta / lambda [D] -- */
/* E = 2: the largest u = p_1 - p_2 with u = tanh((Kf u + h) / 2). */
MOE_API moe_status moe_feedback_two(double kf, double h, double *u);
/* E = 2, Kf >= 2: the fold, where two states meet: u and h (its mirror is -u, -h). */
MOE_API moe_status moe_feedback_fold(double kf, double *u, double *h);
/* E >= 2: one-sided states exist from Kf = ks on, lie as deep as balance at kc, and balance is unstable from E on. */
MOE_API moe_status moe_feedback_thresholds(size_t n_experts, double *ks, double *kc);
/* a and lambda by least squares of (s_{t+1} - s_t) / dt on p_t and s_t; s and p (n_steps, E). */
MOE_API moe_status moe_feedback_fit(size_t n_steps, size_t n_experts, double dt, const double *s, const double *p, double *a,
                                    double *lambda);

/* ==== layer ===================================================================================
 * Level 3: parameters, gradients and optimiser state in one block. */
typedef struct moe_layer moe_layer;

MOE_API moe_status moe_layer_new(moe_layer **out, const moe_desc *d);
MOE_API void moe_layer_free(moe_layer *m); /* NULL allowed */
/* The same in your memory (any alignment). Such a layer has no tape of its own: use moe_forward_tape with one
 * of yours; moe_forward returns MOE_E_NO_MEMORY. Nothing but moe_layer_save allocates then. */
MOE_API moe_status moe_layer_size(const moe_desc *d, size_t *bytes);
MOE_API moe_status moe_layer_init(moe_layer **out, const moe_desc *d, void *memory, size_t bytes);

/* y (n, d) = the layer's output for tokens x (n, d); n = 0 is allowed. Keeps what backward needs in the layer's own tape, which
 * grows as needed. x need not stay. Add the residual yourself. */
MOE_API moe_status moe_forward(moe_layer *m, const float *x, size_t n, float *y);
/* Gradients of the last moe_forward are added to the layer's, auxiliary losses included: one backward for each
 * forward (it uses up the tape). dy (n, d) is the gradient of your loss by y; dx (n, d) is set to the gradient by x, or NULL. */
MOE_API moe_status moe_backward(moe_layer *m, const float *dy, float *dx);
/* One optimiser step with learning rate lr; then the gradients count as zero. */
MOE_API moe_status moe_step(moe_layer *m, float lr);

/* The same with a tape of yours: many threads may run forward on one layer, each with its own tape.
 * Backward writes the layer's gradients, so one at a time. */
MOE_API moe_status moe_forward_tape(const moe_layer *m, moe_tape *t, const float *x, size_t n, float *y);
MOE_API moe_status moe_backward_tape(moe_layer *m, moe_tape *t, const float *dy, float *dx);

MOE_API const moe_desc *moe_layer_desc(const moe_layer *m);   /* resolved; NULL for NULL */
MOE_API const moe_tape *moe_layer_tape(const moe_layer *m);   /* of the last moe_forward, or NULL */
MOE_API size_t moe_layer_params(const moe_layer *m);          /* number of parameters (padding not counted) */
MOE_API size_t moe_layer_active_params(const moe_layer *m);   /* of these, used by one token */
MOE_API uint64_t moe_layer_hash(const moe_layer *m);          /* of all parameters, as moe_layer_get gives them */
/* Health of the batches of moe_forward since the last reset (for a tape of yours: moe_health_add(h, &tape->routes, tape->prob)).
 * *h is a view into the layer: valid until its next call. */
MOE_API moe_status moe_layer_health(moe_layer *m, moe_health *h);
MOE_API moe_status moe_layer_health_reset(moe_layer *m);
/* Values of the auxiliary losses of the last backward: unweighted, and times their coefficients; either may be NULL. */
MOE_API moe_status moe_layer_losses(const moe_layer *m, double value[MOE_LOSS_COUNT], double weighted[MOE_LOSS_COUNT]);
/* L2 norm of the layer's gradient; moe_layer_scale_grads multiplies it: for clipping across several models.
 * Factor 0 sets it to zero, NaN and all: the way on after MOE_E_NAN_GRADS. */
MOE_API moe_status moe_layer_grad_norm(const moe_layer *m, double *norm);
MOE_API moe_status moe_layer_scale_grads(moe_layer *m, float factor);

/* Tensors by name, row-major: "router" (d, E); "experts.w1", "experts.wu" (G, d, f); "experts.w2" (G, f, d);
 * "experts.b1", "experts.bu" (G, f); "experts.b2" (G, d); G = n_experts + n_shared, the shared ones last. */
typedef struct moe_tensor { const char *name; size_t n_dims, dim[3], count; } moe_tensor;
MOE_API size_t moe_layer_tensors(const moe_layer *m); /* how many */
MOE_API moe_status moe_layer_tensor(const moe_layer *m, size_t i, moe_tensor *out);
typedef enum moe_part { MOE_PART_PARAMS, MOE_PART_GRADS, MOE_PART_MOMENT1, MOE_PART_MOMENT2, MOE__PART_COUNT } moe_part;
MOE_API moe_status moe_layer_get(const moe_layer *m, moe_part part, const char *name, float *out, size_t count);
MOE_API moe_status moe_layer_set(moe_layer *m, moe_part part, const char *name, const float *in, size_t count);

/* ==== files ===================================================================================
 * safetensors and .npy, read defensively: header cap, checked arithmetic, contiguous offsets. */
typedef struct moe_file_tensor {
    const char *name; size_t name_length; /* as in the file, still JSON-escaped, not NUL-terminated */
    char dtype[8];                        /* "F32", "BF16", ... */
    size_t n_dims, dim[8];
    const unsigned char *data; size_t bytes;
} moe_file_tensor;
typedef struct moe_file {
    const unsigned char *bytes; size_t size; /* yours; must outlive the view */
    size_t n_tensors;
    size_t header; /* bytes of the JSON header */
    size_t offset; /* after an error: where in the file */
} moe_file;
/* Validates everything at once; afterwards every tensor's data lies inside the bytes. No allocation. */
MOE_API moe_status moe_file_open(moe_file *f, const void *bytes, size_t size);
MOE_API moe_status moe_file_tensor_at(const moe_file *f, size_t i, moe_file_tensor *out);
MOE_API moe_status moe_file_find(const moe_file *f, const char *name, moe_file_tensor *out);
/* The value of a __metadata__ key into buffer, NUL-terminated; MOE_E_NAME if there is none. */
MOE_API moe_status moe_file_metadata(const moe_file *f, const char *key, char *buffer, size_t size);

/* .npy (NumPy's array files, versions 1 to 3), read as defensively: little-endian, C order. */
typedef enum moe_dtype {
    MOE_DTYPE_NONE, MOE_DTYPE_F32, MOE_DTYPE_F16, MOE_DTYPE_BF16, MOE_DTYPE_F64, MOE_DTYPE_U16, MOE_DTYPE_I32, MOE_DTYPE_I64,
    MOE__DTYPE_COUNT
} moe_dtype; /* <f4 <f2 (none in NumPy) <f8 <u2 <i4 <i8 */
MOE_API size_t moe_dtype_size(moe_dtype v);      /* bytes of an element; 0 past the end */
MOE_API const char *moe_dtype_name(moe_dtype v); /* "F32", ... as safetensors names them */
typedef struct moe_npy {
    moe_dtype dtype;
    size_t n_dims, dim[8], count; /* count: product of the dimensions; 1 without any */
    uint64_t data;                /* where in the file the elements begin */
    const unsigned char *elements; /* moe_npy_open only: (count), not aligned */
    size_t offset;                /* after an error: where in the file */
} moe_npy;
/* Validates a whole file in memory; the view lasts as long as the bytes. */
MOE_API moe_status moe_npy_open(moe_npy *f, const void *bytes, size_t size);
/* The same from the first `size` bytes of a file of file_size bytes, to stream the rest. MOE_E_FILE_SHORT with offset above
 * size: give the first `offset` bytes, at most 1 MB. */
MOE_API moe_status moe_npy_header(moe_npy *f, const void *bytes, size_t size, uint64_t file_size);

/* n little-endian elements (any alignment) -> float. BF16 and U16 hold the upper half of a float32's bits (bfloat16, which NumPy
 * keeps as uint16). Integers are refused: MOE_E_FILE_DTYPE. */
MOE_API moe_status moe_to_float(moe_dtype dtype, size_t n, const void *elements, float *out);
/* I32 or I64 -> int32; *bad (may be NULL) = the first that does not fit, with MOE_E_NPY_INDEX. */
MOE_API moe_status moe_to_index(moe_dtype dtype, size_t n, const void *elements, int32_t *out, size_t *bad);
/* The same for a tensor of a safetensors file: which of the types above it is, or MOE_DTYPE_NONE. */
MOE_API moe_dtype moe_dtype_of(const char *safetensors_name);

/* model.safetensors.index.json: which file holds which tensor. File names with a path in them are refused. */
typedef struct moe_shards {
    const unsigned char *bytes; size_t size; /* yours; must outlive the view */
    size_t n_tensors;
    size_t map;    /* where the weight_map begins */
    size_t offset; /* after an error: where in the file */
} moe_shards;
MOE_API moe_status moe_shards_open(moe_shards *f, const void *bytes, size_t size);
/* The file of a tensor into buffer, NUL-terminated; MOE_E_NAME if it is not listed. */
MOE_API moe_status moe_shards_find(const moe_shards *f, const char *name, char *buffer, size_t size);
/* Name number i of moe_router_name that the model has, with its layer: MOE_E_NAME past the last. Layers ascend. */
MOE_API moe_status moe_shards_router(const moe_shards *f, size_t i, size_t *layer, char *name, size_t size);
MOE_API moe_status moe_file_router(const moe_file *f, size_t i, size_t *layer, moe_file_tensor *out);
/* Is this the name of a router's weight (E, d) in OLMoE, Qwen-MoE, DeepSeek (model.layers.N.mlp.gate.weight) or Mixtral
 * (model.layers.N.block_sparse_moe.gate.weight) [K]? 1 and its layer, or 0. */
MOE_API int moe_router_name(const char *name, size_t length, size_t *layer);

/* A layer as safetensors: parameters, desc, and with_optimizer the moments and the step count. Little-endian
 * float32. moe_layer_save_size gives the bytes needed. Loading makes a new layer (parallel and alloc_context are
 * taken from `surroundings`, which may be NULL), checked entirely before it is given to you. */
MOE_API moe_status moe_layer_save_size(const moe_layer *m, int with_optimizer, size_t *bytes);
MOE_API moe_status moe_layer_save_memory(const moe_layer *m, int with_optimizer, void *bytes, size_t size);
MOE_API moe_status moe_layer_load_memory(moe_layer **out, const void *bytes, size_t size, const moe_desc *surroundings);
#ifndef MOE_NO_STDIO
/* Written to path + ".part" and renamed when complete, so that a failure leaves an old file whole. */
MOE_API moe_status moe_layer_save(const moe_layer *m, int with_optimizer, const char *path);
MOE_API moe_status moe_layer_load(moe_layer **out, const char *path, const moe_desc *surroundings);
#endif

#endif /* MOE_H */
#endif /* !MOE__PASS */

#ifdef MOE_IMPLEMENTATION
#ifndef MOE__PASS
#ifndef MOE__IMPLEMENTED
#define MOE__IMPLEMENTED

/* ==== platform ================================================================================ */
#include <float.h>
#include <math.h>
#include <string.h>
#ifndef MOE_NO_STDIO
#include <stdio.h>
#endif
#if !defined(MOE_MALLOC) || !defined(MOE_FREE)
#include <stdlib.h>
#define MOE_MALLOC(bytes, ctx) ((void)(ctx), malloc(bytes))
#define MOE_FREE(ptr, ctx) ((void)(ctx), free(ptr))
#endif
#ifndef MOE_ASSERT
#define MOE_ASSERT(x) ((void)0)
#endif

/* The same-bits contract needs float arithmetic as it is written. */
#if defined(__FAST_MATH__) || defined(_M_FP_FAST) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "moe.h needs IEEE arithmetic: compile this file without -ffast-math (and without its parts)"
#endif
#if defined(FLT_EVAL_METHOD) && (FLT_EVAL_METHOD == 1 || FLT_EVAL_METHOD == 2)
#error "moe.h needs float arithmetic in float: on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif
/* No multiply and add may be contracted but where fma is written. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

#if !defined(MOE_NO_SIMD) && (defined(__x86_64__) || defined(_M_X64))
#define MOE__X86 1
#include <immintrin.h>
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif
#endif
#if !defined(MOE_NO_SIMD) && (defined(__aarch64__) || defined(_M_ARM64))
#define MOE__NEON 1
#include <arm_neon.h>
#endif
#if defined(_OPENMP) && !defined(MOE_NO_OPENMP)
#define MOE__OPENMP 1
#include <omp.h>
#endif
#ifdef MOE_USE_CBLAS
#include <cblas.h>
#endif

#if defined(__GNUC__)
#define MOE__INLINE static inline __attribute__((always_inline))
#define MOE__PREFETCH_L1(p) __builtin_prefetch((p), 0, 3)
#define MOE__PREFETCH_L2(p) __builtin_prefetch((p), 0, 2)
#define MOE__ALIGN64 __attribute__((aligned(64)))
#elif defined(_MSC_VER)
#define MOE__INLINE static __forceinline
#ifdef MOE__X86
#define MOE__PREFETCH_L1(p) _mm_prefetch((const char *)(p), _MM_HINT_T0)
#define MOE__PREFETCH_L2(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#else
#define MOE__PREFETCH_L1(p) ((void)(p))
#define MOE__PREFETCH_L2(p) ((void)(p))
#endif
#define MOE__ALIGN64 __declspec(align(64))
#else
#define MOE__INLINE static inline
#define MOE__PREFETCH_L1(p) ((void)(p))
#define MOE__PREFETCH_L2(p) ((void)(p))
#define MOE__ALIGN64
#endif

/* The only multiply-add of the scalar code: rounded once. */
#define moe__fma(a, b, c) fmaf((a), (b), (c))

static const struct { moe_kind kind; const char *field, *sentence; } moe__status_table[] = {
#define MOE__X(code, kind, field, sentence) {MOE_KIND_##kind, field, sentence},
    MOE_STATUS_LIST(MOE__X)
#undef MOE__X
};

MOE_API const char *moe_status_string(moe_status s) {
    return (unsigned)s < MOE__STATUS_COUNT ? moe__status_table[s].sentence : "not a moe_status";
}
MOE_API const char *moe_status_field(moe_status s) {
    return (unsigned)s < MOE__STATUS_COUNT ? moe__status_table[s].field : "";
}
MOE_API moe_kind moe_status_kind(moe_status s) {
    return (unsigned)s < MOE__STATUS_COUNT ? moe__status_table[s].kind : MOE_KIND_ARGUMENT;
}

/* ==== memory ================================================================================== */
#define MOE__MAX_INDEX ((size_t)0x7fffffff) /* rows are counted in 31 bits */

MOE__INLINE size_t moe__min(size_t a, size_t b) { return a < b ? a : b; }
MOE__INLINE size_t moe__max(size_t a, size_t b) { return a > b ? a : b; }
MOE__INLINE size_t moe__ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }

static int moe__mul(size_t a, size_t b, size_t *out) {
    if (b && a > SIZE_MAX / b) return 0;
    *out = a * b;
    return 1;
}
static int moe__add_size(size_t a, size_t b, size_t *out) {
    if (a > SIZE_MAX - b) return 0;
    *out = a + b;
    return 1;
}

/* Allocations are aligned to 64 bytes; the pointer to free stands just before. */
static void *moe__alloc(void *ctx, size_t bytes) {
    size_t total;
    if (!moe__add_size(bytes, 64 + sizeof(void *), &total)) return NULL;
    unsigned char *raw = (unsigned char *)MOE_MALLOC(total, ctx);
    (void)ctx;
    if (!raw) return NULL;
    unsigned char *p = raw + sizeof(void *);
    p += (64 - (uintptr_t)p % 64) % 64;
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    return p;
}
static void moe__free(void *ctx, void *p) {
    void *raw;
    (void)ctx;
    if (!p) return;
    memcpy(&raw, (unsigned char *)p - sizeof(void *), sizeof raw);
    MOE_FREE(raw, ctx);
}

/* One function lays out a block and, with base NULL, measures it. */
typedef struct moe__arena { unsigned char *base; size_t used; int overflow; } moe__arena;
static void *moe__take(moe__arena *a, size_t count, size_t size) {
    size_t bytes, end;
    if (!moe__mul(count, size, &bytes) || !moe__add_size(a->used, bytes, &end) || !moe__add_size(end, 63, &end)) {
        a->overflow = 1;
        return NULL;
    }
    void *p = a->base ? a->base + a->used : NULL;
    a->used = end & ~(size_t)63;
    return p;
}
static float *moe__take_floats(moe__arena *a, size_t rows, size_t cols) {
    size_t n;
    if (!moe__mul(rows, cols, &n)) { a->overflow = 1; n = 0; }
    return (float *)moe__take(a, n, sizeof(float));
}
/* What a size function answers: the arena's bytes and room to align the caller's memory. */
static moe_status moe__arena_bytes(const moe__arena *a, size_t *bytes) {
    if (a->overflow || !moe__add_size(a->used, 64, bytes)) return MOE_E_OVERFLOW;
    return MOE_OK;
}
static moe_status moe__arena_over(moe__arena *a, void *memory, size_t bytes, size_t needed) {
    if (!memory) return MOE_E_NULL_MEMORY;
    if (bytes < needed) return MOE_E_SMALL_MEMORY;
    memset(a, 0, sizeof *a);
    a->base = (unsigned char *)memory + (64 - (uintptr_t)memory % 64) % 64;
    return MOE_OK;
}

/* ==== random ==================================================================================
 * Philox4x32-10 as in Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
 *
 * Number i of (seed, stream) is word i % 4 of philox(key = seed, counter = (i / 4, stream)). A normal pair
 * (2j, 2j + 1) is made of the words 2j and 2j + 1. All arithmetic is integer or one explicit rounding at a
 * time (fmaf, sqrtf, products that are no addend), so that every compiler makes the same bits. */

/* The number's bits, and back. */
static uint32_t moe__bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

static float moe__float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

static int moe__finite(float x) {
    return (moe__bits_of(x) & 0x7f800000u) != 0x7f800000u; /* an exponent of all ones is NaN or infinity */
}
static int moe__all_finite(size_t n, const float *x) {
    int all = 1;
    for (size_t i = 0; i < n; i++) all &= moe__finite(x[i]);
    return all;
}

/* log(1 + f) / f^2 - 1 / f for 1 + f in [sqrt(1/2), sqrt(2)), as a polynomial of degree 8; largest error 0.1 units of
 * 2^-24 of the logarithm. FMA(a, b, c) and K(constant) choose scalars or vectors. */
#define MOE__LOG_TAIL(FMA, K, f)                                                                                    \
    FMA(FMA(FMA(FMA(FMA(FMA(FMA(FMA(K(-0.0763693973f), f, K(0.127625376f)), f, K(-0.131595731f)), f,                \
                            K(0.142015368f)), f, K(-0.166234091f)), f, K(0.200012431f)), f, K(-0.250008196f)), f,   \
            K(0.333333313f)), f, K(-0.5f))
#define MOE__LN2_HI 0.693145752f   /* ln 2 cut to 16 bits: its product with an exponent is exact */
#define MOE__LN2_LO 1.42860677e-6f /* ln 2 - MOE__LN2_HI */
#define MOE__SAME(x) (x)

/* log x, positive normal x; the bits of moe_log. */
static float moe__logf1(float x) {
    uint32_t above = moe__bits_of(x) - 0x3f3504f3u;         /* 0x3f3504f3 is sqrt(1/2) */
    int32_t e = (int32_t)((above >> 23) ^ 0x100u) - 0x100; /* sign-extends: x = m * 2^e, m in [sqrt(1/2), sqrt(2)) */
    float m = moe__float_of((above & 0x007fffffu) + 0x3f3504f3u);
    float f = m - 1.0f, exponent = (float)e; /* both exact */
    float tail = moe__fma(exponent, MOE__LN2_LO, moe__fma(f * f, MOE__LOG_TAIL(moe__fma, MOE__SAME, f), 0.0f));
    return moe__fma(exponent, MOE__LN2_HI, f + tail);
}

/* cos and sin of 2 pi u for u = turn / 2^24, turn < 2^24. */
static void moe__cos_sin_turn(uint32_t turn, float *c, float *s) {
    uint32_t quarter = (turn + (1u << 21)) >> 22;            /* the nearest quarter turn, 0 to 4 */
    int32_t rest = (int32_t)turn - (int32_t)(quarter << 22); /* [-2^21, 2^21): an eighth turn each way */
    float a = (float)rest * (1.0f / 16777216.0f), z = a * a; /* a exact, |a| <= 1/8 */
    /* sin(2 pi a) / a and cos(2 pi a) as polynomials in a^2; 6.28318548 is 2 pi rounded */
    float sine = a * moe__fma(moe__fma(moe__fma(-76.7249985f, z, 81.6246643f), z, -41.3418617f), z, 6.28318548f);
    float cosine = moe__fma(
        moe__fma(moe__fma(moe__fma(58.6192513f, z, -85.4245071f), z, 64.9391479f), z, -19.7392082f), z, 1.0f);
    float swapped_c = quarter & 1u ? sine : cosine, swapped_s = quarter & 1u ? cosine : sine;
    *c = (quarter + 1u) & 2u ? -swapped_c : swapped_c; /* the cosine is negative in quarters 1 and 2 */
    *s = quarter & 2u ? -swapped_s : swapped_s;        /* the sine in quarters 2 and 3 */
}

MOE_API void moe_philox(uint64_t key, uint64_t counter_lo, uint64_t counter_hi, uint32_t out[4]) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)counter_lo, c1 = (uint32_t)(counter_lo >> 32);
    uint32_t c2 = (uint32_t)counter_hi, c3 = (uint32_t)(counter_hi >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xd2511f53u * c0, p1 = (uint64_t)0xcd9e8d57u * c2; /* the paper's multipliers */
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9e3779b9u; /* golden ratio, */
        k1 += 0xbb67ae85u; /* sqrt(3) - 1: the paper's key schedule */
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

MOE_API uint32_t moe_rand_u32(uint64_t seed, uint64_t stream, uint64_t i) {
    uint32_t word[4];
    moe_philox(seed, i / 4, stream, word);
    return word[i % 4];
}

/* Numbers start .. start + n - 1 of a stream, uniform in [lo, hi): finite, lo <= hi. */
static void moe__uniform_at(uint64_t seed, uint64_t stream, uint64_t start, size_t n, float lo, float hi, float *out) {
    uint32_t word[4];
    float scale = moe__finite(hi - lo) ? 1.0f : 0.5f; /* halved where the width would overflow */
    float low = lo * scale, width = moe__fma(hi, scale, -low);
    float below = lo < hi ? nextafterf(hi, lo) : hi; /* the last number that may come out */
    for (size_t i = 0; i < n; i++) {
        uint64_t at = start + i;
        if (!i || at % 4 == 0) moe_philox(seed, at / 4, stream, word);
        float u = (float)(word[at % 4] >> 8) * (1.0f / 16777216.0f); /* 24 bits, exact, [0, 1) */
        float v = moe__fma(u, width, low) / scale;
        out[i] = v < below ? v : below;
    }
}

MOE_API moe_status moe_rand_uniform(uint64_t seed, uint64_t stream, size_t n, float lo, float hi, float *out) {
    if (!moe__finite(lo) || !moe__finite(hi) || lo > hi) return MOE_E_RANGE;
    if (n && !out) return MOE_E_NULL_OUT;
    moe__uniform_at(seed, stream, 0, n, lo, hi, out);
    return MOE_OK;
}

MOE_API moe_status moe_rand_normal(uint64_t seed, uint64_t stream, size_t n, float mean, float std, float *out) {
    if (!moe__finite(mean) || !moe__finite(std) || std < 0.0f) return MOE_E_STD;
    if (n && !out) return MOE_E_NULL_OUT;
    uint32_t word[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < n; i += 2) {
        if (i % 4 == 0) moe_philox(seed, i / 4, stream, word);
        /* all 32 bits, in (0, 1], so that the radius reaches 6.7 */
        float u = moe__fma((float)word[i % 4], 1.0f / 4294967296.0f, 0.5f / 4294967296.0f);
        float radius = sqrtf(-2.0f * moe__logf1(u)), c, s;
        moe__cos_sin_turn(word[i % 4 + 1] >> 8, &c, &s);
        out[i] = moe__fma(std, radius * c, mean);
        if (i + 1 < n) out[i + 1] = moe__fma(std, radius * s, mean);
    }
    return MOE_OK;
}

/* Eight bytes as two 32-bit words in the machine's own order, the first one low: equal floats give equal words
 * whatever that order is. */
static uint64_t moe__hash_word(const unsigned char *p) {
    uint32_t w[2];
    memcpy(w, p, sizeof w);
    return (uint64_t)w[1] << 32 | w[0];
}

/* One step, reversible for a fixed word, so that a single difference is never lost. Multiplied before and after the
 * rotation, so that a change of one bit (a sign) takes a dense change of the next word to undo. */
static uint64_t moe__hash_step(uint64_t h, uint64_t word) {
    h += word * 0x9e3779b97f4a7c15ull;                   /* 2^64 / golden ratio, odd */
    return (h << 29 | h >> 35) * 0xd1342543de82ef95ull;  /* a multiplier of good spectrum (Steele, Vigna) */
}

MOE_API uint64_t moe_hash(uint64_t seed, const void *bytes, size_t n) {
    const unsigned char *p = (const unsigned char *)bytes;
    if (!p) n = 0;
    uint64_t h = moe__hash_step(seed ^ 0x510e527fade682d1ull, (uint64_t)n); /* fraction of sqrt(11) */
    if (n >= 32) { /* four independent lanes, from the fractions of the square roots of 2, 3, 5, 7 */
        uint64_t a = seed ^ 0x6a09e667f3bcc908ull, b = seed ^ 0xbb67ae8584caa73bull;
        uint64_t c = seed ^ 0x3c6ef372fe94f82bull, d = seed ^ 0xa54ff53a5f1d36f1ull;
        for (; n >= 32; n -= 32, p += 32) {
            a = moe__hash_step(a, moe__hash_word(p));
            b = moe__hash_step(b, moe__hash_word(p + 8));
            c = moe__hash_step(c, moe__hash_word(p + 16));
            d = moe__hash_step(d, moe__hash_word(p + 24));
        }
        h = moe__hash_step(moe__hash_step(moe__hash_step(moe__hash_step(h, a), b), c), d);
    }
    for (; n >= 8; n -= 8, p += 8) h = moe__hash_step(h, moe__hash_word(p));
    if (n >= 4) { /* one float, in the machine's order as well */
        uint32_t w;
        memcpy(&w, p, sizeof w);
        h = moe__hash_step(h, w);
        n -= 4, p += 4;
    }
    for (; n; n--) h = moe__hash_step(h, *p++);
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull; /* final avalanche: SplitMix64's, Stafford's mix 13 */
    h = (h ^ h >> 27) * 0x94d049bb133111ebull;
    return h ^ h >> 31;
}

/* ==== kernels =================================================================================
 * Panels. Every operand of a product is kept as panels of 32 columns: element (r, c) of a matrix of R rows
 * stands at [c / 32][r][c % 32]. So the result of one product is the operand of the next, whether its rows or
 * its columns are summed over, and weights stream through memory in the order in which they are read.
 *
 * The code between the two banners of MOE__PASS is compiled once for each instruction set. moe__f is one native
 * vector (products); moe__v is 16 virtual lanes (all other reductions and elementwise work), so that each
 * instruction set does the same operations in the same order. */
#define MOE__W 32   /* columns of a panel */
#define MOE__KC 128 /* rows of a panel that are kept in L1 while the other operand passes */
#define MOE__TB 192 /* rows of a block that a weight gradient sums over at a time */
#define MOE__KG 1024 /* columns of a block of rows that are kept in L2 while the panels pass */
#define MOE__MB 256 /* most rows whose results wait in scratch */
#define MOE__MAX_MR 14

/* A tile of R rows: c = init (or c itself where init is NULL) + sum over k of a * b. */
typedef struct moe__tile {
    size_t k;
    const float *a; size_t a_panel; /* nn: rows 32 apart, panels a_panel apart; tn: k 32 apart */
    const float *b; size_t ldb;
    float *c; size_t ldc;
    const float *init;                          /* one row for all, or NULL */
    const float *prefetch; size_t prefetch_lines; /* 64-byte lines to prefetch for every 8 k */
} moe__tile;

typedef struct moe__adam { float lr, beta1, beta2, one_beta1, one_beta2, eps, decay, scale, fix1, fix2; } moe__adam;

typedef struct moe__kernels {
    moe_isa isa;
    size_t mr, tile; /* most rows, and columns, of a tile */
    void (*nn[MOE__MAX_MR + 1])(const moe__tile *);
    void (*tn[MOE__MAX_MR + 1])(const moe__tile *);
    void (*transpose)(const float *src, size_t ld, float *dst); /* dst[c * 32 + r] = src[r * ld + c], 32 x 32 */
    void (*exp)(size_t n, const float *x, float *y);
    void (*log)(size_t n, const float *x, float *y);
    void (*tanh)(size_t n, const float *x, float *y);
    void (*erf)(size_t n, const float *x, float *y);
    void (*softmax)(size_t n, float inv_t, const float *x, float *y);
    float (*lse)(size_t n, const float *x);
    float (*dot)(size_t n, const float *x, const float *y);
    void (*axpy)(size_t n, float a, const float *x, float *y); /* y = fma(a, x, y) */
    void (*act[MOE__EXPERT_COUNT])(size_t rows, const float *z0, const float *z1, float *h);
    /* z -> dz, h -> w h in place; part[r * part_ld] = this panel's share of <h, dh> */
    void (*act_back[MOE__EXPERT_COUNT])(size_t rows, const float *w, float *z0, float *z1, float *h, const float *dh,
                                        float *part, size_t part_ld);
    void (*adamw)(size_t n, const moe__adam *o, float *p, const float *g, float *m, float *v);
    void (*sgd)(size_t n, const moe__adam *o, float *p, const float *g, float *m);
    uint32_t (*count)(size_t n, size_t k, const float *z, float *list, float *selected, float *first);
    uint32_t (*count8)(size_t n, size_t k, const float *z, float *selected, float *first);
    void (*sum_rows)(size_t rows, size_t cols, const float *x, double *sum);
    int (*all_finite)(size_t n, const float *x);
    void (*half)(size_t n, const unsigned char *p, float *out);
    void (*bfloat)(size_t n, const unsigned char *p, float *out);
} moe__kernels;

#define MOE__ROWS_1(M) M(0)
#define MOE__ROWS_2(M) MOE__ROWS_1(M) M(1)
#define MOE__ROWS_3(M) MOE__ROWS_2(M) M(2)
#define MOE__ROWS_4(M) MOE__ROWS_3(M) M(3)
#define MOE__ROWS_5(M) MOE__ROWS_4(M) M(4)
#define MOE__ROWS_6(M) MOE__ROWS_5(M) M(5)
#define MOE__ROWS_7(M) MOE__ROWS_6(M) M(6)
#define MOE__ROWS_8(M) MOE__ROWS_7(M) M(7)
#define MOE__ROWS_9(M) MOE__ROWS_8(M) M(8)
#define MOE__ROWS_10(M) MOE__ROWS_9(M) M(9)
#define MOE__ROWS_11(M) MOE__ROWS_10(M) M(10)
#define MOE__ROWS_12(M) MOE__ROWS_11(M) M(11)
#define MOE__ROWS_13(M) MOE__ROWS_12(M) M(12)
#define MOE__ROWS_14(M) MOE__ROWS_13(M) M(13)

/* Names inside a pass get the pass's suffix. */
#define MOE__CAT_(a, b) a##b
#define MOE__CAT(a, b) MOE__CAT_(a, b)
#define MOE__S(name) MOE__CAT(name, MOE__SUFFIX)
#define moe__f MOE__S(moe__f_)
#define moe__row MOE__S(moe__row_)
#define moe__v MOE__S(moe__v_)
#define moe__m MOE__S(moe__m_)
#define moe__v_load MOE__S(moe__v_load_)
#define moe__v_store MOE__S(moe__v_store_)
#define moe__v_load_n MOE__S(moe__v_load_n_)
#define moe__v_store_n MOE__S(moe__v_store_n_)
#define moe__v_set1 MOE__S(moe__v_set1_)
#define moe__v_add MOE__S(moe__v_add_)
#define moe__v_sub MOE__S(moe__v_sub_)
#define moe__v_mul MOE__S(moe__v_mul_)
#define moe__v_div MOE__S(moe__v_div_)
#define moe__v_min MOE__S(moe__v_min_)
#define moe__v_max MOE__S(moe__v_max_)
#define moe__v_fma MOE__S(moe__v_fma_)
#define moe__v_abs MOE__S(moe__v_abs_)
#define moe__v_neg MOE__S(moe__v_neg_)
#define moe__v_sqrt MOE__S(moe__v_sqrt_)
#define moe__v_rint MOE__S(moe__v_rint_)
#define moe__v_lt MOE__S(moe__v_lt_)
#define moe__v_isnan MOE__S(moe__v_isnan_)
#define moe__v_sel MOE__S(moe__v_sel_)
#define moe__v_copysign MOE__S(moe__v_copysign_)
#define moe__v_pow2 MOE__S(moe__v_pow2_)
#define moe__v_frexp MOE__S(moe__v_frexp_)
#define moe__v_sum MOE__S(moe__v_sum_)
#define moe__v_maximum MOE__S(moe__v_maximum_)
#define moe__v_exp MOE__S(moe__v_exp_)
#define moe__v_log MOE__S(moe__v_log_)
#define moe__v_tanh MOE__S(moe__v_tanh_)
#define moe__v_erf MOE__S(moe__v_erf_)
#define moe__v_sigmoid MOE__S(moe__v_sigmoid_)

#ifndef MOE_FILENAME
#define MOE_FILENAME "moe.h"
#endif
#define MOE__PASS 1
#define MOE__SUFFIX scalar
#include MOE_FILENAME
#undef MOE__PASS
#undef MOE__SUFFIX
#ifdef MOE__X86
#define MOE__PASS 2
#define MOE__SUFFIX avx2
#include MOE_FILENAME
#undef MOE__PASS
#undef MOE__SUFFIX
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push /* gcc bug 105593: its own intrinsics start from an undefined vector */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define MOE__PASS 3
#define MOE__SUFFIX avx512
#include MOE_FILENAME
#undef MOE__PASS
#undef MOE__SUFFIX
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#ifdef MOE__NEON
#define MOE__PASS 4
#define MOE__SUFFIX neon
#include MOE_FILENAME
#undef MOE__PASS
#undef MOE__SUFFIX
#endif
#endif /* !MOE__IMPLEMENTED */

#else /* MOE__PASS: one instruction set ------------------------------------------------------- */

#if defined(__GNUC__) && MOE__PASS == 2
#define MOE__FN static __attribute__((target("avx2,fma")))
#define MOE__FI static inline __attribute__((always_inline, target("avx2,fma")))
#elif defined(__GNUC__) && MOE__PASS == 3
#define MOE__FN static __attribute__((target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#define MOE__FI static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")))
#elif defined(__GNUC__) && !defined(__clang__) && MOE__PASS == 1 /* inlined, arrays of 16 keep gcc busy for 15 s */
#define MOE__FN static
#define MOE__FI static __attribute__((noinline, unused))
#else
#define MOE__FN static
#define MOE__FI MOE__INLINE
#endif

/* Native vectors: MOE__VL lanes; a tile is MOE__MR rows by MOE__NT vectors. MOE__EACH(n, s) repeats s for the
 * constant i = 0 .. n - 1 without a loop, so that arrays of vectors stay in registers at every optimisation level. */
#if MOE__PASS == 1
typedef float moe__f;
#define MOE__VL 1
#define MOE__NT 4
#define MOE__MR 4
#define MOE__KERNEL_ROWS(M) M(1) M(2) M(3) M(4)
#define MOE__EACH_V(...) for (int i = 0; i < 16; i++) { __VA_ARGS__ }
#define MOE__EACH_T(...) for (int i = 0; i < 4; i++) { __VA_ARGS__ }
#define MOE__F_LOAD(p) (*(p))
#define MOE__F_STORE(p, a) (*(p) = (a))
#define MOE__F_SET1(x) (x)
#define MOE__F_FMA(a, b, c) fmaf(a, b, c)
#define MOE__F_ADD(a, b) ((a) + (b))
#define MOE__F_SUB(a, b) ((a) - (b))
#define MOE__F_MUL(a, b) ((a) * (b))
#define MOE__F_DIV(a, b) ((a) / (b))
#define MOE__F_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MOE__F_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MOE__F_SQRT(a) sqrtf(a)
#define MOE__F_LT(a, b) ((a) < (b))
#define MOE__F_GE(a, b, one) ((a) >= (b) ? (one) : 0.0f) /* one where a >= b, else 0 */
#define MOE__F_ISNAN(a) ((a) != (a))
#define MOE__F_SEL(m, a, b) ((m) ? (a) : (b))
#define MOE__F_AND(a, u) moe__float_of(moe__bits_of(a) & (u))
#define MOE__F_XOR(a, u) moe__float_of(moe__bits_of(a) ^ (u))
#define MOE__F_OR(a, b) moe__float_of(moe__bits_of(a) | moe__bits_of(b))
#define MOE__F_POW2(n) moe__float_of((uint32_t)((int32_t)(n) + 127) << 23)
#define MOE__F_EXPONENT(x) ((float)(int32_t)(moe__bits_of(x) >> 23))
typedef int moe__fmask_scalar;
#define MOE__FMASK moe__fmask_scalar
#elif MOE__PASS == 2
typedef __m256 moe__f;
#define MOE__VL 8
#define MOE__NT 2
#define MOE__MR 6
#define MOE__KERNEL_ROWS(M) M(1) M(2) M(3) M(4) M(5) M(6)
#define MOE__EACH_V(...) { enum { i = 0 }; __VA_ARGS__ } { enum { i = 1 }; __VA_ARGS__ }
#define MOE__EACH_T(...) MOE__EACH_V(__VA_ARGS__)
#define MOE__F_LOAD(p) _mm256_loadu_ps(p)
#define MOE__F_STORE(p, a) _mm256_storeu_ps(p, a)
#define MOE__F_SET1(x) _mm256_set1_ps(x)
#define MOE__F_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MOE__F_ADD(a, b) _mm256_add_ps(a, b)
#define MOE__F_SUB(a, b) _mm256_sub_ps(a, b)
#define MOE__F_MUL(a, b) _mm256_mul_ps(a, b)
#define MOE__F_DIV(a, b) _mm256_div_ps(a, b)
#define MOE__F_MIN(a, b) _mm256_min_ps(a, b)
#define MOE__F_MAX(a, b) _mm256_max_ps(a, b)
#define MOE__F_SQRT(a) _mm256_sqrt_ps(a)
#define MOE__F_LT(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define MOE__F_GE(a, b, one) _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), one)
#define MOE__F_ISNAN(a) _mm256_cmp_ps(a, a, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm256_blendv_ps(b, a, m)
#define MOE__F_AND(a, u) _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32((int)(u))))
#define MOE__F_XOR(a, u) _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32((int)(u))))
#define MOE__F_OR(a, b) _mm256_or_ps(a, b)
#define MOE__F_POW2(n) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define MOE__F_EXPONENT(x) _mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_castps_si256(x), 23))
#define MOE__FMASK __m256
#elif MOE__PASS == 3
typedef __m512 moe__f;
#define MOE__VL 16
#define MOE__NT 2
#define MOE__MR 14
#define MOE__KERNEL_ROWS(M) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14)
#define MOE__EACH_V(...) { enum { i = 0 }; __VA_ARGS__ }
#define MOE__EACH_T(...) { enum { i = 0 }; __VA_ARGS__ } { enum { i = 1 }; __VA_ARGS__ }
#define MOE__F_LOAD(p) _mm512_loadu_ps(p)
#define MOE__F_STORE(p, a) _mm512_storeu_ps(p, a)
#define MOE__F_SET1(x) _mm512_set1_ps(x)
#define MOE__F_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MOE__F_ADD(a, b) _mm512_add_ps(a, b)
#define MOE__F_SUB(a, b) _mm512_sub_ps(a, b)
#define MOE__F_MUL(a, b) _mm512_mul_ps(a, b)
#define MOE__F_DIV(a, b) _mm512_div_ps(a, b)
#define MOE__F_MIN(a, b) _mm512_min_ps(a, b)
#define MOE__F_MAX(a, b) _mm512_max_ps(a, b)
#define MOE__F_SQRT(a) _mm512_sqrt_ps(a)
#define MOE__F_LT(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define MOE__F_GE(a, b, one) _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), one)
#define MOE__F_ISNAN(a) _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm512_mask_blend_ps(m, b, a)
#define MOE__F_AND(a, u) _mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32((int)(u))))
#define MOE__F_XOR(a, u) _mm512_xor_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32((int)(u))))
#define MOE__F_OR(a, b) _mm512_or_ps(a, b)
#define MOE__F_POW2(n) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define MOE__F_EXPONENT(x) _mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_castps_si512(x), 23))
#define MOE__FMASK __mmask16
#else
typedef float32x4_t moe__f;
#define MOE__VL 4
#define MOE__NT 4
#define MOE__MR 6
#define MOE__KERNEL_ROWS(M) M(1) M(2) M(3) M(4) M(5) M(6)
#define MOE__EACH_V(...) \
    { enum { i = 0 }; __VA_ARGS__ } { enum { i = 1 }; __VA_ARGS__ } { enum { i = 2 }; __VA_ARGS__ } { enum { i = 3 }; __VA_ARGS__ }
#define MOE__EACH_T(...) MOE__EACH_V(__VA_ARGS__)
#define MOE__F_LOAD(p) vld1q_f32(p)
#define MOE__F_STORE(p, a) vst1q_f32(p, a)
#define MOE__F_SET1(x) vdupq_n_f32(x)
#define MOE__F_FMA(a, b, c) vfmaq_f32(c, a, b)
#define MOE__F_ADD(a, b) vaddq_f32(a, b)
#define MOE__F_SUB(a, b) vsubq_f32(a, b)
#define MOE__F_MUL(a, b) vmulq_f32(a, b)
#define MOE__F_DIV(a, b) vdivq_f32(a, b)
#define MOE__F_MIN(a, b) vbslq_f32(vcltq_f32(a, b), a, b)
#define MOE__F_MAX(a, b) vbslq_f32(vcgtq_f32(a, b), a, b)
#define MOE__F_SQRT(a) vsqrtq_f32(a)
#define MOE__F_LT(a, b) vcltq_f32(a, b)
#define MOE__F_GE(a, b, one) vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(a, b), vreinterpretq_u32_f32(one)))
#define MOE__F_ISNAN(a) vmvnq_u32(vceqq_f32(a, a))
#define MOE__F_SEL(m, a, b) vbslq_f32(m, a, b)
#define MOE__F_AND(a, u) vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(u)))
#define MOE__F_XOR(a, u) vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(u)))
#define MOE__F_OR(a, b) vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)))
#define MOE__F_POW2(n) vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23))
#define MOE__F_EXPONENT(x) vcvtq_f32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 23))
#define MOE__FMASK uint32x4_t
#endif

/* 16 virtual lanes */
typedef struct moe__v { moe__f v[16 / MOE__VL]; } moe__v;
typedef struct moe__m { MOE__FMASK v[16 / MOE__VL]; } moe__m;
MOE__FI moe__v moe__v_load(const float *p) { moe__v r; MOE__EACH_V(r.v[i] = MOE__F_LOAD(p + i * MOE__VL);) return r; }
MOE__FI void moe__v_store(float *p, moe__v a) { MOE__EACH_V(MOE__F_STORE(p + i * MOE__VL, a.v[i]);) }
MOE__FI moe__v moe__v_set1(float x) { moe__v r; MOE__EACH_V(r.v[i] = MOE__F_SET1(x);) return r; }
#define MOE__V1(name, expr) MOE__FI moe__v name(moe__v a) { moe__v r; MOE__EACH_V(r.v[i] = expr;) return r; }
#define MOE__V2(name, expr) MOE__FI moe__v name(moe__v a, moe__v b) { moe__v r; MOE__EACH_V(r.v[i] = expr;) return r; }
MOE__V2(moe__v_add, MOE__F_ADD(a.v[i], b.v[i]))
MOE__V2(moe__v_sub, MOE__F_SUB(a.v[i], b.v[i]))
MOE__V2(moe__v_mul, MOE__F_MUL(a.v[i], b.v[i]))
MOE__V2(moe__v_div, MOE__F_DIV(a.v[i], b.v[i]))
MOE__V2(moe__v_min, MOE__F_MIN(a.v[i], b.v[i]))
MOE__V2(moe__v_max, MOE__F_MAX(a.v[i], b.v[i]))
MOE__V2(moe__v_copysign, MOE__F_OR(MOE__F_AND(a.v[i], 0x7fffffffu), MOE__F_AND(b.v[i], 0x80000000u)))
MOE__V1(moe__v_abs, MOE__F_AND(a.v[i], 0x7fffffffu))
MOE__V1(moe__v_neg, MOE__F_XOR(a.v[i], 0x80000000u))
MOE__V1(moe__v_sqrt, MOE__F_SQRT(a.v[i]))
MOE__V1(moe__v_pow2, MOE__F_POW2(a.v[i]))
MOE__FI moe__v moe__v_fma(moe__v a, moe__v b, moe__v c) {
    moe__v r;
    MOE__EACH_V(r.v[i] = MOE__F_FMA(a.v[i], b.v[i], c.v[i]);)
    return r;
}
MOE__FI moe__m moe__v_lt(moe__v a, moe__v b) { moe__m r; MOE__EACH_V(r.v[i] = MOE__F_LT(a.v[i], b.v[i]);) return r; }
MOE__FI moe__m moe__v_isnan(moe__v a) { moe__m r; MOE__EACH_V(r.v[i] = MOE__F_ISNAN(a.v[i]);) return r; }
MOE__FI moe__v moe__v_sel(moe__m m, moe__v a, moe__v b) {
    moe__v r;
    MOE__EACH_V(r.v[i] = MOE__F_SEL(m.v[i], a.v[i], b.v[i]);)
    return r;
}
/* to the nearest integer, even in the middle, for |a| < 2^22: 1.5 * 2^23 leaves no room for a fraction */
MOE__FI moe__v moe__v_rint(moe__v a) {
    moe__v big = moe__v_set1(12582912.0f);
    return moe__v_sub(moe__v_add(a, big), big);
}
/* x = m 2^e, m in [sqrt(1/2), sqrt(2)): x positive and normal */
MOE__FI moe__v moe__v_frexp(moe__v x, moe__v *e) {
    moe__v m, q, half = moe__v_set1(0.5f), one = moe__v_set1(1.0f), root = moe__v_set1(1.41421354f);
    MOE__EACH_V(m.v[i] = MOE__F_OR(MOE__F_AND(x.v[i], 0x007fffffu), one.v[i]); q.v[i] = MOE__F_EXPONENT(x.v[i]);)
    q = moe__v_sub(q, moe__v_set1(127.0f)); /* m in [1, 2) */
    moe__m low = moe__v_lt(m, root);
    *e = moe__v_sel(low, q, moe__v_add(q, one));
    return moe__v_sel(low, m, moe__v_mul(m, half));
}
/* the first n lanes, the others `fill` */
MOE__FI moe__v moe__v_load_n(const float *p, size_t n, float fill) {
    float t[16];
    for (size_t i = 0; i < 16; i++) t[i] = i < n ? p[i] : fill;
    return moe__v_load(t);
}
MOE__FI void moe__v_store_n(float *p, size_t n, moe__v a) {
    float t[16];
    moe__v_store(t, a);
    for (size_t i = 0; i < n; i++) p[i] = t[i];
}
/* one fixed tree: lanes i and i + 8, then + 4, + 2, + 1 */
MOE__FI float moe__v_sum(moe__v a) {
    float t[16];
    moe__v_store(t, a);
    for (int h = 8; h; h >>= 1) for (int i = 0; i < h; i++) t[i] = t[i] + t[i + h];
    return t[0];
}
MOE__FI float moe__v_maximum(moe__v a) {
    float t[16];
    moe__v_store(t, a);
    for (int i = 1; i < 16; i++) t[0] = t[i] > t[0] ? t[i] : t[0];
    return t[0];
}

/* Elementary functions on 16 lanes: a fixed sequence of correctly rounded operations, so the same bits on every
 * instruction set. NaN in, NaN out. No product is ever the operand of a plain addition that could round otherwise if
 * a compiler fused the two. The polynomials are minimax fits of our own: each coefficient in turn is rounded to
 * float32 and the later ones are fitted again around it; the digits written give back exactly that float32.
 *
 * Largest error over every float32 of the range (one lane, against the double functions of glibc, in units of the
 * last place of the exact result; "odd" = f(-x) is -f(x) to the bit):
 *
 *     exp      0.892 at -5.8486      -86.5 <= x <= 88.72283; 0 and +inf outside; not decreasing for x >= 0
 *     log      0.923 at 0.7064       all positive normal x, not decreasing
 *     tanh     1.363 at 0.6300       all finite x, odd, at most 1, not decreasing for x >= 0
 *     erf      1.411 at 1.1511       all finite x, odd, at most 1
 *     sigmoid  1.499 at 7.8592       all x >= 0, at most 1
 *              2.402 at -4.1573      -86.5 <= x < 0; 0 below
 *
 * Where nothing is said about order, results of neighbouring x may be 1 unit out of order. */

/* e^x: 0 below -86.5, where the result would near the subnormals; +inf above 88.72283. */
MOE__FI moe__v moe__v_exp(moe__v x) {
    const moe__v zero = moe__v_set1(0.0f), one = moe__v_set1(1.0f), low = moe__v_set1(-86.5f);
    moe__v n, r, p;
    /* x = n ln 2 + r, |r| <= ln 2 / 2. Only n is clamped (NaN goes to -86.5): a NaN or infinity survives in r. */
    n = moe__v_min(moe__v_max(x, low), moe__v_set1(89.0f)); /* 89: above log(FLT_MAX), and n is still 128 */
    n = moe__v_rint(moe__v_fma(n, moe__v_set1(1.44269502f), zero)); /* 1 / ln 2; an fma, as rint may begin with + */
    r = moe__v_fma(n, moe__v_set1(-MOE__LN2_HI), x); /* exact */
    r = moe__v_fma(n, moe__v_set1(-MOE__LN2_LO), r);
    p = moe__v_set1(0.00138210435f); /* e^r, degree 6 */
    p = moe__v_fma(p, r, moe__v_set1(0.00836867467f));
    p = moe__v_fma(p, r, moe__v_set1(0.0416682623f));
    p = moe__v_fma(p, r, moe__v_set1(0.166665211f));
    p = moe__v_fma(p, r, moe__v_set1(0.49999994f));
    p = moe__v_fma(p, r, one);
    p = moe__v_fma(p, r, one);
    /* times 2^n as 2^(n-1) and a doubling: n may be 128, which 2^n cannot be */
    p = moe__v_mul(p, moe__v_pow2(moe__v_sub(n, one)));
    p = moe__v_add(p, p);
    return moe__v_sel(moe__v_lt(x, low), zero, p);
}

/* log x for positive normal x; log(inf) = inf. Below FLT_MIN (zero, subnormal, negative) it gives -inf. */
MOE__FI moe__v moe__v_log(moe__v x) {
    const moe__v infinity = moe__v_set1(INFINITY);
    moe__v e, f, tail, y;
    f = moe__v_sub(moe__v_frexp(x, &e), moe__v_set1(1.0f)); /* exact: x = (1 + f) 2^e */
    tail = moe__v_mul(moe__v_mul(f, f), MOE__LOG_TAIL(moe__v_fma, moe__v_set1, f));
    tail = moe__v_fma(e, moe__v_set1(MOE__LN2_LO), tail);
    y = moe__v_fma(e, moe__v_set1(MOE__LN2_HI), moe__v_add(f, tail));
    y = moe__v_sel(moe__v_lt(x, infinity), y, x); /* NaN and infinity as they are */
    return moe__v_sel(moe__v_lt(x, moe__v_set1(1.17549435e-38f)), moe__v_neg(infinity), y); /* FLT_MIN */
}

/* tanh x, exactly odd. */
MOE__FI moe__v moe__v_tanh(moe__v x) {
    const moe__v one = moe__v_set1(1.0f), two = moe__v_set1(2.0f);
    moe__v a = moe__v_abs(x), z = moe__v_mul(x, x), p, large;
    p = moe__v_set1(-0.00569721311f); /* (tanh x - x) / x^3 in x^2, degree 4, |x| < 0.625 */
    p = moe__v_fma(p, z, moe__v_set1(0.0206316542f));
    p = moe__v_fma(p, z, moe__v_set1(-0.0537372604f));
    p = moe__v_fma(p, z, moe__v_set1(0.133314103f));
    p = moe__v_fma(p, z, moe__v_set1(-0.333332807f));
    p = moe__v_fma(moe__v_mul(p, z), x, x); /* x itself for tiny x */
    /* otherwise 1 - 2 / (e^(2|x|) + 1), which is 1 where the exponential is infinite */
    large = moe__v_sub(one, moe__v_div(two, moe__v_add(moe__v_exp(moe__v_add(a, a)), one)));
    return moe__v_copysign(moe__v_sel(moe__v_lt(a, moe__v_set1(0.625f)), p, large), x);
}

/* The error function, exactly odd. */
MOE__FI moe__v moe__v_erf(moe__v x) {
    moe__v a = moe__v_abs(x), z = moe__v_mul(x, x), p, q, u;
    p = moe__v_set1(6.56057091e-05f); /* erf(x) / x - 1 in x^2, degree 6, |x| < 1.1875 */
    p = moe__v_fma(p, z, moe__v_set1(-0.000757347734f));
    p = moe__v_fma(p, z, moe__v_set1(0.00513259461f));
    p = moe__v_fma(p, z, moe__v_set1(-0.0268207621f));
    p = moe__v_fma(p, z, moe__v_set1(0.112826914f));
    p = moe__v_fma(p, z, moe__v_set1(-0.376125365f));
    p = moe__v_fma(p, z, moe__v_set1(0.128379151f));
    p = moe__v_fma(p, x, x);
    /* erf(|x|) around 2.6484375, where erf is almost exactly a float; at 3.9375 and beyond it gives 1. NaN stays. */
    u = moe__v_sub(moe__v_min(moe__v_set1(3.9375f), a), moe__v_set1(2.6484375f));
    q = moe__v_set1(-8.3993109e-06f); /* degree 12, 1.1875 <= |x| <= 3.9375 */
    q = moe__v_fma(q, u, moe__v_set1(5.37639244e-06f));
    q = moe__v_fma(q, u, moe__v_set1(7.93827057e-05f));
    q = moe__v_fma(q, u, moe__v_set1(-0.000170480067f));
    q = moe__v_fma(q, u, moe__v_set1(-8.81229789e-06f));
    q = moe__v_fma(q, u, moe__v_set1(0.000719842501f));
    q = moe__v_fma(q, u, moe__v_set1(-0.00212443015f));
    q = moe__v_fma(q, u, moe__v_set1(0.00389197236f));
    q = moe__v_fma(q, u, moe__v_set1(-0.00494187279f));
    q = moe__v_fma(q, u, moe__v_set1(0.00440927921f));
    q = moe__v_fma(q, u, moe__v_set1(-0.00268620462f));
    q = moe__v_fma(q, u, moe__v_set1(0.0010141934f));
    q = moe__v_fma(q, u, moe__v_set1(0.999819934f));
    return moe__v_sel(moe__v_lt(a, moe__v_set1(1.1875f)), p, moe__v_copysign(q, x));
}

/* 1 / (1 + e^-x), with e^-|x| so that nothing overflows and small results keep their relative precision. */
MOE__FI moe__v moe__v_sigmoid(moe__v x) {
    const moe__v one = moe__v_set1(1.0f);
    moe__v z = moe__v_exp(moe__v_neg(moe__v_abs(x)));
    moe__v top = moe__v_sel(moe__v_lt(x, moe__v_set1(0.0f)), z, one);
    return moe__v_div(top, moe__v_add(one, z));
}

/* -- products -- */
typedef struct moe__row { moe__f v[MOE__NT]; } moe__row;
#define MOE__ROW_LOAD(r) moe__row c##r; MOE__EACH_T(c##r.v[i] = MOE__F_LOAD(from + i * MOE__VL);) from += from_ld;
#define MOE__ROW_STORE(r) MOE__EACH_T(MOE__F_STORE(to + i * MOE__VL, c##r.v[i]);) to += t->ldc;
#define MOE__ROW_FMA(r) { moe__f x = MOE__F_SET1(a[(r) * MOE__A_ROW]); MOE__EACH_T(c##r.v[i] = MOE__F_FMA(x, w.v[i], c##r.v[i]);) }
#define MOE__ROW_STEP(R) { moe__row w; MOE__EACH_T(w.v[i] = MOE__F_LOAD(b + i * MOE__VL);) b += ldb; MOE__ROWS_##R(MOE__ROW_FMA) }

/* c (R, tile) += a b: a's rows are the rows, k runs along them, panel by panel */
#define MOE__A_ROW 32
#define MOE__NN(R)                                                                          \
    MOE__FN void MOE__S(moe__nn##R##_)(const moe__tile *t) {                    \
        const float *from = t->init ? t->init : t->c, *a = t->a, *b = t->b, *pf = t->prefetch; \
        size_t from_ld = t->init ? 0 : t->ldc, ldb = t->ldb, left = t->k;                   \
        float *to = t->c;                                                                   \
        MOE__ROWS_##R(MOE__ROW_LOAD)                                                        \
        for (; left >= 32; left -= 32, a += t->a_panel - 32) {                              \
            /* the rows' next panel, or the first of the next tile */                       \
            const float *an = left >= 64 ? a + t->a_panel : t->a + R * 32;                  \
            for (int g = 0; g < 4; g++) {                                                   \
                for (size_t l = 0; l < t->prefetch_lines; l++, pf += 16) MOE__PREFETCH_L2(pf); \
                for (int l = g * 8; l < g * 8 + 8 && l < 2 * R; l++) MOE__PREFETCH_L1(an + l * 16); \
                for (int u = 0; u < 8; u++, a++) MOE__ROW_STEP(R)                           \
            }                                                                               \
        }                                                                                   \
        for (; left; left--, a++) MOE__ROW_STEP(R)                                          \
        MOE__ROWS_##R(MOE__ROW_STORE)                                                       \
    }
MOE__KERNEL_ROWS(MOE__NN)
#undef MOE__A_ROW
/* c (R, tile) += a^T b: a's columns are the rows, k runs down them */
#define MOE__A_ROW 1
#define MOE__TN(R)                                                                          \
    MOE__FN void MOE__S(moe__tn##R##_)(const moe__tile *t) {                    \
        const float *from = t->init ? t->init : t->c, *a = t->a, *b = t->b;                 \
        size_t from_ld = t->init ? 0 : t->ldc, ldb = t->ldb;                                \
        float *to = t->c;                                                                   \
        MOE__ROWS_##R(MOE__ROW_LOAD)                                                        \
        for (size_t left = t->k; left; left--, a += 32) MOE__ROW_STEP(R)                    \
        MOE__ROWS_##R(MOE__ROW_STORE)                                                       \
    }
MOE__KERNEL_ROWS(MOE__TN)
#undef MOE__A_ROW

MOE__FN void MOE__S(moe__transpose_)(const float *src, size_t ld, float *dst) {
#if MOE__PASS == 3
    for (int r = 0; r < 32; r += 16) /* 16 rows at a time: 4 columns of them are 4 registers of 4 x 4 */
        for (int c = 0; c < 32; c += 4) {
            __m512 q[4];
            const float *s = src + (size_t)r * ld + c;
#define MOE__Q(j)                                                                                        \
    q[j] = _mm512_castps128_ps512(_mm_loadu_ps(s + (size_t)(j) * ld));                                   \
    q[j] = _mm512_insertf32x4(q[j], _mm_loadu_ps(s + (size_t)(j + 4) * ld), 1);                          \
    q[j] = _mm512_insertf32x4(q[j], _mm_loadu_ps(s + (size_t)(j + 8) * ld), 2);                          \
    q[j] = _mm512_insertf32x4(q[j], _mm_loadu_ps(s + (size_t)(j + 12) * ld), 3);
            MOE__Q(0) MOE__Q(1) MOE__Q(2) MOE__Q(3)
#undef MOE__Q
            __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(q[0], q[1])), t1 = _mm512_castps_pd(_mm512_unpacklo_ps(q[2], q[3]));
            __m512d t2 = _mm512_castps_pd(_mm512_unpackhi_ps(q[0], q[1])), t3 = _mm512_castps_pd(_mm512_unpackhi_ps(q[2], q[3]));
            float *d = dst + c * 32 + r;
            _mm512_storeu_ps(d, _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t1)));
            _mm512_storeu_ps(d + 32, _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t1)));
            _mm512_storeu_ps(d + 64, _mm512_castpd_ps(_mm512_unpacklo_pd(t2, t3)));
            _mm512_storeu_ps(d + 96, _mm512_castpd_ps(_mm512_unpackhi_pd(t2, t3)));
        }
#elif MOE__PASS == 2
    for (int r = 0; r < 32; r += 8)
        for (int c = 0; c < 32; c += 4) {
            __m256 q[4];
            const float *s = src + (size_t)r * ld + c;
#define MOE__Q(j)                                                                                        \
    q[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(s + (size_t)(j) * ld)),              \
                                _mm_loadu_ps(s + (size_t)(j + 4) * ld), 1);
            MOE__Q(0) MOE__Q(1) MOE__Q(2) MOE__Q(3)
#undef MOE__Q
            __m256d t0 = _mm256_castps_pd(_mm256_unpacklo_ps(q[0], q[1])), t1 = _mm256_castps_pd(_mm256_unpacklo_ps(q[2], q[3]));
            __m256d t2 = _mm256_castps_pd(_mm256_unpackhi_ps(q[0], q[1])), t3 = _mm256_castps_pd(_mm256_unpackhi_ps(q[2], q[3]));
            float *d = dst + c * 32 + r;
            _mm256_storeu_ps(d, _mm256_castpd_ps(_mm256_unpacklo_pd(t0, t1)));
            _mm256_storeu_ps(d + 32, _mm256_castpd_ps(_mm256_unpackhi_pd(t0, t1)));
            _mm256_storeu_ps(d + 64, _mm256_castpd_ps(_mm256_unpacklo_pd(t2, t3)));
            _mm256_storeu_ps(d + 96, _mm256_castpd_ps(_mm256_unpackhi_pd(t2, t3)));
        }
#else
    for (int r = 0; r < 32; r++)
        for (int c = 0; c < 32; c++) dst[c * 32 + r] = src[(size_t)r * ld + (size_t)c];
#endif
}

/* -- elementwise and reductions: 16 lanes, the tail padded -- */
#define MOE__MAP(name)                                                                          \
    MOE__FN void MOE__S(moe__map_##name##_)(size_t n, const float *x, float *y) {   \
        for (; n >= 16; n -= 16, x += 16, y += 16) moe__v_store(y, moe__v_##name(moe__v_load(x))); \
        if (n) moe__v_store_n(y, n, moe__v_##name(moe__v_load_n(x, n, 1.0f)));                  \
    }
MOE__MAP(exp)
MOE__MAP(log)
MOE__MAP(tanh)
MOE__MAP(erf)
#undef MOE__MAP

MOE__FN void MOE__S(moe__softmax_)(size_t n, float inv_t, const float *x, float *y) {
    moe__v scale = moe__v_set1(inv_t), top = moe__v_set1(-FLT_MAX), sum = moe__v_set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) top = moe__v_max(moe__v_load(x + i), top);
    if (i < n) top = moe__v_max(moe__v_load_n(x + i, n - i, -FLT_MAX), top);
    top = moe__v_set1(moe__v_maximum(top));
    for (i = 0; i + 16 <= n; i += 16) {
        moe__v e = moe__v_exp(moe__v_mul(moe__v_sub(moe__v_load(x + i), top), scale));
        sum = moe__v_add(sum, e);
        moe__v_store(y + i, e);
    }
    if (i < n) {
        moe__v e = moe__v_exp(moe__v_mul(moe__v_sub(moe__v_load_n(x + i, n - i, -INFINITY), top), scale));
        sum = moe__v_add(sum, e);
        moe__v_store_n(y + i, n - i, e);
    }
    moe__v total = moe__v_set1(moe__v_sum(sum));
    for (i = 0; i + 16 <= n; i += 16) moe__v_store(y + i, moe__v_div(moe__v_load(y + i), total));
    if (i < n) moe__v_store_n(y + i, n - i, moe__v_div(moe__v_load_n(y + i, n - i, 0.0f), total));
}

MOE__FN float MOE__S(moe__lse_)(size_t n, const float *x) {
    moe__v top = moe__v_set1(-FLT_MAX), sum = moe__v_set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) top = moe__v_max(moe__v_load(x + i), top);
    if (i < n) top = moe__v_max(moe__v_load_n(x + i, n - i, -FLT_MAX), top);
    float m = moe__v_maximum(top);
    top = moe__v_set1(m);
    for (i = 0; i < n; i += 16)
        sum = moe__v_add(sum, moe__v_exp(moe__v_sub(i + 16 <= n ? moe__v_load(x + i) : moe__v_load_n(x + i, n - i, -INFINITY), top)));
    float t[16];
    moe__v_store(t, moe__v_log(moe__v_set1(moe__v_sum(sum))));
    return m + t[0];
}

MOE__FN float MOE__S(moe__dot_)(size_t n, const float *x, const float *y) {
    moe__v sum = moe__v_set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) sum = moe__v_fma(moe__v_load(x + i), moe__v_load(y + i), sum);
    if (i < n) sum = moe__v_fma(moe__v_load_n(x + i, n - i, 0.0f), moe__v_load_n(y + i, n - i, 0.0f), sum);
    return moe__v_sum(sum);
}

MOE__FN void MOE__S(moe__axpy_)(size_t n, float a, const float *x, float *y) {
    moe__v s = moe__v_set1(a);
    for (; n >= 16; n -= 16, x += 16, y += 16) moe__v_store(y, moe__v_fma(s, moe__v_load(x), moe__v_load(y)));
    if (n) moe__v_store_n(y, n, moe__v_fma(s, moe__v_load_n(x, n, 0.0f), moe__v_load_n(y, n, 0.0f)));
}

/* -- activations: value and derivative together -- */
MOE__FI moe__v MOE__S(moe__relu_)(moe__v z, moe__v *slope) {
    moe__v zero = moe__v_set1(0.0f), one = moe__v_set1(1.0f);
    moe__m on = moe__v_lt(zero, z);
    *slope = moe__v_sel(on, one, zero);
    return moe__v_sel(on, z, zero);
}
MOE__FI moe__v MOE__S(moe__silu_)(moe__v z, moe__v *slope) {
    moe__v s = moe__v_sigmoid(z), a = moe__v_mul(z, s);
    *slope = moe__v_fma(a, moe__v_sub(moe__v_set1(1.0f), s), s);
    return a;
}
MOE__FI moe__v MOE__S(moe__gelu_)(moe__v z, moe__v *slope) {
    moe__v half = moe__v_set1(0.5f), u = moe__v_mul(z, moe__v_set1(0.707106781f)); /* sqrt(1/2) */
    moe__v cdf = moe__v_fma(half, moe__v_erf(u), half);
    moe__v pdf = moe__v_mul(moe__v_exp(moe__v_neg(moe__v_mul(u, u))), moe__v_set1(0.398942280f)); /* 1/sqrt(2 pi) */
    *slope = moe__v_fma(z, pdf, cdf);
    return moe__v_mul(z, cdf);
}
#define MOE__ACT(name, f)                                                                                       \
    MOE__FN void MOE__S(name##_forward_)(size_t rows, const float *z0, const float *z1, float *h) {             \
        moe__v slope;                                                                                           \
        (void)z1;                                                                                               \
        for (size_t i = 0; i < rows * 32; i += 16) moe__v_store(h + i, f(moe__v_load(z0 + i), &slope));         \
    }                                                                                                           \
    MOE__FN void MOE__S(name##_backward_)(size_t rows, const float *weight, float *z0, float *z1, float *h,     \
                                          const float *dh, float *part, size_t part_ld) {                       \
        (void)z1;                                                                                               \
        for (size_t r = 0; r < rows; r++, z0 += 32, h += 32, dh += 32) {                                        \
            moe__v w = moe__v_set1(weight ? weight[r] : 1.0f), dot = moe__v_set1(0.0f), slope;                  \
            for (int c = 0; c < 32; c += 16) {                                                                  \
                moe__v hv = moe__v_load(h + c), g = moe__v_load(dh + c);                                        \
                dot = moe__v_fma(hv, g, dot);                                                                   \
                f(moe__v_load(z0 + c), &slope);                                                                 \
                moe__v_store(z0 + c, moe__v_mul(moe__v_mul(w, g), slope));                                      \
                moe__v_store(h + c, moe__v_mul(w, hv));                                                         \
            }                                                                                                   \
            part[r * part_ld] = moe__v_sum(dot);                                                                \
        }                                                                                                       \
    }
/* Gated: a panel of z holds 16 gates, then the 16 values that they gate; two such panels make one of h. */
#define MOE__GLU(name, f)                                                                                       \
    MOE__FN void MOE__S(name##_forward_)(size_t rows, const float *z0, const float *z1, float *h) {             \
        moe__v slope;                                                                                           \
        for (size_t i = 0; i < rows * 32; i += 32) {                                                            \
            moe__v_store(h + i, moe__v_mul(f(moe__v_load(z0 + i), &slope), moe__v_load(z0 + i + 16)));          \
            moe__v_store(h + i + 16, moe__v_mul(f(moe__v_load(z1 + i), &slope), moe__v_load(z1 + i + 16)));     \
        }                                                                                                       \
    }                                                                                                           \
    MOE__FN void MOE__S(name##_backward_)(size_t rows, const float *weight, float *z0, float *z1, float *h,     \
                                          const float *dh, float *part, size_t part_ld) {                       \
        for (size_t r = 0; r < rows; r++, z0 += 32, z1 += 32, h += 32, dh += 32) {                              \
            moe__v w = moe__v_set1(weight ? weight[r] : 1.0f), dot = moe__v_set1(0.0f), slope;                  \
            for (int c = 0; c < 2; c++) {                                                                       \
                float *z = c ? z1 : z0;                                                                         \
                moe__v hv = moe__v_load(h + c * 16), g = moe__v_load(dh + c * 16), up = moe__v_load(z + 16);    \
                dot = moe__v_fma(hv, g, dot);                                                                   \
                moe__v act = f(moe__v_load(z), &slope), wg = moe__v_mul(w, g);                                  \
                moe__v_store(z, moe__v_mul(moe__v_mul(wg, up), slope));                                         \
                moe__v_store(z + 16, moe__v_mul(wg, act));                                                      \
                moe__v_store(h + c * 16, moe__v_mul(w, hv));                                                    \
            }                                                                                                   \
            part[r * part_ld] = moe__v_sum(dot);                                                                \
        }                                                                                                       \
    }
MOE__ACT(moe__relu, MOE__S(moe__relu_))
MOE__ACT(moe__gelu, MOE__S(moe__gelu_))
MOE__ACT(moe__silu, MOE__S(moe__silu_))
MOE__GLU(moe__swiglu, MOE__S(moe__silu_))
MOE__GLU(moe__geglu, MOE__S(moe__gelu_))
#undef MOE__ACT
#undef MOE__GLU

/* -- optimisers -- */
MOE__FN void MOE__S(moe__adamw_)(size_t n, const moe__adam *o, float *p, const float *g, float *m, float *v) {
    moe__v scale = moe__v_set1(o->scale), b1 = moe__v_set1(o->beta1), b2 = moe__v_set1(o->beta2), eps = moe__v_set1(o->eps);
    moe__v c1 = moe__v_set1(o->one_beta1), c2 = moe__v_set1(o->one_beta2), f1 = moe__v_set1(o->fix1), f2 = moe__v_set1(o->fix2);
    moe__v keep = moe__v_set1(o->decay), lr = moe__v_set1(-o->lr);
    for (size_t i = 0; i < n; i += 16) {
        size_t left = n - i;
        int whole = left >= 16;
        moe__v gv = moe__v_mul(scale, whole ? moe__v_load(g + i) : moe__v_load_n(g + i, left, 0.0f));
        moe__v mv = whole ? moe__v_load(m + i) : moe__v_load_n(m + i, left, 0.0f);
        moe__v vv = whole ? moe__v_load(v + i) : moe__v_load_n(v + i, left, 0.0f);
        moe__v pv = whole ? moe__v_load(p + i) : moe__v_load_n(p + i, left, 0.0f);
        mv = moe__v_fma(b1, mv, moe__v_mul(c1, gv));
        vv = moe__v_fma(b2, vv, moe__v_mul(c2, moe__v_mul(gv, gv)));
        moe__v step = moe__v_div(moe__v_mul(mv, f1), moe__v_add(moe__v_sqrt(moe__v_mul(vv, f2)), eps));
        pv = moe__v_fma(lr, step, moe__v_mul(keep, pv));
        if (whole) { moe__v_store(p + i, pv); moe__v_store(m + i, mv); moe__v_store(v + i, vv); }
        else { moe__v_store_n(p + i, left, pv); moe__v_store_n(m + i, left, mv); moe__v_store_n(v + i, left, vv); }
    }
}
MOE__FN void MOE__S(moe__sgd_)(size_t n, const moe__adam *o, float *p, const float *g, float *m) {
    moe__v scale = moe__v_set1(o->scale), mu = moe__v_set1(o->beta1), keep = moe__v_set1(o->decay), lr = moe__v_set1(-o->lr);
    for (size_t i = 0; i < n; i += 16) {
        size_t left = n - i;
        int whole = left >= 16;
        moe__v gv = moe__v_mul(scale, whole ? moe__v_load(g + i) : moe__v_load_n(g + i, left, 0.0f));
        moe__v mv = moe__v_fma(mu, whole ? moe__v_load(m + i) : moe__v_load_n(m + i, left, 0.0f), gv);
        moe__v pv = whole ? moe__v_load(p + i) : moe__v_load_n(p + i, left, 0.0f);
        pv = moe__v_fma(lr, mv, moe__v_mul(keep, pv));
        if (whole) { moe__v_store(p + i, pv); moe__v_store(m + i, mv); }
        else { moe__v_store_n(p + i, left, pv); moe__v_store_n(m + i, left, mv); }
    }
}

/* -- counting the k highest, without sorting anything -- */
/* 16 tokens, expert e in z[e * 32 + lane]. list: k + 1 vectors of scratch. Adds 1 to selected[e * 16 + lane] and first[e * 16 + lane]
 * where a lane has one k-th highest and one highest; the lanes where a tie decides come back as bits, uncounted. */
MOE__FN uint32_t MOE__S(moe__count_)(size_t n, size_t k, const float *z, float *list, float *selected, float *first) {
    const moe__v one = moe__v_set1(1.0f), zero = moe__v_set1(0.0f), none = moe__v_set1(INFINITY);
    for (size_t j = 0; j <= k; j++) moe__v_store(list + j * 16, moe__v_neg(none));
    for (size_t e = 0; e < n; e++) { /* sinks into a descending list: it keeps the k + 1 highest */
        moe__v x = moe__v_load(z + e * 32);
        for (size_t j = 0; j <= k; j++) {
            moe__v have = moe__v_load(list + j * 16);
            moe__v_store(list + j * 16, moe__v_max(have, x));
            x = moe__v_min(have, x);
        }
    }
    moe__v kth = moe__v_load(list + (k - 1) * 16), top = moe__v_load(list);
    moe__m sure_kth = moe__v_lt(moe__v_load(list + k * 16), kth), sure_top = moe__v_lt(moe__v_load(list + 16), top);
    moe__v tie = moe__v_sel(sure_kth, moe__v_sel(sure_top, zero, one), one);
    kth = moe__v_sel(sure_kth, moe__v_sel(sure_top, kth, none), none); /* what a tie decides counts nowhere */
    top = moe__v_sel(sure_kth, moe__v_sel(sure_top, top, none), none);
    for (size_t e = 0; e < n; e++) {
        moe__v x = moe__v_load(z + e * 32);
        moe__v in = moe__v_sel(moe__v_lt(x, kth), zero, one), best = moe__v_sel(moe__v_lt(x, top), zero, one);
        moe__v_store(selected + e * 16, moe__v_add(moe__v_load(selected + e * 16), in));
        moe__v_store(first + e * 16, moe__v_add(moe__v_load(first + e * 16), best));
    }
    float t[16];
    uint32_t bits = 0;
    moe__v_store(t, tie);
    for (uint32_t i = 0; i < 16; i++) bits |= (uint32_t)(t[i] > 0.0f) << i;
    return bits;
}
/* The same for k <= 8 and 32 tokens, by sorting networks: the experts come eight at a time, are sorted, and merged with the eight
 * highest so far. Bits of 32 lanes. */
#define MOE__ORDER(a, b) { moe__f high = MOE__F_MAX(a, b); b = MOE__F_MIN(a, b); a = high; }
#define MOE__ORDER4(a, b, c, d, e, f, g, h) MOE__ORDER(a, b) MOE__ORDER(c, d) MOE__ORDER(e, f) MOE__ORDER(g, h)
MOE__FN uint32_t MOE__S(moe__count8_)(size_t n, size_t k, const float *z, float *selected, float *first) {
    const moe__f one = MOE__F_SET1(1.0f), zero = MOE__F_SET1(0.0f), none = MOE__F_SET1(-INFINITY);
    moe__f all_in = zero, all_best = zero;
    float kth[32], top[32], seen[2 * MOE__VL], total = 0.0f, total_first = 0.0f;
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < 32; lane += MOE__VL, z += MOE__VL) {
        moe__f a0 = none, a1 = none, a2 = none, a3 = none, a4 = none, a5 = none, a6 = none, a7 = none; /* descending */
        float sorted[8 * MOE__VL];
        for (size_t e = 0; e < n; e += 8) {
            moe__f b0 = MOE__F_LOAD(z + e * 32), b1, b2, b3, b4, b5, b6, b7;
            b1 = e + 1 < n ? MOE__F_LOAD(z + (e + 1) * 32) : none;
            b2 = e + 2 < n ? MOE__F_LOAD(z + (e + 2) * 32) : none;
            b3 = e + 3 < n ? MOE__F_LOAD(z + (e + 3) * 32) : none;
            b4 = e + 4 < n ? MOE__F_LOAD(z + (e + 4) * 32) : none;
            b5 = e + 5 < n ? MOE__F_LOAD(z + (e + 5) * 32) : none;
            b6 = e + 6 < n ? MOE__F_LOAD(z + (e + 6) * 32) : none;
            b7 = e + 7 < n ? MOE__F_LOAD(z + (e + 7) * 32) : none;
            MOE__ORDER4(b0, b1, b2, b3, b4, b5, b6, b7) /* Batcher's odd-even merge sort */
            MOE__ORDER4(b0, b2, b1, b3, b4, b6, b5, b7)
            MOE__ORDER(b1, b2) MOE__ORDER(b5, b6)
            MOE__ORDER4(b0, b4, b1, b5, b2, b6, b3, b7)
            MOE__ORDER(b2, b4) MOE__ORDER(b3, b5)
            MOE__ORDER(b1, b2) MOE__ORDER(b3, b4) MOE__ORDER(b5, b6)
            a0 = MOE__F_MAX(a0, b7), a1 = MOE__F_MAX(a1, b6), a2 = MOE__F_MAX(a2, b5), a3 = MOE__F_MAX(a3, b4);
            a4 = MOE__F_MAX(a4, b3), a5 = MOE__F_MAX(a5, b2), a6 = MOE__F_MAX(a6, b1), a7 = MOE__F_MAX(a7, b0);
            MOE__ORDER4(a0, a4, a1, a5, a2, a6, a3, a7) /* the eight highest, as a bitonic sequence: sorted again */
            MOE__ORDER4(a0, a2, a1, a3, a4, a6, a5, a7)
            MOE__ORDER4(a0, a1, a2, a3, a4, a5, a6, a7)
        }
        MOE__F_STORE(sorted, a0); MOE__F_STORE(sorted + MOE__VL, a1);
        MOE__F_STORE(sorted + 2 * MOE__VL, a2); MOE__F_STORE(sorted + 3 * MOE__VL, a3);
        MOE__F_STORE(sorted + 4 * MOE__VL, a4); MOE__F_STORE(sorted + 5 * MOE__VL, a5);
        MOE__F_STORE(sorted + 6 * MOE__VL, a6); MOE__F_STORE(sorted + 7 * MOE__VL, a7);
        MOE__F_STORE(kth + lane, MOE__F_LOAD(sorted + (k - 1) * MOE__VL));
        MOE__F_STORE(top + lane, a0);
    }
    z -= 32;
    for (size_t e = 0; e < n; e++) {
        moe__f in = zero, best = zero;
        for (int lane = 0; lane < 32; lane += MOE__VL) {
            moe__f x = MOE__F_LOAD(z + e * 32 + lane);
            in = MOE__F_ADD(in, MOE__F_GE(x, MOE__F_LOAD(kth + lane), one));
            best = MOE__F_ADD(best, MOE__F_GE(x, MOE__F_LOAD(top + lane), one));
        }
        all_in = MOE__F_ADD(all_in, in);
        all_best = MOE__F_ADD(all_best, best);
        MOE__F_STORE(selected + e * 16, MOE__F_ADD(MOE__F_LOAD(selected + e * 16), in));
        MOE__F_STORE(first + e * 16, MOE__F_ADD(MOE__F_LOAD(first + e * 16), best));
    }
    MOE__F_STORE(seen, all_in);
    MOE__F_STORE(seen + MOE__VL, all_best);
    for (int l = 0; l < MOE__VL; l++) total += seen[l], total_first += seen[MOE__VL + l];
    if (total == 32.0f * (float)k && total_first == 32.0f) return 0;
    for (uint32_t lane = 0; lane < 32; lane += MOE__VL) { /* somewhere a tie decides: found, and taken back */
        moe__f in = zero, best = zero;
        for (size_t e = 0; e < n; e++) {
            moe__f x = MOE__F_LOAD(z + e * 32 + lane);
            in = MOE__F_ADD(in, MOE__F_GE(x, MOE__F_LOAD(kth + lane), one));
            best = MOE__F_ADD(best, MOE__F_GE(x, MOE__F_LOAD(top + lane), one));
        }
        MOE__F_STORE(seen, in);
        MOE__F_STORE(seen + MOE__VL, best);
        for (uint32_t l = 0; l < MOE__VL; l++) {
            if (!(seen[l] > (float)k || seen[MOE__VL + l] > 1.0f)) continue;
            bits |= 1u << (lane + l);
            for (size_t e = 0; e < n; e++) {
                selected[e * 16 + l] -= (float)!(z[e * 32 + lane + l] < kth[lane + l]);
                first[e * 16 + l] -= (float)!(z[e * 32 + lane + l] < top[lane + l]);
            }
        }
    }
    return bits;
}
#undef MOE__ORDER
#undef MOE__ORDER4
/* Are all numbers finite? 0 times anything else is NaN, and stays in the sum. */
MOE__FN int MOE__S(moe__all_finite_)(size_t n, const float *x) {
    moe__f a = MOE__F_SET1(0.0f), b = a, c = a, d = a, zero = a;
    float sum[MOE__VL], rest = 0.0f;
    size_t i = 0;
    for (; n - i >= 4 * MOE__VL; i += 4 * MOE__VL) {
        a = MOE__F_FMA(MOE__F_LOAD(x + i), zero, a);
        b = MOE__F_FMA(MOE__F_LOAD(x + i + MOE__VL), zero, b);
        c = MOE__F_FMA(MOE__F_LOAD(x + i + 2 * MOE__VL), zero, c);
        d = MOE__F_FMA(MOE__F_LOAD(x + i + 3 * MOE__VL), zero, d);
    }
    for (; i < n; i++) rest += x[i] * 0.0f;
    MOE__F_STORE(sum, MOE__F_ADD(MOE__F_ADD(a, b), MOE__F_ADD(c, d)));
    for (i = 0; i < MOE__VL; i++) rest += sum[i];
    return rest == 0.0f;
}
/* 16 numbers of two bytes, little-endian, of any alignment: loops that compilers turn into vectors */
MOE__FI void MOE__S(moe__half16_)(const unsigned char *p, float *out) {
    uint32_t b[16], special[16];
    float f[16];
    for (int l = 0; l < 16; l++) b[l] = (uint32_t)p[2 * l] | (uint32_t)p[2 * l + 1] << 8;
    for (int l = 0; l < 16; l++) special[l] = (b[l] & 0x8000u) << 16 | ((b[l] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    for (int l = 0; l < 16; l++) b[l] = (b[l] & 0x7fffu) << 13;
    memcpy(f, b, sizeof f);
    for (int l = 0; l < 16; l++) f[l] *= 5.192296858534828e33f; /* 2^112: exact, subnormals too */
    memcpy(b, f, sizeof b);
    for (int l = 0; l < 16; l++) b[l] |= special[l]; /* the sign; infinity and NaN have all bits of the exponent */
    memcpy(out, b, sizeof b);
}
MOE__FI void MOE__S(moe__bfloat16_)(const unsigned char *p, float *out) {
    uint32_t b[16];
    for (int l = 0; l < 16; l++) b[l] = (uint32_t)p[2 * l] << 16 | (uint32_t)p[2 * l + 1] << 24;
    memcpy(out, b, sizeof b);
}
#define MOE__WIDEN(name, sixteen)                                                      \
    MOE__FN void name(size_t n, const unsigned char *p, float *out) {                  \
        for (; n >= 16; n -= 16, p += 32, out += 16) sixteen(p, out);                  \
        unsigned char rest[32] = {0};                                                  \
        float last[16];                                                                \
        if (!n) return;                                                                \
        memcpy(rest, p, 2 * n);                                                        \
        sixteen(rest, last);                                                           \
        memcpy(out, last, n * sizeof *out);                                            \
    }
MOE__WIDEN(MOE__S(moe__half_), MOE__S(moe__half16_))
MOE__WIDEN(MOE__S(moe__bfloat_), MOE__S(moe__bfloat16_))
#undef MOE__WIDEN
/* sum[c] += row r of x, one row after the other */
MOE__FN void MOE__S(moe__sum_rows_)(size_t rows, size_t cols, const float *x, double *sum) {
    for (size_t c = 0; c < cols; c += 16) {
        if (cols - c < 16) {
            for (size_t r = 0; r < rows; r++)
                for (size_t l = c; l < cols; l++) sum[l] += (double)x[r * cols + l];
            return;
        }
        double s[16];
        for (int i = 0; i < 16; i++) s[i] = sum[c + (size_t)i];
        for (size_t r = 0; r < rows; r++)
            for (int i = 0; i < 16; i++) s[i] += (double)x[r * cols + c + (size_t)i];
        for (int i = 0; i < 16; i++) sum[c + (size_t)i] = s[i];
    }
}

#define MOE__NN_ENTRY(R) , MOE__S(moe__nn##R##_)
#define MOE__TN_ENTRY(R) , MOE__S(moe__tn##R##_)
static const moe__kernels MOE__S(moe__kernels_) = {
    (moe_isa)MOE__PASS, MOE__MR, MOE__NT * MOE__VL,
    {0 MOE__KERNEL_ROWS(MOE__NN_ENTRY)}, {0 MOE__KERNEL_ROWS(MOE__TN_ENTRY)},
    MOE__S(moe__transpose_),
    MOE__S(moe__map_exp_), MOE__S(moe__map_log_), MOE__S(moe__map_tanh_), MOE__S(moe__map_erf_),
    MOE__S(moe__softmax_), MOE__S(moe__lse_), MOE__S(moe__dot_), MOE__S(moe__axpy_),
    {0, MOE__S(moe__relu_forward_), MOE__S(moe__gelu_forward_), MOE__S(moe__silu_forward_),
     MOE__S(moe__swiglu_forward_), MOE__S(moe__geglu_forward_)},
    {0, MOE__S(moe__relu_backward_), MOE__S(moe__gelu_backward_), MOE__S(moe__silu_backward_),
     MOE__S(moe__swiglu_backward_), MOE__S(moe__geglu_backward_)},
    MOE__S(moe__adamw_), MOE__S(moe__sgd_),
    MOE__S(moe__count_), MOE__S(moe__count8_), MOE__S(moe__sum_rows_), MOE__S(moe__all_finite_), MOE__S(moe__half_),
    MOE__S(moe__bfloat_)};

#undef MOE__FN
#undef MOE__FI
#undef MOE__VL
#undef MOE__NT
#undef MOE__MR
#undef MOE__KERNEL_ROWS
#undef MOE__EACH_V
#undef MOE__EACH_T
#undef MOE__F_LOAD
#undef MOE__F_STORE
#undef MOE__F_SET1
#undef MOE__F_FMA
#undef MOE__F_ADD
#undef MOE__F_SUB
#undef MOE__F_MUL
#undef MOE__F_DIV
#undef MOE__F_MIN
#undef MOE__F_MAX
#undef MOE__F_SQRT
#undef MOE__F_LT
#undef MOE__F_GE
#undef MOE__F_ISNAN
#undef MOE__F_SEL
#undef MOE__F_AND
#undef MOE__F_XOR
#undef MOE__F_OR
#undef MOE__F_POW2
#undef MOE__F_EXPONENT
#undef MOE__FMASK
#undef MOE__V1
#undef MOE__V2
#undef MOE__ROW_LOAD
#undef MOE__ROW_STORE
#undef MOE__ROW_FMA
#undef MOE__ROW_STEP
#undef MOE__NN
#undef MOE__TN
#undef MOE__NN_ENTRY
#undef MOE__TN_ENTRY
#endif /* MOE__PASS */

#ifndef MOE__PASS
#ifndef MOE__IMPLEMENTED_2
#define MOE__IMPLEMENTED_2

/* ==== dispatch ================================================================================ */
#if defined(__GNUC__)
#define MOE__ATOMIC_LOAD(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#define MOE__ATOMIC_STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELEASE)
#else
#define MOE__ATOMIC_LOAD(p) (p)
#define MOE__ATOMIC_STORE(p, v) ((p) = (v))
#endif

static const moe__kernels *moe__active; /* the only global state */

#ifdef MOE__X86
static void moe__cpuid(uint32_t leaf, uint32_t r[4]) {
#if defined(__GNUC__)
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(0));
#else
    int t[4];
    __cpuidex(t, (int)leaf, 0);
    for (int i = 0; i < 4; i++) r[i] = (uint32_t)t[i];
#endif
}
/* What the processor has and the operating system saves (XGETBV). */
static moe_isa moe__x86_best(void) {
    uint32_t r[4], xcr;
    moe__cpuid(0, r);
    if (r[0] < 7) return MOE_ISA_SCALAR;
    moe__cpuid(1, r);
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28;
    if ((r[2] & (fma | osxsave | avx)) != (fma | osxsave | avx)) return MOE_ISA_SCALAR;
#if defined(__GNUC__)
    uint32_t hi;
    __asm__ volatile("xgetbv" : "=a"(xcr), "=d"(hi) : "c"(0));
#else
    xcr = (uint32_t)_xgetbv(0);
#endif
    moe__cpuid(7, r);
    const uint32_t avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if ((xcr & 0x6) != 0x6 || !(r[1] & avx2)) return MOE_ISA_SCALAR;
    return (xcr & 0xe6) == 0xe6 && (r[1] & avx512) == avx512 ? MOE_ISA_AVX512 : MOE_ISA_AVX2;
}
#endif

static const moe__kernels *moe__kernels_of(moe_isa isa) {
#ifdef MOE__X86
    moe_isa best = moe__x86_best();
    if (isa == MOE_ISA_AUTO) isa = best;
    if (isa == MOE_ISA_AVX512 && best == MOE_ISA_AVX512) return &moe__kernels_avx512;
    if (isa == MOE_ISA_AVX2 && best != MOE_ISA_SCALAR) return &moe__kernels_avx2;
#endif
#ifdef MOE__NEON
    if (isa == MOE_ISA_AUTO || isa == MOE_ISA_NEON) return &moe__kernels_neon;
#endif
    return isa == MOE_ISA_AUTO || isa == MOE_ISA_SCALAR ? &moe__kernels_scalar : NULL;
}

static const moe__kernels *moe__k(void) {
    const moe__kernels *k = MOE__ATOMIC_LOAD(moe__active);
    if (!k) {
        k = moe__kernels_of(MOE_ISA_AUTO);
        MOE__ATOMIC_STORE(moe__active, k);
    }
    return k;
}

MOE_API moe_status moe_force_isa(moe_isa isa) {
    const moe__kernels *k = moe__kernels_of(isa);
    if (!k) return MOE_E_ISA;
    MOE__ATOMIC_STORE(moe__active, k);
    return MOE_OK;
}
MOE_API moe_isa moe_active_isa(void) { return moe__k()->isa; }
MOE_API const char *moe_isa_name(moe_isa v) {
    static const char *const names[] = {"auto", "scalar", "avx2", "avx512", "neon"};
    return (unsigned)v < MOE__ISA_COUNT ? names[v] : NULL;
}

#define MOE__MAP_API(name, pointer)                                       \
    MOE_API moe_status moe_##name(size_t n, const float *x, float *y) {   \
        if (!n) return MOE_OK;                                            \
        if (!x) return MOE_E_NULL_X;                                      \
        if (!y) return MOE_E_NULL_Y;                                      \
        moe__k()->pointer(n, x, y);                                       \
        return MOE_OK;                                                    \
    }
MOE__MAP_API(exp, exp)
MOE__MAP_API(log, log)
MOE__MAP_API(tanh, tanh)
MOE__MAP_API(erf, erf)

/* ==== threads ================================================================================= */
MOE_API const char *moe_thread_backend(void) {
#ifdef MOE__OPENMP
    return "openmp";
#else
    return "serial";
#endif
}

MOE_API size_t moe_workers(const moe_parallel *p) {
#ifdef MOE__OPENMP
    if (!p || (!p->run && !p->n_threads)) return (size_t)omp_get_max_threads();
#endif
    return p && p->n_threads ? p->n_threads : 1;
}

MOE_API void moe_run(const moe_parallel *p, size_t n_tasks, moe_task *task, void *arg) {
    size_t workers = moe__min(moe_workers(p), n_tasks);
    if (p && p->run && workers > 1) {
        p->run(p->user, workers, n_tasks, task, arg);
        return;
    }
#ifdef MOE__OPENMP
    if (workers > 1) {
        long long n = (long long)n_tasks;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)workers)
        for (long long i = 0; i < n; i++) task(arg, (size_t)i, (size_t)omp_get_thread_num());
        return;
    }
#endif
    for (size_t i = 0; i < n_tasks; i++) task(arg, i, 0);
}

/* -- products over panels, one task's share each -- */
static const float moe__zeros[MOE__W] = {0};

/* Where a product goes: `cols` columns from c on, panel apart for every 32 (MOE__W in a row-major array), each
 * starting with the init of its column, init_panel apart likewise (0: the same for all), or with what is there. */
typedef struct moe__target { float *c; size_t ldc, panel, cols; const float *init; size_t init_panel; } moe__target;

/* One panel of columns, one chunk of k, whose rows of b stay in L1 while the rows of a pass. next: what will be read of
 * b after this chunk, or NULL. */
static void moe__sweep(const moe__kernels *kn, size_t rows, size_t k, const float *a, size_t a_panel, const float *b, float *c, size_t ldc,
                       size_t cols, const float *init, const float *next) {
    size_t tiles = moe__ceil_div(rows, kn->mr), base = rows / tiles, more = rows % tiles, halves = moe__ceil_div(cols, kn->tile);
    moe__tile t;
    t.k = k;
    t.a_panel = a_panel;
    t.ldb = MOE__W;
    t.prefetch = next;
    t.prefetch_lines = next ? moe__ceil_div(16, tiles * halves) : 0; /* next is 4 KB for every 32 k: each tile its share */
    for (size_t half = 0; half < halves; half++) {
        size_t col = half * kn->tile, left = cols - col, row = 0;
        t.b = b + col;
        t.init = init ? init + col : NULL;
        for (size_t i = 0; i < tiles; i++) {
            size_t r = base + (i < more);
            MOE_ASSERT(r && r <= kn->mr);
            float *cr = c + row * ldc + col, edge[MOE__MAX_MR * MOE__W];
            int partial = left < kn->tile; /* only in plain arrays: panels are always whole */
            t.a = a + row * MOE__W;
            t.c = partial ? edge : cr;
            t.ldc = partial ? kn->tile : ldc;
            if (partial && !init)
                for (size_t j = 0; j < r; j++)
                    for (size_t l = 0; l < kn->tile; l++) edge[j * kn->tile + l] = l < left ? cr[j * ldc + l] : 0.0f;
            kn->nn[r](&t);
            if (partial)
                for (size_t j = 0; j < r; j++) memcpy(cr + j * ldc, edge + j * kn->tile, left * sizeof(float));
            if (next) t.prefetch += t.prefetch_lines * (k / 32) * 64;
            row += r;
        }
    }
}

/* c (rows, cols) = or += a (rows, k) b (k, cols): b in panels of k * 32; after: read next, or NULL */
static void moe__product(const moe__kernels *kn, size_t rows, size_t k, const float *a, size_t a_panel, const float *b,
                         const moe__target *to, int fresh, const float *after) {
    for (size_t g0 = 0; g0 < k; g0 += MOE__KG) {
        size_t g1 = moe__min(k, g0 + MOE__KG), panels = moe__ceil_div(to->cols, MOE__W);
        for (size_t q = 0; q < panels; q++)
            for (size_t k0 = g0; k0 < g1; k0 += MOE__KC) {
                size_t kc = moe__min(MOE__KC, g1 - k0);
                const float *bk = b + (q * k + k0) * MOE__W, *next = bk + kc * MOE__W;
                if (k0 + kc == g1) next = q + 1 < panels ? b + ((q + 1) * k + g0) * MOE__W : g1 < k ? b + g1 * MOE__W : after;
                moe__sweep(kn, rows, kc, a + k0 / MOE__W * a_panel, a_panel, bk, to->c + q * to->panel, to->ldc,
                           moe__min(MOE__W, to->cols - q * MOE__W), fresh && !k0 ? to->init + q * to->init_panel : NULL, next);
            }
    }
}

/* 32 rows x 32 columns at src, of which `rows` and `cols` exist, transposed into dst; the rest is zero */
static void moe__transpose_block(const moe__kernels *kn, const float *src, size_t ld, size_t rows, size_t cols, float *dst) {
    if (rows >= MOE__W && cols >= MOE__W) {
        kn->transpose(src, ld, dst);
        return;
    }
    memset(dst, 0, MOE__W * MOE__W * sizeof(float));
    for (size_t r = 0; r < moe__min(rows, MOE__W); r++)
        for (size_t c = 0; c < moe__min(cols, MOE__W); c++) dst[c * MOE__W + r] = src[r * ld + c];
}

/* c (rows, cols) = a (rows, n) w^T: w (k, n) in panels of n; c's columns are the rows k0 .. of w */
static void moe__product_t(const moe__kernels *kn, size_t rows, size_t n, const float *a, size_t a_panel, const float *w,
                           size_t k, size_t k0, const moe__target *to) {
    MOE__ALIGN64 float b[MOE__KC * MOE__W];
    for (size_t g0 = 0; g0 < n; g0 += MOE__KG)
        for (size_t q = 0; q * MOE__W < to->cols; q++)
            for (size_t n0 = g0; n0 < moe__min(n, g0 + MOE__KG); n0 += MOE__KC) {
                size_t nc = moe__min(MOE__KC, n - n0), row = k0 + q * MOE__W;
                for (size_t j = 0; j < nc; j += MOE__W) /* (n0 + j) / 32 panels of k * 32 */
                    moe__transpose_block(kn, w + (n0 + j) * k + row * MOE__W, MOE__W, k - row, MOE__W, b + j * MOE__W);
                moe__sweep(kn, rows, nc, a + n0 / MOE__W * a_panel, a_panel, b, to->c + q * to->panel, to->ldc, MOE__W,
                           n0 ? NULL : to->init + q * to->init_panel, NULL);
            }
}

/* c (m, n) = or += a^T b, summed over t rows; a: one panel (t, 32) of which m columns are used, b: (t, n <= 32) */
static void moe__product_outer(const moe__kernels *kn, size_t t, size_t m, const float *a, const float *b, size_t ldb,
                               float *c, size_t ldc, size_t n, int fresh) {
    size_t step = moe__ceil_div(m, moe__ceil_div(m, kn->mr)); /* even tiles: 11, 11, 10 rows, not 14, 14, 4 */
    for (size_t r = 0; r < m; r += step) {
        size_t rows = moe__min(step, m - r);
        for (size_t col = 0; col < n; col += kn->tile) {
            moe__tile tile;
            float edge[MOE__MAX_MR * MOE__W];
            int partial = n - col < kn->tile;
            memset(&tile, 0, sizeof tile);
            tile.k = t;
            tile.a = a + r;
            tile.b = b + col;
            tile.ldb = ldb;
            tile.c = partial ? edge : c + r * ldc + col;
            tile.ldc = partial ? kn->tile : ldc;
            tile.init = fresh ? moe__zeros : NULL;
            if (partial && !fresh)
                for (size_t j = 0; j < rows; j++)
                    for (size_t l = 0; l < kn->tile; l++)
                        edge[j * kn->tile + l] = l < n - col ? c[(r + j) * ldc + col + l] : 0.0f;
            kn->tn[rows](&tile);
            if (partial)
                for (size_t j = 0; j < rows; j++) memcpy(c + (r + j) * ldc + col, edge + j * kn->tile, (n - col) * sizeof(float));
        }
    }
}

/* Rows [row, row + rows) and columns [col, col + cols) of a row-major matrix into part of a panel; missing columns are 0. */
static void moe__fill_panel(const float *src, size_t ld, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    src += row * ld + col;
    if (cols == MOE__W)
        for (size_t r = 0; r < rows; r++) memcpy(dst + r * MOE__W, src + r * ld, MOE__W * sizeof(float));
    else
        for (size_t r = 0; r < rows; r++, dst += MOE__W) {
            memcpy(dst, src + r * ld, cols * sizeof(float));
            memset(dst + cols, 0, (MOE__W - cols) * sizeof(float));
        }
}
/* The same of the transpose: element (r, c) of the panel is src[(col + c) * ld + row + r]. */
static void moe__fill_panel_t(const moe__kernels *kn, const float *src, size_t ld, size_t row, size_t rows, size_t col, size_t cols,
                              float *dst) {
    MOE__ALIGN64 float block[MOE__W * MOE__W];
    for (size_t r = 0; r < rows; r += MOE__W) {
        size_t nr = moe__min(MOE__W, rows - r);
        moe__transpose_block(kn, src + col * ld + row + r, ld, cols, nr, block);
        memcpy(dst + r * MOE__W, block, nr * MOE__W * sizeof(float));
    }
}

typedef struct moe__gemm {
    moe_gemm_args g;
    const moe__kernels *kn;
    size_t lda, ldb, ldc;
    size_t mb, n_mb;         /* rows of a block of a; blocks */
    size_t nb, n_nb;         /* panels of b a task; groups */
    float *b_panels;         /* plain: all of b, packed; nothing for ta */
    float *a_scratch, *b_scratch; /* a worker's share */
    size_t a_share, b_share;
} moe__gemm;

static moe_status moe__gemm_plan(moe__gemm *p, const moe_gemm_args *args, moe__arena *arena) {
    if (!args) return MOE_E_NULL_PARAMS;
    memset(p, 0, sizeof *p);
    p->g = *args;
    moe_gemm_args *g = &p->g;
    size_t total, a_row = g->ta ? g->m : g->k, b_row = g->tb ? g->k : g->n, panels = moe__ceil_div(g->n, MOE__W);
    p->lda = g->lda ? g->lda : a_row;
    p->ldb = g->ldb ? g->ldb : b_row;
    p->ldc = g->ldc ? g->ldc : g->n;
    if ((!g->a_fill && p->lda < a_row) || p->ldb < b_row || p->ldc < g->n) return MOE_E_LD;
    if (!moe__mul(p->lda, g->ta ? g->k : g->m, &total) || !moe__mul(p->ldb, g->tb ? g->n : g->k, &total) ||
        !moe__mul(p->ldc, g->m, &total) || !moe__mul(total, sizeof(float), &total))
        return MOE_E_OVERFLOW;
    p->kn = moe__k();
    size_t workers = moe_workers(g->parallel), want = workers * 4;
    if (g->ta) { /* a task: 4 panels of a by a group of panels of b */
        p->mb = moe__max(1, moe__min(4, moe__ceil_div(g->m, MOE__W) / workers)) * MOE__W;
        p->n_mb = moe__ceil_div(g->m, p->mb);
        p->nb = moe__max(1, moe__min(8, panels * p->n_mb / want));
        p->a_share = p->mb * MOE__KC;
        p->b_share = p->nb * MOE__W * MOE__KC;
    } else {
        size_t rows = moe__max(32, moe__min(MOE__MB, ((size_t)128 << 10) / moe__max(1, g->k))); /* of a: half a megabyte */
        p->mb = moe__min(rows, moe__max(g->m, 1));
        p->n_mb = moe__ceil_div(g->m, p->mb);
        p->nb = p->n_mb >= want ? moe__max(1, panels) : moe__max(1, moe__ceil_div(panels * p->n_mb, want));
        if (!moe__mul(p->mb, moe__ceil_div(g->k, MOE__W) * MOE__W, &p->a_share)) return MOE_E_OVERFLOW;
        if (!moe__mul(panels * MOE__W, g->k, &total)) return MOE_E_OVERFLOW;
        p->b_panels = (float *)moe__take(arena, total, sizeof(float));
    }
    p->n_nb = moe__ceil_div(panels, p->nb);
    p->a_scratch = moe__take_floats(arena, workers, p->a_share);
    p->b_scratch = moe__take_floats(arena, workers, p->b_share);
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

static void moe__gemm_fill_a(const moe__gemm *p, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    if (p->g.a_fill) p->g.a_fill(p->g.a_user, row, rows, col, cols, dst);
    else moe__fill_panel(p->g.a, p->lda, row, rows, col, cols, dst);
}
static void moe__gemm_fill_b(const moe__gemm *p, size_t row, size_t rows, size_t col, size_t cols, float *dst) {
    if (p->g.tb) moe__fill_panel_t(p->kn, p->g.b, p->ldb, row, rows, col, cols, dst);
    else moe__fill_panel(p->g.b, p->ldb, row, rows, col, cols, dst);
}

static void moe__gemm_pack_b(void *arg, size_t i, size_t worker) {
    const moe__gemm *p = (const moe__gemm *)arg;
    (void)worker;
    moe__gemm_fill_b(p, 0, p->g.k, i * MOE__W, moe__min(MOE__W, p->g.n - i * MOE__W), p->b_panels + i * MOE__W * p->g.k);
}

static void moe__gemm_task(void *arg, size_t i, size_t worker) {
    const moe__gemm *p = (const moe__gemm *)arg;
    const moe_gemm_args *g = &p->g;
    size_t row = i / p->n_nb * p->mb, rows = moe__min(p->mb, g->m - row);
    size_t n0 = i % p->n_nb * p->nb * MOE__W, n1 = moe__min(g->n, n0 + p->nb * MOE__W);
    float *a = p->a_scratch + worker * p->a_share;
    for (size_t r = 0, step = g->a_fill ? rows : 8; r < rows; r += step) /* plain rows are read in order, 8 at a time */
        for (size_t k = 0; k < g->k; k += MOE__W)
            moe__gemm_fill_a(p, row + r, moe__min(step, rows - r), k, moe__min(MOE__W, g->k - k), a + k * rows + r * MOE__W);
    moe__target to = {g->c + row * p->ldc + n0, p->ldc, MOE__W, n1 - n0, moe__zeros, 0};
    moe__product(p->kn, rows, g->k, a, rows * MOE__W, p->b_panels + n0 * g->k, &to, !g->accumulate, NULL);
}

static void moe__gemm_task_ta(void *arg, size_t i, size_t worker) {
    const moe__gemm *p = (const moe__gemm *)arg;
    const moe_gemm_args *g = &p->g;
    size_t row = i / p->n_nb * p->mb, rows = moe__min(p->mb, g->m - row);
    size_t n0 = i % p->n_nb * p->nb * MOE__W, n1 = moe__min(g->n, n0 + p->nb * MOE__W);
    float *a = p->a_scratch + worker * p->a_share, *b = p->b_scratch + worker * p->b_share;
    int direct = !g->tb && g->n % MOE__W == 0 && p->ldb % 1024 != 0; /* b's rows as they are, unless they alias in L1 */
    for (size_t k = 0; k < g->k; k += MOE__KC) {
        size_t kc = moe__min(MOE__KC, g->k - k);
        for (size_t m = 0; m < rows; m += MOE__W)
            moe__gemm_fill_a(p, k, kc, row + m, moe__min(MOE__W, rows - m), a + m * MOE__KC);
        for (size_t n = n0; n < n1; n += MOE__W) {
            size_t cols = moe__min(MOE__W, g->n - n), ldb = direct ? p->ldb : MOE__W;
            float *bn = b + (n - n0) * MOE__KC;
            if (!direct) moe__gemm_fill_b(p, k, kc, n, cols, bn);
            for (size_t m = 0; m < rows; m += MOE__W)
                moe__product_outer(p->kn, kc, moe__min(MOE__W, rows - m), a + m * MOE__KC, direct ? g->b + k * ldb + n : bn, ldb,
                                   g->c + (row + m) * p->ldc + n, p->ldc, cols, !k && !g->accumulate);
        }
    }
}

MOE_API moe_status moe_gemm_scratch(const moe_gemm_args *g, size_t *bytes) {
    moe__gemm p;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__gemm_plan(&p, g, &arena);
    return s ? s : moe__arena_bytes(&arena, bytes);
}

MOE_API moe_status moe_gemm(const moe_gemm_args *g) {
    moe__gemm p;
    moe__arena arena = {NULL, 0, 0};
    size_t bytes;
    moe_status s = moe__gemm_plan(&p, g, &arena);
    if (!s) s = moe__arena_bytes(&arena, &bytes);
    if (s) return s;
    if (!g->m || !g->n) return MOE_OK;
    if (g->k && !g->a && !g->a_fill) return MOE_E_NULL_A;
    if (g->k && !g->b) return MOE_E_NULL_B;
    if (!g->c) return MOE_E_NULL_C;
    if (!g->k) {
        for (size_t r = 0; r < g->m && !g->accumulate; r++) memset(g->c + r * p.ldc, 0, g->n * sizeof(float));
        return MOE_OK;
    }
#ifdef MOE_USE_CBLAS
    if (!g->a_fill && g->m <= MOE__MAX_INDEX && g->n <= MOE__MAX_INDEX && g->k <= MOE__MAX_INDEX &&
        p.lda <= MOE__MAX_INDEX && p.ldb <= MOE__MAX_INDEX && p.ldc <= MOE__MAX_INDEX) {
        cblas_sgemm(CblasRowMajor, g->ta ? CblasTrans : CblasNoTrans, g->tb ? CblasTrans : CblasNoTrans, (int)g->m, (int)g->n,
                    (int)g->k, 1.0f, g->a, (int)p.lda, g->b, (int)p.ldb, g->accumulate ? 1.0f : 0.0f, g->c, (int)p.ldc);
        return MOE_OK;
    }
#endif
    void *own = NULL, *memory = g->scratch;
    if (!memory) {
        memory = own = moe__alloc(g->alloc_context, bytes);
        if (!own) return MOE_E_NO_MEMORY;
    }
    s = moe__arena_over(&arena, memory, own ? bytes : g->scratch_bytes, bytes);
    if (!s) s = moe__gemm_plan(&p, g, &arena);
    if (!s) {
        if (g->ta) moe_run(g->parallel, p.n_mb * p.n_nb, moe__gemm_task_ta, &p);
        else {
            moe_run(g->parallel, moe__ceil_div(g->n, MOE__W), moe__gemm_pack_b, &p);
            moe_run(g->parallel, p.n_mb * p.n_nb, moe__gemm_task, &p);
        }
    }
    moe__free(g->alloc_context, own);
    return s;
}

/* ==== score ===================================================================================
 * A stage's function works on a block of tokens [t0, t1) of a batch. */
typedef struct moe__dims { /* what follows from a desc */
    size_t d, f, E, G, S;  /* G: routed and shared experts; S: slots of a token */
    size_t dp, hp, zp, ep; /* panels of d, of the hidden values, of the values before the activation, of E */
    int gated, bias;
    size_t w1, b1, w2, b2, expert; /* floats: where in an expert's block; the block's length */
    size_t ldo;                    /* row of an expert's output */
} moe__dims;

typedef struct moe__group { /* rows that one expert computes */
    size_t begin, rows;
    const uint32_t *token; /* NULL: all tokens in order */
    const float *weight;   /* NULL: 1 */
} moe__group;

typedef struct moe__tape_memory {
    moe_desc d; /* resolved */
    moe__dims dims;
    size_t max_tokens, n_rows, n_routes; /* n_routes: of the forward that is kept */
    int training, state;
    void *own; /* the allocation, if the library made it */
    float *xp;           /* (dp, T, 32): the tokens, as panels */
    float *router;       /* router as panels, either way round */
    float *dlogits, *dl; /* (T, E); the same as panels (ep, T, 32) */
    float *slot_grad;    /* (T, S) */
    unsigned char *bad;  /* a block of tokens has logits that are not finite */
    moe__group *group;   /* (G) */
    size_t *first;       /* (G + 1): first task of each group */
    float *xg;           /* each group's rows as panels (dp, rows, 32); shared experts use xp */
    float *z, *h;        /* before and after the activation, as panels */
    float *o;            /* outputs, row-major, ldo; in backward the gathered dy, then dx */
    float *part, *dweight;
} moe__tape_memory;

typedef struct moe__job {
    const moe_desc *d;
    const moe__dims *dims;
    const moe__kernels *kn;
    moe_tape *t;
    moe__tape_memory *m;
    const float *x, *router;
    const float *dweight; /* (n_routes) or NULL */
    float *drouter, *dx;
} moe__job;

#define MOE__TOKENS 64 /* a block of tokens */
#define MOE__BLOCK_BEGIN(i) ((i) * MOE__TOKENS)
#define MOE__BLOCK_END(i, n) moe__min((n), ((i) + 1) * MOE__TOKENS)

/* linear: logits = x R. Backward: dR += x^T dlogits, dx += dlogits R^T. */
static void moe__linear_prepare(const moe__job *j) {
    for (size_t p = 0; p < j->dims->ep; p++)
        moe__fill_panel(j->router, j->dims->E, 0, j->dims->d, p * MOE__W, moe__min(MOE__W, j->dims->E - p * MOE__W),
                        j->m->router + p * MOE__W * j->dims->d);
}
static void moe__linear_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E;
    moe__target to = {j->t->logits + t0 * E, E, MOE__W, E, moe__zeros, 0};
    moe__product(j->kn, t1 - t0, j->dims->d, j->m->xp + t0 * MOE__W, j->t->n_tokens * MOE__W, j->m->router, &to, 1, NULL);
}
static void moe__linear_back_router(void *arg, size_t i, size_t worker) { /* i: a panel of d */
    const moe__job *j = (const moe__job *)arg;
    size_t d = j->dims->d, E = j->dims->E, n = j->t->n_tokens;
    (void)worker;
    for (size_t t = 0; t < n; t += MOE__KC)
        for (size_t p = 0; p < j->dims->ep; p++)
            moe__product_outer(j->kn, moe__min(MOE__KC, n - t), moe__min(MOE__W, d - i * MOE__W), j->m->xp + (i * n + t) * MOE__W,
                               j->m->dl + (p * n + t) * MOE__W, MOE__W, j->drouter + i * MOE__W * E + p * MOE__W, E,
                               moe__min(MOE__W, E - p * MOE__W), 0);
}
static void moe__linear_back_x(void *arg, size_t i, size_t worker) { /* i: a block of tokens */
    const moe__job *j = (const moe__job *)arg;
    size_t d = j->dims->d, E = j->dims->E, n = j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, n);
    (void)worker;
    moe__target to = {j->dx + t0 * d, d, MOE__W, d, moe__zeros, 0};
    moe__product(j->kn, t1 - t0, E, j->m->dl + t0 * MOE__W, n * MOE__W, j->m->router, &to, 0, NULL);
}
static void moe__linear_backward(const moe__job *j) {
    const moe__dims *s = j->dims;
    size_t n = j->t->n_tokens;
    for (size_t p = 0; p < s->ep; p++)
        moe__fill_panel(j->m->dlogits, s->E, 0, n, p * MOE__W, moe__min(MOE__W, s->E - p * MOE__W), j->m->dl + p * n * MOE__W);
    if (j->drouter) moe_run(&j->d->parallel, s->dp, moe__linear_back_router, (void *)(uintptr_t)j);
    if (j->dx) {
        for (size_t p = 0; p < s->dp; p++) /* R^T (E, d) */
            moe__fill_panel_t(j->kn, j->router, s->E, 0, s->E, p * MOE__W, moe__min(MOE__W, s->d - p * MOE__W),
                              j->m->router + p * MOE__W * s->E);
        moe_run(&j->d->parallel, moe__ceil_div(n, MOE__TOKENS), moe__linear_back_x, (void *)(uintptr_t)j);
    }
}

typedef struct moe__score_row {
    const char *name;
    void (*prepare)(const moe__job *j);                      /* once a batch */
    void (*forward)(const moe__job *j, size_t t0, size_t t1); /* tape.logits */
    void (*backward)(const moe__job *j);                     /* from m->dlogits: += drouter, += dx */
} moe__score_row;
static const moe__score_row moe__scores[MOE__SCORE_COUNT] = {
    {"default", NULL, NULL, NULL},
    {"linear", moe__linear_prepare, moe__linear_forward, moe__linear_backward},
};

/* ==== gate ==================================================================================== */
static int moe__temperature_ok(float t) { return t > 0.0f && moe__finite(t) && moe__finite(1.0f / t); } /* not subnormal */

MOE_API moe_status moe_softmax(size_t rows, size_t cols, float temperature, const float *logits, float *scores) {
    size_t n;
    if (!moe__temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    if (!moe__mul(rows, cols, &n)) return MOE_E_OVERFLOW;
    if (!n) return MOE_OK;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!scores) return MOE_E_NULL_SCORES;
    const moe__kernels *kn = moe__k();
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    for (size_t r = 0; r < rows; r++) kn->softmax(cols, 1.0f / temperature, logits + r * cols, scores + r * cols);
    return MOE_OK;
}

/* dz += p * (dp - <p, dp>) / temperature */
MOE_API moe_status moe_softmax_backward(size_t rows, size_t cols, float temperature, const float *scores,
                                        const float *d_scores, float *d_logits) {
    size_t n;
    if (!moe__temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    if (!moe__mul(rows, cols, &n)) return MOE_E_OVERFLOW;
    if (!n) return MOE_OK;
    if (!scores || !d_scores) return MOE_E_NULL_SCORES;
    if (!d_logits) return MOE_E_NULL_LOGITS;
    const moe__kernels *kn = moe__k();
    float inv_t = 1.0f / temperature;
    for (size_t r = 0; r < rows; r++, scores += cols, d_scores += cols, d_logits += cols) {
        float mean = kn->dot(cols, scores, d_scores);
        for (size_t c = 0; c < cols; c++) d_logits[c] = moe__fma(inv_t * scores[c], d_scores[c] - mean, d_logits[c]);
    }
    return MOE_OK;
}

/* Weights are divided by their sum, in slot order. */
static void moe__normalize(size_t k, float *w) {
    float sum = 0.0f;
    for (size_t i = 0; i < k; i++) sum += w[i];
    for (size_t i = 0; i < k; i++) w[i] /= sum;
}
/* dw of normalised weights -> dw of the unnormalised, whose sum was `sum` */
static void moe__normalize_back(size_t k, const float *w, float sum, float *dw) {
    float mean = 0.0f;
    for (size_t i = 0; i < k; i++) mean = moe__fma(w[i], dw[i], mean);
    for (size_t i = 0; i < k; i++) dw[i] = (dw[i] - mean) / sum;
}

static void moe__softmax_weights(const moe__job *j, size_t t0, size_t t1) {
    size_t k = j->dims->S, E = j->dims->E;
    for (size_t t = t0; t < t1; t++) {
        float *w = j->t->weight + t * k;
        for (size_t i = 0; i < k; i++) w[i] = j->t->prob[t * E + (size_t)j->t->index[t * k + i]];
        if (j->d->normalize == MOE_ON) moe__normalize(k, w);
    }
}
static void moe__softmax_back(const moe__job *j, size_t t0, size_t t1) {
    size_t k = j->dims->S, E = j->dims->E;
    float inv_t = 1.0f / j->d->temperature;
    for (size_t t = t0; t < t1; t++) {
        const float *p = j->t->prob + t * E;
        const int32_t *index = j->t->index + t * k;
        float *dw = j->m->slot_grad + t * k, *dz = j->m->dlogits + t * E, mean = 0.0f, sum = 0.0f;
        if (j->d->normalize == MOE_ON) {
            for (size_t i = 0; i < k; i++) sum += p[index[i]];
            moe__normalize_back(k, j->t->weight + t * k, sum, dw);
        }
        for (size_t i = 0; i < k; i++) mean = moe__fma(p[index[i]], dw[i], mean);
        j->kn->axpy(E, -(mean * inv_t), p, dz);
        for (size_t i = 0; i < k; i++) dz[index[i]] = moe__fma(inv_t * p[index[i]], dw[i], dz[index[i]]);
    }
}

static void moe__selected_weights(const moe__job *j, size_t t0, size_t t1) {
    size_t k = j->dims->S, E = j->dims->E;
    for (size_t t = t0; t < t1; t++) {
        float *w = j->t->weight + t * k;
        for (size_t i = 0; i < k; i++) w[i] = j->t->logits[t * E + (size_t)j->t->index[t * k + i]];
        j->kn->softmax(k, 1.0f / j->d->temperature, w, w);
    }
}
static void moe__selected_back(const moe__job *j, size_t t0, size_t t1) {
    size_t k = j->dims->S, E = j->dims->E;
    float inv_t = 1.0f / j->d->temperature;
    for (size_t t = t0; t < t1; t++) {
        const float *w = j->t->weight + t * k, *dw = j->m->slot_grad + t * k;
        float mean = 0.0f;
        for (size_t i = 0; i < k; i++) mean = moe__fma(w[i], dw[i], mean);
        for (size_t i = 0; i < k; i++) {
            float *dz = j->m->dlogits + t * E + j->t->index[t * k + i];
            *dz = moe__fma(inv_t * w[i], dw[i] - mean, *dz);
        }
    }
}

typedef struct moe__gate_row {
    const char *name;
    int scores_are_prob; /* selection sees the softmax; else the logits, which order the same */
    void (*weights)(const moe__job *j, size_t t0, size_t t1);  /* of tape.index -> tape.weight */
    void (*backward)(const moe__job *j, size_t t0, size_t t1); /* m->slot_grad -> m->dlogits */
} moe__gate_row;
static const moe__gate_row moe__gates[MOE__GATE_COUNT] = {
    {"default", 0, NULL, NULL},
    {"softmax", 1, moe__softmax_weights, moe__softmax_back},
    {"softmax-selected", 0, moe__selected_weights, moe__selected_back},
};

/* ==== select ================================================================================== */
/* The k highest of n, descending, ties by index. Returns 0 at a NaN. */
static int moe__topk_row(size_t n, size_t k, const float *s, int32_t *index) {
    size_t have = 0;
    for (size_t e = 0; e < n; e++) {
        float v = s[e];
        if (v != v) return 0;
        if (have == k && !(v > s[index[k - 1]])) continue;
        size_t i = have < k ? have++ : k - 1;
        for (; i && v > s[index[i - 1]]; i--) index[i] = index[i - 1];
        index[i] = (int32_t)e;
    }
    return 1;
}

MOE_API moe_status moe_topk(size_t rows, size_t cols, size_t k, const float *scores, int32_t *index, float *value) {
    size_t n;
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (!k || k > cols) return MOE_E_TOP_K;
    if (!moe__mul(rows, cols, &n)) return MOE_E_OVERFLOW;
    if (!rows) return MOE_OK;
    if (!scores) return MOE_E_NULL_SCORES;
    if (!index) return MOE_E_NULL_INDEX;
    for (size_t r = 0; r < rows; r++, scores += cols, index += k) {
        if (!moe__topk_row(cols, k, scores, index)) return MOE_E_NAN_LOGITS;
        for (size_t i = 0; value && i < k; i++) *value++ = scores[index[i]];
    }
    return MOE_OK;
}

static void moe__select_topk(const moe__job *j, size_t t0, size_t t1) {
    size_t k = j->dims->S, E = j->dims->E;
    for (size_t t = t0; t < t1; t++) moe__topk_row(E, k, j->t->scores + t * E, j->t->index + t * k);
}

typedef struct moe__select_row {
    const char *name;
    void (*select)(const moe__job *j, size_t t0, size_t t1); /* tape.scores -> tape.index */
} moe__select_row;
static const moe__select_row moe__selects[MOE__SELECT_COUNT] = {
    {"default", NULL},
    {"top-k", moe__select_topk},
};

/* ==== routes ================================================================================== */
static moe_status moe__routes_layout(moe_routes *r, size_t n_tokens, size_t n_slots, size_t n_experts, moe__arena *a) {
    size_t n;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!n_slots) return MOE_E_TOP_K;
    if (!moe__mul(n_tokens, n_slots, &n) || n > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    memset(r, 0, sizeof *r);
    r->n_experts = n_experts;
    r->n_slots = n_slots;
    r->max_tokens = n_tokens;
    r->begin = (uint32_t *)moe__take(a, n_experts + 1, sizeof(uint32_t));
    r->load = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    r->top1 = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    r->token = (uint32_t *)moe__take(a, n, sizeof(uint32_t));
    r->weight = (float *)moe__take(a, n, sizeof(float));
    r->slot = (uint32_t *)moe__take(a, n, sizeof(uint32_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_routes_size(size_t n_tokens, size_t n_slots, size_t n_experts, size_t *bytes) {
    moe_routes r;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__routes_layout(&r, n_tokens, n_slots, n_experts, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

MOE_API moe_status moe_routes_init(moe_routes *r, size_t n_tokens, size_t n_slots, size_t n_experts, void *memory, size_t bytes) {
    size_t needed;
    moe__arena a;
    if (!r) return MOE_E_NULL_ROUTES;
    moe_status s = moe_routes_size(n_tokens, n_slots, n_experts, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    if (!s) s = moe__routes_layout(r, n_tokens, n_slots, n_experts, &a);
    return s ? s : moe_routes_fill(r, 0, NULL, NULL, 0, MOE_ORDER_DEFAULT);
}

/* Whether the pair (t, i) goes before (u, l) at an expert's door. */
static int moe__earlier(const float *weight, size_t k, moe_order_kind order, size_t t, size_t i, size_t u, size_t l) {
    if (order == MOE_ORDER_CHOICE && i != l) return i < l;
    if (order == MOE_ORDER_WEIGHT && weight) {
        float a = weight[t * k + i], b = weight[u * k + l];
        if (a > b || a < b) return a > b;
    }
    return t < u;
}

/* A heap of pair numbers (t * k + i) whose root comes last in the order. */
static void moe__heap_down(uint32_t *heap, size_t n, size_t at, const float *weight, size_t k, moe_order_kind order) {
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= n) return;
        if (child + 1 < n && moe__earlier(weight, k, order, heap[child] / k, heap[child] % k, heap[child + 1] / k, heap[child + 1] % k))
            child++;
        if (!moe__earlier(weight, k, order, heap[at] / k, heap[at] % k, heap[child] / k, heap[child] % k)) return;
        uint32_t tmp = heap[at];
        heap[at] = heap[child];
        heap[child] = tmp;
        at = child;
    }
}

MOE_API moe_status moe_routes_fill(moe_routes *r, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order) {
    if (!r || !r->begin) return MOE_E_NULL_ROUTES;
    size_t E = r->n_experts, k = r->n_slots, pairs = n_tokens * k;
    r->n_tokens = r->n_routes = r->n_dropped = 0;
    if (n_tokens > r->max_tokens) return MOE_E_N_TOKENS;
    if ((unsigned)order >= MOE__ORDER_COUNT) return MOE_E_CAPACITY_ORDER;
    if (pairs && !index) return MOE_E_NULL_INDEX;
    memset(r->load, 0, E * sizeof(uint64_t));
    memset(r->top1, 0, E * sizeof(uint64_t));
    memset(r->begin, 0, (E + 1) * sizeof(uint32_t));
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        if ((size_t)index[p] >= E) return MOE_E_INDEX;
        for (size_t q = p - p % k; q < p; q++)
            if (index[q] == index[p]) return MOE_E_INDEX_TWICE;
        if (weight && !moe__finite(weight[p])) return MOE_E_NAN_WEIGHT;
    }
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        r->load[index[p]]++;
        if (p % k == 0) r->top1[index[p]]++;
    }
    /* counting sort of the pairs by expert, in token order */
    size_t total = 0;
    for (size_t e = 0; e < E; e++) {
        r->begin[e] = (uint32_t)total;
        total += (size_t)r->load[e];
    }
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] >= 0) r->token[r->begin[index[p]]++] = (uint32_t)p;
        r->slot[p] = MOE_NONE;
    }
    for (size_t e = E; e > 0; e--) r->begin[e] = r->begin[e - 1]; /* ends -> begins */
    r->begin[0] = 0;
    /* who stays is marked in slot */
    for (size_t e = 0; e < E; e++) {
        uint32_t *list = r->token + r->begin[e];
        size_t n = r->begin[e + 1] - r->begin[e], kept = capacity && capacity < n ? capacity : n;
        if (kept < n && order > MOE_ORDER_TOKEN) { /* a heap of the `kept` earliest so far; its root is the latest of them */
            for (size_t i = kept / 2; i-- > 0;) moe__heap_down(list, kept, i, weight, k, order);
            for (size_t i = kept; i < n; i++)
                if (moe__earlier(weight, k, order, list[i] / k, list[i] % k, list[0] / k, list[0] % k)) {
                    list[0] = list[i];
                    moe__heap_down(list, kept, 0, weight, k, order);
                }
        }
        for (size_t i = 0; i < kept; i++) r->slot[list[i]] = 0;
        r->n_dropped += n - kept;
    }
    /* again in token order, those that stay */
    memset(r->begin, 0, (E + 1) * sizeof(uint32_t));
    for (size_t p = 0; p < pairs; p++)
        if (r->slot[p] != MOE_NONE) r->begin[index[p] + 1]++;
    for (size_t e = 0; e < E; e++) r->begin[e + 1] += r->begin[e];
    for (size_t p = 0; p < pairs; p++) {
        if (r->slot[p] == MOE_NONE) continue;
        uint32_t route = r->begin[index[p]]++;
        r->slot[p] = route;
        r->token[route] = (uint32_t)(p / k);
        r->weight[route] = weight ? weight[p] : 1.0f / (float)k;
    }
    for (size_t e = E; e > 0; e--) r->begin[e] = r->begin[e - 1];
    r->begin[0] = 0;
    MOE_ASSERT(r->begin[E] + r->n_dropped <= pairs);
    r->n_tokens = n_tokens;
    r->n_routes = r->begin[E];
    return MOE_OK;
}

/* ==== experts ================================================================================= */
static int moe__expert_gated(moe_expert_kind e) { return e == MOE_EXPERT_SWIGLU || e == MOE_EXPERT_GEGLU; }

/* d is resolved */
static moe_status moe__dims_of(const moe_desc *d, moe__dims *s) {
    memset(s, 0, sizeof *s);
    s->d = d->d_model;
    s->f = d->d_ff;
    s->E = d->n_experts;
    s->S = d->top_k;
    s->gated = moe__expert_gated(d->expert);
    s->bias = d->bias == MOE_ON;
    s->dp = moe__ceil_div(s->d, MOE__W);
    s->hp = moe__ceil_div(s->f, MOE__W);
    s->zp = s->gated ? 2 * s->hp : s->hp;
    s->ep = moe__ceil_div(s->E, MOE__W);
    size_t n, limit = SIZE_MAX / 64; /* floats, with room for a few more factors below */
    if (s->d > limit / 64 || s->f > limit / 64 || !moe__add_size(s->E, d->n_shared, &s->G) || s->G > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    if (!moe__mul(s->zp * MOE__W, s->d, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->b1 = n;
    s->w2 = s->b1 + (s->bias ? s->zp * MOE__W : 0);
    if (!moe__mul(s->dp * MOE__W, s->f, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->b2 = s->w2 + n;
    s->expert = s->b2 + (s->bias ? s->dp * MOE__W : 0);
    if (!moe__mul(s->expert, s->G, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    if (!moe__mul(s->E, s->d, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->ldo = s->dp * MOE__W + 16; /* not a power of two: rows must not alias in L1 */
    return MOE_OK;
}

/* Rows of a group are worked on in blocks that fit in L2; a task is one block and some panels of the result. */
typedef struct moe__phase { size_t units, chunk, chunks, most; } moe__phase;
static size_t moe__blocks(size_t rows, size_t most) { return rows ? moe__ceil_div(rows, most) : 0; }
static size_t moe__phase_plan(const moe__job *j, moe__phase *p, size_t units, size_t most, size_t cap) {
    size_t total = 0, workers = moe_workers(&j->d->parallel), blocks = 0;
    for (size_t g = 0; g < j->dims->G; g++) blocks += moe__blocks(j->m->group[g].rows, most);
    p->units = units;
    p->most = most;
    p->chunk = workers > 1 ? moe__max(1, moe__min(units, blocks * units / (workers * 16))) : units;
    if (cap) p->chunk = moe__min(p->chunk, cap);
    p->chunks = moe__ceil_div(units, p->chunk);
    for (size_t g = 0; g < j->dims->G; g++) {
        j->m->first[g] = total;
        total += moe__blocks(j->m->group[g].rows, most) * p->chunks;
    }
    j->m->first[j->dims->G] = total;
    return total;
}
typedef struct moe__share { const moe__group *group; size_t g, r0, rows, u0, u1; } moe__share;
static moe__share moe__phase_share(const moe__job *j, const moe__phase *p, size_t i) {
    moe__share s;
    size_t lo = 0, hi = j->dims->G; /* the last group whose first task is <= i and that has any */
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (j->m->first[mid] <= i) lo = mid;
        else hi = mid;
    }
    s.g = lo;
    s.group = &j->m->group[lo];
    i -= j->m->first[lo];
    size_t blocks = moe__blocks(s.group->rows, p->most), b = i / p->chunks, base = s.group->rows / blocks, more = s.group->rows % blocks;
    s.r0 = b * base + moe__min(b, more);
    s.rows = base + (b < more);
    s.u0 = i % p->chunks * p->chunk;
    s.u1 = moe__min(p->units, s.u0 + p->chunk);
    return s;
}

typedef struct moe__pass { /* a forward or backward over the experts */
    moe__job j;
    moe__phase phase;
    const float *params, *dy;
    float *dparams, *y, *dx, *dweight;
    int fresh;
} moe__pass;

/* Rows of k columns that fill a megabyte of L2. */
static size_t moe__block_rows(size_t k) { return moe__max(64, ((size_t)256 << 10) / moe__max(k, 1)); }

/* The group's tokens as panels: gathered, or all tokens as they are. */
static const float *moe__group_x(const moe__pass *p, const moe__group *g, size_t *stride) {
    *stride = (g->token ? g->rows : p->j.t->n_tokens) * MOE__W;
    return g->token ? p->j.m->xg + g->begin * p->j.dims->dp * MOE__W : p->j.m->xp;
}

static void moe__task_gather(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    if (!g->token) return;
    for (size_t u = 0; u < p->j.dims->dp; u++) {
        const float *from = p->j.m->xp + u * p->j.t->n_tokens * MOE__W;
        float *to = p->j.m->xg + (g->begin * p->j.dims->dp + u * g->rows + s.r0) * MOE__W;
        for (size_t r = 0; r < s.rows; r++)
            memcpy(to + r * MOE__W, from + g->token[s.r0 + r] * (size_t)MOE__W, MOE__W * sizeof(float));
    }
}

static void moe__task_up(void *arg, size_t i, size_t worker) { /* z = x W1 + b1, h = act(z) */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__tape_memory *m = p->j.m;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    const float *w = p->params + s.g * d->expert;
    size_t stride, panels = d->gated ? 2 : 1;
    const float *x = moe__group_x(p, g, &stride) + s.r0 * MOE__W;
    MOE__ALIGN64 float scratch[2 * MOE__MB * MOE__W];
    (void)worker;
    for (size_t u = s.u0; u < s.u1; u++)
        for (size_t r = 0; r < s.rows; r += MOE__MB) {
            size_t rows = moe__min(MOE__MB, s.rows - r);
            moe__target z = {scratch, MOE__W, MOE__MB * MOE__W, panels * MOE__W, moe__zeros, 0};
            if (m->training) {
                z.c = m->z + (g->begin * d->zp + u * panels * g->rows + s.r0 + r) * MOE__W;
                z.panel = g->rows * MOE__W;
            }
            if (d->bias) {
                z.init = w + d->b1 + u * panels * MOE__W;
                z.init_panel = MOE__W;
            }
            moe__product(p->j.kn, rows, d->d, x + r * MOE__W, stride, w + u * panels * MOE__W * d->d, &z, 1,
                         w + (u + 1) * panels * MOE__W * d->d);
            p->j.kn->act[p->j.d->expert](rows, z.c, z.c + z.panel, m->h + (g->begin * d->hp + u * g->rows + s.r0 + r) * MOE__W);
        }
}

static void moe__task_down(void *arg, size_t i, size_t worker) { /* o = h W2 + b2 */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    const float *w = p->params + s.g * d->expert, *h = p->j.m->h + (g->begin * d->hp + s.r0) * MOE__W;
    (void)worker;
    moe__target o = {p->j.m->o + (g->begin + s.r0) * d->ldo + s.u0 * MOE__W, d->ldo, MOE__W, (s.u1 - s.u0) * MOE__W, moe__zeros, 0};
    if (d->bias) {
        o.init = w + d->b2 + s.u0 * MOE__W;
        o.init_panel = MOE__W;
    }
    moe__product(p->j.kn, s.rows, d->f, h, g->rows * MOE__W, w + d->w2 + s.u0 * MOE__W * d->f, &o, 1, w + d->w2 + s.u1 * MOE__W * d->f);
}

/* ==== combine ================================================================================= */
/* y_t = shared experts' outputs, then w o of its routes in slot order: one chain. For the backward pass w is inside. */
static void moe__combine_block(const moe__pass *p, size_t i, float *y, int weighted) {
    const moe__job *j = &p->j;
    const moe__dims *d = j->dims;
    const moe_routes *r = &j->t->routes;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        float *row = y + t * d->d;
        for (size_t g = d->E; g < d->G; g++) j->kn->axpy(d->d, 1.0f, j->m->o + (j->m->group[g].begin + t) * d->ldo, row);
        for (size_t s = 0; s < d->S; s++) {
            uint32_t route = r->slot[t * d->S + s];
            if (route != MOE_NONE) j->kn->axpy(d->d, weighted ? r->weight[route] : 1.0f, j->m->o + route * d->ldo, row);
        }
    }
}
static void moe__task_combine(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, p->j.t->n_tokens);
    (void)worker;
    memset(p->y + t0 * p->j.dims->d, 0, (t1 - t0) * p->j.dims->d * sizeof(float));
    moe__combine_block(p, i, p->y, 1);
}
static void moe__task_combine_dx(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    (void)worker;
    moe__combine_block(p, i, p->dx, 0);
}

/* -- the experts' backward pass -- */
static void moe__task_gather_dy(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    for (size_t u = 0; u < d->dp; u++) {
        float *to = p->j.m->o + (g->begin * d->dp + u * g->rows + s.r0) * MOE__W;
        for (size_t r = 0; r < s.rows; r++, to += MOE__W)
            moe__fill_panel(p->dy, d->d, g->token ? g->token[s.r0 + r] : s.r0 + r, 1, u * MOE__W, moe__min(MOE__W, d->d - u * MOE__W), to);
    }
}

static void moe__task_down_back(void *arg, size_t i, size_t worker) { /* dh = dy W2^T; z -> dz, h -> w h */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__tape_memory *m = p->j.m;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    const float *w = p->params + s.g * d->expert, *dy = m->o + (g->begin * d->dp + s.r0) * MOE__W;
    size_t panels = d->gated ? 2 : 1;
    MOE__ALIGN64 float dh[MOE__MB * MOE__W];
    moe__target to = {dh, MOE__W, MOE__W, MOE__W, moe__zeros, 0};
    (void)worker;
    for (size_t u = s.u0; u < s.u1; u++)
        for (size_t r = 0; r < s.rows; r += MOE__MB) {
            size_t rows = moe__min(MOE__MB, s.rows - r), row = s.r0 + r;
            float *z = m->z + (g->begin * d->zp + u * panels * g->rows + row) * MOE__W;
            moe__product_t(p->j.kn, rows, d->d, dy + r * MOE__W, g->rows * MOE__W, w + d->w2, d->f, u * MOE__W, &to);
            p->j.kn->act_back[p->j.d->expert](rows, g->weight ? g->weight + row : NULL, z, z + g->rows * MOE__W,
                                              m->h + (g->begin * d->hp + u * g->rows + row) * MOE__W, dh,
                                              m->part + (g->begin + row) * d->hp + u, d->hp);
        }
}

/* dw_r = <dy, o_r> = <h W2, dy> + <b2, dy>: the panels' shares in order */
static void moe__task_dweight(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    (void)worker;
    if (!s.group->token) return;
    for (size_t r = s.group->begin + s.r0; r < s.group->begin + s.r0 + s.rows; r++) {
        float sum = 0.0f;
        for (size_t u = 0; u < d->hp; u++) sum += p->j.m->part[r * d->hp + u];
        if (d->bias)
            sum += p->j.kn->dot(d->d, p->params + s.g * d->expert + d->b2, p->dy + p->j.t->routes.token[r] * d->d);
        p->dweight[r] = sum;
    }
}

/* dw (m, n panels) = or += a^T b over the rows of a group, for panels u0 .. u1 of a */
static void moe__outer(const moe__pass *p, size_t rows, const float *a, size_t a_panel, size_t m, const float *b, size_t n_panels,
                       float *dw, size_t u0, size_t u1) {
    for (size_t t = 0; t < rows; t += MOE__TB)
        for (size_t n = 0; n < n_panels; n++)
            for (size_t u = u0; u < u1; u++)
                moe__product_outer(p->j.kn, moe__min(MOE__TB, rows - t), moe__min(MOE__W, m - u * MOE__W), a + u * a_panel + t * MOE__W,
                                   b + (n * rows + t) * MOE__W, MOE__W, dw + (n * m + u * MOE__W) * MOE__W, MOE__W, MOE__W,
                                   p->fresh && !t);
}
static void moe__task_dw2(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    moe__outer(p, g->rows, p->j.m->h + g->begin * d->hp * MOE__W, g->rows * MOE__W, d->f, p->j.m->o + g->begin * d->dp * MOE__W, d->dp,
               p->dparams + s.g * d->expert + d->w2, s.u0, s.u1);
}
static void moe__task_dw1(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    size_t stride;
    const float *x = moe__group_x(p, g, &stride);
    (void)worker;
    moe__outer(p, g->rows, x, stride, d->d, p->j.m->z + g->begin * d->zp * MOE__W, d->zp, p->dparams + s.g * d->expert, s.u0, s.u1);
}
static void moe__task_dx(void *arg, size_t i, size_t worker) { /* o = dz W1^T */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    moe__target o = {p->j.m->o + (g->begin + s.r0) * d->ldo + s.u0 * MOE__W, d->ldo, MOE__W, (s.u1 - s.u0) * MOE__W, moe__zeros, 0};
    moe__product_t(p->j.kn, s.rows, d->zp * MOE__W, p->j.m->z + (g->begin * d->zp + s.r0) * MOE__W, g->rows * MOE__W,
                   p->params + s.g * d->expert, d->d, s.u0 * MOE__W, &o);
}
/* Gradients of an expert's biases; all of them where no token came and the gradient is fresh. */
static void moe__task_rest(void *arg, size_t g, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    const moe__group *gr = &p->j.m->group[g];
    float *dw = p->dparams + g * d->expert;
    (void)worker;
    if (p->fresh && !gr->rows) memset(dw, 0, d->expert * sizeof(float));
    if (!d->bias) return;
    if (p->fresh) {
        memset(dw + d->b1, 0, (d->w2 - d->b1) * sizeof(float));
        memset(dw + d->b2, 0, (d->expert - d->b2) * sizeof(float));
    }
    for (size_t u = 0; u < d->zp; u++)
        for (size_t r = 0; r < gr->rows; r++)
            p->j.kn->axpy(MOE__W, 1.0f, p->j.m->z + (gr->begin * d->zp + u * gr->rows + r) * MOE__W, dw + d->b1 + u * MOE__W);
    for (size_t u = 0; u < d->dp; u++)
        for (size_t r = 0; r < gr->rows; r++)
            p->j.kn->axpy(MOE__W, gr->weight ? gr->weight[r] : 1.0f, p->j.m->o + (gr->begin * d->dp + u * gr->rows + r) * MOE__W,
                          dw + d->b2 + u * MOE__W);
}

static void moe__phase_run(moe__pass *p, size_t units, size_t most, size_t cap, moe_task *task) {
    size_t n = moe__phase_plan(&p->j, &p->phase, units, most, cap);
    moe_run(&p->j.d->parallel, n, task, p);
}

static void moe__experts_forward(moe__pass *p) {
    const moe__dims *d = p->j.dims;
    moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_gather);
    moe__phase_run(p, d->hp, moe__block_rows(d->d), 0, moe__task_up);
    moe__phase_run(p, d->dp, moe__block_rows(moe__min(d->f, MOE__KG)), 0, moe__task_down);
    moe_run(&p->j.d->parallel, moe__ceil_div(p->j.t->n_tokens, MOE__TOKENS), moe__task_combine, p);
}

static void moe__experts_backward(moe__pass *p) {
    const moe__dims *d = p->j.dims;
    moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_gather_dy);
    moe__phase_run(p, d->hp, moe__block_rows(d->d), 0, moe__task_down_back);
    if (p->dweight) moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_dweight);
    if (p->fresh || d->bias) moe_run(&p->j.d->parallel, d->G, moe__task_rest, p);
    moe__phase_run(p, d->hp, SIZE_MAX, 8, moe__task_dw2);
    moe__phase_run(p, d->dp, SIZE_MAX, 8, moe__task_dw1);
    if (p->dx) {
        moe__phase_run(p, d->dp, moe__block_rows(moe__min(d->zp * MOE__W, MOE__KG)), 0, moe__task_dx);
        moe_run(&p->j.d->parallel, moe__ceil_div(p->j.t->n_tokens, MOE__TOKENS), moe__task_combine_dx, p);
    }
}

/* ==== losses ================================================================================== */
/* E * sum_e f_e P_e, f_e = load_e / sum of loads, P = mean p, as in GShard and Switch [C]. f is constant in the
 * gradient: dL/dz = (p / (T temperature)) (c - <c, p>), c = E f [D]. */
MOE_API moe_status moe_loss_switch(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                   const uint64_t *load, float coefficient, double *value, float *d_logits) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!moe__temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    size_t n;
    if (!moe__mul(n_tokens, n_experts, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    if (!n_tokens) return MOE_OK;
    if (!prob) return MOE_E_NULL_PROB;
    if (!load) return MOE_E_NULL_LOAD;
    uint64_t total = 0;
    double sum = 0.0;
    for (size_t e = 0; e < n_experts; e++) total += load[e];
    if (!total) return MOE_OK;
    if (value) {
        for (size_t e = 0; e < n_experts; e++) {
            double P = 0.0;
            for (size_t t = 0; t < n_tokens; t++) P += (double)prob[t * n_experts + e];
            sum += P * (double)load[e];
        }
        *value = sum * (double)n_experts / ((double)total * (double)n_tokens);
    }
    if (!d_logits) return MOE_OK;
    const moe__kernels *kn = moe__k();
    float s = coefficient / (temperature * (float)n_tokens), scale = (float)((double)n_experts / (double)total);
    for (size_t t = 0; t < n_tokens; t++, prob += n_experts, d_logits += n_experts) {
        float mean = 0.0f; /* <c, p>, c_e = E f_e: in blocks of the panel's width, so that no array of E is needed */
        for (size_t e = 0; e < n_experts; e += MOE__W) {
            float c[MOE__W];
            size_t cols = moe__min(MOE__W, n_experts - e);
            for (size_t i = 0; i < cols; i++) c[i] = (float)load[e + i] * scale;
            mean += kn->dot(cols, c, prob + e);
        }
        for (size_t e = 0; e < n_experts; e++)
            d_logits[e] = moe__fma(s * prob[e], moe__fma((float)load[e], scale, -mean), d_logits[e]);
    }
    return MOE_OK;
}

/* mean_t (logsumexp z_t)^2, as in ST-MoE [C]. */
MOE_API moe_status moe_loss_z(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                              double *value, float *d_logits) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    size_t n;
    if (!moe__mul(n_tokens, n_experts, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    if (!n_tokens) return MOE_OK;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    const moe__kernels *kn = moe__k();
    double sum = 0.0;
    float s = 2.0f * coefficient / (float)n_tokens;
    for (size_t t = 0; t < n_tokens; t++) {
        const float *z = logits + t * n_experts;
        float lse = kn->lse(n_experts, z);
        sum += (double)lse * (double)lse;
        if (!d_logits) continue;
        for (size_t e = 0; e < n_experts; e += MOE__W) { /* p = exp(z - lse) */
            float p[MOE__W], *dz = d_logits + t * n_experts + e;
            size_t cols = moe__min(MOE__W, n_experts - e);
            for (size_t i = 0; i < cols; i++) p[i] = z[e + i] - lse;
            kn->exp(cols, p, p);
            for (size_t i = 0; i < cols; i++) dz[i] = moe__fma(s * lse, p[i], dz[i]);
        }
    }
    if (value) *value = sum / (double)n_tokens;
    return MOE_OK;
}

typedef struct moe__loss_row {
    const char *name;
    moe_status (*add)(const moe__job *j, const uint64_t *load, float coefficient, double *value); /* += m->dlogits */
} moe__loss_row;
static moe_status moe__add_switch(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    return moe_loss_switch(j->t->n_tokens, j->dims->E, j->d->temperature, j->t->prob, load, coefficient, value, j->m->dlogits);
}
static moe_status moe__add_z(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    (void)load;
    return moe_loss_z(j->t->n_tokens, j->dims->E, j->t->logits, coefficient, value, j->m->dlogits);
}
static const moe__loss_row moe__losses[MOE_LOSS_COUNT] = {
    {"switch", moe__add_switch},
    {"z", moe__add_z},
};

#define MOE__NAME_API(kind, table, count) \
    MOE_API const char *moe_##kind##_name(moe_##kind##_kind v) { return (unsigned)v < count ? table[v].name : NULL; }
MOE__NAME_API(score, moe__scores, MOE__SCORE_COUNT)
MOE__NAME_API(gate, moe__gates, MOE__GATE_COUNT)
MOE__NAME_API(select, moe__selects, MOE__SELECT_COUNT)
MOE__NAME_API(loss, moe__losses, MOE_LOSS_COUNT)
static const struct { const char *name; } moe__experts_table[] = {{"default"}, {"relu"}, {"gelu"}, {"silu"}, {"swiglu"}, {"geglu"}};
static const struct { const char *name; } moe__orders[] = {{"default"}, {"token"}, {"choice"}, {"weight"}};
static const struct { const char *name; } moe__optimizers[] = {{"default"}, {"adamw"}, {"sgd"}};
MOE__NAME_API(expert, moe__experts_table, MOE__EXPERT_COUNT)
MOE__NAME_API(order, moe__orders, MOE__ORDER_COUNT)
MOE__NAME_API(optimizer, moe__optimizers, MOE__OPTIMIZER_COUNT)

/* ==== optimiser =============================================================================== */
static float moe__value(float v, float unset) { return v == 0.0f ? unset : v == (float)MOE_OFF ? 0.0f : v; }
static float moe__power(float base, uint64_t e) { /* in double, by squaring: the same everywhere */
    double r = 1.0, b = (double)base;
    for (; e; e >>= 1, b = b * b)
        if (e & 1) r = r * b;
    return (float)r;
}

#define MOE__SPAN 16384 /* floats of a task */
typedef struct moe__step_job {
    const moe__kernels *kn;
    moe__adam a;
    moe_optimizer_kind kind;
    size_t n;
    float *p, *m, *v;
    const float *g;
} moe__step_job;
static void moe__task_step(void *arg, size_t i, size_t worker) {
    const moe__step_job *j = (const moe__step_job *)arg;
    size_t at = i * MOE__SPAN, n = moe__min(MOE__SPAN, j->n - at);
    (void)worker;
    if (j->kind == MOE_OPTIMIZER_SGD) j->kn->sgd(n, &j->a, j->p + at, j->g + at, j->m + at);
    else j->kn->adamw(n, &j->a, j->p + at, j->g + at, j->m + at, j->v + at);
}

/* AdamW: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),
 * as in Loshchilov and Hutter [K]. */
MOE_API moe_status moe_optimizer_step(const moe_optimizer_args *o, size_t n, float *params, const float *grads, float *m, float *v) {
    moe__step_job j;
    if (!o) return MOE_E_OPTIMIZER;
    memset(&j, 0, sizeof j);
    j.kind = o->kind ? o->kind : MOE_OPTIMIZER_ADAMW;
    if ((unsigned)j.kind >= MOE__OPTIMIZER_COUNT) return MOE_E_OPTIMIZER;
    int adam = j.kind == MOE_OPTIMIZER_ADAMW;
    float b1 = moe__value(o->beta1, 0.9f), b2 = moe__value(o->beta2, 0.999f), mu = moe__value(o->momentum, 0.9f);
    float wd = moe__value(o->weight_decay, 0.01f), eps = o->epsilon == 0.0f ? 1e-8f : o->epsilon;
    if (!(o->lr >= 0.0f) || !moe__finite(o->lr)) return MOE_E_LR;
    if (!(b1 >= 0.0f && b1 < 1.0f)) return MOE_E_BETA1;
    if (!(b2 >= 0.0f && b2 < 1.0f)) return MOE_E_BETA2;
    if (!(mu >= 0.0f && mu < 1.0f)) return MOE_E_MOMENTUM;
    if (!(eps > 0.0f) || !moe__finite(eps)) return MOE_E_EPSILON;
    if (!(wd >= 0.0f) || !moe__finite(wd)) return MOE_E_WEIGHT_DECAY;
    if (!moe__finite(o->scale)) return MOE_E_COEFFICIENT;
    if (!o->step) return MOE_E_STEP;
    if (!n) return MOE_OK;
    if (!params) return MOE_E_NULL_PARAMS;
    if (!grads) return MOE_E_NULL_GRADS;
    if (!m || (adam && !v)) return MOE_E_NULL_MOMENTS;
    j.kn = moe__k();
    j.a.lr = o->lr;
    j.a.beta1 = adam ? b1 : mu;
    j.a.beta2 = b2;
    j.a.one_beta1 = 1.0f - b1;
    j.a.one_beta2 = 1.0f - b2;
    j.a.eps = eps;
    j.a.decay = moe__fma(-o->lr, wd, 1.0f);
    j.a.scale = o->scale == 0.0f ? 1.0f : o->scale;
    j.a.fix1 = 1.0f / (1.0f - moe__power(b1, o->step));
    j.a.fix2 = 1.0f / (1.0f - moe__power(b2, o->step));
    j.n = n;
    j.p = params;
    j.g = grads;
    j.m = m;
    j.v = v;
    moe_run(o->parallel, moe__ceil_div(n, MOE__SPAN), moe__task_step, &j);
    return MOE_OK;
}

/* 64 stripes of 16 lanes: the order does not depend on the threads, and a square is exact in double. */
#define MOE__STRIPES 64
typedef struct moe__squares { const float *x; size_t n, stripe; double sum[MOE__STRIPES]; } moe__squares;
static void moe__task_squares(void *arg, size_t i, size_t worker) {
    moe__squares *s = (moe__squares *)arg;
    size_t at = moe__min(s->n, i * s->stripe), end = moe__min(s->n, at + s->stripe);
    double lane[16] = {0};
    (void)worker;
    for (; at + 16 <= end; at += 16)
        for (int l = 0; l < 16; l++) lane[l] += (double)s->x[at + (size_t)l] * (double)s->x[at + (size_t)l];
    for (size_t l = 0; at + l < end; l++) lane[l] += (double)s->x[at + l] * (double)s->x[at + l];
    for (int h = 8; h; h >>= 1)
        for (int l = 0; l < h; l++) lane[l] += lane[l + h];
    s->sum[i] = lane[0];
}
MOE_API double moe_sum_squares(const moe_parallel *p, size_t n, const float *x) {
    moe__squares s;
    double sum = 0.0;
    if (!x || !n) return 0.0;
    s.x = x;
    s.n = n;
    s.stripe = moe__ceil_div(moe__ceil_div(n, MOE__STRIPES), 16) * 16;
    moe_run(p, MOE__STRIPES, moe__task_squares, &s);
    for (int i = 0; i < MOE__STRIPES; i++) sum += s.sum[i];
    return sum;
}

MOE_API float moe_schedule_cosine(uint64_t step, uint64_t warmup, uint64_t total, float peak, float floor_lr) {
    if (step < warmup) return (float)((double)peak * ((double)(step + 1) / (double)warmup));
    if (step >= total || total <= warmup) return floor_lr;
    /* half a cosine, as cos of a 2^24th of a turn */
    double share = (double)(step - warmup) / (double)(total - warmup);
    float c, s;
    moe__cos_sin_turn((uint32_t)(share * 8388608.0), &c, &s);
    return moe__fma(0.5f * (peak - floor_lr), 1.0f + c, floor_lr);
}

/* ==== health ================================================================================== */
static moe_status moe__health_layout(moe_health *h, size_t n_experts, moe__arena *a) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    memset(h, 0, sizeof *h);
    h->n_experts = n_experts;
    h->load = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    h->top1 = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    h->prob = (double *)moe__take(a, n_experts, sizeof(double));
    h->sorted = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_health_size(size_t n_experts, size_t *bytes) {
    moe_health h;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__health_layout(&h, n_experts, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

MOE_API moe_status moe_health_init(moe_health *h, size_t n_experts, void *memory, size_t bytes) {
    size_t needed;
    moe__arena a;
    if (!h) return MOE_E_NULL_HEALTH;
    moe_status s = moe_health_size(n_experts, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    if (!s) s = moe__health_layout(h, n_experts, &a);
    return s ? s : moe_health_reset(h);
}

MOE_API moe_status moe_health_reset(moe_health *h) {
    if (!h || !h->load) return MOE_E_NULL_HEALTH;
    moe_health fresh;
    memset(&fresh, 0, sizeof fresh);
    fresh.n_experts = h->n_experts;
    fresh.load = h->load;
    fresh.top1 = h->top1;
    fresh.prob = h->prob;
    fresh.sorted = h->sorted;
    fresh.dead_fraction = h->dead_fraction;
    *h = fresh;
    memset(h->load, 0, h->n_experts * sizeof(uint64_t));
    memset(h->top1, 0, h->n_experts * sizeof(uint64_t));
    for (size_t e = 0; e < h->n_experts; e++) h->prob[e] = 0.0;
    return MOE_OK;
}

MOE_API moe_status moe_health_add(moe_health *h, const moe_routes *r, const float *prob) {
    if (!h || !h->load) return MOE_E_NULL_HEALTH;
    if (!r) return MOE_E_NULL_ROUTES;
    if (r->n_experts != h->n_experts) return MOE_E_MERGE;
    h->n_batches++;
    h->n_tokens += r->n_tokens;
    h->n_selected += r->n_routes + r->n_dropped;
    h->n_dropped += r->n_dropped;
    for (size_t e = 0; e < h->n_experts; e++) {
        h->load[e] += r->load[e];
        h->top1[e] += r->top1[e];
    }
    if (prob)
        for (size_t t = 0; t < r->n_tokens; t++)
            for (size_t e = 0; e < h->n_experts; e++) h->prob[e] += (double)prob[t * h->n_experts + e];
    return MOE_OK;
}

MOE_API moe_status moe_health_merge(moe_health *h, const moe_health *other) {
    if (!h || !other || !h->load || !other->load) return MOE_E_NULL_HEALTH;
    if (h->n_experts != other->n_experts) return MOE_E_MERGE;
    h->n_batches += other->n_batches;
    h->n_tokens += other->n_tokens;
    h->n_selected += other->n_selected;
    h->n_dropped += other->n_dropped;
    for (size_t e = 0; e < h->n_experts; e++) {
        h->load[e] += other->load[e];
        h->top1[e] += other->top1[e];
        h->prob[e] += other->prob[e];
    }
    return MOE_OK;
}

#define MOE__DEAD_FIRST 0.01   /* of the first choices (the ecology paper [S]) */
#define MOE__DEAD_FRACTION 0.1 /* of an even share of the selections */

static double moe__count_sum(size_t n, const uint64_t *x) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i];
    return sum;
}

static int moe__dead_first(const moe_health *h, double first, size_t e) {
    return h->n_experts > 1 && first > 0.0 && (double)h->top1[e] < MOE__DEAD_FIRST * first;
}
static int moe__dead_load(const moe_health *h, double total, double fraction, size_t e) {
    return h->n_experts > 1 && total > 0.0 && (double)h->load[e] < fraction * total / (double)h->n_experts;
}
static double moe__dead_fraction(const moe_health *h) { return h->dead_fraction > 0.0 ? h->dead_fraction : MOE__DEAD_FRACTION; }

/* Heap sort, ascending. */
static void moe__sort_counts(size_t n, uint64_t *x) {
    size_t start = n / 2;
    while (n > 1) {
        uint64_t v;
        if (start) v = x[--start];            /* the heap is still being built */
        else v = x[--n], x[n] = x[0];         /* its largest goes to the end */
        size_t at = start, child;
        while ((child = 2 * at + 1) < n) {
            if (child + 1 < n && x[child + 1] > x[child]) child++;
            if (x[child] <= v) break;
            x[at] = x[child];
            at = child;
        }
        x[at] = v;
    }
}

MOE_API moe_status moe_health_update(moe_health *h) {
    if (!h || !h->load) return MOE_E_NULL_HEALTH;
    size_t E = h->n_experts;
    double total = 0.0, first = 0.0, prob = 0.0, top = 0.0, square = 0.0;
    h->maxvio = h->load_cv = h->load_entropy = h->entropy = h->drop_rate = 0.0;
    h->minvio = h->gini = h->min_max = h->effective_experts = 0.0;
    h->n_dead = h->n_dead_relative = 0;
    for (size_t e = 0; e < E; e++) {
        total += (double)h->load[e];
        first += (double)h->top1[e];
        prob += h->prob[e];
        if ((double)h->load[e] > top) top = (double)h->load[e];
    }
    if (total > 0.0) {
        double mean = total / (double)E;
        for (size_t e = 0; e < E; e++) {
            double l = (double)h->load[e], share = l / total;
            square += (l - mean) * (l - mean);
            if (share > 0.0) h->load_entropy -= share * log(share);
        }
        h->maxvio = top / mean - 1.0;
        h->load_cv = sqrt(square / (double)E) / mean;
        h->effective_experts = exp(h->load_entropy);
        memcpy(h->sorted, h->load, E * sizeof *h->sorted);
        moe__sort_counts(E, h->sorted);
        for (size_t i = 0; i < E; i++) /* sum_{i<j} |l_i - l_j| of the sorted load */
            h->gini += (2.0 * (double)i + 1.0 - (double)E) * (double)h->sorted[i] / ((double)E * total);
        h->minvio = 1.0 - (double)h->sorted[0] / mean;
        h->min_max = (double)h->sorted[0] / top;
        h->load_entropy = E > 1 ? h->load_entropy / log((double)E) : 1.0;
    }
    for (size_t e = 0; e < E; e++) {
        double share = prob > 0.0 ? h->prob[e] / prob : 0.0;
        if (share > 0.0) h->entropy -= share * log(share);
        if (E > 1 && first > 0.0 && (double)h->top1[e] < 0.01 * first) h->n_dead++;
        h->n_dead_relative += (size_t)moe__dead_load(h, total, moe__dead_fraction(h), e);
    }
    if (h->n_selected) h->drop_rate = (double)h->n_dropped / (double)h->n_selected;
    return MOE_OK;
}

/* -- beside the counters: measures of plain arrays -- */
/* Indices that may be counted: in range, and no expert twice in a token. */
static moe_status moe__index_ok(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index) {
    size_t pairs;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!top_k || top_k > n_experts) return MOE_E_TOP_K;
    if (!moe__mul(n_tokens, top_k, &pairs)) return MOE_E_OVERFLOW;
    if (pairs && !index) return MOE_E_NULL_INDEX;
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        if ((size_t)index[p] >= n_experts) return MOE_E_INDEX;
        for (size_t q = p - p % top_k; q < p; q++)
            if (index[q] == index[p]) return MOE_E_INDEX_TWICE;
    }
    return MOE_OK;
}

MOE_API moe_status moe_health_compare(const moe_health *before, const moe_health *now, moe_health_change *out) {
    if (!before || !now || !before->load || !now->load) return MOE_E_NULL_HEALTH;
    if (!out) return MOE_E_NULL_OUT;
    if (before->n_experts != now->n_experts) return MOE_E_MERGE;
    size_t E = now->n_experts;
    double first0 = moe__count_sum(E, before->top1), first1 = moe__count_sum(E, now->top1), fraction = moe__dead_fraction(now);
    double total0 = moe__count_sum(E, before->load), total1 = moe__count_sum(E, now->load);
    memset(out, 0, sizeof *out);
    for (size_t e = 0; e < E; e++) {
        int was = moe__dead_first(before, first0, e), is = moe__dead_first(now, first1, e);
        out->newly_dead += is && !was;
        out->revived += was && !is;
        was = moe__dead_load(before, total0, fraction, e), is = moe__dead_load(now, total1, fraction, e);
        out->newly_dead_relative += is && !was;
        out->revived_relative += was && !is;
        if (total0 > 0.0 && total1 > 0.0)
            out->load_moved += 0.5 * fabs((double)now->load[e] / total1 - (double)before->load[e] / total0);
    }
    return MOE_OK;
}

MOE_API moe_status moe_churn(size_t n_tokens, size_t top_k, const int32_t *before, const int32_t *after, double *share) {
    size_t pairs, changed = 0;
    if (!top_k) return MOE_E_TOP_K;
    if (!moe__mul(n_tokens, top_k, &pairs)) return MOE_E_OVERFLOW;
    if (!share) return MOE_E_NULL_OUT;
    if (pairs && (!before || !after)) return MOE_E_NULL_INDEX;
    for (size_t t = 0; t < n_tokens; t++, before += top_k, after += top_k) {
        size_t n = 0, m = 0, common = 0; /* sizes of both sets, and of their intersection */
        for (size_t i = 0; i < top_k; i++) {
            n += before[i] >= 0;
            m += after[i] >= 0;
            for (size_t j = 0; before[i] >= 0 && j < top_k; j++) common += after[j] == before[i];
        }
        changed += common != n || common != m;
    }
    *share = n_tokens ? (double)changed / (double)n_tokens : 0.0;
    return MOE_OK;
}

MOE_API moe_status moe_seu(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence, const int32_t *index,
                           uint32_t *work, double *seu) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (!sequence) return MOE_E_SEQUENCE;
    if (!work) return MOE_E_NULL_WORK;
    if (!seu) return MOE_E_NULL_OUT;
    size_t n_sequences = moe__ceil_div(n_tokens, sequence);
    double distinct = 0.0;
    memset(work, 0, n_experts * sizeof *work);
    if (n_sequences >= UINT32_MAX) return MOE_E_OVERFLOW;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < top_k; i++) {
            int32_t e = index[t * top_k + i];
            uint32_t mark = (uint32_t)(t / sequence) + 1; /* the sequence that saw the expert last */
            if (e < 0 || work[e] == mark) continue;
            work[e] = mark;
            distinct += 1.0;
        }
    *seu = n_sequences ? distinct / ((double)n_sequences * (double)n_experts) : 0.0;
    return MOE_OK;
}

MOE_API moe_status moe_coselect(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index, uint64_t *count) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (!count) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++, index += top_k)
        for (size_t i = 0; i < top_k; i++)
            for (size_t j = 0; index[i] >= 0 && j < top_k; j++)
                if (index[j] >= 0) count[(size_t)index[i] * n_experts + (size_t)index[j]]++;
    return MOE_OK;
}

MOE_API moe_status moe_crossing(size_t n_tokens, size_t n_experts, size_t n_ranks, size_t top_k, const int32_t *index,
                                double *share) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (!n_ranks) return MOE_E_N_RANKS;
    if (!share) return MOE_E_NULL_OUT;
    if (n_ranks > MOE__MAX_INDEX || n_tokens > MOE__MAX_INDEX) return MOE_E_OVERFLOW; /* products stay exact in a uint64_t */
    uint64_t routes = 0, crossing = 0, P = n_ranks;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < top_k; i++) {
            int32_t e = index[t * top_k + i];
            if (e < 0) continue;
            routes++;
            crossing += (uint64_t)t * P / n_tokens != (uint64_t)e * P / n_experts;
        }
    *share = routes ? (double)crossing / (double)routes : 0.0;
    return MOE_OK;
}

MOE_API moe_status moe_tier_usage(size_t n_experts, size_t n_tiers, const uint32_t *tier, const uint64_t *load, double *share) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!load) return MOE_E_NULL_LOAD;
    if (!share) return MOE_E_NULL_OUT;
    if (!tier) return MOE_E_NULL_LABEL;
    for (size_t e = 0; e < n_experts; e++)
        if (tier[e] >= n_tiers) return MOE_E_TIER;
    double total = moe__count_sum(n_experts, load);
    for (size_t i = 0; i < n_tiers; i++) share[i] = 0.0;
    for (size_t e = 0; e < n_experts && total > 0.0; e++) share[tier[e]] += (double)load[e] / total;
    return MOE_OK;
}

MOE_API moe_status moe_loss_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                      const float *loss, double *sum) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (n_tokens && !loss) return MOE_E_NULL_LABEL;
    if (!sum) return MOE_E_NULL_OUT;
    for (size_t p = 0; p < n_tokens * top_k; p++)
        if (index[p] >= 0) sum[index[p]] += (double)loss[p / top_k];
    return MOE_OK;
}

MOE_API moe_status moe_right_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                       const uint8_t *correct, uint64_t *right) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (n_tokens && !correct) return MOE_E_NULL_LABEL;
    if (!right) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++)
        if (index[t * top_k] >= 0) right[index[t * top_k]] += correct[t] != 0;
    return MOE_OK;
}

MOE_API moe_status moe_label_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_labels,
                                       const int32_t *index, const uint32_t *label, uint64_t *count) {
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (n_tokens && !label) return MOE_E_NULL_LABEL;
    if (!count) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++)
        if (label[t] >= n_labels) return MOE_E_LABEL;
    for (size_t t = 0; t < n_tokens; t++)
        if (index[t * top_k] >= 0) count[(size_t)index[t * top_k] * n_labels + label[t]]++;
    return MOE_OK;
}

MOE_API moe_status moe_label_majority(size_t n_experts, size_t n_labels, const uint64_t *count, uint64_t *right) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!count || !right) return MOE_E_NULL_COUNT;
    for (size_t e = 0; e < n_experts; e++) {
        right[e] = 0;
        for (size_t c = 0; c < n_labels; c++)
            if (count[e * n_labels + c] > right[e]) right[e] = count[e * n_labels + c];
    }
    return MOE_OK;
}

MOE_API const char *moe_ecology_name(moe_ecology v) {
    static const char *const names[] = {"DEAD", "NOISE", "EDGE", "WEAK_CORE", "BROAD_CORE", "PURE_CORE"};
    return (unsigned)v < MOE__ECOLOGY_COUNT ? names[v] : NULL;
}

MOE_API moe_status moe_ecology_classes(size_t n_experts, const uint64_t *top1, const uint64_t *right, moe_ecology *out) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!top1) return MOE_E_NULL_LOAD;
    if (!right) return MOE_E_NULL_COUNT;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__count_sum(n_experts, top1);
    for (size_t e = 0; e < n_experts; e++) { /* products, not quotients: a count exactly on a border is on its upper side */
        double n = (double)top1[e], a = (double)right[e];
        if (n <= 0.0 || 100.0 * n < total) out[e] = MOE_ECOLOGY_DEAD;
        else if (100.0 * n < 3.0 * total) out[e] = 4.0 * a < n ? MOE_ECOLOGY_NOISE : MOE_ECOLOGY_EDGE;
        else out[e] = 10.0 * a < 3.0 * n ? MOE_ECOLOGY_WEAK_CORE : 2.0 * a < n ? MOE_ECOLOGY_BROAD_CORE : MOE_ECOLOGY_PURE_CORE;
    }
    return MOE_OK;
}

static int moe__finite_double(double x) { return x - x == 0.0; }

MOE_API double moe_ecology_number(double temperature, double entropy, double oracle, double balance) {
    double a[4], nan = (double)NAN;
    a[0] = temperature, a[1] = entropy, a[2] = oracle, a[3] = balance;
    for (int i = 0; i < 4; i++)
        if (!(a[i] >= 0.0) || !moe__finite_double(a[i])) return nan;
    return oracle + balance > 0.0 ? temperature * entropy / (oracle + balance) : HUGE_VAL;
}

MOE_API moe_status moe_pes(size_t n_tokens, size_t n_experts, size_t d, const float *outputs, double *work, double *pes) {
    size_t row, n;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!d) return MOE_E_D_MODEL;
    if (!moe__mul(n_experts, d, &row) || !moe__mul(n_tokens, row, &n)) return MOE_E_OVERFLOW;
    if (n && !outputs) return MOE_E_NULL_X;
    if (!work) return MOE_E_NULL_WORK;
    if (!pes) return MOE_E_NULL_OUT;
    double sum = 0.0;
    for (size_t t = 0; t < n_tokens; t++, outputs += row) {
        double ones = 0.0, square = 0.0; /* with unit vectors u: sum_{i<j} <u_i, u_j> = (|sum u|^2 - sum |u|^2) / 2 */
        for (size_t e = 0; e < n_experts; e++) {
            double norm = 0.0, largest = 0.0;
            const float *o = outputs + e * d;
            for (size_t i = 0; i < d; i++) {
                if (!moe__finite(o[i])) return MOE_E_NAN_X;
                norm += (double)o[i] * (double)o[i];
                largest += fabs((double)o[i]);
            }
            work[e] = largest > 0.0 ? 1.0 / sqrt(norm) : 0.0; /* squares of float32 do not underflow in double */
            ones += largest > 0.0;
        }
        for (size_t i = 0; i < d; i++) {
            double u = 0.0;
            for (size_t e = 0; e < n_experts; e++) u += work[e] * (double)outputs[e * d + i];
            square += u * u;
        }
        sum += (square - ones) / ((double)n_experts * (double)(n_experts > 1 ? n_experts - 1 : 1));
    }
    *pes = n_tokens && n_experts > 1 ? sum / (double)n_tokens : 0.0;
    return MOE_OK;
}

/* -- a pass over logits: blocks of 32 tokens are transposed, so that 16 tokens are ranked at once -- */
typedef struct moe__count_work {
    float *pad, *panel, *list, *selected, *first;
    double *sum;
    int32_t *index;
} moe__count_work;

static moe_status moe__count_layout(moe__count_work *w, size_t n_experts, size_t top_k, moe__arena *a) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!top_k || top_k > n_experts) return MOE_E_TOP_K;
    size_t columns = moe__ceil_div(n_experts, 32) * 32;
    w->pad = moe__take_floats(a, 32, 32);            /* the block at the edge */
    w->panel = moe__take_floats(a, columns, 32);     /* (expert, 32 tokens) */
    w->list = moe__take_floats(a, top_k + 1, 16);
    w->selected = moe__take_floats(a, n_experts, 16);
    w->first = moe__take_floats(a, n_experts, 16);
    w->sum = (double *)moe__take(a, n_experts, sizeof(double));
    w->index = (int32_t *)moe__take(a, top_k, sizeof(int32_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_topk_count_work(size_t n_experts, size_t top_k, size_t *bytes) {
    moe__count_work w;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__count_layout(&w, n_experts, top_k, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

/* The counts of the lanes, whole numbers below 2^24. */
static void moe__count_flush(size_t n_experts, const float *lanes, uint64_t *count) {
    for (size_t e = 0; count && e < n_experts; e++) {
        double sum = 0.0;
        for (size_t l = 0; l < 16; l++) sum += (double)lanes[e * 16 + l];
        count[e] += (uint64_t)sum;
    }
}

/* At most 2^20 tokens, so that a lane stays below 2^24, where float stops counting. */
static moe_status moe__count_piece(const moe__count_work *w, size_t n_tokens, size_t n_experts, size_t top_k, const float *logits,
                                   uint64_t *load, uint64_t *top1, double *sum) {
    const moe__kernels *kn = moe__k();
    double finite = 0.0;
    memset(w->selected, 0, n_experts * 16 * sizeof(float));
    memset(w->first, 0, n_experts * 16 * sizeof(float));
    memset(w->pad, 0, 32 * 32 * sizeof(float));
    for (size_t e = 0; e < n_experts; e++) w->sum[e] = 0.0;
    for (size_t t = 0, rows; t < n_tokens; t += rows) {
        const float *z = logits + t * n_experts;
        rows = moe__min(n_tokens - t, 32);
        kn->sum_rows(rows, n_experts, z, w->sum);
        if (!load) continue;
        size_t whole = n_experts / 32 * 32; /* the block at the edge is copied first */
        for (size_t e = 0; rows == 32 && e < n_experts; e += 32) {
            size_t cols = moe__min(n_experts - e, 32);
            if (e < whole) {
                kn->transpose(z + e, n_experts, w->panel + e * 32);
                continue;
            }
            for (size_t r = 0; r < rows; r++) memcpy(w->pad + r * 32, z + r * n_experts + e, cols * sizeof(float));
            kn->transpose(w->pad, 32, w->panel + e * 32);
        }
        uint32_t ties = 0xffffffffu; /* one row after the other: where a tie decides, and the last few */
        if (rows == 32 && top_k <= 8) ties = kn->count8(n_experts, top_k, w->panel, w->selected, w->first);
        else if (rows == 32) {
            ties = kn->count(n_experts, top_k, w->panel, w->list, w->selected, w->first);
            ties |= kn->count(n_experts, top_k, w->panel + 16, w->list, w->selected, w->first) << 16;
        }
        for (size_t r = 0; ties && r < rows; r++, ties >>= 1) {
            if (!(ties & 1) || !moe__topk_row(n_experts, top_k, z + r * n_experts, w->index)) continue;
            for (size_t i = 0; i < top_k; i++) w->selected[(size_t)w->index[i] * 16] += 1.0f;
            w->first[(size_t)w->index[0] * 16] += 1.0f;
        }
    }
    for (size_t e = 0; e < n_experts; e++) finite += w->sum[e] * 0.0; /* a sum in double of finite floats is finite */
    if (!(finite == 0.0)) return MOE_E_NAN_LOGITS;
    for (size_t e = 0; sum && e < n_experts; e++) sum[e] += w->sum[e];
    if (!load) return MOE_OK;
    moe__count_flush(n_experts, w->selected, load);
    moe__count_flush(n_experts, w->first, top1);
    return MOE_OK;
}

MOE_API moe_status moe_topk_count(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, uint64_t *load,
                                  uint64_t *top1, double *sum, void *work, size_t work_bytes) {
    size_t needed, n, most = (size_t)1 << 20;
    moe__arena a;
    moe__count_work w;
    moe_status s = moe_topk_count_work(n_experts, top_k, &needed);
    if (s) return s;
    if (!moe__mul(n_tokens, n_experts, &n)) return MOE_E_OVERFLOW;
    if (n && !logits) return MOE_E_NULL_LOGITS;
    if (!work) return MOE_E_NULL_WORK;
    s = moe__arena_over(&a, work, work_bytes, needed);
    if (!s) s = moe__count_layout(&w, n_experts, top_k, &a);
    if (s) return s;
    if (n_tokens > most && !moe__k()->all_finite(n, logits)) return MOE_E_NAN_LOGITS; /* before the first piece is added */
    for (size_t t = 0, some; t < n_tokens && !s; t += some) {
        some = moe__min(n_tokens - t, most);
        s = moe__count_piece(&w, some, n_experts, top_k, logits + t * n_experts, load, top1, sum);
    }
    return s;
}

/* -- the temperature scan -- */
typedef struct moe__scan_work { float *score; double *mean; uint64_t *load, *top1; int32_t *plain, *index; } moe__scan_work;

static moe_status moe__scan_layout(moe__scan_work *w, size_t n_experts, size_t top_k, moe__arena *a) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!top_k || top_k > n_experts) return MOE_E_TOP_K;
    w->score = moe__take_floats(a, 1, n_experts);
    w->mean = (double *)moe__take(a, n_experts, sizeof(double));
    w->load = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    w->top1 = (uint64_t *)moe__take(a, n_experts, sizeof(uint64_t));
    w->plain = (int32_t *)moe__take(a, top_k, sizeof(int32_t));
    w->index = (int32_t *)moe__take(a, top_k, sizeof(int32_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_temperature_scan_work(size_t n_experts, size_t top_k, size_t *bytes) {
    moe__scan_work w;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__scan_layout(&w, n_experts, top_k, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

static double moe__entropy_of(double p) { return p > 0.0 ? -p * log(p) : 0.0; }

MOE_API moe_status moe_temperature_scan(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, size_t n_rows,
                                        const float *temperature, moe_temperature_row *row, void *work, size_t work_bytes) {
    size_t needed, n;
    moe__arena a;
    moe__scan_work w;
    moe_status s = moe_temperature_scan_work(n_experts, top_k, &needed);
    if (s) return s;
    if (!moe__mul(n_tokens, n_experts, &n)) return MOE_E_OVERFLOW;
    if (n && !logits) return MOE_E_NULL_LOGITS;
    if (n_rows && (!temperature || !row)) return MOE_E_NULL_OUT;
    if (!work) return MOE_E_NULL_WORK;
    s = moe__arena_over(&a, work, work_bytes, needed);
    if (!s) s = moe__scan_layout(&w, n_experts, top_k, &a);
    if (s) return s;
    for (size_t i = 0; i < n_rows; i++)
        if (!moe__temperature_ok(temperature[i])) return MOE_E_TEMPERATURE;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    for (size_t i = 0; i < n_rows; i++) {
        moe_temperature_row r;
        moe_health h;
        double tokens = n_tokens ? (double)n_tokens : 1.0, share = 0.0;
        memset(&r, 0, sizeof r);
        memset(&h, 0, sizeof h);
        memset(w.load, 0, n_experts * sizeof *w.load);
        memset(w.top1, 0, n_experts * sizeof *w.top1);
        for (size_t e = 0; e < n_experts; e++) w.mean[e] = 0.0;
        r.temperature = (double)temperature[i];
        for (size_t t = 0; t < n_tokens; t++) {
            const float *z = logits + t * n_experts;
            moe__k()->softmax(n_experts, 1.0f / temperature[i], z, w.score);
            moe__topk_row(n_experts, top_k, z, w.plain);
            moe__topk_row(n_experts, top_k, w.score, w.index);
            for (size_t e = 0; e < n_experts; e++) {
                w.mean[e] += (double)w.score[e];
                r.token_entropy += moe__entropy_of((double)w.score[e]) / tokens;
            }
            for (size_t k = 0; k < top_k; k++) {
                w.load[w.index[k]]++;
                r.top_mass += (double)w.score[w.index[k]] / tokens;
            }
            w.top1[w.index[0]]++;
            r.first_mass += (double)w.score[w.index[0]] / tokens;
            (void)moe_churn(1, top_k, w.plain, w.index, &share);
            r.changed += share / tokens;
        }
        double mean = tokens * (double)top_k / (double)n_experts, top = 0.0, square = 0.0;
        h.n_experts = n_experts;
        h.top1 = w.top1;
        for (size_t e = 0; e < n_experts && n_tokens; e++) {
            double l = (double)w.load[e];
            r.entropy += moe__entropy_of(w.mean[e] / tokens);
            if (l > top) top = l;
            square += (l - mean) * (l - mean);
            r.n_dead += (size_t)moe__dead_first(&h, tokens, e);
        }
        if (n_tokens) r.maxvio = top / mean - 1.0;
        r.load_cv = sqrt(square / (double)n_experts) / mean; /* square is 0 without tokens */
        row[i] = r;
    }
    return MOE_OK;
}

/* ==== game ====================================================================================
 * The congestion game of the routers: load m = softmax(q - gamma m). After arXiv 2604.04230, of which only the abstract
 * was available: every formula is [D], derived for this library (docs/gamma.md). All in double. */
#define MOE__GAME_ROUNDS 60
#define MOE__GAME_PICARD 0.1 /* up to here plain iteration is fast: it contracts by |gamma| / 2 */
#define MOE__GAME_TYPES 64

static moe_status moe__game_sizes_ok(size_t n_experts, const double *quality) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!quality) return MOE_E_NULL_QUALITY;
    for (size_t i = 0; i < n_experts; i++)
        if (!moe__finite_double(quality[i])) return MOE_E_QUALITY;
    return MOE_OK;
}

/* The sum of a load whose every element may be used, or 0. */
static double moe__game_total(size_t n, const double *load) {
    double total = 0.0;
    for (size_t i = 0; i < n; i++) {
        if (!(load[i] >= 0.0) || !moe__finite_double(load[i])) return 0.0;
        total += load[i];
    }
    return moe__finite_double(total) ? total : 0.0;
}

static double moe__max_of(size_t n, const double *x) {
    double top = x[0];
    for (size_t i = 1; i < n; i++)
        if (x[i] > top) top = x[i];
    return top;
}

static double moe__l1(size_t n, const double *a, const double *b) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += fabs(a[i] - b[i]);
    return sum;
}

/* out = softmax((x - price) * inverse), price NULL = 0; returns the logsumexp. out may be x or price. */
static double moe__softmax_double(size_t n, const double *x, const double *price, double inverse, double *out) {
    double top = -HUGE_VAL, sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        out[i] = (price ? x[i] - price[i] : x[i]) * inverse;
        if (out[i] > top) top = out[i];
    }
    for (size_t i = 0; i < n; i++) sum += out[i] = exp(out[i] - top);
    for (size_t i = 0; i < n; i++) out[i] /= sum;
    return top + log(sum);
}

/* The m > 0 with log m + gamma m = a, gamma > 0: omega(a + log gamma) / gamma, omega the Wright omega. Never overflows:
 * only logarithms of what grows. Fritsch, Shafer and Crowley's iteration, of fourth order. guess > 0: a start near m. */
static double moe__game_response(double a, double gamma, double log_gamma, double guess) {
    double x = a + log_gamma, m = guess, r = 1.0;
    if (x < -36.0) return exp(a); /* gamma m is below the rounding of 1 */
    if (guess > 0.0) r = a - log(m) - gamma * m;
    if (!(guess > 0.0) || fabs(r) > 0.5) {
        if (x < -1.0) m = exp(a);
        else if (x < 4.0) m = (1.0 + (x - 1.0) / 2.0 + (x - 1.0) * (x - 1.0) / 16.0) / gamma;
        else m = (x - log(x)) / gamma;
        r = a - log(m) - gamma * m;
    }
    for (int i = 0; i < 8; i++) {
        double one = 1.0 + gamma * m, t = 2.0 * one * (one + r * (2.0 / 3.0));
        m *= 1.0 + r / one * ((t - r) / (t - 2.0 * r));
        if (fabs(r) < 1e-4) break; /* r^4 is below rounding */
        r = a - log(m) - gamma * m;
    }
    return m;
}

/* Newton's iteration for c in sum_i m_i(c) = 1: the sum is convex and falls with c, so from the left it never overshoots. q is
 * less `top`; *c and m are starts if `warm`. Returns the rounds, or 0 without success. */
static int moe__game_newton(size_t n, const double *quality, double top, double gamma, int warm, double *c, double *m) {
    double sum = 0.0, log_gamma = log(gamma), before = HUGE_VAL;
    for (size_t i = 0; i < n; i++) sum += exp(quality[i] - top);
    double lo = log(sum) - gamma, hi = log(sum);
    if (!warm || !(*c >= lo && *c <= hi)) {
        *c = lo;
        for (size_t i = 0; i < n; i++) m[i] = 0.0;
    }
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double f = -1.0, lost = 0.0, slope = 0.0;
        for (size_t i = 0; i < n; i++) {
            m[i] = moe__game_response((quality[i] - top) - *c, gamma, log_gamma, m[i]);
            double part = m[i] - lost, next = f + part; /* Kahan's sum */
            lost = (next - f) - part;
            f = next;
            slope += m[i] / (1.0 + gamma * m[i]);
        }
        if (fabs(f) < 1e-15 || (fabs(f) < 1e-10 && fabs(f) >= before)) { /* as near as the sum's rounding allows */
            for (size_t i = 0; i < n; i++) m[i] /= 1.0 + f;
            return round;
        }
        before = fabs(f);
        if (f > 0.0) lo = *c;
        else hi = *c;
        double next = *c + f / slope;
        if (!(next >= lo && next <= hi)) next = lo + (hi - lo) / 2.0;
        double step = next - *c;
        *c = next;
        for (size_t i = 0; i < n; i++) {
            m[i] -= step * (m[i] / (1.0 + gamma * m[i]));
            if (!(m[i] > 0.0)) m[i] = 0.0; /* a poor guess is none */
        }
    }
    return 0;
}

/* Small and negative gamma: m = softmax(q - gamma m), again and again. */
static int moe__game_picard(size_t n, const double *quality, double top, double gamma, double *c, double *m) {
    double sum;
    for (size_t i = 0; i < n; i++) m[i] = 0.0;
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double change = 0.0;
        sum = 0.0;
        for (size_t i = 0; i < n; i++) sum += exp((quality[i] - top) - gamma * m[i]);
        *c = log(sum);
        for (size_t i = 0; i < n; i++) {
            double next = exp((quality[i] - top) - gamma * m[i]) / sum;
            change += fabs(next - m[i]);
            m[i] = next;
        }
        if (change * fabs(gamma) < 1e-16) return round;
    }
    return MOE__GAME_ROUNDS; /* by now the change is below 2^-59 */
}

static int moe__game_rounds(size_t n, const double *quality, double gamma, int warm, double *c, double *m) {
    double top = moe__max_of(n, quality);
    if (gamma <= MOE__GAME_PICARD) return moe__game_picard(n, quality, top, gamma, c, m);
    return moe__game_newton(n, quality, top, gamma, warm, c, m);
}

MOE_API moe_status moe_game_solve(size_t n_experts, const double *quality, double gamma, double *load, moe_game_info *info) {
    moe_status s = moe__game_sizes_ok(n_experts, quality);
    if (s) return s;
    if (!(gamma > -1.0) || !moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!load) return MOE_E_NULL_LOAD;
    double c = 0.0, top = moe__max_of(n_experts, quality), residual = 0.0;
    int rounds = moe__game_rounds(n_experts, quality, gamma, 0, &c, load);
    if (!rounds) return MOE_E_GAME;
    for (size_t i = 0; i < n_experts; i++) {
        double a = quality[i] - top, l, r;
        if (load[i] < DBL_MIN) continue; /* so small that its logarithm is not exact */
        l = log(load[i]);
        r = fabs(l + gamma * load[i] - a + c) / (1.0 + fabs(l) + fabs(gamma) * load[i] + fabs(a) + fabs(c));
        if (r > residual) residual = r;
    }
    if (info) info->iterations = rounds, info->residual = residual;
    return MOE_OK;
}

MOE_API moe_status moe_game_sensitivity(size_t n_experts, double gamma, const double *load, double *d_load) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!(gamma > -1.0) || !moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!load) return MOE_E_NULL_LOAD;
    if (!d_load) return MOE_E_NULL_OUT;
    if (!(moe__game_total(n_experts, load) > 0.0)) return MOE_E_LOAD;
    double sum = 0.0, mean = 0.0;
    for (size_t i = 0; i < n_experts; i++) {
        d_load[i] = load[i] / (1.0 + gamma * load[i]);
        sum += d_load[i];
        mean += d_load[i] * load[i];
    }
    for (size_t i = 0; i < n_experts; i++) d_load[i] *= mean / sum - load[i];
    return MOE_OK;
}

MOE_API moe_status moe_game_softmax(size_t n_experts, const double *quality, double temperature, double *load) {
    moe_status s = moe__game_sizes_ok(n_experts, quality);
    if (s) return s;
    if (!(temperature > 0.0) || !moe__finite_double(1.0 / temperature)) return MOE_E_TEMPERATURE;
    if (!load) return MOE_E_NULL_LOAD;
    double top = moe__max_of(n_experts, quality), sum = 0.0;
    for (size_t i = 0; i < n_experts; i++) sum += load[i] = exp((quality[i] - top) / temperature);
    for (size_t i = 0; i < n_experts; i++) load[i] /= sum;
    return MOE_OK;
}

/* -- fits: the parameter with the least L1 distance between prediction and load -- */
typedef struct moe__curve moe__curve;
struct moe__curve {
    void (*predict)(moe__curve *v, double u); /* of the scaled parameter, into m */
    size_t n, n_types;
    const double *share, *quality, *load; /* quality (n), or (n_types, n) */
    double *m, *work, c;
    int warm; /* m and c are of a parameter before */
};

static double moe__curve_at(moe__curve *v, double u) {
    v->predict(v, u);
    return moe__l1(v->n, v->m, v->load);
}

/* Golden section on [lo, hi]. */
static double moe__curve_golden(moe__curve *v, double lo, double hi, double tolerance, double *u) {
    const double ratio = 0.6180339887498949;
    double a = hi - ratio * (hi - lo), b = lo + ratio * (hi - lo), fa = moe__curve_at(v, a), fb = moe__curve_at(v, b);
    while (hi - lo > tolerance) {
        if (fa <= fb) {
            hi = b, b = a, fb = fa;
            fa = moe__curve_at(v, a = hi - ratio * (hi - lo));
        } else {
            lo = a, a = b, fa = fb;
            fb = moe__curve_at(v, b = lo + ratio * (hi - lo));
        }
    }
    *u = fa <= fb ? a : b;
    return fa <= fb ? fa : fb;
}

/* A grid over [lo, hi], then golden section around its best point. The ends themselves can be the answer. */
static double moe__curve_fit(moe__curve *v, double lo, double hi, double *u) {
    const int grid = 40;
    double best = HUGE_VAL, h = (hi - lo) / grid, value, inside;
    int at = 0;
    v->warm = 0;
    for (int i = 0; i <= grid; i++) {
        value = moe__curve_at(v, lo + i * h);
        if (value < best) best = value, at = i;
    }
    *u = lo + at * h;
    value = moe__curve_golden(v, at > 0 ? *u - h : lo, at < grid ? *u + h : hi, 1e-11, &inside);
    if (value < best) best = value, *u = inside;
    return best;
}

/* The same downhill from a start, in growing steps, and to three digits: for a bootstrap. */
static double moe__curve_descend(moe__curve *v, double start, double lo, double hi) {
    double h = 0.05, u = start, f, left, right, inside;
    v->warm = 0;
    f = moe__curve_at(v, u);
    left = u - h < lo ? lo : u - h, right = u + h > hi ? hi : u + h;
    double fl = left < u ? moe__curve_at(v, left) : HUGE_VAL, fr = right > u ? moe__curve_at(v, right) : HUGE_VAL;
    while (fl < f || fr < f) {
        h *= 2.0;
        if (fl < fr) {
            right = u, u = left, fr = f, f = fl;
            left = u - h < lo ? lo : u - h;
            fl = left < u ? moe__curve_at(v, left) : HUGE_VAL;
        } else {
            left = u, u = right, fl = f, f = fr;
            right = u + h > hi ? hi : u + h;
            fr = right > u ? moe__curve_at(v, right) : HUGE_VAL;
        }
    }
    return moe__curve_golden(v, left, right, 2e-4, &inside) < f ? inside : u;
}

#define MOE__GAMMA_END log1p(MOE_GAME_GAMMA_MAX) /* u = log(1 + gamma) */
static const double moe__log_temperature[2] = {-3.912023005428146, 6.214608098422191}; /* log 0.02, log 500 */

static void moe__predict_game(moe__curve *v, double u) {
    double gamma = expm1(u) > 0.0 ? expm1(u) : 0.0;
    v->warm = gamma > MOE__GAME_PICARD && moe__game_rounds(v->n, v->quality, gamma, v->warm, &v->c, v->m) > 0;
    if (gamma <= MOE__GAME_PICARD) (void)moe__game_rounds(v->n, v->quality, gamma, 0, &v->c, v->m);
}
static void moe__predict_softmax(moe__curve *v, double u) { (void)moe_game_softmax(v->n, v->quality, exp(u), v->m); }

static moe__curve moe__curve_of(void (*predict)(moe__curve *, double), size_t n, const double *quality, const double *load, double *m) {
    moe__curve v;
    memset(&v, 0, sizeof v);
    v.predict = predict;
    v.n = n;
    v.quality = quality;
    v.load = load;
    v.m = m;
    return v;
}

/* Slope of q - log m on m, and whether the load varies at all. A load of 0 counts as half a selection. */
static double moe__game_slope(size_t n, const double *quality, const double *m, double selections) {
    double least = HUGE_VAL, mean = 0.0, mean_y = 0.0, xx = 0.0, xy = 0.0;
    for (size_t i = 0; i < n; i++)
        if (m[i] > 0.0 && m[i] < least) least = m[i];
    least = selections > 0.0 ? 0.5 / selections : least / 2.0;
    for (size_t i = 0; i < n; i++) {
        mean += m[i] / (double)n;
        mean_y += (quality[i] - log(m[i] > 0.0 ? m[i] : least)) / (double)n;
    }
    for (size_t i = 0; i < n; i++) {
        double x = m[i] - mean;
        xx += x * x;
        xy += x * (quality[i] - log(m[i] > 0.0 ? m[i] : least) - mean_y);
    }
    return xx > 1e-24 ? xy / xx : (double)NAN;
}

MOE_API moe_status moe_game_estimate(size_t n_experts, const double *quality, const double *load, double selections,
                                     double *work, moe_game_fit *out) {
    size_t n = n_experts;
    moe_status s = moe__game_sizes_ok(n, quality);
    if (s) return s;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__game_total(n, load), *m = work, *prediction = work + n, u, low = quality[0], top = moe__max_of(n, quality);
    if (!(total > 0.0) || !(selections >= 0.0) || !moe__finite_double(selections)) return MOE_E_LOAD;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < n; i++) {
        m[i] = load[i] / total;
        out->l1_uniform += fabs(m[i] - 1.0 / (double)n);
        if (quality[i] < low) low = quality[i];
    }
    out->peak_load = (double)n * moe__max_of(n, m);
    (void)moe_game_softmax(n, quality, 1.0, prediction);
    out->peak_softmax = (double)n * moe__max_of(n, prediction);
    out->gamma_ols = moe__game_slope(n, quality, m, selections);

    moe__curve v = moe__curve_of(moe__predict_softmax, n, quality, m, prediction);
    out->l1_softmax = moe__curve_fit(&v, moe__log_temperature[0], moe__log_temperature[1], &u);
    out->temperature = top - low > 1e-12 * (1.0 + fabs(top)) ? exp(u) : (double)NAN;
    v = moe__curve_of(moe__predict_game, n, quality, m, prediction);
    out->l1_game = moe__curve_fit(&v, 0.0, MOE__GAMMA_END, &u);
    out->gamma = expm1(u);

    /* how far the prediction can move, against the mean L1 distance of a load of so many draws from its own truth */
    double noise = selections > 0.0 ? sqrt(2.0 * (double)n / (3.141592653589793 * selections)) : 0.0, span = 0.0, sum = 0.0;
    v.warm = 0;
    moe__predict_game(&v, MOE__GAMMA_END);
    for (size_t i = 0; i < n; i++) sum += exp(quality[i] - top);
    for (size_t i = 0; i < n; i++) span += fabs(prediction[i] - exp(quality[i] - top) / sum);
    out->identified = span > noise + 1e-9 && u < MOE__GAMMA_END - 1e-6;
    if (!out->identified) out->gamma = (double)NAN;
    return MOE_OK;
}

MOE_API double moe_game_explicit(double alpha, size_t n_experts, double unit_scale) {
    return alpha * (double)n_experts * unit_scale;
}

/* -- several types of tokens -- */
/* Number i of a stream as a double in [0, 1). */
static double moe__uniform_double(uint64_t seed, uint64_t stream, uint64_t i) {
    double hi = (double)moe_rand_u32(seed, stream, 2 * i), lo = (double)(moe_rand_u32(seed, stream, 2 * i + 1) >> 11);
    return (hi * 2097152.0 + lo) / 9007199254740992.0; /* 53 bits */
}

/* row = z less its mean */
static void moe__centre(size_t n, const float *z, double *row) {
    double mean = 0.0;
    for (size_t i = 0; i < n; i++) mean += (double)z[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++) row[i] = (double)z[i] - mean;
}

static double moe__distance(size_t n, const double *a, const double *b) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

MOE_API moe_status moe_game_cluster(size_t n_tokens, size_t n_experts, size_t n_types, uint64_t seed, const float *logits,
                                    uint32_t *type, double *share, double *quality, double *work) {
    size_t n, E = n_experts, seeded;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!n_types || n_types > MOE__GAME_TYPES) return MOE_E_N_TYPES;
    if (!n_tokens) return MOE_E_N_BATCHES;
    if (!moe__mul(n_tokens, n_experts, &n)) return MOE_E_OVERFLOW;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!type || !share || !quality) return MOE_E_NULL_OUT;
    if (!work) return MOE_E_NULL_WORK;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    double *nearest = work, *row = work + n_tokens; /* squared distance to the nearest centre; one token */
    for (size_t t = 0; t < n_tokens; t++) nearest[t] = HUGE_VAL, type[t] = 0;
    for (size_t i = 0; i < n_types * E; i++) quality[i] = 0.0;
    for (seeded = 0; seeded < n_types; seeded++) { /* k-means++: the next centre with probability as the squared distance */
        double total = 0.0, left, *centre = quality + seeded * E;
        size_t pick = 0;
        for (size_t t = 0; seeded && t < n_tokens; t++) total += nearest[t];
        if (seeded && !(total > 0.0)) break; /* every token is a centre already */
        left = moe__uniform_double(seed, 0, seeded) * (seeded ? total : (double)n_tokens);
        if (!seeded) pick = (size_t)left;
        for (size_t t = 0; seeded && t < n_tokens; t++) {
            if (nearest[t] > 0.0) pick = t; /* the last such one if rounding leaves a rest */
            if ((left -= nearest[t]) < 0.0) break;
        }
        moe__centre(E, logits + pick * E, centre);
        for (size_t t = 0; t < n_tokens; t++) {
            moe__centre(E, logits + t * E, row);
            double d = moe__distance(E, row, centre);
            if (d < nearest[t]) nearest[t] = d, type[t] = (uint32_t)seeded;
        }
    }
    for (int round = 0; round < 50; round++) {
        size_t changed = 0;
        for (size_t c = 0; c < n_types; c++) share[c] = 0.0;
        for (size_t t = 0; t < n_tokens; t++) share[type[t]] += 1.0;
        for (size_t c = 0; c < n_types; c++) /* an empty type keeps its centre */
            for (size_t i = 0; i < E && share[c] > 0.0; i++) quality[c * E + i] = 0.0;
        for (size_t t = 0; t < n_tokens; t++) {
            moe__centre(E, logits + t * E, row);
            for (size_t i = 0; i < E; i++) quality[type[t] * E + i] += row[i] / share[type[t]];
        }
        if (round == 49) break; /* means of the last assignment */
        for (size_t t = 0; t < n_tokens; t++) {
            uint32_t best = type[t];
            moe__centre(E, logits + t * E, row);
            double least = moe__distance(E, row, quality + best * E);
            for (size_t c = 0; c < seeded; c++) {
                double d = moe__distance(E, row, quality + c * E);
                if (d < least) least = d, best = (uint32_t)c;
            }
            changed += best != type[t];
            type[t] = best;
        }
        if (!changed) break;
    }
    for (size_t c = 0; c < n_types; c++) share[c] /= (double)n_tokens;
    return MOE_OK;
}

MOE_API moe_status moe_game_types_work(size_t n_experts, size_t n_types, size_t *count) {
    if (!count) return MOE_E_NULL_OUT;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!n_types || n_types > MOE__GAME_TYPES) return MOE_E_N_TYPES;
    *count = n_types * n_experts + 7 * n_experts + n_types * n_types + n_types; /* below 2^27 */
    return MOE_OK;
}

static moe_status moe__game_types_ok(size_t n_experts, size_t n_types, const double *share, const double *quality) {
    size_t count;
    double sum = 0.0;
    moe_status s = moe_game_types_work(n_experts, n_types, &count);
    if (s) return s;
    if (!share || !quality) return MOE_E_NULL_QUALITY;
    for (size_t c = 0; c < n_types; c++) {
        if (!(share[c] >= 0.0)) return MOE_E_TYPE_SHARE;
        sum += share[c];
    }
    if (!(fabs(sum - 1.0) < 1e-6)) return MOE_E_TYPE_SHARE;
    for (size_t i = 0; i < n_types * n_experts; i++)
        if (!moe__finite_double(quality[i])) return MOE_E_QUALITY;
    return MOE_OK;
}

/* load = sum_c pi_c softmax((q^c - price) / T), p (C, E) = the types' softmaxes; returns sum_c pi_c logsumexp. */
static double moe__types_load(size_t E, size_t C, const double *share, const double *quality, const double *price, double inverse,
                              double *p, double *load) {
    double lse = 0.0;
    for (size_t i = 0; i < E; i++) load[i] = 0.0;
    for (size_t c = 0; c < C; c++) {
        lse += share[c] * moe__softmax_double(E, quality + c * E, price, inverse, p + c * E);
        for (size_t i = 0; i < E; i++) load[i] += share[c] * p[c * E + i];
    }
    return lse;
}

/* x = A^-1 x for a symmetric positive definite A (n, n), which becomes its Cholesky factor. 0: it is not definite. */
static int moe__cholesky_solve(size_t n, double *a, double *x) {
    for (size_t j = 0; j < n; j++) {
        for (size_t i = j; i < n; i++) {
            double v = a[i * n + j];
            for (size_t k = 0; k < j; k++) v -= a[i * n + k] * a[j * n + k];
            if (i == j && !(v > 0.0)) return 0;
            a[i * n + j] = i == j ? sqrt(v) : v / a[j * n + j];
        }
    }
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < i; k++) x[i] -= a[i * n + k] * x[k];
        x[i] /= a[i * n + i];
    }
    for (size_t i = n; i-- > 0;) {
        for (size_t k = i + 1; k < n; k++) x[i] -= a[k * n + i] * x[k];
        x[i] /= a[i * n + i];
    }
    return 1;
}

/* Newton's step -H^-1 g for H = D - U U^T, D = diag(load + 1 / gamma), U (E, C) = sqrt(pi_c) p^c: by Woodbury's identity only
 * I - U^T D^-1 U (C, C) is factored. step (E); a (C, C) and x (C) are scratch. */
static int moe__types_step(size_t E, size_t C, const double *share, const double *p, const double *load, double gamma,
                           const double *gradient, double *a, double *x, double *step) {
    for (size_t c = 0; c < C; c++) {
        x[c] = 0.0;
        for (size_t i = 0; i < E; i++) x[c] += sqrt(share[c]) * p[c * E + i] * gradient[i] / (load[i] + 1.0 / gamma);
        for (size_t b = 0; b <= c; b++) {
            double v = 0.0;
            for (size_t i = 0; i < E; i++) v += p[c * E + i] * p[b * E + i] / (load[i] + 1.0 / gamma);
            a[c * C + b] = (b == c ? 1.0 : 0.0) - sqrt(share[c] * share[b]) * v;
        }
    }
    if (!moe__cholesky_solve(C, a, x)) return 0;
    for (size_t i = 0; i < E; i++) {
        double v = gradient[i];
        for (size_t c = 0; c < C; c++) v += sqrt(share[c]) * p[c * E + i] * x[c];
        step[i] = -v / (load[i] + 1.0 / gamma);
    }
    return 1;
}

/* With y = gamma m: the minimum of F(y) = sum_c pi_c logsumexp(q^c - y) + |y|^2 / (2 gamma), which is strictly convex. */
static int moe__types_newton(size_t E, size_t C, const double *share, const double *quality, double gamma, double *load,
                             double *work, double *residual) {
    double *p = work, *y = p + C * E, *trial = y + E, *gradient = trial + E, *step = gradient + E, *best = step + E;
    double *a = best + E, *x = a + C * C, f, least = HUGE_VAL;
    *residual = 0.0;
    if (gamma <= 0.0) {
        (void)moe__types_load(E, C, share, quality, NULL, 1.0, p, load);
        return 1;
    }
    (void)moe__types_load(E, C, share, quality, NULL, 1.0 / (1.0 + gamma / (double)E), p, y);
    for (size_t i = 0; i < E; i++) y[i] *= gamma;
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double slope = 0.0, worst = 0.0, square = 0.0, t = 1.0;
        f = moe__types_load(E, C, share, quality, y, 1.0, p, load);
        for (size_t i = 0; i < E; i++) {
            gradient[i] = y[i] / gamma - load[i];
            square += y[i] * y[i];
            if (fabs(gradient[i]) > worst) worst = fabs(gradient[i]);
        }
        f += square / (2.0 * gamma);
        if (worst < least) {
            memcpy(best, load, E * sizeof *best);
        }
        if (worst < 1e-16 || (worst < 1e-11 && worst >= least)) { /* as near as rounding allows */
            memcpy(load, best, E * sizeof *load);
            *residual = worst < least ? worst : least;
            return round;
        }
        if (worst < least) least = worst;
        if (!moe__types_step(E, C, share, p, load, gamma, gradient, a, x, step)) return 0;
        for (size_t i = 0; i < E; i++) slope += gradient[i] * step[i];
        for (; t > 1e-9; t /= 2.0) { /* damped: until F falls. Near the minimum its fall is below rounding */
            double value;
            square = 0.0;
            for (size_t i = 0; i < E; i++) {
                trial[i] = y[i] + t * step[i];
                square += trial[i] * trial[i];
            }
            if (-slope < 1e-9 * (1.0 + fabs(f))) break;
            value = square / (2.0 * gamma);
            for (size_t c = 0; c < C; c++) value += share[c] * moe__softmax_double(E, quality + c * E, trial, 1.0, p + c * E);
            if (value <= f + 1e-4 * t * slope) break;
        }
        memcpy(y, trial, E * sizeof *y);
    }
    return 0;
}

MOE_API moe_status moe_game_types_solve(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                        double gamma, double *load, double *work, moe_game_info *info) {
    double residual;
    moe_status s = moe__game_types_ok(n_experts, n_types, share, quality);
    if (s) return s;
    if (!(gamma >= 0.0) || !moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    int rounds = moe__types_newton(n_experts, n_types, share, quality, gamma, load, work, &residual);
    if (!rounds) return MOE_E_GAME;
    if (info) info->iterations = rounds, info->residual = residual;
    return MOE_OK;
}

MOE_API moe_status moe_game_types_softmax(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                          double temperature, double *load, double *work) {
    moe_status s = moe__game_types_ok(n_experts, n_types, share, quality);
    if (s) return s;
    if (!(temperature > 0.0) || !moe__finite_double(1.0 / temperature)) return MOE_E_TEMPERATURE;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    (void)moe__types_load(n_experts, n_types, share, quality, NULL, 1.0 / temperature, work, load);
    return MOE_OK;
}

static void moe__predict_coupled(moe__curve *v, double u) {
    double residual, gamma = expm1(u) > 0.0 ? expm1(u) : 0.0;
    (void)moe__types_newton(v->n, v->n_types, v->share, v->quality, gamma, v->m, v->work, &residual);
}
static void moe__predict_independent(moe__curve *v, double u) {
    (void)moe__types_load(v->n, v->n_types, v->share, v->quality, NULL, exp(-u), v->work, v->m);
}

MOE_API moe_status moe_game_types_estimate(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                           const double *load, double *work, moe_game_types_fit *out) {
    size_t n = n_experts;
    moe_status s = moe__game_types_ok(n, n_types, share, quality);
    if (s) return s;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__game_total(n, load), u, *m = work, *prediction = work + n; /* the solver's work follows */
    if (!(total > 0.0)) return MOE_E_LOAD;
    for (size_t i = 0; i < n; i++) m[i] = load[i] / total;
    moe__curve v = moe__curve_of(moe__predict_coupled, n, quality, m, prediction);
    v.n_types = n_types;
    v.share = share;
    v.work = work + 2 * n;
    memset(out, 0, sizeof *out);
    out->l1_coupled = moe__curve_fit(&v, 0.0, MOE__GAMMA_END, &u);
    out->gamma = expm1(u);
    v.predict = moe__predict_independent;
    out->l1_independent = moe__curve_fit(&v, moe__log_temperature[0], moe__log_temperature[1], &u);
    out->temperature = exp(u);
    return MOE_OK;
}

/* -- scope -- */
MOE_API moe_status moe_game_feasible(size_t n_experts, size_t top_k, const double *load, int *feasible) {
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!top_k || top_k > n_experts) return MOE_E_TOP_K;
    if (!load) return MOE_E_NULL_LOAD;
    if (!feasible) return MOE_E_NULL_OUT;
    double total = moe__game_total(n_experts, load);
    if (!(total > 0.0)) return MOE_E_LOAD;
    *feasible = moe__max_of(n_experts, load) * (double)top_k <= total * (1.0 + 1e-12);
    return MOE_OK;
}

MOE_API moe_status moe_game_epsilon(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index, size_t n_next,
                                    const float *logits, const double *load, double gamma, size_t least, double *work,
                                    double *epsilon) {
    size_t n;
    double lowest = HUGE_VAL, highest = -HUGE_VAL;
    moe_status s = moe__index_ok(n_tokens, n_experts, top_k, index);
    if (s) return s;
    if (!n_next || n_next > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!moe__mul(n_tokens, n_next, &n)) return MOE_E_OVERFLOW;
    if (n && !logits) return MOE_E_NULL_LOGITS;
    if (!load) return MOE_E_NULL_LOAD;
    if (!moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!work) return MOE_E_NULL_WORK;
    if (!epsilon) return MOE_E_NULL_OUT;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    if (!(moe__game_total(n_next, load) > 0.0)) return MOE_E_LOAD;
    double *sum = work, *count = work + n_experts;
    for (size_t i = 0; i < n_experts; i++) sum[i] = count[i] = 0.0;
    for (size_t t = 0; t < n_tokens; t++) {
        const float *z = logits + t * n_next;
        double top = -HUGE_VAL, lse = 0.0;
        for (size_t j = 0; j < n_next; j++) top = fmax(top, (double)z[j] - gamma * load[j]);
        for (size_t j = 0; j < n_next; j++) lse += exp((double)z[j] - gamma * load[j] - top);
        for (size_t i = 0; i < top_k; i++) {
            int32_t e = index[t * top_k + i];
            if (e < 0) continue;
            sum[e] += top + log(lse);
            count[e] += 1.0;
        }
    }
    for (size_t i = 0; i < n_experts; i++) {
        if (!(count[i] > 0.0) || count[i] < (double)least) continue;
        lowest = fmin(lowest, sum[i] / count[i]);
        highest = fmax(highest, sum[i] / count[i]);
    }
    *epsilon = highest > lowest ? highest - lowest : 0.0;
    return MOE_OK;
}

MOE_API double moe_game_epsilon_bound(double epsilon, double gamma, size_t n_experts) {
    if (!(epsilon >= 0.0) || !(gamma >= 0.0) || !n_experts) return (double)NAN;
    return gamma > 0.0 ? epsilon / (2.0 * (1.0 + gamma / (double)n_experts)) : 2.0 * tanh(epsilon / 4.0);
}

/* -- quality -- */
static void moe__sort_doubles(size_t n, double *x) { /* heap sort, ascending */
    size_t start = n / 2;
    while (n > 1) {
        double v;
        if (start) v = x[--start];
        else v = x[--n], x[n] = x[0];
        size_t at = start, child;
        while ((child = 2 * at + 1) < n) {
            if (child + 1 < n && x[child + 1] > x[child]) child++;
            if (x[child] <= v) break;
            x[at] = x[child];
            at = child;
        }
        x[at] = v;
    }
}

MOE_API const char *moe_quality_name(moe_quality_kind v) {
    static const char *const names[] = {"mean", "log-prob", "selected", "median", "trimmed"};
    return (unsigned)v < MOE__QUALITY_COUNT ? names[v] : NULL;
}

MOE_API moe_status moe_game_quality(moe_quality_kind kind, size_t n_tokens, size_t n_experts, size_t top_k, const float *logits,
                                    const int32_t *index, double *work, double *quality) {
    size_t n, E = n_experts, T = n_tokens;
    if ((unsigned)kind >= MOE__QUALITY_COUNT) return MOE_E_QUALITY_KIND;
    if (!E || E > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!T) return MOE_E_N_BATCHES;
    if (!moe__mul(T, E, &n)) return MOE_E_OVERFLOW;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!quality) return MOE_E_NULL_QUALITY;
    int sorts = kind == MOE_QUALITY_MEDIAN || kind == MOE_QUALITY_TRIMMED;
    if ((sorts || kind == MOE_QUALITY_SELECTED) && !work) return MOE_E_NULL_WORK;
    moe_status s = kind == MOE_QUALITY_SELECTED ? moe__index_ok(T, E, top_k, index) : MOE_OK;
    if (s) return s;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    for (size_t e = 0; e < E; e++) quality[e] = 0.0;
    for (size_t e = 0; sorts && e < E; e++) {
        size_t cut = kind == MOE_QUALITY_TRIMMED ? T / 10 : (T - 1) / 2; /* left out at each end */
        for (size_t t = 0; t < T; t++) work[t] = (double)logits[t * E + e];
        moe__sort_doubles(T, work);
        for (size_t t = cut; t < T - cut; t++) quality[e] += work[t] / (double)(T - 2 * cut);
    }
    if (kind == MOE_QUALITY_SELECTED) {
        for (size_t e = 0; e < E; e++) work[e] = 0.0;
        for (size_t p = 0; p < T * top_k; p++) {
            if (index[p] < 0) continue;
            quality[index[p]] += (double)logits[p / top_k * E + (size_t)index[p]];
            work[index[p]] += 1.0;
        }
        for (size_t e = 0; e < E; e++) quality[e] = work[e] > 0.0 ? quality[e] / work[e] : -HUGE_VAL;
    }
    for (size_t t = 0; !sorts && kind != MOE_QUALITY_SELECTED && t < T; t++) {
        const float *z = logits + t * E;
        double top = (double)z[0], sum = 0.0;
        if (kind == MOE_QUALITY_MEAN) {
            for (size_t e = 0; e < E; e++) quality[e] += (double)z[e] / (double)T;
            continue;
        }
        for (size_t e = 0; e < E; e++) top = fmax(top, (double)z[e]);
        for (size_t e = 0; e < E; e++) sum += exp((double)z[e] - top);
        for (size_t e = 0; e < E; e++) quality[e] += exp((double)z[e] - top) / sum / (double)T;
    }
    for (size_t e = 0; kind == MOE_QUALITY_LOG_PROB && e < E; e++) quality[e] = log(quality[e]);
    return MOE_OK;
}

MOE_API moe_status moe_pearson(size_t n, const double *a, const double *b, double *r) {
    double count = 0.0, ma = 0.0, mb = 0.0, aa = 0.0, bb = 0.0, ab = 0.0;
    if (n && (!a || !b)) return MOE_E_NULL_QUALITY;
    if (!r) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(a[i]) || !moe__finite_double(b[i])) continue;
        count += 1.0;
        ma += (a[i] - ma) / count;
        mb += (b[i] - mb) / count;
    }
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(a[i]) || !moe__finite_double(b[i])) continue;
        aa += (a[i] - ma) * (a[i] - ma);
        bb += (b[i] - mb) * (b[i] - mb);
        ab += (a[i] - ma) * (b[i] - mb);
    }
    *r = aa > 0.0 && bb > 0.0 ? ab / (sqrt(aa) * sqrt(bb)) : (double)NAN;
    return MOE_OK;
}

/* -- a dump by batches -- */
static moe_status moe__game_layout(moe_game *g, size_t n_experts, size_t n_batches, moe__arena *a) {
    size_t n;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!n_batches) return MOE_E_N_BATCHES;
    if (!moe__mul(n_experts, n_batches, &n)) return MOE_E_OVERFLOW;
    memset(g, 0, sizeof *g);
    g->n_experts = n_experts;
    g->n_batches = n_batches;
    g->tokens = (uint64_t *)moe__take(a, n_batches, sizeof(uint64_t));
    g->count = (uint64_t *)moe__take(a, n, sizeof(uint64_t));
    g->logit = (double *)moe__take(a, n, sizeof(double));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_game_size(size_t n_experts, size_t n_batches, size_t *bytes) {
    moe_game g;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__game_layout(&g, n_experts, n_batches, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

MOE_API moe_status moe_game_init(moe_game *g, size_t n_experts, size_t n_batches, void *memory, size_t bytes) {
    size_t needed;
    moe__arena a;
    if (!g) return MOE_E_NULL_GAME;
    moe_status s = moe_game_size(n_experts, n_batches, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    if (!s) s = moe__game_layout(g, n_experts, n_batches, &a);
    return s ? s : moe_game_reset(g);
}

MOE_API moe_status moe_game_reset(moe_game *g) {
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    memset(g->tokens, 0, g->n_batches * sizeof *g->tokens);
    memset(g->count, 0, g->n_batches * g->n_experts * sizeof *g->count);
    for (size_t i = 0; i < g->n_batches * g->n_experts; i++) g->logit[i] = 0.0;
    return MOE_OK;
}

MOE_API moe_status moe_game_add(moe_game *g, size_t batch, size_t n_tokens, size_t top_k, const float *logits, const int32_t *index) {
    size_t n;
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    if (batch >= g->n_batches) return MOE_E_BATCH;
    if (!moe__mul(n_tokens, g->n_experts, &n)) return MOE_E_OVERFLOW;
    if (n && !logits) return MOE_E_NULL_LOGITS;
    moe_status s = moe__index_ok(n_tokens, g->n_experts, top_k, index);
    if (s) return s;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    g->tokens[batch] += n_tokens;
    for (size_t p = 0; p < n_tokens * top_k; p++)
        if (index[p] >= 0) g->count[batch * g->n_experts + (size_t)index[p]]++;
    moe__k()->sum_rows(n_tokens, g->n_experts, logits, g->logit + batch * g->n_experts);
    return MOE_OK;
}

MOE_API moe_status moe_game_merge(moe_game *g, const moe_game *other) {
    if (!g || !other || !g->tokens || !other->tokens) return MOE_E_NULL_GAME;
    if (g->n_experts != other->n_experts) return MOE_E_MERGE;
    if (g->n_batches != other->n_batches) return MOE_E_N_BATCHES;
    for (size_t b = 0; b < g->n_batches; b++) g->tokens[b] += other->tokens[b];
    for (size_t i = 0; i < g->n_batches * g->n_experts; i++) {
        g->count[i] += other->count[i];
        g->logit[i] += other->logit[i];
    }
    return MOE_OK;
}

/* Adds batch b to sums that begin at 0. */
static void moe__game_pour(const moe_game *g, size_t b, double *quality, double *load, double *tokens) {
    const uint64_t *count = g->count + b * g->n_experts;
    const double *logit = g->logit + b * g->n_experts;
    for (size_t i = 0; i < g->n_experts; i++) {
        quality[i] += logit[i];
        load[i] += (double)count[i];
    }
    *tokens += (double)g->tokens[b];
}
/* Sums -> mean logits and shares. */
static moe_status moe__game_settle(size_t n, double *quality, double *load, double tokens, double *selections) {
    double total = 0.0;
    for (size_t i = 0; i < n; i++) total += load[i];
    if (!(tokens > 0.0)) return MOE_E_N_BATCHES;
    if (!(total > 0.0)) return MOE_E_LOAD;
    for (size_t i = 0; i < n; i++) {
        quality[i] /= tokens;
        load[i] /= total;
    }
    *selections = total;
    return MOE_OK;
}

MOE_API moe_status moe_game_pool(const moe_game *g, const uint8_t *half, int which, double *quality, double *load, double *selections) {
    double tokens = 0.0, total;
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    if (!quality) return MOE_E_NULL_QUALITY;
    if (!load) return MOE_E_NULL_LOAD;
    for (size_t i = 0; i < g->n_experts; i++) quality[i] = load[i] = 0.0;
    for (size_t b = 0; b < g->n_batches; b++)
        if (!half || half[b] == which) moe__game_pour(g, b, quality, load, &tokens);
    return moe__game_settle(g->n_experts, quality, load, tokens, selections ? selections : &total);
}

MOE_API moe_status moe_game_split(const moe_game *g, uint64_t seed, uint8_t *half) {
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    if (!half) return MOE_E_NULL_OUT;
    size_t first = g->n_batches / 2;
    for (size_t b = 0; b < g->n_batches; b++) { /* of those left, so many still go to half 0 */
        double left = (double)(g->n_batches - b);
        half[b] = moe__uniform_double(seed, 0, b) * left >= (double)first;
        first -= !half[b];
    }
    return MOE_OK;
}

MOE_API moe_status moe_game_holdout(const moe_game *g, uint64_t seed, moe_game_fit *out) {
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    if (!out) return MOE_E_NULL_OUT;
    size_t n = g->n_experts;
    double selections, *quality = (double *)moe__alloc(g->alloc_context, 6 * n * sizeof(double)), c = 0.0;
    uint8_t *half = (uint8_t *)moe__alloc(g->alloc_context, g->n_batches);
    moe_status s = quality && half ? moe_game_split(g, seed, half) : MOE_E_NO_MEMORY;
    double *load = quality ? quality + n : NULL, *truth = quality ? load + n : NULL, *work = quality ? truth + 2 * n : NULL;
    moe_game_fit fit;
    if (!s) s = moe_game_pool(g, half, 1, work, truth, NULL);
    if (!s) s = moe_game_pool(g, half, 0, quality, load, &selections);
    if (!s) s = moe_game_estimate(n, quality, load, selections, work, &fit);
    if (!s) {
        fit.l1_uniform = 0.0;
        for (size_t i = 0; i < n; i++) fit.l1_uniform += fabs(truth[i] - 1.0 / (double)n);
        if (fit.temperature == fit.temperature) (void)moe_game_softmax(n, quality, fit.temperature, work);
        fit.l1_softmax = fit.temperature == fit.temperature ? moe__l1(n, work, truth) : fit.l1_uniform;
        fit.l1_game = (double)NAN;
        if (fit.identified && moe__game_rounds(n, quality, fit.gamma, 0, &c, work)) fit.l1_game = moe__l1(n, work, truth);
        *out = fit;
    }
    moe__free(g->alloc_context, half);
    moe__free(g->alloc_context, quality);
    return s;
}

MOE_API moe_status moe_interval(size_t n, double *x, double *lo, double *hi) {
    if (!n) return MOE_E_REPLICATES;
    if (!x) return MOE_E_NULL_X;
    if (!lo || !hi) return MOE_E_NULL_OUT;
    moe__sort_doubles(n, x);
    for (int i = 0; i < 2; i++) { /* between the neighbours in rank */
        double at = (i ? 0.975 : 0.025) * (double)(n - 1), rest = at - floor(at);
        size_t k = (size_t)at;
        *(i ? hi : lo) = k + 1 < n ? x[k] + rest * (x[k + 1] - x[k]) : x[k];
    }
    return MOE_OK;
}

typedef struct moe__boot {
    const moe_game *g;
    const size_t *batch; /* (n): those with tokens */
    size_t n;
    uint64_t seed;
    double start, *gamma, *work; /* work (workers, 3 E) */
} moe__boot;

static void moe__task_boot(void *arg, size_t r, size_t worker) {
    const moe__boot *j = (const moe__boot *)arg;
    size_t E = j->g->n_experts;
    double *quality = j->work + worker * 3 * E, *load = quality + E, tokens = 0.0, selections;
    for (size_t i = 0; i < E; i++) quality[i] = load[i] = 0.0;
    for (size_t i = 0; i < j->n; i++) {
        uint64_t draw = (uint64_t)moe_rand_u32(j->seed, 1 + (uint64_t)r, i) * j->n >> 32;
        moe__game_pour(j->g, j->batch[draw], quality, load, &tokens);
    }
    if (moe__game_settle(E, quality, load, tokens, &selections)) { /* batches of which none selects */
        j->gamma[r] = expm1(j->start);
        return;
    }
    moe__curve v = moe__curve_of(moe__predict_game, E, quality, load, load + E);
    j->gamma[r] = expm1(moe__curve_descend(&v, j->start, 0.0, MOE__GAMMA_END));
}

MOE_API moe_status moe_game_bootstrap(const moe_game *g, size_t replicates, uint64_t seed, const moe_parallel *parallel,
                                      double *gamma, double *lo, double *hi) {
    if (!g || !g->tokens) return MOE_E_NULL_GAME;
    if (!replicates) return MOE_E_REPLICATES;
    if (!gamma || !lo || !hi) return MOE_E_NULL_OUT;
    size_t E = g->n_experts, workers = moe_workers(parallel), count, *batch = NULL;
    double *work = NULL, *sorted = NULL, *mean, u = 0.0;
    moe__boot j;
    if (g->n_batches > UINT32_MAX || !moe__mul(workers, 3 * E, &count) || !moe__add_size(count, 3 * E, &count) ||
        !moe__mul(count, sizeof(double), &count) || replicates > SIZE_MAX / sizeof(double)) return MOE_E_OVERFLOW;
    work = (double *)moe__alloc(g->alloc_context, count);
    sorted = (double *)moe__alloc(g->alloc_context, replicates * sizeof *sorted);
    batch = (size_t *)moe__alloc(g->alloc_context, g->n_batches * sizeof *batch);
    moe_status s = work && sorted && batch ? MOE_OK : MOE_E_NO_MEMORY;
    memset(&j, 0, sizeof j);
    for (size_t b = 0; !s && b < g->n_batches; b++)
        if (g->tokens[b]) batch[j.n++] = b;
    if (!s && j.n < 2) s = MOE_E_N_BATCHES;
    if (!s) s = moe_game_pool(g, NULL, 0, work, work + E, NULL);
    if (!s) {
        mean = work + workers * 3 * E;
        memcpy(mean, work, 2 * E * sizeof *mean);
        moe__curve v = moe__curve_of(moe__predict_game, E, mean, mean + E, mean + 2 * E);
        (void)moe__curve_fit(&v, 0.0, MOE__GAMMA_END, &u);
        j.g = g;
        j.batch = batch;
        j.seed = seed;
        j.start = u;
        j.gamma = gamma;
        j.work = work;
        moe_run(parallel, replicates, moe__task_boot, &j);
        memcpy(sorted, gamma, replicates * sizeof *sorted);
        s = moe_interval(replicates, sorted, lo, hi);
    }
    moe__free(g->alloc_context, batch);
    moe__free(g->alloc_context, sorted);
    moe__free(g->alloc_context, work);
    return s;
}

/* -- phases of a series -- */
MOE_API const char *moe_phase_name(moe_phase v) {
    static const char *const names[] = {"none", "dormant", "surge", "stabilisation", "relaxation"};
    return (unsigned)v < MOE__PHASE_COUNT ? names[v] : NULL;
}

static double moe__median3(double a, double b, double c) { return fmax(fmin(a, b), fmin(fmax(a, b), c)); }

/* Sum of squares left by two lines that meet at x[b], over points first .. n - 1, first < b < n - 1. */
static double moe__two_lines(size_t first, size_t n, size_t b, const double *x, const double *y) {
    double count = (double)(n - first), sy = 0.0, left = 0.0, right = 0.0, ll = 0.0, rr = 0.0, ly = 0.0, ry = 0.0, sum = 0.0;
    double scale = x[n - 1] - x[first];
    for (size_t i = first; i < n; i++) {
        double d = (x[i] - x[b]) / scale, l = fmin(d, 0.0), r = fmax(d, 0.0);
        sy += y[i], left += l, right += r, ll += l * l, rr += r * r, ly += l * y[i], ry += r * y[i];
    }
    double level = (sy - left * ly / ll - right * ry / rr) / (count - left * left / ll - right * right / rr);
    double before = (ly - left * level) / ll, after = (ry - right * level) / rr;
    for (size_t i = first; i < n; i++) {
        double d = (x[i] - x[b]) / scale, e = y[i] - level - before * fmin(d, 0.0) - after * fmax(d, 0.0);
        sum += e * e;
    }
    return sum;
}

MOE_API moe_status moe_game_phases(size_t n, const double *step, const double *gamma, const double *lo, const double *hi,
                                   double *work, moe_phase *phase) {
    if (!n) return MOE_OK;
    if (!step || !gamma || !lo || !hi) return MOE_E_NULL_QUALITY;
    if (!work) return MOE_E_NULL_WORK;
    if (!phase) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(step[i]) || !moe__finite_double(gamma[i])) return MOE_E_SERIES;
        if (!moe__finite_double(lo[i]) || !moe__finite_double(hi[i]) || (i && !(step[i] > step[i - 1]))) return MOE_E_SERIES;
    }
    size_t top = 0, peak = 0, dormant = 0, end = n - 1, at = 0;
    double least = HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        phase[i] = MOE_PHASE_NONE;
        work[i] = i && i < end ? moe__median3(gamma[i - 1], gamma[i], gamma[i + 1]) : gamma[i];
        if (work[i] > work[top]) top = i;
    }
    while (peak < top && hi[peak] < lo[top]) peak++; /* the first that cannot be told from the highest */
    while (dormant < peak && lo[dormant] <= hi[0] && hi[dormant] >= lo[0]) dormant++;
    if (dormant < 3) dormant = 0; /* one or two in line are a surge that begins slowly */
    for (size_t i = 0; peak && i <= peak; i++) phase[i] = i < dormant ? MOE_PHASE_DORMANT : MOE_PHASE_SURGE;
    for (size_t b = peak + 1; b < end; b++) {
        double sum = moe__two_lines(peak, n, b, step, gamma);
        if (sum < least) least = sum, at = b;
    }
    int falls = least < HUGE_VAL && hi[end] < lo[at];
    if (falls && !peak) phase[0] = MOE_PHASE_STABILISATION;
    for (size_t i = peak + 1; i < n && (falls || peak); i++)
        phase[i] = falls && i > at ? MOE_PHASE_RELAXATION : MOE_PHASE_STABILISATION;
    return MOE_OK;
}

/* -- feedback, after arXiv 2605.29121 [D] -- */
MOE_API moe_status moe_feedback_two(double kf, double h, double *u) {
    if (!moe__finite_double(kf) || !moe__finite_double(h)) return MOE_E_FEEDBACK;
    if (!u) return MOE_E_NULL_OUT;
    /* F(v) = (Kf tanh v + h) / 2 - v with u = tanh v. For Kf > 0 it is concave where v > 0: Newton from the right comes to the
     * largest root there, or to a point from where F only rises to the left: then there is none, and one where v <= 0. */
    double hi = (fabs(kf) + fabs(h)) / 2.0 + 1.0, lo = -hi, v = hi;
    for (int i = 0; i < 200 && kf > 0.0; i++) {
        double t = tanh(v), f = (kf * t + h) / 2.0 - v, slope = kf * (1.0 - t * t) / 2.0 - 1.0;
        if (fabs(f) <= 4e-16 * (1.0 + v)) {
            *u = t;
            return MOE_OK;
        }
        double next = v - f / slope;
        if (slope >= 0.0 || !(next < v)) {
            if (slope < 0.0) { /* only rounding is left */
                *u = t;
                return MOE_OK;
            }
            break;
        }
        if (next <= 0.0) break;
        v = next;
    }
    if (kf > 0.0) hi = 0.0;
    for (int i = 0; i < 200; i++) { /* one root in [lo, hi] */
        v = lo + (hi - lo) / 2.0;
        if ((kf * tanh(v) + h) / 2.0 - v > 0.0) lo = v;
        else hi = v;
    }
    *u = tanh(v);
    return MOE_OK;
}

MOE_API moe_status moe_feedback_fold(double kf, double *u, double *h) {
    if (!(kf >= 2.0) || !moe__finite_double(kf)) return MOE_E_FEEDBACK;
    if (!u || !h) return MOE_E_NULL_OUT;
    *u = sqrt(1.0 - 2.0 / kf);
    *h = log1p(*u) - log1p(-*u) - kf * *u; /* 2 atanh(u) - Kf u */
    return MOE_OK;
}

/* One expert with odds e^s against each other one is a steady state at this Kf. */
static double moe__feedback_kf(double n, double s) { return s * (exp(s) + n - 1.0) / expm1(s); }

MOE_API moe_status moe_feedback_thresholds(size_t n_experts, double *ks, double *kc) {
    if (n_experts < 2 || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!ks || !kc) return MOE_E_NULL_OUT;
    const double ratio = 0.6180339887498949;
    double n = (double)n_experts, lo = 1e-9, hi = 2.0 * log(n) + 4.0;
    for (int i = 0; i < 120; i++) { /* one minimum */
        double a = hi - ratio * (hi - lo), b = lo + ratio * (hi - lo);
        if (moe__feedback_kf(n, a) <= moe__feedback_kf(n, b)) hi = b;
        else lo = a;
    }
    *ks = n_experts == 2 ? 2.0 : moe__feedback_kf(n, (lo + hi) / 2.0);
    *kc = n_experts == 2 ? 2.0 : 2.0 * (n - 1.0) / (n - 2.0) * log(n - 1.0);
    return MOE_OK;
}

MOE_API moe_status moe_feedback_fit(size_t n_steps, size_t n_experts, double dt, const double *s, const double *p, double *a,
                                    double *lambda) {
    size_t n;
    double pp = 0.0, ps = 0.0, ss = 0.0, py = 0.0, sy = 0.0;
    if (!n_experts || n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (n_steps < 2 || !moe__mul(n_steps, n_experts, &n)) return MOE_E_SERIES;
    if (!(dt > 0.0) || !moe__finite_double(dt)) return MOE_E_FEEDBACK;
    if (!s || !p) return MOE_E_NULL_QUALITY;
    if (!a || !lambda) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n - n_experts; i++) {
        double y = (s[i + n_experts] - s[i]) / dt;
        pp += p[i] * p[i], ps += p[i] * s[i], ss += s[i] * s[i], py += p[i] * y, sy += s[i] * y;
    }
    double determinant = pp * ss - ps * ps;
    if (!(determinant > 1e-14 * pp * ss) || !moe__finite_double(py + sy)) return MOE_E_FEEDBACK; /* p and s are in proportion */
    *a = (py * ss - sy * ps) / determinant;
    *lambda = -(pp * sy - ps * py) / determinant;
    return MOE_OK;
}

/* ==== layer =================================================================================== */
/* The fields of moe_desc, once: for its JSON and for a file's metadata. */
typedef enum moe__field_type {
    MOE__FIELD_SIZE,
    MOE__FIELD_U64,
    MOE__FIELD_FLOAT, /* "off" for MOE_OFF */
    MOE__FIELD_LOSS,  /* MOE_LOSS_COUNT floats, named "loss." and the name of the loss; the last row */
    MOE__FIELD_INT,   /* by name: true, false, null = unset */
    MOE__FIELD_ENUM   /* by name */
} moe__field_type;

typedef struct moe__field {
    const char *name;
    size_t offset, size;
    moe__field_type type;
    const char *(*value_name)(int); /* NULL for no such value */
} moe__field;

static const char *moe__flag_word(int v) {
    return v == MOE_ON ? "true" : v == MOE_OFF ? "false" : v == MOE_DEFAULT ? "null" : NULL;
}
#define MOE__ENUM_WORD(kind)                                                                                 \
    static const char *moe__##kind##_word(int v) {                                                           \
        return v < 0 ? NULL : v == MOE_DEFAULT ? "default" : moe_##kind##_name((moe_##kind##_kind)v);        \
    }
MOE__ENUM_WORD(score)
MOE__ENUM_WORD(gate)
MOE__ENUM_WORD(select)
MOE__ENUM_WORD(expert)
MOE__ENUM_WORD(order)
MOE__ENUM_WORD(optimizer)
#undef MOE__ENUM_WORD

#define MOE__FIELD(member, type, value_name)                                                                 \
    { #member, offsetof(moe_desc, member), sizeof(((moe_desc *)0)->member), MOE__FIELD_##type, value_name }
static const moe__field moe__fields[] = {
    MOE__FIELD(d_model, SIZE, NULL),
    MOE__FIELD(d_ff, SIZE, NULL),
    MOE__FIELD(n_experts, SIZE, NULL),
    MOE__FIELD(top_k, SIZE, NULL),
    MOE__FIELD(n_shared, SIZE, NULL),
    MOE__FIELD(score, ENUM, moe__score_word),
    MOE__FIELD(gate, ENUM, moe__gate_word),
    MOE__FIELD(select, ENUM, moe__select_word),
    MOE__FIELD(expert, ENUM, moe__expert_word),
    MOE__FIELD(capacity_order, ENUM, moe__order_word),
    MOE__FIELD(normalize, INT, moe__flag_word),
    MOE__FIELD(bias, INT, moe__flag_word),
    MOE__FIELD(temperature, FLOAT, NULL),
    MOE__FIELD(capacity_factor, FLOAT, NULL),
    MOE__FIELD(training, INT, moe__flag_word),
    MOE__FIELD(optimizer, ENUM, moe__optimizer_word),
    MOE__FIELD(beta1, FLOAT, NULL),
    MOE__FIELD(beta2, FLOAT, NULL),
    MOE__FIELD(epsilon, FLOAT, NULL),
    MOE__FIELD(momentum, FLOAT, NULL),
    MOE__FIELD(weight_decay, FLOAT, NULL),
    MOE__FIELD(clip_norm, FLOAT, NULL),
    MOE__FIELD(seed, U64, NULL),
    MOE__FIELD(loss, LOSS, NULL)
};
#undef MOE__FIELD
#define MOE__FIELD_COUNT (sizeof(moe__fields) / sizeof(moe__fields[0]))

/* Text into p, cut at `size`; n counts what it needs, as snprintf does. */
typedef struct moe__text {
    char *p;
    size_t size, n;
} moe__text;

static void moe__text_char(moe__text *t, char c) {
    if (t->n < t->size) t->p[t->n] = c;
    t->n++;
}
static void moe__text_add(moe__text *t, const char *s) {
    while (*s) moe__text_char(t, *s++);
}
static void moe__text_end(moe__text *t) {
    if (t->size) t->p[t->n < t->size ? t->n : t->size - 1] = 0;
}
static void moe__text_u64(moe__text *t, uint64_t v) {
    char digit[20];
    int n = 0;
    do digit[n++] = (char)('0' + v % 10); while (v /= 10);
    while (n) moe__text_char(t, digit[--n]);
}

/* x * 10^e; wrong by no more than a relative 1e-14 while the power is finite. */
static double moe__scale10(double x, int e) {
    double power = 1;
    int i;
    for (i = e < 0 ? -e : e; i > 0; i--) power *= 10;
    return e < 0 ? x / power : x * power;
}

/* The fewest digits, at most 9, that every correct reader turns back into v. No locale is asked. */
static void moe__text_float(moe__text *t, float v) {
    double a = v < 0 ? -(double)v : (double)v;
    char digit[20];
    moe__text number = { NULL, 0, 0 };
    uint64_t mantissa = 0;
    int e = 0, n, i;
    if (!(a <= FLT_MAX)) {
        moe__text_add(t, "null");
        return;
    }
    if (v < 0) moe__text_char(t, '-');
    if (a > 0) {
        while (moe__scale10(1, e + 1) <= a) e++;
        while (moe__scale10(1, e) > a) e--;
    }
    for (n = 1;; n++) {
        double back;
        mantissa = (uint64_t)(moe__scale10(a, n - 1 - e) + 0.5);
        back = moe__scale10((double)mantissa, e - n + 1);
        /* the margin is wider than the error of scale10: the decimal number itself rounds to v */
        if (n == 9 || ((float)(back * (1 - 1e-12)) == (float)a && (float)(back * (1 + 1e-12)) == (float)a)) break;
    }
    number.p = digit;
    number.size = sizeof digit;
    moe__text_u64(&number, mantissa);
    if (number.n > (size_t)n) e++; /* 9.99 became 10.0 */
    n = (int)number.n;
    while (n > 1 && digit[n - 1] == '0') n--;
    if (e >= -5 && e < 9) { /* 0.00125, 12.5, 1250 */
        if (e < 0) moe__text_add(t, "0.");
        for (i = e; i < -1; i++) moe__text_char(t, '0');
        for (i = 0; i < n || i <= e; i++) {
            if (i == e + 1 && e >= 0) moe__text_char(t, '.');
            moe__text_char(t, i < n ? digit[i] : '0');
        }
    } else { /* 1.25e-8 */
        for (i = 0; i < n; i++) {
            if (i == 1) moe__text_char(t, '.');
            moe__text_char(t, digit[i]);
        }
        moe__text_add(t, e < 0 ? "e-" : "e");
        moe__text_u64(t, (uint64_t)(e < 0 ? -e : e));
    }
}

static int moe__field_int(const moe__field *f, const moe_desc *d) {
    int v;
    unsigned char small; /* an enum, where the compiler makes them short */
    memcpy(&small, (const char *)d + f->offset, 1);
    if (f->size == 1) return small;
    memcpy(&v, (const char *)d + f->offset, sizeof v);
    return v;
}

/* Row i of the table, its losses counted one by one, with the loss's name in `name`; 0 past the end. */
static int moe__field_at(size_t i, moe__field *f, char name[32]) {
    moe__text t;
    size_t loss = i + 1 < MOE__FIELD_COUNT ? 0 : i + 1 - MOE__FIELD_COUNT;
    if (loss >= MOE_LOSS_COUNT) return 0;
    *f = moe__fields[i - loss];
    if (f->type != MOE__FIELD_LOSS) return 1;
    t.p = name;
    t.size = 32;
    t.n = 0;
    moe__text_add(&t, "loss.");
    moe__text_add(&t, moe_loss_name((moe_loss_kind)loss));
    moe__text_end(&t);
    f->name = name;
    f->offset += loss * sizeof(float);
    f->size = sizeof(float);
    f->type = MOE__FIELD_FLOAT;
    return 1;
}

/* The field's value as JSON; `quoted`: as a string, whatever it is. */
static void moe__field_write(const moe__field *f, const moe_desc *d, int quoted, moe__text *t) {
    const char *value = (const char *)d + f->offset, *word = NULL;
    size_t size;
    uint64_t u64 = 0;
    float number = 0;
    switch (f->type) {
    case MOE__FIELD_SIZE: memcpy(&size, value, sizeof size); u64 = size; break;
    case MOE__FIELD_U64: memcpy(&u64, value, sizeof u64); break;
    case MOE__FIELD_FLOAT:
    case MOE__FIELD_LOSS:
        memcpy(&number, value, sizeof number);
        if (number == (float)MOE_OFF) word = "off";
        break;
    case MOE__FIELD_INT:
    case MOE__FIELD_ENUM:
        word = f->value_name(moe__field_int(f, d));
        if (!word) word = f->type == MOE__FIELD_INT ? "null" : "unknown";
        break;
    }
    quoted = quoted || (word && f->type != MOE__FIELD_INT);
    if (quoted) moe__text_char(t, '"');
    if (word) moe__text_add(t, word);
    else if (f->type == MOE__FIELD_FLOAT) moe__text_float(t, number);
    else moe__text_u64(t, u64);
    if (quoted) moe__text_char(t, '"');
}

/* "name":value for every field, separated by commas. */
static void moe__fields_write(const moe_desc *d, int quoted, moe__text *t) {
    moe__field f;
    char name[32];
    size_t i;
    for (i = 0; moe__field_at(i, &f, name); i++) {
        if (i) moe__text_char(t, ',');
        moe__text_char(t, '"');
        moe__text_add(t, f.name);
        moe__text_add(t, "\":");
        moe__field_write(&f, d, quoted, t);
    }
}

MOE_API size_t moe_desc_json(const moe_desc *d, char *buffer, size_t size) {
    moe__text t;
    t.p = buffer;
    t.size = buffer ? size : 0;
    t.n = 0;
    if (d) {
        moe__text_char(&t, '{');
        moe__fields_write(d, 0, &t);
        moe__text_char(&t, '}');
    }
    moe__text_end(&t);
    return t.n;
}

/* Tensor i of a layer with this resolved desc: the same list for the layer and for its files; 0 past the end. */
static int moe__desc_tensor(const moe_desc *d, size_t i, moe_tensor *out) {
    static const struct {
        const char *name, *dim; /* G experts with the shared, E routed, d = d_model, f = d_ff */
        int gated, bias;        /* only for gated experts, only with biases */
    } rows[] = {
        { "router", "dE", 0, 0 },
        { "experts.w1", "Gdf", 0, 0 },
        { "experts.wu", "Gdf", 1, 0 },
        { "experts.w2", "Gfd", 0, 0 },
        { "experts.b1", "Gf", 0, 1 },
        { "experts.bu", "Gf", 1, 1 },
        { "experts.b2", "Gd", 0, 1 }
    };
    int gated = d->expert == MOE_EXPERT_SWIGLU || d->expert == MOE_EXPERT_GEGLU;
    size_t r, k;
    for (r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        if ((rows[r].gated && !gated) || (rows[r].bias && d->bias != MOE_ON) || i-- > 0) continue;
        out->name = rows[r].name;
        out->count = 1;
        out->dim[2] = 1;
        for (k = 0; rows[r].dim[k]; k++) {
            char c = rows[r].dim[k];
            out->dim[k] = c == 'd' ? d->d_model : c == 'f' ? d->d_ff : d->n_experts + (c == 'G' ? d->n_shared : 0);
            out->count *= out->dim[k];
        }
        out->n_dims = k;
        return 1;
    }
    return 0;
}

static int moe__not_off(float v, int zero_allowed) { return moe__finite(v) && (v > 0.0f || (zero_allowed && v == 0.0f)); }

MOE_API moe_status moe_desc_resolve(const moe_desc *in, moe_desc *out) {
    if (!in) return MOE_E_NULL_DESC;
    if (!out) return MOE_E_NULL_OUT;
    moe_desc d = *in;
    const float off = MOE_OFF;
    if (!d.d_model) return MOE_E_D_MODEL;
    if (!d.d_ff && !moe__mul(d.d_model, 4, &d.d_ff)) return MOE_E_OVERFLOW;
    if (!d.n_experts) d.n_experts = 8;
    if (d.n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!d.top_k) d.top_k = d.n_experts > 1 ? 2 : 1;
    if (d.top_k > d.n_experts) return MOE_E_TOP_K;
    if (!d.score) d.score = MOE_SCORE_LINEAR;
    if (!d.gate) d.gate = MOE_GATE_SOFTMAX;
    if (!d.select) d.select = MOE_SELECT_TOP_K;
    if (!d.expert) d.expert = MOE_EXPERT_SWIGLU;
    if (!d.capacity_order) d.capacity_order = MOE_ORDER_TOKEN;
    if (!d.optimizer) d.optimizer = MOE_OPTIMIZER_ADAMW;
    if ((unsigned)d.score >= MOE__SCORE_COUNT) return MOE_E_SCORE;
    if ((unsigned)d.gate >= MOE__GATE_COUNT) return MOE_E_GATE;
    if ((unsigned)d.select >= MOE__SELECT_COUNT) return MOE_E_SELECT;
    if ((unsigned)d.expert >= MOE__EXPERT_COUNT) return MOE_E_EXPERT;
    if ((unsigned)d.capacity_order >= MOE__ORDER_COUNT) return MOE_E_CAPACITY_ORDER;
    if ((unsigned)d.optimizer >= MOE__OPTIMIZER_COUNT) return MOE_E_OPTIMIZER;
    if (d.normalize < MOE_OFF || d.normalize > MOE_ON) return MOE_E_NORMALIZE;
    if (d.bias < MOE_OFF || d.bias > MOE_ON) return MOE_E_BIAS;
    if (d.training < MOE_OFF || d.training > MOE_ON) return MOE_E_TRAINING;
    if (!d.normalize) d.normalize = d.top_k > 1 ? MOE_ON : MOE_OFF;
    if (!d.bias) d.bias = MOE_OFF;
    if (!d.training) d.training = MOE_ON;
    if (d.temperature == 0.0f) d.temperature = 1.0f;
    if (!moe__temperature_ok(d.temperature)) return MOE_E_TEMPERATURE;
    if (d.capacity_factor == 0.0f) d.capacity_factor = off;
    if (d.capacity_factor != off && !moe__not_off(d.capacity_factor, 0)) return MOE_E_CAPACITY_FACTOR;
    for (int i = 0; i < MOE_LOSS_COUNT; i++)
        if (d.loss[i] != off && !moe__not_off(d.loss[i], 1)) return MOE_E_LOSS;
    if (d.beta1 == 0.0f) d.beta1 = 0.9f;
    if (d.beta2 == 0.0f) d.beta2 = 0.999f;
    if (d.epsilon == 0.0f) d.epsilon = 1e-8f;
    if (d.momentum == 0.0f) d.momentum = 0.9f;
    if (d.weight_decay == 0.0f) d.weight_decay = 0.01f;
    if (d.clip_norm == 0.0f) d.clip_norm = off;
    if (d.beta1 != off && !(d.beta1 > 0.0f && d.beta1 < 1.0f)) return MOE_E_BETA1;
    if (d.beta2 != off && !(d.beta2 > 0.0f && d.beta2 < 1.0f)) return MOE_E_BETA2;
    if (!moe__not_off(d.epsilon, 0)) return MOE_E_EPSILON;
    if (d.momentum != off && !(d.momentum > 0.0f && d.momentum < 1.0f)) return MOE_E_MOMENTUM;
    if (d.weight_decay != off && !moe__not_off(d.weight_decay, 0)) return MOE_E_WEIGHT_DECAY;
    if (d.clip_norm != off && !moe__not_off(d.clip_norm, 0)) return MOE_E_CLIP_NORM;
    if (!d.seed) d.seed = 1;
    moe__dims s;
    moe_status st = moe__dims_of(&d, &s);
    if (st) return st;
    *out = d;
    return MOE_OK;
}

/* -- tape -- */
enum { MOE__STATE_TOKENS = 1, MOE__STATE_ROUTED = 2, MOE__STATE_FORWARD = 4 };

static moe_status moe__tape_layout(moe_tape **out, const moe_desc *resolved, size_t n, int training, moe__arena *a) {
    moe_tape t;
    moe__tape_memory m;
    memset(&t, 0, sizeof t);
    memset(&m, 0, sizeof m);
    m.d = *resolved;
    m.max_tokens = n;
    m.training = training != MOE_OFF;
    moe_status s = moe__dims_of(resolved, &m.dims);
    const moe__dims *d = &m.dims;
    size_t routed, shared;
    if (s) return s;
    if (!moe__mul(n, d->S, &routed) || !moe__mul(n, d->G - d->E, &shared) || !moe__add_size(routed, shared, &m.n_rows) ||
        m.n_rows > MOE__MAX_INDEX)
        return MOE_E_OVERFLOW;
    moe_tape *tp = (moe_tape *)moe__take(a, 1, sizeof t);
    t.memory = (moe__tape_memory *)moe__take(a, 1, sizeof m);
    s = moe__routes_layout(&t.routes, n, d->S, d->E, a);
    if (s) return s;
    t.logits = moe__take_floats(a, n, d->E);
    t.prob = moe__take_floats(a, n, d->E);
    t.scores = moe__gates[resolved->gate].scores_are_prob ? t.prob : t.logits;
    t.index = (int32_t *)moe__take(a, routed, sizeof(int32_t));
    t.weight = (float *)moe__take(a, routed, sizeof(float));
    m.xp = moe__take_floats(a, n, d->dp * MOE__W);
    m.router = moe__take_floats(a, moe__max(d->ep * d->d, d->dp * d->E), MOE__W);
    m.bad = (unsigned char *)moe__take(a, moe__ceil_div(n, MOE__TOKENS), 1);
    m.group = (moe__group *)moe__take(a, d->G, sizeof(moe__group));
    m.first = (size_t *)moe__take(a, d->G + 1, sizeof(size_t));
    m.xg = moe__take_floats(a, routed, d->dp * MOE__W);
    m.h = moe__take_floats(a, m.n_rows, d->hp * MOE__W);
    m.o = moe__take_floats(a, m.n_rows, d->ldo);
    if (m.training) {
        m.z = moe__take_floats(a, m.n_rows, d->zp * MOE__W);
        m.dlogits = moe__take_floats(a, n, d->E);
        m.dl = moe__take_floats(a, n, d->ep * MOE__W);
        m.slot_grad = moe__take_floats(a, n, d->S);
        m.part = moe__take_floats(a, m.n_rows, d->hp);
        m.dweight = moe__take_floats(a, routed, 1);
    }
    if (a->overflow) return MOE_E_OVERFLOW;
    if (a->base) {
        *tp = t;
        *tp->memory = m;
        *out = tp;
        return moe_routes_fill(&tp->routes, 0, NULL, NULL, 0, MOE_ORDER_DEFAULT);
    }
    return MOE_OK;
}

static moe_status moe__tape_bytes(const moe_desc *resolved, size_t n, int training, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    moe_status s = moe__tape_layout(NULL, resolved, n, training, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

MOE_API moe_status moe_tape_size(const moe_desc *d, size_t max_tokens, int training, size_t *bytes) {
    moe_desc r;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe_desc_resolve(d, &r);
    if (!s && (training < MOE_OFF || training > MOE_ON)) s = MOE_E_TRAINING;
    return s ? s : moe__tape_bytes(&r, max_tokens, training, bytes);
}

MOE_API moe_status moe_tape_init(moe_tape **out, const moe_desc *d, size_t max_tokens, int training, void *memory, size_t bytes) {
    moe_desc r;
    size_t needed;
    moe__arena a;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status s = moe_desc_resolve(d, &r);
    if (!s) s = moe_tape_size(d, max_tokens, training, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    return s ? s : moe__tape_layout(out, &r, max_tokens, training, &a);
}

MOE_API moe_status moe_tape_new(moe_tape **out, const moe_desc *d, size_t max_tokens, int training) {
    size_t bytes;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status s = moe_tape_size(d, max_tokens, training, &bytes);
    if (s) return s;
    void *memory = moe__alloc(d->alloc_context, bytes);
    if (!memory) return MOE_E_NO_MEMORY;
    s = moe_tape_init(out, d, max_tokens, training, memory, bytes);
    if (s) moe__free(d->alloc_context, memory);
    else (*out)->memory->own = memory;
    return s;
}

MOE_API void moe_tape_free(moe_tape *t) {
    if (t && t->memory->own) moe__free(t->memory->d.alloc_context, t->memory->own);
}

/* Whether a tape's memory fits a desc; the rest of the desc may differ. */
static moe_status moe__job_begin(moe__job *j, const moe_desc *resolved, moe_tape *t) {
    if (!t) return MOE_E_NULL_TAPE;
    const moe_desc *a = resolved, *b = &t->memory->d;
    if (a->d_model != b->d_model || a->d_ff != b->d_ff || a->n_experts != b->n_experts || a->top_k != b->top_k ||
        a->n_shared != b->n_shared || a->expert != b->expert || a->bias != b->bias || a->gate != b->gate)
        return MOE_E_TAPE_DESC;
    memset(j, 0, sizeof *j);
    j->d = resolved;
    j->dims = &t->memory->dims;
    j->kn = moe__k();
    j->t = t;
    j->m = t->memory;
    return MOE_OK;
}

static void moe__pack_tokens(const moe__job *j, size_t t0, size_t t1) {
    for (size_t p = 0; p < j->dims->dp; p++)
        moe__fill_panel(j->x, j->dims->d, t0, t1 - t0, p * MOE__W, moe__min(MOE__W, j->dims->d - p * MOE__W),
                        j->m->xp + (p * j->t->n_tokens + t0) * MOE__W);
}
static void moe__task_tokens(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    (void)worker;
    moe__pack_tokens(j, MOE__BLOCK_BEGIN(i), MOE__BLOCK_END(i, j->t->n_tokens));
}
static void moe__task_route(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens), E = j->dims->E;
    (void)worker;
    moe__pack_tokens(j, t0, t1);
    moe__scores[j->d->score].forward(j, t0, t1);
    j->m->bad[i] = (unsigned char)!moe__all_finite((t1 - t0) * E, j->t->logits + t0 * E);
    if (j->m->bad[i]) return;
    for (size_t t = t0; t < t1; t++)
        j->kn->softmax(E, 1.0f / j->d->temperature, j->t->logits + t * E, j->t->prob + t * E);
    moe__selects[j->d->select].select(j, t0, t1);
    moe__gates[j->d->gate].weights(j, t0, t1);
}

static moe_status moe__tokens_begin(moe__job *j, const moe_desc *resolved, moe_tape *t, const float *x, size_t n) {
    moe_status s = moe__job_begin(j, resolved, t);
    if (s) return s;
    if (n > t->memory->max_tokens) return MOE_E_N_TOKENS;
    if (n && !x) return MOE_E_NULL_X;
    t->memory->state = 0;
    t->n_tokens = n;
    t->routes.n_tokens = t->routes.n_routes = 0;
    j->x = x;
    return MOE_OK;
}

static size_t moe__capacity(const moe_desc *d, size_t n_tokens) {
    if (d->capacity_factor < 0.0f || !n_tokens) return 0;
    double c = (double)d->capacity_factor * (double)d->top_k * (double)moe__ceil_div(n_tokens, d->n_experts);
    return c >= (double)n_tokens ? 0 : moe__max(1, (size_t)c);
}

static moe_status moe__route(const moe_desc *d, const float *router, const float *x, size_t n, moe_tape *t) {
    moe__job j;
    moe_status s = moe__tokens_begin(&j, d, t, x, n);
    if (s) return s;
    if (!router) return MOE_E_NULL_PARAMS;
    j.router = router;
    moe__scores[d->score].prepare(&j);
    moe_run(&d->parallel, moe__ceil_div(n, MOE__TOKENS), moe__task_route, &j);
    for (size_t i = 0; i < moe__ceil_div(n, MOE__TOKENS); i++)
        if (t->memory->bad[i]) return MOE_E_NAN_X;
    s = moe_routes_fill(&t->routes, n, t->index, t->weight, moe__capacity(d, n), d->capacity_order);
    if (!s) t->memory->state = MOE__STATE_TOKENS | MOE__STATE_ROUTED;
    return s;
}

static void moe__task_gate_back(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens), S = j->dims->S, E = j->dims->E;
    (void)worker;
    for (size_t p = t0 * S; p < t1 * S; p++) {
        uint32_t route = j->t->routes.slot[p];
        j->m->slot_grad[p] = j->dweight && route != MOE_NONE ? j->dweight[route] : 0.0f;
    }
    memset(j->m->dlogits + t0 * E, 0, (t1 - t0) * E * sizeof(float));
    if (j->dweight) moe__gates[j->d->gate].backward(j, t0, t1);
}

static moe_status moe__route_backward(const moe_desc *d, const float *router, moe_tape *t, const float *dweight, const uint64_t *load,
                                      float *drouter, float *dx) {
    moe__job j;
    moe_status s = moe__job_begin(&j, d, t);
    if (s) return s;
    if (!router) return MOE_E_NULL_PARAMS;
    if (!(t->memory->state & MOE__STATE_ROUTED) || !t->memory->training) return MOE_E_NO_FORWARD;
    j.router = router;
    j.dweight = dweight;
    j.drouter = drouter;
    j.dx = dx;
    moe_run(&d->parallel, moe__ceil_div(t->n_tokens, MOE__TOKENS), moe__task_gate_back, &j);
    for (int i = 0; i < MOE_LOSS_COUNT; i++) {
        t->loss[i] = 0.0;
        if (!(d->loss[i] > 0.0f)) continue;
        s = moe__losses[i].add(&j, load ? load : t->routes.load, d->loss[i], &t->loss[i]);
        if (s) return s;
    }
    moe__scores[d->score].backward(&j);
    return MOE_OK;
}

static moe_status moe__pass_begin(moe__pass *p, const moe_desc *resolved, const float *params, moe_tape *t) {
    memset(p, 0, sizeof *p);
    moe_status s = moe__job_begin(&p->j, resolved, t);
    if (s) return s;
    if (!params) return MOE_E_NULL_PARAMS;
    p->params = params;
    return MOE_OK;
}

static moe_status moe__forward_experts(const moe_desc *d, const float *params, moe_tape *t, float *y) {
    moe__pass p;
    moe_status s = moe__pass_begin(&p, d, params, t);
    if (s) return s;
    const moe__dims *s_ = p.j.dims;
    moe_routes *r = &t->routes;
    if (!(t->memory->state & MOE__STATE_TOKENS) || r->n_tokens != t->n_tokens) return MOE_E_NO_ROUTES;
    if (t->n_tokens && !y) return MOE_E_NULL_Y;
    for (size_t g = 0; g < s_->G; g++) {
        moe__group *gr = &t->memory->group[g];
        int shared = g >= s_->E;
        gr->begin = shared ? r->n_routes + (g - s_->E) * t->n_tokens : r->begin[g];
        gr->rows = shared ? t->n_tokens : (size_t)(r->begin[g + 1] - r->begin[g]);
        gr->token = shared ? NULL : r->token + r->begin[g];
        gr->weight = shared ? NULL : r->weight + r->begin[g];
    }
    p.y = y;
    t->memory->n_routes = r->n_routes;
    moe__experts_forward(&p);
    if (t->memory->training) t->memory->state |= MOE__STATE_FORWARD;
    return MOE_OK;
}

static moe_status moe__backward_experts(const moe_desc *d, const float *params, moe_tape *t, const float *dy, int fresh,
                                        float *dparams, float *dweight, float *dx) {
    moe__pass p;
    moe_status s = moe__pass_begin(&p, d, params, t);
    if (s) return s;
    if (!(t->memory->state & MOE__STATE_FORWARD) || t->routes.n_tokens != t->n_tokens || t->routes.n_routes != t->memory->n_routes)
        return MOE_E_NO_FORWARD;
    if (t->n_tokens && !dy) return MOE_E_NULL_DY;
    if (!dparams) return MOE_E_NULL_GRADS;
    t->memory->state &= ~MOE__STATE_FORWARD; /* the tape's activations are used up */
    p.dy = dy;
    p.dparams = dparams;
    p.dweight = dweight;
    p.dx = dx;
    p.fresh = fresh;
    moe__experts_backward(&p);
    return MOE_OK;
}

/* -- level 2 -- */
MOE_API moe_status moe_route(const moe_desc *d, const float *router, const float *x, size_t n, moe_tape *t) {
    moe_desc r;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__route(&r, router, x, n, t);
}
MOE_API moe_status moe_route_backward(const moe_desc *d, const float *router, moe_tape *t, const float *d_weight,
                                      const uint64_t *load, float *d_router, float *dx) {
    moe_desc r;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__route_backward(&r, router, t, d_weight, load, d_router, dx);
}
MOE_API moe_status moe_tape_tokens(const moe_desc *d, moe_tape *t, const float *x, size_t n) {
    moe_desc r;
    moe__job j;
    moe_status s = moe_desc_resolve(d, &r);
    if (!s) s = moe__tokens_begin(&j, &r, t, x, n);
    if (s) return s;
    moe_run(&r.parallel, moe__ceil_div(n, MOE__TOKENS), moe__task_tokens, &j);
    t->memory->state = MOE__STATE_TOKENS;
    return MOE_OK;
}
MOE_API moe_status moe_experts_forward(const moe_desc *d, const float *params, moe_tape *t, float *y) {
    moe_desc r;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__forward_experts(&r, params, t, y);
}
MOE_API moe_status moe_experts_backward(const moe_desc *d, const float *params, moe_tape *t, const float *dy, int fresh,
                                        float *d_params, float *d_weight, float *dx) {
    moe_desc r;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__backward_experts(&r, params, t, dy, fresh, d_params, d_weight, dx);
}
MOE_API moe_status moe_experts_count(const moe_desc *d, size_t *n_floats) {
    moe_desc r;
    moe__dims s;
    if (!n_floats) return MOE_E_NULL_OUT;
    moe_status st = moe_desc_resolve(d, &r);
    if (!st) st = moe__dims_of(&r, &s);
    if (!st) *n_floats = s.expert * s.G;
    return st;
}

/* -- tensors: where element (row, column) of an expert's matrix stands in its block -- */
enum { MOE__W1, MOE__WU, MOE__W2, MOE__B1, MOE__BU, MOE__B2, MOE__TENSORS };
static const char *const moe__tensor_names[MOE__TENSORS] = {"experts.w1", "experts.wu", "experts.w2", "experts.b1", "experts.bu", "experts.b2"};

static int moe__tensor_there(const moe__dims *d, int tensor) {
    return (tensor < MOE__B1 || d->bias) && ((tensor != MOE__WU && tensor != MOE__BU) || d->gated);
}
static size_t moe__tensor_rows(const moe__dims *d, int tensor) { return tensor >= MOE__B1 ? 1 : tensor == MOE__W2 ? d->f : d->d; }
static size_t moe__tensor_cols(const moe__dims *d, int tensor) { return tensor == MOE__W2 || tensor == MOE__B2 ? d->d : d->f; }
static size_t moe__hidden(const moe__dims *d, int up, size_t c, size_t rows) { /* column c of W1 (or Wu), panels of `rows` rows */
    return d->gated ? c / 16 * rows * MOE__W + (up ? 16 : 0) + c % 16 : c / MOE__W * rows * MOE__W + c % MOE__W;
}
static size_t moe__locate(const moe__dims *d, int tensor, size_t r, size_t c) {
    switch (tensor) {
    case MOE__W1: case MOE__WU: return moe__hidden(d, tensor == MOE__WU, c, d->d) + r * MOE__W;
    case MOE__B1: case MOE__BU: return d->b1 + moe__hidden(d, tensor == MOE__BU, c, 1);
    case MOE__W2: return d->w2 + c / MOE__W * d->f * MOE__W + r * MOE__W + c % MOE__W;
    default: return d->b2 + c;
    }
}
static void moe__tensor_get(const moe__dims *d, int tensor, const float *block, size_t r, size_t c0, size_t n, float *out) {
    for (size_t c = 0; c < n; c++) out[c] = block[moe__locate(d, tensor, r, c0 + c)];
}
static void moe__tensor_set(const moe__dims *d, int tensor, float *block, size_t r, size_t c0, size_t n, const float *in) {
    for (size_t c = 0; c < n; c++) block[moe__locate(d, tensor, r, c0 + c)] = in ? in[c] : 0.0f;
}
static float *moe__weights_tensor(const moe_expert_weights *w, int tensor) {
    float *const all[MOE__TENSORS] = {w->w1, w->wu, w->w2, w->b1, w->bu, w->b2};
    return all[tensor];
}

MOE_API moe_status moe_expert_pack(const moe_desc *d, size_t e, const moe_expert_weights *w, float *params) {
    moe_desc r;
    moe__dims s;
    moe_status st = moe_desc_resolve(d, &r);
    if (!st) st = moe__dims_of(&r, &s);
    if (st) return st;
    if (e >= s.G) return MOE_E_INDEX;
    if (!w) return MOE_E_NULL_WEIGHT;
    if (!params) return MOE_E_NULL_PARAMS;
    memset(params + e * s.expert, 0, s.expert * sizeof(float));
    for (int t = 0; t < MOE__TENSORS; t++) {
        const float *in = moe__weights_tensor(w, t);
        size_t rows = moe__tensor_rows(&s, t), cols = moe__tensor_cols(&s, t);
        if (!in || !moe__tensor_there(&s, t)) continue;
        for (size_t i = 0; i < rows; i++) moe__tensor_set(&s, t, params + e * s.expert, i, 0, cols, in + i * cols);
    }
    return MOE_OK;
}
MOE_API moe_status moe_expert_unpack(const moe_desc *d, size_t e, const float *params, const moe_expert_weights *w) {
    moe_desc r;
    moe__dims s;
    moe_status st = moe_desc_resolve(d, &r);
    if (!st) st = moe__dims_of(&r, &s);
    if (st) return st;
    if (e >= s.G) return MOE_E_INDEX;
    if (!w) return MOE_E_NULL_WEIGHT;
    if (!params) return MOE_E_NULL_PARAMS;
    for (int t = 0; t < MOE__TENSORS; t++) {
        float *out = moe__weights_tensor(w, t);
        size_t rows = moe__tensor_rows(&s, t), cols = moe__tensor_cols(&s, t);
        if (!out || !moe__tensor_there(&s, t)) continue;
        for (size_t i = 0; i < rows; i++) moe__tensor_get(&s, t, params + e * s.expert, i, 0, cols, out + i * cols);
    }
    return MOE_OK;
}

/* -- the layer itself -- */
struct moe_layer {
    moe_desc d;
    moe__dims dims;
    size_t n_floats;                /* experts, then the router */
    float *part[MOE__PART_COUNT];   /* parameters, gradients, moments */
    int fresh;                      /* the gradients count as zero */
    uint64_t step;
    moe_tape *tape;
    double loss[MOE_LOSS_COUNT];
    moe_health health;
    void *own;
};
static float *moe__layer_router(const moe_layer *m, moe_part part) { return m->part[part] + m->dims.expert * m->dims.G; }
static uint64_t moe__layer_step_count(const moe_layer *m) { return m->step; }
static void moe__layer_set_step_count(moe_layer *m, uint64_t s) { m->step = s; }

static moe_status moe__layer_layout(moe_layer *m, const moe_desc *resolved, moe__arena *a) {
    memset(m, 0, sizeof *m);
    m->d = *resolved;
    m->fresh = 1;
    moe_status s = moe__dims_of(resolved, &m->dims);
    if (s) return s;
    m->n_floats = m->dims.expert * m->dims.G + m->dims.d * m->dims.E;
    (void)moe__take(a, 1, sizeof(moe_layer));
    for (int i = 0; i < MOE__PART_COUNT; i++) {
        if (i > 0 && resolved->training == MOE_OFF) continue;
        if (i == MOE_PART_MOMENT2 && resolved->optimizer == MOE_OPTIMIZER_SGD) continue;
        m->part[i] = (float *)moe__take(a, m->n_floats, sizeof(float));
    }
    s = moe__health_layout(&m->health, m->dims.E, a);
    return s ? s : a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

/* Initial parameters: uniform in +-1/sqrt(fan-in); element i of tensor t of expert e is number i of stream (e, t). */
static void moe__task_init(void *arg, size_t e, size_t worker) {
    moe_layer *m = (moe_layer *)arg;
    const moe__dims *d = &m->dims;
    (void)worker;
    for (int t = 0; t < MOE__TENSORS; t++) {
        size_t rows = moe__tensor_rows(d, t), cols = moe__tensor_cols(d, t), fan = t == MOE__W2 || t == MOE__B2 ? d->f : d->d;
        float bound = 1.0f / sqrtf((float)fan), chunk[256];
        if (!moe__tensor_there(d, t)) continue;
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < cols; c += 256) {
                size_t n = moe__min(256, cols - c);
                moe__uniform_at(m->d.seed, (uint64_t)e * 16 + (uint64_t)t + 1, (uint64_t)(r * cols + c), n, -bound, bound, chunk);
                moe__tensor_set(d, t, m->part[0] + e * d->expert, r, c, n, chunk);
            }
    }
}
static void moe__task_zero(void *arg, size_t i, size_t worker) {
    moe_layer *m = (moe_layer *)arg;
    size_t at = i * MOE__SPAN, n = moe__min(MOE__SPAN, m->n_floats - at);
    (void)worker;
    for (int p = 0; p < MOE__PART_COUNT; p++)
        if (m->part[p]) memset(m->part[p] + at, 0, n * sizeof(float));
}

static moe_status moe__layer_bytes(const moe_desc *resolved, size_t *bytes) {
    moe_layer m;
    moe__arena a = {NULL, 0, 0};
    moe_status s = moe__layer_layout(&m, resolved, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}

static moe_status moe__layer_make(moe_layer **out, const moe_desc *resolved, void *memory, size_t bytes) {
    moe_layer m;
    size_t needed;
    moe__arena a;
    moe_status s = moe__layer_bytes(resolved, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    if (!s) s = moe__layer_layout(&m, resolved, &a);
    if (s) return s;
    moe_layer *layer = (moe_layer *)(void *)a.base;
    *layer = m;
    moe_health_reset(&layer->health);
    moe_run(&resolved->parallel, moe__ceil_div(m.n_floats, MOE__SPAN), moe__task_zero, layer);
    moe_run(&resolved->parallel, m.dims.G, moe__task_init, layer);
    float bound = 1.0f / sqrtf((float)m.dims.d);
    moe__uniform_at(resolved->seed, 0, 0, m.dims.d * m.dims.E, -bound, bound, moe__layer_router(layer, MOE_PART_PARAMS));
    *out = layer;
    return MOE_OK;
}

MOE_API moe_status moe_layer_size(const moe_desc *d, size_t *bytes) {
    moe_desc r;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__layer_bytes(&r, bytes);
}
MOE_API moe_status moe_layer_init(moe_layer **out, const moe_desc *d, void *memory, size_t bytes) {
    moe_desc r;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status s = moe_desc_resolve(d, &r);
    return s ? s : moe__layer_make(out, &r, memory, bytes);
}
MOE_API moe_status moe_layer_new(moe_layer **out, const moe_desc *d) {
    moe_desc r;
    size_t bytes;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status s = moe_desc_resolve(d, &r);
    if (!s) s = moe__layer_bytes(&r, &bytes);
    if (s) return s;
    void *memory = moe__alloc(r.alloc_context, bytes);
    if (!memory) return MOE_E_NO_MEMORY;
    s = moe__layer_make(out, &r, memory, bytes);
    if (s) moe__free(r.alloc_context, memory);
    else (*out)->own = memory;
    return s;
}
MOE_API void moe_layer_free(moe_layer *m) {
    if (!m) return;
    moe_tape_free(m->tape);
    if (m->own) moe__free(m->d.alloc_context, m->own);
}

MOE_API moe_status moe_forward_tape(const moe_layer *m, moe_tape *t, const float *x, size_t n, float *y) {
    if (!m) return MOE_E_NULL_LAYER;
    if (n && !y) return MOE_E_NULL_Y;
    moe_status s = moe__route(&m->d, moe__layer_router(m, MOE_PART_PARAMS), x, n, t);
    return s ? s : moe__forward_experts(&m->d, m->part[MOE_PART_PARAMS], t, y);
}

MOE_API moe_status moe_backward_tape(moe_layer *m, moe_tape *t, const float *dy, float *dx) {
    if (!m) return MOE_E_NULL_LAYER;
    if (m->d.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!t) return MOE_E_NULL_TAPE;
    if ((t->memory->state & (MOE__STATE_ROUTED | MOE__STATE_FORWARD)) != (MOE__STATE_ROUTED | MOE__STATE_FORWARD))
        return MOE_E_NO_FORWARD;
    if (t->n_tokens && !dy) return MOE_E_NULL_DY;
    float *drouter = moe__layer_router(m, MOE_PART_GRADS);
    moe__job j;
    moe_status s = moe__job_begin(&j, &m->d, t);
    if (s) return s;
    if (dx) memset(dx, 0, t->n_tokens * m->dims.d * sizeof(float));
    s = moe__backward_experts(&m->d, m->part[MOE_PART_PARAMS], t, dy, m->fresh, m->part[MOE_PART_GRADS], t->memory->dweight, dx);
    if (s) return s;
    if (m->fresh) memset(drouter, 0, m->dims.d * m->dims.E * sizeof(float));
    m->fresh = 0;
    s = moe__route_backward(&m->d, moe__layer_router(m, MOE_PART_PARAMS), t, t->memory->dweight, NULL, drouter, dx);
    memcpy(m->loss, t->loss, sizeof m->loss);
    return s;
}

MOE_API moe_status moe_forward(moe_layer *m, const float *x, size_t n, float *y) {
    if (!m) return MOE_E_NULL_LAYER;
    if (n && !x) return MOE_E_NULL_X;
    if (n && !y) return MOE_E_NULL_Y;
    if (m->tape) m->tape->memory->state = 0; /* should this forward fail, there is nothing to go back from */
    if (!m->tape || n > m->tape->memory->max_tokens) {
        moe_tape *bigger;
        if (!m->own) return MOE_E_NO_MEMORY;
        moe_status s = moe_tape_new(&bigger, &m->d, n, m->d.training);
        if (s) return s;
        moe_tape_free(m->tape);
        m->tape = bigger;
    }
    moe_status s = moe_forward_tape(m, m->tape, x, n, y);
    return s ? s : moe_health_add(&m->health, &m->tape->routes, m->tape->prob);
}
MOE_API moe_status moe_backward(moe_layer *m, const float *dy, float *dx) {
    if (!m) return MOE_E_NULL_LAYER;
    if (m->d.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!m->tape) return MOE_E_NO_FORWARD;
    return moe_backward_tape(m, m->tape, dy, dx);
}

MOE_API moe_status moe_layer_grad_norm(const moe_layer *m, double *norm) {
    if (!m) return MOE_E_NULL_LAYER;
    if (!norm) return MOE_E_NULL_OUT;
    if (m->d.training == MOE_OFF) return MOE_E_INFERENCE;
    *norm = m->fresh ? 0.0 : sqrt(moe_sum_squares(&m->d.parallel, m->n_floats, m->part[MOE_PART_GRADS]));
    return MOE_OK;
}
static void moe__zero_grads(moe_layer *m) { memset(m->part[MOE_PART_GRADS], 0, m->n_floats * sizeof(float)); }
typedef struct moe__scale_job { float *x, factor; size_t n; } moe__scale_job;
static void moe__task_scale(void *arg, size_t i, size_t worker) {
    const moe__scale_job *j = (const moe__scale_job *)arg;
    (void)worker;
    for (size_t k = i * MOE__SPAN; k < moe__min(j->n, (i + 1) * MOE__SPAN); k++) j->x[k] *= j->factor;
}
MOE_API moe_status moe_layer_scale_grads(moe_layer *m, float factor) {
    if (!m) return MOE_E_NULL_LAYER;
    if (m->d.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!moe__finite(factor)) return MOE_E_COEFFICIENT;
    if (factor == 0.0f) m->fresh = 1;
    moe__scale_job j;
    j.x = m->part[MOE_PART_GRADS];
    j.factor = factor;
    j.n = m->fresh ? 0 : m->n_floats;
    moe_run(&m->d.parallel, moe__ceil_div(j.n, MOE__SPAN), moe__task_scale, &j);
    return MOE_OK;
}

MOE_API moe_status moe_step(moe_layer *m, float lr) {
    double norm;
    moe_status s = moe_layer_grad_norm(m, &norm);
    if (s) return s;
    if (!(lr >= 0.0f) || !moe__finite(lr)) return MOE_E_LR;
    if (!(norm < (double)FLT_MAX)) return MOE_E_NAN_GRADS;
    if (m->fresh) moe__zero_grads(m);
    moe_optimizer_args o;
    memset(&o, 0, sizeof o);
    o.kind = m->d.optimizer;
    o.lr = lr;
    o.beta1 = m->d.beta1;
    o.beta2 = m->d.beta2;
    o.epsilon = m->d.epsilon;
    o.momentum = m->d.momentum;
    o.weight_decay = m->d.weight_decay;
    o.scale = m->d.clip_norm > 0.0f && norm > (double)m->d.clip_norm ? (float)((double)m->d.clip_norm / norm) : 1.0f;
    o.step = m->step + 1;
    o.parallel = &m->d.parallel;
    const moe__dims *d = &m->dims;
    /* runs of floats that share weight decay: all of them, or cut at the biases */
    size_t at = 0, cut[4] = {d->b1, d->w2, d->b2, d->expert};
    for (size_t g = 0; g <= d->G && at < m->n_floats; g++)
        for (int i = d->bias && g < d->G ? 0 : 3; i < 4; i++) {
            size_t end = !d->bias || g == d->G ? m->n_floats : g * d->expert + cut[i];
            int is_bias = d->bias && g < d->G && i % 2 == 1;
            o.weight_decay = is_bias ? (float)MOE_OFF : m->d.weight_decay;
            float *v = m->part[MOE_PART_MOMENT2];
            s = moe_optimizer_step(&o, end - at, m->part[0] + at, m->part[1] + at, m->part[2] + at, v ? v + at : NULL);
            if (s) return s;
            at = end;
        }
    m->step++;
    m->fresh = 1;
    return MOE_OK;
}

MOE_API const moe_desc *moe_layer_desc(const moe_layer *m) { return m ? &m->d : NULL; }
MOE_API const moe_tape *moe_layer_tape(const moe_layer *m) { return m ? m->tape : NULL; }
static size_t moe__expert_params(const moe__dims *d) {
    return d->d * d->f * (d->gated ? 3 : 2) + (d->bias ? d->f * (d->gated ? 2 : 1) + d->d : 0);
}
MOE_API size_t moe_layer_params(const moe_layer *m) { return m ? m->dims.G * moe__expert_params(&m->dims) + m->dims.d * m->dims.E : 0; }
MOE_API size_t moe_layer_active_params(const moe_layer *m) {
    return m ? (m->dims.S + m->dims.G - m->dims.E) * moe__expert_params(&m->dims) + m->dims.d * m->dims.E : 0;
}
MOE_API moe_status moe_layer_health(moe_layer *m, moe_health *h) {
    if (!m) return MOE_E_NULL_LAYER;
    if (!h) return MOE_E_NULL_HEALTH;
    moe_status s = moe_health_update(&m->health);
    *h = m->health;
    return s;
}
MOE_API moe_status moe_layer_health_reset(moe_layer *m) { return m ? moe_health_reset(&m->health) : MOE_E_NULL_LAYER; }
MOE_API moe_status moe_layer_losses(const moe_layer *m, double value[MOE_LOSS_COUNT], double weighted[MOE_LOSS_COUNT]) {
    if (!m) return MOE_E_NULL_LAYER;
    for (int i = 0; i < MOE_LOSS_COUNT; i++) {
        if (value) value[i] = m->loss[i];
        if (weighted) weighted[i] = m->d.loss[i] > 0.0f ? (double)m->d.loss[i] * m->loss[i] : 0.0;
    }
    return MOE_OK;
}

/* Tensor i in the order router, then the expert tensors that are there; -1 is the router. */
static int moe__tensor_id(const moe_layer *m, size_t i, int *id) {
    *id = -1;
    if (!i) return 1;
    for (int t = 0; t < MOE__TENSORS; t++)
        if (moe__tensor_there(&m->dims, t) && --i == 0) { *id = t; return 1; }
    return 0;
}
static void moe__tensor_describe(const moe_layer *m, int id, moe_tensor *out) {
    memset(out, 0, sizeof *out);
    if (id < 0) {
        out->name = "router";
        out->n_dims = 2;
        out->dim[0] = m->dims.d;
        out->dim[1] = m->dims.E;
    } else {
        out->name = moe__tensor_names[id];
        out->dim[out->n_dims++] = m->dims.G;
        if (id < MOE__B1) out->dim[out->n_dims++] = moe__tensor_rows(&m->dims, id);
        out->dim[out->n_dims++] = moe__tensor_cols(&m->dims, id);
    }
    out->count = 1;
    for (size_t i = 0; i < out->n_dims; i++) out->count *= out->dim[i];
}
MOE_API size_t moe_layer_tensors(const moe_layer *m) {
    size_t n = 1;
    if (!m) return 0;
    for (int t = 0; t < MOE__TENSORS; t++) n += (size_t)moe__tensor_there(&m->dims, t);
    return n;
}
MOE_API moe_status moe_layer_tensor(const moe_layer *m, size_t i, moe_tensor *out) {
    int id;
    if (!m) return MOE_E_NULL_LAYER;
    if (!out) return MOE_E_NULL_OUT;
    if (!moe__tensor_id(m, i, &id)) return MOE_E_NAME;
    moe__tensor_describe(m, id, out);
    return MOE_OK;
}
static moe_status moe__tensor_find(const moe_layer *m, moe_part part, const char *name, size_t count, int *id) {
    moe_tensor t;
    if (!m) return MOE_E_NULL_LAYER;
    if (!name) return MOE_E_NULL_NAME;
    if ((unsigned)part >= MOE__PART_COUNT) return MOE_E_PART;
    if (!m->part[part]) return m->d.training == MOE_OFF ? MOE_E_INFERENCE : MOE_E_PART;
    for (size_t i = 0; moe__tensor_id(m, i, id); i++) {
        moe__tensor_describe(m, *id, &t);
        if (!strcmp(t.name, name)) return t.count == count ? MOE_OK : MOE_E_TENSOR_SIZE;
    }
    return MOE_E_NAME;
}
MOE_API moe_status moe_layer_get(const moe_layer *m, moe_part part, const char *name, float *out, size_t count) {
    int id;
    moe_status s = moe__tensor_find(m, part, name, count, &id);
    if (s) return s;
    if (!out) return MOE_E_NULL_OUT;
    if (part == MOE_PART_GRADS && m->fresh) memset(out, 0, count * sizeof(float));
    else if (id < 0) memcpy(out, moe__layer_router(m, part), count * sizeof(float));
    else {
        size_t rows = moe__tensor_rows(&m->dims, id), cols = moe__tensor_cols(&m->dims, id);
        for (size_t e = 0; e < m->dims.G; e++)
            for (size_t r = 0; r < rows; r++, out += cols)
                moe__tensor_get(&m->dims, id, m->part[part] + e * m->dims.expert, r, 0, cols, out);
    }
    return MOE_OK;
}
MOE_API moe_status moe_layer_set(moe_layer *m, moe_part part, const char *name, const float *in, size_t count) {
    int id;
    moe_status s = moe__tensor_find(m, part, name, count, &id);
    if (s) return s;
    if (!in) return MOE_E_NULL_PARAMS;
    if (part == MOE_PART_GRADS && m->fresh) {
        moe__zero_grads(m);
        m->fresh = 0;
    }
    if (id < 0) memcpy(moe__layer_router(m, part), in, count * sizeof(float));
    else {
        size_t rows = moe__tensor_rows(&m->dims, id), cols = moe__tensor_cols(&m->dims, id);
        for (size_t e = 0; e < m->dims.G; e++)
            for (size_t r = 0; r < rows; r++, in += cols)
                moe__tensor_set(&m->dims, id, m->part[part] + e * m->dims.expert, r, 0, cols, in);
    }
    return MOE_OK;
}
MOE_API uint64_t moe_layer_hash(const moe_layer *m) {
    uint64_t h = 0;
    float row[256];
    if (!m) return 0;
    h = moe_hash(h, moe__layer_router(m, MOE_PART_PARAMS), m->dims.d * m->dims.E * sizeof(float));
    for (int t = 0; t < MOE__TENSORS; t++) {
        size_t rows = moe__tensor_rows(&m->dims, t), cols = moe__tensor_cols(&m->dims, t);
        if (!moe__tensor_there(&m->dims, t)) continue;
        for (size_t e = 0; e < m->dims.G; e++)
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c += 256) {
                    size_t n = moe__min(256, cols - c);
                    moe__tensor_get(&m->dims, t, m->part[0] + e * m->dims.expert, r, c, n, row);
                    h = moe_hash(h, row, n * sizeof(float));
                }
    }
    return h;
}

/* ==== files ===================================================================================
 * safetensors: 8 bytes of header length, little-endian; the header, one JSON object; the data. The reader is
 * as strict as the format's reference implementation (offsets without holes or overlaps, every byte of the data
 * covered, valid UTF-8) and, as the format's text asks, refuses names that come twice. Nothing is allocated:
 * the header is read again wherever something of it is needed. */
#define MOE__FILE_HEADER_CAP 100000000u /* as in the reference implementation */
#define MOE__FILE_WINDOW 512            /* names or offsets put in order by one reading of the header */
#define MOE__FILE_WORK ((size_t)1 << 30) /* most header bytes read for that: about 60000 usual tensors */
#define MOE__JSON_DEPTH 16              /* of values that are skipped */

/* A place in JSON text: s[i], before s[n]. After a fault i is where it is. */
typedef struct moe__json {
    const unsigned char *s;
    size_t i, n;
} moe__json;

/* The text between a string's quotes, still escaped. */
typedef struct moe__json_text {
    size_t begin, end;
} moe__json_text;

static void moe__json_space(moe__json *j) {
    while (j->i < j->n && (j->s[j->i] == ' ' || j->s[j->i] == '\n' || j->s[j->i] == '\r' || j->s[j->i] == '\t')) j->i++;
}

static int moe__json_take(moe__json *j, char c) {
    moe__json_space(j);
    if (j->i == j->n || j->s[j->i] != (unsigned char)c) return 0;
    j->i++;
    return 1;
}

/* Before each element of an object or array: 1 = one follows, 0 = it was closed, -1 = fault. *first is 1 before
 * the first one. */
static int moe__json_more(moe__json *j, char close, int *first) {
    if (moe__json_take(j, close)) return 0;
    if (!*first && !moe__json_take(j, ',')) return -1;
    *first = 0;
    return 1;
}

/* The four digits of \uXXXX, or -1. */
static int32_t moe__json_hex4(moe__json *j) {
    int32_t v = 0;
    int k;
    if (j->n - j->i < 4) return -1;
    for (k = 0; k < 4; k++) {
        int c = j->s[j->i + (size_t)k], lower = c | 32;
        if (c >= '0' && c <= '9') v = v * 16 + c - '0';
        else if (lower >= 'a' && lower <= 'f') v = v * 16 + lower - 'a' + 10;
        else return -1;
    }
    j->i += 4;
    return v;
}

/* One character of a string, as UTF-8 into u: its length, or 0 for a fault. */
static size_t moe__json_char(moe__json *j, unsigned char u[4]) {
    static const char escape[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    size_t start = j->i, length, k;
    int32_t code = j->s[j->i++];
    if (code == '\\') {
        const char *e = j->i < j->n && j->s[j->i] ? strchr(escape, j->s[j->i]) : NULL;
        if (e) {
            j->i++;
            u[0] = (unsigned char)meaning[e - escape];
            return 1;
        }
        code = -1;
        if (j->i < j->n && j->s[j->i++] == 'u') code = moe__json_hex4(j);
        if (code >= 0xD800 && code < 0xDC00) { /* the first of a pair: the second must follow */
            int32_t low = -1;
            if (j->n - j->i >= 2 && j->s[j->i] == '\\' && j->s[j->i + 1] == 'u') {
                j->i += 2;
                low = moe__json_hex4(j);
            }
            code = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : -1;
        } else if (code >= 0xDC00 && code < 0xE000) code = -1;
        if (code < 0) {
            j->i = start;
            return 0;
        }
        length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        for (k = length; k-- > 1; code >>= 6) u[k] = (unsigned char)(0x80 | (code & 0x3F));
        u[0] = (unsigned char)(length == 1 ? code : (0xF00 >> length & 0xF0) | code);
        return length;
    }
    if (code < 0x80) length = code >= 0x20;
    else length = code < 0xC2 ? 0 : code < 0xE0 ? 2 : code < 0xF0 ? 3 : code < 0xF5 ? 4 : 0;
    if (length > j->n - start) length = 0;
    u[0] = (unsigned char)code;
    if (length > 1) code &= 0x7F >> length;
    for (k = 1; k < length; k++) {
        u[k] = j->s[j->i];
        if ((u[k] & 0xC0) != 0x80) {
            length = 0;
            break;
        }
        j->i++;
        code = (code << 6) | (u[k] & 0x3F);
    }
    /* longer than needed, half of a surrogate pair, or past the last code point */
    if (length == 3 && (code < 0x800 || (code >= 0xD800 && code < 0xE000))) length = 0;
    if (length == 4 && (code < 0x10000 || code > 0x10FFFF)) length = 0;
    if (!length) j->i = start;
    return length;
}

static int moe__json_string(moe__json *j, moe__json_text *t) {
    unsigned char u[4];
    if (!moe__json_take(j, '"')) return 0;
    for (t->begin = j->i; j->i < j->n; ) {
        int c = j->s[j->i];
        if (c == '"') {
            t->end = j->i++;
            return 1;
        }
        if (c >= 0x20 && c < 0x80 && c != '\\') j->i++;
        else if (!moe__json_char(j, u)) return 0;
    }
    return 0;
}

/* Is a string that was read before, unescaped, this name? */
static int moe__json_is(const moe__json *j, moe__json_text t, const char *name) {
    moe__json at;
    unsigned char u[4];
    at.s = j->s;
    at.n = t.end;
    for (at.i = t.begin; at.i < at.n; ) {
        size_t k, length = moe__json_char(&at, u);
        if (!length) return 0;
        for (k = 0; k < length; k++, name++) {
            if (!*name || (unsigned char)*name != u[k]) return 0;
        }
    }
    return !*name;
}

/* FNV-1a of a string, unescaped. */
static uint64_t moe__json_hash(const moe__json *j, moe__json_text t, uint64_t hash) {
    moe__json at;
    unsigned char u[4];
    at.s = j->s;
    at.n = t.end;
    for (at.i = t.begin; at.i < at.n; ) {
        size_t k, length = moe__json_char(&at, u);
        if (!length) break;
        for (k = 0; k < length; k++) hash = (hash ^ u[k]) * UINT64_C(0x100000001b3);
    }
    return hash;
}

static size_t moe__json_digits(moe__json *j) {
    size_t start = j->i;
    while (j->i < j->n && j->s[j->i] >= '0' && j->s[j->i] <= '9') j->i++;
    return j->i - start;
}

static int moe__json_skip_number(moe__json *j) {
    size_t start, digits;
    if (j->s[j->i] == '-') j->i++;
    start = j->i;
    digits = moe__json_digits(j);
    if (!digits || (digits > 1 && j->s[start] == '0')) return 0;
    if (j->i < j->n && j->s[j->i] == '.') {
        j->i++;
        if (!moe__json_digits(j)) return 0;
    }
    if (j->i < j->n && (j->s[j->i] | 32) == 'e') {
        j->i++;
        if (j->i < j->n && (j->s[j->i] == '+' || j->s[j->i] == '-')) j->i++;
        if (!moe__json_digits(j)) return 0;
    }
    return 1;
}

/* Any value, checked and not used. */
static int moe__json_skip(moe__json *j, int depth) {
    static const char *const words[] = { "true", "false", "null" };
    moe__json_text key;
    int c, more, first = 1;
    size_t k, length;
    moe__json_space(j);
    if (j->i == j->n || !depth) return 0;
    c = j->s[j->i];
    if (c == '"') return moe__json_string(j, &key);
    if (c == '{' || c == '[') {
        j->i++;
        while ((more = moe__json_more(j, c == '{' ? '}' : ']', &first)) > 0) {
            if (c == '{' && !(moe__json_string(j, &key) && moe__json_take(j, ':'))) return 0;
            if (!moe__json_skip(j, depth - 1)) return 0;
        }
        return !more;
    }
    for (k = 0; k < sizeof words / sizeof words[0]; k++) {
        length = strlen(words[k]);
        if (j->n - j->i >= length && !memcmp(j->s + j->i, words[k], length)) {
            j->i += length;
            return 1;
        }
    }
    return moe__json_skip_number(j);
}

/* [a, b, ...]: at most `max` natural numbers. What does not fit is `overflow`, what is no natural number a fault. */
static moe_status moe__json_sizes(moe__json *j, size_t max, moe_status overflow, size_t *out, size_t *n) {
    int first = 1, more;
    *n = 0;
    if (!moe__json_take(j, '[')) return MOE_E_FILE_HEADER;
    while ((more = moe__json_more(j, ']', &first)) > 0) {
        size_t v = 0, start, digits, k;
        moe__json_space(j);
        start = j->i;
        digits = moe__json_digits(j);
        if (!digits || (digits > 1 && j->s[start] == '0')) return MOE_E_FILE_HEADER;
        for (k = 0; k < digits; k++) {
            if (!moe__mul(v, 10, &v) || !moe__add_size(v, (size_t)(j->s[start + k] - '0'), &v)) return overflow;
        }
        if (*n == max) return overflow;
        out[(*n)++] = v;
    }
    return more ? MOE_E_FILE_HEADER : MOE_OK;
}

static size_t moe__dtype_bytes(const char *dtype) {
    static const struct {
        const char *name;
        size_t bytes;
    } rows[] = {
        { "BOOL", 1 }, { "U8", 1 }, { "I8", 1 }, { "F8_E5M2", 1 }, { "F8_E4M3", 1 },
        { "I16", 2 }, { "U16", 2 }, { "F16", 2 }, { "BF16", 2 },
        { "I32", 4 }, { "U32", 4 }, { "F32", 4 },
        { "F64", 8 }, { "I64", 8 }, { "U64", 8 }
    };
    size_t i;
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (!strcmp(dtype, rows[i].name)) return rows[i].bytes;
    }
    return 0;
}

/* The header as a list: its tensors, and the pairs of its __metadata__. */
typedef enum moe__entry_kind { MOE__ENTRY_END, MOE__ENTRY_TENSOR, MOE__ENTRY_METADATA } moe__entry_kind;
typedef struct moe__entry {
    moe__entry_kind kind;
    moe__json_text name, value; /* value: of metadata */
    moe_file_tensor tensor;
    size_t begin, end; /* of its bytes in the data */
} moe__entry;

typedef struct moe__cursor {
    moe__json j;
    size_t data_size;
    int inside, metadata_seen; /* inside __metadata__ now, or before */
    int first[2];              /* of the header, of __metadata__ */
} moe__cursor;

static moe_status moe__cursor_init(moe__cursor *c, const moe_file *f) {
    memset(c, 0, sizeof *c);
    if (!f || !f->bytes) return MOE_E_NULL_BYTES;
    c->j.s = f->bytes;
    c->j.i = 8;
    c->j.n = 8 + f->header;
    c->data_size = f->size - c->j.n;
    c->first[0] = 1;
    if (!f->header || f->bytes[8] != '{') return MOE_E_FILE_HEADER;
    c->j.i++;
    return MOE_OK;
}

static moe_status moe__entry_tensor(moe__cursor *c, moe__entry *e) {
    static const char *const keys[] = { "dtype", "shape", "data_offsets" };
    moe__json *j = &c->j;
    moe_file_tensor *t = &e->tensor;
    moe__json_text key, dtype = { 0, 0 };
    moe_status s = MOE_OK;
    size_t offsets[2] = { 0, 0 }, n_offsets = 0, bytes, i;
    int first = 1, more;
    unsigned seen = 0, k;
    memset(t, 0, sizeof *t);
    if (!moe__json_take(j, '{')) return MOE_E_FILE_HEADER;
    while ((more = moe__json_more(j, '}', &first)) > 0) {
        if (!moe__json_string(j, &key) || !moe__json_take(j, ':')) return MOE_E_FILE_HEADER;
        for (k = 0; k < 3 && !moe__json_is(j, key, keys[k]); k++) {}
        if (k < 3 && (seen & 1u << k)) return MOE_E_FILE_HEADER;
        seen |= 1u << k;
        if (k == 0) s = moe__json_string(j, &dtype) ? MOE_OK : MOE_E_FILE_HEADER;
        else if (k == 1) s = moe__json_sizes(j, 8, MOE_E_FILE_SHAPE, t->dim, &t->n_dims);
        else if (k == 2) s = moe__json_sizes(j, 2, MOE_E_FILE_OFFSETS, offsets, &n_offsets);
        else s = moe__json_skip(j, MOE__JSON_DEPTH) ? MOE_OK : MOE_E_FILE_HEADER; /* unknown keys are allowed */
        if (s) return s;
    }
    if (more || (seen & 7) != 7 || n_offsets != 2) return MOE_E_FILE_HEADER;

    e->begin = offsets[0];
    e->end = offsets[1];
    t->name = (const char *)j->s + e->name.begin;
    t->name_length = e->name.end - e->name.begin;
    if (dtype.end - dtype.begin < sizeof t->dtype) memcpy(t->dtype, j->s + dtype.begin, dtype.end - dtype.begin);
    bytes = moe__dtype_bytes(t->dtype);
    if (!bytes) s = MOE_E_FILE_DTYPE;
    else if (e->begin > e->end) s = MOE_E_FILE_OFFSETS;
    else if (e->end > c->data_size) s = MOE_E_FILE_SHORT;
    for (i = 0; i < t->n_dims && !s; i++) {
        if (!moe__mul(bytes, t->dim[i], &bytes)) s = MOE_E_FILE_SHAPE;
    }
    if (!s && bytes != e->end - e->begin) s = MOE_E_FILE_SHAPE;
    if (s) {
        j->i = e->name.begin;
        return s;
    }
    t->data = j->s + j->n + e->begin;
    t->bytes = bytes;
    return MOE_OK;
}

static moe_status moe__cursor_next(moe__cursor *c, moe__entry *e) {
    moe__json *j = &c->j;
    for (;;) {
        int more = moe__json_more(j, '}', &c->first[c->inside]);
        if (more < 0) return MOE_E_FILE_HEADER;
        if (!more && !c->inside) {
            e->kind = MOE__ENTRY_END;
            moe__json_space(j); /* padding */
            return j->i == j->n ? MOE_OK : MOE_E_FILE_HEADER;
        }
        if (!more) {
            c->inside = 0;
            continue;
        }
        if (!moe__json_string(j, &e->name) || !moe__json_take(j, ':')) return MOE_E_FILE_HEADER;
        if (c->inside) {
            e->kind = MOE__ENTRY_METADATA;
            return moe__json_string(j, &e->value) ? MOE_OK : MOE_E_FILE_HEADER;
        }
        if (!moe__json_is(j, e->name, "__metadata__")) {
            e->kind = MOE__ENTRY_TENSOR;
            return moe__entry_tensor(c, e);
        }
        if (c->metadata_seen) {
            j->i = e->name.begin;
            return MOE_E_FILE_TWICE;
        }
        if (!moe__json_take(j, '{')) return MOE_E_FILE_HEADER;
        c->inside = c->metadata_seen = c->first[1] = 1;
    }
}

typedef struct moe__key {
    uint64_t a, b;
} moe__key;

static int moe__key_less(moe__key x, moe__key y) {
    return x.a < y.a || (x.a == y.a && x.b < y.b);
}

/* Walks all entries in order, by name or by offset, without memory for them: each reading of the header takes the
 * next MOE__FILE_WINDOW keys into a sorted window. Names go by a hash of 64 bits: two that share it count as equal,
 * which an honest file of 60000 names does once in 10^10. Equal offsets fall together; the caller has compared the
 * sum of the sizes with the data. */
static moe_status moe__file_ordered(moe_file *f, int by_name) {
    moe__key window[MOE__FILE_WINDOW], key, last = { 0, 0 };
    moe__cursor c;
    moe__entry e;
    uint64_t reached = 0;
    size_t n, i, low, high;
    int any = 0;
    do {
        moe_status s = moe__cursor_init(&c, f);
        for (n = 0; !s && !(s = moe__cursor_next(&c, &e)) && e.kind != MOE__ENTRY_END; ) {
            if (by_name) {
                key.a = moe__json_hash(&c.j, e.name, UINT64_C(0xcbf29ce484222325) ^ (uint64_t)e.kind);
                key.b = e.name.begin;
            } else {
                if (e.kind != MOE__ENTRY_TENSOR) continue;
                key.a = e.begin;
                key.b = e.end;
            }
            if (any && !moe__key_less(last, key)) continue; /* walked before */
            for (low = 0, high = n; low < high; ) {
                size_t middle = (low + high) / 2;
                if (moe__key_less(window[middle], key)) low = middle + 1;
                else high = middle;
            }
            if (low == MOE__FILE_WINDOW || (low < n && !moe__key_less(key, window[low]))) continue;
            if (n < MOE__FILE_WINDOW) n++;
            memmove(window + low + 1, window + low, (n - 1 - low) * sizeof *window);
            window[low] = key;
        }
        if (s) return s;
        for (i = 0; i < n; i++) {
            if (by_name && any && window[i].a == last.a) {
                f->offset = (size_t)window[i].b;
                return MOE_E_FILE_TWICE;
            }
            if (!by_name && window[i].a != reached) {
                f->offset = c.j.n + (size_t)reached;
                return MOE_E_FILE_OFFSETS;
            }
            reached = window[i].b;
            last = window[i];
            any = 1;
        }
    } while (n == MOE__FILE_WINDOW);
    if (by_name || reached == c.data_size) return MOE_OK;
    f->offset = c.j.n + (size_t)reached;
    return MOE_E_FILE_OFFSETS;
}

static moe_status moe__file_check(moe_file *f) {
    moe__cursor c;
    moe__entry e;
    size_t n_entries = 0, sum = 0;
    int in_order = 1;
    moe_status s = moe__cursor_init(&c, f);
    while (!s && !(s = moe__cursor_next(&c, &e)) && e.kind != MOE__ENTRY_END) {
        n_entries++;
        if (e.kind == MOE__ENTRY_METADATA) continue;
        f->n_tensors++;
        if (e.begin != sum) in_order = 0;
        if (e.end - e.begin > c.data_size - sum) { /* more than all bytes: some belong to two */
            c.j.i = e.name.begin;
            s = MOE_E_FILE_OFFSETS;
        } else sum += e.end - e.begin;
    }
    f->offset = c.j.i;
    if (s) return s;
    if (n_entries / MOE__FILE_WINDOW > MOE__FILE_WORK / f->header) return MOE_E_FILE_HEADER_SIZE;
    if (!in_order) s = moe__file_ordered(f, 0);
    if (!s && sum != c.data_size) {
        f->offset = c.j.n + sum;
        s = MOE_E_FILE_OFFSETS;
    }
    return s ? s : moe__file_ordered(f, 1);
}

MOE_API moe_status moe_file_open(moe_file *f, const void *bytes, size_t size) {
    uint64_t header = 0;
    int i;
    moe_status s;
    if (!f) return MOE_E_NULL_OUT;
    memset(f, 0, sizeof *f);
    if (!bytes) return MOE_E_NULL_BYTES;
    f->bytes = (const unsigned char *)bytes;
    f->size = size;
    if (size < 8) {
        f->offset = size;
        return MOE_E_FILE_SHORT;
    }
    for (i = 8; i-- > 0; ) header = header << 8 | f->bytes[i];
    if (header > MOE__FILE_HEADER_CAP || header > size - 8) return MOE_E_FILE_HEADER_SIZE;
    f->header = (size_t)header;
    s = moe__file_check(f);
    if (s) f->n_tensors = f->header = 0; /* nothing is to be found in it */
    else f->offset = 0;
    return s;
}

/* The next entry of a kind; MOE_E_NAME past the last. */
static moe_status moe__cursor_next_of(moe__cursor *c, moe__entry_kind kind, moe__entry *e) {
    moe_status s;
    do s = moe__cursor_next(c, e);
    while (!s && e->kind != kind && e->kind != MOE__ENTRY_END);
    return s ? s : e->kind == kind ? MOE_OK : MOE_E_NAME;
}

static moe_status moe__file_lookup(const moe_file *f, moe__entry_kind kind, const char *name, moe__cursor *c,
                                   moe__entry *e) {
    moe_status s = moe__cursor_init(c, f);
    if (!name) return MOE_E_NULL_NAME;
    while (!s) {
        s = moe__cursor_next_of(c, kind, e);
        if (!s && moe__json_is(&c->j, e->name, name)) break;
    }
    return s;
}

MOE_API moe_status moe_file_tensor_at(const moe_file *f, size_t i, moe_file_tensor *out) {
    moe__cursor c;
    moe__entry e;
    moe_status s = moe__cursor_init(&c, f);
    if (!out) return MOE_E_NULL_OUT;
    memset(out, 0, sizeof *out);
    do s = s ? s : moe__cursor_next_of(&c, MOE__ENTRY_TENSOR, &e);
    while (!s && i-- > 0);
    if (!s) *out = e.tensor;
    return s;
}

MOE_API moe_status moe_file_find(const moe_file *f, const char *name, moe_file_tensor *out) {
    moe__cursor c;
    moe__entry e;
    moe_status s;
    if (!out) return MOE_E_NULL_OUT;
    memset(out, 0, sizeof *out);
    s = moe__file_lookup(f, MOE__ENTRY_TENSOR, name, &c, &e);
    if (!s) *out = e.tensor;
    return s;
}

MOE_API moe_status moe_file_metadata(const moe_file *f, const char *key, char *buffer, size_t size) {
    moe__cursor c;
    moe__entry e;
    moe__json at;
    unsigned char u[4];
    size_t n = 0;
    moe_status s;
    if (!buffer) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    buffer[0] = 0;
    s = moe__file_lookup(f, MOE__ENTRY_METADATA, key, &c, &e);
    if (s) return s;
    at.s = c.j.s;
    at.n = e.value.end;
    for (at.i = e.value.begin; at.i < at.n; ) {
        size_t length = moe__json_char(&at, u);
        if (n + length >= size) { /* not cut: half a value is no value */
            buffer[0] = 0;
            return MOE_E_SMALL_MEMORY;
        }
        memcpy(buffer + n, u, length);
        n += length;
    }
    buffer[n] = 0;
    return MOE_OK;
}

/* -- .npy: six bytes of magic, a version, the header's length, the header (a Python dictionary), the elements -- */
#define MOE__NPY_CAP ((size_t)1 << 20) /* of the header; NumPy's own are below 200 bytes */

static const struct { const char *npy, *safetensors; size_t bytes; } moe__dtypes[MOE__DTYPE_COUNT] = {
    {"", "none", 0}, {"<f4", "F32", 4}, {"<f2", "F16", 2}, {"", "BF16", 2}, {"<f8", "F64", 8}, {"<u2", "U16", 2},
    {"<i4", "I32", 4}, {"<i8", "I64", 8}};

MOE_API size_t moe_dtype_size(moe_dtype v) { return (unsigned)v < MOE__DTYPE_COUNT ? moe__dtypes[v].bytes : 0; }
MOE_API const char *moe_dtype_name(moe_dtype v) { return (unsigned)v < MOE__DTYPE_COUNT ? moe__dtypes[v].safetensors : NULL; }
MOE_API moe_dtype moe_dtype_of(const char *safetensors_name) {
    int v = safetensors_name ? MOE__DTYPE_COUNT - 1 : 0;
    while (v > 0 && strcmp(safetensors_name, moe__dtypes[v].safetensors)) v--;
    return (moe_dtype)v;
}

/* 'text' or "text", printable ASCII without escapes, into a buffer that it must fit in. */
static int moe__npy_string(moe__json *j, char *out, size_t size) {
    size_t n = 0;
    moe__json_space(j);
    if (j->i == j->n || (j->s[j->i] != '\'' && j->s[j->i] != '"')) return 0;
    unsigned char quote = j->s[j->i++];
    while (j->i < j->n && j->s[j->i] != quote) {
        unsigned char c = j->s[j->i];
        if (c < 0x20 || c > 0x7e || c == '\\' || n + 1 >= size) return 0;
        out[n++] = (char)c;
        j->i++;
    }
    out[n] = 0;
    return j->i < j->n && j->s[j->i++] == quote;
}

static int moe__npy_word(moe__json *j, const char *word) {
    size_t n = strlen(word);
    moe__json_space(j);
    if (j->n - j->i < n || memcmp(j->s + j->i, word, n)) return 0;
    j->i += n;
    return 1;
}

/* (), (3,), (3, 4) or (3, 4,) */
static moe_status moe__npy_shape(moe__json *j, moe_npy *f) {
    int comma = 1;
    f->n_dims = 0;
    if (!moe__json_take(j, '(')) return MOE_E_NPY_HEADER;
    while (!moe__json_take(j, ')')) {
        size_t v = 0, start, digits;
        moe__json_space(j);
        start = j->i;
        digits = moe__json_digits(j);
        if (!comma || !digits || (digits > 1 && j->s[start] == '0')) return MOE_E_NPY_HEADER;
        if (f->n_dims == sizeof f->dim / sizeof f->dim[0]) return MOE_E_FILE_SHAPE;
        for (size_t k = 0; k < digits; k++)
            if (!moe__mul(v, 10, &v) || !moe__add_size(v, (size_t)(j->s[start + k] - '0'), &v)) return MOE_E_FILE_SHAPE;
        f->dim[f->n_dims++] = v;
        comma = moe__json_take(j, ',');
    }
    return f->n_dims == 1 && !comma ? MOE_E_NPY_HEADER : MOE_OK; /* (3) is no tuple */
}

static moe_status moe__npy_dictionary(moe__json *j, moe_npy *f) {
    int seen = 0, order = 0;
    char key[16], text[8];
    if (!moe__json_take(j, '{')) return MOE_E_NPY_HEADER;
    for (int first = 1; !moe__json_take(j, '}'); first = 0) {
        moe_status s = MOE_OK;
        int bit;
        if (!first && !moe__json_take(j, ',')) return MOE_E_NPY_HEADER;
        if (!first && moe__json_take(j, '}')) break; /* a comma may stand after the last */
        if (!moe__npy_string(j, key, sizeof key) || !moe__json_take(j, ':')) return MOE_E_NPY_HEADER;
        moe__json_space(j);
        bit = !strcmp(key, "descr") ? 1 : !strcmp(key, "fortran_order") ? 2 : !strcmp(key, "shape") ? 4 : 0;
        if (!bit || (seen & bit)) return MOE_E_NPY_HEADER;
        seen |= bit;
        if (bit == 1) {
            size_t at = j->i;
            int v = MOE__DTYPE_COUNT - 1;
            if (j->i < j->n && j->s[j->i] == '[') return MOE_E_FILE_DTYPE; /* records */
            if (!moe__npy_string(j, text, sizeof text)) return MOE_E_NPY_HEADER;
            while (v > 0 && (!*moe__dtypes[v].npy || strcmp(text, moe__dtypes[v].npy))) v--;
            f->dtype = (moe_dtype)v;
            if (!v) {
                j->i = at;
                return MOE_E_FILE_DTYPE;
            }
        } else if (bit == 2) {
            order = moe__npy_word(j, "True");
            if (!order && !moe__npy_word(j, "False")) return MOE_E_NPY_HEADER;
            if (order) return MOE_E_NPY_ORDER;
        } else s = moe__npy_shape(j, f);
        if (s) return s;
    }
    moe__json_space(j);
    return seen == 7 && j->i == j->n ? MOE_OK : MOE_E_NPY_HEADER;
}

/* Needs the first n bytes. What is there of the file is too little: more must be given, or the file ends too early. */
static moe_status moe__npy_needs(moe_npy *f, uint64_t n, size_t size, uint64_t file_size) {
    if (n <= size) return MOE_OK;
    f->offset = n <= file_size ? (size_t)n : file_size < size ? (size_t)file_size : size;
    return MOE_E_FILE_SHORT;
}

static moe_status moe__npy_read(moe_npy *f, const unsigned char *p, size_t size, uint64_t file_size) {
    moe__json j;
    size_t start, length, bytes;
    moe_status s = moe__npy_needs(f, 10, size, file_size);
    if (s) return s;
    if (memcmp(p, "\x93NUMPY", 6) || p[6] < 1 || p[6] > 3 || p[7]) {
        f->offset = memcmp(p, "\x93NUMPY", 6) ? 0 : 6;
        return MOE_E_NPY_MAGIC;
    }
    start = p[6] == 1 ? 10 : 12;
    s = moe__npy_needs(f, start, size, file_size);
    if (s) return s;
    length = p[6] == 1 ? (size_t)p[8] | (size_t)p[9] << 8 : 0;
    for (size_t k = 4; p[6] > 1 && k-- > 0;) length = length << 8 | p[8 + k];
    f->offset = 8;
    if (length > MOE__NPY_CAP - start) return MOE_E_NPY_HEADER;
    s = moe__npy_needs(f, start + length, size, file_size);
    if (s) return s;
    j.s = p;
    j.i = start;
    j.n = start + length;
    s = moe__npy_dictionary(&j, f);
    f->offset = j.i;
    if (s) return s;
    f->data = j.n;
    f->count = 1;
    for (size_t k = 0; k < f->n_dims; k++)
        if (!moe__mul(f->count, f->dim[k], &f->count)) return MOE_E_FILE_SHAPE;
    for (size_t k = 0, product = 1; k < f->n_dims; k++) /* a 0 hides no overflow of the others */
        if (f->dim[k] && !moe__mul(product, f->dim[k], &product)) return MOE_E_FILE_SHAPE;
    if (!moe__mul(f->count, moe_dtype_size(f->dtype), &bytes)) return MOE_E_FILE_SHAPE;
    if (bytes > file_size - f->data) {
        f->offset = file_size > SIZE_MAX ? SIZE_MAX : (size_t)file_size;
        return MOE_E_FILE_SHORT;
    }
    if (bytes < file_size - f->data) {
        f->offset = (size_t)f->data + bytes;
        return MOE_E_NPY_SIZE;
    }
    f->offset = 0;
    return MOE_OK;
}

MOE_API moe_status moe_npy_header(moe_npy *f, const void *bytes, size_t size, uint64_t file_size) {
    if (!f) return MOE_E_NULL_OUT;
    memset(f, 0, sizeof *f);
    if (!bytes) return MOE_E_NULL_BYTES;
    if (size > file_size) size = (size_t)file_size;
    moe_status s = moe__npy_read(f, (const unsigned char *)bytes, size, file_size);
    if (s) f->count = f->n_dims = 0, f->data = 0, f->dtype = MOE_DTYPE_NONE; /* nothing is to be found in it */
    return s;
}

MOE_API moe_status moe_npy_open(moe_npy *f, const void *bytes, size_t size) {
    moe_status s = moe_npy_header(f, bytes, size, size);
    if (!s) f->elements = (const unsigned char *)bytes + (size_t)f->data;
    return s;
}

/* Element i of a little-endian array. */
static uint64_t moe__little(const unsigned char *p, size_t bytes) {
    uint64_t v = 0;
    for (size_t k = bytes; k-- > 0;) v = v << 8 | p[k];
    return v;
}

MOE_API moe_status moe_to_float(moe_dtype dtype, size_t n, const void *elements, float *out) {
    const unsigned char *p = (const unsigned char *)elements;
    if ((unsigned)dtype >= MOE__DTYPE_COUNT || dtype == MOE_DTYPE_NONE || dtype >= MOE_DTYPE_I32) return MOE_E_FILE_DTYPE;
    if (!n) return MOE_OK;
    if (!p) return MOE_E_NULL_BYTES;
    if (!out) return MOE_E_NULL_OUT;
    const uint32_t one = 1;
    unsigned char low;
    memcpy(&low, &one, 1);
    if (dtype == MOE_DTYPE_F32 && low) { /* this machine's own order */
        memcpy(out, p, n * sizeof *out);
        return MOE_OK;
    }
    if (dtype == MOE_DTYPE_F16) moe__k()->half(n, p, out);
    else if (dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_U16) moe__k()->bfloat(n, p, out);
    for (size_t i = 0; dtype == MOE_DTYPE_F32 && i < n; i++) out[i] = moe__float_of((uint32_t)moe__little(p + 4 * i, 4));
    for (size_t i = 0; dtype == MOE_DTYPE_F64 && i < n; i++) {
        uint64_t bits = moe__little(p + 8 * i, 8);
        double d;
        memcpy(&d, &bits, sizeof d);
        out[i] = (float)d;
    }
    return MOE_OK;
}

MOE_API moe_status moe_to_index(moe_dtype dtype, size_t n, const void *elements, int32_t *out, size_t *bad) {
    const unsigned char *p = (const unsigned char *)elements;
    if (dtype != MOE_DTYPE_I32 && dtype != MOE_DTYPE_I64) return MOE_E_FILE_DTYPE;
    if (!n) return MOE_OK;
    if (!p) return MOE_E_NULL_BYTES;
    if (!out) return MOE_E_NULL_OUT;
    size_t size = moe_dtype_size(dtype);
    for (size_t i = 0; i < n; i++) {
        uint64_t v = moe__little(p + size * i, size);
        uint32_t low = (uint32_t)v, high = size == 8 ? (uint32_t)(v >> 32) : low >> 31 ? 0xffffffffu : 0;
        if (high != (low >> 31 ? 0xffffffffu : 0)) {
            if (bad) *bad = i;
            return MOE_E_NPY_INDEX;
        }
        memcpy(&out[i], &low, sizeof low);
    }
    return MOE_OK;
}

/* -- the routers of known models -- */
MOE_API int moe_router_name(const char *name, size_t length, size_t *layer) {
    static const char before[] = "model.layers.";
    static const char *const after[] = {".mlp.gate.weight", ".block_sparse_moe.gate.weight"};
    size_t i = sizeof before - 1, first, v = 0;
    if (!name || length < i || memcmp(name, before, i)) return 0;
    for (first = i; i < length && i < first + 9 && name[i] >= '0' && name[i] <= '9'; i++) v = v * 10 + (size_t)(name[i] - '0');
    if (i == first || (name[first] == '0' && i > first + 1)) return 0;
    for (int k = 0; k < 2; k++) {
        if (length - i != strlen(after[k]) || memcmp(name + i, after[k], length - i)) continue;
        if (layer) *layer = v;
        return 1;
    }
    return 0;
}

MOE_API moe_status moe_file_router(const moe_file *f, size_t i, size_t *layer, moe_file_tensor *out) {
    size_t last = 0, best;
    if (!layer || !out) return MOE_E_NULL_OUT;
    for (size_t found = 0;; found++) { /* the lowest layer above the last one */
        moe__cursor c;
        moe__entry e;
        moe_status s = moe__cursor_init(&c, f);
        best = SIZE_MAX;
        while (!s && !(s = moe__cursor_next_of(&c, MOE__ENTRY_TENSOR, &e))) {
            size_t at;
            if (!moe_router_name(e.tensor.name, e.tensor.name_length, &at) || at >= best || (found && at <= last)) continue;
            best = at;
            if (found == i) *out = e.tensor;
        }
        if (s != MOE_E_NAME) return s;
        if (best == SIZE_MAX) return MOE_E_NAME;
        last = best;
        if (found < i) continue;
        *layer = best;
        return MOE_OK;
    }
}

/* The next pair of a weight_map: 1, 0 at its end, -1 for a fault. */
static int moe__shards_next(moe__json *j, int *first, moe__json_text *name, moe__json_text *file) {
    int more = moe__json_more(j, '}', first);
    if (more > 0 && !(moe__json_string(j, name) && moe__json_take(j, ':') && moe__json_string(j, file))) return -1;
    return more;
}

/* A string's text into a buffer; MOE_E_SMALL_MEMORY if it does not fit. */
static moe_status moe__json_copy(const moe__json *j, moe__json_text t, char *buffer, size_t size) {
    moe__json at;
    unsigned char u[4];
    size_t n = 0;
    at.s = j->s;
    at.n = t.end;
    buffer[0] = 0;
    for (at.i = t.begin; at.i < at.n;) {
        size_t length = moe__json_char(&at, u);
        if (n + length >= size) {
            buffer[0] = 0;
            return MOE_E_SMALL_MEMORY;
        }
        memcpy(buffer + n, u, length);
        n += length;
    }
    buffer[n] = 0;
    return MOE_OK;
}

/* A file in the same folder: no separator, drive or control character, and not "." or "..". */
static int moe__plain_file_name(const moe__json *j, moe__json_text t) {
    moe__json at;
    unsigned char u[4];
    at.s = j->s;
    at.n = t.end;
    for (at.i = t.begin; at.i < at.n;)
        if (moe__json_char(&at, u) == 1 && (u[0] < 0x20 || u[0] == '/' || u[0] == '\\' || u[0] == ':')) return 0;
    return t.end > t.begin && !moe__json_is(j, t, ".") && !moe__json_is(j, t, "..");
}

MOE_API moe_status moe_shards_open(moe_shards *f, const void *bytes, size_t size) {
    moe__json j;
    moe__json_text key, file;
    int first = 1, inner, more, again;
    if (!f) return MOE_E_NULL_OUT;
    memset(f, 0, sizeof *f);
    if (!bytes) return MOE_E_NULL_BYTES;
    f->bytes = (const unsigned char *)bytes;
    f->size = size;
    j.s = f->bytes;
    j.i = 0;
    j.n = size;
    int ok = moe__json_take(&j, '{');
    while (ok && (more = moe__json_more(&j, '}', &first)) != 0) {
        ok = more > 0 && moe__json_string(&j, &key) && moe__json_take(&j, ':');
        if (!ok) break;
        if (!moe__json_is(&j, key, "weight_map")) {
            ok = moe__json_skip(&j, MOE__JSON_DEPTH);
            continue;
        }
        ok = !f->map && moe__json_take(&j, '{');
        f->map = j.i;
        inner = 1;
        while (ok && (again = moe__shards_next(&j, &inner, &key, &file)) != 0) {
            ok = again > 0 && moe__plain_file_name(&j, file);
            f->n_tensors += (size_t)ok;
            if (again > 0 && !ok) j.i = file.begin;
        }
    }
    moe__json_space(&j);
    if (ok && f->map && j.i == j.n) return MOE_OK;
    f->offset = j.i;
    f->n_tensors = f->map = 0;
    f->bytes = NULL; /* nothing is to be found in it */
    return MOE_E_SHARDS;
}

static moe_status moe__shards_start(const moe_shards *f, moe__json *j) {
    if (!f || !f->bytes || !f->map) return MOE_E_NULL_BYTES;
    j->s = f->bytes;
    j->i = f->map;
    j->n = f->size;
    return MOE_OK;
}

MOE_API moe_status moe_shards_find(const moe_shards *f, const char *name, char *buffer, size_t size) {
    moe__json j;
    moe__json_text key, file;
    int first = 1;
    moe_status s = moe__shards_start(f, &j);
    if (s) return s;
    if (!name) return MOE_E_NULL_NAME;
    if (!buffer) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    while (moe__shards_next(&j, &first, &key, &file) > 0)
        if (moe__json_is(&j, key, name)) return moe__json_copy(&j, file, buffer, size); /* buffer may be name */
    buffer[0] = 0;
    return MOE_E_NAME;
}

MOE_API moe_status moe_shards_router(const moe_shards *f, size_t i, size_t *layer, char *name, size_t size) {
    size_t last = 0, best, at;
    if (!layer || !name) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    name[0] = 0;
    for (size_t found = 0;; found++) {
        moe__json j;
        moe__json_text key, file, found_key = {0, 0};
        int first = 1;
        moe_status s = moe__shards_start(f, &j);
        if (s) return s;
        best = SIZE_MAX;
        while (moe__shards_next(&j, &first, &key, &file) > 0) {
            if (!moe_router_name((const char *)j.s + key.begin, key.end - key.begin, &at)) continue;
            if (at >= best || (found && at <= last)) continue;
            best = at;
            found_key = key;
        }
        if (best == SIZE_MAX) return MOE_E_NAME;
        last = best;
        if (found < i) continue;
        *layer = best;
        return moe__json_copy(&j, found_key, name, size);
    }
}

/* Numbers of metadata. No locale is asked. */
static int moe__parse_u64(const char *s, uint64_t *out) {
    uint64_t v = 0;
    if (!*s || (*s == '0' && s[1])) return 0;
    for (; *s; s++) {
        uint64_t digit = (uint64_t)(*s - '0');
        if (*s < '0' || *s > '9' || v > (UINT64_MAX - digit) / 10) return 0;
        v = v * 10 + digit;
    }
    *out = v;
    return 1;
}

static int moe__parse_float(const char *s, float *out) {
    uint64_t mantissa = 0, power = 0;
    int negative = *s == '-', digits = 0, point = 0, e = 0;
    double v;
    for (s += negative; (*s >= '0' && *s <= '9') || (*s == '.' && !point); s++) {
        if (*s == '.') {
            point = 1;
            continue;
        }
        if (++digits > 64) return 0;
        if (mantissa < UINT64_C(100000000000000000)) {
            mantissa = mantissa * 10 + (uint64_t)(*s - '0');
            e -= point;
        } else e += !point;
    }
    if (!digits) return 0;
    if (*s == 'e') {
        int down = *++s == '-';
        if (!moe__parse_u64(s + down, &power) || power > 999) return 0;
        e += down ? -(int)power : (int)power;
    } else if (*s) return 0;
    v = mantissa ? moe__scale10((double)mantissa, e) : 0;
    if (!(v < 3.4028235677973366e38)) return 0; /* from here on it rounds to infinity */
    *out = (float)(negative ? -v : v);
    return 1;
}

static int moe__field_read(const moe__field *f, const char *text, moe_desc *d) {
    char *p = (char *)d + f->offset;
    uint64_t u64 = 0;
    size_t size;
    float number = (float)MOE_OFF;
    int v;
    switch (f->type) {
    case MOE__FIELD_SIZE:
        if (!moe__parse_u64(text, &u64) || u64 > SIZE_MAX) return 0;
        size = (size_t)u64;
        memcpy(p, &size, sizeof size);
        return 1;
    case MOE__FIELD_U64:
        if (!moe__parse_u64(text, &u64)) return 0;
        memcpy(p, &u64, sizeof u64);
        return 1;
    case MOE__FIELD_FLOAT:
    case MOE__FIELD_LOSS:
        if (strcmp(text, "off") && !moe__parse_float(text, &number)) return 0;
        memcpy(p, &number, sizeof number);
        return 1;
    case MOE__FIELD_INT:
    case MOE__FIELD_ENUM:
        for (v = MOE_OFF; v < 0 || f->value_name(v); v++) {
            const char *name = f->value_name(v);
            unsigned char small = (unsigned char)v;
            if (!name || strcmp(text, name)) continue;
            if (f->size == 1) memcpy(p, &small, 1);
            else memcpy(p, &v, sizeof v);
            return 1;
        }
        return 0;
    }
    return 0;
}

/* What a layer's file holds: tensor i, its part, and its name there. The moments follow the parameters. */
typedef struct moe__saved {
    moe_part part;
    moe_tensor tensor;
    char name[40];
    size_t bytes;
} moe__saved;

static int moe__saved_at(const moe_desc *d, int with_optimizer, size_t i, moe__saved *out) {
    static const char *const prefix[] = { "", "moment1.", "moment2." };
    static const moe_part parts[] = { MOE_PART_PARAMS, MOE_PART_MOMENT1, MOE_PART_MOMENT2 };
    size_t n_parts = !with_optimizer ? 1 : d->optimizer == MOE_OPTIMIZER_SGD ? 2 : 3, n = 0;
    moe__text t;
    while (moe__desc_tensor(d, n, &out->tensor)) n++;
    if (i / n >= n_parts || !moe__desc_tensor(d, i % n, &out->tensor)) return 0;
    out->part = parts[i / n];
    out->bytes = out->tensor.count * sizeof(float);
    t.p = out->name;
    t.size = sizeof out->name;
    t.n = 0;
    moe__text_add(&t, prefix[i / n]);
    moe__text_add(&t, out->tensor.name);
    moe__text_end(&t);
    return 1;
}

/* The header into t, padded so that the data begins at a multiple of 8; the data's size into *data. */
static moe_status moe__layer_header(const moe_layer *m, int with_optimizer, moe__text *t, size_t *data) {
    const moe_desc *d = moe_layer_desc(m);
    moe__saved saved;
    size_t i, k;
    *data = 0;
    moe__text_add(t, "{\"__metadata__\":{\"format\":\"moe.h\",\"version\":\"1\",");
    moe__fields_write(d, 1, t);
    if (with_optimizer) {
        moe__text_add(t, ",\"step\":\"");
        moe__text_u64(t, moe__layer_step_count(m));
        moe__text_add(t, "\"");
    }
    moe__text_add(t, "}");
    for (i = 0; moe__saved_at(d, with_optimizer, i, &saved); i++) {
        moe__text_add(t, ",\"");
        moe__text_add(t, saved.name);
        moe__text_add(t, "\":{\"dtype\":\"F32\",\"shape\":[");
        for (k = 0; k < saved.tensor.n_dims; k++) {
            if (k) moe__text_add(t, ",");
            moe__text_u64(t, saved.tensor.dim[k]);
        }
        moe__text_add(t, "],\"data_offsets\":[");
        moe__text_u64(t, *data);
        if (!moe__add_size(*data, saved.bytes, data)) return MOE_E_OVERFLOW;
        moe__text_add(t, ",");
        moe__text_u64(t, *data);
        moe__text_add(t, "]}");
    }
    moe__text_add(t, "}");
    while (t->n % 8) moe__text_add(t, " ");
    return MOE_OK;
}

/* `header` without its 8 bytes of length, `total` = the file. */
static moe_status moe__layer_file_size(const moe_layer *m, int with_optimizer, size_t *header, size_t *total) {
    moe__text t = { NULL, 0, 0 };
    moe_status s;
    if (!m) return MOE_E_NULL_LAYER;
    if (with_optimizer && moe_layer_desc(m)->training == MOE_OFF) return MOE_E_INFERENCE;
    s = moe__layer_header(m, with_optimizer, &t, total);
    if (s) return s;
    *header = t.n;
    return moe__add_size(*total, t.n + 8, total) ? MOE_OK : MOE_E_OVERFLOW;
}

/* n floats at p between this machine's order of bytes and little-endian: the same both ways. */
static void moe__little_endian(unsigned char *p, size_t n) {
    for (; n > 0; n--, p += 4) {
        uint32_t u;
        memcpy(&u, p, 4);
        p[0] = (unsigned char)u;
        p[1] = (unsigned char)(u >> 8);
        p[2] = (unsigned char)(u >> 16);
        p[3] = (unsigned char)(u >> 24);
    }
}

/* A tensor's bytes of the file into p, of any alignment. The floats are laid at the aligned place just below p
 * (the header is always before it) and moved up. */
static moe_status moe__layer_get_bytes(const moe_layer *m, const moe__saved *saved, unsigned char *p) {
    size_t shift = (size_t)((uintptr_t)p % sizeof(float));
    unsigned char below[sizeof(float)], *aligned = p - shift;
    moe_status s;
    memcpy(below, aligned, shift);
    s = moe_layer_get(m, saved->part, saved->tensor.name, (float *)(void *)aligned, saved->tensor.count);
    if (shift) memmove(p, aligned, saved->bytes);
    memcpy(aligned, below, shift);
    moe__little_endian(p, saved->tensor.count);
    return s;
}

static size_t moe__layer_put_header(const moe_layer *m, int with_optimizer, size_t header, unsigned char *p) {
    moe__text t;
    size_t data, i;
    uint64_t length = header;
    for (i = 0; i < 8; i++) p[i] = (unsigned char)(length >> (8 * i));
    t.p = (char *)p + 8;
    t.size = header;
    t.n = 0;
    (void)moe__layer_header(m, with_optimizer, &t, &data);
    return 8 + header;
}

MOE_API moe_status moe_layer_save_size(const moe_layer *m, int with_optimizer, size_t *bytes) {
    size_t header, total;
    moe_status s;
    if (!bytes) return MOE_E_NULL_OUT;
    *bytes = 0;
    s = moe__layer_file_size(m, with_optimizer, &header, &total);
    if (!s) *bytes = total;
    return s;
}

MOE_API moe_status moe_layer_save_memory(const moe_layer *m, int with_optimizer, void *bytes, size_t size) {
    unsigned char *p = (unsigned char *)bytes;
    moe__saved saved;
    size_t header, total, i;
    moe_status s = moe__layer_file_size(m, with_optimizer, &header, &total);
    if (s) return s;
    if (!bytes) return MOE_E_NULL_BYTES;
    if (size < total) return MOE_E_SMALL_MEMORY;
    p += moe__layer_put_header(m, with_optimizer, header, p);
    for (i = 0; !s && moe__saved_at(moe_layer_desc(m), with_optimizer, i, &saved); i++) {
        s = moe__layer_get_bytes(m, &saved, p);
        p += saved.bytes;
    }
    return s;
}

/* The desc, and the step count if the optimiser was saved, from the metadata. A field that is not there is 0, the
 * default: a later moe.h that adds one reads older files, and raises the version when its own files need it. */
static moe_status moe__file_desc(const moe_file *f, const moe_desc *surroundings, moe_desc *d, int *with_optimizer,
                                 uint64_t *step) {
    moe__field field;
    char name[32], text[80];
    size_t i;
    moe_status s;
    memset(d, 0, sizeof *d);
    if (moe_file_metadata(f, "format", text, sizeof text) || strcmp(text, "moe.h")) return MOE_E_FILE_DESC;
    if (moe_file_metadata(f, "version", text, sizeof text) || strcmp(text, "1")) return MOE_E_FILE_DESC;
    for (i = 0; moe__field_at(i, &field, name); i++) {
        s = moe_file_metadata(f, field.name, text, sizeof text);
        if (s == MOE_E_NAME) continue;
        if (s || !moe__field_read(&field, text, d)) return MOE_E_FILE_DESC;
    }
    s = moe_file_metadata(f, "step", text, sizeof text);
    *with_optimizer = s != MOE_E_NAME;
    if (*with_optimizer && (s || !moe__parse_u64(text, step))) return MOE_E_FILE_DESC;
    if (surroundings) {
        d->parallel = surroundings->parallel;
        d->alloc_context = surroundings->alloc_context;
    }
    if (moe_desc_resolve(d, d) || (*with_optimizer && d->training == MOE_OFF)) return MOE_E_FILE_DESC;
    return MOE_OK;
}

/* The file's tensor with the name, type and shape that the layer has. */
static moe_status moe__file_saved(const moe_file *f, const moe__saved *saved, moe_file_tensor *out) {
    size_t k;
    if (moe_file_find(f, saved->name, out) || strcmp(out->dtype, "F32")) return MOE_E_FILE_TENSOR;
    if (out->n_dims != saved->tensor.n_dims) return MOE_E_FILE_TENSOR;
    for (k = 0; k < out->n_dims; k++) {
        if (out->dim[k] != saved->tensor.dim[k]) return MOE_E_FILE_TENSOR;
    }
    return MOE_OK;
}

static moe_status moe__layer_set_bytes(moe_layer *m, const moe__saved *saved, const unsigned char *bytes,
                                       float *scratch) {
    size_t i;
    memcpy(scratch, bytes, saved->bytes);
    moe__little_endian((unsigned char *)scratch, saved->tensor.count);
    for (i = 0; i < saved->tensor.count; i++) {
        if (!(scratch[i] - scratch[i] == 0)) return MOE_E_FILE_NAN;
        if (saved->part == MOE_PART_MOMENT2 && scratch[i] < 0) return MOE_E_FILE_NAN; /* a step takes its root */
    }
    return moe_layer_set(m, saved->part, saved->tensor.name, scratch, saved->tensor.count);
}

MOE_API moe_status moe_layer_load_memory(moe_layer **out, const void *bytes, size_t size,
                                         const moe_desc *surroundings) {
    moe_layer *m = NULL;
    moe_file f;
    moe_file_tensor t;
    moe_desc d;
    moe__saved saved;
    float *scratch = NULL;
    uint64_t step = 0;
    size_t i, most = 0;
    int with_optimizer = 0;
    moe_status s;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    s = moe_file_open(&f, bytes, size);
    if (!s) s = moe__file_desc(&f, surroundings, &d, &with_optimizer, &step);
    if (s) return s;
    /* all shapes before any memory: what is allocated is in proportion to the file */
    for (i = 0; !s && moe__saved_at(&d, with_optimizer, i, &saved); i++) {
        s = moe__file_saved(&f, &saved, &t);
        if (saved.bytes > most) most = saved.bytes;
    }
    if (!s) s = moe_layer_new(&m, &d);
    if (s) return s;
    scratch = (float *)moe__alloc(d.alloc_context, most);
    if (!scratch) s = MOE_E_NO_MEMORY;
    for (i = 0; !s && moe__saved_at(&d, with_optimizer, i, &saved); i++) {
        s = moe__file_saved(&f, &saved, &t);
        if (!s) s = moe__layer_set_bytes(m, &saved, t.data, scratch);
    }
    moe__free(d.alloc_context, scratch);
    if (s) {
        moe_layer_free(m);
        return s;
    }
    if (with_optimizer) moe__layer_set_step_count(m, step);
    *out = m;
    return MOE_OK;
}

#ifndef MOE_NO_STDIO
/* The whole file, one tensor after the other: the memory is the header's or the largest tensor's. */
static moe_status moe__layer_write(const moe_layer *m, int with_optimizer, FILE *file) {
    const moe_desc *d = moe_layer_desc(m);
    unsigned char *buffer;
    moe__saved saved;
    size_t header, total, most, i;
    moe_status s = moe__layer_file_size(m, with_optimizer, &header, &total);
    if (s) return s;
    most = header + 8;
    for (i = 0; moe__saved_at(d, with_optimizer, i, &saved); i++) {
        if (saved.bytes > most) most = saved.bytes;
    }
    buffer = (unsigned char *)moe__alloc(d->alloc_context, most);
    if (!buffer) return MOE_E_NO_MEMORY;
    total = moe__layer_put_header(m, with_optimizer, header, buffer);
    if (fwrite(buffer, 1, total, file) != total) s = MOE_E_WRITE;
    for (i = 0; !s && moe__saved_at(d, with_optimizer, i, &saved); i++) {
        s = moe__layer_get_bytes(m, &saved, buffer);
        if (!s && fwrite(buffer, 1, saved.bytes, file) != saved.bytes) s = MOE_E_WRITE;
    }
    moe__free(d->alloc_context, buffer);
    return s;
}

MOE_API moe_status moe_layer_save(const moe_layer *m, int with_optimizer, const char *path) {
    size_t header, total, length;
    moe_status s = moe__layer_file_size(m, with_optimizer, &header, &total);
    void *context;
    char *part;
    FILE *file;
    if (s) return s;
    if (!path) return MOE_E_NULL_PATH;
    context = moe_layer_desc(m)->alloc_context;
    length = strlen(path);
    part = (char *)moe__alloc(context, length + sizeof ".part");
    if (!part) return MOE_E_NO_MEMORY;
    memcpy(part, path, length);
    memcpy(part + length, ".part", sizeof ".part");
    file = fopen(part, "wb");
    if (!file) s = MOE_E_OPEN;
    else {
        s = moe__layer_write(m, with_optimizer, file);
        if (fflush(file) || ferror(file)) s = s ? s : MOE_E_WRITE;
        if (fclose(file)) s = s ? s : MOE_E_WRITE;
#ifdef _WIN32
        if (!s) (void)remove(path); /* rename does not replace there */
#endif
        if (!s && rename(part, path)) s = MOE_E_WRITE;
        if (s) (void)remove(part);
    }
    moe__free(context, part);
    return s;
}

/* The bytes from here to the end, without moving; 0 if they cannot be counted. */
static uint64_t moe__file_length(FILE *file) {
#ifdef _WIN32
    __int64 n = _fseeki64(file, 0, SEEK_END) ? -1 : _ftelli64(file);
#else
    long n = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
#endif
    return n < 0 || fseek(file, 0, SEEK_SET) ? 0 : (uint64_t)n;
}

MOE_API moe_status moe_layer_load(moe_layer **out, const char *path, const moe_desc *surroundings) {
    void *context = surroundings ? surroundings->alloc_context : NULL, *bytes = NULL;
    uint64_t length;
    FILE *file;
    moe_status s = MOE_OK;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    if (!path) return MOE_E_NULL_PATH;
    file = fopen(path, "rb");
    if (!file) return MOE_E_OPEN;
    if (fgetc(file) == EOF) s = ferror(file) ? MOE_E_READ : MOE_E_FILE_SHORT; /* a directory, an empty file */
    length = s ? 0 : moe__file_length(file);
    if (!s && !length) s = MOE_E_READ;
    if (!s && length > SIZE_MAX) s = MOE_E_OVERFLOW;
    if (!s) {
        bytes = moe__alloc(context, (size_t)length);
        if (!bytes) s = MOE_E_NO_MEMORY;
        else if (fread(bytes, 1, (size_t)length, file) != (size_t)length) s = MOE_E_READ;
    }
    if (fclose(file) && !s) s = MOE_E_READ;
    if (!s) s = moe_layer_load_memory(out, bytes, (size_t)length, surroundings);
    moe__free(context, bytes);
    return s;
}
#endif /* MOE_NO_STDIO */

#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#elif defined(__GNUC__)
#pragma GCC pop_options
#elif defined(_MSC_VER)
#pragma fp_contract(on)
#endif
#endif /* !MOE__IMPLEMENTED_2 */
#endif /* !MOE__PASS */
#endif /* MOE_IMPLEMENTATION */

/*
 * This software is available under two licenses; choose whichever you prefer.
 *
 * A. MIT License. Copyright (c) 2026 the moe.h authors.
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
 * persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice
 * and this permission notice shall be included in all copies or substantial portions of the Software.
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 *
 * B. Public domain (www.unlicense.org). This is free and unencumbered software released into the public domain. Anyone
 * is free to copy, modify, publish, use, compile, sell, or distribute this software, either in source code form or as a
 * compiled binary, for any purpose, commercial or non-commercial, and by any means.
 */

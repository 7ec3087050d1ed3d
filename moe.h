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
 *         experts, combine, losses, controllers, optimiser, health, game, layer, systems, files
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
 *   MOE_NO_IMPLEMENTATION  take no notice of MOE_IMPLEMENTATION: for a build that compiles it once and links it
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
    X(MOE_E_NULL_MEAN, ARGUMENT, "mean", "mean: must not be NULL")                                           \
    X(MOE_E_NULL_ROUTER, ARGUMENT, "router", "router: must not be NULL")                                     \
    X(MOE_E_NULL_TEACHER, ARGUMENT, "teacher", "teacher: must not be NULL")                                  \
    X(MOE_E_NULL_OUTPUTS, ARGUMENT, "outputs", "outputs: must not be NULL")                                  \
    X(MOE_E_NULL_NOISE, ARGUMENT, "std", "std, threshold: must not be NULL")                                 \
    X(MOE_E_NULL_LATENT, ARGUMENT, "latent", "latent: must not be NULL")                                     \
    X(MOE_E_NULL_CODEBOOK, ARGUMENT, "codebook", "codebook: must not be NULL")                               \
    X(MOE_E_NULL_MATRIX, ARGUMENT, "matrix", "matrix: must not be NULL")                                     \
    X(MOE_E_NAN_PROB, NUMBER, "prob", "prob: NaN or infinite")                                               \
    X(MOE_E_NAN_MEAN, NUMBER, "mean", "mean: every mean must be finite and at least 0")                      \
    X(MOE_E_NAN_SCORES, NUMBER, "scores", "scores: NaN or infinite (or negative, where they are shares of a sum)")\
    X(MOE_E_NAN_ROUTER, NUMBER, "router", "router: NaN or infinite")                                         \
    X(MOE_E_NAN_MATRIX, NUMBER, "matrix", "matrix: NaN or infinite")                                         \
    X(MOE_E_NAN_OUTPUTS, NUMBER, "outputs", "outputs: NaN or infinite")                                      \
    X(MOE_E_NAN_LATENT, NUMBER, "latent", "latent: NaN or infinite")                                         \
    X(MOE_E_NAN_CODEBOOK, NUMBER, "codebook", "codebook: NaN or infinite")                                   \
    X(MOE_E_NOISE_VALUE, NUMBER, "std", "std, threshold: a standard deviation must be finite and above 0, a threshold finite")\
    X(MOE_E_TEACHER, ARGUMENT, "teacher", "teacher: an expert index is not below n_experts")                 \
    X(MOE_E_CODE, ARGUMENT, "index", "index: the code of a token is not below n_codes")                      \
    X(MOE_E_N_DEVICES, ARGUMENT, "n_devices", "n_devices: must be at least 1 and divide n_experts")          \
    X(MOE_E_DEVICE_LIMIT, ARGUMENT, "device_limit", "device_limit: the devices that a token may use must be 1 to n_devices")\
    X(MOE_E_HOME, ARGUMENT, "home", "home: must be below n_devices")                                         \
    X(MOE_E_SMOOTHING, ARGUMENT, "smoothing", "smoothing: must be above 0 and below 1")                      \
    X(MOE_E_SEQUENCE, ARGUMENT, "sequence", "sequence: its length must be at least 1")                       \
    X(MOE_E_COMMITMENT, ARGUMENT, "commitment", "commitment: must be finite and at least 0")                 \
    X(MOE_E_LOSS_STAGE, SUPPORT, "loss", "loss: the layer lacks what one that is on needs; its own function takes it as an argument") \
    X(MOE_E_NULL_CONTROL, ARGUMENT, "control", "control: must not be NULL, and must be initialised")         \
    X(MOE_E_NULL_INPUT, ARGUMENT, "input", "input: must not be NULL")                                        \
    X(MOE_E_CONTROL, ARGUMENT, "control", "control: not a moe_control_kind")                                 \
    X(MOE_E_RATE, ARGUMENT, "rate", "rate: must be finite and at least 0 (a factor: at least 1)")            \
    X(MOE_E_DAMPING, ARGUMENT, "damping", "damping: must be finite and at least 0 (a decay: at most 1)")     \
    X(MOE_E_BOUNDS, ARGUMENT, "low", "low, high: must be finite, and bounds of a coefficient 0 < low <= high")\
    X(MOE_E_SPARSITY, ARGUMENT, "sparsity", "sparsity: must be in [0, 1]")                                   \
    X(MOE_E_DROP_RATE, ARGUMENT, "drop_rate", "drop_rate: must be in [0, 1]")                                \
    X(MOE_E_SCHEDULE, ARGUMENT, "schedule", "schedule: not a moe_schedule_kind")                             \
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
    X(MOE_E_COMBINE, ARGUMENT, "combine", "combine: not a moe_combine_kind")                                 \
    X(MOE_E_NOISE, ARGUMENT, "noise", "noise: not a moe_noise_kind")                                         \
    X(MOE_E_ROUTER_INIT, ARGUMENT, "router_init", "router_init: not a moe_init_kind")                        \
    X(MOE_E_ROUTE_SEQUENCE, ARGUMENT, "route_sequence", "route_sequence: must be MOE_DEFAULT, MOE_ON or MOE_OFF, and on for combine = merge") \
    X(MOE_E_FREEZE_ROUTER, ARGUMENT, "freeze_router", "freeze_router: must be MOE_DEFAULT, MOE_ON or MOE_OFF") \
    X(MOE_E_RESIDUAL, ARGUMENT, "residual", "residual: must be MOE_DEFAULT, MOE_ON or MOE_OFF, and off for combine = soft") \
    X(MOE_E_LEARN_TEMPERATURE, ARGUMENT, "learn_temperature", "learn_temperature: must be MOE_DEFAULT, MOE_ON or MOE_OFF") \
    X(MOE_E_FALLBACK, ARGUMENT, "fallback", "fallback: must be MOE_DEFAULT, MOE_ON or MOE_OFF")              \
    X(MOE_E_RANDOM_SECOND, ARGUMENT, "random_second", "random_second: must be MOE_DEFAULT, MOE_ON or MOE_OFF") \
    X(MOE_E_GATE_DROP_EXPERTS, ARGUMENT, "gate_drop_experts", "gate_drop_experts: must be MOE_DEFAULT, MOE_ON or MOE_OFF") \
    X(MOE_E_ZERO_OUTPUT, ARGUMENT, "zero_output", "zero_output: must be MOE_DEFAULT, MOE_ON or MOE_OFF")     \
    X(MOE_E_SPECIAL_EXPERTS, ARGUMENT, "n_zero", "n_zero, n_copy, n_constant: together at most n_experts - 1, and none with combine = soft, merge or robust") \
    X(MOE_E_D_FF, ARGUMENT, "d_ff", "d_ff: must be below d_model for expert = orthonormal")                  \
    X(MOE_E_N_RANKS, ARGUMENT, "n_ranks", "n_ranks: must be at least 1, in a desc at most n_experts")                              \
    X(MOE_E_SLICE, ARGUMENT, "d_model", "d_model: must be a multiple of n_experts for score = slice")        \
    X(MOE_E_SUBSPACE, ARGUMENT, "score", "score: subspace needs expert = orthonormal and no special experts") \
    X(MOE_E_GATE_SELECT, ARGUMENT, "gate", "gate: sparsemixer goes with select = sampled, and sign with select = threshold, only") \
    X(MOE_E_SELECT_COMBINE, ARGUMENT, "select", "select: combine = soft and merge go with all experts and gate = softmax only") \
    X(MOE_E_N_CODES, ARGUMENT, "n_codes", "n_codes: must be 0 or at least n_experts, with combine = sum, no noise on x and no special experts") \
    X(MOE_E_SOFT_SLOTS, ARGUMENT, "soft_slots", "soft_slots: must be 1 unless combine = soft, and E times it at most 1048576") \
    X(MOE_E_TOP_K_MIN, ARGUMENT, "top_k_min", "top_k_min: must be at most top_k, and needs schedule_steps")  \
    X(MOE_E_ROUTER_GAIN, ARGUMENT, "router_gain", "router_gain: must be finite and above 0")                 \
    X(MOE_E_JITTER, ARGUMENT, "jitter", "jitter: must be in [0, 1)")                                         \
    X(MOE_E_NOISE_STD, ARGUMENT, "noise_std", "noise_std: must be finite and above 0")                       \
    X(MOE_E_WEIGHT_SCALE, ARGUMENT, "weight_scale", "weight_scale: must be finite and above 0")              \
    X(MOE_E_TEMPERATURE_END, ARGUMENT, "temperature_end", "temperature_end: must be finite and above 0, or 0, and needs schedule_steps") \
    X(MOE_E_MASK_JITTER, ARGUMENT, "mask_jitter", "mask_jitter: must be finite and above 0")                 \
    X(MOE_E_TOP_P, ARGUMENT, "top_p", "top_p: must be 0 to 1")                              \
    X(MOE_E_THRESHOLD, ARGUMENT, "threshold", "threshold: must be finite (and every expert's own), or in a desc MOE_OFF") \
    X(MOE_E_SINKHORN, ARGUMENT, "sinkhorn_epsilon", "sinkhorn_epsilon: must be finite and above 0")          \
    X(MOE_E_GATE_DROP, ARGUMENT, "gate_drop", "gate_drop: must be in [0, 1], and 0 with select = sinkhorn, auction or sampled and with combine = soft or merge") \
    X(MOE_E_EXPERT_DROP, ARGUMENT, "expert_drop", "expert_drop: must be in [0, 1)")                          \
    X(MOE_E_CAPACITY_FACTOR_EVAL, ARGUMENT, "capacity_factor_eval", "capacity_factor_eval: must be finite and above 0, or 0, or MOE_OFF") \
    X(MOE_E_ROBUST_TAU, ARGUMENT, "robust_tau", "robust_tau: must be finite and above 0")                    \
    X(MOE_E_CONTROLLER, ARGUMENT, "controller", "controller: not a moe_control_kind, or one whose loss, gate or capacity is not on: relu-lambda needs gate = relu and loss.relu-l1, adaptive needs loss.switch") \
    X(MOE_E_CONTROLLER_RATE, ARGUMENT, "controller_rate", "controller_rate: must be finite and above 0")     \
    X(MOE_E_CONTROLLER_DAMPING, ARGUMENT, "controller_damping", "controller_damping: must be finite and above 0, or MOE_OFF") \
    X(MOE_E_NULL_EXPERTS, ARGUMENT, "experts", "experts: score = subspace needs side.experts (a layer sets it)") \
    X(MOE_E_SYSTEM, ARGUMENT, "system", "system: the table of systems has no row of this name")              \
    X(MOE_E_FIELD, ARGUMENT, "field", "field: moe_desc has no such field")                                   \
    X(MOE_E_VALUE, ARGUMENT, "value", "value: not one that this field can have")                             \
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
    X(MOE_E_GROUPS, ARGUMENT, "n_groups", "n_groups: must be 1 to 256 and divide n_experts")                  \
    X(MOE_E_TOP_GROUPS, ARGUMENT, "top_groups", "top_groups: must be 1 to n_groups, and their experts at least top_k") \
    X(MOE_E_CAPACITY, ARGUMENT, "capacity", "capacity: must be at least 1")                                  \
    X(MOE_E_SLOTS, ARGUMENT, "slots", "slots: every expert may take the same token, so at least n_experts")  \
    X(MOE_E_ITERATIONS, ARGUMENT, "iterations", "iterations: must be at least 1")                            \
    X(MOE_E_UNEVEN, ARGUMENT, "n_tokens", "n_tokens: must be a multiple of n_experts, for every expert takes as many") \
    X(MOE_E_TAU, ARGUMENT, "tau", "tau: must be finite and above 0")                                         \
    X(MOE_E_TRIM, ARGUMENT, "trim", "trim: must be at least 0 and below 0.5")                                \
    X(MOE_E_AGGREGATE, ARGUMENT, "kind", "kind: not a moe_aggregate_kind")                                   \
    X(MOE_E_NO_OUTPUTS, ARGUMENT, "outputs", "outputs: none to combine")                                     \
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

typedef enum moe_score_kind { /* x (T, d) -> logits (T, E); h = d_router */
    MOE_SCORE_DEFAULT,
    MOE_SCORE_LINEAR,    /* x R, R (d, E) */
    MOE_SCORE_UNIT,      /* x R with the columns of R scaled to length 1: the scale constraint of SimBal alone */
    MOE_SCORE_MLP,       /* relu(x W + b) R + c, W (d, h), R (h, E): the ecology paper's router [S], its ReLU [D] */
    MOE_SCORE_COSINE,    /* cos(x, R_e), as in DynMoE [C] */
    MOE_SCORE_PROJECTED, /* cos(x W, R_e), W (d, h), as in X-MoE [P] */
    MOE_SCORE_NORMED,    /* LN(x) . LN(R_e) + c, LN = minus the mean, over the standard deviation; as in SMEAR [C] */
    MOE_SCORE_PROTOTYPE, /* cos(silu(LN(x)) W + b, R_e), after latent prototype routing [S] */
    MOE_SCORE_SLICE,     /* relu(mean of slice e of x), d % E == 0, as in LocMoE [P]; no parameters */
    MOE_SCORE_SUBSPACE,  /* |V_e^T x| / |x|, V_e = w1 of expert e, after ERMoE [S]; needs expert = orthonormal */
    MOE_SCORE_HASH,      /* by side.id alone (NULL: the token's position in its sequence); no parameters, no gradient */
    MOE_SCORE_RANDOM,    /* uniform numbers, new ones for each training forward; no parameters, no gradient */
    MOE__SCORE_COUNT
} moe_score_kind;

typedef enum moe_noise_kind { /* added to the logits in training */
    MOE_NOISE_DEFAULT,
    MOE_NOISE_NONE,
    MOE_NOISE_GAUSSIAN, /* N(0, noise_std^2) */
    MOE_NOISE_UNIFORM,  /* uniform in [0, noise_std) */
    MOE_NOISE_GUMBEL,   /* noise_std times standard Gumbel numbers */
    MOE_NOISE_LEARNED,  /* N(0, 1) softplus(x Wn), as in noisy top-k [K]; tensor "router.noise" */
    MOE__NOISE_COUNT
} moe_noise_kind;

typedef enum moe_gate_kind { /* logits (T, E) -> scores (T, E), and the weights of the selected */
    MOE_GATE_DEFAULT,
    MOE_GATE_SOFTMAX,          /* softmax(logits / temperature) over all experts */
    MOE_GATE_SOFTMAX_SELECTED, /* softmax(logits / temperature) over the selected experts: sums to 1 whatever `normalize` says */
    MOE_GATE_SIGMOID,          /* sigmoid(logits / temperature) */
    MOE_GATE_RELU,             /* relu(logits) */
    MOE_GATE_SIGN,             /* 1 / (number selected); straight-through gradient by sigmoid(logits / temperature) minus the same of
                                  the learned threshold, as in DynMoE [C] */
    MOE_GATE_SPARSEMIXER,      /* p of the selected among those not masked, with SparseMixer's gradient, as in GRIN [C] */
    MOE__GATE_COUNT
} moe_gate_kind;

typedef enum moe_select_kind { /* scores (T, E) -> routes */
    MOE_SELECT_DEFAULT,
    MOE_SELECT_TOP_K,         /* the k highest scores of each token; ties go to the lowest index. With `threshold`: only those above */
    MOE_SELECT_GROUPS,        /* top-k inside the top_groups best of n_groups groups, as in DeepSeek-V3 [C] */
    MOE_SELECT_TOP_P,         /* highest first, through the first whose running sum exceeds top_p */
    MOE_SELECT_THRESHOLD,     /* all scores above `threshold` (gate sign: logits above the learned thresholds) */
    MOE_SELECT_EXPERT_CHOICE, /* each expert takes its T top_k / E highest tokens; sees the whole batch: not causal */
    MOE_SELECT_SINKHORN,      /* training: top-k of the balanced plan of the batch; evaluation: top-k of the logits */
    MOE_SELECT_AUCTION,       /* training: T / E tokens each, highest total logit, by auction, as in BASE [C]; evaluation: the highest */
    MOE_SELECT_SAMPLED,       /* training: by Gumbel noise among the logits near the highest, as in GRIN [C]; evaluation: the highest */
    MOE_SELECT_ALL,           /* every expert */
    MOE__SELECT_COUNT
} moe_select_kind;

typedef enum moe_combine_kind { /* expert outputs -> y */
    MOE_COMBINE_DEFAULT,
    MOE_COMBINE_SUM,    /* sum of weight * output */
    MOE_COMBINE_SOFT,   /* soft slots: experts read mixtures of a sequence's tokens, as in Soft MoE [K] */
    MOE_COMBINE_MERGE,  /* one expert a sequence, its parameters the weighted mean of all, as in SMEAR [C] */
    MOE_COMBINE_ROBUST, /* weights times reliability exp(-distance from the median output / (robust_tau MAD)), renormalised [D] */
    MOE__COMBINE_COUNT
} moe_combine_kind;

typedef enum moe_schedule_kind { /* from one value to another in a number of steps */
    MOE_SCHEDULE_DEFAULT,
    MOE_SCHEDULE_LINEAR,
    MOE_SCHEDULE_EXPONENTIAL, /* from * (to / from)^share */
    MOE_SCHEDULE_COSINE,      /* half a cosine */
    MOE__SCHEDULE_COUNT
} moe_schedule_kind;

typedef enum moe_init_kind { /* of the tensor "router" */
    MOE_INIT_DEFAULT,
    MOE_INIT_UNIFORM,    /* +- router_gain / sqrt(rows) */
    MOE_INIT_ORTHOGONAL, /* columns of length router_gain, orthogonal as far as there are rows */
    MOE_INIT_ZERO,
    MOE__INIT_COUNT
} moe_init_kind;

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
    MOE_EXPERT_ORTHONORMAL, /* x V diag(s) U^T: W1 = V with orthonormal columns, W2 = diag(s) U^T with orthogonal rows, kept so after each
                               step; after ERMoE [S]. d_ff < d_model */
    MOE__EXPERT_COUNT
} moe_expert_kind;

typedef enum moe_loss_kind { /* auxiliary losses; desc.loss[kind] is the coefficient, 0 = not used; moe_loss_info says more */
    MOE_LOSS_SWITCH,      /* even load: E * sum_e f_e P_e, as in Switch / GShard [C] */
    MOE_LOSS_Z,           /* small logits: mean_t (logsumexp z_t)^2, as in ST-MoE [C] */
    MOE_LOSS_IMPORTANCE,  /* CV^2 of the mean probabilities P */
    MOE_LOSS_IMPORTANCE_SELECTED, /* CV^2 of the sums of the selected weights */
    MOE_LOSS_LOAD,        /* CV^2 of the probability, over the noise, of being selected */
    MOE_LOSS_ENTROPY,     /* -(mean entropy of a token): a token spreads over the experts */
    MOE_LOSS_CERTAINTY,   /* +(mean entropy of a token): a token is sure of its expert */
    MOE_LOSS_KL_UNIFORM,  /* KL(P || uniform) = ln E - entropy of P */
    MOE_LOSS_KL_REVERSE,  /* KL(uniform || P): strong on dead experts */
    MOE_LOSS_MUTUAL_INFORMATION, /* -(entropy of P - mean entropy of a token) */
    MOE_LOSS_L2_UNIFORM,  /* sum_e (P_e - 1/E)^2 */
    MOE_LOSS_SEQUENCE,    /* switch in each sequence, on shares of the scores */
    MOE_LOSS_DEVICE,      /* switch between devices: groups of experts */
    MOE_LOSS_COMMUNICATION, /* the same, of the tokens that a device receives */
    MOE_LOSS_LOCALITY,    /* KL(shares of the devices || nearly all at home) */
    MOE_LOSS_RELU_L1,     /* sparsity of a ReLU gate, the busy experts first */
    MOE_LOSS_VARIANCE,    /* -(variance of the scores over the tokens) */
    MOE_LOSS_ORACLE,      /* cross entropy to a teacher's choice */
    MOE_LOSS_SIMBAL,      /* sum abs(R^T R - I) of the router */
    MOE_LOSS_DIVERSE_SIMPLE, /* norm of R^T R - I, and mean norm of the router's columns */
    MOE_LOSS_PROTOTYPE_ORTHOGONALITY, /* squared norm of C^T C - I, C the router's columns at unit length */
    MOE_LOSS_PROTOTYPE_DIVERSITY, /* mean exp(2 cos - 2) between two prototypes */
    MOE_LOSS_PROTOTYPE_ALIGNMENT, /* 1 - mean cos of a latent token and its prototypes */
    MOE_LOSS_LATENT_KL,   /* KL(q || N(0, I)) of a variational latent */
    MOE_LOSS_REDUNDANCY,  /* mean relu(cos) between the logits of two experts */
    MOE_LOSS_OUTPUT_ORTHOGONALITY, /* projections of a token's expert outputs on each other */
    MOE_LOSS_ORTHONORMAL, /* squared norm of V^T V - I of an expert's basis V */
    MOE_LOSS_CODEBOOK,    /* codes to tokens, tokens to codes */
    MOE_LOSS_COUNT
} moe_loss_kind;

typedef enum moe_control_kind { /* balancing without a gradient */
    MOE_CONTROL_NONE,
    MOE_CONTROL_BIAS,        /* bias against the sign of the overload, as in DeepSeek's loss-free balancing [C] */
    MOE_CONTROL_QUANTILE,    /* bias at which an expert's share of tokens would win, as in quantile balancing [C] */
    MOE_CONTROL_ID,          /* integral and derivative of the relative error of the load [P] */
    MOE_CONTROL_RELU_LAMBDA, /* coefficient of relu-l1 towards a sparsity, as in ReMoE [C] */
    MOE_CONTROL_ADAPTIVE,    /* coefficient that follows the drop rate, after Skywork-MoE [K] */
    MOE_CONTROL_USAGE_BOOST, /* bias for experts whose average usage is low [C] */
    MOE_CONTROL_COUNT
} moe_control_kind;

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
    size_t n_zero, n_copy, n_constant; /* of the n_experts, the last: they give 0, the token, a learned mix of the token and a
                                          vector (MoE++ [C]); 0 = none. A zero expert's weight is 0, before normalisation */
    size_t sequence;  /* tokens of a sequence, in order; the last may be shorter; 0 = the whole batch is one */
    size_t n_ranks;   /* devices of gating dropout and locality: token t lives on rank t P / T, expert e on e P / E; 0 = 1 */
    /* score */
    moe_score_kind score; /* default linear */
    size_t d_router;      /* hidden or latent width of the router; 0 = d_model / 2 (mlp, prototype) or n_experts / 2 (projected), at least 1 */
    int route_sequence;   /* the router sees the mean of the token's sequence: a sequence goes one way; default off, on for combine = merge */
    int freeze_router;    /* the router's tensors keep their initial values; default off */
    moe_init_kind router_init; /* default uniform */
    float router_gain;    /* 0 = 1 */
    float jitter;         /* in training the router sees x times uniform numbers in [1 - jitter, 1 + jitter); 0 = none */
    moe_noise_kind noise; /* default none */
    float noise_std;      /* 0 = 1 */
    int residual;         /* logits += previous A, previous = side.previous, tensor "router.residual" A (E, E), as in MoE++ [C]; default off */
    /* gate */
    moe_gate_kind gate;    /* default softmax */
    int normalize;         /* divide the selected weights by their sum; default on if top_k > 1 (with one
                              expert the weight would be 1 and the router would learn nothing) */
    float weight_scale;    /* weights are multiplied by it at the end; 0 = 1 */
    float temperature;     /* of the gate; higher is softer; 0 = 1 */
    int learn_temperature; /* the gate's is a parameter ("router.log_scale" = -log temperature) that begins at `temperature`; prob, and
                              with it the losses, keep `temperature`; default off */
    float temperature_end; /* temperature goes there in schedule_steps; 0 = stays */
    float mask_jitter;     /* SparseMixer masks logits further below the highest than 2 * mask_jitter of it; 0 = 0.1 */
    /* select */
    moe_select_kind select; /* default top-k */
    size_t top_k_min;       /* in training k goes from here to top_k in schedule_steps; 0 = top_k */
    moe_schedule_kind schedule; /* of k and temperature; default linear */
    uint64_t schedule_steps;
    uint64_t random_steps;        /* routing is uniformly random for this many steps (warm-up) */
    size_t n_groups, top_groups;  /* 0 = 1, 1 */
    float top_p;                  /* 0 = 0.4 */
    float threshold;              /* 0 or MOE_OFF = 0 for select = threshold, none for top-k */
    int fallback;                 /* a token with no score above the threshold takes its best expert: default in evaluation only */
    int random_second;            /* in training a second or later choice stays if top_k p > U(0, 1), as in GShard [C]; default off */
    float sinkhorn_epsilon;       /* 0 = 1 */
    size_t sinkhorn_iterations;   /* 0 = 20 */
    float gate_drop;              /* probability, one draw a step, that all tokens stay on their rank (gating dropout [S]); 0 = none */
    int gate_drop_experts;        /* then no expert runs at all; default off */
    float expert_drop;            /* probability that an expert is left out for a sequence, in training (SMEAR [C]); 0 = none */
    moe_order_kind capacity_order; /* default token */
    float capacity_factor; /* an expert takes at most (size_t)(factor * k * ceil(T/E)) tokens, but at
                              least 1; 0 or MOE_OFF = dropless */
    float capacity_factor_eval; /* the same in evaluation; 0 = capacity_factor */
    /* experts and combine */
    moe_expert_kind expert; /* default SwiGLU */
    int bias;               /* experts have biases b1 (f), b2 (d); default off */
    int zero_output;        /* w2 begins at 0, so that the layer does (BASE [C]); default off */
    moe_combine_kind combine; /* default sum */
    size_t soft_slots;      /* slots of an expert, for combine = soft; 0 = 1 */
    float robust_tau;       /* 0 = 1 */
    size_t n_codes;         /* > 0: y = g_0 y + g_1 LN(f_e(LN(q))), q the nearest of n_codes codes, e = code % E, g = softmax(x G): VQMoE [C] */
    /* balance */
    float loss[MOE_LOSS_COUNT];  /* coefficients; 0 or MOE_OFF = not used */
    moe_control_kind controller; /* default none; moe_step runs it on the loads of the backward calls since the last step */
    float controller_rate, controller_damping; /* of moe_control; 0 = the published ones */
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

/* The systems of the literature, one row each: docs/systems.md. */
typedef struct moe_system {
    const char *name, *title;
    const char *source;  /* arXiv number or DOI, and year */
    const char *mark;    /* how sure the form is: [P] paper, [C] authors' code, [S] summary, [K] general knowledge, [D] derived */
    const char *choices; /* the desc that it stands for, as moe_desc_parse reads it */
    const char *purpose; /* one line: what it is for */
    const char *limits;  /* what it cannot do, or needs */
} moe_system;
MOE_API size_t moe_systems_count(void);
MOE_API const moe_system *moe_system_at(size_t i);            /* NULL past the end */
MOE_API const moe_system *moe_system_find(const char *name);  /* NULL if there is none */
/* The names most like `name`, separated by ", ", into buffer, cut at size, NUL-terminated: for an error message. */
MOE_API void moe_system_near(const char *name, char *buffer, size_t size);
/* Sets the row's choices in *d; what the row does not mention stays as it was. MOE_E_SYSTEM for an unknown name. */
MOE_API moe_status moe_desc_system(moe_desc *d, const char *name);

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
/* A row of the tables of losses and of controllers in docs/math.md. */
typedef struct moe_info {
    const char *name, *formula, *source;
    const char *mark;  /* how sure the source is: "P" paper, "C" code, "S" summary, "K" general knowledge, "D" derived here */
    float coefficient; /* the usual one; 0 = none is known */
} moe_info;
MOE_API const moe_info *moe_loss_info(moe_loss_kind v); /* static storage; NULL past the end */
MOE_API const char *moe_isa_name(moe_isa v);
MOE_API const char *moe_noise_name(moe_noise_kind v);
MOE_API const char *moe_combine_name(moe_combine_kind v);
MOE_API const char *moe_schedule_name(moe_schedule_kind v);
MOE_API const char *moe_init_name(moe_init_kind v);
/* Sets one field by its name in the JSON and its value as text: ("gate", "sigmoid"), ("top_k", "4"), ("loss.switch", "0.01"),
 * ("capacity_factor", "off"), ("bias", "true"). */
MOE_API moe_status moe_desc_set(moe_desc *d, const char *field, const char *value);
/* Sets fields from "field=value field=value ..." (blanks between). On error *d is as it was, and *at (may be NULL) the
 * place in the text. */
MOE_API moe_status moe_desc_parse(moe_desc *d, const char *text, size_t *at);
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
/* -log(-log u), u uniform in (0, 1): finite, from -2.82 to 16.64. The argmax of logits + gumbel is a sample of their softmax. */
MOE_API moe_status moe_gumbel(uint64_t seed, uint64_t stream, size_t n, float *out);

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

/* The other selections of scores (rows, cols): rows are tokens, columns experts. index (rows, k): best first, then -1 = no
 * choice. Ties go to the lowest index; NaN: MOE_E_NAN_LOGITS; -infinity is allowed unless it says so. Nothing allocates
 * but where there is scratch: NULL = the library does, else at least what the *_scratch function says. */

/* DeepSeek-V3's [C]: the columns are n_groups equal groups (at most 256); the score of a group is the sum of its two best
 * (its only one if groups have one); the top_groups best groups are kept, and the k best columns of these. +infinity is an
 * error too. */
MOE_API moe_status moe_topk_groups(size_t rows, size_t cols, size_t k, size_t n_groups, size_t top_groups, const float *scores,
                                   int32_t *index);
/* Of the scores above threshold + per_col[column] (per_col NULL: 0) the k that are furthest above per_col. None is above:
 * with `fallback` the column that is furthest above (least below) per_col, after DynMoE [C]; else no choice. */
MOE_API moe_status moe_topk_threshold(size_t rows, size_t cols, size_t k, float threshold, const float *per_col, int fallback,
                                      const float *scores, int32_t *index);
/* Top-p [C]: by descending prob, through the first whose running sum is above p, but at most k. Not renormalised. */
MOE_API moe_status moe_top_p(size_t rows, size_t cols, size_t k, float p, const float *prob, int32_t *index);
/* Expert choice [K]: each column takes its `capacity` highest rows (all, if there are fewer). index (rows, slots), slots >=
 * cols: the columns that took the row, by descending score. */
MOE_API moe_status moe_expert_choice(size_t rows, size_t cols, size_t capacity, size_t slots, const float *scores, int32_t *index,
                                     void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_expert_choice_scratch(size_t rows, size_t cols, size_t *bytes);
/* plan (rows, cols) = exp(scores / epsilon) scaled so that columns sum to rows / cols and then, exactly, rows to 1; both,
 * `iterations` times, in the log domain. Scores must be finite. */
MOE_API moe_status moe_sinkhorn(size_t rows, size_t cols, float epsilon, size_t iterations, const float *scores, float *plan,
                                void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_sinkhorn_scratch(size_t rows, size_t cols, size_t *bytes);
/* BASE's auction [P+C]: index (rows) = the column of each row, so that every column has exactly rows / cols rows and the
 * sum of the scores is high: an auction with steps of eps = max((max - min) / 50, 1e-4), as a rule some ten rounds. If it
 * ends within 100 rounds, the sum is at most eps short of the optimum for each round that a row was held by who has it at
 * the end, summed over the rows (proof: docs/math.md): the authors let the price of what is held rise by eps every round.
 * From round 100 on there is no bound, and should it not end in 1000, what is not sold goes to who has room. Scores must be
 * finite. */
MOE_API moe_status moe_auction(size_t rows, size_t cols, const float *scores, int32_t *index, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_auction_scratch(size_t rows, size_t cols, size_t *bytes);

/* Combining outputs (vectors of d) some of which may be wrong.
 * moe_robust_weights, after the defence against unreliable clients [D]: med = the median of the k outputs in each
 * coordinate, D_e = ||outputs[e] - med||, reliability[e] = exp(-D_e / (tau * median of D)); where that median is 0 it is 1 if
 * D_e is 0, else 0. out[e] = weight[e] * reliability[e] / their sum (0 if that is 0). Outputs that are not finite have
 * reliability 0 and no part in the medians. The weighted sum itself is yours. */
MOE_API moe_status moe_robust_weights(size_t k, size_t d, const float *const *outputs, const float *weight, float tau,
                                      float *reliability, float *out, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_robust_weights_scratch(size_t k, size_t d, size_t *bytes);
typedef enum moe_aggregate_kind {
    MOE_AGGREGATE_MEAN,
    MOE_AGGREGATE_TRIMMED,  /* in each coordinate the mean without the (size_t)(trim * n) lowest and as many highest */
    MOE_AGGREGATE_MEDIAN,   /* in each coordinate */
    MOE_AGGREGATE_GEOMETRIC, /* the point with the least sum of distances: Weiszfeld's iteration, as Vardi and Zhang mend it */
    MOE__AGGREGATE_COUNT
} moe_aggregate_kind;
/* out (d) of rows (n, d); trim in [0, 0.5) is for MOE_AGGREGATE_TRIMMED. */
MOE_API moe_status moe_aggregate(moe_aggregate_kind kind, size_t n, size_t d, const float *rows, float trim, float *out,
                                 void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_aggregate_scratch(size_t n, size_t d, size_t *bytes);

/* Auxiliary losses: the value, unweighted, into *value (may be NULL), and coefficient * gradient added to the arrays d_...
 * (each may be NULL). prob (T, E) = softmax of the logits / temperature, and d_logits is by the logits; where a loss takes
 * scores (T, E), those of any gate, d_scores is by them, and the gate's own backward follows.
 *
 * Some read statistics of the batch, which you make first and may sum (a mean: average) over micro-batches or ranks: then
 * every part is balanced for the whole. load (E) = tokens that selected an expert (moe_routes.load); the other statistics
 * have a function here. Counts are constant in the gradient; through a mean it flows, as if this batch were all of it. */

/* mean (E) = mean over the tokens of prob or of scores (T, E). */
MOE_API moe_status moe_mean_scores(size_t n_tokens, size_t n_experts, const float *scores, double *mean);
/* mean (E) = sum of the selected weights (T, k) of an expert, divided by T. A negative index is no choice. */
MOE_API moe_status moe_mean_weights(size_t n_tokens, size_t k, size_t n_experts, const int32_t *index, const float *weight, double *mean);
/* load (number of sequences, E): selections in each run of `sequence` tokens; the last run may be shorter. */
MOE_API moe_status moe_sequence_load(size_t n_tokens, size_t n_experts, size_t k, size_t sequence, const int32_t *index, uint64_t *load);
/* Experts stand on devices in equal blocks: expert e on device e / (E / n_devices). out (n_devices): selections of a
 * device's experts; its tokens (each once); its share of the mean probability. */
MOE_API moe_status moe_device_load(size_t n_experts, size_t n_devices, const uint64_t *load, uint64_t *out);
MOE_API moe_status moe_device_tokens(size_t n_tokens, size_t n_experts, size_t n_devices, size_t k, const int32_t *index, uint64_t *out);
MOE_API moe_status moe_device_prob(size_t n_experts, size_t n_devices, const double *mean, double *out);
/* mean (E) of the probability, over the noise, of being selected: Phi((logits - threshold) / std), all (T, E). */
MOE_API moe_status moe_mean_selection(size_t n_tokens, size_t n_experts, const float *logits, const float *std,
                                      const float *threshold, double *mean);
/* teacher (T): the expert with the least task loss, given (T, E) in `scores`; ties go to the lowest index. */
MOE_API moe_status moe_teacher_best(size_t n_tokens, size_t n_experts, const float *scores, int32_t *teacher);

/* The load: E * sum_e f_e P_e, f = shares of the load. Summed over micro-batches, with each one's coefficient divided by
 * their number, the gradients are those of one large batch (global-batch balance). */
MOE_API moe_status moe_loss_switch(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                   const uint64_t *load, float coefficient, double *value, float *d_logits);
/* The same between devices, and with the tokens that each receives: device_load from moe_device_load; device_tokens from
 * moe_device_tokens over `counted` tokens, of which each may use device_limit devices. */
MOE_API moe_status moe_loss_device(size_t n_tokens, size_t n_experts, size_t n_devices, float temperature, const float *prob,
                                   const uint64_t *device_load, float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_communication(size_t n_tokens, size_t n_experts, size_t n_devices, size_t device_limit, float temperature,
                                          const float *prob, const uint64_t *device_tokens, uint64_t counted, float coefficient,
                                          double *value, float *d_logits);
/* The same in each sequence, on shares of scores that are at least 0 (softmax, sigmoid, ReLU): load from moe_sequence_load. */
MOE_API moe_status moe_loss_sequence(size_t n_tokens, size_t n_experts, size_t sequence, const float *scores, const uint64_t *load,
                                     float coefficient, double *value, float *d_scores);
/* All tokens of the call are at device `home`: KL of where their probability goes (device_prob from moe_device_prob) from
 * 1 - smoothing at home and the rest even elsewhere. */
MOE_API moe_status moe_loss_locality(size_t n_tokens, size_t n_experts, size_t n_devices, size_t home, float smoothing, float temperature,
                                     const float *prob, const double *device_prob, float coefficient, double *value, float *d_logits);
/* The mean probabilities P, mean (E) from moe_mean_scores(prob): CV^2; KL from and to uniform; squared distance to uniform;
 * -(entropy of P - mean entropy of a token). */
MOE_API moe_status moe_loss_importance(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const double *mean,
                                       float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_kl_uniform(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const double *mean,
                                       float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_kl_reverse(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const double *mean,
                                       float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_l2_uniform(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const double *mean,
                                       float coefficient, double *value, float *d_logits);
MOE_API moe_status moe_loss_mutual_information(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                               const double *mean, float coefficient, double *value, float *d_logits);
/* Each token alone: its entropy (its negative as a loss, and itself), cross entropy to teacher (T), negative = none. */
MOE_API moe_status moe_loss_entropy(size_t n_tokens, size_t n_experts, float temperature, const float *prob, float coefficient,
                                    double *value, float *d_logits);
MOE_API moe_status moe_loss_certainty(size_t n_tokens, size_t n_experts, float temperature, const float *prob, float coefficient,
                                      double *value, float *d_logits);
MOE_API moe_status moe_loss_oracle(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const int32_t *teacher,
                                   float coefficient, double *value, float *d_logits);
/* The logits: mean (logsumexp)^2; mean relu(cos) between the columns of two experts. */
MOE_API moe_status moe_loss_z(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                              double *value, float *d_logits);
MOE_API moe_status moe_loss_redundancy(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                                       double *value, float *d_logits);
/* Noisy top-k: CV^2 of mean (E) from moe_mean_selection. d_threshold NULL: the threshold is constant. */
MOE_API moe_status moe_loss_load(size_t n_tokens, size_t n_experts, const float *logits, const float *std, const float *threshold,
                                 const double *mean, float coefficient, double *value, float *d_logits, float *d_std,
                                 float *d_threshold);
/* The weights of the selected (T, k): CV^2 of mean (E) from moe_mean_weights. */
MOE_API moe_status moe_loss_importance_selected(size_t n_tokens, size_t k, size_t n_experts, const int32_t *index, const double *mean,
                                                float coefficient, double *value, float *d_weight);
/* Scores: -(sum over experts of the variance over tokens), mean (E) from moe_mean_scores(scores); E sum_e f_e mean_t
 * max(0, s_te), f_e = load_e / (k * counted), load over `counted` tokens (of a ReLU gate d_scores is by its logits too). */
MOE_API moe_status moe_loss_variance(size_t n_tokens, size_t n_experts, const float *scores, const double *mean, float coefficient,
                                     double *value, float *d_scores);
MOE_API moe_status moe_loss_relu_l1(size_t n_tokens, size_t n_experts, size_t k, const float *scores, const uint64_t *load,
                                    uint64_t counted, float coefficient, double *value, float *d_scores);
/* The router's or the prototypes' columns, (d, E): sum abs(R^T R - I); its Frobenius norm + mean norm of a column; the
 * squared norm with columns at unit length; mean exp(2 cos - 2) of two different columns. A column of zeros has no angle. */
MOE_API moe_status moe_loss_simbal(size_t d, size_t n_experts, const float *router, float coefficient, double *value, float *d_router);
MOE_API moe_status moe_loss_diverse_simple(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                           float *d_router);
MOE_API moe_status moe_loss_prototype_orthogonality(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                                    float *d_router);
MOE_API moe_status moe_loss_prototype_diversity(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                                float *d_router);
/* Squared norm of V^T V - I, V (rows, cols). */
MOE_API moe_status moe_loss_orthonormal(size_t rows, size_t cols, const float *matrix, float coefficient, double *value, float *d_matrix);
/* Latent tokens (T, d): mean of 1 - cos with the prototypes (d, E) that index (T, k) selects; KL of N(latent, exp(log_var))
 * from N(0, I). */
MOE_API moe_status moe_loss_prototype_alignment(size_t n_tokens, size_t d, size_t n_experts, size_t k, const float *latent,
                                                const float *router, const int32_t *index, float coefficient, double *value,
                                                float *d_latent, float *d_router);
MOE_API moe_status moe_loss_latent_kl(size_t n_tokens, size_t d, const float *latent, const float *log_var, float coefficient,
                                      double *value, float *d_latent, float *d_log_var);
/* Outputs (T, k, d) of a token's experts: mean_t of sum over j != l of <o_j, o_l>^2 / <o_l, o_l>. */
MOE_API moe_status moe_loss_output_orthogonality(size_t n_tokens, size_t k, size_t d, const float *outputs, float coefficient,
                                                 double *value, float *d_outputs);
/* Tokens x (T, d) and their codes index (T) (negative = none) of codebook (n_codes, d): mean over them of |C - sg x|^2 +
 * commitment |sg C - x|^2, sg = without gradient; commitment is usually 0.25. */
MOE_API moe_status moe_loss_codebook(size_t n_tokens, size_t d, size_t n_codes, const float *x, const float *codebook,
                                     const int32_t *index, float commitment, float coefficient, double *value, float *dx,
                                     float *d_codebook);

/* Controllers balance without a gradient. After a step they read its statistics (loads may be summed over micro-batches or
 * ranks) and move a bias (E) or a coefficient. The bias is added to the scores for the selection only: weights come from
 * the scores without it, and no gradient reaches it. All state is `state`, plain floats, to be saved and restored. */
typedef struct moe_control {
    moe_control_kind kind;
    size_t n_experts;
    /* yours to change after moe_control_init; the defaults are the published ones (docs/math.md) */
    float rate;    /* bias: u; id: Ki; relu-lambda: the factor; adaptive: xi; usage-boost: the boost */
    float damping; /* id: Kd; adaptive, usage-boost: decay of the average */
    float low, high; /* relu-lambda: bounds of the coefficient; adaptive: high, its cap; usage-boost: low, the usage below which */
    /* state; what a kind does not have is NULL */
    float *state; size_t n_state;
    float *coefficient;           /* (1) */
    float *bias, *error, *usage;  /* (E): usage in units of the even load */
} moe_control;
typedef struct moe_control_input {
    const uint64_t *load;         /* (E): bias, id, usage-boost */
    const float *scores;          /* (n_tokens, E), without the bias: quantile */
    size_t n_tokens, top_k;       /* quantile; relu-lambda: top_k */
    double sparsity;              /* share of the scores that are 0: relu-lambda */
    double drop_rate;             /* dropped / selected: adaptive */
    void *scratch; size_t scratch_bytes; void *alloc_context; /* quantile; scratch NULL = the library allocates */
} moe_control_input;
MOE_API moe_status moe_control_size(moe_control_kind kind, size_t n_experts, size_t *bytes);
/* The memory stays yours. */
MOE_API moe_status moe_control_init(moe_control *c, moe_control_kind kind, size_t n_experts, void *memory, size_t bytes);
MOE_API moe_status moe_control_scratch(const moe_control *c, size_t n_tokens, size_t *bytes);
/* One step. A load of zeros, or no tokens, changes nothing; neither does an error. */
MOE_API moe_status moe_control_step(moe_control *c, const moe_control_input *in);
MOE_API const char *moe_control_name(moe_control_kind v);
MOE_API const moe_info *moe_control_info(moe_control_kind v); /* coefficient: the usual rate */

/* From `from` at step 0 to `to` at step `total` and later. */
MOE_API moe_status moe_schedule_k(moe_schedule_kind kind, uint64_t step, uint64_t total, size_t from, size_t to, size_t *k);
MOE_API moe_status moe_schedule_temperature(moe_schedule_kind kind, uint64_t step, uint64_t total, float from, float to,
                                            float *temperature);
/* Share of tokens to route at random: 1 for `warmup` steps, then down to 0 in a line over `fade` steps. */
MOE_API float moe_schedule_random(uint64_t step, uint64_t warmup, uint64_t fade);

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

/* What a router may want besides x. Zero = nothing special. Arrays are yours and must stay until the backward. */
typedef struct moe_side {
    int evaluate;       /* 1: no noise, jitter, dropout, sampling; the evaluation's choice where a system has one */
    uint64_t step;      /* where the schedules stand, and the one draw of gating dropout (a layer sets it: its steps so far) */
    uint64_t draw;      /* which random numbers (a layer sets it: its training forwards so far) */
    size_t top_k;       /* 0 = as desc and schedule say; else at most desc.top_k */
    float temperature;  /* 0 = as desc and schedule say (for a scan of temperatures) */
    const uint32_t *id; /* (n) token ids for score = hash; NULL = positions in the sequence */
    const float *previous;                    /* (n, E) logits of the layer before, for desc.residual; NULL = zeros */
    float *d_previous;                        /* (n, E) += its gradient; may be NULL */
    const int32_t *teacher;                   /* (n) the expert that loss.oracle wants, negative = none */
    const uint64_t *load; uint64_t counted;   /* (E) the loads that the losses see and how many tokens they count, summed over
                                                 micro-batches or ranks; NULL, 0 = this batch's own */
    const float *bias;                        /* (E) added to what the selection sees, never to weights (a layer sets it); NULL = none */
    const float *experts; float *d_experts;   /* score = subspace: the experts' parameters and gradients (a layer sets them) */
} moe_side;

/* moe_tape is what one forward keeps for its backward, and its scratch: one for each batch in flight. */
typedef struct moe_tape {
    moe_side side; /* yours to set before a forward */
    /* results that you may read after a forward; S = top_k, or E where the number of experts a token varies (moe_tape_slots) */
    size_t n_tokens, n_slots;
    float *logits;  /* (T, E), noise included */
    float *scores;  /* (T, E): softmax, sigmoid or relu of the logits, by the gate; the logits for MOE_GATE_SOFTMAX_SELECTED */
    float *prob;    /* (T, E): softmax(logits / temperature); the same as scores for MOE_GATE_SOFTMAX */
    float *clean, *noise_std; /* (T, E) for Gaussian noise (learned or not): logits without it, and its deviation; else NULL */
    int32_t *index; /* (T, S): selected, before capacity; -1 = no choice */
    float *weight;  /* (T, S) */
    int dropped;    /* gating dropout: this forward's tokens stayed on their ranks */
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

/* Floats of the router's parameters: the tensors "router..." and "experts.constant..." of this desc, one after the other in
 * the order of moe_desc_tensor. For a linear score without extras that is R (d, E). */
MOE_API moe_status moe_router_count(const moe_desc *d, size_t *n_floats);
/* Router alone: x (n, d) -> logits, scores, index, weight, routes of the tape. router: moe_router_count floats.  */
MOE_API moe_status moe_route(const moe_desc *d, const float *router, const float *x, size_t n, moe_tape *t);
/* Its backward: d_weight (n_routes) is the gradient by routes.weight (NULL = 0). Adds the auxiliary losses of
 * desc.loss. d_router (moe_router_count) += ..., dx (n, d) += ...; either may be NULL. load (E), NULL = this batch's own:
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

/* What the next moe_forward calls take as their tape's side; evaluate, top_k, temperature, id, previous and d_previous are yours
 * to set (and to clear). NULL for NULL. */
MOE_API moe_side *moe_layer_side(moe_layer *m);
/* The layer's controller, to read or to tune (its state is saved with the layer); and the loads (E) of the backward calls since
 * the last step, to which those of other ranks may be added before moe_step. NULL for NULL. */
MOE_API moe_control *moe_layer_control(moe_layer *m);
MOE_API uint64_t *moe_layer_step_load(moe_layer *m);
/* Pairwise similarity of all experts' outputs: mean over the n tokens of the mean cosine of two different experts [P, SimBal]. */
MOE_API moe_status moe_layer_pes(const moe_layer *m, const float *x, size_t n, double *pes);
/* The ecology number T H / (O + B) of a desc, after arXiv 2605.06415 [D]: T = temperature, H = loss.entropy, O = loss.oracle,
 * B = the larger of loss.kl-uniform and loss.switch (its form has both with one weight). As moe_ecology_number; NULL: NaN. */
MOE_API double moe_desc_ecology(const moe_desc *d);
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

/* Tensors by name, row-major. The router's, as far as the desc has them (h = d_router): "router" (d, E), or (h, E) behind a
 * projection, or (d, E soft_slots); "router.bias" (E); "router.proj" (d, h); "router.proj_bias" (h); "router.noise" (d, E);
 * "router.threshold" (E); "router.log_scale" (1); "router.residual" (E, E); "router.codebook" (n_codes, d); "router.branch" (d, 2);
 * with a controller also "controller.state", which has no gradient and is not counted by moe_layer_tensors;
 * "experts.constant_gate" (n_constant, 2, d); "experts.constant" (n_constant, d). The experts': "experts.w1", "experts.wu" (G, d, f); "experts.w2" (G, f, d);
 * "experts.b1", "experts.bu" (G, f); "experts.b2" (G, d); G = n_experts + n_shared, the shared ones last. */
typedef struct moe_tensor { const char *name; size_t n_dims, dim[3], count; } moe_tensor;
MOE_API size_t moe_layer_tensors(const moe_layer *m); /* how many */
MOE_API moe_status moe_desc_tensor(const moe_desc *d, size_t i, moe_tensor *out); /* tensor i of such a layer; MOE_E_NAME past the last */
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

#if defined(MOE_IMPLEMENTATION) && !defined(MOE_NO_IMPLEMENTATION)
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
/* Not fmax and fmin: gcc 12 for aarch64 breaks on loops that reduce with them at -O3. */
MOE__INLINE double moe__larger(double a, double b) { return a > b ? a : b; }
MOE__INLINE double moe__smaller(double a, double b) { return a < b ? a : b; }
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

/* Scratch of level 1: the caller's, or with NULL our own, to be freed. */
typedef struct moe__scratch { moe__arena arena; void *own; } moe__scratch;
static moe_status moe__scratch_begin(moe__scratch *s, void *scratch, size_t bytes, size_t needed) {
    s->own = NULL;
    if (!scratch) {
        scratch = s->own = moe__alloc(NULL, needed);
        bytes = needed;
        if (!scratch) return MOE_E_NO_MEMORY;
    }
    return moe__arena_over(&s->arena, scratch, bytes, needed);
}
static void moe__scratch_end(moe__scratch *s) { moe__free(NULL, s->own); }

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

/* Numbers start .. start + n - 1 of a stream, standard normal. */
static void moe__normal_at(uint64_t seed, uint64_t stream, uint64_t start, size_t n, float *out) {
    uint32_t word[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < n;) {
        uint64_t at = start + i;
        if (!i || at % 4 == 0) moe_philox(seed, at / 4, stream, word);
        size_t pair = at % 4 & 2;
        /* all 32 bits, in (0, 1], so that the radius reaches 6.7 */
        float u = moe__fma((float)word[pair], 1.0f / 4294967296.0f, 0.5f / 4294967296.0f);
        float radius = sqrtf(-2.0f * moe__logf1(u)), c, s;
        moe__cos_sin_turn(word[pair + 1] >> 8, &c, &s);
        if (at % 2 == 0) out[i++] = radius * c;
        if (i < n) out[i++] = radius * s;
    }
}
MOE_API moe_status moe_rand_normal(uint64_t seed, uint64_t stream, size_t n, float mean, float std, float *out) {
    if (!moe__finite(mean) || !moe__finite(std) || std < 0.0f) return MOE_E_STD;
    if (n && !out) return MOE_E_NULL_OUT;
    moe__normal_at(seed, stream, 0, n, out);
    for (size_t i = 0; i < n; i++) out[i] = moe__fma(std, out[i], mean);
    return MOE_OK;
}

/* The same of the standard Gumbel distribution: -log(-log u), u in (0, 1). */
static void moe__gumbel_at(uint64_t seed, uint64_t stream, uint64_t start, size_t n, float *out) {
    uint32_t word[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < n; i++) {
        uint64_t at = start + i;
        if (!i || at % 4 == 0) moe_philox(seed, at / 4, stream, word);
        float u = ((float)(word[at % 4] >> 9) + 0.5f) * (1.0f / 8388608.0f); /* 23 bits and a half: exact, never 0 or 1 */
        out[i] = -moe__logf1(-moe__logf1(u));
    }
}
MOE_API moe_status moe_gumbel(uint64_t seed, uint64_t stream, size_t n, float *out) {
    if (n && !out) return MOE_E_NULL_OUT;
    moe__gumbel_at(seed, stream, 0, n, out);
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
    void (*slope)(size_t n, float s, float scale, float mean, const float *c, const float *p, float *dz); /* dz += s p (scale c - mean) */
    void (*act[MOE__EXPERT_COUNT])(size_t rows, const float *z0, const float *z1, float *h);
    /* z -> dz, h -> w h in place; part[r * part_ld] = this panel's share of <h, dh> */
    void (*act_back[MOE__EXPERT_COUNT])(size_t rows, const float *w, float *z0, float *z1, float *h, const float *dh,
                                        float *part, size_t part_ld);
    void (*adamw)(size_t n, const moe__adam *o, float *p, const float *g, float *m, float *v);
    void (*sgd)(size_t n, const moe__adam *o, float *p, const float *g, float *m);
    /* the k highest of each row, descending, ties by index: index (rows, k), value (rows, k) or NULL. 0 at a NaN. */
    int (*topk)(size_t rows, size_t n, size_t k, const float *s, int32_t *index, float *value);
    uint32_t (*count)(size_t n, size_t k, const float *z, float *list, float *selected, float *first);
    uint32_t (*count8)(size_t n, size_t k, const float *z, float *selected, float *first);
    void (*sum_rows)(size_t rows, size_t cols, const float *x, double *sum);
    int (*all_finite)(size_t n, const float *x);
    void (*half)(size_t n, const unsigned char *p, float *out);
    void (*bfloat)(size_t n, const unsigned char *p, float *out);
} moe__kernels;

#define MOE__TOPK_K 16  /* up to here the k best of rows are found side by side; in longer rows one row at a time, as most of */
#define MOE__TOPK_N 512 /* such a row is passed over quickly */

/* The lowest bit that is set: b is not 0. */
MOE__INLINE unsigned moe__first_bit(uint64_t b) {
#if defined(__GNUC__)
    return (unsigned)__builtin_ctzll(b);
#else
    unsigned i = 0;
    while (!(b >> i & 1)) i++;
    return i;
#endif
}

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
#define moe__v_bits MOE__S(moe__v_bits_)
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
#define MOE__F_UNORD(a, b) ((a) != (a) || (b) != (b))
#define MOE__F_SEL(m, a, b) ((m) ? (a) : (b))
#define MOE__F_BITS(m) ((uint32_t)(m))
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
#define MOE__F_UNORD(a, b) _mm256_cmp_ps(a, b, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm256_blendv_ps(b, a, m)
#define MOE__F_BITS(m) ((uint32_t)_mm256_movemask_ps(m))
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
#define MOE__F_UNORD(a, b) _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm512_mask_blend_ps(m, b, a)
#define MOE__F_BITS(m) ((uint32_t)(m))
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
#define MOE__F_UNORD(a, b) vmvnq_u32(vandq_u32(vceqq_f32(a, a), vceqq_f32(b, b)))
#define MOE__F_SEL(m, a, b) vbslq_f32(m, a, b)
#define MOE__F_BITS(m) vaddvq_u32(vandq_u32(m, vcombine_u32(vcreate_u32(0x200000001u), vcreate_u32(0x800000004u))))
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
/* bit i: lane i */
MOE__FI uint32_t moe__v_bits(moe__m m) { uint32_t r = 0; MOE__EACH_V(r |= MOE__F_BITS(m.v[i]) << (i * MOE__VL);) return r; }
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

/* The gradient of a loss with dL/dp = c through a softmax p: dz = fma(s p, fma(scale, c, -mean), dz). */
MOE__FN void MOE__S(moe__slope_)(size_t n, float s, float scale, float mean, const float *c, const float *p, float *dz) {
    moe__v sv = moe__v_set1(s), kv = moe__v_set1(scale), mv = moe__v_set1(-mean);
    for (; n >= 16; n -= 16, c += 16, p += 16, dz += 16)
        moe__v_store(dz, moe__v_fma(moe__v_mul(sv, moe__v_load(p)), moe__v_fma(moe__v_load(c), kv, mv), moe__v_load(dz)));
    if (n)
        moe__v_store_n(dz, n, moe__v_fma(moe__v_mul(sv, moe__v_load_n(p, n, 0.0f)), moe__v_fma(moe__v_load_n(c, n, 0.0f), kv, mv),
                                         moe__v_load_n(dz, n, 0.0f)));
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
MOE__FI moe__v MOE__S(moe__same_)(moe__v z, moe__v *slope) {
    *slope = moe__v_set1(1.0f);
    return z;
}
MOE__ACT(moe__relu, MOE__S(moe__relu_))
MOE__ACT(moe__same, MOE__S(moe__same_))
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

/* -- selection: compares only, so exact in any order -- */
/* One row, by insertion; 16 numbers are passed over at a time if none is above the k-th best so far. */
MOE__FN int MOE__S(moe__topk_row_)(size_t n, size_t k, const float *s, int32_t *index) {
    size_t have = 0;
    for (size_t e = 0; e < n; e++) {
#if MOE__PASS > 1
        if (have == k && e % 16 == 0)
            for (moe__v worst = moe__v_set1(s[index[k - 1]]); n - e >= 16; e += 16) {
                moe__v x = moe__v_load(s + e);
                if (moe__v_bits(moe__v_lt(worst, x)) | moe__v_bits(moe__v_isnan(x))) break;
            }
        if (e == n) break;
#endif
        float v = s[e];
        if (v != v) return 0;
        if (have == k && !(v > s[index[k - 1]])) continue;
        size_t i = have < k ? have++ : k - 1;
        for (; i && v > s[index[i - 1]]; i--) index[i] = index[i - 1];
        index[i] = (int32_t)e;
    }
    return 1;
}

/* 32 rows side by side, row r in lane r: `cols` columns of them, 32 floats each, are inserted into the k best of every
 * row. best[2 j] is the j-th, best[2 j + 1] its id, bits that are carried along. Two columns go down the list together;
 * each pushes down what it is above. A NaN sets its lane of nan. */
MOE__FN void MOE__S(moe__topk_insert_)(size_t cols, size_t k, const float *x, const float *id, float *best, float *nan) {
    for (size_t i = 0; i < k * 64; i++) best[i] = -INFINITY;
    for (size_t c = 0; c < cols; c += 2)
        for (size_t l = 0; l < 32; l += MOE__VL) {
            size_t p = c * 32 + l;
            moe__f v0 = MOE__F_LOAD(x + p), id0 = MOE__F_LOAD(id + p), push0 = v0, push_id0 = id0;
            moe__f v1 = MOE__F_SET1(-INFINITY), id1 = id0, push1, push_id1;
            if (c + 1 < cols) v1 = MOE__F_LOAD(x + p + 32), id1 = MOE__F_LOAD(id + p + 32);
            push1 = v1;
            push_id1 = id1;
            MOE__F_STORE(nan + l, MOE__F_SEL(MOE__F_UNORD(v0, v1), MOE__F_SET1(1.0f), MOE__F_LOAD(nan + l)));
            for (float *b = best + l, *end = b + k * 64; b < end; b += 64) {
                moe__f v = MOE__F_LOAD(b), i = MOE__F_LOAD(b + 32), above, above_id;
                MOE__FMASK m = MOE__F_LT(v, v0);
                above = MOE__F_SEL(m, push0, v);
                above_id = MOE__F_SEL(m, push_id0, i);
                push0 = MOE__F_SEL(m, v, v0);
                push_id0 = MOE__F_SEL(m, i, id0);
                m = MOE__F_LT(above, v1);
                MOE__F_STORE(b, MOE__F_SEL(m, push1, above));
                MOE__F_STORE(b + 32, MOE__F_SEL(m, push_id1, above_id));
                push1 = MOE__F_SEL(m, above, v1);
                push_id1 = MOE__F_SEL(m, above_id, id1);
            }
        }
}
/* The k-th best of 32 columns of each of 32 rows. */
MOE__FN void MOE__S(moe__topk_floor_)(size_t k, const float *x, float *floor) {
    MOE__ALIGN64 float best[MOE__TOPK_K * 32];
    for (size_t i = 0; i < k * 32; i++) best[i] = -INFINITY;
    for (size_t c = 0; c < 32 * 32; c += 2 * 32)
        for (size_t l = 0; l < 32; l += MOE__VL) {
            moe__f v0 = MOE__F_LOAD(x + c + l), v1 = MOE__F_LOAD(x + c + 32 + l);
            for (float *b = best + l, *end = b + k * 32; b < end; b += 32) {
                moe__f v = MOE__F_LOAD(b), above = MOE__F_MAX(v, v0);
                v0 = MOE__F_MIN(v, v0);
                MOE__F_STORE(b, MOE__F_MAX(above, v1));
                v1 = MOE__F_MIN(above, v1);
            }
        }
    memcpy(floor, best + (k - 1) * 32, 32 * sizeof(float));
}

/* 32 rows of more than 32 columns. Most of a row is below a floor that costs little: of the maxima of every 32nd column k
 * are at least as high as the k-th of them, and so are the row's k best. What is not below it, a NaN too, goes into the
 * columns of x; their number is returned. A row that has more than 32 is marked in `over`. */
MOE__FN size_t MOE__S(moe__topk_filter_)(size_t n, size_t k, const float *s, size_t ahead, float *x, float *id, uint32_t *over) {
    MOE__ALIGN64 float top[32 * 32], floor[32];
    size_t cols = 0;
    for (size_t r = 0; r < 32; r++) {
        const float *row = s + r * n;
        moe__v a = moe__v_set1(-INFINITY), b = a;
        size_t e = 0;
        for (; e + 32 <= n; e += 32) a = moe__v_max(moe__v_load(row + e), a), b = moe__v_max(moe__v_load(row + e + 16), b);
        if (e + 16 <= n) a = moe__v_max(moe__v_load(row + e), a), e += 16;
        if (e < n) b = moe__v_max(moe__v_load_n(row + e, n - e, -INFINITY), b);
        moe__v_store(top + r * 32, a);
        moe__v_store(top + r * 32 + 16, b);
    }
    MOE__S(moe__transpose_)(top, 32, x);
    MOE__S(moe__topk_floor_)(k, x, floor);
    for (size_t i = 0; i < 32 * 32; i++) x[i] = -INFINITY;
    *over = 0;
    for (size_t r = 0; r < 32; r++) {
        const float *row = s + r * n;
        moe__v least = moe__v_set1(floor[r]);
        size_t have = 0;
        for (size_t e = 0; e < n; e += 64) {
            uint64_t bits = 0;
            for (size_t b = 0; b < 64 && e + b < n; b += 16) {
                size_t left = n - e - b;
                moe__v v = left >= 16 ? moe__v_load(row + e + b) : moe__v_load_n(row + e + b, left, -INFINITY);
                MOE__PREFETCH_L1(row + e + b + ahead);
                bits |= (uint64_t)(~moe__v_bits(moe__v_lt(v, least)) & (left >= 16 ? 0xffffu : (1u << left) - 1)) << b;
            }
            for (; bits; bits &= bits - 1, have++) {
                size_t at = e + moe__first_bit(bits);
                if (have == 32) { *over |= (uint32_t)1 << r; break; }
                x[have * 32 + r] = row[at];
                id[have * 32 + r] = moe__float_of((uint32_t)at);
            }
            if (bits) break;
        }
        cols = moe__max(cols, have);
    }
    return cols;
}

/* 32 long rows: `part` rows of n <= 32 columns, or one. What is read next stands `ahead` floats further. */
MOE__FN int MOE__S(moe__topk_block_)(size_t part, size_t n, size_t k, const float *s, size_t ahead, int32_t *index) {
    MOE__ALIGN64 float x[32 * 32], id[32 * 32], edge[32 * 32], best[MOE__TOPK_K * 64], nan[32] = {0};
    size_t width = part * n, cols = n;
    uint32_t over = 0;
    if (n > 32) {
        cols = MOE__S(moe__topk_filter_)(n, k, s, ahead, x, id, &over);
    } else {
        for (size_t r = 0; r < 32 && width < 32; r++) memcpy(edge + r * 32, s + r * width, width * sizeof(float));
        MOE__S(moe__transpose_)(width < 32 ? edge : s, 32, x);
        for (size_t i = 0; i < n * 32; i++) id[i] = moe__float_of((uint32_t)(i / 32));
    }
    for (size_t p = 0; p < part; p++) {
        MOE__S(moe__topk_insert_)(cols, k, x + p * n * 32, id, best, nan);
        for (size_t r = 0; r < 32; r++) {
            size_t row = r * part + p;
            if (nan[r] > 0.0f) return 0;
            if (over >> r & 1 || !(best[(k - 1) * 64 + r] > -INFINITY)) {
                if (!MOE__S(moe__topk_row_)(n, k, s + row * n, index + row * k)) return 0;
            } else {
                for (size_t j = 0; j < k; j++) index[row * k + j] = (int32_t)moe__bits_of(best[j * 64 + 32 + r]);
            }
        }
    }
    return 1;
}

MOE__FN int MOE__S(moe__topk_)(size_t rows, size_t n, size_t k, const float *s, int32_t *index, float *value) {
    for (size_t done; rows; rows -= done, s += done * n, index += done * k) {
        size_t part = n > 16 ? 1 : moe__min(32 / n, rows / 32); /* short rows: so many in one of 32 lanes */
        int together = MOE__PASS > 1 && rows >= 32 && k <= MOE__TOPK_K && n <= MOE__TOPK_N;
        done = together ? 32 * part : 1;
        if (!together) {
            if (!MOE__S(moe__topk_row_)(n, k, s, index)) return 0;
        } else if (!MOE__S(moe__topk_block_)(part, n, k, s, rows >= 64 ? 32 * n : 0, index)) return 0;
        if (value)
            for (size_t i = 0; i < done; i++)
                for (size_t j = 0; j < k; j++) *value++ = s[i * n + (size_t)index[i * k + j]];
    }
    return 1;
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
    MOE__S(moe__softmax_), MOE__S(moe__lse_), MOE__S(moe__dot_), MOE__S(moe__axpy_), MOE__S(moe__slope_),
    {0, MOE__S(moe__relu_forward_), MOE__S(moe__gelu_forward_), MOE__S(moe__silu_forward_),
     MOE__S(moe__swiglu_forward_), MOE__S(moe__geglu_forward_), MOE__S(moe__same_forward_)},
    {0, MOE__S(moe__relu_backward_), MOE__S(moe__gelu_backward_), MOE__S(moe__silu_backward_),
     MOE__S(moe__swiglu_backward_), MOE__S(moe__geglu_backward_), MOE__S(moe__same_backward_)},
    MOE__S(moe__adamw_), MOE__S(moe__sgd_), MOE__S(moe__topk_),
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
#undef MOE__F_BITS
#undef MOE__F_UNORD
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

/* The same where the work is known, in multiply-adds: below some 20 microseconds OpenMP's threads cost more than they save. */
#define MOE__LITTLE_WORK ((size_t)1 << 18)
static void moe__run_work(const moe_parallel *p, size_t rows, size_t each, size_t n_tasks, moe_task *task, void *arg) {
    if ((p && p->run) || (rows && each > MOE__LITTLE_WORK / rows)) moe_run(p, n_tasks, task, arg);
    else
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

/* c (rows, cols) = a (rows, n) w^T, or += where to->init is NULL: w (k, n) in panels of n; c's columns are the rows k0 .. of w */
static void moe__product_t(const moe__kernels *kn, size_t rows, size_t n, const float *a, size_t a_panel, const float *w,
                           size_t k, size_t k0, const moe__target *to) {
    MOE__ALIGN64 float b[MOE__KC * MOE__W];
    for (size_t g0 = 0; g0 < n; g0 += MOE__KG)
        for (size_t q = 0; q * MOE__W < to->cols; q++)
            for (size_t n0 = g0; n0 < moe__min(n, g0 + MOE__KG); n0 += MOE__KC) {
                size_t nc = moe__min(MOE__KC, n - n0), row = k0 + q * MOE__W;
                for (size_t j = 0; j < nc; j += MOE__W) /* (n0 + j) / 32 panels of k * 32 */
                    moe__transpose_block(kn, w + (n0 + j) * k + row * MOE__W, MOE__W, k - row, MOE__W, b + j * MOE__W);
                moe__sweep(kn, rows, nc, a + n0 / MOE__W * a_panel, a_panel, b, to->c + q * to->panel, to->ldc,
                           moe__min(MOE__W, to->cols - q * MOE__W), n0 || !to->init ? NULL : to->init + q * to->init_panel, NULL);
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
 * A stage's function works on a block of tokens [t0, t1) of a batch, or on the whole batch. */

/* The router's tensors, in the order in which they stand in its block. */
enum {
    MOE__R_ROUTER, MOE__R_BIAS, MOE__R_PROJ, MOE__R_PROJ_BIAS, MOE__R_NOISE, MOE__R_THRESHOLD, MOE__R_SCALE, MOE__R_RESIDUAL,
    MOE__R_CODEBOOK, MOE__R_BRANCH, MOE__R_COUNT
};

typedef struct moe__dims { /* what follows from a desc: a tape fits a desc if these are equal. Only size_t: compared as bytes */
    size_t d, f, E, F, G, S;   /* F: routed experts with parameters; G: with the shared; S: slots of a token */
    size_t L, N;               /* the score's last product: from L numbers a token to N = E times soft_slots */
    size_t dp, hp, zp, ep, np, lp; /* panels of d, of the hidden values, of the values before the activation, of E, N, L */
    size_t gated, bias;
    size_t b1, w2, b2, expert; /* floats: where in an expert's block; the block's length */
    size_t special, experts;   /* after all blocks the constant experts: gates (n, 2, d), vectors (n, d); the end */
    size_t ldo;                /* row of an expert's output */
    size_t at[MOE__R_COUNT + 1]; /* where the router's tensors begin in its block; the last: its length */
    size_t score, gate, select, combine, noise, jitter, by_sequence, sequence, codes, constants, k, ranks, expert_kind, ortho_loss,
        output_loss; /* what else decides on the memory */
} moe__dims;

typedef struct moe__group { /* rows that one set of an expert's parameters computes */
    size_t begin, rows, first; /* first: token of the first row, where all tokens from there follow */
    const uint32_t *token;     /* NULL: in order from `first` */
    const float *weight;       /* NULL: 1 */
    const float *x; size_t x_panel; /* the rows' inputs, as panels */
    const float *params;
    float *dparams;
    int fresh; /* the gradient is set, not added to */
} moe__group;

typedef struct moe__now { /* what holds for one forward and its backward */
    int training, random, local, skip; /* random warm-up; gating dropout: only experts of the token's rank, or none */
    size_t k, sequence;                /* choices of a token; tokens of a sequence */
    float inv_t, prob_inv_t, prob_t;   /* 1 / temperature of the gate, of prob; the latter */
    uint64_t draw;
} moe__now;

typedef struct moe__tape_memory {
    moe_desc d; /* resolved */
    moe__dims dims;
    size_t max_tokens, n_rows, n_routed, n_routes; /* rows of all experts, of the routed ones; n_routes: of the forward that is kept */
    int training, state;
    void *own; /* the allocation, if the library made it */
    moe__now now;
    /* score */
    float *xp;           /* (dp, T, 32): the tokens, as panels */
    float *xr;           /* what the router sees of them: xp, or with jitter, or the means of the sequences */
    float *xs, *inv_x;   /* silu(LN(xr)), and 1 / its standard deviation (T) */
    float *lat, *dlat, *inv; /* what the last product reads (lp, T, 32), its gradient, 1 / its length before (T) */
    float *cols, *dcols, *inv_col; /* the router's columns scaled (L, N), their gradient, 1 / their length (N) */
    float *packed;       /* a matrix of the router as panels, either way round */
    float *soft, *dsoft; /* (T, N): logits of the soft slots; the gradient */
    float *raw;          /* (T, E): x Wn of the learned noise; in backward its gradient */
    float *draw;         /* (T, E): the noise's random numbers */
    float *own_scores;   /* (T, E), where scores are not prob or logits */
    const float *seen;   /* (T, E): what the selection sees: logits, scores, or sel */
    float *sel, *work;   /* (T, E): these with a bias or masked; scratch of a token */
    float *dlogits, *dl; /* (T, E); a gradient of N or E columns as panels */
    float *dxr;          /* (T, d): gradient by xr, where it is not the gradient by x */
    float *slot_grad;    /* (T, S) */
    void *scratch; size_t scratch_bytes; /* of the selections over a batch */
    unsigned char *bad;  /* a block of tokens has logits that are not finite */
    /* experts and combine */
    size_t n_groups, first_shared, shared_row; /* groups in use; the first shared one, and its first row */
    moe__group *group;   /* (most groups) */
    size_t *first;       /* (most groups + 1): first task of each group */
    float *xg;           /* each group's rows as panels (dp, rows, 32); shared experts use xp */
    float *z, *h;        /* before and after the activation, as panels */
    float *o;            /* outputs, row-major, ldo; in backward the gathered dy, then dx */
    float *part, *dweight;
    float *merged, *dmerged; /* (sequences, expert): parameters of combine = merge */
    float *dispatch, *mix, *ddispatch, *dmix; /* (T, N): soft slots: weights of tokens in a slot, of slots in a token; gradients */
    float *reliability, *robust_weight;  /* (T, S): r / sum g r; (n_routes): the weights that robust combination uses */
    unsigned char *robust; size_t robust_bytes; /* scratch of a block of tokens */
    struct moe__branch *branch;
    double *mean, *mean2, *rank_prob; /* (E), (E), (n_ranks): of the losses */
    uint64_t *counts;    /* (sequences, E) or (n_ranks) */
    float *matrix;       /* (2, d, f): of the loss orthonormal */
    float *dout;         /* (n_routed, ldo): gradient by the outputs, of the loss output-orthogonality */
    double output_loss, *block_loss;
    float *outputs;      /* (blocks, 2, S, d) */
} moe__tape_memory;

typedef struct moe__job {
    const moe_desc *d;
    const moe__dims *dims;
    const moe__kernels *kn;
    moe_tape *t;
    moe__tape_memory *m;
    const float *x, *router;
    const float *dweight; /* (n_routes) or NULL */
    const double *mean;   /* (E): of tape.prob, for the losses */
    float *drouter, *dx;  /* dx: where the gradient by what the router sees goes */
} moe__job;

#define MOE__TOKENS 64 /* a block of tokens */
#define MOE__BLOCK_BEGIN(i) ((i) * MOE__TOKENS)
#define MOE__BLOCK_END(i, n) moe__min((n), ((i) + 1) * MOE__TOKENS)

static void moe__run_blocks(const moe__job *j, moe_task *task, void *arg) {
    moe__run_work(&j->d->parallel, j->t->n_tokens, j->dims->d * (j->dims->N + j->dims->S), moe__ceil_div(j->t->n_tokens, MOE__TOKENS), task,
                  arg);
}
/* A tensor of the router, or of its gradient; NULL if this desc has it not. */
static const float *moe__router_part(const moe__job *j, int part) {
    const size_t *at = j->dims->at;
    return j->router && at[part + 1] > at[part] ? j->router + at[part] : NULL;
}
static float *moe__router_grad(const moe__job *j, int part) {
    const size_t *at = j->dims->at;
    return j->drouter && at[part + 1] > at[part] ? j->drouter + at[part] : NULL;
}

/* Random numbers of a forward: one stream for each use. */
enum { MOE__USE_JITTER, MOE__USE_NOISE, MOE__USE_SECOND, MOE__USE_EXPERT_DROP, MOE__USE_WARM_UP, MOE__USE_SAMPLE, MOE__USE_KEEP,
       MOE__USE_SCORE, MOE__USE_GATE_DROP, MOE__USES = 16 };
#define MOE__DRAW_KEY(j) ((j)->d->seed ^ 0xa54ff53a5f1d36f1ull) /* other streams than the initial parameters' */
static uint64_t moe__stream_of(uint64_t draw, int use) { return draw * MOE__USES + (uint64_t)use; }
static uint64_t moe__stream(const moe__job *j, int use) { return moe__stream_of(j->m->now.draw, use); }
static void moe__uniforms(const moe__job *j, int use, uint64_t at, size_t n, float lo, float hi, float *out) {
    moe__uniform_at(MOE__DRAW_KEY(j), moe__stream(j, use), at, n, lo, hi, out);
}
/* The row of random numbers of token t: a sequence that goes one way has one. */
static size_t moe__draw_row(const moe__job *j, size_t t) { return j->dims->by_sequence ? t / j->m->now.sequence : t; }

/* -- one matrix product of the router: out (T, n) = a (T, k) w (k, n); tokens as panels -- */
typedef struct moe__map {
    const moe__job *j;
    const float *a; size_t k; /* panels (k, T) */
    const float *w; size_t n; /* row-major (k, n) */
    const float *dout;        /* panels (n, T) */
    float *dw;                /* (k, n) += */
    float *da; size_t lda, da_panel; /* += (T, k): row-major (panel 32), or set as panels where da_fresh */
    int da_fresh;
} moe__map;
static size_t moe__map_floats(size_t k, size_t n) {
    return moe__max(moe__ceil_div(n, MOE__W) * k, moe__ceil_div(k, MOE__W) * n);
} /* times 32 */

static void moe__map_pack(const moe__map *v) {
    for (size_t p = 0; p < moe__ceil_div(v->n, MOE__W); p++)
        moe__fill_panel(v->w, v->n, 0, v->k, p * MOE__W, moe__min(MOE__W, v->n - p * MOE__W), v->j->m->packed + p * MOE__W * v->k);
}
/* after moe__map_pack: rows [t0, t1) of out, cols = n or, in panels, n rounded up */
static void moe__map_forward(const moe__map *v, float *out, size_t ldo, size_t panel, size_t cols, size_t t0, size_t t1) {
    moe__target to = {out + t0 * ldo, ldo, panel, cols, moe__zeros, 0};
    moe__product(v->j->kn, t1 - t0, v->k, v->a + t0 * MOE__W, v->j->t->n_tokens * MOE__W, v->j->m->packed, &to, 1, NULL);
}
static void moe__task_map_dw(void *arg, size_t i, size_t worker) { /* i: a panel of k */
    const moe__map *v = (const moe__map *)arg;
    size_t n = v->j->t->n_tokens;
    (void)worker;
    for (size_t t = 0; t < n; t += MOE__KC)
        for (size_t p = 0; p < moe__ceil_div(v->n, MOE__W); p++)
            moe__product_outer(v->j->kn, moe__min(MOE__KC, n - t), moe__min(MOE__W, v->k - i * MOE__W), v->a + (i * n + t) * MOE__W,
                               v->dout + (p * n + t) * MOE__W, MOE__W, v->dw + i * MOE__W * v->n + p * MOE__W, v->n,
                               moe__min(MOE__W, v->n - p * MOE__W), 0);
}
static void moe__task_map_da(void *arg, size_t i, size_t worker) { /* i: a block of tokens */
    const moe__map *v = (const moe__map *)arg;
    size_t n = v->j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, n);
    size_t cols = v->da_fresh ? moe__ceil_div(v->k, MOE__W) * MOE__W : v->k;
    (void)worker;
    moe__target to = {v->da + t0 * v->lda, v->lda, v->da_panel, cols, moe__zeros, 0};
    moe__product(v->j->kn, t1 - t0, v->n, v->dout + t0 * MOE__W, n * MOE__W, v->j->m->packed, &to, v->da_fresh, NULL);
}
static void moe__map_backward(moe__map *v) {
    const moe__job *j = v->j;
    if (v->dw) moe__run_work(&j->d->parallel, j->t->n_tokens, v->k * v->n, moe__ceil_div(v->k, MOE__W), moe__task_map_dw, v);
    if (!v->da) return;
    for (size_t p = 0; p < moe__ceil_div(v->k, MOE__W); p++) /* w^T (n, k) */
        moe__fill_panel_t(j->kn, v->w, v->n, 0, v->n, p * MOE__W, moe__min(MOE__W, v->k - p * MOE__W), j->m->packed + p * MOE__W * v->n);
    moe__run_blocks(j, moe__task_map_da, v);
}
/* row-major (T, n) -> panels m->dl */
static void moe__to_panels(const moe__job *j, const float *src, size_t n) {
    for (size_t p = 0; p < moe__ceil_div(n, MOE__W); p++)
        moe__fill_panel(src, n, 0, j->t->n_tokens, p * MOE__W, moe__min(MOE__W, n - p * MOE__W), j->m->dl + p * j->t->n_tokens * MOE__W);
}

/* -- rows as panels: row t of panels (n, T) -- */
static float moe__row_dot(const moe__job *j, const float *a, const float *b, size_t n, size_t t) {
    size_t T = j->t->n_tokens;
    float sum = 0.0f;
    for (size_t p = 0; p * MOE__W < n; p++) sum += j->kn->dot(MOE__W, a + (p * T + t) * MOE__W, b + (p * T + t) * MOE__W);
    return sum;
}
static float moe__row_mean(const moe__job *j, const float *a, size_t n, size_t t) {
    size_t T = j->t->n_tokens;
    float sum = 0.0f;
    for (size_t i = 0; i < n; i++) sum += a[(i / MOE__W * T + t) * MOE__W + i % MOE__W];
    return sum / (float)n;
}
/* The row at u into y (may be u): divided by its length, or with `ln` by its standard deviation after taking its mean
 * away. Returns 1 / that; 0 for a row of zeros, which stays. */
static float moe__row_unit(const moe__job *j, const float *u, float *y, size_t n, size_t t, int ln) {
    size_t T = j->t->n_tokens;
    float mean = ln ? moe__row_mean(j, u, n, t) : 0.0f, inv = 0.0f;
    for (size_t i = 0; i < n; i++) {
        size_t at = (i / MOE__W * T + t) * MOE__W + i % MOE__W;
        y[at] = u[at] - mean;
    }
    for (size_t i = n; i % MOE__W; i++) y[(i / MOE__W * T + t) * MOE__W + i % MOE__W] = 0.0f;
    float square = moe__row_dot(j, y, y, n, t);
    if (ln) square = square / (float)n;
    if (square >= FLT_MIN) inv = 1.0f / sqrtf(square);
    for (size_t p = 0; p * MOE__W < n; p++)
        for (size_t c = 0; c < MOE__W; c++) y[(p * T + t) * MOE__W + c] *= inv;
    return inv;
}
/* du from dy, in place, given y and inv of moe__row_unit */
static void moe__row_unit_back(const moe__job *j, const float *y, float *dy, size_t n, size_t t, int ln, float inv) {
    size_t T = j->t->n_tokens;
    float along = moe__row_dot(j, y, dy, n, t), mean = ln ? moe__row_mean(j, dy, n, t) : 0.0f;
    if (ln) along = along / (float)n;
    for (size_t i = 0; i < n; i++) {
        size_t at = (i / MOE__W * T + t) * MOE__W + i % MOE__W;
        dy[at] = moe__fma(-along, y[at], dy[at] - mean) * inv;
    }
}

/* -- the scores that end in a product with the router's columns: one row of choices each -- */
typedef enum moe__unit { MOE__RAW, MOE__RELU, MOE__LENGTH, MOE__LN } moe__unit;
typedef struct moe__latent { /* z = act(pre(x) [W + b]) . columns(R) [+ c] */
    int pre, proj, proj_bias, out_bias; /* pre: silu(LN(x)) */
    moe__unit act, cols;
} moe__latent;
static const moe__latent moe__latents[MOE__SCORE_COUNT] = {
    {0, 0, 0, 0, MOE__RAW, MOE__RAW},
    {0, 0, 0, 0, MOE__RAW, MOE__RAW},       /* linear */
    {0, 0, 0, 0, MOE__RAW, MOE__LENGTH},    /* unit */
    {0, 1, 1, 1, MOE__RELU, MOE__RAW},      /* mlp */
    {0, 0, 0, 0, MOE__LENGTH, MOE__LENGTH}, /* cosine */
    {0, 1, 0, 0, MOE__LENGTH, MOE__LENGTH}, /* projected */
    {0, 0, 0, 1, MOE__LN, MOE__LN},         /* normed */
    {1, 1, 1, 0, MOE__LENGTH, MOE__LENGTH}, /* prototype */
    {0, 0, 0, 0, MOE__RAW, MOE__RAW}, {0, 0, 0, 0, MOE__RAW, MOE__RAW}, {0, 0, 0, 0, MOE__RAW, MOE__RAW}, {0, 0, 0, 0, MOE__RAW, MOE__RAW}
};
static int moe__latent_score(moe_score_kind s) { return s >= MOE_SCORE_LINEAR && s <= MOE_SCORE_PROTOTYPE; }

/* Columns of R (L, N) scaled into m->cols, as moe__row_unit does with rows. */
static void moe__columns_unit(const moe__job *j, const float *r, int ln) {
    size_t L = j->dims->L, N = j->dims->N;
    float *c = j->m->cols, *inv = j->m->inv_col;
    for (size_t e = 0; e < N; e++) {
        float mean = 0.0f, square = 0.0f;
        for (size_t i = 0; ln && i < L; i++) mean += r[i * N + e];
        mean = mean / (float)L;
        for (size_t i = 0; i < L; i++) {
            float v = r[i * N + e] - mean;
            square = moe__fma(v, v, square);
        }
        if (ln) square = square / (float)L;
        inv[e] = square >= FLT_MIN ? 1.0f / sqrtf(square) : 0.0f;
        for (size_t i = 0; i < L; i++) c[i * N + e] = (r[i * N + e] - mean) * inv[e];
    }
}
static void moe__columns_unit_back(const moe__job *j, float *dr, int ln) {
    size_t L = j->dims->L, N = j->dims->N;
    const float *c = j->m->cols, *dc = j->m->dcols;
    for (size_t e = 0; e < N; e++) {
        float mean = 0.0f, along = 0.0f;
        for (size_t i = 0; i < L; i++) {
            mean += dc[i * N + e];
            along = moe__fma(c[i * N + e], dc[i * N + e], along);
        }
        mean = ln ? mean / (float)L : 0.0f;
        if (ln) along = along / (float)L;
        for (size_t i = 0; i < L; i++)
            dr[i * N + e] = moe__fma(j->m->inv_col[e], moe__fma(-along, c[i * N + e], dc[i * N + e] - mean), dr[i * N + e]);
    }
}

static moe__map moe__latent_map(const moe__job *j, int projection) { /* the projection, or the last product */
    const moe__latent *l = &moe__latents[j->d->score];
    moe__map v;
    memset(&v, 0, sizeof v);
    v.j = j;
    v.k = projection ? j->dims->d : j->dims->L;
    v.n = projection ? j->dims->L : j->dims->N;
    v.a = projection || (!l->proj && l->act == MOE__RAW) ? (l->pre ? j->m->xs : j->m->xr) : j->m->lat;
    v.w = projection ? moe__router_part(j, MOE__R_PROJ) : l->cols == MOE__RAW ? moe__router_part(j, MOE__R_ROUTER) : j->m->cols;
    return v;
}
static float *moe__score_out(const moe__job *j) { return j->m->soft ? j->m->soft : j->t->logits; }

static void moe__task_project(void *arg, size_t i, size_t worker) { /* m->lat of a block of tokens */
    const moe__job *j = (const moe__job *)arg;
    const moe__latent *l = &moe__latents[j->d->score];
    size_t T = j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, T), d = j->dims->d, L = j->dims->L;
    float *lat = j->m->lat;
    (void)worker;
    if (l->pre)
        for (size_t t = t0; t < t1; t++) {
            j->m->inv_x[t] = moe__row_unit(j, j->m->xr, j->m->xs, d, t, 1);
            for (size_t p = 0; p < j->dims->dp; p++) { /* silu in place; its derivative is made again from xr */
                float *y = j->m->xs + (p * T + t) * MOE__W;
                j->kn->act[MOE_EXPERT_SILU](1, y, NULL, y);
            }
        }
    if (l->proj) {
        moe__map v = moe__latent_map(j, 1);
        const float *b = moe__router_part(j, MOE__R_PROJ_BIAS);
        moe__map_forward(&v, lat, MOE__W, T * MOE__W, j->dims->lp * MOE__W, t0, t1);
        for (size_t t = t0; b && t < t1; t++)
            for (size_t c = 0; c < L; c++) lat[(c / MOE__W * T + t) * MOE__W + c % MOE__W] += b[c];
    }
    const float *u = l->proj ? lat : j->m->xr;
    if (l->act == MOE__RELU)
        for (size_t p = 0; p < j->dims->lp; p++)
            j->kn->act[MOE_EXPERT_RELU](t1 - t0, lat + (p * T + t0) * MOE__W, NULL, lat + (p * T + t0) * MOE__W);
    else
        for (size_t t = t0; t < t1; t++) j->m->inv[t] = moe__row_unit(j, u, lat, L, t, l->act == MOE__LN);
}
static void moe__latent_prepare(const moe__job *j) {
    const moe__latent *l = &moe__latents[j->d->score];
    moe__map v;
    if (l->act != MOE__RAW) {
        if (l->proj) {
            v = moe__latent_map(j, 1);
            moe__map_pack(&v);
        }
        moe__run_blocks(j, moe__task_project, (void *)(uintptr_t)j);
    }
    if (l->cols != MOE__RAW) moe__columns_unit(j, moe__router_part(j, MOE__R_ROUTER), l->cols == MOE__LN);
    v = moe__latent_map(j, 0);
    moe__map_pack(&v);
}
static void moe__latent_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t N = j->dims->N;
    const float *c = moe__router_part(j, MOE__R_BIAS);
    moe__map v = moe__latent_map(j, 0);
    float *z = moe__score_out(j);
    moe__map_forward(&v, z, N, MOE__W, N, t0, t1);
    for (size_t t = t0; c && t < t1; t++) j->kn->axpy(N, 1.0f, c, z + t * N);
}

static void moe__task_unproject(void *arg, size_t i, size_t worker) { /* dlat -> gradient before the activation, in place */
    const moe__job *j = (const moe__job *)arg;
    const moe__latent *l = &moe__latents[j->d->score];
    size_t T = j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, T), L = j->dims->L;
    (void)worker;
    for (size_t t = t0; t < t1; t++) {
        if (l->act != MOE__RELU) moe__row_unit_back(j, j->m->lat, j->m->dlat, L, t, l->act == MOE__LN, j->m->inv[t]);
        else
            for (size_t c = 0; c < L; c++) {
                size_t at = (c / MOE__W * T + t) * MOE__W + c % MOE__W;
                if (!(j->m->lat[at] > 0.0f)) j->m->dlat[at] = 0.0f;
            }
    }
}
/* dx += the gradient by xr: dlat itself, or through silu(LN(.)), whose output's gradient is then in xs */
static void moe__task_into_x(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t T = j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, T), d = j->dims->d;
    int pre = moe__latents[j->d->score].pre;
    (void)worker;
    for (size_t t = t0; t < t1; t++) {
        float *g = pre ? j->m->xs : j->m->dlat;
        if (pre) { /* y = LN(x) again; dlat has room for it, and its gradient has gone on to xs */
            float *y = j->m->dlat;
            float inv = moe__row_unit(j, j->m->xr, y, d, t, 1), part;
            for (size_t p = 0; p < j->dims->dp; p++) { /* dy = g * silu'(y): the expert's backward does it in place of its z */
                float z[MOE__W], h[MOE__W], one = 1.0f;
                memcpy(z, y + (p * T + t) * MOE__W, sizeof z);
                memcpy(h, z, sizeof h);
                j->kn->act_back[MOE_EXPERT_SILU](1, &one, z, NULL, h, g + (p * T + t) * MOE__W, &part, 1);
                memcpy(g + (p * T + t) * MOE__W, z, sizeof z);
            }
            moe__row_unit_back(j, y, g, d, t, 1, inv);
        }
        for (size_t p = 0; p < j->dims->dp; p++)
            j->kn->axpy(moe__min(MOE__W, d - p * MOE__W), 1.0f, g + (p * T + t) * MOE__W, j->dx + t * d + p * MOE__W);
    }
}
/* Sum over tokens of a gradient (T, n) in panels, added to g (n). */
static void moe__bias_grad(const moe__job *j, const float *panels, size_t n, float *g) {
    for (size_t p = 0; p * MOE__W < n; p++)
        for (size_t t = 0; t < j->t->n_tokens; t++)
            j->kn->axpy(moe__min(MOE__W, n - p * MOE__W), 1.0f, panels + (p * j->t->n_tokens + t) * MOE__W, g + p * MOE__W);
}
static void moe__latent_backward(const moe__job *j) {
    const moe__latent *l = &moe__latents[j->d->score];
    size_t T = j->t->n_tokens;
    int direct = l->act == MOE__RAW; /* the product reads x itself */
    moe__map v = moe__latent_map(j, 0);
    float *dr = moe__router_grad(j, MOE__R_ROUTER), *dc = moe__router_grad(j, MOE__R_BIAS);
    moe__to_panels(j, j->m->soft ? j->m->dsoft : j->m->dlogits, j->dims->N);
    v.dout = j->m->dl;
    v.dw = dr;
    if (dr && l->cols != MOE__RAW) {
        memset(j->m->dcols, 0, j->dims->L * j->dims->N * sizeof(float));
        v.dw = j->m->dcols;
    }
    v.da = direct ? j->dx : j->m->dlat;
    v.lda = direct ? j->dims->d : MOE__W;
    v.da_panel = direct ? MOE__W : T * MOE__W;
    v.da_fresh = !direct;
    moe__map_backward(&v);
    if (dr && l->cols != MOE__RAW) moe__columns_unit_back(j, dr, l->cols == MOE__LN);
    if (dc) moe__bias_grad(j, j->m->dl, j->dims->N, dc);
    if (direct) return;
    moe__run_blocks(j, moe__task_unproject, (void *)(uintptr_t)j);
    if (l->proj) {
        v = moe__latent_map(j, 1);
        float *db = moe__router_grad(j, MOE__R_PROJ_BIAS);
        v.dout = j->m->dlat;
        v.dw = moe__router_grad(j, MOE__R_PROJ);
        if (db) moe__bias_grad(j, j->m->dlat, j->dims->L, db);
        if (l->pre && j->dx) { /* the gradient by silu(LN(x)) takes the place of that */
            moe__map w = v;
            w.da = NULL;
            moe__map_backward(&w);
            v.dw = NULL;
            v.da = j->m->xs;
            v.lda = MOE__W;
            v.da_panel = T * MOE__W;
            v.da_fresh = 1;
        } else {
            v.da = j->dx;
            v.lda = j->dims->d;
            v.da_panel = MOE__W;
        }
        moe__map_backward(&v);
    }
    if (j->dx && (l->pre || !l->proj)) moe__run_blocks(j, moe__task_into_x, (void *)(uintptr_t)j);
}

/* slice: z_e = mean of slice e of x. The relu comes after the noise. */
static void moe__slice_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E, T = j->t->n_tokens, width = j->dims->d / E;
    for (size_t t = t0; t < t1; t++)
        for (size_t e = 0; e < E; e++) {
            float sum = 0.0f;
            for (size_t i = e * width; i < (e + 1) * width; i++) sum += j->m->xr[(i / MOE__W * T + t) * MOE__W + i % MOE__W];
            j->t->logits[t * E + e] = sum / (float)width;
        }
}
static void moe__slice_backward(const moe__job *j) {
    size_t E = j->dims->E, width = j->dims->d / E;
    for (size_t t = 0; j->dx && t < j->t->n_tokens; t++)
        for (size_t e = 0; e < E; e++)
            for (size_t i = e * width; i < (e + 1) * width; i++)
                j->dx[t * j->dims->d + i] += j->m->dlogits[t * E + e] / (float)width;
}

/* subspace: z_e = |V_e^T x| / |x|. m->lat keeps u = V_e^T x of every expert, as panels (f, T) one after the other; in backward
 * it becomes du = dz u / (|u| |x|), and dV = x du^T, dx = V du - dz z x / |x|^2 [D]. */
static const float *moe__basis(const moe__job *j, size_t e) { return j->t->side.experts + e * j->dims->expert; }
static float *moe__subspace_u(const moe__job *j, size_t e) { return j->m->lat + e * j->t->n_tokens * j->dims->hp * MOE__W; }
static void moe__subspace_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E, T = j->t->n_tokens;
    for (size_t t = t0; t < t1; t++) j->m->inv_x[t] = sqrtf(moe__row_dot(j, j->m->xr, j->m->xr, j->dims->d, t));
    for (size_t e = 0; e < E; e++) {
        float *u = moe__subspace_u(j, e);
        moe__target to = {u + t0 * MOE__W, MOE__W, T * MOE__W, j->dims->hp * MOE__W, moe__zeros, 0};
        moe__product(j->kn, t1 - t0, j->dims->d, j->m->xr + t0 * MOE__W, T * MOE__W, moe__basis(j, e), &to, 1, NULL);
        for (size_t t = t0; t < t1; t++)
            j->t->logits[t * E + e] = j->m->inv_x[t] > 0.0f ? sqrtf(moe__row_dot(j, u, u, j->dims->f, t)) / j->m->inv_x[t] : 0.0f;
    }
}
static void moe__task_subspace_dx(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t T = j->t->n_tokens, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, T), E = j->dims->E, d = j->dims->d;
    (void)worker;
    for (size_t e = 0; e < E; e++) {
        float *u = moe__subspace_u(j, e);
        for (size_t t = t0; t < t1; t++) {
            float norm = j->m->inv_x[t], z = j->t->logits[t * E + e], dz = j->m->dlogits[t * E + e], length = z * norm;
            float scale = length > 0.0f && norm > 0.0f ? dz / (length * norm) : 0.0f;
            for (size_t p = 0; p < j->dims->hp; p++)
                for (size_t c = 0; c < MOE__W; c++) u[(p * T + t) * MOE__W + c] *= scale;
            if (!j->dx || !(norm > 0.0f)) continue;
            for (size_t p = 0; p < j->dims->dp; p++)
                j->kn->axpy(moe__min(MOE__W, d - p * MOE__W), -(dz * z) / (norm * norm), j->m->xr + (p * T + t) * MOE__W,
                            j->dx + t * d + p * MOE__W);
        }
        if (!j->dx) continue;
        moe__target to = {j->dx + t0 * d, d, MOE__W, d, NULL, 0};
        moe__product_t(j->kn, t1 - t0, j->dims->hp * MOE__W, u + t0 * MOE__W, T * MOE__W, moe__basis(j, e), d, 0, &to);
    }
}
static void moe__task_subspace_dv(void *arg, size_t i, size_t worker) { /* i: an expert and a panel of d */
    const moe__job *j = (const moe__job *)arg;
    size_t T = j->t->n_tokens, d = j->dims->d, e = i / j->dims->dp, q = i % j->dims->dp;
    const float *du = moe__subspace_u(j, e);
    float *dv = j->t->side.d_experts + e * j->dims->expert;
    (void)worker;
    for (size_t t = 0; t < T; t += MOE__KC)
        for (size_t p = 0; p < j->dims->hp; p++)
            moe__product_outer(j->kn, moe__min(MOE__KC, T - t), moe__min(MOE__W, d - q * MOE__W), j->m->xr + (q * T + t) * MOE__W,
                               du + (p * T + t) * MOE__W, MOE__W, dv + (p * d + q * MOE__W) * MOE__W, MOE__W, MOE__W, 0);
}
static void moe__subspace_backward(const moe__job *j) {
    moe__run_blocks(j, moe__task_subspace_dx, (void *)(uintptr_t)j);
    if (j->t->side.d_experts)
        moe__run_work(&j->d->parallel, j->t->n_tokens, j->dims->E * j->dims->d * j->dims->f, j->dims->E * j->dims->dp,
                      moe__task_subspace_dv, (void *)(uintptr_t)j);
}

/* hash: consecutive ids of a run of E go to E different experts, in an order of the run's own: balanced over evenly used
 * ids; the next choices are the next experts. A logit of 30 is certainty in float32. */
#define MOE__CERTAIN 30.0f
static void moe__hash_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E;
    for (size_t t = t0; t < t1; t++) {
        uint64_t id = j->t->side.id ? j->t->side.id[t] : t % j->m->now.sequence;
        uint64_t first = (id % E + moe_rand_u32(j->d->seed, ~(uint64_t)0, id / E)) % E;
        memset(j->t->logits + t * E, 0, E * sizeof(float));
        for (size_t i = 0; i < moe__min(j->d->top_k, E); i++) j->t->logits[t * E + (first + i) % E] = MOE__CERTAIN - (float)i / (float)E;
    }
}
static void moe__random_forward(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E;
    for (size_t t = t0; t < t1; t++)
        moe__uniforms(j, MOE__USE_SCORE, (uint64_t)moe__draw_row(j, t) * E, E, 0.0f, 1.0f, j->t->logits + t * E);
}

typedef struct moe__score_row {
    const char *name;
    int relu;                                                 /* of the logits, after the noise */
    int blind;                                                /* the logits can be finite although x is not */
    void (*prepare)(const moe__job *j);                       /* once a batch, after m->xr */
    void (*forward)(const moe__job *j, size_t t0, size_t t1); /* tape.logits, or m->soft */
    void (*backward)(const moe__job *j);                      /* from m->dlogits, or m->dsoft: += drouter, += dx; NULL: no gradient */
} moe__score_row;
static const moe__score_row moe__scores[MOE__SCORE_COUNT] = {
    {"default", 0, 0, NULL, NULL, NULL},
    {"linear", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"unit", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"mlp", 0, 1, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"cosine", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"projected", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"normed", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"prototype", 0, 0, moe__latent_prepare, moe__latent_forward, moe__latent_backward},
    {"slice", 1, 1, NULL, moe__slice_forward, moe__slice_backward},
    {"subspace", 0, 1, NULL, moe__subspace_forward, moe__subspace_backward},
    {"hash", 0, 1, NULL, moe__hash_forward, NULL},
    {"random", 0, 1, NULL, moe__random_forward, NULL},
};

/* -- noise on the logits -- */
static moe__map moe__noise_map(const moe__job *j) {
    moe__map v;
    memset(&v, 0, sizeof v);
    v.j = j;
    v.a = j->m->xr;
    v.k = j->dims->d;
    v.w = moe__router_part(j, MOE__R_NOISE);
    v.n = j->dims->E;
    return v;
}
static void moe__task_noise_raw(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t E = j->dims->E, t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens);
    moe__map v = moe__noise_map(j);
    (void)worker;
    moe__map_forward(&v, j->m->raw, E, MOE__W, E, t0, t1);
    /* softplus r = max(r, 0) + log(1 + e^-|r|) */
    float *s = j->t->noise_std + t0 * E, *r = j->m->raw + t0 * E;
    for (size_t k = 0; k < (t1 - t0) * E; k++) s[k] = -fabsf(r[k]);
    j->kn->exp((t1 - t0) * E, s, s);
    for (size_t k = 0; k < (t1 - t0) * E; k++) s[k] += 1.0f;
    j->kn->log((t1 - t0) * E, s, s);
    for (size_t k = 0; k < (t1 - t0) * E; k++) {
        s[k] += r[k] > 0.0f ? r[k] : 0.0f;
        if (s[k] < 1e-6f) s[k] = 1e-6f; /* never 0: losses divide by it */
    }
}
static void moe__noise_prepare(const moe__job *j) {
    if (j->d->noise != MOE_NOISE_LEARNED) return;
    moe__map v = moe__noise_map(j);
    moe__map_pack(&v);
    moe__run_blocks(j, moe__task_noise_raw, (void *)(uintptr_t)j);
}
static void moe__noise_add(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E;
    if (j->t->clean) memcpy(j->t->clean + t0 * E, j->t->logits + t0 * E, (t1 - t0) * E * sizeof(float));
    for (size_t k = t0 * E; k < t1 * E && j->d->noise == MOE_NOISE_GAUSSIAN; k++) j->t->noise_std[k] = j->d->noise_std;
    if (j->d->noise == MOE_NOISE_NONE || !j->m->now.training) return;
    for (size_t t = t0; t < t1; t++) {
        float *z = j->t->logits + t * E, *r = j->m->draw + t * E;
        uint64_t at = (uint64_t)moe__draw_row(j, t) * E, stream = moe__stream(j, MOE__USE_NOISE);
        if (j->d->noise == MOE_NOISE_UNIFORM) moe__uniform_at(MOE__DRAW_KEY(j), stream, at, E, 0.0f, 1.0f, r);
        else if (j->d->noise == MOE_NOISE_GUMBEL) moe__gumbel_at(MOE__DRAW_KEY(j), stream, at, E, r);
        else moe__normal_at(MOE__DRAW_KEY(j), stream, at, E, r);
        for (size_t e = 0; e < E; e++)
            z[e] = moe__fma(r[e], j->d->noise == MOE_NOISE_LEARNED ? j->t->noise_std[t * E + e] : j->d->noise_std, z[e]);
    }
}
/* d raw = dz N sigmoid(raw), sigmoid(raw) = 1 - e^-softplus(raw); then Wn and x */
static void moe__noise_backward(const moe__job *j) {
    size_t n = j->t->n_tokens * j->dims->E;
    if (j->d->noise != MOE_NOISE_LEARNED) return;
    if (j->m->now.training) {
        for (size_t i = 0; i < n; i++) j->m->raw[i] = -j->t->noise_std[i];
        j->kn->exp(n, j->m->raw, j->m->raw);
        for (size_t i = 0; i < n; i++) j->m->raw[i] = j->m->dlogits[i] * j->m->draw[i] * (1.0f - j->m->raw[i]);
    } else memset(j->m->raw, 0, n * sizeof(float));
}
static void moe__noise_backward_map(const moe__job *j) {
    if (j->d->noise != MOE_NOISE_LEARNED) return;
    moe__map v = moe__noise_map(j);
    moe__to_panels(j, j->m->raw, j->dims->E);
    v.dout = j->m->dl;
    v.dw = moe__router_grad(j, MOE__R_NOISE);
    v.da = j->dx;
    v.lda = j->dims->d;
    v.da_panel = MOE__W;
    moe__map_backward(&v);
}

/* -- logits += previous A -- */
static void moe__residual_add(const moe__job *j, size_t t0, size_t t1) {
    const float *a = moe__router_part(j, MOE__R_RESIDUAL), *previous = j->t->side.previous;
    size_t E = j->dims->E;
    if (!a || !previous) return;
    for (size_t t = t0; t < t1; t++)
        for (size_t i = 0; i < E; i++) j->kn->axpy(E, previous[t * E + i], a + i * E, j->t->logits + t * E);
}
static void moe__residual_backward(const moe__job *j) {
    const float *a = moe__router_part(j, MOE__R_RESIDUAL), *previous = j->t->side.previous;
    float *da = moe__router_grad(j, MOE__R_RESIDUAL);
    size_t E = j->dims->E;
    if (!a || !previous) return;
    for (size_t t = 0; t < j->t->n_tokens; t++)
        for (size_t i = 0; i < E; i++) {
            if (da) j->kn->axpy(E, previous[t * E + i], j->m->dlogits + t * E, da + i * E);
            if (j->t->side.d_previous) j->t->side.d_previous[t * E + i] += j->kn->dot(E, a + i * E, j->m->dlogits + t * E);
        }
}

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

/* Weights are divided by their sum, in slot order; all zero stays so. */
static void moe__normalize(size_t k, float *w) {
    float sum = 0.0f;
    for (size_t i = 0; i < k; i++) sum += w[i];
    for (size_t i = 0; sum > 0.0f && i < k; i++) w[i] /= sum;
}
/* dw of normalised weights -> dw of the unnormalised, whose sum was `sum` */
static void moe__normalize_back(size_t k, const float *w, float sum, float *dw) {
    float mean = 0.0f;
    for (size_t i = 0; i < k; i++) mean = moe__fma(w[i], dw[i], mean);
    for (size_t i = 0; i < k; i++) dw[i] = sum > 0.0f ? (dw[i] - mean) / sum : 0.0f;
}

/* 1 / (1 + e^-(scale z)) of n numbers, without overflow; y may be z */
static void moe__sigmoids(const moe__kernels *kn, size_t n, float scale, const float *z, float *y) {
    float e[MOE__W];
    for (size_t i = 0; i < n; i += MOE__W) {
        size_t c = moe__min(MOE__W, n - i);
        for (size_t l = 0; l < c; l++) e[l] = -fabsf(scale * z[i + l]);
        kn->exp(c, e, e);
        for (size_t l = 0; l < c; l++) y[i + l] = (scale * z[i + l] < 0.0f ? e[l] : 1.0f) / (1.0f + e[l]);
    }
}

/* The scores of a block of tokens, from the logits; prob is there. */
static void moe__gate_scores(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E, n = (t1 - t0) * E;
    const float *z = j->t->logits + t0 * E;
    float *s = j->m->own_scores;
    if (!s) return;
    s += t0 * E;
    if (j->d->gate == MOE_GATE_RELU)
        for (size_t i = 0; i < n; i++) s[i] = z[i] > 0.0f ? z[i] : 0.0f;
    else if (j->d->gate == MOE_GATE_SOFTMAX) /* with a temperature of its own */
        for (size_t t = 0; t < t1 - t0; t++) j->kn->softmax(E, j->m->now.inv_t, z + t * E, s + t * E);
    else moe__sigmoids(j->kn, n, j->m->now.inv_t, z, s);
}

/* What a gate gives for one token: value = weights of its choices before normalisation, for index >= 0; back = from their
 * gradient dw (k) to dz (E), the token's row of m->dlogits. */
static void moe__scores_value(const moe__job *j, size_t t, float *w) {
    const int32_t *index = j->t->index + t * j->dims->S;
    for (size_t i = 0; i < j->dims->S; i++) w[i] = index[i] < 0 ? 0.0f : j->t->scores[t * j->dims->E + (size_t)index[i]];
}
static void moe__softmax_back(const moe__job *j, size_t t, const float *dw, float *dz) {
    size_t k = j->dims->S, E = j->dims->E;
    const float *p = j->t->scores + t * E;
    const int32_t *index = j->t->index + t * k;
    float inv_t = j->m->now.inv_t, mean = 0.0f;
    for (size_t i = 0; i < k; i++)
        if (index[i] >= 0) mean = moe__fma(p[index[i]], dw[i], mean);
    j->kn->axpy(E, -(mean * inv_t), p, dz);
    for (size_t i = 0; i < k; i++)
        if (index[i] >= 0) dz[index[i]] = moe__fma(inv_t * p[index[i]], dw[i], dz[index[i]]);
}
static void moe__selected_value(const moe__job *j, size_t t, float *w) {
    size_t k = j->dims->S, n = 0;
    const int32_t *index = j->t->index + t * k;
    for (size_t i = 0; i < k; i++) /* choices come first, then those that are none */
        if (index[i] >= 0) w[n++] = j->t->logits[t * j->dims->E + (size_t)index[i]];
    if (n) j->kn->softmax(n, j->m->now.inv_t, w, w);
    for (size_t i = k; i-- > 0;) w[i] = index[i] < 0 ? 0.0f : w[--n];
}
static void moe__selected_back(const moe__job *j, size_t t, const float *dw, float *dz) {
    size_t k = j->dims->S;
    const int32_t *index = j->t->index + t * k;
    const float *w = j->m->work + t * j->dims->E; /* the weights before scaling */
    float inv_t = j->m->now.inv_t, mean = 0.0f;
    for (size_t i = 0; i < k; i++) mean = moe__fma(w[i], dw[i], mean);
    for (size_t i = 0; i < k; i++)
        if (index[i] >= 0) dz[index[i]] = moe__fma(inv_t * w[i], dw[i] - mean, dz[index[i]]);
}
static void moe__sigmoid_back(const moe__job *j, size_t t, const float *dw, float *dz) {
    const int32_t *index = j->t->index + t * j->dims->S;
    for (size_t i = 0; i < j->dims->S; i++) {
        if (index[i] < 0) continue;
        float s = j->t->scores[t * j->dims->E + (size_t)index[i]];
        dz[index[i]] = moe__fma(j->m->now.inv_t * (s * (1.0f - s)), dw[i], dz[index[i]]);
    }
}
static void moe__relu_back(const moe__job *j, size_t t, const float *dw, float *dz) {
    const int32_t *index = j->t->index + t * j->dims->S;
    for (size_t i = 0; i < j->dims->S; i++)
        if (index[i] >= 0 && j->t->scores[t * j->dims->E + (size_t)index[i]] > 0.0f) dz[index[i]] += dw[i];
}
static void moe__sign_value(const moe__job *j, size_t t, float *w) {
    const int32_t *index = j->t->index + t * j->dims->S;
    size_t n = 0;
    for (size_t i = 0; i < j->dims->S; i++) n += index[i] >= 0;
    for (size_t i = 0; i < j->dims->S; i++) w[i] = index[i] < 0 ? 0.0f : 1.0f / (float)n;
}
/* SparseMixer: the softmax among the experts that choice i of a token could have been. Earlier choices and logits further
 * below the highest than 2 * mask_jitter of max(|z|, highest) are out: p = 0. Returns the highest of what is left. */
static size_t moe__sparse_row(const moe__job *j, size_t t, size_t i, float *p) {
    size_t E = j->dims->E, best = E;
    const float *z = j->t->logits + t * E;
    const int32_t *index = j->t->index + t * j->dims->S;
    float sum = 0.0f;
    for (size_t e = 0; e < E; e++) {
        p[e] = 1.0f;
        for (size_t l = 0; l < i; l++)
            if (index[l] == (int32_t)e) p[e] = 0.0f;
        if (p[e] > 0.0f && (best == E || z[e] > z[best])) best = e;
    }
    for (size_t e = 0; e < E; e++) {
        float scale = fabsf(z[e]) > z[best] ? fabsf(z[e]) : z[best];
        if (p[e] > 0.0f && z[best] - z[e] > 2.0f * j->d->mask_jitter * scale) p[e] = 0.0f;
    }
    for (size_t e = 0; e < E; e += MOE__W) {
        float v[MOE__W];
        size_t c = moe__min(MOE__W, E - e);
        for (size_t l = 0; l < c; l++) v[l] = p[e + l] > 0.0f ? (z[e + l] - z[best]) * j->m->now.inv_t : 0.0f;
        j->kn->exp(c, v, v);
        for (size_t l = 0; l < c; l++) {
            p[e + l] *= v[l];
            sum += p[e + l];
        }
    }
    for (size_t e = 0; e < E; e++) p[e] /= sum;
    return best;
}
/* p of the choice; in training a third of it unless it was the highest or a number above 0.75 is drawn */
static void moe__sparse_value(const moe__job *j, size_t t, float *w) {
    size_t S = j->dims->S, E = j->dims->E;
    const int32_t *index = j->t->index + t * S;
    float *p = j->m->work + t * E, u;
    for (size_t i = 0; i < S; i++) {
        w[i] = 0.0f;
        if (index[i] < 0) continue;
        size_t best = moe__sparse_row(j, t, i, p);
        moe__uniforms(j, MOE__USE_KEEP, (uint64_t)t * S + i, 1, 0.0f, 1.0f, &u);
        w[i] = p[index[i]] * (!j->m->now.training || (int32_t)best == index[i] || u > 0.75f ? 1.0f : 1.0f / 3.0f);
    }
}
static void moe__sparse_back(const moe__job *j, size_t t, const float *dw, float *dz) {
    size_t E = j->dims->E;
    const int32_t *index = j->t->index + t * j->dims->S;
    float *p = j->m->work + t * E;
    for (size_t i = 0; i < j->dims->S; i++) {
        if (index[i] < 0) continue;
        moe__sparse_row(j, t, i, p);
        float g = dw[i] * p[index[i]] * j->m->now.inv_t; /* the third is not in the gradient [C] */
        j->kn->axpy(E, -g, p, dz);
        dz[index[i]] += g;
    }
}

typedef enum moe__scores_are { MOE__SCORES_PROB, MOE__SCORES_LOGITS, MOE__SCORES_OWN } moe__scores_are;
typedef struct moe__gate_row {
    const char *name;
    moe__scores_are scores;
    int normalizes; /* its weights are what they should be: desc.normalize has no effect */
    void (*value)(const moe__job *j, size_t t, float *w);
    void (*back)(const moe__job *j, size_t t, const float *dw, float *dz);
} moe__gate_row;
static const moe__gate_row moe__gates[MOE__GATE_COUNT] = {
    {"default", MOE__SCORES_PROB, 0, NULL, NULL},
    {"softmax", MOE__SCORES_PROB, 0, moe__scores_value, moe__softmax_back},
    {"softmax-selected", MOE__SCORES_LOGITS, 1, moe__selected_value, moe__selected_back},
    {"sigmoid", MOE__SCORES_OWN, 0, moe__scores_value, moe__sigmoid_back},
    {"relu", MOE__SCORES_OWN, 0, moe__scores_value, moe__relu_back},
    {"sign", MOE__SCORES_OWN, 1, moe__sign_value, moe__sigmoid_back},
    {"sparsemixer", MOE__SCORES_LOGITS, 1, moe__sparse_value, moe__sparse_back},
};

/* Is choice i of token t one that adds nothing: a zero expert? */
static int moe__zero_expert(const moe__job *j, int32_t e) {
    return (size_t)e >= j->dims->F && (size_t)e < j->dims->F + j->d->n_zero;
}

/* index -> weight of a block of tokens; may take choices away (random second, expert dropout) */
static void moe__weights(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S;
    const moe__now *now = &j->m->now;
    for (size_t t = t0; t < t1; t++) {
        int32_t *index = j->t->index + t * S;
        float *w = j->t->weight + t * S, u, kept = 0.0f;
        moe__gates[j->d->gate].value(j, t, w);
        for (size_t i = 0; i < S; i++) {
            if (index[i] < 0) continue;
            if (now->training && i && j->d->random_second == MOE_ON) {
                moe__uniforms(j, MOE__USE_SECOND, (uint64_t)t * S + i, 1, 0.0f, 1.0f, &u);
                if (!((float)j->d->top_k * j->t->prob[t * j->dims->E + (size_t)index[i]] > u)) index[i] = -1, w[i] = 0.0f;
            }
            if (index[i] >= 0 && moe__zero_expert(j, index[i])) w[i] = 0.0f;
        }
        if (now->training && j->d->expert_drop > 0.0f) {
            for (int pass = 0; pass < 2; pass++) /* unless none would be left */
                for (size_t i = 0; i < S && (!pass || kept > 0.0f); i++) {
                    if (index[i] < 0) continue;
                    uint64_t at = (uint64_t)(t / now->sequence) * j->dims->E + (uint64_t)index[i];
                    moe__uniforms(j, MOE__USE_EXPERT_DROP, at, 1, 0.0f, 1.0f, &u);
                    if (!pass) kept += u >= j->d->expert_drop ? w[i] : 0.0f;
                    else if (u < j->d->expert_drop) index[i] = -1, w[i] = 0.0f;
                }
        }
        if (j->d->normalize == MOE_ON && !moe__gates[j->d->gate].normalizes) moe__normalize(S, w);
        if (j->d->weight_scale != 1.0f)
            for (size_t i = 0; i < S; i++) w[i] *= j->d->weight_scale;
    }
}
/* m->slot_grad -> m->dlogits; slot_grad then holds the gradient of the gate's value */
static void moe__weights_back(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S, E = j->dims->E;
    const moe__gate_row *gate = &moe__gates[j->d->gate];
    for (size_t t = t0; t < t1; t++) {
        const int32_t *index = j->t->index + t * S;
        float *dw = j->m->slot_grad + t * S, *raw = j->m->work + t * E, sum = 0.0f;
        if (j->d->weight_scale != 1.0f)
            for (size_t i = 0; i < S; i++) dw[i] *= j->d->weight_scale;
        if (j->d->normalize == MOE_ON && !gate->normalizes) { /* with the weights made again, without scale */
            gate->value(j, t, raw);
            for (size_t i = 0; i < S; i++)
                if (index[i] < 0 || moe__zero_expert(j, index[i])) raw[i] = 0.0f;
            for (size_t i = 0; i < S; i++) sum += raw[i];
            moe__normalize(S, raw);
            moe__normalize_back(S, raw, sum, dw);
        } else if (j->d->gate == MOE_GATE_SOFTMAX_SELECTED) gate->value(j, t, raw);
        else if (j->d->gate == MOE_GATE_SIGN) {
            size_t n = 0;
            for (size_t i = 0; i < S; i++) n += index[i] >= 0;
            for (size_t i = 0; i < S; i++) dw[i] = index[i] < 0 ? 0.0f : dw[i] / (float)n;
        }
        for (size_t i = 0; i < S; i++)
            if (index[i] >= 0 && moe__zero_expert(j, index[i])) dw[i] = 0.0f; /* its weight is 0 whatever the gate gives */
        gate->back(j, t, dw, j->m->dlogits + t * E);
    }
}

/* Gradients of the gate's own parameters, after moe__weights_back and before anything else adds to m->dlogits: with
 * z' = z e^log_scale, d log_scale = sum dz z; a learned threshold g stands against z, so d g = -sum over choices [D]. */
static void moe__gate_params_back(const moe__job *j) {
    size_t S = j->dims->S, E = j->dims->E, T = j->t->n_tokens;
    float *dscale = moe__router_grad(j, MOE__R_SCALE), *dg = moe__router_grad(j, MOE__R_THRESHOLD), scale = j->m->now.inv_t;
    const float *g = moe__router_part(j, MOE__R_THRESHOLD);
    if (dscale)
        for (size_t t = 0; t < T; t++) *dscale += j->kn->dot(E, j->m->dlogits + t * E, j->t->logits + t * E);
    for (size_t p = 0; g && p < T * S; p++) {
        int32_t e = j->t->index[p];
        if (e < 0) continue;
        float s, back;
        moe__sigmoids(j->kn, 1, scale, g + e, &s);
        back = scale * (s * (1.0f - s)) * j->m->slot_grad[p];
        if (dg) dg[e] -= back;
        if (dscale) *dscale -= back * g[e];
    }
}

/* ==== select ================================================================================== */
MOE_API moe_status moe_topk(size_t rows, size_t cols, size_t k, const float *scores, int32_t *index, float *value) {
    size_t n;
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (!k || k > cols) return MOE_E_TOP_K;
    if (!moe__mul(rows, cols, &n)) return MOE_E_OVERFLOW;
    if (!rows) return MOE_OK;
    if (!scores) return MOE_E_NULL_SCORES;
    if (!index) return MOE_E_NULL_INDEX;
    return moe__k()->topk(rows, cols, k, scores, index, value) ? MOE_OK : MOE_E_NAN_LOGITS;
}

/* What all selections ask of their arguments. */
static moe_status moe__select_args(size_t rows, size_t cols, size_t k, const void *scores, const void *index) {
    size_t n;
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (!k || k > cols) return MOE_E_TOP_K;
    if (!moe__mul(rows, cols, &n) || n > SIZE_MAX / sizeof(float)) return MOE_E_OVERFLOW;
    if (rows && !scores) return MOE_E_NULL_SCORES;
    if (rows && !index) return MOE_E_NULL_INDEX;
    return MOE_OK;
}
static int moe__any_nan(size_t n, const float *x) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) nan |= x[i] != x[i];
    return nan;
}

/* Column e, not below those before it, goes to its place among the k best so far; how many they are now. */
static size_t moe__insert(size_t have, size_t k, const float *s, const float *minus, int32_t *index, size_t e) {
    float v = minus ? s[e] - minus[e] : s[e];
    size_t i = have < k ? have : k; /* k: nobody's place yet */
    for (; i; i--) {
        size_t o = (size_t)index[i - 1];
        if (!(v > (minus ? s[o] - minus[o] : s[o]))) break;
        if (i < k) index[i] = index[i - 1];
    }
    if (i < k) index[i] = (int32_t)e;
    return have < k ? have + 1 : k;
}

MOE_API moe_status moe_topk_groups(size_t rows, size_t cols, size_t k, size_t n_groups, size_t top_groups, const float *scores,
                                   int32_t *index) {
    float group[256];
    int32_t chosen[256];
    moe_status status = moe__select_args(rows, cols, k, scores, index);
    if (status) return status;
    if (!n_groups || n_groups > 256 || cols % n_groups) return MOE_E_GROUPS;
    size_t width = cols / n_groups;
    if (!top_groups || top_groups > n_groups || k > top_groups * width) return MOE_E_TOP_GROUPS;
    for (size_t i = 0; i < rows * cols; i++)
        if (!(scores[i] <= FLT_MAX)) return MOE_E_NAN_LOGITS;
    for (size_t r = 0; r < rows; r++, scores += cols, index += k) {
        size_t have = 0;
        for (size_t g = 0; g < n_groups; g++) {
            const float *s = scores + g * width;
            float best = s[0], second = -INFINITY;
            for (size_t i = 1; i < width; i++) {
                float low = s[i] > best ? best : s[i];
                best = s[i] > best ? s[i] : best;
                second = low > second ? low : second;
            }
            group[g] = width > 1 ? best + second : best;
        }
        for (size_t g = 0; g < n_groups; g++) have = moe__insert(have, top_groups, group, NULL, chosen, g);
        for (size_t g = 0; g < n_groups; g++) group[g] = 0.0f; /* from here on: 1 = kept, to visit them in order */
        for (size_t i = 0; i < top_groups; i++) group[chosen[i]] = 1.0f;
        have = 0;
        for (size_t g = 0; g < n_groups; g++)
            for (size_t e = g * width; group[g] > 0.0f && e < (g + 1) * width; e++) have = moe__insert(have, k, scores, NULL, index, e);
    }
    return MOE_OK;
}

MOE_API moe_status moe_topk_threshold(size_t rows, size_t cols, size_t k, float threshold, const float *per_col, int fallback,
                                      const float *scores, int32_t *index) {
    moe_status status = moe__select_args(rows, cols, k, scores, index);
    if (status) return status;
    if (!moe__finite(threshold) || (per_col && !moe__all_finite(cols, per_col))) return MOE_E_THRESHOLD;
    if (rows && moe__any_nan(rows * cols, scores)) return MOE_E_NAN_LOGITS;
    for (size_t r = 0; r < rows; r++, scores += cols, index += k) {
        size_t have = 0;
        for (size_t e = 0; e < cols; e++)
            if (scores[e] > (per_col ? threshold + per_col[e] : threshold)) have = moe__insert(have, k, scores, per_col, index, e);
        if (!have && fallback)
            for (size_t e = 0; e < cols; e++) have = moe__insert(have, 1, scores, per_col, index, e);
        for (; have < k; have++) index[have] = -1;
    }
    return MOE_OK;
}

MOE_API moe_status moe_top_p(size_t rows, size_t cols, size_t k, float p, const float *prob, int32_t *index) {
    moe_status status = moe__select_args(rows, cols, k, prob, index);
    if (status) return status == MOE_E_NULL_SCORES ? MOE_E_NULL_PROB : status;
    if (!(p >= 0.0f && p <= 1.0f)) return MOE_E_TOP_P;
    if (!moe__k()->topk(rows, cols, k, prob, index, NULL)) return MOE_E_NAN_LOGITS;
    for (size_t r = 0; r < rows; r++, prob += cols, index += k) {
        float sum = 0.0f;
        size_t i = 0;
        while (i < k && !(sum > p)) sum += prob[index[i++]];
        for (; i < k; i++) index[i] = -1;
    }
    return MOE_OK;
}

/* Bits that order as the numbers do, -0 with 0; no NaN. */
static uint32_t moe__order(float x) {
    uint32_t b = moe__bits_of(x + 0.0f);
    return b >> 31 ? ~b : b | 0x80000000u;
}
/* The bits of the k-th highest of n numbers (0 < k <= n), whatever they are in the same time: a count of their upper bits, of
 * the middle ones among those that share these, of the lower. *above: how many are higher. */
static uint32_t moe__kth(size_t n, size_t k, const float *x, size_t *above) {
    static const int shift[] = {21, 10, 0}, width[] = {11, 11, 10};
    uint32_t prefix = 0, count[2048];
    *above = 0;
    for (int pass = 0; pass < 3; pass++) {
        uint32_t bins = (uint32_t)1 << width[pass], bin = bins - 1;
        int top = shift[pass] + width[pass];
        memset(count, 0, bins * sizeof(uint32_t));
        for (size_t i = 0; i < n; i++) {
            uint32_t b = moe__order(x[i]);
            if ((uint64_t)(b ^ prefix) >> top == 0) count[b >> shift[pass] & (bins - 1)]++;
        }
        while (*above + count[bin] < k) *above += count[bin--];
        prefix |= bin << shift[pass];
    }
    return prefix;
}
/* The k highest of n numbers in order of their index, ties to the lowest; *next: the highest of the others, if there are any. */
static void moe__highest(size_t n, size_t k, const float *x, int32_t *index, float *next) {
    size_t above, have = 0;
    uint32_t kth = moe__kth(n, k, x, &above);
    size_t ties = k - above;
    *next = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        uint32_t b = moe__order(x[i]);
        if (b > kth || (b == kth && ties)) {
            ties -= b == kth;
            index[have++] = (int32_t)i;
        } else if (x[i] > *next) {
            *next = x[i];
        }
    }
    MOE_ASSERT(have == k);
}

/* (rows, cols) -> (cols, rows) */
static void moe__transpose_plain(size_t rows, size_t cols, const float *x, float *y) {
    for (size_t r0 = 0; r0 < rows; r0 += 32)
        for (size_t c = 0; c < cols; c++)
            for (size_t r = r0; r < moe__min(rows, r0 + 32); r++) y[c * rows + r] = x[r * cols + c];
}

typedef struct moe__choice { float *by_col; int32_t *taken; } moe__choice;
static moe_status moe__choice_layout(size_t rows, size_t cols, moe__choice *m, moe__arena *a) {
    memset(m, 0, sizeof *m);
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (rows > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    m->by_col = moe__take_floats(a, rows, cols);
    m->taken = (int32_t *)moe__take(a, rows, sizeof(int32_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}
MOE_API moe_status moe_expert_choice_scratch(size_t rows, size_t cols, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    moe__choice m;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__choice_layout(rows, cols, &m, &a);
    return status ? status : moe__arena_bytes(&a, bytes);
}
MOE_API moe_status moe_expert_choice(size_t rows, size_t cols, size_t capacity, size_t slots, const float *scores, int32_t *index,
                                     void *scratch, size_t scratch_bytes) {
    size_t needed, n;
    moe__scratch mem;
    moe__choice m;
    moe_status status = moe__select_args(rows, cols, 1, scores, index);
    if (!status && !capacity) status = MOE_E_CAPACITY;
    if (!status && slots < cols) status = MOE_E_SLOTS;
    if (!status && !moe__mul(rows, slots, &n)) status = MOE_E_OVERFLOW;
    if (!status) status = moe_expert_choice_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    if (moe__any_nan(rows * cols, scores)) return MOE_E_NAN_LOGITS;
    status = moe__scratch_begin(&mem, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__choice_layout(rows, cols, &m, &mem.arena);
    moe__transpose_plain(rows, cols, scores, m.by_col);
    capacity = moe__min(capacity, rows);
    for (size_t i = 0; i < n; i++) index[i] = -1;
    for (size_t e = 0; e < cols; e++) {
        float next;
        moe__highest(rows, capacity, m.by_col + e * rows, m.taken, &next);
        for (size_t i = 0; i < capacity; i++) {
            size_t r = (size_t)m.taken[i], have = 0;
            while (index[r * slots + have] >= 0) have++; /* fewer than the e columns before */
            moe__insert(have, slots, scores + r * cols, NULL, index + r * slots, e);
        }
    }
    moe__scratch_end(&mem);
    return MOE_OK;
}

typedef struct moe__sinkhorn_memory { float *row, *col, *by_col, *f, *g; } moe__sinkhorn_memory;
static moe_status moe__sinkhorn_layout(size_t rows, size_t cols, moe__sinkhorn_memory *m, moe__arena *a) {
    memset(m, 0, sizeof *m);
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (rows > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    m->by_col = moe__take_floats(a, rows, cols); /* scores / epsilon; plan keeps the same by rows */
    m->row = moe__take_floats(a, cols, 1);
    m->col = moe__take_floats(a, rows, 1);
    m->f = moe__take_floats(a, rows, 1); /* logarithms of the scales of rows */
    m->g = moe__take_floats(a, cols, 1); /* and columns */
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}
MOE_API moe_status moe_sinkhorn_scratch(size_t rows, size_t cols, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    moe__sinkhorn_memory m;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__sinkhorn_layout(rows, cols, &m, &a);
    return status ? status : moe__arena_bytes(&a, bytes);
}
/* log sum exp(x + y) */
static float moe__lse_of_sum(const moe__kernels *kn, size_t n, const float *x, const float *y, float *sum) {
    memcpy(sum, x, n * sizeof(float));
    kn->axpy(n, 1.0f, y, sum);
    return kn->lse(n, sum);
}
MOE_API moe_status moe_sinkhorn(size_t rows, size_t cols, float epsilon, size_t iterations, const float *scores, float *plan,
                                void *scratch, size_t scratch_bytes) {
    size_t needed;
    moe__scratch mem;
    moe__sinkhorn_memory m;
    moe_status status = moe__select_args(rows, cols, 1, scores, plan);
    if (status == MOE_E_NULL_INDEX) status = MOE_E_NULL_OUT;
    if (!status && !(epsilon > 0.0f && moe__finite(epsilon))) status = MOE_E_EPSILON;
    if (!status && !iterations) status = MOE_E_ITERATIONS;
    if (!status) status = moe_sinkhorn_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    for (size_t i = 0; i < rows * cols; i++)
        if (!moe__finite(scores[i] / epsilon)) return MOE_E_NAN_LOGITS;
    status = moe__scratch_begin(&mem, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__sinkhorn_layout(rows, cols, &m, &mem.arena);
    const moe__kernels *kn = moe__k();
    for (size_t i = 0; i < rows * cols; i++) plan[i] = scores[i] / epsilon;
    moe__transpose_plain(rows, cols, plan, m.by_col);
    memset(m.f, 0, rows * sizeof(float));
    float share = moe__logf1((float)rows / (float)cols);
    for (size_t i = 0; i < iterations; i++) {
        for (size_t c = 0; c < cols; c++) m.g[c] = share - moe__lse_of_sum(kn, rows, m.by_col + c * rows, m.f, m.col);
        for (size_t r = 0; r < rows; r++) m.f[r] = -moe__lse_of_sum(kn, cols, plan + r * cols, m.g, m.row);
    }
    for (size_t r = 0; r < rows; r++) {
        float *p = plan + r * cols;
        for (size_t c = 0; c < cols; c++) p[c] = p[c] + m.g[c] + m.f[r];
        kn->exp(cols, p, p);
    }
    moe__scratch_end(&mem);
    return MOE_OK;
}

#define MOE__AUCTION_EXACT 100 /* rounds in which a winner holds what it won, as in the authors' code */
#define MOE__AUCTION_ROUNDS 1000
typedef struct moe__auction_memory {
    float *score, *value; /* (cols, rows) */
    float *cost, *bid;
    int32_t *winner, *holder; /* of this round and of the last; -1: nobody */
    int32_t *want;
    size_t *sold;
} moe__auction_memory;
static moe_status moe__auction_layout(size_t rows, size_t cols, moe__auction_memory *m, moe__arena *a) {
    memset(m, 0, sizeof *m);
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (rows > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    m->score = moe__take_floats(a, cols, rows);
    m->value = moe__take_floats(a, cols, rows);
    m->cost = moe__take_floats(a, rows, 1);
    m->bid = moe__take_floats(a, rows, 1);
    m->winner = (int32_t *)moe__take(a, rows, sizeof(int32_t));
    m->holder = (int32_t *)moe__take(a, rows, sizeof(int32_t));
    m->want = (int32_t *)moe__take(a, rows, sizeof(int32_t));
    m->sold = (size_t *)moe__take(a, cols, sizeof(size_t));
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}
MOE_API moe_status moe_auction_scratch(size_t rows, size_t cols, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    moe__auction_memory m;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__auction_layout(rows, cols, &m, &a);
    return status ? status : moe__arena_bytes(&a, bytes);
}
/* One round: everyone bids for the k rows that it values most. Whether every row has a bid. */
static int moe__auction_round(size_t rows, size_t cols, size_t k, float eps, int hold, moe__auction_memory *m) {
    int all = 1;
    for (size_t t = 0; t < rows; t++) m->bid[t] = 0.0f, m->winner[t] = -1;
    for (size_t e = 0; e < cols; e++) {
        const float *value = m->value + e * rows;
        float next; /* what it would turn to */
        moe__highest(rows, k, value, m->want, &next);
        for (size_t i = 0; i < k; i++) {
            size_t t = (size_t)m->want[i];
            float bid = hold && m->holder[t] == (int32_t)e ? eps : value[t] - next + eps;
            if (bid > m->bid[t]) m->bid[t] = bid, m->winner[t] = (int32_t)e;
        }
    }
    for (size_t t = 0; t < rows; t++) all &= m->winner[t] >= 0;
    return all;
}
MOE_API moe_status moe_auction(size_t rows, size_t cols, const float *scores, int32_t *index, void *scratch, size_t scratch_bytes) {
    size_t needed;
    moe__scratch mem;
    moe__auction_memory m;
    moe_status status = moe__select_args(rows, cols, 1, scores, index);
    if (!status && rows % cols) status = MOE_E_UNEVEN;
    if (!status) status = moe_auction_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    if (!moe__all_finite(rows * cols, scores)) return MOE_E_NAN_LOGITS;
    status = moe__scratch_begin(&mem, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__auction_layout(rows, cols, &m, &mem.arena);
    size_t k = rows / cols, n = rows * cols;
    float low = scores[0], high = scores[0];
    for (size_t i = 1; i < n; i++) low = scores[i] < low ? scores[i] : low, high = scores[i] > high ? scores[i] : high;
    float eps = high / 50.0f - low / 50.0f;
    if (eps < 1e-4f) eps = 1e-4f;
    moe__transpose_plain(rows, cols, scores, m.score);
    memcpy(m.value, m.score, n * sizeof(float));
    memset(m.cost, 0, rows * sizeof(float));
    for (size_t t = 0; t < rows; t++) m.holder[t] = -1;
    for (size_t round = 0; round < MOE__AUCTION_ROUNDS; round++) {
        if (moe__auction_round(rows, cols, k, eps, round < MOE__AUCTION_EXACT, &m)) break;
        for (size_t t = 0; t < rows; t++) m.cost[t] += m.bid[t];
        for (size_t e = 0; e < cols; e++)
            for (size_t t = 0; t < rows; t++) m.value[e * rows + t] = m.score[e * rows + t] - m.cost[t];
        for (size_t t = 0; t < rows; t++) {
            m.holder[t] = m.winner[t];
            if (m.winner[t] < 0) continue;
            size_t at = (size_t)m.winner[t] * rows + t;
            m.value[at] = round < MOE__AUCTION_EXACT ? INFINITY : m.score[at]; /* the authors' maximal score, and first among equals */
        }
    }
    /* with a bid for every row there are no two for one: the winners are the assignment */
    memset(m.sold, 0, cols * sizeof(size_t));
    for (size_t t = 0; t < rows; t++) {
        index[t] = m.winner[t];
        if (index[t] >= 0 && m.sold[index[t]]++ >= k) index[t] = -1, m.sold[m.winner[t]]--;
    }
    for (size_t t = 0; t < rows; t++) {
        if (index[t] >= 0) continue;
        for (size_t e = 0; e < cols; e++)
            if (m.sold[e] < k && (index[t] < 0 || scores[t * cols + e] > scores[t * cols + (size_t)index[t]])) index[t] = (int32_t)e;
        m.sold[index[t]]++;
    }
    moe__scratch_end(&mem);
    return MOE_OK;
}

/* -- the selections of the pipeline: m->seen -> tape.index -- */
static void moe__no_choice(const moe__job *j, size_t t, size_t from) {
    for (size_t i = from; i < j->dims->S; i++) j->t->index[t * j->dims->S + i] = -1;
}
static void moe__select_topk(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S, E = j->dims->E, k = moe__min(j->m->now.k, E);
    int fallback = j->d->fallback == MOE_ON || (j->d->fallback == MOE_DEFAULT && !j->m->now.training);
    if (j->d->threshold == (float)MOE_OFF && k == S) {
        j->kn->topk(t1 - t0, E, k, j->m->seen + t0 * E, j->t->index + t0 * S, NULL);
        return;
    }
    for (size_t t = t0; t < t1; t++) {
        if (j->d->threshold == (float)MOE_OFF) j->kn->topk(1, E, k, j->m->seen + t * E, j->t->index + t * S, NULL);
        else moe_topk_threshold(1, E, k, j->d->threshold, NULL, fallback, j->m->seen + t * E, j->t->index + t * S);
        moe__no_choice(j, t, k);
    }
}
static void moe__select_groups(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S, E = j->dims->E, k = j->m->now.k;
    for (size_t t = t0; t < t1; t++) {
        moe_topk_groups(1, E, k, j->d->n_groups, j->d->top_groups, j->m->seen + t * E, j->t->index + t * S);
        moe__no_choice(j, t, k);
    }
}
static void moe__select_top_p(const moe__job *j, size_t t0, size_t t1) {
    moe_top_p(t1 - t0, j->dims->E, j->dims->S, j->d->top_p, j->m->seen + t0 * j->dims->E, j->t->index + t0 * j->dims->S);
}
static void moe__select_threshold(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E;
    int fallback = j->d->fallback == MOE_ON || (j->d->fallback == MOE_DEFAULT && !j->m->now.training);
    moe_topk_threshold(t1 - t0, E, j->dims->S, j->d->threshold, moe__router_part(j, MOE__R_THRESHOLD), fallback, j->m->seen + t0 * E,
                       j->t->index + t0 * j->dims->S);
}
static void moe__select_all(const moe__job *j, size_t t0, size_t t1) {
    moe_topk(t1 - t0, j->dims->E, j->dims->S, j->m->seen + t0 * j->dims->E, j->t->index + t0 * j->dims->S, NULL);
}
static void moe__select_sampled(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S, E = j->dims->E;
    for (size_t t = t0; t < t1; t++) {
        int32_t *index = j->t->index + t * S;
        float *p = j->m->work + t * E, gumbel;
        moe__no_choice(j, t, 0);
        for (size_t i = 0; i < moe__min(j->m->now.k, E); i++) {
            size_t best = moe__sparse_row(j, t, i, p);
            float top = -FLT_MAX;
            for (size_t e = 0; j->m->now.training && e < E; e++) { /* the highest logit plus Gumbel noise among those with p > 0 */
                if (!(p[e] > 0.0f)) continue;
                moe__gumbel_at(MOE__DRAW_KEY(j), moe__stream(j, MOE__USE_SAMPLE), ((uint64_t)t * S + i) * E + e, 1, &gumbel);
                float v = moe__fma(j->t->logits[t * E + e], j->m->now.inv_t, gumbel);
                if (v > top) top = v, best = e;
            }
            index[i] = (int32_t)best;
        }
    }
}
static moe_status moe__select_expert_choice(const moe__job *j) {
    size_t T = j->t->n_tokens, E = j->dims->E;
    double share = (double)T * (double)j->m->now.k / (double)E;
    size_t capacity = moe__min(T, moe__max(1, (size_t)share));
    return moe_expert_choice(T, E, capacity, j->dims->S, j->m->seen, j->t->index, j->m->scratch, j->m->scratch_bytes);
}
static moe_status moe__select_sinkhorn(const moe__job *j) {
    size_t T = j->t->n_tokens, E = j->dims->E;
    const float *plan = j->m->seen;
    moe_status s = MOE_OK;
    if (j->m->now.training) {
        s = moe_sinkhorn(T, E, j->d->sinkhorn_epsilon, j->d->sinkhorn_iterations, j->m->seen, j->m->work, j->m->scratch,
                         j->m->scratch_bytes);
        plan = j->m->work;
    }
    for (size_t t = 0; !s && t < T; t++) {
        s = moe_topk(1, E, j->m->now.k, plan + t * E, j->t->index + t * j->dims->S, NULL);
        moe__no_choice(j, t, j->m->now.k);
    }
    return s;
}
static moe_status moe__select_auction(const moe__job *j) {
    size_t T = j->t->n_tokens, E = j->dims->E;
    if (!j->m->now.training) return moe_topk(T, E, 1, j->m->seen, j->t->index, NULL);
    if (T % E) return MOE_E_UNEVEN;
    return moe_auction(T, E, j->m->seen, j->t->index, j->m->scratch, j->m->scratch_bytes);
}
/* Room for the selections over a batch of up to n tokens. */
static moe_status moe__select_scratch(const moe_desc *d, size_t n, size_t *bytes) {
    *bytes = 0;
    if (d->select == MOE_SELECT_EXPERT_CHOICE) return moe_expert_choice_scratch(n, d->n_experts, bytes);
    if (d->select == MOE_SELECT_SINKHORN) return moe_sinkhorn_scratch(n, d->n_experts, bytes);
    if (d->select == MOE_SELECT_AUCTION) return moe_auction_scratch(n - n % d->n_experts, d->n_experts, bytes);
    return MOE_OK;
}

typedef struct moe__select_row {
    const char *name;
    int sees_logits, all; /* all: a token can have every expert */
    void (*select)(const moe__job *j, size_t t0, size_t t1); /* token by token, or */
    moe_status (*batch)(const moe__job *j);                  /* over the whole batch */
} moe__select_row;
static const moe__select_row moe__selects[MOE__SELECT_COUNT] = {
    {"default", 0, 0, NULL, NULL},
    {"top-k", 0, 0, moe__select_topk, NULL},
    {"groups", 0, 0, moe__select_groups, NULL},
    {"top-p", 0, 1, moe__select_top_p, NULL},
    {"threshold", 0, 1, moe__select_threshold, NULL},
    {"expert-choice", 0, 1, NULL, moe__select_expert_choice},
    {"sinkhorn", 1, 0, NULL, moe__select_sinkhorn},
    {"auction", 1, 0, NULL, moe__select_auction},
    {"sampled", 1, 0, moe__select_sampled, NULL},
    {"all", 0, 1, moe__select_all, NULL},
};

/* What a selection looks at when nothing interferes. */
static const float *moe__selection_base(const moe__job *j) {
    return moe__selects[j->d->select].sees_logits || j->d->gate == MOE_GATE_SIGN ? j->t->logits : j->t->scores;
}
/* What the selection sees of a block of tokens, where it is not simply logits or scores: with the bias, in warm-up random
 * numbers, and without the experts of other ranks while gating dropout holds. */
static void moe__select_view(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E, T = j->t->n_tokens, P = j->d->n_ranks;
    const moe__now *now = &j->m->now;
    if (j->m->seen != j->m->sel) return;
    const float *base = moe__selection_base(j);
    for (size_t t = t0; t < t1; t++) {
        float *s = j->m->sel + t * E;
        if (now->random) moe__uniforms(j, MOE__USE_WARM_UP, (uint64_t)moe__draw_row(j, t) * E, E, 0.0f, 1.0f, s);
        else
            for (size_t e = 0; e < E; e++) s[e] = base[t * E + e] + (j->t->side.bias ? j->t->side.bias[e] : 0.0f);
        for (size_t e = 0; now->local && e < E; e++)
            if (e * P / E != t * P / T) s[e] = -INFINITY;
    }
}
/* Choices that gating dropout forbids were made for want of others. */
static void moe__select_filter(const moe__job *j, size_t t0, size_t t1) {
    size_t S = j->dims->S, E = j->dims->E;
    for (size_t p = t0 * S; p < t1 * S && (j->m->now.local || j->m->now.skip); p++)
        if (j->m->now.skip || (j->t->index[p] >= 0 && !moe__finite(j->m->seen[p / S * E + (size_t)j->t->index[p]]))) j->t->index[p] = -1;
}

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

/* index and weight are what they should be: the library made them. */
static moe_status moe__routes_fill(moe_routes *r, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order) {
    size_t E = r->n_experts, k = r->n_slots, pairs = n_tokens * k;
    r->n_tokens = r->n_routes = r->n_dropped = 0;
    memset(r->load, 0, E * sizeof(uint64_t));
    memset(r->top1, 0, E * sizeof(uint64_t));
    memset(r->begin, 0, (E + 1) * sizeof(uint32_t));
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

MOE_API moe_status moe_routes_fill(moe_routes *r, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order) {
    if (!r || !r->begin) return MOE_E_NULL_ROUTES;
    size_t E = r->n_experts, k = r->n_slots, pairs = n_tokens * k;
    r->n_tokens = r->n_routes = r->n_dropped = 0;
    if (n_tokens > r->max_tokens) return MOE_E_N_TOKENS;
    if ((unsigned)order >= MOE__ORDER_COUNT) return MOE_E_CAPACITY_ORDER;
    if (pairs && !index) return MOE_E_NULL_INDEX;
    memset(r->begin, 0, (E + 1) * sizeof(uint32_t));
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        if ((size_t)index[p] >= E) return MOE_E_INDEX;
        for (size_t q = p - p % k; q < p; q++)
            if (index[q] == index[p]) return MOE_E_INDEX_TWICE;
        if (weight && !moe__finite(weight[p])) return MOE_E_NAN_WEIGHT;
    }
    return moe__routes_fill(r, n_tokens, index, weight, capacity, order);
}

/* ==== experts ================================================================================= */
static int moe__expert_gated(moe_expert_kind e) { return e == MOE_EXPERT_SWIGLU || e == MOE_EXPERT_GEGLU; }

/* The shapes of the router's tensors: L, N, d, E as in moe__dims, c codes; "" = this desc has it not. */
static const char *moe__router_shape(const moe_desc *d, int part) {
    const moe__latent *l = &moe__latents[d->score];
    switch (part) {
    case MOE__R_ROUTER: return moe__latent_score(d->score) ? "LN" : "";
    case MOE__R_BIAS: return l->out_bias ? "N" : "";
    case MOE__R_PROJ: return l->proj ? "dL" : "";
    case MOE__R_PROJ_BIAS: return l->proj_bias ? "L" : "";
    case MOE__R_NOISE: return d->noise == MOE_NOISE_LEARNED ? "dE" : "";
    case MOE__R_THRESHOLD: return d->gate == MOE_GATE_SIGN ? "E" : "";
    case MOE__R_SCALE: return d->learn_temperature == MOE_ON ? "1" : "";
    case MOE__R_RESIDUAL: return d->residual == MOE_ON ? "EE" : "";
    case MOE__R_CODEBOOK: return d->n_codes ? "cd" : "";
    default: return d->n_codes ? "d2" : ""; /* branch */
    }
}
static size_t moe__extent(const moe__dims *s, char c) {
    switch (c) {
    case 'L': return s->L;
    case 'N': return s->N;
    case 'd': return s->d;
    case 'E': return s->E;
    case 'G': return s->G;
    case 'f': return s->f;
    case 'c': return s->codes;
    case 'n': return s->constants;
    default: return (size_t)(c - '0');
    }
}

/* d is resolved */
static moe_status moe__dims_of(const moe_desc *d, moe__dims *s) {
    memset(s, 0, sizeof *s);
    s->d = d->d_model;
    s->f = d->d_ff;
    s->E = d->n_experts;
    s->F = d->n_experts - d->n_zero - d->n_copy - d->n_constant;
    s->S = moe__selects[d->select].all ? s->E : d->top_k;
    s->gated = (size_t)moe__expert_gated(d->expert);
    s->bias = d->bias == MOE_ON;
    s->dp = moe__ceil_div(s->d, MOE__W);
    s->hp = moe__ceil_div(s->f, MOE__W);
    s->zp = s->gated ? 2 * s->hp : s->hp;
    s->ep = moe__ceil_div(s->E, MOE__W);
    s->L = moe__latents[d->score].proj ? d->d_router : s->d;
    s->lp = moe__ceil_div(s->L, MOE__W);
    s->N = s->E * d->soft_slots;
    s->np = moe__ceil_div(s->N, MOE__W);
    s->score = (size_t)d->score;
    s->gate = (size_t)d->gate;
    s->select = (size_t)d->select;
    s->combine = (size_t)d->combine;
    s->noise = (size_t)d->noise;
    s->expert_kind = (size_t)d->expert;
    s->jitter = d->jitter > 0.0f;
    s->by_sequence = d->route_sequence == MOE_ON;
    s->sequence = d->sequence;
    s->codes = d->n_codes;
    s->constants = d->n_constant;
    s->ranks = d->n_ranks;
    s->ortho_loss = d->loss[MOE_LOSS_ORTHONORMAL] > 0.0f;
    s->output_loss = d->loss[MOE_LOSS_OUTPUT_ORTHOGONALITY] > 0.0f;
    s->k = d->top_k;
    size_t n, limit = SIZE_MAX / 64; /* floats, with room for a few more factors below */
    if (s->d > limit / 64 || s->f > limit / 64 || s->L > limit / 64 || !moe__add_size(s->F, d->n_shared, &s->G) || s->G > MOE__MAX_INDEX)
        return MOE_E_OVERFLOW;
    if (!moe__mul(s->zp * MOE__W, s->d, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->b1 = n;
    s->w2 = s->b1 + (s->bias ? s->zp * MOE__W : 0);
    if (!moe__mul(s->dp * MOE__W, s->f, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->b2 = s->w2 + n;
    s->expert = s->b2 + (s->bias ? s->dp * MOE__W : 0);
    if (!moe__mul(s->expert, s->G, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->special = n;
    if (!moe__mul(s->constants * 3, s->d, &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->experts = s->special + n;
    for (int part = 0; part < MOE__R_COUNT; part++) {
        const char *shape = moe__router_shape(d, part);
        size_t count = *shape != 0;
        for (; *shape; shape++)
            if (!moe__mul(count, moe__extent(s, *shape), &count)) return MOE_E_OVERFLOW;
        if (count > limit / 16 || !moe__add_size(s->at[part], count, &s->at[part + 1])) return MOE_E_OVERFLOW;
    }
    if (!moe__mul(s->N, moe__max(s->d, s->L), &n) || n > limit / 4) return MOE_E_OVERFLOW;
    s->ldo = s->dp * MOE__W + 16; /* not a power of two: rows must not alias in L1 */
    return MOE_OK;
}

/* Rows of a group are worked on in blocks that fit in L2; a task is one block and some panels of the result. */
typedef struct moe__phase { size_t units, chunk, chunks, most; } moe__phase;
static size_t moe__blocks(size_t rows, size_t most) { return rows ? moe__ceil_div(rows, most) : 0; }
static size_t moe__phase_plan(const moe__job *j, moe__phase *p, size_t units, size_t most, size_t cap) {
    size_t total = 0, workers = moe_workers(&j->d->parallel), blocks = 0;
    for (size_t g = 0; g < j->m->n_groups; g++) blocks += moe__blocks(j->m->group[g].rows, most);
    p->units = units;
    p->most = most;
    p->chunk = workers > 1 ? moe__max(1, moe__min(units, blocks * units / (workers * 16))) : units;
    if (cap) p->chunk = moe__min(p->chunk, cap);
    p->chunks = moe__ceil_div(units, p->chunk);
    for (size_t g = 0; g < j->m->n_groups; g++) {
        j->m->first[g] = total;
        total += moe__blocks(j->m->group[g].rows, most) * p->chunks;
    }
    j->m->first[j->m->n_groups] = total;
    return total;
}
typedef struct moe__share { const moe__group *group; size_t g, r0, rows, u0, u1; } moe__share;
static moe__share moe__phase_share(const moe__job *j, const moe__phase *p, size_t i) {
    moe__share s;
    size_t lo = 0, hi = j->m->n_groups; /* the last group whose first task is <= i and that has any */
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
    const float *params, *dy, *weight; /* weight (n_routes): what the combination uses */
    float *dparams, *y, *dx, *dweight;
    int fresh;
} moe__pass;

/* Rows of k columns that fill a megabyte of L2. */
static size_t moe__block_rows(size_t k) { return moe__max(64, ((size_t)256 << 10) / moe__max(k, 1)); }

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
    const float *w = g->params, *x = g->x + s.r0 * MOE__W;
    size_t panels = d->gated ? 2 : 1;
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
            moe__product(p->j.kn, rows, d->d, x + r * MOE__W, g->x_panel, w + u * panels * MOE__W * d->d, &z, 1,
                         w + (u + 1) * panels * MOE__W * d->d);
            p->j.kn->act[p->j.d->expert](rows, z.c, z.c + z.panel, m->h + (g->begin * d->hp + u * g->rows + s.r0 + r) * MOE__W);
        }
}

static void moe__task_down(void *arg, size_t i, size_t worker) { /* o = h W2 + b2 */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    const float *w = g->params, *h = p->j.m->h + (g->begin * d->hp + s.r0) * MOE__W;
    (void)worker;
    moe__target o = {p->j.m->o + (g->begin + s.r0) * d->ldo + s.u0 * MOE__W, d->ldo, MOE__W, (s.u1 - s.u0) * MOE__W, moe__zeros, 0};
    if (d->bias) {
        o.init = w + d->b2 + s.u0 * MOE__W;
        o.init_panel = MOE__W;
    }
    moe__product(p->j.kn, s.rows, d->f, h, g->rows * MOE__W, w + d->w2 + s.u0 * MOE__W * d->f, &o, 1, w + d->w2 + s.u1 * MOE__W * d->f);
}

/* ==== combine ================================================================================= */
/* -- robust: outputs some of which may be wrong -- */
/* 16 columns of n rows, each sorted upwards by a network of neighbours' exchanges: the same steps whatever the numbers. */
static void moe__sort_columns(size_t n, float *x) {
    for (size_t pass = 0; pass < n; pass++)
        for (size_t i = pass % 2; i + 1 < n; i += 2) {
            float *p = x + i * 16, *q = p + 16;
            for (int l = 0; l < 16; l++) {
                float a = p[l], b = q[l];
                p[l] = b < a ? b : a;
                q[l] = b < a ? a : b;
            }
        }
}
/* In each coordinate the mean of the n rows without the `cut` lowest and as many highest. row[i] (d); sorted (n, 16) */
static void moe__trimmed_mean(size_t n, size_t d, size_t cut, const float *const *row, float *sorted, float *out) {
    float each = 1.0f / (float)(n - 2 * cut);
    for (size_t c = 0; c < d; c += 16) {
        size_t cols = moe__min(16, d - c);
        for (size_t i = 0; i < n; i++) {
            memset(sorted + i * 16, 0, 16 * sizeof(float));
            memcpy(sorted + i * 16, row[i] + c, cols * sizeof(float));
        }
        if (cut) moe__sort_columns(n, sorted);
        for (size_t l = 0; l < cols; l++) {
            float sum = 0.0f;
            for (size_t i = cut; i < n - cut; i++) sum = moe__fma(sorted[i * 16 + l], each, sum);
            out[c + l] = sum;
        }
    }
}
/* How many to cut on each side so that the middle one, or two, are left. */
static size_t moe__median_cut(size_t n) { return (n - 1) / 2; }

/* diff = x - y; its length */
static float moe__distance(const moe__kernels *kn, size_t d, const float *x, const float *y, float *diff) {
    memcpy(diff, x, d * sizeof(float));
    kn->axpy(d, -1.0f, y, diff);
    return sqrtf(kn->dot(d, diff, diff));
}

typedef struct moe__robust_memory { const float **row; float *sorted, *center, *diff, *step; } moe__robust_memory;
static moe_status moe__robust_layout(size_t n, size_t d, moe__robust_memory *m, moe__arena *a) {
    memset(m, 0, sizeof *m);
    if (!n) return MOE_E_NO_OUTPUTS;
    if (n > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    m->row = (const float **)moe__take(a, n, sizeof(float *));
    m->sorted = moe__take_floats(a, n, 16);
    m->center = moe__take_floats(a, d, 1);
    m->diff = moe__take_floats(a, d, 1);
    m->step = moe__take_floats(a, d, 1);
    return a->overflow ? MOE_E_OVERFLOW : MOE_OK;
}
MOE_API moe_status moe_robust_weights_scratch(size_t k, size_t d, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    moe__robust_memory m;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__robust_layout(k, d, &m, &a);
    return status ? status : moe__arena_bytes(&a, bytes);
}
MOE_API moe_status moe_aggregate_scratch(size_t n, size_t d, size_t *bytes) { return moe_robust_weights_scratch(n, d, bytes); }

MOE_API moe_status moe_robust_weights(size_t k, size_t d, const float *const *outputs, const float *weight, float tau,
                                      float *reliability, float *out, void *scratch, size_t scratch_bytes) {
    size_t needed, n = 0;
    moe__scratch mem;
    moe__robust_memory m;
    moe_status status = moe_robust_weights_scratch(k, d, &needed);
    if (status) return status;
    if (!(tau > 0.0f && moe__finite(tau))) return MOE_E_TAU;
    if (!outputs) return MOE_E_NULL_OUTPUTS;
    if (!weight) return MOE_E_NULL_WEIGHT;
    if (!reliability || !out) return MOE_E_NULL_OUT;
    for (size_t e = 0; e < k; e++)
        if (d && !outputs[e]) return MOE_E_NULL_OUTPUTS;
    if (!moe__all_finite(k, weight)) return MOE_E_NAN_WEIGHT;
    status = moe__scratch_begin(&mem, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__robust_layout(k, d, &m, &mem.arena);
    const moe__kernels *kn = moe__k();
    for (size_t e = 0; e < k; e++) {
        reliability[e] = out[e] = 0.0f; /* what stays so where nothing is finite */
        if (moe__all_finite(d, outputs[e])) m.row[n++] = outputs[e];
    }
    if (n) {
        moe__trimmed_mean(n, d, moe__median_cut(n), m.row, m.sorted, m.center);
        for (size_t i = 0; i < n; i++) m.sorted[i * 16] = moe__distance(kn, d, m.row[i], m.center, m.diff);
        for (size_t i = 0, e = 0; e < k; e++)
            if (i < n && m.row[i] == outputs[e]) reliability[e] = m.sorted[i++ * 16];
            else reliability[e] = INFINITY;
        moe__sort_columns(n, m.sorted); /* the other 15 columns hold anything */
        float mad = n % 2 ? m.sorted[n / 2 * 16] : 0.5f * m.sorted[(n / 2 - 1) * 16] + 0.5f * m.sorted[n / 2 * 16], sum = 0.0f;
        for (size_t e = 0; e < k; e++) {
            float far = reliability[e];
            reliability[e] = mad > 0.0f ? (far < INFINITY ? -(far / mad) / tau : -INFINITY) : far > 0.0f ? -INFINITY : 0.0f;
        }
        kn->exp(k, reliability, reliability);
        for (size_t e = 0; e < k; e++) out[e] = weight[e] * reliability[e];
        for (size_t e = 0; e < k; e++) sum += out[e];
        for (size_t e = 0; e < k; e++) out[e] = sum > 0.0f || sum < 0.0f ? out[e] / sum : 0.0f;
    }
    moe__scratch_end(&mem);
    return MOE_OK;
}

/* From the coordinates' median: y -> the mean of the others by the inverse of their distance, and less of that step
 * where y is one of the points, none if the others do not pull more than these hold. */
static void moe__geometric_median(const moe__kernels *kn, size_t n, size_t d, moe__robust_memory *m, float *y) {
    for (int i = 0; i < 1000; i++) {
        float total = 0.0f, here = 0.0f;
        memset(m->step, 0, d * sizeof(float));
        for (size_t r = 0; r < n; r++) {
            float far = moe__distance(kn, d, m->row[r], y, m->diff);
            if (far > 0.0f) total += 1.0f / far, kn->axpy(d, 1.0f / far, m->diff, m->step);
            else here += 1.0f;
        }
        float pull = sqrtf(kn->dot(d, m->step, m->step));
        if (!(pull - here > 1e-6f * (float)n)) return; /* the gradient of the sum of distances: 0 within rounding */
        kn->axpy(d, (1.0f - here / pull) / total, m->step, y);
    }
}
MOE_API moe_status moe_aggregate(moe_aggregate_kind kind, size_t n, size_t d, const float *rows, float trim, float *out,
                                 void *scratch, size_t scratch_bytes) {
    size_t needed, count, cut = 0;
    moe__scratch mem;
    moe__robust_memory m;
    if ((unsigned)kind >= MOE__AGGREGATE_COUNT) return MOE_E_AGGREGATE;
    if (kind == MOE_AGGREGATE_TRIMMED && !(trim >= 0.0f && trim < 0.5f)) return MOE_E_TRIM;
    moe_status status = moe_aggregate_scratch(n, d, &needed);
    if (!status && !moe__mul(n, d, &count)) status = MOE_E_OVERFLOW;
    if (status || !d) return status;
    if (!rows) return MOE_E_NULL_OUTPUTS;
    if (!out) return MOE_E_NULL_OUT;
    if (!moe__all_finite(count, rows)) return MOE_E_NAN_OUTPUTS;
    status = moe__scratch_begin(&mem, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__robust_layout(n, d, &m, &mem.arena);
    for (size_t r = 0; r < n; r++) m.row[r] = rows + r * d;
    if (kind == MOE_AGGREGATE_TRIMMED) cut = moe__min((size_t)((double)trim * (double)n), moe__median_cut(n));
    if (kind >= MOE_AGGREGATE_MEDIAN) cut = moe__median_cut(n);
    moe__trimmed_mean(n, d, cut, m.row, m.sorted, out);
    if (kind == MOE_AGGREGATE_GEOMETRIC) moe__geometric_median(moe__k(), n, d, &m, out);
    moe__scratch_end(&mem);
    return MOE_OK;
}

/* Row t of all tokens' panels: y += a x, and <w, x>. */
static void moe__token_axpy(const moe__job *j, float a, size_t t, float *y) {
    for (size_t p = 0; p < j->dims->dp; p++)
        j->kn->axpy(moe__min(MOE__W, j->dims->d - p * MOE__W), a, j->m->xp + (p * j->t->n_tokens + t) * MOE__W, y + p * MOE__W);
}
static float moe__token_dot(const moe__job *j, const float *w, size_t t) {
    float sum = 0.0f;
    for (size_t p = 0; p < j->dims->dp; p++)
        sum += j->kn->dot(moe__min(MOE__W, j->dims->d - p * MOE__W), j->m->xp + (p * j->t->n_tokens + t) * MOE__W, w + p * MOE__W);
    return sum;
}
/* The expert of a route: the last whose routes begin at or before it. */
static size_t moe__route_expert(const moe_routes *r, uint32_t route) {
    size_t lo = 0, hi = r->n_experts;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (r->begin[mid] <= route) lo = mid;
        else hi = mid;
    }
    return lo;
}

/* -- experts that are no networks, as in MoE++ [C]: zero, copy, constant: o = a_0 x + a_1 v, a = softmax(W x) -- */
typedef struct moe__constant { const float *w, *v; float *dw, *dv, a[2]; } moe__constant;
/* 1 with c filled for a constant expert; 0 for a copy, -1 for a zero. */
static int moe__special(const moe__pass *p, size_t e, size_t t, moe__constant *c) {
    const moe__job *j = &p->j;
    size_t d = j->dims->d, i = e - j->dims->F;
    float z[2];
    if (i < j->d->n_zero) return -1;
    if (i < j->d->n_zero + j->d->n_copy) return 0;
    i -= j->d->n_zero + j->d->n_copy;
    size_t w = j->dims->special + i * 2 * d, v = j->dims->special + j->dims->constants * 2 * d + i * d;
    c->w = p->params + w;
    c->v = p->params + v;
    c->dw = p->dparams ? p->dparams + w : NULL;
    c->dv = p->dparams ? p->dparams + v : NULL;
    for (int k = 0; k < 2; k++) z[k] = moe__token_dot(j, c->w + (size_t)k * d, t);
    j->kn->softmax(2, 1.0f, z, c->a);
    return 1;
}
static void moe__special_add(const moe__pass *p, size_t e, size_t t, float weight, float *y) {
    moe__constant c;
    int kind = moe__special(p, e, t, &c);
    if (kind == 0) moe__token_axpy(&p->j, weight, t, y);
    if (kind == 1) {
        moe__token_axpy(&p->j, weight * c.a[0], t, y);
        p->j.kn->axpy(p->j.dims->d, weight * c.a[1], c.v, y);
    }
}
/* What the two gates of a constant expert get: dz = a (da - <a, da>), da = weight * (<dy, x>, <dy, v>). */
static void moe__constant_dz(const moe__pass *p, const moe__constant *c, size_t t, float weight, float dz[2], float da[2]) {
    const float *dy = p->dy + t * p->j.dims->d;
    da[0] = moe__token_dot(&p->j, dy, t);
    da[1] = p->j.kn->dot(p->j.dims->d, dy, c->v);
    float mean = moe__fma(c->a[0], da[0], c->a[1] * da[1]);
    for (int k = 0; k < 2; k++) dz[k] = weight * c->a[k] * (da[k] - mean);
}
static void moe__special_dx(const moe__pass *p, size_t e, size_t t, float weight, float *dx) {
    moe__constant c;
    const moe__kernels *kn = p->j.kn;
    size_t d = p->j.dims->d;
    float dz[2], da[2];
    int kind = moe__special(p, e, t, &c);
    if (kind == 0) kn->axpy(d, weight, p->dy + t * d, dx);
    if (kind != 1) return;
    moe__constant_dz(p, &c, t, weight, dz, da);
    kn->axpy(d, weight * c.a[0], p->dy + t * d, dx);
    for (size_t k = 0; k < 2; k++) kn->axpy(d, dz[k], c.w + k * d, dx);
}
/* i: a special expert: gradients of its weights and parameters, its routes in order */
static void moe__task_special(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t e = j->dims->F + i, d = j->dims->d;
    (void)worker;
    for (uint32_t route = r->begin[e]; route < r->begin[e + 1]; route++) {
        moe__constant c;
        size_t t = r->token[route];
        float dz[2], da[2], dw = 0.0f;
        int kind = moe__special(p, e, t, &c);
        if (kind == 0) dw = moe__token_dot(j, p->dy + t * d, t);
        if (kind == 1) {
            moe__constant_dz(p, &c, t, p->weight[route], dz, da);
            dw = moe__fma(c.a[0], da[0], c.a[1] * da[1]);
            for (size_t k = 0; k < 2; k++) moe__token_axpy(j, dz[k], t, c.dw + k * d);
            j->kn->axpy(d, p->weight[route] * c.a[1], p->dy + t * d, c.dv);
        }
        if (p->dweight) p->dweight[route] = dw;
    }
}

/* -- soft slots: m->soft (T, N) -> mix, dispatch -- */
static size_t moe__sequences(const moe__job *j) { return j->t->n_tokens ? moe__ceil_div(j->t->n_tokens, j->m->now.sequence) : 0; }
/* Softmax over a sequence's tokens for each slot: columns of (T, N). */
static void moe__task_dispatch_weights(void *arg, size_t i, size_t worker) { /* i: a sequence */
    const moe__job *j = (const moe__job *)arg;
    size_t N = j->dims->N, t0 = i * j->m->now.sequence, t1 = moe__min(j->t->n_tokens, t0 + j->m->now.sequence);
    float *w = j->m->dispatch, top[MOE__W], sum[MOE__W];
    (void)worker;
    for (size_t n = 0; n < N; n += MOE__W) {
        size_t c = moe__min(MOE__W, N - n);
        for (size_t l = 0; l < c; l++) top[l] = j->m->soft[t0 * N + n + l], sum[l] = 0.0f;
        for (size_t t = t0; t < t1; t++)
            for (size_t l = 0; l < c; l++)
                if (j->m->soft[t * N + n + l] > top[l]) top[l] = j->m->soft[t * N + n + l];
        for (size_t t = t0; t < t1; t++) {
            for (size_t l = 0; l < c; l++) w[t * N + n + l] = (j->m->soft[t * N + n + l] - top[l]) * j->m->now.inv_t;
            j->kn->exp(c, w + t * N + n, w + t * N + n);
            for (size_t l = 0; l < c; l++) sum[l] += w[t * N + n + l];
        }
        for (size_t t = t0; t < t1; t++)
            for (size_t l = 0; l < c; l++) w[t * N + n + l] /= sum[l];
    }
}
/* Of a block of tokens: mix, and the tape's logits = log of the sum of exp over an expert's slots. */
static void moe__soft_weights(const moe__job *j, size_t t0, size_t t1) {
    size_t E = j->dims->E, N = j->dims->N, slots = N / E;
    float inv_t = j->m->now.inv_t;
    for (size_t t = t0; t < t1; t++) {
        const float *z = j->m->soft + t * N;
        float *work = j->m->mix + t * N;
        if (slots == 1) memcpy(j->t->logits + t * E, z, E * sizeof(float));
        else {
            for (size_t n = 0; n < N; n++) work[n] = z[n] * inv_t;
            for (size_t e = 0; e < E; e++) j->t->logits[t * E + e] = j->kn->lse(slots, work + e * slots) / inv_t;
        }
        j->kn->softmax(N, inv_t, z, work);
    }
}
static size_t moe__soft_row(const moe__job *j, size_t t, size_t n) { /* of slot n of token t's sequence */
    size_t slots = j->dims->N / j->dims->E;
    return (n / slots * moe__sequences(j) + t / j->m->now.sequence) * slots + n % slots;
}
/* i: a slot. to (panels of its group) = sum over each sequence's tokens of weight (T, N) times a row: of the tokens, or of dy. */
static void moe__soft_gather(const moe__pass *p, size_t i, const float *weight, const float *rows, float *to) {
    const moe__job *j = &p->j;
    size_t slots = j->dims->N / j->dims->E, count = moe__sequences(j), T = j->t->n_tokens, N = j->dims->N, d = j->dims->d;
    to += i / slots * count * slots * j->dims->dp * MOE__W;
    for (size_t s = 0; s < count; s++)
        for (size_t u = 0; u < j->dims->dp; u++) {
            float *out = to + (u * count * slots + s * slots + i % slots) * MOE__W;
            size_t c = rows ? moe__min(MOE__W, d - u * MOE__W) : MOE__W;
            memset(out, 0, MOE__W * sizeof(float));
            for (size_t t = s * j->m->now.sequence; t < moe__min(T, (s + 1) * j->m->now.sequence); t++)
                j->kn->axpy(c, weight[t * N + i], rows ? rows + t * d + u * MOE__W : j->m->xp + (u * T + t) * MOE__W, out);
        }
}
static void moe__task_soft_x(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    (void)worker;
    moe__soft_gather(p, i, p->j.m->dispatch, NULL, p->j.m->xg);
}
static void moe__task_soft_dy(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    (void)worker;
    moe__soft_gather(p, i, p->j.m->mix, p->dy, p->j.m->o);
}
/* dmix_tn = <dy_t, o_n>, before o is used for dy; ddispatch_tn = <x_t, dx_n>, after o holds dx of the slots */
static void moe__task_soft_dmix(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    size_t N = j->dims->N;
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++)
        for (size_t n = 0; n < N; n++)
            j->m->dmix[t * N + n] = j->kn->dot(j->dims->d, p->dy + t * j->dims->d, j->m->o + moe__soft_row(j, t, n) * j->dims->ldo);
}
static void moe__task_soft_ddispatch(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    size_t N = j->dims->N;
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++)
        for (size_t n = 0; n < N; n++)
            j->m->ddispatch[t * N + n] = moe__token_dot(j, j->m->o + moe__soft_row(j, t, n) * j->dims->ldo, t);
}
/* m->dsoft = the gradient by m->soft: softmax backward along rows (mix) and along columns (dispatch) */
static void moe__task_soft_back(void *arg, size_t i, size_t worker) { /* i: a sequence */
    const moe__job *j = (const moe__job *)arg;
    size_t N = j->dims->N, t0 = i * j->m->now.sequence, t1 = moe__min(j->t->n_tokens, t0 + j->m->now.sequence);
    float inv_t = j->m->now.inv_t, mean[MOE__W];
    (void)worker;
    for (size_t t = t0; t < t1; t++) {
        const float *c = j->m->mix + t * N, *dc = j->m->dmix + t * N;
        float along = j->kn->dot(N, c, dc);
        for (size_t n = 0; n < N; n++) j->m->dsoft[t * N + n] = inv_t * c[n] * (dc[n] - along);
    }
    for (size_t n = 0; n < N; n += MOE__W) {
        size_t c = moe__min(MOE__W, N - n);
        for (size_t l = 0; l < c; l++) mean[l] = 0.0f;
        for (size_t t = t0; t < t1; t++)
            for (size_t l = 0; l < c; l++) mean[l] = moe__fma(j->m->dispatch[t * N + n + l], j->m->ddispatch[t * N + n + l], mean[l]);
        for (size_t t = t0; t < t1; t++)
            for (size_t l = 0; l < c; l++) {
                size_t at = t * N + n + l;
                j->m->dsoft[at] = moe__fma(inv_t * j->m->dispatch[at], j->m->ddispatch[at] - mean[l], j->m->dsoft[at]);
            }
    }
}
/* What the auxiliary losses put into m->dlogits goes on to the slots: by each slot's share of its expert. */
static void moe__soft_losses_back(const moe__job *j) {
    size_t E = j->dims->E, N = j->dims->N, slots = N / E;
    for (size_t t = 0; t < j->t->n_tokens; t++)
        for (size_t e = 0; e < E; e++) {
            float sum = 0.0f, dz = j->m->dlogits[t * E + e];
            for (size_t n = e * slots; n < (e + 1) * slots; n++) sum += j->m->mix[t * N + n];
            for (size_t n = e * slots; n < (e + 1) * slots; n++)
                if (sum > 0.0f) j->m->dsoft[t * N + n] = moe__fma(dz, j->m->mix[t * N + n] / sum, j->m->dsoft[t * N + n]);
        }
}

/* -- merged parameters: W_s = sum_e p_e W_e, as in SMEAR [C]; dW_e = sum_s p_e dW_s, dp_e = <dW_s, W_e> -- */
#define MOE__MERGE_SPAN ((size_t)4096)
static void moe__task_merge(void *arg, size_t i, size_t worker) { /* i: a span of the parameters of a sequence */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t spans = moe__ceil_div(j->dims->expert, MOE__MERGE_SPAN), s = i / spans, at = i % spans * MOE__MERGE_SPAN;
    size_t n = moe__min(MOE__MERGE_SPAN, j->dims->expert - at), t = s * j->m->now.sequence;
    float *to = j->m->merged + s * j->dims->expert + at;
    (void)worker;
    memset(to, 0, n * sizeof(float));
    for (size_t k = 0; k < j->dims->S; k++) {
        uint32_t route = r->slot[t * j->dims->S + k];
        if (route != MOE_NONE) j->kn->axpy(n, r->weight[route], p->params + moe__route_expert(r, route) * j->dims->expert + at, to);
    }
}
static void moe__task_unmerge(void *arg, size_t e, size_t worker) { /* e: an expert; its routes are in the order of the sequences */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t n = j->dims->expert;
    float *to = p->dparams + e * n;
    (void)worker;
    if (p->fresh) memset(to, 0, n * sizeof(float));
    for (uint32_t route = r->begin[e]; route < r->begin[e + 1]; route++) {
        size_t t = r->token[route];
        const float *dw = j->m->dmerged + t / j->m->now.sequence * n;
        if (p->dweight) p->dweight[route] = 0.0f;
        if (t % j->m->now.sequence) continue; /* a sequence's weights are those of its first token */
        j->kn->axpy(n, r->weight[route], dw, to);
        if (p->dweight) p->dweight[route] = j->kn->dot(n, dw, p->params + e * n);
    }
}

/* -- robust weights: w = g r / sum g r, r the reliability; r is constant in the gradient [D] -- */
static void moe__task_robust(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t S = j->dims->S;
    unsigned char *scratch = j->m->robust + i * j->m->robust_bytes;
    const float **output = (const float **)(void *)scratch;
    float *g = (float *)(void *)(scratch + S * sizeof *output), *out = g + S, *rel = out + S;
    size_t used = (size_t)((unsigned char *)(rel + S) - scratch);
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        size_t n = 0;
        float sum = 0.0f;
        for (size_t k = 0; k < S; k++) {
            uint32_t route = r->slot[t * S + k];
            if (route == MOE_NONE) continue;
            output[n] = j->m->o + route * j->dims->ldo;
            g[n++] = r->weight[route];
        }
        if (n) moe_robust_weights(n, j->dims->d, output, g, j->d->robust_tau, rel, out, scratch + used, j->m->robust_bytes - used);
        for (size_t k = 0; k < n; k++) sum = moe__fma(g[k], rel[k], sum);
        for (size_t k = 0, l = 0; k < S; k++) {
            uint32_t route = r->slot[t * S + k];
            j->m->reliability[t * S + k] = 0.0f;
            if (route == MOE_NONE) continue;
            j->m->robust_weight[route] = out[l];
            j->m->reliability[t * S + k] = sum > 0.0f ? rel[l] / sum : 0.0f;
            l++;
        }
    }
}
static void moe__task_robust_back(void *arg, size_t i, size_t worker) { /* dweight: of w -> of g */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t S = j->dims->S;
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        float mean = 0.0f;
        for (size_t k = 0; k < S; k++) {
            uint32_t route = r->slot[t * S + k];
            if (route != MOE_NONE) mean = moe__fma(p->weight[route], p->dweight[route], mean);
        }
        for (size_t k = 0; k < S; k++) {
            uint32_t route = r->slot[t * S + k];
            if (route != MOE_NONE) p->dweight[route] = j->m->reliability[t * S + k] * (p->dweight[route] - mean);
        }
    }
}

/* y_t = shared experts' outputs, then w o of its routes in slot order: one chain. For the backward pass w is inside. */
static void moe__combine_block(const moe__pass *p, size_t i, float *y, int backward) {
    const moe__job *j = &p->j;
    const moe__dims *d = j->dims;
    const moe_routes *r = &j->t->routes;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        float *row = y + t * d->d;
        for (size_t g = j->m->first_shared; g < j->m->n_groups; g++)
            j->kn->axpy(d->d, 1.0f, j->m->o + (j->m->group[g].begin + t) * d->ldo, row);
        if (j->d->combine == MOE_COMBINE_MERGE) j->kn->axpy(d->d, 1.0f, j->m->o + t * d->ldo, row);
        else if (j->d->combine == MOE_COMBINE_SOFT) {
            const float *w = (backward ? j->m->dispatch : j->m->mix) + t * d->N;
            for (size_t n = 0; n < d->N; n++) j->kn->axpy(d->d, w[n], j->m->o + moe__soft_row(j, t, n) * d->ldo, row);
        } else
            for (size_t s = 0; s < d->S; s++) {
                uint32_t route = r->slot[t * d->S + s];
                if (route == MOE_NONE) continue;
                if (!backward && p->weight[route] == 0.0f) continue; /* also where a robust weight shuts out a NaN */
                if (route < r->begin[d->F]) j->kn->axpy(d->d, backward ? 1.0f : p->weight[route], j->m->o + route * d->ldo, row);
                else if (backward) moe__special_dx(p, moe__route_expert(r, route), t, p->weight[route], row);
                else moe__special_add(p, moe__route_expert(r, route), t, p->weight[route], row);
            }
    }
}
static void moe__task_combine(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, p->j.t->n_tokens);
    (void)worker;
    memset(p->y + t0 * p->j.dims->d, 0, (t1 - t0) * p->j.dims->d * sizeof(float));
    moe__combine_block(p, i, p->y, 0);
}
static void moe__task_combine_dx(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    (void)worker;
    moe__combine_block(p, i, p->dx, 1);
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
            moe__fill_panel(p->dy, d->d, g->token ? g->token[s.r0 + r] : g->first + s.r0 + r, 1, u * MOE__W,
                            moe__min(MOE__W, d->d - u * MOE__W), to);
        if (!p->j.m->dout || !g->token) continue;
        to -= s.rows * MOE__W;
        for (size_t r = 0; r < s.rows; r++, to += MOE__W) {
            const float *more = p->j.m->dout + (g->begin + s.r0 + r) * d->ldo + u * MOE__W;
            for (size_t c = 0; c < MOE__W; c++) to[c] = moe__fma(g->weight[s.r0 + r], to[c], more[c]);
        }
    }
}

static void moe__task_down_back(void *arg, size_t i, size_t worker) { /* dh = dy W2^T; z -> dz, h -> w h */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__tape_memory *m = p->j.m;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    const float *w = g->params, *dy = m->o + (g->begin * d->dp + s.r0) * MOE__W;
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
            sum += p->j.kn->dot(d->d, s.group->params + d->b2, p->dy + p->j.t->routes.token[r] * d->d);
        p->dweight[r] = sum;
    }
}

/* dw (m, n panels) = or += a^T b over the rows of a group, for panels u0 .. u1 of a */
static void moe__outer(const moe__pass *p, size_t rows, const float *a, size_t a_panel, size_t m, const float *b, size_t n_panels,
                       float *dw, size_t u0, size_t u1, int fresh) {
    for (size_t t = 0; t < rows; t += MOE__TB)
        for (size_t n = 0; n < n_panels; n++)
            for (size_t u = u0; u < u1; u++)
                moe__product_outer(p->j.kn, moe__min(MOE__TB, rows - t), moe__min(MOE__W, m - u * MOE__W), a + u * a_panel + t * MOE__W,
                                   b + (n * rows + t) * MOE__W, MOE__W, dw + (n * m + u * MOE__W) * MOE__W, MOE__W, MOE__W,
                                   fresh && !t);
}
static void moe__task_dw2(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    moe__outer(p, g->rows, p->j.m->h + g->begin * d->hp * MOE__W, g->rows * MOE__W, d->f, p->j.m->o + g->begin * d->dp * MOE__W, d->dp,
               g->dparams + d->w2, s.u0, s.u1, g->fresh);
}
static void moe__task_dw1(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    moe__outer(p, g->rows, g->x, g->x_panel, d->d, p->j.m->z + g->begin * d->zp * MOE__W, d->zp, g->dparams, s.u0, s.u1, g->fresh);
}
static void moe__task_dx(void *arg, size_t i, size_t worker) { /* o = dz W1^T */
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    moe__share s = moe__phase_share(&p->j, &p->phase, i);
    const moe__group *g = s.group;
    (void)worker;
    moe__target o = {p->j.m->o + (g->begin + s.r0) * d->ldo + s.u0 * MOE__W, d->ldo, MOE__W, (s.u1 - s.u0) * MOE__W, moe__zeros, 0};
    moe__product_t(p->j.kn, s.rows, d->zp * MOE__W, p->j.m->z + (g->begin * d->zp + s.r0) * MOE__W, g->rows * MOE__W,
                   g->params, d->d, s.u0 * MOE__W, &o);
}
/* Gradients of an expert's biases; all of them where no token came and the gradient is fresh. */
static void moe__task_rest(void *arg, size_t g, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__dims *d = p->j.dims;
    const moe__group *gr = &p->j.m->group[g];
    float *dw = gr->dparams;
    (void)worker;
    if (gr->fresh && !gr->rows) memset(dw, 0, d->expert * sizeof(float));
    if (!d->bias) return;
    if (gr->fresh) {
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
    const moe__dims *d = p->j.dims;
    size_t n = moe__phase_plan(&p->j, &p->phase, units, most, cap), rows = p->j.m->shared_row + (d->G - d->F) * p->j.t->n_tokens;
    moe__run_work(&p->j.d->parallel, rows, d->expert, n, task, p);
}

/* Which rows each set of parameters computes: an expert's routes; with soft slots its slots of every sequence; merged, a
 * sequence's own parameters. The shared experts follow. */
static void moe__groups_begin(moe__pass *p) {
    const moe__job *j = &p->j;
    const moe__dims *d = j->dims;
    const moe_routes *r = &j->t->routes;
    moe__tape_memory *m = j->m;
    size_t T = j->t->n_tokens, count = moe__sequences(j), soft = d->N / d->E * count;
    int combine = (int)j->d->combine;
    p->weight = combine == MOE_COMBINE_ROBUST ? m->robust_weight : r->weight;
    m->first_shared = combine == MOE_COMBINE_MERGE ? count : d->F;
    m->shared_row = combine == MOE_COMBINE_MERGE ? T : combine == MOE_COMBINE_SOFT ? soft * d->E : r->n_routes;
    m->n_groups = m->first_shared + d->G - d->F;
    for (size_t g = 0; g < m->n_groups; g++) {
        moe__group *gr = &m->group[g];
        size_t shared = g - m->first_shared, expert = g < m->first_shared ? g : d->F + shared;
        memset(gr, 0, sizeof *gr);
        gr->params = p->params + expert * d->expert;
        gr->dparams = p->dparams ? p->dparams + expert * d->expert : NULL;
        gr->fresh = p->fresh;
        gr->rows = T;
        gr->x = m->xp;
        gr->x_panel = T * MOE__W;
        if (g >= m->first_shared) gr->begin = m->shared_row + shared * T;
        else if (combine == MOE_COMBINE_MERGE) {
            gr->begin = gr->first = g * m->now.sequence;
            gr->rows = moe__min(T - gr->first, m->now.sequence);
            gr->x = m->xp + gr->first * MOE__W;
            gr->params = m->merged + g * d->expert;
            gr->dparams = m->dmerged ? m->dmerged + g * d->expert : NULL;
            gr->fresh = 1;
        } else {
            gr->begin = combine == MOE_COMBINE_SOFT ? g * soft : r->begin[g];
            gr->rows = combine == MOE_COMBINE_SOFT ? soft : (size_t)(r->begin[g + 1] - r->begin[g]);
            gr->token = combine == MOE_COMBINE_SOFT ? NULL : r->token + gr->begin;
            gr->weight = combine == MOE_COMBINE_SOFT ? NULL : p->weight + gr->begin;
            gr->x = m->xg + gr->begin * d->dp * MOE__W;
            gr->x_panel = gr->rows * MOE__W;
        }
    }
}

static void moe__experts_forward(moe__pass *p) {
    const moe__job *j = &p->j;
    const moe__dims *d = j->dims;
    moe__groups_begin(p);
    if (j->d->combine == MOE_COMBINE_MERGE)
        moe_run(&j->d->parallel, moe__sequences(j) * moe__ceil_div(d->expert, MOE__MERGE_SPAN), moe__task_merge, p);
    else if (j->d->combine == MOE_COMBINE_SOFT) moe_run(&j->d->parallel, moe__sequences(j) ? d->N : 0, moe__task_soft_x, p);
    else moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_gather);
    moe__phase_run(p, d->hp, moe__block_rows(d->d), 0, moe__task_up);
    moe__phase_run(p, d->dp, moe__block_rows(moe__min(d->f, MOE__KG)), 0, moe__task_down);
    if (j->d->combine == MOE_COMBINE_ROBUST) moe__run_blocks(j, moe__task_robust, p);
    moe__run_blocks(j, moe__task_combine, p);
}

/* Soft slots read mixtures of dy; the shared experts' rows are the tokens. */
static void moe__gather_dy(moe__pass *p) {
    const moe__job *j = &p->j;
    if (j->d->combine != MOE_COMBINE_SOFT) {
        moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_gather_dy);
        return;
    }
    moe__run_blocks(j, moe__task_soft_dmix, p);
    moe_run(&j->d->parallel, moe__sequences(j) ? j->dims->N : 0, moe__task_soft_dy, p);
    for (size_t g = 0; g < j->m->first_shared; g++) j->m->group[g].rows = 0; /* not these */
    moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_gather_dy);
    moe__groups_begin(p);
}

/* The loss on the outputs of a block of tokens, while they are there: its gradient by them, and each weight's gradient. */
static void moe__task_output_loss(void *arg, size_t i, size_t worker) {
    const moe__pass *p = (const moe__pass *)arg;
    const moe__job *j = &p->j;
    const moe_routes *r = &j->t->routes;
    size_t S = j->dims->S, d = j->dims->d, T = j->t->n_tokens;
    float *out = j->m->outputs + i * 2 * S * d, *dout = out + S * d;
    (void)worker;
    j->m->block_loss[i] = 0.0;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, T); t++) {
        size_t n = 0;
        double value = 0.0;
        for (size_t s = 0; s < S; s++)
            if (r->slot[t * S + s] != MOE_NONE) memcpy(out + n++ * d, j->m->o + r->slot[t * S + s] * j->dims->ldo, d * sizeof(float));
        memset(dout, 0, n * d * sizeof(float));
        float coefficient = j->d->loss[MOE_LOSS_OUTPUT_ORTHOGONALITY] / (float)T;
        if (n) (void)moe_loss_output_orthogonality(1, n, d, out, coefficient, &value, dout);
        j->m->block_loss[i] += value / (double)T;
        n = 0;
        for (size_t s = 0; s < S; s++) {
            uint32_t route = r->slot[t * S + s];
            if (route == MOE_NONE) continue;
            memset(j->m->dout + route * j->dims->ldo, 0, j->dims->ldo * sizeof(float));
            memcpy(j->m->dout + route * j->dims->ldo, dout + n * d, d * sizeof(float));
            if (p->dweight) p->dweight[route] = j->kn->dot(d, p->dy + t * d, out + n * d);
            n++;
        }
    }
}

static void moe__experts_backward(moe__pass *p) {
    const moe__job *j = &p->j;
    const moe__dims *d = j->dims;
    int soft = j->d->combine == MOE_COMBINE_SOFT, any_fresh = p->fresh || j->d->combine == MOE_COMBINE_MERGE;
    moe__groups_begin(p);
    if (j->m->dout) { /* the weights go into dy when it is gathered, with the outputs' own gradient; then they are 1 */
        moe__run_blocks(j, moe__task_output_loss, p);
        j->m->output_loss = 0.0;
        for (size_t i = 0; i < moe__ceil_div(j->t->n_tokens, MOE__TOKENS); i++) j->m->output_loss += j->m->block_loss[i];
    }
    moe__gather_dy(p);
    for (size_t g = 0; g < j->m->n_groups && j->m->dout; g++) j->m->group[g].weight = NULL;
    moe__phase_run(p, d->hp, moe__block_rows(d->d), 0, moe__task_down_back);
    if (p->dweight && !j->m->dout) moe__phase_run(p, 1, MOE__TOKENS, 0, moe__task_dweight);
    if (any_fresh || d->bias) moe__run_work(&j->d->parallel, j->m->n_groups, d->expert, j->m->n_groups, moe__task_rest, p);
    moe__phase_run(p, d->hp, SIZE_MAX, 8, moe__task_dw2);
    moe__phase_run(p, d->dp, SIZE_MAX, 8, moe__task_dw1);
    if (p->fresh) memset(p->dparams + d->special, 0, (d->experts - d->special) * sizeof(float));
    if (d->E > d->F) moe_run(&j->d->parallel, d->E - d->F, moe__task_special, p);
    if (j->d->combine == MOE_COMBINE_MERGE) moe_run(&j->d->parallel, d->F, moe__task_unmerge, p);
    if (j->d->combine == MOE_COMBINE_ROBUST && p->dweight) moe__run_blocks(j, moe__task_robust_back, p);
    if (!p->dx && !soft) return;
    moe__phase_run(p, d->dp, moe__block_rows(moe__min(d->zp * MOE__W, MOE__KG)), 0, moe__task_dx);
    if (soft) moe__run_blocks(j, moe__task_soft_ddispatch, p);
    if (p->dx) moe__run_blocks(j, moe__task_combine_dx, p);
}

/* -- the discrete branch of VQMoE [C]: y = g_0 y + g_1 LN(f_e(LN(C_j))), j = the nearest code, e = j mod E, g = softmax(x G).
 * The gradient by the code goes straight on to x [D]; the codes learn from the codebook loss alone. -- */
typedef struct moe__branch {
    moe_tape *tape;      /* the experts' pass over the codes */
    int32_t *code, *expert; /* (T) */
    float *codes, *inv_code, *square; /* (codes, d) LN of the codes, 1 / their deviation, their squared length (codes) */
    float *u, *y, *v, *inv_v, *g; /* (T, d) inputs, the other branch's output, LN of this one's; (T); (T, 2) */
    float *x, *dy, *dv;  /* (T, d) */
    int ready;           /* code and x are of the tape's tokens */
} moe__branch;

/* ==== losses ==================================================================================
 * Most losses have a slope c_te = dL/dp_te (times T) on the softmax p of a token, so that by its logits
 * dL/dz_te = p_te (c_te - sum_j c_tj p_tj) / (T temperature) [D]. A loss is then a way to fill c. */
#define MOE__MAX_EXPERTS ((size_t)1 << 20)
#define MOE__SLOPES 256 /* columns that are filled at a time */

typedef struct moe__slope moe__slope;
struct moe__slope {
    void (*fill)(const moe__slope *l, const float *p, size_t e, size_t n, float *c); /* of experts e .. e + n - 1; p: of this token */
    int each;    /* c differs from token to token */
    float scale; /* c is multiplied by it last */
    double a, b;
    const double *mean;
    const uint64_t *load;
    size_t group; /* experts of a device */
};

static float moe__positive(double x) { return x > (double)FLT_MIN ? (float)x : FLT_MIN; } /* what a logarithm can take */

/* d_logits (may be NULL) += coefficient times the gradient. Returns mean_t sum_e c_te p_te: the value of a loss that is
 * linear in p. The inner products run in blocks of the panel's width, whatever MOE__SLOPES is. */
static double moe__through_softmax(const moe__slope *l, size_t T, size_t E, float temperature, const float *prob, float coefficient,
                                   float *d_logits) {
    const moe__kernels *kn = moe__k();
    float c[MOE__SLOPES], scaled[MOE__SLOPES], s = coefficient / (temperature * (float)T);
    int whole = E <= MOE__SLOPES;
    double sum = 0.0;
    for (size_t t = 0; t < T; t++) {
        const float *p = prob + t * E;
        float mean = 0.0f;
        for (size_t e = 0; e < E; e += MOE__SLOPES) {
            size_t n = moe__min(MOE__SLOPES, E - e);
            if (!whole || l->each || !t) {
                l->fill(l, p + e, e, n, c);
                for (size_t i = 0; i < n; i++) scaled[i] = c[i] * l->scale;
            }
            for (size_t i = 0; i < n; i += MOE__W) mean += kn->dot(moe__min(MOE__W, n - i), scaled + i, p + e + i);
        }
        sum += (double)mean;
        for (size_t e = 0; d_logits && e < E; e += MOE__SLOPES) {
            size_t n = moe__min(MOE__SLOPES, E - e);
            if (!whole) l->fill(l, p + e, e, n, c);
            kn->slope(n, s, l->scale, mean, c, p + e, d_logits + t * E + e);
        }
    }
    return sum / (double)T;
}

static moe_status moe__loss_shape(size_t T, size_t E, float coefficient, double *value) {
    size_t n;
    if (!E || E > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    if (!moe__mul(T, E, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    return MOE_OK;
}
static moe_status moe__loss_prob(size_t T, size_t E, float temperature, const float *prob, float coefficient, double *value) {
    if (E && E <= MOE__MAX_EXPERTS && !moe__temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    moe_status s = moe__loss_shape(T, E, coefficient, value);
    if (s || !T) return s;
    if (!prob) return MOE_E_NULL_PROB;
    return moe__all_finite(T * E, prob) ? MOE_OK : MOE_E_NAN_PROB;
}
static moe_status moe__loss_scores(size_t T, size_t E, const float *scores, float coefficient, double *value) {
    moe_status s = moe__loss_shape(T, E, coefficient, value);
    if (s || !T) return s;
    if (!scores) return MOE_E_NULL_SCORES;
    return moe__all_finite(T * E, scores) ? MOE_OK : MOE_E_NAN_SCORES;
}
static moe_status moe__loss_mean(size_t E, const double *mean) {
    if (!mean) return MOE_E_NULL_MEAN;
    for (size_t e = 0; e < E; e++)
        if (!(mean[e] >= 0.0 && mean[e] <= DBL_MAX)) return MOE_E_NAN_MEAN;
    return MOE_OK;
}
static moe_status moe__loss_index(size_t n, size_t most, const int32_t *index, moe_status bad) {
    if (!index) return MOE_E_NULL_INDEX;
    for (size_t i = 0; i < n; i++)
        if (index[i] >= 0 && (size_t)index[i] >= most) return bad;
    return MOE_OK;
}

/* -- statistics -- */
MOE_API moe_status moe_mean_scores(size_t n_tokens, size_t n_experts, const float *scores, double *mean) {
    if (!mean) return MOE_E_NULL_MEAN;
    moe_status s = moe__loss_scores(n_tokens, n_experts, scores, 0.0f, NULL);
    if (s) return s;
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e++) mean[e] += (double)scores[t * n_experts + e];
    for (size_t e = 0; n_tokens && e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}

static moe_status moe__loss_choices(size_t T, size_t k, size_t E, const int32_t *index) {
    size_t n;
    if (!k || k > E) return E ? MOE_E_TOP_K : MOE_E_N_EXPERTS;
    if (E > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!moe__mul(T, k, &n)) return MOE_E_OVERFLOW;
    return T ? moe__loss_index(n, E, index, MOE_E_INDEX) : MOE_OK;
}

MOE_API moe_status moe_mean_weights(size_t n_tokens, size_t k, size_t n_experts, const int32_t *index, const float *weight, double *mean) {
    if (!mean) return MOE_E_NULL_MEAN;
    moe_status s = moe__loss_choices(n_tokens, k, n_experts, index);
    if (s) return s;
    if (n_tokens && !weight) return MOE_E_NULL_WEIGHT;
    if (!moe__all_finite(n_tokens * k, weight)) return MOE_E_NAN_WEIGHT;
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t i = 0; i < n_tokens * k; i++)
        if (index[i] >= 0) mean[index[i]] += (double)weight[i];
    for (size_t e = 0; n_tokens && e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}

MOE_API moe_status moe_sequence_load(size_t n_tokens, size_t n_experts, size_t k, size_t sequence, const int32_t *index, uint64_t *load) {
    size_t n;
    moe_status s = moe__loss_choices(n_tokens, k, n_experts, index);
    if (s) return s;
    if (!sequence) return MOE_E_SEQUENCE;
    if (!moe__mul(moe__ceil_div(n_tokens, sequence), n_experts, &n)) return MOE_E_OVERFLOW;
    if (n && !load) return MOE_E_NULL_LOAD;
    for (size_t i = 0; i < n; i++) load[i] = 0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < k; i++)
            if (index[t * k + i] >= 0) load[t / sequence * n_experts + (size_t)index[t * k + i]]++;
    return MOE_OK;
}

static moe_status moe__devices(size_t E, size_t D) {
    if (!E || E > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    return !D || E % D ? MOE_E_N_DEVICES : MOE_OK;
}
MOE_API moe_status moe_device_load(size_t n_experts, size_t n_devices, const uint64_t *load, uint64_t *out) {
    moe_status s = moe__devices(n_experts, n_devices);
    if (s) return s;
    if (!load) return MOE_E_NULL_LOAD;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t d = 0; d < n_devices; d++) out[d] = 0;
    for (size_t e = 0; e < n_experts; e++) out[e / (n_experts / n_devices)] += load[e];
    return MOE_OK;
}
MOE_API moe_status moe_device_tokens(size_t n_tokens, size_t n_experts, size_t n_devices, size_t k, const int32_t *index, uint64_t *out) {
    moe_status s = moe__devices(n_experts, n_devices);
    if (!s) s = moe__loss_choices(n_tokens, k, n_experts, index);
    if (s) return s;
    if (!out) return MOE_E_NULL_OUT;
    size_t group = n_experts / n_devices;
    for (size_t d = 0; d < n_devices; d++) out[d] = 0;
    for (size_t t = 0; t < n_tokens; t++, index += k)
        for (size_t i = 0; i < k; i++) {
            size_t j = 0;
            if (index[i] < 0) continue;
            while (j < i && (index[j] < 0 || (size_t)index[j] / group != (size_t)index[i] / group)) j++;
            if (j == i) out[(size_t)index[i] / group]++;
        }
    return MOE_OK;
}
MOE_API moe_status moe_device_prob(size_t n_experts, size_t n_devices, const double *mean, double *out) {
    moe_status s = moe__devices(n_experts, n_devices);
    if (!s) s = moe__loss_mean(n_experts, mean);
    if (s) return s;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t d = 0; d < n_devices; d++) out[d] = 0.0;
    for (size_t e = 0; e < n_experts; e++) out[e / (n_experts / n_devices)] += mean[e];
    return MOE_OK;
}

MOE_API moe_status moe_teacher_best(size_t n_tokens, size_t n_experts, const float *scores, int32_t *teacher) {
    moe_status s = moe__loss_scores(n_tokens, n_experts, scores, 0.0f, NULL);
    if (s || !n_tokens) return s;
    if (!teacher) return MOE_E_NULL_TEACHER;
    for (size_t t = 0; t < n_tokens; t++, scores += n_experts) {
        teacher[t] = 0;
        for (size_t e = 1; e < n_experts; e++)
            if (scores[e] < scores[teacher[t]]) teacher[t] = (int32_t)e;
    }
    return MOE_OK;
}

/* -- the load -- */
static void moe__fill_load(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = (float)l->load[(e + i) / l->group];
}

/* sum_e f_e P_e times the number of groups, f_e = load / sum of loads of e's group, P = mean p */
static moe_status moe__loss_even(size_t T, size_t E, size_t n_groups, float temperature, const float *prob, const uint64_t *load,
                                 double scale, float coefficient, double *value, float *d_logits) {
    moe__slope l;
    memset(&l, 0, sizeof l);
    l.fill = moe__fill_load;
    l.load = load;
    l.group = E / n_groups;
    l.scale = (float)scale;
    if (d_logits) moe__through_softmax(&l, T, E, temperature, prob, coefficient, d_logits);
    if (!value) return MOE_OK;
    double sum = 0.0;
    for (size_t e = 0; e < E; e += MOE__W) {
        double P[MOE__W] = {0};
        size_t n = moe__min(MOE__W, E - e);
        for (size_t t = 0; t < T; t++)
            for (size_t i = 0; i < n; i++) P[i] += (double)prob[t * E + e + i];
        for (size_t i = 0; i < n; i++) sum += P[i] * (double)load[(e + i) / l.group];
    }
    *value = sum * scale / (double)T;
    return MOE_OK;
}
static uint64_t moe__total(size_t n, const uint64_t *load) {
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) total += load[i];
    return total;
}

/* As in GShard and Switch [C]; DeepSeekMoE's expert level is the same [K]; with loads of the global batch after Qwen [C]. */
MOE_API moe_status moe_loss_switch(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                   const uint64_t *load, float coefficient, double *value, float *d_logits) {
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (s || !n_tokens) return s;
    if (!load) return MOE_E_NULL_LOAD;
    uint64_t total = moe__total(n_experts, load);
    return !total ? MOE_OK : moe__loss_even(n_tokens, n_experts, n_experts, temperature, prob, load,
                                            (double)n_experts / (double)total, coefficient, value, d_logits);
}

/* sum_d F_d P_d, F = mean over a device's experts of E f_e, P_d = sum of their P_e: after DeepSeekMoE [K]. */
MOE_API moe_status moe_loss_device(size_t n_tokens, size_t n_experts, size_t n_devices, float temperature, const float *prob,
                                   const uint64_t *device_load, float coefficient, double *value, float *d_logits) {
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (!s) s = moe__devices(n_experts, n_devices);
    if (s || !n_tokens) return s;
    if (!device_load) return MOE_E_NULL_LOAD;
    uint64_t total = moe__total(n_devices, device_load);
    return !total ? MOE_OK : moe__loss_even(n_tokens, n_experts, n_devices, temperature, prob, device_load,
                                            (double)n_devices / (double)total, coefficient, value, d_logits);
}

/* sum_d F_d P_d, F_d = D / (M T) times the tokens sent to d: after DeepSeek-V2 [K]. */
MOE_API moe_status moe_loss_communication(size_t n_tokens, size_t n_experts, size_t n_devices, size_t device_limit, float temperature,
                                          const float *prob, const uint64_t *device_tokens, uint64_t counted, float coefficient,
                                          double *value, float *d_logits) {
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (!s) s = moe__devices(n_experts, n_devices);
    if (!s && (!device_limit || device_limit > n_devices)) s = MOE_E_DEVICE_LIMIT;
    if (s || !n_tokens) return s;
    if (!device_tokens) return MOE_E_NULL_LOAD;
    return !counted ? MOE_OK : moe__loss_even(n_tokens, n_experts, n_devices, temperature, prob, device_tokens,
                                              (double)n_devices / ((double)device_limit * (double)counted), coefficient, value, d_logits);
}

/* The switch loss of each sequence on q = s / sum s, averaged: after DeepSeek-V3 [K]. dL/ds = (c - <c, q>) / sum s [D]. */
MOE_API moe_status moe_loss_sequence(size_t n_tokens, size_t n_experts, size_t sequence, const float *scores, const uint64_t *load,
                                     float coefficient, double *value, float *d_scores) {
    moe_status s = moe__loss_scores(n_tokens, n_experts, scores, coefficient, value);
    if (s) return s;
    if (!sequence) return MOE_E_SEQUENCE;
    if (!n_tokens) return MOE_OK;
    if (!load) return MOE_E_NULL_LOAD;
    for (size_t i = 0; i < n_tokens * n_experts; i++)
        if (scores[i] < 0.0f) return MOE_E_NAN_SCORES;
    const moe__kernels *kn = moe__k();
    size_t n_sequences = moe__ceil_div(n_tokens, sequence);
    double sum = 0.0;
    float c[MOE__W], one[MOE__W];
    for (size_t i = 0; i < MOE__W; i++) one[i] = 1.0f;
    for (size_t q = 0; q < n_sequences; q++, load += n_experts) {
        size_t begin = q * sequence, length = moe__min(sequence, n_tokens - begin);
        uint64_t total = moe__total(n_experts, load);
        float scale = total ? (float)((double)n_experts / (double)total) : 0.0f;
        double share = 1.0 / ((double)n_sequences * (double)length);
        for (size_t t = begin; total && t < begin + length; t++) {
            const float *p = scores + t * n_experts;
            float mean = 0.0f, all = 0.0f;
            for (size_t e = 0; e < n_experts; e += MOE__W) {
                size_t n = moe__min(MOE__W, n_experts - e);
                for (size_t i = 0; i < n; i++) c[i] = (float)load[e + i] * scale;
                mean += kn->dot(n, c, p + e);
                all += kn->dot(n, one, p + e);
            }
            if (!(all >= FLT_MIN) || !moe__finite(all)) continue; /* a token without scores has no shares */
            mean /= all;
            sum += share * (double)mean;
            float step = (float)((double)coefficient * share / (double)all);
            for (size_t e = 0; d_scores && e < n_experts; e += MOE__W) {
                size_t n = moe__min(MOE__W, n_experts - e);
                for (size_t i = 0; i < n; i++) c[i] = (float)load[e + i];
                kn->slope(n, step, scale, mean, c, one, d_scores + t * n_experts + e);
            }
        }
    }
    if (value) *value = sum;
    return MOE_OK;
}

static void moe__fill_locality(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = moe__positive(l->mean[(e + i) / l->group]);
    moe__k()->log(n, c, c);
    for (size_t i = 0; i < n; i++) c[i] -= (float)((e + i) / l->group == (size_t)l->load[0] ? l->a : l->b);
}
/* KL(Q || local), Q_d = a device's share of the probability: after LocMoE [K]; softmax mass and smoothing [D]. */
MOE_API moe_status moe_loss_locality(size_t n_tokens, size_t n_experts, size_t n_devices, size_t home, float smoothing, float temperature,
                                     const float *prob, const double *device_prob, float coefficient, double *value, float *d_logits) {
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (!s) s = moe__devices(n_experts, n_devices);
    if (!s && home >= n_devices) s = MOE_E_HOME;
    if (!s && !(smoothing >= FLT_MIN && smoothing < 1.0f)) s = MOE_E_SMOOTHING;
    if (s || !n_tokens) return s;
    s = moe__loss_mean(n_devices, device_prob);
    if (s) return s;
    float local[2];
    local[0] = n_devices > 1 ? 1.0f - smoothing : 1.0f;
    local[1] = moe__positive((double)smoothing / (double)moe__max(1, n_devices - 1));
    double sum = 0.0;
    for (size_t d = 0; value && d < n_devices; d++)
        if (device_prob[d] > 0.0) sum += device_prob[d] * log(device_prob[d] / (double)local[d != home]);
    if (value) *value = sum;
    if (!d_logits) return MOE_OK;
    uint64_t at = home;
    moe__slope l;
    memset(&l, 0, sizeof l);
    l.fill = moe__fill_locality;
    l.scale = 1.0f;
    l.mean = device_prob;
    l.load = &at;
    l.group = n_experts / n_devices;
    moe__k()->log(2, local, local);
    l.a = (double)local[0];
    l.b = (double)local[1];
    moe__through_softmax(&l, n_tokens, n_experts, temperature, prob, coefficient, d_logits);
    return MOE_OK;
}

/* -- the mean probabilities P: the value f(P), and c = df/dP, up to a constant that the softmax does not see -- */
typedef struct moe__mean_row {
    double (*value)(size_t E, moe__slope *l); /* also sets l->a, l->b */
    void (*fill)(const moe__slope *l, const float *p, size_t e, size_t n, float *c);
} moe__mean_row;

static void moe__fill_linear(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = (float)(l->a * (l->mean[e + i] - l->b));
}
/* CV^2 = Var / Mean^2. With a sum that is constant its slope is a (P - b) [D]; *rest is what must be added where it is not. */
static double moe__cv2(size_t E, const double *mean, double *a, double *b, double *rest) {
    double mu = 0.0, square = 0.0;
    for (size_t e = 0; e < E; e++) mu += mean[e];
    mu /= (double)E;
    *a = *rest = 0.0;
    *b = mu;
    if (!(mu > (double)FLT_MIN)) return 0.0;
    for (size_t e = 0; e < E; e++) square += (mean[e] - mu) / mu * ((mean[e] - mu) / mu);
    square /= (double)E;
    *a = 2.0 / ((double)E * mu * mu);
    *rest = -2.0 * square / ((double)E * mu);
    return square;
}
static double moe__importance(size_t E, moe__slope *l) {
    double rest;
    return moe__cv2(E, l->mean, &l->a, &l->b, &rest);
}
static double moe__l2_uniform(size_t E, moe__slope *l) {
    double sum = 0.0;
    l->a = 2.0;
    l->b = 1.0 / (double)E;
    for (size_t e = 0; e < E; e++) sum += (l->mean[e] - l->b) * (l->mean[e] - l->b);
    return sum;
}
static double moe__kl_uniform(size_t E, moe__slope *l) {
    double sum = log((double)E);
    for (size_t e = 0; e < E; e++)
        if (l->mean[e] > 0.0) sum += l->mean[e] * log(l->mean[e]);
    return sum;
}
static void moe__fill_kl_uniform(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = moe__positive(l->mean[e + i]);
    moe__k()->log(n, c, c);
}
static double moe__kl_reverse(size_t E, moe__slope *l) {
    double sum = 0.0;
    l->a = -1.0 / (double)E;
    for (size_t e = 0; e < E; e++) sum -= log((double)moe__positive(l->mean[e]));
    return sum / (double)E - log((double)E);
}
static void moe__fill_kl_reverse(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = (float)(l->a / (double)moe__positive(l->mean[e + i]));
}

static moe_status moe__loss_of_mean(double (*f)(size_t E, moe__slope *l), moe__slope *l, size_t T, size_t E, float temperature,
                                    const float *prob, const double *mean, float coefficient, double *value, float *d_logits) {
    moe_status s = moe__loss_prob(T, E, temperature, prob, coefficient, value);
    if (s || !T) return s;
    s = moe__loss_mean(E, mean);
    if (s) return s;
    l->mean = mean;
    double v = f(E, l);
    if (value) *value = v;
    if (d_logits) moe__through_softmax(l, T, E, temperature, prob, coefficient, d_logits);
    return MOE_OK;
}
#define MOE__MEAN_LOSS(name, fill_)                                                                                        \
    MOE_API moe_status moe_loss_##name(size_t n_tokens, size_t n_experts, float temperature, const float *prob,             \
                                       const double *mean, float coefficient, double *value, float *d_logits) {            \
        moe__slope l;                                                                                                      \
        memset(&l, 0, sizeof l);                                                                                           \
        l.fill = fill_;                                                                                                    \
        l.scale = 1.0f;                                                                                                    \
        return moe__loss_of_mean(moe__##name, &l, n_tokens, n_experts, temperature, prob, mean, coefficient, value, d_logits); \
    }
MOE__MEAN_LOSS(importance, moe__fill_linear)       /* after V-MoE [K] */
MOE__MEAN_LOSS(kl_uniform, moe__fill_kl_uniform)   /* after the ecology paper [S] */
MOE__MEAN_LOSS(kl_reverse, moe__fill_kl_reverse)   /* [D] */
MOE__MEAN_LOSS(l2_uniform, moe__fill_linear)       /* [C] */
#undef MOE__MEAN_LOSS

/* -- each token alone -- */
static void moe__fill_entropy(const moe__slope *l, const float *p, size_t e, size_t n, float *c) { /* ln p */
    (void)l;
    (void)e;
    for (size_t i = 0; i < n; i++) c[i] = p[i] > FLT_MIN ? p[i] : FLT_MIN;
    moe__k()->log(n, c, c);
}
static void moe__fill_mutual(const moe__slope *l, const float *p, size_t e, size_t n, float *c) { /* ln P - ln p */
    float own[MOE__SLOPES];
    moe__fill_kl_uniform(l, p, e, n, c);
    moe__fill_entropy(l, p, e, n, own);
    for (size_t i = 0; i < n; i++) c[i] -= own[i];
}
static void moe__fill_variance(const moe__slope *l, const float *p, size_t e, size_t n, float *c) {
    for (size_t i = 0; i < n; i++) c[i] = (float)(-2.0 * ((double)p[i] - l->mean[e + i]));
}

/* The sign is a choice [D]: dS_t/dz = -p (ln p + S_t). */
static moe_status moe__loss_entropy(float scale, size_t T, size_t E, float temperature, const float *prob, float coefficient,
                                    double *value, float *d_logits) {
    moe__slope l;
    moe_status s = moe__loss_prob(T, E, temperature, prob, coefficient, value);
    if (s || !T) return s;
    memset(&l, 0, sizeof l);
    l.fill = moe__fill_entropy;
    l.each = 1;
    l.scale = scale;
    double v = moe__through_softmax(&l, T, E, temperature, prob, coefficient, d_logits);
    if (value) *value = v;
    return MOE_OK;
}
MOE_API moe_status moe_loss_entropy(size_t n_tokens, size_t n_experts, float temperature, const float *prob, float coefficient,
                                    double *value, float *d_logits) {
    return moe__loss_entropy(1.0f, n_tokens, n_experts, temperature, prob, coefficient, value, d_logits);
}
MOE_API moe_status moe_loss_certainty(size_t n_tokens, size_t n_experts, float temperature, const float *prob, float coefficient,
                                      double *value, float *d_logits) {
    return moe__loss_entropy(-1.0f, n_tokens, n_experts, temperature, prob, coefficient, value, d_logits);
}

/* As in Mod-Squad and ModuleFormer [C], without their tasks. */
MOE_API moe_status moe_loss_mutual_information(size_t n_tokens, size_t n_experts, float temperature, const float *prob,
                                               const double *mean, float coefficient, double *value, float *d_logits) {
    moe__slope l;
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (s || !n_tokens) return s;
    s = moe__loss_mean(n_experts, mean);
    if (s) return s;
    memset(&l, 0, sizeof l);
    l.fill = moe__fill_mutual;
    l.each = 1;
    l.scale = 1.0f;
    l.mean = mean;
    double v = moe__through_softmax(&l, n_tokens, n_experts, temperature, prob, coefficient, d_logits);
    if (value) *value = v;
    return MOE_OK;
}

/* After the ecology paper [S], which does not say who teaches. */
MOE_API moe_status moe_loss_oracle(size_t n_tokens, size_t n_experts, float temperature, const float *prob, const int32_t *teacher,
                                   float coefficient, double *value, float *d_logits) {
    moe_status s = moe__loss_prob(n_tokens, n_experts, temperature, prob, coefficient, value);
    if (s || !n_tokens) return s;
    if (!teacher) return MOE_E_NULL_TEACHER;
    s = moe__loss_index(n_tokens, n_experts, teacher, MOE_E_TEACHER);
    if (s) return s;
    const moe__kernels *kn = moe__k();
    size_t taught = 0;
    double sum = 0.0;
    for (size_t t = 0; t < n_tokens; t++) taught += teacher[t] >= 0;
    if (!taught) return MOE_OK;
    float step = coefficient / (temperature * (float)taught);
    for (size_t t = 0; t < n_tokens; t++) {
        if (teacher[t] < 0) continue;
        size_t at = t * n_experts + (size_t)teacher[t];
        sum -= log((double)moe__positive((double)prob[at]));
        if (!d_logits) continue;
        kn->axpy(n_experts, step, prob + t * n_experts, d_logits + t * n_experts);
        d_logits[at] -= step;
    }
    if (value) *value = sum / (double)taught;
    return MOE_OK;
}

/* mean_t (logsumexp z_t)^2, as in ST-MoE [C]. */
MOE_API moe_status moe_loss_z(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                              double *value, float *d_logits) {
    moe_status s = moe__loss_shape(n_tokens, n_experts, coefficient, value);
    if (s || !n_tokens) return s;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!moe__all_finite(n_tokens * n_experts, logits)) return MOE_E_NAN_LOGITS;
    const moe__kernels *kn = moe__k();
    double sum = 0.0;
    float step = 2.0f * coefficient / (float)n_tokens;
    for (size_t t = 0; t < n_tokens; t++) {
        const float *z = logits + t * n_experts;
        float lse = kn->lse(n_experts, z);
        sum += (double)lse * (double)lse;
        if (!d_logits) continue;
        for (size_t e = 0; e < n_experts; e += MOE__SLOPES) { /* p = exp(z - lse) */
            float p[MOE__SLOPES];
            size_t n = moe__min(MOE__SLOPES, n_experts - e);
            for (size_t i = 0; i < n; i++) p[i] = z[e + i] - lse;
            kn->exp(n, p, p);
            kn->axpy(n, step * lse, p, d_logits + t * n_experts + e);
        }
    }
    if (value) *value = sum / (double)n_tokens;
    return MOE_OK;
}

/* -- what stands on other things than the softmax -- */
/* -(1/T) sum_te (s_te - mean_e)^2, after 2505.22323 [K]: a sum over the experts, a mean over the tokens [D]. */
MOE_API moe_status moe_loss_variance(size_t n_tokens, size_t n_experts, const float *scores, const double *mean, float coefficient,
                                     double *value, float *d_scores) {
    moe_status s = moe__loss_scores(n_tokens, n_experts, scores, coefficient, value);
    if (s || !n_tokens) return s;
    if (!mean) return MOE_E_NULL_MEAN;
    double sum = 0.0, step = -2.0 * (double)coefficient / (double)n_tokens;
    for (size_t e = 0; e < n_experts; e++)
        if (!(fabs(mean[e]) <= DBL_MAX)) return MOE_E_NAN_MEAN;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e++) {
            double off = (double)scores[t * n_experts + e] - mean[e];
            sum -= off * off;
            if (d_scores) d_scores[t * n_experts + e] += (float)(step * off);
        }
    if (value) *value = sum / (double)n_tokens;
    return MOE_OK;
}

/* As in ReMoE [C]. */
MOE_API moe_status moe_loss_relu_l1(size_t n_tokens, size_t n_experts, size_t k, const float *scores, const uint64_t *load,
                                    uint64_t counted, float coefficient, double *value, float *d_scores) {
    moe_status s = moe__loss_scores(n_tokens, n_experts, scores, coefficient, value);
    if (!s && (!k || k > n_experts)) s = MOE_E_TOP_K;
    if (s || !n_tokens) return s;
    if (!load) return MOE_E_NULL_LOAD;
    if (!counted) return MOE_OK;
    double sum = 0.0, scale = (double)n_experts / ((double)k * (double)counted * (double)n_tokens);
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e++) {
            size_t i = t * n_experts + e;
            if (!(scores[i] > 0.0f)) continue;
            sum += (double)load[e] * (double)scores[i];
            if (d_scores) d_scores[i] += (float)((double)coefficient * scale * (double)load[e]);
        }
    if (value) *value = sum * scale;
    return MOE_OK;
}

/* As in Shazeer 2017 [K]. dL/dw does not depend on w but through the mean. */
MOE_API moe_status moe_loss_importance_selected(size_t n_tokens, size_t k, size_t n_experts, const int32_t *index, const double *mean,
                                                float coefficient, double *value, float *d_weight) {
    double a, b, rest;
    moe_status s = moe__loss_shape(n_tokens, n_experts, coefficient, value);
    if (!s) s = moe__loss_choices(n_tokens, k, n_experts, index);
    if (s || !n_tokens) return s;
    s = moe__loss_mean(n_experts, mean);
    if (s) return s;
    double v = moe__cv2(n_experts, mean, &a, &b, &rest), step = (double)coefficient / (double)n_tokens;
    if (value) *value = v;
    for (size_t i = 0; d_weight && i < n_tokens * k; i++)
        if (index[i] >= 0) d_weight[i] += (float)(step * (a * (mean[index[i]] - b) + rest));
    return MOE_OK;
}

/* The load loss of noisy top-k, as in Shazeer 2017 [C]: u = (z - threshold) / std, mean over the tokens of Phi(u). */
static moe_status moe__noise_check(size_t n, const float *logits, const float *std, const float *threshold) {
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!std || !threshold) return MOE_E_NULL_NOISE;
    if (!moe__all_finite(n, logits)) return MOE_E_NAN_LOGITS;
    for (size_t i = 0; i < n; i++)
        if (!(std[i] >= FLT_MIN) || !moe__finite(std[i]) || !moe__finite(threshold[i])) return MOE_E_NOISE_VALUE;
    return MOE_OK;
}
static void moe__noise_units(size_t n, const float *logits, const float *std, const float *threshold, float *u) {
    for (size_t i = 0; i < n; i++) {
        float x = logits[i] / std[i] - threshold[i] / std[i];
        u[i] = x > 40.0f ? 40.0f : x > -40.0f ? x : -40.0f; /* Phi is 0 or 1 there, and its slope 0 */
    }
}
MOE_API moe_status moe_mean_selection(size_t n_tokens, size_t n_experts, const float *logits, const float *std,
                                      const float *threshold, double *mean) {
    if (!mean) return MOE_E_NULL_MEAN;
    moe_status s = moe__loss_shape(n_tokens, n_experts, 0.0f, NULL);
    if (!s && n_tokens) s = moe__noise_check(n_tokens * n_experts, logits, std, threshold);
    if (s) return s;
    const moe__kernels *kn = moe__k();
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e += MOE__SLOPES) {
            float u[MOE__SLOPES];
            size_t n = moe__min(MOE__SLOPES, n_experts - e), at = t * n_experts + e;
            moe__noise_units(n, logits + at, std + at, threshold + at, u);
            for (size_t i = 0; i < n; i++) u[i] *= 0.707106781f; /* sqrt(1/2) */
            kn->erf(n, u, u);
            for (size_t i = 0; i < n; i++) mean[e + i] += 0.5 + 0.5 * (double)u[i];
        }
    for (size_t e = 0; n_tokens && e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}
MOE_API moe_status moe_loss_load(size_t n_tokens, size_t n_experts, const float *logits, const float *std, const float *threshold,
                                 const double *mean, float coefficient, double *value, float *d_logits, float *d_std,
                                 float *d_threshold) {
    double a, b, rest;
    moe_status s = moe__loss_shape(n_tokens, n_experts, coefficient, value);
    if (s || !n_tokens) return s;
    s = moe__noise_check(n_tokens * n_experts, logits, std, threshold);
    if (!s) s = moe__loss_mean(n_experts, mean);
    if (s) return s;
    const moe__kernels *kn = moe__k();
    double v = moe__cv2(n_experts, mean, &a, &b, &rest), step = (double)coefficient / (double)n_tokens;
    if (value) *value = v;
    if (!d_logits && !d_std && !d_threshold) return MOE_OK;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e += MOE__SLOPES) {
            float u[MOE__SLOPES], pdf[MOE__SLOPES];
            size_t n = moe__min(MOE__SLOPES, n_experts - e), at = t * n_experts + e;
            moe__noise_units(n, logits + at, std + at, threshold + at, u);
            for (size_t i = 0; i < n; i++) pdf[i] = -0.5f * u[i] * u[i];
            kn->exp(n, pdf, pdf);
            for (size_t i = 0; i < n; i++) {
                float c = (float)(step * (a * (mean[e + i] - b) + rest));
                float g = c * (pdf[i] * 0.398942280f / std[at + i]); /* 1 / sqrt(2 pi) */
                if (d_logits) d_logits[at + i] += g;
                if (d_threshold) d_threshold[at + i] -= g;
                if (d_std) d_std[at + i] = moe__fma(-g, u[i], d_std[at + i]);
            }
        }
    return MOE_OK;
}

/* -- pairs of columns: losses sum_ij h(G_ij), G = A^T A, of a matrix A (rows, cols), or of A with columns at unit length -- */
#define MOE__GRAM_ROWS 64
typedef struct moe__gram {
    void (*tile)(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum); /* (32, 32): g -> h'(g), *sum += h(g) */
    int unit;
} moe__gram;

/* 1 / length of n columns, 0 for a column of zeros */
static void moe__gram_inverse(const float *a, size_t rows, size_t cols, size_t j0, size_t n, float *inverse) {
    double square[MOE__W] = {0};
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < n; j++) square[j] += (double)a[r * cols + j0 + j] * (double)a[r * cols + j0 + j];
    for (size_t j = 0; j < n; j++) inverse[j] = square[j] > 0.0 ? (float)(1.0 / sqrt(square[j])) : 0.0f;
}
static void moe__gram_panel(const float *a, size_t cols, size_t r0, size_t rows, size_t j0, size_t n, const float *inverse, float *panel) {
    moe__fill_panel(a, cols, r0, rows, j0, n, panel);
    for (size_t r = 0; inverse && r < rows; r++)
        for (size_t j = 0; j < n; j++) panel[r * MOE__W + j] *= inverse[j];
}

/* Returns sum h; da (may be NULL) += scale times the gradient. With M = h'(G), symmetric: dA = 2 A M; at unit length
 * du_j = 2 sum_i M_ij u_i and da_j = (du_j - u_j <u_j, du_j>) / |a_j| [D]. */
static double moe__gram_loss(const moe__gram *l, size_t rows, size_t cols, const float *a, float scale, float *da) {
    const moe__kernels *kn = moe__k();
    MOE__ALIGN64 float pi[MOE__GRAM_ROWS * MOE__W], pj[MOE__GRAM_ROWS * MOE__W], g[MOE__W * MOE__W], cosine[MOE__W * MOE__W];
    float inverse_i[MOE__W], inverse_j[MOE__W], along[MOE__W];
    double sum = 0.0;
    for (size_t j0 = 0; j0 < cols; j0 += MOE__W) {
        size_t m = moe__min(MOE__W, cols - j0);
        if (l->unit) moe__gram_inverse(a, rows, cols, j0, m, inverse_j);
        memset(along, 0, sizeof along);
        for (size_t i0 = 0; i0 < cols; i0 += MOE__W) {
            size_t n = moe__min(MOE__W, cols - i0);
            if (l->unit) moe__gram_inverse(a, rows, cols, i0, n, inverse_i);
            memset(g, 0, sizeof g);
            for (size_t r = 0; r < rows; r += MOE__GRAM_ROWS) {
                size_t count = moe__min(MOE__GRAM_ROWS, rows - r);
                moe__gram_panel(a, cols, r, count, i0, n, l->unit ? inverse_i : NULL, pi);
                moe__gram_panel(a, cols, r, count, j0, m, l->unit ? inverse_j : NULL, pj);
                moe__product_outer(kn, count, n, pi, pj, MOE__W, g, MOE__W, MOE__W, !r);
            }
            memcpy(cosine, g, sizeof g);
            l->tile(i0, j0, n, m, g, &sum);
            if (!da) continue;
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j < m; j++) {
                    float w = 2.0f * scale * g[i * MOE__W + j];
                    if (l->unit) {
                        w *= inverse_j[j];
                        along[j] = moe__fma(w, cosine[i * MOE__W + j], along[j]);
                        w *= inverse_i[i];
                    }
                    g[i * MOE__W + j] = w;
                }
            for (size_t r = 0; r < rows; r += MOE__W) { /* da += A_i W: the rows of A_i as columns of a panel */
                size_t count = moe__min(MOE__W, rows - r);
                moe__fill_panel_t(kn, a, cols, i0, n, r, count, pi);
                moe__product_outer(kn, n, count, pi, g, MOE__W, da + r * cols + j0, cols, m, 0);
            }
        }
        for (size_t r = 0; da && l->unit && r < rows; r++)
            for (size_t j = 0; j < m; j++) {
                size_t at = r * cols + j0 + j;
                da[at] = moe__fma(-along[j] * inverse_j[j], a[at], da[at]);
            }
    }
    return sum;
}

static void moe__tile_abs(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum) { /* abs(g - [i = j]) */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < m; j++) {
            float *x = g + i * MOE__W + j, off = *x - (i0 + i == j0 + j ? 1.0f : 0.0f);
            *sum += fabs((double)off);
            *x = off > 0.0f ? 1.0f : off < 0.0f ? -1.0f : 0.0f;
        }
}
static void moe__tile_square(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum) { /* (g - [i = j])^2 */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < m; j++) {
            float *x = g + i * MOE__W + j, off = *x - (i0 + i == j0 + j ? 1.0f : 0.0f);
            *sum += (double)off * (double)off;
            *x = 2.0f * off;
        }
}
/* at unit length the diagonal is constant */
static void moe__tile_unit(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum) { /* g^2, i != j */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < m; j++) {
            float *x = g + i * MOE__W + j, v = i0 + i == j0 + j ? 0.0f : *x;
            *sum += (double)v * (double)v;
            *x = 2.0f * v;
        }
}
static void moe__tile_relu(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum) { /* max(0, g), i != j */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < m; j++) {
            float *x = g + i * MOE__W + j, v = i0 + i == j0 + j || !(*x > 0.0f) ? 0.0f : *x;
            *sum += (double)v;
            *x = v > 0.0f ? 1.0f : 0.0f;
        }
}
static void moe__tile_near(size_t i0, size_t j0, size_t n, size_t m, float *g, double *sum) { /* exp(2 g - 2), i != j */
    for (size_t i = 0; i < n; i++) {
        float *row = g + i * MOE__W;
        for (size_t j = 0; j < m; j++) row[j] = 2.0f * (row[j] - 1.0f);
        moe__k()->exp(m, row, row);
        for (size_t j = 0; j < m; j++) {
            if (i0 + i == j0 + j) row[j] = 0.0f;
            *sum += (double)row[j];
            row[j] *= 2.0f;
        }
    }
}

static moe_status moe__gram_check(size_t rows, size_t cols, const float *a, float coefficient, double *value, moe_status null,
                                  moe_status nan) {
    moe_status s = moe__loss_shape(rows, cols, coefficient, value);
    if (s || !rows) return s;
    if (!a) return null;
    return moe__all_finite(rows * cols, a) ? MOE_OK : nan;
}
static moe_status moe__router_loss(void (*tile)(size_t, size_t, size_t, size_t, float *, double *), int unit, double divisor, size_t d,
                                   size_t E, const float *router, float coefficient, double *value, float *d_router) {
    moe__gram l;
    l.tile = tile;
    l.unit = unit;
    moe_status s = !d ? MOE_E_D_MODEL : moe__gram_check(d, E, router, coefficient, value, MOE_E_NULL_ROUTER, MOE_E_NAN_ROUTER);
    if (s || !(divisor > 0.0)) return s;
    double v = moe__gram_loss(&l, d, E, router, (float)((double)coefficient / divisor), d_router);
    if (value) *value = v / divisor;
    return MOE_OK;
}

/* As in SimBal [P]: dR = 2 R sign(R^T R - I). */
MOE_API moe_status moe_loss_simbal(size_t d, size_t n_experts, const float *router, float coefficient, double *value, float *d_router) {
    return moe__router_loss(moe__tile_abs, 0, 1.0, d, n_experts, router, coefficient, value, d_router);
}
/* After the ecology paper [S], whose form is not published [D]. */
MOE_API moe_status moe_loss_prototype_orthogonality(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                                    float *d_router) {
    return moe__router_loss(moe__tile_unit, 1, 1.0, d, n_experts, router, coefficient, value, d_router);
}
/* After latent prototype routing (2506.21328): it asks for prototypes far apart; this form is ours [D]. */
MOE_API moe_status moe_loss_prototype_diversity(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                                float *d_router) {
    double pairs = (double)n_experts * ((double)n_experts - 1.0);
    return moe__router_loss(moe__tile_near, 1, pairs, d, n_experts, router, coefficient, value, d_router);
}
/* As in DynMoE [C]: norm(W^T W - I) + mean norm(w_e). */
MOE_API moe_status moe_loss_diverse_simple(size_t d, size_t n_experts, const float *router, float coefficient, double *value,
                                           float *d_router) {
    double square, lengths = 0.0;
    float inverse[MOE__W];
    moe_status s = moe__router_loss(moe__tile_square, 0, 1.0, d, n_experts, router, 0.0f, &square, NULL);
    if (!s) s = moe__loss_shape(d, n_experts, coefficient, value);
    if (s) return s;
    double norm = sqrt(square), step = (double)coefficient / (double)n_experts;
    if (d_router && norm > 0.0)
        moe__router_loss(moe__tile_square, 0, 2.0 * norm, d, n_experts, router, coefficient, NULL, d_router);
    for (size_t e = 0; e < n_experts; e += MOE__W) {
        size_t n = moe__min(MOE__W, n_experts - e);
        moe__gram_inverse(router, d, n_experts, e, n, inverse);
        for (size_t i = 0; i < n; i++) lengths += inverse[i] > 0.0f ? 1.0 / (double)inverse[i] : 0.0;
        for (size_t r = 0; d_router && r < d; r++)
            for (size_t i = 0; i < n; i++) {
                size_t at = r * n_experts + e + i;
                d_router[at] = moe__fma((float)(step * (double)inverse[i]), router[at], d_router[at]);
            }
    }
    if (value) *value = norm + lengths / (double)n_experts;
    return MOE_OK;
}
/* As in ERMoE's penalty [S]. */
MOE_API moe_status moe_loss_orthonormal(size_t rows, size_t cols, const float *matrix, float coefficient, double *value, float *d_matrix) {
    moe__gram l;
    l.tile = moe__tile_square;
    l.unit = 0;
    moe_status s = moe__gram_check(rows, cols, matrix, coefficient, value, MOE_E_NULL_MATRIX, MOE_E_NAN_MATRIX);
    if (s || !rows) return s;
    double v = moe__gram_loss(&l, rows, cols, matrix, coefficient, d_matrix);
    if (value) *value = v;
    return MOE_OK;
}
/* mean over i < j of max(0, cos), cos between the logits of two experts over the tokens [C]. */
MOE_API moe_status moe_loss_redundancy(size_t n_tokens, size_t n_experts, const float *logits, float coefficient,
                                       double *value, float *d_logits) {
    moe__gram l;
    l.tile = moe__tile_relu;
    l.unit = 1;
    moe_status s = moe__gram_check(n_tokens, n_experts, logits, coefficient, value, MOE_E_NULL_LOGITS, MOE_E_NAN_LOGITS);
    double pairs = (double)n_experts * ((double)n_experts - 1.0);
    if (s || !n_tokens || n_experts < 2) return s;
    double v = moe__gram_loss(&l, n_tokens, n_experts, logits, (float)((double)coefficient / pairs), d_logits);
    if (value) *value = v / pairs;
    return MOE_OK;
}

/* -- latent tokens, outputs, codes -- */
static moe_status moe__latent_check(size_t T, size_t d, const float *latent, float coefficient, double *value) {
    size_t n;
    if (!d) return MOE_E_D_MODEL;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    if (!moe__mul(T, d, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    if (!T) return MOE_OK;
    if (!latent) return MOE_E_NULL_LATENT;
    return moe__all_finite(n, latent) ? MOE_OK : MOE_E_NAN_LATENT;
}

/* After latent prototype routing [D]. d cos / dx = (c / |c| - cos x / |x|) / |x|, and the other way round. */
MOE_API moe_status moe_loss_prototype_alignment(size_t n_tokens, size_t d, size_t n_experts, size_t k, const float *latent,
                                                const float *router, const int32_t *index, float coefficient, double *value,
                                                float *d_latent, float *d_router) {
    moe_status s = moe__latent_check(n_tokens, d, latent, coefficient, value);
    if (!s) s = moe__gram_check(d, n_experts, router, 0.0f, NULL, MOE_E_NULL_ROUTER, MOE_E_NAN_ROUTER);
    if (!s) s = moe__loss_choices(n_tokens, k, n_experts, index);
    if (s) return s;
    size_t choices = 0;
    double sum = 0.0;
    for (size_t i = 0; i < n_tokens * k; i++) choices += index[i] >= 0;
    if (!choices) return MOE_OK;
    double step = -(double)coefficient / (double)choices;
    /* up to 32 choices of a token at a time, down the rows of the prototypes */
    for (size_t i0 = 0; i0 < n_tokens * k; i0 += moe__min(MOE__W, k - i0 % k)) {
        size_t t = i0 / k, at[MOE__W], n = 0;
        double xx = 0.0, cc[MOE__W] = {0}, xc[MOE__W] = {0}, across[MOE__W], own_x[MOE__W], own_c[MOE__W];
        for (size_t i = i0; i < i0 + moe__min(MOE__W, k - i0 % k); i++)
            if (index[i] >= 0) at[n++] = (size_t)index[i];
        for (size_t r = 0; r < d; r++) {
            double a = (double)latent[t * d + r];
            xx += a * a;
            for (size_t i = 0; i < n; i++) {
                double b = (double)router[r * n_experts + at[i]];
                cc[i] += b * b;
                xc[i] += a * b;
            }
        }
        for (size_t i = 0; i < n; i++) {
            int angle = xx > 0.0 && cc[i] > 0.0;
            double cosine = angle ? xc[i] / sqrt(xx * cc[i]) : 0.0;
            across[i] = angle ? step / sqrt(xx * cc[i]) : 0.0;
            own_x[i] = angle ? step * cosine / xx : 0.0;
            own_c[i] = angle ? step * cosine / cc[i] : 0.0;
            sum += 1.0 - cosine;
        }
        for (size_t r = 0; (d_latent || d_router) && r < d; r++) {
            double a = (double)latent[t * d + r], dx = 0.0;
            for (size_t i = 0; i < n; i++) {
                double b = (double)router[r * n_experts + at[i]];
                dx += across[i] * b - own_x[i] * a;
                if (d_router) d_router[r * n_experts + at[i]] += (float)(across[i] * a - own_c[i] * b);
            }
            if (d_latent) d_latent[t * d + r] += (float)dx;
        }
    }
    if (value) *value = sum / (double)choices;
    return MOE_OK;
}

/* mean_t (1/2) sum (m^2 + v - ln v - 1), v = exp(log_var): after latent prototype routing [D]. */
MOE_API moe_status moe_loss_latent_kl(size_t n_tokens, size_t d, const float *latent, const float *log_var, float coefficient,
                                      double *value, float *d_latent, float *d_log_var) {
    moe_status s = moe__latent_check(n_tokens, d, latent, coefficient, value);
    if (!s) s = moe__latent_check(n_tokens, d, log_var, coefficient, value);
    if (s || !n_tokens) return s;
    const moe__kernels *kn = moe__k();
    double sum = 0.0;
    float step = coefficient / (float)n_tokens;
    for (size_t i = 0; i < n_tokens * d; i++)
        if (log_var[i] > 88.0f) return MOE_E_NAN_LATENT; /* the variance would overflow */
    for (size_t i = 0; i < n_tokens * d; i += MOE__SLOPES) {
        float v[MOE__SLOPES];
        size_t n = moe__min(MOE__SLOPES, n_tokens * d - i);
        kn->exp(n, log_var + i, v);
        if (d_latent) kn->axpy(n, step, latent + i, d_latent + i);
        for (size_t j = 0; j < n; j++) {
            sum += 0.5 * ((double)latent[i + j] * (double)latent[i + j] + (double)v[j] - (double)log_var[i + j] - 1.0);
            v[j] -= 1.0f;
        }
        if (d_log_var) kn->axpy(n, 0.5f * step, v, d_log_var + i);
    }
    if (value) *value = sum / (double)n_tokens;
    return MOE_OK;
}

/* Its squared length; 0 where it is too small or too large to project on. */
static float moe__square_of(const moe__kernels *kn, size_t d, const float *o) {
    float square = kn->dot(d, o, o);
    return square >= FLT_MIN && moe__finite(square) ? square : 0.0f;
}
/* Squared lengths of the projections of output j on output l, after 2505.22323 [K]; the square is ours [D]. */
MOE_API moe_status moe_loss_output_orthogonality(size_t n_tokens, size_t k, size_t d, const float *outputs, float coefficient,
                                                 double *value, float *d_outputs) {
    size_t n;
    if (!k) return MOE_E_TOP_K;
    if (!d) return MOE_E_D_MODEL;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    if (!moe__mul(n_tokens, k, &n) || !moe__mul(n, d, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    if (!n_tokens) return MOE_OK;
    if (!outputs) return MOE_E_NULL_OUTPUTS;
    if (!moe__all_finite(n, outputs)) return MOE_E_NAN_OUTPUTS;
    const moe__kernels *kn = moe__k();
    double sum = 0.0;
    float step = 2.0f * coefficient / (float)n_tokens;
    /* each pair once, l from up to 32 outputs whose squares are at hand */
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t l0 = 0; l0 < k; l0 += MOE__W) {
            const float *o = outputs + t * k * d;
            float *go = d_outputs ? d_outputs + t * k * d : NULL, square[MOE__W], along[MOE__W];
            size_t end = moe__min(l0 + MOE__W, k);
            for (size_t l = l0; l < end; l++) square[l - l0] = moe__square_of(kn, d, o + l * d), along[l - l0] = 0.0f;
            for (size_t l = l0; l < end; l++)
                for (size_t j = 0; j < l; j++) {
                    float ll = square[l - l0], jj = j >= l0 ? square[j - l0] : moe__square_of(kn, d, o + j * d);
                    float jl = kn->dot(d, o + j * d, o + l * d);
                    float on_l = ll > 0.0f ? jl / ll : 0.0f, on_j = jj > 0.0f ? jl / jj : 0.0f; /* the projections' lengths, as shares */
                    sum += (double)on_l * (double)on_l * (double)ll + (double)on_j * (double)on_j * (double)jj;
                    if (!go) continue;
                    kn->axpy(d, step * (on_l + on_j), o + l * d, go + j * d);
                    kn->axpy(d, step * (on_l + on_j), o + j * d, go + l * d);
                    along[l - l0] = moe__fma(on_l, on_l, along[l - l0]);
                    if (j >= l0) along[j - l0] = moe__fma(on_j, on_j, along[j - l0]);
                    else kn->axpy(d, -step * on_j * on_j, o + j * d, go + j * d);
                }
            for (size_t l = l0; go && l < end; l++) kn->axpy(d, -step * along[l - l0], o + l * d, go + l * d);
        }
    if (value) *value = sum / (double)n_tokens;
    return MOE_OK;
}

/* As in VQMoE [C]. */
MOE_API moe_status moe_loss_codebook(size_t n_tokens, size_t d, size_t n_codes, const float *x, const float *codebook,
                                     const int32_t *index, float commitment, float coefficient, double *value, float *dx,
                                     float *d_codebook) {
    size_t n, coded = 0;
    if (!d) return MOE_E_D_MODEL;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    if (!(commitment >= 0.0f) || !moe__finite(commitment)) return MOE_E_COMMITMENT;
    if (!moe__mul(n_tokens, d, &n) || !moe__mul(n_codes, d, &n)) return MOE_E_OVERFLOW;
    if (value) *value = 0.0;
    if (!n_tokens) return MOE_OK;
    if (!x) return MOE_E_NULL_X;
    if (!codebook) return MOE_E_NULL_CODEBOOK;
    if (!moe__all_finite(n_tokens * d, x)) return MOE_E_NAN_X;
    if (!moe__all_finite(n_codes * d, codebook)) return MOE_E_NAN_CODEBOOK;
    moe_status s = moe__loss_index(n_tokens, n_codes, index, MOE_E_CODE);
    if (s) return s;
    double sum = 0.0;
    for (size_t t = 0; t < n_tokens; t++) coded += index[t] >= 0;
    if (!coded) return MOE_OK;
    float step = 2.0f * coefficient / (float)coded;
    for (size_t t = 0; t < n_tokens; t++) {
        if (index[t] < 0) continue;
        size_t at = t * d, code = (size_t)index[t] * d;
        for (size_t i = 0; i < d; i++) {
            float off = codebook[code + i] - x[at + i];
            sum += (double)off * (double)off;
            if (d_codebook) d_codebook[code + i] = moe__fma(step, off, d_codebook[code + i]);
            if (dx) dx[at + i] = moe__fma(-step * commitment, off, dx[at + i]);
        }
    }
    if (value) *value = (1.0 + (double)commitment) * sum / (double)coded;
    return MOE_OK;
}

/* -- the table -- */
typedef struct moe__loss_row {
    moe_info info;
    /* += m->dlogits or drouter; NULL: the layer does not have what it needs */
    moe_status (*add)(const moe__job *j, const uint64_t *load, float coefficient, double *value);
} moe__loss_row;
/* What prob was made with. */
#define MOE__PROB_T(j) ((j)->m->now.prob_t)
/* Gradient by the scores that a loss was on, m->work (T, E), on to the logits. */
static const float *moe__layer_scores(const moe__job *j) {
    return moe__gates[j->d->gate].scores == MOE__SCORES_OWN ? j->t->scores : j->t->prob;
}
static moe_status moe__loss_scores_back(const moe__job *j) {
    size_t n = j->t->n_tokens * j->dims->E;
    const float *s = moe__layer_scores(j), *ds = j->m->work;
    float *dz = j->m->dlogits;
    if (s == j->t->prob) return moe_softmax_backward(j->t->n_tokens, j->dims->E, MOE__PROB_T(j), s, ds, dz);
    for (size_t i = 0; i < n; i++) {
        float slope = j->d->gate == MOE_GATE_RELU ? (s[i] > 0.0f ? 1.0f : 0.0f) : j->m->now.inv_t * (s[i] * (1.0f - s[i]));
        dz[i] = moe__fma(slope, ds[i], dz[i]);
    }
    return MOE_OK;
}
static moe_status moe__add_sequence(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t T = j->t->n_tokens, E = j->dims->E, L = j->d->sequence ? j->d->sequence : moe__max(T, 1);
    (void)load;
    if (!T) return MOE_OK;
    memset(j->m->work, 0, T * E * sizeof(float));
    moe_status s = moe_sequence_load(T, E, j->dims->S, L, j->t->index, j->m->counts);
    if (!s) s = moe_loss_sequence(T, E, L, moe__layer_scores(j), j->m->counts, coefficient, value, j->m->work);
    return s ? s : moe__loss_scores_back(j);
}
static moe_status moe__add_device(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    moe_status s = moe_device_load(j->dims->E, j->d->n_ranks, load, j->m->counts);
    return s ? s
             : moe_loss_device(j->t->n_tokens, j->dims->E, j->d->n_ranks, MOE__PROB_T(j), j->t->prob, j->m->counts, coefficient, value,
                               j->m->dlogits);
}
static moe_status moe__add_communication(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t T = j->t->n_tokens, E = j->dims->E, P = j->d->n_ranks;
    (void)load;
    moe_status s = moe_device_tokens(T, E, P, j->dims->S, j->t->index, j->m->counts);
    return s ? s
             : moe_loss_communication(T, E, P, moe__min(P, j->m->now.k), MOE__PROB_T(j), j->t->prob, j->m->counts, T, coefficient, value,
                                      j->m->dlogits);
}
/* The tokens of each rank are at home there: the mean over the ranks. 1 - 0.01 at home [D]. */
static moe_status moe__add_locality(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t T = j->t->n_tokens, E = j->dims->E, P = j->d->n_ranks, used = 0, t1;
    double v, sum = 0.0;
    moe_status s = MOE_OK;
    (void)load;
    for (size_t home = 0; home < moe__min(P, T); home++) used += moe__ceil_div(home * T, P) < moe__ceil_div((home + 1) * T, P);
    for (size_t home = 0, t0 = 0; home < P && !s; home++, t0 = t1) {
        t1 = moe__ceil_div((home + 1) * T, P); /* tokens with t P / T == home */
        if (t1 <= t0) continue;
        s = moe_mean_scores(t1 - t0, E, j->t->prob + t0 * E, j->m->mean2);
        if (!s) s = moe_device_prob(E, P, j->m->mean2, j->m->rank_prob);
        if (!s) s = moe_loss_locality(t1 - t0, E, P, home, 0.01f, MOE__PROB_T(j), j->t->prob + t0 * E, j->m->rank_prob,
                                      coefficient / (float)used, &v, j->m->dlogits + t0 * E);
        if (!s) sum += v / (double)used;
    }
    *value = sum;
    return s;
}
static moe_status moe__add_relu_l1(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    uint64_t counted = j->t->side.counted ? j->t->side.counted : j->t->n_tokens;
    return moe_loss_relu_l1(j->t->n_tokens, j->dims->E, j->m->now.k, j->t->scores, load, counted, coefficient, value, j->m->dlogits);
}
static moe_status moe__add_oracle(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    (void)load;
    if (j->t->n_tokens && !j->t->side.teacher) return MOE_E_NULL_TEACHER;
    return moe_loss_oracle(j->t->n_tokens, j->dims->E, MOE__PROB_T(j), j->t->prob, j->t->side.teacher, coefficient, value, j->m->dlogits);
}
/* The logits of a cosine score are the cosines themselves. */
static moe_status moe__add_prototype_alignment(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t S = j->dims->S, pairs = j->t->n_tokens * S, count = 0;
    double sum = 0.0;
    (void)load;
    for (size_t p = 0; p < pairs; p++) count += j->t->index[p] >= 0;
    for (size_t p = 0; p < pairs; p++) {
        if (j->t->index[p] < 0) continue;
        size_t at = p / S * j->dims->E + (size_t)j->t->index[p];
        sum += 1.0 - (double)j->t->logits[at];
        j->m->dlogits[at] -= coefficient / (float)count;
    }
    *value = count ? sum / (double)count : 0.0;
    return MOE_OK;
}
/* On the weights, so before the gate's backward: into m->slot_grad. */
static moe_status moe__add_importance_selected(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t T = j->t->n_tokens, S = j->dims->S, E = j->dims->E;
    (void)load;
    moe_status s = moe_mean_weights(T, S, E, j->t->index, j->t->weight, j->m->mean2);
    return s ? s : moe_loss_importance_selected(T, S, E, j->t->index, j->m->mean2, coefficient, value, j->m->slot_grad);
}
/* On the clean logits and the noise: after the noise's own backward. An expert's threshold is the k-th highest noisy logit
 * of the others [C]. */
static moe_status moe__add_load(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t T = j->t->n_tokens, E = j->dims->E, k = j->m->now.k;
    float *threshold = j->m->work, *dstd = j->m->sel;
    (void)load;
    if (!T || k >= E) return MOE_OK;
    for (size_t t = 0; t < T; t++) {
        const float *z = j->t->logits + t * E;
        float kth = -FLT_MAX, next = -FLT_MAX;
        for (size_t i = 0; i < k; i++) kth = z[j->t->index[t * j->dims->S + i]]; /* best first */
        for (size_t e = 0; e < E; e++) {
            int in = 0;
            for (size_t i = 0; i < k; i++) in |= j->t->index[t * j->dims->S + i] == (int32_t)e;
            threshold[t * E + e] = in ? 1.0f : 0.0f;
            if (!in && z[e] > next) next = z[e];
        }
        for (size_t e = 0; e < E; e++) threshold[t * E + e] = threshold[t * E + e] > 0.0f ? next : kth;
    }
    memset(dstd, 0, T * E * sizeof(float));
    moe_status s = moe_mean_selection(T, E, j->t->clean, j->t->noise_std, threshold, j->m->mean2);
    if (!s) s = moe_loss_load(T, E, j->t->clean, j->t->noise_std, threshold, j->m->mean2, coefficient, value, j->m->dlogits, dstd, NULL);
    if (s || j->d->noise != MOE_NOISE_LEARNED) return s;
    for (size_t i = 0; i < T * E; i++) threshold[i] = -j->t->noise_std[i];
    j->kn->exp(T * E, threshold, threshold);
    for (size_t i = 0; i < T * E; i++) j->m->raw[i] = moe__fma(dstd[i], 1.0f - threshold[i], j->m->raw[i]);
    return MOE_OK;
}
/* V of every routed expert, taken out of its panels. */
static moe_status moe__add_orthonormal(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    size_t d = j->dims->d, f = j->dims->f;
    float *v = j->m->matrix, *dv = v + d * f;
    moe_status s = MOE_OK;
    double one = 0.0;
    (void)load;
    *value = 0.0;
    if (!j->t->side.experts) return MOE_E_NULL_EXPERTS;
    for (size_t e = 0; e < j->dims->F && !s; e++) {
        const float *w = j->t->side.experts + e * j->dims->expert;
        for (size_t i = 0; i < d; i++)
            for (size_t c = 0; c < f; c++) v[i * f + c] = w[(c / MOE__W * d + i) * MOE__W + c % MOE__W];
        memset(dv, 0, d * f * sizeof(float));
        s = moe_loss_orthonormal(d, f, v, coefficient, &one, dv);
        *value += one;
        float *g = j->t->side.d_experts ? j->t->side.d_experts + e * j->dims->expert : NULL;
        for (size_t i = 0; g && i < d; i++)
            for (size_t c = 0; c < f; c++) g[(c / MOE__W * d + i) * MOE__W + c % MOE__W] += dv[i * f + c];
    }
    return s;
}
/* Made by the experts' backward, which has the outputs. */
static moe_status moe__add_output_orthogonality(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    (void)load;
    (void)coefficient;
    *value = j->m->output_loss;
    return MOE_OK;
}
static moe_status moe__add_codebook(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    const float *codebook = moe__router_part(j, MOE__R_CODEBOOK);
    (void)load;
    if (!j->m->branch->ready) return MOE_OK;
    return moe_loss_codebook(j->t->n_tokens, j->dims->d, j->dims->codes, j->m->branch->x, codebook, j->m->branch->code, 0.25f, coefficient,
                             value, j->dx, moe__router_grad(j, MOE__R_CODEBOOK));
}
static moe_status moe__add_switch(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    return moe_loss_switch(j->t->n_tokens, j->dims->E, MOE__PROB_T(j), j->t->prob, load, coefficient, value, j->m->dlogits);
}
static moe_status moe__add_variance(const moe__job *j, const uint64_t *load, float coefficient, double *value) {
    moe__slope l; /* of the softmax, and through it */
    (void)load;
    memset(&l, 0, sizeof l);
    l.fill = moe__fill_variance;
    l.each = 1;
    l.scale = 1.0f;
    l.mean = j->mean;
    moe_status s = moe_loss_variance(j->t->n_tokens, j->dims->E, j->t->prob, j->mean, coefficient, value, NULL);
    if (!s && j->t->n_tokens)
        moe__through_softmax(&l, j->t->n_tokens, j->dims->E, MOE__PROB_T(j), j->t->prob, coefficient, j->m->dlogits);
    return s;
}
#define MOE__ADD(name, call)                                                                                            \
    static moe_status moe__add_##name(const moe__job *j, const uint64_t *load, float coefficient, double *value) {      \
        (void)load;                                                                                                     \
        return call;                                                                                                    \
    }
#define MOE__ADD_LOGITS(name) MOE__ADD(name, moe_loss_##name(j->t->n_tokens, j->dims->E, j->t->logits, coefficient, value, j->m->dlogits))
#define MOE__ADD_PROB(name) \
    MOE__ADD(name, moe_loss_##name(j->t->n_tokens, j->dims->E, MOE__PROB_T(j), j->t->prob, coefficient, value, j->m->dlogits))
#define MOE__ADD_MEAN(name) \
    MOE__ADD(name, moe_loss_##name(j->t->n_tokens, j->dims->E, MOE__PROB_T(j), j->t->prob, j->mean, coefficient, value, j->m->dlogits))
#define MOE__ADD_ROUTER(name)                                                                                                              \
    MOE__ADD(name, moe_loss_##name(j->dims->L, j->dims->N, moe__router_part(j, MOE__R_ROUTER), coefficient, value,                         \
                                   moe__router_grad(j, MOE__R_ROUTER)))
MOE__ADD_LOGITS(z)
MOE__ADD_LOGITS(redundancy)
MOE__ADD_PROB(entropy)
MOE__ADD_PROB(certainty)
MOE__ADD_MEAN(importance)
MOE__ADD_MEAN(kl_uniform)
MOE__ADD_MEAN(kl_reverse)
MOE__ADD_MEAN(l2_uniform)
MOE__ADD_MEAN(mutual_information)
MOE__ADD_ROUTER(simbal)
MOE__ADD_ROUTER(diverse_simple)
MOE__ADD_ROUTER(prototype_orthogonality)
MOE__ADD_ROUTER(prototype_diversity)
#undef MOE__ADD_LOGITS
#undef MOE__ADD_PROB
#undef MOE__ADD_MEAN
#undef MOE__ADD_ROUTER
#undef MOE__ADD

/* In the order of moe_loss_kind. docs/math.md has the same rows, with their gradients. */
static const moe__loss_row moe__losses[MOE_LOSS_COUNT] = {
    {{"switch", "E sum_e f_e P_e, f_e = c_e / sum_j c_j", "GShard, Switch", "C", 0.01f}, moe__add_switch},
    {{"z", "mean_t (logsumexp z_t)^2", "ST-MoE", "C", 0.001f}, moe__add_z},
    {{"importance", "Var(P) / Mean(P)^2", "V-MoE, after Shazeer 2017", "K", 0.005f}, moe__add_importance},
    {{"importance-selected", "Var(I) / Mean(I)^2, I_e = sum of the selected w_te", "Shazeer 2017", "K", 0.1f},
     moe__add_importance_selected},
    {{"load", "Var(I) / Mean(I)^2, I_e = sum_t Phi((z_te - thr_te) / sigma_te)", "Shazeer 2017, V-MoE", "C", 0.005f}, moe__add_load},
    {{"entropy", "-mean_t S_t, S_t = -sum_e p_te ln p_te", "ecology paper; the sign is a choice", "D", 0.0f}, moe__add_entropy},
    {{"certainty", "mean_t S_t", "top-p routing", "K", 1e-4f}, moe__add_certainty},
    {{"kl-uniform", "sum_e P_e ln P_e + ln E", "ecology paper, part of its B", "S", 0.4f}, moe__add_kl_uniform},
    {{"kl-reverse", "-ln E - (1/E) sum_e ln P_e", "this library", "D", 0.0f}, moe__add_kl_reverse},
    {{"mutual-information", "-(H(P) - mean_t S_t), H(P) = -sum_e P_e ln P_e", "Mod-Squad, ModuleFormer", "C", 5e-4f},
     moe__add_mutual_information},
    {{"l2-uniform", "sum_e (P_e - 1/E)^2", "public code", "C", 0.05f}, moe__add_l2_uniform},
    {{"sequence", "mean over sequences of E sum_e f_e Q_e, Q_e = mean of s_te / sum_j s_tj", "DeepSeek-V3", "K", 1e-4f}, moe__add_sequence},
    {{"device", "sum_d F_d P_d, F_d = mean of E f_e in d, P_d = sum of P_e in d", "DeepSeekMoE", "K", 0.05f}, moe__add_device},
    {{"communication", "sum_d F_d P_d, F_d = D / (M T) times the tokens sent to d", "DeepSeek-V2", "K", 0.02f}, moe__add_communication},
    {{"locality", "sum_d P_d ln(P_d / L_d), L = 1 - s at home, s / (D - 1) elsewhere", "LocMoE (2401.13920)", "K", 0.0f},
     moe__add_locality},
    {{"relu-l1", "E sum_e f_e mean_t max(0, s_te), f_e = c_e / (k T)", "ReMoE", "C", 1e-8f}, moe__add_relu_l1},
    {{"variance", "-mean_t sum_e (s_te - mean_t s_te)^2", "2505.22323", "K", 0.0f}, moe__add_variance},
    {{"oracle", "-mean_t ln p_te, e = teacher of t", "ecology paper; the teacher is a choice", "S", 0.0f}, moe__add_oracle},
    {{"simbal", "sum_ij abs((R^T R - I)_ij)", "SimBal (2506.14038)", "P", 0.1f}, moe__add_simbal},
    {{"diverse-simple", "norm(R^T R - I) + mean_e norm(R_e)", "DynMoE", "C", 0.0f}, moe__add_diverse_simple},
    {{"prototype-orthogonality", "sum_ij ((C^T C - I)_ij)^2, C_e = R_e / norm(R_e)", "ecology paper; form", "D", 0.05f},
     moe__add_prototype_orthogonality},
    {{"prototype-diversity", "mean over i != j of exp(2 cos_ij - 2), cos of R_i and R_j", "2506.21328; form", "D", 0.0f},
     moe__add_prototype_diversity},
    {{"prototype-alignment", "mean over choices of 1 - cos(x_t, R_e)", "2506.21328; form", "D", 0.0f}, moe__add_prototype_alignment},
    {{"latent-kl", "mean_t (1/2) sum_i (m_ti^2 + v_ti - ln v_ti - 1)", "2506.21328; form", "D", 0.0f}, NULL},
    {{"redundancy", "mean over i < j of max(0, cos(z_i, z_j))", "public code", "C", 0.1f}, moe__add_redundancy},
    {{"output-orthogonality", "mean_t sum over j != l of (o_j . o_l)^2 / (o_l . o_l)", "2505.22323", "K", 0.0f},
     moe__add_output_orthogonality},
    {{"orthonormal", "sum_ij ((V^T V - I)_ij)^2", "ERMoE", "S", 0.001f}, moe__add_orthonormal},
    {{"codebook", "mean_t (norm(C_j - sg x_t)^2 + 0.25 norm(sg C_j - x_t)^2)", "VQMoE", "C", 0.08f}, moe__add_codebook},
};
/* When the layer adds a loss: to the weights' gradient before the gate's, to the logits', or after the noise's. */
enum { MOE__LOSS_ON_WEIGHTS, MOE__LOSS_ON_LOGITS, MOE__LOSS_ON_NOISE };
static int moe__loss_when(int loss) {
    return loss == MOE_LOSS_IMPORTANCE_SELECTED ? MOE__LOSS_ON_WEIGHTS : loss == MOE_LOSS_LOAD ? MOE__LOSS_ON_NOISE : MOE__LOSS_ON_LOGITS;
}
/* Whether a layer with these choices has what the loss needs. */
static int moe__loss_fits(const moe_desc *d, int loss) {
    int cosine = d->score == MOE_SCORE_COSINE || d->score == MOE_SCORE_PROJECTED || d->score == MOE_SCORE_PROTOTYPE;
    switch (loss) {
    case MOE_LOSS_LATENT_KL: return 0; /* no variational latent here: level 1 only */
    case MOE_LOSS_LOAD: return d->noise == MOE_NOISE_LEARNED || d->noise == MOE_NOISE_GAUSSIAN;
    case MOE_LOSS_RELU_L1: return d->gate == MOE_GATE_RELU;
    case MOE_LOSS_SIMBAL: case MOE_LOSS_DIVERSE_SIMPLE: case MOE_LOSS_PROTOTYPE_ORTHOGONALITY: case MOE_LOSS_PROTOTYPE_DIVERSITY:
        return moe__latent_score(d->score);
    case MOE_LOSS_PROTOTYPE_ALIGNMENT: return cosine && d->combine != MOE_COMBINE_SOFT && d->noise == MOE_NOISE_NONE;
    case MOE_LOSS_IMPORTANCE_SELECTED: return d->combine != MOE_COMBINE_SOFT;
    case MOE_LOSS_DEVICE: case MOE_LOSS_COMMUNICATION: case MOE_LOSS_LOCALITY: return d->n_ranks > 1 && d->n_experts % d->n_ranks == 0;
    case MOE_LOSS_CODEBOOK: return d->n_codes > 0;
    case MOE_LOSS_ORTHONORMAL: return d->expert == MOE_EXPERT_ORTHONORMAL;
    case MOE_LOSS_OUTPUT_ORTHOGONALITY: return d->combine == MOE_COMBINE_SUM && !(d->n_zero + d->n_copy + d->n_constant);
    default: return 1;
    }
}
static moe_status moe__losses_check(const moe_desc *d) {
    for (int i = 0; i < MOE_LOSS_COUNT; i++)
        if (d->loss[i] > 0.0f && !moe__loss_fits(d, i)) return MOE_E_LOSS_STAGE;
    return MOE_OK;
}
static moe_status moe__losses_add(const moe__job *j, const uint64_t *load, int when) {
    moe_status s = MOE_OK;
    for (int i = 0; i < MOE_LOSS_COUNT && !s; i++)
        if (j->d->loss[i] > 0.0f && moe__loss_when(i) == when) s = moe__losses[i].add(j, load, j->d->loss[i], &j->t->loss[i]);
    return s;
}

#define MOE__NAME_API(kind, table, count) \
    MOE_API const char *moe_##kind##_name(moe_##kind##_kind v) { return (unsigned)v < count ? table[v].name : NULL; }
MOE__NAME_API(score, moe__scores, MOE__SCORE_COUNT)
MOE__NAME_API(gate, moe__gates, MOE__GATE_COUNT)
MOE__NAME_API(select, moe__selects, MOE__SELECT_COUNT)
MOE_API const char *moe_loss_name(moe_loss_kind v) { return (unsigned)v < MOE_LOSS_COUNT ? moe__losses[v].info.name : NULL; }
MOE_API const moe_info *moe_loss_info(moe_loss_kind v) { return (unsigned)v < MOE_LOSS_COUNT ? &moe__losses[v].info : NULL; }
static const struct {
    const char *name;
} moe__experts_table[] = {{"default"}, {"relu"}, {"gelu"}, {"silu"}, {"swiglu"}, {"geglu"}, {"orthonormal"}};
static const struct { const char *name; } moe__noises[] = {{"default"}, {"none"}, {"gaussian"}, {"uniform"}, {"gumbel"}, {"learned"}};
static const struct { const char *name; } moe__combines[] = {{"default"}, {"sum"}, {"soft"}, {"merge"}, {"robust"}};
static const struct { const char *name; } moe__inits[] = {{"default"}, {"uniform"}, {"orthogonal"}, {"zero"}};
static const struct { const char *name; } moe__orders[] = {{"default"}, {"token"}, {"choice"}, {"weight"}};
static const struct { const char *name; } moe__optimizers[] = {{"default"}, {"adamw"}, {"sgd"}};
MOE__NAME_API(expert, moe__experts_table, MOE__EXPERT_COUNT)
MOE__NAME_API(order, moe__orders, MOE__ORDER_COUNT)
MOE__NAME_API(noise, moe__noises, MOE__NOISE_COUNT)
MOE__NAME_API(combine, moe__combines, MOE__COMBINE_COUNT)
MOE__NAME_API(init, moe__inits, MOE__INIT_COUNT)
MOE__NAME_API(optimizer, moe__optimizers, MOE__OPTIMIZER_COUNT)

/* ==== controllers =============================================================================
 * One row a kind: its defaults, the state that it has, and its step. */
typedef struct moe__control_row {
    moe_info info;
    float damping, low, high, coefficient;
    int has_coefficient, has_bias, has_error, has_usage;
    moe_status (*check)(const moe_control *c, const moe_control_input *in);
    moe_status (*step)(moe_control *c, const moe_control_input *in);
} moe__control_row;

static double moe__control_mean(const moe_control *c, const moe_control_input *in) {
    double total = 0.0;
    for (size_t e = 0; e < c->n_experts; e++) total += (double)in->load[e];
    return total / (double)c->n_experts;
}
static moe_status moe__control_needs_load(const moe_control *c, const moe_control_input *in) {
    (void)c;
    return in->load ? MOE_OK : MOE_E_NULL_LOAD;
}

/* b += rate * sign(mean - load), as in DeepSeek's loss-free balancing [C]. */
static moe_status moe__control_bias(moe_control *c, const moe_control_input *in) {
    double mean = moe__control_mean(c, in);
    for (size_t e = 0; e < c->n_experts; e++) {
        double n = (double)in->load[e];
        c->bias[e] += n < mean ? c->rate : n > mean ? -c->rate : 0.0f;
    }
    return MOE_OK;
}

/* e = (mean - load) / mean; b += Ki e + Kd [e_prev de > 0] de, de = e - e_prev; then mean b = 0: as in ID balancing [P]. */
static moe_status moe__control_id(moe_control *c, const moe_control_input *in) {
    double mean = moe__control_mean(c, in), centre = 0.0;
    if (!(mean > 0.0)) return MOE_OK;
    for (size_t e = 0; e < c->n_experts; e++) {
        double error = (mean - (double)in->load[e]) / mean, before = (double)c->error[e], change = error - before;
        double step = (double)c->rate * error;
        if (before * change > 0.0) step += (double)c->damping * change;
        c->bias[e] = (float)((double)c->bias[e] + step);
        c->error[e] = (float)error;
        centre += (double)c->bias[e];
    }
    centre /= (double)c->n_experts;
    for (size_t e = 0; e < c->n_experts; e++) c->bias[e] = (float)((double)c->bias[e] - centre);
    return MOE_OK;
}

/* u = decay u + (1 - decay) load / mean; b = boost where u < low, else 0. The constants are [C], the unit of u is ours [D]. */
static moe_status moe__control_usage(moe_control *c, const moe_control_input *in) {
    double mean = moe__control_mean(c, in), decay = (double)c->damping;
    if (!(mean > 0.0)) return MOE_OK;
    for (size_t e = 0; e < c->n_experts; e++) {
        c->usage[e] = (float)(decay * (double)c->usage[e] + (1.0 - decay) * ((double)in->load[e] / mean));
        c->bias[e] = c->usage[e] < c->low ? c->rate : 0.0f;
    }
    return MOE_OK;
}

/* lambda *= rate where the gate is less sparse than 1 - k / E, else /= rate, as in ReMoE [C]. */
static moe_status moe__control_lambda_check(const moe_control *c, const moe_control_input *in) {
    if (!in->top_k || in->top_k > c->n_experts) return MOE_E_TOP_K;
    return in->sparsity >= 0.0 && in->sparsity <= 1.0 ? MOE_OK : MOE_E_SPARSITY;
}
static moe_status moe__control_lambda(moe_control *c, const moe_control_input *in) {
    double want = 1.0 - (double)in->top_k / (double)c->n_experts, v = (double)*c->coefficient;
    v = in->sparsity < want ? v * (double)c->rate : v / (double)c->rate;
    *c->coefficient = v < (double)c->low ? c->low : v > (double)c->high ? c->high : (float)v;
    return MOE_OK;
}

/* a = decay a + (1 - decay) min(xi * drop rate, cap), after Skywork-MoE [K]. */
static moe_status moe__control_adaptive_check(const moe_control *c, const moe_control_input *in) {
    (void)c;
    return in->drop_rate >= 0.0 && in->drop_rate <= 1.0 ? MOE_OK : MOE_E_DROP_RATE;
}
static moe_status moe__control_adaptive(moe_control *c, const moe_control_input *in) {
    double goal = (double)c->rate * in->drop_rate, decay = (double)c->damping;
    if (goal > (double)c->high) goal = (double)c->high;
    *c->coefficient = (float)(decay * (double)*c->coefficient + (1.0 - decay) * goal);
    return MOE_OK;
}

/* The value of rank r (0 = least) of n floats, none of them NaN: digit by digit, so without sorting or moving them. */
static float moe__rank(size_t n, const float *v, size_t r) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        size_t count[256] = {0};
        uint32_t digit = 0;
        for (size_t i = 0; i < n; i++) {
            uint32_t u = moe__bits_of(v[i]);
            u ^= u >> 31 ? 0xffffffffu : 0x80000000u; /* orders as the floats do */
            if ((u & mask) == prefix) count[u >> shift & 255]++;
        }
        for (; r >= count[digit]; digit++) r -= count[digit];
        prefix |= digit << shift;
        mask |= (uint32_t)255 << shift;
    }
    return moe__float_of(prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu));
}

/* b_j = -quantile over the tokens, at 1 - k/E, of s_ij - alpha_i, alpha_i = the (k+1)-th biased score of token i, as in
 * quantile balancing [C]; between two tokens the quantile is on a straight line [D]. */
static moe_status moe__control_quantile_check(const moe_control *c, const moe_control_input *in) {
    size_t n;
    if (!in->top_k || in->top_k > c->n_experts) return MOE_E_TOP_K;
    if (!moe__mul(in->n_tokens, c->n_experts, &n)) return MOE_E_OVERFLOW;
    if (n && !in->scores) return MOE_E_NULL_SCORES;
    return moe__all_finite(n, in->scores) ? MOE_OK : MOE_E_NAN_SCORES;
}
static moe_status moe__control_quantile(moe_control *c, const moe_control_input *in) {
    size_t T = in->n_tokens, E = c->n_experts, k = in->top_k, bytes;
    moe__arena arena;
    if (!T || k == E) return MOE_OK;
    moe_status s = moe_control_scratch(c, T, &bytes);
    if (s) return s;
    void *own = NULL, *memory = in->scratch;
    if (!memory) {
        memory = own = moe__alloc(in->alloc_context, bytes);
        if (!own) return MOE_E_NO_MEMORY;
    }
    s = moe__arena_over(&arena, memory, own ? bytes : in->scratch_bytes, bytes);
    if (!s) {
        float *alpha = moe__take_floats(&arena, T, 1), *v = moe__take_floats(&arena, moe__max(T, E), 1);
        for (size_t t = 0; t < T; t++) {
            for (size_t e = 0; e < E; e++) v[e] = in->scores[t * E + e] + c->bias[e];
            alpha[t] = moe__rank(E, v, E - k - 1);
        }
        double at = (1.0 - (double)k / (double)E) * (double)(T - 1);
        size_t low = moe__min((size_t)at, T - 1);
        for (size_t e = 0; e < E; e++) {
            for (size_t t = 0; t < T; t++) v[t] = in->scores[t * E + e] - alpha[t];
            double q = (double)moe__rank(T, v, low), next = (double)moe__rank(T, v, moe__min(low + 1, T - 1));
            c->bias[e] = (float)-(q + (at - (double)low) * (next - q));
        }
    }
    moe__free(in->alloc_context, own);
    return s;
}

static const moe__control_row moe__controls[MOE_CONTROL_COUNT] = {
    {{"none", "", "", "", 0.0f}, 0.0f, 0.0f, 0.0f, 0.0f, 0, 0, 0, 0, NULL, NULL},
    {{"bias", "b_e += u sign(nbar - c_e)", "DeepSeek, loss-free balancing", "C", 0.001f},
     0.0f, 0.0f, 0.0f, 0.0f, 0, 1, 0, 0, moe__control_needs_load, moe__control_bias},
    {{"quantile", "b_e = -quantile_{1 - k/E} over t of (s_te - alpha_t), alpha_t = the (k+1)-th biased score", "quantile balancing",
      "C", 0.0f},
     0.0f, 0.0f, 0.0f, 0.0f, 0, 1, 0, 0, moe__control_quantile_check, moe__control_quantile},
    {{"id", "b_e += Ki e + Kd [e' (e - e') > 0] (e - e'), e = (nbar - c_e) / nbar, e' before; then mean b = 0", "ID balancing",
      "P", 0.006f},
     0.006f, 0.0f, 0.0f, 0.0f, 0, 1, 1, 0, moe__control_needs_load, moe__control_id},
    {{"relu-lambda", "lambda *= 1.2 if sparsity < 1 - k/E, else /= 1.2; lambda_0 = 1e-8", "ReMoE", "C", 1.2f},
     0.0f, FLT_MIN, FLT_MAX, 1e-8f, 1, 0, 0, 0, moe__control_lambda_check, moe__control_lambda},
    {{"adaptive", "a = 0.99 a + 0.01 min(xi drop rate, 0.01)", "Skywork-MoE", "K", 0.2f},
     0.99f, 0.0f, 0.01f, 0.01f, 1, 0, 0, 0, moe__control_adaptive_check, moe__control_adaptive},
    {{"usage-boost", "u_e = 0.9 u_e + 0.1 c_e / nbar; b_e = 0.4 if u_e < 0.35, else 0", "public code; unit of u", "C", 0.4f},
     0.9f, 0.35f, 0.0f, 0.0f, 0, 1, 0, 1, moe__control_needs_load, moe__control_usage},
};
MOE_API const char *moe_control_name(moe_control_kind v) { return (unsigned)v < MOE_CONTROL_COUNT ? moe__controls[v].info.name : NULL; }
MOE_API const moe_info *moe_control_info(moe_control_kind v) { return (unsigned)v < MOE_CONTROL_COUNT ? &moe__controls[v].info : NULL; }

static moe_status moe__control_layout(moe_control *c, moe_control_kind kind, size_t n_experts, moe__arena *a) {
    if ((unsigned)kind >= MOE_CONTROL_COUNT) return MOE_E_CONTROL;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    const moe__control_row *row = &moe__controls[kind];
    memset(c, 0, sizeof *c);
    c->kind = kind;
    c->n_experts = n_experts;
    c->rate = row->info.coefficient;
    c->damping = row->damping;
    c->low = row->low;
    c->high = row->high;
    c->n_state = (size_t)row->has_coefficient + n_experts * (size_t)(row->has_bias + row->has_error + row->has_usage);
    float *at = c->state = moe__take_floats(a, c->n_state, 1);
    if (a->overflow) return MOE_E_OVERFLOW;
    if (!a->base) return MOE_OK;
    if (row->has_coefficient) c->coefficient = at++;
    if (row->has_bias) c->bias = at, at += n_experts;
    if (row->has_error) c->error = at, at += n_experts;
    if (row->has_usage) c->usage = at;
    for (size_t i = 0; i < c->n_state; i++) c->state[i] = 0.0f;
    if (c->coefficient) *c->coefficient = row->coefficient;
    for (size_t e = 0; c->usage && e < n_experts; e++) c->usage[e] = 1.0f; /* even: no boost before there is news */
    return MOE_OK;
}

MOE_API moe_status moe_control_size(moe_control_kind kind, size_t n_experts, size_t *bytes) {
    moe_control c;
    moe__arena a = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status s = moe__control_layout(&c, kind, n_experts, &a);
    return s ? s : moe__arena_bytes(&a, bytes);
}
MOE_API moe_status moe_control_init(moe_control *c, moe_control_kind kind, size_t n_experts, void *memory, size_t bytes) {
    size_t needed;
    moe__arena a;
    if (!c) return MOE_E_NULL_CONTROL;
    moe_status s = moe_control_size(kind, n_experts, &needed);
    if (!s) s = moe__arena_over(&a, memory, bytes, needed);
    return s ? s : moe__control_layout(c, kind, n_experts, &a);
}
MOE_API moe_status moe_control_scratch(const moe_control *c, size_t n_tokens, size_t *bytes) {
    moe__arena a = {NULL, 0, 0};
    if (!c) return MOE_E_NULL_CONTROL;
    if (!bytes) return MOE_E_NULL_OUT;
    *bytes = 0;
    if (c->kind != MOE_CONTROL_QUANTILE) return MOE_OK;
    moe__take_floats(&a, n_tokens, 1);
    moe__take_floats(&a, moe__max(n_tokens, c->n_experts), 1);
    return moe__arena_bytes(&a, bytes);
}

MOE_API moe_status moe_control_step(moe_control *c, const moe_control_input *in) {
    if (!c || !c->n_experts) return MOE_E_NULL_CONTROL;
    if ((unsigned)c->kind >= MOE_CONTROL_COUNT) return MOE_E_CONTROL;
    if (c->kind == MOE_CONTROL_NONE) return MOE_OK;
    const moe__control_row *row = &moe__controls[c->kind];
    int average = c->kind == MOE_CONTROL_ADAPTIVE || c->kind == MOE_CONTROL_USAGE_BOOST;
    if (!(c->rate >= (c->kind == MOE_CONTROL_RELU_LAMBDA ? 1.0f : 0.0f)) || !moe__finite(c->rate)) return MOE_E_RATE;
    if (!(c->damping >= 0.0f) || !moe__finite(c->damping) || (average && c->damping > 1.0f)) return MOE_E_DAMPING;
    if (!moe__finite(c->low) || !moe__finite(c->high) || (c->kind == MOE_CONTROL_RELU_LAMBDA && !(c->low > 0.0f && c->low <= c->high)))
        return MOE_E_BOUNDS;
    if (!in) return MOE_E_NULL_INPUT;
    moe_status s = row->check(c, in);
    return s ? s : row->step(c, in);
}

/* -- schedules -- */
static const struct { const char *name; } moe__schedules[MOE__SCHEDULE_COUNT] = {{"default"}, {"linear"}, {"exponential"}, {"cosine"}};
MOE__NAME_API(schedule, moe__schedules, MOE__SCHEDULE_COUNT)

/* The shapes are those of SMoE-Dropout's schedules of k [C]; the formulas of all but the line are ours [D]. */
static double moe__schedule(moe_schedule_kind kind, uint64_t step, uint64_t total, double from, double to) {
    if (step >= total) return to;
    double share = (double)step / (double)total;
    if (kind == MOE_SCHEDULE_COSINE) {
        float c, s;
        moe__cos_sin_turn((uint32_t)(share * 8388608.0), &c, &s); /* half a turn of 2^24 */
        return from + (to - from) * (0.5 * (1.0 - (double)c));
    }
    if (kind == MOE_SCHEDULE_EXPONENTIAL) {
        float x[2];
        x[0] = moe__positive(from);
        x[1] = moe__positive(to);
        moe__k()->log(2, x, x);
        x[0] = (float)share * (x[1] - x[0]);
        moe__k()->exp(1, x, x);
        double v = from * (double)x[0], least = from < to ? from : to, most = from < to ? to : from;
        return v < least ? least : v > most ? most : v;
    }
    return from + (to - from) * share;
}
MOE_API moe_status moe_schedule_k(moe_schedule_kind kind, uint64_t step, uint64_t total, size_t from, size_t to, size_t *k) {
    if ((unsigned)kind >= MOE__SCHEDULE_COUNT) return MOE_E_SCHEDULE;
    if (!from || !to || from > MOE__MAX_EXPERTS || to > MOE__MAX_EXPERTS) return MOE_E_TOP_K;
    if (!k) return MOE_E_NULL_OUT;
    double v = moe__schedule(kind, step, total, (double)from, (double)to) + 0.5;
    *k = moe__min(moe__max((size_t)v, moe__min(from, to)), moe__max(from, to));
    return MOE_OK;
}
MOE_API moe_status moe_schedule_temperature(moe_schedule_kind kind, uint64_t step, uint64_t total, float from, float to,
                                            float *temperature) {
    if ((unsigned)kind >= MOE__SCHEDULE_COUNT) return MOE_E_SCHEDULE;
    if (!moe__temperature_ok(from) || !moe__temperature_ok(to)) return MOE_E_TEMPERATURE;
    if (!temperature) return MOE_E_NULL_OUT;
    *temperature = (float)moe__schedule(kind, step, total, (double)from, (double)to);
    return MOE_OK;
}
MOE_API float moe_schedule_random(uint64_t step, uint64_t warmup, uint64_t fade) {
    if (step < warmup) return 1.0f;
    return step - warmup < fade ? (float)(1.0 - (double)(step - warmup) / (double)fade) : 0.0f;
}

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
            if (!(ties & 1) || !kn->topk(1, n_experts, top_k, z + r * n_experts, w->index, NULL)) continue;
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
            moe__k()->topk(1, n_experts, top_k, z, w.plain, NULL);
            moe__k()->topk(1, n_experts, top_k, w.score, w.index, NULL);
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

static double moe__type_distance(size_t n, const double *a, const double *b) {
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
            double d = moe__type_distance(E, row, centre);
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
            double least = moe__type_distance(E, row, quality + best * E);
            for (size_t c = 0; c < seeded; c++) {
                double d = moe__type_distance(E, row, quality + c * E);
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
        for (size_t j = 0; j < n_next; j++) top = moe__larger(top, (double)z[j] - gamma * load[j]);
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
        lowest = moe__smaller(lowest, sum[i] / count[i]);
        highest = moe__larger(highest, sum[i] / count[i]);
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
        for (size_t e = 0; e < E; e++) top = moe__larger(top, (double)z[e]);
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

static double moe__median3(double a, double b, double c) { return moe__larger(moe__smaller(a, b), moe__smaller(moe__larger(a, b), c)); }

/* Sum of squares left by two lines that meet at x[b], over points first .. n - 1, first < b < n - 1. */
static double moe__two_lines(size_t first, size_t n, size_t b, const double *x, const double *y) {
    double count = (double)(n - first), sy = 0.0, left = 0.0, right = 0.0, ll = 0.0, rr = 0.0, ly = 0.0, ry = 0.0, sum = 0.0;
    double scale = x[n - 1] - x[first];
    for (size_t i = first; i < n; i++) {
        double d = (x[i] - x[b]) / scale, l = moe__smaller(d, 0.0), r = moe__larger(d, 0.0);
        sy += y[i], left += l, right += r, ll += l * l, rr += r * r, ly += l * y[i], ry += r * y[i];
    }
    double level = (sy - left * ly / ll - right * ry / rr) / (count - left * left / ll - right * right / rr);
    double before = (ly - left * level) / ll, after = (ry - right * level) / rr;
    for (size_t i = first; i < n; i++) {
        double d = (x[i] - x[b]) / scale, e = y[i] - level - before * moe__smaller(d, 0.0) - after * moe__larger(d, 0.0);
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
MOE__ENUM_WORD(noise)
MOE__ENUM_WORD(combine)
MOE__ENUM_WORD(schedule)
MOE__ENUM_WORD(init)
static const char *moe__control_word(int v) { return v < 0 ? NULL : moe_control_name((moe_control_kind)v); }
#undef MOE__ENUM_WORD

#define MOE__FIELD(member, type, value_name)                                                                 \
    { #member, offsetof(moe_desc, member), sizeof(((moe_desc *)0)->member), MOE__FIELD_##type, value_name }
static const moe__field moe__fields[] = {
    MOE__FIELD(d_model, SIZE, NULL),
    MOE__FIELD(d_ff, SIZE, NULL),
    MOE__FIELD(n_experts, SIZE, NULL),
    MOE__FIELD(top_k, SIZE, NULL),
    MOE__FIELD(n_shared, SIZE, NULL),
    MOE__FIELD(n_zero, SIZE, NULL),
    MOE__FIELD(n_copy, SIZE, NULL),
    MOE__FIELD(n_constant, SIZE, NULL),
    MOE__FIELD(sequence, SIZE, NULL),
    MOE__FIELD(n_ranks, SIZE, NULL),
    MOE__FIELD(score, ENUM, moe__score_word),
    MOE__FIELD(d_router, SIZE, NULL),
    MOE__FIELD(route_sequence, INT, moe__flag_word),
    MOE__FIELD(freeze_router, INT, moe__flag_word),
    MOE__FIELD(router_init, ENUM, moe__init_word),
    MOE__FIELD(router_gain, FLOAT, NULL),
    MOE__FIELD(jitter, FLOAT, NULL),
    MOE__FIELD(noise, ENUM, moe__noise_word),
    MOE__FIELD(noise_std, FLOAT, NULL),
    MOE__FIELD(residual, INT, moe__flag_word),
    MOE__FIELD(gate, ENUM, moe__gate_word),
    MOE__FIELD(normalize, INT, moe__flag_word),
    MOE__FIELD(weight_scale, FLOAT, NULL),
    MOE__FIELD(temperature, FLOAT, NULL),
    MOE__FIELD(learn_temperature, INT, moe__flag_word),
    MOE__FIELD(temperature_end, FLOAT, NULL),
    MOE__FIELD(mask_jitter, FLOAT, NULL),
    MOE__FIELD(select, ENUM, moe__select_word),
    MOE__FIELD(top_k_min, SIZE, NULL),
    MOE__FIELD(schedule, ENUM, moe__schedule_word),
    MOE__FIELD(schedule_steps, U64, NULL),
    MOE__FIELD(random_steps, U64, NULL),
    MOE__FIELD(n_groups, SIZE, NULL),
    MOE__FIELD(top_groups, SIZE, NULL),
    MOE__FIELD(top_p, FLOAT, NULL),
    MOE__FIELD(threshold, FLOAT, NULL),
    MOE__FIELD(fallback, INT, moe__flag_word),
    MOE__FIELD(random_second, INT, moe__flag_word),
    MOE__FIELD(sinkhorn_epsilon, FLOAT, NULL),
    MOE__FIELD(sinkhorn_iterations, SIZE, NULL),
    MOE__FIELD(gate_drop, FLOAT, NULL),
    MOE__FIELD(gate_drop_experts, INT, moe__flag_word),
    MOE__FIELD(expert_drop, FLOAT, NULL),
    MOE__FIELD(capacity_order, ENUM, moe__order_word),
    MOE__FIELD(capacity_factor, FLOAT, NULL),
    MOE__FIELD(capacity_factor_eval, FLOAT, NULL),
    MOE__FIELD(expert, ENUM, moe__expert_word),
    MOE__FIELD(bias, INT, moe__flag_word),
    MOE__FIELD(zero_output, INT, moe__flag_word),
    MOE__FIELD(combine, ENUM, moe__combine_word),
    MOE__FIELD(soft_slots, SIZE, NULL),
    MOE__FIELD(robust_tau, FLOAT, NULL),
    MOE__FIELD(n_codes, SIZE, NULL),
    MOE__FIELD(controller, ENUM, moe__control_word),
    MOE__FIELD(controller_rate, FLOAT, NULL),
    MOE__FIELD(controller_damping, FLOAT, NULL),
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
        if (i + 1 >= MOE__FIELD_COUNT && d->loss[i + 1 - MOE__FIELD_COUNT] == 0.0f) continue; /* a missing key means the default */
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

/* Numbers as text. No locale is asked. */
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

MOE_API moe_status moe_desc_set(moe_desc *d, const char *field, const char *value) {
    moe__field f;
    char name[32];
    if (!d) return MOE_E_NULL_DESC;
    if (!field || !value) return MOE_E_NULL_NAME;
    for (size_t i = 0; moe__field_at(i, &f, name); i++)
        if (!strcmp(f.name, field)) return moe__field_read(&f, value, d) ? MOE_OK : MOE_E_VALUE;
    return MOE_E_FIELD;
}
MOE_API moe_status moe_desc_parse(moe_desc *d, const char *text, size_t *at) {
    moe_desc r;
    moe_status s = MOE_OK;
    char word[2][48];
    size_t i = 0, begin = 0;
    if (!d) return MOE_E_NULL_DESC;
    if (!text) return MOE_E_NULL_NAME;
    r = *d;
    while (!s) {
        while (text[i] == ' ') i++;
        begin = i;
        if (!text[i]) break;
        for (int k = 0; k < 2 && !s; k++, i++) {
            size_t n = 0;
            for (; text[i] && text[i] != ' ' && (k || text[i] != '='); i++)
                if (n < sizeof word[k] - 1) word[k][n++] = text[i];
            word[k][n] = 0;
            if (!k && text[i] != '=') s = MOE_E_FIELD;
            if (k) i--; /* the blank, or the end */
        }
        if (!s) s = moe_desc_set(&r, word[0], word[1]);
    }
    if (at) *at = begin;
    if (!s) *d = r;
    return s;
}

/* A tensor of a layer, from its dims: the router's first, then the experts'. id: < MOE__R_COUNT the router's part; above it one of
 * the experts' blocks; -1 and -2 the constant experts' gates and vectors. 0 past the end. */
enum { MOE__W1, MOE__WU, MOE__W2, MOE__B1, MOE__BU, MOE__B2, MOE__TENSORS };
enum { MOE__T_CONSTANT_GATE = (int)MOE__R_COUNT + (int)MOE__TENSORS, MOE__T_CONSTANT, MOE__T_COUNT };
static const struct { const char *name, *shape; int gated, bias; } moe__tensor_rows_table[MOE__T_COUNT] = {
    {"router", NULL, 0, 0}, {"router.bias", NULL, 0, 0}, {"router.proj", NULL, 0, 0}, {"router.proj_bias", NULL, 0, 0},
    {"router.noise", NULL, 0, 0}, {"router.threshold", NULL, 0, 0}, {"router.log_scale", NULL, 0, 0}, {"router.residual", NULL, 0, 0},
    {"router.codebook", NULL, 0, 0}, {"router.branch", NULL, 0, 0},
    {"experts.w1", "Gdf", 0, 0}, {"experts.wu", "Gdf", 1, 0}, {"experts.w2", "Gfd", 0, 0},
    {"experts.b1", "Gf", 0, 1}, {"experts.bu", "Gf", 1, 1}, {"experts.b2", "Gd", 0, 1},
    {"experts.constant_gate", "n2d", 0, 0}, {"experts.constant", "nd", 0, 0}
};
static int moe__tensor_at(const moe_desc *d, const moe__dims *s, size_t i, int *id, moe_tensor *out) {
    for (*id = 0; *id < MOE__T_COUNT; ++*id) {
        const char *shape = *id < MOE__R_COUNT ? moe__router_shape(d, *id) : moe__tensor_rows_table[*id].shape;
        if (!*shape || (moe__tensor_rows_table[*id].gated && !s->gated) || (moe__tensor_rows_table[*id].bias && !s->bias)) continue;
        if (*shape == 'n' && !s->constants) continue;
        if (i--) continue;
        memset(out, 0, sizeof *out);
        out->name = moe__tensor_rows_table[*id].name;
        out->count = 1;
        for (; *shape; shape++) out->count *= out->dim[out->n_dims++] = moe__extent(s, *shape);
        return 1;
    }
    return 0;
}

static int moe__not_off(float v, int zero_allowed) { return moe__finite(v) && (v > 0.0f || (zero_allowed && v == 0.0f)); }

/* Fields with a default and a range, in one table: lo, hi; open: lo itself is out. MOE_OFF may be a value of its own. */
typedef struct moe__float_rule { size_t offset; float unset, lo, hi; int open, off; moe_status status; } moe__float_rule;
typedef struct moe__flag_rule { size_t offset; moe_status status; } moe__flag_rule;
#define MOE__AT(field) offsetof(moe_desc, field)
static const moe__float_rule moe__float_rules[] = {
    {MOE__AT(router_gain), 1.0f, 0.0f, FLT_MAX, 1, 0, MOE_E_ROUTER_GAIN},
    {MOE__AT(jitter), 0.0f, 0.0f, 0.999999f, 0, 0, MOE_E_JITTER},
    {MOE__AT(noise_std), 1.0f, 0.0f, FLT_MAX, 1, 0, MOE_E_NOISE_STD},
    {MOE__AT(weight_scale), 1.0f, 0.0f, FLT_MAX, 1, 0, MOE_E_WEIGHT_SCALE},
    {MOE__AT(temperature_end), 0.0f, 0.0f, FLT_MAX, 0, 0, MOE_E_TEMPERATURE_END},
    {MOE__AT(mask_jitter), 0.1f, 0.0f, FLT_MAX, 1, 0, MOE_E_MASK_JITTER},
    {MOE__AT(top_p), 0.4f, 0.0f, 1.0f, 1, 0, MOE_E_TOP_P},
    {MOE__AT(threshold), (float)MOE_OFF, -FLT_MAX, FLT_MAX, 0, 1, MOE_E_THRESHOLD},
    {MOE__AT(sinkhorn_epsilon), 1.0f, 0.0f, FLT_MAX, 1, 0, MOE_E_SINKHORN},
    {MOE__AT(gate_drop), 0.0f, 0.0f, 1.0f, 0, 0, MOE_E_GATE_DROP},
    {MOE__AT(expert_drop), 0.0f, 0.0f, 0.999999f, 0, 0, MOE_E_EXPERT_DROP},
    {MOE__AT(robust_tau), 1.0f, 0.0f, FLT_MAX, 1, 0, MOE_E_ROBUST_TAU},
    {MOE__AT(capacity_factor), (float)MOE_OFF, 0.0f, FLT_MAX, 1, 1, MOE_E_CAPACITY_FACTOR},
    {MOE__AT(controller_rate), 0.0f, 0.0f, FLT_MAX, 0, 0, MOE_E_CONTROLLER_RATE},
    {MOE__AT(controller_damping), 0.0f, 0.0f, FLT_MAX, 0, 1, MOE_E_CONTROLLER_DAMPING},
    {MOE__AT(epsilon), 1e-8f, 0.0f, FLT_MAX, 1, 0, MOE_E_EPSILON},
    {MOE__AT(beta1), 0.9f, 0.0f, 0.99999994f, 1, 1, MOE_E_BETA1},
    {MOE__AT(beta2), 0.999f, 0.0f, 0.99999994f, 1, 1, MOE_E_BETA2},
    {MOE__AT(momentum), 0.9f, 0.0f, 0.99999994f, 1, 1, MOE_E_MOMENTUM},
    {MOE__AT(weight_decay), 0.01f, 0.0f, FLT_MAX, 1, 1, MOE_E_WEIGHT_DECAY},
    {MOE__AT(clip_norm), (float)MOE_OFF, 0.0f, FLT_MAX, 1, 1, MOE_E_CLIP_NORM},
};
static const moe__flag_rule moe__flag_rules[] = {
    {MOE__AT(normalize), MOE_E_NORMALIZE}, {MOE__AT(bias), MOE_E_BIAS}, {MOE__AT(training), MOE_E_TRAINING},
    {MOE__AT(route_sequence), MOE_E_ROUTE_SEQUENCE}, {MOE__AT(freeze_router), MOE_E_FREEZE_ROUTER}, {MOE__AT(residual), MOE_E_RESIDUAL},
    {MOE__AT(learn_temperature), MOE_E_LEARN_TEMPERATURE}, {MOE__AT(fallback), MOE_E_FALLBACK},
    {MOE__AT(random_second), MOE_E_RANDOM_SECOND}, {MOE__AT(gate_drop_experts), MOE_E_GATE_DROP_EXPERTS},
    {MOE__AT(zero_output), MOE_E_ZERO_OUTPUT},
};
#undef MOE__AT

static moe_status moe__resolve_rules(moe_desc *d) {
    for (size_t i = 0; i < sizeof moe__float_rules / sizeof *moe__float_rules; i++) {
        const moe__float_rule *r = &moe__float_rules[i];
        float v;
        memcpy(&v, (char *)d + r->offset, sizeof v);
        if (v == 0.0f) v = r->unset;
        else if (!moe__finite(v) || (!(r->off && v == (float)MOE_OFF) && (r->open ? !(v > r->lo) : !(v >= r->lo))) || v > r->hi)
            return r->status;
        memcpy((char *)d + r->offset, &v, sizeof v);
    }
    for (size_t i = 0; i < sizeof moe__flag_rules / sizeof *moe__flag_rules; i++) {
        int v;
        memcpy(&v, (char *)d + moe__flag_rules[i].offset, sizeof v);
        if (v < MOE_OFF || v > MOE_ON) return moe__flag_rules[i].status;
    }
    return MOE_OK;
}
/* What must fit together; d has its defaults. */
static moe_status moe__resolve_fit(const moe_desc *d) {
    size_t special = d->n_zero + d->n_copy + d->n_constant;
    int soft = d->combine == MOE_COMBINE_SOFT, merge = d->combine == MOE_COMBINE_MERGE;
    if (d->n_zero >= d->n_experts || d->n_copy >= d->n_experts || d->n_constant >= d->n_experts || special >= d->n_experts ||
        (special && d->combine != MOE_COMBINE_SUM))
        return MOE_E_SPECIAL_EXPERTS;
    if (d->expert == MOE_EXPERT_ORTHONORMAL && d->d_ff >= d->d_model) return MOE_E_D_FF;
    if (d->n_ranks > d->n_experts) return MOE_E_N_RANKS;
    if (d->score == MOE_SCORE_SLICE && d->d_model % d->n_experts) return MOE_E_SLICE;
    if (d->score == MOE_SCORE_SUBSPACE && (d->expert != MOE_EXPERT_ORTHONORMAL || special)) return MOE_E_SUBSPACE;
    if ((d->gate == MOE_GATE_SPARSEMIXER) != (d->select == MOE_SELECT_SAMPLED) ||
        (d->gate == MOE_GATE_SIGN && d->select != MOE_SELECT_THRESHOLD))
        return MOE_E_GATE_SELECT;
    if ((soft || merge) && (d->select != MOE_SELECT_ALL || d->gate != MOE_GATE_SOFTMAX || d->capacity_factor != (float)MOE_OFF))
        return MOE_E_SELECT_COMBINE;
    if (soft && (!moe__latent_score(d->score) || d->noise != MOE_NOISE_NONE)) return MOE_E_SELECT_COMBINE;
    if (d->gate_drop > 0.0f && (soft || merge || d->select == MOE_SELECT_SINKHORN || d->select == MOE_SELECT_AUCTION ||
                                d->select == MOE_SELECT_SAMPLED))
        return MOE_E_GATE_DROP; /* they cannot leave experts out */
    if (merge && d->route_sequence != MOE_ON) return MOE_E_ROUTE_SEQUENCE;
    if (soft && d->route_sequence == MOE_ON) return MOE_E_ROUTE_SEQUENCE;
    if (soft && d->residual == MOE_ON) return MOE_E_RESIDUAL;
    if (d->n_codes &&
        (d->n_codes < d->n_experts || d->combine != MOE_COMBINE_SUM || special || d->jitter > 0.0f || d->route_sequence == MOE_ON))
        return MOE_E_N_CODES;
    if (moe__losses_check(d)) return MOE_E_LOSS_STAGE;
    if ((d->controller == MOE_CONTROL_RELU_LAMBDA && (d->gate != MOE_GATE_RELU || !(d->loss[MOE_LOSS_RELU_L1] > 0.0f))) ||
        (d->controller == MOE_CONTROL_ADAPTIVE && !(d->loss[MOE_LOSS_SWITCH] > 0.0f)))
        return MOE_E_CONTROLLER;
    if (d->soft_slots != 1 && !soft) return MOE_E_SOFT_SLOTS;
    if (d->soft_slots > ((size_t)1 << 20) / d->n_experts) return MOE_E_SOFT_SLOTS;
    if (d->n_groups > 256 || d->n_experts % d->n_groups) return MOE_E_GROUPS;
    if (d->top_groups > d->n_groups || (d->select == MOE_SELECT_GROUPS && d->top_k > d->top_groups * (d->n_experts / d->n_groups)))
        return MOE_E_TOP_GROUPS;
    if (d->top_k_min > d->top_k || (d->top_k_min < d->top_k && !d->schedule_steps)) return MOE_E_TOP_K_MIN;
    if (d->temperature_end != 0.0f && (!d->schedule_steps || !moe__temperature_ok(d->temperature_end))) return MOE_E_TEMPERATURE_END;
    if (d->select == MOE_SELECT_AUCTION && d->top_k != 1) return MOE_E_TOP_K;
    return MOE_OK;
}

MOE_API moe_status moe_desc_resolve(const moe_desc *in, moe_desc *out) {
    if (!in) return MOE_E_NULL_DESC;
    if (!out) return MOE_E_NULL_OUT;
    moe_desc d = *in;
    const float off = MOE_OFF;
    if (!d.d_model) return MOE_E_D_MODEL;
    if ((unsigned)d.score >= MOE__SCORE_COUNT) return MOE_E_SCORE;
    if ((unsigned)d.noise >= MOE__NOISE_COUNT) return MOE_E_NOISE;
    if ((unsigned)d.gate >= MOE__GATE_COUNT) return MOE_E_GATE;
    if ((unsigned)d.select >= MOE__SELECT_COUNT) return MOE_E_SELECT;
    if ((unsigned)d.expert >= MOE__EXPERT_COUNT) return MOE_E_EXPERT;
    if ((unsigned)d.combine >= MOE__COMBINE_COUNT) return MOE_E_COMBINE;
    if ((unsigned)d.schedule >= MOE__SCHEDULE_COUNT) return MOE_E_SCHEDULE;
    if ((unsigned)d.router_init >= MOE__INIT_COUNT) return MOE_E_ROUTER_INIT;
    if ((unsigned)d.capacity_order >= MOE__ORDER_COUNT) return MOE_E_CAPACITY_ORDER;
    if ((unsigned)d.optimizer >= MOE__OPTIMIZER_COUNT) return MOE_E_OPTIMIZER;
    if ((unsigned)d.controller >= MOE_CONTROL_COUNT) return MOE_E_CONTROLLER;
    if (!d.score) d.score = MOE_SCORE_LINEAR;
    if (!d.noise) d.noise = MOE_NOISE_NONE;
    if (!d.gate) d.gate = MOE_GATE_SOFTMAX;
    if (!d.select) d.select = MOE_SELECT_TOP_K;
    if (!d.expert) d.expert = MOE_EXPERT_SWIGLU;
    if (!d.combine) d.combine = MOE_COMBINE_SUM;
    if (!d.schedule) d.schedule = MOE_SCHEDULE_LINEAR;
    if (!d.router_init) d.router_init = MOE_INIT_UNIFORM;
    if (!d.capacity_order) d.capacity_order = MOE_ORDER_TOKEN;
    if (!d.optimizer) d.optimizer = MOE_OPTIMIZER_ADAMW;
    if (!d.d_ff && d.expert == MOE_EXPERT_ORTHONORMAL) d.d_ff = moe__max(1, d.d_model / 4);
    if (!d.d_ff && !moe__mul(d.d_model, 4, &d.d_ff)) return MOE_E_OVERFLOW;
    if (!d.n_experts) d.n_experts = 8;
    if (d.n_experts > ((size_t)1 << 20)) return MOE_E_N_EXPERTS;
    if (!d.top_k) d.top_k = d.n_experts > 1 && d.select != MOE_SELECT_AUCTION ? 2 : 1;
    if (d.top_k > d.n_experts) return MOE_E_TOP_K;
    if (!d.n_ranks) d.n_ranks = 1;
    if (!d.soft_slots) d.soft_slots = 1;
    if (!d.n_groups) d.n_groups = 1;
    if (!d.top_groups) d.top_groups = 1;
    if (!d.top_k_min) d.top_k_min = d.top_k;
    if (!d.sinkhorn_iterations) d.sinkhorn_iterations = 20;
    if (!d.d_router) d.d_router = moe__max(1, (d.score == MOE_SCORE_PROJECTED ? d.n_experts : d.d_model) / 2);
    moe_status st = moe__resolve_rules(&d);
    if (st) return st;
    if (!d.route_sequence) d.route_sequence = d.combine == MOE_COMBINE_MERGE ? MOE_ON : MOE_OFF;
    if (!d.normalize) d.normalize = d.top_k > 1 && d.gate != MOE_GATE_RELU ? MOE_ON : MOE_OFF;
    if (!d.bias) d.bias = MOE_OFF;
    if (!d.training) d.training = MOE_ON;
    if (!d.freeze_router) d.freeze_router = MOE_OFF;
    if (!d.residual) d.residual = MOE_OFF;
    if (!d.learn_temperature) d.learn_temperature = MOE_OFF;
    if (!d.random_second) d.random_second = MOE_OFF;
    if (!d.gate_drop_experts) d.gate_drop_experts = MOE_OFF;
    if (!d.zero_output) d.zero_output = MOE_OFF;
    if (d.select == MOE_SELECT_THRESHOLD && d.threshold == off) d.threshold = 0.0f;
    if (d.temperature == 0.0f) d.temperature = 1.0f;
    if (!moe__temperature_ok(d.temperature)) return MOE_E_TEMPERATURE;
    if (d.capacity_factor_eval == 0.0f) d.capacity_factor_eval = d.capacity_factor;
    if (d.capacity_factor_eval != off && !moe__not_off(d.capacity_factor_eval, 0)) return MOE_E_CAPACITY_FACTOR_EVAL;
    for (int i = 0; i < MOE_LOSS_COUNT; i++)
        if (d.loss[i] != off && !moe__not_off(d.loss[i], 1)) return MOE_E_LOSS;
    if (!d.seed) d.seed = 1;
    st = moe__resolve_fit(&d);
    moe__dims s;
    if (!st) st = moe__dims_of(&d, &s);
    if (st) return st;
    *out = d;
    return MOE_OK;
}

/* -- tape -- */
enum { MOE__STATE_TOKENS = 1, MOE__STATE_ROUTED = 2, MOE__STATE_FORWARD = 4 };

/* Rows that the routed experts compute for n tokens, at most. */
static int moe__routed_rows(const moe_desc *d, const moe__dims *s, size_t n, size_t *rows) {
    size_t count = !n ? 0 : d->sequence ? moe__ceil_div(n, d->sequence) : 1;
    if (d->combine == MOE_COMBINE_MERGE) *rows = n;
    else if (d->combine == MOE_COMBINE_SOFT) return moe__mul(count, s->N, rows);
    else if (d->select == MOE_SELECT_EXPERT_CHOICE) return moe__mul(n, d->top_k, rows) && moe__add_size(*rows, n ? s->E : 0, rows);
    else return moe__mul(n, s->S, rows);
    return 1;
}

/* The pass over the codes: the same experts, one for each token. */
static moe_desc moe__branch_desc(const moe_desc *d) {
    moe_desc b;
    memset(&b, 0, sizeof b);
    b.d_model = d->d_model;
    b.d_ff = d->d_ff;
    b.n_experts = d->n_experts;
    b.top_k = 1;
    b.score = MOE_SCORE_RANDOM; /* no parameters: the routes are given */
    b.expert = d->expert;
    b.bias = d->bias;
    b.parallel = d->parallel;
    b.alloc_context = d->alloc_context;
    return b;
}
static moe_status moe__tape_layout(moe_tape **out, const moe_desc *resolved, size_t n, int training, moe__arena *a);
static moe_status moe__branch_layout(moe__tape_memory *m, const moe_desc *resolved, size_t n, moe__arena *a) {
    moe_desc b = moe__branch_desc(resolved);
    moe__branch br;
    moe_status s = moe_desc_resolve(&b, &b);
    if (s) return s;
    memset(&br, 0, sizeof br);
    m->branch = (moe__branch *)moe__take(a, 1, sizeof br);
    s = moe__tape_layout(&br.tape, &b, n, m->training ? MOE_ON : MOE_OFF, a);
    br.code = (int32_t *)moe__take(a, n, sizeof(int32_t));
    br.expert = (int32_t *)moe__take(a, n, sizeof(int32_t));
    br.codes = moe__take_floats(a, resolved->n_codes, resolved->d_model);
    br.inv_code = moe__take_floats(a, resolved->n_codes, 1);
    br.square = moe__take_floats(a, resolved->n_codes, 1);
    br.u = moe__take_floats(a, n, resolved->d_model);
    br.y = moe__take_floats(a, n, resolved->d_model);
    br.v = moe__take_floats(a, n, resolved->d_model);
    br.inv_v = moe__take_floats(a, n, 1);
    br.g = moe__take_floats(a, n, 2);
    if (m->training) {
        br.x = moe__take_floats(a, n, resolved->d_model);
        br.dy = moe__take_floats(a, n, resolved->d_model);
        br.dv = moe__take_floats(a, n, resolved->d_model);
    }
    if (a->base) *m->branch = br;
    return s;
}

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
    size_t routed, shared, slots, groups, count = !n ? 0 : resolved->sequence ? moe__ceil_div(n, resolved->sequence) : 1;
    int soft = resolved->combine == MOE_COMBINE_SOFT, merge = resolved->combine == MOE_COMBINE_MERGE;
    const moe__latent *l = &moe__latents[resolved->score];
    if (s) return s;
    if (!moe__mul(n, d->S, &slots) || !moe__routed_rows(resolved, d, n, &routed) || !moe__mul(n, d->G - d->F, &shared) ||
        !moe__add_size(routed, shared, &m.n_rows) || m.n_rows > MOE__MAX_INDEX || slots > MOE__MAX_INDEX)
        return MOE_E_OVERFLOW;
    m.n_routed = routed;
    groups = merge ? count + d->G - d->F : d->G;
    moe_tape *tp = (moe_tape *)moe__take(a, 1, sizeof t);
    t.memory = (moe__tape_memory *)moe__take(a, 1, sizeof m);
    s = moe__routes_layout(&t.routes, n, d->S, d->E, a);
    if (!s) s = moe__select_scratch(resolved, n, &m.scratch_bytes);
    if (s) return s;
    t.n_slots = d->S;
    t.logits = moe__take_floats(a, n, d->E);
    t.prob = moe__take_floats(a, n, d->E);
    if (moe__gates[resolved->gate].scores == MOE__SCORES_OWN ||
        (resolved->gate == MOE_GATE_SOFTMAX && resolved->learn_temperature == MOE_ON))
        m.own_scores = t.scores = moe__take_floats(a, n, d->E);
    else t.scores = moe__gates[resolved->gate].scores == MOE__SCORES_PROB ? t.prob : t.logits;
    t.index = (int32_t *)moe__take(a, slots, sizeof(int32_t));
    t.weight = (float *)moe__take(a, slots, sizeof(float));
    if (resolved->noise == MOE_NOISE_LEARNED || resolved->noise == MOE_NOISE_GAUSSIAN) {
        t.clean = moe__take_floats(a, n, d->E);
        t.noise_std = moe__take_floats(a, n, d->E);
    }
    if (resolved->noise == MOE_NOISE_LEARNED) m.raw = moe__take_floats(a, n, d->E);
    if (resolved->noise != MOE_NOISE_NONE) m.draw = moe__take_floats(a, n, d->E);
    m.sel = moe__take_floats(a, n, d->E);
    m.work = moe__take_floats(a, n, d->E);
    m.scratch = moe__take(a, m.scratch_bytes, 1);
    m.xp = moe__take_floats(a, n, d->dp * MOE__W);
    m.xr = m.xp;
    if (d->jitter || d->by_sequence) m.xr = moe__take_floats(a, n, d->dp * MOE__W);
    size_t pack = moe__map_floats(d->L, d->N);
    if (l->proj) pack = moe__max(pack, moe__map_floats(d->d, d->L));
    if (resolved->noise == MOE_NOISE_LEARNED) pack = moe__max(pack, moe__map_floats(d->d, d->E));
    m.packed = moe__take_floats(a, pack, MOE__W);
    if (l->act != MOE__RAW || resolved->score == MOE_SCORE_SUBSPACE) {
        size_t wide = l->pre ? moe__max(d->lp, d->dp) : d->lp;
        if (resolved->score == MOE_SCORE_SUBSPACE && !moe__mul(d->E, d->hp, &wide)) return MOE_E_OVERFLOW;
        if (wide > SIZE_MAX / MOE__W) return MOE_E_OVERFLOW;
        m.lat = moe__take_floats(a, n, wide * MOE__W);
        if (m.training && resolved->score != MOE_SCORE_SUBSPACE) m.dlat = moe__take_floats(a, n, wide * MOE__W);
        m.inv = moe__take_floats(a, n, 1);
        m.inv_x = moe__take_floats(a, n, 1);
    }
    if (l->pre) m.xs = moe__take_floats(a, n, d->dp * MOE__W);
    if (l->cols != MOE__RAW) {
        m.cols = moe__take_floats(a, d->L, d->N);
        m.inv_col = moe__take_floats(a, d->N, 1);
        if (m.training) m.dcols = moe__take_floats(a, d->L, d->N);
    }
    if (soft) {
        m.soft = moe__take_floats(a, n, d->N);
        m.mix = moe__take_floats(a, n, d->N);
        m.dispatch = moe__take_floats(a, n, d->N);
    }
    m.bad = (unsigned char *)moe__take(a, moe__ceil_div(n, MOE__TOKENS), 1);
    m.group = (moe__group *)moe__take(a, groups, sizeof(moe__group));
    m.first = (size_t *)moe__take(a, groups + 1, sizeof(size_t));
    m.xg = moe__take_floats(a, merge ? 0 : routed, d->dp * MOE__W);
    m.h = moe__take_floats(a, m.n_rows, d->hp * MOE__W);
    m.o = moe__take_floats(a, m.n_rows, d->ldo);
    if (merge) m.merged = moe__take_floats(a, count, d->expert);
    if (resolved->combine == MOE_COMBINE_ROBUST) {
        s = moe_robust_weights_scratch(d->S, d->d, &m.robust_bytes);
        if (s) return s;
        m.robust_bytes += d->S * (sizeof(float *) + 3 * sizeof(float));
        m.robust_bytes = moe__ceil_div(m.robust_bytes + 64, 64) * 64;
        m.robust = (unsigned char *)moe__take(a, moe__ceil_div(n, MOE__TOKENS), m.robust_bytes);
        m.robust_weight = (float *)moe__take(a, routed, sizeof(float));
        m.reliability = (float *)moe__take(a, slots, sizeof(float));
    }
    if (m.training) {
        m.z = moe__take_floats(a, m.n_rows, d->zp * MOE__W);
        m.dlogits = moe__take_floats(a, n, d->E);
        m.dl = moe__take_floats(a, n, moe__max(d->np, d->ep) * MOE__W);
        m.slot_grad = moe__take_floats(a, n, d->S);
        m.part = moe__take_floats(a, m.n_rows, d->hp);
        m.dweight = moe__take_floats(a, slots, 1);
        size_t sequences = !n ? 0 : resolved->sequence ? moe__ceil_div(n, resolved->sequence) : 1, counts;
        if (!moe__mul(moe__max(sequences, 1), d->E, &counts)) return MOE_E_OVERFLOW;
        m.mean = (double *)moe__take(a, d->E, sizeof(double));
        m.mean2 = (double *)moe__take(a, d->E, sizeof(double));
        m.rank_prob = (double *)moe__take(a, resolved->n_ranks, sizeof(double));
        m.counts = (uint64_t *)moe__take(a, moe__max(counts, resolved->n_ranks), sizeof(uint64_t));
        if (d->ortho_loss) m.matrix = moe__take_floats(a, 2 * d->d, d->f);
        if (d->output_loss) {
            m.dout = moe__take_floats(a, routed, d->ldo);
            m.block_loss = (double *)moe__take(a, moe__ceil_div(n, MOE__TOKENS), sizeof(double));
            m.outputs = moe__take_floats(a, moe__ceil_div(n, MOE__TOKENS) * 2 * d->S, d->d);
        }
        if (d->jitter || d->by_sequence) m.dxr = moe__take_floats(a, n, d->d);
        if (merge) m.dmerged = moe__take_floats(a, count, d->expert);
        if (soft) {
            m.dsoft = moe__take_floats(a, n, d->N);
            m.dmix = moe__take_floats(a, n, d->N);
            m.ddispatch = moe__take_floats(a, n, d->N);
        }
    }
    if (resolved->n_codes) {
        s = moe__branch_layout(&m, resolved, n, a);
        if (s) return s;
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
    moe__dims s;
    if (!t) return MOE_E_NULL_TAPE;
    moe_status st = moe__dims_of(resolved, &s);
    if (st) return st;
    if (memcmp(&s, &t->memory->dims, sizeof s)) return MOE_E_TAPE_DESC;
    memset(j, 0, sizeof *j);
    j->d = resolved;
    j->dims = &t->memory->dims;
    j->kn = moe__k();
    j->t = t;
    j->m = t->memory;
    return MOE_OK;
}

/* What holds for this forward: the schedules' values, the one draw of gating dropout, what the selection sees. */
static void moe__now_begin(const moe__job *j) {
    const moe_desc *d = j->d;
    const moe_side *side = &j->t->side;
    moe__now *now = &j->m->now;
    float temperature = d->temperature, u;
    memset(now, 0, sizeof *now);
    now->training = !side->evaluate && d->training != MOE_OFF;
    now->sequence = d->sequence ? d->sequence : moe__max(j->t->n_tokens, 1);
    now->draw = side->draw;
    now->random = now->training && side->step < d->random_steps;
    now->k = d->top_k; /* the descs are resolved: these cannot fail */
    if (side->top_k) now->k = moe__min(side->top_k, d->top_k);
    else if (now->training && d->schedule_steps)
        (void)moe_schedule_k(d->schedule, side->step, d->schedule_steps, d->top_k_min, d->top_k, &now->k);
    if (d->temperature_end != 0.0f)
        (void)moe_schedule_temperature(d->schedule, side->step, d->schedule_steps, d->temperature, d->temperature_end, &temperature);
    if (side->temperature > 0.0f) temperature = side->temperature;
    now->prob_t = temperature;
    now->inv_t = now->prob_inv_t = 1.0f / temperature;
    const float *scale = moe__router_part(j, MOE__R_SCALE);
    if (scale) {
        float limit = *scale < 20.0f ? *scale : 20.0f; /* e^20: softer than this no float32 can tell */
        j->kn->exp(1, &limit, &now->inv_t);
        if (side->temperature > 0.0f) now->inv_t = 1.0f / temperature;
    }
    if (now->training && d->gate_drop > 0.0f) {
        moe__uniform_at(MOE__DRAW_KEY(j), moe__stream_of(0, MOE__USE_GATE_DROP), side->step, 1, 0.0f, 1.0f, &u);
        now->skip = u < d->gate_drop && d->gate_drop_experts == MOE_ON;
        now->local = u < d->gate_drop && !now->skip;
    }
    j->t->dropped = now->local || now->skip;
    if (now->random || now->local || side->bias) j->m->seen = j->m->sel;
    else j->m->seen = moe__selection_base(j);
}

/* -- tokens -- */
static void moe__jitter_row(const moe__job *j, size_t row, size_t t) { /* m->xr's row t times the numbers of `row` */
    float u[MOE__W];
    size_t d = j->dims->d, T = j->t->n_tokens;
    if (!j->dims->jitter || !j->m->now.training) return;
    for (size_t p = 0; p < j->dims->dp; p++) {
        size_t c = moe__min(MOE__W, d - p * MOE__W);
        moe__uniforms(j, MOE__USE_JITTER, (uint64_t)row * d + p * MOE__W, c, 1.0f - j->d->jitter, 1.0f + j->d->jitter, u);
        for (size_t l = 0; l < c; l++) j->m->xr[(p * T + t) * MOE__W + l] *= u[l];
    }
}
static void moe__pack_tokens(const moe__job *j, size_t t0, size_t t1) {
    size_t T = j->t->n_tokens;
    for (size_t p = 0; p < j->dims->dp; p++) {
        float *to = j->m->xp + (p * T + t0) * MOE__W;
        moe__fill_panel(j->x, j->dims->d, t0, t1 - t0, p * MOE__W, moe__min(MOE__W, j->dims->d - p * MOE__W), to);
        if (j->m->xr != j->m->xp && !j->dims->by_sequence) memcpy(j->m->xr + (p * T + t0) * MOE__W, to, (t1 - t0) * MOE__W * sizeof(float));
    }
    for (size_t t = t0; t < t1 && !j->dims->by_sequence; t++) moe__jitter_row(j, t, t);
}
static void moe__task_tokens(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    (void)worker;
    moe__pack_tokens(j, MOE__BLOCK_BEGIN(i), MOE__BLOCK_END(i, j->t->n_tokens));
}
static void moe__task_sequence(void *arg, size_t i, size_t worker) { /* i: a sequence; m->xr of its tokens = their mean */
    const moe__job *j = (const moe__job *)arg;
    size_t T = j->t->n_tokens, t0 = i * j->m->now.sequence, t1 = moe__min(T, t0 + j->m->now.sequence);
    (void)worker;
    for (size_t p = 0; p < j->dims->dp; p++) {
        float *mean = j->m->xr + (p * T + t0) * MOE__W;
        memset(mean, 0, MOE__W * sizeof(float));
        for (size_t t = t0; t < t1; t++) j->kn->axpy(MOE__W, 1.0f, j->m->xp + (p * T + t) * MOE__W, mean);
        for (size_t l = 0; l < MOE__W; l++) mean[l] = mean[l] / (float)(t1 - t0);
    }
    moe__jitter_row(j, i, t0);
    for (size_t p = 0; p < j->dims->dp; p++)
        for (size_t t = t0 + 1; t < t1; t++)
            memcpy(j->m->xr + (p * T + t) * MOE__W, j->m->xr + (p * T + t0) * MOE__W, MOE__W * sizeof(float));
}
/* dx += the gradient by xr, back through jitter and mean. i: a sequence, or a token alone */
static void moe__task_tokens_back(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t d = j->dims->d, one = j->dims->by_sequence ? j->m->now.sequence : MOE__TOKENS;
    size_t t0 = i * one, t1 = moe__min(j->t->n_tokens, t0 + one);
    int seq = (int)j->dims->by_sequence;
    float *g = j->m->dxr, u[MOE__W];
    (void)worker;
    for (size_t t = t0; t < t1; t++)
        for (size_t c = 0; c < d && j->dims->jitter && j->m->now.training; c += MOE__W) {
            size_t n = moe__min(MOE__W, d - c);
            moe__uniforms(j, MOE__USE_JITTER, (uint64_t)(seq ? i : t) * d + c, n, 1.0f - j->d->jitter, 1.0f + j->d->jitter, u);
            for (size_t l = 0; l < n; l++) g[t * d + c + l] *= u[l];
        }
    for (size_t t = t0 + 1; t < t1 && seq; t++) j->kn->axpy(d, 1.0f, g + t * d, g + t0 * d);
    for (size_t t = t0; t < t1; t++) j->kn->axpy(d, seq ? 1.0f / (float)(t1 - t0) : 1.0f, g + (seq ? t0 : t) * d, j->dx + t * d);
}

/* -- route -- */
static void moe__task_route(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens), E = j->dims->E;
    const moe__score_row *score = &moe__scores[j->d->score];
    float *z = j->t->logits;
    (void)worker;
    score->forward(j, t0, t1);
    j->m->bad[i] = (unsigned char)(j->m->soft && !moe__all_finite((t1 - t0) * j->dims->N, j->m->soft + t0 * j->dims->N));
    for (size_t p = 0; p < j->dims->dp && score->blind; p++)
        j->m->bad[i] |= (unsigned char)!moe__all_finite((t1 - t0) * MOE__W, j->m->xp + (p * j->t->n_tokens + t0) * MOE__W);
    if (j->m->bad[i]) return;
    if (j->m->soft) moe__soft_weights(j, t0, t1);
    moe__residual_add(j, t0, t1);
    moe__noise_add(j, t0, t1);
    for (size_t k = t0 * E; k < t1 * E && score->relu; k++) z[k] = z[k] < 0.0f ? 0.0f : z[k];
    j->m->bad[i] = (unsigned char)!moe__all_finite((t1 - t0) * E, z + t0 * E);
    if (j->m->bad[i]) return;
    for (size_t t = t0; t < t1; t++) j->kn->softmax(E, j->m->now.prob_inv_t, z + t * E, j->t->prob + t * E);
    moe__gate_scores(j, t0, t1);
    moe__select_view(j, t0, t1);
    if (!moe__selects[j->d->select].select) return;
    moe__selects[j->d->select].select(j, t0, t1);
    moe__select_filter(j, t0, t1);
    moe__weights(j, t0, t1);
}
static void moe__task_pack_route(void *arg, size_t i, size_t worker) {
    moe__task_tokens(arg, i, worker);
    moe__task_route(arg, i, worker);
}
static void moe__task_weights(void *arg, size_t i, size_t worker) { /* after a selection over the whole batch */
    const moe__job *j = (const moe__job *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens);
    (void)worker;
    moe__select_filter(j, t0, t1);
    moe__weights(j, t0, t1);
}

static moe_status moe__tokens_begin(moe__job *j, const moe_desc *resolved, moe_tape *t, const float *x, size_t n) {
    moe_status s = moe__job_begin(j, resolved, t);
    if (s) return s;
    if (n > t->memory->max_tokens) return MOE_E_N_TOKENS;
    if (n && !x) return MOE_E_NULL_X;
    t->memory->state = 0;
    if (t->memory->branch) t->memory->branch->ready = 0;
    t->n_tokens = n;
    t->routes.n_tokens = t->routes.n_routes = 0;
    j->x = x;
    return MOE_OK;
}

static size_t moe__capacity(const moe_desc *d, size_t n_tokens, int training) {
    float factor = training ? d->capacity_factor : d->capacity_factor_eval;
    if (factor < 0.0f || !n_tokens) return 0;
    double c = (double)factor * (double)d->top_k * (double)moe__ceil_div(n_tokens, d->n_experts);
    return c >= (double)n_tokens ? 0 : moe__max(1, (size_t)c);
}

static moe_status moe__route(const moe_desc *d, const float *router, const float *x, size_t n, moe_tape *t) {
    moe__job j;
    moe_status s = moe__tokens_begin(&j, d, t, x, n);
    if (s) return s;
    if (!router && j.dims->at[MOE__R_COUNT]) return MOE_E_NULL_PARAMS;
    if (d->score == MOE_SCORE_SUBSPACE && !t->side.experts) return MOE_E_NULL_EXPERTS;
    j.router = router;
    moe__now_begin(&j);
    if (d->select == MOE_SELECT_AUCTION && j.m->now.training && n % d->n_experts) return MOE_E_UNEVEN;
    /* the common case in one pass over the tokens; what prepares over the whole batch needs all of them first */
    int one_pass = j.m->xr == j.m->xp && moe__latents[d->score].act == MOE__RAW && d->noise != MOE_NOISE_LEARNED;
    if (!one_pass) moe__run_blocks(&j, moe__task_tokens, &j);
    if (j.dims->by_sequence) moe_run(&d->parallel, moe__sequences(&j), moe__task_sequence, &j);
    if (moe__scores[d->score].prepare) moe__scores[d->score].prepare(&j);
    if (d->noise == MOE_NOISE_LEARNED) { /* its matrix and the score's share a place */
        moe__noise_prepare(&j);
        if (moe__latent_score(d->score)) {
            moe__map v = moe__latent_map(&j, 0);
            moe__map_pack(&v);
        }
    }
    moe__run_blocks(&j, one_pass ? moe__task_pack_route : moe__task_route, &j);
    for (size_t i = 0; i < moe__ceil_div(n, MOE__TOKENS); i++)
        if (t->memory->bad[i]) return MOE_E_NAN_X;
    if (j.m->soft) moe_run(&d->parallel, moe__sequences(&j), moe__task_dispatch_weights, &j);
    if (moe__selects[d->select].batch && n) {
        s = moe__selects[d->select].batch(&j);
        if (s) return s;
        moe__run_blocks(&j, moe__task_weights, &j);
    }
    s = moe__routes_fill(&t->routes, n, t->index, t->weight, moe__capacity(d, n, j.m->now.training), d->capacity_order);
    if (!s) t->memory->state = MOE__STATE_TOKENS | MOE__STATE_ROUTED;
    return s;
}

static void moe__task_slot_grad(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    size_t t0 = MOE__BLOCK_BEGIN(i), t1 = MOE__BLOCK_END(i, j->t->n_tokens), S = j->dims->S, E = j->dims->E;
    (void)worker;
    for (size_t p = t0 * S; p < t1 * S; p++) {
        uint32_t route = j->t->routes.slot[p];
        j->m->slot_grad[p] = j->dweight && route != MOE_NONE ? j->dweight[route] : 0.0f;
    }
    memset(j->m->dlogits + t0 * E, 0, (t1 - t0) * E * sizeof(float));
}
static void moe__task_gate_back(void *arg, size_t i, size_t worker) {
    const moe__job *j = (const moe__job *)arg;
    (void)worker;
    if (!j->m->soft) moe__weights_back(j, MOE__BLOCK_BEGIN(i), MOE__BLOCK_END(i, j->t->n_tokens));
}

static moe_status moe__route_backward(const moe_desc *d, const float *router, moe_tape *t, const float *dweight, const uint64_t *load,
                                      float *drouter, float *dx) {
    moe__job j;
    moe_status s = moe__job_begin(&j, d, t);
    if (s) return s;
    if (!router && j.dims->at[MOE__R_COUNT]) return MOE_E_NULL_PARAMS;
    if (!(t->memory->state & MOE__STATE_ROUTED) || !t->memory->training) return MOE_E_NO_FORWARD;
    size_t E = j.dims->E, n = t->n_tokens;
    float *z = t->logits;
    j.router = router;
    j.dweight = dweight;
    s = moe__losses_check(d);
    if (s) return s;
    j.mean = t->memory->mean;
    s = moe_mean_scores(n, E, t->prob, t->memory->mean);
    if (s) return s;
    j.drouter = d->freeze_router == MOE_ON ? NULL : drouter;
    j.dx = dx && j.m->dxr ? j.m->dxr : dx;
    if (!load) load = t->side.load ? t->side.load : t->routes.load;
    for (int i = 0; i < MOE_LOSS_COUNT; i++) t->loss[i] = 0.0;
    moe__run_blocks(&j, moe__task_slot_grad, &j);
    s = moe__losses_add(&j, load, MOE__LOSS_ON_WEIGHTS);
    if (s) return s;
    moe__run_blocks(&j, moe__task_gate_back, &j);
    if (!j.m->soft) moe__gate_params_back(&j);
    else if (dweight) {
        float *dscale = moe__router_grad(&j, MOE__R_SCALE);
        moe_run(&d->parallel, moe__sequences(&j), moe__task_soft_back, &j);
        for (size_t i = 0; dscale && i < n; i++) *dscale += j.kn->dot(j.dims->N, j.m->dsoft + i * j.dims->N, j.m->soft + i * j.dims->N);
    } else memset(j.m->dsoft, 0, n * j.dims->N * sizeof(float));
    s = moe__losses_add(&j, load, MOE__LOSS_ON_LOGITS);
    if (s) return s;
    if (j.m->soft) moe__soft_losses_back(&j);
    for (size_t i = 0; i < n * E && moe__scores[d->score].relu; i++)
        if (!(z[i] > 0.0f)) j.m->dlogits[i] = 0.0f;
    moe__residual_backward(&j);
    moe__noise_backward(&j);
    s = moe__losses_add(&j, load, MOE__LOSS_ON_NOISE);
    if (s) return s;
    if (j.m->dxr && j.dx) memset(j.m->dxr, 0, n * j.dims->d * sizeof(float));
    if (moe__scores[d->score].backward) moe__scores[d->score].backward(&j);
    moe__noise_backward_map(&j);
    if (!dx || !j.m->dxr) return MOE_OK;
    j.dx = dx;
    moe_run(&d->parallel, j.dims->by_sequence ? moe__sequences(&j) : moe__ceil_div(n, MOE__TOKENS), moe__task_tokens_back, &j);
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
    moe_routes *r = &t->routes;
    if (!(t->memory->state & MOE__STATE_TOKENS) || r->n_tokens != t->n_tokens) return MOE_E_NO_ROUTES;
    if (d->combine == MOE_COMBINE_SOFT && !(t->memory->state & MOE__STATE_ROUTED)) return MOE_E_NO_ROUTES; /* the slots' weights */
    if (d->combine != MOE_COMBINE_SOFT && d->combine != MOE_COMBINE_MERGE && r->n_routes > t->memory->n_routed) return MOE_E_N_TOKENS;
    if (t->n_tokens && !y) return MOE_E_NULL_Y;
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
    moe__now_begin(&j);
    moe__run_blocks(&j, moe__task_tokens, &j);
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
    if (!st) *n_floats = s.experts;
    return st;
}
MOE_API moe_status moe_router_count(const moe_desc *d, size_t *n_floats) {
    moe_desc r;
    moe__dims s;
    if (!n_floats) return MOE_E_NULL_OUT;
    moe_status st = moe_desc_resolve(d, &r);
    if (!st) st = moe__dims_of(&r, &s);
    if (!st) *n_floats = s.at[MOE__R_COUNT];
    return st;
}
MOE_API moe_status moe_desc_tensor(const moe_desc *d, size_t i, moe_tensor *out) {
    moe_desc r;
    moe__dims s;
    int id;
    if (!out) return MOE_E_NULL_OUT;
    moe_status st = moe_desc_resolve(d, &r);
    if (!st) st = moe__dims_of(&r, &s);
    return st ? st : moe__tensor_at(&r, &s, i, &id, out) ? MOE_OK : MOE_E_NAME;
}

/* -- tensors: where element (row, column) of an expert's matrix stands in its block -- */
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
    uint64_t step, draws;           /* optimiser steps, training forwards */
    moe_tape *tape;
    moe_side side;
    double loss[MOE_LOSS_COUNT];
    moe_health health;
    moe_control control;
    uint64_t *load, selected, dropped, zeros, scores; /* of the backward calls since the last step: load (E) */
    void *own;
};
static float *moe__layer_router(const moe_layer *m, moe_part part) { return m->part[part] ? m->part[part] + m->dims.experts : NULL; }

/* The loss whose coefficient a controller sets. */
static int moe__controlled_loss(const moe_desc *d) { return d->controller == MOE_CONTROL_RELU_LAMBDA ? MOE_LOSS_RELU_L1 : MOE_LOSS_SWITCH; }
static void moe__count_begin(moe_layer *m) {
    memset(m->load, 0, m->dims.E * sizeof(uint64_t));
    m->selected = m->dropped = m->zeros = m->scores = 0;
}
/* One backward's share of what the controller reads. */
static void moe__count_add(moe_layer *m, const moe_tape *t) {
    size_t n = t->n_tokens * m->dims.E;
    if (m->d.controller == MOE_CONTROL_NONE) return;
    for (size_t e = 0; e < m->dims.E; e++) m->load[e] += t->routes.load[e];
    m->selected += t->routes.n_routes + t->routes.n_dropped;
    m->dropped += t->routes.n_dropped;
    m->scores += n;
    for (size_t i = 0; i < n && m->d.gate == MOE_GATE_RELU; i++) m->zeros += !(t->scores[i] > 0.0f);
}
static moe_status moe__control_layer(moe_layer *m) {
    moe_control_input in;
    memset(&in, 0, sizeof in);
    in.load = m->load;
    in.top_k = m->d.top_k;
    if (m->tape && m->d.controller == MOE_CONTROL_QUANTILE) in.scores = m->tape->scores, in.n_tokens = m->tape->n_tokens;
    in.sparsity = m->scores ? (double)m->zeros / (double)m->scores : 1.0 - (double)in.top_k / (double)m->dims.E;
    in.drop_rate = m->selected ? (double)m->dropped / (double)m->selected : 0.0;
    in.alloc_context = m->d.alloc_context;
    moe_status s = moe_control_step(&m->control, &in);
    if (!s && m->control.coefficient) m->d.loss[moe__controlled_loss(&m->d)] = *m->control.coefficient;
    return s;
}

static moe_status moe__layer_layout(moe_layer *m, const moe_desc *resolved, moe__arena *a) {
    memset(m, 0, sizeof *m);
    m->d = *resolved;
    m->fresh = 1;
    moe_status s = moe__dims_of(resolved, &m->dims);
    if (s) return s;
    m->n_floats = m->dims.experts + m->dims.at[MOE__R_COUNT];
    (void)moe__take(a, 1, sizeof(moe_layer));
    for (int i = 0; i < MOE__PART_COUNT; i++) {
        if (i > 0 && resolved->training == MOE_OFF) continue;
        if (i == MOE_PART_MOMENT2 && resolved->optimizer == MOE_OPTIMIZER_SGD) continue;
        m->part[i] = (float *)moe__take(a, m->n_floats, sizeof(float));
    }
    m->load = (uint64_t *)moe__take(a, m->dims.E, sizeof(uint64_t));
    s = moe__health_layout(&m->health, m->dims.E, a);
    if (!s) s = moe__control_layout(&m->control, resolved->controller, m->dims.E, a);
    if (s || a->overflow || !a->base) return s ? s : a->overflow ? MOE_E_OVERFLOW : MOE_OK;
    moe__count_begin(m);
    if (resolved->controller_rate > 0.0f) m->control.rate = resolved->controller_rate;
    if (resolved->controller_damping != 0.0f) m->control.damping = moe__value(resolved->controller_damping, 0.0f);
    m->side.bias = m->control.bias;
    if (m->control.coefficient) *m->control.coefficient = resolved->loss[moe__controlled_loss(resolved)];
    return MOE_OK;
}

/* n vectors of length `rows`, element r of vector v at x[v * apart + r * step]: made orthogonal in order, as far as there
 * are dimensions (modified Gram-Schmidt, twice for what the first round leaves); unit: and of that length, 0 = as they are.
 * A vector that vanishes stays zero. */
static void moe__orthogonalize(float *x, size_t n, size_t rows, size_t (*at)(const void *, size_t, size_t), const void *shape, float unit) {
    for (size_t v = 0; v < n; v++) {
        double before = 0.0, after = 0.0;
        for (size_t r = 0; r < rows; r++) before += (double)x[at(shape, v, r)] * (double)x[at(shape, v, r)];
        for (int round = 0; round < 2; round++)
            for (size_t u = v >= rows ? v / rows * rows : 0; u < v; u++) {
                double along = 0.0, square = 0.0;
                for (size_t r = 0; r < rows; r++) {
                    along += (double)x[at(shape, u, r)] * (double)x[at(shape, v, r)];
                    square += (double)x[at(shape, u, r)] * (double)x[at(shape, u, r)];
                }
                if (!(square > 0.0)) continue;
                for (size_t r = 0; r < rows; r++)
                    x[at(shape, v, r)] = (float)((double)x[at(shape, v, r)] - along / square * (double)x[at(shape, u, r)]);
            }
        for (size_t r = 0; r < rows; r++) after += (double)x[at(shape, v, r)] * (double)x[at(shape, v, r)];
        double scale = !(after > 1e-12 * before) ? 0.0 : unit > 0.0f ? (double)unit / sqrt(after) : 1.0;
        for (size_t r = 0; r < rows; r++) x[at(shape, v, r)] = (float)((double)x[at(shape, v, r)] * scale);
    }
}
static size_t moe__at_w1(const void *dims, size_t v, size_t r) { return moe__locate((const moe__dims *)dims, MOE__W1, r, v); }
static size_t moe__at_w2(const void *dims, size_t v, size_t r) { return moe__locate((const moe__dims *)dims, MOE__W2, v, r); }
static size_t moe__at_router(const void *dims, size_t v, size_t r) { return r * ((const moe__dims *)dims)->N + v; }
/* Puts an orthonormal expert back onto its bases: V's columns of length 1, W2's rows orthogonal with the lengths that they have. */
static void moe__task_retract(void *arg, size_t e, size_t worker) {
    const moe_layer *m = (const moe_layer *)arg;
    float *block = m->part[MOE_PART_PARAMS] + e * m->dims.expert;
    (void)worker;
    moe__orthogonalize(block, m->dims.f, m->dims.d, moe__at_w1, &m->dims, 1.0f);
    moe__orthogonalize(block, m->dims.f, m->dims.d, moe__at_w2, &m->dims, 0.0f);
}

/* Initial parameters: uniform in +-1/sqrt(fan-in); element i of tensor t of expert e is number i of stream (e, t). */
static void moe__task_init(void *arg, size_t e, size_t worker) {
    moe_layer *m = (moe_layer *)arg;
    const moe__dims *d = &m->dims;
    (void)worker;
    for (int t = 0; t < MOE__TENSORS; t++) {
        size_t rows = moe__tensor_rows(d, t), cols = moe__tensor_cols(d, t), fan = t == MOE__W2 || t == MOE__B2 ? d->f : d->d;
        float bound = 1.0f / sqrtf((float)fan), chunk[256];
        if (!moe__tensor_there(d, t) || ((t == MOE__W2 || t == MOE__B2) && m->d.zero_output == MOE_ON)) continue;
        for (size_t r = 0; r < rows; r++)
            for (size_t c = 0; c < cols; c += 256) {
                size_t n = moe__min(256, cols - c);
                moe__uniform_at(m->d.seed, (uint64_t)e * 16 + (uint64_t)t + 1, (uint64_t)(r * cols + c), n, -bound, bound, chunk);
                moe__tensor_set(d, t, m->part[0] + e * d->expert, r, c, n, chunk);
            }
    }
    if (m->d.expert == MOE_EXPERT_ORTHONORMAL) moe__task_retract(arg, e, worker);
}
/* The router's: uniform likewise by their rows; tensor `part` has stream -part, the constant experts' the next two. Learned
 * thresholds, biases, noise, the branch's and constant gates begin at 0 [C]; codes in +-1/n_codes [C]. */
static void moe__init_router(moe_layer *m) {
    const moe__dims *d = &m->dims;
    float *block = moe__layer_router(m, MOE_PART_PARAMS);
    for (int part = 0; part < MOE__R_COUNT; part++) {
        float *p = block + d->at[part], bound = 1.0f / sqrtf((float)(part == MOE__R_ROUTER ? d->L : part == MOE__R_RESIDUAL ? d->E : d->d));
        size_t n = d->at[part + 1] - d->at[part];
        if (!n) continue;
        if (part == MOE__R_SCALE) p[0] = -moe__logf1(m->d.temperature);
        if (part == MOE__R_CODEBOOK) bound = 1.0f / (float)d->codes;
        if (part == MOE__R_ROUTER) {
            if (m->d.router_init == MOE_INIT_ZERO) continue;
            if (m->d.router_init == MOE_INIT_UNIFORM && m->d.router_gain != 1.0f) bound = bound * m->d.router_gain;
        } else if (part != MOE__R_PROJ && part != MOE__R_RESIDUAL && part != MOE__R_CODEBOOK) continue;
        moe__uniform_at(m->d.seed, (uint64_t)0 - (uint64_t)part, 0, n, -bound, bound, p);
        if (part == MOE__R_ROUTER && m->d.router_init == MOE_INIT_ORTHOGONAL)
            moe__orthogonalize(p, d->N, d->L, moe__at_router, d, m->d.router_gain);
    }
    float *constant = m->part[MOE_PART_PARAMS] + d->special + d->constants * 2 * d->d, bound = 1.0f / sqrtf((float)d->d);
    moe__uniform_at(m->d.seed, (uint64_t)0 - MOE__R_COUNT, 0, d->constants * d->d, -bound, bound, constant);
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
    moe__run_work(&resolved->parallel, m.dims.G, m.dims.expert, m.dims.G, moe__task_init, layer);
    moe__init_router(layer);
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

/* LN of one row of n, in place allowed; returns 1 / the standard deviation, 0 for a constant row. And its backward, in place. */
static float moe__ln(const moe__kernels *kn, size_t n, const float *x, float *y) {
    float mean = 0.0f, square, inv = 0.0f;
    for (size_t i = 0; i < n; i++) mean += x[i];
    mean = mean / (float)n;
    for (size_t i = 0; i < n; i++) y[i] = x[i] - mean;
    square = kn->dot(n, y, y) / (float)n;
    if (square >= FLT_MIN) inv = 1.0f / sqrtf(square);
    for (size_t i = 0; i < n; i++) y[i] *= inv;
    return inv;
}
static void moe__ln_back(const moe__kernels *kn, size_t n, const float *y, float inv, float *dy) {
    float mean = 0.0f, along = kn->dot(n, y, dy) / (float)n;
    for (size_t i = 0; i < n; i++) mean += dy[i];
    mean = mean / (float)n;
    for (size_t i = 0; i < n; i++) dy[i] = moe__fma(-along, y[i], dy[i] - mean) * inv;
}

typedef struct moe__branch_job {
    const moe_layer *m;
    moe_tape *t;
    moe__branch *b;
    const float *x, *router, *dy;
    float *y, *dx;
} moe__branch_job;
static void moe__task_branch_codes(void *arg, size_t i, size_t worker) { /* nearest code, its LN, the two weights */
    const moe__branch_job *j = (const moe__branch_job *)arg;
    const moe__dims *s = &j->m->dims;
    const moe__kernels *kn = moe__k();
    const float *codebook = j->router + s->at[MOE__R_CODEBOOK], *gate = j->router + s->at[MOE__R_BRANCH];
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        const float *x = j->x + t * s->d;
        float best = 0.0f, z[2] = {0.0f, 0.0f};
        for (size_t c = 0; c < s->codes; c++) { /* |x - C|^2 without |x|^2 */
            float far = moe__fma(-2.0f, kn->dot(s->d, x, codebook + c * s->d), j->b->square[c]);
            if (!c || far < best) best = far, j->b->code[t] = (int32_t)c;
        }
        j->b->expert[t] = (int32_t)((size_t)j->b->code[t] % s->E);
        memcpy(j->b->u + t * s->d, j->b->codes + (size_t)j->b->code[t] * s->d, s->d * sizeof(float));
        for (size_t c = 0; c < s->d; c++)
            for (size_t k = 0; k < 2; k++) z[k] = moe__fma(x[c], gate[c * 2 + k], z[k]);
        kn->softmax(2, 1.0f, z, j->b->g + t * 2);
    }
}
static void moe__task_branch_mix(void *arg, size_t i, size_t worker) { /* v = LN(o); y = g_0 y + g_1 v */
    const moe__branch_job *j = (const moe__branch_job *)arg;
    size_t d = j->m->dims.d;
    const moe__kernels *kn = moe__k();
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        float *y = j->y + t * d, *v = j->b->v + t * d;
        j->b->inv_v[t] = moe__ln(kn, d, v, v);
        memcpy(j->b->y + t * d, y, d * sizeof(float));
        for (size_t c = 0; c < d; c++) y[c] *= j->b->g[t * 2];
        kn->axpy(d, j->b->g[t * 2 + 1], v, y);
    }
}
static moe_status moe__branch_forward(const moe_layer *m, moe_tape *t, const float *x, float *y) {
    moe__branch *b = t->memory->branch;
    moe__branch_job j = {m, t, b, x, moe__layer_router(m, MOE_PART_PARAMS), NULL, y, NULL};
    const moe__dims *s = &m->dims;
    const moe__kernels *kn = moe__k();
    size_t blocks = moe__ceil_div(t->n_tokens, MOE__TOKENS);
    for (size_t c = 0; c < s->codes; c++) {
        const float *code = j.router + s->at[MOE__R_CODEBOOK] + c * s->d;
        b->square[c] = kn->dot(s->d, code, code);
        b->inv_code[c] = moe__ln(kn, s->d, code, b->codes + c * s->d);
    }
    moe_run(&m->d.parallel, blocks, moe__task_branch_codes, &j);
    if (b->x && t->n_tokens) memcpy(b->x, x, t->n_tokens * s->d * sizeof(float));
    b->ready = 1;
    moe_desc d = moe__branch_desc(&m->d);
    moe_status st = moe_tape_tokens(&d, b->tape, b->u, t->n_tokens);
    if (!st) st = moe__routes_fill(&b->tape->routes, t->n_tokens, b->expert, NULL, 0, MOE_ORDER_TOKEN);
    if (!st) st = moe__forward_experts(&b->tape->memory->d, m->part[MOE_PART_PARAMS], b->tape, b->v);
    if (!st) moe_run(&m->d.parallel, blocks, moe__task_branch_mix, &j);
    return st;
}
static void moe__task_branch_split(void *arg, size_t i, size_t worker) { /* dx += through the weights; dy, dv of the branches */
    const moe__branch_job *j = (const moe__branch_job *)arg;
    size_t d = j->m->dims.d;
    const moe__kernels *kn = moe__k();
    const float *gate = j->router + j->m->dims.at[MOE__R_BRANCH];
    (void)worker;
    for (size_t t = MOE__BLOCK_BEGIN(i); t < MOE__BLOCK_END(i, j->t->n_tokens); t++) {
        const float *dy = j->dy + t * d;
        float *g = j->b->g + t * 2, *ya = j->b->dy + t * d, *v = j->b->dv + t * d;
        float dg[2] = {kn->dot(d, dy, j->b->y + t * d), kn->dot(d, dy, j->b->v + t * d)}, mean = moe__fma(g[0], dg[0], g[1] * dg[1]);
        for (size_t c = 0; c < d; c++) ya[c] = g[0] * dy[c], v[c] = g[1] * dy[c];
        moe__ln_back(kn, d, j->b->v + t * d, j->b->inv_v[t], v);
        for (size_t k = 0; k < 2; k++) g[k] = g[k] * (dg[k] - mean); /* now the gradient by the gate's logits */
        for (size_t c = 0; j->dx && c < d; c++)
            j->dx[t * d + c] = moe__fma(g[0], gate[c * 2], moe__fma(g[1], gate[c * 2 + 1], j->dx[t * d + c]));
    }
}
/* The gradient of y for the other branch; this one's waits in dv. */
static const float *moe__branch_split(moe_layer *m, moe_tape *t, const float *dy, float *dx) {
    moe__branch *b = t->memory->branch;
    moe__branch_job j = {m, t, b, NULL, moe__layer_router(m, MOE_PART_PARAMS), dy, NULL, dx};
    float *dgate = moe__layer_router(m, MOE_PART_GRADS) + m->dims.at[MOE__R_BRANCH];
    size_t T = t->n_tokens;
    moe_run(&m->d.parallel, moe__ceil_div(T, MOE__TOKENS), moe__task_branch_split, &j);
    for (size_t i = 0; i < T && m->d.freeze_router != MOE_ON; i++)
        for (size_t c = 0; c < m->dims.d; c++)
            for (size_t k = 0; k < 2; k++) {
                float x = t->memory->xp[(c / MOE__W * T + i) * MOE__W + c % MOE__W];
                dgate[c * 2 + k] = moe__fma(x, b->g[i * 2 + k], dgate[c * 2 + k]);
            }
    return b->dy;
}
static moe_status moe__branch_backward(moe_layer *m, moe_tape *t, float *dx) {
    moe__branch *b = t->memory->branch;
    const moe__kernels *kn = moe__k();
    size_t d = m->dims.d, n = t->n_tokens;
    memset(b->u, 0, n * d * sizeof(float));
    moe_status s =
        moe__backward_experts(&b->tape->memory->d, m->part[MOE_PART_PARAMS], b->tape, b->dv, 0, m->part[MOE_PART_GRADS], NULL, b->u);
    for (size_t i = 0; i < n && !s && dx; i++) { /* back through LN(C_j), and straight through to x */
        size_t c = (size_t)b->code[i];
        moe__ln_back(kn, d, b->codes + c * d, b->inv_code[c], b->u + i * d);
        kn->axpy(d, 1.0f, b->u + i * d, dx + i * d);
    }
    return s;
}

MOE_API moe_status moe_forward_tape(const moe_layer *m, moe_tape *t, const float *x, size_t n, float *y) {
    if (!m) return MOE_E_NULL_LAYER;
    if (!t) return MOE_E_NULL_TAPE;
    if (n && !y) return MOE_E_NULL_Y;
    t->side.step = m->step;
    t->side.bias = m->side.bias;
    t->side.experts = m->part[MOE_PART_PARAMS];
    t->side.d_experts = m->part[MOE_PART_GRADS];
    moe_status s = moe__route(&m->d, moe__layer_router(m, MOE_PART_PARAMS), x, n, t);
    if (!s) s = moe__forward_experts(&m->d, m->part[MOE_PART_PARAMS], t, y);
    return s || !m->dims.codes ? s : moe__branch_forward(m, t, x, y);
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
    if (!s) s = moe__losses_check(&m->d);
    if (s) return s;
    if (dx) memset(dx, 0, t->n_tokens * m->dims.d * sizeof(float));
    if (m->fresh) memset(drouter, 0, m->dims.at[MOE__R_COUNT] * sizeof(float));
    if (m->dims.codes) dy = moe__branch_split(m, t, dy, dx);
    s = moe__backward_experts(&m->d, m->part[MOE_PART_PARAMS], t, dy, m->fresh, m->part[MOE_PART_GRADS], t->memory->dweight, dx);
    if (s) return s;
    m->fresh = 0;
    s = moe__route_backward(&m->d, moe__layer_router(m, MOE_PART_PARAMS), t, t->memory->dweight, NULL, drouter, dx);
    if (!s && m->dims.codes) s = moe__branch_backward(m, t, dx);
    memcpy(m->loss, t->loss, sizeof m->loss);
    if (!s) moe__count_add(m, t);
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
    m->tape->side = m->side;
    m->tape->side.draw = m->draws;
    moe_status s = moe_forward_tape(m, m->tape, x, n, y);
    if (s) return s;
    if (m->tape->memory->now.training) m->draws++;
    return moe_health_add(&m->health, &m->tape->routes, m->tape->prob);
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

/* Floats [*at, end) of the layer, with weight decay or without; *at = end. */
static moe_status moe__step_span(moe_layer *m, moe_optimizer_args *o, size_t *at, size_t end, int decay) {
    size_t from = *at;
    float *v = m->part[MOE_PART_MOMENT2];
    *at = end;
    o->weight_decay = decay ? m->d.weight_decay : (float)MOE_OFF;
    return moe_optimizer_step(o, end - from, m->part[0] + from, m->part[1] + from, m->part[2] + from, v ? v + from : NULL);
}

MOE_API moe_status moe_step(moe_layer *m, float lr) {
    double norm;
    moe_status s = moe_layer_grad_norm(m, &norm);
    if (s) return s;
    if (!(lr >= 0.0f) || !moe__finite(lr)) return MOE_E_LR;
    if (!(norm < (double)FLT_MAX)) return MOE_E_NAN_GRADS;
    s = moe__control_layer(m); /* the only thing here that may still fail comes first */
    if (s) return s;
    moe__count_begin(m);
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
    /* runs of floats that share weight decay: the experts' matrices between their biases, then the constant experts, then
     * the router's tensors, of which a frozen router's are left alone */
    size_t at = 0, cut[4] = {d->b1, d->w2, d->b2, d->expert};
    for (size_t g = 0; g < d->G && d->bias && !s; g++)
        for (int i = 0; i < 4 && !s; i++)
            s = moe__step_span(m, &o, &at, g * d->expert + cut[i], i % 2 == 0);
    if (!s) s = moe__step_span(m, &o, &at, d->experts, 1);
    for (int part = 0; part < MOE__R_COUNT && !s; part++) {
        int matrix =
            part == MOE__R_ROUTER || part == MOE__R_PROJ || part == MOE__R_NOISE || part == MOE__R_RESIDUAL || part == MOE__R_BRANCH;
        if (m->d.freeze_router == MOE_ON) at = d->experts + d->at[part + 1];
        else s = moe__step_span(m, &o, &at, d->experts + d->at[part + 1], matrix);
    }
    if (s) return s;
    if (m->d.expert == MOE_EXPERT_ORTHONORMAL) moe__run_work(&m->d.parallel, d->G, d->f * d->f * d->d * 4, d->G, moe__task_retract, m);
    m->step++;
    m->fresh = 1;
    return MOE_OK;
}

MOE_API double moe_desc_ecology(const moe_desc *d) {
    moe_desc r;
    if (moe_desc_resolve(d, &r)) return moe_ecology_number(-1.0, 0.0, 0.0, 0.0); /* NaN */
    double on[4] = {(double)r.loss[MOE_LOSS_ENTROPY], (double)r.loss[MOE_LOSS_ORACLE], (double)r.loss[MOE_LOSS_KL_UNIFORM],
                    (double)r.loss[MOE_LOSS_SWITCH]};
    for (int i = 0; i < 4; i++)
        if (on[i] < 0.0) on[i] = 0.0; /* off */
    return moe_ecology_number((double)r.temperature, on[0], on[1], on[2] > on[3] ? on[2] : on[3]);
}
MOE_API moe_side *moe_layer_side(moe_layer *m) { return m ? &m->side : NULL; }
MOE_API moe_control *moe_layer_control(moe_layer *m) { return m ? &m->control : NULL; }
MOE_API uint64_t *moe_layer_step_load(moe_layer *m) { return m ? m->load : NULL; }
MOE_API const moe_desc *moe_layer_desc(const moe_layer *m) { return m ? &m->d : NULL; }
MOE_API const moe_tape *moe_layer_tape(const moe_layer *m) { return m ? m->tape : NULL; }
static size_t moe__expert_params(const moe__dims *d) {
    return d->d * d->f * (d->gated ? 3 : 2) + (d->bias ? d->f * (d->gated ? 2 : 1) + d->d : 0);
}
MOE_API size_t moe_layer_params(const moe_layer *m) {
    return m ? m->dims.G * moe__expert_params(&m->dims) + m->dims.experts - m->dims.special + m->dims.at[MOE__R_COUNT] : 0;
}
MOE_API size_t moe_layer_active_params(const moe_layer *m) {
    if (!m) return 0;
    const moe__dims *d = &m->dims;
    size_t used = m->d.combine == MOE_COMBINE_MERGE  ? 1
                  : m->d.combine == MOE_COMBINE_SOFT ? d->F
                                                     : moe__min(d->F, m->d.top_k + (d->codes != 0));
    return (used + d->G - d->F) * moe__expert_params(d) + d->at[MOE__R_COUNT];
}
/* The experts that are networks, all of them, on every token. */
MOE_API moe_status moe_layer_pes(const moe_layer *m, const float *x, size_t n, double *pes) {
    if (!m) return MOE_E_NULL_LAYER;
    if (n && !x) return MOE_E_NULL_X;
    if (!pes) return MOE_E_NULL_OUT;
    enum { CHUNK = 64 };
    moe_desc b = moe__branch_desc(&m->d);
    size_t d = m->dims.d, F = m->dims.F, most = moe__max(1, moe__min(n, CHUNK)), rows, bytes;
    moe_tape *t = NULL;
    moe__arena a = {NULL, 0, 0};
    void *memory = NULL;
    double sum = 0.0, part;
    b.n_experts = b.top_k = F;
    if (!moe__mul(most, F, &rows)) return MOE_E_OVERFLOW;
    moe_status s = moe_tape_new(&t, &b, most, MOE_OFF);
    for (int pass = 0; pass < 2 && !s; pass++) { /* measured, then laid out */
        if (pass) {
            memory = moe__alloc(b.alloc_context, bytes);
            if (!memory || moe__arena_over(&a, memory, bytes, bytes)) { s = MOE_E_NO_MEMORY; break; }
        }
        float *y = moe__take_floats(&a, most, d), *out = moe__take_floats(&a, rows, d);
        int32_t *index = (int32_t *)moe__take(&a, rows, sizeof(int32_t));
        double *work = (double *)moe__take(&a, F, sizeof(double));
        s = moe__arena_bytes(&a, &bytes);
        if (!pass || s) continue;
        for (size_t i = 0; i < rows; i++) index[i] = (int32_t)(i % F);
        for (size_t at = 0; at < n && !s; at += CHUNK) {
            size_t count = moe__min(CHUNK, n - at);
            s = moe_tape_tokens(&b, t, x + at * d, count);
            if (!s) s = moe__routes_fill(&t->routes, count, index, NULL, 0, MOE_ORDER_TOKEN);
            if (!s) s = moe_experts_forward(&b, m->part[MOE_PART_PARAMS], t, y);
            for (size_t i = 0; i < count * F && !s; i++)
                memcpy(out + i * d, t->memory->o + (t->routes.begin[i % F] + i / F) * m->dims.ldo, d * sizeof(float));
            if (!s) s = moe_pes(count, F, d, out, work, &part);
            if (!s) sum += part * (double)count;
        }
    }
    if (!s) *pes = n ? sum / (double)n : 0.0;
    moe__free(b.alloc_context, memory);
    moe_tape_free(t);
    return s;
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

MOE_API size_t moe_layer_tensors(const moe_layer *m) {
    moe_tensor t;
    size_t n = 0;
    int id;
    while (m && moe__tensor_at(&m->d, &m->dims, n, &id, &t)) n++;
    return n;
}
MOE_API moe_status moe_layer_tensor(const moe_layer *m, size_t i, moe_tensor *out) {
    int id;
    if (!m) return MOE_E_NULL_LAYER;
    if (!out) return MOE_E_NULL_OUT;
    return moe__tensor_at(&m->d, &m->dims, i, &id, out) ? MOE_OK : MOE_E_NAME;
}
/* Where a tensor stands that is one plain array in the layer's blocks; NULL for one that is spread over the experts' panels. */
static float *moe__plain_tensor(const moe_layer *m, moe_part part, int id) {
    if (id < MOE__R_COUNT) return moe__layer_router(m, part) + m->dims.at[id];
    if (id == MOE__T_COUNT) return m->control.state;
    if (id == MOE__T_CONSTANT_GATE) return m->part[part] + m->dims.special;
    if (id == MOE__T_CONSTANT) return m->part[part] + m->dims.special + m->dims.constants * 2 * m->dims.d;
    return NULL;
}
#define MOE__STATE_NAME "controller.state"
static moe_status moe__tensor_find(const moe_layer *m, moe_part part, const char *name, size_t count, int *id) {
    moe_tensor t;
    if (!m) return MOE_E_NULL_LAYER;
    if (!name) return MOE_E_NULL_NAME;
    if ((unsigned)part >= MOE__PART_COUNT) return MOE_E_PART;
    if (!m->part[part]) return m->d.training == MOE_OFF ? MOE_E_INFERENCE : MOE_E_PART;
    if (m->control.n_state && !strcmp(name, MOE__STATE_NAME)) {
        *id = MOE__T_COUNT;
        return part != MOE_PART_PARAMS ? MOE_E_PART : count == m->control.n_state ? MOE_OK : MOE_E_TENSOR_SIZE;
    }
    for (size_t i = 0; moe__tensor_at(&m->d, &m->dims, i, id, &t); i++) {
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
    else if (moe__plain_tensor(m, part, id)) memcpy(out, moe__plain_tensor(m, part, id), count * sizeof(float));
    else {
        id -= MOE__R_COUNT;
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
    if (moe__plain_tensor(m, part, id)) memcpy(moe__plain_tensor(m, part, id), in, count * sizeof(float));
    else {
        id -= MOE__R_COUNT;
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
    h = moe_hash(h, moe__layer_router(m, MOE_PART_PARAMS), m->dims.at[MOE__R_COUNT] * sizeof(float));
    if (m->dims.constants) h = moe_hash(h, m->part[0] + m->dims.special, (m->dims.experts - m->dims.special) * sizeof(float));
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

/* ==== systems =================================================================================
 * Each row in its own words of the desc; sizes are small ones that any layer can have, the source's own are in `purpose`.
 * What a source leaves open is [D]. */
static const moe_system moe__systems[] = {
    {"dense", "One feed-forward network", "no mixture", "K", "n_experts=1 top_k=1",
     "what every mixture is compared with: one expert for all tokens", "no routing"},
    {"softmax-topk", "OLMoE: softmax, then top-k", "arXiv 2409.02060, 2024", "K",
     "top_k=2 gate=softmax select=top-k normalize=false loss.switch=0.01 loss.z=0.001",
     "the plain baseline; in the paper 64 experts, top-8", "causal; balance by loss only"},
    {"mixtral", "Mixtral: softmax over the selected", "arXiv 2401.04088, 2024", "K",
     "top_k=2 gate=softmax-selected select=top-k expert=swiglu loss.switch=0.02",
     "weights sum to one; 8 experts, top-2", "causal; balance by loss only"},
    {"switch", "Switch Transformer", "arXiv 2101.03961, 2021", "C",
     "top_k=1 gate=softmax select=top-k normalize=false expert=relu jitter=0.01 capacity_factor=1.25 capacity_order=token loss.switch=0.01",
     "one expert a token, cheapest routing", "drops tokens over capacity; causal but for the drops"},
    {"gshard", "GShard top-2", "arXiv 2006.16668, 2020", "C",
     "top_k=2 gate=softmax select=top-k normalize=true random_second=true expert=relu capacity_factor=1 capacity_order=choice loss.switch=0.01",
     "first choices before second, the second at random", "drops tokens over capacity"},
    {"noisy-topk", "Sparsely gated mixture with noisy top-k", "arXiv 1701.06538, 2017", "K",
     "top_k=2 gate=softmax-selected select=top-k noise=learned router_init=zero loss.importance-selected=0.1 loss.load=0.1",
     "learned noise explores the experts", "noise in training only"},
    {"expert-choice", "Expert choice routing", "arXiv 2202.09368, 2022", "K",
     "top_k=2 gate=softmax select=expert-choice normalize=false", "every expert takes as many tokens: balanced without a loss",
     "sees the whole batch: not causal; a token may get no expert"},
    {"deepseek-moe", "DeepSeekMoE: fine experts and shared ones", "arXiv 2401.06066, 2024", "C",
     "top_k=2 n_shared=1 gate=softmax select=top-k normalize=false n_ranks=4 loss.switch=0.01 loss.device=0.05",
     "shared experts hold what all tokens need; 64 experts, top-6, 2 shared", "causal"},
    {"deepseek-v3", "DeepSeek-V3: sigmoid, groups, bias instead of a loss", "arXiv 2412.19437, 2024", "C",
     "top_k=2 n_shared=1 gate=sigmoid select=groups n_groups=4 top_groups=2 normalize=true weight_scale=2.5 loss.sequence=0.0001 "
     "controller=bias controller_rate=0.001",
     "balance by a bias outside the gradient; 256 experts in 8 groups of which 4, top-8", "n_experts a multiple of the groups; causal"},
    {"top-p", "Top-p routing: as many experts as a token needs", "arXiv 2403.07652, 2024", "C",
     "gate=softmax select=top-p top_p=0.4 normalize=false loss.certainty=0.0001 loss.switch=0.01", "hard tokens get more experts",
     "number of experts varies; causal"},
    {"remoe", "ReMoE: ReLU instead of top-k", "arXiv 2412.14711, 2024", "C",
     "top_k=2 gate=relu select=threshold normalize=false fallback=false loss.relu-l1=1e-8 controller=relu-lambda",
     "fully differentiable; sparsity by an adaptive L1", "number of experts varies, all at first; causal"},
    {"hash", "Hash layers", "arXiv 2106.04426, 2021", "K", "top_k=1 score=hash gate=softmax-selected select=top-k",
     "routing without learning: by token id", "needs token ids; the router learns nothing"},
    {"sinkhorn", "Sinkhorn routing", "arXiv 2202.01169 (S-BASE), 2022", "K",
     "top_k=1 gate=sigmoid select=sinkhorn normalize=false sinkhorn_epsilon=1 sinkhorn_iterations=20", "balanced by optimal transport in training",
     "training sees the whole batch: not causal"},
    {"soft-moe", "Soft MoE", "arXiv 2308.00951, 2023", "K",
     "score=cosine gate=softmax select=all combine=soft soft_slots=1 learn_temperature=true temperature=0.1",
     "every slot is a mixture of all tokens: no discrete choice", "mixes a sequence's tokens: not causal"},
    {"dynmoe", "DynMoE: each token decides how many", "arXiv 2405.14297, 2024", "C",
     "score=cosine gate=sign select=threshold temperature=0.07 learn_temperature=true loss.diverse-simple=0.01",
     "top-any gating with learned thresholds", "straight-through gradient; number of experts varies; adding and removing experts is growth's"},
    {"moe++", "MoE++: zero, copy and constant experts", "arXiv 2410.07348, 2024", "C",
     "top_k=2 n_experts=8 n_zero=1 n_copy=1 n_constant=2 residual=true gate=softmax select=top-k normalize=true loss.switch=0.01",
     "easy tokens take experts that cost nothing", "causal"},
    {"sparsemixer", "SparseMixer-v2, GRIN", "arXiv 2409.12136, 2024", "C",
     "top_k=2 gate=sparsemixer select=sampled mask_jitter=0.1 loss.switch=0.01", "a gradient estimate for the discrete choice",
     "samples in training; surrogate gradient"},
    {"latent-prototype", "Latent prototype routing", "arXiv 2506.21328, 2025", "S",
     "top_k=2 score=prototype gate=softmax select=top-k loss.prototype-diversity=1 loss.prototype-alignment=0.001",
     "clusters tokens around spread prototypes; published Gini .70 -> .035", "loss forms and weights [D]: more alignment collapses it; causal"},
    {"random", "Uniformly random routing", "baseline", "K", "top_k=2 score=random gate=softmax select=top-k",
     "the other end: perfect balance, no knowledge", "no learning in the router; another choice at each forward"},
    {"simbal", "SimBal: orthogonal router", "arXiv 2506.14038, 2025", "P",
     "top_k=2 gate=softmax select=top-k normalize=true router_init=orthogonal loss.simbal=0.1 loss.z=0.00001",
     "similar tokens to similar experts; 32 experts, top-4", "the loss needs no data; for the scale alone: score=unit"},
    {"ermoe", "ERMoE: experts in orthonormal bases", "public summary, 2025", "S",
     "top_k=2 score=subspace expert=orthonormal gate=relu select=top-k threshold=0.5 fallback=true normalize=true",
     "an expert scores a token by how much of it lies in its basis", "self-score [D]: no attention context here; d_ff < d_model; costs all bases"},
    {"mot", "Mixture-of-Transformers theory: top-1 by sequence", "introduction of the paper, 2025", "P",
     "top_k=1 gate=softmax select=top-k normalize=false noise=uniform noise_std=0.1 route_sequence=true",
     "one expert for a whole sequence; three-stage training in examples/mot.c", "gate [K]; the mean of the sequence is not causal"},
    {"vqmoe", "VQMoE: a discrete branch beside the router", "public code, 2024", "C",
     "top_k=2 gate=softmax select=top-k normalize=true n_codes=16 loss.codebook=0.08", "tokens also go by their nearest code",
     "straight-through gradient [D]; one more expert a token"},
    {"locmoe", "LocMoE: fixed orthogonal gate, locality", "arXiv 2401.13920, 2024", "P",
     "top_k=1 score=slice gate=softmax select=top-k normalize=false noise=gaussian noise_std=0.01 n_ranks=4 loss.switch=0.01 loss.locality=0.01",
     "routing costs O(d) and has no parameters", "d_model a multiple of n_experts"},
    {"smear", "SMEAR: merging experts", "arXiv 2306.03745, 2023", "C",
     "score=normed gate=softmax select=all combine=merge expert_drop=0.1", "one merged expert a sequence: an ordinary gradient",
     "sees the whole sequence: not causal"},
    {"smoe-dropout", "SMoE-Dropout: a frozen random router, growing k", "arXiv 2303.01610, 2023", "C",
     "top_k=4 top_k_min=2 schedule=linear schedule_steps=300 freeze_router=true gate=softmax-selected select=top-k",
     "self-slimmable: more experts at evaluation, lower loss; 16 experts, 8 to 16", "the router learns nothing"},
    {"gating-dropout", "Gating Dropout", "arXiv 2205.14336, 2022", "S",
     "top_k=1 gate=softmax select=top-k normalize=false expert=relu n_ranks=4 gate_drop=0.3 capacity_factor=1 capacity_factor_eval=2 "
     "loss.switch=0.01", "now and then no token leaves its rank: less exchange", "probability [K]; drops tokens over capacity"},
    {"xmoe", "X-MoE: scores on a low-dimensional hypersphere", "arXiv 2204.09179, 2022", "P+C",
     "top_k=1 score=projected gate=sigmoid select=top-k normalize=false temperature=0.07 learn_temperature=true loss.switch=0.01",
     "against representation collapse; d_router = n_experts / 2", "causal"},
    {"base", "BASE layers: balanced assignment", "arXiv 2103.16716, 2021", "P+C",
     "top_k=1 gate=sigmoid select=auction normalize=false router_init=orthogonal router_gain=0.1 zero_output=true expert=relu",
     "exactly T / E tokens an expert, no loss", "training: T % E == 0, sees the whole batch; evaluation is causal"},
    {"robust", "Reliability-weighted experts", "after unreliable federated clients", "D",
     "top_k=4 gate=softmax select=top-k normalize=true combine=robust robust_tau=1 loss.switch=0.01",
     "survives corrupted experts by the distance from the median output", "an adaptation; needs three experts a token or more"},
    {"ecology", "Ecology: router MLP, temperature, entropy, balance, orthogonality", "arXiv 2605.06415, 2026", "S",
     "top_k=2 score=mlp gate=softmax select=top-k normalize=true temperature=1 loss.entropy=0.218 loss.kl-uniform=0.4 loss.switch=0.4 "
     "loss.prototype-orthogonality=0.05", "ecology number T H / (O + B) = 0.545 with O = 0, B = 0.4", "form of the losses [D]; the oracle needs a teacher"},
    {"growth", "The growth story's top-2 entropy router", "public post, 2026-02-08", "P",
     "n_experts=3 top_k=2 gate=softmax select=top-k normalize=true loss.entropy=0.1", "a seed of three experts that growth splits",
     "weight of the entropy loss [D]"},
};
MOE_API size_t moe_systems_count(void) { return sizeof moe__systems / sizeof *moe__systems; }
MOE_API const moe_system *moe_system_at(size_t i) { return i < moe_systems_count() ? &moe__systems[i] : NULL; }
MOE_API const moe_system *moe_system_find(const char *name) {
    for (size_t i = 0; name && i < moe_systems_count(); i++)
        if (!strcmp(moe__systems[i].name, name)) return &moe__systems[i];
    return NULL;
}
MOE_API moe_status moe_desc_system(moe_desc *d, const char *name) {
    const moe_system *row = moe_system_find(name);
    if (!d) return MOE_E_NULL_DESC;
    if (!name) return MOE_E_NULL_NAME;
    return row ? moe_desc_parse(d, row->choices, NULL) : MOE_E_SYSTEM;
}
/* Insertions, deletions and changes that make b of a; names of up to 31 characters. */
static size_t moe__edits(const char *a, const char *b) {
    size_t row[32], n = 0;
    while (b[n] && n < 31) n++;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i] && i < 64; i++) {
        size_t corner = row[0];
        row[0] = i + 1;
        for (size_t j = 0; j < n; j++) {
            size_t change = corner + (a[i] != b[j]);
            corner = row[j + 1];
            row[j + 1] = moe__min(change, moe__min(row[j], corner) + 1);
        }
    }
    return row[n];
}
MOE_API void moe_system_near(const char *name, char *buffer, size_t size) {
    moe__text t = {buffer, buffer ? size : 0, 0};
    size_t least = SIZE_MAX;
    for (size_t i = 0; name && i < moe_systems_count(); i++) least = moe__min(least, moe__edits(name, moe__systems[i].name));
    for (size_t i = 0; name && i < moe_systems_count(); i++) {
        const char *row = moe__systems[i].name;
        if (moe__edits(name, row) > least + 1 && !(name[0] && strstr(row, name))) continue;
        if (t.n) moe__text_add(&t, ", ");
        moe__text_add(&t, row);
    }
    moe__text_end(&t);
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

/* A string that was read before, unescaped, into a buffer of at least one byte; MOE_E_SMALL_MEMORY, and nothing in it, if it
 * does not fit: half a value is no value. */
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
    if (!buffer) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    buffer[0] = 0;
    moe_status s = moe__file_lookup(f, MOE__ENTRY_METADATA, key, &c, &e);
    return s ? s : moe__json_copy(&c.j, e.value, buffer, size);
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

/* What a layer's file holds: tensor i, its part, and its name there. The moments follow the parameters. */
typedef struct moe__saved {
    moe_part part;
    moe_tensor tensor;
    char name[40];
    size_t bytes;
} moe__saved;

static int moe__saved_tensor(const moe_desc *d, size_t i, moe_tensor *out) {
    moe__dims s;
    int id;
    return moe__dims_of(d, &s) == MOE_OK && moe__tensor_at(d, &s, i, &id, out);
}
static int moe__saved_at(const moe_desc *d, int with_optimizer, size_t i, moe__saved *out) {
    static const char *const prefix[] = { "", "moment1.", "moment2." };
    static const moe_part parts[] = { MOE_PART_PARAMS, MOE_PART_MOMENT1, MOE_PART_MOMENT2 };
    size_t n_parts = !with_optimizer ? 1 : d->optimizer == MOE_OPTIMIZER_SGD ? 2 : 3, n = 0;
    moe__text t;
    while (moe__saved_tensor(d, n, &out->tensor)) n++;
    if (i == n * n_parts) { /* after all parts the controller's state */
        moe_control c;
        moe__arena none = {NULL, 0, 0};
        if (moe__control_layout(&c, d->controller, d->n_experts, &none) || !c.n_state) return 0;
        memset(&out->tensor, 0, sizeof out->tensor);
        memcpy(out->name, MOE__STATE_NAME, sizeof MOE__STATE_NAME);
        out->tensor.name = MOE__STATE_NAME;
        out->tensor.n_dims = 1;
        out->tensor.dim[0] = out->tensor.count = c.n_state;
        out->part = MOE_PART_PARAMS;
        out->bytes = c.n_state * sizeof(float);
        return 1;
    }
    if (i / n >= n_parts || !moe__saved_tensor(d, i % n, &out->tensor)) return 0;
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
        moe__text_u64(t, m->step);
        moe__text_add(t, "\",\"draws\":\"");
        moe__text_u64(t, m->draws);
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

/* The desc, and the step count if the optimiser was saved, from the metadata, read once. A field that is not there is 0, the
 * default: a later moe.h that adds one reads older files, and raises the version when its own files need it. What is no
 * field is not ours. */
static moe_status moe__file_desc(const moe_file *f, const moe_desc *surroundings, moe_desc *d, int *with_optimizer,
                                 uint64_t step[2]) {
    moe__cursor c;
    moe__entry e;
    moe__field field;
    char name[32], text[80];
    int format = 0, version = 0;
    moe_status s = moe__cursor_init(&c, f);
    memset(d, 0, sizeof *d);
    *with_optimizer = 0;
    while (!s && !(s = moe__cursor_next_of(&c, MOE__ENTRY_METADATA, &e))) {
        int fits = moe__json_copy(&c.j, e.value, text, sizeof text) == MOE_OK, good = 1;
        if (moe__json_is(&c.j, e.name, "format")) format = fits && !strcmp(text, "moe.h");
        else if (moe__json_is(&c.j, e.name, "version")) version = fits && !strcmp(text, "1");
        else if (moe__json_is(&c.j, e.name, "step")) *with_optimizer = good = fits && moe__parse_u64(text, step);
        else if (moe__json_is(&c.j, e.name, "draws")) good = fits && moe__parse_u64(text, step + 1);
        else
            for (size_t i = 0; moe__field_at(i, &field, name); i++)
                if (moe__json_is(&c.j, e.name, field.name)) {
                    good = fits && moe__field_read(&field, text, d);
                    break;
                }
        if (!good) return MOE_E_FILE_DESC;
    }
    if (s != MOE_E_NAME || !format || !version) return MOE_E_FILE_DESC;
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
    uint64_t step[2] = {0, 0}; /* and draws */
    size_t i, most = 0;
    int with_optimizer = 0;
    moe_status s;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    s = moe_file_open(&f, bytes, size);
    if (!s) s = moe__file_desc(&f, surroundings, &d, &with_optimizer, step);
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
    if (with_optimizer) m->step = step[0], m->draws = step[1];
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

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
 * TABLE OF CONTENTS. A room begins with a banner: search for its mark, e.g. ">>gate". Calls go only upward: a room may
 * use those above it. Private names begin with the room's prefix (ground and kernels share moe__); the table is where
 * adding a row adds a feature.
 *
 *     declarations: configuration, status, types, arrays, routes and tape, diagnostics, layer, files
 *
 *     room           prefix             table                 what
 *     >>platform     moe__              -                     compilers, instruction sets, status sentences
 *     >>numbers      moe__              -                     small arithmetic, bits of floats, log and turns
 *     >>memory       moe__              -                     allocation, arenas, scratch
 *     >>random       moe__              -                     Philox, uniform, normal, Gumbel; hash
 *     >>text         moe__              -                     numbers and words as text
 *     >>kernels      moe__              moe__kernels          the inner loops, once for each instruction set
 *     >>dispatch     moe__dispatch      -                     which of them this processor can run
 *     >>threads      moe__threads_      -                     how tasks are spread
 *     >>formats      moe__format_       moe__format_table     how an expert's weights are stored
 *     >>products     moe__product       -                     products over panels, gemm
 *     >>plan         moe__plan_         moe__plan_tensors     a resolved desc, its extents, its tensors
 *     >>placement    moe__placement_    -                     which rank holds what
 *     >>run          moe__run_          -                     what one forward or backward carries
 *     >>score        moe__score_        moe__score_table      tokens -> logits
 *     >>noise        moe__noise_        moe__noise_table      noise on the logits
 *     >>gate         moe__gate_         moe__gate_table       logits -> scores and weights
 *     >>select       moe__select_       moe__select_table     scores -> choices
 *     >>routes       moe__routes_       -                     choices -> who goes where
 *     >>experts      moe__experts_      moe__experts_table    the networks
 *     >>combine      moe__combine_      moe__combine_table    outputs -> y
 *     >>codes        moe__codes_        -                     VQMoE's discrete branch
 *     >>losses       moe__loss_         -                     auxiliary losses on arrays
 *     >>balance      moe__balance_      moe__balance_losses   the table of losses; the same in a layer
 *     >>controllers  moe__control_      moe__control_table    balancing without a gradient; schedules
 *     >>optimiser    moe__optimizer_    -                     AdamW, SGD
 *     >>health       moe__health_       -                     counters and load metrics
 *     >>measures     moe__measure_      -                     measures of plain arrays
 *     >>game         moe__game_         -                     the congestion game and gamma_eff
 *     >>feedback     moe__feedback_     -                     its dynamics
 *     >>desc         moe__desc_         moe__desc_fields      the fields of moe_desc
 *     >>systems      moe__system_       moe__system_table     the systems of the literature
 *     >>tape         moe__tape_         -                     a tape's memory
 *     >>passes       moe__pass_         -                     forward and backward of router and experts
 *     >>layer        moe__layer_        -                     parameters, gradients, optimiser
 *     >>json         moe__json_         -                     reading JSON
 *     >>safetensors  moe__file_         moe__file_dtypes      reading safetensors
 *     >>npy          moe__npy_          -                     reading .npy
 *     >>models       moe__model_        -                     names in known models
 *     >>save         moe__save_         -                     a layer as a file
 *
 * Diagnosis stands above the layer, because the layer counts its own health.
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
 *   MOE_SOFT_FMA         fmaf of our own, for a C library whose fmaf is wrong (mingw-w64's is, and is not used)
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

#define MOE_VERSION "0.2.1"
#define MOE_VERSION_NUMBER 201 /* major * 10000 + minor * 100 + patch */

/* ==== status ==================================================================================
 * Every code has a kind, the argument or field that it is about, and a sentence. */
typedef enum moe_error_kind {
    MOE_KIND_OK,
    MOE_KIND_ARGUMENT, /* a value outside its range, a NULL where memory is needed, a shape that does not fit */
    MOE_KIND_OVERFLOW, /* a size does not fit in size_t, or an index in its type */
    MOE_KIND_MEMORY,   /* an allocation failed, or the given memory is too small */
    MOE_KIND_NUMBER,   /* NaN or infinity where a finite number is needed */
    MOE_KIND_STATE,    /* a call out of order */
    MOE_KIND_FILE,     /* the bytes of a file are not what they should be */
    MOE_KIND_IO,       /* the operating system could not open, read or write */
    MOE_KIND_SUPPORT   /* not available on this machine or in this build */
} moe_error_kind;

/* X(code, number, kind, field, sentence). A number never moves and is never used again. */
#define MOE_STATUS_LIST(X) \
    X(MOE_E_NULL_DESC, 1, ARGUMENT, "desc", "must not be NULL")                                                      \
    X(MOE_E_NULL_LAYER, 2, ARGUMENT, "layer", "must not be NULL")                                                    \
    X(MOE_E_NULL_TAPE, 3, ARGUMENT, "tape", "must not be NULL")                                                      \
    X(MOE_E_NULL_ROUTES, 4, ARGUMENT, "routes", "must not be NULL")                                                  \
    X(MOE_E_NULL_HEALTH, 5, ARGUMENT, "health", "must not be NULL")                                                  \
    X(MOE_E_NULL_OUT, 6, ARGUMENT, "out", "the place for the result must not be NULL")                               \
    X(MOE_E_NULL_MEMORY, 7, ARGUMENT, "memory", "must not be NULL")                                                  \
    X(MOE_E_NULL_X, 8, ARGUMENT, "x", "must not be NULL")                                                            \
    X(MOE_E_NULL_Y, 9, ARGUMENT, "y", "must not be NULL")                                                            \
    X(MOE_E_NULL_DY, 10, ARGUMENT, "dy", "must not be NULL")                                                         \
    X(MOE_E_NULL_A, 11, ARGUMENT, "a", "must not be NULL (nor a_fill with it)")                                      \
    X(MOE_E_NULL_B, 12, ARGUMENT, "b", "must not be NULL")                                                           \
    X(MOE_E_NULL_C, 13, ARGUMENT, "c", "must not be NULL")                                                           \
    X(MOE_E_NULL_PARAMS, 14, ARGUMENT, "params", "must not be NULL")                                                 \
    X(MOE_E_NULL_GRADS, 15, ARGUMENT, "grads", "must not be NULL")                                                   \
    X(MOE_E_NULL_MOMENTS, 16, ARGUMENT, "moments", "must not be NULL")                                               \
    X(MOE_E_NULL_LOGITS, 17, ARGUMENT, "logits", "must not be NULL")                                                 \
    X(MOE_E_NULL_SCORES, 18, ARGUMENT, "scores", "must not be NULL")                                                 \
    X(MOE_E_NULL_PROB, 19, ARGUMENT, "prob", "must not be NULL")                                                     \
    X(MOE_E_NULL_INDEX, 20, ARGUMENT, "index", "must not be NULL")                                                   \
    X(MOE_E_NULL_WEIGHT, 21, ARGUMENT, "weight", "must not be NULL")                                                 \
    X(MOE_E_NULL_LOAD, 22, ARGUMENT, "load", "must not be NULL")                                                     \
    X(MOE_E_NULL_MEAN, 23, ARGUMENT, "mean", "must not be NULL")                                                     \
    X(MOE_E_NULL_ROUTER, 24, ARGUMENT, "router", "must not be NULL")                                                 \
    X(MOE_E_NULL_TEACHER, 25, ARGUMENT, "teacher", "must not be NULL")                                               \
    X(MOE_E_NULL_OUTPUTS, 26, ARGUMENT, "outputs", "must not be NULL")                                               \
    X(MOE_E_NULL_NOISE, 27, ARGUMENT, "std", "must not be NULL, nor threshold")                                      \
    X(MOE_E_NULL_LATENT, 28, ARGUMENT, "latent", "must not be NULL")                                                 \
    X(MOE_E_NULL_CODEBOOK, 29, ARGUMENT, "codebook", "must not be NULL")                                             \
    X(MOE_E_NULL_MATRIX, 30, ARGUMENT, "matrix", "must not be NULL")                                                 \
    X(MOE_E_NAN_PROB, 31, NUMBER, "prob", "NaN or infinite")                                                         \
    X(MOE_E_NAN_MEAN, 32, NUMBER, "mean", "every mean must be finite and at least 0")                                \
    X(MOE_E_NAN_SCORES, 33, NUMBER, "scores", "NaN or infinite (or negative, where they are shares of a sum)")       \
    X(MOE_E_NAN_ROUTER, 34, NUMBER, "router", "NaN or infinite")                                                     \
    X(MOE_E_NAN_MATRIX, 35, NUMBER, "matrix", "NaN or infinite")                                                     \
    X(MOE_E_NAN_OUTPUTS, 36, NUMBER, "outputs", "NaN or infinite")                                                   \
    X(MOE_E_NAN_LATENT, 37, NUMBER, "latent", "NaN or infinite")                                                     \
    X(MOE_E_NAN_CODEBOOK, 38, NUMBER, "codebook", "NaN or infinite")                                                 \
    X(MOE_E_NOISE_VALUE, 39, NUMBER, "std", "a standard deviation must be finite and above 0, a threshold finite")   \
    X(MOE_E_TEACHER, 40, ARGUMENT, "teacher", "an expert index is not below n_experts")                              \
    X(MOE_E_CODE, 41, ARGUMENT, "index", "the code of a token is not below n_codes")                                 \
    X(MOE_E_RANKS, 42, ARGUMENT, "n_ranks", "must be at least 1 and divide n_experts")                               \
    X(MOE_E_RANK_LIMIT, 43, ARGUMENT, "rank_limit", "the ranks that a token may use must be 1 to n_ranks")           \
    X(MOE_E_HOME, 44, ARGUMENT, "home", "must be below n_ranks")                                                     \
    X(MOE_E_SMOOTHING, 45, ARGUMENT, "smoothing", "must be above 0 and below 1")                                     \
    X(MOE_E_SEQUENCE, 46, ARGUMENT, "sequence", "its length must be at least 1")                                     \
    X(MOE_E_COMMITMENT, 47, ARGUMENT, "commitment", "must be finite and at least 0")                                 \
    X(MOE_E_LOSS_STAGE, 48, SUPPORT, "loss",                                                                         \
      "the layer lacks what one that is on needs; moe_loss takes it as an argument")                                 \
    X(MOE_E_NULL_CONTROL, 49, ARGUMENT, "control", "must not be NULL, and must be initialised")                      \
    X(MOE_E_NULL_INPUT, 50, ARGUMENT, "input", "must not be NULL")                                                   \
    X(MOE_E_CONTROL, 51, ARGUMENT, "control", "not a moe_control_kind")                                              \
    X(MOE_E_RATE, 52, ARGUMENT, "rate", "must be finite and at least 0 (a factor: at least 1)")                      \
    X(MOE_E_DAMPING, 53, ARGUMENT, "damping", "must be finite and at least 0 (a decay: at most 1)")                  \
    X(MOE_E_BOUNDS, 54, ARGUMENT, "low",                                                                             \
      "low and high must be finite, and as bounds of a coefficient 0 < low <= high")                                 \
    X(MOE_E_SPARSITY, 55, ARGUMENT, "sparsity", "must be in [0, 1]")                                                 \
    X(MOE_E_DROP_RATE, 56, ARGUMENT, "drop_rate", "must be in [0, 1]")                                               \
    X(MOE_E_SCHEDULE, 57, ARGUMENT, "schedule", "not a moe_schedule_kind")                                           \
    X(MOE_E_NULL_NAME, 58, ARGUMENT, "name", "must not be NULL")                                                     \
    X(MOE_E_NULL_PATH, 59, ARGUMENT, "path", "must not be NULL")                                                     \
    X(MOE_E_NULL_BYTES, 60, ARGUMENT, "bytes", "must not be NULL")                                                   \
    X(MOE_E_D_MODEL, 61, ARGUMENT, "d_model", "must be at least 1")                                                  \
    X(MOE_E_N_EXPERTS, 62, ARGUMENT, "n_experts", "must be 1 to 1048576")                                            \
    X(MOE_E_TOP_K, 63, ARGUMENT, "top_k", "must be 1 to n_experts")                                                  \
    X(MOE_E_SCORE, 64, ARGUMENT, "score", "not a moe_score_kind")                                                    \
    X(MOE_E_GATE, 65, ARGUMENT, "gate", "not a moe_gate_kind")                                                       \
    X(MOE_E_SELECT, 66, ARGUMENT, "select", "not a moe_select_kind")                                                 \
    X(MOE_E_EXPERT, 67, ARGUMENT, "expert", "not a moe_expert_kind")                                                 \
    X(MOE_E_OPTIMIZER, 68, ARGUMENT, "optimizer", "not a moe_optimizer_kind")                                        \
    X(MOE_E_CAPACITY_ORDER, 69, ARGUMENT, "capacity_order", "not a moe_order_kind")                                  \
    X(MOE_E_NORMALIZE, 70, ARGUMENT, "normalize", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                          \
    X(MOE_E_BIAS, 71, ARGUMENT, "bias", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                                    \
    X(MOE_E_TRAINING, 72, ARGUMENT, "training", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                            \
    X(MOE_E_TEMPERATURE, 73, ARGUMENT, "temperature", "must be finite and above 0, and so must its inverse")         \
    X(MOE_E_CAPACITY_FACTOR, 74, ARGUMENT, "capacity_factor", "must be finite and above 0, or MOE_OFF")              \
    X(MOE_E_COMBINE, 75, ARGUMENT, "combine", "not a moe_combine_kind")                                              \
    X(MOE_E_NOISE, 76, ARGUMENT, "noise", "not a moe_noise_kind")                                                    \
    X(MOE_E_ROUTER_INIT, 77, ARGUMENT, "router_init", "not a moe_init_kind")                                         \
    X(MOE_E_ROUTE_SEQUENCE, 78, ARGUMENT, "route_sequence",                                                          \
      "must be MOE_DEFAULT, MOE_ON or MOE_OFF; on for combine = merge, off for combine = soft")                      \
    X(MOE_E_FREEZE_ROUTER, 79, ARGUMENT, "freeze_router", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                  \
    X(MOE_E_RESIDUAL, 80, ARGUMENT, "residual",                                                                      \
      "must be MOE_DEFAULT, MOE_ON or MOE_OFF, and off for combine = soft")                                          \
    X(MOE_E_LEARN_TEMPERATURE, 81, ARGUMENT, "learn_temperature", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")          \
    X(MOE_E_FALLBACK, 82, ARGUMENT, "fallback", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                            \
    X(MOE_E_RANDOM_SECOND, 83, ARGUMENT, "random_second", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                  \
    X(MOE_E_GATE_DROP_EXPERTS, 84, ARGUMENT, "gate_drop_experts", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")          \
    X(MOE_E_ZERO_OUTPUT, 85, ARGUMENT, "zero_output", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")                      \
    X(MOE_E_SPECIAL_EXPERTS, 86, ARGUMENT, "n_zero",                                                                 \
      "with n_copy and n_constant at most n_experts - 1, and none with combine = soft, merge or robust")             \
    X(MOE_E_D_FF, 87, ARGUMENT, "d_ff", "must be at least 1; for expert = orthonormal below d_model")                \
    X(MOE_E_N_RANKS, 88, ARGUMENT, "n_ranks", "must be at least 1, in a desc at most n_experts")                     \
    X(MOE_E_SLICE, 89, ARGUMENT, "d_model", "must be a multiple of n_experts for score = slice")                     \
    X(MOE_E_SUBSPACE, 90, ARGUMENT, "score", "subspace needs expert = orthonormal and no special experts")           \
    X(MOE_E_GATE_SELECT, 91, ARGUMENT, "gate",                                                                       \
      "sparsemixer goes with select = sampled only and sampled with it only, sign with select = threshold only")     \
    X(MOE_E_SELECT_COMBINE, 92, ARGUMENT, "select", "must be all for combine = soft and merge")                      \
    X(MOE_E_N_CODES, 93, ARGUMENT, "n_codes",                                                                        \
      "must be 0 or at least n_experts, with combine = sum, without jitter, route_sequence and special experts")     \
    X(MOE_E_SOFT_SLOTS, 94, ARGUMENT, "soft_slots",                                                                  \
      "must be 1 unless combine = soft, and E times it at most 1048576")                                             \
    X(MOE_E_TOP_K_MIN, 95, ARGUMENT, "top_k_min", "must be at most top_k, and needs schedule_steps")                 \
    X(MOE_E_ROUTER_GAIN, 96, ARGUMENT, "router_gain", "must be finite and above 0")                                  \
    X(MOE_E_JITTER, 97, ARGUMENT, "jitter", "must be in [0, 1)")                                                     \
    X(MOE_E_NOISE_STD, 98, ARGUMENT, "noise_std", "must be finite and above 0")                                      \
    X(MOE_E_WEIGHT_SCALE, 99, ARGUMENT, "weight_scale", "must be finite and above 0")                                \
    X(MOE_E_TEMPERATURE_END, 100, ARGUMENT, "temperature_end",                                                       \
      "must be finite and above 0, or 0, and needs schedule_steps")                                                  \
    X(MOE_E_MASK_JITTER, 101, ARGUMENT, "mask_jitter", "must be finite and above 0")                                 \
    X(MOE_E_TOP_P, 102, ARGUMENT, "top_p", "must be 0 to 1")                                                         \
    X(MOE_E_THRESHOLD, 103, ARGUMENT, "threshold", "must be finite (and every expert's own), or in a desc MOE_OFF")  \
    X(MOE_E_SINKHORN, 104, ARGUMENT, "sinkhorn_epsilon", "must be finite and above 0")                               \
    X(MOE_E_GATE_DROP, 105, ARGUMENT, "gate_drop",                                                                   \
      "must be in [0, 1], and 0 with select = sinkhorn, auction or sampled and with combine = soft or merge")        \
    X(MOE_E_EXPERT_DROP, 106, ARGUMENT, "expert_drop", "must be in [0, 1)")                                          \
    X(MOE_E_CAPACITY_FACTOR_EVAL, 107, ARGUMENT, "capacity_factor_eval",                                             \
      "must be finite and above 0, or 0, or MOE_OFF")                                                                \
    X(MOE_E_ROBUST_TAU, 108, ARGUMENT, "robust_tau", "must be finite and above 0")                                   \
    X(MOE_E_CONTROLLER, 109, ARGUMENT, "controller",                                                                 \
      "not a moe_control_kind, or its loss is off: relu-lambda needs gate = relu and loss.relu-l1, adaptive "        \
      "needs loss.switch")                                                                                           \
    X(MOE_E_CONTROLLER_RATE, 110, ARGUMENT, "controller_rate", "must be finite and above 0")                         \
    X(MOE_E_CONTROLLER_DAMPING, 111, ARGUMENT, "controller_damping", "must be finite and above 0, or MOE_OFF")       \
    X(MOE_E_NULL_EXPERTS, 112, ARGUMENT, "experts", "score = subspace needs side.experts (a layer uses its own)")    \
    X(MOE_E_SYSTEM, 113, ARGUMENT, "system", "the table of systems has no row of this name")                         \
    X(MOE_E_FIELD, 114, ARGUMENT, "field", "moe_desc has no such field")                                             \
    X(MOE_E_VALUE, 115, ARGUMENT, "value", "not one that this field can have")                                       \
    X(MOE_E_LOSS, 116, ARGUMENT, "loss", "every coefficient must be finite and at least 0, or MOE_OFF")              \
    X(MOE_E_BETA1, 117, ARGUMENT, "beta1", "must be in [0, 1), or MOE_OFF")                                          \
    X(MOE_E_BETA2, 118, ARGUMENT, "beta2", "must be in [0, 1), or MOE_OFF")                                          \
    X(MOE_E_EPSILON, 119, ARGUMENT, "epsilon", "must be finite and above 0")                                         \
    X(MOE_E_WEIGHT_DECAY, 120, ARGUMENT, "weight_decay", "must be finite and at least 0, or MOE_OFF")                \
    X(MOE_E_MOMENTUM, 121, ARGUMENT, "momentum", "must be in [0, 1), or MOE_OFF")                                    \
    X(MOE_E_CLIP_NORM, 122, ARGUMENT, "clip_norm", "must be finite and above 0, or MOE_OFF")                         \
    X(MOE_E_LR, 123, ARGUMENT, "lr", "the learning rate must be finite and at least 0")                              \
    X(MOE_E_STEP, 124, ARGUMENT, "step", "counts from 1")                                                            \
    X(MOE_E_RANGE, 125, ARGUMENT, "lo", "lo and hi must be finite, and lo <= hi")                                    \
    X(MOE_E_STD, 126, ARGUMENT, "std", "must be finite and at least 0, and mean finite")                             \
    X(MOE_E_N_TOKENS, 127, ARGUMENT, "n_tokens", "more than the tape was made for")                                  \
    X(MOE_E_LD, 128, ARGUMENT, "ld", "a leading dimension is shorter than its row")                                  \
    X(MOE_E_COEFFICIENT, 129, ARGUMENT, "coefficient", "must be finite")                                             \
    X(MOE_E_INDEX, 130, ARGUMENT, "index", "an expert index is not below n_experts")                                 \
    X(MOE_E_INDEX_TWICE, 131, ARGUMENT, "index", "a token selects the same expert twice")                            \
    X(MOE_E_GROUPS, 132, ARGUMENT, "n_groups", "must be 1 to 256 and divide n_experts")                              \
    X(MOE_E_TOP_GROUPS, 133, ARGUMENT, "top_groups", "must be 1 to n_groups, and their experts at least top_k")      \
    X(MOE_E_CAPACITY, 134, ARGUMENT, "capacity", "must be at least 1")                                               \
    X(MOE_E_SLOTS, 135, ARGUMENT, "slots", "every expert may take the same token, so at least n_experts")            \
    X(MOE_E_ITERATIONS, 136, ARGUMENT, "iterations", "must be at least 1")                                           \
    X(MOE_E_UNEVEN, 137, ARGUMENT, "n_tokens", "must be a multiple of n_experts, for every expert takes as many")    \
    X(MOE_E_TAU, 138, ARGUMENT, "tau", "must be finite and above 0")                                                 \
    X(MOE_E_TRIM, 139, ARGUMENT, "trim", "must be at least 0 and below 0.5")                                         \
    X(MOE_E_AGGREGATE, 140, ARGUMENT, "kind", "not a moe_aggregate_kind")                                            \
    X(MOE_E_NO_OUTPUTS, 141, ARGUMENT, "outputs", "none to combine")                                                 \
    X(MOE_E_ISA, 142, SUPPORT, "isa", "this processor, operating system or build does not have it")                  \
    X(MOE_E_NAME, 143, ARGUMENT, "name", "no such tensor")                                                           \
    X(MOE_E_PART, 144, ARGUMENT, "part", "not a moe_part_kind, or one that this optimizer has not")                  \
    X(MOE_E_TENSOR_SIZE, 145, ARGUMENT, "count", "not the number of elements of the tensor")                         \
    X(MOE_E_NULL_GAME, 146, ARGUMENT, "game", "must not be NULL")                                                    \
    X(MOE_E_NULL_QUALITY, 147, ARGUMENT, "quality", "must not be NULL")                                              \
    X(MOE_E_NULL_WORK, 148, ARGUMENT, "work", "must not be NULL")                                                    \
    X(MOE_E_NULL_LABEL, 149, ARGUMENT, "label", "must not be NULL, nor what else is given by token")                 \
    X(MOE_E_NULL_COUNT, 150, ARGUMENT, "count", "must not be NULL")                                                  \
    X(MOE_E_QUALITY, 151, NUMBER, "quality", "NaN or infinite")                                                      \
    X(MOE_E_LOAD, 152, NUMBER, "load", "must be finite, at least 0 and not all 0")                                   \
    X(MOE_E_GAMMA, 153, ARGUMENT, "gamma", "must be finite and above -1; with several types at least 0")             \
    X(MOE_E_N_TYPES, 154, ARGUMENT, "n_types", "must be 1 to 64")                                                    \
    X(MOE_E_TYPE_SHARE, 155, ARGUMENT, "share", "must be finite, at least 0 and sum to 1")                           \
    X(MOE_E_N_BATCHES, 156, ARGUMENT, "n_batches",                                                                   \
      "must be at least 1; for halves and intervals 2 with tokens in them")                                          \
    X(MOE_E_BATCH, 157, ARGUMENT, "batch", "not below n_batches")                                                    \
    X(MOE_E_LABEL, 158, ARGUMENT, "label", "not below n_labels (a negative one is no label)")                        \
    X(MOE_E_TIER, 159, ARGUMENT, "tier", "not below n_tiers")                                                        \
    X(MOE_E_REPLICATES, 160, ARGUMENT, "replicates", "must be at least 1")                                           \
    X(MOE_E_QUALITY_KIND, 161, ARGUMENT, "kind", "not a moe_quality_kind")                                           \
    X(MOE_E_SERIES, 162, ARGUMENT, "series", "steps must be finite and ascend, and values be finite")                \
    X(MOE_E_FEEDBACK, 163, ARGUMENT, "kf",                                                                           \
      "must be finite, and at least 2 for a fold; h, dt and the series finite, dt above 0")                          \
    X(MOE_E_GAME, 164, NUMBER, "game", "the numbers are too far apart for an equilibrium to be found")               \
    X(MOE_E_MERGE, 165, ARGUMENT, "n_experts", "the two health counters differ in it")                               \
    X(MOE_E_TAPE_DESC, 166, STATE, "tape", "was made for another desc")                                              \
    X(MOE_E_OVERFLOW, 167, OVERFLOW, "size", "the memory needed does not fit in size_t or an index in 31 bits")      \
    X(MOE_E_NO_MEMORY, 168, MEMORY, "memory", "the allocation failed")                                               \
    X(MOE_E_SMALL_MEMORY, 169, MEMORY, "memory", "fewer bytes than the size function asks for")                      \
    X(MOE_E_NAN_X, 170, NUMBER, "x", "a token (or the router) is NaN, infinite, or so large that a logit overflows") \
    X(MOE_E_NAN_LOGITS, 171, NUMBER, "logits", "NaN or infinite")                                                    \
    X(MOE_E_NAN_WEIGHT, 172, NUMBER, "weight", "NaN or infinite")                                                    \
    X(MOE_E_NAN_GRADS, 173, NUMBER, "grads", "the gradient's norm is NaN or infinite; nothing was changed")          \
    X(MOE_E_NO_ROUTES, 174, STATE, "routes",                                                                         \
      "none for the tape's tokens yet: moe_route, or moe_tape_tokens and moe_routes_fill, first")                    \
    X(MOE_E_NO_FORWARD, 175, STATE, "backward", "needs a training forward on the same tape first")                   \
    X(MOE_E_INFERENCE, 176, STATE, "training", "the layer was made with training = MOE_OFF")                         \
    X(MOE_E_OPEN, 177, IO, "path", "the file cannot be opened")                                                      \
    X(MOE_E_READ, 178, IO, "path", "the file cannot be read")                                                        \
    X(MOE_E_WRITE, 179, IO, "path", "the file cannot be written")                                                    \
    X(MOE_E_FILE_SHORT, 180, FILE, "file", "shorter than its header says")                                           \
    X(MOE_E_FILE_HEADER, 181, FILE, "file", "the safetensors header is not valid JSON of the format")                \
    X(MOE_E_FILE_HEADER_SIZE, 182, FILE, "file",                                                                     \
      "the safetensors header is over its cap of 100 MB or ends past the file")                                      \
    X(MOE_E_FILE_DTYPE, 183, FILE, "file", "an element type that is not read here; the view's dtype names it")       \
    X(MOE_E_FILE_SHAPE, 184, FILE, "file", "a tensor's shape does not fit its bytes, or overflows")                  \
    X(MOE_E_FILE_OFFSETS, 185, FILE, "file", "tensors overlap, leave a hole or reach past the end")                  \
    X(MOE_E_FILE_TWICE, 186, FILE, "file", "two tensors have the same name")                                         \
    X(MOE_E_FILE_TENSOR, 187, FILE, "file", "a tensor of the layer is missing or has another shape")                 \
    X(MOE_E_FILE_DESC, 188, FILE, "file", "the layer's description in __metadata__ is missing or not valid")         \
    X(MOE_E_NPY_MAGIC, 189, FILE, "file", "not an .npy file of version 1, 2 or 3")                                   \
    X(MOE_E_NPY_HEADER, 190, FILE, "file", "the .npy header is not a dictionary of descr, fortran_order and shape")  \
    X(MOE_E_NPY_ORDER, 191, FILE, "file",                                                                            \
      "the array is in Fortran order; save it as numpy.ascontiguousarray gives it")                                  \
    X(MOE_E_NPY_SIZE, 192, FILE, "file", "the data after the .npy header is longer than the shape says")             \
    X(MOE_E_NPY_INDEX, 193, FILE, "file", "an index or label is not a whole number that fits in 31 bits")            \
    X(MOE_E_SHARDS, 194, FILE, "file",                                                                               \
      "not a safetensors index: an object with a weight_map of names to file names")                                 \
    X(MOE_E_FILE_NAN, 195, NUMBER, "file", "a tensor of the layer holds NaN or infinity")                            \
    X(MOE_E_LOSS_KIND, 196, ARGUMENT, "kind", "not a moe_loss_kind")                                                 \
    X(MOE_E_NAN_Y, 197, NUMBER, "y",                                                                                 \
      "an output is NaN or infinite: a token (tape.bad_token) or the experts' parameters are too large")             \
    X(MOE_E_NAN_PARAMS, 198, NUMBER, "params", "NaN or infinite (a second moment: or below 0)")                      \
    X(MOE_E_NAN_BIAS, 199, NUMBER, "bias", "NaN or infinite")                                                        \
    X(MOE_E_ARITHMETIC, 200, SUPPORT, "arithmetic",                                                                  \
      "this build's is not IEEE: compiled with a part of -ffast-math, or fmaf is wrong (then define MOE_SOFT_FMA)")  \
    X(MOE_E_NO_TOKENS, 201, ARGUMENT, "tokens", "no tokens: there are no rows, or none has a choice")                \
    X(MOE_E_SAVE_NAN, 202, NUMBER, "layer",                                                                          \
      "a tensor to be saved is NaN or infinite, or its second moment below 0; moe_layer_check names it")             \
    X(MOE_E_FOLDER, 203, IO, "path", "is a folder, not a file")                                                      \
    X(MOE_E_GATE_UP, 204, ARGUMENT, "gate_up",                                                                       \
      "not a moe_gate_up_kind; or fused, but with wu or bu, or the desc's experts have no gate")                     \
    X(MOE_E_SWITCH_LOAD, 205, ARGUMENT, "switch_load", "not a moe_load_kind")                                        \
    X(MOE_E_LOSS_WEIGHT, 206, ARGUMENT, "loss_weight", "must be finite and not negative")                            \
    X(MOE_E_UNSTEPPED, 207, STATE, "layer",                                                                          \
      "has gradients that no moe_step has used: step first, or save without the optimiser")                          \
    X(MOE_E_CODE_SHARE, 208, ARGUMENT, "code_share", "must be in [0, 1] or MOE_OFF")                                 \
    X(MOE_E_NORMALIZE_LATE, 209, ARGUMENT, "normalize_late", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")               \
    X(MOE_E_CONTROLLER_RECENTRE, 210, ARGUMENT, "controller_recentre", "must be MOE_DEFAULT, MOE_ON or MOE_OFF")     \
    X(MOE_E_SEQUENCE_BEGIN, 211, ARGUMENT, "sequence_begin", "must ascend from 0 to at most the number of tokens")   \
    X(MOE_E_N_SEQUENCES, 212, ARGUMENT, "n_sequences",                                                               \
      "more than the tape has room for: desc.sequence must be at most the sequences' mean length")                   \
    X(MOE_E_ONE_WEIGHT, 213, ARGUMENT, "normalize",                                                                  \
      "one expert's weight would always be 1, and the task teach the router nothing: with top_k = 1 take normalize " \
      "off, gate = softmax for softmax-selected, combine = sum for robust (or freeze_router, or training off)")      \
    X(MOE_E_ONE_CHOICE, 214, ARGUMENT, "top_k", "must be 1 for select = auction, which gives a token to one expert") \
    X(MOE_E_COMBINE_CAPACITY, 215, ARGUMENT, "capacity_factor",                                                      \
      "must be off for combine = soft and merge, in which every expert takes part (capacity_factor_eval as well)")   \
    X(MOE_E_COMBINE_NOISE, 216, ARGUMENT, "noise", "must be none for combine = soft, whose logits are its slots'")   \
    X(MOE_E_COMBINE_SCORE, 217, ARGUMENT, "score",                                                                   \
      "must have columns to learn for combine = soft: not slice, subspace, hash or random")                          \
    X(MOE_E_COMBINE_GATE, 218, ARGUMENT, "gate", "must be softmax for combine = soft and merge")                     \
    X(MOE_E_LOSS_IMPORTANCE_SELECTED, 219, SUPPORT, "loss.importance-selected",                                      \
      "combine = soft has no choices to weigh")                                                                      \
    X(MOE_E_LOSS_LOAD, 220, SUPPORT, "loss.load",                                                                    \
      "needs noise = gaussian or learned")                                                                           \
    X(MOE_E_LOSS_RANK, 221, SUPPORT, "loss.rank",                                                                    \
      "needs n_ranks above 1 that divides n_experts")                                                                \
    X(MOE_E_LOSS_COMMUNICATION, 222, SUPPORT, "loss.communication",                                                  \
      "needs n_ranks above 1 that divides n_experts")                                                                \
    X(MOE_E_LOSS_LOCALITY, 223, SUPPORT, "loss.locality",                                                            \
      "needs n_ranks above 1 that divides n_experts")                                                                \
    X(MOE_E_LOSS_RELU_L1, 224, SUPPORT, "loss.relu-l1",                                                              \
      "needs gate = relu")                                                                                           \
    X(MOE_E_LOSS_SIMBAL, 225, SUPPORT, "loss.simbal",                                                                \
      "needs a score with columns to learn: not slice, subspace, hash or random")                                    \
    X(MOE_E_LOSS_DIVERSE_SIMPLE, 226, SUPPORT, "loss.diverse-simple",                                                \
      "needs a score with columns to learn: not slice, subspace, hash or random")                                    \
    X(MOE_E_LOSS_PROTOTYPE_ORTHOGONALITY, 227, SUPPORT, "loss.prototype-orthogonality",                              \
      "needs a score with columns to learn: not slice, subspace, hash or random")                                    \
    X(MOE_E_LOSS_PROTOTYPE_DIVERSITY, 228, SUPPORT, "loss.prototype-diversity",                                      \
      "needs a score with columns to learn: not slice, subspace, hash or random")                                    \
    X(MOE_E_LOSS_PROTOTYPE_ALIGNMENT, 229, SUPPORT, "loss.prototype-alignment",                                      \
      "needs score = cosine, projected or prototype, noise = none, and not combine = soft")                          \
    X(MOE_E_LOSS_LATENT_KL, 230, SUPPORT, "loss.latent-kl",                                                          \
      "no layer has a variational latent; moe_loss takes one as an argument")                                        \
    X(MOE_E_LOSS_OUTPUT_ORTHOGONALITY, 231, SUPPORT, "loss.output-orthogonality",                                    \
      "needs combine = sum, without zero, copy and constant experts")                                                \
    X(MOE_E_LOSS_ORTHONORMAL, 232, SUPPORT, "loss.orthonormal",                                                      \
      "needs expert = orthonormal")                                                                                  \
    X(MOE_E_LOSS_CODEBOOK, 233, SUPPORT, "loss.codebook",                                                            \
      "needs n_codes")                                                                                               \
    X(MOE_E_ROUTER_BIAS, 234, ARGUMENT, "router_bias",                                                               \
      "not a flag, or on with a score that has no tensor \"router\"")                                                \
    X(MOE_E_SHARED_GATE, 235, ARGUMENT, "shared_gate", "not a flag, or on without shared experts")                   \
    X(MOE_E_GROUP_BEST, 236, ARGUMENT, "group_best", "must be 1 to 256")                                             \
    X(MOE_E_INPUT_SCALE, 237, ARGUMENT, "input_scale", "must be finite and above 0, and 1 with n_codes")             \
    X(MOE_E_EXPERT_NORM, 238, ARGUMENT, "expert_norm",                                                               \
      "not a flag, or on with copy or constant experts, combine = soft or n_codes")                                  \
    X(MOE_E_CAPACITY_SEQUENCE, 239, ARGUMENT, "capacity_sequence", "not a flag")                                     \
    X(MOE_E_CAPACITY_ROUND, 240, ARGUMENT, "capacity_round", "not a moe_round_kind")

typedef enum moe_status {
    MOE_OK = 0,
#define MOE__X(code, number, kind, field, sentence) code = number,
    MOE_STATUS_LIST(MOE__X)
#undef MOE__X
    MOE_STATUS_COUNT
} moe_status;

/* The sentence of a status, e.g. "d_model: must be at least 1". Never NULL; static storage. */
MOE_API const char *moe_status_string(moe_status status);
/* The argument or field that it is about, e.g. "d_model"; "" for MOE_OK. */
MOE_API const char *moe_status_field(moe_status status);
MOE_API moe_error_kind moe_status_kind(moe_status status);

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
    MOE_SCORE_TANH,      /* tanh(x W) R, W (d, h), R (h, E), as in MoE++ [C] */
    MOE_SCORE_HALF_COSINE, /* (x W) . unit(R_e), W (d, h), as in torchscale's X-MoE [C] */
    MOE_SCORE_COUNT
} moe_score_kind;

typedef enum moe_noise_kind { /* added to the logits in training */
    MOE_NOISE_DEFAULT,
    MOE_NOISE_NONE,
    MOE_NOISE_GAUSSIAN, /* N(0, noise_std^2) */
    MOE_NOISE_UNIFORM,  /* uniform in [0, noise_std) */
    MOE_NOISE_GUMBEL,   /* noise_std times standard Gumbel numbers */
    MOE_NOISE_LEARNED,  /* N(0, 1) (softplus(x Wn) + 0.01), as in noisy top-k [C]; tensor "router.noise" */
    MOE_NOISE_COUNT
} moe_noise_kind;

typedef enum moe_gate_kind { /* logits (T, E) -> scores (T, E), and the weights of the selected */
    MOE_GATE_DEFAULT,
    MOE_GATE_SOFTMAX,          /* softmax(logits / temperature) over all experts */
    MOE_GATE_SOFTMAX_SELECTED, /* softmax(logits / temperature) over the selected experts: sums to 1 whatever
                                  `normalize` says */
    MOE_GATE_SIGMOID,          /* sigmoid(logits / temperature) */
    MOE_GATE_RELU,             /* relu(logits) */
    MOE_GATE_SIGN,             /* 1 / (number selected); straight-through gradient by sigmoid(logits / temperature)
                                  minus the same of the learned threshold, as in DynMoE [C] */
    MOE_GATE_SPARSEMIXER,      /* p of the selected among those not masked, with SparseMixer's gradient, as in GRIN
                                  [C] */
    MOE_GATE_COUNT
} moe_gate_kind;

typedef enum moe_select_kind { /* scores (T, E) -> routes */
    MOE_SELECT_DEFAULT,
    MOE_SELECT_TOP_K,         /* the k highest scores of each token; ties go to the lowest index. With `threshold`: only
                                 those above */
    MOE_SELECT_GROUPS,        /* top-k inside the top_groups best of n_groups groups, as in DeepSeek-V2, V3 [C] */
    MOE_SELECT_TOP_P,         /* highest first, through the first whose running sum exceeds top_p */
    MOE_SELECT_THRESHOLD,     /* all scores above `threshold` (gate sign: logits above the learned thresholds) */
    MOE_SELECT_EXPERT_CHOICE, /* each expert takes its T top_k / E highest tokens; sees the whole batch: not causal */
    MOE_SELECT_SINKHORN,      /* training: top-k of the balanced plan of the batch; evaluation: top-k of the logits */
    MOE_SELECT_AUCTION,       /* training: T / E tokens each, highest total logit, by auction, as in BASE [C];
                                 evaluation: the highest */
    MOE_SELECT_SAMPLED,       /* training: by Gumbel noise among the logits near the highest, as in GRIN [C];
                                 evaluation: the highest */
    MOE_SELECT_ALL,           /* every expert */
    MOE_SELECT_GUMBEL,        /* training: the highest logit, the other choices by Gumbel noise on the logits, as
                                 torchscale draws the second [C], there in evaluation too; evaluation: top-k */
    MOE_SELECT_COUNT
} moe_select_kind;

typedef enum moe_combine_kind { /* expert outputs -> y */
    MOE_COMBINE_DEFAULT,
    MOE_COMBINE_SUM,    /* sum of weight * output */
    MOE_COMBINE_SOFT,   /* soft slots: experts read mixtures of a sequence's tokens, after Soft MoE [K] */
    MOE_COMBINE_MERGE,  /* one expert a sequence, its parameters the weighted mean of all, as in SMEAR [C] */
    MOE_COMBINE_ROBUST, /* weights times reliability exp(-distance from the median output / (robust_tau MAD)),
                           renormalised [D] */
    MOE_COMBINE_COUNT
} moe_combine_kind;

typedef enum moe_schedule_kind { /* from one value to another in a number of steps */
    MOE_SCHEDULE_DEFAULT,
    MOE_SCHEDULE_LINEAR,
    MOE_SCHEDULE_EXPONENTIAL, /* from * (to / from)^share */
    MOE_SCHEDULE_COSINE,      /* half a cosine */
    MOE_SCHEDULE_COUNT
} moe_schedule_kind;

typedef enum moe_init_kind { /* of the tensor "router" */
    MOE_INIT_DEFAULT,
    MOE_INIT_UNIFORM,    /* +- router_gain / sqrt(rows) */
    MOE_INIT_ORTHOGONAL, /* columns of length router_gain, orthogonal as far as there are rows */
    MOE_INIT_ZERO,
    MOE_INIT_COUNT
} moe_init_kind;

typedef enum moe_order_kind { /* who gets an expert's last places when capacity is short */
    MOE_ORDER_DEFAULT,
    MOE_ORDER_TOKEN,  /* lower token first (Switch [C]) */
    MOE_ORDER_CHOICE, /* all first choices before all second choices, then lower token (GShard [C]) */
    MOE_ORDER_WEIGHT, /* all first choices before all second choices, then the token whose first choice has the higher
                         weight, then lower token (batch-prioritised routing, as in torchscale and tutel [C]) */
    MOE_ORDER_PAIR,   /* higher weight of the pair, whatever choice it is, then lower token (Megatron's "probs" [C]) */
    MOE_ORDER_COUNT
} moe_order_kind;

typedef enum moe_round_kind { /* how an expert's share of the pairs becomes whole tokens; c = capacity_factor */
    MOE_ROUND_DEFAULT,
    MOE_ROUND_SHARE,   /* floor(c k ceil(T / E)): torchscale [C] */
    MOE_ROUND_DOWN,    /* floor(c k T / E): Switch [C] */
    MOE_ROUND_NEAREST, /* c k T / E, halves to even: flaxformer [C] */
    MOE_ROUND_UP,      /* ceil(c k T / E): Megatron, DeepSpeed [C] */
    MOE_ROUND_COUNT
} moe_round_kind;

typedef enum moe_expert_kind { /* what one expert computes; W1 (d, f), W2 (f, d) */
    MOE_EXPERT_DEFAULT,
    MOE_EXPERT_RELU,   /* relu(x W1) W2 */
    MOE_EXPERT_GELU,   /* gelu(x W1) W2, exact (erf) */
    MOE_EXPERT_SILU,   /* silu(x W1) W2 */
    MOE_EXPERT_SWIGLU, /* (silu(x Wg) * (x Wu)) W2 */
    MOE_EXPERT_GEGLU,  /* (gelu(x Wg) * (x Wu)) W2 */
    MOE_EXPERT_ORTHONORMAL, /* x V diag(s) U^T: W1 = V with orthonormal columns, W2 = diag(s) U^T with orthogonal rows,
                               kept so after each step; after ERMoE [S]. d_ff < d_model */
    MOE_EXPERT_GELU_TANH,      /* as gelu, by tanh: z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) */
    MOE_EXPERT_GEGLU_TANH,     /* as geglu, with that */
    MOE_EXPERT_SWIGLU_CLAMPED, /* (a sigmoid(1.702 a) * (u + 1)) W2, a = min(x Wg, 7), u = x Wu within +-7; as in
                                  GPT-OSS [C] */
    MOE_EXPERT_COUNT
} moe_expert_kind;

typedef enum moe_loss_kind { /* auxiliary losses; desc.loss[kind] is the coefficient, 0 = not used; moe_loss_info says
                                more, docs/math.md too; the mark is that of the value's form */
    MOE_LOSS_SWITCH,      /* even load: E * sum_e f_e P_e, as in Switch / GShard [C] */
    MOE_LOSS_Z,           /* small logits: mean_t (logsumexp z_t)^2, as in ST-MoE [C] */
    MOE_LOSS_IMPORTANCE,  /* CV^2 of the mean probabilities P [K] */
    MOE_LOSS_IMPORTANCE_SELECTED, /* CV^2 of the sums of the selected weights [K] */
    MOE_LOSS_LOAD,        /* CV^2 of the probability, over the noise, of being selected [C] */
    MOE_LOSS_ENTROPY,     /* -(mean entropy of a token): a token spreads over the experts [D] */
    MOE_LOSS_CERTAINTY,   /* +(mean entropy of a token): a token is sure of its expert [K] */
    MOE_LOSS_KL_UNIFORM,  /* KL(P || uniform) = ln E - entropy of P [S] */
    MOE_LOSS_KL_REVERSE,  /* KL(uniform || P): strong on dead experts [D] */
    MOE_LOSS_MUTUAL_INFORMATION, /* -(entropy of P - mean entropy of a token) [C] */
    MOE_LOSS_L2_UNIFORM,  /* sum_e (P_e - 1/E)^2 [C] */
    MOE_LOSS_SEQUENCE,    /* switch in each sequence, on shares of the scores [K] */
    MOE_LOSS_RANK,      /* switch between ranks: groups of experts [K] */
    MOE_LOSS_COMMUNICATION, /* the same, of the tokens that a rank receives [K] */
    MOE_LOSS_LOCALITY,    /* KL(shares of the ranks || nearly all at home) [K] */
    MOE_LOSS_RELU_L1,     /* sparsity of a ReLU gate, the busy experts first [C] */
    MOE_LOSS_VARIANCE,    /* -(variance of the scores over the tokens) [K] */
    MOE_LOSS_ORACLE,      /* cross entropy to a teacher's choice [S] */
    MOE_LOSS_SIMBAL,      /* sum abs(R^T R - I) of the router [P] */
    MOE_LOSS_DIVERSE_SIMPLE, /* norm of C^T C - I, C the router's columns at unit length, and their mean length [C] */
    MOE_LOSS_PROTOTYPE_ORTHOGONALITY, /* squared norm of C^T C - I, C the router's columns at unit length [D] */
    MOE_LOSS_PROTOTYPE_DIVERSITY, /* mean exp(2 cos - 2) between two prototypes [D] */
    MOE_LOSS_PROTOTYPE_ALIGNMENT, /* 1 - mean cos of a latent token and its prototypes [D] */
    MOE_LOSS_LATENT_KL,   /* KL(q || N(0, I)) of a variational latent [D] */
    MOE_LOSS_REDUNDANCY,  /* mean relu(cos) between the logits of two experts [C] */
    MOE_LOSS_OUTPUT_ORTHOGONALITY, /* projections of a token's expert outputs on each other [K] */
    MOE_LOSS_ORTHONORMAL, /* squared norm of V^T V - I of an expert's basis V [S] */
    MOE_LOSS_CODEBOOK,    /* codes to tokens, tokens to codes [C] */
    MOE_LOSS_COUNT
} moe_loss_kind;

typedef enum moe_load_kind { /* which f the loss switch has; one choice a token: all the same */
    MOE_LOAD_DEFAULT,
    MOE_LOAD_ALL,    /* all choices, f sums to 1: DeepSeekMoE [C], megablocks */
    MOE_LOAD_FIRST,  /* first choices alone, f sums to 1: GShard, V-MoE, DeepSpeed [C] */
    MOE_LOAD_TOKENS, /* all choices by the number of tokens, f sums to k: transformers, flaxformer [C] */
    MOE_LOAD_COUNT
} moe_load_kind;

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
    MOE_OPTIMIZER_COUNT
} moe_optimizer_kind;

typedef enum moe_isa_kind {
    MOE_ISA_AUTO, MOE_ISA_SCALAR, MOE_ISA_AVX2, MOE_ISA_AVX512, MOE_ISA_NEON, MOE_ISA_COUNT
} moe_isa_kind;

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
    int shared_gate;  /* their sum is weighted by sigmoid(x . w), tensor "experts.shared_gate" w (d), as in Qwen2-MoE
                         [C]; default off */
    size_t n_zero, n_copy, n_constant; /* of the n_experts, the last: they give 0, the token, a learned mix of the token
                                          and a vector (MoE++ [C]); 0 = none. A zero expert's weight is 0, before
                                          normalisation */
    size_t sequence;  /* tokens of a sequence, in order; the last may be shorter; 0 = the whole batch is one */
    size_t n_ranks;   /* ranks of gating dropout and locality: token t lives on rank t P / T, expert e on e P / E; 0 =
                         1 */
    /* score */
    moe_score_kind score; /* default linear */
    size_t d_router;      /* hidden or latent width of the router; 0 = d_model / 2 (mlp, prototype), n_experts / 2
                             (projected), 8 n_experts (tanh) or 16 (half-cosine), at least 1 */
    int router_bias;      /* logits += c, tensor "router.bias" (GPT-OSS [C]); default off, but on for mlp and normed */
    int route_sequence;   /* the router sees the mean of the token's sequence: a sequence goes one way; default off, on
                             for combine = merge */
    int freeze_router;    /* the router's tensors keep their initial values; default off */
    moe_init_kind router_init; /* default uniform */
    float router_gain;    /* 0 = 1 */
    float jitter;         /* in training the router sees x times uniform numbers in [1 - jitter, 1 + jitter); 0 =
                             none */
    moe_noise_kind noise; /* default none */
    float noise_std;      /* 0 = 1 */
    int residual;         /* logits += previous A, previous = side.previous, tensor "router.residual" A (E, E), as in
                             MoE++ [C]; default off */
    /* gate */
    moe_gate_kind gate;    /* default softmax */
    int normalize;         /* divide the selected weights by their sum; default on if top_k > 1 (with one
                              expert the weight would be 1 and the router would learn nothing: MOE_E_ONE_WEIGHT) */
    float weight_scale;    /* weights are multiplied by it at the end; 0 = 1 */
    float temperature;     /* of the gate; higher is softer; 0 = 1 */
    int learn_temperature; /* the gate's is a parameter ("router.log_scale" = -log temperature) that begins at
                              `temperature`; prob, and with it the losses, keep `temperature`; default off */
    float temperature_end; /* temperature goes there in schedule_steps; 0 = stays */
    float mask_jitter;     /* SparseMixer masks logits further below the highest than 2 * mask_jitter of it; 0 = 0.1 */
    /* select */
    moe_select_kind select; /* default top-k */
    size_t top_k_min;       /* in training k goes from here to top_k in schedule_steps; 0 = top_k */
    moe_schedule_kind schedule; /* of k and temperature; default linear */
    uint64_t schedule_steps;
    uint64_t random_steps;        /* routing is uniformly random for this many steps (warm-up) */
    size_t n_groups, top_groups;  /* 0 = 1, 1 */
    size_t group_best;            /* a group's score is the sum of so many of its best: 1 as in DeepSeek-V2 [C], 2 as in
                                     V3 [C]; 0 = 2 */
    float top_p;                  /* 0 = 0.4 */
    float threshold;              /* 0 or MOE_OFF = 0 for select = threshold, none for top-k */
    int fallback;                 /* a token with no score above the threshold takes its highest score: default in
                                     evaluation only */
    int random_second;            /* in training a second or later choice stays if top_k w > U(0, 1), w its weight,
                                     normalised over all choices, as in GShard [C]; default off */
    int normalize_late;           /* with random_second: w is not normalised yet, and weights are over those that stay,
                                     as in torchscale; default off */
    float sinkhorn_epsilon;       /* 0 = 1 */
    size_t sinkhorn_iterations;   /* 0 = 20 */
    float gate_drop;              /* probability, one draw a step, that all tokens stay on their rank (gating dropout
                                     [S]); 0 = none */
    int gate_drop_experts;        /* then no expert runs at all; default off */
    float expert_drop;            /* probability that an expert is left out for a sequence, in training (SMEAR [C]); 0 =
                                     none */
    moe_order_kind capacity_order; /* default token */
    float capacity_factor;         /* an expert takes at most so many times its share of the T k pairs; 0 or MOE_OFF =
                                      dropless */
    float capacity_factor_eval;    /* the same in evaluation; 0 = capacity_factor */
    moe_round_kind capacity_round; /* default share */
    size_t min_capacity;           /* but at least so many, as 4 in Switch [C]; 0 = 1 */
    int capacity_sequence;      /* each sequence is counted for itself, T = sequence, as GShard's groups are [K];
                                   default off: the whole batch */
    /* experts and combine */
    moe_expert_kind expert; /* default SwiGLU */
    int bias;               /* experts have biases b1 (f), b2 (d); default off */
    int expert_norm;        /* experts see (x - mean) / sqrt(variance + 1e-5), as in BASE [C], whose scale and shift W1
                               and b1 can hold; default off */
    float input_scale;      /* experts see x times it: 2 in MoE++ [C]; 0 = 1 */
    int zero_output;        /* w2 begins at 0, so that the layer does (BASE [C]); default off */
    moe_combine_kind combine; /* default sum */
    size_t soft_slots;      /* slots of an expert, for combine = soft; 0 = 1 */
    float robust_tau;       /* 0 = 1 */
    size_t n_codes;         /* > 0: y = g_0 y + g_1 LN(f_e(LN(q))), q the nearest of n_codes codes, e = code % E, g =
                               softmax(x G): VQMoE [C] */
    float code_share;       /* c: in place of q, (1 - c) x + c (q - x), as in VQMoE's code; 0 or MOE_OFF = q */
    /* balance */
    float loss[MOE_LOSS_COUNT];  /* coefficients; 0 or MOE_OFF = not used */
    moe_load_kind switch_load;   /* default all */
    moe_control_kind controller; /* default none; moe_step runs it on the loads of the backward calls since the last
                                    step */
    float controller_rate, controller_damping; /* of moe_control; 0 = the published ones */
    int controller_recentre;     /* its bias has the mean 0 after each step; default off, on for id */
    /* training */
    int training; /* MOE_OFF: no gradients, no optimiser state; default on */
    moe_optimizer_kind optimizer; /* default AdamW */
    float beta1, beta2, epsilon;  /* AdamW; 0 = 0.9, 0.999, 1e-8 */
    float momentum;               /* SGD; 0 = 0.9 */
    float weight_decay;           /* on weight matrices, not on biases; 0 = 0.01 */
    float clip_norm;              /* moe_step scales the layer's gradient to at most this L2 norm; 0 or MOE_OFF = no
                                     clipping */
    uint64_t seed;                /* of the initial parameters; 0 = 1 */
    /* surroundings (not saved) */
    moe_parallel parallel;
    void *alloc_context;
} moe_desc;

/* The systems of the literature, one row each: docs/systems.md. */
typedef struct moe_system {
    const char *name, *title;
    const char *source;  /* arXiv number or DOI, and year */
    const char *mark;    /* how sure the form is: [P] paper, [C] authors' code, [S] summary, [K] general knowledge, [D]
                            derived */
    const char *choices; /* the desc that it stands for, as moe_desc_parse reads it */
    const char *purpose; /* one line: what it is for */
    const char *limits;  /* what it cannot do, or needs */
} moe_system;
MOE_API size_t moe_systems_count(void);
MOE_API const moe_system *moe_system_at(size_t index);            /* NULL past the end */
MOE_API const moe_system *moe_system_find(const char *name);  /* NULL if there is none */
/* The names most like `name`, separated by ", ", into buffer, cut at size, NUL-terminated: for an error message. */
MOE_API void moe_system_near(const char *name, char *buffer, size_t size);
/* Sets the row's choices in *d; what the row does not mention stays as it was. MOE_E_SYSTEM for an unknown name. */
MOE_API moe_status moe_desc_system(moe_desc *desc, const char *name);

/* Fills *out with the effective values of *in (out may be in). Idempotent. Errors name the
 * field; of several bad ones the first in the order of the struct. */
MOE_API moe_status moe_desc_resolve(const moe_desc *in, moe_desc *out);
/* Names of the table rows, for printing and parsing: e.g. moe_gate_name(MOE_GATE_SOFTMAX) = "softmax"; NULL past the
 * end. */
MOE_API const char *moe_score_name(moe_score_kind kind);
MOE_API const char *moe_gate_name(moe_gate_kind kind);
MOE_API const char *moe_select_name(moe_select_kind kind);
MOE_API const char *moe_order_name(moe_order_kind kind);
MOE_API const char *moe_expert_name(moe_expert_kind kind);
MOE_API const char *moe_loss_name(moe_loss_kind kind);
MOE_API const char *moe_optimizer_name(moe_optimizer_kind kind);
/* A row of the tables of losses and of controllers in docs/math.md. */
typedef struct moe_info {
    const char *name, *formula, *source;
    const char *mark;  /* how sure the source is: "P" paper, "C" code, "S" summary, "K" general knowledge, "D" derived
                          here */
    float coefficient; /* the usual one; 0 = none is known */
} moe_info;
MOE_API const moe_info *moe_loss_info(moe_loss_kind kind); /* static storage; NULL past the end */
MOE_API const char *moe_isa_name(moe_isa_kind kind);
MOE_API const char *moe_noise_name(moe_noise_kind kind);
MOE_API const char *moe_combine_name(moe_combine_kind kind);
MOE_API const char *moe_schedule_name(moe_schedule_kind kind);
MOE_API const char *moe_load_name(moe_load_kind kind);
MOE_API const char *moe_round_name(moe_round_kind kind);
MOE_API const char *moe_init_name(moe_init_kind kind);
/* Sets one field by its name in the JSON and its value as text: ("gate", "sigmoid"), ("top_k", "4"), ("loss.switch",
 * "0.01"), ("capacity_factor", "off"), ("bias", "true"). */
MOE_API moe_status moe_desc_set(moe_desc *desc, const char *field, const char *value);
/* Sets fields from "field=value field=value ..." (blanks between). On error *d is as it was, and *at (may be NULL) the
 * place in the text. */
MOE_API moe_status moe_desc_parse(moe_desc *desc, const char *text, size_t *at);
/* Writes the desc as one JSON object, e.g. {"d_model":8,...}, NUL-terminated, cut at `size`. Returns the
 * length that it needs without the NUL, like snprintf. NULL desc: 0. */
MOE_API size_t moe_desc_json(const moe_desc *desc, char *buffer, size_t size);

/* ==== arrays ==================================================================================
 * Level 1: stateless functions on row-major float arrays. Arrays may be NULL only where their count is 0
 * or where it says so. Inputs and outputs must not overlap unless it says so. */

/* Instruction set. AUTO picks the best of processor and operating system; the choice is made once, at the
 * first use, and is the only global state. Forcing one that is not there returns MOE_E_ISA and changes
 * nothing. Not to be called while another thread is inside the library. */
MOE_API moe_status moe_force_isa(moe_isa_kind isa);
MOE_API moe_isa_kind moe_active_isa(void);
/* What this build compiled threads with: "openmp" or "serial". */
MOE_API const char *moe_thread_backend(void);
/* Runs tasks as `p` says (NULL: default); the library's own products use it, and so may you. */
MOE_API void moe_run(const moe_parallel *parallel, size_t n_tasks, moe_task *task, void *arg);
MOE_API size_t moe_workers(const moe_parallel *parallel); /* upper bound of worker + 1 in moe_run */

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
MOE_API moe_status moe_rand_normal(uint64_t seed, uint64_t stream, size_t n, float mean, float std, float *out);
/* Box-Muller */
/* -log(-log u), u uniform in (0, 1): finite, from -2.82 to 16.64. The argmax of logits + gumbel is a sample of their
 * softmax. */
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
MOE_API moe_status moe_gemm(const moe_gemm_args *args);
MOE_API moe_status moe_gemm_scratch(const moe_gemm_args *args, size_t *bytes);

/* scores = softmax(logits / temperature), each row of (rows, cols). In place allowed. Logits must be finite. */
MOE_API moe_status moe_softmax(size_t rows, size_t cols, float temperature, const float *logits, float *scores);
/* d_logits += the gradient, given scores = moe_softmax(...) and d_scores, all (rows, cols). */
MOE_API moe_status moe_softmax_backward(size_t rows, size_t cols, float temperature, const float *scores,
                                        const float *d_scores, float *d_logits);
/* The k highest of each row of scores (rows, cols), descending; ties go to the lowest index. index (rows, k);
 * value (rows, k) may be NULL. NaN: MOE_E_NAN_LOGITS; -infinity is allowed. */
MOE_API moe_status moe_topk(size_t rows, size_t cols, size_t top_k, const float *scores, int32_t *index, float *value);

/* The other selections of scores (rows, cols): rows are tokens, columns experts. index (rows, k): best first, then -1 =
 * no choice. Ties go to the lowest index; NaN: MOE_E_NAN_LOGITS; -infinity is allowed unless it says so. Nothing
 * allocates but where there is scratch: NULL = the library does, else at least what the *_scratch function says. */

/* DeepSeek's [C]: the columns are n_groups equal groups (at most 256); the score of a group is the sum of its
 * group_best best (1 to 256; all if there are fewer), in V2 of one, in V3 of two, which is what moe_topk_groups takes;
 * the top_groups best groups are kept, and the k best columns of these. +infinity is an error too. */
MOE_API moe_status moe_topk_groups_best(size_t rows, size_t cols, size_t top_k, size_t n_groups, size_t top_groups,
                                        size_t group_best, const float *scores, int32_t *index);
MOE_API moe_status moe_topk_groups(size_t rows, size_t cols, size_t top_k, size_t n_groups, size_t top_groups,
                                   const float *scores, int32_t *index);
/* Of the scores above threshold + per_col[column] (per_col NULL: 0) the k that are furthest above per_col. None is
 * above: with `fallback` the highest score, whatever per_col, as in DynMoE [C]; else no choice. */
MOE_API moe_status moe_topk_threshold(size_t rows, size_t cols, size_t top_k, float threshold, const float *per_col,
                                      int fallback, const float *scores, int32_t *index);
/* Top-p [C]: by descending prob, through the first whose running sum is above p, but at most k. Not renormalised. */
MOE_API moe_status moe_top_p(size_t rows, size_t cols, size_t top_k, float top_p, const float *prob, int32_t *index);
/* Expert choice [K]: each column takes its `capacity` highest rows (all, if there are fewer). index (rows, slots),
 * slots >= cols: the columns that took the row, by descending score. */
MOE_API moe_status moe_expert_choice(size_t rows, size_t cols, size_t capacity, size_t slots, const float *scores,
                                     int32_t *index, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_expert_choice_scratch(size_t rows, size_t cols, size_t *bytes);
/* plan (rows, cols) = exp(scores / epsilon) scaled so that columns sum to rows / cols and then, exactly, rows to 1;
 * both, `iterations` times, in the log domain. Scores must be finite. */
MOE_API moe_status moe_sinkhorn(size_t rows, size_t cols, float epsilon, size_t iterations, const float *scores,
                                float *plan, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_sinkhorn_scratch(size_t rows, size_t cols, size_t *bytes);
/* BASE's auction [P+C]: index (rows) = the column of each row, so that every column has exactly rows / cols rows and
 * the sum of the scores is high: an auction with steps of eps = max((max - min) / 50, 1e-4), as a rule some ten rounds.
 * If it ends within 100 rounds, the sum is at most eps short of the optimum for each round that a row was held by who
 * has it at the end, summed over the rows (proof: docs/math.md): the authors let the price of what is held rise by eps
 * every round. From round 100 on there is no bound, and should it not end in 1000, what is not sold goes to who has
 * room. Scores must be finite. */
MOE_API moe_status moe_auction(size_t rows, size_t cols, const float *scores, int32_t *index, void *scratch,
                               size_t scratch_bytes);
MOE_API moe_status moe_auction_scratch(size_t rows, size_t cols, size_t *bytes);

/* Combining outputs (vectors of d) some of which may be wrong.
 * moe_robust_weights, after the defence against unreliable clients [D]: med = the median of the k outputs in each
 * coordinate, D_e = ||outputs[e] - med||, reliability[e] = exp(-D_e / (tau * median of D)); where that median is 0 it
 * is 1 if D_e is 0, else 0. out[e] = weight[e] * reliability[e] / their sum (0 if that is 0). Outputs that are not
 * finite have reliability 0 and no part in the medians. The weighted sum itself is yours. */
MOE_API moe_status moe_robust_weights(size_t top_k, size_t d_model, const float *const *outputs, const float *weight,
                                      float tau, float *reliability, float *out, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_robust_weights_scratch(size_t top_k, size_t d_model, size_t *bytes);
typedef enum moe_aggregate_kind {
    MOE_AGGREGATE_MEAN,
    MOE_AGGREGATE_TRIMMED,  /* in each coordinate the mean without the (size_t)(trim * n) lowest and as many highest */
    MOE_AGGREGATE_MEDIAN,   /* in each coordinate */
    MOE_AGGREGATE_GEOMETRIC, /* the point with the least sum of distances: Weiszfeld's iteration, as Vardi and Zhang
                                mend it */
    MOE_AGGREGATE_COUNT
} moe_aggregate_kind;
/* out (d) of rows (n, d); trim in [0, 0.5) is for MOE_AGGREGATE_TRIMMED. */
MOE_API moe_status moe_aggregate(moe_aggregate_kind kind, size_t n, size_t d_model, const float *rows, float trim,
                                 float *out, void *scratch, size_t scratch_bytes);
MOE_API moe_status moe_aggregate_scratch(size_t n, size_t d_model, size_t *bytes);

/* Auxiliary losses: moe_loss gives the value of one, unweighted, in *value (may be NULL), and adds coefficient times
 * its gradient to those of the arrays d_... that are not NULL. A loss looks only at its own members of the arguments;
 * zero the others. After each member stand the losses that read it.
 *
 * Some read statistics of the batch, which you make first and may sum (a mean: average) over micro-batches or ranks:
 * then every part is balanced for the whole. Counts are constant in the gradient; through a mean it flows, as if this
 * batch were all of it. docs/math.md has the formulas, the gradients and their sources. */
typedef struct moe_loss_args {
    /* shape: T tokens, E experts */
    size_t n_tokens, n_experts;
    size_t top_k;        /* k: choices of a token */
    size_t d_model;      /* d: width of a token or latent token, of an output, of a router's column; a matrix's rows */
    size_t d_ff;         /* f: columns of the matrix */
    size_t sequence;     /* tokens of a sequence; the last may be shorter */
    size_t n_ranks;      /* P: equal blocks of experts; expert e lives on rank e / (E / P) */
    size_t rank_limit;   /* ranks that a token may use: communication */
    size_t home;         /* the rank at which all tokens are: locality */
    size_t n_codes;
    uint64_t counted;    /* tokens that the load is of: communication, relu-l1 */
    float temperature;   /* prob is the softmax of logits / temperature, and d_logits is by the logits; 0 = 1 */
    float smoothing;     /* locality: share of the probability that should be away from home, above 0 and below 1 */
    float commitment;    /* codebook: weight of the tokens' part, usually 0.25 */
    /* of each token and expert (T, E) */
    const float *prob;   /* softmax: switch, rank, communication, locality, importance, kl-..., l2-uniform, entropy,
                            certainty, mutual-information, oracle */
    const float *scores; /* of any gate: sequence (at least 0: softmax, sigmoid, ReLU), variance, relu-l1 */
    const float *logits; /* z, redundancy, load */
    const float *noise_std, *threshold; /* load: the noise's standard deviation; the logit that selects an expert */
    /* of each choice; a negative index is no choice */
    const int32_t *index;   /* (T, k): importance-selected, prototype-alignment; (T) codes: codebook */
    const int32_t *teacher; /* (T) experts: oracle */
    /* statistics */
    const uint64_t *load;    /* (E) tokens that selected an expert, moe_routes.load: switch, relu-l1; (sequences, E)
                                from moe_sequence_load: sequence; (P) from moe_rank_load: rank; from moe_rank_tokens:
                                communication */
    const double *mean;      /* (E) from moe_mean_scores(prob): importance, kl-..., l2-uniform, mutual-information; of
                                scores: variance; moe_mean_weights: importance-selected; moe_mean_selection: load */
    const double *rank_prob; /* (P) from moe_rank_prob: locality */
    /* parameters and activations */
    const float *router;   /* (d, E), prototypes: simbal, diverse-simple, prototype-... A zero column has no angle */
    const float *matrix;   /* (d, f): orthonormal */
    const float *latent, *log_var; /* (T, d) latent tokens: prototype-alignment, latent-kl; ln variance: latent-kl */
    const float *outputs;  /* (T, k, d) of a token's experts: output-orthogonality */
    const float *x, *codebook; /* (T, d), (n_codes, d): codebook */
    /* gradients, each of the shape of what it is by. variance: d_scores, or of scores that are the softmax d_logits;
     * relu-l1: d_scores is by a ReLU gate's logits too */
    float *d_logits, *d_scores, *d_noise_std, *d_threshold; /* d_threshold NULL: the threshold is constant */
    float *d_weight;       /* (T, k) by the weights of the choices: importance-selected */
    float *d_router, *d_matrix, *d_latent, *d_log_var, *d_outputs, *dx, *d_codebook;
} moe_loss_args;
/* Global-batch balance: with coefficient / n for each of n micro-batches, and the load of all of them, the gradients of
 * switch are those of one large batch. */
MOE_API moe_status moe_loss(moe_loss_kind kind, const moe_loss_args *args, float coefficient, double *value);

/* mean (E) = mean over the tokens of prob or of scores (T, E). */
MOE_API moe_status moe_mean_scores(size_t n_tokens, size_t n_experts, const float *scores, double *mean);
/* mean (E) = sum of the selected weights (T, k) of an expert, divided by T. A negative index is no choice. */
MOE_API moe_status moe_mean_weights(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                    const float *weight, double *mean);
/* mean (E) of the probability, over the noise, of being selected: Phi((logits - threshold) / std), all (T, E). */
MOE_API moe_status moe_mean_selection(size_t n_tokens, size_t n_experts, const float *logits, const float *std,
                                      const float *threshold, double *mean);
/* load (number of sequences, E): selections in each run of `sequence` tokens; the last run may be shorter. */
MOE_API moe_status moe_sequence_load(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence,
                                     const int32_t *index, uint64_t *load);
/* out (n_ranks): selections of a rank's experts; its tokens (each once); its share of the mean probability. */
MOE_API moe_status moe_rank_load(size_t n_experts, size_t n_ranks, const uint64_t *load, uint64_t *out);
MOE_API moe_status moe_rank_tokens(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_ranks,
                                   const int32_t *index, uint64_t *out);
MOE_API moe_status moe_rank_prob(size_t n_experts, size_t n_ranks, const double *mean, double *out);
/* teacher (T): the expert with the least task loss, given (T, E) in `scores`; ties go to the lowest index. */
MOE_API moe_status moe_teacher_best(size_t n_tokens, size_t n_experts, const float *scores, int32_t *teacher);

/* Controllers balance without a gradient. After a step they read its statistics (loads may be summed over micro-batches
 * or ranks) and move a bias (E) or a coefficient. The bias is added to the scores for the selection only: weights come
 * from the scores without it, and no gradient reaches it. All state is `state`, plain floats, to be saved and
 * restored. */
typedef struct moe_control {
    moe_control_kind kind;
    size_t n_experts;
    /* yours to change after moe_control_init; the defaults are the published ones (docs/math.md) */
    float rate;    /* bias: u; id: Ki; relu-lambda: the factor; adaptive: xi; usage-boost: the boost */
    float damping; /* id: Kd; adaptive, usage-boost: decay of the average */
    float low, high; /* relu-lambda: bounds of the coefficient; adaptive: high, its cap; usage-boost: low, the usage
                        below which */
    int recentre;    /* a bias has the mean 0 after each step: on for id */
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
MOE_API moe_status moe_control_init(moe_control *control, moe_control_kind kind, size_t n_experts, void *memory,
                                    size_t bytes);
MOE_API moe_status moe_control_scratch(const moe_control *control, size_t n_tokens, size_t *bytes);
/* One step. A load of zeros, or no tokens, changes nothing; neither does an error. */
MOE_API moe_status moe_control_step(moe_control *control, const moe_control_input *in);
MOE_API const char *moe_control_name(moe_control_kind kind);
MOE_API const moe_info *moe_control_info(moe_control_kind kind); /* coefficient: the usual rate */

/* From `from` at step 0 to `to` at step `total` and later. */
MOE_API moe_status moe_schedule_k(moe_schedule_kind kind, uint64_t step, uint64_t total, size_t from, size_t to,
                                  size_t *top_k);
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
MOE_API moe_status moe_optimizer_step(const moe_optimizer_args *args, size_t n, float *params, const float *grads,
                                      float *m, float *v);
/* Sum of squares of n floats, in double: the same bits for any number of threads. */
MOE_API double moe_sum_squares(const moe_parallel *parallel, size_t n, const float *x);
/* Learning rate at `step` (from 0): peak * (step + 1) / warmup for the first `warmup` steps, then half a cosine from
 * peak down to `floor_lr` at `total`. */
MOE_API float moe_schedule_cosine(uint64_t step, uint64_t warmup, uint64_t total, float peak, float floor_lr);

/* ==== routes and tape ===========================================================================
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
MOE_API moe_status moe_routes_size(size_t n_tokens, size_t n_experts, size_t n_slots, size_t *bytes);
/* Lays the arrays into `memory` (yours; it must outlive the routes). */
MOE_API moe_status moe_routes_init(moe_routes *routes, size_t n_tokens, size_t n_experts, size_t n_slots, void *memory,
                                   size_t bytes);
/* Fills r from index (T, n_slots), values below n_experts, each at most once a token, negative = no choice,
 * and weight (T, n_slots), NULL = 1 / n_slots. capacity 0 = dropless, else the most tokens an expert keeps,
 * in the given order (default MOE_ORDER_TOKEN). On error r holds no routes. */
MOE_API moe_status moe_routes_fill(moe_routes *routes, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order);

/* What a router may want besides x. Zero = nothing special. Arrays are yours and must stay until the backward. Only you
 * write to it: a layer uses its own step, bias and experts, and moe_forward its own draw, whatever stands here. */
typedef struct moe_side {
    const unsigned char *mask; /* (n) 0 = not a token: its row of x, dy and of all below is not read, y and dx are 0
                                  there, and all else has the bits of a batch without it; NULL = all count */
    const size_t *sequence_begin; size_t n_sequences; /* where sequences of different lengths begin among the n tokens,
                                  ascending from 0; NULL = each has desc.sequence tokens. A tape has room for
                                  max_tokens / desc.sequence of them, rounded up */
    int evaluate;       /* 1: no noise, jitter, dropout, sampling; the evaluation's choice where a system has one */
    uint64_t step;      /* where the schedules stand, and the one draw of gating dropout (a layer uses its own) */
    uint64_t draw;      /* which random numbers (a layer uses its own) */
    size_t top_k;       /* 0 = as desc and schedule say; else at most desc.top_k */
    float temperature;  /* 0 = as desc and schedule say; it and its inverse finite (for a scan of temperatures) */
    const uint32_t *id; /* (n) token ids for score = hash; NULL = positions in the sequence */
    const float *previous;                    /* (n, E) logits of the layer before, for desc.residual; NULL = zeros */
    float *d_previous;                        /* (n, E) += its gradient; may be NULL */
    const int32_t *teacher;                   /* (n) the expert that loss.oracle wants, negative = none */
    /* of a whole that is cut into micro-batches or ranks, for the losses; NULL, 0 = this batch is all of it */
    const uint64_t *load, *first;             /* (E) routes.load summed; routes.top1, for switch_load = first */
    const uint64_t *rank_tokens;              /* (n_ranks) moe_rank_tokens summed: loss.communication */
    const double *mean;                       /* (E) mean of prob */
    uint64_t counted;                         /* its tokens */
    float loss_weight;                        /* of this backward's auxiliary losses: n_tokens / counted; 0 = 1 */
    const float *bias;                        /* (E) added to what the selection sees, never to weights (a layer uses
                                                 its own); NULL = none */
    const float *experts; float *d_experts;   /* score = subspace: the experts' parameters and gradients (a layer uses
                                                 its own) */
} moe_side;

/* moe_tape is what one forward keeps for its backward, and its scratch: one for each batch in flight. */
typedef struct moe_tape {
    moe_side side; /* yours to set before a forward */
    /* results that you may read after a forward; S = top_k, or E where the number of experts a token varies
     * (moe_tape_slots) */
    size_t n_tokens, n_slots;
    size_t n_given;       /* tokens of the forward; with side.mask T = n_tokens and all below are of those it keeps */
    const uint32_t *kept; /* (T) with side.mask: which of the given tokens each is; NULL = all */
    size_t bad_token;     /* the first given token that MOE_E_NAN_X or MOE_E_NAN_Y is about; else SIZE_MAX */
    float *logits;  /* (T, E), noise included */
    float *scores;  /* (T, E): softmax, sigmoid or relu of the logits, by the gate; the logits for
                       MOE_GATE_SOFTMAX_SELECTED */
    float *prob;    /* (T, E): softmax(logits / temperature); the same as scores for MOE_GATE_SOFTMAX */
    float *clean, *noise_std; /* (T, E) for Gaussian noise (learned or not): logits without it, and its deviation; else
                                 NULL */
    int32_t *index; /* (T, S): selected, before capacity; -1 = no choice */
    float *weight;  /* (T, S) */
    int dropped;    /* gating dropout: this forward's tokens stayed on their ranks */
    moe_routes routes;
    double loss[MOE_LOSS_COUNT]; /* values of the last backward, unweighted */
    /* private from here on */
    struct moe__run_memory *memory;
} moe_tape;

/* A tape for up to max_tokens tokens of layers with this desc. training MOE_OFF: forward only, much smaller. */
MOE_API moe_status moe_tape_new(moe_tape **out, const moe_desc *desc, size_t max_tokens, int training);
MOE_API void moe_tape_free(moe_tape *tape); /* NULL allowed */
/* The same in your memory (any alignment): ask, then lay out; nothing to free. */
MOE_API moe_status moe_tape_size(const moe_desc *desc, size_t max_tokens, int training, size_t *bytes);
MOE_API moe_status moe_tape_init(moe_tape **out, const moe_desc *desc, size_t max_tokens, int training, void *memory,
                                 size_t bytes);

/* Floats of the router's parameters: the tensors "router..." of this desc, one after the other in the order of
 * moe_desc_tensor ("experts.constant..." are among those of moe_experts_count). For a linear score without extras that
 * is R (d, E). */
MOE_API moe_status moe_router_count(const moe_desc *desc, size_t *n_floats);
/* Router alone: x (n, d) -> logits, scores, index, weight, routes of the tape. router: moe_router_count floats. */
MOE_API moe_status moe_route(moe_tape *tape, const float *router, const float *x, size_t n_tokens);
/* Its backward: d_weight (n_routes) is the gradient by routes.weight (NULL = 0). Adds the auxiliary losses of
 * desc.loss, which see side.load. d_router (moe_router_count) += ..., dx (n, d) += ...; either may be NULL. */
MOE_API moe_status moe_route_backward(moe_tape *tape, const float *router, const float *d_weight, float *d_router,
                                      float *dx);

/* out (n_given, n_slots) = the last forward's index by given token, a masked token's choices -1: for a dump. */
MOE_API moe_status moe_tape_index(const moe_tape *tape, int32_t *out);

/* Experts alone, over the routes of the tape (made by moe_route, or filled by you with moe_routes_fill after
 * moe_tape_tokens). params: moe_experts_count floats in the library's panel layout (moe_expert_pack). */
MOE_API moe_status moe_experts_count(const moe_desc *desc, size_t *n_floats);
/* Plain arrays -> params: expert `expert` (routed first, then shared): w1 (d, f) [the gate for gated kinds], wu (d, f)
 * [gated kinds only], w2 (f, d), b1 (f), bu (f), b2 (d) [with desc.bias]. NULL = zeros. */
typedef struct moe_expert_weights { const float *w1, *wu, *w2, *b1, *bu, *b2; } moe_expert_weights;
MOE_API moe_status moe_expert_pack(const moe_desc *desc, size_t expert, const moe_expert_weights *weights,
                                   float *params);
/* The way back, into arrays of yours; NULL = not wanted. */
typedef struct moe_expert_arrays { float *w1, *wu, *w2, *b1, *bu, *b2; } moe_expert_arrays;
MOE_API moe_status moe_expert_unpack(const moe_desc *desc, size_t expert, const float *params,
                                     const moe_expert_arrays *arrays);
/* Tells the tape that n tokens x (n, d) follow, for a routing of your own: with side.mask, of tape.n_tokens rows. */
MOE_API moe_status moe_tape_tokens(moe_tape *tape, const float *x, size_t n_tokens);
/* y (n, d) = sum over a token's routes of weight * expert(x), plus the shared experts. */
MOE_API moe_status moe_experts_forward(moe_tape *tape, const float *params, float *y);
/* d_params += ... (moe_experts_count floats, panel layout; or = if `fresh`), d_weight (n_routes) = ... (may be
 * NULL), dx (n, d) += ... (may be NULL). */
MOE_API moe_status moe_experts_backward(moe_tape *tape, const float *params, const float *dy, int fresh,
                                        float *d_params, float *d_weight, float *dx);

/* ==== diagnostics =============================================================================
 * Is the routing healthy? Counters that need no layer, measures of plain arrays, the ecology number, and the
 * congestion game behind gamma_eff. In double with libm: outside the same-bits contract, and never part of a gradient.
 * Wherever index (T, k) is asked for: experts below n_experts, the first choice first, negative = no choice; a row
 * without any choice is no token (padding, say): nothing else of it is read, and it changes nothing; MOE_E_NO_TOKENS if
 * all are so. work is scratch of the stated number of elements; what a _scratch function gives is in bytes. What is
 * counted is added to, so the counts of threads and ranks add up. Formulas and how sure they are: docs/math.md and
 * docs/gamma.md. */

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
    size_t n_dead;       /* experts with under dead_fraction of an even share of the selections; a single expert is
                            never dead */
    uint32_t *dead;      /* (E): the first n_dead are their numbers, ascending */
    double dead_fraction; /* yours to set, kept by a reset; 0 = 0.1 */
    size_t n_dead_first; /* experts with under 1% of the first choices (after the ecology paper [S]): above 100 experts
                            even an even router has them, and with k > 1 an expert may live on second choices */
    double minvio;            /* 1 - min(load) / mean(load) */
    double gini;              /* sum_ij |l_i - l_j| / (2 E^2 mean): 0 = even, 1 - 1 / E = all on one expert */
    double min_max;           /* min(load) / max(load) */
    double effective_experts; /* exp of the load's entropy in nats: E = even, 1 = all on one expert */
    uint64_t *sorted;         /* (E): scratch of moe_health_update */
} moe_health;
MOE_API moe_status moe_health_size(size_t n_experts, size_t *bytes);
MOE_API moe_status moe_health_init(moe_health *health, size_t n_experts, void *memory, size_t bytes);
/* memory stays yours */
MOE_API moe_status moe_health_reset(moe_health *health);
/* Adds one routed batch. prob (T, E) may be NULL. */
MOE_API moe_status moe_health_add(moe_health *health, const moe_routes *routes, const float *prob);
MOE_API moe_status moe_health_merge(moe_health *health, const moe_health *other); /* h += other */
MOE_API moe_status moe_health_update(moe_health *health);                         /* counters -> metrics */

/* What changed between two windows, both updated. An expert died if it was alive in `before` and is dead in `now`. */
typedef struct moe_health_change {
    size_t newly_dead, revived;             /* by the definition of n_dead, with now->dead_fraction */
    size_t newly_dead_first, revived_first; /* by that of n_dead_first */
    double load_moved;                      /* sum |l_e - l'_e| / 2 of the load's shares: 0 to 1 */
} moe_health_change;
MOE_API moe_status moe_health_compare(const moe_health *before, const moe_health *now, moe_health_change *out);

/* Share of the tokens whose set of experts differs; before and after (T, k), in any order within a token. A row is no
 * token if it has no choice in either. */
MOE_API moe_status moe_churn(size_t n_tokens, size_t top_k, const int32_t *before, const int32_t *after, double *share);
/* Sequence expert utilisation [P]: mean over sequences of `sequence` rows (the last may be shorter) of distinct
 * experts / E; padding keeps its place, and a sequence of nothing else does not count. work (E). */
MOE_API moe_status moe_seu(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence, const int32_t *index,
                           uint32_t *work, double *seu);
/* count (E, E) += tokens that select both i and j; the diagonal is the load. */
MOE_API moe_status moe_coselect(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index, uint64_t *count);
/* Share of the routes that leave their token's rank: token t lives on rank t P / T, expert e on rank e P / E (whole
 * numbers). */
MOE_API moe_status moe_crossing(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_ranks, const int32_t *index,
                                double *share);
/* share (n_tiers) = of the load (E), by tier (E): the tier of each expert, below n_tiers. With a rank as a tier: its
 * load. */
MOE_API moe_status moe_tier_usage(size_t n_experts, size_t n_tiers, const uint32_t *tier, const uint64_t *load,
                                  double *share);
/* sum (E) += loss (T) of the tokens that select an expert; divided by the load, the expert's mean loss. */
MOE_API moe_status moe_loss_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                      const float *loss, double *sum);
/* By first choice: right (E) += tokens that are correct (T, 0 or 1); count (E, n_labels) += tokens of each label
 * (T); what is negative as int32_t (-1, -100) is no label. */
MOE_API moe_status moe_right_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                       const uint8_t *correct, uint64_t *right);
MOE_API moe_status moe_label_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_labels,
                                       const int32_t *index, const uint32_t *label, uint64_t *count);
/* Where labels are known and correctness is not: right (E) = tokens of the expert's most frequent label, count (E,
 * n_labels) [D]. */
MOE_API moe_status moe_label_majority(size_t n_experts, size_t n_labels, const uint64_t *count, uint64_t *right);

/* The ecology paper's kinds of experts [S], by usage u (share of first choices) and accuracy a. */
typedef enum moe_ecology_kind {
    MOE_ECOLOGY_DEAD,       /* u < 1% */
    MOE_ECOLOGY_NOISE,      /* 1% <= u < 3%, a < 25% */
    MOE_ECOLOGY_EDGE,       /* 1% <= u < 3%, a >= 25% */
    MOE_ECOLOGY_WEAK_CORE,  /* u >= 3%, a < 30% */
    MOE_ECOLOGY_BROAD_CORE, /* u >= 3%, 30% <= a < 50% */
    MOE_ECOLOGY_PURE_CORE,  /* u >= 3%, a >= 50% */
    MOE_ECOLOGY_COUNT
} moe_ecology_kind;
MOE_API const char *moe_ecology_name(moe_ecology_kind kind); /* "DEAD" ... "PURE_CORE"; NULL past the end */
MOE_API moe_status moe_ecology_classes(size_t n_experts, const uint64_t *top1, const uint64_t *right,
                                       moe_ecology_kind *out);
/* E = T H / (O + B) [S]: softmax temperature, and the weights of the entropy, oracle and balance losses. O + B = 0
 * gives infinity, whatever T H is: the source leaves it undefined. Anything negative, infinite or NaN gives NaN. */
MOE_API double moe_ecology_number(double temperature, double entropy, double oracle, double balance);

/* A temperature scan on given logits (T, E): row i is what the softmax gate at temperature[i] would do. Selection is
 * by the float32 scores, as the layer selects: where a low temperature rounds scores to the same number, it changes. */
typedef struct moe_temperature_row {
    double temperature;
    double entropy, token_entropy;   /* of the mean softmax; mean over tokens: nats. These change with T, */
    double top_mass, first_mass;     /* as do the mean mass of the selected, and of the first choice */
    double maxvio, load_cv, changed; /* of the load, and share of tokens with another set than by the logits: these
                                        stay */
    size_t n_dead, n_dead_first;     /* as of moe_health, with a dead_fraction of 0.1 */
} moe_temperature_row;
MOE_API moe_status moe_temperature_scan_scratch(size_t n_experts, size_t top_k, size_t *bytes);
MOE_API moe_status moe_temperature_scan(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits,
                                        size_t n_rows, const float *temperature, moe_temperature_row *row, void *work,
                                        size_t work_bytes);

/* Pairwise expert similarity [P]: mean over tokens of 2 / (E (E - 1)) sum_{i<j} cos(o_i, o_j), outputs (T, E, d) of ALL
 * experts; the cosine with a zero output is 0 [D]; one expert gives 0. work (E). */
MOE_API moe_status moe_pes(size_t n_tokens, size_t n_experts, size_t d_model, const float *outputs, double *work,
                           double *pes);

/* One pass over logits (T, E): load (E) += selections by top-k (ties go to the lowest index), top1 (E) += first
 * choices, sum (E) += logits. Each may be NULL (without load there is no top1 either). Adds nothing if a logit is NaN
 * or infinite. work: moe_topk_count_scratch bytes. */
MOE_API moe_status moe_topk_count_scratch(size_t n_experts, size_t top_k, size_t *bytes);
MOE_API moe_status moe_topk_count(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, uint64_t *load,
                                  uint64_t *top1, double *sum, void *work, size_t work_bytes);

/* -- the congestion game, after arXiv 2604.04230, of which only the abstract was available: all of it is [D] --
 *
 * Load m on the simplex, quality q in logits: a token that picks expert i pays gamma m_i - q_i, with entropy weight 1,
 * so m = softmax(q - gamma m). gamma is in logits per unit of load share. load (E) is a share: it sums to 1. */
typedef struct moe_game_info {
    int iterations;
    double residual; /* largest |log m_i + gamma m_i - q_i + c|, relative to its terms */
} moe_game_info;
/* load (E) = the equilibrium: finite gamma > -1, where it is unique. info may be NULL. */
MOE_API moe_status moe_game_solve(size_t n_experts, const double *quality, double gamma, double *load,
                                  moe_game_info *info);
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
    double peak_load, peak_softmax; /* E max m, and E max softmax(q): two candidates for the paper's B_0, which it does
                                       not define */
} moe_game_fit;
/* Fits quality (E) and load (E, any positive multiple of shares). selections: how many the load was counted from, or 0
 * = exact. Unidentified: over all of [0, MOE_GAME_GAMMA_MAX] the prediction moves by less than the sampling noise of
 * the load, or the best gamma is that upper end. Caveat: differences between tokens alone move gamma, in either sign.
 * work (2 E). */
MOE_API moe_status moe_game_estimate(size_t n_experts, const double *quality, const double *load, double selections,
                                     double *work, moe_game_fit *out);
/* gamma_explicit = alpha E unit_scale, of a Switch loss with coefficient alpha. unit_scale: logit units in a unit of
 * loss (they are not commensurate), 1 / layers where the loss is a mean over layers, times k where f sums to k.
 * gamma_implicit = gamma_eff - it. */
MOE_API double moe_game_explicit(double alpha, size_t n_experts, double unit_scale);

/* Several types of tokens: type c has share pi_c and mean logits q^c; share (C), quality (C, E).
 * Clusters logits (T, E), each row less its mean, by k-means++ (at most 50 rounds; the same for a seed everywhere):
 * type (T), share, quality. work (T + E). C is 1 to 64; with fewer distinct tokens some shares are 0. */
MOE_API moe_status moe_game_cluster(size_t n_tokens, size_t n_experts, size_t n_types, uint64_t seed,
                                    const float *logits, uint32_t *type, double *share, double *quality, double *work);
/* Bytes of work for the three below. */
MOE_API moe_status moe_game_types_scratch(size_t n_experts, size_t n_types, size_t *bytes);
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
 * logsumexp_j(z_j - gamma m_j) at layer l + 1: logits (T, n_next), load (n_next). Experts with under `least` tokens do
 * not count. work (2 n_experts). The last layer's is 0. */
MOE_API moe_status moe_game_epsilon(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                    size_t n_next, const float *logits, const double *load, double gamma, size_t least,
                                    double *work, double *epsilon);
/* ||m of the whole network - m of the layer alone||_1 is at most epsilon / (2 (1 + gamma / E)); 2 tanh(epsilon / 4) at
 * gamma = 0. */
MOE_API double moe_game_epsilon_bound(double epsilon, double gamma, size_t n_experts);

typedef enum moe_quality_kind { /* four ways to say how good an expert is, from logits (T, E) */
    MOE_QUALITY_MEAN,     /* mean logit */
    MOE_QUALITY_LOG_PROB, /* log of the mean softmax: can be circular, where the load is that softmax */
    MOE_QUALITY_SELECTED, /* mean logit of the tokens that select it; -inf if none does */
    MOE_QUALITY_MEDIAN,   /* median logit */
    MOE_QUALITY_TRIMMED,  /* mean without the lowest and the highest 10% */
    MOE_QUALITY_COUNT
} moe_quality_kind;
MOE_API const char *moe_quality_name(moe_quality_kind kind);
/* index (T, k): needed for SELECTED, else it may be NULL: all rows are tokens. work: SELECTED (E), MEDIAN and TRIMMED
 * (T), the others none. */
MOE_API moe_status moe_game_quality(moe_quality_kind kind, size_t n_tokens, size_t n_experts, size_t top_k,
                                    const float *logits, const int32_t *index, double *work, double *quality);
/* Pearson's r of two series; pairs with a value that is not finite are left out; NaN if one does not vary. */
MOE_API moe_status moe_pearson(size_t n, const double *a, const double *b, double *r);

/* moe_game is what the estimators need of a dump: counts and logit sums by batch of text, (B, E) each. */
typedef struct moe_game {
    size_t n_experts, n_batches;
    uint64_t *tokens; /* (B) */
    uint64_t *count;  /* (B, E): selections */
    double *logit;    /* (B, E): sums over the tokens */
    void *alloc_context; /* moe_game_bootstrap, _holdout and _excess allocate with it; yours to set */
    uint64_t *null_count; /* (B, E): selections of the null (moe_game_excess) */
    uint64_t seed;        /* of the null's permutations; yours to set, kept by a reset */
    uint32_t *scratch;    /* (B, 4 E): of moe_game_add_null */
} moe_game;
MOE_API moe_status moe_game_size(size_t n_experts, size_t n_batches, size_t *bytes);
MOE_API moe_status moe_game_init(moe_game *game, size_t n_experts, size_t n_batches, void *memory, size_t bytes);
MOE_API moe_status moe_game_reset(moe_game *game);
/* Adds tokens to a batch: logits (T, E) and the experts they use, index (T, k). (From logits alone: moe_topk_count.) */
MOE_API moe_status moe_game_add(moe_game *game, size_t batch, size_t n_tokens, size_t top_k, const float *logits,
                                const int32_t *index);
/* The null's part of it, for who counts the rest himself, after that: index NULL: each token picks k. */
MOE_API moe_status moe_game_add_null(moe_game *game, size_t batch, size_t n_tokens, size_t top_k, const float *logits,
                                     const int32_t *index);
MOE_API moe_status moe_game_merge(moe_game *game, const moe_game *other); /* g += other, batch by batch */
/* quality (E), load (E) and the selections of the batches b with half[b] == which; half NULL: of all. */
MOE_API moe_status moe_game_pool(const moe_game *game, const uint8_t *half, int which, double *quality, double *load,
                                 double *selections);
/* A random half of the batches, the same for a seed: half (B) = 0 or 1, B / 2 of them 0. */
MOE_API moe_status moe_game_split(const moe_game *game, uint64_t seed, uint8_t *half);
/* Held-out errors: gamma and T are fitted on half 0; the load of half 1 is predicted from half 0's quality. */
MOE_API moe_status moe_game_holdout(const moe_game *game, uint64_t seed, moe_game_fit *out);
/* Percentile bootstrap: gamma (replicates) = fits on batches drawn with replacement, in order of the draws; lo and hi
 * are their percentiles 2.5 and 97.5. Replicate r draws the same batches for a seed whatever the layer, so means over
 * layers can be formed. */
MOE_API moe_status moe_game_bootstrap(const moe_game *game, size_t replicates, uint64_t seed,
                                      const moe_parallel *parallel, double *gamma, double *lo, double *hi);
/* gamma of what the noise of the tokens alone makes, and how far the data are from it. The null: each expert's logits
 * permuted over the tokens (of up to 1024 in a row), independently of the other experts', and as many experts picked by
 * plain top-k as the token picked. It has the same mean logits, spread and number of selections, and no congestion. */
typedef struct moe_game_null {
    double gamma_null, gamma_excess; /* gamma_excess = gamma - gamma_null; NaN where one of them is unidentified */
    double excess_lo, excess_hi;     /* of the difference: both are fitted to the same batches in each replicate */
} moe_game_null;
/* gamma (replicates): as moe_game_bootstrap gave them for this seed; excess (replicates) = each less the null's, and
 * may be the same array. replicates 0: no interval, which is NaN then. */
MOE_API moe_status moe_game_excess(const moe_game *game, size_t replicates, uint64_t seed,
                                   const moe_parallel *parallel, const double *gamma, double *excess,
                                   moe_game_null *out);
/* The percentiles alone. Sorts x. */
MOE_API moe_status moe_interval(size_t n, double *x, double *lo, double *hi);

typedef enum moe_phase_kind {
    MOE_PHASE_NONE, MOE_PHASE_DORMANT, MOE_PHASE_SURGE, MOE_PHASE_STABILISATION, MOE_PHASE_RELAXATION, MOE_PHASE_COUNT
} moe_phase_kind;
MOE_API const char *moe_phase_name(moe_phase_kind kind); /* "none", "dormant", "surge", "stabilisation", "relaxation" */
/* Phases of a series: step (n, ascending), gamma and its interval lo, hi (n). work (n). Docs: docs/gamma.md. */
MOE_API moe_status moe_game_phases(size_t n, const double *step, const double *gamma, const double *lo,
                                   const double *hi, double *work, moe_phase_kind *phase);

/* -- feedback, after arXiv 2605.29121: ds_i/dt = a p_i - lambda s_i, p = softmax(beta s); steady states are the game's
 * with gamma = -Kf, Kf = a beta / lambda [D] -- */
/* E = 2: the largest u = p_1 - p_2 with u = tanh((Kf u + h) / 2). */
MOE_API moe_status moe_feedback_two(double kf, double h, double *u);
/* E = 2, Kf >= 2: the fold, where two states meet: u and h (its mirror is -u, -h). */
MOE_API moe_status moe_feedback_fold(double kf, double *u, double *h);
/* E >= 2: one-sided states exist from Kf = ks on, lie as deep as balance at kc, and balance is unstable from E on. */
MOE_API moe_status moe_feedback_thresholds(size_t n_experts, double *ks, double *kc);
/* a and lambda by least squares of (s_{t+1} - s_t) / dt on p_t and s_t; s and p (n_steps, E). */
MOE_API moe_status moe_feedback_fit(size_t n_steps, size_t n_experts, double dt, const double *s, const double *p,
                                    double *a, double *lambda);

/* ==== layer =============================================================================
 * Level 3: parameters, gradients and optimiser state in one block. */
typedef struct moe_layer moe_layer;

MOE_API moe_status moe_layer_new(moe_layer **out, const moe_desc *desc);
MOE_API void moe_layer_free(moe_layer *layer); /* NULL allowed */
/* The same in your memory (any alignment). Such a layer has no tape of its own: use moe_forward_tape with one of yours;
 * moe_forward returns MOE_E_NO_MEMORY. Only moe_layer_save and moe_layer_pes allocate then. With the quantile
 * controller it keeps the scores of all tokens whose backward came since the last step: there is room for 1024, and for
 * one more with every n_experts + 2 floats that bytes exceeds moe_layer_size by; past that moe_backward_tape returns
 * MOE_E_NO_MEMORY and changes nothing. */
MOE_API moe_status moe_layer_size(const moe_desc *desc, size_t *bytes);
MOE_API moe_status moe_layer_init(moe_layer **out, const moe_desc *desc, void *memory, size_t bytes);

/* y (n, d) = the layer's output for tokens x (n, d); n = 0 is allowed. Keeps what backward needs in the layer's own
 * tape, which grows as needed. x need not stay. Add the residual yourself. */
MOE_API moe_status moe_forward(moe_layer *layer, const float *x, size_t n_tokens, float *y);
/* Gradients of the last moe_forward are added to the layer's, auxiliary losses included: one backward for each
 * forward (it uses up the tape). dy (n, d) is the gradient of your loss by y; dx (n, d) is set to the gradient by x, or
 * NULL. */
MOE_API moe_status moe_backward(moe_layer *layer, const float *dy, float *dx);
/* One optimiser step with learning rate lr; then the gradients count as zero. The controller sees what the backward
 * calls since the last step saw, of any tape: loads, and for quantile their scores; a forward without a backward does
 * not move it. */
MOE_API moe_status moe_step(moe_layer *layer, float lr);

/* The same with a tape of yours: many threads may run forward on one layer, each with its own tape.
 * Backward writes the layer's gradients, so one at a time. */
MOE_API moe_status moe_forward_tape(const moe_layer *layer, moe_tape *tape, const float *x, size_t n_tokens, float *y);
MOE_API moe_status moe_backward_tape(moe_layer *layer, moe_tape *tape, const float *dy, float *dx);

/* What the next moe_forward calls take as their tape's side; mask, sequence_begin, evaluate, top_k, temperature, id,
 * previous, d_previous and teacher are yours to set (and to clear). NULL for NULL. */
MOE_API moe_side *moe_layer_side(moe_layer *layer);
/* The layer's controller, to read or to tune (its state is saved with the layer); and the loads (E) of the backward
 * calls since the last step, to which those of other ranks may be added before moe_step. NULL for NULL. */
MOE_API moe_control *moe_layer_control(moe_layer *layer);
MOE_API uint64_t *moe_layer_step_load(moe_layer *layer);
/* Pairwise similarity of all experts' outputs: mean over the n tokens of the mean cosine of two different experts [P,
 * SimBal]. */
MOE_API moe_status moe_layer_pes(const moe_layer *layer, const float *x, size_t n_tokens, double *pes);
/* The ecology number T H / (O + B) of a desc, after arXiv 2605.06415 [D]: T = temperature, H = loss.entropy, O =
 * loss.oracle, B = the larger of loss.kl-uniform and loss.switch (its form has both with one weight). As
 * moe_ecology_number; NULL: NaN. */
MOE_API double moe_desc_ecology(const moe_desc *desc);
MOE_API const moe_desc *moe_layer_desc(const moe_layer *layer);   /* resolved; NULL for NULL */
MOE_API const moe_tape *moe_layer_tape(const moe_layer *layer);   /* of the last moe_forward, or NULL */
MOE_API size_t moe_layer_params(const moe_layer *layer);          /* number of parameters (padding not counted) */
MOE_API size_t moe_layer_active_params(const moe_layer *layer);   /* of these, used by one token */
MOE_API uint64_t moe_layer_hash(const moe_layer *layer);          /* of all parameters, as moe_layer_get gives them */
/* Health of the batches of moe_forward since the last reset (for a tape of yours: moe_health_add(h, &tape->routes,
 * tape->prob)). *h is a view into the layer: valid until its next call. */
MOE_API moe_status moe_layer_health(moe_layer *layer, moe_health *health);
MOE_API moe_status moe_layer_health_reset(moe_layer *layer);
/* Values of the auxiliary losses of the last backward: unweighted, and times their coefficients; either may be NULL. */
MOE_API moe_status moe_layer_losses(const moe_layer *layer, double value[MOE_LOSS_COUNT],
                                    double weighted[MOE_LOSS_COUNT]);
/* L2 norm of the layer's gradient; moe_layer_scale_grads multiplies it: for clipping across several models.
 * Factor 0 sets it to zero, NaN and all: the way on after MOE_E_NAN_GRADS. */
MOE_API moe_status moe_layer_grad_norm(const moe_layer *layer, double *norm);
MOE_API moe_status moe_layer_scale_grads(moe_layer *layer, float factor);

/* Tensors by name, row-major. The router's, as far as the desc has them (h = d_router): "router" (d, E), or (h, E)
 * behind a projection, or (d, E soft_slots); "router.bias" (E); "router.proj" (d, h); "router.proj_bias" (h);
 * "router.noise" (d, E); "router.threshold" (E); "router.log_scale" (1); "router.residual" (E, E); "router.codebook"
 * (n_codes, d); "router.branch" (d, 2); with a controller also "controller.state", which has no gradient and is not
 * counted by moe_layer_tensors; "experts.constant_gate" (n_constant, 2, d); "experts.constant" (n_constant, d). The
 * experts': "experts.w1", "experts.wu" (G, d, f); "experts.w2" (G, f, d); "experts.b1", "experts.bu" (G, f);
 * "experts.b2" (G, d); G = n_experts + n_shared, the shared ones last. */
typedef struct moe_tensor { const char *name; size_t n_dims, dim[3], count; } moe_tensor;
MOE_API size_t moe_layer_tensors(const moe_layer *layer); /* how many */
MOE_API moe_status moe_desc_tensor(const moe_desc *desc, size_t index, moe_tensor *out);
/* tensor i of such a layer; MOE_E_NAME past the last */
MOE_API moe_status moe_layer_tensor(const moe_layer *layer, size_t index, moe_tensor *out);
typedef enum moe_part_kind {
    MOE_PART_PARAMS, MOE_PART_GRADS, MOE_PART_MOMENT1, MOE_PART_MOMENT2, MOE_PART_COUNT
} moe_part_kind;
MOE_API moe_status moe_layer_get(const moe_layer *layer, moe_part_kind part, const char *name, float *out,
                                 size_t count);
MOE_API moe_status moe_layer_set(moe_layer *layer, moe_part_kind part, const char *name, const float *in, size_t count);

/* ==== files =============================================================================
 * safetensors and .npy, read defensively: header cap, checked arithmetic, contiguous offsets. */
typedef struct moe_file_tensor {
    const char *name; size_t name_length; /* as in the file, still JSON-escaped, not NUL-terminated */
    char dtype[16];                       /* "F32", "BF16", ... */
    size_t n_dims, dim[8];
    const unsigned char *data; size_t bytes;
} moe_file_tensor;
typedef struct moe_file {
    const unsigned char *bytes; size_t size; /* yours; must outlive the view */
    size_t n_tensors;
    size_t header; /* bytes of the JSON header */
    size_t offset; /* after an error: where in the file */
    moe_file_tensor fault; /* after an error: the tensor that it is about, as far as it was read; name NULL: none */
    void *index, *alloc_context; /* names in order, of more than 512 */
} moe_file;
/* Validates everything at once, in time n log n; afterwards every tensor's data lies inside the bytes. Up to 512 names
 * need no allocation; of more an index is kept, so that each is found in log n: moe_file_close frees it (and is never
 * wrong). The bytes stay yours. */
MOE_API moe_status moe_file_open(moe_file *file, const void *bytes, size_t size);
MOE_API void moe_file_close(moe_file *file); /* NULL allowed */
/* A tensor, in the header's order or by name. One whose type this library does not know is no fault of the file: only
 * who asks for it gets MOE_E_FILE_DTYPE, with *out filled all the same (out->dtype names the type). */
MOE_API moe_status moe_file_tensor_at(const moe_file *file, size_t index, moe_file_tensor *out);
MOE_API moe_status moe_file_find(const moe_file *file, const char *name, moe_file_tensor *out);
/* The value of a __metadata__ key into buffer, NUL-terminated; MOE_E_NAME if there is none. */
MOE_API moe_status moe_file_metadata(const moe_file *file, const char *key, char *buffer, size_t size);

/* .npy (NumPy's array files, versions 1 to 3), read as defensively: little-endian, C order. */
typedef enum moe_dtype_kind {
    MOE_DTYPE_NONE, MOE_DTYPE_F32, MOE_DTYPE_F16, MOE_DTYPE_BF16, MOE_DTYPE_F64, MOE_DTYPE_U16, MOE_DTYPE_I32,
    MOE_DTYPE_I64, MOE_DTYPE_I8, MOE_DTYPE_U8, MOE_DTYPE_I16, MOE_DTYPE_U32, MOE_DTYPE_U64,
    MOE_DTYPE_COUNT
} moe_dtype_kind; /* <f4 <f2 <V2 <f8 <u2 <i4 <i8 |i1 |u1 <i2 <u4 <u8; BF16 also as |V2 or bfloat16 (ml_dtypes) */
MOE_API size_t moe_dtype_size(moe_dtype_kind kind);      /* bytes of an element; 0 past the end */
MOE_API const char *moe_dtype_name(moe_dtype_kind kind); /* "F32", ... as safetensors names them */
typedef struct moe_npy {
    moe_dtype_kind dtype;
    size_t n_dims, dim[8], count; /* count: product of the dimensions; 1 without any */
    uint64_t data;                /* where in the file the elements begin */
    const unsigned char *elements; /* moe_npy_open only: (count), not aligned */
    size_t offset;                /* after an error: where in the file */
    char descr[16];               /* the type as the file says it, "<f4"; after MOE_E_FILE_DTYPE too */
} moe_npy;
/* Validates a whole file in memory; the view lasts as long as the bytes. */
MOE_API moe_status moe_npy_open(moe_npy *npy, const void *bytes, size_t size);
/* The same from the first `size` bytes of a file of file_size bytes, to stream the rest. MOE_E_FILE_SHORT with offset
 * above size: give the first `offset` bytes, at most 1 MB. */
MOE_API moe_status moe_npy_header(moe_npy *npy, const void *bytes, size_t size, uint64_t file_size);

/* n little-endian elements (any alignment) -> float. BF16 and U16 hold the upper half of a float32's bits (bfloat16,
 * which NumPy alone keeps as uint16). Other integers are refused: MOE_E_FILE_DTYPE. */
MOE_API moe_status moe_to_float(moe_dtype_kind dtype, size_t n, const void *elements, float *out);
/* Integers of any type -> int32; *bad (may be NULL) = the first that does not fit, with MOE_E_NPY_INDEX. */
MOE_API moe_status moe_to_index(moe_dtype_kind dtype, size_t n, const void *elements, int32_t *out, size_t *bad);
/* The same for a tensor of a safetensors file: which of the types above it is, or MOE_DTYPE_NONE. */
MOE_API moe_dtype_kind moe_dtype_of(const char *safetensors_name);

/* model.safetensors.index.json: which file holds which tensor. File names with a path in them are refused. */
typedef struct moe_shards {
    const unsigned char *bytes; size_t size; /* yours; must outlive the view */
    size_t n_tensors;
    size_t map;    /* where the weight_map begins */
    size_t offset; /* after an error: where in the file */
    void *index;   /* as moe_file's */
} moe_shards;
MOE_API moe_status moe_shards_open(moe_shards *shards, const void *bytes, size_t size);
MOE_API void moe_shards_close(moe_shards *shards); /* NULL allowed */
/* The file of a tensor into buffer, NUL-terminated; MOE_E_NAME if it is not listed. */
MOE_API moe_status moe_shards_find(const moe_shards *shards, const char *name, char *buffer, size_t size);
/* Name number i of moe_router_name that the model has, with its layer: MOE_E_NAME past the last. Layers ascend. */
MOE_API moe_status moe_shards_router(const moe_shards *shards, size_t index, size_t *layer, char *name, size_t size);
MOE_API moe_status moe_file_router(const moe_file *file, size_t index, size_t *layer, moe_file_tensor *out);
/* Is this the name of a router's weight (E, d) in OLMoE, Qwen-MoE, DeepSeek (model.layers.N.mlp.gate.weight) or Mixtral
 * (model.layers.N.block_sparse_moe.gate.weight) [K]? 1 and its layer, or 0. */
MOE_API int moe_router_name(const char *name, size_t length, size_t *layer);
/* The bias of a layer's router by which its experts are chosen but not weighted: as tape->side.bias takes it, and the
 * control of a layer (moe_layer_control(m)->bias). model.layers.N.mlp.gate.e_score_correction_bias (DeepSeek-V3, GLM,
 * Kimi) or model.layers.N.block_sparse_moe.e_score_correction_bias (MiniMax) [K]; MOE_E_NAME if there is none. Its name
 * from the router's, to find its file with moe_shards_find. */
MOE_API moe_status moe_file_router_bias(const moe_file *file, size_t layer, size_t n_experts, float *bias);
MOE_API moe_status moe_router_bias_name(const char *router, char *name, size_t size);

/* Experts' weights as frameworks keep them -> params, in panels: the same bits as moe_expert_pack from plain arrays.
 * Arrays of n experts, one after the other, of any alignment, never written to. E = n, d = d_model, f = d_ff:
 *
 *     out_first               w1, wu      w2          w1 with gate_up fused or interleaved
 *     0: x W, the library's   (E, d, f)   (E, f, d)   (E, d, 2f)     GPT-OSS (interleaved), Llama 4 (fused) [K]
 *     1: torch's nn.Linear    (E, f, d)   (E, d, f)   (E, 2f, d)     Mixtral, Qwen3 (fused in transformers 5) [K]
 *
 *     fused         of the 2f the first f are the gate, the others what it gates
 *     interleaved   the gate's and the others in turn: gate 0, up 0, gate 1, up 1 ...
 *
 * b1, bu (E, f) and b2 (E, d); b1 (E, 2f) as w1 where that is fused. NULL = zeros, as in moe_expert_pack. NaN or
 * infinity: MOE_E_NAN_WEIGHT, and params are not to be used. layout NULL: plain arrays. */
typedef enum moe_gate_up_kind { MOE_GATE_UP_SEPARATE, MOE_GATE_UP_FUSED, MOE_GATE_UP_INTERLEAVED } moe_gate_up_kind;
typedef struct moe_experts_layout {
    moe_dtype_kind dtype; /* of all arrays, as moe_to_float takes it; 0 = F32 */
    int out_first;
    moe_gate_up_kind gate_up;
} moe_experts_layout;
typedef struct moe_experts_arrays { const void *w1, *wu, *w2, *b1, *bu, *b2; } moe_experts_arrays;
/* Experts first ... first + n - 1 of the layer (routed first, then shared). */
MOE_API moe_status moe_experts_pack(const moe_desc *desc, size_t first, size_t n, const moe_experts_arrays *arrays,
                                    const moe_experts_layout *layout, float *params);

/* A layer as safetensors: parameters, desc, and with_optimizer the moments and the step count: between two steps alone,
 * MOE_E_UNSTEPPED while it has gradients, which a file does not hold. Little-endian
 * float32. moe_layer_save_size gives the bytes needed. Loading makes a new layer (parallel and alloc_context are
 * taken from `surroundings`, which may be NULL), checked entirely before it is given to you. */
MOE_API moe_status moe_layer_save_size(const moe_layer *layer, int with_optimizer, size_t *bytes);
MOE_API moe_status moe_layer_save_memory(const moe_layer *layer, int with_optimizer, void *bytes, size_t size);
/* What cannot be loaded is not saved: MOE_E_SAVE_NAN, if a tensor holds NaN or infinity. This names the first such one
 * (static storage; MOE_OK and NULL: there is none), of all that would be saved. */
MOE_API moe_status moe_layer_check(const moe_layer *layer, int with_optimizer, moe_part_kind *part, const char **name);
MOE_API moe_status moe_layer_load_memory(moe_layer **out, const void *bytes, size_t size, const moe_desc *surroundings);
/* The same from an open view; after an error view->fault is the tensor that is missing, unlike the layer's or NaN. */
MOE_API moe_status moe_layer_load_file(moe_layer **out, moe_file *view, const moe_desc *surroundings);
#ifndef MOE_NO_STDIO
/* Written to path + ".part" and renamed when complete, so that a failure leaves an old file whole. */
MOE_API moe_status moe_layer_save(const moe_layer *layer, int with_optimizer, const char *path);
MOE_API moe_status moe_layer_load(moe_layer **out, const char *path, const moe_desc *surroundings);
#endif

#endif /* MOE_H */
#endif /* !MOE__PASS */

#if defined(MOE_IMPLEMENTATION) && !defined(MOE_NO_IMPLEMENTATION)
#ifndef MOE__PASS
#ifndef MOE__IMPLEMENTED
#define MOE__IMPLEMENTED

/* ==== >>platform ==============================================================================
 * What the compiler, the processor and the caller's macros give: float arithmetic as it is written, and names for what
 * compilers spell in their own ways. From here on fma, alignment and allocation are the same everywhere. */
#include <errno.h>
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
/* No multiply and add may be contracted but where fma is written. With -ffp-contract=fast clang takes no notice of any
 * pragma: a rounded product that is added to something is moe__fma(a, b, 0), or moe__times in double. */
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
#define MOE__PREFETCH_L1(address) __builtin_prefetch((address), 0, 3)
#define MOE__PREFETCH_L2(address) __builtin_prefetch((address), 0, 2)
#define MOE__ALIGN64 __attribute__((aligned(64)))
#elif defined(_MSC_VER)
#define MOE__INLINE static __forceinline
#define MOE__ALIGN64 __declspec(align(64))
#ifdef MOE__X86
#define MOE__PREFETCH_L1(address) _mm_prefetch((const char *)(address), _MM_HINT_T0)
#define MOE__PREFETCH_L2(address) _mm_prefetch((const char *)(address), _MM_HINT_T1)
#endif
#else
#define MOE__INLINE static inline
#define MOE__ALIGN64
#endif
#ifndef MOE__PREFETCH_L1
#define MOE__PREFETCH_L1(address) ((void)(address))
#define MOE__PREFETCH_L2(address) ((void)(address))
#endif

/* The only multiply-add of the scalar code: rounded once. */
#if defined(MOE_SOFT_FMA) || (defined(__MINGW32__) && !defined(__FMA__))
/* The product is exact in double; the sum, if it is not, becomes that of its neighbours whose last bit is odd, so that
 * rounding it again, to float, is rounding the exact sum: after Boldo and Melquiond [P]. */
static float moe__fma(float a, float b, float c) {
    double product = (double)a * (double)b, sum = product + (double)c, back = sum - product;
    double error = (product - (sum - back)) + ((double)c - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if ((error > 0.0 || error < 0.0) && !(bits & 1)) bits += (error > 0.0) == (sum > 0.0) ? 1u : ~(uint64_t)0;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
}
#else
#define moe__fma(a, b, c) fmaf((a), (b), (c))
#endif

typedef struct moe__status_row { moe_status code; moe_error_kind kind; const char *field, *sentence; } moe__status_row;
static const moe__status_row moe__status_table[] = {
    {MOE_OK, MOE_KIND_OK, "", "ok"},
#define MOE__X(code, number, kind, field, sentence) {code, MOE_KIND_##kind, field, field ": " sentence},
    MOE_STATUS_LIST(MOE__X)
#undef MOE__X
    {MOE_STATUS_COUNT, MOE_KIND_ARGUMENT, "", "not a moe_status"}
};
static const moe__status_row *moe__status_of(moe_status status) {
    const moe__status_row *row = moe__status_table;
    while (row->code != status && row->code != MOE_STATUS_COUNT) row++;
    return row;
}
MOE_API const char *moe_status_string(moe_status status) { return moe__status_of(status)->sentence; }
MOE_API const char *moe_status_field(moe_status status) { return moe__status_of(status)->field; }
MOE_API moe_error_kind moe_status_kind(moe_status status) { return moe__status_of(status)->kind; }

/* The public function that names the rows of a table: NULL for a number that has no row. */
#define MOE__NAME_API(kind, table, count)                            \
    MOE_API const char *moe_##kind##_name(moe_##kind##_kind value) { \
        if ((unsigned)value < count) return table[value].name;       \
        return NULL;                                                 \
    }

/* ==== >>numbers ===============================================================================
 * Small arithmetic that many rooms share: sizes that may overflow, the bits of a float, what is finite, and the one
 * logarithm of scalar code, whose bits are those of the vector kernels. */
#define MOE__MAX_INDEX ((size_t)0x7fffffff) /* rows are counted in 31 bits */

MOE__INLINE size_t moe__min(size_t a, size_t b) { return a < b ? a : b; }
MOE__INLINE size_t moe__max(size_t a, size_t b) { return a > b ? a : b; }
/* Not fmax and fmin: gcc 12 for aarch64 breaks on loops that reduce with them at -O3. */
MOE__INLINE double moe__larger(double a, double b) { return a > b ? a : b; }
MOE__INLINE double moe__smaller(double a, double b) { return a < b ? a : b; }
MOE__INLINE size_t moe__ceil_div(size_t count, size_t each) { return count / each + (count % each != 0); }

/* 0 if the result does not fit. */
static int moe__mul(size_t left, size_t right, size_t *out) {
    if (right && left > SIZE_MAX / right) return 0;
    *out = left * right;
    return 1;
}
static int moe__add_size(size_t left, size_t right, size_t *out) {
    if (left > SIZE_MAX - right) return 0;
    *out = left + right;
    return 1;
}

/* The number's bits, and back. */
static uint32_t moe__bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static float moe__float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int moe__finite(float value) {
    return (moe__bits_of(value) & 0x7f800000u) != 0x7f800000u; /* an exponent of all ones is NaN or infinity */
}
static int moe__finite_double(double value) { return value - value == 0.0; }
static int moe__all_finite(size_t n, const float *values) {
    int all = 1;
    for (size_t i = 0; i < n; i++) all &= moe__finite(values[i]);
    return all;
}
static int moe__any_nan(size_t n, const float *values) {
    int nan = 0;
    for (size_t i = 0; i < n; i++) nan |= values[i] != values[i];
    return nan;
}
static int moe__temperature_ok(float temperature) { /* above 0, and not so near it that the inverse overflows */
    return temperature > 0.0f && moe__finite(temperature) && moe__finite(1.0f / temperature);
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
    uint32_t above = moe__bits_of(x) - 0x3f3504f3u; /* 0x3f3504f3 is sqrt(1/2) */
    /* sign-extends: x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)) */
    float exponent = (float)((int32_t)((above >> 23) ^ 0x100u) - 0x100);
    float mantissa = moe__float_of((above & 0x007fffffu) + 0x3f3504f3u);
    float f = mantissa - 1.0f; /* exact, as the exponent is */
    float tail = moe__fma(exponent, MOE__LN2_LO, moe__fma(f * f, MOE__LOG_TAIL(moe__fma, MOE__SAME, f), 0.0f));
    return moe__fma(exponent, MOE__LN2_HI, f + tail);
}

/* Is arithmetic as it is written? Not every compiler has a macro for the options that let it be otherwise (sums are
 * reordered, divisions become products, -0 is 0), and none has one for an fmaf that rounds twice. */
static int moe__arithmetic_ok(void) {
    static const volatile float given[] = {16777216.0f, 1.0f, 5.0f, -0.0f, 97.0f, 172961.0f, 8.67361738e-19f};
    float big = given[0], one = given[1], five = given[2], zero = given[3];
    float left = given[4], right = given[5], little = given[6]; /* left right = 2^24 + 1, little = 2^-60 */
    int sums = (big + one) - big == 0.0f, quotients = moe__bits_of(five / 3.0f) == 0x3fd55555u;
    int zeros = moe__bits_of(zero + 0.0f) == 0;
    return sums && quotients && zeros && moe__fma(left, right, little) == 16777218.0f;
}
/* a b, rounded, whatever it is added to. */
MOE__INLINE double moe__times(double a, double b) {
#if defined(__clang__)
    volatile double product = a * b;
#else
    double product = a * b;
#endif
    return product;
}

static float moe__positive(double value) { /* what a logarithm can take */
    if (value > (double)FLT_MIN) return (float)value;
    return FLT_MIN;
}
static uint64_t moe__total(size_t n, const uint64_t *load) {
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++) total += load[i];
    return total;
}
/* A number of a desc: 0 means its default, MOE_OFF means 0. */
static float moe__value(float given, float unset) {
    if (given == 0.0f) return unset;
    if (given == (float)MOE_OFF) return 0.0f;
    return given;
}
static float moe__power(float base, uint64_t exponent) { /* in double, by squaring: the same everywhere */
    double result = 1.0, square = (double)base;
    for (; exponent; exponent >>= 1, square = square * square)
        if (exponent & 1) result = result * square;
    return (float)result;
}

/* ==== >>memory ================================================================================
 * Every allocation of the library goes through moe__alloc, and every block is cut up by an arena. A layout function is
 * written once and runs twice: over no memory it measures, over memory it hands out the pieces. */
static unsigned char *moe__align64(void *memory) {
    return (unsigned char *)memory + (64 - (uintptr_t)memory % 64) % 64;
}

/* Aligned to 64 bytes; the pointer to free stands just before. */
static void *moe__alloc(void *ctx, size_t bytes) {
    size_t total;
    if (!moe__add_size(bytes, 64 + sizeof(void *), &total)) return NULL;
    unsigned char *raw = (unsigned char *)MOE_MALLOC(total, ctx);
    (void)ctx;
    if (!raw) return NULL;
    unsigned char *aligned = moe__align64(raw + sizeof(void *));
    memcpy(aligned - sizeof(void *), &raw, sizeof raw);
    return aligned;
}
static void moe__free(void *ctx, void *aligned) {
    void *raw;
    (void)ctx;
    if (!aligned) return;
    memcpy(&raw, (unsigned char *)aligned - sizeof(void *), sizeof raw);
    MOE_FREE(raw, ctx);
}

/* base NULL: only measures. */
typedef struct moe__arena { unsigned char *base; size_t used; int overflow; } moe__arena;
static void *moe__take(moe__arena *arena, size_t count, size_t size) {
    size_t bytes, end;
    if (!moe__mul(count, size, &bytes) || !moe__add_size(arena->used, bytes, &end) || !moe__add_size(end, 63, &end)) {
        arena->overflow = 1;
        return NULL;
    }
    void *piece = NULL;
    if (arena->base) piece = arena->base + arena->used;
    arena->used = end & ~(size_t)63;
    return piece;
}
static float *moe__take_floats(moe__arena *arena, size_t rows, size_t cols) {
    size_t count;
    if (!moe__mul(rows, cols, &count)) { arena->overflow = 1; count = 0; }
    return (float *)moe__take(arena, count, sizeof(float));
}
/* What a size function answers: the arena's bytes and room to align the caller's memory. */
static moe_status moe__arena_bytes(const moe__arena *arena, size_t *bytes) {
    if (arena->overflow || !moe__add_size(arena->used, 64, bytes)) return MOE_E_OVERFLOW;
    return MOE_OK;
}
static moe_status moe__arena_over(moe__arena *arena, void *memory, size_t bytes, size_t needed) {
    if (!memory) return MOE_E_NULL_MEMORY;
    if (bytes < needed) return MOE_E_SMALL_MEMORY;
    memset(arena, 0, sizeof *arena);
    arena->base = moe__align64(memory);
    return MOE_OK;
}

/* Scratch of level 1: the caller's, or with NULL our own, to be freed. */
typedef struct moe__scratch { moe__arena arena; void *own; } moe__scratch;
static moe_status moe__scratch_begin(moe__scratch *begun, void *scratch, size_t bytes, size_t needed) {
    begun->own = NULL;
    if (!scratch) {
        scratch = begun->own = moe__alloc(NULL, needed);
        bytes = needed;
        if (!scratch) return MOE_E_NO_MEMORY;
    }
    return moe__arena_over(&begun->arena, scratch, bytes, needed);
}
static void moe__scratch_end(moe__scratch *begun) { moe__free(NULL, begun->own); }

/* ==== >>random ================================================================================
 * Random numbers without a state, and the hash. Number i of a stream is a function of (seed, stream, i) alone, so that
 * any thread may draw any of them, in any order, and a backward pass may draw them again. */

/* cos and sin of 2 pi u for u = turn / 2^24, turn < 2^24. */
static void moe__cos_sin_turn(uint32_t turn, float *cos_out, float *sin_out) {
    uint32_t quarter = (turn + (1u << 21)) >> 22;            /* the nearest quarter turn, 0 to 4 */
    int32_t rest = (int32_t)turn - (int32_t)(quarter << 22); /* [-2^21, 2^21): an eighth turn each way */
    float a = (float)rest * (1.0f / 16777216.0f), z = a * a; /* a exact, |a| <= 1/8 */
    /* sin(2 pi a) / a and cos(2 pi a) as polynomials in a^2; 6.28318548 is 2 pi rounded */
    float sine = a * moe__fma(moe__fma(moe__fma(-76.7249985f, z, 81.6246643f), z, -41.3418617f), z, 6.28318548f);
    float cosine = moe__fma(
        moe__fma(moe__fma(moe__fma(58.6192513f, z, -85.4245071f), z, 64.9391479f), z, -19.7392082f), z, 1.0f);
    if (quarter & 1u) {
        float swapped = sine;
        sine = cosine, cosine = swapped;
    }
    *cos_out = cosine, *sin_out = sine;
    if ((quarter + 1u) & 2u) *cos_out = -cosine; /* the cosine is negative in quarters 1 and 2 */
    if (quarter & 2u) *sin_out = -sine;          /* the sine in quarters 2 and 3 */
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

/* The moe__..._at functions give numbers start .. start + n - 1 of a stream. Four of them share a block of Philox,
 * which is made anew at the first number asked for and at each multiple of 4. */
static void moe__random_block(uint64_t seed, uint64_t stream, uint64_t at, size_t i, uint32_t word[4]) {
    if (!i || at % 4 == 0) moe_philox(seed, at / 4, stream, word);
}

/* Uniform in [lo, hi): finite, lo <= hi. */
static void moe__uniform_at(uint64_t seed, uint64_t stream, uint64_t start, size_t n, float lo, float hi, float *out) {
    uint32_t word[4];
    float scale = 1.0f, below = hi;            /* below: the last number that may come out */
    if (!moe__finite(hi - lo)) scale = 0.5f;   /* halved where the width would overflow */
    if (lo < hi) below = nextafterf(hi, lo);
    float low = lo * scale, width = moe__fma(hi, scale, -low);
    for (size_t i = 0; i < n; i++) {
        uint64_t at = start + i;
        moe__random_block(seed, stream, at, i, word);
        float u = (float)(word[at % 4] >> 8) * (1.0f / 16777216.0f); /* 24 bits, exact, [0, 1) */
        float value = moe__fma(u, width, low) / scale;
        out[i] = value < below ? value : below;
    }
}

MOE_API moe_status moe_rand_uniform(uint64_t seed, uint64_t stream, size_t count, float lo, float hi, float *out) {
    if (!moe__finite(lo) || !moe__finite(hi) || lo > hi) return MOE_E_RANGE;
    if (count && !out) return MOE_E_NULL_OUT;
    moe__uniform_at(seed, stream, 0, count, lo, hi, out);
    return MOE_OK;
}

/* Standard normal: Box-Muller, two numbers from a pair of words. */
static void moe__normal_at(uint64_t seed, uint64_t stream, uint64_t start, size_t count, float *out) {
    uint32_t word[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < count;) {
        uint64_t at = start + i;
        moe__random_block(seed, stream, at, i, word);
        size_t pair = at % 4 & 2;
        /* all 32 bits, in (0, 1], so that the radius reaches 6.7 */
        float u = moe__fma((float)word[pair], 1.0f / 4294967296.0f, 0.5f / 4294967296.0f);
        float radius = sqrtf(-2.0f * moe__logf1(u)), cosine, sine;
        moe__cos_sin_turn(word[pair + 1] >> 8, &cosine, &sine);
        if (at % 2 == 0) out[i++] = radius * cosine;
        if (i < count) out[i++] = radius * sine;
    }
}
MOE_API moe_status moe_rand_normal(uint64_t seed, uint64_t stream, size_t count, float mean, float std, float *out) {
    if (!moe__finite(mean) || !moe__finite(std) || std < 0.0f) return MOE_E_STD;
    if (count && !out) return MOE_E_NULL_OUT;
    moe__normal_at(seed, stream, 0, count, out);
    for (size_t i = 0; i < count; i++) out[i] = moe__fma(std, out[i], mean);
    return MOE_OK;
}

/* The standard Gumbel distribution: -log(-log u), u in (0, 1). */
static void moe__gumbel_at(uint64_t seed, uint64_t stream, uint64_t start, size_t count, float *out) {
    uint32_t word[4] = {0, 0, 0, 0};
    for (size_t i = 0; i < count; i++) {
        uint64_t at = start + i;
        moe__random_block(seed, stream, at, i, word);
        /* 23 bits and a half: exact, never 0 or 1 */
        float u = ((float)(word[at % 4] >> 9) + 0.5f) * (1.0f / 8388608.0f);
        out[i] = -moe__logf1(-moe__logf1(u));
    }
}
MOE_API moe_status moe_gumbel(uint64_t seed, uint64_t stream, size_t count, float *out) {
    if (count && !out) return MOE_E_NULL_OUT;
    moe__gumbel_at(seed, stream, 0, count, out);
    return MOE_OK;
}

/* Eight bytes as two 32-bit words in the machine's own order, the first one low: equal floats give equal words
 * whatever that order is. */
static uint64_t moe__hash_word(const unsigned char *bytes) {
    uint32_t word[2];
    memcpy(word, bytes, sizeof word);
    return (uint64_t)word[1] << 32 | word[0];
}

/* One step, reversible for a fixed word, so that a single difference is never lost. Multiplied before and after the
 * rotation, so that a change of one bit (a sign) takes a dense change of the next word to undo. */
static uint64_t moe__hash_step(uint64_t hash, uint64_t word) {
    hash += word * 0x9e3779b97f4a7c15ull;                      /* 2^64 / golden ratio, odd */
    return (hash << 29 | hash >> 35) * 0xd1342543de82ef95ull;  /* a multiplier of good spectrum (Steele, Vigna) */
}

MOE_API uint64_t moe_hash(uint64_t seed, const void *bytes, size_t count) {
    const unsigned char *at = (const unsigned char *)bytes;
    if (!at) count = 0;
    uint64_t hash = moe__hash_step(seed ^ 0x510e527fade682d1ull, (uint64_t)count); /* fraction of sqrt(11) */
    if (count >= 32) { /* four independent lanes, from the fractions of the square roots of 2, 3, 5, 7 */
        uint64_t lane0 = seed ^ 0x6a09e667f3bcc908ull, lane1 = seed ^ 0xbb67ae8584caa73bull;
        uint64_t lane2 = seed ^ 0x3c6ef372fe94f82bull, lane3 = seed ^ 0xa54ff53a5f1d36f1ull;
        for (; count >= 32; count -= 32, at += 32) {
            lane0 = moe__hash_step(lane0, moe__hash_word(at));
            lane1 = moe__hash_step(lane1, moe__hash_word(at + 8));
            lane2 = moe__hash_step(lane2, moe__hash_word(at + 16));
            lane3 = moe__hash_step(lane3, moe__hash_word(at + 24));
        }
        hash = moe__hash_step(moe__hash_step(moe__hash_step(moe__hash_step(hash, lane0), lane1), lane2), lane3);
    }
    for (; count >= 8; count -= 8, at += 8) hash = moe__hash_step(hash, moe__hash_word(at));
    if (count >= 4) { /* one float, in the machine's order as well */
        uint32_t word;
        memcpy(&word, at, sizeof word);
        hash = moe__hash_step(hash, word);
        count -= 4, at += 4;
    }
    for (; count; count--) hash = moe__hash_step(hash, *at++);
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9ull; /* final avalanche: SplitMix64's, Stafford's mix 13 */
    hash = (hash ^ hash >> 27) * 0x94d049bb133111ebull;
    return hash ^ hash >> 31;
}

/* ==== >>text ==================================================================================
 * Numbers as text and back, the same in every locale. A float takes the fewest digits that read back as itself. */

/* Text into p, cut at `size`; n counts what it needs, as snprintf does. */
typedef struct moe__text { char *p; size_t size, n; } moe__text;

static void moe__text_char(moe__text *text, char letter) {
    if (text->n < text->size) text->p[text->n] = letter;
    text->n++;
}
static void moe__text_add(moe__text *text, const char *word) {
    while (*word) moe__text_char(text, *word++);
}
static void moe__text_end(moe__text *text) {
    if (text->size) text->p[moe__min(text->n, text->size - 1)] = 0;
}
static void moe__text_u64(moe__text *text, uint64_t value) {
    char digit[20];
    int n = 0;
    do digit[n++] = (char)('0' + value % 10); while (value /= 10);
    while (n) moe__text_char(text, digit[--n]);
}

/* value * 10^exponent; wrong by no more than a relative 1e-14 while the power is finite. */
static double moe__scale10(double value, int exponent) {
    double power = 1;
    for (int i = 0; i < exponent || i < -exponent; i++) power *= 10;
    if (exponent < 0) return value / power;
    return value * power;
}

/* digit[0] . digit[1] digit[2] ... * 10^exponent */
typedef struct moe__decimal { char digit[20]; int n, exponent; } moe__decimal;

/* The fewest digits, at most 9, that every correct reader turns back into `value`, finite and at least 0. */
static moe__decimal moe__decimal_of(double value) {
    moe__decimal decimal;
    moe__text digits = {decimal.digit, sizeof decimal.digit, 0};
    uint64_t mantissa = 0;
    int exponent = 0, n = 0;
    while (value > 0 && moe__scale10(1, exponent + 1) <= value) exponent++;
    while (value > 0 && moe__scale10(1, exponent) > value) exponent--;
    for (int good = 0; !good;) {
        n++;
        mantissa = (uint64_t)(moe__scale10(value, n - 1 - exponent) + 0.5);
        double back = moe__scale10((double)mantissa, exponent - n + 1), margin = 1e-12;
        /* the margin is wider than the error of scale10: the decimal number itself rounds to value */
        good = (float)(back * (1 - margin)) == (float)value && (float)(back * (1 + margin)) == (float)value;
        good |= n == 9;
    }
    moe__text_u64(&digits, mantissa);
    decimal.exponent = exponent + (digits.n > (size_t)n); /* 9.99 became 10.0 */
    decimal.n = (int)digits.n;
    while (decimal.n > 1 && decimal.digit[decimal.n - 1] == '0') decimal.n--;
    return decimal;
}

static void moe__text_float(moe__text *text, float value) {
    double size = (double)value;
    if (value < 0) size = -size;
    if (!(size <= FLT_MAX)) {
        moe__text_add(text, "null");
        return;
    }
    moe__decimal decimal = moe__decimal_of(size);
    int exponent = decimal.exponent, plain = exponent >= -5 && exponent < 9; /* 0.00125, 12.5, 1250; else 1.25e-8 */
    int last = decimal.n - 1, point = 0;                                     /* the point stands after this digit */
    if (value < 0) moe__text_char(text, '-');
    if (plain) point = exponent;
    if (plain && exponent < 0) moe__text_add(text, "0.");
    for (int i = exponent; plain && i < -1; i++) moe__text_char(text, '0');
    for (int i = 0; i <= last || i <= point; i++) {
        if (i && i == point + 1) moe__text_char(text, '.');
        moe__text_char(text, i <= last ? decimal.digit[i] : '0');
    }
    if (plain) return;
    moe__text_add(text, exponent < 0 ? "e-" : "e");
    if (exponent < 0) exponent = -exponent;
    moe__text_u64(text, (uint64_t)exponent);
}

static int moe__parse_u64(const char *text, uint64_t *out) {
    uint64_t value = 0;
    if (!*text || (*text == '0' && text[1])) return 0;
    for (; *text; text++) {
        uint64_t digit = (uint64_t)(*text - '0');
        if (*text < '0' || *text > '9' || value > (UINT64_MAX - digit) / 10) return 0;
        value = value * 10 + digit;
    }
    *out = value;
    return 1;
}

static int moe__parse_float(const char *text, float *out) {
    uint64_t mantissa = 0, power = 0;
    int negative = *text == '-', digits = 0, point = 0, exponent = 0;
    for (text += negative; (*text >= '0' && *text <= '9') || (*text == '.' && !point); text++) {
        if (*text == '.') {
            point = 1;
            continue;
        }
        if (++digits > 64) return 0;
        if (mantissa < UINT64_C(100000000000000000)) {
            mantissa = mantissa * 10 + (uint64_t)(*text - '0');
            exponent -= point;
        } else exponent += !point;
    }
    if (!digits) return 0;
    if (*text == 'e') {
        int down = *++text == '-';
        if (!moe__parse_u64(text + down, &power) || power > 999) return 0;
        exponent += down ? -(int)power : (int)power;
    } else if (*text) return 0;
    double value = 0;
    if (mantissa) value = moe__scale10((double)mantissa, exponent);
    if (!(value < 3.4028235677973366e38)) return 0; /* from here on it rounds to infinity */
    *out = (float)(negative ? -value : value);
    return 1;
}

/* ==== >>kernels ===============================================================================
 * The loops that numbers pass through: products of tiles, elementary functions, activations, optimisers, selection.
 * They are written once, over a small vocabulary of vectors, and compiled once for each instruction set. After this
 * room there is a table moe__kernels_scalar, and moe__kernels_avx2, _avx512 or _neon where the compiler can make them;
 * all give the same bits. Later rooms call kernels through such a table. May use: ground.
 *
 * Panels. Matrices that kernels read lie in panels of 32 columns, one panel after the other; inside a panel a row is 32
 * floats, and the next row follows:
 *
 *     a matrix, 80 columns               panel 0          panel 1           panel 2
 *     row 0:  | 0..31 | 32..63 | 64..79       row 0:  0..31    row 0:  32..63    row 0:  64..79, 16 zeros
 *     row 1:  | 0..31 | 32..63 | 64..79       row 1:  0..31    row 1:  32..63    row 1:  64..79, 16 zeros
 *     ...                                     ...              ...               ...
 *
 * A tile of a product, at most `mr` rows by `tile` columns, stays in registers while k runs down a panel of b:
 *
 *                   b: k rows of a panel      nn: a's rows are the tile's rows, k runs along them
 *                      |                      tn: a's columns are the tile's rows, k runs down them
 *     a: rows, k  ->   c: rows x tile         each element of c is one chain of fma's in increasing k
 *
 * Passes. The second half of this room stands between #else and #endif of MOE__PASS, and this file includes itself:
 *
 *     moe.h                                 moe.h again, with MOE__PASS
 *     declarations, ground                  (skipped)
 *     #define MOE__PASS 1, include  ---->   the second half in plain C: moe__kernel_softmax_scalar, ...
 *     #define MOE__PASS 2, include  ---->   the second half in AVX2:    moe__kernel_softmax_avx2, ...
 *     ...                           ---->   ...
 *     all later rooms                       (skipped)
 *
 * Inside a pass moe__f is the processor's vector of MOE__VL floats; moe__v is 16 floats, however wide moe__f is; moe__m
 * is a mask of 16. Sums run over the 16 lanes of a moe__v and end in one fixed tree: that is why all sets agree. */
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

/* The list of kernels: result, name, parameters. The struct and each pass's table are made from it.
 *   transpose   to[c * 32 + r] = from[r * ld + c], 32 x 32
 *   axpy        y = fma(a, x, y)
 *   slope       the gradient of a loss with dL/dp = c through a softmax p: dz += s p (scale c - mean)
 *   topk        the k highest of each row, descending, ties by index: index (rows, k), value (rows, k) or NULL;
 *               returns 0 at a NaN
 *   count, count8   how many of 16, of 32 tokens have an expert among their k highest
 *   sum_rows    sum[c] += row r of x, one row after the other
 *   half, bfloat    n numbers of two bytes, little-endian, of any alignment */
#define MOE__KERNEL_LIST(X)                                                                                            \
    X(void, transpose, (const float *from, size_t ld, float *to))                                                      \
    X(void, exp, (size_t n, const float *x, float *y))                                                                 \
    X(void, log, (size_t n, const float *x, float *y))                                                                 \
    X(void, tanh, (size_t n, const float *x, float *y))                                                                \
    X(void, erf, (size_t n, const float *x, float *y))                                                                 \
    X(void, softmax, (size_t n, float inv_t, const float *x, float *y))                                                \
    X(float, lse, (size_t n, const float *x))                                                                          \
    X(float, dot, (size_t n, const float *x, const float *y))                                                          \
    X(void, axpy, (size_t n, float a, const float *x, float *y))                                                       \
    X(void, slope, (size_t n, float s, float scale, float mean, const float *c, const float *p, float *dz))            \
    X(void, adamw, (size_t n, const moe__adam *adam, float *param, const float *grad, float *mean, float *square))     \
    X(void, sgd, (size_t n, const moe__adam *adam, float *param, const float *grad, float *mean))                      \
    X(int, topk, (size_t rows, size_t n, size_t k, const float *scores, int32_t *index, float *value))                 \
    X(uint32_t, count, (size_t n, size_t k, const float *z, float *list, float *selected, float *first))               \
    X(uint32_t, count8, (size_t n, size_t k, const float *z, float *selected, float *first))                           \
    X(void, sum_rows, (size_t rows, size_t cols, const float *x, double *sum))                                         \
    X(int, all_finite, (size_t n, const float *x))                                                                     \
    X(void, half, (size_t n, const unsigned char *from, float *to))                                                    \
    X(void, bfloat, (size_t n, const unsigned char *from, float *to))

typedef struct moe__kernels {
    moe_isa_kind isa;
    size_t mr, tile; /* most rows, and columns, of a tile */
    void (*nn[MOE__MAX_MR + 1])(const moe__tile *);
    void (*tn[MOE__MAX_MR + 1])(const moe__tile *);
    void (*act[MOE_EXPERT_COUNT])(size_t rows, const float *z0, const float *z1, float *h);
    /* z -> dz, h -> w h in place; part[r * part_ld] = this panel's share of <h, dh> */
    void (*act_back[MOE_EXPERT_COUNT])(size_t rows, const float *weight, float *z0, float *z1, float *h,
                                       const float *dh, float *part, size_t part_ld);
#define MOE__X(result, name, parameters) result (*name) parameters;
    MOE__KERNEL_LIST(MOE__X)
#undef MOE__X
} moe__kernels;

#define MOE__TOPK_K 16  /* up to here the k best of rows are found side by side; in longer rows one row at a time, as */
#define MOE__TOPK_N 512 /* most of such a row is passed over quickly */

/* The lowest bit that is set: bits is not 0. */
MOE__INLINE unsigned moe__kernel_first_bit(uint64_t bits) {
#if defined(__GNUC__)
    return (unsigned)__builtin_ctzll(bits);
#else
    unsigned i = 0;
    while (!(bits >> i & 1)) i++;
    return i;
#endif
}

/* Macros that are the same in every pass. A name inside a pass gets the pass's suffix; MOE__ROWS_n(M) is M(0) ...
 * M(n - 1), and MOE__SIZES(M) is M(1) ... M(MOE__MR). */
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
#define MOE__SIZES_4(M) M(1) M(2) M(3) M(4)
#define MOE__SIZES_6(M) MOE__SIZES_4(M) M(5) M(6)
#define MOE__SIZES_14(M) MOE__SIZES_6(M) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14)
#define MOE__SIZES(M) MOE__CAT(MOE__SIZES_, MOE__MR)(M)
#define MOE__CAT_(a, b) a##b
#define MOE__CAT(a, b) MOE__CAT_(a, b)
#define MOE__S(name) MOE__CAT(name, MOE__SUFFIX)
#define MOE__K(name) MOE__S(moe__kernel_##name##_)
#define moe__f MOE__S(moe__f_)
#define moe__v MOE__S(moe__v_)
#define moe__row MOE__S(moe__row_)
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

/* Functions of the vocabulary: of one vector, of two. */
#define MOE__V1(name, expr) MOE__FI moe__v name(moe__v a) { moe__v r; MOE__EACH_V(r.v[i] = expr;) return r; }
#define MOE__V2(name, expr) MOE__FI moe__v name(moe__v a, moe__v b) { moe__v r; MOE__EACH_V(r.v[i] = expr;) return r; }

/* The rows of a tile: registers c0, c1, ... */
#define MOE__ROW_LOAD(r) moe__row c##r; MOE__EACH_T(c##r.v[i] = MOE__F_LOAD(from + i * MOE__VL);) from += from_ld;
#define MOE__ROW_STORE(r) MOE__EACH_T(MOE__F_STORE(to + i * MOE__VL, c##r.v[i]);) to += tile->ldc;
#define MOE__ROW_FMA(r) \
    { moe__f x = MOE__F_SET1(a[(r) * a_row]); MOE__EACH_T(c##r.v[i] = MOE__F_FMA(x, w.v[i], c##r.v[i]);) }
#define MOE__ROW_STEP(R) \
    { moe__row w; MOE__EACH_T(w.v[i] = MOE__F_LOAD(b + i * MOE__VL);) b += ldb; MOE__ROWS_##R(MOE__ROW_FMA) }

/* c (R, tile) += a b: a's rows are the rows, k runs along them, panel by panel */
#define MOE__NN(R)                                                                                       \
    MOE__FN void MOE__K(nn##R)(const moe__tile *tile) {                                                  \
        enum { a_row = 32 };                                                                             \
        const float *from = tile->c, *a = tile->a, *b = tile->b, *ahead = tile->prefetch;                \
        size_t from_ld = tile->ldc, ldb = tile->ldb, left = tile->k;                                     \
        float *to = tile->c;                                                                             \
        if (tile->init) from = tile->init, from_ld = 0;                                                  \
        MOE__ROWS_##R(MOE__ROW_LOAD)                                                                     \
        for (; left >= 32; left -= 32, a += tile->a_panel - 32) {                                        \
            const float *next = tile->a + R * 32; /* the first panel of the next tile, or this one's next */ \
            if (left >= 64) next = a + tile->a_panel;                                                    \
            for (int g = 0; g < 4; g++) {                                                                \
                for (size_t l = 0; l < tile->prefetch_lines; l++, ahead += 16) MOE__PREFETCH_L2(ahead);  \
                for (int l = g * 8; l < g * 8 + 8 && l < 2 * R; l++) MOE__PREFETCH_L1(next + l * 16);    \
                for (int u = 0; u < 8; u++, a++) MOE__ROW_STEP(R)                                        \
            }                                                                                            \
        }                                                                                                \
        for (; left; left--, a++) MOE__ROW_STEP(R)                                                       \
        MOE__ROWS_##R(MOE__ROW_STORE)                                                                    \
    }
/* c (R, tile) += a^T b: a's columns are the rows, k runs down them */
#define MOE__TN(R)                                                                                       \
    MOE__FN void MOE__K(tn##R)(const moe__tile *tile) {                                                  \
        enum { a_row = 1 };                                                                              \
        const float *from = tile->c, *a = tile->a, *b = tile->b;                                         \
        size_t from_ld = tile->ldc, ldb = tile->ldb;                                                     \
        float *to = tile->c;                                                                             \
        if (tile->init) from = tile->init, from_ld = 0;                                                  \
        MOE__ROWS_##R(MOE__ROW_LOAD)                                                                     \
        for (size_t left = tile->k; left; left--, a += 32) MOE__ROW_STEP(R)                              \
        MOE__ROWS_##R(MOE__ROW_STORE)                                                                    \
    }
#define MOE__NN_ENTRY(R) , MOE__K(nn##R)
#define MOE__TN_ENTRY(R) , MOE__K(tn##R)

/* An elementary function of n numbers. */
#define MOE__MAP(name)                                                                                   \
    MOE__FN void MOE__K(name)(size_t n, const float *x, float *y) {                                      \
        for (size_t i = 0; i < n; i += 16)                                                               \
            moe__v_store_n(y + i, n - i, moe__v_##name(moe__v_load_n(x + i, n - i, 1.0f)));              \
    }

/* An activation `f`, forward and backward. */
#define MOE__ACT(name, f)                                                                                \
    MOE__FN void MOE__K(name##_forward)(size_t rows, const float *z0, const float *z1, float *h) {       \
        moe__v slope;                                                                                    \
        (void)z1;                                                                                        \
        for (size_t i = 0; i < rows * 32; i += 16) moe__v_store(h + i, f(moe__v_load(z0 + i), &slope));  \
    }                                                                                                    \
    MOE__FN void MOE__K(name##_backward)(size_t rows, const float *weight, float *z0, float *z1, float *h, \
                                         const float *dh, float *part, size_t part_ld) {                 \
        (void)z1;                                                                                        \
        for (size_t r = 0; r < rows; r++, z0 += 32, h += 32, dh += 32) {                                 \
            moe__v w = moe__v_set1(1.0f), along = moe__v_set1(0.0f), slope;                              \
            if (weight) w = moe__v_set1(weight[r]);                                                      \
            for (int c = 0; c < 32; c += 16) {                                                           \
                moe__v value = moe__v_load(h + c), grad = moe__v_load(dh + c);                           \
                along = moe__v_fma(value, grad, along);                                                  \
                f(moe__v_load(z0 + c), &slope);                                                          \
                moe__v_store(z0 + c, moe__v_mul(moe__v_mul(w, grad), slope));                            \
                moe__v_store(h + c, moe__v_mul(w, value));                                               \
            }                                                                                            \
            part[r * part_ld] = moe__v_sum(along);                                                       \
        }                                                                                                \
    }
/* Gated: a panel of z holds 16 gates, then the 16 values that they gate; two such panels make one of h = f(gate)
 * u(value). */
#define MOE__GLU(name, f, u)                                                                             \
    MOE__FN void MOE__K(name##_forward)(size_t rows, const float *z0, const float *z1, float *h) {       \
        moe__v slope;                                                                                    \
        for (size_t r = 0; r < rows; r++, z0 += 32, z1 += 32, h += 32) {                                 \
            const float *z = z0;                                                                         \
            for (int c = 0; c < 32; c += 16, z = z1) {                                                   \
                moe__v gate = f(moe__v_load(z), &slope);                                                 \
                moe__v_store(h + c, moe__v_mul(gate, u(moe__v_load(z + 16), &slope)));                   \
            }                                                                                            \
        }                                                                                                \
    }                                                                                                    \
    MOE__FN void MOE__K(name##_backward)(size_t rows, const float *weight, float *z0, float *z1, float *h, \
                                         const float *dh, float *part, size_t part_ld) {                 \
        for (size_t r = 0; r < rows; r++, z0 += 32, z1 += 32, h += 32, dh += 32) {                       \
            moe__v w = moe__v_set1(1.0f), along = moe__v_set1(0.0f), slope, rise;                        \
            float *z = z0;                                                                               \
            if (weight) w = moe__v_set1(weight[r]);                                                      \
            for (int c = 0; c < 32; c += 16, z = z1) {                                                   \
                moe__v value = moe__v_load(h + c), grad = moe__v_load(dh + c);                           \
                moe__v up = u(moe__v_load(z + 16), &rise);                                               \
                along = moe__v_fma(value, grad, along);                                                  \
                moe__v gate = f(moe__v_load(z), &slope), wg = moe__v_mul(w, grad);                       \
                moe__v_store(z, moe__v_mul(moe__v_mul(wg, up), slope));                                  \
                moe__v_store(z + 16, moe__v_mul(moe__v_mul(wg, gate), rise));                            \
                moe__v_store(h + c, moe__v_mul(w, value));                                               \
            }                                                                                            \
            part[r * part_ld] = moe__v_sum(along);                                                       \
        }                                                                                                \
    }
#define MOE__ACT_BOTH(direction) \
    {0, MOE__K(relu_##direction), MOE__K(gelu_##direction), MOE__K(silu_##direction), \
     MOE__K(swiglu_##direction), MOE__K(geglu_##direction), MOE__K(same_##direction), \
     MOE__K(gelu_tanh_##direction), MOE__K(geglu_tanh_##direction), MOE__K(swiglu_clamped_##direction)}

/* The higher of two to the first. */
#define MOE__ORDER(a, b) { moe__f high = MOE__F_MAX(a, b); b = MOE__F_MIN(a, b); a = high; }
#define MOE__ORDER4(a, b, c, d, e, f, g, h) MOE__ORDER(a, b) MOE__ORDER(c, d) MOE__ORDER(e, f) MOE__ORDER(g, h)

#define MOE__WIDEN(name)                                                                                 \
    MOE__FN void MOE__K(name)(size_t n, const unsigned char *from, float *to) {                          \
        for (; n >= 16; n -= 16, from += 32, to += 16) MOE__K(name##16)(from, to);                       \
        unsigned char rest[32] = {0};                                                                    \
        float last[16];                                                                                  \
        if (!n) return;                                                                                  \
        memcpy(rest, from, 2 * n);                                                                       \
        MOE__K(name##16)(rest, last);                                                                    \
        memcpy(to, last, n * sizeof *to);                                                                \
    }

#ifndef MOE_FILENAME
#define MOE_FILENAME "moe.h"
#endif
#define MOE__PASS 1
#include MOE_FILENAME
#undef MOE__PASS
#ifdef MOE__X86
#define MOE__PASS 2
#include MOE_FILENAME
#undef MOE__PASS
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push /* gcc bug 105593: its own intrinsics start from an undefined vector */
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define MOE__PASS 3
#include MOE_FILENAME
#undef MOE__PASS
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#ifdef MOE__NEON
#define MOE__PASS 4
#include MOE_FILENAME
#undef MOE__PASS
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
#define MOE__SUFFIX scalar
typedef float moe__f;
#define MOE__VL 1
#define MOE__NT 4
#define MOE__MR 4
#define MOE__EACH_V(...) for (int i = 0; i < 16; i++) { __VA_ARGS__ }
#define MOE__EACH_T(...) for (int i = 0; i < 4; i++) { __VA_ARGS__ }
#define MOE__F_LOAD(p) (*(p))
#define MOE__F_STORE(p, a) (*(p) = (a))
#define MOE__F_SET1(x) (x)
#define MOE__F_FMA(a, b, c) moe__fma(a, b, c)
#define MOE__F_ADD(a, b) ((a) + (b))
#define MOE__F_SUB(a, b) ((a) - (b))
#define MOE__F_MUL(a, b) ((a) * (b))
#define MOE__F_DIV(a, b) ((a) / (b))
#define MOE__F_MIN(a, b) ((a) < (b) ? (a) : (b))
#define MOE__F_MAX(a, b) ((a) > (b) ? (a) : (b))
#define MOE__F_SQRT(a) sqrtf(a)
#define MOE__F_LT(a, b) ((a) < (b))
#define MOE__F_GE(a, b, one) ((a) >= (b) ? (one) : 0.0f) /* one where a >= b, else 0 */
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
#define MOE__SUFFIX avx2
typedef __m256 moe__f;
#define MOE__VL 8
#define MOE__NT 2
#define MOE__MR 6
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
#define MOE__F_UNORD(a, b) _mm256_cmp_ps(a, b, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm256_blendv_ps(b, a, m)
#define MOE__F_BITS(m) ((uint32_t)_mm256_movemask_ps(m))
#define MOE__F_AND(a, u) _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32((int)(u))))
#define MOE__F_XOR(a, u) _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32((int)(u))))
#define MOE__F_OR(a, b) _mm256_or_ps(a, b)
#define MOE__F_POW2(n) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))
#define MOE__F_EXPONENT(x) _mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_castps_si256(x), 23))
#define MOE__F_QUADS(p, ld) /* 4 floats of rows 0 and 4 */ \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps((p) + 4 * (ld)), 1)
#define MOE__F_LOW(a, b) _mm256_unpacklo_ps(a, b)
#define MOE__F_HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define MOE__F_PAIRS(a, b, which) _mm256_shuffle_ps(a, b, which)
#define MOE__FMASK __m256
#elif MOE__PASS == 3
#define MOE__SUFFIX avx512
typedef __m512 moe__f;
#define MOE__VL 16
#define MOE__NT 2
#define MOE__MR 14
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
#define MOE__F_UNORD(a, b) _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)
#define MOE__F_SEL(m, a, b) _mm512_mask_blend_ps(m, b, a)
#define MOE__F_BITS(m) ((uint32_t)(m))
#define MOE__F_AND(a, u) _mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32((int)(u))))
#define MOE__F_XOR(a, u) _mm512_xor_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32((int)(u))))
#define MOE__F_OR(a, b) _mm512_or_ps(a, b)
#define MOE__F_POW2(n) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23))
#define MOE__F_EXPONENT(x) _mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_castps_si512(x), 23))
#define MOE__F_QUADS(p, ld) /* 4 floats of rows 0, 4, 8 and 12 */ \
    _mm512_insertf32x4(_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), \
        _mm_loadu_ps((p) + 4 * (ld)), 1), _mm_loadu_ps((p) + 8 * (ld)), 2), _mm_loadu_ps((p) + 12 * (ld)), 3)
#define MOE__F_LOW(a, b) _mm512_unpacklo_ps(a, b)
#define MOE__F_HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define MOE__F_PAIRS(a, b, which) _mm512_shuffle_ps(a, b, which)
#define MOE__FMASK __mmask16
#else
#define MOE__SUFFIX neon
typedef float32x4_t moe__f;
#define MOE__VL 4
#define MOE__NT 4
#define MOE__MR 6
#define MOE__EACH_V(...) \
    { enum { i = 0 }; __VA_ARGS__ } { enum { i = 1 }; __VA_ARGS__ } \
    { enum { i = 2 }; __VA_ARGS__ } { enum { i = 3 }; __VA_ARGS__ }
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
MOE__FI moe__m moe__v_isnan(moe__v a) { moe__m r; MOE__EACH_V(r.v[i] = MOE__F_UNORD(a.v[i], a.v[i]);) return r; }
MOE__FI moe__v moe__v_sel(moe__m m, moe__v a, moe__v b) {
    moe__v r;
    MOE__EACH_V(r.v[i] = MOE__F_SEL(m.v[i], a.v[i], b.v[i]);)
    return r;
}
/* bit i: lane i */
MOE__FI uint32_t moe__v_bits(moe__m m) {
    uint32_t bits = 0;
    MOE__EACH_V(bits |= MOE__F_BITS(m.v[i]) << (i * MOE__VL);)
    return bits;
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
/* the first n lanes, all 16 if there are so many; the others `fill` */
MOE__FI moe__v moe__v_load_n(const float *p, size_t n, float fill) {
    if (n >= 16) return moe__v_load(p);
    float lane[16];
    for (size_t i = 0; i < 16; i++) lane[i] = i < n ? p[i] : fill;
    return moe__v_load(lane);
}
MOE__FI void moe__v_store_n(float *p, size_t n, moe__v a) {
    if (n >= 16) {
        moe__v_store(p, a);
        return;
    }
    float lane[16];
    moe__v_store(lane, a);
    for (size_t i = 0; i < n; i++) p[i] = lane[i];
}
/* one fixed tree: lanes i and i + 8, then + 4, + 2, + 1 */
MOE__FI float moe__v_sum(moe__v a) {
    float lane[16];
    moe__v_store(lane, a);
    for (int half = 8; half; half >>= 1)
        for (int i = 0; i < half; i++) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}
MOE__FI float moe__v_maximum(moe__v a) {
    float lane[16];
    moe__v_store(lane, a);
    for (int i = 1; i < 16; i++)
        if (lane[i] > lane[0]) lane[0] = lane[i];
    return lane[0];
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
MOE__SIZES(MOE__NN)
MOE__SIZES(MOE__TN)

MOE__FN void MOE__K(transpose)(const float *from, size_t ld, float *to) {
#if MOE__PASS == 2 || MOE__PASS == 3
    for (int r = 0; r < 32; r += MOE__VL) /* so many rows at a time: 4 columns of them are 4 registers of 4 x 4 */
        for (int c = 0; c < 32; c += 4) {
            const float *s = from + (size_t)r * ld + c;
            float *column = to + c * 32 + r;
            moe__f q0 = MOE__F_QUADS(s, ld), q1 = MOE__F_QUADS(s + ld, ld);
            moe__f q2 = MOE__F_QUADS(s + 2 * ld, ld), q3 = MOE__F_QUADS(s + 3 * ld, ld);
            moe__f low01 = MOE__F_LOW(q0, q1), low23 = MOE__F_LOW(q2, q3);
            moe__f high01 = MOE__F_HIGH(q0, q1), high23 = MOE__F_HIGH(q2, q3);
            MOE__F_STORE(column, MOE__F_PAIRS(low01, low23, 0x44));
            MOE__F_STORE(column + 32, MOE__F_PAIRS(low01, low23, 0xee));
            MOE__F_STORE(column + 64, MOE__F_PAIRS(high01, high23, 0x44));
            MOE__F_STORE(column + 96, MOE__F_PAIRS(high01, high23, 0xee));
        }
#else
    for (int r = 0; r < 32; r++)
        for (int c = 0; c < 32; c++) to[c * 32 + r] = from[(size_t)r * ld + (size_t)c];
#endif
}

/* -- elementwise and reductions: 16 lanes, the tail padded -- */
MOE__MAP(exp)
MOE__MAP(log)
MOE__MAP(tanh)
MOE__MAP(erf)

MOE__FI float MOE__K(highest)(size_t n, const float *x) {
    moe__v top = moe__v_set1(-FLT_MAX);
    for (size_t i = 0; i < n; i += 16) top = moe__v_max(moe__v_load_n(x + i, n - i, -FLT_MAX), top);
    return moe__v_maximum(top);
}

MOE__FN void MOE__K(softmax)(size_t n, float inv_t, const float *x, float *y) {
    moe__v scale = moe__v_set1(inv_t), top = moe__v_set1(MOE__K(highest)(n, x)), sum = moe__v_set1(0.0f);
    for (size_t i = 0; i < n; i += 16) {
        moe__v e = moe__v_exp(moe__v_mul(moe__v_sub(moe__v_load_n(x + i, n - i, -INFINITY), top), scale));
        sum = moe__v_add(sum, e);
        moe__v_store_n(y + i, n - i, e);
    }
    moe__v total = moe__v_set1(moe__v_sum(sum));
    for (size_t i = 0; i < n; i += 16)
        moe__v_store_n(y + i, n - i, moe__v_div(moe__v_load_n(y + i, n - i, 0.0f), total));
}

MOE__FN float MOE__K(lse)(size_t n, const float *x) {
    float highest = MOE__K(highest)(n, x), lane[16];
    moe__v top = moe__v_set1(highest), sum = moe__v_set1(0.0f);
    for (size_t i = 0; i < n; i += 16)
        sum = moe__v_add(sum, moe__v_exp(moe__v_sub(moe__v_load_n(x + i, n - i, -INFINITY), top)));
    moe__v_store(lane, moe__v_log(moe__v_set1(moe__v_sum(sum))));
    return highest + lane[0];
}

MOE__FN float MOE__K(dot)(size_t n, const float *x, const float *y) {
    moe__v sum = moe__v_set1(0.0f);
    for (size_t i = 0; i < n; i += 16)
        sum = moe__v_fma(moe__v_load_n(x + i, n - i, 0.0f), moe__v_load_n(y + i, n - i, 0.0f), sum);
    return moe__v_sum(sum);
}

MOE__FN void MOE__K(axpy)(size_t n, float a, const float *x, float *y) {
    moe__v factor = moe__v_set1(a);
    for (; n >= 16; n -= 16, x += 16, y += 16)
        moe__v_store(y, moe__v_fma(factor, moe__v_load(x), moe__v_load(y)));
    if (n) moe__v_store_n(y, n, moe__v_fma(factor, moe__v_load_n(x, n, 0.0f), moe__v_load_n(y, n, 0.0f)));
}

/* The gradient of a loss with dL/dp = c through a softmax p: dz = fma(s p, fma(scale, c, -mean), dz). */
MOE__FN void MOE__K(slope)(size_t n, float s, float scale, float mean, const float *c, const float *p, float *dz) {
    moe__v step = moe__v_set1(s), factor = moe__v_set1(scale), minus_mean = moe__v_set1(-mean);
    for (size_t i = 0; i < n; i += 16) {
        moe__v cost = moe__v_load_n(c + i, n - i, 0.0f), prob = moe__v_load_n(p + i, n - i, 0.0f);
        moe__v along = moe__v_fma(cost, factor, minus_mean), before = moe__v_load_n(dz + i, n - i, 0.0f);
        moe__v_store_n(dz + i, n - i, moe__v_fma(moe__v_mul(step, prob), along, before));
    }
}

/* -- activations: value and derivative together -- */
MOE__FI moe__v MOE__K(same)(moe__v z, moe__v *slope) {
    *slope = moe__v_set1(1.0f);
    return z;
}
MOE__FI moe__v MOE__K(relu)(moe__v z, moe__v *slope) {
    moe__v zero = moe__v_set1(0.0f), one = moe__v_set1(1.0f);
    moe__m on = moe__v_lt(zero, z);
    *slope = moe__v_sel(on, one, zero);
    return moe__v_sel(on, z, zero);
}
MOE__FI moe__v MOE__K(silu)(moe__v z, moe__v *slope) {
    moe__v s = moe__v_sigmoid(z), a = moe__v_mul(z, s);
    *slope = moe__v_fma(a, moe__v_sub(moe__v_set1(1.0f), s), s);
    return a;
}
MOE__FI moe__v MOE__K(gelu)(moe__v z, moe__v *slope) {
    moe__v half = moe__v_set1(0.5f), u = moe__v_mul(z, moe__v_set1(0.707106781f)); /* sqrt(1/2) */
    moe__v cdf = moe__v_fma(half, moe__v_erf(u), half);
    moe__v pdf = moe__v_mul(moe__v_exp(moe__v_neg(moe__v_mul(u, u))), moe__v_set1(0.398942280f)); /* 1/sqrt(2 pi) */
    *slope = moe__v_fma(z, pdf, cdf);
    return moe__v_mul(z, cdf);
}
/* z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), the same as with tanh. Beyond 10 the sigmoid is 0 or 1 in float32. */
MOE__FI moe__v MOE__K(gelu_tanh)(moe__v z, moe__v *slope) {
    moe__v near = moe__v_max(moe__v_set1(-10.0f), moe__v_min(moe__v_set1(10.0f), z)), square = moe__v_mul(near, near);
    moe__v linear = moe__v_set1(1.59576912f);
    moe__v s = moe__v_sigmoid(moe__v_mul(near, moe__v_fma(square, moe__v_set1(0.0713548163f), linear)));
    moe__v a = moe__v_mul(z, s), inner = moe__v_fma(square, moe__v_set1(0.214064449f), linear);
    *slope = moe__v_fma(moe__v_mul(a, moe__v_sub(moe__v_set1(1.0f), s)), inner, s);
    return a;
}
/* GPT-OSS: the gate's half and the half that it gates. At a limit the slope is still that within. */
MOE__FI moe__v MOE__K(clamped_gate)(moe__v z, moe__v *slope) {
    moe__v limit = moe__v_set1(7.0f), alpha = moe__v_set1(1.702f), a = moe__v_min(limit, z);
    moe__v s = moe__v_sigmoid(moe__v_mul(alpha, a)), value = moe__v_mul(a, s);
    moe__v inside = moe__v_fma(moe__v_mul(alpha, value), moe__v_sub(moe__v_set1(1.0f), s), s);
    *slope = moe__v_sel(moe__v_lt(limit, z), moe__v_set1(0.0f), inside);
    return value;
}
MOE__FI moe__v MOE__K(clamped_up)(moe__v z, moe__v *slope) {
    moe__v limit = moe__v_set1(7.0f), one = moe__v_set1(1.0f), zero = moe__v_set1(0.0f);
    *slope = moe__v_sel(moe__v_lt(limit, moe__v_abs(z)), zero, one);
    return moe__v_add(moe__v_max(moe__v_neg(limit), moe__v_min(limit, z)), one);
}
MOE__ACT(relu, MOE__K(relu))
MOE__ACT(same, MOE__K(same))
MOE__ACT(gelu, MOE__K(gelu))
MOE__ACT(silu, MOE__K(silu))
MOE__ACT(gelu_tanh, MOE__K(gelu_tanh))
MOE__GLU(swiglu, MOE__K(silu), MOE__K(same))
MOE__GLU(geglu, MOE__K(gelu), MOE__K(same))
MOE__GLU(geglu_tanh, MOE__K(gelu_tanh), MOE__K(same))
MOE__GLU(swiglu_clamped, MOE__K(clamped_gate), MOE__K(clamped_up))

/* -- optimisers -- */
MOE__FN void MOE__K(adamw)(size_t n, const moe__adam *adam, float *param, const float *grad, float *mean,
                          float *square) {
    moe__v scale = moe__v_set1(adam->scale), eps = moe__v_set1(adam->eps);
    moe__v keep1 = moe__v_set1(adam->beta1), new1 = moe__v_set1(adam->one_beta1), fix1 = moe__v_set1(adam->fix1);
    moe__v keep2 = moe__v_set1(adam->beta2), new2 = moe__v_set1(adam->one_beta2), fix2 = moe__v_set1(adam->fix2);
    moe__v decay = moe__v_set1(adam->decay), lr = moe__v_set1(-adam->lr);
    for (size_t i = 0; i < n; i += 16) {
        size_t left = n - i;
        moe__v g = moe__v_mul(scale, moe__v_load_n(grad + i, left, 0.0f));
        moe__v m = moe__v_load_n(mean + i, left, 0.0f), v = moe__v_load_n(square + i, left, 0.0f);
        m = moe__v_fma(keep1, m, moe__v_mul(new1, g));
        v = moe__v_fma(keep2, v, moe__v_mul(new2, moe__v_mul(g, g)));
        moe__v step = moe__v_div(moe__v_mul(m, fix1), moe__v_add(moe__v_sqrt(moe__v_mul(v, fix2)), eps));
        moe__v decayed = moe__v_mul(decay, moe__v_load_n(param + i, left, 0.0f));
        moe__v_store_n(param + i, left, moe__v_fma(lr, step, decayed));
        moe__v_store_n(mean + i, left, m);
        moe__v_store_n(square + i, left, v);
    }
}
MOE__FN void MOE__K(sgd)(size_t n, const moe__adam *adam, float *param, const float *grad, float *mean) {
    moe__v scale = moe__v_set1(adam->scale), momentum = moe__v_set1(adam->beta1);
    moe__v decay = moe__v_set1(adam->decay), lr = moe__v_set1(-adam->lr);
    for (size_t i = 0; i < n; i += 16) {
        size_t left = n - i;
        moe__v g = moe__v_mul(scale, moe__v_load_n(grad + i, left, 0.0f));
        moe__v m = moe__v_fma(momentum, moe__v_load_n(mean + i, left, 0.0f), g);
        moe__v decayed = moe__v_mul(decay, moe__v_load_n(param + i, left, 0.0f));
        moe__v_store_n(param + i, left, moe__v_fma(lr, m, decayed));
        moe__v_store_n(mean + i, left, m);
    }
}

/* -- selection: compares only, so exact in any order --
 *
 * Short lists of many rows go side by side, row r in lane r of 32, each through an insertion into its k best. Of a long
 * row most is never looked at twice, as a floor tells that it cannot be among the k best:
 *
 *     row r:     | 32 columns | 32 columns | ... | n of them          maxima of every 32nd column: 32 numbers, of which
 *                  \________________________________________/   ->    k are at least as high as the k-th, the floor
 *
 *     again:     what is not below the floor -> x[0 * 32 + r], x[1 * 32 + r], ... (at most 32, mostly few more than k)
 *     then:      x goes, 32 rows side by side, through the insertion
 *
 * A row in which more than 32 are not below the floor, or in which -infinity is selected, goes alone. */
/* One row, by insertion; 16 numbers are passed over at a time if none is above the k-th best so far. */
MOE__FN int MOE__K(topk_row)(size_t n, size_t k, const float *scores, int32_t *index) {
    size_t have = 0;
    for (size_t e = 0; e < n; e++) {
#if MOE__PASS > 1
        if (have == k && e % 16 == 0)
            for (moe__v worst = moe__v_set1(scores[index[k - 1]]); n - e >= 16; e += 16) {
                moe__v x = moe__v_load(scores + e);
                if (moe__v_bits(moe__v_lt(worst, x)) | moe__v_bits(moe__v_isnan(x))) break;
            }
        if (e == n) break;
#endif
        float score = scores[e];
        if (score != score) return 0;
        if (have == k && !(score > scores[index[k - 1]])) continue;
        if (have < k) have++;
        size_t i = have - 1;
        for (; i && score > scores[index[i - 1]]; i--) index[i] = index[i - 1];
        index[i] = (int32_t)e;
    }
    return 1;
}

/* 32 rows side by side, row r in lane r: `cols` columns of them, 32 floats each, are inserted into the k best of every
 * row. best[2 j] is the j-th, best[2 j + 1] its id, bits that are carried along. Two columns go down the list together;
 * each pushes down what it is above. A NaN sets its lane of nan. */
MOE__FN void MOE__K(topk_insert)(size_t cols, size_t k, const float *x, const float *id, float *best, float *nan) {
    for (size_t i = 0; i < k * 64; i++) best[i] = -INFINITY;
    for (size_t c = 0; c < cols; c += 2)
        for (size_t l = 0; l < 32; l += MOE__VL) {
            size_t at = c * 32 + l;
            moe__f v0 = MOE__F_LOAD(x + at), id0 = MOE__F_LOAD(id + at), push0 = v0, push_id0 = id0;
            moe__f v1 = MOE__F_SET1(-INFINITY), id1 = id0, push1, push_id1;
            if (c + 1 < cols) v1 = MOE__F_LOAD(x + at + 32), id1 = MOE__F_LOAD(id + at + 32);
            push1 = v1;
            push_id1 = id1;
            MOE__F_STORE(nan + l, MOE__F_SEL(MOE__F_UNORD(v0, v1), MOE__F_SET1(1.0f), MOE__F_LOAD(nan + l)));
            for (float *slot = best + l, *end = slot + k * 64; slot < end; slot += 64) {
                moe__f have = MOE__F_LOAD(slot), have_id = MOE__F_LOAD(slot + 32), above, above_id;
                MOE__FMASK lower = MOE__F_LT(have, v0);
                above = MOE__F_SEL(lower, push0, have);
                above_id = MOE__F_SEL(lower, push_id0, have_id);
                push0 = MOE__F_SEL(lower, have, v0);
                push_id0 = MOE__F_SEL(lower, have_id, id0);
                lower = MOE__F_LT(above, v1);
                MOE__F_STORE(slot, MOE__F_SEL(lower, push1, above));
                MOE__F_STORE(slot + 32, MOE__F_SEL(lower, push_id1, above_id));
                push1 = MOE__F_SEL(lower, above, v1);
                push_id1 = MOE__F_SEL(lower, above_id, id1);
            }
        }
}
/* The k-th best of 32 columns of each of 32 rows. */
MOE__FN void MOE__K(topk_floor)(size_t k, const float *x, float *floor) {
    MOE__ALIGN64 float best[MOE__TOPK_K * 32];
    for (size_t i = 0; i < k * 32; i++) best[i] = -INFINITY;
    for (size_t c = 0; c < 32 * 32; c += 2 * 32)
        for (size_t l = 0; l < 32; l += MOE__VL) {
            moe__f v0 = MOE__F_LOAD(x + c + l), v1 = MOE__F_LOAD(x + c + 32 + l);
            for (float *slot = best + l, *end = slot + k * 32; slot < end; slot += 32) {
                moe__f have = MOE__F_LOAD(slot), above = MOE__F_MAX(have, v0);
                v0 = MOE__F_MIN(have, v0);
                MOE__F_STORE(slot, MOE__F_MAX(above, v1));
                v1 = MOE__F_MIN(above, v1);
            }
        }
    memcpy(floor, best + (k - 1) * 32, 32 * sizeof(float));
}

/* 32 rows of more than 32 columns. Most of a row is below a floor that costs little: of the maxima of every 32nd column
 * k are at least as high as the k-th of them, and so are the row's k best. What is not below it, a NaN too, goes into
 * the columns of x; their number is returned. A row that has more than 32 is marked in `over`. */
MOE__FN size_t MOE__K(topk_filter)(size_t n, size_t k, const float *scores, size_t ahead, float *x, float *id,
                                   uint32_t *over) {
    MOE__ALIGN64 float top[32 * 32], floor[32];
    size_t cols = 0;
    for (size_t r = 0; r < 32; r++) {
        const float *row = scores + r * n;
        moe__v even = moe__v_set1(-INFINITY), odd = even;
        for (size_t e = 0; e < n; e += 32) {
            even = moe__v_max(moe__v_load_n(row + e, n - e, -INFINITY), even);
            if (e + 16 < n) odd = moe__v_max(moe__v_load_n(row + e + 16, n - e - 16, -INFINITY), odd);
        }
        moe__v_store(top + r * 32, even);
        moe__v_store(top + r * 32 + 16, odd);
    }
    MOE__K(transpose)(top, 32, x);
    MOE__K(topk_floor)(k, x, floor);
    for (size_t i = 0; i < 32 * 32; i++) x[i] = -INFINITY;
    *over = 0;
    for (size_t r = 0; r < 32; r++) {
        const float *row = scores + r * n;
        moe__v least = moe__v_set1(floor[r]);
        size_t have = 0;
        for (size_t e = 0; e < n; e += 64) {
            uint64_t bits = 0;
            for (size_t b = 0; b < 64 && e + b < n; b += 16) {
                size_t left = n - e - b;
                uint32_t exist = 0xffffu;
                if (left < 16) exist = (1u << left) - 1;
                MOE__PREFETCH_L1(row + e + b + ahead);
                moe__m below = moe__v_lt(moe__v_load_n(row + e + b, left, -INFINITY), least);
                bits |= (uint64_t)(~moe__v_bits(below) & exist) << b;
            }
            for (; bits; bits &= bits - 1, have++) {
                size_t at = e + moe__kernel_first_bit(bits);
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
MOE__FN int MOE__K(topk_block)(size_t part, size_t n, size_t k, const float *scores, size_t ahead, int32_t *index) {
    MOE__ALIGN64 float x[32 * 32], id[32 * 32], edge[32 * 32], best[MOE__TOPK_K * 64], nan[32] = {0};
    size_t width = part * n, cols = n;
    uint32_t over = 0;
    if (n > 32) {
        cols = MOE__K(topk_filter)(n, k, scores, ahead, x, id, &over);
    } else {
        const float *whole = scores;
        if (width < 32) {
            for (size_t r = 0; r < 32; r++) memcpy(edge + r * 32, scores + r * width, width * sizeof(float));
            whole = edge;
        }
        MOE__K(transpose)(whole, 32, x);
        for (size_t i = 0; i < n * 32; i++) id[i] = moe__float_of((uint32_t)(i / 32));
    }
    for (size_t p = 0; p < part; p++) {
        MOE__K(topk_insert)(cols, k, x + p * n * 32, id, best, nan);
        for (size_t r = 0; r < 32; r++) {
            size_t row = r * part + p;
            if (nan[r] > 0.0f) return 0;
            if (over >> r & 1 || !(best[(k - 1) * 64 + r] > -INFINITY)) {
                if (!MOE__K(topk_row)(n, k, scores + row * n, index + row * k)) return 0;
            } else {
                for (size_t j = 0; j < k; j++) index[row * k + j] = (int32_t)moe__bits_of(best[j * 64 + 32 + r]);
            }
        }
    }
    return 1;
}

MOE__FN int MOE__K(topk)(size_t rows, size_t n, size_t k, const float *scores, int32_t *index, float *value) {
    for (size_t done; rows; rows -= done, scores += done * n, index += done * k) {
        size_t part = 1, ahead = 0;
        int together = MOE__PASS > 1 && rows >= 32 && k <= MOE__TOPK_K && n <= MOE__TOPK_N;
        if (n <= 16) part = moe__min(32 / n, rows / 32); /* short rows: so many in one of 32 lanes */
        if (rows >= 64) ahead = 32 * n;
        done = 1;
        if (together) {
            done = 32 * part;
            if (!MOE__K(topk_block)(part, n, k, scores, ahead, index)) return 0;
        } else if (!MOE__K(topk_row)(n, k, scores, index)) return 0;
        if (!value) continue;
        for (size_t i = 0; i < done; i++)
            for (size_t j = 0; j < k; j++) *value++ = scores[i * n + (size_t)index[i * k + j]];
    }
    return 1;
}

/* -- counting the k highest, without sorting anything -- */
/* 16 tokens, expert e in z[e * 32 + lane]. list: k + 1 vectors of scratch. Adds 1 to selected[e * 16 + lane] and
 * first[e * 16 + lane] where a lane has one k-th highest and one highest; the lanes where a tie decides come back as
 * bits, uncounted. */
MOE__FN uint32_t MOE__K(count)(size_t n, size_t k, const float *z, float *list, float *selected, float *first) {
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
    float lane[16];
    uint32_t bits = 0;
    moe__v_store(lane, tie);
    for (uint32_t i = 0; i < 16; i++) bits |= (uint32_t)(lane[i] > 0.0f) << i;
    return bits;
}

/* The same for k <= 8 and 32 tokens, by sorting networks: the experts come eight at a time, are sorted, and merged with
 * the eight highest so far. */
MOE__FI moe__f MOE__K(count8_column)(size_t n, size_t e, const float *z) {
    if (e < n) return MOE__F_LOAD(z + e * 32);
    return MOE__F_SET1(-INFINITY);
}
/* Of MOE__VL tokens the k-th highest, and the highest. */
MOE__FN void MOE__K(count8_highest)(size_t n, size_t k, const float *z, float *kth, float *top) {
    const moe__f none = MOE__F_SET1(-INFINITY);
    moe__f a0 = none, a1 = none, a2 = none, a3 = none, a4 = none, a5 = none, a6 = none, a7 = none; /* descending */
    float sorted[8 * MOE__VL];
    for (size_t e = 0; e < n; e += 8) {
        moe__f b0 = MOE__F_LOAD(z + e * 32), b1 = MOE__K(count8_column)(n, e + 1, z);
        moe__f b2 = MOE__K(count8_column)(n, e + 2, z), b3 = MOE__K(count8_column)(n, e + 3, z);
        moe__f b4 = MOE__K(count8_column)(n, e + 4, z), b5 = MOE__K(count8_column)(n, e + 5, z);
        moe__f b6 = MOE__K(count8_column)(n, e + 6, z), b7 = MOE__K(count8_column)(n, e + 7, z);
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
    MOE__F_STORE(kth, MOE__F_LOAD(sorted + (k - 1) * MOE__VL));
    MOE__F_STORE(top, a0);
}
/* Somewhere in MOE__VL tokens a tie may decide: found, and taken back. Bits of these lanes. */
MOE__FN uint32_t MOE__K(count8_ties)(size_t n, size_t k, const float *z, const float *kth, const float *top,
                                     float *selected, float *first) {
    const moe__f one = MOE__F_SET1(1.0f);
    moe__f in = MOE__F_SET1(0.0f), best = in;
    float seen[2 * MOE__VL];
    uint32_t bits = 0;
    for (size_t e = 0; e < n; e++) {
        moe__f x = MOE__F_LOAD(z + e * 32);
        in = MOE__F_ADD(in, MOE__F_GE(x, MOE__F_LOAD(kth), one));
        best = MOE__F_ADD(best, MOE__F_GE(x, MOE__F_LOAD(top), one));
    }
    MOE__F_STORE(seen, in);
    MOE__F_STORE(seen + MOE__VL, best);
    for (uint32_t l = 0; l < MOE__VL; l++) {
        if (!(seen[l] > (float)k || seen[MOE__VL + l] > 1.0f)) continue;
        bits |= 1u << l;
        for (size_t e = 0; e < n; e++) {
            selected[e * 16 + l] -= (float)!(z[e * 32 + l] < kth[l]);
            first[e * 16 + l] -= (float)!(z[e * 32 + l] < top[l]);
        }
    }
    return bits;
}
/* Bits of 32 lanes. */
MOE__FN uint32_t MOE__K(count8)(size_t n, size_t k, const float *z, float *selected, float *first) {
    const moe__f one = MOE__F_SET1(1.0f), zero = MOE__F_SET1(0.0f);
    moe__f all_in = zero, all_best = zero;
    float kth[32], top[32], seen[2 * MOE__VL], total = 0.0f, total_first = 0.0f;
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < 32; lane += MOE__VL)
        MOE__K(count8_highest)(n, k, z + lane, kth + lane, top + lane);
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
    for (uint32_t lane = 0; lane < 32; lane += MOE__VL)
        bits |= MOE__K(count8_ties)(n, k, z + lane, kth + lane, top + lane, selected, first) << lane;
    return bits;
}

/* -- numbers -- */
/* Are all numbers finite? 0 times anything else is NaN, and stays in the sum. */
MOE__FN int MOE__K(all_finite)(size_t n, const float *x) {
    moe__f sum0 = MOE__F_SET1(0.0f), sum1 = sum0, sum2 = sum0, sum3 = sum0, zero = sum0;
    float sum[MOE__VL], rest = 0.0f;
    size_t i = 0;
    for (; n - i >= 4 * MOE__VL; i += 4 * MOE__VL) {
        sum0 = MOE__F_FMA(MOE__F_LOAD(x + i), zero, sum0);
        sum1 = MOE__F_FMA(MOE__F_LOAD(x + i + MOE__VL), zero, sum1);
        sum2 = MOE__F_FMA(MOE__F_LOAD(x + i + 2 * MOE__VL), zero, sum2);
        sum3 = MOE__F_FMA(MOE__F_LOAD(x + i + 3 * MOE__VL), zero, sum3);
    }
    for (; i < n; i++) rest += x[i] * 0.0f; /* exact */
    MOE__F_STORE(sum, MOE__F_ADD(MOE__F_ADD(sum0, sum1), MOE__F_ADD(sum2, sum3)));
    for (i = 0; i < MOE__VL; i++) rest += sum[i];
    return rest == 0.0f;
}
/* 16 numbers of two bytes, little-endian, of any alignment: loops that compilers turn into vectors */
MOE__FI void MOE__K(half16)(const unsigned char *from, float *to) {
    uint32_t bits[16], special[16];
    float value[16];
    for (int l = 0; l < 16; l++) bits[l] = (uint32_t)from[2 * l] | (uint32_t)from[2 * l + 1] << 8;
    for (int l = 0; l < 16; l++) /* the sign; infinity and NaN have all bits of the exponent */
        special[l] = (bits[l] & 0x8000u) << 16 | ((bits[l] & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    for (int l = 0; l < 16; l++) bits[l] = (bits[l] & 0x7fffu) << 13;
    memcpy(value, bits, sizeof value);
    for (int l = 0; l < 16; l++) value[l] *= 5.192296858534828e33f; /* 2^112: exact, subnormals too */
    memcpy(bits, value, sizeof bits);
    for (int l = 0; l < 16; l++) bits[l] |= special[l];
    memcpy(to, bits, sizeof bits);
}
MOE__FI void MOE__K(bfloat16)(const unsigned char *from, float *to) {
    uint32_t bits[16];
    for (int l = 0; l < 16; l++) bits[l] = (uint32_t)from[2 * l] << 16 | (uint32_t)from[2 * l + 1] << 24;
    memcpy(to, bits, sizeof bits);
}
MOE__WIDEN(half)
MOE__WIDEN(bfloat)
/* sum[c] += row r of x, one row after the other */
MOE__FN void MOE__K(sum_rows)(size_t rows, size_t cols, const float *x, double *sum) {
    for (size_t c = 0; c < cols; c += 16) {
        if (cols - c < 16) {
            for (size_t r = 0; r < rows; r++)
                for (size_t l = c; l < cols; l++) sum[l] += (double)x[r * cols + l];
            return;
        }
        double column[16];
        memcpy(column, sum + c, sizeof column);
        for (size_t r = 0; r < rows; r++)
            for (size_t i = 0; i < 16; i++) column[i] += (double)x[r * cols + c + i];
        memcpy(sum + c, column, sizeof column);
    }
}

#define MOE__X(result, name, parameters) , MOE__K(name)
static const moe__kernels MOE__S(moe__kernels_) = {
    (moe_isa_kind)MOE__PASS, MOE__MR, MOE__NT * MOE__VL, {0 MOE__SIZES(MOE__NN_ENTRY)}, {0 MOE__SIZES(MOE__TN_ENTRY)},
    MOE__ACT_BOTH(forward), MOE__ACT_BOTH(backward) MOE__KERNEL_LIST(MOE__X)};

#undef MOE__X
#undef MOE__FN
#undef MOE__FI
#undef MOE__SUFFIX
#undef MOE__VL
#undef MOE__NT
#undef MOE__MR
#undef MOE__EACH_V
#undef MOE__EACH_T
#undef MOE__FMASK
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
#undef MOE__F_UNORD
#undef MOE__F_SEL
#undef MOE__F_BITS
#undef MOE__F_AND
#undef MOE__F_XOR
#undef MOE__F_OR
#undef MOE__F_POW2
#undef MOE__F_EXPONENT
#undef MOE__F_QUADS
#undef MOE__F_LOW
#undef MOE__F_HIGH
#undef MOE__F_PAIRS
#endif /* MOE__PASS */

#ifndef MOE__PASS
#ifndef MOE__IMPLEMENTED_2
#define MOE__IMPLEMENTED_2

/* ==== >>dispatch ==============================================================================
 * Which table of kernels is used: the best one that processor and operating system support, or the one that was asked
 * for. After this room moe__dispatched() gives it; this choice is the library's only global state. Also the elementary
 * functions on arrays, which are one kernel each. May use: ground, kernels. */
#if defined(__GNUC__)
#define MOE__ATOMIC_LOAD(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#define MOE__ATOMIC_STORE(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELEASE)
#else
#define MOE__ATOMIC_LOAD(p) (p)
#define MOE__ATOMIC_STORE(p, v) ((p) = (v))
#endif

static const moe__kernels *moe__dispatch_active; /* the only global state */

#ifdef MOE__X86
static void moe__dispatch_cpuid(uint32_t leaf, uint32_t reg[4]) { /* a, b, c, d */
#if defined(__GNUC__)
    __asm__ volatile("cpuid" : "=a"(reg[0]), "=b"(reg[1]), "=c"(reg[2]), "=d"(reg[3]) : "a"(leaf), "c"(0));
#else
    int info[4];
    __cpuidex(info, (int)leaf, 0);
    for (int i = 0; i < 4; i++) reg[i] = (uint32_t)info[i];
#endif
}
/* What the processor has and the operating system saves (XGETBV). */
static moe_isa_kind moe__dispatch_x86(void) {
    uint32_t reg[4], saved;
    moe__dispatch_cpuid(0, reg);
    if (reg[0] < 7) return MOE_ISA_SCALAR;
    moe__dispatch_cpuid(1, reg);
    const uint32_t needed = 1u << 12 | 1u << 27 | 1u << 28; /* FMA, OSXSAVE, AVX */
    if ((reg[2] & needed) != needed) return MOE_ISA_SCALAR;
#if defined(__GNUC__)
    uint32_t high;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
#else
    saved = (uint32_t)_xgetbv(0);
#endif
    moe__dispatch_cpuid(7, reg);
    const uint32_t avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    if ((saved & 0x6) != 0x6 || !(reg[1] & avx2)) return MOE_ISA_SCALAR;
    if ((saved & 0xe6) != 0xe6 || (reg[1] & avx512) != avx512) return MOE_ISA_AVX2;
    return MOE_ISA_AVX512;
}
#endif

/* NULL: not on this machine. */
static const moe__kernels *moe__dispatch_kernels(moe_isa_kind isa) {
#ifdef MOE__X86
    moe_isa_kind best = moe__dispatch_x86();
    if (isa == MOE_ISA_AUTO) isa = best;
    if (isa == MOE_ISA_AVX512 && best == MOE_ISA_AVX512) return &moe__kernels_avx512;
    if (isa == MOE_ISA_AVX2 && best != MOE_ISA_SCALAR) return &moe__kernels_avx2;
#endif
#ifdef MOE__NEON
    if (isa == MOE_ISA_AUTO || isa == MOE_ISA_NEON) return &moe__kernels_neon;
#endif
    if (isa == MOE_ISA_AUTO || isa == MOE_ISA_SCALAR) return &moe__kernels_scalar;
    return NULL;
}

static const moe__kernels *moe__dispatched(void) {
    const moe__kernels *kernels = MOE__ATOMIC_LOAD(moe__dispatch_active);
    if (!kernels) {
        kernels = moe__dispatch_kernels(MOE_ISA_AUTO);
        MOE__ATOMIC_STORE(moe__dispatch_active, kernels);
    }
    return kernels;
}

MOE_API moe_status moe_force_isa(moe_isa_kind isa) {
    const moe__kernels *kernels = moe__dispatch_kernels(isa);
    if (!kernels) return MOE_E_ISA;
    MOE__ATOMIC_STORE(moe__dispatch_active, kernels);
    return MOE_OK;
}
MOE_API moe_isa_kind moe_active_isa(void) { return moe__dispatched()->isa; }
MOE_API const char *moe_isa_name(moe_isa_kind isa) {
    static const char *const names[] = {"auto", "scalar", "avx2", "avx512", "neon"};
    return (unsigned)isa < MOE_ISA_COUNT ? names[isa] : NULL;
}

#define MOE__MAP_API(name)                                              \
    MOE_API moe_status moe_##name(size_t n, const float *x, float *y) { \
        if (!n) return MOE_OK;                                          \
        if (!x) return MOE_E_NULL_X;                                    \
        if (!y) return MOE_E_NULL_Y;                                    \
        moe__dispatched()->name(n, x, y);                               \
        return MOE_OK;                                                  \
    }
MOE__MAP_API(exp)
MOE__MAP_API(log)
MOE__MAP_API(tanh)
MOE__MAP_API(erf)
#undef MOE__MAP_API

/* ==== >>threads ===============================================================================
 * Tasks are numbered and may run in any order on any thread: no result depends on which. The caller's parallel-for is
 * asked first, else OpenMP when compiled with it, else the tasks run here one after another. */
MOE_API const char *moe_thread_backend(void) {
#ifdef MOE__OPENMP
    return "openmp";
#else
    return "serial";
#endif
}

MOE_API size_t moe_workers(const moe_parallel *parallel) {
#ifdef MOE__OPENMP
    if (!parallel || (!parallel->run && !parallel->n_threads)) return (size_t)omp_get_max_threads();
#endif
    if (!parallel || !parallel->n_threads) return 1;
    return parallel->n_threads;
}

MOE_API void moe_run(const moe_parallel *parallel, size_t n_tasks, moe_task *task, void *arg) {
    size_t workers = moe__min(moe_workers(parallel), n_tasks);
    if (parallel && parallel->run && workers > 1) {
        parallel->run(parallel->user, workers, n_tasks, task, arg);
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

/* The same where the work is known, `each` multiply-adds for each of `rows`: below some 20 microseconds OpenMP's
 * threads cost more than they save. */
#define MOE__LITTLE_WORK ((size_t)1 << 18)
static void moe__threads_run(const moe_parallel *parallel, size_t rows, size_t each, size_t n_tasks, moe_task *task,
                             void *arg) {
    static const moe_parallel serial = {NULL, NULL, 1};
    if ((parallel && parallel->run) || (rows && each > MOE__LITTLE_WORK / rows)) moe_run(parallel, n_tasks, task, arg);
    else moe_run(&serial, n_tasks, task, arg);
}

/* ==== >>formats ===============================================================================
 * The formats in which a matrix of weights can lie in memory. After this room a product knows only "these rows of that
 * panel, as floats". A matrix of k rows and n columns is cut into panels of 32 columns (MOE__W), the last one filled up
 * with zeros; a panel's rows follow each other, row_bytes apart, and panels are `stride` bytes apart:
 *
 *           columns 0 .. 31      32 .. 63      64 .. n, 0, 0
 *     row 0 +--------------+  +-----------+  +--------------+        memory: panel 0, row 0 | row 1 | ... | row k - 1
 *     row 1 |   panel 0    |  |  panel 1  |  |   panel 2    |                panel 1, row 0 | row 1 | ...
 *       ... |              |  |           |  |              |
 * row k - 1 +--------------+  +-----------+  +--------------+
 *
 * A format of its own is three things: a name in moe__format_kind, its row in moe__format_table, and beside them its
 * kernel, `fetch`, with `pack`, which is fetch the other way round. */
typedef struct moe__format {
    const char *name;
    size_t row_bytes; /* of a panel's row: 32 weights, and whatever scale the format keeps with them */
    /* `cols` <= 32 columns of row-major floats -> rows of a panel, missing columns 0; scale: the panel's, or NULL */
    void (*pack)(const float *src, size_t ld, size_t rows, size_t cols, void *panel, float *scale);
    /* rows of a panel -> 32 floats each, aligned to 64 bytes; NULL: the rows are floats and are read where they lie */
    void (*fetch)(const moe__kernels *kernels, const void *panel, const float *scale, size_t rows, float *dst);
} moe__format;

static void moe__format_f32_pack(const float *src, size_t ld, size_t rows, size_t cols, void *panel, float *scale) {
    float *dst = (float *)panel;
    (void)scale;
    if (cols == MOE__W) { /* copies of a size that the compiler knows */
        for (size_t r = 0; r < rows; r++) memcpy(dst + r * MOE__W, src + r * ld, MOE__W * sizeof(float));
        return;
    }
    for (size_t r = 0; r < rows; r++, dst += MOE__W) {
        memcpy(dst, src + r * ld, cols * sizeof(float));
        memset(dst + cols, 0, (MOE__W - cols) * sizeof(float));
    }
}

typedef enum moe__format_kind {
    MOE__FORMAT_F32,
    MOE__FORMAT_COUNT
} moe__format_kind;
static const moe__format moe__format_table[MOE__FORMAT_COUNT] = {
    {"f32", MOE__W * sizeof(float), moe__format_f32_pack, NULL},
};

/* Where a matrix of weights lies, and in which format. */
typedef struct moe__weights {
    const void *data; /* row 0 of panel 0 */
    const moe__format *format;
    const float *scale; /* 32 floats a panel, one for each column; NULL where the format has none of them */
    size_t stride;      /* bytes from one panel to the next */
} moe__weights;

/* Float panels of `rows` rows each, panel after panel. */
static moe__weights moe__format_f32(const float *data, size_t rows) {
    moe__weights weights = {data, &moe__format_table[MOE__FORMAT_F32], NULL, rows * MOE__W * sizeof(float)};
    return weights;
}
MOE__INLINE const void *moe__format_at(const moe__weights *weights, size_t panel, size_t row) {
    return (const unsigned char *)weights->data + panel * weights->stride + row * weights->format->row_bytes;
}
/* The same matrix from a panel on. */
MOE__INLINE moe__weights moe__format_from(moe__weights weights, size_t panel) {
    weights.data = moe__format_at(&weights, panel, 0);
    if (weights.scale) weights.scale += panel * MOE__W;
    return weights;
}
/* Rows of a panel as floats, 32 apart: where they lie, or fetched into the buffer. */
MOE__INLINE const float *moe__format_rows(const moe__kernels *kernels, const moe__weights *weights, size_t panel,
                                          size_t row, size_t rows, float *buffer) {
    const void *at = moe__format_at(weights, panel, row);
    const float *scale = weights->scale;
    if (!weights->format->fetch) return (const float *)at;
    if (scale) scale += panel * MOE__W;
    weights->format->fetch(kernels, at, scale, rows, buffer);
    return buffer;
}

/* ==== >>products ==============================================================================
 * Matrix products over panels, and moe_gemm. A product c (rows, n) = a (rows, k) b (k, n) has its operands in panels of
 * 32 columns and is cut so that what is read again is near:
 *
 *      a, k from left to right                      b, a panel from top to bottom
 *     +----+----+-- ... --+                        +----+
 *     |    |    |         | <- a tile's rows,      |####|  MOE__KC = 128 rows, 16 KB: stay in L1 while all rows of a
 *     |    |    |         |    at most mr (14)     |####|  pass over them (moe__product_sweep)
 *     |    |    |         |                        |    |
 *     +----+----+-- ... --+                        +----+
 *     <---- MOE__KG = 1024: stay in L2 while all panels of b pass ---->
 *
 * A tile of c is kept in registers over 128 k and goes back to memory between them. So each element of c is one chain
 * of fused multiply-adds in increasing k, whatever the tiles: the bits depend on nothing else. b may be in any weight
 * format: the 128 rows of another format than float are fetched into a buffer, which takes their place in L1. */
static const float moe__product_zeros[MOE__W] = {0};

/* Where a product goes: `cols` columns from c on, panel apart for every 32 (MOE__W in a row-major array), each
 * starting with the init of its column, init_panel apart likewise (0: the same for all), or with what is there. */
typedef struct moe__product_target {
    float *c; size_t ldc, panel, cols;
    const float *init; size_t init_panel;
} moe__product_target;

/* One tile, `width` columns wide, of which `left` exist at c: where that is fewer, whole rows go through a buffer. Only
 * plain arrays have such tiles: panels are always whole. */
MOE__INLINE void moe__product_tile(void (*kernel)(const moe__tile *), size_t width, moe__tile *tile, size_t rows,
                                   float *c, size_t ldc, size_t left) {
    float edge[MOE__MAX_MR * MOE__W];
    tile->c = c;
    tile->ldc = ldc;
    if (left >= width) {
        kernel(tile);
        return;
    }
    if (!tile->init) {
        memset(edge, 0, rows * width * sizeof(float));
        for (size_t r = 0; r < rows; r++) memcpy(edge + r * width, c + r * ldc, left * sizeof(float));
    }
    tile->c = edge;
    tile->ldc = width;
    kernel(tile);
    for (size_t r = 0; r < rows; r++) memcpy(c + r * ldc, edge + r * width, left * sizeof(float));
}

/* One chunk of k for one panel of the target: b's k rows stay in L1 while the rows of a pass. next: what will be
 * read of b after this chunk, or NULL. */
static void moe__product_sweep(const moe__kernels *kernels, size_t rows, size_t k, const float *a, size_t a_panel,
                               const float *b, const moe__product_target *to, size_t panel, int fresh,
                               const float *next) {
    size_t tiles = moe__ceil_div(rows, kernels->mr), base = rows / tiles, more = rows % tiles;
    size_t cols = moe__min(MOE__W, to->cols - panel * MOE__W), lines = 0;
    float *c = to->c + panel * to->panel;
    /* next is 4 KB for every 32 k: each tile its share */
    if (next) lines = moe__ceil_div(16, tiles * moe__ceil_div(cols, kernels->tile));
    moe__tile tile = {k, a, a_panel, b, MOE__W, NULL, 0, NULL, next, lines};
    for (size_t col = 0; col < cols; col += kernels->tile) {
        size_t row = 0;
        tile.b = b + col;
        if (fresh) tile.init = to->init + panel * to->init_panel + col;
        for (size_t i = 0; i < tiles; i++) {
            size_t height = base + (i < more);
            MOE_ASSERT(height && height <= kernels->mr);
            tile.a = a + row * MOE__W;
            moe__product_tile(kernels->nn[height], kernels->tile, &tile, height, c + row * to->ldc + col, to->ldc,
                              cols - col);
            if (next) tile.prefetch += lines * (k / 32) * 64;
            row += height;
        }
    }
}

/* What is read after the chunk that ends before `row` of a panel, of rows [group, end); only floats are read ahead. */
static const float *moe__product_next(const moe__weights *weights, size_t k, size_t group, size_t end, size_t row,
                                      size_t panel, size_t panels, const void *after) {
    const void *next = after;
    if (weights->format->fetch) return NULL;
    if (row < end) next = moe__format_at(weights, panel, row);
    else if (panel + 1 < panels) next = moe__format_at(weights, panel + 1, group);
    else if (end < k) next = moe__format_at(weights, 0, end);
    return (const float *)next;
}

/* c (rows, cols) = or += a (rows, k) b (k, cols); after: read next, or NULL */
static void moe__product_weights(const moe__kernels *kernels, size_t rows, size_t k, const float *a, size_t a_panel,
                                 const moe__weights *b, const moe__product_target *to, int fresh, const void *after) {
    MOE__ALIGN64 float buffer[MOE__KC * MOE__W];
    size_t panels = moe__ceil_div(to->cols, MOE__W);
    for (size_t group = 0; group < k; group += MOE__KG) {
        size_t end = moe__min(k, group + MOE__KG);
        for (size_t panel = 0; panel < panels; panel++)
            for (size_t row = group; row < end; row += MOE__KC) {
                size_t count = moe__min(MOE__KC, end - row);
                const float *chunk = moe__format_rows(kernels, b, panel, row, count, buffer);
                const float *next = moe__product_next(b, k, group, end, row + count, panel, panels, after);
                moe__product_sweep(kernels, rows, count, a + row / MOE__W * a_panel, a_panel, chunk, to, panel,
                                   fresh && !row, next);
            }
    }
}
/* The same of float panels, k * 32 apart. */
static void moe__product(const moe__kernels *kernels, size_t rows, size_t k, const float *a, size_t a_panel,
                         const float *b, const moe__product_target *to, int fresh, const float *after) {
    moe__weights weights = moe__format_f32(b, k);
    moe__product_weights(kernels, rows, k, a, a_panel, &weights, to, fresh, after);
}

/* 32 rows x 32 columns at src, of which `rows` and `cols` exist, transposed into dst; the rest is zero */
static void moe__product_transpose_block(const moe__kernels *kernels, const float *src, size_t ld, size_t rows,
                                         size_t cols, float *dst) {
    if (rows >= MOE__W && cols >= MOE__W) {
        kernels->transpose(src, ld, dst);
        return;
    }
    memset(dst, 0, MOE__W * MOE__W * sizeof(float));
    for (size_t r = 0; r < moe__min(rows, MOE__W); r++)
        for (size_t c = 0; c < moe__min(cols, MOE__W); c++) dst[c * MOE__W + r] = src[r * ld + c];
}

/* c (rows, cols) = a (rows, n) w^T, or += where to->init is NULL: w (k, n) in panels; c's columns: rows k0 .. of w */
static void moe__product_weights_t(const moe__kernels *kernels, size_t rows, size_t n, const float *a, size_t a_panel,
                                   const moe__weights *w, size_t k, size_t k0, const moe__product_target *to) {
    MOE__ALIGN64 float chunk[MOE__KC * MOE__W], buffer[MOE__W * MOE__W];
    size_t stride = w->stride;
    int direct = !w->format->fetch;
    for (size_t group = 0; group < n; group += MOE__KG)
        for (size_t panel = 0; panel * MOE__W < to->cols; panel++)
            for (size_t col = group; col < moe__min(n, group + MOE__KG); col += MOE__KC) {
                size_t count = moe__min(MOE__KC, n - col), row = k0 + panel * MOE__W, exist = k - row;
                const unsigned char *at = (const unsigned char *)moe__format_at(w, col / MOE__W, row);
                for (size_t i = 0; i < count; i += MOE__W, at += stride) {
                    const float *block = (const float *)(const void *)at;
                    if (!direct)
                        block = moe__format_rows(kernels, w, (col + i) / MOE__W, row, moe__min(MOE__W, exist), buffer);
                    moe__product_transpose_block(kernels, block, MOE__W, exist, MOE__W, chunk + i * MOE__W);
                }
                moe__product_sweep(kernels, rows, count, a + col / MOE__W * a_panel, a_panel, chunk, to, panel,
                                   !col && to->init, NULL);
            }
}
static void moe__product_t(const moe__kernels *kernels, size_t rows, size_t n, const float *a, size_t a_panel,
                           const float *w, size_t k, size_t k0, const moe__product_target *to) {
    moe__weights weights = moe__format_f32(w, k);
    moe__product_weights_t(kernels, rows, n, a, a_panel, &weights, k, k0, to);
}

/* c (m, n) = or += a^T b, summed over `rows`; a: one panel (rows, 32), m columns of it are used; b: (rows, n <= 32) */
static void moe__product_outer(const moe__kernels *kernels, size_t rows, size_t m, const float *a, const float *b,
                               size_t ldb, float *c, size_t ldc, size_t n, int fresh) {
    size_t step = moe__ceil_div(m, moe__ceil_div(m, kernels->mr)); /* even tiles: 11, 11, 10 rows, not 14, 14, 4 */
    moe__tile tile = {rows, NULL, 0, NULL, ldb, NULL, 0, NULL, NULL, 0};
    if (fresh) tile.init = moe__product_zeros;
    for (size_t r = 0; r < m; r += step) {
        size_t height = moe__min(step, m - r);
        tile.a = a + r;
        for (size_t col = 0; col < n; col += kernels->tile) {
            tile.b = b + col;
            moe__product_tile(kernels->tn[height], kernels->tile, &tile, height, c + r * ldc + col, ldc, n - col);
        }
    }
}

/* Rows [row, row + rows), columns [col, col + cols) of a row-major matrix into part of a panel, missing columns 0. */
static void moe__product_fill(const float *src, size_t ld, size_t row, size_t rows, size_t col, size_t cols,
                              float *dst) {
    moe__format_f32_pack(src + row * ld + col, ld, rows, cols, dst, NULL);
}
/* The same of the transpose: element (r, c) of the panel is src[(col + c) * ld + row + r]. */
static void moe__product_fill_t(const moe__kernels *kernels, const float *src, size_t ld, size_t row, size_t rows,
                                size_t col, size_t cols, float *dst) {
    MOE__ALIGN64 float block[MOE__W * MOE__W];
    for (size_t r = 0; r < rows; r += MOE__W) {
        size_t exist = moe__min(MOE__W, rows - r);
        moe__product_transpose_block(kernels, src + col * ld + row + r, ld, cols, exist, block);
        memcpy(dst + r * MOE__W, block, exist * MOE__W * sizeof(float));
    }
}

/* -- moe_gemm -- c is cut into blocks of rows by groups of panels, one task each. Plain: b is packed whole at first, by
 * its own tasks, and a task packs its rows of a. ta: c is a sum over many rows, packed MOE__KC at a time. */
typedef struct moe__product_gemm {
    moe_gemm_args args; /* with the leading dimensions that it leaves open */
    const moe__kernels *kernels;
    size_t block_rows, blocks, group_panels, groups;
    float *b_panels;              /* plain: all of b, packed; nothing for ta */
    float *a_scratch, *b_scratch; /* a worker's share */
    size_t a_share, b_share;
} moe__product_gemm;

static void moe__product_gemm_ld(size_t *ld, size_t row) {
    if (!*ld) *ld = row;
}

static moe_status moe__product_gemm_plan(moe__product_gemm *plan, const moe_gemm_args *given, moe__arena *arena) {
    if (!given) return MOE_E_NULL_PARAMS;
    memset(plan, 0, sizeof *plan);
    plan->args = *given;
    moe_gemm_args *args = &plan->args;
    size_t a_row = args->k, a_rows = args->m, b_row = args->n, b_rows = args->k, total;
    if (args->ta) a_row = args->m, a_rows = args->k;
    if (args->tb) b_row = args->k, b_rows = args->n;
    moe__product_gemm_ld(&args->lda, a_row);
    moe__product_gemm_ld(&args->ldb, b_row);
    moe__product_gemm_ld(&args->ldc, args->n);
    if ((!args->a_fill && args->lda < a_row) || args->ldb < b_row || args->ldc < args->n) return MOE_E_LD;
    if (!moe__mul(args->lda, a_rows, &total) || !moe__mul(args->ldb, b_rows, &total) ||
        !moe__mul(args->ldc, args->m, &total) || !moe__mul(total, sizeof(float), &total))
        return MOE_E_OVERFLOW;
    plan->kernels = moe__dispatched();
    size_t panels = moe__ceil_div(args->n, MOE__W), workers = moe_workers(args->parallel), want = workers * 4;
    if (args->ta) { /* a task: 4 panels of a by a group of panels of b */
        plan->block_rows = moe__max(1, moe__min(4, moe__ceil_div(args->m, MOE__W) / workers)) * MOE__W;
        plan->blocks = moe__ceil_div(args->m, plan->block_rows);
        plan->group_panels = moe__max(1, moe__min(8, panels * plan->blocks / want));
        plan->a_share = plan->block_rows * MOE__KC;
        plan->b_share = plan->group_panels * MOE__W * MOE__KC;
    } else {
        size_t half_megabyte = ((size_t)128 << 10) / moe__max(1, args->k); /* rows of a */
        plan->block_rows = moe__min(moe__max(32, moe__min(MOE__MB, half_megabyte)), moe__max(args->m, 1));
        plan->blocks = moe__ceil_div(args->m, plan->block_rows);
        plan->group_panels = moe__max(1, panels);
        if (plan->blocks < want) plan->group_panels = moe__max(1, moe__ceil_div(panels * plan->blocks, want));
        if (!moe__mul(plan->block_rows, moe__ceil_div(args->k, MOE__W) * MOE__W, &plan->a_share)) return MOE_E_OVERFLOW;
        if (!moe__mul(panels * MOE__W, args->k, &total)) return MOE_E_OVERFLOW;
        plan->b_panels = (float *)moe__take(arena, total, sizeof(float));
    }
    plan->groups = moe__ceil_div(panels, plan->group_panels);
    plan->a_scratch = moe__take_floats(arena, workers, plan->a_share);
    plan->b_scratch = moe__take_floats(arena, workers, plan->b_share);
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

static void moe__product_gemm_fill_a(const moe_gemm_args *args, size_t row, size_t rows, size_t col, size_t cols,
                                     float *dst) {
    if (args->a_fill) args->a_fill(args->a_user, row, rows, col, cols, dst);
    else moe__product_fill(args->a, args->lda, row, rows, col, cols, dst);
}
static void moe__product_gemm_fill_b(const moe__product_gemm *plan, size_t row, size_t rows, size_t col, size_t cols,
                                     float *dst) {
    const moe_gemm_args *args = &plan->args;
    if (args->tb) moe__product_fill_t(plan->kernels, args->b, args->ldb, row, rows, col, cols, dst);
    else moe__product_fill(args->b, args->ldb, row, rows, col, cols, dst);
}

static void moe__product_gemm_pack_b(void *arg, size_t i, size_t worker) {
    const moe__product_gemm *plan = (const moe__product_gemm *)arg;
    size_t col = i * MOE__W;
    (void)worker;
    moe__product_gemm_fill_b(plan, 0, plan->args.k, col, moe__min(MOE__W, plan->args.n - col),
                             plan->b_panels + col * plan->args.k);
}

/* A task's part of c, and the worker's scratch. */
typedef struct moe__product_share { size_t row, rows, begin, end; float *a, *b; } moe__product_share;
static moe__product_share moe__product_gemm_share(const moe__product_gemm *plan, size_t i, size_t worker) {
    moe__product_share share;
    share.row = i / plan->groups * plan->block_rows;
    share.rows = moe__min(plan->block_rows, plan->args.m - share.row);
    share.begin = i % plan->groups * plan->group_panels * MOE__W;
    share.end = moe__min(plan->args.n, share.begin + plan->group_panels * MOE__W);
    share.a = plan->a_scratch + worker * plan->a_share;
    share.b = plan->b_scratch + worker * plan->b_share;
    return share;
}

static void moe__product_gemm_task(void *arg, size_t i, size_t worker) {
    const moe__product_gemm *plan = (const moe__product_gemm *)arg;
    const moe_gemm_args *args = &plan->args;
    moe__product_share share = moe__product_gemm_share(plan, i, worker);
    size_t step = 8; /* plain rows are read in order, 8 at a time */
    if (args->a_fill) step = share.rows;
    for (size_t r = 0; r < share.rows; r += step)
        for (size_t k = 0; k < args->k; k += MOE__W)
            moe__product_gemm_fill_a(args, share.row + r, moe__min(step, share.rows - r), k,
                                     moe__min(MOE__W, args->k - k), share.a + k * share.rows + r * MOE__W);
    moe__product_target to = {args->c + share.row * args->ldc + share.begin, args->ldc, MOE__W, share.end - share.begin,
                              moe__product_zeros, 0};
    moe__product(plan->kernels, share.rows, args->k, share.a, share.rows * MOE__W,
                 plan->b_panels + share.begin * args->k, &to, !args->accumulate, NULL);
}

static void moe__product_gemm_task_ta(void *arg, size_t i, size_t worker) {
    const moe__product_gemm *plan = (const moe__product_gemm *)arg;
    const moe_gemm_args *args = &plan->args;
    moe__product_share share = moe__product_gemm_share(plan, i, worker);
    /* b's rows as they are, unless they alias in L1 */
    int direct = !args->tb && args->n % MOE__W == 0 && args->ldb % 1024 != 0;
    for (size_t k = 0; k < args->k; k += MOE__KC) {
        size_t count = moe__min(MOE__KC, args->k - k);
        for (size_t m = 0; m < share.rows; m += MOE__W)
            moe__product_gemm_fill_a(args, k, count, share.row + m, moe__min(MOE__W, share.rows - m),
                                     share.a + m * MOE__KC);
        for (size_t col = share.begin; col < share.end; col += MOE__W) {
            size_t cols = moe__min(MOE__W, args->n - col), ldb = MOE__W;
            float *packed = share.b + (col - share.begin) * MOE__KC;
            const float *b = packed;
            if (direct) b = args->b + k * args->ldb + col, ldb = args->ldb;
            else moe__product_gemm_fill_b(plan, k, count, col, cols, packed);
            float *c = args->c + share.row * args->ldc + col;
            for (size_t m = 0; m < share.rows; m += MOE__W)
                moe__product_outer(plan->kernels, count, moe__min(MOE__W, share.rows - m), share.a + m * MOE__KC, b,
                                   ldb, c + m * args->ldc, args->ldc, cols, !k && !args->accumulate);
        }
    }
}

MOE_API moe_status moe_gemm_scratch(const moe_gemm_args *args, size_t *bytes) {
    moe__product_gemm plan;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__product_gemm_plan(&plan, args, &arena);
    return status ? status : moe__arena_bytes(&arena, bytes);
}

#ifdef MOE_USE_CBLAS
static int moe__product_gemm_cblas(const moe_gemm_args *args) { /* 0: not a product for CBLAS */
    size_t longest = moe__max(args->lda, moe__max(args->ldb, args->ldc));
    if (args->a_fill || moe__max(moe__max(args->m, args->n), moe__max(args->k, longest)) > MOE__MAX_INDEX) return 0;
    cblas_sgemm(CblasRowMajor, args->ta ? CblasTrans : CblasNoTrans,
                args->tb ? CblasTrans : CblasNoTrans, (int)args->m, (int)args->n, (int)args->k, 1.0f,
                args->a, (int)args->lda, args->b, (int)args->ldb, (float)(args->accumulate != 0), args->c,
                (int)args->ldc);
    return 1;
}
#endif

MOE_API moe_status moe_gemm(const moe_gemm_args *args) {
    moe__product_gemm plan;
    moe__arena arena = {NULL, 0, 0};
    size_t bytes;
    moe_status status = moe__product_gemm_plan(&plan, args, &arena);
    if (!status) status = moe__arena_bytes(&arena, &bytes);
    if (status) return status;
    if (!args->m || !args->n) return MOE_OK;
    if (args->k && !args->a && !args->a_fill) return MOE_E_NULL_A;
    if (args->k && !args->b) return MOE_E_NULL_B;
    if (!args->c) return MOE_E_NULL_C;
    if (!args->k) {
        if (args->accumulate) return MOE_OK;
        for (size_t r = 0; r < args->m; r++) memset(args->c + r * plan.args.ldc, 0, args->n * sizeof(float));
        return MOE_OK;
    }
#ifdef MOE_USE_CBLAS
    if (moe__product_gemm_cblas(&plan.args)) return MOE_OK;
#endif
    void *own = NULL, *memory = args->scratch;
    size_t given = args->scratch_bytes;
    if (!memory) {
        memory = own = moe__alloc(args->alloc_context, bytes);
        given = bytes;
        if (!own) return MOE_E_NO_MEMORY;
    }
    status = moe__arena_over(&arena, memory, given, bytes);
    if (!status) status = moe__product_gemm_plan(&plan, args, &arena);
    if (!status && args->ta) moe_run(args->parallel, plan.blocks * plan.groups, moe__product_gemm_task_ta, &plan);
    if (!status && !args->ta) {
        moe_run(args->parallel, moe__ceil_div(args->n, MOE__W), moe__product_gemm_pack_b, &plan);
        moe_run(args->parallel, plan.blocks * plan.groups, moe__product_gemm_task, &plan);
    }
    moe__free(args->alloc_context, own);
    return status;
}

/* ==== >>plan ==================================================================================
 * A plan is a resolved desc and every extent that follows from it. It is made once, by moe__desc_plan; a layer and a
 * tape own one each. After this room each tensor of a layer is known: its name and axes, how it begins, whether weight
 * decay takes it, and where its elements stand. Uses numbers and random.
 *
 * A layer's parameters are one block of floats. An expert's matrices stand in panels of MOE__W columns, as the products
 * read them, padded with zeros; w1 and wu share panels, 16 columns of each in turn. The other tensors are plain arrays:
 *
 *     0                             special                    experts                               the end
 *     | expert 0 | 1 | ... | G - 1  | constant gates | vectors | the router's, those that are there  |
 *       w1, wu | b1, bu | w2 | b2
 *       0        b1       w2   b2   expert: where they begin in an expert's block, and its length */
#define MOE__MAX_EXPERTS ((size_t)1 << 20)

/* THE TENSOR TABLE: one row is all that knows a tensor of a layer; names, get and set, initial values, weight decay,
 * files and counts follow from it.
 *   axes    letters of moe__plan_extent; G first: spread over the experts' blocks
 *   decay   takes weight decay
 *   start   initial values, and the axis that they depend on (moe__plan_bound). Learned thresholds, biases, noise, the
 *           branch's and constant gates begin at 0 [C]; codes in +-1/n_codes [C]
 *   stream  of its initial values; a number that is never given again, so that no tensor changes another's
 *   format  of its elements
 *   there   when a layer has it; moe__desc_tensors says so, and knows desc, plan, and the score's latent row
 * X(id, name, axes, decay, start, axis, stream, format, there) */
#define MOE__ROUTER_TENSORS(X)                                                                                         \
    X(R_ROUTER, "router", "LN", 1, COLUMNS, 'L', 0, F32, moe__score_is_latent(desc->score))                            \
    X(R_BIAS, "router.bias", "N", 0, ZERO, 'L', 1, F32, desc->router_bias == MOE_ON)                                   \
    X(R_PROJ, "router.proj", "dL", 1, UNIFORM, 'd', 2, F32, latent->proj)                                              \
    X(R_PROJ_BIAS, "router.proj_bias", "L", 0, ZERO, 'd', 3, F32, latent->proj_bias)                                   \
    X(R_NOISE, "router.noise", "dE", 1, ZERO, 'd', 4, F32, desc->noise == MOE_NOISE_LEARNED)                           \
    X(R_THRESHOLD, "router.threshold", "E", 0, ZERO, 'd', 5, F32, desc->gate == MOE_GATE_SIGN)                         \
    X(R_SCALE, "router.log_scale", "1", 0, LOG_SCALE, '1', 6, F32, desc->learn_temperature == MOE_ON)                  \
    X(R_RESIDUAL, "router.residual", "EE", 1, UNIFORM, 'E', 7, F32, desc->residual == MOE_ON)                          \
    X(R_CODEBOOK, "router.codebook", "cd", 0, SHARE, 'c', 8, F32, desc->n_codes)                                       \
    X(R_BRANCH, "router.branch", "d2", 1, ZERO, 'd', 9, F32, desc->n_codes)
#define MOE__EXPERT_TENSORS(X)                                                                                         \
    X(T_W1, "experts.w1", "Gdf", 1, UNIFORM, 'd', 1, F32, 1)                                                           \
    X(T_WU, "experts.wu", "Gdf", 1, UNIFORM, 'd', 2, F32, plan->gated)                                                 \
    X(T_W2, "experts.w2", "Gfd", 1, OUTPUT, 'f', 3, F32, 1)                                                            \
    X(T_B1, "experts.b1", "Gf", 0, UNIFORM, 'd', 4, F32, plan->bias)                                                   \
    X(T_BU, "experts.bu", "Gf", 0, UNIFORM, 'd', 5, F32, plan->bias && plan->gated)                                    \
    X(T_B2, "experts.b2", "Gd", 0, OUTPUT, 'f', 6, F32, plan->bias)
#define MOE__CONSTANT_TENSORS(X)                                                                                       \
    X(T_CONSTANT_GATE, "experts.constant_gate", "n2d", 1, ZERO, 'd', 11, F32, desc->n_constant)                        \
    X(T_CONSTANT, "experts.constant", "nd", 1, UNIFORM, 'd', 10, F32, desc->n_constant)                                \
    X(T_SHARED_GATE, "experts.shared_gate", "d", 1, UNIFORM, 'd', 12, F32, desc->shared_gate == MOE_ON)

#define MOE__ID(id, name, axes, decay, start, axis, stream, format, there) MOE__##id,
enum { MOE__ROUTER_TENSORS(MOE__ID) MOE__R_COUNT, MOE__BEFORE_EXPERTS = MOE__R_COUNT - 1,
       MOE__EXPERT_TENSORS(MOE__ID) MOE__CONSTANT_TENSORS(MOE__ID) MOE__T_COUNT };
#undef MOE__ID
typedef enum moe__plan_region { MOE__IN_ROUTER, MOE__IN_EXPERTS, MOE__IN_CONSTANTS } moe__plan_region;
typedef enum moe__plan_start {
    MOE__START_ZERO,
    MOE__START_UNIFORM,  /* within +-1/sqrt(axis) */
    MOE__START_SHARE,    /* within +-1/axis */
    MOE__START_OUTPUT,   /* as uniform; zero with zero_output */
    MOE__START_COLUMNS,  /* the router's: as router_init says */
    MOE__START_LOG_SCALE /* -log temperature */
} moe__plan_start;
typedef struct moe__plan_tensor_row {
    const char *name, *axes;
    moe__plan_region region;
    int decay;
    moe__plan_start start;
    char axis;
    uint64_t stream;
    moe_dtype_kind format;
} moe__plan_tensor_row;
#define MOE__ROW(region, name, axes, decay, start, axis, stream, format)                                               \
    {name, axes, MOE__IN_##region, decay, MOE__START_##start, axis, stream, MOE_DTYPE_##format},
#define MOE__ROUTER(id, name, axes, decay, start, axis, stream, format, there)                                         \
    MOE__ROW(ROUTER, name, axes, decay, start, axis, stream, format)
#define MOE__EXPERTS(id, name, axes, decay, start, axis, stream, format, there)                                        \
    MOE__ROW(EXPERTS, name, axes, decay, start, axis, stream, format)
#define MOE__CONSTANTS(id, name, axes, decay, start, axis, stream, format, there)                                      \
    MOE__ROW(CONSTANTS, name, axes, decay, start, axis, stream, format)
static const moe__plan_tensor_row moe__plan_tensors[MOE__T_COUNT] = {
    MOE__ROUTER_TENSORS(MOE__ROUTER) MOE__EXPERT_TENSORS(MOE__EXPERTS) MOE__CONSTANT_TENSORS(MOE__CONSTANTS)
};
#undef MOE__ROW
#undef MOE__ROUTER
#undef MOE__EXPERTS
#undef MOE__CONSTANTS

typedef struct moe__plan {
    moe_desc desc;
    size_t d, f, E, F, G, S;       /* F: routed experts with parameters; G: with the shared; S: slots of a token */
    size_t L, N;                   /* the score's last product: from L numbers a token to N = E times soft_slots */
    size_t dp, hp, zp, ep, np, lp; /* panels of d, the hidden values, the values before the activation, E, N, L */
    size_t gated, bias;
    size_t b1, w2, b2, expert, special, experts; /* see the drawing */
    size_t ldo;                    /* row of an expert's output */
    size_t count[MOE__T_COUNT];    /* elements of each tensor; 0: this layer has it not */
    size_t at[MOE__R_COUNT + 1];   /* where the router's tensors begin in its block; the last: its length */
    size_t jitter, by_sequence;    /* the router sees other numbers than the tokens: these are on */
    size_t view;                   /* so do the experts: expert_norm, input_scale */
    size_t ortho_loss, output_loss; /* these losses are on */
} moe__plan;

static size_t moe__plan_extent(const moe__plan *plan, char axis) {
    switch (axis) {
    case 'L': return plan->L;
    case 'N': return plan->N;
    case 'd': return plan->d;
    case 'E': return plan->E;
    case 'G': return plan->G;
    case 'f': return plan->f;
    case 'c': return plan->desc.n_codes;
    case 'n': return plan->desc.n_constant;
    default: return (size_t)(axis - '0');
    }
}
/* The last axis; the product of the others, of an expert where the tensor is spread over them. */
static size_t moe__plan_columns(const moe__plan *plan, int id) {
    const char *axes = moe__plan_tensors[id].axes;
    return moe__plan_extent(plan, axes[strlen(axes) - 1]);
}
static size_t moe__plan_rows(const moe__plan *plan, int id) {
    size_t rows = plan->count[id] / moe__plan_columns(plan, id);
    if (moe__plan_tensors[id].region == MOE__IN_EXPERTS) rows /= plan->G;
    return rows;
}
/* Elements of all tensors of a region. */
static size_t moe__plan_parameters(const moe__plan *plan, moe__plan_region region) {
    size_t total = 0;
    for (int id = 0; id < MOE__T_COUNT; id++)
        if (moe__plan_tensors[id].region == region) total += plan->count[id];
    return total;
}
/* The id of the i-th tensor that is there, described in *out; -1 past the last. */
static int moe__plan_tensor_at(const moe__plan *plan, size_t i, moe_tensor *out) {
    for (int id = 0; id < MOE__T_COUNT; id++) {
        if (!plan->count[id] || i--) continue;
        memset(out, 0, sizeof *out);
        out->name = moe__plan_tensors[id].name;
        out->count = plan->count[id];
        for (const char *axis = moe__plan_tensors[id].axes; *axis; axis++)
            out->dim[out->n_dims++] = moe__plan_extent(plan, *axis);
        return id;
    }
    return -1;
}

/* -- where elements stand -- */
/* Column c of W1, or of Wu beside it, in panels of `rows` rows. */
static size_t moe__plan_hidden(const moe__plan *plan, int up, size_t c, size_t rows) {
    if (!plan->gated) return c / MOE__W * rows * MOE__W + c % MOE__W;
    return c / 16 * rows * MOE__W + (size_t)up * 16 + c % 16;
}
/* Element (r, c) of an expert's matrix, in its block. */
static size_t moe__plan_in_block(const moe__plan *plan, int id, size_t r, size_t c) {
    switch (id) {
    case MOE__T_W1: case MOE__T_WU: return moe__plan_hidden(plan, id == MOE__T_WU, c, plan->d) + r * MOE__W;
    case MOE__T_B1: case MOE__T_BU: return plan->b1 + moe__plan_hidden(plan, id == MOE__T_BU, c, 1);
    case MOE__T_W2: return plan->w2 + c / MOE__W * plan->f * MOE__W + r * MOE__W + c % MOE__W;
    default: return plan->b2 + c;
    }
}
/* Where a plain tensor begins in a layer's parameters. */
static size_t moe__plan_offset(const moe__plan *plan, int id) {
    size_t at = plan->special;
    if (id < MOE__R_COUNT) return plan->experts + plan->at[id];
    for (int before = MOE__T_CONSTANT_GATE; before < id; before++) at += plan->count[before];
    return at;
}

/* n elements of a row of a tensor, from `column` on; the rows of all experts are counted as one list. */
static void moe__plan_get(const moe__plan *plan, int id, const float *params, size_t row, size_t column, size_t count,
                          float *out) {
    size_t rows = moe__plan_rows(plan, id), columns = moe__plan_columns(plan, id);
    if (moe__plan_tensors[id].region == MOE__IN_EXPERTS) {
        const float *block = params + row / rows * plan->expert;
        for (size_t i = 0; i < count; i++) out[i] = block[moe__plan_in_block(plan, id, row % rows, column + i)];
    } else memcpy(out, params + moe__plan_offset(plan, id) + row * columns + column, count * sizeof(float));
}
static void moe__plan_set(const moe__plan *plan, int id, float *params, size_t row, size_t column, size_t count,
                          const float *in) {
    size_t rows = moe__plan_rows(plan, id), columns = moe__plan_columns(plan, id);
    if (moe__plan_tensors[id].region == MOE__IN_EXPERTS) {
        float *block = params + row / rows * plan->expert;
        for (size_t i = 0; i < count; i++) block[moe__plan_in_block(plan, id, row % rows, column + i)] = in[i];
    } else memcpy(params + moe__plan_offset(plan, id) + row * columns + column, in, count * sizeof(float));
}
/* The same for n whole rows. */
static void moe__plan_read(const moe__plan *plan, int id, const float *params, size_t row, size_t count, float *out) {
    size_t columns = moe__plan_columns(plan, id);
    for (size_t i = 0; i < count; i++) moe__plan_get(plan, id, params, row + i, 0, columns, out + i * columns);
}
static void moe__plan_write(const moe__plan *plan, int id, float *params, size_t row, size_t count, const float *in) {
    size_t columns = moe__plan_columns(plan, id);
    for (size_t i = 0; i < count; i++) moe__plan_set(plan, id, params, row + i, 0, columns, in + i * columns);
}

/* -- how they begin -- */
/* The initial values are uniform within +- this; 0: they are zero. */
static float moe__plan_bound(const moe__plan *plan, int id) {
    const moe__plan_tensor_row *row = &moe__plan_tensors[id];
    float extent = (float)moe__plan_extent(plan, row->axis), bound = 1.0f / sqrtf(extent);
    switch (row->start) {
    case MOE__START_UNIFORM: return bound;
    case MOE__START_SHARE: return 1.0f / extent;
    case MOE__START_OUTPUT:
        if (plan->desc.zero_output == MOE_ON) return 0.0f;
        return bound;
    case MOE__START_COLUMNS:
        if (plan->desc.router_init == MOE_INIT_ZERO) return 0.0f;
        if (plan->desc.router_init == MOE_INIT_UNIFORM) return bound * plan->desc.router_gain;
        return bound; /* the layer then makes them orthogonal */
    default: return 0.0f;
    }
}
/* A tensor's initial values, of the experts' tensors those of `expert`, into parameters that are zero. Element i is
 * number i of a stream: of an expert's tensor 16 expert + its number, of the others minus theirs. */
static void moe__plan_initial(const moe__plan *plan, int id, size_t expert, float *params) {
    const moe__plan_tensor_row *tensor = &moe__plan_tensors[id];
    size_t rows = moe__plan_rows(plan, id), columns = moe__plan_columns(plan, id);
    uint64_t stream = (uint64_t)0 - tensor->stream;
    float bound, chunk[256];
    if (!plan->count[id]) return;
    if (tensor->region == MOE__IN_EXPERTS) stream = (uint64_t)expert * 16 + tensor->stream;
    if (tensor->start == MOE__START_LOG_SCALE) params[moe__plan_offset(plan, id)] = -moe__logf1(plan->desc.temperature);
    bound = moe__plan_bound(plan, id);
    if (bound == 0.0f) return;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c += 256) {
            size_t n = moe__min(256, columns - c);
            moe__uniform_at(plan->desc.seed, stream, (uint64_t)(r * columns + c), n, -bound, bound, chunk);
            moe__plan_set(plan, id, params, expert * rows + r, c, n, chunk);
        }
}

/* -- what an optimiser step does with them -- */
/* The tensor of float `at` of a layer's parameters (of up and gate matrix the first), and where its floats end. */
static int moe__plan_piece(const moe__plan *plan, size_t at, size_t *end) {
    static const int in_block[4] = {MOE__T_W1, MOE__T_B1, MOE__T_W2, MOE__T_B2};
    size_t ends[4] = {plan->b1, plan->w2, plan->b2, plan->expert}, begin = at / plan->expert * plan->expert;
    int part = 0;
    if (at < plan->special) {
        while (at - begin >= ends[part]) part++;
        *end = begin + ends[part];
        return in_block[part];
    }
    if (at < plan->experts) {
        part = MOE__T_CONSTANT_GATE;
        while (at >= moe__plan_offset(plan, part) + plan->count[part]) part++;
        *end = moe__plan_offset(plan, part) + plan->count[part];
        return part;
    }
    while (at - plan->experts >= plan->at[part + 1]) part++;
    *end = plan->experts + plan->at[part + 1];
    return part;
}
static int moe__plan_decay(const moe__plan *plan, int id) {
    if (id < MOE__R_COUNT && plan->desc.freeze_router == MOE_ON) return -1;
    return moe__plan_tensors[id].decay;
}
/* The run of floats from `at` on that a step treats alike: its end. *decay: 1 with weight decay, 0 without, -1: of a
 * frozen router, which is left alone. */
static size_t moe__plan_span(const moe__plan *plan, size_t at, int *decay) {
    size_t total = plan->experts + plan->at[MOE__R_COUNT], end, next;
    *decay = moe__plan_decay(plan, moe__plan_piece(plan, at, &end));
    while (end < total && moe__plan_decay(plan, moe__plan_piece(plan, end, &next)) == *decay) end = next;
    return end;
}

/* ==== >>placement =============================================================================
 * Who lives where: the one owner of "which rank holds this expert, and this token". Both are blocks of consecutive
 * numbers. Uses nothing. */
static size_t moe__placement_of_expert(size_t expert, size_t n_experts, size_t n_ranks) {
    return (size_t)((uint64_t)expert * n_ranks / n_experts);
}
static size_t moe__placement_of_token(size_t token, size_t n_tokens, size_t n_ranks) {
    return (size_t)((uint64_t)token * n_ranks / n_tokens);
}

/* ==== >>run ===================================================================================
 * What one forward or backward carries. A tape owns its memory, one struct a stage, each laid out beside the stage's
 * code; a run is made for one call and points to all that the call uses. After this room a stage can be written as a
 * body over a block of tokens and run over all of them. Uses plan, threads, random, products.
 */
typedef struct moe__run_group { /* rows that one set of an expert's parameters computes */
    size_t begin, rows, first;  /* first: token of the first row, where all tokens from there follow */
    const uint32_t *token;      /* NULL: in order from `first` */
    const float *weight;        /* NULL: 1 */
    const float *x;             /* the rows' inputs as panels, x_panel floats apart */
    size_t x_panel;
    const float *params;
    float *d_params;
    int fresh; /* the gradient is set, not added to */
} moe__run_group;

typedef struct moe__run_now { /* what holds for one forward and its backward */
    int training, random, local, skip; /* random warm-up; gating dropout: only experts of the token's rank, or none */
    size_t k;                          /* choices of a token */
    float inv_t, prob_inv_t, prob_t;   /* 1 / temperature of the gate, of prob; the latter */
    uint64_t draw;
} moe__run_now;

/* What a tape keeps. (a, b, 32): panels. */
typedef struct moe__run_score {
    float *x;                /* (d panels, T, 32) what the router sees: the tokens, or with jitter,
        or their sequences' means */
    float *silu, *x_inverse; /* silu(LN(x)), and 1 / the standard deviation (T) */
    float *latent, *d_latent; /* (L panels, T, 32) what the last product reads, and its gradient */
    float *inverse;           /* (T) 1 / the latent token's length before it was scaled */
    float *columns, *d_columns, *column_inverse; /* the router's columns scaled (L, N), their gradient,
        1 / their length (N) */
    float *packed;   /* a matrix of the router as panels, either way round */
    float *d_panels; /* a gradient of N or E columns as panels */
    float *dx;       /* (T, d) gradient by x, where that is not the gradient by the tokens */
} moe__run_score;
typedef struct moe__run_noise {
    float *raw;  /* (T, E) x Wn of the learned noise; in backward its gradient */
    float *draw; /* (T, E) the random numbers */
} moe__run_noise;
typedef struct moe__run_gate {
    float *scores;   /* (T, E), where scores are not prob or logits */
    float *d_weight; /* (T, S) */
    int32_t *before; /* (T, S) the choices before random second took some away */
} moe__run_gate;
typedef struct moe__run_select {
    const float *seen;  /* (T, E) what the selection sees: logits, scores, or view */
    float *view, *work; /* (T, E) these with a bias or masked; scratch of a token */
    void *scratch;      /* of the selections over a batch */
    size_t scratch_bytes;
} moe__run_select;
typedef struct moe__run_experts {
    size_t n_groups, n_own;     /* groups in use; those before the shared experts' */
    size_t shared_row;          /* first row of the shared experts */
    moe__run_group *group;      /* (most groups) */
    size_t *first_task;         /* (most groups + 1) first task of each group */
    float *x;                   /* each group's rows (d panels, rows, 32); shared experts use the tokens */
    float *z, *h;               /* before and after the activation, as panels */
    float *out;                 /* outputs, row-major, plan.ldo; in backward the gathered dy, then dx */
    float *part, *d_weight;     /* (rows, h panels) shares of <h, dh>; (T S) */
    float *view, *d_view;       /* with plan.view: (T) what a token less its mean is multiplied by; (T, d) gradient by
        what the experts see */
} moe__run_experts;
typedef struct moe__run_combine {
    float *merged, *d_merged;            /* (sequences, expert) parameters of combine = merge */
    float *soft, *d_soft;                /* (T, N) logits of the soft slots; their gradient */
    float *dispatch, *mix;               /* (T, N) weights of tokens in a slot, of slots in a token */
    float *d_dispatch, *d_mix;           /* their gradients */
    float *shared_gate, *d_shared_gate;  /* (T) sigmoid(x . w) of the shared experts; the gradient by x . w */
    float *reliability, *robust_weight;  /* (T, S) r / sum g r; (n_routes) the weights that robust combination uses */
    unsigned char *scratch;              /* of a block of tokens */
    size_t scratch_bytes;
} moe__run_combine;
typedef struct moe__run_losses {
    double *mean, *mean_of_batch, *rank_prob; /* (E), (E), (n_ranks) */
    uint64_t *counts;                /* (sequences, E) or (n_ranks) */
    float *matrix;                   /* (2, d, f) of the loss orthonormal */
    float *d_out;                    /* (n_routed, out_ld) gradient by the outputs, of the loss output-orthogonality */
    int32_t *teacher;                /* (T) of the tokens that side.mask keeps */
    double output_loss, *block_loss;
    float *outputs;                  /* (blocks, 2, S, d) */
} moe__run_losses;
typedef struct moe__run_memory {
    moe__plan plan;
    size_t max_tokens, n_rows, n_routed; /* room: tokens, rows of all experts, of the routed ones */
    size_t n_routes;                     /* of the forward that is kept */
    int training, state;
    void *own; /* the allocation, if the library made it */
    moe__run_now now;
    uint32_t *kept;     /* (T) room for tape.kept */
    size_t n_sequences;
    uint32_t *sequence_begin, *sequence_of; /* (sequences + 1) the first token of each; (T) */
    float *tokens;      /* (d panels, T, 32) */
    moe_status *failed; /* (blocks) what went wrong in a block of tokens */
    float *d_logits;    /* (T, E) */
    moe__run_score score;
    moe__run_noise noise;
    moe__run_gate gate;
    moe__run_select select;
    moe__run_experts experts;
    moe__run_combine combine;
    moe__run_losses losses;
    struct moe__run_codes *codes;
} moe__run_memory;

/* What a layer gives, or at level 2 the caller in tape->side. */
typedef struct moe__run_given {
    uint64_t step, draw;
    const float *bias;    /* (E) added to what the selection sees; NULL = none */
    const float *experts; /* the experts' parameters and gradients, for what the router does with them */
    float *d_experts;
} moe__run_given;

typedef struct moe__run {
    const moe_desc *desc;
    const moe__plan *plan;
    const moe__kernels *kernels;
    moe_tape *tape;
    moe__run_memory *memory;
    moe__run_given given;
    const float *x, *router, *params, *dy;
    const float *weight;      /* (n_routes): what the combination uses */
    const float *weight_grad; /* (n_routes) or NULL: gradient by the routes' weights, given to the router's backward */
    const double *mean;       /* (E): of tape.prob, for the losses */
    float *y, *d_router, *d_params, *d_weight;
    float *dx; /* in the router's backward: where the gradient by what the router sees goes */
    int fresh; /* the gradients are set, not added to */
    const uint32_t *kept, *dy_kept; /* rows of what the caller gives by token, and of dy; NULL: in order */
} moe__run;

/* A run over a tape whose memory is there, with this plan. */
static void moe__run_begin(moe__run *run, const moe__plan *plan, moe_tape *tape) {
    memset(run, 0, sizeof *run);
    run->plan = plan;
    run->desc = &plan->desc;
    run->kernels = moe__dispatched();
    run->tape = tape;
    run->memory = tape->memory;
    run->kept = run->dy_kept = tape->kept;
}
/* Where the caller's arrays have token t, and its row of dy. */
static size_t moe__run_row(const moe__run *run, size_t t) { return run->kept ? run->kept[t] : t; }
static const float *moe__run_dy(const moe__run *run, size_t t) {
    return run->dy + (run->dy_kept ? run->dy_kept[t] : t) * run->plan->d;
}

#define MOE__TOKENS 64 /* a block of tokens */
#define MOE__BLOCK_BEGIN(i) ((i) * MOE__TOKENS)
#define MOE__BLOCK_END(i, n) moe__min((n), ((i) + 1) * MOE__TOKENS)

/* The two ways in which a run is spread over threads: over blocks of tokens, and over items that the caller counts.
 * (The experts' passes have a third, over blocks of rows and panels: moe__experts_phase.) work: multiply-adds of an
 * item. */
typedef void moe__run_block(const moe__run *run, size_t t0, size_t t1);
typedef void moe__run_item(const moe__run *run, size_t i);
typedef struct moe__run_call { const moe__run *run; moe__run_block *block; moe__run_item *item; } moe__run_call;
static void moe__run_task(void *arg, size_t i, size_t worker) {
    const moe__run_call *call = (const moe__run_call *)arg;
    (void)worker;
    if (call->block) call->block(call->run, MOE__BLOCK_BEGIN(i), MOE__BLOCK_END(i, call->run->tape->n_tokens));
    else call->item(call->run, i);
}
static void moe__run_over_blocks(const moe__run *run, moe__run_block *body) {
    moe__run_call call = {run, body, NULL};
    size_t work = run->plan->d * (run->plan->N + run->plan->S), n = run->tape->n_tokens;
    moe__threads_run(&run->desc->parallel, n, work, moe__ceil_div(n, MOE__TOKENS), moe__run_task, &call);
}
static void moe__run_over(const moe__run *run, size_t count, size_t work, moe__run_item *body) {
    moe__run_call call = {run, NULL, body};
    moe__threads_run(&run->desc->parallel, count, work, count, moe__run_task, &call);
}

/* A tensor of the router, or of its gradient; NULL if this desc has it not. */
static const float *moe__run_tensor(const moe__run *run, int part) {
    const size_t *at = run->plan->at;
    if (!run->router || at[part + 1] == at[part]) return NULL;
    return run->router + at[part];
}
static float *moe__run_grad(const moe__run *run, int part) {
    const size_t *at = run->plan->at;
    if (!run->d_router || at[part + 1] == at[part]) return NULL;
    return run->d_router + at[part];
}

/* Random numbers of a forward: one stream for each use. */
enum {
    MOE__USE_JITTER, MOE__USE_NOISE, MOE__USE_SECOND, MOE__USE_EXPERT_DROP, MOE__USE_WARM_UP, MOE__USE_SAMPLE,
        MOE__USE_KEEP,
    MOE__USE_SCORE, MOE__USE_GATE_DROP, MOE__USES = 16
};
#define MOE__DRAW_KEY(run) ((run)->desc->seed ^ 0xa54ff53a5f1d36f1ull) /* other streams than the initial parameters' */
static uint64_t moe__run_stream_of(uint64_t draw, int use) { return draw * MOE__USES + (uint64_t)use; }
static uint64_t moe__run_stream(const moe__run *run, int use) { return moe__run_stream_of(run->memory->now.draw, use); }
static void moe__run_uniforms(const moe__run *run, int use, uint64_t at, size_t count, float lo, float hi, float *out) {
    moe__uniform_at(MOE__DRAW_KEY(run), moe__run_stream(run, use), at, count, lo, hi, out);
}

/* Sequences: their number, the first token of one, the end, and a token's. */
static size_t moe__run_sequences(const moe__run *run) { return run->memory->n_sequences; }
static size_t moe__run_sequence_begin(const moe__run *run, size_t i) { return run->memory->sequence_begin[i]; }
static size_t moe__run_sequence_end(const moe__run *run, size_t i) { return run->memory->sequence_begin[i + 1]; }
static size_t moe__run_sequence_of(const moe__run *run, size_t t) { return run->memory->sequence_of[t]; }
static size_t moe__run_place(const moe__run *run, size_t t) { /* of a token in its sequence */
    return t - moe__run_sequence_begin(run, moe__run_sequence_of(run, t));
}
/* Once for each sequence. work: multiply-adds of a token. */
static void moe__run_over_sequences(const moe__run *run, size_t work, moe__run_item *body) {
    size_t count = moe__run_sequences(run);
    if (count) moe__run_over(run, count, run->tape->n_tokens / count * work, body);
}
static size_t moe__run_most_sequences(const moe__plan *plan, size_t count) { /* of a tape for count tokens */
    if (!count) return 0;
    return plan->desc.sequence ? moe__ceil_div(count, plan->desc.sequence) : 1;
}
/* The row of random numbers of token t: a sequence that goes one way has one. */
static size_t moe__run_draw_row(const moe__run *run, size_t t) {
    return run->plan->by_sequence ? moe__run_sequence_of(run, t) : t;
}

/* The tokens as panels: panel p of token t, of which the last has fewer columns than 32; and run->x into them. */
static float *moe__run_token(const moe__run *run, size_t p, size_t t) {
    return run->memory->tokens + (p * run->tape->n_tokens + t) * MOE__W;
}
static size_t moe__run_columns(const moe__run *run, size_t p) { return moe__min(MOE__W, run->plan->d - p * MOE__W); }
static void moe__run_pack_tokens(const moe__run *run, size_t t0, size_t t1) {
    size_t rows = run->kept ? 1 : t1 - t0;
    for (size_t p = 0; p < run->plan->dp; p++)
        for (size_t token = t0; token < t1; token += rows)
            moe__product_fill(run->x, run->plan->d, moe__run_row(run, token), rows, p * MOE__W,
                              moe__run_columns(run, p), moe__run_token(run, p, token));
}

/* ==== >>score =================================================================================
 * x (T, d) -> logits (T, E), or (T, N) of the soft slots. At its end stands moe__score_table: how each score checks its
 * desc, lays out its memory, prepares a batch, goes forward and backward. Uses products and run.
 *
 * Tokens stand in panels of 32 numbers, as the products read them; the last panel is filled with zeros:
 *     panel 0: token 0 [32] token 1 [32] ...   panel 1: token 0 [32] token 1 [32] ...
 * So token t begins at t * MOE__W of its panels, and its number i stands moe__score_at further on.
 */
static size_t moe__score_at(const moe__run *run, size_t i) {
    return i / MOE__W * run->tape->n_tokens * MOE__W + i % MOE__W;
}

/* -- one matrix product of the router: out (T, cols) = in (T, rows) matrix (rows, cols) -- */
typedef struct moe__score_map {
    const moe__run *run;
    const float *in; size_t rows;     /* panels */
    const float *matrix; size_t cols; /* row-major */
    const float *d_out;               /* panels */
    float *d_matrix;                  /* +=; or NULL */
    float *d_in; int d_in_panels;     /* row-major, +=; or set as panels; or NULL */
} moe__score_map;
static size_t moe__score_map_floats(size_t rows, size_t cols) { /* times 32: the matrix as panels, either way round */
    return moe__max(moe__ceil_div(cols, MOE__W) * rows, moe__ceil_div(rows, MOE__W) * cols);
}
/* Rows t0 on of (T, width), row-major or panels. */
static moe__product_target moe__score_target(const moe__run *run, float *out, size_t width, int panels, size_t t0) {
    size_t panel = run->tape->n_tokens * MOE__W, whole = moe__ceil_div(width, MOE__W) * MOE__W;
    moe__product_target plain = {out + t0 * width, width, MOE__W, width, moe__product_zeros, 0};
    moe__product_target paneled = {out + t0 * MOE__W, MOE__W, panel, whole, moe__product_zeros, 0};
    return panels ? paneled : plain;
}
static void moe__score_map_pack(const moe__score_map *map) {
    for (size_t c = 0; c < map->cols; c += MOE__W)
        moe__product_fill(map->matrix, map->cols, 0, map->rows, c, moe__min(MOE__W, map->cols - c),
                          map->run->memory->score.packed + c * map->rows);
}
/* after moe__score_map_pack: rows [t0, t1) of out */
static void moe__score_map_forward(const moe__score_map *map, float *out, int panels, size_t t0, size_t t1) {
    const moe__run *run = map->run;
    moe__product_target to = moe__score_target(run, out, map->cols, panels, t0);
    moe__product(run->kernels, t1 - t0, map->rows, map->in + t0 * MOE__W, run->tape->n_tokens * MOE__W,
                 run->memory->score.packed, &to, 1, NULL);
}
static void moe__score_map_task_matrix(void *arg, size_t panel, size_t worker) { /* 32 rows of d_matrix */
    const moe__score_map *map = (const moe__score_map *)arg;
    size_t tokens = map->run->tape->n_tokens, row = panel * MOE__W, rows = moe__min(MOE__W, map->rows - row);
    (void)worker;
    for (size_t t = 0; t < tokens; t += MOE__KC)
        for (size_t c = 0; c < map->cols; c += MOE__W)
            moe__product_outer(map->run->kernels, moe__min(MOE__KC, tokens - t), rows,
                               map->in + row * tokens + t * MOE__W, map->d_out + c * tokens + t * MOE__W, MOE__W,
                               map->d_matrix + row * map->cols + c, map->cols, moe__min(MOE__W, map->cols - c), 0);
}
static void moe__score_map_task_in(void *arg, size_t block, size_t worker) {
    const moe__score_map *map = (const moe__score_map *)arg;
    const moe__run *run = map->run;
    size_t tokens = run->tape->n_tokens, t0 = MOE__BLOCK_BEGIN(block), t1 = MOE__BLOCK_END(block, tokens);
    moe__product_target to = moe__score_target(run, map->d_in, map->rows, map->d_in_panels, t0);
    (void)worker;
    moe__product(run->kernels, t1 - t0, map->cols, map->d_out + t0 * MOE__W, tokens * MOE__W, run->memory->score.packed,
                 &to, map->d_in_panels, NULL);
}
static void moe__score_map_backward(moe__score_map *map) {
    const moe__run *run = map->run;
    const moe_parallel *parallel = &run->desc->parallel;
    size_t tokens = run->tape->n_tokens, work = map->rows * map->cols, panels = moe__ceil_div(map->rows, MOE__W);
    if (map->d_matrix) moe__threads_run(parallel, tokens, work, panels, moe__score_map_task_matrix, map);
    if (!map->d_in) return;
    for (size_t r = 0; r < map->rows; r += MOE__W) /* the matrix transposed (cols, rows) */
        moe__product_fill_t(run->kernels, map->matrix, map->cols, 0, map->cols, r, moe__min(MOE__W, map->rows - r),
                            run->memory->score.packed + r * map->cols);
    moe__threads_run(parallel, tokens, work, moe__ceil_div(tokens, MOE__TOKENS), moe__score_map_task_in, map);
}
/* row-major (T, width) -> panels memory->score.d_panels */
static void moe__score_to_panels(const moe__run *run, const float *rows, size_t width) {
    size_t tokens = run->tape->n_tokens;
    float *panels = run->memory->score.d_panels;
    for (size_t c = 0; c < width; c += MOE__W)
        moe__product_fill(rows, width, 0, tokens, c, moe__min(MOE__W, width - c), panels + c * tokens);
}

/* -- rows of panels: each pointer to the row's first panel -- */
static float moe__score_row_dot(const moe__run *run, const float *a, const float *b, size_t width) {
    size_t panel = run->tape->n_tokens * MOE__W;
    float sum = 0.0f;
    for (size_t p = 0; p * MOE__W < width; p++) sum += run->kernels->dot(MOE__W, a + p * panel, b + p * panel);
    return sum;
}
static float moe__score_row_mean(const moe__run *run, const float *row, size_t width) {
    float sum = 0.0f;
    for (size_t i = 0; i < width; i++) sum += row[moe__score_at(run, i)];
    return sum / (float)width;
}
static void moe__score_row_scale(const moe__run *run, float scale, float *row, size_t width) {
    size_t panel = run->tape->n_tokens * MOE__W;
    for (size_t p = 0; p * MOE__W < width; p++)
        for (size_t c = 0; c < MOE__W; c++) row[p * panel + c] *= scale;
}
/* The row-major `to` (width) += scale times the row. */
static void moe__score_row_add(const moe__run *run, float scale, const float *row, size_t width, float *to) {
    for (size_t i = 0; i < width; i += MOE__W)
        run->kernels->axpy(moe__min(MOE__W, width - i), scale, row + moe__score_at(run, i), to + i);
}
static float moe__score_inverse_root(float square) { return square >= FLT_MIN ? 1.0f / sqrtf(square) : 0.0f; }

/* `row` into y (may be the same): divided by its length or, where `centred`, by its standard deviation after taking its
 * mean away. Returns 1 / that; 0 for a row of zeros, which stays. */
static float moe__score_row_unit(const moe__run *run, const float *row, float *y, size_t width, int centred) {
    float mean = 0.0f;
    if (centred) mean = moe__score_row_mean(run, row, width);
    for (size_t i = 0; i < width; i++) y[moe__score_at(run, i)] = row[moe__score_at(run, i)] - mean;
    for (size_t i = width; i % MOE__W; i++) y[moe__score_at(run, i)] = 0.0f;
    float square = moe__score_row_dot(run, y, y, width);
    if (centred) square = square / (float)width;
    float inverse = moe__score_inverse_root(square);
    moe__score_row_scale(run, inverse, y, width);
    return inverse;
}
/* The gradient by the row from that by y, in place, given what moe__score_row_unit made and returned. */
static void moe__score_row_unit_back(const moe__run *run, const float *y, float *dy, size_t width, int centred,
                                     float inverse) {
    float along = moe__score_row_dot(run, y, dy, width), mean = 0.0f;
    if (centred) mean = moe__score_row_mean(run, dy, width);
    if (centred) along = along / (float)width;
    for (size_t i = 0; i < width; i++) {
        size_t at = moe__score_at(run, i);
        dy[at] = moe__fma(-along, y[at], dy[at] - mean) * inverse;
    }
}

/* -- the latent scores: all that end in a product with the router's columns, one row of choices each --
 *
 *     x (T, d) --[silu(LN)]--[W (d, L) + b]--[act]--> latent (T, L) --[scaled] R (L, N) + [c]--> logits (T, N)
 *     score.x    score.silu                           score.latent    score.columns
 *
 * What stands in brackets only some of them have; where nothing is done, there is no copy. */
typedef enum moe__score_unit { /* RAW: not even a copy; up to TANH number by number, then by row */
    MOE__RAW, MOE__SAME, MOE__RELU, MOE__TANH, MOE__LENGTH, MOE__LN
} moe__score_unit;
typedef struct moe__score_latent {
    int pre, proj, proj_bias, out_bias; /* silu(LN(.)); W; b; c unless router_bias says otherwise */
    moe__score_unit act, cols;          /* of the latent rows, of the router's columns */
} moe__score_latent;
static const moe__score_latent *moe__score_latent_of(const moe__plan *plan); /* its score's: stands after the table */

/* Columns of R (L, N) scaled into memory->score.columns, as moe__score_row_unit does with rows. */
static void moe__score_columns_unit(const moe__run *run, const float *matrix, int centred) {
    size_t L = run->plan->L, N = run->plan->N;
    float *columns = run->memory->score.columns, *inverse = run->memory->score.column_inverse;
    for (size_t e = 0; e < N; e++) {
        float mean = 0.0f, square = 0.0f;
        if (centred) {
            for (size_t i = 0; i < L; i++) mean += matrix[i * N + e];
            mean = mean / (float)L;
        }
        for (size_t i = 0; i < L; i++) {
            float v = matrix[i * N + e] - mean;
            square = moe__fma(v, v, square);
        }
        if (centred) square = square / (float)L;
        inverse[e] = moe__score_inverse_root(square);
        for (size_t i = 0; i < L; i++) columns[i * N + e] = (matrix[i * N + e] - mean) * inverse[e];
    }
}
static void moe__score_columns_unit_back(const moe__run *run, float *d_matrix, int centred) {
    size_t L = run->plan->L, N = run->plan->N;
    const float *columns = run->memory->score.columns, *d_columns = run->memory->score.d_columns;
    for (size_t e = 0; e < N; e++) {
        float sum = 0.0f, mean = 0.0f, along = 0.0f;
        for (size_t i = 0; i < L; i++) {
            sum += d_columns[i * N + e];
            along = moe__fma(columns[i * N + e], d_columns[i * N + e], along);
        }
        if (centred) mean = sum / (float)L;
        if (centred) along = along / (float)L;
        for (size_t i = 0; i < L; i++) {
            size_t at = i * N + e;
            float back = moe__fma(-along, columns[at], d_columns[at] - mean);
            d_matrix[at] = moe__fma(run->memory->score.column_inverse[e], back, d_matrix[at]);
        }
    }
}

static moe__score_map moe__score_projection(const moe__run *run) {
    const moe__run_score *score = &run->memory->score;
    const float *matrix = moe__run_tensor(run, MOE__R_PROJ);
    moe__score_map map = {run, score->x, run->plan->d, matrix, run->plan->L, NULL, NULL, NULL, 0};
    if (score->silu) map.in = score->silu;
    return map;
}
static moe__score_map moe__score_last_product(const moe__run *run) {
    const moe__run_score *score = &run->memory->score;
    const float *matrix = moe__run_tensor(run, MOE__R_ROUTER);
    moe__score_map map = {run, score->x, run->plan->L, matrix, run->plan->N, NULL, NULL, NULL, 0};
    if (score->latent) map.in = score->latent;
    if (score->columns) map.matrix = score->columns;
    return map;
}

static moe_status moe__score_latent_layout(const moe__plan *plan, size_t n_tokens, int training, moe__arena *arena,
                                           moe__run_score *memory) {
    const moe__score_latent *latent = moe__score_latent_of(plan);
    if (latent->act != MOE__RAW) {
        size_t panels = plan->lp;
        if (latent->pre) panels = moe__max(panels, plan->dp); /* d_latent lends its place to LN(x) */
        memory->latent = moe__take_floats(arena, n_tokens, panels * MOE__W);
        if (training) memory->d_latent = moe__take_floats(arena, n_tokens, panels * MOE__W);
        memory->inverse = moe__take_floats(arena, n_tokens, 1);
    }
    if (latent->pre) memory->silu = moe__take_floats(arena, n_tokens, plan->dp * MOE__W);
    if (latent->cols != MOE__RAW) {
        memory->columns = moe__take_floats(arena, plan->L, plan->N);
        memory->column_inverse = moe__take_floats(arena, plan->N, 1);
        if (training) memory->d_columns = moe__take_floats(arena, plan->L, plan->N);
    }
    return MOE_OK;
}

static void moe__score_project(const moe__run *run, size_t t0, size_t t1) { /* -> score.latent */
    const moe__score_latent *latent = moe__score_latent_of(run->plan);
    const moe__run_score *score = &run->memory->score;
    size_t d = run->plan->d, L = run->plan->L;
    const float *bias = moe__run_tensor(run, MOE__R_PROJ_BIAS);
    if (latent->pre)
        for (size_t t = t0; t < t1; t++) {
            float *y = score->silu + t * MOE__W;
            moe__score_row_unit(run, score->x + t * MOE__W, y, d, 1);
            for (size_t i = 0; i < d; i += MOE__W) { /* silu in place; its derivative is made again from x */
                float *part = y + moe__score_at(run, i);
                run->kernels->act[MOE_EXPERT_SILU](1, part, NULL, part);
            }
        }
    if (latent->proj) {
        moe__score_map map = moe__score_projection(run);
        moe__score_map_forward(&map, score->latent, 1, t0, t1);
    }
    for (size_t t = t0; t < t1; t++) {
        float *y = score->latent + t * MOE__W;
        const float *row = latent->proj ? y : score->x + t * MOE__W;
        if (bias)
            for (size_t c = 0; c < L; c++) y[moe__score_at(run, c)] += bias[c];
        if (latent->act >= MOE__LENGTH)
            score->inverse[t] = moe__score_row_unit(run, row, y, L, latent->act == MOE__LN);
    }
    if (latent->act < MOE__LENGTH)
        for (size_t c = 0; c < L; c += MOE__W) {
            float *y = score->latent + t0 * MOE__W + moe__score_at(run, c);
            if (latent->act == MOE__RELU) run->kernels->act[MOE_EXPERT_RELU](t1 - t0, y, NULL, y);
            if (latent->act == MOE__TANH) run->kernels->tanh((t1 - t0) * MOE__W, y, y);
        }
}
static void moe__score_latent_prepare(const moe__run *run) {
    const moe__score_latent *latent = moe__score_latent_of(run->plan);
    const float *matrix = moe__run_tensor(run, MOE__R_ROUTER);
    moe__score_map map;
    if (latent->proj) {
        map = moe__score_projection(run);
        moe__score_map_pack(&map);
    }
    if (latent->act != MOE__RAW) moe__run_over_blocks(run, moe__score_project);
    if (latent->cols != MOE__RAW) moe__score_columns_unit(run, matrix, latent->cols == MOE__LN);
    map = moe__score_last_product(run);
    moe__score_map_pack(&map);
}
static void moe__score_latent_forward(const moe__run *run, size_t t0, size_t t1) {
    size_t N = run->plan->N;
    const float *bias = moe__run_tensor(run, MOE__R_BIAS);
    float *out = run->memory->combine.soft;
    moe__score_map map = moe__score_last_product(run);
    if (!out) out = run->tape->logits;
    moe__score_map_forward(&map, out, 0, t0, t1);
    if (bias)
        for (size_t t = t0; t < t1; t++) run->kernels->axpy(N, 1.0f, bias, out + t * N);
}

/* The gradient by the latent rows -> that before the activation, in place. */
static void moe__score_unproject(const moe__run *run, size_t t0, size_t t1) {
    const moe__run_score *score = &run->memory->score;
    moe__score_unit act = moe__score_latent_of(run->plan)->act;
    size_t L = run->plan->L;
    for (size_t t = t0; t < t1; t++) {
        const float *y = score->latent + t * MOE__W;
        float *dy = score->d_latent + t * MOE__W;
        if (act >= MOE__LENGTH) moe__score_row_unit_back(run, y, dy, L, act == MOE__LN, score->inverse[t]);
        for (size_t c = 0; c < L && act < MOE__LENGTH; c++) {
            size_t at = moe__score_at(run, c);
            if (act == MOE__TANH) dy[at] *= moe__fma(-y[at], y[at], 1.0f);
            if (act == MOE__RELU && !(y[at] > 0.0f)) dy[at] = 0.0f;
        }
    }
}
/* In place of the gradient by silu(LN(x)), a row: that by x. y: room for LN(x) again. */
static void moe__score_silu_back(const moe__run *run, const float *x, float *y, float *grad) {
    size_t d = run->plan->d;
    float inverse = moe__score_row_unit(run, x, y, d, 1), one = 1.0f, part;
    for (size_t i = 0; i < d; i += MOE__W) { /* the experts' backward does it in place of its z */
        size_t at = moe__score_at(run, i);
        float z[MOE__W], h[MOE__W];
        memcpy(z, y + at, sizeof z);
        memcpy(h, z, sizeof h);
        run->kernels->act_back[MOE_EXPERT_SILU](1, &one, z, NULL, h, grad + at, &part, 1);
        memcpy(grad + at, z, sizeof z);
    }
    moe__score_row_unit_back(run, y, grad, d, 1, inverse);
}
/* dx += the gradient by score.x: d_latent, or through silu(LN(.)), whose output's gradient is then in score.silu. */
static void moe__score_into_x(const moe__run *run, size_t t0, size_t t1) {
    const moe__run_score *score = &run->memory->score;
    int pre = moe__score_latent_of(run->plan)->pre;
    for (size_t t = t0; t < t1; t++) {
        float *grad = (pre ? score->silu : score->d_latent) + t * MOE__W;
        if (pre) moe__score_silu_back(run, score->x + t * MOE__W, score->d_latent + t * MOE__W, grad);
        moe__score_row_add(run, 1.0f, grad, run->plan->d, run->dx + t * run->plan->d);
    }
}
/* The sum over tokens of a gradient (T, width) in panels, added to d_bias (width), if that is asked for. */
static void moe__score_bias_grad(const moe__run *run, const float *panels, size_t width, float *d_bias) {
    if (!d_bias) return;
    for (size_t t = 0; t < run->tape->n_tokens; t++) moe__score_row_add(run, 1.0f, panels + t * MOE__W, width, d_bias);
}
static void moe__score_projection_backward(const moe__run *run) {
    const moe__run_score *score = &run->memory->score;
    moe__score_map map = moe__score_projection(run);
    moe__score_bias_grad(run, score->d_latent, run->plan->L, moe__run_grad(run, MOE__R_PROJ_BIAS));
    map.d_out = score->d_latent;
    map.d_matrix = moe__run_grad(run, MOE__R_PROJ);
    map.d_in = run->dx;
    if (run->dx && score->silu) { /* the gradient by silu(LN(x)) takes the place of that, which d_matrix reads before */
        map.d_in = NULL;
        moe__score_map_backward(&map);
        map.d_matrix = NULL;
        map.d_in = score->silu;
        map.d_in_panels = 1;
    }
    moe__score_map_backward(&map);
}
static void moe__score_latent_backward(const moe__run *run) {
    const moe__score_latent *latent = moe__score_latent_of(run->plan);
    const moe__run_score *score = &run->memory->score;
    size_t N = run->plan->N;
    float *d_router = moe__run_grad(run, MOE__R_ROUTER);
    int scaled = d_router && latent->cols != MOE__RAW;
    moe__score_map map = moe__score_last_product(run);
    moe__score_to_panels(run, run->memory->combine.soft ? run->memory->combine.d_soft : run->memory->d_logits, N);
    map.d_out = score->d_panels;
    map.d_matrix = d_router;
    map.d_in = run->dx; /* without an activation the product reads x itself */
    if (latent->act != MOE__RAW) {
        map.d_in = score->d_latent;
        map.d_in_panels = 1;
    }
    if (scaled) {
        map.d_matrix = score->d_columns;
        memset(score->d_columns, 0, run->plan->L * N * sizeof(float));
    }
    moe__score_map_backward(&map);
    if (scaled) moe__score_columns_unit_back(run, d_router, latent->cols == MOE__LN);
    moe__score_bias_grad(run, score->d_panels, N, moe__run_grad(run, MOE__R_BIAS));
    if (latent->act == MOE__RAW) return;
    moe__run_over_blocks(run, moe__score_unproject);
    if (latent->proj) moe__score_projection_backward(run);
    if (run->dx && (latent->pre || !latent->proj)) moe__run_over_blocks(run, moe__score_into_x);
}

/* -- slice: z_e = mean of slice e of x. The relu comes after the noise. -- */
static moe_status moe__score_slice_fits(const moe_desc *desc) {
    return desc->d_model % desc->n_experts ? MOE_E_SLICE : MOE_OK;
}
static void moe__score_slice_forward(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, width = run->plan->d / E;
    for (size_t t = t0; t < t1; t++)
        for (size_t e = 0; e < E; e++) {
            const float *x = run->memory->score.x + t * MOE__W;
            float sum = 0.0f;
            for (size_t i = e * width; i < (e + 1) * width; i++) sum += x[moe__score_at(run, i)];
            run->tape->logits[t * E + e] = sum / (float)width;
        }
}
static void moe__score_slice_backward(const moe__run *run) {
    size_t E = run->plan->E, width = run->plan->d / E;
    if (!run->dx) return; /* whose slices follow each other as the logits do */
    for (size_t at = 0; at < run->tape->n_tokens * E; at++)
        for (size_t i = at * width; i < (at + 1) * width; i++) run->dx[i] += run->memory->d_logits[at] / (float)width;
}

/* -- subspace: z_e = |V_e^T x| / |x|. score.latent keeps u = V_e^T x of every expert, as panels (f, T) one after the
 * other, score.x_inverse |x|. In backward u becomes du = dz u / (|u| |x|), and dV = x du^T, dx = V du - dz z x / |x|^2
 * [D]. -- */
static moe_status moe__score_subspace_fits(const moe_desc *desc) {
    int special = desc->n_zero || desc->n_copy || desc->n_constant;
    if (desc->expert != MOE_EXPERT_ORTHONORMAL || special) return MOE_E_SUBSPACE;
    return MOE_OK;
}
static moe_status moe__score_subspace_layout(const moe__plan *plan, size_t n_tokens, int training, moe__arena *arena,
                                             moe__run_score *memory) {
    size_t panels;
    (void)training;
    if (!moe__mul(plan->E, plan->hp, &panels) || panels > SIZE_MAX / MOE__W) return MOE_E_OVERFLOW;
    memory->latent = moe__take_floats(arena, n_tokens, panels * MOE__W);
    memory->x_inverse = moe__take_floats(arena, n_tokens, 1);
    return MOE_OK;
}
static const float *moe__score_basis(const moe__run *run, size_t e) {
    return run->given.experts + e * run->plan->expert;
}
static float *moe__score_subspace_u(const moe__run *run, size_t e) {
    return run->memory->score.latent + e * run->tape->n_tokens * run->plan->hp * MOE__W;
}
static void moe__score_subspace_forward(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, d = run->plan->d, f = run->plan->f;
    const float *x = run->memory->score.x;
    float *norm = run->memory->score.x_inverse;
    for (size_t t = t0; t < t1; t++) norm[t] = sqrtf(moe__score_row_dot(run, x + t * MOE__W, x + t * MOE__W, d));
    for (size_t e = 0; e < E; e++) {
        float *u = moe__score_subspace_u(run, e);
        moe__product_target to = moe__score_target(run, u, f, 1, t0);
        moe__product(run->kernels, t1 - t0, d, x + t0 * MOE__W, to.panel, moe__score_basis(run, e), &to, 1, NULL);
        for (size_t t = t0; t < t1; t++) {
            float length = sqrtf(moe__score_row_dot(run, u + t * MOE__W, u + t * MOE__W, f));
            run->tape->logits[t * E + e] = norm[t] > 0.0f ? length / norm[t] : 0.0f;
        }
    }
}
static void moe__score_subspace_dx(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, d = run->plan->d;
    for (size_t e = 0; e < E; e++) {
        float *u = moe__score_subspace_u(run, e);
        for (size_t t = t0; t < t1; t++) {
            float z = run->tape->logits[t * E + e], dz = run->memory->d_logits[t * E + e];
            float norm = run->memory->score.x_inverse[t], length = z * norm, scale = 0.0f;
            if (length > 0.0f && norm > 0.0f) scale = dz / (length * norm);
            moe__score_row_scale(run, scale, u + t * MOE__W, run->plan->f);
            if (!run->dx || !(norm > 0.0f)) continue;
            moe__score_row_add(run, -(dz * z) / (norm * norm), run->memory->score.x + t * MOE__W, d, run->dx + t * d);
        }
        if (!run->dx) continue;
        moe__product_target to = {run->dx + t0 * d, d, MOE__W, d, NULL, 0};
        moe__product_t(run->kernels, t1 - t0, run->plan->hp * MOE__W, u + t0 * MOE__W, run->tape->n_tokens * MOE__W,
                       moe__score_basis(run, e), d, 0, &to);
    }
}
static void moe__score_subspace_dv(const moe__run *run, size_t i) { /* i: an expert and a panel of d */
    size_t T = run->tape->n_tokens, d = run->plan->d, e = i / run->plan->dp, row = i % run->plan->dp * MOE__W;
    const float *du = moe__score_subspace_u(run, e), *x = run->memory->score.x + row * T;
    float *dv = run->given.d_experts + e * run->plan->expert + row * MOE__W;
    for (size_t t = 0; t < T; t += MOE__KC)
        for (size_t p = 0; p < run->plan->hp; p++)
            moe__product_outer(run->kernels, moe__min(MOE__KC, T - t), moe__min(MOE__W, d - row), x + t * MOE__W,
                               du + (p * T + t) * MOE__W, MOE__W, dv + p * d * MOE__W, MOE__W, MOE__W, 0);
}
static void moe__score_subspace_backward(const moe__run *run) {
    moe__run_over_blocks(run, moe__score_subspace_dx);
    if (run->given.d_experts)
        moe__run_over(run, run->plan->E * run->plan->dp, run->tape->n_tokens * run->plan->d, moe__score_subspace_dv);
}

/* -- hash: consecutive ids of a run of E go to E different experts, in an order of the run's own: balanced over evenly
 * used ids; the next choices are the next experts. A logit of 30 is certainty in float32. -- */
#define MOE__CERTAIN 30.0f
static void moe__score_hash_forward(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E;
    for (size_t t = t0; t < t1; t++) {
        uint64_t id = moe__run_place(run, t);
        if (run->tape->side.id) id = run->tape->side.id[moe__run_row(run, t)];
        uint64_t first = (id % E + moe_rand_u32(run->desc->seed, ~(uint64_t)0, id / E)) % E;
        float *logits = run->tape->logits + t * E;
        memset(logits, 0, E * sizeof(float));
        for (size_t i = 0; i < run->desc->top_k; i++) logits[(first + i) % E] = MOE__CERTAIN - (float)i / (float)E;
    }
}
static void moe__score_random_forward(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E;
    for (size_t t = t0; t < t1; t++) {
        uint64_t at = (uint64_t)moe__run_draw_row(run, t) * E;
        moe__run_uniforms(run, MOE__USE_SCORE, at, E, 0.0f, 1.0f, run->tape->logits + t * E);
    }
}

typedef struct moe__score_row {
    const char *name;
    int relu;    /* of the logits, after the noise */
    int blind;   /* the logits can be finite although x is not */
    int experts; /* reads the experts' parameters, tape.side.experts */
    moe__score_latent latent;
    moe_status (*fits)(const moe_desc *desc); /* this score with the rest of the desc; NULL: always */
    moe_status (*layout)(const moe__plan *plan, size_t n_tokens, int training, moe__arena *arena,
                         moe__run_score *memory); /* what it alone needs */
    void (*prepare)(const moe__run *run);                       /* once a batch, after memory->score.x */
    void (*forward)(const moe__run *run, size_t t0, size_t t1); /* tape.logits, or memory->combine.soft */
    void (*backward)(const moe__run *run); /* from memory->d_logits or d_soft: += d_router, += dx; NULL: no gradient */
} moe__score_row;
#define MOE__LATENT \
    NULL, moe__score_latent_layout, moe__score_latent_prepare, moe__score_latent_forward, moe__score_latent_backward
#define MOE__PLAIN {0, 0, 0, 0, MOE__RAW, MOE__RAW}
static const moe__score_row moe__score_table[MOE_SCORE_COUNT] = {
    {"default", 0, 0, 0, MOE__PLAIN, NULL, NULL, NULL, NULL, NULL},
    {"linear", 0, 0, 0, MOE__PLAIN, MOE__LATENT},
    {"unit", 0, 0, 0, {0, 0, 0, 0, MOE__RAW, MOE__LENGTH}, MOE__LATENT},
    {"mlp", 0, 1, 0, {0, 1, 1, 1, MOE__RELU, MOE__RAW}, MOE__LATENT},
    {"cosine", 0, 0, 0, {0, 0, 0, 0, MOE__LENGTH, MOE__LENGTH}, MOE__LATENT},
    {"projected", 0, 0, 0, {0, 1, 0, 0, MOE__LENGTH, MOE__LENGTH}, MOE__LATENT},
    {"normed", 0, 0, 0, {0, 0, 0, 1, MOE__LN, MOE__LN}, MOE__LATENT},
    {"prototype", 0, 0, 0, {1, 1, 1, 0, MOE__LENGTH, MOE__LENGTH}, MOE__LATENT},
    {"slice", 1, 1, 0, MOE__PLAIN, moe__score_slice_fits, NULL, NULL, moe__score_slice_forward,
     moe__score_slice_backward},
    {"subspace", 0, 1, 1, MOE__PLAIN, moe__score_subspace_fits, moe__score_subspace_layout, NULL,
     moe__score_subspace_forward, moe__score_subspace_backward},
    {"hash", 0, 1, 0, MOE__PLAIN, NULL, NULL, NULL, moe__score_hash_forward, NULL},
    {"random", 0, 1, 0, MOE__PLAIN, NULL, NULL, NULL, moe__score_random_forward, NULL},
    {"tanh", 0, 1, 0, {0, 1, 0, 0, MOE__TANH, MOE__RAW}, MOE__LATENT},
    {"half-cosine", 0, 0, 0, {0, 1, 0, 0, MOE__SAME, MOE__LENGTH}, MOE__LATENT},
};
#undef MOE__LATENT
#undef MOE__PLAIN
static const moe__score_latent *moe__score_latent_of(const moe__plan *plan) {
    return &moe__score_table[plan->desc.score].latent;
}
static int moe__score_is_latent(moe_score_kind kind) {
    return moe__score_table[kind].forward == moe__score_latent_forward;
}

/* The score's part of a tape. tokens: the tape's own, which are what the router sees unless jittered or averaged. */
static moe_status moe__score_layout(const moe__plan *plan, size_t n_tokens, int training, moe__arena *arena,
                                    float *tokens, moe__run_score *memory) {
    const moe__score_row *row = &moe__score_table[plan->desc.score];
    int apart = plan->jitter || plan->by_sequence || plan->view;
    size_t pack = moe__score_map_floats(plan->L, plan->N); /* the router's matrices take turns there */
    if (row->latent.proj) pack = moe__max(pack, moe__score_map_floats(plan->d, plan->L));
    if (plan->at[MOE__R_NOISE + 1] > plan->at[MOE__R_NOISE])
        pack = moe__max(pack, moe__score_map_floats(plan->d, plan->E));
    memory->packed = moe__take_floats(arena, pack, MOE__W);
    memory->x = apart ? moe__take_floats(arena, n_tokens, plan->dp * MOE__W) : tokens;
    if (training) memory->d_panels = moe__take_floats(arena, n_tokens, moe__max(plan->np, plan->ep) * MOE__W);
    if (training && apart) memory->dx = moe__take_floats(arena, n_tokens, plan->d);
    return row->layout ? row->layout(plan, n_tokens, training, arena, memory) : MOE_OK;
}

/* -- logits += previous A -- */
static void moe__score_residual_add(const moe__run *run, size_t t0, size_t t1) {
    const float *matrix = moe__run_tensor(run, MOE__R_RESIDUAL), *previous = run->tape->side.previous;
    size_t E = run->plan->E;
    if (!matrix || !previous) return;
    for (size_t t = t0; t < t1; t++)
        for (size_t i = 0; i < E; i++)
            run->kernels->axpy(E, previous[moe__run_row(run, t) * E + i], matrix + i * E, run->tape->logits + t * E);
}
static void moe__score_residual_backward(const moe__run *run) {
    const float *matrix = moe__run_tensor(run, MOE__R_RESIDUAL), *previous = run->tape->side.previous;
    float *d_matrix = moe__run_grad(run, MOE__R_RESIDUAL), *d_previous = run->tape->side.d_previous;
    size_t E = run->plan->E;
    if (!matrix || !previous) return;
    for (size_t t = 0; t < run->tape->n_tokens; t++) {
        const float *d_logits = run->memory->d_logits + t * E;
        for (size_t i = 0, at = moe__run_row(run, t) * E; i < E; i++, at++) {
            if (d_matrix) run->kernels->axpy(E, previous[at], d_logits, d_matrix + i * E);
            if (d_previous) d_previous[at] += run->kernels->dot(E, matrix + i * E, d_logits);
        }
    }
}

MOE__NAME_API(score, moe__score_table, MOE_SCORE_COUNT)

/* ==== >>noise =================================================================================
 * What is added to the logits in training. For noise that is normal the tape keeps the clean logits and the noise's
 * standard deviation, which the loss `load` reads. Uses the score's products.
 */
#define MOE__NOISE_FLOOR 0.01f /* of the learned noise, as in tensor2tensor [C] */
typedef struct moe__noise_row {
    const char *name;
    int normal;  /* the tape keeps clean and noise_std */
    int learned; /* noise_std is made from x, by the router's own matrix; else it is the desc's */
    void (*draw)(uint64_t seed, uint64_t stream, uint64_t start, size_t count, float *out); /* NULL: no noise */
} moe__noise_row;
static void moe__noise_uniform(uint64_t seed, uint64_t stream, uint64_t start, size_t count, float *out) {
    moe__uniform_at(seed, stream, start, count, 0.0f, 1.0f, out);
}
static const moe__noise_row moe__noise_table[MOE_NOISE_COUNT] = {
    {"default", 0, 0, NULL},
    {"none", 0, 0, NULL},
    {"gaussian", 1, 0, moe__normal_at},
    {"uniform", 0, 0, moe__noise_uniform},
    {"gumbel", 0, 0, moe__gumbel_at},
    {"learned", 1, 1, moe__normal_at},
};
MOE__NAME_API(noise, moe__noise_table, MOE_NOISE_COUNT)

static moe_status moe__noise_layout(const moe__plan *plan, size_t n_tokens, moe__arena *arena, moe_tape *tape,
                                    moe__run_noise *memory) {
    const moe__noise_row *row = &moe__noise_table[plan->desc.noise];
    if (row->normal) tape->clean = moe__take_floats(arena, n_tokens, plan->E);
    if (row->normal) tape->noise_std = moe__take_floats(arena, n_tokens, plan->E);
    if (row->learned) memory->raw = moe__take_floats(arena, n_tokens, plan->E);
    if (row->draw) memory->draw = moe__take_floats(arena, n_tokens, plan->E);
    return MOE_OK;
}

static moe__score_map moe__noise_map(const moe__run *run) {
    const float *matrix = moe__run_tensor(run, MOE__R_NOISE);
    moe__score_map map = {run, run->memory->score.x, run->plan->d, matrix, run->plan->E, NULL, NULL, NULL, 0};
    return map;
}
static void moe__noise_raw(const moe__run *run, size_t t0, size_t t1) {
    size_t count = (t1 - t0) * run->plan->E;
    float *raw = run->memory->noise.raw + t0 * run->plan->E, *std = run->tape->noise_std + t0 * run->plan->E;
    moe__score_map map = moe__noise_map(run);
    moe__score_map_forward(&map, run->memory->noise.raw, 0, t0, t1);
    /* softplus r = max(r, 0) + log(1 + e^-|r|) */
    for (size_t i = 0; i < count; i++) std[i] = -fabsf(raw[i]);
    run->kernels->exp(count, std, std);
    for (size_t i = 0; i < count; i++) std[i] += 1.0f;
    run->kernels->log(count, std, std);
    for (size_t i = 0; i < count; i++) {
        if (raw[i] > 0.0f) std[i] += raw[i];
        std[i] += MOE__NOISE_FLOOR;
    }
}
/* The slope of softplus, sigmoid(raw) = 1 - e^-softplus(raw), at numbers [at, at + count) */
static void moe__noise_slope(const moe__run *run, size_t at, size_t count, float *slope) {
    for (size_t i = 0; i < count; i++) slope[i] = MOE__NOISE_FLOOR - run->tape->noise_std[at + i];
    run->kernels->exp(count, slope, slope);
    for (size_t i = 0; i < count; i++) slope[i] = 1.0f - slope[i];
}
static void moe__noise_prepare(const moe__run *run) {
    if (!moe__noise_table[run->desc->noise].learned) return;
    moe__score_map map = moe__noise_map(run);
    moe__score_map_pack(&map);
    moe__run_over_blocks(run, moe__noise_raw);
}
static void moe__noise_add(const moe__run *run, size_t t0, size_t t1) {
    const moe__noise_row *row = &moe__noise_table[run->desc->noise];
    size_t E = run->plan->E, begin = t0 * E, end = t1 * E;
    float *std = run->tape->noise_std;
    if (row->normal) memcpy(run->tape->clean + begin, run->tape->logits + begin, (end - begin) * sizeof(float));
    if (row->normal && !row->learned)
        for (size_t i = begin; i < end; i++) std[i] = run->desc->noise_std;
    if (!row->draw || !run->memory->now.training) return;
    for (size_t t = t0; t < t1; t++) {
        uint64_t at = (uint64_t)moe__run_draw_row(run, t) * E;
        row->draw(MOE__DRAW_KEY(run), moe__run_stream(run, MOE__USE_NOISE), at, E, run->memory->noise.draw + t * E);
    }
    for (size_t i = begin; i < end; i++) {
        float scale = row->learned ? std[i] : run->desc->noise_std;
        run->tape->logits[i] = moe__fma(run->memory->noise.draw[i], scale, run->tape->logits[i]);
    }
}
/* d raw = dz N sigmoid(raw); 0 where no noise was added */
static void moe__noise_backward(const moe__run *run) {
    size_t count = run->tape->n_tokens * run->plan->E;
    float *raw = run->memory->noise.raw;
    if (!moe__noise_table[run->desc->noise].learned) return;
    memset(raw, 0, count * sizeof(float));
    if (!run->memory->now.training) return;
    moe__noise_slope(run, 0, count, raw);
    for (size_t i = 0; i < count; i++) raw[i] = run->memory->d_logits[i] * run->memory->noise.draw[i] * raw[i];
}
/* From d raw, to which the loss `load` has added, to the matrix and x. */
static void moe__noise_backward_map(const moe__run *run) {
    if (!moe__noise_table[run->desc->noise].learned) return;
    moe__score_map map = moe__noise_map(run);
    moe__score_to_panels(run, run->memory->noise.raw, run->plan->E);
    map.d_out = run->memory->score.d_panels;
    map.d_matrix = moe__run_grad(run, MOE__R_NOISE);
    map.d_in = run->dx;
    moe__score_map_backward(&map);
}

/* ==== >>gate ==================================================================================
 * Logits -> tape.scores (T, E), and from the choices of the selection their weights, tape.weight (T, S); and back. Its
 * moe__gate_table says what the scores are, how a token's weights come from its choices, and the gradient of both.
 */
static moe_status moe__gate_softmax_args(size_t rows, size_t cols, float temperature, size_t *count) {
    if (!moe__temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    return moe__mul(rows, cols, count) ? MOE_OK : MOE_E_OVERFLOW;
}
MOE_API moe_status moe_softmax(size_t rows, size_t cols, float temperature, const float *logits, float *scores) {
    size_t count;
    moe_status status = moe__gate_softmax_args(rows, cols, temperature, &count);
    if (status || !count) return status;
    if (!logits) return MOE_E_NULL_LOGITS;
    if (!scores) return MOE_E_NULL_SCORES;
    const moe__kernels *kernels = moe__dispatched();
    if (!moe__all_finite(count, logits)) return MOE_E_NAN_LOGITS;
    for (size_t r = 0; r < rows; r++) kernels->softmax(cols, 1.0f / temperature, logits + r * cols, scores + r * cols);
    return MOE_OK;
}
/* dz += p * (dp - <p, dp>) / temperature */
MOE_API moe_status moe_softmax_backward(size_t rows, size_t cols, float temperature, const float *scores,
                                        const float *d_scores, float *d_logits) {
    size_t count;
    moe_status status = moe__gate_softmax_args(rows, cols, temperature, &count);
    if (status || !count) return status;
    if (!scores || !d_scores) return MOE_E_NULL_SCORES;
    if (!d_logits) return MOE_E_NULL_LOGITS;
    const moe__kernels *kernels = moe__dispatched();
    float inv_t = 1.0f / temperature;
    for (size_t r = 0; r < rows; r++, scores += cols, d_scores += cols, d_logits += cols) {
        float mean = kernels->dot(cols, scores, d_scores);
        for (size_t c = 0; c < cols; c++) d_logits[c] = moe__fma(inv_t * scores[c], d_scores[c] - mean, d_logits[c]);
    }
    return MOE_OK;
}

/* Weights are divided by their sum, in slot order; all zero stays so. Returns the sum. */
static float moe__gate_normalize(size_t slots, float *weight) {
    float sum = 0.0f;
    for (size_t i = 0; i < slots; i++) sum += weight[i];
    if (sum > 0.0f)
        for (size_t i = 0; i < slots; i++) weight[i] /= sum;
    return sum;
}
/* The gradient by normalised weights -> that by the unnormalised, whose sum was `sum`. */
static void moe__gate_normalize_back(size_t slots, const float *weight, float sum, float *d_weight) {
    float mean = 0.0f;
    for (size_t i = 0; i < slots; i++) mean = moe__fma(weight[i], d_weight[i], mean);
    if (sum > 0.0f)
        for (size_t i = 0; i < slots; i++) d_weight[i] = (d_weight[i] - mean) / sum;
    else memset(d_weight, 0, slots * sizeof(float));
}

/* -- scores of a gate's own: from `count` logits, and their slopes, the derivative of each by its logit -- */
static void moe__gate_relu(const moe__run *run, size_t count, const float *logits, float *scores) {
    (void)run;
    for (size_t i = 0; i < count; i++) scores[i] = logits[i] > 0.0f ? logits[i] : 0.0f;
}
static void moe__gate_relu_slope(float inv_t, size_t count, const float *scores, float *slope) {
    (void)inv_t;
    for (size_t i = 0; i < count; i++) slope[i] = (float)(scores[i] > 0.0f);
}
/* 1 / (1 + e^-(z / temperature)), without overflow */
static void moe__gate_sigmoid(const moe__run *run, size_t total, const float *logits, float *scores) {
    float power[MOE__W], scaled[MOE__W];
    for (size_t begin = 0; begin < total; begin += MOE__W) {
        size_t count = moe__min(MOE__W, total - begin);
        for (size_t i = 0; i < count; i++) {
            scaled[i] = run->memory->now.inv_t * logits[begin + i];
            power[i] = -fabsf(scaled[i]);
        }
        run->kernels->exp(count, power, power);
        for (size_t i = 0; i < count; i++) scores[begin + i] = (scaled[i] < 0.0f ? power[i] : 1.0f) / (1.0f + power[i]);
    }
}
static void moe__gate_sigmoid_slope(float inv_t, size_t count, const float *scores, float *slope) {
    for (size_t i = 0; i < count; i++) slope[i] = inv_t * (scores[i] * (1.0f - scores[i]));
}
/* The softmax is the tape's prob, but for a temperature that is learned: prob does not have that. */
static void moe__gate_softmax(const moe__run *run, size_t count, const float *logits, float *scores) {
    size_t E = run->plan->E;
    for (size_t at = 0; at < count; at += E) run->kernels->softmax(E, run->memory->now.inv_t, logits + at, scores + at);
}

/* -- what a gate gives for one token: value = the weights of its choices before normalisation, 0 where there is none;
 * back = from their gradient (S) to that by the logits (E) -- */
typedef struct moe__gate_token {
    const moe__run *run;
    size_t t, S, E;
    const int32_t *index;         /* (S) */
    const float *logits, *scores; /* (E) */
    float *work;                  /* (E) scratch */
    float inv_t;
    int32_t none, none_end;       /* experts that a softmax of the selected leaves out */
} moe__gate_token;
static moe__gate_token moe__gate_token_of(const moe__run *run, size_t t) {
    size_t S = run->plan->S, at = t * run->plan->E;
    const moe_tape *tape = run->tape;
    moe__gate_token token = {run, t, S, run->plan->E, tape->index + t * S, tape->logits + at, tape->scores + at,
                             run->memory->select.work + at, run->memory->now.inv_t, 0, 0};
    return token;
}
static size_t moe__gate_choices(const moe__gate_token *token) {
    size_t count = 0;
    for (size_t i = 0; i < token->S; i++) count += token->index[i] >= 0;
    return count;
}
static void moe__gate_scores_value(const moe__gate_token *token, float *weight) {
    for (size_t i = 0; i < token->S; i++) weight[i] = token->index[i] < 0 ? 0.0f : token->scores[token->index[i]];
}
static void moe__gate_softmax_back(const moe__gate_token *token, float *d_weight, float *d_logits) {
    const int32_t *index = token->index;
    float inv_t = token->inv_t, mean = 0.0f;
    for (size_t i = 0; i < token->S; i++)
        if (index[i] >= 0) mean = moe__fma(token->scores[index[i]], d_weight[i], mean);
    token->run->kernels->axpy(token->E, -(mean * inv_t), token->scores, d_logits);
    for (size_t i = 0; i < token->S; i++) {
        if (index[i] < 0) continue;
        float *dz = d_logits + index[i];
        *dz = moe__fma(inv_t * token->scores[index[i]], d_weight[i], *dz);
    }
}
static int moe__gate_has(const moe__gate_token *token, size_t i) {
    int32_t e = token->index[i];
    return e >= 0 && !(e >= token->none && e < token->none_end);
}
static void moe__gate_selected_value(const moe__gate_token *token, float *weight) {
    size_t count = 0;
    for (size_t i = 0; i < token->S; i++)
        if (moe__gate_has(token, i)) weight[count++] = token->logits[token->index[i]];
    if (count) token->run->kernels->softmax(count, token->inv_t, weight, weight);
    for (size_t i = token->S; i-- > 0;) weight[i] = moe__gate_has(token, i) ? weight[--count] : 0.0f;
}
static void moe__gate_selected_back(const moe__gate_token *token, float *d_weight, float *d_logits) {
    float *weight = token->work, mean = 0.0f;
    moe__gate_selected_value(token, weight); /* again, before scaling */
    for (size_t i = 0; i < token->S; i++) mean = moe__fma(weight[i], d_weight[i], mean);
    for (size_t i = 0; i < token->S; i++) {
        if (!moe__gate_has(token, i)) continue;
        float *dz = d_logits + token->index[i];
        *dz = moe__fma(token->inv_t * weight[i], d_weight[i] - mean, *dz);
    }
}
static void moe__gate_own_back(const moe__gate_token *token, float *d_weight, float *d_logits); /* after the table */
static void moe__gate_sign_value(const moe__gate_token *token, float *weight) {
    float share = 1.0f / (float)moe__max(1, moe__gate_choices(token));
    for (size_t i = 0; i < token->S; i++) weight[i] = share * (float)(token->index[i] >= 0);
}
static void moe__gate_sign_back(const moe__gate_token *token, float *d_weight, float *d_logits) {
    float count = (float)moe__gate_choices(token);
    for (size_t i = 0; i < token->S; i++) d_weight[i] = token->index[i] < 0 ? 0.0f : d_weight[i] / count;
    moe__gate_own_back(token, d_weight, d_logits);
}
/* SparseMixer: the softmax p (E) among the experts that choice i of a token could have been. Earlier choices and logits
 * further below the highest than 2 * mask_jitter of max(|z|, highest) are out: p = 0. Returns the highest left. */
static size_t moe__gate_sparse_row(const moe__gate_token *token, size_t i, float *p) {
    size_t E = token->E, best = E;
    const float *logits = token->logits;
    float sum = 0.0f, power[MOE__W];
    for (size_t e = 0; e < E; e++) {
        p[e] = 1.0f;
        for (size_t l = 0; l < i; l++)
            if (token->index[l] == (int32_t)e) p[e] = 0.0f;
        if (p[e] > 0.0f && (best == E || logits[e] > logits[best])) best = e;
    }
    float highest = logits[best];
    for (size_t e = 0; e < E; e++) {
        float scale = fabsf(logits[e]);
        if (!(scale > highest)) scale = highest;
        if (p[e] > 0.0f && highest - logits[e] > 2.0f * token->run->desc->mask_jitter * scale) p[e] = 0.0f;
    }
    for (size_t begin = 0; begin < E; begin += MOE__W) {
        size_t count = moe__min(MOE__W, E - begin);
        for (size_t l = 0; l < count; l++)
            power[l] = p[begin + l] > 0.0f ? (logits[begin + l] - highest) * token->inv_t : 0.0f;
        token->run->kernels->exp(count, power, power);
        for (size_t l = 0; l < count; l++) {
            p[begin + l] *= power[l];
            sum += p[begin + l];
        }
    }
    for (size_t e = 0; e < E; e++) p[e] /= sum;
    return best;
}
/* p of the choice; in training a third of it unless it was the highest or a number above 0.75 is drawn */
static void moe__gate_sparse_value(const moe__gate_token *token, float *weight) {
    const moe__run *run = token->run;
    for (size_t i = 0; i < token->S; i++) {
        float drawn;
        weight[i] = 0.0f;
        if (token->index[i] < 0) continue;
        size_t best = moe__gate_sparse_row(token, i, token->work);
        moe__run_uniforms(run, MOE__USE_KEEP, (uint64_t)token->t * token->S + i, 1, 0.0f, 1.0f, &drawn);
        weight[i] = token->work[token->index[i]];
        if (run->memory->now.training && (int32_t)best != token->index[i] && !(drawn > 0.75f)) weight[i] *= 1.0f / 3.0f;
    }
}
static void moe__gate_sparse_back(const moe__gate_token *token, float *d_weight, float *d_logits) {
    for (size_t i = 0; i < token->S; i++) {
        if (token->index[i] < 0) continue;
        moe__gate_sparse_row(token, i, token->work);
        /* the third is not in the gradient [C] */
        float back = d_weight[i] * token->work[token->index[i]] * token->inv_t;
        token->run->kernels->axpy(token->E, -back, token->work, d_logits);
        d_logits[token->index[i]] += back;
    }
}

/* -- the table -- */
typedef enum moe__gate_scores_are { MOE__SCORES_PROB, MOE__SCORES_LOGITS, MOE__SCORES_OWN } moe__gate_scores_are;
typedef struct moe__gate_row {
    const char *name;
    moe__gate_scores_are scores; /* tape.scores */
    int sees_logits;             /* a selection by scores goes by the logits instead */
    int normalizes;              /* its weights are what they should be: desc.normalize has no effect */
    int exponential;             /* small scores are exponentials of the logits, but for a factor of the token */
    moe_select_kind select;      /* the only selection that suits it; default: any */
    void (*own)(const moe__run *run, size_t count, const float *logits, float *scores); /* of whole tokens */
    void (*slope)(float inv_t, size_t count, const float *scores, float *slope);        /* of MOE__SCORES_OWN */
    void (*value)(const moe__gate_token *token, float *weight);
    void (*back)(const moe__gate_token *token, float *d_weight, float *d_logits);
} moe__gate_row;
#define MOE__ANY MOE_SELECT_DEFAULT
static const moe__gate_row moe__gate_table[MOE_GATE_COUNT] = {
    {"default", MOE__SCORES_PROB, 0, 0, 0, MOE__ANY, NULL, NULL, NULL, NULL},
    {"softmax", MOE__SCORES_PROB, 0, 0, 1, MOE__ANY, moe__gate_softmax, NULL, moe__gate_scores_value,
     moe__gate_softmax_back},
    {"softmax-selected", MOE__SCORES_LOGITS, 0, 1, 0, MOE__ANY, NULL, NULL, moe__gate_selected_value,
     moe__gate_selected_back},
    {"sigmoid", MOE__SCORES_OWN, 0, 0, 1, MOE__ANY, moe__gate_sigmoid, moe__gate_sigmoid_slope, moe__gate_scores_value,
     moe__gate_own_back},
    {"relu", MOE__SCORES_OWN, 0, 0, 0, MOE__ANY, moe__gate_relu, moe__gate_relu_slope, moe__gate_scores_value,
     moe__gate_own_back},
    {"sign", MOE__SCORES_OWN, 1, 1, 0, MOE_SELECT_THRESHOLD, moe__gate_sigmoid, moe__gate_sigmoid_slope,
     moe__gate_sign_value, moe__gate_sign_back},
    {"sparsemixer", MOE__SCORES_LOGITS, 0, 1, 0, MOE_SELECT_SAMPLED, NULL, NULL, moe__gate_sparse_value,
     moe__gate_sparse_back},
};
#undef MOE__ANY
MOE__NAME_API(gate, moe__gate_table, MOE_GATE_COUNT)

/* The gate's part of a tape, which has logits and prob. */
static moe_status moe__gate_layout(const moe__plan *plan, size_t n_tokens, int training, moe__arena *arena,
                                   moe_tape *tape, moe__run_gate *memory) {
    moe__gate_scores_are scores = moe__gate_table[plan->desc.gate].scores;
    tape->scores = tape->prob;
    if (scores == MOE__SCORES_LOGITS) tape->scores = tape->logits;
    if (scores == MOE__SCORES_OWN || (scores == MOE__SCORES_PROB && plan->desc.learn_temperature == MOE_ON))
        tape->scores = memory->scores = moe__take_floats(arena, n_tokens, plan->E);
    if (training) memory->d_weight = moe__take_floats(arena, n_tokens, plan->S);
    if (plan->desc.random_second == MOE_ON)
        memory->before = (int32_t *)(void *)moe__take_floats(arena, n_tokens, plan->S);
    return MOE_OK;
}

/* The scores of a block of tokens, from the logits; prob is there. */
static void moe__gate_scores(const moe__run *run, size_t t0, size_t t1) {
    size_t begin = t0 * run->plan->E, count = (t1 - t0) * run->plan->E;
    float *scores = run->memory->gate.scores;
    if (scores) moe__gate_table[run->desc->gate].own(run, count, run->tape->logits + begin, scores + begin);
}
/* d_logits += d_scores by the slope of scores of the gate's own. */
static void moe__gate_scores_back(const moe__run *run, const float *d_scores) {
    size_t total = run->tape->n_tokens * run->plan->E;
    float slope[MOE__W];
    for (size_t begin = 0; begin < total; begin += MOE__W) {
        size_t count = moe__min(MOE__W, total - begin);
        float *dz = run->memory->d_logits + begin;
        moe__gate_table[run->desc->gate].slope(run->memory->now.inv_t, count, run->tape->scores + begin, slope);
        for (size_t i = 0; i < count; i++) dz[i] = moe__fma(slope[i], d_scores[begin + i], dz[i]);
    }
}
static void moe__gate_own_back(const moe__gate_token *token, float *d_weight, float *d_logits) {
    const moe__gate_row *gate = &moe__gate_table[token->run->desc->gate];
    for (size_t i = 0; i < token->S; i++) {
        float slope;
        if (token->index[i] < 0) continue;
        gate->slope(token->inv_t, 1, token->scores + token->index[i], &slope);
        float *dz = d_logits + token->index[i];
        if (slope > 0.0f) *dz = moe__fma(slope, d_weight[i], *dz);
    }
}

/* -- from choices to weights. Some lose their choice on the way, and then their weight. -- */
static void moe__gate_take_away(int32_t *choice, float *weight) {
    *choice = -1;
    *weight = 0.0f;
}
/* Second and later choices stay with probability top_k w. */
static void moe__gate_random_second(const moe__run *run, size_t t, int32_t *index, float *weight) {
    memcpy(run->memory->gate.before + t * run->plan->S, index, run->plan->S * sizeof(int32_t));
    for (size_t i = 1; i < run->plan->S; i++) {
        float drawn;
        if (index[i] < 0) continue;
        moe__run_uniforms(run, MOE__USE_SECOND, (uint64_t)t * run->plan->S + i, 1, 0.0f, 1.0f, &drawn);
        if (!((float)run->desc->top_k * weight[i] > drawn)) moe__gate_take_away(index + i, weight + i);
    }
}
/* Experts are dropped for a whole sequence; a token that would have no other keeps them. */
static int moe__gate_dropped(const moe__run *run, size_t t, int32_t expert) {
    uint64_t at = (uint64_t)moe__run_sequence_of(run, t) * run->plan->E + (uint64_t)expert;
    float drawn;
    moe__run_uniforms(run, MOE__USE_EXPERT_DROP, at, 1, 0.0f, 1.0f, &drawn);
    return drawn < run->desc->expert_drop;
}
static void moe__gate_drop(const moe__run *run, size_t t, int32_t *index, float *weight) {
    float kept = 0.0f;
    for (size_t i = 0; i < run->plan->S; i++)
        if (index[i] >= 0 && !moe__gate_dropped(run, t, index[i])) kept += weight[i];
    if (!(kept > 0.0f)) return;
    for (size_t i = 0; i < run->plan->S; i++)
        if (index[i] >= 0 && moe__gate_dropped(run, t, index[i])) moe__gate_take_away(index + i, weight + i);
}
/* Zero experts add nothing: their weight, or the gradient by it, is 0 whatever the gate gives. */
static void moe__gate_zero_experts(const moe__run *run, const int32_t *index, float *weight) {
    size_t first = run->plan->F, end = first + run->desc->n_zero;
    for (size_t i = 0; i < run->plan->S; i++)
        if (index[i] >= 0 && (size_t)index[i] >= first && (size_t)index[i] < end) weight[i] = 0.0f;
}
static void moe__gate_scale(const moe__run *run, float *weight) {
    if (run->desc->weight_scale == 1.0f) return;
    for (size_t i = 0; i < run->plan->S; i++) weight[i] *= run->desc->weight_scale;
}
static int moe__gate_normalized(const moe__run *run) {
    return run->desc->normalize == MOE_ON && !moe__gate_table[run->desc->gate].normalizes;
}
/* Whether the weights are those over the choices before random second, of which those that stay keep theirs. */
static int moe__gate_keeps(const moe__run *run) {
    if (!run->memory->now.training || run->desc->random_second != MOE_ON) return 0;
    return !moe__gate_normalized(run) || run->desc->normalize_late != MOE_ON;
}
/* Scores whose sum is so small that some may have underflowed have no shares that can be computed. Those of a softmax
 * and a sigmoid are exponentials of the logits there (of a sigmoid within 1e-30), so that their shares are the softmax
 * of the selected logits. Zero experts have no share. */
#define MOE__GATE_TINY 1e-30f /* exp is 0 below e^-86.5: against this sum that is less than a rounding */
static int moe__gate_underflows(moe__gate_token *token, float sum) {
    const moe__run *run = token->run;
    if (!(sum < MOE__GATE_TINY) || !moe__gate_table[run->desc->gate].exponential) return 0;
    token->none = (int32_t)run->plan->F;
    token->none_end = (int32_t)(run->plan->F + run->desc->n_zero);
    return 1;
}
static void moe__gate_shares_of(moe__gate_token *token, float *weight) {
    if (moe__gate_underflows(token, moe__gate_normalize(token->S, weight))) moe__gate_selected_value(token, weight);
}
/* index -> weight of a block of tokens; may take choices away (random second, expert dropout) */
static void moe__gate_weights(const moe__run *run, size_t t0, size_t t1) {
    size_t S = run->plan->S;
    int training = run->memory->now.training, keeps = moe__gate_keeps(run);
    for (size_t t = t0; t < t1; t++) {
        moe__gate_token token = moe__gate_token_of(run, t);
        int32_t *index = run->tape->index + t * S;
        float *weight = run->tape->weight + t * S;
        moe__gate_table[run->desc->gate].value(&token, weight);
        moe__gate_zero_experts(run, index, weight);
        if (keeps && moe__gate_normalized(run)) moe__gate_shares_of(&token, weight);
        if (training && run->desc->random_second == MOE_ON) moe__gate_random_second(run, t, index, weight);
        if (training && run->desc->expert_drop > 0.0f) moe__gate_drop(run, t, index, weight);
        if (!keeps && moe__gate_normalized(run)) moe__gate_shares_of(&token, weight);
        moe__gate_scale(run, weight);
    }
}
/* memory->gate.d_weight -> memory->d_logits; d_weight is then the gradient by the gate's value */
static void moe__gate_weights_back(const moe__run *run, size_t t0, size_t t1) {
    const moe__gate_row *gate = &moe__gate_table[run->desc->gate];
    for (size_t t = t0; t < t1; t++) {
        moe__gate_token token = moe__gate_token_of(run, t);
        float *d_weight = run->memory->gate.d_weight + t * token.S;
        if (moe__gate_keeps(run)) token.index = run->memory->gate.before + t * token.S;
        moe__gate_scale(run, d_weight);
        if (moe__gate_normalized(run)) { /* with the weights made again, without scale */
            gate->value(&token, token.work);
            moe__gate_zero_experts(run, token.index, token.work);
            float sum = moe__gate_normalize(token.S, token.work);
            if (moe__gate_underflows(&token, sum)) {
                moe__gate_selected_back(&token, d_weight, run->memory->d_logits + t * token.E);
                continue;
            }
            moe__gate_normalize_back(token.S, token.work, sum, d_weight);
        }
        moe__gate_zero_experts(run, token.index, d_weight);
        gate->back(&token, d_weight, run->memory->d_logits + t * token.E);
    }
}

/* Scores (T, E) with the same shares of each token's sum: where that underflows they are the softmax of the logits.
 * And back: what is added to d_logits for these tokens is done with, the rest goes as scores do. */
static int moe__gate_row_underflows(const moe__run *run, size_t t) {
    moe__gate_token token = moe__gate_token_of(run, t);
    float sum = 0.0f;
    for (size_t e = 0; e < token.E; e++) sum += token.scores[e];
    return moe__gate_underflows(&token, sum);
}
static const float *moe__gate_shares(const moe__run *run) {
    size_t E = run->plan->E, n_tokens = run->tape->n_tokens;
    float *shares = run->memory->select.view;
    memcpy(shares, run->tape->scores, n_tokens * E * sizeof(float));
    for (size_t t = 0; t < n_tokens; t++)
        if (moe__gate_row_underflows(run, t)) moe__gate_softmax(run, E, run->tape->logits + t * E, shares + t * E);
    return shares;
}
static void moe__gate_shares_back(const moe__run *run, const float *shares, float *d_shares) {
    size_t E = run->plan->E;
    for (size_t t = 0; t < run->tape->n_tokens; t++, shares += E, d_shares += E) {
        if (!moe__gate_row_underflows(run, t)) continue;
        float *dz = run->memory->d_logits + t * E, mean = run->kernels->dot(E, shares, d_shares);
        run->kernels->slope(E, run->memory->now.inv_t, 1.0f, mean, d_shares, shares, dz);
        memset(d_shares, 0, E * sizeof(float));
    }
    moe__gate_scores_back(run, run->memory->select.work);
}

/* Gradients of the gate's own parameters, after moe__gate_weights_back and before anything else adds to d_logits: with
 * z' = z e^log_scale, d log_scale = sum dz z; a learned threshold g stands against z, so d g = -sum of choices [D]. */
static void moe__gate_params_back(const moe__run *run) {
    const moe__gate_row *gate = &moe__gate_table[run->desc->gate];
    size_t E = run->plan->E, n_tokens = run->tape->n_tokens;
    float *d_scale = moe__run_grad(run, MOE__R_SCALE), *d_threshold = moe__run_grad(run, MOE__R_THRESHOLD);
    const float *threshold = moe__run_tensor(run, MOE__R_THRESHOLD);
    if (d_scale)
        for (size_t t = 0; t < n_tokens; t++)
            *d_scale += run->kernels->dot(E, run->memory->d_logits + t * E, run->tape->logits + t * E);
    if (!threshold) return;
    for (size_t pair = 0; pair < n_tokens * run->plan->S; pair++) {
        int32_t e = run->tape->index[pair];
        float score, slope;
        if (e < 0) continue;
        gate->own(run, 1, threshold + e, &score);
        gate->slope(run->memory->now.inv_t, 1, &score, &slope);
        float back = slope * run->memory->gate.d_weight[pair];
        if (d_threshold) d_threshold[e] -= back;
        if (d_scale) *d_scale -= moe__fma(back, threshold[e], 0.0f);
    }
}

/* ==== >>select ================================================================================
 * Scores (T, E) -> the choices of each token, tape.index (T, S), best first, -1 for none. First the selections on plain
 * arrays, then those of the pipeline and moe__select_table. Uses the gate: what to choose by, and SparseMixer's rows.
 */
/* What all selections ask of their arguments. */
static moe_status moe__select_args(size_t rows, size_t cols, size_t top_k, const void *scores, const void *index) {
    size_t count;
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (!top_k || top_k > cols) return MOE_E_TOP_K;
    if (!moe__mul(rows, cols, &count) || count > SIZE_MAX / sizeof(float)) return MOE_E_OVERFLOW;
    if (rows && !scores) return MOE_E_NULL_SCORES;
    if (rows && !index) return MOE_E_NULL_INDEX;
    return MOE_OK;
}

/* Scores that are no numbers choose nobody: every entry is -1. */
static moe_status moe__select_nobody(size_t rows, size_t slots, int32_t *index) {
    for (size_t i = 0; i < rows * slots; i++) index[i] = -1;
    return MOE_E_NAN_LOGITS;
}

MOE_API moe_status moe_topk(size_t rows, size_t cols, size_t top_k, const float *scores, int32_t *index, float *value) {
    moe_status status = moe__select_args(rows, cols, top_k, scores, index);
    if (status || !rows) return status;
    if (moe__dispatched()->topk(rows, cols, top_k, scores, index, value)) return MOE_OK;
    if (value) memset(value, 0, rows * top_k * sizeof(float));
    return moe__select_nobody(rows, top_k, index);
}

/* Column e, not below those before it, goes to its place among the `most` best so far; how many they are now:
 *
 *     best first:  9 7 7 4    and 7 comes:  9 7 7 [7] 4    with most = 4:  9 7 7 [7]    equals stand in order of column
 *
 * minus: what is taken from each score, or NULL. */
static float moe__select_value(const float *scores, const float *minus, size_t e) {
    return minus ? scores[e] - minus[e] : scores[e];
}
static size_t moe__select_insert(size_t have, size_t most, const float *scores, const float *minus, int32_t *index,
                                 size_t e) {
    float value = moe__select_value(scores, minus, e);
    size_t i = moe__min(have, most); /* most: nobody's place yet */
    for (; i; i--) {
        if (!(value > moe__select_value(scores, minus, (size_t)index[i - 1]))) break;
        if (i < most) index[i] = index[i - 1];
    }
    if (i < most) index[i] = (int32_t)e;
    return moe__min(have + 1, most);
}

/* The sum of the `most` highest of a group's scores, the highest first. */
static float moe__select_best_of(size_t count, size_t most, const float *scores) {
    int32_t best[256];
    size_t have = 1;
    best[0] = 0;
    for (size_t i = 1; i < count; i++) have = moe__select_insert(have, most, scores, NULL, best, i);
    float sum = scores[best[0]];
    for (size_t i = 1; i < have; i++) sum += scores[best[i]];
    return sum;
}
MOE_API moe_status moe_topk_groups_best(size_t rows, size_t cols, size_t top_k, size_t n_groups, size_t top_groups,
                                        size_t group_best, const float *scores, int32_t *index) {
    float group[256];
    int32_t chosen[256];
    moe_status status = moe__select_args(rows, cols, top_k, scores, index);
    if (status) return status;
    if (!n_groups || n_groups > 256 || cols % n_groups) return MOE_E_GROUPS;
    size_t width = cols / n_groups;
    if (!top_groups || top_groups > n_groups || top_k > top_groups * width) return MOE_E_TOP_GROUPS;
    if (!group_best || group_best > 256) return MOE_E_GROUP_BEST;
    for (size_t i = 0; i < rows * cols; i++)
        if (!(scores[i] <= FLT_MAX)) return moe__select_nobody(rows, top_k, index);
    for (size_t r = 0; r < rows; r++, scores += cols, index += top_k) {
        size_t have = 0;
        for (size_t g = 0; g < n_groups; g++) group[g] = moe__select_best_of(width, group_best, scores + g * width);
        for (size_t g = 0; g < n_groups; g++) have = moe__select_insert(have, top_groups, group, NULL, chosen, g);
        for (size_t g = 0; g < n_groups; g++) group[g] = 0.0f; /* from here on: 1 = kept, to visit them in order */
        for (size_t i = 0; i < top_groups; i++) group[chosen[i]] = 1.0f;
        have = 0;
        for (size_t e = 0; e < cols; e++)
            if (group[e / width] > 0.0f) have = moe__select_insert(have, top_k, scores, NULL, index, e);
    }
    return MOE_OK;
}
MOE_API moe_status moe_topk_groups(size_t rows, size_t cols, size_t top_k, size_t n_groups, size_t top_groups,
                                   const float *scores, int32_t *index) {
    return moe_topk_groups_best(rows, cols, top_k, n_groups, top_groups, 2, scores, index);
}

MOE_API moe_status moe_topk_threshold(size_t rows, size_t cols, size_t top_k, float threshold, const float *per_col,
                                      int fallback, const float *scores, int32_t *index) {
    moe_status status = moe__select_args(rows, cols, top_k, scores, index);
    if (status) return status;
    if (!moe__finite(threshold) || (per_col && !moe__all_finite(cols, per_col))) return MOE_E_THRESHOLD;
    if (rows && moe__any_nan(rows * cols, scores)) return moe__select_nobody(rows, top_k, index);
    for (size_t r = 0; r < rows; r++, scores += cols, index += top_k) {
        size_t have = 0;
        for (size_t e = 0; e < cols; e++)
            if (scores[e] > (per_col ? threshold + per_col[e] : threshold))
                have = moe__select_insert(have, top_k, scores, per_col, index, e);
        if (!have && fallback)
            for (size_t e = 0; e < cols; e++) have = moe__select_insert(have, 1, scores, NULL, index, e);
        for (; have < top_k; have++) index[have] = -1;
    }
    return MOE_OK;
}

MOE_API moe_status moe_top_p(size_t rows, size_t cols, size_t top_k, float p, const float *prob, int32_t *index) {
    moe_status status = moe__select_args(rows, cols, top_k, prob, index);
    if (status) return status == MOE_E_NULL_SCORES ? MOE_E_NULL_PROB : status;
    if (!(p >= 0.0f && p <= 1.0f)) return MOE_E_TOP_P;
    if (!moe__dispatched()->topk(rows, cols, top_k, prob, index, NULL)) return moe__select_nobody(rows, top_k, index);
    for (size_t r = 0; r < rows; r++, prob += cols, index += top_k) {
        float sum = 0.0f;
        size_t i = 0;
        while (i < top_k && !(sum > p)) sum += prob[index[i++]];
        for (; i < top_k; i++) index[i] = -1;
    }
    return MOE_OK;
}

/* -- the k highest of many, in the same time whatever they are. The numbers' bits, turned so that they order as the
 * numbers do, are counted in three passes, each among those that share the upper bits found so far:
 *
 *     31 ... 21 | 20 ... 10 | 9 ... 0     2048, 2048, 1024 bins; from the top bin down, the one that holds the
 *       first       second     third      k-th highest gives the next bits -- */
static uint32_t moe__select_order(float x) { /* -0 with 0; no NaN */
    uint32_t bits = moe__bits_of(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
/* The turned bits of the rank-th highest of `total` numbers (0 < rank <= total). *above: how many are higher. */
static uint32_t moe__select_kth(size_t total, size_t rank, const float *values, size_t *above) {
    static const int shift[] = {21, 10, 0}, width[] = {11, 11, 10};
    uint32_t prefix = 0, count[2048];
    *above = 0;
    for (int pass = 0; pass < 3; pass++) {
        uint32_t bins = (uint32_t)1 << width[pass], bin = bins - 1;
        int top = shift[pass] + width[pass];
        memset(count, 0, bins * sizeof(uint32_t));
        for (size_t i = 0; i < total; i++) {
            uint32_t bits = moe__select_order(values[i]);
            if ((uint64_t)(bits ^ prefix) >> top == 0) count[bits >> shift[pass] & (bins - 1)]++;
        }
        while (*above + count[bin] < rank) *above += count[bin--];
        prefix |= bin << shift[pass];
    }
    return prefix;
}
/* The `most` highest of `count` numbers in order of index, ties to the lowest; *next: the highest of the others. */
static void moe__select_highest(size_t count, size_t most, const float *values, int32_t *index, float *next) {
    size_t above, have = 0;
    uint32_t kth = moe__select_kth(count, most, values, &above);
    size_t ties = most - above;
    *next = -INFINITY;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = moe__select_order(values[i]);
        if (bits > kth || (bits == kth && ties)) {
            ties -= bits == kth;
            index[have++] = (int32_t)i;
        } else if (values[i] > *next) {
            *next = values[i];
        }
    }
    MOE_ASSERT(have == most);
}

/* (rows, cols) -> (cols, rows) */
static void moe__select_transpose(size_t rows, size_t cols, const float *x, float *y) {
    for (size_t r0 = 0; r0 < rows; r0 += 32)
        for (size_t c = 0; c < cols; c++)
            for (size_t r = r0; r < moe__min(rows, r0 + 32); r++) y[c * rows + r] = x[r * cols + c];
}

/* -- selections over a whole batch. Their scratch: numbers of four bytes, in tables (rows, cols), lists of rows and of
 * cols -- */
typedef struct moe__select_need { size_t tables, rows, cols; } moe__select_need;
typedef struct moe__select_memory { moe__scratch scratch; void *table[2], *row[5], *col[2]; } moe__select_memory;
static const moe__select_need moe__select_choice_need = {1, 1, 0}, moe__select_sinkhorn_need = {1, 2, 2};
static const moe__select_need moe__select_auction_need = {2, 5, 1};

static moe_status moe__select_take(size_t rows, size_t cols, const moe__select_need *need, moe__select_memory *memory,
                                   moe__arena *arena) {
    if (!cols || cols > MOE__MAX_INDEX) return MOE_E_N_EXPERTS;
    if (rows > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    for (size_t i = 0; i < need->tables; i++) memory->table[i] = moe__take_floats(arena, rows, cols);
    for (size_t i = 0; i < need->rows; i++) memory->row[i] = moe__take_floats(arena, rows, 1);
    for (size_t i = 0; i < need->cols; i++) memory->col[i] = moe__take_floats(arena, cols, 1);
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}
static moe_status moe__select_bytes(size_t rows, size_t cols, const moe__select_need *need, size_t *bytes) {
    moe__select_memory memory;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__select_take(rows, cols, need, &memory, &arena);
    return status ? status : moe__arena_bytes(&arena, bytes);
}
static moe_status moe__select_begin(size_t rows, size_t cols, const moe__select_need *need, void *scratch, size_t bytes,
                                    moe__select_memory *memory) {
    size_t needed;
    moe_status status = moe__select_bytes(rows, cols, need, &needed);
    if (!status) status = moe__scratch_begin(&memory->scratch, scratch, bytes, needed);
    return status ? status : moe__select_take(rows, cols, need, memory, &memory->scratch.arena);
}
MOE_API moe_status moe_expert_choice_scratch(size_t rows, size_t cols, size_t *bytes) {
    return moe__select_bytes(rows, cols, &moe__select_choice_need, bytes);
}
MOE_API moe_status moe_sinkhorn_scratch(size_t rows, size_t cols, size_t *bytes) {
    return moe__select_bytes(rows, cols, &moe__select_sinkhorn_need, bytes);
}
MOE_API moe_status moe_auction_scratch(size_t rows, size_t cols, size_t *bytes) {
    return moe__select_bytes(rows, cols, &moe__select_auction_need, bytes);
}

MOE_API moe_status moe_expert_choice(size_t rows, size_t cols, size_t capacity, size_t slots, const float *scores,
                                     int32_t *index, void *scratch, size_t scratch_bytes) {
    size_t needed, pairs;
    moe__select_memory memory;
    moe_status status = moe__select_args(rows, cols, 1, scores, index);
    if (!status && !capacity) status = MOE_E_CAPACITY;
    if (!status && slots < cols) status = MOE_E_SLOTS;
    if (!status && !moe__mul(rows, slots, &pairs)) status = MOE_E_OVERFLOW;
    if (!status) status = moe_expert_choice_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    if (moe__any_nan(rows * cols, scores)) return moe__select_nobody(rows, slots, index);
    status = moe__select_begin(rows, cols, &moe__select_choice_need, scratch, scratch_bytes, &memory);
    if (status) return status;
    float *by_col = (float *)memory.table[0];
    int32_t *taken = (int32_t *)memory.row[0];
    moe__select_transpose(rows, cols, scores, by_col);
    capacity = moe__min(capacity, rows);
    for (size_t i = 0; i < pairs; i++) index[i] = -1;
    for (size_t e = 0; e < cols; e++) {
        float next;
        moe__select_highest(rows, capacity, by_col + e * rows, taken, &next);
        for (size_t i = 0; i < capacity; i++) {
            size_t row = (size_t)taken[i], have = 0;
            while (index[row * slots + have] >= 0) have++; /* fewer than the e columns before */
            moe__select_insert(have, slots, scores + row * cols, NULL, index + row * slots, e);
        }
    }
    moe__scratch_end(&memory.scratch);
    return MOE_OK;
}

/* log sum exp(x + y) */
static float moe__select_lse_of_sum(const moe__kernels *kernels, size_t count, const float *x, const float *y,
                                    float *sum) {
    memcpy(sum, x, count * sizeof(float));
    kernels->axpy(count, 1.0f, y, sum);
    return kernels->lse(count, sum);
}
MOE_API moe_status moe_sinkhorn(size_t rows, size_t cols, float epsilon, size_t iterations, const float *scores,
                                float *plan, void *scratch, size_t scratch_bytes) {
    size_t needed, count = rows * cols;
    moe__select_memory memory;
    moe_status status = moe__select_args(rows, cols, 1, scores, plan);
    if (status == MOE_E_NULL_INDEX) status = MOE_E_NULL_OUT;
    if (!status && !(epsilon > 0.0f && moe__finite(epsilon))) status = MOE_E_EPSILON;
    if (!status && !iterations) status = MOE_E_ITERATIONS;
    if (!status) status = moe_sinkhorn_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    for (size_t i = 0; i < count; i++)
        if (!moe__finite(scores[i] / epsilon)) return MOE_E_NAN_LOGITS;
    status = moe__select_begin(rows, cols, &moe__select_sinkhorn_need, scratch, scratch_bytes, &memory);
    if (status) return status;
    const moe__kernels *kernels = moe__dispatched();
    float *by_col = (float *)memory.table[0], share = moe__logf1((float)rows / (float)cols);
    float *row_scale = (float *)memory.row[0], *row_sum = (float *)memory.row[1]; /* scales as logarithms */
    float *col_scale = (float *)memory.col[0], *col_sum = (float *)memory.col[1];
    for (size_t i = 0; i < count; i++) plan[i] = scores[i] / epsilon;
    moe__select_transpose(rows, cols, plan, by_col);
    memset(row_scale, 0, rows * sizeof(float));
    for (size_t i = 0; i < iterations; i++) {
        for (size_t c = 0; c < cols; c++)
            col_scale[c] = share - moe__select_lse_of_sum(kernels, rows, by_col + c * rows, row_scale, row_sum);
        for (size_t r = 0; r < rows; r++)
            row_scale[r] = -moe__select_lse_of_sum(kernels, cols, plan + r * cols, col_scale, col_sum);
    }
    for (size_t r = 0; r < rows; r++) {
        float *p = plan + r * cols;
        for (size_t c = 0; c < cols; c++) p[c] = p[c] + col_scale[c] + row_scale[r];
        kernels->exp(cols, p, p);
    }
    moe__scratch_end(&memory.scratch);
    return moe__all_finite(count, plan) ? MOE_OK : MOE_E_NAN_LOGITS; /* scores near FLT_MAX have no sums */
}

/* -- the auction: in each round every column bids for the `share` = rows / cols rows that it values most:
 *
 *     its values (score - cost), highest first:  9 8 | 7 5     with a share of 2 it bids for two rows, each as much as
 *     its bids, above eps:                       2 1           makes that row worth no more than the next, 7
 *
 * The highest bid wins the row, whose cost rises by it. When every row has a bid, the winners are the assignment. -- */
#define MOE__AUCTION_EXACT 100 /* rounds in which a winner holds what it won, as in the authors' code */
#define MOE__AUCTION_ROUNDS 1000
typedef struct moe__select_auction_state {
    size_t rows, cols, share;
    float eps;
    float *score, *value;             /* (cols, rows) */
    float *cost, *bid;                /* (rows) */
    int32_t *winner, *holder, *want;  /* of this round and of the last, -1: nobody; what a column bids for */
    uint32_t *sold;                   /* (cols) */
} moe__select_auction_state;
/* One round: everyone bids. Whether every row has a bid. */
static int moe__select_auction_bids(moe__select_auction_state *auction, int hold) {
    size_t rows = auction->rows;
    int all = 1;
    memset(auction->bid, 0, rows * sizeof(float));
    for (size_t t = 0; t < rows; t++) auction->winner[t] = -1;
    for (size_t e = 0; e < auction->cols; e++) {
        const float *value = auction->value + e * rows;
        float next; /* what it would turn to */
        moe__select_highest(rows, auction->share, value, auction->want, &next);
        for (size_t i = 0; i < auction->share; i++) {
            size_t t = (size_t)auction->want[i];
            float bid = value[t] - next + auction->eps;
            if (hold && auction->holder[t] == (int32_t)e) bid = auction->eps;
            if (!(bid > auction->bid[t])) continue;
            auction->bid[t] = bid;
            auction->winner[t] = (int32_t)e;
        }
    }
    for (size_t t = 0; t < rows; t++) all &= auction->winner[t] >= 0;
    return all;
}
static void moe__select_auction_settle(moe__select_auction_state *auction, int hold) { /* costs, and values by them */
    size_t rows = auction->rows;
    for (size_t t = 0; t < rows; t++) auction->cost[t] += auction->bid[t];
    for (size_t e = 0; e < auction->cols; e++)
        for (size_t t = 0; t < rows; t++)
            auction->value[e * rows + t] = auction->score[e * rows + t] - auction->cost[t];
    for (size_t t = 0; t < rows; t++) {
        auction->holder[t] = auction->winner[t];
        if (auction->winner[t] < 0) continue;
        size_t at = (size_t)auction->winner[t] * rows + t;
        auction->value[at] = auction->score[at];
        if (hold) auction->value[at] = INFINITY; /* the authors' maximal score, and first among equals */
    }
}
/* With a bid for every row no column has too many; else what it has too many, and what nobody bid for, goes to the best
 * column that has room. */
static void moe__select_auction_assign(moe__select_auction_state *auction, const float *scores, int32_t *index) {
    size_t cols = auction->cols;
    uint32_t *sold = auction->sold;
    memset(sold, 0, cols * sizeof(uint32_t));
    for (size_t t = 0; t < auction->rows; t++) {
        index[t] = auction->winner[t];
        if (index[t] < 0) continue;
        if (sold[index[t]] < auction->share) sold[index[t]]++;
        else index[t] = -1;
    }
    for (size_t t = 0; t < auction->rows; t++, scores += cols) {
        if (index[t] >= 0) continue;
        for (size_t e = 0; e < cols; e++)
            if (sold[e] < auction->share && (index[t] < 0 || scores[e] > scores[index[t]])) index[t] = (int32_t)e;
        sold[index[t]]++;
    }
}
MOE_API moe_status moe_auction(size_t rows, size_t cols, const float *scores, int32_t *index, void *scratch,
                               size_t scratch_bytes) {
    size_t needed, count = rows * cols;
    moe__select_memory memory;
    moe_status status = moe__select_args(rows, cols, 1, scores, index);
    if (!status && rows % cols) status = MOE_E_UNEVEN;
    if (!status) status = moe_auction_scratch(rows, cols, &needed);
    if (status || !rows) return status;
    if (!moe__all_finite(count, scores)) return moe__select_nobody(rows, 1, index);
    status = moe__select_begin(rows, cols, &moe__select_auction_need, scratch, scratch_bytes, &memory);
    if (status) return status;
    float low = scores[0], high = scores[0];
    for (size_t i = 1; i < count; i++) {
        if (scores[i] < low) low = scores[i];
        if (scores[i] > high) high = scores[i];
    }
    float eps = high / 50.0f - low / 50.0f;
    if (eps < 1e-4f) eps = 1e-4f;
    moe__select_auction_state auction = {
        rows, cols, rows / cols, eps, (float *)memory.table[0], (float *)memory.table[1], (float *)memory.row[0],
        (float *)memory.row[1], (int32_t *)memory.row[2], (int32_t *)memory.row[3], (int32_t *)memory.row[4],
        (uint32_t *)memory.col[0]};
    moe__select_transpose(rows, cols, scores, auction.score);
    memcpy(auction.value, auction.score, count * sizeof(float));
    memset(auction.cost, 0, rows * sizeof(float));
    for (size_t t = 0; t < rows; t++) auction.holder[t] = -1;
    for (size_t round = 0; round < MOE__AUCTION_ROUNDS; round++) {
        if (moe__select_auction_bids(&auction, round < MOE__AUCTION_EXACT)) break;
        moe__select_auction_settle(&auction, round < MOE__AUCTION_EXACT);
    }
    moe__select_auction_assign(&auction, scores, index);
    moe__scratch_end(&memory.scratch);
    return MOE_OK;
}

/* -- the selections of the pipeline: memory->select.seen -> tape.index -- */
static const float *moe__select_seen(const moe__run *run, size_t t) {
    return run->memory->select.seen + t * run->plan->E;
}
static int32_t *moe__select_index(const moe__run *run, size_t t) { return run->tape->index + t * run->plan->S; }
static void moe__select_no_choice(const moe__run *run, size_t t, size_t from) {
    for (size_t i = from; i < run->plan->S; i++) moe__select_index(run, t)[i] = -1;
}
static int moe__select_fallback(const moe__run *run) {
    return run->desc->fallback == MOE_ON || (run->desc->fallback == MOE_DEFAULT && !run->memory->now.training);
}
static moe_status moe__select_topk(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, top_k = moe__min(run->memory->now.k, E), step = 1;
    float threshold = run->desc->threshold;
    int plain = threshold == (float)MOE_OFF;
    if (plain && top_k == run->plan->S) step = t1 - t0; /* all at once */
    for (size_t t = t0; t < t1; t += step) {
        const float *seen = moe__select_seen(run, t);
        int32_t *index = moe__select_index(run, t);
        moe_status status;
        if (plain) status = moe_topk(step, E, top_k, seen, index, NULL);
        else status = moe_topk_threshold(1, E, top_k, threshold, NULL, moe__select_fallback(run), seen, index);
        if (status) return status;
        moe__select_no_choice(run, t, top_k);
    }
    return MOE_OK;
}
static moe_status moe__select_groups(const moe__run *run, size_t t0, size_t t1) {
    size_t top_k = run->memory->now.k, n_groups = run->desc->n_groups, top_groups = run->desc->top_groups;
    for (size_t t = t0; t < t1; t++) {
        const float *seen = moe__select_seen(run, t);
        moe_status status = moe_topk_groups_best(1, run->plan->E, top_k, n_groups, top_groups, run->desc->group_best,
                                                 seen, moe__select_index(run, t));
        if (status) return status;
        moe__select_no_choice(run, t, top_k);
    }
    return MOE_OK;
}
static moe_status moe__select_top_p(const moe__run *run, size_t t0, size_t t1) {
    const float *seen = moe__select_seen(run, t0);
    return moe_top_p(t1 - t0, run->plan->E, run->plan->S, run->desc->top_p, seen, moe__select_index(run, t0));
}
static moe_status moe__select_threshold(const moe__run *run, size_t t0, size_t t1) {
    const float *learned = moe__run_tensor(run, MOE__R_THRESHOLD);
    return moe_topk_threshold(t1 - t0, run->plan->E, run->plan->S, run->desc->threshold, learned,
                              moe__select_fallback(run), moe__select_seen(run, t0), moe__select_index(run, t0));
}
static moe_status moe__select_all(const moe__run *run, size_t t0, size_t t1) {
    return moe_topk(t1 - t0, run->plan->E, run->plan->S, moe__select_seen(run, t0), moe__select_index(run, t0), NULL);
}
/* The highest logit plus Gumbel noise among those with p > 0. */
static size_t moe__select_sample(const moe__gate_token *token, size_t i, size_t best) {
    const moe__run *run = token->run;
    float top = -FLT_MAX, gumbel;
    for (size_t e = 0; e < token->E; e++) {
        uint64_t at = ((uint64_t)token->t * token->S + i) * token->E + e;
        if (!(token->work[e] > 0.0f)) continue;
        moe__gumbel_at(MOE__DRAW_KEY(run), moe__run_stream(run, MOE__USE_SAMPLE), at, 1, &gumbel);
        float value = moe__fma(token->logits[e], token->inv_t, gumbel);
        if (!(value > top)) continue;
        top = value;
        best = e;
    }
    return best;
}
static moe_status moe__select_sampled(const moe__run *run, size_t t0, size_t t1) {
    for (size_t t = t0; t < t1; t++) {
        moe__gate_token token = moe__gate_token_of(run, t);
        moe__select_no_choice(run, t, 0);
        for (size_t i = 0; i < moe__min(run->memory->now.k, run->plan->E); i++) {
            size_t best = moe__gate_sparse_row(&token, i, token.work);
            if (run->memory->now.training) best = moe__select_sample(&token, i, best);
            moe__select_index(run, t)[i] = (int32_t)best;
        }
    }
    return MOE_OK;
}
static moe_status moe__select_expert_choice(const moe__run *run) {
    const moe__run_select *memory = &run->memory->select;
    size_t T = run->tape->n_tokens, E = run->plan->E;
    double share = (double)T * (double)run->memory->now.k / (double)E;
    size_t capacity = moe__min(T, moe__max(1, (size_t)share));
    return moe_expert_choice(T, E, capacity, run->plan->S, memory->seen, run->tape->index, memory->scratch,
                             memory->scratch_bytes);
}
static moe_status moe__select_sinkhorn(const moe__run *run) {
    const moe__run_select *memory = &run->memory->select;
    size_t T = run->tape->n_tokens, E = run->plan->E, top_k = run->memory->now.k;
    const float *plan = memory->seen;
    moe_status status = MOE_OK;
    if (run->memory->now.training) {
        plan = memory->work;
        status = moe_sinkhorn(T, E, run->desc->sinkhorn_epsilon, run->desc->sinkhorn_iterations, memory->seen,
                              memory->work, memory->scratch, memory->scratch_bytes);
    }
    for (size_t t = 0; t < T; t++) {
        if (!status) status = moe_topk(1, E, top_k, plan + t * E, moe__select_index(run, t), NULL);
        moe__select_no_choice(run, t, top_k);
    }
    return status;
}
static moe_status moe__select_auction(const moe__run *run) {
    const moe__run_select *memory = &run->memory->select;
    size_t T = run->tape->n_tokens, E = run->plan->E;
    if (!run->memory->now.training) return moe_topk(T, E, 1, memory->seen, run->tape->index, NULL);
    return moe_auction(T, E, memory->seen, run->tape->index, memory->scratch, memory->scratch_bytes);
}
/* The first choice is the highest; the others are drawn one after the other by softmax(logits), without replacement. */
static moe_status moe__select_gumbel(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, top_k = run->memory->now.k;
    moe_status status = moe__select_topk(run, t0, t1);
    if (!run->memory->now.training) return status;
    for (size_t t = t0; t < t1 && !status; t++) {
        const float *seen = moe__select_seen(run, t);
        float *drawn = run->memory->select.work + t * E;
        uint64_t at = (uint64_t)moe__run_draw_row(run, t) * E;
        moe__gumbel_at(MOE__DRAW_KEY(run), moe__run_stream(run, MOE__USE_SAMPLE), at, E, drawn);
        for (size_t e = 0; e < E; e++) drawn[e] = moe__fma(seen[e], run->memory->now.inv_t, drawn[e]);
        drawn[*moe__select_index(run, t)] = INFINITY;
        if (!run->kernels->topk(1, E, top_k, drawn, moe__select_index(run, t), NULL)) status = MOE_E_NAN_SCORES;
    }
    return status;
}

static moe_status moe__select_no_threshold(const moe_desc *desc) {
    return desc->threshold == (float)MOE_OFF ? MOE_OK : MOE_E_THRESHOLD;
}
static moe_status moe__select_groups_fits(const moe_desc *desc) {
    return desc->top_k > desc->top_groups * (desc->n_experts / desc->n_groups) ? MOE_E_TOP_GROUPS : MOE_OK;
}

typedef struct moe__select_row {
    const char *name;
    int sees_logits, all;  /* chooses by logits, not scores; a token can have every expert */
    int one, even;         /* a token has one choice; in training the experts must divide the tokens */
    int keeps_all;         /* cannot leave experts out, as gating dropout asks */
    moe_gate_kind gate;    /* the only gate that suits it; default: any */
    moe_status (*fits)(const moe_desc *desc); /* with its numbers of choices and groups; NULL: always */
    moe_status (*scratch)(size_t rows, size_t cols, size_t *bytes); /* of the batch; NULL: none */
    moe_status (*select)(const moe__run *run, size_t t0, size_t t1); /* token by token, or */
    moe_status (*batch)(const moe__run *run);                       /* over the whole batch */
} moe__select_row;
#define MOE__ANY MOE_GATE_DEFAULT
static const moe__select_row moe__select_table[MOE_SELECT_COUNT] = {
    {"default", 0, 0, 0, 0, 0, MOE__ANY, NULL, NULL, NULL, NULL},
    {"top-k", 0, 0, 0, 0, 0, MOE__ANY, NULL, NULL, moe__select_topk, NULL},
    {"groups", 0, 0, 0, 0, 0, MOE__ANY, moe__select_groups_fits, NULL, moe__select_groups, NULL},
    {"top-p", 0, 1, 0, 0, 0, MOE__ANY, NULL, NULL, moe__select_top_p, NULL},
    {"threshold", 0, 1, 0, 0, 0, MOE__ANY, NULL, NULL, moe__select_threshold, NULL},
    {"expert-choice", 0, 1, 0, 0, 0, MOE__ANY, NULL, moe_expert_choice_scratch, NULL, moe__select_expert_choice},
    {"sinkhorn", 1, 0, 0, 0, 1, MOE__ANY, NULL, moe_sinkhorn_scratch, NULL, moe__select_sinkhorn},
    {"auction", 1, 0, 1, 1, 1, MOE__ANY, NULL, moe_auction_scratch, NULL, moe__select_auction},
    {"sampled", 1, 0, 0, 0, 1, MOE_GATE_SPARSEMIXER, NULL, NULL, moe__select_sampled, NULL},
    {"all", 0, 1, 0, 0, 0, MOE__ANY, NULL, NULL, moe__select_all, NULL},
    {"gumbel", 1, 0, 0, 0, 0, MOE__ANY, moe__select_no_threshold, NULL, moe__select_gumbel, NULL},
};
#undef MOE__ANY
MOE__NAME_API(select, moe__select_table, MOE_SELECT_COUNT)

static int moe__select_suits_gate(const moe_desc *desc) {
    moe_gate_kind gate = moe__select_table[desc->select].gate;
    moe_select_kind select = moe__gate_table[desc->gate].select;
    return (!gate || gate == desc->gate) && (!select || select == desc->select);
}
static moe_status moe__select_layout(const moe__plan *plan, size_t n_tokens, moe__arena *arena,
                                     moe__run_select *memory) {
    const moe__select_row *row = &moe__select_table[plan->desc.select];
    moe_status status = MOE_OK;
    if (row->scratch) status = row->scratch(n_tokens, plan->E, &memory->scratch_bytes);
    memory->view = moe__take_floats(arena, n_tokens, plan->E);
    memory->work = moe__take_floats(arena, n_tokens, plan->E);
    memory->scratch = moe__take(arena, memory->scratch_bytes, 1);
    return status;
}

/* What a selection looks at when nothing interferes. */
static const float *moe__select_selection_base(const moe__run *run) {
    if (moe__select_table[run->desc->select].sees_logits || moe__gate_table[run->desc->gate].sees_logits)
        return run->tape->logits;
    return run->tape->scores;
}
/* What the selection sees of a block of tokens, where it is not simply logits or scores: with the bias, in warm-up
 * random numbers, and without the experts of other ranks while gating dropout holds. */
static void moe__select_view(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, T = run->tape->n_tokens, ranks = run->desc->n_ranks;
    const moe__run_now *now = &run->memory->now;
    const float *base = moe__select_selection_base(run), *bias = run->given.bias;
    if (run->memory->select.seen != run->memory->select.view) return;
    for (size_t t = t0; t < t1; t++) {
        float *view = run->memory->select.view + t * E;
        uint64_t at = (uint64_t)moe__run_draw_row(run, t) * E;
        if (now->random) moe__run_uniforms(run, MOE__USE_WARM_UP, at, E, 0.0f, 1.0f, view);
        else
            for (size_t e = 0; e < E; e++) view[e] = base[t * E + e] + (bias ? bias[e] : 0.0f);
        if (!now->local) continue;
        for (size_t e = 0; e < E; e++)
            if (e * ranks / E != t * ranks / T) view[e] = -INFINITY;
    }
}
/* Choices that gating dropout forbids were made for want of others. */
static void moe__select_filter(const moe__run *run, size_t t0, size_t t1) {
    size_t S = run->plan->S;
    const moe__run_now *now = &run->memory->now;
    if (!now->local && !now->skip) return;
    for (size_t p = t0 * S; p < t1 * S; p++) {
        int32_t *choice = run->tape->index + p;
        if (*choice >= 0 && (now->skip || !moe__finite(moe__select_seen(run, p / S)[*choice]))) *choice = -1;
    }
}

/* ==== >>routes ================================================================================
 * The meeting point: every router writes moe_routes, and experts, losses, controllers, measures and plans read it. From
 * the choices of each token to the tokens of each expert, with those that its capacity refuses left out:
 *
 *     index (T, S)  token 0: 2 0     begin  0 2 2 4     token  0 1 | | 0 2     (experts 0, 1, 2)
 *                   token 1: 0 -     slot (T, S)  2 0   1 -   3 -              (a choice's route, or MOE_NONE)
 *                   token 2: 2 -
 *
 * A pair is a choice of a token: token * S + choice. Uses only memory.
 */
static moe_status moe__routes_take(moe_routes *routes, size_t n_tokens, size_t n_experts, size_t n_slots,
                                   moe__arena *arena) {
    size_t pairs;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!n_slots) return MOE_E_TOP_K;
    if (!moe__mul(n_tokens, n_slots, &pairs) || pairs > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    memset(routes, 0, sizeof *routes);
    routes->n_experts = n_experts;
    routes->n_slots = n_slots;
    routes->max_tokens = n_tokens;
    routes->begin = (uint32_t *)moe__take(arena, n_experts + 1, sizeof(uint32_t));
    routes->load = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    routes->top1 = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    routes->token = (uint32_t *)moe__take(arena, pairs, sizeof(uint32_t));
    routes->weight = (float *)moe__take(arena, pairs, sizeof(float));
    routes->slot = (uint32_t *)moe__take(arena, pairs, sizeof(uint32_t));
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_routes_size(size_t n_tokens, size_t n_experts, size_t n_slots, size_t *bytes) {
    moe_routes routes;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__routes_take(&routes, n_tokens, n_experts, n_slots, &arena);
    return status ? status : moe__arena_bytes(&arena, bytes);
}

MOE_API moe_status moe_routes_init(moe_routes *routes, size_t n_tokens, size_t n_experts, size_t n_slots, void *memory,
                                   size_t bytes) {
    size_t needed;
    moe__arena arena;
    if (!routes) return MOE_E_NULL_ROUTES;
    moe_status status = moe_routes_size(n_tokens, n_experts, n_slots, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__routes_take(routes, n_tokens, n_experts, n_slots, &arena);
    return status ? status : moe_routes_fill(routes, 0, NULL, NULL, 0, MOE_ORDER_DEFAULT);
}

/* The order in which pairs stand at an expert's door; not MOE_ORDER_TOKEN, in which they stand already. */
typedef struct moe__routes_queue {
    const int32_t *index;
    const float *weight;
    size_t n_slots;
    moe_order_kind order;
} moe__routes_queue;
/* What is weighed: nothing, the first choice that the pair's token has, or the pair. */
static float moe__routes_weighed(const moe__routes_queue *queue, size_t pair) {
    if (queue->order == MOE_ORDER_CHOICE || !queue->weight) return 0.0f;
    if (queue->order == MOE_ORDER_WEIGHT)
        for (pair -= pair % queue->n_slots; queue->index[pair] < 0;) pair++;
    return queue->weight[pair];
}
static int moe__routes_earlier(const moe__routes_queue *queue, uint32_t pair, uint32_t other) {
    size_t choice = pair % queue->n_slots, other_choice = other % queue->n_slots;
    if (queue->order != MOE_ORDER_PAIR && choice != other_choice) return choice < other_choice;
    float a = moe__routes_weighed(queue, pair), b = moe__routes_weighed(queue, other);
    if (a > b || a < b) return a > b;
    return pair / queue->n_slots < other / queue->n_slots;
}
/* A heap of pairs whose root comes last in the order: the pair at `at` sinks to its place. */
static void moe__routes_sink(const moe__routes_queue *queue, uint32_t *heap, size_t count, size_t at) {
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= count) return;
        if (child + 1 < count && moe__routes_earlier(queue, heap[child], heap[child + 1])) child++;
        if (!moe__routes_earlier(queue, heap[at], heap[child])) return;
        uint32_t pair = heap[at];
        heap[at] = heap[child];
        heap[child] = pair;
        at = child;
    }
}
/* The `kept` earliest of n pairs to the front of the list: a heap of the earliest so far, its root the latest. */
static void moe__routes_earliest(const moe__routes_queue *queue, uint32_t *list, size_t count, size_t kept) {
    for (size_t i = kept / 2; i-- > 0;) moe__routes_sink(queue, list, kept, i);
    for (size_t i = kept; i < count; i++) {
        if (!moe__routes_earlier(queue, list[i], list[0])) continue;
        list[0] = list[i];
        moe__routes_sink(queue, list, kept, 0);
    }
}
/* Each expert's begin has moved to its end; back again. */
static void moe__routes_rewind(moe_routes *routes) {
    memmove(routes->begin + 1, routes->begin, routes->n_experts * sizeof(uint32_t));
    routes->begin[0] = 0;
}
/* Counting sort of the pairs by expert, in token order, into routes->token; loads; no pair has a route yet. */
static void moe__routes_sort(moe_routes *routes, size_t pairs, const int32_t *index) {
    size_t total = 0;
    memset(routes->load, 0, routes->n_experts * sizeof(uint64_t));
    memset(routes->top1, 0, routes->n_experts * sizeof(uint64_t));
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        routes->load[index[p]]++;
        if (p % routes->n_slots == 0) routes->top1[index[p]]++;
    }
    for (size_t e = 0; e < routes->n_experts; e++) {
        routes->begin[e] = (uint32_t)total;
        total += (size_t)routes->load[e];
    }
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] >= 0) routes->token[routes->begin[index[p]]++] = (uint32_t)p;
        routes->slot[p] = MOE_NONE;
    }
    moe__routes_rewind(routes);
}
/* How many pairs of a list in token order belong to the first one's sequence. */
static size_t moe__routes_in_sequence(const uint32_t *list, size_t count, size_t n_slots, const uint32_t *sequence_of) {
    size_t same = 1;
    if (!sequence_of) return count;
    while (same < count && sequence_of[list[same] / n_slots] == sequence_of[list[0] / n_slots]) same++;
    return same;
}
/* index and weight are what they should be: the library made them. An expert takes `capacity` pairs, or 0 = all, of
 * each sequence; sequence_of (T), or NULL: of all tokens together. */
static moe_status moe__routes_fill(moe_routes *routes, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, const uint32_t *sequence_of, moe_order_kind order) {
    size_t E = routes->n_experts, pairs = n_tokens * routes->n_slots;
    moe__routes_queue queue = {index, weight, routes->n_slots, order};
    routes->n_dropped = 0;
    moe__routes_sort(routes, pairs, index);
    for (size_t e = 0; e < E; e++) { /* who stays is marked in slot */
        for (size_t at = routes->begin[e], count; at < routes->begin[e + 1]; at += count) {
            uint32_t *list = routes->token + at;
            count = moe__routes_in_sequence(list, routes->begin[e + 1] - at, routes->n_slots, sequence_of);
            size_t kept = capacity ? moe__min(capacity, count) : count;
            if (kept < count && order > MOE_ORDER_TOKEN) moe__routes_earliest(&queue, list, count, kept);
            for (size_t i = 0; i < kept; i++) routes->slot[list[i]] = 0;
            routes->n_dropped += count - kept;
        }
    }
    /* again in token order, those that stay */
    memset(routes->begin, 0, (E + 1) * sizeof(uint32_t));
    for (size_t p = 0; p < pairs; p++)
        if (routes->slot[p] != MOE_NONE) routes->begin[index[p] + 1]++;
    for (size_t e = 0; e < E; e++) routes->begin[e + 1] += routes->begin[e];
    for (size_t p = 0; p < pairs; p++) {
        if (routes->slot[p] == MOE_NONE) continue;
        uint32_t route = routes->begin[index[p]]++;
        routes->slot[p] = route;
        routes->token[route] = (uint32_t)(p / routes->n_slots);
        routes->weight[route] = weight ? weight[p] : 1.0f / (float)routes->n_slots;
    }
    moe__routes_rewind(routes);
    MOE_ASSERT(routes->begin[E] + routes->n_dropped <= pairs);
    routes->n_tokens = n_tokens;
    routes->n_routes = routes->begin[E];
    return MOE_OK;
}

MOE_API moe_status moe_routes_fill(moe_routes *routes, size_t n_tokens, const int32_t *index, const float *weight,
                                   size_t capacity, moe_order_kind order) {
    if (!routes || !routes->begin) return MOE_E_NULL_ROUTES;
    size_t slots = routes->n_slots, pairs = n_tokens * slots;
    routes->n_tokens = routes->n_routes = routes->n_dropped = 0;
    if (n_tokens > routes->max_tokens) return MOE_E_N_TOKENS;
    if ((unsigned)order >= MOE_ORDER_COUNT) return MOE_E_CAPACITY_ORDER;
    if (pairs && !index) return MOE_E_NULL_INDEX;
    memset(routes->begin, 0, (routes->n_experts + 1) * sizeof(uint32_t));
    for (size_t p = 0; p < pairs; p++) {
        if (index[p] < 0) continue;
        if ((size_t)index[p] >= routes->n_experts) return MOE_E_INDEX;
        for (size_t q = p - p % slots; q < p; q++)
            if (index[q] == index[p]) return MOE_E_INDEX_TWICE;
        if (weight && !moe__finite(weight[p])) return MOE_E_NAN_WEIGHT;
    }
    return moe__routes_fill(routes, n_tokens, index, weight, capacity, NULL, order);
}

static const struct { const char *name; } moe__routes_orders[] = {
    {"default"}, {"token"}, {"choice"}, {"weight"}, {"pair"}};
MOE__NAME_API(order, moe__routes_orders, MOE_ORDER_COUNT)

/* The expert of a route: the last whose routes begin at or before it. */
static size_t moe__routes_expert(const moe_routes *routes, uint32_t route) {
    size_t low = 0, high = routes->n_experts;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (routes->begin[middle] <= route) low = middle;
        else high = middle;
    }
    return low;
}

/* ==== >>experts ===============================================================================
 * The experts' networks, forward and back: o = act(x W1 + b1) W2 + b2, over groups of rows that share parameters.
 * Whoever made the groups (combine, below) knows why a row is in one. A kind of expert is a row of the table here and a
 * pair of kernels.
 */
/* n vectors of length `rows`, number r of vector v at x[at(shape, v, r)]: made orthogonal in order, as far as there are
 * dimensions (modified Gram-Schmidt, twice for what the first round leaves); length: and of that length, 0 = as they
 * are. A vector that vanishes stays zero. */
typedef size_t moe__experts_at(const moe__plan *plan, size_t v, size_t r);
static double moe__experts_along(const float *x, size_t rows, moe__experts_at *at, const moe__plan *plan, size_t u,
                                 size_t v) {
    double sum = 0.0;
    for (size_t r = 0; r < rows; r++) sum += (double)x[at(plan, u, r)] * (double)x[at(plan, v, r)]; /* exact */
    return sum;
}
static void moe__experts_orthogonalize(float *x, size_t n, size_t rows, moe__experts_at *at, const moe__plan *plan,
                                       float length) {
    for (size_t v = 0; v < n; v++) {
        size_t first = v / rows * rows;
        double before = moe__experts_along(x, rows, at, plan, v, v), scale = 1.0;
        for (int round = 0; round < 2; round++)
            for (size_t u = first; u < v; u++) {
                double along = moe__experts_along(x, rows, at, plan, u, v);
                double square = moe__experts_along(x, rows, at, plan, u, u);
                if (!(square > 0.0)) continue;
                for (size_t r = 0; r < rows; r++)
                    x[at(plan, v, r)] = (float)((double)x[at(plan, v, r)] -
                                                moe__times(along / square, (double)x[at(plan, u, r)]));
            }
        double after = moe__experts_along(x, rows, at, plan, v, v);
        if (length > 0.0f) scale = (double)length / sqrt(after);
        if (!(after > 1e-12 * before)) scale = 0.0;
        for (size_t r = 0; r < rows; r++) x[at(plan, v, r)] = (float)((double)x[at(plan, v, r)] * scale);
    }
}
static size_t moe__experts_at_w1(const moe__plan *plan, size_t v, size_t r) {
    return moe__plan_in_block(plan, MOE__T_W1, r, v);
}
static size_t moe__experts_at_w2(const moe__plan *plan, size_t v, size_t r) {
    return moe__plan_in_block(plan, MOE__T_W2, v, r);
}

/* Puts an orthonormal expert back onto its bases: V's columns of length 1, W2's rows orthogonal with the lengths that
 * they have. */
static void moe__experts_retract(const moe__plan *plan, float *block) {
    moe__experts_orthogonalize(block, plan->f, plan->d, moe__experts_at_w1, plan, 1.0f);
    moe__experts_orthogonalize(block, plan->f, plan->d, moe__experts_at_w2, plan, 0.0f);
}
static moe_status moe__experts_narrow(const moe_desc *desc) {
    return desc->d_ff >= desc->d_model ? MOE_E_D_FF : MOE_OK;
}

typedef struct moe__experts_row {
    const char *name;
    int gated;           /* two matrices before the activation */
    size_t wide, narrow; /* default d_ff = d_model * wide / narrow */
    moe_status (*fits)(const moe_desc *desc);             /* NULL: always */
    void (*stepped)(const moe__plan *plan, float *block); /* to initial values and after a step; NULL: nothing */
} moe__experts_row;
static const moe__experts_row moe__experts_table[MOE_EXPERT_COUNT] = {
    {"default", 1, 4, 1, NULL, NULL},
    {"relu", 0, 4, 1, NULL, NULL},
    {"gelu", 0, 4, 1, NULL, NULL},
    {"silu", 0, 4, 1, NULL, NULL},
    {"swiglu", 1, 4, 1, NULL, NULL},
    {"geglu", 1, 4, 1, NULL, NULL},
    {"orthonormal", 0, 1, 4, moe__experts_narrow, moe__experts_retract},
    {"gelu-tanh", 0, 4, 1, NULL, NULL},
    {"geglu-tanh", 1, 4, 1, NULL, NULL},
    {"swiglu-clamped", 1, 4, 1, NULL, NULL},
};
MOE__NAME_API(expert, moe__experts_table, MOE_EXPERT_COUNT)

/* Memory for groups whose own experts compute up to n_routed rows, of which gathered ones are copied; the shared
 * experts all n. */
static moe_status moe__experts_layout(moe__run_memory *memory, size_t n, size_t n_own, size_t n_routed, size_t gathered,
                                      moe__arena *arena) {
    const moe__plan *plan = &memory->plan;
    moe__run_experts *experts = &memory->experts;
    size_t shared, slots, groups = n_own + plan->G - plan->F;
    if (!moe__mul(n, plan->G - plan->F, &shared) || !moe__add_size(n_routed, shared, &memory->n_rows))
        return MOE_E_OVERFLOW;
    if (!moe__mul(n, plan->S, &slots) || memory->n_rows > MOE__MAX_INDEX || slots > MOE__MAX_INDEX)
        return MOE_E_OVERFLOW;
    memory->n_routed = n_routed;
    experts->group = (moe__run_group *)moe__take(arena, groups, sizeof(moe__run_group));
    experts->first_task = (size_t *)moe__take(arena, groups + 1, sizeof(size_t));
    experts->x = moe__take_floats(arena, gathered, plan->dp * MOE__W);
    experts->h = moe__take_floats(arena, memory->n_rows, plan->hp * MOE__W);
    experts->out = moe__take_floats(arena, memory->n_rows, plan->ldo);
    if (plan->view) experts->view = moe__take_floats(arena, n, 1);
    if (!memory->training) return MOE_OK;
    experts->z = moe__take_floats(arena, memory->n_rows, plan->zp * MOE__W);
    experts->part = moe__take_floats(arena, memory->n_rows, plan->hp);
    experts->d_weight = moe__take_floats(arena, slots, 1);
    if (plan->view) experts->d_view = moe__take_floats(arena, n, plan->d);
    return MOE_OK;
}

/* -- what the experts see, in place of the tokens once the router has seen them: input_scale x, or with expert_norm
 * s (x - mean), s = input_scale over the standard deviation. Back: dx = s (g - mean g - v <g, v> / d), v = the normed
 * token. -- */
static void moe__experts_view(const moe__run *run, size_t t0, size_t t1) {
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        float *x = moe__run_token(run, 0, token), scale = run->desc->input_scale;
        if (run->desc->expert_norm == MOE_ON) {
            float mean = moe__score_row_mean(run, x, d);
            for (size_t i = 0; i < d; i++) x[moe__score_at(run, i)] -= mean;
            scale = scale / sqrtf(moe__score_row_dot(run, x, x, d) / (float)d + 1e-5f);
        }
        moe__score_row_scale(run, scale, x, d);
        run->memory->experts.view[token] = scale;
    }
}
static void moe__experts_view_back(const moe__run *run, size_t t0, size_t t1) { /* experts.d_view -> dx += */
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        float *grad = run->memory->experts.d_view + token * d, scale = run->memory->experts.view[token];
        const float *x = moe__run_token(run, 0, token);
        if (run->desc->expert_norm == MOE_ON) {
            float mean = 0.0f, along = 0.0f, size = run->desc->input_scale * run->desc->input_scale * (float)d;
            for (size_t i = 0; i < d; i++) {
                mean += grad[i];
                along = moe__fma(grad[i], x[moe__score_at(run, i)], along);
            }
            for (size_t i = 0; i < d; i++)
                grad[i] = moe__fma(-along / size, x[moe__score_at(run, i)], grad[i] - mean / (float)d);
        }
        run->kernels->axpy(d, scale, grad, run->dx + token * d);
    }
}

/* -- a phase: one step of all groups, spread over threads --
 * Each group's rows are cut into even blocks of at most `most`, and the `units` (panels of columns) into chunks. A task
 * is one block by one chunk; tasks are numbered group by group, so that first_task finds the group of a task:
 *
 *                     chunk 0   chunk 1
 *     group 0 block 0    0         1
 *             block 1    2         3
 *     group 1 (no rows)                    first_task = 0, 4, 4, 6
 *     group 2 block 0    4         5
 *
 * Who computes what depends on the number of workers; the results do not. */
typedef struct moe__experts_share { /* of a task: rows [row, row + rows) of the group, units [unit, end) */
    const moe__run_group *group;
    size_t row, rows, unit, end;
} moe__experts_share;
typedef void moe__experts_body(const moe__run *run, const moe__experts_share *share);
typedef struct moe__experts_call {
    const moe__run *run;
    moe__experts_body *body;
    size_t units, most, chunk, chunks;
} moe__experts_call;

static size_t moe__experts_blocks(size_t rows, size_t most) { return moe__ceil_div(rows, most); }
static void moe__experts_task(void *arg, size_t i, size_t worker) {
    const moe__experts_call *call = (const moe__experts_call *)arg;
    const moe__run_experts *experts = &call->run->memory->experts;
    moe__experts_share share;
    size_t low = 0, high = experts->n_groups; /* the last group whose first task is <= i and that has any */
    (void)worker;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (experts->first_task[middle] <= i) low = middle;
        else high = middle;
    }
    share.group = &experts->group[low];
    i -= experts->first_task[low];
    size_t blocks = moe__experts_blocks(share.group->rows, call->most), block = i / call->chunks;
    size_t base = share.group->rows / blocks, more = share.group->rows % blocks;
    share.row = block * base + moe__min(block, more);
    share.rows = base + (block < more);
    share.unit = i % call->chunks * call->chunk;
    share.end = moe__min(call->units, share.unit + call->chunk);
    call->body(call->run, &share);
}
/* cap: most units of a chunk; 0 = any */
static void moe__experts_phase(const moe__run *run, size_t units, size_t most, size_t cap, moe__experts_body *body) {
    const moe__plan *plan = run->plan;
    moe__run_experts *experts = &run->memory->experts;
    moe__experts_call call = {run, body, units, most, units, 1};
    size_t tasks = 0, blocks = 0, workers = moe_workers(&run->desc->parallel);
    for (size_t g = 0; g < experts->n_groups; g++) blocks += moe__experts_blocks(experts->group[g].rows, most);
    if (workers > 1) call.chunk = moe__max(1, moe__min(units, blocks * units / (workers * 16)));
    if (cap) call.chunk = moe__min(call.chunk, cap);
    call.chunks = moe__ceil_div(units, call.chunk);
    for (size_t g = 0; g < experts->n_groups; g++) {
        experts->first_task[g] = tasks;
        tasks += moe__experts_blocks(experts->group[g].rows, most) * call.chunks;
    }
    experts->first_task[experts->n_groups] = tasks;
    size_t rows = experts->shared_row + (plan->G - plan->F) * run->tape->n_tokens;
    moe__threads_run(&run->desc->parallel, rows, plan->expert, tasks, moe__experts_task, &call);
}

/* Rows of k columns that fill a megabyte of L2. */
static size_t moe__experts_block_rows(size_t k) { return moe__max(64, ((size_t)256 << 10) / moe__max(k, 1)); }

/* Row `row` of panel u of a group, in an array that has `panels` panels a row. */
static float *moe__experts_panel(float *array, size_t panels, const moe__run_group *group, size_t unit, size_t at) {
    return array + (group->begin * panels + unit * group->rows + at) * MOE__W;
}
/* Where a share's product goes in experts.out, row-major. */
static moe__product_target moe__experts_out(const moe__run *run, const moe__experts_share *share) {
    size_t at = share->group->begin + share->row, ld = run->plan->ldo;
    moe__product_target to = {NULL, ld, MOE__W, (share->end - share->unit) * MOE__W, moe__product_zeros, 0};
    to.c = run->memory->experts.out + at * ld + share->unit * MOE__W;
    return to;
}

/* -- forward -- */
/* The tokens of the rows -> experts.x. */
static void moe__experts_gather(const moe__run *run, const moe__experts_share *share) {
    const moe__run_group *group = share->group;
    if (!group->token) return;
    for (size_t unit = 0; unit < run->plan->dp; unit++) {
        const float *from = moe__run_token(run, unit, 0);
        float *to = moe__experts_panel(run->memory->experts.x, run->plan->dp, group, unit, share->row);
        for (size_t row = 0; row < share->rows; row++)
            memcpy(to + row * MOE__W, from + group->token[share->row + row] * (size_t)MOE__W, MOE__W * sizeof(float));
    }
}
static void moe__experts_up(const moe__run *run, const moe__experts_share *share) { /* z = x W1 + b1, h = act(z) */
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *x = group->x + share->row * MOE__W;
    size_t panels = plan->gated + 1, step = panels * MOE__W * plan->d;
    MOE__ALIGN64 float scratch[2 * MOE__MB * MOE__W];
    for (size_t unit = share->unit; unit < share->end; unit++)
        for (size_t row = 0; row < share->rows; row += MOE__MB) {
            const float *w1 = group->params + unit * step;
            size_t rows = moe__min(MOE__MB, share->rows - row), at = share->row + row;
            moe__product_target z = {scratch, MOE__W, MOE__MB * MOE__W, panels * MOE__W, moe__product_zeros, 0};
            if (run->memory->training) {
                z.c = moe__experts_panel(run->memory->experts.z, plan->zp, group, unit * panels, at);
                z.panel = group->rows * MOE__W;
            }
            if (plan->bias) {
                z.init = group->params + plan->b1 + unit * panels * MOE__W;
                z.init_panel = MOE__W;
            }
            moe__product(run->kernels, rows, plan->d, x + row * MOE__W, group->x_panel, w1, &z, 1, w1 + step);
            float *h = moe__experts_panel(run->memory->experts.h, plan->hp, group, unit, at);
            run->kernels->act[run->desc->expert](rows, z.c, z.c + z.panel, h);
        }
}
static void moe__experts_down(const moe__run *run, const moe__experts_share *share) { /* o = h W2 + b2 */
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *h = moe__experts_panel(run->memory->experts.h, plan->hp, group, 0, share->row);
    const float *w2 = group->params + plan->w2;
    size_t step = MOE__W * plan->f;
    moe__product_target to = moe__experts_out(run, share);
    if (plan->bias) {
        to.init = group->params + plan->b2 + share->unit * MOE__W;
        to.init_panel = MOE__W;
    }
    moe__product(run->kernels, share->rows, plan->f, h, group->rows * MOE__W, w2 + share->unit * step, &to, 1,
                 w2 + share->end * step);
}
static void moe__experts_forward(const moe__run *run) {
    const moe__plan *plan = run->plan;
    moe__experts_phase(run, plan->hp, moe__experts_block_rows(plan->d), 0, moe__experts_up);
    moe__experts_phase(run, plan->dp, moe__experts_block_rows(moe__min(plan->f, MOE__KG)), 0, moe__experts_down);
}

/* -- backward: experts.out holds dy of the rows as panels, at the end the rows' dx, row-major -- */
static void moe__experts_gather_dy(const moe__run *run, const moe__experts_share *share) {
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *d_out = run->memory->losses.d_out;
    for (size_t unit = 0; unit < plan->dp; unit++) {
        float *to = moe__experts_panel(run->memory->experts.out, plan->dp, group, unit, share->row);
        for (size_t row = 0; row < share->rows; row++) {
            size_t token = group->first + share->row + row;
            if (group->token) token = group->token[share->row + row];
            moe__product_fill(moe__run_dy(run, token), plan->d, 0, 1, unit * MOE__W, moe__run_columns(run, unit),
                              to + row * MOE__W);
        }
        if (!d_out || !group->token) continue;
        for (size_t row = 0; row < share->rows; row++, to += MOE__W) {
            const float *more = d_out + (group->begin + share->row + row) * plan->ldo + unit * MOE__W;
            for (size_t c = 0; c < MOE__W; c++) to[c] = moe__fma(group->weight[share->row + row], to[c], more[c]);
        }
    }
}
/* dh = dy W2^T; z -> dz, h -> w h */
static void moe__experts_down_back(const moe__run *run, const moe__experts_share *share) {
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    moe__run_experts *experts = &run->memory->experts;
    const float *dy = moe__experts_panel(experts->out, plan->dp, group, 0, share->row), *w2 = group->params + plan->w2;
    size_t panels = plan->gated + 1, panel = group->rows * MOE__W;
    MOE__ALIGN64 float dh[MOE__MB * MOE__W];
    moe__product_target to = {dh, MOE__W, MOE__W, MOE__W, moe__product_zeros, 0};
    for (size_t unit = share->unit; unit < share->end; unit++)
        for (size_t row = 0; row < share->rows; row += MOE__MB) {
            size_t rows = moe__min(MOE__MB, share->rows - row), at = share->row + row;
            const float *weight = group->weight ? group->weight + at : NULL;
            float *z = moe__experts_panel(experts->z, plan->zp, group, unit * panels, at);
            float *h = moe__experts_panel(experts->h, plan->hp, group, unit, at);
            float *part = experts->part + (group->begin + at) * plan->hp + unit;
            moe__product_t(run->kernels, rows, plan->d, dy + row * MOE__W, panel, w2, plan->f, unit * MOE__W, &to);
            run->kernels->act_back[run->desc->expert](rows, weight, z, z + panel, h, dh, part, plan->hp);
        }
}
/* Of a row of a group: <dy, o> = <h W2, dy> + <b2, dy>, the panels' shares in order. dy (d), row-major */
static float moe__experts_weight_back(const moe__run *run, const moe__run_group *group, size_t row, const float *dy) {
    const moe__plan *plan = run->plan;
    float sum = 0.0f;
    for (size_t unit = 0; unit < plan->hp; unit++)
        sum += run->memory->experts.part[(group->begin + row) * plan->hp + unit];
    if (plan->bias) sum += run->kernels->dot(plan->d, group->params + plan->b2, dy);
    return sum;
}
static void moe__experts_weights_back(const moe__run *run, const moe__experts_share *share) {
    const moe__run_group *group = share->group;
    if (!group->token) return;
    for (size_t row = share->row; row < share->row + share->rows; row++) {
        const float *dy = moe__run_dy(run, group->token[row]);
        run->d_weight[group->begin + row] = moe__experts_weight_back(run, group, row, dy);
    }
}
/* dw (m, n panels) = or += a^T b over the rows of a group, for the share's panels of a */
static void moe__experts_outer(const moe__run *run, const moe__experts_share *share, const float *a, size_t a_panel,
                               size_t m, const float *b, size_t n_panels, float *dw) {
    size_t rows = share->group->rows;
    for (size_t t = 0; t < rows; t += MOE__TB)
        for (size_t n = 0; n < n_panels; n++)
            for (size_t unit = share->unit; unit < share->end; unit++)
                moe__product_outer(run->kernels, moe__min(MOE__TB, rows - t), moe__min(MOE__W, m - unit * MOE__W),
                                   a + unit * a_panel + t * MOE__W, b + (n * rows + t) * MOE__W, MOE__W,
                                   dw + (n * m + unit * MOE__W) * MOE__W, MOE__W, MOE__W, share->group->fresh && !t);
}
static void moe__experts_w2_back(const moe__run *run, const moe__experts_share *share) {
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *h = moe__experts_panel(run->memory->experts.h, plan->hp, group, 0, 0);
    const float *dy = moe__experts_panel(run->memory->experts.out, plan->dp, group, 0, 0);
    moe__experts_outer(run, share, h, group->rows * MOE__W, plan->f, dy, plan->dp, group->d_params + plan->w2);
}
static void moe__experts_w1_back(const moe__run *run, const moe__experts_share *share) {
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *dz = moe__experts_panel(run->memory->experts.z, plan->zp, group, 0, 0);
    moe__experts_outer(run, share, group->x, group->x_panel, plan->d, dz, plan->zp, group->d_params);
}
static void moe__experts_x_back(const moe__run *run, const moe__experts_share *share) { /* the rows' dx = dz W1^T */
    const moe__plan *plan = run->plan;
    const moe__run_group *group = share->group;
    const float *dz = moe__experts_panel(run->memory->experts.z, plan->zp, group, 0, share->row);
    moe__product_target to = moe__experts_out(run, share);
    moe__product_t(run->kernels, share->rows, plan->zp * MOE__W, dz, group->rows * MOE__W, group->params, plan->d,
                   share->unit * MOE__W, &to);
}
/* Gradients of an expert's biases; all of them where no token came and the gradient is fresh. g: a group */
static void moe__experts_biases_back(const moe__run *run, size_t g) {
    const moe__plan *plan = run->plan;
    const moe__run_experts *experts = &run->memory->experts;
    const moe__run_group *group = &experts->group[g];
    float *dw = group->d_params;
    if (group->fresh && !group->rows) memset(dw, 0, plan->expert * sizeof(float));
    if (!plan->bias) return;
    if (group->fresh) {
        memset(dw + plan->b1, 0, (plan->w2 - plan->b1) * sizeof(float));
        memset(dw + plan->b2, 0, (plan->expert - plan->b2) * sizeof(float));
    }
    for (size_t unit = 0; unit < plan->zp; unit++)
        for (size_t row = 0; row < group->rows; row++) {
            const float *dz = moe__experts_panel(experts->z, plan->zp, group, unit, row);
            run->kernels->axpy(MOE__W, 1.0f, dz, dw + plan->b1 + unit * MOE__W);
        }
    for (size_t unit = 0; unit < plan->dp; unit++)
        for (size_t row = 0; row < group->rows; row++) {
            const float *dy = moe__experts_panel(experts->out, plan->dp, group, unit, row);
            run->kernels->axpy(MOE__W, group->weight ? group->weight[row] : 1.0f, dy, dw + plan->b2 + unit * MOE__W);
        }
}
/* From the gathered dy to the parameters' gradients; fresh: some group's gradient is set. */
static void moe__experts_params_back(const moe__run *run, int fresh) {
    const moe__plan *plan = run->plan;
    moe__experts_phase(run, plan->hp, moe__experts_block_rows(plan->d), 0, moe__experts_down_back);
    if (run->d_weight && !run->memory->losses.d_out)
        moe__experts_phase(run, 1, MOE__TOKENS, 0, moe__experts_weights_back);
    if (fresh || plan->bias) moe__run_over(run, run->memory->experts.n_groups, plan->expert, moe__experts_biases_back);
    moe__experts_phase(run, plan->hp, SIZE_MAX, 8, moe__experts_w2_back);
    moe__experts_phase(run, plan->dp, SIZE_MAX, 8, moe__experts_w1_back);
}
static void moe__experts_rows_back(const moe__run *run) {
    size_t rows = moe__experts_block_rows(moe__min(run->plan->zp * MOE__W, MOE__KG));
    moe__experts_phase(run, run->plan->dp, rows, 0, moe__experts_x_back);
}

/* ==== >>combine ===============================================================================
 * How the experts' outputs become y, and what an expert computes: a row of moe__combine_table each. The combination
 * makes the groups of rows, gathers their inputs, and after the experts' phases mixes the outputs; the way back is the
 * same, reversed.
 *
 *   sum     group = an expert's routes     y_t = sum of w o over its routes, in slot order
 *   soft    group = an expert's slots      slot = mix of all tokens of a sequence; y_t = mix of all slots
 *   merge   group = a sequence             parameters = mix of all experts'; y_t = its one output
 *   robust  as sum, with weights that leave out outputs far from the others
 */
/* -- outputs some of which may be wrong -- */
/* 16 columns of n rows, each sorted upwards by a network of neighbours' exchanges: the same steps whatever the numbers.
 * */
static void moe__combine_sort_columns(size_t count, float *x) {
    for (size_t pass = 0; pass < count; pass++)
        for (size_t i = pass % 2; i + 1 < count; i += 2) {
            float *upper = x + i * 16, *lower = upper + 16;
            for (int c = 0; c < 16; c++) {
                float first = upper[c], second = lower[c];
                upper[c] = second < first ? second : first;
                lower[c] = second < first ? first : second;
            }
        }
}
/* In each coordinate the mean of the n rows without the `cut` lowest and as many highest. row[i] (d); sorted (n, 16) */
static void moe__combine_trimmed_mean(size_t count, size_t d, size_t cut, const float *const *row, float *sorted,
                                      float *out) {
    float each = 1.0f / (float)(count - 2 * cut);
    for (size_t at = 0; at < d; at += 16) {
        size_t cols = moe__min(16, d - at);
        for (size_t i = 0; i < count; i++) {
            memset(sorted + i * 16, 0, 16 * sizeof(float));
            memcpy(sorted + i * 16, row[i] + at, cols * sizeof(float));
        }
        if (cut) moe__combine_sort_columns(count, sorted);
        for (size_t c = 0; c < cols; c++) {
            float sum = 0.0f;
            for (size_t i = cut; i < count - cut; i++) sum = moe__fma(sorted[i * 16 + c], each, sum);
            out[at + c] = sum;
        }
    }
}
/* How many to cut on each side so that the middle one, or two, are left. */
static size_t moe__combine_median_cut(size_t count) { return (count - 1) / 2; }

/* diff = x - y; its length */
static float moe__combine_distance(const moe__kernels *kernels, size_t d, const float *x, const float *y, float *diff) {
    memcpy(diff, x, d * sizeof(float));
    kernels->axpy(d, -1.0f, y, diff);
    return sqrtf(kernels->dot(d, diff, diff));
}

typedef struct moe__combine_work { const float **row; float *sorted, *center, *diff, *step; } moe__combine_work;
static moe_status moe__combine_work_layout(size_t count, size_t d, moe__combine_work *work, moe__arena *arena) {
    memset(work, 0, sizeof *work);
    if (!count) return MOE_E_NO_OUTPUTS;
    if (count > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    work->row = (const float **)moe__take(arena, count, sizeof(float *));
    work->sorted = moe__take_floats(arena, count, 16);
    work->center = moe__take_floats(arena, d, 1);
    work->diff = moe__take_floats(arena, d, 1);
    work->step = moe__take_floats(arena, d, 1);
    if (arena->overflow) return MOE_E_OVERFLOW;
    return MOE_OK;
}
MOE_API moe_status moe_robust_weights_scratch(size_t k, size_t d, size_t *bytes) {
    moe__arena arena = {NULL, 0, 0};
    moe__combine_work work;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__combine_work_layout(k, d, &work, &arena);
    if (!status) status = moe__arena_bytes(&arena, bytes);
    return status;
}
MOE_API moe_status moe_aggregate_scratch(size_t count, size_t d, size_t *bytes) {
    return moe_robust_weights_scratch(count, d, bytes);
}

/* reliability[e] = -(distance / median distance) / tau: what goes into exp; -infinity for outputs that are not finite.
 * work->row has the n that are. */
static void moe__combine_reliability(const moe__kernels *kernels, size_t k, size_t count, size_t d,
                                     const float *const *outputs, float tau,
                                     moe__combine_work *work, float *reliability) {
    float *far = work->sorted;
    moe__combine_trimmed_mean(count, d, moe__combine_median_cut(count), work->row, work->sorted, work->center);
    for (size_t i = 0; i < count; i++)
        far[i * 16] = moe__combine_distance(kernels, d, work->row[i], work->center, work->diff);
    for (size_t i = 0, e = 0; e < k; e++) {
        reliability[e] = INFINITY;
        if (i < count && work->row[i] == outputs[e]) reliability[e] = far[i++ * 16];
    }
    moe__combine_sort_columns(count, far); /* the other 15 columns hold anything */
    float median = far[count / 2 * 16];
    if (count % 2 == 0) median = moe__fma(0.5f, far[(count / 2 - 1) * 16], 0.5f * median);
    for (size_t e = 0; e < k; e++) {
        float distance = reliability[e];
        if (median > 0.0f && distance < INFINITY) reliability[e] = -(distance / median) / tau;
        else reliability[e] = median > 0.0f || distance > 0.0f ? -INFINITY : 0.0f;
    }
}
MOE_API moe_status moe_robust_weights(size_t k, size_t d, const float *const *outputs, const float *weight, float tau,
                                      float *reliability, float *out, void *scratch, size_t scratch_bytes) {
    size_t needed, count = 0;
    moe__scratch memory;
    moe__combine_work work;
    moe_status status = moe_robust_weights_scratch(k, d, &needed);
    if (status) return status;
    if (!(tau > 0.0f && moe__finite(tau))) return MOE_E_TAU;
    if (!outputs) return MOE_E_NULL_OUTPUTS;
    if (!weight) return MOE_E_NULL_WEIGHT;
    if (!reliability || !out) return MOE_E_NULL_OUT;
    for (size_t e = 0; e < k; e++)
        if (d && !outputs[e]) return MOE_E_NULL_OUTPUTS;
    if (!moe__all_finite(k, weight)) return MOE_E_NAN_WEIGHT;
    status = moe__scratch_begin(&memory, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__combine_work_layout(k, d, &work, &memory.arena);
    const moe__kernels *kernels = moe__dispatched();
    for (size_t e = 0; e < k; e++) {
        reliability[e] = out[e] = 0.0f; /* what stays so where nothing is finite */
        if (moe__all_finite(d, outputs[e])) work.row[count++] = outputs[e];
    }
    if (count) {
        float sum = 0.0f;
        moe__combine_reliability(kernels, k, count, d, outputs, tau, &work, reliability);
        kernels->exp(k, reliability, reliability);
        for (size_t e = 0; e < k; e++) out[e] = weight[e] * reliability[e];
        for (size_t e = 0; e < k; e++) sum += out[e];
        int any = sum > 0.0f || sum < 0.0f;
        for (size_t e = 0; e < k; e++) out[e] = any ? out[e] / sum : 0.0f;
    }
    moe__scratch_end(&memory);
    return MOE_OK;
}

/* From the coordinates' median: y -> the mean of the others by the inverse of their distance, and less of that step
 * where y is one of the points, none if the others do not pull more than these hold. */
static void moe__combine_geometric_median(const moe__kernels *kernels, size_t count, size_t d, moe__combine_work *work,
                                          float *y) {
    for (int i = 0; i < 1000; i++) {
        float total = 0.0f, here = 0.0f;
        memset(work->step, 0, d * sizeof(float));
        for (size_t r = 0; r < count; r++) {
            float far = moe__combine_distance(kernels, d, work->row[r], y, work->diff);
            if (far > 0.0f) total += 1.0f / far, kernels->axpy(d, 1.0f / far, work->diff, work->step);
            else here += 1.0f;
        }
        float pull = sqrtf(kernels->dot(d, work->step, work->step));
        if (!(pull - here > 1e-6f * (float)count)) return; /* the gradient of the sum of distances: 0 within rounding */
        kernels->axpy(d, (1.0f - here / pull) / total, work->step, y);
    }
}
MOE_API moe_status moe_aggregate(moe_aggregate_kind kind, size_t n, size_t d, const float *rows, float trim, float *out,
                                 void *scratch, size_t scratch_bytes) {
    size_t needed, count, cut = 0;
    moe__scratch memory;
    moe__combine_work work;
    if ((unsigned)kind >= MOE_AGGREGATE_COUNT) return MOE_E_AGGREGATE;
    if (kind == MOE_AGGREGATE_TRIMMED && !(trim >= 0.0f && trim < 0.5f)) return MOE_E_TRIM;
    moe_status status = moe_aggregate_scratch(n, d, &needed);
    if (!status && !moe__mul(n, d, &count)) status = MOE_E_OVERFLOW;
    if (status || !d) return status;
    if (!rows) return MOE_E_NULL_OUTPUTS;
    if (!out) return MOE_E_NULL_OUT;
    if (!moe__all_finite(count, rows)) return MOE_E_NAN_OUTPUTS;
    status = moe__scratch_begin(&memory, scratch, scratch_bytes, needed);
    if (status) return status;
    moe__combine_work_layout(n, d, &work, &memory.arena);
    for (size_t r = 0; r < n; r++) work.row[r] = rows + r * d;
    if (kind == MOE_AGGREGATE_TRIMMED) cut = moe__min((size_t)((double)trim * (double)n), moe__combine_median_cut(n));
    if (kind >= MOE_AGGREGATE_MEDIAN) cut = moe__combine_median_cut(n);
    moe__combine_trimmed_mean(n, d, cut, work.row, work.sorted, out);
    if (kind == MOE_AGGREGATE_GEOMETRIC) moe__combine_geometric_median(moe__dispatched(), n, d, &work, out);
    moe__scratch_end(&memory);
    return MOE_OK;
}

/* Row t of all tokens' panels: y += a x, and <w, x>. */
static void moe__combine_token_axpy(const moe__run *run, float a, size_t token, float *y) {
    for (size_t p = 0; p < run->plan->dp; p++)
        run->kernels->axpy(moe__run_columns(run, p), a, moe__run_token(run, p, token), y + p * MOE__W);
}
static float moe__combine_token_dot(const moe__run *run, const float *w, size_t token) {
    float sum = 0.0f;
    for (size_t p = 0; p < run->plan->dp; p++)
        sum += run->kernels->dot(moe__run_columns(run, p), moe__run_token(run, p, token), w + p * MOE__W);
    return sum;
}

/* -- experts that are no networks, as in MoE++ [C]: zero, copy, constant: o = a_0 x + a_1 v, a = softmax(W x) -- */
typedef enum moe__combine_special_kind { MOE__ZERO, MOE__COPY, MOE__CONSTANT } moe__combine_special_kind;
typedef struct moe__combine_constant { const float *w, *v; float *dw, *dv, a[2]; } moe__combine_constant;
/* What expert e is; c is filled for a constant one. */
static moe__combine_special_kind moe__combine_special(const moe__run *run, size_t expert, size_t token,
                                                      moe__combine_constant *constant) {
    size_t d = run->plan->d, i = expert - run->plan->F;
    float z[2];
    if (i < run->desc->n_zero) return MOE__ZERO;
    if (i < run->desc->n_zero + run->desc->n_copy) return MOE__COPY;
    i -= run->desc->n_zero + run->desc->n_copy;
    size_t w = run->plan->special + i * 2 * d, v = run->plan->special + run->desc->n_constant * 2 * d + i * d;
    constant->w = run->params + w;
    constant->v = run->params + v;
    constant->dw = constant->dv = NULL;
    if (run->d_params) constant->dw = run->d_params + w, constant->dv = run->d_params + v;
    for (int k = 0; k < 2; k++) z[k] = moe__combine_token_dot(run, constant->w + (size_t)k * d, token);
    run->kernels->softmax(2, 1.0f, z, constant->a);
    return MOE__CONSTANT;
}
static void moe__combine_special_add(const moe__run *run, size_t expert, size_t token, float weight, float *y) {
    moe__combine_constant constant;
    moe__combine_special_kind kind = moe__combine_special(run, expert, token, &constant);
    if (kind == MOE__COPY) moe__combine_token_axpy(run, weight, token, y);
    if (kind == MOE__CONSTANT) {
        moe__combine_token_axpy(run, weight * constant.a[0], token, y);
        run->kernels->axpy(run->plan->d, weight * constant.a[1], constant.v, y);
    }
}
/* What the two gates of a constant expert get: dz = weight * a (da - <a, da>), da = (<dy, x>, <dy, v>). Returns
 * <a, da>. */
static float moe__combine_constant_dz(const moe__run *run, const moe__combine_constant *constant, size_t token,
                                      float weight, float dz[2]) {
    const float *dy = moe__run_dy(run, token);
    float da[2] = {moe__combine_token_dot(run, dy, token), run->kernels->dot(run->plan->d, dy, constant->v)};
    float mean = moe__fma(constant->a[0], da[0], constant->a[1] * da[1]);
    for (int k = 0; k < 2; k++) dz[k] = weight * constant->a[k] * (da[k] - mean);
    return mean;
}
static void moe__combine_special_dx(const moe__run *run, size_t expert, size_t token, float weight, float *dx) {
    moe__combine_constant constant;
    size_t d = run->plan->d;
    float dz[2];
    moe__combine_special_kind kind = moe__combine_special(run, expert, token, &constant);
    if (kind == MOE__COPY) run->kernels->axpy(d, weight, moe__run_dy(run, token), dx);
    if (kind != MOE__CONSTANT) return;
    moe__combine_constant_dz(run, &constant, token, weight, dz);
    run->kernels->axpy(d, weight * constant.a[0], moe__run_dy(run, token), dx);
    for (size_t k = 0; k < 2; k++) run->kernels->axpy(d, dz[k], constant.w + k * d, dx);
}
/* Special expert `index`: gradients of its weights and parameters, its routes in order */
static void moe__combine_special_back(const moe__run *run, size_t index) {
    const moe_routes *routes = &run->tape->routes;
    size_t expert = run->plan->F + index, d = run->plan->d;
    for (uint32_t route = routes->begin[expert]; route < routes->begin[expert + 1]; route++) {
        moe__combine_constant constant;
        size_t token = routes->token[route];
        float dz[2], dw = 0.0f;
        moe__combine_special_kind kind = moe__combine_special(run, expert, token, &constant);
        if (kind == MOE__COPY) dw = moe__combine_token_dot(run, moe__run_dy(run, token), token);
        if (kind == MOE__CONSTANT) {
            dw = moe__combine_constant_dz(run, &constant, token, run->weight[route], dz);
            for (size_t k = 0; k < 2; k++) moe__combine_token_axpy(run, dz[k], token, constant.dw + k * d);
            run->kernels->axpy(d, run->weight[route] * constant.a[1], moe__run_dy(run, token), constant.dv);
        }
        if (run->d_weight) run->d_weight[route] = dw;
    }
}

/* -- groups -- */
/* Group g: expert e's parameters over `rows` rows from `begin`, as yet all tokens. */
static moe__run_group *moe__combine_group(const moe__run *run, size_t g, size_t expert, size_t begin, size_t rows) {
    moe__run_group *group = &run->memory->experts.group[g];
    memset(group, 0, sizeof *group);
    group->params = run->params + expert * run->plan->expert;
    if (run->d_params) group->d_params = run->d_params + expert * run->plan->expert;
    group->fresh = run->fresh;
    group->begin = begin;
    group->rows = rows;
    group->x = run->memory->tokens;
    group->x_panel = run->tape->n_tokens * MOE__W;
    return group;
}
/* Its rows' inputs are gathered into experts.x. */
static void moe__combine_group_gathered(const moe__run *run, moe__run_group *group) {
    group->x = run->memory->experts.x + group->begin * run->plan->dp * MOE__W;
    group->x_panel = group->rows * MOE__W;
}

/* -- sum: an expert computes the tokens of its routes -- */
static int moe__combine_special_experts(const moe_desc *desc) {
    return desc->n_zero || desc->n_copy || desc->n_constant;
}
static moe_status moe__combine_sum_fits(const moe_desc *desc) {
    if (desc->soft_slots != 1) return MOE_E_SOFT_SLOTS;
    return MOE_OK;
}
static int moe__combine_sum_rows(const moe__plan *plan, size_t n_tokens, size_t *rows) {
    if (plan->desc.select != MOE_SELECT_EXPERT_CHOICE) return moe__mul(n_tokens, plan->S, rows);
    if (!moe__mul(n_tokens, plan->desc.top_k, rows)) return 0; /* what an expert chooses is rounded up */
    return !n_tokens || moe__add_size(*rows, plan->E, rows);
}
static void moe__combine_sum_groups(const moe__run *run) {
    const moe_routes *routes = &run->tape->routes;
    run->memory->experts.n_own = run->plan->F;
    run->memory->experts.shared_row = routes->n_routes;
    for (size_t expert = 0; expert < run->plan->F; expert++) {
        size_t begin = routes->begin[expert];
        moe__run_group *group = moe__combine_group(run, expert, expert, begin, routes->begin[expert + 1] - begin);
        group->token = routes->token + begin;
        group->weight = run->weight + begin;
        moe__combine_group_gathered(run, group);
    }
}
static void moe__combine_sum_gather(const moe__run *run) {
    moe__experts_phase(run, 1, MOE__TOKENS, 0, moe__experts_gather);
}
static void moe__combine_sum_gather_dy(const moe__run *run) {
    moe__experts_phase(run, 1, MOE__TOKENS, 0, moe__experts_gather_dy);
}
static void moe__combine_sum_mix(const moe__run *run, size_t token, float *y) {
    const moe__plan *plan = run->plan;
    const moe_routes *routes = &run->tape->routes;
    for (size_t s = 0; s < plan->S; s++) {
        uint32_t route = routes->slot[token * plan->S + s];
        if (route == MOE_NONE || run->weight[route] == 0.0f) continue; /* also where a robust weight shuts out a NaN */
        float weight = run->weight[route];
        if (route < routes->begin[plan->F])
            run->kernels->axpy(plan->d, weight, run->memory->experts.out + route * plan->ldo, y);
        else moe__combine_special_add(run, moe__routes_expert(routes, route), token, weight, y);
    }
}
/* The rows' dx have the weights inside. */
static void moe__combine_sum_mix_back(const moe__run *run, size_t token, float *dx) {
    const moe__plan *plan = run->plan;
    const moe_routes *routes = &run->tape->routes;
    for (size_t s = 0; s < plan->S; s++) {
        uint32_t route = routes->slot[token * plan->S + s];
        if (route == MOE_NONE) continue;
        if (route < routes->begin[plan->F])
            run->kernels->axpy(plan->d, 1.0f, run->memory->experts.out + route * plan->ldo, dx);
        else moe__combine_special_dx(run, moe__routes_expert(routes, route), token, run->weight[route], dx);
    }
}

/* -- soft [C]: slot n of a sequence reads sum_t D_tn x_t, D a softmax over the sequence's tokens; y_t = sum_n C_tn o_n,
 * C a softmax over the slots. The rows of group e: its slots of the first sequence, of the second, ... -- */
static moe_status moe__combine_all_fits(const moe_desc *desc) { /* every expert takes part, weighted by a softmax */
    if (moe__combine_special_experts(desc)) return MOE_E_SPECIAL_EXPERTS;
    if (desc->select != MOE_SELECT_ALL) return MOE_E_SELECT_COMBINE;
    if (desc->gate != MOE_GATE_SOFTMAX) return MOE_E_COMBINE_GATE;
    if (desc->capacity_factor != (float)MOE_OFF) return MOE_E_COMBINE_CAPACITY;
    if (desc->capacity_factor_eval != (float)MOE_OFF) return MOE_E_COMBINE_CAPACITY;
    return desc->gate_drop > 0.0f ? MOE_E_GATE_DROP : MOE_OK; /* they cannot leave experts out */
}
static moe_status moe__combine_soft_fits(const moe_desc *desc) {
    moe_status status = moe__combine_all_fits(desc);
    if (status) return status;
    if (!moe__score_is_latent(desc->score)) return MOE_E_COMBINE_SCORE;
    if (desc->noise != MOE_NOISE_NONE) return MOE_E_COMBINE_NOISE;
    if (desc->route_sequence == MOE_ON) return MOE_E_ROUTE_SEQUENCE;
    return desc->residual == MOE_ON ? MOE_E_RESIDUAL : MOE_OK;
}
static int moe__combine_soft_rows(const moe__plan *plan, size_t n_tokens, size_t *rows) {
    return moe__mul(moe__run_most_sequences(plan, n_tokens), plan->N, rows);
}
static moe_status moe__combine_soft_layout(moe__run_memory *memory, size_t n_tokens, moe__arena *arena) {
    moe__run_combine *combine = &memory->combine;
    size_t N = memory->plan.N;
    combine->soft = moe__take_floats(arena, n_tokens, N);
    combine->mix = moe__take_floats(arena, n_tokens, N);
    combine->dispatch = moe__take_floats(arena, n_tokens, N);
    if (!memory->training) return MOE_OK;
    combine->d_soft = moe__take_floats(arena, n_tokens, N);
    combine->d_mix = moe__take_floats(arena, n_tokens, N);
    combine->d_dispatch = moe__take_floats(arena, n_tokens, N);
    return MOE_OK;
}
static size_t moe__combine_soft_slots(const moe__run *run) { return run->plan->N / run->plan->E; }
/* Row of slot n of token t's sequence. */
static const float *moe__combine_soft_out(const moe__run *run, size_t token, size_t slot) {
    size_t slots = moe__combine_soft_slots(run), sequence = moe__run_sequence_of(run, token);
    size_t row = (slot / slots * moe__run_sequences(run) + sequence) * slots + slot % slots;
    return run->memory->experts.out + row * run->plan->ldo;
}
/* In the router's forward. Of a block of tokens: mix, and the tape's logits = log of the sum of exp over an expert's
 * slots. */
static void moe__combine_soft_weights(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, N = run->plan->N, slots = N / E;
    float inv_t = run->memory->now.inv_t;
    if (!run->memory->combine.soft) return;
    for (size_t token = t0; token < t1; token++) {
        const float *z = run->memory->combine.soft + token * N;
        float *work = run->memory->combine.mix + token * N;
        if (slots == 1) memcpy(run->tape->logits + token * E, z, E * sizeof(float));
        else {
            for (size_t slot = 0; slot < N; slot++) work[slot] = z[slot] * inv_t;
            for (size_t expert = 0; expert < E; expert++)
                run->tape->logits[token * E + expert] = run->kernels->lse(slots, work + expert * slots) / inv_t;
        }
        run->kernels->softmax(N, inv_t, z, work);
    }
}
/* A sequence: softmax over its tokens for each slot: columns of (T, N). */
static void moe__combine_soft_dispatch(const moe__run *run, size_t sequence) {
    size_t N = run->plan->N, t0 = moe__run_sequence_begin(run, sequence), t1 = moe__run_sequence_end(run, sequence);
    float inv_t = run->memory->now.inv_t, top[MOE__W], sum[MOE__W];
    for (size_t slot = 0; slot < N; slot += MOE__W) {
        size_t cols = moe__min(MOE__W, N - slot);
        const float *z = run->memory->combine.soft + slot;
        float *weight = run->memory->combine.dispatch + slot;
        for (size_t c = 0; c < cols; c++) top[c] = z[t0 * N + c], sum[c] = 0.0f;
        for (size_t token = t0; token < t1; token++)
            for (size_t c = 0; c < cols; c++)
                if (z[token * N + c] > top[c]) top[c] = z[token * N + c];
        for (size_t token = t0; token < t1; token++) {
            for (size_t c = 0; c < cols; c++) weight[token * N + c] = (z[token * N + c] - top[c]) * inv_t;
            run->kernels->exp(cols, weight + token * N, weight + token * N);
            for (size_t c = 0; c < cols; c++) sum[c] += weight[token * N + c];
        }
        for (size_t token = t0; token < t1; token++)
            for (size_t c = 0; c < cols; c++) weight[token * N + c] /= sum[c];
    }
}
static void moe__combine_soft_groups(const moe__run *run) {
    size_t rows = moe__combine_soft_slots(run) * moe__run_sequences(run);
    run->memory->experts.n_own = run->plan->F;
    run->memory->experts.shared_row = rows * run->plan->E;
    for (size_t expert = 0; expert < run->plan->F; expert++)
        moe__combine_group_gathered(run, moe__combine_group(run, expert, expert, expert * rows, rows));
}
/* A slot. to (panels of its group) = sum over each sequence's tokens of weight (T, N) times a row: of the tokens, or
 * of dy. */
static void moe__combine_soft_read(const moe__run *run, size_t slot, const float *weight, int dy, float *to) {
    size_t slots = moe__combine_soft_slots(run), count = moe__run_sequences(run), N = run->plan->N;
    to += slot / slots * count * slots * run->plan->dp * MOE__W;
    for (size_t sequence = 0; sequence < count; sequence++)
        for (size_t p = 0; p < run->plan->dp; p++) {
            float *out = to + (p * count * slots + sequence * slots + slot % slots) * MOE__W;
            memset(out, 0, MOE__W * sizeof(float));
            size_t token = moe__run_sequence_begin(run, sequence), end = moe__run_sequence_end(run, sequence);
            for (; token < end; token++) {
                float share = weight[token * N + slot];
                if (!dy) run->kernels->axpy(MOE__W, share, moe__run_token(run, p, token), out);
                else run->kernels->axpy(moe__run_columns(run, p), share, moe__run_dy(run, token) + p * MOE__W, out);
            }
        }
}
static void moe__combine_soft_x(const moe__run *run, size_t slot) {
    moe__combine_soft_read(run, slot, run->memory->combine.dispatch, 0, run->memory->experts.x);
}
static void moe__combine_soft_dy(const moe__run *run, size_t slot) {
    moe__combine_soft_read(run, slot, run->memory->combine.mix, 1, run->memory->experts.out);
}
static void moe__combine_soft_over(const moe__run *run, moe__run_item *body) { /* all slots, if there are tokens */
    if (run->tape->n_tokens) moe__run_over(run, run->plan->N, run->tape->n_tokens * run->plan->d, body);
}
static void moe__combine_soft_gather(const moe__run *run) { moe__combine_soft_over(run, moe__combine_soft_x); }
static void moe__combine_soft_mix(const moe__run *run, size_t token, float *y) {
    const float *weight = run->memory->combine.mix + token * run->plan->N;
    for (size_t slot = 0; slot < run->plan->N; slot++)
        run->kernels->axpy(run->plan->d, weight[slot], moe__combine_soft_out(run, token, slot), y);
}
static void moe__combine_soft_mix_back(const moe__run *run, size_t token, float *dx) {
    const float *weight = run->memory->combine.dispatch + token * run->plan->N;
    for (size_t slot = 0; slot < run->plan->N; slot++)
        run->kernels->axpy(run->plan->d, weight[slot], moe__combine_soft_out(run, token, slot), dx);
}
/* d_mix_tn = <dy_t, o_n>, before o is used for dy; d_dispatch_tn = <x_t, dx_n>, after o holds dx of the slots */
static void moe__combine_soft_d_mix(const moe__run *run, size_t t0, size_t t1) {
    size_t N = run->plan->N, d = run->plan->d;
    float *d_mix = run->memory->combine.d_mix + t0 * N;
    for (size_t token = t0; token < t1; token++)
        for (size_t slot = 0; slot < N; slot++)
            *d_mix++ = run->kernels->dot(d, moe__run_dy(run, token), moe__combine_soft_out(run, token, slot));
}
static void moe__combine_soft_d_dispatch(const moe__run *run, size_t t0, size_t t1) {
    size_t N = run->plan->N;
    float *d_dispatch = run->memory->combine.d_dispatch + t0 * N;
    for (size_t token = t0; token < t1; token++)
        for (size_t slot = 0; slot < N; slot++)
            *d_dispatch++ = moe__combine_token_dot(run, moe__combine_soft_out(run, token, slot), token);
}
/* The slots read mixtures of dy, the shared experts dy itself. */
static void moe__combine_soft_gather_dy(const moe__run *run) {
    moe__run_experts *experts = &run->memory->experts;
    moe__run_over_blocks(run, moe__combine_soft_d_mix);
    moe__combine_soft_over(run, moe__combine_soft_dy);
    for (size_t g = 0; g < experts->n_own; g++) experts->group[g].rows = 0; /* not these */
    moe__experts_phase(run, 1, MOE__TOKENS, 0, moe__experts_gather_dy);
    moe__combine_soft_groups(run);
}
static void moe__combine_soft_rows_back(const moe__run *run) {
    moe__run_over_blocks(run, moe__combine_soft_d_dispatch);
}
/* In the router's backward. A sequence: d_soft = the gradient by soft: softmax backward along rows (mix) and along
 * columns (dispatch). */
static void moe__combine_soft_logits(const moe__run *run, size_t sequence) {
    const moe__run_combine *combine = &run->memory->combine;
    size_t N = run->plan->N, t0 = moe__run_sequence_begin(run, sequence), t1 = moe__run_sequence_end(run, sequence);
    float inv_t = run->memory->now.inv_t, mean[MOE__W];
    for (size_t token = t0; token < t1; token++) {
        const float *c = combine->mix + token * N, *dc = combine->d_mix + token * N;
        float along = run->kernels->dot(N, c, dc);
        for (size_t slot = 0; slot < N; slot++)
            combine->d_soft[token * N + slot] = inv_t * c[slot] * (dc[slot] - along);
    }
    for (size_t slot = 0; slot < N; slot += MOE__W) {
        size_t cols = moe__min(MOE__W, N - slot);
        const float *weight = combine->dispatch + slot, *d_weight = combine->d_dispatch + slot;
        float *dz = combine->d_soft + slot;
        memset(mean, 0, sizeof mean);
        for (size_t token = t0; token < t1; token++)
            for (size_t c = 0; c < cols; c++)
                mean[c] = moe__fma(weight[token * N + c], d_weight[token * N + c], mean[c]);
        for (size_t token = t0; token < t1; token++)
            for (size_t c = 0; c < cols; c++) {
                float slope = inv_t * weight[token * N + c];
                dz[token * N + c] = moe__fma(slope, d_weight[token * N + c] - mean[c], dz[token * N + c]);
            }
    }
}
static void moe__combine_soft_back(const moe__run *run) {
    const moe__run_combine *combine = &run->memory->combine;
    size_t T = run->tape->n_tokens, N = run->plan->N;
    float *d_scale = moe__run_grad(run, MOE__R_SCALE);
    if (!run->weight_grad) { /* the losses alone */
        memset(combine->d_soft, 0, T * N * sizeof(float));
        return;
    }
    moe__run_over_sequences(run, N * 4, moe__combine_soft_logits);
    if (!d_scale) return;
    for (size_t token = 0; token < T; token++)
        *d_scale += run->kernels->dot(N, combine->d_soft + token * N, combine->soft + token * N);
}
/* What the auxiliary losses put into memory->d_logits goes on to the slots: by each slot's share of its expert. */
static void moe__combine_soft_losses_back(const moe__run *run) {
    size_t E = run->plan->E, slots = moe__combine_soft_slots(run);
    if (!run->memory->combine.soft) return;
    for (size_t i = 0; i < run->tape->n_tokens * E; i++) { /* a token and an expert */
        const float *mix = run->memory->combine.mix + i * slots;
        float *dz = run->memory->combine.d_soft + i * slots, sum = 0.0f;
        for (size_t slot = 0; slot < slots; slot++) sum += mix[slot];
        if (!(sum > 0.0f)) continue;
        for (size_t slot = 0; slot < slots; slot++)
            dz[slot] = moe__fma(run->memory->d_logits[i], mix[slot] / sum, dz[slot]);
    }
}

/* -- merge: W_s = sum_e p_e W_e, as in SMEAR [C]; dW_e = sum_s p_e dW_s, dp_e = <dW_s, W_e> -- */
#define MOE__MERGE_SPAN ((size_t)4096)
static moe_status moe__combine_merge_fits(const moe_desc *desc) {
    moe_status status = moe__combine_all_fits(desc);
    if (status) return status;
    if (desc->route_sequence != MOE_ON) return MOE_E_ROUTE_SEQUENCE;
    return moe__combine_sum_fits(desc);
}
static int moe__combine_merge_rows(const moe__plan *plan, size_t n_tokens, size_t *rows) {
    (void)plan;
    *rows = n_tokens;
    return 1;
}
static moe_status moe__combine_merge_layout(moe__run_memory *memory, size_t n_tokens, moe__arena *arena) {
    size_t count = moe__run_most_sequences(&memory->plan, n_tokens);
    memory->combine.merged = moe__take_floats(arena, count, memory->plan.expert);
    if (memory->training) memory->combine.d_merged = moe__take_floats(arena, count, memory->plan.expert);
    return MOE_OK;
}
static void moe__combine_merge_groups(const moe__run *run) {
    const moe__run_combine *combine = &run->memory->combine;
    size_t count = moe__run_sequences(run);
    run->memory->experts.n_own = count;
    run->memory->experts.shared_row = run->tape->n_tokens;
    for (size_t sequence = 0; sequence < count; sequence++) {
        size_t first = moe__run_sequence_begin(run, sequence);
        size_t rows = moe__run_sequence_end(run, sequence) - first;
        moe__run_group *group = moe__combine_group(run, sequence, 0, first, rows);
        group->first = first;
        group->x = moe__run_token(run, 0, first);
        group->params = combine->merged + sequence * run->plan->expert;
        if (combine->d_merged) group->d_params = combine->d_merged + sequence * run->plan->expert;
        group->fresh = 1;
    }
}
/* Item: a span of the parameters of a sequence. */
static void moe__combine_merge_span(const moe__run *run, size_t item) {
    const moe_routes *routes = &run->tape->routes;
    size_t length = run->plan->expert, spans = moe__ceil_div(length, MOE__MERGE_SPAN), sequence = item / spans;
    size_t at = item % spans * MOE__MERGE_SPAN, count = moe__min(MOE__MERGE_SPAN, length - at);
    size_t token = moe__run_sequence_begin(run, sequence);
    float *to = run->memory->combine.merged + sequence * length + at;
    memset(to, 0, count * sizeof(float));
    for (size_t k = 0; k < run->plan->S; k++) {
        uint32_t route = routes->slot[token * run->plan->S + k];
        if (route == MOE_NONE) continue;
        const float *params = run->params + moe__routes_expert(routes, route) * length;
        run->kernels->axpy(count, routes->weight[route], params + at, to);
    }
}
static void moe__combine_merge_gather(const moe__run *run) {
    size_t spans = moe__ceil_div(run->plan->expert, MOE__MERGE_SPAN);
    moe__run_over(run, moe__run_sequences(run) * spans, MOE__MERGE_SPAN * run->plan->S, moe__combine_merge_span);
}
/* its routes are in the order of the sequences */
static void moe__combine_merge_expert(const moe__run *run, size_t expert) {
    const moe_routes *routes = &run->tape->routes;
    size_t length = run->plan->expert;
    float *to = run->d_params + expert * length;
    if (run->fresh) memset(to, 0, length * sizeof(float));
    for (uint32_t route = routes->begin[expert]; route < routes->begin[expert + 1]; route++) {
        size_t token = routes->token[route];
        const float *dw = run->memory->combine.d_merged + moe__run_sequence_of(run, token) * length;
        if (run->d_weight) run->d_weight[route] = 0.0f;
        if (moe__run_place(run, token)) continue; /* a sequence's weights are those of its first token */
        run->kernels->axpy(length, routes->weight[route], dw, to);
        if (run->d_weight) run->d_weight[route] = run->kernels->dot(length, dw, run->params + expert * length);
    }
}
static void moe__combine_merge_back(const moe__run *run) {
    moe__run_over(run, run->plan->F, run->plan->expert * moe__run_sequences(run) * 2, moe__combine_merge_expert);
}
static void moe__combine_merge_mix(const moe__run *run, size_t token, float *y) {
    run->kernels->axpy(run->plan->d, 1.0f, run->memory->experts.out + token * run->plan->ldo, y);
}

/* -- robust: w = g r / sum g r, r the reliability; r is constant in the gradient [D] -- */
static moe_status moe__combine_robust_fits(const moe_desc *desc) {
    return moe__combine_special_experts(desc) ? MOE_E_SPECIAL_EXPERTS : moe__combine_sum_fits(desc);
}
static moe_status moe__combine_robust_layout(moe__run_memory *memory, size_t n_tokens, moe__arena *arena) {
    const moe__plan *plan = &memory->plan;
    moe__run_combine *combine = &memory->combine;
    size_t bytes;
    moe_status status = moe_robust_weights_scratch(plan->S, plan->d, &bytes);
    if (status) return status;
    bytes += plan->S * (sizeof(float *) + 3 * sizeof(float));
    combine->scratch_bytes = moe__ceil_div(bytes + 64, 64) * 64;
    combine->scratch = (unsigned char *)moe__take(arena, moe__ceil_div(n_tokens, MOE__TOKENS), combine->scratch_bytes);
    combine->robust_weight = (float *)moe__take(arena, memory->n_routed, sizeof(float));
    combine->reliability = moe__take_floats(arena, n_tokens, plan->S);
    return MOE_OK;
}
static void moe__combine_robust_block(const moe__run *run, size_t t0, size_t t1) {
    const moe_routes *routes = &run->tape->routes;
    const moe__run_combine *combine = &run->memory->combine;
    size_t S = run->plan->S;
    unsigned char *scratch = combine->scratch + t0 / MOE__TOKENS * combine->scratch_bytes;
    const float **output = (const float **)(void *)scratch;
    float *gate = (float *)(void *)(scratch + S * sizeof *output), *weight = gate + S, *reliable = weight + S;
    size_t used = (size_t)((unsigned char *)(reliable + S) - scratch), left = combine->scratch_bytes - used;
    for (size_t token = t0; token < t1; token++) {
        const uint32_t *slot = routes->slot + token * S;
        size_t count = 0;
        float sum = 0.0f, tau = run->desc->robust_tau;
        for (size_t k = 0; k < S; k++) {
            if (slot[k] == MOE_NONE) continue;
            output[count] = run->memory->experts.out + slot[k] * run->plan->ldo;
            gate[count++] = routes->weight[slot[k]];
        }
        if (count) moe_robust_weights(count, run->plan->d, output, gate, tau, reliable, weight, scratch + used, left);
        for (size_t k = 0; k < count; k++) sum = moe__fma(gate[k], reliable[k], sum);
        for (size_t k = 0, i = 0; k < S; k++) {
            combine->reliability[token * S + k] = 0.0f;
            if (slot[k] == MOE_NONE) continue;
            combine->robust_weight[slot[k]] = weight[i];
            if (sum > 0.0f) combine->reliability[token * S + k] = reliable[i] / sum;
            i++;
        }
    }
}
static void moe__combine_robust_weigh(const moe__run *run) { moe__run_over_blocks(run, moe__combine_robust_block); }
static void moe__combine_robust_block_back(const moe__run *run, size_t t0, size_t t1) { /* d_weight: of w -> of g */
    size_t S = run->plan->S;
    for (size_t token = t0; token < t1; token++) {
        const uint32_t *slot = run->tape->routes.slot + token * S;
        const float *reliability = run->memory->combine.reliability + token * S;
        float mean = 0.0f;
        for (size_t k = 0; k < S; k++)
            if (slot[k] != MOE_NONE) mean = moe__fma(run->weight[slot[k]], run->d_weight[slot[k]], mean);
        for (size_t k = 0; k < S; k++)
            if (slot[k] != MOE_NONE) run->d_weight[slot[k]] = reliability[k] * (run->d_weight[slot[k]] - mean);
    }
}
static void moe__combine_robust_back(const moe__run *run) {
    if (run->d_weight) moe__run_over_blocks(run, moe__combine_robust_block_back);
}

/* -- the table -- */
typedef struct moe__combine_row {
    const char *name;
    int by_sequence; /* groups are sequences, which read the tokens in place; else experts, whose rows are gathered */
    moe_status (*fits)(const moe_desc *desc);
    int (*rows)(const moe__plan *plan, size_t n_tokens, size_t *rows);                 /* at most; 0: overflow */
    moe_status (*layout)(moe__run_memory *memory, size_t n_tokens, moe__arena *arena); /* NULL: nothing */
    void (*groups)(const moe__run *run);                            /* all but the shared experts' */
    void (*gather)(const moe__run *run);                            /* what the groups read */
    void (*weigh)(const moe__run *run);                             /* when the outputs are there, or NULL */
    void (*mix)(const moe__run *run, size_t token, float *y);       /* y (d) += the outputs */
    void (*gather_dy)(const moe__run *run);                         /* the rows' dy */
    void (*back)(const moe__run *run);                              /* after the parameters' gradients, or NULL */
    void (*rows_back)(const moe__run *run);                         /* NULL, or after the rows' dx, even without dx */
    void (*mix_back)(const moe__run *run, size_t token, float *dx); /* dx (d) += the rows' dx */
} moe__combine_row;
static const moe__combine_row moe__combine_table[MOE_COMBINE_COUNT] = {
    {"default", 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL},
    {"sum", 0, moe__combine_sum_fits, moe__combine_sum_rows, NULL,
     moe__combine_sum_groups, moe__combine_sum_gather, NULL, moe__combine_sum_mix,
     moe__combine_sum_gather_dy, NULL, NULL, moe__combine_sum_mix_back},
    {"soft", 0, moe__combine_soft_fits, moe__combine_soft_rows, moe__combine_soft_layout,
     moe__combine_soft_groups, moe__combine_soft_gather, NULL, moe__combine_soft_mix,
     moe__combine_soft_gather_dy, NULL, moe__combine_soft_rows_back, moe__combine_soft_mix_back},
    {"merge", 1, moe__combine_merge_fits, moe__combine_merge_rows, moe__combine_merge_layout,
     moe__combine_merge_groups, moe__combine_merge_gather, NULL, moe__combine_merge_mix,
     moe__combine_sum_gather_dy, moe__combine_merge_back, NULL, moe__combine_merge_mix},
    {"robust", 0, moe__combine_robust_fits, moe__combine_sum_rows, moe__combine_robust_layout,
     moe__combine_sum_groups, moe__combine_sum_gather, moe__combine_robust_weigh, moe__combine_sum_mix,
     moe__combine_sum_gather_dy, moe__combine_robust_back, NULL, moe__combine_sum_mix_back},
};
MOE__NAME_API(combine, moe__combine_table, MOE_COMBINE_COUNT)
static const moe__combine_row *moe__combine_of(const moe__run *run) { return &moe__combine_table[run->desc->combine]; }

/* Routed experts whose parameters a token uses. */
static size_t moe__combine_used(const moe__plan *plan) {
    if (moe__combine_table[plan->desc.combine].by_sequence) return 1;
    if (plan->desc.combine == MOE_COMBINE_SOFT) return plan->F;
    return moe__min(plan->F, plan->desc.top_k + (plan->desc.n_codes != 0));
}
/* The experts' memory, and that of the combination. */
static moe_status moe__combine_layout(moe__run_memory *memory, size_t n_tokens, moe__arena *arena) {
    const moe__combine_row *row = &moe__combine_table[memory->plan.desc.combine];
    size_t n_routed, n_own = memory->plan.F, gathered;
    if (!row->rows(&memory->plan, n_tokens, &n_routed)) return MOE_E_OVERFLOW;
    gathered = n_routed;
    if (row->by_sequence) n_own = moe__run_most_sequences(&memory->plan, n_tokens), gathered = 0;
    if (memory->plan.desc.shared_gate == MOE_ON) {
        memory->combine.shared_gate = moe__take_floats(arena, n_tokens, 1);
        if (memory->training) memory->combine.d_shared_gate = moe__take_floats(arena, n_tokens, 1);
    }
    moe_status status = moe__experts_layout(memory, n_tokens, n_own, n_routed, gathered, arena);
    if (!status && row->layout) status = row->layout(memory, n_tokens, arena);
    return status;
}

/* -- the passes -- */
/* Which rows each set of parameters computes; the shared experts follow, with all tokens each. */
static void moe__combine_groups(moe__run *run) {
    moe__run_memory *memory = run->memory;
    run->weight = run->tape->routes.weight;
    if (memory->combine.robust_weight) run->weight = memory->combine.robust_weight;
    moe__combine_of(run)->groups(run);
    size_t n_own = memory->experts.n_own, n_shared = run->plan->G - run->plan->F, T = run->tape->n_tokens;
    for (size_t s = 0; s < n_shared; s++)
        moe__combine_group(run, n_own + s, run->plan->F + s, memory->experts.shared_row + s * T, T)->weight =
            memory->combine.shared_gate;
    memory->experts.n_groups = n_own + n_shared;
}
/* What the shared experts made of token t, one after the other: y += weight times it. */
static void moe__combine_shared(const moe__run *run, float weight, size_t token, float *y) {
    const moe__run_experts *experts = &run->memory->experts;
    for (size_t g = experts->n_own; g < experts->n_groups; g++)
        run->kernels->axpy(run->plan->d, weight, experts->out + (experts->group[g].begin + token) * run->plan->ldo, y);
}
/* The weight of the shared experts, 1 or sigmoid(x . w); then what w and x get: dz = s (1 - s) sum <dy, o>. */
static float moe__combine_shared_weight(const moe__run *run, size_t token) {
    const float *w = run->params + moe__plan_offset(run->plan, MOE__T_SHARED_GATE);
    float *gate = run->memory->combine.shared_gate, z[2] = {0.0f, 0.0f};
    if (!gate) return 1.0f;
    z[0] = moe__combine_token_dot(run, w, token);
    run->kernels->softmax(2, 1.0f, z, z);
    gate[token] = z[0];
    return z[0];
}
static void moe__combine_shared_dz(const moe__run *run, size_t t0, size_t t1) {
    const moe__run_experts *experts = &run->memory->experts;
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        float gate = run->memory->combine.shared_gate[token], sum = 0.0f;
        for (size_t g = experts->n_own; g < experts->n_groups; g++)
            sum += moe__experts_weight_back(run, &experts->group[g], token, run->dy + token * d);
        sum *= gate * (1.0f - gate);
        run->memory->combine.d_shared_gate[token] = sum;
        const float *w = run->params + moe__plan_offset(run->plan, MOE__T_SHARED_GATE);
        if (run->dx) run->kernels->axpy(d, sum, w, run->dx + token * d);
    }
}
static void moe__combine_shared_dw(const moe__run *run, size_t panel) {
    float *dw = run->d_params + moe__plan_offset(run->plan, MOE__T_SHARED_GATE) + panel * MOE__W;
    for (size_t token = 0; token < run->tape->n_tokens; token++)
        run->kernels->axpy(moe__run_columns(run, panel), run->memory->combine.d_shared_gate[token],
                           moe__run_token(run, panel, token), dw);
}
static void moe__combine_mix(const moe__run *run, size_t t0, size_t t1) {
    size_t d = run->plan->d;
    memset(run->y + t0 * d, 0, (t1 - t0) * d * sizeof(float));
    for (size_t token = t0; token < t1; token++) {
        moe__combine_shared(run, moe__combine_shared_weight(run, token), token, run->y + token * d);
        moe__combine_of(run)->mix(run, token, run->y + token * d);
    }
}
static void moe__combine_mix_back(const moe__run *run, size_t t0, size_t t1) {
    for (size_t token = t0; token < t1; token++) {
        moe__combine_shared(run, 1.0f, token, run->dx + token * run->plan->d); /* the weight is inside */
        moe__combine_of(run)->mix_back(run, token, run->dx + token * run->plan->d);
    }
}
static void moe__combine_forward(moe__run *run) {
    const moe__combine_row *row = moe__combine_of(run);
    moe__combine_groups(run);
    row->gather(run);
    moe__experts_forward(run);
    if (row->weigh) row->weigh(run);
    moe__run_over_blocks(run, moe__combine_mix);
}

static void moe__combine_backward(moe__run *run) {
    const moe__plan *plan = run->plan;
    const moe__combine_row *row = moe__combine_of(run);
    moe__run_experts *experts = &run->memory->experts;
    moe__combine_groups(run);
    row->gather_dy(run);
    if (run->memory->losses.d_out)
        for (size_t g = 0; g < experts->n_own; g++) experts->group[g].weight = NULL; /* in dy now */
    moe__experts_params_back(run, run->fresh || row->by_sequence);
    if (run->fresh) memset(run->d_params + plan->special, 0, (plan->experts - plan->special) * sizeof(float));
    if (plan->E > plan->F)
        moe__run_over(run, plan->E - plan->F, run->tape->n_tokens * plan->d, moe__combine_special_back);
    if (run->memory->combine.shared_gate) {
        moe__run_over_blocks(run, moe__combine_shared_dz);
        moe__run_over(run, plan->dp, run->tape->n_tokens * MOE__W, moe__combine_shared_dw);
    }
    if (row->back) row->back(run);
    if (!run->dx && !row->rows_back) return;
    moe__experts_rows_back(run);
    if (row->rows_back) row->rows_back(run);
    if (run->dx) moe__run_over_blocks(run, moe__combine_mix_back);
}

/* ==== >>codes =================================================================================
 * The discrete branch of VQMoE [C]: y = g_0 y + g_1 LN(f_e(LN(C_j))), j = the nearest code, e = j mod E, g = softmax(x
 * G). It runs the same experts over the codes' rows, by a tape of its own that has nothing but routes and experts. The
 * gradient by the code goes straight on to x [D]; the codes learn from the codebook loss alone. With a code_share c the
 * expert reads LN((1 - c) x + c (q - x)) for LN(q), and x gets 1 - c of the gradient, as in the authors' code.
 *
 *     x --nearest--> C_j --LN--> in --expert e--> o --LN--> out --* g_1--+
 *     x --------- router, experts, combine ------> other -------* g_0--+--> y
 */
typedef struct moe__run_codes {
    moe_tape tape;          /* the experts' pass over the codes, and its memory */
    moe__run_memory memory;
    int32_t *code, *expert; /* (T) */
    float *square;                    /* (codes) their squared length */
    float *in, *other;                /* (T, d) inputs, in backward the gradient by them; the other branch's output */
    float *out, *inv_out, *gate;      /* (T, d) LN of this branch's output, 1 / its deviation (T),
        the weights g (T, 2) */
    float *x, *d_other, *d_out;       /* (T, d) */
    int ready;              /* code and x are of the tape's tokens */
} moe__run_codes;

static moe_status moe__codes_layout(moe__run_memory *memory, size_t n_tokens, moe__arena *arena) {
    moe__run_codes codes;
    moe__plan *plan = &codes.memory.plan;
    size_t d = memory->plan.d, count = memory->plan.desc.n_codes;
    if (!count) return MOE_OK;
    memset(&codes, 0, sizeof codes);
    codes.memory.max_tokens = n_tokens;
    codes.memory.training = memory->training;
    *plan = memory->plan; /* the same experts without the shared ones, one for each token */
    plan->S = plan->desc.top_k = 1;
    plan->G = plan->F;
    plan->output_loss = 0;
    memory->codes = (moe__run_codes *)moe__take(arena, 1, sizeof codes);
    codes.memory.tokens = moe__take_floats(arena, n_tokens, plan->dp * MOE__W);
    moe_status status = moe__routes_take(&codes.tape.routes, n_tokens, plan->E, 1, arena);
    if (!status) status = moe__experts_layout(&codes.memory, n_tokens, plan->F, n_tokens, n_tokens, arena);
    codes.code = (int32_t *)moe__take(arena, n_tokens, sizeof(int32_t));
    codes.expert = (int32_t *)moe__take(arena, n_tokens, sizeof(int32_t));
    codes.square = moe__take_floats(arena, count, 1);
    codes.in = moe__take_floats(arena, n_tokens, d);
    codes.other = moe__take_floats(arena, n_tokens, d);
    codes.out = moe__take_floats(arena, n_tokens, d);
    codes.inv_out = moe__take_floats(arena, n_tokens, 1);
    codes.gate = moe__take_floats(arena, n_tokens, 2);
    if (memory->training) {
        codes.x = moe__take_floats(arena, n_tokens, d);
        codes.d_other = moe__take_floats(arena, n_tokens, d);
        codes.d_out = moe__take_floats(arena, n_tokens, d);
    }
    if (!arena->base) return status;
    *memory->codes = codes;
    memory->codes->tape.memory = &memory->codes->memory;
    return status;
}
/* The experts' run over the codes' rows of run's tokens. */
static moe__run moe__codes_run(const moe__run *run) {
    moe__run_codes *codes = run->memory->codes;
    moe__run inner;
    moe__run_begin(&inner, &codes->memory.plan, &codes->tape);
    inner.params = run->params;
    return inner;
}

/* LN of one row of n, in place allowed; returns 1 / the standard deviation, 0 for a constant row. And its backward, in
 * place. */
static float moe__codes_ln(const moe__kernels *kernels, size_t length, const float *x, float *y) {
    float mean = 0.0f, square, inv = 0.0f;
    for (size_t i = 0; i < length; i++) mean += x[i];
    mean = mean / (float)length;
    for (size_t i = 0; i < length; i++) y[i] = x[i] - mean;
    square = kernels->dot(length, y, y) / (float)length;
    if (square >= FLT_MIN) inv = 1.0f / sqrtf(square);
    for (size_t i = 0; i < length; i++) y[i] *= inv;
    return inv;
}
static void moe__codes_ln_back(const moe__kernels *kernels, size_t length, const float *y, float inv, float *dy) {
    float mean = 0.0f, along = kernels->dot(length, y, dy) / (float)length;
    for (size_t i = 0; i < length; i++) mean += dy[i];
    mean = mean / (float)length;
    for (size_t i = 0; i < length; i++) dy[i] = moe__fma(-along, y[i], dy[i] - mean) * inv;
}

/* What the branch's expert reads for a token: LN of its code q or, with a share c, of (1 - c) x + c (q - x), where the
 * last part is constant. Returns 1 / the deviation. */
static float moe__codes_input(const moe__run *run, const float *x, size_t code, float *in) {
    size_t d = run->plan->d;
    float share = run->desc->code_share;
    memcpy(in, moe__run_tensor(run, MOE__R_CODEBOOK) + code * d, d * sizeof(float));
    if (share > 0.0f)
        for (size_t c = 0; c < d; c++) in[c] = moe__fma(share, in[c] - x[c], (1.0f - share) * x[c]);
    return moe__codes_ln(run->kernels, d, in, in);
}
static void moe__codes_nearest(const moe__run *run, size_t t0, size_t t1) { /* nearest code, its LN, the two weights */
    moe__run_codes *codes = run->memory->codes;
    const float *codebook = moe__run_tensor(run, MOE__R_CODEBOOK), *gate = moe__run_tensor(run, MOE__R_BRANCH);
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        const float *x = run->x + moe__run_row(run, token) * d;
        float best = 0.0f, z[2] = {0.0f, 0.0f};
        size_t code = 0;
        for (size_t c = 0; c < run->desc->n_codes; c++) { /* |x - C|^2 without |x|^2 */
            float far = moe__fma(-2.0f, run->kernels->dot(d, x, codebook + c * d), codes->square[c]);
            if (!c || far < best) best = far, code = c;
        }
        if (codes->x) memcpy(codes->x + token * d, x, d * sizeof(float));
        codes->code[token] = (int32_t)code;
        codes->expert[token] = (int32_t)(code % run->plan->E);
        (void)moe__codes_input(run, x, code, codes->in + token * d);
        for (size_t c = 0; c < d; c++)
            for (size_t k = 0; k < 2; k++) z[k] = moe__fma(x[c], gate[c * 2 + k], z[k]);
        run->kernels->softmax(2, 1.0f, z, codes->gate + token * 2);
    }
}
static void moe__codes_mix(const moe__run *run, size_t t0, size_t t1) { /* out = LN(o); y = g_0 y + g_1 out */
    moe__run_codes *codes = run->memory->codes;
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        float *y = run->y + token * d, *out = codes->out + token * d;
        codes->inv_out[token] = moe__codes_ln(run->kernels, d, out, out);
        memcpy(codes->other + token * d, y, d * sizeof(float));
        for (size_t c = 0; c < d; c++) y[c] *= codes->gate[token * 2];
        run->kernels->axpy(d, codes->gate[token * 2 + 1], out, y);
    }
}
/* After the other branch: run has x, y, router, params. */
static moe_status moe__codes_forward(const moe__run *run) {
    moe__run_codes *codes = run->memory->codes;
    size_t d = run->plan->d, n = run->tape->n_tokens;
    for (size_t c = 0; c < run->desc->n_codes; c++) {
        const float *code = moe__run_tensor(run, MOE__R_CODEBOOK) + c * d;
        codes->square[c] = run->kernels->dot(d, code, code);
    }
    moe__run_over_blocks(run, moe__codes_nearest);
    codes->ready = 1;
    codes->tape.n_tokens = n;
    moe_status status = moe__routes_fill(&codes->tape.routes, n, codes->expert, NULL, 0, NULL, MOE_ORDER_TOKEN);
    if (status) return status;
    moe__run inner = moe__codes_run(run);
    inner.x = codes->in;
    inner.y = codes->out;
    moe__run_over_blocks(&inner, moe__run_pack_tokens);
    moe__combine_forward(&inner);
    moe__run_over_blocks(run, moe__codes_mix);
    return MOE_OK;
}

/* dx += through the weights; dy of the branches */
static void moe__codes_split_block(const moe__run *run, size_t t0, size_t t1) {
    moe__run_codes *codes = run->memory->codes;
    size_t d = run->plan->d;
    const moe__kernels *kernels = run->kernels;
    const float *gate = moe__run_tensor(run, MOE__R_BRANCH);
    for (size_t token = t0; token < t1; token++) {
        const float *dy = moe__run_dy(run, token), *out = codes->out + token * d;
        float *g = codes->gate + token * 2, *d_other = codes->d_other + token * d, *d_out = codes->d_out + token * d;
        float dg[2] = {kernels->dot(d, dy, codes->other + token * d), kernels->dot(d, dy, out)};
        float mean = moe__fma(g[0], dg[0], g[1] * dg[1]);
        for (size_t c = 0; c < d; c++) d_other[c] = g[0] * dy[c], d_out[c] = g[1] * dy[c];
        moe__codes_ln_back(kernels, d, out, codes->inv_out[token], d_out);
        for (size_t k = 0; k < 2; k++) g[k] = g[k] * (dg[k] - mean); /* now the gradient by the gate's logits */
        if (!run->dx) continue;
        float *dx = run->dx + token * d;
        for (size_t c = 0; c < d; c++) dx[c] = moe__fma(g[0], gate[c * 2], moe__fma(g[1], gate[c * 2 + 1], dx[c]));
    }
}
/* Before the other branch's backward: returns its dy; this one's waits in d_out. run has dy, dx, router, d_router. */
static const float *moe__codes_split(const moe__run *run) {
    moe__run_codes *codes = run->memory->codes;
    float *d_gate = moe__run_grad(run, MOE__R_BRANCH);
    moe__run_over_blocks(run, moe__codes_split_block);
    if (!d_gate) return codes->d_other;
    for (size_t token = 0; token < run->tape->n_tokens; token++)
        for (size_t c = 0; c < run->plan->d; c++)
            for (size_t k = 0; k < 2; k++) {
                float x = moe__run_token(run, c / MOE__W, token)[c % MOE__W];
                d_gate[c * 2 + k] = moe__fma(x, codes->gate[token * 2 + k], d_gate[c * 2 + k]);
            }
    return codes->d_other;
}
/* After the other branch's backward: the experts' gradients += this one's, and dx. */
static void moe__codes_backward(const moe__run *run) {
    moe__run_codes *codes = run->memory->codes;
    size_t d = run->plan->d, n = run->tape->n_tokens;
    memset(codes->in, 0, n * d * sizeof(float));
    moe__run inner = moe__codes_run(run);
    inner.dy = codes->d_out;
    inner.d_params = run->d_params;
    inner.dx = codes->in;
    moe__combine_backward(&inner);
    if (!run->dx) return;
    float straight = 1.0f;
    if (run->desc->code_share > 0.0f) straight = 1.0f - run->desc->code_share;
    for (size_t token = 0; token < n; token++) { /* back through LN, and straight through the code to x */
        float *d_in = codes->in + token * d, *in = codes->d_out + token * d; /* made again; d_out is used up */
        float inv = moe__codes_input(run, codes->x + token * d, (size_t)codes->code[token], in);
        moe__codes_ln_back(run->kernels, d, in, inv, d_in);
        run->kernels->axpy(d, straight, d_in, run->dx + token * d);
    }
}

/* ==== >>losses ================================================================================
 * After this room every auxiliary loss is a function of one struct of inputs: it adds coefficient times its gradient
 * and returns its value. What it reads has been checked before by moe__loss_check; the table that says what each
 * reads, and moe_loss, stand in the next room. Uses the ground, kernels and products; knows nothing of layers.
 *
 * Most losses have a slope c_te = dL/dp_te (times T) on the softmax p of a token, so that by its logits
 * dL/dz_te = p_te (c_te - sum_j c_tj p_tj) / (T temperature) [D]. Such a loss is a way to fill c. */

/* -- inputs -- */
/* What a loss can read, in the order in which it is checked: the first says whether there is anything to do. */
#define MOE__READS(input) (1u << MOE__READS_##input)
enum {
    MOE__READS_PROB, MOE__READS_SCORES, MOE__READS_SHARES, MOE__READS_LOGITS, MOE__READS_NOISE_STD,
    MOE__READS_THRESHOLD, MOE__READS_OUTPUTS, MOE__READS_LATENT, MOE__READS_LOG_VAR, MOE__READS_ROUTER,
    MOE__READS_MATRIX, MOE__READS_X, MOE__READS_CODEBOOK, MOE__READS_INDEX, MOE__READS_TEACHER, MOE__READS_CODE,
    MOE__READS_MEAN, MOE__READS_ANY_MEAN, MOE__READS_RANK_PROB, MOE__READS_LOAD, MOE__LOSS_INPUTS,
    /* and numbers alone */
    MOE__READS_TEMPERATURE = MOE__LOSS_INPUTS, MOE__READS_TOP_K, MOE__READS_SEQUENCE, MOE__READS_RANKS,
    MOE__READS_RANK_LIMIT, MOE__READS_HOME, MOE__READS_COMMITMENT
};

/* axes: T tokens, E experts, k choices, d and f widths, r as d but may be 0, P ranks, n codes. An index must be below
 * `most`, a number in [low, high]. An array whose length is not known here ("") is not looked into. */
typedef struct moe__loss_input {
    const char *axes;
    size_t member;
    char most; /* an index's axis; 0: floats; '.': doubles */
    double low, high;
    moe_status null, wrong;
} moe__loss_input;
#define MOE__ARRAY(axes, name, most, low, high, null, wrong) \
    {axes, offsetof(moe_loss_args, name), most, low, high, null, wrong}
#define MOE__FLOATS(axes, name, NAME, WRONG) \
    MOE__ARRAY(axes, name, 0, (double)-FLT_MAX, (double)FLT_MAX, MOE_E_NULL_##NAME, MOE_E_##WRONG)
static const moe__loss_input moe__loss_inputs[MOE__LOSS_INPUTS] = {
    MOE__FLOATS("TE", prob, PROB, NAN_PROB),
    MOE__FLOATS("TE", scores, SCORES, NAN_SCORES),
    MOE__ARRAY("TE", scores, 0, 0.0, (double)FLT_MAX, MOE_E_NULL_SCORES, MOE_E_NAN_SCORES),
    MOE__FLOATS("TE", logits, LOGITS, NAN_LOGITS),
    MOE__ARRAY("TE", noise_std, 0, (double)FLT_MIN, (double)FLT_MAX, MOE_E_NULL_NOISE, MOE_E_NOISE_VALUE),
    MOE__FLOATS("TE", threshold, NOISE, NOISE_VALUE),
    MOE__FLOATS("Tkd", outputs, OUTPUTS, NAN_OUTPUTS),
    MOE__FLOATS("Td", latent, LATENT, NAN_LATENT),
    MOE__ARRAY("Td", log_var, 0, (double)-FLT_MAX, 88.0, MOE_E_NULL_LATENT, MOE_E_NAN_LATENT), /* exp overflows */
    MOE__FLOATS("dE", router, ROUTER, NAN_ROUTER),
    MOE__FLOATS("rf", matrix, MATRIX, NAN_MATRIX),
    MOE__FLOATS("Td", x, X, NAN_X),
    MOE__FLOATS("nd", codebook, CODEBOOK, NAN_CODEBOOK),
    MOE__ARRAY("Tk", index, 'E', 0.0, 0.0, MOE_E_NULL_INDEX, MOE_E_INDEX),
    MOE__ARRAY("T", teacher, 'E', 0.0, 0.0, MOE_E_NULL_TEACHER, MOE_E_TEACHER),
    MOE__ARRAY("T", index, 'n', 0.0, 0.0, MOE_E_NULL_INDEX, MOE_E_CODE),
    MOE__ARRAY("E", mean, '.', 0.0, DBL_MAX, MOE_E_NULL_MEAN, MOE_E_NAN_MEAN),
    MOE__ARRAY("E", mean, '.', -DBL_MAX, DBL_MAX, MOE_E_NULL_MEAN, MOE_E_NAN_MEAN),
    MOE__ARRAY("P", rank_prob, '.', 0.0, DBL_MAX, MOE_E_NULL_MEAN, MOE_E_NAN_MEAN),
    MOE__ARRAY("", load, 0, 0.0, 0.0, MOE_E_NULL_LOAD, MOE_OK),
};
#undef MOE__FLOATS
#undef MOE__ARRAY

static size_t moe__loss_extent(const moe_loss_args *args, char axis) {
    switch (axis) {
    case 'T': return args->n_tokens;
    case 'E': return args->n_experts;
    case 'k': return args->top_k;
    case 'd': case 'r': return args->d_model;
    case 'f': return args->d_ff;
    case 'P': return args->n_ranks;
    default: return args->n_codes;
    }
}
static moe_status moe__loss_check_numbers(unsigned reads, const moe_loss_args *args) {
    size_t n_experts = args->n_experts, top_k = args->top_k, n_ranks = args->n_ranks;
    int ranks = (reads & MOE__READS(RANKS)) != 0, choices = (reads & (MOE__READS(TOP_K) | MOE__READS(INDEX))) != 0;
    if ((ranks || choices) && (!n_experts || n_experts > MOE__MAX_EXPERTS)) return MOE_E_N_EXPERTS;
    if (ranks && (!n_ranks || n_experts % n_ranks)) return MOE_E_RANKS;
    if (choices && (!top_k || top_k > n_experts)) return MOE_E_TOP_K;
    if (reads & MOE__READS(RANK_LIMIT) && (!args->rank_limit || args->rank_limit > n_ranks)) return MOE_E_RANK_LIMIT;
    if (reads & MOE__READS(HOME) && args->home >= n_ranks) return MOE_E_HOME;
    if (reads & MOE__READS(HOME) && !(args->smoothing >= FLT_MIN && args->smoothing < 1.0f)) return MOE_E_SMOOTHING;
    if (reads & (MOE__READS(TEMPERATURE) | MOE__READS(PROB))) {
        if (args->temperature != 0.0f && !moe__temperature_ok(args->temperature)) return MOE_E_TEMPERATURE;
    }
    if (reads & MOE__READS(SEQUENCE) && !args->sequence) return MOE_E_SEQUENCE;
    if (reads & MOE__READS(COMMITMENT) && !(args->commitment >= 0.0f && args->commitment <= FLT_MAX))
        return MOE_E_COMMITMENT;
    return MOE_OK;
}
static moe_status moe__loss_check_shape(const moe_loss_args *args, const char *axes, size_t *count) {
    *count = 1;
    for (; *axes; axes++) {
        size_t extent = moe__loss_extent(args, *axes);
        if (*axes == 'E' && (!extent || extent > MOE__MAX_EXPERTS)) return MOE_E_N_EXPERTS;
        if (*axes == 'k' && !extent) return MOE_E_TOP_K;
        if (*axes == 'd' && !extent) return MOE_E_D_MODEL;
        if (*axes == 'f' && !extent) return MOE_E_D_FF;
        if (!moe__mul(*count, extent, count)) return MOE_E_OVERFLOW;
    }
    return MOE_OK;
}
static int moe__loss_input_ok(const moe__loss_input *input, const moe_loss_args *args, const void *data, size_t count) {
    int ok = 1;
    if (!*input->axes) return 1;
    if (!input->most) {
        const float *x = (const float *)data, low = (float)input->low, high = (float)input->high;
        for (size_t i = 0; i < count; i++) ok &= x[i] >= low && x[i] <= high;
    } else if (input->most == '.') {
        const double *x = (const double *)data;
        for (size_t i = 0; i < count; i++) ok &= x[i] >= input->low && x[i] <= input->high;
    } else {
        const int32_t *index = (const int32_t *)data;
        size_t most = moe__loss_extent(args, input->most);
        for (size_t i = 0; i < count; i++) ok &= index[i] < 0 || (size_t)index[i] < most;
    }
    return ok;
}
/* Whether args has what a loss reads. *count (may be NULL): elements of the first input; if 0, no array is read. */
static moe_status moe__loss_check(unsigned reads, const moe_loss_args *args, size_t *count) {
    size_t n[MOE__LOSS_INPUTS] = {0}, first = MOE__LOSS_INPUTS;
    moe_status status = moe__loss_check_numbers(reads, args);
    for (size_t i = 0; i < MOE__LOSS_INPUTS && !status; i++) {
        if (!(reads >> i & 1)) continue;
        status = moe__loss_check_shape(args, moe__loss_inputs[i].axes, &n[i]);
        first = moe__min(first, i);
    }
    if (status) return status;
    if (count) *count = n[first];
    if (!n[first]) return MOE_OK;
    for (size_t i = first; i < MOE__LOSS_INPUTS; i++) {
        const moe__loss_input *input = &moe__loss_inputs[i];
        const void *data;
        if (!(reads >> i & 1)) continue;
        memcpy(&data, (const char *)args + input->member, sizeof data);
        if (!data && n[i]) return input->null;
        if (!moe__loss_input_ok(input, args, data, n[i])) return input->wrong;
    }
    return MOE_OK;
}
static moe_loss_args moe__loss_args_of(size_t n_tokens, size_t n_experts, size_t top_k) {
    moe_loss_args args;
    memset(&args, 0, sizeof args);
    args.n_tokens = n_tokens;
    args.n_experts = n_experts;
    args.top_k = top_k;
    return args;
}

/* -- statistics -- */
MOE_API moe_status moe_mean_scores(size_t n_tokens, size_t n_experts, const float *scores, double *mean) {
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, 0);
    args.scores = scores;
    moe_status status = mean ? moe__loss_check(MOE__READS(SCORES), &args, NULL) : MOE_E_NULL_MEAN;
    if (status) return status;
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e++) mean[e] += (double)scores[t * n_experts + e];
    if (n_tokens)
        for (size_t e = 0; e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}

MOE_API moe_status moe_mean_weights(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                    const float *weight, double *mean) {
    size_t count;
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, top_k);
    args.index = index;
    moe_status status = mean ? moe__loss_check(MOE__READS(INDEX), &args, &count) : MOE_E_NULL_MEAN;
    if (status) return status;
    if (count && !weight) return MOE_E_NULL_WEIGHT;
    if (!moe__all_finite(count, weight)) return MOE_E_NAN_WEIGHT;
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t i = 0; i < count; i++)
        if (index[i] >= 0) mean[index[i]] += (double)weight[i];
    if (n_tokens)
        for (size_t e = 0; e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}

MOE_API moe_status moe_sequence_load(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence,
                                     const int32_t *index, uint64_t *load) {
    size_t count;
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, top_k);
    args.sequence = sequence;
    args.index = index;
    moe_status status = moe__loss_check(MOE__READS(INDEX) | MOE__READS(SEQUENCE), &args, NULL);
    if (status) return status;
    if (!moe__mul(moe__ceil_div(n_tokens, sequence), n_experts, &count)) return MOE_E_OVERFLOW;
    if (count && !load) return MOE_E_NULL_LOAD;
    for (size_t i = 0; i < count; i++) load[i] = 0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t i = 0; i < top_k; i++)
            if (index[t * top_k + i] >= 0) load[t / sequence * n_experts + (size_t)index[t * top_k + i]]++;
    return MOE_OK;
}

MOE_API moe_status moe_rank_load(size_t n_experts, size_t n_ranks, const uint64_t *load, uint64_t *out) {
    moe_loss_args args = moe__loss_args_of(0, n_experts, 0);
    args.n_ranks = n_ranks;
    args.load = load;
    moe_status status = moe__loss_check(MOE__READS(RANKS) | MOE__READS(LOAD), &args, NULL);
    if (status) return status;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t rank = 0; rank < n_ranks; rank++) out[rank] = 0;
    for (size_t e = 0; e < n_experts; e++) out[moe__placement_of_expert(e, n_experts, n_ranks)] += load[e];
    return MOE_OK;
}
MOE_API moe_status moe_rank_tokens(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_ranks,
                                   const int32_t *index, uint64_t *out) {
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, top_k);
    args.n_ranks = n_ranks;
    args.index = index;
    moe_status status = moe__loss_check(MOE__READS(RANKS) | MOE__READS(INDEX), &args, NULL);
    if (status) return status;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t rank = 0; rank < n_ranks; rank++) out[rank] = 0;
    for (size_t t = 0; t < n_tokens; t++, index += top_k)
        for (size_t i = 0; i < top_k; i++) {
            int seen = index[i] < 0;
            size_t rank = seen ? 0 : moe__placement_of_expert((size_t)index[i], n_experts, n_ranks);
            for (size_t j = 0; j < i && !seen; j++)
                seen = index[j] >= 0 && moe__placement_of_expert((size_t)index[j], n_experts, n_ranks) == rank;
            if (!seen) out[rank]++;
        }
    return MOE_OK;
}
MOE_API moe_status moe_rank_prob(size_t n_experts, size_t n_ranks, const double *mean, double *out) {
    moe_loss_args args = moe__loss_args_of(0, n_experts, 0);
    args.n_ranks = n_ranks;
    args.mean = mean;
    moe_status status = moe__loss_check(MOE__READS(RANKS) | MOE__READS(MEAN), &args, NULL);
    if (status) return status;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t rank = 0; rank < n_ranks; rank++) out[rank] = 0.0;
    for (size_t e = 0; e < n_experts; e++) out[moe__placement_of_expert(e, n_experts, n_ranks)] += mean[e];
    return MOE_OK;
}

MOE_API moe_status moe_teacher_best(size_t n_tokens, size_t n_experts, const float *scores, int32_t *teacher) {
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, 0);
    args.scores = scores;
    moe_status status = moe__loss_check(MOE__READS(SCORES), &args, NULL);
    if (status || !n_tokens) return status;
    if (!teacher) return MOE_E_NULL_TEACHER;
    for (size_t t = 0; t < n_tokens; t++, scores += n_experts) {
        teacher[t] = 0;
        for (size_t e = 1; e < n_experts; e++)
            if (scores[e] < scores[teacher[t]]) teacher[t] = (int32_t)e;
    }
    return MOE_OK;
}

/* u = (logits - threshold) / std of numbers [at, at + n) */
static void moe__loss_noise_units(const moe_loss_args *args, size_t at, size_t count, float *u) {
    const float *logits = args->logits + at, *deviation = args->noise_std + at, *threshold = args->threshold + at;
    for (size_t i = 0; i < count; i++) {
        float x = logits[i] / deviation[i] - threshold[i] / deviation[i];
        if (x > 40.0f) x = 40.0f; /* Phi is 0 or 1 there, and its slope 0 */
        u[i] = x > -40.0f ? x : -40.0f;
    }
}
#define MOE__SLOPES 256 /* columns that are filled at a time */
MOE_API moe_status moe_mean_selection(size_t n_tokens, size_t n_experts, const float *logits, const float *std,
                                      const float *threshold, double *mean) {
    moe_loss_args args = moe__loss_args_of(n_tokens, n_experts, 0);
    args.logits = logits;
    args.noise_std = std;
    args.threshold = threshold;
    unsigned reads = MOE__READS(LOGITS) | MOE__READS(NOISE_STD) | MOE__READS(THRESHOLD);
    moe_status status = mean ? moe__loss_check(reads, &args, NULL) : MOE_E_NULL_MEAN;
    if (status) return status;
    const moe__kernels *kernels = moe__dispatched();
    for (size_t e = 0; e < n_experts; e++) mean[e] = 0.0;
    for (size_t t = 0; t < n_tokens; t++)
        for (size_t e = 0; e < n_experts; e += MOE__SLOPES) {
            float u[MOE__SLOPES];
            size_t count = moe__min(MOE__SLOPES, n_experts - e);
            moe__loss_noise_units(&args, t * n_experts + e, count, u);
            for (size_t i = 0; i < count; i++) u[i] *= 0.707106781f; /* sqrt(1/2) */
            kernels->erf(count, u, u);
            for (size_t i = 0; i < count; i++) mean[e + i] += 0.5 + 0.5 * (double)u[i]; /* exact */
        }
    if (n_tokens)
        for (size_t e = 0; e < n_experts; e++) mean[e] /= (double)n_tokens;
    return MOE_OK;
}

/* -- through the softmax -- */
typedef struct moe__loss_slope moe__loss_slope;
/* c of experts first .. first + n - 1; p: of these, of this token */
typedef void moe__loss_fill(const moe__loss_slope *slope, const float *p, size_t first, size_t n, float *c);
struct moe__loss_slope {
    moe__loss_fill *fill;
    const moe_loss_args *args;
    const float *prob;     /* (T, E) */
    int each;              /* c differs from token to token */
    float scale;           /* c is multiplied by it last */
    double factor, centre; /* what the fill functions below need */
    size_t n_groups;       /* of experts, in equal blocks: the ranks, or each expert alone */
};
static moe__loss_slope moe__loss_slope_of(const moe_loss_args *args, moe__loss_fill *fill) {
    moe__loss_slope slope;
    memset(&slope, 0, sizeof slope);
    slope.fill = fill;
    slope.args = args;
    slope.prob = args->prob;
    slope.scale = 1.0f;
    return slope;
}

/* d_logits (may be NULL) += coefficient times the gradient. Returns mean_t sum_e c_te p_te: the value of a loss that is
 * linear in p. The inner products run in blocks of the panel's width, whatever MOE__SLOPES is. */
static double moe__loss_through_softmax(const moe__loss_slope *slope, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    const moe_loss_args *args = slope->args;
    size_t T = args->n_tokens, E = args->n_experts;
    float c[MOE__SLOPES], scaled[MOE__SLOPES], step = coefficient / (args->temperature * (float)T);
    int whole = E <= MOE__SLOPES;
    double sum = 0.0;
    for (size_t t = 0; t < T; t++) {
        const float *p = slope->prob + t * E;
        float mean = 0.0f;
        for (size_t e = 0; e < E; e += MOE__SLOPES) {
            size_t n = moe__min(MOE__SLOPES, E - e);
            if (!whole || slope->each || !t) {
                slope->fill(slope, p + e, e, n, c);
                for (size_t i = 0; i < n; i++) scaled[i] = c[i] * slope->scale;
            }
            for (size_t i = 0; i < n; i += MOE__W) mean += kernels->dot(moe__min(MOE__W, n - i), scaled + i, p + e + i);
        }
        sum += (double)mean;
        if (!args->d_logits) continue;
        for (size_t e = 0; e < E; e += MOE__SLOPES) {
            size_t n = moe__min(MOE__SLOPES, E - e);
            if (!whole) slope->fill(slope, p + e, e, n, c);
            kernels->slope(n, step, slope->scale, mean, c, p + e, args->d_logits + t * E + e);
        }
    }
    return sum / (double)T;
}
/* The same where the value is not that mean. */
static void moe__loss_add_slope(const moe__loss_slope *slope, float coefficient) {
    if (slope->args->d_logits) (void)moe__loss_through_softmax(slope, coefficient);
}

/* -- the load -- */
static size_t moe__loss_group(const moe__loss_slope *slope, size_t expert) {
    return moe__placement_of_expert(expert, slope->args->n_experts, slope->n_groups);
}
static void moe__loss_fill_load(const moe__loss_slope *slope, const float *p, size_t first, size_t count, float *c) {
    (void)p;
    for (size_t i = 0; i < count; i++) c[i] = (float)slope->args->load[moe__loss_group(slope, first + i)];
}
/* n_groups sum_e f_e P_e, f_e = load of e's group / whole, P = mean p */
static double moe__loss_even(const moe_loss_args *args, size_t n_groups, double whole, float coefficient) {
    size_t T = args->n_tokens, E = args->n_experts;
    if (!(whole > 0.0)) return 0.0;
    double scale = (double)n_groups / whole, sum = 0.0;
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_load);
    slope.n_groups = n_groups;
    slope.scale = (float)scale;
    moe__loss_add_slope(&slope, coefficient);
    for (size_t e = 0; e < E; e += MOE__W) {
        double P[MOE__W] = {0};
        size_t count = moe__min(MOE__W, E - e);
        for (size_t t = 0; t < T; t++)
            for (size_t i = 0; i < count; i++) P[i] += (double)args->prob[t * E + e + i];
        for (size_t i = 0; i < count; i++) {
            size_t group = moe__loss_group(&slope, e + i);
            sum += moe__times(P[i], (double)args->load[group]);
        }
    }
    return sum * scale / (double)T;
}
/* As in GShard and Switch [C]; DeepSeekMoE's expert level is the same [K]; loads of the global batch after Qwen [C]. */
static double moe__loss_switch(const moe_loss_args *args, float coefficient) {
    return moe__loss_even(args, args->n_experts, (double)moe__total(args->n_experts, args->load), coefficient);
}
/* sum_d F_d P_d, F = mean over a rank's experts of E f_e, P_d = sum of their P_e: after DeepSeekMoE [K]. */
static double moe__loss_rank(const moe_loss_args *args, float coefficient) {
    return moe__loss_even(args, args->n_ranks, (double)moe__total(args->n_ranks, args->load), coefficient);
}
/* sum_d F_d P_d, F_d = D / (M T) times the tokens sent to d: after DeepSeek-V2 [K]. */
static double moe__loss_communication(const moe_loss_args *args, float coefficient) {
    return moe__loss_even(args, args->n_ranks, (double)args->rank_limit * (double)args->counted, coefficient);
}

/* The switch loss of each sequence on q = s / sum s, averaged: after DeepSeek-V3 [K]. dL/ds = (c - <c, q>) / sum s
 * [D]. */
static double moe__loss_sequence(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    size_t E = args->n_experts, n_sequences = moe__ceil_div(args->n_tokens, args->sequence);
    double sum = 0.0;
    float c[MOE__W], one[MOE__W];
    for (size_t i = 0; i < MOE__W; i++) one[i] = 1.0f;
    for (size_t q = 0; q < n_sequences; q++) {
        const uint64_t *load = args->load + q * E;
        size_t begin = q * args->sequence, length = moe__min(args->sequence, args->n_tokens - begin);
        uint64_t total = moe__total(E, load);
        if (!total) continue;
        float scale = (float)((double)E / (double)total);
        double share = 1.0 / ((double)n_sequences * (double)length);
        for (size_t t = begin; t < begin + length; t++) {
            const float *scores = args->scores + t * E;
            float mean = 0.0f, all = 0.0f;
            for (size_t e = 0; e < E; e += MOE__W) {
                size_t count = moe__min(MOE__W, E - e);
                for (size_t i = 0; i < count; i++) c[i] = (float)load[e + i] * scale;
                mean += kernels->dot(count, c, scores + e);
                all += kernels->dot(count, one, scores + e);
            }
            if (!(all >= FLT_MIN) || !moe__finite(all)) continue; /* a token without scores has no shares */
            mean /= all;
            sum += moe__times(share, (double)mean);
            if (!args->d_scores) continue;
            float step = (float)((double)coefficient * share / (double)all);
            for (size_t e = 0; e < E; e += MOE__W) {
                size_t count = moe__min(MOE__W, E - e);
                for (size_t i = 0; i < count; i++) c[i] = (float)load[e + i];
                kernels->slope(count, step, scale, mean, c, one, args->d_scores + t * E + e);
            }
        }
    }
    return sum;
}

static void moe__loss_fill_locality(const moe__loss_slope *slope, const float *p, size_t first, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = moe__positive(slope->args->rank_prob[moe__loss_group(slope, first + i)]);
    moe__dispatched()->log(n, c, c);
    for (size_t i = 0; i < n; i++)
        c[i] -= (float)(moe__loss_group(slope, first + i) == slope->args->home ? slope->factor : slope->centre);
}
/* KL(Q || local), Q_d = a rank's share of the probability: after LocMoE [K]; softmax mass and smoothing [D]. */
static double moe__loss_locality(const moe_loss_args *args, float coefficient) {
    size_t n_ranks = args->n_ranks;
    float local[2] = {1.0f, 0.0f}; /* at home, elsewhere */
    double sum = 0.0;
    if (n_ranks > 1) local[0] = 1.0f - args->smoothing;
    local[1] = moe__positive((double)args->smoothing / (double)moe__max(1, n_ranks - 1));
    for (size_t rank = 0; rank < n_ranks; rank++) {
        double share = args->rank_prob[rank];
        if (share > 0.0) sum += moe__times(share, log(share / (double)local[rank != args->home]));
    }
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_locality);
    slope.n_groups = n_ranks;
    moe__dispatched()->log(2, local, local);
    slope.factor = (double)local[0];
    slope.centre = (double)local[1];
    moe__loss_add_slope(&slope, coefficient);
    return sum;
}

/* -- the mean probabilities P: the value f(P), and c = df/dP, up to a constant that the softmax does not see -- */
static void moe__loss_fill_linear(const moe__loss_slope *slope, const float *p, size_t first, size_t count, float *c) {
    (void)p;
    for (size_t i = 0; i < count; i++) c[i] = (float)(slope->factor * (slope->args->mean[first + i] - slope->centre));
}
static void moe__loss_fill_log(const moe__loss_slope *slope, const float *p, size_t first, size_t count, float *c) {
    (void)p; /* ln P */
    for (size_t i = 0; i < count; i++) c[i] = moe__positive(slope->args->mean[first + i]);
    moe__dispatched()->log(count, c, c);
}
static void moe__loss_fill_inverse(const moe__loss_slope *slope, const float *p, size_t first, size_t n, float *c) {
    (void)p;
    for (size_t i = 0; i < n; i++) c[i] = (float)(slope->factor / (double)moe__positive(slope->args->mean[first + i]));
}
/* CV^2 = Var / Mean^2. With a sum that is constant its slope is factor (P - centre) [D]; *rest is what must be added
 * where it is not. */
static double moe__loss_cv2(const moe_loss_args *args, double *factor, double *centre, double *rest) {
    size_t E = args->n_experts;
    double mu = 0.0, square = 0.0;
    for (size_t e = 0; e < E; e++) mu += args->mean[e];
    mu /= (double)E;
    *factor = *rest = 0.0;
    *centre = mu;
    if (!(mu > (double)FLT_MIN)) return 0.0;
    for (size_t e = 0; e < E; e++) square += moe__times((args->mean[e] - mu) / mu, (args->mean[e] - mu) / mu);
    square /= (double)E;
    *factor = 2.0 / ((double)E * mu * mu);
    *rest = -2.0 * square / ((double)E * mu);
    return square;
}
static double moe__loss_importance(const moe_loss_args *args, float coefficient) { /* after V-MoE [K] */
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_linear);
    double rest, value = moe__loss_cv2(args, &slope.factor, &slope.centre, &rest);
    moe__loss_add_slope(&slope, coefficient);
    return value;
}
static double moe__loss_l2_uniform(const moe_loss_args *args, float coefficient) { /* [C] */
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_linear);
    double sum = 0.0;
    slope.factor = 2.0;
    slope.centre = 1.0 / (double)args->n_experts;
    for (size_t e = 0; e < args->n_experts; e++)
        sum += moe__times(args->mean[e] - slope.centre, args->mean[e] - slope.centre);
    moe__loss_add_slope(&slope, coefficient);
    return sum;
}
static double moe__loss_kl_uniform(const moe_loss_args *args, float coefficient) { /* after the ecology paper [S] */
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_log);
    double sum = log((double)args->n_experts);
    for (size_t e = 0; e < args->n_experts; e++)
        if (args->mean[e] > 0.0) sum += moe__times(args->mean[e], log(args->mean[e]));
    moe__loss_add_slope(&slope, coefficient);
    return sum;
}
static double moe__loss_kl_reverse(const moe_loss_args *args, float coefficient) { /* [D] */
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_inverse);
    double sum = 0.0, E = (double)args->n_experts;
    slope.factor = -1.0 / E;
    for (size_t e = 0; e < args->n_experts; e++) sum -= log((double)moe__positive(args->mean[e]));
    moe__loss_add_slope(&slope, coefficient);
    return sum / E - log(E);
}

/* -- each token alone -- */
static void moe__loss_fill_entropy(const moe__loss_slope *slope, const float *p, size_t first, size_t count, float *c) {
    (void)slope; /* ln p */
    (void)first;
    for (size_t i = 0; i < count; i++) c[i] = p[i] > FLT_MIN ? p[i] : FLT_MIN;
    moe__dispatched()->log(count, c, c);
}
static void moe__loss_fill_mutual(const moe__loss_slope *slope, const float *p, size_t first, size_t count, float *c) {
    float own[MOE__SLOPES]; /* ln P - ln p */
    moe__loss_fill_log(slope, p, first, count, c);
    moe__loss_fill_entropy(slope, p, first, count, own);
    for (size_t i = 0; i < count; i++) c[i] -= own[i];
}
static void moe__loss_fill_variance(const moe__loss_slope *slope, const float *p, size_t first, size_t n, float *c) {
    for (size_t i = 0; i < n; i++) c[i] = (float)(-2.0 * ((double)p[i] - slope->args->mean[first + i]));
}
/* The sign is a choice [D]: dS_t/dz = -p (ln p + S_t). */
static double moe__loss_entropy(const moe_loss_args *args, float coefficient) {
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_entropy);
    slope.each = 1;
    return moe__loss_through_softmax(&slope, coefficient);
}
static double moe__loss_certainty(const moe_loss_args *args, float coefficient) {
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_entropy);
    slope.each = 1;
    slope.scale = -1.0f;
    return moe__loss_through_softmax(&slope, coefficient);
}
/* As in Mod-Squad and ModuleFormer [C], without their tasks. */
static double moe__loss_mutual_information(const moe_loss_args *args, float coefficient) {
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_mutual);
    slope.each = 1;
    return moe__loss_through_softmax(&slope, coefficient);
}

/* After the ecology paper [S], which does not say who teaches. */
static double moe__loss_oracle(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    size_t taught = 0, E = args->n_experts;
    double sum = 0.0;
    for (size_t t = 0; t < args->n_tokens; t++) taught += args->teacher[t] >= 0;
    if (!taught) return 0.0;
    float step = coefficient / (args->temperature * (float)taught);
    for (size_t t = 0; t < args->n_tokens; t++) {
        if (args->teacher[t] < 0) continue;
        size_t at = t * E + (size_t)args->teacher[t];
        sum -= log((double)moe__positive((double)args->prob[at]));
        if (!args->d_logits) continue;
        kernels->axpy(E, step, args->prob + t * E, args->d_logits + t * E);
        args->d_logits[at] -= step;
    }
    return sum / (double)taught;
}

/* mean_t (logsumexp z_t)^2, as in ST-MoE [C]. */
static double moe__loss_z(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    size_t T = args->n_tokens, E = args->n_experts;
    double sum = 0.0;
    float step = 2.0f * coefficient / (float)T;
    for (size_t t = 0; t < T; t++) {
        const float *z = args->logits + t * E;
        float lse = kernels->lse(E, z);
        sum += (double)lse * (double)lse;
        if (!args->d_logits) continue;
        for (size_t e = 0; e < E; e += MOE__SLOPES) { /* p = exp(z - lse) */
            float p[MOE__SLOPES];
            size_t count = moe__min(MOE__SLOPES, E - e);
            for (size_t i = 0; i < count; i++) p[i] = z[e + i] - lse;
            kernels->exp(count, p, p);
            kernels->axpy(count, step * lse, p, args->d_logits + t * E + e);
        }
    }
    return sum / (double)T;
}

/* -- scores, weights, noise -- */
/* -(1/T) sum_te (s_te - mean_e)^2, after 2505.22323 [K]: a sum over the experts, a mean over the tokens [D]. */
static double moe__loss_variance(const moe_loss_args *args, float coefficient) {
    size_t T = args->n_tokens, E = args->n_experts;
    double sum = 0.0, step = -2.0 * (double)coefficient / (double)T;
    for (size_t t = 0; t < T; t++)
        for (size_t e = 0; e < E; e++) {
            double off = (double)args->scores[t * E + e] - args->mean[e];
            sum -= moe__times(off, off);
            if (args->d_scores) args->d_scores[t * E + e] += (float)(step * off);
        }
    moe__loss_slope slope = moe__loss_slope_of(args, moe__loss_fill_variance); /* scores that are the softmax */
    slope.prob = args->scores;
    slope.each = 1;
    moe__loss_add_slope(&slope, coefficient);
    return sum / (double)T;
}

/* As in ReMoE [C]. */
static double moe__loss_relu_l1(const moe_loss_args *args, float coefficient) {
    size_t T = args->n_tokens, E = args->n_experts;
    if (!args->counted) return 0.0;
    double sum = 0.0, scale = (double)E / ((double)args->top_k * (double)args->counted * (double)T);
    for (size_t t = 0; t < T; t++)
        for (size_t e = 0; e < E; e++) {
            size_t i = t * E + e;
            if (!(args->scores[i] > 0.0f)) continue;
            sum += moe__times((double)args->load[e], (double)args->scores[i]);
            if (args->d_scores) args->d_scores[i] += (float)((double)coefficient * scale * (double)args->load[e]);
        }
    return sum * scale;
}

/* As in Shazeer 2017 [K]. dL/dw does not depend on w but through the mean. */
static double moe__loss_importance_selected(const moe_loss_args *args, float coefficient) {
    double factor, centre, rest, value = moe__loss_cv2(args, &factor, &centre, &rest);
    double step = (double)coefficient / (double)args->n_tokens;
    if (!args->d_weight) return value;
    for (size_t i = 0; i < args->n_tokens * args->top_k; i++)
        if (args->index[i] >= 0)
            args->d_weight[i] += (float)(step * (moe__times(factor, args->mean[args->index[i]] - centre) + rest));
    return value;
}

/* The load loss of noisy top-k, as in Shazeer 2017 [C]: u = (z - threshold) / std, mean over the tokens of Phi(u). */
static double moe__loss_load(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    size_t E = args->n_experts;
    double factor, centre, rest, value = moe__loss_cv2(args, &factor, &centre, &rest);
    double step = (double)coefficient / (double)args->n_tokens;
    if (!args->d_logits && !args->d_noise_std && !args->d_threshold) return value;
    for (size_t t = 0; t < args->n_tokens; t++)
        for (size_t e = 0; e < E; e += MOE__SLOPES) {
            float u[MOE__SLOPES], density[MOE__SLOPES];
            size_t count = moe__min(MOE__SLOPES, E - e), at = t * E + e;
            moe__loss_noise_units(args, at, count, u);
            for (size_t i = 0; i < count; i++) density[i] = -0.5f * u[i] * u[i];
            kernels->exp(count, density, density);
            for (size_t i = 0; i < count; i++) {
                float c = (float)(step * (moe__times(factor, args->mean[e + i] - centre) + rest));
                float g = c * (density[i] * 0.398942280f / args->noise_std[at + i]); /* 1 / sqrt(2 pi) */
                if (args->d_logits) args->d_logits[at + i] += g;
                if (args->d_threshold) args->d_threshold[at + i] -= g;
                if (args->d_noise_std) args->d_noise_std[at + i] = moe__fma(-g, u[i], args->d_noise_std[at + i]);
            }
        }
    return value;
}

/* -- pairs of columns: sum_ij h(G_ij), G = A^T A, of a matrix A (rows, cols), or of A with columns at unit length --
 *
 *           j0 .. j0 + 32                 G is made in tiles of 32 x 32 from 64 rows at a time. A tile turns into
 *          +--------+                     M = h'(G) in place. M is symmetric, so dA = 2 A M, which is added one tile
 *      i0  | G tile | = A_i^T A_j         at a time: dA_j += 2 A_i M. At unit length du_j = 2 sum_i M_ij u_i and
 *          +--------+                     da_j = (du_j - u_j <u_j, du_j>) / |a_j| [D]. */
#define MOE__GRAM_ROWS 64
typedef enum moe__loss_gram_rule {
    MOE__GRAM_ABS, MOE__GRAM_SQUARE, /* at unit length: */ MOE__GRAM_UNIT, MOE__GRAM_RELU, MOE__GRAM_NEAR
} moe__loss_gram_rule;

/* 1 / length of n columns, 0 for a column of zeros */
static void moe__loss_gram_inverse(const float *a, size_t rows, size_t cols, size_t first, size_t n, float *inverse) {
    double square[MOE__W] = {0};
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < n; j++) {
            double number = (double)a[r * cols + first + j];
            square[j] += number * number; /* exact */
        }
    for (size_t j = 0; j < n; j++) inverse[j] = square[j] > 0.0 ? (float)(1.0 / sqrt(square[j])) : 0.0f;
}
static void moe__loss_gram_panel(const float *a, size_t cols, size_t r0, size_t rows, size_t first, size_t count,
                                 const float *inverse, float *panel) {
    moe__product_fill(a, cols, r0, rows, first, count, panel);
    if (!inverse) return;
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < count; j++) panel[r * MOE__W + j] *= inverse[j];
}
/* g -> h'(g) of a tile (32, 32), *sum += h(g). A pair i = j is off: against 1, or left out. */
static void moe__loss_gram_tile(moe__loss_gram_rule rule, size_t i0, size_t j0, size_t count, size_t m, float *tile,
                                double *sum) {
    for (size_t i = 0; i < count; i++) {
        float *row = tile + i * MOE__W;
        if (rule == MOE__GRAM_NEAR) { /* exp(2 g - 2) */
            for (size_t j = 0; j < m; j++) row[j] = 2.0f * (row[j] - 1.0f);
            moe__dispatched()->exp(m, row, row);
        }
        for (size_t j = 0; j < m; j++) {
            int same = i0 + i == j0 + j;
            float off = row[j] - (float)same, g = row[j];
            if (same) g = 0.0f;
            switch (rule) {
            case MOE__GRAM_ABS: /* abs(g - [i = j]) */
                *sum += fabs((double)off);
                row[j] = (float)((off > 0.0f) - (off < 0.0f));
                break;
            case MOE__GRAM_SQUARE: /* (g - [i = j])^2 */
                *sum += (double)off * (double)off;
                row[j] = 2.0f * off;
                break;
            case MOE__GRAM_UNIT: /* g^2, i != j: at unit length the diagonal is constant */
                *sum += (double)g * (double)g;
                row[j] = 2.0f * g;
                break;
            case MOE__GRAM_RELU: /* max(0, g), i != j */
                if (g > 0.0f) *sum += (double)g;
                row[j] = (float)(g > 0.0f);
                break;
            default: /* near, i != j */
                *sum += (double)g;
                row[j] = 2.0f * g;
            }
        }
    }
}

/* Returns sum h; da (may be NULL) += scale times the gradient. */
static double moe__loss_gram(moe__loss_gram_rule rule, size_t rows, size_t cols, const float *a, float scale,
                             float *da) {
    const moe__kernels *kernels = moe__dispatched();
    MOE__ALIGN64 float panel_i[MOE__GRAM_ROWS * MOE__W], panel_j[MOE__GRAM_ROWS * MOE__W];
    MOE__ALIGN64 float g[MOE__W * MOE__W], cosine[MOE__W * MOE__W];
    float length_i[MOE__W], length_j[MOE__W], along[MOE__W], *inverse_i = NULL, *inverse_j = NULL;
    double sum = 0.0;
    if (rule >= MOE__GRAM_UNIT) inverse_i = length_i, inverse_j = length_j;
    for (size_t j0 = 0; j0 < cols; j0 += MOE__W) {
        size_t m = moe__min(MOE__W, cols - j0);
        if (inverse_j) moe__loss_gram_inverse(a, rows, cols, j0, m, inverse_j);
        memset(along, 0, sizeof along);
        for (size_t i0 = 0; i0 < cols; i0 += MOE__W) {
            size_t n = moe__min(MOE__W, cols - i0);
            if (inverse_i) moe__loss_gram_inverse(a, rows, cols, i0, n, inverse_i);
            memset(g, 0, sizeof g);
            for (size_t r = 0; r < rows; r += MOE__GRAM_ROWS) {
                size_t count = moe__min(MOE__GRAM_ROWS, rows - r);
                moe__loss_gram_panel(a, cols, r, count, i0, n, inverse_i, panel_i);
                moe__loss_gram_panel(a, cols, r, count, j0, m, inverse_j, panel_j);
                moe__product_outer(kernels, count, n, panel_i, panel_j, MOE__W, g, MOE__W, MOE__W, !r);
            }
            memcpy(cosine, g, sizeof g);
            moe__loss_gram_tile(rule, i0, j0, n, m, g, &sum);
            if (!da) continue;
            for (size_t i = 0; i < n; i++)
                for (size_t j = 0; j < m; j++) {
                    float w = 2.0f * scale * g[i * MOE__W + j];
                    if (inverse_i) {
                        w *= inverse_j[j];
                        along[j] = moe__fma(w, cosine[i * MOE__W + j], along[j]);
                        w *= inverse_i[i];
                    }
                    g[i * MOE__W + j] = w;
                }
            for (size_t r = 0; r < rows; r += MOE__W) { /* da += A_i W: the rows of A_i as columns of a panel */
                size_t count = moe__min(MOE__W, rows - r);
                moe__product_fill_t(kernels, a, cols, i0, n, r, count, panel_i);
                moe__product_outer(kernels, n, count, panel_i, g, MOE__W, da + r * cols + j0, cols, m, 0);
            }
        }
        if (!da || !inverse_j) continue;
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < m; j++) {
                size_t at = r * cols + j0 + j;
                da[at] = moe__fma(-along[j] * inverse_j[j], a[at], da[at]);
            }
    }
    return sum;
}
static double moe__loss_router(moe__loss_gram_rule rule, double divisor, const moe_loss_args *args, float coefficient) {
    if (!(divisor > 0.0)) return 0.0;
    float scale = (float)((double)coefficient / divisor);
    return moe__loss_gram(rule, args->d_model, args->n_experts, args->router, scale, args->d_router) / divisor;
}
/* As in SimBal [P]: dR = 2 R sign(R^T R - I). */
static double moe__loss_simbal(const moe_loss_args *args, float coefficient) {
    return moe__loss_router(MOE__GRAM_ABS, 1.0, args, coefficient);
}
/* After the ecology paper [S], whose form is not published [D]. */
static double moe__loss_prototype_orthogonality(const moe_loss_args *args, float coefficient) {
    return moe__loss_router(MOE__GRAM_UNIT, 1.0, args, coefficient);
}
/* After latent prototype routing (2506.21328): it asks for prototypes far apart; this form is ours [D]. */
static double moe__loss_prototype_diversity(const moe_loss_args *args, float coefficient) {
    double pairs = (double)args->n_experts * ((double)args->n_experts - 1.0);
    return moe__loss_router(MOE__GRAM_NEAR, pairs, args, coefficient);
}
/* As in DynMoE [C]: norm(C^T C - I) + mean norm(R_e), C_e = R_e / norm(R_e). A column of zeros has no direction: its
 * own place in C^T C - I is a constant 1. */
static double moe__loss_diverse_simple(const moe_loss_args *args, float coefficient) {
    size_t rows = args->d_model, E = args->n_experts;
    float inverse[MOE__W], *d_router = args->d_router;
    double lengths = 0.0, step = (double)coefficient / (double)E;
    double square = moe__loss_gram(MOE__GRAM_UNIT, rows, E, args->router, 0.0f, NULL);
    for (size_t e = 0; e < E; e++) {
        moe__loss_gram_inverse(args->router, rows, E, e, 1, inverse);
        if (!(inverse[0] > 0.0f)) square += 1.0;
    }
    double norm = sqrt(square);
    if (d_router) (void)moe__loss_router(MOE__GRAM_UNIT, 2.0 * norm, args, coefficient);
    for (size_t e = 0; e < E; e += MOE__W) {
        size_t count = moe__min(MOE__W, E - e);
        moe__loss_gram_inverse(args->router, rows, E, e, count, inverse);
        for (size_t i = 0; i < count; i++)
            if (inverse[i] > 0.0f) lengths += 1.0 / (double)inverse[i];
        if (!d_router) continue;
        for (size_t r = 0; r < rows; r++)
            for (size_t i = 0; i < count; i++) {
                size_t at = r * E + e + i;
                d_router[at] = moe__fma((float)(step * (double)inverse[i]), args->router[at], d_router[at]);
            }
    }
    return norm + lengths / (double)E;
}
/* As in ERMoE's penalty [S]. */
static double moe__loss_orthonormal(const moe_loss_args *args, float coefficient) {
    return moe__loss_gram(MOE__GRAM_SQUARE, args->d_model, args->d_ff, args->matrix, coefficient, args->d_matrix);
}
/* mean over i < j of max(0, cos), cos between the logits of two experts over the tokens [C]. */
static double moe__loss_redundancy(const moe_loss_args *args, float coefficient) {
    size_t T = args->n_tokens, E = args->n_experts;
    double pairs = (double)E * ((double)E - 1.0);
    if (E < 2) return 0.0;
    float scale = (float)((double)coefficient / pairs);
    return moe__loss_gram(MOE__GRAM_RELU, T, E, args->logits, scale, args->d_logits) / pairs;
}

/* -- latent tokens, outputs, codes -- */
/* The sum of 1 - cos over n choices of token t, and step times the gradient of the sum of cos. Choice i's prototype is
 * column column[i]. d cos / dx = (c / |c| - cos x / |x|) / |x|, and the other way round. */
static double moe__loss_align(const moe_loss_args *args, size_t t, size_t count, const size_t *column, double step) {
    size_t d = args->d_model, E = args->n_experts;
    const float *x = args->latent + t * d, *router = args->router;
    double sum = 0.0, xx = 0.0, cc[MOE__W] = {0}, xc[MOE__W] = {0};
    double across[MOE__W] = {0}, own_x[MOE__W] = {0}, own_c[MOE__W] = {0};
    for (size_t r = 0; r < d; r++) {
        double a = (double)x[r];
        xx += a * a;
        for (size_t i = 0; i < count; i++) {
            double b = (double)router[r * E + column[i]];
            cc[i] += b * b; /* exact */
            xc[i] += a * b; /* exact */
        }
    }
    for (size_t i = 0; i < count; i++) {
        double cosine = 0.0;
        if (xx > 0.0 && cc[i] > 0.0) {
            cosine = xc[i] / sqrt(xx * cc[i]);
            across[i] = step / sqrt(xx * cc[i]);
            own_x[i] = step * cosine / xx;
            own_c[i] = step * cosine / cc[i];
        }
        sum += 1.0 - cosine;
    }
    if (!args->d_latent && !args->d_router) return sum;
    for (size_t r = 0; r < d; r++) {
        double a = (double)x[r], dx = 0.0;
        for (size_t i = 0; i < count; i++) {
            double b = (double)router[r * E + column[i]];
            dx += moe__times(across[i], b) - moe__times(own_x[i], a);
            float dc = (float)(moe__times(across[i], a) - moe__times(own_c[i], b));
            if (args->d_router) args->d_router[r * E + column[i]] += dc;
        }
        if (args->d_latent) args->d_latent[t * d + r] += (float)dx;
    }
    return sum;
}
/* After latent prototype routing [D]. */
static double moe__loss_prototype_alignment(const moe_loss_args *args, float coefficient) {
    size_t k = args->top_k, pairs = args->n_tokens * k, choices = 0, column[MOE__W], end;
    double total = 0.0;
    for (size_t i = 0; i < pairs; i++) choices += args->index[i] >= 0;
    if (!choices) return 0.0;
    for (size_t i = 0; i < pairs; i = end) { /* up to 32 choices of a token at a time */
        size_t count = 0;
        end = i + moe__min(MOE__W, k - i % k);
        for (size_t j = i; j < end; j++)
            if (args->index[j] >= 0) column[count++] = (size_t)args->index[j];
        total += moe__loss_align(args, i / k, count, column, -(double)coefficient / (double)choices);
    }
    return total / (double)choices;
}

/* mean_t (1/2) sum (m^2 + v - ln v - 1), v = exp(log_var): after latent prototype routing [D]. */
static double moe__loss_latent_kl(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    const float *latent = args->latent, *log_var = args->log_var;
    size_t count = args->n_tokens * args->d_model;
    double sum = 0.0;
    float step = coefficient / (float)args->n_tokens, v[MOE__SLOPES];
    for (size_t i = 0; i < count; i += MOE__SLOPES) {
        size_t n = moe__min(MOE__SLOPES, count - i);
        kernels->exp(n, log_var + i, v);
        if (args->d_latent) kernels->axpy(n, step, latent + i, args->d_latent + i);
        for (size_t j = 0; j < n; j++) {
            double square = (double)latent[i + j] * (double)latent[i + j];
            sum += 0.5 * (square + (double)v[j] - (double)log_var[i + j] - 1.0); /* exact */
            v[j] -= 1.0f;
        }
        if (args->d_log_var) kernels->axpy(n, 0.5f * step, v, args->d_log_var + i);
    }
    return sum / (double)args->n_tokens;
}

/* An output's squared length; 0 where it is too small or too large to project on. */
static float moe__loss_square_of(const moe__kernels *kernels, size_t d, const float *out) {
    float square = kernels->dot(d, out, out);
    return square >= FLT_MIN && moe__finite(square) ? square : 0.0f;
}
/* Squared lengths of the projections of output j on output l, after 2505.22323 [K]; the square is ours [D]. */
static double moe__loss_output_orthogonality(const moe_loss_args *args, float coefficient) {
    const moe__kernels *kernels = moe__dispatched();
    size_t k = args->top_k, d = args->d_model;
    double sum = 0.0;
    float step = 2.0f * coefficient / (float)args->n_tokens, square[MOE__W], along[MOE__W];
    /* each pair once, l from up to 32 outputs whose squares are at hand */
    for (size_t t = 0; t < args->n_tokens; t++)
        for (size_t l0 = 0; l0 < k; l0 += MOE__W) {
            const float *out = args->outputs + t * k * d;
            float *d_out = args->d_outputs ? args->d_outputs + t * k * d : NULL;
            size_t end = moe__min(l0 + MOE__W, k);
            memset(along, 0, sizeof along);
            for (size_t l = l0; l < end; l++) square[l - l0] = moe__loss_square_of(kernels, d, out + l * d);
            for (size_t l = l0; l < end; l++)
                for (size_t j = 0; j < l; j++) {
                    float ll = square[l - l0], jl = kernels->dot(d, out + j * d, out + l * d);
                    float jj = j >= l0 ? square[j - l0] : moe__loss_square_of(kernels, d, out + j * d);
                    float on_l = 0.0f, on_j = 0.0f; /* the projections' lengths, as shares */
                    if (ll > 0.0f) on_l = jl / ll;
                    if (jj > 0.0f) on_j = jl / jj;
                    sum += (double)on_l * (double)on_l * (double)ll + (double)on_j * (double)on_j * (double)jj;
                    if (!d_out) continue;
                    kernels->axpy(d, step * (on_l + on_j), out + l * d, d_out + j * d);
                    kernels->axpy(d, step * (on_l + on_j), out + j * d, d_out + l * d);
                    along[l - l0] = moe__fma(on_l, on_l, along[l - l0]);
                    if (j >= l0) along[j - l0] = moe__fma(on_j, on_j, along[j - l0]);
                    else kernels->axpy(d, -step * on_j * on_j, out + j * d, d_out + j * d);
                }
            if (!d_out) continue;
            for (size_t l = l0; l < end; l++) kernels->axpy(d, -step * along[l - l0], out + l * d, d_out + l * d);
        }
    return sum / (double)args->n_tokens;
}

/* As in VQMoE [C]: means over the tokens and over the numbers of a token. */
static double moe__loss_codebook(const moe_loss_args *args, float coefficient) {
    size_t coded = 0, d = args->d_model;
    double sum = 0.0;
    for (size_t t = 0; t < args->n_tokens; t++) coded += args->index[t] >= 0;
    if (!coded) return 0.0;
    float step = 2.0f * coefficient / ((float)coded * (float)d);
    for (size_t t = 0; t < args->n_tokens; t++) {
        if (args->index[t] < 0) continue;
        size_t at = t * d, code = (size_t)args->index[t] * d;
        for (size_t i = 0; i < d; i++) {
            float off = args->codebook[code + i] - args->x[at + i];
            sum += (double)off * (double)off;
            if (args->d_codebook) args->d_codebook[code + i] = moe__fma(step, off, args->d_codebook[code + i]);
            if (args->dx) args->dx[at + i] = moe__fma(-step * args->commitment, off, args->dx[at + i]);
        }
    }
    return (1.0 + (double)args->commitment) * sum / ((double)coded * (double)d);
}
/* ==== >>balance ===============================================================================
 * After this room there is one table of auxiliary losses, and two ways to it: moe_loss, on a struct of inputs, and a
 * layer's router backward, which fills that struct from its run. A loss is known in three places: the enum
 * moe_loss_kind, its function, its row here. Uses losses, run, and the gates' table.
 *
 *     routes' gradient -> [on weights] -> gate's back -> [on logits] -> noise's back -> [on noise] -> score's back */
typedef enum moe__balance_when { MOE__LOSS_ON_LOGITS, MOE__LOSS_ON_WEIGHTS, MOE__LOSS_ON_NOISE } moe__balance_when;
typedef moe_status moe__balance_adds(const moe__run *run, moe_loss_args *args, float coefficient, double *value);
typedef struct moe__balance_row {
    moe_info info;
    unsigned reads; /* what moe_loss checks: bits of MOE__READS */
    double (*value)(const moe_loss_args *args, float coefficient);
    moe__balance_when when;
    int (*fits)(const moe_desc *desc); /* whether a layer with these choices has what it needs; NULL: every layer has */
    moe__balance_adds *add; /* what a layer does instead of moe_loss on moe__balance_args; it may change args */
} moe__balance_row;

/* Memory of the losses: only backward has any. */
static moe_status moe__balance_layout(moe_tape *tape, moe__run_memory *memory, size_t count, moe__arena *arena) {
    const moe__plan *plan = &memory->plan;
    moe__run_losses *losses = &memory->losses;
    size_t blocks = moe__ceil_div(count, MOE__TOKENS), sequences = 1, counts;
    (void)tape;
    if (!memory->training) return MOE_OK;
    if (plan->desc.sequence) sequences = moe__max(moe__ceil_div(count, plan->desc.sequence), 1);
    if (!moe__mul(sequences, plan->E, &counts)) return MOE_E_OVERFLOW;
    losses->teacher = (int32_t *)moe__take(arena, count, sizeof(int32_t));
    losses->mean = (double *)moe__take(arena, plan->E, sizeof(double));
    losses->mean_of_batch = (double *)moe__take(arena, plan->E, sizeof(double));
    losses->rank_prob = (double *)moe__take(arena, plan->desc.n_ranks, sizeof(double));
    losses->counts = (uint64_t *)moe__take(arena, moe__max(counts, plan->desc.n_ranks), sizeof(uint64_t));
    if (plan->ortho_loss) losses->matrix = moe__take_floats(arena, 2 * plan->d, plan->f);
    if (!plan->output_loss) return MOE_OK;
    losses->d_out = moe__take_floats(arena, memory->n_routed, plan->ldo);
    losses->block_loss = (double *)moe__take(arena, blocks, sizeof(double));
    losses->outputs = moe__take_floats(arena, blocks * 2 * plan->S, plan->d);
    return MOE_OK;
}

/* -- what a layer's losses read -- */
static const int32_t *moe__balance_teacher(const moe__run *run) {
    const int32_t *given = run->tape->side.teacher;
    if (!given || !run->kept) return given;
    for (size_t t = 0; t < run->tape->n_tokens; t++) run->memory->losses.teacher[t] = given[run->kept[t]];
    return run->memory->losses.teacher;
}
static moe_loss_args moe__balance_args(const moe__run *run, const uint64_t *load) {
    const moe_tape *tape = run->tape;
    moe_loss_args args = moe__loss_args_of(tape->n_tokens, run->plan->E, run->plan->S);
    args.n_ranks = run->desc->n_ranks;
    args.temperature = run->memory->now.prob_t;
    args.prob = tape->prob;
    args.scores = tape->prob;
    if (moe__gate_table[run->desc->gate].scores == MOE__SCORES_OWN) args.scores = tape->scores;
    args.logits = tape->logits;
    args.index = tape->index;
    args.teacher = moe__balance_teacher(run);
    args.load = load;
    args.mean = run->mean;
    args.d_logits = run->memory->d_logits;
    return args;
}
/* All sequences of one length at once, or of sequences that differ each in turn. */
static int moe__balance_one_length(const moe__run *run, size_t length) {
    for (size_t i = 0; i < moe__run_sequences(run); i++)
        if (moe__run_sequence_begin(run, i) != i * length) return 0;
    return 1;
}
static moe_status moe__balance_sequences(moe_loss_args *args, uint64_t *counts, float coefficient, double *value) {
    args->load = counts;
    moe_status status = moe_sequence_load(args->n_tokens, args->n_experts, args->top_k, args->sequence, args->index,
                                          counts);
    return status ? status : moe_loss(MOE_LOSS_SEQUENCE, args, coefficient, value);
}
static moe_status moe__balance_add_switch(const moe__run *run, moe_loss_args *args, float coefficient, double *value) {
    const moe_side *side = &run->tape->side;
    double tokens = (double)(side->counted ? side->counted : args->n_tokens), scale = 1.0;
    if (run->desc->switch_load == MOE_LOAD_FIRST) args->load = side->load ? side->first : run->tape->routes.top1;
    if (run->desc->switch_load == MOE_LOAD_TOKENS && args->n_tokens)
        scale = (double)moe__total(args->n_experts, args->load) / tokens;
    moe_status status = moe_loss(MOE_LOSS_SWITCH, args, (float)((double)coefficient * scale), value);
    *value *= scale;
    return status;
}
static moe_status moe__balance_add_sequence(const moe__run *run, moe_loss_args *args, float coefficient,
                                            double *value) {
    size_t E = args->n_experts, n_sequences = moe__run_sequences(run);
    float *d_scores = args->d_scores = run->memory->select.work;
    double one, sum = 0.0;
    moe_status status = MOE_OK;
    args->sequence = run->desc->sequence;
    if (!args->sequence) args->sequence = moe__max(args->n_tokens, 1);
    if (args->scores != args->prob) args->scores = moe__gate_shares(run);
    memset(d_scores, 0, args->n_tokens * E * sizeof(float));
    if (moe__balance_one_length(run, args->sequence))
        status = moe__balance_sequences(args, run->memory->losses.counts, coefficient, value);
    else {
        for (size_t i = 0; i < n_sequences && !status; i++) {
            moe_loss_args part = *args;
            size_t begin = moe__run_sequence_begin(run, i);
            part.n_tokens = part.sequence = moe__run_sequence_end(run, i) - begin;
            part.scores += begin * E;
            part.d_scores += begin * E;
            part.index += begin * args->top_k;
            status = moe__balance_sequences(&part, run->memory->losses.counts, coefficient / (float)n_sequences, &one);
            if (!status) sum += one / (double)n_sequences;
        }
        *value = sum;
    }
    if (status) return status;
    if (args->scores == args->prob)
        return moe_softmax_backward(args->n_tokens, E, args->temperature, args->prob, d_scores, args->d_logits);
    moe__gate_shares_back(run, args->scores, d_scores);
    return MOE_OK;
}
static moe_status moe__balance_add_rank(const moe__run *run, moe_loss_args *args, float coefficient, double *value) {
    moe_status status = moe_rank_load(args->n_experts, args->n_ranks, args->load, run->memory->losses.counts);
    args->load = run->memory->losses.counts;
    if (!status) status = moe_loss(MOE_LOSS_RANK, args, coefficient, value);
    return status;
}
static moe_status moe__balance_add_communication(const moe__run *run, moe_loss_args *args, float coefficient,
                                                 double *value) {
    moe_status status = moe_rank_tokens(args->n_tokens, args->n_experts, args->top_k, args->n_ranks, args->index,
                                        run->memory->losses.counts);
    const moe_side *side = &run->tape->side;
    args->load = side->rank_tokens ? side->rank_tokens : run->memory->losses.counts;
    args->counted = side->rank_tokens && side->counted ? side->counted : args->n_tokens;
    args->rank_limit = moe__min(args->n_ranks, run->memory->now.k);
    if (!status) status = moe_loss(MOE_LOSS_COMMUNICATION, args, coefficient, value);
    return status;
}
/* The tokens of each rank are at home there: the mean over the ranks. 1 - 0.01 at home [D]. */
static moe_status moe__balance_add_locality(const moe__run *run, moe_loss_args *args, float coefficient,
                                            double *value) {
    const moe__run_losses *losses = &run->memory->losses;
    size_t T = args->n_tokens, E = args->n_experts, n_ranks = args->n_ranks, used = 0, end;
    double v, sum = 0.0;
    moe_status status = MOE_OK;
    for (size_t home = 0; home < moe__min(n_ranks, T); home++)
        used += moe__ceil_div(home * T, n_ranks) < moe__ceil_div((home + 1) * T, n_ranks);
    args->smoothing = 0.01f;
    args->rank_prob = losses->rank_prob;
    for (size_t begin = 0; args->home < n_ranks && !status; args->home++, begin = end) {
        end = moe__ceil_div((args->home + 1) * T, n_ranks); /* tokens with t n_ranks / T == home */
        if (end <= begin) continue;
        args->n_tokens = end - begin;
        args->prob = run->tape->prob + begin * E;
        args->d_logits = run->memory->d_logits + begin * E;
        status = moe_mean_scores(args->n_tokens, E, args->prob, losses->mean_of_batch);
        if (!status) status = moe_rank_prob(E, n_ranks, losses->mean_of_batch, losses->rank_prob);
        if (!status) status = moe_loss(MOE_LOSS_LOCALITY, args, coefficient / (float)used, &v);
        if (!status) sum += v / (double)used;
    }
    *value = sum;
    return status;
}
static moe_status moe__balance_add_relu_l1(const moe__run *run, moe_loss_args *args, float coefficient, double *value) {
    args->top_k = run->memory->now.k;
    args->counted = run->tape->side.counted ? run->tape->side.counted : args->n_tokens;
    args->d_scores = args->d_logits;
    return moe_loss(MOE_LOSS_RELU_L1, args, coefficient, value);
}
static moe_status moe__balance_add_variance(const moe__run *run, moe_loss_args *args, float coefficient,
                                            double *value) {
    args->scores = run->tape->prob;
    return moe_loss(MOE_LOSS_VARIANCE, args, coefficient, value);
}
/* The logits of a cosine score are the cosines themselves. */
static moe_status moe__balance_add_prototype_alignment(const moe__run *run, moe_loss_args *args, float coefficient,
                                                       double *value) {
    size_t pairs = args->n_tokens * args->top_k, count = 0;
    double sum = 0.0;
    (void)run;
    for (size_t p = 0; p < pairs; p++) count += args->index[p] >= 0;
    for (size_t p = 0; p < pairs; p++) {
        if (args->index[p] < 0) continue;
        size_t at = p / args->top_k * args->n_experts + (size_t)args->index[p];
        sum += 1.0 - (double)args->logits[at];
        args->d_logits[at] -= coefficient / (float)count;
    }
    if (count) *value = sum / (double)count;
    return MOE_OK;
}
static moe_status moe__balance_add_importance_selected(const moe__run *run, moe_loss_args *args, float coefficient,
                                                       double *value) {
    args->mean = run->memory->losses.mean_of_batch;
    args->d_weight = run->memory->gate.d_weight;
    moe_status status = moe_mean_weights(args->n_tokens, args->n_experts, args->top_k, args->index, run->tape->weight,
                                         run->memory->losses.mean_of_batch);
    if (!status) status = moe_loss(MOE_LOSS_IMPORTANCE_SELECTED, args, coefficient, value);
    return status;
}
/* Does logit `other` of a token come after logit `first`, in descending order? */
static int moe__balance_after(const float *logits, size_t first, size_t other) {
    return logits[other] < logits[first] || (logits[other] == logits[first] && other > first);
}
/* The places of the top_k-th highest of more logits, and of the next. */
static void moe__balance_kth(const float *logits, size_t count, size_t top_k, size_t place[2]) {
    place[1] = count;
    for (size_t i = 0; i <= top_k; i++) {
        size_t best = count;
        for (size_t e = 0; e < count; e++)
            if ((!i || moe__balance_after(logits, place[1], e)) && (best == count || logits[e] > logits[best]))
                best = e;
        place[0] = place[1];
        place[1] = best;
    }
}
/* An expert's threshold is the k-th highest noisy logit of the others [C]: the k-th for those below it, the next for
 * the others. */
static void moe__balance_thresholds(const moe__run *run, float *threshold) {
    size_t E = run->plan->E, place[2];
    for (size_t t = 0; t < run->tape->n_tokens; t++, threshold += E) {
        const float *logits = run->tape->logits + t * E;
        moe__balance_kth(logits, E, run->memory->now.k, place);
        for (size_t e = 0; e < E; e++) threshold[e] = logits[place[!moe__balance_after(logits, place[0], e)]];
    }
}
/* From back = the gradient by (z - threshold): to the clean logits; to the noise, whose deviation gets -back u, u =
 * (z - threshold) / deviation; and through the threshold, a noisy logit, to both [C]. */
static void moe__balance_load_back(const moe__run *run, const float *threshold, const float *back) {
    size_t E = run->plan->E, place[2];
    const float *clean = run->tape->clean, *deviation = run->tape->noise_std;
    float *d_logits = run->memory->d_logits, *raw = run->memory->noise.raw, slope;
    int learned = run->desc->noise == MOE_NOISE_LEARNED;
    for (size_t t = 0, at = 0; t < run->tape->n_tokens; t++, at += E) {
        const float *logits = run->tape->logits + at;
        float sum[2] = {0.0f, 0.0f};
        moe__balance_kth(logits, E, run->memory->now.k, place);
        for (size_t i = at; i < at + E; i++) {
            d_logits[i] += back[i];
            sum[!moe__balance_after(logits, place[0], i - at)] -= back[i];
            if (!learned || back[i] == 0.0f) continue;
            moe__noise_slope(run, i, 1, &slope);
            raw[i] = moe__fma(-back[i] * ((clean[i] - threshold[i]) / deviation[i]), slope, raw[i]);
        }
        for (size_t i = 0; i < 2; i++) {
            size_t highest = at + place[i];
            d_logits[highest] += sum[i];
            if (!learned || !run->memory->now.training) continue;
            moe__noise_slope(run, highest, 1, &slope);
            raw[highest] = moe__fma(sum[i] * run->memory->noise.draw[highest], slope, raw[highest]);
        }
    }
}
static moe_status moe__balance_add_load(const moe__run *run, moe_loss_args *args, float coefficient, double *value) {
    size_t count = args->n_tokens * args->n_experts;
    float *threshold = run->memory->select.work, *back = run->memory->select.view;
    if (!count || run->memory->now.k >= args->n_experts) return MOE_OK;
    moe__balance_thresholds(run, threshold);
    memset(back, 0, count * sizeof(float));
    args->logits = run->tape->clean;
    args->noise_std = run->tape->noise_std;
    args->threshold = threshold;
    args->d_logits = back;
    args->mean = run->memory->losses.mean_of_batch;
    moe_status status = moe_mean_selection(args->n_tokens, args->n_experts, args->logits, args->noise_std, threshold,
                                           run->memory->losses.mean_of_batch);
    if (!status) status = moe_loss(MOE_LOSS_LOAD, args, coefficient, value);
    if (!status) moe__balance_load_back(run, threshold, back);
    return status;
}
/* V of every routed expert, taken out of its panels. */
static moe_status moe__balance_add_orthonormal(const moe__run *run, moe_loss_args *args, float coefficient,
                                               double *value) {
    const moe__plan *plan = run->plan;
    size_t d = plan->d, f = plan->f;
    float *v = run->memory->losses.matrix, *dv = v + d * f;
    moe_status status = MOE_OK;
    double one = 0.0;
    if (!run->given.experts) return MOE_E_NULL_EXPERTS;
    args->d_model = d;
    args->d_ff = f;
    args->matrix = v;
    args->d_matrix = dv;
    for (size_t e = 0; e < plan->F && !status; e++) {
        const float *w = run->given.experts + e * plan->expert;
        float *g = run->given.d_experts;
        for (size_t i = 0; i < d; i++) moe__plan_get(plan, MOE__T_W1, w, i, 0, f, v + i * f);
        memset(dv, 0, d * f * sizeof(float));
        status = moe_loss(MOE_LOSS_ORTHONORMAL, args, coefficient, &one);
        *value += one;
        if (!g) continue;
        for (size_t i = 0; i < d; i++)
            for (size_t c = 0; c < f; c++)
                g[e * plan->expert + moe__plan_in_block(plan, MOE__T_W1, i, c)] += dv[i * f + c];
    }
    return status;
}
/* Made by the experts' backward, which has the outputs. */
static moe_status moe__balance_add_output_orthogonality(const moe__run *run, moe_loss_args *args, float coefficient,
                                                        double *value) {
    (void)args;
    (void)coefficient;
    *value = run->memory->losses.output_loss;
    return MOE_OK;
}
static moe_status moe__balance_add_codebook(const moe__run *run, moe_loss_args *args, float coefficient,
                                            double *value) {
    if (!run->memory->codes->ready) return MOE_OK;
    args->d_model = run->plan->d;
    args->n_codes = run->desc->n_codes;
    args->commitment = 0.25f;
    args->x = run->memory->codes->x;
    args->index = run->memory->codes->code;
    args->codebook = moe__run_tensor(run, MOE__R_CODEBOOK);
    args->dx = run->dx;
    args->d_codebook = moe__run_grad(run, MOE__R_CODEBOOK);
    return moe_loss(MOE_LOSS_CODEBOOK, args, coefficient, value);
}

/* -- which layers have what a loss needs -- */
static int moe__balance_fits_never(const moe_desc *desc) { /* no layer has a variational latent */
    return (void)desc, 0;
}
static int moe__balance_fits_noise(const moe_desc *desc) {
    return desc->noise == MOE_NOISE_LEARNED || desc->noise == MOE_NOISE_GAUSSIAN;
}
static int moe__balance_fits_relu(const moe_desc *desc) { return desc->gate == MOE_GATE_RELU; }
static int moe__balance_fits_latent(const moe_desc *desc) { return moe__score_is_latent(desc->score); }
static int moe__balance_fits_choices(const moe_desc *desc) { return desc->combine != MOE_COMBINE_SOFT; }
static int moe__balance_fits_cosine(const moe_desc *desc) {
    moe_score_kind score = desc->score;
    int cosine = score == MOE_SCORE_COSINE || score == MOE_SCORE_PROJECTED || score == MOE_SCORE_PROTOTYPE;
    return cosine && moe__balance_fits_choices(desc) && desc->noise == MOE_NOISE_NONE;
}
static int moe__balance_fits_ranks(const moe_desc *desc) {
    return desc->n_ranks > 1 && desc->n_experts % desc->n_ranks == 0;
}
static int moe__balance_fits_codes(const moe_desc *desc) { return desc->n_codes > 0; }
static int moe__balance_fits_orthonormal(const moe_desc *desc) { return desc->expert == MOE_EXPERT_ORTHONORMAL; }
static int moe__balance_fits_outputs(const moe_desc *desc) {
    return desc->combine == MOE_COMBINE_SUM && !(desc->n_zero + desc->n_copy + desc->n_constant);
}

/* -- the table -- */
/* In the order of moe_loss_kind. docs/math.md has the same rows, with their gradients. */
#define MOE__R(input) MOE__READS(input)
#define MOE__LOSS(name, reads) reads, moe__loss_##name, MOE__LOSS_ON_LOGITS
static const moe__balance_row moe__balance_losses[MOE_LOSS_COUNT] = {
    {{"switch", "E sum_e f_e P_e, f_e = c_e / sum_j c_j", "GShard, Switch", "C", 0.01f},
     MOE__LOSS(switch, MOE__R(PROB) | MOE__R(LOAD)), NULL, moe__balance_add_switch},
    {{"z", "mean_t (logsumexp z_t)^2", "ST-MoE", "C", 0.001f},
     MOE__LOSS(z, MOE__R(LOGITS)), NULL, NULL},
    {{"importance", "Var(P) / Mean(P)^2", "V-MoE, after Shazeer 2017", "K", 0.005f},
     MOE__LOSS(importance, MOE__R(PROB) | MOE__R(MEAN)), NULL, NULL},
    {{"importance-selected", "Var(I) / Mean(I)^2, I_e = sum of the selected w_te", "Shazeer 2017", "K", 0.1f},
     MOE__R(INDEX) | MOE__R(MEAN), moe__loss_importance_selected, MOE__LOSS_ON_WEIGHTS,
     moe__balance_fits_choices, moe__balance_add_importance_selected},
    {{"load", "Var(I) / Mean(I)^2, I_e = sum_t Phi((z_te - thr_te) / sigma_te)", "Shazeer 2017, V-MoE", "C", 0.005f},
     MOE__R(LOGITS) | MOE__R(NOISE_STD) | MOE__R(THRESHOLD) | MOE__R(MEAN), moe__loss_load, MOE__LOSS_ON_NOISE,
     moe__balance_fits_noise, moe__balance_add_load},
    {{"entropy", "-mean_t S_t, S_t = -sum_e p_te ln p_te", "ecology paper; the sign is a choice", "D", 0.0f},
     MOE__LOSS(entropy, MOE__R(PROB)), NULL, NULL},
    {{"certainty", "mean_t S_t", "top-p routing", "K", 1e-4f},
     MOE__LOSS(certainty, MOE__R(PROB)), NULL, NULL},
    {{"kl-uniform", "sum_e P_e ln P_e + ln E", "ecology paper, part of its B", "S", 0.4f},
     MOE__LOSS(kl_uniform, MOE__R(PROB) | MOE__R(MEAN)), NULL, NULL},
    {{"kl-reverse", "-ln E - (1/E) sum_e ln P_e", "this library", "D", 0.0f},
     MOE__LOSS(kl_reverse, MOE__R(PROB) | MOE__R(MEAN)), NULL, NULL},
    {{"mutual-information", "-(H(P) - mean_t S_t), H(P) = -sum_e P_e ln P_e", "Mod-Squad, ModuleFormer", "C", 5e-4f},
     MOE__LOSS(mutual_information, MOE__R(PROB) | MOE__R(MEAN)), NULL, NULL},
    {{"l2-uniform", "sum_e (P_e - 1/E)^2", "public code", "C", 0.05f},
     MOE__LOSS(l2_uniform, MOE__R(PROB) | MOE__R(MEAN)), NULL, NULL},
    {{"sequence", "mean over sequences of E sum_e f_e Q_e, Q_e = mean of s_te / sum_j s_tj", "DeepSeek-V3", "K", 1e-4f},
     MOE__LOSS(sequence, MOE__R(SHARES) | MOE__R(LOAD) | MOE__R(SEQUENCE)), NULL, moe__balance_add_sequence},
    {{"rank", "sum_d F_d P_d, F_d = mean of E f_e in d, P_d = sum of P_e in d", "DeepSeekMoE", "K", 0.05f},
     MOE__LOSS(rank, MOE__R(PROB) | MOE__R(LOAD) | MOE__R(RANKS)), moe__balance_fits_ranks, moe__balance_add_rank},
    {{"communication", "sum_d F_d P_d, F_d = D / (M T) times the tokens sent to d", "DeepSeek-V2", "K", 0.02f},
     MOE__LOSS(communication, MOE__R(PROB) | MOE__R(LOAD) | MOE__R(RANKS) | MOE__R(RANK_LIMIT)),
     moe__balance_fits_ranks, moe__balance_add_communication},
    {{"locality", "sum_d P_d ln(P_d / L_d), L = 1 - s at home, s / (D - 1) elsewhere", "LocMoE (2401.13920)", "K",
      0.0f},
     MOE__LOSS(locality, MOE__R(PROB) | MOE__R(RANK_PROB) | MOE__R(RANKS) | MOE__R(HOME)),
     moe__balance_fits_ranks, moe__balance_add_locality},
    {{"relu-l1", "E sum_e f_e mean_t max(0, s_te), f_e = c_e / (k T)", "ReMoE", "C", 1e-8f},
     MOE__LOSS(relu_l1, MOE__R(SCORES) | MOE__R(LOAD) | MOE__R(TOP_K)),
     moe__balance_fits_relu, moe__balance_add_relu_l1},
    {{"variance", "-mean_t sum_e (s_te - mean_t s_te)^2", "2505.22323", "K", 0.0f},
     MOE__LOSS(variance, MOE__R(SCORES) | MOE__R(ANY_MEAN) | MOE__R(TEMPERATURE)), NULL, moe__balance_add_variance},
    {{"oracle", "-mean_t ln p_te, e = teacher of t", "ecology paper; the teacher is a choice", "S", 0.0f},
     MOE__LOSS(oracle, MOE__R(PROB) | MOE__R(TEACHER)), NULL, NULL},
    {{"simbal", "sum_ij abs((R^T R - I)_ij)", "SimBal (2506.14038)", "P", 0.1f},
     MOE__LOSS(simbal, MOE__R(ROUTER)), moe__balance_fits_latent, NULL},
    {{"diverse-simple", "norm(C^T C - I) + mean_e norm(R_e), C_e = R_e / norm(R_e)", "DynMoE", "C", 0.0f},
     MOE__LOSS(diverse_simple, MOE__R(ROUTER)), moe__balance_fits_latent, NULL},
    {{"prototype-orthogonality", "sum_ij ((C^T C - I)_ij)^2, C_e = R_e / norm(R_e)", "ecology paper; form", "D", 0.05f},
     MOE__LOSS(prototype_orthogonality, MOE__R(ROUTER)), moe__balance_fits_latent, NULL},
    {{"prototype-diversity", "mean over i != j of exp(2 cos_ij - 2), cos of R_i and R_j", "2506.21328; form", "D",
      0.0f},
     MOE__LOSS(prototype_diversity, MOE__R(ROUTER)), moe__balance_fits_latent, NULL},
    {{"prototype-alignment", "mean over choices of 1 - cos(x_t, R_e)", "2506.21328; form", "D", 0.0f},
     MOE__LOSS(prototype_alignment, MOE__R(LATENT) | MOE__R(ROUTER) | MOE__R(INDEX)),
     moe__balance_fits_cosine, moe__balance_add_prototype_alignment},
    {{"latent-kl", "mean_t (1/2) sum_i (m_ti^2 + v_ti - ln v_ti - 1)", "2506.21328; form", "D", 0.0f},
     MOE__LOSS(latent_kl, MOE__R(LATENT) | MOE__R(LOG_VAR)), moe__balance_fits_never, NULL},
    {{"redundancy", "mean over i < j of max(0, cos(z_i, z_j))", "public code", "C", 0.1f},
     MOE__LOSS(redundancy, MOE__R(LOGITS)), NULL, NULL},
    {{"output-orthogonality", "mean_t sum over j != l of (o_j . o_l)^2 / (o_l . o_l)", "2505.22323", "K", 0.0f},
     MOE__LOSS(output_orthogonality, MOE__R(OUTPUTS)),
     moe__balance_fits_outputs, moe__balance_add_output_orthogonality},
    {{"orthonormal", "sum_ij ((V^T V - I)_ij)^2", "ERMoE", "S", 0.001f},
     MOE__LOSS(orthonormal, MOE__R(MATRIX)), moe__balance_fits_orthonormal, moe__balance_add_orthonormal},
    {{"codebook", "mean_t (norm(C_j - sg x_t)^2 + 0.25 norm(sg C_j - x_t)^2) / d", "VQMoE", "C", 0.08f},
     MOE__LOSS(codebook, MOE__R(X) | MOE__R(CODEBOOK) | MOE__R(CODE) | MOE__R(COMMITMENT)),
     moe__balance_fits_codes, moe__balance_add_codebook},
};
#undef MOE__LOSS
#undef MOE__R

MOE_API const moe_info *moe_loss_info(moe_loss_kind kind) {
    return (unsigned)kind < MOE_LOSS_COUNT ? &moe__balance_losses[kind].info : NULL;
}
MOE_API const char *moe_loss_name(moe_loss_kind kind) {
    return (unsigned)kind < MOE_LOSS_COUNT ? moe__balance_losses[kind].info.name : NULL;
}

MOE_API moe_status moe_loss(moe_loss_kind kind, const moe_loss_args *args, float coefficient, double *value) {
    size_t count;
    double result = 0.0;
    if ((unsigned)kind >= MOE_LOSS_COUNT) return MOE_E_LOSS_KIND;
    if (!args) return MOE_E_NULL_INPUT;
    if (!moe__finite(coefficient)) return MOE_E_COEFFICIENT;
    moe_status status = moe__loss_check(moe__balance_losses[kind].reads, args, &count);
    if (status) return status;
    moe_loss_args own = *args;
    if (own.temperature == 0.0f) own.temperature = 1.0f;
    if (count) result = moe__balance_losses[kind].value(&own, coefficient);
    if (value) *value = result;
    return MOE_OK;
}

/* What a layer that a loss does not fit lacks. */
static moe_status moe__balance_lacks(int kind) {
    switch (kind) {
    case MOE_LOSS_IMPORTANCE_SELECTED: return MOE_E_LOSS_IMPORTANCE_SELECTED;
    case MOE_LOSS_LOAD: return MOE_E_LOSS_LOAD;
    case MOE_LOSS_RANK: return MOE_E_LOSS_RANK;
    case MOE_LOSS_COMMUNICATION: return MOE_E_LOSS_COMMUNICATION;
    case MOE_LOSS_LOCALITY: return MOE_E_LOSS_LOCALITY;
    case MOE_LOSS_RELU_L1: return MOE_E_LOSS_RELU_L1;
    case MOE_LOSS_SIMBAL: return MOE_E_LOSS_SIMBAL;
    case MOE_LOSS_DIVERSE_SIMPLE: return MOE_E_LOSS_DIVERSE_SIMPLE;
    case MOE_LOSS_PROTOTYPE_ORTHOGONALITY: return MOE_E_LOSS_PROTOTYPE_ORTHOGONALITY;
    case MOE_LOSS_PROTOTYPE_DIVERSITY: return MOE_E_LOSS_PROTOTYPE_DIVERSITY;
    case MOE_LOSS_PROTOTYPE_ALIGNMENT: return MOE_E_LOSS_PROTOTYPE_ALIGNMENT;
    case MOE_LOSS_LATENT_KL: return MOE_E_LOSS_LATENT_KL;
    case MOE_LOSS_OUTPUT_ORTHOGONALITY: return MOE_E_LOSS_OUTPUT_ORTHOGONALITY;
    case MOE_LOSS_ORTHONORMAL: return MOE_E_LOSS_ORTHONORMAL;
    case MOE_LOSS_CODEBOOK: return MOE_E_LOSS_CODEBOOK;
    default: return MOE_E_LOSS_STAGE;
    }
}
static moe_status moe__balance_check(const moe_desc *desc) {
    for (int i = 0; i < MOE_LOSS_COUNT; i++) {
        const moe__balance_row *row = &moe__balance_losses[i];
        if (desc->loss[i] > 0.0f && row->fits && !row->fits(desc)) return moe__balance_lacks(i);
    }
    return MOE_OK;
}
/* The same for the desc of a run, and what its side says of the whole: before a backward changes anything. */
static moe_status moe__balance_ready(const moe__run *run) {
    const moe_side *side = &run->tape->side;
    int first = run->desc->switch_load == MOE_LOAD_FIRST && run->desc->loss[MOE_LOSS_SWITCH] > 0.0f;
    moe_status status = moe__balance_check(run->desc);
    if (status) return status;
    if (!(side->loss_weight >= 0.0f) || !moe__finite(side->loss_weight)) return MOE_E_LOSS_WEIGHT;
    if (first && side->load && !side->first) return MOE_E_NULL_LOAD;
    for (size_t e = 0; side->mean && e < run->plan->E; e++)
        if (!(side->mean[e] >= 0.0 && side->mean[e] <= DBL_MAX)) return MOE_E_NAN_MEAN;
    return MOE_OK;
}
static float moe__balance_coefficient(const moe__run *run, moe_loss_kind kind) {
    float weight = run->tape->side.loss_weight;
    return run->desc->loss[kind] * (weight > 0.0f ? weight : 1.0f);
}
/* The losses of one place in the backward, to the gradients by the weights, the logits, the noise, the router. */
static moe_status moe__balance_add(const moe__run *run, const uint64_t *load, moe__balance_when when) {
    moe_status status = MOE_OK;
    for (int i = 0; i < MOE_LOSS_COUNT && !status; i++) {
        const moe__balance_row *row = &moe__balance_losses[i];
        float coefficient = moe__balance_coefficient(run, (moe_loss_kind)i);
        if (!(run->desc->loss[i] > 0.0f) || row->when != when) continue;
        moe_loss_args args = moe__balance_args(run, load);
        if (row->reads == MOE__READS(ROUTER)) { /* of soft slots, columns */
            args.d_model = run->plan->L;
            args.n_experts = run->plan->N;
            args.router = moe__run_tensor(run, MOE__R_ROUTER);
            args.d_router = moe__run_grad(run, MOE__R_ROUTER);
        }
        if (row->add) status = row->add(run, &args, coefficient, &run->tape->loss[i]);
        else status = moe_loss((moe_loss_kind)i, &args, coefficient, &run->tape->loss[i]);
    }
    return status;
}
/* ==== >>controllers ===========================================================================
 * Balance without a gradient, and schedules. A controller is a row: its defaults, the state that it has, what it
 * checks and its step. After this room moe_control_step moves any of them; nothing here knows of layers. Uses numbers,
 * memory, kernels. */
enum { /* what a controller has, and what its numbers mean */
    MOE__CONTROL_COEFFICIENT = 1, MOE__CONTROL_BIAS = 2, MOE__CONTROL_ERROR = 4, MOE__CONTROL_USAGE = 8,
    MOE__CONTROL_AVERAGES = 16, /* damping is a decay */
    MOE__CONTROL_FACTOR = 32,   /* rate multiplies a coefficient between low and high */
    MOE__CONTROL_SCORES = 64    /* reads the scores of a batch, and needs scratch */
};
typedef struct moe__control_row {
    moe_info info;
    float damping, low, high, coefficient;
    int has;
    moe_status (*check)(const moe_control *control, const moe_control_input *in);
    moe_status (*step)(moe_control *control, const moe_control_input *in);
} moe__control_row;

static double moe__control_mean(const moe_control *control, const moe_control_input *in) {
    double total = 0.0;
    for (size_t e = 0; e < control->n_experts; e++) total += (double)in->load[e];
    return total / (double)control->n_experts;
}
static moe_status moe__control_needs_load(const moe_control *control, const moe_control_input *in) {
    (void)control;
    if (!in->load) return MOE_E_NULL_LOAD;
    return MOE_OK;
}

/* b += rate * sign(mean - load), as in DeepSeek's loss-free balancing [C]. */
static moe_status moe__control_bias(moe_control *control, const moe_control_input *in) {
    double mean = moe__control_mean(control, in);
    for (size_t e = 0; e < control->n_experts; e++) {
        double load = (double)in->load[e];
        if (load < mean) control->bias[e] += control->rate;
        if (load > mean) control->bias[e] -= control->rate;
    }
    return MOE_OK;
}

/* e = (mean - load) / mean; b += Ki e + Kd [e_prev de > 0] de, de = e - e_prev; then mean b = 0: as in ID balancing
 * [P]. */
static moe_status moe__control_id(moe_control *control, const moe_control_input *in) {
    double mean = moe__control_mean(control, in);
    if (!(mean > 0.0)) return MOE_OK;
    for (size_t e = 0; e < control->n_experts; e++) {
        double error = (mean - (double)in->load[e]) / mean, before = (double)control->error[e], change = error - before;
        double step = (double)control->rate * error;
        if (before * change > 0.0) step += moe__times((double)control->damping, change);
        control->bias[e] = (float)((double)control->bias[e] + step);
        control->error[e] = (float)error;
    }
    return MOE_OK;
}
static void moe__control_recentre(moe_control *control, const moe_control_input *in) {
    double centre = 0.0, seen = in->load ? moe__control_mean(control, in) : (double)in->n_tokens;
    if (!(seen > 0.0)) return;
    for (size_t e = 0; e < control->n_experts; e++) centre += (double)control->bias[e];
    centre /= (double)control->n_experts;
    for (size_t e = 0; e < control->n_experts; e++) control->bias[e] = (float)((double)control->bias[e] - centre);
}

/* u = decay u + (1 - decay) load / mean; b = boost where u < low, else 0. The constants are [C], the unit of u is ours
 * [D]. */
static moe_status moe__control_usage(moe_control *control, const moe_control_input *in) {
    double mean = moe__control_mean(control, in), decay = (double)control->damping;
    if (!(mean > 0.0)) return MOE_OK;
    for (size_t e = 0; e < control->n_experts; e++) {
        double now = moe__times(1.0 - decay, (double)in->load[e] / mean);
        double usage = moe__times(decay, (double)control->usage[e]) + now;
        control->usage[e] = (float)usage;
        control->bias[e] = control->usage[e] < control->low ? control->rate : 0.0f;
    }
    return MOE_OK;
}

/* lambda *= rate where the gate is less sparse than 1 - k / E, else /= rate, as in ReMoE [C]. */
static moe_status moe__control_lambda_check(const moe_control *control, const moe_control_input *in) {
    if (!in->top_k || in->top_k > control->n_experts) return MOE_E_TOP_K;
    if (!(in->sparsity >= 0.0 && in->sparsity <= 1.0)) return MOE_E_SPARSITY;
    return MOE_OK;
}
static moe_status moe__control_lambda(moe_control *control, const moe_control_input *in) {
    double want = 1.0 - (double)in->top_k / (double)control->n_experts, lambda = (double)*control->coefficient;
    if (in->sparsity < want) lambda *= (double)control->rate;
    else lambda /= (double)control->rate;
    *control->coefficient = (float)moe__larger(moe__smaller(lambda, (double)control->high), (double)control->low);
    return MOE_OK;
}

/* a = decay a + (1 - decay) min(xi * drop rate, cap), after Skywork-MoE [K]. */
static moe_status moe__control_adaptive_check(const moe_control *control, const moe_control_input *in) {
    (void)control;
    if (!(in->drop_rate >= 0.0 && in->drop_rate <= 1.0)) return MOE_E_DROP_RATE;
    return MOE_OK;
}
static moe_status moe__control_adaptive(moe_control *control, const moe_control_input *in) {
    double goal = moe__smaller((double)control->rate * in->drop_rate, (double)control->high);
    double decay = (double)control->damping;
    double kept = moe__times(decay, (double)*control->coefficient);
    *control->coefficient = (float)(kept + moe__times(1.0 - decay, goal));
    return MOE_OK;
}

/* The number of a given rank (0 = least) among n floats, none of them NaN: digit by digit, without moving them. */
static float moe__control_rank(size_t n, const float *numbers, size_t rank) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        size_t count[256] = {0};
        uint32_t digit = 0;
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = moe__bits_of(numbers[i]);
            bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u; /* orders as the floats do */
            if ((bits & mask) == prefix) count[bits >> shift & 255]++;
        }
        for (; rank >= count[digit]; digit++) rank -= count[digit];
        prefix |= digit << shift;
        mask |= (uint32_t)255 << shift;
    }
    return moe__float_of(prefix ^ (prefix >> 31 ? 0x80000000u : 0xffffffffu));
}

/* b_j = -quantile over the tokens, at 1 - k/E, of s_ij - alpha_i, alpha_i = the (k+1)-th biased score of token i, as in
 * quantile balancing [C]; between two tokens the quantile is on a straight line [D]. */
static moe_status moe__control_quantile_check(const moe_control *control, const moe_control_input *in) {
    size_t count;
    if (!in->top_k || in->top_k > control->n_experts) return MOE_E_TOP_K;
    if (!moe__mul(in->n_tokens, control->n_experts, &count)) return MOE_E_OVERFLOW;
    if (count && !in->scores) return MOE_E_NULL_SCORES;
    if (!moe__all_finite(count, in->scores)) return MOE_E_NAN_SCORES;
    return MOE_OK;
}
static void moe__control_quantile_of(moe_control *control, const moe_control_input *in, moe__arena *arena) {
    size_t T = in->n_tokens, E = control->n_experts;
    float *alpha = moe__take_floats(arena, T, 1), *row = moe__take_floats(arena, moe__max(T, E), 1);
    for (size_t t = 0; t < T; t++) {
        for (size_t e = 0; e < E; e++) row[e] = in->scores[t * E + e] + control->bias[e];
        alpha[t] = moe__control_rank(E, row, E - in->top_k - 1);
    }
    double at = (1.0 - (double)in->top_k / (double)E) * (double)(T - 1);
    size_t low = moe__min((size_t)at, T - 1), high = moe__min(low + 1, T - 1);
    for (size_t e = 0; e < E; e++) {
        for (size_t t = 0; t < T; t++) row[t] = in->scores[t * E + e] - alpha[t];
        double below = (double)moe__control_rank(T, row, low), above = (double)moe__control_rank(T, row, high);
        control->bias[e] = (float)-(below + moe__times(at - (double)low, above - below));
    }
}
static moe_status moe__control_quantile(moe_control *control, const moe_control_input *in) {
    size_t needed, bytes = in->scratch_bytes;
    moe__arena arena;
    if (!in->n_tokens || in->top_k == control->n_experts) return MOE_OK;
    moe_status status = moe_control_scratch(control, in->n_tokens, &needed);
    if (status) return status;
    void *own = NULL, *memory = in->scratch;
    if (!memory) {
        memory = own = moe__alloc(in->alloc_context, needed);
        bytes = needed;
        if (!own) return MOE_E_NO_MEMORY;
    }
    status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) moe__control_quantile_of(control, in, &arena);
    moe__free(in->alloc_context, own);
    return status;
}

static const moe__control_row moe__control_table[MOE_CONTROL_COUNT] = {
    {{"none", "", "", "", 0.0f}, 0.0f, 0.0f, 0.0f, 0.0f, 0, NULL, NULL},
    {{"bias", "b_e += u sign(nbar - c_e)", "DeepSeek, loss-free balancing", "C", 0.001f},
     0.0f, 0.0f, 0.0f, 0.0f, MOE__CONTROL_BIAS, moe__control_needs_load, moe__control_bias},
    {{"quantile", "b_e = -quantile_{1 - k/E} over t of (s_te - alpha_t), alpha_t = the (k+1)-th biased score",
      "quantile balancing", "C", 0.0f},
     0.0f, 0.0f, 0.0f, 0.0f, MOE__CONTROL_BIAS | MOE__CONTROL_SCORES,
     moe__control_quantile_check, moe__control_quantile},
    {{"id", "b_e += Ki e + Kd [e' (e - e') > 0] (e - e'), e = (nbar - c_e) / nbar, e' before; then mean b = 0",
      "ID balancing", "P", 0.006f},
     0.006f, 0.0f, 0.0f, 0.0f, MOE__CONTROL_BIAS | MOE__CONTROL_ERROR, moe__control_needs_load, moe__control_id},
    {{"relu-lambda", "lambda *= 1.2 if sparsity < 1 - k/E, else /= 1.2; lambda_0 = 1e-8", "ReMoE", "C", 1.2f},
     0.0f, FLT_MIN, FLT_MAX, 1e-8f, MOE__CONTROL_COEFFICIENT | MOE__CONTROL_FACTOR,
     moe__control_lambda_check, moe__control_lambda},
    {{"adaptive", "a = 0.99 a + 0.01 min(xi drop rate, 0.01)", "Skywork-MoE", "K", 0.2f},
     0.99f, 0.0f, 0.01f, 0.01f, MOE__CONTROL_COEFFICIENT | MOE__CONTROL_AVERAGES,
     moe__control_adaptive_check, moe__control_adaptive},
    {{"usage-boost", "u_e = 0.9 u_e + 0.1 c_e / nbar; b_e = 0.4 if u_e < 0.35, else 0", "public code; unit of u",
      "C", 0.4f},
     0.9f, 0.35f, 0.0f, 0.0f, MOE__CONTROL_BIAS | MOE__CONTROL_USAGE | MOE__CONTROL_AVERAGES,
     moe__control_needs_load, moe__control_usage},
};
MOE_API const char *moe_control_name(moe_control_kind kind) {
    return (unsigned)kind < MOE_CONTROL_COUNT ? moe__control_table[kind].info.name : NULL;
}
MOE_API const moe_info *moe_control_info(moe_control_kind kind) {
    return (unsigned)kind < MOE_CONTROL_COUNT ? &moe__control_table[kind].info : NULL;
}

/* The next n_values floats of the state, all `value`; NULL where the row does not have them. */
static float *moe__control_state(float **next, int has, size_t n_values, float value) {
    float *state = *next;
    if (!has) return NULL;
    for (size_t i = 0; i < n_values; i++) state[i] = value;
    *next += n_values;
    return state;
}
static moe_status moe__control_layout(moe_control *control, moe_control_kind kind, size_t n_experts,
                                      moe__arena *arena) {
    if ((unsigned)kind >= MOE_CONTROL_COUNT) return MOE_E_CONTROL;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    const moe__control_row *row = &moe__control_table[kind];
    memset(control, 0, sizeof *control);
    control->kind = kind;
    control->n_experts = n_experts;
    control->rate = row->info.coefficient;
    control->damping = row->damping;
    control->low = row->low;
    control->high = row->high;
    control->recentre = kind == MOE_CONTROL_ID;
    control->n_state = (row->has & MOE__CONTROL_COEFFICIENT) != 0;
    for (int part = MOE__CONTROL_BIAS; part <= MOE__CONTROL_USAGE; part *= 2)
        if (row->has & part) control->n_state += n_experts;
    float *next = control->state = moe__take_floats(arena, control->n_state, 1);
    if (arena->overflow) return MOE_E_OVERFLOW;
    if (!arena->base) return MOE_OK;
    control->coefficient = moe__control_state(&next, row->has & MOE__CONTROL_COEFFICIENT, 1, row->coefficient);
    control->bias = moe__control_state(&next, row->has & MOE__CONTROL_BIAS, n_experts, 0.0f);
    control->error = moe__control_state(&next, row->has & MOE__CONTROL_ERROR, n_experts, 0.0f);
    control->usage = moe__control_state(&next, row->has & MOE__CONTROL_USAGE, n_experts, 1.0f); /* even: no boost yet */
    return MOE_OK;
}

MOE_API moe_status moe_control_size(moe_control_kind kind, size_t n_experts, size_t *bytes) {
    moe_control control;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__control_layout(&control, kind, n_experts, &arena);
    if (!status) status = moe__arena_bytes(&arena, bytes);
    return status;
}
MOE_API moe_status moe_control_init(moe_control *control, moe_control_kind kind, size_t n_experts, void *memory,
                                    size_t bytes) {
    size_t needed;
    moe__arena arena;
    if (!control) return MOE_E_NULL_CONTROL;
    moe_status status = moe_control_size(kind, n_experts, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__control_layout(control, kind, n_experts, &arena);
    return status;
}
MOE_API moe_status moe_control_scratch(const moe_control *control, size_t n_tokens, size_t *bytes) {
    moe__arena arena = {NULL, 0, 0};
    if (!control) return MOE_E_NULL_CONTROL;
    if (!bytes) return MOE_E_NULL_OUT;
    *bytes = 0;
    if ((unsigned)control->kind >= MOE_CONTROL_COUNT) return MOE_OK;
    if (!(moe__control_table[control->kind].has & MOE__CONTROL_SCORES)) return MOE_OK;
    moe__take_floats(&arena, n_tokens, 1);
    moe__take_floats(&arena, moe__max(n_tokens, control->n_experts), 1);
    return moe__arena_bytes(&arena, bytes);
}

MOE_API moe_status moe_control_step(moe_control *control, const moe_control_input *in) {
    if (!control || !control->n_experts) return MOE_E_NULL_CONTROL;
    if ((unsigned)control->kind >= MOE_CONTROL_COUNT) return MOE_E_CONTROL;
    if (control->kind == MOE_CONTROL_NONE) return MOE_OK;
    const moe__control_row *row = &moe__control_table[control->kind];
    int factor = row->has & MOE__CONTROL_FACTOR;
    float low = control->low, high = control->high;
    if (!(control->rate >= 0.0f) || !moe__finite(control->rate) || (factor && control->rate < 1.0f)) return MOE_E_RATE;
    if (!(control->damping >= 0.0f) || !moe__finite(control->damping)) return MOE_E_DAMPING;
    if (row->has & MOE__CONTROL_AVERAGES && control->damping > 1.0f) return MOE_E_DAMPING;
    if (!moe__finite(low) || !moe__finite(high) || (factor && !(low > 0.0f && low <= high))) return MOE_E_BOUNDS;
    if (!in) return MOE_E_NULL_INPUT;
    moe_status status = row->check(control, in);
    if (!status) status = row->step(control, in);
    if (!status && control->recentre && control->bias) moe__control_recentre(control, in);
    return status;
}

/* -- schedules -- */
static const struct { const char *name; } moe__schedules[MOE_SCHEDULE_COUNT] = {
    {"default"}, {"linear"}, {"exponential"}, {"cosine"}};
MOE__NAME_API(schedule, moe__schedules, MOE_SCHEDULE_COUNT)

/* cos of a share of half a turn, in 2^24ths of a turn */
static float moe__control_half_cosine(double share) {
    float cosine, sine;
    moe__cos_sin_turn((uint32_t)(share * 8388608.0), &cosine, &sine);
    return cosine;
}
/* The shapes are those of SMoE-Dropout's schedules of k [C]; the formulas of all but the line are ours [D]. */
static double moe__control_schedule(moe_schedule_kind kind, uint64_t step, uint64_t total, double from, double to) {
    if (step >= total) return to;
    double share = (double)step / (double)total;
    if (kind == MOE_SCHEDULE_COSINE) share = 0.5 * (1.0 - (double)moe__control_half_cosine(share));
    if (kind != MOE_SCHEDULE_EXPONENTIAL) return from + moe__times(to - from, share);
    float x[2];
    x[0] = moe__positive(from);
    x[1] = moe__positive(to);
    moe__dispatched()->log(2, x, x);
    x[0] = (float)share * (x[1] - x[0]);
    moe__dispatched()->exp(1, x, x);
    return moe__smaller(moe__larger(from * (double)x[0], moe__smaller(from, to)), moe__larger(from, to));
}
MOE_API moe_status moe_schedule_k(moe_schedule_kind kind, uint64_t step, uint64_t total, size_t from, size_t to,
                                  size_t *k) {
    if ((unsigned)kind >= MOE_SCHEDULE_COUNT) return MOE_E_SCHEDULE;
    if (!from || !to || from > MOE__MAX_EXPERTS || to > MOE__MAX_EXPERTS) return MOE_E_TOP_K;
    if (!k) return MOE_E_NULL_OUT;
    double exact = moe__control_schedule(kind, step, total, (double)from, (double)to);
    *k = moe__min(moe__max((size_t)(exact + 0.5), moe__min(from, to)), moe__max(from, to));
    return MOE_OK;
}
MOE_API moe_status moe_schedule_temperature(moe_schedule_kind kind, uint64_t step, uint64_t total, float from, float to,
                                            float *temperature) {
    if ((unsigned)kind >= MOE_SCHEDULE_COUNT) return MOE_E_SCHEDULE;
    if (!moe__temperature_ok(from) || !moe__temperature_ok(to)) return MOE_E_TEMPERATURE;
    if (!temperature) return MOE_E_NULL_OUT;
    *temperature = (float)moe__control_schedule(kind, step, total, (double)from, (double)to);
    return MOE_OK;
}
MOE_API float moe_schedule_random(uint64_t step, uint64_t warmup, uint64_t fade) {
    if (step < warmup) return 1.0f;
    if (step - warmup >= fade) return 0.0f;
    return (float)(1.0 - (double)(step - warmup) / (double)fade);
}
MOE_API float moe_schedule_cosine(uint64_t step, uint64_t warmup, uint64_t total, float peak, float floor_lr) {
    if (step < warmup) return (float)((double)peak * ((double)(step + 1) / (double)warmup));
    if (step >= total || total <= warmup) return floor_lr;
    float cosine = moe__control_half_cosine((double)(step - warmup) / (double)(total - warmup));
    return moe__fma(0.5f * (peak - floor_lr), 1.0f + cosine, floor_lr);
}

/* ==== >>optimiser =============================================================================
 * Steps of optimisers on any array, and sums of squares that do not depend on the threads. Uses kernels and threads. */
static const struct { const char *name; } moe__optimizers[] = {{"default"}, {"adamw"}, {"sgd"}};
MOE__NAME_API(optimizer, moe__optimizers, MOE_OPTIMIZER_COUNT)

#define MOE__SPAN 16384 /* floats of a task */
typedef struct moe__optimizer_job {
    const moe__kernels *kernels;
    moe__adam adam;
    moe_optimizer_kind kind;
    size_t n;
    float *params, *m, *v;
    const float *grads;
} moe__optimizer_job;
static void moe__optimizer_task(void *arg, size_t i, size_t worker) {
    const moe__optimizer_job *job = (const moe__optimizer_job *)arg;
    size_t at = i * MOE__SPAN, count = moe__min(MOE__SPAN, job->n - at);
    float *params = job->params + at, *m = job->m + at;
    (void)worker;
    if (job->kind == MOE_OPTIMIZER_SGD) job->kernels->sgd(count, &job->adam, params, job->grads + at, m);
    else job->kernels->adamw(count, &job->adam, params, job->grads + at, m, job->v + at);
}
static moe_status moe__optimizer_check(const moe_optimizer_args *args, float beta1, float beta2, float momentum,
                                       float decay, float epsilon) {
    if (!(args->lr >= 0.0f) || !moe__finite(args->lr)) return MOE_E_LR;
    if (!(beta1 >= 0.0f && beta1 < 1.0f)) return MOE_E_BETA1;
    if (!(beta2 >= 0.0f && beta2 < 1.0f)) return MOE_E_BETA2;
    if (!(momentum >= 0.0f && momentum < 1.0f)) return MOE_E_MOMENTUM;
    if (!(epsilon > 0.0f) || !moe__finite(epsilon)) return MOE_E_EPSILON;
    if (!(decay >= 0.0f) || !moe__finite(decay)) return MOE_E_WEIGHT_DECAY;
    if (!moe__finite(args->scale)) return MOE_E_COEFFICIENT;
    return args->step ? MOE_OK : MOE_E_STEP;
}

/* AdamW: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
 * p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), after Loshchilov and Hutter [K]. */
MOE_API moe_status moe_optimizer_step(const moe_optimizer_args *args, size_t count, float *params, const float *grads,
                                      float *m, float *v) {
    moe__optimizer_job job;
    if (!args) return MOE_E_OPTIMIZER;
    memset(&job, 0, sizeof job);
    job.kind = args->kind ? args->kind : MOE_OPTIMIZER_ADAMW;
    if ((unsigned)job.kind >= MOE_OPTIMIZER_COUNT) return MOE_E_OPTIMIZER;
    int adamw = job.kind == MOE_OPTIMIZER_ADAMW;
    float beta1 = moe__value(args->beta1, 0.9f), beta2 = moe__value(args->beta2, 0.999f);
    float momentum = moe__value(args->momentum, 0.9f), decay = moe__value(args->weight_decay, 0.01f);
    float epsilon = args->epsilon == 0.0f ? 1e-8f : args->epsilon;
    moe_status status = moe__optimizer_check(args, beta1, beta2, momentum, decay, epsilon);
    if (status || !count) return status;
    if (!params) return MOE_E_NULL_PARAMS;
    if (!grads) return MOE_E_NULL_GRADS;
    if (!m || (adamw && !v)) return MOE_E_NULL_MOMENTS;
    job.kernels = moe__dispatched();
    job.adam.lr = args->lr;
    job.adam.beta1 = adamw ? beta1 : momentum;
    job.adam.beta2 = beta2;
    job.adam.one_beta1 = 1.0f - beta1;
    job.adam.one_beta2 = 1.0f - beta2;
    job.adam.eps = epsilon;
    job.adam.decay = moe__fma(-args->lr, decay, 1.0f);
    job.adam.scale = args->scale == 0.0f ? 1.0f : args->scale;
    job.adam.fix1 = 1.0f / (1.0f - moe__power(beta1, args->step));
    job.adam.fix2 = 1.0f / (1.0f - moe__power(beta2, args->step));
    job.n = count;
    job.params = params;
    job.grads = grads;
    job.m = m;
    job.v = v;
    moe_run(args->parallel, moe__ceil_div(count, MOE__SPAN), moe__optimizer_task, &job);
    return MOE_OK;
}

/* 64 stripes of 16 lanes: the order does not depend on the threads, and a square is exact in double. */
#define MOE__STRIPES 64
typedef struct moe__optimizer_squares {
    const float *x;
    size_t n, stripe;
    double sum[MOE__STRIPES];
} moe__optimizer_squares;
static void moe__optimizer_task_squares(void *arg, size_t i, size_t worker) {
    moe__optimizer_squares *squares = (moe__optimizer_squares *)arg;
    const float *x = squares->x;
    size_t at = moe__min(squares->n, i * squares->stripe), end = moe__min(squares->n, at + squares->stripe);
    double lane[16] = {0};
    (void)worker;
    for (; at + 16 <= end; at += 16)
        for (size_t l = 0; l < 16; l++) lane[l] += (double)x[at + l] * (double)x[at + l]; /* exact */
    for (size_t l = 0; at + l < end; l++) lane[l] += (double)x[at + l] * (double)x[at + l]; /* exact */
    for (size_t half = 8; half; half >>= 1)
        for (size_t l = 0; l < half; l++) lane[l] += lane[l + half];
    squares->sum[i] = lane[0];
}
MOE_API double moe_sum_squares(const moe_parallel *parallel, size_t count, const float *x) {
    moe__optimizer_squares squares;
    double sum = 0.0;
    if (!x || !count) return 0.0;
    squares.x = x;
    squares.n = count;
    squares.stripe = moe__ceil_div(moe__ceil_div(count, MOE__STRIPES), 16) * 16;
    moe_run(parallel, MOE__STRIPES, moe__optimizer_task_squares, &squares);
    for (size_t i = 0; i < MOE__STRIPES; i++) sum += squares.sum[i];
    return sum;
}

/* ==== >>health ================================================================================
 * The counters of routed batches, and the metrics of the load. They need no layer, only moe_routes, and O(n_experts) of
 * the caller's memory. Counters are only added to, so threads and ranks may count apart and be merged. In double, with
 * libm: this room, and all of the diagnosis after it, stands outside the same-bits contract.
 */
#define MOE__DEAD_FIRST 0.01   /* of the first choices (the ecology paper [S]) */
#define MOE__DEAD_FRACTION 0.1 /* of an even share of the selections */

/* Text number `at` of a list; NULL past its end. */
static const char *moe__health_text(const char *const *texts, unsigned count, unsigned at) {
    return at < count ? texts[at] : NULL;
}

static void moe__health_zero(size_t n, double *values) {
    for (size_t i = 0; i < n; i++) values[i] = 0.0;
}

static double moe__health_sum(size_t n, const uint64_t *counts) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (double)counts[i];
    return sum;
}

/* A share's part of an entropy in nats. */
static double moe__health_entropy(double share) { return share > 0.0 ? -share * log(share) : 0.0; }

/* Heap sort, ascending. */
static void moe__health_sort(size_t n, double *values) {
    size_t start = n / 2;
    while (n > 1) {
        double moved;
        if (start) moved = values[--start];                /* the heap is still being built */
        else moved = values[--n], values[n] = values[0];   /* its largest goes to the end */
        size_t at = start, child;
        while ((child = 2 * at + 1) < n) {
            if (child + 1 < n && values[child + 1] > values[child]) child++;
            if (values[child] <= moved) break;
            values[at] = values[child];
            at = child;
        }
        values[at] = moved;
    }
}

/* Is an expert dead by its count of all first choices, or by that of all selections? A single expert never is. A count
 * of exactly the border is not under it: 0.01 and 0.1 are off by less than half a unit, so the products are exact. */
static int moe__health_dead_first(size_t n_experts, double first, uint64_t count) {
    return n_experts > 1 && first > 0.0 && (double)count < MOE__DEAD_FIRST * first;
}
static int moe__health_dead(size_t n_experts, double fraction, double total, uint64_t count) {
    double share = fraction > 0.0 ? fraction : MOE__DEAD_FRACTION;
    return n_experts > 1 && total > 0.0 && (double)count < share * total / (double)n_experts;
}

static moe_status moe__health_layout(moe_health *health, size_t n_experts, moe__arena *arena) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    memset(health, 0, sizeof *health);
    health->n_experts = n_experts;
    health->load = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    health->top1 = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    health->prob = (double *)moe__take(arena, n_experts, sizeof(double));
    health->sorted = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    health->dead = (uint32_t *)moe__take(arena, n_experts, sizeof(uint32_t));
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_health_size(size_t n_experts, size_t *bytes) {
    moe_health health;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__health_layout(&health, n_experts, &arena);
    return status ? status : moe__arena_bytes(&arena, bytes);
}

MOE_API moe_status moe_health_init(moe_health *health, size_t n_experts, void *memory, size_t bytes) {
    size_t needed;
    moe__arena arena;
    if (!health) return MOE_E_NULL_HEALTH;
    moe_status status = moe_health_size(n_experts, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__health_layout(health, n_experts, &arena);
    return status ? status : moe_health_reset(health);
}

MOE_API moe_status moe_health_reset(moe_health *health) {
    if (!health || !health->load) return MOE_E_NULL_HEALTH;
    health->n_batches = health->n_tokens = health->n_selected = health->n_dropped = 0;
    memset(health->load, 0, health->n_experts * sizeof(uint64_t));
    memset(health->top1, 0, health->n_experts * sizeof(uint64_t));
    moe__health_zero(health->n_experts, health->prob);
    return moe_health_update(health); /* of nothing: 0 */
}

MOE_API moe_status moe_health_add(moe_health *health, const moe_routes *routes, const float *prob) {
    if (!health || !health->load) return MOE_E_NULL_HEALTH;
    if (!routes) return MOE_E_NULL_ROUTES;
    if (routes->n_experts != health->n_experts) return MOE_E_MERGE;
    health->n_batches++;
    health->n_tokens += routes->n_tokens;
    health->n_selected += routes->n_routes + routes->n_dropped;
    health->n_dropped += routes->n_dropped;
    for (size_t e = 0; e < health->n_experts; e++) {
        health->load[e] += routes->load[e];
        health->top1[e] += routes->top1[e];
    }
    if (!prob) return MOE_OK;
    for (size_t t = 0; t < routes->n_tokens; t++, prob += health->n_experts)
        for (size_t e = 0; e < health->n_experts; e++) health->prob[e] += (double)prob[e];
    return MOE_OK;
}

MOE_API moe_status moe_health_merge(moe_health *health, const moe_health *other) {
    if (!health || !other || !health->load || !other->load) return MOE_E_NULL_HEALTH;
    if (health->n_experts != other->n_experts) return MOE_E_MERGE;
    health->n_batches += other->n_batches;
    health->n_tokens += other->n_tokens;
    health->n_selected += other->n_selected;
    health->n_dropped += other->n_dropped;
    for (size_t e = 0; e < health->n_experts; e++) {
        health->load[e] += other->load[e];
        health->top1[e] += other->top1[e];
        health->prob[e] += other->prob[e];
    }
    return MOE_OK;
}

/* The metrics of a load whose sum is above 0. */
static void moe__health_update_load(moe_health *health, double total) {
    size_t n = health->n_experts;
    double count = (double)n, mean = total / count, square = 0.0;
    double *sorted = (double *)(void *)health->sorted; /* both are of 8 bytes */
    for (size_t e = 0; e < n; e++) {
        sorted[e] = (double)health->load[e];
        square += (sorted[e] - mean) * (sorted[e] - mean);
        health->load_entropy += moe__health_entropy(sorted[e] / total);
    }
    moe__health_sort(n, sorted);
    for (size_t i = 0; i < n; i++) /* sum_{i<j} |l_i - l_j| of the sorted load */
        health->gini += (2.0 * (double)i + 1.0 - count) * sorted[i] / (count * total);
    health->maxvio = sorted[n - 1] / mean - 1.0;
    health->minvio = 1.0 - sorted[0] / mean;
    health->min_max = sorted[0] / sorted[n - 1];
    health->load_cv = sqrt(square / count) / mean;
    health->effective_experts = exp(health->load_entropy);
    health->load_entropy = n > 1 ? health->load_entropy / log(count) : 1.0;
}

MOE_API moe_status moe_health_update(moe_health *health) {
    if (!health || !health->load) return MOE_E_NULL_HEALTH;
    size_t n = health->n_experts;
    double total = moe__health_sum(n, health->load), first = moe__health_sum(n, health->top1), prob = 0.0;
    health->maxvio = health->load_cv = health->load_entropy = health->entropy = health->drop_rate = 0.0;
    health->minvio = health->gini = health->min_max = health->effective_experts = 0.0;
    health->n_dead = health->n_dead_first = 0;
    if (total > 0.0) moe__health_update_load(health, total);
    for (size_t e = 0; e < n; e++) prob += health->prob[e];
    for (size_t e = 0; e < n; e++) {
        if (prob > 0.0) health->entropy += moe__health_entropy(health->prob[e] / prob);
        health->n_dead_first += (size_t)moe__health_dead_first(n, first, health->top1[e]);
        if (moe__health_dead(n, health->dead_fraction, total, health->load[e]))
            health->dead[health->n_dead++] = (uint32_t)e;
    }
    if (health->n_selected) health->drop_rate = (double)health->n_dropped / (double)health->n_selected;
    return MOE_OK;
}

static void moe__health_turn(int was_dead, int is_dead, size_t *newly_dead, size_t *revived) {
    *newly_dead += (size_t)(is_dead && !was_dead);
    *revived += (size_t)(was_dead && !is_dead);
}

MOE_API moe_status moe_health_compare(const moe_health *before, const moe_health *now, moe_health_change *out) {
    if (!before || !now || !before->load || !now->load) return MOE_E_NULL_HEALTH;
    if (!out) return MOE_E_NULL_OUT;
    if (before->n_experts != now->n_experts) return MOE_E_MERGE;
    size_t n = now->n_experts;
    double old_first = moe__health_sum(n, before->top1), first = moe__health_sum(n, now->top1);
    double old_total = moe__health_sum(n, before->load), total = moe__health_sum(n, now->load);
    double fraction = now->dead_fraction;
    memset(out, 0, sizeof *out);
    for (size_t e = 0; e < n; e++) {
        uint64_t old_load = before->load[e], load = now->load[e];
        moe__health_turn(moe__health_dead_first(n, old_first, before->top1[e]),
                         moe__health_dead_first(n, first, now->top1[e]), &out->newly_dead_first, &out->revived_first);
        moe__health_turn(moe__health_dead(n, fraction, old_total, old_load),
                         moe__health_dead(n, fraction, total, load), &out->newly_dead, &out->revived);
        if (old_total > 0.0 && total > 0.0)
            out->load_moved += 0.5 * fabs((double)load / total - (double)old_load / old_total);
    }
    return MOE_OK;
}

/* ==== >>measures ==============================================================================
 * Measures of plain arrays, for whoever has indices, logits or counts and no layer. Results that are sums are added to
 * the caller's arrays. Uses health for sums and deaths, and the kernels that rank tokens.
 */
static moe_status moe__measure_sizes_ok(size_t n_experts, size_t top_k) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    return top_k && top_k <= n_experts ? MOE_OK : MOE_E_TOP_K;
}

/* Indices that may be counted: in range, and no expert twice in a token. */
static moe_status moe__measure_index_ok(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index) {
    size_t pairs;
    moe_status status = moe__measure_sizes_ok(n_experts, top_k);
    if (status) return status;
    if (!moe__mul(n_tokens, top_k, &pairs)) return MOE_E_OVERFLOW;
    if (pairs && !index) return MOE_E_NULL_INDEX;
    for (size_t i = 0; i < pairs; i++) {
        if (index[i] < 0) continue;
        if ((size_t)index[i] >= n_experts) return MOE_E_INDEX;
        for (size_t k = i - i % top_k; k < i; k++)
            if (index[k] == index[i]) return MOE_E_INDEX_TWICE;
    }
    return MOE_OK;
}

/* Logits that are there; *count is how many. Whether they are finite is asked last, as it reads them all. */
static moe_status moe__measure_logits_ok(size_t n_tokens, size_t n_experts, const float *logits, size_t *count) {
    if (!moe__mul(n_tokens, n_experts, count)) return MOE_E_OVERFLOW;
    return *count && !logits ? MOE_E_NULL_LOGITS : MOE_OK;
}

/* A row without a choice is no token. */
static int moe__measure_is_token(size_t top_k, const int32_t *index) {
    for (size_t k = 0; k < top_k; k++)
        if (index[k] >= 0) return 1;
    return 0;
}

/* Rows of logits with their choices; index NULL: each is a token. */
typedef struct moe__measure_rows {
    size_t n_rows, n_experts, top_k;
    const float *logits;
    const int32_t *index;
} moe__measure_rows;

/* The logits of the first token at row *next or after it, which moves behind it; NULL: there is none. */
static const float *moe__measure_token(const moe__measure_rows *rows, size_t *next) {
    while (*next < rows->n_rows) {
        size_t row = (*next)++;
        if (!rows->index || moe__measure_is_token(rows->top_k, rows->index + row * rows->top_k))
            return rows->logits + row * rows->n_experts;
    }
    return NULL;
}

/* *n_tokens = how many there are, if their logits can be used. */
static moe_status moe__measure_tokens_ok(const moe__measure_rows *rows, size_t *n_tokens) {
    const float *token;
    *n_tokens = 0;
    for (size_t next = 0; (token = moe__measure_token(rows, &next)) != NULL; ++*n_tokens)
        if (!moe__all_finite(rows->n_experts, token)) return MOE_E_NAN_LOGITS;
    return *n_tokens ? MOE_OK : MOE_E_NO_TOKENS;
}

MOE_API moe_status moe_churn(size_t n_tokens, size_t top_k, const int32_t *before, const int32_t *after,
                             double *share) {
    size_t pairs, changed = 0, counted = 0;
    if (!top_k) return MOE_E_TOP_K;
    if (!moe__mul(n_tokens, top_k, &pairs)) return MOE_E_OVERFLOW;
    if (!share) return MOE_E_NULL_OUT;
    if (pairs && (!before || !after)) return MOE_E_NULL_INDEX;
    for (size_t t = 0; t < n_tokens; t++, before += top_k, after += top_k) {
        size_t size_before = 0, size_after = 0, common = 0;
        for (size_t i = 0; i < top_k; i++) {
            size_after += after[i] >= 0;
            if (before[i] < 0) continue;
            size_before++;
            for (size_t k = 0; k < top_k; k++) common += after[k] == before[i];
        }
        changed += common != size_before || common != size_after;
        counted += size_before || size_after;
    }
    if (n_tokens && !counted) return MOE_E_NO_TOKENS;
    *share = (double)changed / (double)moe__max(counted, 1);
    return MOE_OK;
}

MOE_API moe_status moe_seu(size_t n_tokens, size_t n_experts, size_t top_k, size_t sequence, const int32_t *index,
                           uint32_t *work, double *seu) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (!sequence) return MOE_E_SEQUENCE;
    if (!work) return MOE_E_NULL_WORK;
    if (!seu) return MOE_E_NULL_OUT;
    size_t n_sequences = 0;
    uint32_t last = 0;
    double distinct = 0.0;
    memset(work, 0, n_experts * sizeof *work);
    if (moe__ceil_div(n_tokens, sequence) >= UINT32_MAX) return MOE_E_OVERFLOW;
    for (size_t i = 0; i < n_tokens * top_k; i++) {
        uint32_t mark = (uint32_t)(i / top_k / sequence) + 1; /* the sequence that saw the expert last */
        if (index[i] < 0 || work[index[i]] == mark) continue;
        n_sequences += mark != last;
        last = work[index[i]] = mark;
        distinct += 1.0;
    }
    if (n_tokens && !n_sequences) return MOE_E_NO_TOKENS;
    *seu = distinct / ((double)moe__max(n_sequences, 1) * (double)n_experts);
    return MOE_OK;
}

MOE_API moe_status moe_coselect(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                uint64_t *count) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (!count) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++, index += top_k)
        for (size_t i = 0; i < top_k; i++) {
            if (index[i] < 0) continue;
            for (size_t k = 0; k < top_k; k++)
                if (index[k] >= 0) count[(size_t)index[i] * n_experts + (size_t)index[k]]++;
        }
    return MOE_OK;
}

MOE_API moe_status moe_crossing(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_ranks, const int32_t *index,
                                double *share) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (!n_ranks) return MOE_E_N_RANKS;
    if (!share) return MOE_E_NULL_OUT;
    if (n_ranks > MOE__MAX_INDEX || n_tokens > MOE__MAX_INDEX) return MOE_E_OVERFLOW; /* of the placement's products */
    size_t routes = 0, crossing = 0;
    for (size_t i = 0; i < n_tokens * top_k; i++) {
        if (index[i] < 0) continue;
        size_t home = moe__placement_of_token(i / top_k, n_tokens, n_ranks);
        routes++;
        crossing += moe__placement_of_expert((size_t)index[i], n_experts, n_ranks) != home;
    }
    *share = (double)crossing / (double)moe__max(routes, 1);
    return MOE_OK;
}

MOE_API moe_status moe_tier_usage(size_t n_experts, size_t n_tiers, const uint32_t *tier, const uint64_t *load,
                                  double *share) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!load) return MOE_E_NULL_LOAD;
    if (!share) return MOE_E_NULL_OUT;
    if (!tier) return MOE_E_NULL_LABEL;
    for (size_t e = 0; e < n_experts; e++)
        if (tier[e] >= n_tiers) return MOE_E_TIER;
    double total = moe__health_sum(n_experts, load);
    moe__health_zero(n_tiers, share);
    if (!(total > 0.0)) return MOE_OK;
    for (size_t e = 0; e < n_experts; e++) share[tier[e]] += (double)load[e] / total;
    return MOE_OK;
}

MOE_API moe_status moe_loss_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                      const float *loss, double *sum) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (n_tokens && !loss) return MOE_E_NULL_LABEL;
    if (!sum) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n_tokens * top_k; i++)
        if (index[i] >= 0) sum[index[i]] += (double)loss[i / top_k];
    return MOE_OK;
}

MOE_API moe_status moe_right_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                       const uint8_t *correct, uint64_t *right) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (n_tokens && !correct) return MOE_E_NULL_LABEL;
    if (!right) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++, index += top_k)
        if (index[0] >= 0) right[index[0]] += correct[t] != 0;
    return MOE_OK;
}

MOE_API moe_status moe_label_by_expert(size_t n_tokens, size_t n_experts, size_t top_k, size_t n_labels,
                                       const int32_t *index, const uint32_t *label, uint64_t *count) {
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (status) return status;
    if (n_tokens && !label) return MOE_E_NULL_LABEL;
    if (!count) return MOE_E_NULL_COUNT;
    for (size_t t = 0; t < n_tokens; t++)
        if (label[t] >= n_labels && label[t] <= INT32_MAX && moe__measure_is_token(top_k, index + t * top_k))
            return MOE_E_LABEL;
    for (size_t t = 0; t < n_tokens; t++, index += top_k)
        if (index[0] >= 0 && label[t] <= INT32_MAX) count[(size_t)index[0] * n_labels + label[t]]++;
    return MOE_OK;
}

MOE_API moe_status moe_label_majority(size_t n_experts, size_t n_labels, const uint64_t *count, uint64_t *right) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!count || !right) return MOE_E_NULL_COUNT;
    for (size_t e = 0; e < n_experts; e++, count += n_labels) {
        right[e] = 0;
        for (size_t c = 0; c < n_labels; c++)
            if (count[c] > right[e]) right[e] = count[c];
    }
    return MOE_OK;
}

MOE_API const char *moe_ecology_name(moe_ecology_kind kind) {
    static const char *const names[] = {"DEAD", "NOISE", "EDGE", "WEAK_CORE", "BROAD_CORE", "PURE_CORE"};
    return moe__health_text(names, MOE_ECOLOGY_COUNT, (unsigned)kind);
}

/* Products, not quotients: a count exactly on a border is on its upper side. */
static moe_ecology_kind moe__measure_ecology(double total, double chosen, double right) {
    if (chosen <= 0.0 || 100.0 * chosen < total) return MOE_ECOLOGY_DEAD;
    if (100.0 * chosen < 3.0 * total) return 4.0 * right < chosen ? MOE_ECOLOGY_NOISE : MOE_ECOLOGY_EDGE;
    if (10.0 * right < 3.0 * chosen) return MOE_ECOLOGY_WEAK_CORE;
    return 2.0 * right < chosen ? MOE_ECOLOGY_BROAD_CORE : MOE_ECOLOGY_PURE_CORE;
}

MOE_API moe_status moe_ecology_classes(size_t n_experts, const uint64_t *top1, const uint64_t *right,
                                       moe_ecology_kind *out) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!top1) return MOE_E_NULL_LOAD;
    if (!right) return MOE_E_NULL_COUNT;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__health_sum(n_experts, top1);
    for (size_t e = 0; e < n_experts; e++) out[e] = moe__measure_ecology(total, (double)top1[e], (double)right[e]);
    return MOE_OK;
}

static int moe__measure_weight_ok(double weight) { return weight >= 0.0 && moe__finite_double(weight); }

MOE_API double moe_ecology_number(double temperature, double entropy, double oracle, double balance) {
    if (!moe__measure_weight_ok(temperature) || !moe__measure_weight_ok(entropy)) return (double)NAN;
    if (!moe__measure_weight_ok(oracle) || !moe__measure_weight_ok(balance)) return (double)NAN;
    return oracle + balance > 0.0 ? temperature * entropy / (oracle + balance) : HUGE_VAL;
}

/* One token's sum_{i != j} cos(o_i, o_j), with unit vectors |sum u|^2 - sum |u|^2. NaN if an output is not finite. */
static double moe__measure_similarity(size_t n_experts, size_t d, const float *outputs, double *inverse_norm) {
    double ones = 0.0, square = 0.0;
    for (size_t e = 0; e < n_experts; e++) {
        double norm = 0.0; /* squares of float32 do not underflow in double */
        for (size_t i = 0; i < d; i++) {
            if (!moe__finite(outputs[e * d + i])) return (double)NAN;
            norm += (double)outputs[e * d + i] * (double)outputs[e * d + i];
        }
        inverse_norm[e] = norm > 0.0 ? 1.0 / sqrt(norm) : 0.0;
        ones += norm > 0.0;
    }
    for (size_t i = 0; i < d; i++) {
        double sum = 0.0;
        for (size_t e = 0; e < n_experts; e++) sum += inverse_norm[e] * (double)outputs[e * d + i];
        square += sum * sum;
    }
    return square - ones;
}

MOE_API moe_status moe_pes(size_t n_tokens, size_t n_experts, size_t d, const float *outputs, double *work,
                           double *pes) {
    size_t row, count;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!d) return MOE_E_D_MODEL;
    if (!moe__mul(n_experts, d, &row) || !moe__mul(n_tokens, row, &count)) return MOE_E_OVERFLOW;
    if (count && !outputs) return MOE_E_NULL_X;
    if (!work) return MOE_E_NULL_WORK;
    if (!pes) return MOE_E_NULL_OUT;
    double sum = 0.0, pairs = (double)n_experts * (double)moe__max(n_experts - 1, 1);
    for (size_t t = 0; t < n_tokens; t++) sum += moe__measure_similarity(n_experts, d, outputs + t * row, work) / pairs;
    if (!moe__finite_double(sum)) return MOE_E_NAN_X;
    *pes = n_tokens && n_experts > 1 ? sum / (double)n_tokens : 0.0;
    return MOE_OK;
}

/* -- passes over logits, in memory that the caller gives -- */
typedef struct moe__measure_work {
    float *pad, *panel, *list, *selected, *first; /* of a count */
    float *score;                                 /* of a scan */
    double *mean;                                 /* sums of logits or of scores, by expert */
    uint64_t *load, *top1;
    int32_t *index, *plain;
} moe__measure_work;
typedef void moe__measure_layout(moe__measure_work *work, size_t n_experts, size_t top_k, moe__arena *arena);

static moe_status moe__measure_bytes(moe__measure_layout *layout, size_t n_experts, size_t top_k, size_t *bytes) {
    moe__measure_work work;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__measure_sizes_ok(n_experts, top_k);
    if (status) return status;
    layout(&work, n_experts, top_k, &arena);
    return moe__arena_bytes(&arena, bytes);
}

static moe_status moe__measure_over(moe__measure_layout *layout, size_t n_experts, size_t top_k, void *memory,
                                    size_t bytes, moe__measure_work *work) {
    size_t needed;
    moe__arena arena;
    if (!memory) return MOE_E_NULL_WORK;
    moe_status status = moe__measure_bytes(layout, n_experts, top_k, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) layout(work, n_experts, top_k, &arena);
    return status;
}

/* -- counting: blocks of 32 tokens are transposed, so that the kernels rank 16 tokens at once -- */
static void moe__measure_count_layout(moe__measure_work *work, size_t n_experts, size_t top_k,
                                            moe__arena *arena) {
    work->pad = moe__take_floats(arena, 32, 32);                                 /* the block at the edge */
    work->panel = moe__take_floats(arena, moe__ceil_div(n_experts, 32) * 32, 32); /* (expert, 32 tokens) */
    work->list = moe__take_floats(arena, top_k + 1, 16);
    work->selected = moe__take_floats(arena, n_experts, 16);
    work->first = moe__take_floats(arena, n_experts, 16);
    work->mean = (double *)moe__take(arena, n_experts, sizeof(double));
    work->index = (int32_t *)moe__take(arena, top_k, sizeof(int32_t));
}

MOE_API moe_status moe_topk_count_scratch(size_t n_experts, size_t top_k, size_t *bytes) {
    return moe__measure_bytes(moe__measure_count_layout, n_experts, top_k, bytes);
}

/* The counts of the lanes, whole numbers below 2^24. */
static void moe__measure_count_flush(size_t n_experts, const float *lanes, uint64_t *count) {
    if (!count) return;
    for (size_t e = 0; e < n_experts; e++) {
        double sum = 0.0;
        for (size_t i = 0; i < 16; i++) sum += (double)lanes[e * 16 + i];
        count[e] += (uint64_t)sum;
    }
}

/* Counts the tokens of a block that the kernels can rank together; a bit is set for each that is left: where a tie
 * decides, and all of a block of less than 32. */
static uint32_t moe__measure_count_block(const moe__measure_work *work, size_t rows, size_t n_experts, size_t top_k,
                                         const float *logits) {
    const moe__kernels *kernels = moe__dispatched();
    size_t whole = n_experts / 32 * 32;
    if (rows < 32) return 0xffffffffu;
    for (size_t e = 0; e < whole; e += 32) kernels->transpose(logits + e, n_experts, work->panel + e * 32);
    if (whole < n_experts) {
        for (size_t r = 0; r < 32; r++)
            memcpy(work->pad + r * 32, logits + r * n_experts + whole, (n_experts - whole) * sizeof(float));
        kernels->transpose(work->pad, 32, work->panel + whole * 32);
    }
    if (top_k <= 8) return kernels->count8(n_experts, top_k, work->panel, work->selected, work->first);
    uint32_t low = kernels->count(n_experts, top_k, work->panel, work->list, work->selected, work->first);
    return low | kernels->count(n_experts, top_k, work->panel + 16, work->list, work->selected, work->first) << 16;
}

/* At most 2^20 tokens, so that a lane stays below 2^24, where float stops counting. */
static moe_status moe__measure_count_piece(const moe__measure_work *work, size_t n_tokens, size_t n_experts,
                                           size_t top_k, const float *logits, uint64_t *load, uint64_t *top1,
                                           double *sum) {
    const moe__kernels *kernels = moe__dispatched();
    double finite = 0.0;
    memset(work->selected, 0, n_experts * 16 * sizeof(float));
    memset(work->first, 0, n_experts * 16 * sizeof(float));
    memset(work->pad, 0, 32 * 32 * sizeof(float));
    moe__health_zero(n_experts, work->mean);
    for (size_t t = 0; t < n_tokens; t += 32, logits += 32 * n_experts) {
        size_t rows = moe__min(n_tokens - t, 32);
        kernels->sum_rows(rows, n_experts, logits, work->mean);
        if (!load) continue;
        uint32_t left = moe__measure_count_block(work, rows, n_experts, top_k, logits);
        for (size_t r = 0; left && r < rows; r++, left >>= 1) { /* one row after the other */
            if (!(left & 1) || !kernels->topk(1, n_experts, top_k, logits + r * n_experts, work->index, NULL)) continue;
            for (size_t k = 0; k < top_k; k++) work->selected[(size_t)work->index[k] * 16] += 1.0f;
            work->first[(size_t)work->index[0] * 16] += 1.0f;
        }
    }
    for (size_t e = 0; e < n_experts; e++) finite += work->mean[e] * 0.0; /* a sum of finite floats is finite */
    if (!(finite == 0.0)) return MOE_E_NAN_LOGITS;
    if (sum)
        for (size_t e = 0; e < n_experts; e++) sum[e] += work->mean[e];
    if (!load) return MOE_OK;
    moe__measure_count_flush(n_experts, work->selected, load);
    moe__measure_count_flush(n_experts, work->first, top1);
    return MOE_OK;
}

MOE_API moe_status moe_topk_count(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits, uint64_t *load,
                                  uint64_t *top1, double *sum, void *work, size_t work_bytes) {
    size_t count, most = (size_t)1 << 20;
    moe__measure_work scratch;
    moe_status status = moe__measure_sizes_ok(n_experts, top_k);
    if (!status) status = moe__measure_logits_ok(n_tokens, n_experts, logits, &count);
    if (!status) status = moe__measure_over(moe__measure_count_layout, n_experts, top_k, work, work_bytes, &scratch);
    if (status) return status;
    if (n_tokens > most && !moe__dispatched()->all_finite(count, logits)) return MOE_E_NAN_LOGITS; /* before a piece */
    for (size_t t = 0; t < n_tokens && !status; t += most)
        status = moe__measure_count_piece(&scratch, moe__min(n_tokens - t, most), n_experts, top_k,
                                          logits + t * n_experts, load, top1, sum);
    return status;
}

/* -- the temperature scan -- */
static void moe__measure_scan_layout(moe__measure_work *work, size_t n_experts, size_t top_k, moe__arena *arena) {
    work->score = moe__take_floats(arena, 1, n_experts);
    work->mean = (double *)moe__take(arena, n_experts, sizeof(double));
    work->load = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    work->top1 = (uint64_t *)moe__take(arena, n_experts, sizeof(uint64_t));
    work->plain = (int32_t *)moe__take(arena, top_k, sizeof(int32_t));
    work->index = (int32_t *)moe__take(arena, top_k, sizeof(int32_t));
}

MOE_API moe_status moe_temperature_scan_scratch(size_t n_experts, size_t top_k, size_t *bytes) {
    return moe__measure_bytes(moe__measure_scan_layout, n_experts, top_k, bytes);
}

static void moe__measure_scan_row(const moe__measure_work *work, size_t n_tokens, size_t n_experts, size_t top_k,
                                  const float *logits, float temperature, moe_temperature_row *row) {
    const moe__kernels *kernels = moe__dispatched();
    double tokens = (double)moe__max(n_tokens, 1), changed = 0.0, most = 0.0, square = 0.0;
    memset(row, 0, sizeof *row);
    memset(work->load, 0, n_experts * sizeof *work->load);
    memset(work->top1, 0, n_experts * sizeof *work->top1);
    moe__health_zero(n_experts, work->mean);
    row->temperature = (double)temperature;
    for (size_t t = 0; t < n_tokens; t++, logits += n_experts) {
        kernels->softmax(n_experts, 1.0f / temperature, logits, work->score);
        kernels->topk(1, n_experts, top_k, logits, work->plain, NULL);
        kernels->topk(1, n_experts, top_k, work->score, work->index, NULL);
        for (size_t e = 0; e < n_experts; e++) {
            work->mean[e] += (double)work->score[e];
            row->token_entropy += moe__health_entropy((double)work->score[e]) / tokens;
        }
        for (size_t k = 0; k < top_k; k++) {
            work->load[work->index[k]]++;
            row->top_mass += (double)work->score[work->index[k]] / tokens;
        }
        work->top1[work->index[0]]++;
        row->first_mass += (double)work->score[work->index[0]] / tokens;
        (void)moe_churn(1, top_k, work->plain, work->index, &changed);
        row->changed += changed / tokens;
    }
    if (!n_tokens) return;
    double mean = tokens * (double)top_k / (double)n_experts;
    for (size_t e = 0; e < n_experts; e++) {
        double load = (double)work->load[e];
        row->entropy += moe__health_entropy(work->mean[e] / tokens);
        most = moe__larger(most, load);
        square += (load - mean) * (load - mean);
        row->n_dead += (size_t)moe__health_dead(n_experts, 0.0, tokens * (double)top_k, work->load[e]);
        row->n_dead_first += (size_t)moe__health_dead_first(n_experts, tokens, work->top1[e]);
    }
    row->maxvio = most / mean - 1.0;
    row->load_cv = sqrt(square / (double)n_experts) / mean;
}

MOE_API moe_status moe_temperature_scan(size_t n_tokens, size_t n_experts, size_t top_k, const float *logits,
                                        size_t n_rows, const float *temperature, moe_temperature_row *row, void *work,
                                        size_t work_bytes) {
    size_t count;
    moe__measure_work scratch;
    moe_status status = moe__measure_sizes_ok(n_experts, top_k);
    if (!status) status = moe__measure_logits_ok(n_tokens, n_experts, logits, &count);
    if (!status && n_rows && (!temperature || !row)) status = MOE_E_NULL_OUT;
    if (!status) status = moe__measure_over(moe__measure_scan_layout, n_experts, top_k, work, work_bytes, &scratch);
    if (status) return status;
    for (size_t i = 0; i < n_rows; i++)
        if (!moe__temperature_ok(temperature[i])) return MOE_E_TEMPERATURE;
    if (!moe__all_finite(count, logits)) return MOE_E_NAN_LOGITS;
    for (size_t i = 0; i < n_rows; i++)
        moe__measure_scan_row(&scratch, n_tokens, n_experts, top_k, logits, temperature[i], row + i);
    return MOE_OK;
}

/* ==== >>game ==================================================================================
 * The congestion game of the routers: load m = softmax(q - gamma m) of quality q, and what it says of a dump of logits.
 * After arXiv 2604.04230, of which only the abstract was available: every formula is [D], derived for this library
 * (docs/gamma.md). All in double. Uses health for sums and sorting, measures for its checks of arrays.
 */
#define MOE__GAME_ROUNDS 60
#define MOE__GAME_PICARD 0.1 /* up to here plain iteration is fast: it contracts by |gamma| / 2 */
#define MOE__GAME_TYPES 64

static moe_status moe__game_sizes_ok(size_t n_experts, const double *quality) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!quality) return MOE_E_NULL_QUALITY;
    for (size_t i = 0; i < n_experts; i++)
        if (!moe__finite_double(quality[i])) return MOE_E_QUALITY;
    return MOE_OK;
}

static int moe__game_gamma_ok(double gamma) { return gamma > -1.0 && moe__finite_double(gamma); }
static int moe__game_temperature_ok(double temperature) {
    return temperature > 0.0 && moe__finite_double(1.0 / temperature);
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

static double moe__game_max_of(size_t n, const double *values) {
    double top = values[0];
    for (size_t i = 1; i < n; i++) top = moe__larger(values[i], top);
    return top;
}

/* The L1 distance of two loads; b NULL: of an even one. */
static double moe__game_l1(size_t n, const double *a, const double *b) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += fabs(a[i] - (b ? b[i] : 1.0 / (double)n));
    return sum;
}
/* out = softmax((x - price) * inverse), price NULL = 0; returns the logsumexp. out may be x or price. */
static double moe__game_softmax_priced(size_t n, const double *x, const double *price, double inverse, double *out) {
    double top = -HUGE_VAL, sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        out[i] = (price ? x[i] - price[i] : x[i]) * inverse;
        top = moe__larger(out[i], top);
    }
    for (size_t i = 0; i < n; i++) sum += out[i] = exp(out[i] - top);
    for (size_t i = 0; i < n; i++) out[i] /= sum;
    return top + log(sum);
}

/* -- the equilibrium --
 * Taken logarithms of, m = softmax(q - gamma m) is one equation for each expert and one for the constant c they share:
 *
 *     log m_i + gamma m_i = q_i - c      which m_i(c) solves; it falls with c        (moe__game_response)
 *     sum_i m_i(c) = 1                   which c solves                              (moe__game_newton)
 *
 *     sum m(c)
 *       | *                      The sum is convex and falls. So a tangent left of the root meets 1 between its point
 *       |  \*                    and the root: from the left, Newton's steps never overshoot. The root lies between
 *     1 +---\-`*-----            lo = log sum exp(q) - gamma and hi = log sum exp(q), as every m_i is in [0, 1];
 *       |    \   `--*            a step that leaves them is replaced by their middle.
 *       +-+---+--+----+-> c
 *        lo  step root hi
 *
 * For gamma <= 0.1, negative ones too, iterating m = softmax(q - gamma m) itself is as fast (moe__game_picard). */

/* The m > 0 with log m + gamma m = a, gamma > 0: omega(a + log gamma) / gamma, omega the Wright omega. Never overflows:
 * only logarithms of what grows. Fritsch, Shafer and Crowley's iteration, of fourth order. guess > 0: a start near m.
 * */
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

/* `top` is the largest quality; *c and m are starts if `warm`. Returns the rounds, or 0 without success. */
static int moe__game_newton(size_t n, const double *quality, double top, double gamma, int warm, double *c, double *m) {
    double sum = 0.0, log_gamma = log(gamma), before = HUGE_VAL;
    for (size_t i = 0; i < n; i++) sum += exp(quality[i] - top);
    double lo = log(sum) - gamma, hi = log(sum);
    if (!warm || !(*c >= lo && *c <= hi)) {
        *c = lo;
        moe__health_zero(n, m);
    }
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double excess = -1.0, lost = 0.0, slope = 0.0;
        for (size_t i = 0; i < n; i++) {
            m[i] = moe__game_response((quality[i] - top) - *c, gamma, log_gamma, m[i]);
            double part = m[i] - lost, next = excess + part; /* Kahan's sum */
            lost = (next - excess) - part;
            excess = next;
            slope += m[i] / (1.0 + gamma * m[i]);
        }
        if (fabs(excess) < 1e-15 || (fabs(excess) < 1e-10 && fabs(excess) >= before)) { /* as near as rounding allows */
            for (size_t i = 0; i < n; i++) m[i] /= 1.0 + excess;
            return round;
        }
        before = fabs(excess);
        if (excess > 0.0) lo = *c;
        else hi = *c;
        double next = *c + excess / slope;
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

static int moe__game_picard(size_t n, const double *quality, double top, double gamma, double *c, double *m) {
    moe__health_zero(n, m);
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double change = 0.0, sum = 0.0;
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
    double top = moe__game_max_of(n, quality);
    if (gamma <= MOE__GAME_PICARD) return moe__game_picard(n, quality, top, gamma, c, m);
    return moe__game_newton(n, quality, top, gamma, warm, c, m);
}

MOE_API moe_status moe_game_solve(size_t n_experts, const double *quality, double gamma, double *load,
                                  moe_game_info *info) {
    moe_status status = moe__game_sizes_ok(n_experts, quality);
    if (status) return status;
    if (!moe__game_gamma_ok(gamma)) return MOE_E_GAMMA;
    if (!load) return MOE_E_NULL_LOAD;
    double c = 0.0, top = moe__game_max_of(n_experts, quality), residual = 0.0;
    int rounds = moe__game_rounds(n_experts, quality, gamma, 0, &c, load);
    if (!rounds) return MOE_E_GAME;
    for (size_t i = 0; i < n_experts; i++) {
        if (load[i] < DBL_MIN) continue; /* so small that its logarithm is not exact */
        double a = quality[i] - top, log_load = log(load[i]), error = fabs(log_load + gamma * load[i] - a + c);
        error /= 1.0 + fabs(log_load) + fabs(gamma) * load[i] + fabs(a) + fabs(c);
        residual = moe__larger(error, residual);
    }
    if (info) info->iterations = rounds, info->residual = residual;
    return MOE_OK;
}

MOE_API moe_status moe_game_sensitivity(size_t n_experts, double gamma, const double *load, double *d_load) {
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!moe__game_gamma_ok(gamma)) return MOE_E_GAMMA;
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
    moe_status status = moe__game_sizes_ok(n_experts, quality);
    if (status) return status;
    if (!moe__game_temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    if (!load) return MOE_E_NULL_LOAD;
    double top = moe__game_max_of(n_experts, quality), sum = 0.0;
    for (size_t i = 0; i < n_experts; i++) sum += load[i] = exp((quality[i] - top) / temperature);
    for (size_t i = 0; i < n_experts; i++) load[i] /= sum;
    return MOE_OK;
}

/* -- fits: the parameter with the least L1 distance between prediction and load -- */
typedef struct moe__game_types { /* of tokens: one, where a fit has no types */
    size_t n_experts, n_types;
    const double *share, *quality; /* (n_types), (n_types, n_experts) */
} moe__game_types;

typedef struct moe__game_curve moe__game_curve;
struct moe__game_curve {
    void (*predict)(moe__game_curve *curve, double u); /* of the scaled parameter, into prediction */
    moe__game_types types;
    const double *load;
    double *prediction, *work, c;
    int warm; /* prediction and c are of a parameter before */
};

static double moe__game_curve_at(moe__game_curve *curve, double u) {
    curve->predict(curve, u);
    return moe__game_l1(curve->types.n_experts, curve->prediction, curve->load);
}

/* Golden section on [lo, hi]. */
static double moe__game_curve_golden(moe__game_curve *curve, double lo, double hi, double tolerance, double *u) {
    const double ratio = 0.6180339887498949;
    double a = hi - ratio * (hi - lo), b = lo + ratio * (hi - lo);
    double at_a = moe__game_curve_at(curve, a), at_b = moe__game_curve_at(curve, b);
    while (hi - lo > tolerance) {
        if (at_a <= at_b) {
            hi = b, b = a, at_b = at_a;
            a = hi - ratio * (hi - lo);
            at_a = moe__game_curve_at(curve, a);
        } else {
            lo = a, a = b, at_a = at_b;
            b = lo + ratio * (hi - lo);
            at_b = moe__game_curve_at(curve, b);
        }
    }
    *u = at_a <= at_b ? a : b;
    return moe__smaller(at_a, at_b);
}

/* A grid over [lo, hi], then golden section around its best point. The ends themselves can be the answer. */
static double moe__game_curve_fit(moe__game_curve *curve, double lo, double hi, double *u) {
    const int grid = 40;
    double best = HUGE_VAL, width = (hi - lo) / grid, value, inside;
    int at = 0;
    curve->warm = 0;
    for (int i = 0; i <= grid; i++) {
        value = moe__game_curve_at(curve, lo + i * width);
        if (value < best) best = value, at = i;
    }
    *u = lo + at * width;
    if (at > 0) lo = *u - width;
    if (at < grid) hi = *u + width;
    value = moe__game_curve_golden(curve, lo, hi, 1e-11, &inside);
    if (value < best) best = value, *u = inside;
    return best;
}

/* The curve at u, which was moved from `from`: where it could not move there is no way down. */
static double moe__game_curve_moved(moe__game_curve *curve, double from, double u) {
    return u < from || u > from ? moe__game_curve_at(curve, u) : HUGE_VAL;
}

/* The same downhill from a start, in growing steps, and to three digits: for a bootstrap. */
static double moe__game_curve_descend(moe__game_curve *curve, double start, double lo, double hi) {
    double width = 0.05, u = start, left = moe__larger(u - width, lo), right = moe__smaller(u + width, hi), inside;
    curve->warm = 0;
    double at_u = moe__game_curve_at(curve, u), at_left = moe__game_curve_moved(curve, u, left);
    double at_right = moe__game_curve_moved(curve, u, right);
    while (at_left < at_u || at_right < at_u) {
        width *= 2.0;
        if (at_left < at_right) {
            right = u, u = left, at_right = at_u, at_u = at_left;
            left = moe__larger(u - width, lo);
            at_left = moe__game_curve_moved(curve, u, left);
        } else {
            left = u, u = right, at_left = at_u, at_u = at_right;
            right = moe__smaller(u + width, hi);
            at_right = moe__game_curve_moved(curve, u, right);
        }
    }
    return moe__game_curve_golden(curve, left, right, 2e-4, &inside) < at_u ? inside : u;
}

#define MOE__GAMMA_END log1p(MOE_GAME_GAMMA_MAX) /* u = log(1 + gamma) */
static const double moe__game_log_temperature[2] = {-3.912023005428146, 6.214608098422191}; /* log 0.02, log 500 */

static void moe__game_predict_game(moe__game_curve *curve, double u) {
    double gamma = moe__larger(expm1(u), 0.0);
    int rounds = moe__game_rounds(curve->types.n_experts, curve->types.quality, gamma, curve->warm, &curve->c,
                                  curve->prediction);
    curve->warm = gamma > MOE__GAME_PICARD && rounds > 0;
}
static void moe__game_predict_softmax(moe__game_curve *curve, double u) {
    (void)moe_game_softmax(curve->types.n_experts, curve->types.quality, exp(u), curve->prediction);
}

/* Slope of q - log m on m; NaN if the load does not vary. A load of 0 counts as half a selection. */
static double moe__game_slope(size_t n, const double *quality, const double *m, double selections) {
    double least = HUGE_VAL, mean = 0.0, mean_y = 0.0, xx = 0.0, xy = 0.0;
    for (size_t i = 0; i < n; i++)
        if (m[i] > 0.0) least = moe__smaller(m[i], least);
    least /= 2.0;
    if (selections > 0.0) least = 0.5 / selections;
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
    moe_status status = moe__game_sizes_ok(n, quality);
    if (status) return status;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__game_total(n, load), top = moe__game_max_of(n, quality), low = top;
    double *m = work, *prediction = work + n, u, noise = 0.0;
    if (!(total > 0.0) || !(selections >= 0.0) || !moe__finite_double(selections)) return MOE_E_LOAD;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < n; i++) m[i] = load[i] / total;
    for (size_t i = 0; i < n; i++) low = moe__smaller(quality[i], low);
    out->l1_uniform = moe__game_l1(n, m, NULL);
    out->peak_load = (double)n * moe__game_max_of(n, m);
    (void)moe_game_softmax(n, quality, 1.0, prediction);
    out->peak_softmax = (double)n * moe__game_max_of(n, prediction);
    out->gamma_ols = moe__game_slope(n, quality, m, selections);

    moe__game_curve curve = {moe__game_predict_softmax, {n, 1, NULL, quality}, m, prediction, NULL, 0.0, 0};
    out->l1_softmax = moe__game_curve_fit(&curve, moe__game_log_temperature[0], moe__game_log_temperature[1], &u);
    out->temperature = top - low > 1e-12 * (1.0 + fabs(top)) ? exp(u) : (double)NAN;
    curve.predict = moe__game_predict_game;
    out->l1_game = moe__game_curve_fit(&curve, 0.0, MOE__GAMMA_END, &u);
    out->gamma = expm1(u);

    /* how far the prediction can move, against the mean L1 distance of a load of so many draws from its own truth */
    if (selections > 0.0) noise = sqrt(2.0 * (double)n / (3.141592653589793 * selections));
    curve.warm = 0;
    moe__game_predict_game(&curve, MOE__GAMMA_END);
    (void)moe_game_softmax(n, quality, 1.0, m);
    out->identified = moe__game_l1(n, prediction, m) > noise + 1e-9 && u < MOE__GAMMA_END - 1e-6;
    if (!out->identified) out->gamma = (double)NAN;
    return MOE_OK;
}

MOE_API double moe_game_explicit(double alpha, size_t n_experts, double unit_scale) {
    return alpha * (double)n_experts * unit_scale;
}

/* -- several types of tokens -- */
/* Number i of a stream as a double in [0, 1). */
static double moe__game_uniform(uint64_t seed, uint64_t stream, uint64_t i) {
    double high = (double)moe_rand_u32(seed, stream, 2 * i);
    double low = (double)(moe_rand_u32(seed, stream, 2 * i + 1) >> 11);
    return (high * 2097152.0 + low) / 9007199254740992.0; /* 53 bits */
}

/* A token's logits less their mean. */
static void moe__game_centre(size_t n, const float *logits, double *row) {
    double mean = 0.0;
    for (size_t i = 0; i < n; i++) mean += (double)logits[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++) row[i] = (double)logits[i] - mean;
}

static double moe__game_distance(size_t n, const double *a, const double *b) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

/* A clustering under way. nearest (T): squared distances to the nearest centre; row (E): one token's logits. */
typedef struct moe__game_clusters {
    size_t n_tokens, n_experts, n_types;
    const float *logits;
    uint32_t *type;
    double *share, *centre, *nearest, *row;
} moe__game_clusters;

static void moe__game_cluster_row(const moe__game_clusters *clusters, size_t token) {
    moe__game_centre(clusters->n_experts, clusters->logits + token * clusters->n_experts, clusters->row);
}
static double moe__game_cluster_distance(const moe__game_clusters *clusters, size_t type) { /* of the row */
    return moe__game_distance(clusters->n_experts, clusters->row, clusters->centre + type * clusters->n_experts);
}

/* k-means++: a token with probability as its squared distance; n_tokens if each is a centre already. */
static size_t moe__game_cluster_pick(const moe__game_clusters *clusters, double uniform) {
    size_t pick = 0;
    double total = 0.0;
    for (size_t t = 0; t < clusters->n_tokens; t++) total += clusters->nearest[t];
    if (!(total > 0.0)) return clusters->n_tokens;
    double left = uniform * total;
    for (size_t t = 0; t < clusters->n_tokens && left >= 0.0; t++) {
        if (clusters->nearest[t] > 0.0) pick = t; /* the last such one if rounding leaves a rest */
        left -= clusters->nearest[t];
    }
    return pick;
}

/* Moves tokens to those of the centres first .. end - 1 that are nearer than theirs; how many moved. */
static size_t moe__game_cluster_move(const moe__game_clusters *clusters, size_t first, size_t end) {
    size_t moved = 0;
    for (size_t t = 0; t < clusters->n_tokens; t++) {
        uint32_t best = clusters->type[t];
        moe__game_cluster_row(clusters, t);
        if (!first) clusters->nearest[t] = moe__game_cluster_distance(clusters, best);
        for (size_t c = first; c < end; c++) {
            double distance = moe__game_cluster_distance(clusters, c);
            if (distance < clusters->nearest[t]) clusters->nearest[t] = distance, best = (uint32_t)c;
        }
        moved += best != clusters->type[t];
        clusters->type[t] = best;
    }
    return moved;
}

/* Each type's mean; an empty type keeps its centre. Shares are counts here. */
static void moe__game_cluster_means(const moe__game_clusters *clusters) {
    size_t n = clusters->n_experts;
    moe__health_zero(clusters->n_types, clusters->share);
    for (size_t t = 0; t < clusters->n_tokens; t++) clusters->share[clusters->type[t]] += 1.0;
    for (size_t c = 0; c < clusters->n_types; c++)
        if (clusters->share[c] > 0.0) moe__health_zero(n, clusters->centre + c * n);
    for (size_t t = 0; t < clusters->n_tokens; t++) {
        double *centre = clusters->centre + clusters->type[t] * n, count = clusters->share[clusters->type[t]];
        moe__game_cluster_row(clusters, t);
        for (size_t i = 0; i < n; i++) centre[i] += clusters->row[i] / count;
    }
}

MOE_API moe_status moe_game_cluster(size_t n_tokens, size_t n_experts, size_t n_types, uint64_t seed,
                                    const float *logits, uint32_t *type, double *share, double *quality, double *work) {
    size_t count, bytes, n_centres = 0;
    moe_status status = moe_game_types_scratch(n_experts, n_types, &bytes);
    if (!status && !n_tokens) status = MOE_E_NO_TOKENS;
    if (!status) status = moe__measure_logits_ok(n_tokens, n_experts, logits, &count);
    if (status) return status;
    if (!type || !share || !quality) return MOE_E_NULL_OUT;
    if (!work) return MOE_E_NULL_WORK;
    if (!moe__all_finite(count, logits)) return MOE_E_NAN_LOGITS;
    moe__game_clusters clusters = {n_tokens, n_experts, n_types, logits, type, share, quality, work, work + n_tokens};
    moe__health_zero(n_types * n_experts, quality);
    memset(type, 0, n_tokens * sizeof *type);
    for (; n_centres < n_types; n_centres++) {
        double uniform = moe__game_uniform(seed, 0, n_centres);
        size_t pick = (size_t)(uniform * (double)n_tokens);
        if (n_centres) pick = moe__game_cluster_pick(&clusters, uniform);
        if (pick == n_tokens) break;
        moe__game_centre(n_experts, logits + pick * n_experts, quality + n_centres * n_experts);
        (void)moe__game_cluster_move(&clusters, n_centres, n_centres + 1);
    }
    for (int round = 0; round < 50; round++) {
        moe__game_cluster_means(&clusters);
        if (round == 49 || !moe__game_cluster_move(&clusters, 0, n_centres)) break; /* means of the last assignment */
    }
    for (size_t c = 0; c < n_types; c++) share[c] /= (double)n_tokens;
    return MOE_OK;
}

MOE_API moe_status moe_game_types_scratch(size_t n_experts, size_t n_types, size_t *bytes) {
    if (!bytes) return MOE_E_NULL_OUT;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!n_types || n_types > MOE__GAME_TYPES) return MOE_E_N_TYPES;
    *bytes = (n_types * n_experts + 7 * n_experts + n_types * n_types + n_types) * sizeof(double); /* below 2^30 */
    return MOE_OK;
}

static moe_status moe__game_types_ok(const moe__game_types *types) {
    size_t bytes;
    double sum = 0.0;
    moe_status status = moe_game_types_scratch(types->n_experts, types->n_types, &bytes);
    if (status) return status;
    if (!types->share || !types->quality) return MOE_E_NULL_QUALITY;
    for (size_t c = 0; c < types->n_types; c++) {
        if (!(types->share[c] >= 0.0)) return MOE_E_TYPE_SHARE;
        sum += types->share[c];
    }
    if (!(fabs(sum - 1.0) < 1e-6)) return MOE_E_TYPE_SHARE;
    for (size_t i = 0; i < types->n_types * types->n_experts; i++)
        if (!moe__finite_double(types->quality[i])) return MOE_E_QUALITY;
    return MOE_OK;
}

/* load = sum_c pi_c softmax((q^c - price) / T), p (C, E) = the types' softmaxes; returns sum_c pi_c logsumexp. */
static double moe__game_types_load(const moe__game_types *types, const double *price, double inverse, double *p,
                                   double *load) {
    size_t n = types->n_experts;
    double lse = 0.0;
    moe__health_zero(n, load);
    for (size_t c = 0; c < types->n_types; c++) {
        lse += types->share[c] * moe__game_softmax_priced(n, types->quality + c * n, price, inverse, p + c * n);
        for (size_t i = 0; i < n; i++) load[i] += types->share[c] * p[c * n + i];
    }
    return lse;
}

/* x = A^-1 x for a symmetric positive definite A (n, n), which becomes its Cholesky factor. 0: it is not definite. */
static int moe__game_cholesky_solve(size_t n, double *a, double *x) {
    for (size_t j = 0; j < n; j++) {
        for (size_t i = j; i < n; i++) {
            double rest = a[i * n + j];
            for (size_t k = 0; k < j; k++) rest -= a[i * n + k] * a[j * n + k];
            if (i > j) a[i * n + j] = rest / a[j * n + j];
            else if (rest > 0.0) a[i * n + j] = sqrt(rest);
            else return 0;
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

/* With y = gamma m, the load of several types is the minimum of F(y) = sum_c pi_c logsumexp(q^c - y) + |y|^2 / (2
 * gamma), which is strictly convex. Its gradient is y / gamma - load, its Hessian D - U U^T, D = diag(load + 1 /
 * gamma), U (E, C) = sqrt(pi_c) p^c. */
typedef struct moe__game_descent {
    double *p, *y, *trial, *gradient, *step, *best; /* p (C, E), the others (E) */
    double *matrix, *small;                         /* (C, C), (C) */
} moe__game_descent;

/* Newton's step -H^-1 g: by Woodbury's identity only I - U^T D^-1 U (C, C) is factored. */
static int moe__game_types_step(const moe__game_types *types, const double *load, double gamma,
                                const moe__game_descent *work) {
    size_t n = types->n_experts, n_types = types->n_types;
    const double *share = types->share, *p = work->p;
    for (size_t c = 0; c < n_types; c++) {
        double sum = 0.0;
        for (size_t i = 0; i < n; i++)
            sum += sqrt(share[c]) * p[c * n + i] * work->gradient[i] / (load[i] + 1.0 / gamma);
        work->small[c] = sum;
        for (size_t b = 0; b <= c; b++) {
            sum = 0.0;
            for (size_t i = 0; i < n; i++) sum += p[c * n + i] * p[b * n + i] / (load[i] + 1.0 / gamma);
            work->matrix[c * n_types + b] = (double)(b == c) - sqrt(share[c] * share[b]) * sum;
        }
    }
    if (!moe__game_cholesky_solve(n_types, work->matrix, work->small)) return 0;
    for (size_t i = 0; i < n; i++) {
        double sum = work->gradient[i];
        for (size_t c = 0; c < n_types; c++) sum += sqrt(share[c]) * p[c * n + i] * work->small[c];
        work->step[i] = -sum / (load[i] + 1.0 / gamma);
    }
    return 1;
}

/* trial = y + t step, damped: until F falls by enough from `value`. Near the minimum its fall is below rounding. */
static void moe__game_types_damp(const moe__game_types *types, double gamma, double value,
                                 const moe__game_descent *work) {
    size_t n = types->n_experts;
    double slope = 0.0;
    for (size_t i = 0; i < n; i++) slope += work->gradient[i] * work->step[i];
    for (double t = 1.0; t > 1e-9; t /= 2.0) {
        double square = 0.0;
        for (size_t i = 0; i < n; i++) {
            work->trial[i] = work->y[i] + t * work->step[i];
            square += work->trial[i] * work->trial[i];
        }
        if (-slope < 1e-9 * (1.0 + fabs(value))) return;
        double next = square / (2.0 * gamma);
        for (size_t c = 0; c < types->n_types; c++) {
            const double *quality = types->quality + c * n;
            next += types->share[c] * moe__game_softmax_priced(n, quality, work->trial, 1.0, work->p + c * n);
        }
        if (next <= value + 1e-4 * t * slope) return;
    }
}

static int moe__game_types_newton(const moe__game_types *types, double gamma, double *load, double *memory,
                                  double *residual) {
    size_t n = types->n_experts, n_types = types->n_types;
    double least = HUGE_VAL, *y = memory + n_types * n, *matrix = y + 5 * n;
    moe__game_descent work = {memory, y, y + n, y + 2 * n, y + 3 * n, y + 4 * n, matrix, matrix + n_types * n_types};
    *residual = 0.0;
    if (gamma <= 0.0) {
        (void)moe__game_types_load(types, NULL, 1.0, work.p, load);
        return 1;
    }
    (void)moe__game_types_load(types, NULL, 1.0 / (1.0 + gamma / (double)n), work.p, work.y);
    for (size_t i = 0; i < n; i++) work.y[i] *= gamma;
    for (int round = 1; round <= MOE__GAME_ROUNDS; round++) {
        double worst = 0.0, square = 0.0, value = moe__game_types_load(types, work.y, 1.0, work.p, load);
        for (size_t i = 0; i < n; i++) {
            work.gradient[i] = work.y[i] / gamma - load[i];
            square += work.y[i] * work.y[i];
            worst = moe__larger(fabs(work.gradient[i]), worst);
        }
        value += square / (2.0 * gamma);
        if (worst < least) memcpy(work.best, load, n * sizeof *load);
        if (worst < 1e-16 || (worst < 1e-11 && worst >= least)) { /* as near as rounding allows */
            memcpy(load, work.best, n * sizeof *load);
            *residual = moe__smaller(worst, least);
            return round;
        }
        least = moe__smaller(worst, least);
        if (!moe__game_types_step(types, load, gamma, &work)) return 0;
        moe__game_types_damp(types, gamma, value, &work);
        memcpy(work.y, work.trial, n * sizeof *work.y);
    }
    return 0;
}

MOE_API moe_status moe_game_types_solve(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                        double gamma, double *load, double *work, moe_game_info *info) {
    double residual;
    moe__game_types types = {n_experts, n_types, share, quality};
    moe_status status = moe__game_types_ok(&types);
    if (status) return status;
    if (!(gamma >= 0.0) || !moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    int rounds = moe__game_types_newton(&types, gamma, load, work, &residual);
    if (!rounds) return MOE_E_GAME;
    if (info) info->iterations = rounds, info->residual = residual;
    return MOE_OK;
}

MOE_API moe_status moe_game_types_softmax(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                          double temperature, double *load, double *work) {
    moe__game_types types = {n_experts, n_types, share, quality};
    moe_status status = moe__game_types_ok(&types);
    if (status) return status;
    if (!moe__game_temperature_ok(temperature)) return MOE_E_TEMPERATURE;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    (void)moe__game_types_load(&types, NULL, 1.0 / temperature, work, load);
    return MOE_OK;
}

static void moe__game_predict_coupled(moe__game_curve *curve, double u) {
    double residual, gamma = moe__larger(expm1(u), 0.0);
    (void)moe__game_types_newton(&curve->types, gamma, curve->prediction, curve->work, &residual);
}
static void moe__game_predict_independent(moe__game_curve *curve, double u) {
    (void)moe__game_types_load(&curve->types, NULL, exp(-u), curve->work, curve->prediction);
}

MOE_API moe_status moe_game_types_estimate(size_t n_experts, size_t n_types, const double *share, const double *quality,
                                           const double *load, double *work, moe_game_types_fit *out) {
    size_t n = n_experts;
    moe__game_types types = {n_experts, n_types, share, quality};
    moe_status status = moe__game_types_ok(&types);
    if (status) return status;
    if (!load) return MOE_E_NULL_LOAD;
    if (!work) return MOE_E_NULL_WORK;
    if (!out) return MOE_E_NULL_OUT;
    double total = moe__game_total(n, load), u;
    if (!(total > 0.0)) return MOE_E_LOAD;
    for (size_t i = 0; i < n; i++) work[i] = load[i] / total;
    moe__game_curve curve = {moe__game_predict_coupled, types, work, work + n, work + 2 * n, 0.0, 0};
    memset(out, 0, sizeof *out);
    out->l1_coupled = moe__game_curve_fit(&curve, 0.0, MOE__GAMMA_END, &u);
    out->gamma = expm1(u);
    curve.predict = moe__game_predict_independent;
    out->l1_independent = moe__game_curve_fit(&curve, moe__game_log_temperature[0], moe__game_log_temperature[1], &u);
    out->temperature = exp(u);
    return MOE_OK;
}

/* -- scope -- */
MOE_API moe_status moe_game_feasible(size_t n_experts, size_t top_k, const double *load, int *feasible) {
    moe_status status = moe__measure_sizes_ok(n_experts, top_k);
    if (status) return status;
    if (!load) return MOE_E_NULL_LOAD;
    if (!feasible) return MOE_E_NULL_OUT;
    double total = moe__game_total(n_experts, load);
    if (!(total > 0.0)) return MOE_E_LOAD;
    *feasible = moe__game_max_of(n_experts, load) * (double)top_k <= total * (1.0 + 1e-12);
    return MOE_OK;
}

MOE_API moe_status moe_game_epsilon(size_t n_tokens, size_t n_experts, size_t top_k, const int32_t *index,
                                    size_t n_next, const float *logits, const double *load, double gamma, size_t least,
                                    double *work, double *epsilon) {
    size_t n_logits;
    double lowest = HUGE_VAL, highest = -HUGE_VAL;
    moe_status status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    if (!status && (!n_next || n_next > MOE__MAX_EXPERTS)) status = MOE_E_N_EXPERTS;
    if (!status) status = moe__measure_logits_ok(n_tokens, n_next, logits, &n_logits);
    if (status) return status;
    if (!load) return MOE_E_NULL_LOAD;
    if (!moe__finite_double(gamma)) return MOE_E_GAMMA;
    if (!work) return MOE_E_NULL_WORK;
    if (!epsilon) return MOE_E_NULL_OUT;
    moe__measure_rows rows = {n_tokens, n_next, top_k, logits, index};
    status = moe__measure_tokens_ok(&rows, &n_logits);
    if (status) return status;
    if (!(moe__game_total(n_next, load) > 0.0)) return MOE_E_LOAD;
    double *sum = work, *count = work + n_experts;
    moe__health_zero(2 * n_experts, work);
    for (size_t t = 0; t < n_tokens; t++, index += top_k, logits += n_next) {
        double top = -HUGE_VAL, total = 0.0;
        if (!moe__measure_is_token(top_k, index)) continue;
        for (size_t j = 0; j < n_next; j++) top = moe__larger(top, (double)logits[j] - gamma * load[j]);
        for (size_t j = 0; j < n_next; j++) total += exp((double)logits[j] - gamma * load[j] - top);
        for (size_t k = 0; k < top_k; k++) {
            if (index[k] < 0) continue;
            sum[index[k]] += top + log(total);
            count[index[k]] += 1.0;
        }
    }
    for (size_t e = 0; e < n_experts; e++) {
        if (!(count[e] > 0.0) || count[e] < (double)least) continue;
        lowest = moe__smaller(lowest, sum[e] / count[e]);
        highest = moe__larger(highest, sum[e] / count[e]);
    }
    *epsilon = highest > lowest ? highest - lowest : 0.0;
    return MOE_OK;
}

MOE_API double moe_game_epsilon_bound(double epsilon, double gamma, size_t n_experts) {
    if (!(epsilon >= 0.0) || !(gamma >= 0.0) || !n_experts) return (double)NAN;
    return gamma > 0.0 ? epsilon / (2.0 * (1.0 + gamma / (double)n_experts)) : 2.0 * tanh(epsilon / 4.0);
}

/* -- quality -- */
MOE_API const char *moe_quality_name(moe_quality_kind kind) {
    static const char *const names[] = {"mean", "log-prob", "selected", "median", "trimmed"};
    return moe__health_text(names, MOE_QUALITY_COUNT, (unsigned)kind);
}

/* Of each expert's logits in order, the mean without `cut` at each end. work (T). */
static void moe__game_quality_middle(const moe__measure_rows *rows, size_t n_tokens, size_t cut, double *work,
                                     double *quality) {
    const float *token;
    for (size_t e = 0; e < rows->n_experts; e++) {
        for (size_t t = 0, next = 0; (token = moe__measure_token(rows, &next)) != NULL; t++) work[t] = (double)token[e];
        moe__health_sort(n_tokens, work);
        for (size_t t = cut; t < n_tokens - cut; t++) quality[e] += work[t] / (double)(n_tokens - 2 * cut);
    }
}

static void moe__game_quality_selected(const moe__measure_rows *rows, double *work, double *quality) {
    size_t n = rows->n_experts, k = rows->top_k;
    const int32_t *index = rows->index;
    moe__health_zero(n, work);
    for (size_t i = 0; i < rows->n_rows * k; i++) {
        if (index[i] < 0) continue;
        quality[index[i]] += (double)rows->logits[i / k * n + (size_t)index[i]];
        work[index[i]] += 1.0;
    }
    for (size_t e = 0; e < n; e++) quality[e] = work[e] > 0.0 ? quality[e] / work[e] : -HUGE_VAL;
}

static void moe__game_quality_log_prob(const moe__measure_rows *rows, size_t n_tokens, double *quality) {
    size_t n = rows->n_experts;
    const float *token;
    for (size_t next = 0; (token = moe__measure_token(rows, &next)) != NULL;) {
        double top = (double)token[0], sum = 0.0;
        for (size_t e = 0; e < n; e++) top = moe__larger(top, (double)token[e]);
        for (size_t e = 0; e < n; e++) sum += exp((double)token[e] - top);
        for (size_t e = 0; e < n; e++) quality[e] += exp((double)token[e] - top) / sum / (double)n_tokens;
    }
    for (size_t e = 0; e < n; e++) quality[e] = log(quality[e]);
}

static void moe__game_quality_mean(const moe__measure_rows *rows, size_t n_tokens, double *quality) {
    const float *token;
    for (size_t next = 0; (token = moe__measure_token(rows, &next)) != NULL;)
        for (size_t e = 0; e < rows->n_experts; e++) quality[e] += (double)token[e] / (double)n_tokens;
}

MOE_API moe_status moe_game_quality(moe_quality_kind kind, size_t n_tokens, size_t n_experts, size_t top_k,
                                    const float *logits, const int32_t *index, double *work, double *quality) {
    size_t count;
    if ((unsigned)kind >= MOE_QUALITY_COUNT) return MOE_E_QUALITY_KIND;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!n_tokens) return MOE_E_NO_TOKENS;
    moe_status status = moe__measure_logits_ok(n_tokens, n_experts, logits, &count);
    if (!status && !quality) status = MOE_E_NULL_QUALITY;
    if (!status && kind >= MOE_QUALITY_SELECTED && !work) status = MOE_E_NULL_WORK;
    if (!status && (index || kind == MOE_QUALITY_SELECTED))
        status = moe__measure_index_ok(n_tokens, n_experts, top_k, index);
    moe__measure_rows rows = {n_tokens, n_experts, top_k, logits, index};
    if (!status) status = moe__measure_tokens_ok(&rows, &count);
    if (status) return status;
    moe__health_zero(n_experts, quality);
    switch (kind) {
    case MOE_QUALITY_LOG_PROB: moe__game_quality_log_prob(&rows, count, quality); break;
    case MOE_QUALITY_SELECTED: moe__game_quality_selected(&rows, work, quality); break;
    case MOE_QUALITY_MEDIAN: moe__game_quality_middle(&rows, count, (count - 1) / 2, work, quality); break;
    case MOE_QUALITY_TRIMMED: moe__game_quality_middle(&rows, count, count / 10, work, quality); break;
    default: moe__game_quality_mean(&rows, count, quality);
    }
    return MOE_OK;
}

MOE_API moe_status moe_pearson(size_t n, const double *a, const double *b, double *r) {
    double count = 0.0, mean_a = 0.0, mean_b = 0.0, aa = 0.0, bb = 0.0, ab = 0.0;
    if (n && (!a || !b)) return MOE_E_NULL_QUALITY;
    if (!r) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(a[i]) || !moe__finite_double(b[i])) continue;
        count += 1.0;
        mean_a += (a[i] - mean_a) / count;
        mean_b += (b[i] - mean_b) / count;
    }
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(a[i]) || !moe__finite_double(b[i])) continue;
        aa += (a[i] - mean_a) * (a[i] - mean_a);
        bb += (b[i] - mean_b) * (b[i] - mean_b);
        ab += (a[i] - mean_a) * (b[i] - mean_b);
    }
    *r = aa > 0.0 && bb > 0.0 ? ab / (sqrt(aa) * sqrt(bb)) : (double)NAN;
    return MOE_OK;
}

/* -- a dump by batches -- */
static moe_status moe__game_layout(moe_game *game, size_t n_experts, size_t n_batches, moe__arena *arena) {
    size_t count;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!n_batches) return MOE_E_N_BATCHES;
    if (!moe__mul(n_experts, n_batches, &count)) return MOE_E_OVERFLOW;
    memset(game, 0, sizeof *game);
    game->n_experts = n_experts;
    game->n_batches = n_batches;
    game->tokens = (uint64_t *)moe__take(arena, n_batches, sizeof(uint64_t));
    game->count = (uint64_t *)moe__take(arena, count, sizeof(uint64_t));
    game->logit = (double *)moe__take(arena, count, sizeof(double));
    game->null_count = (uint64_t *)moe__take(arena, count, sizeof(uint64_t));
    game->scratch = (uint32_t *)moe__take(arena, count, 4 * sizeof(uint32_t));
    return arena->overflow ? MOE_E_OVERFLOW : MOE_OK;
}

MOE_API moe_status moe_game_size(size_t n_experts, size_t n_batches, size_t *bytes) {
    moe_game game;
    moe__arena arena = {NULL, 0, 0};
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__game_layout(&game, n_experts, n_batches, &arena);
    return status ? status : moe__arena_bytes(&arena, bytes);
}

MOE_API moe_status moe_game_init(moe_game *game, size_t n_experts, size_t n_batches, void *memory, size_t bytes) {
    size_t needed;
    moe__arena arena;
    if (!game) return MOE_E_NULL_GAME;
    moe_status status = moe_game_size(n_experts, n_batches, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__game_layout(game, n_experts, n_batches, &arena);
    return status ? status : moe_game_reset(game);
}

MOE_API moe_status moe_game_reset(moe_game *game) {
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    memset(game->tokens, 0, game->n_batches * sizeof *game->tokens);
    memset(game->count, 0, game->n_batches * game->n_experts * sizeof *game->count);
    memset(game->null_count, 0, game->n_batches * game->n_experts * sizeof *game->null_count);
    moe__health_zero(game->n_batches * game->n_experts, game->logit);
    return MOE_OK;
}

/* -- the null --
 * Token t of a block of n takes expert e's logit from token (step_e t + at_e) mod n, step_e coprime to n: a permutation
 * for each expert. So each expert keeps its logits, and what a token's logits have in common is gone. */
#define MOE__GAME_BLOCK 1024
typedef struct moe__game_block {
    size_t n_tokens;
    const float *token[MOE__GAME_BLOCK];
    size_t top_k[MOE__GAME_BLOCK];
} moe__game_block;

static size_t moe__game_coprime(size_t step, size_t n) {
    for (;; step++) {
        size_t a = n, b = step;
        while (b) {
            size_t rest = a % b;
            a = b, b = rest;
        }
        if (a == 1) return step;
    }
}

static void moe__game_null_block(moe_game *game, size_t batch, uint64_t block_number, const moe__game_block *block) {
    size_t n = game->n_experts, n_tokens = block->n_tokens;
    uint32_t *step = game->scratch + batch * 4 * n, *at = step + n;
    float *row = (float *)(void *)(at + n);
    int32_t *choice = (int32_t *)(void *)(at + 2 * n);
    for (size_t e = 0; e < n; e++) {
        uint64_t i = 2 * (block_number * n + e);
        at[e] = (uint32_t)((uint64_t)moe_rand_u32(game->seed, batch, i) * n_tokens >> 32);
        uint64_t least = (uint64_t)moe_rand_u32(game->seed, batch, i + 1) * (n_tokens - 1) >> 32;
        step[e] = (uint32_t)moe__game_coprime((size_t)least + 1, n_tokens);
    }
    for (size_t t = 0; t < n_tokens; t++) {
        for (size_t e = 0; e < n; e++) {
            row[e] = block->token[at[e]][e];
            at[e] = (uint32_t)((at[e] + step[e]) % n_tokens);
        }
        if (!moe__dispatched()->topk(1, n, block->top_k[t], row, choice, NULL)) continue;
        for (size_t k = 0; k < block->top_k[t]; k++) game->null_count[batch * n + (size_t)choice[k]]++;
    }
}

static size_t moe__game_choices(size_t top_k, const int32_t *index) {
    size_t count = 0;
    for (size_t k = 0; k < top_k; k++) count += index[k] >= 0;
    return count;
}

MOE_API moe_status moe_game_add_null(moe_game *game, size_t batch, size_t n_tokens, size_t top_k, const float *logits,
                                     const int32_t *index) {
    size_t left;
    const float *token;
    moe__game_block block;
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (batch >= game->n_batches) return MOE_E_BATCH;
    moe_status status = moe__measure_logits_ok(n_tokens, game->n_experts, logits, &left);
    if (!status && index) status = moe__measure_index_ok(n_tokens, game->n_experts, top_k, index);
    if (!status) status = moe__measure_sizes_ok(game->n_experts, top_k);
    moe__measure_rows rows = {n_tokens, game->n_experts, top_k, logits, index};
    if (!status) status = moe__measure_tokens_ok(&rows, &left);
    if (status) return status == MOE_E_NO_TOKENS ? MOE_OK : status;
    size_t blocks = moe__ceil_div(left, MOE__GAME_BLOCK), size = 0;
    for (size_t next = 0; (token = moe__measure_token(&rows, &next)) != NULL; left--) {
        if (!size) size = block.n_tokens = moe__ceil_div(left, blocks);
        block.token[block.n_tokens - size] = token;
        block.top_k[block.n_tokens - size] = index ? moe__game_choices(top_k, index + (next - 1) * top_k) : top_k;
        if (--size) continue;
        moe__game_null_block(game, batch, game->tokens[batch] + --blocks, &block);
    }
    return MOE_OK;
}

MOE_API moe_status moe_game_add(moe_game *game, size_t batch, size_t n_tokens, size_t top_k, const float *logits,
                                const int32_t *index) {
    size_t n_logits;
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (batch >= game->n_batches) return MOE_E_BATCH;
    moe_status status = moe__measure_logits_ok(n_tokens, game->n_experts, logits, &n_logits);
    if (!status) status = moe__measure_index_ok(n_tokens, game->n_experts, top_k, index);
    moe__measure_rows rows = {n_tokens, game->n_experts, top_k, logits, index};
    if (!status) status = moe__measure_tokens_ok(&rows, &n_logits);
    if (status) return status == MOE_E_NO_TOKENS ? MOE_OK : status; /* of this batch; moe_game_pool tells if of all */
    game->tokens[batch] += n_logits;
    for (size_t i = 0; i < n_tokens * top_k; i++)
        if (index[i] >= 0) game->count[batch * game->n_experts + (size_t)index[i]]++;
    const float *token;
    double *sum = game->logit + batch * game->n_experts;
    for (size_t next = 0; (token = moe__measure_token(&rows, &next)) != NULL;)
        moe__dispatched()->sum_rows(1, game->n_experts, token, sum);
    return moe_game_add_null(game, batch, n_tokens, top_k, logits, index);
}

MOE_API moe_status moe_game_merge(moe_game *game, const moe_game *other) {
    if (!game || !other || !game->tokens || !other->tokens) return MOE_E_NULL_GAME;
    if (game->n_experts != other->n_experts) return MOE_E_MERGE;
    if (game->n_batches != other->n_batches) return MOE_E_N_BATCHES;
    for (size_t b = 0; b < game->n_batches; b++) game->tokens[b] += other->tokens[b];
    for (size_t i = 0; i < game->n_batches * game->n_experts; i++) {
        game->count[i] += other->count[i];
        game->null_count[i] += other->null_count[i];
        game->logit[i] += other->logit[i];
    }
    return MOE_OK;
}

/* Adds a batch to sums that begin at 0. */
static void moe__game_pour(const moe_game *game, size_t batch, double *quality, double *load, double *tokens) {
    const uint64_t *count = game->count + batch * game->n_experts;
    const double *logit = game->logit + batch * game->n_experts;
    for (size_t e = 0; e < game->n_experts; e++) {
        quality[e] += logit[e];
        load[e] += (double)count[e];
    }
    *tokens += (double)game->tokens[batch];
}
/* Sums -> mean logits and shares. */
static moe_status moe__game_settle(size_t n, double *quality, double *load, double tokens, double *selections) {
    double total = 0.0;
    for (size_t e = 0; e < n; e++) total += load[e];
    if (!(tokens > 0.0)) return MOE_E_NO_TOKENS;
    if (!(total > 0.0)) return MOE_E_LOAD;
    for (size_t e = 0; e < n; e++) {
        quality[e] /= tokens;
        load[e] /= total;
    }
    if (selections) *selections = total;
    return MOE_OK;
}

MOE_API moe_status moe_game_pool(const moe_game *game, const uint8_t *half, int which, double *quality, double *load,
                                 double *selections) {
    double tokens = 0.0;
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (!quality) return MOE_E_NULL_QUALITY;
    if (!load) return MOE_E_NULL_LOAD;
    moe__health_zero(game->n_experts, quality);
    moe__health_zero(game->n_experts, load);
    for (size_t b = 0; b < game->n_batches; b++)
        if (!half || half[b] == which) moe__game_pour(game, b, quality, load, &tokens);
    return moe__game_settle(game->n_experts, quality, load, tokens, selections);
}

MOE_API moe_status moe_game_split(const moe_game *game, uint64_t seed, uint8_t *half) {
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (!half) return MOE_E_NULL_OUT;
    size_t first = game->n_batches / 2; /* so many of those left still go to half 0 */
    for (size_t b = 0; b < game->n_batches; b++) {
        half[b] = moe__game_uniform(seed, 0, b) * (double)(game->n_batches - b) >= (double)first;
        first -= !half[b];
    }
    return MOE_OK;
}

/* quality has room for 6 E numbers. */
static moe_status moe__game_held_out(const moe_game *game, uint64_t seed, double *quality, uint8_t *half,
                                     moe_game_fit *fit) {
    size_t n = game->n_experts;
    double selections, c = 0.0, *load = quality + n, *truth = load + n, *work = truth + n;
    moe_status status = moe_game_split(game, seed, half);
    if (!status) status = moe_game_pool(game, half, 1, work, truth, NULL);
    if (!status) status = moe_game_pool(game, half, 0, quality, load, &selections);
    if (status == MOE_E_NO_TOKENS) status = MOE_E_N_BATCHES; /* in one half */
    if (!status) status = moe_game_estimate(n, quality, load, selections, work, fit);
    if (status) return status;
    fit->l1_uniform = fit->l1_softmax = moe__game_l1(n, truth, NULL);
    fit->l1_game = (double)NAN;
    if (!moe_game_softmax(n, quality, fit->temperature, work)) fit->l1_softmax = moe__game_l1(n, work, truth);
    if (fit->identified && moe__game_rounds(n, quality, fit->gamma, 0, &c, work))
        fit->l1_game = moe__game_l1(n, work, truth);
    return MOE_OK;
}

MOE_API moe_status moe_game_holdout(const moe_game *game, uint64_t seed, moe_game_fit *out) {
    moe_game_fit fit;
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (!out) return MOE_E_NULL_OUT;
    double *quality = (double *)moe__alloc(game->alloc_context, 6 * game->n_experts * sizeof(double));
    uint8_t *half = (uint8_t *)moe__alloc(game->alloc_context, game->n_batches);
    moe_status status = MOE_E_NO_MEMORY;
    if (quality && half) status = moe__game_held_out(game, seed, quality, half, &fit);
    if (!status) *out = fit;
    moe__free(game->alloc_context, half);
    moe__free(game->alloc_context, quality);
    return status;
}

/* Of values in order, between the neighbours in rank. */
static double moe__game_percentile(size_t n, const double *sorted, double share) {
    double at = share * (double)(n - 1), rest = at - floor(at);
    size_t k = (size_t)at;
    return k + 1 < n ? sorted[k] + rest * (sorted[k + 1] - sorted[k]) : sorted[k];
}

MOE_API moe_status moe_interval(size_t n, double *x, double *lo, double *hi) {
    if (!n) return MOE_E_REPLICATES;
    if (!x) return MOE_E_NULL_X;
    if (!lo || !hi) return MOE_E_NULL_OUT;
    moe__health_sort(n, x);
    *lo = moe__game_percentile(n, x, 0.025);
    *hi = moe__game_percentile(n, x, 0.975);
    return MOE_OK;
}

typedef struct moe__game_boot {
    const moe_game *game;
    size_t *batch, n_batches; /* those with tokens */
    uint64_t seed;
    double start, *gamma, *work; /* work (workers, 3 E) */
} moe__game_boot;

static void moe__game_boot_draw(void *arg, size_t replicate, size_t worker) {
    const moe__game_boot *boot = (const moe__game_boot *)arg;
    size_t n = boot->game->n_experts;
    double *quality = boot->work + worker * 3 * n, *load = quality + n, tokens = 0.0, u = boot->start;
    moe__health_zero(2 * n, quality);
    for (size_t i = 0; i < boot->n_batches; i++) {
        uint64_t draw = (uint64_t)moe_rand_u32(boot->seed, 1 + (uint64_t)replicate, i) * boot->n_batches >> 32;
        moe__game_pour(boot->game, boot->batch[draw], quality, load, &tokens);
    }
    if (!moe__game_settle(n, quality, load, tokens, NULL)) { /* else none of these batches selects */
        moe__game_curve curve = {moe__game_predict_game, {n, 1, NULL, quality}, load, load + n, NULL, 0.0, 0};
        u = moe__game_curve_descend(&curve, u, 0.0, MOE__GAMMA_END);
    }
    boot->gamma[replicate] = expm1(u);
}

/* The fit to all batches is where each replicate starts: in worker 0's memory, before the workers run. */
static moe_status moe__game_boot_start(moe__game_boot *boot) {
    size_t n = boot->game->n_experts;
    double *quality = boot->work, *load = quality + n;
    for (size_t b = 0; b < boot->game->n_batches; b++)
        if (boot->game->tokens[b]) boot->batch[boot->n_batches++] = b;
    if (boot->n_batches < 2) return MOE_E_N_BATCHES;
    moe_status status = moe_game_pool(boot->game, NULL, 0, quality, load, NULL);
    if (status) return status;
    moe__game_curve curve = {moe__game_predict_game, {n, 1, NULL, quality}, load, load + n, NULL, 0.0, 0};
    (void)moe__game_curve_fit(&curve, 0.0, MOE__GAMMA_END, &boot->start);
    return MOE_OK;
}

MOE_API moe_status moe_game_bootstrap(const moe_game *game, size_t replicates, uint64_t seed,
                                      const moe_parallel *parallel, double *gamma, double *lo, double *hi) {
    size_t count;
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (!replicates) return MOE_E_REPLICATES;
    if (!gamma || !lo || !hi) return MOE_E_NULL_OUT;
    if (game->n_batches > UINT32_MAX || replicates > SIZE_MAX / sizeof(double)) return MOE_E_OVERFLOW;
    if (!moe__mul(moe_workers(parallel), 3 * game->n_experts * sizeof(double), &count)) return MOE_E_OVERFLOW;
    moe__game_boot boot = {game, NULL, 0, seed, 0.0, gamma, NULL};
    boot.work = (double *)moe__alloc(game->alloc_context, count);
    boot.batch = (size_t *)moe__alloc(game->alloc_context, game->n_batches * sizeof *boot.batch);
    double *sorted = (double *)moe__alloc(game->alloc_context, replicates * sizeof *sorted);
    moe_status status = MOE_E_NO_MEMORY;
    if (boot.work && boot.batch && sorted) status = moe__game_boot_start(&boot);
    if (!status) {
        moe_run(parallel, replicates, moe__game_boot_draw, &boot);
        memcpy(sorted, gamma, replicates * sizeof *sorted);
        status = moe_interval(replicates, sorted, lo, hi);
    }
    moe__free(game->alloc_context, sorted);
    moe__free(game->alloc_context, boot.batch);
    moe__free(game->alloc_context, boot.work);
    return status;
}

/* gamma of all batches; NaN: not identified. work (4 E). */
static moe_status moe__game_gamma(const moe_game *game, double *work, double *gamma) {
    size_t n = game->n_experts;
    double selections;
    moe_game_fit fit;
    moe_status status = moe_game_pool(game, NULL, 0, work, work + n, &selections);
    if (!status) status = moe_game_estimate(n, work, work + n, selections, work + 2 * n, &fit);
    if (!status) *gamma = fit.gamma;
    return status;
}

MOE_API moe_status moe_game_excess(const moe_game *game, size_t replicates, uint64_t seed,
                                   const moe_parallel *parallel, const double *gamma, double *excess,
                                   moe_game_null *out) {
    double of_data = 0.0, lo = (double)NAN, hi = (double)NAN;
    moe_game_null result = {(double)NAN, (double)NAN, (double)NAN, (double)NAN};
    if (!game || !game->tokens) return MOE_E_NULL_GAME;
    if (!out || (replicates && (!gamma || !excess))) return MOE_E_NULL_OUT;
    if (replicates > SIZE_MAX / sizeof(double) - 4 * game->n_experts) return MOE_E_OVERFLOW;
    moe_game null = *game;
    null.count = game->null_count;
    double *work = (double *)moe__alloc(game->alloc_context, (replicates + 4 * game->n_experts) * sizeof *work);
    if (!work) return MOE_E_NO_MEMORY;
    moe_status status = moe__game_gamma(game, work, &of_data);
    if (!status) status = moe__game_gamma(&null, work, &result.gamma_null);
    result.gamma_excess = of_data - result.gamma_null;
    if (!status && replicates) status = moe_game_bootstrap(&null, replicates, seed, parallel, work, &lo, &hi);
    if (!status && replicates) {
        for (size_t r = 0; r < replicates; r++) work[r] = excess[r] = gamma[r] - work[r];
        status = moe_interval(replicates, work, &lo, &hi);
    }
    if (result.gamma_excess - result.gamma_excess == 0.0) result.excess_lo = lo, result.excess_hi = hi;
    if (!status) *out = result;
    moe__free(game->alloc_context, work);
    return status;
}

/* -- phases of a series -- */
MOE_API const char *moe_phase_name(moe_phase_kind kind) {
    static const char *const names[] = {"none", "dormant", "surge", "stabilisation", "relaxation"};
    return moe__health_text(names, MOE_PHASE_COUNT, (unsigned)kind);
}

static double moe__game_median3(double a, double b, double c) {
    return moe__larger(moe__smaller(a, b), moe__smaller(moe__larger(a, b), c));
}

/* Sum of squares left by two lines that meet at x[bend], over points first .. n - 1, first < bend < n - 1. */
static double moe__game_two_lines(size_t first, size_t n, size_t bend, const double *x, const double *y) {
    double count = (double)(n - first), scale = x[n - 1] - x[first], sum_y = 0.0, left = 0.0, right = 0.0, sum = 0.0;
    double left_left = 0.0, right_right = 0.0, left_y = 0.0, right_y = 0.0;
    for (size_t i = first; i < n; i++) {
        double at = (x[i] - x[bend]) / scale, below = moe__smaller(at, 0.0), above = moe__larger(at, 0.0);
        sum_y += y[i], left += below, right += above, left_left += below * below, right_right += above * above;
        left_y += below * y[i], right_y += above * y[i];
    }
    double level = (sum_y - left * left_y / left_left - right * right_y / right_right) /
                   (count - left * left / left_left - right * right / right_right);
    double before = (left_y - left * level) / left_left, after = (right_y - right * level) / right_right;
    for (size_t i = first; i < n; i++) {
        double at = (x[i] - x[bend]) / scale;
        double error = y[i] - level - before * moe__smaller(at, 0.0) - after * moe__larger(at, 0.0);
        sum += error * error;
    }
    return sum;
}

MOE_API moe_status moe_game_phases(size_t n, const double *step, const double *gamma, const double *lo,
                                   const double *hi, double *work, moe_phase_kind *phase) {
    if (!n) return MOE_OK;
    if (!step || !gamma || !lo || !hi) return MOE_E_NULL_QUALITY;
    if (!work) return MOE_E_NULL_WORK;
    if (!phase) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n; i++) {
        if (!moe__finite_double(step[i]) || !moe__finite_double(gamma[i])) return MOE_E_SERIES;
        if (!moe__finite_double(lo[i]) || !moe__finite_double(hi[i])) return MOE_E_SERIES;
        if (i && !(step[i] > step[i - 1])) return MOE_E_SERIES;
    }
    size_t top = 0, peak = 0, dormant = 0, end = n - 1, bend = 0;
    double least = HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        phase[i] = MOE_PHASE_NONE;
        work[i] = gamma[i];
        if (i && i < end) work[i] = moe__game_median3(gamma[i - 1], gamma[i], gamma[i + 1]);
        if (work[i] > work[top]) top = i;
    }
    while (peak < top && hi[peak] < lo[top]) peak++; /* the first that cannot be told from the highest */
    while (dormant < peak && lo[dormant] <= hi[0] && hi[dormant] >= lo[0]) dormant++;
    if (dormant < 3) dormant = 0; /* one or two in line are a surge that begins slowly */
    for (size_t b = peak + 1; b < end; b++) {
        double sum = moe__game_two_lines(peak, n, b, step, gamma);
        if (sum < least) least = sum, bend = b;
    }
    int falls = least < HUGE_VAL && hi[end] < lo[bend];
    if (!falls && !peak) return MOE_OK;
    for (size_t i = 0; i < n; i++) {
        phase[i] = MOE_PHASE_STABILISATION;
        if (peak && i <= peak) phase[i] = i < dormant ? MOE_PHASE_DORMANT : MOE_PHASE_SURGE;
        else if (falls && i > bend) phase[i] = MOE_PHASE_RELAXATION;
    }
    return MOE_OK;
}

/* ==== >>feedback ==============================================================================
 * The rich-get-richer loop of router and experts, after arXiv 2605.29121 [D]: its steady states are the game's with
 * gamma = -Kf. Plain formulas; uses nothing but the ground.
 */
/* One expert with odds e^s against each other one is a steady state at this Kf. */
static double moe__feedback_kf(double n, double s) { return s * (exp(s) + n - 1.0) / expm1(s); }

/* F(v) = (Kf tanh v + h) / 2 - v with u = tanh v. For Kf > 0 it is concave where v > 0: Newton from the right comes to
 * the largest root there, or to a point from where F only rises to the left: then there is none, and one where v <= 0.
 * */
static int moe__feedback_newton(double kf, double h, double v, double *u) {
    for (int i = 0; i < 200; i++) {
        double t = tanh(v), f = (kf * t + h) / 2.0 - v, slope = kf * (1.0 - t * t) / 2.0 - 1.0, next = v - f / slope;
        if (fabs(f) <= 4e-16 * (1.0 + v) || (slope < 0.0 && !(next < v))) { /* only rounding is left */
            *u = t;
            return 1;
        }
        if (slope >= 0.0 || next <= 0.0) return 0;
        v = next;
    }
    return 0;
}

MOE_API moe_status moe_feedback_two(double kf, double h, double *u) {
    if (!moe__finite_double(kf) || !moe__finite_double(h)) return MOE_E_FEEDBACK;
    if (!u) return MOE_E_NULL_OUT;
    double hi = (fabs(kf) + fabs(h)) / 2.0 + 1.0, lo = -hi, v = hi;
    if (kf > 0.0) {
        if (moe__feedback_newton(kf, h, hi, u)) return MOE_OK;
        hi = 0.0;
    }
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

MOE_API moe_status moe_feedback_thresholds(size_t n_experts, double *ks, double *kc) {
    if (n_experts < 2 || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (!ks || !kc) return MOE_E_NULL_OUT;
    const double ratio = 0.6180339887498949;
    double n = (double)n_experts, lo = 1e-9, hi = 2.0 * log(n) + 4.0;
    for (int i = 0; i < 120; i++) { /* one minimum: golden section */
        double a = hi - ratio * (hi - lo), b = lo + ratio * (hi - lo);
        if (moe__feedback_kf(n, a) <= moe__feedback_kf(n, b)) hi = b;
        else lo = a;
    }
    *ks = *kc = 2.0;
    if (n_experts == 2) return MOE_OK;
    *ks = moe__feedback_kf(n, (lo + hi) / 2.0);
    *kc = 2.0 * (n - 1.0) / (n - 2.0) * log(n - 1.0);
    return MOE_OK;
}

MOE_API moe_status moe_feedback_fit(size_t n_steps, size_t n_experts, double dt, const double *s, const double *p,
                                    double *a, double *lambda) {
    size_t count;
    double pp = 0.0, ps = 0.0, ss = 0.0, py = 0.0, sy = 0.0;
    if (!n_experts || n_experts > MOE__MAX_EXPERTS) return MOE_E_N_EXPERTS;
    if (n_steps < 2 || !moe__mul(n_steps, n_experts, &count)) return MOE_E_SERIES;
    if (!(dt > 0.0) || !moe__finite_double(dt)) return MOE_E_FEEDBACK;
    if (!s || !p) return MOE_E_NULL_QUALITY;
    if (!a || !lambda) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < count - n_experts; i++) {
        double y = (s[i + n_experts] - s[i]) / dt;
        pp += p[i] * p[i], ps += p[i] * s[i], ss += s[i] * s[i], py += p[i] * y, sy += s[i] * y;
    }
    double determinant = pp * ss - ps * ps; /* 0 where p and s are in proportion */
    if (!(determinant > 1e-14 * pp * ss) || !moe__finite_double(py + sy)) return MOE_E_FEEDBACK;
    *a = (py * ss - sy * ps) / determinant;
    *lambda = -(pp * sy - ps * py) / determinant;
    return MOE_OK;
}

/* ==== >>desc ==================================================================================
 * After this room a moe_desc can be read, written and resolved: defaults filled in, every field and what must fit
 * together checked, and its plan made. Uses the tables of the stages, and plan. */
static const struct { const char *name; } moe__loads[] = {{"default"}, {"all"}, {"first"}, {"tokens"}};
MOE__NAME_API(load, moe__loads, MOE_LOAD_COUNT)
static const struct { const char *name; } moe__rounds[] = {{"default"}, {"share"}, {"down"}, {"nearest"}, {"up"}};
MOE__NAME_API(round, moe__rounds, MOE_ROUND_COUNT)
static const struct { const char *name; } moe__inits[] = {{"default"}, {"uniform"}, {"orthogonal"}, {"zero"}};
MOE__NAME_API(init, moe__inits, MOE_INIT_COUNT)

typedef enum moe__desc_field_type {
    MOE__FIELD_SIZE,
    MOE__FIELD_U64,
    MOE__FIELD_FLOAT, /* "off" for MOE_OFF */
    MOE__FIELD_LOSS,  /* MOE_LOSS_COUNT floats, named "loss." and the name of the loss; the last row */
    MOE__FIELD_FLAG,  /* an int by name: true, false, null = unset */
    MOE__FIELD_ENUM   /* by name */
} moe__desc_field_type;
typedef struct moe__desc_field {
    const char *name;
    size_t offset, size;
    moe__desc_field_type type;
    double unset, lowest, highest;  /* in place of 0; what a value must lie between */
    int off;                        /* MOE_OFF is allowed as well */
    moe_status status;              /* of a value that is not allowed */
    int memory;                     /* the layout of a layer or a tape depends on it */
    const char *(*value_name)(int); /* NULL for no such value */
} moe__desc_field;

static const char *moe__desc_flag_word(int v) {
    if (v == MOE_DEFAULT) return "null";
    if (v == MOE_ON) return "true";
    return v == MOE_OFF ? "false" : NULL;
}
#define MOE__WORD(kind)                                                                                                \
    static const char *moe__desc_##kind##_word(int v) { return v < 0 ? NULL : moe_##kind##_name((moe_##kind##_kind)v); }
MOE__WORD(score) MOE__WORD(gate) MOE__WORD(select) MOE__WORD(expert) MOE__WORD(order) MOE__WORD(optimizer)
MOE__WORD(noise) MOE__WORD(combine) MOE__WORD(schedule) MOE__WORD(init) MOE__WORD(control)
MOE__WORD(load) MOE__WORD(round)
#undef MOE__WORD

/* THE FIELD TABLE: one row is all that knows a field of moe_desc; defaults, checks, JSON, moe_desc_set, a file's
 * metadata and whether a tape fits follow from it. Only a default that depends on other fields (0 here) and what must
 * fit together stand below, in code: moe__desc_defaults, moe__desc_fit_numbers, moe__desc_fit_stages. In the order of
 * the struct; of several bad fields the first is reported. */
#define MOE__ROW(member, type, unset, lowest, highest, off, status, memory, word)                                      \
    {#member, offsetof(moe_desc, member), sizeof(((moe_desc *)0)->member), MOE__FIELD_##type,                          \
     unset, lowest, highest, off, status, memory, word}
#define MOE__SIZE(member, unset, lowest, highest, status, memory)                                                      \
    MOE__ROW(member, SIZE, unset, lowest, highest, 0, status, memory, NULL)
#define MOE__FLOAT(member, unset, lowest, highest, off, status)                                                        \
    MOE__ROW(member, FLOAT, unset, lowest, highest, off, status, 0, NULL)
#define MOE__FLAG(member, unset, status, memory)                                                                       \
    MOE__ROW(member, FLAG, unset, MOE_OFF, MOE_ON, 0, status, memory, moe__desc_flag_word)
#define MOE__ENUM(member, word, unset, count, status, memory)                                                          \
    MOE__ROW(member, ENUM, unset, 0, count - 1, 0, status, memory, moe__desc_##word##_word)
#define MOE__ANY 1.9e19 /* no whole number is above it */
static const moe__desc_field moe__desc_fields[] = {
    /*                    unset, lowest, highest, [off,] status, [memory] */
    MOE__SIZE(d_model, 0, 1, MOE__ANY, MOE_E_D_MODEL, 1),
    MOE__SIZE(d_ff, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__SIZE(n_experts, 8, 1, 1048576, MOE_E_N_EXPERTS, 1),
    MOE__SIZE(top_k, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__SIZE(n_shared, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__FLAG(shared_gate, MOE_OFF, MOE_E_SHARED_GATE, 1),
    MOE__SIZE(n_zero, 0, 0, MOE__ANY, MOE_OK, 0), /* with the two below: by the number that is left */
    MOE__SIZE(n_copy, 0, 0, MOE__ANY, MOE_OK, 0),
    MOE__SIZE(n_constant, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__SIZE(sequence, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__SIZE(n_ranks, 1, 1, MOE__ANY, MOE_OK, 1),
    MOE__ENUM(score, score, MOE_SCORE_LINEAR, MOE_SCORE_COUNT, MOE_E_SCORE, 1),
    MOE__SIZE(d_router, 0, 0, MOE__ANY, MOE_OK, 0), /* by L, of the scores that use it */
    MOE__FLAG(router_bias, MOE_DEFAULT, MOE_E_ROUTER_BIAS, 1),
    MOE__FLAG(route_sequence, MOE_DEFAULT, MOE_E_ROUTE_SEQUENCE, 1),
    MOE__FLAG(freeze_router, MOE_OFF, MOE_E_FREEZE_ROUTER, 0),
    MOE__ENUM(router_init, init, MOE_INIT_UNIFORM, MOE_INIT_COUNT, MOE_E_ROUTER_INIT, 0),
    MOE__FLOAT(router_gain, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_ROUTER_GAIN),
    MOE__FLOAT(jitter, 0.0f, 0.0f, 0.999999f, 0, MOE_E_JITTER), /* by being on */
    MOE__ENUM(noise, noise, MOE_NOISE_NONE, MOE_NOISE_COUNT, MOE_E_NOISE, 1),
    MOE__FLOAT(noise_std, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_NOISE_STD),
    MOE__FLAG(residual, MOE_OFF, MOE_E_RESIDUAL, 1),
    MOE__ENUM(gate, gate, MOE_GATE_SOFTMAX, MOE_GATE_COUNT, MOE_E_GATE, 1),
    MOE__FLAG(normalize, MOE_DEFAULT, MOE_E_NORMALIZE, 0),
    MOE__FLOAT(weight_scale, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_WEIGHT_SCALE),
    MOE__FLOAT(temperature, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_TEMPERATURE),
    MOE__FLAG(learn_temperature, MOE_OFF, MOE_E_LEARN_TEMPERATURE, 1),
    MOE__FLOAT(temperature_end, 0.0f, 0.0f, FLT_MAX, 0, MOE_E_TEMPERATURE_END),
    MOE__FLOAT(mask_jitter, 0.1f, 0.0f, FLT_MAX, 0, MOE_E_MASK_JITTER),
    MOE__ENUM(select, select, MOE_SELECT_TOP_K, MOE_SELECT_COUNT, MOE_E_SELECT, 1),
    MOE__SIZE(top_k_min, 0, 0, MOE__ANY, MOE_OK, 0),
    MOE__ENUM(schedule, schedule, MOE_SCHEDULE_LINEAR, MOE_SCHEDULE_COUNT, MOE_E_SCHEDULE, 0),
    MOE__ROW(schedule_steps, U64, 0, 0, MOE__ANY, 0, MOE_OK, 0, NULL),
    MOE__ROW(random_steps, U64, 0, 0, MOE__ANY, 0, MOE_OK, 0, NULL),
    MOE__SIZE(n_groups, 1, 1, 256, MOE_E_GROUPS, 0),
    MOE__SIZE(top_groups, 1, 1, 256, MOE_E_TOP_GROUPS, 0),
    MOE__SIZE(group_best, 2, 1, 256, MOE_E_GROUP_BEST, 0),
    MOE__FLOAT(top_p, 0.4f, 0.0f, 1.0f, 0, MOE_E_TOP_P),
    MOE__FLOAT(threshold, MOE_OFF, -FLT_MAX, FLT_MAX, 1, MOE_E_THRESHOLD),
    MOE__FLAG(fallback, MOE_DEFAULT, MOE_E_FALLBACK, 0),
    MOE__FLAG(random_second, MOE_OFF, MOE_E_RANDOM_SECOND, 1),
    MOE__FLAG(normalize_late, MOE_OFF, MOE_E_NORMALIZE_LATE, 0),
    MOE__FLOAT(sinkhorn_epsilon, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_SINKHORN),
    MOE__SIZE(sinkhorn_iterations, 20, 1, MOE__ANY, MOE_OK, 0),
    MOE__FLOAT(gate_drop, 0.0f, 0.0f, 1.0f, 0, MOE_E_GATE_DROP),
    MOE__FLAG(gate_drop_experts, MOE_OFF, MOE_E_GATE_DROP_EXPERTS, 0),
    MOE__FLOAT(expert_drop, 0.0f, 0.0f, 0.999999f, 0, MOE_E_EXPERT_DROP),
    MOE__ENUM(capacity_order, order, MOE_ORDER_TOKEN, MOE_ORDER_COUNT, MOE_E_CAPACITY_ORDER, 0),
    MOE__FLOAT(capacity_factor, MOE_OFF, 0.0f, FLT_MAX, 1, MOE_E_CAPACITY_FACTOR),
    MOE__FLOAT(capacity_factor_eval, 0.0f, 0.0f, FLT_MAX, 1, MOE_E_CAPACITY_FACTOR_EVAL),
    MOE__ENUM(capacity_round, round, MOE_ROUND_SHARE, MOE_ROUND_COUNT, MOE_E_CAPACITY_ROUND, 0),
    MOE__SIZE(min_capacity, 1, 1, MOE__ANY, MOE_OK, 0),
    MOE__FLAG(capacity_sequence, MOE_OFF, MOE_E_CAPACITY_SEQUENCE, 0),
    MOE__ENUM(expert, expert, MOE_EXPERT_SWIGLU, MOE_EXPERT_COUNT, MOE_E_EXPERT, 1),
    MOE__FLAG(bias, MOE_OFF, MOE_E_BIAS, 1),
    MOE__FLAG(expert_norm, MOE_OFF, MOE_E_EXPERT_NORM, 0), /* with the one below: by there being a view */
    MOE__FLOAT(input_scale, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_INPUT_SCALE),
    MOE__FLAG(zero_output, MOE_OFF, MOE_E_ZERO_OUTPUT, 0),
    MOE__ENUM(combine, combine, MOE_COMBINE_SUM, MOE_COMBINE_COUNT, MOE_E_COMBINE, 1),
    MOE__SIZE(soft_slots, 1, 1, MOE__ANY, MOE_OK, 1),
    MOE__FLOAT(robust_tau, 1.0f, 0.0f, FLT_MAX, 0, MOE_E_ROBUST_TAU),
    MOE__SIZE(n_codes, 0, 0, MOE__ANY, MOE_OK, 1),
    MOE__FLOAT(code_share, MOE_OFF, 0.0f, 1.0f, 1, MOE_E_CODE_SHARE),
    MOE__ENUM(switch_load, load, MOE_LOAD_ALL, MOE_LOAD_COUNT, MOE_E_SWITCH_LOAD, 0),
    MOE__ENUM(controller, control, MOE_CONTROL_NONE, MOE_CONTROL_COUNT, MOE_E_CONTROLLER, 0),
    MOE__FLOAT(controller_rate, 0.0f, 0.0f, FLT_MAX, 0, MOE_E_CONTROLLER_RATE),
    MOE__FLOAT(controller_damping, 0.0f, 0.0f, FLT_MAX, 1, MOE_E_CONTROLLER_DAMPING),
    MOE__FLAG(controller_recentre, MOE_DEFAULT, MOE_E_CONTROLLER_RECENTRE, 0),
    MOE__FLAG(training, MOE_ON, MOE_E_TRAINING, 0),
    MOE__ENUM(optimizer, optimizer, MOE_OPTIMIZER_ADAMW, MOE_OPTIMIZER_COUNT, MOE_E_OPTIMIZER, 0),
    MOE__FLOAT(beta1, 0.9f, 0.0f, 0.99999994f, 1, MOE_E_BETA1),
    MOE__FLOAT(beta2, 0.999f, 0.0f, 0.99999994f, 1, MOE_E_BETA2),
    MOE__FLOAT(epsilon, 1e-8f, 0.0f, FLT_MAX, 0, MOE_E_EPSILON),
    MOE__FLOAT(momentum, 0.9f, 0.0f, 0.99999994f, 1, MOE_E_MOMENTUM),
    MOE__FLOAT(weight_decay, 0.01f, 0.0f, FLT_MAX, 1, MOE_E_WEIGHT_DECAY),
    MOE__FLOAT(clip_norm, MOE_OFF, 0.0f, FLT_MAX, 1, MOE_E_CLIP_NORM),
    MOE__ROW(seed, U64, 1, 0, MOE__ANY, 0, MOE_OK, 0, NULL),
    MOE__ROW(loss, LOSS, 0.0f, 0.0f, FLT_MAX, 1, MOE_E_LOSS, 0, NULL) /* two of them by being on */
};
#undef MOE__ROW
#undef MOE__SIZE
#undef MOE__FLOAT
#undef MOE__FLAG
#undef MOE__ENUM
#undef MOE__ANY
#define MOE__FIELD_COUNT (sizeof moe__desc_fields / sizeof *moe__desc_fields)

/* Row i of the table, its losses counted one by one, with the loss's name in `name`; 0 past the end. */
static int moe__desc_field_at(size_t i, moe__desc_field *field, char name[32]) {
    size_t loss = moe__max(i + 1, MOE__FIELD_COUNT) - MOE__FIELD_COUNT;
    moe__text text = {name, 32, 0};
    if (loss >= MOE_LOSS_COUNT) return 0;
    *field = moe__desc_fields[i - loss];
    if (field->type != MOE__FIELD_LOSS) return 1;
    moe__text_add(&text, "loss.");
    moe__text_add(&text, moe_loss_name((moe_loss_kind)loss));
    moe__text_end(&text);
    field->name = name;
    field->offset += loss * sizeof(float);
    field->size = sizeof(float);
    return 1;
}

/* A field's value: in the member that its type has. */
typedef struct moe__desc_value { uint64_t whole; float number; int choice; } moe__desc_value;
static moe__desc_value moe__desc_load(const moe__desc_field *field, const moe_desc *desc) {
    const char *from = (const char *)desc + field->offset;
    moe__desc_value value = {0, 0.0f, 0};
    unsigned char small; /* an enum, where the compiler makes them short */
    size_t size;
    switch (field->type) {
    case MOE__FIELD_SIZE: memcpy(&size, from, sizeof size); value.whole = size; break;
    case MOE__FIELD_U64: memcpy(&value.whole, from, sizeof value.whole); break;
    case MOE__FIELD_FLOAT: case MOE__FIELD_LOSS: memcpy(&value.number, from, sizeof value.number); break;
    default:
        memcpy(&small, from, 1);
        value.choice = small;
        if (field->size > 1) memcpy(&value.choice, from, sizeof value.choice);
    }
    return value;
}
static void moe__desc_store(const moe__desc_field *field, const moe__desc_value *value, moe_desc *desc) {
    char *to = (char *)desc + field->offset;
    unsigned char small = (unsigned char)value->choice;
    size_t size = (size_t)value->whole;
    switch (field->type) {
    case MOE__FIELD_SIZE: memcpy(to, &size, sizeof size); break;
    case MOE__FIELD_U64: memcpy(to, &value->whole, sizeof value->whole); break;
    case MOE__FIELD_FLOAT: case MOE__FIELD_LOSS: memcpy(to, &value->number, sizeof value->number); break;
    default:
        if (field->size == 1) memcpy(to, &small, 1);
        else memcpy(to, &value->choice, sizeof value->choice);
    }
}

/* -- as text -- */
/* The field's value as JSON; `quoted`: as a string, whatever it is. */
static void moe__desc_field_write(const moe__desc_field *field, const moe_desc *desc, int quoted, moe__text *text) {
    moe__desc_value value = moe__desc_load(field, desc);
    int number = field->type == MOE__FIELD_FLOAT || field->type == MOE__FIELD_LOSS;
    const char *word = NULL;
    if (number && value.number == (float)MOE_OFF) word = "off";
    if (field->value_name) {
        word = field->value_name(value.choice);
        if (!word) word = field->type == MOE__FIELD_FLAG ? "null" : "unknown";
    }
    quoted = quoted || (word && field->type != MOE__FIELD_FLAG);
    if (quoted) moe__text_char(text, '"');
    if (word) moe__text_add(text, word);
    else if (number) moe__text_float(text, value.number);
    else moe__text_u64(text, value.whole);
    if (quoted) moe__text_char(text, '"');
}
/* "name":value for every field, separated by commas; a loss that is 0 is left out: a missing key means the default. */
static void moe__desc_fields_write(const moe_desc *desc, int quoted, moe__text *text) {
    moe__desc_field field;
    char name[32];
    for (size_t i = 0; moe__desc_field_at(i, &field, name); i++) {
        if (field.type == MOE__FIELD_LOSS && moe__desc_load(&field, desc).number == 0.0f) continue;
        if (i) moe__text_char(text, ',');
        moe__text_char(text, '"');
        moe__text_add(text, field.name);
        moe__text_add(text, "\":");
        moe__desc_field_write(&field, desc, quoted, text);
    }
}
MOE_API size_t moe_desc_json(const moe_desc *desc, char *buffer, size_t size) {
    moe__text text = {buffer, buffer ? size : 0, 0};
    if (desc) {
        moe__text_char(&text, '{');
        moe__desc_fields_write(desc, 0, &text);
        moe__text_char(&text, '}');
    }
    moe__text_end(&text);
    return text.n;
}

static int moe__desc_field_read(const moe__desc_field *field, const char *text, moe_desc *desc) {
    moe__desc_value value = {0, (float)MOE_OFF, MOE_OFF};
    switch (field->type) {
    case MOE__FIELD_SIZE: case MOE__FIELD_U64:
        if (!moe__parse_u64(text, &value.whole)) return 0;
        if (field->type == MOE__FIELD_SIZE && value.whole > SIZE_MAX) return 0;
        break;
    case MOE__FIELD_FLOAT: case MOE__FIELD_LOSS:
        if (strcmp(text, "off") && !moe__parse_float(text, &value.number)) return 0;
        break;
    default:
        for (;; value.choice++) {
            const char *name = field->value_name(value.choice);
            if (name && !strcmp(text, name)) break;
            if (!name && value.choice >= 0) return 0;
        }
    }
    moe__desc_store(field, &value, desc);
    return 1;
}
MOE_API moe_status moe_desc_set(moe_desc *desc, const char *field, const char *value) {
    moe__desc_field row;
    char name[32];
    if (!desc) return MOE_E_NULL_DESC;
    if (!field || !value) return MOE_E_NULL_NAME;
    for (size_t i = 0; moe__desc_field_at(i, &row, name); i++)
        if (!strcmp(row.name, field)) {
            if (!moe__desc_field_read(&row, value, desc)) return MOE_E_VALUE;
            return MOE_OK;
        }
    return MOE_E_FIELD;
}

/* Text from *at to a blank, `stop` or the end, into word, cut at its size. */
static void moe__desc_word(const char *text, size_t *at, char stop, char word[48]) {
    size_t n = 0;
    for (; text[*at] && text[*at] != ' ' && text[*at] != stop; ++*at)
        if (n < 47) word[n++] = text[*at];
    word[n] = 0;
}
MOE_API moe_status moe_desc_parse(moe_desc *desc, const char *text, size_t *at) {
    moe_desc changed;
    moe_status status = MOE_OK;
    char field[48], value[48];
    size_t i = 0, begin = 0;
    if (!desc) return MOE_E_NULL_DESC;
    if (!text) return MOE_E_NULL_NAME;
    changed = *desc;
    while (!status) {
        while (text[i] == ' ') i++;
        begin = i;
        if (!text[i]) break;
        moe__desc_word(text, &i, '=', field);
        if (text[i++] != '=') status = MOE_E_FIELD;
        else {
            moe__desc_word(text, &i, ' ', value);
            status = moe_desc_set(&changed, field, value);
        }
    }
    if (at) *at = begin;
    if (!status) *desc = changed;
    return status;
}

/* -- defaults and checks -- */
static moe_status moe__desc_resolve_field(const moe__desc_field *field, moe_desc *desc) {
    moe__desc_value value = moe__desc_load(field, desc);
    double number;
    switch (field->type) {
    case MOE__FIELD_SIZE: case MOE__FIELD_U64:
        if (!value.whole) value.whole = (uint64_t)field->unset;
        number = (double)value.whole;
        break;
    case MOE__FIELD_FLOAT: case MOE__FIELD_LOSS:
        if (value.number == 0.0f) value.number = (float)field->unset;
        number = (double)value.number;
        break;
    default:
        if (!value.choice) value.choice = (int)field->unset;
        number = (double)value.choice;
    }
    moe__desc_store(field, &value, desc);
    if (field->off && number == (double)MOE_OFF) return MOE_OK;
    if (!(number >= field->lowest && number <= field->highest)) return field->status; /* NaN as well */
    return MOE_OK;
}
/* Defaults that depend on other fields. */
static moe_status moe__desc_defaults(moe_desc *desc) {
    const moe__experts_row *expert = &moe__experts_table[desc->expert];
    if (!desc->d_ff) {
        if (!moe__mul(desc->d_model, expert->wide, &desc->d_ff)) return MOE_E_OVERFLOW;
        desc->d_ff = moe__max(1, desc->d_ff / expert->narrow);
    }
    if (!desc->top_k) desc->top_k = desc->n_experts > 1 && !moe__select_table[desc->select].one ? 2 : 1;
    if (!desc->top_k_min) desc->top_k_min = desc->top_k;
    if (!desc->d_router && desc->score == MOE_SCORE_HALF_COSINE) desc->d_router = 16;
    if (!desc->d_router && desc->score == MOE_SCORE_PROJECTED) desc->d_router = moe__max(1, desc->n_experts / 2);
    if (!desc->d_router && desc->score == MOE_SCORE_TANH) desc->d_router = 8 * desc->n_experts;
    if (!desc->d_router) desc->d_router = moe__max(1, desc->d_model / 2);
    if (!desc->router_bias) desc->router_bias = moe__score_table[desc->score].latent.out_bias ? MOE_ON : MOE_OFF;
    if (!desc->route_sequence && desc->combine == MOE_COMBINE_MERGE) desc->route_sequence = MOE_ON;
    if (!desc->route_sequence) desc->route_sequence = MOE_OFF;
    if (!desc->normalize && desc->top_k > 1 && desc->gate != MOE_GATE_RELU) desc->normalize = MOE_ON;
    if (!desc->normalize) desc->normalize = MOE_OFF;
    if (desc->select == MOE_SELECT_THRESHOLD && desc->threshold == (float)MOE_OFF) desc->threshold = 0.0f;
    if (desc->capacity_factor_eval == 0.0f) desc->capacity_factor_eval = desc->capacity_factor;
    return MOE_OK;
}
/* Whether a router that is to learn has one weight for a token, which is 1 whatever the router does: no gradient of the
 * task reaches it then. SparseMixer's estimator does not need one. */
static int moe__desc_one_weight(const moe_desc *desc) {
    int one = desc->gate == MOE_GATE_SOFTMAX_SELECTED || desc->combine == MOE_COMBINE_ROBUST;
    if (desc->normalize == MOE_ON && !moe__gate_table[desc->gate].normalizes) one = 1;
    if (desc->training == MOE_OFF || desc->freeze_router == MOE_ON) return 0;
    if (desc->top_k != 1 || desc->n_experts == 1 || moe__select_table[desc->select].all) return 0;
    return one && moe__score_table[desc->score].backward != NULL;
}
/* What must fit together: what the stages' rows ask, what concerns several of them, and the numbers. */
static moe_status moe__desc_fit_stages(const moe_desc *desc) {
    const moe__select_row *select = &moe__select_table[desc->select];
    moe_status (*const fits[4])(const moe_desc *) = {
        moe__experts_table[desc->expert].fits, moe__score_table[desc->score].fits,
        moe__combine_table[desc->combine].fits, select->fits
    };
    int lambda = desc->controller == MOE_CONTROL_RELU_LAMBDA, adaptive = desc->controller == MOE_CONTROL_ADAPTIVE;
    if (!moe__select_suits_gate(desc)) return MOE_E_GATE_SELECT;
    for (int i = 0; i < 4; i++) {
        moe_status status = MOE_OK;
        if (fits[i]) status = fits[i](desc);
        if (status) return status;
    }
    if (desc->gate_drop > 0.0f && select->keeps_all) return MOE_E_GATE_DROP; /* it cannot leave experts out */
    if (select->one && desc->top_k != 1) return MOE_E_ONE_CHOICE;
    if (moe__desc_one_weight(desc)) return MOE_E_ONE_WEIGHT;
    if (desc->n_codes) {
        if (desc->n_codes < desc->n_experts || desc->combine != MOE_COMBINE_SUM) return MOE_E_N_CODES;
        if (desc->n_zero || desc->n_copy || desc->n_constant) return MOE_E_N_CODES;
        if (desc->jitter > 0.0f || desc->route_sequence == MOE_ON) return MOE_E_N_CODES;
    }
    if (desc->expert_norm == MOE_ON) {
        if (desc->n_copy || desc->n_constant || desc->n_codes || desc->combine == MOE_COMBINE_SOFT)
            return MOE_E_EXPERT_NORM;
    }
    if (desc->n_codes && desc->input_scale != 1.0f) return MOE_E_INPUT_SCALE;
    if (desc->router_bias == MOE_ON && !moe__score_is_latent(desc->score)) return MOE_E_ROUTER_BIAS;
    moe_status lacks = moe__balance_check(desc);
    if (lacks) return lacks;
    if (lambda && (desc->gate != MOE_GATE_RELU || !(desc->loss[MOE_LOSS_RELU_L1] > 0.0f))) return MOE_E_CONTROLLER;
    if (adaptive && !(desc->loss[MOE_LOSS_SWITCH] > 0.0f)) return MOE_E_CONTROLLER;
    return MOE_OK;
}
static moe_status moe__desc_fit_numbers(const moe_desc *desc) {
    size_t experts = desc->n_experts, each = moe__max(moe__max(desc->n_zero, desc->n_copy), desc->n_constant);
    if (desc->top_k > experts) return MOE_E_TOP_K;
    if (desc->top_k_min > desc->top_k) return MOE_E_TOP_K_MIN;
    if (desc->top_k_min < desc->top_k && !desc->schedule_steps) return MOE_E_TOP_K_MIN;
    if (each >= experts || desc->n_zero + desc->n_copy + desc->n_constant >= experts) return MOE_E_SPECIAL_EXPERTS;
    if (desc->n_ranks > experts) return MOE_E_N_RANKS;
    if (desc->soft_slots > MOE__MAX_EXPERTS / experts) return MOE_E_SOFT_SLOTS;
    if (desc->shared_gate == MOE_ON && !desc->n_shared) return MOE_E_SHARED_GATE;
    if (experts % desc->n_groups) return MOE_E_GROUPS;
    if (desc->top_groups > desc->n_groups) return MOE_E_TOP_GROUPS;
    if (!moe__temperature_ok(desc->temperature)) return MOE_E_TEMPERATURE;
    if (desc->temperature_end == 0.0f) return MOE_OK;
    if (!desc->schedule_steps || !moe__temperature_ok(desc->temperature_end)) return MOE_E_TEMPERATURE_END;
    return MOE_OK;
}
static moe_status moe__desc_resolve(moe_desc *desc) {
    moe__desc_field field;
    char name[32];
    moe_status status = MOE_OK;
    for (size_t i = 0; !status && moe__desc_field_at(i, &field, name); i++)
        status = moe__desc_resolve_field(&field, desc);
    if (!status) status = moe__desc_defaults(desc);
    if (!status) status = moe__desc_fit_numbers(desc);
    return status ? status : moe__desc_fit_stages(desc);
}

/* -- the plan -- */
/* Elements of each tensor, and where the router's begin. */
static moe_status moe__desc_tensors(moe__plan *plan) {
    const moe_desc *desc = &plan->desc;
    const moe__score_latent *latent = &moe__score_table[desc->score].latent;
#define MOE__THERE(id, name, axes, decay, start, axis, stream, format, there)                                          \
    plan->count[MOE__##id] = (there) != 0;
    MOE__ROUTER_TENSORS(MOE__THERE) MOE__EXPERT_TENSORS(MOE__THERE) MOE__CONSTANT_TENSORS(MOE__THERE)
#undef MOE__THERE
    for (int id = 0; id < MOE__T_COUNT; id++) {
        size_t *count = &plan->count[id];
        for (const char *axis = moe__plan_tensors[id].axes; *axis; axis++)
            if (!moe__mul(*count, moe__plan_extent(plan, *axis), count)) return MOE_E_OVERFLOW;
        if (moe__plan_tensors[id].region != MOE__IN_EXPERTS && *count > SIZE_MAX / 1024) return MOE_E_OVERFLOW;
        if (id >= MOE__R_COUNT) continue;
        if (!moe__add_size(plan->at[id], *count, &plan->at[id + 1])) return MOE_E_OVERFLOW;
    }
    return MOE_OK;
}
/* Floats of an array, few enough that some more factors fit. */
static int moe__desc_floats(size_t rows, size_t columns, size_t *out) {
    return moe__mul(rows, columns, out) && *out <= SIZE_MAX / 256;
}
/* What follows from plan->desc, which is resolved. */
static moe_status moe__desc_extents(moe__plan *plan) {
    const moe_desc *desc = &plan->desc;
    const size_t widest = SIZE_MAX / 4096;
    size_t w1, w2, columns;
    plan->d = desc->d_model;
    plan->f = desc->d_ff;
    plan->E = desc->n_experts;
    plan->F = desc->n_experts - desc->n_zero - desc->n_copy - desc->n_constant;
    plan->S = desc->top_k;
    if (moe__select_table[desc->select].all) plan->S = plan->E;
    plan->L = plan->d;
    if (moe__score_table[desc->score].latent.proj) plan->L = desc->d_router;
    plan->N = plan->E * desc->soft_slots;
    plan->gated = moe__experts_table[desc->expert].gated != 0;
    plan->bias = desc->bias == MOE_ON;
    plan->dp = moe__ceil_div(plan->d, MOE__W);
    plan->hp = moe__ceil_div(plan->f, MOE__W);
    plan->zp = plan->hp * (1 + plan->gated);
    plan->ep = moe__ceil_div(plan->E, MOE__W);
    plan->lp = moe__ceil_div(plan->L, MOE__W);
    plan->np = moe__ceil_div(plan->N, MOE__W);
    plan->jitter = desc->jitter > 0.0f;
    plan->by_sequence = desc->route_sequence == MOE_ON;
    plan->view = desc->expert_norm == MOE_ON || desc->input_scale != 1.0f;
    plan->ortho_loss = desc->loss[MOE_LOSS_ORTHONORMAL] > 0.0f;
    plan->output_loss = desc->loss[MOE_LOSS_OUTPUT_ORTHOGONALITY] > 0.0f;
    if (plan->d > widest || plan->f > widest || plan->L > widest) return MOE_E_OVERFLOW;
    if (!moe__add_size(plan->F, desc->n_shared, &plan->G) || plan->G > MOE__MAX_INDEX) return MOE_E_OVERFLOW;
    if (!moe__desc_floats(plan->zp * MOE__W, plan->d, &w1)) return MOE_E_OVERFLOW;
    if (!moe__desc_floats(plan->dp * MOE__W, plan->f, &w2)) return MOE_E_OVERFLOW;
    plan->b1 = w1;
    plan->w2 = plan->b1 + plan->zp * MOE__W * plan->bias;
    plan->b2 = plan->w2 + w2;
    plan->expert = plan->b2 + plan->dp * MOE__W * plan->bias;
    if (!moe__desc_floats(plan->expert, plan->G, &plan->special)) return MOE_E_OVERFLOW;
    if (!moe__desc_floats(plan->N, moe__max(plan->d, plan->L), &columns)) return MOE_E_OVERFLOW;
    plan->ldo = plan->dp * MOE__W + 16; /* not a power of two: rows must not alias in L1 */
    moe_status status = moe__desc_tensors(plan);
    plan->experts = plan->special + moe__plan_parameters(plan, MOE__IN_CONSTANTS);
    return status;
}
/* The plan of a desc: its effective values, checked, and their extents. */
static moe_status moe__desc_plan(const moe_desc *in, moe__plan *plan) {
    if (!in) return MOE_E_NULL_DESC;
    if (!moe__arithmetic_ok()) return MOE_E_ARITHMETIC;
    moe_desc desc = *in;
    moe_status status = moe__desc_resolve(&desc);
    if (status) return status;
    memset(plan, 0, sizeof *plan);
    plan->desc = desc;
    return moe__desc_extents(plan);
}
/* Whether what was laid out for one plan fits the other: the fields that the table marks are equal, and so are the
 * numbers through which the others act. */
static int moe__desc_same_memory(const moe__plan *a, const moe__plan *b) {
    if (a->F != b->F || a->L != b->L || a->jitter != b->jitter || a->view != b->view) return 0;
    if (a->ortho_loss != b->ortho_loss || a->output_loss != b->output_loss) return 0;
    for (size_t i = 0; i < MOE__FIELD_COUNT; i++) {
        const moe__desc_field *field = &moe__desc_fields[i];
        const char *mine = (const char *)&a->desc + field->offset, *other = (const char *)&b->desc + field->offset;
        if (field->memory && memcmp(mine, other, field->size)) return 0;
    }
    return 1;
}
MOE_API moe_status moe_desc_resolve(const moe_desc *in, moe_desc *out) {
    moe__plan plan;
    if (!in) return MOE_E_NULL_DESC;
    if (!out) return MOE_E_NULL_OUT;
    moe_status status = moe__desc_plan(in, &plan);
    if (!status) *out = plan.desc;
    return status;
}

MOE_API double moe_desc_ecology(const moe_desc *desc) {
    moe_desc resolved;
    if (moe_desc_resolve(desc, &resolved)) return moe_ecology_number(-1.0, 0.0, 0.0, 0.0); /* NaN */
    const float *loss = resolved.loss;
    double entropy = moe__larger((double)loss[MOE_LOSS_ENTROPY], 0.0); /* off is below 0 */
    double oracle = moe__larger((double)loss[MOE_LOSS_ORACLE], 0.0);
    double balance = moe__larger((double)loss[MOE_LOSS_KL_UNIFORM], (double)loss[MOE_LOSS_SWITCH]);
    return moe_ecology_number((double)resolved.temperature, entropy, oracle, moe__larger(balance, 0.0));
}

/* ==== >>systems ===============================================================================
 * The systems of the literature: a row is a name, its source, and its choices in the words of moe_desc_parse; nothing
 * else in the library asks which paper it is. Sizes are small ones that any layer can have, the source's own are in
 * `purpose`. What a source leaves open is [D]. Uses desc. */
static const moe_system moe__system_table[] = {
    {"dense", "One feed-forward network", "no mixture", "K",
     "n_experts=1 top_k=1",
     "what every mixture is compared with: one expert for all tokens", "no routing"},
    {"softmax-topk", "OLMoE: softmax, then top-k", "arXiv 2409.02060, 2024", "K",
     "top_k=2 gate=softmax select=top-k normalize=false loss.switch=0.01 loss.z=0.001",
     "the plain baseline; in the paper 64 experts, top-8", "causal; balance by loss only"},
    {"mixtral", "Mixtral: softmax over the selected", "arXiv 2401.04088, 2024", "K",
     "top_k=2 gate=softmax-selected select=top-k expert=swiglu loss.switch=0.02 switch_load=tokens",
     "weights sum to one; 8 experts, top-2", "causal; balance by loss only"},
    {"switch", "Switch Transformer", "arXiv 2101.03961, 2021", "C",
     "top_k=1 gate=softmax select=top-k normalize=false expert=relu jitter=0.01 capacity_factor=1.25 "
     "capacity_round=down min_capacity=4 capacity_order=token loss.switch=0.01",
     "one expert a token, cheapest routing",
     "drops tokens over capacity, so not batch-invariant; causal but for the drops"},
    {"gshard", "GShard top-2", "arXiv 2006.16668, 2020", "C",
     "top_k=2 gate=softmax select=top-k normalize=true random_second=true expert=relu capacity_factor=1 "
     "capacity_order=choice loss.switch=0.01 switch_load=first",
     "first choices before second, the second at random", "drops tokens over capacity, so not batch-invariant"},
    {"noisy-topk", "Sparsely gated mixture with noisy top-k", "arXiv 1701.06538, 2017", "K",
     "top_k=2 gate=softmax-selected select=top-k noise=learned router_init=zero loss.importance-selected=0.1 "
     "loss.load=0.1",
     "learned noise explores the experts", "noise in training only"},
    {"expert-choice", "Expert choice routing", "arXiv 2202.09368, 2022", "K",
     "top_k=2 gate=softmax select=expert-choice normalize=false",
     "every expert takes as many tokens: balanced without a loss",
     "sees the whole batch: not causal, not batch-invariant; a token may get no expert"},
    {"deepseek-moe", "DeepSeekMoE: fine experts and shared ones", "arXiv 2401.06066, 2024", "C",
     "top_k=2 n_shared=1 gate=softmax select=top-k normalize=false n_ranks=4 loss.switch=0.01 loss.rank=0.05",
     "shared experts hold what all tokens need; 64 experts, top-6, 2 shared", "causal"},
    {"deepseek-v3", "DeepSeek-V3: sigmoid, groups, bias instead of a loss", "arXiv 2412.19437, 2024", "C",
     "top_k=2 n_shared=1 gate=sigmoid select=groups n_groups=4 top_groups=2 normalize=true weight_scale=2.5 "
     "loss.sequence=0.0001 controller=bias controller_rate=0.001",
     "balance by a bias outside the gradient; 256 experts in 8 groups of which 4, top-8",
     "n_experts a multiple of the groups; causal"},
    {"top-p", "Top-p routing: as many experts as a token needs", "arXiv 2403.07652, 2024", "C",
     "gate=softmax select=top-p top_p=0.4 normalize=false loss.certainty=0.0001 loss.switch=0.01",
     "hard tokens get more experts", "number of experts varies; causal"},
    {"remoe", "ReMoE: ReLU instead of top-k", "arXiv 2412.14711, 2024", "C",
     "top_k=2 gate=relu select=threshold normalize=false fallback=false loss.relu-l1=1e-8 controller=relu-lambda",
     "fully differentiable; sparsity by an adaptive L1", "number of experts varies, all at first; causal"},
    {"hash", "Hash layers", "arXiv 2106.04426, 2021", "K",
     "top_k=1 score=hash gate=softmax-selected select=top-k",
     "routing without learning: by token id", "needs token ids; the router learns nothing"},
    {"sinkhorn", "Sinkhorn routing", "arXiv 2202.01169 (S-BASE), 2022", "K",
     "top_k=1 gate=sigmoid select=sinkhorn normalize=false sinkhorn_epsilon=1 sinkhorn_iterations=20",
     "balanced by optimal transport in training", "training sees the whole batch: not causal"},
    {"soft-moe", "Soft MoE", "arXiv 2308.00951, 2023", "K",
     "score=cosine gate=softmax select=all combine=soft soft_slots=1 learn_temperature=true temperature=0.1",
     "every slot is a mixture of all tokens: no discrete choice", "mixes a sequence's tokens: not causal"},
    {"dynmoe", "DynMoE: each token decides how many", "arXiv 2405.14297, 2024", "C",
     "score=cosine gate=sign select=threshold temperature=0.07 learn_temperature=true loss.diverse-simple=0.01",
     "top-any gating with learned thresholds",
     "straight-through gradient; number of experts varies; adding and removing experts is growth's"},
    {"moe++", "MoE++: zero, copy and constant experts", "arXiv 2410.07348, 2024", "C",
     "top_k=2 n_experts=8 n_zero=1 n_copy=1 n_constant=2 score=tanh residual=true gate=softmax select=top-k "
     "normalize=true input_scale=2 loss.switch=0.01",
     "easy tokens take experts that cost nothing", "causal"},
    {"sparsemixer", "SparseMixer-v2, GRIN", "arXiv 2409.12136, 2024", "C",
     "top_k=2 gate=sparsemixer select=sampled mask_jitter=0.1 loss.switch=0.01",
     "a gradient estimate for the discrete choice", "samples in training; surrogate gradient"},
    {"latent-prototype", "Latent prototype routing", "arXiv 2506.21328, 2025", "S",
     "top_k=2 score=prototype gate=softmax select=top-k loss.prototype-diversity=1 loss.prototype-alignment=0.001",
     "clusters tokens around spread prototypes; published Gini .70 -> .035",
     "loss forms and weights [D]: more alignment collapses it; causal"},
    {"random", "Uniformly random routing", "baseline", "K",
     "top_k=2 score=random gate=softmax select=top-k",
     "the other end: perfect balance, no knowledge",
     "no learning in the router; another choice at each forward: not batch-invariant"},
    {"simbal", "SimBal: orthogonal router", "arXiv 2506.14038, 2025", "P",
     "top_k=2 gate=softmax select=top-k normalize=true router_init=orthogonal loss.simbal=0.1 loss.z=0.00001",
     "similar tokens to similar experts; 32 experts, top-4",
     "the loss needs no data; for the scale alone: score=unit"},
    {"ermoe", "ERMoE: experts in orthonormal bases", "public summary, 2025", "S",
     "top_k=2 score=subspace expert=orthonormal gate=relu select=top-k threshold=0.5 fallback=true normalize=true",
     "an expert scores a token by how much of it lies in its basis",
     "self-score [D]: no attention context here; d_ff < d_model; costs all bases"},
    {"mot", "Mixture-of-Transformers theory: top-1 by sequence", "introduction of the paper, 2025", "P",
     "top_k=1 gate=softmax select=top-k normalize=false noise=uniform noise_std=0.1 route_sequence=true",
     "one expert for a whole sequence; three-stage training in examples/mot.c",
     "gate [K]; the mean of the sequence is not causal"},
    {"vqmoe", "VQMoE: a discrete branch beside the router", "public code, 2024", "C",
     "top_k=2 gate=softmax select=top-k normalize=true n_codes=16 code_share=0.1 "
     "loss.codebook=0.08",
     "tokens also go by their nearest code", "one more expert a token; codes learn from the loss alone"},
    {"locmoe", "LocMoE: fixed orthogonal gate, locality", "arXiv 2401.13920, 2024", "P",
     "top_k=1 score=slice gate=softmax select=top-k normalize=false noise=gaussian noise_std=0.01 n_ranks=4 "
     "loss.switch=0.01 loss.locality=0.01",
     "routing costs O(d) and has no parameters", "d_model a multiple of n_experts"},
    {"smear", "SMEAR: merging experts", "arXiv 2306.03745, 2023", "C",
     "score=normed gate=softmax select=all combine=merge expert_drop=0.1",
     "one merged expert a sequence: an ordinary gradient", "sees the whole sequence: not causal"},
    {"smoe-dropout", "SMoE-Dropout: a frozen random router, growing k", "arXiv 2303.01610, 2023", "C",
     "top_k=4 top_k_min=2 schedule=linear schedule_steps=300 freeze_router=true gate=softmax-selected select=top-k",
     "self-slimmable: more experts at evaluation, lower loss; 16 experts, 8 to 16", "the router learns nothing"},
    {"gating-dropout", "Gating Dropout", "arXiv 2205.14336, 2022", "S",
     "top_k=1 gate=softmax select=top-k normalize=false expert=relu n_ranks=4 gate_drop=0.3 capacity_factor=1 "
     "capacity_factor_eval=2 loss.switch=0.01",
     "now and then no token leaves its rank: less exchange",
     "probability [K]; drops tokens over capacity, so not batch-invariant"},
    {"xmoe", "X-MoE: scores on a low-dimensional hypersphere", "arXiv 2204.09179, 2022", "P+C",
     "top_k=1 score=projected gate=sigmoid select=top-k normalize=false temperature=0.07 learn_temperature=true "
     "loss.switch=0.01",
     "against representation collapse; d_router = n_experts / 2", "causal"},
    {"base", "BASE layers: balanced assignment", "arXiv 2103.16716, 2021", "P+C",
     "top_k=1 gate=sigmoid select=auction normalize=false router_init=orthogonal router_gain=0.1 zero_output=true "
     "expert=relu bias=true expert_norm=true",
     "exactly T / E tokens an expert, no loss", "training: T % E == 0, sees the whole batch; evaluation is causal"},
    {"robust", "Reliability-weighted experts", "after unreliable federated clients", "D",
     "top_k=4 gate=softmax select=top-k normalize=true combine=robust robust_tau=1 loss.switch=0.01",
     "survives corrupted experts by the distance from the median output",
     "an adaptation; needs three experts a token or more"},
    {"ecology", "Ecology: router MLP, temperature, entropy, balance, orthogonality", "arXiv 2605.06415, 2026", "S",
     "top_k=2 score=mlp gate=softmax select=top-k normalize=true temperature=1 loss.entropy=0.218 "
     "loss.kl-uniform=0.4 loss.switch=0.4 loss.prototype-orthogonality=0.05",
     "ecology number T H / (O + B) = 0.545 with O = 0, B = 0.4", "form of the losses [D]; the oracle needs a teacher"},
    {"growth", "The growth story's top-2 entropy router", "public post, 2026-02-08", "P",
     "n_experts=3 top_k=2 gate=softmax select=top-k normalize=true loss.entropy=0.1",
     "a seed of three experts that growth splits", "weight of the entropy loss [D]"},
};
MOE_API size_t moe_systems_count(void) { return sizeof moe__system_table / sizeof *moe__system_table; }
MOE_API const moe_system *moe_system_at(size_t i) { return i < moe_systems_count() ? &moe__system_table[i] : NULL; }
MOE_API const moe_system *moe_system_find(const char *name) {
    if (!name) return NULL;
    for (size_t i = 0; i < moe_systems_count(); i++)
        if (!strcmp(moe__system_table[i].name, name)) return &moe__system_table[i];
    return NULL;
}
MOE_API moe_status moe_desc_system(moe_desc *desc, const char *name) {
    const moe_system *system = moe_system_find(name);
    if (!desc) return MOE_E_NULL_DESC;
    if (!name) return MOE_E_NULL_NAME;
    return system ? moe_desc_parse(desc, system->choices, NULL) : MOE_E_SYSTEM;
}

/* Insertions, deletions and changes that make one name of the other, of up to 31 characters: row[i] holds them for what
 * has been read of `name` and the first i characters of `other`. */
static size_t moe__system_edits(const char *name, const char *other) {
    size_t row[32], length = 0;
    while (other[length] && length < 31) length++;
    for (size_t i = 0; i <= length; i++) row[i] = i;
    for (size_t read = 0; name[read] && read < 64; read++) {
        size_t corner = row[0];
        row[0] = read + 1;
        for (size_t i = 0; i < length; i++) {
            size_t change = corner + (name[read] != other[i]);
            corner = row[i + 1];
            row[i + 1] = moe__min(change, moe__min(row[i], corner) + 1);
        }
    }
    return row[length];
}
MOE_API void moe_system_near(const char *name, char *buffer, size_t size) {
    moe__text text = {buffer, buffer ? size : 0, 0};
    size_t least = SIZE_MAX, n = name ? moe_systems_count() : 0;
    for (size_t i = 0; i < n; i++) least = moe__min(least, moe__system_edits(name, moe__system_table[i].name));
    for (size_t i = 0; i < n; i++) {
        const char *other = moe__system_table[i].name;
        if (moe__system_edits(name, other) > least + 1 && !(name[0] && strstr(other, name))) continue;
        if (text.n) moe__text_add(&text, ", ");
        moe__text_add(&text, other);
    }
    moe__text_end(&text);
}

/* ==== >>tape ==================================================================================
 * A tape is one block of memory: what one forward keeps for its backward, and its scratch. One function lays it out
 * and, over no memory, measures it; each stage takes its own part.
 */
enum { MOE__STATE_TOKENS = 1, MOE__STATE_ROUTED = 2, MOE__STATE_FORWARD = 4, MOE__STATE_VIEW = 8 };

static moe_status moe__tape_stages(moe_tape *tape, moe__run_memory *memory, size_t count, moe__arena *arena) {
    const moe__plan *plan = &memory->plan;
    int training = memory->training;
    moe_status status = moe__routes_take(&tape->routes, count, plan->E, plan->S, arena);
    if (!status) status = moe__score_layout(plan, count, training, arena, memory->tokens, &memory->score);
    if (!status) status = moe__noise_layout(plan, count, arena, tape, &memory->noise);
    if (!status) status = moe__gate_layout(plan, count, training, arena, tape, &memory->gate);
    if (!status) status = moe__select_layout(plan, count, arena, &memory->select);
    if (!status) status = moe__combine_layout(memory, count, arena); /* and the experts */
    if (!status) status = moe__balance_layout(tape, memory, count, arena);
    if (!status) status = moe__codes_layout(memory, count, arena);
    return status;
}
static moe_status moe__tape_layout(moe_tape **out, const moe__plan *plan, size_t n, int training, moe__arena *arena) {
    moe_tape tape, *at = (moe_tape *)moe__take(arena, 1, sizeof tape);
    moe__run_memory memory;
    size_t blocks = moe__ceil_div(n, MOE__TOKENS);
    memset(&tape, 0, sizeof tape);
    memset(&memory, 0, sizeof memory);
    memory.plan = *plan;
    memory.max_tokens = n;
    memory.training = training != MOE_OFF;
    tape.memory = (moe__run_memory *)moe__take(arena, 1, sizeof memory);
    tape.n_slots = plan->S;
    tape.bad_token = SIZE_MAX;
    tape.logits = moe__take_floats(arena, n, plan->E);
    tape.prob = moe__take_floats(arena, n, plan->E);
    tape.index = (int32_t *)(void *)moe__take_floats(arena, n, plan->S);
    tape.weight = moe__take_floats(arena, n, plan->S);
    memory.kept = (uint32_t *)moe__take(arena, n, sizeof(uint32_t));
    memory.sequence_begin = (uint32_t *)moe__take(arena, moe__run_most_sequences(plan, n) + 1, sizeof(uint32_t));
    memory.sequence_of = (uint32_t *)moe__take(arena, n, sizeof(uint32_t));
    memory.tokens = moe__take_floats(arena, n, plan->dp * MOE__W);
    memory.failed = (moe_status *)moe__take(arena, blocks, sizeof(moe_status));
    if (memory.training) memory.d_logits = moe__take_floats(arena, n, plan->E);
    moe_status status = moe__tape_stages(&tape, &memory, n, arena);
    if (!status && arena->overflow) status = MOE_E_OVERFLOW;
    if (status || !arena->base) return status;
    *at = tape;
    *at->memory = memory;
    *out = at;
    return moe_routes_fill(&at->routes, 0, NULL, NULL, 0, MOE_ORDER_DEFAULT);
}

static moe_status moe__tape_bytes(const moe_desc *desc, size_t count, int training, moe__plan *plan, size_t *bytes) {
    moe__arena arena = {NULL, 0, 0};
    moe_status status = moe__desc_plan(desc, plan);
    if (!status && (training < MOE_OFF || training > MOE_ON)) status = MOE_E_TRAINING;
    if (!status) status = moe__tape_layout(NULL, plan, count, training, &arena);
    if (!status) status = moe__arena_bytes(&arena, bytes);
    return status;
}

MOE_API moe_status moe_tape_size(const moe_desc *desc, size_t max_tokens, int training, size_t *bytes) {
    moe__plan plan;
    return bytes ? moe__tape_bytes(desc, max_tokens, training, &plan, bytes) : MOE_E_NULL_OUT;
}

MOE_API moe_status moe_tape_init(moe_tape **out, const moe_desc *desc, size_t max_tokens, int training, void *memory,
                                 size_t bytes) {
    moe__plan plan;
    size_t needed;
    moe__arena arena;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status status = moe__tape_bytes(desc, max_tokens, training, &plan, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__tape_layout(out, &plan, max_tokens, training, &arena);
    return status;
}

MOE_API moe_status moe_tape_new(moe_tape **out, const moe_desc *desc, size_t max_tokens, int training) {
    size_t bytes;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status status = moe_tape_size(desc, max_tokens, training, &bytes);
    if (status) return status;
    void *memory = moe__alloc(desc->alloc_context, bytes);
    if (!memory) return MOE_E_NO_MEMORY;
    status = moe_tape_init(out, desc, max_tokens, training, memory, bytes);
    if (status) moe__free(desc->alloc_context, memory);
    else (*out)->memory->own = memory;
    return status;
}

MOE_API void moe_tape_free(moe_tape *tape) {
    if (tape && tape->memory->own) moe__free(tape->memory->plan.desc.alloc_context, tape->memory->own);
}

/* ==== >>passes ================================================================================
 * The pipeline's two directions as lists of stages: the router's forward and backward, the experts' forward and
 * backward. A layer (next room) and level 2 make a run and call these. Uses all stages.
 *
 *     x --pack--> [jitter, mean] --score--> [residual, noise] --gate--> [view] --select--> weights --> routes
 */
/* A run over a tape, which must fit the plan: its memory; the rest of the desc may differ. */
static moe_status moe__pass_run(moe__run *run, const moe__plan *plan, moe_tape *tape) {
    if (!tape) return MOE_E_NULL_TAPE;
    const moe_side *side = &tape->side;
    moe__run_given given = {side->step, side->draw, side->bias, side->experts, side->d_experts};
    if (plan != &tape->memory->plan && !moe__desc_same_memory(plan, &tape->memory->plan)) return MOE_E_TAPE_DESC;
    moe__run_begin(run, plan, tape);
    run->given = given;
    return MOE_OK;
}

/* What holds for this forward: the schedules' values, the one draw of gating dropout, what the selection sees. The desc
 * is resolved: the schedules cannot fail. */
static moe_status moe__pass_temperatures(const moe__run *run) {
    const moe_desc *desc = run->desc;
    moe__run_now *now = &run->memory->now;
    const float *scale = moe__run_tensor(run, MOE__R_SCALE);
    float temperature = desc->temperature, given = run->tape->side.temperature;
    if (desc->temperature_end != 0.0f)
        (void)moe_schedule_temperature(desc->schedule, run->given.step, desc->schedule_steps, desc->temperature,
                                       desc->temperature_end, &temperature);
    if (given != 0.0f && !moe__temperature_ok(given)) return MOE_E_TEMPERATURE;
    if (given != 0.0f) temperature = given;
    now->prob_t = temperature;
    now->inv_t = now->prob_inv_t = 1.0f / temperature;
    if (!scale || given != 0.0f) return MOE_OK;
    if (!moe__finite(*scale)) return MOE_E_NAN_ROUTER;
    float limit = 20.0f, within = *scale; /* e^20, e^-20: sharper or softer than these no float32 can tell */
    if (within > limit) within = limit;
    if (within < -limit) within = -limit;
    run->kernels->exp(1, &within, &now->inv_t);
    return MOE_OK;
}
static moe_status moe__pass_now(const moe__run *run) {
    const moe_desc *desc = run->desc;
    const moe_side *side = &run->tape->side;
    moe__run_now *now = &run->memory->now;
    uint64_t step = run->given.step;
    float draw;
    memset(now, 0, sizeof *now);
    if (run->given.bias && !moe__all_finite(run->plan->E, run->given.bias)) return MOE_E_NAN_BIAS;
    now->training = !side->evaluate && desc->training != MOE_OFF;
    now->draw = run->given.draw;
    now->random = now->training && step < desc->random_steps;
    now->k = desc->top_k;
    if (side->top_k) now->k = moe__min(side->top_k, desc->top_k);
    else if (now->training && desc->schedule_steps)
        (void)moe_schedule_k(desc->schedule, step, desc->schedule_steps, desc->top_k_min, desc->top_k, &now->k);
    moe_status status = moe__pass_temperatures(run);
    if (status) return status;
    if (now->training && desc->gate_drop > 0.0f) {
        moe__uniform_at(MOE__DRAW_KEY(run), moe__run_stream_of(0, MOE__USE_GATE_DROP), step, 1, 0.0f, 1.0f, &draw);
        now->skip = draw < desc->gate_drop && desc->gate_drop_experts == MOE_ON;
        now->local = draw < desc->gate_drop && !now->skip;
    }
    run->tape->dropped = now->local || now->skip;
    run->memory->select.seen = moe__select_selection_base(run);
    if (now->random || now->local || run->given.bias) run->memory->select.seen = run->memory->select.view;
    return MOE_OK;
}

/* Which of n given tokens the pipeline sees. Only here, and where the caller's arrays are read or written, is there a
 * mask: all stages run over the kept tokens alone, as if the others had never been in the batch.
 *
 *     x:  a . b . . c  --kept 0, 2, 5-->  a b c  --pipeline-->  y:  a b c 0 0 0  --moe__pass_apart-->  a 0 b 0 0 c */
static void moe__pass_keep(moe__run *run, size_t n) {
    moe_tape *tape = run->tape;
    const unsigned char *mask = tape->side.mask;
    tape->n_tokens = tape->n_given = n;
    tape->kept = run->kept = NULL;
    if (!mask) return;
    tape->n_tokens = 0;
    for (size_t i = 0; i < n; i++)
        if (mask[i]) run->memory->kept[tape->n_tokens++] = (uint32_t)i;
    tape->kept = run->kept = run->memory->kept;
}
static void moe__pass_swap(const moe__run *run, float *rows, size_t i) {
    size_t d = run->plan->d;
    float *a = rows + i * d, *b = rows + run->kept[i] * d;
    for (size_t c = 0; c < d && a != b; c++) {
        float other = a[c];
        a[c] = b[c];
        b[c] = other;
    }
}
/* The kept rows (n_given, d) change places with the first ones; and back. NULL: nothing. */
static void moe__pass_together(const moe__run *run, float *rows) {
    if (!run->kept || !rows) return;
    for (size_t i = 0; i < run->tape->n_tokens; i++) moe__pass_swap(run, rows, i);
}
static void moe__pass_apart(const moe__run *run, float *rows) {
    if (!run->kept || !rows) return;
    for (size_t i = run->tape->n_tokens; i-- > 0;) moe__pass_swap(run, rows, i);
}
static void moe__pass_y(const moe__run *run, float *y) { /* a masked token's y is 0 */
    size_t at = run->tape->n_tokens * run->plan->d, end = run->tape->n_given * run->plan->d;
    if (run->kept && end > at) memset(y + at, 0, (end - at) * sizeof(float));
    moe__pass_apart(run, y);
}
/* The sequences of the kept tokens; one that has none is not there. */
static moe_status moe__pass_sequences(const moe__run *run) {
    const moe_side *side = &run->tape->side;
    moe__run_memory *memory = run->memory;
    const size_t *begin = side->sequence_begin;
    size_t length = run->desc->sequence, most = moe__run_most_sequences(run->plan, memory->max_tokens);
    size_t count = 0, sequence = 0, last = SIZE_MAX, next = 0;
    for (size_t i = 0; begin && i < side->n_sequences; i++)
        if (i ? begin[i] < begin[i - 1] || begin[i] > run->tape->n_given : begin[0]) return MOE_E_SEQUENCE_BEGIN;
    for (size_t t = 0; t < run->tape->n_tokens; t++) {
        size_t row = moe__run_row(run, t);
        while (begin && next < side->n_sequences && begin[next] <= row) sequence = next++;
        if (!begin && length) sequence = row / length;
        if (sequence != last && count == most) return MOE_E_N_SEQUENCES;
        if (sequence != last) memory->sequence_begin[count++] = (uint32_t)t;
        last = sequence;
        memory->sequence_of[t] = (uint32_t)count - 1;
    }
    memory->sequence_begin[count] = (uint32_t)run->tape->n_tokens;
    memory->n_sequences = count;
    return MOE_OK;
}
/* A run over n tokens x. */
static moe_status moe__pass_begin(moe__run *run, const float *x, size_t n) {
    moe__run_memory *memory = run->memory;
    if (n > memory->max_tokens) return MOE_E_N_TOKENS;
    if (n && !x) return MOE_E_NULL_X;
    memory->state = 0;
    if (memory->codes) memory->codes->ready = 0;
    moe__pass_keep(run, n);
    run->tape->routes.n_tokens = run->tape->routes.n_routes = 0;
    run->tape->bad_token = SIZE_MAX;
    run->x = x;
    return moe__pass_sequences(run);
}

/* -- what the router sees, score.x: the tokens, or with jitter (panel p of x times the numbers of `row`), or their
 * means -- */
static void moe__pass_jitter(const moe__run *run, size_t row, size_t p, float *x) {
    float factor[MOE__W], width = run->desc->jitter;
    size_t cols = moe__run_columns(run, p);
    if (!run->plan->jitter || !run->memory->now.training) return;
    moe__run_uniforms(run, MOE__USE_JITTER, (uint64_t)row * run->plan->d + p * MOE__W, cols, 1.0f - width,
                      1.0f + width, factor);
    for (size_t c = 0; c < cols; c++) x[c] *= factor[c];
}
static float *moe__pass_seen(const moe__run *run, size_t p, size_t token) {
    return run->memory->score.x + (p * run->tape->n_tokens + token) * MOE__W;
}
static void moe__pass_tokens(const moe__run *run, size_t t0, size_t t1) {
    moe__run_pack_tokens(run, t0, t1);
    if (run->memory->score.x == run->memory->tokens || run->plan->by_sequence) return;
    for (size_t p = 0; p < run->plan->dp; p++)
        memcpy(moe__pass_seen(run, p, t0), moe__run_token(run, p, t0), (t1 - t0) * MOE__W * sizeof(float));
    for (size_t token = t0; token < t1; token++)
        for (size_t p = 0; p < run->plan->dp; p++) moe__pass_jitter(run, token, p, moe__pass_seen(run, p, token));
}
static void moe__pass_sequence(const moe__run *run, size_t i) { /* score.x of a sequence's tokens = their mean */
    size_t t0 = moe__run_sequence_begin(run, i), t1 = moe__run_sequence_end(run, i);
    for (size_t p = 0; p < run->plan->dp; p++) {
        float *mean = moe__pass_seen(run, p, t0);
        memset(mean, 0, MOE__W * sizeof(float));
        for (size_t token = t0; token < t1; token++)
            run->kernels->axpy(MOE__W, 1.0f, moe__run_token(run, p, token), mean);
        for (size_t c = 0; c < MOE__W; c++) mean[c] = mean[c] / (float)(t1 - t0);
        moe__pass_jitter(run, i, p, mean);
        for (size_t token = t0 + 1; token < t1; token++)
            memcpy(moe__pass_seen(run, p, token), mean, MOE__W * sizeof(float));
    }
}
/* dx += the gradient by score.x, back through jitter and mean */
static void moe__pass_jitter_back(const moe__run *run, size_t row, float *dx) {
    for (size_t p = 0; p < run->plan->dp; p++) moe__pass_jitter(run, row, p, dx + p * MOE__W);
}
static void moe__pass_tokens_back(const moe__run *run, size_t t0, size_t t1) {
    size_t d = run->plan->d;
    for (size_t token = t0; token < t1; token++) {
        moe__pass_jitter_back(run, token, run->memory->score.dx + token * d);
        run->kernels->axpy(d, 1.0f, run->memory->score.dx + token * d, run->dx + token * d);
    }
}
static void moe__pass_sequence_back(const moe__run *run, size_t i) {
    size_t d = run->plan->d, t0 = moe__run_sequence_begin(run, i), t1 = moe__run_sequence_end(run, i);
    float *first = run->memory->score.dx + t0 * d;
    for (size_t token = t0; token < t1; token++) moe__pass_jitter_back(run, i, run->memory->score.dx + token * d);
    for (size_t token = t0 + 1; token < t1; token++)
        run->kernels->axpy(d, 1.0f, run->memory->score.dx + token * d, first);
    for (size_t token = t0; token < t1; token++)
        run->kernels->axpy(d, 1.0f / (float)(t1 - t0), first, run->dx + token * d);
}

/* -- the router's forward -- */
/* After the score: is every number of a block of tokens finite? A blind score has not looked at x. */
static int moe__pass_finite(const moe__run *run, size_t t0, size_t t1) {
    const float *soft = run->memory->combine.soft;
    if (soft && !moe__all_finite((t1 - t0) * run->plan->N, soft + t0 * run->plan->N)) return 0;
    if (!moe__score_table[run->desc->score].blind) return 1;
    for (size_t p = 0; p < run->plan->dp; p++)
        if (!moe__all_finite((t1 - t0) * MOE__W, moe__run_token(run, p, t0))) return 0;
    return 1;
}
static void moe__pass_weights(const moe__run *run, size_t t0, size_t t1) { /* after a selection */
    moe__select_filter(run, t0, t1);
    moe__gate_weights(run, t0, t1);
}
static int moe__pass_logits_finite(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E;
    return moe__all_finite((t1 - t0) * E, run->tape->logits + t0 * E);
}
static int moe__pass_y_finite(const moe__run *run, size_t t0, size_t t1) {
    size_t d = run->plan->d;
    return run->kernels->all_finite((t1 - t0) * d, run->y + t0 * d);
}
static int moe__pass_ok(const moe__run *run, moe_status about, size_t t0, size_t t1) {
    if (about == MOE_E_NAN_Y) return moe__pass_y_finite(run, t0, t1);
    return moe__pass_finite(run, t0, t1) && moe__pass_logits_finite(run, t0, t1);
}
/* After a pass over the blocks: what went wrong first, and with which token. */
static moe_status moe__pass_failed(const moe__run *run) {
    size_t n = run->tape->n_tokens;
    for (size_t i = 0; i < moe__ceil_div(n, MOE__TOKENS); i++) {
        moe_status status = run->memory->failed[i];
        size_t token = MOE__BLOCK_BEGIN(i);
        if (!status) continue;
        while (token + 1 < MOE__BLOCK_END(i, n) && moe__pass_ok(run, status, token, token + 1)) token++;
        run->tape->bad_token = moe__run_row(run, token);
        return status;
    }
    return MOE_OK;
}
static void moe__pass_route_block(const moe__run *run, size_t t0, size_t t1) {
    size_t E = run->plan->E, S = run->plan->S, count = (t1 - t0) * E;
    const moe__score_row *score = &moe__score_table[run->desc->score];
    float *z = run->tape->logits + t0 * E;
    moe_status *failed = run->memory->failed + t0 / MOE__TOKENS;
    memset(run->tape->index + t0 * S, 0xff, (t1 - t0) * S * sizeof(int32_t)); /* -1: whatever fails, no choice */
    *failed = MOE_E_NAN_X;
    score->forward(run, t0, t1);
    if (!moe__pass_finite(run, t0, t1)) return;
    moe__combine_soft_weights(run, t0, t1);
    moe__score_residual_add(run, t0, t1);
    moe__noise_add(run, t0, t1);
    if (score->relu)
        for (size_t i = 0; i < count; i++)
            if (z[i] < 0.0f) z[i] = 0.0f;
    if (!moe__pass_logits_finite(run, t0, t1)) return;
    for (size_t token = t0; token < t1; token++)
        run->kernels->softmax(E, run->memory->now.prob_inv_t, run->tape->logits + token * E,
                              run->tape->prob + token * E);
    moe__gate_scores(run, t0, t1);
    moe__select_view(run, t0, t1);
    *failed = MOE_OK;
    if (!moe__select_table[run->desc->select].select) return;
    *failed = moe__select_table[run->desc->select].select(run, t0, t1);
    if (!*failed) moe__pass_weights(run, t0, t1);
}
static void moe__pass_pack_and_route(const moe__run *run, size_t t0, size_t t1) {
    moe__pass_tokens(run, t0, t1);
    moe__pass_route_block(run, t0, t1);
}

static size_t moe__pass_capacity(const moe_desc *desc, size_t n_tokens, int training) {
    float factor = training ? desc->capacity_factor : desc->capacity_factor_eval;
    if (factor < 0.0f || !n_tokens) return 0;
    double pairs = (double)factor * (double)desc->top_k, capacity = pairs * (double)n_tokens / (double)desc->n_experts;
    if (desc->capacity_round == MOE_ROUND_SHARE)
        capacity = pairs * (double)moe__ceil_div(n_tokens, desc->n_experts);
    capacity = (double)(float)capacity; /* 0.7f is not 0.7, but 10 times 0.7f is 7 as a float */
    if (capacity >= (double)MOE_NONE) return 0;
    if (desc->capacity_round == MOE_ROUND_NEAREST) capacity = rint(capacity);
    if (desc->capacity_round == MOE_ROUND_UP) capacity = ceil(capacity);
    return moe__max(desc->min_capacity, (size_t)capacity);
}

/* run has the router's parameters. */
static moe_status moe__pass_route(moe__run *run, const float *x, size_t n) {
    const moe_desc *desc = run->desc;
    moe_tape *tape = run->tape;
    moe__run_memory *memory = run->memory;
    const moe__score_row *score = &moe__score_table[desc->score];
    const moe__select_row *select = &moe__select_table[desc->select];
    moe_status status = moe__pass_begin(run, x, n);
    if (status) return status;
    n = tape->n_tokens;
    if (!run->router && run->plan->at[MOE__R_COUNT]) return MOE_E_NULL_PARAMS;
    if (score->experts && !run->given.experts) return MOE_E_NULL_EXPERTS;
    status = moe__pass_now(run);
    if (status) return status;
    if (select->even && memory->now.training && n % desc->n_experts) return MOE_E_UNEVEN;
    /* the common case in one pass over the tokens; what prepares over the whole batch needs all of them first */
    int one_pass = memory->score.x == memory->tokens && score->latent.act == MOE__RAW &&
        !moe__noise_table[desc->noise].learned;
    if (!one_pass) moe__run_over_blocks(run, moe__pass_tokens);
    if (run->plan->by_sequence)
        moe__run_over_sequences(run, run->plan->d, moe__pass_sequence);
    moe__noise_prepare(run); /* before the score: their matrices share a place */
    if (score->prepare) score->prepare(run);
    moe__run_over_blocks(run, one_pass ? moe__pass_pack_and_route : moe__pass_route_block);
    status = moe__pass_failed(run);
    if (status) return status;
    if (memory->combine.soft)
        moe__run_over_sequences(run, run->plan->N * 16, moe__combine_soft_dispatch);
    if (select->batch && n) {
        status = select->batch(run);
        if (status) return status;
        moe__run_over_blocks(run, moe__pass_weights);
    }
    int apart = desc->capacity_sequence == MOE_ON && desc->sequence;
    size_t capacity = moe__pass_capacity(desc, apart ? moe__min(n, desc->sequence) : n, memory->now.training);
    status = moe__routes_fill(&tape->routes, n, tape->index, tape->weight, capacity,
                              apart ? memory->sequence_of : NULL, desc->capacity_order);
    if (!status) memory->state = MOE__STATE_TOKENS | MOE__STATE_ROUTED;
    return status;
}

/* -- the router's backward: weights -> scores -> logits -> noise -> what the score read -> x. The losses come in where
 * their gradient is: on the weights, the logits, or the noise. -- */
static void moe__pass_slots_back(const moe__run *run, size_t t0, size_t t1) {
    size_t S = run->plan->S, E = run->plan->E;
    for (size_t i = t0 * S; i < t1 * S; i++) {
        uint32_t route = run->tape->routes.slot[i];
        float *d_weight = run->memory->gate.d_weight + i;
        *d_weight = 0.0f;
        if (run->weight_grad && route != MOE_NONE) *d_weight = run->weight_grad[route];
    }
    memset(run->memory->d_logits + t0 * E, 0, (t1 - t0) * E * sizeof(float));
}
/* To d_logits; soft slots to theirs. */
static moe_status moe__pass_logits_back(const moe__run *run, const uint64_t *load) {
    size_t count = run->tape->n_tokens * run->plan->E;
    moe__run_over_blocks(run, moe__pass_slots_back);
    moe_status status = moe__balance_add(run, load, MOE__LOSS_ON_WEIGHTS);
    if (status) return status;
    if (run->memory->combine.soft) moe__combine_soft_back(run);
    else {
        moe__run_over_blocks(run, moe__gate_weights_back);
        moe__gate_params_back(run);
    }
    status = moe__balance_add(run, load, MOE__LOSS_ON_LOGITS);
    if (status) return status;
    moe__combine_soft_losses_back(run);
    if (moe__score_table[run->desc->score].relu)
        for (size_t i = 0; i < count; i++)
            if (!(run->tape->logits[i] > 0.0f)) run->memory->d_logits[i] = 0.0f;
    return MOE_OK;
}
/* run has the router's parameters. */
static moe_status moe__pass_route_back(moe__run *run, const float *d_weight, float *d_router, float *dx) {
    const moe_desc *desc = run->desc;
    moe_tape *tape = run->tape;
    moe__run_memory *memory = run->memory;
    const moe__score_row *score = &moe__score_table[desc->score];
    size_t n = tape->n_tokens;
    if (!run->router && run->plan->at[MOE__R_COUNT]) return MOE_E_NULL_PARAMS;
    if (!(memory->state & MOE__STATE_ROUTED) || !memory->training) return MOE_E_NO_FORWARD;
    moe_status status = moe__balance_ready(run);
    if (!status) status = moe_mean_scores(n, run->plan->E, tape->prob, memory->losses.mean);
    if (status) return status;
    run->weight_grad = d_weight;
    run->mean = tape->side.mean ? tape->side.mean : memory->losses.mean;
    run->d_router = desc->freeze_router == MOE_ON ? NULL : d_router;
    run->dx = dx;
    if (dx && memory->score.dx) run->dx = memory->score.dx;
    const uint64_t *load = tape->routes.load;
    if (tape->side.load) load = tape->side.load;
    for (int i = 0; i < MOE_LOSS_COUNT; i++) tape->loss[i] = 0.0;
    status = moe__pass_logits_back(run, load);
    if (status) return status;
    moe__score_residual_backward(run);
    moe__noise_backward(run);
    status = moe__balance_add(run, load, MOE__LOSS_ON_NOISE);
    if (status) return status;
    if (run->dx != dx) memset(run->dx, 0, n * run->plan->d * sizeof(float));
    if (score->backward) score->backward(run);
    moe__noise_backward_map(run);
    if (run->dx == dx) return MOE_OK;
    run->dx = dx;
    if (!run->plan->by_sequence) moe__run_over_blocks(run, moe__pass_tokens_back);
    else moe__run_over_sequences(run, run->plan->d, moe__pass_sequence_back);
    return MOE_OK;
}

/* -- the experts': run has their parameters -- */
static void moe__pass_y_block(const moe__run *run, size_t t0, size_t t1) {
    run->memory->failed[t0 / MOE__TOKENS] = moe__pass_y_finite(run, t0, t1) ? MOE_OK : MOE_E_NAN_Y;
}
/* y is whole: with a number in it that is not finite there is nothing to go back from. */
static moe_status moe__pass_outputs(const moe__run *run) {
    moe__run_over_blocks(run, moe__pass_y_block);
    moe_status status = moe__pass_failed(run);
    if (status) run->memory->state &= ~MOE__STATE_FORWARD;
    return status;
}
static moe_status moe__pass_experts(moe__run *run, float *y) {
    moe__run_memory *memory = run->memory;
    const moe_routes *routes = &run->tape->routes;
    int soft = memory->combine.soft != NULL, in_place = moe__combine_table[run->desc->combine].by_sequence;
    if (!run->params) return MOE_E_NULL_PARAMS;
    if (!(memory->state & MOE__STATE_TOKENS) || routes->n_tokens != run->tape->n_tokens) return MOE_E_NO_ROUTES;
    if (soft && !(memory->state & MOE__STATE_ROUTED)) return MOE_E_NO_ROUTES; /* the slots' weights */
    if (!soft && !in_place && routes->n_routes > memory->n_routed) return MOE_E_N_TOKENS;
    if (run->tape->n_given && !y) return MOE_E_NULL_Y;
    run->y = y;
    memory->n_routes = routes->n_routes;
    if (run->plan->view && !(memory->state & MOE__STATE_VIEW)) moe__run_over_blocks(run, moe__experts_view);
    memory->state |= MOE__STATE_VIEW;
    moe__combine_forward(run);
    if (memory->training) memory->state |= MOE__STATE_FORWARD;
    return moe__pass_outputs(run);
}
/* The loss on the outputs of a block of tokens, while they are there: its gradient by them, and each weight's gradient.
 * */
static void moe__pass_output_loss(const moe__run *run, size_t t0, size_t t1) {
    const moe__run_losses *losses = &run->memory->losses;
    size_t S = run->plan->S, d = run->plan->d, T = run->tape->n_tokens, ld = run->plan->ldo, block = t0 / MOE__TOKENS;
    float *out = losses->outputs + block * 2 * S * d, *d_out = out + S * d;
    float coefficient = moe__balance_coefficient(run, MOE_LOSS_OUTPUT_ORTHOGONALITY) / (float)T;
    losses->block_loss[block] = 0.0;
    for (size_t token = t0; token < t1; token++) {
        const uint32_t *slot = run->tape->routes.slot + token * S;
        size_t n = 0;
        double value = 0.0;
        for (size_t s = 0; s < S; s++)
            if (slot[s] != MOE_NONE) memcpy(out + n++ * d, run->memory->experts.out + slot[s] * ld, d * sizeof(float));
        memset(d_out, 0, n * d * sizeof(float));
        moe_loss_args args;
        memset(&args, 0, sizeof args);
        args.n_tokens = 1;
        args.top_k = n;
        args.d_model = d;
        args.outputs = out;
        args.d_outputs = d_out;
        if (n) (void)moe_loss(MOE_LOSS_OUTPUT_ORTHOGONALITY, &args, coefficient, &value);
        losses->block_loss[block] += value / (double)T;
        n = 0;
        for (size_t s = 0; s < S; s++) {
            if (slot[s] == MOE_NONE) continue;
            memset(losses->d_out + slot[s] * ld, 0, ld * sizeof(float));
            memcpy(losses->d_out + slot[s] * ld, d_out + n * d, d * sizeof(float));
            if (run->d_weight) run->d_weight[slot[s]] = run->kernels->dot(d, moe__run_dy(run, token), out + n * d);
            n++;
        }
    }
}
/* The gradient by the outputs is not the weight times dy then: the weights go into dy when it is gathered, with the
 * outputs' own gradient. */
static void moe__pass_output_losses(const moe__run *run) {
    moe__run_losses *losses = &run->memory->losses;
    if (!losses->d_out) return;
    moe__run_over_blocks(run, moe__pass_output_loss);
    losses->output_loss = 0.0;
    for (size_t i = 0; i < moe__ceil_div(run->tape->n_tokens, MOE__TOKENS); i++)
        losses->output_loss += losses->block_loss[i];
}
/* The gradients are added to d_params, or with run->fresh set. */
static moe_status moe__pass_experts_back(moe__run *run, const float *dy, float *d_params, float *d_weight, float *dx) {
    moe__run_memory *memory = run->memory;
    const moe_routes *routes = &run->tape->routes;
    if (!run->params) return MOE_E_NULL_PARAMS;
    if (!(memory->state & MOE__STATE_FORWARD)) return MOE_E_NO_FORWARD;
    if (routes->n_tokens != run->tape->n_tokens || routes->n_routes != memory->n_routes) return MOE_E_NO_FORWARD;
    if (run->tape->n_given && !dy) return MOE_E_NULL_DY;
    if (!d_params) return MOE_E_NULL_GRADS;
    memory->state &= ~MOE__STATE_FORWARD; /* the tape's activations are used up */
    run->dy = dy;
    run->d_params = d_params;
    run->d_weight = d_weight;
    run->dx = dx;
    moe__pass_output_losses(run);
    if (run->plan->view && dx) {
        run->dx = memory->experts.d_view;
        memset(run->dx, 0, run->tape->n_tokens * run->plan->d * sizeof(float));
    }
    moe__combine_backward(run);
    if (run->dx == dx) return MOE_OK;
    run->dx = dx;
    moe__run_over_blocks(run, moe__experts_view_back);
    return MOE_OK;
}

/* -- level 2: the tape's own plan -- */
static moe_status moe__pass_own(moe__run *run, moe_tape *tape, const float *router, const float *params) {
    if (!tape) return MOE_E_NULL_TAPE;
    moe_status status = moe__pass_run(run, &tape->memory->plan, tape);
    run->router = router;
    run->params = params;
    return status;
}
MOE_API moe_status moe_route(moe_tape *tape, const float *router, const float *x, size_t n_tokens) {
    moe__run run;
    moe_status status = moe__pass_own(&run, tape, router, NULL);
    if (!status) status = moe__pass_route(&run, x, n_tokens);
    return status;
}
MOE_API moe_status moe_route_backward(moe_tape *tape, const float *router, const float *d_weight, float *d_router,
                                      float *dx) {
    moe__run run;
    moe_status status = moe__pass_own(&run, tape, router, NULL);
    if (status) return status;
    moe__pass_together(&run, dx);
    status = moe__pass_route_back(&run, d_weight, d_router, dx);
    moe__pass_apart(&run, dx);
    return status;
}
MOE_API moe_status moe_tape_tokens(moe_tape *tape, const float *x, size_t n_tokens) {
    moe__run run;
    moe_status status = moe__pass_own(&run, tape, NULL, NULL);
    if (!status) status = moe__pass_begin(&run, x, n_tokens);
    if (status) return status;
    status = moe__pass_now(&run);
    if (status) return status;
    moe__run_over_blocks(&run, moe__pass_tokens);
    tape->memory->state = MOE__STATE_TOKENS;
    return MOE_OK;
}
MOE_API moe_status moe_experts_forward(moe_tape *tape, const float *params, float *y) {
    moe__run run;
    moe_status status = moe__pass_own(&run, tape, NULL, params);
    if (!status) status = moe__pass_experts(&run, y);
    if (!status) moe__pass_y(&run, y);
    return status;
}
MOE_API moe_status moe_experts_backward(moe_tape *tape, const float *params, const float *dy, int fresh,
                                        float *d_params, float *d_weight, float *dx) {
    moe__run run;
    moe_status status = moe__pass_own(&run, tape, NULL, params);
    if (status) return status;
    run.fresh = fresh;
    moe__pass_together(&run, dx);
    status = moe__pass_experts_back(&run, dy, d_params, d_weight, dx);
    moe__pass_apart(&run, dx);
    return status;
}
MOE_API moe_status moe_tape_index(const moe_tape *tape, int32_t *out) {
    if (!tape) return MOE_E_NULL_TAPE;
    if (!(tape->memory->state & MOE__STATE_ROUTED)) return MOE_E_NO_ROUTES;
    size_t S = tape->n_slots;
    if (tape->n_given && !out) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < tape->n_given * S; i++) out[i] = -1;
    for (size_t t = 0; t < tape->n_tokens; t++)
        memcpy(out + (tape->kept ? tape->kept[t] : t) * S, tape->index + t * S, S * sizeof *out);
    return MOE_OK;
}

/* -- the parameters' shapes -- */
MOE_API moe_status moe_experts_count(const moe_desc *desc, size_t *n_floats) {
    moe__plan plan;
    if (!n_floats) return MOE_E_NULL_OUT;
    moe_status status = moe__desc_plan(desc, &plan);
    if (!status) *n_floats = plan.experts;
    return status;
}
MOE_API moe_status moe_router_count(const moe_desc *desc, size_t *n_floats) {
    moe__plan plan;
    if (!n_floats) return MOE_E_NULL_OUT;
    moe_status status = moe__desc_plan(desc, &plan);
    if (!status) *n_floats = plan.at[MOE__R_COUNT];
    return status;
}
MOE_API moe_status moe_desc_tensor(const moe_desc *desc, size_t i, moe_tensor *out) {
    moe__plan plan;
    if (!out) return MOE_E_NULL_OUT;
    moe_status status = moe__desc_plan(desc, &plan);
    if (status) return status;
    return moe__plan_tensor_at(&plan, i, out) < 0 ? MOE_E_NAME : MOE_OK;
}

static moe_status moe__pass_expert_plan(const moe_desc *desc, size_t e, const void *arrays, const float *params,
                                        moe__plan *plan) {
    moe_status status = moe__desc_plan(desc, plan);
    if (status) return status;
    if (e >= plan->G) return MOE_E_INDEX;
    if (!arrays) return MOE_E_NULL_WEIGHT;
    return params ? MOE_OK : MOE_E_NULL_PARAMS;
}
MOE_API moe_status moe_expert_pack(const moe_desc *desc, size_t e, const moe_expert_weights *weights, float *params) {
    moe__plan plan;
    moe_status status = moe__pass_expert_plan(desc, e, weights, params, &plan);
    if (status) return status;
    const float *const from[] = {weights->w1, weights->wu, weights->w2, weights->b1, weights->bu, weights->b2};
    memset(params + e * plan.expert, 0, plan.expert * sizeof(float));
    for (int id = MOE__T_W1; id <= MOE__T_B2; id++) {
        const float *in = from[id - MOE__T_W1];
        size_t rows = moe__plan_rows(&plan, id);
        if (in && plan.count[id]) moe__plan_write(&plan, id, params, e * rows, rows, in);
    }
    return MOE_OK;
}
MOE_API moe_status moe_expert_unpack(const moe_desc *desc, size_t e, const float *params,
                                     const moe_expert_arrays *arrays) {
    moe__plan plan;
    moe_status status = moe__pass_expert_plan(desc, e, arrays, params, &plan);
    if (status) return status;
    float *const to[] = {arrays->w1, arrays->wu, arrays->w2, arrays->b1, arrays->bu, arrays->b2};
    for (int id = MOE__T_W1; id <= MOE__T_B2; id++) {
        float *out = to[id - MOE__T_W1];
        size_t rows = moe__plan_rows(&plan, id);
        if (out && plan.count[id]) moe__plan_read(&plan, id, params, e * rows, rows, out);
    }
    return MOE_OK;
}

/* ==== >>layer =================================================================================
 * Level 3: parameters, gradients and optimiser state in one block, and a tape that grows. A layer's forward is a run of
 * the passes above with its own parameters; its step is controller, then optimiser. After this room a layer lives; the
 * files know how to keep one.
 *
 *     the block:  layer | parameters | gradients | moments | loads | health | controller [| its scores]
 *     a part:     experts (moe_experts_count floats) | router (moe_router_count)
 */
struct moe_layer {
    moe__plan plan;
    size_t n_floats;               /* experts, then the router */
    float *part[MOE_PART_COUNT];   /* parameters, gradients, moments */
    int fresh;                     /* the gradients count as zero */
    uint64_t step, draws;          /* optimiser steps, training forwards */
    moe_tape *tape;
    moe_side side;
    double loss[MOE_LOSS_COUNT];
    moe_health health;
    moe_control control;
    uint64_t *load, selected, dropped, zeros, counted; /* of the backward calls since the last step: load (E) */
    float *scores;                 /* (most_scored, E) with the quantile controller: of these calls too */
    size_t n_scored, most_scored;  /* tokens */
    void *scratch;                 /* the quantile controller's, in a layer that must not allocate */
    size_t scratch_bytes;
    void *own;                     /* the allocation, if the library made it; then scores are one as well */
};
static float *moe__layer_router(const moe_layer *layer, moe_part_kind part) {
    return layer->part[part] ? layer->part[part] + layer->plan.experts : NULL;
}

/* -- what the controller reads: of every backward since the last step, whatever tape it came from; nothing else moves
 * it -- */
static void moe__layer_count_begin(moe_layer *layer) {
    memset(layer->load, 0, layer->plan.E * sizeof(uint64_t));
    layer->selected = layer->dropped = layer->zeros = layer->counted = 0;
    layer->n_scored = 0;
}
/* Room for the scores of n more tokens, before a backward changes anything. */
static moe_status moe__layer_score_room(moe_layer *layer, size_t count) {
    size_t tokens, bytes, row = layer->plan.E * sizeof(float);
    if (layer->plan.desc.controller != MOE_CONTROL_QUANTILE) return MOE_OK;
    if (!moe__add_size(layer->n_scored, count, &tokens) || !moe__mul(tokens, row, &bytes)) return MOE_E_OVERFLOW;
    if (tokens <= layer->most_scored) return MOE_OK;
    if (!layer->own) return MOE_E_NO_MEMORY;
    float *bigger = (float *)moe__alloc(layer->plan.desc.alloc_context, bytes);
    if (!bigger) return MOE_E_NO_MEMORY;
    if (layer->n_scored) memcpy(bigger, layer->scores, layer->n_scored * row);
    moe__free(layer->plan.desc.alloc_context, layer->scores);
    layer->scores = bigger;
    layer->most_scored = tokens;
    return MOE_OK;
}
static void moe__layer_count_add(moe_layer *layer, const moe_tape *tape) {
    size_t E = layer->plan.E, count = tape->n_tokens * E;
    if (layer->plan.desc.controller == MOE_CONTROL_NONE) return;
    for (size_t e = 0; e < E; e++) layer->load[e] += tape->routes.load[e];
    layer->selected += tape->routes.n_routes + tape->routes.n_dropped;
    layer->dropped += tape->routes.n_dropped;
    layer->counted += count;
    if (layer->plan.desc.gate == MOE_GATE_RELU)
        for (size_t i = 0; i < count; i++) layer->zeros += !(tape->scores[i] > 0.0f);
    if (layer->plan.desc.controller != MOE_CONTROL_QUANTILE || !count) return;
    memcpy(layer->scores + layer->n_scored * E, tape->scores, count * sizeof(float));
    layer->n_scored += tape->n_tokens;
}
/* The loss whose coefficient a controller sets. */
static int moe__layer_controlled_loss(const moe_desc *desc) {
    return desc->controller == MOE_CONTROL_RELU_LAMBDA ? MOE_LOSS_RELU_L1 : MOE_LOSS_SWITCH;
}
static moe_status moe__layer_control(moe_layer *layer) {
    moe_desc *desc = &layer->plan.desc;
    moe_control_input in;
    memset(&in, 0, sizeof in);
    in.load = layer->load;
    in.top_k = desc->top_k;
    in.scores = layer->scores;
    in.n_tokens = layer->n_scored;
    in.sparsity = 1.0 - (double)in.top_k / (double)layer->plan.E;
    if (layer->counted) in.sparsity = (double)layer->zeros / (double)layer->counted;
    if (layer->selected) in.drop_rate = (double)layer->dropped / (double)layer->selected;
    in.scratch = layer->scratch;
    in.scratch_bytes = layer->scratch_bytes;
    in.alloc_context = desc->alloc_context;
    moe_status status = moe_control_step(&layer->control, &in);
    if (!status && layer->control.coefficient)
        desc->loss[moe__layer_controlled_loss(desc)] = *layer->control.coefficient;
    return status;
}

/* -- initial values -- */
static size_t moe__layer_router_at(const moe__plan *plan, size_t v, size_t r) { return r * plan->N + v; }
static void moe__layer_retract(void *arg, size_t e, size_t worker) {
    const moe_layer *layer = (const moe_layer *)arg;
    (void)worker;
    float *block = layer->part[MOE_PART_PARAMS] + e * layer->plan.expert;
    moe__experts_table[layer->plan.desc.expert].stepped(&layer->plan, block);
}
static void moe__layer_init_expert(void *arg, size_t e, size_t worker) {
    const moe_layer *layer = (const moe_layer *)arg;
    for (int id = MOE__T_W1; id <= MOE__T_B2; id++)
        moe__plan_initial(&layer->plan, id, e, layer->part[MOE_PART_PARAMS]);
    if (moe__experts_table[layer->plan.desc.expert].stepped) moe__layer_retract(arg, e, worker);
}
static void moe__layer_init_others(moe_layer *layer) { /* the router and the constant experts */
    const moe__plan *plan = &layer->plan;
    float *params = layer->part[MOE_PART_PARAMS];
    for (int id = 0; id < MOE__T_COUNT; id++)
        if (moe__plan_tensors[id].region != MOE__IN_EXPERTS) moe__plan_initial(plan, id, 0, params);
    if (!plan->count[MOE__R_ROUTER] || plan->desc.router_init != MOE_INIT_ORTHOGONAL) return;
    params += moe__plan_offset(plan, MOE__R_ROUTER);
    moe__experts_orthogonalize(params, plan->N, plan->L, moe__layer_router_at, plan, plan->desc.router_gain);
}
static void moe__layer_zero_span(void *arg, size_t i, size_t worker) {
    moe_layer *layer = (moe_layer *)arg;
    size_t at = i * MOE__SPAN, count = moe__min(MOE__SPAN, layer->n_floats - at);
    (void)worker;
    for (int part = 0; part < MOE_PART_COUNT; part++)
        if (layer->part[part]) memset(layer->part[part] + at, 0, count * sizeof(float));
}

/* -- making one -- */
/* Tokens whose scores the block has room for: none where the library may allocate, else MOE__LAYER_SCORED and what the
 * caller's memory has beyond moe_layer_size. */
#define MOE__LAYER_SCORED 1024
static moe_status moe__layer_layout(moe_layer *layer, const moe__plan *plan, size_t n_scored, moe__arena *arena) {
    const moe_desc *desc = &plan->desc;
    memset(layer, 0, sizeof *layer);
    layer->plan = *plan;
    layer->fresh = 1;
    layer->n_floats = plan->experts + plan->at[MOE__R_COUNT];
    (void)moe__take(arena, 1, sizeof(moe_layer));
    for (int i = 0; i < MOE_PART_COUNT; i++) {
        if (i > 0 && desc->training == MOE_OFF) continue;
        if (i == MOE_PART_MOMENT2 && desc->optimizer == MOE_OPTIMIZER_SGD) continue;
        layer->part[i] = (float *)moe__take(arena, layer->n_floats, sizeof(float));
    }
    layer->load = (uint64_t *)moe__take(arena, plan->E, sizeof(uint64_t));
    moe_status status = moe__health_layout(&layer->health, plan->E, arena);
    if (!status) status = moe__control_layout(&layer->control, desc->controller, plan->E, arena);
    if (!status && desc->controller == MOE_CONTROL_QUANTILE && desc->training != MOE_OFF && n_scored) {
        status = moe_control_scratch(&layer->control, n_scored, &layer->scratch_bytes);
        layer->scratch = moe__take(arena, layer->scratch_bytes, 1);
        layer->scores = moe__take_floats(arena, n_scored, plan->E);
        layer->most_scored = n_scored;
    }
    if (!status && arena->overflow) status = MOE_E_OVERFLOW;
    if (status || !arena->base) return status;
    moe__layer_count_begin(layer);
    if (desc->controller_rate > 0.0f) layer->control.rate = desc->controller_rate;
    if (desc->controller_recentre) layer->control.recentre = desc->controller_recentre == MOE_ON;
    if (desc->controller_damping != 0.0f) layer->control.damping = moe__value(desc->controller_damping, 0.0f);
    if (layer->control.coefficient) *layer->control.coefficient = desc->loss[moe__layer_controlled_loss(desc)];
    return MOE_OK;
}
static moe_status moe__layer_bytes(const moe__plan *plan, size_t n_scored, size_t *bytes) {
    moe_layer layer;
    moe__arena arena = {NULL, 0, 0};
    moe_status status = moe__layer_layout(&layer, plan, n_scored, &arena);
    if (!status) status = moe__arena_bytes(&arena, bytes);
    return status;
}
static moe_status moe__layer_make(moe_layer **out, const moe__plan *plan, size_t n_scored, void *memory, size_t bytes) {
    moe_layer made;
    size_t needed;
    moe__arena arena;
    const moe_parallel *parallel = &plan->desc.parallel;
    moe_status status = moe__layer_bytes(plan, n_scored, &needed);
    if (!status) status = moe__arena_over(&arena, memory, bytes, needed);
    if (!status) status = moe__layer_layout(&made, plan, n_scored, &arena);
    if (status) return status;
    moe_layer *layer = (moe_layer *)(void *)arena.base;
    *layer = made;
    moe_health_reset(&layer->health);
    moe_run(parallel, moe__ceil_div(made.n_floats, MOE__SPAN), moe__layer_zero_span, layer);
    moe__threads_run(parallel, plan->G, plan->expert, plan->G, moe__layer_init_expert, layer);
    moe__layer_init_others(layer);
    *out = layer;
    return MOE_OK;
}

MOE_API moe_status moe_layer_size(const moe_desc *desc, size_t *bytes) {
    moe__plan plan;
    if (!bytes) return MOE_E_NULL_OUT;
    moe_status status = moe__desc_plan(desc, &plan);
    if (!status) status = moe__layer_bytes(&plan, MOE__LAYER_SCORED, bytes);
    return status;
}
MOE_API moe_status moe_layer_init(moe_layer **out, const moe_desc *desc, void *memory, size_t bytes) {
    moe__plan plan;
    size_t needed, n_scored = MOE__LAYER_SCORED, slack = 256; /* for the alignment of what grows */
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status status = moe__desc_plan(desc, &plan);
    if (!status) status = moe__layer_bytes(&plan, n_scored, &needed);
    if (status) return status;
    if (bytes > needed && bytes - needed > slack) n_scored += (bytes - needed - slack) / ((plan.E + 2) * sizeof(float));
    return moe__layer_make(out, &plan, moe__min(n_scored, MOE__MAX_INDEX), memory, bytes);
}
MOE_API moe_status moe_layer_new(moe_layer **out, const moe_desc *desc) {
    moe__plan plan;
    size_t bytes;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    moe_status status = moe__desc_plan(desc, &plan);
    if (!status) status = moe__layer_bytes(&plan, 0, &bytes);
    if (status) return status;
    void *memory = moe__alloc(plan.desc.alloc_context, bytes);
    if (!memory) return MOE_E_NO_MEMORY;
    status = moe__layer_make(out, &plan, 0, memory, bytes);
    if (status) moe__free(plan.desc.alloc_context, memory);
    else (*out)->own = memory;
    return status;
}
MOE_API void moe_layer_free(moe_layer *layer) {
    if (!layer) return;
    moe_tape_free(layer->tape);
    if (!layer->own) return;
    void *context = layer->plan.desc.alloc_context, *own = layer->own;
    moe__free(context, layer->scores);
    moe__free(context, own);
}

/* -- forward and backward -- */
/* A run of the layer over a tape: what the layer knows it gives itself, and leaves the tape's side to the caller. */
static moe_status moe__layer_run(const moe_layer *layer, moe_tape *tape, moe__run *run) {
    moe_status status = moe__pass_run(run, &layer->plan, tape);
    if (status) return status;
    run->router = moe__layer_router(layer, MOE_PART_PARAMS);
    run->params = layer->part[MOE_PART_PARAMS];
    run->given.step = layer->step;
    run->given.bias = layer->control.bias;
    run->given.experts = layer->part[MOE_PART_PARAMS];
    run->given.d_experts = layer->part[MOE_PART_GRADS];
    return MOE_OK;
}
static moe_status moe__layer_forward(const moe_layer *layer, moe_tape *tape, uint64_t draw, const float *x, size_t n,
                                     float *y) {
    moe__run run;
    moe_status status = moe__layer_run(layer, tape, &run);
    if (status) return status;
    run.given.draw = draw;
    status = moe__pass_route(&run, x, n);
    if (!status) status = moe__pass_experts(&run, y);
    if (!status && tape->memory->codes) {
        status = moe__codes_forward(&run);
        if (!status) status = moe__pass_outputs(&run);
    }
    if (!status) moe__pass_y(&run, y);
    return status;
}
MOE_API moe_status moe_forward_tape(const moe_layer *layer, moe_tape *tape, const float *x, size_t count, float *y) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (!tape) return MOE_E_NULL_TAPE;
    if (count && !y) return MOE_E_NULL_Y;
    return moe__layer_forward(layer, tape, tape->side.draw, x, count, y);
}

MOE_API moe_status moe_backward_tape(moe_layer *layer, moe_tape *tape, const float *dy, float *dx) {
    if (!layer) return MOE_E_NULL_LAYER;
    const moe__plan *plan = &layer->plan;
    if (plan->desc.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!tape) return MOE_E_NULL_TAPE;
    const int both = MOE__STATE_ROUTED | MOE__STATE_FORWARD;
    moe__run_codes *codes = tape->memory->codes;
    if ((tape->memory->state & both) != both || (codes && !codes->ready)) return MOE_E_NO_FORWARD;
    if (tape->n_given && !dy) return MOE_E_NULL_DY;
    moe__run run;
    moe_status status = moe__layer_run(layer, tape, &run);
    if (!status) status = moe__balance_ready(&run);
    if (!status) status = moe__layer_score_room(layer, tape->n_tokens);
    if (status) return status;
    float *d_router = moe__layer_router(layer, MOE_PART_GRADS), *d_weight = tape->memory->experts.d_weight;
    if (dx) memset(dx, 0, tape->n_given * plan->d * sizeof(float));
    if (layer->fresh) memset(d_router, 0, plan->at[MOE__R_COUNT] * sizeof(float));
    run.fresh = layer->fresh;
    if (codes) {
        run.dy = dy;
        run.dx = dx;
        run.d_router = plan->desc.freeze_router == MOE_ON ? NULL : d_router;
        dy = moe__codes_split(&run);
        run.dy_kept = NULL; /* this one has the kept rows alone */
    }
    status = moe__pass_experts_back(&run, dy, layer->part[MOE_PART_GRADS], d_weight, dx);
    if (status) return status;
    layer->fresh = 0;
    status = moe__pass_route_back(&run, d_weight, d_router, dx);
    if (!status && codes) moe__codes_backward(&run);
    moe__pass_apart(&run, dx);
    memcpy(layer->loss, tape->loss, sizeof layer->loss);
    if (!status) moe__layer_count_add(layer, tape);
    return status;
}

MOE_API moe_status moe_forward(moe_layer *layer, const float *x, size_t count, float *y) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (count && !x) return MOE_E_NULL_X;
    if (count && !y) return MOE_E_NULL_Y;
    if (layer->tape) layer->tape->memory->state = 0; /* should this forward fail, there is nothing to go back from */
    if (!layer->tape || count > layer->tape->memory->max_tokens) {
        moe_tape *bigger;
        if (!layer->own) return MOE_E_NO_MEMORY;
        moe_status status = moe_tape_new(&bigger, &layer->plan.desc, count, layer->plan.desc.training);
        if (status) return status;
        moe_tape_free(layer->tape);
        layer->tape = bigger;
    }
    layer->tape->side = layer->side;
    moe_status status = moe__layer_forward(layer, layer->tape, layer->draws, x, count, y);
    if (status) return status;
    if (layer->tape->memory->now.training) layer->draws++;
    return moe_health_add(&layer->health, &layer->tape->routes, layer->tape->prob);
}
MOE_API moe_status moe_backward(moe_layer *layer, const float *dy, float *dx) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (layer->plan.desc.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!layer->tape) return MOE_E_NO_FORWARD;
    return moe_backward_tape(layer, layer->tape, dy, dx);
}

/* -- step -- */
MOE_API moe_status moe_layer_grad_norm(const moe_layer *layer, double *norm) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (!norm) return MOE_E_NULL_OUT;
    if (layer->plan.desc.training == MOE_OFF) return MOE_E_INFERENCE;
    *norm = 0.0;
    if (layer->fresh) return MOE_OK;
    *norm = sqrt(moe_sum_squares(&layer->plan.desc.parallel, layer->n_floats, layer->part[MOE_PART_GRADS]));
    return MOE_OK;
}
static void moe__layer_zero_grads(moe_layer *layer) {
    memset(layer->part[MOE_PART_GRADS], 0, layer->n_floats * sizeof(float));
}
typedef struct moe__layer_scale { float *x, factor; size_t n; } moe__layer_scale;
static void moe__layer_scale_span(void *arg, size_t i, size_t worker) {
    const moe__layer_scale *scale = (const moe__layer_scale *)arg;
    size_t end = moe__min(scale->n, (i + 1) * MOE__SPAN);
    (void)worker;
    for (size_t k = i * MOE__SPAN; k < end; k++) scale->x[k] *= scale->factor;
}
MOE_API moe_status moe_layer_scale_grads(moe_layer *layer, float factor) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (layer->plan.desc.training == MOE_OFF) return MOE_E_INFERENCE;
    if (!moe__finite(factor)) return MOE_E_COEFFICIENT;
    if (factor == 0.0f) layer->fresh = 1;
    if (layer->fresh) return MOE_OK;
    moe__layer_scale scale = {layer->part[MOE_PART_GRADS], factor, layer->n_floats};
    moe_run(&layer->plan.desc.parallel, moe__ceil_div(scale.n, MOE__SPAN), moe__layer_scale_span, &scale);
    return MOE_OK;
}

/* Floats [at, end) of the layer, which share weight decay. */
static moe_status moe__layer_step_span(const moe_layer *layer, moe_optimizer_args *args, size_t at, size_t end,
                                       int decay) {
    float *const *part = layer->part;
    float *moment2 = part[MOE_PART_MOMENT2];
    if (moment2) moment2 += at;
    args->weight_decay = (float)MOE_OFF;
    if (decay) args->weight_decay = layer->plan.desc.weight_decay;
    return moe_optimizer_step(args, end - at, part[0] + at, part[1] + at, part[2] + at, moment2);
}
static moe_optimizer_args moe__layer_optimizer(const moe_layer *layer, float lr, double norm) {
    const moe_desc *desc = &layer->plan.desc;
    moe_optimizer_args args;
    memset(&args, 0, sizeof args);
    args.kind = desc->optimizer;
    args.lr = lr;
    args.beta1 = desc->beta1;
    args.beta2 = desc->beta2;
    args.epsilon = desc->epsilon;
    args.momentum = desc->momentum;
    args.scale = 1.0f;
    if (desc->clip_norm > 0.0f && norm > (double)desc->clip_norm) args.scale = (float)((double)desc->clip_norm / norm);
    args.step = layer->step + 1;
    args.parallel = &desc->parallel;
    return args;
}
MOE_API moe_status moe_step(moe_layer *layer, float lr) {
    double norm;
    moe_status status = moe_layer_grad_norm(layer, &norm);
    if (status) return status;
    if (!(lr >= 0.0f) || !moe__finite(lr)) return MOE_E_LR;
    if (!(norm < (double)FLT_MAX)) return MOE_E_NAN_GRADS;
    status = moe__layer_control(layer); /* the only thing here that may still fail comes first */
    if (status) return status;
    moe__layer_count_begin(layer);
    if (layer->fresh) moe__layer_zero_grads(layer);
    const moe__plan *plan = &layer->plan;
    moe_optimizer_args args = moe__layer_optimizer(layer, lr, norm);
    for (size_t at = 0, end; at < layer->n_floats && !status; at = end) {
        int decay; /* -1: a frozen router's, left alone */
        end = moe__plan_span(plan, at, &decay);
        if (decay >= 0) status = moe__layer_step_span(layer, &args, at, end, decay);
    }
    if (status) return status;
    if (moe__experts_table[plan->desc.expert].stepped)
        moe__threads_run(&plan->desc.parallel, plan->G, plan->f * plan->f * plan->d * 4, plan->G, moe__layer_retract,
                         layer);
    layer->step++;
    layer->fresh = 1;
    return MOE_OK;
}

/* -- what it is -- */
MOE_API moe_side *moe_layer_side(moe_layer *layer) { return layer ? &layer->side : NULL; }
MOE_API moe_control *moe_layer_control(moe_layer *layer) { return layer ? &layer->control : NULL; }
MOE_API uint64_t *moe_layer_step_load(moe_layer *layer) { return layer ? layer->load : NULL; }
MOE_API const moe_desc *moe_layer_desc(const moe_layer *layer) { return layer ? &layer->plan.desc : NULL; }
MOE_API const moe_tape *moe_layer_tape(const moe_layer *layer) { return layer ? layer->tape : NULL; }
MOE_API size_t moe_layer_params(const moe_layer *layer) {
    if (!layer) return 0;
    const moe__plan *plan = &layer->plan;
    size_t others = moe__plan_parameters(plan, MOE__IN_CONSTANTS) + moe__plan_parameters(plan, MOE__IN_ROUTER);
    return moe__plan_parameters(plan, MOE__IN_EXPERTS) + others;
}
MOE_API size_t moe_layer_active_params(const moe_layer *layer) {
    if (!layer) return 0;
    const moe__plan *plan = &layer->plan;
    size_t used = moe__combine_used(plan) + plan->G - plan->F;
    used *= moe__plan_parameters(plan, MOE__IN_EXPERTS) / plan->G;
    return used + plan->count[MOE__T_SHARED_GATE] + plan->at[MOE__R_COUNT];
}
MOE_API moe_status moe_layer_health(moe_layer *layer, moe_health *health) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (!health) return MOE_E_NULL_HEALTH;
    moe_status status = moe_health_update(&layer->health);
    *health = layer->health;
    return status;
}
MOE_API moe_status moe_layer_health_reset(moe_layer *layer) {
    return layer ? moe_health_reset(&layer->health) : MOE_E_NULL_LAYER;
}
MOE_API moe_status moe_layer_losses(const moe_layer *layer, double value[MOE_LOSS_COUNT],
                                    double weighted[MOE_LOSS_COUNT]) {
    if (!layer) return MOE_E_NULL_LAYER;
    for (int i = 0; i < MOE_LOSS_COUNT; i++) {
        double coefficient = moe__larger((double)layer->plan.desc.loss[i], 0.0);
        if (value) value[i] = layer->loss[i];
        if (!weighted) continue;
        weighted[i] = 0.0;
        if (coefficient > 0.0) weighted[i] = coefficient * layer->loss[i];
    }
    return MOE_OK;
}

/* The experts that are networks, all of them, on every token: a batch of tokens through a tape of theirs, whose
 * outputs, grouped by expert, are laid out by token. */
enum { MOE__PES_TOKENS = 64 };
typedef struct moe__layer_pes { moe_tape *tape; float *y, *out; int32_t *index; double *work; } moe__layer_pes;
static moe_status moe__layer_pes_layout(moe__layer_pes *pes, size_t tokens, size_t n_experts, size_t d,
                                        moe__arena *arena) {
    size_t rows;
    if (!moe__mul(tokens, n_experts, &rows)) return MOE_E_OVERFLOW;
    pes->y = moe__take_floats(arena, tokens, d);
    pes->out = moe__take_floats(arena, rows, d);
    pes->index = (int32_t *)moe__take(arena, rows, sizeof(int32_t));
    pes->work = (double *)moe__take(arena, n_experts, sizeof(double));
    if (arena->overflow) return MOE_E_OVERFLOW;
    return MOE_OK;
}
static moe_status moe__layer_pes_add(const moe__layer_pes *pes, const float *params, const float *x, size_t count,
                                     double *sum) {
    const moe__plan *plan = &pes->tape->memory->plan;
    size_t d = plan->d, F = plan->F;
    double part;
    moe_status status = moe_tape_tokens(pes->tape, x, count);
    if (!status) status = moe__routes_fill(&pes->tape->routes, count, pes->index, NULL, 0, NULL, MOE_ORDER_TOKEN);
    if (!status) status = moe_experts_forward(pes->tape, params, pes->y);
    if (status) return status;
    for (size_t i = 0; i < count * F; i++) {
        size_t row = pes->tape->routes.begin[i % F] + i / F;
        memcpy(pes->out + i * d, pes->tape->memory->experts.out + row * plan->ldo, d * sizeof(float));
    }
    status = moe_pes(count, F, d, pes->out, pes->work, &part);
    if (!status) *sum += moe__times(part, (double)count);
    return status;
}
/* The experts alone, each for every token. */
static moe_desc moe__layer_experts_desc(const moe_desc *desc, size_t n_experts) {
    moe_desc experts;
    memset(&experts, 0, sizeof experts);
    experts.d_model = desc->d_model;
    experts.d_ff = desc->d_ff;
    experts.n_experts = experts.top_k = n_experts;
    experts.score = MOE_SCORE_RANDOM; /* no parameters: the routes are given */
    experts.expert = desc->expert;
    experts.bias = desc->bias;
    experts.parallel = desc->parallel;
    experts.alloc_context = desc->alloc_context;
    return experts;
}
MOE_API moe_status moe_layer_pes(const moe_layer *layer, const float *x, size_t count, double *pes) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (count && !x) return MOE_E_NULL_X;
    if (!pes) return MOE_E_NULL_OUT;
    size_t d = layer->plan.d, F = layer->plan.F, most = moe__max(1, moe__min(count, MOE__PES_TOKENS)), bytes;
    moe_desc experts = moe__layer_experts_desc(&layer->plan.desc, F);
    moe__layer_pes all;
    moe__arena arena = {NULL, 0, 0};
    double sum = 0.0;
    moe_status status = moe__layer_pes_layout(&all, most, F, d, &arena);
    if (!status) status = moe__arena_bytes(&arena, &bytes);
    if (!status) status = moe_tape_new(&all.tape, &experts, most, MOE_OFF);
    if (status) return status;
    void *memory = moe__alloc(experts.alloc_context, bytes);
    if (!memory) status = MOE_E_NO_MEMORY;
    else {
        (void)moe__arena_over(&arena, memory, bytes, bytes);
        (void)moe__layer_pes_layout(&all, most, F, d, &arena);
        for (size_t i = 0; i < most * F; i++) all.index[i] = (int32_t)(i % F);
    }
    for (size_t at = 0; at < count && !status; at += most)
        status = moe__layer_pes_add(&all, layer->part[MOE_PART_PARAMS], x + at * d, moe__min(most, count - at), &sum);
    if (!status) *pes = count ? sum / (double)count : 0.0;
    moe__free(experts.alloc_context, memory);
    moe_tape_free(all.tape);
    return status;
}

/* -- its tensors -- */
MOE_API size_t moe_layer_tensors(const moe_layer *layer) {
    size_t n = 0;
    if (!layer) return 0;
    for (int id = 0; id < MOE__T_COUNT; id++) n += layer->plan.count[id] != 0;
    return n;
}
MOE_API moe_status moe_layer_tensor(const moe_layer *layer, size_t i, moe_tensor *out) {
    if (!layer) return MOE_E_NULL_LAYER;
    if (!out) return MOE_E_NULL_OUT;
    return moe__plan_tensor_at(&layer->plan, i, out) < 0 ? MOE_E_NAME : MOE_OK;
}
#define MOE__STATE_NAME "controller.state" /* id MOE__T_COUNT */
static moe_status moe__layer_find(const moe_layer *layer, moe_part_kind part, const char *name, size_t count, int *id) {
    if (!layer) return MOE_E_NULL_LAYER;
    size_t expected = layer->control.n_state;
    if (!name) return MOE_E_NULL_NAME;
    if ((unsigned)part >= MOE_PART_COUNT) return MOE_E_PART;
    if (!layer->part[part]) return layer->plan.desc.training == MOE_OFF ? MOE_E_INFERENCE : MOE_E_PART;
    *id = MOE__T_COUNT;
    if (!expected || strcmp(name, MOE__STATE_NAME)) {
        for (*id = 0; *id < MOE__T_COUNT; ++*id)
            if (layer->plan.count[*id] && !strcmp(moe__plan_tensors[*id].name, name)) break;
        if (*id == MOE__T_COUNT) return MOE_E_NAME;
        expected = layer->plan.count[*id];
    } else if (part != MOE_PART_PARAMS) return MOE_E_PART;
    return count == expected ? MOE_OK : MOE_E_TENSOR_SIZE;
}
MOE_API moe_status moe_layer_get(const moe_layer *layer, moe_part_kind part, const char *name, float *out,
                                 size_t count) {
    int id;
    moe_status status = moe__layer_find(layer, part, name, count, &id);
    if (status) return status;
    if (!out) return MOE_E_NULL_OUT;
    if (part == MOE_PART_GRADS && layer->fresh) memset(out, 0, count * sizeof(float));
    else if (id == MOE__T_COUNT) memcpy(out, layer->control.state, count * sizeof(float));
    else moe__plan_read(&layer->plan, id, layer->part[part], 0, count / moe__plan_columns(&layer->plan, id), out);
    return MOE_OK;
}
/* What a tensor may hold; gradients may be anything until a step. */
static int moe__layer_numbers_ok(moe_part_kind part, size_t count, const float *values) {
    if (!moe__all_finite(count, values)) return 0;
    if (part != MOE_PART_MOMENT2) return 1;
    for (size_t i = 0; i < count; i++)
        if (values[i] < 0.0f) return 0; /* a step takes its root */
    return 1;
}
MOE_API moe_status moe_layer_set(moe_layer *layer, moe_part_kind part, const char *name, const float *in,
                                 size_t count) {
    int id;
    moe_status status = moe__layer_find(layer, part, name, count, &id);
    if (status) return status;
    if (!in) return MOE_E_NULL_PARAMS;
    if (part != MOE_PART_GRADS && !moe__layer_numbers_ok(part, count, in)) return MOE_E_NAN_PARAMS;
    if (part == MOE_PART_GRADS && layer->fresh) {
        moe__layer_zero_grads(layer);
        layer->fresh = 0;
    }
    if (id == MOE__T_COUNT) memcpy(layer->control.state, in, count * sizeof(float));
    else moe__plan_write(&layer->plan, id, layer->part[part], 0, count / moe__plan_columns(&layer->plan, id), in);
    return MOE_OK;
}
MOE_API uint64_t moe_layer_hash(const moe_layer *layer) {
    uint64_t hash = 0;
    float chunk[256];
    if (!layer) return 0;
    const moe__plan *plan = &layer->plan;
    const float *params = layer->part[MOE_PART_PARAMS];
    hash = moe_hash(hash, moe__layer_router(layer, MOE_PART_PARAMS), plan->at[MOE__R_COUNT] * sizeof(float));
    if (plan->experts > plan->special)
        hash = moe_hash(hash, params + plan->special, (plan->experts - plan->special) * sizeof(float));
    for (int id = MOE__T_W1; id <= MOE__T_B2; id++) {
        size_t columns = moe__plan_columns(plan, id);
        if (!plan->count[id]) continue;
        for (size_t row = 0; row < plan->count[id] / columns; row++)
            for (size_t c = 0; c < columns; c += 256) {
                size_t n = moe__min(256, columns - c);
                moe__plan_get(plan, id, params, row, c, n, chunk);
                hash = moe_hash(hash, chunk, n * sizeof(float));
            }
    }
    return hash;
}

/* ==== >>json ==================================================================================
 * A reader of JSON text in place: nothing is copied or allocated, every byte is checked before it is used, and after a
 * fault the place is where it was found. Strings stay escaped in the text; they are compared, hashed and copied
 * unescaped.
 */
#define MOE__JSON_DEPTH 16 /* of values that are skipped */

typedef struct moe__json {
    const unsigned char *bytes;
    size_t at, end;
} moe__json;

/* The text between a string's quotes, still escaped. */
typedef struct moe__json_text {
    size_t begin, end;
} moe__json_text;

static moe__json moe__json_over(const unsigned char *bytes, size_t begin, size_t end) {
    moe__json json;
    json.bytes = bytes;
    json.at = begin;
    json.end = end;
    return json;
}

static int moe__json_peek(const moe__json *json) { return json->at < json->end ? json->bytes[json->at] : -1; }

static void moe__json_space(moe__json *json) {
    int c = moe__json_peek(json);
    for (; c == ' ' || c == '\n' || c == '\r' || c == '\t'; c = moe__json_peek(json)) json->at++;
}

/* This character, if it comes next; take: after white space. */
static int moe__json_next(moe__json *json, char c) {
    int is = moe__json_peek(json) == (unsigned char)c;
    json->at += (size_t)is;
    return is;
}
static int moe__json_take(moe__json *json, char c) {
    moe__json_space(json);
    return moe__json_next(json, c);
}

/* Before each element of an object or array: 1 = one follows, 0 = it was closed, -1 = fault. *first is 1 before
 * the first one. */
static int moe__json_more(moe__json *json, char close, int *first) {
    if (moe__json_take(json, close)) return 0;
    if (!*first && !moe__json_take(json, ',')) return -1;
    *first = 0;
    return 1;
}

/* The four digits of \uXXXX, or -1. */
static int32_t moe__json_hex4(moe__json *json) {
    int32_t code = 0;
    for (int i = 0; i < 4; i++, json->at++) {
        int c = moe__json_peek(json), lower = c | 32;
        if (c >= '0' && c <= '9') code = code * 16 + c - '0';
        else if (lower >= 'a' && lower <= 'f') code = code * 16 + lower - 'a' + 10;
        else return -1;
    }
    return code;
}

/* The code point of what follows a backslash, or -1. Of a surrogate pair the second half must follow. */
static int32_t moe__json_escape(moe__json *json) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    int c = moe__json_peek(json);
    if (c <= 0) return -1;
    json->at++;
    const char *letter = strchr(letters, c);
    if (letter) return meanings[letter - letters];
    if (c != 'u') return -1;
    int32_t code = moe__json_hex4(json), low;
    if (code < 0xD800 || code >= 0xE000) return code;
    if (code >= 0xDC00 || !moe__json_next(json, '\\') || !moe__json_next(json, 'u')) return -1;
    low = moe__json_hex4(json);
    return low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : -1;
}

/* A character that is not escaped: its length, or 0 if it is longer than needed, half of a pair or past the last. */
static size_t moe__json_plain(const moe__json *json, unsigned char out[4]) {
    int32_t code = json->bytes[json->at];
    size_t length = 2 + (size_t)(code >= 0xE0) + (size_t)(code >= 0xF0);
    if (code < 0x80) length = code >= 0x20;
    if ((code >= 0x80 && code < 0xC2) || code >= 0xF5 || length > json->end - json->at) return 0;
    out[0] = (unsigned char)code;
    code &= 0x7F >> length;
    for (size_t i = 1; i < length; i++) {
        out[i] = json->bytes[json->at + i];
        if ((out[i] & 0xC0) != 0x80) return 0;
        code = (code << 6) | (out[i] & 0x3F);
    }
    if (length == 3 && (code < 0x800 || (code >= 0xD800 && code < 0xE000))) return 0;
    return length == 4 && (code < 0x10000 || code > 0x10FFFF) ? 0 : length;
}

/* One character of a string, as UTF-8: its length, or 0 for a fault, which moves nothing. */
static size_t moe__json_char(moe__json *json, unsigned char out[4]) {
    moe__json after = *json;
    size_t length;
    if (!moe__json_next(&after, '\\')) {
        length = moe__json_plain(json, out);
        json->at += length;
        return length;
    }
    int32_t code = moe__json_escape(&after);
    if (code < 0) return 0;
    *json = after;
    length = 1 + (size_t)(code >= 0x80) + (size_t)(code >= 0x800) + (size_t)(code >= 0x10000);
    for (size_t i = length; i-- > 1; code >>= 6) out[i] = (unsigned char)(0x80 | (code & 0x3F));
    if (length > 1) code |= 0xF00 >> length & 0xF0; /* 110, 1110 or 11110, then the highest bits */
    out[0] = (unsigned char)code;
    return length;
}

static int moe__json_string(moe__json *json, moe__json_text *text) {
    unsigned char out[4];
    if (!moe__json_take(json, '"')) return 0;
    text->begin = json->at;
    while (json->at < json->end) {
        int c = json->bytes[json->at];
        if (c == '"') {
            text->end = json->at++;
            return 1;
        }
        if (c >= 0x20 && c < 0x80 && c != '\\') json->at++;
        else if (!moe__json_char(json, out)) return 0;
    }
    return 0;
}

/* "name": of an object. */
static int moe__json_key(moe__json *json, moe__json_text *name) {
    return moe__json_string(json, name) && moe__json_take(json, ':');
}

/* Is a string that was read before this name? */
static int moe__json_is(const moe__json *json, moe__json_text text, const char *name) {
    moe__json inside = moe__json_over(json->bytes, text.begin, text.end);
    unsigned char out[4];
    while (inside.at < inside.end) {
        size_t length = moe__json_char(&inside, out);
        if (!length) return 0;
        for (size_t i = 0; i < length; i++, name++)
            if (!*name || (unsigned char)*name != out[i]) return 0;
    }
    return !*name;
}

/* A string that was read before into a buffer of at least one byte; if it does not fit, nothing: half a value is no
 * value. */
static moe_status moe__json_copy(const moe__json *json, moe__json_text text, char *buffer, size_t size) {
    moe__json inside = moe__json_over(json->bytes, text.begin, text.end);
    unsigned char out[4];
    size_t used = 0;
    buffer[0] = 0;
    while (inside.at < inside.end) {
        size_t length = moe__json_char(&inside, out);
        if (used + length >= size) {
            buffer[0] = 0;
            return MOE_E_SMALL_MEMORY;
        }
        memcpy(buffer + used, out, length);
        used += length;
    }
    buffer[used] = 0;
    return MOE_OK;
}

/* FNV-1a of a string that was read before. */
static uint64_t moe__json_hash(const moe__json *json, moe__json_text text, uint64_t hash) {
    moe__json inside = moe__json_over(json->bytes, text.begin, text.end);
    unsigned char out[4];
    while (inside.at < inside.end) {
        size_t length = moe__json_char(&inside, out);
        for (size_t i = 0; i < length; i++) hash = (hash ^ out[i]) * UINT64_C(0x100000001b3);
    }
    return hash;
}

static size_t moe__json_digits(moe__json *json) {
    size_t start = json->at;
    for (int c = moe__json_peek(json); c >= '0' && c <= '9'; c = moe__json_peek(json)) json->at++;
    return json->at - start;
}
/* The digits of a natural number: none begins with a 0 that is not all of it. */
static int moe__json_natural(moe__json *json) {
    int zero = moe__json_peek(json) == '0';
    size_t digits = moe__json_digits(json);
    return digits == 1 || (digits > 1 && !zero);
}

static int moe__json_skip_number(moe__json *json) {
    (void)moe__json_next(json, '-');
    if (!moe__json_natural(json)) return 0;
    if (moe__json_next(json, '.') && !moe__json_digits(json)) return 0;
    if (!moe__json_next(json, 'e') && !moe__json_next(json, 'E')) return 1;
    if (!moe__json_next(json, '+')) (void)moe__json_next(json, '-');
    return moe__json_digits(json) > 0;
}

static int moe__json_word(moe__json *json, const char *word) {
    size_t length = strlen(word);
    moe__json_space(json);
    if (json->end - json->at < length || memcmp(json->bytes + json->at, word, length)) return 0;
    json->at += length;
    return 1;
}

/* Any value, checked and not used. */
static int moe__json_skip(moe__json *json, int depth) {
    moe__json_text text;
    int more, first = 1, object;
    moe__json_space(json);
    if (!depth) return 0;
    object = moe__json_next(json, '{');
    if (object || moe__json_next(json, '[')) {
        while ((more = moe__json_more(json, object ? '}' : ']', &first)) > 0)
            if ((object && !moe__json_key(json, &text)) || !moe__json_skip(json, depth - 1)) return 0;
        return !more;
    }
    if (moe__json_peek(json) == '"') return moe__json_string(json, &text);
    if (moe__json_word(json, "true") || moe__json_word(json, "false") || moe__json_word(json, "null")) return 1;
    return moe__json_skip_number(json);
}

/* A natural number: what is none is a `fault`, what does not fit in a size_t `overflow`. */
static moe_status moe__json_size(moe__json *json, moe_status fault, moe_status overflow, size_t *out) {
    moe__json_space(json);
    size_t start = json->at;
    *out = 0;
    if (!moe__json_natural(json)) return fault;
    for (size_t i = start; i < json->at; i++)
        if (!moe__mul(*out, 10, out) || !moe__add_size(*out, (size_t)(json->bytes[i] - '0'), out)) return overflow;
    return MOE_OK;
}

/* [a, b, ...]: at most `max` natural numbers. */
static moe_status moe__json_sizes(moe__json *json, size_t max, moe_status overflow, size_t *out, size_t *n) {
    int first = 1, more;
    *n = 0;
    if (!moe__json_take(json, '[')) return MOE_E_FILE_HEADER;
    while ((more = moe__json_more(json, ']', &first)) > 0) {
        size_t value;
        moe_status status = moe__json_size(json, MOE_E_FILE_HEADER, overflow, &value);
        if (status) return status;
        if (*n == max) return overflow;
        out[(*n)++] = value;
    }
    return more ? MOE_E_FILE_HEADER : MOE_OK;
}

/* ==== >>safetensors ===========================================================================
 * A file is 8 bytes of header length, little-endian; the header, one JSON object; the data. The reader is as strict as
 * the format's reference implementation (offsets without holes or overlaps, every byte of the data covered, valid
 * UTF-8) and, as the format's text asks, refuses names that come twice. The header is read again wherever something of
 * it is needed; after moe_file_open, every later reading of the same header succeeds. Of a header of many names an
 * index says where each stands.
 */
#define MOE__FILE_HEADER_CAP 100000000u /* as in the reference implementation */
#define MOE__FILE_FEW 512               /* names of which no index is kept */

/* The types of elements: first those of moe_dtype_kind, then those whose size alone is known. */
static const struct { const char *npy, *safetensors; size_t bytes; } moe__file_dtypes[] = {
    {"", "none", 0}, {"<f4", "F32", 4}, {"<f2", "F16", 2}, {"<V2", "BF16", 2}, {"<f8", "F64", 8}, {"<u2", "U16", 2},
    {"<i4", "I32", 4}, {"<i8", "I64", 8}, {"|i1", "I8", 1}, {"|u1", "U8", 1}, {"<i2", "I16", 2}, {"<u4", "U32", 4},
    {"<u8", "U64", 8},
    {"", "BOOL", 1}, {"", "F8_E5M2", 1}, {"", "F8_E4M3", 1}};

/* A type's row; 0 if there is none of that name. */
static size_t moe__file_dtype(const char *name) {
    size_t row = sizeof moe__file_dtypes / sizeof moe__file_dtypes[0] - 1;
    while (row > 0 && strcmp(name, moe__file_dtypes[row].safetensors)) row--;
    return row;
}

/* The header as a list: its tensors, and the pairs of its __metadata__. */
typedef enum moe__file_entry_kind { MOE__ENTRY_END, MOE__ENTRY_TENSOR, MOE__ENTRY_METADATA } moe__file_entry_kind;
typedef struct moe__file_entry {
    moe__file_entry_kind kind;
    moe__json_text name, value; /* value: of metadata */
    moe_file_tensor tensor;
    size_t begin, end; /* of its bytes in the data */
} moe__file_entry;

typedef struct moe__file_cursor {
    moe__json j;
    size_t data_size;
    int inside, metadata_seen; /* inside __metadata__ now, or before */
    int alone;                 /* no header: a weight_map, which reads as a __metadata__ does */
    int first[2];              /* of the header, of __metadata__ */
} moe__file_cursor;

static moe_status moe__file_cursor_init(moe__file_cursor *cursor, const moe_file *file) {
    memset(cursor, 0, sizeof *cursor);
    if (!file || !file->bytes) return MOE_E_NULL_BYTES;
    cursor->j = moe__json_over(file->bytes, 8, 8 + file->header);
    cursor->data_size = file->size - cursor->j.end;
    cursor->first[0] = 1;
    return moe__json_next(&cursor->j, '{') ? MOE_OK : MOE_E_FILE_HEADER;
}

/* Where a tensor's bytes lie: all of them inside the data, and as many as dtype and shape say. */
static moe_status moe__file_entry_place(moe__file_cursor *cursor, moe__file_entry *entry) {
    moe_file_tensor *tensor = &entry->tensor;
    size_t bytes = moe__file_dtypes[moe__file_dtype(tensor->dtype)].bytes;
    int known = bytes != 0;
    if (entry->begin > entry->end) return MOE_E_FILE_OFFSETS;
    if (entry->end > cursor->data_size) return MOE_E_FILE_SHORT;
    tensor->data = cursor->j.bytes + cursor->j.end + entry->begin;
    tensor->bytes = entry->end - entry->begin;
    for (size_t i = 0; i < tensor->n_dims; i++)
        if (!moe__mul(bytes, tensor->dim[i], &bytes)) return MOE_E_FILE_SHAPE;
    return known && bytes != tensor->bytes ? MOE_E_FILE_SHAPE : MOE_OK;
}

static moe_status moe__file_entry_tensor(moe__file_cursor *cursor, moe__file_entry *entry) {
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    moe__json *json = &cursor->j;
    moe_file_tensor *tensor = &entry->tensor;
    moe__json_text key, dtype = {0, 0};
    size_t offsets[2] = {0, 0}, n_offsets = 0;
    int first = 1, more;
    unsigned seen = 0, which;
    memset(tensor, 0, sizeof *tensor);
    tensor->name = (const char *)json->bytes + entry->name.begin;
    tensor->name_length = entry->name.end - entry->name.begin;
    if (!moe__json_take(json, '{')) return MOE_E_FILE_HEADER;
    while ((more = moe__json_more(json, '}', &first)) > 0) {
        moe_status status = MOE_OK;
        if (!moe__json_key(json, &key)) return MOE_E_FILE_HEADER;
        for (which = 0; which < 3 && !moe__json_is(json, key, keys[which]);) which++;
        if (which < 3 && (seen & 1u << which)) return MOE_E_FILE_HEADER;
        seen |= 1u << which;
        if (which == 1) status = moe__json_sizes(json, 8, MOE_E_FILE_SHAPE, tensor->dim, &tensor->n_dims);
        else if (which == 2) status = moe__json_sizes(json, 2, MOE_E_FILE_OFFSETS, offsets, &n_offsets);
        else if (which == 0 && !moe__json_string(json, &dtype)) status = MOE_E_FILE_HEADER;
        else if (which == 3 && !moe__json_skip(json, MOE__JSON_DEPTH)) status = MOE_E_FILE_HEADER; /* unknown: skip */
        if (status) return status;
    }
    if (more || (seen & 7) != 7 || n_offsets != 2) return MOE_E_FILE_HEADER;
    entry->begin = offsets[0];
    entry->end = offsets[1];
    memcpy(tensor->dtype, json->bytes + dtype.begin, moe__min(dtype.end - dtype.begin, sizeof tensor->dtype - 1));
    moe_status status = moe__file_entry_place(cursor, entry);
    if (status) json->at = entry->name.begin;
    return status;
}

static moe_status moe__file_cursor_next(moe__file_cursor *cursor, moe__file_entry *entry) {
    moe__json *json = &cursor->j;
    entry->kind = MOE__ENTRY_END;
    for (;;) {
        int more = moe__json_more(json, '}', &cursor->first[cursor->inside]);
        if (more < 0) return MOE_E_FILE_HEADER;
        if (!more && (!cursor->inside || cursor->alone)) {
            if (cursor->alone) return MOE_OK;
            moe__json_space(json); /* padding */
            return json->at == json->end ? MOE_OK : MOE_E_FILE_HEADER;
        }
        if (!more) {
            cursor->inside = 0;
            continue;
        }
        if (!moe__json_key(json, &entry->name)) return MOE_E_FILE_HEADER;
        if (cursor->inside) {
            entry->kind = MOE__ENTRY_METADATA;
            return moe__json_string(json, &entry->value) ? MOE_OK : MOE_E_FILE_HEADER;
        }
        if (!moe__json_is(json, entry->name, "__metadata__")) {
            entry->kind = MOE__ENTRY_TENSOR;
            return moe__file_entry_tensor(cursor, entry);
        }
        if (cursor->metadata_seen) {
            json->at = entry->name.begin;
            return MOE_E_FILE_TWICE;
        }
        if (!moe__json_take(json, '{')) return MOE_E_FILE_HEADER;
        cursor->inside = cursor->metadata_seen = cursor->first[1] = 1;
    }
}

/* -- names in order --
 * Tensors may stand in the header in any order, but their offsets must tile the data, and no name may come twice. Both
 * are seen when keys are in order: (begin, end) of the bytes, or (hash of the name, where it stands). A hash has 64
 * bits: two names that share it count as equal, which an honest file of a million names does once in 10^7. The keys of
 * few names fit on the stack; of many they are kept, with where the tensors stand and the routers by layer:
 *
 *     header     c      a      b               where: 10     60     110
 *     names      (hash b, 110) (hash c, 10) (hash a, 60)
 *     order      10 60 110                     tensor i, without walking
 *     routers    (layer 0, 60) (layer 1, 10)
 */
typedef struct moe__file_key {
    uint64_t major, minor;
} moe__file_key;

typedef struct moe__file_index {
    size_t n_names, n_tensors, n_routers;
    moe__file_key *names, *routers;
    size_t *order;
} moe__file_index;

static int moe__file_key_less(moe__file_key left, moe__file_key right) {
    return left.major < right.major || (left.major == right.major && left.minor < right.minor);
}

static void moe__file_sort(size_t n, moe__file_key *keys) { /* heap sort: n log n whatever the file */
    for (size_t start = n / 2, end = n; end > 1;) {
        moe__file_key moved;
        if (start) moved = keys[--start]; /* the heap is still being built */
        else moved = keys[--end], keys[end] = keys[0];
        size_t at = start;
        for (size_t child = 2 * at + 1; child < end; child = 2 * at + 1) {
            if (child + 1 < end && moe__file_key_less(keys[child], keys[child + 1])) child++;
            if (!moe__file_key_less(moved, keys[child])) break;
            keys[at] = keys[child];
            at = child;
        }
        keys[at] = moved;
    }
}

static uint64_t moe__file_hash(const moe__json *json, moe__json_text name, moe__file_entry_kind kind) {
    return moe__json_hash(json, name, UINT64_C(0xcbf29ce484222325) ^ (uint64_t)kind);
}

MOE_API int moe_router_name(const char *name, size_t length, size_t *layer) {
    static const char before[] = "model.layers.";
    static const char *const after[] = {".mlp.gate.weight", ".block_sparse_moe.gate.weight"};
    size_t at = sizeof before - 1, first = at, number = 0;
    if (!name || length < at || memcmp(name, before, at)) return 0;
    for (; at < length && at < first + 9 && name[at] >= '0' && name[at] <= '9'; at++)
        number = number * 10 + (size_t)(name[at] - '0');
    if (at == first || (name[first] == '0' && at > first + 1)) return 0;
    for (int i = 0; i < 2; i++) {
        if (length - at != strlen(after[i]) || memcmp(name + at, after[i], length - at)) continue;
        if (layer) *layer = number;
        return 1;
    }
    return 0;
}

/* All names from a cursor at the start, in order; `at`: after an error, where. */
static moe_status moe__file_names(moe__file_cursor cursor, moe__file_index *index, size_t *at) {
    moe__file_entry entry;
    moe_status status;
    size_t n = 0, n_tensors = 0;
    while (!(status = moe__file_cursor_next(&cursor, &entry)) && entry.kind != MOE__ENTRY_END) {
        index->names[n].major = moe__file_hash(&cursor.j, entry.name, entry.kind);
        index->names[n++].minor = entry.name.begin;
        if (index->order && (cursor.alone || entry.kind == MOE__ENTRY_TENSOR))
            index->order[n_tensors++] = entry.name.begin;
    }
    moe__file_sort(n, index->names);
    for (size_t i = 1; i < n && !status; i++) {
        if (index->names[i].major != index->names[i - 1].major) continue;
        *at = (size_t)index->names[i].minor;
        status = MOE_E_FILE_TWICE;
    }
    return status;
}

/* The routers from a cursor at the start, by layer: how many. Of two names of one layer the first counts. */
static size_t moe__file_routers(moe__file_cursor cursor, moe__file_key *routers) {
    moe__file_entry entry;
    size_t n = 0, kept = 0, layer;
    while (!moe__file_cursor_next(&cursor, &entry) && entry.kind != MOE__ENTRY_END) {
        size_t length = entry.name.end - entry.name.begin;
        if (!cursor.alone && entry.kind != MOE__ENTRY_TENSOR) continue;
        if (!moe_router_name((const char *)cursor.j.bytes + entry.name.begin, length, &layer)) continue;
        if (routers) routers[n].major = layer, routers[n].minor = entry.name.begin;
        n++;
    }
    if (!routers) return n;
    moe__file_sort(n, routers);
    for (size_t i = 0; i < n; i++)
        if (!kept || routers[i].major != routers[kept - 1].major) routers[kept++] = routers[i];
    return kept;
}

static void moe__file_index_layout(moe__file_index *index, moe__arena *arena) {
    (void)moe__take(arena, 1, sizeof *index);
    index->names = (moe__file_key *)moe__take(arena, index->n_names, sizeof *index->names);
    index->routers = (moe__file_key *)moe__take(arena, index->n_routers, sizeof *index->routers);
    index->order = (size_t *)moe__take(arena, index->n_tensors, sizeof *index->order);
}

/* The index of so many names, still empty; NULL if there is no memory. */
static moe__file_index *moe__file_index_new(const moe__file_cursor *start, size_t n_names, size_t n_tensors,
                                            void *context) {
    moe__file_index sizes = {n_names, n_tensors, moe__file_routers(*start, NULL), NULL, NULL, NULL};
    moe__arena arena = {NULL, 0, 0};
    moe__file_index_layout(&sizes, &arena);
    if (arena.overflow) return NULL;
    arena.base = (unsigned char *)moe__alloc(context, arena.used);
    arena.used = 0;
    if (!arena.base) return NULL;
    moe__file_index *index = (moe__file_index *)(void *)arena.base;
    moe__file_index_layout(&sizes, &arena);
    *index = sizes;
    return index;
}

/* Do the tensors' bytes tile the data? Their sum has been compared with it, so that equal keys show as a hole. */
static moe_status moe__file_tiles(moe_file *file, moe__file_cursor cursor, moe__file_key *keys) {
    moe__file_entry entry;
    moe_status status;
    size_t n = 0, end = 0;
    while (!(status = moe__file_cursor_next(&cursor, &entry)) && entry.kind != MOE__ENTRY_END) {
        if (entry.kind != MOE__ENTRY_TENSOR) continue;
        keys[n].major = entry.begin;
        keys[n++].minor = entry.end;
    }
    moe__file_sort(n, keys);
    for (size_t i = 0; i < n && !status; end = (size_t)keys[i++].minor)
        if (keys[i].major != end) {
            file->offset = cursor.j.end + end;
            return MOE_E_FILE_OFFSETS; /* a hole, or bytes of two */
        }
    return status;
}

/* The header read once: how many entries, tensors and bytes of theirs, in which order. */
static moe_status moe__file_count(moe_file *file, moe__file_cursor cursor, size_t *n_entries, size_t *sum,
                                  int *in_order) {
    moe__file_entry entry;
    moe_status status;
    while (!(status = moe__file_cursor_next(&cursor, &entry)) && entry.kind != MOE__ENTRY_END) {
        ++*n_entries;
        if (entry.kind == MOE__ENTRY_METADATA) continue;
        file->n_tensors++;
        if (entry.begin != *sum) *in_order = 0;
        if (entry.end - entry.begin > cursor.data_size - *sum) { /* more than all bytes: some belong to two */
            cursor.j.at = entry.name.begin;
            status = MOE_E_FILE_OFFSETS;
            break;
        }
        *sum += entry.end - entry.begin;
    }
    file->offset = cursor.j.at;
    if (status && entry.kind == MOE__ENTRY_TENSOR) file->fault = entry.tensor;
    return status;
}

static moe_status moe__file_check(moe_file *file) {
    moe__file_key few[MOE__FILE_FEW];
    moe__file_index on_stack, *index = &on_stack;
    moe__file_cursor start;
    size_t n_entries = 0, sum = 0;
    int in_order = 1;
    moe_status status = moe__file_cursor_init(&start, file);
    if (!status) status = moe__file_count(file, start, &n_entries, &sum, &in_order);
    if (status) return status;
    memset(&on_stack, 0, sizeof on_stack);
    on_stack.names = few;
    if (n_entries > MOE__FILE_FEW)
        file->index = index = moe__file_index_new(&start, n_entries, file->n_tensors, file->alloc_context);
    if (!index) return MOE_E_NO_MEMORY;
    if (!in_order) status = moe__file_tiles(file, start, index->names);
    if (!status && sum != start.data_size) {
        file->offset = start.j.end + sum;
        status = MOE_E_FILE_OFFSETS;
    }
    if (!status) status = moe__file_names(start, index, &file->offset);
    if (!status && file->index) index->n_routers = moe__file_routers(start, index->routers);
    return status;
}

MOE_API void moe_file_close(moe_file *file) {
    if (!file) return;
    moe__free(file->alloc_context, file->index);
    memset(file, 0, sizeof *file);
}

static moe_status moe__file_open(moe_file *file, const void *bytes, size_t size, void *context) {
    uint64_t header = 0;
    if (!file) return MOE_E_NULL_OUT;
    memset(file, 0, sizeof *file);
    if (!bytes) return MOE_E_NULL_BYTES;
    file->alloc_context = context;
    file->bytes = (const unsigned char *)bytes;
    file->size = file->offset = size;
    if (size < 8) return MOE_E_FILE_SHORT;
    file->offset = 0;
    for (int i = 8; i-- > 0;) header = header << 8 | file->bytes[i];
    if (header > MOE__FILE_HEADER_CAP || header > size - 8) return MOE_E_FILE_HEADER_SIZE;
    file->header = (size_t)header;
    moe_status status = moe__file_check(file);
    if (!status) file->offset = 0;
    if (!status) return MOE_OK;
    moe__free(context, file->index);
    file->index = NULL;
    file->n_tensors = file->header = 0; /* nothing is to be found in it */
    return status;
}
MOE_API moe_status moe_file_open(moe_file *file, const void *bytes, size_t size) {
    return moe__file_open(file, bytes, size, NULL);
}

/* The next entry of a kind; MOE_E_NAME past the last. */
static moe_status moe__file_cursor_next_of(moe__file_cursor *cursor, moe__file_entry_kind kind,
                                           moe__file_entry *entry) {
    moe_status status;
    do status = moe__file_cursor_next(cursor, entry);
    while (!status && entry->kind != kind && entry->kind != MOE__ENTRY_END);
    if (!status && entry->kind != kind) status = MOE_E_NAME;
    return status;
}

/* The next entry is the one whose name stands there. */
static void moe__file_jump(moe__file_cursor *cursor, uint64_t name, moe__file_entry_kind kind) {
    cursor->j.at = (size_t)name - 1; /* the quote */
    cursor->inside = kind == MOE__ENTRY_METADATA;
    cursor->first[cursor->inside] = 1; /* no comma before it */
}

/* By name, from a cursor at the start: at once with an index (a moe__file_index, or NULL), else by walking. */
static moe_status moe__file_seek(moe__file_cursor *cursor, const void *names, moe__file_entry_kind kind,
                                 const char *name, moe__file_entry *entry) {
    const moe__file_index *index = (const moe__file_index *)names;
    moe_status status = MOE_OK;
    if (index) {
        size_t low = 0, high = index->n_names;
        uint64_t hash = UINT64_C(0xcbf29ce484222325) ^ (uint64_t)kind;
        for (const char *at = name; *at; at++) hash = (hash ^ (unsigned char)*at) * UINT64_C(0x100000001b3);
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (index->names[middle].major < hash) low = middle + 1;
            else high = middle;
        }
        if (low == index->n_names || index->names[low].major != hash) return MOE_E_NAME;
        moe__file_jump(cursor, index->names[low].minor, kind);
    }
    while (!status) {
        status = moe__file_cursor_next_of(cursor, kind, entry);
        if (status || moe__json_is(&cursor->j, entry->name, name)) break;
    }
    return status;
}

/* The router with number i, in order of layers; MOE_E_NAME past the last. */
static moe_status moe__file_router(moe__file_cursor *cursor, const void *names, size_t i, size_t *layer,
                                   moe__file_entry *entry) {
    const moe__file_index *index = (const moe__file_index *)names;
    moe__file_key few[MOE__FILE_FEW];
    const moe__file_key *routers = few;
    size_t n;
    if (index) routers = index->routers, n = index->n_routers;
    else n = moe__file_routers(*cursor, few);
    if (i >= n) return MOE_E_NAME;
    *layer = (size_t)routers[i].major;
    moe__file_jump(cursor, routers[i].minor, cursor->alone ? MOE__ENTRY_METADATA : MOE__ENTRY_TENSOR);
    return moe__file_cursor_next(cursor, entry);
}

static moe_status moe__file_give(const moe__file_entry *entry, moe_file_tensor *out) {
    *out = entry->tensor;
    return moe__file_dtype(out->dtype) ? MOE_OK : MOE_E_FILE_DTYPE;
}

MOE_API moe_status moe_file_tensor_at(const moe_file *file, size_t i, moe_file_tensor *out) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    size_t n = 0;
    if (!out) return MOE_E_NULL_OUT;
    memset(out, 0, sizeof *out);
    moe_status status = moe__file_cursor_init(&cursor, file);
    if (!status && i >= file->n_tensors) return MOE_E_NAME;
    if (!status && file->index) {
        n = i;
        moe__file_jump(&cursor, ((const moe__file_index *)file->index)->order[i], MOE__ENTRY_TENSOR);
    }
    for (; !status && n <= i; n++) status = moe__file_cursor_next_of(&cursor, MOE__ENTRY_TENSOR, &entry);
    return status ? status : moe__file_give(&entry, out);
}

MOE_API moe_status moe_file_find(const moe_file *file, const char *name, moe_file_tensor *out) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    if (!out) return MOE_E_NULL_OUT;
    memset(out, 0, sizeof *out);
    moe_status status = moe__file_cursor_init(&cursor, file);
    if (!name) return MOE_E_NULL_NAME;
    if (!status) status = moe__file_seek(&cursor, file->index, MOE__ENTRY_TENSOR, name, &entry);
    return status ? status : moe__file_give(&entry, out);
}

MOE_API moe_status moe_file_metadata(const moe_file *file, const char *key, char *buffer, size_t size) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    if (!buffer) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    buffer[0] = 0;
    moe_status status = moe__file_cursor_init(&cursor, file);
    if (!key) return MOE_E_NULL_NAME;
    if (!status) status = moe__file_seek(&cursor, file->index, MOE__ENTRY_METADATA, key, &entry);
    return status ? status : moe__json_copy(&cursor.j, entry.value, buffer, size);
}

/* ==== >>npy ===================================================================================
 * A file is six bytes of magic, a version, the header's length, the header (a Python dictionary) and the elements. Read
 * with json's places, as strictly; and elements of either format into floats and indices.
 */
#define MOE__NPY_CAP ((size_t)1 << 20) /* of the header; NumPy's own are below 200 bytes */

MOE_API size_t moe_dtype_size(moe_dtype_kind kind) {
    return (unsigned)kind < MOE_DTYPE_COUNT ? moe__file_dtypes[kind].bytes : 0;
}
MOE_API const char *moe_dtype_name(moe_dtype_kind kind) {
    return (unsigned)kind < MOE_DTYPE_COUNT ? moe__file_dtypes[kind].safetensors : NULL;
}
MOE_API moe_dtype_kind moe_dtype_of(const char *safetensors_name) {
    size_t row = 0;
    if (safetensors_name) row = moe__file_dtype(safetensors_name);
    return row < MOE_DTYPE_COUNT ? (moe_dtype_kind)row : MOE_DTYPE_NONE;
}

/* 'text' or "text", printable ASCII without escapes; as much of it as the buffer holds. */
static int moe__npy_string(moe__json *json, char *out, size_t size) {
    size_t used = 0;
    moe__json_space(json);
    int quote = moe__json_peek(json), c;
    if (quote != '\'' && quote != '"') return 0;
    for (json->at++; (c = moe__json_peek(json)) != quote; json->at++) {
        if (c < 0x20 || c > 0x7e || c == '\\') return 0;
        if (used + 1 < size) out[used++] = (char)c;
    }
    out[used] = 0;
    json->at++;
    return 1;
}

/* (), (3,), (3, 4) or (3, 4,) */
static moe_status moe__npy_shape(moe__json *json, moe_npy *npy) {
    int comma = 1;
    npy->n_dims = 0;
    if (!moe__json_take(json, '(')) return MOE_E_NPY_HEADER;
    while (!moe__json_take(json, ')')) {
        size_t extent;
        moe_status status = moe__json_size(json, MOE_E_NPY_HEADER, MOE_E_FILE_SHAPE, &extent);
        if (!comma) return MOE_E_NPY_HEADER;
        if (status) return status;
        if (npy->n_dims == sizeof npy->dim / sizeof npy->dim[0]) return MOE_E_FILE_SHAPE;
        npy->dim[npy->n_dims++] = extent;
        comma = moe__json_take(json, ',');
    }
    return npy->n_dims == 1 && !comma ? MOE_E_NPY_HEADER : MOE_OK; /* (3) is no tuple */
}

static moe_status moe__npy_descr(moe__json *json, moe_npy *npy) {
    const char *text = npy->descr;
    size_t start = json->at;
    int row = MOE_DTYPE_COUNT - 1;
    if (moe__json_peek(json) == '[') npy->descr[0] = '['; /* records */
    else if (!moe__npy_string(json, npy->descr, sizeof npy->descr)) return MOE_E_NPY_HEADER;
    if (!strcmp(text, "|V2") || !strcmp(text, "bfloat16")) text = "<V2"; /* that, loaded and saved again; as a name */
    while (row > 0 && strcmp(text, moe__file_dtypes[row].npy)) row--;
    npy->dtype = (moe_dtype_kind)row;
    if (row) return MOE_OK;
    json->at = start;
    return MOE_E_FILE_DTYPE;
}

static moe_status moe__npy_order(moe__json *json) {
    if (moe__json_word(json, "True")) return MOE_E_NPY_ORDER;
    return moe__json_word(json, "False") ? MOE_OK : MOE_E_NPY_HEADER;
}

static moe_status moe__npy_dictionary(moe__json *json, moe_npy *npy) {
    static const char *const keys[] = {"descr", "fortran_order", "shape"};
    unsigned seen = 0, which;
    char key[16];
    if (!moe__json_take(json, '{')) return MOE_E_NPY_HEADER;
    for (int first = 1; !moe__json_take(json, '}'); first = 0) {
        moe_status status;
        if (!first && !moe__json_take(json, ',')) return MOE_E_NPY_HEADER;
        if (!first && moe__json_take(json, '}')) break; /* a comma may stand after the last */
        if (!moe__npy_string(json, key, sizeof key) || !moe__json_take(json, ':')) return MOE_E_NPY_HEADER;
        moe__json_space(json);
        for (which = 0; which < 3 && strcmp(key, keys[which]);) which++;
        if (which == 3 || (seen & 1u << which)) return MOE_E_NPY_HEADER;
        seen |= 1u << which;
        if (which == 0) status = moe__npy_descr(json, npy);
        else if (which == 1) status = moe__npy_order(json);
        else status = moe__npy_shape(json, npy);
        if (status) return status;
    }
    moe__json_space(json);
    return seen == 7 && json->at == json->end ? MOE_OK : MOE_E_NPY_HEADER;
}

/* Needs the first n bytes. What is there of the file is too little: more must be given, or the file ends too early. */
static moe_status moe__npy_needs(moe_npy *npy, uint64_t n, size_t size, uint64_t file_size) {
    if (n <= size) return MOE_OK;
    npy->offset = size;
    if (n <= file_size) npy->offset = (size_t)n;
    return MOE_E_FILE_SHORT;
}

static uint64_t moe__npy_little(const unsigned char *bytes, size_t size) {
    uint64_t value = 0;
    for (size_t i = size; i-- > 0;) value = value << 8 | bytes[i];
    return value;
}

/* The header's place, from the ten or twelve bytes before it. */
static moe_status moe__npy_place(moe_npy *npy, const unsigned char *bytes, size_t size, uint64_t file_size,
                                 moe__json *json) {
    static const char magic[] = "\x93NUMPY";
    moe_status status = moe__npy_needs(npy, 10, size, file_size);
    if (status) return status;
    if (memcmp(bytes, magic, 6)) return MOE_E_NPY_MAGIC;
    npy->offset = 6;
    if (bytes[6] < 1 || bytes[6] > 3 || bytes[7]) return MOE_E_NPY_MAGIC;
    size_t start = bytes[6] == 1 ? 10 : 12, length;
    npy->offset = 0;
    status = moe__npy_needs(npy, start, size, file_size);
    if (status) return status;
    length = (size_t)moe__npy_little(bytes + 8, start - 8);
    npy->offset = 8;
    if (length > MOE__NPY_CAP - start) return MOE_E_NPY_HEADER;
    *json = moe__json_over(bytes, start, start + length);
    return moe__npy_needs(npy, start + length, size, file_size);
}

static moe_status moe__npy_read(moe_npy *npy, const unsigned char *file, size_t size, uint64_t file_size) {
    moe__json json;
    size_t bytes, product = 1;
    moe_status status = moe__npy_place(npy, file, size, file_size, &json);
    if (status) return status;
    status = moe__npy_dictionary(&json, npy);
    npy->offset = json.at;
    if (status) return status;
    npy->data = json.end;
    npy->count = 1;
    for (size_t i = 0; i < npy->n_dims; i++) { /* a 0 hides no overflow of the others */
        if (!moe__mul(npy->count, npy->dim[i], &npy->count)) return MOE_E_FILE_SHAPE;
        if (npy->dim[i] && !moe__mul(product, npy->dim[i], &product)) return MOE_E_FILE_SHAPE;
    }
    if (!moe__mul(npy->count, moe_dtype_size(npy->dtype), &bytes)) return MOE_E_FILE_SHAPE;
    if (bytes > file_size - npy->data) {
        npy->offset = SIZE_MAX;
        if (file_size < SIZE_MAX) npy->offset = (size_t)file_size;
        return MOE_E_FILE_SHORT;
    }
    npy->offset = (size_t)npy->data + bytes;
    if (bytes < file_size - npy->data) return MOE_E_NPY_SIZE;
    npy->offset = 0;
    return MOE_OK;
}

MOE_API moe_status moe_npy_header(moe_npy *npy, const void *bytes, size_t size, uint64_t file_size) {
    if (!npy) return MOE_E_NULL_OUT;
    memset(npy, 0, sizeof *npy);
    if (!bytes) return MOE_E_NULL_BYTES;
    if (size > file_size) size = (size_t)file_size;
    moe_status status = moe__npy_read(npy, (const unsigned char *)bytes, size, file_size);
    if (!status) return MOE_OK;
    npy->count = npy->n_dims = 0, npy->data = 0, npy->dtype = MOE_DTYPE_NONE; /* nothing is to be found in it */
    return status;
}

MOE_API moe_status moe_npy_open(moe_npy *npy, const void *bytes, size_t size) {
    moe_status status = moe_npy_header(npy, bytes, size, size);
    if (!status) npy->elements = (const unsigned char *)bytes + (size_t)npy->data;
    return status;
}

MOE_API moe_status moe_to_float(moe_dtype_kind dtype, size_t n, const void *elements, float *out) {
    const unsigned char *bytes = (const unsigned char *)elements;
    const uint32_t one = 1; /* its first byte is 1 where the machine is little-endian */
    if ((unsigned)dtype >= MOE_DTYPE_I32 || dtype == MOE_DTYPE_NONE) return MOE_E_FILE_DTYPE;
    if (!n) return MOE_OK;
    if (!bytes) return MOE_E_NULL_BYTES;
    if (!out) return MOE_E_NULL_OUT;
    if (dtype == MOE_DTYPE_F16) moe__dispatched()->half(n, bytes, out);
    else if (dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_U16) moe__dispatched()->bfloat(n, bytes, out);
    else if (dtype == MOE_DTYPE_F32 && !memcmp(&one, "\1", 1)) memcpy(out, bytes, n * sizeof *out);
    else if (dtype == MOE_DTYPE_F32)
        for (size_t i = 0; i < n; i++) out[i] = moe__float_of((uint32_t)moe__npy_little(bytes + 4 * i, 4));
    else
        for (size_t i = 0; i < n; i++) {
            uint64_t bits = moe__npy_little(bytes + 8 * i, 8);
            double value;
            memcpy(&value, &bits, sizeof value);
            out[i] = (float)value;
        }
    return MOE_OK;
}

MOE_API moe_status moe_to_index(moe_dtype_kind dtype, size_t n, const void *elements, int32_t *out, size_t *bad) {
    const unsigned char *bytes = (const unsigned char *)elements;
    size_t size = moe_dtype_size(dtype);
    uint64_t sign = 0; /* the highest bit, of a signed type */
    if (dtype == MOE_DTYPE_I8 || dtype == MOE_DTYPE_I16 || dtype == MOE_DTYPE_I32 || dtype == MOE_DTYPE_I64)
        sign = UINT64_C(1) << (8 * size - 1);
    if (!size || (dtype < MOE_DTYPE_I32 && dtype != MOE_DTYPE_U16)) return MOE_E_FILE_DTYPE;
    if (!n) return MOE_OK;
    if (!bytes) return MOE_E_NULL_BYTES;
    if (!out) return MOE_E_NULL_OUT;
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = moe__npy_little(bytes + size * i, size);
        if (sign) bits = (bits ^ sign) - sign; /* to 64 bits */
        uint32_t low = (uint32_t)bits;
        if (bits > INT32_MAX && (!sign || bits < (uint64_t)INT32_MIN)) {
            if (bad) *bad = i;
            return MOE_E_NPY_INDEX;
        }
        memcpy(&out[i], &low, sizeof low);
    }
    return MOE_OK;
}

/* ==== >>models ================================================================================
 * The routers of known models: what they are called, and in which file of a model of many they are.
 */
MOE_API moe_status moe_file_router(const moe_file *file, size_t i, size_t *layer, moe_file_tensor *out) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    if (!layer || !out) return MOE_E_NULL_OUT;
    moe_status status = moe__file_cursor_init(&cursor, file);
    if (!status) status = moe__file_router(&cursor, file->index, i, layer, &entry);
    return status ? status : moe__file_give(&entry, out);
}

static moe_status moe__model_bias_name(size_t layer, int sparse, char *name, size_t size) {
    moe__text text = {name, size, 0};
    moe__text_add(&text, "model.layers.");
    moe__text_u64(&text, layer);
    moe__text_add(&text, sparse ? ".block_sparse_moe" : ".mlp.gate");
    moe__text_add(&text, ".e_score_correction_bias");
    moe__text_end(&text);
    if (text.n < size) return MOE_OK;
    name[0] = 0;
    return MOE_E_SMALL_MEMORY;
}
MOE_API moe_status moe_router_bias_name(const char *router, char *name, size_t size) {
    size_t layer;
    if (!router) return MOE_E_NULL_NAME;
    if (!name) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    if (moe_router_name(router, strlen(router), &layer))
        return moe__model_bias_name(layer, strstr(router, ".block_sparse_moe.") != NULL, name, size);
    name[0] = 0;
    return MOE_E_NAME;
}
MOE_API moe_status moe_file_router_bias(const moe_file *file, size_t layer, size_t n_experts, float *bias) {
    moe_file_tensor tensor;
    moe_status status = MOE_E_NAME;
    char name[80];
    size_t bytes;
    if (!bias) return MOE_E_NULL_OUT;
    for (int sparse = 0; sparse < 2 && status == MOE_E_NAME; sparse++) {
        status = moe__model_bias_name(layer, sparse, name, sizeof name);
        if (!status) status = moe_file_find(file, name, &tensor);
    }
    if (status) return status;
    moe_dtype_kind dtype = moe_dtype_of(tensor.dtype);
    status = moe_to_float(dtype, 0, NULL, NULL);
    if (status) return status;
    if (!moe__mul(n_experts, moe_dtype_size(dtype), &bytes) || tensor.bytes != bytes) return MOE_E_FILE_SHAPE;
    status = moe_to_float(dtype, n_experts, tensor.data, bias);
    return status || moe__all_finite(n_experts, bias) ? status : MOE_E_FILE_NAN;
}

/* A file in the same folder: no separator, drive or control character, and not "." or "..". */
static int moe__model_plain_name(const moe__json *json, moe__json_text text) {
    moe__json inside = moe__json_over(json->bytes, text.begin, text.end);
    unsigned char out[4];
    while (inside.at < inside.end)
        if (moe__json_char(&inside, out) == 1 && (out[0] < 0x20 || strchr("/\\:", out[0]))) return 0;
    return text.end > text.begin && !moe__json_is(json, text, ".") && !moe__json_is(json, text, "..");
}

static void moe__model_shards_start(const moe_shards *shards, moe__file_cursor *cursor) {
    memset(cursor, 0, sizeof *cursor);
    cursor->j = moe__json_over(shards->bytes, shards->map, shards->size);
    cursor->inside = cursor->alone = cursor->first[1] = 1;
}

/* A weight_map from its brace on; counts its tensors. */
static int moe__model_shards_map(moe__json *json, moe_shards *shards) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    moe_status status;
    if (shards->map || !moe__json_take(json, '{')) return 0;
    shards->map = json->at;
    moe__model_shards_start(shards, &cursor);
    for (; !(status = moe__file_cursor_next(&cursor, &entry)) && entry.kind != MOE__ENTRY_END; shards->n_tensors++) {
        json->at = entry.value.begin;
        if (!moe__model_plain_name(json, entry.value)) return 0;
    }
    json->at = cursor.j.at;
    return !status;
}

/* No name may come twice; the index of many is kept. */
static moe_status moe__model_shards_index(moe_shards *shards) {
    moe__file_key few[MOE__FILE_FEW];
    moe__file_index on_stack, *index = &on_stack;
    moe__file_cursor start;
    memset(&on_stack, 0, sizeof on_stack);
    on_stack.names = few;
    moe__model_shards_start(shards, &start);
    if (shards->n_tensors > MOE__FILE_FEW)
        shards->index = index = moe__file_index_new(&start, shards->n_tensors, shards->n_tensors, NULL);
    if (!index) return MOE_E_NO_MEMORY;
    moe_status status = moe__file_names(start, index, &shards->offset);
    if (!status && shards->index) index->n_routers = moe__file_routers(start, index->routers);
    return status;
}

MOE_API void moe_shards_close(moe_shards *shards) {
    if (!shards) return;
    moe__free(NULL, shards->index);
    memset(shards, 0, sizeof *shards);
}

MOE_API moe_status moe_shards_open(moe_shards *shards, const void *bytes, size_t size) {
    moe__json_text key;
    int first = 1, more = -1;
    moe_status status = MOE_E_SHARDS;
    if (!shards) return MOE_E_NULL_OUT;
    memset(shards, 0, sizeof *shards);
    if (!bytes) return MOE_E_NULL_BYTES;
    moe__json json = moe__json_over((const unsigned char *)bytes, 0, size);
    shards->bytes = json.bytes;
    shards->size = size;
    if (moe__json_take(&json, '{'))
        while ((more = moe__json_more(&json, '}', &first)) > 0) {
            int ok = moe__json_key(&json, &key);
            if (ok && moe__json_is(&json, key, "weight_map")) ok = moe__model_shards_map(&json, shards);
            else if (ok) ok = moe__json_skip(&json, MOE__JSON_DEPTH);
            if (!ok) break;
        }
    moe__json_space(&json);
    shards->offset = json.at;
    if (!more && shards->map && json.at == json.end) status = moe__model_shards_index(shards);
    if (!status) shards->offset = 0;
    if (!status) return MOE_OK;
    moe__free(NULL, shards->index);
    shards->bytes = NULL;
    shards->index = NULL;
    shards->n_tensors = shards->map = 0; /* nothing is to be found in it */
    return status;
}

MOE_API moe_status moe_shards_find(const moe_shards *shards, const char *name, char *buffer, size_t size) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    if (!shards || !shards->bytes) return MOE_E_NULL_BYTES;
    if (!name) return MOE_E_NULL_NAME;
    if (!buffer) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    moe__model_shards_start(shards, &cursor);
    moe_status status = moe__file_seek(&cursor, shards->index, MOE__ENTRY_METADATA, name, &entry);
    buffer[0] = 0; /* only now: buffer may be name */
    return status ? status : moe__json_copy(&cursor.j, entry.value, buffer, size);
}

MOE_API moe_status moe_shards_router(const moe_shards *shards, size_t i, size_t *layer, char *name, size_t size) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    if (!layer || !name) return MOE_E_NULL_OUT;
    if (!size) return MOE_E_SMALL_MEMORY;
    name[0] = 0;
    if (!shards || !shards->bytes) return MOE_E_NULL_BYTES;
    moe__model_shards_start(shards, &cursor);
    moe_status status = moe__file_router(&cursor, shards->index, i, layer, &entry);
    return status ? status : moe__json_copy(&cursor.j, entry.name, name, size);
}

/* -- experts' weights in the layouts of others -- */
/* One tensor of all experts: element (row, column) of the library's matrix of an expert stands at out = from + step
 * column of the file's, whose outs are `outs` in number. */
typedef struct moe__model_matrix {
    const unsigned char *bytes;
    moe_dtype_kind dtype;
    int out_first;
    size_t rows, columns, outs, from, step;
} moe__model_matrix;

/* A tile of at most 32 by 32 of expert e, in rows of 32: read along the file's rows. */
static moe_status moe__model_tile(const moe__model_matrix *m, size_t e, const size_t at[2], const size_t size[2],
                                  float tile[32 * 32]) {
    float line[64];
    size_t element = moe_dtype_size(m->dtype), lines = size[0], length = (size[1] - 1) * m->step + 1;
    if (m->out_first) lines = size[1], length = size[0];
    for (size_t i = 0; i < lines; i++) {
        size_t out = m->from + m->step * at[1], place = (e * m->rows + at[0] + i) * m->outs + out;
        if (m->out_first) place = (e * m->outs + out + m->step * i) * m->rows + at[0];
        moe_status status = moe_to_float(m->dtype, length, m->bytes + place * element, line);
        if (status) return status;
        if (!moe__all_finite(length, line)) return MOE_E_NAN_WEIGHT;
        if (m->out_first)
            for (size_t k = 0; k < length; k++) tile[k * 32 + i] = line[k];
        else
            for (size_t k = 0; k < size[1]; k++) tile[i * 32 + k] = line[k * m->step];
    }
    return MOE_OK;
}
static moe_status moe__model_pack(const moe__plan *plan, int id, const moe__model_matrix *m, size_t e, size_t expert,
                                  float *params) {
    float tile[32 * 32];
    size_t at[2], size[2];
    for (at[0] = 0; at[0] < m->rows; at[0] += 32)
        for (at[1] = 0; at[1] < m->columns; at[1] += 32) {
            size[0] = moe__min(32, m->rows - at[0]);
            size[1] = moe__min(32, m->columns - at[1]);
            moe_status status = moe__model_tile(m, e, at, size, tile);
            if (status) return status;
            for (size_t i = 0; i < size[0]; i++)
                moe__plan_set(plan, id, params, expert * m->rows + at[0] + i, at[1], size[1], tile + 32 * i);
        }
    return MOE_OK;
}
/* Where a tensor stands in the arrays of others; bytes NULL: nowhere. */
static moe__model_matrix moe__model_matrix_of(const moe__plan *plan, int id, const moe_experts_arrays *arrays,
                                              const moe_experts_layout *layout) {
    const void *from[] = {arrays->w1, arrays->wu, arrays->w2, arrays->b1, arrays->bu, arrays->b2};
    int up = id == MOE__T_WU || id == MOE__T_BU;
    moe__model_matrix m = {NULL, layout->dtype, layout->out_first, 0, 0, 0, 0, 1};
    m.bytes = (const unsigned char *)from[id - MOE__T_W1];
    m.rows = moe__plan_rows(plan, id);
    m.columns = m.outs = moe__plan_columns(plan, id);
    if (!layout->gate_up || id == MOE__T_W2 || id == MOE__T_B2) return m;
    if (up) m.bytes = (const unsigned char *)from[id - 1 - MOE__T_W1]; /* its gate's array */
    m.outs = 2 * m.columns;
    if (layout->gate_up == MOE_GATE_UP_INTERLEAVED) m.step = 2, m.from = (size_t)up;
    else if (up) m.from = m.columns;
    return m;
}
MOE_API moe_status moe_experts_pack(const moe_desc *desc, size_t first, size_t n, const moe_experts_arrays *arrays,
                                    const moe_experts_layout *layout, float *params) {
    moe__plan plan;
    moe_experts_layout now = {MOE_DTYPE_F32, 0, MOE_GATE_UP_SEPARATE};
    moe_status status = moe__pass_expert_plan(desc, 0, arrays, params, &plan);
    if (status) return status;
    if (first > plan.G || n > plan.G - first) return MOE_E_INDEX;
    if (layout) now = *layout;
    if (now.dtype == MOE_DTYPE_NONE) now.dtype = MOE_DTYPE_F32;
    if ((unsigned)now.gate_up > MOE_GATE_UP_INTERLEAVED) return MOE_E_GATE_UP;
    if (now.gate_up && (arrays->wu || arrays->bu || !plan.count[MOE__T_WU])) return MOE_E_GATE_UP;
    status = moe_to_float(now.dtype, 0, NULL, NULL);
    for (size_t e = 0; e < n && !status; e++) {
        memset(params + (first + e) * plan.expert, 0, plan.expert * sizeof(float));
        for (int id = MOE__T_W1; id <= MOE__T_B2 && !status; id++) {
            if (!plan.count[id]) continue;
            moe__model_matrix m = moe__model_matrix_of(&plan, id, arrays, &now);
            if (m.bytes) status = moe__model_pack(&plan, id, &m, e, first + e, params);
        }
    }
    return status;
}

/* ==== >>save ==================================================================================
 * A layer as a safetensors file, and back. What a file holds follows from the tensor table and the field table; it is
 * checked entirely before a layer is given out. Uses layer, safetensors, desc. A file, and the order of its tensors:
 *
 *     8 bytes            the header's length, little-endian
 *     header             {"__metadata__":{"format":"moe.h","version":"1", every field of the desc, "step", "draws"},
 *                         "router":{...}, ... one entry a tensor}, and blanks to a multiple of 8
 *     parameters         router ... experts.w1 ... experts.constant: those that are there, as in the table
 *     moments            moment1.router ..., moment2.router ...: with the optimiser
 *     controller.state   with a controller that has one */
typedef struct moe__save_entry {
    moe_part_kind part;
    moe_tensor tensor;
    char name[40]; /* in the file */
    const char *format;
    size_t bytes;
} moe__save_entry;

static void moe__save_name(moe__save_entry *entry, const char *prefix) {
    moe__text text = {entry->name, sizeof entry->name, 0};
    moe__text_add(&text, prefix);
    moe__text_add(&text, entry->tensor.name);
    moe__text_end(&text);
    entry->bytes = entry->tensor.count * sizeof(float);
}
/* Tensor i of the file; 0 past the last. */
static int moe__save_at(const moe__plan *plan, int with_optimizer, size_t i, moe__save_entry *out) {
    static const char *const prefix[] = {"", "moment1.", "moment2."};
    static const moe_part_kind parts[] = {MOE_PART_PARAMS, MOE_PART_MOMENT1, MOE_PART_MOMENT2};
    size_t n = 0, n_parts = 1;
    if (with_optimizer) n_parts = 3;
    if (with_optimizer && plan->desc.optimizer == MOE_OPTIMIZER_SGD) n_parts = 2;
    for (int id = 0; id < MOE__T_COUNT; id++) n += plan->count[id] != 0;
    memset(out, 0, sizeof *out);
    out->format = moe_dtype_name(MOE_DTYPE_F32);
    if (i < n * n_parts) {
        int id = moe__plan_tensor_at(plan, i % n, &out->tensor);
        out->part = parts[i / n];
        if (out->part == MOE_PART_PARAMS) out->format = moe_dtype_name(moe__plan_tensors[id].format);
        moe__save_name(out, prefix[i / n]);
        return 1;
    }
    moe_control control;
    moe__arena none = {NULL, 0, 0};
    if (i > n * n_parts || moe__control_layout(&control, plan->desc.controller, plan->E, &none)) return 0;
    if (!control.n_state) return 0;
    out->part = MOE_PART_PARAMS;
    out->tensor.name = MOE__STATE_NAME;
    out->tensor.n_dims = 1;
    out->tensor.dim[0] = out->tensor.count = control.n_state;
    moe__save_name(out, "");
    return 1;
}
/* Bytes of the largest tensor. */
static size_t moe__save_largest(const moe__plan *plan, int with_optimizer) {
    moe__save_entry entry;
    size_t most = 0;
    for (size_t i = 0; moe__save_at(plan, with_optimizer, i, &entry); i++) most = moe__max(most, entry.bytes);
    return most;
}

/* -- writing -- */
static void moe__save_number(moe__text *text, const char *before, uint64_t number, const char *after) {
    moe__text_add(text, before);
    moe__text_u64(text, number);
    moe__text_add(text, after);
}
/* The header, padded so that the data begins at a multiple of 8; the data's size into *data. */
static moe_status moe__save_header(const moe_layer *layer, int with_optimizer, moe__text *text, size_t *data) {
    moe__save_entry entry;
    *data = 0;
    moe__text_add(text, "{\"__metadata__\":{\"format\":\"moe.h\",\"version\":\"1\",");
    moe__desc_fields_write(&layer->plan.desc, 1, text);
    if (with_optimizer) {
        moe__save_number(text, ",\"step\":\"", layer->step, "\"");
        moe__save_number(text, ",\"draws\":\"", layer->draws, "\"");
    }
    moe__text_add(text, "}");
    for (size_t i = 0; moe__save_at(&layer->plan, with_optimizer, i, &entry); i++) {
        moe__text_add(text, ",\"");
        moe__text_add(text, entry.name);
        moe__text_add(text, "\":{\"dtype\":\"");
        moe__text_add(text, entry.format);
        moe__text_add(text, "\",\"shape\":");
        for (size_t k = 0; k < entry.tensor.n_dims; k++) moe__save_number(text, k ? "," : "[", entry.tensor.dim[k], "");
        moe__save_number(text, "],\"data_offsets\":[", *data, ",");
        if (!moe__add_size(*data, entry.bytes, data)) return MOE_E_OVERFLOW;
        moe__save_number(text, "", *data, "]}");
    }
    moe__text_add(text, "}");
    while (text->n % 8) moe__text_char(text, ' ');
    return MOE_OK;
}
/* Bytes of the header, without the 8 of its length, and of the whole file. */
static moe_status moe__save_measure(const moe_layer *layer, int with_optimizer, size_t *header, size_t *total) {
    moe__text text = {NULL, 0, 0};
    if (!layer) return MOE_E_NULL_LAYER;
    if (with_optimizer && layer->plan.desc.training == MOE_OFF) return MOE_E_INFERENCE;
    moe_status status = moe__save_header(layer, with_optimizer, &text, total);
    *header = text.n;
    if (status) return status;
    if (!moe__add_size(*total, text.n + 8, total)) return MOE_E_OVERFLOW;
    return MOE_OK;
}
static size_t moe__save_put_header(const moe_layer *layer, int with_optimizer, size_t header, unsigned char *to) {
    moe__text text = {(char *)to + 8, header, 0};
    size_t data;
    for (size_t i = 0; i < 8; i++) to[i] = (unsigned char)((uint64_t)header >> (8 * i));
    (void)moe__save_header(layer, with_optimizer, &text, &data);
    return 8 + header;
}

/* n floats between this machine's order of bytes and little-endian: the same both ways. */
static void moe__save_little_endian(unsigned char *bytes, size_t n) {
    for (; n > 0; n--, bytes += 4) {
        uint32_t word;
        memcpy(&word, bytes, 4);
        for (int i = 0; i < 4; i++) bytes[i] = (unsigned char)(word >> (8 * i));
    }
}
/* A tensor's bytes, to a place of any alignment. The floats are laid at the aligned place just below it (the header is
 * always before it) and moved up. */
static moe_status moe__save_put_tensor(const moe_layer *layer, const moe__save_entry *entry, unsigned char *to) {
    size_t shift = (size_t)((uintptr_t)to % sizeof(float));
    unsigned char below[sizeof(float)], *aligned = to - shift;
    float *floats = (float *)(void *)aligned;
    memcpy(below, aligned, shift);
    moe_status status = moe_layer_get(layer, entry->part, entry->tensor.name, floats, entry->tensor.count);
    if (!status && !moe__layer_numbers_ok(entry->part, entry->tensor.count, floats)) status = MOE_E_SAVE_NAN;
    if (shift) memmove(to, aligned, entry->bytes);
    memcpy(aligned, below, shift);
    moe__save_little_endian(to, entry->tensor.count);
    return status;
}

MOE_API moe_status moe_layer_save_size(const moe_layer *layer, int with_optimizer, size_t *bytes) {
    size_t header, total;
    if (!bytes) return MOE_E_NULL_OUT;
    *bytes = 0;
    moe_status status = moe__save_measure(layer, with_optimizer, &header, &total);
    if (!status) *bytes = total;
    return status;
}
MOE_API moe_status moe_layer_save_memory(const moe_layer *layer, int with_optimizer, void *bytes, size_t size) {
    unsigned char *to = (unsigned char *)bytes;
    moe__save_entry entry;
    size_t header, total;
    moe_status status = moe__save_measure(layer, with_optimizer, &header, &total);
    if (!status && with_optimizer && !layer->fresh) status = MOE_E_UNSTEPPED;
    if (status) return status;
    if (!bytes) return MOE_E_NULL_BYTES;
    if (size < total) return MOE_E_SMALL_MEMORY;
    to += moe__save_put_header(layer, with_optimizer, header, to);
    for (size_t i = 0; !status && moe__save_at(&layer->plan, with_optimizer, i, &entry); i++) {
        status = moe__save_put_tensor(layer, &entry, to);
        to += entry.bytes;
    }
    return status;
}

MOE_API moe_status moe_layer_check(const moe_layer *layer, int with_optimizer, moe_part_kind *part,
                                   const char **name) {
    moe__save_entry entry;
    size_t header, total;
    moe_status status = moe__save_measure(layer, with_optimizer, &header, &total);
    if (!part || !name) return MOE_E_NULL_OUT;
    *name = NULL;
    if (status) return status;
    const moe__plan *plan = &layer->plan;
    float *values = (float *)moe__alloc(plan->desc.alloc_context, moe__save_largest(plan, with_optimizer));
    if (!values) return MOE_E_NO_MEMORY;
    for (size_t i = 0; !status && moe__save_at(plan, with_optimizer, i, &entry); i++) {
        *part = entry.part;
        status = moe_layer_get(layer, entry.part, entry.tensor.name, values, entry.tensor.count);
        if (!status && !moe__layer_numbers_ok(entry.part, entry.tensor.count, values)) status = MOE_E_SAVE_NAN;
        if (status) *name = entry.tensor.name;
    }
    moe__free(plan->desc.alloc_context, values);
    return status;
}

/* -- reading -- */
typedef struct moe__save_state { moe__plan plan; int with_optimizer; uint64_t step, draws; } moe__save_state;

/* One entry of the metadata into *desc and *state; *known: bit 0 the format is ours, bit 1 the version. A field that is
 * not there is 0, the default: a later moe.h that adds one reads older files, and raises the version when its own files
 * need it. What is no field is not ours. */
static int moe__save_metadata(const moe__json *json, const moe__file_entry *entry, moe_desc *desc,
                              moe__save_state *state, int *known) {
    moe__desc_field field;
    char name[32], text[80];
    int fits = moe__json_copy(json, entry->value, text, sizeof text) == MOE_OK;
    if (moe__json_is(json, entry->name, "format")) {
        *known = (*known & ~1) | (fits && !strcmp(text, "moe.h"));
        return 1;
    }
    if (moe__json_is(json, entry->name, "version")) {
        *known = (*known & ~2) | (fits && !strcmp(text, "1")) << 1;
        return 1;
    }
    if (moe__json_is(json, entry->name, "step"))
        return state->with_optimizer = fits && moe__parse_u64(text, &state->step);
    if (moe__json_is(json, entry->name, "draws")) return fits && moe__parse_u64(text, &state->draws);
    for (size_t i = 0; moe__desc_field_at(i, &field, name); i++)
        if (moe__json_is(json, entry->name, field.name)) return fits && moe__desc_field_read(&field, text, desc);
    return 1;
}
/* The plan, and what the optimiser saved, from the metadata, read once. */
static moe_status moe__save_plan(const moe_file *file, const moe_desc *surroundings, moe__save_state *state) {
    moe__file_cursor cursor;
    moe__file_entry entry;
    moe_desc desc;
    int known = 0;
    moe_status status = moe__file_cursor_init(&cursor, file);
    memset(&desc, 0, sizeof desc);
    memset(state, 0, sizeof *state);
    while (!status) {
        status = moe__file_cursor_next_of(&cursor, MOE__ENTRY_METADATA, &entry);
        if (!status && !moe__save_metadata(&cursor.j, &entry, &desc, state, &known)) return MOE_E_FILE_DESC;
    }
    if (status != MOE_E_NAME || known != 3) return MOE_E_FILE_DESC;
    if (surroundings) {
        desc.parallel = surroundings->parallel;
        desc.alloc_context = surroundings->alloc_context;
    }
    if (moe__desc_plan(&desc, &state->plan)) return MOE_E_FILE_DESC;
    if (state->with_optimizer && state->plan.desc.training == MOE_OFF) return MOE_E_FILE_DESC;
    return MOE_OK;
}

/* The file's tensor with the name, type and shape that the layer has. */
static moe_status moe__save_find(const moe_file *file, const moe__save_entry *entry, moe_file_tensor *out) {
    moe_status status = moe_file_find(file, entry->name, out);
    if (status == MOE_E_NAME) out->name = entry->tensor.name, out->name_length = strlen(out->name);
    if (status == MOE_E_FILE_DTYPE) return status;
    if (status || strcmp(out->dtype, entry->format)) return MOE_E_FILE_TENSOR;
    if (out->n_dims != entry->tensor.n_dims) return MOE_E_FILE_TENSOR;
    for (size_t k = 0; k < out->n_dims; k++)
        if (out->dim[k] != entry->tensor.dim[k]) return MOE_E_FILE_TENSOR;
    return MOE_OK;
}
static moe_status moe__save_set_tensor(moe_layer *layer, const moe__save_entry *entry, const unsigned char *bytes,
                                       float *scratch) {
    size_t n = entry->tensor.count;
    memcpy(scratch, bytes, entry->bytes);
    moe__save_little_endian((unsigned char *)scratch, n);
    if (!moe__layer_numbers_ok(entry->part, n, scratch)) return MOE_E_FILE_NAN;
    return moe_layer_set(layer, entry->part, entry->tensor.name, scratch, n);
}
static moe_status moe__save_fill(moe_layer *layer, moe_file *file, int with_optimizer) {
    moe__save_entry entry;
    moe_file_tensor tensor;
    void *context = layer->plan.desc.alloc_context;
    float *scratch = (float *)moe__alloc(context, moe__save_largest(&layer->plan, with_optimizer));
    moe_status status = scratch ? MOE_OK : MOE_E_NO_MEMORY;
    for (size_t i = 0; !status && moe__save_at(&layer->plan, with_optimizer, i, &entry); i++) {
        status = moe__save_find(file, &entry, &tensor);
        if (!status) status = moe__save_set_tensor(layer, &entry, tensor.data, scratch);
        if (status) file->fault = tensor;
    }
    moe__free(context, scratch);
    return status;
}
MOE_API moe_status moe_layer_load_file(moe_layer **out, moe_file *file, const moe_desc *surroundings) {
    moe_layer *layer = NULL;
    moe_file_tensor tensor;
    moe__save_state state;
    moe__save_entry entry;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    if (!file) return MOE_E_NULL_BYTES;
    memset(&file->fault, 0, sizeof file->fault);
    moe_status status = moe__save_plan(file, surroundings, &state);
    if (status) return status;
    /* all shapes before any memory: what is allocated is in proportion to the file */
    for (size_t i = 0; !status && moe__save_at(&state.plan, state.with_optimizer, i, &entry); i++) {
        status = moe__save_find(file, &entry, &tensor);
        if (status) file->fault = tensor;
    }
    if (!status) status = moe_layer_new(&layer, &state.plan.desc);
    if (!status) status = moe__save_fill(layer, file, state.with_optimizer);
    if (status) {
        moe_layer_free(layer);
        return status;
    }
    if (state.with_optimizer) layer->step = state.step, layer->draws = state.draws;
    *out = layer;
    return MOE_OK;
}
MOE_API moe_status moe_layer_load_memory(moe_layer **out, const void *bytes, size_t size,
                                         const moe_desc *surroundings) {
    moe_file file;
    void *context = NULL;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    if (surroundings) context = surroundings->alloc_context;
    moe_status status = moe__file_open(&file, bytes, size, context);
    if (status) return status;
    status = moe_layer_load_file(out, &file, surroundings);
    moe_file_close(&file);
    return status;
}

#ifndef MOE_NO_STDIO
/* The whole file, one tensor after the other: the memory is the header's or the largest tensor's. */
static moe_status moe__save_write(const moe_layer *layer, int with_optimizer, FILE *file) {
    void *context = layer->plan.desc.alloc_context;
    moe__save_entry entry;
    size_t header, total;
    moe_status status = moe__save_measure(layer, with_optimizer, &header, &total);
    if (!status && with_optimizer && !layer->fresh) status = MOE_E_UNSTEPPED;
    if (status) return status;
    size_t most = moe__max(header + 8, moe__save_largest(&layer->plan, with_optimizer));
    unsigned char *buffer = (unsigned char *)moe__alloc(context, most);
    if (!buffer) return MOE_E_NO_MEMORY;
    total = moe__save_put_header(layer, with_optimizer, header, buffer);
    if (fwrite(buffer, 1, total, file) != total) status = MOE_E_WRITE;
    for (size_t i = 0; !status && moe__save_at(&layer->plan, with_optimizer, i, &entry); i++) {
        status = moe__save_put_tensor(layer, &entry, buffer);
        if (!status && fwrite(buffer, 1, entry.bytes, file) != entry.bytes) status = MOE_E_WRITE;
    }
    moe__free(context, buffer);
    return status;
}
/* Why the operating system refused: a folder, where it says so. */
static moe_status moe__save_cause(moe_status otherwise) {
#ifdef EISDIR
    if (errno == EISDIR) return MOE_E_FOLDER;
#endif
    return otherwise;
}
static moe_status moe__save_to(const moe_layer *layer, int with_optimizer, const char *part, const char *path) {
    errno = 0;
    FILE *file = fopen(part, "wb");
    if (!file) return moe__save_cause(MOE_E_OPEN);
    moe_status status = moe__save_write(layer, with_optimizer, file);
    if ((fflush(file) || ferror(file)) && !status) status = MOE_E_WRITE;
    if (fclose(file) && !status) status = MOE_E_WRITE;
#ifdef _WIN32
    if (!status) (void)remove(path); /* rename does not replace there */
#endif
    if (!status && rename(part, path)) status = moe__save_cause(MOE_E_WRITE);
    if (status) (void)remove(part);
    return status;
}
MOE_API moe_status moe_layer_save(const moe_layer *layer, int with_optimizer, const char *path) {
    size_t header, total, length;
    moe_status status = moe__save_measure(layer, with_optimizer, &header, &total);
    if (status) return status;
    if (!path) return MOE_E_NULL_PATH;
    length = strlen(path);
    char *part = (char *)moe__alloc(layer->plan.desc.alloc_context, length + sizeof ".part");
    if (!part) return MOE_E_NO_MEMORY;
    memcpy(part, path, length);
    memcpy(part + length, ".part", sizeof ".part");
    status = moe__save_to(layer, with_optimizer, part, path);
    moe__free(layer->plan.desc.alloc_context, part);
    return status;
}

/* The bytes from here to the end, without moving; 0 if they cannot be counted. */
static uint64_t moe__save_file_length(FILE *file) {
#ifdef _WIN32
    __int64 n = _fseeki64(file, 0, SEEK_END) ? -1 : _ftelli64(file);
#else
    long n = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
#endif
    return n < 0 || fseek(file, 0, SEEK_SET) ? 0 : (uint64_t)n;
}
/* All bytes of a file into memory of our own. */
static moe_status moe__save_read_all(FILE *file, void *context, void **bytes, uint64_t *length) {
    errno = 0;
    if (fgetc(file) == EOF) return ferror(file) ? moe__save_cause(MOE_E_READ) : MOE_E_FILE_SHORT; /* or empty */
    *length = moe__save_file_length(file);
    if (!*length) return MOE_E_READ;
    if (*length > SIZE_MAX) return MOE_E_OVERFLOW;
    *bytes = moe__alloc(context, (size_t)*length);
    if (!*bytes) return MOE_E_NO_MEMORY;
    if (fread(*bytes, 1, (size_t)*length, file) != (size_t)*length) return MOE_E_READ;
    return MOE_OK;
}
MOE_API moe_status moe_layer_load(moe_layer **out, const char *path, const moe_desc *surroundings) {
    void *context = NULL, *bytes = NULL;
    uint64_t length = 0;
    if (!out) return MOE_E_NULL_OUT;
    *out = NULL;
    if (surroundings) context = surroundings->alloc_context;
    if (!path) return MOE_E_NULL_PATH;
    FILE *file = fopen(path, "rb");
    if (!file) return MOE_E_OPEN;
    moe_status status = moe__save_read_all(file, context, &bytes, &length);
    if (fclose(file) && !status) status = MOE_E_READ;
    if (!status) status = moe_layer_load_memory(out, bytes, (size_t)length, surroundings);
    moe__free(context, bytes);
    return status;
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
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright
 * notice and this permission notice shall be included in all copies or substantial portions of the Software. THE
 * SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 *
 * B. Public domain (www.unlicense.org). This is free and unencumbered software released into the public domain. Anyone
 * is free to copy, modify, publish, use, compile, sell, or distribute this software, either in source code form or as a
 * compiled binary, for any purpose, commercial or non-commercial, and by any means.
 */

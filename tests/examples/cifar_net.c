/* The network of build/cifar10: gradients of every tensor along themselves, with ReLU and GELU, images and positions as
 * tokens, convolutions direct and by Winograd's filtering; the same bits for any number of threads; the operations of a
 * step. */
#include "test.h"

#include "examples/common/cifar_net.h"

enum { IMAGES = 12 };
static cifar data;

static cifar_net *small_net(int gelu, int tokens, int by_muon, int winograd, size_t threads) {
    cifar_shape shape = {IMAGES, {16, 32, CIFAR_FEATURES}, 3, by_muon, gelu, tokens, winograd, 0.05f};
    moe_desc desc = {0};
    nn_must(moe_desc_system(&desc, "mixtral"));
    desc.d_model = CIFAR_FEATURES;
    desc.d_ff = 32;
    desc.loss[MOE_LOSS_SWITCH] = 0; /* the gradient of the cross-entropy alone */
    desc.parallel.n_threads = threads;
    return cifar_net_new(&shape, &desc, &data);
}
static void images(cifar_net *m) {
    cifar_batch b = {.set = &data.train, .first = 20, .count = IMAGES, .x = m->image, .label = m->label};
    cifar_batch_make(&b, &m->ops.parallel);
}
static double mean_loss(cifar_net *m) {
    cifar_net_forward(m, IMAGES, 1);
    return nn_cross_entropy(&m->ops, IMAGES, CIFAR_CLASSES, 0.1f, m->logits, m->label, m->prob, m->dlogits) / IMAGES;
}
static void learn(cifar_net *m, size_t steps) {
    for (size_t step = 1; step <= steps; step++) {
        mean_loss(m);
        cifar_net_backward(m, IMAGES);
        cifar_net_step(m, 2e-3f, step);
    }
}

/* Along its own gradient g a tensor changes the loss by |g|: central differences. */
static void check_along(cifar_net *m, size_t at, size_t count, const char *what) {
    float *g = allocate(count, sizeof *g), *keep = allocate(count, sizeof *keep);
    double length = 0, side[2], h;
    memcpy(g, m->bank.grad + at, count * sizeof *g);
    memcpy(keep, m->bank.value + at, count * sizeof *keep);
    for (size_t i = 0; i < count; i++) length += (double)g[i] * (double)g[i];
    length = sqrt(length);
    CHECK(length > 1e-4);
    h = fmin(5e-4 / length, 5e-3); /* the loss moves by no more than 0.0005, the tensor by no more than 0.005 */
    for (int k = 0; k < 2; k++) {
        for (size_t i = 0; i < count; i++)
            m->bank.value[at + i] = keep[i] + (float)((k ? h : -h) / length * (double)g[i]);
        side[k] = mean_loss(m);
    }
    memcpy(m->bank.value + at, keep, count * sizeof *keep);
    printf("%s: |g| %.5f, measured %.5f\n", what, length, (side[1] - side[0]) / (2 * h));
    CHECK_WITHIN((side[1] - side[0]) / (2 * h), length, 0.02 * length);
    free(g);
    free(keep);
}
static void check_network(int gelu, int tokens, int winograd) {
    cifar_net *m = small_net(gelu, tokens, 0, winograd, 1);
    images(m);
    learn(m, 5); /* gammas and betas are no longer all alike */
    mean_loss(m);
    cifar_net_backward(m, IMAGES);
    for (int i = 0; i < CIFAR_BLOCKS; i++) {
        const cifar_block *b = &m->block[i];
        check_along(m, b->weight1, nn_conv_weights(&b->conv1), "convolution 1");
        check_along(m, b->weight2, nn_conv_weights(&b->conv2), "convolution 2");
        check_along(m, b->norm1.gamma, b->norm1.c, "gamma 1");
        check_along(m, b->norm1.beta, b->norm1.c, "beta 1");
        check_along(m, b->norm2.gamma, b->norm2.c, "gamma 2");
        check_along(m, b->norm2.beta, b->norm2.c, "beta 2");
    }
    check_along(m, m->head_norm.gamma, CIFAR_FEATURES, "head gamma");
    check_along(m, m->head_norm.beta, CIFAR_FEATURES, "head beta");
    check_along(m, m->class_weight, CIFAR_FEATURES * CIFAR_CLASSES, "class weight");
    check_along(m, m->class_bias, CIFAR_CLASSES, "class bias");
    for (size_t i = 0; i < nn_conv_weights(&m->stem); i++) CHECK(m->bank.grad[m->stem_weight + i] == 0);
    cifar_net_free(m);
}
static void test_relu_images(void) { check_network(0, 0, 0); }
static void test_gelu_positions(void) { check_network(1, 1, 1); }

/* A training of a few steps, by Muon too, is the same for any number of threads. */
static void test_threads(void) {
    uint64_t hash[3];
    for (int k = 0; k < 3; k++) {
        cifar_net *m = small_net(1, 0, 1, 1, (size_t)k + 1);
        images(m);
        learn(m, 3);
        hash[k] = moe_hash(moe_layer_hash(m->moe), m->bank.value, m->bank.count * sizeof(float));
        cifar_net_free(m);
    }
    CHECK(hash[0] == hash[1] && hash[1] == hash[2]);
}

/* The two ways to convolve say the same of the first batch, but for rounding. */
static void test_winograd(void) {
    cifar_net *m[2];
    double loss[2];
    for (int k = 0; k < 2; k++) {
        m[k] = small_net(1, 0, 0, k, 1);
        images(m[k]);
        loss[k] = mean_loss(m[k]);
        cifar_net_backward(m[k], IMAGES);
    }
    CHECK_WITHIN(loss[1], loss[0], 1e-4);
    double apart = 0, size = 0;
    for (size_t i = 0; i < m[0]->bank.count; i++) {
        double g = (double)m[0]->bank.grad[i], d = (double)m[1]->bank.grad[i] - g;
        apart += d * d, size += g * g;
    }
    printf("gradients: %.1e of their length apart\n", sqrt(apart / size));
    CHECK(apart > 0 && sqrt(apart / size) < 1e-2); /* near ties of the pooling fall the other way */
    for (int k = 0; k < 2; k++) cifar_net_free(m[k]);
}

/* By hand: 12 images; pictures of 31, 15 and 7 pixels a side, of 64, 16 and 4 tiles; 2 experts of 3 matrices, a router
 * of 8. */
static void test_flops(void) {
    double stem = 31 * 31 * 12 * 24, head = 3.0 * (256 * 3 * 2 * 32 + 256 * 8 + 256 * 10);
    double direct[] = {31 * 31 * 9 * 24 * 16 * 2.0 + 15 * 15 * 9 * 16 * 16 * 3.0,
                       3.0 * (15 * 15 * 9 * 16 * 32 + 7 * 7 * 9 * 32 * 32), 3.0 * 7 * 7 * 9 * 32 * 256};
    double winograd[] = {64 * 36 * 24 * 16 * 2.0 + 16 * 36 * 16 * 16 * 3.0,
                         3.0 * (16 * 36 * 16 * 32 + 4 * 36 * 32 * 32), 3.0 * 4 * 36 * 32 * 256};
    double last = 3.0 * 3 * 3 * 9 * 256 * 256; /* 3 pixels a side have no room for tiles */
    for (int k = 0; k < 2; k++) {
        cifar_net *m = small_net(0, 0, 0, k, 1);
        const double *blocks = k ? winograd : direct;
        double sum = stem + blocks[0] + blocks[1] + blocks[2] + last + head;
        CHECK_NEAR(cifar_net_flops(m), 2 * IMAGES * sum, 1);
        cifar_net_free(m);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    cifar_load(&data, NULL, argv[0]);
    RUN(test_relu_images);
    RUN(test_gelu_positions);
    RUN(test_threads);
    RUN(test_winograd);
    RUN(test_flops);
    cifar_free(&data);
    return test_end();
}

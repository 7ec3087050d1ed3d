// file.c - inference from flash, level 3: the bytes of a safetensors file into a layer in memory of your own, tensor by
// tensor; any desc whose layer fits. No heap.
#define MOE_STATIC
#define MOE_NO_STDIO
#define MOE_MALLOC(bytes, ctx) ((void)(bytes), (void)(ctx), (void *)0)
#define MOE_FREE(ptr, ctx) ((void)(ptr), (void)(ctx))
#include "model_of.h"

#include "model.h"
#include "weights.h" // only the tokens

// All parameters of the layer from the file. Its floats are little-endian, and aligned where the file is, to 8 bytes.
static moe_status fill(moe_layer *layer) {
    moe_file file;
    moe_tensor tensor;
    moe_file_tensor found;
    moe_status status = moe_file_open(&file, model, sizeof model); // up to 192 tensors need no memory
    for (size_t i = 0; !status && i < moe_layer_tensors(layer); i++) {
        status = moe_layer_tensor(layer, i, &tensor);
        if (!status) status = moe_file_find(&file, tensor.name, &found);
        if (!status && (found.bytes != tensor.count * sizeof(float) || moe_dtype_of(found.dtype) != MOE_DTYPE_F32))
            status = MOE_E_FILE_TENSOR;
        if (!status)
            status = moe_layer_set(layer, MOE_PART_PARAMS, tensor.name, (const float *)(const void *)found.data,
                                   tensor.count);
    }
    moe_file_close(&file);
    return status;
}

int main(void) {
    static float layer_memory[13312], tape_memory[5376]; // moe_layer_size and moe_tape_size ask for less
    static float y[TOKENS * D];
    moe_desc desc = model_desc();
    moe_layer *layer = NULL;
    moe_tape *tape = NULL;
    moe_status status = moe_layer_init(&layer, &desc, layer_memory, sizeof layer_memory);
    if (!status) status = moe_tape_init(&tape, &desc, TOKENS, MOE_OFF, tape_memory, sizeof tape_memory);
    if (!status) status = fill(layer);
    if (!status) status = moe_forward_tape(layer, tape, tokens, TOKENS, y);
    if (!status) print_outputs(y);
    return (int)status;
}

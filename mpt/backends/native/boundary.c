/* What this library says about itself: how its structures lie in memory, its constants, which variant it is.
 *
 * ctypes believes what Python says about C, and a field out of place is a wrong answer, or worse. So Python's side of
 * each (structures.py) is compared with this when the library is loaded.
 */
#include "common.h"
#include "documents.h"

typedef struct { /* the lists below end with one that has no name */
    const char *name;
    int64_t offset, size; /* in bytes */
} Place;

#define WHOLE(type) {#type, 0, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(((type *)0)->name)}

const Place *mpt_places(void) {
    static const Place places[] = {
        WHOLE(Linear), FIELD(Linear, weight), FIELD(Linear, scale), FIELD(Linear, bias), FIELD(Linear, n_out),
        FIELD(Linear, n_in), FIELD(Linear, format),
        WHOLE(Norm), FIELD(Norm, weight), FIELD(Norm, bias),
        WHOLE(Lora), FIELD(Lora, a), FIELD(Lora, b), FIELD(Lora, rank),
        WHOLE(Layer), FIELD(Layer, norm_1), FIELD(Layer, norm_2), FIELD(Layer, q_ln), FIELD(Layer, k_ln),
        FIELD(Layer, wqkv), FIELD(Layer, out_proj), FIELD(Layer, up_proj), FIELD(Layer, down_proj),
        WHOLE(Model), FIELD(Model, format), FIELD(Model, n_layers), FIELD(Model, d_model), FIELD(Model, n_heads), FIELD(Model, n_kv_heads),
        FIELD(Model, d_head), FIELD(Model, d_ffn), FIELD(Model, eps), FIELD(Model, softmax_scale),
        FIELD(Model, clip_qkv), FIELD(Model, slopes), FIELD(Model, layers), FIELD(Model, norm_f), FIELD(Model, head),
        WHOLE(Step), FIELD(Step, n_tokens), FIELD(Step, n_rows), FIELD(Step, n_logits), FIELD(Step, n_threads),
        FIELD(Step, n_adapters), FIELD(Step, max_rank), FIELD(Step, x), FIELD(Step, row_tokens),
        FIELD(Step, row_length), FIELD(Step, row_capacity), FIELD(Step, kv), FIELD(Step, kv_scale),
        FIELD(Step, key_norm), FIELD(Step, adapters), FIELD(Step, row_adapter), FIELD(Step, low),
        FIELD(Step, logit_tokens), FIELD(Step, logits), FIELD(Step, scratch), FIELD(Step, keys_read),
        FIELD(Step, drop),
        WHOLE(Heads), FIELD(Heads, numbers), FIELD(Heads, row), FIELD(Heads, head), FIELD(Heads, position),
        WHOLE(Documents), FIELD(Documents, format), FIELD(Documents, n_heads), FIELD(Documents, d_head),
        FIELD(Documents, n_threads), FIELD(Documents, row_length), FIELD(Documents, n_positions),
        FIELD(Documents, n_pieces), FIELD(Documents, longest), FIELD(Documents, pieces), FIELD(Documents, slopes),
        FIELD(Documents, scale), FIELD(Documents, q), FIELD(Documents, k), FIELD(Documents, v), FIELD(Documents, out),
        FIELD(Documents, lse), FIELD(Documents, out_gradient), FIELD(Documents, q_gradient),
        FIELD(Documents, k_gradient), FIELD(Documents, v_gradient), FIELD(Documents, scratch),
        {NULL, 0, 0},
    };
    return places;
}

typedef struct {
    const char *name;
    int64_t value;
} Constant;

#define CONSTANT(name) {#name, name}

const Constant *mpt_constants(void) {
    static const Constant constants[] = {
        CONSTANT(PANEL), CONSTANT(MAX_TOKENS), CONSTANT(MAX_HEAD), CONSTANT(N_OUT_MULTIPLE), CONSTANT(N_IN_MULTIPLE),
        CONSTANT(N_IN_MULTIPLE_INT8), CONSTANT(WQKV), CONSTANT(OUT_PROJ), CONSTANT(UP_PROJ), CONSTANT(DOWN_PROJ),
        CONSTANT(FLOAT32), CONSTANT(FLOAT16), CONSTANT(BFLOAT16), CONSTANT(INT8_ROWS), CONSTANT(Q4_0), CONSTANT(Q4_1),
        CONSTANT(Q5_0), CONSTANT(Q5_1), CONSTANT(Q8_0), CONSTANT(Q2_K), CONSTANT(Q3_K), CONSTANT(Q4_K), CONSTANT(Q5_K),
        CONSTANT(Q6_K), CONSTANT(IQ4_NL),
        {NULL, 0},
    };
    return constants;
}

/* The name in VARIANTS of build.py. */
const char *mpt_variant(void) {
    return AMX           ? "amx"
           : AVX512_BF16 ? "avx512_bf16"
           : AVX512_VNNI ? "avx512_vnni"
           : AVX512      ? "avx512"
           : AVX2_VNNI   ? "avx2_vnni"
           : AVX2        ? "avx2"
           : NEON        ? "neon"
                         : "generic";
}

"""The rest of families.py: tiny models of families that other tests do not need."""

import transformers
from families import (
    EXPERTS,
    HALF_ROPE,
    LINEAR_ATTENTION,
    MROPE,
    PIXELS,
    QWEN_IMAGE,
    QWEN_TOWER,
    TOWER,
    Built,
    add_tokens,
    model_of,
    qwen_ids,
    qwen_processor,
    tiny,
)

SIGLIP = TOWER | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False}


@tiny("<start_of_image>")
def gemma3(tokenizer) -> Built:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    ids = add_tokens(tokenizer, **named)
    own = {"image_token_index": ids("<image_soft_token>"), "mm_tokens_per_image": 4}
    own |= {"boi_token_index": ids("<start_of_image>"), "eoi_token_index": ids("<end_of_image>")}
    text = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    return model_of("gemma3", tokenizer, text, SIGLIP, **own), processor


@tiny("<|image|>")
def gemma4(tokenizer) -> Built:
    """As E2B and E4B: an audio tower, embeddings of each layer, layers that share keys and values."""
    text = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "num_hidden_layers": 4}
    audio = TOWER | {"subsampling_conv_channels": [4, 4], "output_proj_dims": 32, "num_hidden_layers": 3}
    return gemma4_of("gemma4", tokenizer, text, audio)


@tiny("<|image|>")
def gemma4_dense(tokenizer) -> Built:
    return gemma4_of("gemma4", tokenizer, {"hidden_size_per_layer_input": 0})


@tiny("<|image|>")
def gemma4_moe(tokenizer) -> Built:
    text = {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    return gemma4_of("gemma4", tokenizer, text | {"moe_intermediate_size": 16})


@tiny("<|image|>")
def gemma4_unified(tokenizer) -> Built:
    return gemma4_of("gemma4_unified", tokenizer, {})


def gemma4_of(model_type: str, tokenizer, text: dict, audio: dict | None = None) -> Built:
    named = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
    ids = add_tokens(tokenizer, **named, boa_token="<|audio>", eoa_token="<audio|>")
    text = {"num_hidden_layers": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 16} | text
    text |= {"layer_types": ["sliding_attention", "full_attention"] * (text["num_hidden_layers"] // 2)}
    text |= {"use_bidirectional_attention": "vision", "vocab_size_per_layer_input": len(tokenizer) + 1}
    vision = TOWER | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}
    if model_type == "gemma4_unified":
        vision = {"patch_size": 4, "mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32}
    name = "Gemma4Unified" if model_type == "gemma4_unified" else "Gemma4"
    processor = getattr(transformers, f"{name}Processor")(
        transformers.Gemma4AudioFeatureExtractor(),
        getattr(transformers, f"{name}ImageProcessor")(patch_size=4, max_soft_tokens=70),
        tokenizer,
        getattr(transformers, f"{name}VideoProcessor")(patch_size=4),
    )
    own = {"image_token_id": ids("<|image|>"), "boi_token_id": ids("<|image>"), "eoi_token_id": ids("<image|>")}
    own |= {"audio_token_id": ids("<|audio|>"), "video_token_id": ids("<|video|>"), "audio_config": audio}
    return model_of(model_type, tokenizer, {"vocab_size": len(tokenizer)} | text, vision, **own), processor


@tiny("<IMG_CONTEXT>")
def internvl(tokenizer) -> Built:
    named = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
    ids = add_tokens(tokenizer, **named, video_token="<video>")
    vision = TOWER | {"image_size": [56, 56], "patch_size": [14, 14]}
    own = {"image_token_id": ids("<IMG_CONTEXT>"), "image_seq_length": 4}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )
    return model_of("internvl", tokenizer, {"model_type": "qwen3", "head_dim": 8}, vision, **own), processor


@tiny("[IMG]")
def mistral3(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = TOWER | {"model_type": "pixtral", "image_size": 112, "patch_size": 14, "head_dim": 16}
    text = {"model_type": "ministral3", "head_dim": 8}
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = transformers.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)
    own = {"image_token_index": ids("[IMG]"), "spatial_merge_size": 2}
    return model_of("mistral3", tokenizer, text, vision, **own), processor


@tiny("<|begin_of_image|><|image|><|end_of_image|>")
def glm4v(tokenizer) -> Built:
    return glm("glm4v", "Glm4v", tokenizer)


@tiny("<|begin_of_image|><|image|><|end_of_image|>")
def glm46v(tokenizer) -> Built:
    return glm("glm46v", "Glm46V", tokenizer)


@tiny("<|begin_of_image|><|image|><|end_of_image|>")
def glm4v_moe(tokenizer) -> Built:
    text = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    return glm("glm4v_moe", "Glm4v", tokenizer, text | {"head_dim": 16})


def glm(model_type: str, name: str, tokenizer, text: dict | None = None) -> Built:
    tokens = ("begin_of_image", "image", "end_of_image", "begin_of_video", "video", "end_of_video")
    ids = add_tokens(tokenizer, *(f"<|{token}|>" for token in tokens))
    names = ("image_start", "image", "image_end", "video_start", "video", "video_end")
    own = {f"{name}_token_id": ids(f"<|{token}|>") for name, token in zip(names, tokens, strict=True)}
    vision = QWEN_TOWER | {"image_size": 56, "patch_size": 14, "intermediate_size": 64}
    if model_type == "glm46v":
        text, vision = {"model_type": "glm4v_text"} | (text or {}), {"model_type": "glm4v_vision"} | vision
    size = {"shortest_edge": 2 * 64 * 64, "longest_edge": 2 * 96 * 96}  # of two frames
    processor = getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{name}ImageProcessor")(size=size),
        tokenizer,
        getattr(transformers, f"{name}VideoProcessor")(size=size),
    )
    return model_of(model_type, tokenizer, {"rope_parameters": MROPE} | (text or {}), vision, **own), processor


@tiny("<image>")
def lfm2_vl(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    vision = TOWER | {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 16}
    text = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    images = transformers.Lfm2VlImageProcessor(
        min_image_tokens=4, max_image_tokens=9, tile_size=64, max_num_patches=64, do_image_splitting=False
    )
    own = {"image_token_id": ids("<image>"), "projector_hidden_size": 32}
    return model_of("lfm2_vl", tokenizer, text, vision, **own), transformers.Lfm2VlProcessor(images, tokenizer)


@tiny("<image>", is_plain=True)
def idefics3(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>")
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    own = {"image_token_id": ids("<image>"), "scale_factor": 2, "pad_token_id": tokenizer.pad_token_id}
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    return model_of("idefics3", tokenizer, {"model_type": "llama"}, vision, **own), processor


@tiny("<image>", is_plain=True)
def llava_next(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    processor = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = TOWER | {"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    own = {"image_token_index": ids("<image>"), "image_grid_pinpoints": pinpoints}
    return model_of("llava_next", tokenizer, {"model_type": "llama"}, vision, **own), processor


@tiny("<image>")
def llava_onevision(tokenizer) -> Built:
    ids = add_tokens(tokenizer, "<image>", "<video>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    size = {"height": 56, "width": 56}
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    own = {"image_token_index": ids("<image>"), "video_token_index": ids("<video>")}
    own |= {"image_grid_pinpoints": pinpoints}
    return model_of("llava_onevision", tokenizer, {"model_type": "qwen2"}, SIGLIP, **own), processor


@tiny("<|image_pad|>")
def minicpmv4_6(tokenizer) -> Built:
    return minicpm("minicpmv4_6", "MiniCPMV4_6", tokenizer)


@tiny("<|image_pad|>")
def minicpmv4_7(tokenizer) -> Built:
    return minicpm("minicpmv4_7", "MiniCPMV4_7", tokenizer)


def minicpm(model_type: str, name: str, tokenizer) -> Built:
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>"}
    named |= {"image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>"}
    ids = add_tokens(tokenizer, **named, image_id_start_token="<image_id>", image_id_end_token="</image_id>")
    text = LINEAR_ATTENTION | {"model_type": "qwen3_5_text", "head_dim": 16, "rope_parameters": HALF_ROPE}
    vision = TOWER | {"image_size": 112, "patch_size": 14, "insert_layer_id": 0}
    own = {
        name: ids(token)
        for name, token in {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}.items()
    }
    if model_type == "minicpmv4_7":
        own |= {"image_start_id": ids("<image>"), "image_end_id": ids("</image>"), "slice_start_id": ids("<slice>")}
        own |= {"slice_end_id": ids("</slice>"), "newline_id": tokenizer("\n")["input_ids"][0]}
    images = {"scale_resolution": 56, "max_slice_nums": 4}
    processor = getattr(transformers, f"{name}Processor")(
        transformers.MiniCPMV4_6ImageProcessor(**images),
        transformers.MiniCPMV4_6VideoProcessor(**images),
        tokenizer,
    )
    return model_of(model_type, tokenizer, text, vision, insert_layer_id=0, image_size=56, **own), processor


@tiny(QWEN_IMAGE)
def qwen4_exp(tokenizer) -> Built:
    text = LINEAR_ATTENTION | EXPERTS | {"head_dim": 16, "rope_parameters": HALF_ROPE, "hc_lowrank": 8}
    text |= {"shared_expert_intermediate_size": 16, "ngram_vocab_size_base": 50, "split_ngram_parts": 2}
    text |= {
        "eos_token_id": tokenizer.eos_token_id,
        "ple_layer_ids": [1],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    }
    text |= {"indexer_budget": 64, "indexer_compress_ratio": 4}
    vision = QWEN_TOWER | {"num_position_embeddings": 64}
    model = model_of("qwen4_exp", tokenizer, text, vision, **qwen_ids(tokenizer))
    return model, qwen_processor("Qwen3VL", tokenizer, patch_size=16)


@tiny(QWEN_IMAGE)
def exaone4_5(tokenizer) -> Built:
    ids = qwen_ids(tokenizer)
    own = {name: ids[name] for name in ("image_token_id", "video_token_id")}
    vision = QWEN_TOWER | {"intermediate_size": 52, "window_size": 56, "fullatt_block_indexes": [1]}
    vision |= {"num_key_value_heads": 2}
    text = {"model_type": "exaone4", "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return model_of("exaone4_5", tokenizer, text, vision, **own), qwen_processor("Exaone4_5_", tokenizer)


@tiny(QWEN_IMAGE)
def hyperclovax_vision_v2(tokenizer) -> Built:
    ids = qwen_ids(tokenizer)
    own = {name: ids[name] for name in ("image_token_id", "video_token_id")}
    vision = QWEN_TOWER | {"intermediate_size": 52, "window_size": 56, "fullatt_block_indexes": [1]}
    vision |= {"model_type": "qwen2_5_vl_vision"}
    text = {"model_type": "hyperclovax"}
    tokenizer.add_prefix_space = False  # it is loaded as a GPT2Tokenizer, which wants to know
    processor = qwen_processor("HyperCLOVAXVisionV2", tokenizer)
    return model_of("hyperclovax_vision_v2", tokenizer, text, vision, **own), processor


@tiny(QWEN_IMAGE)
def lfm3_vl(tokenizer) -> Built:
    layers = {"layer_types": ["conv", "full_attention"]}
    vision = TOWER | layers | {"num_key_value_heads": 2, "patch_size": 16}
    own = qwen_ids(tokenizer) | {"projector_hidden_size": 32}
    model = model_of("lfm3_vl", tokenizer, {"model_type": "lfm3"} | layers, vision, **own)
    return model, qwen_processor("Lfm3Vl", tokenizer, patch_size=16)


_ = PIXELS

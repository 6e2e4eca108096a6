"""Small random checkpoints as transformers writes them, made once, and photographs."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase

import pytest
import skimage.data
import torch
import transformers
from PIL import Image
from torch import nn

PHOTOGRAPHS = ("astronaut", "coffee", "rocket", "camera")  # of scikit-image, on disk: 512x512, 600x400, 640x427, grey


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS}


def write(folder: Path, model: nn.Module, *others: object) -> Path:
    """Saves the model, with weights large enough that its masks and scores differ, and what goes with it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
            weight.normal_(std=2 / weight[0].numel() ** 0.5, generator=generator)
    for part in (model, *others):
        part.save_pretrained(folder)  # type: ignore[operator, attr-defined]
    return folder


@pytest.fixture(scope="session")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _sam(tmp_path_factory.mktemp("sam"), "Sam")


@pytest.fixture(scope="session")
def sam_hq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _sam(tmp_path_factory.mktemp("sam_hq"), "SamHQ", vit_dim=16)


def _sam(folder: Path, family: str, **of_the_decoder: int) -> Path:
    def config(part: str, **values: object) -> object:
        return getattr(transformers, f"{family}{part}Config")(**values)

    vision = config(
        "Vision",
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=32,
        num_pos_feats=8,
    )
    prompts = config("PromptEncoder", hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = config(
        "MaskDecoder", hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16, **of_the_decoder
    )
    model = getattr(transformers, f"{family}Model")(
        config("", vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )
    size, pad = {"longest_edge": 64}, {"height": 64, "width": 64}
    return write(folder, model, transformers.SamImageProcessorPil(size=size, pad_size=pad))


@pytest.fixture(scope="session")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=12,
        num_attention_heads=1,
        image_size=[128, 128],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[12, 24, 48, 96],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 4],
        window_positional_embedding_background_size=[8, 8],
        global_attention_blocks=[3],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[96, 48, 24, 12],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    model = transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=vision,
            prompt_encoder_config=transformers.Sam2PromptEncoderConfig(
                hidden_size=32, image_size=128, patch_size=16, mask_input_channels=8
            ),
            mask_decoder_config=transformers.Sam2MaskDecoderConfig(
                hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32
            ),
        )
    )
    folder = write(tmp_path_factory.mktemp("sam2"), model)
    # By hand: without torchvision the processor cannot be made.
    preprocessing = {"image_processor_type": "Sam2ImageProcessor", "size": {"height": 128, "width": 128}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="session")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owlv2")
    # OWLv2 takes a phrase whose first token is 0 for padding.
    pieces = [
        "!",
        "<|startoftext|>",
        "<|endoftext|>",
        *ascii_lowercase,
        *(f"{letter}</w>" for letter in ascii_lowercase),
    ]
    tokenizer = transformers.CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.model_max_length = 16
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.Owlv2Config(
        text_config={**small, **ids, "vocab_size": len(pieces), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    images = transformers.Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Owlv2Processor(image_processor=images, tokenizer=tokenizer)
    return write(folder, transformers.Owlv2ForObjectDetection(config), processor)


@pytest.fixture(scope="session")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounding_dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "apples", "wooden", "bowl"]
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config={
            "model_type": "bert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": len(words),
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=10,
    )
    images = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 192})
    processor = transformers.GroundingDinoProcessor(image_processor=images, tokenizer=tokenizer)
    return write(folder, transformers.GroundingDinoForObjectDetection(config), processor)

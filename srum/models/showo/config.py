"""What a Show-o folder says of itself, and where the parts are that it names (docs/specs/showo.md, 2 to 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import PhiConfig

from srum.errors import ModelError
from srum.json_files import read_json
from srum.models.checkpoints import require_heads, require_values, with_rope

OVERRIDES = "fixture_config.json"  # what a checkpoint of another size says of what the published ones fix
SPECIAL = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
FACTOR = 16  # pixels of an image id, a side
LONGEST = 128  # ids of a prompt, and of what RecA has before an image beside the features

# A part that the checkpoint names and does not hold: the folders that it may be in, and where it is published.
PARTS = {
    "magvitv2": (("magvitv2",), "showlab/magvitv2"),
    "phi": (("phi", "phi-1_5"), "microsoft/phi-1_5"),
    "clip": (("clip", "clip-vit-large-patch14-336"), "openai/clip-vit-large-patch14-336"),
}
# Fields that change numbers and have one value here.
PHI: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_new",),
    "tie_word_embeddings": (None, False),
}
ROPE: dict[str, tuple[Any, ...]] = {"partial_rotary_factor": (), "rope_type": ("default",), "type": ("default",)}
COUNTS = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens", "mask_token_id")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class ShowoConfig:
    """Sizes and ids. ``texts`` entries of the tokenizer, ``codes`` image ids, ``cells`` of an image; ``sees`` whether
    understanding has CLIP's features, of ``feature_width``, or else the image's own ids."""

    phi: PhiConfig
    texts: int
    codes: int
    cells: int
    sees: bool
    longest: int  # ids of a prompt with its markers, but for the first
    condition: int  # ids, padded, of what RecA draws after beside the features
    raw: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of an image that is drawn."""
        return isqrt(self.cells), isqrt(self.cells)

    @property
    def side(self) -> int:
        """Pixels of an image that is drawn, a side."""
        return FACTOR * isqrt(self.cells)

    @property
    def bits(self) -> int:
        """Of an image id."""
        return (self.codes - 1).bit_length()

    def special(self, name: str) -> int:
        """The id of a token that the tokenizer does not have."""
        return self.texts + SPECIAL.index(name)

    @property
    def first_code(self) -> int:
        """The id of image id 0."""
        return self.texts + len(SPECIAL)

    @property
    def mask(self) -> int:
        """The id of what is to be drawn."""
        return self.first_code + self.codes

    @classmethod
    def from_folder(cls, folder: Path) -> ShowoConfig:
        """Read a checkpoint folder and its language model's config. Raises ModelError for another model, for a part
        that is not there, and for what does not fit."""
        path = folder / "config.json"
        raw = read_json(path)
        if raw.get("_class_name") != "Showo":
            raise ModelError(f"{folder} is a {raw.get('_class_name')}, another architecture; the first Show-o is read")
        if lacking := [name for name in (*COUNTS, "w_clip_vit") if name not in raw]:
            raise ModelError(f"{path} has no {', '.join(lacking)}")
        if wrong := [name for name in COUNTS if type(raw[name]) is not int or raw[name] < 1]:
            raise ModelError(f"{path}: {wrong[0]}: expected a whole number, got {raw[wrong[0]]!r}")
        texts, codes, cells = (raw[name] for name in ("llm_vocab_size", "codebook_size", "num_vq_tokens"))
        if raw["vocab_size"] != texts + len(SPECIAL) + codes + 1 or raw["mask_token_id"] != raw["vocab_size"] - 1:
            raise ModelError(
                f"{path}: vocab_size: expected {texts} texts, {len(SPECIAL)} markers, {codes} image ids and the mask, "
                f"which is the last; got {raw['vocab_size']}, mask {raw['mask_token_id']}"
            )
        if isqrt(cells) ** 2 != cells or codes & (codes - 1):
            raise ModelError(f"{path}: {cells} image tokens are no square, or {codes} image ids no power of two")
        overrides = overrides_of(folder)
        return cls(
            phi=_phi(part(folder, "phi") / "config.json", raw["vocab_size"]),
            texts=texts,
            codes=codes,
            cells=cells,
            sees=bool(raw["w_clip_vit"]),
            longest=int(overrides.get("max_seq_length_inference", LONGEST)),
            condition=int(overrides.get("recon_text_length", LONGEST)),
            raw=raw,
        )


def _phi(path: Path, vocabulary: int) -> PhiConfig:
    """Phi's config as Show-o has it: with its own vocabulary, and norms of queries and keys whatever the file says."""
    raw = read_json(path)
    if raw.get("model_type") != "phi":
        raise ModelError(f"{path}: model_type: expected 'phi', got {raw.get('model_type')!r}")
    if wrong := [name for name in SIZES if type(raw.get(name)) is not int]:
        raise ModelError(f"{path}: {wrong[0]}: expected a whole number, got {raw.get(wrong[0])!r}")
    require_values(path, raw, PHI)
    require_heads(path, raw)
    values = with_rope(path, raw, ROPE)
    kept = {name: value for name, value in values.items() if name in PhiConfig().to_dict() or name in KEPT}
    try:
        return PhiConfig(**{**kept, "vocab_size": vocabulary, "qk_layernorm": True, "pad_token_id": None})
    except Exception as error:  # of its checks, which have several types
        raise ModelError(f"{path}: {' '.join(str(error).split())[:200]}") from None


KEPT = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")


def overrides_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint of another size says in it or beside it; nothing of the published ones."""
    path = next((place / OVERRIDES for place in (folder, folder.parent) if (place / OVERRIDES).is_file()), None)
    return {} if path is None else read_json(path)


def part(folder: Path, name: str) -> Path:
    """The folder of a part, in the checkpoint's or beside it. Raises ModelError where there is none."""
    names, published = PARTS[name]
    for place in (folder, folder.parent):
        for own in names:
            if (place / own / "config.json").is_file():
                return place / own
    raise ModelError(
        f"{folder} has no {names[-1]}/ in it or beside it: hf download {published} --local-dir {folder / names[-1]}"
    )

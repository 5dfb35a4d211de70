"""Write the checkpoint folder. `python -m training.emoji.pack --work WORK --out models/emoji`.

The folder is written beside its place and then renamed, so a reader never sees half of it. Weights are float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file

from edgekit.export.families.emoji_networks import ResidualUpscaler
from training.emoji.card import card, training_record
from training.emoji.data import build_tokenizer, choose_glyphs
from training.emoji.networks import LENGTH
from training.emoji.teacher import SEED, Networks
from training.emoji.upscaler import CONFIG

INDEX = {
    "_class_name": "EmojiPipeline",
    "_diffusers_version": "0.42.1",
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "FlowMatchLCMScheduler"],
    "upscaler": ["edgekit", "ResidualUpscaler"],
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": LENGTH,
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "padding_side": "right",
    "truncation_side": "right",
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids"],
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_json(value: object, path: Path) -> None:
    """Indented, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_generator(work: Path, vocabulary: int) -> Networks:
    """The averaged student, or the teacher while there is no student yet."""
    path = work / "student.pt" if (work / "student.pt").exists() else work / "teacher.pt"
    model = Networks(vocabulary)
    model.load_state_dict(torch.load(path)["mean"])
    model.unet.set_attn_processor(AttnProcessor2_0())
    model.text.set_attn_implementation("sdpa")
    return model


def write_networks(work: Path, out: Path) -> dict[str, int]:
    """tokenizer/, text_encoder/, unet/, scheduler/ and upscaler/; returns parameter counts."""
    tokenizer = build_tokenizer(choose_glyphs(SEED))
    model = load_generator(work, tokenizer.get_vocab_size())
    (out / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer/tokenizer.json"))
    write_json(TOKENIZER, out / "tokenizer/tokenizer_config.json")
    model.text.half().save_pretrained(out / "text_encoder")
    model.unet.half().save_pretrained(out / "unet")
    FlowMatchLCMScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(out / "scheduler")
    upscaler = ResidualUpscaler()
    if (work / "upscaler.pt").exists():
        upscaler.load_state_dict(torch.load(work / "upscaler.pt")["net"])
    write_json(CONFIG, out / "upscaler/config.json")
    weights = {name: tensor.half().contiguous() for name, tensor in upscaler.state_dict().items()}
    save_file(weights, str(out / "upscaler" / WEIGHTS), metadata={"format": "pt"})
    networks = {"text": model.text, "unet": model.unet, "upscaler": upscaler}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def write_documents(work: Path, out: Path, parameters: dict[str, int]) -> None:
    """NOTICE, training_record.json and, once the folder has been measured, README.md."""
    here, glyphs = Path(__file__).parent, choose_glyphs(SEED)
    shutil.copy(here / "NOTICE", out / "NOTICE")
    record = training_record(work, glyphs, parameters)
    write_json(record, out / "training_record.json")
    if "metrics" in record:
        vocabulary = build_tokenizer(glyphs).get_vocab_size()
        text = card(here / "card.md", record, glyphs, vocabulary, folder_size(out) / 1e6)
        (out / "README.md").write_text(text, encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def replace_folder(new: Path, place: Path) -> None:
    """Put `new` where `place` is, with two renames."""
    old = place.with_name(place.name + ".old")
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("models/emoji"))
    args = parser.parse_args()
    new = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    parameters = write_networks(args.work, new)
    write_json(INDEX, new / "model_index.json")
    write_documents(args.work, new, parameters)
    for path in new.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    replace_folder(new, args.out)
    print(f"{args.out}: {folder_size(args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

"""Checkpoints of random weights, and every peer's own int4 form of them.

    python build.py checkpoint MODEL TARGET      with torch and transformers
    python build.py KIND SOURCE TARGET           KIND of BUILDERS, in the environment of its engine

The shapes are those of Qwen2.5-0.5B and SmolLM2-135M: speed depends on them, and not on what the numbers are.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SHARED = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": (
        "Qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
        },
    ),
    "smol": (
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 1e5,
        },
    ),
}


def checkpoint(model: str, target: Path) -> None:
    """A bfloat16 checkpoint in the Hugging Face layout, from seed 0."""
    torch, transformers = map(import_module, ("torch", "transformers"))
    family, sizes = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHARED, **sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(target)
    end = "<|endoftext|>"
    engine = tokenizer(sizes["vocab_size"], end)
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=end, bos_token=end).save_pretrained(target)


def tokenizer(vocabulary: int, end: str) -> Any:
    """A byte-level BPE of 8192 tokens, trained on Python's own sources; filled up where the vocabulary is small."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    made.train([str(source) for source in sources], trainer)
    if vocabulary < 60000:  # adding 140,000 tokens takes minutes, and no engine asks for them
        made.add_tokens([f"<|pad{index}|>" for index in range(vocabulary - made.get_vocab_size())])
    return made


def ortgenai(source: Path, target: Path, *options: str) -> None:
    """ONNX Runtime GenAI's model builder, for the CPU."""
    flags = ["-i", str(source), "-o", str(target), "-p", "int4", "-e", "cpu", "-c", f"{target}.cache"]
    module = "onnxruntime_genai.models.builder"
    subprocess.run([sys.executable, "-m", module, *flags, "--extra_options", *options], check=True)
    shutil.rmtree(f"{target}.cache", ignore_errors=True)


def openvino(source: Path, target: Path) -> None:
    """optimum-intel's export: symmetric int4 in groups of 64; the head and the embedding stay int8, its default."""
    weights = ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"]
    flags = ["-m", str(source), "--task", "text-generation-with-past", *weights, str(target)]
    subprocess.run([Path(sys.executable).with_name("optimum-cli"), "export", "openvino", *flags], check=True)


def llama(source: Path, target: Path, *, pure: bool) -> None:
    """llama.cpp's Q4_0, by way of an F32 file that is removed; `pure` quantizes the head like the rest."""
    api = import_module("llama_cpp")
    full = target.with_suffix(".f32")
    write_gguf(source, full)
    options = api.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = api.LLAMA_FTYPE_MOSTLY_Q4_0, pure, 2
    failed = api.llama_model_quantize(str(full).encode(), str(target).encode(), options)
    full.unlink()
    if failed:
        raise SystemExit(f"llama_model_quantize of {full} answered {failed}")


def write_gguf(source: Path, target: Path) -> None:
    """A checkpoint as float32 GGUF."""
    gguf = import_module("gguf")
    config = json.loads((source / "config.json").read_text())
    kind, layers = config["model_type"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(target, kind)
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if kind == "llama":
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    add_tokenizer(gguf, writer, json.loads((source / "tokenizer.json").read_text()), config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], layers)
    for name, weight in tensors(source / "model.safetensors"):
        weight = interleave(weight, config, name) if kind == "llama" else weight
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(gguf: Any, writer: Any, tokens: dict[str, Any], size: int) -> None:
    """The vocabulary and merges; ids that the tokenizer lacks get names."""
    words = {index: word for word, index in tokens["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in tokens["added_tokens"]}
    texts = {**{index: f"<|fill{index}|>" for index in range(size)}, **words, **added}
    types = [gguf.TokenType.NORMAL if index in words else gguf.TokenType.UNUSED for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([texts[index] for index in range(size)])
    writer.add_token_types([gguf.TokenType.CONTROL, *types[1:]])
    merges = tokens["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def tensors(file: Path) -> Iterator[tuple[str, Array]]:
    """Names and float32 values of a bfloat16 safetensors file (numpy has no bfloat16: it is float32's upper half)."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        start = stream.tell()
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            raw = np.fromfile(file, np.uint16, (last - first) // 2, offset=start + first)
            yield name, (raw.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def interleave(weight: Array, config: dict[str, Any], name: str) -> Array:
    """llama.cpp's `llama` rotates neighbouring rows of a head, transformers rows half a head apart: reorder q and k."""
    sides = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    for ending, heads in sides.items():
        if name.endswith(ending):
            halves = weight.reshape(config[heads], 2, -1, weight.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return weight


BUILDERS: dict[str, Callable[[Path, Path], None]] = {
    "ortgenai-b32": lambda source, target: ortgenai(source, target, "accuracy_level=4", "block_size=32"),
    "ortgenai-b128": lambda source, target: ortgenai(
        source, target, "accuracy_level=4", "block_size=128", "fuse_mlp_gate_up=true", "prune_lm_head=true"
    ),
    "llama-q4_0-pure": lambda source, target: llama(source, target, pure=True),
    "llama-q4_0": lambda source, target: llama(source, target, pure=False),
    "openvino-g64": openvino,
}


def main() -> None:
    kind, source, target = sys.argv[1:]
    if kind == "checkpoint":
        checkpoint(source, Path(target))
    else:
        BUILDERS[kind](Path(source), Path(target))


if __name__ == "__main__":
    main()

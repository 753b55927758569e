"""Reads a folder in the format of Hugging Face transformers: config.json, safetensors, tokenizer.json.

Files of pickle (pytorch_model.bin) are never opened, and code in the folder is never run.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import ModelSourceError
from lm.files import BF16, LazyTensor, map_tensors, view_tensor
from lm.generation.options import source_sampling
from lm.interop.architectures import is_buffer, parameter_name

CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, GENERATION, TEMPLATE = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
SMALL = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, GENERATION, TEMPLATE)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = (*SMALL, WEIGHTS, INDEX, "model-*-of-*.safetensors", "README.md")
"""The files that are read, and downloaded."""
_STORED = ("F32", "F16", BF16)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a model of transformers, and no run of ours."""
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict) or "format_version" in config:
        return False
    return "architectures" in config or "model_type" in config


class ModelFolder:
    """The files of a model; weights are mapped and read one at a time.

    Args:
        path: the folder.
        origin: its name in errors.

    Raises:
        ModelSourceError: a file is missing or damaged, or the weights are a pickle.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path, self.origin = path, origin
        self.config: dict[str, Any] = self._json(CONFIG)
        self.shards = self._shards()

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.path / name).read_text("utf-8"))
        except FileNotFoundError:
            raise ModelSourceError(
                f"{self.origin} has no {name}, so it is not a model in the format of transformers."
            ) from None
        except OSError as error:
            raise ModelSourceError(f"{self.path / name} cannot be read: {error.strerror or error}.") from None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ModelSourceError(f"{self.path / name} is cut short or damaged: copy or download it again.")
        return found

    def _shards(self) -> list[Path]:
        """The files of the weights."""
        if (self.path / WEIGHTS).is_file():
            return [self.path / WEIGHTS]
        if (self.path / INDEX).is_file():
            mapping = self._json(INDEX).get("weight_map")
            listed = [*mapping.values()] if isinstance(mapping, dict) else []
            # Only safetensors of this folder, whatever the index says.
            if not listed or not all(
                isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") for name in listed
            ):
                raise ModelSourceError(
                    f"{self.path / INDEX} does not list the files of the weights: download it again."
                )
            names = sorted({*listed})
            if missing := [name for name in names if not (self.path / name).is_file()]:
                raise ModelSourceError(f"{self.origin} lacks {missing[0]}, a part of the weights: download it again.")
            return [self.path / name for name in names]
        if pickled := next((found for end in PICKLES for found in sorted(self.path.glob(end))), None):
            raise ModelSourceError(
                f"{self.origin} has its weights in {pickled.name}, a pickle, which could run any code and is never "
                f"opened: convert it to {WEIGHTS} with transformers (save_pretrained)."
            )
        raise ModelSourceError(f"{self.origin} has no {WEIGHTS}: give a folder with the weights in safetensors.")

    def files(self) -> list[Path]:
        """The files that make the model: configuration, weights, tokenizer."""
        return [self.path / name for name in SMALL if (self.path / name).is_file()] + self.shards

    def tensors(self) -> dict[str, LazyTensor]:
        """The weights under the names of our Transformer.

        Raises:
            ModelSourceError: a file is damaged, or a tensor is not in fp32, fp16 or bf16.
        """
        found: dict[str, LazyTensor] = {}
        for path in self.shards:
            try:
                header, content = map_tensors(path)
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    if is_buffer(name):
                        continue
                    if entry["dtype"] not in _STORED:
                        raise ModelSourceError(
                            f"{path}: tensor {name} is in {entry['dtype']}; supported are fp32, fp16 and bf16."
                        )
                    array = view_tensor(entry, content)
                    found[parameter_name(name)] = LazyTensor(
                        entry["dtype"], array.shape, functools.partial(np.asarray, array)
                    )
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
                raise ModelSourceError(f"{path} is cut short or damaged: copy or download it again.") from None
        if self.config.get("tie_word_embeddings"):
            # A copy of the embedding, which transformers does not read either.
            found.pop("lm_head.weight", None)
        return found

    def tokenizer_files(self) -> tuple[str, Mapping[str, Any]]:
        """The text of tokenizer.json, and what the files around it say, merged.

        Raises:
            ModelSourceError: there is no tokenizer.json.
        """
        try:
            text = (self.path / TOKENIZER).read_text("utf-8")
        except FileNotFoundError:
            raise ModelSourceError(
                f"{self.origin} has no {TOKENIZER}: make one with transformers (AutoTokenizer, save_pretrained)."
            ) from None
        except (OSError, ValueError):
            raise ModelSourceError(f"{self.path / TOKENIZER} cannot be read: copy or download it again.") from None
        config: dict[str, Any] = {}
        for name in (SPECIAL, TOKENIZER_CONFIG):
            if (self.path / name).is_file():
                config |= {key: value for key, value in self._json(name).items() if value is not None}
        # What ends a text: where no generation_config.json says it, config.json does.
        generation = self._json(GENERATION) if (self.path / GENERATION).is_file() else self.config
        if generation.get("eos_token_id") is not None:
            config["eos_token_id"] = generation["eos_token_id"]
        if (self.path / TEMPLATE).is_file():
            config["chat_template"] = (self.path / TEMPLATE).read_text("utf-8", errors="replace")
        return text, config

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling options of generation_config.json."""
        return source_sampling(self._json(GENERATION)) if (self.path / GENERATION).is_file() else {}

    @property
    def license(self) -> str | None:
        """The licence that the model card names."""
        try:
            card = (self.path / "README.md").read_text("utf-8", errors="replace")
        except OSError:
            return None
        front = card.split("\n---", 1)[0] if card.startswith("---") else ""
        match = _LICENSE.search(front)
        return match[1] if match else None

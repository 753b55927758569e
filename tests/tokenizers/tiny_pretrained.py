"""Tiny tokenizers of the library `tokenizers`, learned in a second, in the forms that published models have."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lm.config import CorpusConfig, RunConfig, Section
from lm.models.base import build_model
from lm.runs.run import Run
from lm.runs.run_folder import RunFolder
from lm.tokenizers.pretrained import PretrainedTokenizer
from lm.version import __version__

TEXT = "The cat sat on the mat .\nThe café – naïve ☕ – was\tshut .\n\n \n" * 5 + "No newline at the end"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": CHAT_TEMPLATE}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(text: str = TEXT, size: int = 320) -> str:
    """The tokenizer.json of byte-level BPE, as SmolLM2 has it: digits apart, words of GPT-2."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([text], trainer)
    return made.to_str()


def qwen_like() -> str:
    """Byte-level BPE with the normal form NFC, the words of Qwen2 and a token that is added but not special."""
    made = Tokenizer.from_str(byte_level())
    made.normalizer = normalizers.NFC()
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.add_tokens([AddedToken("<think>", normalized=False)])
    return made.to_str()


def sentencepiece_like(*, prefix: bool = True, metaspace: bool = False) -> str:
    """The tokenizer.json of SentencePiece BPE with byte fallback, as Llama 2 has it: "<s>" before each text."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    learned = json.loads(trained.to_str())["model"]
    names = [name for name, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {name: index for index, name in enumerate([*names[:3], *bytes_, *names[3:]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made.to_str()


def make_run(
    folder: Path, tokenizer: PretrainedTokenizer, *, seed: int = 4, sampling: dict[str, float] | None = None
) -> Run:
    """A run as an import makes it, with random weights and without a corpus."""
    section = Section(type="transformer", hidden_size=32, num_heads=2, num_layers=2, context_length=512)
    model = build_model(section, tokenizer.vocab_size, seed=seed)
    config = RunConfig(
        corpus=CorpusConfig(source="nowhere.txt"), tokenizer=Section(**tokenizer.options.model_dump()), model=section
    ).resolved()
    run = RunFolder(folder)
    record = {
        "inkling": __version__, "created": "2026-01-01T00:00:00+00:00", "parameters": model.num_parameters(),
        "counts": 0, "kind": model.kind, "config": config.model_dump(mode="json"),
        "corpus": {"name": "imported", "sha256": "", "key": "", "notes": [], "newline": "\n", "splits": {}},
        **({"sampling": sampling} if sampling else {}),
    }  # fmt: skip
    run.create(record, tokenizer)
    run.write_best(model.arrays(), step=0)
    return Run(run)

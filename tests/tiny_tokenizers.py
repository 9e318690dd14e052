"""Small tokenizers of the kinds that checkpoints have, made on the spot."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from headrace.tokenizer import Tokenizer as HeadraceTokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps",
    "hello world! hello there. print(1 + 2)    # four spaces",
    "中文字符与日本語の文字、한국어도",
    "naïve café Ünïcödé e\u0301 🙂🚀",
]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|user|>"]


def byte_level_bpe() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3: every token spells bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_bpe(decoder: str = "llama") -> Tokenizer:
    """As Llama 2 and Mistral (`llama`), Gemma (`gemma`) or a Metaspace decoder (`metaspace`): bytes are tokens too."""
    words = [
        "▁",
        "▁the",
        "▁hello",
        "he",
        "llo",
        "▁▁",
        "▁▁▁▁",
        "中",
        "文",
        "\u0301",
        "e",
        "🙂",
        "o",
        "l",
        "h",
        "t",
        "\n",
    ]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: token_id for token_id, token in enumerate([*SPECIAL_TOKENS, *bytes_, *words])}
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    gemma = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = {
        "gemma": decoders.Sequence(gemma),
        "llama": decoders.Sequence([*gemma, decoders.Strip(" ", 1, 0)]),
        "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    }[decoder]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, tokenizer: Tokenizer, **config: Any) -> HeadraceTokenizer:
    return HeadraceTokenizer.from_folder(write_folder(folder, tokenizer, **config))


def write_sentencepiece_folder(folder: Path, **config: Any) -> Path:
    """tokenizer.model and tokenizer_config.json; needs the sentencepiece library."""
    import sentencepiece

    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

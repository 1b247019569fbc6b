"""Tokenizers of both families that the gateway meets, small enough to train in a test."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
CORPUS = [
    "Once upon a time there was a small robot who liked to count: 1, 2, 3, 4.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "日本語のテキストと中文文本。日本語日本語。",
    "Grüße aus Köln, señor! Привет, мир. 😀😀🚀👩‍🚀",
] * 4


def byte_level() -> Tokenizer:
    """GPT-2's kind; end-of-text is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: a space is ▁, one is put in front of a text, <s> before it, bytes stand for the unknown."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "a"), ("o", "n"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁")]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "é", "日"]
    vocabulary = {token: index for index, token in enumerate([*tokens, *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    """A model folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}\n")
    return folder

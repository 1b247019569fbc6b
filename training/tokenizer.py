"""Train the one tokenizer that a language model and its speculative models share.

python -m training.tokenizer --corpus text.txt --vocab-size 4096 --out models/default-llm
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.corpus import END_OF_TEXT, CorpusFile, read_documents


def train_tokenizer(files: list[CorpusFile], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with digits apart; every byte is in the vocabulary, so that any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    documents = (document for file in files for _ in range(file.repeats) for document in read_documents(file.path))
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(
    corpus: Annotated[list[str], typer.Option(help="Text file, or FILE:REPEATS; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that gets tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(min=512, max=65536)] = 4096,
    context: Annotated[int, typer.Option(help="Context length of the models, in tokens.")] = 1024,
) -> None:
    """Train a byte-level BPE tokenizer on the corpus."""
    tokenizer = train_tokenizer([CorpusFile.parse(text) for text in corpus], vocab_size)
    save_tokenizer(tokenizer, out, context)
    typer.echo(f"{tokenizer.get_vocab_size()} tokens -> {out / 'tokenizer.json'}")


if __name__ == "__main__":
    typer.run(main)

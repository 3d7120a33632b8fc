"""Tokenizer and text encoder of the shapes teacher.

The tokenizer knows the words of the caption grammar, single Latin letters, digits and signs; whatever else comes
(Chinese, an emoji) falls back to the 256 byte pieces, so no text is lost and none is unknown. Special tokens stand
where T5 has them: pad 0, end 1, unknown 2. Every caption is twelve tokens long, the empty prompt is one.
"""

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

from tests.shapes.draw import COLOURS, PLACES, SHAPES, SIZES

MAX_TOKENS = 512
TEXT_WIDTH = 96
SPECIAL = ("<pad>", "</s>", "<unk>")
SPACE = "▁"


def vocabulary() -> list[tuple[str, float]]:
    """Pieces and their log-probabilities; a word is cheap, a letter dear, a byte only comes where nothing else fits."""
    words = ["a", "on", "background", *SIZES, *COLOURS, *SHAPES, *" ".join(PLACES).split()]
    signs = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [(piece, 0.0) for piece in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(SPACE + word, -2.0) for word in dict.fromkeys(words)]
    return pieces + [(sign, -8.0) for sign in signs]


def new_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(vocabulary(), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """The two files that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    new_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def new_text_encoder(width: int = TEXT_WIDTH) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=-(-len(vocabulary()) // 8) * 8,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    return UMT5EncoderModel(config)

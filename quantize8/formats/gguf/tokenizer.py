"""Converts the tokenizer of a model folder, as transformers opens it, to the GGUF metadata that llama.cpp reads.

llama.cpp has two algorithms for these models: byte-level BPE ("gpt2"), which merges by rank, and SentencePiece
("llama"), which merges by the score of the resulting token. For the first, the pre-tokenizer, which splits the text
beforehand, is built into llama.cpp and selected by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, Keys, TokenType

from quantize8.errors import SourceError, first_line
from quantize8.formats.gguf.architectures import ROUTE, Field, complete
from quantize8.limits import VOCABULARY
from quantize8.sources.guard import guarded
from quantize8.sources.tokenizer import check_tokenizer

_SPACE = "\u2581"  # the character that stands for a space in SentencePiece
_SPECIAL = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
_PLAIN_NORMALIZERS = {"Prepend", "Replace", "Sequence"}  # llama.cpp's SentencePiece does what these do for Llama

# llama.cpp's convert_hf_to_gguf.py identifies a pre-tokenizer by the tokens into which it splits this text
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
_NAMES = {  # SHA-256 of those token ids, written as a Python list -> name of the pre-tokenizer; a model that has it
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Meta-Llama-3-8B
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",  # Smaug-Llama-3-70B-Instruct
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen1.5-7B and later Qwen models
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3-Embedding-0.6B
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",  # DeepSeek-R1-Distill-Qwen
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM-135M, SmolLM2
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",  # deepseek-llm-7b-base
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",  # deepseek-coder-6.7b-base
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",  # Falcon3-7B-Base
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral-Nemo-Base-2407
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",  # gpt2
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # gpt-oss-20b, Xenova/gpt-4o
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # dbrx-base
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",  # Refact-1_6-base, granite-3b-code
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",  # Viking-7B
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",  # Megrez-3B-Instruct
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",  # Seed-Coder-8B-Base
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",  # Trillion-7B-preview
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",  # Midm-2.0-Base-Instruct
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",  # A.X-4.0
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",  # Minerva-7B-base-v1.0
}


def tokenizer_fields(folder: Path, config: Mapping[str, Any]) -> list[Field]:
    """Convert the tokenizer of a model folder to GGUF metadata, padded to the vocab_size of config.json.

    Args:
        folder: The model folder.
        config: The contents of config.json.

    Returns:
        The entries of the metadata.

    Raises:
        SourceError: The folder has no tokenizer, or llama.cpp would tokenize text differently than transformers.
    """
    return fields_of(_open(folder), config, folder)


def fields_of(tokenizer: Any, config: Mapping[str, Any], folder: Path) -> list[Field]:
    """Convert a transformers tokenizer that is already open, as `tokenizer_fields` does.

    Args:
        tokenizer: The tokenizer.
        config: The contents of config.json.
        folder: The model folder, for error messages.

    Returns:
        The entries of the metadata.

    Raises:
        SourceError: llama.cpp would tokenize text differently than transformers.
    """
    try:
        with guarded():
            return _fields(tokenizer, config, folder)
    except SourceError:
        raise
    except Exception as error:  # a tokenizer.json may contain anything, so any error may be raised
        raise SourceError(f"{folder}: its tokenizer cannot be used ({first_line(error)}); fetch it again") from None


def _fields(tokenizer: Any, config: Mapping[str, Any], folder: Path) -> list[Field]:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    decoder = (state.get("decoder") or {}).get("type")
    if model["type"] != "BPE" or not (model.get("byte_fallback") or decoder == "ByteLevel"):
        raise SourceError(f"{folder}: a {model['type']} tokenizer with decoder {decoder} is not supported; {ROUTE}")
    size = complete(config, folder).get("vocab_size")
    if type(size) is not int or not 0 < size <= VOCABULARY:
        raise SourceError(f"{folder}: config.json's vocab_size {size!r} is not a valid size; fetch it again")
    tokens, kinds = _tokens(tokenizer, size, folder, bool(model.get("byte_fallback")))
    fields = [
        Field(Keys.Tokenizer.LIST, tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        Field(Keys.Tokenizer.TOKEN_TYPE, kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
    ]
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields += _sentencepiece(tokenizer, state, tokens, merges, folder)
    else:
        fields += _byte_level(tokenizer, merges, folder)
    return [*fields, *_special(tokenizer, config)]


def _open(folder: Path) -> Any:
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        with guarded():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise SourceError(f"{folder}: transformers finds no tokenizer here ({first_line(error)}); fetch it") from None
    if not tokenizer.is_fast:
        raise SourceError(f"{folder}: its tokenizer has no tokenizer.json, which is needed to write it; {ROUTE}")
    return tokenizer


def _tokens(tokenizer: Any, size: int, folder: Path, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """The text and type of every token. Token ids that the tokenizer does not use get a placeholder."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts, default=0) >= size:
        raise SourceError(f"{folder}: token {max(texts)} is beyond config.json's vocab_size {size}; fetch both again")
    added, unknown = tokenizer.added_tokens_decoder, tokenizer.unk_token_id
    tokens, kinds = [], []
    for number in range(size):
        text, kind = texts.get(number), TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{number}]", TokenType.UNUSED
        elif sentencepiece and number == unknown:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].special or _looks_special(text) else TokenType.USER_DEFINED
        elif sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kind = TokenType.BYTE
        if kind == TokenType.USER_DEFINED:
            text = text.replace(_SPACE, " ")  # llama.cpp searches the raw text for these tokens
        tokens.append(text)
        kinds.append(int(kind))
    return tokens, kinds


def _looks_special(text: str) -> bool:
    """Whether a token looks like <|im_start|>. Models that do not mark it as special would print it in llama.cpp."""
    return text.startswith("<|") and text.endswith("|>")


def _byte_level(tokenizer: Any, merges: list[tuple[str, ...]], folder: Path) -> Iterator[Field]:
    joined = [" ".join(merge) for merge in merges]
    if any(line.count(" ") != 1 for line in joined):
        raise SourceError(f"{folder}: merges in tokenizer.json contain spaces, which separate merges in GGUF; {ROUTE}")
    digest = hashlib.sha256(str(tokenizer.encode(_PROBE)).encode()).hexdigest()
    if digest not in _NAMES:
        raise SourceError(
            f"{folder}: unknown tokenizer (probe {digest[:12]}), so llama.cpp's name for its pre-tokenizer is unknown; "
            f"{ROUTE}"
        )
    yield Field(Keys.Tokenizer.MODEL, "gpt2", GGUFValueType.STRING)
    yield Field(Keys.Tokenizer.PRE, _NAMES[digest], GGUFValueType.STRING)
    yield Field(Keys.Tokenizer.MERGES, joined, GGUFValueType.ARRAY, GGUFValueType.STRING)


def _sentencepiece(
    tokenizer: Any, state: dict[str, Any], tokens: list[str], merges: list[tuple[str, ...]], folder: Path
) -> Iterator[Field]:
    """Metadata of a SentencePiece tokenizer, whose scores give llama.cpp the order of the merges.

    The score of a token is the negative rank of the first merge that produces it.
    """
    if unknown := _normalizers(state.get("normalizer")) - _PLAIN_NORMALIZERS:
        raise SourceError(f"{folder}: the normalizer {sorted(unknown)[0]} of tokenizer.json is not supported; {ROUTE}")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    if not _is_sentencepiece(merges, set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())):
        raise SourceError(f"{folder}: merges in tokenizer.json do not match SentencePiece's, as GGUF requires; {ROUTE}")
    last = len(merges) + 1  # for tokens that no merge produces
    scores = [-float(ranks.get(token, last)) for token in tokens]
    yield Field(Keys.Tokenizer.MODEL, "llama", GGUFValueType.STRING)
    yield Field(Keys.Tokenizer.PRE, "default", GGUFValueType.STRING)
    yield Field(Keys.Tokenizer.SCORES, scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    prefixed = "".join(tokenizer.tokenize("a")).startswith(_SPACE)
    yield Field(Keys.Tokenizer.ADD_PREFIX, prefixed, GGUFValueType.BOOL)


def _is_sentencepiece(merges: list[tuple[str, ...]], texts: set[str]) -> bool:
    """Whether merges into the same token are consecutive, and every possible merge of two tokens is present.

    Only merges into `texts` count: any other token was added, so it is found in the text before anything is merged.
    """
    made = [text for text in map("".join, merges) if text in texts]
    runs = sum(text != before for text, before in zip(made, ["", *made], strict=False))
    known = set(merges)
    splits = ((text[:cut], text[cut:]) for text in texts for cut in range(1, len(text)))
    return runs == len(set(made)) and all(split in known for split in splits if split[0] in texts and split[1] in texts)


def _normalizers(state: dict[str, Any] | None) -> set[str]:
    if state is None:
        return set()
    return {state["type"]}.union(*(_normalizers(part) for part in state.get("normalizers", [])))


def _special(tokenizer: Any, config: Mapping[str, Any]) -> Iterator[Field]:
    """Metadata of special tokens: their ids, which of them are added around a text, and the chat templates."""
    for kind, key in _SPECIAL.items():
        number = getattr(tokenizer, f"{kind}_token_id")
        number = config.get(f"{kind}_token_id") if number is None else number
        if isinstance(number, int):
            yield Field(key, number, GGUFValueType.UINT32)
    ids = tokenizer("a")["input_ids"]
    for key, end, number in (
        (Keys.Tokenizer.ADD_BOS, ids[:1], tokenizer.bos_token_id),
        (Keys.Tokenizer.ADD_EOS, ids[-1:], tokenizer.eos_token_id),
    ):
        yield Field(key, end == [number], GGUFValueType.BOOL)
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, template in templates.items():
        key = Keys.Tokenizer.CHAT_TEMPLATE if name == "default" else Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
        yield Field(key, template, GGUFValueType.STRING)
    others = sorted(set(templates) - {"default"})
    yield Field(Keys.Tokenizer.CHAT_TEMPLATES, others, GGUFValueType.ARRAY, GGUFValueType.STRING)

"""Small tokenizers of the common kinds, made in a moment from a few sentences; no download."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "Hello there, how are you today? I am fine, thank you.",
    "The answer is 42. What is 2 + 2? It is 4, and 4 + 4 is 8.",
    "Human: why is the sky blue?\n\nAssistant: because of the scattering of light in the air.",
    "yes no maybe good bad better worse helpful kind rude prompt answer chosen rejected",
]
CHAT = (  # turns as <|im_start|>role\ntext<|im_end|>\n
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KINDS = ("byte_level", "bpe", "metaspace", "no_bos")


def made_tokenizer(kind: str = "byte_level", chat: bool = False) -> Any:
    """A tokenizer with <s>, </s> and <pad> (``no_bos``: without <s>), and optionally a chat template.

    byte_level: as of GPT-2, Llama 3 and Qwen, adding BOS itself as Llama 3 does. bpe: BPE over words split at white
    space, which is kept as a piece of its own. metaspace: as sentencepiece writes it, "▁" for spaces and one in front.
    """
    return _made(kind, chat)


@cache
def _made(kind: str, chat: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet: list[str] = []
    if kind in ("byte_level", "no_bos"):
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        raw.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
        raw.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if kind != "no_bos":
        names["bos_token"] = "<s>"
    if kind == "byte_level":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if chat:
        names["eos_token"] = "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer

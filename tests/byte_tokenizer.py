"""A tokenizer of bytes, made here: 257 ids, of which 0 ends a text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(chat: bool = False, start: bool = False, pair: bool = False) -> PreTrainedTokenizerFast:
    """Settings are what it does with a text.

    Args:
        chat: has a chat template.
        start: puts <|start|> (257) before it, as Llama's.
        pair: puts [CLS] (257) before and [SEP] (258) behind it, as BERT's.
    """
    added = ["<|start|>"] * start + ["[CLS]", "[SEP]"] * pair
    alphabet = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *added]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(added)
    if added:
        single = "<|start|> $A" if start else "[CLS] $A [SEP]"
        ids = [(token, alphabet.index(token)) for token in added]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    names = {"bos_token": "<|start|>"} if start else {"cls_token": "[CLS]", "sep_token": "[SEP]"} if pair else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, **names)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer

"""A tokenizer without a download: one token per printable ASCII character."""

import string

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def character_tokenizer() -> PreTrainedTokenizerFast:
    """100 tokens, of which 0 to 9 are the digits; nothing is added to a text."""
    vocab = {character: index for index, character in enumerate(string.printable)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab=vocab, merges=[])))

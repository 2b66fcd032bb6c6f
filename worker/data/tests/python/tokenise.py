"""Tokenises texts as the authors do, with the slow tokenizers of Hugging Face's transformers.

usage: tokenise.py roberta|bert TOKENIZER.JSON TEXT_LEN   reads JSON texts, one a line, from standard
       input; prints one JSON list of ids a line

The slow tokenizers want a vocabulary and merges as files of their own: they are taken out of
tokenizer.json.
"""

import json
import os
import sys
import tempfile


def roberta(model, folder):
    from transformers import RobertaTokenizer

    vocab, merges = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
    with open(vocab, "w", encoding="utf-8") as file:
        json.dump(model["vocab"], file)
    pairs = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
    with open(merges, "w", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *pairs]) + "\n")
    return RobertaTokenizer(vocab, merges)


def bert(model, folder):
    from transformers import BertTokenizer

    vocab = os.path.join(folder, "vocab.txt")
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    with open(vocab, "w", encoding="utf-8") as file:
        file.write("\n".join(tokens) + "\n")
    return BertTokenizer(vocab, do_lower_case=True)


def main(kind, path, text_len):
    with open(path, encoding="utf-8") as file:
        model = json.load(file)["model"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = {"roberta": roberta, "bert": bert}[kind](model, folder)
        assert not tokenizer.is_fast, "transformers below 5 has the authors' tokenizers"
    for line in sys.stdin:
        ids = tokenizer(
            json.loads(line),
            padding="max_length",
            truncation=True,
            max_length=int(text_len),
            return_special_tokens_mask=True,
        )["input_ids"]
        print(json.dumps(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
